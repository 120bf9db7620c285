# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Hub ids as sources, over HTTP, with the real client."""

import json
import os
import subprocess
import sys

import pytest
import torch
from convert_models import save_donor, tensor_bytes
from hub_server import serve_hub
from huggingface_hub import metadata_load


gguf = pytest.importorskip("gguf")
from gguf_models import write_gguf  # noqa: E402  needs it


# rows that a quantised type can hold
GGUF_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    save_donor(root / "good", num_hidden_layers=2, shard_size="20KB")
    (root / "good" / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\nA donor.\n")
    torch.save({"x": torch.ones(2)}, root / "good" / "pytorch_model.bin")
    torch.save({"x": torch.ones(2)}, root / "good" / "optimizer.pt")
    (root / "good" / "consolidated.safetensors").write_bytes(b"x" * 1000)
    save_donor(root / "pickle", num_hidden_layers=2)
    (root / "pickle" / "model.safetensors").rename(root / "pickle" / "pytorch_model.bin")
    save_donor(root / "post_norm", num_hidden_layers=2)
    config = root / "post_norm" / "config.json"
    config.write_text(config.read_text().replace('"llama"', '"olmo2"'))
    (root / "gguf" / "small").mkdir(parents=True)
    (root / "gguf" / "README.md").write_text("---\nlicense: mit\nbase_model: test/good\n---\nFiles.\n")
    write_gguf(root / "gguf" / "small" / "m.gguf", kind=gguf.GGMLQuantizationType.Q8_0, **GGUF_SIZES)
    (root / "gguf" / "other.gguf").write_bytes(b"x")
    names = ("good", "gguf", "pickle", "post_norm")
    with serve_hub() as hub:
        for name in names:
            hub.add(f"test/{name}", root / name)
        hub.add("test/gated", root / "good", gated=True)
        yield root, hub


# One process for all cases, as its imports take seconds. Prints code, output and error of each as JSON.
RUN = """
import contextlib, io, json, sys
from attnres_convert.cli import main
results = []
for arguments in json.loads(sys.argv[1]):
    output, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(error):
        code = main(arguments)
    results.append([code, output.getvalue(), error.getvalue()])
print(json.dumps(results))
"""
CASES = {
    "post_norm": (["test/post_norm", "dst_post_norm"], "without a norm"),
    "pickle": (["test/pickle", "dst_pickle"], "no safetensors"),
    "missing": (["test/nothing", "dst_missing"], "neither a folder nor a repository"),
    "gated": (["test/gated", "dst_gated"], "gated"),
    "revision": (["test/good", "dst_revision", "--revision", "nowhere"], "no revision"),
    "gguf_unnamed": (["test/gguf", "dst_unnamed"], "choose one with --gguf-file: other.gguf, small/m.gguf"),
    "gguf_missing": (["test/gguf", "dst_gguf_missing", "--gguf-file", "n.gguf"], "has no file n.gguf"),
    "gguf_outside": (["test/gguf", "dst_gguf_outside", "--gguf-file", "../m.gguf"], "no name of a file inside"),
    "gguf": (["test/gguf", "dst_gguf", "--gguf-file", "small/m.gguf"], None),
    "good": (["test/good", "dst", "--revision", "main", "--link"], None),
}


def run_cases(address, folder, cases):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": address, "HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-c", RUN, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def converted(hub, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    results = run_cases(hub[1].address, folder, [arguments for arguments, _ in CASES.values()])
    return folder, dict(zip(CASES, results))


def test_a_repository(hub, converted):
    """A Hub id is downloaded without pickles, converts as its folder does, and is named in the card with its commit."""
    folder, results = converted
    code, output, error = results["good"]
    assert code == 0, error
    assert "top-1 agreement" in output
    source = {path.name: path.read_bytes() for path in (hub[0] / "good").glob("model-*.safetensors")}
    assert {name: (folder / "dst" / name).read_bytes() for name in source} == source
    assert "model.depth_attention.query" in tensor_bytes(folder / "dst")
    assert not (folder / "dst" / "consolidated.safetensors").exists()
    metadata = metadata_load(folder / "dst" / "README.md")
    assert (metadata["license"], metadata["language"], metadata["base_model"]) == ("mit", "en", "test/good")
    card = (folder / "dst" / "README.md").read_text()
    assert hub[1].repositories["test/good"].branches["main"] in card and str(folder) not in card
    assert not any(path.is_symlink() for path in (folder / "dst").iterdir())


def test_a_gguf_file(hub, converted):
    """One file of a repository is downloaded, and the card names it, the repository and its commit."""
    folder, results = converted
    code, output, error = results["gguf"]
    assert code == 0, error
    assert "float64" in output
    made = json.loads((folder / "dst_gguf" / "results.json").read_text())
    command = "attnres-convert test/gguf dst_gguf --mode block --block-size 1 --gguf-file small/m.gguf --dtype bfloat16"
    assert (made["command"], made["revision"]) == (command, hub[1].repositories["test/gguf"].branches["main"])
    assert made["dequantized"]["quantization"] == "Q8_0"
    metadata = metadata_load(folder / "dst_gguf" / "README.md")
    assert (metadata["license"], metadata["base_model"]) == ("mit", "test/gguf")
    assert not any(request.path.endswith("other.gguf") for request in hub[1].sent("GET", "/"))


def test_only_what_is_needed_is_downloaded(hub, converted):
    """No pickles, no other formats, and no weights of a family that is refused."""
    fetched = {request.path for request in hub[1].sent("GET", "/")}
    commit = hub[1].repositories["test/good"].branches["main"]
    assert any(path.endswith(f"good/resolve/{commit}/config.json") for path in fetched)
    assert not any(path.endswith((".bin", ".pt", "consolidated.safetensors")) for path in fetched)
    assert not any("post_norm" in path and path.endswith(".safetensors") for path in fetched)


@pytest.mark.parametrize("case", [case for case, (_, message) in CASES.items() if message])
def test_refused(converted, case):
    folder, results = converted
    code, output, error = results[case]
    assert code == 1 and output == ""
    assert error.strip().splitlines()[-1].startswith("error: ") and CASES[case][1] in error
    assert "Traceback" not in error
    assert not (folder / CASES[case][0][1]).exists()


def test_no_server(tmp_path):
    """Without a connection the error says so."""
    ((code, _, error),) = run_cases("http://127.0.0.1:9", tmp_path, [["test/good", "dst"]])
    assert code == 1 and "can't be reached" in error
    assert not (tmp_path / "dst").exists()
