# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/push_to_hub.py outputs/run/model my-name/my-model --dry-run

Publishes a model folder as a repository of the Hub: weights, configuration, both code files, tokenizer, card, results.
A card is made from the folder's files if it has none. One that this project's scripts wrote gets the repository's name.

Before anything is uploaded, the files that would go up are loaded in a process of their own as a stranger would load
them, without this project, without a network and without your token, and generate a few tokens. All files appear in one
commit or not at all; an upload that ended early goes on where it stopped when the command is repeated. Files that are
on the Hub already are not sent again, and weights that the folder no longer has are removed there.

The token is that of `hf auth login` or of the variable HF_TOKEN. The last line printed is JSON.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

import yaml
from attnres_convert import InputError
from attnres_convert.card import CARD_NAME, folder_card, renamed, without_local_bases, write_card
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
    metadata_load,
    metadata_save,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, logging, validate_repo_id
from safetensors import SafetensorError, safe_open


ROOT = Path(__file__).resolve().parents[1]
CODE_FILES = ("configuration_attnres.py", "modeling_attnres.py")
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
PICKLE_STARTS = (b"PK\x03\x04", *(b"\x80" + bytes([protocol]) for protocol in range(2, 6)))
TOKEN = re.compile(rb"\bhf_[A-Za-z0-9]{30,}")
TEST_TOKENS = 4
GO_ON = "nothing is half published, run the command again to go on."

# Runs in a process of its own, with the folder and the project's modules as arguments.
STRANGER = """
import json, sys
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None  # an installed project can't be imported either
sys.path[:] = [path for path in sys.path if path not in json.loads(sys.argv[3])]
import torch, transformers
transformers.utils.logging.disable_progress_bar()
folder, code = sys.argv[1], sys.argv[4] == "True"
try:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=code)
    if code:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
        expected = config.hub_classes()
        if config.auto_map != expected:
            lacks = sorted(set(expected) - set(config.auto_map)) or "other classes than " + str(expected)
            raise ValueError(f"the auto_map of config.json lacks {lacks}; save the model again with save_pretrained")
        for reference in config.auto_map.values():
            get_class_from_dynamic_module(reference, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=code)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=code, use_safetensors=True, output_loading_info=True,
        ignore_mismatched_sizes=True)  # or the error doesn't tell what is wrong
    for problem in ("mismatched_keys", "missing_keys", "unexpected_keys"):
        if info[problem]:
            raise ValueError(f"the weights have {problem.replace('_', ' ')}: {min(map(str, info[problem]))}")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
    inputs = tokenizer("import", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        if not model(**inputs).logits.isfinite().all():
            raise ValueError("the model's logits are not finite")
    tokens = model.generate(**inputs, max_new_tokens=int(sys.argv[5]), do_sample=False)
    print(json.dumps({"text": tokenizer.decode(tokens[0])}))
except Exception as error:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    print(json.dumps({"error": f"{lines[0].rstrip('.') if lines else ''} ({type(error).__name__})"}))
"""


class PushError(InputError):
    """The folder can't be pushed; the message is one line that says why and what to do."""


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
    if name in CODE_FILES or path.suffix in SUFFIXES or path.name in WITHOUT_SUFFIX:
        return None
    return "code that a stranger doesn't need" if path.suffix == ".py" else "not of a model repository"


def read_json(files: dict[str, Path], name: str) -> dict:
    try:
        content = json.loads(files[name].read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise PushError(f"{name} is no JSON object; save the model again.")
    return content


def check_weights(files: dict[str, Path]):
    """There is one complete set of weights."""
    if (WEIGHTS in files) == (INDEX in files):
        found = f"both {WEIGHTS} and {INDEX}; remove one" if WEIGHTS in files else "no safetensors weights; save them"
        raise PushError(f"the folder has {found} with save_pretrained.")
    if INDEX in files:
        shards = read_json(files, INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise PushError(f"{INDEX} names no weights; save the model again.")
        if missing := sorted(set(map(str, shards.values())) - files.keys()):
            raise PushError(f"{missing[0]}, which {INDEX} names, is not in the folder.")
        extra = [name for name in files if fnmatch(name, "model*.safetensors") and name not in shards.values()]
        if extra:
            raise PushError(f"{extra[0]} is not in {INDEX}; remove it.")


def check_code(package: Package):
    """The configuration loads code of this folder only, and this code is there."""
    config = read_json(package.files, "config.json")
    model_type = str(config.get("model_type"))
    references = []
    for name in package.files:
        if name.endswith("config.json") and "/" not in name:
            auto_map = read_json(package.files, name).get("auto_map") or {}
            for value in auto_map.values() if isinstance(auto_map, dict) else [auto_map]:
                references += [(name, part) for part in (value if isinstance(value, list) else [value]) if part]
    package.needs_code = bool(references) or model_type.startswith("attnres")
    if not package.needs_code:
        return
    for name, reference in references:
        if f"{str(reference).split('.')[0]}.py" not in CODE_FILES:
            raise PushError(
                f"{name} loads code from {reference}; a repository here brings only {', '.join(CODE_FILES)}."
            )
    if missing := [name for name in CODE_FILES if name not in package.files]:
        raise PushError(f"{missing[0]} is missing; save the model with save_pretrained, which writes the code files.")
    if not config.get("auto_map"):
        raise PushError("config.json has no auto_map; save the model with save_pretrained.")


def check_link(folder: Path, name: str, path: Path):
    target = path.resolve()
    if not target.is_relative_to(folder):
        raise PushError(f"{name} is a link that leaves the folder; put the file itself there.")
    if not target.exists():
        raise PushError(f"{name} is a link to nothing; remove it.")


def check_content(name: str, path: Path, token: str | None):
    """No pickle under another name, and no token in a text."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="numpy"):
                return
        except SafetensorError:
            raise PushError(f"{name} is no complete safetensors file; save the model again.") from None
    content = path.read_bytes()
    if content.startswith(PICKLE_STARTS):
        raise PushError(f"{name} is a pickle or an archive; remove it.")
    if TOKEN.search(content) or (token and token.encode() in content):
        raise PushError(f"{name} contains a Hub token; remove it, and revoke the token if it was shared.")


def collect(folder: Path, token: str | None = None) -> Package:
    """Chooses the files of a folder that make a complete repository.

    Raises:
        PushError: something is missing, or there is something that must not be published.
    """
    if not folder.is_dir():
        raise PushError(f"{folder} is not a folder; give the folder of a saved model.")
    package = Package(folder.resolve())
    for name, path in walk(package.folder, package.folder):
        reason = reason_to_stay(name, path.is_dir())
        if reason is None and path.is_symlink():
            check_link(package.folder, name, path)
        if reason is None and not path.is_file():
            reason = "not a file"
        if reason is None:
            check_content(name, path, token)
            package.files[name] = path
        else:
            package.left[name] = reason
    if "adapter_config.json" in package.files and "config.json" not in package.files:
        raise PushError(f"{folder} is an adapter; merge it into its base and push the result.")
    for name, advice in REQUIRED.items():
        if name not in package.files:
            raise PushError(f"{name} is missing; {advice}.")
    check_weights(package.files)
    check_code(package)
    return package


def add_card(package: Package, repo_id: str, folder: Path):
    """Makes a card if there is none, and gives it the name of the repository. What changes is written to `folder`."""
    card = folder / CARD_NAME
    if CARD_NAME in package.files:
        card.write_bytes(package.files[CARD_NAME].read_bytes())
    else:
        write_card(folder, folder_card(package.folder, repo_id.split("/")[-1]))
    before = card.read_bytes().decode("utf-8", "surrogateescape")
    text = renamed(before, repo_id)
    if text != before:
        card.write_bytes(text.encode("utf-8", "surrogateescape"))
    try:
        metadata = metadata_load(card) or {}
    except (ValueError, yaml.YAMLError):  # the Hub says what is wrong
        metadata = {}
    if (kept := without_local_bases(metadata)) != metadata:
        package.notes.append("the base model on the card is a folder, which the Hub refuses; it is left out there")
        metadata_save(card, kept)
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and (name not in package.files or package.files[name].read_bytes() != path.read_bytes()):
            package.files[name] = path


def load_as_stranger(package: Package) -> str:
    """Loads the files in a process that has neither project nor network nor token; returns the text generated there.

    Raises:
        PushError: they don't load, or don't generate.
    """
    with tempfile.TemporaryDirectory(prefix="attnres-push-") as temporary:
        stage, home = Path(temporary, "model"), Path(temporary, "home")
        home.mkdir()
        for name, path in package.files.items():
            (stage / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).symlink_to(path.resolve())
        secret = ("HF_", "HUGGING", "TRANSFORMERS_", "PYTHON")
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(secret) and "TOKEN" not in name
        }
        environment |= {
            "HOME": str(home),
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        modules = [path.stem for path in ROOT.glob("*attnres.py")] + ["attnres_convert"]
        arguments = [stage, json.dumps(modules), json.dumps([str(ROOT), ""]), package.needs_code, TEST_TOKENS]
        command = [sys.executable, "-I", "-c", STRANGER, *map(str, arguments)]
        done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    try:
        result = json.loads(lines[-1])
    except (IndexError, ValueError):
        ends = done.stderr.strip().splitlines() or [f"its process ended with code {done.returncode}"]
        result = {"error": ends[-1]}
    if "error" in result:
        raise PushError(f"a stranger can't load it, so nothing was uploaded: {result['error']}.".replace(temporary, ""))
    return result["text"]


def git_oid(path: Path) -> str:
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_same(path: Path, remote) -> bool:
    """Whether a file is the one on the Hub, a `RepoFile`."""
    if path.stat().st_size != remote.size:
        return False
    return sha256(path) == remote.lfs.sha256 if remote.lfs else git_oid(path) == remote.blob_id


def find_repository(api: HfApi, args: argparse.Namespace) -> tuple[str, bool]:
    """The full id of the repository, and whether it was made just now.

    Raises:
        PushError: it can't be made, belongs to somebody else, or is public although a private one is wanted.
    """
    user = api.whoami()["name"]
    repo_id = args.repo if "/" in args.repo else f"{user}/{args.repo}"
    try:
        info = api.model_info(repo_id)
    except RepositoryNotFoundError:
        if args.create_pr:
            raise PushError(
                f"{repo_id} doesn't exist, or you can't see it; a pull request needs a repository."
            ) from None
        try:
            return api.create_repo(repo_id, private=args.private or None).repo_id, True
        except HfHubHTTPError as error:
            if error.response.status_code in (403, 409):
                raise PushError(
                    f"{repo_id} can't be created by {user}: {reason(error)}. Choose another name."
                ) from None
            raise
    if args.private and not info.private:
        raise PushError(f"{repo_id} exists and is public; make it private on its page first, or leave out --private.")
    return repo_id, False


def find_branch(api: HfApi, repo_id: str, revision: str) -> bool:
    """Whether a branch is there; it isn't made yet.

    Raises:
        PushError: it is no name of a branch.
    """
    refs = api.list_repo_refs(repo_id, include_pull_requests=True)
    if revision in {ref.name for ref in refs.tags} or re.fullmatch("[0-9a-f]{40}", revision):
        raise PushError(f"--revision {revision} is a tag or a commit, which stay as they are; give a branch.")
    if revision.startswith("refs/pr/") and revision not in {ref.ref for ref in refs.pull_requests or []}:
        raise PushError(f"{repo_id} has no pull request {revision}.")
    return revision.startswith("refs/pr/") or revision in {ref.name for ref in refs.branches}


def upload(api: HfApi, package: Package, repo_id: str, args: argparse.Namespace) -> dict:
    """Brings the repository to the state of the folder in one commit."""
    exists = find_branch(api, repo_id, args.revision)
    base = args.revision if exists else "main"
    head = api.model_info(repo_id, revision=base).sha
    remote = {item.path: item for item in api.list_repo_tree(repo_id, revision=head, recursive=True)
              if hasattr(item, "blob_id")}  # fmt: skip
    changed = [name for name, path in package.files.items() if name not in remote or not is_same(path, remote[name])]
    removed = [name for name in remote if name not in package.files and "/" not in name
               and any(fnmatch(name, pattern) for pattern in WEIGHT_PATTERNS)]  # fmt: skip
    result = {"repository": repo_id, "revision": args.revision, "commit": head, "url": f"{api.endpoint}/{repo_id}"}
    result |= {"uploaded": changed, "removed": removed, "pull_request": None}
    additions = [CommitOperationAdd(name, str(package.files[name])) for name in changed]
    # a new branch is made when all large files are there, so that it never stands for something else than this model
    api.preupload_lfs_files(repo_id, additions, revision=base, create_pr=args.create_pr)
    if not exists:
        api.create_branch(repo_id, branch=args.revision, revision=head)
    if not changed and not removed:
        return result
    try:
        commit = api.create_commit(
            repo_id,
            additions + [CommitOperationDelete(name) for name in removed],
            commit_message=args.message,
            revision=args.revision,
            parent_commit=head,
            create_pr=args.create_pr,
        )
    except HfHubHTTPError:
        if not exists and api.model_info(repo_id, revision=args.revision).sha == head:
            api.delete_branch(repo_id, branch=args.revision)
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
    if isinstance(error, ValueError):
        return " ".join(str(error).split())
    return f"the connection to the Hub failed ({type(error).__name__}); {GO_ON}"


@contextmanager
def explained(repo: str):
    """Turns errors of the Hub, the network and files that vanish into one line."""
    try:
        yield
    except PushError:
        raise
    except Exception as error:
        raise PushError(explain(error, repo)) from None


def publish(api: HfApi, package: Package, args: argparse.Namespace) -> dict:
    """Makes the repository if there is none, and uploads what has changed.

    Raises:
        PushError: it can't be; nothing is half published then.
    """
    with explained(args.repo):
        repo_id, is_new = find_repository(api, args)
        return upload(api, package, repo_id, args) | {"created": is_new}


def push(args: argparse.Namespace) -> dict:
    package = collect(args.folder, get_token())
    api, repo_id = HfApi(), args.repo
    if not args.dry_run:
        with explained(args.repo):
            user = api.whoami()["name"]  # a wrong token shows before a large model is loaded
        repo_id = args.repo if "/" in args.repo else f"{user}/{args.repo}"
    with tempfile.TemporaryDirectory(prefix="attnres-card-") as folder:
        add_card(package, repo_id, Path(folder))
        print(listing(package), flush=True)
        print(f"loads without the project and generates {load_as_stranger(package)!r}", flush=True)
        if args.dry_run:
            return {"dry_run": True, "files": {name: path.stat().st_size for name, path in package.files.items()}}
        result = publish(api, package, args)
    print(f"{result['url']}: {len(result['uploaded'])} of {len(package.files)} files uploaded")
    return result


def listing(package: Package) -> str:
    width = max(map(len, package.files))
    lines = [f"{name:{width}}  {path.stat().st_size:>13,}" for name, path in package.files.items()]
    lines.append(f"{'':{width}}  {package.size:>13,} bytes in {len(package.files)} files")
    lines += [f"stays here: {name} ({reason})" for name, reason in package.left.items()]
    lines += [f"note: {note}" for note in package.notes]
    for name in CODE_FILES if package.needs_code else ():
        if package.files[name].read_bytes() != (ROOT / name).read_bytes():
            lines.append(f"note: {name} is of another version than this project's")
    if not any(fnmatch(name, pattern) for name in package.files for pattern in RESULTS):
        lines.append("note: there are no results, such as results.json or evaluation.json")
    return "\n".join(lines)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="push_to_hub.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument
    add("folder", type=Path, help="folder of a saved model with its tokenizer and card")
    add("repo", help="repository: name, or owner/name; it is made if it doesn't exist")
    add("--private", action="store_true", help="make a new repository private")
    add("--revision", default="main", help="branch, made from main if it doesn't exist; default: main")
    add("--create-pr", action="store_true", help="open a pull request on the branch instead of changing it")
    add("--message", default="Upload model", help="of the commit; default: Upload model")
    add("--dry-run", action="store_true", help="list what would go up and check that it loads, without a network")
    args = parser.parse_args(argv)
    try:
        validate_repo_id(args.repo)
    except HFValidationError:
        parser.error(f"{args.repo} is no name of a repository such as my-name/my-model")
    if not re.fullmatch(r"[A-Za-z0-9][\w./-]*", args.revision) or ".." in args.revision:
        parser.error(f"--revision {args.revision} is no name of a branch")
    if not args.message.strip():
        parser.error("--message is empty")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        result = push(args)
    except PushError as error:
        raise SystemExit(f"push_to_hub: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(f"push_to_hub: interrupted; {GO_ON}") from None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
