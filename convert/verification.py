# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Proof that a converted checkpoint computes what its donor computes, by running both."""

import gc
import os
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging

from .checkpoint import Checkpoint, ConversionError
from .reading import understood


TOKENS = 64
SEED = 0
# float32 rounding, taken over a model's depth; larger where routing or attention sinks amplify it
TOLERANCE = 3e-6
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # whatever config.json says
TOLERANCES = {"deepseek_v3": 2e-5, "gpt_oss": 2e-5, "kimi_linear": 2e-5}


@dataclass(frozen=True)
class Verification:
    """How far two models' logits are apart. `relative_difference` is the largest by the largest logit of the first."""

    max_difference: float
    mean_difference: float
    relative_difference: float
    top1_agreement: float
    num_predictions: int
    dtype: str
    tolerance: float


def verify(first: Path, first_class: type, second: Path, second_class: type, donor_type: str) -> Verification:
    """Runs both models on the same random tokens in float32, one after the other.

    Raises:
        ConversionError: their logits differ by more than rounding.
    """
    with understood(f"{first_class.__name__} can't be run to verify the result", "see --no-verify", ConversionError):
        expected = _logits(first, first_class)
    actual = _logits(second, second_class)
    if expected.shape != actual.shape:
        raise ConversionError(f"verification failed: logits of shapes {expected.shape} and {actual.shape}.")
    difference = (actual - expected).abs()
    largest = difference.max().item()
    result = Verification(
        max_difference=largest,
        mean_difference=difference.mean().item(),
        relative_difference=(difference.max() / expected.abs().max()).item() if largest else 0.0,
        top1_agreement=(actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        num_predictions=difference[..., 0].numel(),
        dtype="float32",
        tolerance=TOLERANCES.get(donor_type, TOLERANCE),
    )
    if not result.relative_difference <= result.tolerance:
        raise ConversionError(
            f"verification failed: the logits differ by {result.relative_difference:.1e} of the largest, more than "
            f"{result.tolerance:.0e}; nothing was written."
        )
    return result


def reason_to_skip(checkpoint: Checkpoint) -> str | None:
    """Why a checkpoint can't be verified here, `None` if it can."""
    if checkpoint.config.get("quantization_config") is not None:
        return "the checkpoint is quantised"
    needed = int(checkpoint.num_parameters * 4 * 1.2)
    free = available_memory()
    if free is None:
        return "the free memory is unknown; psutil would tell (pip install psutil)"
    if needed > free:
        return f"it needs {needed / 1e9:.1f} GB of memory in float32 and {free / 1e9:.1f} GB are free"
    return None


def available_memory() -> int | None:
    """Free memory in bytes, within the limit of a container, `None` if the system doesn't tell."""
    free = _host_memory()
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return free
    if limit == "max":
        return free
    within = max(0, int(limit) - int(stat["anon"]))
    return within if free is None else min(free, within)


def _host_memory() -> int | None:
    try:
        import psutil
    except ImportError:
        pass
    else:
        return psutil.virtual_memory().available
    try:
        fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


@torch.inference_mode()
def _logits(folder: Path, model_class: type) -> torch.Tensor:
    with quiet():
        options = {"dtype": torch.float32, "local_files_only": True, **OUTPUTS}
        model = model_class.from_pretrained(os.fspath(folder), **options).eval()
    generator = torch.Generator().manual_seed(SEED)
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)
    outputs = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    names = [name for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in outputs]
    logits = torch.stack([outputs[name] for name in names]).float()
    del model, outputs
    gc.collect()
    if not logits.isfinite().all():
        raise ConversionError(f"{folder} gives logits that are not finite, so it can't be verified; see --no-verify.")
    return logits


@contextmanager
def quiet():
    """Without the progress bars and reports of transformers, whose place the converter's own take."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
