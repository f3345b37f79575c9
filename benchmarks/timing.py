"""How the benchmarks take time: everyone in turns, and ratios of times of the same round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

ENOUGH = 0.05  # seconds: a turn takes as many steps as fit in


def seconds(run: Callable[[int], None], times: int) -> float:
    """Of one of so many steps."""
    began = time.perf_counter()
    run(times)
    return (time.perf_counter() - began) / times


def in_turns(
    timers: Mapping[str, Callable[[int], float]], rounds: int, least: int = 1
) -> dict[str, list[float]]:
    """The seconds of a step of everyone in every round, in a random order in each.

    Args:
      timers: by name, from a number of steps to the seconds of one.
      least: steps in a turn, where more would not fit in the time of one.
    """
    turns = {}
    for name, timer in timers.items():
        timer(1)
        turns[name] = max(least, min(200, int(ENOUGH / timer(1))))
    times: dict[str, list[float]] = {name: [] for name in timers}
    order = list(timers)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            times[name].append(timers[name](turns[name]))
    return times


def ratio(of: Sequence[float], to: Sequence[float]) -> tuple[float, float, float]:
    """The median of the paired ratios, and their quartiles."""
    ratios = sorted(a / b for a, b in zip(of, to, strict=True))
    if len(ratios) == 1:
        return (ratios[0],) * 3
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive")
    return median, lower, upper
