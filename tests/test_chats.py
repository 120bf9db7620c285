# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Chats in the forms in which they are found: all forms of a conversation give the same tokens, and what a chat
template rejects is told, counted and left out."""

import json
import re
from pathlib import Path

import datasets
import jinja2
import pytest
import torch
from attnres_convert import InputError
from attnres_recipes import FinetuneOptions, chats, data, examples, finetune
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


# As Gemma's: no turn of the system, and turns that alternate
STRICT = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for message in messages %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
{%- endif %}
{{- '<' + message['role'] + '>' + message['content'] | trim + eos_token }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""
CHATS = [
    [("system", "Be brief."), ("user", "one dog?"), ("assistant", "No."), ("user", "And?"), ("assistant", "Two.")],
    [("user", "Which trees?\n\nthe birds ran"), ("assistant", "past")],
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A tiny Llama with a tokenizer that has no chat template."""
    folder = tmp_path_factory.mktemp("chats")
    tokenizer = data.train_tokenizer(["one dog sat on a mat and two birds ran past the trees. Be brief."] * 9, 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids, vocab_size=len(tokenizer))).save_pretrained(folder)
    return folder


@pytest.fixture(params=["own", "strict"])
def tokenizer(saved, request):
    return with_template(saved, None if request.param == "own" else STRICT)


@pytest.fixture
def strict(saved):
    return with_template(saved, STRICT)


def with_template(folder: Path, template: str | None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    examples.set_chat_template(tokenizer)
    return tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def found(path: Path, rows: list[dict], tokenizer, columns=None) -> datasets.Dataset:
    """The examples in a file, as a run reads them."""
    loaded = examples.load_examples([write(path, rows)], columns)
    assert examples.uses_chat(loaded)
    return examples.encoded_examples(loaded, tokenizer, "data")


def messages(turns: list[tuple[str, str]]) -> list[dict]:
    return [{"role": role, "content": content} for role, content in turns]


def sharegpt(turns: list[tuple[str, str]], **names: str) -> list[dict]:
    return [{"from": names.get(role, role), "value": content, "weight": None} for role, content in turns]


FORMS = {
    "ShareGPT": [{"conversations": sharegpt(turns, user="human", assistant="gpt")} for turns in CHATS],
    "other names": [
        {"conversations": sharegpt(CHATS[0], user="Human", assistant="ChatGPT")},
        {"conversations": sharegpt(CHATS[1], assistant="model")},
    ],
    "conversations of role and content": [{"conversations": messages(turns), "id": 1} for turns in CHATS],
    "messages of from and value": [{"messages": sharegpt(turns, user="human", assistant="bot")} for turns in CHATS],
    "conversation": [{"conversation": messages(turns)} for turns in CHATS],
    "dialog": [{"dialog": sharegpt(turns)} for turns in CHATS],
    "nulls": [
        {"messages": [{**message, "tool_calls": None, "name": None, "from": None} for message in messages(turns)]}
        for turns in CHATS
    ],
    "parts": [
        {"messages": [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]}
        for turns in CHATS
    ],
    "messages before others": [
        {"messages": messages(turns), "conversations": [], "prompt": "a", "completion": "b"} for turns in CHATS
    ],
    "conversations before Alpaca": [
        {"conversations": sharegpt(turns), "instruction": "a", "output": "b"} for turns in CHATS
    ],
    "an empty row first": [{"conversations": row} for row in ([], *map(sharegpt, CHATS))],
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tokenizer, tmp_path):
    """Each form gives the tokens and labels of `messages`."""
    expected = found(tmp_path / "expected.jsonl", [{"messages": messages(turns)} for turns in CHATS], tokenizer)
    rows = found(tmp_path / "found.jsonl", FORMS[form], tokenizer)
    rows, counts, _ = examples.without_problems(rows)
    assert counts["skipped"] == (form == "an empty row first")
    for name in ("input_ids", "labels", "hash"):
        assert rows[name][:] == expected[name][:] and len(rows) == 2
    if FORMS[form][-1].get("conversations"):
        by_name = found(tmp_path / "named.jsonl", FORMS[form], tokenizer, ["conversations"])
        assert by_name["input_ids"][:][-2:] == expected["input_ids"][:]


@pytest.mark.parametrize("inputs", [["the birds ran", "", None], None])
def test_alpaca(inputs, tokenizer, tmp_path):
    """An instruction with its input, which may be empty, null or no column, is the user's turn."""
    rows = [{"instruction": "Which trees?", "input": text, "output": "past"} for text in inputs or [0]]
    if inputs is None:
        del rows[0]["input"]
    texts = [f"Which trees?\n\n{text}" if text else "Which trees?" for text in inputs or [""]]
    expected = [{"messages": messages([("user", text), ("assistant", "past")])} for text in texts]
    expected = found(tmp_path / "expected.jsonl", expected, tokenizer)
    rows = found(tmp_path / "alpaca.jsonl", rows, tokenizer)
    assert rows["input_ids"][:] == expected["input_ids"][:] and rows["labels"][:] == expected["labels"][:]


def test_alpaca_by_name(saved, tmp_path):
    """Two named columns are text, as before; rows without an output are left out, and what isn't text is refused."""
    tokenizer = with_template(saved, None)
    rows = [{"instruction": "one", "input": "", "output": text} for text in ("dog", None)]
    loaded = examples.load_examples([write(tmp_path / "a.jsonl", rows)], ["instruction", "output"])
    assert loaded.column_names == ["instruction", "output"] and not examples.uses_chat(loaded)
    _, counts, lines = examples.without_problems(found(tmp_path / "b.jsonl", rows, tokenizer))
    assert counts["skipped"] == 1 and lines == ["1 of 2 rows are left out; the first one: row 1 is empty"]
    with pytest.raises(InputError, match="row 0 of .*c.jsonl doesn't hold text in column 'output', but 5"):
        examples.load_examples([write(tmp_path / "c.jsonl", [{"instruction": "one", "output": 5}])])


def test_unknown_speakers(tokenizer, tmp_path):
    """Nobody guesses who speaks: all names that aren't known are told, of whatever row."""
    rows = [{"conversations": sharegpt(CHATS[1])}] * 3
    rows.append({"conversations": [{"from": name, "value": "x"} for name in ("human", "Bob", "Alice", "gpt")]})
    with pytest.raises(InputError, match="^row 3 of data has turns of 'Alice', 'Bob'; known are ai, ") as error:
        found(tmp_path / "a.jsonl", rows, tokenizer)
    assert "\n" not in str(error.value)


CALL = {"type": "function", "function": {"name": "count", "arguments": "{}"}}


@pytest.mark.parametrize("given", [{"content": None}, {}])
def test_calls_without_content(given, saved, tmp_path):
    """A call of a tool has no content, whether that is null or not there, as transformers gives it to templates."""
    tokenizer = with_template(
        saved,
        "{% for m in messages %}<{{ m.role }}>{% if m.content is defined %}{{ m.content }}{% else %}"
        "{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}",
    )
    call = {"role": "assistant", "tool_calls": [CALL], **given}
    turns = [{"role": "user", "content": "q", "tool_calls": None}, call, *messages([("tool", "2"), ("assistant", "a")])]
    row = found(tmp_path / "a.jsonl", [{"messages": turns, "tools": ""}], tokenizer)[0]
    assert tokenizer.decode(row["input_ids"]) == "<user>q<assistant>count<tool>2<assistant>a"


def test_null_content(tokenizer, tmp_path):
    """A message of nothing else than null is empty, also in the first row of ShareGPT's form."""
    rows = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": text, "tool_calls": None}]
        for text in (None, "")
    ]
    null, empty = found(tmp_path / "a.jsonl", [{"messages": row} for row in rows], tokenizer)
    assert null == {**empty, "document": 0}
    rows = [[{"from": "human", "value": "q"}, {"from": "gpt", "value": text}] for text in (None, "")]
    assert found(tmp_path / "b.jsonl", [{"conversations": row} for row in rows], tokenizer)[:2] == {
        name: [null[name], empty[name]] for name in empty
    }
    with pytest.raises(InputError, match="row 0 of data has a turn of 'gpt' without a value"):
        found(tmp_path / "c.jsonl", [{"conversations": [{"from": "gpt", "text": "q"}]}], tokenizer)


def test_system_turns(strict, tmp_path):
    """A system's turn that the template rejects is in front of the user's first one, also in prompts of messages and
    when the model is asked; one that is taken stays as it is."""
    user, answer = messages([("user", "Be brief.\n\none dog?"), ("assistant", "No.")])
    folded = found(tmp_path / "a.jsonl", [{"messages": [user, answer]}], strict)[0]
    turns = messages([("system", "Be brief."), ("user", "one dog?"), ("assistant", "No.")])
    rows = found(tmp_path / "b.jsonl", [{"messages": turns}, {"messages": turns[1:]}], strict)
    assert rows[0]["input_ids"] == folded["input_ids"] and rows[0]["labels"] == folded["labels"]
    _, counts, lines = examples.without_problems(rows)
    assert counts == {"rows": 2, "skipped": 0, "system_in_user_turn": 1}
    assert lines == ["1 of 2 rows have the system's turn in the user's: the chat template rejects it"]
    pair = found(tmp_path / "c.jsonl", [{"prompt": turns[:2], "completion": turns[2:]}], strict)[0]
    assert pair["input_ids"] == folded["input_ids"] and pair["labels"] == folded["labels"]
    prompt = chats.generation_prompt(strict, turns[:2])
    assert prompt == "<bos><user>Be brief.\n\none dog?<eos><assistant>"
    with pytest.raises(jinja2.TemplateError, match="System role not supported"):
        chats.generation_prompt(strict, turns[:1])
    strict.chat_template = None
    examples.set_chat_template(strict)
    assert "<|im_start|>system\nBe brief.<eos>" in chats.generation_prompt(strict, turns[:2])


BAD_ROWS = {
    "the assistant begins": ([("assistant", "a"), ("user", "b"), ("assistant", "c")], "doesn't go with the chat temp"),
    "one speaks twice": ([("user", "a"), ("user", "b"), ("assistant", "c")], ".*must alternate"),
    "system and twice": ([("system", "s"), ("user", "a"), ("user", "b"), ("assistant", "c")], ".*System role not supp"),
    "empty": ([], "is empty$"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("at", [0, 2])
def test_rows_that_a_template_rejects(name, at, strict, saved, tmp_path):
    """They are left out, counted and told, wherever they are, and if there is nothing else, refused; where the template
    takes them they are learned from."""
    turns, reason = BAD_ROWS[name]
    rows = [{"conversations": sharegpt(CHATS[1])} for _ in range(4)]
    rows.insert(at, {"conversations": sharegpt(turns)})
    for _ in range(2):  # the second time from the cache
        kept, counts, lines = examples.without_problems(found(tmp_path / "a.jsonl", rows, strict))
        assert counts == {"rows": 5, "skipped": 1, "system_in_user_turn": 0} and len(kept) == 4
        assert all(kept["num_tokens"][:]) and not any(kept["problem"][:])
        assert len(lines) == 1 and lines[0].startswith(f"1 of 5 rows are left out; the first one: row {at} ")
        assert re.search(reason, lines[0])
    if turns:
        own = examples.without_problems(found(tmp_path / "b.jsonl", rows, with_template(saved, None)))
        assert own[1]["skipped"] == 0
        with pytest.raises(InputError, match=f"none of the 1 rows can be learned from: row 0 of data .*{reason}"):
            found(tmp_path / "c.jsonl", [rows[at]], strict)


def test_rows_of_another_kind(strict, tmp_path):
    """The first row tells what the data are: if it isn't understood the run is refused, a later one is left out."""
    good, bad = {"messages": messages(CHATS[1])}, {"messages": [{"speaker": "me", "text": "hello"}]}
    with pytest.raises(InputError, match="^row 0 of data doesn't hold a list of messages with role and content, or "):
        examples.encoded_examples(datasets.Dataset.from_list([bad, good]), strict, "data")
    rows = examples.encoded_examples(datasets.Dataset.from_list([good, bad, good]), strict, "data")
    kept, counts, lines = examples.without_problems(rows)
    assert counts["skipped"] == 1 and len(kept) == 2 and "row 1 doesn't hold a list of messages" in lines[0]


def test_run(saved, strict, tmp_path, capsys):
    """A run on ShareGPT's form counts what it leaves out and folds, and says so in a line each."""
    strict.save_pretrained(tmp_path / "tokenizer")
    rows = [{"conversations": sharegpt([("human", f"{n} dogs?"), ("gpt", "No.")])} for n in range(12)]
    rows[3]["conversations"].insert(0, {"from": "system", "value": "Be brief.", "weight": None})
    rows[5]["conversations"].insert(0, rows[5]["conversations"][1])
    rows[7]["conversations"] = []
    path = write(tmp_path / "chats.jsonl", rows)
    run = {"model": str(saved), "tokenizer": str(tmp_path / "tokenizer"), "data": [path], "seq_len": 32}
    run |= {"method": "depth", "steps": 2, "depth_every": 0, "held_out": 0.2, "output": tmp_path / "run"}
    results = finetune(FinetuneOptions(**run))
    counts = {"rows": 12, "skipped": 2, "system_in_user_turn": 1, "examples": 10, "without_answer": 0}
    assert {name: results[name] for name in counts} == counts
    saved_results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {name: saved_results[name] for name in counts} == counts
    assert capsys.readouterr().err.splitlines() == [
        "1 of 12 rows have the system's turn in the user's: the chat template rejects it",
        "2 of 12 rows are left out; the first one: row 5 doesn't go with the chat template: Conversation roles must "
        "alternate user/assistant/user/assistant/",
    ]


def test_samples(saved, strict, tmp_path):
    """The first held-out prompts, as many as are asked for, also where several are in a sequence."""
    strict.save_pretrained(tmp_path / "tokenizer")
    turns = ({"role": "user", "content": "{n} dogs?"}, {"role": "assistant", "content": "{n} birds."})
    rows = [{"messages": [{**turn, "content": turn["content"].format(n=n)} for turn in turns]} for n in range(40)]
    run = {"model": str(saved), "tokenizer": str(tmp_path / "tokenizer")}
    run |= {
        "data": [write(tmp_path / "chats.jsonl", rows)],
        "steps": 1,
        "batch_size": 2,
        "seq_len": 128,
        "held_out": 0.2,
        "depth_every": 0,
        "samples": 4,
    }
    results = finetune(FinetuneOptions(**run, output=tmp_path / "run"))
    assert results["held_out_sequences"] < 4
    samples = json.loads((tmp_path / "run" / "results.json").read_text())["samples"]
    assert len(samples) == 4
    for sample in samples:
        (number,) = re.findall(r"\d+", sample["prompt"])
        assert sample["prompt"] == f"<user>{number} dogs?<assistant>" and sample["reference"] == f"{number} birds."


def test_a_run_of_an_old_version_goes_on(saved, tmp_path):
    """It has kept what was given alone, also with a number of steps."""
    rows = [{"prompt": f"{n} dogs", "completion": " sat"} for n in range(30)]
    run = {"model": str(saved), "data": [write(tmp_path / "rows.jsonl", rows)], "seq_len": 16, "held_out": 0.2}
    run |= {"steps": 2, "batch_size": 2, "depth_every": 0, "output": tmp_path / "run"}
    expected = finetune(FinetuneOptions(**run))
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    del content["arguments"]["samples"]
    given = {"warmup": 100, "eval_steps": None, "save_steps": None}
    file.write_text(json.dumps({**content, "arguments": {**content["arguments"], **given}}))
    (tmp_path / "run" / "results.json").unlink()
    assert finetune(FinetuneOptions(**run))["held_out_loss"] == expected["held_out_loss"]
