# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Saves over a folder that holds a model: what is stale goes, what is the user's stays, whenever the process ends."""

import itertools
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from attnres_convert import convert_checkpoint
from families import perturb, tiny_donor, tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from configuration_attnres import SAVING


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OWN = {  # files that no save replaces
    "my-notes.safetensors": "weights of mine",
    "model-backup.safetensors": "weights of mine",
    "adapter_model.safetensors": "an adapter",
    "model.fp16.safetensors": "another variant",
    "notes.txt": "text",
}
SHARDED = {"max_shard_size": "160KB"}


def by_engine(folder: Path, variant: str = "") -> dict[str, torch.Tensor]:
    """The weights as engines read them: by the index where there is one, else all of the model's files."""
    index = folder / f"model.safetensors.index{variant}.json"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: load_file(folder / name) for name in set(weight_map.values())}
        return {tensor: files[name][tensor] for tensor, name in weight_map.items()}
    return load_file(folder / f"model{variant}.safetensors")


def by_transformers(folder: Path, **options) -> dict[str, torch.Tensor]:
    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **options).state_dict()


def is_same(found: dict, expected: dict) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def weight_files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if "safetensors" in path.name} - OWN.keys()


def with_own_files(folder: Path) -> Path:
    for name, content in OWN.items():
        (folder / name).write_text(content)
    return folder


def check_own_files(folder: Path):
    assert {name: (folder / name).read_text() for name in OWN} == OWN
    assert not list(folder.glob(".*"))


def converted(folder: Path):
    tiny_donor().save_pretrained(folder.parent / "donor")
    convert_checkpoint(folder.parent / "donor", folder, verify=False)


def with_depth_shard(folder: Path):
    tiny_donor().save_pretrained(folder.parent / "donor", **SHARDED)
    convert_checkpoint(folder.parent / "donor", folder, verify=False)
    assert "model-depth-attention.safetensors" in weight_files(folder)


OLD = {
    "converted": converted,
    "depth shard": with_depth_shard,
    "one file": lambda folder: tiny_model().save_pretrained(folder),
    "shards": lambda folder: tiny_model().save_pretrained(folder, **SHARDED),
    "nothing": lambda folder: folder.mkdir(),
}


@pytest.fixture(scope="module")
def old(tmp_path_factory) -> Path:
    """Folders with a model and files of the user's, by name."""
    root = tmp_path_factory.mktemp("old")
    for name, make in OLD.items():
        place = root / name
        place.mkdir()
        make(place / "model")
        with_own_files(place / "model")
    return root


@pytest.fixture(scope="module")
def model():
    """What is saved over them: another model of the same shapes."""
    return perturb(tiny_model(), seed=5)


@pytest.mark.parametrize("options", [{}, SHARDED], ids=["one file", "shards"])
@pytest.mark.parametrize("name", OLD)
def test_nothing_stale_is_left(old, model, name, options, tmp_path):
    """All readers get the new weights, and the folder has what a save into an empty one has, and the user's files."""
    folder = tmp_path / "model"
    shutil.copytree(old / name / "model", folder)
    model.save_pretrained(folder, **options)
    model.save_pretrained(tmp_path / "expected", **options)
    assert weight_files(folder) == weight_files(tmp_path / "expected")
    assert is_same(by_transformers(folder), model.state_dict())
    assert is_same(by_engine(folder), by_engine(tmp_path / "expected"))
    check_own_files(folder)
    for path in (tmp_path / "expected").glob("*.*"):
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


AUDITED = {"os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "shutil.copyfile"}


def killed_at(step: int, save) -> bool:
    """Whether a process that saves was killed right before its change number `step` to files; else it has ended."""
    pid = os.fork()
    if not pid:
        steps = itertools.count(1)

        def hook(event: str, arguments: tuple):
            changes = event in AUDITED or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
            if changes and next(steps) == step:
                os._exit(9)

        sys.addaudithook(hook)
        try:
            save()
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9)
    return code == 9


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills forked processes")
@pytest.mark.parametrize("name, options", [("converted", {}), ("one file", SHARDED)])
def test_a_killed_save_leaves_the_old_or_the_new_model(old, model, name, options, tmp_path):
    """Whichever change to the folder was the last one: for transformers and for engines."""
    threads, before = torch.get_num_threads(), by_engine(old / name / "model")
    torch.set_num_threads(1)
    seen, folder = [], tmp_path / "model"
    expected = model.state_dict()
    for step in itertools.count(1):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old / name / "model", folder)
        if not killed_at(step, lambda: model.save_pretrained(folder, **options)):
            break
        states = []
        for read in (by_transformers, by_engine):
            found = read(folder)
            states.append("new" if is_same(found, expected) else "old" if is_same(found, before) else "broken")
        seen.append(tuple(states))
    assert not any("broken" in states for states in seen), seen
    assert seen[0] == ("old", "old") and seen[-1] == ("new", "new")
    torch.set_num_threads(threads)


def test_variants_are_apart(old, model, tmp_path):
    """A save of a variant replaces the weights of this variant alone."""
    folder = tmp_path / "model"
    shutil.copytree(old / "shards" / "model", folder)
    (folder / "model.fp16.safetensors").unlink()
    before = by_engine(folder)
    model.save_pretrained(folder, variant="fp16", **SHARDED)
    assert is_same(by_transformers(folder, variant="fp16"), model.state_dict())
    model.save_pretrained(folder, variant="fp16")
    assert {name for name in weight_files(folder) if "fp16" in name} == set()  # the one that is left is in OWN
    assert is_same(load_file(folder / "model.fp16.safetensors"), by_transformers(folder, variant="fp16"))
    assert is_same(by_engine(folder), before) and is_same(by_transformers(folder), before)


def test_an_index_names_no_other_files(model, tmp_path):
    """What it lists outside of the folder, or what are no weights of a model, stays; weights of any name go."""
    (tmp_path / "here").mkdir()
    folder = with_own_files(tmp_path / "here")
    save_file({"a": torch.zeros(1)}, tmp_path / "model-out.safetensors")
    names = [
        "../model-out.safetensors",
        str(tmp_path / "model-out.safetensors"),
        "notes.txt",
        "adapter_model.safetensors",
    ]
    names += ["model-/../../model-out.safetensors", None, 5]
    listed = "part_00001-of-00007.safetensors"
    for weight_map in (dict(enumerate([*names, listed])), {"a": ["a"]}, [listed], "a"):
        save_file({"a": torch.zeros(1)}, folder / listed)
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        model.save_pretrained(folder)
        check_own_files(folder)
        assert (tmp_path / "model-out.safetensors").exists() and not (folder / INDEX).exists()
        assert (folder / listed).exists() == (not isinstance(weight_map, dict) or listed not in weight_map.values())


def test_a_save_that_fails_changes_nothing(old, model, tmp_path, monkeypatch):
    """Here one that can't write its second shard, as on a full disk."""
    folder = tmp_path / "model"
    shutil.copytree(old / "shards" / "model", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    shards = itertools.count()

    def full(*arguments, **options):
        if next(shards):
            raise OSError(28, "No space left on device")
        save_file(*arguments, **options)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder, **SHARDED)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_other_processes_write_nothing(old, model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(old / "converted" / "model", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model.save_pretrained(folder, is_main_process=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_is_read_only(old, model, tmp_path):
    """It says so, and stays."""
    folder = tmp_path / "model"
    shutil.copytree(old / "converted" / "model", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    os.chmod(folder, 0o555)
    pid = os.fork()
    if not pid:
        try:
            if os.getuid() == 0:  # who may write anyway
                os.setuid(65534)
            model.save_pretrained(folder)
        except PermissionError:
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7
    os.chmod(folder, 0o755)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_links_are_replaced(old, model, tmp_path):
    """A link in the folder, as in a cache, becomes a file; what it leads to stays."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in (old / "converted" / "model").iterdir():
        (folder / path.name).symlink_to(path)
    before = {path.name: path.read_bytes() for path in (old / "converted" / "model").iterdir()}
    model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in (old / "converted" / "model").iterdir()} == before
    assert weight_files(folder) == {SINGLE} and is_same(by_transformers(folder), model.state_dict())
    model.save_pretrained(tmp_path / "expected")
    for path in (tmp_path / "expected").iterdir():
        assert not (folder / path.name).is_symlink(), path.name


def test_adapters_of_transformers_replace_no_weights(old, tmp_path):
    """A model with an adapter saves the adapter, beside the weights that were there."""
    from peft import LoraConfig

    folder = tmp_path / "model"
    shutil.copytree(old / "converted" / "model", folder)
    for name in ("adapter_model.safetensors", SINGLE):
        (folder / name).unlink(missing_ok=True)
    before = by_engine(folder)
    adapted = AutoModelForCausalLM.from_pretrained(folder)
    adapted.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(folder)
    assert is_same(by_engine(folder), before)
    assert "adapter_model.safetensors" in os.listdir(folder) and "adapter_config.json" in os.listdir(folder)


def test_trainer(old, model, tmp_path):
    """A Trainer that saves over the folder of its model leaves nothing stale either."""
    folder = tmp_path / "model"
    shutil.copytree(old / "depth shard" / "model", folder)
    Trainer(model, TrainingArguments(str(folder), report_to="none", use_cpu=True)).save_model()
    assert weight_files(folder) == {SINGLE} and is_same(by_engine(folder), load_file(folder / SINGLE))
    assert is_same(by_transformers(folder), model.state_dict())
    check_own_files(folder)


def test_a_save_beside_another(model, tmp_path):
    """What another process is writing there stays."""
    (tmp_path / f"{SAVING}x").mkdir()
    (tmp_path / f"{SAVING}x" / SINGLE).write_text("half")
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob(".*")] == [f"{SAVING}x"]


def test_a_half_index_is_no_model(old, model, tmp_path, monkeypatch):
    """A disk that is full at the index, which is written last."""
    folder = tmp_path / "model"
    shutil.copytree(old / "one file" / "model", folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def half(content, **options):
        (next(folder.glob(f"{SAVING}*")) / INDEX).write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.json.dumps", half)
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(folder, **SHARDED)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
