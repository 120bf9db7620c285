# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/pipeline_bytes.py --output results/pipeline/bytes

Counts what real pipelines send: a small Llama in two and four processes on gloo, Block and Full, cached and naive, with
one stage per process and several. Beside it is what the plan says, and the paper's formulas (arXiv 2603.15031, section
4), which need stages that begin with a block.

Writes a file .json and a file .md. The last line printed is JSON.
"""

import argparse
import itertools
import json
import platform
import shlex
import sys
import tempfile
import textwrap
from pathlib import Path

import from_clone  # noqa: F401
import torch
import torch.distributed as dist
import torch.multiprocessing
import transformers
from attnres_convert.writing import table, write_json, write_text
from attnres_recipes.pipelines import Pipeline, PipelinePlan
from attnres_recipes.planning import paper_blocks_sent

import attnres


def model_config(mode: str, block_size: int, num_layers: int, hidden_size: int) -> attnres.AttnResConfig:
    return attnres.AttnResConfig(
        attn_res_mode=mode,
        attn_res_block_size=block_size,
        num_hidden_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_attention_heads=2,
        vocab_size=64,
    )


def cases(num_ranks: int, num_layers: int, block_sizes: list[int], virtuals: list[int]) -> list[dict]:
    """Modes and stages with which blocks begin with stages."""
    modes = [("block", block_size) for block_size in block_sizes] + [("full", 1)]
    found = []
    for num_virtual, (mode, block_size) in itertools.product(virtuals, modes):
        num_stages = num_ranks * num_virtual
        if num_layers % (num_stages * block_size) == 0:
            for cached in (True, False) if num_virtual > 1 else (True,):
                found.append({"mode": mode, "block_size": block_size, "num_virtual": num_virtual, "cached": cached})
    return found


def sent_in_a_step(case: dict, args: argparse.Namespace) -> dict[str, int]:
    """Bytes that all processes send, by direction, as counted."""
    model = attnres.AttnResForCausalLM(
        model_config(case["mode"], case["block_size"], args.layers, args.hidden_size)
    ).train()
    num_stages = dist.get_world_size() * case["num_virtual"]
    sizes = num_stages * (args.layers // num_stages,)  # blocks begin with stages
    pipeline = Pipeline(model, args.microbatches, num_stages, cached=case["cached"], sizes=sizes)
    ids = torch.arange(args.microbatches * args.tokens).view(args.microbatches, -1) % model.config.vocab_size
    pipeline.step(ids, labels=ids)
    sent = torch.tensor([pipeline.bytes_sent["forward"], pipeline.bytes_sent["backward"]])
    dist.all_reduce(sent)
    return dict(zip(("counted_forward", "counted_backward"), sent.tolist()))


def process(rank: int, num_ranks: int, folder: str, args: argparse.Namespace):
    """Runs all cases; the first process writes what was counted."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    try:
        own = cases(num_ranks, args.layers, args.block_sizes, args.stages_per_process)
        counted = [{**case, **sent_in_a_step(case, args)} for case in own]
    finally:
        dist.destroy_process_group()
    if rank == 0:
        write_json(Path(folder) / "counted.json", {"rows": counted})


def with_formulas(row: dict, num_ranks: int, args: argparse.Namespace) -> dict:
    """A row with the bytes of the plan and of the formulas, one direction each."""
    config = model_config(row["mode"], row["block_size"], args.layers, args.hidden_size)
    num_stages = num_ranks * row["num_virtual"]
    plan = PipelinePlan(config, num_stages, num_ranks, row["cached"])
    tensor = args.microbatches * args.tokens * args.hidden_size * torch.float32.itemsize
    blocks = 2 * args.layers / config.attn_res_sublayers_per_block / num_stages
    paper = {
        name: int(paper_blocks_sent(num_ranks, row["num_virtual"], blocks, cached) * tensor)
        for name, cached in (("paper_naive", False), ("paper_cached", True))
    }
    return {"processes": num_ranks, **row, "planned": plan.num_sent * tensor, **paper, "bytes_per_source": tensor}


def measure(args: argparse.Namespace) -> list[dict]:
    rows = []
    for num_ranks in args.processes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, args=(num_ranks, folder, args), nprocs=num_ranks)
            counted = json.loads((Path(folder) / "counted.json").read_text())["rows"]
        rows += [with_formulas(row, num_ranks, args) for row in counted]
    return rows


def markdown(rows: list[dict]) -> str:
    """Sources that are sent forward for each microbatch, all processes together."""
    lines = [("processes", "stages each", "model", "cached", "counted", "planned", "paper, naive", "paper, cached")]
    for row in rows:
        model = "Full" if row["mode"] == "full" else f"blocks of {row['block_size']}"
        sent = [row[name] / row["bytes_per_source"] for name in ("counted_forward", "planned", "paper_naive")]
        sent.append(row["paper_cached"] / row["bytes_per_source"])
        cached = "-" if row["num_virtual"] == 1 else "yes" if row["cached"] else "no"
        lines.append((str(row["processes"]), str(row["num_virtual"]), model, cached, *(f"{each:g}" for each in sent)))
    return table(lines)


def report(results: dict) -> str:
    paragraphs = (
        "Sources, `(batch, seq, hidden)` each, that a pipeline sends forward for a microbatch: counted in real "
        "processes, planned, and by the paper's formulas. As many gradients go back. A Llama of "
        f"{results['settings']['layers']} layers. With one stage per process caching changes nothing.",
        "The formulas leave the embedding out, which each stage needs too. The one for caching has a process sent "
        "again what it has closed itself, which isn't done here.",
    )
    text = "\n\n".join(textwrap.fill(paragraph, 120, break_on_hyphens=False) for paragraph in paragraphs)
    return f"{text}\n\n```console\n$ {results['command']}\n```\n\n{markdown(results['rows'])}"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description="Counts the bytes that pipelines send, beside the formulas.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="name without a suffix, of the files to write")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4], help="of a pipeline")
    parser.add_argument("--stages-per-process", type=int, nargs="+", default=[1, 2, 4], help="with 1F1B")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers")
    parser.add_argument("--block-sizes", type=int, nargs="+", default=[1, 2], help="in decoder layers")
    parser.add_argument("--hidden-size", type=int, default=8, help="width")
    parser.add_argument("--microbatches", type=int, default=4, help="of a step, one sequence each")
    parser.add_argument("--tokens", type=int, default=4, help="per sequence")
    args = parser.parse_args(argv)
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    rows = measure(args)
    results = {
        "command": shlex.join(["python", "benchmarks/pipeline_bytes.py", *(sys.argv[1:] if argv is None else argv)]),
        "settings": settings,
        "hardware": f"CPU, {platform.machine()}",
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (attnres, torch, transformers)},
        "rows": rows,
    }
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(args.output.with_name(f"{args.output.name}.json"), results)
        write_text(args.output.with_name(f"{args.output.name}.md"), report(results))
    print(report(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
