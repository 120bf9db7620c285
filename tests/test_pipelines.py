# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pipelines in two and four processes on gloo compute what one process computes, and send what the plan says."""

import copy
import functools
import itertools

import peft
import pytest
import torch
import torch.multiprocessing
from attnres_convert import InputError
from attnres_convert.verification import Float64
from attnres_recipes.pipelines import (
    Pipeline,
    PipelinePlan,
    balanced,
    check_pipeline,
    layer_costs,
)
from attnres_recipes.planning import paper_blocks_sent
from attnres_recipes.process import enough_memory
from families import perturb, relative_error, tiny_config, tiny_donor, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM


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
    assert not pipeline.kept
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


FAMILIES = ("llama", "qwen3_moe", "kimi_linear")
OTHERS = [  # a tied embedding and soft caps, no cache, other mixers
    case("gemma2", 4, "1f1b", tie_word_embeddings=True),
    case("llama", 2, "gpipe", cached=False),
    case("llama", 8, "1f1b", cached=False),
    case("llama", 8, "1f1b", attn_res_mode="denseformer"),
    case("llama", 4, "1f1b", attn_res_mode="mhc"),
    case("llama", 4, "1f1b", attn_res_mode="block_mhc", attn_res_num_streams=3),
]


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes(tmp_path):
    """Families, modes and schedules; stages that begin in the middle of a block."""
    ways = [(2, "1f1b"), (4, "gpipe"), (6, "1f1b")]
    cases = [case(family, *way, **mode) for family, mode, way in itertools.product(FAMILIES, MODES, ways)]
    run_on_processes(2, tmp_path, *cases, *OTHERS)


@needs_gloo
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_processes(tmp_path):
    """More stages than blocks, eight stages of which some have two layers, and uses."""
    ways = [(4, "1f1b", {}), (8, "gpipe", {}), (8, "1f1b", {"attn_res_mode": "full"})]
    cases = [case(family, *way, **mode) for family, (*way, mode) in itertools.product(FAMILIES, ways)]
    run_on_processes(4, tmp_path, *cases, replicas, uses, made_without_a_seed)


def replicas(rank, folder):
    """Two pipelines of two processes, each with half of the sequences."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "stages"))
    model, inputs = model_of("llama", tie_word_embeddings=True), batch()
    with Float64():
        whole = copy.deepcopy(model)
        num_items = int(inputs["labels"][:, 1:].ne(-100).sum())
        expected = whole(**inputs, num_items_in_batch=num_items).loss
        expected.backward()
        half = {name: value.chunk(2)[mesh.get_local_rank("replicas")] for name, value in inputs.items()}
        pipeline = Pipeline(model, MICROBATCHES, group=mesh.get_group("stages"))
        loss = pipeline.step(**half, num_items_in_batch=num_items)
        torch.distributed.all_reduce(loss, group=mesh.get_group("replicas"))
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad, group=mesh.get_group("replicas"))
    assert relative_error(loss, expected) < 1e-12
    gradients = {name: parameter.grad for name, parameter in whole.named_parameters()}
    gradients["lm_head.weight"] = gradients["model.embed_tokens.weight"]
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-10, name
    if mesh.get_local_rank("replicas"):
        with pytest.raises(InputError, match="transformers saves in process 0 alone"):
            pipeline.save_pretrained(f"{folder}/nothing")
    norm = pipeline.clip_grad_norm_(model.parameters(), 0.5)
    expected = torch.nn.utils.clip_grad_norm_(whole.parameters(), 0.5)
    assert expected > 1 and relative_error(norm, expected) < 1e-10
    for name, parameter in model.named_parameters():
        assert relative_error(parameter.grad, gradients[name]) < 1e-6, name  # torch adds 1e-6 to the norm


def made_without_a_seed(rank, folder):
    """Models that differ between processes are one model in the end: the one that is saved."""
    torch.manual_seed(rank)
    model = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=4, tie_word_embeddings=True))
    perturb(model, seed=rank)
    pipeline, ids = Pipeline(model, num_microbatches=4), tokens(4, 7)
    loss = pipeline.step(ids, labels=ids)
    if (state := pipeline.state_dict()) is not None:
        whole = AutoModelForCausalLM.from_config(model.config)
        whole.load_state_dict(state, strict=False)  # but for the head, which is tied
        assert whole(ids, labels=ids).loss.item() == pytest.approx(loss.item(), rel=1e-6)


def uses(rank, folder):
    """What the documentation shows: a model that is loaded, trained on batches of several shapes, and saved."""
    whole = tiny_model("llama", num_hidden_layers=4, tie_word_embeddings=True)
    if rank == 0:
        whole.save_pretrained(f"{folder}/before")
    torch.distributed.barrier()
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/before").train()
    pipeline = Pipeline(model, num_microbatches=4)
    pipeline.save_pretrained(f"{folder}/untrained")
    untrained = AutoModelForCausalLM.from_pretrained(f"{folder}/untrained").state_dict()
    assert all(torch.equal(untrained[name], tensor) for name, tensor in whole.state_dict().items())
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (pipeline.model, whole.train()))
    for shape in [(4, 7), (8, 12), (4, 7)]:
        ids = tokens(*shape)
        losses = pipeline.step(ids, labels=ids), whole(ids, labels=ids).loss
        losses[1].backward()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
    pipeline.save_pretrained(f"{folder}/trained")
    trained = AutoModelForCausalLM.from_pretrained(f"{folder}/trained").state_dict()
    assert trained.keys() == whole.state_dict().keys()
    for name, tensor in whole.state_dict().items():
        assert relative_error(trained[name], tensor) < 1e-5, name
    with pytest.raises(InputError, match="can't be divided into 4 microbatches"):
        pipeline.step(tokens(6, 7), labels=tokens(6, 7))
    with pytest.raises(InputError, match=r"position_ids is \[1, 7\], but needs a row for each of 4 sequences"):
        pipeline.step(tokens(4, 7), labels=tokens(4, 7), position_ids=torch.arange(7)[None])


def test_plan():
    """What is sent, counted by hand: 8 layers in 4 stages of 2 processes, a block per stage."""
    config = tiny_config("llama", num_hidden_layers=8, attn_res_block_size=2)
    plan = PipelinePlan(config, 4, 2)
    assert [plan.layers(stage) for stage in range(4)] == [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 8)]
    # the embedding and a block; what process 0 doesn't have, the second block; the third
    assert [plan.num_received(stage) for stage in range(4)] == [0, 2, 1, 1]
    naive = PipelinePlan(config, 4, 2, cached=False)
    assert [naive.num_received(stage) for stage in range(4)] == [0, 2, 3, 4]


@pytest.mark.parametrize("mode", ["block", "full"])
@pytest.mark.parametrize(("num_ranks", "num_virtual"), [*itertools.product([2, 4, 8], [1, 2, 4])])
def test_formulas_of_the_paper(num_ranks, num_virtual, mode):
    """With stages of whole blocks: the paper's count, and for each transition the embedding, without a cache; with one,
    the embedding once per process, and no block that a process has closed itself."""
    num_stages = num_ranks * num_virtual
    config = tiny_config("llama", num_hidden_layers=2 * num_stages, attn_res_block_size=1, attn_res_mode=mode)
    blocks = 2 if mode == "block" else 4  # per stage
    naive = PipelinePlan(config, num_stages, num_ranks, cached=False)
    assert naive.num_sent == paper_blocks_sent(num_ranks, num_virtual, blocks, cached=False) + num_stages - 1
    cached = PipelinePlan(config, num_stages, num_ranks)
    own = (num_virtual - 1) * num_ranks * blocks
    expected = paper_blocks_sent(num_ranks, num_virtual, blocks, cached=True) - own + num_ranks - 1
    assert cached.num_sent == expected <= naive.num_sent


@pytest.mark.parametrize(
    ("num_stages", "num_ranks", "message"),
    [(3, 2, "3 stages can't be divided"), (8, 4, "a model of 5 layers"), (2, 1, "two processes"), (0, 2, "0 stages")],
)
def test_no_such_plan(num_stages, num_ranks, message):
    with pytest.raises(InputError, match=message):
        PipelinePlan(tiny_config("llama"), num_stages, num_ranks)


@pytest.mark.parametrize(
    ("costs", "num_stages", "sizes"),
    [
        ([1, 1, 1, 1], 2, (2, 2)),
        ([1, 1, 1, 1, 1, 4], 3, (2, 3, 1)),  # the head costs as much as three layers
        ([1, 1, 1, 1, 1, 9], 2, (5, 1)),
        ([5, 1, 1, 1, 1, 1], 3, (1, 2, 3)),
        ([1, 2, 3], 3, (1, 1, 1)),
    ],
)
def test_balanced(costs, num_stages, sizes):
    """The most expensive stage is as cheap as of all divisions, found by trying them all."""
    found = balanced(costs, num_stages)
    assert sum(found) == len(costs) and len(found) == num_stages

    def dearest(sizes):
        bounds = [0, *itertools.accumulate(sizes)]
        return max(sum(costs[first:end]) for first, end in itertools.pairwise(bounds))

    ways = [way for way in itertools.product(range(1, len(costs) + 1), repeat=num_stages) if sum(way) == len(costs)]
    assert dearest(found) == min(map(dearest, ways)) == dearest(sizes)


def test_layer_costs():
    """A token meets two of five experts, and the head after the last layer."""
    config = tiny_config("qwen3_moe", num_experts_per_tok=2)
    assert config.num_experts == 5
    model = AutoModelForCausalLM.from_config(config)
    layer = model.model.layers[0]
    experts = sum(parameter.numel() for parameter in layer.mlp.experts.parameters())
    others = sum(parameter.numel() for parameter in layer.parameters()) - experts
    first, *_, last = layer_costs(model)
    assert first == others + experts * 2 / 5 and last == first + model.lm_head.weight.numel()
    with pytest.raises(InputError, match="are no 2 stages of a model of 5 layers"):
        PipelinePlan(config, 2, 2, sizes=(2, 2))


def test_no_such_model():
    """A donor, an adapter, a head without tokens, and a loss over all layers."""
    adapter = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    for model in (tiny_donor(), adapter, tiny_model(auto_class=AutoModel)):
        with pytest.raises(InputError, match="no causal language model of this project"):
            check_pipeline(model, 2, 4)
    with pytest.raises(InputError, match="set output_router_logits to false"):
        check_pipeline(tiny_model("mixtral", output_router_logits=True), 2, 4)
    with pytest.raises(InputError, match="'zero-bubble' is no schedule of a pipeline"):
        check_pipeline(tiny_model(), 2, 4, schedule="zero-bubble")
    reentrant = tiny_model()
    reentrant.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(InputError, match="can't checkpoint with use_reentrant"):
        check_pipeline(reentrant, 2, 4)
    reentrant.gradient_checkpointing_enable({"use_reentrant": False})
    check_pipeline(reentrant, 2, 4)


def test_memory_of_a_stage():
    """What torch says of a stage has the reason behind it."""
    with pytest.raises(InputError, match="there isn't enough memory"), enough_memory():
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        except RuntimeError as error:
            raise RuntimeError("[Stage 0] failed to run forward") from error
