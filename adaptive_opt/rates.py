"""Stages on the rate: the learning rate of every single weight."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.moments import bias_correction, moving_average
from adaptive_opt.policies import (
    Hyperparameter,
    check_at_least_one,
    check_decay,
    check_nonnegative,
)
from adaptive_opt.stage import stage
from adaptive_opt.step import RateRule


@stage(reads=("second_moment",), replaces=("rate",), fixes_rate=False)
def per_weight_rate(eps: Hyperparameter, eps_root: Hyperparameter = 0.0) -> Any:
    """The rate of every weight: ``1 / (sqrt(v_t + eps_root) + eps)``.

    Reads ``second_moment``, sets ``rate``, as a rule: a stage that later replaces the second moment
    (``amsgrad_max``) changes the rate with it. Remembers nothing. A weight with no second moment at
    all (eps = 0 and only zero gradients) has the rate 0.
    The denominator of Adam's update (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      eps: added outside the root, in the units of a gradient; at least 0.
      eps_root: added inside the root, in those of a squared gradient; at least 0. Differentiating
        through an update needs it to be positive: the root has no slope at 0.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), per_weight_rate(eps=1.0))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.75]
    """
    check_nonnegative(eps=eps, eps_root=eps_root)
    return lambda step: step.replace(rate=RateRule(eps, eps_root))


@stage(reads=("rate",), replaces=("rate",))
def scale_rate(factor: Hyperparameter) -> Any:
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

    def line(step):
        scaled = step.map(_times, step.rate, factor=step.at(factor))
        return step.replace(rate=scaled)

    return line


@stage(reads=("rate",), replaces=("rate",), debiases={"direction": "b1", "second_moment": "b2"})
def debias_rate(b1: Hyperparameter, b2: Hyperparameter) -> Any:
    """Both bias corrections in the rate: ``rate_t * sqrt(1 - b2^t) / (1 - b1^t)``.

    Reads and replaces ``rate``; from here on it is values. Remembers nothing. In place of
    ``debias(b1, b2)`` this is the eps-hat form of Adam: eps counts as ``eps / sqrt(1 - b2^t)``, 32
    times more at the first step for b2 = 0.999. It is the form of Keras, of AdaMod's and diffGrad's
    released code (end of section 2 of Kingma & Ba 2015, arXiv:1412.6980).

    Args:
      b1: the decay given to ``first_moment``, in [0, 1), or a schedule of it.
      b2: the decay given to ``second_moment``, likewise.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, debias_rate, first_moment, per_weight_rate, second_moment
    >>> adam = first_moment(0.5), second_moment(0.75), per_weight_rate(eps=0.0)
    >>> rule = adaptive(*adam, debias_rate(0.5, 0.75))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [1.]
    """
    check_decay(b1=b1, b2=b2)

    def line(step):
        correction = jnp.sqrt(bias_correction(b2, step)) / bias_correction(b1, step)
        return step.replace(rate=step.map(_times, step.rate, factor=correction))

    return line


def _times(rate: Any, *, factor: Any) -> Any:
    return rate * factor


def decay_of_memory(steps: Hyperparameter) -> Hyperparameter:
    """The decay of an average that remembers so many steps: ``1 - 1/n``."""
    check_at_least_one(len_memory=steps)
    return (lambda count: 1 - 1 / steps(count)) if callable(steps) else 1 - 1 / steps


@stage(reads=("rate",), replaces=("rate",), keeps="rate", bounds_rate=True)
def adamod_momental_bound(
    b3: Hyperparameter | None = None,
    *,
    len_memory: Hyperparameter | None = None,
    average: bool = False,
    name: str = "rate_ema",
    dtype: DTypeLike | None = None,
) -> Any:
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
      name: the name of its buffer ``rate_ema``: one real array per parameter, zeros at first.
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

    def line(step, rate_ema):
        rate_ema = step.map(moving_average, step.rate, rate_ema, decay=step.at(decay))
        bounded = (lambda r, s: (r + s) / 2) if average else jnp.minimum
        return step.replace(rate=step.map(bounded, step.rate, rate_ema)), rate_ema

    return line
