# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Studies: their commands are whole, and their tables say what was measured."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from attnres_convert import InputError
from attnres_recipes.comparison import paired_differences
from attnres_recipes.figures import plot_differences
from PIL import Image
from pretrain_process import SCRIPTS


sys.path.insert(0, str(SCRIPTS))

import studies  # noqa: E402


def options(name: str, *words: str) -> dict[str, list]:
    """The comparisons of a study, by name, as these words change them."""
    given = studies.parse_arguments([name, *words])
    study = studies.STUDIES[name]
    return {
        part: studies.comparison_options(study, values, given.output / name / part, given)
        for part, values in study.parts.items()
    }


@pytest.mark.parametrize("name", studies.STUDIES)
def test_commands(name):
    """Each comparison is one that its command knows, in a folder of its own, with several seeds where it compares."""
    for part, comparison in options(name, "--jobs", "2").items():
        assert comparison.output == studies.OUTPUT / name / part and comparison.jobs == 2
        assert type(comparison)(**vars(comparison)).words() == comparison.words()
        assert comparison.variants()
        assert studies.SEEDS in comparison.sweep or name in ("donors", "zoo_lr", "full_rates")
    for needed in studies.STUDIES[name].needs:
        assert needed in studies.STUDIES


def test_a_shorter_one():
    """`--steps`, `--seeds` and `--output` change all of it, also where the models are that it starts from."""
    for comparison in options("regimes", "--steps", "3", "--seeds", "5,6", "--output", "elsewhere").values():
        assert comparison.steps == 3 and comparison.sweep == ["seed=5,6"]
        assert Path(comparison.model).parts[:2] == ("elsewhere", "donors")
    (donors,) = options("donors", "--output", "elsewhere").values()
    models = {str(donors.output / name.replace(" ", ",") / "model") for name, _ in donors.variants()}
    assert models == {comparison.model for comparison in options("regimes", "--output", "elsewhere").values()}


def test_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        studies.parse_arguments(["nothing"])
    assert "there is no study nothing; there are from_scratch, full_rates" in capsys.readouterr().err


def test_list(capsys):
    studies.main([])
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(studies.STUDIES)


def test_beside_the_paper():
    """A row for each variant: our difference by seed and its interval, and that of the paper's losses."""
    paper = {"donor": 1.766, "full": 1.737, "block:block_size=2": 1.746, "hc": 1.75}
    rates = {"donor": "0.01", "full": "0.02", "block block_size=2": "0.01", "hc": "0.5", "own": "0.1"}
    losses = {"donor": [5, 6], "full": [4.9, 5.8], "block block_size=2": [5.2, 6.2], "hc": [], "own": [5, 6.4]}
    runs = {
        f"{group} learning_rate={rates[group]} seed={seed}": {"held_out_loss": loss}
        for group, own in losses.items()
        for seed, loss in enumerate(own)
    }
    found = {"runs": runs, "best": {group: {"learning_rate": rate} for group, rate in rates.items()}}
    found["differences"] = paired_differences(runs)
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in studies.paper_table(found, paper).splitlines()
    ]
    assert rows[0][3] == "difference from donor"
    assert rows[2] == ["donor", "0.01", "5.500 ± 0.707", "-", "-", "-"]
    assert rows[3] == ["full", "0.02", "5.350 ± 0.636", "-0.150", "-0.200 to -0.100", "-0.029"]
    assert rows[4] == ["block block_size=2", "0.01", "5.700 ± 0.707", "+0.200", "+0.200 to +0.200", "-0.020"]
    assert rows[5] == ["hc", "0.5", "-", "-", "-", "-0.016"]
    assert rows[6] == ["own", "0.1", "5.700 ± 0.990", "+0.200", "0.000 to +0.400", "-"]
    figure = plot_differences(studies.differences(found), studies.differences_of_paper(found, paper))
    with Image.open(io.BytesIO(figure)) as image:
        assert min(image.size) > 300


def test_parts_beside_each_other():
    """A row for each group, whatever learning rate was best for it there; what failed has no loss."""
    found = {}
    for part, rate, losses in (("llama", "0.01", [3.0, 3.2]), ("qwen3", "0.1", [2.0, None])):
        own = [{"held_out_loss_before": 4.0} | ({"held_out_loss": loss} if loss else {}) for loss in losses]
        runs = {f"lora mode=donor learning_rate={rate} seed={seed}": run for seed, run in enumerate(own)}
        found[part] = {"runs": runs, "best": {"lora mode=donor": {"learning_rate": rate}}}
    found["qwen3"]["best"]["depth mode=block"] = {"learning_rate": "1.0"}
    found["qwen3"]["runs"]["depth mode=block learning_rate=1.0 seed=0"] = {"held_out_loss": 3.5}
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in studies.parts_table(found).splitlines()]
    assert rows[0] == ["held-out loss", "llama", "qwen3"] and rows[2] == ["before training", "4.000", "4.000"]
    assert rows[3] == ["lora mode=donor", "3.100 ± 0.141 (0.01)", "2.000 (0.1)"]
    assert rows[4] == ["depth mode=block", "-", "3.500 (1.0)"]


@pytest.mark.parametrize("name", [name for name, study in studies.STUDIES.items() if study.paper])
def test_paper_rows_are_compared(name):
    """What is shown beside the paper is trained, and its first is what others are compared with."""
    (comparison,) = options(name).values()
    compared, paper = comparison.compare.split(","), list(studies.STUDIES[name].paper)
    assert set(paper) <= set(compared) and compared[0] == paper[0]
    assert comparison.set["num_hidden_layers"] >= 8


def test_accuracies():
    table = studies.tasks_table({"before": {"a": [0.5]}, "lora": {"a": [0.5, 0.7]}}, ("a",)).splitlines()
    assert [line.split("|")[2].strip() for line in table[2:]] == ["0.500", "0.600 ± 0.141"]


@pytest.mark.parametrize(
    "name", ["from_scratch", "depth_lr_scale", "ablations", "zoo_lr", "donors", "regimes", "smollm2"]
)
def test_committed_results_are_of_these_commands(name):
    """What is in results/ was made by the study of that name, as it is now."""
    for part, comparison in options(name).items():
        recorded = json.loads((SCRIPTS.parent / "results" / name / part / "comparison.json").read_text())["command"]
        jobs = recorded.index("--jobs")
        assert recorded[1:jobs] + recorded[jobs + 2 :] == comparison.words()


def test_what_is_said_of_the_ablations_is_recorded():
    """The page has the table that is made of the committed runs, and sentences with its numbers."""
    folder = SCRIPTS.parent / "results"
    found = json.loads((folder / "ablations" / "comparison.json").read_text("utf-8"))
    table, page = studies.paper_table(found, studies.PAPER), (folder / "README.md").read_text("utf-8")
    assert (folder / "ablations" / "paper.md").read_text("utf-8") == table and table in page
    section = " ".join(page.split("## The paper's ablations")[1].split("\n## ")[0].replace(table, "").split())
    measured = studies.differences(found)
    numbers = [
        number for own in measured.values() for number in (own["mean"], *own["interval"], *own["seeds"].values())
    ]
    recorded = {
        f"{abs(number):.3f}" for number in (*numbers, *studies.differences_of_paper(found, studies.PAPER).values())
    }
    recorded.add(f"{measured['full']['mean'] - measured['block block_size=2']['mean']:.3f}")  # Full behind Block
    said = re.findall(r"\d\.\d{3}", section)
    assert said and set(said) <= recorded
    ahead = [name for name, own in measured.items() if max(own["seeds"].values()) < 0]
    assert set(measured) - set(ahead) == {
        *("full_window", "full_window set.attn_res_window=16", "block_heads block_size=2"),
        *("donor init=default", "block block_size=2 init=default", "full init=default"),
    }


@pytest.mark.slow
def test_answers(tmp_path, monkeypatch):
    """Each trained model and the one before answer in processes of their own; what is there isn't asked again."""
    pytest.importorskip("lm_eval")
    monkeypatch.setattr(studies, "QUESTIONS", 4)
    zoo = SCRIPTS.parent / "model_cards"
    runs = {f"full seed={seed}": {"output": str(tmp_path / f"seed={seed}")} for seed in (0, 1)}
    for run in runs.values():
        shutil.copytree(zoo / "attnres-1.3m-block", Path(run["output"]) / "model")
    tasks, places = ("stdlib_docstring", "stdlib_body"), (tmp_path / "answers", tmp_path / "tasks")
    found = studies.answers({"runs": runs}, tasks, str(zoo / "llama-1.3m"), *places, jobs=2)
    assert list(found) == [studies.START, "full"] and [len(own) for own in found["full"].values()] == [2, 2]
    assert found["full"]["stdlib_body"][0] == found["full"]["stdlib_body"][1] > 0
    for run in runs.values():
        shutil.rmtree(Path(run["output"]) / "model")
    assert studies.answers({"runs": runs}, tasks, str(zoo / "llama-1.3m"), *places, jobs=2) == found
    shutil.rmtree(places[0] / "full,seed=1")
    with pytest.raises(InputError, match="the evaluation of full seed=1 failed"):
        studies.answers({"runs": runs}, tasks, str(zoo / "llama-1.3m"), *places, jobs=2)
