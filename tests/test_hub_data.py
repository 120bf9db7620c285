# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Data sets by their Hub ids, with a configuration and a split, as the scripts load them over HTTP."""

import io
import json
import subprocess
import sys

import datasets
import pytest
from hub_server import serve_hub
from pretrain_process import SCRIPTS, SIZES, Server
from test_hub_http import TOKEN


sys.path.insert(0, str(SCRIPTS))  # which a started script takes over


MODEL = ["--config=llama", "--train-tokenizer=280", "--set", *SIZES]
SHORT = ["--seq-len=32", "--batch-size=2", "--steps=2", "--eval-sequences=4", "--held-out=0.2", "--depth-every=0"]
README = """\
---
configs:
- config_name: english
  data_files:
  - split: train
    path: english/train.parquet
  - split: test
    path: english/test.parquet
- config_name: german
  data_files:
  - split: train
    path: german/*.parquet
---
"""


def texts(word: str, count: int) -> list[str]:
    return [f"This {word} is number {index}. " * 8 for index in range(count)]


def parquet(rows: list[dict]) -> bytes:
    file = io.BytesIO()
    datasets.Dataset.from_list(rows).to_parquet(file)
    return file.getvalue()


def rows(word: str, count: int) -> list[dict]:
    return [{"text": text, "prompt": text[:24], "completion": text[24:40]} for text in texts(word, count)]


def json_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture(scope="module")
def hub():
    with serve_hub() as hub:
        hub.users = {TOKEN: "me"}
        files = {
            "README.md": README.encode(),
            "english/train.parquet": parquet(rows("text", 50)),
            "english/test.parquet": parquet(rows("test", 40)),
            "german/1.parquet": parquet(rows("Text", 30)),
            "german/2.parquet": parquet(rows("Text", 5)),
        }
        hub.add("datasets/me/texts", files)
        for name in ("secret", "other"):  # what was loaded once is taken from the cache without a token too
            hub.add(f"datasets/me/{name}", {"train.jsonl": json_lines(rows("secret", 60))}, private=True)
        yield hub


@pytest.fixture(scope="module")
def server(hub, tmp_path_factory):
    """Starts scripts with all caches in its folder."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        server = Server(tmp_path_factory.mktemp("hub-data"), "finetune")
        for name, value in hub.environment(server.folder).items():
            if name.startswith("HF_"):
                patch.setenv(name, value)
        patch.setenv("HF_HUB_OFFLINE", "0")
        yield server
        server.stop()


@pytest.fixture
def pretrain(server):
    """Runs pretrain.py, and returns what it printed last."""

    def run(*options, exit_code: int = 0) -> str:
        server.script = "pretrain"
        printed = server.run(*MODEL, *SHORT, *options, exit_code=exit_code).splitlines()
        assert exit_code == 0 or len(printed) == 1, printed
        return printed[-1]

    return run


CASES = {
    "english": ["--data-config", "english"],
    "part of a split": ["--data-config", "english", "--data-split", "test[:75%]"],
    "german": ["--data-config", "german"],
}
DOCUMENTS = {"english": 50, "part of a split": 30, "german": 35}


@pytest.mark.parametrize("case", CASES)
def test_pretrain(case, pretrain):
    """The documents are those of the configuration and split."""
    printed = pretrain("--data", "me/texts", *CASES[case], "--output", case.replace(" ", "-"))
    assert json.loads(printed)["documents"] == DOCUMENTS[case]


def test_pretrain_streaming(hub, pretrain):
    """A stream reads the split that is asked for alone."""
    hub.requests.clear()
    pretrain("--streaming", "--data", "me/texts", "--data-config", "german", "--output", "stream")
    assert len(hub.sent("GET", "german/")) > 2 and not hub.sent("GET", "english/")


def test_finetune_and_evaluate(server, pretrain):
    """Fine-tuning and evaluation take Hub ids too, and a private data set its owner's token."""
    token = server.folder / "token"
    token.write_text(TOKEN)
    assert json.loads(pretrain("--data", "me/secret", "--output", "base"))["documents"] == 60
    token.unlink()
    english = ["--data", "me/texts", "--data-config", "english"]
    server.script = "finetune"
    options = ["--model", "base/model", "--method", "full", *SHORT, "--seq-len", 64, *english]
    printed = server.run(*options, "--columns", "prompt,completion", "--output", "tuned")
    assert json.loads(printed.splitlines()[-1])["examples"] == 50
    server.script = "evaluate_model"
    options = ["base/model", *english, "--data-split", "test[:7]", "--resamples", 10]
    server.run(*options, "--output", "evaluation")
    assert '"documents": 7' in (server.folder / "evaluation" / "evaluation.json").read_text()


NOT_FOUND = "doesn't exist on the Hub or cannot be accessed; log in with `hf auth login` if it is private."
REFUSED = {
    "missing": (["me/absent"], f"me/absent can't be read: Dataset 'me/absent' {NOT_FOUND}"),
    "private": (["me/other"], f"me/other can't be read: Dataset 'me/other' {NOT_FOUND}"),
    "configuration": (["me/texts", "--data-config", "french"], "BuilderConfig 'french' not found. Available: "),
    "no configuration": (["me/texts"], "several configurations; choose one of 'english', 'german'."),
    "split": (["me/texts", "--data-config", "german", "--data-split", "test"], "me/texts can't be read: "),
    "column": (["me/texts", "--data-config", "german", "--column", "body"], "no column 'body'; choose with --column"),
}


@pytest.mark.parametrize("streaming", [[], ["--streaming"]])
@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name, streaming, server, pretrain):
    """What isn't there, or not for this user, ends with one clear line, and leaves nothing behind."""
    data, message = REFUSED[name]
    printed = pretrain(*streaming, "--data", *data, "--output", "refused", exit_code=1)
    assert printed.startswith("pretrain: ") and message in printed
    assert not (server.folder / "refused").exists()


LOAD = """
import sys
from attnres_convert import InputError
from attnres_recipes.data import load_documents
try:
    load_documents(["me/another"])
except InputError as error:
    print(error)
"""


def test_unreachable_hub(hub, tmp_path):
    """A Hub that can't be reached is one line too."""
    environment = {**hub.environment(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", LOAD], env=environment, capture_output=True, text=True, timeout=200)
    assert "me/another can't be read: Couldn't reach 'me/another' on the Hub" in done.stdout, done.stderr
    assert done.stdout.count("\n") == 1
