"""Stages on the rate: the learning rate of every single weight."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_at_least,
    check_at_least_one,
    check_decay,
    check_nonnegative,
    check_positive,
    check_whole,
    given,
    value_at,
)
from adaptive_opt.core.finite import root
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep, RateRule
from adaptive_opt.stages.moments import absolute_square


@stage
def per_weight_rate(eps: Hyperparameter, eps_root: Hyperparameter = 0.0) -> OneArray:
    """The rate of every weight: ``1 / (sqrt(v_t + eps_root) + eps)``.

    Reads ``second_moment``, sets ``rate``, as a rule: a stage that later replaces the second moment
    (``amsgrad_max``) changes the rate with it. Remembers nothing. A weight with no second moment at
    all (eps = 0 and only zero gradients) has the rate 0.
    The denominator of Adam's update (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      eps: added outside the root, in the units of a gradient; at least 0.
      eps_root: added inside the root, in those of a squared gradient; at least 0. Derivatives
        through an update do not need it: the slope of the root at 0 counts as 0.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), per_weight_rate(eps=1.0))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.75]
    """
    check_nonnegative(eps=eps, eps_root=eps_root)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(rate=RateRule(lambda v: root(v + step.at(eps_root)) + step.at(eps)))

    return line


@stage
def inverse_rate(eps: Hyperparameter = 0.0) -> OneArray:
    """The rate of every weight without a root: ``1 / (u_t + eps)``; for ``infinity_moment``.

    Reads ``second_moment``, sets ``rate``, as a rule, like ``per_weight_rate``. Remembers nothing.
    Adamax (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2).

    Args:
      eps: in the units of u; at least 0.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, infinity_moment, inverse_rate
    >>> rule = adaptive(infinity_moment(0.9), inverse_rate(eps=1.0))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.75]
    """
    check_nonnegative(eps=eps)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(rate=RateRule(lambda u: u + step.at(eps)))

    return line


@stage
def uniform_rate(learning_rate: Hyperparameter) -> OneArray:
    """The same rate for every weight: the learning rate.

    Sets ``rate``, as values. Remembers nothing. For SGD with the learning rate inside its momentum.

    Args:
      learning_rate: a number of at least 0, or a schedule.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, uniform_rate
    >>> rule = adaptive(uniform_rate(0.5))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [1.5]
    """
    check_nonnegative(learning_rate=learning_rate)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(rate=step.at(learning_rate))

    return line


@stage
def apply_rate() -> OneArray:
    """Takes the step that the rate says, ahead of the stages that follow: ``d_t * rate_t``.

    Reads ``direction`` and ``rate``, replaces ``direction``; rate and second moment are not set
    after it. Remembers nothing. For a momentum of steps and not of gradients (RMSprop's).

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, apply_rate, heavy_ball, uniform_rate
    >>> rule = adaptive(uniform_rate(0.5), apply_rate(), heavy_ball(0.9))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [1.5]
    """

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(direction=step.direction * step.rate).without("rate", "second_moment")

    return line


@stage
def scale_rate(factor: Hyperparameter) -> OneArray:
    """The rate of every weight times a factor: ``rate_t * factor_t``.

    Reads and replaces ``rate``; from here on it is values. Remembers nothing. For algorithms that
    bound or average a rate which includes the learning rate (AdaMod's released code).

    Args:
      factor: a number of at least 0, or a schedule; dimensionless.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, scale_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), per_weight_rate(eps=0.0), scale_rate(0.5))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.5]
    """
    check_nonnegative(factor=factor)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(rate=step.rate * step.at(factor))

    return line


@stage
def debias_rate(
    b1: Hyperparameter | None = None, b2: Hyperparameter | None = None, *, unseen: int = 0
) -> OneArray:
    """Bias corrections in the rate: ``rate_t / (1 - b1^t)`` and ``rate_t * sqrt(1 - b2^t)``.

    Reads and replaces ``rate``; from here on it is values. Remembers nothing. In place of
    ``debias(b1, b2)`` this is the eps-hat form of Adam: eps counts as ``eps / sqrt(1 - b2^t)``, 32
    times more at the first step for b2 = 0.999. It is the form of Keras, of AdaMod's and diffGrad's
    released code (end of section 2 of Kingma & Ba 2015, arXiv:1412.6980). It must come before
    stages that bound or average the rate.

    Args:
      b1: the decay given to ``first_moment``, in [0, 1), or a schedule of it.
      b2: the decay given to ``second_moment``, likewise.
      unseen: how many of the first gradients the averages have not seen; t counts the others.

    ValueError if neither is given, or if there is no such average, or it is corrected already.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, debias_rate, first_moment, per_weight_rate, second_moment
    >>> adam = first_moment(0.5), second_moment(0.75), per_weight_rate(eps=0.0)
    >>> rule = adaptive(*adam, debias_rate(0.5, 0.75))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [1.]
    """
    if b1 is None and b2 is None:
        raise ValueError("debias_rate needs b1, b2 or both, the decays of the averages.")
    check_decay(**given(b1=b1, b2=b2))
    check_whole(0, unseen=unseen)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        if b1 is not None:
            # Not rate / c1: XLA writes (x / y) / c1 as x / (y c1), or not, as it likes.
            inverse = 1 / step.correction("direction", b1, unseen=unseen)
            step = step.set(rate=step.raw("rate") * inverse)
        if b2 is not None:
            scale = jnp.sqrt(step.correction("second_moment", b2, unseen=unseen))
            step = step.set(rate=step.raw("rate") * scale)
        return step

    return line


@stage
def mute_unseen() -> OneArray:
    """No rate for a weight that has not seen a gradient yet: 0 where the second moment is 0.

    Reads ``second_moment`` and ``rate``, replaces ``rate``; from here on it is values. Remembers
    nothing. Without it such a weight has the rate 1/eps, which moves nothing but stays in any
    average of rates: one zero gradient at the start and AdaMod's bound lets go of the weight for
    many times ``1 / (1 - b3)`` steps. With it, the average starts with the first gradient.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adamod_momental_bound, adaptive, mute_unseen, per_weight_rate
    >>> from adaptive_opt import second_moment
    >>> rule = adaptive(
    ...     second_moment(0.9), per_weight_rate(1e-8), mute_unseen(), adamod_momental_bound(0.9)
    ... )
    >>> _, state = rule.update(jnp.zeros(1), rule.init(jnp.zeros(1)))
    >>> state.buffers["rate_ema"].tolist()
    [0.0]
    """

    def line(step: AdaptiveStep) -> AdaptiveStep:
        unseen = step.second_moment == 0
        return step.set(rate=jnp.where(unseen, jnp.zeros_like(step.rate), step.rate))

    return line


def decay_of_memory(steps: Hyperparameter) -> Hyperparameter:
    """The decay of an average that remembers so many steps: ``1 - 1/n``."""
    check_at_least_one(len_memory=steps)
    return (lambda count: 1 - 1 / steps(count)) if callable(steps) else 1 - 1 / steps


@stage
def adamod_momental_bound(
    b3: Hyperparameter | None = None,
    *,
    len_memory: Hyperparameter | None = None,
    average: bool = False,
    name: str = "rate_ema",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """No rate above its own average: ``s_t = b3 s_{t-1} + (1 - b3) rate_t``, then ``min(rate_t,
    s_t)``.

    Reads and replaces ``rate``; from here on it is values. ``s_0 = 0`` and there is no correction
    for it, so the bound is also a warm-up over about ``1 / (1 - b3)`` steps. AdaMod (Ding, Ren, Luo
    & Sun 2019, arXiv:1910.12249, Algorithm 1).

    Args:
      b3: decay of the average of rates, in [0, 1), or a schedule of it; default 0.999.
      len_memory: the same as a number of steps n >= 1, meaning ``b3 = 1 - 1/n``. Not with ``b3``.
      average: follow ``(rate_t + s_t) / 2`` instead of the smaller (``average_step`` of DiffMod's
        published code).
      name: the name of its buffer ``rate_ema``: real, zeros at first, in the shape of the rate.
      dtype: the buffer's dtype, float32 at least, as 1/eps overflows anything smaller.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adamod_momental_bound, adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), per_weight_rate(eps=0.0), adamod_momental_bound(0.75))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.25]
    """
    if b3 is not None and len_memory is not None:
        raise ValueError(
            f"give b3 or len_memory, not both: len_memory={len_memory!r} means b3 = 1 -"
            " 1/len_memory."
        )
    if len_memory is not None:
        b3 = decay_of_memory(len_memory)
    decay = 0.999 if b3 is None else b3
    check_decay(b3=decay)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        rate_ema = step.average(name, step.rate, decay, dtype=dtype)
        if average:
            return step.limit(rate=(step.rate + rate_ema) / 2)
        return step.limit(rate=jnp.minimum(step.rate, rate_ema))

    return line


@stage
def adabound_dynamic_bound(
    final_learning_rate: Hyperparameter = 0.1, gamma: Hyperparameter = 1e-3
) -> OneArray:
    """Every rate between two bounds that close on one: from Adam, in the course of time, to SGD.

    ``clip(rate_t, f (1 - 1/(gamma t + 1)), f (1 + 1/(gamma t)))`` with the final rate ``f``. Reads
    and replaces ``rate``, which must include the learning rate. Remembers nothing. AdaBound (Luo,
    Xiong, Liu & Sun 2019, arXiv:1902.09843), with the bounds of its released code.

    Args:
      final_learning_rate: f, at least 0, in units of the parameters per unit of gradient, or a
        schedule of it.
      gamma: how fast the bounds close, greater than 0, per step; ``1 / gamma`` steps halve the
        lower bound's distance.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adabound_dynamic_bound, adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), per_weight_rate(0.0), adabound_dynamic_bound(0.5, 1.0))
    >>> print(rule.update(jnp.array([10.0, 0.5]), rule.init(jnp.zeros(2)))[0].round(4))
    [2.5 0.5]
    """
    check_nonnegative(final_learning_rate=final_learning_rate)
    check_positive(gamma=gamma)

    def low(step: Any) -> Any:
        t = jnp.asarray(step + 1, float) * value_at(gamma, step + 1, "gamma")
        return value_at(final_learning_rate, step + 1, "final_learning_rate") * (1 - 1 / (t + 1))

    def high(step: Any) -> Any:
        t = jnp.asarray(step + 1, float) * value_at(gamma, step + 1, "gamma")
        return value_at(final_learning_rate, step + 1, "final_learning_rate") * (1 + 1 / t)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.limit(rate=jnp.clip(step.rate, step.at(low), step.at(high)))

    return line


# The coefficients of h(x) = 1/expm1(x) - 1/x + 1/2 in x, x^3, x^5, ...: Bernoulli's B_2k / (2k)!.
_H = (1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000)


def simple_average_length(b2: Any, count: Any) -> jax.Array:
    """RAdam's rho_t: the length of a simple average as reliable as the moving one after t steps.

    ``2/(1 - b2) - 1 - 2 t b2^t / (1 - b2^t)`` as it stands is a difference of numbers of the size
    of 2000 that is of the size of 5. With ``a = -log(b2)`` it equals ``t (1 - 2 h(a t)) + 2 h(a)``,
    where nothing cancels as long as ``a t`` is small; later the first form is good.
    """
    a = -jnp.log(jnp.asarray(b2, float)) if isinstance(b2, jax.Array) else -math.log(b2)
    t = jnp.asarray(count, float)
    x = a * t

    def h(x: Any) -> Any:
        square, value = x * x, 0.0
        for coefficient in reversed(_H):
            value = coefficient + square * value
        return x * value

    early = t * (1 - 2 * h(jnp.minimum(x, 0.5))) + 2 * h(a)
    return jnp.where(x < 0.5, early, 2 / (1 - b2) - 1 - 2 * t / jnp.expm1(x))


def rectification(
    b2: Hyperparameter, threshold: Hyperparameter
) -> tuple[optax.Schedule, optax.Schedule]:
    """Whether the second moment can be relied on, and RAdam's r_t where it can; schedules."""

    def is_reliable(step: Any) -> Any:
        count = step + 1
        length = simple_average_length(value_at(b2, count, "b2"), count)
        return length >= value_at(threshold, count, "threshold")

    def factor(step: Any) -> Any:
        count, b = step + 1, value_at(b2, step + 1, "b2")
        rho = jnp.where(is_reliable(step), simple_average_length(b, count), 5.0)
        limit = jnp.where(is_reliable(step), 2 / (1 - b) - 1, 5.0)
        return jnp.sqrt((rho - 4) / (limit - 4) * (rho - 2) / (limit - 2) * limit / rho)

    return is_reliable, factor


@stage
def radam_rectifier(
    b2: Hyperparameter,
    *,
    threshold: Hyperparameter = 5.0,
    unrectified_rate: Hyperparameter = 1.0,
    rectify: bool = True,
) -> OneArray:
    """The rate times RAdam's ``r_t`` once the second moment can be relied on; a fixed rate before.

    With ``rho_t`` the length of the average behind v_t and ``rho_inf = 2/(1 - b2) - 1`` its limit,
    ``r_t = sqrt((rho_t - 4)(rho_t - 2) rho_inf / ((rho_inf - 4)(rho_inf - 2) rho_t))`` where
    ``rho_t >= threshold``. Reads and replaces ``rate``. Remembers nothing. rho is computed so that
    nothing cancels: in float32 the factor is within 1e-6 of the rule, where a literal transcription
    is off by 6e-3 at steps 6 and 7. RAdam (Liu et al. 2020, arXiv:1908.03265, Algorithm 2).

    Args:
      b2: the decay given to ``second_moment``, in (0, 1), or a schedule of it.
      threshold: at least 4, below which r_t is not defined; 5 in every public implementation.
      unrectified_rate: the rate below the threshold: 1 follows the direction (PyTorch, optax), 0
        stands still (the authors' code).
      rectify: whether the rate is multiplied by r_t; False where a learning rate has it already.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, radam_rectifier, second_moment
    >>> rule = adaptive(second_moment(0.9), per_weight_rate(eps=0.0), radam_rectifier(0.9))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [3.]
    """
    check_decay(b2=b2)
    check_positive(b2=b2)
    check_at_least(4, threshold=threshold)
    check_nonnegative(unrectified_rate=unrectified_rate)

    is_reliable, factor = rectification(b2, threshold)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        rectified = step.rate * step.at(factor) if rectify else step.rate
        fixed = step.at(unrectified_rate)
        return step.limit(rate=jnp.where(step.at(is_reliable), rectified, fixed))

    return line


@stage
def adadelta_units(
    b2: Hyperparameter,
    eps: Hyperparameter,
    *,
    name: str = "step_ema",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The rate in the units of the parameters: times the size of the recent steps.

    ``rate_t sqrt(s_{t-1} + eps)`` with ``s_t = b2 s_{t-1} + (1 - b2) |step_t|^2``, where the step
    is the direction times this rate. Reads ``direction`` and ``rate``, replaces ``rate``. AdaDelta
    (Zeiler 2012, arXiv:1212.5701, Algorithm 1).

    Args:
      b2: decay in [0, 1), or a schedule of it.
      eps: added under the root, in the units of a squared step; the first step is of size
        ``sqrt(eps)``.
      name: the name of its buffer ``step_ema``: one real array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adadelta_units, adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), per_weight_rate(eps=0.0), adadelta_units(0.9, 0.25))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.5]
    """
    check_decay(b2=b2)
    check_nonnegative(eps=eps)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        before = step.recall(name, like=step.direction.real, dtype=dtype)
        step = step.set(rate=step.rate * root(before + step.at(eps)))
        step.average(name, absolute_square(step.direction * step.rate), b2, dtype=dtype)
        return step

    return line


@stage
def floored_rate(eps: Hyperparameter) -> OneArray:
    """The rate of every weight with eps as a floor: ``1 / max(sqrt(v_t), eps)``.

    Reads ``second_moment``, sets ``rate``, as a rule, like ``per_weight_rate``. Remembers nothing.
    ADOPT (Taniguchi et al. 2024, arXiv:2411.02853, Algorithm 2).

    Args:
      eps: in the units of a gradient; at least 0.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, floored_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), floored_rate(eps=2.0))
    >>> print(rule.update(jnp.array([1.0, 3.0]), rule.init(jnp.zeros(2)))[0].round(4))
    [0.5 1. ]
    """
    check_nonnegative(eps=eps)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(rate=RateRule(lambda v: jnp.maximum(root(v), step.at(eps))))

    return line
