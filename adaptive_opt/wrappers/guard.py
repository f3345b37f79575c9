"""A guard against gradients that are not finite."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.describe import described_around
from adaptive_opt.core.trees import Tree


class SkipNonfiniteState(NamedTuple):
    """How many steps were skipped, in a row and in all, and the inner state."""

    consecutive: jax.Array
    total: jax.Array
    inner_state: Any


@described_around
def skip_nonfinite(
    inner: optax.GradientTransformation, axis_name: str | tuple[str, ...] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Skips a step that has a NaN or an infinity in its gradient or would make one, and counts it.

    The update is zero, and the inner state, its count included, is untouched: it is as if the batch
    had not been there. Two things are looked at: the gradient, and the new state where the old one
    was finite. So a square that overflows in a buffer of
    ``optax.adam`` (a gradient above 1.8e19 in float32) is skipped too, and counted like the others.

    ``optax.apply_if_finite`` does the same up to a number of skipped steps in a
    row, after which it lets the NaN through to the parameters and every buffer, and fails where
    gradients are of another dtype than parameters. This one never gives up; watch ``consecutive``,
    and lower the learning rate or stop if it grows.

    Without a guard one NaN in a gradient stays for ever: in the moments of its weight, with
    ``clip_by_global_norm`` in those of all weights.

    Args:
      inner: any optimizer; put everything that sees the gradient, clipping too, inside, and an
        ``optax.MultiSteps`` as ``.gradient_transformation()``. The other way round it comes too
        late: one NaN stays in the mean of ``MultiSteps``.
      axis_name: under ``shard_map`` or ``pmap`` with gradients that differ between devices, the
        axes over which all must agree to skip.

    State: ``SkipNonfiniteState(consecutive, total, inner_state)``, int32 scalars.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, skip_nonfinite
    >>> optimizer = skip_nonfinite(adam(0.1))
    >>> x = jnp.zeros(2)
    >>> update, state = optimizer.update(jnp.array([1.0, jnp.nan]), optimizer.init(x), x)
    >>> update.tolist(), int(state.total), int(state.inner_state[0].count)
    ([0.0, 0.0], 1, 0)
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SkipNonfiniteState:
        zero = jnp.zeros([], jnp.int32)
        return SkipNonfiniteState(zero, jnp.zeros_like(zero), inner.init(params))

    def agreed(finite: jax.Array) -> jax.Array:
        if axis_name is None:
            return finite
        return jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        old = state.inner_state

        made, after = inner.update(updates, old, params, **extra)
        still = like(after, old)
        good = agreed(_all_finite(updates) & _all_finite(after, still))
        new, inner_state = taken_where(good, made, after, still)
        return new, SkipNonfiniteState(*skips(good, state), inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def like(after: Tree, old: Tree) -> Tree:
    """A state in the dtypes of the one after it: some widen theirs in their first step."""
    return jax.tree.map(_astype, old, after)


def taken_where(good: jax.Array, made: Tree, after: Tree, still: Tree) -> tuple[Tree, Tree]:
    """The step where it is good; else an update of zero, and the state as it was."""
    new = jax.tree.map(lambda u: jnp.where(good, u, jnp.zeros_like(u)), made)
    return new, jax.tree.map(lambda x, y: jnp.where(good, x, y), after, still)


def skips(good: jax.Array, state: Any) -> tuple[jax.Array, jax.Array]:
    """The numbers of steps skipped in a row and in all, after this one."""
    consecutive = jnp.where(good, 0, optax.safe_increment(state.consecutive))
    return consecutive, jnp.where(good, state.total, optax.safe_increment(state.total))


def _all_finite(tree: Any, before: Any = None) -> jax.Array:
    """Whether all numbers are finite, but for those that were not before."""
    leaves = jax.tree.leaves(tree, is_leaf=_says_itself)
    others = [None] * len(leaves)
    if before is not None:
        others = jax.tree.leaves(before, is_leaf=_says_itself)
    finite = [
        jnp.all(_finite(x) if y is None else _finite(x) | ~_finite(y))
        for x, y in zip(leaves, others, strict=True)
        if _says_itself(x) or jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    return functools.reduce(jnp.logical_and, finite, jnp.array(True))


def _says_itself(x: Any) -> bool:
    """Whether a node knows which of its numbers are finite, as codes do that do not show it."""
    return callable(getattr(x, "are_finite", None))


def _finite(x: Any) -> jax.Array:
    return x.are_finite() if _says_itself(x) else jnp.isfinite(x)


def _astype(x: Any, to: Any) -> Any:
    return x if hasattr(x, "dtype") and x.dtype == to.dtype else jnp.asarray(x, to.dtype)
