# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as a user names them: AttnRes models, donors, and folders of PEFT adapters on their base.

Others wrote them: nothing in them is trusted, and what is wrong with them is said in one line.
"""

import dataclasses
import importlib.util
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from adapters import find_file, load_adapter, read_adapter_config
from attnres_convert import InputError, reading
from attnres_convert.checkpoint import read_checkpoint
from attnres_convert.loading import LAYER, empty_model
from attnres_convert.verification import available_memory
from packed_documents import separate_documents
from training_data import check_tokens
from training_run import RunError
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config

import attnres  # noqa: F401, registers its classes


MADE_PLAIN = ("mxfp4", "fp8")  # ways to quantise whose weights transformers can make plain as it loads them
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
        """Raises a DataError where the text `name` has a token that the model has no embedding of."""
        check_tokens(input_ids, self.config.vocab_size, self.tokenizer, name)


def read_config(source: str, overrides: dict | None = None, may_be_type: bool = False) -> PreTrainedConfig:
    """The configuration of a checkpoint, or in a JSON file, with some fields replaced.

    Args:
        may_be_type: whether `source` may also be a model type, which goes before a folder of this name.

    Raises:
        InputError: there is none, or a field is unknown or has a wrong value.
    """
    overrides = overrides or {}
    path = Path(source)
    if may_be_type and source in CONFIG_MAPPING:
        values = {"model_type": source}
    elif os.path.isdir(source):  # unlike a Path, it takes a name of any length
        if (path / reading.ADAPTER_NAME).exists() and not (path / reading.CONFIG_NAME).exists():
            raise RunError(f"no configuration at {source}: it is an adapter, which needs its base as the model.")
        reading.check_folder(path)
        values = reading.read_config(path)
    elif os.path.exists(source):
        values = reading.read_json(path, reading.MAX_CONFIG)
    elif source.startswith((".", "/", "~")):
        raise RunError(f"{source} doesn't exist.")
    else:
        with reading.understood(f"no configuration at {source}", kind=RunError):
            values = PreTrainedConfig.get_config_dict(source)[0]
    if not values.get("model_type"):
        raise RunError(f"no configuration at {source}: nothing names a model type.")
    values = reading.check_config({**values, **overrides}, f"the configuration of {source}")
    if values["model_type"] not in CONFIG_MAPPING:
        hint = "; if you trust the code that it brings, generate.py runs it: add --trust-remote-code"
        hint = hint if values.get("auto_map") else ""
        raise RunError(f"{source}: model type {values['model_type']!r} is unknown to transformers{hint}.")
    config_class = CONFIG_MAPPING[values["model_type"]]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    if unknown := overrides.keys() - known:
        raise RunError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}; see --set.")
    with reading.understood(f"the configuration of {source} is wrong", kind=RunError):
        return config_class.from_dict(values)


def check_context(config: PreTrainedConfig, seq_len: int):
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise RunError(f"--seq-len {seq_len} is longer than the model's context, max_position_embeddings = {longest}.")


def quantization(config: PreTrainedConfig) -> str | None:
    """How the weights of a checkpoint are quantised, if they are."""
    values = getattr(config, "quantization_config", None)
    if not isinstance(values, dict):
        return None
    in_bits = values.get("load_in_4bit") or values.get("load_in_8bit")
    return "bitsandbytes" if in_bits else str(values.get("quant_method"))


def check_trainable(config: PreTrainedConfig, model: str, adapters: str | None = None, merge: bool = False):
    """Refuses to train a quantised checkpoint in a way that would fail after hours.

    Args:
        adapters: quantisation that adapters are to go on: `""` for none, `None` where there are no adapters.
        merge: whether the adapter is to be merged.
    """
    kind = quantization(config)
    if kind is None or kind in MADE_PLAIN and not adapters:
        return
    advice = "give the checkpoint that it was made from"
    if kind == "bitsandbytes":
        if adapters is not None and adapters != "int8" and not merge:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise RunError(f"{model} needs bitsandbytes: pip install bitsandbytes")
            return
        advice += ", or train an adapter (finetune.py --method qlora) without --merge"
    elif kind in MADE_PLAIN:
        advice += ", or train with another --method, for which its weights are made plain"
    raise RunError(f"{model} is quantised ({kind}), which can't be trained in this way; {advice}.")


def check_memory(parameters: int, what: str):
    """Refuses a model whose weights alone need more memory than there is."""
    needed, free = 4 * parameters, available_memory()
    if free is not None and needed > free:
        raise RunError(
            f"{what} has {parameters:,} parameters, which need {needed / 1e9:,.0f} GB in float32, and "
            f"{free / 1e9:,.0f} GB of memory are free; choose smaller sizes."
        )


def random_model(config: PreTrainedConfig):
    """A model with random weights.

    Raises:
        RunError: no model has this configuration, or it doesn't fit into the memory.
    """
    with reading.understood("no model has this configuration", kind=RunError):
        model = empty_model(AutoModelForCausalLM._model_mapping[type(config)], config)
        check_memory(sum(parameter.numel() for parameter in model.parameters()), "such a model")
        return separate_documents(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def check_weights(folder: Path, config: PreTrainedConfig):
    """Whether the tensors of a folder can be those of the model, before memory is set aside for it.

    Raises:
        InputError: the folder has no sound weights, or a model of another size.
    """
    if getattr(config, "transformers_weights", None) is not None:
        raise RunError("transformers_weights names another file; rename that to model.safetensors.")
    tensors = read_checkpoint(folder).tensors
    layers = {int(found[1]) for name in tensors if (found := LAYER.search(name))}
    number = getattr(config, "num_hidden_layers", None)
    if layers and isinstance(number, int) and len(layers) < number:
        missing = next(layer for layer in range(number) if layer not in layers)
        raise RunError(f"config.json says {number} layers, and there are no tensors of layer {missing}.")
    model = empty_model(AutoModelForCausalLM._model_mapping[type(config)], config)
    wanted = sum(parameter.numel() for parameter in model.parameters())
    found = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if wanted > 10 * found:  # a quantised weight may be an eighth of a number
        raise RunError(f"config.json describes {wanted:,} parameters, and the tensors hold {found:,} numbers.")


def check_unused(source: str, names: list[str], model_type: str, is_quantized: bool):
    """Says which tensors of a checkpoint a model doesn't use.

    Raises:
        RunError: they are those of depth attention, without which it computes something else.
    """
    if depth := [name for name in names if "depth_attention." in name]:
        raise RunError(
            f"{source} doesn't load: it has {depth[0]}, so it is an AttnRes checkpoint, and its config.json is of "
            f"{model_type}, which doesn't use that; put back the config.json that it was saved with."
        )
    others = [name for name in names if not HARMLESS.search(name)]
    if others and not is_quantized and os.environ.get("RANK", "0") == "0":
        text = f"{source} has {len(others)} tensors that a {model_type} model doesn't use, such as {others[0]}"
        print(reading.one_line(text), file=sys.stderr)


def load_weights(source: str, may_be_new: str | None = None, plain: bool = False, **options):
    """A checkpoint as `from_pretrained` loads it, if it holds all weights; transformers would make up the others.
    Pickles are not loaded. What the configuration says of outputs is left out: callers ask for what they need.

    Args:
        may_be_new: part of the names of the weights that the checkpoint may lack.
        plain: whether weights that are quantised in one of the ways MADE_PLAIN are to be plain numbers.
        options: of `from_pretrained`.

    Raises:
        RunError: it doesn't load, or lacks weights.
    """
    options = {"use_safetensors": True, "output_loading_info": True, "trust_remote_code": False, **options}
    try:
        with reading.understood(f"{source} doesn't load", kind=RunError):
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
        raise RunError(start + text.removeprefix(start)) from None
    missing = sorted(name for name in info["missing_keys"] if may_be_new is None or may_be_new not in name)
    if missing:
        raise RunError(f"{source} doesn't load: it has no {missing[0]} ({len(missing)} tensors are missing in all).")
    unused = sorted(name for name in info["unexpected_keys"] if LAYER.search(name))
    if any(int(LAYER.search(name)[1]) >= model.config.num_hidden_layers for name in unused):
        raise RunError(f"{source} doesn't load: it has {unused[-1]}, and config.json fewer layers.")
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
    with reading.understood(f"no tokenizer at {source}", kind=RunError):
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
            raise RunError(f"the adapter {path} names no base; give --base.")
    try:
        if trust_remote_code:
            if os.path.isdir(source):
                reading.check_folder(Path(source))
                reading.read_config(Path(source))
            with reading.understood(f"no configuration at {source}", kind=RunError):
                config = AutoConfig.from_pretrained(source, trust_remote_code=True)
        else:
            config = read_config(source)
    except InputError as error:
        if adapter is None:
            raise
        raise RunError(f"the base of the adapter {path}: {str(error).rstrip('.')}. Give --base.") from None
    own = adapter is not None and find_file(adapter, "tokenizer_config.json") is not None
    try:
        loaded = load_tokenizer(tokenizer or (adapter if own else source), trust_remote_code=trust_remote_code)
    except InputError as error:
        raise RunError(f"{str(error).rstrip('.')}; give --tokenizer.") from None
    return Checkpoint(path, source, adapter, config, loaded)


def load_checkpoint(checkpoint: Checkpoint, dtype: str = "auto", trust_remote_code: bool = False):
    """The model, on the accelerator where there is one, for inference. Pickles are not loaded.

    Raises:
        InputError: it doesn't load, or the adapter is for another base.
    """
    model = load_weights(checkpoint.base, dtype=dtype, trust_remote_code=trust_remote_code)
    if checkpoint.adapter is not None:
        model = load_adapter(model, checkpoint.adapter)
    if torch.accelerator.is_available() and model.device.type == "cpu":
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval()


def check_contexts(checkpoints: list[Checkpoint], seq_len: int):
    for checkpoint in checkpoints:
        try:
            check_context(checkpoint.config, seq_len)
        except RunError as error:
            raise RunError(f"{checkpoint.path}: {error}") from None


def short_names(paths: list[str]) -> list[str]:
    """The paths without the folders that all of them begin or end with, for tables and legends."""
    if files := [path for path in paths if os.path.isfile(path)]:
        raise RunError(f"{files[0]} is not a folder.")
    # folders by their full path, so that `.` has a name and one that is written in two ways is the same
    places = [Path(path).resolve() if os.path.exists(path) else Path(path) for path in paths]
    if len(set(places)) < len(places):
        raise RunError("a checkpoint is given twice.")
    here = Path.cwd()
    parts = [(place.relative_to(here) if here in place.parents else place).parts for place in places]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), shortest - start - 1)
    return [Path(*part[start : len(part) - end]).as_posix() for part in parts]
