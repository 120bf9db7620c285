# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/pretrain.py --config llama --set num_hidden_layers=12 hidden_size=128 intermediate_size=352 \
    num_attention_heads=4 --data stdlib --train-tokenizer 4096 --steps 200 --output outputs/pretrain

Pretrains a model with Attention Residuals, from scratch or from a checkpoint; `--mode donor` trains the same model with
the residual stream of transformers. A donor's checkpoint is converted on the way.

The same command again takes up an interrupted run where its last checkpoint left it, and ends with the same losses as
if there had been no interruption (on a GPU, as far as its kernels are deterministic). `--compare donor,block,full`
trains several models on the same batches and writes one table; `--sweep depth_lr_scale=0.1,1,10` does so for values of
an option. The last line of the output is JSON.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from accelerate import PartialState
from attnres_convert import ConversionError, convert_checkpoint, convert_to_donor
from depth_callback import DepthCallback
from training_data import (
    DataError,
    PackedDocuments,
    ShuffledSequences,
    StreamedSequences,
    collate,
    first_line,
    load_documents,
    split_and_pack,
    tokenized,
    train_tokenizer,
    training_texts,
)
from training_optim import DEPTH_LR_SCALE, OPTIMIZERS, new_optimizer
from training_run import (
    FAILURE_FILE,
    METRICS_FILE,
    RESULTS_FILE,
    RunError,
    RunLog,
    RunTrainer,
    losses,
    open_run,
    peak_memory,
    plot_losses,
    publish,
    read_lines,
    table,
    tokens_per_second,
    versions,
    write_json,
)
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, TrainingArguments

import attnres  # noqa: F401, registers its classes
from configuration_attnres import ATTN_RES_MODES, AttnResConfigMixin, attn_res_config_class


MODES = ("donor", *ATTN_RES_MODES)
NOT_OF_A_RUN = ("output", "compare", "sweep", "set_options")
SCHEDULES = ("cosine", "wsd", "constant")


def read_config(source: str, overrides: dict) -> PreTrainedConfig:
    """The configuration of a checkpoint, in a JSON file or of a model type, with some fields replaced.

    Raises:
        RunError: there is none, or a field is unknown or has a wrong value.
    """
    try:
        values = {"model_type": source} if source in CONFIG_MAPPING else PreTrainedConfig.get_config_dict(source)[0]
    except (OSError, ValueError) as error:
        raise RunError(f"no configuration at {source}: {first_line(error)}") from None
    if values.get("model_type") not in CONFIG_MAPPING:
        raise RunError(f"{source}: model type {values.get('model_type')!r} is unknown to transformers.")
    config_class = CONFIG_MAPPING[values["model_type"]]
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    if unknown := overrides.keys() - known:
        raise RunError(f"{config_class.__name__} has no field {', '.join(sorted(unknown))}; see --set.")
    try:
        return config_class.from_dict({**values, **overrides})
    except Exception as error:  # of many kinds: huggingface_hub's strict fields, transformers' and our own checks
        raise RunError(f"the configuration of {source} is wrong: {first_line(error)}") from None


def with_mode(config: PreTrainedConfig, mode: str | None, block_size: int | None) -> PreTrainedConfig:
    """The configuration of a new model: the family's AttnRes form in `mode`, or its donor's for `"donor"`."""
    is_attnres = isinstance(config, AttnResConfigMixin)
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    if mode == "donor":
        if not is_attnres:
            return config
        own = {field.name for field in dataclasses.fields(AttnResConfigMixin)}
        return config.donor_config_class()(**{name: value for name, value in values.items() if name not in own})
    values["attn_res_mode"] = mode or values.get("attn_res_mode", "block")
    if block_size is not None:
        values["attn_res_block_size"] = block_size
    return attn_res_config_class(config.model_type)(**values)


def check_context(config: PreTrainedConfig, seq_len: int):
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and seq_len > longest:
        raise RunError(f"--seq-len {seq_len} is longer than the model's context, max_position_embeddings = {longest}.")


def new_model(args, tokenizer):
    """A model with random weights; of one seed, all modes of a family share the donor's weights."""
    config = read_config(args.config, args.set)
    try:
        config = with_mode(config, args.mode, args.block_size)
    except ValueError as error:
        raise RunError(str(error)) from None
    check_context(config, args.seq_len)
    if args.train_tokenizer:
        config.vocab_size = len(tokenizer)
    elif len(tokenizer) > config.vocab_size:
        raise RunError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {config.vocab_size}: --set vocab_size=..."
        )
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def starting_point(args, config: PreTrainedConfig) -> str:
    """The checkpoint to continue from: `--model` itself, or what conversion makes of it, in the run folder."""
    is_attnres = isinstance(config, AttnResConfigMixin)
    mode = args.mode or (config.attn_res_mode if is_attnres else "block")
    if mode == ("donor" if not is_attnres else config.attn_res_mode):
        if args.block_size not in (None, getattr(config, "attn_res_block_size", None)):
            raise RunError(f"--block-size can't change that of {args.model}; leave it out.")
        return args.model
    converted = args.output / "converted"
    if converted.exists():
        return str(converted)
    if is_attnres and mode != "donor":
        raise RunError(
            f"{args.model} was trained in {config.attn_res_mode} mode and can't be trained on in {mode} mode."
        )
    if is_attnres:
        convert_to_donor(args.model, converted, verify=False)
    else:
        convert_checkpoint(args.model, converted, mode=mode, block_size=args.block_size, verify=False)
    return str(converted)


def load_model(args, tokenizer):
    config = read_config(args.model, {})
    check_context(config, args.seq_len)
    options = {}
    if args.mode == "denseformer" and not isinstance(config, AttnResConfigMixin):
        # not a result of conversion; depth scalars, which the checkpoint lacks, start as the plain sum
        source, options["config"] = args.model, with_mode(config, args.mode, None)
    else:
        source = starting_point(args, config)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise RunError(f"{args.model} doesn't load: {first_line(error)}") from None
    if len(tokenizer) > model.config.vocab_size:
        raise RunError(f"the tokenizer has {len(tokenizer)} tokens, {args.model} {model.config.vocab_size}.")
    return model


def get_tokenizer(args, documents):
    """`--tokenizer`, a new one, or that of the model; a new one is kept in the run folder."""
    folder = args.output / "tokenizer"
    if args.train_tokenizer and not folder.exists():
        tokenizer = train_tokenizer(training_texts(documents, args.column, args.held_out), args.train_tokenizer)
        if len(tokenizer) > args.train_tokenizer:
            raise RunError(f"--train-tokenizer {args.train_tokenizer} is too small: {len(tokenizer)} tokens at least.")
        partial = folder.with_name(".tokenizer")
        tokenizer.save_pretrained(partial)
        publish(partial, folder)
    source = folder if args.train_tokenizer else args.tokenizer or args.model or args.config
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # of many kinds, some of tokenizers' own
        raise RunError(
            f"no tokenizer at {source}: {first_line(error)}; give --tokenizer or --train-tokenizer."
        ) from None


def get_data(args, documents, tokenizer):
    """Sequences to train on and held-out ones, and what is known about their amount."""
    needed = args.steps * args.batch_size * args.accumulate * PartialState().num_processes
    if args.streaming:
        options = {"seq_len": args.seq_len, "fraction": args.held_out}
        shuffled = documents.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        train = StreamedSequences(shuffled, tokenizer, args.column, held_out=False, **options)
        held_out = StreamedSequences(documents, tokenizer, args.column, held_out=True, **options)
        held_out = list(itertools.islice(held_out.once(), args.eval_sequences))
        if not held_out:
            raise RunError("the stream's held-out part is less than one sequence; change --held-out or --seq-len.")
        return train, held_out, {"held_out_sequences": len(held_out)}
    tokens = tokenized(documents, tokenizer, args.column, args.num_proc)
    train, test = split_and_pack(tokens, args.seq_len, args.held_out)
    amount = {
        "documents": len(tokens),
        "training_tokens": train.num_tokens,
        "epochs": needed / len(train),
        "held_out_sequences": min(len(test), args.eval_sequences),
    }
    spread = np.linspace(0, len(test) - 1, amount["held_out_sequences"]).round().astype(int)
    held_out = torch.utils.data.Subset(test, spread.tolist())  # of all held-out documents
    return ShuffledSequences(train, needed, args.seed), held_out, amount


def check_same_data(folder: Path, train, is_new: bool):
    """A resumed run needs the documents it started with; their lengths stand for them."""
    if not isinstance(train, ShuffledSequences):
        return
    path, packed = folder / "data.json", train.sequences
    assert isinstance(packed, PackedDocuments)
    checksum = {"documents": len(packed.lengths), "tokens": packed.num_tokens}
    checksum["lengths"] = int((packed.lengths * range(1, len(packed.lengths) + 1) % 1_000_003).sum())
    if not is_new and path.exists() and json.loads(path.read_text(encoding="utf-8")) != checksum:
        raise RunError(f"the data have changed since {folder} was begun; choose another --output.")
    write_json(path, checksum)


def training_arguments(args) -> TrainingArguments:
    schedule = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    ratio = {"cosine": "min_lr_rate", "wsd": "min_lr_ratio"}
    schedule_options = {ratio[args.schedule]: args.min_lr_ratio} if args.schedule in ratio else {}
    if args.schedule == "wsd":
        schedule_options["num_decay_steps"] = max(1, round(args.decay * args.steps))
    checkpointing = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulate,
        learning_rate=args.learning_rate,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=schedule[args.schedule],
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=args.warmup,
        use_cpu=not torch.accelerator.is_available(),
        ddp_find_unused_parameters=False,
        bf16=args.bf16,
        torch_compile=args.compile,
        **{f"{checkpointing}_checkpointing": args.gradient_checkpointing},
        logging_steps=args.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=args.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=args.save_steps,
        remove_unused_columns=False,
        dataloader_num_workers=args.num_workers,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=args.seed,
    )


def prepare(args, is_new: bool):
    """Tokenizer, model and data. In each process, the main one first."""
    with PartialState().main_process_first():
        documents = load_documents(
            args.data, args.column, args.data_config, args.data_split, args.sample_by, args.streaming
        )
        tokenizer = get_tokenizer(args, documents)
        transformers.set_seed(args.seed)
        model = load_model(args, tokenizer) if args.model else new_model(args, tokenizer)
        train, held_out, amount = get_data(args, documents, tokenizer)
        check_same_data(args.output, train, is_new)
    return tokenizer, model, train, held_out, amount


def run_arguments(args) -> dict:
    return {name: value for name, value in vars(args).items() if name not in NOT_OF_A_RUN}


def pretrain(args) -> dict:
    """Trains one model, or goes on with it, and returns the numbers that are also in `results.json`.

    Raises:
        RunError, DataError, ConversionError: bad input, or a loss that isn't finite; one line says what to do.
    """
    started = time.perf_counter()
    state = PartialState()
    with state.main_process_first():
        checkpoint = open_run(args.output, run_arguments(args), state.is_main_process)
    results_file = args.output / RESULTS_FILE
    if results_file.exists():
        return json.loads(results_file.read_text(encoding="utf-8"))
    tokenizer, model, train, held_out, amount = prepare(args, is_new=checkpoint is None)
    tokens_per_step = args.batch_size * args.accumulate * args.seq_len * state.num_processes
    callbacks = [RunLog(args.output, tokens_per_step)]
    if args.depth_every:
        probe = {name: value[None] for name, value in held_out[0].items() if name != "documents"}
        callbacks.append(DepthCallback(args.output, probe, args.depth_every))
    try:
        optimizer = new_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay, args.depth_lr_scale)
    except ValueError as error:
        raise RunError(str(error)) from None
    trainer = RunTrainer(
        model,
        training_arguments(args),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        keep_checkpoints=args.keep_checkpoints,
    )
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"going on from {checkpoint}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()  # the main process writes the log
    if args.steps not in losses(read_lines(args.output / METRICS_FILE), "held_out_loss"):
        trainer.evaluate()
    trainer.save_final_model(args.output / "model")
    metrics = read_lines(args.output / METRICS_FILE)
    held_out_losses = losses(metrics, "held_out_loss")
    results = {
        "output": str(args.output),
        "mode": getattr(model.config, "attn_res_mode", "donor"),
        "held_out_loss": held_out_losses[args.steps],
        "steps": args.steps,
        "tokens": args.steps * tokens_per_step,
        **amount,
        "tokens_per_second": tokens_per_second(metrics),
        "peak_memory_bytes": peak_memory(),
        "parameters": model.num_parameters(),
        "depth_parameters": sum(p.numel() for name, p in model.named_parameters() if "depth_attention" in name),
        "seconds": time.perf_counter() - started,
        "arguments": json.loads(json.dumps(run_arguments(args), default=str)),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        plot_losses({results["mode"]: metrics}, args.output / "loss.png", f"{args.output.name}: loss")
        write_json(results_file, results)
    return results


def variants(args) -> list[tuple[str, list[str]]]:
    """Name and options of each run of a comparison: every mode with every combination of swept values."""
    axes = [[(mode, ["--mode", mode]) for mode in args.compare]] if args.compare else []
    for sweep in args.sweep:
        name, _, values = sweep.partition("=")
        axes.append([(f"{name}={value}", [f"--{name.replace('_', '-')}={value}"]) for value in values.split(",")])
    return [
        (" ".join(name for name, _ in combination), [option for _, options in combination for option in options])
        for combination in itertools.product(*axes)
    ]


def without_seed(name: str) -> str:
    return " ".join(part for part in name.split(" ") if not part.startswith("seed=")) or "all"


def compare_table(runs: dict[str, dict]) -> str:
    """One row for each run, then, where seeds were swept, one for each mean over seeds."""
    groups = {}
    for name, run in runs.items():
        groups.setdefault(without_seed(name), []).append(run)
    rows = [("run", "held-out loss", "tokens/s", "peak memory, MB", "parameters", "of depth attention")]
    rows += [table_row(name, [run]) for name, run in runs.items()]
    if any("seed=" in name for name in runs):
        rows += [table_row(f"mean: {name}", group) for name, group in groups.items() if len(group) > 1]
    return table(rows)


def table_row(name: str, runs: list[dict]) -> tuple[str, ...]:
    failed = [run for run in runs if "held_out_loss" not in run]
    if failed:
        return name, f"none: {failed[0]['what']} {failed[0]['value']} at step {failed[0]['step']}", *4 * ("-",)
    values = [run["held_out_loss"] for run in runs]
    loss = f"{statistics.mean(values):.4f}" + (f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else "")
    speed = statistics.mean(run["tokens_per_second"] for run in runs)
    memory = max(run["peak_memory_bytes"] for run in runs) / 1e6
    return (
        name,
        loss,
        f"{speed:,.0f}",
        f"{memory:,.0f}",
        f"{runs[0]['parameters']:,}",
        f"{runs[0]['depth_parameters']:,}",
    )


def compare(args, argv: list[str]) -> dict:
    """Trains each variant in a process of its own, one after the other, with the same data order, seed and budget.

    Finished ones are not trained again, interrupted ones go on. Writes `comparison.json`, `.md` and `.png`.
    """
    open_run(args.output, {**run_arguments(args), "compare": args.compare, "sweep": args.sweep})
    shared = []
    if args.train_tokenizer:
        documents = load_documents(
            args.data, args.column, args.data_config, args.data_split, args.sample_by, args.streaming
        )
        get_tokenizer(args, documents)
        shared = ["--train-tokenizer", "0", "--tokenizer", str(args.output / "tokenizer")]
        shared += ["--set", *args.set_options, f"vocab_size={args.train_tokenizer}"] if args.config else []
    runs = {}
    for name, options in variants(args):
        folder = args.output / name.replace(" ", ",")
        print(f"--- {name}", flush=True)
        command = [
            sys.executable,
            __file__,
            *argv,
            "--compare",
            "",
            "--sweep",
            *shared,
            *options,
            "--output",
            str(folder),
        ]
        run = subprocess.run(command, stdout=subprocess.DEVNULL)
        result = folder / (FAILURE_FILE if run.returncode else RESULTS_FILE)
        if not result.exists():
            raise RunError(f"the run {name} failed; its message is above.")
        runs[name] = json.loads(result.read_text(encoding="utf-8"))
    metrics = {name: read_lines(Path(run["output"]) / METRICS_FILE) for name, run in runs.items() if "output" in run}
    if metrics:
        plot_losses(metrics, args.output / "comparison.png", "Same data order, seed and budget")
    text = compare_table(runs)
    (args.output / "comparison.md").write_text(text, encoding="utf-8")
    results = {"output": str(args.output), "runs": runs, "versions": versions(), "command": ["pretrain.py", *argv]}
    write_json(args.output / "comparison.json", results)
    print(text)
    return {"output": str(args.output), "held_out_loss": {name: run.get("held_out_loss") for name, run in runs.items()}}


def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument_group("model").add_argument
    add("--config", help="train from scratch: model type (llama, attnres_qwen3, ...), JSON file, checkpoint or Hub id")
    add("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="fields of --config to replace")
    add("--model", help="train on: AttnRes or donor checkpoint (folder or Hub id); a donor is converted")
    add("--mode", choices=MODES, help="residual stream or kind of depth attention; default: the model's, or block")
    add("--block-size", type=positive, help="decoder layers per block; default: an eighth of the layers")
    add("--tokenizer", help="folder or Hub id; default: that of --model or --config")
    add("--train-tokenizer", type=int, default=0, metavar="N", help="train one of N tokens on the training data")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["stdlib"], help="stdlib (Python's own source, offline), files or folders of "
        "text, JSON lines or Parquet, or a Hub id; default: stdlib")  # fmt: skip
    add("--data-config", help="configuration of the data set on the Hub")
    add("--data-split", default="train", help="split, also train[:1%%] and the like; default: train")
    add("--column", default="text", help="column that holds the text; default: text")
    add("--sample-by", choices=("document", "paragraph", "line"), help="what a document is in text files; default: "
        "document (a file) if there are several files, else paragraph")  # fmt: skip
    add("--streaming", action="store_true", help="read the data as training goes on, without preparing all of it")
    add("--shuffle-buffer", type=positive, default=1000, help="documents shuffled at a time with --streaming")
    add("--held-out", type=float, default=0.05, help="share of the documents, chosen by hash; default: 0.05")
    add("--eval-sequences", type=positive, default=64, help="held-out sequences to evaluate at most; default: 64")
    add("--seq-len", type=positive, default=256, help="tokens per sequence; default: 256")
    add("--num-proc", type=positive, help="processes that tokenise")
    add("--num-workers", type=int, default=0, help="processes that read batches; default: 0")
    add = parser.add_argument_group("training").add_argument
    add("--steps", type=positive, default=1000, help="default: 1000")
    add("--batch-size", type=positive, default=8, help="sequences per device and forward; default: 8")
    add("--accumulate", type=positive, default=1, help="forwards per step; default: 1")
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="muon: for matrices, AdamW for the rest")
    add("--learning-rate", type=float, default=1e-3, help="default: 1e-3")
    add("--depth-lr-scale", type=float, default=DEPTH_LR_SCALE, help="depth attention's learning rate as a multiple of "
        f"--learning-rate; default: {DEPTH_LR_SCALE}")  # fmt: skip
    add("--weight-decay", type=float, default=0.1, help="of matrices; default: 0.1")
    add("--max-grad-norm", type=float, default=1.0, help="default: 1")
    add("--schedule", choices=SCHEDULES, default="cosine", help="default: cosine; wsd: warm-up, stable, decay")
    add("--warmup", type=int, default=100, help="steps; default: 100, at most a tenth of --steps")
    add("--decay", type=float, default=0.2, help="share of the steps in which wsd decays; default: 0.2")
    add("--min-lr-ratio", type=float, default=0.1, help="of the last learning rate to --learning-rate; default: 0.1")
    add("--bf16", action="store_true", help="compute in bfloat16, weights stay in float32")
    add("--gradient-checkpointing", action="store_true", help="recompute activations: less memory, more time")
    add("--compile", action="store_true", help="torch.compile")
    add("--seed", type=int, default=0)
    add = parser.add_argument_group("run").add_argument
    add("--output", type=Path, required=True, help="run folder; the same command again resumes what is in it")
    add("--logging-steps", type=positive, default=1, help="default: 1")
    add("--eval-steps", type=positive, help="default: a tenth of --steps")
    add("--save-steps", type=positive, help="steps between checkpoints; default: a tenth of --steps")
    add("--keep-checkpoints", type=positive, default=2, help="default: the last 2")
    add("--depth-every", type=int, default=100, help="steps between looks at each layer, 0 for none; default: 100")
    add("--compare", help="modes to train one after the other, such as donor,block,full,denseformer")
    add("--sweep", nargs="*", default=[], metavar="OPTION=V1,V2", help="values to try, such as seed=0,1,2")
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuses what can't work, and fills in what depends on other options."""
    if (args.config is None) == (args.model is None):
        parser.error("give either --config, to train from scratch, or --model, to train on")
    if args.model is not None and (args.set or args.train_tokenizer):
        parser.error("--set and --train-tokenizer go with --config; a checkpoint has a configuration and a tokenizer")
    if not 0 < args.held_out < 1:
        parser.error("--held-out is a share of the documents, between 0 and 1")
    if args.streaming and args.num_workers:
        parser.error("--streaming reads in the main process; leave out --num-workers")
    args.set_options, fields = args.set, {}
    for option in args.set:
        name, equals, value = option.partition("=")
        if not equals:
            parser.error(f"--set {option}: give FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    args.set = fields
    args.warmup = min(args.warmup, args.steps // 10)
    args.eval_steps = args.eval_steps or math.ceil(args.steps / 10)
    args.save_steps = args.save_steps or math.ceil(args.steps / 10 / args.logging_steps) * args.logging_steps
    if args.save_steps % args.logging_steps:
        parser.error("--save-steps must be a multiple of --logging-steps, so that a resumed run logs the same losses")
    args.compare = args.compare.split(",") if args.compare else []
    for mode in args.compare:
        if mode not in MODES:
            parser.error(f"--compare: {mode!r} is not one of {', '.join(MODES)}")
    for sweep in args.sweep:
        name, equals, values = sweep.partition("=")
        if name not in vars(args) or not values or name in ("output", "compare", "sweep", "set", "data"):
            parser.error(f"--sweep {sweep}: give an option and values, such as depth_lr_scale=0.1,1,10")


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    state = PartialState(cpu=not torch.accelerator.is_available())
    transformers.utils.logging.disable_progress_bar()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        results = compare(args, argv) if args.compare or args.sweep else pretrain(args)
    except (RunError, DataError, ConversionError) as error:
        raise SystemExit(f"pretrain: {error}") from None
    if state.is_main_process:
        print(json.dumps({name: value for name, value in results.items() if name not in ("arguments", "versions")}))


if __name__ == "__main__":
    main()
