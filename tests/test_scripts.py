# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The scripts, run as users run them: as processes, on real text, at the smallest sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import quickstart  # noqa: E402


SIZES = {"layers": 3, "hidden-size": 32, "vocab-size": 400, "seq-len": 32, "batch-size": 4, "max-text-mb": 0.2}
LENGTHS = {"donor-steps": 8, "steps": 4, "eval-sequences": 8, "new-tokens": 4, "learning-rate": 0.01}
TINY = [f"--{name}={value}" for name, value in {**SIZES, **LENGTHS}.items()]


def run_script(script: str, *arguments, folder: Path, exit_code: int = 0) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPTS / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment, text=True, capture_output=True)
    assert result.returncode == exit_code, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    """A small quickstart's output folder and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    run = run_script("quickstart.py", "--output", "out", *TINY, "--block-size", "2", folder=folder)
    return folder / "out", run.stdout


@pytest.mark.parametrize("script", ["quickstart.py", "exactness.py"])
def test_help(script, tmp_path):
    """Every script explains its options."""
    assert "--output" in run_script(script, "--help", folder=tmp_path).stdout


def test_quickstart_writes_everything(finished):
    """Models, numbers and figures are there, nothing else is, and the last line sums up in JSON."""
    folder, printed = finished
    models = {"donor", "attnres", "donor-continued", "attnres-continued", "attnres-lora", "attnres-lora-merged"}
    files = {"results.json", "depth_weights.png", "losses.png"}
    assert {path.name for path in folder.iterdir()} == models | files
    assert [path.name for path in folder.parent.iterdir()] == ["out"]
    for figure in ("depth_weights.png", "losses.png"):
        with Image.open(folder / figure) as image:
            assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    summary = json.loads(printed.splitlines()[-1])
    results = json.loads((folder / "results.json").read_text())
    assert summary["held_out_loss"] == {name: run["held_out_loss_after"] for name, run in results["runs"].items()}
    assert "largest logit difference" in printed  # the converter's own table


def test_quickstart_numbers(finished):
    """The loss falls, conversion and merging are exact, and the three runs begin at the same loss."""
    results = json.loads((finished[0] / "results.json").read_text())
    runs = results["runs"]
    scratch = runs["donor from scratch"]
    assert scratch["held_out_loss_after"] < scratch["held_out_loss_before"] - 0.1
    assert results["conversion"]["relative_error"] < 3e-6
    assert results["conversion"]["parameters_added"] == 7 * 2 * 32
    continued = [runs[name] for name in ("donor continued", "attnres continued", "attnres with LoRA")]
    starts = [run["held_out_loss_before"] for run in continued]
    assert starts == pytest.approx([scratch["held_out_loss_after"]] * 3, abs=1e-5)
    assert all(run["held_out_loss_after"] < starts[0] for run in continued[:2])
    assert results["lora"]["reloaded"]["largest_difference"] == 0
    assert results["lora"]["merged"]["relative_error"] < 1e-5
    assert results["lora"]["merged_held_out_loss"] == pytest.approx(
        runs["attnres with LoRA"]["held_out_loss_after"], abs=1e-5
    )
    assert [len(read) for read in results["depth_weights"]] == [1, 2, 2, 2, 2, 3, 3]
    assert [sum(read) for read in results["depth_weights"]] == pytest.approx([1] * 7, abs=1e-5)


def test_quickstart_models_load(finished):
    """The written models are what the numbers say: only training moved the queries, the adapter finds its base."""
    folder = finished[0]
    converted = AutoModelForCausalLM.from_pretrained(folder / "attnres")
    trained = AutoModelForCausalLM.from_pretrained(folder / "attnres-continued")
    assert isinstance(trained, attnres.AttnResForCausalLM)
    assert not converted.model.depth_attention.query.any()
    assert trained.model.depth_attention.query[1:].any(dim=1).all()
    adapted = AutoPeftModelForCausalLM.from_pretrained(folder / "attnres-lora").eval()
    merged = AutoModelForCausalLM.from_pretrained(folder / "attnres-lora-merged").eval()
    ids = AutoTokenizer.from_pretrained(folder / "attnres-lora-merged")("import os", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(adapted(input_ids=ids).logits, merged(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_quickstart_with_own_checkpoint_and_text(finished, tmp_path):
    """`--model` and `--text` take the place of the new donor and the library, and an earlier output is replaced."""
    folder = finished[0]
    text = tmp_path / "mine.txt"
    text.write_text(Path(json.__file__).read_text(encoding="utf-8") * 2, encoding="utf-8")
    output = tmp_path / "out"
    output.mkdir()
    (output / "results.json").write_text("{}")
    (output / "old.txt").write_text("of an earlier run")
    options = ["--model", folder / "donor", "--text", text, "--output", output, "--mode", "full", *TINY]
    run_script("quickstart.py", *options, folder=tmp_path)
    results = json.loads((output / "results.json").read_text())
    assert set(results["runs"]) == {"donor continued", "attnres continued", "attnres with LoRA"}
    assert results["conversion"]["mode"] == "full"
    assert [len(read) for read in results["depth_weights"]] == [1, 2, 3, 4, 5, 6, 7]
    assert not (output / "old.txt").exists() and not (output / "donor").exists()


def missing_text(folder):
    return ["--text", folder / "absent"], "doesn't exist"


def empty_folder(folder):
    (folder / "text").mkdir()
    return ["--text", folder / "text"], "no text"


def too_little_text(folder):
    (folder / "a.txt").write_text("a few words")
    (folder / "b.txt").write_text("a few more words")
    return ["--text", folder, "--vocab-size", 300], "too little text"


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


@pytest.mark.parametrize(
    "case",
    [
        missing_text,
        empty_folder,
        too_little_text,
        missing_model,
        model_without_tokenizer,
        file_in_the_way,
        foreign_output,
    ],
)
def test_quickstart_refuses(case, tmp_path, capsys):
    """Bad input ends with one clear line, and leaves what was there."""
    arguments, message = case(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as exit:
        quickstart.main([*TINY, "--output", str(tmp_path / "out"), *map(str, arguments)])
    assert exit.value.code.startswith("quickstart: ") and "\n" not in exit.value.code
    assert message in exit.value.code
    assert sorted(tmp_path.rglob("*")) == before


def test_quickstart_ends_without_traceback(tmp_path):
    """What a refusal looks like from outside: a line and exit code 1."""
    run = run_script("quickstart.py", "--text", "absent", folder=tmp_path, exit_code=1)
    assert run.stderr == "quickstart: --text absent doesn't exist.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", ["--hidden-size 33", "--steps 0", "--mode full --block-size 2", "--block-size 13", "--learning-rate x"]
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
    run = run_script("exactness.py", *sizes, "--output", "rows.json", folder=tmp_path)
    results = json.loads((tmp_path / "rows.json").read_text())
    assert json.loads(run.stdout.splitlines()[-1]) == results
    assert [(row["mode"], row["block_size"]) for row in results["rows"]] == [("full", None), ("block", 2)]
    assert all(row["scaled"] < 3e-6 < 1e-4 < row["plain_mean"] for row in results["rows"])
