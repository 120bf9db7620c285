# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other projects that have depth attention already: how each is known, the donor that it amounts to, and
which of its tensors become which rows of ours."""

import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from .checkpoint import CONFIG_NAME, Checkpoint, ConversionError, some
from .kimi_k3 import NAME as KIMI_K3_NAME
from .kimi_k3 import from_kimi_k3
from .loading import check_layers
from .reading import typed


Rows = dict[str, torch.Tensor]

OPEN_ATTNRES = "[open-attention-residuals](https://github.com/wdlctc/open-attention-residuals)"
DELTA_ATTNRES = "[Delta Attention Residuals](https://github.com/wdlctc/delta-attention-residuals-code)"
WDLCTC_TYPE = "qwen3_attnres"
WDLCTC_NAME = re.compile(r"(|.*\.)(?:layers\.\d+\.(?:attn|mlp|v)_|final_)(?:res|null|pre)_\w+(?:\.\w+)?")
OUTPUT_BIAS = 1e4  # by which a softmax is exactly its last source
INKLING2_TYPE = "inkling2_text"
INKLING2_EPS = 1e-6  # a literal there
INKLING2_NAME = re.compile(
    r"(|.*\.)(?:layers\.(\d+)\.(attention|mlp)_input\.query|final_input\.query|"
    r"attn_res\.(attn|mlp)_queries\.(\d+)|attn_res\.output_query)"
)


@dataclass(frozen=True)
class Form:
    """Depth attention as a checkpoint of another project has it.

    Args:
        project: whose, in Markdown.
        donor_config: the config.json of the donor that the other tensors amount to.
        fields: `attn_res_...` of the configuration.
        names: of the tensors that hold it.
        rows: makes of them, in the order of `names`, the mixer's parameters.
        runs: whether the donor's class computes what this checkpoint does, so that logits can be compared.
    """

    project: str
    donor_config: dict
    fields: dict
    names: tuple[str, ...]
    rows: Callable[[Rows, PreTrainedConfig], Rows]
    runs: bool = False


def donor_config(config: dict) -> dict:
    """The config.json of the donor that a checkpoint with this one amounts to: without what the forms add."""
    if config.get("model_type") == WDLCTC_TYPE:
        config = {key: value for key, value in config.items() if not key.startswith("attnres_") and key != "auto_map"}
        config["model_type"] = "qwen3"
        if config.get("architectures"):
            names = [str(name).replace("Qwen3AttnRes", "Qwen3") for name in config["architectures"]]
            config["architectures"] = names
    elif _is_kimi_k3(config):
        config = {key: value for key, value in config.items() if key != "attn_res_block_size"}
    return config


def find_form(checkpoint: Checkpoint) -> Form | None:
    """The form of a checkpoint; None if it is a donor's.

    Raises:
        ConversionError: it is nearly a form that is known; the message says what is missing or too much.
    """
    config, names = checkpoint.config, checkpoint.tensors
    if config.get("model_type") == WDLCTC_TYPE:
        return _wdlctc(config, names)
    if config.get("model_type") == INKLING2_TYPE:
        return _inkling2(config, names)
    found = tuple(name for name in names if KIMI_K3_NAME.fullmatch(name))
    if _is_kimi_k3(config):
        return _kimi_k3(config, found)
    if found:
        raise ConversionError(
            f"{found[0]} is depth attention under a name of Kimi K3, and {CONFIG_NAME} has no attn_res_block_size, the "
            "decoder layers of a block."
        )
    return None


def _is_kimi_k3(config: dict) -> bool:
    return "attn_res_block_size" in config and "attn_res_mode" not in config


def _kimi_k3(config: dict, names: tuple[str, ...]) -> Form:
    def rows(tensors: Rows, config: PreTrainedConfig) -> Rows:
        query, key_norm = from_kimi_k3(tensors, config.num_hidden_layers, config.hidden_size)
        return {"query": query, "key_norm": key_norm}

    fields = {"attn_res_mode": "block", "attn_res_block_size": config["attn_res_block_size"]}
    return Form("Kimi K3", donor_config(config), fields, names, rows)


def _wdlctc(config: dict, names: Collection[str]) -> Form:
    mode, gate = config.get("attnres_mode", "block"), config.get("attnres_gate_type", "bias")
    if mode not in ("block", "full"):
        raise ConversionError(f"attnres_mode is {mode!r}; block and full can be converted.")
    if gate != "bias":
        raise ConversionError(f"attnres_gate_type is {gate!r}; only 'bias', reads without a gate, can be converted.")
    if config.get("attnres_use_null_source"):
        raise ConversionError("attnres_use_null_source is set; reads with a null source can't be converted.")
    num_layers = typed(config, "num_hidden_layers", int, CONFIG_NAME)
    num_blocks = typed(config, "attnres_num_blocks", int, CONFIG_NAME) or 8
    if num_layers is None or num_blocks < 1:
        raise ConversionError(f"{CONFIG_NAME} must give num_hidden_layers, and a positive attnres_num_blocks.")
    check_layers(num_layers, names)

    found, prefix = _with_one_prefix(names, WDLCTC_NAME)
    stems = [f"{prefix}layers.{layer}.{part}_res" for layer in range(num_layers) for part in ("attn", "mlp")]
    final = f"{prefix}final_res"
    if f"{final}_bias" in found:
        raise ConversionError(
            f"{final}_bias is of the code in whose block mode the embedding is in two sources, which no mode here "
            "computes; the code with cumulative states and that without biases can be converted."
        )
    is_cumulative = f"{final}_proj.weight" not in found
    stems += [] if is_cumulative else [final]
    parts = ("_proj.weight", "_norm.weight", *(["_bias"] if is_cumulative else []))
    expected = [stem + part for stem in stems for part in parts]
    _check_names(found, expected, f"{num_layers} layers in mode {mode}")
    fields = {"attn_res_mode": f"{mode}_recency" if is_cumulative else mode}
    if mode == "block":
        fields["attn_res_block_size"] = -(-num_layers // num_blocks)
    project, rows = (OPEN_ATTNRES, _cumulative_rows) if is_cumulative else (DELTA_ATTNRES, _plain_rows)
    return Form(project, donor_config(config), fields, tuple(expected), rows)


def _plain_rows(tensors: Rows, config: PreTrainedConfig) -> Rows:
    """Of a query `(1, hidden)` and a gain `(hidden,)` for each read."""
    hidden = config.hidden_size
    rows = {"query": [], "key_norm": []}
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight"):
            rows["query"].append(_shaped(name, tensor, (1, hidden)).view(hidden))
        elif name.endswith("_norm.weight"):
            rows["key_norm"].append(_shaped(name, tensor, (hidden,)))
    return {name: torch.stack(values) for name, values in rows.items()}


def _cumulative_rows(tensors: Rows, config: PreTrainedConfig) -> Rows:
    """As [`_plain_rows`], with a bias `()` for each read but the output, which takes the latest state.

    Where no block is open, the latest state is there twice, as the block that was closed last, and with the bias:
    `e^s + e^(s + b)` is one source with the bias `log(1 + e^b)`.
    """
    rows = _plain_rows(tensors, config)
    found = [_shaped(name, tensor, ()) for name, tensor in tensors.items() if name.endswith("_bias")]
    bias = torch.stack([*found, torch.tensor(OUTPUT_BIAS)]).double()
    is_twice = torch.tensor([not config.extends_open_depth_source(row) for row in range(len(found))] + [False])
    bias = torch.where(is_twice, torch.logaddexp(bias, torch.zeros_like(bias)), bias)
    return {
        "query": torch.cat([rows["query"], torch.zeros(1, config.hidden_size)]),
        "key_norm": torch.cat([rows["key_norm"], torch.ones(1, config.hidden_size)]),
        "bias": bias.float()[:, None],
    }


def _inkling2(config: dict, names: Iterable[str]) -> Form:
    found, _ = _with_one_prefix(names, INKLING2_NAME)
    return Form("Inkling 2", config, {"attn_res_mode": "block_inkling2"}, tuple(found), _inkling2_rows, runs=True)


def _inkling2_rows(tensors: Rows, config: PreTrainedConfig) -> Rows:
    """Of the queries of each read, `(queries, hidden)` or `(hidden,)`; the first has none, as it has one source."""
    numbers = [config.num_depth_queries(row) for row in range(config.num_depth_reads)]
    query = torch.zeros(config.num_depth_reads, config.most_depth_queries, config.hidden_size)
    found = {_inkling2_row(name, config.num_depth_reads): name for name in tensors}
    expected = range(1, config.num_depth_reads)
    if sorted(found) != [*expected] or len(found) < len(tensors):
        problem = "have two queries, or are not there" if set(found) >= {*expected} else "lack a query"
        rows = sorted({*found} ^ {*expected}) or ["some"]
        raise ConversionError(f"reads {some([*map(str, rows)])} of {config.num_hidden_layers} layers {problem}.")
    for row, name in found.items():
        shapes = {(numbers[row], config.hidden_size)} | ({(config.hidden_size,)} if numbers[row] == 1 else set())
        if tuple(tensors[name].shape) not in shapes:
            raise ConversionError(f"{name} has the shape {tuple(tensors[name].shape)}; {min(shapes)} is expected.")
        query[row, : numbers[row]] = tensors[name].float()
    return {"query": query}


def _inkling2_row(name: str, num_reads: int) -> int:
    _, layer, part, released_part, number = INKLING2_NAME.fullmatch(name).groups()
    if layer is not None:
        return 2 * int(layer) + (part == "mlp")
    if number is not None:  # released names count the reads before attention from layer 1 on
        return 2 * int(number) + 1 if released_part == "mlp" else 2 * int(number) + 2
    return num_reads - 1


def inkling2_fields(config: PreTrainedConfig) -> dict:
    """What the donor's config.json says of depth attention.

    Raises:
        ConversionError: the donor can't compute it.
    """
    if (
        config.attn_res_mode != "block_inkling2"
        or config.attn_res_norm_eps != INKLING2_EPS
        or config.attn_res_sum_scale
    ):
        raise ConversionError(
            f"Inkling 2 has the mode block_inkling2, the epsilon {INKLING2_EPS:g} and no scale of reads; {CONFIG_NAME} "
            f"says {config.attn_res_mode}, {config.attn_res_norm_eps:g} and {config.attn_res_sum_scale}."
        )
    size = config.attn_res_block_size
    is_said = size == min(config.n_layers_per_attn_res_block, config.num_hidden_layers)
    return {} if is_said else {"n_layers_per_attn_res_block": size}


def to_inkling2(query: torch.Tensor, config: PreTrainedConfig, prefix: str) -> Rows:
    """The queries of an AttnRes Inkling 2 as its donor has them, by name; the inverse of reading them."""
    names = [
        f"layers.{layer}.{part}_input" for layer in range(config.num_hidden_layers) for part in ("attention", "mlp")
    ]
    tensors = {}
    for row, name in enumerate([*names, "final_input"]):
        number = config.num_depth_queries(row)
        if row:
            values = query[row, :number] if number > 1 else query[row, 0]
            tensors[f"{prefix}{name}.query"] = values.clone()
    return tensors


def _with_one_prefix(names: Iterable[str], pattern: re.Pattern) -> tuple[list[str], str]:
    found = {name: match[1] for name in names if (match := pattern.fullmatch(name))}
    prefixes = sorted(set(found.values()))
    if len(prefixes) > 1:
        raise ConversionError(
            f"the names of depth attention have several prefixes: {', '.join(map(repr, prefixes))}; only one may be "
            "there."
        )
    if not found:
        raise ConversionError(f"there are no tensors of depth attention, which {CONFIG_NAME} speaks of.")
    return list(found), prefixes[0]


def _check_names(found: list[str], expected: list[str], what: str) -> None:
    for names, problem in (({*expected} - {*found}, "missing"), ({*found} - {*expected}, "not to be there")):
        if names:
            raise ConversionError(f"of {what}, these tensors are {problem}: {some(sorted(names))}.")


def _shaped(name: str, tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    if tuple(tensor.shape) != shape:
        raise ConversionError(f"{name} has the shape {tuple(tensor.shape)}; {shape} is expected.")
    return tensor.float()
