# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Commands in scripts/ and benchmarks/, run as users run them: as processes, on real text, at the smallest sizes."""

import argparse
import hashlib
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from attnres_recipes.data import stdlib_files
from peft import AutoPeftModelForCausalLM
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


ROOT = Path(__file__).parents[1]
SCRIPTS, BENCHMARKS, TASKS = ROOT / "scripts", ROOT / "benchmarks", ROOT / "examples" / "lm_eval"
sys.path[:0] = [str(SCRIPTS), str(BENCHMARKS), str(TASKS)]

import quickstart  # noqa: E402


SIZES = {"seq-len": 32, "batch-size": 4, "eval-documents": 2, "steps": 8, "eval-sequences": 8, "new-tokens": 4}
TINY = [f"--{name}={value}" for name, value in SIZES.items()] + ["--continue-learning-rate=0.002"]
DONOR_SIZES = {"layers": 3, "hidden-size": 32, "vocab-size": 400, "donor-steps": 8, "learning-rate": 0.01}
TINY_DONOR = ["--train-donor", *(f"--{name}={value}" for name, value in DONOR_SIZES.items())]
RUNS = {"donor", "donor-continued", "attnres-continued", "attnres-lora"}


def run_script(script: str | Path, *arguments, folder: Path, exit_code: int = 0) -> subprocess.CompletedProcess:
    cache = str(folder / ".cache")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": cache}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert result.returncode == exit_code, result.stdout + result.stderr
    return result


@pytest.fixture(autouse=True)
def same_verbosity():
    """A script that runs in this process leaves what is logged as it was."""
    verbosity = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> list[str]:
    """Options for text and examples that are read faster than the whole library."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "text").mkdir()
    source = "".join(file.read_text(errors="replace") for file in stdlib_files()[:12])
    for index in range(80):
        (folder / "text" / f"{index:02d}.txt").write_text(source[800 * index : 800 * index + 500 + 7 * index])
    rows = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(120)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--text", str(folder / "text"), "--examples", str(folder / "sums.jsonl")]


@pytest.fixture(scope="module")
def finished(own, tmp_path_factory) -> tuple[Path, str]:
    """The output folder of a small quickstart with a donor of its own, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    run = run_script("quickstart.py", "--output", "out", *TINY, *TINY_DONOR, *own, "--block-size", "2", folder=folder)
    return folder / "out", run.stdout


@pytest.mark.parametrize("script", ["quickstart.py", BENCHMARKS / "exactness.py"], ids=["quickstart", "exactness"])
def test_help(script, tmp_path):
    """Every script explains its options."""
    assert "--output" in run_script(script, "--help", folder=tmp_path).stdout


FILES = sorted(path for folder in (SCRIPTS, BENCHMARKS, TASKS) for path in folder.glob("*.py"))
COMMANDS = {path.stem: path for path in FILES if "\ndef main(" in path.read_text(encoding="utf-8")}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name, monkeypatch):
    """A script's docstring begins with a command that it understands, and each of its options has a help."""
    options = {}

    def parse(parser, *args, **kwargs):
        options.update({action.option_strings[0]: action.help for action in parser._actions if action.option_strings})
        raise SystemExit

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    script = importlib.import_module(name)
    with pytest.raises(SystemExit):
        script.main(["--help"])
    assert [option for option, text in options.items() if not text] == []
    program, path, *arguments = shlex.split(script.__doc__.split("\n\n")[0])
    assert (program, path) == ("python", COMMANDS[name].relative_to(ROOT).as_posix())
    assert {word for word in arguments if word.startswith("--")} <= options.keys()


def test_quickstart_writes_everything(finished):
    """Run folders, numbers and figures are there, nothing else is, and the last line sums up in JSON."""
    folder, printed = finished
    files = {"results.json", "evaluation.json", "evaluation.md"}
    assert {path.name for path in folder.iterdir()} == RUNS | files | {"attnres", "figures"}
    assert {path.name for path in folder.parent.iterdir()} == {"out", ".cache"}
    for name in RUNS:
        assert {"model", "run.json", "metrics.jsonl", "results.json", "loss.png"} <= {
            path.name for path in (folder / name).iterdir()
        }
    summary, results = json.loads(printed.splitlines()[-1]), json.loads((folder / "results.json").read_text())
    for figure in results["figures"]:
        with Image.open(folder / "figures" / figure) as image:
            assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    assert {"losses.png", "dynamics.png", "attnres-continued-reads.png"} <= set(results["figures"])
    assert summary["held_out_loss"] == {name: run["held_out_loss"] for name, run in results["runs"].items()}
    assert "largest logit difference" in printed  # the converter's own table
    for file in [*folder.rglob("*.json"), *folder.rglob("*.md")]:
        assert "attnres-tmp" not in file.read_text(), file


def test_quickstart_numbers(finished):
    """The loss falls, conversion and merging are exact, and both runs that go on begin where the donor ended."""
    results = json.loads((finished[0] / "results.json").read_text())
    runs = results["runs"]
    metrics = [json.loads(line) for line in (finished[0] / "donor" / "metrics.jsonl").read_text().splitlines()]
    assert runs["donor"]["held_out_loss"] < metrics[0]["loss"] - 0.1
    assert results["conversion"]["relative_error"] < 3e-6
    assert results["conversion"]["parameters_added"] == 7 * 2 * 32
    continued = [runs[name] for name in ("donor-continued", "attnres-continued")]
    starts = [run["held_out_loss_before"] for run in continued]
    assert starts == pytest.approx([runs["donor"]["held_out_loss"]] * 2, abs=1e-5)
    assert all(run["held_out_loss"] < starts[0] for run in continued)
    assert runs["attnres-lora"]["merged_relative_error"] < 1e-5
    losses = [result["metrics"]["loss"]["value"] for result in results["evaluation"].values()]
    assert len(losses) == 5 and losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert max(losses[2:4]) < losses[0]
    generated = results["generated"]
    assert len(generated) == 5 and generated["donor"] == generated["attnres"]
    reads = json.loads((finished[0] / "figures" / "attnres-continued-reads.json").read_text())["weights"]
    assert [len(read) for read in reads] == [1, 2, 2, 2, 2, 3, 3]
    assert [sum(read) for read in reads] == pytest.approx([1] * 7, abs=1e-5)


def test_quickstart_models_load(finished):
    """The written models are what the numbers say: only training moved the queries, the adapter finds its base."""
    folder = finished[0]
    converted = AutoModelForCausalLM.from_pretrained(folder / "attnres")
    trained = AutoModelForCausalLM.from_pretrained(folder / "attnres-continued" / "model")
    assert isinstance(trained, attnres.AttnResForCausalLM)
    assert not converted.model.depth_attention.query.any()
    assert trained.model.depth_attention.query[1:].any(dim=1).all()
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "attnres-lora" / "model").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "attnres-lora" / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "attnres-lora" / "merged")
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_quickstart_runs_are_those_of_the_scripts(finished, own):
    """Both runs that go on saw the same batches, with the same options but for the model."""
    runs = [json.loads((finished[0] / f"{name}-continued" / "run.json").read_text()) for name in ("donor", "attnres")]
    different = {name for name, value in runs[0]["arguments"].items() if runs[1]["arguments"][name] != value}
    assert different == {"model", "mode"}
    folders = [run["arguments"]["model"] for run in runs]
    assert folders == [str(finished[0] / "donor" / "model"), str(finished[0] / "attnres")]


@pytest.mark.slow
def test_quickstart_with_the_donor_of_the_zoo(own, tmp_path):
    """Without options it starts from the zoo's Llama, in float32, so that conversion and the first losses are exact."""
    run = run_script("quickstart.py", "--output", "out", *TINY, *own, folder=tmp_path)
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["runs"]) == RUNS - {"donor"} and "model_cards/llama-1.3m" in run.stdout
    for file in (SCRIPTS.parent / "model_cards" / "llama-1.3m").iterdir():
        assert (tmp_path / "out" / "donor" / "model" / file.name).read_bytes() == file.read_bytes()
    assert results["conversion"]["relative_error"] < 3e-6
    assert results["generated"]["donor"] == results["generated"]["attnres"]
    evaluation = results["evaluation"]
    assert {result["dtype"] for result in evaluation.values()} == {"float32"}
    losses = [result["metrics"]["loss"]["value"] for result in evaluation.values()]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5)
    assert losses[0] < 5.5  # it has been trained on such text


@pytest.mark.slow
def test_quickstart_with_own_checkpoint(finished, own, tmp_path):
    """`--model` takes the place of the zoo's, `--text` may be a file, and an earlier output is replaced."""
    text = tmp_path / "mine.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 2, encoding="utf-8")
    output = tmp_path / "out"
    output.mkdir()
    (output / "old.txt").write_text("of an earlier run")
    files = {"old.txt": hashlib.sha256(b"of an earlier run").hexdigest()}
    (output / "results.json").write_text(json.dumps({"conversion": {}, "generated": {}, "files": files}))
    options = ["--model", finished[0] / "donor" / "model", "--output", output, "--mode", "full", *TINY, *own]
    run_script("quickstart.py", *options, "--text", text, "--held-out", 0.3, folder=tmp_path)
    results = json.loads((output / "results.json").read_text())
    assert set(results["runs"]) == RUNS - {"donor"}
    assert results["conversion"]["mode"] == "full"
    reads = json.loads((output / "figures" / "attnres-continued-reads.json").read_text())["weights"]
    assert [len(read) for read in reads] == [1, 2, 3, 4, 5, 6, 7]
    assert not (output / "old.txt").exists() and not (output / "donor").exists()
    for file in [*output.rglob("*.json"), *output.rglob("*.md")]:
        assert "attnres-tmp" not in file.read_text(), file


def missing_text(folder):
    return ["--text", folder / "absent"], "doesn't exist"


def empty_folder(folder):
    (folder / "text").mkdir()
    return ["--text", folder / "text"], "no file to train on"


def too_little_text(folder):
    (folder / "a.txt").write_text("a few words")
    (folder / "b.txt").write_text("a few more words")
    return ["--text", folder], "too little text"


def missing_column(folder):
    (folder / "rows.jsonl").write_text('{"body": "text"}\n')
    return ["--text", folder / "rows.jsonl"], "no column 'text'"


def examples_without_columns(folder):
    (folder / "rows.jsonl").write_text('{"question": "text"}\n')
    return ["--examples", folder / "rows.jsonl"], "--columns"


def missing_model(folder):
    return ["--model", folder / "absent"], "config.json"


def model_without_tokenizer(folder):
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"model_type": "llama"}')
    return ["--model", folder / "model"], "tokenizer"


def file_in_the_way(folder):
    (folder / "file").write_text("not a folder")
    return ["--output", folder / "file" / "out"], "can't write"


def foreign_output(folder):
    (folder / "out").mkdir()
    (folder / "out" / "thesis.txt").write_text("not replaceable")
    return [], "choose another --output"


def trained_model_as_output(folder):
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text('{"held_out_loss": 3.0}')
    return [], "choose another --output"


def broken_results_as_output(folder):
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text('{"conversion": {}, "gener')
    return [], "choose another --output"


def notes_in_the_output(folder):
    (folder / "out").mkdir()
    (folder / "out" / "results.json").write_text('{"conversion": {}, "generated": {}, "files": {}}')
    (folder / "out" / ".env").write_text("K=1")
    return [], "holds .env"


@pytest.mark.parametrize(
    "case",
    [
        missing_text,
        empty_folder,
        too_little_text,
        missing_column,
        examples_without_columns,
        missing_model,
        model_without_tokenizer,
        file_in_the_way,
        foreign_output,
        trained_model_as_output,
        broken_results_as_output,
        notes_in_the_output,
    ],
)
def test_quickstart_refuses(case, own, tmp_path, capsys):
    """Bad input ends with one clear line, and leaves what was there."""
    arguments, message = case(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        donor = [] if "--model" in arguments else TINY_DONOR
        quickstart.main([*TINY, *donor, *own, "--output", str(tmp_path / "out"), *map(str, arguments)])
    assert exit.value.code.startswith("quickstart: ") and "\n" not in exit.value.code
    assert message in exit.value.code
    assert sorted(tmp_path.rglob("*")) == before


def test_quickstart_ends_without_traceback(tmp_path):
    """What a refusal looks like from outside: a line and exit code 1."""
    run = run_script("quickstart.py", "--text", "./absent", folder=tmp_path, exit_code=1)
    assert run.stderr.splitlines()[-1] == "quickstart: ./absent doesn't exist."
    assert [path.name for path in tmp_path.iterdir() if path.name != ".cache"] == []


@pytest.mark.parametrize(
    "arguments",
    [
        "--train-donor --hidden-size 33",
        "--steps 0",
        "--mode full --block-size 2",
        "--train-donor --block-size 13",
        "--continue-learning-rate x",
        "--train-donor --vocab-size 100",
        "--tokenizer x",
        "--layers 3",
        "--train-donor --model x",
    ],
)
def test_quickstart_checks_options(arguments, capsys):
    """Options that can't work are refused before anything is trained."""
    with pytest.raises(SystemExit) as exit:
        quickstart.main(arguments.split())
    assert exit.value.code == 2
    assert "quickstart.py: error:" in capsys.readouterr().err


def test_exactness_measures(tmp_path):
    """The recorded rows are those of the conversions asked for, and the scale is what makes them exact."""
    sizes = ["--layers", 3, "--hidden-size", 32, "--block-sizes", 2, "--tokens", 16]
    run = run_script(BENCHMARKS / "exactness.py", *sizes, "--output", "rows.json", folder=tmp_path)
    results = json.loads((tmp_path / "rows.json").read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == results
    assert [(row["mode"], row["block_size"]) for row in results["rows"]] == [("full", None), ("block", 2)]
    assert all(row["scaled"] < 3e-6 < 1e-4 < row["plain_mean"] for row in results["rows"])


@pytest.mark.slow
def test_a_checkpoint_is_measured(tmp_path):
    """The conversion of a model of the zoo: equal but for rounding, which is the smaller the wider the dtype."""
    sizes = ["--tokens", 32, "--new-tokens", 4, "--seq-len", 64, "--sequences", 1]
    source = SCRIPTS.parent / "model_cards" / "llama-1.3m"
    run = run_script(BENCHMARKS / "real.py", source, *sizes, "--output", "real", folder=tmp_path)
    results = json.loads((tmp_path / "real" / "llama-1.3m.json").read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == results
    assert results["command"].startswith("python benchmarks/real.py llama-1.3m --tokens 32")
    assert str(tmp_path) not in json.dumps(results) and results["verification"]["dtype"] == "float64"
    exact, single, half = results["precision"]
    assert exact["difference"] < 1e-13 < 1e-8 < single["donor_error"] < 1e-5 < half["donor_error"]
    assert single["difference"] < 8 * single["donor_error"] and half["difference"] < 8 * half["donor_error"]
    assert single["same_greedy_text"] and abs(single["converted_perplexity"] / single["donor_perplexity"] - 1) < 1e-5
    assert all(row["largest"] >= row["median"] > 0 for row in results["activations"])
    assert all(cost["peak_bytes"] > cost["peak_bytes_of_imports"] for cost in results["conversion"].values())
