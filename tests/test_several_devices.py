# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The page on several devices: its table is the measured one, what it names exists, its code runs in two processes."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from documents import code_blocks
from families import tiny_model
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "guides" / "several_devices.md").read_text(encoding="utf-8")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import devices  # noqa: E402


def commands() -> list[list[str]]:
    text = "".join(code_blocks(PAGE, "bash")).replace("\\\n", " ")
    return [shlex.split(line) for line in text.splitlines()]


def test_table():
    """It is that of the committed results. Each way to share a model holds less of it than one process."""
    rows = json.loads((ROOT / "results" / "devices.json").read_text())["rows"]
    table = re.search(r"<!-- devices -->\n(.*?)\n<!-- /devices -->", PAGE, flags=re.DOTALL).group(1)
    assert table == devices.markdown(rows) and rows.keys() == devices.WAYS.keys()
    parts = ("parameters", "gradients", "optimizer")
    for name, row in rows.items():
        whole = rows[re.match(r"\w+", name).group()]
        share = 1 if name in ("llama", "llama ddp", "llama, accumulate 2", "qwen3_moe") else 0.54
        assert all(row[part] <= share * whole[part] for part in parts), name
    assert rows["llama pipeline"]["loss"] == pytest.approx(rows["llama, accumulate 2"]["loss"], rel=1e-6)


def test_what_is_named_exists(capsys):
    """The plan is printed, each configuration is named, and links lead somewhere. tests/test_pages.py runs commands."""
    plan = next(command for command in commands() if "scripts/plan_devices.py" in command)
    importlib.import_module("plan_devices").main(plan[2:])
    assert "1f1b, 2 stages" in capsys.readouterr().out
    names = re.findall(r"`((?:ddp|fsdp2|zero3|tp|pipeline)\.yaml)`", PAGE)
    assert {*names} == {path.name for path in (ROOT / "scripts" / "accelerate").iterdir()}
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / "guides" / link).exists(), link


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_loop(tmp_path):
    """The loop of one's own, as its user starts it: the processes agree, and what they save is whole and trained."""
    torch.manual_seed(0)
    model = tiny_model(vocab_size=100, max_position_embeddings=64)
    model.save_pretrained(tmp_path / "llama-attnres")
    (code,) = code_blocks(PAGE, "python")
    (tmp_path / "train.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'scripts'}"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    lines = sorted(re.findall(r"process \d sent .*?\), loss [\d.]+", done.stdout))  # both write to one pipe
    assert [line.split()[1] for line in lines] == ["0", "1"], done.stdout
    assert len({line.split(", loss ")[1] for line in lines}) == 1
    sent = [dict(re.findall(r"'(\w+)': (\d+)", line)) for line in lines]
    assert sent[0]["forward"] == sent[1]["backward"] and int(sent[0]["backward"]) == int(sent[1]["forward"]) == 0
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "trained").state_dict()
    before = model.state_dict()
    assert trained.keys() == before.keys()
    assert all(not torch.equal(trained[name], before[name]) for name in before if "layers" in name)
