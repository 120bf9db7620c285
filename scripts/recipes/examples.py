# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Conversations, or prompts and completions, as sequences with labels on the answers alone.

An example is a conversation, in any form that `chats` knows, or a prompt and its completion, both text or both
messages. It is cut into stretches of text that are context or answer, each tokenised by itself, as they are when the
model is used: what the user sends, then what the model generates. Examples are packed whole: position ids restart with
each, from which transformers, as no attention mask is given, keeps attention within an example.
"""

import ast
import bisect
import functools
import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from attnres_convert import InputError
from attnres_convert.reading import first_line, time_limit, understood

from .chats import (
    ALPACA_COLUMNS,
    ALPACA_FEATURES,
    ALPACA_INPUT,
    CHAT_COLUMNS,
    REJECTED,
    UnknownSpeaker,
    alpaca_messages,
    first_accepted,
    is_chat,
    plain_messages,
    without_nulls,
)
from .data import (
    checked_text,
    data_name,
    held_out_rows,
    load_rows,
    mapped,
    reading,
    stdlib_files,
    text_hash,
    vocabulary_key,
)
from .defaults import STDLIB


IGNORED = -100  # the label that transformers' losses leave out
PROMPT_COLUMNS, TOOLS_COLUMN = ["prompt", "completion"], "tools"
# whose columns are looked for, the first ones first
USUAL_COLUMNS = ([CHAT_COLUMNS[0]], PROMPT_COLUMNS, *([name] for name in CHAT_COLUMNS[1:]), ALPACA_COLUMNS)
STDLIB_CHAT = "stdlib-chat"
STDLIB_DOCSTRINGS = "stdlib-docstrings"
STDLIB_CHARACTERS = 2000  # of a function at most
DOCSTRING_CHARACTERS = (600, 100)  # of a function, and of its docstring's first line, at most
TEMPLATE_SECONDS = 20  # to fill in a chat template; one conversation takes milliseconds
ENCODING_VERSION = 3  # part of the cache's key, to be raised when `encode` changes
EXAMPLE_FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "num_tokens": datasets.Value("int64"),
        "first_label": datasets.Value("int64"),
        "document": datasets.Value("int64"),
        "hash": datasets.Value("int64"),
        "problem": datasets.Value("string"),  # why a row is left out
        "folded": datasets.Value("bool"),  # whether the system's turn is in the user's
    }
)
# ChatML, with the tokenizer's own end of text after each message, so that generation stops there
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message.tool_calls or message.content is not string %}
{{- raise_exception('this chat template knows messages of text alone; use a tokenizer with one for tools') }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
{%- else %}
{{- message['content'] + eos_token }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def documented_functions() -> Iterator[tuple[list[str], slice, str]]:
    """Functions of Python's standard library that have a docstring and more: the lines, where the docstring is in them,
    and its text."""
    for file in stdlib_files():
        source = file.read_text(encoding="utf-8", errors="replace")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a few are examples of what is not Python
            continue
        lines = source.splitlines(keepends=True)
        for node in ast.walk(tree):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or ast.get_docstring(node) is None:
                continue
            own = [line[node.col_offset :] or "\n" for line in lines[node.lineno - 1 : node.end_lineno]]
            docstring = slice(node.body[0].lineno - node.lineno, node.body[0].end_lineno - node.lineno + 1)
            if docstring.stop < len(own):
                yield own, docstring, ast.get_docstring(node)


def stdlib_functions(python: str) -> Iterator[dict[str, str]]:
    """Functions as prompts and completions: all up to the docstring's end, and the rest.

    Args:
        python: the version, part of the cache's key.
    """
    for lines, docstring, _ in documented_functions():
        if sum(map(len, lines)) <= STDLIB_CHARACTERS:
            yield {"prompt": "".join(lines[: docstring.stop]), "completion": "".join(lines[docstring.stop :])}


def stdlib_docstrings(python: str) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Conversations: a short function without its docstring, and the first line of that, if it is a sentence.

    Args:
        python: the version, part of the cache's key.
    """
    for lines, docstring, text in documented_functions():
        code, answer = "".join([*lines[: docstring.start], *lines[docstring.stop :]]), text.partition("\n")[0].strip()
        if len(code) <= DOCSTRING_CHARACTERS[0] and 20 <= len(answer) <= DOCSTRING_CHARACTERS[1] and answer[-1] == ".":
            question = f"Write a one-line docstring for this Python function.\n\n{code}"
            yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def as_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    question = {"role": "user", "content": f"Complete this Python function.\n\n{row['prompt']}"}
    return {"messages": [question, {"role": "assistant", "content": row["completion"]}]}


def load_examples(
    data: list[str], columns: list[str] | None = None, config: str | None = None, split: str = "train"
) -> datasets.Dataset:
    """The rows, with one column of conversations or two of prompts and completions, and `tools` if there is one.

    Args:
        data: `["stdlib"]`, `["stdlib-chat"]` or `["stdlib-docstrings"]`, files or folders of one kind, or `[id]` of a
            data set on the Hub.
        columns: one name or two; by default the first of USUAL_COLUMNS that are there. Alpaca's become conversations.
        config: configuration of a data set on the Hub.
        split: which split, also with a slice as in `train[:1%]`.

    Raises:
        InputError: it can't be read, is empty or has no such columns.
    """
    if data in ([STDLIB], [STDLIB_CHAT], [STDLIB_DOCSTRINGS]):
        generator = stdlib_docstrings if data == [STDLIB_DOCSTRINGS] else stdlib_functions
        rows = datasets.Dataset.from_generator(generator, gen_kwargs={"python": platform.python_version()})
        return rows.map(as_chat, remove_columns=rows.column_names, desc="chat") if data == [STDLIB_CHAT] else rows
    rows, first = load_rows(data, columns or [], config, split, option="--columns")
    found = columns or next((usual for usual in USUAL_COLUMNS if first.keys() >= set(usual)), None)
    if found is None:
        raise InputError(
            f"{data_name(data)} has neither a column 'messages' nor 'conversations', nor columns 'prompt' and "
            f"'completion' or 'instruction' and 'output'; choose with --columns from: {', '.join(first)}."
        )
    if columns is None and found == ALPACA_COLUMNS:
        kept = [name for name in (*ALPACA_COLUMNS, ALPACA_INPUT) if name in first]
        options = {"fn_kwargs": {"name": data_name(data)}, "features": ALPACA_FEATURES, "remove_columns": kept}
        with reading(data_name(data)):
            return rows.select_columns(kept).map(
                alpaca_messages, batched=True, with_indices=True, desc="chat", **options
            )
    tools = [TOOLS_COLUMN] if TOOLS_COLUMN in first and TOOLS_COLUMN not in found else []
    return rows.select_columns([*found, *tools])


def set_chat_template(tokenizer):
    """Gives a tokenizer that has no chat template one, which is saved with it."""
    if tokenizer.chat_template is None:
        end = "" if tokenizer.eos_token else "'<|im_end|>'"
        tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", end) if end else CHAT_TEMPLATE


@contextmanager
def filled_in(name: str):
    """What goes wrong with a chat template, which is a program, in one line that begins with `name`."""
    with time_limit(TEMPLATE_SECONDS, f"{name}: it doesn't come to an end"), understood(name):
        yield


def uses_chat(rows: datasets.Dataset) -> bool:
    """Whether the first row that isn't empty holds conversations."""
    columns = [name for name in rows.column_names if name != TOOLS_COLUMN]
    first = next((row for row in rows.select_columns(columns) if any(row.values())), {})
    return any(map(is_chat, first.values()))


Example = list[tuple[str, bool]]  # stretches of text, and whether each is an answer


def end_of_answer(text: str, tokenizer) -> int:
    """The length of an answer without the white space that a template puts behind the token which ends a turn: there
    generation has stopped."""
    end = len(text.rstrip())
    ends_a_turn = any(
        text.endswith(token, 0, end) for token in [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    )
    return end if ends_a_turn else len(text)


def chat_examples(messages: list[dict], tokenizer, first_answer: int = 0, tools: list | None = None) -> list[Example]:
    """A conversation as the chat template renders it, with the assistant's turns as answers.

    An answer begins where the template's generation prompt ends; the first message is none. A template that renders
    earlier turns differently once others follow, as those that leave out old reasoning, gives an example for each turn
    that was seen otherwise.

    Args:
        first_answer: number of messages that are context, whoever wrote them.
        tools: definitions that the template may put in front.

    Raises:
        ValueError: the template can't tell where an answer begins.
    """
    render = functools.partial(tokenizer.apply_chat_template, tools=tools, tokenize=False)
    examples, text = [], None
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < max(first_answer, 1):
            continue
        context = render(messages[:index])
        prompt = render(messages[:index], add_generation_prompt=True)
        whole = render(messages[: index + 1])
        prompt = os.path.commonprefix([prompt, whole])
        if len(prompt) < len(context):
            raise ValueError("can't be trained on: the chat template changes what stands before an answer")
        end = len(prompt) + end_of_answer(whole[len(prompt) :], tokenizer)
        if text is not None and prompt.startswith(text):
            examples[-1].append((prompt[len(text) :], False))
        else:
            examples.append([(prompt, False)])
        examples[-1].append((whole[len(prompt) : end], True))
        text = whole[:end]
    return examples


class EmptyRow(ValueError):
    """A row that lacks a conversation, a prompt or a completion."""


def row_examples(values: list, tokenizer, tools=None) -> tuple[list[Example], bool]:
    """The examples in a row, and whether the system's turn had to go into the user's.

    Args:
        values: of one column, a conversation, or of two, prompt and completion.
        tools: definitions of tools for a conversation, as a list or as JSON.

    Raises:
        ValueError: they are of another kind, or there are none.
    """
    if all(map(is_chat, values)):
        try:
            tools = without_nulls(json.loads(tools or "null") if isinstance(tools, str) else tools)
        except ValueError:
            raise ValueError(f"has tools that aren't JSON, {tools!r:.40}") from None
        messages = plain_messages(sum(values, []))
        first_answer = len(values[0]) if len(values) == 2 else 0
        examples, given = first_accepted(
            lambda given: chat_examples(given, tokenizer, first_answer + len(given) - len(messages), tools or None),
            messages,
        )
        return examples, len(given) < len(messages)
    if len(values) == 2 and all(isinstance(value, str) for value in values):
        return [[(values[0], False), (values[1], True)]], False
    if any(value is None or value == [] for value in values):
        raise EmptyRow("is empty")
    wanted = "a list of messages with role and content, or from and value"
    wanted = wanted if len(values) == 1 else f"text, or {wanted}, in both columns"
    raise ValueError(f"doesn't hold {wanted}, but {json.dumps(values, default=str):.80}")


def tokens(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokens_after(text: str, tokenizer) -> list[int]:
    """Tokens of what follows other text: without the space that some tokenizers put in front of every text."""
    before, both = tokens("\n", tokenizer), tokens("\n" + text, tokenizer)
    return both[len(before) :] if both[: len(before)] == before else tokens(text, tokenizer)


def labelled(example: Example, tokenizer, has_template: bool) -> dict[str, list[int]]:
    """Tokens and labels. Without a chat template the tokenizer begins a text as always, and the answer is its end.

    What stands before an answer is cut as the whole text up to there is, as it will be when the model is used, unless
    that changes tokens of an answer before it.
    """
    eos = tokenizer.eos_token_id
    input_ids, labels, so_far = [], [], ""
    for index, (text, is_answer) in enumerate(example):
        so_far += text
        if index and is_answer:
            ids = tokens_after(text, tokenizer)
        elif index:
            whole = tokens(so_far, tokenizer)
            is_same = whole[: len(input_ids)] == input_ids
            ids = whole[len(input_ids) :] if is_same else tokens_after(text, tokenizer)
        elif has_template:
            ids = tokens(text, tokenizer)
        else:
            own, ids = tokens(text, tokenizer), tokenizer(text, verbose=False)["input_ids"]
            if ids[-1:] == [eos] and own[-1:] != [eos]:  # the tokenizer ends a text by itself
                ids = ids[:-1]
        if is_answer and not has_template and eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        input_ids += ids
        labels += ids if is_answer else [IGNORED] * len(ids)
    return {"input_ids": input_ids, "labels": [IGNORED, *labels[1:]] if labels else []}


def encode(batch: dict, indices: list[int], tokenizer, name: str) -> dict[str, list]:
    """Rows as examples with tokens and labels. `first_label` is where the first answer begins, or `num_tokens`.

    A row without an answer is an example without tokens, so that it can be counted; so is one with a `problem`: it is
    empty, the chat template rejects it, or it isn't understood, unless it is the first one.

    Raises:
        InputError: the first row isn't understood, nobody knows who speaks in one, or one is too long.
    """
    encoded = {name: [] for name in EXAMPLE_FEATURES}
    tools = batch.get(TOOLS_COLUMN, [None] * len(indices))
    columns = [values for column, values in batch.items() if column != TOOLS_COLUMN]
    for index, tool_list, *values in zip(indices, tools, *columns):
        examples, folded, problem = [], False, None
        try:
            with time_limit(TEMPLATE_SECONDS, f"row {index} of {name}: the chat template doesn't come to an end"):
                examples, folded = row_examples(values, tokenizer, tool_list)
        except InputError:
            raise
        except REJECTED as error:
            problem = f"doesn't go with the chat template: {first_line(error)}"
        except ValueError as error:
            problem = first_line(error)
            if isinstance(error, UnknownSpeaker) or index == 0 and not isinstance(error, EmptyRow):
                raise InputError(f"row {index} of {name} {problem}.") from None
        for example in examples or [[("", False)]]:
            checked_text("".join(text for text, _ in example), index, " and ".join(batch))
            item = labelled(example, tokenizer, has_template=not examples or is_chat(values[0]))
            length = len(item["input_ids"])
            first = next((at for at, label in enumerate(item["labels"]) if label != IGNORED), length)
            item |= {"num_tokens": length, "first_label": first, "document": index, "hash": text_hash(example[0][0])}
            item |= {"problem": problem, "folded": folded}
            for key, value in item.items():
                encoded[key].append(value)
    return encoded


def encoded_examples(rows: datasets.Dataset, tokenizer, name: str) -> datasets.Dataset:
    """All examples, kept in the cache of `datasets` for the next run with the same data, tokenizer and template.

    Raises:
        InputError: what [`encode`] raises, or there is a problem with each row.
    """
    key = f"{rows._fingerprint} {ENCODING_VERSION} {rows.column_names} {vocabulary_key(tokenizer)}"
    key += f" {tokenizer.chat_template}"
    examples = mapped(rows, encode, {"tokenizer": tokenizer, "name": name}, EXAMPLE_FEATURES, key, name)
    first = examples[0]
    if first["problem"] and not has_no_problem(examples).any():
        raise InputError(f"none of the {len(rows)} rows can be learned from: row 0 of {name} {first['problem']}.")
    return examples


def has_no_problem(examples: datasets.Dataset) -> np.ndarray:
    problems = examples.with_format("arrow")["problem"][:]
    return pc.is_null(problems).to_numpy(zero_copy_only=False)


def without_problems(examples: datasets.Dataset) -> tuple[datasets.Dataset, dict[str, int], list[str]]:
    """The examples that there is no problem with; how many rows there are, are left out (`skipped`), and have the
    system's turn in the user's; and a line for each that isn't zero."""
    columns = examples.with_format("numpy")
    documents, folded, is_good = columns["document"][:], columns["folded"][:], has_no_problem(examples)
    rows = len(np.unique(documents))
    counts = {"rows": rows, "skipped": int((~is_good).sum()), "system_in_user_turn": len(np.unique(documents[folded]))}
    lines = []
    if counts["system_in_user_turn"]:
        reason = "the chat template rejects it"
        lines.append(f"{counts['system_in_user_turn']} of {rows} rows have the system's turn in the user's: {reason}")
    if not counts["skipped"]:
        return examples, counts, lines
    first = examples[int(is_good.argmin())]
    reason = f"row {first['document']} {first['problem']}"
    lines.append(f"{counts['skipped']} of {rows} rows are left out; the first one: {reason}")
    return examples.select(np.flatnonzero(is_good)), counts, lines


def pack(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Indices of examples for each sequence: the longest first, each into the fullest sequence that has room for it."""
    sequences, by_space, spaces = [], {}, []
    for index in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[index])
        at = bisect.bisect_left(spaces, length)
        if at == len(spaces):
            sequences.append([])
            space, sequence = seq_len, len(sequences) - 1
        else:
            space = spaces[at]
            sequence = by_space[space].pop()
            if not by_space[space]:
                del by_space[space], spaces[at]
        sequences[sequence].append(index)
        space -= length
        if space not in by_space:
            by_space[space] = []
            bisect.insort(spaces, space)
        by_space[space].append(sequence)
    return sequences


class PackedExamples(torch.utils.data.Dataset):
    """Examples of at most `seq_len` tokens, longer ones without their ends, together as sequences of that length.

    Args:
        packing: whether a sequence may hold several examples.
    """

    def __init__(self, examples: datasets.Dataset, seq_len: int, packing: bool = True):
        self.examples = examples.with_format("numpy")
        lengths, self.hashes = (np.asarray(self.examples[name][:], np.int64) for name in ("num_tokens", "hash"))
        self.lengths = np.minimum(lengths, seq_len)
        self.seq_len = seq_len
        self.sequences = pack(self.lengths, seq_len) if packing else [[index] for index in range(len(self.lengths))]

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows = self.examples[self.sequences[index]]
        input_ids, labels, positions = [], [], []
        for ids, row_labels in zip(rows["input_ids"], rows["labels"]):
            input_ids.append(ids[: self.seq_len])
            labels.append(row_labels[: self.seq_len])
            positions.append(np.arange(len(input_ids[-1])))
        return {
            "input_ids": torch.from_numpy(np.concatenate(input_ids).astype(np.int64)),
            "labels": torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            "position_ids": torch.from_numpy(np.concatenate(positions)),
            "documents": torch.from_numpy(np.asarray(rows["document"], dtype=np.int64)),
        }


def collate_padded(sequences: list[dict[str, torch.Tensor]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """A batch `(batch, seq)`, padded at the end; the padding of a sequence is a document of its own."""
    padding = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([item[name] for item in sequences], True, value)
        for name, value in padding.items()
    }
    for positions, item in zip(batch["position_ids"], sequences):
        padding = positions[len(item["position_ids"]) :]
        torch.arange(len(padding), out=padding)
    return {**batch, "documents": torch.cat([item["documents"] for item in sequences])}


def split_and_pack_examples(
    examples: datasets.Dataset, seq_len: int, fraction: float, packing: bool = True
) -> tuple[PackedExamples, PackedExamples, dict[str, int]]:
    """Sequences to train on and held-out ones, and how many examples were too long or had no answer to learn.

    Examples with the same prompt are on the same side. Where the first `seq_len` tokens hold no answer, nothing is
    left to learn.

    Raises:
        InputError: one of the two is empty.
    """
    columns = examples.with_format("numpy")
    hashes, lengths, first = (np.asarray(columns[name][:]) for name in ("hash", "num_tokens", "first_label"))
    usable = first < np.minimum(lengths, seq_len)
    counts = {
        "examples": int(usable.sum()),
        "without_answer": int((~usable).sum()),
        "truncated": int((usable & (lengths > seq_len)).sum()),
    }
    if not usable.any():
        raise InputError(
            f"none of the {len(usable)} examples has an answer within --seq-len {seq_len}; the shortest answer begins "
            f"after {first.min()} tokens."
            if len(first) and (first < lengths).any()
            else "no conversation has a turn of the assistant to learn from, or all answers are empty."
        )
    held_out = held_out_rows(hashes.astype(np.int64), fraction, usable)
    train, test = (examples.select(np.flatnonzero(usable & side)) for side in (~held_out, held_out))
    for side, what in ((train, "to train on"), (test, "held out")):
        if not len(side):
            raise InputError(
                f"too little data: {counts['examples']} examples with an answer, none of them {what}; give more, or "
                "change --held-out."
            )
    return PackedExamples(train, seq_len, packing), PackedExamples(test, seq_len, packing), counts
