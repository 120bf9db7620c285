# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Cards of chat models show how to chat with them, and what is tried before a push is a chat."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from attnres_convert import convert_checkpoint
from attnres_convert.card import folder_card, shown
from attnres_convert.writing import decimals
from attnres_recipes import FinetuneOptions, PretrainOptions, PushOptions, finetune, pretrain, push
from attnres_recipes.publishing import collect, load_as_stranger, walk
from attnres_recipes.stranger import TEST_MESSAGE
from transformers import AutoTokenizer


SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
RUN = {"seq_len": 64, "batch_size": 2, "steps": 1, "depth_every": 0, "eval_sequences": 2, "held_out": 0.3}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """Folders by the names on their cards: pretrained with a chat template, converted, an adapter, merged, and whose
    depth attention was fine-tuned."""
    folder = tmp_path_factory.mktemp("chat-cards")
    (folder / "text.txt").write_text("\n\n".join(f"one dog and {n} birds sat on a mat" for n in range(60)))
    chat = "{{'messages': [{{'role': 'user', 'content': '{0}?'}}, {{'role': 'assistant', 'content': 'No.'}}]}}"
    (folder / "chats.jsonl").write_text("".join(chat.format(n).replace("'", '"') + "\n" for n in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(folder)
        options = {"data": "text.txt", "config": "llama", "set": SIZES}
        pretrain(PretrainOptions(**RUN, **options, train_tokenizer=300, mode="donor", output="donor"))
        tokenizer = AutoTokenizer.from_pretrained("donor/model")
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
        tokenizer.save_pretrained("tokenizer")
        pretrain(PretrainOptions(**RUN, **options, tokenizer="tokenizer", mode="block", output="pretrained"))
        shutil.copytree("donor/model", "source")
        tokenizer.save_pretrained("source")
        convert_checkpoint("source", "converted", mode="full")
        finetune(FinetuneOptions(**RUN, model="converted", data="chats.jsonl", merge=True, output="lora"))
        # from a model without a chat template, which fine-tuning on chats gives its tokenizer
        finetune(FinetuneOptions(**RUN, model="donor/model", data="chats.jsonl", method="depth", output="depth"))
    names = {"pretrained": "pretrained/model", "lora": "lora/model", "lora-merged": "lora/merged"}
    names |= {"converted": "converted", "depth": "depth/model"}
    return {name: folder / path for name, path in names.items()}


def code_of(card: str) -> str:
    return card.split("\n## Use\n")[1].split("```python\n")[1].split("```")[0]


RUN_SNIPPETS = """
import json, sys
for name in json.loads(sys.argv[2]):
    sys.modules[name] = None  # as if the project weren't installed
found = {}
for name, code in json.loads(sys.argv[1]).items():
    names = {"print": lambda text: None}
    exec(code, names)
    found[name] = [names["prompt"], len(names["answer"]), names["tokenizer"].decode(names["inputs"]["input_ids"][0])]
print(json.dumps(found))
"""


def test_snippets_chat(models, tmp_path):
    """The code on each card runs without the project, gives the model what its template makes of a message, once, and
    shows what it answers alone."""
    codes = {}
    for name, folder in models.items():
        code = code_of((folder / "README.md").read_text())
        assert code == folder_card(folder, name).snippet + "\n" and 'import"' not in code
        codes[name] = code.replace(f'"{name}"', json.dumps(str(folder)))
    project = "attnres families_attnres modeling_attnres depth_mixers_attnres depth_attention_attnres"
    project += " configuration_attnres attnres_convert"
    command = [sys.executable, "-c", RUN_SNIPPETS, json.dumps(codes), json.dumps(project.split())]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    cwd = models["converted"].parent  # where the path of the adapter's base starts
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, (prompt, length, text) in json.loads(done.stdout.splitlines()[-1]).items():
        tokenizer = AutoTokenizer.from_pretrained(models[name])
        messages = [{"role": "user", "content": "What is a residual stream?"}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert prompt == text == expected and expected.count("<bos>") == 1 and 0 < length <= 100


def test_cards_without_a_chat_template(models, tmp_path):
    """Where there is none, or no text is generated, the snippet is what it was; a template in the configuration of the
    tokenizer counts too."""
    folder = shutil.copytree(models["converted"], tmp_path / "model", symlinks=True)
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    assert 'tokenizer("import"' in folder_card(folder).snippet
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    assert "apply_chat_template" in folder_card(folder).snippet
    config = json.loads((folder / "config.json").read_text())
    config["architectures"] = ["AttnResForSequenceClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    assert 'tokenizer("import"' in folder_card(folder).snippet and "generate" not in folder_card(folder).snippet


def test_dry_run_chats(models, capsys):
    """What is generated before a push answers a message in the model's own template; so does an adapter's."""
    push(PushOptions(folder=models["depth"], repo="me/chat", dry_run=True))
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loads without"))
    assert f"'<bos><|im_start|>user\\n{TEST_MESSAGE}<eos>\\n<|im_start|>assistant\\n" in line
    text = load_as_stranger(collect(models["converted"]), adapter=dict(walk(models["lora"], models["lora"])))
    assert text.startswith(f"<bos>[user]{TEST_MESSAGE}<eos>[assistant]")


def test_dry_run_with_a_broken_template(models, tmp_path):
    """A template that takes no message of a user is said to be wrong, before anything is uploaded."""
    folder = shutil.copytree(models["pretrained"], tmp_path / "model", symlinks=True)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users here') }}")
    with pytest.raises(ValueError, match="the chat template can't be filled: no users here .*; correct it, or leave"):
        push(PushOptions(folder=folder, repo="me/chat", dry_run=True))


def test_no_negative_zero():
    """What rounds to zero has no sign, in cards, tables and figures; everything else has the sign it had."""
    assert {decimals(value, sign="+") for value in (-0.0, 0.0, -4e-5, 4e-5, -1e-300)} == {"0.0000"}
    assert [decimals(value, sign="+") for value in (6e-5, -6e-5, -1.5)] == ["+0.0001", "-0.0001", "-1.5000"]
    assert [decimals(-0.004, 2), decimals(-0.006, 2), decimals(12.345678)] == ["0.00", "-0.01", "12.3457"]
    assert [shown(-0.0), shown(0.0), shown(-1e-7), shown(-0.5)] == ["0.0000", "0.0000", "-1.0e-07", "-0.5000"]
    assert decimals(math.nan) == "nan" and decimals(-math.inf) == "-inf"
    from attnres_recipes.evaluation import number

    assert number(-1e-9, "+") == "0.0000" and number(-1234.5, "+") == "-1,234" and number(0.25, "+") == "+0.2500"
