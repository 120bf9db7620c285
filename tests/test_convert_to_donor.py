# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The way back to the donor: exact, and refused as soon as it wouldn't be."""

import json

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor
from convert_models import edit_json, save_donor, tensor_bytes, tree
from families import FAMILIES, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM


@pytest.mark.parametrize("shard_size", ["50GB", "30KB"], ids=["single", "sharded"])
def test_there_and_back_is_the_same_folder(tmp_path, shard_size):
    """Weights byte for byte, file names, index, configuration and card return."""
    save_donor(tmp_path / "src", shard_size=shard_size)
    (tmp_path / "src" / "README.md").write_text("---\nlicense: mit\n---\nthe donor's card\n")
    (tmp_path / "src" / "LICENSE").write_text("the licence\n")
    old_style = {"rope_parameters": ..., "rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    edit_json(tmp_path / "src" / "config.json", auto_map={"AutoModel": "modeling_old.OldModel"}, **old_style)
    (tmp_path / "src" / "modeling_old.py").write_text("class OldModel: ...\n")
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


def test_code_of_the_donor(tmp_path):
    """References to classes in the folder's own Python files come along and return, also those of its tokenizer."""
    save_donor(tmp_path / "src")
    (tmp_path / "src" / "code_old.py").write_text("class A: ...\n")
    auto_map = {"AutoConfig": "code_old.A", "AutoModel": "code_old.A"}
    pipelines = {"x": {"impl": "code_old.A", "pt": ["AutoModel"]}}
    edit_json(tmp_path / "src" / "config.json", auto_map=auto_map, custom_pipelines=pipelines)
    tokenizer = {"auto_map": {"AutoTokenizer": ["code_old.A", None]}}
    (tmp_path / "src" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    there = convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    back = convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)
    assert there.warnings == back.warnings == ()
    for name in ("config.json", "tokenizer_config.json", "code_old.py"):
        before, after = ((tmp_path / folder / name).read_text() for folder in ("src", "back"))
        assert before == after if name.endswith("py") else json.loads(before) == json.loads(after)


ELSEWHERE = {
    "repository": {"AutoModel": "evil/repo--code_old.A"},
    "absent": {"AutoModel": "code_absent.A"},
    "folder": {"AutoModel": "../code_old.A"},
    "no class": {"AutoModel": "code_old"},
    "ours": {"AutoModel": "modeling_attnres.AttnResModel"},
    "one of two": {"AutoModel": "code_old.A", "AutoTokenizer": [None, "evil/repo--code_old.A"]},
    "number": {"AutoModel": 5},
    "object": {"AutoModel": {"impl": "evil/repo--code_old.A"}},
}


@pytest.mark.parametrize("auto_map", ELSEWHERE.values(), ids=ELSEWHERE)
def test_code_from_elsewhere(auto_map, tmp_path):
    """Other references are left out, with a warning for each file, and so don't return."""
    save_donor(tmp_path / "src")
    (tmp_path / "src" / "code_old.py").write_text("class A: ...\n")
    files = ("config.json", "tokenizer_config.json", "processor_config.json")
    for name in files:
        (tmp_path / "src" / name).touch()
        content = json.loads((tmp_path / "src" / name).read_text() or "{}")
        (tmp_path / "src" / name).write_text(json.dumps({**content, "auto_map": auto_map, "kept": True}))
    there = convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    assert [warning.split(":")[0] for warning in there.warnings] == ["processor_config.json", *files[1::-1]]
    assert all("left out auto_map" in warning for warning in there.warnings)
    convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)
    for folder in ("there", "back"):
        for name in files:
            content = json.loads((tmp_path / folder / name).read_text())
            assert content["kept"] and ("auto_map" not in content or (folder, name) == ("there", "config.json"))


@pytest.mark.parametrize("auto_map", [*map(json.dumps, [*ELSEWHERE.values(), 5, "x", ["a.B"]]), "{", '"\\ud800"'])
def test_code_in_the_metadata_of_a_shard(auto_map, tmp_path):
    """What the way back restores is held to the same: it is left out, or what is no JSON is refused."""
    save_donor(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    shard = tmp_path / "there" / "model-00002-of-00002.safetensors"
    save_file(load_file(shard), shard, {"format": "pt", "donor_auto_map": auto_map})
    if auto_map in ("{", '"\\ud800"'):
        with pytest.raises(ConversionError, match="donor_auto_map"):
            convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)
        return
    result = convert_to_donor(tmp_path / "there", tmp_path / "back", verify=False)
    assert len(result.warnings) == 1 and "left out auto_map" in result.warnings[0]
    assert "auto_map" not in json.loads((tmp_path / "back" / "config.json").read_text())
