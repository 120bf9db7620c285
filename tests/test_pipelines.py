# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pipelines in two and four processes on gloo compute what one process computes, and send what the plan says."""

import copy
import functools
import itertools

import pytest
import torch
import torch.multiprocessing
from attnres_convert.verification import Float64
from attnres_recipes.pipelines import Pipeline
from families import relative_error, tiny_model, tokens


needs_gloo = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
MICROBATCHES, BATCH, SEQ = 4, 8, 9


def run_on_processes(number: int, folder, *workers):
    """Runs each `worker(rank, folder)` in processes that know each other; an exception in one of them fails."""
    torch.multiprocessing.spawn(start, args=(number, str(folder), workers), nprocs=number)


def start(rank, number, folder, workers):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=number
    )
    try:
        for worker in workers:
            worker(rank, folder)
    finally:
        torch.distributed.destroy_process_group()


def model_of(family: str, **options):
    model = tiny_model(family, num_hidden_layers=9, **{"attn_res_block_size": 2, **options}).double().train()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    return model


def batch() -> dict[str, torch.Tensor]:
    """With padding on the left, and labels that aren't there for all tokens, nor as many in each microbatch."""
    ids = tokens(BATCH, SEQ)
    labels = ids.clone()
    for row in range(BATCH):
        labels[row, : row % 5] = -100
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[6, :2] = 0
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


def compared(rank, folder, family, num_stages, schedule, cached, **options):
    """Two steps whose gradients add up: losses, gradients, bytes and the sources that are left."""
    model = model_of(family, **options)
    inputs = batch()
    with Float64():
        num_items = int(inputs["labels"][:, 1:].ne(-100).sum())
        whole = copy.deepcopy(model)
        expected = whole(**inputs, num_items_in_batch=num_items).loss
        (2 * expected).backward()
        pipeline = Pipeline(model, MICROBATCHES, num_stages, schedule, cached=cached)
        losses = [pipeline.step(**inputs), pipeline.evaluate(**inputs), pipeline.step(**inputs)]
    context = family, num_stages, schedule, cached, options
    for loss in losses:
        assert relative_error(loss, expected) < 1e-12, context
    here = dict(model.named_parameters())
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    for name, parameter in here.items():
        name = "model.embed_tokens.weight" if name == "lm_head.weight" and name not in gradients else name
        assert relative_error(parameter.grad, gradients[name]) < 1e-10, (name, context)
    assert sum("layers" in name.split(".") for name in here) < sum("layers" in name.split(".") for name in gradients)
    assert not any(module.kept for module in pipeline.modules.values())
    number_of_bytes = pipeline.plan.num_sent * BATCH * SEQ * model.config.hidden_size * 8
    sent = torch.tensor([pipeline.bytes_sent[name] for name in ("forward", "backward")])
    torch.distributed.all_reduce(sent)
    assert sent.tolist() == [3 * number_of_bytes, 2 * number_of_bytes], context
    state = pipeline.state_dict()
    if rank == 0:
        assert state.keys() - {"lm_head.weight"} == whole.state_dict().keys() - {"lm_head.weight"}
        assert all(torch.equal(state[name], value) for name, value in whole.state_dict().items() if name in state)


MODES = ({"attn_res_mode": "block"}, {"attn_res_mode": "full"})


def case(family: str, num_stages: int, schedule: str, cached: bool = True, **options):
    return functools.partial(
        compared, family=family, num_stages=num_stages, schedule=schedule, cached=cached, **options
    )


@needs_gloo
@pytest.mark.slow
def test_two_processes(tmp_path):
    """Families, modes, schedules; stages that begin in the middle of a block."""
    families = ("llama", "qwen3_moe", "kimi_linear")
    ways = [(2, "1f1b"), (4, "gpipe"), (6, "1f1b")]
    cases = [case(family, *way, **mode) for family, mode, way in itertools.product(families, MODES, ways)]
    others = [
        case("gemma2", 4, "1f1b", tie_word_embeddings=True),
        case("llama", 2, "gpipe", cached=False),
        case("llama", 8, "1f1b", cached=False),
        case("llama", 8, "1f1b", attn_res_mode="denseformer"),
    ]
    run_on_processes(2, tmp_path, *cases, *others)
