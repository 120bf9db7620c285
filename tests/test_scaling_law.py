# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Scaling laws: fits find the laws that made-up losses follow, FLOPs are those that torch counts, a ladder goes on."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from attnres_convert import InputError
from attnres_convert.writing import write_json
from attnres_recipes import scaling
from attnres_recipes.laws import PAPER, PAPER_COMPUTE, analyse, multiplier
from attnres_recipes.options import ScalingOptions
from attnres_recipes.run import held_locks, unlock
from attnres_recipes.scaling import (
    Ladder,
    new_rung,
    non_embedding,
    plot_laws,
    points_table,
    read_comparison,
    training_flops,
)
from families import tokens
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM


SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import scaling_law  # noqa: E402


VARIANTS, COMPUTE = ["donor", "block", "full"], [2e-6, 1e-5, 4e-5, 2e-4]
A, ALPHA, NOISE = 1.9, 0.06, 0.002  # NOISE: deviation of a log loss


def made_up(laws: dict, seeds: int = 3, noise: float = NOISE, compute=COMPUTE, shared: float = 0.0) -> list[dict]:
    """Points of known laws; `shared` is the deviation of what all variants of a seed have in common."""
    generator, points = np.random.default_rng(5), []
    for size, at in enumerate(compute):
        for seed in range(seeds):
            common = generator.normal(0, shared) if shared else 0.0
            for variant, (factor, exponent) in laws.items():
                log_loss = np.log(factor) - exponent * np.log(at) + common + generator.normal(0, noise)
                point = {"size": f"{size}x1", "variant": variant, "seed": seed, "loss": float(np.exp(log_loss))}
                points.append({**point, "compute": at})
    return points


def test_a_fit_finds_the_law():
    """A and alpha of noisy losses are near those that made them, which their intervals hold (of so many seeds: those of
    few are too narrow, as another test counts)."""
    laws = {"donor": (A, ALPHA), "block": (1.87, 0.062)}
    found = analyse(made_up(laws, seeds=12), ["donor", "block"])
    for variant, (factor, exponent) in laws.items():
        law = found["fits"][variant]
        assert law["alpha"] == pytest.approx(exponent, abs=2e-3) and law["A"] == pytest.approx(factor, rel=0.03)
        for name, value in (("A", factor), ("alpha", exponent)):
            low, high = law[f"{name}_interval"]
            assert low < value < high and high - low < 0.1 * value
    exact = analyse(made_up(laws, noise=0), ["donor", "block"])["fits"]["donor"]
    assert (exact["A"], exact["alpha"]) == pytest.approx((A, ALPHA), rel=1e-9) and exact["largest_misfit"] < 1e-9


def test_multiplier_of_a_shifted_law():
    """A law that has at C the loss of another at 1.25 C saves a fifth of the compute, whichever exponent it has."""
    shifted = {"donor": (A, ALPHA), "block": (A * 1.25**-ALPHA, ALPHA)}
    exact = analyse(made_up(shifted, noise=0), ["donor", "block"])["multipliers"]["block"]
    assert exact["value"] == pytest.approx(1.25) and exact["compute"] == pytest.approx(COMPUTE[-1])
    noisy = analyse(made_up(shifted, noise=5e-4, shared=0.02), ["donor", "block"])
    low, high = noisy["multipliers"]["block"]["interval"]
    assert 1.1 < low < 1.25 < high < 1.4, "what all variants of a seed have in common cancels"
    assert not any("holds 1" in line for line in noisy["limits"])
    steeper = {"donor": (A, ALPHA), "block": (A * (COMPUTE[-1] / 2) ** (0.07 - ALPHA) * 1.25**-ALPHA, 0.07)}
    factor, exponent = steeper["block"]
    needed = (A / (factor * COMPUTE[-1] ** -exponent)) ** (1 / ALPHA)  # A C^-ALPHA is that loss
    value = analyse(made_up(steeper, noise=0), ["donor", "block"])["multipliers"]["block"]["value"]
    assert value == pytest.approx(needed / COMPUTE[-1])


def test_multiplier_of_the_paper():
    """The paper's laws give the 1.25 that it states for Block."""
    laws = {name: np.array([np.log(factor), exponent]) for name, (factor, exponent) in PAPER.items()}
    assert multiplier(laws["donor"], laws["block"], np.log(PAPER_COMPUTE)) == pytest.approx(1.25, abs=0.005)


def test_nothing_is_concluded_from_equal_laws():
    """A negative control: of the same law with other noise, and of the same losses, the interval holds 1, which is
    said."""
    found = analyse(made_up({"donor": (A, ALPHA), "block": (A, ALPHA)}), ["donor", "block"])
    low, high = found["multipliers"]["block"]["interval"]
    assert low < 1 < high
    assert any("block: the interval" in line and "nothing can be concluded" in line for line in found["limits"])
    points = [point for point in made_up({"donor": (A, ALPHA)}) if point["variant"] == "donor"]
    same = analyse([*points, *({**point, "variant": "block"} for point in points)], ["donor", "block"])
    assert same["multipliers"]["block"]["interval"] == pytest.approx([1, 1])
    assert {row["mean"] for row in same["differences"]} == {0.0}
    assert any("holds 1" in line for line in same["limits"])


def test_intervals_hold_the_truth_as_often_as_seeds_allow():
    """With eight seeds most intervals hold the law that made the losses; with three, too few, as the report says."""
    laws = {"donor": (A, ALPHA), "block": (A * 1.25**-ALPHA, ALPHA)}
    held = {}
    for seeds in (3, 8):
        held[seeds] = 0
        for trial in range(40):
            points = made_up(laws, seeds)
            generator = np.random.default_rng(trial)
            for point in points:
                log_loss = np.log(laws[point["variant"]][0]) - ALPHA * np.log(point["compute"])
                point["loss"] = float(np.exp(log_loss + generator.normal(0, NOISE)))
            low, high = analyse(points, ["donor", "block"])["multipliers"]["block"]["interval"]
            held[seeds] += low < 1.25 < high
    assert held[8] >= 34 and 24 <= held[3] <= held[8], held


def test_differences_are_paired():
    """At each size they are those of runs with the same seed, also where one variant lacks a seed."""
    points = made_up({"donor": (A, ALPHA), "block": (1.8, ALPHA)}, noise=0, shared=0.1)
    found = analyse([point for point in points if point["loss"] != points[0]["loss"]], ["donor", "block"])
    first, second = found["differences"][:2]
    assert list(first["seeds"]) == ["1", "2"] and list(second["seeds"]) == ["0", "1", "2"]
    losses = {(point["variant"], point["seed"]): point["loss"] for point in points if point["size"] == "0x1"}
    assert first["seeds"]["2"] == pytest.approx(losses["block", 2] - losses["donor", 2])
    assert first["interval"][0] < first["mean"] < first["interval"][1] < 0


def test_few_seeds_and_sizes():
    """One seed gives laws without intervals, one size no law, and both say so; a rising loss gives no multiplier."""
    laws = {"donor": (A, ALPHA), "block": (1.8, ALPHA)}
    one = analyse(made_up(laws, seeds=1, compute=COMPUTE[:3]), ["donor", "block"])
    assert set(one["fits"]["donor"]) == {"A", "alpha", "largest_misfit"} and "interval" not in one["differences"][0]
    assert "interval" not in one["multipliers"]["block"]
    assert [line[:20] for line in one["limits"][:2]] == ["A size has 1 seed al", "3 sizes can't tell a"]
    small = analyse(made_up(laws, compute=COMPUTE[:1]), ["donor", "block"])
    assert small["fits"] == {} == small["multipliers"] and "nothing is fitted" in " ".join(small["limits"])
    rising = analyse(made_up({"donor": (A, -ALPHA), "block": (1.8, ALPHA)}), ["donor", "block"])
    assert rising["multipliers"]["block"]["value"] is None is rising["multipliers"]["block"]["interval"]
    assert "doesn't fall" in " ".join(rising["limits"])
    with pytest.raises(InputError, match="no size has a loss of every variant"):
        analyse(made_up({"donor": (A, ALPHA)}), ["donor", "block"])


def test_limits_say_how_far_away_the_paper_is():
    found = analyse(made_up({"donor": (A, ALPHA)}), ["donor"])
    assert "takes 0.0002 PFLOP/s-days" in found["limits"][-1] and "2.8e+04 times as much" in found["limits"][-1]


def options(folder: Path, **others) -> ScalingOptions:
    values = {"sizes": "32x2", "vocab": 300, "seq_len": 32, "batch_size": 4, "eval_sequences": 8}
    return ScalingOptions(output=folder, **{**values, "seeds": "0", "learning_rates": "1e-2", **others})


@pytest.mark.parametrize("size", ["32x2", "96x9"])
def test_flops(size, tmp_path):
    """Torch counts the FLOPs of matrices that the formula has, forward and backward, but for those of attention over
    tokens, and has less for norms, whose gains the formula counts as parameters."""
    rung = new_rung(options(tmp_path, sizes=size), size, 300)
    config = rung.models["donor"].config
    config._attn_implementation = "eager"
    model, ids = AutoModelForCausalLM.from_config(config), tokens(2, 16)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    layers, width = config.num_hidden_layers, config.hidden_size
    attention = 3 * 4 * 16 * width * layers * ids.numel()  # scores and sums; eager computes what the mask hides
    counted = counter.get_total_flops() - attention
    assert training_flops(rung.models["donor"]) * ids.numel() == pytest.approx(counted, rel=0.02)
    norms = 6 * (2 * layers + 1) * width * ids.numel()
    # the first layer's input needs a gradient too, as it is the embedding's
    assert training_flops(rung.models["donor"]) * ids.numel() - norms == counted
    assert non_embedding(rung.models["donor"]) == model.num_parameters() - 300 * width


@pytest.mark.parametrize("variant", ["block", "full"])
def test_flops_of_reads(variant, tmp_path):
    """What AttnRes adds is 6 n d for each read forward, with n the sources whose weights the model returns."""
    rung = new_rung(options(tmp_path, sizes="32x9"), "32x9", 300)
    model = AutoModelForCausalLM.from_config(rung.models[variant].config)
    with torch.no_grad():
        weights = model(input_ids=tokens(1, 5), output_depth_attentions=True).depth_attentions
    added = training_flops(rung.models[variant]) - training_flops(rung.models["donor"])
    assert added == 3 * sum(6 * read.shape[1] * 32 for read in weights)
    assert model.num_parameters() == rung.models[variant].parameters
    assert non_embedding(rung.models[variant]) == non_embedding(rung.models["donor"])


def test_a_ladder_is_alike(tmp_path):
    """All variants of a size have the same tokens, about 20 for each parameter; sizes differ in nothing but size."""
    given = options(tmp_path, sizes="32x6,48x8,64x10,80x12", learning_rates="2e-3,4e-3", seeds="0,1", tune_share=0.5)
    heads, sizes = [], given.sizes.split(",")
    for size in sizes:
        rung = new_rung(given, size, 300)
        assert 20 <= rung.tokens / non_embedding(rung.models["donor"]) < 20.1
        run = given.run(size, rung.steps, 300)
        assert run.tune == "learning_rate=2e-3,4e-3" and abs(run.tune_steps - rung.steps / 2) < 1
        assert (run.compare, run.sweep, run.output) == ("donor,block,full", ["seed=0,1"], tmp_path / size)
        assert run.set["intermediate_size"] % 8 == 0 and run.set["tie_word_embeddings"] and run.init == "scaled"
        heads.append(run.set["num_attention_heads"])
    assert heads == [2, 3, 2, 5]
    assert replace(given, tune_share=1.0).run("32x6", 9, 300).tune_steps is None, "or the best rate is trained twice"
    runs = [vars(given.run(size, 9, 300)) for size in sizes]
    assert {name for name in runs[0] if runs[0][name] != runs[1][name]} == {"set", "output"}
    assert given.run("32x6", 9, 300) == replace(given, sizes="80x12").run("32x6", 9, 300)


BAD = {
    "no size": ({"sizes": "32x"}, "--sizes 32x: give hidden size x layers, separated by commas, as in 32x6,48x8"),
    "a size twice": ({"sizes": "32x2,32x2"}, "--sizes 32x2,32x2 names one twice"),
    "no heads": (
        {"sizes": "40x2"},
        "40 isn't made of two or more heads of 32 or 16 numbers; change it, or --head-size",
    ),
    "too narrow": ({"sizes": "16x2"}, "16 isn't made of two or more heads"),
    "heads": ({"head_size": 20}, "32 isn't made of heads of 20 numbers"),
    "blocks": ({"block_size": 3}, "--block-size 3 is more than the 2 layers of 32x2"),
    "variant": ({"compare": "donor,mhc"}, "--compare donor,mhc: give some of donor, block, full, each once"),
    "a variant twice": ({"compare": "donor,donor"}, "each once"),
    "seed": ({"seeds": "0,x"}, "--seeds 0,x: give whole numbers, each once, as in 0,1,2"),
    "a seed twice": ({"seeds": "1,1"}, "--seeds 1,1: give whole numbers, each once"),
    "rate": ({"learning_rates": "0.1,-1"}, "--learning-rates 0.1,-1: give numbers above 0, each once"),
    "no rate": ({"learning_rates": ""}, "--learning-rates : give numbers above 0"),
    "tokens": ({"tokens_per_parameter": 0}, "--tokens-per-parameter 0.0 is out of range"),
    "vocab": ({"vocab": 200}, "--vocab 200 is out of range"),
    "data": ({"data": []}, "--data is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case, tmp_path):
    """One line says what is wrong and what to give."""
    values, message = BAD[case]
    with pytest.raises(InputError) as error:
        options(tmp_path, **values)
    assert message in str(error.value) and "\n" not in str(error.value)


def finished_run(variant: str, seed: int, rung: scaling.Rung, **others) -> dict:
    """What a comparison holds of a run."""
    model = rung.models[variant]
    run = {"held_out_loss": 5.0 - 0.1 * seed, "steps": rung.steps, "tokens": rung.tokens, "epochs": 0.5}
    run |= {"parameters": model.parameters, "depth_parameters": model.everywhere, "training_tokens": 1000}
    run |= {"arguments": {"mode": variant, "seed": seed, "learning_rate": 0.01}}
    return {**run, "tokens_per_second": 9.0, "peak_memory_bytes": 9, **others}


def test_what_a_comparison_tells(tmp_path):
    """Losses with their compute; a run that stopped, a rate at the edge, other models and damage are noticed."""
    rung, path = new_rung(options(tmp_path), "32x2", 300), tmp_path / "comparison.json"
    runs = {f"block learning_rate=0.01 seed={seed}": finished_run("block", seed, rung) for seed in (0, 1)}
    stopped = {"what": "loss", "value": "nan", "step": 3}
    write_json(path, {"runs": {**runs, "donor seed=0": stopped}, "at_an_edge": ["block"]})
    points, limits = read_comparison(path, "32x2", rung)
    assert [(point["variant"], point["seed"], point["loss"]) for point in points] == [
        ("block", 0, 5.0),
        ("block", 1, 4.9),
    ]
    assert points[0]["compute"] * 8.64e19 == pytest.approx(rung.flops("block"))
    assert "donor seed=0 has no loss, it stopped at step 3" in limits[0] and "block's best" in limits[1]
    assert len(limits) == 2
    assert "4.9500 ± 0.0707 | 5.0000, 4.9000" in points_table(points)
    for change, message in (
        ({"steps": 1}, "is of other models than this command's; choose another --output"),
        ({"arguments": {}}, "is damaged; remove it, and the same command writes it again"),
        ({"arguments": {"mode": "mhc", "seed": 0}}, "is damaged"),
    ):
        write_json(path, {"runs": {"block seed=0": finished_run("block", 0, rung, **change)}})
        with pytest.raises(InputError, match=message):
            read_comparison(path, "32x2", rung)


def test_the_figure_shows_all_variants():
    """Points, a line and a band for each, on logarithmic scales; with one seed no band."""
    laws = {"donor": (A, ALPHA), "block": (1.8, ALPHA), "full": (1.7, ALPHA)}
    for seeds in (1, 3):
        points = made_up(laws, seeds)
        axes = plot_laws(points, analyse(points, VARIANTS)).axes[0]
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log") and len(axes.lines) == 3
        assert sum(len(drawn.get_offsets()) for drawn in axes.collections[:: 1 if seeds == 1 else 2]) == 12 * seeds
        assert len(axes.collections) == (3 if seeds == 1 else 6)


@pytest.fixture
def text(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(60):
        lines = (f"def number_{number * line}(x):\n    return x + {line}\n" for line in range(12))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return folder


def test_a_ladder_in_a_folder(text, tmp_path):
    """It is planned before it is trained, is reported from what is done, keeps to its options, and takes no folder of
    another kind."""
    given = options(tmp_path / "out", data=str(text), sizes="48x2,32x2", compare="donor,block", seeds="0,1")
    ladder = Ladder(given)
    assert [run.output.name for run in ladder.unfinished()] == ["32x2", "48x2"]
    plan = ladder.plan()
    assert f"{ladder.rungs['48x2'].flops('block'):.3g}" in plan and "done already: none" in plan
    assert "trying" not in plan
    whole, part = (replace(given, learning_rates="1e-2,2e-2,4e-2", tune_share=share) for share in (1.0, 0.25))
    for tuned, runs in ((whole, 2), (part, 0.75)):
        ladder.options = tuned
        flops = sum(rung.flops(variant) for rung in ladder.rungs.values() for variant in ("donor", "block"))
        assert f"{2 * flops:.3g} FLOPs; trying 3 learning rates takes {runs * flops:.3g} more" in ladder.plan()
    ladder.options = given
    with pytest.raises(InputError, match="no size has a loss"):
        ladder.report()
    for size in ("32x2", "48x2"):
        runs = {}
        for variant in ("donor", "block"):
            for seed in (0, 1):
                loss = 6 - 0.3 * (size == "48x2") - 0.1 * (variant == "block") - 0.01 * seed
                runs[f"{variant} seed={seed}"] = finished_run(variant, seed, ladder.rungs[size], held_out_loss=loss)
        (tmp_path / "out" / size).mkdir()
        write_json(ladder.record(size), {"runs": runs})
    assert ladder.unfinished() == [] and "done already: 48x2, 32x2" in ladder.plan()
    results = ladder.report()
    unlock(given.output)
    assert results["sizes"] == ["32x2", "48x2"] and results["multipliers"]["block"]["value"] > 1
    part = Ladder(options(tmp_path / "out", data=str(text), sizes="48x2", compare="donor,block", seeds="0,1"))
    (tmp_path / "out" / "scaling_law.md").write_text("my own")
    again = part.report()
    unlock(given.output)
    assert {**again, "command": 0, "files": 0} == {**results, "command": 0, "files": 0}
    kept = [path.read_text() for path in (tmp_path / "out").glob("scaling_law.md*") if path.suffix != ".md"]
    assert kept == ["my own"]
    written = (tmp_path / "out" / "scaling_law.md").read_text()
    assert "1.891" in written and "1.25" in written and "## What can't be concluded" in written
    assert json.loads((tmp_path / "out" / "scaling_law.json").read_text())["fits"]["donor"]["alpha"] > 0
    with pytest.raises(InputError, match=r"holds a run with seeds = 0,1, not 0; choose another --output"):
        Ladder(options(tmp_path / "out", data=str(text), compare="donor,block"))
    with pytest.raises(InputError, match=r"holds a run with compare = donor,block, not donor,block,full"):
        Ladder(options(tmp_path / "out", data=str(text), compare="donor,block,full", seeds="0,1"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="choose another --output"):
        Ladder(options(tmp_path / "mine", data=str(text)))
    assert not held_locks


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    """As users see it; nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        scaling_law.main(["--output", "out", "--data", "./absent"])
    assert exit.value.code == "scaling_law: ./absent doesn't exist." and list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit, match="2"):
        scaling_law.main(["--output", "out", "--sizes", "big"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("scaling_law.py: error: --sizes big: give hidden size")


@pytest.mark.slow
def test_a_ladder_is_trained_and_goes_on(text, tmp_path, monkeypatch, capsys):
    """Two sizes, two variants, two steps: the files hold what was trained, and the same command trains nothing
    again."""
    monkeypatch.chdir(tmp_path)
    words = "--sizes 32x1,48x1 --compare donor,block --seeds 0 --learning-rates 1e-2 --tokens-per-parameter 0.02"
    words += " --vocab 300 --seq-len 32 --batch-size 4 --eval-sequences 4 --jobs 2 --output out --data text"
    scaling_law.main(words.split())
    printed = capsys.readouterr().out
    summary, results = json.loads(printed.splitlines()[-1]), json.loads(Path("out/scaling_law.json").read_text())
    assert summary["fits"] == results["fits"] and summary["limits"] == results["limits"]
    assert printed.index("FLOPs of a run") < printed.index("--- donor")
    runs = [json.loads(path.read_text()) for path in sorted(Path("out").glob("*x*/*/results.json"))]
    assert len(runs) == 4 and {run["mode"] for run in runs} == {"donor", "block"}
    assert sorted(point["loss"] for point in results["points"]) == sorted(run["held_out_loss"] for run in runs)
    assert {run["arguments"]["tokenizer"] for run in runs} == {os.path.join("out", "tokenizer")}
    assert any("1 seed alone" in line for line in results["limits"])
    with Image.open("out/scaling_law.png") as image:
        assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    times = {path: path.stat().st_mtime_ns for path in Path("out").glob("*x*/**/*") if path.is_file()}
    monkeypatch.setattr("attnres_recipes.comparison.train_all", None)
    scaling_law.main(words.split())
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == summary
    assert {path: path.stat().st_mtime_ns for path in Path("out").glob("*x*/**/*") if path.is_file()} == times
