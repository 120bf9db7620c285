# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Bootstrap intervals: 95 % of what comes out when the same things are drawn again, with replacement."""

import numpy as np


RESAMPLES = 10_000  # of seeds


def resampled_ratios(values: np.ndarray, weights: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """`sum(values) / sum(weights)` over documents that are drawn with replacement, the same ones for each row.

    Args:
        values: `(models, documents)`.
        weights: `(models, documents)`.

    Returns:
        `(models, resamples)`.
    """
    generator = np.random.default_rng(seed)
    documents = values.shape[1]
    ratios = []
    for _ in range(resamples):
        counts = np.bincount(generator.integers(documents, size=documents), minlength=documents)
        with np.errstate(invalid="ignore"):
            ratios.append((values @ counts) / (weights @ counts))
    return np.stack(ratios, axis=1)


def interval(samples: np.ndarray) -> list[float]:
    samples = samples[~np.isnan(samples)]  # as those are that drew nothing but documents without tokens
    return np.percentile(samples, [2.5, 97.5]).tolist()


def interval_of_mean(values: list[float]) -> list[float]:
    """Of a few values, one for each seed. Of three the interval is little less than their range, which holds the true
    mean three times in four; of twenty it holds that nearly as often as it says."""
    drawn = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    return interval(np.asarray(values)[drawn].mean(axis=1))
