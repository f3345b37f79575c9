"""One abstract look at the lines: what they keep, limit and ask for, found without computing it.

A schedule and a collective are stood in for during the look: neither need exist at ``init``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adaptive_opt.core import trees
from adaptive_opt.core.memory import PARAM, Spec
from adaptive_opt.core.now import Now, WrongOrder
from adaptive_opt.core.tree import LineError, OpenStep, memories_of, take_through
from adaptive_opt.core.trees import Tree


class Look(NamedTuple):
    """What the lines keep, limit and ask for, found without computing anything."""

    leaves: list[dict[str, Spec]]
    of_tree: dict[str, Spec]
    limits: tuple[str, ...]
    asked: tuple[Any, ...]
    program: Any = None
    """What makes all that an observer may look at; None if that is nothing yet."""

    def names(self) -> set[str]:
        return {name for specs in (*self.leaves, self.of_tree) for name in specs}


@jax.tree_util.register_pytree_node_class
class Lines(tuple[Any, ...]):
    """Lines that are looked at once for every shape and dtype of a leaf."""

    def __init__(self, lines: Iterable[Any]) -> None:
        del lines
        self.seen: dict[Any, Look] = {}
        self.operations: dict[Any, Any] = {}
        """What those who compare programs have made of them."""
        self._before: dict[int, Lines] = {}

    def before(self, place: int | None = None) -> Lines:
        """The lines before a place, or all, less observers; the same ones every time."""
        lines = [line for line in self[:place] if hasattr(line, "function")]
        if len(lines) not in self._before:
            self._before[len(lines)] = Lines(lines)
        return self._before[len(lines)]

    def __reduce__(self) -> Any:
        return Lines, (tuple(self),)

    def tree_flatten(self) -> Any:
        return tuple(self), None

    @classmethod
    def tree_unflatten(cls, known: Any, children: Any) -> Lines:
        del known
        return cls(children)


def look(
    lines: Sequence[Any], params: Tree, *, lenient: bool = False, closing: bool = False
) -> Look:
    """One abstract step for parameters like these."""
    if not (isinstance(lines, Lines) and isinstance(params, jax.ShapeDtypeStruct)):
        return _look(lines, params, lenient, closing)
    width = jnp.result_type(float)  # which goes by a setting of JAX
    key = params.shape, params.dtype, lenient, closing, width
    if key not in lines.seen:
        lines.seen[key] = _look(lines, params, lenient, closing)
    return lines.seen[key]


def _look(lines: Sequence[Any], params: Tree, lenient: bool, closing: bool) -> Look:
    found: list[Look] = []

    def step(params: Tree, count: Any) -> Any:
        now = Now(count, looking=True, lenient=lenient)
        step = OpenStep(now, params, params)
        memories, common = memories_of(step, None, None)
        take_through(lines, step, memories, common)
        if closing:
            step.close()
        asked = tuple((key, h, now.names.get(id(h))) for key, (h, _) in now.scalars.items())
        limits = tuple(now.limits.values())
        found.append(Look([m.specs for m in memories], common.specs, limits, asked))
        try:
            return [each.shown() for each in step.steps if each is not None]
        except ValueError:  # not yet: lines of a flat chain, say
            return None

    program = jax.make_jaxpr(step)(params, jax.ShapeDtypeStruct((), np.int32))
    return found[0]._replace(program=program if program.out_avals else None)


def scalars_of(lines: Sequence[Any], gradient: Any, param: Any) -> tuple[Any, ...]:
    """The scalars that the lines ask for on a leaf like this."""
    dtype = trees.wide(trees.update_dtype(gradient, param))
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
    with_paths, structure = jax.tree_util.tree_flatten_with_path(params, is_leaf=trees.is_none)
    shapes = []
    for path, param in with_paths:
        try:
            dtype = None if param is None else trees.dtype_of(param)
            shapes.append(param if dtype is None else _struct(param, dtype))
        except TypeError as error:
            raise TypeError(
                f"at {jax.tree_util.keystr(path) or 'the only leaf'}: {error}"
            ) from None
    if any(line.is_of_the_tree for line in lines):
        found = look(lines, structure.unflatten(shapes), lenient=lenient)
    else:
        lines = lines if isinstance(lines, Lines) else Lines(lines)
        leaves = [{} if s is None else look(lines, s, lenient=lenient).leaves[0] for s in shapes]
        found = Look(leaves, {}, (), ())
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


def init_shapes(lines: Sequence[Any], params: Tree) -> dict[str, Tree]:
    """The same for shapes, of which nothing is made."""
    abstract = jax.tree.map(_abstract, params)
    return jax.eval_shape(functools.partial(init_buffers, lines), abstract)


def _abstract(x: Any) -> Any:
    return jax.ShapeDtypeStruct(jnp.shape(x), trees.dtype_of(x))


def _struct(param: Any, dtype: np.dtype) -> jax.ShapeDtypeStruct:
    trees.wide(dtype)
    return jax.ShapeDtypeStruct(np.shape(param), dtype)


def _initial(name: str, spec: Spec | None, param: Any, state_dtype: DTypeLike | None) -> Any:
    if spec is None:
        return None
    dtype = spec.dtype(name, state_dtype)
    if spec.initial is PARAM:
        if isinstance(param, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct(param.shape, dtype)  # of what is still to come
        return jnp.array(param, dtype, copy=True)
    if spec.is_like_gradient:
        return jnp.full_like(param, spec.initial, dtype=dtype)
    return jnp.full(spec.shape, spec.initial, dtype)
