"""A recipe around a recipe: Ranger."""

from __future__ import annotations

from typing import Any, Literal

import optax
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.describe import transformation
from adaptive_opt.core.finite import narrowed, squarable
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.core.trees import at_width, dtype_of, map_none, real, wide
from adaptive_opt.recipes.adam import radam
from adaptive_opt.stages.weight_decay import Mask
from adaptive_opt.wrappers.lookahead import lookahead


@recipe
def ranger(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.95,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-5,
    *,
    sync_period: int = 6,
    slow_step_size: Hyperparameter = 0.5,
    centralize: bool = True,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    convention: Literal["torch", "optax", "reference"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> tuple[optax.GradientTransformation, ...]:
    """RAdam inside Lookahead: every k steps ``s = s + a (x - s)``, from where x goes on.

    Zhang et al. 2019, arXiv:1907.08610, around Liu et al. 2020, arXiv:1908.03265. Equals
    ``Ranger/ranger.py`` of lessw2020/Best-Deep-Learning-Optimizers (which calculates in float32)
    for vectors; for arrays of rank 2 and more, the same formulas after its gradient centralisation
    (``optax.centralize``: they lose the mean over all but the first axis; there kernels are stored
    with the output first, in Flax last).

    Use it to reproduce results with it.

    Do without it where the parameters are averaged anyway: ``parameter_ema`` keeps as much as
    Lookahead does, and leaves the training as it is.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, decay, convention, observers, state_dtype: see
        ``radam``.
      sync_period, slow_step_size: see ``lookahead``.
      centralize: whether the gradients of arrays of rank 2 and more are centralised.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import ranger
    >>> x = jnp.array([1.0])
    >>> optimizer = ranger(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.97
    """
    rectified = radam(
        learning_rate,
        b1,
        b2,
        eps,
        convention=convention,
        weight_decay=weight_decay,
        mask=mask,
        decay=decay,
        observers=observers,
        state_dtype=state_dtype,
    )
    centralized = (_centralize(),) if centralize else ()
    return *centralized, lookahead(rectified, sync_period, slow_step_size, state_dtype=state_dtype)


def _centralize() -> optax.GradientTransformation:
    """``optax.centralize``, in float32 at least, of what the moments would take of a gradient."""
    theirs = optax.centralize()

    def summed(g: Any) -> Any:  # a vector is left as it is
        g = at_width(g, real(wide(dtype_of(g))))
        return squarable(g) if g.ndim > 1 else g

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        wider = map_none(summed, updates)
        centralized, state = theirs.update(wider, state, params)
        return map_none(lambda new, g: narrowed(new, dtype_of(g)), centralized, updates), state

    plain = optax.GradientTransformation(theirs.init, update)
    return transformation("centralize", {}, plain, parts=())
