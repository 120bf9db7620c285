# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The zoo: a tiny one is built and checked, its folders spoiled in several ways, and the committed one looked through."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import zoo  # noqa: E402
from readme import section  # noqa: E402
from training_data import is_held_out, stdlib_files, text_hash  # noqa: E402


SHORT = "--seq-len 32 --batch-size 4 --steps 3 --warmup 0 --eval-steps 3 --eval-sequences 4 --depth-every 0"
FIELDS = "num_hidden_layers=3 hidden_size=32 intermediate_size=64 num_attention_heads=2 num_key_value_heads=2"
RECIPES = {
    "donor": zoo.Recipe(
        "the donor",
        "pretrain.py",
        f"--config llama --set {FIELDS} --mode donor --data text --held-out 0.2 --train-tokenizer 300 {SHORT}",
    ),
    "continued": zoo.Recipe(
        "trained on",
        "pretrain.py",
        f"--model model_cards/donor --block-size 2 --data text --held-out 0.2 {SHORT}",
        "donor",
    ),
    "adapter": zoo.Recipe(
        "an adapter",
        "finetune.py",
        f"--model model_cards/continued --data sums.jsonl --held-out 0.2 {SHORT}",
        "continued",
    ),
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Another list of recipes, and the working directory as it was."""
    monkeypatch.setattr(zoo, "RECIPES", RECIPES)
    monkeypatch.chdir(Path.cwd())


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A root whose zoo was built by its recipes."""
    root = tmp_path_factory.mktemp("zoo")
    source = "".join(file.read_text(errors="replace") for file in stdlib_files()[:6])
    pieces = [source[700 * index : 700 * index + 500 + 7 * index] for index in range(40)]
    (root / "text").mkdir()
    for index, piece in enumerate(pieces):
        (root / "text" / f"{index:02d}.txt").write_text(piece)
    rows = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(60)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "model_cards").mkdir()
    (root / "model_cards" / "held_out.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pieces[:3]))
    (root / "README.md").write_text("before\n<!-- zoo -->\n\n<!-- /zoo -->\nafter\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "RECIPES", RECIPES)
        patch.chdir(root)
        zoo.main(["--root", str(root), "--build", *RECIPES])
    return root


@pytest.fixture
def root(built, tmp_path) -> Path:
    """A copy to spoil."""
    for name in ("model_cards", "README.md"):
        source = built / name
        shutil.copytree(source, tmp_path / name) if source.is_dir() else shutil.copy(source, tmp_path)
    return tmp_path


def problems(root: Path, capsys, *arguments: str) -> list[str]:
    with pytest.raises(SystemExit) as exit:
        zoo.main(["--root", str(root), *arguments])
    assert exit.value.code == 1
    return capsys.readouterr().err.splitlines()


def test_build_writes_complete_folders(built):
    """Weights in bfloat16 but for depth attention, results of the held-out text, the table; no path of this machine."""
    for name in RECIPES:
        folder = built / "model_cards" / name
        results = json.loads((folder / "results.json").read_text())
        assert results["output"] == f"outputs/zoo/{name}"
        assert {"held-out loss (nats per token)", "bits per byte"} == {
            entry["metric"] for entry in results["evaluation"] if entry["dataset"] == "model_cards/held_out.jsonl"
        }
        for file in folder.rglob("*"):
            assert file.suffix in (".safetensors", ".png") or str(built) not in file.read_text(), file
    weights = load_file(built / "model_cards" / "continued" / "model.safetensors")
    trained = load_file(built / "outputs" / "zoo" / "continued" / "model" / "model.safetensors")
    assert {name for name, tensor in weights.items() if tensor.dtype == torch.float32} == {
        name for name in trained if "depth_attention" in name
    }
    assert all(torch.equal(tensor, trained[name].to(tensor.dtype)) for name, tensor in weights.items())
    table = section(built / "README.md", "zoo")
    assert [line.split("]")[0] for line in table.splitlines()[2:]] == [f"| [{name}" for name in RECIPES]
