# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/export_table.py

Exports a tiny model of each family, every tensor away from its initial value, queries included, as ONNX and with
torch.export, or in the formats that are given, and fills the table in docs/guides/export.md. Each file is run in
pieces, with a cache and padding, on shapes that weren't traced, and compared with the model.

Prints the table. Ends with an error if a family that was exported before can't be any more.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers
from attnres_convert import InputError
from attnres_convert.writing import table, write_json
from attnres_recipes.exporting import FORMATS, export_model, trace

import attnres


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

from families import FAMILIES, tiny_model  # noqa: E402
from pages import fill  # noqa: E402


SIZES = {"num_hidden_layers": 2, "attn_res_block_size": 1}


def measure(family: str, formats: list[str]) -> dict:
    """By format: the largest difference of the logits and what was allowed, the size in bytes, or why there is none."""
    model, row = tiny_model(family, **SIZES), {}
    try:
        traced = trace(model)
    except InputError as error:
        return dict.fromkeys(formats, {"refused": str(error)})
    for name in formats:
        started = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                record = export_model(model, Path(folder), name, traced)
            except InputError as error:
                row[name] = {"refused": str(error)}
                continue
            size = sum(path.stat().st_size for path in Path(folder).glob(f"{record['file']}*"))
        row[name] = {"difference": record["difference"], "tolerance": record["tolerance"], "bytes": size}
        row[name]["seconds"] = round(time.perf_counter() - started, 1)
    return row


def markdown(rows: dict[str, dict]) -> str:
    """Formats in columns, families in rows; what is refused says why below."""
    formats = [name for name in FORMATS if any(name in row for row in rows.values())]
    lines, reasons = [["family", *formats]], []
    for family, row in rows.items():
        cells = []
        for name in formats:
            found = row.get(name)
            cells.append("not run" if found is None else "no" if "refused" in found else f"{found['difference']:.0e}")
        lines.append([f"`{family}`", *cells])
        reasons += dict.fromkeys(found["refused"] for found in row.values() if "refused" in found)
    return "\n".join(
        [table(lines, aligned=False).rstrip(), *([""] if reasons else []), *(f"- {why}" for why in reasons)]
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=FAMILIES, help="which, instead of all")
    parser.add_argument("--formats", nargs="+", default=["onnx", "torch"], choices=FORMATS, help="which to write")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "export.json", help="JSON file to fill")
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "guides" / "export.md", help="Markdown file to fill"
    )
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are tiny

    before = json.loads(args.output.read_text())["rows"] if args.output.is_file() else {}
    rows, lost = dict(before), []
    for family in args.families:
        found = measure(family, args.formats)
        lost += [f"{family} as {name}" for name, cell in found.items()
                 if "refused" in cell and "difference" in before.get(family, {}).get(name, {})]  # fmt: skip
        rows[family] = {**before.get(family, {}), **found}
        results = {
            "command": "python benchmarks/export_table.py",
            "hardware": f"CPU, {platform.machine()}",
            "versions": {"python": platform.python_version()}
            | {module.__name__: module.__version__ for module in (attnres, torch, transformers)},
            "rows": {name: rows[name] for name in FAMILIES if name in rows},
        }
        write_json(args.output, results)
        print(family, json.dumps(found), flush=True)
    text = markdown(results["rows"])
    try:
        fill(args.page, "export", text)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(text)
    if lost:
        raise SystemExit(f"error: no longer exported: {', '.join(lost)}")


if __name__ == "__main__":
    main()
