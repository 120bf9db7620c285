# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""The stage `tuning` of benchmarks/gpu.py: for each Triton kernel, other values of `TUNED` in triton_kernels.py.

Each value is tried by itself, then the best ones together. Nothing is changed: the table says what would be faster.
"""

import os

from gpu_worker import Pool, Results, WorkerError, seconds_left, settings


CLOSED = {"warps": (2, 4, 8), "part": (32, 64), "chunk": (32, 64), "hints": (False, True)}
# the kernel of `TUNED`: what it is timed in, and the values that are tried; with 0 numbers, nothing is held
SPACE = {
    "held_forward": (
        "phase 1 forward",
        {"columns": (256, 512), "numbers": (0, 64, 128), "registers": ([], [[4, 168]])},
    ),
    "held_backward": (
        "phase 1 backward, sources alone",
        {"columns": (256, 512), "numbers": (0, 32, 64), "registers": ([], [[4, 168]], [[8, 128]])},
    ),
    "closed_forward": ("phase 1 forward", CLOSED),
    "closed_backward": ("phase 1 backward, sources alone", CLOSED),
    "products_backward": (
        "phase 1 backward",
        {"tokens": (32, 64, 128), "chunk": (128, 256), "stages": (2, 3, 4), "programs": (4, 8)},
    ),
    "step_forward": ("step forward", {"columns": (256, 512, 1024)}),
    "step_backward": ("step backward", {"columns": (128, 256, 512), "warps": (8, 16, 24, 32), "ahead": (0, 8192)}),
    "read_forward": ("whole read", {"columns": (256, 512, 1024), "numbers": (8, 16, 32)}),
    "token_read": ("32 reads of a token", {"columns": (256, 512, 1024), "numbers": (64, 128), "warps": (2, 4, 8)}),
}
WIDTHS = [2048, 4096, 1024, 8192]
PROCESSES = 14
CANDIDATE_SECONDS = 60
GAIN = 0.99  # what is faster takes less than so much of the time of now


def singles(kernel: str, now: dict) -> list[dict]:
    """What is tried at first: the values of now, and each other value by itself."""
    _, space = SPACE[kernel]
    changes = [{name: value} for name, values in space.items() for value in values if value != now[name]]
    return [{}, *(changes[:2] if settings().tiny else changes)]


def joined(seconds: dict[str, float], candidates: dict[str, dict]) -> list[dict]:
    """The best value of each name that gains something, most first, joined one after the other."""
    gains = sorted((s, name) for name, s in seconds.items() if s < GAIN * seconds["{}"])
    both, found = {}, []
    for _, name in gains:
        new = {key: value for key, value in candidates[name].items() if key not in both}
        if new:
            both = {**both, **new}
            found.append(both)
    return found[1:]  # the first is known


class Tuning:
    """All kernels at one width. Candidates of all are compiled side by side, then the kernels are timed one after the
    other."""

    def __init__(self, results: Results, pool: Pool, now: dict, width: int, rows: list[dict]):
        self.results, self.pool, self.now, self.width, self.rows = results, pool, now, width, rows
        self.own = {}  # the row of each kernel

    def compiled(self, candidates: dict[str, list[dict]]) -> tuple[dict, dict]:
        """By kernel, those that run and are right, and why others don't."""
        good, failed = {kernel: [] for kernel in candidates}, {kernel: {} for kernel in candidates}

        def done(task, _, failure, seconds):
            if failure is None:
                good[task["kernel"]].append(task["changes"])
            else:
                failed[task["kernel"]][str(task["changes"])] = failure

        tasks = [(kernel, changes) for kernel, of_kernel in candidates.items() for changes in of_kernel]
        tasks = [{"kernel": kernel, "hidden_size": self.width, "changes": changes} for kernel, changes in tasks]
        self.pool.run("prepare", tasks, done, CANDIDATE_SECONDS)
        for index in range(len(self.pool.workers)):
            self.pool.call("release", CANDIDATE_SECONDS, index)
        return good, failed

    def timed(self, kernel: str, candidates: list[dict], failed: dict[str, str]) -> tuple[dict[str, float], int]:
        """Seconds by candidate, and bytes moved."""
        found = self.pool.call(
            "time_candidates", seconds_left(), kernel=kernel, hidden_size=self.width, candidates=candidates
        )
        failed |= found["failed"]
        return found["seconds"], found["bytes"]

    def run(self):
        by_name = {
            kernel: {str(changes): changes for changes in singles(kernel, self.now[kernel])} for kernel in self.now
        }
        good, failed = self.compiled({kernel: list(names.values()) for kernel, names in by_name.items()})
        more = {}
        for kernel, candidates in good.items():
            if self.measure(kernel, candidates, failed[kernel]):
                seconds = self.own[kernel]["seconds"]
                more[kernel] = joined(seconds, by_name[kernel])
        good, failed = self.compiled({kernel: candidates for kernel, candidates in more.items() if candidates})
        for kernel, candidates in good.items():
            self.measure(kernel, [{}, *candidates], failed[kernel])

    def measure(self, kernel: str, candidates: list[dict], failed: dict[str, str]) -> bool:
        """Adds a row for a kernel, or completes it."""
        what = f"tuning of {kernel}, d {self.width}"
        try:
            if {} not in candidates:
                raise WorkerError(failed["{}"])
            seconds, moved = self.timed(kernel, candidates, failed)
            if "{}" not in seconds:
                raise WorkerError(failed["{}"])
        except WorkerError as error:
            self.results.fail(f"{what}: {error}")
            return False
        if kernel not in self.own:
            self.own[kernel] = {"kernel": kernel, "hidden_size": self.width, "now": self.now[kernel], "bytes": moved}
            self.own[kernel] |= {"seconds": seconds, "failed": failed, "changes": candidates}
            self.rows.append(self.own[kernel])
        else:  # by the time of the values of now in the same round
            row = self.own[kernel]
            ratio = row["seconds"]["{}"] / seconds.pop("{}")
            row["seconds"] |= {name: s * ratio for name, s in seconds.items()}
            row["failed"] |= failed
            row["changes"] += candidates[1:]
        row = self.own[kernel]
        best = min(row["seconds"], key=row["seconds"].get)
        row |= {"seconds_now": row["seconds"]["{}"], "seconds_best": row["seconds"][best]}
        row["best"] = next(changes for changes in row["changes"] if str(changes) == best)
        self.results.set(rows=self.rows, table=table(self.rows))
        return True


def tuning(results: Results):
    """What would be faster on this device."""
    pool = Pool("gpu_candidates", 2 if settings().tiny else min(PROCESSES, os.cpu_count()))
    known = pool.call("values_of_now", seconds_left())
    now = {}
    for kernel, (_, space) in SPACE.items():
        unknown = [name for name in space if name not in known.get(kernel, {})]
        if unknown:
            results.fail(f"{kernel}: TUNED in triton_kernels.py has no {', '.join(unknown)}")
        else:
            now[kernel] = known[kernel]
    rows = []
    for width in [32] if settings().tiny else WIDTHS:
        Tuning(results, pool, now, width, rows).run()
    pool.close()


def table(rows: list[dict]) -> list[tuple]:
    lines = [("kernel", "d", "ms now", "ms best", "GB/s best", "best")]
    for row in sorted(rows, key=lambda row: (row["hidden_size"], row["kernel"])):
        milliseconds = (f"{row['seconds_now'] * 1e3:.3f}", f"{row['seconds_best'] * 1e3:.3f}")
        speed = f"{row['bytes'] / row['seconds_best'] / 1e9:.0f}"
        best = ", ".join(f"{name} {value}" for name, value in row["best"].items()) or "as now"
        lines.append((row["kernel"], str(row["hidden_size"]), *milliseconds, speed, best))
    return lines
