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
from attnres_convert.reading import sha256
from attnres_recipes import checkpoints
from attnres_recipes.data import stdlib_files
from attnres_recipes.figures import plot_losses
from attnres_recipes.folders import WORK_NAME
from attnres_recipes.log import JsonLines, RunLog, read_lines
from attnres_recipes.run import discarded_if_refused, held_locks, open_run, read_results
from convert_models import save_donor, tree
from pretrain_process import SCRIPTS, TINY, Server


sys.path[:0] = [str(SCRIPTS), str(SCRIPTS.parent / "benchmarks")]

import benchmark  # noqa: E402
import evaluate_model  # noqa: E402
import plot_depth_attention  # noqa: E402


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
    assert checkpoints.last_good_checkpoint(folder) == folder / "checkpoint-4"
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line
        == f"{folder}/checkpoint-6 is damaged, see its {name}; it is now checkpoint-6.damaged-1, and the run "
        + ("goes on from checkpoint-4")
    )
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]
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
    shutil.rmtree(folder / WORK_NAME, ignore_errors=True)  # where it was killed
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
    content = json.loads((folder / "run.json").read_text())
    del content["id"]
    (folder / "run.json").write_text(json.dumps(content))


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
    known = [{"step": logs["step"], **entry} for logs in history if (entry := RunLog.entry(logs))]
    undamaged = read_lines(folder / "metrics.jsonl")
    undamaged = [entry for entry in undamaged if entry["step"] <= 6]
    path = folder / "metrics.jsonl"
    JsonLines(path, 6, known)
    assert capsys.readouterr().err == "" and read_lines(path) == undamaged == known
    damage(path)
    if name == "cut":
        damage(path)
    JsonLines(path, 6, known)
    assert message in capsys.readouterr().err and read_lines(path) == known


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
        ("run.json", lambda path: open_run(path.parent, {})),
        ("results.json", read_results),
        ("failure.json", read_results),
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


# What else a stranger tried


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def test_figures_of_others(tmp_path, capsys):
    """A figure neither goes through a link nor takes the place of a file that somebody else put there."""
    entries = {"run": [{"step": 1, "loss": 2.0}, {"step": 1, "held_out_loss": 2.5}]}
    outside, path = write(tmp_path / "outside"), tmp_path / "loss.png"
    path.symlink_to("outside")
    plot_losses(entries, path, "a title")
    assert outside.read_text() == "mine" and (tmp_path / "loss.png.kept-1").is_symlink() and not path.is_symlink()
    assert capsys.readouterr().err.endswith("it is kept as loss.png.kept-1\n")
    plot_losses(entries, path, "a title")
    assert capsys.readouterr().err == ""
    write(path)
    plot_losses(entries, path, "a title")
    assert (tmp_path / "loss.png.kept-2").read_text() == "mine"
    plot_losses(entries, path, "another", sha256(path))
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "loss.png.kept-1", "loss.png.kept-2", "outside"]


def test_comparison_of_others(server, command):
    """A second comparison replaces what the first wrote, and keeps what has changed since."""
    options = [
        *command,
        "--steps",
        2,
        "--save-steps",
        2,
        "--eval-steps",
        2,
        "--compare",
        "block",
        "--output",
        "compared",
    ]
    folder = server.folder / "compared"
    run(server, *options)
    names = ["comparison.json", "comparison.md", "comparison.png"]
    for record in folder.glob("block/results.json"):  # so that all three change
        record.write_text(record.read_text().replace('"peak_memory_bytes": ', '"peak_memory_bytes": 9'))
    assert "kept" not in run(server, *options)
    changed = (folder / names[0]).read_text().replace('"runs"', '"runs" ')
    write(folder / names[0], changed)
    write(folder / names[1], "edited")
    (folder / names[2]).unlink()
    (folder / names[2]).symlink_to(write(server.folder / "precious.png"))
    printed = run(server, *options)
    assert all(f"it is kept as {name}.kept-1" in printed for name in names)
    assert (folder / "comparison.json.kept-1").read_text() == changed
    assert (folder / "comparison.md.kept-1").read_text() == "edited"
    assert (server.folder / "precious.png").read_text() == "mine" and not (folder / names[2]).is_symlink()


def test_rotation_keeps_what_was_edited(killed, tmp_path, monkeypatch):
    """A checkpoint isn't untouched with a file of the same size in it that has changed, or an empty folder."""
    checkpoint = copy_of(killed, tmp_path / "run") / "checkpoint-4"
    assert checkpoints.is_untouched(checkpoint)  # a copy, whose files are newer than the list
    listed = checkpoint / "files.json"
    later = listed.stat().st_mtime_ns + 10**12
    os.utime(listed, ns=(later, later))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "sha256", lambda path: pytest.fail("it reads what isn't newer"))
        assert checkpoints.is_untouched(checkpoint)
    os.utime(listed, ns=(later - 2 * 10**12, later - 2 * 10**12))
    (checkpoint / "mine").mkdir()
    assert not checkpoints.is_untouched(checkpoint)
    (checkpoint / "mine").rmdir()
    found = (checkpoint / "config.json").stat()
    flip(checkpoint / "config.json")
    os.utime(checkpoint / "config.json", ns=(found.st_atime_ns, found.st_mtime_ns))
    assert not checkpoints.is_untouched(checkpoint)


def arguments_of(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())["arguments"]


def taken_up(folder: Path) -> Path | None:
    try:
        return open_run(folder, arguments_of(folder))
    finally:
        if (file := held_locks.pop(folder.resolve(), None)) is not None:
            file.close()


def test_leftovers_by_name(killed, tmp_path):
    """Only what a killed run of ours can leave goes."""
    folder = copy_of(killed, tmp_path / "run")
    mine = write(folder / ".mine.attnres-tmp-deadbeef")
    ours = [".run.json.attnres-tmp-deadbeef", "..run.json.attnres-tmp-deadbeef.attnres-tmp-0a0a0a0a"]
    ours += [".metrics.jsonl.attnres-tmp-deadbeef"]
    for name in ours:
        write(folder / name)
    assert taken_up(folder) == folder / "checkpoint-6"
    assert mine.read_text() == "mine" and not any((folder / name).exists() for name in ours)


def test_empty_mark(tmp_path):
    """A folder with an empty file under the name of the mark is nobody's leftover: a mark is made in one step."""
    marked = write(tmp_path / ".dst.attnres-tmp-11111111" / staging.MARK, "")
    staging.recover(tmp_path / "dst")
    assert marked.exists()
    work = tmp_path / ".dst.attnres-tmp-22222222"
    work.mkdir()
    staging.mark(work, tmp_path / "dst")
    assert os.listdir(work) == [staging.MARK] and len(os.listdir(tmp_path)) == 2
    staging.recover(tmp_path / "dst")
    assert not work.exists()


def test_other_model_under_a_run(server, command, killed, tmp_path):
    """A run doesn't go on as another model."""
    folder = server.folder / "as-another"
    save_donor(tmp_path / "donor", num_hidden_layers=2)
    options = ["--model", tmp_path / "donor", "--tokenizer", killed / "checkpoint-2"]
    options += ["--mode", "full", "--seq-len", 32, "--batch-size", 4, "--save-steps", 2, "--eval-steps", 2]
    options += ["--depth-every", 0, "--steps", 4, "--data", command[-1], "--output", folder.name]
    options += ["--resize-embeddings"]
    run(server, *options)
    (folder / "results.json").unlink()
    run(server, *options)
    (folder / "results.json").unlink()
    path = folder / "converted" / "config.json"
    path.write_text(path.read_text().replace('"full"', '"block"'))
    printed = run(server, *options, exit_code=1)
    assert "is of a model with attn_res_mode = full, not block" in printed and "Traceback" not in printed


@pytest.mark.parametrize("name", ["", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_list_without_files(name, killed, tmp_path, capsys):
    """A list that lacks what a checkpoint can't be without is no list, and no unlisted file is read."""
    folder = copy_of(killed, tmp_path / "run")
    path = folder / "checkpoint-6" / "files.json"
    content = json.loads(path.read_text())
    content["files"] = {file: entry for file, entry in content["files"].items() if name and file != name}
    path.write_text(json.dumps(content))
    assert checkpoints.last_good_checkpoint(folder) == folder / "checkpoint-4"
    assert "files.json lists no" in capsys.readouterr().err
    write(folder / "checkpoint-4" / "adapter_model.safetensors")
    assert checkpoints.last_good_checkpoint(folder) == folder / "checkpoint-2"
    assert "files.json lists no adapter_model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["pytorch_model_fsdp_0/a.distcp", "optimizer_0/a.distcp", "scheduler.pt", "rng_state_0.pth"], None),
        (["pytorch_model_fsdp_0/a.distcp", "scheduler.pt", "rng_state_0.pth"], "optimizer"),
        (["pytorch_model_fsdp.bin", "optimizer.bin", "scheduler.pt", "rng_state_0.pth"], None),
        (["adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"], None),
        (["model-00001-of-00002.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"], "model.safetensors"),
        (["model.safetensors", "global_step4/a.pt", "latest", "rng_state_0.pth"], None),
    ],
)
def test_kinds_of_checkpoints(names, lacks):
    assert checkpoints.not_listed(dict.fromkeys([*names, "trainer_state.json"])) == lacks


def test_checkpoint_of_another_run(killed, tmp_path, capsys):
    """It is left alone."""
    folder = copy_of(killed, tmp_path / "run")
    path = folder / "checkpoint-6" / "files.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "run": "0123456789abcdef"}))
    assert checkpoints.last_good_checkpoint(folder) == folder / "checkpoint-4"
    assert "checkpoint-6 is of another run; it is left alone, and the run" in capsys.readouterr().err
    assert (folder / "checkpoint-6").is_dir()
    assert [path.name for path in checkpoints.checkpoints(folder)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("change", [{"held_out_loss": float("nan")}, {"steps": 9}])
def test_impossible_results(change, finished, tmp_path):
    shutil.copy(finished / "run.json", tmp_path)
    content = json.loads((finished / "results.json").read_text())
    path = write(tmp_path / "results.json", json.dumps(content))
    assert read_results(path)["steps"] == 8
    write(path, json.dumps({**content, **change}))
    with pytest.raises(InputError, match="results.json is damaged, it has a held_out_loss of .* after . steps;"):
        read_results(path)


@pytest.mark.parametrize("name", ["tensorboard", "tensorboard/depth", "loss.png", "depth.jsonl"])
def test_wrong_kinds(name, killed, tmp_path):
    """What would be in the way after training is said before."""
    folder = copy_of(killed, tmp_path / "run")
    if name.startswith("tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)
        write(folder / name)
    else:
        write(folder / name / "a")
    before = state(folder)
    with pytest.raises(InputError, match=f"{name} is no (folder|regular file); move it away"):
        taken_up(folder)
    assert state(folder) == before


def test_refused_by_a_panic(tmp_path):
    """What isn't even an Exception leaves nothing behind either."""

    class PanicException(BaseException):
        pass

    open_run(tmp_path / "out", {"resize_embeddings": False})
    with pytest.raises(PanicException), discarded_if_refused(tmp_path / "out"):
        raise PanicException
    assert os.listdir(tmp_path) == []
