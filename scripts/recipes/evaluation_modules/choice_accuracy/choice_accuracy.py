# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A module of `evaluate` that loads without a network: `evaluate.load` takes its folder."""

import datasets
import evaluate
import numpy as np


INPUTS = """
Args:
    nats (`list[float]`): for each question, the negative log-likelihood of each choice.
    bytes (`list[int]`): for each question, the length of each choice in UTF-8.
    answers (`int`): for each question, the index of the right choice.

Returns:
    `accuracy`, of the choices that are most likely per byte, so that long ones have no disadvantage; `raw_accuracy`,
    of those that are most likely as a whole; `correct` and `raw_correct`, 0 or 1 for each question; `questions`, how
    many there are. Of equally likely choices the first one counts.
"""


class ChoiceAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="How often the likeliest of several continuations is the right one.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "nats": datasets.Sequence(datasets.Value("float64")),
                    "bytes": datasets.Sequence(datasets.Value("int64")),
                    "answers": datasets.Value("int64"),
                }
            ),
        )

    def _compute(self, nats, bytes, answers):
        rows = list(zip(map(np.asarray, nats), map(np.asarray, bytes), answers))
        if not rows:
            raise ValueError("There are no questions.")
        for number, (nats, lengths, _) in enumerate(rows, 1):
            if len(nats) == 0 or len(nats) != len(lengths) or not (lengths > 0).all():
                raise ValueError(
                    f"Question {number} has {len(nats)} nats and {len(lengths)} bytes; it needs one of each, the bytes "
                    "more than zero, for each of its choices."
                )
        correct = [int(np.argmin(nats / lengths) == answer) for nats, lengths, answer in rows]
        raw_correct = [int(np.argmin(nats) == answer) for nats, _, answer in rows]
        return {
            "accuracy": float(np.mean(correct)),
            "raw_accuracy": float(np.mean(raw_correct)),
            "correct": correct,
            "raw_correct": raw_correct,
            "questions": len(rows),
        }
