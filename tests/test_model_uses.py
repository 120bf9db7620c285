# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What users do to a model: offload it, cut or replicate layers, look at depth attention in generation, shard it."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from behaviours import assert_close, rounding
from families import attn_res_from_donor, perturb, relative_error, tiny_donor, tiny_model, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from test_distributed import run_on_two_processes, whole
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from transformers.utils import logging

from attnres_kernels.cpu import compiler


IMPLEMENTATIONS = pytest.mark.parametrize(
    "implementation",
    ["eager", "two_phase", pytest.param("cpp", marks=pytest.mark.skipif(compiler() is None, reason="needs g++"))],
)
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@torch.no_grad()
def logits_of(model, input_ids=None) -> torch.Tensor:
    return model(tokens() if input_ids is None else input_ids, use_cache=False).logits


# --- Offload


def in_parts(model, *finer: str) -> list[str]:
    """The names of the modules of which a device map is made; those in `finer` are taken apart."""
    parts = []
    for name, module in (*model.model.named_children(), ("lm_head", model.lm_head)):
        name = name if name == "lm_head" else f"model.{name}"
        parts += [f"{name}.{index}" for index in range(len(module))] if name == "model.layers" else [name]
    for name in finer:
        parts.remove(name)
        parts += [f"{name}.{child}" for child, _ in model.get_submodule(name).named_children()]
    return parts


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uses") / "model"
    tiny_model(num_hidden_layers=3, attn_res_block_size=1).save_pretrained(folder)
    return folder


@torch.no_grad()
def check_offloaded(folder, offload_folder, implementation, **options):
    # with hooks, a norm is not fused with the read before it
    bound = rounding(block_size=1).logits
    options = {"attn_res_implementation": implementation, "offload_folder": offload_folder, **options}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert any(parameter.is_meta for parameter in model.parameters())
    expected = AutoModelForCausalLM.from_pretrained(folder, attn_res_implementation="eager")
    for input_ids in (tokens(2, 7), tokens(2, 40)):
        assert_close(logits_of(model, input_ids), logits_of(expected, input_ids), bound)
    assert torch.equal(model.generate(tokens(1, 7), **GREEDY), expected.generate(tokens(1, 7), **GREEDY))
    watched = model(tokens(), output_depth_attentions=True).depth_attentions
    assert_close(watched[-1], expected(tokens(), output_depth_attentions=True).depth_attentions[-1], bound)


@pytest.mark.parametrize("memory", ["1KB", "60KB"])
@IMPLEMENTATIONS
def test_offload_by_memory(implementation, memory, saved, tmp_path):
    """device_map="auto" with memory for nothing, and for some modules: the rest is read from disk."""
    check_offloaded(saved, tmp_path, implementation, device_map="auto", max_memory={"cpu": memory})


@IMPLEMENTATIONS
def test_offload_of_each_module(implementation, saved, tmp_path):
    """Any module may lie on disk: embedding, each layer, depth attention, final norm, head, each part of a layer."""
    model = tiny_model(num_hidden_layers=3)
    for finer in ((), ("model.layers.1",)):
        parts = in_parts(model, *finer)
        for on_disk in parts:
            if not finer or on_disk.startswith(finer):
                if not any(True for _ in model.get_submodule(on_disk).parameters()):
                    continue
                device_map = {part: "disk" if part == on_disk else "cpu" for part in parts}
                check_offloaded(saved, tmp_path / on_disk, implementation, device_map=device_map)


@IMPLEMENTATIONS
def test_cpu_offload(implementation):
    """So may all of them be taken from memory one by one."""
    model = tiny_model(attn_res_implementation=implementation)
    expected = logits_of(model)
    assert_close(logits_of(cpu_offload(model, execution_device="cpu")), expected, rounding().logits)


def test_offload_in_bfloat16(saved, tmp_path):
    """Depth attention on disk stays float32 in a model of bfloat16."""
    model = tiny_model(num_hidden_layers=3)
    device_map = {part: "disk" if part == "model.depth_attention" else "cpu" for part in in_parts(model)}
    options = {"dtype": torch.bfloat16, "attn_res_implementation": "eager"}
    found = AutoModelForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path, **options)
    expected = AutoModelForCausalLM.from_pretrained(saved, **options)
    assert torch.equal(logits_of(found), logits_of(expected))


# --- Layers


def modes(test):
    return pytest.mark.parametrize("mode, block_size", [("block", 2), ("full", None), ("denseformer", None)])(test)


def with_layers(model, indices, copies: bool = False):
    """The model with these layers alone, in this order."""
    layers = [model.model.layers[index] for index in indices]
    model.model.layers = torch.nn.ModuleList(map(copy.deepcopy, layers) if copies else layers)
    model.config.num_hidden_layers = len(indices)
    return model


@modes
def test_fewer_layers(mode, block_size, tmp_path):
    """Loading the first layers is cutting the others off: they keep their rows, and the output its own."""
    model = tiny_model(attn_res_mode=mode, attn_res_block_size=block_size, attn_res_sum_scale=True)
    model.save_pretrained(tmp_path / "model")
    before = {name: tensor.clone() for name, tensor in model.model.depth_attention.state_dict().items()}
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", num_hidden_layers=3, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"]
    for name, tensor in loaded.model.depth_attention.state_dict().items():
        rows = torch.cat([before[name][:6], before[name][-1:]])
        assert torch.equal(tensor, rows[:, :7] if mode == "denseformer" else rows), name
    cut = with_layers(model, range(3))
    assert torch.equal(logits_of(cut), logits_of(loaded))
    cut.save_pretrained(tmp_path / "cut")
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert torch.equal(logits_of(again), logits_of(cut))
    assert torch.equal(again.generate(tokens(), **GREEDY), loaded.generate(tokens(), **GREEDY))
    cut.set_attn_res_implementation("eager")
    assert_close(logits_of(again), logits_of(cut), rounding(mode="full" if mode == "full" else "block").logits)


@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "gpt_oss", "deepseek_v3", "kimi_linear"])
def test_fewer_layers_of_a_family(family, tmp_path):
    """With zero queries, fewer layers are the donor's fewer layers."""
    donor = tiny_donor(family)
    attn_res_from_donor(donor, block_size=2).save_pretrained(tmp_path / "model")
    donor.save_pretrained(tmp_path / "donor")
    options = {"num_hidden_layers": 3}
    if hasattr(donor.config, "layer_types"):
        options["layer_types"] = donor.config.layer_types[:3]
    found, expected = (AutoModelForCausalLM.from_pretrained(tmp_path / name, **options) for name in ("model", "donor"))
    assert relative_error(logits_of(found), logits_of(expected)) <= 3e-6


def test_fewer_layers_on_disk(tmp_path):
    """Rows are chosen also where depth attention is offloaded."""
    tiny_model().save_pretrained(tmp_path / "model")
    options = {"num_hidden_layers": 2, "attn_res_implementation": "eager"}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    device_map = {part: "disk" if part == "model.depth_attention" else "cpu" for part in in_parts(expected)}
    found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", **options
    )
    assert torch.equal(logits_of(found), logits_of(expected))


def test_more_layers(tmp_path, caplog):
    """Layers that the checkpoint doesn't have have no rows either: an error says so, also if sizes may differ."""
    tiny_model().save_pretrained(tmp_path)
    logging.enable_propagation()
    try:
        for options in ({}, {"ignore_mismatched_sizes": True}):
            caplog.clear()
            with pytest.raises(RuntimeError, match="report"):
                AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=7, **options)
            assert "depth_attention.query has 11 rows, those of 5 layers, and num_hidden_layers is 7" in caplog.text
    finally:
        logging.disable_propagation()


@modes
def test_layers_from_the_middle(mode, block_size, tmp_path):
    """Layers keep their rows when others are taken from between them, in memory and on disk."""
    kept = [0, 3, 4]
    whole_model = tiny_model(attn_res_mode=mode, attn_res_block_size=block_size)
    before = {name: tensor.clone() for name, tensor in whole_model.model.depth_attention.state_dict().items()}
    model = with_layers(whole_model, kept)
    rows = [row for index in kept for row in (2 * index, 2 * index + 1)] + [10]
    for name, tensor in model.model.depth_attention.state_dict().items():
        columns = [0, *(row + 1 for row in rows[:-1])]
        assert torch.equal(tensor, before[name][rows][:, columns] if mode == "denseformer" else before[name][rows])
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), expected)
    outputs = model.train()(tokens(), labels=tokens())
    outputs.loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_cut_models_reload_their_own_state():
    """A state dict of a model that was cut fits it; the parameters stay trainable or frozen, and as large as needed."""
    model = tiny_model()
    model.model.depth_attention.key_norm.requires_grad_(False)
    model = with_layers(model, range(2))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    query, key_norm = (model.model.depth_attention.get_parameter(name) for name in ("query", "key_norm"))
    assert query.shape == key_norm.shape == (5, 40)
    assert query.requires_grad and not key_norm.requires_grad


def test_layers_that_have_no_place(tmp_path):
    """Lists that are changed in place, layers twice in a list and foreign ones are refused, not misread."""
    model = tiny_model()
    del model.model.layers[1]
    for use in (lambda: model(tokens()), lambda: model.save_pretrained(tmp_path)):
        with pytest.raises(ValueError, match="changed in place"):
            use()
    model.model.layers = torch.nn.ModuleList(model.model.layers)
    assert logits_of(model).shape[1] == 7

    model = tiny_model()
    model.model.layers.append(copy.deepcopy(model.model.layers[0]))
    with pytest.raises(ValueError, match="changed in place"):
        model(tokens())

    model = tiny_model()
    first = model.model.layers[0]
    with pytest.raises(ValueError, match="deepcopy"):
        model.model.layers = torch.nn.ModuleList([first, first])
    with pytest.raises(ValueError, match="no rows"):
        model.model.layers = tiny_donor().model.layers
    assert len(model.model.layers) == 5 and logits_of(model).shape[1] == 7
    with torch.no_grad():
        expected = logits_of(with_layers(tiny_model(), range(3)))
    del model.model.layers[3:]  # the last ones leave no gap
    assert_close(logits_of(model), expected)


def test_replicated_layers():
    """Copies of layers get copies of their rows; with zero queries, the model is the donor with the same copies."""
    donor = tiny_donor()
    model = attn_res_from_donor(donor, "block", 2)
    order = [0, 1, 2, 1, 2, 3, 4]
    perturb(model.model.depth_attention)  # rows that differ
    rows = model.model.depth_attention.query.detach().clone()
    with_layers(model, order, copies=True)
    expected = [row for index in order for row in (2 * index, 2 * index + 1)] + [10]
    assert torch.equal(model.model.depth_attention.query.detach(), rows[expected])
    torch.nn.init.zeros_(model.model.depth_attention.query)
    assert relative_error(logits_of(model), logits_of(with_layers(donor, order, copies=True))) <= 3e-6


@pytest.mark.parametrize("trained", [None, ["depth_attention"]], ids=["adapters", "depth attention too"])
def test_layer_replication_of_peft(trained, tmp_path):
    """PEFT replicates layers, trains rows of their own, saves and loads them again."""
    tiny_model().save_pretrained(tmp_path / "base")
    adapter = LoraConfig(
        r=4,
        target_modules="all-linear",
        layer_replication=[[0, 3], [2, 5]],
        modules_to_save=trained,
        task_type="CAUSAL_LM",
        init_lora_weights=False,
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), adapter)
    depth_attention = model.get_base_model().model.depth_attention
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    optimizer.step()
    query = (depth_attention.modules_to_save.default if trained else depth_attention).query
    assert query.shape == (13, 40)
    assert bool(trained) != torch.equal(query[4:6], query[6:8])  # both of layer 2
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(logits_of(loaded.eval()), logits_of(model))


# --- Generation


@pytest.mark.parametrize(
    "options, sequences",
    [({"do_sample": False}, 3), ({"do_sample": True}, 3), ({"num_beams": 2}, 6), ({"num_return_sequences": 2}, 6)],
    ids=["greedy", "sampling", "beams", "two samples"],
)
def test_depth_attentions_of_generation(options, sequences):
    """Each generated token has the weights of the reads that it was computed with."""
    model = tiny_model(attn_res_block_size=2)
    options = {**GREEDY, "do_sample": "num_return_sequences" in options, **options, "return_dict_in_generate": True}
    torch.manual_seed(0)
    plain = model.generate(tokens(), **options)
    torch.manual_seed(0)
    outputs = model.generate(tokens(), output_depth_attentions=True, **options)
    assert torch.equal(outputs.sequences, plain.sequences) and not hasattr(plain, "depth_attentions")
    expected_class = GenerateBeamDecoderOnlyOutput if "num_beams" in options else GenerateDecoderOnlyOutput
    assert isinstance(outputs, expected_class) and type(outputs).__name__.startswith("AttnRes")
    assert len(outputs.depth_attentions) == 4
    for step, reads in enumerate(outputs.depth_attentions):
        assert len(reads) == model.config.num_depth_reads
        for row, weights in enumerate(reads):
            assert weights.shape == (sequences, model.config.num_depth_sources(row), 1 if step else 7)
    if "num_beams" not in options:
        with torch.no_grad():
            whole_text = model(outputs.sequences, output_depth_attentions=True).depth_attentions
        for row, weights in enumerate(whole_text):
            found = torch.cat([reads[row] for reads in outputs.depth_attentions], dim=-1)
            assert_close(found, weights[..., :-1], 1e-4)


def test_depth_attentions_of_other_generation():
    """A field of the configuration asks for them too; without a dictionary there is no place for them; assisted
    generation says that it has none."""
    model = tiny_model()
    assert isinstance(model.generate(tokens(), output_depth_attentions=True, **GREEDY), torch.Tensor)
    model.config.output_depth_attentions = True
    outputs = model.generate(tokens(), return_dict_in_generate=True, **GREEDY)
    assert len(outputs.depth_attentions) == 4
    no = {"output_depth_attentions": False}
    assert "depth_attentions" not in model.generate(tokens(), return_dict_in_generate=True, **no, **GREEDY)
    with pytest.raises(ValueError, match="Assisted generation"):
        model.generate(tokens(1), prompt_lookup_num_tokens=2, return_dict_in_generate=True, **GREEDY)
    assert model.generate(tokens(1), prompt_lookup_num_tokens=2, **no, **GREEDY).shape == (1, 11)


# --- Sharding


def sharded_in_bfloat16(rank, folder):
    """Depth attention, float32, has a group of its own, as a group has one dtype."""
    model = tiny_model().to(torch.bfloat16).train()
    expected = copy.deepcopy(model)
    for index in range(2):
        (expected(tokens(seed=index), labels=tokens(seed=index)).loss / 2).backward()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model.model.depth_attention)
    fully_shard(model)
    model(tokens(seed=rank), labels=tokens(seed=rank)).loss.backward()
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        gradient = whole(parameter.grad)
        assert gradient.dtype == other.dtype == (torch.float32 if "depth_attention" in name else torch.bfloat16)
        # sums of gradients that are rounded to 8 bits, which queries far from zero amplify
        assert (gradient - other.grad).float().norm() <= 0.2 * other.grad.float().norm(), name


def sharded_without_a_group(rank, folder):
    model = tiny_model().to(torch.bfloat16)
    fully_shard(model)
    with pytest.raises(AssertionError, match="uniform original parameter dtype"):
        model(tokens())


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_fully_shard_in_bfloat16(tmp_path):
    """A model of bfloat16 is sharded with one line for depth attention; without it, torch says what is wrong."""
    run_on_two_processes(tmp_path, sharded_in_bfloat16, sharded_without_a_group)
