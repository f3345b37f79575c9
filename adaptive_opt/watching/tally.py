"""What telemetry counts of every weight: exact numbers, and sums that do not overflow.

A rate goes into one of 2^15 bins: a float32 without its sign and its last 16 bits. So a bin is
2^-7 of its rate wide, and the bits of floats that are not negative, read as integers, are in the
order of the floats. The counts themselves are kept, in two words of 32 bits: quantiles and the
histogram are read off them on the host, and are no part of the program.
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

KEYS = 2**15
_FIRST_KEYS = (10.0**BIN_EDGES).astype(np.float32).view(np.uint32) >> 16
NORMS = ("gradient", "param", "update")
_INFINITE = np.uint32(np.float32(np.inf).view(np.uint32) >> 16)
_EXPONENT, _LEAST, _MOST = 0x7F800000, 0x00800000, 0x7F000000
"""The bits of a float's exponent, of the least float that is normal, and of a half of the most."""
_HIGHEST, _LOWEST = len(NORMS), len(NORMS) + 1


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
    """Of the keys of rates, then of the weights that each stage limits: low words, high words."""
    largest: jax.Array
    """Of what there are norms of, of the rates, and of the rates with a minus."""
    squares: jax.Array
    """The sums of squares of the former, each divided by a scale near its largest."""
    friction: jax.Array
    """The sums; ``UNKNOWN`` where there is none."""
    highest: jax.Array
    """Of the rates of all groups that are numbers: by it XLA can tell whether all is counted."""

    @classmethod
    def nothing(cls, groups: int, limits: int) -> Tally:
        largest = np.full((groups, _LOWEST + 1), UNKNOWN, np.float32)
        largest[:, _LOWEST] = -np.inf
        return cls(
            jnp.zeros((2, groups, KEYS + limits), jnp.uint32),
            jnp.asarray(largest),
            jnp.zeros((groups, len(NORMS)), jnp.float32),
            jnp.full(groups, UNKNOWN, jnp.float32),
            jnp.full((), UNKNOWN, jnp.float32),
        )

    def adding(
        self, weights: Weights, group: Any, where: jax.Array | None = None, carries: bool = True
    ) -> Tally:
        """With the weights of an array of one group, those for which ``where`` is true.

        There are less than 2^31 of them. ``carries``: whether a low word may overflow.
        """
        _, groups, width = self.counts.shape
        group = group if groups > 1 else 0
        rate = weights.rate

        def there(x: jax.Array, otherwise: float = 0) -> jax.Array:
            return x if where is None else _if(where, x, otherwise)

        key = (jax.lax.bitcast_convert_type(rate, np.uint32) >> np.uint32(16)).astype(np.int32)
        place = there(group * np.int32(width) + key, self.counts.size).reshape(-1)
        one = jnp.ones((), np.uint32)
        counts = self.counts.reshape(-1).at[place].add(one, mode="drop").reshape(self.counts.shape)
        for i, limited in enumerate(weights.limited):
            number = jnp.sum(there(limited), dtype=np.uint32)
            counts = counts.at[0, group, KEYS + i].add(number)
        if carries:
            counts = counts.at[1].add((counts[0] < self.counts[0]).astype(np.uint32))

        here = jax.lax.iota(np.int32, groups) == group
        is_number = rate == rate
        sized = [None if x is None else there(jnp.abs(x).astype(np.float32)) for x in weights.sized]
        rates = there(_if(is_number, rate, UNKNOWN), UNKNOWN)
        negative = there(_if(is_number, -rate, -np.inf), -np.inf)
        rows = [*sized, rates, negative]  # each may be split over a mesh in its own way
        most = _row([np.float32(UNKNOWN) if x is None else jnp.max(x) for x in rows])
        largest = _if(here, jnp.maximum(self.largest, most), self.largest)
        before, scale = _scale(self.largest), _scale(largest)
        own = scale[group]
        sums = [
            np.float32(0) if x is None else jnp.sum((x / own[i]) ** 2) for i, x in enumerate(sized)
        ]
        squares = self.squares * (before / scale) ** 2
        squares = _if(here, squares + _row(sums), squares)
        friction = self.friction
        if weights.friction is not None:
            total = jnp.maximum(friction, 0) + jnp.sum(there(weights.friction))
            friction = _if(here, total, friction)
        highest = jnp.maximum(self.highest, most[0, _HIGHEST])
        return Tally(counts, largest, squares, friction, highest)

    def merged(self, other: Tally) -> Tally:
        low = self.counts[0] + other.counts[0]
        carry = (low < self.counts[0]).astype(jnp.uint32)
        counts = jnp.stack([low, self.counts[1] + other.counts[1] + carry])
        largest = jnp.maximum(self.largest, other.largest)
        squares = self._squares_at(largest) + other._squares_at(largest)
        known = jnp.maximum(self.friction, 0) + jnp.maximum(other.friction, 0)
        is_known = jnp.maximum(self.friction, other.friction) >= 0
        friction = jnp.where(is_known, known, UNKNOWN)
        highest = jnp.maximum(self.highest, other.highest)
        return Tally(counts, largest, squares, friction, highest)

    def everywhere(self, axes: tuple[str, ...]) -> Tally:
        """The sum over the devices among which the weights are split."""
        if not axes:
            return self
        low, high = self.counts
        digits = jax.lax.psum(jnp.stack([low & 0xFFFF, low >> 16, high]), axes)
        middle = digits[1] + (digits[0] >> 16)
        low, high = (digits[0] & 0xFFFF) | middle << 16, digits[2] + (middle >> 16)
        largest = jax.lax.pmax(self.largest, axes)
        squares = jax.lax.psum(self._squares_at(largest), axes)
        friction = jax.lax.psum(jnp.maximum(self.friction, 0), axes)
        friction = jnp.where(jax.lax.pmax(self.friction, axes) >= 0, friction, UNKNOWN)
        highest = jax.lax.pmax(self.highest, axes)
        return Tally(jnp.stack([low, high]), largest, squares, friction, highest)

    def _squares_at(self, largest: jax.Array) -> jax.Array:
        """The squares by the scales of others that are at least as large."""
        return self.squares * (_scale(self.largest) / _scale(largest)) ** 2


def _scale(largest: Any) -> Any:
    """A power of two near the largest elements of what there are norms of."""
    largest = jnp.maximum(largest[..., : len(NORMS)], 0)  # none yet: the least scale
    bits = jax.lax.bitcast_convert_type(largest, jnp.uint32)
    bits = jax.lax.clamp(np.uint32(_LEAST), bits & np.uint32(_EXPONENT), np.uint32(_MOST))
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def _if(where: jax.Array, x: jax.Array, otherwise: Any) -> jax.Array:
    """``jnp.where``, by rows. (XLA carries its constants through loops for a while.)"""
    if where.ndim < x.ndim:
        where = jax.lax.broadcast_in_dim(where, x.shape, (0,))
    if not isinstance(otherwise, jax.Array):
        otherwise = jax.lax.full_like(x, otherwise)
    return jax.lax.select(where, x, otherwise)


def _row(numbers: Sequence[Any]) -> jax.Array:
    return jax.lax.concatenate([jnp.reshape(x, (1, 1)) for x in numbers], 1)


# --- on the host ----------------------------------------------------------------------------------


class Counted(NamedTuple):
    """What was counted of a group, as numbers.

    Attributes:
      size: of the group.
      quantiles: the rates of ``QUANTILES``: each the middle of its bin, or what all are.
      histogram: the counts in the bins of ``BIN_EDGES``.
      limited: by each stage, so many weights.
      friction, norms: the mean, and those of ``NORMS``; ``UNKNOWN`` where there are none.
    """

    size: int
    quantiles: np.ndarray
    histogram: np.ndarray
    limited: list[int]
    friction: float
    norms: dict[str, float]

    @classmethod
    def of(cls, tally: Tally, group: int) -> Counted:
        """From a tally that was fetched."""
        low, high = np.asarray(tally.counts)[:, group].astype(np.uint64)
        counts = low + (high << np.uint64(32))
        keys, limited = counts[:KEYS], counts[KEYS:].tolist()
        size = int(keys.sum())
        largest = np.asarray(tally.largest[group])
        friction = float(tally.friction[group])
        bits = np.maximum(largest[: len(NORMS)], 0).view(np.uint32) & np.uint32(_EXPONENT)
        scale = bits.clip(_LEAST, _MOST).view(np.float32)
        norms = scale.astype(float) * np.sqrt(np.asarray(tally.squares[group], float))
        norms[largest[: len(NORMS)] == UNKNOWN] = UNKNOWN
        below = np.cumsum(keys)
        ends = np.concatenate([below[_FIRST_KEYS - 1], below[-1:]])
        return cls(
            size,
            np.clip(_quantiles(below), -largest[_LOWEST], largest[_HIGHEST]),
            np.diff(ends, prepend=np.uint64(0)),
            limited,
            UNKNOWN if friction < 0 else friction / max(size, 1),
            dict(zip(NORMS, norms.tolist(), strict=True)),
        )


def _quantiles(below: np.ndarray) -> np.ndarray:
    """The middles of the bins in which the weights of these ranks are, of counts added up."""
    ranks = [-(-round(100 * q) * int(below[-1]) // 100) for q in QUANTILES]
    key = np.searchsorted(below, np.array(ranks, np.uint64)).astype(np.uint32)
    middle = (key << 16 | 0x8000).view(np.float32)
    middle[key == _INFINITE] = np.inf
    middle[key == 0] = 0
    return middle
