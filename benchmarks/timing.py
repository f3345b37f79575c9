"""How the benchmarks take time: everyone in turns, and ratios of times of the same round."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

ENOUGH = 0.05  # seconds: a turn takes as many steps as fit in


def update_and_apply(optimizer: optax.GradientTransformation) -> Any:
    """A jitted step for given gradients that reuses the buffers of parameters and state."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


class Run:
    """A compiled step that goes on from where it stopped; call it with a number of steps.

    Args:
      step: jitted, from parameters, state and the rest to new parameters, new state and more.
    """

    def __init__(self, step: Any, params: Any, state: Any, *rest: Any) -> None:
        self.params, self.state, self.rest = params, state, rest
        began = time.perf_counter()
        traced = step.trace(params, state, *rest)
        at_trace = time.perf_counter()
        lowered = traced.lower()
        at_lower = time.perf_counter()
        self.compiled = lowered.compile()
        self.seconds = {
            "trace s": at_trace - began,
            "lower s": at_lower - at_trace,
            "compile s": time.perf_counter() - at_lower,
        }

    def __call__(self, times: int) -> None:
        for _ in range(times):
            self.params, self.state, *_ = self.compiled(self.params, self.state, *self.rest)
        jax.block_until_ready(self.params)


def seconds(run: Callable[[int], None], times: int) -> float:
    """Of one of so many steps."""
    began = time.perf_counter()
    run(times)
    return (time.perf_counter() - began) / times


def in_turns(timers: Mapping[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """The seconds of a step of everyone in every round, in a random order in each.

    Args:
      timers: by name, from a number of steps to the seconds of one.
    """
    turns = {}
    for name, timer in timers.items():
        timer(1)
        turns[name] = max(1, min(200, int(ENOUGH / timer(1))))
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
