# Copyright 2026 The attnres authors. Licensed under the Apache License, Version 2.0.
"""In what order a pipeline's processes compute, what they hold meanwhile, and how long it takes.

The orders are those of `torch.distributed.pipelining`. Stage `i` is in process `i % num_ranks`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Operation(NamedTuple):
    stage: int
    is_backward: bool
    microbatch: int

    def source(self, num_stages: int) -> "Operation | None":
        """The one whose result this one takes."""
        if self.is_backward:
            is_last = self.stage == num_stages - 1
            return Operation(self.stage + (not is_last), not is_last, self.microbatch)
        return Operation(self.stage - 1, False, self.microbatch) if self.stage else None

    def taker(self, num_stages: int) -> "Operation | None":
        """The one in another stage that takes its result."""
        stage = self.stage - 1 if self.is_backward else self.stage + 1
        return Operation(stage, self.is_backward, self.microbatch) if 0 <= stage < num_stages else None


def order(schedule: str, rank: int, num_ranks: int, num_virtual: int, num_microbatches: int) -> list[Operation]:
    """What the process `rank` computes, in order, in a step.

    Args:
        schedule: `"gpipe"` (ScheduleGPipe, with several stages per process ScheduleLoopedBFS) or `"1f1b"`
            (Schedule1F1B, ScheduleInterleaved1F1B).
        num_virtual: stages per process.
    """
    if schedule == "gpipe":
        stages = range(rank, num_ranks * num_virtual, num_ranks)
        back = range(num_microbatches) if num_virtual == 1 else reversed(range(num_microbatches))
        back = list(back)
        return [Operation(stage, False, i) for stage in stages for i in range(num_microbatches)] + [
            Operation(stage, True, i) for stage in reversed(stages) for i in back
        ]
    per_round = num_microbatches // max(1, num_microbatches // num_ranks)

    def nth(number: int, is_backward: bool) -> Operation:
        turn, place = divmod(number, per_round)
        done, virtual = divmod(turn, num_virtual)
        virtual = num_virtual - 1 - virtual if is_backward else virtual
        return Operation(virtual * num_ranks + rank, is_backward, done * per_round + place)

    behind = num_ranks - 1 - rank
    warmup = behind if num_virtual == 1 else (num_virtual - 1) * per_round + 2 * behind
    total = num_virtual * num_microbatches
    warmup = min(warmup, total)
    operations = [nth(i, False) for i in range(warmup)]
    for i in range(total - warmup):
        operations += [nth(warmup + i, False), nth(i, True)]
    return operations + [nth(i, True) for i in range(total - warmup, total)]


def most_held(operations: list[Operation], kept: dict[int, float], left: dict[int, float]) -> tuple[float, int]:
    """The largest sum of what a process holds in a step, and the most microbatches that it has in flight, counted once
    per stage.

    Args:
        kept: by stage, what a forward pass keeps for its backward pass.
        left: by stage, how much more is held after its backward pass for those of earlier stages of the process.
    """
    held = most = in_flight = most_in_flight = 0
    for operation in operations:
        if operation.is_backward:
            held += left[operation.stage]
            most = max(most, held)
            held -= kept[operation.stage]
            in_flight -= 1
        else:
            held += kept[operation.stage]
            in_flight += 1
        most, most_in_flight = max(most, held), max(most_in_flight, in_flight)
    return most, most_in_flight


@dataclass(frozen=True)
class Simulation:
    """Args:
    seconds: from the first operation's begin to the last one's end.
    busy: by process, the seconds in which it computes.
    """

    seconds: float
    busy: list[float]

    @property
    def bubble(self) -> float:
        """The share of the time in which a process waits, in the mean."""
        return 1 - sum(self.busy) / (len(self.busy) * self.seconds)


def simulate(
    orders: list[list[Operation]],
    compute: Callable[[Operation], float],
    transmit: Callable[[Operation], tuple[float, float]],
    is_ahead: bool = True,
) -> Simulation:
    """Runs a step in which each process keeps to its order.

    A transfer begins when its data are there and what was sent before on this link, in this direction, has left. Links
    carry both directions at once.

    Args:
        orders: by process.
        compute: seconds of an operation.
        transmit: latency, and seconds on the link, of what is sent to an operation from another process.
        is_ahead: whether data are received while a process computes something else. Otherwise their transfer begins
            only when the process has nothing else to do.
    """
    num_ranks, num_stages = len(orders), 1 + max(operation.stage for own in orders for operation in own)
    nexts, free, busy = [0] * num_ranks, [0.0] * num_ranks, [0.0] * num_ranks
    ends, arrivals, links = {}, {}, {}

    def send(operation: Operation, link: tuple, begin: float) -> float:
        latency, seconds = transmit(operation)
        links[link] = max(begin, links.get(link, 0.0)) + seconds
        return links[link] + latency

    def arrival(operation: Operation, rank: int) -> float | None:
        source = operation.source(num_stages)
        if source is None or source.stage == operation.stage:
            return 0.0 if source is None else ends.get(source)
        if is_ahead or source not in ends:
            return arrivals.get(operation)
        return send(operation, (source.stage % num_ranks, rank), max(ends[source], free[rank]))

    is_stuck = False
    while not is_stuck:
        is_stuck = True
        for rank, own in enumerate(orders):
            while nexts[rank] < len(own) and (come := arrival(own[nexts[rank]], rank)) is not None:
                operation, is_stuck = own[nexts[rank]], False
                nexts[rank] += 1
                seconds = compute(operation)
                busy[rank] += seconds
                free[rank] = ends[operation] = max(free[rank], come) + seconds
                if is_ahead and (taker := operation.taker(num_stages)):
                    arrivals[taker] = send(taker, (rank, taker.stage % num_ranks), ends[operation])
    if any(number < len(own) for number, own in zip(nexts, orders)):
        raise ValueError("these orders wait for one another.")
    return Simulation(max(free), busy)
