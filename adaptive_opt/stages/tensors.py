"""Stages that look at a tensor as a whole: its norm, its root mean square.

Under ``shard_map`` and ``pmap``, where a device has only its part of a tensor, they need
``axis_name=``, as ``second_moment(scope="tensor")`` does, which see.
"""

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
from adaptive_opt.core.finite import root, squarable, summable
from adaptive_opt.core.now import averaged
from adaptive_opt.core.stage import OneArray, WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import Tree, at_width, dtype_of, real, wide
from adaptive_opt.stages.inner_decay import flags
from adaptive_opt.stages.moments import absolute_square, over, over_all
from adaptive_opt.stages.weight_decay import Mask

AxisName = str | tuple[str, ...] | None


def norm(step: AdaptiveStep, x: jax.Array, axis_name: AxisName) -> jax.Array:
    """The root of the sum of the squares of a whole tensor, at most that of half the largest."""
    return root(summable(over(step, [absolute_square(x)], "sum", axis_name)))


def global_norm(tree: Tree, axis_name: AxisName = None) -> jax.Array:
    """The root of the sum of the squares of all numbers in a tree, in float32 at least."""
    leaves = [at_width(x, real(wide(dtype_of(x)))) for x in jax.tree.leaves(tree)]
    return root(over_all([absolute_square(x) for x in leaves], "sum", axis_name))


@stage
def clip_gradient_norm(limit: Hyperparameter = 1.0, *, axis_name: AxisName = None) -> OneArray:
    """No tensor's gradient longer than a limit: ``g_t limit / max(|g_t|, limit)``.

    The norm is that of the tensor. Reads ``gradient`` and ``direction``, and scales both. Remembers
    nothing. For all tensors together, and outside of a bracket, ``optax.clip_by_global_norm``.
    MARS (Yuan et al. 2024, arXiv:2411.10438).

    Args:
      limit: greater than 0, in the units of a gradient, or a schedule.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, clip_gradient_norm
    >>> rule = adaptive(clip_gradient_norm(5.0))
    >>> print(rule.update(jnp.array([6.0, 8.0]), rule.init(jnp.zeros(2)))[0].round(4))
    [3. 4.]
    """
    check_positive(limit=limit)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        most, g = step.at(limit), step.gradient
        factor = most / jnp.maximum(norm(step, g, axis_name), most)
        return step.set(direction=step.direction * factor).limit(gradient=g * factor)

    return line


@stage
def norm_moment(
    b2: Hyperparameter,
    *,
    axis_name: AxisName = None,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The average of a tensor's squared norm: ``v_t = b2 v_{t-1} + (1 - b2) |g_t|^2``, ``v_1 =
    |g_1|^2``.

    It starts at the first gradient that is not zero, and so owes no correction; with one that
    starts at zero, ``second_moment(b2, scope="tensor")``. Reads ``gradient``, sets
    ``second_moment``, a scalar per tensor. NovoGrad (Ginsburg et al. 2019, arXiv:1905.11286,
    Algorithm 1).

    Args:
      b2: decay in [0, 1), or a schedule of it.
      axis_name: see ``second_moment``.
      name: the name of its buffer ``nu``: a real scalar per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, norm_moment, per_weight_rate
    >>> rule = adaptive(norm_moment(0.5), per_weight_rate(eps=6.0))
    >>> print(rule.update(jnp.array([8.0, 6.0]), rule.init(jnp.zeros(2)))[0].round(4))
    [0.5   0.375]
    """
    check_decay(b2=b2)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        def average(v: jax.Array, square: jax.Array) -> jax.Array:
            return jnp.where(v == 0, square, averaged(step.at(b2), v, square))

        square = summable(over(step, [absolute_square(step.gradient)], "sum", axis_name))
        return step.set(second_moment=step.remember(name, average, square, dtype=dtype))

    return line


@stage
def rms_bound(
    eps: Hyperparameter, threshold: Hyperparameter = 1.0, *, axis_name: AxisName = None
) -> OneArray:
    """A lower rate where a tensor's gradient has outgrown its second moment.

    ``rate_t / max(1, r_t / threshold)`` with ``r_t`` the root mean square of ``g_t / sqrt(max(v_t,
    eps^2))`` over the tensor: 1 while the gradients are what they were. Reads ``gradient``,
    ``second_moment`` and ``rate``, replaces ``rate``; leaves the factor as a note for
    ``add_weight_decay``. Remembers nothing. Adafactor's update clipping (Shazeer & Stern 2018,
    arXiv:1804.04235, section 6) in the form of StableAdamW (Wortsman et al. 2023,
    arXiv:2304.13013, Algorithm 2).

    Args:
      eps: the smallest root of ``v`` that counts, at least 0; that of ``per_weight_rate``.
      threshold: greater than 0, or a schedule.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, rms_bound, second_moment
    >>> rule = adaptive(second_moment(0.75), per_weight_rate(0.0), rms_bound(0.0))
    >>> print(rule.update(jnp.array([3.0, 3.0]), rule.init(jnp.zeros(2)))[0].round(4))
    [1. 1.]
    """
    check_nonnegative(eps=eps)
    check_positive(threshold=threshold)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        g, v = squarable(step.gradient), jnp.maximum(step.second_moment, step.at(eps) ** 2)
        squares = jnp.where(v == 0, 0.0, absolute_square(g) / jnp.where(v == 0, 1.0, v))
        rms = root(summable(over(step, [squares], "mean", axis_name)))
        factor = 1 / jnp.maximum(1.0, rms / step.at(threshold))
        return step.limit(rate=step.rate * factor).note(rms_factor=factor)

    return line


@stage
def scale_by_parameter(least: Hyperparameter = 1e-3, *, axis_name: AxisName = None) -> OneArray:
    """The direction of a tensor in proportion to its weights: ``d_t max(RMS(x_t), least)``.

    ``RMS`` is the root of the mean square over the tensor, so that a learning rate is a part of the
    weights, whatever their size. Unlike ``trust_ratio`` it leaves the length of an update as it is.
    Reads ``direction`` and ``param``, replaces ``direction``. Remembers nothing. Adafactor's
    relative step size (Shazeer & Stern 2018, arXiv:1804.04235, section 8);
    ``optax.scale_by_param_block_rms``.

    Args:
      least: at least 0, in the units of a weight, or a schedule: so that a tensor of zeros can
        leave zero.
      axis_name: see ``second_moment``.

    ValueError if params are not given to ``update``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, scale_by_parameter
    >>> rule, x = adaptive(scale_by_parameter()), jnp.array([4.0, -4.0])
    >>> print(rule.update(jnp.array([0.5, 0.25]), rule.init(x), x)[0])
    [2. 1.]
    """
    check_nonnegative(least=least)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        square = over(step, [absolute_square(step.param)], "mean", axis_name)
        size = jnp.maximum(root(summable(square)), step.at(least))
        return step.set(direction=step.direction * size)

    return line


@stage
def trust_ratio(
    coefficient: Hyperparameter = 1.0,
    eps: Hyperparameter = 0.0,
    *,
    largest: float | None = None,
    mask: Mask | None = None,
    axis_name: AxisName = None,
) -> WholeTree:
    """The update of a tensor in proportion to its size: ``u_t coefficient |x_t| / (|u_t| + eps)``.

    Norms are those of the tensor. Where one of them is 0 the update stays as it is, so that a
    tensor of zeros can leave zero. Reads ``direction``, ``rate`` and ``param``, replaces
    ``direction``. Remembers nothing. The length of an update that comes in is lost: the learning
    rate belongs behind. LARS (You, Gitman & Ginsburg 2017, arXiv:1708.03888), LAMB (You et al.
    2019, arXiv:1904.00962); ``optax.scale_by_trust_ratio``.

    Args:
      coefficient: at least 0, or a schedule: the length of a step as a part of ``|x|``.
      eps: at least 0, in the units of an update.
      largest: the largest ``|x|`` that counts; default: any.
      mask: which tensors are scaled, the others keep their direction; see :func:`optax.masked`.
      axis_name: see ``second_moment``.

    ValueError if params are not given to ``update``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, trust_ratio
    >>> rule, x = adaptive(trust_ratio(0.5)), jnp.array([6.0, 8.0])
    >>> print(rule.update(jnp.array([5.0, 0.0]), rule.init(x), x)[0].round(4))
    [5. 0.]
    """
    check_nonnegative(coefficient=coefficient, eps=eps)
    if largest is not None:
        check_positive(largest=largest)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        of_x, of_u = (norm(step, x, axis_name) for x in (step.param, step.update))
        if largest is not None:
            of_x = jnp.minimum(of_x, largest)
        both = (of_x > 0) & (of_u > 0)
        ratio = step.at(coefficient) * of_x / jnp.where(both, of_u + step.at(eps), 1.0)
        return step.set(direction=squarable(step.direction) * jnp.where(both, ratio, 1.0))

    def line_of_the_tree(steps: OpenStep) -> OpenStep:
        for step, is_scaled in zip(steps.steps, flags(mask, steps), strict=True):
            if step is not None and is_scaled:
                line(step)
        return steps

    return WholeTree(line_of_the_tree)
