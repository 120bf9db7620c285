# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""All ways to mix depth, written down from their papers' formulas in float64, for one token.

Shares no code with the project: sources are formed from all outputs anew at each read, and streams are plain lists.
"""

import math

import torch


def dot(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return (first * second).sum()


def unit(vector: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without a gain."""
    return vector / torch.sqrt((vector**2).sum() / vector.numel() + eps)


def softmax(scores: list[torch.Tensor]) -> list[torch.Tensor]:
    exponentials = [torch.exp(score) for score in scores]
    return [exponential / sum(exponentials) for exponential in exponentials]


def combine(weights: list, values: list) -> torch.Tensor:
    return sum(weight * value for weight, value in zip(weights, values, strict=True))


class Case:
    """What a read knows: its parameters by name, and the fields of the configuration."""

    def __init__(self, config, state: dict, row: int):
        self.config, self.row, self.eps = config, row, config.attn_res_norm_eps
        self.of_row = {name: tensor[row] for name, tensor in state.items() if name != "key_projection"}
        self.shared = state
        self.is_scaled = config.attn_res_sum_scale

    def __getattr__(self, name: str):
        return self.of_row[name]

    def scores(self, vectors: list) -> list:
        return [dot(self.query, self.key_norm * unit(vector, self.eps)) for vector in vectors]

    def scaled(self, number: int) -> int:
        return number if self.is_scaled else 1


# Reads of sources: `(case, sources, how many vectors each one sums)` to the mix and the weights


def attention_residuals(case: Case, sources: list, sizes: list) -> tuple:
    weights = softmax(case.scores(sources))
    return case.scaled(len(sources)) * combine(weights, sources), weights


def denseformer(case, sources, sizes):
    weights = [*case.weight[: len(sources)]]
    return combine(weights, sources), weights


def static(case, sources, sizes):
    weights = softmax([*case.weight[: len(sources)]])
    return case.scaled(len(sources)) * combine(weights, sources), weights


def sigmoid(case, sources, sizes):
    weights = [2 / (1 + torch.exp(-score)) for score in case.scores(sources)]
    return combine(weights, sources), weights


def raw_keys(case, sources, sizes):
    weights = softmax([dot(case.query, source) for source in sources])
    return case.scaled(len(sources)) * combine(weights, sources), weights


def window(case, sources, sizes):
    first_in_window = max(1, len(sources) - case.config.attn_res_window)
    read = [index for index in range(len(sources)) if index == 0 or index >= first_in_window]
    some = softmax(case.scores([sources[index] for index in read]))
    weights = [torch.zeros((), dtype=torch.float64)] * len(sources)
    for index, weight in zip(read, some):
        weights[index] = weight
    return case.scaled(len(read)) * combine(weights, sources), weights


def heads(case, sources, sizes):
    size = case.config.hidden_size // case.config.attn_res_num_heads
    parts, by_head = [], []
    for start in range(0, case.config.hidden_size, size):
        channels = slice(start, start + size)
        keys = [unit(source, case.eps)[channels] * case.key_norm[channels] for source in sources]
        by_head.append(softmax([dot(case.query[channels], key) for key in keys]))
        parts.append(combine(by_head[-1], [source[channels] for source in sources]))
    weights = [sum(weights) / len(by_head) for weights in zip(*by_head)]
    return case.scaled(len(sources)) * torch.cat(parts), weights


def input_query(case, sources, sizes):
    keys = [unit(source, case.eps) for source in sources]
    query = case.query_projection @ keys[-1] / case.config.hidden_size
    weights = softmax([dot(query, key) for key in keys])
    return case.scaled(len(sources)) * combine(weights, sources), weights


def low_rank(case, sources, sizes):
    """A block of c outputs counts c times, each time as the mean of them."""
    keys = [case.shared["key_projection"] @ unit(source, case.eps) for source in sources]
    exponentials = [
        size * torch.exp(dot(case.query, key) / math.sqrt(case.config.attn_res_rank)) for key, size in zip(keys, sizes)
    ]
    weights = [exponential / sum(exponentials) for exponential in exponentials]
    means = [source / size for source, size in zip(sources, sizes)]
    return case.scaled(sum(sizes)) * combine(weights, means), weights


def delta(case, sources, sizes):
    number = len(sources)
    alphas = softmax(case.scores([case.null_source, *sources]))
    routed = combine(alphas, [case.null_source, *sources])
    factor = (number + 1) / (number + 2)
    return factor * (sum(sources) + routed), [factor * (1 + alpha) for alpha in alphas[1:]]


def recency(case, sources, sizes):
    states = [sum(sources[: index + 1]) for index in range(len(sources))]
    scores = case.scores(states)
    weights = softmax([*scores[:-1], scores[-1] + case.bias[0]])
    return combine(weights, states), weights


def inkling2(case, sources, sizes):
    values = [unit(source, case.eps) for source in sources]
    weights = softmax([dot(case.query[0], value) / math.sqrt(case.config.hidden_size) for value in values])
    return sources[0] if len(sources) == 1 else combine(weights, values), weights


READS = {
    "sigmoid": sigmoid,
    "raw_keys": raw_keys,
    "static": static,
    "window": window,
    "heads": heads,
    "input_query": input_query,
    "low_rank": low_rank,
    "delta": delta,
    "recency": recency,
    "inkling2": inkling2,
}
READS = {f"{sources}_{name}": read for name, read in READS.items() for sources in ("block", "full")}
READS |= {"block": attention_residuals, "full": attention_residuals, "denseformer": denseformer}


def run_sources(config, state: dict, embedding: torch.Tensor, sublayer) -> list[tuple]:
    read, outputs, seen = READS[config.attn_res_mode], [], []
    per_block = 2 * config.attn_res_block_size if config.attn_res_mode.startswith("block") else 1
    for row in range(2 * config.num_hidden_layers + 1):
        blocks = [outputs[start : start + per_block] for start in range(0, len(outputs), per_block)]
        sources, sizes = [embedding, *(sum(block) for block in blocks)], [1, *map(len, blocks)]
        seen.append(read(Case(config, state, row), sources, sizes))
        outputs.append(sublayer(row, seen[-1][0]))
    return seen


# Streams: `(case, streams)` to what is read of each, what is written to each, and what of stream j goes to stream k


def hyper_connections(case: Case, streams: list) -> tuple:
    rows = []
    for index, stream in enumerate(streams):
        dynamic = [torch.tanh(dot(weight, unit(stream, case.eps))) for weight in case.weight]
        scales = [case.scale[0]] * (len(streams) + 1) + [case.scale[1]]
        rows.append([s * d + b for s, d, b in zip(scales, dynamic, case.bias[index], strict=True)])
    return [row[0] for row in rows], [row[-1] for row in rows], [row[1:-1] for row in rows]


def manifold_hyper_connections(case: Case, streams: list, prefix: str = "") -> tuple:
    weight, bias, scale = (case.of_row[f"{prefix}{name}"] for name in ("weight", "bias", "scale"))
    number, everything = len(streams), unit(torch.cat(streams), case.eps)
    dynamic = [dot(row, everything) for row in weight]
    parts = [0] * number + [1] * number + [2] * number**2
    logits = [scale[part] * d + b for part, d, b in zip(parts, dynamic, bias, strict=True)]
    read = [1 / (1 + torch.exp(-logit)) for logit in logits[:number]]
    written = [2 / (1 + torch.exp(-logit)) for logit in logits[number : 2 * number]]
    matrix = torch.exp(torch.stack(logits[2 * number :])).reshape(number, number)
    for _ in range(20):
        matrix = matrix / matrix.sum(1, keepdim=True)
        matrix = matrix / matrix.sum(0, keepdim=True)
    return read, written, matrix


def run_streams(config, state: dict, embedding: torch.Tensor, sublayer) -> list[tuple]:
    connect = {"hc": hyper_connections, "mhc": manifold_hyper_connections}[config.attn_res_mode]
    streams, seen = [embedding] * config.attn_res_num_streams, []
    for row in range(2 * config.num_hidden_layers + 1):
        read, written, matrix = connect(Case(config, state, row), streams)
        seen.append((combine(read, streams), read))
        output = sublayer(row, seen[-1][0])
        streams = [
            combine([matrix[j][k] for j in range(len(streams))], streams) + written[k] * output
            for k in range(len(streams))
        ]
    return seen


def run_block_streams(config, state: dict, embedding: torch.Tensor, sublayer) -> list[tuple]:
    """Attention to closed blocks and to what is read of the open one's streams, which begin as zeros."""
    number, per_block = config.attn_res_num_streams, 2 * config.attn_res_block_size
    closed, streams, seen = [embedding], [torch.zeros_like(embedding)] * number, []
    for row in range(2 * config.num_hidden_layers + 1):
        case = Case(config, state, row)
        is_open = row % per_block != 0
        if row and not is_open:
            closed.append(sum(streams) / number)
            streams = [torch.zeros_like(embedding)] * number
        read, written, matrix = manifold_hyper_connections(case, streams, "connections.")
        sources = [*closed, combine(read, streams)] if is_open else closed
        seen.append(attention_residuals(case, sources, []))
        output = sublayer(row, seen[-1][0])
        streams = [combine([matrix[j][k] for j in range(number)], streams) + written[k] * output for k in range(number)]
    return seen


RUNS = {**dict.fromkeys(READS, run_sources), "hc": run_streams, "mhc": run_streams, "block_mhc": run_block_streams}


def reference_reads(config, state: dict, embedding: torch.Tensor, sublayer) -> list[tuple]:
    """The mix `(hidden,)` and the weights of each read, of which the last is for the output.

    Args:
        state: the parameters of depth attention.
        embedding: of one token, `(hidden,)`.
        sublayer: `(row, read)` to what a sublayer puts out.
    """
    return RUNS[config.attn_res_mode](config, state, embedding, sublayer)
