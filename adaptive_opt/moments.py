"""Stages on what is remembered of the gradient: its moving averages, and corrections of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.policies import Hyperparameter, check_decay
from adaptive_opt.stage import Stage, compose, stage


def moving_average(new: Any, average: Any, *, decay: Any) -> Any:
    """``(1 - decay) * new + decay * average``, in the order of terms that optax uses."""
    return (1 - decay) * new + decay * average


def absolute_square(x: jax.Array) -> jax.Array:
    return x**2 if jnp.isrealobj(x) else (x.conj() * x).real


@stage(reads=("direction",), replaces=("direction",), keeps="direction", biases={"direction": "b1"})
def first_moment(b1: Hyperparameter, *, name: str = "mu", dtype: DTypeLike | None = None) -> Any:
    """The moving average of the direction: ``m_t = b1 m_{t-1} + (1 - b1) d_t``, with ``m_0 = 0``.

    Reads and replaces ``direction``, which is the gradient unless a stage before has changed it.
    Adam's biased first moment estimate (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b1: decay in [0, 1), or a schedule of it.
      name: the name of its buffer ``mu``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment
    >>> rule = adaptive(first_moment(0.5))
    >>> update, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> update.tolist(), state.buffers["mu"].tolist()
    ([1.0], [1.0])
    """
    check_decay(b1=b1)

    def line(step, mu):
        mu = step.map(moving_average, step.direction, mu, decay=step.at(b1))
        return step.replace(direction=mu), mu

    return line


@stage(
    reads=("gradient",),
    replaces=("second_moment",),
    keeps="second_moment",
    biases={"second_moment": "b2"},
)
def second_moment(b2: Hyperparameter, *, name: str = "nu", dtype: DTypeLike | None = None) -> Any:
    """The moving average of the squared gradient: ``v_t = b2 v_{t-1} + (1 - b2) |g_t|^2``.

    Reads ``gradient``, sets ``second_moment``; real for complex gradients.
    Adam's biased second raw moment estimate (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b2: decay in [0, 1), or a schedule of it.
      name: the name of its buffer ``nu``: one real array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters (in
        bfloat16 and with b2 = 0.999 it would stop moving); float16 is refused.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.75), per_weight_rate(eps=0.0))
    >>> update, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> update.tolist(), state.buffers["nu"].tolist()
    ([2.0], [1.0])
    """
    check_decay(b2=b2)

    def line(step, nu):
        squares = step.map(absolute_square, step.gradient)
        nu = step.map(moving_average, squares, nu, decay=step.at(b2))
        return step.replace(second_moment=nu), nu

    return line


def debias(b1: Hyperparameter | None = None, b2: Hyperparameter | None = None) -> Stage:
    """Corrects averages for their start at zero: ``m_t / (1 - b1^t)`` and ``v_t / (1 - b2^t)``.

    With ``b1`` reads and replaces ``direction``, with ``b2`` reads and replaces ``second_moment``;
    at least one must be given. Remembers nothing. Where it stands matters: before ``amsgrad_max``
    the maximum is over corrected moments (optax), after it over raw ones (PyTorch).
    Adam's bias-corrected estimates (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b1: the decay given to ``first_moment``, in [0, 1). A schedule is taken at the current step
        (``1 - b1_t^t``, as in PyTorch and optax), not multiplied up over all steps.
      b2: the decay given to ``second_moment``, likewise.

    ValueError if neither is given, or if there is no such average, or it is corrected already.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, debias, first_moment
    >>> rule = adaptive(first_moment(0.5), debias(b1=0.5))
    >>> print(rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [2.]
    """
    if b1 is None and b2 is None:
        raise ValueError("debias needs b1, b2 or both: the decays of the averages it corrects.")
    direction = () if b1 is None else (_debias_direction(b1),)
    second = () if b2 is None else (_debias_second_moment(b2),)
    return compose("debias", {"b1": b1, "b2": b2}, *direction, *second)


def bias_correction(decay: Hyperparameter, step: Any, ahead: int = 0) -> Any:
    """``1 - decay^t`` at this step, or ``ahead`` steps later."""
    count = step.count
    for _ in range(ahead):
        count = optax.safe_increment(count)
    return 1 - step.at(decay) ** count.astype(float)


@stage(
    reads=("direction",),
    replaces=("direction",),
    debiases={"direction": "b1"},
    called="debias(b1)",
)
def _debias_direction(b1: Hyperparameter) -> Any:
    check_decay(b1=b1)

    def line(step):
        c1 = bias_correction(b1, step)
        return step.replace(direction=step.map(_divided, step.direction, by=c1))

    return line


@stage(
    reads=("second_moment",),
    replaces=("second_moment",),
    debiases={"second_moment": "b2"},
    called="debias(b2)",
)
def _debias_second_moment(b2: Hyperparameter) -> Any:
    check_decay(b2=b2)

    def line(step):
        c2 = bias_correction(b2, step)
        return step.replace(second_moment=step.map(_divided, step.second_moment, by=c2))

    return line


def _divided(x: Any, *, by: Any) -> Any:
    return x / by


@stage(
    reads=("gradient", "direction"),
    replaces=("direction",),
    debiases={"direction": "b1"},
    raw=("direction",),
)
def nesterov_moment(b1: Hyperparameter) -> Any:
    """Looks one step ahead: ``b1 m_t / (1 - b1^{t+1}) + (1 - b1) g_t / (1 - b1^t)``.

    Reads ``gradient`` and ``direction`` (m_t), replaces ``direction``; includes the debiasing.
    Remembers nothing. ``optax.adam(nesterov=True)``; after Dozat 2016 (OpenReview
    OM0jvwB8jIp57ZJjtNEZ), without its momentum schedule.

    Args:
      b1: the decay given to ``first_moment``, in [0, 1).

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, nesterov_moment
    >>> rule = adaptive(first_moment(0.5), nesterov_moment(0.5))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [4.]
    """
    check_decay(b1=b1)

    def line(step):
        ahead = step.map(
            lambda m, g, *, b, next, now: b * (m / next) + (1 - b) * (g / now),
            step.direction,
            step.gradient,
            b=step.at(b1),
            next=bias_correction(b1, step, ahead=1),
            now=bias_correction(b1, step),
        )
        return step.replace(direction=ahead)

    return line


@stage(reads=("second_moment",), replaces=("second_moment",), keeps="second_moment")
def amsgrad_max(*, name: str = "nu_max", dtype: DTypeLike | None = None) -> Any:
    """The largest second moment so far: ``v^_t = max(v^_{t-1}, v_t)``, with ``v^_0 = 0``.

    Reads and replaces ``second_moment``, whatever form it has where this stands: raw before
    ``debias``, corrected after it or after ``scale_by_adam``. It must come before any stage that
    turns the rate into values. AMSGrad (Reddi, Kale & Kumar 2018, OpenReview ryQu7f-RZ, Algorithm
    2).

    Args:
      name: the name of its buffer ``nu_max``: one real array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, amsgrad_max, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), amsgrad_max(), per_weight_rate(eps=0.0))
    >>> state = rule.init(jnp.zeros(1))
    >>> _, state = rule.update(jnp.array([4.0]), state)
    >>> print(rule.update(jnp.array([1.0]), state)[0].round(4))
    [0.25]
    """

    def line(step, nu_max):
        nu_max = step.map(jnp.maximum, nu_max, step.second_moment)
        return step.replace(second_moment=nu_max), nu_max

    return line
