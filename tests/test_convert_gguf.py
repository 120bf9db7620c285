# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""GGUF files convert to what they were written from, tokenizer and all, and whatever isn't one is refused in a line."""

import json
import math
import os
import struct

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint
from attnres_convert.cli import main
from attnres_convert.gguf_donor import ARCHITECTURES as READ
from attnres_convert.gguf_file import read_gguf
from convert_models import relative, tensor_bytes, tokens, tree
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401  registers the classes


gguf = pytest.importorskip("gguf")
from gguf_models import ARCHITECTURES, CHAT_TEMPLATE, write_gguf  # noqa: E402  needs it


TEXTS = ("hello world", "def f(x):\n\treturn 12345  # naïve 日本", "<|im_start|>user\nhello<|im_end|>\n", "  hell o ")


def agrees(folder, model):
    """How far the model in a folder is from another, by the largest logit."""
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    inputs = tokens(model, length=40)
    with torch.no_grad():
        return relative(found(inputs).logits, model(inputs).logits)


@pytest.mark.parametrize("arch", READ)
def test_float_file_gives_the_model_that_it_was_written_from(arch, tmp_path):
    model = write_gguf(tmp_path / "m.gguf", arch)
    result = convert_checkpoint(tmp_path / "m.gguf", tmp_path / "converted", block_size=2)
    assert result.warnings == ()
    assert result.verification.relative_difference <= result.verification.tolerance
    assert agrees(tmp_path / "converted", model) < 2e-6
    model.save_pretrained(tmp_path / "float")
    expected, found = tensor_bytes(tmp_path / "float"), tensor_bytes(tmp_path / "converted")
    assert expected.keys() == {name for name in found if "depth_attention" not in name}
    # norms of Gemma are stored as 1 + w, which rounds
    exact = [name for name in expected if not (arch.startswith("gemma") and name.endswith("norm.weight"))]
    assert {name: expected[name] for name in exact} == {name: found[name] for name in exact}


SCALINGS = {
    "linear": ("llama", {"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}),
    "yarn": (
        "qwen2",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {"type": "yarn", "factor": 4.0, "original_context_length": 16},
    ),
    "llama3": (
        "llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
        {},
    ),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 16,
            "partial_rotary_factor": 0.8,
        },
        {"original_context_length": 16},
    ),
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scaling_comes_along(kind, tmp_path):
    arch, rope, scaling = SCALINGS[kind]
    options = {"rope_parameters": {"rope_theta": 1000.0, **rope}, "max_position_embeddings": 64}
    fields, extra = {f"{arch}.rope.scaling.{name}": value for name, value in scaling.items()}, {}
    if kind == "llama3":
        model = write_gguf(tmp_path / "plain.gguf", arch, **options)
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        plain = 1000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        extra["rope_freqs.weight"] = plain / model.model.rotary_emb.inv_freq
    if kind == "longrope":
        options |= {"original_max_position_embeddings": 16, "partial_rotary_factor": 0.8}
        fields |= {
            "phi3.rope.dimension_count": 8,
            "phi3.rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(16)),
        }
        extra = {f"rope_factors_{x}.weight": torch.tensor(rope[f"{x}_factor"]) for x in ("short", "long")}
    model = write_gguf(tmp_path / "m.gguf", arch, fields=fields, tensors=extra, **options)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "converted")
    assert agrees(tmp_path / "converted", model) < 3e-6
    plain = write_gguf(tmp_path / "plain.gguf", arch, rope_parameters={"rope_theta": 1000.0, "rope_type": "default"})
    assert agrees(tmp_path / "converted", plain) > 1e-3


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "BF16", "F16"])
def test_quantised_file_gives_what_the_gguf_package_reads(kind, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
    write_gguf(tmp_path / "m.gguf", "qwen2", gguf.GGMLQuantizationType[kind], **sizes)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "converted", block_size=2)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    stored = {tensor.name: torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)) for tensor in reader.tensors}
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").state_dict()
    dtype = torch.float32 if kind == "F16" else torch.bfloat16
    for name, other in {
        "mlp.down_proj": "ffn_down",
        "self_attn.k_proj": "attn_k",
        "self_attn.q_proj": "attn_q",
    }.items():
        assert torch.equal(found[f"model.layers.3.{name}.weight"], stored[f"blk.3.{other}.weight"].to(dtype))
    made = json.loads((tmp_path / "converted" / "results.json").read_text())["dequantized"]
    assert made["quantization"] == kind
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["dtype"] == str(dtype).removeprefix("torch.")
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path", "gguf_file"} & config.keys()
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "wide", block_size=2, dtype="float32", verify=False)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "wide").state_dict()
    assert torch.equal(found["model.layers.3.mlp.down_proj.weight"], stored["blk.3.ffn_down.weight"].float())


@pytest.mark.parametrize(
    ("arch", "sentencepiece"), [("llama", False), ("llama", True), ("gemma3", True), ("phi3", True), ("qwen2", False)]
)
def test_tokenizer_template_and_generation_come_along(arch, sentencepiece, tmp_path):
    write_gguf(tmp_path / "m.gguf", arch, sentencepiece=sentencepiece)
    convert_checkpoint(tmp_path / "m.gguf", tmp_path / "converted")
    stored = AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    found = AutoTokenizer.from_pretrained(tmp_path / "converted")
    found.save_pretrained(tmp_path / "again")
    again = AutoTokenizer.from_pretrained(tmp_path / "again")
    for text in TEXTS:
        ids = stored(text)["input_ids"]
        assert found(text)["input_ids"] == again(text)["input_ids"] == ids
        assert found.decode(ids) == stored.decode(ids)
    assert found.chat_template == again.chat_template == CHAT_TEMPLATE
    assert found.special_tokens_map == again.special_tokens_map == stored.special_tokens_map
    chat = found.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert chat == "<|im_start|>user\nhello<|im_end|>\n"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (2, 0)
    text = (tmp_path / "converted" / "tokenizer_config.json").read_text()
    assert str(tmp_path) not in text and "gguf" not in text
    card = (tmp_path / "converted" / "README.md").read_text()
    assert "license: apache-2.0" in card and f"from `m.gguf`, GGUF of the architecture {arch}" in card


def test_a_file_without_tokenizer_converts_and_says_so(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", tokenizer=False)
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "converted")]) == 0
    assert "warning: m.gguf holds no tokenizer" in capsys.readouterr().err
    assert not (tmp_path / "converted" / "tokenizer.json").exists()


def test_folders_and_names(tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "README.md").write_text("---\nlicense: mit\nbase_model: organisation/model\n---\n# A card\n")
    (folder / "LICENSE").write_text("terms")
    model = write_gguf(folder / "a.gguf")
    convert_checkpoint(folder, tmp_path / "only")
    write_gguf(folder / "sub" / "b.gguf", "qwen2")
    os.symlink(folder / "a.gguf", tmp_path / "link.gguf")
    convert_checkpoint(folder, tmp_path / "a choice", gguf_file="sub/b.gguf", verify=False)
    command = json.loads((tmp_path / "a choice" / "results.json").read_text())["command"]
    assert command.startswith("attnres-convert folder 'a choice' ") and " --gguf-file sub/b.gguf " in command
    assert json.loads((tmp_path / "a choice" / "config.json").read_text())["model_type"] == "attnres_qwen2"
    convert_checkpoint(tmp_path / "link.gguf", tmp_path / "linked", verify=False)
    assert tensor_bytes(tmp_path / "linked") == tensor_bytes(tmp_path / "only")
    assert agrees(tmp_path / "only", model) < 2e-6
    assert (tmp_path / "only" / "LICENSE").read_text() == "terms"
    card = (tmp_path / "only" / "README.md").read_text()
    assert "license: mit" in card and "base_model: organisation/model" in card
    os.link(folder / "a.gguf", folder / "c.gguf")
    os.symlink("/etc/passwd", folder / "leaves")
    capsys.readouterr()
    before = tree(tmp_path)
    for arguments, expected in {
        (): "holds several GGUF files; choose one with --gguf-file: a.gguf, c.gguf",
        ("--gguf-file", "../link.gguf"): "is no name of a file inside SRC",
        ("--gguf-file", "/etc/passwd"): "is no name of a file inside SRC",
        ("--gguf-file", "leaves"): "is a link that leaves the folder",
        ("--gguf-file", "d.gguf"): "has no file d.gguf; it has a.gguf",
        ("--gguf-file", "a.gguf", "--link"): "leave out --link",
        ("--gguf-file", "a.gguf", "--revision", "main"): "a revision needs a Hub id",
    }.items():
        assert main([str(folder), str(tmp_path / "new"), *arguments]) == 1
        error = capsys.readouterr().err
        assert expected in error and error.count("\n") == 1, error
    with pytest.raises(ConversionError, match="must be one of bfloat16, float32"):
        convert_checkpoint(folder, tmp_path / "new", gguf_file="a.gguf", dtype="float16")
    with pytest.raises(ConversionError, match="a dtype is for GGUF files only"):
        convert_checkpoint(tmp_path / "only", tmp_path / "new", dtype="float32")
    assert tree(tmp_path) == before


def patched(data: bytes, name: str, code: str, value) -> bytes:
    """A file in which the number behind a field's name and type is another one."""
    start = data.index(name.encode()) + len(name) + 4
    return data[:start] + struct.pack(f"<{code}", value) + data[start + struct.calcsize(f"<{code}") :]


def test_what_is_no_sound_file_is_refused_in_a_line_and_leaves_nothing(tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf")
    good = (tmp_path / "m.gguf").read_bytes()
    header = read_gguf(tmp_path / "m.gguf", "m.gguf")
    first = min(tensor.start for tensor in header.tensors.values())
    array = good.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    cases = {
        b"": "this is no GGUF file",
        b"GGU": "this is no GGUF file",
        b"PK\x03\x04" + good[4:]: "this is no GGUF file",
        b"GGUF\x00\x00\x00\x03" + good[8:]: "big-endian",
        good[:4] + struct.pack("<I", 9) + good[8:]: "of version 9",
        good[:8] + struct.pack("<Q", 2**60) + good[16:]: "tensors)",
        good[:16] + struct.pack("<Q", 2**60) + good[24:]: "fields and",
        good[:array] + struct.pack("<Q", 2**50) + good[array + 8 :]: "entries",
        good[:array] + struct.pack("<Q", 3_999_999) + good[array + 8 :]: "damaged or incomplete",
        good[:1000]: "it ends in its header",
        good[:first]: "is cut off",
        good[:-1]: "is cut off",
        patched(good, "llama.block_count", "I", 2**31): "says that it has 2147483648 layers",
        patched(good, "llama.block_count", "I", 4): "weights where",
        patched(good, "llama.embedding_length", "I", 2**30): "weights where",
        patched(good, "llama.feed_forward_length", "I", 2**31): "weights where",
        patched(good, "llama.attention.head_count", "I", 0): "not valid",
        patched(good, "llama.attention.head_count", "I", 3): "",
        patched(good, "llama.vocab_size", "I", 2**31): "weights where",
        patched(good, "tokenizer.ggml.bos_token_id", "I", 10**6): "tokenizer",
        patched(good, "llama.rope.freq_base", "f", float("nan")): "rope.freq_base is nan",
        good.replace(b"general.architecture", b"general.archilecture"): "doesn't say its architecture",
    }
    (tmp_path / "bad").mkdir()
    for number, (content, expected) in enumerate(cases.items()):
        path = tmp_path / "bad" / f"{number}.gguf"
        path.write_bytes(content)
        assert main([str(path), str(tmp_path / "new")]) == 1, (number, expected)
        error = capsys.readouterr().err
        assert error.startswith("error: ") and expected in error and error.count("\n") == 1, (number, expected, error)
        assert sorted(x.name for x in tmp_path.iterdir()) == ["bad", "m.gguf"], number


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"arch": "gpt-oss"}, "of the architecture gpt-oss aren't read"),
        ({"fields": {"general.type": "adapter"}}, "is no model but adapter"),
        ({"fields": {"split.count": 3}}, "llama-gguf-split --merge"),
        ({"fields": {"llama.expert_count": 8}}, "Mixtral"),
        ({"fields": {"llama.rope.scaling.type": "novel"}}, "scales its positions by 'novel'"),
        ({"fields": {"llama.rope.dimension_count": 4}}, "rotates 4 of 10 channels"),
        ({"tensors": {"blk.0.new.weight": torch.zeros(40)}}, "weights where"),
        ({"tensors": {"blk.0.attn_q.weight": torch.zeros(40)}}, "weights where"),
        ({"tensors": {"blk.0.attn_q.weight": torch.zeros(20, 80)}}, "transformers"),
        ({"tensors": {"rope_freqs.weight": torch.ones(3)}}, "rotary factors"),
        ({"tensors": {"rope_freqs.weight": -torch.ones(5)}}, "isn't positive"),
    ],
)
def test_what_would_be_read_wrongly_is_refused(options, expected, tmp_path, capsys):
    write_gguf(tmp_path / "m.gguf", **options)
    assert main([str(tmp_path / "m.gguf"), str(tmp_path / "new")]) == 1
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1, error
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_memory_and_disk_are_asked_for_first(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    with monkeypatch.context() as patch:
        patch.setattr("attnres_convert.gguf_donor.available_memory", lambda: 1000)
        with pytest.raises(ConversionError, match="GB of memory to read m.gguf"):
            convert_checkpoint(tmp_path / "m.gguf", tmp_path / "new")
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ConversionError, match="not enough disk space"):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_missing_package_is_named(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ConversionError, match=r"pip install 'attnres\[gguf\]'"):
        convert_checkpoint(tmp_path / "m.gguf", tmp_path / "new")


def test_every_tiny_architecture_is_read_or_refused():
    assert set(READ) | {"gpt-oss"} == set(ARCHITECTURES)
