# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pipelines over the layers of a model, on `torch.distributed.pipelining`, with the cross-stage caching of the paper.

Every read of a stage needs all sources before it, so that a stage hands on more than one tensor. Cached, as in
Attention Residuals (arXiv 2603.15031, section 4), a process gets each closed source once: it keeps what it has received
and what its own stages have closed, and its next stage is sent the rest, with the sum of the open block.
"""

import copy
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.distributed as dist
from attnres_convert import InputError
from packaging import version
from torch import nn
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from transformers import PreTrainedModel


# By name: for one stage per process, and for several
SCHEDULES = {"gpipe": (ScheduleGPipe, ScheduleLoopedBFS), "1f1b": (Schedule1F1B, ScheduleInterleaved1F1B)}
HEAD, EMBEDDING = "lm_head", "embed_tokens"
OLDEST = "2.13"  # torch whose stages LeanStage knows


@dataclass(frozen=True)
class PipelinePlan:
    """Which layers and sources are where. Stage `i` is in process `i % num_ranks`.

    Args:
        config: of an AttnRes model.
        num_stages: a multiple of `num_ranks`.
        num_ranks: processes, two at least.
        cached: whether a process keeps sources for its later stages; else every stage is sent all of its sources.
        sizes: how many layers each stage has; default: the same number, the later ones one more where it must be.

    Raises:
        InputError: the numbers don't fit together.
    """

    config: object
    num_stages: int
    num_ranks: int
    cached: bool = True
    sizes: tuple[int, ...] | None = None

    def __post_init__(self):
        layers = self.config.num_hidden_layers
        if self.num_ranks < 2:
            raise InputError("a pipeline needs two processes at least: accelerate launch --num_processes 2 ...")
        if self.num_stages % self.num_ranks or not self.num_stages:
            raise InputError(f"{self.num_stages} stages can't be divided among {self.num_ranks} processes evenly.")
        if self.num_stages > layers:
            raise InputError(f"a model of {layers} layers has no {self.num_stages} stages.")
        sizes = self.sizes
        if sizes is not None and (len(sizes) != self.num_stages or min(sizes) < 1 or sum(sizes) != layers):
            raise InputError(f"{[*sizes]} layers are no {self.num_stages} stages of a model of {layers} layers.")

    def layers(self, stage: int) -> slice:
        if self.sizes is None:
            bounds = (i * self.config.num_hidden_layers // self.num_stages for i in (stage, stage + 1))
        else:
            bounds = sum(self.sizes[:stage]), sum(self.sizes[: stage + 1])
        return slice(*bounds)

    def is_last(self, stage: int) -> bool:
        return stage == self.num_stages - 1

    def place(self, stage: int) -> slice:
        """What a model knows as its `stage`: the last one also has what comes after the layers."""
        layers = self.layers(stage)
        return slice(layers.start, None if self.is_last(stage) else layers.stop)

    def rank(self, stage: int) -> int:
        return stage % self.num_ranks

    def stages(self, rank: int) -> range:
        return range(rank, self.num_stages, self.num_ranks)

    def num_sources(self, stage: int) -> int:
        """How many tensors the first layer of a stage takes: the closed sources and the sum of an open block."""
        return self.config.num_depth_tensors(2 * self.layers(stage).start)

    def num_closed(self, stage: int) -> int:
        """How many sources are closed behind a stage, to which nothing will be added."""
        return self.config.num_closed_depth_sources(2 * self.layers(stage).stop)

    def num_known(self, stage: int) -> int:
        """How many of its sources the process of a stage has, from its stage before."""
        return self.num_closed(stage - self.num_ranks) if self.cached and stage >= self.num_ranks else 0

    def num_received(self, stage: int) -> int:
        """How many tensors a stage is sent, `(batch, seq, hidden)` each; so many gradients go back."""
        return self.num_sources(stage) - self.num_known(stage) if stage else 0

    @cached_property
    def num_sent(self) -> int:
        """Tensors sent forward in all, per microbatch."""
        return sum(map(self.num_received, range(self.num_stages)))


def active_parameters(module: nn.Module, config) -> float:
    """How many parameters a token meets: of the routed experts those that it is sent to."""
    experts = getattr(config, "num_experts_per_tok", None)
    share = {name: experts / len(p) if "experts" in name.split(".") else 1 for name, p in module.named_parameters()}
    return sum(share[name] * parameter.numel() for name, parameter in module.named_parameters())


def layer_costs(model: nn.Module) -> list[float]:
    """What each layer of a causal language model has to compute: its active parameters, in the last also the head's."""
    costs = [active_parameters(layer, model.config) for layer in model.base_model.layers]
    costs[-1] += active_parameters(getattr(model, HEAD), model.config)
    return costs


def balanced(costs: list[float], num_stages: int) -> tuple[int, ...]:
    """How many layers each stage gets, one at least, so that the most expensive one is as cheap as can be, and then the
    squares of all costs too."""
    best = {0: ((0.0, 0.0), ())}  # by number of layers, in the stages so far
    for stage in range(num_stages):
        ways = {}
        for begin, ((most, squares), sizes) in best.items():
            cost = 0.0
            for end in range(begin + 1, len(costs) - (num_stages - stage - 1) + 1):
                cost += costs[end - 1]
                way = (max(most, cost), squares + cost**2), (*sizes, end - begin)
                ways[end] = min(ways.get(end, way), way)
        best = ways
    return best[len(costs)][1]


class Elsewhere(nn.Identity):
    """In the place of a module that another process has."""


def cut(model: nn.Module, plan: PipelinePlan, rank: int) -> nn.Module:
    """Takes from a causal language model what the stages of `rank` don't need. Names of parameters stay."""
    base, stages = model.base_model, plan.stages(rank)
    here = {i for stage in stages for i in range(*plan.layers(stage).indices(plan.config.num_hidden_layers))}
    for layer_idx in range(len(base.layers)):
        if layer_idx not in here:
            base.layers[layer_idx] = Elsewhere()
    if 0 not in stages:
        setattr(base, EMBEDDING, Elsewhere())
    if plan.num_stages - 1 not in stages:
        base.norm = Elsewhere()
        setattr(model, HEAD, Elsewhere())
    base.stage = plan.place(rank)
    return model


class WithLaterGradient(torch.autograd.Function):
    """A source, to whose gradient that of `leaf` is added: of the same source in later stages of this process, whose
    backward passes come before."""

    @staticmethod
    def forward(ctx, source: torch.Tensor, leaf: torch.Tensor) -> torch.Tensor:
        ctx.leaf = leaf
        return source.view_as(source)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        later, ctx.leaf.grad = ctx.leaf.grad, None
        return grad if later is None else grad + later, None


class StageModule(nn.Module):
    """What a stage does with a microbatch.

    Args:
        model: what [`cut`] has left.
        kept: closed sources by microbatch, for the next stage in this process.
    """

    def __init__(self, model: nn.Module, plan: PipelinePlan, stage: int, kept: dict[int, tuple]):
        super().__init__()
        self.model, self.plan, self.stage, self.kept = model, plan, stage, kept
        self.autocast_dtype = None
        self.is_followed = plan.cached and stage + plan.num_ranks < plan.num_stages  # by another one in this process

    def keep(self, sources: tuple, leaves: list) -> tuple:
        """The `sources` with gradients of later stages, for which `leaves` get another form of those that are new."""
        if not self.is_followed:
            return sources
        for i in range(len(leaves), len(sources)):
            leaf = sources[i].detach().requires_grad_(sources[i].requires_grad)
            leaves.append(leaf)
            if leaf.requires_grad:
                sources = *sources[:i], WithLaterGradient.apply(sources[i], leaf), *sources[i + 1 :]
        return sources

    def forward(self, *received: torch.Tensor, microbatch: torch.Tensor, labels, num_items_in_batch, **inputs):
        """
        Args:
            received: the token ids `(batch, seq)` in the first stage, else the sources that the process didn't have.
            microbatch: its number `(1,)`.
            labels, num_items_in_batch: as in transformers' losses, for the last stage.
            inputs: what else the model takes, but `use_cache`.

        Returns:
            The sources that the next stage gets, or the loss `(1,)`.
        """
        plan, key, base = self.plan, int(microbatch), self.model.base_model
        base.stage, is_last = plan.place(self.stage), plan.is_last(self.stage)
        leaves = list(self.kept.pop(key, ()))
        if self.stage:
            num_closed = plan.config.num_closed_depth_sources(2 * base.stage.start)
            sources = (*leaves, *received)
            sources = (*self.keep(sources[:num_closed], leaves), *sources[num_closed:])
            inputs["inputs_embeds"] = sources
        else:
            (inputs["input_ids"],) = received
        inputs["use_cache"] = False
        with torch.autocast(labels.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            if is_last:
                return self.model(**inputs, labels=labels, num_items_in_batch=num_items_in_batch).loss[None]
            sources = base(**inputs).last_hidden_state
        num_closed = plan.num_closed(self.stage)
        sources = (*self.keep(sources[:num_closed], leaves), *sources[num_closed:])
        if self.is_followed:
            self.kept[key] = tuple(leaves)
        return sources[plan.num_known(self.stage + 1) :]


class LeanStage(PipelineStage):
    """A stage that counts the bytes it sends, and has room for what it receives while a microbatch needs it.

    torch's own has room for all microbatches, which with several sources is most of what a pipeline would need.
    """

    def __init__(self, *args, sent: Counter, **kwargs):
        super().__init__(*args, **kwargs)
        self.sent = sent

    def _setup_forward_recv_info(self, num_microbatches: int, has_backward: bool):
        super()._setup_forward_recv_info(1, has_backward)
        self.args_recv_info = for_each(num_microbatches, self.args_recv_info[0])

    def _setup_backward_recv_info(self, num_microbatches: int):
        super()._setup_backward_recv_info(1)
        self.chunks, self.grad_recv_info = num_microbatches, for_each(num_microbatches, self.grad_recv_info[0])

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list:
        make_room(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list:
        if self.has_backward and not self.is_last:
            make_room(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args, **kwargs):
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        leave(self.args_recv_info[fwd_chunk_id])  # what needs it has it
        return output

    def backward_one_chunk(self, bwd_chunk_id: int, *args, **kwargs):
        super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        leave(self.grad_recv_info.get(bwd_chunk_id, ()))

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list:
        return self.counted("forward", super().get_fwd_send_ops(fwd_chunk_id))

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list:
        return self.counted("backward", super().get_bwd_send_ops(bwd_chunk_id))

    def counted(self, direction: str, ops: list) -> list:
        self.sent[direction] += sum(op.tensor.nbytes for op in ops)
        return ops


def for_each(num_microbatches: int, infos: tuple) -> dict[int, tuple]:
    """What torch knows of received tensors, for each microbatch, without room for them."""
    leave(infos)
    return {number: tuple(map(copy.copy, infos)) for number in range(num_microbatches)}


def make_room(infos: tuple, device: torch.device):
    for info in infos:
        if info.buffer is None and info.tensor_meta is not None and not info.is_root_arg:
            info.buffer = torch.empty(info.tensor_meta.shape, dtype=info.tensor_meta.dtype, device=device)


def leave(infos: tuple):
    for info in infos:
        info.buffer = None


class Pipeline:
    """A causal language model of this project, cut into the stages of a pipeline. One in each process of `group`.

    ```python
    pipeline = Pipeline(AutoModelForCausalLM.from_pretrained("my-model").train(), num_microbatches=8)
    optimizer = torch.optim.AdamW(pipeline.model.parameters())
    loss = pipeline.step(input_ids, labels=labels)  # in all processes, with the same batch
    optimizer.step()
    pipeline.save_pretrained("trained")
    ```

    Args:
        model: the whole model, the same in each process. It loses what the stages of this process don't need.
        num_microbatches: parts of a batch.
        num_stages: a multiple of the processes; default: one for each.
        schedule: `"1f1b"`, interleaved if there are several stages per process, or `"gpipe"`, which keeps the
            activations of all microbatches.
        cached, sizes: as in [`PipelinePlan`]; stages get layers by [`layer_costs`] if no sizes are given.

    Raises:
        InputError: such a pipeline can't be had; one line says why.
    """

    def __init__(
        self,
        model: nn.Module,
        num_microbatches: int,
        num_stages: int | None = None,
        schedule: str = "1f1b",
        group: dist.ProcessGroup | None = None,
        cached: bool = True,
        sizes: tuple[int, ...] | None = None,
    ):
        self.group, self.rank, num_ranks = group, dist.get_rank(group), dist.get_world_size(group)
        self.plan = check_pipeline(model, num_ranks, num_microbatches, num_stages, schedule, cached, sizes)
        self.num_microbatches, self.name = num_microbatches, schedule
        self.is_interleaved = self.plan.num_stages > num_ranks
        self.model = cut(model, self.plan, self.rank)
        self.is_first, self.is_last = self.rank == 0, self.rank == num_ranks - 1
        self.kept = {}  # closed sources, by microbatch
        self.modules = {stage: StageModule(model, self.plan, stage, self.kept) for stage in self.plan.stages(self.rank)}
        self.bytes_sent = Counter()  # by this process, "forward" and "backward"
        self._schedules = {}  # by whether they train: shapes, stages, schedule
        self.shared = self.find_shared()

    @property
    def device(self) -> torch.device:
        return self.model.device

    def find_shared(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """The parameters that other processes have too, and which: depth attention is everywhere, as each stage reads
        with rows of its own, and a tied embedding is at both ends."""
        in_stages = ("layers.", f"{EMBEDDING}.", "norm.")
        base = self.model.base_model
        everywhere = [p for name, p in base.named_parameters() if not name.startswith(in_stages)]
        shared = [(parameter, self.group) for parameter in everywhere]
        if self.model.config.tie_word_embeddings and (self.is_first or self.is_last):
            ends = [self.global_rank(0), self.global_rank(self.plan.num_ranks - 1)]
            module = getattr(base, EMBEDDING) if self.is_first else getattr(self.model, HEAD)
            shared.append((module.weight, dist.new_group(ends, use_local_synchronization=True)))
        return shared

    def global_rank(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    def schedule(self, inputs: dict, num_microbatches: int, trains: bool):
        """A schedule for inputs of these shapes. That of other ones, with its buffers, goes."""
        shapes = {name: value.shape for name, value in inputs.items() if isinstance(value, torch.Tensor)}
        known, stages, schedule = self._schedules.get(trains, (None, None, None))
        if known != shapes:
            stages = [
                LeanStage(module, stage, self.plan.num_stages, self.device, group=self.group, sent=self.bytes_sent)
                for stage, module in self.modules.items()
            ]
            kind = SCHEDULES[self.name if trains else "gpipe"][self.is_interleaved]
            schedule = kind(
                stages if self.is_interleaved else stages[0],
                num_microbatches,
                loss_fn=lambda output, _: output.sum(),
                scale_grads=False,
            )
            self._schedules[trains] = shapes, stages, schedule
        return stages, schedule

    def run(self, input_ids: torch.Tensor, inputs: dict, num_microbatches: int, trains: bool) -> torch.Tensor:
        if len(input_ids) % num_microbatches:
            raise InputError(f"{len(input_ids)} sequences can't be divided into {num_microbatches} microbatches.")
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and (value.ndim == 0 or len(value) != len(input_ids)):
                raise InputError(f"{name} is {[*value.shape]}, but needs a row for each of {len(input_ids)} sequences.")
        numbers = torch.arange(num_microbatches)
        inputs = {name: value for name, value in inputs.items() if value is not None}
        self.kept.clear()  # of a step that failed
        if not self._schedules:  # made without a seed, what processes share would differ, and go on so
            for parameter, group in self.shared:
                dist.broadcast(parameter.data, self.global_rank(0), group)
        stages, schedule = self.schedule({"input_ids": input_ids, **inputs}, num_microbatches, trains)
        losses = []
        args = (input_ids,) if self.is_first else ()
        run = schedule.step if trains else schedule.eval
        run(*args, **inputs, microbatch=numbers, target=numbers, losses=losses)
        for stage in stages:
            stage.clear_runtime_states()  # or what was last evaluated would be kept
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        if self.is_last:
            loss += torch.stack(losses).detach().sum()
        dist.broadcast(loss, self.global_rank(self.plan.num_ranks - 1), self.group)
        return loss

    def step(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None, **inputs) -> torch.Tensor:
        """One batch, forward and backward: adds its gradients to those of the parameters. What is frozen stays so.

        Args:
            input_ids, labels: `(batch, seq)`; `batch` is a multiple of the number of microbatches.
            num_items_in_batch: by which the sum of the tokens' losses is divided; default: the number of tokens with a
                label, which gives the mean.
            inputs: what else the model takes, tensors `(batch, ...)`.

        Returns:
            The loss, in all processes.
        """
        inputs |= {"labels": labels, "num_items_in_batch": num_items(labels, num_items_in_batch)}
        before = self.gradients_set_aside()
        loss = self.run(input_ids, inputs, self.num_microbatches, trains=True)
        self.reduce_gradients(before)
        return loss

    @torch.no_grad()
    def evaluate(self, input_ids: torch.Tensor, labels: torch.Tensor, num_items_in_batch=None, **inputs):
        """The loss of a batch, as [`step`] has it, which goes through the pipeline as one microbatch."""
        inputs |= {"labels": labels, "num_items_in_batch": num_items(labels, num_items_in_batch)}
        return self.run(input_ids, inputs, 1, trains=False)

    def gradients_set_aside(self) -> dict[nn.Parameter, torch.Tensor]:
        """The gradients of what several processes have, which only what is added to them is to be reduced."""
        before = {parameter: parameter.grad for parameter, _ in self.shared if parameter.grad is not None}
        for parameter in before:
            parameter.grad = None
        return before

    def reduce_gradients(self, before: dict[nn.Parameter, torch.Tensor]):
        for parameter, group in self.shared:
            if not parameter.requires_grad:
                continue
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            dist.all_reduce(grad, group=group)
            parameter.grad = grad + before[parameter] if parameter in before else grad

    def clip_grad_norm_(self, parameters, max_norm: float) -> torch.Tensor:
        """Scales the gradients of `parameters` of this process as if all processes' were one vector, of at most
        `max_norm`, and returns its norm."""
        parameters = list(parameters)
        elsewhere = {id(parameter) for parameter, _ in self.shared if self.rank}  # which the first process counts
        own = [p.grad for p in parameters if p.grad is not None and id(p) not in elsewhere]
        squared = nn.utils.get_total_norm(own).to(self.device).double() ** 2
        dist.all_reduce(squared, group=self.group)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm := squared.sqrt())
        return norm

    def state_dict(self) -> dict[str, torch.Tensor] | None:
        """The whole model's tensors, on the CPU, in the first process; None in the others."""
        elsewhere = {id(parameter) for parameter, _ in self.shared if self.rank}
        own = {
            name: tensor.detach().contiguous()
            for name, tensor in self.model.state_dict(keep_vars=True).items()
            if id(tensor) not in elsewhere
        }
        listed = [None] * self.plan.num_ranks
        dist.all_gather_object(listed, [(name, tensor.shape, tensor.dtype) for name, tensor in own.items()], self.group)
        if self.rank:
            for tensor in own.values():
                dist.send(tensor, self.global_rank(0), self.group)
            return None
        whole = {name: tensor.cpu() for name, tensor in own.items()}
        for rank in range(1, self.plan.num_ranks):
            for name, shape, dtype in listed[rank]:
                received = torch.empty(shape, dtype=dtype, device=self.device)
                dist.recv(received, self.global_rank(rank), self.group)
                whole[name] = received.cpu()
        return whole

    def save_pretrained(self, folder, **kwargs):
        """As that of the model. The first process writes, the others wait.

        Raises:
            InputError: it isn't the first one of all, and transformers would write nothing.
        """
        if self.global_rank(0):
            raise InputError("transformers saves in process 0 alone: save the pipeline that has it.")
        if (state := self.state_dict()) is not None:
            self.model.save_pretrained(folder, state_dict=state, **kwargs)
        dist.barrier(self.group)


def num_items(labels: torch.Tensor, given) -> int:
    return int(labels[:, 1:].ne(-100).sum() if given is None else given)


def check_pipeline(
    model: nn.Module,
    num_ranks: int,
    num_microbatches: int,
    num_stages: int | None = None,
    schedule: str = "1f1b",
    cached: bool = True,
    sizes: tuple[int, ...] | None = None,
) -> PipelinePlan:
    """The plan of such a [`Pipeline`] in `num_ranks` processes, before any of them has begun with it.

    Raises:
        InputError: there can't be one; one line says why.
    """
    config = model.config
    if version.parse(torch.__version__) < version.parse(OLDEST):
        raise InputError(f"a pipeline needs torch {OLDEST} or newer, installed is {torch.__version__}.")
    if not (isinstance(model, PreTrainedModel) and hasattr(config, "num_depth_sources") and hasattr(model, HEAD)):
        raise InputError(f"{type(model).__name__} is no causal language model of this project; convert it first.")
    if getattr(config, "output_router_logits", False):
        raise InputError(
            "a pipeline has no loss for the balance of experts over all layers; set output_router_logits to false."
        )
    for module in model.modules():
        options = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
        if options.get("use_reentrant"):
            raise InputError("a pipeline can't checkpoint with use_reentrant; enable gradient checkpointing without.")
    plan = PipelinePlan(config, num_ranks if num_stages is None else num_stages, num_ranks, cached, sizes)
    if sizes is None:
        plan = replace(plan, sizes=balanced(layer_costs(model), plan.num_stages))
    if schedule not in SCHEDULES:
        raise InputError(f"{schedule!r} is no schedule of a pipeline; there are {', '.join(SCHEDULES)}.")
    if schedule == "1f1b":
        check_number(num_microbatches, num_ranks, plan.num_stages > num_ranks)
    return plan


def check_number(num_microbatches: int, num_ranks: int, is_interleaved: bool):
    """Raises an [`InputError`] for numbers of microbatches with which torch's 1F1B can't begin."""
    if num_microbatches < num_ranks:
        raise InputError(
            f"1F1B in {num_ranks} processes needs {num_ranks} microbatches, not {num_microbatches}: give more of them "
            "(--accumulate), or take GPipe (--pipeline-schedule gpipe)."
        )
    if is_interleaved and num_microbatches % (num_microbatches // num_ranks):
        raise InputError(
            f"{num_microbatches} microbatches (--accumulate) can't be interleaved; take a multiple of {num_ranks}."
        )
