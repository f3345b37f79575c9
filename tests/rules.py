"""Update rules as their papers and conventions list them, in long double, for any step number.

A rule makes ``step(x, g, t)``: the parameters after the t-th gradient. Its memory is its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

Step = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
WIDE = np.longdouble
IS_WIDE = np.finfo(WIDE).nmant > np.finfo(np.float64).nmant
"""Whether long double has more digits than float64, which it has not everywhere."""


class Averages:
    """Moving averages by name, from 0."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __call__(self, name: str, value: Any, b: Any) -> Any:
        self.values[name] = b * self.values.get(name, WIDE(0)) + (1 - b) * value
        return self.values[name]


def adam(
    lr: float = 1e-3, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, wd: float = 0.0
) -> Step:
    """With decoupled decay: AdamW. ``lr`` may be a function of the step from 0."""
    average, beta1, beta2 = Averages(), WIDE(b1), WIDE(b2)

    def step(x: Any, g: Any, t: int) -> Any:
        rate = WIDE(lr(t - 1) if callable(lr) else lr)
        m, v = average("m", g, beta1), average("v", g * g, beta2)
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
        return x * (1 - rate * WIDE(wd)) - rate * m / (np.sqrt(v) + WIDE(eps))

    return step


def adamw() -> Step:
    return adam(wd=1e-2)


def amsgrad() -> Step:
    """PyTorch's: the largest raw v, then corrected."""
    lr, b1, b2, eps = (WIDE(number) for number in (1e-3, 0.9, 0.999, 1e-8))
    average, largest = Averages(), [WIDE(0)]

    def step(x: Any, g: Any, t: int) -> Any:
        m = average("m", g, b1) / (1 - b1**t)
        largest[0] = np.maximum(largest[0], average("v", g * g, b2))
        return x - lr * m / (np.sqrt(largest[0] / (1 - b2**t)) + eps)

    return step


def adamod() -> Step:
    """The authors' code: the average is of rates with both corrections in them."""
    lr, b1, b2, b3, eps = (WIDE(number) for number in (1e-3, 0.9, 0.999, 0.999, 1e-8))
    average = Averages()

    def step(x: Any, g: Any, t: int) -> Any:
        m, v = average("m", g, b1), average("v", g * g, b2)
        rate = lr * np.sqrt(1 - b2**t) / (1 - b1**t) / (np.sqrt(v) + eps)
        return x - np.minimum(rate, average("rate", rate, b3)) * m

    return step


def diffgrad() -> Step:
    """The authors' code: eps-hat form."""
    lr, b1, b2, eps = (WIDE(number) for number in (1e-3, 0.9, 0.999, 1e-8))
    average, before = Averages(), [WIDE(0)]

    def step(x: Any, g: Any, t: int) -> Any:
        m, v = average("m", g, b1), average("v", g * g, b2)
        friction = 1 / (1 + np.exp(-np.abs(before[0] - g)))
        before[0] = g
        rate = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        return x - rate * friction * m / (np.sqrt(v) + eps)

    return step


def nadam() -> Step:
    """PyTorch's: b1 warms up by 0.96^(t/250)."""
    lr, b1, b2, eps = (WIDE(number) for number in (1e-3, 0.9, 0.999, 1e-8))
    average, product = Averages(), [WIDE(1)]

    def momentum(t: int) -> Any:
        return b1 * (1 - WIDE(0.5) * WIDE(0.96) ** (t * WIDE(0.004)))

    def step(x: Any, g: Any, t: int) -> Any:
        m, v = average("m", g, b1), average("v", g * g, b2) / (1 - b2**t)
        now, ahead = momentum(t), momentum(t + 1)
        product[0] = product[0] * now
        moved = ahead * m / (1 - product[0] * ahead) + (1 - now) * g / (1 - product[0])
        return x - lr * moved / (np.sqrt(v) + eps)

    return step


def radam() -> Step:
    """PyTorch's: by the corrected m as long as rho_t is at most 5."""
    lr, b1, b2, eps = (WIDE(number) for number in (1e-3, 0.9, 0.999, 1e-8))
    average, end = Averages(), 2 / (1 - b2) - 1

    def step(x: Any, g: Any, t: int) -> Any:
        m, v = average("m", g, b1) / (1 - b1**t), average("v", g * g, b2)
        rho = end - 2 * t * b2**t / (1 - b2**t)
        if rho <= 5:
            return x - lr * m
        r = np.sqrt((rho - 4) * (rho - 2) * end / ((end - 4) * (end - 2) * rho))
        return x - lr * r * m * np.sqrt(1 - b2**t) / (np.sqrt(v) + eps)

    return step


def lion() -> Step:
    lr, b1, b2 = WIDE(1e-4), WIDE(0.9), WIDE(0.99)
    average = Averages()

    def step(x: Any, g: Any, t: int) -> Any:
        m = average.values.get("m", WIDE(0))
        average("m", g, b2)
        return x - lr * np.sign(b1 * m + (1 - b1) * g)

    return step


RULES: dict[str, Callable[[], Step]] = {
    rule.__name__: rule for rule in (adam, adamw, amsgrad, adamod, diffgrad, nadam, radam, lion)
}


def gradients(steps: int, weights: int = 4) -> np.ndarray:
    """Noise around a slow swing, for weights of four sizes."""
    noise = np.random.default_rng(18).standard_normal((steps, weights))
    swing = 0.3 * np.sin(2 * np.pi * np.arange(steps) / 997)
    return (noise + swing[:, None]) * np.resize([1e-4, 1e-1, 1e1, 1e3], weights)


def path_of(rule: Step, given: np.ndarray, start: float, every: int = 1) -> np.ndarray:
    """The parameters after every so many steps."""
    x, path = np.full(given.shape[1], start, WIDE), []
    for t, g in enumerate(given, 1):
        x = rule(x, g.astype(WIDE), t)
        if t % every == 0:
            path.append(x)
    return np.stack(path)


def updates_of(rule: Step, given: np.ndarray) -> np.ndarray:
    """The parameters after every step, each from zero."""
    zero = np.zeros(given.shape[1], WIDE)
    return path_of(lambda x, g, t: rule(zero, g, t), given, 0.0)


def error(path: np.ndarray, rule: np.ndarray) -> float:
    """Of each weight the root mean square of the differences, relative to its own; their median.

    Where rounding turns one of Lion's signs, that weight is two steps off for ever.
    """
    apart = np.sqrt(np.mean((path - rule) ** 2, axis=0) / np.mean(rule**2, axis=0))
    return float(np.median(apart))
