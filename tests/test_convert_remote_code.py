# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A converted checkpoint needs transformers and nothing of this project."""

import json
import subprocess
import sys

import torch
from attnres_convert import convert_checkpoint
from convert_models import relative, save_donor, tokens


# The project may be installed in the environment, so its modules are refused by name. Code from the folder is imported
# under other names.
LOAD = """
import importlib.abc, json, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        PROJECT = "attnres families_attnres modeling_attnres depth_mixers_attnres depth_attention_attnres"
        PROJECT += " configuration_attnres"
        if name in (*PROJECT.split(), "attnres_convert"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
folder, again, inputs = sys.argv[1], sys.argv[2], torch.tensor(json.loads(sys.argv[3]))
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(inputs).logits
model.save_pretrained(again)
reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
with torch.no_grad():
    assert reloaded(inputs).logits.equal(logits)
    assert base(inputs).last_hidden_state.shape[:2] == inputs.shape
print(json.dumps([type(config).__name__, type(model).__name__, type(base).__name__, logits.tolist()]))
"""


def test_a_fresh_process_without_the_project(tmp_path):
    """With trust_remote_code the folder loads, computes the donor's logits, and saves itself again."""
    donor = save_donor(tmp_path / "src")
    convert_checkpoint(tmp_path / "src", tmp_path / "dst", block_size=2, verify=False)
    inputs = tokens(donor)
    (tmp_path / "empty").mkdir()
    arguments = [tmp_path / "dst", tmp_path / "again", json.dumps(inputs.tolist())]
    environment = {"HF_HOME": str(tmp_path / "cache"), "PATH": "", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        cwd=tmp_path / "empty",
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *classes, logits = json.loads(done.stdout.splitlines()[-1])
    assert classes == ["AttnResConfig", "AttnResForCausalLM", "AttnResModel"]
    with torch.no_grad():
        assert relative(torch.tensor(logits), donor(inputs).logits) < 3e-6
