# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What a run needs on the disk is known before it trains, and few checkpoints of a large model are written."""

import json
import re
import shutil
from pathlib import Path

import datasets
import pytest
import torch
from attnres_convert import InputError
from attnres_recipes import FinetuneOptions, PretrainOptions, data, finetune, pretrain, space, training
from transformers import LlamaConfig, LlamaForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A Llama whose weights, 2.6 MB, are far more than its other files."""
    folder = tmp_path_factory.mktemp("space")
    tokenizer = data.train_tokenizer(["one dog sat on a mat"], 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, vocab_size=300, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def options(model: Path, folder: Path, kind=FinetuneOptions, **more):
    rows = [{"prompt": f"{n} dogs", "completion": " sat", "text": f"{n} dogs sat. " * 9} for n in range(30)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = {"model": str(model), "data": [str(folder / "data.jsonl")], "seq_len": 16, "batch_size": 2, "held_out": 0.2}
    return kind(**run, depth_every=0, eval_sequences=2, output=folder / "run", **more)


def weights(folder: Path, *names: str) -> int:
    files = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".pt")]
    return sum(path.stat().st_size for path in files if not path.name.startswith(("rng", "scheduler")))


METHODS = {
    "full": {"method": "full"},
    "muon": {"method": "full", "optimizer": "muon"},
    "depth": {"method": "depth"},
    "lora": {"method": "lora", "lora_rank": 64, "merge": True},
}


@pytest.mark.parametrize("name", METHODS)
def test_sizes(name, model, tmp_path, monkeypatch):
    """What is expected of a checkpoint, of the model and of the merged one is what is written."""
    expected = []
    monkeypatch.setattr(training, "sizes", lambda *args: expected.append(space.sizes(*args)) or expected[0])
    finetune(options(model, tmp_path, steps=2, save_steps=2, **METHODS[name]))
    (sizes,), run = expected, tmp_path / "run"
    assert sizes.checkpoint == pytest.approx(weights(run / "checkpoint-2"), rel=0.05)
    assert sizes.model == pytest.approx(weights(run / "model"), rel=0.05)
    merged = weights(run / "merged") if name == "lora" else 0
    assert merged * 0.99 <= sizes.merged <= merged * 2.1  # the adapter counts too
    assert sizes.checkpoint / sizes.model == pytest.approx({"depth": 1, "muon": 2}.get(name, 3), abs=0.2)


@pytest.mark.parametrize("kind", [FinetuneOptions, PretrainOptions])
def test_few_checkpoints_of_a_large_model(kind, model, tmp_path, monkeypatch, capsys):
    """From a size on, a third of the steps lies between checkpoints, unless the command says otherwise; the run says so
    and can be gone on with."""
    run = options(model, tmp_path, kind, steps=7, keep_checkpoints=9)
    start = finetune if kind is FinetuneOptions else pretrain
    monkeypatch.setattr(training, "LARGE", 1000)
    results = start(run)
    assert sorted(path.name for path in run.output.glob("checkpoint-*")) == [f"checkpoint-{n}" for n in (3, 6, 7)]
    assert re.search(r"^a checkpoint has 0.0 GB and is written every 3 steps; ", capsys.readouterr().err, re.M)
    assert results["arguments"]["save_steps"] == 3
    for name in ("results.json", "checkpoint-7", "model"):
        path = run.output / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert start(run)["held_out_loss"] == results["held_out_loss"]
    assert f"going on from {run.output}/checkpoint-6" in capsys.readouterr().err
    monkeypatch.undo()
    shutil.rmtree(run.output)
    start(run)
    assert len(list(run.output.glob("checkpoint-*"))) == 7  # a tenth of the steps, one at least


def test_no_room(model, tmp_path):
    """A run that needs more than the disk has is refused before it trains, in one line with the numbers, and leaves
    nothing behind."""
    run = options(model, tmp_path, method="full", steps=10**9, save_steps=1, keep_checkpoints=10**9)
    with pytest.raises(InputError) as error:
        finetune(run)
    found = re.fullmatch(
        r"not enough disk space in .*/run: ([\d.]+) GB are needed \(1000000000 checkpoints of 0.01, the model\) and "
        r"([\d.]+) GB are free; make room, choose another --output, or --keep-checkpoints 1.",
        str(error.value),
    )
    assert float(found[1]) > 5e6 > float(found[2]) > 0
    assert not run.output.exists()


def test_room_for_what_is_still_to_be_written(model, tmp_path):
    """A run counts what it keeps and is about to write, which may be less; what it holds isn't needed again."""
    free = shutil.disk_usage(tmp_path).free
    run = options(model, tmp_path, steps=100, save_steps=10, keep_checkpoints=2).settled(100)
    half = space.Sizes(checkpoint=free // 2, model=0)
    space.check_run_space(tmp_path, run, space.Sizes(free // 4, free // 8), None)
    for sizes in (half, space.Sizes(free // 4, free // 3), space.Sizes(free // 4, free // 8, free // 3)):
        with pytest.raises(InputError, match="3 checkpoints of .* and .* GB are free"):
            space.check_run_space(tmp_path, run, sizes, None)
    run.save_steps = 100
    space.check_run_space(tmp_path, run, half, None)
    with pytest.raises(InputError, match="1 checkpoint of .*, the model, the merged one"):
        space.check_run_space(tmp_path, run, space.Sizes(free // 2, free // 3, free // 3), None)
    run.save_steps = 10
    finetune(held := options(model, tmp_path, steps=4, save_steps=1, method="depth"))
    last = held.output / "checkpoint-4"
    space.check_run_space(held.output, run, space.Sizes(free // 2, 0), last)
    with pytest.raises(InputError, match="1 checkpoint of"):
        space.check_run_space(held.output, run, space.Sizes(free * 2, 0), last)
    run.steps = 4
    space.check_run_space(held.output, run, space.Sizes(free * 2, 0), last)  # the last one is there
