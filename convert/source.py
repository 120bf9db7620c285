# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Where a checkpoint comes from: a folder, or a repository of the Hub."""

import glob
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

from .checkpoint import COMPANIONS, INDEX_NAME, ConversionError, read_config, shard_names


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
        ConversionError: there is no such folder or repository.
    """
    folder = Path(src).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ConversionError(f"a revision needs a Hub id, but {src} is a folder.")
        check_config(read_config(folder))
        return Source(folder, folder.resolve().name)
    if folder.exists():
        raise ConversionError(f"{src} is a file; give the folder of a checkpoint, or a Hub id.")
    _check_repo_id(str(src))
    folder = _download(str(src), revision, list(COMPANIONS))
    check_config(read_config(folder))
    # weights last, and only the files that count: repositories hold other formats too
    names = shard_names(folder) if (folder / INDEX_NAME).is_file() else ["model.safetensors"]
    folder = _download(str(src), folder.name, [glob.escape(name) for name in names])
    if not any((folder / name).is_file() for name in names):
        raise ConversionError(
            f"{src} has no safetensors, and pickle files are not downloaded. If you trust it, load it with "
            "transformers, write it with model.save_pretrained(NEW_FOLDER) and convert that folder."
        )
    return Source(folder, str(src), folder.name)


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
        raise ConversionError(f"downloading {repo_id} failed: {str(error).splitlines()[0]}") from None
