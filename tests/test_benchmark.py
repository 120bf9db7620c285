# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""scripts/benchmark.py, on tiny shapes. Times are not tested, only that they are measured and of what."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers

from attnres import DepthAttentionInterface, eager_depth_attention


sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import benchmark


SHAPE = "--device cpu --hidden-size 32 --layers 3 --blocks 2 --heads 2 --vocab-size 64 --batch-size 2 --seq-len 20"


def run(*arguments) -> None:
    threads, verbosity = torch.get_num_threads(), transformers.utils.logging.get_verbosity()
    try:
        benchmark.main([*SHAPE.split(), "--new-tokens", "2", "--rounds", "2", *map(str, arguments)])
    finally:
        torch.set_num_threads(threads)
        transformers.utils.logging.set_verbosity(verbosity)


def test_models(tmp_path, capsys):
    """Each case has a row for the stock model and each mode and implementation, with ratio, memory and error."""
    run("--output", tmp_path)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["output"] == str(tmp_path)
    results = json.loads((tmp_path / "models.json").read_text())
    variants = ["stock", *(f"{mode} {name}" for mode in ("block", "full") for name in ("eager", "two_phase"))]
    assert [(row["case"], row["variant"]) for row in results["rows"]] == [
        (case, variant) for case in ("training", "forward", "decoding") for variant in variants
    ]
    for row in results["rows"]:
        assert row["ratio"] == [1, 1, 1] if row["variant"] == "stock" else row["relative_error"] < 1e-5
        assert 0 < row["seconds"][0] <= row["seconds"][1] <= row["seconds"][2]
        assert row["tokens_per_second"] > 0
    by_name = {(row["case"], row["variant"]): row for row in results["rows"]}
    # what a training step holds: no less than the logits and their gradient in float32
    assert by_name["training", "stock"]["peak_memory_bytes"] > 2 * 2 * 20 * 64 * 4
    assert by_name["training", "full eager"]["peak_memory_bytes"] > by_name["training", "stock"]["peak_memory_bytes"]
    assert "| training |" in (tmp_path / "models.md").read_text()


def test_vary(tmp_path):
    """The measurement is repeated for each value, and the overhead drawn."""
    run("--vary", "layers=2,3", "--cases", "forward", "--modes", "block", "--output", tmp_path)
    rows = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert [row["layers"] for row in rows] == [2] * 3 + [3] * 3 and {row["varied"] for row in rows} == {"layers"}
    assert (tmp_path / "overhead.png").read_bytes().startswith(b"\x89PNG")


def test_operators(tmp_path):
    """The reads of a block, forward alone and with backward, with the traffic that the paper's formula has."""
    run("--operators", "--sources", "3", "--sublayers", "2", "--output", tmp_path)
    rows = json.loads((tmp_path / "operators.json").read_text())["rows"]
    assert len(rows) == 4 and all(row["traffic"] > 0 and row["relative_error"] < 1e-5 for row in rows)
    assert [row["traffic_by_formula"] for row in rows] == [6.5, None, 6.5, None]


@pytest.fixture
def wrong():
    """An implementation that forgets the epsilon of the keys and half of the scale."""

    def wrong_depth_attention(sources, product, eps, scale):
        return eager_depth_attention(sources, product / 2, eps, scale)

    DepthAttentionInterface.register("wrong", wrong_depth_attention)
    yield "wrong"
    del DepthAttentionInterface._global_mapping["wrong"]


@pytest.mark.parametrize("options", [[], ["--operators"]], ids=["models", "operators"])
def test_wrong_is_not_timed(wrong, options, tmp_path):
    """What computes something else is refused by name, and nothing is written."""
    with pytest.raises(SystemExit, match="benchmark: (block )?wrong is wrong and not timed: error [0-9.e+-]+"):
        run("--implementations", "two_phase", wrong, *options, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--implementations", "cuda"], "--implementations cuda: choose of eager, .*two_phase"),
        (["--vary", "layers=two"], "--vary layers=two: give a number's name and values"),
        (["--vary", "colour=2"], "--vary colour=2: give a number's name and values"),
        (["--family", "llamas"], "--family llamas is unknown"),
        (["--new-tokens", "20"], "--new-tokens must be less than --seq-len"),
    ],
    ids=["implementation", "value", "name", "family", "tokens"],
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        run(*arguments)
    assert refused.value.code == 2
    assert re.search(message, capsys.readouterr().err)
