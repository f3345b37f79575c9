"""Stages that average otherwise than Adam's: the surprise, slower, additively, a step behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_decay,
    check_nonnegative,
    check_positive,
)
from adaptive_opt.core.finite import squarable
from adaptive_opt.core.stage import OneArray, WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.stages.moments import absolute_square


@stage
def belief_moment(
    b2: Hyperparameter,
    eps: Hyperparameter = 0.0,
    *,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The average of the squared surprise: ``s_t = b2 s_{t-1} + (1 - b2) |g_t - m_t|^2 + eps``.

    Reads ``gradient`` and ``direction`` (m_t, the average as ``first_moment`` makes it), sets
    ``second_moment``. AdaBelief (Zhuang et al. 2020, arXiv:2010.07468, Algorithm 2), with eps where
    the authors' code has it: it is kept, and so adds up to ``eps / (1 - b2)``.

    Args:
      b2: decay in [0, 1), or a schedule of it.
      eps: added in every step, in the units of a squared gradient; at least 0.
      name: the name of its buffer ``nu``: real, one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, belief_moment, first_moment, per_weight_rate
    >>> rule = adaptive(first_moment(0.5), belief_moment(0.75), per_weight_rate(eps=0.0))
    >>> print(rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [2.]
    """
    check_decay(b2=b2)
    check_nonnegative(eps=eps)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        surprise = absolute_square(step.gradient - step.raw("direction"))
        kept = step.at(eps) / (1 - step.at(b2))
        return step.set(second_moment=step.average(name, surprise + kept, b2, dtype=dtype))

    return line


@stage
def yogi_moment(
    b2: Hyperparameter,
    *,
    initial: float = 1e-6,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """A second moment that moves by the size of the gradient: ``v_t = v_{t-1} - (1 - b2)
    sign(v_{t-1} - |g_t|^2) |g_t|^2``.

    Where Adam's average forgets a large gradient at once when small ones follow, this one falls
    slowly; it rises like Adam's. A gradient counts as at most the root of half the largest number
    (1.3e19 in float32), and lowers the rate of its weight for good. Reads ``gradient``, sets
    ``second_moment``, which ``debias`` corrects with ``b2`` as in every public code, though it
    starts above zero. Yogi (Zaheer et al. 2018, NeurIPS, Algorithm 2).

    Args:
      b2: in [0, 1), or a schedule of it.
      initial: ``v_0``, in the units of a squared gradient; greater than 0.
      name: the name of its buffer ``nu``: real, one array per parameter.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, yogi_moment
    >>> rule = adaptive(yogi_moment(0.75, initial=16.0), per_weight_rate(eps=0.0))
    >>> _, state = rule.update(jnp.array([2.0, 8.0]), rule.init(jnp.zeros(2)))
    >>> state.buffers["nu"].tolist()
    [15.0, 32.0]
    """
    check_decay(b2=b2)
    check_positive(initial=initial)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        def move(v: jax.Array, square: jax.Array) -> jax.Array:
            return v - (1 - step.at(b2)) * jnp.sign(v - square) * square

        square = absolute_square(squarable(step.gradient))
        nu = step.remember(name, move, square, initial=initial, dtype=dtype)
        return step.set(second_moment=step.owing(nu, b2))

    return line


@stage
def weighted_moment(
    b1: Hyperparameter,
    weight: Hyperparameter,
    *,
    name: str = "mu",
    dtype: DTypeLike | None = None,
) -> WholeTree:
    """The moving average of the direction in which every step counts by its weight: ``m_t / w_t``.

    ``m_t = b1 m_{t-1} + (1 - b1) weight_t d_t`` and ``w_t = b1 w_{t-1} + (1 - b1) weight_t``, so
    that it is right from the first step on; of a constant weight, ``first_moment`` and ``debias``.
    Reads and replaces ``direction``. While all weights were 0 it is 0. LaProp's average of the
    steps it has taken, each with its learning rate (Ziyin et al. 2020, arXiv:2002.04839).

    Args:
      b1: decay in [0, 1), or a schedule of it.
      weight: at least 0, usually the learning rate; only ratios of it count.
      name: the name of its buffers: ``mu``, one array per parameter, and ``mu_weight``, a real
        scalar; zeros at first.
      dtype: the dtype of ``mu``; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, weighted_moment
    >>> rule = adaptive(weighted_moment(0.5, weight=lambda step: 1.0 + step))
    >>> _, state = rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([9.0]), state)[0].round(4))
    [8.]
    """
    check_decay(b1=b1)
    check_nonnegative(weight=weight)

    def line(steps: OpenStep) -> OpenStep:
        total = steps.average(f"{name}_weight", jnp.asarray(steps.at(weight), steps.width), b1)
        inverse = jnp.where(total == 0, 0.0, 1 / jnp.where(total == 0, 1.0, total))

        def average(step: AdaptiveStep) -> AdaptiveStep:
            d = step.at(weight) * step.direction
            weighed = step.average(name, d, b1, dtype=dtype)
            return step.set(direction=step.at(inverse) * weighed)

        return steps.each(average)

    return WholeTree(line)


@stage
def previous_second_moment(
    b2: Hyperparameter, *, name: str = "nu", dtype: DTypeLike | None = None
) -> OneArray:
    """The second moment of the step before: ``v_{t-1}``, while ``v_t = b2 v_{t-1} + (1 - b2)
    |g_t|^2`` is kept for the next.

    The gradient is divided by what does not depend on it, which is why ADOPT converges at any b2.
    The first gradient only fills ``v_1 = |g_1|^2``: its direction is 0. Reads ``gradient`` and
    ``direction``, sets ``second_moment``, in which there is nothing to debias, and ``direction``;
    leaves as a note whether the step moves, for ``add_weight_decay``.
    ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, Algorithm 2).

    Args:
      b2: decay in [0, 1), or a schedule of it.
      name: the name of its buffer ``nu``: real, one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, previous_second_moment
    >>> rule = adaptive(previous_second_moment(0.5), per_weight_rate(eps=0.0))
    >>> first, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> print(first, rule.update(jnp.array([8.0]), state)[0].round(4))
    [0.] [4.]
    """
    check_decay(b2=b2)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        square, d = absolute_square(squarable(step.gradient)), squarable(step.direction)
        before = step.recall(name, like=square, dtype=dtype)
        now = step.average(name, square, b2, initial=lambda first: first, dtype=dtype)
        moves = jnp.where(step.count == 1, 0.0, 1.0)
        step = step.set(second_moment=now, direction=jnp.where(step.count == 1, 0.0, d))
        return step.set(second_moment=before).note(moves=moves)

    return line


@stage
def slow_average(
    b3: Hyperparameter,
    alpha: Hyperparameter,
    *,
    name: str = "mu_slow",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """Adds a slow average of the gradient: ``d_t + alpha_t s_t``, ``s_t = b3 s_{t-1} + (1 - b3)
    g_t``.

    Reads ``gradient`` and ``direction``, replaces ``direction``. The slow average starts at zero
    and is not corrected for it, so that it comes in gradually. AdEMAMix (Pagliardini, Ablin &
    Grangier 2024, arXiv:2409.03137, Algorithm 1).

    Args:
      b3: decay of the slow average, in [0, 1), or a schedule of it; 0.9999 remembers some ten
        thousand steps.
      alpha: its weight beside the direction, at least 0, or a schedule of it.
      name: the name of its buffer ``mu_slow``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, slow_average
    >>> rule = adaptive(slow_average(0.75, alpha=2.0))
    >>> print(rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))[0])
    [6.]
    """
    check_decay(b3=b3)
    check_nonnegative(alpha=alpha)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        slow = step.average(name, step.gradient, b3, dtype=dtype)
        return step.set(direction=step.direction + step.at(alpha) * squarable(slow))

    return line
