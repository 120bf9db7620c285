# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A destination is complete or absent, whatever kills the process that makes it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from attnres_convert import ConversionError, convert_checkpoint
from convert_models import save_donor, tree, write_sparse_donor
from convert_process import start, wait_for
from transformers import AutoModelForCausalLM


SWEEP = Path(__file__).with_name("convert_kill_sweep.py")


def sweep(tmp_path, **options):
    (tmp_path / "work").mkdir()
    command = [sys.executable, SWEEP, tmp_path / "src", tmp_path / "work", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_before_every_operation(tmp_path):
    """SIGKILL before each write, rename or removal: no destination or all of it, and the next run cleans up."""
    save_donor(tmp_path / "src", num_hidden_layers=2)
    kills = sweep(tmp_path)
    operations = [kill["operation"] for kill in kills]
    assert len(kills) > 8
    assert any(o.startswith("open model-00001") for o in operations) and any("rename" in o for o in operations)
    assert {kill["killed"] for kill in kills} == {"absent", "after"}
    assert [kill["recovered"] for kill in kills] == [kill["killed"] for kill in kills]
    assert all(kill["left"] == (["dst"] if kill["killed"] == "after" else []) for kill in kills)


def test_replacing_is_killed_before_every_operation(tmp_path):
    """With force there is, after the next run's clean-up, always the old or the new model; at no time a broken one."""
    save_donor(tmp_path / "src", num_hidden_layers=2)
    save_donor(tmp_path / "before", num_hidden_layers=1)
    kills = sweep(tmp_path, force=True)
    assert {kill["killed"] for kill in kills} == {"before", "absent", "after"}
    assert [kill["operation"].split()[0] for kill in kills if kill["killed"] == "absent"] == ["os.rename"]
    assert {kill["recovered"] for kill in kills} == {"before", "after"}
    assert all(kill["left"] == ["dst"] for kill in kills)


@pytest.fixture
def error_file(tmp_path_factory):
    return tmp_path_factory.mktemp("process") / "stderr"


def copied(tmp_path):
    return sum(path.stat().st_size for path in tmp_path.glob(".dst.attnres-tmp-*/new/model-*.safetensors"))


def test_killed_in_mid_copy(tmp_path, error_file):
    """A real run killed while a gigabyte is half copied leaves no destination; the next run removes what it left."""
    size = write_sparse_donor(tmp_path / "src", vocab_size=245_000)
    process = start(tmp_path / "src", tmp_path / "dst", "--no-verify", error_file=error_file)
    wait_for(lambda: copied(tmp_path) > size / 10, process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert copied(tmp_path) < size
    assert not (tmp_path / "dst").exists()
    assert len(list(tmp_path.glob(".dst.attnres-tmp-*"))) == 1
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False, link=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_killed_with_the_floats_of_a_gguf_file(tmp_path, error_file):
    """What such a file becomes on its way, beside the destination, goes with the next run."""
    pytest.importorskip("gguf_models").write_gguf(tmp_path / "src")
    process = start(tmp_path / "src", tmp_path / "dst", error_file=error_file)
    wait_for(lambda: any(tmp_path.glob(".dst.attnres-tmp-*/donor/config.json")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert all(path.name == "src" or path.name.startswith(".dst.attnres-tmp-") for path in tmp_path.iterdir())
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_interrupted(tmp_path, error_file):
    """Ctrl-C removes what was written and says so, without a traceback."""
    size = write_sparse_donor(tmp_path / "src", vocab_size=245_000)
    process = start(tmp_path / "src", tmp_path / "dst", "--no-verify", error_file=error_file)
    wait_for(lambda: copied(tmp_path) > size / 10, process)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    error = error_file.read_text()
    assert process.exitcode == 130 and "error: interrupted" in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["src"]


def test_a_living_run_is_left_alone(tmp_path, error_file):
    """A second run to the same destination doesn't take the first one's folder for a leftover."""
    write_sparse_donor(tmp_path / "src", vocab_size=245_000)
    save_donor(tmp_path / "small", num_hidden_layers=1)
    process = start(tmp_path / "src", tmp_path / "dst", "--no-verify", error_file=error_file)
    wait_for(lambda: copied(tmp_path) > 0, process)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        (folder,) = tmp_path.glob(".dst.attnres-tmp-*")
        convert_checkpoint(tmp_path / "small", tmp_path / "dst", verify=False)
        assert folder.is_dir()
        written = tree(tmp_path / "dst")
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(300)
    assert process.exitcode == 1 and "use --force" in error_file.read_text()
    assert tree(tmp_path / "dst") == written
    assert not folder.exists()


def test_force_replaces_only_at_the_end(tmp_path):
    """A conversion that fails leaves the old model; one that succeeds replaces all of it."""
    save_donor(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False)
    before = tree(tmp_path / "dst")
    with pytest.raises(ConversionError, match="use --force"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst")
    shard = tmp_path / "src" / "model.safetensors"
    size = shard.stat().st_size
    os.truncate(shard, size - 4)
    with pytest.raises(ConversionError, match="damaged"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", force=True)
    assert tree(tmp_path / "dst") == before
    os.truncate(shard, size)
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", mode="full", force=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "dst").config.attn_res_mode == "full"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dst", "src"]


def test_the_disk_fills_up(tmp_path, error_file):
    """A write that fails half-way, here at the limit of the process, is a clear error and leaves nothing."""
    write_sparse_donor(tmp_path / "src", vocab_size=20_000)
    process = start(tmp_path / "src", tmp_path / "dst", "--no-verify", error_file=error_file, file_limit=10**7)
    process.join(60)
    error = error_file.read_text()
    assert process.exitcode == 1 and "Traceback" not in error
    assert error.splitlines()[-1].startswith("error: ") and "File too large" in error
    assert [path.name for path in tmp_path.iterdir()] == ["src"]
