"""16-bit floats among those of float32, and what a 16-bit number leaves of a float32 one.

The numbers of float32 are counted from zero up: that count, with the sign of the number, is its
*position*. Every 2^16th of them is a bfloat16 number; every 2^13th a float16 number, if those below
2^-14 are counted in steps of 2^-37. Rounding, stochastic or not, is done on positions, in integers:
the same bits from every compiler, denormals included, and nothing that XLA could take for a cast to
and fro and leave out.

A residual is what the 16-bit number leaves. In 8 bits it is a code of -127 to 127: the distance of
the positions in units of 1/127 of half the way to the next 16-bit number.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.finite import narrowed

BITS_LEFT: dict[Any, int] = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}
"""The bits of a position that a 16-bit number has not got."""

_LARGEST_CODE = 127
_MAGNITUDE = 0x7FFFFFFF
_NORMAL, _REBIASED = 113 << 23, 112 << 23
"""The bits of 2^-14, above which float16 is normal, and the difference of the exponents' biases."""


def is_narrow(x: Any) -> bool:
    """Whether an array is of a 16-bit float."""
    return getattr(x, "dtype", None) in BITS_LEFT


def widened(x: jax.Array) -> jax.Array:
    """16-bit numbers in float32, read off their bits."""
    exact = _at(_position_of(x), x.dtype, _is_negative(x))
    return jnp.where(jnp.isfinite(x), exact, x.astype(jnp.float32))


def rounded(x: jax.Array, dtype: Any, bits: jax.Array | None = None) -> jax.Array:
    """float32 to 16 bits: to the nearest, ties to even; with ``bits`` to one of the two neighbours.

    Then the nearer one is the more frequent, and the mean is right. NaN and infinity stay what they
    are; nothing finite becomes infinite.
    """
    left = BITS_LEFT[jnp.dtype(dtype)]
    magnitude = _magnitude(x, dtype)
    if bits is None:
        lift = (1 << (left - 1)) - 1 + ((magnitude >> left) & 1)
    else:
        lift = (bits >> (32 - left)).astype(jnp.int32)
    lifted = (magnitude.astype(jnp.uint32) + lift.astype(jnp.uint32)) >> left
    largest = np.array(jnp.finfo(dtype).max, dtype).view(np.uint16)
    ordinal = jnp.minimum(lifted, np.uint32(largest)).astype(jnp.uint16)
    signed = ordinal | jnp.where(_is_negative(x), np.uint16(0x8000), np.uint16(0))
    result = jax.lax.bitcast_convert_type(signed, dtype)
    return jnp.where(jnp.isfinite(x), result, narrowed(x, dtype))


def to_codes(x: jax.Array, landed: jax.Array, bits: jax.Array) -> jax.Array:
    """int8: where between ``landed`` and its neighbours the float32 ``x`` is; 0 beside an infinity.

    Rounded stochastically. A number outside of that gets the code of the end.
    """
    half = 1 << (BITS_LEFT[jnp.dtype(landed.dtype)] - 1)
    at = _position_of(landed)
    offset = jnp.clip(_position(x, landed.dtype), at - half, at + half) - at
    distance = jnp.abs(offset)
    below = jnp.minimum(distance * _LARGEST_CODE // half, _LARGEST_CODE - 1)
    low, high = (_distance(code, landed) for code in (below, below + 1))
    # Of the 2^22 values that 22 bits have, as many lift it as it is on its way up.
    rest, gap = ((d - low).astype(jnp.uint32) for d in (distance, high))
    code = below + ((bits >> 10) * gap < rest << 22)
    return jnp.where(jnp.isfinite(landed), jnp.sign(offset) * code, 0).astype(jnp.int8)


def from_codes(codes: jax.Array, params: jax.Array) -> jax.Array:
    """The float32 numbers of parameters and their codes, which round to the parameters."""
    code = codes.astype(jnp.int32)
    offset = jnp.sign(code) * _distance(jnp.abs(code), params)
    value = _at(_position_of(params) + offset, params.dtype, _is_negative(params))
    return jnp.where(jnp.isfinite(params), value, params.astype(jnp.float32))


def rest_of(x: jax.Array, landed: jax.Array) -> jax.Array:
    """``x`` less where it landed; half way to the next number from the last that rounds to it on.

    So 16 bits hold the end exactly, and ``nearest_that_rounds_to`` gives it back.
    """
    left, at = BITS_LEFT[jnp.dtype(landed.dtype)], _position_of(landed)
    reach = _reach(landed)
    offset = jnp.clip(_position(x, landed.dtype), at - reach, at + reach) - at
    end = _at(at + jnp.sign(offset) * (1 << (left - 1)), landed.dtype, _is_negative(x))
    rest = jnp.where(jnp.abs(offset) == reach, end, x) - widened(landed)
    return jnp.where(jnp.isfinite(landed), rest, 0)


def nearest_that_rounds_to(params: jax.Array, x: jax.Array) -> jax.Array:
    """``x``, or the number nearest to it that rounds to the parameter; where that is finite."""
    at, reach, position = _position_of(params), _reach(params), _position(x, params.dtype)
    bounded = jnp.clip(position, at - reach, at + reach)
    end = _at(bounded, params.dtype, _is_negative(params))
    value = jnp.where((bounded == position) & (position != at), x, end)  # which has the sign of -0
    return jnp.where(jnp.isfinite(params), value, params.astype(jnp.float32))


def _distance(code: jax.Array, params: jax.Array) -> jax.Array:
    """How far from the parameter the number of a code is, in positions."""
    half = 1 << (BITS_LEFT[jnp.dtype(params.dtype)] - 1)
    nearest = (code * half + _LARGEST_CODE // 2) // _LARGEST_CODE
    return jnp.minimum(nearest, _reach(params))


def _reach(params: jax.Array) -> jax.Array:
    """How far the numbers go that round to a parameter: half way, with the tie if it is even."""
    half = 1 << (BITS_LEFT[jnp.dtype(params.dtype)] - 1)
    return half - (_bits(params) & 1).astype(jnp.int32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


def _is_negative(x: jax.Array) -> jax.Array:
    """By the sign bit, which -0 has too."""
    return jax.lax.bitcast_convert_type(x, jnp.int32 if x.dtype == jnp.float32 else jnp.int16) < 0


def _position_of(x: jax.Array) -> jax.Array:
    magnitude = (_bits(x) & 0x7FFF).astype(jnp.int32) << BITS_LEFT[jnp.dtype(x.dtype)]
    return jnp.where(_is_negative(x), -magnitude, magnitude)


def _position(x: jax.Array, dtype: Any) -> jax.Array:
    """Of float32 numbers, among those of a 16-bit dtype."""
    magnitude = _magnitude(x, dtype)
    return jnp.where(_is_negative(x), -magnitude, magnitude)


def _magnitude(x: jax.Array, dtype: Any) -> jax.Array:
    magnitude = jax.lax.bitcast_convert_type(x, jnp.int32) & _MAGNITUDE
    if jnp.dtype(dtype) == jnp.float16:
        exact = jnp.minimum(jnp.abs(x), 2.0**-14) * 2.0**37
        small = exact.astype(jnp.int32)
        small |= exact > small  # to odd, so that rounding again does not see a tie
        magnitude = jnp.where(magnitude < _NORMAL, small, magnitude - _REBIASED)
    return magnitude


def _at(position: jax.Array, dtype: Any, is_negative: jax.Array) -> jax.Array:
    """The float32 number of a position; zero with the sign that is given."""
    magnitude = jnp.abs(position)
    if jnp.dtype(dtype) == jnp.float16:
        small = magnitude.astype(jnp.float32) * 2.0**-37
        large = jax.lax.bitcast_convert_type(magnitude + _REBIASED, jnp.int32)
        small = jax.lax.bitcast_convert_type(small, jnp.int32)
        magnitude = jnp.where(magnitude < 1 << 23, small, large)
    sign = jnp.where((position < 0) | ((position == 0) & is_negative), np.int32(-(2**31)), 0)
    return jax.lax.bitcast_convert_type(magnitude | sign, jnp.float32)
