"""Schedule-Free: a step whose iterates are averaged, in place of a schedule of the learning rate.

``z`` is what steps, ``x`` its weighted average, which is evaluated, and ``y`` between the two is
where gradients are taken: the parameters that are trained are ``y``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_decay,
    check_nonnegative,
    check_positive,
    check_whole,
    is_zero,
    value_at,
)
from adaptive_opt.core.stage import WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import Tree, is_array, is_none, leaves_like, map_leaves
from adaptive_opt.stages.inner_decay import decayed
from adaptive_opt.stages.moments import over
from adaptive_opt.stages.weight_decay import Mask

_BUFFERS = {"z", "b1", "averaged_steps", "largest_rate"}
"""What a state that averages so is known by."""


@stage
def schedule_free(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    *,
    weight_power: Hyperparameter = 2.0,
    step_power: Hyperparameter = 0.0,
    averaging_start: int = 0,
    polyak: bool = False,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> WholeTree:
    """The step of Schedule-Free, with the learning rate in it: from ``y_t`` to ``y_{t+1}``.

    ``z_{t+1} = z_t - lr_t u_t``, ``x_{t+1} = (1 - c_t) x_t + c_t z_{t+1}``, ``y_{t+1} = b1 x_{t+1}
    + (1 - b1) z_{t+1}``, where u is the update as it stands and ``c_t = w_t / (w_1 + ... + w_t)``
    with ``w_t = t^q (the largest lr so far)^p``. Reads ``direction``, ``rate`` and ``param``,
    replaces ``direction`` by ``y_t - y_{t+1}``, which ends the list: what follows is
    ``optax.scale(-1.0)`` and no learning rate. Decoupled decay belongs in front. Schedule-Free
    (Defazio et al. 2024, arXiv:2405.15682), as in facebookresearch/schedule_free.

    x is not kept but calculated, by :func:`evaluation_params`.

    Args:
      learning_rate: at least 0, in the units of the parameters per unit of the update; a number or
        a schedule. A warm-up is all the schedule there need be.
      b1: between 0 and 1, how near y is to the average; a number or a schedule.
      weight_power: p, at least 0: steps of a larger learning rate weigh more.
      step_power: q, at least 0: later steps weigh more.
      averaging_start: for so many steps x is z, and no weight is counted.
      polyak: the learning rate is multiplied by Polyak's rate ``max(0, f + b1 g (z - x)) / (sqrt(pi
        / 2) |g|_1)`` over the whole tree, with the loss ``f = value`` at y. The least loss is taken
        for 0. Schedule-Free+ (Defazio 2026, arXiv:2605.19095).
      weight_decay, mask: a decay of y that is multiplied by this learning rate twice: ``z - lr_t (u
        + lr_t wd y)``.
      axis_name: for Polyak's rate; see ``second_moment``.

    State: ``z`` like the parameters, and a number ``b1`` for each of them; of the tree,
      ``averaged_steps``, the sum of the weights so far in units of the last one, and
      ``largest_rate``. Of 16-bit parameters z is float32, but y, and with it x, is rounded at every
      step, as with any optimizer: keep a master copy in float32. A ``state_dtype`` of 16 bits, or
      ``low_memory``, rounds z alike.

    ValueError if params, or under ``polyak`` one number ``value``, are not given to ``update``.

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
    check_nonnegative(learning_rate=learning_rate, weight_power=weight_power)
    check_nonnegative(step_power=step_power, weight_decay=weight_decay)
    check_whole(0, averaging_start=averaging_start)
    check_decay(b1=b1)
    check_positive(b1=b1)

    def line(steps: OpenStep) -> OpenStep:
        rate = steps.at(learning_rate)
        if polyak:
            rate = rate * _polyak(steps, b1, axis_name)
        c = _weight(steps, rate, weight_power, step_power, averaging_start)
        at_rate = 0.0 if is_zero(weight_decay) else steps.at(weight_decay) * rate
        decayed(steps, at_rate if is_zero(at_rate) else lambda step: step.at(at_rate), mask)
        return steps.each(lambda step: _move(step, step.at(rate), step.at(c), step.at(b1)))

    return WholeTree(line)


def _polyak(
    steps: OpenStep, b1: Hyperparameter, axis_name: str | tuple[str, ...] | None
) -> jax.Array:
    """How far it is to a loss of 0 along the gradient; 0 without a gradient."""
    value = jnp.asarray(steps.extra("value"), steps.width)
    if value.shape:
        raise ValueError(
            f"schedule_free needs value= to be one number, the loss, got the shape {value.shape}."
            " Give its mean."
        )

    def ahead(step: AdaptiveStep) -> jax.Array:
        z, b = _recall(step)
        return jnp.real(jnp.conj(step.gradient) * (z - step.param)) * (step.at(b1) / b)

    inner = over(steps, steps.leaves(ahead), "sum", axis_name)
    length = over(steps, steps.leaves(lambda step: jnp.abs(step.gradient)), "sum", axis_name)
    gap = jnp.maximum(value + inner, 0)
    return jnp.where(length > 0, gap / (jnp.where(length > 0, length, 1) * _GAUSSIAN), 0)


_GAUSSIAN = math.sqrt(math.pi / 2)
"""The standard deviation of normal numbers is so many times their mean size."""


def _weight(
    steps: OpenStep, rate: Any, weight_power: Any, step_power: Any, averaging_start: Any
) -> jax.Array:
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
    started = steps.count > averaging_start
    steps.keep("averaged_steps", jnp.where(counts & started, total, 0))
    return jnp.where(started, jnp.where(counts, 1 / total, 0), 1)


def _recall(step: AdaptiveStep) -> tuple[jax.Array, jax.Array]:
    """z, and the b1 with which y was made of it; at first, where y is z, of no effect."""
    z = step.recall("z", like=step.param, initial=step.param)
    return z, step.recall("b1", like=jnp.ones((), step.width), initial=1.0)


def _move(step: AdaptiveStep, rate: Any, c: Any, b1: Any) -> AdaptiveStep:
    """One array from y to the next y; ``q = z - x`` is ``(z - y) / b1`` with the b1 of before."""
    z, b = _recall(step)
    moved, q = -rate * step.direction, (z - step.param) / b
    step.keep("z", z + moved)
    step.keep("b1", jnp.array(b1, b.dtype, copy=True))  # each leaf its own
    # Of y itself, as in the authors' code, and not the difference of two y, which are far larger.
    change = (1 - b1 * (1 - c)) * moved + (b - b1 + b1 * c) * q
    return step.set(direction=-change)


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
        return value_at(learning_rate, step + 1, "learning_rate") * rising

    return schedule
