# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/scaling_law.py --sizes 32x6,48x8,64x10,80x12 --data site-packages --data-split 'train[:25%]' \
    --output outputs/scaling_law

Trains models of several sizes from scratch, with a plain sum over depth and with Attention Residuals, and fits how the
held-out loss falls with the compute of training: L = A C^-alpha, as in the paper's scaling laws (arXiv 2603.15031).

Each size is a comparison in a folder of its own, with `--seeds` and with the best of `--learning-rates` for each
variant. The same command goes on with what isn't done; with other `--sizes` it adds them, and all that are done count.
It writes `scaling_law.json`, `.md` and `.png`: the laws, how many times the compute the first variant needs for a loss
of the others, and what can't be concluded. The last line of the output is JSON.
"""

import json

from attnres_recipes.options import ScalingOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> ScalingOptions:
    return parse(ScalingOptions, "scaling_law", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("train")
    from attnres_recipes import pretrain  # takes seconds, as all that follow
    from attnres_recipes.process import enough_memory, start_process
    from attnres_recipes.run import one_line_errors, unlock
    from attnres_recipes.scaling import Ladder, report

    start_process()
    with one_line_errors("scaling_law", options.output), enough_memory():
        try:
            ladder = Ladder(options)
            print(ladder.plan(), flush=True)
            for comparison in ladder.unfinished():
                pretrain(comparison)
            results = ladder.report()
        finally:
            unlock(options.output)
    print(report(results))
    print(json.dumps({name: results[name] for name in ("output", "fits", "multipliers", "limits")}))


if __name__ == "__main__":
    main()
