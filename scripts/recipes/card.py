# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What training leaves beside a model for its readers: `results.json`, the heat map of depth weights and the card."""

import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from accelerate import PartialState
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
from attnres_convert.writing import write_json
from transformers.utils import cached_file

from .defaults import PACKAGES, STDLIB
from .figures import describe_mode, has_depth_weights, plot_reads, read_names, save_figure, source_names
from .look import check_can_be_watched, mean_weights
from .options import RunOptions
from .process import launched, tensor_parallel_size
from .run import CONVERTED_NAME


FIGURE_SEQUENCES = 8
LICENCE_FILES = re.compile("licen[cs]e|notice|copying|use_policy", re.IGNORECASE)
NAMES_OF_SOURCES = {
    ("pretrain", STDLIB): "the source of the standard library of Python {python}",
    ("pretrain", PACKAGES): "the sources of the Python packages that were installed",
    ("finetune", STDLIB): "functions of the standard library of Python {python}",
    ("finetune", f"{STDLIB}-chat"): "functions of the standard library of Python {python}, as chats",
    ("finetune", f"{STDLIB}-docstrings"): "docstrings of the standard library of Python {python}",
}


def mean_depth_weights(trainer) -> list[np.ndarray] | None:
    """The weights of each read, `(num_sources,)`, averaged over held-out sequences; a forward in all processes.

    `None` if the model has none, or if they can't be had: a figure is not worth a finished run.
    """
    if not has_depth_weights(trainer.model.config):
        return None
    held_out = trainer.eval_dataset
    spread = np.linspace(0, len(held_out) - 1, min(len(held_out), FIGURE_SEQUENCES)).round().astype(int)
    names = ("input_ids", "position_ids")
    try:
        check_can_be_watched(trainer.model)
        batches = [{name: held_out[index][name][None] for name in names} for index in spread.tolist()]
        return mean_weights(trainer.model, batches)
    except Exception as error:  # of any kind that a model's forward can have
        return no_figure(error)


def no_figure(error: Exception) -> None:
    if PartialState().is_main_process:
        print(f"no heat map of depth weights: {first_line(error)}", file=sys.stderr)


def draw_depth_weights(folder: Path, weights: list[np.ndarray], config, title: str):
    """`depth_attention.png` and, with the numbers, `.json`."""
    try:
        figure = plot_reads(weights, config, f"{title}: what each read takes from depth\n{describe_mode(config)}")
        numbers = {"mode": config.attn_res_mode, "reads": read_names(config), "sources": source_names(config)}
        numbers["weights"] = [read.tolist() for read in weights]
        save_figure(figure, folder / FIGURE_NAME, numbers)
    except Exception as error:  # of matplotlib, its fonts, the disk
        no_figure(error)


def model_results(name: str, options: RunOptions, results: dict, config, base: str | None = None) -> dict:
    """The `results.json` beside a model: the run's, with what else the card says, and without paths of this machine.

    Args:
        name: of the command, `"pretrain"` or `"finetune"`.
        options: as they were given.
        base: what the model was made from, if it isn't `--model`.
    """
    processes = launched()["processes"]
    launcher = ["accelerate", "launch", "--num_processes", str(processes)]
    if (size := tensor_parallel_size()) > 1:
        launcher += ["--use_parallelism_config", "--parallelism_config_tp_size", str(size)]
    launcher += ["-m", f"attnres_commands.{name}"]
    data = options.data
    source = NAMES_OF_SOURCES.get((name, data[0])) if len(data) == 1 else None
    on_hub = source is None and not any(Path(path).exists() for path in data)
    names = [source.format(**results["versions"])] if source else published(data)
    measured = {
        "dataset": f"held-out part of {', '.join(names)}",
        "dataset_id": data[0] if on_hub else None,
    }
    answers = " on answers" if name == "finetune" else ""
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
    base = base or options.model
    about = {
        "command": shell_command([*(launcher if processes > 1 else [f"attnres-{name}"]), *options.words()]),
        "base": base,
        "base_is_hub": bool(base) and not Path(base).exists(),
        "converted": (options.output / CONVERTED_NAME).exists(),
        "model_config": config_facts(config.to_dict()),
        "data": ", ".join(names if source else [f"`{name}`" for name in names]),
        "datasets": data if on_hub else [],
        "language": "en" if source else None,  # of names and comments
        **launched(),
        "evaluation": evaluation,
    }
    samples = {"samples": results["samples"]} if "samples" in results else {}  # texts, of which none is a path
    return {**published({**results, **about}), **samples}


def parent_folder(options: RunOptions) -> Path | None:
    """What was trained on, if that is a folder: `model`, or what conversion has made of it."""
    converted = options.output / CONVERTED_NAME
    folder = converted if converted.exists() or options.model is None else Path(options.model)
    return folder if folder.is_dir() else None


def parent_metadata(model: str | None, folder: Path | None) -> dict:
    """What is taken over from the card of what was trained on, `model`, which may be in a folder."""
    if model is None or folder is not None:
        return inherit(read_metadata(folder), None) if folder else {}
    try:
        card = cached_file(model, "README.md", _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        card = None
    return inherit(read_metadata(Path(card).parent) if card else {}, model)


def write_training_card(folder: Path, options: RunOptions, results: dict, title: str, weights, config):
    """`results.json`, the figure and the card of a model or an adapter, and the licence of what was trained on. For the
    main process.

    Args:
        results: of [`model_results`].
        weights: of [`mean_depth_weights`].
    """
    parent = parent_folder(options)
    for path in parent.iterdir() if parent else ():
        if path.is_file() and LICENCE_FILES.match(path.name):
            reading.check_inside(path.parent, path)
            shutil.copyfile(path, folder / path.name)
    write_json(folder / RESULTS_NAME, results)
    if weights is not None:
        draw_depth_weights(folder, weights, config, title)
    write_card(folder, folder_card(folder, title, parent_metadata(options.model, parent)))
