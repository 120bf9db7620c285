# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/exactness.py --output results/exactness.json

Measures how exact conversion is: converts a Llama with random weights in several ways and compares the logits of the
results with the donor's, in float32. Each conversion is measured twice: as it is, and with plain means for reads
(`attn_res_sum_scale=False`), which shows what the scale is for.

Prints the table of docs/guides/convert.md, then the results as one line of JSON.
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path

import torch
import transformers
from attnres_convert import convert_checkpoint
from attnres_convert.writing import table, write_json
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import attnres


def logits(model, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=tokens, use_cache=False).logits


def relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """The largest difference, in relation to the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def exactness(num_layers: int, hidden_size: int, block_sizes: list[int], num_tokens: int, seed: int) -> list[dict]:
    """One row per conversion: Full, then each of `block_sizes` (decoder layers)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    )
    donor = LlamaForCausalLM(config)
    tokens = torch.randint(config.vocab_size, (2, num_tokens))
    expected = logits(donor, tokens)

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "donor"
        donor.save_pretrained(source)
        for options in [{"mode": "full"}, *({"block_size": size} for size in block_sizes)]:
            target = Path(folder) / "-".join(map(str, options.values()))
            convert_checkpoint(source, target, verify=False, **options)
            row = {"mode": "block", "block_size": None, **options}
            for name, scaled in (("plain_mean", False), ("scaled", True)):
                model = AutoModelForCausalLM.from_pretrained(target, attn_res_sum_scale=scaled, dtype=torch.float32)
                row[name] = relative_error(expected, logits(model, tokens))
            rows.append(row)
    return rows


def markdown(rows: list[dict]) -> str:
    """The rows as the columns of a Markdown table."""
    names = ["Full" if row["mode"] == "full" else f"block {row['block_size']}" for row in rows]
    lines = [["read", *names]]
    lines.append(["plain mean", *(f"{row['plain_mean']:.1e}" for row in rows)])
    lines.append(["mean times number of sources (converted models)", *(f"{row['scaled']:.1e}" for row in rows)])
    return table(lines, aligned=False).rstrip()


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description="Measures how exact conversion to Attention Residuals is.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers")
    parser.add_argument("--hidden-size", type=int, default=256, help="width")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[1, 2, 12], help="in decoder layers")
    parser.add_argument("--tokens", type=int, default=128, help="length of each of the two random sequences")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    args = parser.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    rows = exactness(args.layers, args.hidden_size, args.block_sizes, args.tokens, args.seed)
    results = {
        "command": "python benchmarks/exactness.py",
        "settings": settings,
        "hardware": f"CPU, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (attnres, torch, transformers)},
        "rows": rows,
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output, results)
    print(markdown(rows))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
