# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""ARCHITECTURE.md, and how to add to what it shows: code runs, what is named exists, the pictures show the code."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import code_blocks
from PIL import Image


ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

import architecture  # noqa: E402


DOCUMENTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("ARCHITECTURE.md", "CONTRIBUTING.md")}
TEXT = DOCUMENTS["ARCHITECTURE.md"]
GUIDES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/guides/add_*.md"))}
EXAMPLES = {name: "".join(code_blocks(text, "python")) for name, text in GUIDES.items()}
PROSE = re.sub(r"^```.*?^```", "", "\n".join([TEXT, *GUIDES.values()]), flags=re.MULTILINE | re.DOTALL)
WORDS = re.findall(r"`([^`\n]+)`", PROSE)


def test_every_example_is_found():
    assert list(EXAMPLES) == ["add_a_family", "add_a_mixer", "add_an_implementation"]
    assert [text.count("```python") for text in (*GUIDES.values(), TEXT)] == [1, 1, 1, 0]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name, tmp_path):
    """Each is complete, and asserts what the text says of it."""
    assert "\nassert " in EXAMPLES[name]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    (tmp_path / "example.py").write_text(EXAMPLES[name], encoding="utf-8")
    command = [sys.executable, "-W", "ignore", "example.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert result.returncode == 0, result.stderr


def test_a_family_takes_20_lines():
    family, _ = EXAMPLES["add_a_family"].split("\n# The tensors of a donor")
    assert len([line for line in family.splitlines() if line.strip()]) <= 20


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    """What looks like a file of this repository, and links to such files."""
    text = re.sub(r"^```.*?^```", "", DOCUMENTS[document], flags=re.MULTILINE | re.DOTALL)
    names = re.findall(r"`([\w./-]+(?:\.(?:py|cpp|md|toml|txt|ipynb)|/))`", text)
    names += re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
    assert len(names) >= 8
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_every_code_file_is_in_the_table():
    names = {f"{path.relative_to(ROOT)}" for path in [*ROOT.glob("*.py"), *ROOT.glob("attnres_kernels/*.*")]}
    assert names - {"setup.py", "attnres_kernels/__init__.py"} <= set(WORDS)


def test_files_that_travel():
    """The table says of each file what `hub_files` says."""
    rows = dict(re.findall(r"^\| `(\w+\.py)` \|.*\| ([\w ]+) \|$", TEXT, flags=re.MULTILINE))
    files = architecture.travelling()
    assert {name for name, travels in rows.items() if travels == "yes"} == {f"{name}.py" for name in files["llama"]}
    assert {name for name, travels in rows.items() if travels != "no"} == {f"{name}.py" for name in files["others"]}


def test_names_exist():
    """Names of classes, functions and fields in the prose are those of the code."""
    folders = ("", "convert", "attnres_kernels", "scripts/recipes")
    sources = [path.read_text(encoding="utf-8") for name in folders for path in (ROOT / name).glob("*.py")]
    defined = set(re.findall(r"(?:def|class) (\w+)", "\n".join(sources)))
    defined |= set(re.findall(r'"(?:\w+::)?(\w+)"', "\n".join(sources)))  # of operators, modes, implementations
    defined |= set(re.findall(r"^ *(?:self\.)?(\w+)(?:: [^=\n]+)? = ", "\n".join(sources), flags=re.MULTILINE))
    names = {word.split("(")[0].rpartition(".")[2] for word in WORDS if re.fullmatch(r"[\w.]*\w(\(\w*\))?", word)}
    names = {name for name in names if "_" in name.strip("_") or name[0].isupper()}
    installed = {"attnres_convert", "None"}
    assert len(names) > 30
    assert names - defined - installed == set()


def test_commands_exist():
    """Every `make` command is a target, and has a line in `make help`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", "\n".join(DOCUMENTS.values()), flags=re.MULTILINE))
    assert {"architecture", "setup", "test", "lint", "conformance", "fuzz", "bench", "zoo"} <= named <= targets


@pytest.mark.parametrize("name", architecture.PICTURES)
def test_pictures_are_up_to_date(name):
    """They show today's imports and names; `make architecture` draws them again."""
    shown, _ = architecture.PICTURES[name]
    with Image.open(ROOT / "docs" / name) as image:
        assert json.loads(image.text["shown"]) == shown()


def test_pictures_are_drawn(tmp_path, capsys):
    architecture.main(["--output", str(tmp_path / "docs")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["pictures"]
    for name in architecture.PICTURES:
        with Image.open(tmp_path / "docs" / name) as drawn, Image.open(ROOT / "docs" / name) as committed:
            assert drawn.text == committed.text and drawn.size == committed.size


def test_imports_are_found(monkeypatch, tmp_path):
    """Also those inside of functions and `try`; an import of a neighbour in a package is not one of a root module."""
    files = {
        "attnres.py": "def f():\n    import b_attnres\n",
        "b_attnres.py": "try:\n    from .c_attnres import x\nexcept ImportError:\n    from c_attnres import x\n",
        "c_attnres.py": "import os\n",
        "setup.py": "import attnres\n",
        "attnres_kernels/fused.py": "from attnres_kernels import cpu\n",
        "attnres_kernels/cpu.py": "import c_attnres as c\n",
        "convert/files.py": "from .reading import a\nfrom b_attnres import x\n",
        "convert/reading.py": "",
        "scripts/recipes/look.py": "from attnres_convert.reading import a\n",
        "scripts/run.py": "import reading\nfrom attnres_recipes.look import a\n",
        "benchmarks/time.py": "import attnres\n",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(content)
    monkeypatch.setattr(architecture, "ROOT", tmp_path)
    assert architecture.import_graph() == {
        "attnres": ["b_attnres"],
        "b_attnres": ["c_attnres"],
        "c_attnres": [],
        "attnres_kernels.cpu": ["c_attnres"],
        "attnres_kernels.fused": ["attnres_kernels.cpu"],
        "attnres_convert": ["b_attnres"],
        "attnres_recipes": ["attnres_convert"],
        "scripts": ["attnres_recipes"],
        "benchmarks": ["attnres"],
    }
    with pytest.raises(SystemExit, match="give it a place"):
        architecture.draw_files({"imports": architecture.import_graph()})


def test_implied_imports_are_left_out():
    graph = {"a": ["b", "c"], "b": ["c"], "c": [], "d": ["a", "c"]}
    assert architecture.without_implied(graph) == {"a": ["b"], "b": ["c"], "c": [], "d": ["a"]}


def test_a_name_that_has_gone_is_an_error():
    caller = "modeling_attnres.AttnResModelMixin.forward"
    architecture.check_walk([("modeling_attnres.AttnResModelMixin.embed", caller, "")])
    with pytest.raises(SystemExit, match="is gone"):
        architecture.check_walk([("each", [("modeling_attnres.AttnResModelMixin.embedded", None, "")])])
    with pytest.raises(SystemExit, match="doesn't call"):
        architecture.check_walk([("modeling_attnres.AttnResModelMixin.place_layers", caller, "")])
