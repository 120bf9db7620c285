# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint whose weights are stored quantised, as floats: shard by shard, by the code of those who quantised it.

What isn't quantised keeps its bytes. The result is a checkpoint like any other: it converts, and trains in all ways.
"""

import math
import os
import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn.functional import pad
from tqdm import tqdm

from configuration_attnres import donor_class

from .card import CARD_NAME, DONOR_CARD_NAME, RESULTS_NAME, folder_card, inherit, read_metadata, write_card
from .checkpoint import (
    CONFIG_NAME,
    INDEX_NAME,
    SINGLE_SHARD_NAME,
    Checkpoint,
    ConversionError,
    clear_errors,
    read_checkpoint,
)
from .code_references import local_code
from .conversion import (
    SPACE_FOR_SMALL_FILES,
    build_config,
    build_model,
    check_paths,
    copy_companions,
    num_mtp_layers,
    plan_companions,
    versions,
)
from .families import find_attnres_family, find_family, supported_families
from .files import check_space, copy_file
from .gguf_donor import DTYPES, check_dtype, gguf_donor, make_readable
from .loading import check_layers, check_tensors
from .reading import is_regular, one_line, understood
from .source import Source, find_gguf, open_source
from .staging import staged
from .writing import write_json


SHARD_SIZE = 2 * 10**9  # bytes, of a written shard; as much is in memory, with the largest tensor
ROWS_AT_ONCE = 2**20  # of 32 numbers each, of MXFP4
SCALE = "_scale_inv"
UNUSED_BY_FLOATS = ("activation_scale", "input_scale")
TORCH_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
PLAIN = ("F16", "BF16", "F32", "F64", "BOOL", "I32", "I64")  # what isn't quantised


@dataclass(frozen=True)
class DequantizationResult:
    """What was done. `quantization` is how the weights were stored; parameters are counted as elements."""

    path: Path
    quantization: str
    dtype: str
    num_parameters: int
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Matrix:
    """A quantised tensor: those that it is stored as, by role, and how many numbers it has."""

    parts: dict[str, str]
    numel: int


def dequantize_checkpoint(
    src: str | os.PathLike,
    dst: str | os.PathLike,
    dtype: str | None = None,
    gguf_file: str | None = None,
    revision: str | None = None,
    force: bool = False,
    progress: bool = False,
) -> DequantizationResult:
    """Writes a checkpoint with float weights from one that is stored quantised.

    Of MXFP4, blocks of fp8, and bitsandbytes in 4 and 8 bits one shard is in memory at a time; a GGUF file is read as
    transformers reads it, whole.

    Args:
        src: a checkpoint folder, a GGUF file or a Hub id.
        dst: the folder to write.
        dtype: `"bfloat16"` or `"float32"`, of what was quantised; the rest keeps its own. Default: float32 if the
            configuration says so, otherwise bfloat16; for a GGUF file as in [`convert_checkpoint`].
        gguf_file: the name of a GGUF file in the folder or repository `src`.
        revision: branch, tag or commit of a Hub id.
        force: replace `dst`, after everything else is done.
        progress: show a progress bar.

    Raises:
        ConversionError: nothing was written; the message says why.
    """
    check_dtype(dtype)
    with clear_errors(dst):
        dst = check_paths(src, dst, force)
        if (found := find_gguf(src, revision, gguf_file)) is not None:
            with gguf_donor(found, dst, dtype, progress) as (source, warnings), staged(dst, force) as folder:
                for path in list(source.folder.iterdir()):
                    os.rename(path, folder / path.name)
                return _finish(source, folder, dst, revision, warnings)
        source = open_source(src, revision, _check_method)
        checkpoint = read_checkpoint(source.folder)
        method = _check_method(checkpoint.config)
        saved = checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype"))
        dtype = dtype or ("float32" if saved == "float32" else "bfloat16")
        matrices, kept = _plan(checkpoint, METHODS[method].find(checkpoint))
        written = sum(matrix.numel for matrix in matrices.values()) * DTYPES[dtype].itemsize
        check_space(dst, written + checkpoint.num_bytes_of(kept) + SPACE_FOR_SMALL_FILES)
        made = {"format": "safetensors", "quantization": method, "dtype": dtype}
        source = Source(source.folder, source.name, source.commit, made, read_metadata(source.folder))
        with staged(dst, force) as folder:
            turn = partial(METHODS[method].turn, config=checkpoint.config["quantization_config"])
            shapes = _write_tensors(checkpoint, matrices, kept, turn, DTYPES[dtype], folder, progress)
            warnings = _write_rest(source, checkpoint, shapes, folder, dtype)
            return _finish(source, folder, dst, revision, warnings)


def _check_method(config: dict) -> str:
    """How a checkpoint is stored, once it is known that it can be read and is of a supported family."""
    if (quantization := config.get("quantization_config")) is None:
        raise ConversionError("this checkpoint isn't quantised, as config.json has no quantization_config; convert it.")
    _family(config)
    method = quantization.get("quant_method")
    if quantization.get("load_in_4bit"):
        method = "bitsandbytes_4bit"
    elif quantization.get("load_in_8bit"):
        method = "bitsandbytes_8bit"
    if method not in METHODS:
        raise ConversionError(
            f"checkpoints quantised as {method} aren't dequantised here, only {', '.join(METHODS)}; take the "
            "checkpoint that it was made from."
        )
    if method.startswith("bitsandbytes") and find_spec("bitsandbytes") is None:
        raise ConversionError("this checkpoint needs bitsandbytes: pip install bitsandbytes")
    return method


def _family(config: dict):
    """The family and the class, of a donor or an AttnRes model."""
    architectures = config.get("architectures")
    if any(config.get("model_type") == family.config_class.model_type for family in supported_families().values()):
        family = find_attnres_family(config)
        return family, family.heads[family.donor_head(architectures)]
    family = find_family(config)
    return family, donor_class(family.head(architectures))


def _plan(checkpoint: Checkpoint, matrices: dict[str, Matrix]) -> tuple[dict[str, Matrix], list[str]]:
    """The quantised tensors, and the names of the others, which stay as they are."""
    parts = {part for matrix in matrices.values() for part in matrix.parts.values()}
    rest = [name for name in checkpoint.tensors if name not in parts and not name.endswith(UNUSED_BY_FLOATS)]
    if not matrices:
        raise ConversionError("config.json says that the weights are quantised, and none of the tensors is.")
    for name in rest:
        if name in matrices:
            raise ConversionError(f"{name} is there both quantised and plain; which one counts is unclear.")
        if checkpoint.tensors[name].dtype not in PLAIN:
            raise ConversionError(f"{name} is {checkpoint.tensors[name].dtype} and nothing says what its numbers mean.")
    return matrices, rest


def _write_tensors(
    checkpoint: Checkpoint,
    matrices: dict[str, Matrix],
    kept: list[str],
    turn: Callable,
    dtype: torch.dtype,
    folder: Path,
    progress: bool,
) -> dict[str, tuple[int, ...]]:
    """Writes the shards and their index; returns the shapes of all tensors."""
    # in the order of the files, so that each is read once
    places = {name: name for name in kept} | {name: matrix.parts["weight"] for name, matrix in matrices.items()}
    order = {name: number for number, name in enumerate(checkpoint.tensors)}
    metadata = {key: text for shard in checkpoint.shards.values() for key, text in shard.metadata.items()}
    shapes = {}
    with (
        _shards(folder, {**metadata, "format": "pt"}) as add,
        tqdm(total=len(places), desc="dequantising", unit="tensor", disable=None if progress else True) as bar,
    ):
        for name in sorted(places, key=lambda name: order[places[name]]):
            if name in matrices:
                parts = {role: _read(checkpoint, part) for role, part in matrices[name].parts.items()}
                with understood(f"{name} can't be dequantised", kind=ConversionError), torch.inference_mode():
                    tensor = turn(parts, dtype=dtype).to(dtype).contiguous()
            else:
                tensor = _read(checkpoint, name)
            shapes[name] = tuple(tensor.shape)
            add(name, tensor)
            bar.update()
    return shapes


@contextmanager
def _shards(folder: Path, metadata: dict[str, str]) -> Iterator[Callable[[str, torch.Tensor], None]]:
    """Takes tensors, and writes a shard whenever they reach SHARD_SIZE and, at the end, the index."""
    waiting, names, total = {}, [], {"total_size": 0, "total_parameters": 0}

    def flush():
        save_file(waiting, folder / f"{len(names)}.part", metadata)
        names.append(list(waiting))
        waiting.clear()

    def add(name: str, tensor: torch.Tensor):
        if waiting and sum(other.nbytes for other in waiting.values()) + tensor.nbytes > SHARD_SIZE:
            flush()
        waiting[name] = tensor
        total["total_size"] += tensor.nbytes
        total["total_parameters"] += tensor.numel()

    yield add
    flush()
    count, weight_map = len(names), {}
    for number, tensors in enumerate(names):
        name = SINGLE_SHARD_NAME if count == 1 else f"model-{number + 1:05}-of-{count:05}.safetensors"
        os.rename(folder / f"{number}.part", folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    if count > 1:
        write_json(folder / INDEX_NAME, {"metadata": total, "weight_map": weight_map})


def _read(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """A tensor, read into memory of its own; a file that is mapped would stay in memory as a whole."""
    shard, info = checkpoint.shards[checkpoint.file_of(name)], checkpoint.tensors[name]
    if info.dtype not in TORCH_DTYPES:
        raise ConversionError(f"{name} is {info.dtype}, which isn't read.")
    data = bytearray(info.end - info.start)
    with open(shard.path, "rb", buffering=0) as file:
        file.seek(shard.data_start + info.start)
        view, done = memoryview(data), 0
        while done < len(data):
            if not (count := file.readinto(view[done:])):
                raise ConversionError(f"{shard.path.name} became shorter while it was read.")
            done += count
    flat = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(TORCH_DTYPES[info.dtype]).reshape(info.shape)


def _write_rest(source: Source, checkpoint: Checkpoint, shapes: dict, folder: Path, dtype: str) -> list[str]:
    """Writes all but the weights; returns warnings."""
    companions, warnings = plan_companions(checkpoint)
    content, more = local_code(checkpoint.config, companions, CONFIG_NAME)
    content = {name: value for name, value in content.items() if name not in ("quantization_config", "torch_dtype")}
    content["dtype"] = dtype
    family, model_class = _family(content)
    config_class = model_class.config_class
    config = build_config(config_class, content)
    check_layers(config.num_hidden_layers, checkpoint.tensors)
    more += check_tensors(build_model(model_class, config), shapes, num_mtp_layers(content))
    copy_companions(companions, source.folder, folder)
    if config_class is family.config_class:
        for file in config_class.hub_files():
            copy_file(file, folder / file.name)
    if is_regular(source.folder / CARD_NAME):
        copy_file(source.folder / CARD_NAME, folder / DONOR_CARD_NAME)
    write_json(folder / CONFIG_NAME, content)
    return [*warnings, *more]


def _finish(source: Source, folder: Path, dst: Path, revision: str | None, warnings: list[str]) -> DequantizationResult:
    """Writes `results.json` and the card."""
    make_readable(folder)
    made, title = source.dequantized, one_line(dst.name)
    words = ["attnres-convert", "--dequantize", made["dtype"], source.name, title]
    if made.get("file", source.name) != source.name:
        words += ["--gguf-file", made["file"]]
    words += ["--revision", revision] if revision else []
    results = {"command": shlex.join(words), "base": source.name, "revision": source.commit, "dequantized": made}
    write_json(folder / RESULTS_NAME, {**results, "versions": versions()})
    if is_regular(folder / CARD_NAME):
        os.rename(folder / CARD_NAME, folder / DONOR_CARD_NAME)
    metadata = inherit(source.metadata, source.name if source.is_hub else None, is_trained=False)
    write_card(folder, folder_card(folder, title, metadata))
    return DequantizationResult(
        path=dst,
        quantization=made["quantization"],
        dtype=made["dtype"],
        num_parameters=read_checkpoint(folder).num_parameters,
        warnings=tuple(warnings),
    )


def _numel(checkpoint: Checkpoint, name: str) -> int:
    return math.prod(checkpoint.tensors[name].shape)


def _find_mxfp4(checkpoint: Checkpoint) -> dict[str, Matrix]:
    found = {}
    for name in checkpoint.tensors:
        scales = f"{name.removesuffix('_blocks')}_scales"
        if name.endswith("_blocks") and scales in checkpoint.tensors:
            parts = {"weight": name, "scales": scales}
            found[name.removesuffix("_blocks")] = Matrix(parts, 2 * _numel(checkpoint, name))
    return found


def _turn_mxfp4(parts: dict[str, torch.Tensor], dtype: torch.dtype, config: dict) -> torch.Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = parts["weight"], parts["scales"]
    if blocks.dim() != 4 or blocks.shape[:-1] != scales.shape:
        raise ValueError(f"its blocks are {list(blocks.shape)} and its scales {list(scales.shape)}")
    return convert_moe_packed_tensors(blocks, scales, dtype=dtype, rows_per_chunk=ROWS_AT_ONCE)


def _find_fp8(checkpoint: Checkpoint) -> dict[str, Matrix]:
    found = {}
    for name in checkpoint.tensors:
        weight = name.removesuffix(SCALE)
        if name.endswith(SCALE) and weight in checkpoint.tensors:
            found[weight] = Matrix({"weight": weight, "scales": name}, _numel(checkpoint, weight))
    return found


def _turn_fp8(parts: dict[str, torch.Tensor], dtype: torch.dtype, config: dict) -> torch.Tensor:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    weight, scales = parts["weight"], parts["scales"]
    shape, block = weight.shape, config.get("weight_block_size")
    if block and scales.dim() > 1:
        # transformers finds the size of a block by division, which the last ones, cut off, would make wrong
        missing = [size * count - length for size, count, length in zip(block, scales.shape[-2:], shape[-2:])]
        if not all(0 <= number < size for number, size in zip(missing, block)):
            raise ValueError(f"{list(scales.shape)} scales don't fit {list(shape)} weights in blocks of {block}")
        if any(missing):
            weight = pad(weight.float(), (0, missing[1], 0, missing[0]))
    found = Fp8Dequantize(None).convert({"matrix": weight, f"matrix{SCALE}": scales.float()})["matrix"][0]
    return found[..., : shape[-2], : shape[-1]]


def _find_4bit(checkpoint: Checkpoint) -> dict[str, Matrix]:
    found = {}
    for name in checkpoint.tensors:
        weight, state, _ = name.partition(".quant_state.bitsandbytes__")
        if state and weight in checkpoint.tensors:
            parts = [other for other in checkpoint.tensors if other.startswith(f"{weight}.")]
            roles = {other.removeprefix(f"{weight}."): other for other in parts}
            found[weight] = Matrix({"weight": weight, **roles}, 2 * _numel(checkpoint, weight))
    return found


def _turn_4bit(parts: dict[str, torch.Tensor], dtype: torch.dtype, config: dict) -> torch.Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    weight = parts.pop("weight")
    state = QuantState.from_dict(parts, torch.device("cpu"))
    count, levels = math.prod(state.shape), [(state, 16)]
    if state.nested:
        levels.append((state.state2, 256))
    # bitsandbytes believes what it is told about the sizes of what it reads
    for level, codes in levels:
        if level.blocksize < 1 or -(-count // level.blocksize) != level.absmax.numel() or level.code.numel() != codes:
            raise ValueError("its scales don't fit its size")
        count = level.absmax.numel()
    if weight.dtype != torch.uint8 or -(-math.prod(state.shape) // 2) != weight.numel():
        raise ValueError(f"it is stored as {list(weight.shape)} bytes where its shape is {list(state.shape)}")
    state.dtype = dtype
    return dequantize_4bit(weight, state).reshape(state.shape)


def _find_8bit(checkpoint: Checkpoint) -> dict[str, Matrix]:
    found = {}
    for name in checkpoint.tensors:
        stem = name.removesuffix("SCB")
        if name.endswith(".SCB") and f"{stem}weight" in checkpoint.tensors:
            parts = {"weight": f"{stem}weight", "scales": name}
            if f"{stem}weight_format" in checkpoint.tensors:
                parts["format"] = f"{stem}weight_format"
            found[f"{stem}weight"] = Matrix(parts, _numel(checkpoint, f"{stem}weight"))
    return found


def _turn_8bit(parts: dict[str, torch.Tensor], dtype: torch.dtype, config: dict) -> torch.Tensor:
    from bitsandbytes.functional import int8_vectorwise_dequant

    weight, scales = parts["weight"], parts["scales"]
    if weight.dtype != torch.int8 or weight.dim() != 2 or scales.shape != weight.shape[:1]:
        raise ValueError(f"its {list(scales.shape)} scales don't fit {list(weight.shape)} weights")
    if "format" in parts and parts["format"].any():
        raise ValueError("its rows are in an order of one graphics card; save it again with bitsandbytes")
    return int8_vectorwise_dequant(weight, scales.float())


@dataclass(frozen=True)
class Method:
    """How quantised tensors are found among the names of a checkpoint, and one of them is turned into floats."""

    find: Callable[[Checkpoint], dict[str, Matrix]]
    turn: Callable[..., torch.Tensor]


METHODS = {
    "mxfp4": Method(_find_mxfp4, _turn_mxfp4),
    "fp8": Method(_find_fp8, _turn_fp8),
    "bitsandbytes_4bit": Method(_find_4bit, _turn_4bit),
    "bitsandbytes_8bit": Method(_find_8bit, _turn_8bit),
}
