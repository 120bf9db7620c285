# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The figures of what happens over depth: their numbers, and that what is written on them can be read."""

import html
import io
import json
import re
import shutil
import subprocess
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pytest
import tokenizers
import torch
from attnres_commands import plot_depth_attention
from attnres_convert import writing
from attnres_recipes import figures, look, plotting
from attnres_recipes.data import train_tokenizer
from marks import mostly_slow
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import attnres


SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "max_position_embeddings": 32}
MODES = {
    "uneven": {"attn_res_block_size": 2},
    "full": {"attn_res_mode": "full"},
    "denseformer": {"attn_res_mode": "denseformer"},
    "static": {"attn_res_mode": "full_static"},
    "delta": {"attn_res_mode": "block_delta"},
    "mhc": {"attn_res_mode": "mhc", "attn_res_num_streams": 3},
}
TEXT = "def main(args):\n    return args.value if args else None  # größer\n" * 20


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


def perturbed(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return model.eval()


def attnres_model(mode: str):
    return perturbed(
        attnres.AttnResForCausalLM(attnres.AttnResConfig(**SIZES, vocab_size=300, num_hidden_layers=3, **MODES[mode]))
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    made = {mode: attnres_model(mode) for mode in MODES}
    made["donor"] = perturbed(LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300, num_hidden_layers=3)))
    made["twin"] = attnres_model("uneven")
    made["twin"].model.depth_attention.query.data.neg_()
    made["broken"] = attnres_model("uneven")
    made["broken"].model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    made["gpt2"] = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_positions=32, n_embd=32, n_layer=2, n_head=2))
    tokenizer = train_tokenizer([TEXT], 300)
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {name: str(root / name) for name in made}


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 300, (count, 1, 13), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def test_names():
    """Reads are named by layer and sublayer, sources by block or sublayer; a short last block is one too."""
    config = attnres_model("uneven").config
    assert figures.read_names(config) == ["0a", "0m", "1a", "1m", "2a", "2m", "output"]
    assert figures.source_names(config) == ["embedding", "block 1", "block 2"]
    assert figures.block_layers(config) == ["layers 0–1", "layer 2"]
    names = figures.source_names(attnres_model("full").config)
    assert names == ["embedding", "0a", "0m", "1a", "1m", "2a", "2m"]
    assert figures.source_names(attnres_model("mhc").config) == ["stream 1", "stream 2", "stream 3"]
    modes = [figures.describe_mode(attnres_model(name).config) for name in ("uneven", "delta", "mhc")]
    assert modes == ["block mode, 2 layers per block", "block_delta mode, 1 layer per block", "mhc mode"]


@pytest.mark.parametrize("mode", MODES)
def test_weights(mode):
    """Averages are those of the model's own weights, with as many sources as the configuration says."""
    model = attnres_model(mode)
    data = batches()
    mean = look.mean_weights(model, data)
    ids = torch.cat([batch["input_ids"] for batch in data])
    with torch.no_grad():
        expected = model(input_ids=ids, output_depth_attentions=True).depth_attentions
    assert [len(read) for read in mean] == [model.config.num_depth_sources(row) for row in range(7)]
    assert [len(read) for read in mean][-1] == len(figures.source_names(model.config))
    for read, weights in zip(mean, expected):
        np.testing.assert_allclose(read, weights.mean(dim=(0, 2)), rtol=1e-5)
    if mode in ("uneven", "full", "static"):
        np.testing.assert_allclose([read.sum() for read in mean], 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["uneven", "donor"])
def test_dynamics(name):
    """Gradients are those of the mean loss, magnitudes those of all tokens, and the model stays as it was."""
    model = attnres_model(name) if name != "donor" else perturbed(
        LlamaForCausalLM(LlamaConfig(**SIZES, vocab_size=300, num_hidden_layers=3))
    )  # fmt: skip
    model.model.layers[0].requires_grad_(False)
    dynamics = look.depth_dynamics(model, batches(3))
    assert [p.requires_grad for p in model.model.layers[:2].parameters()] == [False] * 9 + [True] * 9
    assert all(parameter.grad is None for parameter in model.parameters())
    model.requires_grad_(True)
    ids = torch.cat([batch["input_ids"] for batch in batches(3)])
    outputs = model(input_ids=ids, labels=ids, output_hidden_states=True)
    outputs.loss.backward()
    for layer, norm in zip(model.model.layers, dynamics["gradient_norm"]):
        gradient = torch.cat([parameter.grad.flatten() for parameter in layer.parameters()])
        assert norm == pytest.approx(gradient.norm().item(), rel=1e-4)
    reads = [state.double().square().mean().sqrt().item() for state in outputs.hidden_states[:3]]
    assert dynamics["read_rms"][:6:2] == pytest.approx(reads, rel=1e-5)
    assert (len(dynamics["output_rms"]), len(dynamics["read_rms"])) == (6, 7)
    seen = [np.square(look.look(model, {"input_ids": batch["input_ids"]})["sum_rms"]) for batch in batches(3)]
    assert dynamics["sum_rms"] == pytest.approx(np.sqrt(np.mean(seen, axis=0)))
    assert dynamics["sum_starts"] == ([0, 4] if name == "uneven" else [0])


def test_documents_stay_apart():
    """Token by token too, a document of the text sees nothing of the one before it."""
    model, ids = attnres_model("full"), batches(1)[0]["input_ids"]
    batch = {"input_ids": ids, "position_ids": torch.tensor([[*range(7), *range(6)]])}
    weights = look.token_weights(model, plotting.prompt_batch(None, None, [batch], 11))
    for rows in (slice(0, 7), slice(7, 11)):
        alone = look.token_weights(model, {"input_ids": ids[:, rows]})
        for read, expected in zip(weights, alone):
            np.testing.assert_allclose(read[:, rows], expected, rtol=1e-4, atol=1e-6)


def test_file_stems():
    """No model's files replace another one's."""
    assert plotting.file_stems(["a/b", "a-b", "/a/b", "c"]) == ["a-b", "a-b-2", "a-b-3", "c"]


def test_token_texts():
    """Tokens that are no whole character are shown as bytes."""
    tokenizer = train_tokenizer(["größer"], 280)
    ids = tokenizer(" é日", add_special_tokens=False)["input_ids"]
    texts = [figures.token_text(tokenizer, token) for token in ids]
    assert texts == [" ", *(f"\\x{byte:02x}" for byte in "é日".encode())]
    assert figures.token_text(tokenizer, tokenizer.bos_token_id) == "<bos>"
    fallback = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE({"<0xE6>": 0}, [], byte_fallback=True))
    )
    fallback.backend_tokenizer.decoder = tokenizers.decoders.ByteFallback()
    assert figures.token_text(fallback, 0) == r"\xe6"


def run(capsys, *arguments) -> dict:
    plot_depth_attention.main(list(map(str, arguments)))
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_all_figures(models, text, tmp_path, capsys):
    """Each model gets its figures, all of them share one; each has its numbers beside it."""
    out = tmp_path / "out"
    order = ["donor", "uneven", "full", "denseformer", "static", "delta", "mhc"]
    prompt = ["--prompt", "return args.value $x_1$ 日本", "--tokens", 9, "--reads", "1m, output"]
    printed = run(capsys, *(models[name] for name in order), "--text", text, *prompt, "--output", out)
    kinds = ("reads", "relative", "tokens", "weights")
    expected = [f"{name}-{kind}.png" for name in ("uneven", "full") for kind in kinds]
    expected += ["denseformer-reads.png", "static-reads.png", "static-relative.png"]
    expected += [f"{name}-{kind}.png" for name in ("delta", "mhc") for kind in ("reads", "weights")]
    expected += ["dynamics.png"]
    assert printed == {"output": str(out), "figures": expected}
    files = {path.name for path in out.iterdir()}
    assert files == {*expected, *(name.replace(".png", ".json") for name in expected)}
    for name in expected:
        with Image.open(out / name) as image:
            assert min(image.size) > 400 and len(image.convert("RGB").getcolors(1 << 20)) > 50
    reads = json.loads((out / "uneven-reads.json").read_text())
    assert reads["sources"] == ["embedding", "block 1", "block 2"] and reads["mode"] == "block"
    assert [len(read) for read in reads["weights"]] == [1, 2, 2, 2, 2, 3, 3] and reads["tokens"] >= 200
    tokens = json.loads((out / "full-tokens.json").read_text())
    assert tokens["tokens"][0] == "<bos>" and len(tokens["tokens"]) == 9
    assert len(tokens["strongest_source"]) == 7 and max(map(max, tokens["strongest_source"])) <= 6
    weights = json.loads((out / "full-weights.json").read_text())["weights"]
    assert list(weights) == ["1m", "output"] and np.shape(weights["1m"]) == (4, 9)
    strongest = np.argmax(weights["output"], axis=0).tolist()
    assert strongest == tokens["strongest_source"][-1]
    dynamics = json.loads((out / "dynamics.json").read_text())
    assert list(dynamics) == order and len(dynamics["donor"]["gradient_norm"]) == 3
    starts = [seen.get("sum_starts") for seen in dynamics.values()]
    assert starts == [[0], [0, 4], *[[0, 1, 2, 3, 4, 5]] * 3, [0, 2, 4], None]
    assert [len(seen.get("sum_rms", ())) for seen in dynamics.values()] == 6 * [6] + [0]


PROMPT = "def main(args):\n\treturn </script><b>größer"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
QUIET = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


@pytest.fixture(scope="module")
def page(models, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    (folder / "text.txt").write_text(TEXT, encoding="utf-8")
    shown = [models[name] for name in ("uneven", "twin", "full", "donor", "static", "delta")]
    arguments = ["--text", folder / "text.txt", "--prompt", PROMPT, "--html", "--output", folder / "out"]
    plot_depth_attention.main(list(map(str, [*shown, *arguments])))
    return folder / "out" / "depth.html"


def page_data(page: Path) -> list[dict]:
    text = page.read_text(encoding="utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.DOTALL)[1])["models"]


def test_page(models, page):
    """It holds the model's own weights for each token of the prompt, in a file that needs nothing else."""
    text, own = page.read_text(encoding="utf-8"), page_data(page)
    assert text.count("</script>") == 2 and not re.search(
        r"https?://(?!www\.w3\.org/2000/svg)|src=|href=|@import", text
    )
    assert [model["name"] for model in own] == ["uneven", "twin", "full", "static", "delta"]
    model = attnres.AttnResForCausalLM.from_pretrained(models["uneven"])
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models["uneven"])
    with torch.no_grad():
        expected = model(**tokenizer(PROMPT, return_tensors="pt"), output_depth_attentions=True).depth_attentions
    for read, weights in zip(own[0]["weights"], expected, strict=True):
        np.testing.assert_allclose(read, weights[0], atol=6e-5)
    assert "".join(own[0]["tokens"][1:]) == PROMPT
    assert own[0]["sources"] == ["embedding", "block 1 (layers 0–1)", "block 2 (layer 2)"]
    assert (
        own[0]["open"] == [False, True, True, True, False, True, True]
        and own[0]["mode"] == "block mode, 2 layers per block"
    )
    assert own[3]["tokens"] == [] and np.shape(own[3]["weights"][6]) == (7,)
    assert [model["distribution"] for model in own] == [True, True, True, True, False]


def browsed(page: Path, tmp_path: Path, place: str = "", script: str = "", shot: Path | None = None) -> str:
    """What the page becomes in a browser at a place in it, after a script of events."""
    copy = tmp_path / "depth.html"
    copy.write_text(
        page.read_text(encoding="utf-8").replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8"
    )
    what = f"--screenshot={shot}" if shot else "--dump-dom"
    command = [CHROMIUM, *QUIET.split(), f"--user-data-dir={tmp_path / 'user'}", "--window-size=900,700", what]
    done = subprocess.run([*command, f"file://{copy}{place}"], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


def found(dom: str) -> str:
    return html.unescape(re.search(r'id="found"[^>]*>(.*?)</p>', dom, re.DOTALL)[1])


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_page_in_a_browser(page, tmp_path):
    """A place in the page and what a mouse or keys do there show the weight, token and model that they should."""
    uneven, twin, full, static, delta = page_data(page)
    dom = browsed(page, tmp_path, "#model=0&token=2&cell=3,1")
    assert f"read 1m of block 1 (layers 0–1), still open: {uneven['weights'][3][1][2]:.3f}" in found(dom)
    assert found(dom).startswith(f'token 2, "{uneven["tokens"][2]}" · ') and found(dom).endswith("plain average 0.500")
    cells = sum(map(len, uneven["weights"]))
    assert len(re.findall(r'class="cell( open)?( chosen)?"', dom)) == cells and dom.count('class="cell open') == 5
    assert "<b>größer" not in dom.split('id="data"')[0]
    # a mouse
    enter = "document.querySelectorAll('#tokens button')[4].dispatchEvent(new PointerEvent('pointerenter'));"
    assert (
        found(browsed(page, tmp_path, "", enter)) == f"token 4, {json.dumps(uneven['tokens'][4], ensure_ascii=False)}"
    )
    leave = "document.querySelectorAll('#tokens button')[4].dispatchEvent(new PointerEvent('pointerleave'));"
    assert found(browsed(page, tmp_path, "", enter + leave)) == f"mean of {len(uneven['tokens'])} tokens"
    click = "document.querySelectorAll('rect.cell')[2].dispatchEvent(new MouseEvent('click', {bubbles: true}));"
    mean = np.mean(uneven["weights"][1][1])
    after = "document.body.dataset.place = location.hash;"
    dom = browsed(page, tmp_path, "", click + after)
    assert f"read 0m of block 1 (layers 0–1), still open: {mean:.3f}" in found(dom)
    assert 'data-place="#model=0&amp;view=weight&amp;cell=1,1"' in dom
    # keys
    keys = "const all = document.querySelectorAll('#tokens button'); all[1].focus();"
    keys += "all[1].dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}));"
    assert found(browsed(page, tmp_path, "", keys)).startswith("token 2, ")
    # views
    times = uneven["weights"][3][1][2] * 2
    assert f": {times:.2f}×" in found(browsed(page, tmp_path, "#view=relative&token=2&cell=3,1"))
    difference = twin["weights"][3][1][2] - uneven["weights"][3][1][2]
    dom = browsed(page, tmp_path, "#model=1&view=from-0&token=2&cell=3,1")
    assert f": {difference:+.3f}" in found(dom) and "difference from uneven" in dom
    assert "difference from" not in re.sub(
        r"<script.*?</script>", "", browsed(page, tmp_path, "#model=2"), flags=re.DOTALL
    )
    assert "the same for all tokens · read output of 1a: " in found(browsed(page, tmp_path, "#model=3&cell=6,3"))
    assert f"{delta['weights'][2][1][0]:.3f}" in found(browsed(page, tmp_path, "#model=4&token=0&cell=2,1"))
    # places that aren't there
    assert found(browsed(page, tmp_path, "#model=length&token=map&cell=1,99")).startswith("mean of ")
    assert found(browsed(page, tmp_path, "#model=9&view=no&token=99&cell=50,50")).startswith("mean of ")


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_screenshot_of_the_page(page, tmp_path):
    browsed(page, tmp_path, "#token=2", shot=tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
        assert image.size == (900, 700) and len(colors) > 200
    weight = page_data(page)[0]["weights"][0][0][2]
    assert weight == 1 and (253, 231, 37) in colors  # the end of the palette, of the embedding alone


@pytest.mark.parametrize(("layers", "count"), [(1, 1), (2, 3), (48, 5)])
def test_reads_to_show(layers, count):
    """Up to five different reads are shown without being asked for, the last one among them."""
    config = attnres.AttnResConfig(**SIZES, num_hidden_layers=layers)
    reads = plotting.chosen_reads(config, None)
    assert len(set(reads)) == len(reads) == count and reads[-1] == "output"


def test_donor_alone(models, text, tmp_path, capsys):
    """A donor has no depth weights; its magnitudes are drawn."""
    printed = run(capsys, models["donor"], "--text", text, "--output", tmp_path / "out")
    assert printed["figures"] == ["dynamics.png"]


def random_reads(config, tokens: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(config.num_depth_sources(row), *([tokens] if tokens else [])) for row in range(config.num_depth_reads)]
    weights = [np.exp(generator.normal(size=shape)) for shape in shapes]
    return [read / read.sum(0) for read in weights]


def overlaps(figure) -> list[tuple[str, str]]:
    """Pairs of texts of a figure that lie on one another, and texts that leave it."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    texts = [] if figure._suptitle is None else [figure._suptitle]
    for axes in figure.axes:
        texts += [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            texts += [tick.label1 if tick.label1.get_visible() else tick.label2 for tick in axis.get_major_ticks()
                      if low <= tick.get_loc() <= high]  # fmt: skip
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        texts += legend.get_texts() if legend else []
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in texts if text.get_visible()]
    boxes = [(text, box) for text, box in boxes if text.strip() and box.width]
    width, height = canvas.get_width_height()
    found = [
        (text, "edge") for text, box in boxes if box.x0 < -1 or box.y0 < -1 or box.x1 > width + 1 or box.y1 > height + 1
    ]
    for (first, one), (second, other) in combinations(boxes, 2):
        covered = min(one.x1, other.x1) - max(one.x0, other.x0), min(one.y1, other.y1) - max(one.y0, other.y0)
        if min(covered) > 0.5:
            found.append((first, second))
    return found


@pytest.mark.parametrize("layers", mostly_slow([2, 7, 16, 48], 7, 48))
@pytest.mark.parametrize("mode", ["block", "full"])
def test_legible(layers, mode):
    """From 2 to 48 layers, no label lies on another one or leaves the figure."""
    block_size = {"attn_res_block_size": 3} if layers == 7 else {}
    sizes = {**SIZES, "num_hidden_layers": layers, **block_size}
    config = attnres.AttnResConfig(**sizes, attn_res_mode=mode)
    title = f"outputs-{mode}: what each read takes from depth\n{figures.describe_mode(config)}, mean of 2,048 tokens"
    tokens = [*["token", " a", "\n", "$x$"] * 8, "日本語", "an-unusually-long-token"]
    by_token = random_reads(config, len(tokens))
    drawn = [
        figures.plot_reads(random_reads(config), config, title),
        figures.plot_reads(random_reads(config), config, f"{title}\nrelative to uniform weights", relative=True),
        figures.plot_tokens(by_token, tokens, config),
        figures.plot_token_weights(by_token, tokens, config, plotting.chosen_reads(config, None)),
    ]
    for figure in drawn:
        assert overlaps(figure) == []
        assert max(figure.get_size_inches()) < 21


def test_legible_dynamics():
    """Many models with long names, and values over many orders of magnitude."""
    generator = np.random.default_rng(0)
    dynamics = {
        f"a-long-name-of-a-model-{number}/model": {
            "output_rms": np.exp(generator.normal(size=96) * 3).tolist(),
            "sum_rms": np.exp(generator.normal(size=96) * (number + 0.1)).tolist(),
            "sum_starts": list(range(0, 96, 16 * number or 1)),
            "read_rms": np.exp(generator.normal(size=97) * (number + 0.1)).tolist(),
            "gradient_norm": np.exp(generator.normal(size=48) * 0.2).tolist(),
        }
        for number in range(6)
    }
    assert overlaps(figures.plot_dynamics(dynamics)) == []


def test_running_sum_is_drawn_in_pieces():
    """Thick lines end where a block does, with a light line there; sums of one output are no sums; streams have none,
    and need no panel."""
    sums = {"sum_rms": [0.1, 0.2, 0.4, 0.8, 0.1, 0.3]}
    rest = {"output_rms": [0.1] * 6, "read_rms": [0.2] * 7, "gradient_norm": [1.0] * 3}
    dynamics = {"block": {**rest, **sums, "sum_starts": [0, 4]}, "full": {**rest, **sums, "sum_starts": [*range(6)]}}
    dynamics["streams"] = rest
    axes = figures.plot_dynamics(dynamics).axes[0]
    assert axes.get_title().startswith("Running sum")
    thin, thick, boundary, single = axes.lines
    np.testing.assert_array_equal(thin.get_ydata(), sums["sum_rms"])
    np.testing.assert_array_equal(thick.get_xdata(), [0, 0.5, 1, 1.5, np.nan, 2, 2.5])
    np.testing.assert_array_equal(thick.get_ydata(), [0.1, 0.2, 0.4, 0.8, np.nan, 0.1, 0.3])
    assert boundary.get_xdata() == [1.75, 1.75] and single.get_linewidth() < 1
    assert [len(figures.plot_dynamics(models).axes) for models in (dynamics, {"streams": rest})] == [5, 4]


def test_token_labels():
    """White space, formulas, unknown characters and long tokens stay on one line and are drawn as they are."""
    labels = [figures.token_label(text) for text in (" a", "\n", "\t", "", "$x$", "日", "x" * 30)]
    assert labels == ["␣a", "↵", "→", "∅", r"\$x\$", r"\u65e5", "x" * 13 + "…"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "absent doesn't exist"),
        (["uneven", "--text", "absent.txt"], "doesn't exist"),
        (["uneven", "--text", "empty.txt"], "is empty"),
        (["uneven", "--text", "bytes.txt"], "is not text"),
        (["uneven", "--text", "rows.jsonl"], "no column 'text'"),
        (["uneven", "--seq-len", "33"], "longer than the model's context"),
        (["uneven", "--reads", "0a,3m"], "there is no read 3m"),
        (["uneven", "uneven"], "given twice"),
        (["uneven", "broken"], "isn't finite; the model is broken"),
        (["uneven", "gpt2"], "GPT2LMHeadModel can't be watched over depth"),
        (["uneven", "--prompt", "return " * 40, "--tokens", "33"], "give --tokens 32 or less"),
        (["uneven", "--base", "uneven"], "--base is for adapters"),
        (["donor", "--html"], "--html shows depth weights, and no model has them"),
        (["uneven", "empty.txt"], "empty.txt is not a folder"),
    ],
)
def test_refuses(arguments, message, models, tmp_path, monkeypatch):
    """Bad input ends with one clear line, before anything is written."""
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("bytes.txt").write_bytes(b"\xff\xfe\x00" * 9)
    Path("rows.jsonl").write_text('{"body": "a"}\n')
    names = {**models, "absent": str(tmp_path / "absent")}
    with pytest.raises(SystemExit) as exit:
        plot_depth_attention.main([names.get(argument, argument) for argument in arguments] + ["--output", "out"])
    assert exit.value.code.startswith("plot_depth_attention: ") and "\n" not in exit.value.code
    assert message in exit.value.code and not Path("out").exists()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(28, "No space left on device"), "plot_depth_attention: can't write .*No space left"),
        (KeyboardInterrupt(), "130"),
    ],
)
def test_stops_cleanly(error, code, models, text, tmp_path, monkeypatch, capsys):
    """A full disk or an interruption leaves no half of a figure and no traceback."""

    class Failing(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            raise error

    monkeypatch.setattr(writing, "open", Failing, raising=False)
    with pytest.raises(SystemExit) as exit:
        plot_depth_attention.main([models["uneven"], "--text", str(text), "--output", str(tmp_path / "out")])
    assert re.match(code, str(exit.value.code)) and not (tmp_path / "out").exists()
    if isinstance(error, KeyboardInterrupt):
        assert "interrupted" in capsys.readouterr().err


def test_short_usage(capsys):
    """A wrong option is answered in a few lines."""
    for arguments, message in ((["a", "--prompt", ""], "--prompt is empty"), ([], "required: models")):
        with pytest.raises(SystemExit):
            plot_depth_attention.main([*arguments, "--output", "out"])
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 2
