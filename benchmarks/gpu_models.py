# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The stages `models` and `profile` of benchmarks/gpu.py, and what their workers do: one process for each variant, so
that all compile at the same time; then they take turns."""

import random
import threading
import time
from collections import Counter
from types import SimpleNamespace

import torch
import transformers
from benchmark_cases import (
    MODEL_SHAPE,
    model_call,
    new_models,
    peak_memory,
    quartiles,
    relative_error,
    synchronize,
    timed,
    without_garbage_collection,
)
from gpu_worker import Gate, Results, Worker, WorkerError, first_line, seconds_left, settings, waiting_compile


# the interpreter takes too long for models
OURS = "two_phase" if settings().tiny else "triton"
VARIANTS = ["stock", f"block {OURS}", f"full {OURS}"]
SHAPES = {
    "large": {"family": "llama", "hidden_size": 2048, "layers": 24, "blocks": 8, "heads": 16, "vocab_size": 4096}
    | {"batch_size": 8, "options": {}, "others": ["block eager" if settings().tiny else "block two_phase"]},
    # SmolLM2-135M
    "smollm2": {"family": "llama", "hidden_size": 576, "layers": 30, "blocks": 6, "heads": 9, "vocab_size": 49152}
    | {"batch_size": 8, "others": []}
    | {"options": {"intermediate_size": 1536, "num_key_value_heads": 3, "tie_word_embeddings": True}},
    # Qwen3-0.6B
    "qwen3": {"family": "qwen3", "hidden_size": 1024, "layers": 28, "blocks": 7, "heads": 16, "vocab_size": 151936}
    | {"batch_size": 2, "others": []}
    | {
        "options": {
            "intermediate_size": 3072,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "tie_word_embeddings": True,
        }
    },
}
LENGTHS = {"seq_len": 2048, "prompt_len": 8192, "new_tokens": 32}
EAGER_TOKENS = 8  # are decoded where nothing is compiled
TINY = {"hidden_size": 32, "layers": 2, "blocks": 2, "heads": 2, "vocab_size": 64, "batch_size": 1, "options": {}}
TINY_LENGTHS = {"seq_len": 12, "prompt_len": 16, "new_tokens": 2}
TRAINING, INFERENCE = ("training",), ("prefill", "decoding")
ROUNDS = 8
COMPILE_SECONDS = 240  # a variant that isn't compiled by then is left out


def shape_arguments(shape: str) -> SimpleNamespace:
    chosen = SHAPES[shape] | LENGTHS
    if settings().tiny:
        chosen |= TINY | TINY_LENGTHS
    is_cuda = settings().device == "cuda"
    return SimpleNamespace(**chosen, device=settings().device, dtype="bfloat16" if is_cuda else "float32")


def arguments_of(args: SimpleNamespace, compiled: bool) -> SimpleNamespace:
    """Of a call, by those of the shape."""
    return args if compiled else SimpleNamespace(**{**vars(args), "new_tokens": min(args.new_tokens, EAGER_TOKENS)})


# --- In the workers


class State:
    """What a worker holds: its model, and what it calls by case and whether it is compiled."""

    gate = model = args = tokens = noise = None
    calls = {}


def small(args) -> tuple:
    """Arguments and tokens of a few hundred tokens."""
    tokens = State.tokens[:1, :512]
    return SimpleNamespace(**{**vars(args), "batch_size": 1, "seq_len": tokens.shape[1]}), tokens


def build(shape: str, variant: str):
    transformers.utils.logging.set_verbosity_error()
    State.gate = State.gate or Gate()
    args = State.args = shape_arguments(shape)
    mode, _, implementation = variant.partition(" ")
    args.modes, args.implementations = ([], []) if variant == "stock" else ([mode], [implementation])
    with State.gate():
        State.model = new_models(args)[variant]
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(args.vocab_size, (args.batch_size, args.seq_len), generator=generator)
        State.tokens = tokens.to(args.device)
        few_args, few_tokens = small(args)
        call = model_call("training", State.model, few_tokens, few_args, compiled=False)
        found = call.run(*call.prepare())
        if implementation == OURS:  # how far rounding in another order goes
            State.model.set_attn_res_implementation("eager")
            State.noise = relative_error(call.run(), [value.double() for value in found])
            State.model.set_attn_res_implementation(implementation)
        empty_cache()


def empty_cache():
    if State.args.device == "cuda":
        torch.cuda.empty_cache()


def compile_case(case: str):
    """Compiles a case and runs it until it is warm; compares it with itself as it is.

    Its first run is alone on the device, as the compiler then tries out variants of its kernels.
    """
    entered, started = [], time.perf_counter()

    def enter():
        if not entered:
            State.gate.enter(alone=True)
            entered.append(time.perf_counter())

    call = model_call(case, State.model, State.tokens, State.args, True, waiting_compile(enter))
    try:
        with State.gate():
            arguments = call.prepare()
        call.run(*arguments)
        compiled = entered[0]
        for _ in range(2):  # where CUDA graphs are used, the second call captures
            found = [value.double() for value in call.run(*call.prepare())]
        synchronize(State.args.device)
        first_seconds = time.perf_counter() - compiled
        plain = case_call(case, False)
        exact = [value.double() for value in plain.run(*plain.prepare())]
        difference = relative_error(found, exact)
        del found, exact
        empty_cache()
    finally:
        State.gate.leave()
    State.calls[case, True] = call
    result = {"compile_seconds": compiled - started, "first_seconds": first_seconds, "difference": difference}
    if State.noise is not None:
        result["most_difference"] = max(4.4 * State.noise, 1e-4)
        if not difference <= result["most_difference"]:
            raise ValueError(
                f"it is wrong when compiled: differs by {difference:.1e}, at most {result['most_difference']:.1e}"
            )
    return result


def case_call(case: str, compiled: bool):
    if (case, compiled) not in State.calls:
        args = arguments_of(State.args, compiled)
        State.calls[case, compiled] = model_call(case, State.model, State.tokens, args, compiled)
    return State.calls[case, compiled]


def turn(case: str, compiled: bool) -> float:
    """Seconds of a call after another."""
    call, device = case_call(case, compiled), State.args.device
    with without_garbage_collection():
        timed(call, device)
        seconds = timed(call, device)
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 1.5 * torch.cuda.memory_reserved():
        torch.cuda.empty_cache()  # there is no room for the next one
    return seconds


def peak(case: str, compiled: bool) -> int:
    bytes_needed = peak_memory(case_call(case, compiled), State.args.device)
    empty_cache()
    return bytes_needed


def profile_case(case: str, compiled: bool) -> dict:
    """The kernels of a call that take most of the device's time."""
    device = State.args.device
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with State.gate(alone=True):
        call = case_call(case, compiled)
        for _ in range(2):
            call.run(*call.prepare())
        arguments = call.prepare()
        synchronize(device)
        with torch.profiler.profile(activities=activities) as profile:
            call.run(*arguments)
            synchronize(device)
        empty_cache()
    calls, micros = Counter(), Counter()
    for event in profile.events():
        is_kernel = event.device_type == torch.autograd.DeviceType.CUDA
        if is_kernel == (device == "cuda") and not event.is_user_annotation:
            calls[event.name] += 1
            micros[event.name] += event.self_device_time_total if is_kernel else event.self_cpu_time_total
    total = sum(micros.values())
    ours = [name for name in micros if name.lstrip("_").startswith(OUR_KERNELS)]
    return {
        "ms": total / 1e3,
        "kernels": [
            {"name": name[:90], "calls": calls[name], "ms": value / 1e3, "share": value / total}
            for name, value in micros.most_common(15)
        ],
        "ours": [
            {"name": name, "calls": calls[name], "ms": micros[name] / 1e3, "share": micros[name] / total}
            for name in ours
        ],
        "ours_ms": sum(micros[name] for name in ours) / 1e3,
    }


OUR_KERNELS = ("closed_", "held_", "split_products", "products_backward", "step_", "read_forward", "fill_", "attnres::")


# --- In the stages


class Variant:
    """A worker of one variant, and what it has been told and has not answered."""

    def __init__(self, shape: str, name: str, cases: tuple[str, ...]):
        self.shape, self.name, self.cases = shape, name, cases
        self.worker, self.sent, self.done = Worker("gpu_models"), [], {}
        self.is_gone = False

    def send(self, key: str, function: str, **arguments):
        self.sent.append(key)
        self.worker.send(function, **arguments)

    def collect(self, timeout: float, results: Results):
        """Takes answers; the reason is noted where something failed."""
        until = time.monotonic() + timeout
        while self.sent and not (self.worker.replies.empty() and time.monotonic() >= until):
            key = self.sent[0]
            try:
                self.done[key] = self.worker.receive(until - time.monotonic())
                self.sent.pop(0)
            except WorkerError as error:
                self.sent.pop(0)
                results.fail(f"{self.shape}, {self.name}: {key}: {error}")
                if error.is_gone or key == "build":
                    self.close()

    def close(self):
        self.is_gone, self.sent = True, []
        self.worker.close()


class ShapeRun(threading.Thread):
    """The cases of one shape. `compiled` is set when the next may start to compile."""

    def __init__(self, shape: str, results: Results, before: "ShapeRun | None"):
        super().__init__(daemon=True)
        self.shape, self.results, self.before = shape, results, before
        self.args, self.gate = shape_arguments(shape), Gate()
        self.compiled, self.shuffle = threading.Event(), random.Random(0).shuffle

    def run(self):
        try:
            if self.before is not None:
                self.before.compiled.wait()
            self.measure()
        except Exception as error:
            self.results.fail(f"{self.shape}: {first_line(error)}")
            raise
        finally:
            self.compiled.set()

    def measure(self):
        results, is_eager = self.results, self.shape in settings().eager_shapes
        training = [Variant(self.shape, name, TRAINING) for name in VARIANTS + self.args.others]
        inference = [] if is_eager else [Variant(self.shape, name, INFERENCE) for name in VARIANTS]
        variants = training + inference
        for variant in variants:
            variant.send("build", "build", shape=self.shape, variant=variant.name)
            if not is_eager and variant.name in VARIANTS:
                self.send_compile(variant)
        compiled = [] if is_eager else [(case, True) for case in TRAINING + INFERENCE]
        cases = compiled + [(case, False) for case in TRAINING + (() if is_eager else INFERENCE)]
        until = time.monotonic() + COMPILE_SECONDS
        while cases:
            late = time.monotonic() > until
            for variant in variants:
                variant.collect(0, results)
                if late and variant.sent:
                    results.fail(f"{self.shape}, {variant.name}: {variant.sent[0]}: not within {COMPILE_SECONDS} s")
                    variant.close()
            if not any(variant.sent for variant in variants):
                self.compiled.set()
            busy = {case for variant in variants if variant.sent for case in variant.cases}
            ready = [case for case in cases if case[0] not in busy]
            if ready:
                cases.remove(ready[0])
                self.time(*ready[0], variants)
            else:
                time.sleep(0.05)
        for variant in variants:
            variant.close()

    def send_compile(self, variant: Variant):
        for case in variant.cases:
            variant.send(f"compile {case}", "compile_case", case=case)

    def time(self, case: str, compiled: bool, variants: list[Variant]):
        """Lets the variants take turns in an order drawn anew for each round, and adds a row for each."""
        args, what = arguments_of(self.args, compiled), f"{case}, {'compiled' if compiled else 'eager'}"
        seconds, peaks = {}, {}
        runs = [v for v in variants if case in v.cases and not v.is_gone]
        runs = [v for v in runs if not compiled or f"compile {case}" in v.done]
        if not runs:
            return
        with self.gate(alone=True):
            for number in range(2 if settings().tiny else ROUNDS):
                if number >= 3 and seconds_left() < 5:
                    break
                self.shuffle(runs)
                for variant in list(runs):
                    try:
                        found = variant.worker.call("turn", 60, case=case, compiled=compiled)
                        if number == 0 and case == "training":
                            peaks[variant.name] = variant.worker.call("peak", 60, case=case, compiled=compiled)
                        seconds.setdefault(variant.name, []).append(found)
                    except WorkerError as error:
                        self.results.fail(f"{self.shape}, {variant.name}: {what}: {error}")
                        runs.remove(variant)
                        seconds.pop(variant.name, None)
                        if error.is_gone:
                            variant.close()
            for variant in runs:
                variant.worker.call("empty_cache", 60)
        tokens = {"prefill": args.prompt_len, "decoding": args.new_tokens}.get(case, args.batch_size * args.seq_len)
        by_name = {variant.name: variant.done for variant in runs}
        stock = seconds.get("stock")
        self.results.add(
            "rows",
            *(
                {
                    "shape": self.shape,
                    "case": case,
                    "compiled": compiled,
                    "variant": name,
                    "family": args.family,
                    **{key: getattr(args, key) for key in MODEL_SHAPE},
                    "new_tokens": args.new_tokens,
                    "itemsize": getattr(torch, args.dtype).itemsize,
                    "seconds": quartiles(values),
                    "ratio": stock and quartiles([a / b for a, b in zip(values, stock)]),
                    "tokens_per_second": tokens / quartiles(values)[1],
                    "peak_memory_bytes": peaks.get(name),
                    "rounds": len(values),
                    **(by_name[name].get(f"compile {case}", {}) if compiled else {}),
                }
                for name, values in sorted(seconds.items(), key=lambda item: (VARIANTS + args.others).index(item[0]))
            ),
        )


def models(results: Results):
    """Ratios to stock models."""
    names = settings().shapes or (["large", "qwen3"] if settings().tiny else list(SHAPES))
    before, runs = None, []
    for name in names:
        is_eager = name in settings().eager_shapes
        run = ShapeRun(name, results, None if is_eager else before)
        before = before if is_eager else run
        runs.append(run)
        run.start()
    for run in runs:
        run.join()


def profile(results: Results):
    """Where a training step spends the device's time."""
    variants = [Variant("large", name, TRAINING) for name in VARIANTS[:2]]
    for variant in variants:
        variant.send("build", "build", shape="large", variant=variant.name)
        variant.send("eager", "profile_case", case="training", compiled=False)
        variant.send("compile", "compile_case", case="training")
        variant.send("compiled", "profile_case", case="training", compiled=True)
    while any(variant.sent for variant in variants):
        for variant in variants:
            variant.collect(0, results)
            for key in [key for key in ("eager", "compiled") if key in variant.done]:
                results.add("profiles", {"variant": variant.name, "what": key, **variant.done.pop(key)})
        time.sleep(0.05)
    for variant in variants:
        variant.close()
