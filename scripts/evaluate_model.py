# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/evaluate_model.py outputs/run/donor/model outputs/run/block/model --output outputs/evaluation

Compares checkpoints: AttnRes models, donors, and folders of PEFT adapters. On text (`--data`): loss, perplexity and
bits per byte. On questions with choices (`--choices`): accuracy by length-normalised likelihood. On tasks of
EleutherAI's harness (`--lm-eval`): what they measure.

Each token of a document is counted once, predicted from at least --seq-len minus --stride tokens before it, or all
there are. The first token is predicted from the tokenizer's begin of text or, if it has none, its end of text; without
either, it counts as uniform over the vocabulary. Loss and perplexity are per token: models with different tokenizers
compare in bits per byte only.

Intervals hold 95 % of bootstrap resamples of the documents or questions, the same ones for all models, so that those of
differences are much narrower than those of values. They don't cover the randomness of training. `evaluation.json` and
`evaluation.md` appear in --output at the end; the last line printed is JSON. If a checkpoint fails, the others are
compared, and the script ends with an error.
"""

import json

from attnres_recipes.options import EvaluateOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> EvaluateOptions:
    return parse(EvaluateOptions, "evaluate_model", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("evaluate")
    from attnres_recipes.evaluation import evaluate, notes, report_table  # takes seconds
    from attnres_recipes.process import command

    with command("evaluate_model", "nothing was written."):
        evaluation = evaluate(options)
    results, failures = evaluation["checkpoints"], evaluation["failures"]
    print(report_table(results))
    print("\n".join(notes(evaluation)))
    values = {name: {label: entry["value"] for label, entry in own["metrics"].items()} for name, own in results.items()}
    print(json.dumps({"output": str(options.output), "checkpoints": values, "failures": failures}))
    if failures:
        raise SystemExit(f"evaluate_model: {'; '.join(failures.values())}")


if __name__ == "__main__":
    main()
