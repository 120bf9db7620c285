# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""vLLM serves AttnRes models: the tokens of transformers, and the log-probabilities of float64 but for rounding.

`make test-serving` runs these in an environment with vLLM for CPUs. What rounding may do is told by transformers' own
float32; a model that loses its depth attention or the scale of its logits is off by a thousand times as much.
"""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from served import Reference, compare, reference, save_model, serve


pytestmark = [
    pytest.mark.serving,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("vllm") is None, reason="needs vLLM: make test-serving"),
]

ROOM = 5
LEAST_ROUNDING = 2e-5


def check(result: dict, expected: Reference):
    different, worst = compare(result, expected)
    bound = ROOM * max(expected.rounding, LEAST_ROUNDING)
    assert (different, worst < bound) == (0, True), (different, worst, expected.rounding)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Makes a model, and tells its folder; the same one for the same arguments."""
    root, known = tmp_path_factory.mktemp("models"), {}

    def make(family: str, **changes) -> Path:
        key = json.dumps([family, changes])
        if key not in known:
            known[key] = root / str(len(known))
            save_model(known[key], family, **changes)
        return known[key]

    return make


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, model, tmp_path):
    """Block and Full, with the scale of converted models; and that only a model of trained queries would show."""
    folders = [model(family, attn_res_mode=mode, attn_res_sum_scale=True) for mode in ("block", "full")]
    results = serve([{"path": str(folder)} for folder in folders], tmp_path)
    expected = [reference(folder) for folder in folders]
    for result, right in zip(results, expected, strict=True):
        check(result, right)
        assert result["implementation"] in ("cpp", "triton")
    assert compare(results[0], expected[1])[1] > 20 * ROOM * max(expected[1].rounding, LEAST_ROUNDING)


def test_modes(model, tmp_path):
    """Other ways to mix depth, streams among them, the paper's mean, and blocks of one layer."""
    changes = [{"attn_res_mode": mode} for mode in ("denseformer", "full", "mhc", "block_delta", "block_mhc")]
    changes.append({"attn_res_block_size": 1})
    folders = [model("llama", **change) for change in changes]
    for folder, result in zip(folders, serve([{"path": str(folder)} for folder in folders], tmp_path), strict=True):
        check(result, reference(folder))


@pytest.mark.parametrize("family", ["llama", "kimi_linear"])
def test_prompts_in_pieces(family, model, tmp_path):
    """Prompts come in chunks, and the state or cache of one request's beginning serves the next."""
    folder = model(family, attn_res_mode="block")
    shared = [3 + i % 97 for i in range(300)]
    prompts = [[*shared, 120, 7], [*shared, 99, 11], [5]]
    request = {"path": str(folder), "prompts": prompts, "new_tokens": 8}
    settings = [{"max_num_batched_tokens": 16}, {"enable_prefix_caching": True, "in_turn": True}]
    expected = reference(folder, prompts, 8)
    results = serve([{**request, **setting} for setting in settings], tmp_path)
    for result in results:
        check(result, expected)
    assert results[1]["cached"][0] == 0 < results[1]["cached"][1]


def test_states_are_of_one_request(model, tmp_path):
    """In slots that others have used, also where a prompt, or the first of its pieces, is a single token."""
    folder = model("kimi_linear", attn_res_mode="block")
    others = [[i, 2 * i, 77, 9] for i in range(3, 33)]
    prompts = [*others, [7], [5, 100]]
    request = {"path": str(folder), "prompts": prompts, "in_turn": True, "num_gpu_blocks_override": 24}
    (result,) = serve([request], tmp_path)
    check(result, reference(folder, prompts))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_compiled(family, model, tmp_path):
    """vLLM's compiled graph has our operators in it."""
    folder = model(family, attn_res_mode="block")
    (result,) = serve([{"path": str(folder), "enforce_eager": False}], tmp_path)
    check(result, reference(folder))
    assert "attnres::depth_read" in result["operators"]


@pytest.mark.parametrize("family", ["llama", "deepseek_v3", "kimi_linear", "gpt_oss"])
def test_tensor_parallel(family, model, tmp_path):
    folder = model(family, attn_res_mode="block")
    (result,) = serve([{"path": str(folder), "tensor_parallel_size": 2}], tmp_path, processes=True)
    check(result, reference(folder))


@pytest.mark.parametrize("family, mode", [("llama", "block"), ("llama", "full"), ("mixtral", "block")])
def test_pipeline_parallel(family, mode, model, tmp_path):
    """Also where the second stage begins in the middle of a block. Compiled, as vLLM's pipelines need it on CPUs."""
    folder = model(family, attn_res_mode=mode, attn_res_block_size=3, num_hidden_layers=5)
    request = {"path": str(folder), "pipeline_parallel_size": 2, "enforce_eager": False}
    (result,) = serve([request], tmp_path, processes=True)
    check(result, reference(folder))


def test_no_pipeline_of_kimi_linear(model, tmp_path):
    with pytest.raises(RuntimeError, match="use --tensor-parallel-size"):
        request = {"path": str(model("kimi_linear")), "pipeline_parallel_size": 2, "enforce_eager": False}
        serve([request], tmp_path, processes=True)


def test_bfloat16(model, tmp_path):
    """Depth attention stays in float32."""
    folder = tmp_path / "model"
    save_model(folder, "llama", attn_res_mode="full", sharpness=1.0)
    (result,) = serve([{"path": str(folder), "dtype": "bfloat16"}], tmp_path)
    expected = reference(folder, dtype=torch.bfloat16)
    assert compare(result, expected)[1] < 2 * expected.rounding < 0.5
    assert result["dtype"] == "torch.float32"


def test_remote_code(model, tmp_path, monkeypatch):
    """A folder loads where the plugin is off, by its own code, if that is allowed."""
    folder = tmp_path / "copy"
    shutil.copytree(model("granite", attn_res_mode="block"), folder)
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(RuntimeError, match="trust_remote_code|trust-remote-code"):
        serve([{"path": str(folder)}], tmp_path)
    (result,) = serve([{"path": str(folder), "trust_remote_code": True}], tmp_path)
    check(result, reference(folder))
