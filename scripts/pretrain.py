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
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from attnres_convert import InputError, convert_checkpoint, convert_to_donor, reading
from attnres_recipes.files import write_json
from comparison import check_variants, compare, open_comparison
from depth_callback import DEPTH_FILE, DepthCallback, check_can_be_watched, decoder
from model_loading import (
    check_context,
    check_trainable,
    load_tokenizer,
    load_weights,
    random_model,
    read_config,
)
from packed_documents import mixes_documents
from training_card import mean_depth_weights, model_results, write_training_card
from training_data import (
    ShuffledSequences,
    StreamedSequences,
    check_tokens,
    collate,
    load_documents,
    split_and_pack,
    tokenized,
    train_tokenizer,
    training_texts,
)
from training_optim import new_optimizer
from training_options import (
    Lists,
    add_training_options,
    check_training_options,
    enough_memory,
    given_options,
    number,
    positive,
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
from transformers import PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

import attnres  # noqa: F401, registers its classes
from configuration_attnres import ATTN_RES_MODES, AttnResConfigMixin, attn_res_config_class


MODES = ("donor", *ATTN_RES_MODES)


def check_sizes(config: PreTrainedConfig):
    """Refuses sizes that transformers takes and that fail only in a model's first forward, or make no sense."""
    sizes = {name: getattr(config, name, None) for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")}
    for name, size in sizes.items():
        if isinstance(size, int) and size < 1:
            raise RunError(f"{name} is {size}; it must be at least 1.")
    heads, key_value_heads = sizes["num_attention_heads"], getattr(config, "num_key_value_heads", None)
    if isinstance(heads, int) and isinstance(key_value_heads, int) and (key_value_heads < 1 or heads % key_value_heads):
        raise RunError(f"num_key_value_heads = {key_value_heads} must divide num_attention_heads = {heads}.")
    chosen = getattr(config, "num_experts_per_tok", None)
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = getattr(config, name, None)
        if isinstance(chosen, int) and isinstance(experts, int) and experts and not 0 < chosen <= experts:
            raise RunError(f"num_experts_per_tok = {chosen} must be from 1 to {name} = {experts}.")


def with_mode(config: PreTrainedConfig, mode: str | None, block_size: int | None) -> PreTrainedConfig:
    """The configuration of a new model: the family's AttnRes form in `mode`, or its donor's for `"donor"`."""
    is_attnres = isinstance(config, AttnResConfigMixin)
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "auto_map")}
    if mode == "donor":
        if not is_attnres:
            check_decoder(config.model_type)
            return config
        own = {field.name for field in dataclasses.fields(AttnResConfigMixin)}
        return config.donor_config_class()(**{name: value for name, value in values.items() if name not in own})
    values["attn_res_mode"] = mode or values.get("attn_res_mode", "block")
    if block_size is not None and values["attn_res_mode"] == "block":
        values["attn_res_block_size"] = block_size
    return attn_res_config_class(config.model_type)(**values)


def check_decoder(model_type: str):
    """Refuses what isn't a language model from left to right."""
    others = (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or any(model_type in names for names in others):
        raise RunError(f"{model_type} is no decoder-only language model, and only these are trained.")


def new_model(args, tokenizer):
    """A model with random weights; of one seed, all modes of a family share the donor's weights."""
    config = read_config(args.config, args.set, may_be_type=True)
    check_sizes(config)
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
    return random_model(config)


def starting_point(args, config: PreTrainedConfig) -> str:
    """The checkpoint to continue from: `--model` itself, or what conversion makes of it, in the run folder."""
    is_attnres = isinstance(config, AttnResConfigMixin)
    mode = args.mode or (config.attn_res_mode if is_attnres else "block")
    if mode == ("donor" if not is_attnres else config.attn_res_mode):
        if is_attnres and args.block_size not in (None, config.attn_res_block_size):
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
        block_size = args.block_size if mode == "block" else None
        convert_checkpoint(args.model, converted, mode=mode, block_size=block_size, verify=False)
    return str(converted)


def load_model(args, tokenizer, **options):
    """The model to train on, a donor's converted on the way; `options` are those of `from_pretrained`."""
    config = read_config(args.model)
    check_context(config, args.seq_len)
    if args.mode == "denseformer" and not isinstance(config, AttnResConfigMixin):
        # not a result of conversion; depth scalars, which the checkpoint lacks, start as the plain sum
        source, options["config"] = args.model, with_mode(config, args.mode, None)
        options["may_be_new"] = "depth_attention"
    else:
        source = starting_point(args, config)
    model = load_weights(source, plain=True, **{"dtype": torch.float32, **options})
    if decoder(model) is None:
        raise RunError(
            f"{args.model} is a {type(model).__name__}, which isn't made of layers as the families here are."
        )
    if args.resize_embeddings and len(tokenizer) > model.config.vocab_size:
        model.resize_token_embeddings(len(tokenizer))
    return model


def get_tokenizer(args, documents):
    """`--tokenizer`, a new one, or that of the model; a new one is kept in the run folder."""
    folder = args.output / "tokenizer"
    if args.train_tokenizer and not folder.exists():
        tokenizer = train_tokenizer(training_texts(documents, args.column, args.held_out), args.train_tokenizer)
        if len(tokenizer) > args.train_tokenizer:
            raise RunError(f"--train-tokenizer {args.train_tokenizer} is too small: {len(tokenizer)} tokens at least.")
        with whole_folder(folder) as partial:
            tokenizer.save_pretrained(partial)
    source = folder if args.train_tokenizer else args.tokenizer or args.model or args.config
    try:
        return load_tokenizer(str(source))
    except InputError as error:
        choice = "--tokenizer or --train-tokenizer" if args.config else "--tokenizer"
        raise RunError(f"{str(error).rstrip('.')}; give {choice}.") from None


def report_fewer_tokens(args, tokenizer):
    if len(tokenizer) < args.train_tokenizer:
        print(f"the data give a tokenizer of {len(tokenizer)} tokens, not {args.train_tokenizer}", file=sys.stderr)


def get_data(args, documents, tokenizer, vocab_size: int):
    """Sequences to train on and held-out ones, and what is known about their amount."""
    needed = args.steps * args.batch_size * args.accumulate * PartialState().num_processes
    if args.streaming:
        options = {"seq_len": args.seq_len, "fraction": args.held_out, "vocab_size": vocab_size}
        shuffled = documents.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer)
        train = StreamedSequences(shuffled, tokenizer, args.column, held_out=False, length=needed, **options)
        held_out = StreamedSequences(documents, tokenizer, args.column, held_out=True, **options)
        held_out = list(itertools.islice(held_out.once(), args.eval_sequences))
        if not held_out:
            raise RunError("the stream's held-out part is less than one sequence; change --held-out or --seq-len.")
        return train, held_out, {"held_out_sequences": len(held_out)}
    tokens = tokenized(documents, tokenizer, args.column, args.num_proc)
    check_tokens(tokens, vocab_size, tokenizer, "the data")
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
    """A resumed run needs the documents it started with; their lengths and hashes stand for them."""
    if not isinstance(train, ShuffledSequences):
        return
    path, packed = folder / "data.json", train.sequences
    checksum = {"documents": len(packed.lengths), "tokens": packed.num_tokens}
    checksum["lengths"] = int((packed.lengths * range(1, len(packed.lengths) + 1) % 1_000_003).sum())
    checksum["hashes"] = int(np.bitwise_xor.reduce(packed.hashes))
    if not is_new and path.exists() and reading.read_json(path) != checksum:
        raise RunError(f"the data have changed since {folder} was begun; choose another --output.")
    write_json(path, checksum)


def prepare(args, is_new: bool):
    """Tokenizer, model and data. In each process, the main one first."""
    with main_process_first():
        # what is wrong with it is said before what it leads to
        config = read_config(args.model or args.config, args.set, may_be_type=args.model is None)
        if args.model:
            check_trainable(config, args.model)
        documents = load_documents(
            args.data, args.column, args.data_config, args.data_split, args.sample_by, args.streaming
        )
        tokenizer = get_tokenizer(args, documents)
        transformers.set_seed(args.seed)
        model = load_model(args, tokenizer) if args.model else new_model(args, tokenizer)
        train, held_out, amount = get_data(args, documents, tokenizer, model.config.vocab_size)
        check_same_data(args.output, train, is_new)
    if PartialState().is_main_process:
        report_fewer_tokens(args, tokenizer)
        if mixes_documents(model.config):
            print("the model has recurrent layers, whose state goes on from one document to the next", file=sys.stderr)
    return tokenizer, model, train, held_out, amount


def depth_callbacks(args, model, sequence: dict[str, torch.Tensor]) -> list[DepthCallback]:
    """[`DepthCallback`], with a held-out sequence as its probe, if it is asked for and knows such models."""
    if not args.depth_every:
        return []
    try:
        check_can_be_watched(model)
    except ValueError as error:
        if PartialState().is_main_process:
            print(f"no {DEPTH_FILE}: {error}", file=sys.stderr)
        return []
    probe = {name: sequence[name][None] for name in ("input_ids", "position_ids")}
    return [DepthCallback(args.output, probe, args.depth_every)]


def pretrain(args) -> dict:
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
    with discarded_if_refused(args.output):
        tokenizer, model, train, held_out, amount = prepare(args, is_new=checkpoint is None)
        try:
            optimizer = new_optimizer(model, args.optimizer, args.learning_rate, args.weight_decay, args.depth_lr_scale)
        except ValueError as error:
            raise RunError(str(error)) from None
    tokens_per_step = args.batch_size * args.accumulate * args.seq_len * state.num_processes
    callbacks = [RunLog(args.output, tokens_per_step), *depth_callbacks(args, model, held_out[0])]
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}  # before they are sharded
    training = training_arguments(args)
    training.eval_on_start = checkpoint is None and args.model is not None
    trainer = RunTrainer(
        model,
        training,
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
    depth_weights = mean_depth_weights(trainer)
    metrics = read_lines(args.output / METRICS_FILE)
    held_out_losses = losses(metrics, "held_out_loss")
    results = {
        "output": str(args.output),
        "mode": getattr(model.config, "attn_res_mode", "donor"),
        "held_out_loss": held_out_losses[args.steps],
        "held_out_loss_before": held_out_losses.get(0),
        "steps": args.steps,
        "tokens": args.steps * tokens_per_step,
        **amount,
        "tokens_per_second": tokens_per_second(metrics),
        "peak_memory_bytes": peak_memory(),
        "parameters": sum(parameters.values()),
        "depth_parameters": sum(number for name, number in parameters.items() if "depth_attention" in name),
        "seconds": time.perf_counter() - started,
        "arguments": json.loads(json.dumps(run_arguments(args), default=str)),
        "versions": versions(),
    }
    if trainer.is_world_process_zero():
        title = args.output.resolve().name
        plot_losses({results["mode"]: metrics}, args.output / "loss.png", f"{title}: loss")
        beside_model = model_results("pretrain", args, results, model.config)
        write_training_card(args.output / "model", args, beside_model, title, depth_weights, model.config)
        write_json(results_file, results)
    return results


def compare_runs(args, argv: list[str]) -> dict:
    """All variants, with one tokenizer; see [`compare`]."""
    open_comparison(args)
    shared = []
    if args.train_tokenizer:
        documents = load_documents(
            args.data, args.column, args.data_config, args.data_split, args.sample_by, args.streaming
        )
        tokenizer = get_tokenizer(args, documents)
        report_fewer_tokens(args, tokenizer)
        shared = ["--train-tokenizer", "0", "--tokenizer", str(args.output / "tokenizer")]
        shared += ["--set", f"vocab_size={len(tokenizer)}"] if args.config else []
    columns = {"parameters": "parameters", "of depth attention": "depth_parameters"}
    return compare(Path(__file__), args, argv, "--mode", shared, columns)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="pretrain.py",
        usage="%(prog)s (--config MODEL | --model CHECKPOINT) --output FOLDER [options]; --help lists them",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    add = parser.add_argument_group("model").add_argument
    add("--config", help="train from scratch: model type (llama, attnres_qwen3, ...), JSON file, checkpoint or Hub id")
    add("--set", nargs="*", action=Lists, default=[], metavar="FIELD=VALUE", help="fields of --config to replace")
    add("--model", help="train on: AttnRes or donor checkpoint (folder or Hub id); a donor is converted")
    add("--mode", choices=MODES, help="residual stream or kind of depth attention; default: the model's, or block")
    add("--block-size", type=positive, help="decoder layers per block, in modes that have blocks; default: an "
        "eighth of the layers")  # fmt: skip
    add("--tokenizer", help="folder or Hub id; default: that of --model or --config")
    add("--resize-embeddings", action="store_true", help="enlarge the embeddings of --model to all tokens of the "
        "tokenizer")  # fmt: skip
    add(
        "--train-tokenizer",
        type=number(int, 0, 10**7),
        default=0,
        metavar="N",
        help="train one of N tokens on the training data",
    )
    add = parser.add_argument_group("data").add_argument
    add("--data", nargs="+", default=["stdlib"], help="stdlib (Python's own source, offline), files or folders of "
        "text, JSON lines or Parquet, or a Hub id; default: stdlib")  # fmt: skip
    add("--data-config", help="configuration of the data set on the Hub")
    add("--data-split", default="train", help="split, also train[:1%%] and the like; default: train")
    add("--column", default="text", help="column that holds the text; default: text")
    add("--sample-by", choices=("document", "paragraph", "line"), help="what a document is in text files; default: "
        "document (a file) if there are several files, else paragraph")  # fmt: skip
    add("--streaming", action="store_true", help="read the data as training goes on, without preparing all of it")
    add("--shuffle-buffer", type=positive, default=1000, help="documents shuffled at a time with "
        "--streaming; default: 1000")  # fmt: skip
    add("--held-out", type=share, default=0.05, help="share of the documents, chosen by hash, at least one sequence; "
        "default: 0.05")  # fmt: skip
    add("--eval-sequences", type=positive, default=64, help="held-out sequences to evaluate at most; default: 64")
    add("--seq-len", type=number(int, 2), default=256, help="tokens per sequence; default: 256")
    add("--num-proc", type=number(int, 1, 1024), help="processes that tokenise")
    add("--num-workers", type=workers, default=0, help="processes that read batches; default: 0")
    add_training_options(parser, "modes", "donor,block,full,denseformer")
    args = parser.parse_args(argv)
    args.command = given_options(parser, args)
    check_arguments(parser, args)
    if args.compare or args.sweep:
        check_variants(parser, args, argv, "--mode", parse_arguments)
    return args


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace):
    """Refuses what can't work, and fills in what depends on other options."""
    if (args.config is None) == (args.model is None):
        parser.error("give either --config, to train from scratch, or --model, to train on")
    if args.model is not None and (args.set or args.train_tokenizer):
        parser.error("--set and --train-tokenizer go with --config; a checkpoint has a configuration and a tokenizer")
    if args.config is not None and args.resize_embeddings:
        parser.error("--resize-embeddings goes with --model; with --config, --set vocab_size decides")
    if args.streaming and args.num_workers:
        parser.error("--streaming reads in the main process; leave out --num-workers")
    args.set_options, fields = args.set, {}
    for option in args.set:
        name, equals, value = option.partition("=")
        if not equals:
            parser.error(f"--set {option}: give FIELD=VALUE")
        try:
            json.loads(value)
        except ValueError:
            fields[name] = value
            continue
        except RecursionError:
            pass  # the next says it
        try:
            fields[name] = reading.parse_json(value, f"--set {name}")
        except InputError as error:
            parser.error(str(error))
    args.set = fields
    if args.train_tokenizer and fields.get("vocab_size", args.train_tokenizer) != args.train_tokenizer:
        parser.error("--train-tokenizer decides on the vocabulary's size; leave out --set vocab_size or it")
    check_training_options(parser, args, MODES)
    set_intervals(args)


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(argv)
    state = start_process()
    with one_line_errors("pretrain", args.output), enough_memory():
        results = compare_runs(args, argv) if args.compare or args.sweep else pretrain(args)
    if state.is_main_process:
        print(json.dumps({name: value for name, value in results.items() if name not in ("arguments", "versions")}))


if __name__ == "__main__":
    main()
