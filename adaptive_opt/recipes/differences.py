"""Recipes that use how the gradient changes: MARS, Adan.

The arguments are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

from typing import Literal

from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.recipes.successors import Parts
from adaptive_opt.stages.differences import (
    change_average,
    nesterov_gradient,
    variance_reduced_gradient,
)
from adaptive_opt.stages.directions import sign_direction
from adaptive_opt.stages.moments import debias, first_moment, second_moment
from adaptive_opt.stages.rates import per_weight_rate
from adaptive_opt.stages.tensors import AxisName, clip_gradient_norm
from adaptive_opt.stages.weight_decay import Mask, with_decay


@recipe
def mars(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.95,
    b2: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-8,
    *,
    gamma: Hyperparameter = 0.025,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    convention: Literal["adamw", "lion"] = "adamw",
    axis_name: AxisName = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW, or a sign, of a gradient with less variance: ``c = g + gamma b1/(1 - b1) (g - g')``.

    ``g'`` is the gradient of the step before; each tensor's c is clipped to the norm 1, see
    ``variance_reduced_gradient`` and ``clip_gradient_norm``. Yuan et al. 2024, arXiv:2411.10438,
    Algorithms 2 and 3. Equals the authors' ``mars.py`` (AGI-Arena/MARS) with ``optimize_1d=True``.

    Use it where the noise of the gradient, and not the shape of the loss, limits the learning rate.

    Do without it at batches so small that the gradient changes by noise from one to the next: the
    form of the authors' code takes this for a change of the gradient itself.

    Not copied: the authors' default gives vectors and scalars to AdamW with a learning rate of
    their own, for which there are ``ParameterGroups``; the exact form, which takes the gradient of
    the batch before at the parameters now; and MARS-Shampoo.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      gamma: how much of the correction is made, at least 0; the authors' 0.025.
      weight_decay: at least 0.
      decay: "decoupled": times the learning rate and its schedule.
      convention: "adamw": Adam's moments of c. "lion": the sign of ``m_t``, without b2 and eps; the
        authors' MARS-Lion, which has one average where Lion has two.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import mars
    >>> x = jnp.array([1.0])
    >>> optimizer = mars(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    listings = {
        "adamw": (first_moment(b1), second_moment(b2), debias(b1, b2), per_weight_rate(eps)),
        "lion": (first_moment(b1), sign_direction()),
    }
    bracket = adaptive(
        variance_reduced_gradient(gamma, b1),
        clip_gradient_norm(1.0, axis_name=axis_name),
        *listings[convention],
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def complement(hyperparameter: Hyperparameter) -> Hyperparameter:
    """One less a hyperparameter, whether it is a number or a schedule."""
    if callable(hyperparameter):
        return lambda step: 1 - hyperparameter(step)
    return 1 - hyperparameter


@recipe
def adan(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.98,
    b2: Hyperparameter = 0.92,
    eps: Hyperparameter = 1e-8,
    *,
    b3: Hyperparameter = 0.99,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["proximal", "decoupled"] = "proximal",
    convention: Literal["reference", "optax"] = "reference",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with Nesterov's look ahead: ``x - lr (m^ + b2 c^) / (sqrt(n^) + eps)``.

    ``m`` averages the gradient, ``c`` its change and ``n`` the square of ``g + b2 (g - g')``, with
    ``g'`` of the step before; see ``nesterov_gradient`` and ``change_average``. Xie et al. 2022,
    arXiv:2208.06677, Algorithm 1. Equals the authors' ``adan.py`` (sail-sg/Adan). Decays are named
    as in the code, where the paper says beta for ``1 - b``; the code corrects for the start at
    zero, the paper's listing does not.

    Use it at large learning rates and batches; it keeps four arrays per parameter.

    Do without it where memory is short.

    Not copied: ``max_grad_norm``, for which there is ``optax.clip_by_global_norm``, and restarts.

    Args:
      learning_rate, b1, eps, mask, state_dtype: see ``adam``.
      b2: decay of the average change, and its weight, in [0, 1).
      b3: decay of the average square, in [0, 1).
      weight_decay: at least 0.
      decay: "proximal": the new x is divided by ``1 + lr wd``. "decoupled": times the learning rate
        and its schedule (``no_prox=True``).
      convention: "reference", or "optax": ``1 - b2`` in b2's place, wherever it is no decay, as
        ``optax.adan(eps_root=0)`` has it: the paper's letters with the code's numbers, so that it
        hardly looks ahead. Its decay is "decoupled".

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adan
    >>> x = jnp.array([1.0])
    >>> optimizer = adan(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    ahead = b2 if convention == "reference" else complement(b2)
    bracket = adaptive(
        nesterov_gradient(ahead),
        first_moment(b1),
        debias(b1),
        change_average(b2, ahead),
        second_moment(b3),
        debias(b2=b3),
        per_weight_rate(eps),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)
