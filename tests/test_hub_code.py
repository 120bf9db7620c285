# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A saved folder is complete: it loads, computes and saves itself again where this project can't be imported.

Every test runs fresh Python processes in which the project's modules are blocked.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_model, tokens
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from attnres import AttnResConfig, AttnResForCausalLM


ROOT = Path(__file__).parents[1]
CODE_FILES = (
    *("configuration_attnres.py", "depth_attention_attnres.py"),
    *("depth_mixers_attnres.py", "modeling_attnres.py"),
)
WITHOUT_PROJECT = """
import json, sys
PROJECT = "attnres families_attnres modeling_attnres depth_mixers_attnres depth_attention_attnres configuration_attnres"
for name in (*PROJECT.split(), "attnres_convert", "attnres_recipes"):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
import torch, transformers
input_ids = torch.tensor(json.loads(sys.argv[1]))
torch.set_grad_enabled(False)
"""


@pytest.fixture
def python(tmp_path):
    """Runs a script where the project can't be imported; its arguments come after the token ids."""

    def run(script: str, *arguments, check: bool = True) -> subprocess.CompletedProcess:
        environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-I", "-c", WITHOUT_PROJECT + script, json.dumps(tokens().tolist())]
        result = subprocess.run(
            [*command, *map(str, arguments)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
        )
        assert not check or result.returncode == 0, result.stderr
        return result

    return run


def test_project_is_blocked(python):
    """The negative control: in these processes the project can't be imported and its model type is unknown."""
    script = """
for name in PROJECT.split():
    try:
        __import__(name)
    except ModuleNotFoundError:
        print("blocked")
try:
    transformers.AutoConfig.for_model("attnres")
except ValueError:
    print("unknown")
"""
    assert python(script).stdout.split() == ["blocked"] * 6 + ["unknown"]


@torch.no_grad()
def test_folder_loads_and_saves_itself(python, tmp_path):
    """Logits bit for bit in a fresh process, saved again there, and from that folder in another; generation works."""
    options = {"attn_res_block_size": 2, "attn_res_sum_scale": True}
    model = tiny_model(**options, attn_res_implementation="two_phase")  # all that a folder has
    model.save_pretrained(tmp_path / "first")
    script = """
source, target = sys.argv[2:]
config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=True)
assert type(config).__module__.startswith("transformers_modules."), type(config).__module__
assert config.model_type == "attnres" and config.num_depth_sources(config.num_depth_reads - 1) == 4
base = transformers.AutoModel.from_pretrained(source, trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True)
outputs = model(input_ids, output_depth_attentions=True, output_hidden_states=True)
assert torch.equal(base(input_ids).last_hidden_state, outputs.hidden_states[-1])
assert len(outputs.depth_attentions) == 11
assert model.model.depth_attention.query.dtype == torch.float32
generated = model.generate(input_ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
model.save_pretrained(target)
torch.save({"logits": outputs.logits, "generated": generated}, target + "/results.pt")
"""
    expected = model(tokens()).logits
    generated = model.generate(tokens(), max_new_tokens=4, do_sample=False, eos_token_id=None)
    code = {name: (tmp_path / "first" / name).read_bytes() for name in CODE_FILES}
    for source, target in (("first", "second"), ("second", "third")):
        python(script, tmp_path / source, tmp_path / target)
        results = torch.load(tmp_path / target / "results.pt")
        assert torch.equal(results["logits"], expected)
        assert torch.equal(results["generated"], generated)
        assert code == {name: (tmp_path / target / name).read_bytes() for name in CODE_FILES}
        shutil.rmtree(tmp_path / source)  # nothing depends on the folder before


@torch.no_grad()
def test_every_family_loads(python, tmp_path):
    """A folder of each family gives its logits, bit for bit, without the project, and loads a second time; so does one
    of another mode."""
    expected = {}
    for family in (*FAMILIES, "mhc"):
        row = {"attn_res_mode": "mhc"} if family == "mhc" else {"family": family}
        model = tiny_model(**row, attn_res_implementation="two_phase")  # all that a folder has
        model.save_pretrained(tmp_path / family)
        expected[family] = model(tokens()).logits
    script = """
logits = {}
for family in sys.argv[3:]:
    for _ in range(2):
        model = transformers.AutoModelForCausalLM.from_pretrained(f"{sys.argv[2]}/{family}", trust_remote_code=True)
    logits[family] = model(input_ids).logits
torch.save(logits, sys.argv[2] + "/logits.pt")
"""
    python(script, tmp_path, *expected)
    logits = torch.load(tmp_path / "logits.pt")
    assert [family for family in expected if not torch.equal(logits[family], expected[family])] == []


@pytest.mark.slow
@torch.no_grad()
def test_heads_load(python, tmp_path):
    """A head's folder loads as that head, and as every other class of the family."""
    expected = {}
    for head in (AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoModelForQuestionAnswering):
        model = tiny_model(auto_class=head, num_labels=3, attn_res_implementation="two_phase")
        model.save_pretrained(tmp_path / head.__name__)
        expected[head.__name__] = model(tokens())[0]
    script = """
logits = {}
for head in sys.argv[3:]:
    folder = f"{sys.argv[2]}/{head}"
    logits[head] = getattr(transformers, head).from_pretrained(folder, trust_remote_code=True)(input_ids)[0]
    for other in json.load(open(f"{folder}/config.json"))["auto_map"]:
        getattr(transformers, other).from_pretrained(folder, trust_remote_code=True)
torch.save(logits, f"{sys.argv[2]}/logits.pt")
"""
    python(script, tmp_path, *expected)
    logits = torch.load(tmp_path / "logits.pt")
    assert len(logits) == 3 and all(torch.equal(logits[head], expected[head]) for head in expected)


@torch.no_grad()
def test_two_versions_of_the_code(python, tmp_path):
    """Two folders with different code in one process each run their own, whichever comes first."""
    model = tiny_model(attn_res_implementation="eager")
    model.save_pretrained(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    with open(tmp_path / "second" / "depth_attention_attnres.py", "a") as code_file:
        code_file.write(
            "\n\nDepthAttentionInterface.register('eager', lambda sources, product, eps, scale: "
            "eager_depth_attention(sources, 0 * product, eps, scale))\n"
        )
    expected = model(tokens()).logits
    model.model.depth_attention.query.zero_()
    uniform = model(tokens()).logits
    assert not torch.equal(expected, uniform)
    script = """
folders = sys.argv[2:4]
options = {"trust_remote_code": True, "attn_res_implementation": "eager"}
models = [transformers.AutoModelForCausalLM.from_pretrained(folder, **options) for folder in folders]
torch.save([model(input_ids).logits for model in models], sys.argv[4])
for model, folder in zip(models, folders):
    model.save_pretrained(folder + "-again")
"""
    for order, logits in ((["first", "second"], [expected, uniform]), (["second", "first"], [uniform, expected])):
        python(script, *(tmp_path / folder for folder in order), tmp_path / "logits.pt")
        results = torch.load(tmp_path / "logits.pt")
        assert torch.equal(results[0], logits[0]) and torch.equal(results[1], logits[1])
        for folder in order:  # each saves the code it runs
            for name in CODE_FILES:
                assert (tmp_path / f"{folder}-again" / name).read_bytes() == (tmp_path / folder / name).read_bytes()


def test_training_and_implementations_in_remote_code(python, tmp_path):
    """Remote code trains with checkpointing, selects implementations and builds fresh models."""
    tiny_model().save_pretrained(tmp_path / "model")
    script = """
torch.set_grad_enabled(True)
load = transformers.AutoModelForCausalLM.from_pretrained
model = load(sys.argv[2], trust_remote_code=True, attn_res_implementation="eager", attn_implementation="eager")
assert model.config._attn_implementation == model.config._attn_res_implementation == "eager"
model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
model(input_ids, labels=input_ids).loss.backward()
assert model.model.depth_attention.query.grad[1:].any()
try:
    load(sys.argv[2], trust_remote_code=True, attn_res_implementation="nonsense")
except ValueError as error:
    assert "eager" in str(error)
else:
    raise AssertionError("accepted")
fresh = transformers.AutoModelForCausalLM.from_config(model.config, trust_remote_code=True, dtype=torch.bfloat16)
assert not fresh.model.depth_attention.query.any() and fresh.model.depth_attention.query.dtype == torch.float32
"""
    python(script, tmp_path / "model")


def test_trust_is_required(python, tmp_path):
    """Without trust_remote_code nothing of the folder runs."""
    tiny_model().save_pretrained(tmp_path / "model")
    with open(tmp_path / "model" / "modeling_attnres.py", "a") as code_file:
        code_file.write("\n\nprint('ran')\n")
    script = "transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=False)"
    result = python(script, tmp_path / "model", check=False)
    assert result.returncode != 0 and "trust_remote_code" in result.stderr
    assert "ran" not in result.stdout


def test_installed_project_comes_first(tmp_path):
    """Where the project is installed its own classes load a folder, with and without trust in remote code."""
    tiny_model().save_pretrained(tmp_path)
    for trust in (False, True):
        assert type(AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=trust)) is AttnResForCausalLM


def test_links_to_code_are_replaced(tmp_path):
    """Where a folder has links, as those of the zoo have, what they point to stays as it is."""
    model, elsewhere = tiny_model(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in CODE_FILES:
        (elsewhere / name).write_text("theirs")
        (tmp_path / name).symlink_to(f"elsewhere/{name}")
    model.save_pretrained(tmp_path)
    for path in AttnResConfig.hub_files():
        saved = tmp_path / path.name
        assert saved.read_bytes() == path.read_bytes() and not saved.is_symlink()
        assert (elsewhere / path.name).read_text() == "theirs"


@pytest.mark.parametrize("family, code", [("llama", CODE_FILES), ("mistral", (*CODE_FILES, "families_attnres.py"))])
def test_saved_files(tmp_path, family, code):
    """A folder holds the weights, two configurations and the code files: three of a Llama, four of other families."""
    tiny_model(family).save_pretrained(tmp_path)
    data = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == data | set(code)
    assert all((tmp_path / name).read_bytes() == (ROOT / name).read_bytes() for name in code)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == tiny_model(family).config.hub_classes()


def test_ways_to_save(tmp_path):
    """The configuration names the classes; weights may be in shards; a file in the way stays as it is."""
    tiny_model().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["auto_map"] == tiny_model().config.hub_classes()
    assert config["architectures"] == ["AttnResForCausalLM"]
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="40KB")
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    torch.testing.assert_close(loaded(tokens()).logits, tiny_model()(tokens()).logits)
    (tmp_path / "file").write_text("something else")
    tiny_model().save_pretrained(tmp_path / "file")  # as transformers: an error in the log
    assert (tmp_path / "file").read_text() == "something else"
