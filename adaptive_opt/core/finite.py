"""What is finite stays finite where that costs nothing: bounds on sums and casts, and the root.

What is not finite when it comes in is left as it is: a bound must not hide a broken gradient.
Averages have no bound. The square of a gradient above 1.8e19 is infinite in float32, in every
public code and here; the weight then stands still, and ``skip_nonfinite`` refuses such a step. (A
bound was tried: it costs 6 bytes of 36 a weight, and AdaMod its single pass.)
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def largest_square(dtype: DTypeLike) -> float:
    """What a square counts as at most: half the largest float, which no average of it exceeds."""
    return float(jnp.finfo(dtype).max) / 2


def largest_squared(dtype: DTypeLike) -> float:
    """Of a gradient, the root of ``largest_square``; of both parts of a complex one, less."""
    is_complex = jnp.issubdtype(dtype, jnp.complexfloating)
    return math.sqrt(largest_square(dtype) / (2 if is_complex else 1))


def squarable(x: jax.Array) -> jax.Array:
    """``x``, at most ``largest_squared``."""
    limit = largest_squared(x.dtype)
    return _between(x, -limit, limit, x)


def summable(total: jax.Array, *parts: jax.Array) -> jax.Array:
    """A sum where all its parts are finite: at most half the largest float."""
    limit = largest_square(total.dtype)
    return _between(total, -limit, limit, *parts)


def narrowed(x: Any, dtype: DTypeLike) -> jax.Array:
    """``x`` in a dtype: what is finite in the old one becomes at most the largest of the new."""
    if isinstance(x, jax.Array) and x.dtype == dtype:
        return x
    x = jnp.asarray(x)
    if jnp.issubdtype(dtype, jnp.inexact) and jnp.issubdtype(x.dtype, jnp.inexact):
        largest = float(jnp.finfo(dtype).max)
        if float(jnp.finfo(x.dtype).max) > largest:
            x = _between(x, -largest, largest, x)
    return x.astype(dtype)


def _between(x: jax.Array, low: Any, high: Any, *unless: jax.Array) -> jax.Array:
    """``x`` in a range, both parts of it, where all of ``unless`` are finite."""
    if jnp.iscomplexobj(x):
        parts = (_between(part, low, high, *unless) for part in (x.real, x.imag))
        return jax.lax.complex(*parts)
    bounded = jnp.minimum(jnp.maximum(x, low), high)
    for each in unless:
        bounded = jnp.where(jnp.isfinite(each), bounded, x)
    return bounded


@jax.custom_jvp
def root(x: jax.Array) -> jax.Array:
    """The square root; its slope at 0 counts as 0, where it is infinite.

    A weight without a gradient then has a derivative through the update, that of its direction.
    """
    return jnp.sqrt(x)


@root.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    (x,), (change,) = primals, tangents
    value, at_zero = root(x), x == 0
    slope = jnp.where(at_zero, 0, 0.5 / jnp.where(at_zero, 1, value))
    return value, slope * change
