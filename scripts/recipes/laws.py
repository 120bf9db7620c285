# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Power laws of loss by compute: L = A C^-alpha (arXiv 2603.15031, section 5), with L in nats per token and C in
PFLOP/s-days; their bootstrap intervals, and how many times the compute one law needs for the loss of another.
"""

import math
from dataclasses import dataclass

import numpy as np
from attnres_convert import InputError

from .resampling import RESAMPLES, interval, interval_of_mean


FEWEST_SEEDS, FEWEST_SIZES = 3, 4  # with fewer, intervals say nothing, and neither does the form of a law
PAPER = {"donor": (1.891, 0.057), "block": (1.870, 0.058), "full": (1.865, 0.057)}  # A and alpha
PAPER_COMPUTE = 5.6  # PFLOP/s-days


def fit(log_compute: np.ndarray, log_losses: np.ndarray) -> np.ndarray:
    """Least squares for log L = log A - alpha log C.

    Args:
        log_compute: `(..., sizes)`, of two sizes or more.
        log_losses: `(..., sizes)`.

    Returns:
        `(..., 2)`: log A and alpha.
    """
    centred = log_compute - log_compute.mean(-1, keepdims=True)
    slope = (centred * log_losses).sum(-1) / (centred**2).sum(-1)
    return np.stack([log_losses.mean(-1) - slope * log_compute.mean(-1), -slope], axis=-1)


def predict(law: np.ndarray, log_compute) -> np.ndarray:
    """The logarithm of the loss; `law` is `(..., 2)`, as [`fit`] returns it."""
    return law[..., 0] - law[..., 1] * log_compute


def multiplier(first: np.ndarray, law: np.ndarray, log_compute: float) -> np.ndarray:
    """How many times the compute of `law` the law `first` needs for the same loss; both are `(..., 2)`.

    Not a number where `first` doesn't fall.
    """
    with np.errstate(all="ignore"):
        needed = (first[..., 0] - predict(law, log_compute)) / first[..., 1]
        found = np.exp(needed - log_compute)
    return np.where((first[..., 1] > 0) & np.isfinite(found), found, np.nan)


@dataclass(frozen=True)
class Measured:
    """What several variants have in common.

    Args:
        sizes: the smallest first.
        seeds: of each size, those that all variants have.
        log_compute: `(variants, sizes)`.
        log_losses: of each size `(variants, seeds)`.
    """

    variants: list[str]
    sizes: list[str]
    seeds: list[list[int]]
    log_compute: np.ndarray
    log_losses: list[np.ndarray]

    @property
    def means(self) -> np.ndarray:
        """`(variants, sizes)`."""
        return np.stack([losses.mean(1) for losses in self.log_losses], axis=1)

    def resampled(self) -> np.ndarray:
        """Means over seeds that are drawn with replacement, apart for each size and the same ones for all variants:
        `(variants, resamples, sizes)`."""
        generator, means = np.random.default_rng(0), []
        for losses in self.log_losses:
            drawn = generator.integers(losses.shape[1], size=(RESAMPLES, losses.shape[1]))
            means.append(losses[:, drawn].mean(-1))
        return np.stack(means, axis=-1)


def measured(points: list[dict], variants: list[str]) -> Measured:
    """Without sizes at which no seed has a loss of every variant.

    Raises:
        InputError: there is no other size.
    """
    losses, compute = {}, {}
    for point in points:
        losses.setdefault(point["size"], {}).setdefault(point["variant"], {})[point["seed"]] = point["loss"]
        compute[point["size"], point["variant"]] = point["compute"]
    seeds = {}
    for size, by_variant in losses.items():
        if shared := set.intersection(*(set(by_variant.get(variant, ())) for variant in variants)):
            seeds[size] = sorted(shared)
    if not seeds:
        raise InputError("no size has a loss of every variant; train one first, with --sizes.")
    sizes = sorted(seeds, key=lambda size: compute[size, variants[0]])
    of_sizes = [[[losses[size][variant][seed] for seed in seeds[size]] for variant in variants] for size in sizes]
    return Measured(
        variants,
        sizes,
        [seeds[size] for size in sizes],
        np.log([[compute[size, variant] for size in sizes] for variant in variants]),
        [np.log(of_size) for of_size in of_sizes],
    )


def interval_or_none(samples: np.ndarray) -> list[float] | None:
    """95 % of the samples, none where one isn't a number."""
    return None if np.isnan(samples).any() else interval(samples)


def analyse(points: list[dict], variants: list[str]) -> dict:
    """Laws, compute multipliers and differences between variants, with intervals if there are two seeds or more.

    Args:
        points: of each run `size`, `variant`, `seed`, `loss` in nats per token and `compute` in PFLOP/s-days.
        variants: the one first with which the others are compared.

    Returns:
        `sizes`, `fits`, `multipliers` (at the compute of the variant at the largest size), `differences` and `limits`,
        sentences about what can't be concluded.

    Raises:
        InputError: no size has a loss of every variant.
    """
    data = measured(points, variants)
    fewest = min(map(len, data.seeds))
    found = {"sizes": data.sizes, "seeds": dict(zip(data.sizes, data.seeds)), "fits": {}, "multipliers": {}}
    found["differences"] = differences(data)
    found["limits"] = limits_of_amount(fewest, len(data.sizes))
    if len(data.sizes) < 2:
        return found
    laws = fit(data.log_compute, data.means)
    drawn = fit(data.log_compute[:, None], data.resampled()) if fewest > 1 else None
    for index, variant in enumerate(variants):
        law = laws[index]
        residuals = data.means[index] - predict(law, data.log_compute[index])
        entry = {"A": math.exp(law[0]), "alpha": float(law[1]), "largest_misfit": float(np.abs(residuals).max())}
        if drawn is not None:
            entry["A_interval"] = interval(np.exp(drawn[index, :, 0]))
            entry["alpha_interval"] = interval(drawn[index, :, 1])
            entry["band"] = band(drawn[index], data.log_compute[index])
        found["fits"][variant] = entry
        if index:
            at = data.log_compute[index, -1]
            value = float(multiplier(laws[0], law, at))
            entry = {"from": variants[0], "compute": math.exp(at), "value": None if math.isnan(value) else value}
            if drawn is not None:
                entry["interval"] = interval_or_none(multiplier(drawn[0], drawn[index], at))
            found["multipliers"][variant] = entry
    found["limits"] += limits_of_multipliers(found["multipliers"])
    largest = max(point["compute"] for point in points)
    found["limits"].append(
        f"The largest run takes {largest:.2g} PFLOP/s-days; the paper's laws are compared at {PAPER_COMPUTE}, "
        f"{PAPER_COMPUTE / largest:.2g} times as much."
    )
    return found


def band(laws: np.ndarray, log_compute: np.ndarray) -> dict[str, list[float]]:
    """For the figure, the interval of the loss by compute; `laws` are `(resamples, 2)`."""
    places = np.linspace(log_compute.min(), log_compute.max(), 41)
    low, high = np.percentile(np.exp(predict(laws[:, None], places)), [2.5, 97.5], axis=0)
    return {"compute": np.exp(places).tolist(), "low": low.tolist(), "high": high.tolist()}


def differences(data: Measured) -> list[dict]:
    """At each size, the losses of each variant less those of the first one, seed by seed."""
    rows = []
    for size, seeds, logs in zip(data.sizes, data.seeds, data.log_losses):
        losses = np.exp(logs)
        for index, variant in enumerate(data.variants[1:], start=1):
            own = (losses[index] - losses[0]).tolist()
            row = {"size": size, "variant": variant, "from": data.variants[0], "mean": float(np.mean(own))}
            if len(own) > 1:
                row["interval"] = interval_of_mean(own)
            rows.append({**row, "seeds": dict(zip(map(str, seeds), own))})
    return rows


def limits_of_amount(seeds: int, sizes: int) -> list[str]:
    limits = []
    if seeds < FEWEST_SEEDS:
        what = "so that there are no intervals" if seeds == 1 else "whose intervals say next to nothing"
        limits.append(
            f"A size has {seeds} seed{'s' * (seeds > 1)} alone, {what}: no difference between variants can be told "
            "from chance."
        )
    if sizes < 2:
        limits.append("One size makes no law: nothing is fitted.")
    elif sizes < FEWEST_SIZES:
        limits.append(f"{sizes} sizes can't tell a power law from another curve.")
    return limits


def limits_of_multipliers(multipliers: dict[str, dict]) -> list[str]:
    limits = []
    for variant, entry in multipliers.items():
        if entry["value"] is None or entry.get("interval", ()) is None:
            limits.append(
                f"{variant}: the loss of {entry['from']}, or of some of its resamples, doesn't fall with compute, so "
                "its compute multiplier has no value or no interval; nothing can be concluded."
            )
        elif "interval" in entry and entry["interval"][0] <= 1 <= entry["interval"][1]:
            low, high = entry["interval"]
            limits.append(
                f"{variant}: the interval of its compute multiplier, {low:.2f} to {high:.2f}, holds 1; nothing can be "
                f"concluded about whether it needs less or more compute than {entry['from']}."
            )
    return limits
