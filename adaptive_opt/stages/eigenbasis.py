"""Stages that turn an array into the basis of its gradients' second moments, and back: SOAP's.

For every axis of an array, the gradients have a Gram matrix: the average of their products along
the other axes, ``L`` and ``R`` of a matrix. Its eigenvectors are the basis in which a rule per
weight, Adam say, sees weights that are nearly uncorrelated.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from adaptive_opt.core.checks import Hyperparameter, check_decay, check_fixed, check_whole
from adaptive_opt.core.stage import OneArray, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.trees import branch
from adaptive_opt.stages.matrices import Axes, check_products, check_whole_arrays

MAX_PRECOND_DIM = 10_000
"""The authors': hidden layers are below it, most vocabularies above."""


@stage
def eigenbasis(
    shampoo_beta: Hyperparameter,
    precondition_frequency: int = 10,
    *,
    max_precond_dim: int | None = None,
    precondition_1d: bool = False,
    axis_name: Axes = None,
) -> OneArray:
    """The eigenvectors of the averages ``L_t = b L_{t-1} + (1 - b) G G^T`` and ``R_t`` of ``G^T
    G``.

    One such average for every axis of the array, over all the others. The first gradient only
    begins them: gradient and direction are 0 for the stages behind, so that nothing moves and
    their averages begin with the second. From there the basis is that of the gradients before
    today's: eigenvectors at the second step, then, every few steps, one step of the power
    iteration, ``Q = qr(L Q)``, its columns in the order of their estimated eigenvalues. Each column
    keeps its place, so that nothing else in the basis need be permuted.

    Reads ``gradient`` and ``direction``, and replaces them at the first step; leaves the bases for
    ``into_eigenbasis``. SOAP (Vyas et al. 2024, arXiv:2409.11321, Algorithms 3 and 4).

    Args:
      shampoo_beta: b, the decay of the averages, in [0, 1).
      precondition_frequency: how many steps a basis stays; a whole number, at least 1. Between them
        no decomposition is calculated.
      max_precond_dim: axes longer than this are left as they are: an axis of n costs two arrays of
        n x n, and n^3 operations when its basis is renewed. Default: 10,000.
      precondition_1d: whether vectors have a basis, too.
      axis_name: see ``orthogonalize``.

    Buffers: ``gram_0``, ``basis_0``, and so on: for every such axis two square arrays, in float32
      at least, whatever ``state_dtype`` is.
    Errors: ValueError under ``shard_map`` or ``pmap``, unless ``axis_name=()``, and for an array
      that is split over explicit axes of a mesh. TypeError for a max_precond_dim that is an array:
      it decides which buffers there are.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, eigenbasis, into_eigenbasis
    >>> rule, x = adaptive(eigenbasis(0.5), into_eigenbasis()), jnp.ones((2, 2))
    >>> updates, state = rule.update(x, rule.init(x))
    >>> print(abs(rule.update(x, state)[0]).round(3) + 0, updates.sum())
    [[2. 0.]
     [0. 0.]] 0.0
    """
    check_decay(shampoo_beta=shampoo_beta)
    check_whole(1, precondition_frequency=precondition_frequency)
    if max_precond_dim is not None:
        check_whole(0, max_precond_dim=max_precond_dim)
        check_fixed("which buffers there are", max_precond_dim=max_precond_dim)
    longest = MAX_PRECOND_DIM if max_precond_dim is None else max_precond_dim

    def line(step: AdaptiveStep) -> AdaptiveStep:
        gradient = step.gradient
        turned = gradient.size > 0 and (gradient.ndim > 1 or precondition_1d)
        axes = [i for i, n in enumerate(gradient.shape) if turned and n <= longest]
        if axes:
            check_whole_arrays(step, axis_name)
            check_products(step, gradient)
        bases = {}
        for axis in axes:
            product = _gram(gradient, axis)
            before = step.recall(f"gram_{axis}", product, dtype=step.width)
            held = step.recall(f"basis_{axis}", product, dtype=step.width)
            basis = _renewed(held, before, step.count, precondition_frequency)
            bases[axis] = step.keep(f"basis_{axis}", basis)
            step.average(f"gram_{axis}", product, shampoo_beta, dtype=step.width)
        step.note(eigenbases=bases)
        has_begun = step.count > 1
        return step.set(
            gradient=jnp.where(has_begun, gradient, 0),
            direction=jnp.where(has_begun, step.direction, 0),
        )

    return line


@stage
def into_eigenbasis() -> OneArray:
    """Gradient and direction in the basis of ``eigenbasis``: ``Q_L^T G Q_R``, ``Q_L^T M Q_R``.

    Reads and replaces ``gradient`` and ``direction``. No buffer. Averages that stand before it are
    kept in the space of the parameters, and need no turning when the basis changes; those behind
    are of the turned gradient. SOAP (Vyas et al. 2024, arXiv:2409.11321, Algorithm 3).

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, eigenbasis, into_eigenbasis
    >>> rule, x = adaptive(eigenbasis(0.5), into_eigenbasis()), jnp.full((2, 2), 2.0)
    >>> _, state = rule.update(x, rule.init(x))
    >>> print(abs(rule.update(x, state)[0]).round(3) + 0)
    [[4. 0.]
     [0. 0.]]
    """

    def line(step: AdaptiveStep) -> AdaptiveStep:
        step.note(gradient_outside=step.gradient)
        bases = _bases(step)
        if not bases:
            return step
        direction = _turned(step.direction, bases, conjugate=True)
        return step.set(gradient=_turned(step.gradient, bases, conjugate=True), direction=direction)

    return line


@stage
def out_of_eigenbasis() -> OneArray:
    """The update back in the space of the parameters: ``Q_L U Q_R^T``.

    Reads ``direction`` and ``rate``, whose product is ``U``; replaces ``direction``, uses up
    ``rate`` and ``second_moment``, and puts the ``gradient`` back. No buffer. SOAP (Vyas et al.
    2024, arXiv:2409.11321, Algorithm 3); see ``into_eigenbasis``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, eigenbasis, into_eigenbasis, out_of_eigenbasis
    >>> turns = eigenbasis(0.5), into_eigenbasis(), out_of_eigenbasis()
    >>> rule, x = adaptive(*turns), jnp.ones((2, 2))
    >>> _, state = rule.update(x, rule.init(x))
    >>> print(rule.update(x, state)[0].round(3))
    [[1. 1.]
     [1. 1.]]
    """

    def line(step: AdaptiveStep) -> AdaptiveStep:
        _ = step.gradient
        outside = step.noted("gradient_outside")
        step.set(direction=_turned(step.update, _bases(step)), gradient=outside)
        return step.without("rate", "second_moment")

    return line


def _gram(x: jax.Array, axis: int) -> jax.Array:
    """The products along all axes but one."""
    others = [i for i in range(x.ndim) if i != axis]
    return jnp.tensordot(x, x.conj(), axes=(others, others))


def _renewed(basis: jax.Array, gram: jax.Array, count: jax.Array, every: Any) -> jax.Array:
    """The basis for today, of the gradients so far."""

    def eigenvectors() -> jax.Array:
        return jnp.linalg.eigh(gram)[1][:, ::-1]

    def after_a_power_iteration() -> jax.Array:
        power = gram @ basis
        order = jnp.argsort(-jnp.sum((basis.conj() * power).real, axis=0))
        return jnp.linalg.qr(power[:, order])[0][:, jnp.argsort(order)]

    since = count - 2  # the basis begins after the first gradient
    is_due = (since > 0) & (since % jnp.asarray(every, count.dtype) == 0)

    def later() -> jax.Array:
        return branch(is_due, after_a_power_iteration, lambda: basis)

    return branch(since == 0, eigenvectors, later)


def _bases(step: AdaptiveStep) -> dict[int, jax.Array]:
    """The basis of every axis that has one."""
    if step.now.lenient:  # a stage of a flat chain, which is initialised by itself
        return {}
    return step.noted("eigenbases")


def _turned(x: jax.Array, bases: dict[int, jax.Array], conjugate: bool = False) -> jax.Array:
    """An array out of the basis of each of its axes, or, ``conjugate``, into it."""
    for axis, basis in bases.items():
        turn = basis.conj().T if conjugate else basis
        x = jnp.moveaxis(jnp.tensordot(turn, x, axes=(1, axis)), 0, axis)
    return x
