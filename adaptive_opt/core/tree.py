"""The lines of one array, lifted over a tree: once, here.

Leaves without a gradient, the structure of trees, buffers by name, and the two kinds of line meet
in this file. Stages run in the order of the list, each over all leaves. Where every line is of one
array, the arithmetic of a leaf sits under a plain ``jax.jit``: JAX then traces it once for each
distinct shape, and not once for each leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from adaptive_opt.core import trees
from adaptive_opt.core.memory import Memory
from adaptive_opt.core.now import Now, Remembering
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.trees import Tree


class _SaysWhatToDo(type):
    """JAX names the types where two trees differ; this one says in its name what is missing."""

    def __repr__(cls) -> str:
        return "an open AdaptiveStep: only stages can read it, put close_step() before"


class OpenStep(Remembering, metaclass=_SaysWhatToDo):
    """The steps of all the leaves of a tree: what a flat chain hands on, and observers look at.

    Deliberately no container that JAX or optax can look into: a foreign transformation between
    ``open_step()`` and ``close_step()`` would clip the count or scale the learning rate twice, and
    nobody would know. It fails at once instead.

    Attributes:
      steps: the :class:`AdaptiveStep` of each leaf; None where there is no gradient.
      gradient, direction, second_moment, rate: trees of what the steps hold; None where nothing
        has set it.
      params: the parameters, if ``update`` was given them.
      notes: what stages left for observers, by name; trees too. "limited" is a list of
        ``(stage, (before, after))``.
    """

    def __init__(self, now: Now, gradient: Tree, params: Tree | None) -> None:
        leaves, self.structure = jax.tree.flatten(gradient, is_leaf=trees.is_none)
        self.now, self.params, self.extra_notes = now, params, {}
        self.steps = [
            None if g is None else AdaptiveStep(now, g, p, Memory({}))
            for g, p in zip(leaves, leaves_of_params(params, self.structure, leaves), strict=True)
        ]
        widths = [step.width for step in self.steps if step is not None]
        self.width = max(widths, key=lambda d: d.itemsize, default=np.dtype(np.float32))
        self.memory = Memory({})

    # --- for lines of the whole tree ----------------------------------------------------------

    def each(self, line: Callable[[AdaptiveStep], AdaptiveStep]) -> OpenStep:
        """The same after a line on every leaf."""
        for step in self.steps:
            if step is not None:
                line(step)
        return self

    def leaves(self, line: Callable[[AdaptiveStep], jax.Array]) -> list[jax.Array]:
        """What a function says of every leaf."""
        return [line(step) for step in self.steps if step is not None]

    # --- for observers ------------------------------------------------------------------------

    gradient = property(lambda self: self._tree("gradient"))
    direction = property(lambda self: self._tree("direction"))
    second_moment = property(lambda self: self._tree("second_moment"))
    rate = property(lambda self: self._tree("rate"))

    @property
    def notes(self) -> dict[str, Any]:
        there = [step for step in self.steps if step is not None]
        names = dict.fromkeys(name for step in there for name in step.notes)
        notes = {name: self._map(lambda s, n=name: s.notes.get(n)) for name in names}
        limited = []
        for line in dict.fromkeys(line for step in there for line in step.limited):
            pair = [
                self._map(lambda s, i=i, line=line: s.limited.get(line, (None, None))[i])
                for i in (0, 1)
            ]
            limited.append((self.now.limits[line], tuple(pair)))
        return notes | {"limited": limited} | self.extra_notes

    def noting(self, **notes: Any) -> OpenStep:
        """The same with something more for observers to read."""
        new = self.copy()
        new.extra_notes |= notes
        return new

    def map(self, function: Callable[..., Any], *others: Tree, **scalars: Any) -> Tree:
        """``function(*leaves, **scalars)`` for every leaf that has a gradient, in one width."""
        return trees.map_leaves(function, self.gradient, *others, **scalars)

    def copy(self) -> OpenStep:
        """The same for somebody else to change."""
        new = object.__new__(OpenStep)
        vars(new).update(vars(self))
        new.now = self.now.copy()
        new.steps = [None if step is None else step.copy(new.now) for step in self.steps]
        new.extra_notes = dict(self.extra_notes)
        return new

    def close(self) -> Tree:
        """The plain updates."""
        with jax.numpy_dtype_promotion("standard"):
            return self._map(lambda step: step.close())

    def where(self, index: int) -> str:
        """The path of a leaf, for a message."""
        return f" at {trees.path_at(self.structure.unflatten(range(len(self.steps))), index)}"

    def _map(self, function: Callable[[AdaptiveStep], Any]) -> Tree:
        made = [None if step is None else function(step) for step in self.steps]
        return self.structure.unflatten(made)

    def _tree(self, field: str) -> Tree | None:
        if any(step is not None and field not in step.values for step in self.steps):
            return None
        return self._map(lambda step: step.peek(field))

    def __repr__(self) -> str:
        first = next((step for step in self.steps if step is not None), None)
        filled = ", ".join(sorted(first.values)) if first else "nothing"
        return (
            "AdaptiveStep(an open step, of which only stages know how to read it;"
            f" close_step() turns it into updates; filled: {filled})"
        )


def _refuse(_: OpenStep) -> Any:
    raise TypeError(
        "an open AdaptiveStep reached something that is not a stage of adaptive_opt: an optax"
        " transformation between open_step() and close_step(), apply_updates, or the border of a"
        " jit. Move the transformation before open_step() or after close_step(); if there is no"
        " close_step() yet, add it."
    )


# Not a container: registered only so that every tree function refuses it, with the reason. (What
# JAX does not know it takes for a leaf, and `decay * {"w": ...}` would then raise an error of
# Python's.)
jax.tree_util.register_pytree_node(OpenStep, _refuse, lambda *_: _refuse(*_))


# --- running the lines ----------------------------------------------------------------------------


class LineError(TypeError):
    """A line that does not return a step."""


def run(
    lines: Sequence[Any],
    step: OpenStep,
    buffers: Mapping[str, Tree],
    state_dtype: DTypeLike | None = None,
    show: Callable[[Any, OpenStep], None] | None = None,
) -> dict[str, Tree]:
    """Takes the step through the lines; the buffers they keep, each under its name.

    An observer among the lines is shown the step where it stands.
    """
    memories, common = memories_of(step, buffers, state_dtype)
    take_through(lines, step, memories, common, show)
    new = common.finished()
    leaves = [
        {**(memory.stored or {}), **memory.finished(*getattr(each, "inputs", ()))}
        for each, memory in zip(step.steps, memories, strict=True)
    ]
    return of_tree(step.structure, leaves, set(buffers) - set(new)) | new


def take_through(
    lines: Sequence[Any],
    step: OpenStep,
    memories: Sequence[Memory],
    common: Memory,
    show: Callable[[Any, OpenStep], None] | None = None,
) -> None:
    step.memory = common
    there = [(s, memory) for s, memory in zip(step.steps, memories, strict=True) if s is not None]
    with jax.numpy_dtype_promotion("standard"):  # widths are our matter
        for line in lines:
            if not hasattr(line, "function"):
                if show is None:
                    raise ValueError(
                        f"{line.stage} observes the stages of a bracket: list it in adaptive(...),"
                        " or give it to a recipe as observers=."
                    )
                show(line, step)
                continue
            turn = object()
            for each, memory in there:
                each.begin(memory)
            for each in [step] if line.is_of_the_tree else [each for each, _ in there]:
                run_line(line, each, turn)


def run_on_one(lines: Sequence[Any], step: AdaptiveStep) -> None:
    """Takes the step of one array through the lines, of which none is of the tree."""
    with jax.numpy_dtype_promotion("standard"):
        for line in lines:
            step.begin()
            run_line(line, step, object())


def run_line(line: Any, step: Any, turn: object) -> None:
    """One line on one step, of a leaf or of the tree; ``turn`` is its place in the list."""
    step.now.begin(turn, line.stage, line.settings)
    result = line.function(step)
    if not isinstance(result, type(step)):
        raise LineError(f"the line of {line.stage} must return a step, got {result!r}.")
    if step.now.clash is not None:  # last, for whatever else is wrong says more
        raise step.now.clash


def memories_of(
    step: OpenStep, buffers: Mapping[str, Tree] | None, state_dtype: DTypeLike | None
) -> tuple[list[Memory], Memory]:
    """The memory of every leaf, and that of the tree; without buffers, for a look."""
    warned: set[str] = set()
    memories = []
    stored = of_leaves(step.structure, buffers) if buffers is not None else None
    for index, each in enumerate(step.steps):
        own = None if stored is None else stored[index]
        where = (lambda: "") if stored is None else functools.partial(step.where, index)
        memories.append(Memory(own, state_dtype, where, warned, getattr(each, "shape", None)))
    return memories, Memory(buffers, state_dtype, warned=warned)


def of_leaves(structure: Any, buffers: Mapping[str, Tree]) -> list[dict[str, Any]]:
    """The buffers of every leaf, less those that the tree has once."""
    alone, leaves = jax.tree.structure(0), [{} for _ in range(structure.num_leaves)]
    for name, buffer in buffers.items():
        if jax.tree.structure(buffer) != alone or alone == structure:
            for own, x in zip(leaves, trees.leaves_like(structure, buffer), strict=True):
                own[name] = x
    return leaves


def of_tree(structure: Any, leaves: Sequence[Mapping[str, Any]], names: Iterable[str]) -> Any:
    """The buffers of the tree again, of those of every leaf."""
    return {name: structure.unflatten([own[name] for own in leaves]) for name in names}


def leaves_of_params(params: Tree | None, structure: Any, leaves: Sequence[Any]) -> list[Any]:
    """The parameter of every leaf; None where there are none."""
    if params is None:
        return [None] * len(leaves)
    same = jax.tree.leaves(params, is_leaf=trees.is_none)
    if len(same) == len(leaves):
        return same  # perhaps in another container, a FrozenDict for a dict, say
    return trees.leaves_like(structure, params)
