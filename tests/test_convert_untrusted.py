# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Whatever a source holds, a conversion ends soon: with a model that loads, or with one line and nothing written."""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from attnres_convert.card import folder_card, write_card
from attnres_convert.cli import main
from attnres_convert.kimi_k3 import main as kimi_k3
from convert_models import edit_json, limited, save_donor, tree
from marks import mostly_slow
from transformers import AutoModelForCausalLM


SECONDS = 60  # of a case; the slowest takes 5 on an idle machine
CONFIG, INDEX, SHARD = "config.json", "model.safetensors.index.json", "model.safetensors"
HUGE = 10**15


@pytest.fixture(scope="module")
def donors(tmp_path_factory) -> dict[str, Path]:
    """A model in one file, in several, and with Attention Residuals."""
    root = tmp_path_factory.mktemp("donors")
    save_donor(root / "single", num_hidden_layers=2)
    save_donor(root / "sharded", num_hidden_layers=2, shard_size="30KB")
    for name in ("single", "sharded"):
        (root / name / "README.md").write_text("---\nlicense: mit\n---\nA donor.\n")
        (root / name / "tokenizer_config.json").write_text("{}")
    assert main([str(root / "single"), str(root / "attnres"), "--no-verify"]) == 0
    return {name: root / name for name in ("single", "sharded", "attnres")}


@pytest.fixture
def run(donors, tmp_path, capsys):
    """Converts a damaged copy of a donor; returns the message of a refusal, or `None` after a look at the result."""

    def convert(damage, donor="single", *options) -> str | None:
        for name in ("src", "dst", "outside"):
            shutil.rmtree(tmp_path / name, ignore_errors=True)
        shutil.copytree(donors[donor], tmp_path / "src")
        (tmp_path / "outside").mkdir()
        damage(tmp_path / "src")
        before = tree(tmp_path)
        if donor == "attnres":
            options = ("--to-donor", *options)
        capsys.readouterr()
        with limited(SECONDS):
            code = main([str(tmp_path / "src"), str(tmp_path / "dst"), *options])
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in captured.err
        if code == 0:
            assert not lines
            assert {name: content for name, content in tree(tmp_path).items() if not name.startswith("dst/")} == before
            assert not any(path.is_symlink() for path in (tmp_path / "dst").rglob("*"))
            if "quantization_config" not in (tmp_path / "dst" / CONFIG).read_text():
                AutoModelForCausalLM.from_pretrained(tmp_path / "dst")
            return None
        assert code == 1 and captured.out == "" and len(lines) == 1 and len(lines[0]) <= 307, captured.err
        assert captured.err.splitlines()[-1] == lines[0]
        assert tree(tmp_path) == before
        assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "src"]
        return lines[0]

    return convert


# ---- config.json

VALUES = (None, [], {}, 2.5, -1, 0, HUGE, "16", True, "\ud800", {"a": [None]})
READ = (
    *("model_type", "architectures", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "max_position_embeddings", "rope_parameters"),
    *("tie_word_embeddings", "output_hidden_states", "output_attentions", "return_dict", "use_cache"),
    *("is_encoder_decoder", "auto_map", "quantization_config", "layer_types", "id2label", "hidden_act", "dtype"),
    *("rms_norm_eps", "attn_implementation", "experts_implementation", "transformers_weights"),
    *("attention_bias", "pad_token_id", "rope_theta", "sliding_window"),
)
KEPT = (
    *("initializer_range", "eos_token_id", "pretraining_tp", "chunk_size_feed_forward", "num_labels", "problem_type"),
    *("num_nextn_predict_layers", "attn_res_mode", "attn_res_block_size", "attn_res_norm_eps", "custom_pipelines"),
    *(
        "output_depth_attentions",
        "torchscript",
        "name_or_path",
        "per_layer_config",
        "transformers_version",
        "attention_dropout",
        "base_model_tp_plan",
    ),
)


def in_config(**changes):
    return lambda src: edit_json(src / CONFIG, **changes)


@pytest.mark.parametrize("field", mostly_slow([*READ, *KEPT], *READ[::4], *KEPT[::4]))
def test_fields_of_the_configuration(field, run):
    """Any field with any value."""
    for value in VALUES:
        run(in_config(**{field: value}), "single", *(["--no-verify"] if field in KEPT else []))


@pytest.mark.parametrize("field", ["attn_res_mode", "attn_res_block_size", "attn_res_sum_scale", "attn_res_norm_eps"])
def test_fields_on_the_way_back(field, run):
    for value in VALUES:
        run(in_config(**{field: value}), "attnres")


TEXTS = {
    "number": "5",
    "null": "null",
    "list": "[1]",
    "text": '"x"',
    "empty": "",
    "unclosed": '{"model_type": "llama",',
    "not a number": '{"a": NaN}',
    "nested": '{"a": ' + "[" * 3000 + "]" * 3000 + "}",
    "deep": '{"a": ' + "[" * 200 + "]" * 200 + "}",
    "digits": '{"a": ' + "9" * 10_000 + "}",
    "surrogate": '{"a": "\\ud800"}',
    "surrogate name": '{"\\udfff": 1}',
    "binary": b"\xff\xfe\x00",
    "utf-16": '{"a": 1}'.encode("utf-16"),
    "zero bytes": b"\0" * 100,
    "many keys": json.dumps({f"key{index}": index for index in range(200_000)}),
}


@pytest.mark.parametrize("file", [CONFIG, INDEX, "generation_config.json", "tokenizer_config.json", "results.json"])
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_texts(text, file, run):
    """A JSON file that holds anything. A model needs its configuration and its index, but no results."""
    content = text if isinstance(text, bytes) else text.encode()
    message = run(lambda src: (src / file).write_bytes(content), "sharded", "--no-verify")
    assert message or file not in (CONFIG, INDEX)
    assert message is None or (file in message or "model_type" in message) and file != "results.json"


def test_much_in_a_configuration(run):
    """What it says besides is kept, also if it is much."""
    assert run(in_config(many={f"key{index}": index for index in range(9_000)}, list=list(range(9_000)))) is None


# ---- the index


def in_index(**changes):
    return lambda src: edit_json(src / INDEX, **changes)


def in_map(**changes):
    def damage(src):
        weight_map = json.loads((src / INDEX).read_text())["weight_map"]
        edit_json(src / INDEX, weight_map={**weight_map, **changes})

    return damage


BAD_INDICES = {
    "map list": in_index(weight_map=[]),
    "map text": in_index(weight_map="x"),
    "map empty": in_index(weight_map={}),
    "file number": in_map(x=5),
    "file null": in_map(x=None),
    "file list": in_map(x=[]),
    "file surrogate": in_map(x="\ud800.safetensors"),
    "tensor surrogate": in_map(**{"\ud800": "model.safetensors"}),
    "file empty": in_map(x=""),
    "file dot": in_map(x="."),
    "file zero": in_map(x="a\0.safetensors"),
    "file up": in_map(x="../x.safetensors"),
    "file absolute": in_map(x="/etc/passwd.safetensors"),
    "file long": in_map(x="x" * 5000 + ".safetensors"),
    "files many": in_map(**{f"x{index}": f"{index}.safetensors" for index in range(200_000)}),
    "tensors many": in_map(**{f"x{index}": "model-00001-of-00002.safetensors" for index in range(200_000)}),
}
METADATA = {
    "absent": in_index(metadata=...),
    "list": in_index(metadata=[]),
    "null": in_index(metadata=None),
    "size text": in_index(metadata={"total_size": "x"}),
    "size null": in_index(metadata={"total_size": None}),
    "size true": in_index(metadata={"total_size": True}),
    "size list": in_index(metadata={"total_size": [], "total_parameters": {}}),
    "size float": in_index(metadata={"total_size": 1e300}),
    "empty": in_index(metadata={}),
}


@pytest.mark.parametrize("damage", BAD_INDICES.values(), ids=BAD_INDICES)
def test_indices(damage, run):
    assert INDEX in run(damage, "sharded", "--no-verify")


@pytest.mark.parametrize("damage", METADATA.values(), ids=METADATA)
def test_metadata_of_an_index(damage, run, donors, tmp_path):
    """They matter to no one: the new index has sizes that are right, or none."""
    message = run(damage, "sharded")
    assert message is None or "--no-verify" in message  # where transformers can't load the donor either
    assert run(damage, "sharded", "--no-verify") is None
    sizes = json.loads((tmp_path / "dst" / INDEX).read_text())["metadata"]
    assert all(type(size) is int and size > 0 for size in sizes.values())


# ---- the header of a shard


def in_header(change):
    """A shard whose header is what `change` makes of it: an object, or a text."""

    def damage(src):
        content = (src / SHARD).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = change(json.loads(content[8 : 8 + length]))
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (src / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])

    return damage


def tensor(**changes):
    def change(header):
        header["model.norm.weight"] = {
            key: value for key, value in {**header["model.norm.weight"], **changes}.items() if value is not ...
        }
        return header

    return in_header(change)


def added(**tensors):
    return in_header(lambda header: {**header, **tensors})


def size(number):
    return lambda src: (src / SHARD).write_bytes(number.to_bytes(8, "little") + b"{}")


EMPTY = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
BAD_HEADERS = {
    "size 0": size(0),
    "size huge": size(2**64 - 1),
    "size large": size(10**9),
    "list": in_header(lambda header: []),
    "null": in_header(lambda header: b"null"),
    "nested": in_header(lambda header: b"[" * 100_000 + b"]" * 100_000),
    "twice": in_header(lambda header: json.dumps({**header, "x": EMPTY, "y": EMPTY}).replace('"y"', '"x"').encode()),
    "utf-16": in_header(lambda header: json.dumps(header).encode("utf-16")),
    "surrogate": added(**{"\ud800": EMPTY}),
    "metadata list": added(__metadata__=[1]),
    "metadata number": added(__metadata__={"format": 5}),
    "metadata null": added(__metadata__={"format": None}),
    "metadata nested": added(__metadata__={"format": {"a": "b"}}),
    "tensor null": added(x=None),
    "tensor number": added(x=5),
    "tensor list": added(x=[]),
    "tensor empty": added(x={}),
    "more fields": added(x={**EMPTY, "a": 1}),
    "dtype unknown": tensor(dtype="F128"),
    "dtype number": tensor(dtype=5),
    "dtype list": tensor(dtype=["F32"]),
    "dtype absent": tensor(dtype=...),
    "shape absent": tensor(shape=...),
    "shape null": tensor(shape=None),
    "shape number": tensor(shape=40),
    "shape text": tensor(shape="40"),
    "shape float": tensor(shape=[40.0]),
    "shape true": tensor(shape=[True, 40]),
    "shape negative": tensor(shape=[-1, -40]),
    "shape other": tensor(shape=[41]),
    "shape huge": tensor(shape=[10**4000]),
    "shape overflow": tensor(shape=[2**32, 2**32]),
    "shape overflow with 0": added(x={**EMPTY, "shape": [2**62, 2**62, 0]}),
    "shape long": tensor(shape=[1] * 100_000 + [40]),
    "offsets null": tensor(data_offsets=None),
    "offsets three": tensor(data_offsets=[0, 1, 2]),
    "offsets one": tensor(data_offsets=[0]),
    "offsets text": tensor(data_offsets=["0", "160"]),
    "offsets huge": tensor(data_offsets=[0, 10**30]),
    "offsets negative": tensor(data_offsets=[-160, 0]),
    "offsets swapped": tensor(data_offsets=[160, 0]),
    "offsets true": added(x={**EMPTY, "data_offsets": [False, False]}),
    "offsets float": added(x={**EMPTY, "data_offsets": [0.0, 0.0]}),
}


@pytest.mark.parametrize("damage", BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_headers(damage, run):
    assert f"{SHARD} is damaged" in run(damage, "single", "--no-verify")


def test_many_tensors(run):
    """As many as the largest models have, which this one doesn't use."""
    run(added(**{f"x{index}": EMPTY for index in range(50_000)}), "single", "--no-verify")


@pytest.mark.parametrize("name", ["", "\n", "\x1b[31m", "é", "x" * 100_000])
def test_names_of_tensors(name, run):
    """Any name is kept; none reaches the terminal as it is."""
    assert run(added(**{name: EMPTY}), "single", "--no-verify") is None


@pytest.mark.parametrize("layers", [3, 1_000, 9_999, 10**5, 10**9])
def test_more_layers_than_there_are(layers, run):
    message = run(in_config(num_hidden_layers=layers), "single", "--no-verify")
    assert "num_hidden_layers" in message or "disagrees" in message


# ---- files that are no files


def fifo(path):
    os.mkfifo(path)


def zeros(path):
    path.symlink_to("/dev/zero")


def loop(path):
    path.symlink_to(path.name)


def dangling(path):
    path.symlink_to("nowhere")


def device(path):
    path.symlink_to("/dev/null")


def outside(path):
    original = path.parents[1] / "outside" / path.name
    original.write_bytes(b"secret")
    path.symlink_to(original)


def outside_copy(path, content=b"{}"):
    original = path.parents[1] / "outside" / path.name
    original.write_bytes(content)
    path.symlink_to(original)


KINDS = (fifo, zeros, loop, dangling, device, outside)
FILES = (CONFIG, SHARD, "README.md", "results.json", "tokenizer.json", "generation_config.json", "notes.txt")
FILES += ("LICENSE", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model", "modeling_x.py")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file(file, kind, run):
    """A pipe, a device, a link to nothing, to itself or out of the folder is refused by name."""

    def damage(src):
        content = (src / file).read_bytes() if (src / file).exists() else b"{}"
        (src / file).unlink(missing_ok=True)
        outside_copy(src / file, content) if kind is outside else kind(src / file)

    message = run(damage, "single", "--no-verify")
    assert message is not None and file in message


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("donor", ["sharded", "attnres"])
def test_shards_that_are_no_files(kind, donor, run):
    def damage(src):
        shard = sorted(src.glob("*.safetensors"))[1]
        content = shard.read_bytes()
        shard.unlink()
        outside_copy(shard, content) if kind is outside else kind(shard)

    assert "safetensors" in run(damage, donor, "--no-verify")


def test_folders_of_templates(run):
    """Their files are held to the same, also if the folder is a link."""

    def link(src):
        (src.parent / "outside" / "x.jinja").write_text("secret")
        (src / "additional_chat_templates").symlink_to(src.parent / "outside")

    def file(src):
        (src / "additional_chat_templates").mkdir()
        (src.parent / "outside" / "x.jinja").write_text("secret")
        (src / "additional_chat_templates" / "x.jinja").symlink_to(src.parent / "outside" / "x.jinja")

    def pipe(src):
        (src / "additional_chat_templates").mkdir()
        os.mkfifo(src / "additional_chat_templates" / "x.jinja")

    for damage in (link, file):
        assert "leaves the folder" in run(damage, "single", "--no-verify")
    assert "no regular file" in run(pipe, "single", "--no-verify")


def test_links_within_the_folder(run, tmp_path):
    """They are as good as files; the result holds the files themselves."""

    def damage(src):
        (src / "LICENSE.txt").write_text("text")
        (src / "LICENSE").symlink_to("LICENSE.txt")

    assert run(damage, "single", "--no-verify") is None
    assert (tmp_path / "dst" / "LICENSE").read_text() == "text"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems take no such names")
def test_file_names_that_are_no_text(run, tmp_path):
    def damage(src):
        Path(os.fsdecode(os.fsencode(src) + b"/\xff.txt")).write_text("x")

    assert run(damage, "single", "--no-verify") is None
    folder = os.fsencode(tmp_path)
    os.rename(folder + b"/src", folder + b"/src\xff")
    assert main([os.fsdecode(folder + b"/src\xff"), os.fsdecode(folder + b"/dst\xff"), "--no-verify"]) == 0


# ---- cards and results

CARDS = {
    "tags number": "tags: 5",
    "tags numbers": "tags: [5, null, [x], {a: b}, true]",
    "tags true": "tags: true",
    "base true": "base_model: true",
    "base object": "base_model: {a: b}",
    "base nested": "base_model: [[a], a/b]",
    "license date": "license: 2024-01-01",
    "license number": "license: .inf",
    "language object": "language: {en: de}",
    "datasets number": "datasets: 1.5",
    "pipeline list": "pipeline_tag: [a]",
    "nested": "a: " + "[" * 3000 + "]" * 3000,
    "nested blocks": "\n".join(" " * index + "a:" for index in range(1000)),
    "aliases": "a: &a [x]\n"
    + "\n".join(f"{b}: &{b} [*{a},*{a},*{a},*{a},*{a},*{a}]" for a, b in zip("abcdefg", "bcdefgh")),
    "surrogate": 'license: "\\ud800"',
    "python": "license: !!python/object/apply:os.system [true]",
    "tag": "license: !!int x",
    "keys": "{[a]: b}",
    "keys number": "5: 6",
    "base 60": "license: " + ":".join(["1"] * 50_000),
    "large": "license: " + "x" * 10**6,
    "list": "- a",
    "text": "text",
    "unclosed": "license: [",
    "tab": "\tlicense: mit",
    "norwegian": "language: no",
}


@pytest.mark.parametrize("metadata", CARDS.values(), ids=CARDS)
def test_cards(metadata, run, tmp_path):
    """A card is no reason to refuse a model; what can't be taken over is left out."""
    assert (
        run(lambda src: (src / "README.md").write_text(f"---\n{metadata}\n---\nA model."), "single", "--no-verify")
        is None
    )
    assert "attention-residuals" in (tmp_path / "dst" / "README.md").read_text()
    if metadata == CARDS["norwegian"]:
        assert "language: 'no'" in (tmp_path / "dst" / "README.md").read_text()


def test_a_card_that_is_no_text(run):
    for content in (b"\xff\xfe", b"---\n" * 10**6, b"\0" * 10**7, b"x" * 11_000_000):
        assert (
            run(lambda src, content=content: (src / "README.md").write_bytes(content), "single", "--no-verify") is None
        )


RESULTS = json.loads((Path(__file__).parents[1] / "model_cards" / "attnres-1.3m-lora" / "results.json").read_text())


def paths(content, *before):
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        yield (*before, name)
        if isinstance(value, (dict, list)):
            yield from paths(value, *before, name)


@pytest.mark.parametrize("value", [..., *VALUES], ids=lambda value: str(value)[:20].encode("ascii", "replace").decode())
def test_results(value, tmp_path):
    """Any field of `results.json` with any value, or absent: a card is written."""
    RESULTS["model_config"] = RESULTS.pop("base_config", None) or RESULTS["model_config"]
    for kind in (CONFIG, "adapter_config.json"):
        for path in [(), *paths(RESULTS)]:
            content = json.loads(json.dumps(RESULTS))
            *parents, name = path or (None,)
            inner = content
            for parent in parents:
                inner = inner[parent]
            if not path:
                content = None if value is ... else value
            elif value is ...:
                del inner[name]
            else:
                inner[name] = value
            (tmp_path / "results.json").write_text(json.dumps(content))
            if kind != CONFIG:
                (tmp_path / kind).write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "a/b"}))
            write_card(tmp_path, folder_card(tmp_path))


@pytest.mark.parametrize("field", ["peft_type", "base_model_name_or_path"])
def test_adapters(field, tmp_path):
    for value in VALUES:
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", field: value}))
        write_card(tmp_path, folder_card(tmp_path))


# ---- the other tool


@pytest.mark.parametrize("damage", [*BAD_HEADERS.values(), *(TEXTS[x] for x in ("number", "binary", "nested"))])
def test_kimi_k3(damage, donors, tmp_path, capsys):
    """Damaged rows and checkpoints change nothing."""
    shutil.copytree(donors["attnres"], tmp_path / "checkpoint")
    shutil.copytree(donors["single"], tmp_path / "rows")
    if callable(damage):
        damage(tmp_path / "rows")
    else:
        (tmp_path / "checkpoint" / CONFIG).write_bytes(damage if isinstance(damage, bytes) else damage.encode())
    before = tree(tmp_path)
    with limited(SECONDS):
        assert kimi_k3(["import", str(tmp_path / "rows"), str(tmp_path / "checkpoint"), "--force"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 310
    assert tree(tmp_path) == before
