# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""What the workers of the stages `correctness` and `checks` of benchmarks/gpu.py do: every kernel against float64,
models against themselves, and the tests that need a GPU."""

import copy
import importlib.util
import os
import subprocess
import sys
from contextlib import contextmanager

import torch
import transformers
from benchmark_cases import as_graph
from gpu_worker import BENCHMARKS, Gate, first_line, settings, waiting_compile

import attnres  # noqa: F401  registers the classes
from attnres_kernels.fused import MOST_READS, closed_reads, depth_step
from depth_attention_attnres import ALL_DEPTH_ATTENTION_FUNCTIONS, eager_depth_attention, joined


sys.path.insert(0, str(BENCHMARKS.parent / "tests"))

MOST_NUMBERS = 1 << 24  # of all sources
KEY_EPS, NORM_EPS, SCALE = 1e-2, 1e-1, 3.0  # both eps far from what rounding could hide
TOLERANCE = 1.1  # of errors, times those of the readable formula in the same dtype
FEW = 1000  # numbers, of which chance decides how far off they are
# of the mean error of a model's logits and gradients, times that of the readable formula in the same dtype
ROOM = {torch.float32: 10, torch.bfloat16: 1.5}


GATE = None  # which checks of models enter; those of kernels run before anything is timed


def relative(value: torch.Tensor, exact: torch.Tensor) -> float:
    size = exact.norm().item()
    return ((value.double() - exact).norm() / (size or 1)).item()


def compare(what: str, dtype: torch.dtype, found, readable, exact, tolerance: float = TOLERANCE) -> list[dict]:
    """How far results are from exact ones, and how far they may be: as far as the readable formula, up to rounding in
    float32, and where there are few numbers up to one rounding in the dtype of the tensors."""
    rows = []
    for index, (ours, theirs, true) in enumerate(zip(found, readable, exact, strict=True)):
        if ours.shape != true.shape:
            raise ValueError(f"{what}: result {index} is {tuple(ours.shape)}, not {tuple(true.shape)}")
        error, of_readable = relative(ours, true), relative(theirs, true)
        bound = tolerance * of_readable + 1e-5 + (true.numel() < FEW) * torch.finfo(dtype).eps
        rows.append({"what": f"{what}, result {index}", "error": error, "readable": of_readable, "bound": bound})
    return rows


def run_task(check: str, **arguments) -> list[dict]:
    global GATE
    GATE = GATE or Gate()
    transformers.utils.logging.set_verbosity_error()
    try:
        return globals()[check](**arguments)
    finally:
        GATE.leave()
        if settings().device == "cuda":
            torch.cuda.empty_cache()


def random_tensors(dtype, *shapes, std=1.0, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator(settings().device).manual_seed(seed)
    return [
        (std * torch.randn(shape, generator=generator, device=settings().device)).to(dtype).requires_grad_()
        for shape in shapes
    ]


def doubles(tensors) -> list[torch.Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in tensors]


def with_gradients(results, inputs) -> list[torch.Tensor]:
    """Results, and gradients of a sum of them with random weights that all dtypes have."""
    generator = torch.Generator(settings().device).manual_seed(7)
    weights = [
        torch.randn(result.shape, generator=generator, device=result.device).bfloat16().to(result.dtype)
        for result in results
    ]
    grads = torch.autograd.grad(results, inputs, weights, allow_unused=True)
    return [
        *[result.detach() for result in results],
        *[torch.zeros_like(t) if g is None else g for g, t in zip(grads, inputs)],
    ]


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def check_closed(hidden_size, tokens, dtype, num_sources, num_reads, rounded):
    dtype = getattr(torch, dtype)
    while tokens > 1 and num_sources * hidden_size * tokens > MOST_NUMBERS:
        tokens //= 2
    what = f"closed reads, d {hidden_size}, {num_sources} sources, {num_reads} reads, {tokens} tokens, {dtype}"
    what += ", rounded" if rounded else ""

    def formula(*inputs):
        *sources, products = inputs
        values = torch.stack(sources).to(compute_dtype(sources[0]))
        scores = torch.einsum("ntd,sd->snt", values, products) * torch.rsqrt(values.pow(2).mean(-1) + KEY_EPS)
        mixed = torch.einsum("snt,ntd->std", scores.softmax(1), values)
        mixed = mixed.to(sources[0].dtype if rounded else values.dtype)
        return [*mixed.unbind(), scores.logsumexp(1), scores.softmax(1)]

    def fused(*inputs):
        *sources, products = inputs
        result_dtype = sources[0].dtype if rounded else torch.float32
        mixed, lse, weights = closed_reads(sources, products, KEY_EPS, result_dtype, return_weights=True)
        return [*mixed, lse, weights]

    inputs = random_tensors(dtype, *[(tokens, hidden_size)] * num_sources)
    inputs += random_tensors(torch.float32, (num_reads, hidden_size), std=2 * hidden_size**-0.5, seed=1)
    exact_inputs = doubles(inputs)
    exact = with_gradients(formula(*exact_inputs), exact_inputs)
    readable, found = (with_gradients(f(*inputs), inputs) for f in (formula, fused))
    # of more reads than one kernel takes, a source's gradient is the sum of two that have been rounded
    return compare(what, dtype, found, readable, exact, (1 if num_reads <= MOST_READS else 1.5) * TOLERANCE)


def score_of(source, product):
    source = source.to(compute_dtype(source))
    return (source * product).sum(-1) * torch.rsqrt(source.pow(2).mean(-1) + KEY_EPS)


def normalised(hidden, gain, dtype):
    """As Llama casts it."""
    return gain * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + NORM_EPS)).to(dtype)


def check_step(hidden_size, tokens, dtype, present):
    dtype, shape = getattr(torch, dtype), (tokens, hidden_size)
    what = f"step with {' '.join(present) or 'nothing'}, d {hidden_size}, {tokens} tokens, {dtype}"
    names = [name for name in ("partial", "output") if name in present]
    tensors = dict(zip(["mixed", *names], random_tensors(dtype, *[shape] * (1 + len(names)))))
    if "gain" in present:
        (tensors["gain"],) = random_tensors(dtype, (hidden_size,), seed=1)
    if "source" not in present:
        (tensors["lse"],) = random_tensors(torch.float32, (tokens,), seed=2)
    if "score" in present:
        (tensors["score"],) = random_tensors(torch.float32, (tokens,), seed=3)
    elif "output" in present:
        (tensors["product"],) = random_tensors(torch.float32, (hidden_size,), std=2 * hidden_size**-0.5, seed=4)

    def formula(mixed, partial=None, output=None, gain=None, lse=None, score=None, product=None):
        hidden, weight = mixed.to(compute_dtype(mixed)), None
        value = output if partial is None else partial + output
        if value is not None:
            score = score_of(value, product) if score is None else score
            weight = torch.sigmoid(score - (score_of(mixed, product) if lse is None else lse))
            hidden = torch.lerp(hidden, value.to(hidden.dtype), weight.unsqueeze(-1))
        hidden = SCALE * hidden
        normed = None if gain is None else normalised(hidden, gain, mixed.dtype)
        wanted = [None if partial is None else value, normed]
        wanted.append(hidden.to(mixed.dtype) if gain is None or "hidden" in present else None)
        return [result for result in (*wanted, weight) if result is not None]

    def fused(mixed, partial=None, output=None, gain=None, lse=None, score=None, product=None):
        step = depth_step(
            partial, output, mixed, lse, product, KEY_EPS, SCALE, gain, NORM_EPS, "hidden" in present, score=score
        )
        wanted = (None if partial is None else step.partial, *step[1:])
        return [result for result in wanted if result is not None]

    exact_tensors = dict(zip(tensors, doubles(tensors.values())))
    exact = with_gradients(formula(**exact_tensors), list(exact_tensors.values()))
    readable, found = (with_gradients(f(**tensors), list(tensors.values())) for f in (formula, fused))
    return compare(what, dtype, found, readable, exact)


@torch.no_grad()
def check_whole_read(hidden_size, tokens, dtype, num_sources, joins):
    """`joins`: whether an output extends the last source (True), is one more (False), or there is none (None)."""
    dtype = getattr(torch, dtype)
    what = f"whole read, d {hidden_size}, {num_sources} sources, output {joins}, {tokens} tokens, {dtype}"
    *sources, output = random_tensors(dtype, *[(1, tokens, hidden_size)] * (num_sources + 1))
    (gain,) = random_tensors(dtype, (hidden_size,), seed=1)
    (product,) = random_tensors(torch.float32, (hidden_size,), std=2 * hidden_size**-0.5, seed=2)
    output = None if joins is None else output

    def formula(sources, product, gain):
        hidden, weights = eager_depth_attention(sources, product, KEY_EPS, SCALE)
        # the norm of what is not rounded, as in the kernel
        exact_sources = tuple(source.to(compute_dtype(source)) for source in sources)
        wide, _ = eager_depth_attention(exact_sources, product, KEY_EPS, SCALE)
        return [normalised(wide, gain, sources[0].dtype), hidden, weights]

    sources_after = tuple(sources) if joins is None else joined((*sources, output), num_sources + (not joins))
    exact = formula(tuple(doubles(sources_after)), product.double(), gain.double())
    partial, *found = torch.ops.attnres.depth_read(
        sources, output, bool(joins), product, KEY_EPS, SCALE, gain, NORM_EPS, True, True
    )
    rows = compare(what, dtype, found, formula(sources_after, product, gain), exact)
    if joins:
        rows.append(equal_row(f"{what}, sum", partial, sources_after[-1]))
    return rows


def equal_row(what: str, found: torch.Tensor, expected: torch.Tensor) -> dict:
    is_equal = torch.equal(found, expected)
    return {"what": f"{what} to the bit", "error": float(not is_equal), "readable": 0.0, "bound": 0.0}


# --- Models


@contextmanager
def unheld(rows: list[dict], what: str):
    """A check that can't run has failed."""
    try:
        yield
    except Exception as error:
        rows.append({"what": f"{what}: {first_line(error)}", "error": float("inf"), "readable": 0.0, "bound": 0.0})


@contextmanager
def noted(rows: list[dict], what: str):
    """Holds the device for one check of many, so that others can measure in between."""
    with unheld(rows, what), GATE():
        yield


def new_model(family: str, mode: str) -> torch.nn.Module:
    """So conditioned that float32 is about 1e-6 from float64. Of the implementation under test."""
    from families import perturb, tiny_config

    sizes = {"num_hidden_layers": 2} if settings().tiny else {"hidden_size": 256, "intermediate_size": 352}
    sizes = {"num_hidden_layers": 3, "attn_res_block_size": 2, "max_position_embeddings": 256} | sizes
    config = tiny_config(family, attn_res_mode=mode, **sizes)
    std = config.initializer_range = config.hidden_size**-0.5
    torch.manual_seed(0)
    model = perturb(transformers.AutoModelForCausalLM.from_config(config), std=0.02)
    torch.nn.init.normal_(model.base_model.depth_attention.query, std=std)  # weights far from even
    if settings().device == "cuda":
        model.set_attn_res_implementation("triton")
    return model.to(settings().device)


def as_eager(model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """A copy with the readable formula."""
    model = copy.deepcopy(model).to(dtype)
    model.set_attn_res_implementation("eager")
    if dtype == torch.float64 and model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # others can't do it on a GPU
    return model


def token_ids(*shape, seed=1):
    if settings().tiny:  # so few that most is left to PyTorch
        shape = (1, shape[1] // 6)
    return torch.randint(3, 67, shape, generator=torch.Generator().manual_seed(seed)).to(settings().device)


def loss_and_gradients(model, input_ids, called=None) -> list[torch.Tensor]:
    model.train().zero_grad()
    outputs = (model if called is None else called)(input_ids, labels=input_ids, use_cache=False)
    outputs.loss.backward()
    return [outputs.logits.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def mean_error(found, exact) -> float:
    return sum(relative(a, b.double()) for a, b in zip(found, exact, strict=True)) / len(exact)


def model_row(what: str, dtype: torch.dtype, found, readable, exact, room: float | None = None) -> dict:
    """How far results of a model are from exact ones on average, and how far they may be: `room` is what comes to the
    error of the readable formula, by default one rounding."""
    error, of_readable = mean_error(found, exact), mean_error(readable, exact)
    bound = ROOM[dtype] * of_readable + (torch.finfo(dtype).eps if room is None else room)
    return {"what": what, "error": error, "readable": of_readable, "bound": bound}


def losses(model, input_ids) -> torch.Tensor:
    """Of some steps of AdamW."""
    optimizer, of_steps = torch.optim.AdamW(model.train().parameters(), lr=1e-3), []
    for _ in range(6):
        loss = model(input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        of_steps.append(loss.item())
    return torch.tensor(of_steps, dtype=torch.float64)


def check_model(family: str, mode: str) -> list[dict]:
    rows, name = [], f"{family} {mode}"
    with GATE():
        model, input_ids = new_model(family, mode), token_ids(2, 48)
        exact = loss_and_gradients(as_eager(model, torch.float64), input_ids)
        readable = loss_and_gradients(as_eager(model, torch.float32), input_ids)
    with noted(rows, what := f"{name}: logits and gradients, float32"):
        rows.append(model_row(what, torch.float32, loss_and_gradients(model, input_ids), readable, exact))
    if not settings().tiny and family != "qwen3_moe":  # in which rounding sends tokens to other experts
        with noted(rows, what := f"{name}: logits and gradients, bfloat16"):
            rounded = copy.deepcopy(model).bfloat16()
            models = (rounded, as_eager(rounded, torch.bfloat16), as_eager(rounded, torch.float64))
            rows.append(model_row(what, torch.bfloat16, *(loss_and_gradients(m, input_ids) for m in models)))
    with noted(rows, what := f"{name}: steps of AdamW"):
        models = (copy.deepcopy(model), as_eager(model, torch.float32), as_eager(model, torch.float64))
        if "triton" in ALL_DEPTH_ATTENTION_FUNCTIONS:
            models[0].set_attn_res_implementation("triton")
        of_models = [losses(m, input_ids) for m in models]
        # six numbers, of which chance decides how far off they are
        rows.append(model_row(what, torch.float32, *([of_model] for of_model in of_models), room=3e-5))
        falls = of_models[0][-1] < of_models[0][0]
        rows.append({"what": f"{what}, loss falls", "error": float(not falls), "readable": 0.0, "bound": 0.0})
    with noted(rows, what := f"{name}: greedy generation"), torch.no_grad():
        model.eval()
        expected = prompt = token_ids(2, 36)
        for _ in range(8):
            following = model(expected, use_cache=False).logits[:, -1].argmax(-1)
            expected = torch.cat([expected, following[:, None]], dim=1)
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        rows.append(equal_row(f"{what}, cached", model.generate(prompt, **options), expected))
        static = model.generate(prompt, cache_implementation="static", disable_compile=True, **options)
        rows.append(equal_row(f"{what}, static cache", static, expected))
    for use_reentrant in (True, False):
        with noted(rows, what := f"{name}: gradient checkpointing, re-entrant {use_reentrant}"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            rows.append(model_row(what, torch.float32, loss_and_gradients(model, input_ids), readable, exact))
    model.gradient_checkpointing_disable()
    usual = model.config._attn_implementation
    with noted(rows, what := f"{name}: the same gradients again"):
        model.set_attn_implementation("eager")  # others aren't deterministic on a GPU
        torch.use_deterministic_algorithms(True, warn_only=True)
        first, second = (loss_and_gradients(model, input_ids) for _ in range(2))
        equal = sum(torch.equal(a, b) for a, b in zip(first, second))
        rows.append({"what": what, "error": float(len(first) - equal), "readable": 0.0, "bound": 0.0})
    torch.use_deterministic_algorithms(False)
    model.set_attn_implementation(usual)
    if settings().device == "cuda" and family != "qwen3_moe":  # whose experts wait for the device
        with noted(rows, what := f"{name}: forward as a CUDA graph"), torch.no_grad():
            rows.append(check_graph(model.eval().bfloat16(), what))
    return rows


def unwaiting_forward(model, input_ids) -> torch.Tensor:
    """Logits, without a look at values on the device. Without a mask, transformers looks whether sequences are
    packed."""
    batch_size, length = input_ids.shape
    mask = torch.full((length, length), torch.finfo(model.dtype).min, dtype=model.dtype, device=input_ids.device)
    mask = mask.triu(1).expand(batch_size, 1, length, length)
    return model(input_ids, attention_mask=mask, use_cache=False).logits


def check_graph(model, what: str) -> dict:
    given, other = token_ids(2, 48), token_ids(2, 48, seed=2)
    logits = []
    replay = as_graph(lambda: logits.append(unwaiting_forward(model, given)), torch.cuda.graph_pool_handle())
    given.copy_(other)
    replay()
    return equal_row(what, logits[-1], unwaiting_forward(model, other))


def check_compiled_training(family: str, mode: str) -> list[dict]:
    rows, compiled = [], waiting_compile(lambda: GATE.enter())
    with GATE():
        model, input_ids = new_model(family, mode), token_ids(2, 48)
        readable, exact = (
            loss_and_gradients(as_eager(model, dtype), input_ids) for dtype in (torch.float32, torch.float64)
        )
    with unheld(rows, what := f"{family} {mode}: compiled training step"):
        found = loss_and_gradients(model, input_ids, compiled(model))
        rows.append(model_row(what, torch.float32, found, readable, exact))
    return rows


@torch.no_grad()
def check_compiled_decoding(family: str, mode: str) -> list[dict]:
    rows, compiled = [], waiting_compile(lambda: GATE.enter())
    with GATE():
        model, input_ids = new_model(family, mode), token_ids(1, 48)
        given = input_ids.shape[1] * 3 // 4
        readable, exact = (
            as_eager(model, dtype)(input_ids, use_cache=False).logits[:, given:]
            for dtype in (torch.float32, torch.float64)
        )
        cache, logits = transformers.StaticCache(model.config, max_cache_len=64), []
        model(input_ids[:, :given], past_key_values=cache, use_cache=True)
    with unheld(rows, what := f"{family} {mode}: compiled decoding"):
        called = compiled(model, mode="reduce-overhead")
        for at in range(given, input_ids.shape[1]):
            positions = torch.tensor([[at]], device=input_ids.device)
            outputs = called(input_ids[:, at : at + 1], past_key_values=cache, use_cache=True, position_ids=positions)
            logits.append(outputs.logits.clone())
        rows.append(model_row(what, torch.float32, [torch.cat(logits, dim=1)], [readable], [exact]))
    return rows


def check_tests() -> list[dict]:
    """The project's own tests that need a GPU, each of which waits for the device."""
    files = ["tests/test_kernels_fused.py", "tests/test_kernels_peers.py"]
    chosen = ["-m", "gpu"] if settings().device == "cuda" else ["-k", "interpreter and test_step and all"]
    command = [sys.executable, "-m", "pytest", "-p", "gpu_pytest", "-p", "no:cacheprovider", "-q", "-rf", *chosen]
    command += ["-n", "6"] if not settings().tiny and importlib.util.find_spec("xdist") else []
    paths = [str(BENCHMARKS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [*command, *files],
        cwd=BENCHMARKS.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout[-20000:], flush=True)
    lines = done.stdout.splitlines()
    failed = [line[:250] for line in lines if line.startswith(("FAILED", "ERROR"))]
    rows = [{"what": f"pytest: {line}", "error": 1.0, "readable": 0.0, "bound": 0.0} for line in failed]
    summary = lines[-1].strip("= ") if lines else "no output"
    is_wrong = done.returncode != 0 and not failed
    return [*rows, {"what": f"pytest: {summary}", "error": float(is_wrong), "readable": 0.0, "bound": 0.0}]
