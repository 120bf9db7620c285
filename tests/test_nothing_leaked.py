# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Publishing a folder that somebody else wrote, or that holds what nobody should see."""

import base64
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import shutil
import socket
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from attnres_convert import InputError, reading
from attnres_recipes import card, publishing, stranger
from attnres_recipes.data import train_tokenizer
from attnres_recipes.leaks import printable, runs_code, secret_in
from attnres_recipes.publishing import INDEX, WEIGHTS, add_card, collect, load_as_stranger
from attnres_recipes.run import open_run
from convert_models import edit_json
from families import tiny_model
from safetensors.torch import load_file, save_file


SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import push_to_hub  # noqa: E402


TOKEN = "hf_" + "aB3" * 12


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(vocab_size=300).save_pretrained(folder)
    train_tokenizer(["import this"] * 3, 270).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nA model.\n")
    (folder / "results.json").write_text('{"loss": 1.5}')
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refusal(folder: Path, monkeypatch, tmp_path, *options: str) -> str:
    """The one line of a dry run that refuses, after which no temporary file is left."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    with pytest.raises(SystemExit) as exit:
        push_to_hub.main([str(folder), "me/model", "--dry-run", *options])
    line = exit.value.code
    assert isinstance(line, str) and line.startswith("push_to_hub: ") and len(line) <= 300 and line.isprintable()
    assert TOKEN not in line and not list((tmp_path / "tmp").iterdir())
    return line


def make_index(folder: Path, **changes):
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    shard = "model-00001-of-00001.safetensors"
    save_file(weights, folder / shard, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, shard), **changes}
    (folder / INDEX).write_text(json.dumps({name: value for name, value in index.items() if value != "absent"}))


def make_weights(folder: Path, header: object, length: int | None = None, data: bytes = b"\0" * 4):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / WEIGHTS).write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


# Links and what is no file


@pytest.mark.parametrize("name", ["notes.txt", "LICENSE", "README.md", "results.json", "config.json", "x.md", WEIGHTS])
@pytest.mark.parametrize("target", ["outside", "nothing", "itself", "hidden"])
def test_links(folder, tmp_path, monkeypatch, name, target):
    """A link to a file that nobody wanted to publish is refused, wherever it lies."""
    (tmp_path / "outside").write_text("secret")
    (folder / ".env").write_text("secret")
    (folder / name).unlink(missing_ok=True)
    targets = {"outside": tmp_path / "outside", "nothing": "absent", "itself": name, "hidden": ".env"}
    (folder / name).symlink_to(targets[target])
    line = refusal(folder, monkeypatch, tmp_path)
    assert name in line and "link" in line and "remove it" in line


@pytest.mark.parametrize("name", ["additional_chat_templates", "figures"])
def test_links_to_folders(folder, tmp_path, monkeypatch, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jinja").write_text("secret")
    (folder / name).symlink_to(tmp_path / "outside")
    assert "leaves the folder" in refusal(folder, monkeypatch, tmp_path)


def test_link_in_a_folder(folder, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "x.jinja").symlink_to(tmp_path / "secret")
    assert "leaves the folder" in refusal(folder, monkeypatch, tmp_path)


def test_link_by_way_of_another(folder, tmp_path, monkeypatch):
    (tmp_path / "secret").write_text("secret")
    (folder / ".hidden").symlink_to(tmp_path / "secret")
    (folder / "notes.txt").symlink_to(".hidden")
    assert "leaves the folder" in refusal(folder, monkeypatch, tmp_path)


def test_cache_of_the_hub(folder, tmp_path):
    """There, files are links into the repository's own `blobs`; into those of another one they are not."""
    for repository in ("models--a--b", "models--c--d"):
        blobs, snapshot = tmp_path / repository / "blobs", tmp_path / repository / "snapshots" / "1234"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        for number, path in enumerate(sorted(folder.iterdir())):
            shutil.copy(path, blobs / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert set(collect(snapshot).files) == {path.name for path in folder.iterdir()}
    (snapshot / "notes.txt").symlink_to(tmp_path / "models--a--b" / "blobs" / "0")
    with pytest.raises(InputError, match="leaves the folder"):
        collect(snapshot)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", ["fifo", "link to fifo", "zero", "folder"])
@pytest.mark.parametrize("name", ["README.md", "results.json", "config.json", "tokenizer.json", WEIGHTS, "new.txt"])
def test_what_is_no_file(folder, tmp_path, monkeypatch, name, kind):
    """Nothing waits for a pipe or reads a device without end."""
    (folder / name).unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(folder / name)
    elif kind == "link to fifo":
        os.mkfifo(folder / ".fifo")
        (folder / name).symlink_to(".fifo")
    elif kind == "zero":
        (folder / name).symlink_to("/dev/zero")
    elif name in ("README.md", "results.json", "new.txt", "tokenizer.json"):
        (folder / name).mkdir()
        assert name not in collect(folder).files
        return
    else:
        (folder / name).mkdir()
    line = refusal(folder, monkeypatch, tmp_path)
    assert name in line or "no safetensors weights" in line


def test_unreadable_files(folder, tmp_path, monkeypatch):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    (folder / "README.md").chmod(0)
    assert "can't be read" in refusal(folder, monkeypatch, tmp_path)


def test_files_that_vanish(folder, tmp_path, monkeypatch):
    """Between the list and the check; one line, like everything that goes wrong."""
    listing = publishing.listing

    def remove(package):
        (folder / "tokenizer.json").unlink()
        return listing(package)

    monkeypatch.setattr(publishing, "listing", remove)
    assert "tokenizer.json" in refusal(folder, monkeypatch, tmp_path)


# Secrets


def png(kind: bytes, content: bytes) -> bytes:
    chunks = [(b"IHDR", b"\0\0\0\1\0\0\0\1\x08\0\0\0\0"), (kind, content), (b"IEND", b"")]
    body = b"".join(
        len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big") for name, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


FORMS = {
    "plain": TOKEN.encode(),
    "inside a word": f"export x{TOKEN}yz".encode(),
    "utf-16": TOKEN.encode("utf-16"),
    "utf-16-le": ("x" + TOKEN).encode("utf-16-le"),
    "utf-16-be": TOKEN.encode("utf-16-be"),
    "utf-8 with mark": TOKEN.encode("utf-8-sig"),
    "escaped": TOKEN.replace("_", "\\u005f").encode(),
    **{f"base64, {n} before": base64.b64encode(b"x" * n + TOKEN.encode()) for n in range(3)},
    "base64 in lines": base64.encodebytes(b"user=me&password=" * 5 + TOKEN.encode() * 2),
    "base64 of utf-16": base64.b64encode(TOKEN.encode("utf-16-le")),
    "png text": png(b"tEXt", b"Command\0" + TOKEN.encode()),
    "png compressed": png(b"zTXt", b"Command\0\0" + zlib.compress(TOKEN.encode())),
    "png international": png(b"iTXt", b"Command\0\1\0en\0C\0" + zlib.compress(TOKEN.encode())),
}


@pytest.mark.parametrize("form", FORMS)
def test_tokens(folder, tmp_path, monkeypatch, form):
    name = "figure.png" if form.startswith("png") else "notes.txt"
    (folder / name).write_bytes(FORMS[form])
    assert f"{name} contains a Hub token" in refusal(folder, monkeypatch, tmp_path)


@pytest.mark.parametrize("place", ["metadata", "name of a tensor", "numbers"])
def test_tokens_in_weights(folder, tmp_path, monkeypatch, place):
    tensors, metadata = load_file(folder / WEIGHTS), {"format": "pt"}
    if place == "metadata":
        metadata["command"] = f"HF_TOKEN={TOKEN}"
    elif place == "name of a tensor":
        tensors[f"x.{TOKEN}"] = torch.ones(1)
    else:
        tensors["x"] = torch.tensor(list(TOKEN.encode()), dtype=torch.uint8)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    assert "contains a Hub token" in refusal(folder, monkeypatch, tmp_path)


def test_token_across_parts_of_a_file(folder, tmp_path, monkeypatch):
    """Large files are read in parts."""
    monkeypatch.setattr("attnres_recipes.leaks.CHUNK", 1000)
    monkeypatch.setattr("attnres_recipes.leaks.OVERLAP", 100)
    (folder / "notes.txt").write_text("x " * 490 + TOKEN + " x" * 5000)
    assert "contains a Hub token" in refusal(folder, monkeypatch, tmp_path)


KEY = "A" * 64
OTHER_SECRETS = {
    "AKIAIOSFODNN7EXAMPLE": "an AWS key",
    "ghp_" + "a1" * 18: "a GitHub token",
    "sk-proj-" + "a1B2" * 12: "an API key",
    "glpat-" + "a1B2" * 5: "a GitLab token",
    "xoxb-123456789012-" + "a1B2" * 6: "a Slack token",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{KEY}\n": "a private key",
    f'{{"key": "-----BEGIN RSA PRIVATE KEY-----\\n{KEY}"}}': "a private key",
    f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES,1\n\n{KEY}": "a private key",
}


@pytest.mark.parametrize("text", OTHER_SECRETS)
def test_other_secrets(text):
    assert secret_in(f"x = '{text}'".encode()) == OTHER_SECRETS[text]
    assert printable(text) == "..." or text not in printable(text)


@pytest.mark.parametrize(
    "text", ["hf_model_with_a_name_of_many_words", "-----BEGIN RSA PRIVATE KEY-----", "risk-free", "AKIA", "task-" * 20]
)
def test_no_secrets(text):
    """What stands in vocabularies and texts."""
    assert secret_in(text.encode()) is None


def test_secrets_of_real_folders():
    """None is found where there is none: in the models of this repository and in its own code."""
    root = SCRIPTS.parent
    for path in [*root.glob("model_cards/*/*"), *root.glob("*attnres.py")]:
        assert secret_in(path.read_bytes()) is None
        assert path.suffix == ".safetensors" or not runs_code(path)


@pytest.mark.parametrize("name", [f"{TOKEN}.txt", f"a/{TOKEN}/x.json", f"x{TOKEN}.png", "ghp_" + "a1" * 18 + ".txt"])
def test_tokens_in_file_names(folder, tmp_path, monkeypatch, capsys, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("x")
    assert "the name of a file contains a" in refusal(folder, monkeypatch, tmp_path)
    assert Path(name).stem not in "".join(capsys.readouterr())


def test_names_that_stay(folder):
    """The list of what stays shows no token and nothing that a terminal obeys."""
    for name in (f"{TOKEN}.bin", "a\x1b[2J\nstays here: b.bin", os.fsdecode(b"\xff.bin"), "x" * 250 + ".bin"):
        (folder / name).write_text("x")
    text = publishing.listing(collect(folder))
    lines = [line for line in text.splitlines() if line.startswith("stays here")]
    assert len(lines) == 4 and TOKEN not in text and all(line.isprintable() for line in lines)
    text.encode()


@pytest.mark.parametrize("name", ["a\nb.txt", "a\x1b[2J.txt", os.fsdecode(b"\xff.txt"), "a\u202eb.txt"])
def test_names_that_cannot_be_printed(folder, tmp_path, monkeypatch, name):
    (folder / name).write_text("x")
    assert "rename it" in refusal(folder, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        ["me/model", "--message", f"with {TOKEN}"],
        ["me/model", "--message", f"with x{TOKEN}"],
        ["me/model", "--revision", TOKEN],
        [TOKEN],
        ["me/model", "--token", TOKEN],
        [f"a/b/{TOKEN}"],
    ],
)
def test_tokens_in_options(folder, capsys, options):
    """They are refused, as they would be published, and aren't repeated."""
    with pytest.raises(SystemExit) as exit:
        push_to_hub.main([str(folder), *options])
    assert exit.value.code == 2 and TOKEN not in "".join(capsys.readouterr())


# Pickles and archives under other names


class Call:
    def __reduce__(self):
        return os.system, ("true",)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x", "x")
    return file.getvalue()


DISGUISED = {
    **{f"pickle {protocol}": pickle.dumps([1, {"a": 2}], protocol) for protocol in range(6)},
    **{f"call {protocol}": pickle.dumps(Call(), protocol) for protocol in range(6)},
    "call and more": pickle.dumps(Call(), 0)[:-1] + b"and more",
    "call and text": pickle.dumps(Call(), 0) + b"and more",
    "gzip": gzip.compress(pickle.dumps([1])),
    "bz2": bz2.compress(b"x"),
    "xz": lzma.compress(b"x"),
    "7z": b"7z\xbc\xaf\x27\x1c\0\4",
    "zip": zipped(),
    "zip behind text": b"hello\n" + zipped(),
    "tar": b"x".ljust(257, b"\0") + b"ustar\0" + b"\0" * 300,
}


@pytest.mark.parametrize("name", ["notes.txt", "results.json", "tokenizer.model", "figure.png"])
@pytest.mark.parametrize("kind", DISGUISED)
def test_pickles_in_disguise(folder, tmp_path, monkeypatch, kind, name):
    (folder / name).write_bytes(DISGUISED[kind])
    assert "pickle or an archive" in refusal(folder, monkeypatch, tmp_path)


@pytest.mark.parametrize(
    "text", ["", ".", "N.", "in\nthe\n.\n", "cat\ndog\nR\n.", "(c) 2026", "the\nof\n.", "I\n.", "]."]
)
def test_no_pickles(tmp_path, text):
    """Texts whose letters are steps of a pickle."""
    (tmp_path / "vocab.txt").write_text(text)
    assert not runs_code(tmp_path / "vocab.txt")


# Code from elsewhere


CODE_FROM_ELSEWHERE = [
    ("config.json", {"auto_map": 5}),
    ("config.json", {"auto_map": "evil/repo--tok.Evil"}),
    ("config.json", {"auto_map": {"AutoConfig": 5}}),
    ("config.json", {"auto_map": {"AutoConfig": {"a": "b"}}}),
    ("config.json", {"auto_map": {"AutoConfig": [["evil/repo--tok.Evil"]]}}),
    ("config.json", {"auto_map": {"AutoConfig": "configuration_attnres.Evil"}}),
    ("config.json", {"auto_map": {"AutoConfig": "configuration_attnres.AttnResConfig.x"}}),
    ("config.json", {"auto_map": {"AutoConfig": "evil/repo--configuration_attnres.AttnResConfig"}}),
    ("config.json", {"text_config": {"auto_map": {"AutoConfig": "evil.Evil"}}}),
    ("config.json", {"custom_pipelines": {"evil": {"impl": "evil.Evil"}}}),
    ("config.json", {"attn_implementation": "evil/kernels"}),
    ("config.json", {"_attn_implementation": {"": "evil/kernels"}}),
    ("config.json", {"_name_or_path": 5}),
    *(
        (name, {"auto_map": value})
        for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
        for value in (
            5,
            {"AutoTokenizer": ["evil/repo--tok.Evil", None]},
            {"AutoTokenizer": [None, [5]]},
            {"AutoTokenizer": None},
            [["evil.Evil"]],
        )
    ),
    ("generation_config.json", {"auto_map": {"x": "evil.Evil"}}),
    ("sub/any_config.json", {"auto_map": {"x": "evil.Evil"}}),
]


@pytest.mark.parametrize("name, change", CODE_FROM_ELSEWHERE)
def test_code_from_elsewhere(folder, tmp_path, monkeypatch, name, change):
    (folder / name).parent.mkdir(exist_ok=True)
    if not (folder / name).exists():
        (folder / name).write_text("{}")
    edit_json(folder / name, **change)
    line = refusal(folder, monkeypatch, tmp_path)
    assert name in line and (next(iter(change)) in line or "auto_map" in line)


def test_origin(folder):
    """A Hub id tells where a model came from, and so may stay; a path of this machine does not."""
    edit_json(folder / "config.json", _name_or_path="some/model")
    collect(folder)
    edit_json(folder / "config.json", _name_or_path=str(folder))
    with pytest.raises(InputError, match="_name_or_path"):
        collect(folder)


# Malformed folders


def text(name: str, content: str | bytes):
    return lambda folder: (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)


def made_card(results: object):
    def change(folder):
        (folder / "README.md").unlink()
        (folder / "results.json").write_text(json.dumps(results))

    return change


TENSOR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
MALFORMED = {
    **{f"config is {value}": text("config.json", value) for value in ("5", "null", "[]", '"x"', "[" * 3000, "", "\0")},
    "config has half a surrogate": text("config.json", '{"a": "\\ud800"}'),
    "model_type is a number": lambda folder: edit_json(folder / "config.json", model_type=5),
    "layers is a text": lambda folder: edit_json(folder / "config.json", num_hidden_layers="2"),
    "tokenizer_config is a list": text("tokenizer_config.json", "[]"),
    "generation_config is a list": text("generation_config.json", "[]"),
    "generation_config is nested": text("generation_config.json", "[" * 100000),
    "no metadata": lambda folder: make_index(folder, metadata="absent"),
    "metadata is a list": lambda folder: make_index(folder, metadata=[]),
    "weight_map is a list": lambda folder: make_index(folder, weight_map=[]),
    "weight_map is empty": lambda folder: make_index(folder, weight_map={}),
    "weight_map of numbers": lambda folder: make_index(folder, weight_map={"x": 5}),
    "weight_map of lists": lambda folder: make_index(folder, weight_map={"x": ["y"]}),
    "weight_map leaves the folder": lambda folder: make_index(folder, weight_map={"x": "../../secret.safetensors"}),
    "weight_map is absolute": lambda folder: make_index(folder, weight_map={"x": "/etc/passwd"}),
    "weight_map names another file": lambda folder: make_index(folder, weight_map={"x": "config.json"}),
    "weights are empty": text(WEIGHTS, b""),
    "header is a list": lambda folder: make_weights(folder, []),
    "header beyond the file": lambda folder: make_weights(folder, {"x": TENSOR}, length=1 << 40),
    "header of 2^63": lambda folder: make_weights(folder, {"x": TENSOR}, length=(1 << 64) - 1),
    "header of 101 MB": lambda folder: make_weights(folder, b" " * 101_000_000),
    "header names a tensor twice": lambda folder: make_weights(
        folder, b'{"x": %b, "x": %b}' % ((json.dumps(TENSOR).encode(),) * 2)
    ),
    "header metadata are no texts": lambda folder: make_weights(folder, {"__metadata__": {"a": 5}, "x": TENSOR}),
    "header metadata are a list": lambda folder: make_weights(folder, {"__metadata__": [], "y": 1, "x": TENSOR}),
    "card is no UTF-8": text("README.md", b"---\nlicense: \xff\n---\n"),
    "card with bomb": text("README.md", "---\na: &a [x]\nb: &b [*a, *a]\nc: [*b, *b]\n---\n"),
    "card nested": text("README.md", f"---\na: {'[' * 3000}\n---\n"),
    "card is a list": text("README.md", "---\n- a\n---\n"),
    "card is no YAML": text("README.md", "---\nlicense: [\n---\n"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(folder, tmp_path, monkeypatch, case):
    """One line, whatever is wrong."""
    MALFORMED[case](folder)
    line = refusal(folder, monkeypatch, tmp_path)
    assert "Traceback" not in line


@pytest.mark.parametrize(
    "results",
    [
        5,
        [],
        {"command": 5},
        {"command": "x", "arguments": 5},
        {"command": "x", "evaluation": 5},
        {"command": "x", "evaluation": [5]},
        {"command": "x", "evaluation": [{"metric": 5, "type": [], "value": {}, "dataset": None}]},
        {"command": "x", "datasets": 5, "language": {}, "parameters": "many"},
        {"command": "x", "versions": [], "conversion": 5},
        {"command": "x" * 10**6},
    ],
)
def test_results_of_wrong_types(folder, tmp_path, results):
    """A card is made without them, or it is said that it can't be."""
    made_card(results)(folder)
    (tmp_path / "card").mkdir()
    package = collect(folder)
    try:
        add_card(package, "me/model", tmp_path / "card")
    except InputError as error:
        assert "README.md" in str(error) and len(str(error)) <= 300
    else:
        assert package.files["README.md"].read_text().startswith("---\n")


# What the code of a folder can do


SPY = """
import json, os, socket, subprocess, sys
def tried(action):
    try:
        return str(action())
    except BaseException as error:
        return type(error).__name__
found = {
    "environment": sorted(os.environ),
    "home": sorted(os.listdir(os.path.expanduser("~"))),
    "secret": tried(lambda: open(SECRET).read()),
    "list": tried(lambda: os.listdir(os.path.dirname(SECRET))),
    "real home": tried(lambda: os.listdir(__import__("pwd").getpwuid(os.getuid()).pw_dir)),
    "parent": tried(lambda: open(f"/proc/{os.getppid()}/environ").read()),
    "parent's memory": tried(lambda: open(f"/proc/{os.getppid()}/mem").read(1)),
    "write": tried(lambda: open(os.path.join(sys.prefix, "spy"), "w")),
    "write to the model": tried(lambda: open(SECRET, "w")),
    "connect": tried(lambda: socket.create_connection(("127.0.0.1", PORT), 5)),
    "datagram": tried(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)),
    "unix": tried(lambda: socket.socket(socket.AF_UNIX)),
    "truncate": tried(lambda: os.truncate(SECRET, 0)),
    "in a child": tried(lambda: subprocess.run(["cat", SECRET], capture_output=True).returncode),
    "session": tried(os.setsid),
    "group": tried(lambda: os.setpgid(0, 0)),
    "files": sorted(os.path.realpath(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) > 2),
}
raise ValueError("spied " + json.dumps(found))
"""


def with_code(folder: Path, code: str):
    with open(folder / "modeling_attnres.py", "a") as file:
        file.write(f"\n\n{code}\n")


def is_closable() -> bool:
    """Whether this system can close off a process, tried in one."""
    script = "import sys; from attnres_recipes import stranger; "
    script += "print(stranger.close({'project': '', 'readable': [], 'home': sys.argv[1]}))"
    done = subprocess.run([sys.executable, "-c", script, str(SCRIPTS)], capture_output=True, text=True)
    return done.stdout == "[]\n"


closed_only = pytest.mark.skipif(not is_closable(), reason="this system closes no process off")


def test_foreign_code_does_not_run(folder, tmp_path, monkeypatch):
    """Unless it is trusted; the line names the file and the option."""
    with_code(folder, f"open({str(tmp_path / 'ran')!r}, 'w')")
    line = refusal(folder, monkeypatch, tmp_path)
    assert "modeling_attnres.py" in line and "--trust-remote-code" in line and not (tmp_path / "ran").exists()


def test_code_of_a_model_that_needs_none(folder):
    """It is neither run nor published."""
    edit_json(folder / "config.json", model_type="llama", auto_map=None)
    with_code(folder, "raise SystemExit")
    package = collect(folder)
    assert (
        not package.needs_code and "modeling_attnres.py" in package.left and "modeling_attnres.py" not in package.files
    )


@closed_only
def test_what_trusted_code_can_do(folder, tmp_path, monkeypatch):
    """It sees no variable with a secret, no file, no other process, and has no network."""
    (tmp_path / "secret").write_text("a secret")
    for name in ("AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "SOME_PASSWORD", "HTTPS_PROXY", "SSH_AUTH_SOCK", "PYTHONPATH"):
        monkeypatch.setenv(name, "a secret")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with_code(folder, SPY.replace("SECRET", repr(str(tmp_path / "secret"))).replace("PORT", str(port)))
        with pytest.raises(InputError) as caught:
            monkeypatch.setattr(publishing, "InputError", LongError)
            load_as_stranger(collect(folder), trust_remote_code=True)
    assert "spied " in str(caught.value), caught.value
    found = json.loads(str(caught.value).split("spied ", 1)[1].rsplit(" (ValueError); ", 1)[0])
    allowed = {*stranger.VARIABLES, "HOME", "USERPROFILE", "HF_HOME", "TMPDIR", "TEMP", "TMP", "HF_HUB_OFFLINE"}
    allowed |= {"TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES"}
    # what libraries set on import
    added = {name for name in found.pop("environment") if name not in allowed}
    assert not any("SECRET" in name or "TOKEN" in name or "PROXY" in name or "AUTH" in name for name in added), added
    assert set(found.pop("home")) <= {"modules", "hub", ".cache", ".triton", "torchinductor_root"}
    assert not [path for path in found.pop("files") if "secret" in path or path.endswith(("/out", "/task"))]
    assert found.pop("in a child") != "0"
    assert set(found.values()) == {"PermissionError"}, found


class LongError(InputError):
    """With all that it says, for the test."""

    def __init__(self, message):
        ValueError.__init__(self, message)


@closed_only
@pytest.mark.parametrize("end", ["while True: time.sleep(1)", "os._exit(0)", "os.kill(os.getpid(), 9)"])
def test_time_limit(folder, tmp_path, monkeypatch, end):
    """A check that doesn't end is ended, and what it started with it, also if it ends by itself."""
    mark = f"mark-{os.getpid()}-{len(end)}"
    program = f"import time, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(1000)  # {mark}"
    start = f"import os, subprocess, sys, time\nsubprocess.Popen([sys.executable, '-S', '-c', {program!r}])\n"
    with_code(folder, f"{start}\n{end}")
    if "while" in end:
        monkeypatch.setattr(stranger, "SECONDS", 20)
    line = refusal(folder, monkeypatch, tmp_path, "--trust-remote-code")
    assert "a stranger can't load it" in line and ("after 20 seconds" in line) == ("while" in end)
    left = [process for process in psutil.process_iter(["cmdline"]) if mark in " ".join(process.info["cmdline"] or [])]
    assert left == []


@closed_only
def test_output_does_not_open_the_doors(folder, tmp_path, monkeypatch):
    """Code that prints without measure, or what the check prints, isn't run again with more rights."""
    runs = []
    run = stranger._run
    monkeypatch.setattr(stranger, "_run", lambda task, *args: runs.append(task["closed"]) or run(task, *args))
    script = (
        "import os, sys\nos.ftruncate(1, 0)\nprint('5\\n' * 100_000, '{\"open\": 5}')\nsys.stdout.flush()\nos._exit(0)"
    )
    with_code(folder, script)
    refusal(folder, monkeypatch, tmp_path, "--trust-remote-code")
    assert runs == [True]


def test_system_that_closes_nothing(folder, monkeypatch, capsys):
    """The check runs all the same, and says what was open."""
    monkeypatch.setattr(stranger, "FORBIDDEN", {})
    run = stranger._run
    monkeypatch.setattr(
        stranger, "_run", lambda task, *args: (run(task, *args)[0], None) if task["closed"] else run(task, *args)
    )
    push_to_hub.main([str(folder), "me/model", "--dry-run", "--trust-remote-code"])
    out = capsys.readouterr().out
    assert all(f"note: {note}" in out for note in stranger.OPEN.values())


# Training


LINKS = [
    "LICENSE",
    "NOTICE.txt",
    "USE_POLICY.md",
    "README.md",
    "chat_template.jinja",
    "additional_chat_templates/a.jinja",
]


@pytest.mark.parametrize("name", LINKS)
def test_training_copies_nothing_from_elsewhere(folder, tmp_path, name):
    """What is taken over from the model that was trained on is refused before training if it is a link to elsewhere."""
    (tmp_path / "secret").write_text("---\nlicense: secret\n---\n")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(tmp_path / "secret")
    for option in ("model", "tokenizer"):
        with pytest.raises(InputError, match=r"is a link that leaves the folder"):
            open_run(tmp_path / "out", {option: str(folder)})
    assert not (tmp_path / "out").exists()
    args = SimpleNamespace(output=tmp_path / "out", model=str(folder))
    if name == "README.md":
        assert "secret" not in json.dumps(card.parent_metadata(args.model, card.parent_folder(args)))
    elif card.LICENCE_FILES.match(name):
        (tmp_path / "result").mkdir()
        with pytest.raises(InputError, match=r"is a link that leaves the folder"):
            card.write_training_card(tmp_path / "result", args, {}, "a title", None, None)
        assert not any((tmp_path / "result").iterdir())


def test_training_on_links_in_the_cache_of_the_hub(folder, tmp_path):
    home = tmp_path / "models--a--b"
    (home / "snapshots").mkdir(parents=True)
    (home / "blobs").mkdir()
    snapshot = folder.rename(home / "snapshots" / "0123")
    (home / "blobs" / "abc").write_text("a licence")
    (snapshot / "LICENSE").symlink_to("../../blobs/abc")
    reading.check_own_files(snapshot)
