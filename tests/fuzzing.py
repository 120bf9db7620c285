# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python tests/fuzzing.py --minutes 10

Damages folders that the commands read (models, adapters, cards, run folders) in ways that hypothesis makes up, and runs
the commands on them. Each must give a result, or one line that says what is wrong: never a traceback, a hang, or
something left behind. A damage that does otherwise is made as small as possible and printed; put it into a file in
tests/fuzz_seeds, which the tests run too.

A damage is a list of changes, as JSON: `["set", FILE, PATH, VALUE]`, `["delete", FILE, PATH]`, `["bytes", FILE,
POSITION, BYTES TO REMOVE, TEXT TO INSERT]`, `["kind", FILE, KIND]`. PATH leads into the JSON, YAML or header of a file.
"""

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
import yaml
from attnres_commands import generate, pretrain
from attnres_convert import InputError, convert_checkpoint, convert_to_donor
from attnres_convert.card import folder_card
from attnres_recipes import publishing
from attnres_recipes.adapters import new_adapter
from attnres_recipes.data import train_tokenizer
from convert_models import Hang, limited, save_donor
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import Flaky
from transformers import AutoModelForCausalLM


SEEDS = Path(__file__).with_name("fuzz_seeds")
SECONDS = 30  # a command on a model of a few kilobytes takes less than one, training some
MAX_MESSAGE = 300
MEMORY = 6 * 2**30  # bytes; what reads without end fails there
KINDS = ("missing", "empty", "folder", "pipe", "endless", "outside", "loop")
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


class Fault(AssertionError):
    """A command did something else than give a result or one line."""


# --- folders


@cache
def originals() -> Path:
    """A folder with one sound folder for each target."""
    root = Path(tempfile.mkdtemp(prefix="attnres-fuzz-"))
    tokenizer = train_tokenizer(["import this", "def main"] * 3, 280)
    tokenizer.save_pretrained(root / "donor")
    save_donor(root / "donor", vocab_size=len(tokenizer), num_hidden_layers=2, shard_size="60KB")
    (root / "donor" / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\nbase_model: a/b\n---\n# donor\n")
    with quietly():
        convert_checkpoint(root / "donor", root / "attnres")
    text = "\n\n".join(f"def number_{i}(): return {i * i}" for i in range(200))
    (root / "text.txt").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(root / "attnres")
    adapter = new_adapter(model, rank=2, alpha=4, dropout=0.0, dora=False)
    adapter.peft_config["default"].base_model_name_or_path = str(root / "attnres")
    adapter.save_pretrained(root / "adapter")
    with quietly():
        train(root / "run", root, steps=4)
        (root / "run" / "results.json").unlink()
        shutil.rmtree(root / "run" / "checkpoint-4")
    return root


def train(folder: Path, root: Path, steps: int):
    options = ["--model", root / "attnres", "--data", root / "text.txt", "--steps", steps, "--batch-size", 1]
    options += ["--seq-len", 16, "--depth-every", 0, "--save-steps", 1, "--eval-sequences", 1, "--output", folder]
    pretrain.main([str(option) for option in options])


# --- damages

ODD_TEXTS = ("", "\ud800", "../../etc/passwd", "/dev/zero", "evil/repo--code.Class", "(", "\n\x1b[2J", "x" * 5000, "16")
ODD_NUMBERS = (0, -1, 1, 2, 3, 7, 10**5, 2**31, 2**63, 10**30, 0.5, -0.0, 1e-320, 1e38, 1e308)
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(ODD_NUMBERS), st.sampled_from(ODD_TEXTS), st.text(max_size=5)
)
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(st.sampled_from(("a", "model_type", "0", "")), scalars, max_size=2),
    st.sampled_from((3, 100, 3000)).map(lambda depth: ["nested", depth]),
)


def read_structure(path: Path):
    """What is in a file, to be changed: JSON, the header of safetensors, the metadata of a card."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if path.suffix == ".md":
        return yaml.safe_load(content.decode().split("---")[1])
    return json.loads(content)


def write_structure(path: Path, value):
    text = json.dumps(value).replace('["nested", 3000]', "[" * 3000 + "]" * 3000)
    text = text.replace('["nested", 100]', "[" * 100 + "]" * 100)
    if path.suffix == ".safetensors":
        content = path.read_bytes()
        data, header = content[8 + int.from_bytes(content[:8], "little") :], text.encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    elif path.suffix == ".md":
        path.write_text(f"---\n{text}\n---\n# card\n")
    else:
        path.write_text(text)


def paths_in(value) -> list[tuple]:
    """The ways to all values inside of `value`, shallow ones first."""
    found, level = [()], [((), value)]
    while level:
        level = [((*way, key), item) for way, content in level for key, item in items(content)]
        found += [way for way, _ in level]
    return found


def items(value):
    return value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()


@cache
def files_of(name: str) -> dict[str, list[tuple]]:
    """The files of a sound folder, with the ways into those that have a structure."""
    folder, found = originals() / name, {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and "tfevents" not in path.name):
        file = path.relative_to(folder).as_posix()
        with contextlib.suppress(Exception):
            found[file] = paths_in(read_structure(path))
        found.setdefault(file, [])
    return found


NEW_FIELDS = ("auto_map", "quantization_config", "layer_types", "output_hidden_states", "return_dict", "torchscript")
NEW_FIELDS += ("is_encoder_decoder", "rope_scaling", "tags", "license", "__metadata__", "total_size", "_name_or_path")


@st.composite
def changes(draw, name: str) -> list:
    files = files_of(name)
    file = draw(st.sampled_from(sorted(files, key=lambda file: (not files[file], file))))
    kind = draw(st.sampled_from(("set", "set", "set", "delete", "bytes", "kind") if files[file] else ("bytes", "kind")))
    if kind == "set":
        way = draw(st.sampled_from(files[file]))
        if draw(st.integers(0, 3)) == 0:
            way = (draw(st.sampled_from(NEW_FIELDS)),)
        return ["set", file, list(way), draw(values)]
    if kind == "delete":
        return ["delete", file, list(draw(st.sampled_from(files[file])))]
    if kind == "bytes":
        removed = draw(st.sampled_from((0, 1, 8, 1000, 10**9)))
        return ["bytes", file, draw(st.integers(0, 2000)), removed, draw(st.text(max_size=4))]
    return ["kind", file, draw(st.sampled_from(KINDS))]


def damages(name: str):
    return st.lists(changes(name), min_size=1, max_size=3)


def damage(folder: Path, change: list):
    kind, file, *rest = change
    path = folder / file
    if path.is_symlink() or not path.is_file():  # an earlier change took it away
        return
    if kind in ("set", "delete"):
        *way, last = rest[0] or [None]
        with contextlib.suppress(Exception):  # nor is there what this one is about
            top = inner = [None] if last is None else read_structure(path)
            for key in way:
                inner = inner[key]
            if kind == "delete":
                del inner[0 if last is None else last]
            else:
                inner[0 if last is None else last] = rest[1]
            write_structure(path, (top or [None])[0] if last is None else top)
    elif kind == "bytes":
        position, removed, text = rest
        content = path.read_bytes()
        path.write_bytes(content[:position] + text.encode("utf-8", "surrogatepass") + content[position + removed :])
    else:
        path.unlink()
        if rest[0] == "empty":
            path.touch()
        elif rest[0] == "folder":
            path.mkdir()
        elif rest[0] == "pipe":
            os.mkfifo(path)
        elif rest[0] != "missing":
            path.symlink_to({"endless": "/dev/zero", "outside": originals() / "text.txt", "loop": path}[rest[0]])


# --- targets


def convert(folder: Path):
    convert_checkpoint(folder, folder.parent / "result", num_blocks=1)
    shutil.rmtree(folder.parent / "result")


def convert_back(folder: Path):
    convert_to_donor(folder, folder.parent / "result")
    shutil.rmtree(folder.parent / "result")


def card(folder: Path):
    folder_card(folder).text()


def push(folder: Path):
    package = publishing.collect(folder, "hf_" + 30 * "x")
    with tempfile.TemporaryDirectory() as temporary:
        publishing.add_card(package, "me/model", Path(temporary))
        publishing.listing(package)


def complete(folder: Path):
    generate.main([str(folder), "--prompt", "import", "--max-new-tokens", "2"])


def resume(folder: Path):
    train(folder, originals(), steps=4)


TARGETS = {
    "convert": (convert, "donor"),
    "convert_back": (convert_back, "attnres"),
    "card": (card, "attnres"),
    "push": (push, "attnres"),
    "generate": (complete, "attnres"),
    "adapter": (complete, "adapter"),
    "resume": (resume, "run"),
}
SLOW = ("resume",)


@contextlib.contextmanager
def quietly():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def message_of(run, folder: Path) -> str | None:
    """The one line that a command ends with, `None` if it gives a result."""
    try:
        with quietly(), limited(SECONDS):
            run(folder)
    except InputError as error:
        if "MemoryError" in str(error):
            raise Fault(f"it fills the memory: {error}") from None
        return str(error)
    except SystemExit as error:
        return None if error.code in (None, 0) else str(error.code)
    except Hang as error:
        raise Fault(str(error)) from None
    except BaseException as error:
        raise Fault("".join(traceback.format_exception(error)[-6:])) from None
    return None


def check(target: str, damage_: list) -> str | None:
    """Runs a target on a damaged folder, and returns its message.

    Raises:
        Fault: it is neither a result nor one line, or something is left behind.
    """
    run, name = TARGETS[target]
    with patch.dict(os.environ, ENVIRONMENT), tempfile.TemporaryDirectory(prefix="attnres-fuzz-case-") as temporary:
        folder = Path(temporary, name)
        shutil.copytree(originals() / name, folder)
        for change in damage_:
            damage(folder, change)
        before = set(os.listdir(temporary))
        message = message_of(run, folder)
        left = set(os.listdir(temporary)) ^ before
    if left:
        raise Fault(f"it leaves or takes away {sorted(left)}")
    if message is not None and (
        len(message.splitlines()) != 1 or len(message) > MAX_MESSAGE + 20 or "Traceback" in message
    ):
        raise Fault(f"its message isn't one line of at most {MAX_MESSAGE} characters: {message[:1000]!r}")
    return message


def committed() -> list[tuple[str, list]]:
    """All damages in tests/fuzz_seeds."""
    cases = []
    for path in sorted(SEEDS.glob("*.json")):
        cases += [(path.stem, case) for case in json.loads(path.read_text(encoding="utf-8"))]
    return cases


def search(target: str, examples: int, number: int, seconds: float = float("inf")):
    """Tries made-up damages for `seconds`, or until there were so many `examples`.

    Raises:
        Fault: of the smallest damage that was found, which its message begins with.
    """
    end, faults = time.monotonic() + seconds, []

    @seed(number)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
    )
    @given(damages(TARGETS[target][1]))
    def try_one(found):
        if time.monotonic() > end:
            return
        try:
            check(target, found)
        except Fault as fault:
            faults.append(Fault(f"{target} {json.dumps(found)}\n{fault}"))
            raise faults[-1] from None

    try:
        try_one()
    except (Fault, Flaky):  # the second: time ended while a damage was made smaller
        raise min(faults, key=lambda fault: len(str(fault).splitlines()[0])) from None


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[1], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--seed", type=int, default=random.randrange(2**31), help="default: another one each time")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, resource.RLIM_INFINITY))
    print(f"seed {args.seed}", flush=True)
    end, number, faults, tried = time.monotonic() + 60 * args.minutes, args.seed, [], 0
    while time.monotonic() < end:
        for target in args.targets:
            left = end - time.monotonic()
            if left <= 0:
                break
            examples = 3 if target in SLOW else 30
            try:
                search(target, examples, number, left)
            except Fault as fault:
                faults.append(target)
                print(f"--- {fault}", flush=True)
            number, tried = number + 1, tried + examples
    shutil.rmtree(originals())
    print(json.dumps({"seed": args.seed, "tried": tried, "faults": faults}))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
