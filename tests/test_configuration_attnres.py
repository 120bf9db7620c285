# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The configuration: its checks, its defaults, the arithmetic of the blocks, and its way to disk and back."""

import copy
import json

import pytest
import transformers
from families import tiny_config
from huggingface_hub.errors import StrictDataclassClassValidationError, StrictDataclassFieldValidationError
from transformers import AutoConfig, LlamaConfig

from attnres import AttnResConfig


def sources(**kwargs) -> list[int]:
    config = AttnResConfig(**kwargs)
    return [config.num_depth_sources(row) for row in range(config.num_depth_reads)]


@pytest.mark.parametrize(
    "mode, layers, block_size, expected",
    [
        # the embedding; then the blocks before; then also the open block, except where a block begins
        ("block", 1, 1, [1, 2, 2]),
        ("block", 3, 1, [1, 2, 2, 3, 3, 4, 4]),
        ("block", 4, 2, [1, 2, 2, 2, 2, 3, 3, 3, 3]),
        ("block", 5, 2, [1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4]),
        ("block", 3, 3, [1, 2, 2, 2, 2, 2, 2]),
        ("full", 3, 1, [1, 2, 3, 4, 5, 6, 7]),
        ("full", 3, 2, [1, 2, 3, 4, 5, 6, 7]),
    ],
)
def test_sources_of_every_read(mode, layers, block_size, expected):
    """How many sources each read has, row by row."""
    assert sources(num_hidden_layers=layers, attn_res_mode=mode, attn_res_block_size=block_size) == expected


@pytest.mark.parametrize(
    "layers, block_size, expected",
    [
        pytest.param(27, 3, 10, id="Kimi Linear 48B-A3B"),
        pytest.param(93, 12, 9, id="Kimi K3"),
        pytest.param(16, 2, 9, id="the paper's ablation model"),
    ],
)
def test_sources_of_published_models(layers, block_size, expected):
    """The sources of the output read, as published."""
    assert sources(num_hidden_layers=layers, attn_res_block_size=block_size)[-1] == expected


@pytest.mark.parametrize("layers, expected", [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (27, 4), (93, 12)])
def test_default_block_size(layers, expected):
    """A model has about eight blocks, never more."""
    config = AttnResConfig(num_hidden_layers=layers)
    assert config.attn_res_block_size == expected
    assert config.num_depth_sources(2 * layers) <= 9


def test_defaults():
    """Block mode, the paper's unscaled mean, the donor's epsilon."""
    config = AttnResConfig(rms_norm_eps=1e-5)
    assert config.attn_res_mode == "block"
    assert config.attn_res_sum_scale is False
    assert config.output_depth_attentions is False
    assert config.attn_res_norm_eps == 1e-5
    assert config.model_type == "attnres"
    assert isinstance(config, LlamaConfig)
    assert AttnResConfig(attn_res_norm_eps=1e-3).attn_res_norm_eps == 1e-3


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"attn_res_mode": "blocks"}, "attn_res_mode is 'blocks'; it must be one of block, full"),
        ({"attn_res_mode": "Full"}, "it must be one of block, full"),
        ({"attn_res_block_size": 0}, "is 0; .* from 1 to num_hidden_layers = 4"),
        ({"attn_res_block_size": -1}, "is -1; .* from 1 to num_hidden_layers = 4"),
        ({"attn_res_block_size": 5}, "is 5; .* from 1 to num_hidden_layers = 4"),
        ({"attn_res_mode": "full", "attn_res_block_size": 0}, "from 1 to num_hidden_layers = 4"),
        ({"attn_res_norm_eps": 0.0}, "attn_res_norm_eps is 0.0; it must be between 0 and 1"),
        ({"attn_res_norm_eps": -1e-6}, "it must be between 0 and 1"),
        ({"attn_res_norm_eps": float("nan")}, "it must be between 0 and 1"),
        ({"attn_res_norm_eps": float("inf")}, "it must be between 0 and 1"),
    ],
)
def test_values_are_checked(kwargs, message):
    """A value outside its range raises when the configuration is built, and the message names the range."""
    with pytest.raises(ValueError, match=message):
        AttnResConfig(num_hidden_layers=4, **kwargs)


def test_full_mode_uses_no_block_size():
    """So it doesn't keep anybody from a model with fewer layers."""
    assert AttnResConfig(num_hidden_layers=4, attn_res_mode="full", attn_res_block_size=5).num_depth_reads == 9


@pytest.mark.parametrize(
    "field, value",
    [
        ("attn_res_mode", 2),
        ("attn_res_mode", None),
        ("attn_res_block_size", "2"),
        ("attn_res_block_size", 2.0),
        ("attn_res_block_size", True),
        ("attn_res_sum_scale", 1),
        ("attn_res_sum_scale", "yes"),
        ("attn_res_norm_eps", "1e-6"),
        ("output_depth_attentions", 1),
    ],
)
def test_types_are_checked(field, value):
    """A value of another type raises, and the message names the field."""
    with pytest.raises(StrictDataclassFieldValidationError, match=field):
        AttnResConfig(num_hidden_layers=4, **{field: value})


@pytest.mark.parametrize("override", [{"attn_res_block_size": 9}, {"attn_res_mode": "sum"}, {"num_hidden_layers": 2}])
def test_overrides_at_loading_are_checked(override, tmp_path):
    """An override in from_pretrained that makes the configuration wrong raises as the constructor does."""
    AttnResConfig(num_hidden_layers=4, attn_res_block_size=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="attn_res_"):
        AttnResConfig.from_pretrained(tmp_path, **override)


def test_round_trip(tmp_path):
    """Every field survives a save; what is saved is only what a configuration needs."""
    config = tiny_config(
        attn_res_mode="full",
        attn_res_block_size=3,
        attn_res_sum_scale=True,
        attn_res_norm_eps=1e-4,
        output_depth_attentions=True,
    )
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is AttnResConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    for field in ("attn_res_mode", "attn_res_block_size", "attn_res_sum_scale", "attn_res_norm_eps"):
        assert saved[field] == getattr(config, field)
    assert saved["model_type"] == "attnres"
    assert AutoConfig.from_pretrained(tmp_path, attn_res_block_size=1).attn_res_block_size == 1


def test_printed_configuration_is_complete():
    """Printing a configuration shows the donor's fields and ours, as that of any model of transformers."""
    printed = str(tiny_config())
    assert '"hidden_size": 40' in printed and '"attn_res_mode": "block"' in printed
    assert "implementation" not in printed


def test_implementation_is_neither_saved_nor_lost(tmp_path):
    """attn_res_implementation survives copies, not the disk, and can be given again on loading."""
    config = tiny_config(attn_res_implementation="eager")
    assert config._attn_res_implementation == "eager"
    assert copy.deepcopy(config)._attn_res_implementation == "eager"
    config.save_pretrained(tmp_path)
    assert "implementation" not in (tmp_path / "config.json").read_text()
    assert "implementation" not in config.to_json_string()
    assert AutoConfig.from_pretrained(tmp_path)._attn_res_implementation is None
    for loader in (AutoConfig, AttnResConfig):
        loaded = loader.from_pretrained(tmp_path, attn_res_implementation="eager")
        assert loaded._attn_res_implementation == "eager"
    _, unused = AttnResConfig.from_pretrained(tmp_path, attn_res_implementation="eager", return_unused_kwargs=True)
    assert "attn_res_implementation" not in unused


def test_invalid_configuration_is_not_saved(tmp_path):
    """A field that was broken after construction is found when the configuration is saved."""
    config = tiny_config()
    config.attn_res_block_size = 9
    with pytest.raises(StrictDataclassClassValidationError, match="from 1 to num_hidden_layers = 5"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_hub_classes_are_registered():
    """Every class that a saved folder names is what `import attnres` gives to the Auto class of that name."""
    references = AttnResConfig.hub_classes()
    assert references.pop("AutoConfig") == "configuration_attnres.AttnResConfig"
    assert set(references) == {
        "AutoModel",
        "AutoModelForCausalLM",
        "AutoModelForSequenceClassification",
        "AutoModelForTokenClassification",
        "AutoModelForQuestionAnswering",
    }
    for auto_class, reference in references.items():
        model = getattr(transformers, auto_class).from_config(tiny_config())
        assert f"{type(model).__module__}.{type(model).__name__}" == reference


def test_plans():
    """Tensors are split as in the donor; there is no pipeline plan, as a stage would have to hand on all sources."""
    assert AttnResConfig().base_model_tp_plan == LlamaConfig().base_model_tp_plan
    assert AttnResConfig().base_model_pp_plan is None
