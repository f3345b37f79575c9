"""Adam and its kin: one function an algorithm, its body the algorithm's listing.

Every recipe is an ``optax.chain``. Up to ``eps`` the order of the arguments is the same everywhere;
what may follow by position is where optax has it, the rest goes by keyword. Bad values raise a
ValueError that gives the value and the range.

Args:
  learning_rate: a number, a traced scalar or a schedule (a function of the 0-based step number).
  b1, b2, b3: the decay of an average, in [0, 1), a number or a schedule.
  eps: at least 0, in the units of a gradient.
  weight_decay: at least 0 (None: none), a number or a schedule.
  mask: which parameters decay: a tree of bools, or a function that makes one.
  decay: what the decay is multiplied by, in the words of ``stages.weight_decay``.
  convention: which of the public implementations of this name is meant; they differ in the order of
    the stages.
  observers: ``telemetry`` or ``observer``, one or several; they look at the steps and change none.
  state_dtype: the dtype of the buffers; by default the parameter's, float32 for 16-bit parameters.
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
    with_decay,
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
    weight_decay: Hyperparameter | None = None,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    convention: Literal["torch", "paper", "keras", "optax"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam: ``x_{t+1} = x_t - lr m^_t / (sqrt(v^_t) + eps)``.

    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1. Signature and defaults are those of
    ``optax.adam``; so is the state under the "torch" convention, and a checkpoint of one goes on in
    the other.

    Use it without weight decay, or with L2; it is the baseline of all the others.

    Do without it where weights are to decay by themselves: ``adamw``.

    Args:
      learning_rate, b1, b2, eps, state_dtype: see the module.
      eps_root, mu_dtype: see ``scale_by_adam``.
      nesterov: look one step ahead, as in ``optax.nadam``; not with "keras".
      weight_decay, mask: see the module; default: none.
      decay: "l2", as in ``torch.optim.Adam``; or "decoupled", its ``decoupled_weight_decay=True``
        and the ``weight_decay`` of Keras: ``adamw``, which has further forms.
      convention: "torch" (the same as "paper"): equals ``torch.optim.Adam`` for real parameters
        (of complex ones it takes both parts as weights of their own), and ``optax.adam`` in
        float64. "optax": averages and bias corrections in optax's arithmetic: equals ``optax.adam``
        in float32 too, where it is 7e-6 off the rule at b2 = 0.999.
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
    bracket = _adam(b1, b2, eps, eps_root, mu_dtype, nesterov, convention, state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def _adam(
    b1: Hyperparameter,
    b2: Hyperparameter,
    eps: Hyperparameter,
    eps_root: Hyperparameter,
    mu_dtype: DTypeLike | None,
    nesterov: bool,
    convention: str,
    state_dtype: DTypeLike | None,
) -> Optimizer:
    """What comes before the learning rate, in Adam and in AdamW."""
    if convention != "keras":
        return scale_by_adam(
            b1,
            b2,
            eps,
            eps_root,
            mu_dtype,
            nesterov=nesterov,
            as_in_optax=convention == "optax",
            state_dtype=state_dtype,
        )
    if nesterov:
        raise ValueError(
            'nesterov=True is not defined for convention="keras", whose Adam has no such option:'
            ' use "torch", or nadam.'
        )
    return adaptive(
        first_moment(b1, dtype=mu_dtype),
        second_moment(b2),
        per_weight_rate(eps, eps_root),
        debias_rate(b1, b2),
        state_dtype=state_dtype,
    )


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
    decay: Literal["decoupled", "independent", "constant"] = "decoupled",
    convention: Literal["torch", "keras", "optax"] = "torch",
    schedule: optax.Schedule | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with decoupled weight decay: ``x - lr_t (m^_t / (sqrt(v^_t) + eps) + wd x)``.

    Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2. Signature and defaults are those of
    ``optax.adamw``; so is the state under the "torch" convention. Note that ``weight_decay``
    defaults to 1e-4 here and in optax, 1e-2 in PyTorch, 4e-3 in Keras.

    Use it first: with steps enough most others end where it ends.

    Do without it where memory is short: ``low_memory``, ``adam_mini``, ``adafactor`` and ``lion``
    keep less.

    Args:
      learning_rate, b1, b2, eps, state_dtype: see the module.
      eps_root, mu_dtype: see ``scale_by_adam``.
      weight_decay, mask: see the module.
      nesterov: look one step ahead, as in ``optax.nadamw``; not with "keras".
      l1: an l1 decay besides, multiplied by whatever ``weight_decay`` is; see
        ``decoupled_l1_decay``.
      decay: "decoupled": times the learning rate and its schedule, in PyTorch, optax and Keras.
        "independent": the paper's, ``x - eta_t (lr m^_t / (sqrt(v^_t) + eps) + wd x)`` with the
        multiplier eta from ``schedule``; ``learning_rate`` is then a number. With ``warm_restarts``
        and ``normalized_weight_decay`` this is AdamWR; under "keras" it equals the package
        ``keras-adamw``.
        "constant": ``- wd x``, times neither.
      convention: "torch": equals ``torch.optim.AdamW``, and ``optax.adamw`` in float64. "optax":
        the same with optax's arithmetic; equals ``optax.adamw`` in float32 too.
        "keras": Adam in the eps-hat form; equals ``keras.optimizers.AdamW``.
      schedule: the multiplier eta_t of the "independent" decay; default: 1.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamw
    >>> x = jnp.array([1.0])
    >>> optimizer = adamw(1e-2, weight_decay=0.1)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.989
    """
    bracket = _adam(b1, b2, eps, eps_root, mu_dtype, nesterov, convention, state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, schedule=schedule, l1=l1)


@recipe
def amsgrad(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    weight_decay: Hyperparameter | None = None,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    convention: Literal["torch", "optax", "keras", "paper"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with the largest second moment so far: ``x - lr m / (sqrt(max v) + eps)``.

    Reddi, Kale & Kumar 2018, OpenReview ryQu7f-RZ, Algorithm 2.

    Use it where rare, large gradients matter and Adam forgets them.

    Do without it on ordinary tasks, where it is hard to tell from Adam, for a buffer more.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      weight_decay: default: none.
      decay: "l2", as in ``torch.optim.Adam``, or "decoupled", as in ``torch.optim.AdamW``, both
        with ``amsgrad=True``.
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
    how: Any = {"as_in_optax": convention == "optax"}
    mu, nu, rate = first_moment(b1, **how), second_moment(b2, **how), per_weight_rate(eps)
    match convention:
        case "torch":
            listing = mu, nu, amsgrad_max(), debias(b1, b2), rate
        case "optax":
            listing = mu, nu, debias(b1, b2, **how), amsgrad_max(), rate
        case "keras":
            listing = mu, nu, amsgrad_max(), rate, debias_rate(b1, b2)
        case "paper":
            listing = mu, nu, amsgrad_max(), rate
    bracket = adaptive(*listing, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


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
    """Adam whose rate is rectified in the first steps: ``x - lr r_t m^ / (sqrt(v^) + eps)``.

    Liu et al. 2020, arXiv:1908.03265, Algorithm 2; see ``radam_rectifier``. The conventions differ
    below the threshold (the first 5 steps at b2 = 0.999) and in what eps is compared with.

    Use it in place of a warm-up that you would have to tune: it acts much like a linear one over
    ``2 / (1 - b2)`` steps (Ma & Yarats 2019, arXiv:1910.04209).

    Do without it where the learning rate has a warm-up already.

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
    how: Any = {"as_in_optax": convention == "optax"}
    mu, nu, rate = first_moment(b1, **how), second_moment(b2, **how), per_weight_rate(eps, eps_root)
    match convention:
        case "optax":
            rectified = radam_rectifier(b2, threshold=threshold)
            listing = mu, nu, debias(b1, b2, **how), rate, rectified
        case "torch":
            rectified = radam_rectifier(b2, threshold=threshold)
            listing = mu, nu, debias(b1), rate, debias_rate(b2=b2), rectified
        case "reference":
            or_still = radam_rectifier(b2, threshold=threshold, unrectified_rate=0.0)
            listing = mu, nu, debias(b1), rate, debias_rate(b2=b2), or_still
    decay = decay or ("l2" if convention == "torch" else "decoupled")
    if convention == "reference" and decay == "decoupled" and not is_zero(weight_decay):
        weight_decay = _once_rectified(weight_decay, b2, threshold)
    bracket = adaptive(*listing, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def _once_rectified(
    weight_decay: Hyperparameter, b2: Hyperparameter, threshold: Hyperparameter
) -> optax.Schedule:
    """A weight decay that is 0 as long as RAdam's rate is not rectified."""

    def schedule(step: Any) -> Any:
        count = step + 1
        length = simple_average_length(value_at(b2, count, "b2"), count)
        reliable = length >= value_at(threshold, count, "threshold")
        return jnp.where(reliable, value_at(weight_decay, count, "weight_decay"), 0.0)

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
    decay: Literal["l2", "decoupled"] = "l2",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with Nesterov momentum: ``x - lr n_t / (sqrt(v^_t) + eps)``.

    ``n_t`` is the first moment a step ahead, see ``nadam_moment`` and ``nesterov_moment``. Dozat
    2016, OpenReview OM0jvwB8jIp57ZJjtNEZ.

    Use it where Nesterov's look ahead helps; Adam is the baseline to beat.

    Do without it where b1 has a schedule of its own, as in 1cycle: Dozat's warm-up of b1 comes on
    top of it.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      eps_root, mu_dtype: see ``scale_by_adam``.
      convention: "torch": b1 warms up by Dozat's schedule, see ``nadam_moment``, with
        momentum_decay 0.004; equals ``torch.optim.NAdam``.
        "keras": the same with momentum_decay 1; equals ``keras.optimizers.Nadam`` given the same
        eps.
        "optax": no schedule, see ``nesterov_moment``; equals ``optax.nadam``, in its state too.
      momentum_decay: how fast b1 warms up, at least 0, per step; default: the convention's.
      weight_decay: default: none.
      decay: "l2", as in ``torch.optim.NAdam``; or "decoupled", its ``decoupled_weight_decay=True``:
        ``nadamw``, which has further forms.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import nadam
    >>> x = jnp.array([1.0])
    >>> optimizer = nadam(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 5)
    0.98944
    """
    if convention != "optax":
        weight_decay = 0.0 if weight_decay is None else weight_decay
    elif is_zero(weight_decay):
        weight_decay = None  # the state of optax.nadam, whose checkpoints this takes
    bracket = _nadam(b1, b2, eps, eps_root, mu_dtype, momentum_decay, convention, state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def _nadam(
    b1: Hyperparameter,
    b2: Hyperparameter,
    eps: Hyperparameter,
    eps_root: Hyperparameter,
    mu_dtype: DTypeLike | None,
    momentum_decay: Hyperparameter | None,
    convention: str,
    state_dtype: DTypeLike | None,
) -> Optimizer:
    """What comes before the learning rate, in NAdam and in NAdamW."""
    if convention == "optax":
        if momentum_decay is not None:
            raise ValueError('convention="optax" has no momentum_decay: use "torch" or "keras".')
        return scale_by_adam(
            b1, b2, eps, eps_root, mu_dtype, nesterov=True, state_dtype=state_dtype
        )
    usual = {"torch": 0.004, "keras": 1.0}[convention]
    return adaptive(
        first_moment(b1, dtype=mu_dtype),
        second_moment(b2),
        nadam_moment(b1, usual if momentum_decay is None else momentum_decay),
        debias(b2=b2),
        per_weight_rate(eps, eps_root),
        state_dtype=state_dtype,
    )


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
    decay: Literal["decoupled", "independent"] = "decoupled",
    convention: Literal["torch", "keras", "optax"] = "torch",
    momentum_decay: Hyperparameter | None = None,
    schedule: optax.Schedule | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """NAdam with decoupled weight decay: ``x - lr (n_t / (sqrt(v^_t) + eps) + wd x)``.

    Dozat 2016 (OpenReview OM0jvwB8jIp57ZJjtNEZ) and Loshchilov & Hutter 2019 (arXiv:1711.05101).

    Use it as ``nadam``, with weight decay.

    Do without it as ``nadam``.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see the module.
      eps_root, mu_dtype: see ``scale_by_adam``.
      weight_decay: a number or a schedule; default 1e-4, as in optax.
      l1: an l1 decay besides, multiplied by whatever ``weight_decay`` is; see
        ``decoupled_l1_decay``.
      decay: "decoupled": times the learning rate and its schedule. "independent": times
        ``schedule`` but not times the learning rate, which is then a number; under "torch" these
        are the formulas of ``NadamW`` of the package ``keras-adamw`` in its Keras form. (Its
        tf.keras form weights m_t by mu_t where this has mu_{t+1}, and puts eps inside the root; not
        copied.)
      convention: "torch", "keras" and "optax" as in ``nadam``; equal
        ``torch.optim.NAdam(decoupled_weight_decay=True)``, ``keras.optimizers.Nadam`` with its
        ``weight_decay``, and ``optax.nadamw``.
      momentum_decay: see ``nadam``.
      schedule: the multiplier of the "independent" decay, for instance ``warm_restarts``; default:
        1.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import nadamw
    >>> x = jnp.array([1.0])
    >>> optimizer = nadamw(1e-2, weight_decay=0.1)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 5)
    0.98844
    """
    bracket = _nadam(b1, b2, eps, eps_root, mu_dtype, momentum_decay, convention, state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, schedule=schedule, l1=l1)
