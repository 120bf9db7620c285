# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Defaults that several files know."""

# Share of the learning rate that depth attention gets, and what it gets at most: in a sweep at hidden size 64
# (results/depth_lr_scale) the product of the two rates counted, 6e-3 to 8e-3 was best, and 2.4e-2 did harm. A score is
# query . RMSNorm(source), without a division by sqrt(hidden): one step of Adam moves each element of a query by up to
# its learning rate, so a score by up to learning rate * hidden for a source that points that way and by about learning
# rate * sqrt(hidden) for a random one, 0.05 at that most. Where a wider model isn't trained with a learning rate that
# is smaller by sqrt(hidden), this has to be smaller.
DEPTH_LR_SCALE, MOST_DEPTH_RATE = 3.0, 6e-3
LORA_RATES = {"learning_rate": 5e-4, "depth_lr_scale": 0.03}
# By what a run trains. Those of checkpoints that are trained on were found on SmolLM2-135M-Instruct (results/real): it
# improves at once, and queries that move so slowly did it no harm
RATES = {
    "from scratch": {"learning_rate": 1e-3, "depth_lr_scale": DEPTH_LR_SCALE},
    "continued": {"learning_rate": 5e-5, "depth_lr_scale": 0.3},
    "lora": LORA_RATES,
    "dora": LORA_RATES,
    "qlora": LORA_RATES,
    "full": {"learning_rate": 5e-5, "depth_lr_scale": 0.3},
    "depth": {"learning_rate": 1e-4, "depth_lr_scale": 1.0},
}
STDLIB, PACKAGES = "stdlib", "site-packages"
SOURCES = (STDLIB, PACKAGES)  # text that is on any machine
HELD_OUT = 0.05  # share of the documents


def rates_of(trained: str, learning_rate: float | None = None) -> dict[str, float]:
    """The learning rate, that of RATES unless it is given, and depth attention's as a multiple of it."""
    rates = {**RATES[trained]}
    if learning_rate is not None:
        rates["learning_rate"] = learning_rate
    is_alone = trained == "depth"  # whose learning rate is depth attention's own
    if rates["learning_rate"] * rates["depth_lr_scale"] > MOST_DEPTH_RATE and not is_alone:
        rates["depth_lr_scale"] = MOST_DEPTH_RATE / rates["learning_rate"]
    return rates
