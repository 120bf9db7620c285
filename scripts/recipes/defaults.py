# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Defaults that several files know."""

# Share of the learning rate that depth attention gets: the best of a sweep (results/depth_lr_scale) at hidden size 64
# and learning rate 3e-3, where 10 is as good. A score is query . RMSNorm(source), without a division by sqrt(hidden):
# one step of Adam moves each element of a query by up to its learning rate, so a score by up to learning rate * hidden
# for a source that points that way and by about learning rate * sqrt(hidden) for a random one, 0.07 in the sweep's best
# run. Where a wider model isn't trained with a learning rate that is smaller by sqrt(hidden), this has to be smaller.
DEPTH_LR_SCALE = 3.0
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
