# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Whether a model of transformers would load a checkpoint completely, found out from names and shapes alone."""

import re
from collections.abc import Collection, Iterable

import torch
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig, PreTrainedModel

from .checkpoint import CONFIG_NAME, Checkpoint, ConversionError
from .reading import understood
from .verification import quiet


FLOATS = ("F32", "F16", "BF16")  # which float32 holds exactly
LAYER = re.compile(r"\blayers\.(\d{1,9})\.")


def empty_model(model_class: type, config) -> PreTrainedModel:
    """The model on the `meta` device: its names and shapes, without memory."""
    with quiet(), torch.device("meta"):
        return model_class(config)


def check_layers(num_layers: int, names: Collection[str]) -> None:
    """Before a model is built, which takes time for each layer.

    Args:
        names: of all tensors.
    """
    if num_layers > len(names):
        raise ConversionError(
            f"{CONFIG_NAME} disagrees with the tensors: it says {num_layers} layers, more than there are tensors."
        )


def read_tensors(checkpoint: Checkpoint, names: Iterable[str], dtypes: tuple[str, ...] = FLOATS) -> dict:
    """A few small tensors of a checkpoint, by name.

    Raises:
        ConversionError: one is of none of `dtypes`, has values that aren't finite, or can't be read.
    """
    tensors = {}
    for name in names:
        if (dtype := checkpoint.tensors[name].dtype) not in dtypes:
            raise ConversionError(f"{name} is {dtype}; one of {', '.join(dtypes)} is expected.")
        path = checkpoint.shards[checkpoint.file_of(name)].path
        with understood(f"{path.name} can't be read"), safe_open(path, framework="pt") as file:
            tensors[name] = file.get_tensor(name)
        if not tensors[name].isfinite().all():
            raise ConversionError(f"{name} has values that aren't finite.")
    return tensors


def check_tensors(model: PreTrainedModel, shapes: dict[str, tuple[int, ...]], num_mtp_layers: int) -> list[str]:
    """Lets transformers load tensors of these names and shapes, without contents, into an empty model.

    So names that differ on disk from the module's, as those of experts, are understood as on a real load.

    Args:
        model: on the `meta` device.
        shapes: of all tensors of the checkpoint.
        num_mtp_layers: behind the model's own, which predict further tokens; transformers leaves them out.

    Returns:
        Warnings, about tensors that the model doesn't use.

    Raises:
        ConversionError: the model lacks a tensor, or one has another shape than its configuration says.
    """
    with understood(f"transformers can't load these tensors as {CONFIG_NAME} says", kind=ConversionError), quiet():
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        state_dict = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        load_config = LoadStateDictConfig(
            device_map={"": "meta"}, dtype=torch.float32, weight_mapping=get_model_conversion_mapping(model)
        )
        info, _ = convert_and_load_state_dict_in_model(model, state_dict, load_config)
        model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        model._adjust_missing_and_unexpected_keys(info)
    missing = dict.fromkeys(info.missing_keys | set(info.conversion_errors), "is missing")
    mismatched = {
        name: f"is {list(found)} where the configuration says {list(wanted)}"
        for name, found, wanted in info.mismatched_keys
    }
    num_layers = model.config.num_hidden_layers
    mtp = {name for name in shapes if num_layers <= _layer(name) < num_layers + num_mtp_layers}
    unused = {name for name in info.unexpected_keys if not num_layers <= _layer(name) < num_layers + num_mtp_layers}
    too_deep = {
        name: f"belongs to none of the {num_layers} layers of the configuration"
        for name in unused
        if _layer(name) >= num_layers
    }
    # a quantiser stores matrices in formats of its own, but neither norms nor embeddings
    quantized = getattr(model.config, "quantization_config", None) is not None
    problems = {
        name: problem
        for name, problem in {**too_deep, **missing, **mismatched}.items()
        if not quantized or name in too_deep or _is_never_quantized(name, expected.get(name, ()))
    }
    if problems:
        name = min(problems, key=lambda name: (name in missing, name))
        if prefix := next((other.removesuffix(name) for other in shapes if other.endswith(f".{name}")), ""):
            raise ConversionError(
                f"the names of the tensors begin with {prefix!r}, as in {prefix}{name}; strip it from all of them."
            )
        more = f" ({len(problems)} tensors in all)" if len(problems) > 1 else ""
        raise ConversionError(f"{CONFIG_NAME} disagrees with the tensors: {name} {problems[name]}{more}.")
    warnings = []
    if mtp:
        warnings.append(
            f"{type(model).__name__} has no layers that predict further tokens: {min(mtp)} and the others of such "
            "layers are copied as they are, unused."
        )
    if unused and not quantized:
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        warnings.append(f"{type(model).__name__} doesn't use {min(unused)}{more}; copied as they are.")
    return warnings


def _layer(name: str) -> int:
    """The number of the layer that a tensor belongs to, or -1."""
    found = LAYER.search(name)
    return int(found[1]) if found else -1


def _is_never_quantized(name: str, shape: tuple[int, ...]) -> bool:
    return name.endswith("norm.weight") and len(shape) == 1 or name.endswith("embed_tokens.weight")
