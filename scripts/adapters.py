# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""PEFT adapters on AttnRes models, plain and quantised: made, saved with what tells their base, loaded, merged.

Depth attention is trained in full beside the adapters, in float32: it is far smaller than they are.
"""

import hashlib
import importlib.util
import json
import warnings
from pathlib import Path

import peft
import torch
from depth_callback import decoder
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from training_data import first_line
from training_run import RunError
from transformers.utils import cached_file


BASE_FILE = "base.json"  # beside an adapter: which weights it was trained on
DEPTH_ATTENTION = "depth_attention"
QUANTIZATIONS = {"nf4": "bitsandbytes", "int8": "torchao"}  # and the package that each needs


def quantization_config(name: str, bf16: bool):
    """For `from_pretrained`: `"nf4"`, 4 bits by bitsandbytes, or `"int8"`, 8 bits by torchao. The head stays as it is.

    Raises:
        RunError: its package isn't installed.
    """
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise RunError(f"--quantization {name} needs {package}: pip install {package}")
    if name == "nf4":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16 if bf16 else torch.float32,
        )
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def prepare_quantized(model):
    """Freezes a quantised model, with what isn't quantised in float32."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # some CPUs get another format in evaluation, which has no gradients and takes multiples of 32 rows only
            module.support_avx512bf16_for_cpu = False
    with warnings.catch_warnings():  # PEFT calls transformers by an old name
        warnings.simplefilter("ignore")
        return peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def linear_layers(model: nn.Module) -> list[str]:
    """Names of the decoder layers' linear projections, as PEFT's `target_modules` takes them.

    Those of attention, MLPs and shared experts, whatever the family calls them. Routers and stacks of experts are no
    linear layers in transformers, and stay as they are.
    """
    layers = decoder(model).layers
    return sorted({name.split(".")[-1] for name, module in layers.named_modules() if isinstance(module, nn.Linear)})


def with_adapter(model, config: peft.PeftConfig) -> peft.PeftModel:
    with warnings.catch_warnings():  # of a base that has moved, and of transformers' deprecations
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def new_adapter(model, rank: int, alpha: float, dropout: float, dora: bool, target_modules: list[str] | None = None):
    """A LoRA or DoRA adapter on `target_modules`, by default all of [`linear_layers`].

    Raises:
        RunError: the model has no such modules.
    """
    has_depth = hasattr(decoder(model), DEPTH_ATTENTION)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        use_dora=dora,
        target_modules=target_modules or linear_layers(model),
        modules_to_save=[DEPTH_ATTENTION] if has_depth else None,
    )
    try:
        return with_adapter(model, config)
    except ImportError as error:  # a quantisation package of a version that PEFT doesn't take
        raise RunError(first_line(error)) from None
    except ValueError:
        choice = ", ".join(linear_layers(model))
        raise RunError(
            f"the model can't be adapted at {', '.join(target_modules or [])}; its linear layers are {choice}."
        ) from None


@torch.no_grad()
def fingerprint(model: nn.Module) -> str:
    """Stands for a base's weights: tensors that no quantisation touches, to the precision of bfloat16."""
    base = decoder(model)
    tensors = [base.embed_tokens.weight[:64], *base.norm.parameters()]
    tensors += getattr(base, DEPTH_ATTENTION, nn.Module()).parameters()
    parts = [tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16) for tensor in tensors]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


def load_adapter(model, adapter: str, is_trainable: bool = False):
    """`model` with a saved adapter. PEFT alone is silent about much of what doesn't fit.

    Args:
        adapter: folder or Hub id.

    Raises:
        RunError: there is none, or it was trained on another base.
    """
    try:
        config = peft.PeftConfig.from_pretrained(adapter)
        if cached_file(adapter, SAFETENSORS_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False) is None:
            raise RunError(f"there is no {SAFETENSORS_WEIGHTS_NAME}, and pickles are not loaded")
        saved = load_peft_weights(adapter, device="cpu")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"no adapter at {adapter}: {first_line(error)}.") from None
    made_for = f"the adapter {adapter} is for another base"
    if config.base_model_name_or_path:
        made_for += f", {config.base_model_name_or_path}"
    base_file = cached_file(adapter, BASE_FILE, _raise_exceptions_for_missing_entries=False)
    if base_file is not None:
        before = json.loads(Path(base_file).read_text(encoding="utf-8"))["fingerprint"]
        if before != fingerprint(model):
            raise RunError(f"{made_for}, whose weights differ from the model's.")
    config.inference_mode = not is_trainable
    try:
        adapted = with_adapter(model, config)
    except ValueError as error:
        raise RunError(f"{made_for}: {first_line(error)[:200]}.") from None
    embeddings = ("embed_tokens.weight", "lm_head.weight")  # are saved with an adapter that doesn't train them
    saved = {name: tensor for name, tensor in saved.items() if not name.endswith(embeddings)}
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    shapes, saved_shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (expected, saved))
    for name in sorted(shapes.keys() | saved_shapes.keys()):
        if shapes.get(name) != saved_shapes.get(name):
            raise RunError(f"{made_for}: {name} is {saved_shapes.get(name)} in it, here {shapes.get(name)}.")
    peft.set_peft_model_state_dict(adapted, saved)
    return adapted


@torch.no_grad()
def take_over_quantized(base: nn.Module, trained):
    """Gives `base`, in full precision, the weights of the quantised base of `trained`: those its adapter goes with."""
    for name, module in trained.get_base_model().named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer) and ".lora_" not in name:
            weight = base.get_submodule(name.removesuffix(".base_layer")).weight
            weight.copy_(dequantize_module_weight(module).to(weight.dtype))
