# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""PEFT adapters on AttnRes models, plain and quantised: made, saved with what tells their base, loaded, merged.

Depth attention is trained in full beside the adapters, in float32: it is far smaller than they are.
"""

import hashlib
import importlib.util
import os
import re
import warnings
from pathlib import Path

import peft
import torch
from attnres_convert import InputError, reading
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME, load_peft_weights
from peft.utils.integrations import dequantize_module_weight
from torch import nn
from transformers.utils import cached_file

from .look import decoder


BASE_FILE = "base.json"  # beside an adapter: which model it was trained on
DEPTH_ATTENTION = "depth_attention"
SECONDS = 60  # to look for the modules of an adapter, whose names may be a regular expression
# with the same weights, other sums
READS = ("attn_res_mode", "attn_res_block_size", "attn_res_sum_scale", "attn_res_window", "attn_res_num_heads")
QUANTIZATIONS = {"nf4": "bitsandbytes", "int8": "torchao"}  # and the package that each needs


def find_file(path: str, name: str) -> str | None:
    """A file of a folder or Hub id, if there is one."""
    if os.path.exists(path):
        return str(Path(path, name)) if os.path.exists(Path(path, name)) else None
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such repository: reading its configuration says so
        return None


def read_adapter_config(adapter: str) -> dict | None:
    """The configuration of an adapter; `None` where a folder or Hub id has none.

    Raises:
        InputError: it is broken, or PEFT would fail at it without a word.
    """
    file = find_file(adapter, reading.ADAPTER_NAME)
    if file is None:
        return None
    if os.path.isdir(adapter):
        reading.check_folder(Path(adapter))
    content = reading.read_json(Path(file), reading.MAX_CONFIG)
    reading.typed(content, "base_model_name_or_path", str, file)
    kind = reading.typed(content, "peft_type", str, file)
    if kind not in peft.PEFT_TYPE_TO_CONFIG_MAPPING:
        raise InputError(f"{file}: PEFT {peft.__version__} knows no peft_type {kind!r}.")
    rank = reading.typed(content, "r", int, file)
    if rank is not None and rank < 1:
        raise InputError(f"{file}: r is {rank}; a rank is 1 or more.")
    reading.typed(content, "lora_alpha", float, file)
    targets = reading.typed(content, "target_modules", (list, str), file)
    if isinstance(targets, list):
        reading.texts(content, "target_modules", file)
    with reading.understood(f"{file}: target_modules is no regular expression"):
        re.compile(targets if isinstance(targets, str) else "")
    return content


def quantization_config(name: str, bf16: bool):
    """For `from_pretrained`: `"nf4"`, 4 bits by bitsandbytes, or `"int8"`, 8 bits by torchao. The head stays as it is.

    Raises:
        InputError: its package isn't installed.
    """
    package = QUANTIZATIONS[name]
    if importlib.util.find_spec(package) is None:
        raise InputError(f"--quantization {name} needs {package}: pip install {package}")
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
        InputError: the model has no such modules.
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
        raise InputError(reading.reason(error)) from None
    except ValueError:
        choice = ", ".join(linear_layers(model))
        raise InputError(
            f"the model can't be adapted at {', '.join(target_modules or [])}; its linear layers are {choice}."
        ) from None


def digest(tensors: list[torch.Tensor]) -> str:
    """Stands for tensors, to the precision of bfloat16."""
    parts = [tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16) for tensor in tensors]
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in parts)).hexdigest()


@torch.no_grad()
def describe_base(model: nn.Module) -> dict:
    """What tells a base from others: its kind, how it reads over depth, and its weights.

    `fingerprint` is of tensors that no quantisation touches, `layers` of some elements of each tensor of the layers,
    unless they are quantised.
    """
    base, names = decoder(model), ("model_type", *READS)
    tensors = [base.embed_tokens.weight[:64], *base.norm.parameters()]
    tensors += getattr(base, DEPTH_ATTENTION, nn.Module()).parameters()
    described = {"fingerprint": digest(tensors), **{name: getattr(model.config, name, None) for name in names}}
    if getattr(model, "hf_quantizer", None) is None:
        flat = [parameter.flatten() for parameter in base.layers.parameters()]
        described["layers"] = digest([tensor[:: max(1, len(tensor) // 64)] for tensor in flat])
    return described


def check_base(model: nn.Module, before: dict, made_for: str):
    """Whether `model` is the base that an adapter's BASE_FILE, `before`, describes.

    Raises:
        InputError: it isn't; the message begins with `made_for`.
    """
    for name in ("model_type", *READS):  # first, as only models of the same kind have the same tensors
        now = getattr(model.config, name, None)
        if name in before and now != before[name]:
            raise InputError(f"{made_for}, with {name} = {before[name]}; the model has {now}.")
    tells_weights = not before.keys().isdisjoint(("fingerprint", "layers"))
    if not tells_weights or model.dtype == torch.float16:  # which rounds other weights than bfloat16 does
        return
    now = describe_base(model)
    if any(now[name] != before[name] for name in now.keys() & before.keys()):
        raise InputError(f"{made_for}, whose weights differ from the model's.")


def load_adapter(model, adapter: str, is_trainable: bool = False):
    """`model` with a saved adapter. PEFT alone is silent about much of what doesn't fit.

    Args:
        adapter: folder or Hub id.

    Raises:
        InputError: there is none, or it was trained on another base.
    """
    content = read_adapter_config(adapter)
    if content is None:
        raise InputError(f"no adapter at {adapter}: it has no {reading.ADAPTER_NAME}.")
    with reading.understood(f"no adapter at {adapter}"):
        config = peft.PeftConfig.from_pretrained(adapter)
        if find_file(adapter, SAFETENSORS_WEIGHTS_NAME) is None:
            raise ValueError(f"there is no {SAFETENSORS_WEIGHTS_NAME}, and pickles are not loaded")
        if config.is_prompt_learning:
            raise ValueError("it puts tokens of its own before the text")
        saved = load_peft_weights(adapter, device="cpu")
        largest = max((size for tensor in saved.values() for size in tensor.shape), default=0)
        ranks = [content.get("r") or 0, *(content.get("rank_pattern") or {}).values()]
        if max(ranks) > largest:  # memory would be set aside for it
            raise ValueError(f"its rank is {max(ranks)}, and no tensor is as large")
        base_file = find_file(adapter, BASE_FILE)
        before = reading.read_json(Path(base_file), reading.MAX_CONFIG) if base_file else {}
    made_for = f"the adapter {adapter} is for another base"
    if config.base_model_name_or_path:
        made_for += f", {config.base_model_name_or_path}"
    check_base(model, before, made_for)
    config.inference_mode = not is_trainable
    with (
        reading.time_limit(SECONDS, f"{adapter}: its target_modules take too long to look for"),
        reading.understood(made_for),
    ):
        adapted = with_adapter(model, config)
    expected = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    # PEFT saves embeddings also with an adapter that doesn't train them
    embeddings = re.compile(r"\b(embed_tokens|lm_head)\.(base_layer\.)?weight$")
    saved = {name: tensor for name, tensor in saved.items() if name in expected or not embeddings.search(name)}
    shapes, saved_shapes = ({name: tuple(t.shape) for name, t in tensors.items()} for tensors in (expected, saved))
    for name in sorted(shapes.keys() | saved_shapes.keys()):
        if shapes.get(name) != saved_shapes.get(name):
            raise InputError(f"{made_for}: {name} is {saved_shapes.get(name)} in it, here {shapes.get(name)}.")
    peft.set_peft_model_state_dict(adapted, saved)
    return adapted


@torch.no_grad()
def take_over_quantized(base: nn.Module, trained):
    """Gives `base`, in full precision, the weights of the quantised base of `trained`: those its adapter goes with."""
    for name, module in trained.get_base_model().named_modules():
        if isinstance(module, nn.Linear) and not isinstance(module, BaseTunerLayer) and ".lora_" not in name:
            weight = base.get_submodule(name.removesuffix(".base_layer")).weight
            weight.copy_(dequantize_module_weight(module).to(weight.dtype))


@torch.no_grad()
def untie_adapted(adapted: peft.PeftModel):
    """Gives the head weights of its own where it has those of the embedding and one of the two is adapted: merged into
    weights that both have, the adapter would change the other one too."""
    model = adapted.get_base_model()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head.weight is embedding.weight and any(isinstance(module, BaseTunerLayer) for module in (embedding, head)):
        linear = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        linear.weight = nn.Parameter(linear.weight.clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
