# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/speed_table.py

Fills the tables of CPUs in docs/speed.md from results/benchmark, which has a folder for each kind of processor: what
`benchmarks/benchmark.py` wrote there for the default shape, and in folders within it for other shapes.
"""

import argparse
import json
import sys
from pathlib import Path

from attnres_convert.writing import table


ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from pages import fill  # noqa: E402


RESULTS = ROOT / "results" / "benchmark"
KINDS = {"avx2": "AVX2", "avx512": "AVX-512"}
FILES = {
    "models.json": "",
    "compiled.json": ", both compiled",
    "smollm2/models.json": ", SmolLM2's shape",
    "small/models.json": ", a small model",
}
CASES = {"training": "training step", "forward": "forward", "prefill": "prefill", "decoding": "cached decoding"}
VARIANTS = [f"{mode} {name}" for mode in ("block", "full") for name in ("cpp", "two_phase", "eager")]


def cases(kind: str) -> dict[str, dict[str, dict]]:
    """What was measured on a kind of processor: by the name of a case, the rows of `benchmark.py` by variant."""
    found = {}
    for file, shape in FILES.items():
        path = RESULTS / kind / file
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else ():
            found.setdefault(CASES[row["case"]] + shape, {})[row["variant"]] = row
    return found


def kind_table(kind: str) -> str:
    """Ratios of medians to the stock model; of training steps also the peak memory, of compiled ones the first call."""
    hardware = json.loads((RESULTS / kind / "models.json").read_text(encoding="utf-8"))["hardware"]
    names = [variant.capitalize().replace(" ", ", `") + "`" for variant in VARIANTS]
    lines = [(f"{hardware['cpu']}, {KINDS[kind]}, {hardware['threads']} threads", *names)]
    for case, rows in cases(kind).items():
        cells = [f"{rows[name]['ratio'][1]:.2f}" if name in rows else "-" for name in VARIANTS]
        lines.append((case, *cells))
        if case.startswith("training"):
            memory = [f"{rows[name]['peak_memory_bytes'] / 1e6:,.0f} MB" if name in rows else "-" for name in VARIANTS]
            lines.append((f"its peak memory (stock: {rows['stock']['peak_memory_bytes'] / 1e6:,.0f} MB)", *memory))
        if rows["stock"]["compiled"]:
            first = [f"{rows[name]['first_call_seconds']:.0f} s" if name in rows else "-" for name in VARIANTS]
            lines.append((f"its first call (stock: {rows['stock']['first_call_seconds']:.0f} s)", *first))
    return table(lines).rstrip()


def markdown() -> str:
    """A table for each kind of processor that there are results of."""
    return "\n\n".join(kind_table(kind) for kind in KINDS if (RESULTS / kind).is_dir())


def main(argv: list[str] | None = None):
    argparse.ArgumentParser(description=__doc__.split("\n\n")[1]).parse_args(argv)
    fill(ROOT / "docs" / "speed.md", "cpus", markdown())


if __name__ == "__main__":
    main()
