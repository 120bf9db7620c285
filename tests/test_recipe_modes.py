# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Recipes take all modes: pretraining from scratch, adapters, what is written beside a model."""

import json

import datasets
import peft
import pytest
import torch
from attnres_convert import InputError
from attnres_recipes import FinetuneOptions, PretrainOptions, finetune, new_optimizer, pretrain
from attnres_recipes.adapters import check_base, describe_base
from attnres_recipes.checkpoints import model_facts
from attnres_recipes.configs import read_config, with_mode
from attnres_recipes.start import scaled_model
from families import tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from attnres import AttnResConfig
from depth_mixers_attnres import DEPTH_MIXERS


SIZES = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
FIELDS = {"attn_res_num_heads": 2, "attn_res_rank": 4, "attn_res_window": 2, "attn_res_num_streams": 3}
RUN = {"seq_len": 64, "batch_size": 2, "steps": 2, "depth_every": 1, "eval_sequences": 2, "held_out": 0.3}
# by mode, the depth parameters of 5 reads
MODES = {
    "full_window": 5 * 32,
    "block_low_rank": 5 * 4 + 4 * 16,
    "block_input_query": 5 * 16 * 16,
    "full_static": 5 * 5,
    "hc": 5 * (5 * 16 + 3 * 5 + 2),
    "block_mhc": 5 * (32 + 15 * 3 * 16 + 15 + 3),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder, in which a run of each mode has a folder of its name."""
    folder = tmp_path_factory.mktemp("modes")
    (folder / "text.txt").write_text("\n\n".join(f"one dog and {n} birds sat on a mat" for n in range(60)))
    chat = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "No."}]}
    (folder / "chats.jsonl").write_text("".join(json.dumps(chat).replace("?", f"{n}?") + "\n" for n in range(20)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(folder)
        options = {**RUN, "data": "text.txt", "config": "llama", "set": {**SIZES, **FIELDS}, "block_size": 1}
        tokens = {"train_tokenizer": 300}
        for mode in MODES:
            optimizer = "muon" if mode == "block_input_query" else "adamw"
            pretrain(PretrainOptions(**options, **tokens, mode=mode, optimizer=optimizer, output=mode))
            tokens = {"tokenizer": "full_window/tokenizer"}
            options["set"]["vocab_size"] = 300
        yield folder


@pytest.mark.parametrize("mode", DEPTH_MIXERS)
def test_rate_of_depth_attention(mode):
    """Each mode bears the default rate: steps of depth attention alone lower the loss, and the logits change by less
    than they are."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 6, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}
    model = scaled_model(AttnResConfig(**sizes, **FIELDS, vocab_size=128, attn_res_mode=mode, attn_res_block_size=2))
    optimizer = new_optimizer(model, learning_rate=2e-3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("depth_attention" in name)
    ids = torch.randint(128, (4, 32))
    outputs = [model(input_ids=ids, labels=ids)]
    for _ in range(5):
        optimizer.zero_grad()
        outputs[-1].loss.backward()
        optimizer.step()
        outputs.append(model(input_ids=ids, labels=ids))
    losses = [output.loss.item() for output in outputs]
    assert losses == sorted(losses, reverse=True)
    before, after = outputs[0].logits, outputs[-1].logits
    assert (after - before).norm() < before.norm()


@pytest.mark.parametrize("mode", MODES)
def test_pretraining(mode, runs):
    """The model has the mode and its fields, its parameters were trained, and log and figure are those of the mode."""
    folder = runs / mode
    results = json.loads((folder / "results.json").read_text())
    assert results["mode"] == mode and results["depth_parameters"] == MODES[mode]
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = model.config
    assert (config.attn_res_mode, config.attn_res_window, config.attn_res_num_streams) == (mode, 2, 3)
    assert config.depth_sources.sums_blocks == mode.startswith("block") and config.attn_res_block_size == 1
    torch.manual_seed(0)
    fresh = AutoModelForCausalLM.from_config(config).model.depth_attention.state_dict()
    trained = model.model.depth_attention.state_dict()
    assert all(not torch.equal(tensor, fresh[name]) for name, tensor in trained.items())
    looks = [json.loads(line) for line in (folder / "depth.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 1, 2]
    assert all(len(look["largest_weight"]) == 5 for look in looks)
    assert ("entropy" in looks[0]) == (mode != "hc")
    figure = json.loads((folder / "model" / "depth_attention.json").read_text())
    assert figure["mode"] == mode and len(figure["weights"]) == 5
    assert (folder / "model" / "depth_attention.png").exists() and (folder / "model" / "README.md").exists()


@pytest.mark.parametrize("mode", ["block_mhc", "block_low_rank"])
def test_adapters(mode, runs, monkeypatch):
    """Depth attention is trained beside an adapter, saved with it, loaded again and merged."""
    monkeypatch.chdir(runs)
    options = {**RUN, "depth_lr_scale": 1.0, "data": "chats.jsonl", "merge": True}
    results = finetune(FinetuneOptions(**options, model=f"{mode}/model", output=f"{mode}-lora"))
    assert results["merged_relative_error"] < 1e-5
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(f"{mode}-lora/model")
    merged = AutoModelForCausalLM.from_pretrained(f"{mode}-lora/merged")
    before = AutoModelForCausalLM.from_pretrained(f"{mode}/model").model.depth_attention.state_dict()
    trained = adapted.get_base_model().model.depth_attention.modules_to_save["default"].state_dict()
    for name, tensor in merged.model.depth_attention.state_dict().items():
        assert torch.equal(tensor, trained[name]) and not torch.equal(tensor, before[name]), name


def test_matrices_of_depth_attention_are_not_muons():
    """They have the learning rate of depth attention, without decay."""
    model = tiny_model(attn_res_mode="block_mhc")
    optimizer = new_optimizer(model, "muon", learning_rate=0.01, depth_lr_scale=3.0)
    (depth,) = [group for group in optimizer.param_groups if group["lr"] == pytest.approx(0.03)]
    expected = {id(parameter) for parameter in model.model.depth_attention.parameters()}
    assert {id(parameter) for parameter in depth["params"]} == expected and depth["weight_decay"] == 0


def test_fields_of_a_mode():
    """Fields are set on a donor's model type too; wrong ones are refused; a donor has none."""
    config = read_config("llama", {**SIZES, "attn_res_rank": 4}, may_be_type=True)
    assert with_mode(config, "full_low_rank", None).attn_res_rank == 4
    assert with_mode(config, "block_delta", 2).attn_res_block_size == 2
    assert with_mode(config, "full_delta", 2).attn_res_block_size == 1
    donor = with_mode(config, "donor", None)
    assert donor.model_type == "llama" and not hasattr(donor, "attn_res_rank")
    with pytest.raises(InputError, match="attn_res_ranks"):
        read_config("llama", {"attn_res_ranks": 4}, may_be_type=True)
    with pytest.raises(InputError, match="attn_res_window is 0; it must be at least 1"):
        read_config("llama", {"attn_res_window": 0}, may_be_type=True)
    with pytest.raises(ValueError, match="must divide hidden_size = 16"):
        with_mode(read_config("llama", {**SIZES, "attn_res_num_heads": 3}, may_be_type=True), "full_heads", None)


def test_what_tells_models_apart():
    """The same weights with another window are another model, for adapters and for checkpoints of a run."""
    model = tiny_model(attn_res_mode="full_window", attn_res_window=2)
    before, facts = describe_base(model), model_facts(model.config)
    model.config.attn_res_window = 3
    with pytest.raises(InputError, match="attn_res_window = 2; the model has 3"):
        check_base(model, before, "made for another")
    assert facts != model_facts(model.config)
    assert model_facts(tiny_config(attn_res_num_streams=2)) != model_facts(tiny_config())
