"""Bounds on the rate, and friction: AdaMod, diffGrad, DiffMod and AdaBound.

The arguments are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import (
    Hyperparameter,
    check_constant,
    check_nonnegative,
    check_positive,
    given,
    is_fixed,
    is_zero,
    scaled,
)
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.stages.directions import diffgrad_friction
from adaptive_opt.stages.moments import (
    amsgrad_max,
    debias,
    first_moment,
    second_moment,
)
from adaptive_opt.stages.rates import (
    adabound_dynamic_bound,
    adamod_momental_bound,
    debias_rate,
    mute_unseen,
    per_weight_rate,
    scale_rate,
)
from adaptive_opt.stages.weight_decay import (
    Mask,
    with_decay,
)

Optimizer = optax.GradientTransformationExtraArgs
Parts = tuple[optax.GradientTransformation, ...]


@recipe
def adamod(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    b3: Hyperparameter = 0.999,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled", "l2", "constant"] = "decoupled",
    convention: Literal["reference", "paper", "robust"] = "reference",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam in which no rate may exceed its own moving average: ``x - min(rate, ema(rate)) m - lr wd
    x``.

    Ding, Ren, Luo & Sun 2019, arXiv:1910.12249, Algorithm 1. The average remembers about
    ``1 / (1 - b3)`` steps. The learning rate is part of the averaged rate: when a schedule lowers
    it, the average still remembers higher rates and the bound lets go; in a warm-up it holds
    longer. An exactly zero first gradient puts ``lr / eps`` into the average of
    that weight and leaves it unbounded for many times ``1 / (1 - b3)`` steps, in the released code
    as here; the convention "robust" cures it.

    Use it at learning rates that Adam survives only with a warm-up: the bound acts as one.

    Do without it in runs of fewer than ``1 / (1 - b3)`` steps, in which the bound never lets go,
    and where Adam with a warm-up trains: that does as well, for a buffer less.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, state_dtype: see the module.
      b3: decay of the average of rates, in [0, 1).
      decay: "decoupled", as in the authors' code; "l2" and "constant" as in
        ``pytorch_optimizer.AdaMod``.
      convention: "reference": the rate that is averaged includes the learning rate and both bias
        corrections, ``lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v_t) + eps)``, and multiplies the raw
        ``m_t``; equals the authors' released code (package ``adamod`` 0.0.3, lancopku/AdaMod) and
        ``torch_optimizer.AdaMod``.
        "paper": the rate is ``lr / (sqrt(v^_t) + eps)`` and multiplies ``m^_t``.
        "robust": as "reference", but a weight adds to its average of rates only from its first
        gradient that is not zero, see ``mute_unseen``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamod
    >>> x = jnp.array([1.0])
    >>> optimizer = adamod(1e-2, b3=0.9)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.999
    """
    check_nonnegative(learning_rate=learning_rate)
    _check_is_not_b3(eps)
    mu, nu, rate = first_moment(b1), second_moment(b2), per_weight_rate(eps)
    match convention:
        case "reference":
            listing = mu, nu, rate, debias_rate(b1, b2)
        case "paper":
            listing = mu, nu, debias(b1, b2), rate
        case "robust":
            listing = mu, nu, rate, mute_unseen(), debias_rate(b1, b2)
    bracket = adaptive(
        *listing, scale_rate(learning_rate), adamod_momental_bound(b3), state_dtype=state_dtype
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


def _check_is_not_b3(eps: Any) -> None:
    """An earlier version took b3 where the others take eps: an old call must not pass for a new."""
    if is_fixed(eps) and np.ndim(eps) == 0 and 0.5 <= float(eps) < 1:
        raise ValueError(
            f"eps={eps} looks like b3, which was the fourth argument once: that is eps now, as in"
            f" the other recipes. Give b3={eps} by its name."
        )


@recipe
def diffgrad(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled", "constant"] = "l2",
    friction: Literal["absolute", "signed", "wide"] = "absolute",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam, damped where the gradient does not change: ``x - lr rate sigmoid|g_{t-1} - g_t| m``.

    Dubey et al. 2020, arXiv:1909.11015. The bias corrections are in the eps-hat form. Equals the
    authors' ``diffGrad_v2.py`` (shivram1987/diffGrad) and ``torch_optimizer.DiffGrad``; the first
    version of their code had no friction where gradients are written in place.

    Use it to reproduce its papers.

    Do without it where gradients change little from step to step: there it is Adam at half the
    learning rate, which is what to compare it with.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, state_dtype: see the module.
      decay: "l2", as in the authors' code: added to the gradient first, and so part of the change
        that the friction measures. "decoupled" and "constant" as in ``pytorch_optimizer.DiffGrad``
        (which adds 1e-15 under the root besides).
      friction: "absolute", "signed" or "wide"; see ``diffgrad_friction``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import diffgrad
    >>> x = jnp.array([1.0])
    >>> optimizer = diffgrad(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.990474
    """
    bracket = adaptive(
        first_moment(b1),
        second_moment(b2),
        per_weight_rate(eps),
        debias_rate(b1, b2),
        diffgrad_friction(friction),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def diffmod(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    len_memory: Hyperparameter = 1000,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    friction: Literal["absolute", "signed", "wide"] = "absolute",
    average: bool = False,
    convention: Literal["reference", "robust"] = "reference",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdaMod with diffGrad's friction: ``x - min(rate, ema(rate)) sigmoid|g_{t-1} - g_t| m - lr wd
    x``.

    Published as code only: ``diffmod/diffmod.py`` of lessw2020/Best-Deep-Learning-Optimizers, whose
    trajectories this equals as long as there every backward pass makes a new gradient tensor (its
    previous gradient is a reference; here it is a copy).

    Use it as ``adamod`` and ``diffgrad``, which it joins.

    Do without it for the reasons that are given there; it keeps four arrays per parameter.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, decay, state_dtype: see the module.
      len_memory: how many steps the average of rates remembers, at least 1; b3 is 1 - 1/len_memory.
      friction: "absolute" (version 0 of that code), "signed" (1) or "wide" (2).
      average: follow the mean of the rate and its average, not the smaller (``average_step``).
      convention: "reference", or "robust" for a cure of zero gradients at the start; see
        ``adamod``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import diffmod
    >>> x = jnp.array([1.0])
    >>> optimizer = diffmod(1e-2, len_memory=10)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.999047
    """
    check_nonnegative(learning_rate=learning_rate)
    cure = (mute_unseen(),) if convention == "robust" else ()
    bracket = adaptive(
        first_moment(b1),
        second_moment(b2),
        per_weight_rate(eps),
        *cure,
        debias_rate(b1, b2),
        scale_rate(learning_rate),
        adamod_momental_bound(len_memory=len_memory, average=average),
        diffgrad_friction(friction),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


@recipe
def adabound(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    final_learning_rate: float = 0.1,
    gamma: Hyperparameter = 1e-3,
    base_learning_rate: float | None = None,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled", "constant"] = "l2",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam whose rates are clipped ever closer to that of SGD: ``x - clip(rate, low_t, high_t) m``.

    ``rate = lr sqrt(1 - b2^t) / (1 - b1^t) / (sqrt(v) + eps)``, and in the end the step is that of
    SGD with momentum. Luo, Xiong, Liu & Sun 2019, arXiv:1902.09843. Equals the authors' released
    code (Luolc/AdaBound, package ``adabound`` 0.0.5); the paper has no bias corrections.

    Use it where SGD generalises better but starts slowly, and you know SGD's learning rate.

    Do without it where you do not know that: ``final_learning_rate`` is then one more number to
    tune, and the one that training ends with.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, state_dtype: see the module.
      final_learning_rate: where the bounds close, at the base learning rate; a number greater than
        0. A schedule of the learning rate scales it too, by ``lr_t / base_learning_rate``.
      gamma: how fast they close, greater than 0, per step.
      base_learning_rate: the learning rate that ``final_learning_rate`` goes with, a number greater
        than 0; by default ``learning_rate``, so with a schedule, an array (traced or not) or 0 it
        must be given. (The authors' code divides by the rate at construction, which a warm-up
        starts at 0.)
      decay: "l2", as in the authors' ``AdaBound``; "constant", as in their ``AdaBoundW``;
        "decoupled", as in ``pytorch_optimizer.AdaBound`` (which adds 1e-15 under the root besides).

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adabound
    >>> x = jnp.array([1.0])
    >>> optimizer = adabound(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    final = _final_rate(learning_rate, final_learning_rate, base_learning_rate)
    bracket = adaptive(
        first_moment(b1),
        second_moment(b2),
        per_weight_rate(eps),
        debias_rate(b1, b2),
        scale_rate(learning_rate),
        adabound_dynamic_bound(final, gamma),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


def _final_rate(
    learning_rate: Hyperparameter, final_learning_rate: float, base_learning_rate: float | None
) -> Hyperparameter:
    """Where the bounds close: the schedule of the learning rate scales it too."""
    check_nonnegative(learning_rate=learning_rate)
    if base_learning_rate is None and (not is_fixed(learning_rate) or is_zero(learning_rate)):
        raise ValueError(
            "base_learning_rate must be given, unless learning_rate is a number greater than 0 (an"
            " array or a schedule may start at 0): the rate at which final_learning_rate is meant,"
            f" for instance a schedule's peak. learning_rate is {learning_rate!r}."
        )
    numbers = given(final_learning_rate=final_learning_rate, base_learning_rate=base_learning_rate)
    check_constant(**numbers)
    check_positive(**numbers)
    if base_learning_rate is None:
        return final_learning_rate
    return scaled(learning_rate, final_learning_rate / base_learning_rate)


@recipe
def amsbound(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    final_learning_rate: float = 0.1,
    gamma: Hyperparameter = 1e-3,
    base_learning_rate: float | None = None,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled", "constant"] = "l2",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdaBound with AMSGrad's maximum over the raw v: ``x - clip(rate, low_t, high_t) m``.

    Luo, Xiong, Liu & Sun 2019, arXiv:1902.09843. Equals the authors' ``AdaBound(amsbound=True)``
    (Luolc/AdaBound, package ``adabound`` 0.0.5).

    Use it as ``adabound``.

    Do without it as ``adabound``; the maximum costs a buffer more.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      final_learning_rate, gamma, base_learning_rate, weight_decay, decay: see ``adabound``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import amsbound
    >>> x = jnp.array([1.0])
    >>> optimizer = amsbound(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    final = _final_rate(learning_rate, final_learning_rate, base_learning_rate)
    bracket = adaptive(
        first_moment(b1),
        second_moment(b2),
        amsgrad_max(),
        per_weight_rate(eps),
        debias_rate(b1, b2),
        scale_rate(learning_rate),
        adabound_dynamic_bound(final, gamma),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)
