# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/devices.py --output results/devices.json

What each process of a training run holds, by the way in which several devices share it: bytes of parameters, of their
gradients and of the optimizer's state (AdamW, float32), counted in the tensors themselves after the last step, in runs
of scripts/pretrain.py that `accelerate launch` starts. On a GPU also the peak of its memory. Without one, processes run
on the CPU with gloo, and the memory of a process, which has built the model as a whole before, says little.

Prints the table, and writes it and what was run as JSON. Ways that the output has already aren't measured again.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from attnres_convert.writing import table, write_json


ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "devices.json"
SIZES = "hidden_size=512 num_attention_heads=8 num_key_value_heads=8 vocab_size=2048 max_position_embeddings=128"
MODELS = {
    "llama": f"{SIZES} intermediate_size=1408 num_hidden_layers=8",
    "qwen3_moe": f"{SIZES} num_hidden_layers=4 num_experts=8 num_experts_per_tok=2 moe_intermediate_size=512",
}
TRAINING = "--data stdlib --seq-len 128 --batch-size 2 --steps 2 --eval-sequences 8 --depth-every 0"


@dataclass(frozen=True)
class Way:
    """How processes share a model: the configuration in scripts/accelerate, and options of the script."""

    model: str
    config: str | None
    processes: int
    options: tuple[str, ...] = ()


# one line for each way
WAYS = {
    "llama": Way("llama", None, 1),
    "llama ddp": Way("llama", "ddp", 2),
    "llama fsdp2": Way("llama", "fsdp2", 2),
    "llama tp": Way("llama", "tp", 2),
    "llama tp x fsdp": Way("llama", "tp", 4),
    "llama, accumulate 2": Way("llama", None, 1, ("--accumulate", "2")),
    "llama pipeline": Way("llama", "pipeline", 2, ("--pipeline-stages", "2", "--accumulate", "2")),
    "qwen3_moe": Way("qwen3_moe", None, 1),
    "qwen3_moe fsdp2": Way("qwen3_moe", "fsdp2", 2),
    "qwen3_moe tp": Way("qwen3_moe", "tp", 2),
    "qwen3_moe ep": Way("qwen3_moe", "ddp", 2, ("--expert-parallel", "2")),
    "qwen3_moe tp + ep": Way("qwen3_moe", "tp", 2, ("--expert-parallel", "2")),
}


def local_bytes(tensors) -> int:
    """What tensors take in this process, each counted once."""
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in local if tensor.ndim}.values())


def worker(arguments: list[str]):
    """One process of scripts/pretrain.py, which also writes `memory-RANK.json`."""
    from attnres_recipes.pretraining import Pretraining
    from attnres_recipes.process import peak_memory
    from pretrain import parse_arguments
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
            if state.global_step + 1 < state.max_steps:
                return
            parameters = list(model.parameters())
            states = [value for values in optimizer.state.values() for value in values.values()]
            measured = {
                "parameters": local_bytes(parameters),
                "gradients": local_bytes(p.grad for p in parameters if p.grad is not None),
                "optimizer": local_bytes(value for value in states if isinstance(value, torch.Tensor)),
                "peak": peak_memory() if torch.cuda.is_available() else None,
            }
            write_json(Path(args.output_dir) / f"memory-{args.process_index}.json", measured)

    class Measured(Pretraining):
        def new_trainer(self, *args, **kwargs):
            trainer = super().new_trainer(*args, **kwargs)
            trainer.add_callback(Measure())
            return trainer

    Measured.command(parse_arguments(arguments))


def measure(way: Way, folder: Path, tokenizer: Path, sizes: str, training: str) -> dict:
    """The largest of all processes."""
    options = [
        "--config",
        way.model,
        "--set",
        *sizes.split(),
        "--tokenizer",
        tokenizer,
        *training.split(),
        *way.options,
    ]
    launch = [sys.executable]
    if way.config:
        config = ROOT / "scripts" / "accelerate" / f"{way.config}.yaml"
        launch += ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", config]
        launch += ["--num_processes", way.processes, "--main_process_port", 0]
    command = [*launch, __file__, "--worker", *options, "--output", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "scripts"), str(ROOT)])
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(result.stdout[-2000:] + result.stderr[-2000:])
    held = [json.loads((folder / f"memory-{rank}.json").read_text()) for rank in range(way.processes)]
    losses = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    most = {name: max(process[name] or 0 for process in held) or None for name in held[0]}
    return {"processes": way.processes, **most, "loss": json.loads(losses[-1])["loss"]}


def markdown(rows: dict[str, dict]) -> str:
    """MB of the process that holds the most, and the loss of the last step."""
    columns = ("parameters", "gradients", "optimizer")
    lines = [
        (name, str(row["processes"]), *(f"{row[column] / 1e6:.1f}" for column in columns), f"{row['loss']:.4f}")
        for name, row in rows.items()
    ]
    return table([("way", "processes", *columns, "loss"), *lines]).rstrip()


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS, help="file of the results; what it has isn't run again")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="default: all")
    parser.add_argument("--sizes", help="of all models, instead of the ones here, as --set takes them")
    parser.add_argument("--training", default=TRAINING, help="options of scripts/pretrain.py; default: %(default)s")
    tokenizer = ROOT / "model_cards" / "llama-1.3m"
    parser.add_argument("--tokenizer", type=Path, default=tokenizer, help="folder of a tokenizer")
    args = parser.parse_args(arguments)
    from attnres_recipes.process import versions

    what = {"models": {"all": args.sizes} if args.sizes else MODELS, "training": args.training, "versions": versions()}
    before = json.loads(args.output.read_text()) if args.output.exists() else {}
    rows = before.pop("rows", {})
    rows = rows if before == what else {}
    with tempfile.TemporaryDirectory() as folder:
        for name in (name for name in args.ways if name not in rows):
            way = WAYS[name]
            run = Path(folder, re.sub(r"\W+", "-", name))
            rows[name] = measure(way, run, args.tokenizer, args.sizes or MODELS[way.model], args.training)
            print(name, rows[name], file=sys.stderr)
            rows = {name: rows[name] for name in WAYS if name in rows}
            write_json(args.output, {**what, "rows": rows})
    print(markdown(rows))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2:])
    else:
        main()
