# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Quantised models as `from_pretrained` makes them, and benchmarks/quantised.py, which measures them.

Bounds are those of the grids: a number is at most half a step away from the nearest number of its grid.
"""

import importlib.util
import json
import sys
from pathlib import Path

import peft
import pytest
import torch
from attnres_recipes.adapters import prepare_quantized
from families import attn_res_from_donor, perturb, relative_error, tiny_donor, tiny_model, tokens
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "scripts")]

import quantised  # noqa: E402
from pages import section  # noqa: E402


SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}  # groups of 64 columns
ROUTED = {"num_local_experts": 4}
SHAPES = {
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "qwen3": SIZES,
    "gemma3_text": SIZES,
    "mixtral": SIZES | ROUTED,
}
NF4_GAP = 0.304  # the widest between two neighbours of the 16 numbers, -1 and -0.696


def is_here(package: str | None) -> bool:
    return package is None or importlib.util.find_spec(package) is not None


def methods(*names: str):
    """Of the benchmark; what isn't installed is skipped."""
    return [
        pytest.param(
            name,
            marks=pytest.mark.skipif(
                not is_here(quantised.METHODS[name].package),
                reason=f"{quantised.METHODS[name].package} is not installed",
            ),
        )
        for name in names or quantised.METHODS
    ]


def half_step(method: str, weight: torch.Tensor) -> torch.Tensor:
    """How far a number of a matrix `(rows, columns)` may be off. Scales are rounded too, in int4 to bfloat16 and by
    LLM.int8 to float16."""
    groups = weight.unflatten(1, (-1, quantised.GROUP))
    largest = {
        "bf16": weight.abs() * 2**-8,
        "int4": ((groups.amax(-1) - groups.amin(-1)) / 15).repeat_interleave(quantised.GROUP, dim=1) / 2
        + weight.abs().amax() * 2**-7,  # before and after, in bfloat16
        "nf4": groups.abs().amax(-1).repeat_interleave(quantised.GROUP, dim=1) * NF4_GAP / 2,
    }
    return {"bnb-int8": 1.1, "int4": 1.1}.get(method, 1.01) * largest.get(
        method, weight.abs().amax(1, keepdim=True) / 127 / 2
    )


def stored_weight(method: str, linear: torch.nn.Linear) -> torch.Tensor:
    """The matrix of a layer as floats; one in int4 can't be turned into floats, but gives them times unit vectors."""
    if method == "int4":
        unit_vectors = torch.eye(linear.in_features, dtype=linear.weight.dtype)
        return (linear(unit_vectors) - (0 if linear.bias is None else linear.bias)).T.float()
    return linear.weight.float() if is_plain(linear) else dequantize_module_weight(linear)


def is_plain(linear: torch.nn.Linear) -> bool:
    return type(linear.weight.data) is torch.Tensor and linear.weight.is_floating_point()


@pytest.mark.parametrize("method", methods())
@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_what_is_quantised(family, method, tmp_path):
    """Linear layers are within half a step of what they were; depth attention, embeddings, heads, norms and experts
    are what they were, depth attention in float32 also in bfloat16."""
    model = tiny_model(family, **SHAPES[family])
    model.save_pretrained(tmp_path)
    loaded = quantised.load(tmp_path, quantised.METHODS[method])
    before, linear = dict(model.named_parameters()), 0
    for name, parameter in model.model.depth_attention.named_parameters():
        kept = loaded.model.depth_attention.get_parameter(name)
        assert type(kept.data) is torch.Tensor and kept.dtype == torch.float32 and torch.equal(kept, parameter)
    for name, module in loaded.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight, linear = before[f"{name}.weight"], linear + 1
            assert is_plain(module) == (method == "bf16"), name
            assert ((stored_weight(method, module) - weight).abs() <= half_step(method, weight)).all(), name
    assert linear == len(loaded.model.layers) * (4 if family == "mixtral" else 7)
    plain = {name: value for name, value in loaded.named_parameters() if type(value) is torch.nn.Parameter}
    plain = {name: value for name, value in plain.items() if type(value.data) is torch.Tensor}
    assert is_plain(loaded.lm_head) and loaded.lm_head.weight.dtype == quantised.METHODS[method].dtype
    for name, value in plain.items():
        dtype = torch.float32 if "depth_attention" in name else quantised.METHODS[method].dtype
        assert value.dtype == dtype and torch.equal(value, before[name].to(dtype)), name
    assert "model.embed_tokens.weight" in plain
    if family == "mixtral":
        assert {"model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.gate_up_proj"} <= plain.keys()


@pytest.mark.parametrize("method", methods("int8"))
@pytest.mark.parametrize("family", SHAPES)
@torch.no_grad()
def test_a_converted_model_is_the_quantised_donor(family, method, tmp_path):
    """With zero queries, quantised weights give what the donor's give."""
    donor = tiny_donor(family, **SHAPES[family])
    donor.save_pretrained(tmp_path / "donor")
    attn_res_from_donor(donor, block_size=2).save_pretrained(tmp_path / "attnres")
    logits = [
        quantised.load(tmp_path / name, quantised.METHODS[method])(tokens()).logits for name in ("donor", "attnres")
    ]
    assert relative_error(*logits) < 2e-5  # float32's rounding, which routers make larger
    assert relative_error(logits[0], donor(tokens()).logits) > 1e-4


@pytest.mark.parametrize("method", methods("int8", "int8-dynamic", "bnb-int8", "nf4"))
def test_saved_and_generated(method, tmp_path):
    """A quantised model is saved as safetensors, loads as it was, and generates."""
    tiny_model("llama", **SHAPES["llama"]).save_pretrained(tmp_path / "float")
    model = quantised.load(tmp_path / "float", quantised.METHODS[method])
    model.save_pretrained(tmp_path / "saved")
    assert {file.suffix for file in (tmp_path / "saved").iterdir()} == {".json", ".py", ".safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens()).logits, model(tokens()).logits)
        assert torch.equal(loaded.generate(tokens(), **options), model.generate(tokens(), **options))
    query = loaded.model.depth_attention.query
    assert query.dtype == torch.float32 and torch.equal(query, model.model.depth_attention.query)


@pytest.mark.parametrize("method", methods("int8", "bnb-int8", "nf4"))
def test_lora_on_a_quantised_model(method, tmp_path):
    """LoRA and depth attention beside it have gradients where they have them on the float model, and in 8 bits nearly
    the same ones."""
    tiny_model("llama", **SHAPES["llama"]).save_pretrained(tmp_path)
    found = []
    for chosen in (None, quantised.METHODS[method]):
        model = quantised.load(tmp_path, chosen)
        torch.manual_seed(0)
        config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["depth_attention"])
        adapted = peft.get_peft_model(prepare_quantized(model) if chosen else model, config).train()
        adapted(tokens(), labels=tokens()).loss.backward()
        named = {name: value.grad for name, value in adapted.named_parameters() if value.requires_grad}
        found.append({name: gradient for name, gradient in named.items() if gradient.any()})
    expected, gradients = found
    assert gradients.keys() == expected.keys() and sum("depth_attention" in name for name in expected) == 2
    angles = [torch.cosine_similarity(gradients[n].flatten(), expected[n].flatten(), 0).item() for n in expected]
    assert method == "nf4" or min(angles) > 0.8  # unrelated ones have 0, as in 4 bits those of so rough a model


@pytest.mark.parametrize("method", methods("int8", "nf4"))
def test_the_head_of_a_classifier_stays(method, tmp_path):
    tiny_model("llama", AutoModelForSequenceClassification, **SHAPES["llama"]).save_pretrained(tmp_path)
    options = {"quantization_config": quantised.METHODS[method].config(), "dtype": torch.float32}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path, **options)
    assert is_plain(loaded.score) and not is_plain(loaded.model.layers[0].mlp.up_proj)


@pytest.mark.parametrize("method", methods())
@torch.no_grad()
def test_grids(method):
    """Each number goes to the nearest of its row's grid, zeros stay, and what is on the grid stays."""
    values = torch.randn(5, 640, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0, 9, 0.01, 300, 0]]).T
    round_rows = quantised.METHODS[method].round_rows
    found = round_rows(values)
    step = {"int4": 1 / 7, "nf4": NF4_GAP}.get(method, 1 / 127)
    bound = values.abs() * 2**-8 if method == "bf16" else values.abs().amax(1, keepdim=True) * step / 2
    assert ((found - values).abs() <= 1.001 * bound).all() and not torch.equal(found, values)
    assert not found[4].any() and relative_error(round_rows(found), found) < 1e-6
    most = {"bf16": 640, "int4": 15, "nf4": 16}.get(method, 255)
    assert all(len(row.unique()) <= most for row in found)


@pytest.mark.parametrize("method", methods("int8", "int4", "bnb-int8", "nf4"))
@torch.no_grad()
def test_stored_bytes(method, tmp_path):
    """A matrix has a byte or half of one a number, and a scale, and maybe a zero, a row or group."""
    model = tiny_model("llama", **SHAPES["llama"], tie_word_embeddings=True)
    depth = sum(parameter.numel() for parameter in model.model.depth_attention.parameters())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert quantised.stored_bytes(model) == 4 * total
    model.save_pretrained(tmp_path)
    linear = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    numbers, rows = sum(w.numel() for w in linear), sum(len(w) for w in linear)
    groups = numbers // quantised.GROUP
    left = {"int8": numbers + 5 * rows, "int4": numbers // 2 + 4 * groups, "bnb-int8": numbers + 4 * rows}
    rest = (total - depth - numbers) * quantised.METHODS[method].dtype.itemsize + 4 * depth
    expected = rest + left.get(method, numbers // 2 + 4 * groups)
    assert quantised.stored_bytes(quantised.load(tmp_path, quantised.METHODS[method])) == expected


class Made:
    """A family of the benchmark whose models are made at once."""

    def __init__(self):
        self.made = []

    def make(self, model: str, folder: Path) -> Path:
        self.made.append(model)
        sizes = {**SHAPES["llama"], "vocab_size": 2048}
        made = perturb(tiny_donor("llama", **sizes)) if model == "donor" else tiny_model("llama", **sizes)
        made.save_pretrained(folder / model)
        AutoTokenizer.from_pretrained(quantised.TOKENIZER).save_pretrained(folder / model)
        return folder / model


def test_benchmark_resumes_and_reports(tmp_path, monkeypatch, capsys):
    """Cells that are there aren't measured again; the numbers are those of the models; the table has all of them."""
    family = Made()
    monkeypatch.setattr(quantised, "FAMILIES", {"llama": family})
    monkeypatch.setattr(quantised, "METHODS", {"bf16": quantised.METHODS["bf16"]})
    output = tmp_path / "results.json"
    options = ["--output", str(output), "--runs", str(tmp_path), "--sequences", "3", "--seq-len", "16"]
    quantised.main(options)
    results = json.loads(output.read_text())
    cells = {quantised.key(cell): cell for cell in results["cells"]}
    assert len(cells) == len(results["cells"]) == 8 and family.made == ["donor", "block", "full"]
    exact = cells["llama", "block", "float32", "float32"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "llama" / "block").eval()
    tokenizer = AutoTokenizer.from_pretrained(quantised.TOKENIZER)
    sequences = quantised.sequences_of(tokenizer, 3, 16)
    for sequence, nats in zip(sequences, exact["nats"], strict=True):
        assert nats == pytest.approx(model(sequence[None], labels=sequence[None]).loss.item(), rel=1e-5)
    for cell in cells.values():
        assert (cell["method"] == "float32") == (not any(cell["kl"])) and min(cell["kl"]) >= 0
    kept, rounded = (cells["llama", "block", "bf16", depth] for depth in ("float32", "rounded"))
    assert kept["kl"] != rounded["kl"] and kept["bytes"] == rounded["bytes"] < exact["bytes"]
    block = results["summary"][0]["block rounded"]
    assert block["kl"][0] == pytest.approx(sum(rounded["kl"]) / 3, rel=1e-6)
    assert block["kl"][1] <= block["kl"][0] <= block["kl"][2]
    text = output.with_suffix(".md").read_text()
    assert text in capsys.readouterr().out and text.count("| llama |") == 1 + 3 + 3

    results["cells"] = [cell for cell in results["cells"] if cell["model"] != "full"]
    results["cells"][0]["nats"] = [0.5, 0.5, 0.5]  # would be overwritten
    output.write_text(json.dumps(results))
    quantised.main(options)
    again = json.loads(output.read_text())
    assert family.made == ["donor", "block", "full", "full"]
    assert again["cells"][0]["nats"] == [0.5, 0.5, 0.5] and len(again["cells"]) == 8
    assert again["cells"][-1]["kl"] == cells["llama", "full", "bf16", "rounded"]["kl"]

    with pytest.raises(SystemExit, match="was made with .*; give another --output"):
        quantised.main([*options[:4], "--sequences", "4", "--seq-len", "16"])
    assert json.loads(output.read_text()) == again


def test_benchmark_refuses(tmp_path, monkeypatch):
    """Bad input, in one line and before anything is written."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="^quantised: torchao is needed for these --methods: pip install torchao$"):
        quantised.main(["--output", str(tmp_path / "results.json"), "--methods", "int8"])
    with pytest.raises(SystemExit) as exit:
        quantised.main(["--sequences", "1"])
    assert exit.value.code == 2 and not list(tmp_path.iterdir())


def nine_digits(value):
    """JSON without the last digits of its numbers, which differ by processor."""
    return json.loads(json.dumps(value), parse_float=lambda number: f"{float(number):.9g}")


def test_recorded_table():
    """The table of results/README.md is that of the recorded cells, complete for each family that has some."""
    results = json.loads(quantised.RESULTS.read_text(encoding="utf-8"))
    cells, rows = ([row for row in results[name] if row["family"] == "llama"] for name in ("cells", "summary"))
    assert nine_digits(quantised.summarise({"cells": cells})) == nine_digits(rows)
    assert len(rows) == len(quantised.METHODS)
    assert section(quantised.README, "quantised") == quantised.kl_table(results).rstrip()
    number = results["settings"]["sequences"]
    assert all(len(cell["nats"]) == len(cell["kl"]) == number for cell in results["cells"])
    for family in {cell["family"] for cell in results["cells"]}:
        for model in quantised.MODELS:
            assert not quantised.missing_cells(family, model, list(quantised.METHODS), results)
