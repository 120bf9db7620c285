# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The figures of what depth attention does in models, on text and token by token."""

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from attnres_convert import InputError, reading
from tqdm import tqdm

from .data import PackedDocuments, collate, is_held_out, load_documents, tokenized
from .defaults import HELD_OUT, SOURCES
from .figures import (
    SOFTWARE,
    describe_mode,
    has_depth_weights,
    has_fixed_weights,
    is_distribution,
    plot_dynamics,
    plot_reads,
    plot_token_weights,
    plot_tokens,
    read_names,
    relative_entropy,
    save_figure,
    source_names,
    token_text,
)
from .folders import output_folder
from .loading import Checkpoint, check_contexts, load_checkpoint, open_checkpoint, short_names
from .look import check_can_be_watched, depth_dynamics, mean_weights, token_weights
from .options import PlotOptions
from .page import model_data, write_page


LONGEST_DEFAULT = 256  # tokens
PAGE = "depth.html"
FIGURES = ("reads", "relative", "tokens", "weights")  # of a model


def read_batches(
    checkpoint: Checkpoint, documents, options: PlotOptions, seq_len: int
) -> list[dict[str, torch.Tensor]]:
    """Sequences of the text as in pretraining, one in each batch."""
    tokens = tokenized(documents, checkpoint.tokenizer, options.column)
    checkpoint.check(tokens, "the text")
    if len(options.text) == 1 and options.text[0] in SOURCES:  # the part that pretraining leaves out
        tokens = tokens.select(np.flatnonzero(is_held_out(np.asarray(tokens["hash"]), HELD_OUT)))
    packed = PackedDocuments(tokens, seq_len)
    if len(packed) == 0:
        packed = PackedDocuments(tokens, packed.num_tokens or 1)
    if packed.num_tokens < 2:
        raise InputError(f"{' '.join(options.text)} holds no text to look at; change --text.")
    spread = np.linspace(0, len(packed) - 1, min(len(packed), options.sequences)).round().astype(int)
    return [collate([packed[index]]) for index in spread.tolist()]


def prompt_batch(checkpoint: Checkpoint, prompt: str | None, batches: list, max_tokens: int) -> dict[str, torch.Tensor]:
    """The first `max_tokens` tokens of the prompt or, without one, of the text."""
    if prompt is None:
        return {name: batches[0][name][:, :max_tokens] for name in ("input_ids", "position_ids")}
    reading.check_text(prompt, "--prompt")
    ids = checkpoint.tokenizer(prompt, return_tensors="pt")["input_ids"][:, :max_tokens]
    checkpoint.check(ids, "--prompt")
    if ids.shape[1] == 0:
        raise InputError("--prompt is empty.")
    if checkpoint.context and ids.shape[1] > checkpoint.context:
        raise InputError(
            f"--prompt is longer than the context of {checkpoint.path}; give --tokens {checkpoint.context} or less."
        )
    return {"input_ids": ids}


def chosen_reads(config, reads: str | None) -> list[str]:
    """`reads`, separated by commas, or up to five from all over the depth."""
    names = read_names(config)
    if not reads:
        spread = np.linspace(min(2, len(names) - 1), len(names) - 1, 5)
        return list(dict.fromkeys(names[round(index)] for index in spread))
    chosen = [read.strip() for read in reads.split(",")]
    if unknown := [read for read in chosen if read not in names]:
        raise InputError(
            f"--reads: there is no read {', '.join(unknown)}; reads are {names[0]}, {names[1]} ... {names[-2]}, output."
        )
    return chosen


def file_stems(names: list[str]) -> list[str]:
    """How the files of each model begin, numbered where two would begin alike."""
    stems = []
    for name in names:
        stem = name.strip("/").replace("/", "-")
        numbered = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
        stems.append(next(candidate for candidate in numbered if candidate not in stems))
    return stems


@dataclass
class Measured:
    """What is drawn of a model; a donor has dynamics alone, and weights that are the same for all tokens are drawn
    once."""

    dynamics: dict[str, list[float]]
    mean: list[np.ndarray] = field(default_factory=list)
    by_token: list[np.ndarray] = field(default_factory=list)

    def is_finite(self) -> bool:
        return all(np.isfinite(values).all() for values in (*self.dynamics.values(), *self.mean, *self.by_token))


def measure(checkpoint: Checkpoint, batches: list, prompt: dict[str, torch.Tensor] | None, dtype: str) -> Measured:
    model = load_checkpoint(checkpoint, dtype)
    try:
        check_can_be_watched(model)
    except ValueError as error:
        raise InputError(f"{checkpoint.path}: {error}") from None
    with reading.understood(f"{checkpoint.path}: the model fails"):
        measured = Measured(depth_dynamics(model, batches))
        if has_depth_weights(checkpoint.config):
            measured.mean = mean_weights(model, batches)
        if prompt is not None:
            measured.by_token = token_weights(model, prompt)
    if not measured.is_finite():
        raise InputError(f"{checkpoint.path}: what it computes isn't finite; the model is broken.")
    return measured


def draw_model(
    name: str,
    stem: str,
    measured: Measured,
    checkpoint: Checkpoint,
    batches: list,
    prompt: dict | None,
    options: PlotOptions,
) -> list[Path]:
    """The figures of one AttnRes model: of weights that are a distribution more than of others, and of those that
    depend on the token more than of others."""
    config, mean, weights = checkpoint.config, measured.mean, measured.by_token
    kind = describe_mode(config)
    tokens_seen = sum(batch["input_ids"].numel() for batch in batches)
    shared = {"model": checkpoint.path, "mode": config.attn_res_mode, "reads": read_names(config)}
    shared["sources"] = source_names(config)
    numbers = {**shared, "tokens": tokens_seen, "weights": [read.tolist() for read in mean]}
    fixed = has_fixed_weights(config)
    about = kind if fixed else f"{kind}, mean of {tokens_seen:,} tokens"
    title = f"{name}: what each read takes from depth\n{about}"
    paths = [options.output / f"{stem}-reads.png"]
    save_figure(plot_reads(mean, config, title), paths[0], numbers)
    if is_distribution(config):
        paths.append(options.output / f"{stem}-relative.png")
        title += "\nrelative to uniform weights"
        save_figure(plot_reads(mean, config, title, relative=True), paths[-1], numbers)
    if fixed:
        return paths
    tokens = prompt_texts(checkpoint, prompt)
    reads = chosen_reads(config, options.reads)
    shared["tokens"] = tokens
    if is_distribution(config):
        paths.append(options.output / f"{stem}-tokens.png")
        figure = plot_tokens(weights, tokens, config, f"{name}: reads by token ({kind})")
        spread = [relative_entropy(read).tolist() for read in weights[1:]]
        strongest = [read.argmax(0).tolist() for read in weights]
        save_figure(figure, paths[-1], {**shared, "relative_entropy": [None, *spread], "strongest_source": strongest})
    paths.append(options.output / f"{stem}-weights.png")
    figure = plot_token_weights(weights, tokens, config, reads, f"{name}: weights by token ({kind})")
    rows = dict(zip(shared["reads"], weights))
    save_figure(figure, paths[-1], {**shared, "weights": {read: rows[read].tolist() for read in reads}})
    return paths


def prompt_texts(checkpoint: Checkpoint, prompt: dict[str, torch.Tensor]) -> list[str]:
    return [token_text(checkpoint.tokenizer, token) for token in prompt["input_ids"][0].tolist()]


def page_models(names: list[str], checkpoints: list[Checkpoint], prompts: list, measured: list[Measured]) -> list[dict]:
    """What the page shows: all models but donors."""
    models = []
    for name, checkpoint, prompt, seen in zip(names, checkpoints, prompts, measured):
        if has_depth_weights(checkpoint.config):
            tokens = [] if prompt is None else prompt_texts(checkpoint, prompt)
            models.append(model_data(name, checkpoint.config, seen.by_token or seen.mean, tokens))
    return models


def plot(options: PlotOptions) -> list[Path]:
    """Draws all figures and returns their paths.

    Raises:
        InputError: bad input; one line says what to do.
    """
    names = short_names(options.models)
    checkpoints = [open_checkpoint(path, options.base, options.tokenizer) for path in options.models]
    if options.base and all(checkpoint.adapter is None for checkpoint in checkpoints):
        raise InputError("--base is for adapters, and no model is one.")
    if options.html and not any(has_depth_weights(checkpoint.config) for checkpoint in checkpoints):
        raise InputError("--html shows depth weights, and no model has them.")
    contexts = [checkpoint.context for checkpoint in checkpoints if checkpoint.context]
    seq_len = options.seq_len or min([LONGEST_DEFAULT, *contexts])
    check_contexts(checkpoints, seq_len)
    for checkpoint in checkpoints:
        if options.reads and has_depth_weights(checkpoint.config):
            chosen_reads(checkpoint.config, options.reads)
    documents = load_documents(options.text, options.column, sample_by=options.sample_by)
    batches = [read_batches(checkpoint, documents, options, seq_len) for checkpoint in checkpoints]
    prompts = [
        prompt_batch(checkpoint, options.prompt, own, options.tokens)
        if has_depth_weights(checkpoint.config) and not has_fixed_weights(checkpoint.config)
        else None
        for checkpoint, own in zip(checkpoints, batches)
    ]
    figures = [f"{stem}-{figure}.png" for stem in file_stems(names) for figure in FIGURES] + ["dynamics.png"]
    written = {name: (name, f"{Path(name).stem}.json") for name in figures}
    if options.html:
        written[PAGE] = (PAGE,)
    with output_folder(options.output, SOFTWARE, written):
        each = tqdm(list(zip(checkpoints, batches, prompts)), disable=not sys.stderr.isatty())
        measured = [measure(checkpoint, own, prompt, options.dtype) for checkpoint, own, prompt in each]
        paths = []
        for name, stem, checkpoint, own, prompt, seen in zip(
            names, file_stems(names), checkpoints, batches, prompts, measured
        ):
            if has_depth_weights(checkpoint.config):
                paths += draw_model(name, stem, seen, checkpoint, own, prompt, options)
        paths.append(options.output / "dynamics.png")
        tokens = sum(batch["input_ids"].numel() for batch in batches[0])
        dynamics = {name: seen.dynamics for name, seen in zip(names, measured)}
        save_figure(plot_dynamics(dynamics, f"Magnitudes by depth, on {tokens:,} tokens"), paths[-1], dynamics)
        if options.html:
            paths.append(options.output / PAGE)
            write_page(paths[-1], page_models(names, checkpoints, prompts, measured))
    return paths
