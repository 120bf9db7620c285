# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/finetune.py --model outputs/pretrain/model --method lora --data stdlib --output outputs/finetune

Fine-tunes a model with Attention Residuals on conversations, or on prompts and completions, with the loss on the
answers alone. A donor's checkpoint is converted on the way.

`--method lora`, `dora` and `qlora` train adapters and, in full, depth attention; `depth` trains depth attention alone,
`full` everything. `model/` in the run folder then holds the adapter or the model.

The same command again takes up an interrupted run where its last checkpoint left it. `--compare lora,dora,full,depth`
trains with several methods on the same batches and writes one table. The last line of the output is JSON.
"""

from attnres_recipes.options import FinetuneOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> FinetuneOptions:
    return parse(FinetuneOptions, "finetune", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("train")
    from attnres_recipes.finetuning import Finetuning  # takes seconds

    Finetuning.command(options)


if __name__ == "__main__":
    main()
