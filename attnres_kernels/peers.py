# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Other projects' depth attention as implementations of ours, where these projects are installed.

| name | package | what it can't do |
|---|---|---|
| `fla` | fla-core | run without a CUDA device; differentiate the weights; another dtype or width in one read |
| `liger` | liger-kernel | return the weights; sum up a query's gradient in a fixed order. It copies what a read reads |
| `flash_attn_res` | flash-attn-res | return the weights; full mode; widths but powers of two; reads but in bfloat16 |

flash-attn-res copies the closed sources of a block; its version 0.1.12 can't be imported with triton 3.9.

None of them multiplies a read by its number of sources, which converted models need: that is done after it, in the
dtype of the sources.
"""

from importlib.util import find_spec

import torch

from depth_attention_attnres import ClosedDepthRead, DepthAttentionInterface, TwoPhaseDepthAttention


def scaled(mixed: torch.Tensor, scale: float) -> torch.Tensor:
    return mixed if scale == 1 else mixed * scale


def fla_depth_attention(sources, product, eps, scale):
    """`fused_attnres` of flash-linear-attention; arguments and result as those of `eager_depth_attention`."""
    from fla.ops.attnres import fused_attnres

    mixed, weights = fused_attnres(
        product, tuple(sources), torch.ones_like(product), rms_eps=eps, return_weights=True
    )  # weights: (num_sources, batch, seq)
    return scaled(mixed, scale), weights.transpose(0, 1)


def liger_depth_attention(sources, product, eps, scale):
    """`liger_attn_res` of Liger; arguments as those of `eager_depth_attention`, without weights in the result."""
    from liger_kernel.transformers.functional import liger_attn_res

    mixed = liger_attn_res(torch.stack(tuple(sources)), product, torch.ones_like(product), eps)
    return scaled(mixed, scale), None


class FlashAttnRes(TwoPhaseDepthAttention):
    """The two phases of flash-attn-res; arguments as those of [`TwoPhaseDepthAttention`], without weights."""

    def __call__(self, sources, product, eps, scale):
        (closed_read,) = self.phase_1(sources, product.unsqueeze(0), eps)
        return scaled(closed_read.mixed, scale).to(sources[0].dtype), None

    def phase_1(self, sources, products, eps, watched=True, rounded=False):
        hidden_size = products.shape[-1]
        if hidden_size & (hidden_size - 1):
            raise ValueError(
                f"flash_attn_res takes hidden sizes that are powers of two, not {hidden_size}; choose another "
                "attn_res_implementation."
            )
        from flash_attn_res import phase_1_batched_attention_triton_op

        mixed, lse = phase_1_batched_attention_triton_op(torch.stack(tuple(sources)), products, eps)
        return [ClosedDepthRead(m, s, None, len(sources)) for m, s in zip(mixed, lse)]

    def fuses_norm(self, *arguments):
        return False

    def merge(self, closed_read, sources, product, eps, scale, norm=None):
        from flash_attn_res import phase_2_online_softmax_merge_triton_op

        new_sources = sources[closed_read.num_sources :]
        if len(new_sources) > 1:
            raise ValueError("flash_attn_res merges one open source; in full mode choose another implementation.")
        mixed = closed_read.mixed
        if new_sources:
            mixed = phase_2_online_softmax_merge_triton_op(
                new_sources[0].contiguous(), product, mixed, closed_read.lse, eps
            )
        return scaled(mixed, scale).to(sources[0].dtype), None


PEERS = {
    "fla": ("fla", fla_depth_attention),
    "liger": ("liger_kernel", liger_depth_attention),
    "flash_attn_res": ("flash_attn_res", FlashAttnRes()),
}


def register_peers():
    """Adds those whose package is installed to the implementations; it is imported when it is used."""
    for name, (package, implementation) in PEERS.items():
        if find_spec(package) is not None:
            DepthAttentionInterface.register(name, implementation)
