# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""README and the pages in docs: their commands and code run, their numbers are the recorded ones, their links lead
somewhere."""

import importlib
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from attnres_recipes.comparison import paired_differences
from attnres_recipes.figures import without_seed
from documents import code_blocks, headings
from hub_server import serve_hub
from marks import mostly_slow
from safetensors import safe_open
from serve_process import Running
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "benchmarks")]

import pretrain  # noqa: E402
import speed_table  # noqa: E402
from exactness import markdown  # noqa: E402
from pages import section  # noqa: E402


GUIDES = sorted(f"docs/guides/{path.name}" for path in (ROOT / "docs" / "guides").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "model_cards/README.md", "examples/README.md", "results/README.md", *GUIDES]
PAGES += sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
OWN_TESTS = ("docs/guides/add_", "docs/guides/several_devices")  # of test_architecture.py and test_several_devices.py
# What makes a command short: the same with smaller sizes
TRAINING = "--seq-len 32 --batch-size 2 --eval-sequences 2"
BENCHMARK = "--hidden-size 32 --layers 2 --blocks 2 --heads 2 --vocab-size 64 --batch-size 2 --seq-len 20 --modes block"
SHORTER = {
    "--steps 600": f"--steps 2 {TRAINING}",
    "--steps 400": f"--steps 2 --save-steps 2 {TRAINING}",
    "checkpoint-400": "checkpoint-2",
    "--train-tokenizer 2048": "--train-tokenizer 300",
    "--data stdlib": "--data my-text",
    "--sweep depth_lr_scale=0.1,0.3,1,3": "--sweep depth_lr_scale=0.1,1",
    "--num_processes 8": "--num_processes 2",
    "--output outputs/by_depth": "--sequences 1 --seq-len 32 --output outputs/by_depth",
    "attnres-1.3m-block --html": "attnres-1.3m-block --html --sequences 1 --seq-len 32",
    "benchmark.py": f"benchmark.py {BENCHMARK} --prompt-len 24 --new-tokens 2 --rounds 1",
    "hidden_size=256,512,1024 layers=8,16,32": "hidden_size=32,64 layers=2,3",
    "--minutes 9": "--minutes 0.01 --vary hidden_size=32,64",
    "--lm-eval stdlib_docstring,stdlib_body": "--lm-eval stdlib_docstring --lm-eval-limit 4",
}
# What runs elsewhere, and where
ELSEWHERE = {
    "make quickstart": "tests/test_quickstart.py",
    "make test": ".ci/run",
    "make setup": ".ci/run",
    "make lint": ".ci/run",
    "vllm serve": "tests/test_vllm.py",
    "attnres-serve": "tests/serve_process.py",
    "scripts/smollm2.py": "tests/test_real.py",
    "model_cards/attnres-smollm2-135m": "tests/test_real.py",
    "examples/depth_weights.py": "tests/test_examples.py",
    "accelerate/ddp.yaml": "tests/test_multi_device.py",
    "accelerate/pipeline.yaml": "tests/test_multi_device_pipelines.py",
    "--compare donor,block,full,denseformer": "tests/test_comparison.py",
    "scripts/scaling_law.py": "tests/test_scaling_law.py",
    "gpu_evidence.py --prepare": "tests/test_gpu_evidence.py",
}


def blocks(page: str, language: str) -> list[str]:
    return code_blocks((ROOT / page).read_text(encoding="utf-8"), language)


def commands(page: str) -> list[str]:
    lines = "".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if not line.startswith("#")]


def shorter(command: str) -> list[str]:
    """The words of a command, with smaller sizes, and of one for make what make runs."""
    if command.startswith("make "):
        made = subprocess.run(
            ["make", "--dry-run", "--no-print-directory", "--old-file", ".venv/.ready", *shlex.split(command)[1:]],
            cwd=ROOT,
            text=True,
            capture_output=True,
            check=True,
        )
        command = made.stdout.strip()
    for long, short in SHORTER.items():
        command = command.replace(long, short)
    return shlex.split(command)


def execute(words: list[str], folder: Path, monkeypatch):
    """Runs a command in this process, where only this environment's programs are, and no network is."""
    monkeypatch.chdir(folder)
    if Path(words[0]).name == "python":
        words = words[1:]
        words[0] = str(ROOT / words[0])
    if words[0] == "accelerate":
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        words = [str(Path(sys.executable).with_name("accelerate")), *words[1:]]
        done = subprocess.run(words, env=environment, text=True, capture_output=True)
        assert done.returncode == 0, done.stderr
        return
    program = words[0] if words[0].endswith(".py") else str(Path(sys.executable).with_name(words[0]))
    monkeypatch.setattr(sys, "argv", [program, *words[1:]])
    threads = torch.get_num_threads()
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as exit:
        assert not exit.code, f"{words}: {exit.code}"
    finally:
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """A folder with what the pages start from: `my-llama`, `my-text`, `my-chats.jsonl`, and what they made of these."""
    folder = tmp_path_factory.mktemp("pages")
    text = Path(subprocess.__file__).read_text(encoding="utf-8")
    (folder / "my-text").mkdir()
    for index in range(24):
        (folder / "my-text" / f"{index}.txt").write_text(text[index * 1000 : (index + 1) * 1000], encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    tokenizer.save_pretrained(folder / "my-llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "my-llama")
    chats = [[("user", f"{index} + 1?"), ("assistant", f"{index + 1}")] for index in range(60)]
    with open(folder / "my-chats.jsonl", "w", encoding="utf-8") as file:
        for chat in chats:
            messages = [{"role": role, "content": content} for role, content in chat]
            file.write(json.dumps({"messages": messages}) + "\n")
    for name in ("scripts", "model_cards", "examples"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        execute(shorter("attnres-convert my-llama llama-attnres --block-size 2"), folder, monkeypatch)
        train = f"attnres-pretrain --model my-llama --data my-text --steps 2 {TRAINING} --output outputs/run"
        execute(shorter(train), folder, monkeypatch)
        execute(shorter("attnres-export llama-attnres exported --format onnx"), folder, monkeypatch)
    return folder


@pytest.fixture
def workplace(template, tmp_path) -> Path:
    folder = tmp_path / "place"
    shutil.copytree(template, folder, symlinks=True)
    return folder


WITH_COMMANDS = [page for page in PAGES if commands(page)]
WITH_CODE = [page for page in PAGES if blocks(page, "python") and not page.startswith(OWN_TESTS)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", mostly_slow(WITH_COMMANDS, "README.md", "docs/guides/convert.md"))
def test_commands_run(page, workplace, monkeypatch, capsys):
    """Every command of a page works, from top to bottom, on a small checkpoint and text; long ones with small sizes."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for command in commands(page):
        elsewhere = next((file for part, file in ELSEWHERE.items() if part in command), None)
        if elsewhere:
            assert (ROOT / elsewhere).is_file()
        elif command.startswith("attnres-push") and "--dry-run" not in command:
            publish(command, workplace)
        else:
            words = shorter(command)
            made = words[2] if words[0] in ("attnres-convert", "attnres-export") else words[-1]
            if made in ("llama-attnres", "exported", "outputs/run"):  # the template's
                shutil.rmtree(workplace / made, ignore_errors=True)
            execute(words, workplace, monkeypatch)
    if page == "docs/guides/convert.md":
        assert "largest logit difference" in capsys.readouterr().out


def test_commands_that_run_elsewhere_parse():
    """They have options that they know and files that exist."""
    folders, checked = ("scripts/", "benchmarks/"), 0
    installed = {point.name: point.value.partition(":")[0] for point in entry_points(group="console_scripts")}
    everything = [command for page in PAGES for command in commands(page)]
    for command in everything:
        words = shlex.split(command)
        names = [word for word in words if word.startswith(folders) and word[-3:] == ".py" or word in installed]
        if not any(part in command for part in ELSEWHERE) or not names or names == ["accelerate"]:
            continue
        name = names[-1]
        importlib.import_module(installed.get(name) or Path(name).stem).parse_arguments(words[words.index(name) + 1 :])
        assert all((ROOT / word).is_file() for word in words if word.startswith(folders))
        checked += 1
    assert checked >= 8


def publish(command: str, folder: Path):
    """Runs a command with a Hub on this machine."""
    token = "hf_" + "a" * 34
    with serve_hub() as hub:
        hub.users = {token: "my-name"}
        done = subprocess.run(
            [sys.executable, str(ROOT / "scripts" / "push_to_hub.py"), *shlex.split(command)[1:]],
            cwd=folder,
            env=hub.environment(folder / "home", token),
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        assert hub.repositories["my-name/my-attnres"].private


def test_no_block_is_left_out():
    """Commands are in blocks that tests run, and none is both run and listed as run elsewhere."""
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    assert "```console" not in text and "```sh" not in text
    everything = [command for page in PAGES for command in commands(page)]
    assert len(everything) > 30
    assert [part for part in ELSEWHERE if not any(part in command for command in everything)] == []
    long = "\n".join([*everything, *(" ".join(shorter(c)) for c in everything if c.startswith("make bench"))])
    assert [part for part in SHORTER if part not in long] == []


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", mostly_slow(WITH_CODE, "README.md", "docs/modes.md"))
def test_code_runs(page, workplace):
    """All Python of a page works, from top to bottom."""
    code = blocks(page, "python")
    for made in re.findall(r'convert_checkpoint\("my-llama", "([^"]+)"', "".join(code)):
        shutil.rmtree(workplace / made, ignore_errors=True)
    server = None
    environment = {**os.environ, "HF_HOME": str(workplace / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    try:
        if "localhost:8000" in "".join(code):
            server = Running("llama-attnres").start(workplace, workplace)
            server.ready()
            code = [block.replace("8000", str(server.port)) for block in code]
        (workplace / "page.py").write_text("\n".join(code), encoding="utf-8")
        command = [sys.executable, "page.py"]
        done = subprocess.run(command, cwd=workplace, env=environment, text=True, capture_output=True)
    finally:
        if server:
            server.__exit__()
    assert done.returncode == 0, done.stderr
    if check := CHECKS.get(page):
        check(done.stdout.splitlines(), workplace)


def check_readme(lines: list[str], folder: Path):
    check_converted(lines, folder)
    assert any(line.startswith("user: How do I keep bread fresh?") for line in lines)
    assert lines[-1].startswith("9 tensor(")  # reads of a model of 4 layers
    assert (folder / "outputs" / "lora" / "merged" / "model.safetensors").is_file()


def check_continued(_: list[str], folder: Path):
    with safe_open(folder / "llama-attnres-trained" / "model.safetensors", framework="pt") as trained:
        query = trained.get_tensor("model.depth_attention.query")
    assert query[1:].any(dim=1).all()  # the first read has one source, so nothing to learn


def check_converted(lines: list[str], _: Path):
    assert float(lines[0]) < 1e-11  # float64


def check_line(pattern: str, place: int = -1):
    """A check that a line begins so, by default the last one."""

    def check(lines: list[str], _: Path):
        assert re.match(pattern, lines[place]), lines

    return check


CHECKS = {
    "README.md": check_readme,
    "docs/guides/continue.md": check_continued,
    "docs/guides/convert.md": check_converted,
    "docs/guides/export.md": check_line("def main", 0),
    "docs/guides/finetune.md": check_line("trainable params"),
    "docs/guides/pretrain.md": check_line(r"1 torch.Size\(\[13, 64\]\)"),
    "docs/guides/see_inside.md": check_line(r"9 tensor\("),
    "docs/modes.md": check_line("9$"),  # reads of a model of 4 layers
}


def test_the_readme_is_short():
    """Somebody reads it to the end: at most 180 lines, 25 of them code, and tables of at most eight rows."""
    assert len(README.splitlines()) <= 180
    (code,) = blocks("README.md", "python")
    assert len([line for line in code.splitlines() if line and not line.startswith("#")]) <= 25
    tables = re.findall(r"(?:^\|.*\n)+", README, flags=re.MULTILINE)
    assert len(tables) == 3 and all(len(table.splitlines()) - 2 <= 8 for table in tables)


def test_numbers_of_the_readme_are_those_of_the_pages():
    """The range of each kind of family is that of docs/families.md, each ratio that of docs/speed.md."""
    names = dict(
        re.findall(
            r"^\| `AttnRes(\w*)ForCausalLM` \| `\w+` \| yes, (\S+) \|",
            section(ROOT / "docs/families.md", "support"),
            re.M,
        )
    )
    exact = {name.lower().replace("text", "") or "llama": float(number) for name, number in names.items()}
    kinds = re.findall(r"^\| ([^|]+) \| ([^|]+) \| (\de-\d\d)(?: to (\de-\d\d))? \|$", README, flags=re.MULTILINE)
    listed = []
    for _, families, least, most in kinds:
        keys = [re.sub(r"[^a-z0-9]", "", family.lower()) for family in families.split(",")]
        numbers = [exact[key] for key in keys]
        assert (min(numbers), max(numbers)) == (float(least), float(most or least)), families
        listed += keys
    assert sorted(listed) == sorted(exact)

    assert section(ROOT / "docs" / "speed.md", "cpus") == speed_table.markdown()
    _, gpu = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split("## On a GPU")
    found = re.findall(
        r"^\| (two CPU cores|one NVIDIA H200)(?:, (AVX\S+))?, ([^|]+) \| (\S+) \| (\S+) \|$", README, re.M
    )
    measured = {name: speed_table.cases(folder) for name, folder in speed_table.processors().items()}
    assert len(found) == 4 * len(measured) + 4 and {instructions for _, instructions, *_ in found} == {"", *measured}
    for device, instructions, what, *ratios in found:
        assert bool(instructions) == (device == "two CPU cores")
        if instructions:
            numbers = [measured[instructions][what][f"{mode} cpp"]["ratio"][1] for mode in ("block", "full")]
        else:
            (row,) = re.findall(rf"^\| {what.replace('decoding', 'decoding, batch 1')}\*? \|.*$", gpu, flags=re.M)
            cells = [cell.strip(" *") for cell in row.split("|")]
            numbers = [float(cells[place]) for place in (2, 4)]
        assert [f"{number:.2f}" for number in numbers] == ratios, what


def test_what_is_said_of_speed_is_recorded():
    """Ranges and growth on CPUs, by the medians of the committed rows."""
    folder = speed_table.RESULTS / "avx2"
    ratios = {
        case: tuple(rows[f"{mode} cpp"]["ratio"][1] for mode in ("block", "full"))
        for case, rows in speed_table.cases(folder).items()
    }
    page = " ".join((ROOT / "docs" / "speed.md").read_text("utf-8").split())
    large = [ratio for case, own in ratios.items() if "," not in case for ratio in own]
    compiled = [ratio for case, own in ratios.items() if "compiled" in case for ratio in own]
    assert f"models of hidden size 512 take {min(large):.2f} to {max(large):.2f} of the stock model's time" in page
    assert f"and compiled ones {min(compiled):.2f} to {max(compiled):.2f}." in page
    (block, full), (small_block, small_full) = (
        ratios[f"training step, {shape}"] for shape in ("SmolLM2's shape", "a small model")
    )
    assert f"takes {block:.2f} in Block and {full:.2f} in Full" in page
    assert f"hidden size 64 {small_block:.2f} and {small_full:.2f}." in page

    growth = {}
    for row in json.loads((folder / "model_growth.json").read_text("utf-8"))["rows"]:
        shape = row["hidden_size"], row["layers"], row["blocks"]
        growth[row["case"], row["variant"], shape] = f"{row['ratio'][1]:.2f}"
    block, full = (
        {key[2]: own for key, own in growth.items() if key[:2] == ("training", f"{mode} cpp")}
        for mode in ("block", "full")
    )
    page = " ".join((ROOT / "results" / "README.md").read_text("utf-8").split())
    widths = [(width, 12, 6) for width in (256, 512, 1024)]
    assert [block[shape] for shape in widths] == ["1.03", "1.03", "0.99"]
    assert "Block takes 1.03 of the stock model's time at hidden sizes 256 and 512, and 0.99 at 1024" in page
    assert "Full takes {}, {} and {}.".format(*(full[shape] for shape in widths)) in page
    assert f"from {block[512, 12, 2]} with 2 to {block[512, 12, 12]} with 12" in page
    assert f"Full grows with depth, from {full[512, 6, 6]} to {full[512, 24, 6]}" in page
    traffic = {}
    for row in json.loads((folder / "operator_growth.json").read_text("utf-8"))["rows"]:
        if row["pass"] == "forward":
            traffic.setdefault(row["variant"], []).append(row["traffic"] / row["traffic_by_formula"])
    ours = traffic["block cpp"] + traffic["full cpp"]
    assert f"takes {min(ours):.1f} to {max(ours):.1f} times that" in page
    block, full = (
        f"{min(own):.1f} to {max(own):.1f}" for own in (traffic["block two_phase"], traffic["full two_phase"])
    )
    assert f"(`two_phase`) {block} times in Block and {full} in Full" in page


def test_what_the_readme_tells_of_the_quickstart_is_recorded():
    results = json.loads((ROOT / "results" / "quickstart" / "results.json").read_text(encoding="utf-8"))
    block = next(block for block in blocks("README.md", "text"))
    before, after = re.split(r"\n(?=AttnRes)", block.split("before", 1)[1])
    question = re.match(r"> (.*)\n", block)[1]
    told = {"donor": before.split("[...]")[0], "AttnRes + LoRA": after.removeprefix("AttnRes + LoRA")}
    for model, text in told.items():
        assert " ".join(results["generated"][model][question]["text"].split()).startswith(" ".join(text.split()))
    assert "same 180 tokens" in " ".join(README.split())
    assert section(ROOT / "docs/quickstart.md", "quickstart").count("180 of 180") == 1


def test_exactness_table_is_the_recorded_one():
    """The table of the page is made from the committed results, and those keep the promise of the conversion."""
    results = json.loads((ROOT / "results" / "exactness.json").read_text(encoding="utf-8"))
    assert section(ROOT / "docs/guides/convert.md", "exactness") == markdown(results["rows"])
    assert all(row["scaled"] < 3e-6 < 1e-3 < row["plain_mean"] for row in results["rows"])
    assert (results["settings"]["layers"], results["settings"]["hidden_size"]) == (12, 256)


def by_group(values: dict[str, object]) -> list[list]:
    """Those of runs that differ in nothing but their seeds."""
    groups = {}
    for name, value in values.items():
        groups.setdefault(without_seed(name), []).append(value)
    return list(groups.values())


def recorded_numbers(folder: Path) -> list[float]:
    """Losses of a comparison and of what it tried, for repeated ones their mean and standard deviation, and what
    benchmarks/copying.py says of the models, as means over seeds; of several comparisons all numbers."""
    if not (folder / "comparison.json").exists():
        return [number for part in folder.iterdir() if part.is_dir() for number in recorded_numbers(part)]
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    losses = {name: run["held_out_loss"] for name, run in found["runs"].items()}
    tried = [loss for losses in found.get("trials", {}).values() for loss in losses.values()]
    repeated = [group for group in by_group(losses) if len(group) > 1]
    tried += [loss for run in found["runs"].values() if (loss := run.get("held_out_loss_before")) is not None]
    numbers = [*losses.values(), *tried, *map(statistics.mean, repeated), *map(statistics.stdev, repeated)]
    if (folder / "copying.json").exists():
        models = json.loads((folder / "copying.json").read_text(encoding="utf-8"))["models"]
        spans = {name: list(model.values()) for name, model in models.items()}
        numbers += [statistics.mean(column) for group in by_group(spans) for column in zip(*group)]
    return numbers


def test_losses_are_the_recorded_ones():
    """Each loss in the tables of the results is one of the committed run's, rounded once. The table of the ablations,
    with the paper's numbers, has a test beside what makes it."""
    folder = ROOT / "results"
    sections = (folder / "README.md").read_text(encoding="utf-8").split("\n## ")[1:]
    checked = {
        text: names
        for text in sections
        if (names := re.findall(r"\]\((?!ablations)(\w+)/(?:comparison|parts)\.md\)", text))
    }
    assert len(checked) == 5
    for text, names in checked.items():
        rows = [line.split("|", 2)[2] for line in text.splitlines() if line.startswith("|")]
        shown = re.findall(r"\d+\.\d{3,}", "\n".join(rows[2:]))
        recorded = [number for name in names for number in recorded_numbers(folder / name)]
        digits = {len(number.split(".")[1]) for number in shown}
        rounded = {f"{number:.{places}f}" for number in recorded for places in digits}
        assert shown and [number for number in shown if number not in rounded] == [], names


def test_what_is_said_of_full_from_scratch_is_recorded():
    """The seeds that don't copy are those that are behind."""
    folder = ROOT / "results" / "from_scratch"
    models = json.loads((folder / "copying.json").read_text("utf-8"))["models"]
    differences = json.loads((folder / "comparison.json").read_text("utf-8"))["differences"]
    copied = [model["the same again"] for name, model in models.items() if name.startswith("full")]
    block, full = (list(found["seeds"].values()) for found in differences.values())
    text = " ".join((ROOT / "results" / "README.md").read_text("utf-8").split())
    assert "is {:.3f}, {:.3f} and {:.3f}: the first two".format(*copied) in text
    assert f"in each seed, by {-max(block):.3f} to {-min(block):.3f};" in text
    assert f"ahead of the donor by {-full[2]:.3f} in one seed, and behind by {full[1]:.3f} and {full[0]:.3f}" in text


def test_what_is_said_of_smollm2_is_recorded():
    """By how much converted models are behind, seed by seed, and what depth attention alone gains."""
    folder, behind, runs = ROOT / "results" / "smollm2", {}, {}
    for part in ("all_weights", "few_weights"):
        own = json.loads((folder / part / "comparison.json").read_text("utf-8"))["runs"]
        runs |= own
        for name, found in paired_differences(own).items():
            method, mode = (word.split("=")[-1] for word in name.split(" ")[:2])
            behind[method, mode] = "{:.4f} to {:.4f}".format(*(sort(found["seeds"].values()) for sort in (min, max)))
    text = " ".join((ROOT / "results" / "README.md").read_text("utf-8").split())
    assert f"by {behind['full', 'block']} where all weights are trained, and by {behind['lora', 'block']} with" in text
    assert f"LoRA; Full by {behind['full', 'full']}; Delta by {behind['full', 'block_delta']}." in text
    gains = [run["held_out_loss_before"] - run["held_out_loss"] for run in runs.values()]
    donor, alone = statistics.mean(gains[:3]), statistics.mean(gains[-3:])
    assert f"of the {donor:.3f} that training gains" in text and f"gets {alone / donor:.0%}".replace("%", " %") in text
    assert {run["tokens"] for run in runs.values()} == {20400} and "20,400 tokens" in text
    scales = {name.split(" ")[0]: run["arguments"]["depth_lr_scale"] for name, run in runs.items()}
    assert (scales["full"], scales["lora"]) == (0.3, 0.03)

    shares = []
    for part, own in (("all_weights", 5), ("few_weights", 4)):
        found = json.loads((folder / part / "tasks.json").read_text("utf-8"))
        assert len(found) == own
        _, donor, *others = found.values()
        for group in others if part == "all_weights" else others[:1]:
            pairs = [pair for task in donor for pair in zip(donor[task], group[task], strict=True)]
            assert max(abs(a - b) for a, b in pairs) < 0.021
        shares += [{task: f"{statistics.mean(own):.2f}" for task, own in group.items()} for group in found.values()]
    del shares[5]  # before training, once more
    text = (ROOT / "results" / "README.md").read_text("utf-8").split("## Does it pay")[1].split("\n## ")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    shown = [[cell.strip() for cell in row[-3:-1]] for row in rows[2:]]
    assert shown == [list(own.values()) for own in shares]
    assert all(own["stdlib_body"] > shares[0]["stdlib_body"] for own in shares[1:])
    assert all(own["stdlib_docstring"] < shares[0]["stdlib_docstring"] for own in shares[1:])


def test_what_is_said_of_fine_tuning_is_recorded():
    """By how much models lead their donors, seed by seed."""
    leads, shares = {}, []
    for part in (ROOT / "results" / "regimes").glob("*/comparison.json"):
        runs = json.loads(part.read_text("utf-8"))["runs"]
        for method in ("full", "lora"):
            own = {name: run for name, run in runs.items() if name.startswith(f"{method} ")}
            for mode, found in zip(("block", "full"), paired_differences(own).values(), strict=True):
                leads.setdefault((method, mode), []).extend(-difference for difference in found["seeds"].values())
        gains = {name: run["held_out_loss_before"] - run["held_out_loss"] for name, run in runs.items()}
        first, *others = map(statistics.mean, by_group(gains))
        shares += [gain / first for gain in others[-2:]]
    assert [len(own) for own in leads.values()] == 4 * [9]
    text = " ".join((ROOT / "results" / "README.md").read_text("utf-8").split())
    ranges = {name: f"{min(own):.4f} to {max(own):.4f}" for name, own in leads.items()}
    assert f"by {ranges['full', 'block']} where all weights are trained and by {ranges['lora', 'block']} with" in text
    assert f"Full is ahead by {ranges['full', 'full']} in nine of nine, and with LoRA in eight of nine" in text
    assert min(leads["full", "full"]) > 0 and sum(lead > 0 for lead in leads["lora", "full"]) == 8
    assert f"by {max(leads['lora', 'full']):.4f} at most" in text
    assert f"gets {100 * min(shares):.0f} to {100 * max(shares):.0f} % of what all weights gain" in text


def test_what_is_said_of_scaling_laws_is_recorded():
    """Differences and multipliers, with their intervals."""
    found = json.loads((ROOT / "results" / "scaling_law" / "scaling_law.json").read_text("utf-8"))
    text = " ".join((ROOT / "results" / "README.md").read_text("utf-8").split())
    for size in ("32x3", "32x4", "32x5", "32x8"):
        numbers = [row for row in found["differences"] if row["size"] == size]
        cells = [f"{row['mean']:+.4f} | {row['interval'][0]:+.4f} to {row['interval'][1]:+.4f}" for row in numbers]
        assert f"| {size[-1]} layers | {' | '.join(cells)} |" in text
    multipliers = [(found["multipliers"][name], found["multipliers"][name]["interval"]) for name in ("block", "full")]
    block, full = (f"{own['value']:.2f} ({low:.2f} to {high:.2f})" for own, (low, high) in multipliers)
    assert f"the donor needs {block} of Block's compute" in text and f"and {full} of Full's" in text


def test_what_is_said_of_the_figure_by_depth_is_recorded():
    """Sizes and ratios of donor, Block and Full are those of the figure's numbers."""
    (text,) = re.findall(r"^## By depth\n(.*?)^## ", (ROOT / "results" / "README.md").read_text("utf-8"), re.M | re.S)
    donor, block, full = json.loads((ROOT / "results" / "by_depth" / "dynamics.json").read_text("utf-8")).values()
    text = " ".join(text.split())
    assert f"square of {donor['output_rms'][1]:.0f}, where the residual stream has {donor['sum_rms'][-1]:.0f}" in text
    for model, of in ((block, "stays between"), (full, "outputs are between")):
        assert f"{of} {min(model['sum_rms']):.1f} and {max(model['sum_rms']):.1f}" in text
    ratios = [max(model["gradient_norm"]) / min(model["gradient_norm"]) for model in (donor, block, full)]
    assert (
        "{:.0f} times the smallest in the donor, {:.0f} times in Block and {:.0f} times in Full".format(*ratios) in text
    )
    assert len(block["sum_starts"]) == 8 and block["sum_rms"][6] < block["sum_rms"][5] / 5


def test_ways_to_train_depth_attention_are_recorded():
    """Losses and differences are those of results/real/depth_training.json."""
    runs = json.loads((ROOT / "results" / "real" / "depth_training.json").read_text("utf-8"))["runs"]
    losses = {name: run["held_out_loss"] for name, run in runs.items()}
    (text,) = re.findall(
        r"^\*\*Other ways.*?(?=^\*\*Fine)", (ROOT / "results/README.md").read_text("utf-8"), re.M | re.S
    )
    untrained = {name[-1]: loss for name, loss in losses.items() if name.startswith("untrained")}
    assert ", ".join(f"{untrained[seed]:.4f}" for seed in "012") in text
    recorded = {f"{loss - untrained[name[-1]]:+.4f}" for name, loss in losses.items()}
    shown = re.findall(r"[-+ ]\d\.\d{4}", "".join(line for line in text.splitlines() if line.startswith("|")))
    assert len(shown) == len(losses) - 3 and {number.replace(" 0.", "-0.") for number in shown} <= recorded


def test_make_commands_exist():
    """Every `make` command that the pages name is a target."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", text, flags=re.MULTILINE))
    assert {"quickstart", "test", "lint", "exactness", "bench", "zoo", "gpu", "help"} <= named <= set(targets)


def test_config_file(tmp_path):
    """The file of options that is shown is one."""
    (block,) = blocks("docs/guides/pretrain.md", "yaml")
    (tmp_path / "run.yaml").write_text(block)
    options = pretrain.parse_arguments(["--config-file", str(tmp_path / "run.yaml"), "--output", "out"])
    assert (options.model, options.data, options.learning_rate) == ("my-llama", ["my-text"], 5e-5)
    assert len(options.variants()) == 3


LINKED = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/**/*.md"),
    *ROOT.glob("examples/*.md"),
    *ROOT.glob("results/**/*.md"),
    ROOT / "model_cards" / "README.md",
]


def test_links_exist():
    """Files of this repository that pages name are there, and so are the headings."""
    missing, seen = [], 0
    for page in LINKED:
        text = page.read_text(encoding="utf-8")
        for target, heading in re.findall(r"\]\((?!https?:|mailto:)([^)#\s]*)#?([^)\s]*)\)", text):
            seen += 1
            path = page.parent / target if target else page
            if not path.exists() or heading and heading not in headings(path.read_text(encoding="utf-8")):
                missing.append(f"{page.relative_to(ROOT)}: {target}#{heading}")
    text = "".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
    names = re.findall(r"`((?:scripts|benchmarks|results|tests)/[^`\s]+|constraints\.txt)`", text)
    assert seen > 50 and names and not missing
    assert [name for name in names if not (ROOT / name).exists()] == []
