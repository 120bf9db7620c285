# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Folders that appear complete or not at all, whatever happens to the process that makes them."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checkpoint import CONFIG_NAME, ConversionError


try:
    import fcntl
except ImportError:  # Windows: what killed runs leave then stays
    fcntl = None


def check_destination(dst: Path, force: bool) -> None:
    """Restores or removes what killed runs left beside `dst`, then checks that `dst` may be written.

    Raises:
        ConversionError: `dst` exists and can't be replaced.
    """
    recover(dst)
    if not os.path.lexists(dst):
        return
    if dst.is_symlink() or not dst.is_dir():
        raise ConversionError(f"{dst} exists and is not a folder.")
    if not force:
        raise ConversionError(f"{dst} exists; use --force to replace it.")
    if any(dst.iterdir()) and not (dst / CONFIG_NAME).is_file():
        raise ConversionError(f"{dst} exists and is no model folder, so even --force doesn't replace it.")


@contextmanager
def staged(dst: Path, force: bool = False) -> Iterator[Path]:
    """A new folder beside `dst` that becomes `dst` when the block ends, and is removed if the block raises.

    A killed process leaves it behind under a hidden name; the next call of [`recover`] removes it.
    """
    created = [parent for parent in dst.parents if not parent.exists()]
    dst.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = _new_folder(dst)
    try:
        yield folder
        _publish(folder, dst, force)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            with suppress(OSError):  # another process uses it
                parent.rmdir()
        raise
    finally:
        if lock is not None:
            os.close(lock)


def recover(dst: Path) -> None:
    """Finishes what killed runs for `dst` left: a folder that was being replaced comes back, half-made ones go."""
    for old in _siblings(dst, "old"):
        with _locked(old) as is_mine:
            if is_mine and not os.path.lexists(dst):
                os.rename(old, dst)
            elif is_mine:
                shutil.rmtree(old)
    for folder in _siblings(dst, "tmp"):
        with _locked(folder) as is_mine:
            if is_mine:
                shutil.rmtree(folder)


def _publish(folder: Path, dst: Path, force: bool) -> None:
    check_destination(dst, force)
    if not dst.exists():
        os.rename(folder, dst)
        return
    old = _sibling(dst, "old")
    with _locked(dst):  # so that no other run takes the old folder for a leftover
        os.rename(dst, old)
        try:
            os.rename(folder, dst)
        except BaseException:
            os.rename(old, dst)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _sibling(dst: Path, kind: str) -> Path:
    return dst.with_name(f".{dst.name}.attnres-{kind}-{secrets.token_hex(4)}")


def _siblings(dst: Path, kind: str) -> list[Path]:
    if not dst.parent.is_dir():
        return []
    return [path for path in dst.parent.iterdir() if path.name.startswith(f".{dst.name}.attnres-{kind}-")]


def _new_folder(dst: Path) -> tuple[Path, int | None]:
    for _ in range(3):  # another run may take the new folder for a leftover before it is locked
        folder = _sibling(dst, "tmp")
        folder.mkdir()
        if (lock := _lock(folder)) is not None:
            break
    folder.mkdir(exist_ok=True)  # a file system without locks
    return folder, lock


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether the folder could be locked, so that no living process works on it: a lock dies with its process."""
    lock = _lock(folder)
    try:
        yield lock is not None
    finally:
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # else it was removed in the meantime
            return descriptor
    os.close(descriptor)
    return None
