# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/copying.py outputs/evidence/from_scratch --output results/from_scratch/copying.json

Why do models that were trained alike differ? Measures how well the models of a comparison copy from their context: the
loss on random tokens that come a second time, which nothing but copying can predict (Olsson et al., arXiv 2209.11895),
beside the first time; and the loss on text by how many tokens a model has seen before.

Prints a table, a row for each model, and writes all numbers.
"""

import argparse
import json
import shlex
from pathlib import Path

import torch
from attnres_convert.reading import read_json
from attnres_convert.writing import table, write_json
from attnres_recipes.process import versions
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401 - registers the models


ROOT = Path(__file__).resolve().parents[1]
TEXT = ROOT / "model_cards" / "held_out.jsonl"  # files of Python's standard library
LENGTH, SEQUENCES = 256, 64
POSITIONS = [1, 8, 32, 64, 128, 256]  # of the first predicted token after each bound


@torch.no_grad()
def losses(model, tokens: torch.Tensor) -> torch.Tensor:
    """Nats of tokens `(num_sequences, length)` from the second on, in float64."""
    rows = []
    for batch in tokens.split(8):
        logits = model(batch, use_cache=False).logits[:, :-1].double()
        rows.append(-logits.log_softmax(-1).gather(-1, batch[:, 1:, None]).squeeze(-1))
    return torch.cat(rows)


def measure(folder: Path) -> dict:
    """What one model does, saved in a folder with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    special = set(tokenizer.all_special_ids)
    words = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    once = words[torch.randint(len(words), (SEQUENCES, LENGTH // 2), generator=torch.Generator().manual_seed(0))]
    twice = losses(model, torch.cat([once, once], dim=1))
    texts = [json.loads(line)["text"] for line in TEXT.read_text(encoding="utf-8").splitlines()]
    own = [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    text = losses(model, torch.cat([ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH) for ids in own]))
    spans = zip(POSITIONS, POSITIONS[1:])
    return {
        "random tokens": twice[:, : LENGTH // 2 - 1].mean().item(),
        "the same again": twice[:, LENGTH // 2 :].mean().item(),
        **{f"text, {a} to {b - 1} before": text[:, a - 1 : b - 1].mean().item() for a, b in spans},
    }


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder that attnres-pretrain --compare wrote")
    parser.add_argument("--output", type=Path, required=True, help="file for the numbers")
    args = parser.parse_args(argv)
    path = args.comparison / "comparison.json"
    runs = read_json(path)["runs"] if path.is_file() else {}
    folders = {name: args.comparison / Path(run["output"]).name / "model" for name, run in runs.items()}
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}  # a run that failed has none
    if not folders:
        parser.error(f"{args.comparison} has no models of a comparison: give what --compare wrote")
    models = {name: measure(folder) for name, folder in folders.items()}
    command = shlex.join(["python", "benchmarks/copying.py", str(args.comparison), "--output", str(args.output)])
    write_json(args.output, {"models": models, "command": command, "versions": versions()})
    rows = [(name, *(f"{loss:.3f}" for loss in found.values())) for name, found in models.items()]
    print(table([("model", *next(iter(models.values()))), *rows]), end="")


if __name__ == "__main__":
    main()
