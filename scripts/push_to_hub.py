# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/push_to_hub.py outputs/run/model my-name/my-model --dry-run

Publishes a model folder as a repository of the Hub: weights, configuration, code files, tokenizer, card, results.
A card is made from the folder's files if it has none. One that this project's scripts wrote gets the repository's name.

Before anything is uploaded, the files that would go up are loaded in a process of their own as a stranger would load
them, without this project, and generate a few tokens. That process has no token and, where the system can do that, no
network and no files but these. It runs code that isn't this project's only with --trust-remote-code.

All files appear in one commit or not at all; an upload that ended early goes on where it stopped when the command is
repeated. Files that are on the Hub already are not sent again, and weights that the folder no longer has are removed
there.

The token is that of `hf auth login` or of the variable HF_TOKEN. The last line printed is JSON.
"""

import json
import signal
import sys
import threading

from attnres_convert import InputError
from attnres_convert.reading import one_line
from attnres_recipes.leaks import printable
from attnres_recipes.options import PushOptions
from attnres_recipes.parser import parse
from huggingface_hub.utils import disable_progress_bars, logging


def parse_arguments(argv: list[str] | None = None) -> PushOptions:
    return parse(PushOptions, "push_to_hub", __doc__, argv, printable)


def main(argv: list[str] | None = None):
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # temporary files are removed then too
    options = parse_arguments(argv)
    from attnres_recipes.publishing import GO_ON, push  # takes seconds

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        result = push(options)
    except InputError as error:
        raise SystemExit(one_line(f"push_to_hub: {printable(error)}")) from None
    except KeyboardInterrupt:
        raise SystemExit(f"push_to_hub: interrupted; {GO_ON}") from None
    print(json.dumps(result))


if __name__ == "__main__":
    main()
