# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/training_loop.py --steps 150

A training loop of one's own, in plain PyTorch. A small Llama and the same with Attention Residuals (Block) are trained
from scratch, with the same first weights, on the same batches: the source of Python's library, byte by byte. It prints
the losses of both, those on text that neither has seen, and how the last read weighs its sources after training.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
from attnres_recipes import new_optimizer
from transformers import LlamaConfig, LlamaForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=150, help="training steps; default: 150")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="of AdamW; default: 0.002")
args = parser.parse_args()
if args.steps < 1 or args.learning_rate <= 0:
    parser.error("--steps and --learning-rate must be above zero")

files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
text = b"\n".join(file.read_bytes() for file in files)
sequences = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()[: len(text) // 128 * 128].view(-1, 128)
torch.manual_seed(0)
sequences = sequences[torch.randperm(len(sequences))]
held_out, train = sequences[:64], sequences[64:]

# transformers' standard deviation of first weights, 0.02, is too small for narrow models; this is 1 / sqrt(hidden_size)
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 8}
sizes |= {"num_attention_heads": 2, "initializer_range": 0.125, "use_cache": False}
donor = LlamaForCausalLM(LlamaConfig(**sizes))
block = AttnResForCausalLM(AttnResConfig(**sizes, attn_res_block_size=2))
block.load_state_dict(donor.state_dict(), strict=False)  # all but depth attention, which starts as a plain average
models = {"donor": donor, "block": block}
# Depth attention is a parameter group of its own: no weight decay, and from scratch three times the learning rate
optimizers = {name: new_optimizer(model, learning_rate=args.learning_rate) for name, model in models.items()}


def split(model):
    """The parameters of depth attention, and all others."""
    named = list(model.named_parameters())
    return [[p for name, p in named if ("depth_attention" in name) is inside] for inside in (True, False)]


for step in range(args.steps):
    batch, losses = train[torch.randint(len(train), (8,))], {}
    for name, model in models.items():
        loss = model(batch, labels=batch).loss
        loss.backward()
        for parameters in split(model):  # one norm for both would let one of them hold the other back
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizers[name].step()
        optimizers[name].zero_grad()
        losses[name] = loss.item()
    if step % 25 == 0 or step == args.steps - 1:
        print(f"step {step:>4}", *(f"{name} {loss:.4f}" for name, loss in losses.items()), sep="  ")

with torch.no_grad():
    losses = {name: model.eval()(held_out, labels=held_out).loss.item() for name, model in models.items()}
    weights = block(held_out, output_depth_attentions=True).depth_attentions[-1].mean(dim=(0, 2))
print("held out ", *(f"{name} {loss:.4f}" for name, loss in losses.items()), sep="  ")
sources = ["embedding", *(f"block {index}" for index in range(1, len(weights)))]
print("last read", *(f"{source} {weight:.3f}" for source, weight in zip(sources, weights)), sep="  ")
