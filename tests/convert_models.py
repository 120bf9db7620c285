# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Donors on disk, and small tools, for the conversion tests."""

import hashlib
import json
import signal
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from families import tiny_donor
from safetensors import safe_open


def save_donor(folder, family="llama", head="ForCausalLM", dtype=torch.float32, shard_size="50GB", **options):
    """A donor with every tensor perturbed, saved by transformers itself; returns the model."""
    model = tiny_donor(family, getattr(transformers, f"AutoModel{head}"), **options).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def tokens(model, batch=2, length=17, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, model.config.vocab_size, (batch, length), generator=generator)


def relative(actual, expected):
    """The largest difference by the largest value, as the converter states it."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def tensor_bytes(folder):
    """The raw bytes of every tensor of a checkpoint, hashed, by name."""
    hashes = {}
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name).contiguous()
                digest = hashlib.sha256(tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
                hashes[name] = (str(tensor.dtype), tuple(tensor.shape), digest)
    return hashes


def tree(folder):
    """Relative name and content of every file."""
    folder = Path(folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit_json(path, **changes):
    """Sets keys of a JSON file; a value of ... removes the key."""
    content = {**json.loads(Path(path).read_text()), **changes}
    Path(path).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def write_sparse_donor(folder, vocab_size, hidden_size=1024, num_layers=2):
    """A bf16 Llama whose shard is a sparse file: a real header, no contents. Returns the shard's size in bytes."""
    folder.mkdir()
    options = {"hidden_size": hidden_size, "intermediate_size": 64, "num_hidden_layers": num_layers}
    config = transformers.LlamaConfig(**options, vocab_size=vocab_size, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: list(t.shape) for name, t in transformers.LlamaForCausalLM(config).state_dict().items()}
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return 8 + len(text) + offset


class Hang(BaseException):
    """A command takes too long; no handler of an Exception may take it for an error of its own."""


@contextmanager
def limited(seconds: int):
    def stop(*_):
        raise Hang(f"it takes more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
