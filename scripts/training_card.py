# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What training leaves beside a model for its readers: `results.json`, the heat map of depth weights and the card."""

import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
from attnres_convert import reading
from attnres_convert.card import (
    FIGURE_NAME,
    RESULTS_NAME,
    config_facts,
    folder_card,
    inherit,
    published,
    read_metadata,
    shell_command,
    write_card,
)
from attnres_convert.reading import first_line
from attnres_recipes.files import write_json
from training_data import STDLIB
from training_run import LICENCE_FILES, launched
from transformers.utils import cached_file


FIGURE_SEQUENCES = 8
STDLIB_NAMES = {
    ("pretrain", STDLIB): "the source of the standard library of Python {python}",
    ("finetune", STDLIB): "functions of the standard library of Python {python}",
    ("finetune", f"{STDLIB}-chat"): "functions of the standard library of Python {python}, as chats",
}


def mean_depth_weights(trainer) -> list[np.ndarray] | None:
    """The weights of each read, `(num_sources,)`, averaged over held-out sequences; a forward in all processes.

    `None` if the model has none, or if they can't be had: a figure is not worth a finished run.
    """
    from plot_depth_attention import has_depth_weights, mean_weights  # not before: it imports pretrain

    if not has_depth_weights(trainer.model.config):
        return None
    held_out = trainer.eval_dataset
    spread = np.linspace(0, len(held_out) - 1, min(len(held_out), FIGURE_SEQUENCES)).round().astype(int)
    names = ("input_ids", "position_ids")
    try:
        batches = [{name: held_out[index][name][None] for name in names} for index in spread.tolist()]
        return mean_weights(trainer.model, batches)
    except Exception as error:  # of any kind that a model's forward can have
        return no_figure(error)


def no_figure(error: Exception) -> None:
    print(f"no heat map of depth weights: {first_line(error)}", file=sys.stderr)


def draw_depth_weights(folder: Path, weights: list[np.ndarray], config, title: str):
    """`depth_attention.png` and, with the numbers, `.json`."""
    from plot_depth_attention import describe_mode, plot_reads, read_names, save_figure, source_names

    try:
        figure = plot_reads(weights, config, f"{title}: what each read takes from depth\n{describe_mode(config)}")
        numbers = {"mode": config.attn_res_mode, "reads": read_names(config), "sources": source_names(config)}
        numbers["weights"] = [read.tolist() for read in weights]
        save_figure(figure, folder / FIGURE_NAME, numbers)
    except Exception as error:  # of matplotlib, its fonts, the disk
        no_figure(error)


def model_results(script: str, args, results: dict, config, base: str | None = None) -> dict:
    """The `results.json` beside a model: the run's, with what else the card says, and without paths of this machine.

    Args:
        script: `"pretrain"` or `"finetune"`.
        base: what the model was made from, if it isn't `--model`.
    """
    processes = launched()["processes"]
    start = ["python"] if processes == 1 else ["accelerate", "launch", "--num_processes", str(processes)]
    stdlib = STDLIB_NAMES.get((script, args.data[0])) if len(args.data) == 1 else None
    on_hub = stdlib is None and not any(Path(path).exists() for path in args.data)
    names = [stdlib.format(**results["versions"])] if stdlib else published(args.data)
    measured = {
        "dataset": f"held-out part of {', '.join(names)}",
        "dataset_id": args.data[0] if on_hub else None,
    }
    answers = " on answers" if script == "finetune" else ""
    loss = results["held_out_loss"]
    evaluation = [
        {"metric": f"held-out loss{answers} (nats per token)", "type": "loss", "value": loss, **measured},
        {
            "metric": f"held-out perplexity{answers}",
            "type": "perplexity",
            "value": math.exp(min(loss, 700)),
            **measured,
        },
    ]
    base = base or args.model
    about = {
        "command": shell_command([*start, f"scripts/{script}.py", *args.command]),
        "base": base,
        "base_is_hub": bool(base) and not Path(base).exists(),
        "converted": (args.output / "converted").exists(),
        "model_config": config_facts(config.to_dict()),
        "data": ", ".join(names if stdlib else [f"`{name}`" for name in names]),
        "datasets": args.data if on_hub else [],
        "language": "en" if stdlib else None,  # of names and comments
        **launched(),
        "evaluation": evaluation,
    }
    return published({**results, **about})


def parent_folder(args) -> Path | None:
    """What was trained on, if that is a folder: `--model`, or what conversion has made of it."""
    converted = args.output / "converted"
    folder = converted if converted.exists() or args.model is None else Path(args.model)
    return folder if folder.is_dir() else None


def parent_metadata(args) -> dict:
    """What is taken over from the card of what was trained on."""
    if args.model is None:
        return {}
    if (folder := parent_folder(args)) is not None:
        return inherit(read_metadata(folder), None)
    try:
        card = cached_file(args.model, "README.md", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        card = None
    return inherit(read_metadata(Path(card).parent) if card else {}, args.model)


def write_training_card(folder: Path, args, results: dict, title: str, weights, config):
    """`results.json`, the figure and the card of a model or an adapter, and the licence of what was trained on. For the
    main process.

    Args:
        results: of [`model_results`].
        weights: of [`mean_depth_weights`].
    """
    for path in parent_folder(args).iterdir() if parent_folder(args) else ():
        if path.is_file() and LICENCE_FILES.match(path.name):
            reading.check_inside(path.parent, path)
            shutil.copyfile(path, folder / path.name)
    write_json(folder / RESULTS_NAME, json.loads(json.dumps(results, default=str)))
    if weights is not None:
        draw_depth_weights(folder, weights, config, title)
    write_card(folder, folder_card(folder, title, parent_metadata(args)))
