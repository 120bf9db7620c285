# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A ladder of models for a scaling law: several sizes, trained from scratch alike, and a report of what they say.

The compute C of a training run, in PFLOP/s-days of 8.64e19 FLOPs, is

    C = D (6 N + 18 d S)

- D is the number of tokens.
- N counts the parameters of layers and norms, and the head's matrix once, which multiplies also where it is tied. A
  multiplication and an addition for each, and twice as much in the backward pass, are 6 FLOPs per token.
- A read of n sources of d numbers takes 6 n d FLOPs per token: 2 n d for the squares of its keys' norms, for the scores
  and for the sum. With the backward pass that is 18 n d. S is the sum of n over all reads, 0 in a donor.

Left out are the scores and sums of attention over tokens, which are the same in all variants, and what is done number
by number: norms but for their gains, softmax, activations, the optimizer.
"""

import itertools
import math
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from attnres_convert import InputError, reading
from attnres_convert.reading import sha256
from attnres_convert.writing import decimals, json_text, table
from matplotlib import ticker
from matplotlib.figure import Figure

from .comparison import own_files
from .configs import read_config, with_mode
from .data import load_documents, training_texts
from .figures import LINE_COLORS, MARKERS, new_figure, png
from .folders import digest_of, write_output
from .laws import PAPER, PAPER_COMPUTE, analyse, multiplier
from .options import PretrainOptions, ScalingOptions, size_of
from .planning import Model
from .process import main_process_first, versions
from .resampling import RESAMPLES
from .run import open_run
from .start import new_tokenizer


FORMULA = "C = D (6 N + 18 d S)"
PFLOPS_DAY = 1e15 * 24 * 60 * 60  # FLOPs
RECORD, REPORT, FIGURE = "scaling_law.json", "scaling_law.md", "scaling_law.png"
# options that may change while a ladder is built
FREE = ("output", "sizes", "jobs")


def training_flops(model: Model) -> float:
    """Of the forward and the backward pass, per token: 6 N + 18 d S."""
    sources = sum(map(model.num_sources, range(2 * len(model.layers) + 1)))
    return 6 * model.active + 18 * model.hidden_size * sources


@dataclass(frozen=True)
class Rung:
    """One size of the ladder.

    Args:
        models: by variant.
        steps: of each run.
        tokens_per_step: of all its sequences.
    """

    models: dict[str, Model]
    steps: int
    tokens_per_step: int

    @property
    def tokens(self) -> int:
        return self.steps * self.tokens_per_step

    def flops(self, variant: str) -> float:
        """Of a run."""
        return self.tokens * training_flops(self.models[variant])


def new_rung(options: ScalingOptions, size: str, vocab_size: int) -> Rung:
    given = options.run(size, 1, vocab_size)
    config = read_config(given.config, given.set, may_be_type=True)
    models = {variant: Model(with_mode(config, variant, given.block_size)) for variant in options.variants}
    tokens_per_step = given.batch_size * given.seq_len
    tokens = options.tokens_per_parameter * non_embedding(models[options.variants[0]])
    return Rung(models, math.ceil(tokens / tokens_per_step), tokens_per_step)


def non_embedding(model: Model) -> int:
    """Parameters of layers and norms, without depth attention's."""
    return round(model.active - model.head)


class Ladder:
    """Comparisons of models of several sizes in one folder, which share a tokenizer.

    Raises:
        InputError: the folder is in use for something else, or for a ladder with other options; the data can't be read.
    """

    def __init__(self, options: ScalingOptions):
        self.options, folder = options, options.output
        if PartialState().num_processes > 1:
            with main_process_first():
                raise InputError("scaling_law.py starts processes itself; run it as it is, with --jobs.")
        open_run(folder, {name: value for name, value in vars(options).items() if name not in FREE})
        texts = ()
        if not (folder / "tokenizer").exists():
            documents = load_documents(
                options.data, options.column, options.data_config, options.data_split, options.sample_by
            )
            texts = training_texts(documents, options.column, options.held_out)
        self.vocab_size = len(new_tokenizer(texts, options.vocab, folder / "tokenizer"))
        self.rungs = {size: self.rung(size) for size in options.sizes.split(",")}

    def rung(self, size: str) -> Rung:
        return new_rung(self.options, size, self.vocab_size)

    def plan(self) -> str:
        """What is going to be trained, as a table."""
        rows = [("size", "variant", "parameters", "without embedding", "tokens", "steps", "FLOPs of a run", "of all")]
        seeds, total, trials = len(self.options.seeds.split(",")), 0, 0
        values, share = self.options.learning_rates.count(",") + 1, self.options.tune_share
        tried = values - 1 if share == 1 else values * share  # runs, one of which counts as a seed's if it is whole
        for size, rung in self.rungs.items():
            for variant, model in rung.models.items():
                flops = rung.flops(variant)
                total += seeds * flops
                trials += tried * flops if values > 1 else 0
                counts = (model.parameters, non_embedding(model), rung.tokens, rung.steps)
                numbers = (*(f"{count:,}" for count in counts), f"{flops:.3g}", f"{seeds * flops:.3g}")
                rows.append((size, variant, *numbers))
        text = f"{table(rows)}\n{seeds} seeds each, {total:.3g} FLOPs"
        if trials:
            text += f"; trying {values} learning rates takes {trials:.3g} more, or some more if the best is at an edge"
        done = [size for size in self.rungs if self.record(size).exists()]
        return f"{text}; done already: {', '.join(done) or 'none'}.\n"

    def record(self, size: str) -> Path:
        return self.options.output / size / "comparison.json"

    def unfinished(self) -> list[PretrainOptions]:
        """The comparisons to train, the smallest first."""
        sizes = sorted(self.rungs, key=lambda size: self.rungs[size].flops(self.options.variants[0]))
        missing = [size for size in sizes if not self.record(size).exists()]
        return [self.options.run(size, self.rungs[size].steps, self.vocab_size) for size in missing]

    def finished(self) -> list[str]:
        """The sizes in the folder that are done, of this command and of earlier ones."""
        sizes = []
        for path in sorted(self.options.output.glob("*x*/comparison.json")):
            try:
                size_of(path.parent.name, "")
            except InputError:
                continue
            sizes.append(path.parent.name)
        return sizes

    def report(self) -> dict:
        """Fits the laws, writes `scaling_law.json`, `.md` and `.png`, and returns what the first holds.

        Raises:
            InputError: no size is done, or what one has written is damaged.
        """
        options, points, limits = self.options, [], []
        for size in self.finished():
            found, said = read_comparison(self.record(size), size, self.rung(size))
            points, limits = points + found, limits + said
        laws = analyse(points, options.variants)
        limits = laws.pop("limits") + limits + limits_of_data(points)
        if "," in options.learning_rates:
            limits.append(
                "Learning rates are the best for the first seed on the same held-out text, which makes its losses a "
                "little too good."
            )
        record, path = options.output / RECORD, options.output / FIGURE
        own, files = own_files(record), {}
        write_output(path, png(plot_laws(points, laws), "scaling_law.py"), own.get(FIGURE))
        files[FIGURE] = sha256(path)
        results = {"output": str(options.output), "formula": FORMULA, **laws, "points": points, "limits": limits}
        paper = {name: {"A": A, "alpha": alpha} for name, (A, alpha) in PAPER.items()}
        results["paper"] = {"source": "arXiv 2603.15031", "fits": paper, "compute": PAPER_COMPUTE}
        results |= {"versions": versions(), "command": ["python", "scripts/scaling_law.py", *options.words()]}
        write_output(options.output / REPORT, report(results).encode(), own.get(REPORT))
        files[REPORT] = sha256(options.output / REPORT)
        results["files"] = {**files, RECORD: digest_of(json_text(results).encode())}
        write_output(record, json_text(results).encode(), own.get(RECORD))
        return results


def read_comparison(path: Path, size: str, rung: Rung) -> tuple[list[dict], list[str]]:
    """The runs of a size that have a loss, as points of [`analyse`] and more, and what is to be said of them.

    Raises:
        InputError: the file isn't as it was written.
    """
    content, points, limits = reading.read_json(path), [], []
    for name, run in (reading.typed(content, "runs", dict, str(path)) or {}).items():
        if "held_out_loss" not in run:
            limits.append(f"{size}: {name} has no loss, it stopped at step {run.get('step')}.")
            continue
        try:
            arguments = run["arguments"]
            variant = arguments["mode"]
            if (run["steps"], run["parameters"]) != (rung.steps, rung.models[variant].parameters):
                raise InputError(f"{path} is of other models than this command's; choose another --output.")
            points.append(
                {
                    "size": size,
                    "variant": variant,
                    "seed": arguments["seed"],
                    "loss": float(run["held_out_loss"]),
                    "compute": run["tokens"] * training_flops(rung.models[variant]) / PFLOPS_DAY,
                    "learning_rate": arguments["learning_rate"],
                    "non_embedding_parameters": non_embedding(rung.models[variant]),
                    **{key: run[key] for key in ("parameters", "depth_parameters", "tokens", "steps")},
                    **{key: run[key] for key in ("training_tokens", "epochs")},
                    **{key: run[key] for key in ("tokens_per_second", "peak_memory_bytes")},
                }
            )
        except (KeyError, TypeError):
            raise InputError(f"{path} is damaged; remove it, and the same command writes it again.") from None
    for group in reading.typed(content, "at_an_edge", list, str(path)) or ():
        limits.append(f"{size}: {group}'s best learning rate is at the edge of those that were tried.")
    return points, limits


def limits_of_data(points: list[dict]) -> list[str]:
    """What the data make doubtful."""
    limits = []
    if len({point["training_tokens"] for point in points}) > 1:
        limits.append("The data changed between sizes, which aren't comparable then.")
    again = {point["size"]: point["epochs"] for point in points if point["epochs"] > 1}
    limits += [f"{size}: its runs saw the data {epochs:.1f} times." for size, epochs in again.items()]
    return limits


def plot_laws(points: list[dict], laws: dict) -> Figure:
    """Loss over compute on logarithmic scales, a point for each run; a line for each law, with its interval."""
    figure, axes = new_figure(size=(7.5, 5))
    variants = list(dict.fromkeys(point["variant"] for point in points))
    for variant, color, marker in zip(variants, LINE_COLORS, MARKERS):
        own = [point for point in points if point["variant"] == variant]
        compute, losses = [point["compute"] for point in own], [point["loss"] for point in own]
        law = laws["fits"].get(variant)
        name = f"{variant}: {law['A']:.4g} C^{-law['alpha']:.4f}" if law else variant
        axes.scatter(compute, losses, color=color, marker=marker, s=18, alpha=0.75, linewidths=0, label=name)
        if law:
            ends = np.geomspace(min(compute), max(compute), 2)
            axes.plot(ends, law["A"] * ends ** -law["alpha"], color=color, linewidth=1.4)
            if band := law.get("band"):
                axes.fill_between(*band.values(), color=color, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(ticker.MaxNLocator(8))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel("compute of training (PFLOP/s-days)")
    axes.set_ylabel("held-out loss (nats per token)")
    has_bands = any("band" in law for law in laws["fits"].values())
    axes.set_title("Loss by compute" + (", with 95 % of resampled seeds" if has_bands else ""))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure


def span(bounds: list[float] | None, digits: int) -> str:
    return "-" if bounds is None else " to ".join(decimals(bound, digits) for bound in bounds)


def fits_table(fits: dict[str, dict]) -> str:
    heading = ("variant", "A", "95 % interval", "alpha", "95 % interval", "largest misfit")
    rows = [(*heading, "paper's A", "paper's alpha")]
    for variant, law in fits.items():
        of_paper = (f"{value:.3f}" for value in PAPER[variant])
        own = (f"{law['A']:.4g}", " to ".join(f"{bound:.4g}" for bound in law.get("A_interval", ())) or "-")
        own += (decimals(law["alpha"]), span(law.get("alpha_interval"), 4), f"{law['largest_misfit']:.2%}")
        rows.append((variant, *own, *of_paper))
    return table(rows)


def multipliers_table(multipliers: dict[str, dict]) -> str:
    rows = [("variant", "against", "at compute", "multiplier", "95 % interval", f"paper's fits at {PAPER_COMPUTE}")]
    for variant, entry in multipliers.items():
        first, law = (np.array([math.log(A), alpha]) for A, alpha in (PAPER[entry["from"]], PAPER[variant]))
        value = "-" if entry["value"] is None else decimals(entry["value"], 2)
        of_paper = decimals(float(multiplier(first, law, math.log(PAPER_COMPUTE))), 2)
        rows.append(
            (variant, entry["from"], f"{entry['compute']:.3g}", value, span(entry.get("interval"), 2), of_paper)
        )
    return table(rows)


def differences_table(rows: list[dict]) -> str:
    lines = [("size", "variant", f"loss less that of {rows[0]['from']}", "95 % interval", "each seed")]
    for row in rows:
        each = ", ".join(decimals(value, sign="+") for value in row["seeds"].values())
        bounds = row.get("interval")
        between = " to ".join(decimals(bound, sign="+") for bound in bounds) if bounds else "-"
        lines.append((row["size"], row["variant"], decimals(row["mean"], sign="+"), between, each))
    return table(lines)


def points_table(points: list[dict]) -> str:
    heading = ("size", "variant", "parameters", "without embedding", "tokens", "compute", "learning rate")
    rows = [(*heading, "held-out loss", "each seed")]
    ordered = sorted(points, key=lambda point: point["non_embedding_parameters"])
    for _, group in itertools.groupby(ordered, lambda point: (point["size"], point["variant"])):
        group = list(group)
        losses, point = [point["loss"] for point in group], group[0]
        spread = f" ± {decimals(float(np.std(losses, ddof=1)))}" if len(losses) > 1 else ""
        rows.append(
            (
                point["size"],
                point["variant"],
                *(f"{point[name]:,}" for name in ("parameters", "non_embedding_parameters", "tokens")),
                f"{point['compute']:.3g}",
                f"{point['learning_rate']:g}",
                decimals(float(np.mean(losses))) + spread,
                ", ".join(map(decimals, losses)),
            )
        )
    return table(rows)


def report(results: dict) -> str:
    """The laws in Markdown, beside the paper's, with what can't be concluded from them."""

    def filled(text: str) -> str:
        return textwrap.fill(" ".join(text.split()), 120, break_on_hyphens=False)

    sections = [
        "# Scaling law",
        filled(
            "Losses L are nats per token on held-out text. Compute C is that of training, in PFLOP/s-days (8.64e19 "
            "FLOPs), with D tokens, N parameters that multiply (of the layers, and the head's matrix once), hidden "
            "size d, and S, the number of sources of all reads together:"
        ),
        f"`{FORMULA}`",  # not wrapped: a line that begins with a plus is a list
        filled(
            "A read of n sources takes 6 n d FLOPs forward and twice as many backward. Attention's scores and sums "
            "over tokens, the same in all variants, are left out."
        ),
        "## What can't be concluded",
        "\n".join(textwrap.fill(f"- {line}", 120, subsequent_indent="  ") for line in results["limits"]),
    ]
    if results["fits"]:
        sections += [
            "## Laws",
            filled(
                "L = A C^-alpha, by least squares on the mean log losses of the sizes; the misfit is that of a mean. A "
                "is the loss at 1 PFLOP/s-day, far beyond these runs. The paper's laws (arXiv 2603.15031) are of other "
                "data, another tokenizer and much larger models: their A isn't comparable, their alpha hardly."
            ),
            fits_table(results["fits"]),
        ]
    if results["multipliers"]:
        sections += [
            "## Compute multipliers",
            filled(
                "How many times a variant's compute the first one needs for the same loss, by both laws, at the "
                "compute of the variant's largest model. More than 1: the variant needs less."
            ),
            multipliers_table(results["multipliers"]),
        ]
    if results["differences"]:
        sections += [
            "## Differences at each size",
            filled("Measured, without a law: seed by seed, as runs of one seed see the same batches."),
            differences_table(results["differences"]),
        ]
    if any("A_interval" in law for law in results["fits"].values()):
        text = f"""Intervals are 95 % of {RESAMPLES} bootstrap resamples: seeds are drawn with
        replacement at each size, the same ones for all variants. They know of the chance in seeds alone, not of whether
        a power law fits, and with three seeds they are too narrow."""
        sections.append(filled(text))
    command = shlex.join(results["command"])
    sections += ["## Runs", points_table(results["points"]), f"```console\n$ {command}\n```"]
    return "\n\n".join(section.strip() for section in sections) + "\n"
