# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders: what they hold, read from headers only, and whether it is sound."""

import errno
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path, PurePosixPath

from .reading import (
    ADAPTER_NAME,
    CONFIG_NAME,
    TEMPLATE_FOLDER,
    InputError,
    check_inside,
    is_regular,
    kind_of,
    model_entries,
    open_regular,
    parse_json,
    read_config,
    read_json,
)


INDEX_NAME = "model.safetensors.index.json"
SINGLE_SHARD_NAME = "model.safetensors"
MAX_HEADER_SIZE = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # torch's own limit
MAX_SIZE = 2**63
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.bin.index.json")

LICENCES = ("license*", "licence*", "notice*", "copying*", "use_policy*")

# What comes along with the weights; compared in lower case. Optimizer states, logs and other formats stay behind.
COMPANIONS = (
    "*.json",
    "*.jinja",
    "*.txt",
    "*.md",
    "*.py",
    "*.model",
    "*.tiktoken",
    "*.spm",
    "*.bpe",
    "*.vocab",
    *LICENCES,
    f"{TEMPLATE_FOLDER}/*",
)
NOT_COMPANIONS = (CONFIG_NAME, "*.index.json", "trainer_state.json", ADAPTER_NAME)


class ConversionError(InputError):
    """A conversion is impossible or went wrong. The message says what to do, in one line."""


@contextmanager
def clear_errors(target: str | os.PathLike) -> Iterator[None]:
    """What the input or the system cause is a ConversionError.

    Args:
        target: what is being written.
    """
    try:
        yield
    except ConversionError:
        raise
    except InputError as error:
        raise ConversionError(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ConversionError(f"no space left for {target}; free some, or write it elsewhere.") from None
        raise ConversionError(str(error)) from error
    except MemoryError:
        raise ConversionError("there is not enough free memory for this.") from None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor in a shard: `start` and `end` are byte offsets in the data behind the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file. `path` has its symbolic links resolved; `size` and `data_start` are in bytes."""

    path: Path
    size: int
    data_start: int
    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """A model folder. `shards` goes by file name; `index` is the content of the index file, `None` without one."""

    folder: Path
    config: dict
    shards: dict[str, Shard]
    index: dict | None

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        return {name: tensor for shard in self.shards.values() for name, tensor in shard.tensors.items()}

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return self.num_bytes_of(self.tensors)

    def num_bytes_of(self, names: Iterable[str]) -> int:
        return sum(self.tensors[name].end - self.tensors[name].start for name in names)

    def file_of(self, tensor: str) -> str:
        return next(name for name, shard in self.shards.items() if tensor in shard.tensors)

    def companions(self) -> list[str]:
        """Relative names of the tokenizer, chat template, licence and other small files.

        Raises:
            InputError: one is a link that leaves the folder.
        """
        files = (path for path in model_entries(self.folder) if not path.is_dir())
        names = sorted(path.relative_to(self.folder).as_posix() for path in files)
        names = [name for name in names if is_companion(name) and name not in self.shards]
        for name in names:
            check_inside(self.folder, self.folder / name)
        return names


def is_companion(name: str) -> bool:
    def matches(patterns):
        return any(fnmatch(name.lower(), pattern) for pattern in patterns)

    return matches(COMPANIONS) and not matches(NOT_COMPANIONS) and not name.startswith(".")


def read_shard(path: Path) -> Shard:
    """Reads and checks the header of a safetensors file; none of its tensors is read.

    Not with the safetensors library, which maps the whole file and so fails for files beyond the size of the memory.
    """
    with open_regular(path) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(size - 8, MAX_HEADER_SIZE):
                raise ValueError(f"it has no room for its header of {length} bytes")
            header = parse_json(file.read(length).decode("utf-8"), "its header", unique=True)
            if not isinstance(header, dict):
                raise ValueError(f"its header is {kind_of(header)}")
            metadata = header.pop("__metadata__", None) or {}
            if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
                raise ValueError("its __metadata__ are no texts with names")
            tensors = {name: _tensor(name, info) for name, info in header.items()}
            _check_layout(tensors, size - 8 - length)
        except ValueError as error:
            raise ConversionError(
                f"{path.name} is damaged ({error}); if it was downloaded or copied, get it again."
            ) from None
    return Shard(path.resolve(), size, 8 + length, tensors, metadata)


def _tensor(name: str, info) -> TensorInfo:
    """Raises a ValueError unless `info` is of the format."""
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{name} isn't described by dtype, shape and data_offsets")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{name} has the unknown dtype {dtype}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not isinstance(offsets, list) or len(offsets) != 2:
        raise ValueError(f"{name} has no shape of at most {MAX_DIMENSIONS} sizes, or not two offsets")
    if any(type(size) is not int or not 0 <= size < MAX_SIZE for size in (*shape, *offsets)):
        raise ValueError(f"{name} has a shape or offset that is no size")
    if math.prod(size or 1 for size in shape) >= MAX_SIZE:
        raise ValueError(f"{name} has more elements than fit anywhere")
    return TensorInfo(dtype, tuple(shape), *offsets)


def _check_layout(tensors: dict[str, TensorInfo], data_size: int) -> None:
    """Raises a ValueError unless the tensors are as large as their shapes and fill the data without gap or overlap."""
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if (
            tensor.start != position
            or (tensor.end - position) * 8 != math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype]
        ):
            raise ValueError(f"{name} isn't where its header says")
        position = tensor.end
    if position != data_size:
        raise ValueError(f"it has {data_size} bytes of data where its header says {position}")


def read_index(folder: Path) -> dict | None:
    """The index of the files that transformers would load; `None` if it is a single one, which it prefers to an index.

    Raises:
        InputError: there are no safetensors, or the index is broken or names files outside the folder.
    """
    if is_regular(folder / SINGLE_SHARD_NAME):
        return None
    if os.path.lexists(folder / INDEX_NAME):
        index = read_json(folder / INDEX_NAME)
        _check_weight_map(index.get("weight_map"))
        return index
    raise ConversionError(_no_weights(folder))


def shard_names(index: dict | None) -> list[str]:
    return [SINGLE_SHARD_NAME] if index is None else sorted(set(index["weight_map"].values()))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Reads a model folder's configuration, index and shard headers.

    Raises:
        InputError: something is missing, broken or contradictory, or a link leaves the folder.
    """
    config = read_config(folder)
    index = read_index(folder)
    names = shard_names(index)
    if missing := [name for name in names if not os.path.lexists(folder / name)]:
        raise ConversionError(f"{INDEX_NAME} names {some(missing)}, which {folder} doesn't have.")
    for name in [CONFIG_NAME, *([INDEX_NAME] if index else []), *names]:
        check_inside(folder, folder / name)
    checkpoint = Checkpoint(folder, config, {name: read_shard(folder / name) for name in names}, index)
    if not checkpoint.tensors:
        raise ConversionError(f"{folder} holds no tensors.")
    if len(checkpoint.tensors) < sum(len(shard.tensors) for shard in checkpoint.shards.values()):
        raise ConversionError(f"some tensors are in two shards of {folder}; which one counts is unclear.")
    for tensor, name in (index["weight_map"] if index else {}).items():
        if tensor not in checkpoint.shards[name].tensors:
            raise ConversionError(f"{INDEX_NAME} says that {name} holds {tensor}, but it doesn't.")
    return checkpoint


def is_inside(name: str) -> bool:
    """Whether this can be the relative name of a file in a folder or repository, and of none outside it."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not (name.startswith("/") or ".." in parts or "\\" in name or ":" in name or "\0" in name)


def _check_weight_map(weight_map) -> None:
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(x, str) for x in weight_map.values()):
        raise ConversionError(f"{INDEX_NAME} has no weight_map from tensors to files.")
    for name in set(weight_map.values()):
        if not is_inside(name):
            raise ConversionError(f"{INDEX_NAME} names {name!r}, which is outside the folder.")
        if not name.endswith(".safetensors"):
            raise ConversionError(f"{INDEX_NAME} names {name!r}, which is not a safetensors file.")


def _no_weights(folder: Path) -> str:
    text = f"{folder} has neither {SINGLE_SHARD_NAME} nor {INDEX_NAME}"
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        return (
            f"{text}, only pickle files. Load it with transformers and write it with "
            "model.save_pretrained(NEW_FOLDER), which makes safetensors; then convert that folder."
        )
    return f"{text}."


def some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
