# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The code files in the folders of the zoo are links: what loads, trains and publishes these folders sees the files."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from attnres_convert import InputError, convert_to_donor, reading
from attnres_recipes.publishing import collect
from command_process import CommandServer, packages
from convert_models import edit_json
from families import tokens
from hub_server import serve_hub
from safetensors.torch import load_file, save_file
from test_hub_code import CODE_FILES, WITHOUT_PROJECT
from transformers import AutoModelForCausalLM


ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"
TOKEN = "hf_" + "a" * 34
BLOCK, KIMI = "model_cards/attnres-1.3m-block", "model_cards/kimi-linear-block"
CODE = {BLOCK: CODE_FILES, KIMI: (*CODE_FILES, "families_attnres.py")}


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """This project as `git clone` gives it, from a commit of what is in the working tree."""
    origin, clone = tmp_path_factory.mktemp("git") / "origin", tmp_path_factory.mktemp("git") / "clone"
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(SCRIPTS, origin / "scripts", ignore=ignored)
    shutil.copytree(ROOT / "model_cards", origin / "model_cards", symlinks=True)
    for path in ROOT.glob("*attnres.py"):
        shutil.copy(path, origin)
    identity = ["-c", "user.name=me", "-c", "user.email=me@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "--quiet"], ["add", "--force", "."], [*identity, "commit", "--quiet", "--message", "all"]):
        subprocess.run(["git", *command], cwd=origin, check=True)
    subprocess.run(["git", "clone", "--quiet", str(origin), str(clone)], check=True)
    return clone


def check_real_files(folder: Path, code: tuple[str, ...]):
    """Exactly these code files, this project's, and no link."""
    assert {path.name for path in folder.glob("*.py")} == set(code)
    assert all((folder / name).read_bytes() == (ROOT / name).read_bytes() for name in code)
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_no_copies(clone):
    """Git holds links to the project's code, those that the model needs and no others."""
    found = subprocess.run(
        ["git", "ls-files", "--stage", "model_cards/*.py"], cwd=clone, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert found and all(line.startswith("120000 ") for line in found)
    for folder in (clone / "model_cards").iterdir():
        if folder.is_dir():
            config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
            code = {"attnres": CODE[BLOCK], "attnres_kimi_linear": CODE[KIMI]}.get(config.get("model_type"), ())
            assert {path.name: os.readlink(path) for path in folder.glob("*.py")} == {
                name: f"../../{name}" for name in code
            }


@torch.no_grad()
@pytest.mark.parametrize("name", CODE)
def test_clone_loads_without_the_project(clone, tmp_path, name):
    """With trust_remote_code, in a process that can't import the project."""
    script = """
base = transformers.AutoModel.from_pretrained(sys.argv[2], trust_remote_code=True)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[2], trust_remote_code=True)
for found in (base, model, model.config):
    assert type(found).__module__.startswith("transformers_modules."), type(found)
assert torch.equal(base(input_ids).last_hidden_state, model.base_model(input_ids).last_hidden_state)
torch.save(model(input_ids).logits, sys.argv[3])
"""
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_PROJECT + script, json.dumps(tokens().tolist())]
    done = subprocess.run(
        [*command, name, str(tmp_path / "logits.pt")], cwd=clone, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model = AutoModelForCausalLM.from_pretrained(ROOT / name, attn_res_implementation="two_phase")
    assert torch.equal(torch.load(tmp_path / "logits.pt"), model(tokens()).logits)
    copies = {path.name: path for path in (tmp_path / "modules").rglob("*_attnres.py")}
    assert copies.keys() == set(CODE[name]) and not any(path.is_symlink() for path in copies.values())


TRAINING = "--seq-len 32 --batch-size 2 --steps 1 --eval-steps 1 --eval-sequences 2 --held-out 0.3 --depth-every 0"


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for index in range(30):
        (tmp_path / "text" / f"{index}.txt").write_text(f"import module_{index}\n" * (20 + index))
    rows = [{"prompt": f"{index} + 1 =", "completion": f" {index + 1}"} for index in range(60)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    server = CommandServer(tmp_path_factory.mktemp("logs"))
    yield server
    server.stop()


@pytest.fixture(params=["clone", pytest.param("repository", marks=pytest.mark.slow)])
def place(request) -> Path:
    return ROOT if request.param == "repository" else request.getfixturevalue("clone")


@pytest.fixture
def run(server, place):
    """Runs a command in a place, with the scripts that are there; what it has written to standard output, or to
    standard error if it has to fail."""

    def run(*command, fails: bool = False) -> str:
        code, output, errors = server.run(place, *command)
        assert (code != 0) == fails, errors
        return errors if fails else output

    return run


@pytest.mark.slow
def test_commands_that_read(run, data):
    """On a folder of the zoo they do what they do on any other model folder."""
    assert run("scripts/generate.py", BLOCK, "--prompt", "import", "--max-new-tokens", 4)
    options = [BLOCK, KIMI, "--data", data / "text", "--seq-len", 32, "--output", data / "evaluation"]
    assert run("scripts/evaluate_model.py", *options)
    options = [BLOCK, "--text", data / "text", "--seq-len", 32, "--output", data / "figures"]
    assert run("scripts/plot_depth_attention.py", *options)
    files = json.loads(run("scripts/push_to_hub.py", KIMI, "me/model", "--dry-run").splitlines()[-1])["files"]
    sizes = {name: (ROOT / name).stat().st_size for name in CODE[KIMI]}
    assert {name: size for name, size in files.items() if name.endswith(".py")} == sizes
    assert not any(path.is_symlink() for path in data.rglob("*"))


def test_training(run, data):
    """What comes out has the code files themselves."""
    options = ["--data", data / "text", "--output", data / "pretrained", *TRAINING.split()]
    run("scripts/pretrain.py", "--model", BLOCK, *options)
    check_real_files(data / "pretrained" / "model", CODE[BLOCK])
    options = ["--data", data / "sums.jsonl", "--output", data / "finetuned", *TRAINING.split()]
    run("scripts/finetune.py", "--model", KIMI, *options, "--method", "depth")
    check_real_files(data / "finetuned" / "model", CODE[KIMI])
    assert not any(path.is_symlink() for path in data.rglob("*"))


def test_commands_that_convert(run, tmp_path):
    """They say what they say of any trained AttnRes model."""
    convert = ["-m", "attnres_convert.cli"]
    to_donor = run(*convert, "--to-donor", BLOCK, tmp_path / "donor", fails=True)
    assert "the queries are trained" in to_donor
    assert "has Attention Residuals already" in run(*convert, BLOCK, tmp_path / "again", fails=True)
    quickstart = run("scripts/quickstart.py", "--model", BLOCK, "--output", tmp_path / "out", fails=True)
    assert "link" not in quickstart and len(quickstart.strip().splitlines()) == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", CODE)
def test_to_donor(place, tmp_path, name):
    """From a folder whose queries are zero; it has the code files as the zoo has them."""
    folder = shutil.copytree(place / name, tmp_path / "model_cards" / "zero", symlinks=True)
    for file in CODE[name]:
        shutil.copy(place / file, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["model.depth_attention.query"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", attn_res_sum_scale=True)
    convert_to_donor(folder, tmp_path / "donor", verify=False)
    check_real_files(tmp_path / "donor", ())


@pytest.mark.parametrize("name", CODE)
def test_push(place, tmp_path, name):
    """The repository is whole, with the code as files."""
    code = {file: (ROOT / file).read_bytes() for file in CODE[name]}
    with serve_hub() as hub:
        hub.users = {TOKEN: "me"}
        done = subprocess.run(
            [sys.executable, "scripts/push_to_hub.py", name, "me/model"],
            cwd=place,
            env={**hub.environment(tmp_path, TOKEN), "PYTHONPATH": str(packages(place, tmp_path / "packages"))},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        published = hub.repositories["me/model"].files()
    assert published.keys() - {".gitattributes"} == {path.name for path in (place / name).iterdir()}
    assert {file: content for file, content in published.items() if file.endswith(".py")} == code


@pytest.mark.slow
@pytest.mark.parametrize("place", ["clone"], indirect=True)
def test_zoo_in_a_clone(run, clone):
    """`make zoo` finds nothing wrong there, and `--update` nothing to do."""
    run("scripts/zoo.py", "attnres-1.3m-block", "kimi-linear-block")
    assert run("scripts/zoo.py", "--update") == "code files and cards are up to date\n"
    status = ["git", "status", "--short", "--untracked-files=no"]
    assert not subprocess.run(status, cwd=clone, capture_output=True, text=True, check=True).stdout


# Which links are the project's


@pytest.fixture
def folder(tmp_path) -> Path:
    """A folder of the zoo without its links."""
    ignored = shutil.ignore_patterns("*.py")
    folder = Path(shutil.copytree(ROOT / BLOCK, tmp_path / "model_cards" / "block", ignore=ignored))
    for name in CODE_FILES:
        shutil.copy(ROOT / name, folder)
    return folder


def refusals(folder: Path) -> set[str]:
    """What pushing, training and converting say of a folder: one line each."""
    lines = set()
    for command in (collect, reading.check_own_files, lambda path: convert_to_donor(path, folder.parent / "donor")):
        with pytest.raises(InputError) as error:
            command(folder)
        lines.add(str(error.value))
    assert all("\n" not in line for line in lines) and not (folder.parent / "donor").exists()
    return lines


def other_file(folder: Path) -> str:
    (folder.parent / "modeling_attnres.py").write_text("secret")
    return "../modeling_attnres.py"


def changed_copy(folder: Path) -> str:
    content = (ROOT / "modeling_attnres.py").read_bytes()
    (folder.parent / "modeling_attnres.py").write_bytes(content + b"\n")
    return "../modeling_attnres.py"


def other_code_file(folder: Path) -> str:
    return str(ROOT / "configuration_attnres.py")


def pipe(folder: Path) -> str:
    os.mkfifo(folder.parent / "pipe")
    return "../pipe"


@pytest.mark.parametrize("target", [other_file, changed_copy, other_code_file, pipe])
def test_other_links_with_the_name_of_a_code_file(folder, target):
    """They are refused as links of other names are."""
    (folder / "modeling_attnres.py").unlink()
    (folder / "modeling_attnres.py").symlink_to(target(folder))
    for line in refusals(folder):
        assert re.search("modeling_attnres.py is (a link that leaves the folder|no regular file); put the file", line)


def test_other_names(folder):
    """Nor may a link of another name lead to the project's code, or a link to a folder with it."""
    targets = {"notes.md": ROOT / "modeling_attnres.py", "families_attnres.py": ROOT, "additional_chat_templates": ROOT}
    for name, target in targets.items():
        (folder / name).symlink_to(target)
        with pytest.raises(InputError, match=f"{name} is a link that leaves the folder"):
            collect(folder)
        (folder / name).unlink()


def test_link_to_nothing(folder):
    """One line says what to do; so it is in a folder that was copied with its links."""
    (folder / "modeling_attnres.py").unlink()
    (folder / "modeling_attnres.py").symlink_to("../../modeling_attnres.py")
    for line in refusals(folder):
        assert "modeling_attnres.py is a link to nothing; put the file itself there (cp -L), or remove it" in line
    shutil.copy(ROOT / "modeling_attnres.py", folder.parents[1])
    assert set(CODE_FILES) <= collect(folder).files.keys()


def test_what_a_link_leads_to_later(folder):
    """What is published is this project's file, also if the link leads elsewhere by then."""
    shutil.copy(ROOT / "modeling_attnres.py", folder.parent)
    (folder / "modeling_attnres.py").unlink()
    (folder / "modeling_attnres.py").symlink_to("../modeling_attnres.py")
    package = collect(folder)
    (folder.parent / "modeling_attnres.py").write_text("secret")
    assert package.files["modeling_attnres.py"].read_bytes() == (ROOT / "modeling_attnres.py").read_bytes()
