# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Fine-tuning on conversations, or prompts and completions, with adapters, in full, or of depth attention alone."""

import functools
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from accelerate import PartialState
from attnres_convert import InputError, reading
from attnres_convert.writing import write_json

from .adapters import (
    BASE_FILE,
    DEPTH_ATTENTION,
    describe_base,
    load_adapter,
    new_adapter,
    prepare_quantized,
    quantization_config,
    take_over_quantized,
    untie_adapted,
)
from .configs import check_context, check_trainable, read_config
from .data import ShuffledSequences, check_tokens, data_name
from .examples import (
    IGNORED,
    collate_padded,
    encoded_examples,
    load_examples,
    set_chat_template,
    split_and_pack_examples,
    uses_chat,
    without_problems,
)
from .folders import whole_folder
from .look import decoder
from .optim import is_depth_attention
from .options import LORA_RANK, FinetuneOptions
from .process import data_processes
from .run import CONVERTED_NAME
from .start import get_tokenizer, starting_point
from .trainer import RunTrainer
from .training import Prepared, Run, spread_out


SAMPLE_TOKENS = 128  # of an answer at most


class SupervisedTrainer(RunTrainer):
    """A Trainer whose held-out loss is the mean over all answers' tokens, however they are spread over batches."""

    def compute_loss(self, model, inputs, num_items_in_batch=None, **kwargs):
        if not model.training:
            # a batch counts for its sequences, so each gets the same share of all tokens
            num_items_in_batch = self.labels_per_sequence * len(inputs["input_ids"]) * data_processes()
        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)

    @functools.cached_property
    def labels_per_sequence(self) -> float:
        # torch.compile takes a number of numpy's for an array
        return float(np.mean([(item["labels"] != -100).sum().item() for item in self.eval_dataset]))

    def complete(self, folder: Path):
        if self.base is not None:
            write_json(folder / BASE_FILE, self.base)


class Finetuning(Run):
    name, what, label = "finetune", "loss on answers", "method"
    columns = {"trained parameters": "trained_parameters", "of depth attention": "depth_parameters"}
    trainer_class = SupervisedTrainer

    def prepare(self) -> Prepared:
        given = self.options
        config = read_config(given.model)
        check_context(config, given.seq_len)
        self.check_method(config)
        tokenizer = get_tokenizer(given.tokenizer or given.model, "--tokenizer")
        vocab_size = len(tokenizer) if given.resize_embeddings else config.vocab_size
        train, held_out, amount, steps = self.data(tokenizer, vocab_size)
        transformers.set_seed(given.seed)
        model, base = self.model(tokenizer, config)
        usable = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None]
        pad_token_id = next(token for token in usable if token < model.config.vocab_size)  # it may have no embedding
        collate = functools.partial(collate_padded, pad_token_id=pad_token_id)
        tokens = train.sequences.num_tokens / len(train.sequences)
        return Prepared(tokenizer, model, train, held_out, collate, tokens, amount, steps, base)

    def check_method(self, config):
        """Refuses a checkpoint that the method can't train, before anything is read or converted."""
        given = self.options
        if given.samples and PartialState().num_processes > 1:
            raise InputError("--samples needs a run of one process; leave it out, and use attnres-generate.")
        quantized = (given.quantization if given.method == "qlora" else "") if given.makes_adapter else None
        check_trainable(config, given.model, quantized, given.merge)

    def data(self, tokenizer, vocab_size: int):
        """Sequences to train on and held-out ones, what is known about their amount, and the number of steps."""
        given, is_main = self.options, PartialState().is_main_process
        rows = load_examples(given.data, given.column_names, given.data_config, given.data_split)
        if uses_chat(rows):
            set_chat_template(tokenizer)
        name = data_name(given.data)
        examples = encoded_examples(rows, tokenizer, name)
        check_tokens(examples, vocab_size, tokenizer, name)
        examples, counts, lines = without_problems(examples)
        train, test, amount = split_and_pack_examples(examples, given.seq_len, given.held_out, given.packing)
        for count, what in (
            (amount["truncated"], f"longer than --seq-len {given.seq_len} and lose their ends"),
            (amount["without_answer"], f"left out: no answer in their first {given.seq_len} tokens"),
        ):
            if count:
                number = amount["examples"] + amount["without_answer"]
                lines.append(f"{count} of {number} examples are {what}")
        if is_main:
            print("".join(f"{line}\n" for line in lines), end="", file=sys.stderr)
        per_step = self.sequences_per_step
        steps = given.steps or math.ceil(given.epochs * len(train) / per_step)
        held_out = spread_out(test, given.eval_sequences)  # of long and short examples
        amount |= counts | {
            "training_tokens": train.num_tokens,
            "training_sequences": len(train),
            "epochs": steps * per_step / len(train),
            "held_out_sequences": len(held_out),
        }
        return ShuffledSequences(train, steps * per_step, given.seed), held_out, amount, steps

    def base_model(self, tokenizer):
        """The model that adapters go on, or that is trained itself."""
        given = self.options
        if given.method == "qlora":
            quantized = quantization_config(given.quantization, given.bf16)
            try:
                return self.load_model(tokenizer, quantization_config=quantized)
            except ImportError as error:  # a version that transformers doesn't take
                raise InputError(reading.reason(error)) from None
        # what adapters leave as it is can be kept in the precision that it is used in
        in_bf16 = given.bf16 and given.makes_adapter
        return self.load_model(tokenizer, dtype=torch.bfloat16 if in_bf16 else torch.float32)

    def model(self, tokenizer, config) -> tuple[torch.nn.Module, dict | None]:
        """The model, in which what is trained requires gradients, and what tells the base of an adapter."""
        given, model = self.options, self.base_model(tokenizer)
        has_depth = hasattr(decoder(model), DEPTH_ATTENTION)
        if given.method == "depth":
            if not has_depth:
                raise InputError(
                    "a donor has no depth attention to train; leave out --mode donor or choose another method."
                )
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(is_depth_attention(name))
        if not given.makes_adapter:
            return model, None
        source = self.starting_point(config)
        source = str(Path(source).resolve()) if Path(source).exists() else source
        base = {"base": source, **describe_base(model)}
        if getattr(model, "hf_quantizer", None) is not None:
            model = prepare_quantized(model)
        if given.adapter:
            model = load_adapter(model, given.adapter, is_trainable=True)
            if getattr(model.peft_config["default"], "use_dora", None) != (given.method == "dora"):
                raise InputError(f"the adapter {given.adapter} wasn't made by --method {given.method}.")
            trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
            if has_depth and not any(map(is_depth_attention, trained)) and PartialState().is_main_process:
                print(f"the adapter {given.adapter} has no depth attention, which stays as it is", file=sys.stderr)
        else:
            rank = given.lora_rank or LORA_RANK
            alpha, dropout = given.lora_alpha or 2 * rank, given.lora_dropout or 0.0
            model = new_adapter(model, rank, alpha, dropout, given.method == "dora", given.target_modules)
        model.peft_config["default"].base_model_name_or_path = source
        return model, base

    def starting_point(self, config) -> str:
        given = self.options
        return starting_point(given.model, config, given.mode, given.block_size, self.folder / CONVERTED_NAME)

    @torch.no_grad()
    def save_merged(self, trainer: RunTrainer, tokenizer) -> float:
        """Writes `merged/`, which loads without PEFT, and returns by how much merging changed the logits of a held-out
        sequence, relative to the largest."""
        base = self.load_model(tokenizer)
        if self.options.method == "qlora":
            take_over_quantized(base, trainer.accelerator.unwrap_model(trainer.model))
        adapted = load_adapter(base, str(self.folder / "model")).eval()
        probe = {name: trainer.eval_dataset[0][name][None] for name in ("input_ids", "position_ids")}
        expected = adapted(**probe, use_cache=False).logits
        untie_adapted(adapted)
        model = adapted.merge_and_unload(safe_merge=True)
        logits = model(**probe, use_cache=False).logits
        with whole_folder(self.folder / "merged") as partial:
            model.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
        return ((logits - expected).abs().max() / expected.abs().max()).item()

    @torch.no_grad()
    def sample(self, trainer: RunTrainer, prepared: Prepared) -> list[dict[str, str]]:
        """The most likely answers to the first held-out prompts, and those of the data."""
        model, tokenizer = trainer.accelerator.unwrap_model(trainer.model).eval(), prepared.tokenizer
        samples, examples = [], prepared.held_out.dataset.examples
        for row in examples.select(range(min(self.options.samples, len(examples)))):
            prompt, answer = row["input_ids"][: row["first_label"]], row["labels"][row["first_label"] :]
            answer = list(itertools.takewhile(lambda label: label != IGNORED, answer))
            input_ids = torch.as_tensor(prompt, device=model.device)[None]
            output = model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=SAMPLE_TOKENS,
                do_sample=False,
                pad_token_id=prepared.collate.keywords["pad_token_id"],
            )
            texts = {"prompt": prompt, "answer": output[0, len(prompt) :], "reference": answer}
            samples.append({name: tokenizer.decode(ids, skip_special_tokens=True) for name, ids in texts.items()})
        return samples

    def finish(self, trainer: RunTrainer, prepared: Prepared) -> dict:
        is_merged = self.options.merge and self.options.makes_adapter
        return {
            "method": self.options.method,
            "samples": self.sample(trainer, prepared),
            "merged_relative_error": self.save_merged(trainer, prepared.tokenizer) if is_merged else None,
        }

    def shared(self) -> dict:
        """One tokenizer, and one base of all runs but those that have one of their own."""
        given, config = self.options, read_config(self.options.model)
        check_context(config, given.seq_len)
        self.check_method(config)
        if any(dict(options)[given.compared] == "qlora" for _, options in given.compared_runs):
            quantization_config(given.quantization, given.bf16)  # what it needs may be absent
        shared = {"tokenizer": given.tokenizer or given.model}
        if all(given.of_base & values.keys() for _, values in given.variants()):
            return shared
        return {"model": self.starting_point(config), **shared}


def finetune(options: FinetuneOptions) -> dict:
    """Fine-tunes a model, or goes on with it, and returns the numbers that are also in `results.json`.

    Raises:
        InputError: bad input, or a loss that isn't finite; one line says what to do.
    """
    return Finetuning.start(options)
