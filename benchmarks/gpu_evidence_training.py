# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""One training run of gpu_evidence.py, from its initialisation to what happens over depth; for its worker processes."""

import json
import math
import os
import platform
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import from_clone  # noqa: F401


# isort: split
import numpy as np
import torch
import transformers
from attnres_recipes.optim import is_depth_attention, parameter_groups
from gpu_evidence_data import EvidenceError
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnres
from attnres_kernels.fused import works_on


BETAS, WEIGHT_DECAY, LARGEST_NORM = (0.9, 0.95), 0.1, 1.0
WARM_UP, LAST_RATE = 0.1, 0.1  # shares of the steps, and of the learning rate
CURVE_POINTS, EVALUATIONS, EVALUATION_SEQUENCES = 40, 4, 128
FIRST_STEPS = 3  # in which kernels are compiled, and which aren't timed
EVALUATION_BATCH, PROFILE_SEQUENCES = 64, 4


def versions(device: str) -> dict:
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise EvidenceError("this torch finds no GPU; give --device cpu --tiny for a rehearsal.")
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "attnres": attnres.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else f"cpu, {os.cpu_count()} cores",
        "default_implementation": attnres.DepthAttentionInterface.default,
        "kernels_work": works_on(torch.zeros(1, device=device).device) if on_gpu else None,
    }


# --- The model


def model_config(variant: str, settings: dict, vocab_size: int) -> LlamaConfig:
    """The stock configuration for the donor, else AttnRes's in the mode `variant`."""
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": settings["hidden_size"],
        "intermediate_size": 3 * settings["hidden_size"],
        "num_hidden_layers": settings["layers"],
        "num_attention_heads": settings["hidden_size"] // settings["head_size"],
        "max_position_embeddings": settings["seq_len"],
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if variant == "donor":
        return LlamaConfig(**shape)
    if variant == "block":
        shape["attn_res_block_size"] = settings["block_size"]
    return attnres.AttnResConfig(**shape, attn_res_mode=variant)


@torch.no_grad()
def scale_weights(model: nn.Module, seed: int):
    """Matrices with standard deviation 1 / sqrt(hidden), those that write to the residual stream 1 / sqrt(2 layers) of
    it."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            std = config.hidden_size**-0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std *= (2 * config.num_hidden_layers) ** -0.5
            parameter.normal_(0, std, generator=generator)


def new_model(variant: str, seed: int, settings: dict, vocab_size: int) -> nn.Module:
    """On the CPU, in float32. All variants of a seed have the donor's weights; fresh depth attention is uniform."""
    torch.manual_seed(seed)
    donor = LlamaForCausalLM(model_config("donor", settings, vocab_size))
    if settings["init"] == "scaled":
        scale_weights(donor, seed)
    if variant == "donor":
        return donor
    model = attnres.AttnResForCausalLM(model_config(variant, settings, vocab_size))
    missing, unexpected = model.load_state_dict(donor.state_dict(), strict=False)
    assert not unexpected and all(is_depth_attention(name) for name in missing), (missing, unexpected)
    if settings["implementation"]:
        model.set_attn_res_implementation(settings["implementation"])
    return model


def new_optimizer(model: nn.Module, learning_rate: float, depth_lr_scale: float) -> torch.optim.Optimizer:
    """AdamW; of the groups of `parameter_groups`, the layers' matrices alone have weight decay."""
    groups = parameter_groups(model, learning_rate, WEIGHT_DECAY, depth_lr_scale)
    for kind, group in groups.items():
        if kind != "matrices":
            group["weight_decay"] = 0.0
    return torch.optim.AdamW(list(groups.values()), lr=learning_rate, betas=BETAS, fused=True)


def rate_factor(step: int, steps: int) -> float:
    """Share of the learning rate in a step from 0: a linear warm-up, then half a cosine."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    done = (step - warm_up + 1) / max(1, steps - warm_up)
    return LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * done)) / 2


# --- Data


class Windows:
    """Held-out sequences in their order, and batches to train on in an order that the seed alone decides."""

    def __init__(self, file: Path, data: dict, settings: dict):
        self.seq_len, self.batch_size = settings["seq_len"], settings["batch_size"]
        tokens = torch.from_numpy(np.fromfile(file, np.uint16).astype(np.int32)).to(settings["device"])
        held_out, self.train = tokens.split([data["held_out_tokens"], data["train_tokens"]])
        number = min(settings["held_out_sequences"], (len(held_out) - 1) // self.seq_len)
        self.held_out = self.cut(held_out, torch.arange(number))

    def cut(self, tokens: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Sequences `(batch, seq + 1)`; the last token of each is the next one's first."""
        first = windows.to(tokens.device) * self.seq_len
        return tokens[first[:, None] + torch.arange(self.seq_len + 1, device=tokens.device)].long()

    def batches(self, seed: int):
        number, generator = (len(self.train) - 1) // self.seq_len, torch.Generator().manual_seed(seed)
        while True:
            for windows in torch.randperm(number, generator=generator).split(self.batch_size):
                if len(windows) == self.batch_size:
                    yield self.cut(self.train, windows)


# --- Training


def sequence_losses(model, batch: torch.Tensor) -> torch.Tensor:
    """The mean loss of each sequence, `(batch,)`, in nats per token."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(batch[:, :-1], use_cache=False).logits
    losses = nn.functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
    return losses.view(len(batch), -1).mean(1)


@torch.no_grad()
def held_out_losses(model, sequences: torch.Tensor) -> list[float]:
    return torch.cat([sequence_losses(model, batch) for batch in sequences.split(EVALUATION_BATCH)]).tolist()


def numbers(values, digits: int = 4) -> list[float | None]:
    """Rounded; what isn't finite is None, as JSON has no such number."""
    return [round(float(value), digits) if math.isfinite(value) else None for value in values]


class Training:
    """A model in training, of the `run`'s variant, seed and learning rate."""

    def __init__(self, run: dict, windows: Windows, data: dict, settings: dict):
        self.device = torch.device(settings["device"])
        self.learning_rate = run["learning_rate"]
        self.model = new_model(run["variant"], run["seed"], settings, data["vocab_size"]).to(self.device)
        self.forward = torch.compile(self.model) if settings["compile"] else self.model
        self.optimizer = new_optimizer(self.model, self.learning_rate, settings["depth_lr_scale"])
        self.scales = [group["lr"] / self.learning_rate for group in self.optimizer.param_groups]
        named = list(self.model.named_parameters())
        self.depth = [parameter for name, parameter in named if is_depth_attention(name)]
        self.rest = [parameter for name, parameter in named if not is_depth_attention(name)]
        self.batches = windows.batches(run["seed"])
        self.losses, self.norms = [], []  # on the device, so that nothing waits for them

    def step(self, step: int, steps: int):
        for group, scale in zip(self.optimizer.param_groups, self.scales):
            group["lr"] = self.learning_rate * scale * rate_factor(step, steps)
        loss = sequence_losses(self.forward, next(self.batches)).mean()
        loss.backward()
        groups = [group for group in (self.rest, self.depth) if group]
        self.norms.append(torch.stack([nn.utils.clip_grad_norm_(group, LARGEST_NORM) for group in groups]))
        self.losses.append(loss.detach())
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def now(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def measure_speed(run: dict, windows: Windows, data: dict, settings: dict, wait, seconds: float) -> float:
    """Tokens per second of training, while the other workers train too.

    Args:
        wait: returns once all workers are as far.
    """
    training = Training(run, windows, data, settings)
    for step in range(FIRST_STEPS):
        training.step(step, 1000)
    training.now()
    wait()
    started, done = training.now(), 0
    while done == 0 or time.perf_counter() - started < seconds:
        training.step(FIRST_STEPS + done, 1000)
        training.now()
        done += 1
    return done * windows.batch_size * windows.seq_len / (training.now() - started)


def train(
    run: dict, windows: Windows, data: dict, settings: dict, deadline: float, save_to: Path | None = None
) -> dict | None:
    """The row of a run, or None if it isn't done by the `deadline`, a `time.time()`.

    Args:
        run: stage, variant, seed, learning rate and tokens.
        save_to: folder for the trained weights, in bfloat16.
    """
    entered = time.perf_counter()
    if time.time() > deadline:
        return None
    if torch.device(settings["device"]).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    training = Training(run, windows, data, settings)
    is_final = run["stage"] == "final"
    tokens_per_step = windows.batch_size * windows.seq_len
    steps = max(1, run["tokens"] // tokens_per_step)
    looks = {round(steps * share / EVALUATIONS) for share in range(1, EVALUATIONS)} - {0} if is_final else set()
    first, held_out_curve, evaluating, started = min(FIRST_STEPS, steps - 1), [], 0.0, training.now()
    for step in range(steps):
        if time.time() > deadline:
            return None
        if step == first:
            started = training.now()
        if step in looks:
            before = training.now()
            losses = held_out_losses(training.forward, windows.held_out[:EVALUATION_SEQUENCES])
            held_out_curve.append([step * tokens_per_step, *numbers([np.mean(losses)])])
            evaluating += (training.now() - before) * (step >= first)
        training.step(step, steps)
    speed = (steps - first) * tokens_per_step / (training.now() - started - evaluating)
    losses, norms = torch.stack(training.losses).tolist(), torch.stack(training.norms).tolist()
    sequences = windows.held_out if is_final else windows.held_out[: 2 * EVALUATION_SEQUENCES]
    held_out = held_out_losses(training.forward, sequences)
    parts = [part for part in np.array_split(np.arange(steps), CURVE_POINTS) if len(part)]
    row = {
        **run,
        "steps": steps,
        "held_out_loss": numbers([np.mean(held_out)], 5)[0],
        "train_loss": numbers([np.mean(losses[-max(1, steps // 20) :])])[0],
        "tokens_per_second": round(speed),
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if training.device.type == "cuda" else None,
        "implementation": getattr(training.model.config, "_attn_res_implementation", None),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters()),
        "embedding_parameters": training.model.get_input_embeddings().weight.numel(),
        "depth_parameters": sum(parameter.numel() for parameter in training.depth),
        "curve": [[int(part[-1] + 1) * tokens_per_step, *numbers([np.mean(np.take(losses, part))])] for part in parts],
        # step, then the norm of all other gradients and that of depth attention's, before clipping
        "gradient_norms": [[int(part[0]), *numbers(norms[part[0]], 5)] for part in parts[::2]],
    }
    if is_final:
        row["held_out_curve"] = [*held_out_curve, [steps * tokens_per_step, *numbers([row["held_out_loss"]])]]
        row["sequence_losses"] = numbers(held_out)
        row["depth"] = depth_profile(training.model, windows.held_out[:PROFILE_SEQUENCES])
        if save_to is not None:
            save(training.model, save_to)
    row["seconds"] = round(training.now() - entered, 2)
    return row


# --- What happens over depth


def rms(tensor: torch.Tensor) -> float:
    return tensor.detach().float().pow(2).mean().sqrt().item()


def depth_profile(model: nn.Module, sequences: torch.Tensor) -> dict[str, list]:
    """One forward and backward pass of held-out sequences, with the readable implementation of depth attention.

    Returns:
        `read_rms`: of what each of the 2L + 1 reads gives (donor: the residual stream). `sum_rms`: of the newest source
        at each read: the open block's sum so far (donor: the stream again; Full: the last output alone). `output_rms`
        and `output_gradient_norm`: of what each of the 2L sublayers puts out, the latter of the gradient of the mean
        loss over all tokens. For AttnRes models `depth_weights`: for each read, its mean weight on each source.
    """
    reads, sums, weights, outputs = [], [], [], []
    base = model.model
    is_attnres = hasattr(base, "depth_attention")

    def seen_output(_, inputs, output):
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        outputs.append(output)

    def seen_read(_, inputs, output):
        mixed, read_weights, _, sources = output
        reads.append(rms(mixed))
        sums.append(rms(sources[-1]))
        weights.append(numbers(read_weights.detach().float().mean((0, 2)).tolist()))

    def seen_stream(_, inputs):
        reads.append(rms(inputs[0]))
        sums.append(reads[-1])

    if is_attnres:
        model.set_attn_res_implementation("eager")
    with ExitStack() as stack:
        for layer in base.layers:
            handles = [layer.self_attn.register_forward_hook(seen_output), layer.mlp.register_forward_hook(seen_output)]
            if is_attnres:
                modules = (layer.attention_read, layer.mlp_read)
                handles += [module.register_forward_hook(seen_read) for module in modules]
            else:
                modules = (layer.input_layernorm, layer.post_attention_layernorm)
                handles += [module.register_forward_pre_hook(seen_stream) for module in modules]
            for handle in handles:
                stack.callback(handle.remove)
        last = (
            base.output_read.register_forward_hook(seen_read)
            if is_attnres
            else base.norm.register_forward_pre_hook(seen_stream)
        )
        stack.callback(last.remove)
        sequence_losses(model, sequences).mean().backward()
    seen = {
        "read_rms": numbers(reads, 5),
        "sum_rms": numbers(sums, 5),
        "output_rms": numbers([rms(output) for output in outputs], 5),
        "output_gradient_norm": numbers([output.grad.float().norm().item() for output in outputs], 8),
    }
    model.zero_grad(set_to_none=True)
    return {**seen, "depth_weights": weights} if is_attnres else seen


def save(model: nn.Module, folder: Path):
    """The weights in bfloat16 and `config.json`; `import attnres` loads them, as the code files are not among them."""
    with tempfile.TemporaryDirectory() as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary, max_shard_size="15MB")
        config = json.loads(Path(temporary, "config.json").read_text(encoding="utf-8"))
        config.pop("auto_map", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for file in sorted(Path(temporary).glob("*.safetensors*")):
            (folder / file.name).write_bytes(file.read_bytes())


# --- The worker process


class Worker:
    """What a worker process keeps between runs."""

    settings: dict
    data: dict
    barrier = None
    windows: Windows | None = None


def start(settings: dict, data: dict, barrier):
    """Makes a process a worker."""
    Worker.settings, Worker.data, Worker.barrier = settings, data, barrier


def loaded(tokens_file: Path) -> Windows:
    if Worker.windows is None:
        Worker.windows = Windows(tokens_file, Worker.data, Worker.settings)
    return Worker.windows


def speed_job(run: dict, tokens_file: Path, seconds: float) -> float:
    try:
        return measure_speed(
            run, loaded(tokens_file), Worker.data, Worker.settings, lambda: Worker.barrier.wait(400), seconds
        )
    except BaseException:
        Worker.barrier.abort()  # nobody waits for this one
        raise


def train_job(run: dict, tokens_file: Path, deadline: float, save_to: Path | None) -> dict | None:
    return train(run, loaded(tokens_file), Worker.data, Worker.settings, deadline, save_to)
