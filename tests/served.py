# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Tiny models of all families as serving engines take them, and what transformers computes of them in float64."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from attnres_convert.verification import Float64
from families import FAMILIES, perturb, tiny_config
from transformers import AutoModelForCausalLM


PROMPTS = [[3, 5, 9, 17, 33, 65, 129], list(range(10, 47)), [7]]
NEW_TOKENS = 16
# Kernels of engines take heads of 32 numbers or a multiple
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "max_position_embeddings": 512}
SIZES |= {"vocab_size": 256, "head_dim": 32}
TWO_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": None}  # the head is hidden_size / 2
LATENT = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 32, "v_head_dim": 32}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "head_dim": None}
OF_FAMILY = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "smollm3", "phi3", "starcoder2", "olmo", "granite"), TWO_HEADS),
    "deepseek_v3": {**LATENT, "q_lora_rank": 24},
    "kimi_linear": {**LATENT, "linear_head_dim": 32, "num_hidden_layers": 5},
    "gemma2": {"attn_logit_softcapping": 3.0},  # small enough to count
}


def served_config(family: str, **changes):
    row = {**FAMILIES[family], **SIZES, **OF_FAMILY.get(family, {}), "attn_res_block_size": 2, **changes}
    return tiny_config(family, **{name: value for name, value in row.items() if value is not None})


@torch.no_grad()
def save_model(folder: Path, family: str, sharpness: float = 8.0, **changes):
    """A model with queries as if it were trained: without them, depth attention computes a plain sum. The sharper they
    and those of attention are, the more it all depends on them, and the more on rounding."""
    torch.manual_seed(0)
    model = perturb(AutoModelForCausalLM.from_config(served_config(family, **changes)), 0.05)
    for name, parameter in model.named_parameters():
        if ".q_proj." in name or name.endswith("depth_attention.query"):
            parameter.mul_(sharpness)
    model.save_pretrained(folder)


class Reference(NamedTuple):
    """What transformers computes: `rows`, for each prompt, the greedy tokens, and in float64 the log-probabilities
    `(seq, vocab)` at the prompt's and these tokens; and `rounding`, the most by which they differ in another dtype."""

    rows: list[tuple[list[int], torch.Tensor]]
    rounding: float


@torch.no_grad()
def reference(
    folder: Path, prompts: list[list[int]] = PROMPTS, new_tokens: int = NEW_TOKENS, dtype: torch.dtype = torch.float32
) -> Reference:
    options = {"attn_implementation": "eager", "attn_res_implementation": "eager"}
    rounded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval().double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    rows, rounding = [], 0.0
    for prompt in prompts:
        with Float64():
            ids = torch.tensor([prompt])
            ids = model.generate(ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
            logprobs = model(ids, use_cache=False).logits[0].log_softmax(-1)
        found = rounded(ids, use_cache=False).logits[0].double().log_softmax(-1)
        rounding = max(rounding, (found - logprobs).abs().max().item())
        rows.append((ids[0, len(prompt) :].tolist(), logprobs))
    return Reference(rows, rounding)


def serve(requests: list[dict], folder: Path, processes: bool = False) -> list[dict]:
    """What vLLM makes of the requests, arguments of `vllm_process.serve`; with `processes`, in several of them."""
    defaults = {"prompts": PROMPTS, "new_tokens": NEW_TOKENS, "dtype": "float32", "enforce_eager": True}
    (folder / "requests.json").write_text(json.dumps([{**defaults, **request} for request in requests]))
    script = Path(__file__).with_name("vllm_process.py")
    command = [sys.executable, script, folder / "requests.json", folder / "results.json"]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    if ended.returncode:
        raise RuntimeError(f"vLLM failed:\n{ended.stdout[-20000:]}\n{ended.stderr[-20000:]}")
    return json.loads((folder / "results.json").read_text())


def compare(result: dict, expected: Reference) -> tuple[int, float]:
    """How many tokens differ, and the largest difference of log-probabilities where the tokens before are the same."""
    different, worst = 0, 0.0
    for tokens, of_tokens, of_prompt, (right_tokens, right) in zip(
        result["tokens"], result["logprobs"], result["prompt_logprobs"], expected.rows, strict=True
    ):
        same = next((i for i, pair in enumerate(zip(tokens, right_tokens)) if pair[0] != pair[1]), len(right_tokens))
        different += len(right_tokens) - same
        found = [*of_prompt, *of_tokens[: same + 1]]
        first = len(right) - len(right_tokens) - 1 - len(of_prompt)
        for position, entries in enumerate(found, start=first):
            for token, logprob in entries.items():
                worst = max(worst, abs(logprob - right[position, int(token)].item()))
    return different, worst
