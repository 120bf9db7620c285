# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/studies.py ablations --jobs 2

Trains what a table of results/README.md says, from text that is on any machine, and writes table, figure and all
numbers. Each study is one or more comparisons of attnres-pretrain or attnres-finetune, whose commands are printed: the
same batches for all, learning rates tried for each, several seeds, intervals over them. Without a name, the studies are
listed.

What is in --output already isn't trained again, and what was interrupted goes on. `--steps` makes a study shorter, to
try it.
"""

import json
import shlex
import statistics
import sys
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from attnres_convert import InputError
from attnres_convert.writing import decimals, table, write_bytes, write_json, write_text
from attnres_recipes.options import FinetuneOptions, Positive, PretrainOptions, RunOptions
from attnres_recipes.parser import Limits, Options, need, option, parse


sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "lm_eval"))

import smollm2


OUTPUT, SMOLLM2 = Path("outputs/evidence"), "smollm2-135m"
TEXT = {"data": "site-packages", "data_split": "train[:25%]", "seq_len": 256, "batch_size": 8, "eval_sequences": 128}
SIZES = {
    "num_hidden_layers": 12,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
SMALL = {"config": "llama", "set": SIZES, "train_tokenizer": 2048, "init": "scaled", **TEXT}
SHORT = {**SMALL, "steps": 400, "depth_every": 0, "keep_checkpoints": 0}
ABLATION = {**SHORT, "depth_lr_scale": 1.0}  # the best at such learning rates, as the study of that name says
FEW_LOSSES = {**ABLATION, "eval_steps": 200}
START = "before training"
QUESTIONS = 50  # of each task at most
SHAPES = [
    f"set.hidden_size={width}:set.num_hidden_layers={layers}:set.intermediate_size={2.75 * width:.0f}"
    for width, layers in ((96, 5), (80, 8), (64, 12), (48, 22))
]
RATES = "learning_rate=4e-3,8e-3,1.6e-2"
SEEDS = "seed=0,1,2"
FAMILIES = ("llama", "qwen3", "gemma3_text")
FUNCTIONS = {"data": "stdlib", "seq_len": 256, "steps": 60, "eval_steps": 60, "depth_every": 0, "keep_checkpoints": 0}
# by the rows of the paper's ablations (arXiv 2603.15031, tables 4 and 5): validation losses of models with 436M
# activated parameters. The paper's S counts sublayers, two to a layer
PAPER = {
    "donor": 1.766,
    "denseformer": 1.767,
    "mhc": 1.747,
    "full": 1.737,
    "full_input_query": 1.731,
    "full_static": 1.749,
    "full_sigmoid": 1.741,
    "full_raw_keys": 1.743,
    "full_window": 1.764,
    "block:block_size=2": 1.746,
    "block_raw_keys:block_size=2": 1.750,
    "block_heads:block_size=2": 1.752,
    "block:block_size=1": 1.746,
    "block:block_size=4": 1.748,
    "block:block_size=8": 1.753,
}
# what may hold Full back: first weights, sources that are scaled down, an epsilon that is large beside small sources;
# and whether a window loses by what it leaves out
DOUBTS = (
    "donor:init=default",
    "block:block_size=2:init=default",
    "full:init=default",
    "block:block_size=2:set.attn_res_sum_scale=true",
    "full:set.attn_res_sum_scale=true",
    "full:set.attn_res_norm_eps=1e-12",
    "full_window:set.attn_res_window=16",
)


@dataclass(frozen=True)
class Study:
    """One table.

    Args:
        summary: of what it compares.
        kind: what trains.
        parts: options of each comparison, by its name; a single one has the study's name.
        paper: the paper's losses, by what `--compare` says.
        needs: studies whose models it starts from.
        tasks: of `examples/lm_eval`, which the trained models do.
    """

    summary: str
    kind: type[RunOptions]
    parts: dict[str, dict]
    paper: dict[str, float] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()


def one(summary: str, kind: type[RunOptions], **values) -> Study:
    return Study(summary, kind, {"": values})


STUDIES = {
    "from_scratch": one(
        "donor, Block and Full from scratch, 10M tokens each, with the learning rate that is best for each",
        PretrainOptions,
        **SMALL,
        steps=5000,
        save_steps=250,
        compare="donor,block,full",
        tune="learning_rate=4e-3,8e-3",
        tune_steps=1500,
        depth_lr_scale=1.0,
        sweep=[SEEDS],
    ),
    "full_rates": one(
        "Full as in from_scratch with other learning rates, of which the short trials there may have missed the best",
        PretrainOptions,
        **SMALL,
        steps=5000,
        save_steps=250,
        compare="full:learning_rate=1.6e-2:depth_lr_scale=1,full:learning_rate=8e-3:depth_lr_scale=0.1,"
        "full:learning_rate=4e-3:depth_lr_scale=1",
    ),
    "zoo_lr": one(
        "learning rates of the zoo's trio",
        PretrainOptions,
        **{**ABLATION, "set": {**SIZES, "num_hidden_layers": 24}, "data": "stdlib", "data_split": "train"},
        compare="donor,block,full",
        tune="learning_rate=4e-3,8e-3",
    ),
    "depth_lr_scale": one(
        "learning rates of depth attention, as multiples of that of all else",
        PretrainOptions,
        **SHORT,
        compare="block:learning_rate=2e-3,block:learning_rate=8e-3,full:learning_rate=8e-3",
        sweep=["depth_lr_scale=0.3,1,3,10", SEEDS],
    ),
    "ablations": Study(
        "the paper's ablations, of components and of the size of blocks; and what may hold Full back",
        PretrainOptions,
        {"": {**FEW_LOSSES, "compare": ",".join((*PAPER, *DOUBTS)), "tune": RATES, "sweep": [SEEDS]}},
        paper=PAPER,
    ),
    "shape": one(
        "the paper's shapes: as many parameters, deep and narrow or shallow and wide",
        PretrainOptions,
        **FEW_LOSSES,
        compare=",".join(f"{mode}:{shape}" for shape in SHAPES for mode in ("donor", "block")),
        tune=RATES,
        sweep=[SEEDS],
    ),
    "donors": one(
        "a donor of each of three families, to fine-tune",
        PretrainOptions,
        **{**SMALL, "set": {**SIZES, "head_dim": 32}, "config": "llama"},
        mode="donor",
        steps=1200,
        learning_rate=8e-3,
        sweep=[f"config={','.join(FAMILIES)}"],
    ),
    "regimes": Study(
        "ways to fine-tune donors and what conversion makes of them, by family",
        FinetuneOptions,
        {
            family: {
                **FUNCTIONS,
                "model": str(OUTPUT / "donors" / f"config={family}" / "model"),
                "batch_size": 4,
                "compare": "full:mode=donor,full:mode=block,full:mode=full,lora:mode=donor,lora:mode=block,"
                "lora:mode=full,depth:mode=block,depth:mode=full",
                "tune": "learning_rate=3e-4,1e-3,3e-3",
                "sweep": [SEEDS],
            }
            for family in FAMILIES
        },
        needs=("donors",),
    ),
    "smollm2": Study(
        "whether it pays to convert SmolLM2-135M-Instruct and train it on",
        FinetuneOptions,
        {
            part: {
                **FUNCTIONS,
                "model": str(OUTPUT / SMOLLM2),
                "batch_size": 2,
                "steps": 40,
                "eval_steps": 40,
                "eval_sequences": 32,
                "tune_steps": 20,
                "compare": compared,
                "tune": "learning_rate=x1,x2,x4",
                "sweep": [SEEDS],
            }
            for part, compared in {
                "all_weights": "full:mode=donor,full:mode=block,full:mode=full,full:mode=block_delta",
                "few_weights": "lora:mode=donor,lora:mode=block,depth:mode=block",
            }.items()
        },
        tasks=("stdlib_docstring", "stdlib_body"),
    ),
}


@dataclass(kw_only=True)
class StudyOptions(Options):
    """What studies take."""

    group = "study"
    study: list[str] = option(help=f"names, of {', '.join(STUDIES)}", positional=True)
    output: Path = option(OUTPUT, "folder for runs and tables, with a folder for each study")
    steps: Positive | None = option(None, "of each run, instead of the study's; for a try")
    seeds: str | None = option(None, "instead of the study's, such as 0,1", metavar="N1,N2")
    jobs: Annotated[int, Limits(1, 1024)] = option(1, "runs at a time; on a CPU they share its cores")

    def check(self):
        for name in self.study:
            if name not in STUDIES:
                raise InputError(f"there is no study {name}; there are {', '.join(STUDIES)}")


def comparison_options(study: Study, values: dict, folder: Path, options: StudyOptions) -> RunOptions:
    """The options of one comparison, as `options` change them."""
    values = dict(values)
    if "model" in values:
        values["model"] = str(options.output / Path(values["model"]).relative_to(OUTPUT))
    if options.steps is not None:
        of_steps = ("save_steps", "eval_steps", "tune_steps")
        values = {name: value for name, value in values.items() if name not in of_steps} | {"steps": options.steps}
    if options.seeds is not None:
        values["sweep"] = [f"seed={options.seeds}" if sweep == SEEDS else sweep for sweep in values["sweep"]]
    return study.kind(**values, output=folder, jobs=options.jobs)


def tuned(group: str, found: dict) -> str:
    """What `comparison.json` calls a group of runs, with the options that were best for it."""
    return " ".join([group, *(f"{option}={value}" for option, value in found["best"][group].items())])


def group_losses(found: dict, group: str) -> list[float]:
    """Held-out losses of a group's seeds, of what `comparison.json` holds; without those of runs that failed."""
    from attnres_recipes.figures import without_seed  # takes seconds

    runs = [run for name, run in found["runs"].items() if without_seed(name) == tuned(group, found)]
    return [run["held_out_loss"] for run in runs if "held_out_loss" in run]


def mean(values: list[float]) -> str:
    if not values:
        return "-"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def parts_table(found: dict[str, dict]) -> str:
    """Held-out losses of comparisons, a column for each, with the learning rate that was best for each group of runs.

    Args:
        found: what `comparison.json` holds, by the comparison's name.
    """
    before = [
        mean([run["held_out_loss_before"] for run in own["runs"].values() if "held_out_loss_before" in run][:1])
        for own in found.values()
    ]
    rows = [("held-out loss", *found), ("before training", *before)]

    def cell(group: str, own: dict) -> str:
        if group not in own["best"]:
            return "-"
        return f"{mean(group_losses(own, group))} ({', '.join(own['best'][group].values())})"

    for group in dict.fromkeys(group for own in found.values() for group in own["best"]):
        rows.append((group, *(cell(group, own) for own in found.values())))
    return table(rows)


def differences(found: dict) -> dict[str, dict]:
    """Those from the first group of runs, by group, without the options that were best for it."""
    by_tuned = {tuned(group, found): group for group in found["best"]}
    return {by_tuned[name]: own for name, own in found.get("differences", {}).items()}


def differences_of_paper(found: dict, paper: dict[str, float]) -> dict[str, float]:
    """The paper's, from the same group."""
    return {name.replace(":", " "): loss - paper[next(iter(found["best"]))] for name, loss in paper.items()}


def paper_table(found: dict, paper: dict[str, float]) -> str:
    """Held-out losses with the options that were best, and differences from the first group of runs, ours with their
    intervals beside the paper's, where there is one.

    Args:
        found: what `comparison.json` holds.
        paper: losses by what `--compare` says.
    """
    first, of_paper, measured = next(iter(found["best"])), differences_of_paper(found, paper), differences(found)
    titles = ("", *found["best"][first], "held-out loss", f"difference from {first}", "95 % of resampled seeds")
    rows = [(*titles, "the paper's difference")]

    def cell(number: float | None) -> str:
        return "-" if number is None else decimals(number, 3, "+")

    for group, best in found["best"].items():
        ours = measured.get(group)
        own = (cell(ours["mean"]), " to ".join(map(cell, ours["interval"]))) if ours else ("-", "-")
        theirs = cell(of_paper.get(group) if group != first else None)
        rows.append((group, *best.values(), mean(group_losses(found, group)), *own, theirs))
    return table(rows)


def run(name: str, options: StudyOptions) -> dict[str, dict]:
    """Trains a study, and returns the held-out losses by the folders of its comparisons."""
    from attnres_recipes.figures import plot_differences  # takes seconds

    study, losses, by_part = STUDIES[name], {}, {}
    for needed in study.needs:
        run(needed, replace(options, seeds=None))
    for part, values in study.parts.items():
        folder = options.output / name / part
        own = comparison_options(study, values, folder, options)
        command = "pretrain" if study.kind is PretrainOptions else "finetune"
        if own.model == str(options.output / SMOLLM2) and not Path(own.model).exists():
            smollm2.main([own.model, "--donor"])
        print(shlex.join([f"attnres-{command}", *own.words()]), flush=True)
        losses[str(folder)] = trained(command, own)["held_out_loss"]
        found = by_part[part] = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        if study.paper:
            text = paper_table(found, study.paper)
            write_text(folder / "paper.md", text)
            print(text)
            if measured := differences(found):
                figure = plot_differences(measured, differences_of_paper(found, study.paper))
                write_bytes(folder / "paper.png", figure)
        if study.tasks:
            evaluated = folder / "answers", options.output / "tasks", options.jobs
            measured = answers(found, study.tasks, own.model, *evaluated)
            text = tasks_table(measured, study.tasks)
            write_json(folder / "tasks.json", measured)
            write_text(folder / "tasks.md", text)
            print(text)
    if len(by_part) > 1:
        text = parts_table(by_part)
        write_text(options.output / name / "parts.md", text)
        print(text)
    return losses


def answers(
    found: dict, tasks: tuple[str, ...], start: str, folder: Path, made: Path, jobs: int
) -> dict[str, dict[str, list[float]]]:
    """Accuracies of the trained models and of the one that they started from, by group and task, one for each seed.

    Args:
        found: what `comparison.json` holds.
        folder: for an evaluation of each model; those that are there aren't made again.
        made: where tasks are, or are made.
        jobs: evaluations at a time.
    """
    from attnres_recipes import EvaluateOptions  # take seconds
    from attnres_recipes.comparison import processes
    from attnres_recipes.figures import without_seed
    from make_tasks import make_tasks

    if not made.exists():
        make_tasks(made)
    models = {START: start}
    models |= {name: str(Path(own["output"]) / "model") for name, own in found["runs"].items() if "output" in own}
    given = {"lm_eval": ",".join(tasks), "lm_eval_include": made, "lm_eval_limit": QUESTIONS, "dtype": "float32"}
    evaluations = {
        name: EvaluateOptions(checkpoints=[checkpoint], output=folder / name.replace(" ", ","), **given)
        for name, checkpoint in models.items()
    }
    missing = {name: own for name, own in evaluations.items() if not (own.output / "evaluation.json").exists()}
    with closing(processes("evaluate_model", missing, jobs)) as ended:
        for name, status in ended:
            if status:
                raise InputError(f"the evaluation of {name} failed; its message is above.")
    accuracies = {}
    for name, own in evaluations.items():
        evaluation = json.loads((own.output / "evaluation.json").read_text(encoding="utf-8"))
        metrics = next(iter(evaluation["checkpoints"].values()))["metrics"]
        for task in tasks:
            of_group = accuracies.setdefault(without_seed(name), {}).setdefault(task, [])
            of_group.append(metrics[f"{task} acc_norm"]["value"])
    return accuracies


def tasks_table(accuracies: dict[str, dict[str, list[float]]], tasks: tuple[str, ...]) -> str:
    rows = [("model", *(f"{task}, accuracy" for task in tasks))]
    for group, by_task in accuracies.items():
        rows.append((group, *(mean(by_task[task]) for task in tasks)))
    return table(rows)


def trained(command: str, options: RunOptions) -> dict:
    import attnres_recipes  # takes seconds

    return getattr(attnres_recipes, command)(options)


def parse_arguments(argv: list[str] | None = None) -> StudyOptions:
    return parse(StudyOptions, "studies", __doc__, argv)


def main(argv: list[str] | None = None):
    if not (sys.argv[1:] if argv is None else argv):
        print("".join(f"{name:16}{study.summary}\n" for name, study in STUDIES.items()), end="")
        return
    options = parse_arguments(argv)
    need("train")
    from attnres_recipes.run import one_line_errors  # takes seconds

    losses = {}
    with one_line_errors("studies", options.output):
        for name in options.study:
            losses |= run(name, options)
    print(json.dumps({"output": str(options.output), "held_out_loss": losses}))


if __name__ == "__main__":
    main()
