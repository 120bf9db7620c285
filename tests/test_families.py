# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Every family: what all of them must do, and what of a donor beyond its arithmetic must survive.

The Llama family runs the same behaviours in `test_modeling_attnres.py`.
"""

import json
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from attnres_convert import convert_checkpoint
from behaviours import TWO_MODES, FamilyBehaviours, assert_close, loss_and_gradients, rounding
from families import (
    FAMILIES,
    attn_res_from_donor,
    relative_error,
    tiny_config,
    tiny_donor,
    tiny_donor_config,
    tiny_model,
    tokens,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    StaticCache,
)
from transformers.quantizers.base import get_keys_to_not_convert

import attnres
from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel, AttnResQwen2Config


AVAILABLE = [family for family in FAMILIES if family in CONFIG_MAPPING]
# Families whose routed experts or recurrences amplify rounding
LOOSE = ["deepseek_v3", "gpt_oss", "kimi_linear"]
CONVERSION_ERROR = {family: 2e-5 if family in LOOSE else 3e-6 for family in AVAILABLE}
MIXTURES = [
    family for family in ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3", "kimi_linear") if family in AVAILABLE
]
# Their causal LM has an auxiliary loss
WITH_AUXILIARY_LOSS = ["qwen3_moe", "mixtral", "gpt_oss"]

every_family = pytest.mark.parametrize("family", AVAILABLE)
needs_kimi_linear = pytest.mark.skipif("kimi_linear" not in AVAILABLE, reason="this transformers has no kimi_linear")


class DonorBehaviours(FamilyBehaviours):
    """The behaviours of all families, where they depend on what the donor can do."""

    @TWO_MODES
    @torch.no_grad()
    def test_cached_decoding_equals_uncached(self, family, mode, block_size):
        """Token by token, in chunks and, where the donor has one, with a static cache; longer than a sliding window."""
        model = tiny_model(family, attn_res_mode=mode, attn_res_block_size=block_size)
        input_ids = tokens(2, 9)
        expected = model(input_ids, use_cache=False).logits
        caches = [lambda: None]
        if model._can_compile_fullgraph:
            caches.append(lambda: StaticCache(config=model.config, max_cache_len=16))
        for new_cache in caches:
            for chunks in ([1] * 9, [6, 1, 1, 1], [5, 4]):
                cache, logits = new_cache(), []
                for chunk in input_ids.split(chunks, dim=1):
                    outputs = model(chunk, past_key_values=cache, use_cache=True)
                    cache = outputs.past_key_values
                    logits.append(outputs.logits)
                assert_close(torch.cat(logits, dim=1), expected, rounding(family, mode, block_size).logits)
                assert cache.get_seq_length() == 9

    @pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
    def test_tied_embeddings_and_resize(self, family, tie, tmp_path):
        if tie and not tiny_donor(family)._tied_weights_keys:
            pytest.skip("the donor can't tie its embeddings")
        super().test_tied_embeddings_and_resize(family, tie, tmp_path)

    @torch.no_grad()
    def test_attention_implementations_agree(self, family):
        """Eager attention returns the donor's weights; where the donor can switch to sdpa, so can the model."""
        donor = tiny_donor(family, attn_implementation="eager")
        model = attn_res_from_donor(donor)
        expected = donor(tokens(), output_attentions=True)
        outputs = model(tokens(), output_attentions=True)
        assert len(outputs.attentions) == len(expected.attentions) > 0
        for weights, expected_weights in zip(outputs.attentions, expected.attentions):
            assert relative_error(weights, expected_weights) <= self.conversion_error
        assert model._supports_sdpa == donor._supports_sdpa
        if donor._supports_sdpa:
            for either in (donor, model):
                either.set_attn_implementation("sdpa")
                assert either.config._attn_implementation == "sdpa"
            assert relative_error(model(tokens()).logits, donor(tokens()).logits) <= self.conversion_error


@pytest.mark.parametrize("family", [family for family in AVAILABLE if family not in (*LOOSE, "llama")])
class TestFamilies(DonorBehaviours):
    pass


@pytest.mark.parametrize("family", [family for family in AVAILABLE if family in LOOSE])
class TestLooseFamilies(DonorBehaviours):
    conversion_error = 2e-5


# --- What a donor is, before and after


@every_family
def test_every_tensor_is_off_its_initial_value(family):
    """So that no test passes because a norm, a bias or a router's correction is neutral."""
    fresh = AutoModelForCausalLM.from_config(tiny_donor_config(family)).state_dict()
    for name, tensor in tiny_donor(family).state_dict().items():
        if tensor.is_floating_point():
            assert (tensor != fresh[name]).float().mean() > 0.9, name


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for shard in folder.glob("*.safetensors") for name, tensor in load_file(shard).items()}


@every_family
@torch.no_grad()
def test_checkpoints_keep_the_donors_names_and_bytes(family, tmp_path):
    """A converted checkpoint, also when it is loaded and saved again, is the donor's and two tensors more.

    The negative control: with the rows of one tensor of the donor in reverse order the logits are others.
    """
    donor = tiny_donor(family)
    donor.save_pretrained(tmp_path / "donor")
    convert_checkpoint(tmp_path / "donor", tmp_path / "converted", block_size=3, verify=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    model.save_pretrained(tmp_path / "again")
    expected = stored_tensors(tmp_path / "donor")
    for folder in ("converted", "again"):
        tensors = stored_tensors(tmp_path / folder)
        assert set(tensors) - set(expected) == {"model.depth_attention.query", "model.depth_attention.key_norm"}
        for name, tensor in expected.items():
            assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name
    expected_logits = donor(tokens()).logits
    assert relative_error(model(tokens()).logits, expected_logits) <= CONVERSION_ERROR[family]

    reversed_name = next(name for name, tensor in expected.items() if "layers.1." in name and tensor.ndim > 1)
    (shard,) = (tmp_path / "donor").glob("*.safetensors")
    save_file({**expected, reversed_name: expected[reversed_name].flip(0)}, shard, metadata={"format": "pt"})
    convert_checkpoint(tmp_path / "donor", tmp_path / "reversed", block_size=3, verify=False)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "reversed")
    assert relative_error(other(tokens()).logits, expected_logits) > 10 * CONVERSION_ERROR[family]


@every_family
def test_plans_are_the_donors(family):
    """Tensor and expert parallel plans, of configuration and models; a pipeline stage could not hand on sources."""
    donor, model = tiny_donor(family), tiny_model(family)
    for name in ("base_model_tp_plan", "base_model_ep_plan"):
        assert getattr(model.config, name) == getattr(donor.config, name)
    for name in ("tp_plan", "ep_plan", "_tp_plan", "_ep_plan"):  # not all in every version of transformers
        assert getattr(model, name, None) == getattr(donor, name, None)
    assert model._tp_plan
    assert not model.config.base_model_pp_plan and not model._pp_plan


@every_family
def test_precision_and_quantisation_exclusions_are_the_donors(family, tmp_path):
    """In a bfloat16 model the same tensors stay float32, and a quantiser passes over the same modules."""
    tiny_donor(family).save_pretrained(tmp_path / "donor")
    tiny_model(family).save_pretrained(tmp_path / "attnres")
    donor = AutoModelForCausalLM.from_pretrained(tmp_path / "donor", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "attnres", dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert types.pop("model.depth_attention.query") == types.pop("model.depth_attention.key_norm") == torch.float32
    assert types == {name: tensor.dtype for name, tensor in donor.state_dict().items()}
    assert model._keep_in_fp32_modules == donor._keep_in_fp32_modules
    assert model._keep_in_fp32_modules_strict == {*donor._keep_in_fp32_modules_strict, "depth_attention"}

    def quantisable(model) -> set[str]:
        linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        return linear - set(get_keys_to_not_convert(model))

    assert quantisable(model) == quantisable(donor)


# --- Experts


@pytest.mark.parametrize("family", MIXTURES)
@TWO_MODES
def test_routing_is_the_donors(family, mode, block_size):
    """Router logits, the auxiliary loss and the loss with it, and every gradient of a router."""
    donor = tiny_donor(family)
    model = attn_res_from_donor(donor, mode, block_size)
    options = {"output_router_logits": True} if family in WITH_AUXILIARY_LOSS else {}
    expected, expected_gradients = loss_and_gradients(donor, tokens(), **options)
    outputs, gradients = loss_and_gradients(model, tokens(), **options)
    assert relative_error(outputs.loss, expected.loss) <= CONVERSION_ERROR[family]
    routers = [name for name in gradients if re.search(r"mlp\.(gate|router)\.", name)]
    assert routers
    for name in routers:
        assert relative_error(gradients[name], expected_gradients[name]) <= 10 * CONVERSION_ERROR[family]
    if family in WITH_AUXILIARY_LOSS:
        assert expected.aux_loss > 0
        assert relative_error(outputs.aux_loss, expected.aux_loss) <= CONVERSION_ERROR[family]
        plain = loss_and_gradients(model, tokens())[0]
        assert plain.router_logits is None and not torch.equal(plain.loss, outputs.loss)

    if "router_logits" not in donor.model._can_record_outputs:
        assert family == "deepseek_v3"  # of older versions of transformers
        return
    expected = donor.model(tokens(), output_router_logits=True).router_logits
    router_logits = model.model(tokens(), output_router_logits=True).router_logits
    assert len(router_logits) == len(expected) > 0
    for logits, expected_logits in zip(router_logits, expected):
        assert relative_error(logits, expected_logits) <= CONVERSION_ERROR[family]


@every_family
@torch.no_grad()
def test_expert_implementations(family):
    """They can be switched where the donor's can, and agree; the negative control is an expert in place of another."""
    donor, model = tiny_donor(family), tiny_model(family)
    can_set = type(donor)._can_set_experts_implementation()
    assert can_set == (family in MIXTURES)
    assert type(model)._can_set_experts_implementation() == can_set
    if not can_set:
        return
    model.set_experts_implementation("eager")
    expected = model(tokens()).logits
    for implementation in ("batched_mm", "grouped_mm"):
        model.set_experts_implementation(implementation)
        assert model.config._experts_implementation == implementation
        assert_close(model(tokens()).logits, expected, rounding(family).logits)
    experts = next(module for module in model.modules() if type(module).__name__.endswith("Experts"))
    experts.down_proj[0] = experts.down_proj[1]
    assert relative_error(model(tokens()).logits, expected) > 100 * rounding(family).logits


# --- Code that travels, and donors that are absent


def run_python(script: str, *arguments, **environment) -> str:
    """What a fresh process prints that runs `script`."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=180)
    assert result.returncode == 0, result.stderr
    return result.stdout


LOAD_FROM_FOLDER = """
import sys
names = "attnres families_attnres modeling_attnres depth_mixers_attnres depth_attention_attnres"
for name in (*names.split(), "configuration_attnres"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, target = sys.argv[1:]
assert type(AutoModel.from_pretrained(folder, trust_remote_code=True)).__name__.startswith("AttnRes")
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
input_ids = torch.load(target + "/input_ids.pt")
torch.save([model(input_ids).logits, model.generate(input_ids, max_new_tokens=4, do_sample=False)], target + "/out.pt")
model.save_pretrained(target)
"""


@pytest.mark.parametrize("family", [family for family in ("qwen3_moe", "kimi_linear") if family in AVAILABLE])
@torch.no_grad()
def test_folder_loads_without_the_project(family, tmp_path):
    """Logits, generation and saving in a process that has transformers only; experts have other names on disk."""
    model = tiny_model(family, attn_res_implementation="two_phase")  # all that a folder has
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "target").mkdir()
    torch.save(tokens(), tmp_path / "target" / "input_ids.pt")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": ""}
    run_python(LOAD_FROM_FOLDER, tmp_path / "model", tmp_path / "target", **environment)
    logits, generated = torch.load(tmp_path / "target" / "out.pt")
    assert torch.equal(logits, model(tokens()).logits)
    assert torch.equal(generated, model.generate(tokens(), max_new_tokens=4, do_sample=False))
    expected, tensors = stored_tensors(tmp_path / "model"), stored_tensors(tmp_path / "target")
    assert set(tensors) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), name


# An older transformers: what it lacks can't be imported
WITHOUT_YOUNG_FAMILIES = """
import importlib.abc, sys

class OlderTransformers(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("transformers.models.kimi_linear", "transformers.models.inkling2")):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, OlderTransformers())
"""
ABSENT_FAMILY = """
import torch, attnres
from attnres import AttnResConfig, AttnResForCausalLM
sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
config = AttnResConfig(**sizes, bos_token_id=1, eos_token_id=2)
print(AttnResForCausalLM(config)(torch.tensor([[3, 4]])).logits.shape)
print(len(attnres.configuration_attnres.__all__), "AttnResKimiLinearConfig" in attnres.__all__)
for name in ("KimiLinearConfig", "KimiLinearModel", "KimiLinearForCausalLM", "Inkling2TextForCausalLM"):
    name = f"AttnRes{name}"
    try:
        exec(f"from attnres import {name}")
    except ImportError as error:
        print(error)
try:
    AttnResConfig(model_type="kimi_linear")
except ValueError as error:
    print(error)
"""
ABSENT_DONOR_OF_A_FOLDER = """
import sys
names = "attnres families_attnres modeling_attnres depth_mixers_attnres depth_attention_attnres"
for name in (*names.split(), "configuration_attnres"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM
folder, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
torch.save(model(torch.load(target + "/input_ids.pt")).logits, target + "/logits.pt")
"""


def test_absent_donor():
    """Without the youngest families in transformers the others work, and the absent names say what they need."""
    lines = run_python(WITHOUT_YOUNG_FAMILIES + ABSENT_FAMILY).splitlines()
    assert lines[0] == "torch.Size([1, 2, 16])"
    assert lines[1] == f"{len(FAMILIES) - 1} False"
    for line, name in zip(lines[2:5], ("Config", "Model", "ForCausalLM"), strict=False):
        assert f"AttnResKimiLinear{name}" in line and "needs a transformers that has kimi_linear" in line
    assert "AttnResInkling2TextForCausalLM" in lines[5] and "needs a transformers that has inkling2_text" in lines[5]
    assert "needs a transformers that has kimi_linear" in lines[6] and "supported families: llama" in lines[6]


@torch.no_grad()
def test_absent_donor_does_not_matter_to_a_folder(tmp_path):
    """The code in a saved folder loads where a donor of another family is absent."""
    model = tiny_model("qwen2", attn_res_implementation="two_phase")  # all that a folder has
    model.save_pretrained(tmp_path / "model")
    torch.save(tokens(), tmp_path / "input_ids.pt")
    run_python(
        WITHOUT_YOUNG_FAMILIES + ABSENT_DONOR_OF_A_FOLDER,
        tmp_path / "model",
        tmp_path,
        HF_MODULES_CACHE=str(tmp_path / "modules"),
    )
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens()).logits)


# --- Kimi Linear, the architecture of the paper


@needs_kimi_linear
def test_kimi_linear_at_the_papers_size():
    """48B parameters, 27 layers, block size 3: 10 sources at the output and (2L + 1) * 2 * d parameters more."""
    config = attnres.AttnResKimiLinearConfig(attn_res_block_size=3)
    assert (config.num_hidden_layers, config.hidden_size, config.num_depth_reads) == (27, 2304, 55)
    assert config.num_depth_sources(config.num_depth_reads - 1) == 10
    with torch.device("meta"):
        model = attnres.AttnResKimiLinearForCausalLM(config)
        donor = AutoModelForCausalLM.from_config(config.donor_config_class()())
    added = {"model.depth_attention.query", "model.depth_attention.key_norm"}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in added}
    assert shapes == {name: tensor.shape for name, tensor in donor.state_dict().items()}
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters - sum(parameter.numel() for parameter in donor.parameters()) == (2 * 27 + 1) * 2 * 2304
    assert 47e9 < num_parameters < 50e9


@pytest.fixture
def one_thread():
    """For thousands of tiny operations, whose threads would mostly wait for each other."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@needs_kimi_linear
@pytest.mark.slow
def test_kimi_linear_trains_on_text(one_thread):
    """Nine layers of both kinds with experts, in blocks of three, learn the bytes of the standard library's source."""
    config = tiny_config(
        "kimi_linear",
        vocab_size=128,
        num_hidden_layers=9,
        attn_res_block_size=3,
        initializer_range=0.02,
        hidden_size=48,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    assert set(config.layer_types) == {"linear_attention", "full_attention"}
    assert set(config.mlp_layer_types) == {"dense", "sparse"}
    folder = Path(sysconfig.get_paths()["stdlib"])
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("argparse.py", "ast.py", "inspect.py"))
    data = torch.tensor([byte for byte in text.encode("ascii", "ignore") if byte < 128])

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        starts = torch.randint(len(data) - 64, (8,))
        batch = torch.stack([data[start : start + 64] for start in starts])
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 4.5 and sum(losses[-5:]) / 5 < 3.2
    query = model.model.depth_attention.query
    assert query[1:].any(dim=1).all() and not query[0].any()


# --- Refusals


def save_config(folder: Path, config: PreTrainedConfig) -> Path:
    config.save_pretrained(folder)
    return folder


NO_PRE_NORM = "reads the residual stream without a norm"
PARALLEL = "attention and MLP read the same input"
ENCODER = "only decoders are supported"
REFUSED = {
    "olmo2": NO_PRE_NORM,
    "olmo3": NO_PRE_NORM,
    "exaone4": NO_PRE_NORM,
    "cohere": PARALLEL,
    "cohere2": PARALLEL,
    "bert": ENCODER,
    "modernbert": ENCODER,
    "t5": ENCODER,
    "bart": ENCODER,
    "gpt2": "the family is unknown",
}


@pytest.mark.parametrize("model_type, reason", REFUSED.items(), ids=REFUSED)
def test_donors_that_can_not_be_exact_are_refused(model_type, reason, tmp_path):
    """However the configuration reaches an AttnRes class, the reason and the supported families are named."""
    config = CONFIG_MAPPING[model_type]()
    folder = save_config(tmp_path, config)
    for build in (
        lambda: AttnResConfig.from_pretrained(folder),
        lambda: AttnResConfig(**config.to_dict()),
        lambda: AttnResForCausalLM.from_pretrained(folder),
        lambda: AttnResForCausalLM(config),
        lambda: AttnResModel(config),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            build()
        assert f"{model_type!r}" in str(error.value)
        assert all(re.search(rf"\b{family}\b", str(error.value)) for family in AVAILABLE)


def test_checkpoint_that_can_not_be_exact_is_refused(tmp_path):
    """Also with weights and with the donor's configuration as an argument."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = CONFIG_MAPPING["olmo2"](**sizes, vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    for options in ({}, {"config": config}):
        with pytest.raises(ValueError, match=NO_PRE_NORM):
            AttnResForCausalLM.from_pretrained(tmp_path, **options)


def test_unknown_donor_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "my_model", "hidden_size": 32}))
    with pytest.raises(ValueError, match=r"'my_model'.*the family is unknown.*supported families: llama"):
        AttnResForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("config", [tiny_donor_config("qwen2"), tiny_config("qwen2")], ids=["donor", "attnres"])
def test_other_families_are_pointed_to_their_own_class(config, tmp_path):
    """A supported donor in the wrong AttnRes class: the message names the right one, which then works."""
    folder = save_config(tmp_path, config)
    message = "AttnResQwen2Config and AttnResQwen2ForCausalLM"
    for build in (
        lambda: AttnResConfig.from_pretrained(folder),
        lambda: AttnResForCausalLM.from_pretrained(folder),
        lambda: AttnResForCausalLM(config),
    ):
        with pytest.raises(ValueError, match=message):
            build()
    assert isinstance(AttnResQwen2Config.from_pretrained(folder), AttnResQwen2Config)


def test_donor_configuration_is_not_taken_for_an_attnres_one():
    """The model doesn't guess mode and block size."""
    config = tiny_donor_config("llama")
    with pytest.raises(ValueError, match=r"AttnResConfig\(\*\*config.to_dict\(\)\)"):
        AttnResForCausalLM(config)
    assert AttnResForCausalLM(AttnResConfig(**config.to_dict())).config.attn_res_block_size == 1
