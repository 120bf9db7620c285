# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/plot_depth_attention.py outputs/run/donor/model outputs/run/block/model --output outputs/depth

Draws what happens over depth inside models. Of each AttnRes model: what its reads take from which source, averaged
over a text (`<model>-reads.png`, `<model>-relative.png`), and token by token for a prompt (`<model>-tokens.png`,
`<model>-weights.png`). Of all models together, donors too: how large outputs of sublayers, reads and gradients are by
depth (`dynamics.png`). With `--html` also `depth.html`: a page, without anything around it, on which one points at
tokens, reads and sources, and goes from model to model.

`0a` is the attention of layer 0, `0m` its MLP; a read has the name of the sublayer that it feeds. The numbers of each
figure are beside it as JSON. The last line printed is JSON.
"""

import json

from attnres_recipes.options import PlotOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> PlotOptions:
    return parse(PlotOptions, "plot_depth_attention", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("plot")
    from attnres_recipes.plotting import plot  # takes seconds
    from attnres_recipes.process import command

    with command("plot_depth_attention", "finished figures stay."):
        paths = plot(options)
    print(json.dumps({"output": str(options.output), "figures": [path.name for path in paths]}))


if __name__ == "__main__":
    main()
