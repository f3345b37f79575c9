"""Stages that change a finished update: caution, clipping, a step on the sphere.

Like ``trust_ratio`` they read ``direction`` and ``rate`` and nothing of how these were made. So
they go into any bracket, and with ``behind(optimizer, ...)`` behind any optimizer.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_nonnegative,
    check_positive,
    choose,
)
from adaptive_opt.core.finite import root
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.stages.matrices import sides
from adaptive_opt.stages.moments import absolute_square, over
from adaptive_opt.stages.tensors import AxisName, norm
from adaptive_opt.stages.weight_decay import agreement

_CAUTION = {
    "mean": lambda same, mean, size: same / jnp.maximum(mean, 1e-3),
    "count": lambda same, mean, size: same * (size / (mean * size + 1)),
    "none": lambda same, mean, size: same,
}


@stage
def cautious(
    scale: Literal["mean", "count", "none"] = "mean", *, axis_name: AxisName = None
) -> OneArray:
    """A weight moves only where direction and gradient agree in sign: ``d_t [d_t g_t > 0]``.

    The weights that move take larger steps in proportion, by ``scale``:

    * ``"mean"``: divided by the mean of the mask, at least 1e-3, over the tensor;
    * ``"count"``: times ``n / (k + 1)``, where k of n weights move;
    * ``"none"``: as they are.

    Reads ``gradient`` and ``direction``, replaces ``direction``. No buffer. Of complex numbers the
    real part of ``d conj(g)`` counts. Cautious optimizers (Liang et al. 2024, arXiv:2411.16085);
    the authors' repository kyleliang919/C-Optim has "mean" in ``c_adamw.py`` and ``c_muon.py``,
    "count" in ``c_lion.py``.

    Use it to keep a momentum from working against the gradient of the day. Weight decay is not
    masked there: put it behind, not in front.

    Args:
      scale: see above.
      axis_name: under ``shard_map`` or ``pmap`` the axes that split the parameter, see
        ``second_moment``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import behind, cautious
    >>> optimizer, x = behind(optax.sgd(1.0, momentum=0.9), cautious()), jnp.zeros(2)
    >>> _, state = optimizer.update(jnp.array([1.0, 1.0]), optimizer.init(x), x)
    >>> print((x + optimizer.update(jnp.array([1.0, -0.5]), state, x)[0]).round(4))
    [-3.8  0. ]
    """
    scaled = choose("scale", scale, _CAUTION)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        d, g = step.direction, step.gradient
        same = (agreement(d, g) > 0).astype(step.width)
        mean = over(step, [same], "mean", axis_name) if scale != "none" else 1.0
        return step.set(direction=d * scaled(same, mean, same.size))

    return line


@stage
def clip_update_rms(threshold: Hyperparameter = 1.0, *, axis_name: AxisName = None) -> OneArray:
    """Updates of a tensor are at most the threshold in the mean: ``u_t / max(1, RMS(u_t) / d)``.

    ``RMS`` is the root of the mean square over the tensor. Reads ``direction`` and ``rate``, limits
    ``direction``; no buffer. Adafactor's update clipping (Shazeer & Stern 2018, arXiv:1804.04235,
    section 6); ``optax.clip_by_block_rms``. Unlike a clipping of gradients it waits for nobody: no
    norm over all parameters is formed.

    Args:
      threshold: d, in the units of the update as it stands; positive.
      axis_name: see ``cautious``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, clip_update_rms
    >>> rule = adaptive(clip_update_rms(0.5))
    >>> print(rule.update(jnp.array([3.0, -3.0]), rule.init(jnp.zeros(2)))[0])
    [ 0.5 -0.5]
    """
    check_positive(threshold=threshold)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        rms = root(over(step, [absolute_square(step.update)], "mean", axis_name))
        return step.limit(direction=step.direction / jnp.maximum(1, rms / step.at(threshold)))

    return line


@stage
def hyperball(
    learning_rate: Hyperparameter,
    *,
    scope: Literal["tensor", "matrix"] = "tensor",
    name: str = "radius",
    axis_name: AxisName = None,
) -> OneArray:
    """A step on the sphere on which a parameter began: ``x_{t+1} = R unit(x - lr R unit(u_t))``.

    ``R = |x_0|`` is the Frobenius norm of the parameter before its first step, and ``unit(a) = a /
    |a|``, 0 for 0. So the learning rate is an angle, nothing decays, and no width or scale of the
    parameters changes it. Reads ``direction``, ``rate`` and ``param``, replaces ``direction`` and
    uses up ``rate``: what leaves is ``x_t - x_{t+1}``, the learning rate is in it, and behind it
    follows ``optax.scale(-1.0)``.

    Use it for matrices; vectors and scalars go into a group of their own. A parameter that begins
    at 0 stays there. Hyperball optimization (Wen et al. 2025, arXiv:2606.16899).

    Args:
      learning_rate: in units of R, at least 0.
      scope: what has a sphere of its own: every "tensor", or every "matrix" in its last two axes.
      name: the name of its buffer: one real scalar per parameter, or per matrix, R.
      axis_name: see ``cautious``; of the scope "matrix", ``orthogonalize``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, hyperball
    >>> rule, x = adaptive(hyperball(1.0)), jnp.array([[1.0, 0.0]])
    >>> print((x - rule.update(jnp.array([[0.0, 2.0]]), rule.init(x), x)[0]).round(4))
    [[ 0.7071 -0.7071]]
    """
    check_nonnegative(learning_rate=learning_rate)
    choose("scope", scope, {"tensor": 0, "matrix": 0})

    def line(step: AdaptiveStep) -> AdaptiveStep:
        x, u = step.param, step.update
        if scope == "matrix":
            sides(step, x, axis_name)

        def length(a: jax.Array) -> jax.Array:
            if scope == "matrix":
                return root(jnp.sum(absolute_square(a), axis=(-2, -1), keepdims=True))
            return norm(step, a, axis_name)

        def unit(a: jax.Array) -> jax.Array:
            own = length(a)
            return a / jnp.where(own > 0, own, 1)

        now = length(x)
        radius = step.remember(name, lambda kept, _: kept, now, initial=lambda first: first)
        landed = radius * unit(x - step.at(learning_rate) * radius * unit(u))
        return step.set(direction=x - landed).without("rate", "second_moment")

    return line
