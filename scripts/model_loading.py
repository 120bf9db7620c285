# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as a user names them: AttnRes models, donors, and folders of PEFT adapters on their base."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from adapters import load_adapter
from pretrain import check_context, load_tokenizer, load_weights, read_config
from training_data import first_line
from training_run import RunError
from transformers import AutoConfig, PreTrainedConfig
from transformers.utils import cached_file

import attnres  # noqa: F401, registers its classes


@dataclass
class Checkpoint:
    """A model to load, after the parts that can be checked quickly were."""

    path: str
    base: str
    adapter: str | None
    config: PreTrainedConfig
    tokenizer: object

    @property
    def context(self) -> int | None:
        """The longest sequence in tokens, if the model has a limit."""
        return getattr(self.config, "max_position_embeddings", None)


def find_file(path: str, name: str) -> str | None:
    """A file of a folder or Hub id, if there is one."""
    if Path(path).exists():
        return str(Path(path, name)) if Path(path, name).is_file() else None
    try:
        return cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):  # no such repository: reading its configuration says so
        return None


def open_checkpoint(
    path: str, base: str | None = None, tokenizer: str | None = None, trust_remote_code: bool = False
) -> Checkpoint:
    """Reads the configuration and tokenizer of a checkpoint.

    Args:
        path: folder or Hub id of a model or adapter.
        base: the base of an adapter, instead of the one that it names.
        tokenizer: folder or Hub id, instead of the checkpoint's own.
        trust_remote_code: whether code of the checkpoint may run, for model types that transformers doesn't know.

    Raises:
        RunError: there is no checkpoint, base or tokenizer.
    """
    adapter = None
    source = path
    adapter_config = find_file(path, "adapter_config.json")
    if adapter_config is not None:
        adapter = path
        try:
            source = base or dict(json.loads(Path(adapter_config).read_text("utf-8"))).get("base_model_name_or_path")
        except (ValueError, TypeError):
            raise RunError(f"{adapter_config} is no configuration of an adapter.") from None
        if not source:
            raise RunError(f"the adapter {path} names no base; give --base.")
    try:
        config = (
            AutoConfig.from_pretrained(source, trust_remote_code=True) if trust_remote_code else read_config(source, {})
        )
    except (OSError, ValueError) as error:
        reason = str(error).rstrip(".")
        raise RunError(f"the base of the adapter {path}: {reason}. Give --base." if adapter else f"{reason}.") from None
    own = adapter is not None and find_file(adapter, "tokenizer_config.json") is not None
    try:
        loaded = load_tokenizer(tokenizer or (adapter if own else source), trust_remote_code=trust_remote_code)
    except Exception as error:  # of many kinds, some of tokenizers' own
        raise RunError(f"no tokenizer for {path}: {first_line(error)}; give --tokenizer.") from None
    if len(loaded) > config.vocab_size:
        raise RunError(f"the tokenizer of {path} has {len(loaded)} tokens, the model {config.vocab_size}.")
    return Checkpoint(path, source, adapter, config, loaded)


def load_checkpoint(checkpoint: Checkpoint, dtype: str = "auto", trust_remote_code: bool = False):
    """The model, on the accelerator where there is one, for inference. Pickles are not loaded.

    Raises:
        RunError: it doesn't load, or the adapter is for another base.
    """
    model = load_weights(checkpoint.base, dtype=dtype, trust_remote_code=trust_remote_code)
    if checkpoint.adapter is not None:
        model = load_adapter(model, checkpoint.adapter)
    if torch.accelerator.is_available() and model.device.type == "cpu":
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval()


def check_contexts(checkpoints: list[Checkpoint], seq_len: int):
    for checkpoint in checkpoints:
        try:
            check_context(checkpoint.config, seq_len)
        except RunError as error:
            raise RunError(f"{checkpoint.path}: {error}") from None


def short_names(paths: list[str]) -> list[str]:
    """The paths without the folders that all of them begin or end with, for tables and legends."""
    if files := [path for path in paths if Path(path).is_file()]:
        raise RunError(f"{files[0]} is not a folder.")
    # folders by their full path, so that `.` has a name and one that is written in two ways is the same
    places = [Path(path).resolve() if Path(path).exists() else Path(path) for path in paths]
    if len(set(places)) < len(places):
        raise RunError("a checkpoint is given twice.")
    here = Path.cwd()
    parts = [(place.relative_to(here) if here in place.parents else place).parts for place in places]
    if len(parts) == 1:
        return ["/".join(parts[0][-2:])]
    shortest = min(map(len, parts))
    start = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), shortest - 1)
    end = next((i for i in range(shortest - start) if len({part[-1 - i] for part in parts}) > 1), shortest - start - 1)
    return [Path(*part[start : len(part) - end]).as_posix() for part in parts]
