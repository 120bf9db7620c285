# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning, run as users run it: in processes, on files, at the smallest sizes; and its data and adapters."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import datasets
import numpy as np
import peft
import pytest
import torch
from attnres_convert import InputError
from attnres_convert.writing import write_json
from attnres_recipes import adapters, data, examples, packing
from families import FAMILIES, perturb, relative_error, tiny_model
from families import tokens as random_tokens
from PIL import Image
from pretrain_process import Server
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import attnres


RUN = ["--seq-len=48", "--batch-size=4", "--steps=6", "--save-steps=2", "--eval-steps=3", "--depth-every=3"]
RUN += ["--held-out=0.2", "--learning-rate=0.01"]
ON_AN_ADAPTER, RUN = RUN, [*RUN, "--lora-rank=4"]
TIMES = ("tokens_per_second", "seconds")
IGNORED = examples.IGNORED
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "one", "dog", "ran", "past", "two", "trees", "and", "birds"]


def write(path: Path, content: str | bytes | list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def load_folder(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


def without_times(folder: Path) -> list[dict]:
    lines = read_lines(folder / "metrics.jsonl") + read_lines(folder / "depth.jsonl")
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def sentence(number: int, length: int) -> str:
    return " ".join(WORDS[(number * 7 + 3 * at * at) % len(WORDS)] for at in range(length))


PROMPTS = [
    {"id": n, "prompt": f"{sentence(n, 3 + n % 5)} {n}:", "completion": f" {sentence(n + 1, 2 + n % 7)}"}
    for n in range(90)
]
CHATS = [
    {
        "messages": [
            *([{"role": "system", "content": "Be brief."}] if n % 3 == 0 else []),
            {"role": "user", "content": f"{row['prompt']}"},
            {"role": "assistant", "content": row["completion"].strip()},
            *([{"role": "user", "content": "And?"}, {"role": "assistant", "content": "No."}] if n % 4 == 0 else []),
        ]
    }
    for n, row in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        server = Server(tmp_path_factory.mktemp("finetune"), "finetune")
        yield server
        server.stop()


@pytest.fixture(scope="module")
def tokenizer():
    texts = [row["prompt"] + row["completion"] for row in PROMPTS]
    texts += ["<|im_start|>system\nBe brief.\n<|im_start|>user\nAnd?\n<|im_start|>assistant\nNo."] * 50
    return data.train_tokenizer(texts, 320)


@pytest.fixture(scope="module")
def donor(server, tokenizer) -> Path:
    """A Llama checkpoint."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    config = LlamaConfig(**sizes, **ids, vocab_size=len(tokenizer), max_position_embeddings=96)
    folder = server.folder / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prompts(server) -> Path:
    return write(server.folder / "prompts.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def chats(server) -> Path:
    return write(server.folder / "chats.jsonl", CHATS)


@pytest.fixture(scope="module")
def finished(server, donor, prompts) -> tuple[Path, str]:
    """The folder of a run with LoRA on a donor, and what it printed."""
    printed = server.run(*RUN, "--model", donor, "--data", prompts, "--merge", "--output", "finished")
    return server.folder / "finished", printed


def test_run_folder(finished, server):
    """Adapter, merged model, log, figures and numbers are there and agree, nothing else is."""
    folder, printed = finished
    files = {"run.json", "data.json", "metrics.jsonl", "depth.jsonl", "results.json", "loss.png"}
    folders = {"converted", "tensorboard", "model", "merged", "checkpoint-4", "checkpoint-6"}
    assert {path.name for path in folder.iterdir()} == files | folders
    results = json.loads((folder / "results.json").read_text())
    summary = json.loads(printed.splitlines()[-1])
    assert len(printed.splitlines()) == 1 and summary["held_out_loss"] == results["held_out_loss"]
    metrics = read_lines(folder / "metrics.jsonl")
    assert [line["step"] for line in metrics if "loss" in line] == list(range(1, 7))
    held_out = {line["step"]: line["held_out_loss"] for line in metrics if "held_out_loss" in line}
    assert list(held_out) == [0, 3, 6] and held_out[6] == results["held_out_loss"] < held_out[0]
    assert [line["step"] for line in read_lines(folder / "depth.jsonl")] == [0, 3, 6]
    assert results["examples"] == 90 and results["truncated"] == results["without_answer"] == 0
    assert results["method"] == "lora" and results["versions"]["peft"] == peft.__version__
    base = AutoModelForCausalLM.from_pretrained(folder / "converted")
    hidden, reads = 32, 7
    linear = 3 * (4 * 2 * hidden + 3 * (hidden + 48))  # inputs and outputs of all projections
    assert results["trained_parameters"] == 4 * linear + 2 * reads * hidden
    assert results["depth_parameters"] == 2 * reads * hidden == base.model.depth_attention.query.numel() * 2
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("loss")) == 6
    with Image.open(folder / "loss.png") as image:
        assert min(image.size) > 400


def held_out_loss(model, tokenizer, rows: list[dict], fraction: float) -> float:
    """Recomputed from the text, each example by itself."""
    limit, total, count = int(fraction * 2**63), 0.0, 0
    for row in rows:
        if data.text_hash(row["prompt"]) < limit:
            prompt = tokenizer(row["prompt"])["input_ids"]
            answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
            count += len(answer)
    assert count > 50
    return total / count


def test_held_out_loss(finished, tokenizer):
    """The reported loss is the mean over the answers' tokens of the held-out examples, packing aside; the saved
    adapter on a fresh base and the merged model both have it, the latter without PEFT."""
    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged").eval()
    assert isinstance(merged, attnres.AttnResForCausalLM) and not (folder / "merged" / "adapter_config.json").exists()
    assert merged.model.depth_attention.query.abs().max() > 0
    assert held_out_loss(merged, tokenizer, PROMPTS, 0.2) == pytest.approx(results["held_out_loss"], rel=1e-5)
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(folder / "model").eval()
    assert held_out_loss(adapted, tokenizer, PROMPTS, 0.2) == pytest.approx(results["held_out_loss"], rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(folder / "converted").eval()
    assert held_out_loss(base, tokenizer, PROMPTS, 0.2) == pytest.approx(results["held_out_loss_before"], rel=1e-5)
    assert results["merged_relative_error"] < 1e-5


METHODS = {
    "dora": ["--method=dora", "--bf16", "--gradient-checkpointing"],
    "full": ["--method=full", "--optimizer=muon"],
    "depth": ["--method=depth", "--mode=full", "--depth-lr-scale=2"],
    "lora-dropout": ["--lora-dropout=0.3", "--accumulate=2", "--no-packing"],
}


@pytest.mark.parametrize("name", METHODS)
def test_sigkill(name, server, donor, chats):
    """Each method trains what it says on chats; killed and started again, it ends with the same losses and weights."""
    command = [*RUN, "--seq-len=64", "--model", donor, "--data", chats, *METHODS[name]]
    server.run(*command, "--output", f"{name}-undisturbed")
    run = server.start(*command, "--output", name)
    assert run.wait_for((server.folder / name / "checkpoint-4").exists)
    run.kill()
    assert "going on from" in server.run(*command, "--output", name)
    folder, undisturbed = server.folder / name, server.folder / f"{name}-undisturbed"
    assert without_times(folder) == without_times(undisturbed)
    file = "adapter_model.safetensors" if "full" not in name and name != "depth" else "model.safetensors"
    weights, expected = (load_file(path / "model" / file) for path in (folder, undisturbed))
    assert weights.keys() == expected.keys() and all(torch.equal(weights[key], expected[key]) for key in expected)
    assert AutoTokenizer.from_pretrained(folder / "model").chat_template == examples.CHAT_TEMPLATE
    results = json.loads((folder / "results.json").read_text())
    assert results["held_out_loss"] < results["held_out_loss_before"]
    if file == "model.safetensors":
        base = load_folder(folder / "converted")
        changed = {key for key in weights if not torch.equal(weights[key].float(), base[key].float())}
        depth = {"model.depth_attention.query", "model.depth_attention.key_norm"}
        assert changed == depth if name == "depth" else changed > depth


@pytest.mark.slow
def test_compile(server, donor, prompts):
    """`--compile` trains and evaluates to the same losses, to rounding."""
    command = [*RUN, "--model", donor, "--data", prompts, "--steps=2", "--eval-steps=2", "--depth-every=0"]
    server.run(*command, "--output", "eager")
    server.run(*command, "--compile", "--output", "compiled")
    eager, compiled = (read_lines(server.folder / name / "metrics.jsonl") for name in ("eager", "compiled"))
    for name in ("loss", "held_out_loss"):
        losses, expected = ([line[name] for line in lines if name in line] for lines in (compiled, eager))
        assert len(losses) == 2 and losses == pytest.approx(expected, rel=1e-4)


def test_compare(server, donor, chats):
    """All methods start from one converted base on the same batches, and end in one table and one figure."""
    short = [*RUN, "--steps=2", "--save-steps=2", "--depth-every=0", "--eval-steps=2"]
    server.run(*short, "--model", donor, "--data", chats, "--compare", "lora,depth", "--output", "compared")
    folder = server.folder / "compared"
    results = json.loads((folder / "comparison.json").read_text())["runs"]
    assert list(results) == ["lora", "depth"] and (folder / "comparison.png").stat().st_size > 5000
    metrics = [read_lines(server.folder / run["output"] / "metrics.jsonl") for run in results.values()]
    assert metrics[0][0] == metrics[1][0] and metrics[0][1]["loss"] == metrics[1][1]["loss"]
    assert results["lora"]["held_out_loss"] != results["depth"]["held_out_loss"]
    lines = (folder / "comparison.md").read_text().splitlines()
    for (name, run), line in zip(results.items(), lines[2:], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:2] == [name, f"{run['held_out_loss']:.4f}"]
        assert cells[4:] == [f"{run['trained_parameters']:,}", f"{run['depth_parameters']:,}"]
    assert not list(folder.glob("*/converted"))
    # one with a base of its own is added, and the others are not trained again
    before = [(folder / name / "results.json").stat().st_mtime_ns for name in results]
    added = ["--compare", "lora,depth,full:mode=donor", "--output", "compared"]
    server.run(*short, "--model", donor, "--data", chats, *added)
    grown = json.loads((folder / "comparison.json").read_text())["runs"]
    assert list(grown) == [*results, "full mode=donor"] and grown["lora"] == results["lora"]
    assert [(folder / name / "results.json").stat().st_mtime_ns for name in results] == before
    assert grown["full mode=donor"]["depth_parameters"] == 0


@pytest.mark.parametrize("quantization", adapters.QUANTIZATIONS)
def test_qlora(quantization, server, donor, prompts):
    """On a quantised base adapters and depth attention learn; depth attention stays in float32; the merged model has
    the quantised weights, and computes the same without PEFT."""
    pytest.importorskip(adapters.QUANTIZATIONS[quantization])
    output = f"qlora-{quantization}"
    options = ["--method=qlora", "--quantization", quantization, "--merge", "--output", output]
    server.run(*RUN, "--model", donor, "--data", prompts, *options)
    results = json.loads((server.folder / output / "results.json").read_text())
    assert results["held_out_loss"] < results["held_out_loss_before"] - 0.01
    assert results["merged_relative_error"] < 1e-5
    saved = load_file(server.folder / output / "model" / "adapter_model.safetensors")
    query = saved["base_model.model.model.depth_attention.query"]
    assert query.dtype == torch.float32 and query.abs().max() > 0
    source = load_folder(server.folder / output / "converted")
    merged = AutoModelForCausalLM.from_pretrained(server.folder / output / "merged")
    assert getattr(merged.config, "quantization_config", None) is None
    key = "model.embed_tokens.weight"
    assert torch.equal(merged.state_dict()[key], source[key])
    model = AutoModelForCausalLM.from_pretrained(
        server.folder / output / "converted", quantization_config=adapters.quantization_config(quantization, False)
    )
    model = adapters.prepare_quantized(model)
    layer = model.model.layers[1].mlp.up_proj
    assert type(layer).__name__ == "Linear4bit" or type(layer.weight).__name__ != "Parameter"
    assert model.model.depth_attention.query.dtype == torch.float32
    # the adapter goes with the quantised base
    adapted = adapters.load_adapter(model, str(server.folder / output / "model")).eval()
    ids = random_tokens(2, 9)
    with torch.no_grad():
        assert relative_error(merged.eval()(ids).logits, adapted(ids).logits) < 1e-5


def test_training_on_an_adapter(server, finished, prompts):
    """`--adapter` goes on with a saved adapter on its base, from the loss where it was left."""
    folder, _ = finished
    options = ["--model", folder / "converted", "--adapter", folder / "model", "--output", "further"]
    server.run(*ON_AN_ADAPTER, "--data", prompts, *options)
    results, before = (json.loads((f / "results.json").read_text()) for f in (server.folder / "further", folder))
    assert results["held_out_loss_before"] == pytest.approx(before["held_out_loss"], rel=1e-5)
    assert results["held_out_loss"] < before["held_out_loss"]


def test_training_on_an_adapter_without_depth_attention(server, finished, prompts):
    """It may be gone on with, and a line says what isn't trained."""
    base = AutoModelForCausalLM.from_pretrained(finished[0] / "converted")
    adapted = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    adapted.save_pretrained(server.folder / "plain")
    options = ["--model", finished[0] / "converted", "--adapter", "plain", "--output", "plain-further", "--steps=1"]
    printed = server.run(*ON_AN_ADAPTER, "--data", prompts, *options)
    assert printed.count("the adapter plain has no depth attention, which stays as it is") == 1
    assert json.loads(printed.splitlines()[-1])["depth_parameters"] == 0


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is there")
def test_comparison_that_lacks_a_package(server, donor, prompts):
    """What one of the methods needs is missed before the others are trained."""
    options = ["--model", donor, "--data", prompts, "--compare=lora,qlora", "--output", "lacking"]
    printed = server.run(*RUN, *options, exit_code=1)
    assert printed.splitlines() == ["finetune: --quantization nf4 needs bitsandbytes: pip install bitsandbytes"]
    assert not (server.folder / "lacking").exists()


# Adapters


def random_adapter(model, dora: bool = False):
    """An adapter whose every tensor, depth attention included, is away from its initial value."""
    adapted = adapters.new_adapter(model, rank=3, alpha=6, dropout=0.0, dora=dora)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapted.eval()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_adapters_of_families(family, tmp_path):
    """An adapter on a trained model of any family is saved, reloaded on a fresh base, merged and unmerged with equal
    logits; the merged model is saved and loads without PEFT; every linear layer but the head is adapted."""
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "base")
    ids = random_tokens(2, 9)
    plain = model(ids, use_cache=False).logits
    names = adapters.linear_layers(model)
    adapted = random_adapter(model, dora=family in ("llama", "phi3"))
    linear = {name for name, module in adapted.named_modules() if isinstance(module, peft.tuners.lora.Linear)}
    assert {name.split(".")[-1] for name in linear} == set(names) and len(linear) > 5 * 3
    assert not any("head" in name or "router" in name or name.endswith(".gate") for name in linear)
    expected = adapted(ids, use_cache=False).logits
    assert relative_error(expected, plain) > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    write_json(tmp_path / "adapter" / "base.json", adapters.describe_base(fresh))
    reloaded = adapters.load_adapter(fresh, str(tmp_path / "adapter")).eval()
    assert relative_error(reloaded(ids, use_cache=False).logits, expected) == 0
    by_peft = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    ).eval()
    assert relative_error(by_peft(ids, use_cache=False).logits, expected) == 0
    # rounding, which expert routers can amplify
    reloaded.merge_adapter()
    assert relative_error(reloaded(ids, use_cache=False).logits, expected) < 1e-4
    reloaded.unmerge_adapter()
    assert relative_error(reloaded(ids, use_cache=False).logits, expected) < 1e-4
    with reloaded.disable_adapter():
        assert relative_error(reloaded(ids, use_cache=False).logits, plain) < 1e-4
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    merged = adapters.load_adapter(base, str(tmp_path / "adapter")).merge_and_unload(safe_merge=True)
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert not any("lora" in name for name, _ in loaded.named_parameters())
    assert relative_error(loaded(ids, use_cache=False).logits, expected) < 1e-4


@torch.no_grad()
def test_adapters_by_transformers(tmp_path):
    """transformers' own adapters, without PEFT's wrapper, are switched off and on with depth attention."""
    model = tiny_model().eval()
    ids = random_tokens(2, 9)
    plain = model(ids, use_cache=False).logits
    random_adapter(model).save_pretrained(tmp_path)
    model = tiny_model().eval()
    model.load_adapter(str(tmp_path))
    expected = model(ids, use_cache=False).logits
    model.disable_adapters()
    assert torch.equal(model(ids, use_cache=False).logits, plain) and not torch.equal(expected, plain)
    model.enable_adapters()
    assert torch.equal(model(ids, use_cache=False).logits, expected)


def test_adapter_for_another_base(tmp_path):
    """Other sizes, other layers, another family and other weights are told in one line, with what differs."""
    model = tiny_model()
    write_json(tmp_path / "base.json", adapters.describe_base(model))
    random_adapter(model).save_pretrained(tmp_path)

    def refusal(model):
        with pytest.raises(InputError) as error:
            adapters.load_adapter(model, str(tmp_path))
        assert "for another base" in str(error.value) and "\n" not in str(error.value)
        return str(error.value)

    other = perturb(tiny_model(), seed=5)
    assert "weights differ" in refusal(other)
    layers = tiny_model()
    with torch.no_grad():
        layers.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    assert "weights differ" in refusal(layers)
    for name, value in {"attn_res_mode": "full", "attn_res_block_size": 3, "attn_res_sum_scale": True}.items():
        assert f"with {name} = " in refusal(tiny_model(**{name: value}))
    for dtype in (torch.bfloat16, torch.float16):
        adapters.load_adapter(tiny_model().to(dtype), str(tmp_path))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=67, n_embd=40, n_layer=2, n_head=4))
    assert "with model_type = attnres; the model has gpt2" in refusal(gpt2)
    (tmp_path / "base.json").unlink()  # an adapter that PEFT alone has saved
    adapters.load_adapter(other, str(tmp_path))
    assert "is (11, 40) in it, here (11, 48)" in refusal(tiny_model(hidden_size=48))
    for layers in (3, 7):
        assert f"is (11, 40) in it, here ({2 * layers + 1}, 40)" in refusal(tiny_model(num_hidden_layers=layers))
    refusal(tiny_model("phi3"))
    refusal(gpt2)
    with pytest.raises(InputError, match="no adapter at"):
        adapters.load_adapter(tiny_model(), str(tmp_path / "nowhere"))


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("in_full", [True, False])
@torch.no_grad()
def test_adapters_of_embeddings(module, in_full, tmp_path):
    """Also an adapter that trains the embedding or the head, by LoRA or in full, is reloaded as it was."""
    saved = ["depth_attention", module] if in_full else ["depth_attention"]
    targets = ["q_proj"] if in_full else ["q_proj", module]
    adapted = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=targets, modules_to_save=saved))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    adapted.save_pretrained(tmp_path)
    ids = random_tokens(2, 9)
    reloaded = adapters.load_adapter(tiny_model(), str(tmp_path)).eval()
    assert relative_error(reloaded(ids).logits, adapted.eval()(ids).logits) == 0


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens"], ["q_proj"]])
@torch.no_grad()
def test_merging_into_tied_embeddings(targets, tmp_path):
    """An adapter of the embedding or of the head changes that one alone, also where both have the same weights; where
    neither has one, they stay tied."""
    adapted = peft.get_peft_model(tiny_model(tie_word_embeddings=True), peft.LoraConfig(target_modules=targets))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    ids = random_tokens(2, 9)
    expected = adapted.eval()(ids).logits
    adapters.untie_adapted(adapted)
    adapted.merge_and_unload(safe_merge=True).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert relative_error(loaded(ids).logits, expected) < 1e-5
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == (targets == ["q_proj"])


def damaged_adapter(folder: Path, kind: str) -> str:
    if kind == "prompt":
        tokens = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
        peft.get_peft_model(tiny_model(), tokens).save_pretrained(folder)
        return "tokens of its own"
    random_adapter(tiny_model()).save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "no adapter at"
    name, content = {"config": ("adapter_config.json", "[]"), "base": ("base.json", "[1]")}[kind]
    (folder / name).write_text(content)
    return f"{name} must hold a JSON object, not a list"


@pytest.mark.parametrize("kind", ["truncated", "config", "base", "prompt"])
def test_damaged_adapters(kind, tmp_path):
    """Files that were cut off or hold something else, and adapters that change the length of the text, are refused."""
    message = damaged_adapter(tmp_path, kind)
    with pytest.raises(InputError, match=message) as error:
        adapters.load_adapter(tiny_model(), str(tmp_path))
    assert "\n" not in str(error.value)


# Data


def decoded(row: dict, tokenizer) -> list[tuple[str, bool]]:
    """An example as stretches of text, and whether they are learned."""
    stretches = []
    for token, label in zip(row["input_ids"], row["labels"]):
        assert label in (IGNORED, token)
        if not stretches or stretches[-1][1] != (label != IGNORED):
            stretches.append(([], label != IGNORED))
        stretches[-1][0].append(token)
    return [(tokenizer.decode(ids, clean_up_tokenization_spaces=False), learned) for ids, learned in stretches]


def encoded(rows: list[dict], tokenizer, columns=("messages",)) -> datasets.Dataset:
    rows = datasets.Dataset.from_list(rows).select_columns(list(columns))
    return examples.encoded_examples(rows, tokenizer, "data")


@pytest.fixture
def chat_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    own = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    examples.set_chat_template(own)
    return own


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_chat_labels(chat_tokenizer):
    """Assistant turns with their end are learned, nothing else is; the text is the chat template's."""
    rows = encoded([CHATS[12]], chat_tokenizer)
    prompt, answer = CHATS[12]["messages"][1]["content"], CHATS[12]["messages"][2]["content"]
    assert decoded(rows[0], chat_tokenizer) == [
        (f"<bos><|im_start|>system\nBe brief.<eos>\n<|im_start|>user\n{prompt}<eos>\n<|im_start|>assistant\n", False),
        (f"{answer}<eos>", True),
        ("\n<|im_start|>user\nAnd?<eos>\n<|im_start|>assistant\n", False),
        ("No.<eos>", True),
    ]
    # what transformers itself makes of the template, but for the white space after the last answer
    whole = chat_tokenizer.apply_chat_template(
        CHATS[12]["messages"], return_assistant_tokens_mask=True, return_dict=True
    )
    length = len(rows[0]["input_ids"])
    assert whole["input_ids"][:length] == rows[0]["input_ids"]
    assert chat_tokenizer.decode(whole["input_ids"][length:]) == "\n"
    assert [label != IGNORED for label in rows[0]["labels"]] == list(map(bool, whole["assistant_masks"][:length]))


def test_content_in_parts(chat_tokenizer):
    """Content that is given as a list of parts is their text; what isn't text is refused."""
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "dog"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": [parts[1]]}]
    plain = [{"role": "user", "content": "one dog"}, {"role": "assistant", "content": "dog"}]
    rows = [encoded([{"messages": each}], chat_tokenizer)[0]["input_ids"] for each in (messages, plain)]
    assert rows[0] == rows[1]
    messages[0]["content"] = [*parts, {"type": "image", "text": None}]
    with pytest.raises(InputError, match="row 0 of data has a message with a part that isn't text, 'ima"):
        encoded([{"messages": messages}], chat_tokenizer)


TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | map(attribute='function') | map(attribute='name') | join(',') }};{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content or m.tool_calls[0].function.name }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_tools(chat_tokenizer):
    """Definitions of tools stand where the template puts them, as a list or as JSON; without such a template, calls of
    tools are refused."""
    call = {"type": "function", "function": {"name": "count", "arguments": "{}"}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    tools = [{"type": "function", "function": {"name": name, "parameters": {}}} for name in ("count", "sum")]
    with pytest.raises(InputError, match="row 0 of data doesn't go with the chat template: .* alone"):
        encoded([{"messages": messages}], chat_tokenizer)
    chat_tokenizer.chat_template = TOOLS_TEMPLATE
    for given in (tools, json.dumps(tools)):
        rows = encoded([{"messages": messages, "tools": given}], chat_tokenizer, ("messages", "tools"))
        assert decoded(rows[0], chat_tokenizer) == [("count,sum;<user>q<assistant>", False), ("count", True)]
    rows = encoded([{"messages": messages}], chat_tokenizer)
    assert decoded(rows[0], chat_tokenizer)[0] == ("<user>q<assistant>", False)


def test_rows_without_answer_are_counted(chat_tokenizer):
    """What nothing can be learned from is left out, and said to be."""
    turns = [[{"role": "user", "content": "q"}, {"role": role, "content": "a"}] for role in ("assistant", "gpt") * 4]
    rows = encoded([{"messages": messages} for messages in turns], chat_tokenizer)
    with pytest.raises(InputError, match="too little data: 4 examples with an answer, none"):
        examples.split_and_pack_examples(rows, seq_len=32, fraction=1e-9)
    turns = [[{**turn[0], "content": f"q{index}"}, turn[1]] for index, turn in enumerate(turns)]
    rows = encoded([{"messages": messages} for messages in turns], chat_tokenizer)
    *_, counts = examples.split_and_pack_examples(rows, seq_len=32, fraction=0.5)
    assert counts == {"examples": 4, "without_answer": 4, "truncated": 0}


def test_later_turns_are_cut_as_in_use():
    """Also by a tokenizer that puts a space in front of each stretch of text between special tokens."""
    words = {word: index for index, word in enumerate(["<unk>", "</s>", "▁[Q]", "▁[", "[", "Q", "]", "▁a", "▁", "a"])}
    model = models.BPE(words, [], unk_token="<unk>")
    backend = Tokenizer(model)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% else %}{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    turns = ["Q", "a", "Q", "a"]
    messages = [{"role": ("user", "assistant")[index % 2], "content": turn} for index, turn in enumerate(turns)]
    row = encoded([{"messages": messages}], tokenizer)[0]
    in_use = tokenizer(tokenizer.apply_chat_template(messages[:3], tokenize=False), add_special_tokens=False)
    assert row["input_ids"][: len(in_use["input_ids"])] == in_use["input_ids"]


def test_chat_template_that_drops_reasoning(chat_tokenizer):
    """Where earlier turns change once others follow, each turn is learned as it was first seen."""
    chat_tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content.split('|')[-1] if m.role == 'assistant' and not loop.last else m.content }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    turns = [("user", "q1"), ("assistant", "why|a1"), ("user", "q2"), ("assistant", "how|a2")]
    rows = encoded([{"messages": [{"role": r, "content": c} for r, c in turns]}], chat_tokenizer)
    assert [decoded(row, chat_tokenizer) for row in rows] == [
        [("<user>q1<assistant>", False), ("why|a1", True)],
        [("<user>q1<assistant>a1<user>q2<assistant>", False), ("how|a2", True)],
    ]


def test_prompt_labels(chat_tokenizer):
    """Completions with an end of text are learned, as text or as messages; messages of the prompt are context."""
    rows = encoded([{"prompt": "one dog", "completion": " ran"}], chat_tokenizer, ("prompt", "completion"))
    assert decoded(rows[0], chat_tokenizer) == [("<bos>one dog", False), (" ran<eos>", True)]
    assert rows[0]["input_ids"][:3] == chat_tokenizer("one dog")["input_ids"][:3]
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = encoded([{"prompt": [user, answer, user], "completion": [answer]}], chat_tokenizer, ("prompt", "completion"))
    stretches = decoded(rows[0], chat_tokenizer)
    assert [learned for _, learned in stretches] == [False, True] and stretches[1][0] == "b<eos>"


def test_end_of_text_is_there_once(chat_tokenizer):
    """A completion that has it gets no second one, a prompt keeps its own."""
    rows = encoded([{"prompt": "a<eos>", "completion": " b<eos>"}], chat_tokenizer, ("prompt", "completion"))
    assert decoded(rows[0], chat_tokenizer) == [("<bos>a<eos>", False), (" b<eos>", True)]


def test_tokens_after_a_text():
    """A tokenizer that begins every text with a space doesn't put one between prompt and answer."""
    words = {word: index for index, word in enumerate(["<unk>", "▁one", "▁dog", "▁", "dog", "s", "\n", "▁s"])}
    tokenizer = Tokenizer(models.BPE(words, [], unk_token="<unk>", fuse_unk=False))
    model = models.WordPiece(words, unk_token="<unk>", continuing_subword_prefix="")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert examples.tokens("dog", fast) == [words["▁dog"]]
    assert examples.tokens_after("dog", fast) == [words["dog"]]
    assert examples.tokens_after("dogs", fast) == [words["dog"], words["s"]]


@pytest.mark.parametrize("seq_len", [32, 80])
def test_packing(seq_len, chat_tokenizer):
    """Every example is in one sequence, whole but for what is longer than a sequence; nothing else is; no two
    sequences would fit into one."""
    rows = encoded(CHATS, chat_tokenizer)
    train, test, counts = examples.split_and_pack_examples(rows, seq_len, 0.3)
    assert 5 < len(test.lengths) < 50
    limit = int(0.3 * 2**63)
    seen, truncated = [], 0
    for packed, held_out in ((train, False), (test, True)):
        for index in range(len(packed)):
            item = packed[index]
            assert len(item["input_ids"]) <= seq_len
            starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
            parts = [item[name].tensor_split(starts[1:]) for name in ("input_ids", "labels", "position_ids")]
            for document, ids, labels, positions in zip(item["documents"].tolist(), *parts, strict=True):
                row = rows[document]  # each conversation is one example here
                assert (row["hash"] < limit) == held_out
                assert ids.tolist() == row["input_ids"][:seq_len] and labels.tolist() == row["labels"][:seq_len]
                assert positions.tolist() == list(range(len(ids)))
                truncated += len(row["input_ids"]) > seq_len
                seen.append(document)
    usable = [n for n, row in enumerate(rows) if any(label != IGNORED for label in row["labels"][:seq_len])]
    assert sorted(seen) == usable
    assert counts == {"examples": len(usable), "without_answer": 90 - len(usable), "truncated": truncated}
    fills = sorted(len(train[index]["input_ids"]) for index in range(len(train)))
    assert fills[0] + fills[1] > seq_len and (seq_len == 32 or len(train) < len(train.lengths))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt_oss", "kimi_linear"])
def test_attention_stays_within_examples(family, chat_tokenizer):
    """Packed and padded, each example has the logits and the loss that it has alone."""
    model = tiny_model(family, vocab_size=len(chat_tokenizer), max_position_embeddings=128)
    model = packing.separate_documents(model)
    rows = encoded(CHATS[:9], chat_tokenizer)
    packed = examples.PackedExamples(rows, 120)
    batch = examples.collate_padded([packed[0], packed[len(packed) - 1]], pad_token_id=0)
    assert (batch["labels"][1] == IGNORED).any() and len(batch["documents"]) > len(batch["input_ids"])
    documents = batch.pop("documents").tolist()
    with torch.no_grad():
        loss = model(**batch, use_cache=False).loss
        total, count = 0.0, 0
        for document in documents:
            ids, labels = (torch.tensor([rows[document][name]]) for name in ("input_ids", "labels"))
            number = (labels != IGNORED).sum().item()
            total, count = total + number * model(input_ids=ids, labels=labels).loss.item(), count + number
    assert loss.item() == pytest.approx(total / count, rel=1e-4)


def test_built_in_examples():
    """Functions of Python's library: prompt and completion make up a function, also as a chat."""
    functions = []
    for function in examples.stdlib_functions("3"):
        functions.append(function)
        if len(functions) == 200:
            break
    for function in functions:
        assert '"""' in function["prompt"] or "'" in function["prompt"]
        assert function["prompt"].lstrip().startswith(("def ", "async def ")) and function["completion"].strip()
    compiled = 0
    for function in functions:
        try:
            compile(function["prompt"] + function["completion"], "function", "exec")
            compiled += 1
        except SyntaxError:
            pass
    assert compiled >= 195  # a text that spans lines may begin further left
    chat = examples.as_chat(functions[0])["messages"]
    assert [message["role"] for message in chat] == ["user", "assistant"]
    assert functions[0]["prompt"] in chat[0]["content"] and chat[1]["content"] == functions[0]["completion"]


# Bad input

PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\xff\xfe"
BAD = {
    "empty file": (lambda d: ["--data", write(d / "empty.jsonl", "")], "is empty"),
    "text file": (lambda d: ["--data", write(d / "a.txt", "one\n\ntwo")], "neither a column 'messages' nor .*: text"),
    "image": (lambda d: ["--data", write(d / "image.jsonl", PNG)], "is not text|can't be read"),
    "latin-1": (
        lambda d: ["--data", write(d / "l.jsonl", '{"prompt": "kät", "completion": "x"}\n'.encode("latin-1"))],
        "l.jsonl is not text",
    ),  # fmt: skip
    "no rows": (lambda d: ["--data", write(d / "none.jsonl", "\n\n")], "none.jsonl is empty"),
    "unknown kind": (lambda d: ["--data", write(d / "image.png", PNG)], "unknown kind of file"),
    "missing file": (lambda d: ["--data", d / "absent.jsonl"], "doesn't exist"),
    "column": (lambda d: ["--data", write(d / "c.jsonl", [{"prompt": "x", "answer": "y"}])], "prompt, answer"),
    "named column": (lambda d: ["--columns", "question,answer"], "no column 'question'.*id, prompt, completion"),
    "not a chat": (lambda d: ["--columns", "prompt"], "row 0 of .* doesn't hold a list of messages"),
    "numbers": (lambda d: ["--columns", "id,prompt"], "row 0 of .* doesn't hold text, or a list"),
    "no answers": (
        lambda d: ["--data", write(d / "u.jsonl", [{"messages": [{"role": "user", "content": "x"}]}])],
        "no conversation has a turn of the assistant",
    ),
    "long prompts": (lambda d: ["--seq-len", 4], "none of the 90 examples has an answer within --seq-len 4"),
    "one row": (lambda d: ["--data", write(d / "one.jsonl", PROMPTS[:1])], "too little data: 1 example"),
    "long context": (lambda d: ["--seq-len", 97], "max_position_embeddings = 96"),
    "long context of a folder that is named as a model type": (
        lambda d: ["--model", "llama", "--seq-len", 97],
        "max_position_embeddings = 96",
    ),
    "model": (lambda d: ["--model", "nobody/nothing"], "nobody/nothing"),
    "adapter as model": (
        lambda d: ["--model", write(d / "adapter" / "adapter_config.json", "{}").parent],
        "no configuration at .*adapter: it is an adapter, which needs its base",
    ),
    "folder without a model": (lambda d: ["--model", d], "config.json is missing in "),
    "no tokenizer": (
        lambda d: ["--tokenizer", "nobody/nothing"],
        "no tokenizer at nobody/nothing.*; give --tokenizer\\.$",
    ),
    "target modules": (lambda d: ["--target-modules", "qq_proj"], "can't be adapted at qq_proj.*down_proj.*q_proj"),
    "no adapter": (lambda d: ["--adapter", d], "no adapter at"),
    "donor": (lambda d: ["--method", "depth", "--mode", "donor"], "no depth attention"),
    "foreign output": (lambda d: ["--output", write(d / "thesis" / "a.txt", "").parent], "choose another --output"),
}


@pytest.mark.parametrize("name", BAD)
def test_refuses(name, server, donor, prompts, tmp_path):
    """Bad input ends with one clear line and exit code 1, and leaves nothing behind."""
    arguments, message = BAD[name]
    options = arguments(tmp_path)
    run = ON_AN_ADAPTER if "--adapter" in options else RUN
    printed = server.run(*run, "--model", donor, "--data", prompts, "--output", tmp_path / "out", *options, exit_code=1)
    line = printed.splitlines()[-1]
    assert len(printed.splitlines()) == 1 and line.startswith("finetune: "), printed
    assert re.search(message, line), line
    assert not (tmp_path / "out").exists()


def test_refuses_adapter_of_another_base(server, finished, prompts, donor, tokenizer):
    """Other weights and other shapes are told apart from the right base."""
    folder, _ = finished
    other = AutoModelForCausalLM.from_pretrained(folder / "converted")
    perturb(other).save_pretrained(server.folder / "other")
    tokenizer.save_pretrained(server.folder / "other")
    options = [*ON_AN_ADAPTER, "--data", prompts, "--adapter", folder / "model", "--output", "refused"]
    for model in ("other", "kimi-like"):
        if model == "kimi-like":
            shutil.copytree(server.folder / "other", server.folder / model)
            tiny_model("phi3", vocab_size=len(tokenizer)).save_pretrained(server.folder / model)
        printed = server.run(*options, "--model", model, exit_code=1)
        assert len(printed.splitlines()) == 1 and "is for another base, " in printed, printed
        assert str(folder / "converted") in printed
    assert not (server.folder / "refused").exists()


@pytest.mark.parametrize(
    "options",
    [
        "--compare lora,lore",
        "--method full --adapter x",
        "--columns a,b,c",
        "--epochs 0",
        "--optimizer muon --method depth",
    ],
)
def test_checks_options(options, server):
    """Options that can't work together are refused before anything is read."""
    printed = server.run("--model", "x", "--output", "none", *options.split(), exit_code=2)
    assert "finetune.py: error: " in printed and not (server.folder / "none").exists()


def test_help(server):
    """`--help` begins with what the script is for and explains every option."""
    printed = server.run("--help")
    assert "Fine-tunes a model with Attention Residuals" in printed and "python scripts/finetune.py --model" in printed


# TRL


@pytest.fixture
def trl():
    return pytest.importorskip("trl")


def lora():
    return peft.LoraConfig(r=4, target_modules="all-linear", modules_to_save=["depth_attention"], task_type="CAUSAL_LM")


def trl_options(folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "max_length": 64,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def trained_tensors(model) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.named_parameters() if tensor.requires_grad}


def test_trl_sft(trl, chat_tokenizer, tmp_path):
    """TRL's SFTTrainer trains a LoRA adapter and depth attention on chats, on assistant turns alone."""
    model = tiny_model(vocab_size=len(chat_tokenizer))
    trainer = trl.SFTTrainer(
        model,
        args=trl.SFTConfig(**trl_options(tmp_path), assistant_only_loss=True),
        train_dataset=datasets.Dataset.from_list(CHATS[:16]),
        processing_class=chat_tokenizer,
        peft_config=lora(),
    )
    before = trained_tensors(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    changed = {name for name, tensor in trained_tensors(trainer.model).items() if not torch.equal(tensor, before[name])}
    assert sum("depth_attention.modules_to_save" in name for name in changed) == 2 and len(changed) > 50


def test_trl_dpo(trl, chat_tokenizer, tmp_path):
    """TRL's DPOTrainer starts at log 2, as the adapter's base is the reference, depth attention included, and trains
    depth attention under LoRA."""
    model = tiny_model(vocab_size=len(chat_tokenizer))
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": " no"} for row in PROMPTS[:16]]
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(**trl_options(tmp_path)),
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=chat_tokenizer,
        peft_config=lora(),
    )
    before = trained_tensors(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-5) and losses[-1] < losses[0]
    after = trained_tensors(trainer.model)
    for name, tensor in after.items():
        if "depth_attention.modules_to_save" in name:
            assert not torch.equal(tensor, before[name])
    original = trainer.model.base_model.model.model.depth_attention.original_module
    assert torch.equal(original.query, tiny_model(vocab_size=len(chat_tokenizer)).model.depth_attention.query)
