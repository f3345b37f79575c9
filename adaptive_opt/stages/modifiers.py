"""Stages that change a finished update: caution, clipping, a step on the sphere, a toss of coins.

Like ``trust_ratio`` they read ``direction`` and ``rate`` and nothing of how these were made. So
they go into any bracket, and with ``behind(optimizer, ...)`` behind any optimizer.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_decay,
    check_fixed,
    check_fraction,
    check_nonnegative,
    check_positive,
    check_whole,
    choose,
)
from adaptive_opt.core.finite import root
from adaptive_opt.core.stage import OneArray, WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
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

        now = length(x)
        radius = step.remember(name, lambda kept, _: kept, now, initial=lambda first: first)
        ahead = x - step.at(learning_rate) * radius * unit(u, length(u))
        landed = radius * unit(ahead, length(ahead))
        return step.set(direction=x - landed).without("rate", "second_moment")

    return line


@stage
def magma(
    tau: Hyperparameter = 2.0,
    keep: Hyperparameter = 0.5,
    *,
    b1: Hyperparameter = 0.9,
    decay: Hyperparameter = 0.9,
    seed: int = 0,
    axis_name: AxisName = None,
) -> WholeTree:
    """Moves half of the tensors at a step, those in agreement further: ``d_t s_t z_t``.

    ``z_t`` is 1 with the probability ``keep``, else 0, by a coin for each tensor and step. ``s_t``
    is the average of ``sigmoid(cos(m_t, g_t) / tau)``, 1 before the first step, where ``m_t`` is
    that of the gradients. Reads ``gradient`` and ``direction``, replaces ``direction``. Nothing
    makes up for what is left out: in the mean an update is half of itself at first, and a third or
    a quarter later. Magma (Joo et al. 2026, arXiv:2602.15322); its authors published no code.
    Equals the package magma-optimizer, if that tosses the same coins.

    Coins follow from the seed, the count and the tensor's place among the leaves. So a restored run
    goes on with its own, and every device tosses the same.

    Args:
      tau: greater than 0: the higher, the less agreement matters.
      keep: in [0, 1].
      b1: decay of the average of gradients, in [0, 1).
      decay: that of the average of agreements, in [0, 1).
      seed: a whole number of at least 0. Give groups seeds of their own.
      axis_name: see ``cautious``.

    Buffers: ``mean_of_gradients``, one array per parameter, ``agreement``, one number.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, magma
    >>> rule, x = adaptive(magma(keep=1.0, decay=0.0)), jnp.ones(2)
    >>> print(rule.update(x, rule.init(x))[0].round(4))
    [0.6225 0.6225]
    """
    check_positive(tau=tau)
    check_fraction(keep=keep)
    check_decay(b1=b1, decay=decay)
    check_whole(0, seed=seed)
    check_fixed("the coins", seed=seed)

    def line(steps: OpenStep) -> OpenStep:
        key = jax.random.fold_in(jax.random.key(int(seed), impl="threefry2x32"), steps.count)
        for i, step in enumerate(steps.steps):
            if step is None:
                continue
            g = step.gradient
            m = step.average("mean_of_gradients", g, b1)
            of_m, of_g = (unit(a, norm(step, a, axis_name)) for a in (m, g))
            cosine = over(step, [jnp.real(of_m.conj() * of_g)], "sum", axis_name)
            now = jax.nn.sigmoid(cosine / step.at(tau))
            agreed = step.average("agreement", now, decay, initial=1.0)
            coin = jax.random.uniform(jax.random.fold_in(key, i), dtype=np.float32)
            step.set(direction=step.direction * jnp.where(coin < step.at(keep), agreed, 0))
        return steps

    return WholeTree(line)


def unit(a: jax.Array, length: jax.Array) -> jax.Array:
    """``a / |a|`` of an array and its length, 0 for 0."""
    return a / jnp.where(length > 0, length, 1)
