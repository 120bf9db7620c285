# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/gpu.py, rehearsed on the CPU: that stages run, are named when they fail or hang, and end in time."""

import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
import gpu_tuning  # noqa: E402
from gpu_worker import SETTINGS, Gate, Pool, Worker, WorkerError  # noqa: E402


def rehearse(output: Path, *arguments) -> tuple[int, dict, dict]:
    """Exit code, last line and what gpu.json holds."""
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--tiny", "--output", str(output)]
    done = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, text=True)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), json.loads((output / "gpu.json").read_text())


def check_output(output: Path):
    assert sorted(path.name for path in output.iterdir()) == ["gpu.json", "gpu.md", "logs.txt"]


@pytest.mark.slow
def test_stages(tmp_path):
    """Stages run side by side, and their results are in one file."""
    code, last, content = rehearse(tmp_path, "--minutes", "4", "--stages", "card", "profile")
    assert (code, last["failed"]) == (0, {})
    assert content["stages"]["card"]["results"]["copy_gigabytes_per_second"] > 0
    profiles = content["stages"]["profile"]["results"]["profiles"]
    assert {(row["variant"].split()[0], row["what"]) for row in profiles} == {
        (variant, what) for variant in ("stock", "block") for what in ("eager", "compiled")
    }
    assert all(row["ms"] > 0 and len(row["kernels"]) == 15 for row in profiles)
    check_output(tmp_path)
    assert "## profile" in (tmp_path / "gpu.md").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_measurements(tmp_path):
    """The rehearsal of what takes least: each check of a kernel holds, each case of each variant is timed."""
    stages = ["correctness", "kernels", "models"]
    limits = [f"{name}=700" for name in stages]
    options = ("--stages", *stages, "--eager-shapes", "qwen3", "--limit", *limits)
    code, last, content = rehearse(tmp_path, "--minutes", "14", *options)
    assert (code, last["failed"]) == (0, {})
    results = {name: stage["results"] for name, stage in content["stages"].items()}
    assert results["correctness"]["tasks_done"] == results["correctness"]["tasks"]
    assert results["correctness"]["checks"] > 80
    rows = results["models"]["rows"]
    cases = {(row["case"], row["compiled"]) for row in rows}
    assert cases == {(case, c) for case in ("training", "prefill", "decoding") for c in (True, False)}
    assert {row["shape"] for row in rows} == {"large", "qwen3"} and len(rows) == 6 * 3 + 1 + 3
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["variant"] == "stock")
    assert {row["kernel"] for row in results["kernels"]["rows"]} == {
        *("phase 1 forward", "phase 1 backward", "phase 1 backward, sources alone"),
        *("step forward", "step backward", "whole read", "32 reads of a token"),
    }
    check_output(tmp_path)


def run(tmp_path, stages: list[gpu.Stage], minutes: str = "1") -> tuple[int, dict]:
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--tiny", "--minutes", minutes, "--output", str(tmp_path)], stages)
    return ended.value.code, json.loads((tmp_path / "gpu.json").read_text())["stages"]


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_hanging_and_failing_stages(tmp_path, capsys):
    """They are named with a line of reason, the others run, and nothing of them is left."""
    child = "import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code, stages = run(
        tmp_path,
        [
            gpu.Stage("card", python("raise ValueError('no card')"), 30, 0),
            gpu.Stage("models", python(f"{child}; print(p.pid, flush=True); time.sleep(600)"), 2, 1),
            gpu.Stage("profile", python("print('fine')"), 30, 1),
            gpu.Stage("kernels", python("raise SystemExit(3)"), 30, 2),
        ],
    )
    assert code == 1
    assert {name: stage["failure"] for name, stage in stages.items()} == {
        "card": "ValueError: no card",
        "models": "not done within 2 s",
        "profile": None,
        "kernels": "ended with 3 and no output",
    }
    log = (tmp_path / "logs.txt").read_text()
    assert "Traceback" in log and "=== profile\nfine" in log
    pid = int(log.split("=== models\n")[1].split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["failed"].keys() == {"card", "models", "kernels"}


def test_ends_within_its_minutes(tmp_path):
    started = time.monotonic()
    sleep = python("import time; time.sleep(600)")
    code, stages = run(
        tmp_path, [gpu.Stage("card", sleep, 600, 1), gpu.Stage("models", sleep, 600, 1)], minutes=str(6 / 60)
    )
    assert code == 1 and time.monotonic() - started < 6
    assert stages["card"]["failure"] == "the minutes have passed"
    assert stages["models"]["failure"] == "the minutes have passed before it began"


def test_long_logs(tmp_path):
    """The beginning and the end of a long log are kept."""
    run(tmp_path, [gpu.Stage("card", python("print('first'); print('x' * 10 ** 6); print('last')"), 30, 0)])
    log = (tmp_path / "logs.txt").read_text()
    assert len(log) < 210 * 1024 and "first" in log and log.rstrip().endswith("last")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    content = {
        "device": "cpu",
        "tiny": True,
        "folder": str(tmp_path),
        "deadline": time.time() + 60,
        "shapes": None,
        "eager_shapes": [],
    }
    monkeypatch.setenv(SETTINGS, json.dumps(content))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))


def test_worker(settings, tmp_path):
    """A worker calls functions of a module; what it prints isn't taken for an answer. Failures are one line."""
    (tmp_path / "work.py").write_text(
        "import os, time\ndef add(a, b):\n    print('noise')\n    return a + b\n"
        "def fail():\n    raise ValueError('no\\nsuch thing')\ndef end():\n    os._exit(5)\n"
    )
    worker = Worker("work")
    worker.send("add", a=1, b=2)
    worker.send("fail")
    assert worker.receive(30) == 3
    with pytest.raises(WorkerError, match="^ValueError: no$"):
        worker.receive(30)
    with pytest.raises(WorkerError, match="ended with 5") as ended:
        worker.call("end", 30)
    assert ended.value.is_gone


def test_gate(settings):
    """Many may be inside together, and one alone only after they have left."""
    first, second, alone = Gate(), Gate(), Gate()
    first.enter()
    second.enter()
    with pytest.raises(BlockingIOError):
        fcntl.flock(alone.room, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.leave()
    second.leave()
    with alone(alone=True), pytest.raises(BlockingIOError):
        fcntl.flock(first.room, fcntl.LOCK_SH | fcntl.LOCK_NB)


def test_gate_before_timing(settings):
    """Who wants to be alone neither enters nor keeps others out before the first checks are through."""
    first, alone, other = Gate(), Gate(), Gate()
    with first.before_timing():
        thread = threading.Thread(target=alone.enter, args=(True,), daemon=True)
        thread.start()
        thread.join(0.2)
        assert not alone.inside
        with other():
            pass
    thread.join(30)
    assert alone.inside


def test_pool(settings, tmp_path):
    """All tasks are done by as many workers as there are, and one that ends is replaced."""
    (tmp_path / "pool_work.py").write_text(
        "import os\ndef double(number):\n    return os._exit(3) if number == 2 else 2 * number\n"
    )
    pool, found = Pool("pool_work", 2), {}
    pool.run("double", [{"number": n} for n in range(6)], lambda task, *rest: found.update({task["number"]: rest}), 30)
    pool.close()
    assert {number: rest[0] for number, rest in found.items()} == {0: 0, 1: 2, 2: None, 3: 6, 4: 8, 5: 10}
    assert [rest[1] for _, rest in sorted(found.items())] == [None] * 2 + ["the process ended with 3"] + [None] * 3


def test_joined_candidates():
    """The best value of each name that gains something is added to those that gain more."""
    candidates = {"{}": {}, "a1": {"a": 1}, "a2": {"a": 2}, "b": {"b": 1}, "c": {"c": 1}, "d": {"d": 1}}
    seconds = {"{}": 1.0, "a1": 0.9, "a2": 0.5, "b": 0.8, "c": 0.995, "d": 0.7}
    assert gpu_tuning.joined(seconds, candidates) == [{"a": 2, "d": 1}, {"a": 2, "d": 1, "b": 1}]


def test_limits():
    """Time and memory above what they may be are named; there are none for eager decoding."""
    shape = {"shape": "large", "blocks": 2, "batch_size": 3, "seq_len": 5, "hidden_size": 7, "itemsize": 2}

    def row(variant, case, ratio, compiled=False, memory=None):
        ratio = [ratio] * 3
        return {
            **shape,
            **{"variant": variant, "case": case, "compiled": compiled, "ratio": ratio, "peak_memory_bytes": memory},
        }

    rows = [
        row("stock", "training", 1.0, memory=1000),
        row("block triton", "training", 0.99, memory=1000 + 420),
        row("full triton", "training", 1.09, memory=9000),
        row("block two_phase", "training", 2.0, memory=9000),
        row("block triton", "decoding", 2.0),
        row("block triton", "decoding", 1.01, compiled=True),
    ]
    assert gpu.above_limits(rows) == []
    rows[1]["peak_memory_bytes"] += 1
    rows[2]["ratio"] = [1.0, 1.2, 1.3]
    rows[5]["ratio"] = [1.0, 1.03, 1.3]
    above = gpu.above_limits(rows)
    assert [line.split(":")[0] for line in above] == [
        "large, training, eager, block triton",
        "large, training, eager, full triton",
        "large, decoding, compiled, block triton",
    ]
    assert "MB" in above[0] and above[1].endswith("1.200 of the time, at most 1.10")


@pytest.fixture
def checks(settings, monkeypatch):
    """The module, at the sizes that a GPU checks."""
    content = json.loads(os.environ[SETTINGS])
    monkeypatch.setenv(SETTINGS, json.dumps({**content, "tiny": False}))
    import gpu_checks

    return gpu_checks


@pytest.mark.parametrize("mode", ["block", "full"])
def test_bound_of_models(checks, mode):
    """Other implementations are within what is allowed; a model with one other query is far from it."""
    model, input_ids = checks.new_model("llama", mode), checks.token_ids(2, 48)
    exact, readable = (
        checks.loss_and_gradients(checks.as_eager(model, dtype), input_ids) for dtype in (torch.float64, torch.float32)
    )
    model.set_attn_res_implementation("two_phase")
    row = checks.model_row("two phases", torch.float32, checks.loss_and_gradients(model, input_ids), readable, exact)
    assert row["error"] < row["bound"] < 5e-5
    with torch.no_grad():
        model.base_model.depth_attention.query[2] *= 1.1
    row = checks.model_row("another", torch.float32, checks.loss_and_gradients(model, input_ids), readable, exact)
    assert row["error"] > 100 * row["bound"]


class Devices(TorchDispatchMode):
    """Notes where tensors are."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)]
        self.found |= {tensor.device.type for tensor in tensors}
        return result


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_forward_that_a_graph_captures(checks, family):
    """It touches no tensor on the CPU and waits for no value, which meta tensors don't have."""
    model = checks.new_model(family, "block").eval().to("meta")
    model.set_attn_res_implementation("eager")
    input_ids = checks.token_ids(2, 48).to("meta")
    with Devices() as devices, torch.no_grad():
        checks.unwaiting_forward(model, input_ids)
    assert devices.found == {"meta"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--limit", "models"], "give a stage and seconds"),
        (["--stages", "model"], "invalid choice"),
        (["--minutes", "0"], "--minutes must be above 0"),
        (["--site", "/nowhere"], "is not a folder"),
    ],
    ids=["limit", "stage", "minutes", "site"],
)
def test_refuses_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as refused:
        gpu.main(arguments)
    assert refused.value.code == 2 and message in capsys.readouterr().err
