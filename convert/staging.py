# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What is written appears whole or not at all, and nothing that somebody else put there is lost: the one place that
replaces and removes files and folders.

What isn't whole yet lies in a work folder, hidden beside its destination. Only a work folder that bears our mark is
ever removed: a real folder of this user, marked with its own inode, that of the folder it is in and the name of its
destination, which neither a link, a copy nor the content of an archive has.
"""

import filecmp
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checkpoint import CONFIG_NAME, INDEX_NAME, SINGLE_SHARD_NAME, ConversionError
from .reading import TEMPLATE_FOLDER, InputError, is_own_code, is_regular, read_json, typed


try:
    import fcntl
except ImportError:  # Windows: what killed runs leave then stays
    fcntl = None


VERSION_CONTROL = {".git", ".hg", ".svn", ".jj", ".bzr", "CVS"}
JUNK = {".DS_Store", "Thumbs.db", "desktop.ini"}  # of file managers, which make it again
IGNORED = VERSION_CONTROL | JUNK | {".gitignore", ".gitattributes", ".gitmodules", ".gitkeep", ".keep", ".hgignore"}
IGNORED |= {"lost+found"}  # of a file system
MARK = "attnres.json"
HALF_MARK = re.compile(rf"\.{re.escape(MARK)}\.attnres-tmp-[0-9a-f]{{8}}")
PARTIAL = re.compile(r"\..+\.attnres-tmp-[0-9a-f]{8}")


def foreign(folder: Path) -> str | None:
    """The first name in a folder that is neither a version control's nor otherwise to be ignored."""
    names = (path.name for path in folder.iterdir() if path.name not in IGNORED)
    return min((name for name in names if not PARTIAL.fullmatch(name)), default=None)


@contextmanager
def made(folder: Path) -> Iterator[list[Path]]:
    """Makes a folder and those above it, and, if the block fails, takes away those that it has made and are empty.

    Returns:
        Those that it has made, innermost first.
    """
    new = []
    try:
        for path in reversed((folder, *folder.parents)):
            if not os.path.lexists(path):
                path.mkdir()
                new.insert(0, path)
        yield new
    except BaseException:
        remove_empty(new)
        raise


def remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it isn't empty, or another process was faster
            folder.rmdir()


def set_aside(path: Path, kind: str = "kept") -> Path:
    """Gives what is in the way another name, such as `model.kept-1`, and returns it."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.{kind}-{number}")):
        number += 1
    os.rename(path, aside)
    return aside


def entries(folder: Path) -> dict[str, Path] | None:
    """The files of a folder by relative name, links to this project's code among them, or `None` if it has anything
    else that is no file in a folder of files, such as an empty folder in it."""
    found = {}
    if folder.is_symlink() or not folder.is_dir():
        return None
    for parent, folders, files in os.walk(folder):
        if any(Path(parent, name).is_symlink() for name in folders):
            return None
        if not folders and not files and Path(parent) != folder:
            return None
        for name in files:
            path = Path(parent, name)
            if not stat.S_ISREG(path.lstat().st_mode) and not is_own_code(path):
                return None
            found[path.relative_to(folder).as_posix()] = path
    return found


def has_all_of(folder: Path, other: Path) -> bool:
    """Whether `folder` holds all that `other` holds, byte for byte, so that nothing is lost with `other`."""
    files = entries(other)
    return files is not None and all(
        is_regular(folder / name) and filecmp.cmp(path, folder / name, shallow=False) for name, path in files.items()
    )


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
    if os.path.ismount(dst):
        raise ConversionError(f"{dst} is a mount point, which can't be replaced; choose a folder in it.")
    names = {path.name for path in dst.iterdir()} - JUNK
    if names and not (dst / CONFIG_NAME).is_file():
        raise ConversionError(f"{dst} exists and is no model folder, so even --force doesn't replace it.")
    for name in sorted(names):
        if name.startswith(".") or (dst / name).is_dir() and name != TEMPLATE_FOLDER:
            raise ConversionError(f"{dst} holds {name}, which would be lost; move it away.")


def check_only_replaces(dst: Path, new: Path) -> None:
    """
    Raises:
        ConversionError: `dst` has a file that is neither one of its weights nor there under the same name in `new`.
    """
    files, weights = entries(dst), {SINGLE_SHARD_NAME, INDEX_NAME}
    if files is None:
        raise ConversionError(f"{dst} holds links, empty folders or special files, which would be lost; move it away.")
    if INDEX_NAME in files:
        index = read_json(dst / INDEX_NAME)
        weights |= set(map(str, (typed(index, "weight_map", dict, INDEX_NAME) or {}).values()))
    for name in sorted(files.keys() - JUNK - weights):
        if not (new / name).is_file():
            raise ConversionError(f"{dst} holds {name}, which would be lost; move it away.")


@contextmanager
def staged(dst: Path, force: bool = False, check: Callable[[Path, Path], None] | None = None) -> Iterator[Path]:
    """A new folder that becomes `dst` when the block ends, and is removed if the block raises.

    A killed process leaves its work folder behind; the next call of [`recover`] removes it.

    Args:
        force: replace a model folder that is there.
        check: of the folder that is there and the new one, in place of the checks of a model folder; raises to keep it.
    """
    with made(dst.parent), _work(dst) as work:
        new = work / "new"
        new.mkdir()
        yield new
        if check is None:
            check_destination(dst, force)
        if os.path.lexists(dst):
            (check or check_only_replaces)(dst, new)
            os.rename(dst, work / "old")  # comes back if the next line fails
        os.rename(new, dst)


@contextmanager
def scratch(dst: Path) -> Iterator[Path]:
    """A hidden folder beside `dst` for what is needed until the block ends; [`recover`] removes a killed run's."""
    with made(dst.parent), _work(dst) as work:
        yield work


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A name for a file that takes the place of `path` when the block ends, and goes if the block raises."""
    recover(path)
    with _work(path) as work:
        yield work / "new"
        os.replace(work / "new", path)


def recover(dst: Path) -> None:
    """Finishes what killed runs for `dst` left: a folder that was being replaced comes back, half-made ones go."""
    if not dst.parent.is_dir():
        return
    for work in list(dst.parent.iterdir()):
        if not work.name.startswith(f".{dst.name}.attnres-tmp-") or not PARTIAL.fullmatch(work.name):
            continue
        with _locked(work) as is_mine:
            if is_mine and is_marked(work, dst):
                _restore(work, dst)
                clear(work)


def mark(work: Path, dst: Path) -> None:
    """Marks a work folder as ours; the mark appears whole."""
    partial = work / f".{MARK}.attnres-tmp-{secrets.token_hex(4)}"
    partial.write_text(json.dumps(_mark_of(work, dst)), encoding="utf-8")
    os.replace(partial, work / MARK)


def is_marked(work: Path, dst: Path, exactly: bool = True) -> bool:
    """Whether a work folder was made for `dst`; also one whose process was killed before it had marked it.

    Args:
        exactly: not a copy of it.
    """
    try:
        found, names = os.lstat(work), os.listdir(work)
        if not stat.S_ISDIR(found.st_mode) or hasattr(os, "getuid") and found.st_uid != os.getuid():
            return False
        if not names:
            return True
        if len(names) == 1 and HALF_MARK.fullmatch(names[0]) and stat.S_ISREG(os.lstat(work / names[0]).st_mode):
            return json.dumps(_mark_of(work, dst)).startswith((work / names[0]).read_text(encoding="utf-8"))
        found = os.lstat(work / MARK)
        if not stat.S_ISREG(found.st_mode):
            return False
        content, expected = read_json(work / MARK), _mark_of(work, dst)
        return content == expected if exactly else content.get("for") == expected["for"]
    except (OSError, ValueError, InputError):
        return False


def clear(work: Path) -> None:
    """Removes a work folder, its mark last."""
    with suppress(FileNotFoundError):  # so that half of it never comes back
        os.rename(work / "old", work / f"trash-{secrets.token_hex(4)}")
    for path in list(work.iterdir()):
        if path.name == MARK:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    (work / MARK).unlink(missing_ok=True)
    work.rmdir()


def _restore(work: Path, dst: Path) -> None:
    if os.path.lexists(work / "old") and not os.path.lexists(dst):
        os.rename(work / "old", dst)


def _mark_of(work: Path, dst: Path) -> dict:
    return {"for": dst.name, "in": os.stat(dst.parent).st_ino, "inode": os.lstat(work).st_ino}


@contextmanager
def _work(dst: Path) -> Iterator[Path]:
    work, lock = _new_work(dst)
    try:
        mark(work, dst)
        yield work
    finally:
        with suppress(OSError):
            _restore(work, dst)
            clear(work)
        if lock is not None:
            os.close(lock)


def _new_work(dst: Path) -> tuple[Path, int | None]:
    for _ in range(3):  # another run may take it for a leftover before it is locked
        work = dst.with_name(f".{dst.name}.attnres-tmp-{secrets.token_hex(4)}")
        work.mkdir()
        if (lock := _lock(work)) is not None:
            break
        remove_empty([work])
    work.mkdir(exist_ok=True)  # a file system without locks
    return work, lock


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
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:  # it is gone, or is no folder
        return None
    with suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(descriptor), os.stat(folder)):  # else it was removed in the meantime
            return descriptor
    os.close(descriptor)
    return None
