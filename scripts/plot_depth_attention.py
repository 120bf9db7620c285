# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/plot_depth_attention.py outputs/run/donor/model outputs/run/block/model --output outputs/depth

Draws what happens over depth inside models. Of each AttnRes model: what its reads take from which source, averaged
over a text (`<model>-reads.png`, `<model>-relative.png`), and token by token for a prompt (`<model>-tokens.png`,
`<model>-weights.png`). Of all models together, donors too: how large outputs of sublayers, reads and gradients are by
depth (`dynamics.png`).

`0a` is the attention of layer 0, `0m` its MLP; a read has the name of the sublayer that it feeds. The numbers of each
figure are beside it as JSON. The last line printed is JSON.
"""

import argparse
import itertools
import json
import logging
import math
import secrets
import sys
import warnings
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from attnres_convert import InputError, reading
from attnres_recipes.files import write_json
from depth_callback import check_can_be_watched, decoder, gradient_norms, look
from matplotlib import colors, font_manager, ft2font, ticker
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from model_loading import Checkpoint, check_contexts, load_checkpoint, open_checkpoint, short_names
from output_folder import output_folder
from tqdm import tqdm
from training_data import STDLIB, PackedDocuments, collate, is_held_out, load_documents, tokenized
from training_options import positive
from training_run import RunError, plt
from transformers.convert_slow_tokenizer import bytes_to_unicode


SCRIPT = "plot_depth_attention.py"
FIGURES = ("reads", "relative", "tokens", "weights")  # of a model
WEIGHT_COLORS = "viridis"
SIGNED_COLORS = "PuOr"
# Okabe and Ito's, which people with any colour vision can tell apart, without the yellow
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX"
OPEN_COLOR = "#D55E00"
LONGEST_SIDE = 15  # inches
SMALL_TYPE = 0.145  # inches from line to line
WEIGHT_TICKS = (0, 1, 0.1, 0.4, 0.2, 0.6, 0.05, 0.01, 0.8, 0.001)


def read_names(config) -> list[str]:
    """Of the 2L+1 reads, by the sublayer that they feed."""
    return [f"{layer}{kind}" for layer in range(config.num_hidden_layers) for kind in "am"] + ["output"]


def source_names(config) -> list[str]:
    """Of all sources that there are in the end: the embedding, then blocks, or sublayers."""
    sublayers = read_names(config)[:-1]
    size = config.attn_res_sublayers_per_block
    if size == 1:
        return ["embedding", *sublayers]
    return ["embedding", *(f"block {number}" for number in range(1, len(sublayers[::size]) + 1))]


def block_layers(config) -> list[str]:
    """The layers of each block, for people."""
    size, last = config.attn_res_block_size, config.num_hidden_layers - 1
    ends = [(first, min(first + size - 1, last)) for first in range(0, last + 1, size)]
    return [f"layer {first}" if first == end else f"layers {first}–{end}" for first, end in ends]


def is_block(config) -> bool:
    return config.attn_res_mode == "block"


def describe_mode(config) -> str:
    size = config.attn_res_block_size
    return (
        f"block mode, {size} layer{'s' * (size > 1)} per block" if is_block(config) else f"{config.attn_res_mode} mode"
    )


def has_depth_weights(config) -> bool:
    return hasattr(config, "attn_res_mode")


def has_fixed_weights(config) -> bool:
    """The same for all tokens."""
    return config.attn_res_mode == "denseformer"


@torch.no_grad()
def token_weights(model, batch: dict[str, torch.Tensor]) -> list[np.ndarray]:
    """The weights of each read for each token, `(num_sources, batch * seq)`."""
    inputs = {name: batch[name].to(model.device) for name in ("input_ids", "position_ids") if name in batch}
    reads = model.eval()(**inputs, output_depth_attentions=True, use_cache=False).depth_attentions
    return [read.float().transpose(0, 1).flatten(1).cpu().numpy() for read in reads]


def mean_weights(model, batches: list[dict[str, torch.Tensor]]) -> list[np.ndarray]:
    """The weights of each read, `(num_sources,)`, averaged over the tokens of batches of one size."""
    by_batch = [[read.mean(1) for read in token_weights(model, batch)] for batch in batches]
    return [np.mean(reads, axis=0) for reads in zip(*by_batch)]


def depth_dynamics(model, batches: list[dict[str, torch.Tensor]]) -> dict[str, list[float]]:
    """What a donor or AttnRes model does over depth on some text, given as batches of one size.

    Returns:
        `output_rms` of each of the 2L sublayers, `read_rms` of each of the 2L+1 reads (the residual stream of a donor),
        and `gradient_norm` of the parameters of each of the L layers, for the mean loss.
    """
    squares = {"output_rms": [], "read_rms": []}
    layers = decoder(model).layers
    trained = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in layers.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    model.zero_grad()
    for batch in batches:
        batch = {name: value.to(model.device) for name, value in batch.items() if name != "documents"}
        seen = look(model, {name: value for name, value in batch.items() if name != "labels"})
        for name, values in squares.items():
            values.append(np.square(seen[name]))
        (model(**batch, use_cache=False).loss / len(batches)).backward()
    dynamics = {name: np.sqrt(np.mean(values, axis=0)).tolist() for name, values in squares.items()}
    dynamics["gradient_norm"] = gradient_norms(layers)
    model.zero_grad()
    for parameter, requires_grad in trained.items():
        parameter.requires_grad_(requires_grad)
    return dynamics


def cell_size(columns: int, rows: int, widest: float, highest: float) -> tuple[float, float]:
    """Inches of a heat map's cells, so that the map isn't larger than LONGEST_SIDE."""
    return min(widest, LONGEST_SIDE / columns), min(highest, LONGEST_SIDE / rows)


def shown_labels(labels: list[str], inches: float) -> list[int]:
    """Indices of the labels that have room, the last one always."""
    step = max(1, math.ceil(SMALL_TYPE / inches))
    shown = list(range(0, len(labels), step))
    if shown[-1] != len(labels) - 1:
        shown[-1:] = [len(labels) - 1] if len(labels) - 1 - shown[-1] < step and len(shown) > 1 else [shown[-1]]
    return shown


def label_rows(axes, labels: list[str], inches: float):
    shown = shown_labels(labels, inches)
    axes.set_yticks(shown, [labels[index] for index in shown], fontsize=8)


def label_columns(axes, labels: list[str], inches: float):
    """Upright if they are wider than a column."""
    shown = shown_labels(labels, inches)
    longest = max(len(line) for label in labels for line in label.split("\n"))
    upright = longest * 0.075 > inches or len(shown) < len(labels)
    texts = [labels[index].replace("\n", ", ") if upright else labels[index] for index in shown]
    axes.set_xticks(shown, texts, fontsize=8, rotation=90 if upright else 0, ha="center")


def weight_norm(num_sources: int) -> colors.Normalize:
    """From 0 to 1, with the uniform weight of `num_sources` at two fifths: most weights are about as small."""
    return colors.PowerNorm(min(1, math.log(0.4) / -math.log(max(num_sources, 2))), 0, 1)


def color_bar(figure: Figure, image, axes, label: str, ticks: tuple | None, inches: tuple[float, float]):
    """A bar as high as the map beside it, which is `inches` wide and high, with the `ticks` that have room, the first
    ones first."""
    fraction = min(0.05, 0.3 / inches[0])
    aspect = 1.3 * inches[1] / (fraction * inches[0])
    bar = figure.colorbar(image, ax=axes, label=label, pad=0.02, fraction=fraction, aspect=aspect)
    if ticks is not None:
        shown = {}
        for tick in ticks:
            place = float(image.norm(tick)) * inches[1]
            if 0 <= place <= inches[1] and all(abs(place - other) > 1.2 * SMALL_TYPE for other in shown.values()):
                shown[tick] = place
        bar.set_ticks(list(shown), labels=[f"{tick:g}" for tick in shown])
        bar.minorticks_off()
    bar.ax.tick_params(labelsize=8)
    return bar


def grid(weights: list[np.ndarray], width: int) -> np.ndarray:
    """Reads by sources; what a read can't see isn't a number."""
    rows = np.full((len(weights), width), np.nan)
    for row, read in enumerate(weights):
        rows[row, : len(read)] = read
    return rows


def plot_reads(weights: list, config, title: str = "What each read takes from depth", relative: bool = False) -> Figure:
    """A heat map of reads (rows) by sources (columns).

    Args:
        weights: for each read, its weights on the sources that it sees, as `mean_weights` gives them.
        config: of the model.
        relative: show how many times the uniform weight each one is, which makes reads of many sources comparable
            with those of few.
    """
    reads, sources = read_names(config), source_names(config)
    cells = grid([np.asarray(read) * (len(read) if relative else 1) for read in weights], len(sources))
    ticks, palette = None, SIGNED_COLORS
    if config.attn_res_mode == "denseformer":  # any real numbers, 1 each at first
        reach = max(np.nanmax(np.abs(cells - 1)), 0.1)
        norm, label = colors.Normalize(1 - reach, 1 + reach), "weight (1: the plain sum)"
    elif relative:
        reach = 2 ** np.clip(np.nanmax(np.abs(np.log2(np.maximum(cells, 1e-9)))), 0.25, 4)
        norm, label = colors.LogNorm(1 / reach, reach), "weight as a multiple of the uniform one"
        ticks = (1, 2, 1 / 2, 4, 1 / 4, 8, 1 / 8, 16, 1 / 16) if reach > 2 else (1, 1.4, 0.7, 1.2, 0.85, 2, 0.5)
    else:
        norm, label, palette = weight_norm(len(sources)), "weight", WEIGHT_COLORS
        ticks = WEIGHT_TICKS
    widest, highest = 0.8 if len(sources) <= 10 else 0.5, max(0.24, 2.6 / len(reads))
    width, height = cell_size(len(sources), len(reads), widest, highest)
    size = (max(5.5, width * len(sources) + 2.2), height * len(reads) + 2.2)
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
    label_rows(axes, reads, height)
    layers = ["", *(f"\n{layers}" for layers in block_layers(config))] if is_block(config) else [""] * len(sources)
    label_columns(axes, [source + more for source, more in zip(sources, layers)], width)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("source")
    axes.set_ylabel("read by (layer; a: attention, m: MLP)")
    if width >= 0.42 and height >= 0.2:
        write_numbers(axes, image, cells)
    if is_block(config):
        outline_open_blocks(axes, config)
        open_block = Patch(facecolor="none", edgecolor=OPEN_COLOR, label="block still open: the sum so far")
        figure.legend(handles=[open_block], loc="outside lower center", fontsize=8, frameon=False)
    color_bar(figure, image, axes, label, ticks, (size[0] - 1.5, height * len(reads)))
    figure.suptitle(title, fontsize=11)
    return figure


def write_numbers(axes, image, cells: np.ndarray):
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            red, green, blue, _ = image.cmap(image.norm(value))
            is_dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text_color = "white" if is_dark else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=text_color)


def outline_open_blocks(axes, config):
    open_rows = {}
    for row in filter(config.extends_open_depth_source, range(config.num_depth_reads)):
        open_rows.setdefault(config.num_depth_sources(row) - 1, []).append(row)
    for source, rows in open_rows.items():
        corner = (source - 0.5, rows[0] - 0.5)
        options = {"fill": False, "edgecolor": OPEN_COLOR, "linewidth": 1.6, "clip_on": False, "zorder": 3}
        axes.add_patch(plt.Rectangle(corner, 1, len(rows), **options))


@cache
def drawable() -> set[int]:
    """The characters that the font of figures has."""
    return set(ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def token_text(tokenizer, token: int) -> str:
    """A token's text; of a token that is no whole character, the bytes, such as \\xe6."""
    text, name = tokenizer.decode([token]), tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" not in text:
        return text
    if name.startswith("<0x"):  # as tokenizers write bytes that fall back on them
        return f"\\x{name[3:5].lower()}"
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
    if not set(name) <= byte_of.keys():
        return text
    return bytes(byte_of[char] for char in name).decode("utf-8", "backslashreplace")


def token_label(text: str) -> str:
    """A token as it can be drawn on one line."""
    text = text.replace("\n", "↵").replace("\t", "→").replace(" ", "␣") or "∅"
    text = "".join(char if ord(char) in drawable() else char.encode("unicode_escape").decode() for char in text)
    return (text if len(text) <= 14 else text[:13] + "…").replace("$", r"\$")


def relative_entropy(weights: np.ndarray) -> np.ndarray:
    """The entropy of weights `(num_sources, tokens)` as a share of the largest possible one."""
    entropy = -(weights * np.log(np.maximum(weights, 1e-30))).sum(0)
    return entropy / np.log(len(weights)) if len(weights) > 1 else np.full(weights.shape[1], np.nan)


def plot_tokens(weights: list[np.ndarray], tokens: list[str], config, title: str = "Reads by token") -> Figure:
    """Two heat maps of reads (rows) by tokens (columns): how spread the weights are, and the source with the largest.

    Args:
        weights: for each read `(num_sources, tokens)`, as `token_weights` gives them.
        tokens: the text of each token.
    """
    reads, sources = read_names(config), source_names(config)
    spread = np.stack([relative_entropy(read) for read in weights])
    strongest = np.stack([read.argmax(0) for read in weights]).astype(float)
    strongest[0] = np.nan  # of one source
    width, height = cell_size(len(tokens), 2 * len(reads), 0.24, max(0.16, 2 / len(reads)))
    size = (max(6, width * len(tokens) + 2.6), 2 * height * len(reads) + 2.8)
    inches = (size[0] - 2, height * len(reads))
    figure, (above, below) = plt.subplots(2, figsize=size, layout="constrained", sharex=True)
    image = above.imshow(spread, cmap="cividis", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    color_bar(figure, image, above, "entropy (1: uniform)", None, inches)
    above.set_title("How evenly each read's weights are spread", fontsize=10)
    norm = colors.BoundaryNorm(np.arange(len(sources) + 1) - 0.5, 256)
    image = below.imshow(strongest, cmap=WEIGHT_COLORS, norm=norm, aspect="auto", interpolation="nearest")
    shown = list(range(0, len(sources), max(1, math.ceil(2 * SMALL_TYPE * len(sources) / inches[1]))))
    bar = color_bar(figure, image, below, "source", None, inches)
    bar.set_ticks(shown, labels=[sources[index] for index in shown])
    bar.minorticks_off()
    below.set_title("The source with the largest weight", fontsize=10)
    for axes in (above, below):
        axes.set_facecolor("0.85")
        label_rows(axes, reads, height)
        axes.set_ylabel("read")
    label_columns(below, [token_label(token) for token in tokens], width)
    below.set_xlabel("token")
    figure.suptitle(title, fontsize=11)
    return figure


def plot_token_weights(
    weights: list[np.ndarray], tokens: list[str], config, reads: list[str], title: str = "Weights by token"
) -> Figure:
    """For each of some reads, by name, a heat map of sources (rows) by tokens (columns). Arguments as `plot_tokens`."""
    names, sources = read_names(config), source_names(config)
    chosen = [names.index(read) for read in reads]
    width, height = cell_size(len(tokens), sum(len(weights[row]) for row in chosen), 0.24, 0.2)
    # panels of few sources stay legible beside those of many
    heights = [max(len(weights[row]) * height, min(len(weights[row]), 6) * SMALL_TYPE) for row in chosen]
    norm = weight_norm(max(len(weights[row]) for row in chosen))
    size = (max(6, width * len(tokens) + 3), sum(heights) + 0.45 * len(chosen) + 2)
    figure, panels = plt.subplots(
        len(chosen), figsize=size, layout="constrained", sharex=True, squeeze=False, height_ratios=heights
    )
    for row, inches, axes in zip(chosen, heights, panels[:, 0]):
        image = axes.imshow(weights[row], cmap=WEIGHT_COLORS, norm=norm, aspect="auto", interpolation="nearest")
        labels = sources[: len(weights[row])]
        if is_block(config) and config.extends_open_depth_source(row):
            labels = [*labels[:-1], f"{labels[-1]}, open"]
        label_rows(axes, labels, inches / len(labels))
        axes.set_title(f"read {names[row]}", fontsize=9, loc="left", pad=3)
    label_columns(panels[-1, 0], [token_label(token) for token in tokens], width)
    panels[-1, 0].set_xlabel("token")
    color_bar(figure, image, panels, "weight", WEIGHT_TICKS, (size[0] - 2, size[1] - 2))
    figure.suptitle(title, fontsize=11)
    return figure


def plot_dynamics(dynamics: dict[str, dict[str, list[float]]], title: str = "Magnitudes by depth") -> Figure:
    """Four panels with a line for each model: outputs of attention and of MLPs, reads, gradients.

    Args:
        dynamics: by the name of the model, what `depth_dynamics` returns.
    """
    figure, panels = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    for index, (name, seen) in enumerate(dynamics.items()):
        num_layers = len(seen["gradient_norm"])
        style = {
            "color": LINE_COLORS[index % len(LINE_COLORS)],
            "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4 if num_layers <= 24 else 2.5,
            "linewidth": 1.4,
        }
        layers = range(num_layers)
        panels[0, 0].plot(layers, seen["output_rms"][0::2], label=name, **style)
        panels[0, 1].plot(layers, seen["output_rms"][1::2], **style)
        panels[1, 0].plot(np.arange(2 * num_layers + 1) / 2, seen["read_rms"], **style)
        panels[1, 1].plot(layers, seen["gradient_norm"], **style)
    titles = ("Output of attention", "Output of the MLP", "What each read returns", "Gradient of a layer's parameters")
    for axes, panel_title in zip(panels.flat, titles):
        axes.set_title(panel_title, fontsize=10)
        axes.set_ylabel("norm" if "Gradient" in panel_title else "RMS")
        axes.set_xlabel("layer (between: its MLP; last: output)" if "read" in panel_title else "layer")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.tick_params(labelsize=8)
    columns = max(1, int(9.5 / (0.6 + 0.085 * max(map(len, dynamics)))))
    figure.legend(loc="outside lower center", ncols=min(columns, len(dynamics)), fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def save_figure(figure: Figure, path: Path, numbers: dict):
    """The figure, and its numbers as JSON beside it; each appears complete or not at all."""
    partial = path.with_name(f".{path.name}.attnres-tmp-{secrets.token_hex(4)}")
    try:
        figure.savefig(partial, dpi=150, format="png", metadata={"Software": SCRIPT})
        partial.replace(path)
        write_json(path.with_suffix(".json"), numbers)
    except OSError as error:
        raise RunError(f"can't write {path}: {error.strerror or error}.") from None
    finally:
        plt.close(figure)
        partial.unlink(missing_ok=True)


def read_batches(checkpoint: Checkpoint, documents, args) -> list[dict[str, torch.Tensor]]:
    """Sequences of the text as in pretraining, one in each batch."""
    tokens = tokenized(documents, checkpoint.tokenizer, args.column)
    checkpoint.check(tokens, "the text")
    if args.text == [STDLIB]:  # the part that pretrain.py doesn't train on
        tokens = tokens.select(np.flatnonzero(is_held_out(np.asarray(tokens["hash"]), 0.05)))
    packed = PackedDocuments(tokens, args.seq_len)
    if len(packed) == 0:
        packed = PackedDocuments(tokens, packed.num_tokens or 1)
    if packed.num_tokens < 2:
        raise RunError(f"{' '.join(args.text)} holds no text to look at; change --text.")
    spread = np.linspace(0, len(packed) - 1, min(len(packed), args.sequences)).round().astype(int)
    return [collate([packed[index]]) for index in spread.tolist()]


def prompt_batch(checkpoint: Checkpoint, prompt: str | None, batches: list, max_tokens: int) -> dict[str, torch.Tensor]:
    """The first `max_tokens` tokens of the prompt or, without one, of the text."""
    if prompt is None:
        return {name: batches[0][name][:, :max_tokens] for name in ("input_ids", "position_ids")}
    reading.check_text(prompt, "--prompt")
    ids = checkpoint.tokenizer(prompt, return_tensors="pt")["input_ids"][:, :max_tokens]
    checkpoint.check(ids, "--prompt")
    if ids.shape[1] == 0:
        raise RunError("--prompt is empty.")
    if checkpoint.context and ids.shape[1] > checkpoint.context:
        raise RunError(
            f"--prompt is longer than the context of {checkpoint.path}; give --tokens {checkpoint.context} or less."
        )
    return {"input_ids": ids}


def chosen_reads(config, reads: list[str] | None) -> list[str]:
    """`reads`, or up to five from all over the depth."""
    names = read_names(config)
    if reads is None:
        spread = np.linspace(min(2, len(names) - 1), len(names) - 1, 5)
        return list(dict.fromkeys(names[round(index)] for index in spread))
    if unknown := [read for read in reads if read not in names]:
        raise RunError(
            f"--reads: there is no read {', '.join(unknown)}; reads are {names[0]}, {names[1]} ... {names[-2]}, output."
        )
    return reads


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
    """What is drawn of a model; a donor has dynamics alone, and denseformer mode no weights by token."""

    dynamics: dict[str, list[float]]
    mean: list[np.ndarray] = field(default_factory=list)
    by_token: list[np.ndarray] = field(default_factory=list)

    def is_finite(self) -> bool:
        return all(np.isfinite(values).all() for values in (*self.dynamics.values(), *self.mean, *self.by_token))


def measure(checkpoint: Checkpoint, batches: list, prompt: dict[str, torch.Tensor] | None, args) -> Measured:
    model = load_checkpoint(checkpoint, args.dtype)
    try:
        check_can_be_watched(model)
    except ValueError as error:
        raise RunError(f"{checkpoint.path}: {error}") from None
    with reading.understood(f"{checkpoint.path}: the model fails", kind=RunError):
        measured = Measured(depth_dynamics(model, batches))
        if has_depth_weights(checkpoint.config):
            measured.mean = mean_weights(model, batches)
        if prompt is not None:
            measured.by_token = token_weights(model, prompt)
    if not measured.is_finite():
        raise RunError(f"{checkpoint.path}: what it computes isn't finite; the model is broken.")
    return measured


def draw_model(
    name: str, stem: str, measured: Measured, checkpoint: Checkpoint, batches: list, prompt: dict | None, args
) -> list[Path]:
    """The figures of one AttnRes model."""
    config, mean, weights = checkpoint.config, measured.mean, measured.by_token
    kind = describe_mode(config)
    tokens_seen = sum(batch["input_ids"].numel() for batch in batches)
    shared = {"model": checkpoint.path, "mode": config.attn_res_mode, "reads": read_names(config)}
    shared["sources"] = source_names(config)
    numbers = {**shared, "tokens": tokens_seen, "weights": [read.tolist() for read in mean]}
    fixed = has_fixed_weights(config)
    about = kind if fixed else f"{kind}, mean of {tokens_seen:,} tokens"
    title = f"{name}: what each read takes from depth\n{about}"
    paths = [args.output / f"{stem}-reads.png"]
    save_figure(plot_reads(mean, config, title), paths[0], numbers)
    if fixed:
        return paths
    paths.append(args.output / f"{stem}-relative.png")
    title += "\nrelative to uniform weights"
    save_figure(plot_reads(mean, config, title, relative=True), paths[-1], numbers)
    tokens = [token_text(checkpoint.tokenizer, token) for token in prompt["input_ids"][0].tolist()]
    reads = chosen_reads(config, args.reads)
    shared["tokens"] = tokens
    paths.append(args.output / f"{stem}-tokens.png")
    figure = plot_tokens(weights, tokens, config, f"{name}: reads by token ({kind})")
    spread = [relative_entropy(read).tolist() for read in weights[1:]]
    strongest = [read.argmax(0).tolist() for read in weights]
    save_figure(figure, paths[-1], {**shared, "relative_entropy": [None, *spread], "strongest_source": strongest})
    paths.append(args.output / f"{stem}-weights.png")
    figure = plot_token_weights(weights, tokens, config, reads, f"{name}: weights by token ({kind})")
    rows = dict(zip(shared["reads"], weights))
    save_figure(figure, paths[-1], {**shared, "weights": {read: rows[read].tolist() for read in reads}})
    return paths


def plot_depth_attention(args) -> list[Path]:
    """Draws all figures and returns their paths.

    Raises:
        RunError, DataError: bad input; one line says what to do.
    """
    names = short_names(args.models)
    checkpoints = [open_checkpoint(path, args.base, args.tokenizer) for path in args.models]
    if args.base and all(checkpoint.adapter is None for checkpoint in checkpoints):
        raise RunError("--base is for adapters, and no model is one.")
    if args.seq_len is None:
        args.seq_len = min([256, *(checkpoint.context for checkpoint in checkpoints if checkpoint.context)])
    check_contexts(checkpoints, args.seq_len)
    for checkpoint in checkpoints:
        if args.reads and has_depth_weights(checkpoint.config):
            chosen_reads(checkpoint.config, args.reads)
    documents = load_documents(args.text, args.column, sample_by=args.sample_by)
    batches = [read_batches(checkpoint, documents, args) for checkpoint in checkpoints]
    prompts = [
        prompt_batch(checkpoint, args.prompt, own, args.tokens)
        if has_depth_weights(checkpoint.config) and not has_fixed_weights(checkpoint.config)
        else None
        for checkpoint, own in zip(checkpoints, batches)
    ]
    figures = [f"{stem}-{figure}.png" for stem in file_stems(names) for figure in FIGURES] + ["dynamics.png"]
    with output_folder(args.output, SCRIPT, {name: (name, f"{Path(name).stem}.json") for name in figures}):
        each = tqdm(list(zip(checkpoints, batches, prompts)), disable=not sys.stderr.isatty())
        measured = [measure(checkpoint, own, prompt, args) for checkpoint, own, prompt in each]
        paths = []
        for name, stem, checkpoint, own, prompt, seen in zip(
            names, file_stems(names), checkpoints, batches, prompts, measured
        ):
            if has_depth_weights(checkpoint.config):
                paths += draw_model(name, stem, seen, checkpoint, own, prompt, args)
        paths.append(args.output / "dynamics.png")
        tokens = sum(batch["input_ids"].numel() for batch in batches[0])
        dynamics = {name: seen.dynamics for name, seen in zip(names, measured)}
        save_figure(plot_dynamics(dynamics, f"Magnitudes by depth, on {tokens:,} tokens"), paths[-1], dynamics)
    return paths


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="plot_depth_attention.py",
        usage="%(prog)s MODEL [MODEL ...] --output FOLDER [options]; --help lists them",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument
    add("models", nargs="+", help="folders or Hub ids of models, or folders of PEFT adapters")
    add("--base", help="base of the adapters, instead of the one that they name")
    add("--tokenizer", help="folder or Hub id; default: each model's own")
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as saved")
    add("--text", nargs="+", default=[STDLIB], help="files or folders of text, JSON lines or Parquet, or a Hub id, to "
        "average over; default: the part of Python's own source that pretrain.py holds out")  # fmt: skip
    add("--column", default="text", help="column that holds the text; default: text")
    add("--sample-by", choices=("document", "paragraph", "line"), help="what a document is in text files")
    add("--sequences", type=positive, default=8, help="sequences from all over the text; default: 8")
    add("--seq-len", type=positive, help="tokens per sequence; default: 256, or the models' context")
    add("--prompt", help="what to show token by token; default: the beginning of the text")
    add("--tokens", type=positive, default=48, help="of the prompt, to show at most; default: 48")
    add("--reads", help="whose weights to show token by token, such as 0m,3a,output; default: five")
    add("--output", type=Path, required=True, help="folder for the figures")
    args = parser.parse_args(argv)
    if args.prompt == "":
        parser.error("--prompt is empty")
    args.reads = [read.strip() for read in args.reads.split(",")] if args.reads else None
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(argv)
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # of libraries
    try:
        with reading.no_panic():
            paths = plot_depth_attention(args)
    except InputError as error:
        raise SystemExit(f"plot_depth_attention: {error}") from None
    except KeyboardInterrupt:
        print("plot_depth_attention: interrupted; finished figures stay.", file=sys.stderr)
        raise SystemExit(130) from None
    print(json.dumps({"output": str(args.output), "figures": [path.name for path in paths]}))


if __name__ == "__main__":
    main()
