"""Stages that average something else than the gradient and its square."""

from __future__ import annotations

from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter, check_decay, check_nonnegative
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep
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
