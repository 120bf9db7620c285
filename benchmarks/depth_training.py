# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/depth_training.py outputs/zoo/smollm2-135m-attnres --output results/real/depth_training.json

Trains a converted model on for a few steps in several ways that differ in how depth attention is trained, on the same
batches, and measures the loss on held-out text in float32: the least that each way has to do is no harm. Results that
are in the output already are kept. The text is the Python standard library's own source.
"""

import argparse
import hashlib
import json
import math
import shlex
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import from_clone  # noqa: F401
import numpy as np
import torch


# isort: split
from attnres_convert.writing import table, write_json
from attnres_recipes.data import stdlib_files
from attnres_recipes.process import versions
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres  # noqa: F401
from depth_attention_attnres import DepthAttentionInterface, eager_depth_attention


SEQ_LEN, BATCH_SIZE, STEPS, WARMUP = 256, 2, 16, 2
LEARNING_RATE, LAST_RATE, WEIGHT_DECAY, BETAS, MAX_NORM = 5e-5, 0.1, 0.1, (0.9, 0.95), 1.0
CHARACTERS, HELD_OUT_SHARE, HELD_OUT_EVERY, HELD_OUT = 20_000, 20, 14, 16
TOKENS, HELD_OUT_TOKENS = 1_500_000, 60_000


@dataclass(frozen=True)
class Way:
    """How depth attention is trained.

    Args:
        scale: its learning rate as a multiple of that of all else; 0: it stays as it is.
        one_norm: whether its gradients and all others are clipped by one norm.
        by_row: Adam's second moment is one for each query instead of one for each number in it.
        gains: key norms begin at the inverse size of each channel of the keys, at most 1, which changes nothing while
            the queries are zero.
        warmup: steps.
        but_first: the first token of a sequence, which holds the largest activations, gives queries no gradient.
    """

    scale: float
    one_norm: bool = False
    by_row: bool = False
    gains: bool = False
    warmup: int = WARMUP
    but_first: bool = False


WAYS = {
    "untrained": Way(0),
    "x 3, one norm": Way(3, one_norm=True),
    "x 0.3": Way(0.3),
    "x 1": Way(1),
    "x 3": Way(3),
    "x 1, second moment by row": Way(1, by_row=True),
    "x 1, gains by channel": Way(1, gains=True),
    "x 1, warmed up": Way(1, warmup=STEPS // 2),
    "x 1, without the first token": Way(1, but_first=True),
}


def windows(tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences `(number, SEQ_LEN)` to train on and held-out ones, of different files."""
    parts = {False: [], True: []}
    for file in stdlib_files():
        number = int(hashlib.sha256(file.name.encode()).hexdigest(), 16)
        parts[number % HELD_OUT_SHARE == 0].append(file.read_text(encoding="utf-8", errors="replace"))
    generator, sides = np.random.default_rng(0), []
    for texts in parts.values():
        generator.shuffle(texts)
    for texts, wanted in zip(parts.values(), (TOKENS, HELD_OUT_TOKENS)):
        ids = []
        for text in texts:
            ids += [*tokenizer(text[:CHARACTERS], verbose=False)["input_ids"], 0]
            if len(ids) > wanted:
                break
        ids = torch.tensor(ids[:wanted])
        sides.append(ids[: len(ids) // SEQ_LEN * SEQ_LEN].view(-1, SEQ_LEN))
    return sides[0], sides[1][::HELD_OUT_EVERY][:HELD_OUT]


@torch.no_grad()
def loss_of(model, sequences: torch.Tensor) -> float:
    model.eval()
    losses = [model(part, labels=part, use_cache=False).loss.item() * len(part) for part in sequences.split(4)]
    model.train()
    return sum(losses) / len(sequences)


def but_first(sources, product, eps: float, scale: float):
    """[`eager_depth_attention`], in which the first token gives the product no gradient."""
    first, _ = eager_depth_attention(tuple(source[:, :1] for source in sources), product.detach(), eps, scale)
    rest, weights = eager_depth_attention(tuple(source[:, 1:] for source in sources), product, eps, scale)
    return torch.cat([first, rest], dim=1), weights


@torch.no_grad()
def gains_by_channel(model, sequences: torch.Tensor) -> torch.Tensor:
    """`(num_reads, hidden)`: the inverse root mean square of each channel of the keys of each read, at most 1."""
    squares = []

    def collecting(sources, product, eps, scale):
        keys = torch.stack([source.float()[:, 1:] for source in sources])
        keys = keys * torch.rsqrt(keys.pow(2).mean(-1, keepdim=True) + eps)
        squares.append(keys.pow(2).mean((0, 1, 2)))
        return eager_depth_attention(sources, product, eps, scale)

    name = model.config._attn_res_implementation
    DepthAttentionInterface.register("collecting", collecting)
    model.set_attn_res_implementation("collecting")
    model(sequences, use_cache=False)
    model.set_attn_res_implementation(name)
    return torch.stack(squares).rsqrt().clamp(max=1)


class AdamByRow:
    """Adam whose second moment is the mean over a row."""

    def __init__(self, parameters: list[torch.Tensor]):
        self.parameters, self.step_number = parameters, 0
        self.moments = [(torch.zeros_like(p), torch.zeros(len(p), 1)) for p in parameters]

    @torch.no_grad()
    def step(self, rate: float):
        self.step_number += 1
        first, second = (1 - beta**self.step_number for beta in BETAS)
        for parameter, (mean, square) in zip(self.parameters, self.moments):
            mean.lerp_(parameter.grad, 1 - BETAS[0])
            square.lerp_(parameter.grad.pow(2).mean(1, keepdim=True), 1 - BETAS[1])
            parameter -= rate * (mean / first) / ((square / second).sqrt() + 1e-12)
            parameter.grad = None


def train(folder: Path, way: Way, seed: int, sequences: torch.Tensor, held_out: torch.Tensor) -> dict:
    """Trains on in one way, and returns the losses."""
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    order = torch.from_numpy(np.random.default_rng(100 + seed).permutation(len(sequences)))
    depth = [p for name, p in model.named_parameters() if "depth_attention" in name]
    others = [p for name, p in model.named_parameters() if "depth_attention" not in name]
    query, key_norm = depth
    if way.gains:
        key_norm.data = gains_by_channel(model.eval(), sequences[order[-8:-6]])
        model.train()
    if way.but_first:
        DepthAttentionInterface.register("but_first", but_first)
        model.set_attn_res_implementation("but_first")
    depth = depth if way.scale else []
    for parameter in (query, key_norm):
        parameter.requires_grad_(bool(way.scale))
    groups = [
        {"params": [p for p in others if p.ndim > 1], "weight_decay": WEIGHT_DECAY, "scale": 1, "warmup": WARMUP},
        {"params": [p for p in others if p.ndim == 1], "weight_decay": 0.0, "scale": 1, "warmup": WARMUP},
        *([{"params": depth, "weight_decay": 0.0, "scale": way.scale, "warmup": way.warmup}] if depth else []),
    ]
    optimizer, by_row = torch.optim.AdamW(groups, betas=BETAS), AdamByRow(depth) if way.by_row else None
    losses, norms = [], []
    for step in range(STEPS):
        decay = LAST_RATE + (1 - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / (STEPS - 1)))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * group["scale"] * min(1, (step + 1) / group["warmup"]) * decay
        batch = sequences[order[step * BATCH_SIZE :][:BATCH_SIZE]]
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(batch, labels=batch, use_cache=False).loss
        loss.backward()
        parts = [others + depth] if way.one_norm else [others, depth]
        norms.append([torch.nn.utils.clip_grad_norm_(part, MAX_NORM).item() for part in parts if part])
        if by_row is not None:
            by_row.step(optimizer.param_groups[-1]["lr"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {
        "way": asdict(way),
        "seed": seed,
        "held_out_loss": loss_of(model, held_out),
        "losses": losses,
        "gradient_norms": norms,
        "largest_product": (query * key_norm).abs().max().item(),
        "seconds": time.perf_counter() - started,
    }


def rows(results: dict) -> Iterable[tuple[str, ...]]:
    yield "depth attention", "seed", "held-out loss", "against untrained"
    untrained = {run["seed"]: run["held_out_loss"] for run in results["runs"].values() if not run["way"]["scale"]}
    for name, run in results["runs"].items():
        loss, base = run["held_out_loss"], untrained.get(run["seed"])
        yield name.rpartition(",")[0], str(run["seed"]), f"{loss:.5f}", "-" if base is None else f"{loss - base:+.5f}"


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[1],
        epilog="example: " + __doc__.split("\n\n", 1)[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", type=Path, help="folder of a converted model")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the order of the data")
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    args = parser.parse_args(argv)
    if unknown := [way for way in args.ways if way not in WAYS]:
        parser.error(f"there is no way {unknown[0]!r}; choose from {', '.join(WAYS)}")
    sequences, held_out = windows(AutoTokenizer.from_pretrained(args.model))
    results = json.loads(args.output.read_text()) if args.output.exists() else {"runs": {}}
    if "before" not in results:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
        results |= {"model": args.model.name, "before": loss_of(model, held_out), "versions": versions()}
    words = sys.argv[1:] if argv is None else argv
    results["command"] = shlex.join(["python", "benchmarks/depth_training.py", *words])
    for name in args.ways:
        for seed in args.seeds:
            if (key := f"{name}, seed {seed}") not in results["runs"]:
                results["runs"][key] = train(args.model, WAYS[name], seed, sequences, held_out)
                write_json(args.output, results)
    print(table(rows(results)))


if __name__ == "__main__":
    main()
