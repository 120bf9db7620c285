# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint comes from: a folder, or a repository of the Hub."""

import glob
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .checkpoint import (
    COMPANIONS,
    INDEX_NAME,
    LICENCES,
    SINGLE_SHARD_NAME,
    ConversionError,
    read_index,
    shard_names,
    some,
)
from .code_references import check_implementations
from .gguf_file import SUFFIX, check_name, gguf_names, in_folder, is_gguf
from .reading import (
    ADAPTER_NAME,
    CARD_NAME,
    CONFIG_NAME,
    check_folder,
    check_inside,
    is_regular,
    one_line,
    read_config,
    reason,
)


@dataclass(frozen=True)
class Source:
    """`name` is fit to be published: a Hub id or the last part of a path. `commit` is `None` for a folder.

    `dequantized` says from what the floats of the folder were made, for `results.json`, and `metadata` are those of the
    card that isn't in the folder; both are `None` for a checkpoint as it was found.
    """

    folder: Path
    name: str
    commit: str | None = None
    dequantized: dict[str, str] | None = None
    metadata: dict | None = None

    @property
    def is_hub(self) -> bool:
        return self.commit is not None


@dataclass(frozen=True)
class GgufSource:
    """A GGUF file. `file` is its name in `folder`, which has the card and the licence that go with it; a file that was
    given alone has none, and is itself what `name` says."""

    path: Path
    name: str
    file: str
    commit: str | None = None
    folder: Path | None = None


def find_gguf(src: str | Path, revision: str | None, gguf_file: str | None) -> GgufSource | None:
    """The GGUF file that `src` is or holds, `None` if it is another checkpoint.

    Args:
        gguf_file: its name in the folder or repository; not needed for the only one in a folder without another model.

    Raises:
        InputError: there is none of this name, several without one, or the repository can't be read.
    """
    path = Path(src).expanduser()
    if os.path.lexists(path):
        found = _local_gguf(path, gguf_file)
        if found is not None and revision is not None:
            raise ConversionError(f"a revision needs a Hub id, but {src} is on this machine.")
        return found
    if gguf_file is None:
        if path.suffix.lower() == SUFFIX:
            raise ConversionError(f"there is no file {src}.")
        return None
    check_name(gguf_file)
    _check_repo_id(str(src))
    folder = _download(str(src), revision, [glob.escape(gguf_file), CARD_NAME, *LICENCES])
    return GgufSource(in_folder(folder, gguf_file), str(src), one_line(gguf_file), folder.name, folder)


def _local_gguf(path: Path, gguf_file: str | None) -> GgufSource | None:
    if not path.is_dir():
        if gguf_file is not None:
            raise ConversionError(f"{path} is a file itself; leave out --gguf-file.")
        return GgufSource(path, one_line(path.name), one_line(path.name)) if is_gguf(path) else None
    names = gguf_names(path) if gguf_file is None else [gguf_file]
    if gguf_file is None and (not names or os.path.lexists(path / CONFIG_NAME) and _has_weights(path)):
        return None
    if len(names) > 1:
        raise ConversionError(f"{path} holds several GGUF files; choose one with --gguf-file: {some(names)}.")
    return GgufSource(in_folder(path, names[0]), one_line(path.resolve().name), one_line(names[0]), None, path)


def _has_weights(folder: Path) -> bool:
    return any(os.path.lexists(folder / name) for name in (SINGLE_SHARD_NAME, INDEX_NAME))


def open_source(src: str | Path, revision: str | None, check_config: Callable[[dict], object]) -> Source:
    """Finds the folder of `src`; a Hub id is downloaded, without pickle files, to the cache of the Hub.

    Args:
        check_config: called with the content of config.json before any weights are downloaded; may raise.

    Raises:
        InputError: there is no such folder or repository, or it can't be read safely.
    """
    folder = Path(src).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"a revision needs a Hub id, but {src} is a folder.")
        check_config(_read_config(folder))
        return Source(folder, one_line(folder.resolve().name))
    if os.path.lexists(folder):
        raise ConversionError(f"{src} is a file; give the folder of a checkpoint, a GGUF file, or a Hub id.")
    _check_repo_id(str(src))
    folder = _download(str(src), revision, list(COMPANIONS))
    if not os.path.lexists(folder / CONFIG_NAME) and (names := _gguf_names(str(src), folder.name)):
        raise ConversionError(f"{src} holds GGUF files; choose one with --gguf-file: {some(names)}.")
    check_config(_read_config(folder))
    # weights last, and only the files that count: repositories hold other formats too
    names = shard_names(read_index(folder) if is_regular(folder / INDEX_NAME) else None)
    folder = _download(str(src), folder.name, [glob.escape(name) for name in names])
    if not any(is_regular(folder / name) for name in names):
        raise ConversionError(
            f"{src} has no safetensors, and pickle files are not downloaded. If you trust it, load it with "
            "transformers, write it with model.save_pretrained(NEW_FOLDER) and convert that folder."
        )
    return Source(folder, str(src), folder.name)


def _read_config(folder: Path) -> dict:
    """The configuration of a folder whose files can be opened, and which holds one model and nothing beside it."""
    check_folder(folder)
    config = read_config(folder)
    check_inside(folder, folder / CONFIG_NAME)
    check_implementations(config, CONFIG_NAME)
    if config.get("transformers_weights") is not None:
        raise ConversionError(f"{CONFIG_NAME} names other weights than usual, in transformers_weights; remove it.")
    if os.path.lexists(folder / ADAPTER_NAME):
        raise ConversionError(
            f"{folder} holds a model and an adapter, which transformers would load too; merge the adapter into the "
            f"model (PEFT: merge_and_unload), or move {ADAPTER_NAME} elsewhere."
        )
    return config


def _check_repo_id(src: str) -> None:
    try:
        validate_repo_id(src)
    except HFValidationError:
        raise ConversionError(f"{src} is neither a folder nor a Hub id such as 'organisation/model'.") from None


def _gguf_names(repo_id: str, commit: str) -> list[str]:
    with suppress(HfHubHTTPError, OSError):  # there is another error to tell of
        return sorted(name for name in HfApi().list_repo_files(repo_id, revision=commit) if name.endswith(SUFFIX))
    return []


def _download(repo_id: str, revision: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))
    except GatedRepoError:
        raise ConversionError(
            f"{repo_id} is gated; accept its terms at its page and log in with 'hf auth login'."
        ) from None
    except RevisionNotFoundError:
        raise ConversionError(f"{repo_id} has no revision {revision!r}.") from None
    except RepositoryNotFoundError:
        raise ConversionError(
            f"{repo_id} is neither a folder nor a repository of the Hub that you can see; private ones need "
            "'hf auth login'."
        ) from None
    except LocalEntryNotFoundError:
        raise ConversionError(
            f"{repo_id} is not a folder, and the Hub can't be reached to look for a repository of that name."
        ) from None
    except HfHubHTTPError as error:
        raise ConversionError(f"downloading {repo_id} failed: {reason(error)}.") from None
