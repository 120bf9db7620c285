# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Pretraining, from scratch or from a checkpoint."""

import itertools
import sys

import transformers
from accelerate import PartialState
from attnres_convert import InputError

from .configs import check_context, check_trainable, read_config
from .data import (
    ShuffledSequences,
    StreamedSequences,
    check_tokens,
    collate,
    load_documents,
    split_and_pack,
    tokenized,
    training_texts,
)
from .options import PretrainOptions
from .packing import mixes_documents
from .start import get_tokenizer, new_model, new_tokenizer
from .training import Prepared, Run, spread_out


class Pretraining(Run):
    name, what, label = "pretrain", "loss", "mode"
    columns = {"parameters": "parameters", "of depth attention": "depth_parameters"}

    def prepare(self) -> Prepared:
        given = self.options
        # what is wrong with it is said before what it leads to
        config = read_config(given.model or given.config, given.set, may_be_type=given.model is None)
        if given.model:
            check_trainable(config, given.model)
        documents = self.documents()
        tokenizer = self.tokenizer(documents)
        transformers.set_seed(given.seed)
        check_context(config, given.seq_len)
        if given.model:
            model = self.load_model(tokenizer)
        else:
            sized = given.train_tokenizer > 0
            model = new_model(config, given.mode, given.block_size, tokenizer, sized, given.init)
        train, held_out, amount = self.data(documents, tokenizer, model.config.vocab_size)
        self.report_fewer_tokens(tokenizer)  # not before what can be refused
        if PartialState().is_main_process and mixes_documents(model.config):
            print("the model has recurrent layers, whose state goes on from one document to the next", file=sys.stderr)
        return Prepared(tokenizer, model, train, held_out, collate, given.seq_len, amount)

    def documents(self):
        given = self.options
        return load_documents(
            given.data, given.column, given.data_config, given.data_split, given.sample_by, given.streaming
        )

    def tokenizer(self, documents):
        """`--tokenizer`, a new one, which is kept in the run folder, or that of the model."""
        given = self.options
        if not given.train_tokenizer:
            options = "--tokenizer or --train-tokenizer" if given.config else "--tokenizer"
            return get_tokenizer(given.tokenizer or given.model or given.config, options)
        texts = training_texts(documents, given.column, given.held_out)
        return new_tokenizer(texts, given.train_tokenizer, self.folder / "tokenizer")

    def report_fewer_tokens(self, tokenizer):
        wanted = self.options.train_tokenizer
        if len(tokenizer) < wanted and PartialState().is_main_process:
            print(f"the data give a tokenizer of {len(tokenizer)} tokens, not {wanted}", file=sys.stderr)

    def data(self, documents, tokenizer, vocab_size: int):
        """Sequences to train on and held-out ones, and what is known about their amount."""
        given = self.options
        needed = given.steps * self.sequences_per_step
        if given.streaming:
            options = {"seq_len": given.seq_len, "fraction": given.held_out, "vocab_size": vocab_size}
            shuffled = documents.shuffle(seed=given.seed, buffer_size=given.shuffle_buffer)
            train = StreamedSequences(shuffled, tokenizer, given.column, held_out=False, length=needed, **options)
            held_out = StreamedSequences(documents, tokenizer, given.column, held_out=True, **options)
            held_out = list(itertools.islice(held_out.once(), given.eval_sequences))
            if not held_out:
                raise InputError(
                    "the stream's held-out part is less than one sequence; change --held-out or --seq-len."
                )
            return train, held_out, {"held_out_sequences": len(held_out)}
        tokens = tokenized(documents, tokenizer, given.column, given.num_proc)
        check_tokens(tokens, vocab_size, tokenizer, "the data")
        train, test = split_and_pack(tokens, given.seq_len, given.held_out)
        held_out = spread_out(test, given.eval_sequences)
        amount = {
            "documents": len(tokens),
            "training_tokens": train.num_tokens,
            "epochs": needed / len(train),
            "held_out_sequences": len(held_out),
        }
        if amount["epochs"] > 1 and PartialState().is_main_process:
            seen = f"{train.num_tokens:,} tokens, which are seen {amount['epochs']:.1f} times"
            print(f"the data have {seen}", file=sys.stderr)
        return ShuffledSequences(train, needed, given.seed), held_out, amount

    def shared(self) -> dict:
        """One tokenizer."""
        given = self.options
        if not given.train_tokenizer:
            return {}
        tokenizer = self.tokenizer(self.documents())
        self.report_fewer_tokens(tokenizer)
        shared = {"train_tokenizer": 0, "tokenizer": str(self.folder / "tokenizer")}
        return {**shared, "set": {**given.set, "vocab_size": len(tokenizer)}} if given.config else shared


def pretrain(options: PretrainOptions) -> dict:
    """Pretrains a model, or goes on with it, and returns the numbers that are also in `results.json`.

    Raises:
        InputError: bad input, or a loss that isn't finite; one line says what to do.
    """
    return Pretraining.start(options)
