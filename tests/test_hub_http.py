# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""transformers' own push_to_hub, and loading from a Hub over HTTP, with the project and without."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from attnres_recipes.data import train_tokenizer
from behaviours import assert_close
from convert_models import edit_json
from families import tiny_model, tokens
from hub_server import Fault, serve_hub
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_hub_code import CODE_FILES, WITHOUT_PROJECT
from transformers import AutoModelForCausalLM, AutoTokenizer


TOKEN, OTHER_TOKEN = "hf_" + "a" * 34, "hf_" + "b" * 34
SCRIPTS = Path(__file__).parents[1] / "scripts"

WITH_PROJECT = WITHOUT_PROJECT.replace("sys.modules[name] = None", "__import__(name)")
PUSH = """
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, repo = sys.argv[2:4]
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
model.push_to_hub(repo, private=True)
tokenizer.push_to_hub(repo)
with torch.no_grad():
    model.model.depth_attention.query.zero_()
model.push_to_hub(repo, commit_message="uniform")
model.push_to_hub(repo, revision="trial")
"""
PULL = """
from transformers import AutoModelForCausalLM, AutoTokenizer
results = {}
for name, repo, options in json.loads(sys.argv[3]):
    try:
        model = AutoModelForCausalLM.from_pretrained(repo, **options)
        results[name] = (type(model).__module__, model(input_ids).logits)
    except Exception as error:
        results[name] = (type(error).__name__, str(error))
torch.save(results, sys.argv[2])
"""


@pytest.fixture
def hub():
    with serve_hub() as hub:
        hub.users = {TOKEN: "me", OTHER_TOKEN: "other"}
        yield hub


def python(hub, home: Path, script: str, *arguments, prelude: str = WITHOUT_PROJECT):
    """Runs a script with a cache in `home`, where the project can't be imported unless `prelude` says so."""
    home.mkdir(exist_ok=True)
    command = [sys.executable, "-I", "-c", prelude + script, json.dumps(tokens().tolist()), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=home, env=hub.environment(home, TOKEN), capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    return done


def pull(hub, home: Path, cases: list[tuple], **options) -> dict:
    """What loading gives: the module of the class and the logits, or the error's name and message."""
    python(hub, home, PULL, home / "results.pt", json.dumps(cases), **options)
    return torch.load(home / "results.pt")


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(tokens()).logits


def save(folder: Path, **options):
    model = tiny_model(**options)
    model.save_pretrained(folder)
    train_tokenizer(["import this"] * 3, 60 + 256).save_pretrained(folder)
    return model


def test_push_and_pull(hub, tmp_path):
    """Models and tokenizers push themselves completely; they load by every way, old revisions and branches too."""
    model = save(tmp_path / "model")
    first = logits(model)
    python(hub, tmp_path / "push", PUSH, tmp_path / "model", "me/model", prelude=WITH_PROJECT)
    repository = hub.repositories["me/model"]
    files = repository.files()
    assert set(files) == {path.name for path in (tmp_path / "model").iterdir()} | {".gitattributes", "README.md"}
    assert all(files[name] == (tmp_path / "model" / name).read_bytes() for name in CODE_FILES)
    assert set(json.loads(files["config.json"])["auto_map"]) == set(model.config.hub_classes())
    titles = [commit.title for commit in repository.commits.values()]
    assert titles == ["initial commit", "Upload AttnResForCausalLM", "Upload tokenizer", "uniform"]
    assert len(hub.sent("PUT", "/lfs/")) == 2  # the weights before and after, not once more for the branch
    assert repository.branches["trial"] == repository.branches["main"]

    commits = list(repository.commits)
    trust = {"trust_remote_code": True}
    cases = [
        ("main", "me/model", trust),
        ("pinned", "me/model", {**trust, "revision": commits[-1]}),
        ("old", "me/model", {**trust, "revision": commits[1]}),
        ("branch", "me/model", {**trust, "revision": "trial"}),
        ("no trust", "me/model", {"trust_remote_code": False}),
        ("no revision", "me/model", {**trust, "revision": "absent"}),
    ]
    results = pull(hub, tmp_path / "stranger", cases)
    with torch.no_grad():
        model.model.depth_attention.query.zero_()
    uniform = logits(model)
    assert not torch.equal(first, uniform)
    for name, expected in {"main": uniform, "pinned": uniform, "old": first, "branch": uniform}.items():
        module, actual = results[name]
        assert module.startswith("transformers_modules.me.model."), results[name]
        assert_close(actual, expected)  # other code for the reads, that in the folder
    assert "trust_remote_code" in results["no trust"][1]
    assert "absent is not a valid git identifier" in results["no revision"][1]

    cases = [
        ("main", "me/model", {}),
        ("old", "me/model", {"revision": commits[1]}),
        ("somebody else", "me/model", {"token": OTHER_TOKEN}),  # the repository is private
        ("nobody", "me/model", {"token": False}),
    ]
    results = pull(hub, tmp_path / "installed", cases, prelude=WITH_PROJECT)
    assert results["main"][0] == results["old"][0] == "modeling_attnres"
    assert torch.equal(results["main"][1], uniform) and torch.equal(results["old"][1], first)
    for name in ("somebody else", "nobody"):
        assert "not a valid model identifier" in results[name][1]


SAVE_AND_PUSH = """
from transformers import AutoModelForCausalLM
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.model.depth_attention.query.zero_()
    try:
        model.save_pretrained(folder, push_to_hub=True)
    except Exception as error:
        assert "unsent" in folder and "403" in str(error), error
"""


@pytest.mark.slow
def test_save_and_push(hub, tmp_path):
    """A save that pushes sends what a stranger needs, to a repository with the folder's name; if the push fails, the
    folder has the new model nevertheless."""
    folders = [tmp_path / "model", tmp_path / "unsent"]
    for folder in folders:
        save(folder)
    hub.faults.append(Fault("POST", "/unsent/commit/", status=403))
    python(hub, tmp_path / "home", SAVE_AND_PUSH, *folders, prelude=WITH_PROJECT)
    files = hub.repositories["me/model"].files()
    assert {*CODE_FILES, "config.json", "model.safetensors"} <= files.keys()
    assert not any("saving" in name for name in [*files, *os.listdir(folders[0])])
    assert hub.faults[0].times == 0 and "config.json" not in hub.repositories["me/unsent"].files()
    for folder in folders:
        for name in (*CODE_FILES, "config.json", "model.safetensors"):
            assert (folder / name).read_bytes() == files[name], name


PULL_TWICE = """
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True)
base = AutoModel.from_pretrained(sys.argv[3], trust_remote_code=True)
assert {type(x).__module__.split(".")[0] for x in (model, base)} == {"transformers_modules"}
torch.save([model(input_ids).logits, base(input_ids).last_hidden_state], sys.argv[2])
"""


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "family, code",
    [("llama", CODE_FILES), ("mistral", (*CODE_FILES, "families_attnres.py"))],
)
def test_families(hub, tmp_path, family, code):
    """push_to_hub.py sends the code files that the family needs, and a stranger loads the repository with them."""
    model = save(tmp_path / "model", family=family, vocab_size=320)
    shutil.copy(SCRIPTS.parent / "families_attnres.py", tmp_path / "model")  # which a Llama doesn't need
    command = [sys.executable, SCRIPTS / "push_to_hub.py", tmp_path / "model", "me/model"]
    (tmp_path / "push").mkdir()
    environment = hub.environment(tmp_path / "push", TOKEN)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    files = hub.repositories["me/model"].files()
    assert {name for name in files if name.endswith(".py")} == set(code)
    assert all(files[name] == (SCRIPTS.parent / name).read_bytes() for name in code)
    assert ("families_attnres.py (code that this model doesn't need)" in done.stdout) == (family == "llama")
    python(hub, tmp_path / "stranger", PULL_TWICE, tmp_path / "results.pt", "me/model")
    logits_there, hidden = torch.load(tmp_path / "results.pt")
    assert_close(logits_there, logits(model))
    assert_close(hidden, model.base_model(tokens()).last_hidden_state)


def test_versions_of_the_code(hub, tmp_path):
    """Repositories with different code in one process each run their own, as do revisions of one repository."""
    model = tiny_model(attn_res_implementation="eager")
    model.save_pretrained(tmp_path / "model")
    expected = {None: logits(model)}
    files = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    query = model.model.depth_attention.query.detach().clone()
    for factor in (0, 2):
        with torch.no_grad():
            model.model.depth_attention.query.copy_(factor * query)
        expected[factor] = logits(model)

    def version(factor: int) -> dict[str, bytes]:
        code = (
            "\n\nDepthAttentionInterface.register('eager', lambda sources, product, eps, scale: "
            f"eager_depth_attention(sources, {factor} * product, eps, scale))\n"
        )
        name = "depth_attention_attnres.py"
        return {**files, name: files[name] + code.encode()}

    hub.add("me/first", files)
    repository = hub.add("other/second", version(0))
    repository.commit(repository.branches, "main", version(2), "another version")
    commits = list(repository.commits)
    options = {"trust_remote_code": True, "attn_res_implementation": "eager"}
    cases = [
        ("second", "other/second", options),
        ("first", "me/first", options),
        ("second, old", "other/second", {**options, "revision": commits[0]}),
        ("first again", "me/first", options),
        ("second again", "other/second", options),
    ]
    results = pull(hub, tmp_path / "home", cases)
    for name, factor in {
        "first": None,
        "second": 2,
        "second, old": 0,
        "first again": None,
        "second again": 2,
    }.items():
        assert torch.equal(results[name][1], expected[factor]), name


GENERATE = """
from attnres_commands import generate
for repo in ("me/model", "me/adapter"):
    generate.main([repo, "--prompt", "import", "--temperature", "0", "--max-new-tokens", "8", "--json"])
"""


def test_generate_from_the_hub(hub, tmp_path):
    """generate.py takes Hub ids, of models and of adapters, whose base is on the Hub too."""
    save(tmp_path / "model", vocab_size=320)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    edit_json(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path="me/model")
    for name in ("model", "adapter"):
        hub.add(f"me/{name}", tmp_path / name)
    done = python(hub, tmp_path / "home", GENERATE, prelude=WITH_PROJECT)
    answers = [json.loads(line)["answers"][0] for line in done.stdout.splitlines() if line.startswith("{")]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    inputs = tokenizer("import", return_tensors="pt", return_token_type_ids=False)
    for answer, context in zip(answers, (adapted.disable_adapter(), nullcontext()), strict=True):
        with context:
            tokens = adapted.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert answer["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
    assert answers[0]["text"] != answers[1]["text"]


DOWNLOAD = """
from huggingface_hub import snapshot_download
snapshot_download("me/model", max_workers=1)
"""


def test_interrupted_download(hub, tmp_path):
    """A lost connection goes on where it stopped; after a failure, the next run fetches only what is missing."""
    chunk = 10 * 2**20  # bytes that the client writes at a time
    size = 2 * chunk + 12345
    noise = torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_file({"x": noise}, tmp_path / "noise.safetensors")
    content = (tmp_path / "noise.safetensors").read_bytes()
    hub.add("me/model", {"a.safetensors": content, "b.safetensors": content[:100], "c.json": b"{}"})
    hub.faults += [
        Fault("GET", "/a.safetensors", after=chunk + 1000),
        Fault("GET", "/b.safetensors", status=403),
    ]
    home = tmp_path / "home"
    with pytest.raises(AssertionError, match="403"):
        python(hub, home, DOWNLOAD)
    first, second = hub.sent("GET", "/a.safetensors")
    assert (first.range, second.range) == (None, f"bytes={chunk}-")
    python(hub, home, DOWNLOAD)
    assert len(hub.sent("GET", "/a.safetensors")) == 2 and len(hub.sent("GET", "/b.safetensors")) == 2
    (snapshot,) = (home / "hub" / "models--me--model" / "snapshots").iterdir()
    for name, expected in hub.repositories["me/model"].files().items():
        assert (snapshot / name).read_bytes() == expected
    assert not list(home.rglob("*.incomplete"))
