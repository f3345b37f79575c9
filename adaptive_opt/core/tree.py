"""The lines of one array, lifted over a tree: once, here.

Leaves without a gradient, the structure of trees, buffers by name, and the two kinds of line meet
in this file. Stages run in the order of the list, each over all leaves. Where every line is of one
array, the arithmetic of a leaf sits under a plain ``jax.jit``: JAX then traces it once for each
distinct shape, and not once for each leaf.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from adaptive_opt.core import policies
from adaptive_opt.core.memory import Memory, Spec
from adaptive_opt.core.policies import Tree
from adaptive_opt.core.step import AdaptiveStep, Now, Remembering, WrongOrder


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

    def __init__(
        self, now: Now, gradient: Tree, params: Tree | None, state_dtype: DTypeLike | None = None
    ) -> None:
        leaves, self.structure = jax.tree.flatten(gradient, is_leaf=policies.is_none)
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

    @property
    def gradient(self) -> Tree:
        return self._tree("gradient")

    @property
    def direction(self) -> Tree:
        return self._tree("direction")

    @property
    def second_moment(self) -> Tree:
        return self._tree("second_moment")

    @property
    def rate(self) -> Tree:
        return self._tree("rate")

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

    def map(self, function: Callable[..., Any], *trees: Tree, **scalars: Any) -> Tree:
        """``function(*leaves, **scalars)`` for every leaf that has a gradient, in one width."""
        return policies.map_leaves(function, self.gradient, *trees, **scalars)

    def copy(self) -> OpenStep:
        """The same for somebody else to change."""
        new = object.__new__(OpenStep)
        new.__dict__.update(self.__dict__)
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
        tree = self.structure.unflatten(range(len(self.steps)))
        paths = jax.tree_util.tree_flatten_with_path(tree)[0]
        return f" at {jax.tree_util.keystr(paths[index][0]) or 'the only leaf'}"

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
    buffers: Mapping[str, Tree] | None,
    state_dtype: DTypeLike | None = None,
    show: Callable[[Any, OpenStep], None] | None = None,
) -> dict[str, Tree]:
    """Takes the step through the lines; the buffers they keep, each under its name.

    An observer among the lines is shown the step where it stands.
    """
    memories, of_tree = _memories(step, buffers, state_dtype)
    _through(lines, step, memories, of_tree, show)
    return {} if buffers is None else _collected(step, buffers, memories, of_tree)


def _through(
    lines: Sequence[Any],
    step: OpenStep,
    memories: Sequence[Memory],
    of_tree: Memory,
    show: Callable[[Any, OpenStep], None] | None = None,
) -> None:
    step.memory = of_tree
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
                _run(line, each, turn)


def _run(line: Any, step: Any, turn: object) -> None:
    """One line on one step, of a leaf or of the tree; ``turn`` is its place in the list."""
    step.now.begin(turn, line.stage, line.settings)
    result = line.function(step)
    if not isinstance(result, type(step)):
        raise LineError(f"the line of {line.stage} must return a step, got {result!r}.")
    if step.now.clash is not None:  # last, for whatever else is wrong says more
        raise step.now.clash


def _memories(
    step: OpenStep, buffers: Mapping[str, Tree] | None, state_dtype: DTypeLike | None
) -> tuple[list[Memory], Memory]:
    warned: set[str] = set()
    columns = None
    if buffers is not None:
        columns = {
            name: _column(step.structure, buffer, len(step.steps))
            for name, buffer in buffers.items()
        }
    memories = []
    for index, each in enumerate(step.steps):
        stored = None
        if columns is not None:
            stored = {name: c[index] for name, c in columns.items() if c is not None}
        where = (lambda: "") if columns is None else functools.partial(step.where, index)
        like = None if each is None else each.shape
        memories.append(Memory(stored, state_dtype, where, warned, like))
    return memories, Memory(buffers, state_dtype, lambda: "", warned)


def _column(structure: Any, buffer: Tree, leaves: int) -> list[Any] | None:
    """The leaves of a buffer; None for one that the tree has once."""
    alone = jax.tree.structure(0)
    if jax.tree.structure(buffer) == alone != structure:
        return None
    return policies.leaves_like(structure, buffer)


def _collected(
    step: OpenStep, buffers: Mapping[str, Tree], memories: list[Memory], of_tree: Memory
) -> dict[str, Tree]:
    inputs = [() if each is None else each.inputs for each in step.steps]
    finished = [memory.finished(*given) for memory, given in zip(memories, inputs, strict=True)]
    new: dict[str, Tree] = of_tree.finished()
    for name, old in buffers.items():
        if name in new:
            continue
        column = policies.leaves_like(step.structure, old)
        leaves = [made.get(name, kept) for made, kept in zip(finished, column, strict=True)]
        new[name] = step.structure.unflatten(leaves)
    return {name: new[name] for name in buffers}


def update_leaves(
    lines: Sequence[Any],
    now: Now,
    gradient: Tree,
    buffers: Mapping[str, Tree],
    params: Tree | None,
    state_dtype: DTypeLike | None,
) -> tuple[Tree, dict[str, Tree]]:
    """A whole step from plain gradient to plain update, and the new buffers."""
    if any(line.is_of_the_tree for line in lines) or not _is_staged():
        step = OpenStep(now, gradient, params)
        new = run(lines, step, buffers, state_dtype)
        return step.close(), new

    leaves, structure = jax.tree.flatten(gradient, is_leaf=policies.is_none)
    of_params = leaves_of_params(params, structure, leaves)
    columns = {name: policies.leaves_like(structure, buffer) for name, buffer in buffers.items()}
    warned: set[str] = set()
    place = 0

    def where() -> str:
        paths = jax.tree_util.tree_flatten_with_path(gradient, is_leaf=policies.is_none)[0]
        return f" at {jax.tree_util.keystr(paths[place][0]) or 'the only leaf'}"

    # What leaves have in common is calculated here, once. (A quotient by a scalar of its own XLA
    # writes as a product with the inverse.)
    first = next((i for i, g in enumerate(leaves) if g is not None), None)
    if first is not None:
        now.calculate(scalars_of(lines, leaves[first], of_params[first]))
    arrays = {k: pair for k, pair in now.scalars.items() if isinstance(pair[1], jax.Array)}
    of_whom = [hyperparameter for hyperparameter, _ in arrays.values()]
    scalars = [value for _, value in arrays.values()]

    @jax.jit
    def one_leaf(
        count: jax.Array, scalars: list[Any], gradient: Any, param: Any, stored: dict[str, Any]
    ) -> Any:
        own = Now(count, now.extra)
        own.scalars = dict(zip(arrays, zip(of_whom, scalars, strict=True), strict=True))
        memory = Memory(stored, state_dtype, where, warned, jnp.shape(gradient))
        step = AdaptiveStep(own, gradient, param, memory)
        with jax.numpy_dtype_promotion("standard"):
            for line in lines:
                step.begin()
                _run(line, step, object())
            return step.close(), memory.finished(*step.inputs)

    updates: list[Any] = list(leaves)
    new = {name: list(column) for name, column in columns.items()}
    for place, (g, p) in enumerate(zip(leaves, of_params, strict=True)):
        if g is None:
            continue
        stored = {name: column[place] for name, column in columns.items()}
        updates[place], kept = one_leaf(now.count, scalars, g, p, stored)
        for name, value in kept.items():
            new[name][place] = value
    return structure.unflatten(updates), {k: structure.unflatten(v) for k, v in new.items()}


def _is_staged() -> bool:
    """Whether a program is being traced (jit, scan), and not merely a function transformed.

    There a ``jit`` of one leaf saves tracing; elsewhere it would compile anew at every step.
    """
    return isinstance(jnp.zeros((), np.int32), Tracer)


def leaves_of_params(params: Tree | None, structure: Any, leaves: Sequence[Any]) -> list[Any]:
    """The parameter of every leaf; None where there are none."""
    if params is None:
        return [None] * len(leaves)
    same = jax.tree.leaves(params, is_leaf=policies.is_none)
    if len(same) == len(leaves):
        return same  # perhaps in another container, a FrozenDict for a dict, say
    return policies.leaves_like(structure, params)


# --- the look -------------------------------------------------------------------------------------


class Look(NamedTuple):
    """What the lines keep, limit and ask for, found without computing anything."""

    leaves: list[dict[str, Spec]]
    of_tree: dict[str, Spec]
    limits: tuple[str, ...]
    asked: tuple[Any, ...]

    def names(self) -> set[str]:
        return {name for specs in (*self.leaves, self.of_tree) for name in specs}


def look(
    lines: Sequence[Any], params: Tree, *, lenient: bool = False, closing: bool = False
) -> Look:
    """One abstract step for parameters like these."""
    found: list[Look] = []

    def step(params: Tree, count: Any) -> Any:
        now = Now(count, looking=True, lenient=lenient)
        step = OpenStep(now, params, params)
        memories, of_tree = _memories(step, None, None)
        _through(lines, step, memories, of_tree)
        if closing:
            step.close()
        asked = tuple((key, h) for key, (h, _) in now.scalars.items())
        limits = tuple(now.limits.values())
        found.append(Look([m.specs for m in memories], of_tree.specs, limits, asked))
        return ()

    jax.eval_shape(step, params, jax.ShapeDtypeStruct((), np.int32))
    return found[0]


def scalars_of(lines: Sequence[Any], gradient: Any, param: Any) -> tuple[Any, ...]:
    """The scalars that the lines ask for on a leaf like this."""
    dtype = policies.wide(policies.update_dtype(gradient, param))
    return look(lines, jax.ShapeDtypeStruct(jnp.shape(gradient), dtype)).asked


_SOME_LEAF = jax.ShapeDtypeStruct((3, 2), np.float32)


def look_at_some_leaf(lines: Sequence[Any], *, lenient: bool = False) -> Look | None:
    """What can be said before there are parameters; an error for an impossible order of lines.

    None where a line does not bear a matrix of three by two.
    """
    try:
        return look(lines, _SOME_LEAF, lenient=lenient, closing=not lenient)
    except (WrongOrder, LineError):
        raise
    except Exception:
        return None


def init_buffers(
    lines: Sequence[Any],
    params: Tree,
    state_dtype: DTypeLike | None = None,
    *,
    lenient: bool = False,
) -> dict[str, Tree]:
    """The buffers of all the lines before the first step, where the parameters are."""
    with_paths, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=policies.is_none)
    shapes = []
    for path, param in with_paths:
        try:
            dtype = None if param is None else policies.dtype_of(param)
            shapes.append(param if dtype is None else _struct(param, dtype))
        except TypeError as error:
            raise TypeError(
                f"at {jax.tree_util.keystr(path) or 'the only leaf'}: {error}"
            ) from None
    if any(line.is_of_the_tree for line in lines):
        found = look(lines, structure.unflatten(shapes), lenient=lenient)
    else:
        alike: dict[Any, dict[str, Spec]] = {}
        for shape in shapes:
            key = None if shape is None else (shape.shape, shape.dtype)
            if key is not None and key not in alike:
                alike[key] = look(lines, shape, lenient=lenient).leaves[0]
        found = Look([{} if s is None else alike[s.shape, s.dtype] for s in shapes], {}, (), ())
    names = found.names()
    if not any(found.leaves):  # no parameters, or something that stands for them
        some = look_at_some_leaf(lines, lenient=lenient)
        names |= some.names() if some else set()
    buffers: dict[str, Tree] = {}
    for name in sorted(names):
        if name in found.of_tree:
            spec = found.of_tree[name]
            buffers[name] = jnp.full((), spec.initial, spec.dtype(name, state_dtype))
        else:
            buffers[name] = structure.unflatten(
                _initial(name, specs.get(name), param, state_dtype)
                for specs, (_, param) in zip(found.leaves, with_paths, strict=True)
            )
    return buffers


def _struct(param: Any, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    policies.wide(dtype)
    return jax.ShapeDtypeStruct(np.shape(param), dtype)


def _initial(name: str, spec: Spec | None, param: Any, state_dtype: DTypeLike | None) -> Any:
    if spec is None:
        return None
    dtype = spec.dtype(name, state_dtype)
    if isinstance(spec.initial, jax.Array):
        return jnp.array(param, dtype, copy=True)
    if spec.is_like_gradient:
        return jnp.full_like(param, spec.initial, dtype=dtype)
    return jnp.full(spec.shape, spec.initial, dtype)


def check_names(lines: Iterable[Any], expected: Iterable[str], given: Iterable[str]) -> None:
    """Whether a state holds just the buffers of the lines."""
    if set(expected) != set(given):
        stages = dict.fromkeys(line.stage for line in lines)
        raise ValueError(
            f"{', '.join(stages)}: the state should hold the buffers {_listed(expected)}, but holds"
            f" {_listed(given)}. A state belongs to the optimizer that initialised it."
        )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
