"""Blocks of 256 numbers with a scale each, in views that compilers are fast at.

Blocks lie along the last axis if they divide it, else in the flattened array. The numbers are the
same in every view; what differs is the shape in which a compiler is shown them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

BLOCK = 256
"""How many numbers share a scale in 8 bits."""


def _along_last_axis(shape: tuple[int, ...]) -> bool:
    return bool(shape) and shape[-1] % BLOCK == 0


def in_blocks(x: jax.Array) -> jax.Array:
    if _along_last_axis(x.shape):  # so that an array split over devices stays where it is
        return x.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    return jnp.pad(x.reshape(-1), (0, -x.size % BLOCK)).reshape(-1, 1, BLOCK)


def spread(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of each element."""
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, BLOCK))
    if _along_last_axis(shape):
        return each.reshape(shape)
    return each.reshape(-1)[: int(np.prod(shape))].reshape(shape)


class View(NamedTuple):
    """How a compiler is shown that there are blocks: the numbers are the same in every view."""

    largest: Callable[[jax.Array], jax.Array]
    """The largest magnitude among the finite numbers of each block."""
    marked: Callable[[jax.Array], jax.Array]
    """The same of numbers of at least 0, negative (-0.0) where one is not finite, or so many are
    above 1e36 that it does not matter."""
    spread: Callable[[jax.Array, tuple[int, ...]], jax.Array]
    """From one number for each block to one for each element of a shape."""


def seen_by(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a view and arrays in the view of the platform that it is compiled for."""

    @functools.wraps(function)
    def seen(*arrays: Any) -> Any:
        views = {name: functools.partial(function, view) for name, view in VIEWS.items()}
        return jax.lax.platform_dependent(*arrays, **views)

    return seen


def _folded(x: jax.Array) -> jax.Array:
    """The largest of each block, half upon half: XLA:CPU is several times faster at this than at a
    reduction of what it has just calculated."""
    blocks = in_blocks(x)
    while blocks.shape[-1] > 16:
        half = blocks.shape[-1] // 2
        blocks = jnp.maximum(blocks[..., :half], blocks[..., half:])
    return jnp.max(blocks, axis=-1)


def _largest_by_halves(x: jax.Array) -> jax.Array:
    magnitudes = jnp.abs(x)
    return _folded(jnp.where(magnitudes < jnp.inf, magnitudes, 0))


def _marked_by_halves(x: jax.Array) -> jax.Array:
    # A sum shows what is not finite at little cost; of finite numbers it overflows above 1e36 only.
    # The largest of all would not do: XLA:CPU loses a NaN on the way.
    largest = _largest_by_halves(x)
    return jnp.where(jnp.isfinite(jnp.sum(in_blocks(x), axis=-1)), largest, -largest)


_MAGNITUDE, _INFINITY, _MARK = np.int32(0x7FFFFFFF), np.int32(0x7F800000), np.int32(-(2**31))


def _with_mark(x: jax.Array) -> jax.Array:
    """The bits of magnitudes, int32, ordered as they are; of what is not finite those of -0.0."""
    magnitude = jax.lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    return jnp.where(magnitude < _INFINITY, magnitude, _MARK)


def _joined(x: jax.Array) -> jax.Array:
    """Along the last axis, the largest magnitude, with a mark if there is one; in one pass."""

    def join(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.maximum(a & _MAGNITUDE, b & _MAGNITUDE) | ((a | b) & _MARK)

    return jax.lax.reduce(x, np.int32(0), join, (x.ndim - 1,))


def _marked_by_rows(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(_joined(in_blocks(_with_mark(x))), jnp.float32)


def _largest_by_rows(x: jax.Array) -> jax.Array:
    return jnp.abs(_marked_by_rows(x))


_TILE = (8, 128)
"""How a TPU lays out the last two axes of a float32 array."""


def _in_tiles(x: jax.Array) -> jax.Array:
    """Axes (..., rows / 8, 8, columns / 128, 128), which a TPU takes for the array as it lies."""
    *outer, rows, columns = x.shape
    high, wide = _TILE
    return x.reshape(*outer, rows // high, high, columns // wide, wide)


def _are_tiles(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1 and shape[-2] % _TILE[0] == 0 and _along_last_axis(shape)


def _marked_by_tiles(x: jax.Array) -> jax.Array:
    if not _are_tiles(x.shape):
        return _marked_by_rows(x)
    of_lines = _joined(_in_tiles(_with_mark(x)))
    pairs = of_lines.reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK // _TILE[1])
    return jax.lax.bitcast_convert_type(_joined(pairs), jnp.float32)


def _largest_by_tiles(x: jax.Array) -> jax.Array:
    return jnp.abs(_marked_by_tiles(x))


def _spread_by_tiles(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    if not _are_tiles(shape):
        return spread(scales, shape)
    of_lines = jnp.repeat(scales, BLOCK // _TILE[1], axis=-1)
    *outer, rows, lines = of_lines.shape
    of_lines = of_lines.reshape(*outer, rows // _TILE[0], _TILE[0], lines, 1)
    return jnp.broadcast_to(of_lines, (*of_lines.shape[:-1], _TILE[1])).reshape(shape)


def _marked_of_lines(x: jax.Array) -> jax.Array:
    """Of an array whose last axis is a block, with reductions that a kernel has."""
    magnitudes = jnp.abs(x)
    finite = magnitudes < jnp.inf
    largest = jnp.max(jnp.where(finite, magnitudes, 0), axis=-1)
    return jnp.where(jnp.min(finite.astype(jnp.int32), axis=-1) > 0, largest, -largest)


def _largest_of_lines(x: jax.Array) -> jax.Array:
    return jnp.abs(_marked_of_lines(x))


def _spread_over_lines(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jnp.broadcast_to(scales[..., None], shape)


IN_KERNEL = View(_largest_of_lines, _marked_of_lines, _spread_over_lines)
"""Of arrays whose last axis is a block, as a kernel holds them."""

VIEWS = {
    "cpu": View(_largest_by_halves, _marked_by_halves, spread),
    "tpu": View(_largest_by_tiles, _marked_by_tiles, _spread_by_tiles),
    "default": View(_largest_by_rows, _marked_by_rows, spread),
}
"""By platform."""
