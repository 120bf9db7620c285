# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint comes from: a folder, or a repository of the Hub."""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from .checkpoint import COMPANIONS, INDEX_NAME, ConversionError, read_index, shard_names
from .code_references import check_implementations
from .reading import ADAPTER_NAME, CONFIG_NAME, check_folder, check_inside, is_regular, one_line, read_config, reason


@dataclass(frozen=True)
class Source:
    """`name` is fit to be published: a Hub id or the last part of a path. `commit` is `None` for a folder."""

    folder: Path
    name: str
    commit: str | None = None

    @property
    def is_hub(self) -> bool:
        return self.commit is not None


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
        raise ConversionError(f"{src} is a file; give the folder of a checkpoint, or a Hub id.")
    _check_repo_id(str(src))
    folder = _download(str(src), revision, list(COMPANIONS))
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
