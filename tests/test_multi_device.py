# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Training on several devices, for real: two processes on gloo with the configurations in `scripts/accelerate`."""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from accelerate.utils import merge_fsdp_weights
from attnres_recipes.optim import new_optimizer
from families import perturb, tiny_model
from launch_process import CONFIGS, environment, launch_server
from peft import PeftModel
from pretrain_process import SCRIPTS, SIZES
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")]

MODEL = ["--config=llama", "--train-tokenizer=300", "--set", *SIZES]
STEPS = [
    "--seq-len=32",
    "--accumulate=2",
    "--steps=4",
    "--save-steps=2",
    "--eval-steps=2",
    "--depth-every=2",
    "--held-out=0.2",
]
RUN = [*MODEL, *STEPS, "--data=text"]
ONE, TWO = "--batch-size=4", "--batch-size=2"  # sequences per process, so that a step has the same eight
# Means of float32 over four sequences, or over two in each of two processes: sums in another order, differing in the
# last of 24 bits, and what four steps make of it. An error of method shows: the wrong scale of a gradient, a stale or
# forgotten parameter change losses by 1e-4 or more within these steps.
REORDERED = 3e-6
# Muon orthogonalises in bfloat16, 8 bits, which turns differences in the last bit of a gradient into some of that
MUON = 1e-3
TIMES = ("tokens_per_second", "seconds")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def without_times(folder: Path) -> list[dict]:
    """All that a run logged but how long it took."""
    lines = [line for name in ("metrics", "depth") for line in read_lines(folder / f"{name}.jsonl")]
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def check_same_curve(folder: Path, expected: Path, tolerance: float, looks: int = 3):
    lines, expected_lines = without_times(folder), without_times(expected)
    assert len(lines) == len(expected_lines) >= 6 + looks
    for line, expected_line in zip(lines, expected_lines):
        assert line.keys() == expected_line.keys()
        for name, value in line.items():
            # queries start at zero, and the first step of Adam makes much of little; gradients are sums with more
            # roundings than a loss (in float32 they are 5e-6 to 3e-4 away from float64)
            bound = 10 * tolerance if "grad" in name else tolerance
            assert value == pytest.approx(expected_line[name], rel=bound, abs=bound), (name, line["step"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def check_same_weights(tensors: dict, expected: dict, tolerance: float = 0):
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(tensor, expected[name], atol=tolerance, rtol=0)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with launch_server(tmp_path_factory.mktemp("multi_device")) as server:
        yield server


def accelerate_launch(config: str, *arguments) -> list[str]:
    """The command line of two processes."""
    launch = ["launch", "--config_file", CONFIGS / f"{config}.yaml", "--num_processes", 2, "--main_process_port", 0]
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *launch, SCRIPTS / "pretrain.py", *arguments]
    return list(map(str, command))


@pytest.fixture(scope="module")
def single(server) -> Path:
    """The run of one process."""
    server.launch("", "pretrain", *RUN, ONE, "--output", "single").finish()
    return server.folder / "single"


@pytest.fixture(scope="module")
def launched(server, single) -> dict[str, tuple[Path, str]]:
    """The same training in two processes, by configuration: the run's folder and what the processes printed."""
    command = accelerate_launch("fsdp2", *RUN, TWO, "--output", "fsdp2")
    result = subprocess.run(command, cwd=server.folder, capture_output=True, text=True, timeout=250)
    assert result.returncode == 0, result.stderr
    outputs = server.launch("ddp", "pretrain", *RUN, TWO, "--output", "ddp").finish()
    return {"ddp": (server.folder / "ddp", "".join(outputs)), "fsdp2": (server.folder / "fsdp2", result.stdout)}


@pytest.fixture(scope="module")
def resumed(server, launched) -> dict[str, Path]:
    """The same training, killed after its first checkpoint and started again, by configuration."""
    folders = {}
    for config in launched:
        folder = folders[config] = server.folder / f"{config}-resumed"
        command = (config, "pretrain", *RUN, TWO, "--output", folder.name)
        launch = server.launch(*command)
        assert launch.runs[0].wait_for((folder / "checkpoint-2").exists)
        launch.kill()
        assert not (folder / "results.json").exists()
        first, second = server.launch(*command).finish()
        assert f"going on from {folder.name}/checkpoint-2" in first and "going on" not in second
    return folders


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_same_losses(config, single, launched):
    """Two processes, accumulating gradients, have the losses, gradient norms and looks of one, to rounding; one of
    them sums up, in JSON."""
    folder, printed = launched[config]
    check_same_curve(folder, single, REORDERED)
    losses = [line["loss"] for line in read_lines(single / "metrics.jsonl") if "loss" in line]
    assert min(abs(after - before) for before, after in zip(losses, losses[1:])) > 100 * REORDERED * max(losses)
    summary = json.loads(printed)
    results = [json.loads((path / "results.json").read_text()) for path in (folder, single)]
    for name in ("steps", "tokens", "parameters", "depth_parameters"):
        assert summary[name] == results[0][name] == results[1][name]
    check_same_weights(weights(folder), weights(single), tolerance=1e-5)
    files = [{path.name for path in run.iterdir() if path.suffix != ".pt"} for run in (folder, single)]
    assert files[0] == files[1]


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_resume(config, launched, resumed):
    """A killed run ends with the losses, looks and weights of the undisturbed one, bit for bit."""
    assert without_times(resumed[config]) == without_times(launched[config][0])
    check_same_weights(weights(resumed[config]), weights(launched[config][0]))


def test_killed_launcher(server):
    """With it end the processes that it started, which would keep the run folder from the same command."""
    command = accelerate_launch(
        "ddp", *RUN, "--steps=100000", "--eval-steps=1000", "--save-steps=1000", "--output", "launcher"
    )
    launcher = subprocess.Popen(command, cwd=server.folder)
    while not (server.folder / "launcher" / "metrics.jsonl").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    started = psutil.Process(launcher.pid).children(recursive=True)
    launcher.kill()
    launcher.wait()
    _, remaining = psutil.wait_procs(started, timeout=10)
    alive = [process for process in remaining if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        process.kill()
    assert len(started) == 2 and not alive


@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_depth_attention(config, resumed):
    """Depth attention is trained, the same in all processes and what is saved; FSDP2 has really cut up all weights."""
    folder = resumed[config]
    first, second = (torch.load(folder / f"rank-{index}.pt") for index in range(2))
    saved = weights(folder)
    assert first.keys() == second.keys() == saved.keys()
    for name, tensor in saved.items():
        assert torch.equal(first[name]["whole"], tensor) and torch.equal(second[name]["whole"], tensor), name
        here = [first[name]["here"], second[name]["here"]]
        assert here == [tensor.numel()] * 2 if config == "ddp" else sum(here) == tensor.numel() and all(here), name
    query, key_norm = (saved[f"model.depth_attention.{name}"] for name in ("query", "key_norm"))
    assert query[0].eq(0).all()  # its read has one source
    assert query[1:].ne(0).any(1).all() and (key_norm[1:] - 1).ne(0).any(1).all()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert isinstance(model, attnres.AttnResForCausalLM)
    check_same_weights(model.state_dict(), saved)


def test_sharded_checkpoint_in_one_process(launched, tmp_path):
    """What FSDP2 has written in pieces loads without processes: merged by accelerate, and by torch."""
    folder, _ = launched["fsdp2"]
    expected = weights(folder)
    checkpoint = shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint")
    pieces = checkpoint / "pytorch_model_fsdp_0"
    assert len(list(pieces.glob("*.distcp"))) == 2 and not (checkpoint / "model.safetensors").exists()
    merge_fsdp_weights(str(pieces), str(checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    check_same_weights(model.state_dict(), expected)
    assert AutoTokenizer.from_pretrained(checkpoint)("import os")["input_ids"]
    untrained = attnres.AttnResForCausalLM(model.config)
    state = {"model": untrained.state_dict()}
    dist_cp.load(state, checkpoint_id=pieces, no_dist=True)
    untrained.load_state_dict(state["model"])
    check_same_weights(untrained.state_dict(), expected)


def test_muon(server, single):
    """Muon orthogonalises whole matrices also where they are cut up, and resumes."""
    options = [*RUN, "--optimizer=muon"]
    server.launch("", "pretrain", *options, ONE, "--output", "muon").finish()
    command = ("fsdp2", "pretrain", *options, TWO, "--output", "muon-fsdp2")
    launch = server.launch(*command)
    assert launch.runs[0].wait_for((server.folder / "muon-fsdp2" / "checkpoint-2").exists)
    launch.kill()
    server.launch(*command).finish()
    check_same_curve(server.folder / "muon-fsdp2", server.folder / "muon", MUON)


def test_bf16(server):
    """FSDP2 in bfloat16 trains as one process does, to that precision, with its weights in float32 and exact losses."""
    options = [*RUN, "--bf16"]
    server.launch("", "pretrain", *options, ONE, "--output", "bf16").finish()
    server.launch("fsdp2", "pretrain", *options, TWO, "--output", "bf16-fsdp2").finish()
    runs = [read_lines(server.folder / name / "metrics.jsonl") for name in ("bf16", "bf16-fsdp2")]
    for line, expected in zip(*runs, strict=True):
        name = "loss" if "loss" in line else "held_out_loss"
        assert line[name] == pytest.approx(expected[name], rel=5e-4)  # 8 bits, over the tokens of a step
        assert torch.tensor(line[name]).bfloat16().item() != line[name]
    assert {tensor.dtype for tensor in weights(server.folder / "bf16-fsdp2").values()} == {torch.float32}


def test_lora(server, single):
    """Adapters and depth attention under FSDP2: the losses of one process, and an adapter that loads in one."""
    sums = [{"prompt": f"What is {a} plus {b}?", "completion": f" It is {a + b}."} for a in range(9) for b in range(9)]
    (server.folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    options = ["--model=single/model", "--data=sums.jsonl", "--method=lora", "--learning-rate=0.01", *STEPS]
    server.launch("", "finetune", *options, ONE, "--output", "lora").finish()
    server.launch("fsdp2", "finetune", *options, TWO, "--output", "lora-fsdp2").finish()
    folder, expected = server.folder / "lora-fsdp2", server.folder / "lora"
    for line, expected_line in zip(without_times(folder), without_times(expected), strict=True):
        for name, value in line.items():
            # adapters' second matrices start at zero, and the first step of Adam makes much of little
            assert value == pytest.approx(expected_line[name], rel=1e-4, abs=1e-4), (name, line["step"])
    losses = [line["held_out_loss"] for line in read_lines(folder / "metrics.jsonl") if "held_out_loss" in line]
    assert losses[-1] < losses[0] - 0.01
    here = torch.load(folder / "rank-0.pt"), torch.load(folder / "rank-1.pt")
    trained = [name for name in here[0] if "lora_B" in name]
    assert trained and all(
        sum(rank[name]["here"] for rank in here) == here[0][name]["whole"].numel() for name in trained
    )
    base = AutoModelForCausalLM.from_pretrained(single / "model")
    adapted = PeftModel.from_pretrained(base, folder / "model")
    state = dict(adapted.named_parameters())
    for name in (*trained, *(name for name in here[0] if "depth_attention.modules_to_save" in name)):
        assert torch.equal(state[name], here[0][name]["whole"]), name
        assert state[name].ne(0).any()


def test_buffers(server, single):
    """FSDP2 trains families whose checkpoints hold buffers as one process does, also after a kill, and saves them."""
    sizes = {"vocab_size": 300, "max_position_embeddings": 64, "num_hidden_layers": 3}
    model = perturb(tiny_model("deepseek_v3", **sizes))
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(generator=torch.Generator().manual_seed(0))
    model.save_pretrained(server.folder / "deepseek_v3")
    AutoTokenizer.from_pretrained(single / "model").save_pretrained(server.folder / "deepseek_v3")
    command = ("pretrain", "--model=deepseek_v3", *STEPS, "--data=text")  # also the name of a model type
    server.launch("", *command, ONE, "--output", "buffers-single").finish()
    command = ("fsdp2", *command, TWO, "--output", "buffers")
    launch = server.launch(*command)
    assert launch.runs[0].wait_for((server.folder / "buffers" / "checkpoint-2").exists)
    launch.kill()
    outputs = server.launch(*command).finish()
    assert not any("Warning" in output for output in outputs), outputs
    check_same_curve(server.folder / "buffers", server.folder / "buffers-single", REORDERED)
    saved = weights(server.folder / "buffers")
    biases = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    assert biases and all(torch.equal(saved[name], buffer) and buffer.any() for name, buffer in biases.items())


@pytest.fixture(scope="module")
def broken(server, single) -> Path:
    """A checkpoint that knows one token by NaN alone, and a folder of documents, one of which has that token."""
    folder = shutil.copytree(single / "model", server.folder / "broken")
    token = AutoTokenizer.from_pretrained(folder)("Ö")["input_ids"][-1]  # a byte of no other character here
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.get_input_embeddings().weight.data[token] = torch.nan
    model.save_pretrained(folder)
    documents = server.folder / "documents"
    documents.mkdir()
    for path in sorted((server.folder / "text").iterdir())[:12]:
        text = path.read_text()
        (documents / path.name).write_text(text[:300] + "Ö" * (path.name == "05.txt") + text[300:])
    return folder


def test_one_process_fails(server, broken):
    """A loss that isn't a number in one process stops all, with one message that names that process's documents."""
    options = ["--model=broken", "--data=documents", *STEPS, "--steps=40", TWO]
    outputs = server.launch("ddp", "pretrain", *options, "--output", "nan").finish(exit_code=1)
    failure = json.loads((server.folder / "nan" / "failure.json").read_text())
    assert failure["value"] == "nan"  # of one process
    seen, *lines = sorted((line for output in outputs for line in output.splitlines()), key=lambda line: "nan" in line)
    assert "tokens, which are seen" in seen
    assert len(lines) == 1 and f"the loss is nan at step {failure['step']}" in lines[0], lines
    assert 5 in failure["documents"] and len(failure["batch"]) in (2, 4) and any("Ö" in b for b in failure["batch"])
    assert not (server.folder / "nan" / "results.json").exists()


def test_refusals(server, single, launched):
    """Bad input to two processes gives one line, from one of them."""
    refused = {
        "absent.txt doesn't exist": ("ddp", *RUN, TWO, "--data=absent.txt", "--output=refused"),
        "single holds a run with processes = 1, not 2": ("ddp", *RUN, ONE, "--output=single"),
        "ddp holds a run with sharding = None, not FSDP": ("fsdp2", *RUN, TWO, "--output=ddp"),
        "start processes themselves": ("ddp", *RUN, TWO, "--compare=donor,block", "--output=refused-comparison"),
    }
    if importlib.util.find_spec("deepspeed") is None:
        refused["ZeRO-3 needs DeepSpeed: pip install deepspeed"] = ("zero3", *RUN, TWO, "--output=refused-zero3")
    for message, (config, *options) in refused.items():
        outputs = server.launch(config, "pretrain", *options).finish(exit_code=1)
        lines = [line for output in outputs for line in output.splitlines()]
        assert len(lines) == 1 and message in lines[0], lines


def test_zero3(server, single):
    """ZeRO-3 has the losses of one process too, resumes exactly, and leaves a whole model."""
    pytest.importorskip("deepspeed")
    folders = [server.folder / name for name in ("zero3", "zero3-resumed")]
    command = ("zero3", "pretrain", *RUN, TWO, "--depth-every=0", "--output")
    server.launch(*command, "zero3").finish()
    launch = server.launch(*command, "zero3-resumed")
    assert launch.runs[0].wait_for((folders[1] / "checkpoint-2").exists)
    launch.kill()
    server.launch(*command, "zero3-resumed").finish()
    expected = read_lines(single / "metrics.jsonl")
    for line in expected:
        if "depth_grad_norm" in line:  # DeepSpeed knows one norm alone
            line["grad_norm"] = math.hypot(line["grad_norm"], line.pop("depth_grad_norm"))
    for folder in folders:
        for line, other in zip(read_lines(folder / "metrics.jsonl"), expected, strict=True):
            assert line.keys() == other.keys()
            assert all(line[name] == pytest.approx(other[name], rel=REORDERED) for name in line if name not in TIMES)
        check_same_weights(weights(folder), weights(single), tolerance=1e-5)
    first, second = map(weights, folders)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_configurations(monkeypatch):
    """Each says how it is run, names no class of a model, and accelerate understands it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for config in ("ddp", "fsdp2", "zero3"):
        text = (CONFIGS / f"{config}.yaml").read_text()
        assert f"accelerate launch --config_file scripts/accelerate/{config}.yaml --num_processes" in text
    assert "ACCELERATE_USE_FSDP" not in environment("ddp", 2)
    fsdp2 = environment("fsdp2", 2)
    assert fsdp2["ACCELERATE_USE_FSDP"] == "true" and fsdp2["FSDP_VERSION"] == "2"
    assert fsdp2["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT" and "FSDP_TRANSFORMER_CLS_TO_WRAP" not in fsdp2
    zero3 = environment("zero3", 2)
    assert zero3["ACCELERATE_USE_DEEPSPEED"] == "true" and zero3["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "3"
    assert zero3["ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL"] == "true"


def test_muon_and_deepspeed(monkeypatch):
    """Muon isn't given matrices in pieces."""
    model = torch.nn.ModuleDict({"layers": torch.nn.Linear(6, 6)})
    new_optimizer(model, "muon")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    new_optimizer(model, "adamw")
    with pytest.raises(ValueError, match="use AdamW"):
        new_optimizer(model, "muon")
