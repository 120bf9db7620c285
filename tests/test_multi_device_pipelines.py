# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pretraining in pipelines, for real: two and four processes on gloo with `scripts/accelerate/pipeline.yaml`."""

import json

import pytest
import torch
from families import tiny_config, tiny_model
from pretrain_process import SIZES
from test_multi_device import MUON, REORDERED, check_same_curve, check_same_weights, read_lines, weights, without_times
from test_multi_device import server as server
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")]

MODEL = ["--config=llama", "--train-tokenizer=300", "--set", "num_hidden_layers=5", *SIZES[1:]]
STEPS = ["--seq-len=32", "--steps=4", "--save-steps=2", "--eval-steps=2", "--depth-every=0", "--held-out=0.2"]
RUN = [*MODEL, *STEPS, "--data=text", "--batch-size=2", "--accumulate=4"]
STAGES = "--pipeline-stages=4"


@pytest.fixture(scope="module")
def single(server):
    """The run of one process."""
    server.launch("", "pretrain", *RUN, "--output", "single").finish()
    return server.folder / "single"


def test_same_losses(server, single):
    """Two processes with two stages each have the losses, gradient norms and weights of one process."""
    outputs = server.launch("pipeline", "pretrain", *RUN, STAGES, "--output", "two").finish()
    folder = server.folder / "two"
    check_same_curve(folder, single, REORDERED, looks=0)
    check_same_weights(weights(folder), weights(single), tolerance=1e-5)
    summary = json.loads("".join(outputs).splitlines()[-1])
    results = json.loads((single / "results.json").read_text())
    for name in ("steps", "tokens", "parameters", "depth_parameters", "training_tokens", "epochs"):
        assert summary[name] == results[name]
    # each process has trained layers that the other hasn't, and both have the same depth attention
    first, second = (torch.load(folder / f"rank-{index}.pt") for index in range(2))
    layers = [{int(name.split(".")[2]) for name in part if ".layers." in name} for part in (first, second)]
    assert layers == [{0, 2, 3}, {1, 4}]  # the last one with the head
    for name in first.keys() & second.keys():
        assert "depth_attention" in name and torch.equal(first[name]["whole"], second[name]["whole"])
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoint-4")
    assert isinstance(model, attnres.AttnResForCausalLM)
    check_same_weights(model.state_dict(), weights(folder))


def test_resume(server, single):
    """A run of four processes that is killed after its first checkpoint ends with the losses and weights of one that
    isn't, bit for bit; GPipe, Full, tied embeddings, gradient checkpointing."""
    options = [*RUN, "--set", "tie_word_embeddings=true", "num_hidden_layers=5", *SIZES[1:]]
    options += ["--mode=full", "--pipeline-schedule=gpipe", "--gradient-checkpointing"]
    server.launch("", "pretrain", *options, "--output", "full-single").finish()
    command = ("pipeline", "pretrain", *options, STAGES, "--output")
    server.launch(*command, "full", processes=4).finish()
    check_same_curve(server.folder / "full", server.folder / "full-single", REORDERED, looks=0)
    launch = server.launch(*command, "killed", processes=4)
    assert launch.runs[0].wait_for((server.folder / "killed" / "checkpoint-2").exists)
    launch.kill()
    assert not (server.folder / "killed" / "results.json").exists()
    first, *others = server.launch(*command, "killed", processes=4).finish()
    assert "going on from killed/checkpoint-2" in first and not any("going on" in other for other in others)
    assert without_times(server.folder / "killed") == without_times(server.folder / "full")
    check_same_weights(weights(server.folder / "killed"), weights(server.folder / "full"))
    check_same_weights(weights(server.folder / "full"), weights(server.folder / "full-single"), tolerance=1e-5)
    assert "lm_head.weight" not in weights(server.folder / "full")


def test_on_from_a_checkpoint(server, single):
    """Muon in bfloat16 on a model of experts and recurrent layers, which was trained before."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("kimi_linear", vocab_size=300, max_position_embeddings=64))
    model.save_pretrained(server.folder / "kimi")
    AutoTokenizer.from_pretrained(single / "model").save_pretrained(server.folder / "kimi")
    options = ["--model=kimi", *STEPS, "--data=text", "--batch-size=2", "--accumulate=4", "--optimizer=muon", "--bf16"]
    server.launch("", "pretrain", *options, "--output", "kimi-single").finish()
    server.launch("pipeline", "pretrain", *options, "--pipeline-stages=2", "--output", "kimi-two").finish()
    lines, expected = (read_lines(server.folder / name / "metrics.jsonl") for name in ("kimi-two", "kimi-single"))
    for line, other in zip(lines, expected, strict=True):
        for name in line.keys() & {"loss", "held_out_loss"}:
            assert line[name] == pytest.approx(other[name], rel=MUON)
    assert weights(server.folder / "kimi-two").keys() == weights(server.folder / "kimi-single").keys()


def test_refused(server, single):
    """One line of one process says what can't be."""
    refused = {
        "stages can't be divided among 2 processes": ("pipeline", *RUN, "--pipeline-stages=3"),
        "a model of 5 layers has no 6 stages": ("pipeline", *RUN, "--pipeline-stages=6"),
        "1F1B in 2 processes needs 2 microbatches, not 1": ("pipeline", *RUN, "--pipeline-stages=2", "--accumulate=1"),
        "5 microbatches (--accumulate) can't be interleaved": ("pipeline", *RUN, STAGES, "--accumulate=5"),
        "goes with pipeline.yaml, and not with FSDP": ("fsdp2", *RUN, "--pipeline-stages=2"),
        "set output_router_logits": (
            "pipeline", "--model=moe", *STEPS, "--data=text", "--accumulate=4", "--pipeline-stages=2",
        ),
        "leave out --compile": ("pipeline", *RUN, STAGES, "--compile"),
        "don't go together": ("pipeline", *RUN, STAGES, "--expert-parallel=2"),
        "goes with pipeline.yaml, and not with tensor parallelism in 2": ("tp", *RUN, STAGES),
        "with --mode donor use FSDP2": ("pipeline", *RUN, STAGES, "--mode=donor"),
        "a pipeline needs two processes": ("", *RUN, "--pipeline-stages=2"),
    }  # fmt: skip
    model = tiny_model("qwen3_moe", vocab_size=300, max_position_embeddings=64, output_router_logits=True)
    model.save_pretrained(server.folder / "moe")
    AutoTokenizer.from_pretrained(single / "model").save_pretrained(server.folder / "moe")
    for message, (config, *options) in refused.items():
        launch = server.launch(config, "pretrain", *options, "--output=refused")
        for run in launch.runs:
            run.process.join(120)
        lines = [line for run in launch.runs for line in run.output().splitlines()]
        assert {run.process.exitcode for run in launch.runs} <= {1, 2}, lines
        assert sum("error:" in line or line.startswith("pretrain:") for line in lines) >= 1, lines
        assert any(message in line for line in lines) and "Traceback" not in "".join(lines), (message, lines)
        assert not (server.folder / "refused").exists(), message
