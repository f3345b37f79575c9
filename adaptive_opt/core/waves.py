"""All the weights of a step, one short wave after another.

Who looks at every weight, and keeps nothing of their size, need not hold all of them at once, nor
have a program for every leaf. Where the lines work on each weight by itself, a wave is a flat array
of one length, cut from a large leaf or filled with small ones, and one loop goes through all waves:
the lines are compiled once for it. Whether they do is read off their operations (``programs``).
Elsewhere a wave is a leaf, and the lines are compiled once for every shape.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from adaptive_opt.core import trees
from adaptive_opt.core.look import Lines, scalars_of
from adaptive_opt.core.now import Now
from adaptive_opt.core.programs import Inputs, are_ours, program_of, program_of_look, stepped
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep, of_leaves
from adaptive_opt.core.trees import Tree

Carry = TypeVar("Carry")
Leaf = TypeVar("Leaf")

SHORTEST, LONGEST = 2**12, 2**24
"""The least and the greatest length of a wave, which is a multiple of the least."""
PARTS = 4
"""The lines go through a wave in so many parts."""
MADE = 40
"""The bytes of what is made of a weight and kept for the length of a part."""
SEGMENT = 2**31
"""So many weights can be counted in 32 bits."""


class Wave(NamedTuple):
    """A step of some arrays; which of their places are weights (None: all), under which number."""

    step: AdaptiveStep
    is_weight: jax.Array | None
    number: jax.Array


@dataclasses.dataclass(frozen=True)
class Waves:
    """Leaves of one kind, for which the lines are one program."""

    lines: Sequence[Any]
    now: Now
    state_dtype: DTypeLike | None
    places: tuple[int, ...]
    """The places of the leaves in the tree."""
    leaves: tuple[Inputs, ...]
    length: int | None
    """Of a wave; None: it is a leaf, and all leaves have one shape."""

    def fold(
        self,
        numbers: Sequence[int],
        add: Callable[[Carry, Wave], Carry],
        start: Carry,
        when: Any,
    ) -> Carry:
        """``add`` over all waves, beginning with ``start``; over none where it is not time.

        Args:
          numbers: one for each leaf; a wave holds only leaves of one number.
          add, start: what is carried from wave to wave; ``add`` has no derivative.
          when: a truth.
        """
        _warn_where_not_traced(self.leaves)
        if self.length is None:

            def add_leaf(carry: Carry, leaf: Inputs, number: jax.Array) -> Carry:
                return add(carry, Wave(self._stepped(leaf), None, number))

            return one_by_one(self.leaves, numbers, add_leaf, start, when)
        length, part = self.length, self.length // PARTS
        cuts, branches = _cuts(self.leaves, numbers, length)
        table = jnp.asarray(np.array(cuts, np.int32))

        def take(t: jax.Array, carry: Carry) -> Carry:
            cut = jax.lax.dynamic_index_in_dim(table, t.astype(np.uint32), keepdims=False)
            held = _one_of(branches, cut[0], cut)

            def take_part(state: Any) -> Any:
                begin, carry = state
                step = self._stepped(_part(held, begin, self.leaves[0], length))
                place = begin + jax.lax.iota(np.int32, part)
                is_weight = (place >= cut[2]) & (place < cut[3])
                return begin + np.int32(part), add(carry, Wave(step, is_weight, cut[4]))

            is_within = lambda state: state[0] < np.int32(length)  # noqa: E731
            return jax.lax.while_loop(is_within, take_part, (np.int32(0), carry))[1]

        return repeat(len(cuts), take, all_varying_like(start, self.leaves), when)

    def _stepped(self, leaf: Inputs) -> AdaptiveStep:
        return stepped(self.lines, self.now, leaf, self.state_dtype)


def one_by_one(
    leaves: Sequence[Leaf],
    numbers: Sequence[int],
    add: Callable[[Carry, Leaf, jax.Array], Carry],
    start: Carry,
    when: Any,
) -> Carry:
    """``add`` over leaves of one type, each with its number: one program, and one at a time.

    On a mesh with automatic axes it is a program for each: leaves of one shape may be split in
    different ways there, and a loop would bring all of them to one.
    """
    start = all_varying_like(start, leaves)
    number = jnp.asarray(np.array(numbers, np.int32))
    if any(map(_is_split_unseen, jax.tree.leaves(leaves))):
        for leaf, n in zip(leaves, number, strict=True):
            take_one = functools.partial(lambda leaf, n, carry: add(carry, leaf, n), leaf, n)
            start = trees.branch(when, take_one, lambda carry: carry, start)
        return start
    branches = [lambda leaf=leaf: leaf for leaf in leaves]

    def take(t: Any, carry: Carry) -> Carry:
        return add(carry, _one_of(branches, t), number[t])

    return repeat(len(branches), take, start, when)


def repeat(times: int, body: Callable[[Any, Carry], Carry], start: Carry, when: Any) -> Carry:
    """``start`` after so many rounds; after none where it is not time.

    A loop that may have no round is half the program of a ``lax.cond`` around a loop. What is the
    same in each round XLA does before it, at every step: of one round this is all, and there it is
    a ``lax.cond``. As JAX does not know how often a loop goes round, it can be differentiated
    backwards only if neither ``start`` nor what ``body`` makes of it has a derivative.
    """
    if times == 1:
        once = functools.partial(body, jnp.zeros((), np.int32))
        return trees.branch(when, once, lambda start: start, start)
    if not isinstance(when, Tracer) and not when:
        return start
    rounds = jnp.where(when, np.int32(times), np.int32(0))

    def again(state: Any) -> Any:
        return state[0] + np.int32(1), body(*state)

    return jax.lax.while_loop(lambda state: state[0] < rounds, again, (np.int32(0), start))[1]


def _one_of(branches: Sequence[Callable[..., Any]], which: Any, *args: Any) -> Any:
    """The value of that branch; of many in two steps, for JAX gives each the arrays of all."""
    if len(branches) <= 32:
        return jax.lax.switch(which, branches, *args)
    few = math.isqrt(len(branches) - 1) + 1

    def of_few(first: int) -> Callable[..., Any]:
        return lambda *args: jax.lax.switch(which % few, branches[first : first + few], *args)

    return jax.lax.switch(which // few, [*map(of_few, range(0, len(branches), few))], *args)


def all_varying_like(start: Carry, leaves: Any) -> Carry:
    """``start`` with the types of what varies over the manual axes over which a leaf does."""
    arrays = jax.tree.leaves(leaves)
    return jax.tree.map(lambda x: trees.varying_like(x, arrays), start)


def type_of(leaf: Any) -> Any:
    """What leaves have in common that one program can take: types of arrays, and structure."""
    arrays, structure = jax.tree.flatten(leaf)
    return tuple(map(jax.typeof, arrays)), structure


def _warn_where_not_traced(leaves: Any) -> None:
    is_traced = any(isinstance(x, Tracer) for x in jax.tree.leaves(leaves))
    if not (is_traced or cast(Any, jax.config).jax_disable_jit):
        _say_that_it_is_compiled()


@functools.cache
def _say_that_it_is_compiled() -> None:
    """Once in a process."""
    warnings.warn(
        "an observer looks at an update that is not compiled: its loop over the weights is compiled"
        " anew every time. Put the training step under jax.jit, or let it look less often"
        " (telemetry(every=...)).",
        stacklevel=2,
    )


def waves_of(
    lines: Lines,
    step: OpenStep,
    buffers: Mapping[str, Tree],
    state_dtype: DTypeLike | None,
) -> list[Waves] | None:
    """The leaves of a step as it was opened, by kind; None where a line is of the whole tree.

    None also where a leaf is all of a wave and too large to be counted.
    """
    if any(line.is_of_the_tree for line in lines):
        return None
    stored = of_leaves(step.structure, buffers)
    inputs: list[Any] = [
        None
        if each is None
        else Inputs(
            _arrays(each.inputs[0]),
            _arrays(each.inputs[1]),
            {k: _arrays(x) for k, x in own.items()},
        )
        for each, own in zip(step.steps, stored, strict=True)
    ]
    there = [leaf for leaf in inputs if leaf is not None]
    types = {
        place: type_of(leaf)
        for place, leaf in enumerate(inputs)
        if leaf is not None and leaf.gradient.size
    }
    some = {type_: inputs[place] for place, type_ in types.items()}
    if not there:
        return None
    first = there[0]
    step.now.calculate(scalars_of(lines, first.gradient, first.param))
    now = step.now.copy()
    now.scalars = dict(step.now.scalars)
    length: int | None = _length(there)
    kinds: dict[Any, Any] | None = _by_program(lines, now, some, length, state_dtype)
    if kinds is None:
        kinds, length = {type_: type_ for type_ in some}, None
    alike: dict[Any, list[int]] = {}
    for place, type_ in types.items():
        alike.setdefault(kinds[type_], []).append(place)
    waves = [
        Waves(lines, now, state_dtype, tuple(places), tuple(inputs[i] for i in places), length)
        for places in alike.values()
    ]
    are_countable = all(leaf.gradient.size < SEGMENT for leaf in some.values())
    return waves if length is not None or are_countable else None


def _arrays(x: Any) -> Any:
    """Of NumPy's, and of numbers; of what holds some, too."""
    return x if isinstance(x, jax.Array) else jax.tree.map(jnp.asarray, x)


def _by_program(
    lines: Lines,
    now: Now,
    some: Mapping[Any, Inputs],
    length: int,
    state_dtype: DTypeLike | None,
) -> dict[Any, Any] | None:
    """The kind of each type of leaf, for which the lines are one program.

    None where a line sees more than one weight, or asks in Python for a shape, and where arrays may
    be split over a mesh: their parts would have to be put together first.
    """
    if any(map(_may_be_split, jax.tree.leaves(list(some.values())))):
        return None
    ours, flat = are_ours(lines), (length // PARTS,)
    programs: dict[Any, Any] = {}
    kinds: dict[Any, Any] = {}

    def program(leaf: Inputs, shape: tuple[int, ...]) -> Any:
        if ours:
            return program_of_look(lines, leaf, shape)
        return program_of(lines, now, state_dtype, leaf, shape)

    for (arrays, structure), leaf in some.items():
        if not _fits(leaf):
            return None
        dtypes = tuple(x.dtype for x in arrays), structure
        if dtypes not in programs:
            made = program_of(lines, now, state_dtype, leaf, flat)
            programs[dtypes] = program(leaf, flat) if ours and made is not None else made
        if programs[dtypes] is None or program(leaf, leaf.gradient.shape) != programs[dtypes]:
            return None
        split = frozenset().union(*map(trees.varying, jax.tree.leaves(leaf)))
        kinds[arrays, structure] = dtypes, split
    return kinds


def _length(leaves: Sequence[Inputs]) -> int:
    """Such that a wave of all inputs, and what is made of a part, is less than a byte a weight.

    Longer waves are fewer, and so is what there is to compile.
    """
    total = sum(leaf.gradient.size for leaf in leaves)
    bytes_of_one = max(sum(x.dtype.itemsize for x in jax.tree.leaves(leaf)) for leaf in leaves)
    part = total // (bytes_of_one + MADE // PARTS)
    return int(np.clip(part // SHORTEST * SHORTEST, SHORTEST, LONGEST))


# --- which leaves ---------------------------------------------------------------------------------


def _may_be_split(x: Any) -> bool:
    """Whether an array is on several devices, and not as a part of its own on each."""
    return bool(_kinds_of_axes(x) - {jax.sharding.AxisType.Manual})


def _is_split_unseen(x: Any) -> bool:
    """Whether an array may be split in a way that its type does not show."""
    return jax.sharding.AxisType.Auto in _kinds_of_axes(x)


def _kinds_of_axes(x: Any) -> set[Any]:
    """Of the mesh that an array is on, where there is more than one device along them."""
    mesh = getattr(getattr(jax.typeof(x), "sharding", None), "mesh", None)
    if mesh is None or mesh.empty:
        return set()
    kinds = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return {kind for kind, size in kinds if size > 1}


def _fits(leaf: Inputs) -> bool:
    size, arrays = leaf.gradient.size, jax.tree.leaves(leaf)
    alike = all(jnp.shape(x) == leaf.gradient.shape for x in arrays)
    return alike and (size < SEGMENT or size // math.gcd(size, SHORTEST) < SEGMENT)


# --- cutting --------------------------------------------------------------------------------------


class Cut(NamedTuple):
    """A wave: how to make it, which of its places are weights that are new, and their number."""

    branch: int
    row: int
    first: int
    last: int
    number: int


def _cuts(leaves: Sequence[Inputs], numbers: Sequence[int], length: int) -> Any:
    """The waves, and for every way to make one its function of a cut."""
    cuts: list[Cut] = []
    branches: list[Callable[[jax.Array], list[jax.Array]]] = []
    small: list[tuple[int, list[Inputs]]] = []
    filled: list[int] = []
    ordered = sorted(zip(leaves, numbers, strict=True), key=lambda each: -each[0].gradient.size)
    for leaf, number in ordered:  # the largest first, each into the first wave with room for it
        size = leaf.gradient.size
        if size >= length:
            width = 1 if size < SEGMENT else math.gcd(size, SHORTEST)
            rows, high = size // width, length // width
            for row in range(0, rows, high):
                begin = min(row, rows - high)  # the last one reaches back
                cuts.append(Cut(len(branches), begin, (row - begin) * width, length, number))
            branches.append(lambda cut, own=(leaf, width, high): _rows(cut[1], *own, length))
            continue
        for i, (of, held) in enumerate(small):
            if of == number and filled[i] + size <= length:
                held.append(leaf)
                filled[i] += size
                break
        else:
            small.append((number, [leaf]))
            filled.append(size)
    for (number, held), size in zip(small, filled, strict=True):
        cuts.append(Cut(len(branches), 0, 0, size, number))
        arrays = [jax.tree.leaves(leaf) for leaf in held]
        branches.append(lambda _, arrays=arrays: _together(arrays, length))
    return cuts, branches


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _rows(row: Any, leaf: Inputs, width: int, high: int, length: int) -> list[jax.Array]:
    """So many rows of a leaf that is as wide."""
    row = row.astype(jnp.uint32)  # for which no sign need be looked at

    def cut(x: Any) -> jax.Array:
        if width == 1:
            return jax.lax.dynamic_slice(x.reshape(-1), (row,), (high,))
        zero = jnp.zeros_like(row)
        return jax.lax.dynamic_slice(x.reshape(-1, width), (row, zero), (high, width))

    return _together([[*map(cut, jax.tree.leaves(leaf))]], length)


@functools.partial(jax.jit, static_argnums=1)
def _together(held: Sequence[Sequence[jax.Array]], length: int) -> list[jax.Array]:
    """The arrays of leaves one after another, and zeros; flat, and all of a dtype in one.

    One operation for each dtype, and not for each array: there is less to compile.
    """
    rest = length - sum(first.size for first, *_ in held)
    parts: dict[Any, list[Any]] = {}
    for arrays in zip(*held, strict=True):
        zeros = [jnp.zeros(rest, arrays[0].dtype)] if rest else []
        parts.setdefault(arrays[0].dtype, []).extend([*(x.reshape(-1) for x in arrays), *zeros])
    return [jax.lax.concatenate(own, 0) for own in parts.values()]


def _part(held: Sequence[jax.Array], begin: Any, like: Inputs, length: int) -> Inputs:
    """The arrays of a wave again, a part of each."""
    leaves, structure = jax.tree.flatten(like)
    parts: dict[Any, list[jax.Array]] = {}
    for together, dtype in zip(held, dict.fromkeys(x.dtype for x in leaves), strict=True):
        starts = [begin + np.int32(first) for first in range(0, together.size, length)]
        parts[dtype] = [
            jax.lax.dynamic_slice(together, (start,), (length // PARTS,)) for start in starts
        ]
    return structure.unflatten([parts[x.dtype].pop(0) for x in leaves])
