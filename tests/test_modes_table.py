# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The table of modes says what the code does."""

import re
from pathlib import Path

import pytest
import torch
from families import tiny_config

from attnres import DEPTH_MIXERS, DepthAttentionInterface
from configuration_attnres import ATTN_RES_MODES


PAGE = Path(__file__).parents[1] / "docs" / "modes.md"
SIZES = {"attn_res_block_size": 2, "attn_res_num_heads": 4, "attn_res_rank": 6, "attn_res_num_streams": 3}


def rows() -> dict[str, list[str]]:
    """For each mode the cells behind its name."""
    table = PAGE.read_text(encoding="utf-8").split("<!-- modes -->")[1].split("<!-- /modes -->")[0]
    lines = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    pairs = [
        (mode, [cell.strip() for cell in cells]) for first, *cells in lines for mode in re.findall("`(.+?)`", first)
    ]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


def test_all_modes_are_there():
    assert rows().keys() == ATTN_RES_MODES.keys() == DEPTH_MIXERS.keys()


@pytest.mark.parametrize("mode", ATTN_RES_MODES)
def test_row(mode):
    """Parameters, what is kept of a token, where the mode starts, and what computes it."""
    _, _, parameters, donor, vectors, computed = rows()[mode]
    config = tiny_config(attn_res_mode=mode, **SIZES, attn_res_window=20)
    config._attn_res_implementation = "eager"
    num_reads, num_blocks = 11, 3
    letters = {"R": num_reads, "B": num_blocks, "d": 40, "n": 3, "r": 6}
    letters["M"] = num_blocks + 1 if config.depth_sources.sums_blocks else num_reads
    vectors = vectors.replace("as sources", "M")
    mixer = DEPTH_MIXERS[mode](config)
    assert sum(p.numel() for p in mixer.parameters()) == eval(parameters.replace("·", "*"), letters.copy())
    most = max(config.num_depth_tensors(row) for row in range(num_reads))
    assert most == eval(vectors, letters.copy())
    reason = mixer.why_no_donor(config)
    assert (reason is None) == (not donor.startswith("no"))
    config.attn_res_window = 2
    assert (mixer.why_no_donor(config) != reason) == (donor == "if W is m or more")
    is_general = mixer.implementation(config) is DepthAttentionInterface()["eager"]
    assert is_general == (computed == "all")


def test_formulas_stay_in_float32():
    """A model in bfloat16 keeps what its mode has learned in float32."""
    for mode, mixer_class in DEPTH_MIXERS.items():
        mixer = mixer_class(tiny_config(attn_res_mode=mode, **SIZES)).to(torch.bfloat16)
        assert {parameter.dtype for parameter in mixer.parameters()} == {torch.float32}


def test_parametrized():
    """A parameter that is computed from another, in whatever order torch then has them, is still the same one."""
    for mode, mixer_class in DEPTH_MIXERS.items():
        mixer = mixer_class(tiny_config(attn_res_mode=mode, **SIZES))
        mixer.reset_parameters()
        expected = list(mixer())
        for name in [name for name, _ in mixer.named_parameters(recurse=False)][:1]:
            torch.nn.utils.parametrize.register_parametrization(mixer, name, torch.nn.Identity())
        assert all(map(torch.equal, mixer(), expected)), mode
