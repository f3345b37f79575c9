"""Stages that look at a tensor as a whole: its norm, its root mean square.

Under ``shard_map`` and ``pmap``, where a device has only its part of a tensor, they need
``axis_name=``, as ``second_moment(scope="tensor")`` does, which see.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import Hyperparameter, check_positive
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.stages.moments import absolute_square, over

AxisName = str | tuple[str, ...] | None


def norm(step: AdaptiveStep, x: jax.Array, axis_name: AxisName) -> jax.Array:
    return jnp.sqrt(over(step, [absolute_square(x)], "sum", axis_name))


@stage
def clip_gradient_norm(limit: Hyperparameter = 1.0, *, axis_name: AxisName = None) -> OneArray:
    """No tensor's gradient longer than a limit: ``g_t limit / max(|g_t|, limit)``.

    The norm is that of the tensor. Reads ``gradient`` and ``direction``, and scales both. Remembers
    nothing. For all tensors together, and outside of a bracket, ``optax.clip_by_global_norm``.
    MARS (Yuan et al. 2024, arXiv:2411.10438).

    Args:
      limit: greater than 0, in the units of a gradient, or a schedule.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, clip_gradient_norm
    >>> rule = adaptive(clip_gradient_norm(5.0))
    >>> print(rule.update(jnp.array([6.0, 8.0]), rule.init(jnp.zeros(2)))[0].round(4))
    [3. 4.]
    """
    check_positive(limit=limit)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        most, g = step.at(limit), step.gradient
        factor = most / jnp.maximum(norm(step, g, axis_name), most)
        return step.set(direction=step.direction * factor).limit(gradient=g * factor)

    return line
