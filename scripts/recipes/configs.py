# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Configurations of models: read, changed, and refused where they can't work."""

import dataclasses
import importlib.util
import os
from contextlib import suppress
from pathlib import Path

from attnres_convert import InputError, reading
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

import attnres  # noqa: F401, registers its classes
from configuration_attnres import ATTN_RES_MODES, AttnResConfigMixin, attn_res_config_class


MADE_PLAIN = ("mxfp4", "fp8")  # ways to quantise whose weights transformers can make plain as it loads them


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
            raise InputError(f"no configuration at {source}: it is an adapter, which needs its base as the model.")
        reading.check_folder(path)
        values = reading.read_config(path)
    elif os.path.exists(source):
        values = reading.read_json(path, reading.MAX_CONFIG)
    elif source.startswith((".", "/", "~")):
        raise InputError(f"{source} doesn't exist.")
    else:
        with reading.understood(f"no configuration at {source}"):
            values = PreTrainedConfig.get_config_dict(source)[0]
    if not values.get("model_type"):
        raise InputError(f"no configuration at {source}: nothing names a model type.")
    if any(name.startswith("attn_res_") for name in overrides):  # fields of the family's AttnRes form
        with suppress(ValueError):
            values = {**values, "model_type": attn_res_config_class(values["model_type"]).model_type}
    values = reading.check_config({**values, **overrides}, f"the configuration of {source}")
    if values["model_type"] not in CONFIG_MAPPING:
        hint = "; if you trust the code that it brings, generate.py runs it: add --trust-remote-code"
        hint = hint if values.get("auto_map") else ""
        raise InputError(f"{source}: model type {values['model_type']!r} is unknown to transformers{hint}.")
    config_class = CONFIG_MAPPING[values["model_type"]]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    if unknown := overrides.keys() - known:
        raise InputError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}; see --set.")
    with reading.understood(f"the configuration of {source} is wrong"):
        return config_class.from_dict(values)


def check_context(config: PreTrainedConfig, seq_len: int):
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise InputError(
            f"--seq-len {seq_len} is longer than the model's context, max_position_embeddings = {longest}."
        )


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
    if kind in (*MADE_PLAIN, "bitsandbytes"):
        advice += ", or a float one of attnres-convert --dequantize"
    if kind == "bitsandbytes":
        if adapters is not None and adapters != "int8" and not merge:
            if importlib.util.find_spec("bitsandbytes") is None:
                raise InputError(f"{model} needs bitsandbytes: pip install bitsandbytes")
            return
        advice += ", or use --method qlora without --merge"
    elif kind in MADE_PLAIN:
        advice += ", or train with another --method, for which its weights are made plain"
    raise InputError(f"{model} is quantised ({kind}), which can't be trained in this way; {advice}.")


def check_sizes(config: PreTrainedConfig):
    """Refuses sizes that transformers takes and that fail only in a model's first forward, or make no sense."""
    sizes = {name: getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise InputError(f"{name} is {size}; it must be at least 1.")
    heads, key_value_heads = sizes["num_attention_heads"], getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(key_value_heads, int) and (key_value_heads < 1 or heads % key_value_heads):
        raise InputError(f"num_key_value_heads = {key_value_heads} must divide num_attention_heads = {heads}.")
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if isinstance(chosen, int) and isinstance(experts, int) and experts and not 0 < chosen <= experts:
            raise InputError(f"num_experts_per_tok = {chosen} must be from 1 to {name} = {experts}.")


def with_mode(config: PreTrainedConfig, mode: str | None, block_size: int | None) -> PreTrainedConfig:
    """The configuration of a new model: the family's AttnRes form in `mode`, or its donor's for `"donor"`."""
    is_attnres = isinstance(config, AttnResConfigMixin)
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    if mode == "donor":
        if not is_attnres:
            check_decoder(config.model_type)
            return config
        own = {field.name for field in dataclasses.fields(AttnResConfigMixin)}
        return config.donor_config_class()(**{name: value for name, value in values.items() if name not in own})
    config_class = attn_res_config_class(config.model_type)
    values["attn_res_mode"] = mode or values.get("attn_res_mode", config_class.attn_res_mode)
    if block_size is not None and ATTN_RES_MODES[values["attn_res_mode"]].sums_blocks:
        values["attn_res_block_size"] = block_size
    return config_class(**values)


def check_decoder(model_type: str):
    """Refuses what isn't a language model from left to right."""
    others = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or any(model_type in names for names in others):
        raise InputError(f"{model_type} is no decoder-only language model, and only these are trained.")
