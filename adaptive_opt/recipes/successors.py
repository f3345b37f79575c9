"""What came after: AdaBelief, Lion, Yogi, LaProp, ADOPT, AdEMAMix.

The arguments are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import (
    Hyperparameter,
    check_constant,
    check_decay,
    check_nonnegative,
    check_whole,
    is_number,
)
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.stages.averages import (
    belief_moment,
    previous_second_moment,
    slow_average,
    weighted_moment,
    yogi_moment,
)
from adaptive_opt.stages.directions import clip_direction, lion_direction
from adaptive_opt.stages.inner_decay import add_weight_decay
from adaptive_opt.stages.moments import (
    amsgrad_max,
    debias,
    first_moment,
    second_moment,
)
from adaptive_opt.stages.rates import (
    apply_rate,
    debias_rate,
    floored_rate,
    per_weight_rate,
    radam_rectifier,
)
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

    Do without it where eps is not to be tuned: it is added in every step, and where gradients are
    steady it alone decides the rate.

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

    Do without it in long runs of language models, where it falls behind AdamW (Semenov et al. 2025,
    arXiv:2509.01440), and at small batches: its authors find that the gain grows with the batch.

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


@recipe
def yogi(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-3,
    *,
    initial: float = 1e-6,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2"] = "l2",
    convention: Literal["optax", "tensorflow"] = "optax",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam whose rates rise slowly: ``x - lr m^ / (sqrt(v^) + eps)``, v moving by ``|g|^2``.

    ``v_t = v_{t-1} - (1 - b2) sign(v_{t-1} - |g_t|^2) |g_t|^2``, see ``yogi_moment``. Zaheer et al.
    2018 (papers.nips.cc/paper/8186-adaptive-methods-for-nonconvex-optimization), Algorithm 2,
    which corrects nothing for the start; public codes do. The authors published no code.

    Equals ``optax.yogi`` and ``torch_optimizer.Yogi`` once their first moment starts at zero, and
    TensorFlow Addons' ``Yogi``. That ``m`` starts at 1e-6 in the former, like ``v``, so that zero
    gradients move the weights, is not copied.

    Use it where sparse or sudden gradients make Adam's rates jump.

    Do without it where gradients shrink in the course of training: v falls by no more than ``(1 -
    b2) |g|^2`` in a step, and follows slowly.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      initial: ``v_0``, greater than 0.
      weight_decay: at least 0.
      decay: "l2": added to the gradient (torch_optimizer).
      convention: "optax" (and torch_optimizer), or "tensorflow": eps in the eps-hat form.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import yogi
    >>> x = jnp.array([1.0])
    >>> optimizer = yogi(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.990004
    """
    moments = first_moment(b1), yogi_moment(b2, initial=initial)
    listings = {
        "optax": (*moments, debias(b1, b2), per_weight_rate(eps)),
        "tensorflow": (*moments, per_weight_rate(eps), debias_rate(b1, b2)),
    }
    bracket = adaptive(*listings[convention], state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def laprop(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-15,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["after"] = "after",
    convention: Literal["reference", "amsgrad"] = "reference",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with its two lines exchanged: the average of steps ``g / (sqrt(v^) + eps)``.

    Each gradient is divided by the second moment of its own time, and no later one, so that b1 and
    b2 may be anything. Ziyin, Wang & Ueda 2020, arXiv:2002.04839, Algorithm 1. Equals the authors'
    ``laprop.py`` (Z-T-WANG/LaProp-Optimizer): the average weighs each step with its learning rate,
    see ``weighted_moment``, which matters only where the rate is a schedule.

    Use it where Adam diverges at a small b2, or with a b1 close to 1.

    Do without it where the weight decay of an AdamW is to be kept: its own is taken off the new x,
    times neither the learning rate nor its schedule.

    Not copied: ``centered``, and a step at a learning rate of 0, where the authors' code moves by
    the whole average; here nothing moves.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      weight_decay: at least 0.
      decay: "after": ``- wd`` times the new x, times neither the learning rate nor its schedule.
      convention: "reference", or "amsgrad": with the largest second moment so far.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import laprop
    >>> x = jnp.array([1.0])
    >>> optimizer = laprop(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    largest = (amsgrad_max(),) if convention == "amsgrad" else ()
    bracket = adaptive(
        second_moment(b2),
        *largest,
        debias(b2=b2),
        per_weight_rate(eps),
        apply_rate(),
        weighted_moment(b1, learning_rate),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def fourth_root(step: Any) -> jax.Array:
    """ADOPT's limit: ``(t - 1)^(1/4)`` at the t-th gradient."""
    return jnp.asarray(step, float) ** 0.25


@recipe
def adopt(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.9999,
    eps: Hyperparameter = 1e-6,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["inner", "l2"] = "inner",
    convention: Literal["reference", "unclipped"] = "reference",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with the second moment before: the average of ``clip(g_t / max(sqrt(v_{t-1}), eps))``.

    A gradient is divided by the second moment of the step before, then clipped to ``(t -
    1)^(1/4)``, then averaged; nothing is debiased. The first gradient only fills v, see
    ``previous_second_moment``, and nothing moves at it. Taniguchi et al. 2024,
    arXiv:2411.02853, Algorithm 2. Equals the authors' package (iShohei220/adopt) and
    ``optax.contrib.adopt``, whose ``nesterov`` is not copied.

    Use it where Adam's b2 would have to be tuned.

    Do without it where the first steps count: the first gradient moves nothing, and the clipping
    holds down those that follow. Do without the clipping, convention="unclipped", where b2 is .9
    or less: rare, large gradients do not get through it, and x can go to the worst point.

    Args:
      learning_rate, b1, b2, mask, state_dtype: see ``adam``.
      eps: the smallest ``sqrt(v)`` that is divided by; at least 0.
      weight_decay: at least 0.
      decay: "inner": times the learning rate and its schedule, but not at the first gradient
        (``decouple=True``). "l2": added to the gradient (the authors' default).
      convention: "reference", or "unclipped": as first published (``clip_lambda=None``).

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adopt
    >>> x = jnp.array([1.0])
    >>> optimizer = adopt(1e-2)
    >>> _, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> updates, state = optimizer.update(jnp.array([3.0]), state, x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.999
    """
    clip = (clip_direction(fourth_root),) if convention == "reference" else ()
    inner = add_weight_decay(weight_decay, mask, times="moves")
    bracket = adaptive(
        previous_second_moment(b2),
        floored_rate(eps),
        apply_rate(),
        *clip,
        first_moment(b1),
        *((inner,) if decay == "inner" else ()),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


def done_at(step: Any, steps: float) -> jax.Array:
    """How much of a warm-up is done."""
    return jnp.minimum((jnp.asarray(step, float) + 1) / steps, 1.0)


def linear_warmup(end: Any, steps: float) -> Hyperparameter:
    """From 0 to ``end`` in so many steps; a schedule."""
    return lambda step: end * done_at(step, steps)


def half_life_warmup(start: Any, end: Any, steps: float) -> Hyperparameter:
    """A decay from ``start`` to ``end`` in so many steps, linear in the half-life; a schedule."""

    def half_life(decay: Any) -> Any:
        log = np.log if is_number(decay) else jnp.log  # in double
        return math.log(0.5) / log(decay + 1e-8) - 1  # with 1e-8 for 0, as the authors have it

    def schedule(step: Any) -> Any:
        done = done_at(step, steps)
        now = (1 - done) * half_life(start) + done * half_life(end)
        return jnp.where(done == 1, end, 0.5 ** (1 / (now + 1)))

    return schedule


@recipe
def ademamix(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    b3: Hyperparameter = 0.9999,
    alpha: Hyperparameter = 2.0,
    b3_warmup: int | None = None,
    alpha_warmup: int | None = None,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW with a long memory beside the short one: ``x - lr (m^ + alpha s) / (sqrt(v^) + eps)``.

    ``s`` is a second average of the gradient, with b3 close to 1, see ``slow_average``.
    Pagliardini, Ablin & Grangier 2024, arXiv:2409.03137, Algorithm 1. Equals the authors'
    ``pytorch/ademamix.py`` (apple/ml-ademamix) and ``optax.contrib.ademamix``.

    Use it in long trainings, with the two warm-ups as long as the training: a slow average that is
    heavy early makes it diverge.

    Do without it in short trainings: the slow average needs about ``1 / (1 - b3)`` steps to come
    in.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      b3: decay of the slow average, in [0, 1), or a schedule of it.
      alpha: its weight, at least 0, or a schedule of it; the paper takes 5 to 10, the code 2.
      b3_warmup: over how many steps b3 grows from b1, linearly in its half-life; at least 1. b1 and
        b3 must be numbers then.
      alpha_warmup: over how many steps alpha grows from 0, linearly; at least 1.
      weight_decay: at least 0.
      decay: "decoupled": times the learning rate and its schedule.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import ademamix
    >>> x = jnp.array([1.0])
    >>> optimizer = ademamix(1e-2, b3=0.75)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.985
    """
    check_decay(b3=b3)
    check_nonnegative(alpha=alpha)
    if b3_warmup is not None:
        check_constant(b1=b1, b3=b3)
        check_whole(1, b3_warmup=b3_warmup)
        b3 = half_life_warmup(b1, b3, b3_warmup)
    if alpha_warmup is not None:
        check_constant(alpha=alpha)
        check_whole(1, alpha_warmup=alpha_warmup)
        alpha = linear_warmup(alpha, alpha_warmup)
    bracket = adaptive(
        first_moment(b1),
        debias(b1),
        slow_average(b3, alpha),
        second_moment(b2),
        debias(b2=b2),
        per_weight_rate(eps),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)
