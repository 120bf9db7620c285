# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python examples/register_mixer.py --steps 100

A way to mix depth of one's own. The mode "slope" is Attention Residuals that also learn, for each read, how much less
a source counts the further back it is, as ALiBi does for tokens: score_i = w . RMSNorm(v_i) - slope * distance_i.

It is trained beside `block` from the same weights on the same batches, saved, and loaded. It prints both losses, the
smallest and the largest slope that was learned, and how far the logits of the loaded model are from the trained one's.
"""

import argparse
import sysconfig
import tempfile
from pathlib import Path

import torch
from attnres_recipes import new_optimizer
from transformers import AutoModelForCausalLM, initialization

from attnres import AttnResConfig, AttnResForCausalLM, register_depth_mixer
from depth_attention_attnres import DepthQueries, EachReadItself, key_scores, scaled_sum, upcast


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--steps", type=int, default=100, help="training steps; default: 100")
args = parser.parse_args()
if args.steps < 1:
    parser.error("--steps must be above zero")


def mix_by_distance(sources, learned, eps, scale):
    """The read itself: a row of what `DepthSlope` returns is the query times the key norm, and the slope."""
    values = upcast(sources)
    learned = learned.to(values[0].dtype)
    distance = torch.arange(len(values) - 1, -1, -1, device=learned.device)[:, None]  # of the latest source 0
    return scaled_sum(key_scores(values, learned[:-1], eps) - learned[-1] * distance, values, sources, scale)


class DepthSlope(DepthQueries):
    """The parameters of all reads. With zero queries and slopes, the first ones, a read is a plain average."""

    idle = ("query", "slope")  # as long as they are zero, a converted model is its donor

    def __init__(self, config):
        super().__init__(config)
        self.slope = torch.nn.Parameter(torch.zeros(config.num_depth_reads, 1))

    def reset_parameters(self):
        super().reset_parameters()
        initialization.zeros_(self.slope)

    @staticmethod
    def implementation(config):
        return EachReadItself(mix_by_distance)

    def forward(self):
        return torch.cat([super().forward(), self.slope.float()], dim=1)


register_depth_mixer("slope", DepthSlope, sums_blocks=True)  # before a checkpoint of this mode is loaded

text = (Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()  # byte by byte
sequences = torch.tensor(list(text))[: len(text) // 64 * 64].view(-1, 64)
sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6}
sizes |= {"num_attention_heads": 2, "attn_res_block_size": 1, "initializer_range": 0.125}
for mode in ("block", "slope"):
    torch.manual_seed(0)
    model = AttnResForCausalLM(AttnResConfig(**sizes, attn_res_mode=mode))
    optimizer = new_optimizer(model, learning_rate=2e-3)
    for _ in range(args.steps):
        batch = sequences[torch.randint(len(sequences), (8,))]
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"{mode}: loss of the last batch {loss.item():.4f}")

slope = model.eval().model.depth_attention.slope
print(f"slopes from {slope.min():.4f} to {slope.max():.4f}")
with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    print(f"loaded logits off by {(loaded(batch).logits - model(batch).logits).abs().max():.1e}")
