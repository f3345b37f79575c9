"""Stages that take an array for a matrix, or for a stack of matrices in its last two axes."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_decay,
    check_positive,
    check_whole,
    choose,
)
from adaptive_opt.core.finite import root
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.stages.moments import absolute_square

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Keller Jordan's coefficients: as steep at 0 as five steps allow, and within 0.3 of 1 above."""

Layout = Literal["in-out", "out-in"]
Axes = tuple[()] | None


def sides(
    step: AdaptiveStep, x: jax.Array, axis_name: str | tuple[str, ...] | None
) -> tuple[int, int]:
    """The last two lengths of an array, which a stage takes for a matrix."""
    if x.ndim < 2:
        raise ValueError(
            f"{step.now.stage} needs matrices, but the array{step.memory.where()} has shape"
            f" {x.shape}. Give vectors and scalars an optimizer of their own: muon(...) does, or"
            " ParameterGroups."
        )
    check_whole_arrays(step, axis_name)
    return x.shape[-2], x.shape[-1]


def check_whole_arrays(step: AdaptiveStep, axis_name: str | tuple[str, ...] | None) -> None:
    """A device that may hold only a part of an array takes it for no matrix."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and axis_name != () and not step.now.looking:
        raise ValueError(
            f"{step.now.stage} takes whole matrices, but inside shard_map or pmap, over"
            f" {', '.join(map(str, manual))}, a device may hold only a part. Give axis_name=() if"
            " every device has the whole; else use jit, which sees whole arrays."
        )


def check_products(step: AdaptiveStep, x: jax.Array) -> None:
    """Of arrays that are split over explicit axes, somebody must say how a product is split."""
    if any(axis is not None for axis in jax.typeof(x).sharding.spec):
        raise ValueError(
            f"{step.now.stage} multiplies whole matrices, but the array{step.memory.where()} is"
            f" split over explicit axes of its mesh, as {jax.typeof(x).sharding.spec}. Give the"
            " mesh axes of the type Auto, or replicate the gradients."
        )


@stage
def ahead_of(b1: Hyperparameter) -> OneArray:
    """Nesterov's look ahead without a correction: ``b1 m_t + (1 - b1) g_t``.

    Reads ``gradient`` and ``direction``, the average of ``first_moment(b1)`` as it was made;
    replaces ``direction``. No buffer. Muon's (Jordan et al. 2024); ``nesterov_moment`` is Adam's,
    with both corrections.

    Args:
      b1: the decay of the average, in [0, 1), or the same schedule of it.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, ahead_of, first_moment
    >>> rule = adaptive(first_moment(0.5), ahead_of(0.5))
    >>> print(rule.update(jnp.array([4.0]), rule.init(jnp.zeros(1)))[0])
    [3.]
    """
    check_decay(b1=b1)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        b = step.at(b1)
        return step.set(direction=b * step.raw("direction") + (1 - b) * step.gradient)

    return line


@stage
def orthogonalize(
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    *,
    eps: float = 1e-7,
    eps_is: Literal["added", "floor"] = "added",
    axis_name: Axes = None,
) -> OneArray:
    """The direction as a matrix with all singular values near 1: ``U V^T`` of ``U S V^T``, nearly.

    By Newton-Schulz: ``X = D / (|D| + eps)``, then ``steps`` times ``X = a X + (b A + c A A) X``
    with ``A = X X^T``. With the default coefficients and steps, singular values above 1/100 of the
    norm end between 0.68 and 1.21. Reads and replaces ``direction``; no buffer. Calculated in the
    width of the arrays; the reference calculates in bfloat16. Muon (Jordan et al. 2024,
    KellerJordan/Muon; Bernstein & Newhouse 2024, arXiv:2409.20325).

    Args:
      steps: how many times, at least 1.
      coefficients: a, b and c.
      eps: against division by 0, in the units of the direction; positive.
      eps_is: "added" to the norm, as in the reference, or its "floor", as in ``torch.optim.Muon``.
      axis_name: ``()`` under ``shard_map`` or ``pmap`` where every device has the whole matrix.

    Errors: ValueError for an array of fewer than two axes, by its path. An array of more is a stack
      of matrices.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, orthogonalize
    >>> rule = adaptive(orthogonalize())
    >>> x = jnp.diag(jnp.array([3.0, 1.0]))
    >>> print(jnp.diag(rule.update(x, rule.init(x))[0]).round(2))
    [0.75 1.13]
    """
    check_whole(1, steps=steps)
    check_positive(eps=eps)
    choose("eps_is", eps_is, {"added": 0, "floor": 0})
    a, b, c = coefficients

    def line(step: AdaptiveStep) -> AdaptiveStep:
        x = step.direction
        rows, columns = sides(step, x, axis_name)
        check_products(step, x)
        x = x.mT if rows > columns else x
        norm = root(jnp.sum(absolute_square(x), axis=(-2, -1), keepdims=True))
        x = x / (norm + eps if eps_is == "added" else jnp.maximum(norm, eps))

        def iterate(_: Any, x: jax.Array) -> jax.Array:
            square = x @ x.conj().mT
            return a * x + (b * square + c * square @ square) @ x

        if isinstance(steps, int):
            x = functools.reduce(lambda x, i: iterate(i, x), range(steps), x)
        else:  # inject_hyperparams makes an array of it
            x = jax.lax.fori_loop(0, steps, iterate, x)
        return step.set(direction=x.mT if rows > columns else x)

    return line


SHAPES = {
    "spectral": lambda outputs, inputs: math.sqrt(max(1.0, outputs / max(inputs, 1))),
    "rms": lambda outputs, inputs: 0.2 * math.sqrt(max(outputs, inputs)),
    "none": lambda outputs, inputs: 1.0,
}


@stage
def scale_by_shape(
    kind: Literal["spectral", "rms", "none"] = "spectral",
    layout: Layout = "in-out",
    *,
    axis_name: Axes = None,
) -> OneArray:
    """The direction of a matrix, scaled by the lengths of its sides.

    * ``"spectral"``: ``sqrt(max(1, outputs / inputs))`` (Jordan et al. 2024, KellerJordan/Muon);
    * ``"rms"``: ``0.2 sqrt(max(outputs, inputs))``, so that the root mean square of an orthogonal
      matrix is that of AdamW's usual update, whose learning rate and decay then fit (Moonlight, Liu
      et al. 2025, arXiv:2502.16982);
    * ``"none"``.

    Reads and replaces ``direction``; no buffer.

    Args:
      kind: see above.
      layout: which side is which: "in-out", as in kernels of Flax, or "out-in", as in weights of
        PyTorch and Equinox.
      axis_name: see ``orthogonalize``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, scale_by_shape
    >>> rule, x = adaptive(scale_by_shape()), jnp.ones((1, 4))
    >>> print(rule.update(x, rule.init(x))[0])
    [[2. 2. 2. 2.]]
    """
    scaled = choose("kind", kind, SHAPES)
    choose("layout", layout, {"in-out": 0, "out-in": 0})

    def line(step: AdaptiveStep) -> AdaptiveStep:
        first, last = sides(step, step.direction, axis_name)
        factor = scaled(last, first) if layout == "in-out" else scaled(first, last)
        return step.set(direction=step.direction * factor)

    return line
