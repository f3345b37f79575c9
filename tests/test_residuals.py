"""What a 16-bit number leaves of a float32 one: laws for every number.

They are checked in NumPy's arithmetic, which keeps denormals.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptive_opt.memory import codecs
from adaptive_opt.memory.residuals import (
    from_codes,
    nearest_that_rounds_to,
    rounded,
    to_codes,
    widened,
)

EACH = pytest.mark.parametrize("dtype", [jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)], ids=str)


def bits_of(x):
    x = np.asarray(x)
    return x.view(f"u{x.itemsize}")


def finite(dtype):
    """Every finite number of a dtype in order; 0 without its sign."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    every = every[np.isfinite(every.astype("f")) & (bits_of(every) != 0x8000)]
    return every[np.argsort(every.astype("f"))]


def strata(n, seed=0):
    """float32 of every sign and exponent, as many of each, and the ends of ranges; in order."""
    rng = np.random.default_rng(seed)
    tops = np.arange(512, dtype=np.uint32).repeat(n // 512)
    bits = tops << 23 | rng.integers(0, 2**23, len(tops), np.uint32)
    ends = [0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x33000000, 0x387FFFFF, 0x477FF000]
    ends = np.array(ends, np.uint32)
    x = np.concatenate([bits, ends, ends | 2**31]).view("f")
    return np.sort(x[~np.isnan(x)])


def nearest(x, dtype):
    """NumPy's rounding, but for finite numbers beyond the largest."""
    largest = jnp.finfo(dtype).max
    with np.errstate(over="ignore"):
        x = np.where(np.isfinite(x), np.clip(x, -float(largest), float(largest)), x)
        return x.astype("f").astype(dtype)


@EACH
def test_every_16_bit_number_is_widened_exactly_rounds_to_itself_and_leaves_nothing(dtype):
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    nan = np.isnan(every.astype("f"))

    @jax.jit
    def there_and_back(x, bits):
        wide = widened(x)
        return wide, rounded(wide, dtype), rounded(wide, dtype, bits), to_codes(wide, x, bits)

    for bits in (np.uint32(0), np.uint32(2**32 - 1)):
        wide, *back, codes = there_and_back(every, jnp.full(every.shape, bits))
        np.testing.assert_array_equal(bits_of(wide)[~nan], bits_of(every.astype("f"))[~nan])
        for narrow in back:
            np.testing.assert_array_equal(bits_of(narrow)[~nan], bits_of(every)[~nan])
            assert np.isnan(np.asarray(narrow, "f")[nan]).all()
        assert np.isnan(np.asarray(wide)[nan]).all()
        assert not np.any(codes)
    same = jax.jit(from_codes)(jnp.full(every.shape, 127, jnp.int8), every)
    beyond = ~np.isfinite(every.astype("f"))  # no residual moves an infinity, or makes a NaN one
    np.testing.assert_array_equal(np.asarray(same)[beyond], every.astype("f")[beyond])


@pytest.mark.broad
@EACH
def test_every_number_with_every_code_is_a_float32_that_rounds_to_it_and_comes_back(dtype):
    """16 million pairs: in one order, no two of them equal but at ties, whatever the noise."""
    params = finite(dtype)

    @jax.jit
    def pair(code):
        codes = jnp.full(params.shape, code, jnp.int8)
        value = from_codes(codes, params)
        noise = codecs.noise(params.shape, code, 3)
        again = jnp.stack([to_codes(value, params, bits) for bits in (noise, ~noise)])
        return value, (again == code).all()

    last, at_tie = np.full(params.shape, -np.inf, "f"), None
    for code in range(-127, 128):
        value, comes_back = pair(jnp.int32(code))
        value = np.asarray(value)
        assert comes_back
        assert (value > last).all()
        rounds_to = value.astype(dtype)
        np.testing.assert_array_equal(rounds_to.astype("f"), params.astype("f"))
        if code == 0:
            np.testing.assert_array_equal(value, params.astype("f"))
        at_tie = value if at_tie is None else at_tie
        last = value
    assert (np.diff(np.stack([at_tie, last], 1).reshape(-1)) > 0).all()


def laws_of_rounding(dtype, n):
    x = strata(n)
    narrow = np.asarray(jax.jit(rounded, static_argnums=1)(x, dtype))
    np.testing.assert_array_equal(bits_of(narrow), bits_of(nearest(x, dtype)))
    assert (np.diff(narrow[np.isfinite(x)].astype("f")) >= 0).all()

    inside = np.abs(x) < float(jnp.finfo(dtype).max)
    x, narrow = x[inside], narrow[inside]
    away = np.where(x > narrow.astype("f"), dtype.type(np.inf), dtype.type(-np.inf))
    other = np.nextafter(narrow, away).astype(np.float64)  # the neighbour on the far side of x
    there, exact = narrow.astype(np.float64), x.astype(np.float64)
    finite = np.isfinite(other)
    gap = np.where(finite, np.abs(other - there), np.abs(there) * 2.0**-7)
    # Below 2^-14 float16 counts in steps of 2^-37.
    grain = np.where(np.abs(exact) < 2.0**-14, 2.0**-37, 0) * (dtype == np.float16)

    @jax.jit
    def at_random(bits):
        bits = jnp.full(x.shape, bits)
        codes = to_codes(x, narrow, bits)
        return codes, from_codes(codes, narrow), rounded(x, dtype, bits).astype(jnp.float32)

    def error(mean):
        return np.abs(mean / 64 - exact)

    values, picks = np.zeros(len(x)), np.zeros(len(x))
    for bits in (np.arange(64, dtype=np.uint32) << 26) + np.uint32(1 << 25):
        codes, value, pick = map(np.asarray, at_random(bits))
        assert (np.abs(value - exact) <= gap / 254 * 1.02 + grain).all()
        assert (codes * (exact - there) >= 0).all()
        assert ((pick == there) | (pick == other))[finite].all()
        values, picks = values + value, picks + pick
    # Of evenly spaced bits the mean of 64 is half of 1/64 of a step off, at most.
    assert (error(values) <= gap / 254 / 128 * 1.05 + grain).all()
    assert (error(picks) <= gap / 128 * 1.05 + grain)[finite].all()


@EACH
def test_float32_numbers_round_as_numpy_rounds_and_codes_are_right_in_the_mean(dtype):
    laws_of_rounding(dtype, 2**18)


@pytest.mark.slow
@EACH
def test_so_do_16_million(dtype):
    laws_of_rounding(dtype, 2**24)


@EACH
def test_a_number_is_kept_within_what_rounds_to_the_parameter(dtype):
    params = finite(dtype)
    ends = jax.jit(nearest_that_rounds_to)
    far = jnp.full(params.shape, jnp.finfo("f").max)
    low, high = np.asarray(ends(params, -far)), np.asarray(ends(params, far))
    normal = np.abs(params.astype("f")) > 2 * float(jnp.finfo(jnp.float32).tiny)
    for end, way in ((low, -np.inf), (high, np.inf)):
        np.testing.assert_array_equal(end.astype(dtype).astype("f"), params.astype("f"))
        with np.errstate(over="ignore"):
            beyond = np.nextafter(end, np.float32(way)).astype(dtype).astype("f")
        assert (beyond != params.astype("f"))[normal & (np.abs(end) > 2.0**-14)].all()
