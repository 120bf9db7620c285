# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Conversations as they are found, as the messages that chat templates take.

A conversation is a list of `role` and `content`, or of ShareGPT's `from` and `value`; in Alpaca's rows it is an
`instruction` with an `input` and an `output`. Fields that are null are as if they weren't there.
"""

from collections.abc import Callable
from contextlib import suppress

import datasets
import jinja2
from attnres_convert import InputError


CHAT_COLUMNS = ("messages", "conversations", "conversation", "dialog")  # each holds whole conversations
ALPACA_COLUMNS, ALPACA_INPUT = ["instruction", "output"], "input"
ALPACA_FEATURES = datasets.Features({"messages": [{name: datasets.Value("string") for name in ("role", "content")}]})
ROLES = {  # what speakers are called in ShareGPT's form
    "system": ("system",),
    "user": ("human", "prompter", "user"),
    "assistant": (
        "ai", "assistant", "bard", "bing", "bot", "chatbot", "chatgpt", "claude", "gpt", "gpt-3.5", "gpt-4", "model"
    ),
    "tool": ("function", "function_response", "ipython", "observation", "tool", "tool_response"),
}  # fmt: skip
SPEAKERS = {speaker: role for role, speakers in ROLES.items() for speaker in speakers}
REJECTED = (jinja2.TemplateError, TypeError, KeyError)  # by a chat template, on purpose or by what it lacks


class UnknownSpeaker(ValueError):
    """Somebody speaks in a conversation of whom nobody can know whether it is the user or the model."""


def is_chat(value) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(message, dict) and any(isinstance(message.get(key), str) for key in ("role", "from"))
            for message in value
        )
    )


def without_nulls(value):
    """Rows of a table have the same fields; those that one lacks are null in it."""
    if isinstance(value, dict):
        return {name: without_nulls(item) for name, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def plain_messages(conversation: list[dict]) -> list[dict]:
    """Messages of `role` and `content`, which is text, also where it was given as a list of parts. Where a message has
    something else instead, such as calls of tools, it has no `content`.

    Raises:
        UnknownSpeaker: of ShareGPT's form.
        ValueError: a part isn't text, or a turn has nothing.
    """
    conversation = without_nulls(conversation)
    speakers = {message["from"] for message in conversation if "role" not in message}
    if unknown := sorted(speaker for speaker in speakers if speaker.strip().lower() not in SPEAKERS):
        raise UnknownSpeaker(f"has turns of {', '.join(map(repr, unknown))}; known are {', '.join(sorted(SPEAKERS))}")
    return list(map(_plain_message, conversation))


def _plain_message(message: dict) -> dict:
    if "role" not in message:
        if "value" not in message and message.keys() != {"from"}:
            raise ValueError(f"has a turn of {message['from']!r} without a value")
        content = message.get("value", "")
        message = {"role": SPEAKERS[message["from"].strip().lower()], "content": content}
    parts = message.get("content")
    if isinstance(parts, list):
        for part in parts:
            if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
                kind = part.get("type") if isinstance(part, dict) else part
                raise ValueError(f"has a message with a part that isn't text, {kind!r:.40}")
        return {**message, "content": "".join(part["text"] for part in parts)}
    return {**message, "content": ""} if message.keys() == {"role"} else message


def alpaca_messages(batch: dict, indices: list[int], name: str) -> dict[str, list]:
    """A user's turn, the instruction and below a blank line the input, and an answer. A row without instruction or
    output has no messages."""
    found = []
    for index, instruction, text, output in zip(
        indices, batch["instruction"], batch.get(ALPACA_INPUT, [None] * len(indices)), batch["output"]
    ):
        for column, value in (("instruction", instruction), (ALPACA_INPUT, text), ("output", output)):
            if not isinstance(value, (str, type(None))):
                raise InputError(f"row {index} of {name} doesn't hold text in column {column!r}, but {value!r:.80}.")
        question = f"{instruction}\n\n{text}" if text else instruction
        turns = (("user", question), ("assistant", output))
        is_whole = instruction is not None and output is not None
        found.append([{"role": role, "content": content} for role, content in turns] if is_whole else [])
    return {"messages": found}


def with_system_in_first_turn(messages: list[dict]) -> list[dict] | None:
    """With the system's turns at the beginning in front of what the user says first, and a blank line between them;
    `None` if there are none, or somebody else speaks next."""
    first = next((index for index, message in enumerate(messages) if message["role"] != "system"), 0)
    if not first or messages[first]["role"] != "user":
        return None
    texts = [message.get("content", "") for message in messages[: first + 1]]
    return [{**messages[first], "content": "\n\n".join(texts)}, *messages[first + 1 :]]


def first_accepted(use: Callable[[list[dict]], object], messages: list[dict]) -> tuple[object, list[dict]]:
    """What `use` returns for the messages or, if the chat template rejects them, for those of
    [`with_system_in_first_turn`]; and which of them these were.

    Raises:
        what the template raises for the messages as they are, if it takes neither.
    """
    try:
        return use(messages), messages
    except REJECTED:
        folded = with_system_in_first_turn(messages)
        if folded is None:
            raise
        with suppress(*REJECTED):
            return use(folded), folded
        raise


def generation_prompt(tokenizer, messages: list[dict]) -> str:
    """The text after which the model answers."""
    return first_accepted(
        lambda given: tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True), messages
    )[0]
