# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The library under the commands: who imports whom, how soon a command explains itself, options from everywhere."""

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import attnres_recipes
import numpy as np
import pytest
from attnres_convert import InputError
from attnres_recipes import options, parser, stranger
from attnres_recipes.options import EvaluateOptions, FinetuneOptions, PretrainOptions, PushOptions
from attnres_recipes.parser import Options, parse
from attnres_recipes.run import open_run, unlock

from configuration_attnres import ATTN_RES_MODES


ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "scripts" / "recipes"
COMMANDS = {point.name: point.value for point in entry_points(group="console_scripts") if "attnres_" in point.value}
DOC = "python scripts/some.py --output out\n\nDoes something."
ALL = [kind for kind in vars(options).values() if isinstance(kind, type) and issubclass(kind, Options)]


def neighbours(path: Path) -> set[str]:
    """The modules of the library that a file imports, wherever in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_imports_have_levels():
    """No file imports one that imports it, and there are at most seven levels."""
    graph = {path.stem: neighbours(path) for path in RECIPES.glob("*.py") if path.stem != "__init__"}
    levels, rest = [], dict(graph)
    while rest:
        level = {name for name, others in rest.items() if not others & rest.keys()}
        assert level, f"a circle among {sorted(rest)}"
        levels.append(level)
        rest = {name: others for name, others in rest.items() if name not in level}
    assert len(levels) <= 7, levels


def test_every_file_is_in_the_map():
    """The docstring of the package names each file once."""
    names = re.findall(r"`(\w+)`", attnres_recipes.__doc__)
    assert sorted(names) == sorted(path.stem for path in RECIPES.glob("*.py") if path.stem != "__init__")


def test_a_stranger_has_nothing_of_the_project():
    """Each module and package that is installed is among those that the closed process can't import."""
    installed = {path.stem for path in ROOT.glob("*attnres.py")} | {"attnres_kernels", "attnres_recipes"}
    installed |= {value.partition(".")[0] for value in COMMANDS.values()}
    assert installed == set(stranger.MODULES)


def test_installed_commands():
    """Each command of setup.py is installed, and those of a clone are the same files."""
    names = {"convert", "pretrain", "finetune", "evaluate", "generate", "serve", "plot", "push", "export"}
    assert COMMANDS.keys() == {f"attnres-{name}" for name in names}
    for value in COMMANDS.values():
        package, _, module = value.removesuffix(":main").partition(".")
        assert (
            ROOT / {"attnres_convert": "convert", "attnres_commands": "scripts"}[package] / f"{module}.py"
        ).is_file()


@pytest.mark.parametrize("name", COMMANDS)
def test_help_imports_nothing_slow(name):
    """`--help` of an installed command imports neither torch nor datasets, and shows an example."""
    module = COMMANDS[name].removesuffix(":main")
    code = f"import sys; from {module} import main; sys.argv[0] = {name!r}\ntry: main(['--help'])\n"
    code += (
        "except SystemExit: print(sorted({'torch', 'datasets', 'accelerate'} & sys.modules.keys()), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stderr.strip() == "[]", done.stderr
    assert name in done.stdout and "example" in done.stdout


def test_modes():
    """`--mode` takes those of the configuration, in a comparison too, and lists them where it is given another."""
    for mode in ("donor", *ATTN_RES_MODES):
        assert options.PretrainOptions(config="llama", output="out", mode=mode).mode == mode
    names = "one of donor, block, full, denseformer, hc, mhc, block_mhc, or block_ or full_ with sigmoid, .*inkling2"
    with pytest.raises(InputError, match=names):
        options.PretrainOptions(config="llama", output="out", mode="blocks")
    with pytest.raises(InputError, match="blocks: --mode is 'blocks'"):
        options.PretrainOptions(config="llama", output="out", compare="donor,blocks")


FILE = {"config": "llama", "set": {"hidden_size": 64, "hidden_act": "silu"}, "output": "out", "bf16": True}
FILE |= {"learning-rate": "1e-3", "data": ["a", "b"], "sweep": ["seed=0,1"], "model": None, "compile": False}


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_config_file(suffix, tmp_path):
    """A file gives options by name, also with dashes; the command line counts more; Python gives the same."""
    text = json.dumps(FILE) if suffix == "json" else "".join(f"{name}: {json.dumps(v)}\n" for name, v in FILE.items())
    (tmp_path / f"run.{suffix}").write_text(text)
    words = ["--config-file", str(tmp_path / f"run.{suffix}"), "--data", "c", "--set", "hidden_size=32"]
    found = parse(PretrainOptions, "some", DOC, words)
    assert found.set == {"hidden_size": 32, "hidden_act": "silu"} and found.data == ["c"]
    assert (found.learning_rate, found.bf16, found.sweep, found.seed) == (1e-3, True, ["seed=0,1"], 0)
    values = {"config": "llama", "set": found.set, "output": "out", "bf16": True, "learning_rate": 1e-3, "data": "c"}
    assert PretrainOptions(**values, sweep=["seed=0,1"]) == found


def test_a_file_has_any_option(tmp_path):
    """Positional ones in any order, flags that are on already or are undone, lists before positional words."""

    def parsed(kind, text, *words):
        (tmp_path / "a.yaml").write_text(text)
        return parse(kind, "some", DOC, [*words, "--config-file", str(tmp_path / "a.yaml")])

    pushed = parsed(PushOptions, "repo: me/x\nfolder: f\n")
    assert (pushed.folder, pushed.repo) == (Path("f"), "me/x")
    assert parsed(PushOptions, "repo: me/x\n", "f").repo == "me/x"
    evaluated = parsed(EvaluateOptions, "checkpoints: [a]\ndata: [x]\noutput: o\n", "m1", "m2")
    assert evaluated.checkpoints == ["m1", "m2"] and evaluated.data == ["x"]
    assert parsed(FinetuneOptions, "packing: true\nmodel: m\noutput: o").packing
    assert not parsed(FinetuneOptions, "packing: true\nmodel: m\noutput: o", "--no-packing").packing
    run = "config: llama\noutput: o\nbf16: true\nsweep: seed=0,1\n"
    assert len(parsed(PretrainOptions, f"{run}compare: [donor, block]\n").variants()) == 4
    assert parsed(PretrainOptions, run, "--sweep", "seed=5,6").sweep == ["seed=5,6"]
    assert parsed(PretrainOptions, run).bf16 and not parsed(PretrainOptions, run, "--no-bf16").bf16


def test_values_of_numpy_are_plain():
    given = PretrainOptions(config="llama", output="o", learning_rate=np.float64(2e-3), steps=np.int64(3))
    assert [type(value) for value in (given.learning_rate, given.steps)] == [float, int]
    assert given.words() == ["--config", "llama", "--output", "o", "--steps", "3", "--learning-rate", "0.002"]


def test_a_missing_extra_is_one_line(monkeypatch):
    """Also where a folder has the name of a package."""
    monkeypatch.setattr(parser, "find_spec", lambda name: None if name == "tensorboard" else sys.__spec__)
    with pytest.raises(SystemExit, match=r"tensorboard isn't installed; pip install 'attnres\[train\]'"):
        parser.need("train")
    parser.need("evaluate")
    folder = SimpleNamespace(origin=None)
    monkeypatch.setattr(parser, "find_spec", lambda name: folder)
    with pytest.raises(SystemExit, match="accelerate isn't installed"):
        parser.need("generate")


BAD_FILES = {
    "unknown": ("colour: 1", "there is no option 'colour'"),
    "nested": ("data: [[1]]", "--data must be a text, not a list"),
    "date": ("set: {a: 2020-01-01}", "--set must be fields with values that JSON knows"),
    "null byte": ('output: "a\\0b"', "--output holds a null byte"),
    "empty list": ("data: []", "--data is empty"),
    "no number": ("steps: off", "--steps must be a whole number, not true or false"),
    "no text": ("column: no", "--column must be a text, not true or false"),
    "list": ("- a", "must be names with values"),
    "broken": ("a: [", "no valid YAML"),
    "type": ("steps: many", "--steps must be a whole number, not a text"),
    "range": ("steps: 0", "--steps 0 is out of range"),
    "choice": ("mode: half", "--mode is 'half'; it must be one of"),
    "missing": (None, "is missing"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_config_file(case, tmp_path, capsys):
    """Two lines say what is wrong with a file."""
    text, message = BAD_FILES[case]
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        words = ["--config-file", str(tmp_path / "run.yaml"), "--config", "llama"]
        words += [] if case == "null byte" else ["--output", "out"]
        parse(PretrainOptions, "some", DOC, words)
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: some.py") and message in error, error


BAD_VALUES = [
    ({"steps": "10"}, "--steps must be a whole number, not a text"),
    ({"steps": 1.5}, "--steps must be a whole number, not a number"),
    ({"steps": True}, "--steps must be a whole number, not true or false"),
    ({"bf16": 1}, "--bf16 must be true or false"),
    ({"mode": "half"}, "--mode is 'half'; it must be one of donor, block"),
    ({"learning_rate": float("nan")}, "--learning-rate nan is out of range"),
    ({"data": 3}, "--data must be a list"),
    ({"compare": "donor,half"}, "half"),
    ({"compare": "block:learning_rate"}, "block:learning_rate: give options behind a name"),
    ({"compare": "block:colour=1"}, "behind a name"),
    ({"compare": "block:set.=1"}, "behind a name"),
    ({"sweep": ["set=1,2"]}, "give an option that takes a value"),
    ({"tune": "set.rms_norm_eps=1e-5,1e-6"}, "an option that takes a number"),
    ({"compare": "block:data=x"}, "behind a name"),
    ({"compare": "block:seed=1:seed=2"}, "behind a name, each once"),
    ({"compare": "block:mode=full"}, "mode has its values elsewhere"),
    ({"compare": "block:seed=1", "sweep": ["seed=0,1"]}, "seed has its values elsewhere"),
    ({"compare": "block:warmup=1:seed=2,block:seed=2:warmup=1"}, "names one twice"),
    ({"compare": "block:learning_rate=-1"}, "block learning_rate=-1: --learning-rate -1"),
    ({"tune": "learning_rate"}, "two or more of them above 0"),
    ({"tune": "learning_rate=1e-3"}, "two or more"),
    ({"tune": "learning_rate=0,1e-3"}, "two or more of them above 0"),
    ({"tune": "learning_rate=1e-3,inf"}, "two or more"),
    ({"tune": "learning_rate=x1,2"}, "give numbers, or multiples of the default"),
    ({"tune": "max_grad_norm=x1,y2"}, "two or more"),
    ({"tune": "seed=1,2"}, "an option that takes a number"),
    ({"tune": "colour=1,2"}, "an option that takes a number"),
    ({"tune": "learning_rate=1,2", "sweep": ["learning_rate=1,2"]}, "learning_rate has its values elsewhere"),
    ({"tune": "learning_rate=1,2", "compare": "full:learning_rate=1"}, "learning_rate has its values elsewhere"),
    ({"tune_steps": 3}, "--tune-steps goes with --tune"),
    ({"tune_steps": 3, "tune": "learning_rate=1,2", "sweep": ["steps=1,2"]}, "leave it out where runs differ in steps"),
    ({"tune": "learning_rate=1,1.0000001"}, "the same to six digits"),
    ({"tune": "weight_decay=x1,x2", "weight_decay": 0.0}, "no default above 0 to multiply"),
    ({"sweep": ["seed=0,00"]}, "seed=00 is the same run as another one"),
    ({"sweep": [f"tokenizer=a,{'b' * 300}"]}, "has more than 200 bytes"),
    ({"init": "scaled", "set": {"initializer_range": 1}}, "--init scaled decides on initializer_range"),
    ({"jobs": 0}, "--jobs 0 is out of range"),
    ({"config": None, "model": "m", "init": "scaled"}, "--init goes with --config"),
    ({"model": "a"}, "give either --config"),
    ({"data": []}, "--data is empty"),
    ({"set": {"a": Path("b")}}, "--set must be fields with values that JSON knows"),
    ({"set": [1]}, "--set must be fields"),
    ({"output": None}, "--output must be a path, not null"),
]


@pytest.mark.parametrize("values, message", BAD_VALUES, ids=[str(values) for values, _ in BAD_VALUES])
def test_bad_values_from_python(values, message):
    """Options are checked from Python as from the command line."""
    with pytest.raises(InputError, match=message):
        PretrainOptions(**{"config": "llama", "output": "out", **values})


@pytest.mark.parametrize(
    "given",
    [
        PretrainOptions(config="llama", set={"a": [1, {"b": None}], "c": "silu", "d": "true"}, output="out", bf16=True),
        PretrainOptions(model="-odd", output="out", compare="donor,block", sweep=["seed=0,1", "seq_len=8,16"]),
        PretrainOptions(config="llama", output="out", compare="full:warmup=3", tune="learning_rate=1,2", tune_steps=3),
        FinetuneOptions(model="m", output="out", packing=False, target_modules=["q", "v"], lora_dropout=0.1, steps=3),
        EvaluateOptions(checkpoints=["a", "b"], output="out", choice_separator="", data=["x"], held_out=0.5),
        PushOptions(folder="f", repo="me/r", dry_run=True),
    ],
    ids=lambda given: type(given).__name__,
)
def test_words_give_the_options_back(given):
    """What a card shows as the command is that run."""
    assert parse(type(given), "some", DOC, given.words()) == given


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_options_are_explained(kind):
    assert [field.name for field in dataclasses.fields(kind) if not field.metadata["help"]] == []
    assert kind.__doc__ and not kind.__doc__.startswith(f"{kind.__name__}(")


def test_a_run_from_python(tmp_path, monkeypatch):
    """A run is started, taken up and compared by the same function; its numbers are those of the file."""
    from attnres_recipes import pretrain

    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n\n".join(f"number {number} is {number * number}" for number in range(400)))
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    run = PretrainOptions(
        config="llama", set=sizes, train_tokenizer=280, data="text.txt", seq_len=32, steps=4, output="run"
    )
    results = pretrain(run)
    assert results["steps"] == 4 and results == pretrain(run)
    assert results["held_out_loss"] == json.loads((tmp_path / "run" / "results.json").read_text())["held_out_loss"]
    with pytest.raises(InputError, match="holds a run with seed = 0, not 1"):
        pretrain(dataclasses.replace(run, seed=1))
    (tmp_path / "run" / "results.json").unlink()
    (tmp_path / "run" / "merged").mkdir()
    (tmp_path / "run" / "merged" / "README.md").write_text("somebody's")
    assert pretrain(run)["held_out_loss"] == results["held_out_loss"]
    assert [path.read_text() for path in (tmp_path / "run" / "merged").iterdir()] == ["somebody's"]


def test_a_run_of_an_old_version_is_taken_up(tmp_path):
    """Also where its record names options that are gone, unless they were used."""
    given = FinetuneOptions(model="m", output=tmp_path / "run", columns="a,b").settled()
    assert given.arguments["columns"] == ["a", "b"] and given.arguments["learning_rate"] == 5e-4
    open_run(given.output, {**given.arguments, "train_tokenizer": 0, "config": None})
    open_run(given.output, given.arguments)
    record = json.loads((given.output / "run.json").read_text())
    record["arguments"]["train_tokenizer"] = 9
    (given.output / "run.json").write_text(json.dumps(record))
    with pytest.raises(InputError, match="holds a run with train_tokenizer = 9, not None"):
        open_run(given.output, given.arguments)
    unlock(given.output)
