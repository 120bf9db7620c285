# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/finetune.py --model outputs/pretrain/model --method lora --data stdlib --output outputs/finetune

Fine-tunes a model with Attention Residuals on conversations, or on prompts and completions, with the loss on the
answers alone. A donor's checkpoint is converted on the way.

`--method lora`, `dora` and `qlora` train adapters and, in full, depth attention; `depth` trains depth attention alone,
`full` everything. `model/` in the run folder then holds the adapter or the model.

The same command again takes up an interrupted run where its last checkpoint left it. `--compare lora,dora,full,depth`
trains with several methods on the same batches and writes one table. The last line of the output is JSON.
"""

import argparse
import copy
import functools
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from accelerate import PartialState
from adapters import (
    BASE_FILE,
    DEPTH_ATTENTION,
    QUANTIZATIONS,
    describe_base,
    load_adapter,
    new_adapter,
    prepare_quantized,
    quantization_config,
    take_over_quantized,
    untie_adapted,
)
from attnres_convert import reading
from attnres_recipes.files import write_json
from comparison import check_variants, compare, open_comparison
from depth_callback import decoder
from finetuning_data import (
    collate_padded,
    encoded_examples,
    load_examples,
    set_chat_template,
    split_and_pack_examples,
    uses_chat,
)
from model_loading import check_context, check_trainable, read_config
from pretrain import check_same_data, depth_callbacks, get_tokenizer, load_model, starting_point
from training_card import mean_depth_weights, model_results, write_training_card
from training_data import ShuffledSequences, check_tokens, data_name
from training_optim import is_depth_attention, new_optimizer
from training_options import (
    above_zero,
    add_training_options,
    check_training_options,
    enough_memory,
    given_options,
    number,
    positive,
    rank,
    run_arguments,
    set_intervals,
    share,
    start_process,
    training_arguments,
    workers,
)
from training_run import (
    METRICS_FILE,
    RESULTS_FILE,
    RunError,
    RunLog,
    RunTrainer,
    discarded_if_refused,
    losses,
    main_process_first,
    one_line_errors,
    open_run,
    peak_memory,
    plot_losses,
    read_lines,
    read_results,
    tokens_per_second,
    versions,
    whole_folder,
)


MODES = ("donor", "block", "full")
METHODS = ("lora", "dora", "qlora", "full", "depth")
ADAPTER_METHODS = ("lora", "dora", "qlora")
LEARNING_RATES = {**dict.fromkeys(ADAPTER_METHODS, 2e-4), "full": 2e-5, "depth": 1e-3}


class SupervisedTrainer(RunTrainer):
    """A Trainer whose held-out loss is the mean over all answers' tokens, however they are spread over batches."""

    base = None  # of an adapter: what its BASE_FILE says

    def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
        if not model.training:
            # a batch counts for its sequences, so each gets the same share of all tokens
            num_items_in_batch = self.labels_per_sequence * len(inputs["input_ids"]) * self.args.world_size
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)

    @functools.cached_property
    def labels_per_sequence(self) -> float:
        # torch.compile takes a number of numpy's for an array
        return float(np.mean([(item["labels"] != -100).sum().item() for item in self.eval_dataset]))

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        if self.base is not None and self.args.should_save:
            write_json(Path(output_dir or self.args.output_dir) / BASE_FILE, self.base)


def base_model(args, tokenizer):
    """The model that adapters go on, or that is trained itself."""
    if args.method == "qlora":
        try:
            return load_model(args, tokenizer, quantization_config=quantization_config(args.quantization, args.bf16))
        except ImportError as error:  # a version that transformers doesn't take
            raise RunError(reading.reason(error)) from None
    # what adapters leave as it is can be kept in the precision that it is used in
    in_bf16 = args.bf16 and args.method in ADAPTER_METHODS
    return load_model(args, tokenizer, dtype=torch.bfloat16 if in_bf16 else torch.float32)


def prepare_model(args, tokenizer) -> tuple[torch.nn.Module, dict | None]:
    """The model, with the parameters that are trained requiring gradients, and what tells the base of an adapter."""
    model = base_model(args, tokenizer)
    if args.method == "depth":
        if not hasattr(decoder(model), DEPTH_ATTENTION):
            raise RunError("a donor has no depth attention to train; leave out --mode donor or choose another method.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(is_depth_attention(name))
    if args.method not in ADAPTER_METHODS:
        return model, None
    source = starting_point(args, read_config(args.model))
    source = str(Path(source).resolve()) if Path(source).exists() else source
    base = {"base": source, **describe_base(model)}
    if getattr(model, "hf_quantizer", None) is not None:
        model = prepare_quantized(model)
    if args.adapter:
        model = load_adapter(model, args.adapter, is_trainable=True)
        if getattr(model.peft_config["default"], "use_dora", None) != (args.method == "dora"):
            raise RunError(f"the adapter {args.adapter} wasn't made by --method {args.method}.")
        trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
        has_depth = hasattr(decoder(model), DEPTH_ATTENTION)
        if has_depth and not any(map(is_depth_attention, trained)) and PartialState().is_main_process:
            print(f"the adapter {args.adapter} has no depth attention, which stays as it is", file=sys.stderr)
    else:
        alpha = args.lora_alpha or 2 * args.lora_rank
        model = new_adapter(model, args.lora_rank, alpha, args.lora_dropout, args.method == "dora", args.target_modules)
    model.peft_config["default"].base_model_name_or_path = source
    return model, base


def get_data(args, tokenizer, vocab_size: int):
    """Sequences to train on and held-out ones, and what is known about their amount."""
    rows = load_examples(args.data, args.columns, args.data_config, args.data_split)
    if uses_chat(rows):
        set_chat_template(tokenizer)
    examples = encoded_examples(rows, tokenizer, data_name(args.data))
    check_tokens(examples, vocab_size, tokenizer, data_name(args.data))
    train, test, amount = split_and_pack_examples(examples, args.seq_len, args.held_out, args.packing)
    if PartialState().is_main_process:
        for count, what in (
            (amount["truncated"], f"longer than --seq-len {args.seq_len} and lose their ends"),
            (amount["without_answer"], f"left out: no answer in their first {args.seq_len} tokens"),
        ):
            if count:
                print(
                    f"{count} of {amount['examples'] + amount['without_answer']} examples are {what}", file=sys.stderr
                )
    per_step = args.batch_size * args.accumulate * PartialState().num_processes
    steps = args.steps or math.ceil(args.epochs * len(train) / per_step)
    amount |= {
        "training_tokens": train.num_tokens,
        "training_sequences": len(train),
        "epochs": steps * per_step / len(train),
        "held_out_sequences": min(len(test), args.eval_sequences),
    }
    spread = np.linspace(0, len(test) - 1, amount["held_out_sequences"]).round().astype(int)
    held_out = torch.utils.data.Subset(test, spread.tolist())  # of long and short examples
    return ShuffledSequences(train, steps * per_step, args.seed), held_out, amount, steps


def check_method(args, config):
    """Refuses a checkpoint that the method can't train, before anything is read or converted."""
    quantized = (args.quantization if args.method == "qlora" else "") if args.method in ADAPTER_METHODS else None
    check_trainable(config, args.model, quantized, args.merge)


def prepare(args, is_new: bool):
    """Tokenizer, model and data. In each process, the main one first."""
    with main_process_first():
        config = read_config(args.model)
        check_context(config, args.seq_len)
        check_method(args, config)
        tokenizer = get_tokenizer(args, None)
        vocab_size = len(tokenizer) if args.resize_embeddings else config.vocab_size
        train, held_out, amount, steps = get_data(args, tokenizer, vocab_size)
        transformers.set_seed(args.seed)
        model, base = prepare_model(args, tokenizer)
        check_same_data(args.output, train, is_new)
    return tokenizer, model, base, train, held_out, amount, steps


@torch.no_grad()
def save_merged(args, trainer, tokenizer) -> float:
    """Writes `merged/`, which loads without PEFT, and returns by how much merging changed the logits of a held-out
    sequence, relative to the largest."""
    base = load_model(args, tokenizer)
    if args.method == "qlora":
        take_over_quantized(base, trainer.accelerator.unwrap_model(trainer.model))
    adapted = load_adapter(base, str(args.output / "model")).eval()
    probe = {name: trainer.eval_dataset[0][name][None] for name in ("input_ids", "position_ids")}
    expected = adapted(**probe, use_cache=False).logits
    untie_adapted(adapted)
    model = adapted.merge_and_unload(safe_merge=True)
    logits = model(**probe, use_cache=False).logits
    with whole_folder(args.output / "merged") as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    return ((logits - expected).abs().max() / expected.abs().max()).item()


def finetune(args) -> dict:
    """Trains one model, or goes on with it, and returns the numbers that are also in `results.json`.

    Raises:
        RunError, DataError, ConversionError: bad input, or a loss that isn't finite; one line says what to do.
    """
    started = time.perf_counter()
    state = PartialState()
    with main_process_first():
        checkpoint = open_run(args.output, run_arguments(args), state.is_main_process)
    results_file = args.output / RESULTS_FILE
    if results_file.exists():
        return read_results(results_file)
    arguments = run_arguments(args)
    with discarded_if_refused(args.output):
        tokenizer, model, base, train, held_out, amount, steps = prepare(args, is_new=checkpoint is None)
        args = copy.copy(args)
        args.steps = steps
        set_intervals(args)
        try:
            optimizer = new_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay, args.depth_lr_scale)
        except ValueError as error:
            raise RunError(str(error)) from None
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}  # before they are sharded
    per_step = args.batch_size * args.accumulate * state.num_processes
    tokens_per_step = round(per_step * train.sequences.num_tokens / len(train.sequences))
    callbacks = [RunLog(args.output, tokens_per_step), *depth_callbacks(args, model, held_out[0])]
    training = training_arguments(args)
    training.eval_on_start = checkpoint is None
    usable = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None]
    pad_token_id = next(token for token in usable if token < model.config.vocab_size)  # it may have no embedding
    trainer = SupervisedTrainer(
        model,
        training,
        data_collator=functools.partial(collate_padded, pad_token_id=pad_token_id),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        optimizers=(optimizer, None),
        callbacks=callbacks,
        keep_checkpoints=args.keep_checkpoints,
    )
    trainer.base = base
    if checkpoint is not None and trainer.is_world_process_zero():
        print(f"going on from {checkpoint}", file=sys.stderr)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    trainer.accelerator.wait_for_everyone()  # the main process writes the log
    if steps not in losses(read_lines(args.output / METRICS_FILE), "held_out_loss"):
        trainer.evaluate()
    trainer.save_final_model(args.output / "model")
    depth_weights = mean_depth_weights(trainer)
    merged_error = None
    if args.merge and args.method in ADAPTER_METHODS and trainer.is_world_process_zero():
        merged_error = save_merged(args, trainer, tokenizer)
    trainer.accelerator.wait_for_everyone()
    metrics = read_lines(args.output / METRICS_FILE)
    held_out_losses = losses(metrics, "held_out_loss")
    results = {
        "output": str(args.output),
        "method": args.method,
        "mode": getattr(model.config, "attn_res_mode", "donor"),
        "held_out_loss": held_out_losses[steps],
        "held_out_loss_before": held_out_losses.get(0),
        "steps": steps,
        "tokens": steps * tokens_per_step,
        **amount,
        "tokens_per_second": tokens_per_second(metrics),
        "peak_memory_bytes": peak_memory(),
        "trained_parameters": sum(trained.values()),
        "depth_parameters": sum(number for name, number in trained.items() if is_depth_attention(name)),
        "merged_relative_error": merged_error,
        "seconds": time.perf_counter() - started,
        "arguments": json.loads(json.dumps(arguments, default=str)),
        "versions": {**versions(), "peft": peft.__version__},
    }
    if trainer.is_world_process_zero():
        title = args.output.resolve().name
        plot_losses({results["method"]: metrics}, args.output / "loss.png", f"{title}: loss on answers")
        beside_model = model_results("finetune", args, results, model.config, base and base["base"])
        write_training_card(args.output / "model", args, beside_model, title, depth_weights, model.config)
        if merged_error is not None:
            merged, title = args.output / "merged", f"{title}-merged"
            write_training_card(merged, args, beside_model, title, depth_weights, model.config)
        write_json(results_file, results)
    return results


def compare_runs(args, argv: list[str]) -> dict:
    """All methods, on one base; see [`compare`]."""
    open_comparison(args)
    config = read_config(args.model)
    check_context(config, args.seq_len)
    check_method(args, config)
    if "qlora" in args.compare:
        quantization_config(args.quantization, args.bf16)  # what it needs may be absent
    base = starting_point(args, config)  # converted once for all
    shared = ["--model", base, "--tokenizer", args.tokenizer or args.model]
    columns = {"trained parameters": "trained_parameters", "of depth attention": "depth_parameters"}
    return compare(Path(__file__), args, argv, "--method", shared, columns)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        usage="%(prog)s --model CHECKPOINT --output FOLDER [options]; --help lists them",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument_group("model").add_argument
    add("--model", required=True, help="AttnRes or donor checkpoint (folder or Hub id); a donor is converted")
    add("--mode", choices=MODES, help="residual stream or kind of depth attention; default: the model's, or block")
    add("--block-size", type=positive, help="decoder layers per block of a donor; default: an eighth of the layers")
    add("--tokenizer", help="folder or Hub id; default: that of --model")
    add("--resize-embeddings", action="store_true", help="enlarge the embeddings to all tokens of the tokenizer; with "
        "methods that make no adapter")  # fmt: skip
    add = parser.add_argument_group("method").add_argument
    add("--method", choices=METHODS, default="lora", help="lora, dora, qlora (on a quantised model): adapters and "
        "depth attention; full: everything; depth: depth attention alone; default: lora")  # fmt: skip
    add("--lora-rank", type=rank, help="rank of the adapters; default: 16")
    add("--lora-alpha", type=above_zero, help="scale of the adapters, divided by their rank; default: twice the rank")
    add("--lora-dropout", type=number(float, 0, 1, without=(1,)), help="of the adapters' input; default: 0")
    add("--target-modules", nargs="+", metavar="NAME", help="layers that get adapters, by the end of their name; "
        "default: all linear layers of attention, MLPs and shared experts")  # fmt: skip
    add("--quantization", choices=QUANTIZATIONS, default="nf4", help="of qlora: nf4, 4 bits, by bitsandbytes, or int8 "
        "by torchao; default: nf4")  # fmt: skip
    add("--adapter", help="folder or Hub id of an adapter for --model to train on")
    add("--merge", action="store_true", help="also write the model with its adapter merged, which loads without PEFT")
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["stdlib"], help="stdlib (functions of Python's library, offline; as chat: "
        "stdlib-chat), files or folders of JSON, JSON lines or Parquet, or a Hub id; default: stdlib")  # fmt: skip
    add("--data-config", help="configuration of the data set on the Hub")
    add("--data-split", default="train", help="split, also train[:1%%] and the like; default: train")
    add("--columns", help="one column, of conversations, or two, of prompts and completions; default: messages, else "
        "prompt,completion")  # fmt: skip
    add("--held-out", type=share, default=0.05, help="share of the examples, chosen by hash, one at least; "
        "default: 0.05")  # fmt: skip
    add("--eval-sequences", type=positive, default=64, help="held-out sequences to evaluate at most; default: 64")
    add("--seq-len", type=number(int, 2), default=512, help="tokens per sequence; longer examples lose their ends; "
        "default: 512")  # fmt: skip
    add("--no-packing", dest="packing", action="store_false", help="one example per sequence")
    add("--num-workers", type=workers, default=0, help="processes that read batches; default: 0")
    add("--epochs", type=above_zero, default=3, help="times to see the data; default: 3")
    add_training_options(parser, "methods", "lora,dora,full,depth")
    parser.set_defaults(steps=None, weight_decay=0.0, learning_rate=None)
    args = parser.parse_args(argv)
    args.command = given_options(parser, args)
    check_arguments(parser, args)
    if args.compare or args.sweep:
        check_variants(parser, args, argv, "--method", parse_arguments)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuses what can't work, and fills in what depends on other options."""
    check_training_options(parser, args, METHODS)
    if args.adapter:
        for name in ("lora_rank", "lora_alpha", "lora_dropout", "target_modules"):
            if getattr(args, name) is not None:
                parser.error(f"--adapter {args.adapter} has its own; leave out --{name.replace('_', '-')}")
    if args.adapter and args.method not in ADAPTER_METHODS:
        parser.error(f"--adapter goes with {', '.join(ADAPTER_METHODS)}")
    if args.resize_embeddings and args.method in ADAPTER_METHODS:
        parser.error("--resize-embeddings goes with --method full or depth: an adapter leaves its base as it is")
    if args.optimizer == "muon" and args.method == "depth":
        parser.error("--optimizer muon is for matrices of the layers; --method depth trains none")
    args.columns = args.columns.split(",") if args.columns else None
    if args.columns and (len(args.columns) > 2 or len(set(args.columns)) < len(args.columns)):
        parser.error("--columns takes one name, of conversations, or two different ones, of prompts and completions")
    args.train_tokenizer, args.config = 0, None  # options of pretraining that its functions look at
    args.learning_rate = args.learning_rate or LEARNING_RATES[args.method]
    args.lora_rank, args.lora_dropout = args.lora_rank or 16, args.lora_dropout or 0.0


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    state = start_process()
    with one_line_errors("finetune", args.output), enough_memory():
        results = compare_runs(args, argv) if args.compare or args.sweep else finetune(args)
    if state.is_main_process:
        print(json.dumps({name: value for name, value in results.items() if name not in ("arguments", "versions")}))


if __name__ == "__main__":
    main()
