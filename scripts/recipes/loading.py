# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as a user names them: AttnRes models, donors, and folders of PEFT adapters on their base.

Others wrote them: nothing in them is trusted, and what is wrong with them is said in one line.
"""

import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from attnres_convert import InputError, reading
from attnres_convert.checkpoint import read_checkpoint
from attnres_convert.loading import LAYER, empty_model
from attnres_convert.verification import available_memory
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from .adapters import find_file, load_adapter, read_adapter_config
from .configs import MADE_PLAIN, check_context, quantization, read_config
from .data import check_tokens
from .packing import separate_documents


# Tensors that checkpoints have and models make by themselves, or that predict tokens further ahead
HARMLESS = re.compile(r"inv_freq$|masked_bias$|attn\.bias$|position_ids$|(^|\.)(mtp|nextn)")


@dataclass
class Checkpoint:
    """A model to load, after the parts that can be checked quickly were."""

    path: str
    base: str
    adapter: str | None
    config: PreTrainedConfig
    tokenizer: object

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens, if the model has a limit."""
        return getattr(self.config, "max_position_embeddings", None)

    def check(self, input_ids, name: str):
        """Raises an InputError where the text `name` has a token that the model has no embedding of."""
        check_tokens(input_ids, self.config.vocab_size, self.tokenizer, name)


def check_memory(parameters: int, what: str):
    """Refuses a model whose weights alone need more memory than there is."""
    needed, free = 4 * parameters, available_memory()
    if free is not None and needed > free:
        raise InputError(
            f"{what} has {parameters:,} parameters, which need {needed / 1e9:,.0f} GB in float32, and "
            f"{free / 1e9:,.0f} GB of memory are free; choose smaller sizes."
        )


def random_model(config: PreTrainedConfig):
    """A model with random weights.

    Raises:
        InputError: no model has this configuration, or it doesn't fit into the memory.
    """
    with reading.understood("no model has this configuration"):
        model = empty_model(AutoModelForCausalLM._model_mapping[type(config)], config)
        check_memory(sum(parameter.numel() for parameter in model.parameters()), "such a model")
        return separate_documents(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def check_weights(folder: Path, config: PreTrainedConfig):
    """Whether the tensors of a folder can be those of the model, before memory is set aside for it.

    Raises:
        InputError: the folder has no sound weights, or a model of another size.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise InputError("transformers_weights names another file; rename that to model.safetensors.")
    tensors = read_checkpoint(folder).tensors
    layers = {int(found[1]) for name in tensors if (found := LAYER.search(name))}
    number = getattr(config, "num_hidden_layers", None)
    if layers and isinstance(number, int) and len(layers) < number:
        missing = next(layer for layer in range(number) if layer not in layers)
        raise InputError(f"config.json says {number} layers, and there are no tensors of layer {missing}.")
    model = empty_model(AutoModelForCausalLM._model_mapping[type(config)], config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    found = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if wanted > 10 * found:  # a quantised weight may be an eighth of a number
        raise InputError(f"config.json describes {wanted:,} parameters, and the tensors hold {found:,} numbers.")


def check_unused(source: str, names: list[str], model_type: str, is_quantized: bool):
    """Says which tensors of a checkpoint a model doesn't use.

    Raises:
        InputError: they are those of depth attention, without which it computes something else.
    """
    if depth := [name for name in names if "depth_attention." in name]:
        raise InputError(
            f"{source} doesn't load: it has {depth[0]}, so it is an AttnRes checkpoint, and its config.json is of "
            f"{model_type}, which doesn't use that; put back the config.json that it was saved with."
        )
    others = [name for name in names if not HARMLESS.search(name)]
    if others and not is_quantized and os.environ.get("RANK", "0") == "0":
        text = f"{source} has {len(others)} tensors that a {model_type} model doesn't use, such as {others[0]}"
        print(reading.one_line(text), file=sys.stderr)


def load_weights(source: str, plain: bool = False, **options):
    """A checkpoint as `from_pretrained` loads it, if it holds all weights; transformers would make up the others.
    Pickles are not loaded. What the configuration says of outputs is left out: callers ask for what they need.

    Args:
        plain: whether weights that are quantised in one of the ways MADE_PLAIN are to be plain numbers.
        options: of `from_pretrained`.

    Raises:
        InputError: it doesn't load, or lacks weights.
    """
    options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False, **options}
    try:
        with reading.understood(f"{source} doesn't load"):
            config = options.pop("config", None)
            if config is None:
                config = AutoConfig.from_pretrained(source, trust_remote_code=options["trust_remote_code"])
            config.output_attentions = config.output_hidden_states = config.is_encoder_decoder = False
            config.return_dict = True
            if hasattr(config, "output_depth_attentions"):
                config.output_depth_attentions = False
            is_quantized = quantization(config) is not None
            if plain and quantization(config) in MADE_PLAIN:
                config.quantization_config = {**config.quantization_config, "dequantize": True}
            if os.path.isdir(source) and type(config) in AutoModelForCausalLM._model_mapping:
                check_weights(Path(source), config)
            model, info = AutoModelForCausalLM.from_pretrained(source, config=config, **options)
    except InputError as error:
        text = str(error)
        text = "tensors don't have the shapes of config.json." if "mismatched" in text else text
        start = f"{source} doesn't load: "
        raise InputError(start + text.removeprefix(start)) from None
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{source} doesn't load: it has no {missing[0]} ({len(missing)} tensors are missing in all).")
    unused = sorted(name for name in info["unexpected_keys"] if LAYER.search(name))
    if any(int(LAYER.search(name)[1]) >= model.config.num_hidden_layers for name in unused):
        raise InputError(f"{source} doesn't load: it has {unused[-1]}, and config.json fewer layers.")
    check_unused(source, sorted(info["unexpected_keys"]), model.config.model_type, is_quantized)
    if is_quantized and getattr(model, "hf_quantizer", None) is None:
        model._weight_conversions = None  # those of the file would be undone as it is saved: its weights are plain now
        model.to(model.dtype)
    return separate_documents(model)


def load_tokenizer(source: str, **options):
    """A tokenizer as it was saved. For some model types `AutoTokenizer` takes a class of its own choice, which cuts
    text in another way, also where the saved one says it is no more than its `tokenizer.json`.

    Raises:
        InputError: there is none, or it is broken.
    """
    options = {"trust_remote_code": False, **options}  # left open, transformers would ask on the terminal
    if os.path.isdir(source):
        reading.check_folder(Path(source))
    with reading.understood(f"no tokenizer at {source}"):
        saved_as = get_tokenizer_config(source, **options).get("tokenizer_class")
        is_plain = saved_as in ("TokenizersBackend", "PreTrainedTokenizerFast")
        tokenizer = (PreTrainedTokenizerFast if is_plain else AutoTokenizer).from_pretrained(source, **options)
        tokenizer.decode(tokenizer("a")["input_ids"])
        return tokenizer


def open_checkpoint(
    path: str, base: str | None = None, tokenizer: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Reads the configuration and tokenizer of a checkpoint.

    Args:
        path: folder or Hub id of a model or adapter.
        base: the base of an adapter, instead of the one that it names.
        tokenizer: folder or Hub id, instead of the checkpoint's own.
        trust_remote_code: whether code of the checkpoint may run, for model types that transformers doesn't know.

    Raises:
        InputError: there is no checkpoint, base or tokenizer.
    """
    adapter, source = None, path
    adapter_config = read_adapter_config(path)
    if adapter_config is not None:
        adapter, source = path, base or adapter_config.get("base_model_name_or_path")
        if not source:
            raise InputError(f"the adapter {path} names no base; give --base.")
    try:
        if trust_remote_code:
            if os.path.isdir(source):
                reading.check_folder(Path(source))
                reading.read_config(Path(source))
            with reading.understood(f"no configuration at {source}"):
                config = AutoConfig.from_pretrained(source, trust_remote_code=True)
        else:
            config = read_config(source)
    except InputError as error:
        if adapter is None:
            raise
        raise InputError(f"the base of the adapter {path}: {str(error).rstrip('.')}. Give --base.") from None
    own = adapter is not None and find_file(adapter, "tokenizer_config.json") is not None
    try:
        loaded = load_tokenizer(tokenizer or (adapter if own else source), trust_remote_code=trust_remote_code)
    except InputError as error:
        raise InputError(f"{str(error).rstrip('.')}; give --tokenizer.") from None
    return Checkpoint(path, source, adapter, config, loaded)


def load_checkpoint(checkpoint: Checkpoint, dtype="auto", trust_remote_code: bool = False, **options):
    """The model for inference, on the accelerator where there is one and no `device_map`. Pickles are not loaded.

    Args:
        options: others of `from_pretrained`.

    Raises:
        InputError: it doesn't load, or the adapter is for another base.
    """
    model = load_weights(checkpoint.base, dtype=dtype, trust_remote_code=trust_remote_code, **options)
    if checkpoint.adapter is not None:
        model = load_adapter(model, checkpoint.adapter)
    if "device_map" not in options and torch.accelerator.is_available() and model.device.type == "cpu":
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval()


def check_contexts(checkpoints: list[Checkpoint], seq_len: int):
    for checkpoint in checkpoints:
        try:
            check_context(checkpoint.config, seq_len)
        except InputError as error:
            raise InputError(f"{checkpoint.path}: {error}") from None


def short_names(paths: list[str]) -> list[str]:
    """The paths without the folders that all of them begin or end with, for tables and legends."""
    if files := [path for path in paths if os.path.isfile(path)]:
        raise InputError(f"{files[0]} is not a folder.")
    # folders by their full path, so that `.` has a name and one that is written in two ways is the same
    places = [Path(path).resolve() if os.path.exists(path) else Path(path) for path in paths]
    if len(set(places)) < len(places):
        raise InputError("a checkpoint is given twice.")
    here = Path.cwd()
    parts = [(place.relative_to(here) if here in place.parents else place).parts for place in places]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), shortest - start - 1)
    return [Path(*part[start : len(part) - end]).as_posix() for part in parts]
