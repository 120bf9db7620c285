# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Defaults that several files know."""

# Share of the learning rate that depth attention gets: the best of a sweep (results/depth_lr_scale) at hidden size 64
# and learning rate 3e-3, where 10 is as good. A score is query . RMSNorm(source), without a division by sqrt(hidden):
# one step of Adam moves each element of a query by up to its learning rate, so a score by up to learning rate * hidden
# for a source that points that way and by about learning rate * sqrt(hidden) for a random one, 0.07 in the sweep's best
# run. Where a wider model isn't trained with a learning rate that is smaller by sqrt(hidden), this has to be smaller.
DEPTH_LR_SCALE = 3.0
# What a run trains decides how fast
RATES = {
    "from scratch": {"learning_rate": 1e-3, "depth_lr_scale": DEPTH_LR_SCALE},
    "continued": {"learning_rate": 5e-5, "depth_lr_scale": 1.0},
    "lora": {"learning_rate": 2e-4, "depth_lr_scale": 1.0},
    "dora": {"learning_rate": 2e-4, "depth_lr_scale": 1.0},
    "qlora": {"learning_rate": 2e-4, "depth_lr_scale": 1.0},
    "full": {"learning_rate": 2e-5, "depth_lr_scale": 1.0},
    "depth": {"learning_rate": 1e-3, "depth_lr_scale": 1.0},
}
STDLIB = "stdlib"
HELD_OUT = 0.05  # share of the documents
