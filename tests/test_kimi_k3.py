# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Depth attention under Kimi K3's tensor names: the names are right, both ways are exact, bad input changes nothing."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from attnres_convert import convert_checkpoint
from attnres_convert.kimi_k3 import export_kimi_k3, from_kimi_k3, import_kimi_k3, main, to_kimi_k3
from convert_models import edit_json, save_donor, tensor_bytes, tree
from families import tiny_model, tokens
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM


@pytest.fixture
def model(tmp_path):
    """Three layers of width 40 with queries and gains far from their initial values, saved."""
    model = tiny_model(num_hidden_layers=3, attn_res_block_size=2)
    model.save_pretrained(tmp_path / "checkpoint")
    return model


def depth_rows(model) -> tuple[torch.Tensor, torch.Tensor]:
    module = model.get_submodule(next(name for name, _ in model.named_modules() if name.endswith("depth_attention")))
    return module.query.detach(), module.key_norm.detach()


def test_names_and_shapes():
    """A query per read as a `(1, hidden)` projection, a gain `(hidden,)`; attention, MLP, and at the end the output."""
    query, key_norm = torch.arange(10.0).view(5, 2), torch.arange(10.0, 20.0).view(5, 2)
    tensors = to_kimi_k3(query, key_norm)
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "layers.0.self_attention_res_proj.weight": [[0, 1]],
        "layers.0.self_attention_res_norm.weight": [10, 11],
        "layers.0.mlp_res_proj.weight": [[2, 3]],
        "layers.0.mlp_res_norm.weight": [12, 13],
        "layers.1.self_attention_res_proj.weight": [[4, 5]],
        "layers.1.self_attention_res_norm.weight": [14, 15],
        "layers.1.mlp_res_proj.weight": [[6, 7]],
        "layers.1.mlp_res_norm.weight": [16, 17],
        "output_attn_res_proj.weight": [[8, 9]],
        "output_attn_res_norm.weight": [18, 19],
    }


@torch.no_grad()
def test_a_name_is_the_read_it_says(model, tmp_path):
    """With all other queries zero, a query before the MLP of layer 1 changes the weights of that read, row 3, only."""
    tensors = to_kimi_k3(*(torch.zeros(7, 40), torch.ones(7, 40)))
    tensors["layers.1.mlp_res_proj.weight"] = torch.randn(1, 40)
    save_file(tensors, tmp_path / "rows.safetensors")
    import_kimi_k3(tmp_path / "rows.safetensors", tmp_path / "checkpoint", force=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint")
    weights = loaded(tokens(), output_depth_attentions=True).depth_attentions
    assert [row for row in range(7) if weights[row].std(dim=1, correction=0).max() > 1e-6] == [3]


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model."])
def test_both_ways_are_exact(model, tmp_path, prefix):
    """Exported and imported into another checkpoint, every bit of queries and gains is there, and no other changed."""
    export_kimi_k3(tmp_path / "checkpoint", tmp_path / "new" / "rows.safetensors", prefix)
    exported = load_file(tmp_path / "new" / "rows.safetensors")
    query, key_norm = depth_rows(model)
    assert torch.equal(exported[f"{prefix}layers.2.self_attention_res_proj.weight"], query[4:5])
    assert torch.equal(exported[f"{prefix}output_attn_res_norm.weight"], key_norm[6])
    assert len(exported) == 14 and all(name.startswith(prefix) for name in exported)
    for rows, expected in zip(from_kimi_k3(exported, 3, 40), (query, key_norm)):
        assert torch.equal(rows, expected)

    donor = save_donor(tmp_path / "donor", num_hidden_layers=3)
    convert_checkpoint(tmp_path / "donor", tmp_path / "converted", block_size=2, verify=False)
    before = tensor_bytes(tmp_path / "converted")
    import_kimi_k3(tmp_path / "new" / "rows.safetensors", tmp_path / "converted")
    after, source = tensor_bytes(tmp_path / "converted"), tensor_bytes(tmp_path / "checkpoint")
    for name in before:
        assert after[name] == (source if "depth_attention" in name else before)[name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert all(torch.equal(rows, expected) for rows, expected in zip(depth_rows(loaded), (query, key_norm)))
    assert not torch.equal(loaded(tokens()).logits, donor(tokens()).logits)


def test_half_precision_is_widened(model, tmp_path):
    """Rows in bfloat16 and float16, which float32 holds exactly; the checkpoint stays float32."""
    tensors = to_kimi_k3(*depth_rows(model))
    halves = {name: tensor.to(torch.bfloat16 if "proj" in name else torch.float16) for name, tensor in tensors.items()}
    save_file(halves, tmp_path / "rows.safetensors")
    import_kimi_k3(tmp_path / "rows.safetensors", tmp_path / "checkpoint", force=True)
    query, key_norm = depth_rows(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint"))
    assert query.dtype == torch.float32 and torch.equal(query, depth_rows(model)[0].bfloat16().float())
    assert torch.equal(key_norm, depth_rows(model)[1].half().float())


def test_from_a_sharded_folder(model, tmp_path):
    """Only the shards that the index names for these tensors are needed, of a checkpoint whose others are absent."""
    folder = tmp_path / "kimi"
    folder.mkdir()
    tensors = to_kimi_k3(*depth_rows(model), prefix="model.")
    names = sorted(tensors)
    shards = {"a.safetensors": names[:5], "b.safetensors": names[5:]}
    for shard, part in shards.items():
        others = {f"model.layers.{len(part)}.mlp.gate_proj.weight": torch.zeros(2, 2)}
        save_file({name: tensors[name] for name in part} | others, folder / shard)
    weight_map = {name: shard for shard, part in shards.items() for name in part}
    weight_map["model.embed_tokens.weight"] = "absent.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    save_donor(tmp_path / "donor", num_hidden_layers=3)
    convert_checkpoint(tmp_path / "donor", tmp_path / "converted", verify=False)
    import_kimi_k3(folder, tmp_path / "converted")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert all(torch.equal(rows, expected) for rows, expected in zip(depth_rows(loaded), depth_rows(model)))


def test_base_models_and_large_shards(tmp_path):
    """A checkpoint without a head, and one whose depth attention is among other tensors in one of many shards."""
    tiny_model(auto_class=AutoModel).save_pretrained(tmp_path / "base")
    tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    export_kimi_k3(tmp_path / "base", tmp_path / "base.safetensors")
    rows = {name: tensor + 1 for name, tensor in load_file(tmp_path / "base.safetensors").items()}
    save_file(rows, tmp_path / "rows.safetensors")
    for folder in ("base", "sharded"):
        before = tensor_bytes(tmp_path / folder)
        import_kimi_k3(tmp_path / "rows.safetensors", tmp_path / folder, force=True)
        export_kimi_k3(tmp_path / folder, tmp_path / "again.safetensors", force=True)
        again = load_file(tmp_path / "again.safetensors")
        assert set(again) == set(rows) and all(torch.equal(again[name], rows[name]) for name in rows)
        after = tensor_bytes(tmp_path / folder)
        assert {name for name in before if after[name] != before[name]} == {
            name for name in before if "depth_attention" in name
        }


def test_hard_links_keep_what_they_had(model, tmp_path):
    """A changed shard is a new file."""
    (shard,) = (tmp_path / "checkpoint").glob("*.safetensors")
    os.link(shard, tmp_path / "linked.safetensors")
    before = shard.read_bytes()
    save_file(to_kimi_k3(torch.zeros(7, 40), torch.ones(7, 40)), tmp_path / "rows.safetensors")
    import_kimi_k3(tmp_path / "rows.safetensors", tmp_path / "checkpoint", force=True)
    assert (tmp_path / "linked.safetensors").read_bytes() == before != shard.read_bytes()


def test_command(tmp_path):
    """As a user runs it, with the note that reads of a converted checkpoint are scaled."""
    save_donor(tmp_path / "donor", num_hidden_layers=3)
    convert_checkpoint(tmp_path / "donor", tmp_path / "converted", verify=False)
    before = tree(tmp_path / "converted")
    for arguments in (["export", "converted", "rows.safetensors"], ["import", "rows.safetensors", "converted"]):
        command = [sys.executable, "-m", "attnres_convert.kimi_k3", *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert "7 reads" in result.stdout and "attn_res_sum_scale" in result.stdout
    assert tree(tmp_path / "converted") == before


def change(**changes):
    """Rows in which tensors are replaced, or removed by None."""

    def apply(rows):
        merged = {**rows, **{name.replace("__", "."): tensor for name, tensor in changes.items()}}
        return {name: tensor for name, tensor in merged.items() if tensor is not None}

    return apply


BAD_ROWS = {
    "missing": (change(layers__1__mlp_res_proj__weight=None), "missing: layers.1.mlp_res_proj.weight"),
    "no_output": (change(output_attn_res_norm__weight=None), "missing: output_attn_res_norm.weight"),
    "more_layers": (change(layers__3__mlp_res_proj__weight=torch.ones(1, 40)), "more than the checkpoint has"),
    "flat_query": (change(layers__0__mlp_res_proj__weight=torch.ones(40)), r"has the shape \(40,\); \(1, 40\)"),
    "wide_gain": (change(layers__0__mlp_res_norm__weight=torch.ones(41)), r"has the shape \(41,\); \(40,\)"),
    "double": (change(layers__0__mlp_res_norm__weight=torch.ones(40).double()), "F64; one of BF16, F16, F32"),
    "not_finite": (change(output_attn_res_norm__weight=torch.full((40,), torch.nan)), "aren't finite"),
    "two_prefixes": (change(model__output_attn_res_norm__weight=torch.ones(40)), "several prefixes: '', 'model.'"),
    "not_kimi": (lambda rows: {"weight": torch.ones(2)}, "no tensor like layers.0.mlp_res_proj.weight"),
}


def refused(capsys, tmp_path, *arguments: str) -> str:
    """The message of a command that fails and leaves all files as they were."""
    before = tree(tmp_path)
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") <= 2
    assert tree(tmp_path) == before
    return captured.err


@pytest.mark.parametrize("damage, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows(model, tmp_path, capsys, damage, message):
    save_file(damage(to_kimi_k3(*depth_rows(model))), tmp_path / "rows.safetensors")
    error = refused(capsys, tmp_path, "import", tmp_path / "rows.safetensors", tmp_path / "checkpoint", "--force")
    assert re.search(message, error)


def test_bad_files(model, tmp_path, capsys):
    checkpoint, rows = tmp_path / "checkpoint", tmp_path / "rows.safetensors"
    export_kimi_k3(checkpoint, rows)
    assert "use --force to replace it" in refused(capsys, tmp_path, "export", checkpoint, rows)
    assert "give a file" in refused(capsys, tmp_path, "export", checkpoint, checkpoint)
    assert "are trained, up to" in refused(capsys, tmp_path, "import", rows, checkpoint)
    assert "doesn't exist" in refused(capsys, tmp_path, "import", tmp_path / "absent", checkpoint, "--force")
    assert "is no folder" in refused(capsys, tmp_path, "import", rows, rows)
    rows.write_bytes(rows.read_bytes()[:-4])
    assert "rows.safetensors is damaged" in refused(capsys, tmp_path, "import", rows, checkpoint, "--force")


def test_bad_checkpoints(model, tmp_path, capsys):
    checkpoint, rows = tmp_path / "checkpoint", tmp_path / "rows.safetensors"
    export_kimi_k3(checkpoint, rows)
    save_donor(tmp_path / "donor")
    assert "no AttnRes checkpoint" in refused(capsys, tmp_path, "export", tmp_path / "donor", tmp_path / "out")
    edit_json(checkpoint / "config.json", num_hidden_layers=4)
    assert r"F32 (9, 40) is expected" in refused(capsys, tmp_path, "export", checkpoint, tmp_path / "out")
    edit_json(checkpoint / "config.json", num_hidden_layers=...)
    assert "must give num_hidden_layers" in refused(capsys, tmp_path, "import", rows, checkpoint, "--force")
    tiny_model(attn_res_mode="denseformer").save_pretrained(tmp_path / "scalars")
    assert "'denseformer'" in refused(capsys, tmp_path, "export", tmp_path / "scalars", tmp_path / "out")
