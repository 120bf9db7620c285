# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The steps of the quickstart. `quickstart.py` runs them and explains its options."""

import hashlib
import math
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
import warnings
from pathlib import Path

import matplotlib


matplotlib.use("Agg")  # no window, also where there is a display

import peft
import tokenizers
import torch
import transformers
from matplotlib import pyplot as plt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import attnres


TEXT_SUFFIXES = (".py", ".txt", ".md", ".rst")
PIECE = 16_384  # characters


def read_texts(path: Path | None, max_megabytes: float) -> list[str]:
    """The texts below `path`, or those of the standard library, in the order of their hashes and without repetitions.

    A single file is cut into pieces, so that it can be divided as a folder can.
    """
    root = path or Path(sysconfig.get_paths()["stdlib"])
    if root.is_file():
        text = root.read_text(encoding="utf-8", errors="replace")
        texts = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    else:
        files = sorted(file for file in root.rglob("*") if file.suffix in TEXT_SUFFIXES and file.is_file())
        if path is None:
            # not the library itself: installed packages, unit tests, tables of characters and topics
            skip = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data"}
            files = [file for file in files if file.suffix == ".py" and skip.isdisjoint(file.parts[len(root.parts) :])]
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    by_hash = {hashlib.sha256(text.encode()).hexdigest(): text for text in texts if text.strip()}
    texts, characters = [], 0
    for _, text in sorted(by_hash.items()):
        if characters < max_megabytes * 1e6:
            texts.append(text)
            characters += len(text)
    if len(texts) < 2:
        raise SystemExit(
            f"quickstart: {root} holds no text to train on; give --text a folder of {', '.join(TEXT_SUFFIXES)}."
        )
    return texts


def split_texts(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts: of texts in the order of their hashes the first, up to 5 % of all characters."""
    limit = 0.05 * sum(map(len, texts))
    count, characters = 0, 0
    while characters < limit and count < len(texts) - 1:
        characters += len(texts[count])
        count += 1
    return texts[count:], texts[:count]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer=trainer, length=len(texts))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def pack(tokenizer, texts: list[str], seq_len: int) -> list[dict[str, torch.Tensor]]:
    """The texts, end of text after each, cut into sequences `(seq_len,)` that are inputs and labels."""
    tokens = []
    for ids in tokenizer(texts)["input_ids"]:
        tokens += ids
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    tokens = torch.tensor(tokens[: len(tokens) // seq_len * seq_len]).view(-1, seq_len)
    return [{"input_ids": sequence, "labels": sequence} for sequence in tokens]


def new_llama(tokenizer, args) -> LlamaForCausalLM:
    """A small, deep Llama with random weights."""
    heads = max(1, args.hidden_size // 32)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3 // 32 * 32 or 32,
        num_hidden_layers=args.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=2 * args.seq_len,
        initializer_range=(0.4 / args.hidden_size) ** 0.5,  # transformers' default is that of much wider models
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def load(path: Path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def new_optimizer(model, learning_rate: float, depth_lr_scale: float) -> torch.optim.Optimizer:
    """AdamW with depth attention as a group of its own: no weight decay, and a learning rate of its own.

    Decay would pull the queries towards zero, the plain residual sum, and the gains of the keys away from one.
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    depth = [parameter for name, parameter in trained if "depth_attention" in name]
    others = [parameter for name, parameter in trained if "depth_attention" not in name]
    groups = [
        {"params": [parameter for parameter in others if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in others if parameter.ndim < 2], "weight_decay": 0.0},
        {"params": depth, "weight_decay": 0.0, "lr": depth_lr_scale * learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=learning_rate, betas=(0.9, 0.95))


class Progress(TrainerCallback):
    """One bar with the losses, or lines where there is no terminal, and the time of each step."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, unit="step", desc="  training", disable=not sys.stderr.isatty())
        self.seconds = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)
        self.bar.update()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.bar.set_postfix({name: f"{logs[name]:.3f}" for name in ("loss", "eval_loss") if name in logs})
        if self.bar.disable and "eval_loss" in logs:
            print(f"    step {state.global_step}: held-out loss {logs['eval_loss']:.3f}", flush=True)

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def new_trainer(model, data, args, steps: int, learning_rate: float, schedule: str, seed: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(args.partial / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=min(20, steps // 10),
        logging_steps=max(1, steps // 12),
        eval_strategy="steps",
        eval_steps=-(-steps // 4),
        eval_on_start=True,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=seed,
    )
    optimizer = new_optimizer(model, learning_rate, args.depth_lr_scale)
    train_set, held_out = data
    trainer = Trainer(
        model,
        arguments,
        train_dataset=train_set,
        eval_dataset=held_out,
        optimizers=(optimizer, None),
        callbacks=[Progress],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(name: str, model, data, args, steps: int, learning_rate: float, schedule: str, seed: int) -> dict:
    """Trains `model` in place; runs of one seed see the same batches.

    Returns:
        The run's losses (nats per token) by step, the time of a step, and how many parameters it trained.
    """
    trainer = new_trainer(model, data, args, steps, learning_rate, schedule, seed)
    trainer.train()
    progress = next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Progress))
    log = trainer.state.log_history
    held_out = {entry["step"]: entry["eval_loss"] for entry in log if "eval_loss" in entry}
    if steps not in held_out:
        held_out[steps] = trainer.evaluate()["eval_loss"]
    run = {
        "steps": steps,
        "tokens": steps * args.batch_size * args.seq_len,
        "learning_rate": learning_rate,
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "milliseconds_per_step": 1000 * statistics.median(progress.seconds),
        "training_loss": {entry["step"]: entry["loss"] for entry in log if "loss" in entry},
        "held_out_loss": held_out,
        "held_out_loss_before": held_out[0],
        "held_out_loss_after": held_out[steps],
    }
    print(f"  {name}: held-out loss {held_out[0]:.3f} -> {held_out[steps]:.3f} in {steps} steps")
    return run


@torch.no_grad()
def evaluate(model, sequences: list[dict], batch_size: int) -> float:
    """The mean loss over equally long sequences, in nats per token."""
    total = 0.0
    for start in range(0, len(sequences), batch_size):
        batch = torch.utils.data.default_collate(sequences[start : start + batch_size])
        total += model.eval()(**batch).loss.item() * len(batch["input_ids"])
    return total / len(sequences)


def convert(source: str, target: str, args):
    """Runs the command `attnres-convert` in the output folder and shows what it prints."""
    command = ["attnres-convert", source, target, "--mode", args.mode]
    if args.block_size is not None:
        command += ["--block-size", str(args.block_size)]
    print("  $", *command, flush=True)
    run = subprocess.run([sys.executable, "-m", "attnres_convert.cli", *command[1:]], cwd=args.partial)
    if run.returncode:
        raise SystemExit(f"quickstart: {source} was not converted; attnres-convert says why above.")


@torch.no_grad()
def logits(model, sequences: list[dict]) -> torch.Tensor:
    input_ids = torch.stack([sequence["input_ids"] for sequence in sequences]).to(model.device)
    return model.eval()(input_ids=input_ids).logits.float().cpu()


def compare(reference: torch.Tensor, other: torch.Tensor) -> dict[str, float]:
    """How far logits `(batch, seq, vocab)` are from those of a reference."""
    difference = (other - reference).abs()
    return {
        "largest_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "relative_error": (difference.max() / reference.abs().max()).item(),
        "top_1_agreement": (other.argmax(-1) == reference.argmax(-1)).float().mean().item(),
    }


def generate(model, tokenizer, args) -> str:
    """Samples a continuation of the prompt, with the same random numbers for every model."""
    inputs = tokenizer(args.prompt, return_tensors="pt", return_token_type_ids=False).to(model.device)
    torch.manual_seed(args.seed)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.eval().generate(
        **inputs, max_new_tokens=args.new_tokens, do_sample=True, temperature=0.6, top_k=50, pad_token_id=pad
    )
    return tokenizer.decode(output[0], skip_special_tokens=True)


@torch.no_grad()
def mean_depth_weights(model, sequences: list[dict]) -> list[list[float]]:
    """The weights of every read on its sources, the mean over tokens."""
    input_ids = torch.stack([sequence["input_ids"] for sequence in sequences]).to(model.device)
    weights = model.eval()(input_ids=input_ids, output_depth_attentions=True).depth_attentions
    return [read.mean(dim=(0, 2)).tolist() for read in weights]


def plot_depth_weights(weights: list[list[float]], config, path: Path):
    """A heat map: one row per read as they are computed, one column per source; what a read can't see is blank."""
    num_sources = max(map(len, weights))
    unit = "sublayer" if config.attn_res_mode == "full" else "block"
    reads = [f"layer {i} {sublayer}" for i in range(config.num_hidden_layers) for sublayer in ("attn", "mlp")] + [
        "output"
    ]
    sources = ["embedding", *(f"{unit} {i}" for i in range(1, num_sources))]
    grid = torch.full((len(reads), num_sources), math.nan)
    for row, read in enumerate(weights):
        grid[row, : len(read)] = torch.tensor(read)

    figure, axes = plt.subplots(figsize=(3 + 0.62 * num_sources, 2 + 0.26 * len(reads)), layout="constrained")
    image = axes.imshow(grid.numpy(), cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(num_sources), sources, rotation=45, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(reads)), reads, fontsize=9)
    axes.set_xticks([x - 0.5 for x in range(1, num_sources)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, len(reads))], minor=True)
    axes.grid(which="minor", color="white", linewidth=1)
    axes.tick_params(which="minor", length=0)
    axes.set_xlabel("source")
    axes.set_ylabel("read")
    for row, read in enumerate(weights):
        for column, weight in enumerate(read):
            axes.text(column, row, f"{weight:.2f}", ha="center", va="center", fontsize=7, color="wk"[weight > 0.6])
    figure.colorbar(image, ax=axes, label="weight, mean over held-out tokens", fraction=0.05)
    figure.suptitle("What each read takes from depth")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_losses(runs: dict[str, dict], path: Path):
    """Held-out losses of the runs that start from the same weights, and the training losses fainter."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, run in runs.items():
        steps, losses = zip(*sorted(run["held_out_loss"].items()))
        (line,) = axes.plot(steps, losses, marker="o", markersize=4, label=f"{name}, held-out")
        steps, losses = zip(*run["training_loss"].items())
        axes.plot(steps, losses, color=line.get_color(), alpha=0.35, linewidth=1, label=f"{name}, training")
    axes.set_xlabel("training step after the conversion")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title("Training on from the same weights, on the same data")
    axes.grid(alpha=0.3)
    figure.legend(fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def print_table(rows: list[tuple[str, ...]]):
    """The first row is the heading; all columns but the first are numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for index, row in enumerate(rows):
        print(
            "  "
            + "  ".join(f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths)))
        )
        if index == 0:
            print("  " + "  ".join("-" * width for width in widths))


def step(number: int, title: str, explanation: str):
    print(f"\n[{number}/6] {title}\n  {explanation}", flush=True)


def tokenizer_and_data(args, results: dict):
    """The tokenizer, and the sequences to train on and those held out."""
    train_texts, held_out_texts = split_texts(read_texts(args.text, args.max_text_mb))
    if args.model is not None:
        try:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise SystemExit(f"quickstart: the tokenizer of --model {args.model} doesn't load: {reason}") from None
    else:
        tokenizer = train_tokenizer(train_texts, args.vocab_size)
    train_set, held_out = pack(tokenizer, train_texts, args.seq_len), pack(tokenizer, held_out_texts, args.seq_len)
    if len(train_set) < args.batch_size or not held_out:
        raise SystemExit(
            f"quickstart: too little text, {len(train_set)} sequences to train on and {len(held_out)} held out; "
            f"give --text more of it, or make --seq-len ({args.seq_len}) or --batch-size ({args.batch_size}) smaller."
        )
    results["text"] = {
        "files": len(train_texts),
        "held_out_files": len(held_out_texts),
        "tokens": len(train_set) * args.seq_len,
        "characters_per_token": sum(map(len, train_texts)) / (len(train_set) * args.seq_len),
        "held_out_sequences": min(len(held_out), args.eval_sequences),
    }
    print(
        "  {files} files, {tokens:,} tokens of {characters_per_token:.1f} characters; {held_out_files} more files are "
        "held out".format(**results["text"]),
        flush=True,
    )
    stride = max(1, len(held_out) // args.eval_sequences)  # from all over the held-out text
    return tokenizer, (train_set, held_out[::stride][: args.eval_sequences])


def train_and_save(name: str, model, tokenizer, data, args, runs: dict, folder: Path, **settings):
    runs[name] = train(name, model, data, args, **settings)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def compare_conversion(donor: Path, converted: Path, tokenizer, sequences: list[dict], args) -> dict:
    before, after = load(donor), load(converted)
    return {
        **compare(logits(before, sequences), logits(after, sequences)),
        "same_generated_text": generate(before, tokenizer, args) == generate(after, tokenizer, args),
        "mode": after.config.attn_res_mode,
        "block_size": after.config.attn_res_block_size,
        "parameters": before.num_parameters(),
        "parameters_added": after.num_parameters() - before.num_parameters(),
    }


def reload_and_merge(trained, converted: Path, adapter: Path, tokenizer, data, args) -> dict:
    """Loads the adapter on a fresh base, merges it, and compares both with the model in memory."""
    sequences = data[1][: args.batch_size]
    reference = logits(trained, sequences)
    reloaded = peft.PeftModel.from_pretrained(load(converted), adapter)
    comparison = {"reloaded": compare(reference, logits(reloaded, sequences))}
    merged = reloaded.merge_and_unload()
    comparison["merged"] = compare(reference, logits(merged, sequences))
    comparison["merged_held_out_loss"] = evaluate(merged, data[1], args.batch_size)
    merged.save_pretrained(args.partial / "attnres-lora-merged")
    tokenizer.save_pretrained(args.partial / "attnres-lora-merged")
    for name in ("reloaded", "merged"):
        print(
            f"  {name} against trained: largest difference of the logits {comparison[name]['largest_difference']:.1e}"
        )
    return comparison


def quickstart(args) -> dict:
    """Runs all steps, writes into `args.partial`, and returns every number."""
    results = {
        "arguments": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    }
    results["versions"] = {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (attnres, torch, transformers, peft, tokenizers)},
        "threads": torch.get_num_threads(),
    }
    results["runs"] = runs = {}
    folders = {name: args.partial / name for name in ("donor", "attnres", "donor-continued", "attnres-continued")}
    adapter, merged = args.partial / "attnres-lora", args.partial / "attnres-lora-merged"
    scratch = {"steps": args.donor_steps, "learning_rate": args.learning_rate, "schedule": "constant_with_warmup"}
    continued = {"steps": args.steps, "learning_rate": args.continue_learning_rate, "schedule": "linear"}
    scratch["seed"], continued["seed"] = args.seed, args.seed + 1
    transformers.set_seed(args.seed)
    transformers.utils.logging.disable_progress_bar()
    # PEFT's, about transformers
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)

    step(1, "A donor", "A decoder of transformers, with the residual stream that all of them have.")
    tokenizer, data = tokenizer_and_data(args, results)
    if args.model is not None:
        folders["donor"] = args.model
    else:
        model = new_llama(tokenizer, args)
        print(
            f"  a Llama of {args.layers} layers, hidden size {args.hidden_size}, {model.num_parameters():,} parameters"
        )
        train_and_save("donor from scratch", model, tokenizer, data, args, runs, folders["donor"], **scratch)

    step(
        2, "Conversion", "Every sublayer now reads a softmax over depth. Its queries start at zero: the same function."
    )
    convert("donor" if args.model is None else str(args.model), "attnres", args)
    sequences = data[1][: args.batch_size]
    results["conversion"] = compare_conversion(folders["donor"], folders["attnres"], tokenizer, sequences, args)
    print(
        "  on held-out text: relative error of the logits {relative_error:.1e}, top-1 agreement {top_1_agreement:.2%}, "
        "same generated text: {same_generated_text}".format(**results["conversion"])
    )

    step(3, "Pretraining continued", "Both models train on from the same weights, on the same batches.")
    for name in ("donor", "attnres"):
        folder = folders[f"{name}-continued"]
        train_and_save(f"{name} continued", load(folders[name]), tokenizer, data, args, runs, folder, **continued)

    step(
        4, "LoRA", "Low-rank adapters on every linear layer of the converted model; depth attention is trained in full."
    )
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=args.lora_rank,
        lora_alpha=2 * args.lora_rank,
        target_modules="all-linear",
        modules_to_save=["depth_attention"],
    )
    model = peft.get_peft_model(load(folders["attnres"]), lora)
    runs["attnres with LoRA"] = train("LoRA", model, data, args, **continued)
    # where the base will be; PEFT would look for its vocabulary there, or on the Hub
    model.peft_config["default"].base_model_name_or_path = str(args.output / "attnres")
    model.save_pretrained(adapter, save_embedding_layers=False)
    results["lora"] = reload_and_merge(model.cpu(), folders["attnres"], adapter, tokenizer, data, args)

    step(5, "Generation", "The same prompt and the same random numbers for each.")
    results["generated"] = {}
    for name, folder in {**folders, "attnres-lora-merged": merged}.items():
        results["generated"][name] = text = generate(load(folder), tokenizer, args)
        print(f"  --- {name}", *text.splitlines(), sep="\n  | ", flush=True)

    step(6, "Figures and numbers", f"All of it goes to {args.output}.")
    model = load(folders["attnres-continued"])
    results["depth_weights"] = mean_depth_weights(model, sequences)
    plot_depth_weights(results["depth_weights"], model.config, args.partial / "depth_weights.png")
    plot_losses({name: run for name, run in runs.items() if name != "donor from scratch"}, args.partial / "losses.png")

    rows = [("model", "steps", "parameters trained", "ms per step", "held-out loss before", "after")]
    for name, run in runs.items():
        losses = (f"{run['held_out_loss_before']:.4f}", f"{run['held_out_loss_after']:.4f}")
        numbers = (str(run["steps"]), f"{run['trained_parameters']:,}", f"{run['milliseconds_per_step']:.0f}")
        rows.append((name, *numbers, *losses))
    print()
    print_table(rows)
    return results
