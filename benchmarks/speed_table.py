# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/speed_table.py

Fills the tables of CPUs in docs/speed.md from results/benchmark, which has a folder for each kind of processor: what
`benchmarks/benchmark.py` wrote there for the default shape, and in folders within it for other shapes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from attnres_convert.writing import table


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from pages import fill  # noqa: E402


RESULTS = ROOT / "results" / "benchmark"
FILES = {
    "models.json": "",
    "compiled.json": ", both compiled",
    "smollm2/models.json": ", SmolLM2's shape",
    "small/models.json": ", a small model",
}
CASES = {"training": "training step", "forward": "forward", "prefill": "prefill", "decoding": "cached decoding"}
VARIANTS = [f"{mode} {name}" for mode in ("block", "full") for name in ("cpp", "two_phase", "eager")]


def processors() -> dict[str, Path]:
    """Folders of results by the instruction set of their processor."""
    folders = {}
    for path in sorted(RESULTS.glob("*/models.json")):
        folders[json.loads(path.read_text(encoding="utf-8"))["hardware"]["instructions"]] = path.parent
    return folders


def cases(folder: Path) -> dict[str, dict[str, dict]]:
    """What was measured on a processor: by the name of a case, the rows of `benchmark.py` by variant."""
    found = {}
    for file, shape in FILES.items():
        path = folder / file
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else ():
            found.setdefault(CASES[row["case"]] + shape, {})[row["variant"]] = row
    return found


def line(name: str, rows: dict[str, dict], cell: Callable[[dict], str]) -> tuple[str, ...]:
    return (name.format(cell(rows["stock"])), *(cell(rows[own]) if own in rows else "-" for own in VARIANTS))


def processor_table(folder: Path) -> str:
    """Ratios of medians to the stock model; of training steps also the peak memory, of compiled ones the first call."""
    hardware = json.loads((folder / "models.json").read_text(encoding="utf-8"))["hardware"]
    names = [variant.capitalize().replace(" ", ", `") + "`" for variant in VARIANTS]
    lines = [("{cpu}, {instructions}, {threads} threads".format(**hardware), *names)]
    for case, rows in cases(folder).items():
        lines.append(line(case, rows, lambda row: f"{row['ratio'][1]:.2f}"))
        if case.startswith("training"):
            memory = line("its peak memory (stock: {})", rows, lambda row: f"{row['peak_memory_bytes'] / 1e6:,.0f} MB")
            lines.append(memory)
        if rows["stock"]["compiled"]:
            lines.append(line("its first call (stock: {})", rows, lambda row: f"{row['first_call_seconds']:.0f} s"))
    return table(lines).rstrip()


def markdown() -> str:
    """A table for each processor that there are results of."""
    return "\n\n".join(map(processor_table, processors().values()))


def main(argv: list[str] | None = None):
    argparse.ArgumentParser(description=__doc__.split("\n\n")[1]).parse_args(argv)
    fill(ROOT / "docs" / "speed.md", "cpus", markdown())


if __name__ == "__main__":
    main()
