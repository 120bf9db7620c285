# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A module of `evaluate` that loads without a network: `evaluate.load` takes its folder."""

import math

import datasets
import evaluate
import numpy as np


INPUTS = """
Args:
    nats (`float`): for each document, the sum of the negative log-likelihoods of its tokens.
    tokens (`int`): for each document, how many tokens that sum is over.
    bytes (`int`): for each document, the length of its text in UTF-8.

Returns:
    `loss` in nats per token, `perplexity`, its exponential, and `bits_per_byte`, which does not depend on the
    tokenizer; `documents`, `tokens` and `bytes`, how many there are.
"""


class TextLoss(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="How well a language model predicts documents, each of its tokens counted once.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "nats": datasets.Value("float64"),
                    "tokens": datasets.Value("int64"),
                    "bytes": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nats, tokens, bytes):
        nats, num_tokens, num_bytes = math.fsum(nats), int(np.sum(tokens)), int(np.sum(bytes))
        if num_tokens == 0 or num_bytes == 0:
            raise ValueError(f"There is no text to measure a loss on: {num_tokens} tokens, {num_bytes} bytes.")
        loss = nats / num_tokens
        return {
            "loss": loss,
            "perplexity": float(np.exp(loss)),
            "bits_per_byte": nats / math.log(2) / num_bytes,
            "documents": len(tokens),
            "tokens": num_tokens,
            "bytes": num_bytes,
        }
