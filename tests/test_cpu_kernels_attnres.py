# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""How the kernels for CPUs are compiled, kept and chosen. What they compute is tested in test_kernels_attnres.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from behaviours import assert_close
from families import tiny_model, tokens

import cpu_kernels_attnres
from fused_attnres import closed_reads, depth_step


pytestmark = pytest.mark.skipif(cpu_kernels_attnres.compiler() is None, reason="needs a C++ compiler")

READ = """
import torch
from attnres import DepthAttentionInterface, eager_depth_attention
name = DepthAttentionInterface.default
sources = [torch.randn(2, 40, 16, generator=torch.Generator().manual_seed(i)) for i in range(3)]
product = torch.linspace(-1, 1, 16)
found = DepthAttentionInterface().get_interface(name)(sources, product, 1e-5, 1)
torch.testing.assert_close(found[0], eager_depth_attention(sources, product, 1e-5, 1)[0])
print(name)
"""


def start(cache: Path, **environment) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", READ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
    )


def read(cache: Path, **environment) -> tuple[str, str]:
    """The default implementation of a new process, after a read with it, and what it has written to stderr."""
    process = start(cache, **environment)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    return output.strip(), errors


def recording_compiler(folder: Path) -> tuple[Path, Path]:
    """A compiler that writes a line for each time it compiles something."""
    script, log = folder / "compiler", folder / "log"
    script.write_text(f'#!/bin/sh\ncase "$*" in *-shared*) echo compiled >> {log};; esac\nexec g++ "$@"\n')
    script.chmod(0o755)
    log.touch()
    return script, log


def test_compiled_once(tmp_path):
    """The first processes compile, several at a time without harm; later ones find the library."""
    script, log = recording_compiler(tmp_path)
    processes = [start(tmp_path / "cache", CXX=str(script)) for _ in range(2)]
    for process in processes:
        output, errors = process.communicate()
        assert process.returncode == 0 and output.strip() == "cpp", errors
    compiled = log.read_text().count("compiled")
    assert 1 <= compiled <= 2
    assert read(tmp_path / "cache", CXX=str(script))[0] == "cpp"
    assert log.read_text().count("compiled") == compiled
    assert [path.suffix for path in (tmp_path / "cache" / "attnres").iterdir()] == [".so"]


def test_nothing_is_kept_where_others_could_write(tmp_path):
    """Such a folder is neither read nor written, nor is one that isn't there and can't be made; kernels run anyway."""
    (tmp_path / "attnres").mkdir()
    (tmp_path / "attnres").chmod(0o777)
    script, log = recording_compiler(tmp_path)
    for times in (1, 2):
        assert read(tmp_path, CXX=str(script))[0] == "cpp"
        assert log.read_text().count("compiled") == times
    assert not list((tmp_path / "attnres").iterdir())
    (tmp_path / "file").touch()
    assert read(tmp_path / "file", CXX=str(script))[0] == "cpp"


def test_without_a_compiler(tmp_path):
    """Then PyTorch is the default."""
    assert read(tmp_path, CXX="no-such-compiler") == ("two_phase", "")


def test_a_damaged_library_is_compiled_again(tmp_path):
    script, log = recording_compiler(tmp_path)
    for times in (1, 2):
        assert read(tmp_path / "cache", CXX=str(script)) == ("cpp", "")
        assert log.read_text().count("compiled") == times
        for library in (tmp_path / "cache" / "attnres").iterdir():
            library.write_bytes(library.read_bytes()[:1000])


@pytest.mark.parametrize("message", ["", "kernels.cpp:1: error: no such thing"])
def test_a_compiler_that_fails(tmp_path, message):
    """One warning says what failed, PyTorch computes instead, and nothing is left behind in the cache."""
    script = tmp_path / "compiler"
    script.write_text(f"#!/bin/sh\necho '{message}' >&2\nexit 1\n")
    script.chmod(0o755)
    output, errors = read(tmp_path / "cache", CXX=str(script))
    assert output == "cpp" and errors.count("don't run on cpu") == 1
    assert (message or "compiler failed") in errors and "runs in PyTorch instead" in " ".join(errors.split())
    assert not list((tmp_path / "cache" / "attnres").iterdir())


def results(num_threads: int) -> list[torch.Tensor]:
    """Results and gradients of a small block of reads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        generator = torch.Generator().manual_seed(0)
        shapes = [(3, 100, 200)] * 4 + [(2, 200), (200,)]
        tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
        *sources, output, products, gain = tensors
        mixed, lse = closed_reads(sources, products, 1e-5)
        step = depth_step(mixed[0], output, mixed[1], lse[1], products[1], 1e-5, norm_weight=gain, norm_eps=1e-5)
        return [
            step.normed,
            step.partial,
            *torch.autograd.grad([step.normed.sum(), step.partial.square().sum()], tensors),
        ]
    finally:
        torch.set_num_threads(threads)


def test_as_many_threads_as_wanted():
    """Every bit is the same with one thread and with several, gradients of parameters included."""
    assert all(torch.equal(a, b) for a, b in zip(results(1), results(3), strict=True))


@pytest.mark.parametrize("width", [1, 15, 16, 17, 4099])
def test_widths(width):
    """Rows that vectors don't fill, and long ones: as exact as eager."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(2, 3, width, generator=generator) for _ in range(5)]
    products = torch.randn(5, width, generator=generator) * 2 * width**-0.5
    mixed, lse = closed_reads(sources, products, 1e-5)
    values = torch.stack(sources).double()
    scores = torch.einsum("nbsd,rd->rnbs", values, products.double()) * (values.square().mean(-1) + 1e-5).rsqrt()
    assert_close(torch.stack(mixed), torch.einsum("rnbs,nbsd->rbsd", scores.softmax(1), values).float(), 1e-6)
    assert_close(lse, scores.logsumexp(1).float(), 1e-6)


@pytest.mark.parametrize("tokens", [(1, 1), (2, 40)], ids=["one token", "many"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_stays_one(tokens, value):
    """What eager makes of it: a token that isn't finite gives a read that isn't, and leaves the others alone."""
    model = tiny_model()
    embeds = torch.randn(*tokens, model.config.hidden_size, generator=torch.Generator().manual_seed(0))
    embeds[0, 0, 3] = value
    with torch.no_grad():
        found, expected = (
            (model.set_attn_res_implementation(name), model(inputs_embeds=embeds, use_cache=False).logits)[1]
            for name in ("cpp", "eager")
        )
    assert torch.equal(found.isfinite(), expected.isfinite()) and not found[0, 0].isfinite().any()


@torch.no_grad()
def test_outputs_of_another_dtype():
    """A sublayer that puts out float32 in a bfloat16 model, token by token and all at once."""
    model, logits = tiny_model(attn_res_block_size=2).to(torch.bfloat16), {}
    mlp = model.model.layers[1].mlp
    forward = mlp.forward
    mlp.forward = lambda *args: forward(*args).float()
    for name in ("cpp", "eager"):
        model.set_attn_res_implementation(name)
        logits[name] = [model(tokens(1, 1)).logits.float(), model(tokens()).logits.float()]
    for found, expected in zip(logits["cpp"], logits["eager"], strict=True):
        assert_close(found, expected, 5e-2)
