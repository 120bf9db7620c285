# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Figures of depth weights, of what happens over depth, and of losses."""

import io
import math
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from attnres_convert import InputError
from attnres_convert.writing import decimals, write_bytes, write_json
from matplotlib import colormaps, colors, font_manager, ft2font, ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from transformers.convert_slow_tokenizer import bytes_to_unicode

from depth_mixers_attnres import DEPTH_MIXERS

from .folders import write_output
from .log import losses


SOFTWARE = "plot_depth_attention.py"  # as which a figure is known again
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


def new_figure(*grid: int, size: tuple[float, float], **options) -> tuple[Figure, Axes]:
    """A figure of `size` inches with axes, apart from what its user draws with pyplot."""
    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(*grid, **options)


def read_names(config) -> list[str]:
    """Of the 2L+1 reads, by the sublayer that they feed."""
    return [f"{layer}{kind}" for layer in range(config.num_hidden_layers) for kind in "am"] + ["output"]


def source_names(config) -> list[str]:
    """Of all sources that there are in the end: the embedding, then blocks, or sublayers; or of streams."""
    sublayers = read_names(config)[:-1]
    size = config.attn_res_sublayers_per_block
    if not config.depth_sources.closes:
        return [f"stream {number}" for number in range(1, config.attn_res_num_streams + 1)]
    if size == 1:
        return ["embedding", *sublayers]
    return ["embedding", *(f"block {number}" for number in range(1, len(sublayers[::size]) + 1))]


def block_layers(config) -> list[str]:
    """The layers of each block, for people."""
    size, last = config.attn_res_block_size, config.num_hidden_layers - 1
    ends = [(first, min(first + size - 1, last)) for first in range(0, last + 1, size)]
    return [f"layer {first}" if first == end else f"layers {first}–{end}" for first, end in ends]


def labelled_sources(config, label: str) -> list[str]:
    """The names of sources; `label` joins those of blocks to their layers, as in `"{} ({})"`."""
    sources = source_names(config)
    return [sources[0], *map(label.format, sources[1:], block_layers(config))] if is_block(config) else sources


def is_block(config) -> bool:
    """Whether a source sums the outputs of a block."""
    return config.depth_sources.sums_blocks


def describe_mode(config) -> str:
    size = config.attn_res_block_size
    blocks = f", {size} layer{'s' * (size > 1)} per block" if is_block(config) else ""
    return f"{config.attn_res_mode} mode{blocks}"


def has_depth_weights(config) -> bool:
    return hasattr(config, "attn_res_mode")


def has_fixed_weights(config) -> bool:
    """The same for all tokens."""
    return not DEPTH_MIXERS[config.attn_res_mode].depends_on_input


def is_distribution(config) -> bool:
    """Whether the weights of a read sum to 1; otherwise they are any real numbers."""
    return DEPTH_MIXERS[config.attn_res_mode].sums_to_one


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


def color_scale(weights: list[np.ndarray], config) -> tuple[colors.Normalize, str, str, tuple | None]:
    """For weights of reads: how numbers are made colours, what they are called, the colours, and ticks.

    Weights that are no distribution are drawn around those of the plain sum, 1 each, and those of streams around 0.
    """
    if is_distribution(config):
        return weight_norm(max(map(len, weights))), "weight", WEIGHT_COLORS, WEIGHT_TICKS
    center = 1 if config.depth_sources.closes else 0
    reach = max(0.1, *(np.abs(np.asarray(read) - center).max() for read in weights))
    label = "weight (1: the plain sum)" if center else "weight"
    return colors.Normalize(center - reach, center + reach), label, SIGNED_COLORS, None


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
    norm, label, palette, ticks = color_scale(weights, config)
    if relative:
        reach = 2 ** np.clip(np.max(np.abs(np.log2(cells[cells > 1e-9]))), 0.25, 4)
        norm, label, palette = (
            colors.LogNorm(1 / reach, reach),
            "weight as a multiple of the uniform one",
            SIGNED_COLORS,
        )
        ticks = (1, 2, 1 / 2, 4, 1 / 4, 8, 1 / 8, 16, 1 / 16) if reach > 2 else (1, 1.4, 0.7, 1.2, 0.85, 2, 0.5)
    widest, highest = 0.8 if len(sources) <= 10 else 0.5, max(0.24, 2.6 / len(reads))
    width, height = cell_size(len(sources), len(reads), widest, highest)
    size = (max(5.5, width * len(sources) + 2.2), height * len(reads) + 2.2)
    figure, axes = new_figure(size=size)
    axes.set_facecolor("0.85")
    image = axes.imshow(cells, cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
    label_rows(axes, reads, height)
    label_columns(axes, labelled_sources(config, "{}\n{}"), width)
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
            red, green, blue, alpha = image.cmap(image.norm(value))  # of 0 on a logarithmic scale nothing, alpha 0
            is_dark = alpha * (0.3 * red + 0.59 * green + 0.11 * blue) + (1 - alpha) * 0.85 < 0.5
            text_color = "white" if is_dark else "black"
            axes.text(column, row, decimals(value, 2), ha="center", va="center", fontsize=7, color=text_color)


def outline_open_blocks(axes, config):
    open_rows = {}
    for row in filter(config.extends_open_depth_source, range(config.num_depth_reads)):
        open_rows.setdefault(config.num_depth_sources(row) - 1, []).append(row)
    for source, rows in open_rows.items():
        corner = (source - 0.5, rows[0] - 0.5)
        options = {"fill": False, "edgecolor": OPEN_COLOR, "linewidth": 1.6, "clip_on": False, "zorder": 3}
        axes.add_patch(Rectangle(corner, 1, len(rows), **options))


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
    figure, (above, below) = new_figure(2, size=size, sharex=True)
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
    norm, label, palette, ticks = color_scale([weights[row] for row in chosen], config)
    size = (max(6, width * len(tokens) + 3), sum(heights) + 0.45 * len(chosen) + 2)
    figure, panels = new_figure(len(chosen), size=size, sharex=True, squeeze=False, height_ratios=heights)
    for row, inches, axes in zip(chosen, heights, panels[:, 0]):
        image = axes.imshow(weights[row], cmap=palette, norm=norm, aspect="auto", interpolation="nearest")
        labels = sources[: len(weights[row])]
        if is_block(config) and config.extends_open_depth_source(row):
            labels = [*labels[:-1], f"{labels[-1]}, open"]
        label_rows(axes, labels, inches / len(labels))
        axes.set_title(f"read {names[row]}", fontsize=9, loc="left", pad=3)
    label_columns(panels[-1, 0], [token_label(token) for token in tokens], width)
    panels[-1, 0].set_xlabel("token")
    color_bar(figure, image, panels, label, ticks, (size[0] - 2, size[1] - 2))
    figure.suptitle(title, fontsize=11)
    return figure


PANELS = {
    "sum_rms": "Running sum: the residual stream, the open block, or the output alone",
    "attention": "Output of attention",
    "mlp": "Output of the MLP",
    "read_rms": "What each read returns",
    "gradient_norm": "Gradient of a layer's parameters",
}


def plot_running_sum(axes: Axes, sums: list[float], starts: list[int], style: dict):
    """A thick line for each sum of several outputs, thin ones from one sum to the next, and a light upright line
    wherever a block begins.

    Args:
        sums: after each sublayer.
        starts: the sublayers with which sums begin.
        style: of the line.
    """
    places = np.arange(len(sums)) / 2
    axes.plot(places, sums, **{**style, "linestyle": "-", "linewidth": 0.8, "alpha": 0.45})
    if len(starts) == len(sums):
        return
    style = {**style, "linestyle": "-", "linewidth": 2.2, "marker": None}
    axes.plot(*(np.insert(values, starts[1:], np.nan) for values in (places, np.asarray(sums))), **style)
    for start in starts[1:]:
        axes.axvline((start - 0.5) / 2, color=style["color"], linewidth=0.8, alpha=0.35, zorder=0)


def plot_dynamics(dynamics: dict[str, dict[str, list[float]]], title: str = "Magnitudes by depth") -> Figure:
    """Panels with a line for each model: the running sum, if a model has one, outputs of attention and of MLPs, reads,
    gradients.

    Args:
        dynamics: by the name of the model, what `depth_dynamics` returns.
    """
    has_sums = any("sum_rms" in seen for seen in dynamics.values())
    rows = [["sum_rms"] * 2] * has_sums + [["attention", "mlp"], ["read_rms", "gradient_norm"]]
    figure = Figure(figsize=(10, 7 + 4.5 * has_sums), layout="constrained")
    panels = figure.subplot_mosaic(rows, height_ratios=[1.45] * has_sums + [1, 1])
    for index, (name, seen) in enumerate(dynamics.items()):
        num_layers = len(seen["gradient_norm"])
        style = {
            "color": LINE_COLORS[index % len(LINE_COLORS)],
            "linestyle": LINE_STYLES[index % len(LINE_STYLES)],
            "marker": MARKERS[index % len(MARKERS)],
            "markersize": 4 if num_layers <= 24 else 2.5,
            "linewidth": 1.4,
        }
        if "sum_rms" in seen:
            plot_running_sum(panels["sum_rms"], seen["sum_rms"], seen["sum_starts"], style)
        layers = range(num_layers)
        panels["attention"].plot(layers, seen["output_rms"][0::2], label=name, **style)
        panels["mlp"].plot(layers, seen["output_rms"][1::2], **style)
        panels["read_rms"].plot(np.arange(2 * num_layers + 1) / 2, seen["read_rms"], **style)
        panels["gradient_norm"].plot(layers, seen["gradient_norm"], **style)
    between = {"sum_rms": " (between: its MLP)", "read_rms": " (between: its MLP; last: output)"}
    for key, axes in panels.items():
        axes.set_title(PANELS[key], fontsize=11)
        axes.set_ylabel("norm" if key == "gradient_norm" else "RMS")
        axes.set_xlabel(f"layer{between.get(key, '')}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yscale("log")
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.margins(x=0.02)
        axes.tick_params(labelsize=9)
    columns = max(1, int(9.5 / (0.6 + 0.1 * max(map(len, dynamics)))))
    figure.legend(loc="outside lower center", ncols=min(columns, len(dynamics)), fontsize=11)
    figure.suptitle(title, fontsize=12)
    return figure


def without_seed(name: str) -> str:
    return " ".join(part for part in name.split(" ") if not part.startswith("seed=")) or "all"


def plot_losses(runs: dict[str, list[dict]], path: Path, title: str, own: str | None = None):
    """Held-out losses by step, one colour for all seeds of a run, and for few runs the training losses fainter.

    Args:
        runs: entries of `metrics.jsonl` by the name of the run.
        own: as in [`write_output`].
    """
    figure, axes = new_figure(size=(8.5, 4.5))
    groups = list(dict.fromkeys(map(without_seed, runs)))
    colors = colormaps["tab10" if len(groups) <= 10 else "viridis"].resampled(max(10, len(groups))).colors
    seen = set()
    for name, metrics in runs.items():
        group = without_seed(name)
        label = None if group in seen else group if len(runs) > 1 else "held-out"
        seen.add(group)
        style = {"color": colors[groups.index(group)], "marker": "o", "markersize": 4}
        held_out, training = losses(metrics, "held_out_loss"), losses(metrics, "loss")
        axes.plot(held_out.keys(), held_out.values(), label=label, **style)
        if len(runs) <= 4:
            style |= {"marker": None, "alpha": 0.3, "linewidth": 1}
            axes.plot(training.keys(), training.values(), label="training" if len(runs) == 1 else None, **style)
    if 1 < len(runs) <= 4:
        axes.plot([], [], color="grey", alpha=0.3, linewidth=1, label="training")
    axes.set_xlabel("training step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("held-out loss (nats per token)" if len(runs) > 4 else "loss (nats per token)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside right upper")
    write_output(path, png(figure, "attnres-pretrain, attnres-finetune"), own)


def plot_differences(differences: dict[str, dict], elsewhere: dict[str, float] | None = None) -> bytes:
    """Differences of held-out losses from those of one group of runs, a row each: every seed, the mean, its interval.

    Args:
        differences: of `comparison.json`, by the name of the row.
        elsewhere: what a paper found, by the name of the row.

    Returns:
        the figure as a file.
    """
    figure, axes = new_figure(size=(8.5, 1.4 + 0.3 * len(differences)))
    axes.axvline(0, color="grey", linewidth=1)
    points = {"each seed": [], "mean, and its 95 % interval": [], "the paper's": []}
    for row, (name, found) in enumerate(differences.items()):
        axes.plot(found["interval"], [row, row], color="C0", linewidth=2)
        of_paper = (elsewhere or {}).get(name)
        for own, values in zip(points.values(), (found["seeds"].values(), [found["mean"]], [of_paper])):
            own += [(value, row) for value in values if value is not None]
    for (label, own), style in zip(points.items(), ({"color": "C7", "alpha": 0.6}, {"marker": "D"}, {"marker": "x"})):
        if own:
            axes.plot(*zip(*own), **{"marker": "o", "linestyle": "", "label": label, **style})
    axes.set_yticks(range(len(differences)), differences)
    axes.invert_yaxis()
    first = next(iter(differences.values()))["from"]
    axes.set_xlabel(f"held-out loss (nats per token) less that of\n{first}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, loc="outside upper center", ncols=3)
    return png(figure, "attnres-pretrain, attnres-finetune")


def png(figure: Figure, software: str = SOFTWARE) -> bytes:
    """The figure as a file, which says what it was made by."""
    content = io.BytesIO()
    figure.savefig(content, dpi=150, format="png", metadata={"Software": software})
    return content.getvalue()


@contextmanager
def saving(path: Path):
    """
    Raises:
        InputError: the block can't write the file.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"can't write {path}: {error.strerror or error}.") from None


def save_figure(figure: Figure, path: Path, numbers: dict):
    """The figure, and its numbers as JSON beside it."""
    with saving(path):
        write_bytes(path, png(figure))
        write_json(path.with_suffix(".json"), numbers)
