"""Hyperparameters: a number, a traced scalar, or a schedule of the 0-based step number.

Concrete values are checked where they are given, traced ones pass. Errors say what was given, what
is allowed and what to do.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, TypeGuard, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.core.trees import dtype_of, is_of_keys

Hyperparameter: TypeAlias = float | jax.Array | optax.Schedule
"""A number, a scalar array (traced or not), or a schedule ``step -> scalar``."""

Scope: TypeAlias = Literal["weight", "tensor", "tree"]
"""What has a number of its own: every weight, every tensor, or the tree as a whole."""

SCOPES: dict[str, Scope] = {name: name for name in get_args(Scope)}

T = TypeVar("T")
_NUMBERS = (int, float, np.generic, np.ndarray, jax.Array)


def value_at(
    hyperparameter: Hyperparameter, count: jax.Array, name: str = "a hyperparameter"
) -> Any:
    """The value at the ``count``-th gradient (1-based); schedules are asked for ``count - 1``.

    The name of the argument is for the message where a schedule's value is none.
    """
    if callable(hyperparameter):
        with jax.numpy_dtype_promotion("standard"):
            return check_returned(name, hyperparameter(count - 1))
    if isinstance(hyperparameter, (np.generic, np.ndarray)):
        return hyperparameter.item()  # as precise as a Python number, as it was meant
    return hyperparameter


def scaled(hyperparameter: Hyperparameter, factor: Any) -> Hyperparameter:
    """A hyperparameter times a number, whether it is a number itself or a schedule."""
    if callable(hyperparameter):
        return lambda step: hyperparameter(step) * factor
    return hyperparameter * factor


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def check_decay(**values: Any) -> None:
    """Each value is the decay of a moving average: in [0, 1)."""
    for name, value in values.items():
        _check(name, value, lambda x: 0 <= x < 1, "in [0, 1)")


def check_nonnegative(**values: Any) -> None:
    """Each value is finite and at least 0."""
    for name, value in values.items():
        _check(name, value, lambda x: 0 <= x < math.inf, "finite and at least 0")


def check_positive(**values: Any) -> None:
    """Each value is finite and greater than 0."""
    for name, value in values.items():
        _check(name, value, lambda x: 0 < x < math.inf, "finite and greater than 0")


def check_at_least_one(**values: Any) -> None:
    """Each value is finite and at least 1."""
    check_at_least(1, **values)


def check_at_least(least: float, **values: Any) -> None:
    """Each value is finite and at least so much."""
    for name, value in values.items():
        _check(name, value, lambda x: least <= x < math.inf, f"finite and at least {least}")


def check_fraction(**values: Any) -> None:
    """Each value is in [0, 1]."""
    for name, value in values.items():
        _check(name, value, lambda x: 0 <= x <= 1, "in [0, 1]")


def check_whole(least: int, **values: Any) -> None:
    """Each value is a whole number of at least so much, and no schedule."""
    check_constant(**values)
    for name, value in values.items():
        whole_and_enough = f"whole and at least {least}"
        _check(name, value, lambda x: x >= least and x % 1 == 0, whole_and_enough)


def check_constant(**values: Any) -> None:
    """No value is a schedule."""
    for name, value in values.items():
        if callable(value):
            raise TypeError(f"{name} must be a number and not a schedule, got {value!r}.")


def check_fixed(decides: str, **values: Any) -> None:
    """No value is an array, for it decides something that ``init`` and ``update`` must agree on."""
    for name, value in values.items():
        if not is_fixed(value):
            raise TypeError(
                f"{name} decides {decides}, and must be a Python number, got {value!r}. Name it in"
                " static_args of optax.inject_hyperparams."
            )


def check_optimizer(wrapper: str, inner: Any) -> None:
    """What a wrapper is given is an optimizer, and not, say, the function that makes one."""
    if isinstance(inner, optax.MultiSteps):
        raise TypeError(
            f"{wrapper} was given an optax.MultiSteps, which is not a transformation itself: give"
            " its .gradient_transformation()."
        )
    if not isinstance(inner, optax.GradientTransformation):
        raise TypeError(
            f"{wrapper} takes an optimizer, such as {wrapper}(adam(1e-3)), got {inner!r}."
        )


def _check(name: str, value: Any, holds: Callable[[float], bool], allowed: str) -> None:
    if callable(value):
        return
    if (
        not isinstance(value, _NUMBERS)
        or dtype_of(value) == np.bool_
        or is_of_keys(dtype_of(value))
    ):
        raise TypeError(
            f"{name} must be a number {allowed}, a scalar array or a schedule, got {value!r}."
        )
    _check_type(name, value)
    if is_number(value) and not holds(float(value)):
        hint = _UPHILL if name == "learning_rate" and float(value) < 0 else ""
        raise ValueError(f"{name} must be {allowed}, got {float(value):g}.{hint}")


def check_returned(name: str, value: Any) -> Any:
    """What a schedule returned: a scalar, wide enough for a hyperparameter."""
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"the schedule of {name} must return a number, got {value!r}.")
    _check_type(f"what the schedule of {name} returned", value)
    return value


def _check_type(name: str, value: Any) -> None:
    if np.ndim(value) != 0:
        raise ValueError(f"{name} must be a scalar, got an array of shape {np.shape(value)}.")
    dtype = dtype_of(value)
    if isinstance(value, (np.ndarray, np.generic, jax.Array)) and (
        jnp.issubdtype(dtype, jnp.complexfloating)
        or (jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32)
    ):
        raise ValueError(
            f"{name} arrived as {dtype}, which cannot hold hyperparameters (0.999 in bfloat16 is"
            " 1): pass it as float32. With optax.inject_hyperparams, give"
            " hyperparam_dtype=jnp.float32."
        )


_UPHILL = (
    " To go uphill, put optax.scale(-1.0) in front of the optimizer, which is PyTorch's"
    " maximize=True; or behind it, which is a negative learning rate: there weight decay is turned"
    " around too. For instance optax.chain(rmsprop(1e-4), optax.scale(-1.0))."
)


def choose(name: str, value: str | None, allowed: Mapping[Any, T], hint: str = "") -> T:
    """``allowed[value]``, or an error that lists what is allowed."""
    if value not in allowed:
        options = ", ".join(map(repr, allowed))
        raise ValueError(f"{name} must be one of {options}, got {value!r}.{hint}")
    return allowed[value]


def is_number(value: Any) -> TypeGuard[Any]:
    """Whether the value of a hyperparameter is known before anything runs."""
    if isinstance(value, jax.Array):
        return not isinstance(value, Tracer) and value.is_fully_addressable
    return isinstance(value, (int, float, np.generic, np.ndarray))


def is_fixed(value: Any) -> bool:
    """Whether a hyperparameter is a number, and not an array, which may hold another one later.

    What is decided by a number, a buffer say, must be the same when ``init`` runs on an array and
    when ``update`` is traced.
    """
    return is_number(value) and not isinstance(value, jax.Array)


def is_zero(value: Any) -> bool:
    """Whether a hyperparameter is the number 0."""
    return is_fixed(value) and float(value) == 0


def are_different_numbers(a: Any, b: Any) -> bool:
    """Whether two hyperparameters are known to differ."""
    return is_number(a) and is_number(b) and float(a) != float(b)


def needed(module: str, extra: str, who: str) -> Any:
    """A module of an extra, imported where it is used; an error that names the extra."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{who} need {module.split('.')[0]}, which is not installed: pip install"
            f" 'adaptive_opt[{extra}]'."
        ) from error


def check_names(argument: str, given: Collection[str], known: Iterable[str]) -> frozenset[str]:
    """A set of names that somebody gave, each of which is known; the error names the nearest."""
    if isinstance(given, str):
        raise TypeError(f"{argument} takes a set of names: {{{given!r}}}.")
    known = sorted({*known})
    for name in map(str, given):
        if name not in known:
            near = nearest(name, known)
            hint = f" Did you mean {near!r}?" if near else ""
            raise ValueError(
                f"{argument}= names {name!r}, which is not there.{hint} There are"
                f" {', '.join(known) or 'none'}."
            )
    return frozenset(given)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The one of the names that was meant, if one is near."""
    return next(iter(difflib.get_close_matches(name, [*known], n=1, cutoff=0.5)), None)


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
