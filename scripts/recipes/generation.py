# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Generation in a terminal: chats with a model that has a chat template, completion of text with one that has none."""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import transformers
from attnres_convert import InputError, reading
from transformers import TextStreamer

from .chats import generation_prompt
from .data import MAX_DOCUMENT
from .examples import filled_in
from .loading import Checkpoint, load_checkpoint, open_checkpoint
from .options import GenerateOptions


@dataclass
class Conversation:
    """The turns of a chat that still fit into the model's context; without a chat, prompts are on their own."""

    checkpoint: Checkpoint
    is_chat: bool
    system: str | None = None
    turns: list[dict] = field(default_factory=list)

    def ask(self, prompt: str) -> torch.Tensor:
        """Token ids of what the model is to go on with: `(1, tokens)`.

        Raises:
            InputError: the prompt alone is too long or has no tokens, or the template can't be filled.
        """
        reading.check_text(prompt, "the prompt")
        turns = [*(self.turns if self.is_chat else []), {"role": "user", "content": prompt}]
        input_ids, context = self.encode(turns), self.checkpoint.context
        while context is not None and input_ids.shape[1] >= context:
            if len(turns) == 1:
                raise InputError(f"the prompt has {input_ids.shape[1]} tokens, the model's context {context}.")
            turns = turns[2:]
            input_ids = self.encode(turns)
        if input_ids.shape[1] == 0:
            raise InputError("the prompt has no tokens; give some text.")
        self.turns = turns
        return input_ids

    def answer(self, text: str):
        self.turns.append({"role": "assistant", "content": text})

    def encode(self, turns: list[dict]) -> torch.Tensor:
        tokenizer = self.checkpoint.tokenizer
        if not self.is_chat:
            with reading.understood("the tokenizer fails"):
                input_ids = tokenizer(turns[-1]["content"], return_tensors="pt")["input_ids"].long()
            self.checkpoint.check(input_ids, "the prompt")
            return input_ids
        system = [{"role": "system", "content": self.system}] if self.system else []
        with filled_in("the chat template can't be filled"):
            text = generation_prompt(tokenizer, system + turns)
            if len(text) > MAX_DOCUMENT:  # no time limit ends a tokenizer
                raise InputError(
                    f"the chat template makes {len(text):,} characters; at most {MAX_DOCUMENT:,} are read."
                )
            input_ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        self.checkpoint.check(input_ids, "the prompt")
        return input_ids


@torch.no_grad()
def answer(model, checkpoint: Checkpoint, input_ids: torch.Tensor, options: GenerateOptions) -> dict:
    """Generates after `input_ids`, shape (1, tokens), and prints the text as it grows."""
    length, longest = input_ids.shape[1], options.max_new_tokens
    if checkpoint.context is not None:
        longest = min(longest, checkpoint.context - length)
    if options.temperature:
        choice = {"do_sample": True, "temperature": options.temperature, "top_k": options.top_k}
    else:
        choice = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    started = time.perf_counter()
    with reading.understood("generation failed"):  # such as probabilities that are no numbers
        tokens = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=torch.ones_like(input_ids, device=model.device),
            max_new_tokens=longest,
            num_beams=1,
            num_return_sequences=1,
            return_dict_in_generate=False,
            pad_token_id=checkpoint.tokenizer.pad_token_id,
            tokenizer=checkpoint.tokenizer,  # for stop strings
            streamer=TextStreamer(checkpoint.tokenizer, skip_prompt=True, skip_special_tokens=True),
            **choice,
        )[0, length:]
    rate = round(len(tokens) / (time.perf_counter() - started), 2)
    text = checkpoint.tokenizer.decode(tokens, skip_special_tokens=True)
    return {"text": text, "tokens": len(tokens), "tokens_per_second": rate}


def prompts(prompt: str | None) -> Iterator[str]:
    if prompt is not None:
        yield prompt
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused, and the next one read
    sign = "> " if sys.stdin.isatty() else ""
    try:
        while line := input(sign).strip():
            yield line
    except EOFError:
        return


def generate(options: GenerateOptions) -> list[dict]:
    """Answers all prompts.

    Raises:
        InputError: the model doesn't load, or the only prompt can't be answered.
    """
    reading.check_text(options.system or "", "--system")
    checkpoint = open_checkpoint(options.model, options.base, options.tokenizer, options.trust_remote_code)
    conversation = Conversation(
        checkpoint, bool(checkpoint.tokenizer.chat_template) and not options.complete, options.system
    )
    if options.system and not conversation.is_chat:
        raise InputError("--system needs a model with a chat template, and no --complete.")
    model = load_checkpoint(checkpoint, options.dtype, options.trust_remote_code)
    transformers.set_seed(options.seed)
    results = []
    for prompt in prompts(options.prompt):
        try:
            input_ids = conversation.ask(prompt)
        except InputError as error:
            if options.prompt is not None:
                raise
            print(f"generate: {error}", file=sys.stderr)
            continue
        if not conversation.is_chat:
            print(prompt, end="", flush=True)
        result = answer(model, checkpoint, input_ids, options)
        conversation.answer(result["text"])
        results.append({"prompt": prompt, **result})
    return results
