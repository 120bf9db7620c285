# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What comes along, what is shared, and what a conversion costs."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from attnres_convert import convert_checkpoint, convert_to_donor
from attnres_convert.cli import main
from attnres_convert.files import write_all
from convert_models import edit_json, save_donor, tensor_bytes, tree, write_sparse_donor
from families import tiny_donor
from huggingface_hub import metadata_load
from marks import mostly_slow
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[1]
CARD = """---
license: llama3
language: [en, de]
tags: [donor-tag]
base_model: organisation/base
pipeline_tag: text-generation
---
# The donor
"""


@pytest.fixture
def full_donor(tmp_path):
    """A donor with all that a repository holds beside weights, and with files that must stay behind."""
    folder = tmp_path / "some-donor"
    save_donor(folder)
    words = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", "hello", "world"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    GenerationConfig(temperature=0.25, do_sample=True).save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    for name in ("LICENSE", "NOTICE.txt", "USE_POLICY.md"):
        (folder / name).write_text(name)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    torch.save({}, folder / "optimizer.pt")
    torch.save({}, folder / "training_args.bin")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "model.gguf").write_text("other format")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "config.json").write_text("{}")
    return folder


def test_what_comes_along(full_donor, tmp_path):
    """Tokenizer, templates, generation configuration and licences, byte for byte; no optimizer and no other formats."""
    before = tree(full_donor)
    convert_checkpoint(full_donor, tmp_path / "dst", verify=False)
    after = tree(tmp_path / "dst")
    expected = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE",
        "NOTICE.txt",
        "USE_POLICY.md",
        "additional_chat_templates/tools.jinja",
    }
    assert {name: after.get(name) for name in expected} == {name: before[name] for name in expected}
    own = {"README.md", "DONOR_README.md", "results.json", "config.json", "model.safetensors.index.json"}
    own |= {"modeling_attnres.py", "depth_mixers_attnres.py", "depth_attention_attnres.py", "configuration_attnres.py"}
    own |= {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    assert after.keys() == expected | own
    assert tree(full_donor) == before
    edit_json(tmp_path / "dst" / "tokenizer_config.json", tokenizer_class=...)  # older checkpoints name none
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dst")
    assert tokenizer("hello world")["input_ids"] == [3, 4]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False) == "hello"


@pytest.mark.parametrize("family, others", [("llama", set()), ("mistral", {"families_attnres.py"})])
def test_code_that_comes_along(tmp_path, family, others):
    """Three files of a Llama and four of other families, also where the donor has a file of that name."""
    tiny_donor(family).save_pretrained(tmp_path / "src")
    for name in ("families_attnres.py", "modeling_attnres.py"):
        (tmp_path / "src" / name).write_text("raise ValueError")
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False)
    after = {name: content for name, content in tree(tmp_path / "dst").items() if name.endswith(".py")}
    code = {f"{name}_attnres.py" for name in ("configuration", "depth_attention", "depth_mixers", "modeling")}
    assert after.keys() == code | others
    assert all(content == (ROOT / name).read_bytes() for name, content in after.items())


def test_the_card(full_donor, tmp_path):
    """The card takes over the donor's metadata, says what was done and how, and shows no path of this machine."""
    convert_checkpoint(full_donor, tmp_path / "out" / "converted", block_size=2)
    card = (tmp_path / "out" / "converted" / "README.md").read_text()
    metadata = metadata_load(tmp_path / "out" / "converted" / "README.md")
    assert metadata == {
        "license": "llama3",
        "language": ["en", "de"],
        "tags": ["donor-tag", "attention-residuals"],
        "base_model": "organisation/base",
        "base_model_relation": "finetune",
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
    }
    assert "attnres-convert some-donor converted --mode block --block-size 2" in card
    assert "LlamaForCausalLM" in card and "arXiv:2603.15031" in card and "relative difference" in card
    assert str(tmp_path) not in card
    assert (tmp_path / "out" / "converted" / "DONOR_README.md").read_text() == CARD


def test_a_card_with_broken_metadata(full_donor, tmp_path):
    """A donor's card that can't be parsed is no obstacle."""
    (full_donor / "README.md").write_text("---\nlicense: [unclosed\n---\ntext")
    convert_checkpoint(full_donor, tmp_path / "dst", verify=False)
    assert "attention-residuals" in metadata_load(tmp_path / "dst" / "README.md")["tags"]


def test_links(tmp_path):
    """With link the weights are the same files; everything that differs is not shared."""
    save_donor(tmp_path / "src", shard_size="30KB")
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", link=True)
    shards = list((tmp_path / "src").glob("*.safetensors"))
    assert all(os.path.samefile(path, tmp_path / "dst" / path.name) for path in shards)
    others = [path for path in (tmp_path / "dst").iterdir() if path.name not in {shard.name for shard in shards}]
    assert all(path.stat().st_nlink == 1 for path in others)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_links_across_file_systems(tmp_path, capsys):
    """Hard links can't leave a file system; the error names the way out."""
    with TemporaryDirectory(dir="/dev/shm") as other:
        if os.stat(other).st_dev == os.stat(tmp_path).st_dev:
            pytest.skip("needs a second file system")
        save_donor(tmp_path / "src")
        assert main([str(tmp_path / "src"), f"{other}/dst", "--link"]) == 1
        assert "different file systems; leave out --link" in capsys.readouterr().err
        assert os.listdir(other) == []
        assert main([str(tmp_path / "src"), f"{other}/dst"]) == 0


@pytest.mark.parametrize("link", [False, True], ids=["copy", "link"])
def test_a_folder_of_symbolic_links(tmp_path, link):
    """As in the cache of the Hub: the result holds the files themselves."""
    save_donor(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    for path in (tmp_path / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    convert_checkpoint(snapshot, tmp_path / "dst", link=link)
    assert not any(path.is_symlink() for path in (tmp_path / "dst").iterdir())
    original, written = tmp_path / "blobs" / "model.safetensors", tmp_path / "dst" / "model-00001-of-00002.safetensors"
    assert original.read_bytes() == written.read_bytes()
    assert os.path.samefile(original, written) == link


def test_verification_is_skipped_for_a_reason(tmp_path):
    """A model that doesn't fit is converted, and the result says why it was not verified."""
    write_sparse_donor(tmp_path / "src", vocab_size=2**30, hidden_size=32)  # 128 GiB, linked
    result = convert_checkpoint(tmp_path / "src", tmp_path / "dst", link=True)
    assert result.verification is None
    assert "GB of memory in float32" in result.verification_skipped
    assert "skipped: it needs" in (tmp_path / "dst" / "README.md").read_text()


COST = """
import json, os, resource, shutil, sys, time
from attnres_convert import convert_checkpoint
src, folder, link, repeats = sys.argv[1], sys.argv[2], sys.argv[3] == "link", int(sys.argv[4])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
converted, copied = [], []
for _ in range(repeats):
    start = time.perf_counter()
    convert_checkpoint(src, f"{folder}/dst", link=link, verify=False)
    converted.append(time.perf_counter() - start)
    shutil.rmtree(f"{folder}/dst")
    if repeats > 1:
        start = time.perf_counter()
        shutil.copyfile(f"{src}/model.safetensors", f"{folder}/copy")
        copied.append(time.perf_counter() - start)
        os.remove(f"{folder}/copy")
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"memory": (after - before) * 1024, "converted": converted, "copied": copied}))
"""


def cost(src, folder, way, repeats=1):
    command = [sys.executable, "-c", COST, str(src), str(folder), way, str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_memory_for_a_large_checkpoint(tmp_path):
    """A copy of 3 GB and links to 200 GB stay within 300 MB above the imports; links take seconds."""
    assert write_sparse_donor(tmp_path / "src", vocab_size=730_000) > 2.9e9
    assert cost(tmp_path / "src", tmp_path, "copy")["memory"] < 300e6
    assert write_sparse_donor(tmp_path / "large", vocab_size=50_000_000) > 200e9
    linked = cost(tmp_path / "large", tmp_path, "link")
    assert linked["memory"] < 300e6
    assert linked["converted"][0] < 10


@pytest.mark.slow
def test_time_for_a_large_checkpoint(tmp_path):
    """1 GB converts in at most 1.5 times what a plain copy takes."""
    assert write_sparse_donor(tmp_path / "src", vocab_size=245_000) > 1e9
    found = cost(tmp_path / "src", tmp_path, "copy", repeats=3)
    # the best of each, as the disk is shared; half a second for what doesn't grow with the size
    assert min(found["converted"]) < 1.5 * min(found["copied"]) + 0.5, found


# In a process of its own, with which the file system goes. Prints for each run of the command which pages were enough.
FULL_DISK = """
import json, os, pathlib, shutil, subprocess, sys
from attnres_convert import ConversionError, conversion, convert_checkpoint, convert_to_donor
from attnres_convert.kimi_k3 import export_kimi_k3
source, disk, same = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3] == "same"
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3000000", "tmpfs", disk], check=True)
conversion.check_space = lambda *_: None  # as if others had taken the space meanwhile
export = lambda src, dst, **_: export_kimi_k3(src, dst / "rows.safetensors")
runs = [("donor", convert_checkpoint, 2), ("sharded", convert_checkpoint, 5), ("there", convert_to_donor, 5)]
runs += [("saved", convert_to_donor, 5), ("there", export, 1)]
if same:
    source = shutil.copytree(source, disk / "source")
page, filler, found = os.sysconf("SC_PAGE_SIZE"), disk / "filler", []
for name, run, step in runs:
    tried, enough = list(range(0, 100, step)), []
    for pages in tried:  # on the first there is the mark of the work folder
        free = shutil.disk_usage(disk).free // page * page
        filler.write_bytes(bytes(free - pages * page))
        before = sorted(os.listdir(disk))
        try:
            run(source / name, disk / "dst", verify=False)
            shutil.rmtree(disk / "dst")
            enough.append(pages)
        except ConversionError as error:
            assert "no space left for" in str(error) and "free some" in str(error), error
        assert sorted(os.listdir(disk)) == before, os.listdir(disk)
        filler.unlink()
    found.append((tried, enough))
print(json.dumps(found))
"""


@pytest.mark.parametrize("disk", mostly_slow(["same", "other"], "same"))
def test_a_disk_that_fills_up(tmp_path, disk):
    """Whichever file the last page of a disk goes to, there is one clear error, and nothing stays."""
    alone = ["unshare", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    donor = save_donor(tmp_path / "source" / "donor", num_hidden_layers=2)
    donor.save_pretrained(tmp_path / "source" / "sharded", max_shard_size="30KB")
    (tmp_path / "source" / "donor" / "notes.txt").write_text("x" * 10_000)
    convert_checkpoint(tmp_path / "source" / "donor", tmp_path / "source" / "there", verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source" / "there")
    model.save_pretrained(tmp_path / "source" / "saved")  # depth attention in one file with the rest, to be cut out
    (tmp_path / "disk").mkdir()
    command = [*alone, sys.executable, "-c", FULL_DISK, tmp_path / "source", tmp_path / "disk", disk]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for tried, enough in json.loads(done.stdout):
        assert 1 < len(enough) < len(tried) and enough == tried[-len(enough) :]


SHORT = {
    "little": lambda real: lambda source, target, count: real(source, target, min(count, 1000)),
    "nothing": lambda real: lambda *_: 0,
    "not here": lambda real: lambda *_: os.strerror(os.close(-1)),
    "not now": lambda real: lambda source, target, count: real(source, target, min(count, 1000)) if count % 3 else 0,
}


@pytest.mark.parametrize("kind", SHORT.values(), ids=SHORT)
def test_copies_in_parts(tmp_path, monkeypatch, kind):
    """A system that copies or writes less than it is asked for makes no other files."""
    save_donor(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "expected", verify=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "expected").save_pretrained(tmp_path / "saved")
    monkeypatch.setattr(os, "copy_file_range", kind(os.copy_file_range))
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False)
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "dst" / path.name).read_bytes()
    convert_to_donor(tmp_path / "saved", tmp_path / "back", verify=False)
    assert tensor_bytes(tmp_path / "back") == tensor_bytes(tmp_path / "src")


def test_writes_in_parts(tmp_path):
    """Without a buffer, what a write leaves over is written next."""

    class Slow(io.FileIO):
        def write(self, data):
            return super().write(bytes(data[:7]))

    with Slow(tmp_path / "file", "w") as file:
        write_all(file, bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))
