# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/benchmark.py --output outputs/benchmark

Measures what Attention Residuals cost: a stock model of transformers against AttnRes models of the same shape, with
each implementation of depth attention. --parts says what is measured:

  models           training step (forward and backward), forward, prefill of one prompt and cached decoding: time,
                   tokens/s, peak memory
  compiled         the same with torch.compile, of stock and AttnRes models, and the first call, in which it compiles
  model_growth     the overhead by width, depth and number of blocks, with a figure
  operators        the reads of a block alone, and each of the two phases where there are two
  operator_growth  the reads of a block by number of sources and sublayers, length and width, beside the formulas of the
                   paper's table of memory traffic, with a figure

All variants run in turn, in an order drawn anew for each round, in one process. A ratio is that of two times of the
same round; medians and quartiles over rounds are reported. What is further from float64 than the readable
implementation (--tolerance), or fails, is not timed; the rest is, and the command ends with an error that names it.
The variant `bound` of models has the layers' attentions and MLPs alone, without sums, reads and norms between them:
what no implementation can be faster than, with these layers.

Traffic is time, in units of what a copy needs to move hidden_size numbers of every token, per sublayer. By the paper's
count a plain residual stream moves 3 of them, hyper-connections with 4 streams 34, Block AttnRes in two phases N / S +
5 and Full S + N, with N blocks and S sublayers per block. On a CPU arithmetic and new memory take time too, and what
fits into the cache moves faster, also in the copy. On a GPU, operators are timed as CUDA graphs where they can be
captured.

Rows with hardware, versions and command go to PART.json and a table to PART.md after each measurement, so that an
interruption loses only the current one. The last line of the output is JSON. With its defaults the command takes about
15 minutes on two CPU cores.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import from_clone  # noqa: F401


# isort: split
import torch
import transformers
from attnres_convert import InputError
from attnres_convert.writing import table, write_bytes, write_json, write_text
from attnres_recipes.figures import new_figure, png
from attnres_recipes.folders import output_folder
from attnres_recipes.process import versions
from benchmark_cases import (
    CASES,
    MODEL_SHAPE,
    OPERATOR_SHAPE,
    hardware,
    model_config,
    model_rows,
    operator_rows,
)
from transformers import CONFIG_MAPPING

from attnres import DepthAttentionInterface
from depth_attention_attnres import ALL_DEPTH_ATTENTION_FUNCTIONS


LATE = "--minutes have passed"  # why something that wasn't begun is missing, which is no failure
PARTS = ("models", "compiled", "model_growth", "operators", "operator_growth")
# by device; a head has 64 or 128 numbers
DEFAULTS = {
    "cpu": {"dtype": "float32", "hidden_size": 512, "layers": 12, "blocks": 6, "batch_size": 4, "seq_len": 256}
    | {"prompt_len": 1024, "new_tokens": 64, "head_size": 64, "growth_batch_size": 1, "operator_widths": [512]},
    "cuda": {"dtype": "bfloat16", "hidden_size": 2048, "layers": 24, "blocks": 8, "batch_size": 8, "seq_len": 2048}
    | {"prompt_len": 8192, "new_tokens": 32, "head_size": 128, "growth_batch_size": 2}
    | {"operator_widths": [1024, 2048, 4096, 8192]},
}
GROWTH = {
    "cpu": {
        "model_growth": {"hidden_size": [256, 512, 1024], "layers": [6, 12, 24], "blocks": [2, 4, 6, 12]},
        "operator_growth": {
            "sources": [2, 4, 8, 16, 32],
            "sublayers": [2, 4, 8, 16],
            "seq_len": [128, 256, 512, 1024],
            "hidden_size": [256, 512, 1024, 2048],
        },
    },
    "cuda": {
        "model_growth": {"hidden_size": [1024, 2048, 4096], "layers": [12, 24, 48], "blocks": [2, 4, 8, 12, 24]},
        "operator_growth": {
            "sources": [2, 4, 8, 16, 32],
            "sublayers": [2, 4, 8, 16],
            "seq_len": [512, 1024, 2048, 4096],
            "hidden_size": [1024, 2048, 4096, 8192],
        },
    },
}
LABELS = {
    "sources": "closed sources of the block",
    "sublayers": "sublayers of the block",
    "seq_len": "sequence length",
    "hidden_size": "hidden size",
    "layers": "layers",
    "blocks": "blocks",
    "batch_size": "sequences",
    "prompt_len": "length of the prompt",
    "heads": "heads",
    "vocab_size": "vocabulary",
}


# --- What is measured


def model_shape(args, varied: dict[str, int]) -> argparse.Namespace:
    """The arguments with the values of `varied`, and what follows of them.

    Raises:
        InputError: there is no such model.
    """
    shape = argparse.Namespace(**{**vars(args), **varied})
    of = f"{shape.layers} layers, {shape.blocks} blocks, hidden size {shape.hidden_size}"
    shape.heads = shape.heads or max(1, shape.hidden_size // DEFAULTS[args.device]["head_size"])
    if shape.hidden_size % shape.heads or shape.hidden_size // shape.heads % 2:
        raise InputError(f"{of}: {shape.heads} heads don't divide the hidden size into even parts.")
    if "layers" in varied and "blocks" not in varied:
        shape.blocks = min(shape.blocks, shape.layers)
    elif shape.blocks > shape.layers:
        raise InputError(f"{of}: there can't be more blocks than layers.")
    blocks = -(-shape.layers // -(-shape.layers // shape.blocks))  # as all but the last have the same size
    if blocks != shape.blocks and "layers" not in varied:
        possible = sorted({-(-shape.layers // size) for size in range(1, shape.layers + 1)})
        raise InputError(f"{of}: blocks of one size, the last of which may be shorter, are {possible}.")
    shape.blocks = blocks
    if shape.new_tokens >= shape.seq_len:
        raise InputError(
            f"--new-tokens {shape.new_tokens} must be less than --seq-len, the rest of which is the prompt."
        )
    for mode in (None, *shape.modes):
        try:
            model_config(shape, mode, "eager")
        except Exception as error:  # of the family
            raise InputError(f"{of}: {next(iter(str(error).splitlines()), error)}") from None
    return shape


def varied_values(args, part: str, names: tuple[str, ...]) -> list[tuple[list[str], dict[str, int]]]:
    """Each shape of a growth part once: the names of which it is a value, and the values that aren't the default."""
    values = {name: v for name, v in (args.vary or GROWTH[args.device][part]).items() if name in names}
    if not values:
        raise InputError(f"--parts {part} needs --vary with one of {', '.join(names)}.")
    shapes = {}
    for name, of_name in values.items():
        for value in of_name:
            changed = {} if value == getattr(args, name) else {name: value}
            shapes.setdefault(tuple(changed.items()), []).append(name)
    return [(varied, dict(changed)) for changed, varied in shapes.items()]


def planned(args, part: str) -> list[argparse.Namespace]:
    """What a part measures, one shape after the other; each has `varied`, the names of which it is a value.

    Raises:
        InputError: one of them is impossible.
    """
    default = list(dict.fromkeys(["eager", "two_phase", DepthAttentionInterface.default]))
    if part in ("compiled", "model_growth"):
        default = [DepthAttentionInterface.default]
    elif args.everything:
        default += [name for name in sorted(ALL_DEPTH_ATTENTION_FUNCTIONS) if name not in default]
    values = {**vars(args), "implementations": args.implementations or default}
    defaults = DEFAULTS[args.device]
    for name in ("hidden_size", "layers", "blocks", "batch_size", "seq_len", "prompt_len", "new_tokens"):
        values[name] = values[name] or defaults[name]
    if part == "model_growth":
        values["batch_size"] = args.batch_size or defaults["growth_batch_size"]
    cases = {"compiled": ["training", "prefill", "decoding"], "model_growth": ["training", "forward"]}
    values["cases"] = args.cases or cases.get(part, list(CASES))
    base = argparse.Namespace(**values, varied=[])
    if part in ("models", "compiled"):
        return [model_shape(base, {})]
    if part == "model_growth":
        shapes = varied_values(base, part, MODEL_SHAPE)
        return [model_shape(base, {**changed, "varied": varied}) for varied, changed in shapes]
    if part == "operators":
        shapes = [
            ([], {"hidden_size": width})
            for width in (args.hidden_size and [args.hidden_size]) or defaults["operator_widths"]
        ]
    else:
        shapes = varied_values(base, part, OPERATOR_SHAPE)
    return [argparse.Namespace(**{**values, **changed, "varied": varied}) for varied, changed in shapes]


def measured(part: str, shape, not_timed: dict[str, str]):
    if part.startswith("operator"):
        return operator_rows(shape, not_timed, phases=part == "operators")
    return model_rows(shape, not_timed, compiled=part == "compiled", with_bound=part == "models")


# --- Reports


def model_table(rows: list[dict]) -> str:
    lines = [("case", "variant", "shape", "ms", "ratio", "quartiles", "tokens/s", "peak MB", "error")]
    if rows and rows[0]["compiled"]:
        lines[0] += ("first call, s",)
    for row in rows:
        shape = f"d {row['hidden_size']}, {row['layers']} layers, {row['blocks']} blocks"
        lower, median, upper = row["ratio"]
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        numbers = (f"{row['seconds'][1] * 1e3:.1f}", f"{median:.3f}", f"{lower:.3f}-{upper:.3f}")
        numbers += (f"{row['tokens_per_second']:,.0f}", f"{row['peak_memory_bytes'] / 1e6:,.0f}", error)
        if row["compiled"]:
            numbers += (f"{row['first_call_seconds']:.0f}",)
        lines.append((row["case"], row["variant"], shape, *numbers))
    return table(lines)


def best_default(rows: list[dict], default: str = DepthAttentionInterface.default) -> str:
    """Which implementation takes the least time on this machine, by the geometric mean of its ratios over all that was
    measured of every implementation, and what one loses with the default; empty where there is nothing to choose."""
    ratios = {}
    for row in rows:
        mode, _, implementation = row["variant"].partition(" ")
        ratios.setdefault(implementation, {})[row["case"], mode] = row["ratio"][1]
    ratios.pop("", None)  # stock
    common = set.intersection(*map(set, ratios.values())) if ratios else set()
    if len(ratios) < 2 or not common:
        return ""
    means = {name: statistics.geometric_mean(own[what] for what in common) for name, own in ratios.items()}
    best, *others = sorted(means, key=means.get)
    text = f"{best} is the fastest here, {means[best]:.3f} of the stock model's time on average; " + ", ".join(
        f"{name} takes {means[name]:.3f}" for name in others
    )
    if default not in means:
        return f"{text}.\n"
    slower = [
        f"{case} in {mode} mode ({ratios[best][case, mode]:.3f}, {default} {ratios[default][case, mode]:.3f})"
        for case, mode in sorted(common)
        if ratios[best][case, mode] < ratios[default][case, mode]
    ]
    if best == default:
        return f"{text}. It is the models' default.\n"
    return f"{text}. The models' default is {default}; attn_res_implementation={best!r} saves: {', '.join(slower)}.\n"


def operator_table(rows: list[dict]) -> str:
    lines = [("operator", "variant", "pass", "sources", "sublayers", "d", "tokens", "ms", "traffic", "formula")]
    lines[0] += ("GB/s", "of a copy's", "error")
    for row in rows:
        share, error = row["share_of_copy"], row["relative_error"]
        lines.append(
            (
                *(row[key] for key in ("case", "variant", "pass")),
                *(str(row[key]) for key in ("sources", "sublayers", "hidden_size")),
                str(row["batch_size"] * row["seq_len"]),
                f"{row['seconds'][1] * 1e3:.3f}",
                f"{row['traffic']:.1f}",
                "-" if share is None else f"{row['traffic_by_formula']:.1f}",
                "-" if share is None else f"{row['gigabytes_per_second']:.0f}",
                "-" if share is None else f"{share:.0%}",
                "-" if error is None else f"{error:.0e}",
            )
        )
    return table(lines)


def panels(rows: list[dict], row_key: str, width: float = 4.2, height: float = 3.2):
    """A figure with a row of panels for each value of `row_key` and a column for each varied quantity, and for each
    panel its axes, its value, its quantity and its rows."""
    values = list(dict.fromkeys(row[row_key] for row in rows))
    quantities = list(dict.fromkeys(name for row in rows for name in row["varied"]))
    shape = (len(values), len(quantities))
    size = (max(6.4, width * shape[1]), height * shape[0] + 0.8)
    figure, all_axes = new_figure(*shape, size=size, squeeze=False, sharey="row")
    found = []
    for value, row_axes in zip(values, all_axes):
        for quantity, axes in zip(quantities, row_axes):
            chosen = [row for row in rows if row[row_key] == value and quantity in row["varied"]]
            ticks = sorted({row[quantity] for row in chosen})
            axes.set_xscale("log", base=2)
            axes.set_xticks(ticks, list(map(str, ticks)))
            axes.minorticks_off()
            axes.set_xlabel(LABELS[quantity])
            axes.grid(alpha=0.3)
            found.append((axes, value, quantity, sorted(chosen, key=lambda row: row[quantity])))
    return figure, found


def save(figure, first_axes, title: str, path: Path):
    handles, labels = first_axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(title)
    write_bytes(path, png(figure, "benchmark.py"))


def plot_overhead(rows: list[dict], path: Path):
    """The ratio to the stock model by each varied quantity: one panel for each of them and each case."""
    figure, found = panels(rows, "case")
    for axes, case, quantity, chosen in found:
        for variant in dict.fromkeys(row["variant"] for row in chosen if row["variant"] != "stock"):
            points = [(row[quantity], *row["ratio"]) for row in chosen if row["variant"] == variant]
            x, lower, median, upper = zip(*points)
            (line,) = axes.plot(x, median, marker="o", markersize=4, label=variant)
            axes.fill_between(x, lower, upper, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_ylabel(f"{case}: time / stock")
    save(figure, found[0][0], "Overhead of Attention Residuals: medians, and quartiles as bands", path)


def plot_traffic(rows: list[dict], path: Path):
    """The traffic of a block of reads by each varied quantity, measured and by formula."""
    figure, found = panels([row for row in rows if row["case"] == "block of reads"], "pass")
    for axes, what, quantity, chosen in found:
        for variant in dict.fromkeys(row["variant"] for row in chosen):
            points = [row for row in chosen if row["variant"] == variant]
            x = [row[quantity] for row in points]
            label = f"{variant}, measured"
            (line,) = axes.plot(x, [row["traffic"] for row in points], "o-", markersize=4, linewidth=0.8, label=label)
            if points[0]["traffic_by_formula"] is not None:
                formula = [row["traffic_by_formula"] for row in points]
                axes.plot(x, formula, "--", color=line.get_color(), label=f"{variant}, formula")
        axes.set_yscale("log")
        axes.set_ylabel(f"{what}: traffic / d")
    save(
        figure, found[0][0], "Memory traffic of a block of reads, per token and sublayer, at the speed of a copy", path
    )


class Report:
    """The rows of a part, written after each measurement."""

    def __init__(self, args, part: str):
        self.part, self.output, self.rows, self.not_timed = part, args.output, [], {}
        self.is_operator = part.startswith("operator")
        self.results = {
            "command": ["benchmark.py", *args.command],
            "hardware": hardware(args.device),
            "versions": versions(),
            "dtype": args.dtype,
            "rounds": args.rounds,
            "tolerance": args.tolerance,
        }

    def table(self) -> str:
        text = (operator_table if self.is_operator else model_table)(self.rows)
        if self.part == "models" and (advice := best_default(self.rows)):
            text += f"\n{advice}"
        return text + "".join(f"\nNot timed: {name}: {reason}\n" for name, reason in self.not_timed.items())

    def add(self, rows: list[dict], varied: list[str]):
        self.rows += [{**row, "varied": varied} for row in rows]
        if self.output is not None:
            write_json(
                self.output / f"{self.part}.json", {**self.results, "not_timed": self.not_timed, "rows": self.rows}
            )
            write_text(self.output / f"{self.part}.md", self.table())

    def plot(self):
        for name in figures_of(self.part) if self.output is not None and self.rows else ():
            (plot_traffic if self.is_operator else plot_overhead)(self.rows, self.output / name)


def figures_of(part: str) -> list[str]:
    return ["traffic.png" if part.startswith("operator") else "overhead.png"] if part.endswith("growth") else []


def benchmark(args) -> list[Report]:
    """Measures everything that was asked for, in that order.

    Raises:
        InputError: it is impossible, or nothing can be written.
    """
    plan = [(part, planned(args, part)) for part in args.parts]
    started, reports = time.monotonic(), []

    def late():
        return args.minutes and time.monotonic() - started > 60 * args.minutes

    for part, shapes in plan:
        report = Report(args, part)
        reports.append(report)
        try:
            for shape in shapes:
                what = ", ".join(
                    f"{name} {getattr(shape, name)}" for name in dict.fromkeys(["hidden_size", *shape.varied])
                )
                if late():
                    report.not_timed[f"{part}, {what}"] = LATE
                    continue
                for rows in measured(part, shape, report.not_timed):
                    report.add(rows, shape.varied)
                    if part in ("models", "compiled") and rows[0]["case"] != shape.cases[-1] and late():
                        report.not_timed[f"{part}, {what}, after {rows[0]['case']}"] = LATE
                        break
            report.add([], [])
        finally:
            if report.rows:
                report.plot()
                print(f"{part}\n\n{report.table()}", flush=True)
    return reports


# --- Options


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""examples:
  {__doc__.split(chr(10), 1)[0]}
  python benchmarks/benchmark.py --parts compiled --cases training
  python benchmarks/benchmark.py --parts model_growth --vary layers=4,8,16 --modes block --output outputs/depth
  python benchmarks/benchmark.py --everything --minutes 9 --output outputs/gpu      (on a GPU)""",
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, help="default: all but compiled")
    add("--everything", action="store_true", help="all parts and all installed implementations")
    add("--output", type=Path, help="folder for rows, tables and figures")
    add("--device", choices=("cpu", "cuda"), default=device, help=f"default: {device}")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, bfloat16 on GPU")
    add(
        "--implementations",
        nargs="+",
        metavar="NAME",
        help="default: eager, two_phase and the models' default; the last alone in compiled and model_growth",
    )
    add("--modes", nargs="+", choices=("block", "full"), default=["block", "full"], help="of depth attention; default: "
        "both")  # fmt: skip
    add(
        "--cases",
        nargs="+",
        choices=CASES,
        help="of models; default: all, in compiled all but forward, in model_growth training and forward",
    )
    add("--rounds", type=positive, default=9, help="default: 9")
    add("--minutes", type=float, help="begin no other measurement after so many minutes")
    add("--tolerance", type=float, default=1.1, help="of errors, times that of eager; default: 1.1")
    add("--threads", type=positive, help="of the CPU; default: PyTorch's")
    add("--family", default="llama", help="model type of the stock model; default: llama")
    on = {name: f"default: {DEFAULTS['cpu'][name]}, on a GPU {DEFAULTS['cuda'][name]}" for name in DEFAULTS["cpu"]}
    add("--hidden-size", type=positive, help=on["hidden_size"] + "; operators on a GPU 1024 to 8192")
    add("--layers", type=positive, help=on["layers"])
    add("--blocks", type=positive, help=on["blocks"])
    add("--heads", type=positive, help="default: hidden size / 64, on a GPU / 128")
    add("--vocab-size", type=positive, default=4096, help="default: 4096")
    add("--batch-size", type=positive, help=on["batch_size"] + "; in model_growth 1, on a GPU 2")
    add("--seq-len", type=positive, help=on["seq_len"])
    add("--prompt-len", type=positive, help="of prefill; " + on["prompt_len"])
    add("--new-tokens", type=positive, help="decoded after a prompt of the rest of --seq-len; " + on["new_tokens"])
    add("--sources", type=positive, default=8, help="closed sources of a block of reads; default: 8")
    add("--sublayers", type=positive, default=8, help="sublayers of a block of reads; default: 8")
    add("--vary", nargs="+", default=[], metavar="NAME=V1,V2", help="for the growth parts, one name at a time")
    args = parser.parse_args(argv)
    args.command = argv
    args.dtype = args.dtype or DEFAULTS[args.device]["dtype"]
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no CUDA device")
    if args.everything and args.parts:
        parser.error("--everything has all parts; leave --parts out")
    if args.everything:
        args.parts = ["operators", "models", "compiled", "model_growth", "operator_growth"]
    args.parts = args.parts or [part for part in PARTS if part != "compiled"]
    for name in args.implementations or ():
        if name not in ALL_DEPTH_ATTENTION_FUNCTIONS:
            parser.error(f"--implementations {name}: choose of {', '.join(sorted(ALL_DEPTH_ATTENTION_FUNCTIONS))}")
    if args.family not in CONFIG_MAPPING:
        parser.error(f"--family {args.family} is unknown to transformers")
    varied = {}
    for option in args.vary:
        name, _, values = option.partition("=")
        if name not in {*MODEL_SHAPE, *OPERATOR_SHAPE}:
            parser.error(f"--vary {option}: choose of {', '.join(dict.fromkeys(MODEL_SHAPE + OPERATOR_SHAPE))}")
        if not all(value.isdigit() and int(value) for value in values.split(",")):
            parser.error(f"--vary {option}: give whole numbers above 0, such as {name}=2,4")
        varied[name] = sorted({int(value) for value in values.split(",")})
    args.vary = varied
    growth = [part for part in args.parts if part.endswith("growth")]
    if varied and not growth:
        parser.error("--vary is for the parts model_growth and operator_growth")
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    transformers.utils.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        written = {f"{part}.json": [f"{part}.json", f"{part}.md", *figures_of(part)] for part in args.parts}
        with output_folder(args.output, "benchmark.py", written) if args.output is not None else nullcontext():
            reports = benchmark(args)
    except InputError as error:
        raise SystemExit(f"benchmark: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("benchmark: interrupted; what was measured before is written.") from None
    ratios = {
        f"{report.part}: {row['case']}, {row['variant']}": round(row["ratio"][1], 4)
        for report in reports
        if report.part in ("models", "compiled")
        for row in report.rows
    }
    rows = {report.part: len(report.rows) for report in reports}
    print(json.dumps({"output": args.output and str(args.output), "rows": rows, "ratios": ratios}))
    missing = [(name, reason) for report in reports for name, reason in report.not_timed.items()]
    if late := [name for name, reason in missing if reason == LATE]:
        print(f"benchmark: not begun, as {LATE}: {'; '.join(late)}", file=sys.stderr)
    if failed := [f"{name}: {reason}" for name, reason in missing if reason != LATE]:
        raise SystemExit(f"benchmark: not timed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
