# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/benchmark.py, on tiny shapes. Times are not tested, only that they are measured and of what."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from attnres import DepthAttentionInterface, eager_depth_attention


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import benchmark  # noqa: E402
import benchmark_cases  # noqa: E402


SHAPE = "--device cpu --hidden-size 32 --layers 3 --blocks 2 --heads 2 --vocab-size 64 --batch-size 2 --seq-len 20"
IMPLEMENTATIONS = list(dict.fromkeys(["eager", "two_phase", DepthAttentionInterface.default]))
SHAPE += " --prompt-len 24 --new-tokens 2 --rounds 2"


def run(*arguments) -> None:
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    try:
        benchmark.main([*SHAPE.split(), *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity(verbosity)


def rows_of(folder: Path, part: str) -> list[dict]:
    return json.loads((folder / f"{part}.json").read_text())["rows"]


def check_figure(path: Path):
    with Image.open(path) as image:
        assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 20


def test_models(tmp_path, capsys):
    """Each case has a row for stock, each mode and implementation, and the bound, with ratio, memory and error."""
    run("--parts", "models", "--output", tmp_path)
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["output"] == str(tmp_path) and summary["rows"] == {"models": len(IMPLEMENTATIONS) * 8 + 8}
    rows = rows_of(tmp_path, "models")
    variants = ["stock", *(f"{mode} {name}" for mode in ("block", "full") for name in IMPLEMENTATIONS), "bound"]
    assert [(row["case"], row["variant"]) for row in rows] == [
        (case, variant) for case in ("training", "forward", "prefill", "decoding") for variant in variants
    ]
    tokens = {"training": 40, "forward": 40, "prefill": 24, "decoding": 2}
    for row in rows:
        assert row["ratio"] == [1, 1, 1] or row["variant"] != "stock"
        if row["variant"] in ("stock", "bound"):
            assert row["relative_error"] is None
        else:
            assert row["relative_error"] < 1e-5
        assert 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        assert row["tokens_per_second"] == pytest.approx(tokens[row["case"]] / row["seconds"][1])
    by_name = {(row["case"], row["variant"]): row for row in rows}
    # what a training step holds: no less than the logits and their gradient in float32
    assert by_name["training", "stock"]["peak_memory_bytes"] > 2 * 2 * 20 * 64 * 4
    assert by_name["training", "full eager"]["peak_memory_bytes"] > by_name["training", "stock"]["peak_memory_bytes"]
    assert "| training |" in (tmp_path / "models.md").read_text()


@pytest.mark.parametrize("mode", ["block", "full"])
def test_bound(mode):
    """All attentions and MLPs run on the embedding, forward and backward, and nothing between them does."""
    args = benchmark.parse_arguments([*SHAPE.split(), "--modes", mode, "--implementations", "eager"])
    (shape,) = benchmark.planned(args, "models")
    model = benchmark_cases.new_models(shape, with_bound=True)["bound"].train()
    tokens = torch.randint(64, (2, 20))
    seen = []
    for layer in model.model.layers:
        for module in (layer.self_attn.q_proj, layer.mlp.up_proj):
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model(tokens, labels=tokens).loss.backward()
    embedding = model.model.embed_tokens(tokens)
    assert len(seen) == 6 and all(torch.equal(hidden_states, embedding) for hidden_states in seen)
    left_out = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert left_out and all("norm" in name or "depth_attention" in name for name in left_out)
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.grad is not None)


def test_best_default():
    """Of what every implementation ran, the fastest on average; and where one loses with the default."""
    ratios = {"block a": [1.2, 1.0], "full a": [1.3, 1.1], "block b": [1.0, 1.01], "full b": [1.2, 1.0]}
    rows = [
        {"variant": variant, "case": case, "ratio": [0, ratio, 9]}
        for variant, own in {"stock": [1, 1], **ratios}.items()
        for case, ratio in zip(("training", "decoding"), own)
    ]
    text = benchmark.best_default(rows, "a")
    assert text.startswith("b is the fastest here, 1.049 of the stock model's time on average; a takes 1.145.")
    assert "'b' saves: decoding in full mode (1.000, a 1.100), training in block mode (1.000, a 1.200), tr" in text
    assert "decoding in block mode" not in text
    assert benchmark.best_default(rows, "b").endswith("It is the models' default.\n")
    assert benchmark.best_default(rows, "triton").endswith("a takes 1.145.\n")
    # what only one of them ran, as the other failed, says nothing about them
    assert benchmark.best_default([*rows, {"variant": "full c", "case": "forward", "ratio": [1, 1, 1]}], "a") == ""
    assert benchmark.best_default([*rows, {"variant": "full a", "case": "forward", "ratio": [9, 9, 9]}], "a") == text
    assert benchmark.best_default(rows[:4], "a") == ""


def test_provenance(tmp_path):
    """The rows come with hardware, versions and the command that measures them again."""
    arguments = ["--parts", "operators", "--modes", "block", "--threads", "1", "--output", tmp_path]
    run(*arguments)
    results = json.loads((tmp_path / "operators.json").read_text())
    assert results["command"] == ["benchmark.py", *SHAPE.split(), *map(str, arguments)]
    assert results["versions"].keys() >= {"python", "torch", "transformers", "attnres"}
    hardware = results["hardware"]
    assert hardware["cpu"] and hardware["instructions"]
    assert hardware["threads"] == 1 and hardware["memory_bytes"] > 1 << 28
    assert (results["dtype"], results["rounds"], results["not_timed"]) == ("float32", 2, {})


def test_model_growth(tmp_path):
    """Each shape is measured once, also where it is a value of several names, and the overhead is drawn."""
    vary = ["layers=2,3", "blocks=2,3", "hidden_size=32"]
    run("--parts", "model_growth", "--cases", "forward", "--modes", "block", "--output", tmp_path, "--vary", *vary)
    rows = [row for row in rows_of(tmp_path, "model_growth") if row["variant"] != "stock"]
    assert {row["variant"] for row in rows} == {f"block {DepthAttentionInterface.default}"}
    assert [(row["layers"], row["blocks"], row["varied"]) for row in rows] == [
        (2, 2, ["layers"]),
        (3, 2, ["layers", "blocks", "hidden_size"]),
        (3, 3, ["blocks"]),
    ]
    check_figure(tmp_path / "overhead.png")


def test_operators(tmp_path):
    """The reads of a block in both modes and its phases alone, forward and with backward, beside what they move."""
    run("--parts", "operators", "--sources", "3", "--sublayers", "2", "--output", tmp_path)
    rows = rows_of(tmp_path, "operators")
    assert {f"full {name}" for name in IMPLEMENTATIONS} < {row["variant"] for row in rows}
    rows = [row for row in rows if not row["variant"].endswith("cpp")]
    assert all(row["traffic"] > 0 and row["seconds"][0] > 0 for row in rows)
    assert all((row["relative_error"] or 0) < 1e-5 for row in rows)
    formulas = {(row["case"], row["variant"], row["pass"]): row["traffic_by_formula"] for row in rows}
    both = ("forward", "forward and backward")
    assert [formulas[case, "block two_phase", which] for case in ("phase 1", "step") for which in both] == [
        2.5,
        6.5,
        5,
        11,
    ]
    # (N / S + 5), S + N with N blocks of S, and for eager two reads of each source and what it writes
    blocks = {variant: formulas["block of reads", variant, "forward"] for _, variant, _ in formulas}
    assert blocks == {
        "plain residual": 3,
        "block two_phase": 3 / 2 + 5,
        "block eager": (2 * 3 + 1 + 2 * 4 + 1) / 2,
        "full two_phase": 2 + 3 / 2 + 1,
        "full eager": (2 * 3 + 1 + 2 * 4 + 1) / 2,
    }
    for row in rows:
        if row["share_of_copy"] is not None:
            assert row["share_of_copy"] == pytest.approx(row["traffic_by_formula"] / row["traffic"])
    assert sum(row["pass"] == "forward" for row in rows) == len(rows) / 2 == 7


def test_operator_growth(tmp_path):
    """The reads of a block for each value, and measured traffic and formulas in a figure."""
    vary = ["sources=2,4", "sublayers=3,8", "seq_len=20,40"]
    run("--parts", "operator_growth", "--sources", "4", "--output", tmp_path, "--vary", *vary)
    rows = [row for row in rows_of(tmp_path, "operator_growth") if row["variant"] == "full two_phase"]
    rows = [row for row in rows if row["pass"] == "forward"]
    assert [(row["sources"], row["sublayers"], row["seq_len"], row["varied"]) for row in rows] == [
        (2, 8, 20, ["sources"]),
        (4, 8, 20, ["sources", "sublayers", "seq_len"]),
        (4, 3, 20, ["sublayers"]),
        (4, 8, 40, ["seq_len"]),
    ]
    assert [row["traffic_by_formula"] for row in rows] == [8 + 2 / 8 + 1, 8 + 4 / 8 + 1, 3 + 4 / 3 + 1, 8 + 4 / 8 + 1]
    check_figure(tmp_path / "traffic.png")


@pytest.mark.slow
def test_everything(tmp_path, wrong):
    """One command measures all parts with all implementations, also where one is wrong: that is named and left out."""
    shape = ["--layers", "1", "--blocks", "1", "--rounds", "1", "--modes", "block", "--cases", "forward"]
    vary = ["hidden_size=16,32", "sources=2"]
    with pytest.raises(SystemExit, match="^benchmark: not timed: block wrong: it is wrong"):
        run("--everything", *shape, "--vary", *vary, "--output", tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    parts = ("models", "compiled", "model_growth", "operators", "operator_growth")
    assert names == {f"{part}.{kind}" for part in parts for kind in ("json", "md")} | {"overhead.png", "traffic.png"}
    for part in parts:
        variants = {row["variant"] for row in rows_of(tmp_path, part)}
        assert f"block {DepthAttentionInterface.default}" in variants and "block wrong" not in variants
    assert all(row["compiled"] and row["first_call_seconds"] > 0 for row in rows_of(tmp_path, "compiled"))
    assert "first call, s" in (tmp_path / "compiled.md").read_text()
    assert "Not timed: block wrong: it is wrong" in (tmp_path / "models.md").read_text()


@pytest.fixture
def wrong():
    """An implementation that forgets half of the scores."""

    def wrong_depth_attention(sources, product, eps, scale):
        return eager_depth_attention(sources, product / 2, eps, scale)

    DepthAttentionInterface.register("wrong", wrong_depth_attention)
    yield "wrong"
    del DepthAttentionInterface._global_mapping["wrong"]


@pytest.fixture
def failing():
    """An implementation that reads closed sources only."""

    def failing_depth_attention(sources, product, eps, scale):
        if len(sources) > 2:
            raise ValueError("two sources are enough\nfor anyone")
        return eager_depth_attention(sources, product, eps, scale)

    DepthAttentionInterface.register("failing", failing_depth_attention)
    yield "failing"
    del DepthAttentionInterface._global_mapping["failing"]


@pytest.mark.parametrize("part", ["models", "operators"])
def test_wrong_is_not_timed(wrong, failing, part, tmp_path):
    """What computes something else, or fails, is refused by name with the reason, and the others are timed."""
    options = ["--parts", part, "--modes", "block", "--cases", "forward", "--output", tmp_path]
    with pytest.raises(SystemExit) as refused:
        run("--implementations", "two_phase", wrong, failing, *options)
    assert re.search("block wrong: it is wrong: error [0-9.e+-]+, that of eager [0-9.e+-]+", str(refused.value))
    assert "block failing: ValueError: two sources are enough" in str(refused.value)
    results = json.loads((tmp_path / f"{part}.json").read_text())
    assert results["not_timed"].keys() >= {"block wrong", "block failing"}
    others = {"stock", "plain residual", "bound"}
    assert {row["variant"] for row in results["rows"]} - others == {"block two_phase"}


def test_minutes(tmp_path, capsys):
    """No shape is begun when time has run out; which are left out is said, and is no error."""
    options = ["--parts", "operator_growth", "--modes", "block", "--vary", "sources=1,2"]
    run(*options, "--minutes", "1e-9", "--output", tmp_path)
    assert "not begun, as --minutes have passed: operator_growth, hidden_size 32, sources 1;" in capsys.readouterr().err
    assert rows_of(tmp_path, "operator_growth") == []


def test_interrupted(tmp_path):
    """An interruption leaves the rows of the shapes before it, and ends with one line."""
    command = [sys.executable, str(BENCHMARKS / "benchmark.py"), *SHAPE.split(), "--rounds", "50", "--output", tmp_path]
    command += ["--parts", "models", "--modes", "block", "--cases", "training", "forward"]
    path = os.pathsep.join([str(BENCHMARKS.parent), str(BENCHMARKS), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [str(argument) for argument in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        started = time.monotonic()
        while not (tmp_path / "models.json").exists() and process.poll() is None:
            assert time.monotonic() - started < 300
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in errors
    assert errors.splitlines()[-1] == "benchmark: interrupted; what was measured before is written."
    assert {row["case"] for row in rows_of(tmp_path, "models")} == {"training"}
    assert "| training |" in output


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--implementations", "cuda"], "--implementations cuda: choose of .*eager, .*two_phase"),
        (["--vary", "layers=two"], "--vary layers=two: give whole numbers above 0, such as layers=2,4"),
        (["--vary", "colour=2"], "--vary colour=2: choose of hidden_size, layers"),
        (["--parts", "models", "--vary", "layers=2"], "--vary is for the parts model_growth and operator_growth"),
        (["--family", "llamas"], "--family llamas is unknown"),
        (["--layers", "0"], "'0' is not a whole number above 0"),
        (["--everything", "--parts", "models"], "--everything has all parts; leave --parts out"),
    ],
    ids=["implementation", "value", "name", "nothing-grows", "family", "zero", "everything"],
)
def test_refuses_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    assert refused.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--new-tokens", "20"], "--new-tokens 20 must be less than --seq-len"),
        (["--blocks", "4"], "3 layers, 4 blocks, hidden size 32: there can't be more blocks than layers"),
        (["--layers", "12", "--blocks", "5"], r"blocks of one size.* are \[1, 2, 3, 4, 6, 12\]"),
        (["--heads", "3"], "3 heads don't divide the hidden size"),
        (["--vary", "hidden_size=32,33", "sources=2"], "hidden size 33: 2 heads don't divide"),
        (["--vary", "blocks=2,7", "sources=2"], "7 blocks, .*: there can't be more blocks than layers"),
        (["--vary", "layers=2"], "--parts operator_growth needs --vary with one of hidden_size, sources"),
        (["--family", "olmo2"], "olmo2"),
    ],
    ids=["tokens", "blocks", "sizes", "heads", "varied-heads", "varied-blocks", "nothing-varied", "family"],
)
def test_refuses_shapes(arguments, message, tmp_path):
    """What is impossible is said in one line before anything is timed or written."""
    with pytest.raises(SystemExit, match=message) as refused:
        run(*arguments, "--output", tmp_path / "out")
    assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()


def test_refuses_output(tmp_path):
    """A place where nothing can be written is refused before anything is measured."""
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "folder", "/proc/benchmark"):
        with pytest.raises(SystemExit, match=f"benchmark: can't write to {place}: "):
            run("--parts", "models", "--rounds", "100000", "--output", place)
