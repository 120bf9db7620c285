# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The model tests of transformers on each donor and on its AttnRes family, one test class each.

Run by `benchmarks/conformance.py`, which puts the tests of the installed transformers on the path as the package
`transformers_tests`. The name of this file keeps it out of a plain `pytest`.
"""

import inspect
import sys
import unittest
from pathlib import Path
from unittest.mock import patch

from transformers import set_seed
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.models.auto import modeling_auto
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin, global_rng, ids_tensor
from transformers_tests.test_training_mixin import TrainingTesterMixin

import attnres
from configuration_attnres import donor_class


sys.path.insert(0, str(Path(__file__).parents[1]))
from families import COMMON, FAMILIES, config_class  # noqa: E402


# The sizes that transformers tests its own decoders at
SIZES = {**COMMON, "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES["initializer_range"] = 0.02
CHANGES = {
    # both kinds of layer, which the rows of FAMILIES get by a pattern over more layers
    "qwen2": {"layer_types": ["full_attention", "sliding_attention"]},
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    # scaled logits learn more slowly than the training test allows
    "granite": {"logits_scaling": 1.0},
}


class ModelTester:
    """What the mixins ask for: sizes, a tiny configuration and inputs."""

    batch_size = 13
    seq_length = 7
    is_training = True

    def __init__(self, configuration_class: type, fields: dict, causal_lm_class: type):
        self.configuration_class = configuration_class
        self.fields = fields
        self.causal_lm_class = causal_lm_class
        self.hidden_size = fields["hidden_size"]
        self.num_hidden_layers = fields["num_hidden_layers"]
        self.num_attention_heads = fields["num_attention_heads"]

    def get_config(self):
        return self.configuration_class(**self.fields)

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        input_ids = ids_tensor((self.batch_size, self.seq_length), config.vocab_size)
        return config, {"input_ids": input_ids, "attention_mask": input_ids.new_ones(input_ids.shape).tril()}


class ModelSuite(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    model_tester = None

    def setUp(self):
        set_seed(0)
        global_rng.seed(0)  # of the inputs
        self.model_tester = ModelTester(self.configuration_class, self.fields, self.causal_lm_class)

    def test_attention_outputs(self):
        # layers with linear attention have no weights to return
        self.model_tester.num_hidden_layers -= self.fields.get("layer_types", []).count("linear_attention")
        super().test_attention_outputs()

    def test_reverse_loading_mapping(self):
        # the mapping of AttnRes itself changes no names
        donor = getattr(self.configuration_class, "donor_config_class", lambda: self.configuration_class)()
        super().test_reverse_loading_mapping(bool(get_checkpoint_conversion_mapping(donor.model_type)))

    def test_moe_models_record_router_logits(self):
        # the mixin searches the source file of a class for experts, which for AttnRes are in the donor's
        source_module = inspect.getmodule(donor_class(self.all_model_classes[0]))
        with patch("inspect.getmodule", return_value=source_module):
            super().test_moe_models_record_router_logits()


def attn_res_classes(family: str) -> dict[str, type]:
    """The model classes of a family by the name of their Auto class."""
    return {
        auto_class: getattr(attnres, reference.split(".")[1])
        for auto_class, reference in config_class(family).hub_classes().items()
        if auto_class != "AutoConfig"
    }


def make_suite(name: str, family: str, configuration_class: type, model_classes: dict[str, type]) -> type:
    fields = {**SIZES, **FAMILIES[family], **CHANGES.get(family, {})}
    attributes = {
        "__module__": __name__,
        "configuration_class": configuration_class,
        "fields": fields,
        "all_model_classes": tuple(model_classes.values()),
        "causal_lm_class": model_classes["AutoModelForCausalLM"],
    }
    return type(name, (ModelSuite, unittest.TestCase), attributes)


NAMES_BY_AUTO_CLASS = {
    "AutoModel": modeling_auto.MODEL_MAPPING_NAMES,
    "AutoModelForCausalLM": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "AutoModelForSequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForTokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "AutoModelForQuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}

for _family in FAMILIES:
    _classes = attn_res_classes(_family)
    _donors = {auto_class: donor_class(model_class) for auto_class, model_class in _classes.items()}
    for _auto_class, _model_class in _classes.items():
        # the mixins pass over a class whose name is in none of these tables
        NAMES_BY_AUTO_CLASS[_auto_class][config_class(_family).model_type] = _model_class.__name__
    for _name, _configuration_class, _model_classes in (
        (f"donor_{_family}", config_class(_family).donor_config_class(), _donors),
        (f"attnres_{_family}", config_class(_family), _classes),
    ):
        globals()[_name] = make_suite(_name, _family, _configuration_class, _model_classes)
