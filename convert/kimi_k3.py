# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention under the tensor names of Kimi K3, there and back. Both ways are exact.

    python -m attnres_convert.kimi_k3 export CHECKPOINT FILE
    python -m attnres_convert.kimi_k3 import SOURCE CHECKPOINT

Kimi K3 has one pair of tensors per read, `..._res_proj.weight` `(1, hidden)`, the query, and `..._res_norm.weight`
`(hidden,)`, the gain of the keys: `layers.N.self_attention` and `layers.N.mlp` before the sublayers of layer N and
`output_attn` before the final norm. An AttnRes checkpoint has all queries and all gains in two tensors
`(2 * num_hidden_layers + 1, hidden)`, in the same order. Whole checkpoints are written in this form by
`attnres-convert --to-kimi-k3` and read by `attnres-convert`.
"""

import argparse
import os
import re
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save as serialize

from .checkpoint import (
    INDEX_NAME,
    SINGLE_SHARD_NAME,
    Checkpoint,
    ConversionError,
    clear_errors,
    read_checkpoint,
    read_index,
    read_shard,
)
from .families import find_attnres_family
from .reading import check_inside, understood
from .staging import made, replaced


NAME = re.compile(r"(|.*\.)(?:layers\.(\d+)\.(?:self_attention|mlp)|output_attn)_res_(?:proj|norm)\.weight")
DTYPES = {"F32", "F16", "BF16"}  # which float32 holds exactly
QUERY, KEY_NORM = "depth_attention.query", "depth_attention.key_norm"


def to_kimi_k3(query: torch.Tensor, key_norm: torch.Tensor, prefix: str = "") -> dict[str, torch.Tensor]:
    """The rows of depth attention as Kimi K3 names them.

    Args:
        query, key_norm: `(2 * num_hidden_layers + 1, hidden)`.
        prefix: what the names begin with, such as `"model."`.
    """
    tensors = {}
    for stem, query_row, key_norm_row in zip(_stems(len(query) // 2, prefix), query, key_norm):
        tensors[f"{stem}_res_proj.weight"] = query_row[None].clone()
        tensors[f"{stem}_res_norm.weight"] = key_norm_row.clone()
    return tensors


def from_kimi_k3(
    tensors: dict[str, torch.Tensor], num_layers: int, hidden_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of [`to_kimi_k3`], in float32: queries and gains `(2 * num_layers + 1, hidden_size)`.

    Args:
        tensors: float32, float16 or bfloat16, by Kimi K3's names with any one prefix. Other tensors are left alone.

    Raises:
        ConversionError: a read's tensor is missing, is not of this shape or dtype, or isn't finite, there are more
            layers, or there are several prefixes.
    """
    prefix = _check_names(tensors, num_layers)
    rows = {"proj": [], "norm": []}
    for stem in _stems(num_layers, prefix):
        for part, shape in (("proj", (1, hidden_size)), ("norm", (hidden_size,))):
            name = f"{stem}_res_{part}.weight"
            tensor = tensors[name]
            if tuple(tensor.shape) != shape:
                raise ConversionError(f"{name} has the shape {tuple(tensor.shape)}; {shape} is expected.")
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise ConversionError(f"{name} is {tensor.dtype}; float32, float16 or bfloat16 is expected.")
            if not tensor.isfinite().all():
                raise ConversionError(f"{name} has values that aren't finite.")
            rows[part].append(tensor.float().view(hidden_size))
    return torch.stack(rows["proj"]), torch.stack(rows["norm"])


def export_kimi_k3(
    checkpoint: str | os.PathLike, file: str | os.PathLike, prefix: str = "", force: bool = False
) -> dict:
    """Writes the depth attention of an AttnRes checkpoint folder to a safetensors file under Kimi K3's names.

    Args:
        force: replace `file` if it exists.

    Returns:
        The checkpoint's configuration.

    Raises:
        ConversionError: nothing was written; the message says why.
    """
    with clear_errors(file):
        source, target = _open_checkpoint(checkpoint), Path(file)
        if target.is_dir() or (target.exists() and not force):
            raise ConversionError(
                f"{target} exists; " + ("give a file." if target.is_dir() else "use --force to replace it.")
            )
        tensors = to_kimi_k3(*(_read(source, _depth_name(source, suffix)) for suffix in (QUERY, KEY_NORM)), prefix)
        with made(target.parent), replaced(target) as temporary:
            temporary.write_bytes(serialize(tensors, {"format": "pt"}))
        return source.config


def import_kimi_k3(source: str | os.PathLike, checkpoint: str | os.PathLike, force: bool = False) -> dict:
    """Replaces the depth attention of an AttnRes checkpoint folder by the rows that Kimi K3's names give.

    Only the bytes of the two tensors change. Each shard that holds one is rewritten beside the old one and then takes
    its place, so that links to the old one keep what they had.

    Args:
        source: a safetensors file, or a checkpoint folder of which only the shards with these names are read.
        force: also replace queries that aren't zero.

    Returns:
        The checkpoint's configuration.

    Raises:
        ConversionError: nothing was changed; the message says why.
    """
    with clear_errors(checkpoint):
        target = _open_checkpoint(checkpoint)
        names = [_depth_name(target, suffix) for suffix in (QUERY, KEY_NORM)]
        largest = _read(target, names[0]).abs().max().item()
        if largest and not force:
            raise ConversionError(
                f"the queries of {checkpoint} are trained, up to {largest:.3g}; use --force to replace them."
            )
        num_rows, hidden_size = target.tensors[names[0]].shape
        rows = from_kimi_k3(_read_kimi_k3(Path(source)), num_rows // 2, hidden_size)
        shards = {target.file_of(name) for name in names}
        for shard in sorted(shards):
            with replaced(target.folder / shard) as temporary:
                shutil.copyfile(target.shards[shard].path, temporary)
                with open(temporary, "r+b") as file:
                    for name, tensor in zip(names, rows):
                        if name in target.shards[shard].tensors:
                            file.seek(target.shards[shard].data_start + target.tensors[name].start)
                            file.write(tensor.numpy().tobytes())
        return target.config


def _stems(num_layers: int, prefix: str) -> list[str]:
    """What the names begin with, read by read."""
    layers = [
        f"{prefix}layers.{layer}.{sublayer}" for layer in range(num_layers) for sublayer in ("self_attention", "mlp")
    ]
    return [*layers, f"{prefix}output_attn"]


def _check_names(tensors: dict, num_layers: int) -> str:
    """The prefix of the names, once it is known that they are those of `num_layers` layers."""
    found = {name: match for name in tensors if (match := NAME.fullmatch(name))}
    prefixes = sorted({match[1] for match in found.values()})
    if not found:
        raise ConversionError("there is no tensor like layers.0.mlp_res_proj.weight, so this isn't of Kimi K3.")
    if len(prefixes) > 1:
        raise ConversionError(
            f"the names have several prefixes: {', '.join(map(repr, prefixes))}; only one may be there."
        )
    expected = {f"{stem}_res_{part}.weight" for stem in _stems(num_layers, prefixes[0]) for part in ("proj", "norm")}
    for names, what in ((expected - set(found), "missing"), (set(found) - expected, "more than the checkpoint has")):
        if names:
            some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
            raise ConversionError(
                f"the checkpoint has {num_layers} layers, for which these tensors are {what}: {some}."
            )
    return prefixes[0]


def _open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    if not Path(folder).is_dir():
        raise ConversionError(f"{folder} is no folder; give that of an AttnRes checkpoint.")
    checkpoint = read_checkpoint(Path(folder))
    find_attnres_family(checkpoint.config)
    return checkpoint


def _depth_name(checkpoint: Checkpoint, suffix: str) -> str:
    """The name of one of the two tensors of depth attention, after a check of its shape and dtype."""
    name = next((name for name in checkpoint.tensors if name == suffix or name.endswith(f".{suffix}")), None)
    if name is None:
        mode = checkpoint.config.get("attn_res_mode")
        raise ConversionError(f"{checkpoint.folder} has no {suffix} (attn_res_mode is {mode!r}).")
    num_layers, hidden_size = (checkpoint.config.get(key) for key in ("num_hidden_layers", "hidden_size"))
    if num_layers is None or hidden_size is None:
        raise ConversionError(f"config.json of {checkpoint.folder} must give num_hidden_layers and hidden_size.")
    shape = (2 * num_layers + 1, hidden_size)
    tensor = checkpoint.tensors[name]
    if (tensor.dtype, tensor.shape) != ("F32", shape):
        raise ConversionError(f"{name} is {tensor.dtype} {tensor.shape}; F32 {shape} is expected by config.json.")
    return name


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    path = checkpoint.shards[checkpoint.file_of(name)].path
    with understood(f"{path.name} can't be read"), safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def _read_kimi_k3(source: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file or folder that have Kimi K3's names for depth attention."""
    if source.is_dir():
        index = read_index(source)
        weight_map = {} if index is None else index["weight_map"]
        names = [SINGLE_SHARD_NAME] if index is None else {x for name, x in weight_map.items() if NAME.fullmatch(name)}
        files = [source / name for name in sorted(names)]
    elif os.path.lexists(source):
        files = [source]
    else:
        raise ConversionError(f"{source} doesn't exist; give a safetensors file or a checkpoint folder.")
    tensors = {}
    for path in files:
        if not os.path.lexists(path):
            raise ConversionError(f"{INDEX_NAME} names {path.name}, which {source} doesn't have.")
        if source.is_dir():
            check_inside(source, path)
        found = {name: info for name, info in read_shard(path).tensors.items() if NAME.fullmatch(name)}
        for name, info in found.items():
            if info.dtype not in DTYPES:
                raise ConversionError(f"{name} is {info.dtype}; one of {', '.join(sorted(DTYPES))} is expected.")
        with understood(f"{path.name} can't be read"), safe_open(path, framework="pt") as file:
            tensors |= {name: file.get_tensor(name) for name in found}
    return tensors


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m attnres_convert.kimi_k3", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("export", help="write depth attention under Kimi K3's names")
    export.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of an AttnRes checkpoint")
    export.add_argument("file", metavar="FILE", help="safetensors file to write")
    export.add_argument("--prefix", default="", help="what the names begin with, such as model. (default: nothing)")
    export.add_argument("--force", action="store_true", help="replace FILE")
    load = commands.add_parser("import", help="read depth attention under Kimi K3's names")
    load.add_argument("source", metavar="SOURCE", help="safetensors file, or checkpoint folder")
    load.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of the AttnRes checkpoint to change")
    load.add_argument("--force", action="store_true", help="replace queries that aren't zero")
    return parser


def main(argv: list[str] | None = None) -> int:
    options = vars(build_parser().parse_args(argv))
    run = {"export": export_kimi_k3, "import": import_kimi_k3}[options.pop("command")]
    try:
        config = run(**options)
    except ConversionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.get('file', options['checkpoint'])}: {2 * config['num_hidden_layers'] + 1} reads written")
    if config.get("attn_res_sum_scale"):
        print(
            "note: this checkpoint multiplies each read by its number of sources (attn_res_sum_scale), Kimi K3 doesn't."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
