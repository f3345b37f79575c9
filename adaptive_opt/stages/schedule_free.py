"""Schedule-Free: a step whose iterates are averaged, in place of a schedule of the learning rate.

``z`` is what steps, ``x`` its weighted average, which is evaluated, and ``y`` between the two is
where gradients are taken: the parameters that are trained are ``y``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_decay,
    check_nonnegative,
    check_positive,
    is_zero,
    value_at,
)
from adaptive_opt.core.stage import WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import Tree, is_array, is_none, leaves_like, map_leaves

_BUFFERS = {"z", "b1", "averaged_steps", "largest_rate"}
"""What a state that averages so is known by."""


@stage
def schedule_free(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    *,
    weight_power: Hyperparameter = 2.0,
    step_power: Hyperparameter = 0.0,
) -> WholeTree:
    """The step of Schedule-Free, with the learning rate in it: from ``y_t`` to ``y_{t+1}``.

    ``z_{t+1} = z_t - lr_t u_t``, ``x_{t+1} = (1 - c_t) x_t + c_t z_{t+1}``, ``y_{t+1} = b1 x_{t+1}
    + (1 - b1) z_{t+1}``, where u is the update as it stands and ``c_t = w_t / (w_1 + ... + w_t)``
    with ``w_t = t^q (the largest lr so far)^p``. Reads ``direction``, ``rate`` and ``param``,
    replaces ``direction`` by ``y_t - y_{t+1}``, which ends the list: what follows is
    ``optax.scale(-1.0)`` and no learning rate. Weight decay belongs in front. Schedule-Free
    (Defazio et al. 2024, arXiv:2405.15682), as in facebookresearch/schedule_free.

    x is not kept but calculated, by :func:`evaluation_params`.

    Args:
      learning_rate: at least 0, in the units of the parameters per unit of the update; a number or
        a schedule. A warm-up is all the schedule there need be.
      b1: between 0 and 1, how near y is to the average; a number or a schedule.
      weight_power: p, at least 0: steps of a larger learning rate weigh more.
      step_power: q, at least 0: later steps weigh more.

    State: ``z`` like the parameters, and a number ``b1`` for each of them; of the tree,
      ``averaged_steps``, the sum of the weights so far in units of the last one, and
      ``largest_rate``. Of 16-bit parameters z is float32, but y, and with it x, is rounded at every
      step, as with any optimizer: keep a master copy in float32.

    ValueError if params are not given to ``update``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adaptive, evaluation_params, schedule_free
    >>> optimizer = optax.chain(adaptive(schedule_free(1.0, 0.5)), optax.scale(-1.0))
    >>> y = jnp.array([4.0])
    >>> state = optimizer.init(y)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(jnp.array([1.0]), state, y)
    ...     y = optax.apply_updates(y, updates)
    >>> print(y, evaluation_params(state, y))  # z is 3, then 2
    [2.25] [2.5]
    """
    check_nonnegative(learning_rate=learning_rate, weight_power=weight_power, step_power=step_power)
    check_decay(b1=b1)
    check_positive(b1=b1)

    def line(steps: OpenStep) -> OpenStep:
        weight = _weight(steps, steps.at(learning_rate), weight_power, step_power)
        return steps.each(lambda step: _move(step, learning_rate, step.at(weight), step.at(b1)))

    return WholeTree(line)


def _weight(steps: OpenStep, rate: Any, weight_power: Any, step_power: Any) -> jax.Array:
    """``c_t``: of the newest iterate in the average.

    The sum of weights is kept in units of the last one: of equal weights it is a whole number,
    exact in float32 where a sum of squared learning rates would stop growing.
    """
    scalar = jnp.zeros((), steps.width)
    before = steps.recall("largest_rate", like=scalar)
    largest = steps.keep("largest_rate", jnp.maximum(before, rate))
    p, t = steps.at(weight_power), jnp.asarray(steps.count, steps.width)
    counts = (largest > 0) | (jnp.asarray(p) == 0)  # 0^0 is 1
    lasting = jnp.where(largest > 0, before / jnp.where(largest > 0, largest, 1), 1) ** p
    lasting = lasting * ((t - 1) / t) ** steps.at(step_power)
    total = 1 + steps.recall("averaged_steps", like=scalar) * lasting
    steps.keep("averaged_steps", jnp.where(counts, total, 0))
    return jnp.where(counts, 1 / total, 0)


def _move(step: AdaptiveStep, learning_rate: Hyperparameter, c: Any, b1: Any) -> AdaptiveStep:
    """One array from y to the next y; ``q = z - x`` is ``(z - y) / b1`` with the b1 of before."""
    y = step.param
    z = step.recall("z", like=y, initial=y)
    b = step.recall("b1", like=jnp.ones((), step.width), initial=1.0)  # where y is z, of no effect
    moved, q = -step.at(learning_rate) * step.update, (z - y) / b
    step.keep("z", z + moved)
    step.keep("b1", jnp.array(b1, b.dtype, copy=True))  # each leaf its own
    # Of y itself, as in the authors' code, and not the difference of two y, which are far larger.
    change = (1 - b1 * (1 - c)) * moved + (b - b1 + b1 * c) * q
    return step.set(direction=-change).without("rate", "second_moment")


def is_averaged(state: Any) -> bool:
    """Whether these are the buffers of ``schedule_free``, in a bracket or on its own."""
    return isinstance(state, Mapping) and state.keys() >= _BUFFERS


def averaged_params(buffers: Mapping[str, Tree], params: Tree) -> Tree:
    """x of every parameter: ``y - (1/b1 - 1)(z - y)``; None where nothing is kept of it."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    kept = leaves_like(structure, buffers["z"])
    there = structure.unflatten(
        y if is_array(z) else None for y, z in zip(leaves, kept, strict=True)
    )
    return map_leaves(
        lambda y, z, b1: y - (1 / b1 - 1) * (z - y), there, there, buffers["z"], buffers["b1"]
    )


def warmed_up(learning_rate: Hyperparameter, steps: int) -> Hyperparameter:
    """The learning rate times ``t / steps`` in the first steps; the authors' ``warmup_steps``."""
    if is_zero(steps):
        return learning_rate

    def schedule(step: Any) -> Any:
        rising = jnp.minimum(1.0, (step + 1) / jnp.maximum(jnp.asarray(steps, float), 1.0))
        return value_at(learning_rate, step + 1) * rising

    return schedule
