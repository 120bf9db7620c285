# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Tensor and expert parallelism: models of which each process holds a part, cut up by the plans of transformers.

A plan says which weights are cut and what the processes exchange. Depth attention has no part in it: all processes hold
it whole, and read with it the same sources. Processes that share the weights of a layer see the same batches.
"""

import logging
import os
import re
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import transformers
from accelerate import PartialState
from attnres_convert import InputError
from packaging import version
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_
from transformers import PreTrainedModel

from .adapters import with_adapter
from .look import norm_of_all
from .process import tensor_parallel_size


OLDEST = "5.23.0"  # whose Trainer trains models that are in parts, and in which it was tested
# sizes of accelerate's ParallelismConfig that models and packed documents can't be trained with
UNSUPPORTED = {
    "cp_size": "context parallelism of accelerate leaves out the masks that keep documents apart",
    "sp_size": "sequence parallelism of DeepSpeed knows nothing of documents in a sequence",
    "dp_replicate_size": "what processes are more than those that share a layer shares the model too",
}
HEADS = "the heads of attention are spread over the processes"


@dataclass(frozen=True)
class Sharding:
    """How many processes share the weights of each layer (`tensor`), and its experts (`expert`)."""

    tensor: int
    expert: int
    config: object
    mesh: object  # of processes


def check_launch(expert: int):
    """
    Raises:
        InputError: `accelerate launch` has started processes that can't cut up models in this way.
    """
    tensor, processes = tensor_parallel_size(), PartialState().num_processes
    for name, reason in UNSUPPORTED.items():
        if int(os.environ.get(f"PARALLELISM_CONFIG_{name.upper()}", "1")) > 1:
            raise InputError(f"no {name}: {reason}; use tensor parallelism, FSDP2 or both.")
    if tensor == expert == 1:
        return
    kind = "tensor parallelism" if tensor > 1 else "--expert-parallel"
    for name in ("FSDP", "DeepSpeed"):
        if os.environ.get(f"ACCELERATE_USE_{name.upper()}") == "true":
            raise InputError(f"{kind} cuts up models by itself, not with {name}: use tp.yaml, or ddp.yaml.")
    if processes % tensor:
        raise InputError(
            f"{processes} processes can't share layers in groups of {tensor}: --parallelism_config_tp_size must divide "
            "--num_processes."
        )
    if expert > 1 and (expert % tensor or processes % expert):
        shared = f" and be a multiple of {tensor}, the processes that share a layer" if tensor > 1 else ""
        raise InputError(f"--expert-parallel {expert} must divide the number of processes, {processes}{shared}.")
    if version.parse(transformers.__version__) < version.parse(OLDEST):
        raise InputError(f"{kind} needs transformers {OLDEST} or newer, installed is {transformers.__version__}.")


def start_sharding(expert: int = 1) -> Sharding | None:
    """What the launch and `--expert-parallel` ask for, `None` if models stay whole. For all processes together.

    What the processes are more than those that share a layer divides the batches and the parts, as FSDP2 does.
    """
    tensor, processes = tensor_parallel_size(), PartialState().num_processes
    if tensor == expert == 1:
        return None
    from transformers.distributed import DistributedConfig

    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # of tensors put together in two steps
    config = DistributedConfig(tp_size=tensor, fsdp_size=processes // tensor, ep_size=expert)
    config, _, mesh = PreTrainedModel.prepare_distribute_model(config)
    return Sharding(tensor, expert, config, mesh)


def check_can_be_cut(model: PreTrainedModel, sharding: Sharding):
    """
    Raises:
        InputError: the model can't be cut up in this way, or would be wrong without a word.
    """
    if isinstance(model, PeftModel):
        check_adapter(model, sharding)
        model = model.get_base_model()
    config, size, plan = model.config, sharding.tensor, model.tp_plan or {}
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError("tensor and expert parallelism don't cut up quantised weights; use --method lora.")
    if sharding.expert > 1:
        if not model.ep_plan:
            raise InputError(f"--expert-parallel: {config.model_type} has no experts.")
        for name, module in model.named_modules():
            if name.endswith(".experts") and module.num_experts % sharding.expert:
                raise InputError(
                    f"--expert-parallel {sharding.expert} must divide the number of experts, {module.num_experts}."
                )
    if size == 1:
        return
    if sharding.expert == 1 and not any("layers" in name for name in plan):
        advice = "use --expert-parallel, or FSDP2" if model.ep_plan else "use FSDP2"
        raise InputError(f"transformers has no tensor parallelism for the layers of {config.model_type}; {advice}.")
    if getattr(config, "clip_qkv", None) is not None:
        raise InputError("with clip_qkv, which transformers applies in place, tensor parallelism can't; use FSDP2.")
    if any("self_attn" in name and style == "colwise" for name, style in plan.items()):
        for name in ("num_attention_heads", "num_key_value_heads"):
            heads = getattr(config, name, None)
            if heads and heads % size:
                raise InputError(f"tensor parallelism in {size} processes must divide {name} = {heads}: {HEADS}.")


def check_adapter(model: PeftModel, sharding: Sharding):
    """
    Raises:
        InputError: PEFT can't share the adapter between processes as the layers are.
    """
    if sharding.tensor < PartialState().num_processes:
        raise InputError(
            "adapters need all processes to share each layer: --parallelism_config_tp_size N of N, or FSDP2."
        )
    if model.peft_config["default"].use_dora:
        raise InputError("tensor parallelism can't share DoRA's adapters; use --method lora.")
    plan = model.get_base_model().tp_plan or {}
    for name, module in model.get_base_model().named_modules():
        style = plan.get(re.sub(r"\.\d+\.", ".*.", name), "colwise")
        if isinstance(module, BaseTunerLayer) and style not in ("colwise", "rowwise"):
            projection = name.split(".")[-1]
            raise InputError(
                f"tensor parallelism can't share adapters of {projection}; give --target-modules without it."
            )


class SummedGradient(torch.autograd.Function):
    """What it is given; its gradient is the sum of those of all processes."""

    @staticmethod
    def forward(ctx, tensor, group):
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(gradient, group=ctx.group)
        return gradient, None


def sum_gradients_once():
    """Norms of heads (of Qwen3) are whole in each process, which has the gradient of its own heads. transformers sums
    over the processes what has accumulated after each backward, and so the sums of those before once more."""
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
    from transformers.distributed.tensor_parallel import TensorParallelLayer

    class ReplicatedWithSummedGradient(TensorParallelLayer):
        def install_forward(self, module, mesh):
            forward, group = module.forward, mesh.get_group()

            def forward_with_sums(*args, **kwargs):
                own = dict(module._parameters)
                module._parameters.update({name: SummedGradient.apply(own[name], group) for name in own})
                try:
                    return forward(*args, **kwargs)
                finally:
                    module._parameters.update(own)

            module.forward = forward_with_sums
            return module

    ALL_PARALLEL_STYLES.register("replicated_with_grad_allreduce", ReplicatedWithSummedGradient())


def part_of(value: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """What a process holds of the whole `value`, cut up as `like` is, if it is."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)


def copy_part(value: torch.Tensor, parameter: torch.Tensor):
    """Fills `parameter`, of which this process may hold a part, from the whole `value`."""
    both = (parameter, part_of(value, parameter))
    local, part = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in both)
    local.copy_(part)


@torch.no_grad()
def in_parts(model: PreTrainedModel | PeftModel, sharding: Sharding) -> PreTrainedModel | PeftModel:
    """`model`, which [`check_can_be_cut`], and of which this process then holds its part, on its device. For all
    processes together."""
    if isinstance(model, PeftModel):
        return adapter_in_parts(model, sharding)
    sum_gradients_once()
    whole = dict(model.named_parameters(remove_duplicate=False))
    buffers = dict(model.named_buffers(remove_duplicate=False))
    # as transformers does it: a model without memory is cut up, then filled
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = torch.nn.Parameter(parameter.to("meta"), parameter.requires_grad)
    model = type(model).maybe_distribute_model(model, sharding.config, sharding.mesh)
    model.to_empty(device=PartialState().device)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        copy_part(whole.pop(name), parameter)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        buffer.copy_(buffers[name])
    model.tie_weights()
    return model


def adapter_in_parts(model: PeftModel, sharding: Sharding) -> PeftModel:
    """PEFT makes adapters of models that are in parts, with other values in each number of processes; the values are
    those of the adapter of the whole model."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    config = model.peft_config["default"]
    model = with_adapter(in_parts(model.unload(), sharding), config)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and isinstance(module.weight, DTensor):
            # PEFT takes the width of a part for that of the whole
            module.out_features, module.in_features = module.weight.shape
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copy_part(trained[name], parameter)
    return model


def whole_tensors(state):
    """Nested lists and dictionaries with their tensors put together, in the memory of the processor. For all processes
    that hold a part, together; the main one alone keeps them."""
    if isinstance(state, dict):
        return {name: whole_tensors(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole_tensors(value) for value in state]
    if not isinstance(state, DTensor):
        return state
    whole = state.full_tensor()
    return whole.cpu() if PartialState().is_main_process else None


@contextmanager
def whole_optimizer_state(optimizer: torch.optim.Optimizer, is_cut: bool):
    """In this block the state dict of an optimizer of parts has whole tensors: what one process has. For all processes
    together; the main one keeps it."""
    if not is_cut:
        yield
        return
    whole = whole_tensors(optimizer.state_dict())
    hook = optimizer.register_state_dict_post_hook(lambda *_: whole)
    try:
        yield
    finally:
        hook.remove()


def cut_optimizer_state(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """A state dict of whole tensors as an optimizer of parts takes it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {
            name: part_of(value, parameters[index]) if getattr(value, "ndim", 0) else value
            for name, value in values.items()
        }
        for index, values in state["state"].items()
    }
    return {**state, "state": cut}


def clip_as_one(parameters: Iterable[torch.nn.Parameter], max_norm: float) -> torch.Tensor:
    """Clips gradients by the norm of all together, of which some are whole and others cut up, over the same processes
    or others, and returns the norm."""
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    norm = norm_of_all([parameter.grad for parameter in parameters])
    for parameter in parameters:
        clip_grads_with_norm_(parameter, max_norm, norm)
    return norm
