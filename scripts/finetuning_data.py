# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Conversations, or prompts and completions, as sequences with labels on the answers alone.

An example is a conversation (`messages`) or a prompt and its completion, both text or both messages. It is cut into
stretches of text that are context or answer, each tokenised by itself, as they are when the model is used: what the
user sends, then what the model generates. Examples are packed whole: position ids restart with each, from which
transformers, as no attention mask is given, keeps attention within an example.
"""

import ast
import bisect
import hashlib
import json
import os
import platform
from collections.abc import Iterator

import datasets
import jinja2
import numpy as np
import torch
from training_data import (
    STDLIB,
    DataError,
    data_name,
    first_line,
    is_held_out,
    load_rows,
    stdlib_files,
    text_hash,
    vocabulary_key,
)


IGNORED = -100  # the label that transformers' losses leave out
CHAT_COLUMNS, PROMPT_COLUMNS = ["messages"], ["prompt", "completion"]
STDLIB_CHAT = "stdlib-chat"
STDLIB_CHARACTERS = 2000  # of a function at most
ENCODING_VERSION = 1  # part of the cache's key, to be raised when `encode` changes
EXAMPLE_FEATURES = datasets.Features(
    {
        "input_ids": datasets.Sequence(datasets.Value("int32")),
        "labels": datasets.Sequence(datasets.Value("int32")),
        "num_tokens": datasets.Value("int64"),
        "first_label": datasets.Value("int64"),
        "document": datasets.Value("int64"),
        "hash": datasets.Value("int64"),
    }
)

# ChatML, with the tokenizer's own end of text after each message, so that generation stops there
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
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


def stdlib_functions(python: str) -> Iterator[dict[str, str]]:
    """Functions of Python's standard library that have a docstring: all up to its end, and the rest.

    Args:
        python: the version, part of the cache's key.
    """
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
            end_of_prompt = node.body[0].end_lineno - node.lineno + 1
            prompt, body = own[:end_of_prompt], own[end_of_prompt:]
            if body and sum(map(len, own)) <= STDLIB_CHARACTERS:
                yield {"prompt": "".join(prompt), "completion": "".join(body)}


def as_chat(row: dict[str, str]) -> dict[str, list[dict[str, str]]]:
    question = {"role": "user", "content": f"Complete this Python function.\n\n{row['prompt']}"}
    return {"messages": [question, {"role": "assistant", "content": row["completion"]}]}


def load_examples(
    data: list[str], columns: list[str] | None = None, config: str | None = None, split: str = "train"
) -> datasets.Dataset:
    """The rows, with one column of conversations or two of prompts and completions.

    Args:
        data: `["stdlib"]` or `["stdlib-chat"]`, files or folders of one kind, or `[id]` of a data set on the Hub.
        columns: one name or two; by default `messages` if there is such a column, else `prompt` and `completion`.
        config: configuration of a data set on the Hub.
        split: which split, also with a slice as in `train[:1%]`.

    Raises:
        DataError: it can't be read, is empty or has no such columns.
    """
    if data in ([STDLIB], [STDLIB_CHAT]):
        rows = datasets.Dataset.from_generator(stdlib_functions, gen_kwargs={"python": platform.python_version()})
        return rows if data == [STDLIB] else rows.map(as_chat, remove_columns=rows.column_names, desc="chat")
    rows, first = load_rows(data, columns or [], config, split, option="--columns")
    for usual in (CHAT_COLUMNS, PROMPT_COLUMNS):
        if columns is None and first.keys() >= set(usual):
            columns = usual
    if columns is None:
        raise DataError(
            f"{data_name(data)} has neither a column 'messages' nor columns 'prompt' and 'completion'; choose with "
            f"--columns from: {', '.join(first)}."
        )
    return rows.select_columns(columns)


def set_chat_template(tokenizer):
    """Gives a tokenizer that has no chat template one, which is saved with it."""
    if tokenizer.chat_template is None:
        end = "" if tokenizer.eos_token else "'<|im_end|>'"
        tokenizer.chat_template = CHAT_TEMPLATE.replace("eos_token", end) if end else CHAT_TEMPLATE


def is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value)
    )


def uses_chat(rows: datasets.Dataset) -> bool:
    return any(is_chat(value) for value in rows[0].values())


Example = list[tuple[str, bool]]  # stretches of text, and whether each is an answer


def chat_examples(messages: list[dict], tokenizer, first_answer: int = 0) -> list[Example]:
    """A conversation as the chat template renders it, with the assistant's turns as answers.

    An answer begins where the template's generation prompt ends. A template that renders earlier turns differently once
    others follow, as those that leave out old reasoning, gives an example for each turn that was seen otherwise.

    Args:
        first_answer: number of messages that are context, whoever wrote them.

    Raises:
        ValueError: the template can't tell where an answer begins.
    """
    messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
    examples, text = [], None
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < max(first_answer, 1):
            continue
        context = tokenizer.apply_chat_template(messages[:index], tokenize=False)
        prompt = tokenizer.apply_chat_template(messages[:index], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages[: index + 1], tokenize=False)
        prompt = os.path.commonprefix([prompt, whole])
        if len(prompt) < len(context):
            raise ValueError("can't be trained on: the chat template changes what stands before an answer")
        if text is not None and prompt.startswith(text):
            examples[-1].append((prompt[len(text) :], False))
        else:
            examples.append([(prompt, False)])
        examples[-1].append((whole[len(prompt) :], True))
        text = whole
    return examples


def row_examples(values: list, tokenizer) -> list[Example]:
    """The examples in a row.

    Args:
        values: of one column, a conversation, or of two, prompt and completion.

    Raises:
        ValueError: they are of another kind.
    """
    if all(map(is_chat, values)):
        return chat_examples(sum(values, []), tokenizer, first_answer=len(values[0]) if len(values) == 2 else 0)
    if len(values) == 2 and all(isinstance(value, str) for value in values):
        return [[(values[0], False), (values[1], True)]]
    wanted = "a list of messages with role and content"
    wanted = wanted if len(values) == 1 else f"text, or {wanted}, in both columns"
    raise ValueError(f"doesn't hold {wanted}, but {json.dumps(values, default=str):.80}")


def tokens(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def tokens_after(text: str, tokenizer) -> list[int]:
    """Tokens of what follows other text: without the space that some tokenizers put in front of every text."""
    before, both = tokens("\n", tokenizer), tokens("\n" + text, tokenizer)
    return both[len(before) :] if both[: len(before)] == before else tokens(text, tokenizer)


def labelled(example: Example, tokenizer, has_template: bool) -> dict[str, list[int]]:
    """Tokens and labels. Without a chat template the tokenizer begins a text as always, and the answer is its end."""
    eos = tokenizer.eos_token_id
    input_ids, labels = [], []
    for index, (text, is_answer) in enumerate(example):
        if index:
            ids = tokens_after(text, tokenizer)
        elif has_template:
            ids = tokens(text, tokenizer)
        else:
            ids = tokenizer(text, verbose=False)["input_ids"]
            ids = ids[:-1] if ids and ids[-1] == eos else ids
        if is_answer and not has_template and eos is not None:
            ids = [*ids, eos]
        input_ids += ids
        labels += ids if is_answer else [IGNORED] * len(ids)
    return {"input_ids": input_ids, "labels": [IGNORED, *labels[1:]] if labels else []}


def encode(batch: dict, indices: list[int], tokenizer, name: str) -> dict[str, list]:
    """Rows as examples with tokens and labels. `first_label` is where the first answer begins, or `num_tokens`."""
    encoded = {name: [] for name in EXAMPLE_FEATURES}
    for index, *values in zip(indices, *batch.values()):
        try:
            examples = row_examples(values, tokenizer)
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise DataError(f"row {index} of {name} {first_line(error)}.") from None
        for example in examples:
            item = labelled(example, tokenizer, has_template=is_chat(values[0]))
            length = len(item["input_ids"])
            first = next((at for at, label in enumerate(item["labels"]) if label != IGNORED), length)
            item |= {"num_tokens": length, "first_label": first, "document": index, "hash": text_hash(example[0][0])}
            for key, value in item.items():
                encoded[key].append(value)
    return encoded


def encoded_examples(rows: datasets.Dataset, tokenizer, name: str) -> datasets.Dataset:
    """All examples, kept in the cache of `datasets` for the next run with the same data, tokenizer and template."""
    key = f"{rows._fingerprint} {ENCODING_VERSION} {rows.column_names} {vocabulary_key(tokenizer)}"
    key += f" {tokenizer.chat_template}"
    return rows.map(
        encode,
        batched=True,
        batch_size=256,
        with_indices=True,
        fn_kwargs={"tokenizer": tokenizer, "name": name},
        remove_columns=rows.column_names,
        features=EXAMPLE_FEATURES,
        new_fingerprint=hashlib.sha256(key.encode()).hexdigest()[:16],
        desc="tokenising",
    )


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
        self.lengths = np.minimum(np.asarray(self.examples["num_tokens"][:], dtype=np.int64), seq_len)
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
    """A batch `(batch, seq)`, padded at the end: each token there is at position 0, so a document of its own."""
    padding = {"input_ids": pad_token_id, "labels": IGNORED, "position_ids": 0}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([item[name] for item in sequences], True, value)
        for name, value in padding.items()
    }
    return {**batch, "documents": torch.cat([item["documents"] for item in sequences])}


def split_and_pack_examples(
    examples: datasets.Dataset, seq_len: int, fraction: float, packing: bool = True
) -> tuple[PackedExamples, PackedExamples, dict[str, int]]:
    """Sequences to train on and held-out ones, and how many examples were too long or had no answer to learn.

    Examples with the same prompt are on the same side. Where the first `seq_len` tokens hold no answer, nothing is
    left to learn.

    Raises:
        DataError: one of the two is empty.
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
        raise DataError(
            f"none of the {len(usable)} examples has an answer within --seq-len {seq_len}; the shortest answer begins "
            f"after {first.min()} tokens."
            if len(first) and (first < lengths).any()
            else "no conversation has a turn of the assistant to learn from, or all answers are empty."
        )
    held_out = is_held_out(hashes.astype(np.int64), fraction)
    train, test = (examples.select(np.flatnonzero(usable & side)) for side in (~held_out, held_out))
    for side, what in ((train, "to train on"), (test, "held out")):
        if not len(side):
            raise DataError(
                f"too little data: {len(usable)} examples, none of them {what}; give more, or change --held-out."
            )
    return PackedExamples(train, seq_len, packing), PackedExamples(test, seq_len, packing), counts
