"""Adam between two rotations: SOAP."""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter, check_nonnegative, is_zero
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.recipes.adam import Parts
from adaptive_opt.stages.eigenbasis import eigenbasis, into_eigenbasis, out_of_eigenbasis
from adaptive_opt.stages.matrices import Axes
from adaptive_opt.stages.moments import first_moment, second_moment
from adaptive_opt.stages.rates import debias_rate, per_weight_rate
from adaptive_opt.stages.weight_decay import Mask, with_decay


@recipe
def soap(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.95,
    b2: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-8,
    *,
    shampoo_beta: Hyperparameter | None = None,
    precondition_frequency: int = 10,
    max_precond_dim: int | None = None,
    precondition_1d: bool = False,
    correct_bias: bool = True,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled", "decoupled-after"] = "decoupled",
    axis_name: Axes = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam in the eigenbasis of Shampoo: ``x - lr Q_L (M' / (sqrt(V) + eps)) Q_R^T``.

    ``M' = Q_L^T M Q_R`` is the average of the gradients in the basis in which their second moments
    ``V`` are nearly uncorrelated, see ``eigenbasis``; ``V`` is the average of the squares of
    ``Q_L^T G Q_R``. Arrays of more axes have a basis for each. Vyas et al. 2024, arXiv:2409.11321,
    Algorithm 3. Equals the authors' ``soap.py`` (nikhilvyas/SOAP), whose decompositions are
    calculated in float32, these in the width of the arrays. The first gradient only begins the
    bases: nothing moves, and the bias corrections count from the second.

    Use it for Transformers at large batches: fewer steps than AdamW for the same loss, for two more
    matrices per axis and their products. Vectors and scalars are left to Adam.

    Do without it where axes are long: each keeps two square matrices of its length
    (``max_precond_dim``).

    Not copied: ``merge_dims`` and ``normalize_grads``.

    Args:
      learning_rate: see ``adam``; the authors' 3e-3.
      b1, b2: decays of the averages, in [0, 1).
      eps: added to the root of ``V`` before its correction; at least 0.
      shampoo_beta: the decay of the averages behind the bases; default: b2.
      precondition_frequency, max_precond_dim, precondition_1d, axis_name: see ``eigenbasis``.
      correct_bias: whether M and V are corrected for their start at zero.
      weight_decay, mask: see ``adamw``; the authors' weight_decay is 0.01.
      decay: "decoupled": of the old x. "decoupled-after": of the new x, from the second step on, as
        the authors do.
      state_dtype: of ``mu`` and ``nu``; see ``adam``.

    State: ``mu``, in the space of the parameters, ``nu``, in that of the bases, and ``gram_0``,
      ``basis_0``, ... for every axis. ``optax.tree.map_params``, which asks for the state of one
      placeholder, knows only that of trees whose longest shape has two axes.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import soap
    >>> optimizer, x = soap(0.125), jnp.eye(2)
    >>> first, state = optimizer.update(x, optimizer.init(x), x)
    >>> print(first.sum(), optimizer.update(x, state, x)[0].round(4) + 0)
    0.0 [[-0.125  0.   ]
     [ 0.    -0.125]]
    """
    corrections = (debias_rate(b1, b2, unseen=1),) if correct_bias else ()
    bracket = adaptive(
        eigenbasis(
            b2 if shampoo_beta is None else shampoo_beta,
            precondition_frequency,
            max_precond_dim=max_precond_dim,
            precondition_1d=precondition_1d,
            axis_name=axis_name,
        ),
        first_moment(b1),
        into_eigenbasis(),
        second_moment(b2),
        per_weight_rate(eps),
        *corrections,
        out_of_eigenbasis(),
        state_dtype=state_dtype,
    )
    if decay == "decoupled-after":
        weight_decay = _from_the_second(weight_decay)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def _from_the_second(weight_decay: Hyperparameter) -> Hyperparameter:
    check_nonnegative(weight_decay=weight_decay)
    if is_zero(weight_decay):
        return weight_decay

    def later(step: Any) -> Any:
        now = weight_decay(step) if callable(weight_decay) else weight_decay
        return jnp.where(step > 0, now, 0.0)

    return later
