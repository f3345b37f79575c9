"""A guard against gradients, and losses, that are much larger than they were."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.checks import check_constant, check_positive, check_whole
from adaptive_opt.core.describe import described_around
from adaptive_opt.core.finite import summable
from adaptive_opt.core.trees import Tree, axes_of, axes_split, widest
from adaptive_opt.stages.tensors import AxisName, global_norm
from adaptive_opt.wrappers.guard import like, skips, taken_where

LARGEST = 2**31 - 1
"""The largest count."""


class SkipSpikesState(NamedTuple):
    """How many steps were skipped, what is remembered of the steps before, and the inner state."""

    consecutive: jax.Array
    total: jax.Array
    seen: jax.Array
    history: jax.Array
    threshold: jax.Array
    inner_state: Any


@described_around
def skip_spikes(
    inner: optax.GradientTransformation,
    window: int = 128,
    sigma_factor: float = 6.0,
    warmup: int | None = None,
    *,
    loss: bool = False,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Skips a step whose gradient is much longer than those before it, and counts it.

    The step is taken if ``|g_t| - mean <= sigma_factor std``, with the mean and the standard
    deviation (that of a sample) of the last ``window`` norms before it, norms of skipped steps
    among them: where gradients stay long, the threshold follows them. The norm is that of all
    gradients together, before ``inner`` clips them. In a skipped step the update is zero, and the
    inner state, its count included, is untouched. Use it where rare batches, and not a learning
    rate that is too high, make a loss jump. Like ``optax.clip_by_global_norm`` it needs all
    gradients at once: ``memory_plan`` shows what that costs.

    A norm that is not finite is skipped from the first step on, and not remembered; around the
    inner state's own infinities goes ``skip_nonfinite(skip_spikes(...))``.

    Args:
      inner: any optimizer; put clipping inside. Inside of ``optax.MultiSteps`` it judges the mean
        of the gradients, around it every one of them.
      window: how many steps are remembered, at least 2.
      sigma_factor: greater than 0.
      warmup: the first step that is judged, at least 3; default: ``max(20, window // 2)``.
      loss: whether the loss, which ``update`` is then given as ``value=``, is judged in the same
        way; one of both is enough to skip. ``train_step`` gives it.
      axis_name: under ``shard_map`` or ``pmap``, the axes over which gradients are split, () if
        every device has them whole; losses are averaged over them.

    State: ``SkipSpikesState(consecutive, total, seen, history, threshold, inner_state)``: int32
    scalars of steps skipped in a row, in all, and remembered so far; the last norms (and losses),
    (window, 1 or 2); what they were compared with in the last step, 0 in the warm-up.

    ValueError if the loss is to be judged and is not given. The rule is that of
    ``SkipStepOptimizer`` in OLMo-core, exact in float64, but for numbers that are not finite, which
    it remembers, and for windows below 19, of which it would judge no step.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import sgd, skip_spikes
    >>> optimizer = skip_spikes(sgd(1.0), window=4, warmup=4)
    >>> state, x = optimizer.init(jnp.zeros(())), jnp.zeros(())
    >>> for gradient in (1.0, 2.0, 1.0, 9.0, 3.0):
    ...     update, state = optimizer.update(jnp.array(gradient), state, x)
    ...     print(update, int(state.total))
    -1.0 0
    -2.0 0
    -1.0 0
    0.0 1
    -3.0 1
    """
    check_whole(2, window=window)
    check_constant(sigma_factor=sigma_factor)
    check_positive(sigma_factor=sigma_factor)
    first = max(20, window // 2) if warmup is None else warmup
    check_whole(3, warmup=first)
    window = int(window)
    if not isinstance(loss, (bool, np.bool_)):
        raise TypeError(f"loss must be true or false, got {loss!r}: the loss is given to update.")
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> SkipSpikesState:
        width = widest(params)
        a, b, c = (jnp.zeros([], jnp.int32) for _ in range(3))  # no two fields share a buffer
        watched = 2 if loss else 1
        history, threshold = jnp.zeros((window, watched), width), jnp.zeros(watched, width)
        return SkipSpikesState(a, b, c, history, threshold, inner.init(params))

    def judged(updates: Tree, extra: dict[str, Any], width: np.dtype) -> jax.Array:
        norm = global_norm(updates, axis_name).astype(width)
        if not loss:
            return norm[None]
        if extra.get("value") is None:
            raise ValueError(
                "skip_spikes(..., loss=True) judges the loss: give it to update, update(gradient,"
                " state, params, value=loss). train_step does."
            )
        value = jnp.asarray(extra["value"]).astype(width)
        if value.ndim:
            raise ValueError(f"value, the loss, must be a scalar, got shape {value.shape}.")
        split = axes_split(value, axes_of(axis_name))
        return jnp.stack([norm, jax.lax.pmean(value, split) if split else value])

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        history, seen = state.history, state.seen
        now = judged(updates, extra, history.dtype)
        mean, deviation = _statistics(history, jnp.minimum(seen, window))
        most = jnp.asarray(sigma_factor, history.dtype) * deviation
        is_judged, finite = seen + 1 >= first, jnp.all(jnp.isfinite(now))
        good = finite & (~is_judged | jnp.all(now - mean <= most))
        threshold = jnp.where(is_judged, mean + most, 0.0)
        remembered = history.at[seen % window].set(now)
        # At the largest count one window back, so that the places go round as before.
        after_it = jnp.where(seen == LARGEST, LARGEST + 1 - window, seen + 1)
        made, after = inner.update(updates, state.inner_state, params, **extra)
        new, inner_state = taken_where(good, made, after, like(after, state.inner_state))
        return new, SkipSpikesState(
            *skips(good, state),
            jnp.where(finite, after_it, seen),
            jnp.where(finite, remembered, history),
            threshold,
            inner_state,
        )

    return optax.GradientTransformationExtraArgs(init, update)


def _statistics(history: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean and the standard deviation of a sample, over the first rows."""
    is_there = (jnp.arange(len(history)) < count)[:, None]
    size = jnp.maximum(count, 2).astype(history.dtype)
    mean = jnp.sum(jnp.where(is_there, history, 0.0), axis=0) / size
    squares = jnp.sum(jnp.where(is_there, (history - mean[None]) ** 2, 0.0), axis=0)
    return mean, jnp.sqrt(summable(squares) / (size - 1))
