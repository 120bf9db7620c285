# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Chat and completion from the terminal."""

import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from attnres_commands import generate
from attnres_recipes.data import train_tokenizer
from families import tiny_donor, tiny_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig


SCRIPTS = Path(__file__).parents[1] / "scripts"
TEMPLATE = "{% for m in messages %}{{ '<' + m.role[0] + '>' + m.content }}{% endfor %}<a>"


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A donor, an AttnRes model without and with a chat template, and an adapter of it."""
    root = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["import this", "def main"] * 3, 280)
    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 48}
    for name, model in (("donor", tiny_donor(**sizes)), ("plain", tiny_model(**sizes))):
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    shutil.copytree(root / "plain", root / "chat")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(root / "chat")
    base = AutoModelForCausalLM.from_pretrained(root / "plain")
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    return root


def run(capsys, *arguments) -> dict:
    """The JSON of a run in this process, after what it shows."""
    generate.main([*map(str, arguments), "--json"])
    *shown, last = capsys.readouterr().out.splitlines()
    return {**json.loads(last), "shown": "\n".join(shown)}


def reference(folder: Path, prompt: str, model=None, **options) -> str:
    """What transformers' own generate gives."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        tokens = model.generate(**inputs, **{"do_sample": False, **options})[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["donor", "plain"])
def test_completes(models, capsys, name):
    """Greedy text is that of transformers' generate, shown after the prompt."""
    result = run(capsys, models / name, "--prompt", "import", "--temperature", 0, "--max-new-tokens", 9)
    answer = result["answers"][0]
    assert answer["text"] == reference(models / name, "import", max_new_tokens=9)
    assert answer["tokens"] <= 9 and result["shown"] == "import" + answer["text"]


def test_sampling(models, capsys):
    """--seed decides the text, --top-k 1 is greedy, and --temperature changes the text."""
    options = [models / "plain", "--prompt", "import", "--max-new-tokens", 9]
    texts = [
        run(capsys, *options, *more)["answers"][0]["text"]
        for more in (["--seed", 1], ["--seed", 1], ["--seed", 2], ["--top-k", 1], ["--temperature", 0])
    ]
    assert texts[0] == texts[1] != texts[2]
    assert texts[3] == texts[4] != texts[0]


def test_adapter(models, capsys):
    """A folder of an adapter finds its base, and the text is the adapted model's."""
    from peft import AutoPeftModelForCausalLM

    adapted = AutoPeftModelForCausalLM.from_pretrained(models / "adapter")
    expected = reference(models / "plain", "import", adapted, max_new_tokens=9)
    assert expected != reference(models / "plain", "import", max_new_tokens=9)
    result = run(capsys, models / "adapter", "--prompt", "import", "--temperature", 0, "--max-new-tokens", 9)
    assert result["answers"][0]["text"] == expected


def feed(monkeypatch, text: str):
    read, write = os.pipe()
    os.write(write, text.encode())
    os.close(write)
    monkeypatch.setattr(sys, "stdin", os.fdopen(read))


def test_chat_remembers(models, capsys, monkeypatch):
    """Each turn is generated after all turns before, in the model's template."""
    feed(monkeypatch, "a\nb\n\nnot read\n")
    options = ["--temperature", 0, "--max-new-tokens", 4, "--system", "s"]
    first, second = run(capsys, models / "chat", *options)["answers"]
    tokenizer = AutoTokenizer.from_pretrained(models / "chat")
    model = AutoModelForCausalLM.from_pretrained(models / "chat")
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    for answer in (first, second):
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        expected = model.generate(ids, do_sample=False, max_new_tokens=4)[0, ids.shape[1] :]
        assert answer["text"] == tokenizer.decode(expected, skip_special_tokens=True)
        messages += [{"role": "assistant", "content": answer["text"]}, {"role": "user", "content": "b"}]


def test_long_conversations(models, capsys, monkeypatch):
    """The oldest turns make room for new ones; a prompt that is too long alone is refused and the chat goes on."""
    feed(monkeypatch, "first words\n" + "x" * 60 + "\nsecond\nthird\nfourth\n")
    generate.main([str(models / "chat"), "--max-new-tokens", "20", "--json"])
    captured = capsys.readouterr()
    assert [answer["prompt"] for answer in json.loads(captured.out.splitlines()[-1])["answers"]] == [
        "first words",
        "second",
        "third",
        "fourth",
    ]
    assert captured.err.count("the model's context 48") == 1


def test_lines_are_completed_alone(models, capsys, monkeypatch):
    """Without a chat template, or with --complete, a line knows nothing of those before."""
    feed(monkeypatch, "def\nimport\n")
    answers = run(capsys, models / "chat", "--complete", "--temperature", 0, "--max-new-tokens", 6)["answers"]
    expected = [reference(models / "plain", prompt, max_new_tokens=6) for prompt in ("def", "import")]
    assert [answer["text"] for answer in answers] == expected


def test_streams(models, tmp_path):
    """Words appear before generation has ended."""
    folder = Path(shutil.copytree(models / "plain", tmp_path / "model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    word = tokenizer.convert_tokens_to_ids("Ġthis")
    GenerationConfig(suppress_tokens=[i for i in range(300) if i != word]).save_pretrained(folder)
    options = [folder, "--max-new-tokens", "40"]
    command = [sys.executable, "-u", SCRIPTS / "generate.py", *options, "--prompt", "import"]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pieces = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and select.select([process.stdout], [], [], 120)[0]:
        if not (piece := os.read(process.stdout.fileno(), 4096)):
            break
        pieces.append(piece)
    assert process.wait(10) == 0
    assert b"".join(pieces) == b"import" + 40 * b" this" + b"\n" and len(pieces) > 5


def own_type(models, folder: Path) -> Path:
    """A model of a type that only its own code knows."""
    shutil.copytree(models / "plain", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "attnres_of_mine"}))
    code = folder / "configuration_attnres.py"
    code.write_text(code.read_text().replace('model_type = "attnres"', 'model_type = "attnres_of_mine"'))
    with open(folder / "modeling_attnres.py", "a") as file:
        file.write(f"\n\nPath({str(folder / 'ran')!r}).touch()\n")
    return folder


def test_remote_code(models, capsys, tmp_path, monkeypatch):
    """Code of a model runs by flag only."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # what another test has loaded is in another cache
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "transformers_modules").exists()])
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    folder = own_type(models, tmp_path / "model")
    with pytest.raises(SystemExit, match="add --trust-remote-code"):
        generate.main([str(folder), "--prompt", "import"])
    assert not (folder / "ran").exists()
    options = ["--prompt", "import", "--temperature", 0, "--max-new-tokens", 6]
    result = run(capsys, folder, *options, "--trust-remote-code")
    assert (folder / "ran").exists()
    assert result["answers"][0]["text"] == reference(models / "plain", "import", max_new_tokens=6)


def pickle_only(models, folder):
    shutil.copytree(models / "plain", folder)
    (folder / "model.safetensors").unlink()
    torch.save(tiny_model().state_dict(), folder / "pytorch_model.bin")
    return [folder], "safetensors"


def without_tokenizer(models, folder):
    shutil.copytree(models / "plain", folder)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    return [folder], "no tokenizer"


@pytest.mark.parametrize(
    "case",
    [
        pickle_only,
        without_tokenizer,
        lambda models, folder: ([folder], "doesn't exist"),
        lambda models, folder: ([models / "plain", "--prompt", "x" * 60], "the model's context 48"),
        lambda models, folder: ([models / "plain", "--system", "s"], "chat template"),
    ],
)
def test_refused(models, tmp_path, case):
    """Bad input is one line and exit code 1."""
    options, message = case(models, tmp_path / "model")
    with pytest.raises(SystemExit) as exit:
        generate.main([*map(str, options), *(["--prompt", "import"] if "--prompt" not in options else [])])
    assert exit.value.code.startswith("generate: ") and message in exit.value.code and "\n" not in exit.value.code


@pytest.mark.parametrize("options", ["--temperature -1", "--top-k 0", "--max-new-tokens 0", "--seed -1"])
def test_checks_options(options, capsys):
    with pytest.raises(SystemExit) as exit:
        generate.main(["model", *options.split()])
    assert exit.value.code == 2 and "generate.py: error:" in capsys.readouterr().err
