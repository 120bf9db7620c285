# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Publishing and loading over HTTP, with the real client, against the Hub in hub_server.py."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from attnres_convert import InputError
from attnres_convert.card import folder_card
from attnres_recipes.data import train_tokenizer
from attnres_recipes.options import PushOptions
from attnres_recipes.publishing import add_card, collect, load_as_stranger, publish
from convert_models import edit_json
from families import tiny_model
from hub_server import Fault, serve_hub
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from test_hub_code import CODE_FILES
from transformers import AutoModelForCausalLM


SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import push_to_hub  # noqa: E402
from push_to_hub import parse_arguments  # noqa: E402


TOKEN, OTHER_TOKEN = "hf_" + "a" * 34, "hf_" + "b" * 34
CARD = "---\nlicense: mit\n---\nA model.\n"


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["import this"] * 3, 270)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer) -> Path:
    """A complete folder with three shards; tests copy it."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(vocab_size=300, num_hidden_layers=3).save_pretrained(folder, max_shard_size="100KB")
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(CARD)
    (folder / "results.json").write_text('{"loss": 1.5}')
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "stdlib.yaml").write_text("- value: 1.5\n")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def hub():
    with serve_hub() as hub:
        hub.users = {TOKEN: "me", OTHER_TOKEN: "other"}
        yield hub


@pytest.fixture
def api(hub, monkeypatch) -> HfApi:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.address, token=TOKEN)


def run_script(hub, home: Path, *arguments, token: str | None = TOKEN) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / "push_to_hub.py"), *map(str, arguments)]
    home.mkdir(exist_ok=True)
    return subprocess.run(
        command, env=hub.environment(home, token), capture_output=True, text=True, cwd=home, timeout=200
    )


def arguments(folder: Path, *options: str, repo: str = "me/model") -> PushOptions:
    return parse_arguments([str(folder), repo, *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def published(hub, repo_id: str = "me/model", revision: str = "main") -> dict[str, bytes]:
    files = dict(hub.repositories[repo_id].files(revision))
    del files[".gitattributes"]
    return files


def uploads(hub) -> int:
    """How many large files were sent."""
    return len(hub.sent("PUT", "/lfs/"))


# The whole command


def test_push_killed_and_resumed(hub, folder, tmp_path):
    """A killed upload publishes nothing; the next one sends what is missing, and all is there in one commit."""
    command = [sys.executable, str(SCRIPTS / "push_to_hub.py"), str(folder), "model", "--private"]
    hub.faults.append(Fault("POST", "/commit/", stalls=True))
    (tmp_path / "home").mkdir()
    process = subprocess.Popen(command, env=hub.environment(tmp_path / "home", TOKEN), stdout=subprocess.DEVNULL)
    try:
        while not hub.sent("POST", "/commit/"):
            assert process.poll() is None
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert published(hub) == {} and uploads(hub) == 3
    hub.requests.clear()
    oid = next(iter(hub.repositories["me/model"].objects))
    del hub.repositories["me/model"].objects[oid]  # as if the upload had stopped before
    hub.faults.append(Fault("PUT", "/lfs/", after=1000))  # and the connection is lost once more
    done = run_script(hub, tmp_path / "home", folder, "model", "--private")
    assert done.returncode == 0, done.stderr
    assert [request.path.split("/")[-1] for request in hub.sent("PUT", "/lfs/")] == [oid, oid]
    assert published(hub) == contents(folder)
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["repository"], result["created"], result["removed"]) == ("me/model", False, [])
    assert result["commit"] == hub.repositories["me/model"].branches["main"]
    assert hub.repositories["me/model"].private
    assert [commit.title for commit in hub.repositories["me/model"].commits.values()] == [
        "initial commit",
        "Upload model",
    ]
    assert TOKEN not in done.stdout + done.stderr
    assert not any(TOKEN.encode() in content for content in contents(tmp_path).values())


def test_dry_run(folder, tmp_path):
    """It lists all files with sizes, and what stays, without network or token."""
    (folder / "training_args.bin").write_bytes(b"x")
    with serve_hub() as hub:
        done = run_script(hub, tmp_path / "home", folder, "me/model", "--dry-run", token=None)
        assert done.returncode == 0, done.stderr
        assert hub.requests == []
    sizes = {name: len(content) for name, content in contents(folder).items() if name != "training_args.bin"}
    assert json.loads(done.stdout.splitlines()[-1])["files"] == sizes
    listed = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines()[: len(sizes)]}
    assert listed == {name: f"{size:,}" for name, size in sizes.items()}
    assert "stays here: training_args.bin" in done.stdout


@pytest.mark.parametrize("token, message", [(None, "there is no token"), ("hf_" + "c" * 34, "accept your token")])
def test_token_is_wrong(hub, folder, tmp_path, token, message):
    done = run_script(hub, tmp_path / "home", folder, "me/model", token=token)
    assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not token or token not in done.stderr + done.stdout
    assert hub.repositories == {}


def test_no_server(folder, tmp_path):
    """Without a connection the error says so."""
    with serve_hub() as hub:
        pass
    done = run_script(hub, tmp_path / "home", folder, "me/model")
    assert done.returncode == 1
    assert done.stderr.startswith("push_to_hub: the connection to the Hub failed") and done.stderr.count("\n") == 1


# What is sent


def test_server_error(hub, api, folder):
    """An error in the middle is one line, and the repository stays as it was; the next push needs no upload again."""
    hub.faults.append(Fault("POST", "/commit/", status=500))
    with pytest.raises(InputError) as error:
        publish(api, collect(folder), arguments(folder))
    assert str(error.value) == (
        "the Hub answers 500: Internal Error; nothing is half published, run the command again to go on."
    )
    assert published(hub) == {} and uploads(hub) == 3
    result = publish(api, collect(folder), arguments(folder))
    assert published(hub) == contents(folder) and uploads(hub) == 3
    assert not result["created"]


def test_second_push(hub, api, folder):
    """Only what has changed is sent; a folder that is there already makes no commit."""
    first = publish(api, collect(folder), arguments(folder))
    assert first["created"] and uploads(hub) == 3 and sorted(first["uploaded"]) == sorted(contents(folder))
    hub.requests.clear()
    again = publish(api, collect(folder), arguments(folder))
    assert (again["uploaded"], again["commit"]) == ([], first["commit"])
    assert not hub.sent("POST", "/commit/") and not hub.sent("PUT", "")
    (folder / "README.md").write_text(CARD + "More.\n")
    shard = folder / "model-00002-of-00003.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(shard).items()}, shard, metadata={"format": "pt"})
    second = publish(api, collect(folder), arguments(folder))
    assert second["uploaded"] == ["README.md", shard.name] and uploads(hub) == 1
    assert published(hub) == contents(folder)
    assert published(hub, revision=first["commit"])["README.md"] == CARD.encode()


def test_from_the_cache_of_the_hub(hub, api, folder, tmp_path):
    """There all files are links; what they lead to is published."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "1234"
    for name, content in contents(folder).items():
        blob = blobs / str(len(list(blobs.glob("*"))))
        blob.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    publish(api, collect(snapshot), arguments(snapshot))
    assert published(hub) == contents(folder)


def test_file_that_vanishes(hub, api, folder):
    package = collect(folder)
    (folder / "results.json").unlink()
    with pytest.raises(InputError, match="results.json is gone from the folder"):
        publish(api, package, arguments(folder))
    assert published(hub) == {}


def test_weights_that_are_gone(hub, api, folder):
    """Shards of the model before don't stay beside a single file, where they would be loaded or confuse."""
    publish(api, collect(folder), arguments(folder))
    model = AutoModelForCausalLM.from_pretrained(folder)
    for path in folder.glob("model*"):
        path.unlink()
    model.save_pretrained(folder)
    hub.repositories["me/model"].files()["notes.txt"] = b"written on the Hub"
    removed = publish(api, collect(folder), arguments(folder))["removed"]
    assert len(removed) == 4 and published(hub) == {**contents(folder), "notes.txt": b"written on the Hub"}


def test_branch(hub, api, folder):
    """--revision makes a branch from main or goes on with it, and leaves main alone; a failed one isn't left behind."""
    publish(api, collect(folder), arguments(folder))
    (folder / "README.md").write_text(CARD + "Other.\n")
    hub.faults.append(Fault("POST", "/commit/", status=500))
    with pytest.raises(InputError, match="500"):
        publish(api, collect(folder), arguments(folder, "--revision", "trial"))
    assert list(hub.repositories["me/model"].branches) == ["main"]
    publish(api, collect(folder), arguments(folder, "--revision", "trial"))
    assert published(hub, revision="trial") == contents(folder)
    assert published(hub)["README.md"] == CARD.encode()
    api.create_tag("me/model", tag="v1", revision="trial")
    with pytest.raises(InputError, match="is a tag or a commit"):
        publish(api, collect(folder), arguments(folder, "--revision", "v1"))


def test_pull_request(hub, api, folder):
    """--create-pr proposes a change to somebody else's repository, whose main stays."""
    hub.add("other/model", {"README.md": b"theirs"})
    result = publish(api, collect(folder), arguments(folder, "--create-pr", repo="other/model"))
    assert result["pull_request"].endswith("/other/model/discussions/1")
    assert published(hub, "other/model") == {"README.md": b"theirs"}
    assert published(hub, "other/model", "refs/pr/1") == contents(folder)


@pytest.mark.parametrize(
    "options, repository, message",
    [
        (["other/model"], {}, "you can't write to other/model"),
        (["other/new"], {}, "can't be created by me"),
        (["other/model"], {"private": True}, "can't be created by me"),
        (["me/model", "--private"], {}, "exists and is public"),
        (["me/absent", "--create-pr"], {}, "needs a repository"),
    ],
)
def test_names_that_exist(hub, api, folder, options, repository, message):
    """Somebody else's name, and a public repository where a private one is wanted, are refused; nothing changes."""
    for name in ("other/model", "me/model"):
        hub.add(name, {"README.md": b"before"}, **repository)
    with pytest.raises(InputError, match=message) as error:
        publish(api, collect(folder), parse_arguments([str(folder), *options]))
    assert "\n" not in str(error.value)
    assert published(hub, "other/model") == published(hub, "me/model") == {"README.md": b"before"}
    assert sorted(hub.repositories) == ["me/model", "other/model"]


def test_concurrent_change(hub, api, folder, monkeypatch):
    """A commit that comes in between is not overwritten."""
    hub.add("me/model")
    preupload = api.preupload_lfs_files

    def change_meanwhile(*args, **kwargs):
        preupload(*args, **kwargs)
        repository = hub.repositories["me/model"]
        repository.commit(repository.branches, "main", {".gitattributes": b"", "README.md": b"newer"}, "meanwhile")

    monkeypatch.setattr(api, "preupload_lfs_files", change_meanwhile)
    with pytest.raises(InputError, match="was changed meanwhile"):
        publish(api, collect(folder), arguments(folder))
    assert published(hub) == {"README.md": b"newer"}


def test_card_is_made(hub, api, folder, tmp_path):
    """A folder without a card gets one, under the repository's name; the folder stays as it is."""
    (folder / "README.md").unlink()
    before = contents(folder)
    (tmp_path / "card").mkdir()
    package = collect(folder)
    add_card(package, "me/some-model", tmp_path / "card")
    publish(api, package, arguments(folder, repo="me/some-model"))
    files = published(hub, "me/some-model")
    card = files.pop("README.md").decode()
    assert files == before == contents(folder)
    assert "# some-model\n" in card and 'from_pretrained("me/some-model", trust_remote_code=True)' in card
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag, data.tags) == (
        "transformers",
        "text-generation",
        ["attention-residuals"],
    )
    assert data.license is None and data.base_model is None


@pytest.mark.slow
def test_card_takes_the_name_of_the_repository(hub, folder, tmp_path):
    """By the whole command; the folder that the card names as its base stays out of the metadata."""
    text = (
        folder_card(folder, "model", {"license": "mit"})
        .text()
        .replace("license: mit", "license: mit\nbase_model: a/b/c")
    )
    (folder / "README.md").write_text(text)
    done = run_script(hub, tmp_path / "home", folder, "new-name")
    assert done.returncode == 0 and "note: the base model on the card is a folder" in done.stdout, done.stderr
    files = published(hub, "me/new-name")
    card = files["README.md"].decode()
    assert "# new-name\n" in card and '"me/new-name"' in card and '"model"' not in card and "a/b/c" not in card
    assert card.split("---\n")[2].count("\n") == text.split("---\n")[2].count("\n")
    assert (folder / "README.md").read_text() == text
    again = run_script(hub, tmp_path / "home", folder, "me/new-name")
    assert json.loads(again.stdout.splitlines()[-1])["uploaded"] == []


def test_card_that_the_hub_refuses(hub, api, folder):
    """Metadata that is no YAML is refused before the commit."""
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(InputError, match="YAML can't be parsed"):
        publish(api, collect(folder), arguments(folder))
    assert published(hub) == {}


# What is not sent


def test_what_stays(folder):
    """Pickles, states of training, hidden files, tokens and other code stay; the rest goes up as it is."""
    complete = set(contents(folder))
    stay = "pytorch_model.bin checkpoint-3/optimizer.pt optimizer.safetensors .env .cache/x.json token hf_token.txt "
    stay += "__pycache__/x.pyc train.py a/.secret/x.json rng_state_0.pth weights.npy sub/modeling_attnres.py"
    for name in [*stay.split(), "figures/depth.png"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    (folder / ".#README.md").symlink_to("nowhere")  # an editor's lock
    package = collect(folder)
    assert set(package.files) == complete | {"figures/depth.png"}
    assert {name.split("/")[0] for name in stay.split()} - {"a", "sub"} <= set(package.left)


def test_code_of_another_family_stays(folder):
    """A repository gets the code files that its model needs, whatever an earlier model has left in the folder."""
    shutil.copy(SCRIPTS.parent / "families_attnres.py", folder)
    package = collect(folder)
    assert {name for name in package.files if name.endswith(".py")} == set(CODE_FILES)
    assert package.left == {"families_attnres.py": "code that this model doesn't need"}


def test_headers_that_look_like_pickles(folder):
    """A safetensors file begins with the length of its header, whose bytes may be those of a pickle."""
    tensors, path = {"x": torch.ones(2)}, folder / "extra.safetensors"
    save_file(tensors, path, metadata={"note": ""})
    length = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(tensors, path, metadata={"note": "x" * (0x280 - length)})
    assert path.read_bytes().startswith(b"\x80\x02")
    assert path.name in collect(folder).files


def link_to_file(folder):
    (folder.parent / "secret.json").write_text("{}")
    (folder / "extra.json").symlink_to("../secret.json")


def link_to_folder(folder):
    (folder.parent / "outside").mkdir()
    (folder / "inside").symlink_to("../outside")


def link_to_nothing(folder):
    (folder / "extra.json").symlink_to("absent.json")


def pickle_in_disguise(folder):
    torch.save({"x": torch.ones(2)}, folder / "extra.safetensors")


def cut_weights(folder):
    with open(folder / "model-00002-of-00003.safetensors", "r+b") as file:
        file.truncate(5000)


def old_pickle_in_disguise(folder):
    torch.save([1], folder / "extra.json", _use_new_zipfile_serialization=False)


def token_in_text(folder):
    (folder / "results.json").write_text(json.dumps({"command": f"HF_TOKEN={TOKEN}"}))


def token_of_another_form(folder):
    (folder / "results.json").write_text('{"command": "the-token-in-use"}')


def shard_is_missing(folder):
    (folder / "model-00002-of-00003.safetensors").unlink()


def two_sets_of_weights(folder):
    shutil.copy(folder / "model-00002-of-00003.safetensors", folder / "model.safetensors")


def no_weights(folder):
    (folder / "model.safetensors.index.json").unlink()


def adapter(folder):
    (folder / "config.json").rename(folder / "adapter_config.json")


def broken_config(folder):
    (folder / "config.json").write_text("[")


def foreign_code(folder):
    edit_json(folder / "config.json", auto_map={"AutoConfig": "else/where--configuration_attnres.AttnResConfig"})


def no_auto_map(folder):
    edit_json(folder / "config.json", auto_map={})


@pytest.mark.parametrize(
    "change, message",
    [
        (link_to_file, "link that leaves the folder"),
        (link_to_folder, "link that leaves the folder"),
        (link_to_nothing, "link to nothing"),
        (pickle_in_disguise, "extra.safetensors is no complete safetensors"),
        (cut_weights, "no complete safetensors"),
        (old_pickle_in_disguise, "is a pickle or an archive"),
        (token_in_text, "contains a Hub token"),
        (token_of_another_form, "contains a Hub token"),
        (shard_is_missing, "which model.safetensors.index.json names"),
        (two_sets_of_weights, "remove one"),
        (no_weights, "no safetensors weights"),
        (adapter, "is an adapter"),
        (broken_config, "is not valid JSON"),
        (foreign_code, "loads code from else/where"),
        (no_auto_map, "no auto_map"),
        *(
            (lambda folder, name=name: (folder / name).unlink(), f"{name} is missing")
            for name in (*CODE_FILES, "config.json", "generation_config.json", "tokenizer_config.json")
        ),
    ],
)
def test_refused(folder, change, message):
    change(folder)
    with pytest.raises(InputError, match=message) as error:
        collect(folder, "the-token-in-use")
    assert "\n" not in str(error.value) and TOKEN not in str(error.value)


def test_main_refuses(tmp_path, capsys):
    """From outside: a line and an exit code."""
    with pytest.raises(SystemExit, match="is not a folder"):
        push_to_hub.main([str(tmp_path / "absent"), "me/model", "--dry-run"])
    for options in (["a/b/c"], ["me/model", "--revision", "../x"], ["me/model", "--message", ""]):
        with pytest.raises(SystemExit) as exit:
            push_to_hub.main([str(tmp_path), *options])
        assert exit.value.code == 2 and "error:" in capsys.readouterr().err


def incomplete_auto_map(folder):
    config = json.loads((folder / "config.json").read_text())
    edit_json(
        folder / "config.json",
        auto_map={name: value for name, value in config["auto_map"].items() if name != "AutoModel"},
    )
    return r"lacks \['AutoModel'\]"


def code_that_imports_the_project(folder):
    with open(folder / "modeling_attnres.py", "a") as file:
        file.write("\n\nimport attnres\n")
    return "attnres"


def weights_of_another_model(folder):
    edit_json(folder / "config.json", num_hidden_layers=4)
    return "the model doesn't load: .*depth_attention"


@pytest.mark.parametrize("change", [incomplete_auto_map, code_that_imports_the_project, weights_of_another_model])
def test_what_a_stranger_cannot_load(folder, change):
    """Faults that show only where the project isn't installed, or that transformers only warns of."""
    message = change(folder)
    with pytest.raises(InputError, match=message) as error:
        load_as_stranger(collect(folder), trust_remote_code=True)
    assert "\n" not in str(error.value) and "nothing was uploaded" in str(error.value)
