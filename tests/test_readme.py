# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The README: its code runs, its numbers are the recorded ones, its commands exist."""

import importlib
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from serve_process import Running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import pretrain  # noqa: E402
from exactness import markdown  # noqa: E402


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def section(name: str) -> str:
    return re.search(rf"<!-- {name} -->\n(.*?)\n<!-- /{name} -->", README, flags=re.DOTALL).group(1)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """A folder with what the README calls `my-llama`, `my-text` and `my-chats.jsonl`."""
    folder = tmp_path_factory.mktemp("readme")
    text = Path(subprocess.__file__).read_text(encoding="utf-8")
    (folder / "my-text").mkdir()
    for index in range(24):
        (folder / "my-text" / f"{index}.txt").write_text(text[index * 1000 : (index + 1) * 1000], encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "my-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my-llama")
    chats = [[("user", f"{index} + 1?"), ("assistant", f"{index + 1}")] for index in range(60)]
    with open(folder / "my-chats.jsonl", "w", encoding="utf-8") as file:
        for chat in chats:
            messages = [{"role": role, "content": content} for role, content in chat]
            file.write(json.dumps({"messages": messages}) + "\n")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    return folder


def run(command: list[str], folder: Path) -> str:
    """What a command prints, run where only this environment's commands and no network are."""
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
    }
    result = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.timeout(600)
def test_code_blocks_run(workplace):
    """All commands and then all Python of the README work, top to bottom, on a small checkpoint and text."""
    commands, code = code_blocks("bash"), code_blocks("python")
    assert commands and len(code) >= 7
    table = run(["bash", "-euc", "\n".join(commands)], workplace)
    assert "largest logit difference" in table
    (command,) = (line for line in "".join(code_blocks("console")).splitlines() if line.startswith("$ attnres-serve"))
    server = Running(command.split()[2])
    (workplace / "readme.py").write_text("\n".join(code).replace("8000", str(server.port)), encoding="utf-8")
    with server.start(workplace, workplace):
        server.ready()
        lines = run([sys.executable, "readme.py"], workplace).splitlines()
    assert float(lines[0]) < 3e-6  # the bound of conversion in float32
    assert any(line.startswith("def main") for line in lines)
    assert "trainable params" in "\n".join(lines)
    assert "1 torch.Size([13, 64])" in lines
    assert lines[-1] == "9"  # reads of a model of 4 layers
    with safe_open(workplace / "llama-attnres-trained" / "model.safetensors", framework="pt") as trained:
        query = trained.get_tensor("model.depth_attention.query")
    assert query[1:].any(dim=1).all()  # the first read has one source, so nothing to learn


def test_exactness_table_is_the_recorded_one():
    """The table of the README is made from the committed results, and those keep the promise of the conversion."""
    results = json.loads((ROOT / "results" / "exactness.json").read_text(encoding="utf-8"))
    assert section("exactness") == markdown(results["rows"])
    assert all(row["scaled"] < 3e-6 < 1e-3 < row["plain_mean"] for row in results["rows"])
    assert (results["settings"]["layers"], results["settings"]["hidden_size"]) == (12, 256)


def recorded_numbers(folder: Path) -> list[float]:
    """Losses of a comparison and of what it tried, and for repeated ones their mean and standard deviation."""
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    losses = {name: run["held_out_loss"] for name, run in found["runs"].items()}
    tried = [loss for losses in found.get("trials", {}).values() for loss in losses.values()]
    groups = {}
    for name, loss in losses.items():
        groups.setdefault(re.sub(r" ?seed=\d+", "", name), []).append(loss)
    repeated = [group for group in groups.values() if len(group) > 1]
    return [*losses.values(), *tried, *map(statistics.mean, repeated), *map(statistics.stdev, repeated)]


def test_losses_are_the_recorded_ones():
    """Each loss in the tables of the results is one of the committed run's, rounded once."""
    folder = ROOT / "results"
    sections = (folder / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]
    folders = [re.search(r"\]\((\w+)/comparison\.md\)", text) for text in sections]
    checked = {match[1]: text for match, text in zip(folders, sections) if match}
    assert len(checked) == 5
    for name, text in checked.items():
        rows = [line.split("|", 2)[2] for line in text.splitlines() if line.startswith("|")]
        shown = re.findall(r"\d+\.\d{3,}", "\n".join(rows[2:]))
        recorded = recorded_numbers(folder / name)
        digits = {len(number.split(".")[1]) for number in shown}
        rounded = {f"{number:.{places}f}" for number in recorded for places in digits}
        assert shown and [number for number in shown if number not in rounded] == [], name


def test_make_commands_exist():
    """Every `make` command that the README names is a target."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = set(re.findall(r"(?:`|^\$ )make ([a-z-]+)", README, flags=re.MULTILINE))
    assert {"quickstart", "test", "lint", "exactness", "finetune", "evaluate", "plot-depth", "help"} <= named
    assert named <= set(targets)


def test_long_commands_parse():
    """Commands that take too long to run here have options that they know and files that exist."""
    text = "".join(code_blocks("console")).replace("\\\n", " ")
    folders = ("scripts/", "benchmarks/")
    installed = {point.name: point.value.partition(":")[0] for point in entry_points(group="console_scripts")}
    checked = 0
    for command in (shlex.split(line.removeprefix("$ ")) for line in text.splitlines()):
        names = [word for word in command if word.startswith(folders) and word[-3:] == ".py" or word in installed]
        if not names or names[0] == "accelerate" and len(names) == 1:
            continue
        name = names[-1]
        module = installed.get(name) or Path(name).stem
        importlib.import_module(module).parse_arguments(command[command.index(name) + 1 :])
        assert all((ROOT / word).is_file() for word in command if word.startswith(folders))
        checked += 1
    assert checked >= 8


def test_config_file(tmp_path):
    """The file of options that is shown is one."""
    (block,) = code_blocks("yaml")
    (tmp_path / "run.yaml").write_text(block)
    options = pretrain.parse_arguments(["--config-file", str(tmp_path / "run.yaml"), "--output", "out"])
    assert (options.model, options.data, options.learning_rate) == ("my-llama", ["my-text"], 5e-5)
    assert len(options.variants()) == 3


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("results/**/*.md"), ROOT / "model_cards" / "README.md"]


def headings(page: Path) -> set[str]:
    """What links within a page may lead to, as GitHub names it."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def test_links_exist():
    """Files of this repository that pages name are there, and so are the headings."""
    missing, seen = [], 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for target, heading in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
            seen += 1
            path = page.parent / target if target else page
            if not path.exists() or heading and heading not in headings(path):
                missing.append(f"{page.relative_to(ROOT)}: {target}#{heading}")
    names = re.findall(r"`((?:scripts|benchmarks|results|tests)/[^` ]+|constraints\.txt)`", README)
    assert seen > 50 and names and not missing
    assert [name for name in names if not (ROOT / name).exists()] == []
