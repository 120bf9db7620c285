# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/serve.py outputs/run/model --port 8000

Serves a model over HTTP with the API of OpenAI: transformers' own server (`transformers serve`), which alone can't load
models with Attention Residuals. MODEL is a folder or Hub id: an AttnRes model, a donor, or a PEFT adapter, which finds
its base by itself. It is loaded at the beginning, and the server has no other. Requests are answered one after the
other, or together with --continuous-batching:

  attnres-serve outputs/lora/model --continuous-batching --cb-num-blocks 256
  attnres-serve my-name/my-model --host 0.0.0.0 --dtype bfloat16 --device cuda:0

It has no users and no passwords: whoever reaches --host and --port may use the model. Ctrl-C ends it.
"""

from attnres_recipes.options import ServeOptions
from attnres_recipes.parser import need, parse


def parse_arguments(argv: list[str] | None = None) -> ServeOptions:
    return parse(ServeOptions, "serve", __doc__, argv)


def main(argv: list[str] | None = None):
    options = parse_arguments(argv)
    need("serve")
    from attnres_recipes.process import command  # takes seconds
    from attnres_recipes.serving import serve

    with command("serve"):
        serve(options)


if __name__ == "__main__":
    main()
