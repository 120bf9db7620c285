# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/depth_weights.py --model model_cards/attnres-1.3m-block --text "import numpy as np"

Which source does each read take most of? The depth weights of a model on a text, averaged over its tokens, as a table.
There are two reads for each layer, before its attention and before its MLP, and one before the final norm. The last
column is the entropy of the weights, in parts of that of a plain average: 1 takes from all sources alike, 0 from one.

Then the model goes on with the text, and for each new token it says what the last read took most of.
"""

import argparse
import math
import sys
from pathlib import Path

from attnres_convert.reading import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401  (makes the models known to the Auto classes)


ZOO = Path(__file__).resolve().parents[1] / "model_cards"
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=str(ZOO / "attnres-1.3m-block"), help="folder or Hub id; default: of the zoo")
parser.add_argument("--text", default="import numpy as np\n\n\ndef main():\n", help="what to read")
parser.add_argument("--new-tokens", type=int, default=8, help="how many to generate; default: 8")
args = parser.parse_args()

try:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
except (OSError, ValueError) as error:
    sys.exit(one_line(f"depth_weights: {error}"))
if not getattr(getattr(model.base_model, "depth_attention", None), "sums_to_one", False):
    sys.exit(f"depth_weights: {args.model} has no depth attention whose weights sum to one.")
inputs = tokenizer(args.text, return_tensors="pt", return_token_type_ids=False)
if inputs["input_ids"].shape[1] == 0:
    sys.exit("depth_weights: the text has no tokens.")

# Source 0 is the embedding. Where sources are blocks, the last one may still be open: it has the outputs so far
kind = "block" if model.config.depth_sources.sums_blocks else "output"
names = lambda index: "embedding" if index == 0 else f"{kind} {index}"  # noqa: E731

print(f"{'read':<18}{'sources':>8}  {'takes most of':<14}{'weight':>7}{'average':>9}{'entropy':>9}")
for row, weights in enumerate(model(**inputs, output_depth_attentions=True).depth_attentions):
    weights = weights.mean(dim=(0, 2))  # (batch, sources, tokens): the average over all tokens
    number, most = len(weights), weights.argmax().item()
    layer, sublayer = divmod(row, 2)
    read = f"layer {layer} {('attention', 'MLP')[sublayer]}" if layer < model.config.num_hidden_layers else "output"
    entropy = -(weights * weights.log()).nansum().item() / math.log(number) if number > 1 else 1.0
    print(f"{read:<18}{number:>8}  {names(most):<14}{weights[most]:>7.3f}{1 / number:>9.3f}{entropy:>9.3f}")

options = {"return_dict_in_generate": True, "output_depth_attentions": True}
output = model.generate(**inputs, max_new_tokens=args.new_tokens, do_sample=False, **options)
tokens = output.sequences[0, inputs["input_ids"].shape[1] :]
print("\nnew token, and what the last read took most of to choose it")
for token, reads in zip(tokens, output.depth_attentions):
    weights = reads[-1][0, :, -1]  # the first step has all tokens of the prompt
    print(f"{tokenizer.decode(token)!r:<18}{names(weights.argmax().item()):<14}{weights.max():>7.3f}")
