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

from attnres_recipes.options import PretrainOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> PretrainOptions:
    return parse(PretrainOptions, "pretrain", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("train")
    from attnres_recipes.pretraining import Pretraining  # takes seconds

    Pretraining.command(options)


if __name__ == "__main__":
    main()
