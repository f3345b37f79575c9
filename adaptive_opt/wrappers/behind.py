"""Stages behind any optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import lines_among
from adaptive_opt.core.checks import check_optimizer
from adaptive_opt.core.describe import transformation
from adaptive_opt.core.look import init_buffers, look_at_some_leaf
from adaptive_opt.core.now import Now
from adaptive_opt.core.stage import Stage
from adaptive_opt.core.tree import OpenStep, run
from adaptive_opt.core.trees import Tree, leaves_like


class BehindState(NamedTuple):
    """The number of gradients seen, the buffers of the stages, the inner optimizer's state."""

    count: jax.Array
    buffers: dict[str, Tree]
    inner_state: Any


def behind(
    inner: optax.GradientTransformation,
    *stages: Stage,
    downhill: bool = True,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Any optimizer, of this library, of optax or your own, and stages that act on its update.

    The stages see an open step: ``gradient`` is what came in, ``direction`` the inner update,
    turned uphill, ``param`` the parameter; second moment and rate they must make themselves. What
    leaves is the closed step, turned downhill again. A stage does here what it does in a bracket:
    ``cautious``, ``trust_ratio``, ``clip_update_rms``, ``hyperball`` are made for both.

    Args:
      inner: any optimizer; extra arguments of ``update`` are passed on to it, and to the stages.
      *stages: in order.
      downhill: whether the inner update points downhill, as that of a whole optimizer does; False
        for an inner part that learning rate and sign still follow (``optax.scale_by_adam()``).
      state_dtype: as in ``adaptive``.

    State: ``BehindState(count, buffers, inner_state)``. TypeError for what is no stage, ValueError
      for stages in an impossible order.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import behind, trust_ratio
    >>> like_lars = optax.chain(
    ...     behind(optax.trace(0.9), trust_ratio(), downhill=False),
    ...     optax.scale_by_learning_rate(0.1),
    ... )
    >>> x = jnp.array([3.0, 4.0])
    >>> print(x + like_lars.update(jnp.array([2.0, 0.0]), like_lars.init(x), x)[0])
    [2.5 4. ]
    """
    check_optimizer("behind", inner)
    lines = lines_among(stages, "behind(optimizer, ...)")
    look_at_some_leaf(lines)  # which refuses a wrong order
    wrapped, sign = optax.with_extra_args_support(inner), -1 if downhill else 1

    def init(params: Tree) -> BehindState:
        buffers = init_buffers(lines, params, state_dtype)
        return BehindState(jnp.zeros([], jnp.int32), buffers, wrapped.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        made, inner_state = wrapped.update(updates, state.inner_state, params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))
        step = OpenStep(Now(count, extra), updates, params)
        for each, u in zip(step.steps, leaves_like(step.structure, made), strict=True):
            if each is not None:
                each.start_from(sign * jnp.asarray(u))
        buffers = run(lines, step, state.buffers, state_dtype)
        closed = jax.tree.map(lambda u: sign * u, step.close())
        return closed, BehindState(count, buffers, inner_state)

    settings = {"downhill": downhill, "state_dtype": state_dtype}
    plain = optax.GradientTransformationExtraArgs(init, update)
    return transformation("behind", settings, plain, parts=(inner, *stages))
