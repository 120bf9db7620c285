# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python scripts/benchmark.py --output outputs/benchmark

Measures what Attention Residuals cost: a stock model of transformers against AttnRes models of the same shape with each
implementation of depth attention, in a training step (forward and backward), a forward and cached decoding.

All variants run in turn, in an order drawn anew for each round, in one process; a ratio is that of two times of the
same round, and medians and quartiles over rounds are reported. What is further from a float64 model than the readable
implementation is not timed. `--operators` times the reads of a whole block alone, and `--vary hidden_size=128,512`
repeats the measurement with other shapes and draws the overhead. Results are JSON rows, a table and a figure; the last
line of the output is JSON.
"""

import argparse
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tqdm import tqdm
from training_run import RunError, plt, table, versions, write_json, write_text
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, StaticCache

import attnres  # noqa: F401, registers its classes
from configuration_attnres import attn_res_config_class
from modeling_attnres import ALL_DEPTH_ATTENTION_FUNCTIONS, TwoPhaseDepthAttention


CASES = ("training", "forward", "decoding")
SHAPE = ("family", "hidden_size", "layers", "blocks", "heads", "vocab_size", "batch_size", "seq_len")


def synchronize(device: str):
    if device == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable, device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - started


def interleaved(functions: dict[str, Callable], rounds: int, device: str, what: str) -> dict[str, list[float]]:
    """Seconds of each function in each round. The first round, which warms up, doesn't count."""
    seconds, order = {name: [] for name in functions}, list(functions)
    shuffle = random.Random(0).shuffle
    for round_ in tqdm(range(rounds + 1), desc=what, disable=not sys.stderr.isatty()):
        shuffle(order)
        for name in order:
            duration = timed(functions[name], device)
            if round_:
                seconds[name].append(duration)
    return seconds


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3


def peak_memory(function: Callable, device: str) -> int:
    """Bytes of tensors that a call needs at most, beyond what there is before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    total = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).abs().max() / exact.abs().max()).item()


def check(errors: dict[str, float], eager: str):
    """Raises unless every error is at most 1.1 times that of the readable implementation, or rounding in float32."""
    for name, error in errors.items():
        if not error <= max(1.1 * errors[eager], 1e-5):
            raise RunError(f"{name} is wrong and not timed: error {error:.1e}, that of {eager} {errors[eager]:.1e}.")


# --- Models


def new_models(args) -> dict[str, torch.nn.Module]:
    """The stock model and, with its weights, an AttnRes model for each mode and implementation."""
    shape = {
        "vocab_size": args.vocab_size,
        "hidden_size": args.hidden_size,
        "intermediate_size": 8 * args.hidden_size // 3 // 32 * 32,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_key_value_heads": args.heads,
        "max_position_embeddings": args.seq_len + args.new_tokens,
    }
    options = {"dtype": getattr(torch, args.dtype)}
    torch.manual_seed(0)
    models = {"stock": AutoModelForCausalLM.from_config(CONFIG_MAPPING[args.family](**shape), **options)}
    block_size = -(-args.layers // args.blocks)
    for mode in args.modes:
        for implementation in args.implementations:
            config = attn_res_config_class(args.family)(
                **shape, attn_res_mode=mode, attn_res_block_size=block_size, attn_res_implementation=implementation
            )
            model = AutoModelForCausalLM.from_config(config, **options)
            model.load_state_dict(models["stock"].state_dict(), strict=False)
            generator = torch.Generator().manual_seed(0)
            query = model.base_model.depth_attention.query.data
            query.copy_(torch.randn(query.shape, generator=generator) / args.hidden_size**0.5)  # weights far from even
            models[f"{mode} {implementation}"] = model
    return {name: model.to(args.device) for name, model in models.items()}


def check_models(models: dict[str, torch.nn.Module], args) -> dict[str, float]:
    """The largest relative error of logits and query gradients, against float64, of each AttnRes model."""
    tokens = torch.randint(args.vocab_size, (2, 48), generator=torch.Generator().manual_seed(1)).to(args.device)

    def logits_and_gradient(model):
        model.train().zero_grad()
        outputs = model(tokens, labels=tokens, use_cache=False)
        outputs.loss.backward()
        gradient = model.base_model.depth_attention.query.grad
        model.zero_grad()
        return outputs.logits.detach(), gradient

    errors = {}
    for mode in args.modes:
        exact_model = copy.deepcopy(models[f"{mode} {args.implementations[0]}"]).double()
        exact_model.set_attn_res_implementation("eager")
        exact = logits_and_gradient(exact_model)
        names = [f"{mode} {implementation}" for implementation in args.implementations]
        readable = exact_model.to(models[names[0]].dtype)
        readable.load_state_dict(models[names[0]].state_dict())
        found = {f"{mode} eager": readable, **{name: models[name] for name in names}}
        found = {name: logits_and_gradient(model) for name, model in found.items()}
        of_mode = {name: max(map(relative_error, values, exact)) for name, values in found.items()}
        check(of_mode, f"{mode} eager")
        errors.update(of_mode)
    return errors


def training_step(model, tokens):
    model.train()
    model(tokens, labels=tokens, use_cache=False).loss.backward()
    model.zero_grad()


@torch.no_grad()
def forward(model, tokens):
    model.eval()(tokens, use_cache=False)


@torch.no_grad()
def decoder(model, config, tokens, args) -> Callable:
    """A call that decodes `--new-tokens` tokens one by one after a prompt that is in the cache."""
    model.eval()

    @torch.no_grad()
    def decode(tokens=tokens[:1], new_tokens=args.new_tokens):
        options = {"max_cache_len": args.seq_len + args.new_tokens}
        cache = StaticCache(config, **options) if args.compile else None
        outputs = model(tokens[:, :-new_tokens], past_key_values=cache, use_cache=True)
        step_tokens = tokens[:, :1]
        seconds = 0
        for step in range(new_tokens):
            position = torch.tensor([[tokens.shape[1] - new_tokens + step]], device=tokens.device)
            synchronize(args.device)
            started = time.perf_counter()
            outputs = model(step_tokens, past_key_values=outputs.past_key_values, use_cache=True, position_ids=position)
            synchronize(args.device)
            seconds += time.perf_counter() - started
        return seconds

    return decode


def benchmark_models(args) -> list[dict]:
    """One row for each case and variant."""
    models = new_models(args)
    errors = check_models(models, args)
    tokens = torch.randint(args.vocab_size, (args.batch_size, args.seq_len), device=args.device)
    calls = {name: torch.compile(model) if args.compile else model for name, model in models.items()}
    rows = []
    for case in args.cases:
        function = {"training": training_step, "forward": forward}.get(case)
        if function is None:
            functions = {name: decoder(call, models[name].config, tokens, args) for name, call in calls.items()}
            num_tokens = args.new_tokens
        else:
            functions = {name: (lambda f=function, m=call: f(m, tokens)) for name, call in calls.items()}
            num_tokens = tokens.numel()
        seconds = interleaved(functions, args.rounds, args.device, f"{case}, {describe(args)}")
        for name, values in seconds.items():
            rows.append(
                {
                    "case": case,
                    "variant": name,
                    "compiled": args.compile,
                    **{key: getattr(args, key) for key in SHAPE},
                    "seconds": quartiles(values),
                    "ratio": quartiles([a / b for a, b in zip(values, seconds["stock"])]),
                    "tokens_per_second": num_tokens / statistics.median(values),
                    "peak_memory_bytes": peak_memory(functions[name], args.device),
                    "relative_error": errors.get(name),
                }
            )
    return rows


def describe(args) -> str:
    return f"d {args.hidden_size}, {args.layers} layers, {args.blocks} blocks, {args.batch_size} x {args.seq_len}"


# --- Operators


def block_of_reads(implementation: str, sources, outputs, products) -> tuple[torch.Tensor, ...]:
    """What the sublayers of one block read: the closed sources and the sum of what the block has written so far."""
    read = ALL_DEPTH_ATTENTION_FUNCTIONS.get_interface(implementation)
    closed_reads = None
    if isinstance(read, TwoPhaseDepthAttention) and read.batches(sources):
        closed_reads = read.closed_reads(sources, products, 1e-6)
    mixed, partial = [], ()
    for sublayer, output in enumerate(outputs):
        if closed_reads is None:
            mixed.append(read((*sources, *partial), products[sublayer], 1e-6, 1)[0])
        else:
            mixed.append(read.read(closed_reads[sublayer], (*sources, *partial), products[sublayer], 1e-6, 1)[0])
        partial = (partial[0] + output,) if partial else (output,)
    return tuple(mixed)


def benchmark_operators(args) -> list[dict]:
    """One row for each implementation: all reads of a block, forward alone and with backward."""
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)

    def inputs(dtype, batch_size, seq_len):
        tensors = [torch.randn(batch_size, seq_len, args.hidden_size) for _ in range(args.sources + args.sublayers)]
        tensors = [tensor.to(args.device, dtype).requires_grad_() for tensor in tensors]
        products = torch.randn(args.sublayers, args.hidden_size, device=args.device) / args.hidden_size**0.5
        return tensors, products.requires_grad_()

    def run(implementation, tensors, products):
        return block_of_reads(implementation, tensors[: args.sources], tensors[args.sources :], products)

    def run_backward(implementation, tensors, products, gradients=None):
        return torch.autograd.grad(run(implementation, tensors, products), [*tensors, products], gradients)

    tensors, products = inputs(dtype, 2, 40)
    exact_tensors = [tensor.detach().double().requires_grad_() for tensor in tensors]
    exact_products = products.detach().double().requires_grad_()
    gradients = [torch.randn_like(tensor) for tensor in tensors[args.sources :]]
    # the output of the last sublayer isn't read
    exact = run("eager", exact_tensors, exact_products)
    read_inputs = [*range(args.sources + args.sublayers - 1)]
    exact_grads = torch.autograd.grad(
        exact, [*(exact_tensors[i] for i in read_inputs), exact_products], [g.double() for g in gradients]
    )
    errors = {}
    for name in {"eager": None, **dict.fromkeys(args.implementations)}:
        mixed = run(name, tensors, products)
        grads = torch.autograd.grad(mixed, [*(tensors[i] for i in read_inputs), products], gradients)
        errors[name] = max(map(relative_error, (*mixed, *grads), (*exact, *exact_grads)))
    check(errors, "eager")

    tensors, products = inputs(dtype, args.batch_size, args.seq_len)
    gradients = [torch.randn_like(tensor) for tensor in tensors[args.sources :]]
    differentiated = [*(tensors[i] for i in read_inputs), products]
    target, source = torch.empty_like(tensors[0]), tensors[0].detach()
    functions = {"copy": lambda: target.copy_(source)}
    for name in args.implementations:
        functions[f"{name}, forward"] = torch.no_grad()(lambda name=name: run(name, tensors, products))
        functions[f"{name}, forward and backward"] = lambda name=name: torch.autograd.grad(
            run(name, tensors, products), differentiated, gradients
        )
    seconds = interleaved(functions, args.rounds, args.device, f"a block of reads, {args.sources} sources")
    of_copy = statistics.median(seconds.pop("copy")) / 2  # the time that moving hidden_size numbers per token takes
    size = source.numel() * source.element_size()
    formula = args.sources / args.sublayers + 5
    return [
        {
            "case": "block of reads",
            "variant": name,
            "sources": args.sources,
            "sublayers": args.sublayers,
            **{key: getattr(args, key) for key in ("hidden_size", "batch_size", "seq_len")},
            "seconds": quartiles(values),
            # in units of hidden_size numbers moved per token and sublayer, at the speed of a copy
            "traffic": statistics.median(values) / of_copy / args.sublayers,
            "traffic_by_formula": formula if name.endswith("forward") else None,
            "gigabytes_per_second": formula * args.sublayers * size / statistics.median(values) / 1e9
            if name.endswith("forward")
            else None,
            "copy_gigabytes_per_second": size / of_copy / 1e9,
            "relative_error": errors[name.split(",")[0]],
        }
        for name, values in seconds.items()
    ]


# --- Reports


def model_table(rows: list[dict]) -> str:
    lines = [("case", "variant", "shape", "ms", "ratio", "quartiles", "tokens/s", "peak MB", "error")]
    for row in rows:
        shape = f"d {row['hidden_size']}, {row['layers']} layers, {row['blocks']} blocks"
        lower, median, upper = row["ratio"]
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        numbers = (f"{row['seconds'][1] * 1e3:.1f}", f"{median:.3f}", f"{lower:.3f}-{upper:.3f}")
        numbers += (f"{row['tokens_per_second']:,.0f}", f"{row['peak_memory_bytes'] / 1e6:,.0f}", error)
        lines.append((row["case"], row["variant"], shape, *numbers))
    return table(lines)


def operator_table(rows: list[dict]) -> str:
    lines = [("a block of reads", "sources", "sublayers", "d", "tokens", "ms", "traffic", "formula", "GB/s", "error")]
    for row in rows:
        formula = "-" if row["traffic_by_formula"] is None else f"{row['traffic_by_formula']:.1f}"
        speed = row["gigabytes_per_second"]
        lines.append(
            (
                row["variant"],
                *(str(row[key]) for key in ("sources", "sublayers", "hidden_size")),
                str(row["batch_size"] * row["seq_len"]),
                f"{row['seconds'][1] * 1e3:.2f}",
                f"{row['traffic']:.1f}",
                formula,
                "-" if speed is None else f"{speed:.0f} of {row['copy_gigabytes_per_second']:.0f}",
                f"{row['relative_error']:.0e}",
            )
        )
    return table(lines)


def plot_overhead(rows: list[dict], varied: list[str], path: Path):
    """The ratio to the stock model by each varied quantity: one panel for each of them and each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    figure, all_axes = plt.subplots(
        len(cases), len(varied), figsize=(4.2 * len(varied), 3.2 * len(cases)), squeeze=False, layout="constrained"
    )
    for case, row_axes in zip(cases, all_axes):
        for quantity, axes in zip(varied, row_axes):
            chosen = [row for row in rows if row["case"] == case and row["varied"] == quantity]
            for variant in dict.fromkeys(row["variant"] for row in chosen if row["variant"] != "stock"):
                points = sorted((row[quantity], row["ratio"]) for row in chosen if row["variant"] == variant)
                x, ratios = zip(*points)
                lower, median, upper = zip(*ratios)
                (line,) = axes.plot(x, median, marker="o", markersize=4, label=variant)
                axes.fill_between(x, lower, upper, color=line.get_color(), alpha=0.15, linewidth=0)
            axes.axhline(1, color="black", linewidth=0.8)
            axes.set_xticks(sorted({row[quantity] for row in chosen}))
            axes.set_xlabel(quantity.replace("_", " "))
            axes.set_ylabel(f"{case}: time / stock")
            axes.grid(alpha=0.3)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)))
    figure.suptitle("Overhead of Attention Residuals; medians, bands: quartiles")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def with_values(args, **values) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **values})


def benchmark(args) -> dict:
    """Measures everything that was asked for.

    Raises:
        RunError: an implementation is wrong or can't run here.
    """
    shapes = [with_values(args, varied=None)]
    if args.vary:
        shapes = [
            with_values(args, **{name: value}, varied=name) for name, values in args.vary.items() for value in values
        ]
    measure = benchmark_operators if args.operators else benchmark_models
    rows = [{**row, "varied": shape.varied} for shape in shapes for row in measure(shape)]
    text = (operator_table if args.operators else model_table)(rows)
    print(text)
    name = "operators" if args.operators else "models"
    results = {
        "command": ["benchmark.py", *args.command],
        "versions": versions(),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "rows": rows,
    }
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        write_json(args.output / f"{name}.json", results)
        write_text(args.output / f"{name}.md", text)
        if args.vary and not args.operators:
            plot_overhead(rows, list(args.vary), args.output / "overhead.png")
    return results


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmark.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: " + __doc__.split("\n\n", 1)[0],
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--output", type=Path, help="folder for rows, table and figure")
    add("--device", choices=("cpu", "cuda"), default=device, help=f"default: {device}")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default: float32 on CPU, bfloat16 on GPU")
    add("--implementations", nargs="+", default=["eager", "two_phase"], metavar="NAME", help="default: eager two_phase")
    add("--modes", nargs="+", choices=("block", "full"), default=["block", "full"])
    add("--cases", nargs="+", choices=CASES, default=list(CASES))
    add("--compile", action="store_true", help="torch.compile the stock and the AttnRes models")
    add("--rounds", type=int, default=15, help="default: 15")
    add("--threads", type=int, help="of the CPU; default: PyTorch's")
    add("--family", default="llama", help="model type of the stock model; default: llama")
    add("--hidden-size", type=int, default=512, help="default: 512")
    add("--layers", type=int, default=12, help="default: 12")
    add("--blocks", type=int, default=6, help="default: 6")
    add("--heads", type=int, default=8, help="default: 8")
    add("--vocab-size", type=int, default=4096, help="default: 4096")
    add("--batch-size", type=int, default=4, help="default: 4")
    add("--seq-len", type=int, default=256, help="default: 256")
    add("--new-tokens", type=int, default=16, help="decoded in a round; default: 16")
    add("--operators", action="store_true", help="time the reads of one block alone, not models")
    add("--sources", type=int, default=8, help="closed sources of the block, with --operators; default: 8")
    add("--sublayers", type=int, default=8, help="of the block, with --operators; default: 8")
    add("--vary", nargs="+", default=[], metavar="NAME=V1,V2", help="repeat with other values, one name at a time")
    args = parser.parse_args(argv)
    args.command = argv
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    for name in args.implementations:
        if name not in ALL_DEPTH_ATTENTION_FUNCTIONS:
            parser.error(f"--implementations {name}: choose of {', '.join(sorted(ALL_DEPTH_ATTENTION_FUNCTIONS))}")
    if args.family not in CONFIG_MAPPING:
        parser.error(f"--family {args.family} is unknown to transformers")
    if args.new_tokens >= args.seq_len:
        parser.error("--new-tokens must be less than --seq-len, the rest of which is the prompt")
    varied = {}
    for option in args.vary:
        name, _, values = option.partition("=")
        if not isinstance(getattr(args, name, None), int) or not all(v.isdigit() and int(v) for v in values.split(",")):
            parser.error(f"--vary {option}: give a number's name and values, such as hidden_size=128,512")
        varied[name] = [int(value) for value in values.split(",")]
    args.vary = varied
    return args


def main(argv: list[str] | None = None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    transformers.utils.logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        results = benchmark(args)
    except (RunError, ValueError) as error:
        raise SystemExit(f"benchmark: {error}") from None
    name, unit = ("seconds", "seconds") if args.operators else ("ratio", "times the stock model")
    medians = {f"{row['case']}, {row['variant']}": round(row[name][1], 4) for row in results["rows"]}
    print(json.dumps({"output": args.output and str(args.output), "unit": unit, "medians": medians}))


if __name__ == "__main__":
    main()
