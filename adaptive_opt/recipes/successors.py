"""What came after: AdaBelief, Lion.

The arguments are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

from typing import Literal

import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.stages.averages import belief_moment
from adaptive_opt.stages.directions import lion_direction
from adaptive_opt.stages.moments import amsgrad_max, debias, first_moment
from adaptive_opt.stages.rates import debias_rate, per_weight_rate, radam_rectifier
from adaptive_opt.stages.weight_decay import (
    Mask,
    with_decay,
)

Parts = tuple[optax.GradientTransformation, ...]


@recipe
def adabelief(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-16,
    eps_root: Hyperparameter | None = None,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled", "l2", "constant"] = "decoupled",
    convention: Literal["reference", "rectified", "amsgrad"] = "reference",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam that trusts a gradient as far as it was expected: ``x - lr m^ / (sqrt(s^) + eps)``.

    ``s`` is the average of ``(g_t - m_t)^2``, see ``belief_moment``. Zhuang et al. 2020,
    arXiv:2010.07468, Algorithm 2. Equals the authors' package ``adabelief-pytorch`` 0.2.1
    (juntang-zhuang/Adabelief-Optimizer) and, given its ``eps_root``, ``optax.adabelief``.

    Use it where Adam's steps are too small along directions of large but steady gradients.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, state_dtype: see ``adam``.
      eps_root: added to ``s`` in every step, and kept there; default: ``eps``, as in the package.
      decay: "decoupled"; "l2", the package's ``weight_decouple=False``; "constant", its
        ``fixed_decay=True``.
      convention: "reference": the package with ``rectify=False``. "rectified": its default, with
        RAdam's factor and eps in the eps-hat form; below the threshold ``lr m^``. "amsgrad": with
        the largest ``s`` so far (``amsgrad=True, rectify=False``; with ``rectify=True`` the package
        ignores it).

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adabelief
    >>> x = jnp.array([1.0])
    >>> optimizer = adabelief(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.988889
    """
    mu, rate = first_moment(b1), per_weight_rate(eps)
    belief = belief_moment(b2, eps if eps_root is None else eps_root)
    match convention:
        case "reference":
            listing = mu, belief, debias(b1, b2), rate
        case "rectified":
            listing = mu, belief, debias(b1), rate, debias_rate(b2=b2), radam_rectifier(b2)
        case "amsgrad":
            listing = mu, belief, amsgrad_max(), debias(b1, b2), rate
    bracket = adaptive(*listing, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def lion(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.99,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled", "l2", "constant"] = "decoupled",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """The sign of the momentum: ``x - lr (sign(b1 m + (1 - b1) g) + wd x)``.

    Chen et al. 2023, arXiv:2302.06675, Algorithm 2; see ``lion_direction``. Equals the authors'
    ``lion_pytorch.py`` and ``lion_optax.py`` (google/automl) and ``optax.lion``, whose weight decay
    defaults to 1e-3. All weights move by the learning rate: the authors take it 3 to 10 times
    smaller than AdamW's, and the weight decay as much larger.

    Use it where memory is short: it keeps one array per parameter.

    Args:
      learning_rate, weight_decay, mask, state_dtype: see ``adam``.
      b1, b2: see ``lion_direction``; in [0, 1).
      decay: "decoupled", as in the authors' code; "l2" and "constant" as in
        ``pytorch_optimizer.Lion``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import lion
    >>> x = jnp.array([1.0])
    >>> optimizer = lion(0.125, weight_decay=0.5)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> float(optax.apply_updates(x, updates)[0])
    0.8125
    """
    bracket = adaptive(lion_direction(b1, b2), state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)
