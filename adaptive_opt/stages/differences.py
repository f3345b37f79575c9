"""Stages on the change of the gradient from one step to the next."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter, check_decay, check_nonnegative
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep


@stage
def variance_reduced_gradient(
    gamma: Hyperparameter,
    b1: Hyperparameter,
    *,
    name: str = "previous_gradient",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The gradient, corrected by its change: ``c_t = g_t + gamma b1 / (1 - b1) (g_t - g_{t-1})``.

    With ``g_0 = 0``. What follows sees ``c_t`` in the gradient's place: reads and replaces
    ``gradient`` and ``direction``. MARS (Yuan et al. 2024, arXiv:2411.10438), in the approximate form
    of the authors' code, whose ``g_{t-1}`` is that of the batch before.

    Args:
      gamma: how much of the correction is made, at least 0, or a schedule; 1 is STORM's.
      b1: the decay of the average that follows, in [0, 1), or a schedule of it.
      name: the name of its buffer ``previous_gradient``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, variance_reduced_gradient
    >>> rule = adaptive(variance_reduced_gradient(gamma=0.5, b1=0.5))
    >>> _, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([4.0]), state)[0])
    [5.]
    """
    check_nonnegative(gamma=gamma)
    check_decay(b1=b1)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        g, b = step.gradient, step.at(b1)
        change = g - step.recall(name, like=g, dtype=dtype)
        step.keep(name, g)
        correction = step.at(gamma) * b / (1 - b) * change
        return step.set(direction=step.direction + correction, gradient=g + correction)

    return line
