# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What a run starts from: its tokenizer and its model, new or loaded, a donor's converted on the way."""

import re
from pathlib import Path

import torch
from attnres_convert import InputError, convert_checkpoint, convert_to_donor
from transformers import PreTrainedConfig

from configuration_attnres import ATTN_RES_MODES, AttnResConfigMixin

from .configs import check_sizes, read_config, with_mode
from .data import train_tokenizer
from .folders import whole_folder
from .loading import load_tokenizer, load_weights, random_model
from .look import decoder


# of the supported families, the matrices from which attention and MLPs write, also of experts
WRITING = re.compile(r"\.layers\.\d+\.(.+\.)?(o_proj|down_proj|c_proj)(\.weight)?$")


def scaled_model(config: PreTrainedConfig):
    """A model with random weights that fit its width and depth: matrices have a standard deviation of 1/sqrt(hidden),
    and those from which sublayers write 1/sqrt(2L) of that, so that the sum of all outputs doesn't grow with depth.

    transformers' default, 0.02 at any width, is much too small for narrow models: at hidden size 64 a sixth. Where a
    norm follows the sublayer (Gemma 2 and 3, GLM-4) the second factor does nothing.

    Raises:
        InputError: the configuration has no `initializer_range`, or its layers have other names.
    """
    kind = config.model_type.removeprefix("attnres_")
    if not hasattr(config, "initializer_range"):
        raise InputError(f"--init scaled needs initializer_range, which {kind} doesn't have; use --init default.")
    config.initializer_range = config.hidden_size**-0.5
    model = random_model(config)
    with torch.no_grad():
        written = [parameter for name, parameter in model.named_parameters() if WRITING.search(name)]
        if len(written) < 2 * config.num_hidden_layers:
            raise InputError(f"--init scaled doesn't know the layers of {kind}; use --init default.")
        for parameter in written:
            parameter *= (2 * config.num_hidden_layers) ** -0.5
    return model


INITS = {"default": random_model, "scaled": scaled_model}


def new_model(
    config: PreTrainedConfig, mode: str | None, block_size: int | None, tokenizer, sized: bool, init: str = "default"
):
    """A model with random weights; of one seed, all modes of a family share the donor's weights.

    Args:
        sized: whether its vocabulary is to have the size of the tokenizer's.
        init: of INITS.
    """
    check_sizes(config)
    try:
        config = with_mode(config, mode, block_size)
    except ValueError as error:
        raise InputError(str(error)) from None
    if sized:
        config.vocab_size = len(tokenizer)
    elif len(tokenizer) > config.vocab_size:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: --set vocab_size=..."
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return INITS[init](config)


def starting_point(
    model: str, config: PreTrainedConfig, mode: str | None, block_size: int | None, converted: Path
) -> str:
    """The checkpoint to continue from: `model` itself, or what conversion makes of it, in `converted`.

    Args:
        config: of `model`.
    """
    is_attnres = isinstance(config, AttnResConfigMixin)
    own_mode = config.attn_res_mode if is_attnres else "donor"
    if mode == own_mode or mode is None and is_attnres:
        if is_attnres and block_size not in (None, config.attn_res_block_size):
            raise InputError(f"--block-size can't change that of {model}; leave it out.")
        return model
    if converted.exists():
        return str(converted)
    if is_attnres and mode != "donor":
        raise InputError(f"{model} was trained in {own_mode} mode and can't be trained on in {mode} mode.")
    if is_attnres:
        convert_to_donor(model, converted, verify=False)
    else:
        chosen = {} if mode is None else {"mode": mode}  # by default conversion decides
        if mode is None or ATTN_RES_MODES[mode].sums_blocks:
            chosen["block_size"] = block_size
        convert_checkpoint(model, converted, **chosen, verify=False)
    return str(converted)


def load_model(model: str, mode: str | None, block_size: int | None, converted: Path, **options):
    """The model to train on; `options` are those of `from_pretrained`, the others those of [`starting_point`]."""
    source = starting_point(model, read_config(model), mode, block_size, converted)
    loaded = load_weights(source, plain=True, **{"dtype": torch.float32, **options})
    if decoder(loaded) is None:
        raise InputError(f"{model} is a {type(loaded).__name__}, which isn't made of layers as the families here are.")
    return loaded


def new_tokenizer(texts, size: int, folder: Path):
    """A tokenizer of `size` tokens, trained on `texts` unless `folder` has it already.

    Raises:
        InputError: the size is less than the bytes and special tokens need.
    """
    if not folder.exists():
        tokenizer = train_tokenizer(texts, size)
        if len(tokenizer) > size:
            raise InputError(f"--train-tokenizer {size} is too small: {len(tokenizer)} tokens at least.")
        with whole_folder(folder) as partial:
            tokenizer.save_pretrained(partial)
    return load_tokenizer(str(folder))


def get_tokenizer(source: str, option: str):
    """
    Args:
        option: what gives another one.
    """
    try:
        return load_tokenizer(source)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; give {option}.") from None
