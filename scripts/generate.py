# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/generate.py outputs/run/model --prompt "import numpy"

Chats with a model that has a chat template, completes text with one that has none, and shows the text as it grows.
MODEL is a folder or Hub id: an AttnRes model, a donor, or a PEFT adapter, which finds its base by itself. Without
--prompt, each line from the terminal is a prompt; in a chat the model remembers those before. An empty line or the end
of input ends the program.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import transformers
from attnres_convert import InputError, reading
from finetuning_data import filled_in
from model_loading import Checkpoint, load_checkpoint, open_checkpoint
from training_data import MAX_DOCUMENT
from training_options import positive
from training_run import RunError
from transformers import TextStreamer


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
            RunError: the prompt alone is too long or has no tokens, or the template can't be filled.
        """
        reading.check_text(prompt, "the prompt")
        turns = [*(self.turns if self.is_chat else []), {"role": "user", "content": prompt}]
        input_ids, context = self.encode(turns), self.checkpoint.context
        while context is not None and input_ids.shape[1] >= context:
            if len(turns) == 1:
                raise RunError(f"the prompt has {input_ids.shape[1]} tokens, the model's context {context}.")
            turns = turns[2:]
            input_ids = self.encode(turns)
        if input_ids.shape[1] == 0:
            raise RunError("the prompt has no tokens; give some text.")
        self.turns = turns
        return input_ids

    def answer(self, text: str):
        self.turns.append({"role": "assistant", "content": text})

    def encode(self, turns: list[dict]) -> torch.Tensor:
        tokenizer = self.checkpoint.tokenizer
        if not self.is_chat:
            with reading.understood("the tokenizer fails", kind=RunError):
                input_ids = tokenizer(turns[-1]["content"], return_tensors="pt")["input_ids"].long()
            self.checkpoint.check(input_ids, "the prompt")
            return input_ids
        system = [{"role": "system", "content": self.system}] if self.system else []
        with filled_in("the chat template can't be filled"):
            text = tokenizer.apply_chat_template(system + turns, tokenize=False, add_generation_prompt=True)
            if len(text) > MAX_DOCUMENT:  # no time limit ends a tokenizer
                raise RunError(f"the chat template makes {len(text):,} characters; at most {MAX_DOCUMENT:,} are read.")
            input_ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"].long()
        self.checkpoint.check(input_ids, "the prompt")
        return input_ids


@torch.no_grad()
def generate(model, checkpoint: Checkpoint, input_ids: torch.Tensor, args: argparse.Namespace) -> dict:
    """Generates after `input_ids`, shape (1, tokens), and prints the text as it grows."""
    length, longest = input_ids.shape[1], args.max_new_tokens
    if checkpoint.context is not None:
        longest = min(longest, checkpoint.context - length)
    if args.temperature:
        choice = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k}
    else:
        choice = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    started = time.perf_counter()
    with reading.understood("generation failed", kind=RunError):  # such as probabilities that are no numbers
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


def prompts(args: argparse.Namespace) -> Iterator[str]:
    if args.prompt is not None:
        yield args.prompt
        return
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 is refused, and the next one read
    sign = "> " if sys.stdin.isatty() else ""
    try:
        while line := input(sign).strip():
            yield line
    except EOFError:
        return


def converse(args: argparse.Namespace) -> list[dict]:
    """Answers all prompts.

    Raises:
        RunError: the model doesn't load, or the only prompt can't be answered.
    """
    reading.check_text(args.system or "", "--system")
    checkpoint = open_checkpoint(args.model, args.base, args.tokenizer, args.trust_remote_code)
    conversation = Conversation(checkpoint, bool(checkpoint.tokenizer.chat_template) and not args.complete, args.system)
    if args.system and not conversation.is_chat:
        raise RunError("--system needs a model with a chat template, and no --complete.")
    model = load_checkpoint(checkpoint, args.dtype, args.trust_remote_code)
    transformers.set_seed(args.seed)
    results = []
    for prompt in prompts(args):
        try:
            input_ids = conversation.ask(prompt)
        except InputError as error:
            if args.prompt is not None:
                raise
            print(f"generate: {error}", file=sys.stderr)
            continue
        if not conversation.is_chat:
            print(prompt, end="", flush=True)
        result = generate(model, checkpoint, input_ids, args)
        conversation.answer(result["text"])
        results.append({"prompt": prompt, **result})
    return results


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument
    add("model", help="folder or Hub id of a model or adapter")
    add("--prompt", help="one prompt, instead of lines from the terminal")
    add("--complete", action="store_true", help="complete text, also with a model that has a chat template")
    add("--system", help="system message of a chat")
    add("--max-new-tokens", type=positive, default=128, help="per answer at most; default: 128")
    add("--temperature", type=float, default=0.8, help="0 always takes the most likely token; default: 0.8")
    add("--top-k", type=positive, default=50, help="sample among this many tokens; default: 50")
    add("--seed", type=int, default=0, help="of sampling; default: 0")
    add("--base", help="base of an adapter, instead of the one that it names")
    add("--tokenizer", help="folder or Hub id; default: the model's own")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as saved")
    add("--trust-remote-code", action="store_true", help="run code that the model brings; needed only for models that "
        "neither transformers nor this project knows")  # fmt: skip
    add("--json", action="store_true", help="print a last line of JSON with prompts and texts")
    args = parser.parse_args(argv)
    if not 0 <= args.temperature < float("inf"):
        parser.error("--temperature is 0 or more")
    if not 0 <= args.seed < 2**32:
        parser.error("--seed is between 0 and 2**32 - 1")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries
    try:
        with reading.no_panic():
            results = converse(args)
    except InputError as error:
        raise SystemExit(f"generate: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if args.json:
        print(json.dumps({"model": args.model, "seed": args.seed, "answers": results}))


if __name__ == "__main__":
    main()
