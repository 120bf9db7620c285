# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Proof that a converted checkpoint computes what its donor computes, by running both."""

import gc
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .checkpoint import Checkpoint, ConversionError
from .reading import understood


TOKENS = 64
SEED = 0
OUTPUTS = {"return_dict": True, "output_attentions": False, "output_hidden_states": False}  # whatever config.json says
# In float64, sums in another order make 1e-15 (tiny models) to 1e-14 (SmolLM2, Gemma 3) of the largest logit; the least
# faults that were tried, one weight off by a thousandth and Gemma's reads as plain means, 1e-7.
TOLERANCE = 1e-11
# In float32 there is no such gap, so the yardstick is what rounding does to the donor itself. Of all families and both
# real models, converted ones are off by 0 to 3 times that.
ROOM = 8
LEAST_ROUNDING = 2**-24  # by chance a donor may be off by less, as one with logits of zero


@dataclass(frozen=True)
class Verification:
    """How far two models' logits are apart. `relative_difference` is the largest by the largest logit of the first.

    `tolerance` is what it may be. In float64 that is a constant, and `donor_rounding` is None; in float32 a multiple of
    `donor_rounding`: how far the donor is from itself if what its layers put out is off by a rounding.
    """

    max_difference: float
    mean_difference: float
    relative_difference: float
    top1_agreement: float
    num_predictions: int
    dtype: str
    tolerance: float
    donor_rounding: float | None


class Float64(TorchFunctionMode):
    """What models compute in float32 whatever they are given (norms, routers, rotations, losses) is in float64 too."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def widened(value):
            return torch.float64 if value is torch.float32 else value

        function = torch.Tensor.double if function is torch.Tensor.float else function
        return function(*map(widened, args), **{name: widened(value) for name, value in (kwargs or {}).items()})


def verify(first: Path, first_class: type, second: Path, second_class: type, dtype: torch.dtype) -> Verification:
    """Runs both models on the same random tokens, one after the other.

    Args:
        first: the folder of the donor.
        second: the folder of the AttnRes model.
        dtype: float64, or float32 if that takes too much memory.

    Raises:
        ConversionError: their logits differ by more than rounding.
    """
    expected, donor_rounding = _logits(first, first_class, dtype, with_rounding=dtype == torch.float32)
    gc.collect()  # the first model
    actual, _ = _logits(second, second_class, dtype)
    if expected.shape != actual.shape:
        raise ConversionError(f"verification failed: logits of shapes {expected.shape} and {actual.shape}.")
    tolerance = TOLERANCE if donor_rounding is None else ROOM * max(donor_rounding, LEAST_ROUNDING)
    difference = (actual - expected).abs()
    result = Verification(
        max_difference=difference.max().item(),
        mean_difference=difference.mean().item(),
        relative_difference=relative_difference(actual, expected),
        top1_agreement=(actual.argmax(-1) == expected.argmax(-1)).float().mean().item(),
        num_predictions=difference[..., 0].numel(),
        dtype=str(dtype).removeprefix("torch."),
        tolerance=tolerance,
        donor_rounding=donor_rounding,
    )
    if not result.relative_difference <= tolerance:
        raise ConversionError(
            f"verification failed: in {result.dtype} the logits differ by {result.relative_difference:.1e} of the "
            f"largest, more than {tolerance:.1e}; nothing was written."
        )
    return result


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference by the largest value that is expected; 0 where nothing differs."""
    largest = (actual - expected).abs().max()
    return (largest / expected.abs().max()).item() if largest else 0.0


def possible_dtype(checkpoint: Checkpoint) -> tuple[torch.dtype | None, str | None]:
    """The dtype in which a checkpoint is verified here, float64 if that fits; or None, and why it can't be verified."""
    if checkpoint.config.get("quantization_config") is not None:
        return None, "the checkpoint is quantised"
    free = available_memory()
    if free is None:
        return None, "the free memory is unknown; psutil would tell (pip install psutil)"
    for dtype in (torch.float64, torch.float32):
        needed = int(checkpoint.num_parameters * dtype.itemsize * 1.2)
        if needed <= free:
            return dtype, None
    return None, f"it needs {needed / 1e9:.1f} GB of memory in float32 and {free / 1e9:.1f} GB are free"


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


def _logits(
    folder: Path, model_class: type, dtype: torch.dtype, with_rounding: bool = False
) -> tuple[torch.Tensor, float | None]:
    """What a model puts out, in float64, and what rounding does to it, if that is asked for."""
    with understood(f"{model_class.__name__} can't be run to verify the result", "see --no-verify", ConversionError):
        logits, rounding = _run(folder, model_class, dtype, with_rounding)
    if not logits.isfinite().all():
        raise ConversionError(f"{folder} gives logits that are not finite, so it can't be verified; see --no-verify.")
    return logits, rounding


@torch.inference_mode()
def _run(folder: Path, model_class: type, dtype: torch.dtype, with_rounding: bool) -> tuple[torch.Tensor, float | None]:
    with quiet():
        options = {"dtype": dtype, "local_files_only": True, **OUTPUTS}
        model = model_class.from_pretrained(os.fspath(folder), **options).eval().to(dtype)
    if dtype == torch.float64 and getattr(model_class, "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("eager")  # the others have no float64
    generator = torch.Generator().manual_seed(SEED)
    length = min(TOKENS, getattr(model.config, "max_position_embeddings", None) or TOKENS)
    tokens = torch.randint(model.config.vocab_size, (1, length), generator=generator)

    def run() -> torch.Tensor:
        with Float64() if dtype == torch.float64 else nullcontext():
            outputs = model(tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
        names = [name for name in ("logits", "start_logits", "end_logits", "last_hidden_state") if name in outputs]
        return torch.stack([outputs[name] for name in names]).double()

    logits, rounding = run(), None
    if with_rounding:
        with rounded_layers(model, generator):
            rounding = relative_difference(run(), logits)
    return logits, rounding


@contextmanager
def rounded_layers(model: torch.nn.Module, generator: torch.Generator):
    """Each number that a layer puts out goes up or down by about one unit in the last place, or stays, by chance."""

    def nudged(value):
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return value
        steps = torch.randint(-1, 2, value.shape, generator=generator).to(value.dtype)
        return value * (1 + torch.finfo(value.dtype).eps * steps)

    def change(module, args, output):
        return tuple(map(nudged, output)) if isinstance(output, tuple) else nudged(output)

    hooks = [layer.register_forward_hook(change) for layer in model.base_model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


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
