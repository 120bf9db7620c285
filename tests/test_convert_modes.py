# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Conversion to every mode: exact, always the same, and back, or refused with the reason."""

import json

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor
from attnres_convert.cli import main
from attnres_convert.verification import TOLERANCE
from convert_models import edit_json, save_donor, tensor_bytes, tree
from safetensors.torch import load_file, save_file

from configuration_attnres import ATTN_RES_MODES


NO_DONOR = {mode for mode in ATTN_RES_MODES if mode.endswith(("_recency", "_inkling2"))}
FIELDS = {"full_window": {"attn_res_window": 10}, "block_heads": {"attn_res_num_heads": 5}}
FIELDS |= {"full_heads": {"attn_res_num_heads": 4}, "full_low_rank": {"attn_res_rank": 3}}
FIELDS |= {"block_mhc": {"attn_res_num_streams": 3}}


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor") / "src"
    save_donor(folder)
    return folder


@pytest.mark.parametrize("mode", [mode for mode in ATTN_RES_MODES if mode not in NO_DONOR])
def test_every_mode_there_and_back(donor, tmp_path, mode):
    """The logits are the donor's, what was given is in the configuration, and the way back gives the same files."""
    shape = {"block_size": 2} if ATTN_RES_MODES[mode].sums_blocks else {}
    fields = FIELDS.get(mode, {})
    result = convert_checkpoint(donor, tmp_path / "there", mode=mode, **shape, fields=fields)
    assert result.mode == mode and result.verification.relative_difference < TOLERANCE
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config.items() >= {"attn_res_mode": mode, "attn_res_sum_scale": True, **fields}.items()
    depth = load_file(tmp_path / "there" / "model-00002-of-00002.safetensors")
    assert sum(x.numel() for x in depth.values()) == result.depth_parameters
    assert all(x.dtype == torch.float32 for x in depth.values())
    index = json.loads((tmp_path / "there" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"]} == {*tensor_bytes(tmp_path / "there")}
    card = (tmp_path / "there" / "README.md").read_text()
    assert f"| mode | {mode}" in card and all(f"`{name}`" in card for name in depth)
    convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(donor)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (donor / "config.json").read_text()
    )


@pytest.mark.parametrize("mode", ["block_low_rank", "mhc"])
def test_initial_values_are_always_the_same(donor, tmp_path, mode):
    """Whatever random numbers were drawn before, of which none are taken."""
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        expected = torch.Generator().manual_seed(seed)
        convert_checkpoint(donor, tmp_path / name, mode=mode, verify=False)
        assert torch.rand(()) == torch.rand((), generator=expected)
    assert tensor_bytes(tmp_path / "first") == tensor_bytes(tmp_path / "second")


@pytest.mark.parametrize("mode", sorted(NO_DONOR) + ["full_window"])
def test_modes_that_no_donor_is(donor, tmp_path, mode):
    with pytest.raises(ConversionError, match=f"{mode} mode: its? reads? "):
        fields = {"attn_res_window": 9} if mode == "full_window" else {}
        convert_checkpoint(donor, tmp_path / "dst", mode=mode, fields=fields)
    assert not (tmp_path / "dst").exists()


def change(folder, parameter, by):
    shard = folder / "model-00002-of-00002.safetensors"
    tensors = load_file(shard)
    tensors[f"model.depth_attention.{parameter}"].view(-1)[-1] += by
    save_file(tensors, shard, {"format": "pt"})


TRAINED = {
    "block_delta": ("null_source", r"depth_attention.null_source is trained, .* by up to 0.25"),
    "denseformer": ("weight", r"depth_attention.weight is trained"),
    "hc": ("bias", "depth_attention.bias is trained"),
    "block_mhc": ("connections.weight", "connections.weight is trained"),
    "full_sigmoid": ("query", r"largest \|query\| is 0.25"),
}


@pytest.mark.parametrize("mode", TRAINED)
def test_what_is_trained_does_not_go_back(donor, tmp_path, mode):
    parameter, message = TRAINED[mode]
    convert_checkpoint(donor, tmp_path / "there", mode=mode, verify=False)
    change(tmp_path / "there", parameter, 0.25)
    with pytest.raises(ConversionError, match=message):
        convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)


def test_what_changes_nothing_goes_back(donor, tmp_path):
    """With queries of a donor, gains and projections are of no effect; infinite ones are."""
    for mode, parameter in {
        "block": "key_norm",
        "full_delta": "key_norm",
        "full_low_rank": "key_projection",
    }.items():
        convert_checkpoint(donor, tmp_path / mode, mode=mode, verify=False)
        change(tmp_path / mode, parameter, 0.25)
        assert convert_to_donor(tmp_path / mode, tmp_path / "back", force=True).verification is not None
        change(tmp_path / mode, parameter, torch.inf)
        with pytest.raises(ConversionError, match="aren't finite"):
            convert_to_donor(tmp_path / mode, tmp_path / "other", verify=False)


def test_the_scale_of_reads_on_the_way_back(donor, tmp_path):
    """It counts where weights are a softmax."""
    for mode in ("full_static", "full_sigmoid", "full_delta"):
        convert_checkpoint(donor, tmp_path / mode, mode=mode, verify=False)
        edit_json(tmp_path / mode / "config.json", attn_res_sum_scale=False)
    with pytest.raises(ConversionError, match="attn_res_sum_scale is false"):
        convert_to_donor(tmp_path / "full_static", tmp_path / "back")
    for mode in ("full_sigmoid", "full_delta"):
        assert convert_to_donor(tmp_path / mode, tmp_path / "back", force=True).verification is not None


OPTIONS = {
    "mode": (["--mode", "half"], "mode is 'half'; it must be one of block, full, denseformer, hc, mhc, b"),
    "size": (["--mode", "hc", "--block-size", "2"], "hc mode has no blocks"),
    "number": (["--mode", "full_delta", "--num-blocks", "2"], "full_delta mode has no blocks"),
    "other field": (["--set", "vocab_size=2"], "vocab_size can't be set; attn_res_window, "),
    "no number": (["--set", "attn_res_rank=x"], "give a name and an integer"),
    "no value": (["--set", "attn_res_rank"], "give a name and an integer"),
    "unused": (["--set", "attn_res_window=4"], "attn_res_window is of modes that end in _window"),
    "range": (["--mode", "mhc", "--set", "attn_res_num_streams=1"], "attn_res_num_streams is 1; it must be at least 2"),
    "heads": (["--mode", "full_heads", "--set", "attn_res_num_heads=3"], "it must divide hidden_size = 40"),
    "back": (["--to-donor", "--set", "attn_res_rank=2"], "leave out --set"),
    "two ways": (["--to-donor", "--to-kimi-k3"], "two ways"),
}


@pytest.mark.parametrize("options, message", OPTIONS.values(), ids=OPTIONS)
def test_options(donor, tmp_path, capsys, options, message):
    assert main([str(donor), str(tmp_path / "dst"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert tree(tmp_path) == {}


def test_the_command(donor, tmp_path, capsys):
    """Its report, and the card, which repeats it."""
    options = ["--mode", "block_low_rank", "--num-blocks", "3", "--set", "attn_res_rank=3", "--no-verify"]
    assert main([str(donor), str(tmp_path / "dst"), *options]) == 0
    assert "block_low_rank, 2 decoder layers per block" in capsys.readouterr().out
    results = json.loads((tmp_path / "dst" / "results.json").read_text())
    assert results["command"].endswith("dst --mode block_low_rank --block-size 2 --set attn_res_rank=3")
