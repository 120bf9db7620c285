# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/support_table.py

Fills the table of docs/families.md. Every cell is measured or read from a result: a tiny model of each family, every
tensor away from its initial value, is converted, generates, and is trained for a few steps. Serving and conformance
come from `results/serving.json`, which `benchmarks/serving.py` writes, and from what `make conformance` writes,
`results/conformance.json`.

Prints the table, then the results as one line of JSON. Ends with an error if a family fails.
"""

import argparse
import json
import platform
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from attnres_convert import convert_checkpoint
from attnres_convert.writing import table, write_json
from transformers import AutoModelForCausalLM

import attnres


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]

from families import FAMILIES, config_class, relative_error, tiny_config, tiny_donor, tokens  # noqa: E402
from pages import fill  # noqa: E402


SHAPES = [{"mode": "full"}, *({"block_size": size} for size in (1, 2, 3, 5))]
# Largest relative error of the logits; higher where routed experts or a recurrence amplify rounding
ERROR_BOUND = 3e-6
ERROR_BOUNDS = dict.fromkeys(("deepseek_v3", "gpt_oss", "kimi_linear"), 2e-5)
TRAINING_STEPS = 15


@torch.no_grad()
def compare_with_donor(family: str) -> dict:
    """Converts on disk, Full and in several block sizes: the largest relative error of the logits, and whether greedy
    and beam search give the donor's tokens."""
    donor = tiny_donor(family)
    prompt = tokens(2, 9)
    expected = donor(prompt).logits
    options = [{"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "num_beams": beams} for beams in (1, 2)]
    error, same_tokens = 0.0, True
    with tempfile.TemporaryDirectory() as folder:
        donor.save_pretrained(Path(folder) / "donor")
        for number, shape in enumerate(SHAPES):
            target = Path(folder) / str(number)
            convert_checkpoint(Path(folder) / "donor", target, verify=False, **shape)
            model = AutoModelForCausalLM.from_pretrained(target)
            error = max(error, relative_error(model(prompt).logits, expected))
            for option in options:
                same_tokens &= torch.equal(model.generate(prompt, **option), donor.generate(prompt, **option))
    return {"error": error, "same_tokens": same_tokens}


def train(family: str) -> list[float]:
    """The losses of a fresh model over a few steps of AdamW on one batch."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(TRAINING_STEPS):
        loss = model(tokens(4, 12), labels=tokens(4, 12)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def measure(family: str, conformance: dict | None, served: dict | None = None) -> dict:
    """The results of a family; `conformance` and `served` are its rows in those of `benchmarks/conformance.py` and of
    `benchmarks/serving.py`."""
    bound = ERROR_BOUNDS.get(family, ERROR_BOUND)
    comparison = compare_with_donor(family)
    losses = train(family)
    row = {
        "family": family,
        "model": config_class(family).hub_classes()["AutoModelForCausalLM"].split(".")[1],
        "exact": comparison["error"] <= bound,
        "error": comparison["error"],
        "error_bound": bound,
        "generation": comparison["same_tokens"],
        "training": losses[-1] < 0.8 * losses[0],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "served": None,
        "conformance": None,
    }
    if served is not None:
        modes = [served[mode] for mode in ("block", "full")]
        row["served"] = {
            "error": max(mode["logprob_error"] for mode in modes),
            "same_tokens": not any(mode["different_tokens"] for mode in modes),
        }
    if conformance is not None:
        worse = len(conformance["regressions"]) + len(conformance["exceptions"])
        row["conformance"] = {
            "donor_passes": conformance["donor"]["passed"],
            "worse": worse,
            "exceptions": conformance["exceptions"],
            "transformers": conformance["versions"]["transformers"],
        }
    return row


def is_supported(row: dict) -> bool:
    conformance = row["conformance"]
    conforms = conformance is not None and conformance["worse"] == len(conformance["exceptions"])
    return row["exact"] and row["generation"] and row["training"] and conforms


def markdown(rows: list[dict]) -> str:
    """The rows as a Markdown table, with the exceptions below it."""
    lines = [
        ["model", "`model_type` of the donor", "exact conversion", "generation", "training", "vLLM", "conformance"],
    ]
    notes = []
    for row in rows:
        conformance = row["conformance"]
        passed = "not run"
        if conformance is not None:
            total = conformance["donor_passes"]
            passed = f"{total - conformance['worse']} of {total}"
            notes += [f"- `{row['model']}`, `{test}`: {reason}" for test, reason in conformance["exceptions"].items()]
        cells = [f"{'yes' if row['exact'] else 'no'}, {row['error']:.0e}"]
        cells += ["yes" if row[name] else "no" for name in ("generation", "training")]
        served = row["served"]
        cells.append(
            "not run" if served is None else f"{'yes' if served['same_tokens'] else 'no'}, {served['error']:.0e}"
        )
        lines.append([f"`{row['model']}`", f"`{row['family']}`", *cells, passed])
    return "\n".join([table(lines, aligned=False).rstrip(), *([""] if notes else []), *notes])


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1])
    parser.add_argument("--conformance", type=Path, default=ROOT / "results" / "conformance.json", help="its results")
    parser.add_argument("--serving", type=Path, default=ROOT / "results" / "serving.json", help="its results")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "support.json", help="JSON file to write")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "families.md", help="Markdown file to fill")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)  # the models are tiny

    conformance = json.loads(args.conformance.read_text())["rows"] if args.conformance.is_file() else {}
    served = json.loads(args.serving.read_text())["families"] if args.serving.is_file() else {}
    rows = [measure(family, conformance.get(family), served.get(family)) for family in FAMILIES]
    results = {
        "command": "python benchmarks/support_table.py",
        "hardware": f"CPU, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (attnres, torch, transformers)},
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.output, results)
    table = markdown(rows)
    try:
        fill(args.page, "support", table)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    print(table)
    print(json.dumps(results))
    if failed := [row["family"] for row in rows if not is_supported(row)]:
        raise SystemExit(f"error: not supported in full: {', '.join(failed)}")


if __name__ == "__main__":
    main()
