# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/copying.py: what is copied and what isn't is told apart, and all models of a comparison are measured."""

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from attnres_recipes.data import train_tokenizer
from families import tiny_model
from torch.nn.functional import one_hot


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import copying  # noqa: E402


def copies(tokens: torch.Tensor, use_cache: bool):
    """A model that expects what came after the last token where that was before, and knows nothing else."""
    logits = torch.zeros(*tokens.shape, 50)
    for row, ids in enumerate(tokens.tolist()):
        for place, token in enumerate(ids):
            if token in ids[:place]:
                logits[row, place] = 20.0 * one_hot(torch.tensor(ids[ids[:place].index(token) + 1]), 50)
    return SimpleNamespace(logits=logits)


def test_losses():
    """Of each token but the first; those that are copied cost nothing."""
    once = torch.stack([torch.randperm(50)[:8] for _ in range(11)])
    found = copying.losses(copies, torch.cat([once, once], dim=1))
    assert found.shape == (11, 15)
    assert found[:, :7] == pytest.approx(math.log(50)) and found[:, 8:].max() < 1e-6


def test_models_of_a_comparison(tmp_path, capsys):
    """A model whose logits are all equal has the same loss everywhere; another has another one."""
    runs = ["donor seed=0", "block seed=0"]
    texts = [json.loads(line)["text"] for line in copying.TEXT.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer(texts[:3], 300)
    for name in runs:
        folder = tmp_path / name.replace(" ", ",") / "model"
        tokenizer.save_pretrained(folder)
        model = tiny_model(vocab_size=300, max_position_embeddings=256)
        if name.startswith("donor"):
            torch.nn.init.zeros_(model.lm_head.weight)
        model.save_pretrained(folder)
    (tmp_path / "comparison.json").write_text(
        json.dumps({"runs": {name: {"output": f"elsewhere/{name.replace(' ', ',')}"} for name in [*runs, "failed"]}})
    )
    copying.main([str(tmp_path), "--output", str(tmp_path / "copying.json")])
    found = json.loads((tmp_path / "copying.json").read_text())["models"]
    assert list(found) == runs and len(found["donor seed=0"]) == 7
    assert list(found["donor seed=0"].values()) == pytest.approx([math.log(300)] * 7)
    assert all(abs(loss - math.log(300)) > 1e-3 for loss in found["block seed=0"].values())
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 4 and rows[0].count("|") == 9 and "5.704" in rows[2]


@pytest.mark.parametrize("runs", [None, {}, {"donor": {"output": "elsewhere/donor"}}])
def test_nothing_to_measure(runs, tmp_path, capsys):
    if runs is not None:
        (tmp_path / "comparison.json").write_text(json.dumps({"runs": runs}))
    with pytest.raises(SystemExit) as error:
        copying.main([str(tmp_path), "--output", str(tmp_path / "copying.json")])
    assert error.value.code == 2 and "has no models of a comparison" in capsys.readouterr().err
    assert not (tmp_path / "copying.json").exists()
