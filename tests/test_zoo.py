# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The zoo: a tiny one is built, checked and spoiled in several ways; of the committed one, what is cheap to check."""

import dataclasses
import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from attnres_convert import InputError
from attnres_convert.families import code_files
from attnres_recipes.data import is_held_out, stdlib_files, text_hash
from attnres_recipes.options import FinetuneOptions, PretrainOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import zoo  # noqa: E402
from pages import section  # noqa: E402


COMMITTED = zoo.RECIPES
SHORT = {"held_out": 0.2, "seq_len": 32, "batch_size": 4, "steps": 3, "eval_steps": 3, "eval_sequences": 4}
SHORT |= {"depth_every": 0}
FIELDS = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64}
FIELDS |= {"num_attention_heads": 2, "num_key_value_heads": 2}
BLOCK = Path("model_cards/block")
RECIPES = {
    "block": zoo.Recipe(
        "a model",
        PretrainOptions,
        {"config": "llama", "set": FIELDS, "block_size": 2, "data": "text", "train_tokenizer": 300, **SHORT},
    ),
    "adapter": zoo.Recipe(
        "an adapter", FinetuneOptions, {"model": "model_cards/block", "data": "sums.jsonl", **SHORT}, BLOCK
    ),
}
LOSS, BITS = "held-out loss (nats per token)", "bits per byte"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Another list of recipes; afterwards the working directory and what is logged are as they were."""
    verbosity = transformers.utils.logging.get_verbosity()
    monkeypatch.setattr(zoo, "RECIPES", RECIPES)
    monkeypatch.chdir(Path.cwd())
    yield
    transformers.utils.logging.set_verbosity(verbosity)


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A root whose zoo was built by its recipes."""
    root = tmp_path_factory.mktemp("zoo")
    source = "".join(file.read_text(errors="replace") for file in stdlib_files()[:6])
    pieces = [source[700 * index : 700 * index + 500 + 7 * index] for index in range(40)]
    (root / "text").mkdir()
    for index, piece in enumerate(pieces):
        (root / "text" / f"{index:02d}.txt").write_text(piece)
    rows = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(60)]
    (root / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "model_cards").mkdir()
    (root / "model_cards" / "held_out.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in pieces[:3]))
    (root / "model_cards" / "README.md").write_text("before\n<!-- zoo -->\n\n<!-- /zoo -->\nafter\n")
    for file in code_files().values():
        shutil.copy(file, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "RECIPES", RECIPES)
        patch.chdir(root)
        zoo.main(["--root", str(root), "--build", *RECIPES])
    return root


@pytest.fixture
def root(built, tmp_path, monkeypatch) -> Path:
    """A copy to spoil, in which the test runs."""
    shutil.copytree(built, tmp_path / "root", symlinks=True, ignore=shutil.ignore_patterns("checkpoint-*", "text"))
    monkeypatch.chdir(tmp_path / "root")
    return tmp_path / "root"


def edit_results(folder: Path, edit):
    results = json.loads((folder / "results.json").read_text())
    edit(results)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")


def test_build_writes_complete_folders(built):
    """Weights in bfloat16 but for depth attention, results on the zoo's text, the table; no path of this machine."""
    assert sorted(path.name for path in (built / "model_cards").iterdir()) == [
        "README.md",
        "adapter",
        "block",
        "held_out.jsonl",
    ]
    for name in RECIPES:
        folder = built / "model_cards" / name
        results = json.loads((folder / "results.json").read_text())
        assert results["output"] == f"outputs/zoo/{name}"
        measured = [entry for entry in results["evaluation"] if entry["dataset"] == "model_cards/held_out.jsonl"]
        assert [entry["metric"] for entry in measured] == [LOSS, BITS]
        assert (
            f"| {LOSS} | {measured[0]['value']:.4f} | model_cards/held_out.jsonl |"
            in (folder / "README.md").read_text()
        )
        for file in folder.rglob("*"):
            assert file.suffix in (".safetensors", ".png") or str(built) not in file.read_text(), file
    weights = load_file(built / "model_cards" / "block" / "model.safetensors")
    trained = load_file(built / "outputs" / "zoo" / "block" / "model" / "model.safetensors")
    in_float32 = {name for name, tensor in weights.items() if tensor.dtype == torch.float32}
    assert in_float32 == {name for name in trained if "depth_attention" in name}
    assert all(torch.equal(tensor, trained[name].to(tensor.dtype)) for name, tensor in weights.items())
    table = section(built / "model_cards" / "README.md", "zoo")
    assert [line.split("]")[0] for line in table.splitlines()[2:]] == ["| [block", "| [adapter"]
    assert (built / "model_cards" / "README.md").read_text().endswith("<!-- /zoo -->\nafter\n")


def test_adapter_finds_its_base(built, monkeypatch):
    """From the root, transformers alone loads the adapter with its base, and that is what was measured."""
    monkeypatch.chdir(built)
    model = AutoModelForCausalLM.from_pretrained("model_cards/adapter", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained("model_cards/block", dtype=torch.float32)
    saved = load_file("model_cards/adapter/adapter_model.safetensors")
    assert {name for name, tensor in saved.items() if tensor.dtype == torch.bfloat16} == {
        name for name in saved if "depth_attention" not in name
    }
    tokens = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert not torch.equal(model(tokens).logits, base(tokens).logits)


def test_check_finds_nothing_then_everything(root, capsys):
    """A good zoo passes; each thing that is wrong with a bad one is a line, and the exit code is 1."""
    zoo.main(["--root", str(root)])
    printed = capsys.readouterr()
    assert printed.out.rstrip("\n") == section(root / "model_cards" / "README.md", "zoo") and not printed.err
    weights = root / "model_cards" / "block" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, weights, metadata={"format": "pt"})
    (root / "model_cards" / "block" / "modeling_attnres.py").unlink()
    (root / "model_cards" / "block" / "modeling_attnres.py").write_text("raise ValueError('no code')")
    adapter = root / "model_cards" / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-100])
    page = root / "model_cards" / "README.md"
    page.write_text(page.read_text().replace("| [block", "| [black"))
    with pytest.raises(SystemExit) as exit:
        zoo.main(["--root", str(root)])
    assert exit.value.code == 1
    code, loss, stranger, cut, table = capsys.readouterr().err.splitlines()
    assert code == "block: modeling_attnres.py isn't a link to the project's; run: python scripts/zoo.py --update"
    assert re.fullmatch(r"block: held-out loss \(nats per token\) is \d\.\d{4}, by its card it is \d\.\d{4}", loss)
    assert stranger.startswith("block: modeling_attnres.py in ") and "--trust-remote-code" in stranger
    assert cut == "adapter: adapter_model.safetensors is no complete safetensors file; save the model again"
    assert table.startswith("model_cards/README.md: its table isn't that of the folders")


def missing(folder):
    shutil.rmtree(folder)
    return "is missing; make it with: python scripts/zoo.py --build block"


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return "model.safetensors is no complete safetensors file"


def pickled(folder):
    torch.save({}, folder / "extra.json")
    return "extra.json is a pickle"


def without_results(folder):
    (folder / "results.json").unlink()
    return "results.json is missing"


def without_code(folder):
    (folder / "configuration_attnres.py").unlink()
    return "configuration_attnres.py isn't a link to the project's; run: python scripts/zoo.py --update"


def other_code(folder):
    code = (folder / "configuration_attnres.py").read_text()
    (folder / "configuration_attnres.py").unlink()
    (folder / "configuration_attnres.py").write_text(code + "\n")
    return "configuration_attnres.py isn't a link to the project's; run: python scripts/zoo.py --update"


def copied_code(folder):
    (folder / "modeling_attnres.py").unlink()
    shutil.copy(code_files()["modeling_attnres.py"], folder)
    return "modeling_attnres.py isn't a link to the project's; run: python scripts/zoo.py --update"


def link_to_nothing(folder):
    (folder / "modeling_attnres.py").unlink()
    (folder / "modeling_attnres.py").symlink_to("../modeling_attnres.py")
    return "modeling_attnres.py isn't a link to the project's; run: python scripts/zoo.py --update"


def link_to_other_code(folder):
    (folder / "modeling_attnres.py").unlink()
    (folder / "modeling_attnres.py").symlink_to("../../configuration_attnres.py")
    return "modeling_attnres.py isn't a link to the project's; run: python scripts/zoo.py --update"


def link_to_code_that_changed(folder):
    with open(folder / "modeling_attnres.py", "a") as file:  # of the root, which isn't the project that runs
        file.write("\n")
    return "modeling_attnres.py is a link that leaves the folder"


def link_that_is_not_needed(folder):
    (folder / "families_attnres.py").symlink_to("../../families_attnres.py")
    return "families_attnres.py is code that the model doesn't need; run: python scripts/zoo.py --update"


def code_that_is_not_needed(folder):
    shutil.copy(code_files()["families_attnres.py"], folder)
    return "families_attnres.py is code that the model doesn't need; run: python scripts/zoo.py --update"


def other_link(folder):
    (folder / "notes.md").symlink_to("README.md")
    return "notes.md is a link"


def other_auto_map(folder):
    config = json.loads((folder / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (folder / "config.json").write_text(json.dumps(config))
    return "config.json has another auto_map than the code; run: python scripts/zoo.py --update"


def number_on_the_card(folder):
    card = folder / "README.md"
    value = zoo.recorded(folder)[BITS]
    card.write_text(card.read_text().replace(f"| {value:.4f} |", "| 0.1234 |"))
    return "0.1234"


def number_in_the_metadata(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace(str(zoo.recorded(folder)[LOSS]), "1.5"))
    return "value: 1.5"


def other_license(folder):
    card = folder / "README.md"
    card.write_text(card.read_text().replace("license: apache-2.0", "license: mit"))
    return "license: mit"


def other_recipe(folder):
    edit_results(folder, lambda results: results.update(command=results["command"] + " --seed 1"))
    return "results.json is of another recipe"


@pytest.mark.parametrize(
    "spoil",
    [
        missing,
        truncated,
        pickled,
        without_results,
        without_code,
        other_code,
        copied_code,
        link_to_nothing,
        link_to_other_code,
        link_to_code_that_changed,
        link_that_is_not_needed,
        code_that_is_not_needed,
        other_link,
        other_auto_map,
        number_on_the_card,
        number_in_the_metadata,
        other_license,
        other_recipe,
    ],
)
def test_cheap_checks(spoil, root):
    """What is wrong with files, code and card is told in one line."""
    folder = Path("model_cards/block")
    cheap = (zoo.check_files, zoo.check_code, zoo.check_card)
    for check in cheap:
        check(folder)
    message = spoil(folder)
    with pytest.raises(zoo.ERRORS) as error:
        for check in cheap:
            check(folder)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_weights_in_float32_are_found(root):
    """As is a recorded loss that the weights don't have."""
    folder, texts = Path("model_cards/block"), zoo.held_out_texts()
    edit_results(folder, lambda results: results["evaluation"][-2].update(value=1.5))
    with pytest.raises(InputError, match="by its card it is 1.5000"):
        zoo.check_model(folder, texts)
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="model.safetensors is F32"):
        zoo.check_model(folder, texts)


def test_code_and_cards_are_brought_up_to_date(root, capsys):
    """In one quick command, which names what it has changed."""
    before = (root / "model_cards" / "block" / "config.json").read_bytes()
    repairs = (other_code, without_code, copied_code, link_to_nothing, link_to_other_code, link_that_is_not_needed)
    for spoil in (*repairs, code_that_is_not_needed, other_auto_map):
        spoil(root / "model_cards" / "block")
        zoo.main(["--root", str(root), "--update"])
        assert capsys.readouterr().out == "block\n"
        zoo.check_code(Path("model_cards/block"))
        assert (root / "model_cards" / "block" / "config.json").read_bytes() == before
    other_code(root / "model_cards" / "block")
    number_on_the_card(root / "model_cards" / "adapter")
    zoo.main(["--root", str(root), "--update"])
    assert capsys.readouterr().out == "block\nadapter\n"
    for name, file in code_files().items():
        assert (root / name).read_bytes() == file.read_bytes()
    for name in RECIPES:
        zoo.check_code(Path("model_cards") / name)
        zoo.check_card(Path("model_cards") / name)
    zoo.main(["--root", str(root), "--update"])
    assert capsys.readouterr().out == "code files and cards are up to date\n"


def test_build_again(root):
    """Over a folder that is there, whose links don't keep it from being replaced."""
    before = {path.name: path.read_bytes() for path in Path("model_cards/block").iterdir()}
    (root / "model_cards" / "block" / "model.safetensors").write_bytes(b"")
    zoo.main(["--root", str(root), "--build", "block"])
    assert {path.name: path.read_bytes() for path in Path("model_cards/block").iterdir()} == before
    assert all(path.is_symlink() == (path.suffix == ".py") for path in Path("model_cards/block").iterdir())


def test_build_refuses(root, monkeypatch, capsys):
    """A run of other options, a missing base, a failing run: one line, and the folders stay as they are."""
    before = sorted(root.glob("model_cards/**/*"))
    longer = dataclasses.replace(RECIPES["block"], values={**RECIPES["block"].values, "steps": 4})
    lonely = dataclasses.replace(RECIPES["adapter"], needs=Path("model_cards/absent"))
    broken = dataclasses.replace(RECIPES["block"], values={"config": "llama", "data": "./absent"})
    monkeypatch.setattr(zoo, "RECIPES", {"block": longer, "adapter": lonely, "broken": broken})
    for name, message in {
        "block": "outputs/zoo/block holds a run with steps = 3, the recipe says 4; remove the run",
        "adapter": "adapter is made from absent, which is missing; add --build absent",
        "broken": "./absent doesn't exist",
    }.items():
        with pytest.raises(SystemExit) as exit:
            zoo.main(["--root", str(root), "--build", name])
        assert exit.value.code == f"zoo: {message}."
    assert sorted(root.glob("model_cards/**/*")) == before
    with pytest.raises(SystemExit) as exit:
        zoo.main(["--build", "unknown"])
    assert exit.value.code == 2 and "choose from" in capsys.readouterr().err


# The committed zoo


def test_recipes_are_options_of_the_scripts(monkeypatch):
    """Each command that a card shows is one that its script takes, and stands for the recipe."""
    monkeypatch.setattr(zoo, "RECIPES", COMMITTED)
    for name, recipe in COMMITTED.items():
        program, *words = shlex.split(zoo.recipe_command(name))
        script = importlib.import_module(f"attnres_commands.{program.removeprefix('attnres-')}")
        options = script.parse_arguments(words)
        assert options == recipe.options(Path("outputs/zoo") / name)
        assert str(options.output) == f"outputs/zoo/{name}"
        assert recipe.needs in (None, zoo.SMOLLM2) or recipe.needs.name in COMMITTED


@pytest.mark.parametrize("name", zoo.RECIPES)
def test_committed_folder(name, monkeypatch):
    """Complete, with this project's code and a card made from its results. `make zoo` checks the rest."""
    monkeypatch.setattr(zoo, "RECIPES", COMMITTED)
    monkeypatch.chdir(ROOT)
    folder = Path("model_cards") / name
    for check in (zoo.check_files, zoo.check_code, zoo.check_card):
        check(folder)
    for file in folder.rglob("*"):
        if file.suffix not in (".safetensors", ".png"):
            assert not re.search(r"/(work|tmp|home|root)/", file.read_text(encoding="utf-8")), file


def test_snippets_of_the_cards_run(tmp_path):
    """What a card says loads its model, from the root of a clone and without this project being imported."""
    snippets = []
    names = [name for name, recipe in COMMITTED.items() if recipe.needs != zoo.SMOLLM2]  # which isn't in a clone
    for name in names:
        card = (ROOT / "model_cards" / name / "README.md").read_text(encoding="utf-8")
        snippets += re.findall(r"^```python\n(.*?)^```", card, flags=re.MULTILINE | re.DOTALL)
    assert len(snippets) == len(names)
    script = "import json, sys\nfor snippet in json.loads(sys.argv[1]):\n    exec(snippet, {})\n    print('done')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path)}
    command = [sys.executable, "-I", "-c", script, json.dumps(snippets)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.splitlines().count("done") == len(names), run.stderr


def test_table_of_the_page(monkeypatch):
    """It shows the numbers in the folders' results."""
    monkeypatch.setattr(zoo, "RECIPES", COMMITTED)
    monkeypatch.chdir(ROOT)
    assert section(ROOT / "model_cards" / "README.md", "zoo") == zoo.zoo_table(list(COMMITTED))


def test_held_out_text_is_held_out():
    """No model has been trained on it: it is on that side of the split, whose share is pretrain.py's default."""
    rows = [json.loads(line) for line in (ROOT / "model_cards" / "held_out.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) > 10 and sum(len(row["text"]) for row in rows) > 80_000
    assert all(is_held_out(text_hash(row["text"]), 0.05) and row["license"] == "PSF-2.0" for row in rows)
    assert not any("held_out" in recipe.values for recipe in COMMITTED.values())
