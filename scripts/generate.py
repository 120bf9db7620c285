# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/generate.py outputs/run/model --prompt "import numpy"

Chats with a model that has a chat template, completes text with one that has none, and shows the text as it grows.
MODEL is a folder or Hub id: an AttnRes model, a donor, or a PEFT adapter, which finds its base by itself. Without
--prompt, each line from the terminal is a prompt; in a chat the model remembers those before. An empty line or the end
of input ends the program.
"""

import json

from attnres_recipes.options import GenerateOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> GenerateOptions:
    return parse(GenerateOptions, "generate", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("generate")
    from attnres_recipes.generation import generate  # takes seconds
    from attnres_recipes.process import command

    with command("generate"):
        answers = generate(options)
    if options.json:
        print(json.dumps({"model": options.model, "seed": options.seed, "answers": answers}))


if __name__ == "__main__":
    main()
