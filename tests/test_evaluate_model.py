# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The evaluation of checkpoints, against the same numbers computed one token at a time and by EleutherAI's harness."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import evaluate
import huggingface_hub
import numpy as np
import peft
import pytest
import torch
import yaml
from attnres_commands import evaluate_model
from attnres_convert import InputError
from attnres_recipes import evaluation
from attnres_recipes.data import is_held_out, text_hash, train_tokenizer
from attnres_recipes.evaluation import METRICS, answer_index, choices_and_labels, windows
from attnres_recipes.loading import short_names
from attnres_recipes.resampling import interval, resampled_ratios
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import attnres


SCRIPTS = Path(__file__).parents[1] / "scripts"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 48}
WORDS = ("größer", "import", "return", "while", "class", "日本", "del", "assert", "raise", "with")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def texts() -> list[str]:
    generator = np.random.default_rng(0)
    lengths = [1, 2, 30, 60, 100, 7]
    return [" ".join(generator.choice(WORDS, length)) for length in lengths]


def save(model, tokenizer, folder: Path) -> str:
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer(texts):
    return train_tokenizer(texts, 300)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer, texts) -> dict[str, str]:
    """Checkpoint folders by what is in them."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)  # untrained models find many answers almost equally likely
    sizes = {**SIZES, "vocab_size": 300, "num_hidden_layers": 3}

    def new(**options):
        return attnres.AttnResForCausalLM(attnres.AttnResConfig(**{**sizes, **options}))

    folders = {
        "attnres": save(new(attn_res_block_size=2), tokenizer, root / "attnres"),
        "donor": save(LlamaForCausalLM(LlamaConfig(**sizes)), tokenizer, root / "donor"),
        "deeper": save(new(num_hidden_layers=4), tokenizer, root / "deeper"),
        "wider": save(new(hidden_size=64), tokenizer, root / "wider"),
        "other-tokens": save(new(), train_tokenizer(texts[:2], 270), root / "other-tokens"),
    }
    shutil.copytree(folders["attnres"], root / "bare")
    bare = AutoTokenizer.from_pretrained(root / "bare")
    bare.bos_token = bare.eos_token = None
    bare.save_pretrained(root / "bare")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", modules_to_save=["depth_attention"])
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders["attnres"]), lora)
    adapted.save_pretrained(root / "zero-adapter", save_embedding_layers=False)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(root / "adapter", save_embedding_layers=False)
    adapted.merge_and_unload().save_pretrained(root / "merged")
    tokenizer.save_pretrained(root / "merged")
    return {**folders, **{name: str(root / name) for name in ("bare", "zero-adapter", "adapter", "merged")}}


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory, texts) -> str:
    return write_rows(tmp_path_factory.mktemp("data") / "texts.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> tuple[str, list[dict]]:
    generator = np.random.default_rng(3)
    rows = []
    for _ in range(40):
        choices = [" ".join(generator.choice(WORDS, length)) for length in generator.integers(1, 5, 4)]
        rows.append({"question": "import del", "choices": choices, "answer": int(generator.integers(4))})
    return write_rows(tmp_path_factory.mktemp("data") / "questions.jsonl", rows), rows


def only(results: dict) -> dict:
    """What there is about the only checkpoint."""
    (result,) = results["checkpoints"].values()
    return result


def run(*arguments) -> dict:
    """The results of `evaluate_model.py`, as its output folder holds them."""
    arguments = list(map(str, arguments))
    evaluate_model.main(arguments)
    return json.loads((Path(arguments[arguments.index("--output") + 1]) / "evaluation.json").read_text())


@pytest.mark.parametrize("seq_len", [1, 2, 5, 8])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
def test_windows(seq_len, stride):
    """Every token is scored once, in order, with the context that the stride promises; no window is too long."""
    if stride > seq_len:
        return
    for num_targets in range(20):
        scored = []
        for start, end, count in windows(num_targets, seq_len, stride):
            assert start >= 0 and end - start <= seq_len and 1 <= count <= end - start
            for target in range(end - count + 1, end + 1):
                context = target - start
                assert context >= min(target, seq_len - stride + 1)
                scored.append(target)
        assert scored == list(range(1, num_targets + 1))


@torch.no_grad()
def nats_one_by_one(model, ids: list[int], seq_len: int, stride: int) -> float:
    """Each token after the first from a forward of its own."""
    total, last = 0.0, len(ids) - 1
    for target in range(1, len(ids)):
        end = min(seq_len + max(0, math.ceil((target - seq_len) / stride)) * stride, last)
        context = torch.tensor([ids[max(0, end - seq_len) : target]])
        total -= model(input_ids=context).logits[0, -1].double().log_softmax(-1)[ids[target]].item()
    return total


def test_text(models, data, texts, tokenizer, tmp_path, capsys):
    """Loss, perplexity and bits per byte are those of one forward per token, with exact counts of tokens and bytes."""
    out = tmp_path / "out"
    options = ["--seq-len", 20, "--stride", 7, "--batch-size", 3, "--data", data, "--output", out]
    results = run(models["donor"], models["attnres"], *options)
    assert list(results["checkpoints"]) == ["donor", "attnres"]
    for name, result in results["checkpoints"].items():
        model = AutoModelForCausalLM.from_pretrained(models[name]).eval()
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert all(row[0] == tokenizer.bos_token_id for row in ids)
        nats = sum(nats_one_by_one(model, row, 20, 7) for row in ids)
        tokens, num_bytes = sum(map(len, ids)) - len(ids), sum(len(text.encode()) for text in texts)
        text = result["text"]
        assert (text["tokens"], text["bytes"], text["documents"]) == (tokens, num_bytes, 6)
        assert text["loss"] == pytest.approx(nats / tokens, rel=1e-6)
        assert text["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)
        assert text["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)
        assert result["first_token"] == "predicted from <bos>"
        for label in ("loss", "perplexity", "bits_per_byte"):
            low, high = result["metrics"][label]["interval"]
            assert low < result["metrics"][label]["value"] == text[label] < high
    first, second = (result["metrics"]["loss"] for result in results["checkpoints"].values())
    assert "difference" not in first
    assert second["difference"] == pytest.approx(second["value"] - first["value"])
    printed = capsys.readouterr().out
    assert json.loads(printed.splitlines()[-1])["checkpoints"]["donor"]["loss"] == first["value"]
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.json", "evaluation.md"]
    table = (out / "evaluation.md").read_text()
    assert f" {second['value']:.4f} |" in table and f"{second['difference']:+.4f}" in table
    assert results["command"][0] == "evaluate_model.py" and results["versions"]["evaluate"]


def test_first_token_without_context(models, data, texts, tokenizer, tmp_path):
    """Without a token to begin with, a document's first token counts as uniform over the vocabulary."""
    result = only(run(models["bare"], "--data", data, "--output", tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(models["bare"]).eval()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    nats = sum(nats_one_by_one(model, row, 48, 24) + math.log(300) for row in ids)
    assert result["text"]["tokens"] == sum(map(len, ids))
    assert result["text"]["loss"] == pytest.approx(nats / sum(map(len, ids)), rel=1e-6)
    assert result["first_token"] == "uniform over the vocabulary"


def test_different_tokenizers(models, data, tmp_path, capsys):
    """Models that cut the text differently are compared in bits per byte, not in loss, and the report says so."""
    results = run(models["attnres"], models["other-tokens"], "--data", data, "--output", tmp_path / "out")
    first, second = results["checkpoints"].values()
    assert first["text"]["tokens"] != second["text"]["tokens"] and first["text"]["bytes"] == second["text"]["bytes"]
    assert "difference" not in second["metrics"]["loss"] and "difference" not in second["metrics"]["perplexity"]
    assert "difference_interval" in second["metrics"]["bits_per_byte"]
    assert "compare bits per byte, not loss or perplexity" in capsys.readouterr().out


def test_held_out(models, tmp_path, texts):
    """`--held-out` keeps the documents that pretraining holds out, and blank ones don't count."""
    texts = [f"{text} {number}" for number, text in enumerate(texts * 10)]
    data = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in [*texts, " ", None]])
    kept = [text for text in texts if is_held_out(text_hash(text), 0.3)]
    assert 5 < len(kept) < 40
    results = run(models["attnres"], "--data", data, "--held-out", 0.3, "--output", tmp_path / "out")
    text = only(results)["text"]
    assert (text["documents"], text["bytes"]) == (len(kept), sum(len(text.encode()) for text in kept))


def test_adapter(models, data, tmp_path):
    """An adapter is evaluated on the base it names: as its merged model, and not as the base."""
    names = ("attnres", "adapter", "merged", "zero-adapter")
    results = run(*(models[name] for name in names), "--data", data, "--output", tmp_path / "out")["checkpoints"]
    losses = {name: results[name]["text"]["loss"] for name in names}
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-5)
    assert abs(losses["adapter"] - losses["attnres"]) > 0.01
    zero = results["zero-adapter"]["metrics"]["loss"]
    assert zero["difference_interval"] == pytest.approx([0, 0], abs=1e-6)
    assert results["adapter"]["base"] == models["attnres"]


def test_adapter_of_another_architecture(data, tokenizer, tmp_path):
    """PEFT's own adapters of models that are built in another way, as GPT-2 is, are evaluated too."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=300, n_positions=48, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2)
    base = save(GPT2LMHeadModel(config), tokenizer, tmp_path / "gpt2")
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["c_attn", "c_fc"], init_lora_weights=False)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    adapted.save_pretrained(tmp_path / "adapter")
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    names = ("gpt2", "adapter", "merged")
    results = run(*(tmp_path / name for name in names), "--data", data, "--output", tmp_path / "out")["checkpoints"]
    losses = {name: results[name]["text"]["loss"] for name in names}
    assert losses["adapter"] == pytest.approx(losses["merged"], rel=1e-5)
    assert abs(losses["adapter"] - losses["gpt2"]) > 0.01


@torch.no_grad()
def choice_nats(model, tokenizer, prompt: str, choice: str) -> float:
    ids, start = tokenizer(prompt + choice)["input_ids"], len(tokenizer(prompt)["input_ids"])
    assert ids[:start] == tokenizer(prompt)["input_ids"]
    scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -sum(scores[index - 1, ids[index]].item() for index in range(start, len(ids)))


def test_choices(models, questions, tokenizer, tmp_path):
    """The chosen answers are the likeliest continuations, per byte and as a whole."""
    path, rows = questions
    result = only(run(models["attnres"], "--choices", path, "--output", tmp_path / "out"))
    model = AutoModelForCausalLM.from_pretrained(models["attnres"]).eval()
    correct, raw = [], []
    for row in rows:
        nats = [choice_nats(model, tokenizer, row["question"], " " + choice) for choice in row["choices"]]
        per_byte = [value / len(choice.encode()) for value, choice in zip(nats, row["choices"])]
        raw.append(min(range(4), key=nats.__getitem__) == row["answer"])
        correct.append(min(range(4), key=per_byte.__getitem__) == row["answer"])
    assert correct != raw
    choices = {"accuracy": np.mean(correct), "raw_accuracy": np.mean(raw), "questions": 40, "truncated_questions": 0}
    assert result["choices"] == pytest.approx(choices)
    assert "text" not in result
    low, high = result["metrics"]["accuracy"]["interval"]
    assert 0 <= low < np.mean(correct) < high <= 1


def test_long_questions_lose_their_beginning(models, tmp_path):
    """What is too long for the window is cut from the left, and counted."""
    rows = [{"q": "del " * 60 + "while", "c": {"text": ["del", "class"], "label": ["x", "y"]}, "a": "y"}]
    rows.append({"q": "while", "c": {"text": ["del", "class"], "label": ["x", "y"]}, "a": "y"})
    path = write_rows(tmp_path / "questions.jsonl", rows)
    options = ["--question-column", "q", "--choices-column", "c", "--answer-column", "a", "--output", tmp_path / "out"]
    result = only(run(models["attnres"], "--choices", path, *options))
    assert result["choices"]["questions"] == 2 and result["choices"]["truncated_questions"] == 1


@pytest.mark.parametrize(
    ("answer", "labels", "index"),
    [
        (1, [], 1), ("B", [], 1), ("b", [], 1), ("1", [], 1), ("no", [], 1), ("2", ["1", "2", "3"], 1), (3, [], None),
        ("D", [], None), ("maybe", [], None), (None, [], None), (-1, [], None),
        (1.0, [], 1), (1.5, [], None), (True, [], 1), ("B ", [], 1), ("(B)", [], 1), ("b.", [], 1), ([1], [], None),
        (2, ["1", "2", "3"], 1), ("C", ["A", "B", "C", "D"], 2), ("4", ["1", "2", "3", "4"], None),
    ],
)  # fmt: skip
def test_answer(answer, labels, index):
    """Answers are indices, letters, texts or the labels of the choices."""
    assert answer_index(answer, ["yes", "no", "or"], labels) == index


def test_answers_to_numbers():
    """A number is an index or, where it can't be one, a choice."""
    assert answer_index(1, ["10", "2", "1"], []) == 1 and answer_index(10, ["10", "2", "1"], []) == 0
    assert answer_index(7, ["10", "2", "1"], []) is None


@pytest.mark.parametrize(
    ("choices", "texts", "labels"),
    [
        (["a", "b"], ["a", "b"], []),
        ([1, 2.5], ["1", "2.5"], []),
        ({"text": ["a", "b"], "label": ["A", "B"]}, ["a", "b"], ["A", "B"]),
        ({"text": ["a", "b"], "label": None}, ["a", "b"], []),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 2}], ["a", "b"], ["1", "2"]),
        ([{"text": "a"}, {"text": "b"}], ["a", "b"], []),
        ({"label": ["A"]}, None, ["A"]),
        (None, None, []),
    ],
)
def test_choices_and_labels(choices, texts, labels):
    """Choices may be numbers, and come with labels in any of the usual ways."""
    assert choices_and_labels(choices) == (texts, labels)


def test_choices_without_tokens_before(models, tmp_path):
    """Where nothing is to be predicted from anything, all choices are equally likely and the first one counts."""
    path = write_rows(tmp_path / "questions.jsonl", [{"question": "", "choices": ["a", "b"], "answer": 0}])
    options = ["--choices", path, "--choice-separator", "", "--output", tmp_path / "out"]
    assert only(run(models["bare"], *options))["choices"]["accuracy"] == 1


def test_names(tmp_path, monkeypatch):
    """Names are as short as they can be, wherever the checkpoints are; one that is written in two ways is the same."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/a/model", "runs/b/model"):
        (tmp_path / name).mkdir(parents=True)
    assert short_names(["runs/a/model", "runs/b/model"]) == ["a", "b"]
    assert short_names(["runs/a/model", "org/model"]) == ["runs/a", "org"]
    assert short_names(["/absent/a", "runs/b/model"]) == ["/absent/a", "runs/b/model"]
    for again in ("runs/a/model/", "./runs/a/model", str(tmp_path / "runs/b/../a/model")):
        with pytest.raises(InputError, match="given twice"):
            short_names(["runs/a/model", again])
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert short_names(["."]) == ["runs/a"]
    assert short_names([".", "../b"]) == ["a", "b"]
    assert short_names([".", "model"]) == [tmp_path.joinpath("runs/a").as_posix(), "model"]


def test_folder_named_as_a_model_type(models, data, tmp_path, monkeypatch):
    """A checkpoint in a folder with the name of a model type is itself, not that type's defaults."""
    (tmp_path / "attnres").symlink_to(models["donor"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)  # no waiting for a Hub that has no "llama"
    result = run("attnres", "--data", data, "--output", "out")
    assert only(result)["mode"] == "donor" and result["arguments"]["seq_len"] == SIZES["max_position_embeddings"]
    with pytest.raises(SystemExit, match="--seq-len 49 is longer than the model's context"):
        evaluate_model.main(["attnres", "--data", data, "--seq-len", "49", "--output", "no"])
    with pytest.raises(SystemExit, match="no configuration at llama"):
        evaluate_model.main(["llama", "--data", data, "--output", "no"])


def test_numbers_of_the_table():
    """Numbers stay narrow, whatever a perplexity is."""
    entry = {"value": 7.3e43, "interval": [1234.5, 7.3e43], "difference": -2e9}
    assert evaluation.cells(entry, "value") == ("7.300e+43", "1,234 to 7.300e+43")
    assert evaluation.cells(entry, "difference", "+") == ("-2.000e+09", "-")
    assert evaluation.cells({"value": 0.25}, "value") == ("0.2500", "-")
    assert evaluation.cells({"value": 0.25}, "difference", "+") == ("-", "-")


def test_evaluate_modules():
    """The modules are evaluate's own kind, load from their folders, and compute what can be done by hand."""
    loss = evaluate.load(str(METRICS / "text_loss"), keep_in_memory=True)
    assert isinstance(loss, evaluate.Metric)
    result = loss.compute(nats=[2.0, 4.0], tokens=[1, 2], bytes=[4, 8])
    assert result["loss"] == 2 and result["perplexity"] == pytest.approx(math.e**2)
    assert result["bits_per_byte"] == pytest.approx(0.5 / math.log(2))
    accuracy = evaluate.load(str(METRICS / "choice_accuracy"), keep_in_memory=True)
    result = accuracy.compute(nats=[[3.0, 4.0], [1.0, 2.0, 3.0]], bytes=[[1, 2], [1, 1, 9]], answers=[1, 0])
    assert (result["accuracy"], result["correct"]) == (0.5, [1, 0])
    assert (result["raw_accuracy"], result["raw_correct"]) == (0.5, [0, 1])
    for nats, bytes in (([], []), ([[]], [[]]), ([[1.0, 2.0]], [[1]]), ([[1.0, 2.0]], [[1, 0]])):
        with pytest.raises(ValueError, match="There are no questions|Question 1 has"):
            accuracy.compute(nats=nats, bytes=bytes, answers=[0] * len(nats))
    for values in ([], [0]):
        with pytest.raises(ValueError, match="There is no text to measure a loss on: 0 tokens, 0 bytes"):
            loss.compute(nats=values, tokens=values, bytes=values)


def test_intervals_of_few_documents():
    """Resamples of nothing but documents without tokens say nothing, and don't make an interval one of no numbers."""
    ratios = resampled_ratios(np.array([[3.0, 0.0]]), np.array([[2.0, 0.0]]), 200, seed=0)
    assert np.isnan(ratios).any() and interval(ratios[0]) == [1.5, 1.5]


def test_intervals_cover():
    """About 95 % of intervals hold the true value, and those of paired differences are as narrow as the differences."""
    generator = np.random.default_rng(0)
    hits = 0
    for seed in range(200):
        lengths = generator.integers(5, 50, 60)
        nats = lengths * 2 + generator.normal(size=60) * lengths
        ratios = resampled_ratios(np.stack([nats, nats + 0.1 * lengths]), np.stack([lengths, lengths]), 200, seed)
        low, high = np.percentile(ratios[0], [2.5, 97.5])
        hits += low <= 2 <= high
        assert np.ptp(ratios[1] - ratios[0]) < 1e-12
    assert 0.88 <= hits / 200 <= 0.99


def harness_tasks(folder: Path, questions: str, texts: str) -> Path:
    """Two tasks of the harness on local files."""
    folder.mkdir()
    shared = {"dataset_path": "json", "test_split": "train"}
    choice = {
        **shared,
        "task": "attnres_words",
        "dataset_kwargs": {"data_files": questions},
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    rolling = {
        **shared,
        "task": "attnres_text",
        "dataset_kwargs": {"data_files": texts},
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    for task in (choice, rolling):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


def test_lm_eval(models, texts, tokenizer, tmp_path):
    """EleutherAI's harness runs tasks on local data, on AttnRes models too, and agrees with our numbers."""
    pytest.importorskip("lm_eval")
    generator = np.random.default_rng(4)
    words = [word for word in WORDS if word.isascii()]  # the harness counts characters
    rows = [
        {"question": "import del", "choices": list(generator.choice(words, 3, replace=False)), "answer": 1}
        for _ in range(20)
    ]
    questions = write_rows(tmp_path / "questions.jsonl", rows)
    documents = [texts[0], texts[1], texts[5]]
    short = write_rows(tmp_path / "texts.jsonl", [{"text": text} for text in documents])
    folder = harness_tasks(tmp_path / "tasks", questions, short)
    options = ["--lm-eval", "attnres_words,attnres_text", "--lm-eval-include", folder, "--output", tmp_path / "out"]
    results = run(models["donor"], models["attnres"], "--data", short, "--choices", questions, *options)
    for result in results["checkpoints"].values():
        metrics = result["metrics"]
        for ours, theirs in (("accuracy", "attnres_words acc_norm"), ("raw_accuracy", "attnres_words acc")):
            assert metrics[theirs] == metrics[ours]
        # the harness puts a begin of text before that of the tokenizer, and counts the latter
        model = AutoModelForCausalLM.from_pretrained(result["path"]).eval()
        nats = sum(nats_one_by_one(model, [1, *tokenizer(text)["input_ids"]], 48, 24) for text in documents)
        theirs = metrics["attnres_text bits_per_byte"]
        assert theirs["value"] == pytest.approx(nats / math.log(2) / result["text"]["bytes"], rel=1e-5)
        assert theirs["interval"][0] < theirs["value"] < theirs["interval"][1]
    assert "difference_interval" in results["checkpoints"]["attnres"]["metrics"]["attnres_text bits_per_byte"]
    assert "attnres words acc" in (tmp_path / "out" / "evaluation.md").read_text()


def refusals(models, data, tmp_path) -> dict[str, tuple[list, str]]:
    write = lambda name, content: (tmp_path / name).write_bytes(content) and tmp_path / name  # noqa: E731
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n \n")
    (tmp_path / "no-tokenizer").mkdir()
    shutil.copy(Path(models["attnres"]) / "config.json", tmp_path / "no-tokenizer")
    (tmp_path / "no-weights").mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(models["attnres"]) / name, tmp_path / "no-weights")
    for name, choices, answer in (("answer", ["a", "b"], "C"), ("list", "a", 0), ("long", ["a", "del " * 90], 0)):
        write_rows(tmp_path / f"{name}.jsonl", [{"question": "?", "choices": choices, "answer": answer}])
    numbers = write_rows(tmp_path / "numbers.jsonl", [{"text": None}, {"text": 1}])
    adapter, base = models["adapter"], models["attnres"]
    return {
        "missing checkpoint": ([tmp_path / "absent"], "absent doesn't exist"),
        "twice": ([base, base], "given twice"),
        "twice in two ways": ([base, base + "/"], "given twice"),
        "file": ([base, numbers], "numbers.jsonl is not a folder"),
        "base of no adapter": ([base, "--base", base], "--base is for adapters"),
        "numbers": ([base, "--data", numbers], "row 2 of"),
        "no tokenizer": ([tmp_path / "no-tokenizer"], "give --tokenizer"),
        "no weights": ([tmp_path / "no-weights"], "doesn't load"),
        "missing base": ([adapter, "--base", tmp_path / "absent"], "Give --base"),
        "deeper base": ([adapter, "--base", models["deeper"]], "is for another base"),
        "wider base": ([adapter, "--base", models["wider"]], "is for another base"),
        "donor as base": ([adapter, "--base", models["donor"]], "is for another base"),
        "missing data": ([base, "--data", tmp_path / "absent.txt"], "doesn't exist"),
        "empty": ([base, "--data", tmp_path / "empty.txt"], "is empty"),
        "blank": ([base, "--data", tmp_path / "blank.txt"], "no text"),
        "not text": ([base, "--data", write("bytes.txt", b"\xff\xfe\x00\x01" * 99)], "is not text"),
        "not JSON": ([base, "--data", write("broken.jsonl", b"not json\n")], "can't be read"),
        "missing column": ([base, "--data", data, "--column", "body"], "no column 'body'; choose with --column"),
        "context": ([base, "--data", data, "--seq-len", 49], "longer than the model's context"),
        "stride": ([base, "--data", data, "--seq-len", 10, "--stride", 11], "tokens would be left out"),
        "questions without columns": ([base, "--choices", data], "no column 'question'; choose with --question-column"),
        "answer": ([base, "--choices", tmp_path / "answer.jsonl"], "is none of its choices"),
        "choices": ([base, "--choices", tmp_path / "list.jsonl"], "no question with a list of two choices"),
        "long choice": ([base, "--choices", tmp_path / "long.jsonl"], "--seq-len 48 at most"),
        "task folder": ([base, "--lm-eval", "x", "--lm-eval-include", tmp_path / "absent"], "is not a folder"),
    }  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "missing checkpoint", "twice", "twice in two ways", "file", "base of no adapter", "numbers",
        "no tokenizer", "no weights", "missing base",
        "deeper base", "wider base", "donor as base", "missing data", "empty",
        "blank", "not text", "not JSON", "missing column", "context",
        "stride", "questions without columns", "answer", "choices", "long choice",
        "task folder",
    ],
)  # fmt: skip
def test_refuses(name, models, data, tmp_path):
    """Bad input ends with one clear line, before anything is written."""
    arguments, message = refusals(models, data, tmp_path)[name]
    with pytest.raises(SystemExit) as exit:
        run(*arguments, "--output", tmp_path / "out")
    code = str(exit.value.code)
    assert code.startswith("evaluate_model: ") and "\n" not in code and len(code) < 400
    assert message in code
    assert not (tmp_path / "out").exists()


def test_unknown_task(models, tmp_path):
    """A task that the harness doesn't have is refused by name, and one whose data are missing with the reason."""
    pytest.importorskip("lm_eval")
    folder = harness_tasks(tmp_path / "tasks", str(tmp_path / "absent.jsonl"), str(tmp_path / "absent.jsonl"))
    options = ["--lm-eval-include", folder, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="attnres_words doesn't load: .*absent.jsonl"):
        run(models["attnres"], "--lm-eval", "attnres_words", *options)
    with pytest.raises(SystemExit, match="the harness has no task attnres_nonsense; see"):
        run(models["attnres"], "--lm-eval", "attnres_nonsense", *options)
    assert not (tmp_path / "out").exists()


def test_one_checkpoint_fails(models, data, tmp_path):
    """The others are compared, and the end is an error that names it; nothing is written if all fail."""
    broken = shutil.copytree(models["deeper"], tmp_path / "broken")
    weights = load_file(broken / "model.safetensors")
    save_file(
        {name: weight * torch.nan for name, weight in weights.items()}, broken / "model.safetensors", {"format": "pt"}
    )
    options = ["--data", data, "--output"]
    message = "broken, text: the loss is nan; the model is broken"
    with pytest.raises(SystemExit, match=message):
        run(broken, models["attnres"], models["donor"], *options, tmp_path / "out")
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert [Path(name).name for name in evaluation["failures"]] == ["broken"]
    expected = run(models["attnres"], models["donor"], *options, tmp_path / "without")
    numbers, expected = ([entry["metrics"] for entry in e["checkpoints"].values()] for e in (evaluation, expected))
    assert len(numbers) == 2 and numbers == expected
    assert message in (tmp_path / "out" / "evaluation.md").read_text()
    with pytest.raises(SystemExit, match=message):
        run(broken, *options, tmp_path / "alone")
    assert not (tmp_path / "alone").exists()


def test_harness_fails(models, tmp_path):
    """What the harness can't do with a model is said in one line, with its words."""
    pytest.importorskip("lm_eval")
    rows = write_rows(tmp_path / "rows.jsonl", [{"question": "a", "choices": ["b", "c"], "answer": 0, "text": "a"}])
    folder = harness_tasks(tmp_path / "tasks", rows, rows)
    task = yaml.safe_load((folder / "attnres_text.yaml").read_text())
    task |= {"output_type": "generate_until", "generation_kwargs": {"max_gen_toks": 48, "until": ["x"]}}
    task["metric_list"] = [{"metric": "exact_match"}]
    (folder / "attnres_text.yaml").write_text(yaml.safe_dump(task))
    options = ["--lm-eval", "attnres_words, attnres_text", "--lm-eval-include", folder, "--output", tmp_path / "out"]
    with pytest.raises(
        SystemExit, match="attnres: --lm-eval attnres_words,attnres_text fails: .*maximum sequence length"
    ):
        run(models["attnres"], *options)
    assert not (tmp_path / "out").exists()


def test_output_is_tried_first(models, data, tmp_path, monkeypatch):
    """A folder that can't be written to is found before anything is evaluated; an interruption leaves nothing."""
    monkeypatch.setattr(evaluation, "evaluate_checkpoints", lambda args: pytest.fail("evaluated"))
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="can't write to .*: Not a directory"):
        run(models["attnres"], "--output", tmp_path / "file" / "out")

    def interrupted(args):
        assert args.output.is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate_checkpoints", interrupted)
    with pytest.raises(SystemExit) as exit:
        run(models["attnres"], "--output", tmp_path / "new" / "out")
    assert exit.value.code == 130 and not (tmp_path / "new").exists()


def test_short_usage(capsys):
    """A wrong option is answered in a few lines."""
    for arguments, message in (
        (["a", "--seed", "-1"], "--seed -1 is out of range: it must be at least 0"),
        ([], "required: checkpoints"),
    ):
        with pytest.raises(SystemExit):
            evaluate_model.main([*arguments, "--output", "out"])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 2


def test_help(capsys):
    """The help explains what the numbers mean."""
    with pytest.raises(SystemExit) as exit:
        evaluate_model.main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    assert "--lm-eval" in text and "bits per byte" in text and "example: python scripts/evaluate_model.py" in text


def test_process(models, tmp_path):
    """From outside and offline, on Python's own source: the last line printed is JSON."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, str(SCRIPTS / "evaluate_model.py"), models["attnres"], "--max-documents", "1"]
    options = {"cwd": tmp_path, "env": environment, "text": True, "capture_output": True}
    done = subprocess.run([*command, "--seq-len", "32", "--stride", "32", "--output", "out"], **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["output"] == "out"
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["arguments"]["data"] == ["stdlib"] and report["arguments"]["held_out"] == 0.05
    (entry,) = only(report)["metrics"]["loss"].items()
    assert entry[0] == "value"  # one document has no interval
