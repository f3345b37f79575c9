"""By what a buffer is to be multiplied to be what it is in another optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.core import Tracer

from adaptive_opt.checkpoints.meaning import RATE, Factor, Meaning, Unknown, alike


def ratio(held: Meaning | Unknown, wanted: Meaning | Unknown) -> float | str:
    """By what a buffer is to be multiplied to mean what is wanted; or why that cannot be."""
    if isinstance(held, Unknown) or isinstance(wanted, Unknown):
        is_same = isinstance(held, Unknown) and held.is_alike(wanted)
        return 1.0 if is_same else "what it is made of cannot be found out, or is something else"
    if alike(held.value, wanted.value):
        sign = 1.0
    elif alike(held.value, wanted.mirrored):
        sign = -1.0
    else:
        return "it is made of something else, or in another order"
    if wanted.is_corrected and not alike(held.initial, wanted.initial):
        return "it starts elsewhere, and is corrected here for its start"
    factor = _of_factors(held, wanted)
    return factor if isinstance(factor, str) else sign * factor


def _of_factors(held: Meaning, wanted: Meaning) -> float | str:
    """The factors in the buffer that is wanted, by those in the one that is held.

    Where both take the same steps, all factors are known. Else the target has another learning
    rate, which changes what is to come and not what has been: what is in the buffer is the rate of
    the source, if it can be told which of its factors that is.
    """
    there, here = _apart(held.factors, wanted.factors, _by_value)
    if not there and not here:
        return 1.0
    if (exact := _of_equal_steps(held, wanted, there, here)) is not None:
        return exact
    there, here = _apart(there, here, _by_kind)
    behind_it, behind = (
        _apart(each.of_update, each.factors, _by_value)[0] for each in (held, wanted)
    )
    more, less = _apart(behind_it, behind, _by_value)
    more, less = _apart(more, less, _by_kind)
    less = [f for f in map(_settled, less) if f.value != 1]
    if (not there and not here) or _are_laid_out_alike(held, wanted):
        return 1.0
    if there and here:
        if len(there) == len(here) == 1 and _kinds(there) == _kinds(here) and not more + less:
            return 1.0
        if not all(map(_is_number, [*there, *here, *more, *less])):
            return (
                "other factors are part of it, and one of them, or of those behind, is a schedule"
            )
        return "it is multiplied by something else"
    inside, where = (held, "there") if there else (wanted, "here")
    what = f"{' and '.join(_kinds(there or here))} is part of it {where} only"
    if not inside.is_linear:
        return what
    of_them = there or [f for f in more if f.kind in _kinds(here)]
    if not all(map(_is_number, [*of_them, *([] if there else less)])):
        return f"{what}, and is a schedule, so that every gradient in it has its own"
    if not there and (less or len(of_them) != len(here)):
        return f"{what}, and which of the factors in the source it was cannot be told"
    rate = _product(of_them)
    if rate == 0:
        return f"{what}, and is 0"
    return 1 / rate if there else rate


def _of_equal_steps(
    held: Meaning, wanted: Meaning, there: Sequence[Factor], here: Sequence[Factor]
) -> float | None:
    """The same where all factors of an update make the same; None where they do not."""
    if not (held.is_linear or not there) or not (wanted.is_linear or not here):
        return None
    if any(_apart(each.factors, each.of_update, _by_value)[0] for each in (held, wanted)):
        return None
    more, less = _apart(held.of_update, wanted.of_update, _by_value)
    here, less = [[*map(_settled, some)] for some in (here, less)]
    if not all(map(_is_number, [*there, *here, *more, *less])):
        return None
    steps, others = _product(more), _product(less)
    if steps == 0 or not math.isclose(steps, others, rel_tol=1e-9):
        return None
    inside = _product(there)
    return _product(here) / inside if inside else None


def _apart(
    some: Sequence[Factor], others: Sequence[Factor], same: Callable[[Factor, Factor], bool]
) -> tuple[list[Factor], list[Factor]]:
    """Those of each that are not among the others, as often as they are there."""
    left, right = [], list(others)
    for factor in some:
        twin = next((i for i, x in enumerate(right) if same(factor, x)), None)
        if twin is None:
            left.append(factor)
        else:
            del right[twin]
    return left, right


def _by_value(one: Factor, other: Factor) -> bool:
    if one.kind != other.kind:
        return False
    if _is_number(one) and _is_number(other):
        return math.isclose(abs(float(one.value)), abs(float(other.value)), rel_tol=1e-12)
    return one.value is other.value


def _by_kind(one: Factor, other: Factor) -> bool:
    """A learning rate is told from another factor by its value only: ``optax.scale`` is both."""
    return one.kind == other.kind != RATE


def _are_laid_out_alike(held: Meaning, wanted: Meaning) -> bool:
    """Whether each factor has its counterpart, so that only settings differ."""
    return all(
        [f.by for f in before] == [f.by for f in after]
        for before, after in (
            (held.factors, wanted.factors),
            (held.of_update, wanted.of_update),
        )
    )


def _kinds(factors: Sequence[Factor]) -> list[str]:
    return sorted({factor.kind for factor in factors})


def _settled(factor: Factor) -> Factor:
    """Of the target: a schedule that is one number, as that."""
    if not callable(factor.value):
        return factor
    schedule: Any = factor.value
    values = {float(schedule(np.asarray(step))) for step in (0, 1, 10, 100, 1000, 10**5, 10**7)}
    return factor._replace(value=values.pop()) if len(values) == 1 else factor


def _is_number(factor: Factor) -> bool:
    return not callable(factor.value) and not isinstance(factor.value, Tracer)


def _product(factors: Sequence[Factor]) -> float:
    return abs(math.prod(float(factor.value) for factor in factors))
