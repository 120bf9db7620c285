# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python tests/vllm_process.py REQUESTS.json RESULTS.json

Starts vLLM on each model of the requests in turn, and writes what it generates. A process of its own, as vLLM changes
the classes of transformers, and each setting of its environment needs a new one.
"""

import gc
import json
import os
import sys
import time


os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def as_numbers(logprobs) -> list[dict[int, float]]:
    return [{token: entry.logprob for token, entry in position.items()} for position in logprobs]


def serve(path: str, prompts: list[list[int]], new_tokens: int, in_turn: bool = False, **options) -> dict:
    """Greedy tokens and log-probabilities of the prompts, all in one batch; or one after the other, without those of
    the prompt, for which vLLM leaves its prefix cache out."""
    # models of a test have no tokenizer
    llm = LLM(path, skip_tokenizer_init=True, max_model_len=512, max_num_seqs=8, **options)
    sampling = SamplingParams(
        temperature=0,
        max_tokens=new_tokens,
        ignore_eos=True,
        logprobs=5,
        prompt_logprobs=None if in_turn else 5,
        detokenize=False,
    )
    with torch.profiler.profile() as profile:
        batches = [[prompt] for prompt in prompts] if in_turn else [prompts]
        requests = [[{"prompt_token_ids": prompt} for prompt in batch] for batch in batches]
        outputs = [output for batch in requests for output in llm.generate(batch, sampling, use_tqdm=False)]
    result = {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "logprobs": [as_numbers(output.outputs[0].logprobs) for output in outputs],
        "prompt_logprobs": [as_numbers((output.prompt_logprobs or [])[1:]) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "operators": sorted({event.key for event in profile.key_averages() if event.key.startswith("attnres::")}),
    }
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        (result["implementation"],) = llm.apply_model(lambda model: model.config._attn_res_implementation)
        (result["dtype"],) = llm.apply_model(lambda model: str(next(model.model.depth_attention.parameters()).dtype))
    return result


def main(requests_file: str, results_file: str):
    with open(requests_file) as file:
        requests = json.load(file)
    results = []
    for request in requests:
        began = time.monotonic()
        results.append(serve(**request) | {"seconds": time.monotonic() - began})
        gc.collect()
        cleanup_dist_env_and_memory()
        with open(results_file, "w") as file:
            json.dump(results, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
