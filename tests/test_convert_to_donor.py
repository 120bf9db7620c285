# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The way back to the donor: exact, and refused as soon as it wouldn't be."""

import json

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor
from convert_models import edit_json, save_donor, tensor_bytes, tree
from families import FAMILIES, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@pytest.mark.parametrize("shard_size", ["50GB", "30KB"], ids=["single", "sharded"])
def test_there_and_back_is_the_same_folder(tmp_path, shard_size):
    """Weights byte for byte, file names, index, configuration and card return."""
    save_donor(tmp_path / "src", shard_size=shard_size)
    (tmp_path / "src" / "README.md").write_text("---\nlicense: mit\n---\nthe donor's card\n")
    (tmp_path / "src" / "LICENSE").write_text("the licence\n")
    old_style = {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    edit_json(tmp_path / "src" / "config.json", auto_map={"AutoModel": "modeling_old.OldModel"}, **old_style)
    convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    result = convert_to_donor(tmp_path / "there", tmp_path / "back")
    before, after = tree(tmp_path / "src"), tree(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, content in before.items():
        same = json.loads(content) == json.loads(after[name]) if name.endswith(".json") else content == after[name]
        assert same, name
    assert result.verification.relative_difference < result.verification.tolerance


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_families_whose_names_differ_on_disk(family, tmp_path):
    """Experts go back under the donor's on-disk names."""
    assert family in FAMILIES
    save_donor(tmp_path / "src", family, num_hidden_layers=2)
    convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "src")


@pytest.mark.parametrize("shard_size", ["50GB", "30KB"], ids=["single", "sharded"])
def test_checkpoints_that_save_pretrained_wrote(tmp_path, shard_size):
    """Depth tensors inside a shard of other tensors are cut out; the rest of the shard keeps its bytes."""
    donor = save_donor(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "there").save_pretrained(
        tmp_path / "saved", max_shard_size=shard_size
    )
    convert_to_donor(tmp_path / "saved", tmp_path / "back", link=True)
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "src")
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not any(key.startswith("attn_res") or key == "auto_map" for key in config)
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    model, info = LlamaForCausalLM.from_pretrained(tmp_path / "back", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(a.equal(b) for a, b in zip(model.parameters(), donor.parameters()))


def test_a_trained_query_is_refused(tmp_path):
    """The refusal names the size of the largest query and writes nothing."""
    model = tiny_model()
    torch.nn.init.zeros_(model.model.depth_attention.query)
    model.model.depth_attention.query.data[3, 5] = -0.125
    model.config.attn_res_sum_scale = True
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match=r"largest \|query\| is 0.125"):
        convert_to_donor(tmp_path / "src", tmp_path / "dst")
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_reads_that_are_means_are_refused(tmp_path):
    """Without the scale the donor would compute something else."""
    model = tiny_model(attn_res_sum_scale=False)
    torch.nn.init.zeros_(model.model.depth_attention.query)
    model.save_pretrained(tmp_path / "src")
    with pytest.raises(ConversionError, match="attn_res_sum_scale"):
        convert_to_donor(tmp_path / "src", tmp_path / "dst")


def test_a_donor_has_nowhere_to_go_back_to(tmp_path):
    save_donor(tmp_path / "src")
    with pytest.raises(ConversionError, match="no AttnRes checkpoint"):
        convert_to_donor(tmp_path / "src", tmp_path / "dst")
