# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Other projects' depth attention against ours, where they and a GPU are there."""

import importlib.util

import pytest
import torch

from attnres_kernels.peers import PEERS, FlashAttnRes
from depth_attention_attnres import TwoPhaseDepthAttention, eager_depth_attention


EPS, SCALE = 1e-2, 3


def check_peer(implementation, device):
    """The three reads of a block over two closed sources in bfloat16, and all gradients."""
    generator = torch.Generator().manual_seed(0)
    rounded = [torch.randn(2, 20, 64, generator=generator).bfloat16() for _ in range(4)]
    products = 0.3 * torch.randn(3, 64, generator=generator)
    weights = torch.randn(3, 2, 20, 64, generator=generator)

    def results(implementation, dtype, device):
        tensors = [tensor.to(device, dtype).requires_grad_() for tensor in rounded]
        rows = products.to(device).requires_grad_()
        closed, outputs, reads = tuple(tensors[:2]), tensors[2:], []
        closed_reads = None
        if isinstance(implementation, TwoPhaseDepthAttention):
            closed_reads = implementation.phase_1(closed, rows, EPS)
        for row, sources in enumerate((closed, (*closed, outputs[0]), (*closed, outputs[0] + outputs[1]))):
            if closed_reads is None:
                mixed, _ = implementation(sources, rows[row], EPS, SCALE)
            else:
                mixed, _ = implementation.merge(closed_reads[row], sources, rows[row], EPS, SCALE)
            reads.append(mixed)
        total = sum((read * weight.to(read)).sum() for read, weight in zip(reads, weights))
        return [*reads, *torch.autograd.grad(total, [*tensors, rows])]

    exact = results(eager_depth_attention, torch.float64, "cpu")
    for found, wanted in zip(results(implementation, torch.bfloat16, device), exact, strict=True):
        assert ((found.double().cpu() - wanted).norm() / wanted.norm()).item() < 1e-2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PEERS)
def test_peer(name):
    """A peer's reads and gradients are those of the plain formula, up to a few roundings to bfloat16."""
    package, implementation = PEERS[name]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}")
    check_peer(implementation, "cuda")


def test_flash_attn_res_refuses_widths():
    """It is said which hidden sizes its kernels take."""
    with pytest.raises(ValueError, match="powers of two, not 48"):
        FlashAttnRes().phase_1([torch.zeros(1, 2, 48)], torch.zeros(1, 48), EPS)
