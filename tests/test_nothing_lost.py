# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""No command loses what somebody else put where it writes, and what is damaged is noticed in a line."""

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from attnres_convert import ConversionError, InputError, convert_checkpoint, staging
from attnres_convert.kimi_k3 import main as kimi_k3
from convert_models import save_donor, tree
from pretrain_process import SCRIPTS, TINY, Server


sys.path.insert(0, str(SCRIPTS))

import benchmark  # noqa: E402
import evaluate_model  # noqa: E402
import plot_depth_attention  # noqa: E402
import training_run  # noqa: E402
from training_data import stdlib_files  # noqa: E402


ROOT = SCRIPTS.parent
RUN = [*TINY, "--steps", 8, "--save-steps", 2, "--eval-steps", 4, "--keep-checkpoints", 3, "--depth-every", 0]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        server = Server(tmp_path_factory.mktemp("lost"), "finetune")
        yield server
        server.stop()


@pytest.fixture(scope="module")
def command(server) -> list:
    """A short run, but for its --output."""
    text = server.folder / "text"
    text.mkdir()
    source = "".join(file.read_text(errors="replace") for file in stdlib_files()[:6])
    for index in range(40):
        (text / f"{index:02d}.txt").write_text(source[800 * index : 800 * index + 600])
    return [*RUN, "--data", text]


def run(server, *arguments, script="pretrain", exit_code=0) -> str:
    server.script = script
    return server.run(*arguments, exit_code=exit_code)


@pytest.fixture(scope="module")
def finished(server, command) -> Path:
    run(server, *command, "--output", "finished")
    return server.folder / "finished"


@pytest.fixture(scope="module")
def killed(server, command) -> Path:
    """A run that was killed when it had just written its third checkpoint."""
    server.script = "pretrain"
    process = server.start(*command, "--output", "killed")
    assert process.wait_for((server.folder / "killed" / "checkpoint-6").exists)
    process.kill()
    return server.folder / "killed"


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "tokens_per_second"} for line in lines]


def state(folder: Path) -> dict:
    """All that is in a folder: names, kinds, contents and where links lead."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(folder))] = content
    return found


def write(path: Path, text: str = "mine") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# Output folders


def repository(folder):
    write(folder / "out" / ".git" / "HEAD")
    write(folder / "out" / ".gitignore")
    return "absent.txt doesn't exist"


def repository_with_keys(folder):
    repository(folder)
    write(folder / "out" / ".env", "K=1")
    return "holds .env"


def dotfiles(folder):
    write(folder / "out" / ".ssh" / "id")
    return "holds .ssh"


def empty(folder):
    (folder / "out").mkdir()
    return "absent.txt doesn't exist"


def empty_behind_a_link(folder):
    (folder / "elsewhere").mkdir()
    (folder / "out").symlink_to("elsewhere")
    return "absent.txt doesn't exist"


def link_to_nothing(folder):
    (folder / "out").symlink_to("elsewhere")
    return "can't write to"


def nothing(folder):
    return "absent.txt doesn't exist"


def others_run(folder):
    write(folder / "out" / "run.json", "{}")
    return "run.json is damaged"


COMMANDS = {
    "pretrain": ("pretrain", []),
    "finetune": ("finetune", []),
    "comparison": ("pretrain", ["--compare", "block,full"]),
}
CASES = [repository_with_keys, dotfiles, empty, empty_behind_a_link, link_to_nothing, others_run, nothing]


@pytest.mark.parametrize(
    ("name", "case"), [*((name, repository) for name in COMMANDS), *(("pretrain", case) for case in CASES)]
)
def test_refused_run_leaves_the_folder(name, case, tmp_path, monkeypatch, capfd):
    """A run that can't start ends in one line, and its folder is as it was, with all that isn't the run's."""
    script, options = COMMANDS[name]
    message, before = case(tmp_path), state(tmp_path)
    monkeypatch.chdir(tmp_path / "out" if case is dotfiles else tmp_path)
    options = ["--model", str(ROOT / "model_cards" / "llama-1.3m"), "--data", "./absent.txt", *options]
    with pytest.raises(SystemExit) as exit:
        importlib.import_module(script).main([*options, "--output", "." if case is dotfiles else "out"])
    printed = f"{capfd.readouterr().err}{exit.value.code}"
    assert message in printed and "Traceback" not in printed and "\n" not in exit.value.code
    assert state(tmp_path) == before


OTHERS = [".env", ".git/HEAD", "notes.txt", ".saving/a", ".model/a", "checkpoint-999/a", "checkpoint-3.bak/a"]
OTHERS += ["tensorboard/a", "model/a", "checkpoint-2/a", "checkpoint-8/a", ".run.json"]


def test_what_others_put_into_a_run(server, command, killed):
    """Files that aren't the run's are all there at its end, whatever they are called; what is in the way is kept under
    another name, and a checkpoint with something of others in it isn't removed."""
    folder = server.folder / "others"
    shutil.copytree(killed, folder)
    for name in OTHERS:
        write(folder / name, f"of others: {name}")
    (folder / "checkpoint-5").symlink_to("checkpoint-4")
    printed = run(server, *command, "--keep-checkpoints", 1, "--output", "others", exit_code=1)
    assert "keep_checkpoints = 3, not 1" in printed
    printed = run(server, *command, "--output", "others")
    assert "checkpoint-999; it is left alone" in printed and "kept as model.kept-1" in printed
    assert "going on from others/checkpoint-6" in printed
    contents = {path.read_text() for path in folder.rglob("*") if path.is_file() and path.stat().st_size < 99}
    assert {f"of others: {name}" for name in OTHERS} <= contents
    assert (folder / "model" / "model.safetensors").is_file() and not (folder / "model" / "a").exists()
    assert (folder / "checkpoint-5").is_symlink() and not (folder / "checkpoint-8" / "a").exists()
    assert [path.name for path in folder.glob(".attnres*")] == []


def test_a_run_behind_a_link(server, command, tmp_path):
    """A link to a folder that has a version control in it is a good place for a run."""
    write(tmp_path / "real" / ".git" / "HEAD")
    (tmp_path / "out").symlink_to("real")
    run(server, *command, "--steps", 2, "--output", tmp_path / "out")
    assert (tmp_path / "real" / "results.json").is_file() and (
        tmp_path / "real" / ".git" / "HEAD"
    ).read_text() == "mine"


def test_results_of_others(tmp_path, monkeypatch):
    """Evaluation, figures and measurements replace only what the same script wrote."""
    model, out = str(ROOT / "model_cards" / "attnres-1.3m-block"), ["--output", str(tmp_path)]
    text = str(write(tmp_path / "text.txt", "def f(x):\n    return x\n" * 200))
    tries = [
        (evaluate_model, [model, "--data", text], "evaluation.md"),
        (plot_depth_attention, [model, "--text", text], "dynamics.png"),
        (benchmark, ["--parts", "models"], "models.json"),
    ]
    for script, arguments, name in tries:
        write(tmp_path / name)
        before = state(tmp_path)
        with pytest.raises(SystemExit, match=rf"{name} wasn't written by {script.__name__}.py; move it away"):
            script.main([*arguments, *out])
        assert state(tmp_path) == before
        (tmp_path / name).unlink()
    options = [model, "--text", text, "--sequences", "1", "--seq-len", "16", "--tokens", "4", *out]
    for _ in range(2):
        plot_depth_attention.main(options)
    (tmp_path / "dynamics.png").unlink()
    (tmp_path / "dynamics.png").symlink_to("text.txt")
    with pytest.raises(SystemExit, match="dynamics.png wasn't written by"):
        plot_depth_attention.main(options)


# Conversion


def planted(folder: Path) -> dict[str, Path]:
    """What is beside a destination under the names that conversion uses."""
    found = {kind: folder / f".dst.attnres-tmp-{index:08x}" for index, kind in enumerate(["link", "pipe", "file"])}
    write(folder / "precious" / "a")
    found["link"].symlink_to("precious")
    os.mkfifo(found["pipe"])
    found["file"].write_text("mine")
    for number, name in enumerate((".dst.attnres-tmp-0000000a", ".dst.attnres-tmp-0000000b", ".dst.attnres-old-x")):
        write(folder / name / "old" / "config.json")
        write(folder / name / "new" / "config.json")
        if number:  # a mark that is right but for the folder's number on the disk, which no archive can know
            parent = folder.stat().st_ino
            write(folder / name / staging.MARK, json.dumps({"for": "dst", "in": parent, "inode": 1}))
    return found


def test_planted_beside_a_destination(tmp_path):
    """What looks like a killed conversion's folder and isn't neither stands in the way, nor becomes the destination,
    nor goes."""
    save_donor(tmp_path / "src", num_hidden_layers=1)
    work = tmp_path / "work"
    planted(work)
    before = state(work)
    staging.recover(work / "dst")
    assert state(work) == before
    convert_checkpoint(tmp_path / "src", work / "dst", verify=False)
    assert (work / "dst" / "config.json").read_text() != "mine"
    shutil.rmtree(work / "dst")
    assert state(work) == before


@pytest.mark.parametrize("name", [".git/HEAD", ".env", "notes.txt", "onnx/model.onnx", "adapter_model.safetensors"])
def test_force_keeps_what_is_not_of_a_model(name, tmp_path):
    """A model with something else in its folder isn't replaced."""
    save_donor(tmp_path / "src", num_hidden_layers=1)
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False)
    write(tmp_path / "dst" / name)
    before = state(tmp_path)
    with pytest.raises(ConversionError, match=f"holds {name.split('/')[0]}, which would be lost"):
        convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False, force=True)
    assert state(tmp_path) == before


def test_kimi_k3_writes_through_no_link(tmp_path):
    """A link under the name of a temporary file leads nowhere."""
    save_donor(tmp_path / "src", num_hidden_layers=1)
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", verify=False)
    assert kimi_k3(["export", str(tmp_path / "dst"), str(tmp_path / "k3.safetensors")]) == 0
    write(tmp_path / "precious")
    shards = [path.name for path in (tmp_path / "dst").glob("*.safetensors")]
    for shard in shards:
        (tmp_path / "dst" / f".{shard}.attnres-tmp").symlink_to("../precious")
    before = tree(tmp_path)
    assert kimi_k3(["import", str(tmp_path / "k3.safetensors"), str(tmp_path / "dst")]) == 0
    assert tree(tmp_path) == before  # zero queries again


# Damage


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def flip(path):
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def remove(path):
    path.unlink()


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def nest(path):
    path.write_text("[" * 3000 + "]" * 3000)


DAMAGES = {
    "optimizer.pt": zero,
    "rng_state.pth": zero,
    "scheduler.pt": flip,
    "trainer_state.json": zero,
    "model.safetensors": flip,
    "training_args.bin": remove,
    "tokenizer.json": pipe,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_file(name, killed, tmp_path, capsys):
    """A file that has changed, also without a change of size, is noticed: the checkpoint before is taken, and the
    damaged one is kept under a name that is no checkpoint's."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    DAMAGES[name](folder / "checkpoint-6" / name)
    assert training_run.last_good_checkpoint(folder) == folder / "checkpoint-4"
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"{folder}/checkpoint-6 is damaged, see its {name}; it is now checkpoint-6.damaged-1, and the run "
        + ("goes on from checkpoint-4")
    )
    assert [path.name for path in training_run.checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
    assert (folder / "checkpoint-6.damaged-1").is_dir()


def test_damaged_checkpoint(server, command, killed, finished):
    """The run that goes on from the checkpoint before a damaged one ends as if nothing had been."""
    folder = server.folder / "damaged"
    shutil.copytree(killed, folder)
    flip(folder / "checkpoint-6" / "model.safetensors")
    nest(folder / "checkpoint-4" / "files.json")
    printed = run(server, *command, "--output", "damaged")
    assert "checkpoint-6 is damaged, see its model.safetensors; it is now checkpoint-6.damaged-1" in printed
    assert "going on from damaged/checkpoint-2" in printed and "checkpoint-4" in printed
    assert metrics(folder) == metrics(finished)
    weights = [(path / "model" / "model.safetensors").read_bytes() for path in (folder, finished)]
    assert weights[0] == weights[1]
    assert {"checkpoint-6.damaged-1", "checkpoint-4.kept-1", "checkpoint-6"} <= {p.name for p in folder.iterdir()}


def test_no_good_checkpoint(server, command, killed):
    """If none is good, the run is refused in one line, and all stays."""
    folder = server.folder / "all-bad"
    shutil.copytree(killed, folder)
    for checkpoint in folder.glob("checkpoint-*"):
        zero(checkpoint / "optimizer.pt")
    shutil.rmtree(folder / training_run.WORK_NAME, ignore_errors=True)  # where it was killed
    before = state(folder)
    printed = run(server, *command, "--output", "all-bad", exit_code=1)
    assert printed.count("\n") == 1 and "no checkpoint in all-bad is good" in printed and "optimizer.pt" in printed
    assert state(folder) == before


def of_earlier_version(folder):
    """Checkpoints without hashes, and without the speed in their logs."""
    for checkpoint in folder.glob("checkpoint-*"):
        content = json.loads((checkpoint / "trainer_state.json").read_text())
        content["log_history"] = [
            {name: value for name, value in entry.items() if name != "tokens_per_second"}
            for entry in content["log_history"]
        ]
        (checkpoint / "trainer_state.json").write_text(json.dumps(content))
        files = json.loads((checkpoint / "files.json").read_text())["files"]
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
        (checkpoint / "files.json").write_text(json.dumps(sizes))


def test_checkpoints_of_an_earlier_version(server, command, killed, finished):
    """They are taken up; of damage that shows when they are loaded, one line tells."""
    folder = server.folder / "earlier"
    shutil.copytree(killed, folder)
    of_earlier_version(folder)
    content = (folder / "checkpoint-6" / "optimizer.pt").read_bytes()
    for name in ("optimizer.pt", "rng_state.pth", "scheduler.pt", "model.safetensors"):
        content = (folder / "checkpoint-6" / name).read_bytes()
        zero(folder / "checkpoint-6" / name)
        printed = run(server, *command, "--output", "earlier", exit_code=1).splitlines()[-1]
        assert "earlier/checkpoint-6 is damaged" in printed or "earlier/checkpoint-6 doesn't load" in printed, printed
        (folder / "checkpoint-6" / name).write_bytes(content)
    printed = run(server, *command, "--output", "earlier")
    assert "going on from earlier/checkpoint-6" in printed and "metrics.jsonl" not in printed.splitlines()[0]
    assert metrics(folder) == metrics(finished)


LOGS = {
    "cut": (cut, "lacks entries, and is kept as metrics.jsonl.kept-1"),
    "zeroed": (zero, "lacks entries, and is kept as metrics.jsonl.kept-1"),
    "garbled": (lambda path: path.write_bytes(b"\xff{}\n[1]\n" + path.read_bytes()), "has 2 lines that can't be read"),
    "changed": (lambda path: path.write_text(path.read_text().replace('"loss": ', '"loss": 1')), "lacks entries"),
    "gone": (remove, "is gone; it goes on with those of the checkpoint"),
}


@pytest.mark.parametrize("name", LOGS)
def test_damaged_log(name, killed, tmp_path, capsys):
    """A log that isn't what the checkpoint knows of it is noticed, and made whole from the checkpoint."""
    folder = Path(shutil.copytree(killed, tmp_path / "run"))
    damage, message = LOGS[name]
    history = json.loads((folder / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    known = [{"step": logs["step"], **entry} for logs in history if (entry := training_run.RunLog.entry(logs))]
    undamaged = training_run.read_lines(folder / "metrics.jsonl")
    undamaged = [entry for entry in undamaged if entry["step"] <= 6]
    path = folder / "metrics.jsonl"
    training_run.JsonLines(path, 6, known)
    assert capsys.readouterr().err == "" and training_run.read_lines(path) == undamaged == known
    damage(path)
    if name == "cut":
        damage(path)
    training_run.JsonLines(path, 6, known)
    assert message in capsys.readouterr().err and training_run.read_lines(path) == known


NO_OBJECTS = {
    "not JSON": '{"arguments": {',
    "null": "null",
    "a list": "[1]",
    "half a pair": '{"a": "\\ud800"}',
    "deep": "[" * 3000 + "]" * 3000,
    "empty": "",
    "without": "{}",
    "of lists": '{"arguments": [1], "versions": [], "held_out_loss": [1], "what": [1]}',
    "of nulls": '{"arguments": null, "versions": {}, "held_out_loss": null, "what": null}',
    "a pipe": None,
}


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_broken_records(name, tmp_path):
    """Whatever is in the files of a run, reading them is an error in one line."""
    for file, read in (
        ("run.json", lambda path: training_run.open_run(path.parent, {})),
        ("results.json", training_run.read_results),
        ("failure.json", training_run.read_results),
    ):
        path = tmp_path / file
        os.mkfifo(path) if NO_OBJECTS[name] is None else path.write_text(NO_OBJECTS[name])
        with pytest.raises(InputError) as error:
            read(path)
        assert file in str(error.value) and len(str(error.value)) <= 300 and "\n" not in str(error.value)
        assert os.listdir(tmp_path) == [file]
        path.unlink()


def test_broken_results_and_data(server, command, killed, finished):
    """The commands say so too."""
    for source, file in ((finished, "results.json"), (killed, "data.json")):
        folder = server.folder / f"broken-{file}"
        shutil.copytree(source, folder)
        nest(folder / file)
        printed = run(server, *command, "--output", folder.name, exit_code=1)
        assert printed.count("\n") == 1 and file in printed and "not valid JSON" in printed
