"""What telemetry counts of every weight: exact numbers, and sums that do not overflow.

A rate goes into one of 2^15 bins: a float32 without its sign and its last 16 bits. So a bin is
2^-7 of its rate wide, and the bits of floats that are not negative, read as integers, are in the
order of the floats. Quantiles and histogram are read off these counts.

Counts are 32 bits wide while they are made, for less than 2^31 weights at a time. Of more weights
they are then three digits of 16 bits each, which can be added up in 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.trees import varying_like

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
LOW, HIGH, PER_DECADE = -12, 6, 8
"""The bins of the histogram: from 10^-12 to 10^6, eight to a decade, and one more at each end."""

BIN_EDGES = np.linspace(LOW, HIGH, (HIGH - LOW) * PER_DECADE + 1)
"""Their edges, as log10 of a rate. What lies below the first or above the last has a bin too."""

UNKNOWN = -1.0
"""In the state, in place of a number there is none for; all numbers are at least 0."""

NO_COUNT = 2**32 - 1
"""In the state, in place of either half of a count that there is none of."""

KEYS = 2**15
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
            (gradient, param, applied),
            tuple(limited),
        )


class Tally(NamedTuple):
    """What has been counted, a row for each group."""

    counts: jax.Array
    """Of the keys of rates, then of the weights that each stage limits; uint32, or digits."""
    largest: jax.Array
    """Of what there are norms of."""
    squares: jax.Array
    """The sums of squares of the same, each divided by a scale near its largest."""
    lowest: jax.Array
    highest: jax.Array
    """Of the rates."""
    friction: jax.Array

    @classmethod
    def nothing(cls, groups: int, limits: int) -> Tally:
        none = jnp.zeros((groups, len(NORMS)), jnp.float32)
        return cls(
            jnp.zeros((groups, KEYS + limits), jnp.uint32),
            none,
            none,
            jnp.full(groups, jnp.inf, jnp.float32),
            jnp.zeros(groups, jnp.float32),
            jnp.zeros(groups, jnp.float32),
        )

    def adding(self, weights: Weights, group: Any, where: jax.Array | None = None) -> Tally:
        """With the weights of an array of one group, those for which ``where`` is true."""
        groups, width = self.counts.shape

        def there(x: Any, otherwise: Any = 0) -> jax.Array:
            x = jnp.zeros_like(weights.rate) if x is None else x
            return x if where is None else jnp.where(where, x, jnp.asarray(otherwise, x.dtype))

        rate = weights.rate
        key = (jax.lax.bitcast_convert_type(rate, jnp.uint32) >> 16).astype(jnp.int32)
        place = there(group * width + key, groups * width).reshape(-1)
        one = jnp.ones((), jnp.uint32)
        counts = self.counts.reshape(-1).at[place].add(one, mode="drop").reshape(groups, width)
        for i, limited in enumerate(weights.limited):
            number = jnp.sum(there(limited), dtype=jnp.uint32)
            counts = counts.at[group, KEYS + i].add(number)
        sized = [None if x is None else jnp.abs(x).astype(jnp.float32) for x in weights.sized]
        is_number = ~jnp.isnan(rate)
        sized = [*map(there, sized)]  # each split as it is
        largest = jnp.stack([jnp.max(x, initial=0) for x in sized])
        scales = _scale(largest)
        squares = [jnp.sum((x / scale) ** 2) for x, scale in zip(sized, scales, strict=True)]
        squares = jnp.stack(squares)
        largest, squares = _joined(self.largest[group], self.squares[group], largest, squares)
        lowest = jnp.min(there(jnp.where(is_number, rate, jnp.inf), jnp.inf), initial=jnp.inf)
        highest = jnp.max(there(jnp.where(is_number, rate, 0)), initial=0)
        friction = UNKNOWN if weights.friction is None else jnp.sum(there(weights.friction))
        return Tally(
            counts,
            self.largest.at[group].set(largest),
            self.squares.at[group].set(squares),
            self.lowest.at[group].min(lowest),
            self.highest.at[group].max(highest),
            self.friction.at[group].add(friction),
        )

    def in_digits(self, number: int) -> Tally:
        """Counts as so many digits: one of 32 bits, or three of 16 that can be added up."""
        digits = [self.counts & 0xFFFF, self.counts >> 16, jnp.zeros_like(self.counts)]
        return self._replace(counts=jnp.stack(digits if number == 3 else [self.counts]))

    def merged(self, other: Tally) -> Tally:
        """Of two in as many digits."""
        largest, squares = _joined(self.largest, self.squares, other.largest, other.squares)
        return Tally(
            _carried(self.counts + other.counts),
            largest,
            squares,
            jnp.minimum(self.lowest, other.lowest),
            jnp.maximum(self.highest, other.highest),
            self.friction + other.friction,
        )

    def everywhere(self, axes: tuple[str, ...]) -> Tally:
        """The sum over the devices among which the weights are split; in digits."""
        if not axes:
            return self
        largest = jax.lax.pmax(self.largest, axes)
        return Tally(
            _carried(jax.lax.psum(self.counts, axes)),
            largest,
            jax.lax.psum(self.squares * (_scale(self.largest) / _scale(largest)) ** 2, axes),
            jax.lax.pmin(self.lowest, axes),
            jax.lax.pmax(self.highest, axes),
            jax.lax.psum(self.friction, axes),
        )

    def numbers(self, sizes: Sequence[int]) -> dict[str, jax.Array]:
        """What is kept, a row for each group of so many weights; of one in digits."""
        keys, limited = self.counts[..., :KEYS], self.counts[..., KEYS:]
        size = jnp.asarray(np.maximum(sizes, 1), jnp.float32)
        lowest, highest = self.lowest[:, None], self.highest[:, None]
        return {
            "histogram": _words(_histogram(keys)),
            "limited": _words(limited),
            "quantiles": jnp.clip(_quantiles(keys, sizes), lowest, highest),
            "friction": jnp.where(self.friction < 0, UNKNOWN, self.friction / size),
            "norms": _scale(self.largest) * jnp.sqrt(self.squares),
        }


# --- exact counts ---------------------------------------------------------------------------------


def _carried(digits: jax.Array) -> jax.Array:
    """Digits that are less than 2^16 again, the last one excepted."""
    if len(digits) == 1:
        return digits
    first, second, third = digits
    second = second + (first >> 16)
    return jnp.stack([first & 0xFFFF, second & 0xFFFF, third + (second >> 16)])


def _words(digits: jax.Array) -> jax.Array:
    """The low and the high 32 bits, along a new last axis."""
    if len(digits) == 1:
        return jnp.stack([digits[0], jnp.zeros_like(digits[0])], axis=-1)
    return jnp.stack([digits[0] | digits[1] << 16, digits[2]], axis=-1)


def _less(digits: jax.Array, than: jax.Array) -> jax.Array:
    (low, high), (other_low, other_high) = (jnp.moveaxis(_words(d), -1, 0) for d in (digits, than))
    return (high < other_high) | ((high == other_high) & (low < other_low))


def _histogram(keys: jax.Array) -> jax.Array:
    """The counts in the bins."""
    bins = np.searchsorted(_FIRST_KEYS, np.arange(KEYS), side="right").astype(np.int32)
    none = jnp.zeros_like(keys, shape=(*keys.shape[:-1], len(_FIRST_KEYS) + 1))
    return _carried(none.at[..., bins].add(keys))


def _quantiles(keys: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """The middles of the bins in which the weights of these ranks are, a row for each group.

    The key is found bit by bit: it is the largest below which there are fewer weights than that.
    """
    ranks = [[-(-round(100 * q) * n // 100) for q in QUANTILES] for n in sizes]
    shifts, digit = ((0, 16, 32), 0xFFFF) if len(keys) == 3 else ((0,), 2**32 - 1)
    rank = [[[r >> s & digit for r in of] for of in ranks] for s in shifts]
    rank = jnp.asarray(np.array(rank, np.uint32))
    bits = KEYS.bit_length() - 1
    every_key = jnp.arange(KEYS, dtype=jnp.int32).reshape(1, 1, 1, KEYS)

    def with_next_bit(i: Any, key: jax.Array) -> jax.Array:
        higher = key + (jnp.asarray(KEYS // 2, jnp.int32) >> i)
        is_below = every_key < higher[None, ..., None]
        below = jnp.where(is_below, keys[:, :, None], jnp.zeros((), jnp.uint32))
        below = _carried(jnp.sum(below, axis=-1, dtype=jnp.uint32))
        return jnp.where(_less(below, rank), higher, key)

    first = varying_like(jnp.zeros(rank.shape[1:], jnp.int32), [keys])
    key = jax.lax.fori_loop(0, bits, with_next_bit, first).astype(jnp.uint32)
    middle = jax.lax.bitcast_convert_type(key << 16 | 0x8000, jnp.float32)
    infinite = np.uint32(np.float32(np.inf).view(np.uint32) >> 16)
    middle = jnp.where(key == infinite, jnp.inf, middle)
    return jnp.where(key == 0, 0.0, middle)


# --- sums of squares ------------------------------------------------------------------------------


def _scale(largest: jax.Array) -> jax.Array:
    """A power of two near the largest elements."""
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32)
    bits = jnp.clip(bits & 0x7F800000, 0x00800000, 0x7F000000)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _joined(largest: Any, squares: Any, other: Any, more: Any) -> tuple[jax.Array, jax.Array]:
    """The larger ones, and two scaled sums of squares as one."""
    new = jnp.maximum(largest, other)
    scale, old, added = _scale(new), _scale(largest), _scale(other)
    return new, squares * (old / scale) ** 2 + more * (added / scale) ** 2
