# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Every bad input is refused with one clear line, and leaves nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from attnres_convert import ConversionError, convert_checkpoint
from attnres_convert.cli import main
from convert_models import edit_json, save_donor, tree, write_sparse_donor
from safetensors.torch import load_file, save_file
from transformers import BertConfig, T5Config


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
    folder = tmp_path_factory.mktemp("donor") / "donor"
    save_donor(folder, num_hidden_layers=3, shard_size="20KB")
    return folder


@pytest.fixture
def src(donor, tmp_path):
    return shutil.copytree(donor, tmp_path / "src")


def refused(capsys, tmp_path, *arguments):
    """The message of a refused conversion of `src` to `dst`, after the checks that hold for all of them."""
    before = tree(tmp_path)
    code = main([str(tmp_path / "src"), str(tmp_path / "dst"), *arguments])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and len(captured.err) <= 308
    assert captured.out == ""
    assert tree(tmp_path) == before
    assert not (tmp_path / "dst").exists()
    return captured.err


def shards(src):
    return sorted(src.glob("*.safetensors"))


def truncate(src):
    os.truncate(shards(src)[1], shards(src)[1].stat().st_size - 8)


def truncate_header(src):
    os.truncate(shards(src)[1], 20)


def garbage(src):
    shards(src)[1].write_bytes(os.urandom(4096))


def empty_shard(src):
    shards(src)[1].write_bytes(b"")


def overlap(src):
    """A header that is JSON but puts one tensor on top of another."""
    content = shards(src)[1].read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    for info in header.values():
        if "data_offsets" in info:
            size = info["data_offsets"][1] - info["data_offsets"][0]
            info["data_offsets"] = [0, size]
    text = json.dumps(header).encode().ljust(length)
    shards(src)[1].write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def missing_shard(src):
    shards(src)[1].unlink()


def no_weights(src):
    for path in [*shards(src), src / "model.safetensors.index.json"]:
        path.unlink()


def pickle_only(src):
    no_weights(src)
    torch.save({"x": torch.ones(2)}, src / "pytorch_model.bin")


def broken_config(src):
    (src / "config.json").write_text('{"model_type": "llama",')


def broken_generation_config(src):
    (src / "generation_config.json").write_text("{")


def config_list(src):
    (src / "config.json").write_text("[1, 2]")


def binary_config(src):
    (src / "config.json").write_bytes(b"\xff\xfe\x00")


def missing_config(src):
    (src / "config.json").unlink()


def adapter(src):
    (src / "config.json").rename(src / "adapter_config.json")


def model_and_adapter(src):
    (src / "adapter_config.json").write_text('{"peft_type": "LORA"}')


def prefixed(prefix):
    """As a checkpoint of a wrapped module has it."""

    def damage(src):
        for path in shards(src):
            save_file({f"{prefix}{name}": tensor for name, tensor in load_file(path).items()}, path)
        index = json.loads((src / "model.safetensors.index.json").read_text())
        weight_map = {f"{prefix}{name}": file for name, file in index["weight_map"].items()}
        edit_json(src / "model.safetensors.index.json", weight_map=weight_map)

    return damage


def broken_index(src):
    (src / "model.safetensors.index.json").write_text("{")


def index_without_map(src):
    edit_json(src / "model.safetensors.index.json", weight_map=...)


def index_to(target):
    def damage(src):
        index = json.loads((src / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = target.format(parent=src.parent)
        (src / "model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def outside_shard(target):
    def damage(src):
        save_file({"lm_head.weight": torch.ones(2)}, src.parent / "outside.safetensors")
        index_to(target)(src)

    return damage


def index_to_wrong_tensor(src):
    index = json.loads((src / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.layers.0.self_attn.nothing.weight"] = index["weight_map"]["lm_head.weight"]
    (src / "model.safetensors.index.json").write_text(json.dumps(index))


def tensor_twice(src):
    index = json.loads((src / "model.safetensors.index.json").read_text())
    first = dict(index["weight_map"])
    name = next(name for name, file in first.items() if file != first["lm_head.weight"])
    save_file({name: torch.ones(2), "x": torch.ones(2)}, src / "twice.safetensors")
    index["weight_map"]["x"] = "twice.safetensors"
    (src / "model.safetensors.index.json").write_text(json.dumps(index))


def config_says(**changes):
    return lambda src: edit_json(src / "config.json", **changes)


def encoder(config_class):
    return lambda src: config_class().save_pretrained(src)


BAD_INPUTS = {
    "truncated": (truncate, "damaged"),
    "truncated header": (truncate_header, "damaged"),
    "garbage": (garbage, "damaged"),
    "empty": (empty_shard, "damaged"),
    "overlap": (overlap, "damaged"),
    "missing shard": (missing_shard, "doesn't have"),
    "no weights": (no_weights, "neither model.safetensors nor"),
    "pickle": (pickle_only, r"only pickle files.*save_pretrained"),
    "broken config": (broken_config, "not valid JSON"),
    "config is a list": (config_list, "JSON object"),
    "binary config": (binary_config, "no UTF-8 text"),
    "missing config": (missing_config, "config.json is missing"),
    "adapter": (adapter, "merge"),
    "model and adapter": (model_and_adapter, r"holds a model and an adapter.*merge_and_unload.*adapter_config\.json"),
    "compiled": (prefixed("_orig_mod."), r"begin with '_orig_mod\.'.* strip it"),
    "distributed": (prefixed("module."), r"begin with 'module\.'.* strip it"),
    "peft": (prefixed("base_model.model."), r"begin with 'base_model\.model\.'.* strip it"),
    "language model": (prefixed("language_model."), r"begin with 'language_model\.'.* strip it"),
    "kernel": (config_says(attn_implementation="evil/kernel"), "attn_implementation names code of the Hub"),
    "experts": (
        config_says(experts_implementation={"": "evil/kernel"}),
        "experts_implementation names code of the Hub",
    ),
    "other weights": (config_says(transformers_weights="x.safetensors"), "transformers_weights; remove it"),
    "generation config": (broken_generation_config, r"generation_config\.json is not valid JSON"),
    "broken index": (broken_index, "not valid JSON"),
    "index without map": (index_without_map, "no weight_map"),
    "index relative": (outside_shard("../outside.safetensors"), "outside the folder"),
    "index absolute": (outside_shard("{parent}/outside.safetensors"), "outside the folder"),
    "index other file": (index_to("config.json"), "not a safetensors file"),
    "index wrong tensor": (index_to_wrong_tensor, "doesn't"),
    "tensor in two shards": (tensor_twice, "two shards"),
    "fewer layers": (config_says(num_hidden_layers=2), r"disagrees.*layers\.2"),
    "more layers": (config_says(num_hidden_layers=4), r"disagrees.*layers\.3"),
    "width": (config_says(hidden_size=48), r"disagrees"),
    "mlp width": (config_says(intermediate_size=60), r"disagrees.*mlp"),
    "vocabulary": (config_says(vocab_size=68), r"disagrees.*(embed_tokens|lm_head)"),
    "no layers": (config_says(num_hidden_layers=0), "config"),
    "layers as text": (config_says(num_hidden_layers="three"), "num_hidden_layers must be a whole number"),
    "heads": (config_says(num_key_value_heads=3), "disagrees"),
    "no model_type": (config_says(model_type=...), r"no model_type.*supported families: .*llama"),
    "unknown": (config_says(model_type="nonesuch"), r"the family is unknown.*supported families: .*llama"),
    "gpt2": (config_says(model_type="gpt2"), r"the family is unknown.*supported families: .*llama"),
    "olmo2": (config_says(model_type="olmo2"), r"without a norm.*supported families: .*llama"),
    "olmo3": (config_says(model_type="olmo3"), r"without a norm.*supported families: .*llama"),
    "exaone4": (config_says(model_type="exaone4"), r"without a norm.*supported families: .*llama"),
    "cohere": (config_says(model_type="cohere"), r"same input.*supported families: .*llama"),
    "cohere2": (config_says(model_type="cohere2"), r"same input.*supported families: .*llama"),
    "encoder": (encoder(BertConfig), r"is or has an encoder.*supported families: .*llama"),
    "encoder-decoder": (encoder(T5Config), r"encoder-decoder.*supported families: .*llama"),
    "architecture": (config_says(architectures=["LlamaForWhatever"]), r"LlamaForWhatever.*LlamaForCausalLM"),
}


@pytest.mark.parametrize("damage,message", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_bad_inputs(src, tmp_path, capsys, damage, message):
    """The message says what is wrong, in the terms of the input."""
    damage(src)
    found = refused(capsys, tmp_path, "--no-verify")
    assert re.search(message, found, re.DOTALL), found


def test_disk_space_is_checked_before(tmp_path, capsys):
    """A checkpoint of 4 TB, without contents, is refused before anything is written."""
    write_sparse_donor(tmp_path / "src", vocab_size=2**30)
    assert main([str(tmp_path / "src"), str(tmp_path / "dst"), "--no-verify"]) == 1
    assert re.search(r"not enough disk space in .* are needed and .* are free", capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_checkpoint_that_is_attnres_already(src, tmp_path, capsys):
    convert_checkpoint(src, tmp_path / "attnres", verify=False)
    src.rename(tmp_path / "donor")
    (tmp_path / "attnres").rename(src)
    assert "already" in refused(capsys, tmp_path)


OPTIONS = {
    "size and number": (["--block-size", "2", "--num-blocks", "2"], "not both"),
    "full with size": (["--mode", "full", "--block-size", "2"], "full mode has no blocks"),
    "full with number": (["--mode", "full", "--num-blocks", "2"], "full mode has no blocks"),
    "back with mode": (["--to-donor", "--mode", "full"], "leave out --mode"),
    "back with size": (["--to-donor", "--block-size", "1"], "leave out --block-size"),
    "back with number": (["--to-donor", "--num-blocks", "1"], "leave out --num-blocks"),
    "size 0": (["--block-size", "0"], "from 1 to 3"),
    "size too large": (["--block-size", "4"], "from 1 to 3"),
    "number 0": (["--num-blocks", "0"], "1 to 3"),
    "number too large": (["--num-blocks", "4"], "1 to 3"),
    "revision of a folder": (["--revision", "main"], "a revision needs a Hub id"),
}


@pytest.mark.parametrize("options,message", OPTIONS.values(), ids=OPTIONS)
def test_contradictory_options(src, tmp_path, capsys, options, message):
    assert message in refused(capsys, tmp_path, *options)


def test_a_number_of_blocks_that_does_not_come_out(tmp_path):
    """Equal blocks with a shorter last one can't have any number; the nearest possible numbers are named."""
    save_donor(tmp_path / "src", num_hidden_layers=7)
    with pytest.raises(ConversionError, match="7 layers .* 5 equal blocks .* nearest possible numbers are 4 and 7"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", num_blocks=5)
    for number, size in {1: 7, 2: 4, 3: 3, 4: 2, 7: 1}.items():
        result = convert_checkpoint(tmp_path / "src", tmp_path / f"dst{number}", num_blocks=number, verify=False)
        assert result.block_size == size
        assert result.depth_sources[-1] == number + 1


DESTINATIONS = {
    "the source": ("src", [], "one folder"),
    "in the source": ("src/inside", [], "one is inside the other"),
    "around the source": (".", ["--force"], "one is inside the other"),
    "a model": ("model", [], "use --force"),
    "a file": ("file", ["--force"], "not a folder"),
    "no model": ("photos", ["--force"], "no model folder"),
    "a link": ("link", ["--force"], "not a folder"),
    "below a file": ("file/below", [], "file"),
}


@pytest.mark.parametrize("dst,options,message", DESTINATIONS.values(), ids=DESTINATIONS)
def test_destinations(src, tmp_path, capsys, dst, options, message):
    """What exists is never harmed."""
    for folder in ("model", "photos"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "precious.txt").write_text("precious")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    before = tree(tmp_path)
    assert main([str(src), str(tmp_path / dst), *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert tree(tmp_path) == before


SOURCES = {
    "missing path": ("./nowhere", "neither a folder nor"),
    "nonsense": ("a b/c?", "neither a folder nor a Hub id"),
    "deep path": ("a/b/c", "neither a folder nor a Hub id"),
}


@pytest.mark.parametrize("source,message", SOURCES.values(), ids=SOURCES)
def test_sources(tmp_path, capsys, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    assert main([source, "dst"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_source(src, tmp_path, capsys):
    assert main([str(src / "config.json"), str(tmp_path / "dst")]) == 1
    assert "is a file" in capsys.readouterr().err


def test_new_parent_folders_go_again(src, tmp_path):
    """A conversion that fails late removes the parents that it made."""
    os.truncate(shards(src)[0], shards(src)[0].stat().st_size - 1)
    with pytest.raises(ConversionError):
        convert_checkpoint(src, tmp_path / "new" / "deep" / "dst")
    assert not (tmp_path / "new").exists()


def test_the_installed_command(src, tmp_path):
    """The real command: help with examples, an error without traceback, usage errors with code 2."""
    command = os.path.join(os.path.dirname(sys.executable), "attnres-convert")

    def run(*arguments):
        return subprocess.run([command, *map(str, arguments)], capture_output=True, text=True, timeout=300)

    shown = run("--help")
    assert shown.returncode == 0 and "examples:" in shown.stdout and "--num-blocks" in shown.stdout
    assert run(src).returncode == 2
    assert run(src, tmp_path / "dst", "--block-size", "half").returncode == 2
    garbage(src)
    failed = run(src, tmp_path / "dst")
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and "Traceback" not in failed.stderr
    assert not (tmp_path / "dst").exists()


def test_attnres_weights_under_a_donors_configuration(tmp_path):
    """Rows that are there already would be in two shards, of which one counts."""
    save_donor(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "attnres", verify=False)
    shutil.copyfile(tmp_path / "donor" / "config.json", tmp_path / "attnres" / "config.json")
    with pytest.raises(ConversionError, match="holds model.depth_attention.* of an AttnRes model"):
        convert_checkpoint(tmp_path / "attnres", tmp_path / "dst")
    assert not (tmp_path / "dst").exists()


def test_output_that_nobody_reads(tmp_path, monkeypatch):
    """The result is there all the same."""
    save_donor(tmp_path / "donor")
    with open("/dev/full", "w") as full, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", full)
        assert main([str(tmp_path / "donor"), str(tmp_path / "dst")]) == 0
        with pytest.raises(OSError, match="space"):
            full.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())
    assert (tmp_path / "dst" / "config.json").exists()


def test_destination_that_is_no_text(tmp_path):
    """It is written, and can't be verified."""
    save_donor(tmp_path / "donor")
    dst = os.fsdecode(bytes(tmp_path) + b"/\xff")
    assert "UTF-8" in convert_checkpoint(tmp_path / "donor", dst).verification_skipped
    assert os.path.exists(os.path.join(dst, "config.json"))
