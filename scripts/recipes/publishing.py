# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Model folders published as repositories of the Hub, after they were loaded as a stranger would load them."""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from attnres_convert import InputError
from attnres_convert.card import CARD_NAME, folder_card, is_hub_id, renamed, without_local_bases, write_card
from attnres_convert.checkpoint import read_shard
from attnres_convert.reading import (
    ADAPTER_NAME,
    MAX_CONFIG,
    check_config,
    check_inside,
    is_own_code,
    is_regular,
    parse_metadata,
    read_json,
    read_text,
    sha256,
    typed,
    understood,
)
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token, metadata_save
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open

from .leaks import printable, runs_code, secret_in_file, secret_in_text
from .options import PushOptions
from .stranger import StrangerError, load


REQUIRED = {
    "config.json": "save the model with save_pretrained",
    "generation_config.json": "save the model with save_pretrained",
    "tokenizer_config.json": "save the tokenizer there with save_pretrained",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_PATTERNS = ("*.safetensors", f"*{INDEX.removeprefix('model')}")
SUFFIXES = {
    ".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".md", ".yaml", ".yml", ".csv", ".bib", ".cff",
    ".png", ".jpg", ".svg", ".pdf",
}  # fmt: skip
WITHOUT_SUFFIX = {"LICENSE", "LICENCE", "NOTICE"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"}
TRAINING = ("checkpoint-*", "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "scaler*")
EVAL_RESULTS = ".eval_results"  # the Hub's place for results
RESULTS = ("*results*.json", "evaluation*.json", f"{EVAL_RESULTS}/*")
CLASS = re.compile(r"(?m)^ *class (\w+)")
GO_ON = "nothing is half published, run the command again to go on."


def code_files(model_type: str | None = None) -> dict[str, Path]:
    from attnres_convert import families  # takes seconds

    return families.code_files(model_type)


@dataclass
class Package:
    """What of a folder goes up, and what stays, with the reason."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)  # by path in the repository
    left: dict[str, str] = field(default_factory=dict)
    needs_code: bool = True
    notes: list[str] = field(default_factory=list)

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def walk(folder: Path, below: Path) -> Iterator[tuple[str, Path]]:
    """All files under `below` with their paths in `folder`; links to folders count as files."""
    for path in sorted(below.iterdir()):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink() and reason_to_stay(name, is_folder=True) is None:
            yield from walk(folder, path)
        else:
            yield name, path


def reason_to_stay(name: str, is_folder: bool = False) -> str | None:
    """Why a file or folder is not uploaded, if there is a reason."""
    path = Path(name)
    if name != EVAL_RESULTS and (path.name.startswith(".") or name.startswith(".") and path.parts[0] != EVAL_RESULTS):
        return "hidden"
    if any(fnmatch(path.name, pattern) for pattern in TRAINING):
        return "state of training"
    if is_folder:
        return "cache" if path.name == "__pycache__" else None
    if path.suffix in PICKLES:
        return "pickle or array, not safetensors"
    if "token" in path.stem.lower().split("_") or "secret" in path.stem.lower():
        return "may hold a token"
    if name in code_files() or path.suffix in SUFFIXES or path.name in WITHOUT_SUFFIX:
        return None
    return "code that a stranger doesn't need" if path.suffix == ".py" else "not of a model repository"


def check_weights(files: dict[str, Path]):
    """There is one complete set of weights."""
    if (WEIGHTS in files) == (INDEX in files):
        found = f"both {WEIGHTS} and {INDEX}; remove one" if WEIGHTS in files else "no safetensors weights; save them"
        raise InputError(f"the folder has {found} with save_pretrained.")
    if INDEX in files:
        index = read_json(files[INDEX])
        shards = typed(index, "weight_map", dict, INDEX)
        if not shards or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"{INDEX} names no weights, or not their files; save the model again.")
        if typed(index, "metadata", dict, INDEX) is None:
            raise InputError(f"{INDEX} has no metadata, without which transformers doesn't load; save the model again.")
        missing = [shard for shard in set(shards.values()) if shard not in files or not shard.endswith(".safetensors")]
        if missing:
            raise InputError(f"{min(missing)}, which {INDEX} names, is not in the folder or no safetensors file.")
        extra = [name for name in files if fnmatch(name, "model*.safetensors") and name not in shards.values()]
        if extra:
            raise InputError(f"{extra[0]} is not in {INDEX}; remove it.")


def check_code(package: Package):
    """The configurations load code of this folder only, and this code is there."""
    config, classes, references = {}, known_classes(package.files), []
    for name, path in package.files.items():
        if not name.endswith("config.json"):
            continue
        content = read_json(path, MAX_CONFIG)
        if name == "config.json":
            config = check_config(content, name)
            check_origin(content.get("_name_or_path"))
        for key, value in what_loads_code(content):
            if key == "auto_map":
                references += [(name, reference) for reference in auto_map_references(name, value)]
            else:
                raise InputError(f"{name} loads code from elsewhere by {key} ({json.dumps(value)}); remove that line.")
    package.needs_code = bool(references) or str(config.get("model_type")).startswith("attnres")
    needed = code_files(config.get("model_type")) if package.needs_code else {}
    for name in code_files():
        if name not in needed and package.files.pop(name, None):
            package.left[name] = "code that this model doesn't need"
    missing = [name for name in needed if name not in package.files]
    for name, reference in references:
        if reference.split(".")[0] + ".py" not in missing and reference not in classes:
            raise InputError(
                f"{name} loads code from {reference} by its auto_map; a repository here brings only the classes of "
                f"{', '.join(needed)}."
            )
    if missing:
        raise InputError(f"{missing[0]} is missing; save the model with save_pretrained, which writes the code files.")
    if package.needs_code and not config.get("auto_map"):
        raise InputError("config.json has no auto_map; save the model with save_pretrained.")


def known_classes(files: dict[str, Path]) -> set[str]:
    """What an `auto_map` may name: the classes of this project's code files, and of the folder's."""
    paths = [(name, path) for name, own in code_files().items() for path in (own, files.get(name)) if path]
    return {f"{Path(name).stem}.{found}" for name, path in paths for found in CLASS.findall(read_text(path))}


def what_loads_code(content) -> Iterator[tuple[str, object]]:
    """Entries of a configuration, at any depth, by which transformers fetches code, unless they are empty."""
    if isinstance(content, list):
        for value in content:
            yield from what_loads_code(value)
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        is_kernel = "_implementation" in key and any("/" in text for text in texts_in(value))  # a repository of kernels
        if value not in (None, {}, [], "") and (key in ("auto_map", "custom_pipelines") or is_kernel):
            yield key, value
        else:
            yield from what_loads_code(value)


def texts_in(value) -> list[str]:
    values = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for inner in values for text in texts_in(inner)]


def auto_map_references(name: str, auto_map) -> list[str]:
    """The classes that an `auto_map` names: a text for each Auto class, of a tokenizer two of which one may be null."""
    references = []
    for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
        for reference in value if isinstance(value, list) else [value]:
            if isinstance(reference, str):
                references.append(reference)
            elif reference is not None or not isinstance(value, list):
                raise InputError(f"{name}: auto_map must name classes, not {json.dumps(reference)}; save it again.")
    return references


def check_origin(name):
    """`_name_or_path` says where a model was loaded from; a path of this machine is nobody's business."""
    if name and (not isinstance(name, str) or not is_hub_id(name) and os.path.exists(os.path.expanduser(name))):
        raise InputError("config.json: _name_or_path is not the id of a repository; remove that line.")


def check_link(folder: Path, name: str, path: Path):
    """A link leads to what would be published, to this project's code, or into the cache of the Hub that the folder is
    in."""
    check_inside(folder, path)
    target = path.resolve()
    if not target.is_relative_to(folder):
        return
    parts = target.relative_to(folder).parts
    for end in range(1, len(parts) + 1):
        if reason := reason_to_stay("/".join(parts[:end]), is_folder=end < len(parts) or target.is_dir()):
            raise InputError(f"{name} is a link to {target.name}, which stays here ({reason}); remove it.")


def check_content(name: str, path: Path, token: str | None):
    """No pickle under another name, and no secret in the file or its name."""
    if found := secret_in_text(name):
        raise InputError(f"the name of a file contains {found}; rename it, and revoke that if it was shared.")
    if not name.isprintable():  # a line break, what a terminal obeys, or bytes that are no UTF-8
        raise InputError(f"{printable(name)} has a character in its name that can't be printed; rename it.")
    if not is_regular(path):
        raise InputError(f"{name} is no regular file; put the file itself there, or remove it.")
    if path.suffix == ".safetensors":
        try:
            read_shard(path)
            with safe_open(path, framework="numpy"):
                pass
        except (InputError, SafetensorError, OSError):
            raise InputError(f"{name} is no complete safetensors file; save the model again.") from None
    elif runs_code(path):
        raise InputError(f"{name} is a pickle or an archive; remove it.")
    if found := secret_in_file(path, token):
        raise InputError(f"{name} contains {found}; remove it, and revoke that if it was shared.")


def collect(folder: Path, token: str | None = None) -> Package:
    """Chooses the files of a folder that make a complete repository.

    Raises:
        InputError: something is missing, or there is something that must not be published.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give the folder of a saved model.")
    with understood(f"{folder} can't be read"):
        return _collect(folder.resolve(), token)


def _collect(folder: Path, token: str | None) -> Package:
    package = Package(folder)
    for name, path in walk(folder, folder):
        reason = reason_to_stay(name, path.is_dir())
        if reason is None and path.is_symlink():
            check_link(folder, name, path)
            path = code_files()[path.name] if is_own_code(path) else path  # wherever the link leads from now on
        if reason is None and path.is_dir():
            reason = "a link to a folder"
        if reason is None:
            check_content(name, path, token)
            package.files[name] = path
        else:
            package.left[name] = reason
    if ADAPTER_NAME in package.files:
        raise InputError(f"{folder} is an adapter, or holds one; merge it into its base and push the result.")
    for name, advice in REQUIRED.items():
        if name not in package.files:
            raise InputError(f"{name} is missing; {advice}.")
    check_weights(package.files)
    check_code(package)
    return package


def add_card(package: Package, repo_id: str, folder: Path):
    """Makes a card if there is none, and gives it the name of the repository. What changes is written to `folder`."""
    card = folder / CARD_NAME
    if CARD_NAME in package.files:
        before = read_text(package.files[CARD_NAME])
        metadata = parse_metadata(before, CARD_NAME)
        card.write_bytes(before.encode())
    else:
        advice = f"correct results.json and config.json, or write {CARD_NAME} yourself"
        with understood("no card can be made from the folder's files", advice):
            write_card(folder, folder_card(package.folder, repo_id.split("/")[-1]))
            before = read_text(card)
            metadata = parse_metadata(before, CARD_NAME)
    card.write_bytes(renamed(before, package.folder, repo_id).encode())
    if (kept := without_local_bases(metadata)) != metadata:
        package.notes.append("the base model on the card is a folder, which the Hub refuses; it is left out there")
        metadata_save(card, kept)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (name not in package.files or package.files[name].read_bytes() != path.read_bytes()):
            check_content(name, path, None)
            package.files[name] = path


def foreign_code(package: Package) -> list[str]:
    """The code files of the folder that differ from this project's."""
    own = code_files()
    return [name for name, path in package.files.items() if name in own and path.read_bytes() != own[name].read_bytes()]


def load_as_stranger(package: Package, trust_remote_code: bool = False, adapter: dict[str, Path] | None = None) -> str:
    """Loads the files in a process of its own, without this project, as [`stranger.load`] says; returns the text
    generated there.

    Raises:
        InputError: they don't load, or don't generate; or their code isn't this project's and is not trusted.
    """
    if not trust_remote_code and (foreign := foreign_code(package)):
        raise InputError(
            f"{foreign[0]} in {package.folder} is not this project's, so the check doesn't run it and nothing was "
            "uploaded; save the model again with save_pretrained, or read that file and give --trust-remote-code."
        )
    try:
        text, notes = load(package.files, package.needs_code, adapter)
    except StrangerError as error:
        raise InputError(f"a stranger can't load it, so nothing was uploaded: {error}.") from None
    package.notes += notes
    return text


def git_oid(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_same(path: Path, remote) -> bool:
    """Whether a file is the one on the Hub, a `RepoFile`."""
    if path.stat().st_size != remote.size:
        return False
    return sha256(path) == remote.lfs.sha256 if remote.lfs else git_oid(path) == remote.blob_id


def find_repository(api: HfApi, options: PushOptions) -> tuple[str, bool]:
    """The full id of the repository, and whether it was made just now.

    Raises:
        InputError: it can't be made, belongs to somebody else, or is public although a private one is wanted.
    """
    user = api.whoami()["name"]
    repo_id = options.repo if "/" in options.repo else f"{user}/{options.repo}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if options.create_pr:
            raise InputError(
                f"{repo_id} doesn't exist, or you can't see it; a pull request needs a repository."
            ) from None
        try:
            return api.create_repo(repo_id, private=options.private or None).repo_id, True
        except HfHubHTTPError as error:
            if error.response.status_code in (403, 409):
                raise InputError(
                    f"{repo_id} can't be created by {user}: {reason(error)}. Choose another name."
                ) from None
            raise
    if options.private and not info.private:
        raise InputError(f"{repo_id} exists and is public; make it private on its page first, or leave out --private.")
    return repo_id, False


def find_branch(api: HfApi, repo_id: str, revision: str) -> bool:
    """Whether a branch is there; it isn't made yet.

    Raises:
        InputError: it is no name of a branch.
    """
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    if revision in {ref.name for ref in refs.tags} or re.fullmatch("[0-9a-f]{40}", revision):
        raise InputError(f"--revision {revision} is a tag or a commit, which stay as they are; give a branch.")
    if revision.startswith("refs/pr/") and revision not in {ref.ref for ref in refs.pull_requests or []}:
        raise InputError(f"{repo_id} has no pull request {revision}.")
    return revision.startswith("refs/pr/") or revision in {ref.name for ref in refs.branches}


def upload(api: HfApi, package: Package, repo_id: str, options: PushOptions) -> dict:
    """Brings the repository to the state of the folder in one commit."""
    if gone := [name for name, path in package.files.items() if not path.is_file()]:
        raise InputError(f"{gone[0]} is gone from the folder; nothing was published, run the command again.")
    exists = find_branch(api, repo_id, options.revision)
    base = options.revision if exists else "main"
    head = api.model_info(repo_id, revision=base).sha
    remote = {item.path: item for item in api.list_repo_tree(repo_id, revision=head, recursive=True)
              if hasattr(item, "blob_id")}  # fmt: skip
    changed = [name for name, path in package.files.items() if name not in remote or not is_same(path, remote[name])]
    removed = [name for name in remote if name not in package.files and "/" not in name
               and any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)]  # fmt: skip
    result = {"repository": repo_id, "revision": options.revision, "commit": head, "url": f"{api.endpoint}/{repo_id}"}
    result |= {"uploaded": changed, "removed": removed, "pull_request": None}
    additions = [CommitOperationAdd(name, str(package.files[name])) for name in changed]
    # a new branch is made when all large files are there, so that it never stands for something else than this model
    api.preupload_lfs_files(repo_id, additions, revision=base, create_pr=options.create_pr)
    if not exists:
        api.create_branch(repo_id, branch=options.revision, revision=head)
    if not changed and not removed:
        return result
    try:
        commit = api.create_commit(
            repo_id,
            additions + [CommitOperationDelete(name) for name in removed],
            commit_message=options.message,
            revision=options.revision,
            parent_commit=head,
            create_pr=options.create_pr,
        )
    except HfHubHTTPError:
        if not exists and api.model_info(repo_id, revision=options.revision).sha == head:
            api.delete_branch(repo_id, branch=options.revision)
        raise
    return result | {"commit": commit.oid, "pull_request": commit.pr_url}


def reason(error: HfHubHTTPError) -> str:
    """What the server says, without addresses, which can hold signatures."""
    return (error.server_message or f"HTTP status {error.response.status_code}").splitlines()[0].rstrip(".")


def explain(error: Exception, repo: str) -> str:
    """One line about an error of the Hub or on the way there."""
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token; log in with 'hf auth login' or set HF_TOKEN."
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} has no such revision."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub doesn't accept your token; log in with 'hf auth login' or set HF_TOKEN to a valid one."
        if status == 403:
            return f"you can't write to {repo}: {reason(error)}. Choose another name or token, or --create-pr."
        if status == 412:
            return f"{repo} was changed meanwhile; {GO_ON}"
        return f"the Hub answers {status}: {reason(error)}; {GO_ON}"
    if isinstance(error, OSError) and error.filename:
        return f"{Path(error.filename).name} can't be read: {error.strerror}; {GO_ON}"
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    return f"the connection to the Hub failed ({type(error).__name__}); {GO_ON}"


@contextmanager
def explained(repo: str):
    """Turns errors of the Hub, the network and files that vanish into one line."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(explain(error, repo)) from None


def publish(api: HfApi, package: Package, options: PushOptions) -> dict:
    """Makes the repository if there is none, and uploads what has changed.

    Raises:
        InputError: it can't be; nothing is half published then.
    """
    with explained(options.repo):
        repo_id, is_new = find_repository(api, options)
        return upload(api, package, repo_id, options) | {"created": is_new}


def push(options: PushOptions) -> dict:
    package = collect(options.folder, get_token())
    api, repo_id = HfApi(), options.repo
    if not options.dry_run:
        with explained(options.repo):
            user = api.whoami()["name"]  # a wrong token shows before a large model is loaded
        repo_id = options.repo if "/" in options.repo else f"{user}/{options.repo}"
    with understood(f"{options.folder} can't be pushed"), tempfile.TemporaryDirectory(prefix="attnres-card-") as folder:
        add_card(package, repo_id, Path(folder))
        print(listing(package), flush=True)
        package.notes.clear()
        text = load_as_stranger(package, options.trust_remote_code)
        print(f"loads without the project and generates {printable(repr(text))}", flush=True)
        print("".join(f"note: {note}\n" for note in package.notes), end="", flush=True)
        if options.dry_run:
            return {"dry_run": True, "files": {name: path.stat().st_size for name, path in package.files.items()}}
        result = publish(api, package, options)
    print(f"{result['url']}: {len(result['uploaded'])} of {len(package.files)} files uploaded")
    return result


def listing(package: Package) -> str:
    width = max(map(len, package.files))
    lines = [f"{name:{width}}  {path.stat().st_size:>13,}" for name, path in package.files.items()]
    lines.append(f"{'':{width}}  {package.size:>13,} bytes in {len(package.files)} files")
    lines += [f"stays here: {printable(name)} ({reason})" for name, reason in package.left.items()]
    lines += [f"note: {note}" for note in package.notes]
    lines += [f"note: {name} is not this project's, or of another version" for name in foreign_code(package)]
    if not any(fnmatch(name, pattern) for name in package.files for pattern in RESULTS):
        lines.append("note: there are no results, such as results.json or evaluation.json")
    return "\n".join(lines)
