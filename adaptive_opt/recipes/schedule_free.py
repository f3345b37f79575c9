"""Optimizers without a schedule of the learning rate: Schedule-Free SGD, AdamW, RAdam and Plus.

The arguments that are not explained are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter, check_whole, value_at
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.core.stage import Stage
from adaptive_opt.stages.inner_decay import add_weight_decay
from adaptive_opt.stages.moments import debias, first_moment, second_moment
from adaptive_opt.stages.rates import per_weight_rate, radam_rectifier, rectification
from adaptive_opt.stages.schedule_free import schedule_free, warmed_up
from adaptive_opt.stages.weight_decay import (
    Mask,
    l2_regularization,
)

Parts = tuple[optax.GradientTransformation, ...]


@recipe
def schedule_free_sgd(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    *,
    warmup_steps: int = 0,
    weight_power: Hyperparameter = 2.0,
    step_power: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2"] = "l2",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """SGD whose averaged iterates need no schedule: ``z - lr (g(y) + wd y)``.

    Defazio et al. 2024, arXiv:2405.15682; see ``schedule_free``. Equals the authors'
    ``SGDScheduleFree`` (facebookresearch/schedule_free).

    Use it where you do not want to say in advance how long you train: at any step the average is
    about as good as the end of a schedule of that length. The parameters that are trained are
    ``y``; evaluate and export ``evaluation_params(state, params)``, the average. Batch statistics
    (BatchNorm) belong to y: before an evaluation let the model see some fifty training batches with
    the average, or its normalisation is that of other weights.

    Do without it where the number of steps is known and a schedule that ends near 0 can be tuned,
    and where the parameters that are trained must be those that are evaluated.

    Args:
      learning_rate: constant; far larger than with a schedule, 10 to 50 times SGD's with momentum.
      b1: in the place of a momentum, between 0 and 1; see ``schedule_free``.
      warmup_steps: the learning rate rises linearly over so many steps, and is multiplied by this
        if it is a schedule.
      weight_power, step_power: see ``schedule_free``; the authors' ``weight_lr_power``, ``r``.
      weight_decay, mask, state_dtype: see ``adam``.
      decay: "l2", of y, which is that of z times the learning rate.

    State: see ``schedule_free``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import evaluation_params, schedule_free_sgd
    >>> x = jnp.array([1.0])
    >>> optimizer = schedule_free_sgd(0.5)
    >>> updates, state = optimizer.update(jnp.array([1.0]), optimizer.init(x), x)
    >>> print(evaluation_params(state, optax.apply_updates(x, updates)))
    [0.5]
    """
    check_whole(0, warmup_steps=warmup_steps)
    free = schedule_free(
        warmed_up(learning_rate, warmup_steps),
        b1,
        weight_power=weight_power,
        step_power=step_power,
    )
    return _downhill((free,), state_dtype, l2_regularization(weight_decay, mask))


@recipe
def schedule_free_adamw(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    warmup_steps: int = 0,
    inner_momentum: Hyperparameter | None = None,
    weight_power: Hyperparameter = 2.0,
    step_power: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW without its first moment, averaged: ``z - lr (g / (sqrt(v^) + eps) + wd y)``.

    Defazio et al. 2024, arXiv:2405.15682, Algorithm 1; see ``schedule_free``. Equals the authors'
    ``AdamWScheduleFree`` (facebookresearch/schedule_free); it keeps as much as AdamW.

    Use it as ``schedule_free_sgd``, which says what to evaluate with, and what BatchNorm needs.

    Do without it as ``schedule_free_sgd``.

    Args:
      learning_rate: constant; 1 to 10 times AdamW's.
      b1: see ``schedule_free``; 0.9, for long runs 0.95 or 0.98.
      b2, eps, weight_decay, mask, state_dtype: see ``adam``.
      warmup_steps: see ``schedule_free_sgd``; of use here, about 5 % of the steps.
      inner_momentum: the decay of a first moment, corrected, in the place of g; None: none is kept.
      weight_power, step_power: see ``schedule_free_sgd``.
      decay: "decoupled": of y, taken off z, times the learning rate.

    State: ``nu``, and that of ``schedule_free``; ``mu`` with ``inner_momentum``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import evaluation_params, schedule_free_adamw
    >>> x = jnp.array([1.0])
    >>> optimizer = schedule_free_adamw(0.5)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> print(evaluation_params(state, optax.apply_updates(x, updates)))
    [0.5]
    """
    check_whole(0, warmup_steps=warmup_steps)
    listing = (
        *(() if inner_momentum is None else (first_moment(inner_momentum),)),
        second_moment(b2),
        debias(inner_momentum, b2),
        per_weight_rate(eps),
        add_weight_decay(weight_decay, mask),
        schedule_free(
            warmed_up(learning_rate, warmup_steps),
            b1,
            weight_power=weight_power,
            step_power=step_power,
        ),
    )
    return _downhill(listing, state_dtype)


@recipe
def schedule_free_radam(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    silent_sgd_phase: bool = True,
    weight_power: Hyperparameter = 2.0,
    step_power: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """``schedule_free_adamw`` with RAdam's factor as its warm-up: ``z - lr r_t (...)``.

    Defazio et al. 2024, arXiv:2405.15682, with Liu et al. 2020, arXiv:1908.03265. The factor (see
    ``radam_rectifier``, threshold 4) is part of the learning rate, and so of the
    weights in the average. Equals ``RAdamScheduleFree`` (facebookresearch/schedule_free), which has
    been added to the authors' code after the paper.

    Use it where you would rather not choose a warm-up; else as ``schedule_free_sgd``, which says
    what to evaluate with, and what BatchNorm needs.

    Do without it as ``schedule_free_sgd``.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, decay, state_dtype: see
        ``schedule_free_adamw``.
      silent_sgd_phase: below the threshold (the first 4 steps at b2 = 0.999) nothing moves, not
        even by weight decay; False: a step of SGD, ``lr g``.
      weight_power, step_power: see ``schedule_free_sgd``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import schedule_free_radam
    >>> optimizer, x = schedule_free_radam(0.5, silent_sgd_phase=False), jnp.array([1.0])
    >>> print(x + optimizer.update(jnp.array([1.0]), optimizer.init(x), x)[0])
    [0.5]
    """
    is_reliable, factor = rectification(b2, _THRESHOLD)

    def rectified(step: Any) -> Any:
        before = 0.0 if silent_sgd_phase else 1.0
        factors = jnp.where(is_reliable(step), factor(step), before)
        return value_at(learning_rate, step + 1, "learning_rate") * factors

    listing = (
        second_moment(b2),
        debias(b2=b2),
        per_weight_rate(eps),
        radam_rectifier(b2, threshold=_THRESHOLD, rectify=False),
        add_weight_decay(weight_decay, mask),
        schedule_free(rectified, b1, weight_power=weight_power, step_power=step_power),
    )
    return _downhill(listing, state_dtype)


@recipe
def schedule_free_plus(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.95,
    eps: Hyperparameter = 1e-8,
    *,
    polyak: bool = True,
    inner_momentum: Hyperparameter = 0.9,
    averaging_start: int = 0,
    weight_power: Hyperparameter = 2.0,
    step_power: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["corrected"] = "corrected",
    axis_name: str | tuple[str, ...] | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamC, Schedule-Free and Polyak's rate: ``z - lr_t (m^ / (sqrt(v^) + eps) + lr_t wd y)``.

    ``lr_t`` is the learning rate times ``max(0, f + b1 g (z - x)) / (sqrt(pi / 2) |g|_1)``, so that
    ``update`` needs the loss: ``update(gradients, state, params, value=loss)``. Defazio 2026,
    arXiv:2605.19095. Equals the authors' ``AdamCScheduleFreePlusPaper`` with its ``polyak_beta=0``
    (facebookresearch/schedule_free), whose learning rate, however, is at least eps. It keeps one
    buffer more than AdamW, theirs three.

    Use it as ``schedule_free_sgd``, which says what to evaluate with, for losses whose least value
    is near 0. On several devices ``value`` is the mean over all of them.

    Do without it where the least loss is far from 0, which Polyak's rate takes it for:
    ``polyak=False``, or ``schedule_free_adamw``.

    Args:
      learning_rate: a factor of Polyak's rate, 1 at first; a schedule for a warm-up.
      b1: see ``schedule_free``, the authors' ``sf_beta1``; a schedule, to anneal it.
      b2, eps, mask, state_dtype: see ``adam``.
      polyak: False: the learning rate is like AdamW's, and no loss is needed.
      inner_momentum: the decay of Adam's first moment.
      averaging_start: the average starts after so many steps, once or twice the warm-up; the
        authors' ``c_warmup``.
      weight_power, step_power: see ``schedule_free_sgd``.
      weight_decay: of y, at least 0; 20 or 50, say, where AdamW's is 0.1.
      decay: "corrected": times the learning rate, Polyak's included, twice.
      axis_name: under ``shard_map`` or ``pmap`` the axes that split the parameters, see
        ``second_moment``.

    State: ``mu``, ``nu``, and that of ``schedule_free``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import schedule_free_plus
    >>> optimizer, x = schedule_free_plus(1.0), jnp.array([3.0])
    >>> loss, g = jnp.abs(x[0]), jnp.array([1.0])
    >>> print((x + optimizer.update(g, optimizer.init(x), x, value=loss)[0]).round(3))
    [0.606]
    """
    listing = (
        first_moment(inner_momentum),
        second_moment(b2),
        debias(inner_momentum, b2),
        per_weight_rate(eps),
        schedule_free(
            learning_rate,
            b1,
            weight_power=weight_power,
            step_power=step_power,
            averaging_start=averaging_start,
            polyak=polyak,
            weight_decay=weight_decay,
            mask=mask,
            axis_name=axis_name,
        ),
    )
    return _downhill(listing, state_dtype)


_THRESHOLD = 4.0


def _downhill(listing: tuple[Stage, ...], state_dtype: DTypeLike | None, *first: Any) -> Parts:
    return *first, adaptive(*listing, state_dtype=state_dtype), optax.scale(-1.0)
