# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Cards of models that were trained and converted as users do it: what they say, and that their code runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from attnres_convert import convert_checkpoint
from attnres_convert.card import Card, Result, folder_card, public_path, renamed, shown, write_card
from attnres_recipes.card import mean_depth_weights, model_results, write_training_card
from attnres_recipes.data import stdlib_files
from behaviours import assert_close
from families import tiny_model
from huggingface_hub import ModelCard, metadata_load
from PIL import Image
from pretrain_process import SCRIPTS, TINY, Server
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification


sys.path.insert(0, str(SCRIPTS))

import pretrain  # noqa: E402


HUB_ID = "organisation/donor"
OF_THE_DONOR = {
    "license": "other",
    "license_name": "some-license",
    "license_link": "LICENSE",
    "language": ["en", "code"],
    "datasets": ["organisation/texts"],
    "tags": ["small"],
}
SHORT = ["--steps=3", "--save-steps=3", "--eval-steps=3", "--depth-every=0", "--batch-size=4"]
NUMBER = re.compile(r"(?<![\w./-])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w/]|\.\w)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cards")
        for name in ("HF_HUB_OFFLINE", "OMP_NUM_THREADS", "HF_DATASETS_CACHE", "PYTHONPATH"):
            patch.setenv(name, "")
        patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
        server = Server(folder, "finetune")  # which imports pretrain too
        yield server
        server.stop()


@pytest.fixture(scope="module")
def models(server) -> dict[str, Path]:
    """A donor; one that was trained on from it, when it was on the Hub; a LoRA adapter on that, and merged."""
    folder = server.folder
    (folder / "text").mkdir()
    source = "".join(file.read_text(errors="replace") for file in stdlib_files()[:12])
    for index in range(40):
        (folder / "text" / f"{index}.txt").write_text(source[900 * index : 900 * (index + 1)])
    rows = [
        {"prompt": source[40 * n : 40 * n + 20], "completion": source[40 * n + 20 : 40 * n + 40]} for n in range(60)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    server.script = "pretrain"
    data = [*SHORT, "--seq-len=32", "--held-out=0.2", "--data", folder / "text"]
    server.run(*TINY, *data, "--mode", "donor", "--output", "out/donor")
    donor = folder / "out" / "donor" / "model"

    repository = folder / "hub" / f"models--{HUB_ID.replace('/', '--')}"  # as if it had been downloaded
    shutil.copytree(donor, repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    card = repository / "snapshots" / ("a" * 40) / "README.md"
    huggingface_hub.metadata_save(card, {**metadata_load(card), **OF_THE_DONOR})

    (card.parent / "LICENSE").write_text("Some license.")
    server.run("--model", HUB_ID, *data, "--seed=7", "--output", folder / "out" / "continued")
    server.script = "finetune"
    lora = ["--model", "out/continued/model", "--data", folder / "pairs.jsonl", "--seq-len=48", "--held-out=0.2"]
    server.run(
        *lora, *SHORT, "--lora-rank=4", "--learning-rate=2e-4", "--depth-lr-scale=3", "--merge", "--output", "out/lora"
    )
    return {
        "donor": donor,
        "continued": folder / "out" / "continued" / "model",
        "lora": folder / "out" / "lora" / "model",
        "lora-merged": folder / "out" / "lora" / "merged",
    }


@pytest.fixture(scope="module")
def converted(server, models) -> Path:
    convert_checkpoint(models["donor"], server.folder / "converted", mode="full")
    return server.folder / "converted"


def results_of(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def section(card: str, name: str) -> str:
    return card.split(f"## {name}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str) -> dict[str, str]:
    return dict(line[2:-2].split(" | ", 1) for line in text.splitlines() if line.startswith("| "))


def numbers(value) -> set[str]:
    """All numbers in a JSON value, as a card shows them, and those in its texts."""
    if isinstance(value, dict):
        return numbers(list(value.values()))
    if isinstance(value, list):
        return set().union(*map(numbers, value))
    if isinstance(value, str):
        return set(NUMBER.findall(value))
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {shown(value), f"{value:g}"} if is_number else set()


def test_metadata(models):
    """What the Hub reads: taken over from the donor, and right for what each folder holds."""
    found = {name: metadata_load(folder / "README.md") for name, folder in models.items()}
    for name, metadata in found.items():
        assert metadata["pipeline_tag"] == "text-generation"
        assert metadata["library_name"] == ("peft" if name == "lora" else "transformers")
    donor = found.pop("donor")
    assert donor.keys() == {"library_name", "pipeline_tag", "model-index"}  # nothing is known about it
    relations = {name: metadata.pop("base_model_relation") for name, metadata in found.items()}
    assert relations == {"continued": "finetune", "lora": "adapter", "lora-merged": "finetune"}
    for name, metadata in found.items():
        assert metadata["base_model"] == HUB_ID
        expected = ["small", "attention-residuals", *(["lora"] if name == "lora" else [])]
        assert {key: metadata[key] for key in OF_THE_DONOR} == {**OF_THE_DONOR, "tags": expected}


def test_licence(models):
    """The text of the licence comes along with its name."""
    for name, folder in models.items():
        assert name == "donor" or (folder / "LICENSE").read_text() == "Some license."


def test_evaluation_results(models):
    """The results are in the Hub's form, with all digits of results.json, on text that needn't be on the Hub."""
    for name, folder in models.items():
        data, results = ModelCard.load(folder / "README.md").data, results_of(folder)
        loss, perplexity = data.eval_results
        assert data.model_name == name and (loss.metric_type, perplexity.metric_type) == ("loss", "perplexity")
        assert loss.metric_value == results["held_out_loss"]
        assert perplexity.metric_value == pytest.approx(torch.tensor(loss.metric_value).exp().item(), rel=1e-5)
        assert loss.task_type == "text-generation"
        text = "pairs.jsonl" if "lora" in name else "text"
        assert (loss.dataset_type, loss.dataset_name) == ("text", f"held-out part of {text}")
        run = json.loads((folder.parent / "results.json").read_text())
        assert run["held_out_loss"] == results["held_out_loss"]


def test_numbers(models, converted):
    """No number in what was measured or in how it was made that isn't in the folder's results.json."""
    for folder in [*models.values(), converted]:
        card, results = (folder / "README.md").read_text(), results_of(folder)
        known = numbers(results)
        sections = ["How it was made", *(["Results"] if folder != converted else [])]
        for name in sections:
            text = re.sub(r"```.*?```|`[^`]*`", "", section(card, name), flags=re.DOTALL)
            text = text.replace(str(results.get("versions", {}).get("device")), "")
            found = NUMBER.findall("\n".join(line for line in text.splitlines() if "| versions |" not in line))
            assert len(found) >= 2 and set(found) <= known, (folder, set(found) - known)
        for name, version in results["versions"].items():
            assert name in ("device", "threads") or f"{name} {version}" in card


def test_how_it_was_made(models, server, monkeypatch):
    """Command, data, tokens, seed, hardware and versions of the run; the command is that of the run."""
    monkeypatch.chdir(server.folder)
    for name in ("donor", "continued"):
        results, run = results_of(models[name]), json.loads((models[name].parent / "run.json").read_text())
        section_text = section((models[name] / "README.md").read_text(), "How it was made")
        command = section_text.split("```bash\n")[1].split("```")[0].replace("\\\n", "")
        assert shlex.split(command) == shlex.split(results["command"])
        program, *options = shlex.split(command)
        assert program == "attnres-pretrain"
        arguments = json.loads(json.dumps(pretrain.parse_arguments(options).settled().arguments))
        assert arguments["data"] == ["text"] and run["arguments"]["data"] == [str(server.folder / "text")]
        assert arguments == {name: {**run["arguments"], "data": ["text"]}[name] for name in arguments}
        made = rows(section_text)
        assert made["seed"] == str(run["arguments"]["seed"])
        assert made["tokens"].startswith(f"{3 * 4 * 32} in 3 steps") and made["data"].startswith("`text`, 40 documents")
        assert made["hardware"] == f"{run['versions']['device']}, 1 thread"
    assert made["made from"] == f"[{HUB_ID}](https://huggingface.co/{HUB_ID}), converted to Attention Residuals first"
    made = rows(section((models["lora"] / "README.md").read_text(), "How it was made"))
    assert made["made from"] == "`out/continued/model`" and made["method"] == "lora"


def test_no_paths_of_this_machine(models, server):
    """Neither the card nor the files beside it tell where they were made."""
    for folder in models.values():
        for file in ("README.md", "results.json", "depth_attention.json"):
            if (folder / file).exists():
                content = (folder / file).read_text()
                assert str(server.folder) not in content and "/tmp" not in content and str(Path.home()) not in content


def test_depth_weights(models):
    """The heat map and its numbers are those of the saved model; a donor has none and says so."""
    donor = (models["donor"] / "README.md").read_text()
    assert not list(models["donor"].glob("depth_attention*")) and "Depth weights" not in donor
    assert "plain residual stream" in donor and "trust_remote_code" not in donor and "bibtex" not in donor
    for name in ("continued", "lora", "lora-merged"):
        folder = models[name]
        assert "](depth_attention.png)" in section((folder / "README.md").read_text(), "Depth weights")
        with Image.open(folder / "depth_attention.png") as image:
            assert min(image.size) > 300 and len(image.convert("RGB").getcolors(1 << 20)) > 50
        weights = json.loads((folder / "depth_attention.json").read_text())["weights"]
        assert len(weights) == 7 and all(sum(read) == pytest.approx(1, abs=1e-5) for read in weights)
    state = load_file(models["lora-merged"] / "model.safetensors")
    assert state["model.depth_attention.query"].abs().max() > 0
    assert max(abs(weight - 1 / len(weights[-1])) for weight in weights[-1]) > 1e-4
    before = json.loads((models["continued"] / "depth_attention.json").read_text())["weights"]
    assert before != weights  # of the adapter's own depth attention


RUN_SNIPPETS = """
import json, sys
PROJECT = "attnres families_attnres modeling_attnres depth_mixers_attnres depth_attention_attnres configuration_attnres"
for name in (*PROJECT.split(), "attnres_convert"):
    sys.modules[name] = None  # as if the project weren't installed
import torch, transformers
tokens = torch.arange(3, 12)[None]
for name, code in json.loads(sys.argv[1]).items():
    names = {}
    exec(code, names)
    model = names["model"].eval()
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    torch.save((type(inner).__module__, model(tokens).logits.detach()), sys.argv[2] + "/" + name)
"""


def test_snippets(models, converted, server, tmp_path):
    """The code on each card runs as it is but for the repository's name, where the project isn't installed, and loads
    the model that was trained."""
    codes, expected = {}, {}
    for name, folder in {**models, "converted": converted}.items():
        card = (folder / "README.md").read_text()
        assert f"# {name}\n" in card
        code = section(card, "Use").split("```python\n")[1].split("```")[0]
        assert f'from_pretrained("{name}"' in code
        codes[name] = code.replace(f'"{name}"', json.dumps(os.path.relpath(folder, server.folder)))
        if name != "lora":
            expected[name] = AutoModelForCausalLM.from_pretrained(folder)(torch.arange(3, 12)[None]).logits
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", RUN_SNIPPETS, json.dumps(codes), str(tmp_path)]
    done = subprocess.run(command, cwd=server.folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("import") == len(codes)  # each continues it
    loaded = {name: torch.load(tmp_path / name) for name in codes}
    for name, (module, logits) in loaded.items():
        stock = "transformers.models.llama"
        assert module.startswith(stock if name == "donor" else "transformers_modules."), name
        if name == "lora":  # as it is once merged
            torch.testing.assert_close(logits, expected["lora-merged"], rtol=0, atol=1e-5)
            assert not torch.equal(logits, expected["continued"])
        else:
            assert_close(logits, expected[name])  # other code for the reads, that in the folder


def test_limits(models, converted):
    """They follow from what the run was: its tokens, its data, its base."""
    limits = {name: section((folder / "README.md").read_text(), "Limits") for name, folder in models.items()}
    parameters = results_of(models["donor"])["parameters"]
    assert f"With 384 tokens and {parameters:,} parameters it is for experiments" in limits["donor"]
    assert "limits of what it was made from" in limits["continued"] and "`text`" in limits["continued"]
    assert "weights of this base" in limits["lora"] and "weights of this base" not in limits["lora-merged"]
    assert all("Sequences longer than" in text and "safety" in text for text in limits.values())
    assert "no better than its source" in section((converted / "README.md").read_text(), "Limits")


def test_conversion(converted, models):
    """A converted model has the donor's card and results under other names, and its own numbers."""
    assert (converted / "DONOR_README.md").read_bytes() == (models["donor"] / "README.md").read_bytes()
    assert (converted / "DONOR_results.json").read_bytes() == (models["donor"] / "results.json").read_bytes()
    found = results_of(converted)["conversion"]
    card = (converted / "README.md").read_text()
    assert found["dtype"] == "float64" and found["tolerance"] == 1e-11 and found["donor_rounding"] is None
    assert f"logits {shown(found['relative_difference'])} (float64, at most 1.0e-11 is tolerated)" in card
    assert found["parameters_added"] == 2 * 7 * 32 and "| parameters added | 448 (" in card
    assert "in full mode, as here" in card.lower() and card.count("arXiv:2603.15031") == 1


def test_other_heads(tmp_path):
    """A classifier's card names its task and its class."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=99
    )
    LlamaForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    (tmp_path / "classifier" / "README.md").write_text("---\npipeline_tag: text-generation\ntags: [1]\n---\n")
    convert_checkpoint(tmp_path / "classifier", tmp_path / "converted")
    assert metadata_load(tmp_path / "converted" / "README.md")["pipeline_tag"] == "text-classification"
    assert (
        'AutoModelForSequenceClassification.from_pretrained("converted", trust_remote_code=True)'
        in (tmp_path / "converted" / "README.md").read_text()
    )


def test_data_of_the_hub(models):
    """A data set of the Hub is named by its id; of Python's library, the version is told."""
    results = results_of(models["donor"])
    config = AutoModelForCausalLM.from_pretrained(models["donor"]).config
    options = ["--config", "llama", "--output", "out"]
    on_hub = model_results(
        "pretrain", pretrain.parse_arguments([*options, "--data", "organisation/set"]), results, config
    )
    assert on_hub["datasets"] == ["organisation/set"] == [on_hub["evaluation"][0]["dataset_id"]]
    stdlib = model_results("pretrain", pretrain.parse_arguments(options), results, config)
    assert stdlib["datasets"] == [] and stdlib["data"].endswith(f"Python {results['versions']['python']}")
    assert stdlib["evaluation"][0]["dataset_id"] is None


def test_benchmarks_of_the_hub(tmp_path):
    """Results on the Hub's benchmarks are where and as it wants them; all others are in the metadata."""
    benchmark = Result("accuracy", "acc", 0.25, "GSM8K", "openai/gsm8k", "gsm8k")
    texts = [Result("bits per byte", "bits_per_byte", value, f"text {value}") for value in (1.5, 2.5)]
    write_card(tmp_path, Card("name", "A model.", "About.", "code", results=(benchmark, *texts)))
    found = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert [(result.dataset_name, result.metric_value) for result in found] == [("text 1.5", 1.5), ("text 2.5", 2.5)]
    entries = yaml.safe_load((tmp_path / ".eval_results" / "openai_gsm8k.yaml").read_text())
    (entry,) = huggingface_hub.parse_eval_result_entries(entries)
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 0.25)
    assert huggingface_hub.eval_result_entries_to_yaml([entry]) == entries


def test_base_that_is_a_folder(tmp_path, monkeypatch):
    """A folder is never named as a base in the metadata, whatever a card said."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("out/base")
    for base, expected in (("out/base", None), ("/out/base", None), (["out/base", "a/b"], ["a/b"]), ("a/b", "a/b")):
        huggingface_hub.metadata_save("out/base/README.md", {"base_model": base, "license": "mit"})
        card = folder_card(Path("out/base"))
        assert card.base_model == expected and card.license == "mit"


def test_public_path(tmp_path, monkeypatch):
    """Inside the working directory relative, outside the last part; ids and options stay."""
    monkeypatch.chdir(tmp_path)
    cases = {tmp_path / "a" / "b": "a/b", "./a": "a", "/x/y": "y", "../y": "y", "~/y": "y", "a/b": "a/b", "--x": "--x"}
    assert {path: public_path(path) for path in cases} == cases


def test_renamed(models):
    """A card takes the name of its repository, once and again; a card of another kind stays as it is."""
    text = (models["lora"] / "README.md").read_text()
    for repo_id, before in (("me/new", "lora"), ("other/newer", "new")):
        text = renamed(text, models["lora"], repo_id)
        name = repo_id.split("/")[1]
        assert f"\n# {name}\n" in text and f"\n# {before}\n" not in text and f'"{before}"' not in text
        assert text.count(f'from_pretrained("{repo_id}")') == text.count(f'(base, "{repo_id}")') == 1
        assert 'from_pretrained("out/continued/model", trust' in text
        assert ModelCard(text).data.model_name == name
    foreign = '# My model\n\n```python\nmodel = PeftModel.from_pretrained(base, "someone/other")\n```\n'
    assert renamed(foreign, models["lora"], "me/new") == foreign
    commented = text.replace("---\n", "---\n# a comment\n", 1).replace("\n", "\r\n")
    assert renamed(commented, models["lora"], "me/newest").splitlines()[1] == "# a comment"
    assert "\r\n# newest\r\n" in renamed(commented, models["lora"], "me/newest")
    assert renamed("# A model\n\ntext", models["lora"], "me/new") == "# A model\n\ntext"


def test_figures_that_fail(models, tmp_path, capsys):
    """Neither a forward nor a figure that fails costs a run its card; the card then has no figure."""
    model = tiny_model()
    broken = [{"input_ids": torch.tensor([10**6]), "position_ids": torch.tensor([0])}]
    assert mean_depth_weights(SimpleNamespace(model=model, eval_dataset=broken)) is None
    assert "no heat map" in capsys.readouterr().err
    folder = Path(shutil.copytree(models["continued"], tmp_path / "model"))
    (folder / "depth_attention.png").unlink()
    (folder / "depth_attention.png").mkdir()
    weights = json.loads((folder / "depth_attention.json").read_text())["weights"]
    args = pretrain.parse_arguments(["--config", "llama", "--output", str(tmp_path)])
    config = AutoModelForCausalLM.from_pretrained(folder).config
    write_training_card(folder, args, results_of(folder), "title", weights, config)
    assert "no heat map" in capsys.readouterr().err
    assert "# title\n" in (folder / "README.md").read_text() and "png" not in (folder / "README.md").read_text()
