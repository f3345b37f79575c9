"""Stages that weigh the direction by how much the gradient changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter, check_decay, check_nonnegative, choose
from adaptive_opt.core.finite import root
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep

FRICTIONS = {
    "absolute": lambda g, before: jax.nn.sigmoid(jnp.abs(before - g)),
    "signed": lambda g, before: jax.nn.sigmoid(before - g),
    "wide": lambda g, before: 9 * jax.nn.sigmoid(jnp.abs(before - g) / 2) - 4,
}


@stage
def diffgrad_friction(
    kind: str = "absolute", *, name: str = "previous_gradient", dtype: DTypeLike | None = None
) -> OneArray:
    """The direction times a friction that grows with the change of the gradient.

    ``d_t * xi_t`` with, of the change ``c = g_{t-1} - g_t`` and ``g_0 = 0``:

    * ``"absolute"``: ``xi = sigmoid(|c|)``, in [1/2, 1]; diffGrad (Dubey et al. 2020,
      arXiv:1909.11015, equation 11).
    * ``"signed"``: ``xi = sigmoid(c)``, in [0, 1]; version 1 of lessw2020's published code.
    * ``"wide"``: ``xi = 9 sigmoid(|c| / 2) - 4``, in [1/2, 5]; version 2 of the same.

    Reads ``gradient`` and ``direction``, replaces ``direction``. Where the gradient stands still
    the friction is 1/2, so that diffGrad is close to Adam at half the learning rate; the change has
    the units of a gradient, so the friction depends on how the loss is scaled.

    Args:
      kind: which of the three; "signed" is undefined for complex gradients.
      name: the name of its buffer ``previous_gradient``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    The buffer is a copy. The first published diffGrad code and lessw2020's keep a reference to the
    gradient, so that the change is always 0 where gradients are written in place; that is not
    copied.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, diffgrad_friction
    >>> rule = adaptive(diffgrad_friction())
    >>> _, state = rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([3.0]), state)[0].round(4))
    [1.5]
    """
    friction = choose("friction", kind, FRICTIONS)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        g, before = step.gradient, step.recall(name, like=step.gradient, dtype=dtype)
        if kind == "signed" and jnp.iscomplexobj(g):
            raise TypeError(
                'friction "signed" has no meaning for complex gradients: use "absolute" or "wide".'
            )
        xi = friction(g, before)
        step.keep(name, g)
        return step.set(direction=step.direction * xi).note(friction=xi)

    return line


@stage
def lion_direction(
    b1: Hyperparameter, b2: Hyperparameter, *, name: str = "mu", dtype: DTypeLike | None = None
) -> OneArray:
    """The sign of a look ahead: ``sign(b1 m_{t-1} + (1 - b1) d_t)``; ``m_t`` is kept with ``b2``.

    Reads and replaces ``direction`` (d_t, the gradient unless a stage has changed it); every weight
    moves by the same amount, and by none where the look ahead is exactly 0. Lion (Chen et al. 2023,
    arXiv:2302.06675, Algorithm 2).

    Args:
      b1: the weight of the average in the look ahead, in [0, 1), or a schedule of it.
      b2: the decay of the average that is kept, likewise.
      name: the name of its buffer ``mu``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, lion_direction
    >>> rule = adaptive(lion_direction(0.9, 0.5))
    >>> update, state = rule.update(jnp.array([4.0, -0.5]), rule.init(jnp.zeros(2)))
    >>> update.tolist(), state.buffers["mu"].tolist()
    ([1.0, -1.0], [2.0, -0.25])
    """
    check_decay(b1=b1, b2=b2)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        d, b = step.direction, step.at(b1)
        before = step.recall(name, like=d, dtype=dtype)
        step.average(name, d, b2, dtype=dtype)
        return step.set(direction=jnp.sign(b * before + (1 - b) * d))

    return line


@stage
def clip_direction(limit: Hyperparameter) -> OneArray:
    """No part of the direction beyond a limit: ``clip(d_t, -limit_t, limit_t)``.

    Reads and replaces ``direction``; of a complex one, both parts. Remembers nothing. ADOPT clips
    its scaled gradient to ``(t - 1)^(1/4)`` (Taniguchi et al. 2024, arXiv:2411.02853).

    Args:
      limit: at least 0, in the units of the direction, or a schedule.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, clip_direction
    >>> rule = adaptive(clip_direction(1.5))
    >>> print(rule.update(jnp.array([1.0, -3.0]), rule.init(jnp.zeros(2)))[0])
    [ 1.  -1.5]
    """
    check_nonnegative(limit=limit)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        d, most = step.direction, step.at(limit)
        if jnp.iscomplexobj(d):
            parts = jnp.clip(d.real, -most, most), jnp.clip(d.imag, -most, most)
            return step.limit(direction=jax.lax.complex(*parts))
        return step.limit(direction=jnp.clip(d, -most, most))

    return line


@stage
def sign_direction() -> OneArray:
    """The sign of the direction: ``sign(d_t)``, 0 where it is 0; of a complex one, its unit.

    Reads and replaces ``direction``. Remembers nothing. Signum (Bernstein et al. 2018,
    arXiv:1802.04434), MARS-Lion.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, sign_direction
    >>> rule = adaptive(sign_direction())
    >>> print(rule.update(jnp.array([4.0, -0.5, 0.0]), rule.init(jnp.zeros(3)))[0])
    [ 1. -1.  0.]
    """

    def line(step: AdaptiveStep) -> AdaptiveStep:
        return step.set(direction=jnp.sign(step.direction))

    return line


@stage
def atan2_direction(scale: Hyperparameter = 1.27, b: Hyperparameter = 1.0) -> OneArray:
    """The direction over the root of the second moment, as an angle: ``scale atan2(d_t, b
    sqrt(v_t))``.

    For small angles this is ``scale d / (b sqrt(v))``; it needs no eps, is at most ``scale pi / 2``
    and the same for gradients in any unit, and 0 where both are 0. Reads ``direction`` and
    ``second_moment``, replaces the one and uses up the other; of a complex direction, its length.
    Remembers nothing. Adam-atan2 (Everett et al. 2024, arXiv:2407.05872).

    Args:
      scale: at least 0, or a schedule; with 1.27, about 4 / pi, a direction as long as the root
        makes a step of 1.
      b: at least 0, or a schedule.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, atan2_direction, second_moment
    >>> rule = adaptive(second_moment(0.0), atan2_direction(scale=1.0))
    >>> print(rule.update(jnp.array([3.0, 0.0]), rule.init(jnp.zeros(2)))[0].round(4))
    [0.7854 0.    ]
    """
    check_nonnegative(scale=scale, b=b)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        d, scale_of_d = step.direction, step.at(b) * root(step.second_moment)
        beside = jnp.where((d == 0) & (scale_of_d == 0), 1, scale_of_d)  # at 0, 0 it has no slope
        if jnp.iscomplexobj(d):
            angle = jnp.sign(d) * jnp.atan2(jnp.abs(d), beside)
        else:
            angle = jnp.atan2(d, beside)
        return step.set(direction=step.at(scale) * angle).without("second_moment")

    return line
