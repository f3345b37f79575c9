"""A whole step from plain gradients to plain updates, traced once for each distinct shape."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from adaptive_opt.core import trees
from adaptive_opt.core.look import scalars_of
from adaptive_opt.core.memory import Memory
from adaptive_opt.core.now import Now
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep, leaves_of_params, of_leaves, of_tree, run, run_on_one
from adaptive_opt.core.trees import Tree


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

    leaves, structure = jax.tree.flatten(gradient, is_leaf=trees.is_none)
    of_params = leaves_of_params(params, structure, leaves)
    stored = of_leaves(structure, buffers)
    warned: set[str] = set()
    place = 0

    def where() -> str:
        return f" at {trees.path_at(gradient, place)}"

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
        run_on_one(lines, step)
        with jax.numpy_dtype_promotion("standard"):
            return step.close(), memory.finished(*step.inputs)

    updates: list[Any] = list(leaves)
    for place, (g, p) in enumerate(zip(leaves, of_params, strict=True)):
        if g is not None:
            updates[place], kept = one_leaf(now.count, scalars, g, p, stored[place])
            stored[place] |= kept
    return structure.unflatten(updates), of_tree(structure, stored, buffers)


def _is_staged() -> bool:
    """Whether a program is being traced (jit, scan), and not merely a function transformed.

    There a ``jit`` of one leaf saves tracing; elsewhere it would compile anew at every step.
    """
    return isinstance(jnp.zeros((), np.int32), Tracer)


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
