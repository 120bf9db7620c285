# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Programs exported from a model are right for batches and lengths that the export hasn't seen."""

import functools

import onnxruntime
import pytest
import torch
from behaviours import assert_close, rounding
from families import relative_error, tiny_model, tokens
from torch._dynamo.testing import CompileCounterWithBackend

from attnres_kernels.cpu import compiler


IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation",
    ["eager", "two_phase", pytest.param("cpp", marks=pytest.mark.skipif(compiler() is None, reason="needs g++"))],
)
# other routes lead through few and through many tokens: 32 are few
SHAPES = [(1, 1), (2, 5), (1, 32), (2, 40)]
EXPORTED = [(3, 7), (2, 40)]


class Logits(torch.nn.Module):
    """What is exported: ids in, logits out, without a cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids, use_cache=False).logits


@functools.cache
def model_of(mode: str, implementation: str) -> torch.nn.Module:
    return tiny_model(
        num_hidden_layers=2, attn_res_mode=mode, attn_res_block_size=1, attn_res_implementation=implementation
    )


def dynamic() -> dict:
    return {"input_ids": {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("seq", max=64)}}


@torch.no_grad()
def check(run, mode: str, shapes=SHAPES):
    """Against the readable implementation."""
    expected = model_of(mode, "eager")
    bound = 1e-5 if mode == "denseformer" else rounding(mode=mode, block_size=1).logits
    for shape in shapes:
        found = torch.as_tensor(run(tokens(*shape)))
        assert_close(found, expected(tokens(*shape), use_cache=False).logits, bound)


@pytest.mark.parametrize(
    "shape, strict",
    [
        pytest.param(EXPORTED[0], False, id="few"),
        pytest.param(EXPORTED[1], False, id="many"),
        pytest.param(EXPORTED[1], True, id="strict", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("mode", ["block", "full"])
@IMPLEMENTATIONS
@torch.no_grad()
def test_export(implementation, mode, strict, shape):
    """torch.export with a dynamic batch and length fixes neither."""
    wrapped = Logits(model_of(mode, implementation))
    exported = torch.export.export(wrapped, (tokens(*shape),), dynamic_shapes=dynamic(), strict=strict)
    check(exported.module(), mode)


@torch.no_grad()
def test_export_of_denseformer():
    """The ablation too."""
    wrapped = Logits(model_of("denseformer", "eager"))
    exported = torch.export.export(wrapped, (tokens(3, 7),), dynamic_shapes=dynamic())
    check(exported.module(), "denseformer")


@pytest.mark.slow
@pytest.mark.parametrize("shape", EXPORTED, ids=["few", "many"])
@IMPLEMENTATIONS
def test_export_with_gradients(implementation, shape):
    """So does an export in training, whose program has the gradients of the model."""
    model = model_of("block", implementation)
    wrapped = Logits(model)
    exported = torch.export.export(wrapped, (tokens(*shape),), dynamic_shapes=dynamic()).module()
    parameters = [exported.get_parameter(f"model.{name}") for name, _ in model.named_parameters()]
    for other in SHAPES[1:]:
        results = exported(tokens(*other)), wrapped(tokens(*other))
        gradients = [
            torch.autograd.grad(result.square().sum(), leaves)
            for result, leaves in zip(results, (parameters, list(model.parameters())))
        ]
        for found, expected in zip(*gradients):
            assert relative_error(found, expected) <= rounding(mode="block", block_size=1).gradients


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "full"])
@IMPLEMENTATIONS
@torch.no_grad()
def test_onnx(implementation, mode, tmp_path):
    """ONNX Runtime computes the model, for other shapes too."""
    anything = torch.export.Dim.DYNAMIC
    program = torch.onnx.export(
        Logits(model_of(mode, implementation)).eval(),
        (tokens(3, 7),),
        dynamo=True,
        dynamic_shapes={"input_ids": {0: anything, 1: anything}},
        verbose=False,
    )
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (argument,) = session.get_inputs()
    assert all(isinstance(size, str) for size in argument.shape)
    check(lambda input_ids: session.run(None, {argument.name: input_ids.numpy()})[0], mode)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["block", "full"])
@IMPLEMENTATIONS
@torch.no_grad()
def test_exporter_of_transformers(implementation, mode):
    """transformers' exporter, which makes every axis dynamic, does not fix one either."""
    module = pytest.importorskip("transformers.exporters.exporter_dynamo")
    inputs = {"input_ids": tokens(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long), "use_cache": False}
    exported = module.DynamoExporter().export(
        model_of(mode, implementation), inputs, config=module.DynamoConfig(dynamic=True)
    )
    run = exported if callable(exported) else exported.module()
    check(
        lambda input_ids: run(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))["logits"],
        mode,
        SHAPES[1:],
    )


@pytest.mark.parametrize("shape", EXPORTED, ids=["few", "many"])
@IMPLEMENTATIONS
@torch.no_grad()
def test_torch_jit_trace(implementation, shape):
    """A traced model takes other shapes."""
    model = model_of("block", implementation)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    try:
        traced = torch.jit.trace(Logits(model), tokens(*shape), check_trace=False)
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    check(traced, "block", SHAPES[1:])


@pytest.mark.parametrize("num_tokens", [5, 50], ids=["few", "many"])
@IMPLEMENTATIONS
def test_forward_mode(implementation, num_tokens):
    """Forward-mode gradients, which neither kernels nor functions of their own know, are those of eager."""

    def tangent(name):
        model = model_of("block", name)
        embeds = model_of("block", "eager").get_input_embeddings()(tokens(2, num_tokens)).detach()
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.jvp(lambda x: model(inputs_embeds=x, use_cache=False).logits, (embeds,), (embeds,))[1]

    assert_close(tangent(implementation), tangent("eager"), rounding(mode="block", block_size=1).gradients)


@pytest.mark.slow
@pytest.mark.parametrize("with_gradients", [False, True], ids=["inference", "training"])
@IMPLEMENTATIONS
def test_compiled_dynamically(implementation, with_gradients):
    """`torch.compile(dynamic=True)` makes graphs for calls of few tokens and for those of many, and no more; logits and
    gradients are those of the model as it is."""
    model = model_of("block", implementation)
    parameters, graphs, counter = [*model.parameters()], [], CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    run = torch.compile(Logits(model), fullgraph=True, backend=counter, dynamic=True)
    with torch.set_grad_enabled(with_gradients):
        for shapes in ([(2, 5), (3, 7), (2, 11)], [(2, 17), (2, 40), (4, 60)], [(3, 9)]):
            for shape in shapes:
                found, expected = run(tokens(*shape)), model(tokens(*shape), use_cache=False).logits
                assert_close(found, expected, rounding(block_size=1).logits)
                if with_gradients:
                    pairs = zip(*(torch.autograd.grad(x.logsumexp(-1).sum(), parameters) for x in (found, expected)))
                    for gradient, expected_gradient in pairs:
                        assert_close(gradient, expected_gradient, rounding(block_size=1).gradients)
            graphs.append(counter.frame_count)
    torch.compiler.reset()
    # torch compiles the first call once more when its sizes turn out to vary, also for the donor
    assert graphs[0] <= 2 and graphs[1] <= (1 if implementation == "eager" else 2) * graphs[0]
    assert graphs[2] == graphs[1]
