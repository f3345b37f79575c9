"""Lookahead as a drop-in: plain parameters in, plain parameters out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_fraction,
    check_optimizer,
    check_whole,
    value_at,
)
from adaptive_opt.core.describe import described_around
from adaptive_opt.core.finite import narrowed
from adaptive_opt.core.trees import (
    Tree,
    buffer_dtype,
    dtype_of,
    keep_dtype,
    map_leaves,
    map_none,
    update_dtypes,
    wide,
)


class LookaheadState(NamedTuple):
    """The number of steps, the slow weights, and the state of the inner optimizer."""

    count: jax.Array
    slow: Tree
    inner_state: Any

    def evaluation(self, params: Tree) -> Tree:
        del params
        return self.slow


@described_around
def lookahead(
    inner: optax.GradientTransformation,
    sync_period: int = 6,
    slow_step_size: Hyperparameter = 0.5,
    *,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Every so many steps of the inner optimizer, go back to a point between: k steps forward, 1
    back.

    Slow weights ``s`` start where the parameters do. After the steps k, 2k, ... of the inner
    optimizer ``s = s + a (x - s)``, and the parameters go to ``s``; in between the inner update
    passes through unchanged. The inner state is kept. Zhang, Lucas, Hinton & Ba 2019,
    arXiv:1907.08610; as in lessw2020's Ranger and fastai. (``optax.lookahead`` is the same with the
    slow weights among the parameters; torch_optimizer's takes them after the first step and syncs
    at steps 1, k + 1, ...)

    Unlike optax's it takes and returns ordinary parameters, so that it works inside ``optax.chain``
    (as the last part: it must see the whole update), ``partition`` and ``inject_hyperparams``.
    Evaluate with ``evaluation_params(state, params)``, which are ``state.slow``, or right after a
    synchronisation.

    Args:
      inner: any optimizer; extra arguments of ``update`` are passed on to it.
      sync_period: k, a whole number of at least 1: 6 in Ranger and fastai, 5 in other libraries.
      slow_step_size: a, in [0, 1]; 0.5 everywhere.
      state_dtype: the dtype of the slow weights; default: the parameter's, float32 for 16-bit
        parameters.

    State: ``LookaheadState(count, slow, inner_state)``; initialised with shapes
      (``jax.ShapeDtypeStruct``), ``slow`` is shapes too. ValueError if ``update`` gets no
      parameters.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import lookahead, sgd
    >>> optimizer = lookahead(sgd(1.0), sync_period=2)
    >>> x = jnp.array([0.0])
    >>> state = optimizer.init(x)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(jnp.array([-1.0]), state, x)
    ...     x = optax.apply_updates(x, updates)
    >>> print(x, state.slow)
    [1.] [1.]
    """
    check_optimizer("lookahead", inner)
    check_whole(1, sync_period=sync_period)
    check_fraction(slow_step_size=slow_step_size)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> LookaheadState:
        def dtype(own: Any) -> Any:
            return wide(own) if state_dtype is None else buffer_dtype(state_dtype, wide(own))

        def copy(p: Any) -> Any:
            if isinstance(p, jax.ShapeDtypeStruct):
                return p.update(dtype=dtype(p.dtype))
            return jnp.array(p, dtype(dtype_of(p)), copy=True)

        slow = jax.tree.map(copy, params)
        return LookaheadState(jnp.zeros([], jnp.int32), slow, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError(
                "lookahead needs the parameters: call update(gradients, state, params)."
            )
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        dtypes = update_dtypes(updates, params)
        count = jnp.asarray(optax.safe_increment(state.count))
        syncs = count % sync_period == 0
        a = value_at(slow_step_size, count, "slow_step_size")
        synced = map_leaves(
            lambda u, x, s, *, a: s + a * (x + u - s), updates, updates, params, state.slow, a=a
        )
        slow = map_leaves(lambda new, s: jnp.where(syncs, new, s), updates, synced, state.slow)
        updates = map_leaves(
            lambda u, x, new: jnp.where(syncs, new - x, u), updates, updates, params, synced
        )
        updates = map_none(narrowed, updates, dtypes)
        slow = keep_dtype(state.slow, slow, "the slow weights")
        return updates, LookaheadState(count, slow, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)
