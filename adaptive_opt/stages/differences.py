"""Stages on the change of the gradient from one step to the next."""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter, check_decay, check_nonnegative
from adaptive_opt.core.finite import squarable
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
    ``gradient`` and ``direction``. MARS (Yuan et al. 2024, arXiv:2411.10438), in the approximate
    form of the authors' code, whose ``g_{t-1}`` is that of the batch before.

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
        g, b = squarable(step.gradient), step.at(b1)
        change = g - squarable(step.recall(name, like=g, dtype=dtype))
        step.keep(name, step.gradient)
        correction = step.at(gamma) * b / (1 - b) * change
        return step.set(direction=squarable(step.direction) + correction, gradient=g + correction)

    return line


@stage
def nesterov_gradient(
    ahead: Hyperparameter, *, name: str = "previous_gradient", dtype: DTypeLike | None = None
) -> OneArray:
    """The gradient some way ahead, by its last change: ``g_t + ahead (g_t - g_{t-1})``.

    At the first step it has not changed. Reads and replaces ``gradient``, for the second moment
    that follows; leaves ``direction`` as it is, and the change as a note for ``change_average``.
    Adan (Xie et al. 2022, arXiv:2208.06677, Algorithm 1).

    Args:
      ahead: how many steps, at least 0, or a schedule; Adan's b2.
      name: the name of its buffer ``previous_gradient``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, nesterov_gradient, per_weight_rate, second_moment
    >>> rule = adaptive(nesterov_gradient(0.5), second_moment(0.0), per_weight_rate(0.0))
    >>> _, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([-2.0]), state)[0].round(4))
    [-0.5]
    """
    check_nonnegative(ahead=ahead)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        g = squarable(step.gradient)
        before = squarable(step.recall(name, like=g, dtype=dtype))
        change = jnp.where(step.count == 1, 0.0, g - before)
        step.keep(name, step.gradient)
        return step.set(gradient=g + step.at(ahead) * change).note(change=change)

    return line


@stage
def change_average(
    b2: Hyperparameter,
    ahead: Hyperparameter | None = None,
    *,
    name: str = "change_ema",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """Adds the average change of the gradient: ``d_t + ahead c^_t``, ``c_t = b2 c_{t-1} + (1 - b2)
    change_t``.

    The average is corrected for its start at zero. Reads and replaces ``direction``, which must be
    corrected already; reads the change that ``nesterov_gradient`` has noted. Adan (Xie et al. 2022,
    arXiv:2208.06677, Algorithm 1), with the correction of the authors' code.

    Args:
      b2: decay in [0, 1), or a schedule of it.
      ahead: how many steps, at least 0, or a schedule; default: b2.
      name: the name of its buffer ``change_ema``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, change_average, nesterov_gradient
    >>> rule = adaptive(nesterov_gradient(0.5), change_average(0.5))
    >>> _, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([5.0]), state)[0].round(4))
    [6.]
    """
    check_decay(b2=b2)
    ahead = b2 if ahead is None else ahead
    check_nonnegative(ahead=ahead)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        now = step.noted("change")
        change = step.average(name, now, b2, dtype=dtype)
        weight = step.at(ahead) / step.correction_of(b2)
        return step.set(direction=step.direction + weight * change)

    return line
