# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A training run: what pretraining and fine-tuning share, from the folder to the card."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import tensorboard  # noqa: F401, which torch imports later
import torch
from accelerate import PartialState
from attnres_convert import InputError, reading
from attnres_convert.writing import write_json
from transformers import TrainingArguments

from depth_attention_attnres import ALL_DEPTH_ATTENTION_FUNCTIONS

from .callback import DEPTH_FILE, DepthCallback
from .card import mean_depth_weights, model_results, write_training_card
from .checkpoints import checkpoints
from .comparison import compare, open_comparison
from .data import ShuffledSequences
from .figures import plot_losses
from .folders import METRICS_FILE, RESULTS_FILE, begin_work, end_work
from .hardware import has_bfloat16
from .log import RunLog, losses, read_lines, tokens_per_second
from .look import check_can_be_watched
from .optim import is_depth_attention, new_optimizer, uses_deepspeed
from .options import RunOptions
from .process import (
    data_processes,
    enough_memory,
    launched,
    main_process_first,
    peak_memory,
    start_process,
    versions,
)
from .run import CONVERTED_NAME, FIGURE_FILE, discarded_if_refused, one_line_errors, open_run, read_results, unlock
from .space import FEW, LARGE, check_run_space, sizes
from .start import load_model
from .tensors import check_can_be_cut, check_launch, in_parts, start_sharding
from .trainer import PipelineTrainer, RunTrainer, remove_untouched


SCHEDULES = {"cosine": "cosine_with_min_lr", "wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
NOT_PRINTED = ("arguments", "samples", "versions")  # of the results
LAST_RATE = {"cosine": "min_lr_rate", "wsd": "min_lr_ratio"}


@dataclass
class Prepared:
    """What is trained on what."""

    tokenizer: object
    model: torch.nn.Module
    train: torch.utils.data.Dataset
    held_out: torch.utils.data.Dataset
    collate: Callable
    tokens_per_sequence: float
    amount: dict  # numbers about the data for `results.json`
    steps: int | None = None  # where the options don't say it
    base: dict | None = None  # what tells the base of an adapter from others


class Run:
    """One run in the folder `options.output`, begun or taken up."""

    name: str  # of the script
    what: str  # is plotted
    label: str  # of what is plotted, in `results.json`
    columns: dict[str, str]  # of a comparison: names in `results.json` by heading
    trainer_class = RunTrainer
    sharding = None  # how the processes share a model

    def __init__(self, options: RunOptions):
        self.given, self.options, self.folder = options, options.settled(), options.output

    def prepare(self) -> Prepared:
        """Tokenizer, model and data. In each process, the main one first."""
        raise NotImplementedError

    def shared(self) -> dict:
        """What all runs of a comparison share, made once: options by name."""
        raise NotImplementedError

    def finish(self, trainer: RunTrainer, prepared: Prepared) -> dict:
        """What else is done with a trained model in the main process, and numbers about it."""
        return {}

    def load_model(self, tokenizer, **options):
        given = self.options
        model = load_model(given.model, given.mode, given.block_size, self.folder / CONVERTED_NAME, **options)
        if given.resize_embeddings and len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer))
        return model

    def train(self) -> dict:
        """Trains, or goes on training, and returns the numbers that are also in `results.json`.

        Raises:
            InputError: bad input, or a loss that isn't finite; one line says what to do.
        """
        started, state = time.perf_counter(), PartialState()
        arguments = self.options.arguments
        with main_process_first():
            checkpoint = open_run(self.folder, arguments, state.is_main_process)
        if (self.folder / RESULTS_FILE).exists():
            results = read_results(self.folder / RESULTS_FILE)
            if state.is_main_process:
                self.forget_checkpoints()
            return results
        with discarded_if_refused(self.folder):
            with main_process_first():
                check_implementation(self.options.attn_res_implementation)
                sharding = launched()["sharding"]
                if self.options.pipeline_stages and sharding:
                    raise InputError(f"--pipeline-stages goes with pipeline.yaml, and not with {sharding}.")
                check_launch(self.options.expert_parallel)
            self.sharding = start_sharding(self.options.expert_parallel)
            with main_process_first():
                prepared = self.prepare()
                choose_implementation(prepared.model, self.options.attn_res_implementation)
                check_same_data(self.folder, prepared.train, is_new=checkpoint is None)
                if self.sharding is not None:
                    check_can_be_cut(prepared.model, self.sharding)
            options = self.options = self.options.settled(prepared.steps)
            needed = sizes(prepared.model, self.new_optimizer(prepared), getattr(options, "merge", False))
            if self.given.save_steps is None and needed.checkpoint >= LARGE:
                options.save_steps = arguments["save_steps"] = options.save_steps_of(FEW)
                if state.is_main_process:
                    what = f"a checkpoint has {needed.checkpoint / 1e9:.1f} GB and is written"
                    print(f"{what} every {options.save_steps} steps; --save-steps changes that", file=sys.stderr)
            with main_process_first():
                check_run_space(self.folder, options, needed, checkpoint)
            trained = {name: p.numel() for name, p in prepared.model.named_parameters() if p.requires_grad}
            self.distribute(prepared)
            optimizer = self.new_optimizer(prepared)
        tokens_per_step = round(self.sequences_per_step * prepared.tokens_per_sequence)
        trainer = self.new_trainer(prepared, optimizer, tokens_per_step, is_new=checkpoint is None)
        if checkpoint is not None and state.is_main_process:
            print(f"going on from {checkpoint}", file=sys.stderr)
        if options.bf16 and state.is_main_process and state.device.type == "cpu" and has_bfloat16() is False:
            print("this processor has no instructions for bfloat16: without --bf16 it is faster", file=sys.stderr)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        trainer.accelerator.wait_for_everyone()  # the main process writes the log
        if options.steps not in losses(read_lines(self.folder / METRICS_FILE), "held_out_loss"):
            trainer.evaluate()
        trainer.save_final_model(self.folder / "model")
        depth_weights = mean_depth_weights(trainer)
        more = self.finish(trainer, prepared) if state.is_main_process else {}
        trainer.accelerator.wait_for_everyone()
        metrics = read_lines(self.folder / METRICS_FILE)
        held_out_losses = losses(metrics, "held_out_loss")
        results = {
            "output": str(self.folder),
            "mode": getattr(prepared.model.config, "attn_res_mode", "donor"),
            "held_out_loss": held_out_losses[options.steps],
            "held_out_loss_before": held_out_losses.get(0),
            "steps": options.steps,
            "tokens": options.steps * tokens_per_step,
            **prepared.amount,
            "tokens_per_second": tokens_per_second(metrics),
            "peak_memory_bytes": peak_memory(),
            next(iter(self.columns.values())): sum(trained.values()),
            "depth_parameters": sum(number for name, number in trained.items() if is_depth_attention(name)),
            **more,
            "seconds": time.perf_counter() - started,
            "arguments": json.loads(json.dumps(arguments, default=str)),
            "versions": versions(),
        }
        if state.is_main_process:
            self.write_results(results, prepared, metrics, depth_weights)
            self.forget_checkpoints()
        return results

    def forget_checkpoints(self):
        """Of a run that has ended, if none are to be kept."""
        if self.options.keep_checkpoints == 0 and checkpoints(self.folder):
            begin_work(self.folder)
            remove_untouched(checkpoints(self.folder))
            end_work(self.folder)

    @property
    def sequences_per_step(self) -> int:
        """In all processes, which share one batch in a pipeline."""
        options = self.options
        replicas = 1 if options.pipeline_stages else data_processes()
        return options.batch_size * options.accumulate * replicas

    def new_optimizer(self, prepared: Prepared) -> torch.optim.Optimizer:
        options = self.options
        return new_optimizer(
            prepared.model, options.optimizer, options.learning_rate, options.weight_decay, options.depth_lr_scale
        )

    def distribute(self, prepared: Prepared):
        """Leaves in the model what this process has of it, in a pipeline or of tensors that are cut up."""
        options = self.options
        if self.sharding is not None:
            prepared.model = in_parts(prepared.model, self.sharding)
        if not options.pipeline_stages:
            return
        from .pipelines import Pipeline, check_pipeline  # which take a second

        shape = options.accumulate, options.pipeline_stages, options.pipeline_schedule
        with main_process_first():
            check_pipeline(prepared.model, PartialState().num_processes, *shape)
        self.trainer_class = partial(PipelineTrainer, pipeline=Pipeline(prepared.model, *shape))

    def new_trainer(self, prepared: Prepared, optimizer, tokens_per_step: int, is_new: bool) -> RunTrainer:
        options, probe = self.options, prepared.held_out[0]
        training = training_arguments(options)
        training.eval_on_start = is_new and options.model is not None
        trainer = self.trainer_class(
            prepared.model,
            training,
            data_collator=prepared.collate,
            train_dataset=prepared.train,
            eval_dataset=prepared.held_out,
            processing_class=prepared.tokenizer,
            optimizers=(optimizer, None),
            callbacks=[RunLog(self.folder, tokens_per_step), *self.depth_callbacks(prepared.model, probe)],
            keep_checkpoints=max(1, options.keep_checkpoints),
        )
        trainer.base = prepared.base
        return trainer

    def depth_callbacks(self, model, sequence: dict[str, torch.Tensor]) -> list[DepthCallback]:
        """[`DepthCallback`], with a held-out sequence as its probe, if it is asked for and knows such models."""
        if not self.options.depth_every:
            return []
        try:
            check_can_be_watched(model)
        except ValueError as error:
            if PartialState().is_main_process:
                print(f"no {DEPTH_FILE}: {error}", file=sys.stderr)
            return []
        probe = {name: sequence[name][None] for name in ("input_ids", "position_ids")}
        return [DepthCallback(self.folder, probe, self.options.depth_every)]

    def write_results(self, results: dict, prepared: Prepared, metrics: list[dict], depth_weights):
        title, config = self.folder.resolve().name, prepared.model.config
        plot_losses({results[self.label]: metrics}, self.folder / FIGURE_FILE, f"{title}: {self.what}")
        base = prepared.base and prepared.base["base"]
        beside_model = model_results(self.name, self.given, results, config, base)
        names = {"model": title}
        if results.get("merged_relative_error") is not None:
            names["merged"] = f"{title}-merged"
        for folder, name in names.items():
            write_training_card(self.folder / folder, self.given, beside_model, name, depth_weights, config)
        write_json(self.folder / RESULTS_FILE, results)

    @classmethod
    def start(cls, options: RunOptions) -> dict:
        """One run, or those of a comparison."""
        start_process()
        try:
            if not (options.compare or options.sweep or options.tune):
                return cls(options).train()
            with discarded_if_refused(options.output):
                check_implementation(options.attn_res_implementation)
                open_comparison(options)
                return compare(cls.name, options, cls(options).shared(), cls.columns)
        finally:
            unlock(options.output)

    @classmethod
    def command(cls, options: RunOptions):
        """Runs, and prints a last line of JSON; one line says what is wrong with the input."""
        state = start_process()
        with one_line_errors(cls.name, options.output), enough_memory():
            results = cls.start(options)
        if state.is_main_process:
            print(json.dumps({name: value for name, value in results.items() if name not in NOT_PRINTED}))


def check_implementation(name: str | None):
    """
    Raises:
        InputError: nothing computes reads in the way `name`.
    """
    try:
        ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(name or "eager")
    except ValueError as error:
        raise InputError(f"--attn-res-implementation: {error}") from None


def choose_implementation(model: torch.nn.Module, name: str | None):
    """Has an AttnRes model, which may be in an adapter, compute its reads in the way `name`; a donor has none."""
    own = next((module for module in model.modules() if hasattr(module, "set_attn_res_implementation")), None)
    if name is not None and own is not None:
        own.set_attn_res_implementation(name)


def check_same_data(folder: Path, train, is_new: bool):
    """A resumed run needs the documents it started with; their lengths and hashes stand for them."""
    if not isinstance(train, ShuffledSequences):
        return
    path, packed = folder / "data.json", train.sequences
    checksum = {"documents": len(packed.lengths), "tokens": packed.num_tokens}
    checksum["lengths"] = int((packed.lengths * range(1, len(packed.lengths) + 1) % 1_000_003).sum())
    checksum["hashes"] = int(np.bitwise_xor.reduce(packed.hashes))
    if not is_new and path.exists() and reading.read_json(path) != checksum:
        raise InputError(f"the data have changed since {folder} was begun; choose another --output.")
    write_json(path, checksum)


def spread_out(sequences, number: int) -> torch.utils.data.Subset:
    """At most `number` sequences from all over them."""
    spread = np.linspace(0, len(sequences) - 1, min(len(sequences), number)).round().astype(int)
    return torch.utils.data.Subset(sequences, spread.tolist())


def training_arguments(options: RunOptions) -> TrainingArguments:
    last_rate = LAST_RATE.get(options.schedule)
    schedule_options = {last_rate: options.min_lr_ratio} if last_rate else {}
    if options.schedule == "wsd":
        after_warmup = options.steps - 1 - options.warmup  # the schedule's length is one less, see RunTrainer
        schedule_options["num_decay_steps"] = max(1, min(round(options.decay * options.steps), after_warmup))
    is_cpu = not torch.accelerator.is_available()
    if options.bf16 and is_cpu and uses_deepspeed():
        raise InputError("DeepSpeed computes in bfloat16 on GPUs alone; leave out --bf16, or use FSDP2 or DDP.")
    accumulate = 1 if options.pipeline_stages else options.accumulate  # a pipeline takes all of a step at once
    checkpointing = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return TrainingArguments(
        output_dir=str(options.output),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch_size * options.accumulate // accumulate,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=accumulate,
        average_tokens_across_devices=not options.pipeline_stages,
        learning_rate=options.learning_rate,
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type=SCHEDULES[options.schedule],
        lr_scheduler_kwargs=schedule_options,
        warmup_steps=options.warmup,
        use_cpu=is_cpu and not uses_deepspeed(),
        ddp_backend="gloo" if is_cpu and uses_deepspeed() else None,
        ddp_find_unused_parameters=False,
        bf16=options.bf16,
        torch_compile=options.compile,
        **{f"{checkpointing}_checkpointing": options.gradient_checkpointing},
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps",
        eval_steps=options.eval_steps,
        prediction_loss_only=True,
        label_names=["labels"],
        save_strategy="steps",
        save_steps=options.save_steps,
        remove_unused_columns=False,
        train_sampling_strategy="sequential",
        dataloader_num_workers=options.num_workers,
        # each process reads a stream by itself: one that reads for all would share out what others are to have too
        accelerator_config={"dispatch_batches": False} if data_processes() < PartialState().num_processes else None,
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
