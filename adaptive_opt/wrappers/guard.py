"""A guard against gradients that are not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.describe import described_around
from adaptive_opt.core.trees import Tree, branch


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
    had not been there. Two things are looked at: the gradient before the step; after it the update
    and the new state, where the old state was finite. So a square that overflows in a buffer of
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

        def step() -> Any:
            return inner.update(updates, old, params, **extra)

        def skip() -> Any:
            return jax.tree.map(jnp.zeros_like, made), still

        made, after = jax.eval_shape(step)
        still = jax.tree.map(_astype, old, after)  # some widen their state in their first step
        good = agreed(_all_finite(updates))
        new = branch(good, step, skip)
        good &= agreed(_all_finite(new, skip()))
        new, inner_state = jax.tree.map(lambda x, y: jnp.where(good, x, y), new, skip())
        consecutive = jnp.where(good, 0, optax.safe_increment(state.consecutive))
        total = jnp.where(good, state.total, optax.safe_increment(state.total))
        return new, SkipNonfiniteState(consecutive, total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_finite(tree: Any, before: Any = None) -> jax.Array:
    """Whether all numbers are finite, but for those that were not before."""
    leaves = jax.tree.leaves(tree)
    others = [None] * len(leaves) if before is None else jax.tree.leaves(before)
    finite = [
        jnp.all(jnp.isfinite(x) if y is None else jnp.isfinite(x) | ~jnp.isfinite(y))
        for x, y in zip(leaves, others, strict=True)
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
    ]
    return jnp.all(jnp.stack(finite)) if finite else jnp.array(True)


def _astype(x: Any, to: Any) -> Any:
    return x if hasattr(x, "dtype") and x.dtype == to.dtype else jnp.asarray(x, to.dtype)
