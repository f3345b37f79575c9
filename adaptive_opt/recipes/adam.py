"""One function per algorithm; its body is the algorithm's listing.

Every recipe is an ``optax.chain``. ``learning_rate`` is a number, a traced scalar or a schedule (a
function of the 0-based step number); ``b1``, ``b2``, ``b3`` are decays in [0, 1); ``eps`` is at
least 0, in the units of a gradient; ``weight_decay`` is at least 0, and ``mask`` says which
parameters decay. ``state_dtype`` is the dtype of the buffers; by default the parameter's, float32
for 16-bit parameters. ``observers`` are ``telemetry(...)`` or ``observer(...)``, one or several;
they look at the steps and change none. Where public implementations differ under one name,
``convention`` chooses among them, and the difference is the order of the stages. Bad values raise a
ValueError that gives the value and the range.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import (
    Hyperparameter,
    is_zero,
    value_at,
)
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.stages.adam import scale_by_adam
from adaptive_opt.stages.moments import (
    amsgrad_max,
    debias,
    first_moment,
    nadam_moment,
    second_moment,
)
from adaptive_opt.stages.rates import (
    debias_rate,
    per_weight_rate,
    radam_rectifier,
    simple_average_length,
)
from adaptive_opt.stages.weight_decay import (
    Mask,
    decays,
    decoupled_weight_decay,
    l2_regularization,
    scale_by_learning_rate,
)

Optimizer = optax.GradientTransformationExtraArgs
Parts = tuple[optax.GradientTransformation, ...]


@recipe
def adam(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    convention: Literal["torch", "paper", "keras", "optax"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam: ``x_{t+1} = x_t - lr m^_t / (sqrt(v^_t) + eps)``.

    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1. Signature and defaults are those of
    ``optax.adam``; so is the state under the "torch" convention, and a checkpoint of one goes on in
    the other.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, state_dtype: see the module and
        ``scale_by_adam``.
      nesterov: look one step ahead, as in ``optax.nadam``; not with "keras".
      convention: "torch" (the same as "paper"): equals ``torch.optim.Adam`` for real parameters
        (of complex ones it takes both parts as weights of their own), and ``optax.adam`` in
        float64. "optax": bias corrections in optax's arithmetic: equals ``optax.adam`` in float32
        too, where it is 7e-6 off the rule at b2 = 0.999.
        "keras": the eps-hat form, ``lr sqrt(1 - b2^t) / (1 - b1^t) m_t / (sqrt(v_t) + eps)``;
        equals ``keras.optimizers.Adam`` given the same eps (its default is 1e-7).

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adam
    >>> x = jnp.array([1.0])
    >>> optimizer = optax.chain(optax.clip_by_global_norm(1.0), adam(1e-2))
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    if convention == "keras":
        _refuse_nesterov(nesterov, convention)
        direction = adaptive(
            first_moment(b1, dtype=mu_dtype),
            second_moment(b2),
            per_weight_rate(eps, eps_root),
            debias_rate(b1, b2),
            state_dtype=state_dtype,
        )
    else:
        direction = scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            as_in_optax=convention == "optax",
            state_dtype=state_dtype,
        )
    return direction, scale_by_learning_rate(learning_rate)


@recipe
def adamw(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Hyperparameter = 1e-4,
    mask: Mask | None = None,
    *,
    nesterov: bool = False,
    l1: Hyperparameter | None = None,
    convention: Literal["torch", "keras", "paper", "keras-adamw", "optax"] = "torch",
    schedule: optax.Schedule | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with decoupled weight decay: ``x - lr_t (m^_t / (sqrt(v^_t) + eps) + wd x)``.

    Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2. Signature and defaults are those of
    ``optax.adamw``; so is the state under the "torch" convention. Note that ``weight_decay``
    defaults to 1e-4 here and in optax, 1e-2 in PyTorch, 4e-3 in Keras.

    Args:
      learning_rate, b1, b2, eps, eps_root, mu_dtype, state_dtype: see the module and
        ``scale_by_adam``.
      weight_decay: a number or a schedule; what it is multiplied by is the convention's matter.
      mask: which parameters decay.
      nesterov: look one step ahead, as in ``optax.nadamw``; not with "keras".
      l1: an l1 decay besides, multiplied by whatever ``weight_decay`` is; see
        ``decoupled_l1_decay``.
      convention: "torch": decay times the learning rate and its schedule; equals
        ``torch.optim.AdamW``, and ``optax.adamw`` in float64. "optax": the same with optax's
        arithmetic; equals ``optax.adamw`` in float32 too.
        "keras": the same decay, Adam in the eps-hat form; equals ``keras.optimizers.AdamW``.
        "paper": ``x - eta_t (lr m^_t / (sqrt(v^_t) + eps) + wd x)`` with the multiplier eta from
        ``schedule``: the decay follows it but not the base learning rate, which is then a number.
        With ``warm_restarts`` and ``normalized_weight_decay`` this is AdamWR.
        "keras-adamw": the same decay, Adam in the eps-hat form; equals the package ``keras-adamw``.
      schedule: the multiplier eta_t of the last two conventions, a schedule; default: 1.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamw
    >>> x = jnp.array([1.0])
    >>> optimizer = adamw(1e-2, weight_decay=0.1)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.989
    """
    if convention in ("keras", "keras-adamw"):
        _refuse_nesterov(nesterov, convention)
        direction = adaptive(
            first_moment(b1, dtype=mu_dtype),
            second_moment(b2),
            per_weight_rate(eps, eps_root),
            debias_rate(b1, b2),
            state_dtype=state_dtype,
        )
    else:
        direction = scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            as_in_optax=convention == "optax",
            state_dtype=state_dtype,
        )
    decay = decays(weight_decay, l1, mask)
    by_schedule = ("paper", "keras-adamw")
    return direction, *_decay_and_rate(learning_rate, decay, by_schedule, schedule, convention)


def _refuse_nesterov(nesterov: bool, convention: str) -> None:
    if nesterov:
        raise ValueError(
            f"nesterov=True is not defined for convention={convention!r}, whose Adam has no such"
            ' option: use "torch", or nadam.'
        )


def _decay_and_rate(
    learning_rate: Hyperparameter,
    decay: tuple[Optimizer, ...],
    by_schedule: tuple[str, ...],
    schedule: optax.Schedule | None,
    convention: str,
) -> tuple[Optimizer, ...]:
    """Decoupled decay times the learning rate or, by schedule, times the schedule alone."""
    if convention not in by_schedule:
        if schedule is not None:
            raise ValueError(
                f"schedule= belongs to the convention {' or '.join(map(repr, by_schedule))}; under"
                f" {convention!r} give the schedule as learning_rate."
            )
        return *decay, scale_by_learning_rate(learning_rate)
    if callable(learning_rate):
        raise ValueError(
            "this convention multiplies the base learning rate, but not the decay, by"
            " learning_rate: give a number, and its course as schedule=."
        )
    return (
        scale_by_learning_rate(learning_rate, flip_sign=False),
        *decay,
        scale_by_learning_rate(1.0 if schedule is None else schedule),
    )


@recipe
def amsgrad(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    convention: Literal["torch", "optax", "keras", "paper"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with the largest second moment so far: ``x - lr m / (sqrt(max v) + eps)``.

    Reddi, Kale & Kumar 2018, OpenReview ryQu7f-RZ, Algorithm 2.

    Args:
      learning_rate, b1, b2, eps, state_dtype: see the module.
      convention: where the maximum stands among the bias corrections.
        "torch": over the raw v, then both corrections, so that the rate of a weight can still grow;
        equals ``torch.optim.Adam(amsgrad=True)``.
        "optax": over the corrected v^, the early values of which stay in the maximum for good;
        equals ``optax.amsgrad``.
        "keras": over the raw v, corrections in the eps-hat form; equals
        ``keras.optimizers.Adam(amsgrad=True)``.
        "paper": over the raw v, no corrections; equals ``optax.amsgrad`` with
        ``bias_correction_mu`` and ``bias_correction_nu`` False.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import amsgrad
    >>> x = jnp.array([1.0])
    >>> optimizer = amsgrad(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    mu, nu, rate = first_moment(b1), second_moment(b2), per_weight_rate(eps)
    listings = {
        "torch": (mu, nu, amsgrad_max(), debias(b1, b2), rate),
        "optax": (mu, nu, debias(b1, b2, as_in_optax=True), amsgrad_max(), rate),
        "keras": (mu, nu, amsgrad_max(), rate, debias_rate(b1, b2)),
        "paper": (mu, nu, amsgrad_max(), rate),
    }
    return (
        adaptive(*listings[convention], state_dtype=state_dtype),
        scale_by_learning_rate(learning_rate),
    )


@recipe
def radam(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    threshold: Hyperparameter = 5.0,
    *,
    convention: Literal["torch", "optax", "reference"] = "torch",
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam whose rate is rectified for the unreliable second moment of the first steps.

    Liu et al. 2020, arXiv:1908.03265, Algorithm 2; see ``radam_rectifier``. The conventions differ
    below the threshold (the first 5 steps at b2 = 0.999) and in what eps is compared with.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      eps_root: added inside the root; at least 0.
      threshold: the length of average from which on the rate is rectified, at least 4.
      convention: "torch": below the threshold ``lr m^_t``; eps-hat form; equals
        ``torch.optim.RAdam``.
        "optax": below the threshold ``lr m^_t``; ``lr r_t m^_t / (sqrt(v^_t + eps_root) + eps)``;
        equals ``optax.radam``, whose float32 factor is 0.6 % off at steps 6 and 7 (this one is
        not).
        "reference": below the threshold nothing moves, not even by weight decay; eps-hat form;
        equals the authors' code (LiyuanLucasLiu/RAdam, ``degenerated_to_sgd=False``).
      weight_decay: at least 0.
      decay: "l2", added to the gradient (default under "torch"), or "decoupled", times the learning
        rate (default under the others). Under "reference" the decoupled decay waits for the
        threshold; the L2 term is part of the gradient, and of its moments, from the first step on.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import radam
    >>> x = jnp.array([1.0])
    >>> optimizer = radam(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.97
    """
    mu, nu, rate = first_moment(b1), second_moment(b2), per_weight_rate(eps, eps_root)
    eps_hat = (mu, nu, debias(b1), rate, debias_rate(b2=b2))
    rectified = radam_rectifier(b2, threshold=threshold)
    or_still = radam_rectifier(b2, threshold=threshold, unrectified_rate=0.0)
    listings = {
        "torch": (*eps_hat, rectified),
        "optax": (mu, nu, debias(b1, b2, as_in_optax=True), rate, rectified),
        "reference": (*eps_hat, or_still),
    }
    bracket = adaptive(*listings[convention], state_dtype=state_dtype)
    scale = scale_by_learning_rate(learning_rate)
    if (decay or ("l2" if convention == "torch" else "decoupled")) == "l2":
        return l2_regularization(weight_decay, mask), bracket, scale
    if convention == "reference" and not is_zero(weight_decay):
        weight_decay = _once_rectified(weight_decay, b2, threshold)
    return bracket, decoupled_weight_decay(weight_decay, mask), scale


def _once_rectified(
    weight_decay: Hyperparameter, b2: Hyperparameter, threshold: Hyperparameter
) -> optax.Schedule:
    """A weight decay that is 0 as long as RAdam's rate is not rectified."""

    def schedule(step: Any) -> Any:
        count = step + 1
        length = simple_average_length(value_at(b2, count), count)
        reliable = length >= value_at(threshold, count)
        return jnp.where(reliable, value_at(weight_decay, count), 0.0)

    return schedule


@recipe
def nadam(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    convention: Literal["torch", "keras", "optax"] = "torch",
    momentum_decay: Hyperparameter | None = None,
    weight_decay: Hyperparameter | None = None,
    mask: Mask | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with Nesterov momentum.

    Dozat 2016, OpenReview OM0jvwB8jIp57ZJjtNEZ.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      eps_root, mu_dtype: see ``scale_by_adam``.
      convention: "torch": b1 warms up by Dozat's schedule, see ``nadam_moment``, with
        momentum_decay 0.004; equals ``torch.optim.NAdam``.
        "keras": the same with momentum_decay 1; equals ``keras.optimizers.Nadam`` given the same
        eps.
        "optax": no schedule, see ``nesterov_moment``; equals ``optax.nadam``, in its state too.
      momentum_decay: how fast b1 warms up, at least 0, per step; default: the convention's.
      weight_decay: L2, as in ``torch.optim.NAdam``; at least 0; default: none. For decoupled decay
        see ``nadamw``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import nadam
    >>> x = jnp.array([1.0])
    >>> optimizer = nadam(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 5)
    0.98944
    """
    l2 = (l2_regularization(0.0 if weight_decay is None else weight_decay, mask),)
    scale = scale_by_learning_rate(learning_rate)
    if convention == "optax":
        _refuse_momentum_decay(momentum_decay)
        if weight_decay is None or is_zero(weight_decay):
            l2 = ()  # the state of optax.nadam, whose checkpoints this takes
        direction = scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=True, state_dtype=state_dtype
        )
        return *l2, direction, scale
    usual = {"torch": 0.004, "keras": 1.0}[convention]
    direction = adaptive(
        first_moment(b1, dtype=mu_dtype),
        second_moment(b2),
        nadam_moment(b1, usual if momentum_decay is None else momentum_decay),
        debias(b2=b2),
        per_weight_rate(eps, eps_root),
        state_dtype=state_dtype,
    )
    return *l2, direction, scale


@recipe
def nadamw(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: Hyperparameter = 1e-4,
    mask: Mask | None = None,
    *,
    l1: Hyperparameter | None = None,
    convention: Literal["torch", "keras", "optax", "keras-adamw"] = "torch",
    momentum_decay: Hyperparameter | None = None,
    schedule: optax.Schedule | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """NAdam with decoupled weight decay.

    Dozat 2016 and Loshchilov & Hutter 2019 (arXiv:1711.05101).

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      eps_root, mu_dtype: see ``scale_by_adam``.
      weight_decay: a number or a schedule; default 1e-4, as in optax.
      l1: an l1 decay besides, multiplied by whatever ``weight_decay`` is; see
        ``decoupled_l1_decay``.
      convention: "torch", "keras" and "optax" as in ``nadam``; equal
        ``torch.optim.NAdam(decoupled_weight_decay=True)``, ``keras.optimizers.Nadam`` with its
        ``weight_decay``, and ``optax.nadamw``.
        "keras-adamw": as "torch", with the decay times ``schedule`` but not times the learning
        rate; the formulas of ``NadamW`` of the package ``keras-adamw`` in its Keras form. (Its
        tf.keras form weights m_t by mu_t where this has mu_{t+1}, and puts eps inside the root; not
        copied.)
      momentum_decay: see ``nadam``.
      schedule: the multiplier of "keras-adamw", for instance ``warm_restarts``; default: 1.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import nadamw
    >>> x = jnp.array([1.0])
    >>> optimizer = nadamw(1e-2, weight_decay=0.1)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 5)
    0.98844
    """
    decay = _decay_and_rate(
        learning_rate, decays(weight_decay, l1, mask), ("keras-adamw",), schedule, convention
    )
    if convention == "optax":
        _refuse_momentum_decay(momentum_decay)
        direction = scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=True, state_dtype=state_dtype
        )
        return direction, *decay
    usual = {"torch": 0.004, "keras": 1.0, "keras-adamw": 0.004}[convention]
    direction = adaptive(
        first_moment(b1, dtype=mu_dtype),
        second_moment(b2),
        nadam_moment(b1, usual if momentum_decay is None else momentum_decay),
        debias(b2=b2),
        per_weight_rate(eps, eps_root),
        state_dtype=state_dtype,
    )
    return direction, *decay


def _refuse_momentum_decay(momentum_decay: Hyperparameter | None) -> None:
    if momentum_decay is not None:
        raise ValueError('convention="optax" has no momentum_decay: use "torch" or "keras".')
