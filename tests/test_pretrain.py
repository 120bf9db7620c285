# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pretraining, run as users run it: in processes, on real text, at the smallest sizes."""

import json
import re
import shutil
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from families import tiny_config
from PIL import Image
from pretrain_process import SCRIPTS, SIZES, TINY, Server
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import attnres


sys.path.insert(0, str(SCRIPTS))

import training_data  # noqa: E402
import training_optim  # noqa: E402


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
    source = "".join(file.read_text(errors="replace") for file in training_data.stdlib_files()[:12])
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
    held_out = sorted((training_data.text_hash(text), text) for text in texts)
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

    def has_logged(step):
        path = folder / "metrics.jsonl"
        return lambda: path.exists() and any(f'"step": {step},' in line for line in path.open())

    moments = [*(has_logged(step) for step in (1, 3, 5)), (folder / ".saving").exists, has_logged(8)]
    moments.append((folder / ".model").exists)
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
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (folder, finished[0]))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in expected)
    assert {path.name for path in folder.iterdir()} == {path.name for path in finished[0].iterdir()}


MUON = "--optimizer muon --schedule wsd --bf16 --gradient-checkpointing"


@pytest.mark.parametrize("options", [MUON, "--streaming --shuffle-buffer 8", "--set attention_dropout=0.2"])
def test_sigkill_with(options, server, text):
    """Muon, WSD, bf16, checkpointing, a stream and dropout resume exactly too."""
    if options.startswith("--set"):
        options = " ".join(["--set", *SIZES, options.split()[1]])
    name = "exact" + str(len(options))
    command = [*RUN, "--data", text, *options.split()]
    server.run(*command, "--output", f"{name}-undisturbed")
    run = server.start(*command, "--output", name)
    assert run.wait_for((server.folder / name / "checkpoint-4").exists)
    run.kill()
    assert "going on from" in server.run(*command, "--output", name)
    assert without_times(server.folder / name) == without_times(server.folder / f"{name}-undisturbed")


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


def test_loss_that_is_not_a_number(server, text):
    """The run stops before the step is taken, and names the step, the documents and the last good checkpoint."""
    command = [*RUN, "--data", text, "--learning-rate", 1e30, "--save-steps", 1, "--warmup", 0, "--output", "nan"]
    message = server.run(*command, exit_code=1).splitlines()[-1]
    failure = json.loads((server.folder / "nan" / "failure.json").read_text())
    step, folder = failure["step"], server.folder / "nan"
    assert step > 1 and f" at step {step}, with documents {failure['documents'][0]}, " in message
    assert failure["checkpoint"] == f"nan/checkpoint-{step - 1}" and failure["checkpoint"] in message
    assert max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")) == step - 1
    assert all(
        tensor.isfinite().all()
        for tensor in load_file(server.folder / failure["checkpoint"] / "model.safetensors").values()
    )
    assert len(failure["batch"]) in (4, 8)  # one or both micro-batches
    texts = [file.read_text() for file in sorted(text.iterdir())]
    words = [word for word in failure["batch"][0].split("<eos>")[0].replace("<bos>", "").splitlines() if len(word) > 9]
    assert any(words[0] in texts[row] for row in failure["documents"])
    assert not (folder / "results.json").exists()


def test_compare(server, text):
    """All modes start from the same function on the same batches, and end in one table and one figure."""
    short = [*TINY, *SHALLOW, "--data", text, "--steps", 4, "--depth-every", 0]
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
    with Image.open(folder / "comparison.png") as image:
        assert min(image.size) > 400
    assert json.loads(printed.splitlines()[-1])["held_out_loss"] == {n: r["held_out_loss"] for n, r in results.items()}


def test_modes_start_from_the_same_weights():
    """Of one seed, a donor and its AttnRes forms share all weights but depth attention."""
    torch.manual_seed(3)
    donor = LlamaForCausalLM(LlamaConfig(**SMALL)).state_dict()
    for mode in ("block", "full", "denseformer"):
        torch.manual_seed(3)
        model = attnres.AttnResForCausalLM(attnres.AttnResConfig(**SMALL, attn_res_mode=mode)).state_dict()
        assert {name for name in model if "depth_attention" not in name} == donor.keys()
        assert all(torch.equal(model[name], donor[name]) for name in donor)


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
    for mode in ("donor", "block", "full", "denseformer"):
        server.run("--model", donor, "--mode", mode, *CONTINUE, "--data", text, "--output", f"on-{mode}")
        before, line = read_lines(server.folder / f"on-{mode}" / "metrics.jsonl")[:2]
        assert before["step"] == 0
        first[mode] = (before["held_out_loss"], line["loss"])
        model = AutoModelForCausalLM.from_pretrained(server.folder / f"on-{mode}" / "model")
        assert getattr(model.config, "attn_res_mode", "donor") == mode
    for losses in zip(*first.values()):
        assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)
    server.run("--model", "on-block/model", *CONTINUE, "--data", text, "--output", "on-on")
    losses = [read_lines(server.folder / name / "metrics.jsonl") for name in ("on-block", "on-on")]
    assert losses[1][1]["loss"] < losses[0][1]["loss"]  # the same batch, three steps later
    message = server.run(
        "--model", "on-block/model", "--mode", "full", *CONTINUE, "--data", text, "--output", "no", exit_code=1
    )
    assert message.count("\n") == 1 and "was trained in block mode" in message


def test_recurrent_layers_are_named(server, text):
    """Of models like Kimi Linear a line says that documents in a sequence aren't separated there."""
    tiny_config("kimi_linear").to_json_file(server.folder / "kimi.json")
    options = ["--steps", 1, "--depth-every", 0, "--eval-sequences", 4, "--data", text]
    tiny = ["--train-tokenizer", 300, "--seq-len", 32, "--batch-size", 2]
    printed = server.run("--config", "kimi.json", *tiny, *options, "--output", "kimi")
    assert printed.count("recurrent layers") == 1
    assert "recurrent" not in server.run(*TINY, *options, "--output", "not-kimi")


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
    return training_data.load_documents([str(folder)], **options)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_packing(text, tokenizer, cache):
    """Sequences hold all tokens of the documents in order, without padding; positions restart with each document."""
    tokens = training_data.tokenized(load(text), tokenizer, "text")
    packed = training_data.PackedDocuments(tokens, 48)
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
def test_attention_stays_within_documents(mode):
    """In a packed sequence each document has the logits that it has alone."""
    torch.manual_seed(0)
    classes = {"donor": (LlamaConfig, LlamaForCausalLM), "block": (attnres.AttnResConfig, attnres.AttnResForCausalLM)}
    config_class, model_class = classes[mode]
    model = model_class(config_class(**SMALL)).eval()
    documents = np.repeat([4, 7, 8], [9, 5, 10])
    item = training_data.sequence(np.random.default_rng(0).integers(0, 99, 24), documents)
    batch = training_data.collate([item])
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        alone = [model(input_ids=ids[None]).logits for ids in item["input_ids"].split([9, 5, 10])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-5, rtol=1e-5)


def test_split_is_by_hash(text, tokenizer, cache, tmp_path):
    """A document's side depends on it alone, copies stay together, and both sides make up the whole."""

    def sides(folder):
        documents = load(folder)
        train, test = training_data.split_and_pack(training_data.tokenized(documents, tokenizer, "text"), 8, 0.2)
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


def test_streaming_gives_the_same_sequences(text, tokenizer, cache):
    """A stream packs the documents as the prepared data set does, and starts again at its end."""
    tokens = training_data.tokenized(load(text), tokenizer, "text")
    packed, _ = training_data.split_and_pack(tokens, 40, 0.2)
    stream = training_data.StreamedSequences(load(text, streaming=True), tokenizer, "text", 40, False, 0.2)
    assert len(list(stream.once())) == len(packed)
    for index, item in zip(range(len(packed) + 2), stream):
        assert all(torch.equal(item[name], packed[index % len(packed)][name]) for name in item)


def test_shuffled_order(text, tokenizer, cache):
    """Every epoch holds every sequence once, in an order of its own that the seed alone decides."""
    packed = training_data.PackedDocuments(training_data.tokenized(load(text), tokenizer, "text"), 500)
    count = len(packed)

    def order(seed):
        shuffled = training_data.ShuffledSequences(packed, 2 * count + 1, seed)
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
    documents = training_data.load_documents([str(path)], column="body")
    assert documents["body"][:] == rows["body"][:]
    tokenizer = training_data.train_tokenizer(["one text"] * 9, 300)
    assert training_data.tokenized(documents, tokenizer, "body")["document"][:] == [0, 3]


# Optimizers


def test_parameter_groups():
    """Depth attention is apart, with its own learning rate and without decay; Muon gets the layers' matrices alone."""
    config = attnres.AttnResConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    model = attnres.AttnResForCausalLM(config)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for name in training_optim.OPTIMIZERS:
        optimizer = training_optim.new_optimizer(model, name, learning_rate=0.5, weight_decay=0.3, depth_lr_scale=0.2)
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
        optimizer = training_optim.new_optimizer(model, "muon", 0.1)
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


PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00"
BAD = {
    "empty file": (lambda d: ["--data", write(d / "empty.txt", "")], "is empty"),
    "blank file": (lambda d: ["--data", write(d / "blank.txt", "\n\n  \n\n")], "too little text|is empty"),
    "empty folder": (lambda d: [(d / "none").mkdir(), "--data", d / "none"][1:], "holds no file"),
    "empty rows": (lambda d: ["--data", write(d / "empty.jsonl", "")], "is empty"),
    "image": (lambda d: ["--data", write(d / "image.txt", PNG)], "is not text"),
    "streamed image": (lambda d: ["--streaming", "--data", write(d / "image.txt", PNG)], "is not text"),
    "streamed column": (lambda d: ["--streaming", "--data", write(d / "c.jsonl", '{"a": 1}\n')], "no column 'text'.*a"),
    "unknown kind": (lambda d: ["--data", write(d / "image.png", PNG)], "unknown kind of file"),
    "not JSON": (lambda d: ["--data", write(d / "rows.jsonl", "{never closed\n")], "can't be read"),
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
    "block size": (lambda d: ["--block-size", 9], "attn_res_block_size is 9"),
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
    ["--config llama --model x", "--compare donor,blok", "--sweep colour=1,2", "--save-steps 3 --logging-steps 2"],
)
def test_checks_options(options, server):
    """Options that can't work together are refused before anything is read."""
    config = [] if "--config" in options else ["--config", "llama"]
    printed = server.run(*config, "--output", "none", *options.split(), exit_code=2)
    assert "pretrain.py: error: " in printed
    assert not (server.folder / "none").exists()


def test_help(server):
    """`--help` begins with what the script is for and explains every option."""
    printed = server.run("--help")
    assert "Pretrains a model with Attention Residuals" in printed and "python scripts/pretrain.py --config" in printed
