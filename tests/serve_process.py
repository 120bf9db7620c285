# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""A server as a process of its own, as its user starts it, and OpenAI's client for it."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import openai


SCRIPT = Path(__file__).parents[1] / "scripts" / "serve.py"
SECONDS = 120  # to load, on a busy machine


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@dataclass
class Running:
    """A server's process, of `attnres-serve MODEL`, which is killed at the end of a `with`, if it is still there."""

    model: str
    options: tuple[str, ...] = ()
    port: int = field(default_factory=free_port)

    def start(self, place: Path, outputs: Path):
        """Starts it in the folder `place`; what it prints goes to a file in `outputs`."""
        self.output = outputs / f"{self.port}.txt"
        command = [sys.executable, str(SCRIPT), self.model, "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--dtype", "float32", "--device", "cpu", *self.options]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        with open(self.output, "w") as output:
            self.process = subprocess.Popen(command, cwd=place, env=environment, stdout=output, stderr=output)
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    @property
    def text(self) -> str:
        return self.output.read_text()

    def ready(self):
        end = time.monotonic() + SECONDS
        while self.process.poll() is None and time.monotonic() < end:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5).close()
                return self
            except OSError:
                time.sleep(0.1)
        raise AssertionError(self.text)

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="any", max_retries=0, timeout=60)

    def complete(self, prompt: str, max_tokens: int = 24, **options) -> openai.types.Completion:
        return self.client.completions.create(
            model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, **options
        )

    def chat(self, content: str, max_tokens: int = 24, **options):
        messages = [{"role": "user", "content": content}]
        return self.client.chat.completions.create(
            **{"model": self.model, "messages": messages, "max_tokens": max_tokens, "temperature": 0, **options}
        )

    def interrupt(self) -> int:
        """The exit code after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(60)
