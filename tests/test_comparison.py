# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Comparisons: runs with options of their own, several at a time, tuned, and what their tables say."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from attnres_convert import InputError
from attnres_recipes import comparison
from attnres_recipes.data import load_documents, package_files
from attnres_recipes.defaults import RATES
from attnres_recipes.options import FinetuneOptions, PretrainOptions
from attnres_recipes.resampling import interval_of_mean
from pretrain_process import TINY, Server


TEXT = "\n\n".join(f"{number} times {number} is {number * number}, as {number} knows." for number in range(900))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        server = Server(tmp_path_factory.mktemp("comparison"))
        (server.folder / "text.txt").write_text(TEXT)
        yield server
        server.stop()


def test_runs_with_options_of_their_own():
    """Each has its name, its folder and its options; a swept one comes last."""
    given = PretrainOptions(
        config="llama",
        output="out",
        compare="donor:learning_rate=6e-3,block:learning_rate=3e-3:block_size=2,block",
        sweep=["seed=4,5"],
    )
    runs = {name: given.variant(name, values) for name, values in given.variants()}
    assert list(runs)[:3] == ["donor learning_rate=6e-3 seed=4", "donor learning_rate=6e-3 seed=5"] + [
        "block learning_rate=3e-3 block_size=2 seed=4"
    ]
    found = [(run.mode, run.learning_rate, run.block_size, run.seed, run.output.name) for run in runs.values()]
    assert found[0] == ("donor", 6e-3, None, 4, "donor,learning_rate=6e-3,seed=4")
    assert found[3] == ("block", 3e-3, 2, 5, "block,learning_rate=3e-3,block_size=2,seed=5")
    assert found[4] == ("block", None, None, 4, "block,seed=4")
    assert all(run.compare == "" and run.sweep == [] and run.tune is None and run.jobs == 1 for run in runs.values())
    fields = PretrainOptions(
        config="llama",
        set={"hidden_size": 32, "hidden_act": "silu"},
        output="out",
        compare="donor,full:set.attn_res_sum_scale=true",
        sweep=["set.hidden_size=64,96"],
    )
    found = {name: fields.variant(name, values).set for name, values in fields.variants()}
    assert list(found)[3] == "full set.attn_res_sum_scale=true set.hidden_size=96"
    assert found[list(found)[3]] == {"hidden_size": 96, "hidden_act": "silu", "attn_res_sum_scale": True}
    assert found["donor set.hidden_size=64"] == {"hidden_size": 64, "hidden_act": "silu"}
    methods = FinetuneOptions(model="m", output="out", compare="lora:mode=donor,lora:lora_rank=4,depth")
    assert [values["method"] for _, values in methods.variants()] == ["lora", "lora", "depth"]


def fake_trials(monkeypatch, loss_of) -> list[str]:
    """Has trials end at once with the loss that `loss_of(learning rate)` says; returns the names of all runs."""
    names = []

    def train_all(command, runs, jobs, *counts):
        names.extend(runs)
        return {name: loss_of(run) for name, run in runs.items()}

    monkeypatch.setattr(comparison, "train_all", train_all)
    return names


def tuning(**options) -> PretrainOptions:
    given = {"config": "llama", "output": "out", "compare": "donor,block", "tune": "learning_rate=1e-3,2e-3"}
    return PretrainOptions(**{**given, **options})


def test_tuning_goes_beyond_an_edge(monkeypatch, capsys):
    """Until the best value has a worse one on either side, for each run by itself; failures count as worst."""
    best_of = {"donor": 8e-3, "block": 2.5e-4}

    def loss_of(run):
        if run.learning_rate > 0.01:
            return {"what": "loss", "value": "nan", "step": 3}
        return {"held_out_loss": abs(np.log(run.learning_rate / best_of[run.mode]))}

    names = fake_trials(monkeypatch, loss_of)
    given = tuning(sweep=["seed=3,4"], tune_steps=5)
    trials = comparison.tune("pretrain", given, {})
    assert [comparison.best(tried) for tried in trials.values()] == pytest.approx([8e-3, 2.5e-4])
    assert sorted(trials["donor"]) == pytest.approx([1e-3, 2e-3, 4e-3, 8e-3, 16e-3])
    assert sorted(trials["block"]) == pytest.approx([1.25e-4, 2.5e-4, 5e-4, 1e-3, 2e-3])
    assert trials["donor"][max(trials["donor"])] == np.inf
    assert names[0] == "donor learning_rate=0.001 seed=3 steps=5" and not any("seed=4" in name for name in names)
    assert len(set(names)) == len(names) == 10
    assert capsys.readouterr().err == ""
    table = comparison.trials_table(trials, given).splitlines()
    assert "tried learning_rate, 5 steps" in table[0]
    assert "**0.0000**" in table[2] and table[2].count("**") == 2 and " inf " in table[2] and " - " in table[3]
    assert table[-1].startswith("Chosen by the held-out loss of the first seed") and "At an edge" not in table[-2]


def test_tuning_of_multiples(monkeypatch):
    """Are of each run's own default."""
    given = FinetuneOptions(model="m", output="out", compare="lora,full", tune="learning_rate=x0.5,x2,x1")
    default = {method: RATES[method]["learning_rate"] for method in ("lora", "full")}
    fake_trials(monkeypatch, lambda run: {"held_out_loss": abs(np.log(run.learning_rate / default[run.method]))})
    trials = comparison.tune("finetune", given, {})
    for method, tried in trials.items():
        assert sorted(tried) == pytest.approx([factor * default[method] for factor in (0.5, 1, 2)])
        assert comparison.best(tried) == default[method]


def test_tuning_ends(monkeypatch, capsys):
    """Where the loss falls for ever, it ends after a few values, and says so."""
    fake_trials(monkeypatch, lambda run: {"held_out_loss": -run.learning_rate})
    given = tuning(compare="", mode="full")
    trials = comparison.tune("pretrain", given, {})
    assert list(trials) == ["all"] and len(trials["all"]) == 2 + comparison.MOST_BEYOND
    assert "all: the best learning_rate that was tried, 0.032, is at an edge" in capsys.readouterr().err
    assert "At an edge of what was tried: all." in comparison.trials_table(trials, given)


def test_tuning_ends_where_values_do(monkeypatch, capsys):
    """Beyond the limits of an option nothing is tried, and where all fail, smaller values are."""
    fake_trials(monkeypatch, lambda run: {"held_out_loss": -run.min_lr_ratio})
    trials = comparison.tune("pretrain", tuning(compare="", tune="min_lr_ratio=0.5,0.9"), {})
    assert list(trials["all"]) == [0.5, 0.9] and "0.9, is at an edge" in capsys.readouterr().err
    fake_trials(monkeypatch, lambda run: {"what": "loss", "value": "nan", "step": 3})
    trials = comparison.tune("pretrain", tuning(compare=""), {})
    assert len(trials["all"]) == 2 + comparison.MOST_BEYOND and comparison.best(trials["all"]) == min(trials["all"])
    assert "is at an edge" in capsys.readouterr().err


def test_the_best_is_trained_with_all_seeds(server):
    """Two at a time, from the first weights that --init says; what has been trained is not trained again."""
    options = [*TINY, "--set=num_hidden_layers=2", "--data=text.txt", "--steps=4", "--depth-every=0", "--init=scaled"]
    options += ["--mode=block", "--sweep=seed=0,1", "--tune=learning_rate=1e-4,0.02,9", "--tune-steps=3"]
    options += ["--jobs=2", "--save-steps=1", "--keep-checkpoints=0", "--output=tuned"]
    printed = server.run(*options)
    folder = server.folder / "tuned"
    found = json.loads((folder / "comparison.json").read_text())
    losses = found["trials"]["all"]
    assert found["at_an_edge"] == []
    assert found["best"] == {"all": {"learning_rate": "0.02"}} and losses["0.02"] == min(losses.values())
    for value, loss in losses.items():
        trial = json.loads((folder / f"learning_rate={value},seed=0,steps=3" / "results.json").read_text())
        assert trial["held_out_loss"] == loss and trial["steps"] == 3
        assert trial["arguments"]["learning_rate"] == float(value) and trial["arguments"]["init"] == "scaled"
    assert list(found["runs"]) == [f"learning_rate=0.02 seed={seed}" for seed in (0, 1)]
    assert all(run["steps"] == 4 for run in found["runs"].values())
    text = (folder / "comparison.md").read_text()
    assert text in printed and "tried learning_rate" in text and ", 2 of " in printed
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")}
    again = server.run(*options).splitlines()
    assert list(folder.glob("*/checkpoint-*")) == [] and len(list(folder.glob("*/model/model.safetensors"))) == 5
    assert len(before) == 5 and not any(line.startswith("--- ") for line in again)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*/results.json")} == before
    assert "holds a run with init = scaled, not default" in server.run(*options, "--init=default", exit_code=1)


def test_progress():
    """Which run of how many begins, and how long the rest takes if they take as long as those that have ended."""
    now = time.monotonic()
    assert comparison.progress(0, 0, 1, now) == "" and comparison.progress(0, 1, 6, now) == ", 2 of 6 in this round"
    assert comparison.progress(2, 1, 6, now - 121) == ", 4 of 6 in this round, about 4 min to its end"
    assert comparison.progress(5, 0, 6, now - 100) == ", 6 of 6 in this round, about 1 min to its end"


def test_interrupted(server):
    """Runs that go on beside one another are interrupted with the comparison, and go on with the same command."""
    options = [
        *TINY,
        "--set=num_hidden_layers=2",
        "--data=text.txt",
        "--steps=300",
        "--save-steps=10",
        "--depth-every=0",
    ]
    options += ["--compare=donor,block", "--jobs=2", "--eval-steps=300", "--output=interrupted"]
    run = server.start(*options)
    folders = [server.folder / "interrupted" / mode for mode in ("donor", "block")]
    assert run.wait_for(lambda: all(list(folder.glob("checkpoint-*")) for folder in folders), seconds=120)
    os.kill(run.process.pid, signal.SIGINT)
    assert run.finish(130).count("interrupted; the same command goes on") == 1
    sizes = [(folder / "metrics.jsonl").stat().st_size for folder in folders]
    time.sleep(1)
    assert [(folder / "metrics.jsonl").stat().st_size for folder in folders] == sizes
    assert not any((folder / "results.json").exists() for folder in folders)
    assert "going on from" in server.run(*options)


def test_differences_are_paired():
    """By seed, with an interval over seeds; what isn't finished or has no partner is left out."""
    losses = {"donor": {0: 5.0, 1: 6.0, 2: 4.0}, "block": {0: 4.9, 1: 5.8, 2: 3.7}, "full": {1: 6.5}, "hc": {0: 1.0}}
    runs = {f"{m} seed={s}": {"held_out_loss": loss} for m, own in losses.items() for s, loss in own.items()}
    runs["full seed=2"] = {"what": "loss", "value": "nan", "step": 3}
    found = comparison.paired_differences(runs)
    assert list(found) == ["block"] and found["block"]["seeds"] == pytest.approx({"0": -0.1, "1": -0.2, "2": -0.3})
    assert "0: -0.1000, 1: -0.2000, 2: -0.3000" in comparison.differences_table(found)
    assert found["block"]["mean"] == pytest.approx(-0.2)
    low, high = found["block"]["interval"]
    assert -0.301 < low < -0.25 and -0.15 < high < -0.099
    assert comparison.paired_differences({name: run for name, run in runs.items() if "seed=0" in name}) == {}
    failed = {"what": "loss", "value": "nan", "step": 3}
    without_base = {name: failed if "donor" in name else run for name, run in runs.items()}
    assert comparison.paired_differences(without_base) == {}
    same = {name.replace("block", "again"): run for name, run in runs.items() if "block" not in name}
    assert comparison.paired_differences(same) == {}


def test_interval_of_mean():
    """Holds the mean of where values come from as often as it says, or a bit less for few of them."""
    generator = np.random.default_rng(0)
    held = {
        number: np.mean([low <= 0 <= high for low, high in map(interval_of_mean, generator.normal(size=(300, number)))])
        for number in (3, 20)
    }
    assert 0.65 < held[3] < 0.9 < held[20] < 0.98


def test_sources_of_packages():
    """`site-packages` is the source of what is installed, in an order of which a slice is like the whole."""
    files = package_files()
    assert len(files) > 1000 and files == package_files()
    assert all(file.suffix == ".py" and {"test", "tests"}.isdisjoint(file.parts) for file in files)
    packages = [file.parts[file.parts.index("site-packages") + 1] for file in files]
    assert {"transformers", "torch"} <= set(packages[:200])
    with pytest.raises(InputError, match="site-packages goes with no other data"):
        load_documents(["site-packages", str(Path(__file__))])
