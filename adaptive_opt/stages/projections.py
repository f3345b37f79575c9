"""Stages that take a part out of the direction: what points along the weights themselves."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import Hyperparameter, check_fraction, check_nonnegative, choose
from adaptive_opt.core.finite import root, squarable, summable
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.stages.moments import absolute_square, over


@stage
def radial_projection(
    delta: Hyperparameter = 0.1,
    wd_ratio: Hyperparameter = 0.1,
    eps: Hyperparameter = 1e-8,
    *,
    channels: Literal["last", "first"] = "last",
    axis_name: tuple[()] | None = None,
) -> OneArray:
    """A direction less its part along the weights, where the loss does not depend on their length.

    That is taken for true of a tensor if ``|cos(g, x)| < delta / sqrt(n)`` in each of its channels,
    or else over the whole of it, with n the number of weights of a channel or of the tensor; then
    ``d - x/|x| <x/|x|, d>``, by channel or over the whole. Only for tensors of two or more
    dimensions. Reads ``gradient`` and ``direction``, replaces ``direction``; leaves as a note for
    ``add_weight_decay`` by what its decay is multiplied. Remembers nothing. AdamP (Heo et al.
    2020, arXiv:2006.08217, Algorithm 2).

    Args:
      delta: at least 0, or a schedule.
      wd_ratio: what is left of weight decay where the direction was projected, in [0, 1].
      eps: at least 0: the smallest length that counts, and added to ``|x|``.
      channels: their axis: "last", as of kernels in JAX, or "first", as in PyTorch.
      axis_name: under ``shard_map`` and ``pmap`` ``()``: every device must have whole tensors.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, radial_projection
    >>> rule, x = adaptive(first_moment(0.0), radial_projection(delta=9.0)), jnp.eye(2)
    >>> print(rule.update(jnp.ones((2, 2)), rule.init(x), x)[0].round(4))
    [[0. 1.]
     [1. 0.]]
    """
    check_nonnegative(delta=delta, eps=eps)
    check_fraction(wd_ratio=wd_ratio)
    choose("channels", channels, dict.fromkeys(("last", "first")))
    if axis_name not in (None, ()):
        raise ValueError(
            f"axis_name must be (), got {axis_name!r}: the channels of a tensor that is split among"
            " devices cannot be projected. Give every device the whole tensor."
        )

    def line(step: AdaptiveStep) -> AdaptiveStep:
        g, x, d = squarable(step.gradient), step.param, step.direction
        if x.ndim < 2:
            return step.note(projected_decay=1.0)
        over(step, [absolute_square(x)], "sum", axis_name)  # refuses parts of a tensor
        least, channel = step.at(eps), x.ndim - 1 if channels == "last" else 0
        views = tuple(i for i in range(x.ndim) if i != channel), tuple(range(x.ndim))
        projected, done = d, jnp.zeros((), bool)
        for axes in views:

            def total(a: jax.Array, b: jax.Array, axes: tuple[int, ...] = axes) -> jax.Array:
                return summable(jnp.sum((a.conj() * b).real, axes, keepdims=True))

            of_g, of_x = root(total(g, g)), root(total(x, x))
            lengths = jnp.maximum(of_g, least) * jnp.maximum(of_x, least)
            cosine = jnp.abs(_quotient(total(g, x), lengths))
            size = math.prod(x.shape[i] for i in axes)
            now = ~done & (jnp.max(cosine, initial=0.0) < step.at(delta) / max(size, 1) ** 0.5)
            unit = _quotient(x, of_x + least)
            projected = jnp.where(now, d - unit * total(unit, d), projected)
            done = done | now
        kept = jnp.where(done, step.at(wd_ratio), 1.0)
        return step.set(direction=projected).note(projected_decay=kept)

    return line


def _quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """x / y, and 0 where y is 0."""
    return jnp.where(y == 0, 0.0, x / jnp.where(y == 0, 1.0, y))
