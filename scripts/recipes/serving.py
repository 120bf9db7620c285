# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""transformers' own server with one model, which is loaded as the other commands load it."""

import inspect
import json
import shlex
import socket
import time
from contextlib import ExitStack, suppress
from functools import partial
from unittest.mock import patch

from attnres_convert import InputError, reading
from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager, server

from .chats import first_accepted
from .examples import filled_in
from .loading import Checkpoint, load_checkpoint, open_checkpoint
from .options import ServeOptions


class OneModel(model_manager.ModelManager):
    """What transformers' server asks for models. It has one, `checkpoint`, and loads no other on request."""

    def __init__(self, checkpoint: Checkpoint, **options):
        self.checkpoint, self.served = checkpoint, None
        with reading.understood(f"{checkpoint.path} can't be served"):
            super().__init__(**options)  # which loads `force_model`

    def load_model_and_processor(self, model_id_and_revision: str, progress_callback=None, **_):
        if model_id_and_revision != self.process_model_name(self.force_model):
            raise ValueError(f"this server has {self.force_model} and no other model.")
        if self.served is None:
            model = load_checkpoint(
                self.checkpoint,
                self.dtype,
                self.trust_remote_code,
                device_map=self.device,
                attn_implementation=self.attn_implementation,
                quantization_config=self.get_quantization_config(),
            )
            self.served = model, with_refusals(self.checkpoint.tokenizer)
        if progress_callback is not None:
            progress_callback({"status": "ready", "model": model_id_and_revision, "cached": True})
        return self.served

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
        return [{"id": self.force_model, "object": "model", "created": int(time.time()), "owned_by": "attnres"}]


def with_refusals(tokenizer):
    """The tokenizer, whose chat template takes a system's turn as the other commands let it, and answers a request
    that it can't be filled with by a line and status 400."""
    fill = tokenizer.apply_chat_template

    def apply_chat_template(messages: list[dict], **options):
        try:
            with filled_in("the chat template can't be filled"):
                if not tokenizer.chat_template:
                    raise InputError("the model has no chat template: use /v1/completions.")
                return first_accepted(lambda turns: fill(turns, **options), messages)[0]
        except InputError as error:
            raise HTTPException(400, str(error)) from None

    tokenizer.apply_chat_template = apply_chat_template
    return tokenizer


def build_app(at_end: ExitStack, *handlers, generation_state, build_server=server.build_server, **options):
    """transformers' app, whose refusals have the form in which clients of OpenAI's API look for a reason."""
    app = build_server(*handlers, generation_state=generation_state, **options)
    at_end.callback(generation_state.shutdown)  # or the thread that batches keeps the process from ending

    @app.exception_handler(HTTPException)
    async def refuse(_, error: HTTPException):
        return JSONResponse({"error": {"message": error.detail}}, error.status_code)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValueError)
    async def refuse_values(_, error: ValueError):
        return JSONResponse({"error": {"message": str(error)}}, 400)

    return app


def check_address(host: str, port: int):
    """
    Raises:
        InputError: a server can't listen there. Found before a model is loaded, which takes long.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise InputError(
            f"can't listen at {host}, port {port}: {error.strerror or error}; choose another --port or --host."
        ) from None


def how_to_ask(options: ServeOptions, is_chat: bool) -> str:
    """What is said when the model has been loaded: the address and a request to try."""
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(options.host, options.host)
    base = f"http://{f'[{host}]' if ':' in host else host}:{options.port}/v1"
    prompt = {"messages": [{"role": "user", "content": "Hello"}]} if is_chat else {"prompt": "Hello"}
    path = "chat/completions" if is_chat else "completions"
    body = shlex.quote(json.dumps({"model": options.model, **prompt, "max_tokens": 32}))
    lines = [
        f"{options.model} is at {base}, for clients of OpenAI's API with any key, such as",
        f"  curl {base}/{path} -H 'Content-Type: application/json' -d {body}",
    ]
    if not is_chat:
        lines.insert(1, "It has no chat template, so it completes text and doesn't chat.")
    return "\n".join(lines)


def serve(options: ServeOptions):
    """Loads the model and answers requests until it is interrupted.

    Raises:
        InputError: the model doesn't load, or the address can't be listened at.
    """
    check_address(options.host, options.port)
    checkpoint = open_checkpoint(options.model, options.base, options.tokenizer, options.trust_remote_code)
    manager = OneModel(checkpoint, force_model=options.model, **taken_by(model_manager.ModelManager, options))
    print(how_to_ask(options, bool(checkpoint.tokenizer.chat_template)), flush=True)
    with (
        ExitStack() as at_end,
        patch.object(model_manager, "ModelManager", lambda **_: manager),  # where the server looks for them
        patch.object(server, "build_server", partial(build_app, at_end)),
        suppress(KeyboardInterrupt),
    ):
        Serve(force_model=options.model, **taken_by(Serve, options))


def taken_by(kind: type, options: ServeOptions) -> dict:
    """The options that the constructor of `kind` takes, by name."""
    names = inspect.signature(kind).parameters
    return {name: value for name, value in vars(options).items() if name in names}
