# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""One web page that shows the depth weights of models for a prompt. It needs no other file and no network."""

import json
from pathlib import Path

import numpy as np
from attnres_convert.writing import write_text

from .figures import (
    describe_mode,
    has_fixed_weights,
    is_block,
    is_distribution,
    labelled_sources,
    read_names,
    saving,
)


TEMPLATE = Path(__file__).with_suffix(".html")
PLACE_OF_DATA = "/*DATA*/"
DIGITS = 4


def model_data(name: str, config, weights: list[np.ndarray], tokens: list[str]) -> dict:
    """What the page has of a model.

    Args:
        weights: for each read `(num_sources, tokens)`, or `(num_sources,)` where they are the same for all tokens.
        tokens: the text of each.
    """
    opens = [is_block(config) and config.extends_open_depth_source(row) for row in range(len(weights))]
    return {
        "name": name,
        "mode": describe_mode(config),
        "reads": read_names(config),
        "sources": labelled_sources(config, "{} ({})"),
        "open": opens,
        "distribution": is_distribution(config),
        "tokens": [] if has_fixed_weights(config) else tokens,
        "weights": [np.round(read.astype(float), DIGITS).tolist() for read in weights],
    }


def write_page(path: Path, models: list[dict]):
    """Writes the page of models, as [`model_data`] gives them.

    Raises:
        InputError: it can't be written.
    """
    # a text of the prompt can't end the element that holds it
    data = json.dumps({"models": models}, ensure_ascii=False).replace("<", "\\u003c")
    with saving(path):
        write_text(path, TEMPLATE.read_text(encoding="utf-8").replace(PLACE_OF_DATA, data))
