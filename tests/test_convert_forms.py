# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of other projects with depth attention: the logits are those of their formulas, written here again, the
other tensors keep their bytes, and what isn't known for sure is refused."""

import json
import re

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor, convert_to_kimi_k3
from attnres_convert.cli import main
from attnres_convert.kimi_k3 import to_kimi_k3
from attnres_convert.verification import Float64
from convert_models import edit_json, relative, tensor_bytes, tree
from families import FAMILIES, perturb, tiny_donor, tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import attnres  # noqa: F401  registers the classes


PARTS = ("attn", "mlp")


def save_wdlctc(folder, mode, num_blocks=3, cumulative=True, **options):
    """A tiny Qwen3 with depth tensors under wdlctc's names; returns the donor's model and all tensors."""
    donor = tiny_donor("qwen3", **options)
    donor.save_pretrained(folder)
    num_layers, hidden = donor.config.num_hidden_layers, donor.config.hidden_size
    stems = [f"model.layers.{layer}.{part}_res" for layer in range(num_layers) for part in PARTS]
    stems += [] if cumulative else ["model.final_res"]
    generator = torch.Generator().manual_seed(3)
    tensors = load_file(folder / "model.safetensors")
    for stem in stems:
        tensors[f"{stem}_proj.weight"] = torch.randn(1, hidden, generator=generator) * 0.3
        tensors[f"{stem}_norm.weight"] = 1 + torch.randn(hidden, generator=generator) * 0.3
        if cumulative:
            tensors[f"{stem}_bias"] = torch.randn((), generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    fields = {"model_type": "qwen3_attnres", "architectures": ["Qwen3AttnResForCausalLM"]}
    fields |= {"auto_map": {"AutoModelForCausalLM": "modeling_attnres.Qwen3AttnResForCausalLM"}}
    edit_json(folder / "config.json", attnres_mode=mode, attnres_num_blocks=num_blocks, **fields)
    return donor, tensors


@torch.no_grad()
def wdlctc_logits(donor, tensors, mode, num_blocks, inputs, eps=None, twice=True):
    """The logits in float64.

    Args:
        twice: whether a state that has just been closed is read a second time, with the bias.
    """
    donor = donor.double()
    model, eps = donor.model, eps or donor.config.rms_norm_eps
    num_layers, is_cumulative = len(model.layers), "model.final_res_proj.weight" not in tensors
    size = -(-num_layers // num_blocks)
    positions = torch.arange(inputs.shape[1])[None]
    mask = torch.full((inputs.shape[1],) * 2, -torch.inf, dtype=torch.float64).triu(1)[None, None]

    def read(stem, sources):
        query, gain = tensors[f"{stem}_proj.weight"].double()[0], tensors[f"{stem}_norm.weight"].double()
        keys = [source / (source.square().mean(-1, keepdim=True) + eps).sqrt() * gain for source in sources]
        scores = torch.stack([key @ query for key in keys])
        if is_cumulative:
            scores[-1] += tensors[f"{stem}_bias"].double()
        return sum(weight[..., None] * source for weight, source in zip(scores.softmax(0), sources))

    state = model.embed_tokens(inputs)
    rotation = model.rotary_emb(state, positions)
    closed = [state] if is_cumulative else []
    state_is_closed = is_cumulative
    for number, layer in enumerate(model.layers):
        for part in PARTS:
            sources = closed if state_is_closed and not twice else [*closed, state]
            mixed = read(f"model.layers.{number}.{part}_res", sources)
            if part == "attn":
                output = layer.self_attn(layer.input_layernorm(mixed), rotation, mask)[0]
            else:
                output = layer.mlp(layer.post_attention_layernorm(mixed))
            if is_cumulative:
                state = state + output
                state_is_closed = mode == "full" or part == "mlp" and (number + 1) % size == 0
                closed = [*closed, state] if state_is_closed else closed
            elif mode == "full" or part == "attn" and number % size == 0:
                closed, state = [*closed, state], output
            else:
                state = state + output
    output = state if is_cumulative else read("model.final_res", [*closed, state])
    return donor.lm_head(model.norm(output))


WDLCTC = {
    "block, a shorter last one": ("block", 3, True),
    "block, all equal": ("block", 5, True),
    "one block": ("block", 1, True),
    "full": ("full", 3, True),
    "block, no bias": ("block", 3, False),
    "blocks of one layer, no bias": ("block", 8, False),
    "full, no bias": ("full", 3, False),
}


@pytest.mark.parametrize("mode, num_blocks, cumulative", WDLCTC.values(), ids=WDLCTC)
def test_wdlctc(tmp_path, mode, num_blocks, cumulative):
    """Also in float64, as all that was learned is kept; but the bias of a state that is there twice is rounded."""
    donor, tensors = save_wdlctc(tmp_path / "src", mode, num_blocks, cumulative)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    assert result.mode == (f"{mode}_recency" if cumulative else mode)
    assert result.verification is None and "isn't part of transformers" in result.verification_skipped
    assert result.warnings == ()
    before, after = tensor_bytes(tmp_path / "src"), tensor_bytes(tmp_path / "dst")
    kept = {name: x for name, x in before.items() if "_res_" not in name}
    assert {name: x for name, x in after.items() if "depth_attention" not in name} == kept
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"]} == {*after}
    shards = [load_file(path) for path in (tmp_path / "dst").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(x.nbytes for shard in shards for x in shard.values())
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    assert config["attn_res_sum_scale"] is False and not any(key.startswith("attnres_") for key in config)
    card = (tmp_path / "dst" / "README.md").read_text()
    assert "github.com/wdlctc/" in card and "--to-donor" not in card and "computes what the source" not in card

    inputs = tokens()
    with Float64():
        expected = wdlctc_logits(donor, tensors, mode, num_blocks, inputs)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
    with torch.no_grad():
        assert relative(model(inputs).logits.double(), expected) < 1e-5
        with Float64():
            actual = model.double()(inputs).logits
    assert relative(actual, expected) < (1e-6 if cumulative else 1e-12)
    if cumulative and num_blocks != 1:
        wrong = wdlctc_logits(donor, tensors, mode, num_blocks, inputs, twice=False)
        assert relative(actual, wrong) > 1e-3
    for shape in (("block", 2), ("full", 3)):
        if shape != (mode, num_blocks) and not (shape[0] == mode == "full"):
            assert relative(actual, wdlctc_logits(donor, tensors, *shape, inputs)) > 1e-3


def damaged(**changes):
    """Replaces tensors, or removes those that are None; "__" in names stands for a dot."""

    def damage(folder):
        tensors = load_file(folder / "model.safetensors")
        tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})

    return damage


def says(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


BAD_WDLCTC = {
    "missing": (damaged(model__layers__1__mlp_res_bias=None), r"missing: model\.layers\.1\.mlp_res_bias\."),
    "a final bias": (damaged(model__final_res_bias=torch.ones(())), "the embedding is in two sources"),
    "null source": (damaged(model__layers__0__attn_null_source=torch.ones(40)), "not to be there: .*attn_null_source"),
    "gate": (damaged(model__layers__0__attn_res_gate_logit=torch.ones(())), "not to be there: .*attn_res_gate_logit"),
    "v stream": (damaged(model__layers__0__v_res_proj__weight=torch.ones(1, 40)), "not to be there: .*v_res_proj"),
    "prefixes": (damaged(layers__0__mlp_res_bias=torch.ones(())), "several prefixes: '', 'model.'"),
    "flat": (damaged(model__layers__0__mlp_res_proj__weight=torch.ones(40)), r"shape \(40,\); \(1, 40\) is expected"),
    "vector": (damaged(model__layers__0__mlp_res_bias=torch.ones(1)), r"shape \(1,\); \(\) is expected"),
    "not finite": (damaged(model__layers__0__mlp_res_bias=torch.tensor(torch.nan)), "aren't finite"),
    "double": (damaged(model__layers__0__mlp_res_bias=torch.ones(()).double()), "F64; one of F32, F16, BF16"),
    "a layer's tensor": (damaged(model__layers__0__mlp__up_proj__weight=None), "up_proj.weight is missing"),
    "delta": (says(attnres_mode="delta_block"), "attnres_mode is 'delta_block'; block and full"),
    "gate type": (says(attnres_gate_type="learnable_alpha"), "attnres_gate_type is 'learnable_alpha'"),
    "null": (says(attnres_use_null_source=True), "attnres_use_null_source is set"),
    "no blocks": (says(attnres_num_blocks=-1), "a positive attnres_num_blocks"),
    "text": (says(attnres_num_blocks="8"), "attnres_num_blocks must be"),
    "layers": (says(num_hidden_layers=6), "6 layers in mode block, these tensors are missing"),
    "many layers": (says(num_hidden_layers=1000), "more than there are tensors"),
    "another head": (says(architectures=["Qwen3AttnResModelForX"]), "architecture Qwen3ModelForX is not supported"),
}


@pytest.fixture(scope="module")
def wdlctc(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wdlctc")
    save_wdlctc(folder, "block")
    return tree(folder)


@pytest.mark.parametrize("damage, message", BAD_WDLCTC.values(), ids=BAD_WDLCTC)
def test_bad_wdlctc(wdlctc, tmp_path, capsys, damage, message):
    (tmp_path / "src").mkdir()
    for name, content in wdlctc.items():
        (tmp_path / "src" / name).write_bytes(content)
    damage(tmp_path / "src")
    assert message_of_a_refusal(tmp_path, capsys, message)


def message_of_a_refusal(folder, capsys, message, *options):
    before = tree(folder)
    capsys.readouterr()
    assert main([str(folder / "src"), str(folder / "dst"), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) <= 400
    assert tree(folder) == before
    return re.search(message, error)


@pytest.mark.parametrize("options", [["--mode", "full"], ["--block-size", "2"], ["--set", "attn_res_rank=2"]])
def test_the_checkpoint_says_the_shape(wdlctc, tmp_path, capsys, options):
    (tmp_path / "src").mkdir()
    for name, content in wdlctc.items():
        (tmp_path / "src" / name).write_bytes(content)
    assert message_of_a_refusal(tmp_path, capsys, "the checkpoint says itself", *options)


@pytest.mark.parametrize("family", ["kimi_linear", "llama", "mixtral"])
@pytest.mark.parametrize("shard_size", ["50GB", "30KB"], ids=["single", "sharded"])
def test_kimi_k3_there_and_back(tmp_path, family, shard_size):
    """Every tensor has its bytes again, and the model its logits; in between there is Kimi K3's form of the donor."""
    if family not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {family}")
    assert family in FAMILIES
    model = tiny_model(family, num_hidden_layers=4, attn_res_block_size=3)
    model.save_pretrained(tmp_path / "src", max_shard_size=shard_size)
    result = convert_to_kimi_k3(tmp_path / "src", tmp_path / "k3")
    assert "nothing here runs" in result.verification_skipped
    config = json.loads((tmp_path / "k3" / "config.json").read_text())
    assert config["model_type"] == family and "AttnRes" not in config["architectures"][0]
    assert {key: value for key, value in config.items() if "attn_res" in key} == {"attn_res_block_size": 3}
    names = {*tensor_bytes(tmp_path / "k3")}
    depth = model.model.depth_attention
    rows = to_kimi_k3(depth.query.detach(), depth.key_norm.detach(), "model.")
    assert names >= {*rows} and not any("depth_attention" in name for name in names)
    back = convert_checkpoint(tmp_path / "k3", tmp_path / "back", link=shard_size == "30KB")
    assert back.mode == "block" and back.block_size == 3 and back.depth_sources == result.depth_sources
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "src")
    loaded, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "back"), tokens()
    with torch.no_grad():
        assert loaded(inputs, use_cache=False).logits.equal(model(inputs, use_cache=False).logits)
    assert "Kimi K3" in (tmp_path / "back" / "README.md").read_text()


def without_rows(folder):
    damaged(**{name: None for name in load_file(folder / "model.safetensors") if "_res_" in name})(folder)


BAD_KIMI_K3 = {
    "missing": (damaged(model__layers__1__mlp_res_norm__weight=None), "missing: model.layers.1.mlp_res_norm.weight"),
    "shape": (damaged(model__layers__1__mlp_res_norm__weight=torch.ones(41)), r"the shape \(41,\); \(40,\)"),
    "prefixes": (damaged(output_attn_res_norm__weight=torch.ones(40)), "several prefixes: '', 'model.'"),
    "not finite": (damaged(model__output_attn_res_norm__weight=torch.full((40,), torch.inf)), "aren't finite"),
    "no size": (says(attn_res_block_size=...), "has no attn_res_block_size"),
    "size": (says(attn_res_block_size=9), "attn_res_block_size is 9; it counts decoder layers"),
    "a text": (says(attn_res_block_size="2"), "attn_res_block_size"),
    "K3 itself": (says(model_type="kimi_k3"), "no Attention Residuals for 'kimi_k3'"),
    "donor": (without_rows, "there is no tensor like"),
}


@pytest.mark.parametrize("damage, message", BAD_KIMI_K3.values(), ids=BAD_KIMI_K3)
def test_bad_kimi_k3(tmp_path, capsys, damage, message):
    donor = tiny_donor(num_hidden_layers=2)
    donor.save_pretrained(tmp_path / "src")
    rows = to_kimi_k3(torch.randn(5, 40), torch.randn(5, 40), "model.")
    damaged(**rows)(tmp_path / "src")
    edit_json(tmp_path / "src" / "config.json", attn_res_block_size=2)
    damage(tmp_path / "src")
    assert message_of_a_refusal(tmp_path, capsys, message)


def test_what_kimi_k3_would_not_compute(tmp_path):
    """Scaled reads, and other modes."""
    tiny_model(attn_res_sum_scale=True).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ConversionError, match="attn_res_sum_scale is true"):
        convert_to_kimi_k3(tmp_path / "scaled", tmp_path / "dst")
    tiny_model(attn_res_mode="block_sigmoid").save_pretrained(tmp_path / "other")
    with pytest.raises(ConversionError, match="attn_res_mode is 'block_sigmoid'"):
        convert_to_kimi_k3(tmp_path / "other", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


@pytest.fixture(scope="module")
def inkling2(tmp_path_factory):
    pytest.importorskip("transformers.models.inkling2", reason="this transformers doesn't have Inkling 2")
    from test_inkling2 import SIZES
    from transformers import Inkling2ForCausalLM, Inkling2TextConfig

    torch.manual_seed(0)
    donor = perturb(Inkling2ForCausalLM(Inkling2TextConfig(**SIZES)))
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            if name.endswith("query"):
                parameter.mul_(30)
    folder = tmp_path_factory.mktemp("inkling2")
    donor.save_pretrained(folder)
    return folder, donor


def released(name):
    """The name that a published checkpoint has for a depth query."""
    name = re.sub(r"layers\.(\d+)\.attention_input\.query", lambda m: f"attn_res.attn_queries.{int(m[1]) - 1}", name)
    name = re.sub(r"layers\.(\d+)\.mlp_input\.query", r"attn_res.mlp_queries.\1", name)
    return name.replace("final_input.query", "attn_res.output_query")


def in_module(tensors):
    """The names that transformers' class has for depth queries."""
    parts = [f"layers.{layer}.{part}_input.query" for layer in range(7) for part in ("attention", "mlp")]
    names = {released(f"model.{name}"): f"model.{name}" for name in [*parts, "final_input.query"]}
    return {names.get(name.replace("model.llm.", "model."), name): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("names", ["released", "module"])
def test_inkling2_there_and_back(inkling2, tmp_path, names):
    """Compared with the donor's own class, and back."""
    folder, donor = inkling2
    (tmp_path / "src").mkdir()
    for name, content in tree(folder).items():
        (tmp_path / "src" / name).write_bytes(content)
    tensors = in_module(load_file(folder / "model.safetensors"))
    if names == "released":
        tensors = {released(name): tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    assert sum("attn_res." in name for name in tensors) == (14 if names == "released" else 0)
    result = convert_checkpoint(tmp_path / "src", tmp_path / "there")
    assert result.mode == "block_inkling2" and result.block_size == 2 and result.verification is not None
    assert result.verification.relative_difference < result.verification.tolerance
    config = json.loads((tmp_path / "there" / "config.json").read_text())
    assert config["attn_res_norm_eps"] == 1e-6 and config["attn_res_sum_scale"] is False
    assert "Inkling 2" in (tmp_path / "there" / "README.md").read_text()
    model, inputs = AutoModelForCausalLM.from_pretrained(tmp_path / "there"), tokens()
    with torch.no_grad():
        assert relative(model(inputs).logits, donor(inputs).logits) < 1e-5
    convert_to_donor(tmp_path / "there", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes_of(in_module(tensors), tmp_path / "expected")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("src", "back"))
    assert before == after


def tensor_bytes_of(tensors, folder):
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    return tensor_bytes(folder)


def test_bad_inkling2(inkling2, tmp_path, capsys):
    """A query too few, too many or of a wrong shape, and a mode that the donor doesn't have."""
    (tmp_path / "src").mkdir()
    for name, content in tree(inkling2[0]).items():
        (tmp_path / "src" / name).write_bytes(content)
    tensors = in_module(load_file(tmp_path / "src" / "model.safetensors"))
    query = "model.layers.2.attention_input.query"
    wrong = {
        "reads 4 of 7 layers lack a query": {name: x for name, x in tensors.items() if name != query},
        "reads 0 of 7 layers have two": tensors | {"model.layers.0.attention_input.query": torch.ones(40)},
        "have two queries": tensors | {"model.attn_res.attn_queries.1": torch.ones(3, 40)},
        r"shape \(40,\); \(3, 40\) is expected": tensors | {query: torch.ones(40)},
        "several prefixes": tensors | {"final_input.query": torch.ones(40)},
    }
    for message, content in wrong.items():
        save_file(content, tmp_path / "src" / "model.safetensors", {"format": "pt"})
        assert message_of_a_refusal(tmp_path, capsys, message), message
    save_file(tensors, tmp_path / "src" / "model.safetensors", {"format": "pt"})
    assert message_of_a_refusal(tmp_path, capsys, "the checkpoint says itself", "--mode", "block")
    convert_checkpoint(tmp_path / "src", tmp_path / "there", verify=False)
    edit_json(tmp_path / "there" / "config.json", attn_res_norm_eps=1e-5)
    with pytest.raises(ConversionError, match="says block_inkling2, 1e-05"):
        convert_to_donor(tmp_path / "there", tmp_path / "back")
