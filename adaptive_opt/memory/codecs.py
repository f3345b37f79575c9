"""Arrays in fewer bits: bfloat16 with stochastic rounding, and 8 bits in blocks.

Rounding to nearest loses what an average is made of: with b2 = 0.999 an increment is smaller than
half the distance of two bfloat16 numbers, and the average stands still. Stochastic rounding is
right in the mean. Its noise is a hash of position and step: reproducible, no key to carry along.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.containers import is_box, unboxed
from adaptive_opt.memory.residuals import rounded
from adaptive_opt.memory.views import BLOCK, View, in_blocks, seen_by, spread

_NOT_FINITE_INT8, _NOT_FINITE_SQRT8 = -128, 255
_NAN, _INFINITY = np.int32(0x7FC00000), np.int32(0x7F800000)
_MOST = float(np.finfo(np.float32).max) * 0.999
"""The largest scale, such that no code times its step overflows, which rounding could make it."""
_LEAST = 2.0**-100
"""The smallest magnitude of a scale whose sign says something."""
_WITHOUT_255 = (255 / 254) ** 2 * (1 + 2.0**-20)


class Blocks(NamedTuple):
    """An array in 8 bits: codes of its shape, and a float32 scale for each block of 256.

    int8 codes are ``value / scale`` in steps of 1/127, and -128 is what is not finite. uint8 codes
    are ``sqrt(value) / scale`` in steps of 1/255. Where something in a block is not finite, the
    scale has a minus before it, steps are of 1/254, and 255 is what is not finite.

    Blocks lie along the last axis if they divide it, which the scales then have divided by 256;
    else in the flattened array, and the scales are of the shape (blocks, 1).
    """

    codes: jax.Array
    scales: jax.Array

    def are_finite(self) -> jax.Array:
        """Which of the numbers are finite."""
        codes, scales = map(unboxed, self)
        scales = spread(scales, codes.shape)
        if codes.dtype == jnp.int8:
            return jnp.isfinite(scales) & (codes != _NOT_FINITE_INT8)
        return jnp.isfinite(scales) & ~_is_infinite(codes, scales)


def noise(
    shape: tuple[int, ...], count: jax.Array, salt: int | jax.Array, start: int | jax.Array = 0
) -> jax.Array:
    """32 random bits for every element: a hash of its position, of the step and of ``salt``.

    The salt is of 32 bits, without a sign. Positions are counted from ``start``. The codes below
    take the upper 16 of the bits that they are given, so that ``bits`` and ``bits << 16`` serve two
    arrays.
    """
    index = jnp.full(shape, salt, jnp.uint32) + start
    stride = 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += place * np.uint32(stride & 0xFFFFFFFF)
        stride *= shape[axis]
    return _mixed(index * np.uint32(0x9E3779B1) ^ _mixed(count.astype(jnp.uint32)))


def _mixed(x: jax.Array) -> jax.Array:
    """The last step of MurmurHash3 (Appleby, public domain): every bit depends on all others."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def to_bfloat16(x: jax.Array, bits: jax.Array | None) -> jax.Array:
    """float32 to one of the two bfloat16 neighbours, the nearer one more often; exact if it can be.

    To the nearest without ``bits``. NaN and infinity stay what they are; nothing finite becomes
    infinite.
    """
    return rounded(x, jnp.bfloat16, bits)


def int8_in(view: View, x: jax.Array, bits: jax.Array | None) -> Blocks:
    scales = jnp.minimum(view.largest(x), _MOST)
    code = jnp.floor(127 * _over(view, x, scales) + _uniform(bits))
    code = jnp.where(jnp.isfinite(x), jnp.clip(code, -127, 127), _NOT_FINITE_INT8)
    return Blocks(code.astype(jnp.int8), scales)


_to_int8 = seen_by(int8_in)


def to_int8(x: jax.Array, bits: jax.Array | None) -> Blocks:
    """Signed values in blocks: at most one step, 1/127 of the largest in the block, off.

    What is not finite takes no part in the scale, and comes back as NaN.
    """
    return _to_int8(x, bits)


def sqrt8_in(view: View, x: jax.Array, bits: jax.Array | None) -> Blocks:
    marked = view.marked(x)
    largest = jnp.minimum(jnp.abs(marked), _MOST)
    has_mark = jnp.signbit(marked)
    # Where 255 is taken, by a little less than 254: nothing finite comes to 255.
    squared = 255.0**2 * _over(view, x, jnp.where(has_mark, _WITHOUT_255 * largest, largest))
    below = jnp.clip(jnp.floor(jnp.sqrt(squared)), 0, 255)
    # The chance of the step above is such that the mean of the squares is right.
    above = squared - jnp.square(below) > _uniform(bits) * (2 * below + 1)
    code = jnp.clip(below + above, jnp.where(x > 0, 1, 0), 255)
    code = jnp.where(jnp.isfinite(x), code, _NOT_FINITE_SQRT8)
    scales = jnp.where(has_mark, -jnp.maximum(jnp.sqrt(largest), _LEAST), jnp.sqrt(largest))
    return Blocks(code.astype(jnp.uint8), scales)


_to_sqrt8 = seen_by(sqrt8_in)


def to_sqrt8(x: jax.Array, bits: jax.Array | None) -> Blocks:
    """Values of at least 0 in blocks, as codes of their square root.

    The root of the decoded value is at most one step off, 1/255 of the largest root in the block.
    What is greater than 0 stays so: a second moment of 0 beside a first moment that is not would
    be a division by 0. What is not finite takes no part in the scale, and comes back as infinity,
    as which its weight stands still; the others in its block are at most 1/254 off.
    """
    return _to_sqrt8(x, bits)


def values_in(view: View, blocks: Blocks) -> jax.Array:
    codes, scales = blocks
    if codes.dtype == jnp.int8:
        values = codes * view.spread(scales / 127, codes.shape)
        return _with(_NAN, codes == _NOT_FINITE_INT8, values)
    steps = view.spread(scales / jnp.where(scales < 0, 254, 255), codes.shape)
    return _with(_INFINITY, _is_infinite(codes, steps), jnp.square(codes * steps))


_from_blocks = seen_by(values_in)


def from_blocks(blocks: Blocks) -> jax.Array:
    """float32 values of what ``to_int8`` or ``to_sqrt8`` made.

    ValueError for scales that are not those of the codes, as in a part of an array whose split does
    not go between blocks.
    """
    shape = blocks.codes.shape
    expected = jax.eval_shape(in_blocks, blocks.codes).shape[:-1]
    if jnp.shape(blocks.scales) != expected:
        raise ValueError(
            f"codes of shape {shape} need scales of shape {expected}, got"
            f" {jnp.shape(blocks.scales)}. Under shard_map and vmap an array can be in 8 bits only"
            f" where the last dimension of every part is a multiple of {BLOCK}, and the scales are"
            " split as the codes are (state_shardings): keep it in bfloat16, or use jit."
        )
    return _from_blocks(blocks)


def _with(bits: np.int32, where: jax.Array, values: jax.Array) -> jax.Array:
    """Values, in places others by their bits: a NaN in the program is one to ``jax_debug_nans``."""
    integers = jax.lax.bitcast_convert_type(values, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.where(where, bits, integers), jnp.float32)


def _is_infinite(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """Of roots, with a scale for each."""
    return (codes == _NOT_FINITE_SQRT8) & (scales < 0)


def _over(view: View, x: jax.Array, divisors: jax.Array) -> jax.Array:
    """``x`` over the divisor of its block; 0 where that is 0."""
    return x / view.spread(jnp.where(divisors == 0, 1, divisors), x.shape)


def own_bits(x: jax.Array) -> jax.Array:
    """The bits of a bfloat16 array, uint16: what was no float32 array is not taken for one."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def decoded(state: Any) -> Any:
    """The inner state of ``low_memory`` as the optimizer inside knows it.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, low_memory
    >>> from adaptive_opt.memory import codecs
    >>> state = low_memory(adam(1e-3)).init(jnp.ones(10_000))
    >>> print(state.inner_state[0].mu.dtype, codecs.decoded(state.inner_state)[0].mu.dtype)
    bfloat16 float32
    """

    def decode(x: Any) -> Any:
        if isinstance(x, Blocks):
            return in_its_box(lambda *blocks: from_blocks(Blocks(*blocks)), *x)
        dtype = getattr(x, "dtype", None)
        if dtype == jnp.uint16:
            return jax.lax.bitcast_convert_type(x, jnp.bfloat16)
        return x.astype(jnp.float32) if dtype == jnp.bfloat16 else x

    return jax.tree.map(decode, state, is_leaf=is_blocks)


def is_blocks(x: Any) -> bool:
    """For ``is_leaf``."""
    return isinstance(x, Blocks)


def in_its_box(function: Callable[..., Any], *boxes: Any) -> Any:
    """``function`` of what is in boxes, its results in boxes like the first; of arrays as they are.

    Blocks of a variable of nnx are two variables, not one of two arrays, for nnx takes what is in a
    variable for one array.
    """
    result = function(*map(unboxed, boxes))
    if not is_box(boxes[0]):
        return result
    box = jax.tree.structure(boxes[0])
    if isinstance(result, Blocks):
        return Blocks(*(box.unflatten([array]) for array in result))
    return box.unflatten([result])


def _uniform(bits: jax.Array | None) -> jax.Array | float:
    """Numbers between 0 and 1, of the upper 16 bits, whose mean is a half; that without bits.

    More would be lost beside a code of 7 or 8 bits: a float32 has 24.
    """
    return 0.5 if bits is None else (bits >> 16).astype(jnp.float32) * 2.0**-16 + 2.0**-17


def without_derivative(why: str) -> Callable[[jax.Array], jax.Array]:
    """A function that returns what it is given; a derivative through it is an error, with why."""

    @jax.custom_jvp
    def same(x: jax.Array) -> jax.Array:
        return x

    @same.defjvp
    def _(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise TypeError(why)

    return same
