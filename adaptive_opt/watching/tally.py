"""What telemetry counts of every weight: exact numbers, and sums that do not overflow.

A rate goes into one of 2^15 bins: a float32 without its sign and its last 16 bits. So a bin is
2^-7 of its rate wide, and the bits of floats that are not negative, read as integers, are in the
order of the floats. Quantiles and histogram are read off these counts.

Counts are 32 bits wide while they are made, for less than 2^31 weights at a time, and then three
digits of 16 bits each, which can be added up in 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.step import AdaptiveStep

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
LOW, HIGH, PER_DECADE = -12, 6, 8
"""The bins of the histogram: from 10^-12 to 10^6, eight to a decade, and one more at each end."""

BIN_EDGES = np.linspace(LOW, HIGH, (HIGH - LOW) * PER_DECADE + 1)
"""Their edges, as log10 of a rate. What lies below the first or above the last has a bin too."""

UNKNOWN = -1.0
"""In the state, in place of a number there is none for; all numbers are at least 0."""

NO_COUNT = 2**32 - 1
"""In the state, in place of either half of a count that there is none of."""

KEYS, ROW = 2**15, 2**7
_FIRST_KEYS = (10.0**BIN_EDGES).astype(np.float32).view(np.uint32) >> 16
NORMS = ("gradient", "param", "update")


class Weights(NamedTuple):
    """What is counted of the weights of an array."""

    rate: jax.Array
    friction: Any
    sized: tuple[Any, ...]
    """What there are norms of, in the order of ``NORMS``; None for parameters that are not there.
    """
    limited: tuple[jax.Array, ...]

    @classmethod
    def of(cls, step: AdaptiveStep, remaining: Any, limits: int) -> Weights:
        """Of a step where it stands; ``limits`` are how many stages limit something by then."""
        gradient, param = step.inputs
        has_rate = "rate" in step.values
        rate = step.peek("rate") if has_rate else step.notes.get("rate", 1.0)
        applied = step.values["direction"]
        applied = (applied * rate if has_rate else applied) * remaining

        def filled(x: Any) -> jax.Array:
            """What a tensor or the tree shares, for every weight of it, split as that is."""
            return jnp.where(jnp.isnan(gradient), x, x)

        limited = [filled(before != after) for before, after in step.limited.values()][:limits]
        friction = step.notes.get("friction")
        return cls(
            filled(jnp.abs(rate * remaining).astype(jnp.float32)),
            None if friction is None else filled(friction).astype(jnp.float32),
            tuple(None if x is None else _size(x) for x in (gradient, param, applied)),
            tuple(limited),
        )


def _size(x: jax.Array) -> jax.Array:
    return jnp.abs(x).astype(jnp.float32)


class Tally(NamedTuple):
    """What has been counted, a row for each group."""

    counts: jax.Array
    """Of the keys of rates, then of the weights that each stage limits; uint32, or digits."""
    scale: jax.Array
    squares: jax.Array
    """The sum of squares of what there are norms of, each divided by its scale first."""
    friction: jax.Array
    least: jax.Array
    largest: jax.Array

    @classmethod
    def nothing(cls, groups: int, limits: int) -> Tally:
        return cls(
            jnp.zeros((groups, KEYS + limits), jnp.uint32),
            jnp.full((groups, len(NORMS)), _LEAST_SCALE),
            jnp.zeros((groups, len(NORMS)), jnp.float32),
            jnp.zeros(groups, jnp.float32),
            jnp.full(groups, jnp.inf, jnp.float32),
            jnp.zeros(groups, jnp.float32),
        )

    def adding(self, weights: Weights, group: Any, where: jax.Array | None = None) -> Tally:
        """With the weights of an array of one group, those for which ``where`` is true."""
        groups, width = self.counts.shape

        def there(x: jax.Array, otherwise: Any) -> jax.Array:
            return x if where is None else jnp.where(where, x, jnp.asarray(otherwise, x.dtype))

        rate = weights.rate
        key = (jax.lax.bitcast_convert_type(rate, jnp.uint32) >> 16).astype(jnp.int32)
        place = there(group * width + key, groups * width).reshape(-1)
        one = jnp.ones((), jnp.uint32)
        counts = self.counts.reshape(-1).at[place].add(one, mode="drop").reshape(groups, width)
        for i, limited in enumerate(weights.limited):
            number = jnp.sum(there(limited, False), dtype=jnp.uint32)
            counts = counts.at[group, KEYS + i].add(number)
        scale, squares = _sums_of_squares(
            [None if x is None else there(x, 0) for x in weights.sized]
        )
        new, old = self._scaled(group, scale, squares)
        friction = UNKNOWN if weights.friction is None else jnp.sum(there(weights.friction, 0))
        number = ~jnp.isnan(rate)
        least = jnp.min(there(jnp.where(number, rate, jnp.inf), jnp.inf), initial=jnp.inf)
        largest = jnp.max(there(jnp.where(number, rate, 0), 0), initial=0)
        return Tally(
            counts,
            self.scale.at[group].set(new),
            self.squares.at[group].set(old),
            self.friction.at[group].add(friction),
            self.least.at[group].min(least),
            self.largest.at[group].max(largest),
        )

    def _scaled(self, group: Any, scale: jax.Array, squares: jax.Array) -> Any:
        return _joined(self.scale[group], self.squares[group], scale, squares)

    def in_digits(self) -> Tally:
        return self._replace(counts=_digits(self.counts))

    def merged(self, other: Tally) -> Tally:
        """Of two in digits."""
        scale, squares = _joined(self.scale, self.squares, other.scale, other.squares)
        return Tally(
            _carried(self.counts + other.counts),
            scale,
            squares,
            self.friction + other.friction,
            jnp.minimum(self.least, other.least),
            jnp.maximum(self.largest, other.largest),
        )

    def everywhere(self, axes: tuple[str, ...]) -> Tally:
        """The sum over the devices among which the weights are split; in digits."""
        if not axes:
            return self
        scale = jax.lax.pmax(self.scale, axes)
        return Tally(
            _carried(jax.lax.psum(self.counts, axes)),
            scale,
            jax.lax.psum(self.squares * (self.scale / scale) ** 2, axes),
            jax.lax.psum(self.friction, axes),
            jax.lax.pmin(self.least, axes),
            jax.lax.pmax(self.largest, axes),
        )

    def numbers(self, sizes: Sequence[int]) -> dict[str, jax.Array]:
        """What is kept, a row for each group of so many weights; of one in digits."""
        rows = _Rows(self.counts[..., :KEYS])
        size = jnp.asarray(np.maximum(sizes, 1), jnp.float32)
        quantiles = _quantiles(rows, sizes)
        norms = self.scale * jnp.sqrt(self.squares)
        return {
            "histogram": _histogram(rows),
            "limited": _words(self.counts[..., KEYS:]),
            "quantiles": jnp.clip(quantiles, self.least[:, None], self.largest[:, None]),
            "friction": jnp.where(self.friction < 0, UNKNOWN, self.friction / size),
            "norms": norms,
        }


# --- exact counts ---------------------------------------------------------------------------------


def _digits(counts: jax.Array) -> jax.Array:
    return jnp.stack([counts & 0xFFFF, counts >> 16, jnp.zeros_like(counts)])


def _carried(digits: jax.Array) -> jax.Array:
    """Digits that are less than 2^16 again, the last one excepted."""
    first, second, third = digits
    second = second + (first >> 16)
    return jnp.stack([first & 0xFFFF, second & 0xFFFF, third + (second >> 16)])


def _words(digits: jax.Array) -> jax.Array:
    """The low and the high 32 bits, along a new last axis."""
    return jnp.stack([digits[0] | digits[1] << 16, digits[2]], axis=-1)


def _up_to(digits: jax.Array) -> jax.Array:
    """The sums up to each place, along the last axis; one loop, and not the many of a cumsum."""
    upper = np.tri(digits.shape[-1], dtype=bool)
    parts = jnp.where(upper, digits[..., None, :], jnp.zeros((), jnp.uint32))
    return _carried(jnp.sum(parts, axis=-1, dtype=jnp.uint32))


def _less(digits: jax.Array, than: jax.Array) -> jax.Array:
    (low, high), (other_low, other_high) = (jnp.moveaxis(_words(d), -1, 0) for d in (digits, than))
    return (high < other_high) | ((high == other_high) & (low < other_low))


class _Rows:
    """The counts of the keys in rows, and the sums up to the end of each row."""

    def __init__(self, keys: jax.Array) -> None:
        self.rows = keys.reshape(3, -1, KEYS // ROW, ROW)
        self.up_to = _up_to(_carried(jnp.sum(self.rows, axis=-1, dtype=jnp.uint32)))

    def of(self, row: jax.Array) -> jax.Array:
        return jnp.take_along_axis(self.rows, row[None, ..., None], axis=2)

    def before(self, row: jax.Array) -> jax.Array:
        sums = jnp.take_along_axis(self.up_to, jnp.maximum(row - 1, 0)[None], axis=2)
        return jnp.where(row > 0, sums, jnp.zeros((), jnp.uint32))


def _histogram(rows: _Rows) -> jax.Array:
    """The counts in the bins, in words: differences of the sums before each edge."""
    row, column = np.divmod(_FIRST_KEYS.astype(np.int32), ROW)
    groups = rows.up_to.shape[1]
    row = jnp.broadcast_to(row, (groups, len(row)))
    is_before = np.arange(ROW) < column[:, None]
    inside = jnp.where(is_before, rows.of(row), jnp.zeros((), jnp.uint32))
    sums = _carried(rows.before(row) + jnp.sum(inside, axis=-1, dtype=jnp.uint32))
    ends = jnp.concatenate([jnp.zeros_like(sums[..., :1]), sums, rows.up_to[..., -1:]], axis=-1)
    low, high = jnp.moveaxis(_words(ends), -1, 0)
    borrow = (low[:, 1:] < low[:, :-1]).astype(jnp.uint32)
    return jnp.stack([low[:, 1:] - low[:, :-1], high[:, 1:] - high[:, :-1] - borrow], axis=-1)


def _quantiles(rows: _Rows, sizes: Sequence[int]) -> jax.Array:
    """The middles of the bins in which the weights of these ranks are, a row for each group.

    First in which row of bins a rank is, and then in which of its bins.
    """
    ranks = [[max(1, -(-round(100 * q) * n // 100)) for q in QUANTILES] for n in sizes]
    digits = [[[r >> shift & 0xFFFF for r in of] for of in ranks] for shift in (0, 16, 32)]
    rank = jnp.asarray(np.array(digits), jnp.uint32)[..., None]
    row = jnp.sum(_less(rows.up_to[:, :, None], rank), axis=-1, dtype=jnp.int32)
    row = jnp.minimum(row, KEYS // ROW - 1)
    within = _carried(_up_to(rows.of(row)) + rows.before(row)[..., None])
    place = jnp.sum(_less(within, rank), axis=-1, dtype=jnp.int32)
    key = (row * ROW + place).astype(jnp.uint32)
    middle = jax.lax.bitcast_convert_type(key << 16 | 0x8000, jnp.float32)
    infinite = np.uint32(np.float32(np.inf).view(np.uint32) >> 16)
    middle = jnp.where(key == infinite, jnp.inf, middle)
    return jnp.where(key == 0, 0.0, middle)


# --- sums of squares ------------------------------------------------------------------------------

_LEAST_SCALE = np.float32(2.0**-126)


def _sums_of_squares(arrays: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Of each array a power of two near its largest element, and the sum of squares over it."""
    scales, squares = [], []
    for x in arrays:
        if x is None:
            scales.append(jnp.asarray(_LEAST_SCALE))
            squares.append(jnp.zeros((), jnp.float32))
            continue
        bits = jax.lax.bitcast_convert_type(jnp.max(x, initial=0), jnp.uint32)
        bits = jnp.clip(bits & 0x7F800000, 0x00800000, 0x7F000000)
        scale = jax.lax.bitcast_convert_type(bits, jnp.float32)
        scales.append(scale)
        squares.append(jnp.sum((x / scale) ** 2))
    return jnp.stack(scales), jnp.stack(squares)


def _joined(scale: Any, squares: Any, other: Any, more: Any) -> tuple[jax.Array, jax.Array]:
    """Two scaled sums of squares as one."""
    new = jnp.maximum(scale, other)
    return new, squares * (scale / new) ** 2 + more * (other / new) ** 2
