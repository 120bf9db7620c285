# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What benchmarks/benchmark.py measures: models and blocks of reads, each checked before it is timed."""

import copy
import gc
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import from_clone  # noqa: F401


# isort: split
import torch
from attnres_recipes.hardware import cpu_name
from tqdm import tqdm
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, StaticCache
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import attnres  # noqa: F401  registers the classes
from configuration_attnres import attn_res_config_class
from depth_attention_attnres import (
    ALL_DEPTH_ATTENTION_FUNCTIONS,
    NOTHING_READ,
    ClosedDepthRead,
    DepthAttentionImplementation,
    DepthPlace,
    DepthRead,
    TwoPhaseDepthAttention,
)


CASES = ("training", "forward", "prefill", "decoding")
MODEL_SHAPE = ("hidden_size", "layers", "blocks", "heads", "vocab_size", "batch_size", "seq_len", "prompt_len")
OPERATOR_SHAPE = ("hidden_size", "sources", "sublayers", "batch_size", "seq_len")
# on a GPU, what takes less is lost in the noise of the clock
LEAST_SECONDS = 5e-3


def fresh_compiler_cache():
    """In this context compilers find nothing that is kept from before."""
    from torch._inductor import utils  # takes seconds

    # the name of torch 2.6 and 2.7 comes second
    return (getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache)()


class Call(NamedTuple):
    run: Callable  # what is timed
    prepare: Callable[[], tuple] = tuple  # makes its arguments before the clock starts


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Call, device: str, repeats: int = 1) -> float:
    arguments = call.prepare()
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        call.run(*arguments)
    synchronize(device)
    return (time.perf_counter() - started) / repeats


@contextmanager
def failure_noted(name: str, not_timed: dict[str, str]):
    """Ends quietly where the block fails, with the reason in `not_timed`."""
    try:
        yield
    except Exception as error:  # of another project's package, a compiler, a GPU without enough memory
        not_timed[name] = next(iter(f"{type(error).__name__}: {error}".splitlines()))
        error.__traceback__ = None  # which holds tensors
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def without_garbage_collection():
    """It would take milliseconds of whoever's turn it is."""
    gc.collect(0)
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def interleaved(calls: dict[str, Call], args, what: str, not_timed: dict[str, str], least_seconds: float = 0):
    """Seconds of each call in each round, in an order drawn anew for each. A round before, to warm up, doesn't count.

    Args:
        not_timed: receives those that fail when they warm up, and why.
        least_seconds: calls that take less are repeated until it has passed, and the mean counts.
    """
    repeats = {}
    for name, call in tqdm(calls.items(), desc=f"{what}, first calls", disable=not sys.stderr.isatty()):
        with failure_noted(name, not_timed):
            seconds = timed(call, args.device)
            if least_seconds:
                seconds = timed(call, args.device)
            repeats[name] = max(1, math.ceil(least_seconds / seconds))
    seconds, order = {name: [] for name in repeats}, list(repeats)
    shuffle = random.Random(0).shuffle
    for _ in tqdm(range(args.rounds), desc=what, disable=not sys.stderr.isatty()):
        shuffle(order)
        with without_garbage_collection():
            for name in order:
                seconds[name].append(timed(calls[name], args.device, repeats[name]))
    return seconds


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def peak_memory(call: Call, device: str) -> int:
    """Bytes of tensors that a call needs at most, beyond what there is before it."""
    arguments = call.prepare()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call.run(*arguments)
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # its profiler tells whenever it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call.run(*arguments)
    total = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def hardware(device: str) -> dict:
    found = {
        "cpu": cpu_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }
    if malloc := {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}:
        found["malloc"] = malloc  # settings of the C library
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        found |= {"gpu": gpu.name, "gpu_memory_bytes": gpu.total_memory, "cuda": torch.version.cuda}
    return found


def relative_error(values, exact) -> float:
    """The largest of several tensors, of each the norm of the error by that of the exact values."""
    pairs = zip(values, exact, strict=True)
    return max(((value.double() - true).norm() / true.norm()).item() for value, true in pairs)


def check(errors: dict[str, float], eager: str, tolerance: float, not_timed: dict[str, str]):
    """Notes in `not_timed` whose error is more than that of the readable implementation times the tolerance, and
    more than rounding in float32."""
    for name, error in errors.items():
        if not error <= max(tolerance * errors[eager], 1e-5):
            not_timed[name] = f"it is wrong: error {error:.1e}, that of eager {errors[eager]:.1e}"


# --- Models


def model_config(args, mode: str | None = None, implementation: str | None = None):
    """The configuration of a stock model, or with a mode that of an AttnRes model."""
    shape = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": max(32, 8 * args.hidden_size // 3 // 32 * 32),
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "max_position_embeddings": max(args.seq_len, args.prompt_len),
        **getattr(args, "options", {}),
    }
    if mode is None:
        return CONFIG_MAPPING[args.family](**shape)
    return attn_res_config_class(args.family)(
        **shape,
        attn_res_mode=mode,
        attn_res_block_size=-(-args.layers // args.blocks),
        attn_res_implementation=implementation,
    )


class InPlaceOfRead(torch.autograd.Function):
    """The embedding, where the output of a sublayer should be read; also as the gradient of that output.

    So sublayers get finite numbers of the usual size, forward and backward, though nothing between them is computed.
    """

    @staticmethod
    def forward(ctx, output: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(embedding)
        return embedding.view_as(embedding)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        return ctx.saved_tensors[0], None


class NothingRead(DepthAttentionImplementation):
    """Leaves out all that is between sublayers: sums, reads and norms. What it takes is the bound of what any
    implementation, or the stock model, could take."""

    def joined(self, sources, place):
        return tuple(sources) if len(sources) <= place.num_sources else (*sources[:-2], sources[-1])

    def read(self, place, product, sources, norm, shared, watched):
        sources = self.joined(sources, place)
        read = InPlaceOfRead.apply(sources[-1], sources[0]) if torch.is_grad_enabled() else sources[0]
        return None, None, read, sources


def new_models(args, with_bound: bool = False) -> dict[str, torch.nn.Module]:
    """The stock model and, on its weights, an AttnRes model for each mode and implementation.

    Args:
        with_bound: whether there is one, too, in which nothing is read ([`NothingRead`]).
    """

    def new_model(*mode_and_implementation):
        with torch.device(args.device):
            config = model_config(args, *mode_and_implementation)
            return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))

    def on_stock_weights(mode: str, implementation: str):
        model = new_model(mode, implementation)
        # the same memory too: where it lies alone makes decoding differ by several percent
        model.load_state_dict(models["stock"].state_dict(), strict=False, assign=True)
        model.tie_weights()
        return model

    torch.manual_seed(0)
    models = {"stock": new_model()}
    for mode in args.modes:
        for implementation in args.implementations:
            model = on_stock_weights(mode, implementation)
            query = model.base_model.depth_attention.query.data
            values = torch.randn(query.shape, generator=torch.Generator().manual_seed(0))
            query.copy_(values / args.hidden_size**0.5)  # weights far from even
            models[f"{mode} {implementation}"] = model
    if with_bound:
        models["bound"] = on_stock_weights(args.modes[0], "eager")
        for module in models["bound"].modules():
            if isinstance(module, DepthRead):
                module.implementation = NothingRead()
    return models


def check_models(models: dict[str, torch.nn.Module], args, not_timed: dict[str, str]) -> dict[str, float]:
    """The relative error, against float64, of each AttnRes model: of logits, gradients of the queries, and logits of a
    token after a cached prompt, the largest of the three."""
    tokens = torch.randint(args.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1)).to(args.device)

    def computed(model):
        model.train().zero_grad()
        outputs = model(tokens, labels=tokens, use_cache=False)
        outputs.loss.backward()
        gradient = model.base_model.depth_attention.query.grad
        model.eval().zero_grad()
        with torch.no_grad():
            cache = model(tokens[:1, :-1], use_cache=True).past_key_values
            decoded = model(tokens[:1, -1:], past_key_values=cache, use_cache=True).logits
        return outputs.logits.detach(), gradient, decoded

    errors = {}
    for mode in args.modes:
        of_mode = {name: model for name, model in models.items() if name.startswith(f"{mode} ")}
        model = next(iter(of_mode.values()))
        exact_model = copy.deepcopy(model).double()
        exact_model.set_attn_res_implementation("eager")
        exact = computed(exact_model)
        del exact_model
        readable = copy.deepcopy(model)
        readable.set_attn_res_implementation("eager")
        found = {"eager": relative_error(computed(readable), exact)}
        for name, model in of_mode.items():
            with failure_noted(name, not_timed):
                found[name] = relative_error(computed(model), exact)
        # through a whole model rounding adds up by chance; operators are held to the tolerance itself
        check(found, "eager", 2 * args.tolerance, not_timed)
        errors |= {name: error for name, error in found.items() if name not in not_timed}
        errors[f"{mode} eager"] = found["eager"]
    return errors


def model_call(case: str, model, tokens, args, compiled: bool, compile: Callable = torch.compile) -> Call:
    """What a case does with a model. `run` returns tensors by which a compiled model can be checked."""
    options = {}
    if compiled and case == "decoding" and args.device == "cuda":
        options["mode"] = "reduce-overhead"  # as `generate` compiles it
    called = compile(model, **options) if compiled else model
    depth_attention = getattr(model.base_model, "depth_attention", None)

    def training():
        outputs = called(tokens, labels=tokens, use_cache=False)
        outputs.loss.backward()
        results = [outputs.logits.detach()] + ([] if depth_attention is None else [depth_attention.query.grad])
        model.zero_grad()
        return results

    @torch.no_grad()
    def forward():
        return [called(tokens, use_cache=False).logits]

    @torch.no_grad()
    def prefill():
        return [called(prompt, use_cache=True, logits_to_keep=1).logits]

    @torch.no_grad()
    def decoding(cache):
        for position in range(args.seq_len - args.new_tokens, args.seq_len):
            here = slice(position, position + 1)
            outputs = called(tokens[:1, here], past_key_values=cache, use_cache=True, position_ids=positions[:, here])
        return [outputs.logits]

    def for_training():
        model.train()
        return ()

    def for_inference():
        model.eval()
        return ()

    @torch.no_grad()
    def for_decoding():
        model.eval()
        if static_cache is not None:
            static_cache.reset()
        prompt = tokens[:1, : args.seq_len - args.new_tokens]
        outputs = model(prompt, past_key_values=static_cache, use_cache=True, logits_to_keep=1)
        return (outputs.past_key_values,)

    prompt = torch.randint(args.vocab_size, (1, args.prompt_len), generator=torch.Generator().manual_seed(2)).to(
        tokens.device
    )
    positions = torch.arange(args.seq_len, device=tokens.device)[None]
    static_cache = StaticCache(model.config, max_cache_len=args.seq_len) if compiled and case == "decoding" else None
    return {
        "training": Call(training, for_training),
        "forward": Call(forward, for_inference),
        "prefill": Call(prefill, for_inference),
        "decoding": Call(decoding, for_decoding),
    }[case]


def compile_all(case: str, models, calls: dict[str, Call], tokens, args, errors, failed: dict[str, str]) -> dict:
    """Seconds of each model's first call, in which it is compiled, with nothing kept from before.

    Notes in `failed` which compiled models differ from themselves as they are.
    """
    seconds = {}
    torch.compile(lambda tensor: tensor + 1)(tokens)  # imports the compiler
    for name, model in models.items():
        with failure_noted(name, failed):
            with fresh_compiler_cache():
                seconds[name] = timed(calls[name], args.device)
            if name == "stock":
                continue
            call = model_call(case, model, tokens, args, compiled=False)
            exact = [value.double() for value in call.run(*call.prepare())]
            error = relative_error(calls[name].run(*calls[name].prepare()), exact)
            # each of them may be that far from float64
            bound = max(4 * args.tolerance * errors[f"{name.split()[0]} eager"], 1e-4)
            if not error <= bound:
                failed[name] = f"it is wrong when compiled: error {error:.1e}, at most {bound:.1e}"
    return seconds


def model_rows(args, not_timed: dict[str, str], compiled: bool, with_bound: bool) -> Iterator[list[dict]]:
    """For each case, a row for each variant.

    Args:
        not_timed: receives what is wrong or fails, and why.
        with_bound: as of [`new_models`].
    """
    models = new_models(args, with_bound)
    errors = check_models(models, args, not_timed)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(args.vocab_size, (args.batch_size, args.seq_len), generator=generator).to(args.device)
    shape = f"d {args.hidden_size}, {args.layers} layers, {args.blocks} blocks, {args.batch_size} x {args.seq_len}"
    num_tokens = {"prefill": args.prompt_len, "decoding": args.new_tokens}
    models = {name: model for name, model in models.items() if name not in not_timed}
    for case in args.cases:
        failed, first_seconds = {}, {}
        if compiled:
            torch._dynamo.reset()
            torch._dynamo.config.recompile_limit = 8 * len(models)  # all share the code of their forward
        calls = {name: model_call(case, model, tokens, args, compiled) for name, model in models.items()}
        if compiled:
            first_seconds = compile_all(case, models, calls, tokens, args, errors, failed)
        calls = {name: call for name, call in calls.items() if name not in failed}
        seconds = interleaved(calls, args, f"{case}, {shape}", failed)
        not_timed |= {f"{name}, {case}": reason for name, reason in failed.items()}
        if "stock" not in seconds:
            continue
        yield [
            {
                "case": case,
                "variant": name,
                "compiled": compiled,
                "family": args.family,
                **{key: getattr(args, key) for key in MODEL_SHAPE},
                "new_tokens": args.new_tokens,
                **({"first_call_seconds": first_seconds[name]} if compiled else {}),
                "seconds": quartiles(values),
                "ratio": quartiles([a / b for a, b in zip(values, seconds["stock"])]),
                "tokens_per_second": num_tokens.get(case, tokens.numel()) / statistics.median(values),
                "peak_memory_bytes": peak_memory(calls[name], args.device),
                "relative_error": errors.get(name),
            }
            for name, values in seconds.items()
        ]


# --- Operators


def block_of_reads(implementation: str, mode: str, sources, outputs, products) -> tuple[torch.Tensor, ...]:
    """What the sublayers of a block read: the closed sources and, of what the block has written so far, the sum
    (Block) or everything (Full)."""
    read = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(implementation)
    closed_reads = []
    if isinstance(read, TwoPhaseDepthAttention) and read.pays_phase_1(sources, products):
        closed_reads = read.phase_1(sources, products, 1e-6)
    mixed, written = [], ()
    for sublayer, output in enumerate(outputs):
        if not closed_reads:
            mixed.append(read((*sources, *written), products[sublayer], 1e-6, 1)[0])
        else:
            mixed.append(read.merge(closed_reads[sublayer], (*sources, *written), products[sublayer], 1e-6, 1)[0])
        written = (written[0] + output,) if mode == "block" and written else (*written, output)
    return tuple(mixed)


def closed_reads(implementation: TwoPhaseDepthAttention, sources, products) -> list[ClosedDepthRead]:
    """Phase 1 as a model does it whose norms are fused and that nobody looks into."""
    return implementation.phase_1(sources, products, 1e-6, watched=False, rounded=True)


def step(implementation: str, sources, outputs, product, norm, closed_read: ClosedDepthRead = NOTHING_READ):
    """What a model does between two sublayers inside a block: the last output joins the open sum, which is merged into
    the read, which is normalised. Returns the normalised read and the sum."""
    depth_attention = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(implementation)
    place = DepthPlace(row=2, num_closed_sources=len(sources), num_sources=len(sources) + 1, eps=1e-6, scale=1)
    results = depth_attention.read(place, product, (*sources, *outputs[:2]), norm, closed_read, watched=False)
    _, _, normed, (*_, total) = results
    return normed, total


def plain_residual(sources, outputs) -> tuple[torch.Tensor, ...]:
    """What sublayers read without depth attention."""
    hidden_states = [sources[0]]
    for output in outputs[:-1]:
        hidden_states.append(hidden_states[-1] + output)
    return tuple(hidden_states[1:])


def traffic_by_formula(mode: str, implementation: str, sources: int, sublayers: int) -> float:
    """Numbers, in units of the hidden size, that a sublayer's read moves to or from memory per token.

    Two phases, as in the paper's table: Block `N / S + 5`, with N closed sources and S sublayers in the block; Full
    `S + N`, with N blocks of S sublayers, of which this is the last. One read after the other, by our own count, which
    is the least that this takes: n sources are read for their scores and again for the mix, which is written, and in
    Block each output is added to the sum. What more eager PyTorch moves are intermediate results.
    """
    if isinstance(ALL_DEPTH_ATTENTION_FUNCTIONS[implementation], TwoPhaseDepthAttention):
        return sources / sublayers + 5 if mode == "block" else sublayers + sources / sublayers + 1
    if mode == "full":
        return 2 * (sources + (sublayers - 1) / 2) + 1
    sums = max(0, sublayers - 2) / sublayers
    return 2 * (sources + (sublayers - 1) / sublayers) + 1 + 3 * sums


class Operator(NamedTuple):
    case: str
    variant: str
    what: str  # "forward" or "forward and backward"
    run: Callable
    formula: float | None  # numbers moved, in units of the hidden size, per token and sublayer
    sublayers: int  # that one call does
    error: float | None  # relative, of results and gradients


def random_inputs(args, batch_size: int, seq_len: int):
    """The closed sources, the outputs of the sublayers, products of the reads, and gradients of the results."""
    generator = torch.Generator(args.device).manual_seed(0)

    def random_tensors(count, *shape, dtype):
        tensors = [torch.randn(*shape, generator=generator, device=args.device) for _ in range(count)]
        return [tensor.to(dtype).requires_grad_() for tensor in tensors]

    shape, dtype = (batch_size, seq_len, args.hidden_size), getattr(torch, args.dtype)
    products = torch.randn(args.sublayers, args.hidden_size, generator=generator, device=args.device)
    return (
        random_tensors(args.sources, *shape, dtype=dtype),
        random_tensors(args.sublayers, *shape, dtype=dtype),
        (products / args.hidden_size**0.5).requires_grad_(),
        [tensor.detach() for tensor in random_tensors(args.sublayers, *shape, dtype=dtype)],
    )


def check_operators(args, not_timed: dict[str, str]) -> dict[str, float]:
    """The relative error, against float64, of the results and gradients of each operator, by mode or "step" and
    implementation."""
    inputs = random_inputs(args, 2, 40)
    double = [[t.detach().double().requires_grad_() for t in group] for group in inputs[:2]]
    double += [inputs[2].detach().double().requires_grad_(), [t.double() for t in inputs[3]]]

    def block(mode, name, sources, outputs, products, gradients):
        mixed = block_of_reads(name, mode, sources, outputs, products)
        inputs = (*sources, *outputs[:-1], products)  # nobody reads the last output
        return [*mixed, *torch.autograd.grad(mixed, inputs, gradients)]

    def one_step(mode, name, sources, outputs, products, gradients):
        is_exact = products.dtype == torch.float64  # in which Llama's norm rounds
        norm_class = torch.nn.RMSNorm if is_exact else LlamaRMSNorm
        norm = norm_class(args.hidden_size, eps=1e-6).to(args.device, sources[0].dtype)
        implementation, closed_read = ALL_DEPTH_ATTENTION_FUNCTIONS[name], NOTHING_READ
        if isinstance(implementation, TwoPhaseDepthAttention):
            closed_read = closed_reads(implementation, sources, products)[0]
        results = step(name, sources, outputs, products[0], norm, closed_read)
        inputs = (*sources, *outputs[:2], products, norm.weight)
        return [*results, *torch.autograd.grad(results, inputs, gradients[:2])]

    errors = {}
    for what in [*args.modes, *(["step"] if args.sublayers > 1 else [])]:
        computed = one_step if what == "step" else block
        exact = computed(what, "eager", *double)
        found = {"eager": relative_error(computed(what, "eager", *inputs), exact)}
        for name in args.implementations:
            with failure_noted(f"{what} {name}", not_timed):
                found[f"{what} {name}"] = relative_error(computed(what, name, *inputs), exact)
        check(found, "eager", args.tolerance, not_timed)
        errors |= {name: error for name, error in found.items() if name not in not_timed}
    return errors


def operators(args, errors: dict[str, float], phases: bool) -> list[Operator]:
    """Everything that is timed on one shape, besides the copy: what has an error, which is small enough."""
    names = [(mode, name) for mode in args.modes for name in args.implementations if f"{mode} {name}" in errors]
    sources, outputs, products, gradients = random_inputs(args, args.batch_size, args.seq_len)
    differentiated = (*sources, *outputs[:-1], products)

    def both(case, variant, run, inputs, gradients, formula, formula_backward, sublayers):
        error = errors.get(variant.replace("block", "step") if case == "step" else variant)

        def run_backward():
            torch.autograd.grad(run(), inputs, gradients)

        backward = None if formula_backward is None else formula + formula_backward
        return [
            Operator(case, variant, "forward", torch.no_grad()(run), formula, sublayers, error),
            Operator(case, variant, "forward and backward", run_backward, backward, sublayers, error),
        ]

    found = []
    if args.sublayers > 1:
        found = both(
            "block of reads",
            "plain residual",
            lambda: plain_residual(sources, outputs),
            (sources[0], *outputs[:-1]),
            gradients[1:],
            3,
            None,
            args.sublayers - 1,
        )
    for mode, name in names:
        found += both(
            "block of reads",
            f"{mode} {name}",
            lambda mode=mode, name=name: block_of_reads(name, mode, sources, outputs, products),
            differentiated,
            gradients,
            traffic_by_formula(mode, name, args.sources, args.sublayers),
            None,
            args.sublayers,
        )
    for mode, name in names if phases else ():
        implementation = ALL_DEPTH_ATTENTION_FUNCTIONS[name]
        if mode == "full" or not isinstance(implementation, TwoPhaseDepthAttention):
            continue
        with torch.no_grad():
            closed = closed_reads(implementation, sources, products)
        wide = closed[0].mixed.element_size() / sources[0].element_size()  # results of phase 1 may be in float32
        per_read = args.sources / args.sublayers

        def phase_1(implementation=implementation):
            return tuple(read.mixed for read in closed_reads(implementation, sources, products))

        # forward: sources read, results written; backward: sources and gradients of the results read, those of the
        # sources written
        found += both(
            "phase 1",
            f"block {name}",
            phase_1,
            (*sources, products),
            [gradient.to(closed[0].mixed.dtype) for gradient in gradients],
            per_read + wide,
            2 * per_read + wide,
            args.sublayers,
        )
        if f"step {name}" not in errors:
            continue
        norm = LlamaRMSNorm(args.hidden_size).to(args.device, sources[0].dtype)
        before = [tensor.detach().requires_grad_() for tensor in (closed[0].mixed, closed[0].lse)]
        closed_read = ClosedDepthRead(*before, closed[0].weights, len(sources))
        # forward: sum, output and the result of phase 1 read, sum and normalised read written; backward: gradients of
        # these two, the sum and the result of phase 1 read, gradients of the sum (which is the output's) and of the
        # result of phase 1 written
        found += both(
            "step",
            f"block {name}",
            lambda name=name, norm=norm, read=closed_read: step(name, sources, outputs, products[0], norm, read),
            (*outputs[:2], *before, products, norm.weight),
            gradients[:2],
            4 + wide,
            4 + 2 * wide,
            1,
        )
    return found


def as_graph(run: Callable, pool) -> Callable:
    """Replays a call as a CUDA graph, without what Python takes to start its kernels."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def operator_rows(args, not_timed: dict[str, str], phases: bool) -> Iterator[list[dict]]:
    """A row for each operator, variant and pass; see [`model_rows`].

    Args:
        phases: whether the phases are timed by themselves too.
    """
    errors = check_operators(args, not_timed)
    found = {f"{o.case}, {o.variant}, {o.what}": o for o in operators(args, errors, phases)}
    originals, _, _, _ = random_inputs(args, args.batch_size, args.seq_len)
    originals = [tensor.detach() for tensor in originals]
    copies = [torch.empty_like(tensor) for tensor in originals]

    def copy_all():
        for target, source in zip(copies, originals):
            target.copy_(source)

    runs = {"copy": copy_all, **{name: operator.run for name, operator in found.items()}}
    graphs = set()
    if args.device == "cuda":
        pool = torch.cuda.graph_pool_handle()
        for name, run in runs.items():
            with failure_noted(name, {}):
                runs[name] = as_graph(run, pool)
                graphs.add(name)
    failed = {}
    calls = {name: Call(run) for name, run in runs.items()}
    least_seconds = LEAST_SECONDS if args.device == "cuda" else 0
    what = f"reads, d {args.hidden_size}, {args.sources} sources, {args.sublayers} sublayers, "
    seconds = interleaved(calls, args, f"{what}{args.batch_size} x {args.seq_len}", failed, least_seconds)
    not_timed |= {f"{name}, d {args.hidden_size}": reason for name, reason in failed.items()}
    # the time that moving hidden_size numbers per token takes
    of_copy = statistics.median(seconds.pop("copy")) / (2 * len(originals))
    size = originals[0].numel() * originals[0].element_size()
    rows = []
    for name, values in seconds.items():
        operator = found[name]
        traffic = statistics.median(values) / of_copy / operator.sublayers
        share = None if operator.formula is None else operator.formula / traffic
        rows.append(
            {
                "case": operator.case,
                "variant": operator.variant,
                "pass": operator.what,
                **{key: getattr(args, key) for key in OPERATOR_SHAPE},
                "seconds": quartiles(values),
                "traffic": traffic,
                "traffic_by_formula": operator.formula,
                "gigabytes_per_second": None if share is None else share * size / of_copy / 1e9,
                "copy_gigabytes_per_second": size / of_copy / 1e9,
                "share_of_copy": share,
                "cuda_graph": name in graphs,
                "relative_error": operator.error,
            }
        )
    yield rows
