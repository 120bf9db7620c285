# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pipelines on paper: what each device holds, what it sends, and how long a step takes.

Nothing is run; the model is built without memory. The formulas, per token, with d the hidden size:

- forward FLOPs: 2 per active parameter, the embedding left out (PaLM, arXiv 2204.02311, appendix B). Causal softmax
  attention adds, per head, 2 (query size + value size) for each of the (T + 1) / 2 tokens it sees in the mean, linear
  attention 6 * key size * value size, as the delta rule multiplies its state three times: our own count. A read of n
  sources adds 6 n d: squares, scores, sum. The backward pass has twice the FLOPs.
- memory traffic of a sublayer's read (arXiv 2603.15031, table of memory traffic): (n / S + 5) d in Block, with n
  closed sources and S sublayers per block; (S + N) d in Full, with N blocks of S sublayers; 3 d in the donor. Its time
  is added to that of the FLOPs. The backward pass has twice as much. Other traffic is in the utilisation.
- what a layer keeps for its backward pass: what goes into each norm and comes out of it, what comes out of linear
  layers and convolutions, and what goes into those that write to the stream; of each routed expert input and output
  too. That is what fused kernels need at least. Each read keeps 4 bytes per source. With gradient checkpointing a layer
  keeps what it hands on, d numbers, in Full 2 d, and all of it is there while the layer is computed again.
- logits of the last stage: log-probabilities in float32 from the forward to the backward pass of a microbatch, and 6
  bytes per logit while one is computed.

Left out: fragmentation, workspaces and the optimizer's time; uneven loads of experts; tensor and expert parallelism.
"""

import math
import re
import textwrap
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from attnres_convert import InputError, reading
from attnres_convert.writing import table
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from configuration_attnres import AttnResConfigMixin

from .configs import check_context, check_sizes, read_config, with_mode
from .options import PlanOptions
from .pipelines import (
    EMBEDDING,
    HEAD,
    PipelinePlan,
    active_parameters,
    balanced,
    check_number,
    layer_costs,
)
from .schedules import Operation, Simulation, most_held, order, simulate


# Bytes per parameter of weights, gradients and AdamW's state, and per number of an activation. "mixed" has master
# weights and two moments in float32
PRECISIONS = {"mixed": (2, 2, 12, 2), "bfloat16": (2, 2, 4, 2), "float32": (4, 4, 8, 4)}
WRITES_TO_STREAM = re.compile(r"(o_proj|down_proj|c_proj|dense)$")
GB = 1e9
MODES = ("donor", "block", "full")


class StreamPlan(PipelinePlan):
    """That of a donor, whose stages hand on one residual stream."""

    def num_sources(self, stage: int) -> int:
        return 1

    def num_closed(self, stage: int) -> int:
        return 0


@dataclass(frozen=True)
class LayerSize:
    """Args:
    parameters: of all experts.
    active: that a token meets.
    kept: numbers per token for the backward pass.
    """

    parameters: int
    active: float
    kept: float


class Model:
    """What a causal language model is made of.

    Args:
        config: of a donor or of an AttnRes model in block or full mode.
    """

    def __init__(self, config: PreTrainedConfig):
        self.config, self.hidden_size = config, config.hidden_size
        self.is_attnres = isinstance(config, AttnResConfigMixin)
        with torch.device("meta"), reading.understood("this model can't be built"):
            model = AutoModelForCausalLM.from_config(config)
        base = model.base_model
        self.layers, self.costs = [layer_size(layer, config) for layer in base.layers], layer_costs(model)
        self.embedding, self.norm = count(getattr(base, EMBEDDING)), count(base.norm)
        self.head = count(getattr(model, HEAD))
        self.everywhere = count(base) - sum(map(count, (getattr(base, EMBEDDING), base.norm, base.layers)))

    @property
    def parameters(self) -> int:
        once = 0 if self.config.tie_word_embeddings else self.head
        return sum(layer.parameters for layer in self.layers) + self.embedding + self.norm + once + self.everywhere

    @property
    def active(self) -> float:
        """Parameters that a token meets, with the head and without the embedding."""
        return sum(layer.active for layer in self.layers) + self.norm + self.head

    def attention_flops(self, layer: int, seq_len: int) -> float:
        """Of a forward pass, per token."""
        config = self.config
        kind = (getattr(config, "layer_types", None) or ["full_attention"] * len(self.layers))[layer]
        if kind == "linear_attention":
            return 6 * config.linear_num_heads * config.linear_head_dim**2
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        query, value = getattr(config, "qk_head_dim", None) or size, getattr(config, "v_head_dim", None) or size
        window = getattr(config, "sliding_window", None) if kind == "sliding_attention" else None
        return 2 * heads * (query + value) * mean_context(seq_len, window or seq_len)

    def reads(self, layer: int) -> list[int]:
        """Rows of depth attention of a layer; the last one reads for the output too."""
        last = layer == len(self.layers) - 1
        return [2 * layer, 2 * layer + 1, *([2 * layer + 2] if last else [])]

    def num_sources(self, row: int) -> int:
        return self.config.num_depth_sources(row) if self.is_attnres else 0

    def read_traffic(self, row: int) -> float:
        """Numbers that a forward pass moves for the read of a sublayer, per token, in units of d."""
        if not self.is_attnres:
            return 3
        config = self.config
        sublayers = 2 * config.attn_res_block_size
        if config.attn_res_mode == "block":
            return config.num_closed_depth_sources(row) / sublayers + 5
        return sublayers + math.ceil(2 * len(self.layers) / sublayers)

    def forward_flops(self, layer: int, seq_len: int) -> float:
        """Per token, with the head in the last layer."""
        active = self.layers[layer].active + (self.head if layer == len(self.layers) - 1 else 0)
        reads = sum(6 * self.num_sources(row) * self.hidden_size for row in self.reads(layer))
        return 2 * active + self.attention_flops(layer, seq_len) + reads

    def kept_bytes(self, layer: int, size: int, checkpointing: bool) -> float:
        """For the backward pass, per token; `size` is that of a number."""
        if checkpointing:
            return size * self.hidden_size * (2 if self.is_attnres and self.config.attn_res_mode == "full" else 1)
        return size * self.layers[layer].kept + 4 * sum(map(self.num_sources, self.reads(layer)))


def paper_blocks_sent(num_ranks: int, num_virtual: int, blocks_per_stage: float, cached: bool) -> float:
    """The paper's count of sent blocks, `(batch, seq, hidden)` each, for `num_virtual` stages per process. It leaves
    the embedding out, and has each process sent again the blocks that it has closed itself."""
    if not cached:
        num_stages = num_ranks * num_virtual
        return num_stages * (num_stages - 1) / 2 * blocks_per_stage
    return (num_ranks * (num_ranks - 1) / 2 + (num_virtual - 1) * num_ranks**2) * blocks_per_stage


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def mean_context(seq_len: int, window: int) -> float:
    """How many tokens a token sees in the mean, itself included."""
    window = min(window, seq_len)
    return window - window * (window - 1) / (2 * seq_len)


def layer_size(layer: nn.Module, config: PreTrainedConfig) -> LayerSize:
    kept = 4 * config.hidden_size
    for name, parameter in layer.named_parameters():
        if "experts" in name.split(".") and parameter.dim() == 3:  # (experts, out, in)
            intermediate = parameter[0].numel() // config.hidden_size
            kept += config.num_experts_per_tok * (intermediate + config.hidden_size)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            kept += module.in_features if WRITES_TO_STREAM.search(name) else module.out_features
        elif isinstance(module, nn.Conv1d):
            kept += module.out_channels
    return LayerSize(count(layer), active_parameters(layer, config), kept)


@dataclass(frozen=True)
class Machine:
    """What a plan takes for granted of devices.

    Args:
        flops: that a device reaches, per second.
        memory_bandwidth: bytes per second.
        node: devices per node.
        inside, between: bytes per second and direction, of links in a node and between nodes.
        latency: seconds.
    """

    flops: float
    memory_bandwidth: float
    node: int
    inside: float
    between: float
    latency: float

    def bandwidth(self, devices: list[int]) -> float:
        """Of a link or ring of `devices`."""
        return self.inside if len({device // self.node for device in devices}) == 1 else self.between

    def all_reduce(self, devices: list[int], size: float) -> float:
        """Seconds of a ring (Patarasu and Yuan, 2009) for `size` bytes."""
        number = len(devices)
        rounds = 2 * (number - 1)
        return rounds * (self.latency + size / number / self.bandwidth(devices)) if number > 1 else 0.0


@dataclass(frozen=True)
class Step:
    """A step of one model on one pipeline, of which there are `replicas`. Device `replica * num_ranks + rank` has the
    process `rank`.

    Args:
        schedule: as in [`order`].
        tokens: per microbatch.
    """

    model: Model
    plan: PipelinePlan
    machine: Machine
    schedule: str
    num_microbatches: int
    replicas: int
    seq_len: int
    tokens: int
    precision: str = "mixed"
    checkpointing: bool = False
    shard_optimizer: bool = False

    @property
    def num_virtual(self) -> int:
        return self.plan.num_stages // self.plan.num_ranks

    @property
    def number_size(self) -> int:
        return PRECISIONS[self.precision][3]

    @property
    def tensor(self) -> int:
        """Bytes of one source of a microbatch."""
        return self.tokens * self.model.hidden_size * self.number_size

    def layers(self, stage: int) -> range:
        return range(len(self.model.layers))[self.plan.layers(stage)]

    def parameters(self, rank: int) -> int:
        """Of a process, without those that all have."""
        stages, model = self.plan.stages(rank), self.model
        own = sum(model.layers[layer].parameters for stage in stages for layer in self.layers(stage))
        own += model.embedding if 0 in stages else 0
        return own + (model.norm + model.head if self.plan.num_stages - 1 in stages else 0)

    # memory

    def stage_kept(self, stage: int) -> float:
        """Bytes that a microbatch keeps in a stage, with what it has received, for later stages of the process too."""
        size, model = self.number_size, self.model
        kept = sum(model.kept_bytes(layer, size, self.checkpointing) for layer in self.layers(stage))
        kept += 0 if stage else size * model.hidden_size
        if stage == self.plan.num_stages - 1:
            kept += 4 * model.config.vocab_size + size * model.hidden_size
        return self.tokens * kept + self.tensor * self.plan.num_received(stage)

    def stage_left(self, stage: int) -> int:
        """Bytes of gradients that wait for the process's earlier stages, more than before its backward pass."""
        plan, later = self.plan, stage + self.plan.num_ranks
        known = plan.num_known(later) if later < plan.num_stages else 0
        return self.tensor * (plan.num_known(stage) - known)

    def working(self, rank: int) -> float:
        """Bytes that are there only while something is computed: a layer's activations when they are computed again,
        or logits; gradients that have come from the next stage and that go to the one before."""
        stages, model, logits = self.plan.stages(rank), self.model, 0.0
        again = [model.kept_bytes(layer, self.number_size, False) for s in stages for layer in self.layers(s)]
        if self.plan.num_stages - 1 in stages:
            logits = 6 * model.config.vocab_size
        computed = self.tokens * max(logits, max(again) if self.checkpointing else 0.0)
        sent = [*map(self.plan.num_received, range(self.plan.num_stages)), 0]
        return computed + self.tensor * max(sent[stage] + sent[stage + 1] for stage in stages)

    def memory(self, rank: int) -> dict[str, float]:
        """Bytes of a process by what they hold. Depth attention is float32 in any case."""
        weights, gradients, state, _ = PRECISIONS[self.precision]
        own, shared = self.parameters(rank), self.model.everywhere
        sharded = self.replicas if self.shard_optimizer else 1
        stages = self.plan.stages(rank)
        kept, left = ({s: of(s) for s in stages} for of in (self.stage_kept, self.stage_left))
        activations, _ = most_held(self.orders[rank], kept, left)
        found = {
            "weights": own * weights + shared * 4,
            "gradients": own * gradients + shared * 4,
            "optimizer": (own * state + shared * 8) / sharded,
            "activations": activations,
            "working": self.working(rank),
        }
        return found | {"total": sum(found.values())}

    def in_flight(self, rank: int) -> int:
        """The most microbatches whose activations a process holds, counted once per stage."""
        none = dict.fromkeys(self.plan.stages(rank), 0)
        return most_held(self.orders[rank], none, none)[1]

    # bytes sent

    @property
    def sent(self) -> int:
        """Bytes that one pipeline sends forward in a step; as many go back."""
        return self.plan.num_sent * self.tensor * self.num_microbatches

    @property
    def busiest_link(self) -> int:
        """The most bytes that a process sends to the next one, forward, in a step."""
        plan = self.plan
        into = [sum(map(plan.num_received, plan.stages(rank))) for rank in range(plan.num_ranks)]
        return max(into) * self.tensor * self.num_microbatches

    def paper_sent(self, cached: bool) -> float | None:
        """Bytes sent forward by the paper's formulas; None for a donor, of which it has none."""
        if not self.model.is_attnres:
            return None
        config, plan = self.model.config, self.plan
        blocks = 2 * config.num_hidden_layers / config.attn_res_sublayers_per_block / plan.num_stages
        sent = paper_blocks_sent(plan.num_ranks, self.num_virtual, blocks, cached)
        return sent * self.tensor * self.num_microbatches

    # time

    @cached_property
    def orders(self) -> list[list[Operation]]:
        ranks = range(self.plan.num_ranks)
        return [order(self.schedule, r, len(ranks), self.num_virtual, self.num_microbatches) for r in ranks]

    @cached_property
    def forward_seconds(self) -> list[float]:
        """By stage, of a microbatch."""
        model, machine = self.model, self.machine
        seconds = []
        for stage in range(self.plan.num_stages):
            flops = sum(model.forward_flops(layer, self.seq_len) for layer in self.layers(stage))
            traffic = sum(model.read_traffic(row) for layer in self.layers(stage) for row in model.reads(layer))
            moved = traffic * self.tensor / machine.memory_bandwidth
            seconds.append(self.tokens * flops / machine.flops + moved)
        return seconds

    def compute(self, operation: Operation) -> float:
        passes = 2 + self.checkpointing if operation.is_backward else 1
        return passes * self.forward_seconds[operation.stage]

    def link(self, stage: int) -> float:
        """Bytes per second between a stage and the one before, of the slowest replica."""
        ends, ranks = [self.plan.rank(stage - 1), self.plan.rank(stage)], self.plan.num_ranks
        return min(self.machine.bandwidth([i * ranks + end for end in ends]) for i in range(self.replicas))

    @cached_property
    def receive_seconds(self) -> list[float]:
        """By stage, on the link from the one before, without latency."""
        stages, received = range(1, self.plan.num_stages), self.plan.num_received
        return [0.0, *(received(stage) * self.tensor / self.link(stage) for stage in stages)]

    def transmit(self, operation: Operation) -> tuple[float, float]:
        """Latency, and seconds on the link, of what an operation takes from another process."""
        return self.machine.latency, self.receive_seconds[operation.stage + operation.is_backward]

    @property
    def reduce_seconds(self) -> float:
        """Of the gradients, after the last backward pass: over replicas, and of what all processes have, over a
        pipeline too. Nothing else happens meanwhile."""
        ranks, machine = self.plan.num_ranks, self.machine
        size = PRECISIONS[self.precision][1]
        over_replicas = max(
            machine.all_reduce(
                [replica * ranks + rank for replica in range(self.replicas)], self.parameters(rank) * size
            )
            for rank in range(ranks)
        )
        return over_replicas + machine.all_reduce(list(range(ranks * self.replicas)), 4 * self.model.everywhere)

    def simulation(self, is_ahead: bool = True) -> Simulation:
        return simulate(self.orders, self.compute, self.transmit, is_ahead)

    def row(self) -> dict:
        """What the tables show: memory, in GB (1e9 bytes), of the device that needs the most; microbatches in flight by
        process; what one pipeline sends, in GB."""
        ranks = range(self.plan.num_ranks)
        memories = list(map(self.memory, ranks))
        largest = max(ranks, key=lambda rank: memories[rank]["total"])
        memory = {name: value / GB for name, value in memories[largest].items()}
        run, late = self.simulation(), self.simulation(is_ahead=False)
        reduced, pipelines = self.reduce_seconds, self.replicas * self.num_microbatches * self.tokens
        paper = {f"paper_{'cached' if c else 'naive'}_gb": self.paper_sent(c) for c in (False, True)}
        return {
            "in_flight": list(map(self.in_flight, ranks)),
            "largest_device": largest,
            "memory_gb": memory,
            "sent_forward_gb": self.sent / GB,
            "busiest_link_gb": self.busiest_link / GB,
            **{name: value if value is None else value / GB for name, value in paper.items()},
            "step_s": run.seconds + reduced,
            "all_reduce_s": reduced,
            "bubble": run.bubble,
            "bubble_equal_stages": (len(ranks) - 1) / (self.num_virtual * self.num_microbatches + len(ranks) - 1),
            "step_received_late_s": late.seconds + reduced,
            "tokens_per_second": pipelines / (run.seconds + reduced),
        }


def pipeline_size(devices: int, num_layers: int, num_virtual: int, given: int | None) -> int:
    """Processes of a pipeline: the largest number that divides the devices and leaves each stage a layer.

    Raises:
        InputError: there is none.
    """
    most = num_layers // num_virtual
    sizes = [size for size in range(2, most + 1) if devices % size == 0 and size == (given or size)]
    if not sizes:
        wanted = f"pipelines of {given}" if given else f"pipelines of 2 to {most}"
        raise InputError(
            f"{devices} devices and {num_layers} layers don't make {wanted} with {num_virtual} stages each."
        )
    return max(sizes)


def plan_devices(options: PlanOptions) -> dict:
    """A row for each number of devices, schedule and form of the model, beside what they have in common.

    Raises:
        InputError: there is no such model, or it can't be divided so.
    """
    given = read_config(options.config, options.set, may_be_type=True)
    check_sizes(given)
    if (mode := getattr(given, "attn_res_mode", "block")) not in MODES:
        raise InputError(f"{options.config} is in {mode} mode, and {', '.join(MODES)} are what can be planned.")
    if options.seq_len is None:
        options = replace(options, seq_len=min(4096, getattr(given, "max_position_embeddings", None) or 4096))
    check_context(given, options.seq_len)
    models = {}
    for mode in MODES:
        with reading.understood(f"the configuration of {options.config} is wrong"):
            models[mode] = Model(with_mode(given, mode, None if mode == "donor" else options.block_size))
    machine = Machine(
        options.tflops * 1e12 * options.utilisation,
        options.memory_bandwidth * GB,
        options.node_size,
        options.link_bandwidth * GB,
        options.node_bandwidth * GB,
        options.latency * 1e-6,
    )
    schedules = [("gpipe", 1), ("1f1b", 1), ("1f1b", options.stages_per_device)]
    rows = []
    for devices in options.devices:
        for schedule, num_virtual in dict.fromkeys(schedules):
            rows += schedule_rows(options, models, machine, devices, schedule, num_virtual)
    donor, block = models["donor"], models["block"]
    return {
        "model": {
            "config": options.config,
            "parameters": donor.parameters,
            "active_parameters": round(donor.active),
            "depth_attention_parameters": block.everywhere,
            "layers": len(donor.layers),
            "hidden_size": donor.hidden_size,
            "block_size": block.config.attn_res_block_size,
        },
        "options": {name: value for name, value in vars(options).items() if name not in ("output", "json", "config")},
        "rows": rows,
    }


def schedule_rows(
    options: PlanOptions, models: dict[str, Model], machine: Machine, devices: int, schedule: str, num_virtual: int
) -> list[dict]:
    """The rows of all forms of a model; naive ones only where caching changes something."""
    ranks = pipeline_size(devices, len(models["donor"].layers), num_virtual, options.pipeline_size)
    replicas, rest = devices // ranks, options.batch_size % (devices // ranks * options.microbatch_size)
    if rest:
        raise InputError(
            f"{options.batch_size} sequences can't be divided among {replicas} pipelines, in microbatches of "
            f"{options.microbatch_size}; change --batch-size or --pipeline-size."
        )
    num_microbatches = options.batch_size // replicas // options.microbatch_size
    if schedule == "1f1b":
        try:
            check_number(num_microbatches, ranks, num_virtual > 1)
        except InputError:  # too few microbatches for this schedule
            return []
    forms = [("donor", True), ("block", True), ("full", True)]
    forms += [("block", False), ("full", False)] if num_virtual > 1 else []
    rows, sizes = [], balanced(models["donor"].costs, ranks * num_virtual)
    for mode, cached in forms:
        kind = StreamPlan if mode == "donor" else PipelinePlan
        step = Step(
            models[mode],
            kind(models[mode].config, ranks * num_virtual, ranks, cached, sizes),
            machine,
            schedule,
            num_microbatches,
            replicas,
            options.seq_len,
            options.microbatch_size * options.seq_len,
            options.precision,
            options.gradient_checkpointing,
            options.shard_optimizer,
        )
        row = step.row()
        if mode == "donor":
            donor = row
        rows.append(
            {
                "devices": devices,
                "pipeline_size": ranks,
                "replicas": replicas,
                "stages_per_device": num_virtual,
                "schedule": schedule,
                "microbatches": num_microbatches,
                "model": mode,
                "cached": cached and mode != "donor" and num_virtual > 1,
                **row,
                "fits": row["memory_gb"]["total"] <= options.device_memory,
                "overhead": row["step_s"] / donor["step_s"] - 1,
                "overhead_received_late": row["step_received_late_s"] / donor["step_received_late_s"] - 1,
            }
        )
    return rows


def markdown(plan: dict) -> str:
    """A plan as a table; GB are 1e9 bytes, sent ones are forward, as many go back."""
    heading = (
        "devices", "schedule", "model", "in flight", "weights", "state", "activations", "working",
        "memory, GB", "sent, GB", "busiest link", "paper, naive", "paper, cached", "step, s", "bubble",
        "of equal stages", "overhead", "overhead, late",
    )  # fmt: skip
    lines = [heading]
    for row in plan["rows"]:
        memory = row["memory_gb"]
        state = memory["gradients"] + memory["optimizer"]
        held = (memory["weights"], state, *(memory[name] for name in ("activations", "working")))
        total = f"{memory['total']:.1f}"
        sent = [row[f"{name}_gb"] for name in ("sent_forward", "busiest_link", "paper_naive", "paper_cached")]
        is_donor = row["model"] == "donor"
        late = "-" if is_donor else f"{row['overhead_received_late']:.1%}"
        lines.append(
            (
                f"{row['devices']} = {row['replicas']} x {row['pipeline_size']}",
                row["schedule"] + (f", {row['stages_per_device']} stages" if row["stages_per_device"] > 1 else ""),
                row["model"] + ("" if row["cached"] or is_donor or row["stages_per_device"] == 1 else ", naive"),
                str(max(row["in_flight"])),
                *(f"{value:.1f}" for value in held),
                total if row["fits"] else f"**{total}**",
                *("-" if value is None else f"{value:.1f}" for value in sent),
                f"{row['step_s']:.3f}",
                f"{row['bubble']:.1%}",
                f"{row['bubble_equal_stages']:.1%}",
                "-" if is_donor else f"{row['overhead']:.1%}",
                "-" if is_donor or row["stages_per_device"] > 1 else late,
            )
        )
    return table(lines)


def report(plan: dict, command: str) -> str:
    """The table with what it takes for granted, in Markdown."""
    model, given = plan["model"], plan["options"]
    weights, gradients, state, activation = PRECISIONS[given["precision"]]
    sharded = ", divided among the replicas" if given["shard_optimizer"] else ""
    again = "computed again in the backward pass" if given["gradient_checkpointing"] else "kept"
    paragraphs = (
        f"`{model['config']}`: {model['parameters']:,} parameters, of which a token meets "
        f"{model['active_parameters']:,}; {model['layers']} layers, hidden size {model['hidden_size']}, blocks of "
        f"{model['block_size']} layers. A step has {given['batch_size']} sequences of {given['seq_len']} tokens, in "
        f"microbatches of {given['microbatch_size']}.",
        f"This is a plan, not a measurement. Devices reach {given['utilisation']:.0%} of {given['tflops']:g} TFLOPS, "
        f"and {given['memory_bandwidth']:g} GB/s of memory; links {given['link_bandwidth']:g} GB/s in a node of "
        f"{given['node_size']} devices and {given['node_bandwidth']:g} GB/s between nodes, with {given['latency']:g} "
        f"microseconds of latency. Bytes per parameter: {weights} for weights, {gradients} for gradients, {state} for "
        f"AdamW's state{sharded}; {activation} per activation. Activations are {again}. "
        "`scripts/recipes/planning.py` has the formulas.",
        "Devices are replicas x devices of a pipeline. GB are 1e9 bytes. Memory and its parts are those of the device "
        f"that needs the most, bold where that is more than {given['device_memory']:g} GB; state is gradients and "
        "optimizer. In flight are the most microbatches of a device, once per stage. Stages have layers by their "
        "active parameters and the head's. Sent is what one pipeline sends forward in a step; as many bytes go back. "
        'Overhead is the time of a step against the donor\'s. "Late": transfers begin when the receiver has nothing '
        "else to do, as in torch's schedules for one stage per device; elsewhere while it computes.",
    )
    text = "\n\n".join(textwrap.fill(paragraph, 120, break_on_hyphens=False) for paragraph in paragraphs)
    return f"{text}\n\n```console\n$ {command}\n```\n\n{markdown(plan)}"
