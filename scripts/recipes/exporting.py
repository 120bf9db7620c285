# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""Models as programs for other runtimes: ONNX, torch.export, AOTInductor and ExecuTorch.

All formats hold the same program, [`Decoder`]: ids, a mask, and the keys and values of the tokens before go in, logits
and the keys and values of all tokens come out. The batch and both lengths are free, and a length of 0 is an empty
cache, so that one program reads a prompt and then goes on token by token. Nothing of depth attention is cached.
"""

import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
from attnres_convert import InputError, reading, staging
from attnres_convert.verification import LEAST_ROUNDING, ROOM, relative_difference, rounded_layers
from attnres_convert.writing import write_json
from transformers import DynamicCache

from .loading import load_weights, open_checkpoint
from .options import ExportOptions


EXPORT_FILE = "export.json"
TRACED = (2, 3, 4)  # batch, tokens in the cache, new tokens
# What the written file is tried with: the batch, and how many tokens it reads at each call, none of them as traced
TRIED = [(1, (1, 1, 6)), (3, (9, 2, 1)), (2, (40, 1))]
# ExecuTorch plans its memory for the largest shapes
MOST = {"batch": 4, "sequence": 64, "past": 128}

Run = Callable[..., list[torch.Tensor]]  # a program: the inputs of Decoder in, its outputs out


class Decoder(torch.nn.Module):
    """What is exported: a causal model, with the cache as plain tensors."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, *past: torch.Tensor):
        """
        Args:
            input_ids: the new tokens, `(batch, sequence)`.
            attention_mask: of the tokens in the cache and of the new ones, `(batch, past + sequence)`; 0 for padding.
            past: keys and values in turn, layer by layer, `(batch, heads, past, head_dim)` each.

        Returns:
            Logits `(batch, sequence, vocabulary)`, then the keys and values with those of the new tokens.
        """
        torch._check(attention_mask.shape[1] == past[0].shape[2] + input_ids.shape[1])
        cache = DynamicCache()  # of whole layers: where there is a window, the mask has it
        for layer, (keys, values) in enumerate(zip(past[::2], past[1::2])):
            cache.update(keys, values, layer)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions(attention_mask)[:, past[0].shape[2] :],
            past_key_values=cache,
            use_cache=True,
        )
        return outputs.logits, *(states for layer in cache.layers for states in (layer.keys, layer.values))


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """As `generate` counts them: padding on the left has no place."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


@dataclass(frozen=True)
class Format:
    """How a program is written to a file, and run from it."""

    file: str
    packages: tuple[str, ...]  # that it needs beside torch
    write: Callable[[torch.export.ExportedProgram, list[str], list[str], Path], None]  # names of inputs and outputs
    open: Callable[[Path], Run]
    largest: dict[str, int] | None = None  # the sizes that are free, where they have a bound


def write_onnx(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], path: Path):
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    # ONNX Runtime optimizes as it loads; torch's optimizer takes many times as long as all else
    torch.onnx.export(program, input_names=inputs, output_names=outputs, verbose=False, optimize=False).save(path)


def open_onnx(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        found = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)})
        return [torch.from_numpy(array) for array in found]

    return run


def write_torch(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], path: Path):
    torch.export.save(program, path)


def open_torch(path: Path) -> Run:
    # torch takes 0 and 1 for lengths of their own, and so asks for 4 tokens in the mask where there are two lengths
    module = torch.export.load(path).module(check_guards=False)
    return lambda *tensors: list(module(*tensors))


def write_aoti(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], path: Path):
    torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def open_aoti(path: Path) -> Run:
    package = torch._inductor.aoti_load_package(str(path))
    # it reads memory as if it were contiguous, whatever the strides
    return lambda *tensors: package(*(tensor.contiguous() for tensor in tensors))


def write_executorch(program: torch.export.ExportedProgram, inputs: list[str], outputs: list[str], path: Path):
    from executorch.exir import to_edge_transform_and_lower

    # XNNPACK reshapes no tensor of which two sizes are free, so these are the portable operators
    lowered = to_edge_transform_and_lower(program).to_executorch()
    with open(path, "wb") as file:
        lowered.write_to_file(file)


def open_executorch(path: Path) -> Run:
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda *tensors: [tensor.clone() for tensor in method.execute([tensor.contiguous() for tensor in tensors])]


FORMATS = {
    "onnx": Format("model.onnx", ("onnxscript", "onnxruntime"), write_onnx, open_onnx),
    "torch": Format("model.pt2", (), write_torch, open_torch),
    "aoti": Format("model.pt2", (), write_aoti, open_aoti),
    "executorch": Format("model.pte", ("executorch",), write_executorch, open_executorch, MOST),
}


@dataclass
class Export:
    """A written program with what is needed to run it."""

    run: Run
    inputs: list[dict]  # name, dtype, and shape, whose names stand for sizes that are free

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor] | None = None):
        """Logits `(batch, sequence, vocabulary)` and the cache with the new tokens; `past` is None for an empty one."""
        past = self.empty_cache(len(input_ids)) if past is None else past
        logits, *present = self.run(input_ids, attention_mask, *past)
        return logits, present

    def empty_cache(self, batch: int) -> list[torch.Tensor]:
        sizes = {"batch": batch, "past": 0}
        return [
            torch.empty([sizes.get(size, size) for size in given["shape"]], dtype=getattr(torch, given["dtype"]))
            for given in self.inputs[2:]
        ]

    def generate(self, input_ids: torch.Tensor, new_tokens: int, attention_mask: torch.Tensor | None = None):
        """Goes on with the likeliest tokens after `input_ids` `(batch, sequence)`; padding is on the left.

        Returns:
            `(batch, sequence + new_tokens)`
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens, new, past = input_ids, input_ids, None
        for _ in range(new_tokens):
            logits, past = self(new, mask, past)
            new = logits[:, -1:].argmax(-1)
            tokens, mask = torch.cat([tokens, new], 1), torch.cat([mask, torch.ones_like(new)], 1)
        return tokens


def open_export(folder: str | Path) -> Export:
    """What [`export_model`] wrote to a folder.

    Raises:
        InputError: it isn't there, or its runtime isn't.
    """
    record = reading.read_json(Path(folder) / EXPORT_FILE)
    if record.get("format") not in FORMATS or not isinstance(record.get("inputs"), list):
        raise InputError(f"{folder}: {EXPORT_FILE} tells no format or no inputs; export the model again.")
    format = FORMATS[record["format"]]
    check_packages(record["format"])
    with reading.understood(f"{folder} doesn't run"):
        return Export(format.open(Path(folder) / format.file), record["inputs"])


def check_packages(name: str):
    """Raises an InputError where a package isn't installed that a format needs."""
    for package in FORMATS[name].packages:
        if find_spec(package) is None:
            extra = package if name == "executorch" else "'attnres[export]'"
            raise InputError(f"{package} isn't installed, which {name} needs; pip install {extra}.")


@torch.no_grad()
def trace(model, largest: dict[str, int] | None = None) -> tuple[torch.export.ExportedProgram, list[dict], list[str]]:
    """The program of a causal model on the CPU, its inputs as in `export.json`, and the names of its outputs.

    Args:
        largest: the sizes that are free, if they have a bound.

    Raises:
        InputError: the model can't be exported.
    """
    model.eval().requires_grad_(False)
    if getattr(type(model), "_can_set_experts_implementation", bool)():
        model.set_experts_implementation("batched_mm")  # the others sort tokens by experts, whose numbers are data
    example = traced(model)
    sizes = {axis: torch.export.Dim(axis, max=(largest or {}).get(axis)) for axis in ("batch", "sequence", "past")}
    states = {0: sizes["batch"], 2: sizes["past"]}
    shapes = {
        "input_ids": {0: sizes["batch"], 1: sizes["sequence"]},
        "attention_mask": {0: sizes["batch"], 1: torch.export.Dim.AUTO},
        "past": tuple(states for _ in example[2:]),
    }
    with reading.understood(f"{type(model).__name__} can't be exported"):
        program = torch.export.export(Decoder(model), example, dynamic_shapes=shapes, strict=False)
    return program, *described(example)


def export_model(model, folder: Path, name: str, traced_before=None) -> dict:
    """Writes a model as a program and tries the file.

    Args:
        model: a causal one, on the CPU.
        folder: where `FORMATS[name].file` and `export.json` go; it is there.
        name: of the format.
        traced_before: what [`trace`] returned for this model.

    Returns:
        What `export.json` holds: the inputs and outputs, and how far the logits are off.

    Raises:
        InputError: the model can't be exported, or the file doesn't compute what the model computes.
    """
    format = FORMATS[name]
    program, inputs, outputs = traced_before or trace(model, format.largest)
    with reading.understood(f"{type(model).__name__} can't be written as {name}"):
        format.write(program, [given["name"] for given in inputs], outputs, folder / format.file)
    packages = ("torch", "transformers", "attnres", *format.packages)
    record = {
        "format": name,
        "file": format.file,
        "largest": format.largest,
        "inputs": inputs,
        "outputs": outputs,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in packages},
    }
    write_json(folder / EXPORT_FILE, record)
    record["difference"], record["tolerance"] = verify(open_export(folder), model, name)
    write_json(folder / EXPORT_FILE, record)
    return record


def traced(model) -> tuple[torch.Tensor, ...]:
    """Inputs of [`Decoder`] to trace a model with.

    Raises:
        InputError: the model keeps something else than keys and values.
    """
    if "linear_attention" in (getattr(model.config, "layer_types", None) or ()):
        raise InputError(
            f"{model.config.model_type} can't be exported: its linear attention keeps a state that isn't keys and "
            "values, and goes over chunks of tokens, whose number a program would fix."
        )
    batch, past, sequence = TRACED
    ids = torch.ones(batch, sequence, dtype=torch.long)
    cache = model(ids[:, :past], use_cache=True).past_key_values
    states = [states for layer in cache.layers for states in (layer.keys, layer.values)]
    return ids, torch.ones(batch, past + sequence, dtype=torch.long), *(state[:, :, -past:] for state in states)


def described(example: tuple[torch.Tensor, ...]) -> tuple[list[dict], list[str]]:
    """The inputs, and the names of the outputs, as they are usual for decoders in ONNX."""
    parts = [f"{layer}.{part}" for layer in range(len(example) // 2 - 1) for part in ("key", "value")]
    shapes = {"input_ids": ["batch", "sequence"], "attention_mask": ["batch", "past + sequence"]}
    for part, state in zip(parts, example[2:]):
        shapes[f"past_key_values.{part}"] = ["batch", state.shape[1], "past", state.shape[3]]
    inputs = [
        {"name": given, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": shape}
        for (given, shape), tensor in zip(shapes.items(), example)
    ]
    return inputs, ["logits", *(f"present.{part}" for part in parts)]


@torch.no_grad()
def verify(export: Export, model, name: str) -> tuple[float, float]:
    """Reads random tokens in several steps, with padding, and compares with the model, which reads them at once.

    Returns:
        The largest difference of the logits, by the largest logit, and what it may be: a multiple of what rounding
        does to the model itself.

    Raises:
        InputError: it is larger.
    """
    generator = torch.Generator().manual_seed(0)
    difference, rounding = 0.0, LEAST_ROUNDING
    for batch, steps in TRIED:
        ids = torch.randint(model.config.get_text_config().vocab_size, (batch, sum(steps)), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, : steps[0] // 2] = 0
        expected = compared(model, ids, mask)
        with rounded_layers(model, generator):
            rounding = max(rounding, relative_difference(compared(model, ids, mask), expected))
        logits, past, end = [], None, 0
        with reading.understood(f"the program doesn't run as {name}"):
            for step in steps:
                new, past = export(ids[:, end : end + step], mask[:, : end + step], past)
                logits.append(new)
                end += step
        found = torch.cat(logits, 1)[mask.bool()].double()
        difference = max(difference, relative_difference(found, expected))
    tolerance = ROOM * rounding
    if not difference <= tolerance:
        raise InputError(
            f"{type(model).__name__} can't be exported as {name}: the logits of the program are off by "
            f"{difference:.1e} of the largest, more than {tolerance:.1e}."
        )
    return difference, tolerance


def compared(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of the tokens that aren't padding, `(tokens, vocabulary)`, without a cache."""
    outputs = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
    return outputs.logits[mask.bool()].double()


def export(options: ExportOptions) -> dict:
    """Writes a model as a program of another runtime, tries it, and puts the tokenizer and configuration beside it.

    Returns:
        The rows to print.

    Raises:
        InputError: nothing was written; the message says why.
    """
    check_packages(options.format)
    staging.check_destination(options.output, options.force)
    checkpoint = open_checkpoint(options.model, trust_remote_code=options.trust_remote_code)
    if checkpoint.adapter is not None:
        raise InputError(f"{options.model} is an adapter; merge it first (attnres-finetune --merge).")
    model = load_weights(checkpoint.base, dtype=options.dtype, trust_remote_code=options.trust_remote_code)
    if options.format == "onnx" and model.dtype == torch.bfloat16:
        raise InputError("ONNX Runtime computes no bfloat16 on CPUs; use --dtype float32.")
    with staging.staged(options.output, options.force) as folder:
        record = export_model(model, folder, options.format)
        model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        checkpoint.tokenizer.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob(f"{record['file']}*"))
    return {
        "written": str(options.output / record["file"]),
        "format": f"{options.format}, {options.dtype}",
        "size": f"{size / 1e6:,.1f} MB",
        "largest difference": f"{record['difference']:.1e} of the largest logit, {record['tolerance']:.1e} allowed",
    }
