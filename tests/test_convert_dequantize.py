# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are stored quantised become floats: the numbers that transformers and bitsandbytes compute with."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor, dequantization, dequantize_checkpoint
from attnres_convert.cli import main
from convert_models import edit_json, relative, save_donor, tensor_bytes, tokens, tree
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, FineGrainedFP8Config, Mxfp4Config


SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "vocab_size": 67}
BLOCK = 16


def write_mxfp4(folder):
    """As gpt-oss is published; the experts hold all sixteen values, at several scales."""
    sizes = {**SIZES, "intermediate_size": 64, "num_local_experts": 4}
    save_donor(folder, "gpt_oss", dtype=torch.bfloat16, **sizes)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape, options = (experts, outputs, inputs // 32), {"generator": generator, "dtype": torch.uint8}
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), **options)
        tensors[f"{name}_scales"] = torch.randint(118, 122, shape, **options)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})


def write_fp8(folder, family="llama", shard_size=None, **sizes):
    """Matrices of the layers in blocks of fp8, with float32 scales."""
    save_donor(folder, family, dtype=torch.bfloat16, **{**SIZES, "num_key_value_heads": 4, **sizes})
    tensors, generator = {}, torch.Generator().manual_seed(0)
    for name, tensor in load_file(folder / "model.safetensors").items():
        tensors[name] = tensor
        if name.endswith("_proj.weight"):
            rows, columns = (-(-size // BLOCK) for size in tensor.shape)
            tensors[name] = tensor.float().div(0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = torch.rand(rows, columns, generator=generator) / 500 + 0.009
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quantization = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    edit_json(folder / "config.json", quantization_config=quantization)
    return tensors


def assert_plain(folder, dtype):
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == dtype
    made = json.loads((folder / "results.json").read_text())["dequantized"]
    assert made["dtype"] == dtype and f"({made['quantization']})" in (folder / "README.md").read_text()
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("write", "config"), [(write_mxfp4, Mxfp4Config), (write_fp8, FineGrainedFP8Config)], ids=["mxfp4", "fp8"]
)
def test_the_numbers_are_those_that_transformers_makes(write, config, dtype, tmp_path):
    write(tmp_path / "src")
    (tmp_path / "src" / "tokenizer_config.json").write_text('{"model_max_length": 7}')
    (tmp_path / "src" / "LICENSE").write_text("terms")
    stored = json.loads((tmp_path / "src" / "config.json").read_text())["quantization_config"]
    options = {name: value for name, value in stored.items() if name != "quant_method"}
    expected = AutoModelForCausalLM.from_pretrained(
        tmp_path / "src", dtype=getattr(torch, dtype), quantization_config=config(**options, dequantize=True)
    ).state_dict()
    assert main(["--dequantize", dtype, str(tmp_path / "src"), str(tmp_path / "dst")]) == 0
    found = assert_plain(tmp_path / "dst", dtype).state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name].to(expected[name].dtype)) for name in expected)
    assert (tmp_path / "dst" / "LICENSE").read_text() == "terms" and (
        tmp_path / "dst" / "tokenizer_config.json"
    ).exists()
    convert_checkpoint(tmp_path / "dst", tmp_path / "attnres")
    convert_to_donor(tmp_path / "attnres", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "dst")


def test_blocks_that_the_edge_cuts_off(tmp_path):
    """Sizes that no block divides, for which a division of sizes would find blocks of another size."""
    tensors = write_fp8(tmp_path / "src", hidden_size=72, intermediate_size=104)
    dequantize_checkpoint(tmp_path / "src", tmp_path / "dst", dtype="float32")
    found = load_file(tmp_path / "dst" / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    scales = tensors[f"{name}_scale_inv"].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    assert torch.equal(found[name], tensors[name].float() * scales[:72, :104])
    assert not any(other.endswith("_scale_inv") for other in found)
    norm = "model.layers.1.input_layernorm.weight"
    assert found[norm].dtype == torch.bfloat16 and torch.equal(found[norm], tensors[norm])


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
    ids=["nf4-nested", "nf4", "fp4", "int8"],
)
def test_bitsandbytes(options, tmp_path):
    pytest.importorskip("bitsandbytes")
    dequantize_module_weight = pytest.importorskip("peft.utils.integrations").dequantize_module_weight
    save_donor(tmp_path / "float", **{**SIZES, "hidden_size": 128, "intermediate_size": 128, "num_key_value_heads": 4})
    quantized = AutoModelForCausalLM.from_pretrained(
        tmp_path / "float", quantization_config=BitsAndBytesConfig(**options), dtype=torch.float32, device_map="cpu"
    )
    quantized.save_pretrained(tmp_path / "src")
    modules = {name: module for name, module in quantized.named_modules() if hasattr(module, "weight")}
    # before the first forward, which packs them anew
    weights = {f"{name}.weight": dequantize_module_weight(module).float() for name, module in modules.items()}
    inputs = tokens(quantized)
    with torch.no_grad():
        expected = quantized(inputs).logits.float()
    dequantize_checkpoint(tmp_path / "src", tmp_path / "dst", dtype="float32")
    found = assert_plain(tmp_path / "dst", "float32")
    for name, tensor in weights.items():
        assert torch.allclose(found.state_dict()[name], tensor, rtol=5e-3, atol=1e-6), name  # a bfloat16 may be between
    with torch.no_grad():
        # on a CPU it computes in bfloat16, in 8 bits with rounded activations
        assert relative(found(inputs).logits, expected) < (0.2 if "load_in_8bit" in options else 0.1)
    assert convert_checkpoint(tmp_path / "dst", tmp_path / "attnres").verification is not None


def test_a_quantised_attnres_model_stays_one(tmp_path):
    write_fp8(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "packed")
    dequantize_checkpoint(tmp_path / "packed", tmp_path / "dst")
    dequantize_checkpoint(tmp_path / "src", tmp_path / "plain")
    model = assert_plain(tmp_path / "dst", "bfloat16")
    assert type(model).__name__ == "AttnResForCausalLM" and (tmp_path / "dst" / "modeling_attnres.py").exists()
    convert_to_donor(tmp_path / "dst", tmp_path / "back")
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "plain")


def test_shards(tmp_path, monkeypatch):
    """Scales may lie in another shard than their weights; the result has shards of its own, and an index."""
    tensors = write_fp8(tmp_path / "src")
    dequantize_checkpoint(tmp_path / "src", tmp_path / "one")
    parts = {
        "model-00001-of-00002.safetensors": {k: v for k, v in tensors.items() if not k.endswith("_scale_inv")},
        "model-00002-of-00002.safetensors": {k: v for k, v in tensors.items() if k.endswith("_scale_inv")},
    }
    for name, part in parts.items():
        save_file(part, tmp_path / "src" / name, {"format": "pt"})
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (tmp_path / "src" / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "src" / "model.safetensors").unlink()
    monkeypatch.setattr(dequantization, "SHARD_SIZE", 40_000)
    dequantize_checkpoint(tmp_path / "src", tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    assert tensor_bytes(tmp_path / "many") == tensor_bytes(tmp_path / "one")
    assert_plain(tmp_path / "many", "bfloat16")


MEASURE = """
import resource, sys
from attnres_convert import dequantization, dequantize_checkpoint
dequantization.SHARD_SIZE = 16 * 2**20
dequantize_checkpoint(sys.argv[1], sys.argv[2], dtype="float32")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
dequantize_checkpoint(sys.argv[3], sys.argv[4], dtype="float32")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
@pytest.mark.slow
def test_memory_is_bounded_by_a_shard(tmp_path):
    """One sixteenth of the floats, and the largest tensor, are in memory; loading would take all."""
    write_fp8(tmp_path / "small")
    write_fp8(tmp_path / "src", hidden_size=512, intermediate_size=2048, num_hidden_layers=16, vocab_size=512)
    names = [tmp_path / name for name in ("small", "warm", "src", "dst")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *names], capture_output=True, text=True, check=True)
    size = sum(path.stat().st_size for path in (tmp_path / "dst").glob("*.safetensors"))
    assert size > 250e6
    assert int(done.stdout) * 1024 < 80e6, (done.stdout, size)


def test_gguf_becomes_the_float_donor(tmp_path):
    write_gguf = pytest.importorskip("gguf_models").write_gguf
    model = write_gguf(tmp_path / "m.gguf")
    assert main(["--dequantize", str(tmp_path / "m.gguf"), str(tmp_path / "dst")]) == 0
    model.save_pretrained(tmp_path / "float")
    assert tensor_bytes(tmp_path / "dst") == tensor_bytes(tmp_path / "float")
    assert_plain(tmp_path / "dst", "float32")
    assert (tmp_path / "dst" / "tokenizer.json").exists()
    convert_checkpoint(tmp_path / "dst", tmp_path / "attnres")
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "direct")
    assert tensor_bytes(tmp_path / "attnres") == tensor_bytes(tmp_path / "direct")


def damaged(tensors: dict, kind: str) -> dict:
    name = "model.layers.1.mlp.down_proj.weight"
    scales = tensors[f"{name}_scale_inv"]
    changes = {
        "lost scales": {f"{name}_scale_inv": None},
        "lost weights": {name: None},
        "too few scales": {f"{name}_scale_inv": scales[:1].clone()},
        "other sizes": {name: tensors[name][:48].clone()},
    }[kind]
    return {key: value for key, value in (tensors | changes).items() if value is not None}


@pytest.mark.parametrize("kind", ["lost scales", "lost weights", "too few scales", "other sizes"])
def test_damaged_checkpoints_leave_nothing(kind, tmp_path, capsys):
    tensors = write_fp8(tmp_path / "src")
    save_file(damaged(tensors, kind), tmp_path / "src" / "model.safetensors", {"format": "pt"})
    before = tree(tmp_path)
    assert main(["--dequantize", str(tmp_path / "src"), str(tmp_path / "dst")]) == 1
    error = capsys.readouterr().err
    assert "down_proj" in error and error.count("error: ") == 1 and "Traceback" not in error
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "lie", [{"shape": [10**6, 10**6]}, {"blocksize": 2**30}, {"blocksize": 1}, {"shape": [64, 65]}]
)
def test_bitsandbytes_believes_no_lie(lie, tmp_path):
    """Its code reads as many scales as it is told that there are."""
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(torch.randn(64, 64), quant_type="nf4")
    parts = state.as_dict(packed=True)
    key = next(name for name in parts if "quant_state" in name)
    content = {**json.loads(bytes(parts[key].tolist())), **lie}
    parts[key] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    with pytest.raises(ValueError, match="its scales don't fit|it is stored as"):
        dequantization._turn_4bit({"weight": packed, **parts}, torch.float32, {})


def test_refusals(tmp_path, capsys, monkeypatch):
    write_fp8(tmp_path / "src")
    save_donor(tmp_path / "float")
    shutil.copytree(tmp_path / "float", tmp_path / "gptq")
    edit_json(tmp_path / "gptq" / "config.json", quantization_config={"quant_method": "gptq"})
    before = tree(tmp_path)
    capsys.readouterr()
    for arguments, expected in {
        ("float",): "isn't quantised",
        ("gptq",): "quantised as gptq aren't dequantised here",
        ("src", "--mode", "full"): "leave out --mode",
        ("src", "--block-size", "0"): "leave out --block-size",
        ("src", "--link"): "leave out --link",
        ("src", "--to-donor"): "leave out --to-donor",
        ("src", "--dtype", "float32"): "takes the dtype itself",
        ("src", "--gguf-file", "m.gguf"): "has no file m.gguf",
    }.items():
        name, *more = arguments
        assert main(["--dequantize", str(tmp_path / name), str(tmp_path / "dst"), *more]) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    with pytest.raises(ConversionError, match="must be one of bfloat16, float32"):
        dequantize_checkpoint(tmp_path / "src", tmp_path / "dst", dtype="int8")
    edit_json(tmp_path / "gptq" / "config.json", quantization_config={"load_in_4bit": True})
    monkeypatch.setattr(dequantization, "find_spec", lambda name: None)
    with pytest.raises(ConversionError, match="pip install bitsandbytes"):
        dequantize_checkpoint(tmp_path / "gptq", tmp_path / "dst")
    assert {name: data for name, data in tree(tmp_path).items() if name != "gptq/config.json"} == {
        name: data for name, data in before.items() if name != "gptq/config.json"
    }
