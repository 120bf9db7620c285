# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The examples, run as their users run them, do what they say."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NAMES = [path.stem for path in EXAMPLES]
ZOO = ROOT / "model_cards"


def run(name: str, folder: Path, *options: str) -> str:
    """What it prints, started in a folder, without network."""
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), *options]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+\.\d+(?:e[+-]\d+)?", text)]


def in_this_process(name: str, monkeypatch, *options: str):
    """Runs it until it ends by itself, for what ends before the work begins: a process of its own takes seconds."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *options])
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
    return ended.value.code


@pytest.fixture
def chat_model(tmp_path) -> Path:
    """The small Llama of the zoo with a chat template."""
    from attnres_recipes.examples import set_chat_template
    from transformers import AutoTokenizer

    shutil.copytree(ZOO / "llama-1.3m", tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    set_chat_template(tokenizer)
    tokenizer.save_pretrained(tmp_path / "chat")
    return tmp_path / "chat"


def code_lines(path: Path) -> list[int]:
    """Numbers of the lines that have code: without docstrings, comments and blank lines."""
    text = path.read_text(encoding="utf-8")
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, node.end_lineno + 1)
    }
    lines = enumerate(text.splitlines(), start=1)
    return [number for number, line in lines if line.strip() and line.strip()[0] != "#" and number not in docs]


@pytest.mark.parametrize("path", EXAMPLES, ids=NAMES)
def test_is_short(path):
    """It begins with its command, has less than 60 lines of code, and is in the table."""
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).startswith(f"python examples/{path.name}")
    assert len(code_lines(path)) < 60
    assert f"[{path.name}]({path.name})" in (ROOT / "examples" / "README.md").read_text(encoding="utf-8")


def test_lora_takes_30_lines():
    """From the adapter to its second loading, with the callback; not counted are imports and options."""
    path = ROOT / "examples" / "lora.py"
    text = path.read_text(encoding="utf-8").splitlines()
    first = next(number for number, line in enumerate(text, start=1) if line.startswith("class ClipApart"))
    assert 15 < len([number for number in code_lines(path) if number >= first]) <= 32


@pytest.mark.parametrize("name", NAMES)
def test_help(name, monkeypatch, capsys):
    assert in_this_process(name, monkeypatch, "--help") == 0
    assert f"python examples/{name}.py" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["convert_and_chat", "depth_weights", "lora"])
def test_no_model(name, tmp_path, monkeypatch):
    """A folder without a model gives one line."""
    options = ["--output", str(tmp_path / "out")] if name != "depth_weights" else []
    line = in_this_process(name, monkeypatch, "--model", str(tmp_path), *options)
    assert line.startswith(f"{name}: ") and "\n" not in line and len(line) > 40


def test_no_depth_attention(monkeypatch):
    line = in_this_process("depth_weights", monkeypatch, "--model", str(ZOO / "llama-1.3m"))
    assert line.endswith("llama-1.3m has no depth attention whose weights sum to one.")


def test_no_chat_model(tmp_path, monkeypatch):
    """Nothing is written for it."""
    options = ["--model", str(ZOO / "llama-1.3m"), "--output", str(tmp_path / "out")]
    line = in_this_process("convert_and_chat", monkeypatch, *options)
    assert line.endswith("llama-1.3m has no chat template; give a chat model.") and not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_no_vllm(monkeypatch):
    assert "vLLM isn't installed" in in_this_process("serve_with_vllm", monkeypatch)


def test_convert_and_chat(chat_model, tmp_path):
    text = run("convert_and_chat", tmp_path, "Who?", "--model", "chat", "--output", "out", "--new-tokens", "9")
    exact, rounded = numbers(text.splitlines()[0])
    assert 0 <= exact < 1e-11 and 0 <= rounded < 1e-5
    same, of = map(int, re.search(r"same tokens: (\d+) of (\d+)", text).groups())
    assert same == of > 0 and "> Who?\n" in text
    assert json.loads((tmp_path / "out" / "attnres" / "config.json").read_text())["model_type"] == "attnres"


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_convert_and_chat_with_the_real_model(tmp_path):
    """By default it is SmolLM2, which knows what a lighthouse is."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import smollm2

    try:
        smollm2.fetch_model()
    except smollm2.InputError as error:
        pytest.skip(str(error))
    text = run("convert_and_chat", tmp_path, "--new-tokens", "24")
    assert numbers(text.splitlines()[0])[0] < 1e-12
    assert "same tokens: 24 of 24" in text and "lighthouse" in text.split("> What is a lighthouse for?\n")[1]


@pytest.mark.slow
def test_lora(tmp_path):
    """The loss falls, and the adapter that is loaded has learned depth attention too."""
    from safetensors.torch import load_file

    text = run("lora", tmp_path, "--steps", "8", "--output", "out")
    before, after = numbers(next(line for line in text.splitlines() if line.startswith("held-out loss")))
    assert after < before - 0.01
    (difference,) = numbers(text.splitlines()[-1])
    assert difference < 1e-3  # of logits of about ten, in float32
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    base = load_file(ZOO / "attnres-1.3m-continued" / "model.safetensors")["model.depth_attention.query"]
    (query,) = (tensor for name, tensor in saved.items() if name.endswith("depth_attention.query"))
    assert 0 < (query - base.float())[1:].abs().max() < 1e-3  # 8 steps of 0.03 times the learning rate
    assert any(tensor.any() for name, tensor in saved.items() if "lora_B" in name)


@pytest.mark.slow
def test_training_loop(tmp_path):
    """Both begin with the same loss and learn, and the weights that are shown have left the average."""
    text = run("training_loop", tmp_path, "--steps", "26").splitlines()
    first, last = numbers(text[0]), numbers(text[1])
    assert text[1].startswith("step   25") and first[0] == pytest.approx(first[1], abs=0.01)
    assert max(last) < min(first) - 1
    assert max(numbers(text[2])) < min(first) - 1
    weights = numbers(text[3])
    assert len(weights) == 5 and sum(weights) == pytest.approx(1, abs=3e-3)
    assert max(weights) > 0.21


def test_depth_weights(tmp_path):
    """A row for each read, and a line for each new token; what is taken most of weighs at least the average."""
    table, _, generated = run("depth_weights", tmp_path, "--new-tokens", "3").partition("\n\n")
    rows = table.splitlines()[1:]
    assert len(rows) == 2 * 24 + 1 and rows[0].startswith("layer 0 attention") and rows[-1].startswith("output")
    for row in rows:
        weight, average, entropy = numbers(row)
        assert average <= weight <= 1 and 0 <= entropy <= 1
    assert min(numbers(row)[2] for row in rows[2:]) < 0.9  # it is a trained model
    lines = generated.splitlines()[1:]
    assert len(lines) == 3 and all(re.search(r"(block \d|embedding) +0\.\d{3}$", line) for line in lines)


@pytest.mark.slow
def test_register_mixer(tmp_path):
    """The mixer learns, what it learned is its own, and is there after loading."""
    text = run("register_mixer", tmp_path, "--steps", "20").splitlines()
    losses = [*numbers(text[0]), *numbers(text[1])]
    assert text[0].startswith("block") and text[1].startswith("slope")
    assert max(losses) < 5 and losses[0] != losses[1]  # 6 at first
    smallest, largest = numbers(text[2])
    assert smallest < largest and max(-smallest, largest) > 0.01
    assert numbers(text[3])[0] < 1e-5


@pytest.mark.serving
@pytest.mark.timeout(1800)
@pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-serving")
def test_serve_with_vllm(tmp_path, monkeypatch):
    """The tokens of transformers, from vLLM in a process of its own."""
    for name, value in {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}.items():
        monkeypatch.setenv(name, value)
    text = run("serve_with_vllm", tmp_path, "--new-tokens", "12")
    assert re.findall(r"same tokens: (\d+ of \d+)", text) == ["12 of 12", "12 of 12"]
