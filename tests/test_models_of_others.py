# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Models and adapters that somebody else wrote: read, or refused with one line, by all scripts that take one."""

import json
import os
import shutil
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from attnres_commands import evaluate_model, finetune, generate, plot_depth_attention, pretrain
from attnres_convert import InputError, reading
from attnres_recipes.data import train_tokenizer
from attnres_recipes.loading import load_weights
from attnres_recipes.process import enough_memory
from convert_models import edit_json
from families import tiny_donor, tiny_model
from marks import mostly_slow
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))

import quickstart  # noqa: E402


SECONDS = 60


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """An AttnRes model in one file, one in shards, a donor, an adapter of the model, a text and conversations."""
    root = tmp_path_factory.mktemp("others")
    tokenizer = train_tokenizer(["import this", "def main"] * 3, 280)
    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "max_position_embeddings": 64}
    for name, model, shard in (
        ("model", tiny_model(**sizes), "1GB"),
        ("shards", tiny_model(**sizes), "60KB"),
        ("donor", tiny_donor(**sizes), "1GB"),
    ):
        model.save_pretrained(root / name, max_shard_size=shard)
        tokenizer.save_pretrained(root / name)
    base = AutoModelForCausalLM.from_pretrained(root / "model")
    config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(root / "adapter")
    (root / "text.txt").write_text("\n\n".join(f"def number_{i}(): return {i * i}" for i in range(60)))
    rows = [{"prompt": f"def f{i}", "completion": f"(): return {i}"} for i in range(40)]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    """No network, a cache of its own, no progress bars."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.trainer.Trainer._get_output_dir", lambda self, trial: self.args.output_dir)


def training(models: Path, output: Path) -> dict:
    """Each script that reads a model, as arguments around it."""
    common = ["--steps", 1, "--batch-size", 2, "--seq-len", 32, "--depth-every", 0, "--output", output / "out"]
    data = ["--data", models / "text.txt"]
    return {
        "generate": (generate, lambda model: [model, "--prompt", "import", "--max-new-tokens", 3]),
        "evaluate": (evaluate_model, lambda model: [model, *data, "--seq-len", 32, "--output", output / "out"]),
        "plot": (
            plot_depth_attention,
            lambda model: (
                [model, "--text", models / "text.txt", "--sequences", 1, "--seq-len", 16] + ["--output", output / "out"]
            ),
        ),
        "pretrain": (pretrain, lambda model: ["--model", model, *data, *common]),
        "finetune": (finetune, lambda model: ["--model", model, "--data", models / "rows.jsonl", *common]),
        "adapter": (
            finetune,
            lambda model: ["--model", models / "model", "--adapter", model, "--data", models / "rows.jsonl", *common],
        ),
    }


def run(script: str, models: Path, model: Path, output: Path, *more) -> str | None:
    """The line that a script ends with, if it doesn't work."""
    module, arguments = training(models, output)[script]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module.main([*map(str, arguments(model)), *map(str, more)])
    except SystemExit as exit:
        return exit.code
    return None


def assert_one_line(line):
    assert isinstance(line, str) and line.count(": ") and "\n" not in line and len(line) <= 300, line


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def write(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def cut(name: str):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def pipe(name: str):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return change


def endless(name: str):
    def change(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("/dev/zero")

    return change


def generation(**values):
    return write("generation_config.json", json.dumps(values))


SLOW = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
MODELS = {
    **{f"config.json {text}": write("config.json", text) for text in ("5", "null", "[]", "", "{", "[" * 5000)},
    "model_type list": config(model_type=[]),
    "model_type unknown": config(model_type="mine"),
    "architectures number": config(architectures=5),
    "output_hidden_states text": config(output_hidden_states="16"),
    "layers": config(num_hidden_layers=100_000),
    "layers in reach": config(num_hidden_layers=9_000),
    "layers text": config(num_hidden_layers="two"),
    "hidden size": config(hidden_size=10**12),
    "hidden size that fits no tensor": config(hidden_size=100_000),
    "vocabulary": config(vocab_size=10**9),
    "heads": config(num_attention_heads=0),
    "auto_map list": config(auto_map=["x"]),
    "rope": config(rope_parameters=5),
    "activation": config(hidden_act=[1]),
    "dtype": config(dtype="float99"),
    "quantization_config text": config(quantization_config="x"),
    "quantization_config empty": config(quantization_config={}),
    "config.json pipe": pipe("config.json"),
    "config.json endless": endless("config.json"),
    "config.json folder": lambda folder: ((folder / "config.json").unlink(), (folder / "config.json").mkdir()),
    "model.safetensors pipe": pipe("model.safetensors"),
    "model.safetensors cut": cut("model.safetensors"),
    "model.safetensors empty": write("model.safetensors", ""),
    "model.safetensors missing": lambda folder: (folder / "model.safetensors").unlink(),
    "tokenizer.json cut": cut("tokenizer.json"),
    "tokenizer.json list": write("tokenizer.json", "[]"),
    "tokenizer.json number": write("tokenizer.json", '{"version": "1.0", "model": 5}'),
    "tokenizer.json endless": endless("tokenizer.json"),
    "tokenizer_config.json list": write("tokenizer_config.json", "[1]"),
    "tokenizer_config.json class": write("tokenizer_config.json", '{"tokenizer_class": 5}'),
    "tokenizer_config.json cut": cut("tokenizer_config.json"),
    "some pipe": pipe("special_tokens_map.json"),
    "generation_config.json pipe": pipe("generation_config.json"),
}
FINE = {
    "output_hidden_states": config(output_hidden_states=True),
    "output_attentions": config(output_attentions=True),
    "output_depth_attentions": config(output_depth_attentions=True),
    "return_dict": config(return_dict=False),
    "use_cache": config(use_cache=False),
    "no quantization": config(quantization_config=None),
    "all null": config(output_hidden_states=None, return_dict=None, architectures=None),
    "encoder": config(is_encoder_decoder=True),
    "is_decoder": config(is_decoder=True, add_cross_attention=True),
}
GENERATION = {
    "return dict": generation(return_dict_in_generate=True),
    "cut": write("generation_config.json", '{"a'),
    "list": write("generation_config.json", "[1]"),
    "temperature": generation(temperature="hot", do_sample=True),
    "negative": generation(max_length=-1, top_k=-5, top_p=9.0, do_sample=True),
    "beams": generation(num_beams=10**9),
    "sequences": generation(num_return_sequences=10**9, do_sample=True),
    "end": generation(eos_token_id="x"),
    "end beyond": generation(eos_token_id=10**12),
    "pad beyond": generation(pad_token_id=10**12),
    "cache": generation(cache_implementation="mine"),
    "code": generation(custom_generate="absent/absent"),
    "processors": generation(bad_words_ids=5, suppress_tokens="x"),
    "penalty": generation(repetition_penalty=-3.0),
    "strings": generation(stop_strings=["a"]),
    "lengths": generation(min_length=10**12, min_new_tokens=10**12),
    "contrast": generation(penalty_alpha=0.6, dola_layers="high"),
    "assistant": generation(prompt_lookup_num_tokens=10, num_assistant_tokens=5),
    "guidance": generation(guidance_scale=1.5),
    "watermark": generation(watermarking_config={"greenlist_ratio": "x"}),
    "compile": generation(compile_config={"mode": "mine"}),
}
SHARDS = {
    "shard missing": lambda folder: next(folder.glob("*00001*.safetensors")).unlink(),
    "index list": write("model.safetensors.index.json", "[]"),
    "index of numbers": write("model.safetensors.index.json", '{"weight_map": {"a": 5}}'),
    "index text": write("model.safetensors.index.json", '{"weight_map": "a"}'),
    "index of itself": write("model.safetensors.index.json", '{"weight_map": {"a": "../config.json"}}'),
}
ADAPTERS = {
    "[]": write("adapter_config.json", "[]"),
    "base number": lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path=5),
    "base missing": lambda folder: edit_json(folder / "adapter_config.json", base_model_name_or_path="./absent"),
    "targets": lambda folder: edit_json(folder / "adapter_config.json", target_modules="("),
    "slow targets": lambda folder: edit_json(folder / "adapter_config.json", target_modules="(([a-z_.]+)+)+[0-9]$"),
    "targets number": lambda folder: edit_json(folder / "adapter_config.json", target_modules=[5]),
    "rank 0": lambda folder: edit_json(folder / "adapter_config.json", r=0),
    "large rank": lambda folder: edit_json(folder / "adapter_config.json", r=10**9),
    "rank pattern": lambda folder: edit_json(folder / "adapter_config.json", rank_pattern={"q_proj": 10**9}),
    "rank pattern list": lambda folder: edit_json(folder / "adapter_config.json", rank_pattern=[1]),
    "alpha": lambda folder: edit_json(folder / "adapter_config.json", lora_alpha="x"),
    "kind": lambda folder: edit_json(folder / "adapter_config.json", peft_type="MINE"),
    "no kind": lambda folder: edit_json(folder / "adapter_config.json", peft_type=...),
    "modules": lambda folder: edit_json(folder / "adapter_config.json", modules_to_save=5),
    "base.json list": write("base.json", "[]"),
    "base.json cut": write("base.json", '{"a'),
    "base.json number": write("base.json", '{"fingerprint": 5}'),
    "weights cut": cut("adapter_model.safetensors"),
    "weights pipe": pipe("adapter_model.safetensors"),
    "weights missing": lambda folder: (folder / "adapter_model.safetensors").unlink(),
    "unknown field": lambda folder: edit_json(folder / "adapter_config.json", init_lora_weights=[5]),
}


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", [*MODELS, *SHARDS])
def test_malformed_models(name, models, tmp_path):
    """Whatever is wrong with a model: each script says so in one line, soon, and leaves nothing behind."""
    folder = shutil.copytree(models / ("shards" if name in SHARDS else "model"), tmp_path / "model")
    (MODELS | SHARDS)[name](folder)
    for script in ("generate", "evaluate", "pretrain", "finetune"):
        assert_one_line(run(script, models, folder, tmp_path))
        assert not (tmp_path / "out").exists()


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_malformed_adapters(name, models, tmp_path, monkeypatch):
    """Whatever is wrong with an adapter, as with a model."""
    monkeypatch.setattr("attnres_recipes.adapters.SECONDS", 2)
    folder = shutil.copytree(models / "adapter", tmp_path / "adapter")
    ADAPTERS[name](folder)
    for script in ("generate", "adapter"):
        if not (script == "adapter" and name.startswith("base ")):  # the base is given
            assert_one_line(run(script, models, folder, tmp_path))
            assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", mostly_slow(FINE, "output_hidden_states", "return_dict"))
def test_what_a_configuration_asks_for(name, models, tmp_path):
    """A configuration that asks for other outputs, or for no cache, works in all scripts."""
    folder = shutil.copytree(models / "model", tmp_path / "model")
    FINE[name](folder)
    for script in ("generate", "evaluate", "plot", "pretrain", "finetune"):
        assert run(script, models, folder, tmp_path) is None, script
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", GENERATION)
def test_silly_generation(name, models, tmp_path):
    """A generation_config.json of any content gives text or one line."""
    folder = shutil.copytree(models / "model", tmp_path / "model")
    GENERATION[name](folder)
    line = run("generate", models, folder, tmp_path)
    if line is not None:
        assert_one_line(line)


@pytest.mark.parametrize(
    "template", [SLOW, "{{ 1 / 0 }}", "{% for", "{{ messages.absent.absent }}", "{{ raise_exception(5) }}"]
)
def test_chat_templates(template, models, tmp_path, monkeypatch):
    """A chat template that fails or doesn't come to an end is one line, in a chat and in training."""
    monkeypatch.setattr("attnres_recipes.examples.TEMPLATE_SECONDS", 1)
    folder = shutil.copytree(models / "model", tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 9)
    for script, more in (("generate", []), ("finetune", ["--data", tmp_path / "chat.jsonl"])):
        line = run(script, models, folder, tmp_path, *more)
        assert_one_line(line)
        assert "1 seconds" in line if template == SLOW else True


def write_gpt_oss(folder: Path, models: Path):
    """GPT-OSS as it is published: experts in blocks of 32 numbers of four bits with a scale."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_local_experts": 4, "num_hidden_layers": 2}
    model = tiny_donor("gpt_oss", **sizes, vocab_size=300, max_position_embeddings=64).to(torch.bfloat16)
    model.save_pretrained(folder)
    tensors, generator = dict(model.state_dict()), torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape, options = (experts, outputs, inputs // 32), {"generator": generator, "dtype": torch.uint8}
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), **options)
        tensors[f"{name}_scales"] = torch.randint(118, 122, shape, **options)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    for path in (models / "donor").glob("tokenizer*"):
        shutil.copy(path, folder)


@pytest.mark.parametrize("kind", ["pretrain", "full", "lora"])
def test_gpt_oss_as_published(kind, models, tmp_path):
    """MXFP4 weights are trained as plain numbers: what is saved loads completely, is resumed and merged, and starts
    from what transformers reads."""
    write_gpt_oss(tmp_path / "oss", models)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "oss", dtype=torch.float32).state_dict()
    script, more = ("pretrain", []) if kind == "pretrain" else ("finetune", ["--method", kind, "--merge"])
    more += ["--steps", 2, "--save-steps", 1, "--learning-rate", 1e-12, "--weight-decay", 0]
    assert run(script, models, tmp_path / "oss", tmp_path, *more) is None
    out = tmp_path / "out"
    for path in ("results.json", "checkpoint-2", "model"):
        path = out / path
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert run(script, models, tmp_path / "oss", tmp_path, *more) is None
    saved = out / ("merged" if kind == "lora" else "model")
    assert "quantization_config" not in json.loads((saved / "config.json").read_text())
    model, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    found = model.state_dict()
    for name, tensor in plain.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    assert run("generate", models, out / "model", tmp_path) is None


@pytest.mark.parametrize("method", ["gptq", "awq", "compressed-tensors", "torchao", "bitsandbytes", "mine"])
def test_quantised_checkpoints(method, models, tmp_path):
    """What can't be trained is refused before data are read, with what to do."""
    folder = shutil.copytree(models / "donor", tmp_path / "model")
    values = {"quant_method": method, **({"load_in_4bit": True} if method == "bitsandbytes" else {})}
    edit_json(folder / "config.json", quantization_config=values)
    absent = ["--data", tmp_path / "absent.jsonl"]
    methods = [["full"], ["depth"], ["lora", "--merge"], ["qlora", "--quantization", "int8"]]
    runs = [("pretrain", [])] + [("finetune", ["--method", *words]) for words in methods]
    for script, more in runs:
        line = run(script, models, folder, tmp_path, *absent, *more)
        assert_one_line(line)
        assert f"is quantised ({method})" in line and "give the checkpoint that it was made from" in line
        assert not (tmp_path / "out").exists()


def with_long_tokenizer(models: Path, name: str, folder: Path, tied: bool = False) -> Path:
    """A model whose tokenizer has a token and a padding token more than it has embeddings."""
    shutil.copytree(models / name, folder)
    if tied:
        edit_json(folder / "config.json", tie_word_embeddings=True)
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(len(tokenizer), 301)])
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    tokenizer.save_pretrained(folder)
    return folder


def test_tokens_without_embedding(models, tmp_path):
    """A tokenizer with more tokens than the model embeds works until one of them occurs."""
    folder = with_long_tokenizer(models, "model", tmp_path / "model")
    rows = (models / "rows.jsonl").read_text()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a<extra300>", "completion": "b"}\n' + rows)
    (tmp_path / "text.txt").write_text((models / "text.txt").read_text() + "\n\na<extra300>b")
    for script, option, value in (
        ("generate", "--prompt", "a<extra300>"),
        ("evaluate", "--data", tmp_path / "text.txt"),
        ("plot", "--text", tmp_path / "text.txt"),
        ("pretrain", "--data", tmp_path / "text.txt"),
        ("finetune", "--data", tmp_path / "rows.jsonl"),
    ):
        line = run(script, models, folder, tmp_path, option, value)
        assert_one_line(line)
        assert "'<extra300>', number 300, and the model embeds 300 tokens" in line and "--resize-embeddings" in line
        assert not (tmp_path / "out").exists()
        more = ["--no-packing"] if script == "finetune" else []
        assert run(script, models, folder, tmp_path, *more) is None
        if script in ("pretrain", "finetune"):
            assert run("generate", models, tmp_path / "out" / "model", tmp_path) is None
        shutil.rmtree(tmp_path / "out", ignore_errors=True)


@pytest.mark.parametrize("tied", [False, True])
def test_resized_embeddings(tied, models, tmp_path):
    """--resize-embeddings gives all tokens an embedding, tied or not; what is saved loads and resumes."""
    folder = with_long_tokenizer(models, "donor", tmp_path / "model", tied)
    (tmp_path / "text.txt").write_text((models / "text.txt").read_text() + "\n\na<extra300>b")
    (tmp_path / "rows.jsonl").write_text(
        '{"prompt": "a<extra300>", "completion": "b"}\n' + (models / "rows.jsonl").read_text()
    )
    for script, data in (("pretrain", tmp_path / "text.txt"), ("finetune", tmp_path / "rows.jsonl")):
        more = ["--data", data, "--resize-embeddings", "--steps", 2, "--save-steps", 1]
        more += ["--method", "full"] if script == "finetune" else []
        assert run(script, models, folder, tmp_path, *more) is None
        for path in ("results.json", "checkpoint-2", "model"):
            path = tmp_path / "out" / path
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert run(script, models, folder, tmp_path, *more) is None
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
        assert model.config.vocab_size == len(model.get_input_embeddings().weight) == 302
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
        before = load_file(folder / "model.safetensors")["model.embed_tokens.weight"].mean(0)
        new = model.get_input_embeddings().weight[300:].mean(0)
        assert (new - before).abs().max() < 0.1
        assert run("generate", models, tmp_path / "out" / "model", tmp_path, "--prompt", "a<extra300>") is None
        shutil.rmtree(tmp_path / "out")


def test_adapters_keep_embeddings(models, tmp_path, capsys):
    """--resize-embeddings with an adapter is refused."""
    assert run("finetune", models, models / "donor", tmp_path, "--resize-embeddings") == 2
    assert "an adapter leaves its base as it is" in capsys.readouterr().err


LINKS = ("LICENSE", "README.md", "chat_template.jinja", "tokenizer.json", "additional_chat_templates/a.jinja")


@pytest.mark.timeout(SECONDS)
@pytest.mark.parametrize("name", [*LINKS, "additional_chat_templates"])
def test_links_out_of_a_folder(name, models, tmp_path):
    """What training saves and somebody publishes never comes from outside the folders that were given."""
    folder, outside = shutil.copytree(models / "model", tmp_path / "model"), tmp_path / "outside"
    if name == "additional_chat_templates":
        outside.mkdir()
    elif (folder / name).exists():
        shutil.move(folder / name, outside)
    else:
        (folder / name).parent.mkdir(exist_ok=True)
        outside.write_text("secret")
    (folder / name).symlink_to(outside)
    for script in ("pretrain", "finetune"):
        for line in (
            run(script, models, folder, tmp_path),
            run(script, models, models / "model", tmp_path, "--tokenizer", folder),
        ):
            assert_one_line(line)
            assert "leaves the folder" in line and not (tmp_path / "out").exists()
    if name != LINKS[-1]:  # the only template has a name that nobody asks for
        assert run("generate", models, folder, tmp_path) is None
    adapter = shutil.copytree(models / "adapter", tmp_path / "adapter")
    (adapter / "LICENSE").symlink_to(outside)
    assert "leaves the folder" in run("adapter", models, adapter, tmp_path)


def test_config_folder_with_links(models, tmp_path):
    folder = shutil.copytree(models / "model", tmp_path / "model")
    (folder / "LICENSE").symlink_to(models / "text.txt")
    options = ["--config", folder, "--data", models / "text.txt", "--steps", 1, "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="leaves the folder"):
        pretrain.main(list(map(str, options)))


def test_weights_of_another_kind(models, tmp_path, capsys):
    """AttnRes weights never pass for those of a donor, and other weights that stay unused are named."""
    folder = shutil.copytree(models / "model", tmp_path / "model")
    shutil.copy(models / "donor" / "config.json", folder)
    for script in ("generate", "evaluate", "pretrain"):
        line = run(script, models, folder, tmp_path)
        assert_one_line(line)
        assert "AttnRes" in line and "config.json" in line
    folder = shutil.copytree(models / "donor", tmp_path / "donor")
    weights = load_file(folder / "model.safetensors")
    harmless = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "mtp.norm.weight": torch.ones(2)}
    save_file(weights | harmless, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    load_weights(str(folder))
    assert "doesn't use" not in capsys.readouterr().err
    save_file(weights | {"vision.weight": torch.ones(2)}, folder / "model.safetensors", {"format": "pt"})
    load_weights(str(folder))
    assert "1 tensors that a llama model doesn't use, such as vision.weight" in capsys.readouterr().err


class PanicException(BaseException):
    """As that of pyo3."""


def test_panics(models, tmp_path, monkeypatch):
    """A tokenizer that fails in Rust is one line."""
    with pytest.raises(InputError, match="what: no"), reading.understood("what"):
        raise PanicException("no")
    for kind in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(kind), reading.understood("what"), reading.no_panic():
            raise kind

    def panic(*_, **__):
        raise PanicException("index out of range")

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast._encode_plus", panic)
    for script in ("generate", "evaluate", "plot", "pretrain", "finetune"):
        line = run(script, models, models / "model", tmp_path)
        assert_one_line(line)
        assert "index out of range" in line


LONG = "x" * 300


def test_long_names(models, tmp_path):
    for script in ("generate", "evaluate", "plot", "pretrain", "finetune"):
        assert_one_line(run(script, models, LONG, tmp_path))
        assert_one_line(run(script, models, models / "model", tmp_path, "--tokenizer", LONG))
    assert_one_line(run("generate", models, models / "adapter", tmp_path, "--base", LONG))
    adapter = shutil.copytree(models / "adapter", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", base_model_name_or_path=LONG)
    assert_one_line(run("generate", models, adapter, tmp_path))


def test_text_that_is_no_utf8(models, tmp_path, monkeypatch, capsys):
    """A prompt that is no text is one line; in a session, the next one is answered."""
    for script in ("generate", "plot"):
        assert "--prompt" in (line := run(script, models, models / "model", tmp_path, "--prompt", "a\udcff")) or (
            "the prompt" in line
        )
        assert_one_line(line)
    (tmp_path / "lines").write_bytes(b"\xff\nimport\n")
    with open(tmp_path / "lines", encoding="utf-8") as lines:
        monkeypatch.setattr("sys.stdin", lines)
        capsys.readouterr()
        generate.main([str(models / "model"), "--max-new-tokens", "3", "--json"])
    found = capsys.readouterr()
    assert "generate: the prompt is no UTF-8 text." in found.err
    assert [answer["prompt"] for answer in json.loads(found.out.splitlines()[-1])["answers"]] == ["import"]


def test_folders_for_files(models, tmp_path):
    with pytest.raises(InputError, match="no regular file"), reading.open_regular(tmp_path):
        pass
    (tmp_path / "out" / "dynamics.png").mkdir(parents=True)
    assert_one_line(run("plot", models, models / "model", tmp_path))


def test_time_limit_at_any_moment():
    """Wherever the alarm finds the block, beginning and end too, nothing but the one line comes out of it."""
    ended = 0
    until = time.monotonic() + 3
    while time.monotonic() < until:
        try:
            with reading.time_limit(0.0005 + ended % 50 / 100_000, "it"), reading.understood("inner"):
                for i in range(ended * 37 % 4000):
                    with reading.understood("innermost"):
                        str(i)
        except InputError as error:
            assert "it was ended" in str(error)
        ended += 1
    assert ended > 50


def test_messages_are_short(models, tmp_path):
    """A text of any length in an error, such as that of a template, never comes out whole."""
    assert len(reading.reason(ValueError("x" * 10**7))) < 300
    folder = shutil.copytree(models / "model", tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{{ '%030000000d' % 1 }}")
    line = run("generate", models, folder, tmp_path)
    assert_one_line(line)
    assert "characters" in line


def refused(capsys, module, *options) -> str:
    with pytest.raises(SystemExit) as error:
        module.parse_arguments(["--output", "nowhere", *options])
    assert error.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_options_out_of_range(capsys):
    nested = "rope_parameters=" + "[" * 5000 + "]" * 5000
    assert "nested" in refused(capsys, pretrain, "--config", "llama", "--set", nested)
    for module, start in ((pretrain, ["--config", "llama"]), (finetune, ["--model", "a"])):
        for option in ("--batch-size", "--accumulate"):
            assert "out of range" in refused(capsys, module, *start, option, "1000001")
        assert "out of range" in refused(capsys, module, *start, "--num-workers", "1025")
    assert "out of range" in refused(capsys, pretrain, "--config", "llama", "--train-tokenizer", "10000001")
    assert "out of range" in refused(capsys, pretrain, "--config", "llama", "--num-proc", "1025")
    assert "out of range" in refused(capsys, finetune, "--model", "a", "--lora-rank", "65537")
    for option, value in (
        ("--depth-lr-scale", "-1"),
        ("--depth-lr-scale", "nan"),
        ("--continue-learning-rate", "0"),
        ("--seq-len", "1"),
        ("--seed", "-1"),
        ("--seed", str(2**32 - 1)),
        ("--lora-rank", "65537"),
    ):
        assert "out of range" in refused(capsys, quickstart, option, value)


def test_too_little_memory():
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")):
        with pytest.raises(InputError, match="isn't enough memory"), enough_memory():
            raise error
    with pytest.raises(RuntimeError, match="other"), enough_memory():
        raise RuntimeError("other")


def test_generation_that_returns_more(models, tmp_path):
    folder = shutil.copytree(models / "model", tmp_path / "model")
    edit_json(folder / "generation_config.json", return_dict_in_generate=True, output_scores=True)
    assert run("generate", models, folder, tmp_path) is None
