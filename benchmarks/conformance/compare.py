"""How far one path of parameters is from another, and from which step on."""

from __future__ import annotations

import dataclasses

import numpy as np

EXACT = 1e-12
ROUNDING = 1e-11
"""Of two codes of one formula where it loses digits in float64: RAdam's rho_inf - 2 t b2^t / ..."""


@dataclasses.dataclass(frozen=True)
class Departure:
    """The first step (from 1) that is not exact, or None; and the largest relative difference."""

    step: int | None
    by: float


def departure(made: np.ndarray, truth: np.ndarray, start: np.ndarray) -> Departure:
    """Differences of each weight, in units of the largest value that it had so far in either.

    So the largest is 2, whatever a path does; what is not finite counts as 2.
    """
    finite = np.isfinite(made)
    made = np.where(finite, made, 0.0)
    sizes = np.maximum(np.abs(made), np.abs(truth))
    sizes[0] = np.maximum(sizes[0], np.abs(start))
    sizes = np.maximum.accumulate(sizes, axis=0)
    apart = np.divide(np.abs(made - truth), sizes, where=sizes > 0, out=np.zeros_like(truth))
    by_step = np.where(finite, apart, 2.0).reshape(len(truth), -1).max(axis=1)
    late = np.flatnonzero(by_step > EXACT)
    return Departure(int(late[0]) + 1 if len(late) else None, float(by_step.max()))
