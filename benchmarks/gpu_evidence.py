# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/gpu_evidence.py --minutes 9 --data outputs/gpu_evidence_data --output outputs/gpu_evidence

Trains a stock Llama (the donor, with a plain residual stream), Block and Full Attention Residuals on real text, with
the same batches and the same initial weights for all variants of a seed, and compares their held-out losses. First,
each variant's learning rate is chosen among --rates by short runs of one seed, and among further ones where the best is
at an edge and time allows. Then each variant is trained with its best rate and every one of --seeds.

Everything fits into --minutes: the speed is measured first, and the tokens of each run are cut down to what there is
time for, which the results say. Runs go from seed to seed, so that what is done when time is up can be compared.
Several processes share a GPU, as a single one with a model of this size waits for Python; --workers says how many.

--prepare makes the data beforehand: the source files of Python and of the packages in --packages, tokenised, in one
compressed file of less than 30 MB. Training then needs neither the network nor `datasets` nor an installed attnres.

The output folder holds evidence.json (after each run), evidence.md, evidence.png and the Block model of the first seed
in bfloat16: eight files of less than 16 MB. The same command again goes on after an interruption and skips runs that
are done. The last line of the output is JSON.
"""

import argparse
import ctypes
import heapq
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

import from_clone  # noqa: F401


# isort: split
from attnres_convert.writing import write_text
from gpu_evidence_data import EvidenceError, prepare, read_data, unpack
from gpu_evidence_report import write_report


# torch and transformers are imported by the workers alone, all at once: a minute has few seconds
STARTED = time.time()
VARIANTS = ("full", "block", "donor")  # those that take longest first
RESULTS_FILE = "evidence.json"
EXAMPLES = """examples:
  python benchmarks/gpu_evidence.py --prepare --data outputs/gpu_evidence_data
  python benchmarks/gpu_evidence.py --minutes 3 --data outputs/gpu_evidence_data --output outputs/gpu_evidence
  python benchmarks/gpu_evidence.py --tiny --device cpu --minutes 2 --data outputs/gpu_evidence_data"""

SIZES = {  # of a run, by whether it is --tiny
    False: {"layers": 18, "hidden_size": 256, "head_size": 64, "block_size": 3, "seq_len": 512, "batch_size": 32}
    | {"tokens": 10_000_000, "bracket_tokens": 3_000_000, "held_out_sequences": 1024},
    True: {"layers": 4, "hidden_size": 64, "head_size": 32, "block_size": 2, "seq_len": 64, "batch_size": 8}
    | {"tokens": 16_384, "bracket_tokens": 5_120, "held_out_sequences": 64},
}
NOT_SETTINGS = (
    "minutes",
    "data",
    "output",
    "prepare",
    "packages",
    "max_tokens",
    "vocab_size",
    "tiny",
    "workers",
    "report",
)
RESERVE = 9.0  # seconds for the report
SHARE = 0.85  # of the time that is left, what is planned with
FEWEST_STEPS = 16
LONGEST_EXTENSION = 2  # rates beyond an edge
EXTENSION_SHARE = 0.75  # of the tokens of the final runs that must be left after it
OVERHEAD = 3.0  # seconds that a run takes besides its steps, until one was measured


# --- The plan


def makespan(durations: list[float], workers: int) -> float:
    """Seconds until runs are done that are taken in turn by workers."""
    ends = [0.0] * workers
    for duration in durations:
        heapq.heappush(ends, heapq.heappop(ends) + duration)
    return max(ends)


class Plan:
    """Which runs there are, and how long they take."""

    def __init__(self, settings: dict, workers: int, deadline: float):
        self.settings, self.workers, self.deadline = settings, workers, deadline
        self.tokens_per_step = settings["seq_len"] * settings["batch_size"]
        self.speeds, self.overhead = {}, OVERHEAD

    def whole_steps(self, tokens: float) -> int:
        return max(FEWEST_STEPS, int(tokens) // self.tokens_per_step) * self.tokens_per_step

    def bracket(self, tokens: float) -> list[dict]:
        seed = self.settings["seeds"][0]
        return [self.run("bracket", v, seed, rate, tokens) for rate in self.settings["rates"] for v in VARIANTS]

    def final(self, tokens: float, best: dict[str, float]) -> list[dict]:
        return [self.run("final", v, seed, best[v], tokens) for seed in self.settings["seeds"] for v in VARIANTS]

    def run(self, stage: str, variant: str, seed: int, rate: float, tokens: float) -> dict:
        tokens = self.whole_steps(tokens)
        return {"stage": stage, "variant": variant, "seed": seed, "learning_rate": rate, "tokens": tokens}

    def seconds(self, runs: list[dict]) -> float:
        durations = [self.overhead + run["tokens"] / self.speeds[run["variant"]] for run in runs]
        return makespan(durations, self.workers)

    def time_left(self) -> float:
        return SHARE * (self.deadline - time.time())

    def learn(self, rows: list[dict]):
        """Takes speed and overhead from runs that are done."""
        for variant in VARIANTS:
            speeds = [row["tokens_per_second"] for row in rows if row["variant"] == variant]
            if speeds:
                self.speeds[variant] = statistics.mean(speeds)
        if rows:
            self.overhead = statistics.mean(r["seconds"] - r["tokens"] / r["tokens_per_second"] for r in rows)

    def shares(self) -> list[float]:
        """What to cut tokens down to, from all of them to a thousandth."""
        return [0.96**power for power in range(170)]

    def bracket_tokens(self) -> int:
        """As many as there is time for if the final runs are cut down likewise."""
        asked, guess = self.settings, dict.fromkeys(VARIANTS, 1.0)
        for share in self.shares():
            tokens = share * asked["bracket_tokens"]
            if self.seconds(self.bracket(tokens) + self.final(share * asked["tokens"], guess)) <= self.time_left():
                break
        return self.whole_steps(tokens)

    def final_tokens(self, best: dict[str, float], before: list[dict] = ()) -> int:
        """As many as there is time for after the runs `before`."""
        for share in self.shares():
            tokens = share * self.settings["tokens"]
            if self.seconds([*before, *self.final(tokens, best)]) <= self.time_left():
                break
        return self.whole_steps(tokens)


def best_rates(rows: list[dict]) -> dict[str, float]:
    """The learning rate with the smallest loss, for each variant that has one."""
    best = {}
    for row in rows:
        if row["stage"] == "bracket" and row["held_out_loss"] is not None:
            best[row["variant"]] = min(best.get(row["variant"], row), row, key=lambda row: row["held_out_loss"])
    return {variant: row["learning_rate"] for variant, row in best.items()}


def further_rates(rows: list[dict], asked: list[float]) -> dict[str, float]:
    """The rate beyond the edge, for each variant whose best is at one, a few at most."""
    further = {}
    for variant, best in best_rates(rows).items():
        tried = sorted(r["learning_rate"] for r in rows if r["stage"] == "bracket" and r["variant"] == variant)
        if len(tried) < len(asked) + LONGEST_EXTENSION and best in (tried[0], tried[-1]):
            further[variant] = best * 2 if best == tried[-1] else best / 2
    return further


# --- The runs


def key(run: dict) -> tuple:
    return tuple(run[name] for name in ("stage", "variant", "seed", "learning_rate", "tokens"))


class Results:
    """The content of evidence.json, written anew after each run."""

    def __init__(self, folder: Path, settings: dict, data: dict):
        """
        Raises:
            EvidenceError: the folder holds results of other options or data.
        """
        self.file = folder / RESULTS_FILE
        self.content = {"settings": settings, "data": data, "plan": {}, "sessions": [], "rows": []}
        if self.file.exists():
            before = json.loads(self.file.read_text(encoding="utf-8"))
            if before["rows"] and (before["settings"], before["data"]) != (settings, data):
                raise EvidenceError(f"{folder} holds results of other options or data; choose another --output.")
            self.content = before if before["rows"] else self.content
        folder.mkdir(parents=True, exist_ok=True)
        self.rows, self.plan = self.content["rows"], self.content["plan"]

    def missing(self, runs: list[dict]) -> list[dict]:
        done = {key(row) for row in self.rows}
        return [run for run in runs if key(run) not in done]

    def add(self, row: dict):
        self.rows.append(row)
        self.write()

    def write(self):
        """One line for each entry, and each row."""
        parts = []
        for name, value in self.content.items():
            if isinstance(value, list):
                text = "[\n" + ",\n".join("  " + json.dumps(entry) for entry in value) + "\n ]"
            else:
                text = json.dumps(value)
            parts.append(f" {json.dumps(name)}: {text}")
        write_text(self.file, "{\n" + ",\n".join(parts) + "\n}\n")


def start_worker(settings: dict, data: dict, barrier):
    """In a worker process: ends with the main one, and imports what trains."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process says what happens
    import gpu_evidence_training

    gpu_evidence_training.start(settings, data, barrier)


def worker_versions(device: str) -> dict:
    import gpu_evidence_training

    return gpu_evidence_training.versions(device)


def speed_job(*arguments) -> float:
    import gpu_evidence_training

    return gpu_evidence_training.speed_job(*arguments)


def train_job(*arguments) -> dict | None:
    import gpu_evidence_training

    return gpu_evidence_training.train_job(*arguments)


class Runner:
    """Hands runs to worker processes and keeps their rows."""

    def __init__(self, pool: ProcessPoolExecutor, tokens_file: Path, results: Results, plan: Plan):
        self.pool, self.tokens_file, self.results, self.plan = pool, tokens_file, results, plan

    def measure_speeds(self, seconds: float):
        """All workers train at the same time; each variant in at least one of them."""
        workers, settings = self.plan.workers, self.plan.settings
        number = -(-len(VARIANTS) // workers) * workers
        variants = [VARIANTS[index % len(VARIANTS)] for index in range(number)]
        run = {"stage": "speed", "seed": settings["seeds"][0], "learning_rate": settings["rates"][0]}
        jobs = [self.pool.submit(speed_job, {**run, "variant": v}, self.tokens_file, seconds) for v in variants]
        speeds = {variant: [] for variant in VARIANTS}
        for variant, job in zip(variants, jobs):
            speeds[variant].append(job.result())
        self.plan.speeds = {variant: statistics.mean(values) for variant, values in speeds.items()}

    def train(self, runs: list[dict]):
        """Trains what isn't done, as long as there is time.

        Raises:
            Exception: that of a run that failed, after the others that had begun.
        """
        pending = {self.submit(run): run for run in self.results.missing(runs)}
        failure = None
        while pending:
            done, _ = wait(pending, return_when=FIRST_COMPLETED)
            for job in done:
                run = pending.pop(job)
                if job.cancelled():
                    continue
                if job.exception() is not None:
                    failure = failure or job.exception()
                    for other in pending:
                        other.cancel()
                elif job.result() is None:
                    report(f"no time for {describe(run)}")
                else:
                    row = job.result()
                    report(
                        f"{describe(row)}: {row['held_out_loss']}, {row['tokens_per_second']:,} tokens/s, "
                        f"{row['seconds']:.1f} s"
                    )
                    self.results.add(row)
        if failure is not None:
            raise failure

    def submit(self, run: dict):
        first = run["stage"] == "final" and run["variant"] == "block" and run["seed"] == self.plan.settings["seeds"][0]
        save_to = self.results.file.parent if first else None
        return self.pool.submit(train_job, run, self.tokens_file, self.plan.deadline, save_to)


def report(text: str):
    print(f"[{time.time() - STARTED:6.1f} s] {text}", file=sys.stderr, flush=True)


def describe(run: dict) -> str:
    return (
        f"{run['stage']} {run['variant']}, seed {run['seed']}, rate {run['learning_rate']:g}, {run['tokens']:,} tokens"
    )


def run_all(runner: Runner, results: Results, plan: Plan):
    """Bracket, its extension, and the final runs."""
    settings, kept = plan.settings, results.plan
    runner.measure_speeds(4.0 if settings["device"] != "cpu" else 1.0)
    report("tokens/s of each worker: " + ", ".join(f"{v} {speed:,.0f}" for v, speed in plan.speeds.items()))
    kept.setdefault("speeds_at_first", {variant: round(speed) for variant, speed in plan.speeds.items()})
    kept.setdefault("bracket_tokens", plan.bracket_tokens())
    runner.train(plan.bracket(kept["bracket_tokens"]))
    plan.learn(results.rows)
    while "final_tokens" not in kept:
        best, further = best_rates(results.rows), further_rates(results.rows, settings["rates"])
        if len(best) < len(VARIANTS):
            raise EvidenceError("not every variant has a learning rate yet; run it again with more --minutes.")
        seed, tokens = settings["seeds"][0], kept["bracket_tokens"]
        more = [plan.run("bracket", variant, seed, rate, tokens) for variant, rate in further.items()]
        more = results.missing(more)
        if not more or plan.final_tokens(best, more) < EXTENSION_SHARE * plan.final_tokens(best):
            kept["final_tokens"], kept["learning_rates"] = plan.final_tokens(best), best
            kept["at_an_edge"] = sorted(further)
        else:
            runner.train(more)
    report(f"learning rates {kept['learning_rates']}, then {kept['final_tokens']:,} tokens for each run")
    results.write()
    runner.train(plan.final(kept["final_tokens"], kept["learning_rates"]))


def train_and_report(args: argparse.Namespace) -> dict:
    deadline = STARTED + 60 * args.minutes - RESERVE
    data = read_data(args.data)
    settings = {name: value for name, value in vars(args).items() if name not in NOT_SETTINGS}
    results = Results(args.output, settings, {name: value for name, value in data.items() if name != "packages"})
    plan = Plan(settings, args.workers, deadline)
    failure = None if args.report or is_complete(results, plan) else run_in_workers(args, data, results, plan)
    if results.rows:
        results.content["summary"] = write_report(args.output, results.content)
        results.write()
        report("report written")
    if failure is not None:
        raise failure
    return results.content.get("summary", {})


def is_complete(results: Results, plan: Plan) -> bool:
    kept = results.plan
    return "final_tokens" in kept and not results.missing(plan.final(kept["final_tokens"], kept["learning_rates"]))


def run_in_workers(args: argparse.Namespace, data: dict, results: Results, plan: Plan) -> BaseException | None:
    """What went wrong is returned, as there may be results to report."""
    settings = plan.settings
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.workers)))
    context = get_context("spawn")
    pool = ProcessPoolExecutor(args.workers, context, start_worker, (settings, data, context.Barrier(args.workers)))
    with tempfile.TemporaryDirectory() as temporary:
        try:
            ready = [pool.submit(worker_versions, args.device) for _ in range(args.workers)]
            tokens_file = Path(temporary, "tokens")
            unpack(args.data, data, tokens_file)
            report("data unpacked")
            session = {"workers": args.workers, "minutes": args.minutes, "host_cores": os.cpu_count()}
            results.content["sessions"].append({**session, **ready[0].result()})
            report(f"workers ready, on {ready[0].result()['device']}")
            run_all(Runner(pool, tokens_file, results, plan), results, plan)
        except (Exception, KeyboardInterrupt) as error:
            for process in list((pool._processes or {}).values()):
                process.kill()  # which may wait for one another, and hold nothing that isn't written
            return error
        finally:
            pool.shutdown(cancel_futures=True)
    return None


# --- Options


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_evidence.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EXAMPLES,
    )
    big, tiny = SIZES[False], SIZES[True]
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder of the data, which --prepare makes")
    add("--output", type=Path, default=Path("outputs/gpu_evidence"), help="folder of the results; default: %(default)s")
    add("--minutes", type=float, default=9, help="time for everything, from start to end; default: 9")
    add("--workers", type=int, help="processes that train at the same time; default: 4 on a GPU, 1 on a CPU")
    add("--device", default="cuda", help="cuda or cpu; default: cuda")
    add("--report", action="store_true", help="train nothing; write the tables and the figure of what there is")
    add("--tiny", action="store_true", help="a rehearsal: a tiny model and few tokens")
    add = parser.add_argument_group("data").add_argument
    add("--prepare", action="store_true", help="make the data, on any machine, and end")
    add("--packages", type=Path, nargs="+", help="folders of installed packages (site-packages) whose source is the "
        "text, the first one's version of a file; default: this Python's")  # fmt: skip
    add("--max-tokens", type=int, default=36_000_000, help="tokens to train on at most; default: 36,000,000")
    add("--vocab-size", type=int, default=8192, help="of the tokenizer; default: 8192")
    add = parser.add_argument_group("training").add_argument
    add("--tokens", type=int, help=f"of each final run, if there is time; default: {big['tokens']:,}")
    add("--bracket-tokens", type=int, help="of each run that tries a learning rate, if there is time; default: "
        f"{big['bracket_tokens']:,}")  # fmt: skip
    add("--rates", type=float, nargs="+", default=[2e-3, 4e-3, 1e-3, 8e-3], help="learning rates to try, each twice "
        "another, in this order; default: 2e-3 4e-3 1e-3 8e-3")  # fmt: skip
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of the final runs, the first one's also of the "
        "others; default: 0 1 2")  # fmt: skip
    add("--depth-lr-scale", type=float, default=3.0, help="learning rate of depth attention as a multiple of the "
        "others'; default: 3")  # fmt: skip
    add("--init", choices=("scaled", "default"), default="scaled", help="matrices with standard deviation 1 / "
        "sqrt(hidden size), residual projections 1 / sqrt(2 layers) of it, or as in transformers; default: "
        "scaled")  # fmt: skip
    add("--batch-size", type=int, help=f"sequences of a step; default: {big['batch_size']}")
    add("--seq-len", type=int, help=f"tokens of a sequence; default: {big['seq_len']}")
    add("--held-out-sequences", type=int, help="held-out sequences of the final losses; default: "
        f"{big['held_out_sequences']}")  # fmt: skip
    add = parser.add_argument_group("model").add_argument
    add("--layers", type=int, help=f"decoder layers; default: {big['layers']}, tiny {tiny['layers']}")
    add("--hidden-size", type=int, help=f"default: {big['hidden_size']}, tiny {tiny['hidden_size']}")
    add("--head-size", type=int, help=f"hidden size of a head; default: {big['head_size']}, tiny {tiny['head_size']}")
    add("--block-size", type=int, help=f"layers of a block; default: {big['block_size']}, tiny {tiny['block_size']}")
    add("--implementation", help="of depth attention (triton, two_phase, eager, cpp); default: the project's default")
    add("--compile", action="store_true", help="torch.compile the models, which takes a minute or more at first")
    args = parser.parse_args(argv)
    for name, value in SIZES[args.tiny].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.workers = args.workers or (1 if args.device == "cpu" else 4)
    if args.prepare and args.packages is None:
        args.packages = [Path(path) for path in sys.path if path.endswith("-packages")]
    if missing := [path for path in args.packages or [] if not path.is_dir()]:
        parser.error(f"--packages {missing[0]} is no folder")
    if args.hidden_size % args.head_size:
        parser.error("--head-size must divide --hidden-size")
    return args


def stop(*_):
    raise KeyboardInterrupt


def main(argv: list[str] | None = None):
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, stop)
    try:
        if args.prepare:
            result = prepare(args.data, args.packages, args.vocab_size, args.max_tokens)
            result.pop("packages")
        else:
            result = train_and_report(args)
    except EvidenceError as error:
        sys.exit(f"gpu_evidence: {error}")
    except KeyboardInterrupt:
        sys.exit("gpu_evidence: interrupted; the same command goes on")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
