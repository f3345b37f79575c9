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
    """Skips a step whose gradient has a NaN or an infinity anywhere, and counts it.

    The update is zero, and the inner state, its count included, is untouched: it is as if the batch
    had not been there. ``optax.apply_if_finite`` does the same up to a number of skipped steps in a
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

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        leaves = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates)]
        finite = jnp.all(jnp.stack(leaves)) if leaves else jnp.array(True)
        if axis_name is not None:
            finite = jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1

        def step() -> Any:
            return inner.update(updates, state.inner_state, params, **extra)

        def skip() -> Any:
            zeros = jax.tree.map(jnp.zeros_like, made)
            # Some transformations widen their state in their first step.
            return zeros, jax.tree.map(_astype, state.inner_state, after)

        made, after = jax.eval_shape(step)
        new, inner_state = branch(finite, step, skip)
        consecutive = jnp.where(finite, 0, optax.safe_increment(state.consecutive))
        total = jnp.where(finite, state.total, optax.safe_increment(state.total))
        return new, SkipNonfiniteState(consecutive, total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _astype(x: Any, to: Any) -> Any:
    return x if hasattr(x, "dtype") and x.dtype == to.dtype else jnp.asarray(x, to.dtype)
