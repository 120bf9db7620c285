# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Writing a checkpoint's files: shards copied, linked or rewritten in pieces, and the index."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from .checkpoint import SINGLE_SHARD_NAME, Checkpoint, ConversionError, Shard
from .reading import open_regular


# A single file can't keep its name beside another shard: transformers would load it and nothing else
FIRST_OF_TWO = "model-00001-of-00002.safetensors"
CHUNK = 16 * 2**20
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_shards(
    checkpoint: Checkpoint, names: dict[str, str], removed: set[str], folder: Path, link: bool | None, progress: bool
) -> None:
    """Writes the shards `names` (old name to new name) of a checkpoint into `folder`.

    Args:
        removed: names of tensors to leave out; only the shards that hold one are rewritten.
        link: hard-link the other shards instead of copying them; `None`: where the file system can.
    """
    shards = {new: checkpoint.shards[old] for old, new in names.items()}
    total = sum(shard.size for shard in shards.values() if not link or removed & shard.tensors.keys())
    with tqdm(
        total=total, desc="copying weights", unit="B", unit_scale=True, disable=None if progress else True
    ) as bar:
        for name, shard in shards.items():
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if removed & shard.tensors.keys():
                _write_without(shard, removed, target, bar.update)
            elif link:
                _link(shard.path, target)
            elif link is not None or not _is_linked(shard.path, target):
                with _open(shard.path) as source, open(target, "xb", buffering=0) as file:
                    _copy(source, file, shard.size, bar.update)


def check_space(folder: Path, needed: int, what: str = "", advice: str = "") -> None:
    """
    Args:
        needed: bytes, on the file system of `folder` or of its nearest parent.
        what, advice: what is written, and what helps, for the message.

    Raises:
        ConversionError: they aren't free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ConversionError(
            f"not enough disk space in {folder}: {needed / 1e9:.2f} GB are needed{what and f' ({what})'} and "
            f"{free / 1e9:.2f} GB are free{advice and f'; {advice}'}."
        )


def new_index(
    checkpoint: Checkpoint, names: dict[str, str], removed: set[str], weights: dict[str, str], change: dict[str, int]
) -> dict:
    """The index of the written shards.

    Args:
        names: old shard name to new shard name.
        removed: names of tensors that are left out.
        weights: the new tensors and their files; other tensors stay where they were, if their shard is in `names`.
        change: by how much `total_size` (bytes) and `total_parameters` grow.
    """
    if checkpoint.index is not None:
        old_map = checkpoint.index["weight_map"]
        metadata = checkpoint.index.get("metadata")
    else:
        old_map = dict.fromkeys(checkpoint.tensors, SINGLE_SHARD_NAME)
        metadata = None
    sizes = {"total_size": checkpoint.num_bytes, "total_parameters": checkpoint.num_parameters}
    metadata = dict(metadata) if isinstance(metadata, dict) else {"total_size": checkpoint.num_bytes}
    for key in metadata.keys() & change.keys():
        metadata[key] = (metadata[key] if type(metadata[key]) is int else sizes[key]) + change[key]
    kept = {tensor: names[name] for tensor, name in old_map.items() if name in names and tensor not in removed}
    return {"metadata": metadata, "weight_map": kept | weights}


def _open(path: Path) -> BinaryIO:
    return open(path, "rb", buffering=0)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno == errno.EXDEV:
            reason = "SRC and DST are on different file systems"
        else:
            reason = f"hard links fail here ({error.strerror})"
        raise ConversionError(f"{reason}; leave out --link to copy the weights.") from None


def _is_linked(source: Path, target: Path) -> bool:
    try:
        os.link(source, target)
    except OSError:
        return False
    return True


def _copy(source: BinaryIO, target: BinaryIO, count: int, advance: Callable[[int], object]) -> None:
    while count:
        done = _copy_chunk(source, target, min(count, CHUNK))
        if not done:
            raise ConversionError(f"{source.name} became shorter while it was copied.")
        count -= done
        advance(done)


def _copy_chunk(source: BinaryIO, target: BinaryIO, count: int) -> int:
    try:
        if done := os.copy_file_range(source.fileno(), target.fileno(), count):
            return done
    except AttributeError:  # not on this system
        pass
    except OSError as error:  # or not between these file systems
        if error.errno in FULL:
            raise
    data = source.read(count)
    write_all(target, data)
    return len(data)


def write_all(file: BinaryIO, data: bytes) -> None:
    """Without a buffer a write may take a part only, such as what still fits on a disk."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def copy_file(source: Path, target: Path) -> None:
    """Copies a small file.

    Raises:
        InputError: it is no regular file.
    """
    with open_regular(source) as file, open(target, "wb") as copy:
        shutil.copyfileobj(file, copy)


def _write_without(shard: Shard, removed: set[str], target: Path, advance: Callable[[int], object]) -> None:
    kept = sorted(
        ((name, tensor) for name, tensor in shard.tensors.items() if name not in removed), key=lambda x: x[1].start
    )
    header, offset = {"__metadata__": shard.metadata or {"format": "pt"}}, 0
    for name, tensor in kept:
        size = tensor.end - tensor.start
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with _open(shard.path) as source, open(target, "xb", buffering=0) as file:
        write_all(file, len(text).to_bytes(8, "little") + text)
        for _, tensor in kept:
            source.seek(shard.data_start + tensor.start)
            _copy(source, file, tensor.end - tensor.start, advance)
