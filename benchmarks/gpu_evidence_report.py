# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Tables and figures of gpu_evidence.py, from the content of its evidence.json. Needs no torch."""

import statistics
import sys
from pathlib import Path

import from_clone  # noqa: F401
import numpy as np


# isort: split
from attnres_convert.writing import decimals, table, write_text


NAMES = {"donor": "donor: plain sum", "block": "Block", "full": "Full"}
COLORS = {"donor": "0.35", "block": "tab:blue", "full": "tab:orange"}
RESAMPLES, NEIGHBOURS = 10_000, 16


def complete_seeds(content: dict) -> dict[int, dict[str, dict]]:
    """The final rows by seed and variant, of those seeds with which all variants were trained to a finite loss."""
    seeds = {}
    for row in content["rows"]:
        if row["stage"] == "final" and row["held_out_loss"] is not None:
            seeds.setdefault(row["seed"], {})[row["variant"]] = row
    return {seed: rows for seed, rows in sorted(seeds.items()) if len(rows) == len(NAMES)}


def interval(differences: np.ndarray) -> list[float]:
    """95 % of the means of resampled sequences `(num_sequences,)`, which are drawn as runs of neighbours, because files
    go over several sequences."""
    parts = [part.mean() for part in np.array_split(differences, max(1, len(differences) // NEIGHBOURS))]
    drawn = np.random.default_rng(0).choice(parts, (RESAMPLES, len(parts))).mean(1)
    return np.quantile(drawn, [0.025, 0.975]).round(5).tolist()


def compare(seeds: dict[int, dict[str, dict]], variant: str) -> dict:
    """A variant's losses, and their differences to the donor's on the same sequences with the same seed."""
    rows = [seed[variant] for seed in seeds.values()]
    losses = [row["held_out_loss"] for row in rows]
    summary = {
        "learning_rate": rows[0]["learning_rate"],
        "held_out_loss": round(statistics.mean(losses), 5),
        "standard_deviation": round(statistics.stdev(losses), 5) if len(losses) > 1 else None,
        "by_seed": losses,
    }
    if variant != "donor":
        differences = np.array(
            [
                np.subtract(seed[variant]["sequence_losses"], seed["donor"]["sequence_losses"], dtype=float)
                for seed in seeds.values()
            ]
        )
        summary["difference"] = {
            "mean": round(float(differences.mean()), 5),
            "interval": interval(differences.mean(0)),
            "by_seed": differences.mean(1).round(5).tolist(),
            "intervals_by_seed": [interval(of_seed) for of_seed in differences],
        }
    return summary


def summarise(content: dict) -> dict:
    seeds = complete_seeds(content)
    plan, settings = content["plan"], content["settings"]
    return {
        "seeds": list(seeds),
        "tokens": plan.get("final_tokens"),
        "tokens_asked_for": settings["tokens"],
        "complete": list(seeds) == sorted(settings["seeds"]),
        "variants": {variant: compare(seeds, variant) for variant in NAMES} if seeds else {},
    }


# --- Tables


def signed(value: float) -> str:
    return decimals(value, sign="+")


def within(bounds: list[float]) -> str:
    return f"({signed(bounds[0])} to {signed(bounds[1])})"


def result_table(content: dict, summary: dict) -> str:
    rows = [("residual stream", "rate", "held-out loss", "each seed", "less the donor's", "each seed")]
    for variant, result in summary["variants"].items():
        spread = "" if result["standard_deviation"] is None else f" ± {result['standard_deviation']:.4f}"
        difference = result.get("difference")
        rows.append(
            (
                NAMES[variant],
                f"{result['learning_rate']:g}",
                f"{result['held_out_loss']:.4f}{spread}",
                ", ".join(f"{loss:.4f}" for loss in result["by_seed"]),
                f"{signed(difference['mean'])} {within(difference['interval'])}" if difference else "",
                ", ".join(
                    f"{signed(value)} {within(bounds)}"
                    for value, bounds in zip(difference["by_seed"], difference["intervals_by_seed"])
                )
                if difference
                else "",
            )
        )
    return table(rows)


def bracket_table(content: dict) -> str:
    losses = {}
    for row in content["rows"]:
        if row["stage"] == "bracket":
            losses.setdefault(row["learning_rate"], {})[row["variant"]] = row["held_out_loss"]
    rows = [("learning rate", *NAMES.values())]
    for rate, by_variant in sorted(losses.items()):
        cells = (by_variant.get(variant, "-") for variant in NAMES)
        rows.append((f"{rate:g}", *(f"{cell:.4f}" if isinstance(cell, float) else cell or "none" for cell in cells)))
    return table(rows)


def cost_table(rows: list[dict]) -> str:
    lines = [("residual stream", "parameters", "of depth attention", "tokens/s", "peak memory, MB", "implementation")]
    for variant in NAMES:
        own = [row for row in rows if row["variant"] == variant]
        if own:
            memory = own[0]["peak_memory_bytes"]
            lines.append(
                (
                    NAMES[variant],
                    f"{own[0]['parameters']:,}",
                    f"{own[0]['depth_parameters']:,}",
                    f"{statistics.mean(row['tokens_per_second'] for row in own):,.0f}",
                    "-" if memory is None else f"{memory / 1e6:,.0f}",
                    own[0]["implementation"] or "-",
                )
            )
    return table(lines)


def write_table(folder: Path, content: dict, summary: dict):
    settings, plan, data, session = content["settings"], content["plan"], content["data"], content["sessions"][-1:]
    rows = content["rows"]
    tokens = {stage: plan.get(f"{stage}_tokens") for stage in ("final", "bracket")}
    asked = {"final": settings["tokens"], "bracket": settings["bracket_tokens"]}
    text = "# Donor, Block and Full, trained alike\n\n"
    if rows:
        text += (
            f"Llama of {settings['layers']} layers, hidden size {settings['hidden_size']}, vocabulary "
            f"{data['vocab_size']}: {rows[0]['parameters'] - rows[0]['depth_parameters']:,} parameters besides depth "
            f"attention's, {rows[0]['embedding_parameters']:,} of them in the embedding. Blocks have "
            f"{settings['block_size']} layers. Losses are nats per token on held-out source files, of which "
            f"{settings['held_out_sequences']:,} sequences of {settings['seq_len']} tokens at most; text is the source "
            f"of Python packages, {data['train_tokens']:,} tokens to train on, {data['held_out_tokens']:,} held out. "
            f"Files can have near copies on the other side, which is the same for all variants.\n\n"
        )
    if session:
        text += f"{session[0]['device']}, torch {session[0]['torch']}, transformers {session[0]['transformers']}; "
        text += f"{session[0]['workers']} processes at the same time, bfloat16 autocast, float32 weights.\n\n"
    if summary["variants"]:
        text += (
            f"## Results\n\n{tokens['final']:,} tokens for each run ({asked['final']:,} were asked for), "
            f"{tokens['final'] // (settings['batch_size'] * settings['seq_len'])} steps of {settings['batch_size']} x "
            f"{settings['seq_len']}, the same batches and initial weights for all variants of a seed; seeds "
            f"{', '.join(map(str, summary['seeds']))}. In brackets: 95 % of bootstrap means over sequences, of the "
            "mean over seeds and of each seed alone; they don't hold the spread between seeds.\n\n"
        )
        text += result_table(content, summary) + "\n"
        if not summary["complete"]:
            text += "There was no time for the other seeds.\n\n"
        finals = [row for seed in complete_seeds(content).values() for row in seed.values()]
        text += "Processes share the device and its host, so tokens per second are no benchmark:\n\n"
        text += cost_table(finals) + "\n"
    else:
        text += "No seed is complete yet.\n\n"
    if tokens["bracket"]:
        at_edge = plan.get("at_an_edge")
        text += (
            f"## Learning rates\n\nHeld-out loss after {tokens['bracket']:,} tokens ({asked['bracket']:,} were asked "
            f"for), seed {settings['seeds'][0]}; depth attention has {settings['depth_lr_scale']:g} times the rate:\n\n"
        )
        text += bracket_table(content) + "\n"
        if at_edge:
            text += f"The best rate is at an edge of what was tried for {', '.join(at_edge)}.\n\n"
    text += "![Losses, and magnitudes over depth](evidence.png)\n"
    write_text(folder / "evidence.md", text)


# --- Figure


def draw_rates(axes, content: dict):
    for variant, name in NAMES.items():
        rows = [row for row in content["rows"] if row["stage"] == "bracket" and row["variant"] == variant]
        points = sorted((r["learning_rate"], r["held_out_loss"]) for r in rows if r["held_out_loss"] is not None)
        if points:
            axes.plot(*zip(*points), "o-", color=COLORS[variant], label=name)
    axes.set_xscale("log", base=2)
    rates = sorted({row["learning_rate"] for row in content["rows"] if row["stage"] == "bracket"})
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.set_xlabel("learning rate")
    axes.set_ylabel("held-out loss")
    axes.set_title("Short runs by learning rate", fontsize=10)


def draw_curves(axes, seeds: dict):
    for variant, name in NAMES.items():
        for number, rows in enumerate(seeds.values()):
            tokens, losses = np.array(rows[variant]["curve"], dtype=float).T
            label = name if number == 0 else None
            axes.plot(tokens / 1e6, losses, color=COLORS[variant], linewidth=0.8, alpha=0.6, label=label)
            tokens, losses = np.array(rows[variant]["held_out_curve"], dtype=float).T
            axes.plot(tokens / 1e6, losses, ".", color=COLORS[variant])
    if seeds:
        ends = [
            rows[variant]["curve"][len(rows[variant]["curve"]) // 8][1] for rows in seeds.values() for variant in NAMES
        ]
        axes.set_ylim(top=max(end for end in ends if end is not None))
    axes.set_xlabel("million tokens")
    axes.set_ylabel("training loss; dots: held out")
    axes.set_title("Final runs, each seed", fontsize=10)


def draw_depth(axes, seeds: dict, name: str, title: str, names: dict[str, str]):
    """The mean over seeds."""
    for variant, label in names.items():
        values = [rows[variant]["depth"][name] for rows in seeds.values()]
        if values:
            axes.plot(np.mean(np.array(values, dtype=float), axis=0), color=COLORS[variant], label=label)
    axes.set_yscale("log")
    axes.set_xlabel("sublayer")
    axes.set_title(title, fontsize=10)


def write_figure(folder: Path, content: dict):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("gpu_evidence: no matplotlib, so no figure; the same command draws it elsewhere", file=sys.stderr)
        return
    figure = Figure(figsize=(13, 8), layout="constrained")
    axes = figure.subplots(2, 3)
    seeds = complete_seeds(content)
    draw_rates(axes[0, 0], content)
    draw_curves(axes[0, 1], seeds)
    draw_depth(axes[0, 2], seeds, "output_gradient_norm", "Gradient norm of each output", NAMES)
    stream = {"donor": "donor: the stream", "block": "Block: sum of the open block", "full": "Full: the last output"}
    draw_depth(axes[1, 0], seeds, "sum_rms", "RMS of the newest source at each read", stream)
    draw_depth(axes[1, 1], seeds, "read_rms", "RMS of each read", NAMES)
    draw_depth(axes[1, 2], seeds, "output_rms", "RMS of each output", NAMES)
    for panel in axes.flat:
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    figure.savefig(folder / "evidence.png", dpi=110)


def write_report(folder: Path, content: dict) -> dict:
    """Writes evidence.md and evidence.png, and returns what they are about in a few numbers."""
    summary = summarise(content)
    write_table(folder, content, summary)
    write_figure(folder, content)
    return summary
