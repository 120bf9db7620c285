# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pretraining, run as users run it: in processes, on real text, at the smallest sizes."""

import gzip
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import get_args, get_type_hints

import datasets
import numpy as np
import pytest
import torch
from attnres_convert import InputError
from attnres_recipes import data, figures, optim, packing
from attnres_recipes.folders import WORK_NAME
from attnres_recipes.hardware import has_bfloat16
from attnres_recipes.options import FinetuneOptions, PretrainOptions, TrainingOptions
from attnres_recipes.run import open_run, unlock
from attnres_recipes.start import scaled_model
from attnres_recipes.trainer import check_saved
from families import (
    FAMILIES,
    perturb,
    relative_error,
    tiny_config,
    tiny_donor_config,
    tiny_qwen3_next_config,
)
from marks import mostly_slow
from PIL import Image
from pretrain_process import SCRIPTS, SIZES, TINY, Server
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, LlamaConfig, LlamaForCausalLM, RwkvConfig

import attnres


sys.path.insert(0, str(SCRIPTS))

import finetune  # noqa: E402
import pretrain  # noqa: E402


SHALLOW = ["--set", "num_hidden_layers=1", *SIZES[1:]]
RUN = [*TINY, "--steps", 8, "--save-steps", 2, "--eval-steps", 4, "--accumulate", 2, "--depth-every", 3]
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 99}
TIMES = ("tokens_per_second", "seconds")


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_times(folder: Path) -> list[dict]:
    """All that a run logged but how long it took."""
    lines = read_lines(folder / "metrics.jsonl") + read_lines(folder / "depth.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        server = Server(tmp_path_factory.mktemp("pretrain"))
        yield server
        server.stop()


@pytest.fixture(scope="module")
def text(server) -> Path:
    """A folder of 80 documents."""
    folder = server.folder / "text"
    folder.mkdir()
    source = "".join(file.read_text(errors="replace") for file in data.stdlib_files()[:12])
    for index in range(80):
        (folder / f"{index:02d}.txt").write_text(source[800 * index : 800 * index + 500 + 7 * index])
    return folder


@pytest.fixture(scope="module")
def finished(server, text) -> tuple[Path, str]:
    """A run's folder and what it printed."""
    printed = server.run(*RUN, "--data", text, "--output", "finished")
    return server.folder / "finished", printed


@pytest.fixture(scope="module")
def tokenizer(finished):
    return AutoTokenizer.from_pretrained(finished[0] / "tokenizer")


def test_run_folder(finished):
    """Model, log, figures and numbers are there and agree, nothing else is, and the last line sums up in JSON."""
    folder, printed = finished
    files = {"run.json", "data.json", "metrics.jsonl", "depth.jsonl", "results.json", "loss.png"}
    folders = {"tokenizer", "tensorboard", "model", "checkpoint-6", "checkpoint-8"}
    assert {path.name for path in folder.iterdir()} == files | folders
    run, results = (json.loads((folder / name).read_text()) for name in ("run.json", "results.json"))
    assert run["arguments"]["steps"] == 8 and run["versions"]["torch"] == torch.__version__
    summary = json.loads(printed.splitlines()[-1])
    assert summary["held_out_loss"] == results["held_out_loss"] and summary["tokens"] == 8 * 2 * 4 * 32
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in metrics if "held_out_loss" in line] == [4, 8]
    assert metrics[-1]["held_out_loss"] == results["held_out_loss"] < metrics[0]["loss"]
    assert [line["step"] for line in read_lines(folder / "depth.jsonl")] == [0, 3, 6, 8]
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(
        [line["loss"] for line in metrics if "loss" in line]
    )
    with Image.open(folder / "loss.png") as image:
        assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 50


def test_held_out_loss(finished, tokenizer, text):
    """The reported loss is that of the saved model on the held-out documents, recomputed from the text."""
    folder, _ = finished
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    assert isinstance(model, attnres.AttnResForCausalLM)
    limit = int(0.05 * 2**63)
    texts = [file.read_text() for file in text.iterdir()]
    held_out = sorted((data.text_hash(text), text) for text in texts)
    tokens, documents = [], []
    for number, (value, document) in enumerate(held_out):
        if value < limit:
            ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id]
            tokens, documents = tokens + ids, documents + [number] * len(ids)
    assert len(tokens) >= 2 * 32
    losses = []
    for start in range(0, len(tokens) // 32 * 32, 32):
        ids, owners = tokens[start : start + 32], documents[start : start + 32]
        logits = torch.cat(  # each document by itself
            [
                model(input_ids=torch.tensor([[i for i, o in zip(ids, owners) if o == owner]])).logits[0]
                for owner in dict.fromkeys(owners)
            ]
        )
        losses.append(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item())
    results = json.loads((folder / "results.json").read_text())
    assert results["held_out_sequences"] == 64 < len(losses)
    spread = [losses[round(index * (len(losses) - 1) / 63)] for index in range(64)]
    assert results["held_out_loss"] == pytest.approx(np.mean(spread), rel=1e-5)


def test_sigkill(server, text, finished):
    """Killed at many moments and started again, a run ends with the losses, looks and weights of the undisturbed one,
    bit for bit; whatever checkpoint there is after a kill is complete."""
    command = [*RUN, "--data", text, "--output", "killed"]
    folder, kills = server.folder / "killed", 0
    work = folder / WORK_NAME

    def has_logged(step):
        path = folder / "metrics.jsonl"
        return lambda: path.exists() and any(f'"step": {step},' in line for line in path.open())

    moments = [*(has_logged(step) for step in (1, 3, 5)), (work / "checkpoint-6").exists, has_logged(8)]
    moments.append((work / "model").exists)
    for moment in moments:
        run = server.start(*command)
        if not run.wait_for(moment):
            continue
        run.kill()
        kills += 1
        for checkpoint in folder.glob("checkpoint-*"):
            assert load_file(checkpoint / "model.safetensors").keys()
            step = int(checkpoint.name.split("-")[1])
            assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == step
            for name in ("optimizer.pt", "scheduler.pt"):
                torch.load(checkpoint / name, weights_only=True)
            torch.load(checkpoint / "rng_state.pth", weights_only=False)
    assert kills >= 5
    assert "going on from" in server.run(*command) or (folder / "results.json").exists()
    assert without_times(folder) == without_times(finished[0])
    assert_same_model(folder, finished[0])
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished[0].iterdir()}
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, 9))


def assert_same_model(one: Path, other: Path):
    weights, expected = (load_file(folder / "model" / "model.safetensors") for folder in (one, other))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)


EXACT = {
    "muon": "--optimizer muon --schedule wsd --bf16 --gradient-checkpointing",
    "stream": "--streaming --shuffle-buffer 8",
    "dropout": f"--set {' '.join(SIZES)} attention_dropout=0.2",
    "experts": f"--config mixtral --set {' '.join(SIZES)} num_local_experts=4 num_key_value_heads=2",
    "donor": f"--config qwen3_moe --mode donor --set {' '.join(SIZES)} num_experts=4 moe_intermediate_size=16"
    " num_key_value_heads=2 num_experts_per_tok=2",
}


@pytest.mark.parametrize("name", mostly_slow(EXACT, "muon", "stream"))
def test_sigkill_with(name, server, text):
    """Muon, WSD, bf16, checkpointing, a stream, dropout and experts resume exactly too, also after the last step."""
    command = [*RUN, "--data", text, *EXACT[name].split()]
    folder, undisturbed = server.folder / f"exact-{name}", server.folder / f"undisturbed-{name}"
    printed = server.run(*command, "--output", undisturbed)
    is_slow = "--bf16" in command and has_bfloat16() is False
    assert ("no instructions for bfloat16" in printed) == is_slow
    for moment in (folder / "checkpoint-4", folder / WORK_NAME / "model"):
        run = server.start(*command, "--output", folder)
        assert run.wait_for(moment.exists)
        run.kill()
    assert "going on from" in server.run(*command, "--output", folder)
    assert without_times(folder) == without_times(undisturbed)
    assert_same_model(folder, undisturbed)
    assert {path.name for path in folder.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}


def test_damaged_checkpoints(server, text):
    """A checkpoint that lacks something or has lost the end of it is named, and the run goes on from the one before."""
    command, folder = [*RUN, "--data", text, "--output", "damaged"], server.folder / "damaged"
    run = server.start(*command)
    assert run.wait_for((folder / "checkpoint-6").exists)
    run.kill()
    last, before, *_ = sorted(folder.glob("checkpoint-*"), reverse=True)  # an older one may not be gone yet
    for number, damage in ((1, lambda path: path.unlink()), (2, lambda path: path.write_bytes(path.read_bytes()[:-9]))):
        damage(last / "optimizer.pt")
        run, kept = server.start(*command), folder / f"{last.name}.damaged-{number}"
        assert run.wait_for(lambda: kept.exists() and last.exists())  # noqa: B023
        run.kill()
        assert f"{last.name} is damaged, see its optimizer.pt; it is now {kept.name}" in run.output()
        assert f"going on from damaged/{before.name}" in run.output()
    (folder / "run.json").write_text("{")
    message = server.run(*command, exit_code=1)
    assert message.count("\n") == 1 and "run.json is not valid JSON" in message


def test_one_process_trains_in_a_folder(server, text):
    """A second one doesn't disturb the first."""
    command = [*RUN, "--data", text, "--output", "occupied", "--steps", 100_000]
    run = server.start(*command)
    assert run.wait_for((server.folder / "occupied" / "checkpoint-2").exists)
    message = server.run(*command, exit_code=1)
    assert message.count("\n") == 1 and "another process trains in occupied" in message
    assert run.process.is_alive()
    run.kill()


def test_finished_run_is_left_alone(server, text, finished):
    """The same command after the end repeats the numbers; another one in the same folder is refused."""
    folder, printed = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    again = server.run(*RUN, "--data", text, "--output", "finished")
    assert json.loads(again.splitlines()[-1]) == json.loads(printed.splitlines()[-1])
    message = server.run(*RUN, "--data", text, "--output", "finished", "--learning-rate", 0.1, exit_code=1)
    assert message.count("\n") == 1 and "learning_rate = 0.001, not 0.1" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()} == before


def test_changed_data_are_noticed(server, text):
    """An interrupted run doesn't go on with other documents."""
    shutil.copytree(text, server.folder / "changing")
    command = [*RUN, "--data", "changing", "--output", "with-changing"]
    run = server.start(*command)
    assert run.wait_for((server.folder / "with-changing" / "checkpoint-2").exists)
    run.kill()
    (server.folder / "changing" / "00.txt").write_text("This is another text than before. " * 40)
    message = server.run(*command, exit_code=1)
    assert message.count("\n") == 1 and "the data have changed" in message


def test_data_are_cached(server, text, finished):
    """A second run with the same text and tokenizer prepares nothing."""
    cached = {path: path.stat().st_mtime_ns for path in (server.folder / "cache").rglob("*.arrow")}
    assert cached
    server.run(*RUN, "--data", text, "--seq-len", 16, "--output", "cached")
    assert {path: path.stat().st_mtime_ns for path in (server.folder / "cache").rglob("*.arrow")} == cached


def read_failure(folder: Path, message: str) -> dict:
    """What a run that stopped at a number left behind, after a check that its message says the same."""
    failure = json.loads((folder / "failure.json").read_text())
    assert f" at step {failure['step']}, with documents {failure['documents'][0]}" in message
    assert message.count("\n") == 1 and not (folder / "results.json").exists()
    steps = sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
    if steps:
        assert Path(failure["checkpoint"]).name == f"checkpoint-{steps[-1]}"
        assert f"the last good checkpoint is checkpoint-{steps[-1]}" in message
    else:
        assert failure["checkpoint"] is None and "there is no good checkpoint" in message
    assert message.endswith(f"{folder.name}.\n")
    return failure


def test_loss_that_is_not_a_number(server, donor, text):
    """The run stops before the step is taken, and names the step, the documents and the last good checkpoint. Here one
    token, which one document has, is broken in the embedding."""
    shutil.copytree(text, server.folder / "odd")
    (server.folder / "odd" / "40.txt").write_text("\u00a7" * 40)
    broken = server.folder / "broken-token"
    shutil.copytree(donor, broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.model.embed_tokens.weight[AutoTokenizer.from_pretrained(broken).encode("\u00a7")[-1]] = torch.nan
    model.save_pretrained(broken)
    command = ["--model", broken, *CONTINUE, "--steps", 200, "--data", server.folder / "odd", "--accumulate", 2]
    for again in range(2):  # the same command fails at the same batch
        message = server.run(*command, "--output", "nan", exit_code=1)
        failure = read_failure(server.folder / "nan", message.splitlines(keepends=True)[-1])
        assert failure["what"] == "loss" and failure["step"] > 1 and 40 in failure["documents"]
        assert failure["checkpoint"] == f"nan/checkpoint-{failure['step'] - 1}"
        assert len(failure["batch"]) in (4, 8)  # one or both micro-batches
        assert any("\u00a7" in text for text in failure["batch"])
        assert ("going on from" in message) == bool(again)


def test_failed_run_of_a_comparison(server, text):
    """It has a row in the table, and the same command doesn't train it again, until its failure is removed."""
    command = [*TINY, *SHALLOW, "--data", text, "--steps", 3, "--warmup", 1, "--sweep", "learning_rate=1e-3,1e28"]
    folder = server.folder / "one-fails"
    assert "| none: gradient norm of depth attention nan at step 2" in server.run(*command, "--output", folder)
    failure = folder / "learning_rate=1e28" / "failure.json"
    begun = failure.stat().st_mtime_ns
    again = server.run(*command, "--output", folder)
    assert f"learning_rate=1e28 failed before, and isn't trained again; remove {failure} to try it once more" in again
    assert failure.stat().st_mtime_ns == begun and "| none: gradient norm of depth attention nan at step 2" in again
    failure.unlink()
    assert "failed before" not in server.run(*command, "--output", folder)
    assert failure.stat().st_mtime_ns > begun


@pytest.mark.parametrize("evaluated", [True, False])
def test_model_that_breaks(evaluated, server, text):
    """A step that breaks the model is noticed before a checkpoint of it is written, with or without an evaluation."""
    command = [*RUN, "--data", text, "--learning-rate", 1e28, "--save-steps", 1, "--warmup", 1, "--steps", 10]
    command += ["--keep-checkpoints", 1, "--eval-steps", 1 if evaluated else 10, "--depth-lr-scale", 1]
    folder = server.folder / "whose-name-is-not-a-short-one" / f"breaks-{evaluated}"
    message = server.run(*command, "--output", folder, exit_code=1)
    failure = read_failure(folder, message.splitlines(keepends=True)[-1])
    assert failure["what"] == "held-out loss" and failure["step"] == 2  # the first has a learning rate of 0
    tensors = load_file(folder / "checkpoint-1" / "model.safetensors").values()
    assert all(tensor.isfinite().all() and tensor.abs().max() < 10 for tensor in tensors)
    words = [word for word in failure["batch"][0].split("<eos>")[0].replace("<bos>", "").splitlines() if len(word) > 9]
    texts = [file.read_text() for file in sorted(text.iterdir())]
    assert any(words[0] in texts[row] for row in failure["documents"])


def cosine(share: float) -> float:
    return 0.55 + 0.45 * np.cos(np.pi * share)


RISE = [0, 0.5]
RATES = {
    "--schedule cosine": [*RISE, *(cosine(step / 17) for step in range(18))],
    "--schedule wsd": [0.1, 0.55, *[1] * 14, *(cosine(step / 4) for step in range(1, 5))],
    "--schedule wsd --decay 0.01": [0.1, 0.55, *[1] * 17, 0.1],
    "--schedule wsd --decay 1": [0.1, 0.55, *(cosine(step / 17) for step in range(18))],
    "--schedule constant": [*RISE, *[1] * 18],
    "--schedule cosine --steps 1": [1],
    "--schedule wsd --steps 2": [1, 0.1],
}


@pytest.mark.parametrize("options", RATES)
def test_learning_rates(options, server, text):
    """Schedules end at the least learning rate with the last step that is taken."""
    folder = server.folder / options.replace(" ", "")
    short = ["--steps", 20, "--save-steps", 20, "--eval-steps", 20, "--eval-sequences", 4, "--depth-every", 0]
    server.run(*TINY, *SHALLOW, "--data", text, *short, *options.split(), "--output", folder)
    rates = [line["learning_rate"] for line in read_lines(folder / "metrics.jsonl") if "learning_rate" in line]
    assert rates == pytest.approx([0.001 * share for share in RATES[options]])


@pytest.mark.slow
def test_blocks_are_compared_with_the_donor(server, text, donor):
    """The size of blocks is for the runs that have blocks."""
    options = ["--data", text, "--steps", 1, "--depth-every", 0, "--seq-len", 32, "--block-size", 2]
    for start in (["--model", donor], ["--config", donor, "--tokenizer", donor]):
        folder = server.folder / f"blocks{start[0]}"
        server.run(*start, *options, "--compare", "donor,block,full", "--output", folder)
        config = json.loads((folder / "block" / "model" / "config.json").read_text())
        assert config["attn_res_block_size"] == 2


def test_few_steps(server, text):
    """A run that is shorter than the interval of its log is logged at its end."""
    server.run(*TINY, *SHALLOW, "--data", text, "--logging-steps", 5, "--steps", 2, "--output", "few-steps")
    assert [line["step"] for line in read_lines(server.folder / "few-steps" / "metrics.jsonl") if "loss" in line] == [
        1,
        2,
    ]  # the first is looked at


def test_full_disk(server, text):
    """A checkpoint that can't be written whole leaves nothing, the last one stays, and the run goes on from there.
    Here files may not grow beyond a size; what is written then fails as on a full disk."""
    command = [*RUN, "--steps", 200, "--save-steps", 2, "--data", text, "--output", "full-disk"]
    folder = server.folder / "full-disk"
    run = server.start(*command)
    assert run.wait_for((folder / "checkpoint-2").exists)
    resource.prlimit(run.process.pid, resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
    seen, message = run.finish(1).splitlines()
    assert "tokens, which are seen" in seen
    assert re.match("pretrain: can't write to full-disk, where .* MB are free: ", message)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    last = max(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert load_file(last / "model.safetensors").keys()
    run = server.start(*command)
    assert run.wait_for((folder / f"checkpoint-{int(last.name.split('-')[1]) + 2}").exists)
    run.kill()
    assert f"going on from full-disk/{last.name}" in run.output()


def test_folder_that_cannot_be_written():
    """An empty folder in which this user may not write is refused in one line, as one that can't be made is."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        user = os.geteuid()
        os.seteuid(user or 65534)  # root may write anywhere
        try:
            with pytest.raises(InputError, match=f"can't write to {folder}: Permission denied"):
                open_run(Path(folder), {})
        finally:
            os.seteuid(user)


def test_figure(monkeypatch, tmp_path):
    """Steps are whole numbers, and the legend tells what the faint lines are."""
    drawn, png = [], figures.png
    monkeypatch.setattr(figures, "png", lambda figure, *args: drawn.append(figure) or png(figure, *args))
    metrics = [{"step": step, "loss": 5.0, "held_out_loss": 5.0} for step in (1, 2)]
    figures.plot_losses({"donor": metrics, "block": metrics}, tmp_path / "figure.png", "two steps")
    assert all(float(tick).is_integer() for tick in drawn[0].axes[0].get_xticks())
    assert [entry.get_text() for entry in drawn[0].legends[0].get_texts()] == ["donor", "block", "training"]


def test_compare(server, text):
    """All modes start from the same function on the same batches, and end in one table and one figure."""
    short = [*TINY, *SHALLOW, "--data", text, "--steps", 4, "--depth-every", 0, "--learning-rate", 0.01]
    short += ["--train-tokenizer", 100_000]
    printed = server.run(*short, "--compare", "donor,denseformer", "--sweep", "seed=0", "--output", "compared")
    folder = server.folder / "compared"
    results = json.loads((folder / "comparison.json").read_text())["runs"]
    assert list(results) == ["donor seed=0", "denseformer seed=0"]
    lines = (folder / "comparison.md").read_text().splitlines()
    assert len(lines) == 4 and all(line in printed for line in lines)
    for (name, run), line in zip(results.items(), lines[2:]):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        numbers = [f"{run['held_out_loss']:.4f}", f"{run['tokens_per_second']:,.0f}"]
        numbers += [f"{run['peak_memory_bytes'] / 1e6:,.0f}", f"{run['parameters']:,}", f"{run['depth_parameters']:,}"]
        assert cells == [name, *numbers]
    metrics = [read_lines(Path(server.folder / run["output"]) / "metrics.jsonl") for run in results.values()]
    assert metrics[0][0]["loss"] == pytest.approx(metrics[1][0]["loss"], abs=1e-5)  # the plain sum
    assert metrics[0][-1]["held_out_loss"] != metrics[1][-1]["held_out_loss"]
    assert results["denseformer seed=0"]["depth_parameters"] == 9
    size = len(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    assert f"the data give a tokenizer of {size} tokens, not 100000" in printed
    for run in results.values():
        assert json.loads((server.folder / run["output"] / "model" / "config.json").read_text())["vocab_size"] == size
    with Image.open(folder / "comparison.png") as image:
        assert min(image.size) > 400
    assert json.loads(printed.splitlines()[-1])["held_out_loss"] == {n: r["held_out_loss"] for n, r in results.items()}
    # other runs are added, and those that are there are not trained again
    trained = [path.stat().st_mtime_ns for path in sorted(folder.glob("*/results.json"))]
    server.run(*short, "--compare", "donor,full", "--sweep", "seed=0,1", "--output", "compared")
    grown = json.loads((folder / "comparison.json").read_text())["runs"]
    assert list(grown) == [f"{mode} seed={seed}" for mode in ("donor", "full") for seed in (0, 1)]
    assert grown["donor seed=0"] == results["donor seed=0"]
    with Image.open(folder / "differences.png") as image:  # there are two seeds now
        assert min(image.size) > 150
    before = [folder / f"{mode},seed=0" / "results.json" for mode in ("denseformer", "donor")]
    assert [path.stat().st_mtime_ns for path in before] == trained
    fewer = server.run(*short, "--compare", "donor,full", "--sweep", "seed=0", "--output", "compared")
    assert "kept" not in fewer and not (folder / "differences.png").exists()
    other = [*short, "--steps", 5, "--compare", "donor,full", "--output", "compared"]
    assert "holds a run with steps = 4, not 5" in server.run(*other, exit_code=1)


def test_comparisons_are_no_runs(tmp_path):
    """What grows is a comparison; a run doesn't become one, nor the other way round."""
    run, comparison = {"steps": 4}, {"steps": 4, "compare": ["donor"], "sweep": []}
    for first, second in ((run, comparison), (comparison, run)):
        folder = tmp_path / str(len(first))
        open_run(folder, first)
        with pytest.raises(InputError, match="holds a run with compare = "):
            open_run(folder, second)
        unlock(folder)


def test_modes_start_from_the_same_weights():
    """Of one seed, a donor and its AttnRes forms share all weights but depth attention."""
    torch.manual_seed(3)
    donor = LlamaForCausalLM(LlamaConfig(**SMALL)).state_dict()
    for mode in ("block", "full", "denseformer", "full_low_rank", "mhc"):
        torch.manual_seed(3)
        model = attnres.AttnResForCausalLM(attnres.AttnResConfig(**SMALL, attn_res_mode=mode)).state_dict()
        assert {name for name in model if "depth_attention" not in name} == donor.keys()
        assert all(torch.equal(model[name], donor[name]) for name in donor)


@pytest.mark.parametrize("family", FAMILIES)
def test_scaled_first_weights(family):
    """Matrices are as large as 1/sqrt(hidden size), and those whose output is added up over depth 1/sqrt(2 layers) of
    that, in every family; a donor's and an AttnRes model's are the same."""
    models = []
    for config in (tiny_donor_config(family), tiny_config(family)):
        torch.manual_seed(4)
        models.append(scaled_model(config))
    donor, model = models
    width, depth = donor.config.hidden_size, donor.config.num_hidden_layers
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in donor.state_dict().items())
    written = {"o_proj", "down_proj", "c_proj"}
    seen = defaultdict(list)
    for name, tensor in donor.named_parameters():
        *_, module, kind = name.split(".")
        kind = kind if kind.endswith("_proj") else module
        if kind in {"q_proj", "gate_proj", "gate_up_proj", "c_fc", "embed_tokens", *written} and tensor.ndim > 1:
            seen[kind in written].append(tensor.std().item() * width**0.5)
    assert np.mean(seen[False]) == pytest.approx(1, rel=0.1)
    assert len(seen[True]) >= 2 * depth and np.mean(seen[True]) == pytest.approx((2 * depth) ** -0.5, rel=0.1)
    torch.manual_seed(4)
    default = AutoModelForCausalLM.from_config(tiny_donor_config(family))
    assert any(not torch.equal(donor.state_dict()[name], tensor) for name, tensor in default.state_dict().items())


def test_scaled_first_weights_of_unknown_layers():
    """A configuration without `initializer_range`, or with other layers, is refused."""
    with pytest.raises(InputError, match="doesn't know the layers of bloom; use --init default"):
        scaled_model(BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(InputError, match="needs initializer_range, which rwkv doesn't have"):
        scaled_model(RwkvConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2))


def test_implementation_of_reads(server, text):
    """The one that is asked for computes the reads, which gives the same losses; one that there isn't is refused."""
    short = [*TINY, *SHALLOW, "--data", text, "--steps", 2, "--depth-every", 0, "--attn-res-implementation"]
    losses = {}
    for name in ("eager", "two_phase"):
        server.run(*short, name, "--output", f"by-{name}")
        lines = read_lines(server.folder / f"by-{name}" / "metrics.jsonl")
        losses[name] = [line["loss"] for line in lines if "loss" in line]
    assert losses["eager"] == pytest.approx(losses["two_phase"], rel=1e-6)
    printed = server.run(*short, "fastest", "--output", "by-none", exit_code=1)
    assert "--attn-res-implementation: " in printed and "fastest" in printed and "two_phase" in printed
    assert not (server.folder / "by-none").exists()


@pytest.fixture(scope="module")
def donor(server, tokenizer) -> Path:
    """A Llama checkpoint."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(**sizes, **ids, vocab_size=len(tokenizer), max_position_embeddings=64)
    folder = server.folder / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


CONTINUE_OPTIONS = {
    "seq-len": 32,
    "batch-size": 4,
    "steps": 3,
    "save-steps": 1,
    "depth-every": 0,
    "learning-rate": 0.01,
}
CONTINUE = [f"--{name}={value}" for name, value in CONTINUE_OPTIONS.items()]


def test_training_on(server, text, donor):
    """A donor's checkpoint is converted on the way, trained as it is with `--mode donor`, and a trained AttnRes
    checkpoint goes on; the first loss is the donor's in all forms."""
    first = {}
    modes = ("donor", "block", "full", "denseformer", "mhc")
    for mode in modes:
        server.run("--model", donor, "--mode", mode, *CONTINUE, "--data", text, "--output", f"on-{mode}")
        before, line = read_lines(server.folder / f"on-{mode}" / "metrics.jsonl")[:2]
        assert before["step"] == 0
        first[mode] = (before["held_out_loss"], line["loss"])
        model = AutoModelForCausalLM.from_pretrained(server.folder / f"on-{mode}" / "model")
        assert getattr(model.config, "attn_res_mode", "donor") == mode
    for losses in zip(*first.values()):
        assert losses == pytest.approx([losses[0]] * len(modes), abs=1e-5)
    server.run("--model", "on-block/model", *CONTINUE, "--data", text, "--output", "on-on")
    losses = [read_lines(server.folder / name / "metrics.jsonl") for name in ("on-block", "on-on")]
    assert losses[1][1]["loss"] < losses[0][1]["loss"]  # the same batch, three steps later
    message = server.run(
        "--model", "on-block/model", "--mode", "full", *CONTINUE, "--data", text, "--output", "no", exit_code=1
    )
    assert message.count("\n") == 1 and "was trained in block mode" in message


@pytest.mark.parametrize("model_type", ["kimi_linear", "qwen3_next"])
def test_recurrent_layers(server, text, model_type):
    """Of models whose recurrent layers mix the documents of a sequence, as Kimi Linear's don't, a line says so."""
    config = tiny_config("kimi_linear") if model_type == "kimi_linear" else tiny_qwen3_next_config()
    config.to_json_file(server.folder / f"{model_type}.json")
    options = ["--steps", 1, "--depth-every", 0, "--eval-sequences", 4, "--data", text]
    tiny = ["--train-tokenizer", 300, "--seq-len", 32, "--batch-size", 2]
    command = ["--config", f"{model_type}.json", "--mode", "donor", *tiny, *options, "--output", model_type]
    printed = server.run(*command)
    assert printed.count("recurrent layers") == (model_type == "qwen3_next")


@pytest.mark.slow
def test_compile(server, text):
    """`--compile` trains to the same losses, to rounding."""
    command = [*TINY, *SHALLOW, "--data", text, "--steps", 2, "--eval-steps", 2, "--depth-every", 2]
    server.run(*command, "--output", "eager")
    server.run(*command, "--compile", "--output", "compiled")
    eager, compiled = (without_times(server.folder / name) for name in ("eager", "compiled"))
    for one, other in zip(eager, compiled, strict=True):
        assert one.keys() == other.keys()
        assert all(one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5) for name in one)


# Data


def load(folder: Path, **options) -> datasets.Dataset:
    return data.load_documents([str(folder)], **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_packing(text, tokenizer, cache):
    """Sequences hold all tokens of the documents in order, without padding; positions restart with each document."""
    tokens = data.tokenized(load(text), tokenizer, "text")
    packed = data.PackedDocuments(tokens, 48)
    texts = [file.read_text() for file in sorted(text.iterdir())]
    expected = [(*tokenizer(text)["input_ids"], tokenizer.eos_token_id) for text in texts]
    flat = [(token, row, at) for row, ids in enumerate(expected) for at, token in enumerate(ids)]
    assert packed.num_tokens == len(flat) and len(packed) == len(flat) // 48 > 100
    for index in range(len(packed)):
        part, item = flat[48 * index : 48 * index + 48], packed[index]
        assert item["input_ids"].tolist() == [token for token, _, _ in part]
        assert item["documents"].tolist() == [row for _, row, _ in part]
        first = {row: at for _, row, at in reversed(part)}
        assert item["position_ids"].tolist() == [at - first[row] for _, row, at in part]
    with pytest.raises(IndexError):
        packed[len(packed)]


@pytest.mark.parametrize("mode", ["donor", "block"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_stays_within_documents(family, mode):
    """In a packed sequence each document has the logits that it has alone."""
    make_config = tiny_donor_config if mode == "donor" else tiny_config
    model = perturb(AutoModelForCausalLM.from_config(make_config(family)).eval(), std=0.2)
    model = packing.separate_documents(model)
    documents = np.repeat([4, 7, 8], [9, 5, 10])
    item = data.sequence(np.random.default_rng(0).integers(3, 67, 24), documents)
    batch = data.collate([item])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=ids[None]).logits for ids in item["input_ids"].split([9, 5, 10])]
    assert relative_error(packed, torch.cat(alone, dim=1)) < 1e-4


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_delta_attention_by_document(is_checkpointed):
    """Kimi Linear's logits and gradients are those of each document alone, whatever their lengths."""
    torch.manual_seed(0)
    model = perturb(AutoModelForCausalLM.from_config(tiny_config("kimi_linear")), std=0.2).train()
    lengths = [[1, 70, 129], [64, 65, 2, 1, 1, 67]]
    ids = torch.randint(3, 67, (2, 200), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])
    weights = torch.randn(2, 200, model.config.vocab_size, generator=torch.Generator().manual_seed(1))

    def gradients(logits):
        model.zero_grad()
        (logits * weights).sum().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    documents = [part for row, parts in zip(ids, lengths) for part in row.split(parts)]
    alone = torch.cat([model(input_ids=part[None], use_cache=False).logits for part in documents], 1).view_as(weights)
    expected = gradients(alone)
    packing.separate_documents(model)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert relative_error(packed, alone) < 1e-4
    found = gradients(packed)
    for name, gradient in expected.items():
        assert relative_error(found[name], gradient) < 1e-3, name
    model.eval()
    with torch.no_grad():  # generation isn't packed
        assert relative_error(model(input_ids=ids[1:, :64]).logits, alone[1:, :64]) < 1e-4


def test_patterns(text, cache):
    """A pattern in quotes stands for the files that it matches."""
    found = data.load_documents([str(text / "1*.txt"), str(text / "0[1-3].txt")])["text"]
    assert sorted(found) == sorted(file.read_text() for file in [*text.glob("1*.txt"), *text.glob("0[1-3].txt")])
    with pytest.raises(InputError, match=r"x\*\.txt doesn't exist"):
        data.load_documents([str(text / "x*.txt")])


def test_split_is_by_hash(text, tokenizer, cache, tmp_path):
    """A document's side depends on it alone, copies stay together, and both sides make up the whole."""

    def sides(folder):
        documents = load(folder)
        train, test = data.split_and_pack(data.tokenized(documents, tokenizer, "text"), 8, 0.2)
        rows = [{documents[row]["text"] for row in side.documents["document"].to_pylist()} for side in (train, test)]
        return rows

    train, test = sides(text)
    assert not train & test and train | test == {file.read_text() for file in text.iterdir()}
    assert 4 < len(test) < 30  # 80 documents, a fifth of them
    other = tmp_path / "other"
    other.mkdir()
    for index, file in enumerate(sorted(text.iterdir(), reverse=True)):
        if index % 3:
            shutil.copy(file, other / f"{index:02d}.txt")
            shutil.copy(file, other / f"{index:02d}-copy.txt")
    other_train, other_test = sides(other)
    assert other_train < train and other_test < test


def test_little_data_has_a_held_out_part(tokenizer, cache, tmp_path):
    """Where no document has a hash below the share, those with the lowest are held out until they make a sequence."""
    rows = data.held_out_rows(np.array([7, 3, 5, 3, 9]) << 58, 0.01, np.array([4, 2, 9, 2, 4]), at_least=6)
    assert rows.tolist() == [False, True, True, True, False]  # copies are on the same side
    assert data.held_out_rows(np.array([7, 3]) << 58, 0.5, np.array([1, 1])).tolist() == [True, True]
    for index in range(6):
        (tmp_path / f"{index}.txt").write_text(f"{index} " * 30)
    documents = load(tmp_path)
    train, test = data.split_and_pack(data.tokenized(documents, tokenizer, "text"), 40, 1e-9)
    assert len(test) > 0 and train.num_tokens > test.num_tokens
    hashes = [data.text_hash(text) for text in documents["text"]]
    assert sorted(test.hashes) == sorted(hashes)[: len(test.hashes)]


def test_streaming_gives_the_same_sequences(text, tokenizer, cache):
    """A stream packs the documents as the prepared data set does, and starts again at its end."""
    tokens = data.tokenized(load(text), tokenizer, "text")
    packed, _ = data.split_and_pack(tokens, 40, 0.2)
    stream = data.StreamedSequences(load(text, streaming=True), tokenizer, "text", 40, False, 0.2)
    assert len(list(stream.once())) == len(packed)
    for index, item in zip(range(len(packed) + 2), stream):
        assert all(torch.equal(item[name], packed[index % len(packed)][name]) for name in item)


def test_shuffled_order(text, tokenizer, cache):
    """Every epoch holds every sequence once, in an order of its own that the seed alone decides."""
    packed = data.PackedDocuments(data.tokenized(load(text), tokenizer, "text"), 500)
    count = len(packed)

    def order(seed):
        shuffled = data.ShuffledSequences(packed, 2 * count + 1, seed)
        numbers = {tuple(packed[index]["input_ids"].tolist()): index for index in range(count)}
        torch.rand(seed + 1)  # other random numbers don't matter
        return [numbers[tuple(shuffled[index]["input_ids"].tolist())] for index in range(2 * count + 1)]

    first = order(0)
    assert sorted(first[:count]) == sorted(first[count : 2 * count]) == list(range(count))
    assert first[:count] != first[count : 2 * count] != list(range(count))
    assert order(0) == first != order(1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_files_of_rows(kind, cache, tmp_path):
    """JSON lines and Parquet are read by column, blank documents are no documents."""
    rows = datasets.Dataset.from_dict({"body": ["one text", "", "  ", "another text"], "number": [1, 2, 3, 4]})
    path = tmp_path / f"rows.{kind}"
    rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    documents = data.load_documents([str(path)], column="body")
    assert documents["body"][:] == rows["body"][:]
    tokenizer = data.train_tokenizer(["one text"] * 9, 300)
    assert data.tokenized(documents, tokenizer, "body")["document"][:] == [0, 3]


def test_kinds_of_files(cache, tmp_path):
    """Compressed files, suffixes in upper case and byte order marks are read for what they are."""
    write(tmp_path / "files" / "A.TXT", "\ufefffirst")
    write(tmp_path / "files" / "b.txt.gz", gzip.compress(b"second"))
    for streaming in (False, True):
        assert [row["text"] for row in load(tmp_path / "files", streaming=streaming)] == ["first", "second"]
    path = write(tmp_path / "rows.jsonl.gz", gzip.compress(b'{"text": "third"}\n'))
    assert load(path)["text"][:] == ["third"]


# Optimizers


def test_default_of_the_rate_of_depth_attention():
    """A multiple of the learning rate by what is trained, and never more than was good in the sweep."""
    found = {rate: PretrainOptions(config="llama", learning_rate=rate, output="out").rates for rate in (1e-3, 8e-3)}
    assert found == {1e-3: {"depth_lr_scale": 3.0}, 8e-3: {"depth_lr_scale": 0.75}}
    assert PretrainOptions(config="llama", output="out").rates == {"learning_rate": 1e-3, "depth_lr_scale": 3.0}
    given = PretrainOptions(config="llama", learning_rate=8e-3, depth_lr_scale=10, output="out")
    assert given.rates == {}
    alone = FinetuneOptions(model="m", data="d", output="out", method="depth", learning_rate=0.02)
    assert alone.rates == {"depth_lr_scale": 1.0}  # the rate that is given is its own
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = attnres.AttnResForCausalLM(attnres.AttnResConfig(**sizes, vocab_size=99))
    assert sorted({group["lr"] for group in optim.new_optimizer(model, learning_rate=0.02).param_groups}) == [
        6e-3,
        0.02,
    ]


def test_parameter_groups():
    """Depth attention is apart, with its own learning rate and without decay; Muon gets the layers' matrices alone."""
    config = attnres.AttnResConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    model = attnres.AttnResForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name in get_args(get_type_hints(TrainingOptions)["optimizer"]):
        optimizer = optim.new_optimizer(model, name, learning_rate=0.5, weight_decay=0.3, depth_lr_scale=0.2)
        groups = {tuple(sorted(names[id(p)] for p in group["params"])): group for group in optimizer.param_groups}
        assert sorted(name for group in groups for name in group) == sorted(names.values())
        depth = groups.pop(("model.depth_attention.key_norm", "model.depth_attention.query"))
        assert (depth["lr"], depth["weight_decay"]) == (0.1, 0)
        for group_names, group in groups.items():
            is_vector = {"norm" in name for name in group_names}
            assert group["lr"] == 0.5 and {group["weight_decay"]} == {0.0 if vector else 0.3 for vector in is_vector}
    assert {name.split(".")[-2] for name in next(iter(groups))} == {
        *("q_proj", "k_proj", "v_proj", "o_proj"), *("gate_proj", "up_proj", "down_proj"),
    }  # fmt: skip


def test_muon_resumes():
    """The optimizer of two goes on from a saved state as if it had not been saved, and follows a schedule."""

    def new():
        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"layers": torch.nn.Linear(6, 6), "head": torch.nn.Linear(6, 3)})
        optimizer = optim.new_optimizer(model, "muon", 0.1)
        return model, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    def train(model, optimizer, schedule, steps):
        for step in steps:
            inputs = torch.arange(12.0).view(2, 6).sin() * (step + 1)
            model["head"](model["layers"](inputs).tanh()).square().mean().backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    whole = new()
    train(*whole, range(6))
    first, second = new(), new()
    train(*first, range(3))
    second[0].load_state_dict(first[0].state_dict())
    second[1].load_state_dict(first[1].state_dict())
    second[2].load_state_dict(first[2].state_dict())
    train(*second, range(3, 6))
    for expected, resumed, initial in zip(whole[0].parameters(), second[0].parameters(), new()[0].parameters()):
        assert torch.equal(expected, resumed) and not torch.equal(expected, initial)


# Bad input


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


ROWS = '{"text": "one"}\n{"text": "two"}\n{"text": 5}\n'


def late(folder: Path) -> list:
    """The option for data of which only the second file is no text."""
    write(folder / "files" / "a.txt", "Some text. " * 99)
    write(folder / "files" / "b.txt", PNG)
    return ["--data", folder / "files"]


def cut_off(path: Path) -> Path:
    return write(path, gzip.compress(b'{"text": "one"}\n' * 999)[:-20])


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00"
BAD = {
    "empty file": (lambda d: ["--data", write(d / "empty.txt", "")], "is empty"),
    "blank file": (lambda d: ["--data", write(d / "blank.txt", "\n\n  \n\n")], "too little text|is empty"),
    "empty folder": (lambda d: [(d / "none").mkdir(), "--data", d / "none"][1:], "holds no file"),
    "empty rows": (lambda d: ["--data", write(d / "empty.jsonl", "")], "is empty"),
    "empty parquet": (
        lambda d: [datasets.Dataset.from_dict({"text": []}).to_parquet(d / "e.parquet"), "--data", d / "e.parquet"][1:],
        "is empty",
    ),  # fmt: skip
    "empty compressed rows": (lambda d: ["--data", write(d / "e.jsonl.gz", gzip.compress(b""))], "e.jsonl.gz is empty"),
    "empty compressed text": (lambda d: ["--data", write(d / "e.txt.gz", gzip.compress(b""))], "e.txt.gz is empty"),
    "cut off": (lambda d: ["--data", cut_off(d / "c.jsonl.gz")], "c.jsonl.gz can't be read: Compressed file ended"),
    "cut off stream": (lambda d: ["--streaming", "--data", cut_off(d / "c.jsonl.gz")], "c.jsonl.gz can't be read"),
    "archive": (
        lambda d: ["--data", write(d / "a.txt", b"PK\x03\x04 no more")],
        "a.txt is an archive \\(zip\\), which isn't unpacked",
    ),
    "image": (lambda d: ["--data", write(d / "image.txt", PNG)], "is not text"),
    "streamed image": (lambda d: ["--streaming", "--data", write(d / "image.txt", PNG)], "is not text"),
    "streamed column": (lambda d: ["--streaming", "--data", write(d / "c.jsonl", '{"a": 1}\n')], "no column 'text'.*a"),
    "late image": (lambda d: late(d), "is not text|can't be read"),
    "late streamed image": (lambda d: ["--streaming", *late(d)], "is not text|can't be read"),
    "late number": (
        lambda d: ["--data", write(d / "n.jsonl", ROWS)],
        "row 2 .* doesn't hold text in column 'text', but 5",
    ),
    "late streamed number": (lambda d: ["--streaming", "--data", write(d / "n.jsonl", ROWS)], "row 2 .* but 5"),
    "stdlib and more": (lambda d: ["--data", "stdlib", write(d / "a.txt", "a")], "stdlib goes with no other data"),
    "unknown kind": (lambda d: ["--data", write(d / "image.png", PNG)], "unknown kind of file"),
    "not JSON": (
        lambda d: ["--data", write(d / "rows.jsonl", "{never closed\n")],
        "can't be read: JSON parse error: .* in row 0",
    ),
    "not Parquet": (lambda d: ["--data", write(d / "rows.parquet", "text")], "can't be read"),
    "column": (lambda d: ["--data", write(d / "c.jsonl", '{"body": "x", "id": 1}\n')], "no column 'text'.*body, id"),
    "column type": (lambda d: ["--data", write(d / "n.jsonl", '{"text": 5}\n')], "doesn't hold text"),
    "missing file": (lambda d: ["--data", d / "absent.txt"], "doesn't exist"),
    "unknown data set": (lambda d: ["--data", "nobody/nothing"], "nobody/nothing can't be read"),
    "little text": (lambda d: ["--data", write(d / "little.txt", "a\n\nb\n\nc")], "too little text"),
    "long context": (lambda d: ["--seq-len", 65], "max_position_embeddings = 64"),
    "small tokenizer": (lambda d: ["--train-tokenizer", 20], "too small"),
    "model type": (lambda d: ["--config", "lama"], "no configuration at lama"),
    "refused family": (lambda d: ["--config", "olmo2"], "olmo2"),
    "wrong field": (lambda d: ["--set", "hiden_size=3"], "no field hiden_size"),
    "wrong value": (lambda d: ["--set", "hidden_size=big"], "hidden_size"),
    "null value": (lambda d: ["--set", "hidden_size=null"], "hidden_size.*expected int, got NoneType"),
    "no layers": (lambda d: ["--set", *SIZES, "num_hidden_layers=0"], "num_hidden_layers is 0"),
    "heads": (lambda d: ["--set", *SIZES, "num_key_value_heads=3"], "num_key_value_heads = 3 must divide .* = 2"),
    "experts": (
        lambda d: [
            "--config",
            "mixtral",
            "--set",
            *SIZES,
            "num_key_value_heads=2",
            "num_local_experts=2",
            "num_experts_per_tok=3",
        ],
        "num_experts_per_tok = 3 must be from 1 to num_local_experts = 2",
    ),
    "activation": (lambda d: ["--set", *SIZES, "hidden_act=foo"], "no model has this configuration: KeyError"),
    "encoder": (lambda d: ["--config", "bert", "--mode", "donor", "--set"], "bert is no decoder-only language model"),
    "no configuration": (lambda d: ["--config", d / "absent"], "absent doesn't exist"),
    "a list": (lambda d: ["--config", write(d / "list.json", "[1, 2]")], "must hold a JSON object, not a list"),
    "block size": (lambda d: ["--block-size", 9], "attn_res_block_size is 9"),
    "pipe": (lambda d: [os.mkfifo(d / "pipe.txt"), "--data", d / "pipe.txt"][1:], "is no regular file"),
    "endless": (
        lambda d: [(d / "zero.txt").symlink_to("/dev/zero"), "--data", d / "zero.txt"][1:],
        "is no regular file",
    ),  # fmt: skip
    "bomb": (
        lambda d: ["--data", write(d / "zeros.txt.gz", gzip.compress(b"a" * 50_000_000, 1))],
        "zeros.txt.gz has a paragraph of more than 40 MB",
    ),
    "streamed bomb": (
        lambda d: ["--streaming", "--data", write(d / "zeros.jsonl.gz", gzip.compress(b"a" * 50_000_000, 1))],
        "zeros.jsonl.gz has a line of more than 40 MB",
    ),
    "long line": (
        lambda d: ["--data", write(d / "line.jsonl", json.dumps({"text": "a b " * 13_000_000}))],
        "line.jsonl has a line of more than 40 MB",
    ),
    "long document": (
        lambda d: ["--data", write(d / "line.jsonl", json.dumps({"text": "a b " * 3_000_000}))],
        "row 0 .* has 12,000,000 characters",
    ),
    "many layers": (lambda d: ["--set", "num_hidden_layers=100000"], "at most 10,000 work"),
    "large": (lambda d: ["--set", *SIZES, "intermediate_size=10000000000000"], "parameters, which need .* of memory"),
    "larger": (lambda d: ["--set", "hidden_size=1000000000000"], "no model has this configuration"),
    "silly type": (lambda d: ["--set", *SIZES, "hidden_size=true"], "hidden_size must be a whole number"),
    "file as output": (lambda d: ["--output", write(d / "file", "")], "can't write"),
    "foreign output": (lambda d: ["--output", write(d / "thesis" / "a.txt", "").parent], "choose another --output"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name, server, text, tmp_path):
    """Bad input ends with one clear line and exit code 1, and leaves nothing behind."""
    arguments, message = BAD[name]
    command = [*RUN, "--data", text, "--output", tmp_path / "out", *arguments(tmp_path)]
    printed = server.run(*command, exit_code=1)
    line = printed.splitlines()[-1]
    assert len(printed.splitlines()) == 1 and line.startswith("pretrain: "), printed
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(signal.getsignal(signal.SIGINT) == signal.SIG_IGN, reason="nothing here can be interrupted")
def test_interrupted(server, text):
    """Ctrl-C ends a run with one line that says how to go on, and the same command does."""
    command = [*TINY, *SHALLOW, "--data", text, "--depth-every", 0, "--steps", 40, "--save-steps", 1]
    run = server.start(*command, "--output", "interrupted")
    assert run.wait_for((server.folder / "interrupted" / "checkpoint-1").exists)
    os.kill(run.process.pid, signal.SIGINT)
    lines = run.finish(130).splitlines()
    assert lines[-1] == "pretrain: interrupted; the same command goes on from the last checkpoint.", lines
    assert "going on from" in server.run(*command, "--output", "interrupted")


def test_lists_add_up():
    """--set and --sweep that are given several times lose none of their values."""
    words = "--config llama --output out --set hidden_size=8 --set vocab_size=9 --sweep seed=0,1 --sweep seq_len=8,16"
    args = pretrain.parse_arguments(words.split())
    assert args.set == {"hidden_size": 8, "vocab_size": 9} and args.sweep == ["seed=0,1", "seq_len=8,16"]
    assert pretrain.parse_arguments([*words.split(), "--sweep"]).sweep == []


def test_refused_comparison_leaves_nothing(server, text, tmp_path):
    """Neither a comparison nor its first run leaves a folder if the run can't start; what has been trained stays."""
    options = [*TINY, "--data", text, "--steps", 1, "--output", tmp_path / "out"]
    printed = server.run(*options, "--compare", "donor,block", "--sweep", "seq_len=65", exit_code=1)
    assert "max_position_embeddings = 64" in printed
    assert not (tmp_path / "out").exists()
    server.run(*options, "--mode", "donor", "--sweep", "seq_len=32,65", exit_code=1)
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"run.json", "seq_len=32"}
    assert not (tmp_path / "out" / "seq_len=65").exists()


@pytest.mark.parametrize(
    "options",
    [
        *("--config llama --model x", "--save-steps 3 --logging-steps 2"),
        *("--train-tokenizer 300 --set vocab_size=100", "--train-tokenizer -5", "--seed -1", "--seed 4294967296"),
        *("--warmup -3", "--num-workers -1", "--depth-every -1", "--seq-len 1", "--held-out 1", "--decay nan"),
        *("--decay 0", "--min-lr-ratio 1.1", "--max-grad-norm -1", "--weight-decay inf", "--depth-lr-scale nan"),
        *("--learning-rate 0", "--compare donor,blok", "--compare donor,donor", "--compare donor --sweep mode=full"),
        *("--sweep colour=1,2", "--sweep depth_lr_scale=1,abc", "--sweep seed=1,,2", "--sweep held_out=0.05,2"),
        *("--sweep bf16=True", "--sweep command=1", "--sweep seed=1 seed=2"),
        *("--learning-rate 1e38", "--weight-decay 1e38", "--depth-lr-scale 1e38", "--steps 10000000000"),
    ],
)
def test_checks_options(options, server):
    """Options that can't work, alone or together, are refused before anything is read, also in a later run of a
    comparison; two lines say why."""
    config = [] if "--config" in options else ["--config", "llama"]
    printed = server.run(*config, "--output", "none", *options.split(), exit_code=2)
    usage, error = printed.splitlines()
    assert usage.startswith("usage: ") and error.startswith("pretrain.py: error: ")
    if "sweep" in options and "abc" in options:
        assert "depth_lr_scale=abc: argument --depth-lr-scale: invalid float value: 'abc'" in error
    assert not (server.folder / "none").exists()


@pytest.mark.parametrize(
    "options",
    [
        *("--lora-alpha 0", "--lora-alpha nan", "--epochs inf", "--lora-dropout 1", "--learning-rate 0"),
        *("--columns a,a", "--adapter x --lora-rank 8", "--adapter x --lora-dropout 0", "--adapter x --lora-alpha 4"),
        *("--adapter x --target-modules q_proj", "--compare lora,full --adapter x", "--sweep method=lora,all"),
    ],
)
def test_checks_options_of_finetuning(options, capsys):
    """Fine-tuning refuses its own options in the same way."""
    with pytest.raises(SystemExit, match="2"):
        finetune.parse_arguments(["--model", "x", "--output", "none", *options.split()])
    usage, error = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ") and error.startswith("finetune.py: error: ")


def test_help(server):
    """`--help` begins with what the script is for and explains every option."""
    printed = server.run("--help")
    assert "Pretrains a model with Attention Residuals" in printed and "python scripts/pretrain.py --config" in printed


# Checkpoints


def without(folder: Path, target: Path, name: str) -> Path:
    """A copy of a checkpoint that lacks a tensor."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    del tensors[next(key for key in tensors if name in key)]
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def test_incomplete_checkpoints(server, text, donor, tmp_path):
    """A checkpoint that lacks weights or holds others than its configuration says is refused, where transformers would
    make them up."""
    cut = tmp_path / "cut"
    shutil.copytree(donor, cut)
    (cut / "model.safetensors").write_bytes((cut / "model.safetensors").read_bytes()[:-100])
    configs = {name: tmp_path / name for name in ("hidden_size", "num_hidden_layers")}
    for name, value in zip(configs, (48, 2)):
        shutil.copytree(donor, configs[name])
        config = json.loads((donor / "config.json").read_text())
        (configs[name] / "config.json").write_text(json.dumps({**config, name: value}))
    server.run("--model", donor, "--mode", "block", *CONTINUE, "--data", text, "--output", "complete")
    trained = server.folder / "complete" / "model"
    refused = [
        (
            without(donor, tmp_path / "lacks", "1.mlp.up_proj"),
            "donor",
            r"it has no model.layers.1.mlp.up_proj.weight \(1",
        ),
        (without(trained, tmp_path / "query", "query"), "block", "it has no model.depth_attention.query"),
        (cut, "donor", "doesn't load"),
        (configs["hidden_size"], "donor", "don't have the shapes of config.json"),
        (configs["num_hidden_layers"], "donor", r"it has model.layers.2.*, and config.json fewer layers"),
    ]
    for model, mode, message in refused:
        options = ["--model", model, "--mode", mode, *CONTINUE, "--data", text]
        line = server.run(*options, "--output", "refused", exit_code=1)
        assert line.count("\n") == 1 and re.search(message, line), line
        assert not (server.folder / "refused").exists()


@pytest.mark.parametrize("model_type", ["qwen2", "gpt_oss"])
def test_donors_that_transformers_reads_otherwise(model_type, server, text):
    """A Qwen2 donor keeps the tokenizer that it was trained with; GPT-OSS keeps attention within a document, so that
    its AttnRes form starts from the same loss."""
    name = f"{model_type}-donor"
    fields = {key: value for key, value in tiny_config(model_type).to_dict().items() if "token_id" not in key}
    (server.folder / f"{name}.json").write_text(json.dumps(fields))
    short = [
        "--seq-len",
        32,
        "--batch-size",
        4,
        "--steps",
        2,
        "--depth-every",
        0,
        "--learning-rate",
        0.1,
        "--data",
        text,
    ]
    server.run("--config", f"{name}.json", "--mode", "donor", "--train-tokenizer", 300, *short, "--output", name)
    for mode in ("donor", "block"):
        server.run("--model", f"{name}/model", "--mode", mode, *short, "--output", f"{name}-{mode}")
    lines = [read_lines(server.folder / f"{name}-{mode}" / "metrics.jsonl") for mode in ("donor", "block")]
    assert lines[0][0]["held_out_loss"] == pytest.approx(lines[1][0]["held_out_loss"], abs=1e-5)
    after = read_lines(server.folder / name / "metrics.jsonl")[-1]["held_out_loss"]
    assert after == pytest.approx(lines[0][0]["held_out_loss"], abs=1e-5)


def test_what_data_are_looked_through(monkeypatch, tmp_path, cache):
    """A pattern or folder with more files than anybody trains on is refused, soon; what unpacks to more than the disk
    has room for, too."""
    for number in range(20):
        write(tmp_path / "files" / f"{number}.txt", "some text\n\n" * 9)
    packed = write(tmp_path / "packed.txt.gz", gzip.compress(b"some text\n\n" * 100_000))
    monkeypatch.setattr(data, "MAX_FILES", 10)
    for name in ("files", "**", "files/*.txt"):
        with pytest.raises(InputError, match="holds more than 10 files"):
            data.load_documents([str(tmp_path / name)])
    monkeypatch.setattr(data, "MAX_SECONDS", 0.2)
    with pytest.raises(InputError, match="takes too long"):
        data.load_documents(["/**/*.nothing"])
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    with pytest.raises(InputError, match="unpacks to more than the 0.0 GB"):
        data.load_documents([str(packed)])


def test_what_was_saved_is_checked(tmp_path):
    """A first checkpoint that from_pretrained couldn't load ends the run at once, with the name of a tensor."""
    model = AutoModelForCausalLM.from_config(tiny_config())
    model.save_pretrained(tmp_path)
    assert check_saved(tmp_path, model)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_blocks"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="loads again: .*model.layers.1.mlp.up_proj.weight is missing"):
        check_saved(tmp_path, model)


@pytest.mark.parametrize("eval_steps", [2, 10])
def test_a_loss_that_rises_is_said(eval_steps, server, text, donor):
    """Once, in one line, as soon as an evaluation or five losses in a row tell; not where training improves a model."""
    lengths = ["--seq-len", 32, "--batch-size", 4, "--steps", 10, "--eval-steps", eval_steps, "--depth-every", 0]
    run = ["--model", donor, "--data", text, *lengths, "--schedule", "constant", "--warmup", 0]
    output = server.run(*run, "--learning-rate", 3.0, "--output", f"rises-{eval_steps}")
    (line,) = [line for line in output.splitlines() if "before training was" in line]
    assert f"step {min(eval_steps, 6)}: the loss is" in line and "--learning-rate 3 may be too large" in line
    assert "before training was" not in server.run(*run, "--output", f"falls-{eval_steps}")
