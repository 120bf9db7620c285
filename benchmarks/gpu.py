# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""python benchmarks/gpu.py --minutes 9 --output outputs/gpu

Checks and measures Attention Residuals on a GPU, in as few minutes as there are. --stages says what:

  card         hardware, versions, speed of a copy and of matrix products
  correctness  every kernel against float64
  kernels      bytes per second of each kernel, by those of a copy
  models       training, prefill and decoding, eager and compiled: time by that of stock models, and memory
  peers        other projects' kernels on the same inputs; --site names a folder where they are
  checks       whole models against float64: gradients, steps of AdamW, compilation, generation, CUDA graphs; the tests
               that need a GPU
  profile      the kernels that take most of a training step
  tuning       what would be faster with other sizes of tiles

Stages run in processes of their own, in this order; card and kernels run beside the others. What compiles or compares
shares the device; what is timed has it for itself, and waits until correctness is through. What fails or takes too long
is named, and the others go on. Results go to gpu.json as they come, tables to gpu.md, and what the processes print to
logs.txt. The last line of the output is JSON; the exit code is 1 if a stage failed.

With --device cpu --tiny, all runs on a CPU, the Triton kernels in their interpreter: a rehearsal whose times mean
nothing. The command needs neither an installed attnres nor `datasets`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = str(ROOT / "benchmarks")
sys.path.insert(0, BENCHMARKS)
import from_clone  # noqa: E402, F401


# isort: split
from attnres_convert.writing import table, write_json, write_text  # noqa: E402
from gpu_worker import SETTINGS  # noqa: E402


# seconds that a stage may take, and its lane: those of a lane run one after the other, in this order. There are only
# two, as what compiles a lot takes processors from the others
LIMITS = {"card": 90, "correctness": 120, "kernels": 120, "models": 420, "peers": 90, "checks": 200, "profile": 150}
LIMITS |= {"tuning": 150}
LANES = dict.fromkeys(LIMITS, 1) | {"card": 2, "kernels": 2}
LOG_BYTES = 200 * 1024
RESERVE = 4  # seconds to end processes and write reports
# what AttnRes may take, by what the stock model takes, by case and whether it is compiled
MOST_RATIO = {
    ("training", False): {"block": 1.00, "full": 1.10},
    ("training", True): {"block": 1.03, "full": 1.15},
    ("prefill", False): {"block": 1.02, "full": 1.15},
    ("prefill", True): {"block": 1.02, "full": 1.15},
    ("decoding", True): {"block": 1.02, "full": 1.15},
}


class Stage(NamedTuple):
    name: str
    command: list[str]
    limit: float  # seconds
    lane: int


class Running:
    """The process of a stage, with all that it starts in its process group."""

    def __init__(self, stage: Stage, folder: Path, environment: dict[str, str]):
        self.stage, self.started, self.failure = stage, time.monotonic(), None
        with open(folder / f"{stage.name}.log", "wb") as log:
            self.process = subprocess.Popen(
                stage.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        self.log = folder / f"{stage.name}.log"

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def kill(self):
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def is_done(self, deadline: float) -> bool:
        code = self.process.poll()
        if code is None and time.time() < deadline and self.seconds() < self.stage.limit:
            return False
        if code is None:
            is_late = self.seconds() >= self.stage.limit
            self.failure = f"not done within {self.stage.limit:.0f} s" if is_late else "the minutes have passed"
        elif code:
            lines = [line for line in self.log_text().splitlines() if line.strip()]
            self.failure = lines[-1].strip()[:300] if lines else f"ended with {code} and no output"
        self.kill()  # what it has left behind too
        return True

    def log_text(self) -> str:
        """The log, without its middle if it is long."""
        log = self.log.read_bytes()
        if len(log) > LOG_BYTES:
            log = log[: LOG_BYTES // 2] + b"\n[...]\n" + log[-LOG_BYTES // 2 :]
        return log.decode(errors="replace")


class Report:
    """What is known so far, in the output folder after each change."""

    def __init__(self, output: Path, folder: Path, args: argparse.Namespace):
        self.output, self.folder, self.started = output, folder, time.time()
        self.arguments = {name: value for name, value in vars(args).items() if name != "output"}
        self.stages: dict[str, dict] = {}
        self.logs: dict[str, str] = {}
        self.written = None

    def update(self, running: list[Running], final: bool = False):
        for run in running:
            self.stages[run.stage.name] = {"seconds": round(run.seconds(), 1), "failure": run.failure}
            self.logs[run.stage.name] = run.log_text()
        state = [(path.name, path.stat().st_mtime_ns) for path in sorted(self.folder.glob("*.json"))]
        if not final and state == self.written:
            return
        self.written = state
        for name, stage in self.stages.items():
            path = self.folder / f"{name}.json"
            if path.exists():
                stage["results"] = json.loads(path.read_text(encoding="utf-8"))
        content = {"arguments": self.arguments, "seconds": round(time.time() - self.started, 1), "stages": self.stages}
        write_json(self.output / "gpu.json", content)
        write_text(self.output / "gpu.md", self.text())
        write_text(self.output / "logs.txt", "".join(f"=== {n}\n{log}\n" for n, log in self.logs.items()))

    def results(self, name: str) -> dict:
        return self.stages.get(name, {}).get("results", {})

    def text(self) -> str:
        parts = []
        for name, tables in TABLES.items():
            if name in self.stages:
                parts += [f"## {name}\n", *tables(self.results(name))]
        parts += ["## stages\n", self.stage_table()]
        return "\n".join(parts)

    def stage_table(self) -> str:
        rows = [("stage", "seconds", "failures", "first failure")]
        for name, stage in self.stages.items():
            failures = stage.get("results", {}).get("failures") or []
            reason = (stage["failure"] or "-")[:80]
            rows.append((name, f"{stage['seconds']:.0f}", str(len(failures) or int(bool(stage["failure"]))), reason))
        lines = [f"{name}: {line}" for name in self.stages for line in self.results(name).get("failures", [])[:40]]
        return table(rows) + "".join(f"\n* {line}" for line in lines) + "\n"


# --- Tables


def card_tables(results: dict) -> list[str]:
    lines = [f"{name}: {value}" for name, value in results.items() if name not in ("failures", "versions", "hardware")]
    for name in ("versions", "hardware"):
        lines.append(", ".join(f"{key} {value}" for key, value in results.get(name, {}).items()))
    return ["\n".join(lines) + "\n"]


def correctness_tables(results: dict) -> list[str]:
    lines = [f"{results.get('checks', 0)} checks of {results.get('tasks_done')} of {results.get('tasks')} tasks"]
    lines += results.get("tests", [])
    rows = [("nearest to its bound", "error", "readable", "bound", "of bound")]
    for row in results.get("worst", []):
        share = f"{row['error'] / row['bound']:.2f}"
        rows.append((row["what"], *(f"{row[key]:.1e}" for key in ("error", "readable", "bound")), share))
    return ["\n".join(lines) + "\n", table(rows)]


def most_ratio(row: dict) -> float | None:
    mode, _, implementation = row["variant"].partition(" ")
    limits = MOST_RATIO.get((row["case"], row["compiled"]), {})
    return limits.get(mode) if implementation == "triton" and row["ratio"] else None


def most_memory(row: dict, rows: list[dict]) -> float | None:
    """Bytes: Block may take what the stock model takes, and the states of its blocks."""
    kind = (row["shape"], row["case"], row["compiled"], "stock")
    stock = [r for r in rows if (r["shape"], r["case"], r["compiled"], r["variant"]) == kind]
    if row["variant"] != "block triton" or not row["peak_memory_bytes"] or not stock:
        return None
    states = row["blocks"] * row["batch_size"] * row["seq_len"] * row["hidden_size"] * row["itemsize"]
    return (stock[0]["peak_memory_bytes"] or 0) + states


def above_limits(rows: list[dict]) -> list[str]:
    """What takes more time or memory than it may."""
    found = []
    for row in rows:
        what = f"{row['shape']}, {row['case']}, {'compiled' if row['compiled'] else 'eager'}, {row['variant']}"
        ratio, memory = most_ratio(row), most_memory(row, rows)
        if ratio is not None and row["ratio"][1] > ratio:
            found.append(f"{what}: {row['ratio'][1]:.3f} of the time, at most {ratio:.2f}")
        if memory is not None and row["peak_memory_bytes"] > memory:
            found.append(f"{what}: {row['peak_memory_bytes'] / 1e6:,.0f} MB, at most {memory / 1e6:,.0f}")
    return found


def limit_cells(value: float, most: float | None, form: str) -> tuple[str, str]:
    """A limit, and whether the value is within it."""
    return ("-", "") if most is None else (format(most, form), "above" if value > most else "ok")


def model_tables(results: dict) -> list[str]:
    heading = ("shape", "case", "variant", "ms", "ratio", "quartiles", "at most", "")
    lines = [(*heading, "tokens/s", "peak MB", "at most", "", "compile s")]
    rows = results.get("rows", [])
    for row in rows:
        case = f"{row['case']}, {'compiled' if row['compiled'] else 'eager'}"
        lower, median, upper = row["ratio"] or (0, 0, 0)
        most, memory = most_memory(row, rows), row["peak_memory_bytes"]
        lines.append(
            (
                row["shape"],
                case,
                row["variant"],
                f"{row['seconds'][1] * 1e3:.2f}",
                f"{median:.3f}" if row["ratio"] else "-",
                f"{lower:.3f}-{upper:.3f}" if row["ratio"] else "-",
                *limit_cells(median, most_ratio(row), ".2f"),
                f"{row['tokens_per_second']:,.0f}",
                f"{memory / 1e6:,.0f}" if memory else "-",
                *limit_cells((memory or 0) / 1e6, most and most / 1e6, ",.0f"),
                f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "-",
            )
        )
    return [table(lines)]


def kernel_tables(results: dict) -> list[str]:
    lines = [("kernel", "d", "tokens", "ms", "GB/s", "of a copy's")]
    for row in results.get("rows", []):
        numbers = (
            f"{row['seconds'][1] * 1e3:.3f}",
            f"{row['gigabytes_per_second']:.0f}",
            f"{row['share_of_copy']:.0%}",
        )
        lines.append((row["kernel"], str(row["hidden_size"]), str(row["tokens"]), *numbers))
    return [table(lines)]


def peer_tables(results: dict) -> list[str]:
    lines = [("reads", "variant", "pass", "sources", "sublayers", "d", "ms", "error")]
    for row in results.get("rows", []):
        shape = (str(row[key]) for key in ("sources", "sublayers", "hidden_size"))
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.0e}"
        lines.append((row["case"], row["variant"], row["pass"], *shape, f"{row['seconds'][1] * 1e3:.3f}", error))
    said = [f"installed: {', '.join(results.get('installed', [])) or 'none'}"]
    said += [f"no time for: {what}" for what in results.get("left_out", [])]
    return ["\n".join(said) + "\n", table(lines)]


def profile_tables(results: dict) -> list[str]:
    found = []
    for profile in results.get("profiles", []):
        lines = [(f"{profile['variant']}, {profile['what']}", "calls", "ms", "share")]
        for row in [*profile["kernels"], *({**row, "name": f"ours: {row['name']}"} for row in profile["ours"])]:
            lines.append((row["name"][:70], str(row["calls"]), f"{row['ms']:.2f}", f"{row['share']:.1%}"))
        lines.append(("all", "", f"{profile['ms']:.2f}", ""))
        lines.append(("all of ours", "", f"{profile['ours_ms']:.2f}", f"{profile['ours_ms'] / profile['ms']:.1%}"))
        found.append(table(lines))
    return found


def tuning_tables(results: dict) -> list[str]:
    """`table`, a list of rows of strings, if the stage has one."""
    return [table([tuple(row) for row in results["table"]])] if results.get("table") else []


TABLES = {
    "card": card_tables,
    "correctness": correctness_tables,
    "models": model_tables,
    "kernels": kernel_tables,
    "tuning": tuning_tables,
    "peers": peer_tables,
    "profile": profile_tables,
    "checks": correctness_tables,
}


# --- The command


def run_stages(stages: list[Stage], report: Report, environment: dict[str, str], deadline: float):
    """Runs the lanes side by side, and kills what is late."""
    waiting, running = list(stages), []
    try:
        while waiting or running:
            lanes = {run.stage.lane for run in running}
            for stage in list(waiting):
                if stage.lane not in lanes:
                    waiting.remove(stage)
                    lanes.add(stage.lane)
                    running.append(Running(stage, report.folder, environment))
            for run in list(running):
                if run.is_done(deadline):
                    running.remove(run)
                    say = run.failure or "done"
                    print(f"{run.stage.name}: {run.seconds():.0f} s: {say}", file=sys.stderr, flush=True)
                    report.update([run], final=True)
            report.update(running)
            if waiting and time.time() >= deadline:
                for stage in waiting:
                    report.stages[stage.name] = {"seconds": 0, "failure": "the minutes have passed before it began"}
                waiting = []
            time.sleep(0.1)
    finally:
        for run in running:
            run.failure = "interrupted"
            run.kill()
        report.update(running, final=True)


def parse_arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu.py",
        description=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"""examples:
  {__doc__.split(chr(10), 1)[0]}
  python benchmarks/gpu.py --minutes 4 --stages correctness models --shapes large --output outputs/gpu
  python benchmarks/gpu.py --minutes 5 --stages peers --site outputs/site --output outputs/peers
  python benchmarks/gpu.py --device cpu --tiny --minutes 5 --output outputs/rehearsal""",
    )
    add = parser.add_argument
    add("--minutes", type=float, default=9, help="the command ends within so many; default: 9")
    add("--output", type=Path, default=Path("outputs/gpu"), help="folder of results; default: outputs/gpu")
    add("--stages", nargs="+", choices=LIMITS, metavar="STAGE", help=f"of {', '.join(LIMITS)}; default: all")
    add("--limit", nargs="+", default=[], metavar="STAGE=SECONDS", help="time limits of stages; defaults: "
        + ", ".join(f"{name} {limit}" for name, limit in LIMITS.items()))  # fmt: skip
    add("--shapes", nargs="+", choices=("large", "smollm2", "qwen3"), help="of models; default: all, in this order")
    add("--eager-shapes", nargs="+", default=[], choices=("large", "smollm2", "qwen3"), help="of models: of which "
        "only the training step is timed, as it is; no time to compile is needed")  # fmt: skip
    add("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda")
    add("--tiny", action="store_true", help="the smallest shapes and few of them, to rehearse")
    add("--site", type=Path, help="folder with unpacked packages, for the stage peers alone")
    args = parser.parse_args(argv)
    args.limits = dict(LIMITS)
    for option in args.limit:
        name, _, seconds = option.partition("=")
        if name not in LIMITS or not seconds.replace(".", "", 1).isdigit():
            parser.error(f"--limit {option}: give a stage and seconds, such as models=120")
        args.limits[name] = float(seconds)
    if args.minutes <= 0:
        parser.error("--minutes must be above 0")
    if args.site is not None and not args.site.is_dir():
        parser.error(f"--site {args.site} is not a folder")
    return args


def stages_of(args: argparse.Namespace) -> list[Stage]:
    chosen = [name for name in LIMITS if name in (args.stages or LIMITS)]
    command = [sys.executable, "-u", str(ROOT / "benchmarks" / "gpu_stages.py")]
    chosen = [Stage(name, [*command, name], args.limits[name], LANES[name]) for name in chosen]
    if args.site is not None:
        command = ["env", f"PYTHONPATH={':'.join([str(args.site.resolve()), BENCHMARKS, str(ROOT)])}", *command]
        chosen = [s._replace(command=[*command, "peers"]) if s.name == "peers" else s for s in chosen]
    return chosen


def environment_of(args: argparse.Namespace, folder: Path, deadline: float) -> dict[str, str]:
    """Of all processes: they share what is compiled, and run Triton's interpreter where there is no GPU."""
    settings = {"device": args.device, "tiny": args.tiny, "folder": str(folder), "deadline": deadline}
    settings |= {"shapes": args.shapes, "eager_shapes": args.eager_shapes}
    environment = {
        **os.environ,
        SETTINGS: json.dumps(settings),
        "PYTHONPATH": os.pathsep.join([BENCHMARKS, str(ROOT)]),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1" if args.device == "cpu" else "4",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1" if args.device == "cpu" else "4",
    }
    if args.device == "cpu":
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def main(argv: list[str] | None = None, stages: list[Stage] | None = None):
    started = time.time()
    args = parse_arguments(sys.argv[1:] if argv is None else argv)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"gpu: can't write to {args.output}: {error.strerror}.") from None
    deadline = started + 60 * args.minutes - RESERVE
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        report = Report(args.output, folder, args)
        run_stages(stages or stages_of(args), report, environment_of(args, folder, deadline), deadline)
    print(report.text())
    failed = {name: stage["failure"] for name, stage in report.stages.items() if stage["failure"]}
    above = above_limits(report.results("models").get("rows", []))
    seconds = round(time.time() - started, 1)
    print(json.dumps({"output": str(args.output), "seconds": seconds, "failed": failed, "above": above}))
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the stages and writes what there is
    main()
