# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Conversion keeps what a donor computes, and every byte of its tensors."""

import itertools
import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
import transformers
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor
from attnres_convert import verification as verification_module
from attnres_convert.verification import ROOM, TOLERANCE, verify
from behaviours import error_against_float64
from convert_models import edit_json, relative, save_donor, tensor_bytes, tokens
from families import FAMILIES
from marks import mostly_slow
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import attnres
from attnres import AttnResConfig
from depth_attention_attnres import DepthPlace


SHAPES = {
    "full": {"mode": "full"},
    "block_1": {"block_size": 1},
    "block_2": {"block_size": 2},
    "block_5": {"block_size": 5},
    "default": {},
}


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor") / "llama"
    return folder, save_donor(folder)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_llama_is_exact_in_every_shape(donor, tmp_path, shape):
    """Logits, hidden states and greedy generation of a converted Llama are the donor's."""
    folder, original = donor
    convert_checkpoint(folder, tmp_path / "dst", **shape, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert type(model) is attnres.AttnResForCausalLM
    inputs = tokens(model)
    with torch.no_grad():
        expected = original(inputs, output_hidden_states=True)
        actual = model(inputs, output_hidden_states=True)
    bound = ROOM * error_against_float64(original, inputs)
    assert relative(actual.logits, expected.logits) < bound < 1e-4
    assert len(actual.hidden_states) == len(expected.hidden_states)
    for found, wanted in zip(actual.hidden_states, expected.hidden_states):
        assert relative(found, wanted) < bound
    generated = model.generate(inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert generated.equal(original.generate(inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "llama"])
def test_every_family_is_exact(family, tmp_path):
    """Each family converts, passes the converter's own verification, and keeps its tensors and on-disk names."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    save_donor(tmp_path / "src", family, num_hidden_layers=4)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst", block_size=3)
    assert result.verification.relative_difference < TOLERANCE
    assert result.verification.top1_agreement == 1
    assert result.warnings == ()
    assert_only_depth_was_added(tmp_path)


def assert_only_depth_was_added(folder):
    before, after = tensor_bytes(folder / "src"), tensor_bytes(folder / "dst")
    assert {name: after[name] for name in before} == before
    names = {name for name in after if name not in before}
    assert {name.split(".", 1)[1] for name in names} == {"depth_attention.query", "depth_attention.key_norm"}
    assert all(after[name][0] == "torch.float32" for name in names)


HEADS = {
    "base": ("", "depth_attention.query"),
    "causal_lm": ("ForCausalLM", "model.depth_attention.query"),
    "sequence": ("ForSequenceClassification", "model.depth_attention.query"),
    "token": ("ForTokenClassification", "model.depth_attention.query"),
    "question": ("ForQuestionAnswering", "transformer.depth_attention.query"),
}


@pytest.mark.parametrize("head,query", HEADS.values(), ids=HEADS)
def test_heads(head, query, tmp_path):
    """Every head of the Llama family converts to its own AttnRes class, verified on its own outputs."""
    save_donor(tmp_path / "src", head=head)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst", block_size=2)
    assert result.verification.relative_difference < TOLERANCE
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["architectures"] == [f"AttnRes{head or 'Model'}"]
    assert query in tensor_bytes(tmp_path / "dst")
    loaded, info = getattr(transformers, f"AutoModel{head}").from_pretrained(tmp_path / "dst", output_loading_info=True)
    assert type(loaded).__name__ == f"AttnRes{head or 'Model'}"
    assert not info["missing_keys"] and not info["unexpected_keys"]


STORED = {
    "bf16_sharded": {"dtype": torch.bfloat16, "shard_size": "30KB"},
    "tied": {"tie_word_embeddings": True},
    "tied_sharded": {"tie_word_embeddings": True, "shard_size": "30KB"},
    "two_shards": {"shard_size": "160KB"},
    "one_layer": {"num_hidden_layers": 1},
}


@pytest.mark.parametrize("options", STORED.values(), ids=STORED)
def test_ways_to_store_a_donor(options, tmp_path):
    """Sharded, half-precision and tied checkpoints keep files, names, bytes and dtype."""
    save_donor(tmp_path / "src", **options)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert result.verification.relative_difference < TOLERANCE
    assert_only_depth_was_added(tmp_path)
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    sizes = [shape.numel() * dtype.itemsize for dtype, shape in stored_tensors(tmp_path / "dst")]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert set(index["weight_map"]) == set(tensor_bytes(tmp_path / "dst"))
    if "shard_size" in options:
        shards = {path.name: path.read_bytes() for path in (tmp_path / "src").glob("*.safetensors")}
        assert len(shards) == 2 if options["shard_size"] == "160KB" else len(shards) > 2
        assert all((tmp_path / "dst" / name).read_bytes() == content for name, content in shards.items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    assert model.dtype == options.get("dtype", torch.float32)
    assert model.model.depth_attention.query.dtype == torch.float32


def stored_tensors(folder):
    for path in folder.glob("*.safetensors"):
        for tensor in load_file(path).values():
            yield tensor.dtype, tensor.shape


def test_the_configuration_is_the_donors_and_more(donor, tmp_path):
    """config.json keeps every key of the donor's and states the shape that was asked for."""
    result = convert_checkpoint(donor[0], tmp_path / "dst", num_blocks=3, verify=False)
    before = json.loads((donor[0] / "config.json").read_text())
    after = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert {key: after[key] for key in before if key not in ("model_type", "architectures")} == {
        key: before[key] for key in before if key not in ("model_type", "architectures")
    }
    assert after["model_type"] == "attnres"
    assert after["architectures"] == ["AttnResForCausalLM"]
    assert after["auto_map"] == attnres.AttnResConfig.hub_classes()
    assert (after["attn_res_mode"], after["attn_res_block_size"], after["attn_res_sum_scale"]) == ("block", 2, True)
    assert after["attn_res_norm_eps"] == before["rms_norm_eps"]
    # 5 layers in blocks of 2: embedding, then the finished blocks and the open one
    assert result.depth_sources == (1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4)
    assert result.depth_parameters == 2 * 11 * before["hidden_size"]
    assert result.num_parameters == donor[1].num_parameters()


def change_tensor(name, change):
    """A fault in the one tensor of a converted folder whose name ends so."""

    def damage(folder):
        for shard in folder.glob("*.safetensors"):
            tensors = load_file(shard)
            for found in [found for found in tensors if found.endswith(name)]:
                tensors[found] = change(tensors[found]).contiguous()
                save_file(tensors, shard, metadata={"format": "pt"})

    return damage


def off(*index, by=None, times=1.0):
    def change(tensor):
        tensor[index] = tensor[index] * times if by is None else by
        return tensor

    return change


# how far off the logits must be at least, as a multiple of what is tolerated in float64
FAULTS = {
    "permuted": (change_tensor("layers.1.self_attn.o_proj.weight", lambda weight: weight.flip(0)), 1e6),
    "scaled": (change_tensor("layers.1.self_attn.o_proj.weight", lambda weight: weight * 1.001), 1e4),
    "gain": (change_tensor("layers.1.input_layernorm.weight", off(3, times=1.001)), 1e4),
    "query": (change_tensor("depth_attention.query", off(3, 0, by=0.01)), 1e4),
    "means": (lambda folder: edit_json(folder / "config.json", attn_res_sum_scale=False), 1e4),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(
    "family", mostly_slow(["llama", "qwen3_moe", "gemma3_text", "starcoder2"], "llama", "qwen3_moe")
)
def test_verification_notices_damage(family, fault, tmp_path):
    """Negative control: a fault in one tensor, one query off zero or unscaled reads are orders of magnitude off."""
    damage, factor = FAULTS[fault]
    donor = save_donor(tmp_path / "src", family)
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", block_size=2, verify=False)
    damage(tmp_path / "dst")
    assert difference_of(donor, tmp_path, torch.float64) > factor * TOLERANCE


def difference_of(donor, folder, dtype):
    """The relative difference for which the verification refuses what is in a folder."""
    attnres_class = AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder / "dst"))]
    with pytest.raises(ConversionError, match="verification failed") as raised:
        verify(folder / "src", type(donor), folder / "dst", attnres_class, dtype)
    return float(str(raised.value).split("differ by ")[1].split()[0])


@pytest.mark.parametrize("wrong", ["scale", "boundary"])
def test_verification_notices_wrong_code(donor, wrong, tmp_path, monkeypatch):
    """Negative control: a read's scale, of which the next norm leaves little, and a block's boundary are off by one."""
    convert_checkpoint(donor[0], tmp_path / "dst", block_size=2, verify=False)
    (tmp_path / "src").symlink_to(donor[0])
    if wrong == "scale":
        right = DepthPlace.of
        monkeypatch.setattr(DepthPlace, "of", lambda *where: replace(right(*where), scale=right(*where).scale + 1))
    else:
        monkeypatch.setattr(AttnResConfig, "num_closed_depth_sources", lambda config, row: 1 + (row + 1) // 4)
    assert difference_of(donor[1], tmp_path, torch.float64) > 1e4 * TOLERANCE


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "llama", "mixtral", "gemma3_text", "kimi_linear"))
def test_verification_in_float32(family, tmp_path, monkeypatch):
    """Where float64 doesn't fit, what rounding does to the donor is the yardstick, and says no for a small fault."""
    donor = save_donor(tmp_path / "src", family)
    free = int(donor.num_parameters() * 6 * 1.2)
    monkeypatch.setattr(verification_module, "available_memory", lambda: free)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst", block_size=2).verification
    assert result.dtype == "float32" and 1e-8 < result.donor_rounding < 1e-5
    assert result.relative_difference <= result.tolerance <= ROOM * max(result.donor_rounding, 2**-24)
    results = json.loads((tmp_path / "dst" / "results.json").read_text())["conversion"]
    assert results["donor_rounding"] == result.donor_rounding and results["tolerance"] == result.tolerance
    assert "times what rounding does to the donor" in (tmp_path / "dst" / "README.md").read_text()
    change_tensor("depth_attention.query", off(3, slice(None), by=0.01))(tmp_path / "dst")
    assert difference_of(donor, tmp_path, torch.float32) > 10 * result.tolerance


def test_models_without_logits_to_speak_of(tmp_path):
    """Logits that are all zero differ by nothing; those that aren't finite can't be verified."""
    donor = save_donor(tmp_path / "src")
    shard = tmp_path / "src" / "model.safetensors"
    tensors = load_file(shard)
    for value, dtype in itertools.product((0.0, math.inf), (torch.float64, torch.float32)):
        tensors["lm_head.weight"][:] = value
        save_file(tensors, shard, metadata={"format": "pt"})
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False, force=True)
        folders = (tmp_path / "src", type(donor), tmp_path / "dst", attnres.AttnResForCausalLM, dtype)
        if value == 0:
            assert verify(*folders).relative_difference == 0
        else:
            with pytest.raises(ConversionError, match="not finite, so it can't be verified; see --no-verify"):
                verify(*folders)


def test_an_unused_tensor_is_reported(tmp_path):
    """A tensor that the donor's class ignores is kept and named in a warning; one that transformers expects is not."""
    save_donor(tmp_path / "src")
    shard = tmp_path / "src" / "model.safetensors"
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.extra.weight": torch.ones(3),
    }
    save_file({**load_file(shard), **extra}, shard, metadata={"format": "pt"})
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert len(result.warnings) == 1 and "self_attn.extra.weight" in result.warnings[0]
    assert extra.keys() <= tensor_bytes(tmp_path / "dst").keys()


def test_a_quantised_donor(tmp_path):
    """Packed matrices convert as they are, without verification; norms and layers are still compared."""
    save_donor(tmp_path / "src")
    shard = tmp_path / "src" / "model.safetensors"
    packed = {}
    for name, tensor in load_file(shard).items():
        if name.endswith("_proj.weight"):
            packed[name] = torch.zeros(tensor.numel() // 2, 1, dtype=torch.uint8)
            packed[f"{name}.absmax"] = torch.ones(3)
        else:
            packed[name] = tensor
    save_file(packed, shard, metadata={"format": "pt"})
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    edit_json(tmp_path / "src" / "config.json", quantization_config=quantization)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert result.verification is None and "quantised" in result.verification_skipped
    assert json.loads((tmp_path / "dst" / "config.json").read_text())["quantization_config"] == quantization
    assert_only_depth_was_added(tmp_path)
    for damage in ({"num_hidden_layers": 4}, {"num_hidden_layers": 6}, {"hidden_size": 48}, {"vocab_size": 68}):
        config = json.loads((tmp_path / "src" / "config.json").read_text())
        edit_json(tmp_path / "src" / "config.json", **damage)
        with pytest.raises(ConversionError, match="disagrees"):
            convert_checkpoint(tmp_path / "src", tmp_path / "other")
        edit_json(tmp_path / "src" / "config.json", **config)


@pytest.mark.parametrize("family", ["deepseek_v3", "llama"])
@pytest.mark.parametrize("num_mtp", [1, 2])
def test_layers_that_predict_further_tokens(family, num_mtp, tmp_path):
    """They lie behind the model's own, are carried along with a warning, unused, and return; others are refused."""
    save_donor(tmp_path / "src", family, num_hidden_layers=3)
    shard = tmp_path / "src" / "model.safetensors"
    tensors = load_file(shard)
    last = {name: tensor for name, tensor in tensors.items() if ".layers.2." in name}
    for layer in range(3, 3 + num_mtp):
        tensors |= {name.replace(".2.", f".{layer}.", 1): tensor + 1 for name, tensor in last.items()}
        tensors |= {f"model.layers.{layer}.{name}.weight": torch.ones(4) for name in ("enorm", "shared_head.norm")}
    save_file(tensors, shard, metadata={"format": "pt"})
    edit_json(tmp_path / "src" / "config.json", num_nextn_predict_layers=num_mtp)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert len(result.warnings) == 1 and "model.layers.3." in result.warnings[0]
    assert result.verification.relative_difference < TOLERANCE
    assert_only_depth_was_added(tmp_path)
    assert convert_to_donor(tmp_path / "dst", tmp_path / "back").warnings == result.warnings
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "src")
    edit_json(tmp_path / "src" / "config.json", num_nextn_predict_layers=num_mtp - 1)
    with pytest.raises(ConversionError, match=rf"layers\.{2 + num_mtp}\..* belongs to none of the 3 layers"):
        convert_checkpoint(tmp_path / "src", tmp_path / "other")


def test_experts_of_four_bits(tmp_path):
    """gpt_oss as it is published: blocks and scales come along as they are."""
    save_donor(tmp_path / "src", "gpt_oss", num_hidden_layers=2)
    shard = tmp_path / "src" / "model.safetensors"
    packed = {}
    for name, tensor in load_file(shard).items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            packed[f"{name}_blocks"] = torch.zeros(experts, outer, inner // 8, 4, dtype=torch.uint8)
            packed[f"{name}_scales"] = torch.zeros(experts, outer, inner // 8, dtype=torch.uint8)
        else:
            packed[name] = tensor
    assert sum(name.endswith("_blocks") for name in packed) == 4
    save_file(packed, shard, metadata={"format": "pt"})
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    edit_json(tmp_path / "src" / "config.json", quantization_config=quantization)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert "quantised" in result.verification_skipped and result.warnings == ()
    assert_only_depth_was_added(tmp_path)


SAID = {
    "null quantisation": {"quantization_config": None},
    "tuples": {"return_dict": False},
    "attentions": {"output_attentions": True},
    "hidden states": {"output_hidden_states": True},
    "no cache": {"use_cache": False},
    "torchscript": {"torchscript": True},
    "null layer types": {"layer_types": None},
    "foreign layer types": {"layer_types": ["sliding_attention"] * 5},
    "foreign window": {"sliding_window": 3},
    "foreign chunks": {"attention_chunk_size": 3},
    "null window": {"sliding_window": None, "attention_chunk_size": None},
    "all": {
        "return_dict": False,
        "output_attentions": True,
        "output_hidden_states": True,
        "attn_implementation": "eager",
    },
}


@pytest.mark.parametrize("changes", SAID.values(), ids=SAID)
def test_what_a_configuration_may_say(changes, donor, tmp_path):
    """A configuration that transformers loads, and whose outputs or masks it changes or not, is verified as any."""
    shutil.copytree(donor[0], tmp_path / "src")
    edit_json(tmp_path / "src" / "config.json", **changes)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert result.verification.relative_difference < TOLERANCE
    assert not result.warnings
    assert json.loads((tmp_path / "dst" / "config.json").read_text()).items() >= changes.items()
    inputs = tokens(donor[1])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst", return_dict=True)
    with torch.no_grad():
        assert relative(model(inputs).logits, donor[1](inputs).logits) < ROOM * error_against_float64(donor[1], inputs)
    convert_to_donor(tmp_path / "dst", tmp_path / "back")
