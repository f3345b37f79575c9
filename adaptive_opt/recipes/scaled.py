"""Recipes in units of their own: StableAdamW, NovoGrad, LAMB, LARS, AdamP, Adam-atan2.

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
from adaptive_opt.stages.directions import atan2_direction
from adaptive_opt.stages.inner_decay import add_weight_decay
from adaptive_opt.stages.moments import debias, first_moment, heavy_ball, second_moment
from adaptive_opt.stages.projections import radial_projection
from adaptive_opt.stages.rates import apply_rate, per_weight_rate, uniform_rate
from adaptive_opt.stages.tensors import (
    AxisName,
    norm_moment,
    rms_bound,
    trust_ratio,
)
from adaptive_opt.stages.weight_decay import Mask, with_decay


@recipe
def stableadamw(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.99,
    eps: Hyperparameter = 1e-6,
    *,
    threshold: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["clipped"] = "clipped",
    axis_name: AxisName = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW that slows a tensor down while its gradients outgrow v: ``x - lr / max(1, r_t) m^ /
    (sqrt(v^) + eps)``.

    The learning rate of a tensor is divided by ``max(1, RMS(g / sqrt(max(v^, eps^2))))``, see
    ``rms_bound``. Wortsman et al. 2023, arXiv:2304.13013, Algorithm 2. Equals the author's
    ``StableAdamWUnfused`` (version 2, as warner-benjamin/optimi keeps it) and
    ``optimi.StableAdamW``. Both put the correction for the start into b1 and b2; so the rate is
    clipped by the corrected second moment.

    Use it where the loss has spikes, in 16 bits above all, in place of clipping gradients.

    Do without it where nothing spikes: it is AdamW there, with a mean over every tensor in each
    step.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      threshold: of the root mean square above which a tensor is slowed; greater than 0.
      weight_decay: at least 0; the author's default is 0.2, optimi's 0.01.
      decay: "clipped": times the learning rate, its schedule and the tensor's factor.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import stableadamw
    >>> x = jnp.array([1.0])
    >>> optimizer = stableadamw(1e-2, b2=0.75)
    >>> _, state = optimizer.update(jnp.array([0.0]), optimizer.init(x), x)
    >>> updates, state = optimizer.update(jnp.array([3.0]), state, x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.994737
    """
    adam = first_moment(b1), second_moment(b2), debias(b1, b2), per_weight_rate(eps)
    bound = rms_bound(eps, threshold, axis_name=axis_name)
    inner = add_weight_decay(weight_decay, mask, times="rms_factor")
    bracket = adaptive(*adam, bound, apply_rate(), inner, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def novograd(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.95,
    b2: Hyperparameter = 0.98,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["inner"] = "inner",
    convention: Literal["reference", "averaging"] = "reference",
    axis_name: AxisName = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Momentum of gradients that each tensor has normalised: ``m = b1 m + g / (sqrt(v) + eps)``.

    ``v`` is the average of the tensor's squared norm, see ``norm_moment``; one number per tensor.
    Ginsburg et al. 2019, arXiv:1905.11286, Algorithm 1. Equals NVIDIA's TensorFlow code
    (NVIDIA/OpenSeq2Seq, with eps under the root: ``eps=0, eps_root=1e-8``), ``torch_optimizer``'s
    ``NovoGrad`` and ``optax.novograd``, whose b2 defaults to 0.25.

    Use it where memory is short: it keeps one array per parameter. The momentum is a sum: its steps
    are ``1 / (1 - b1)`` times those of an average.

    Do without it where the weights of a tensor need rates of their own, as those of embeddings do:
    a tensor has one.

    Args:
      learning_rate, b1, b2, eps, eps_root, mask, state_dtype: see ``adam``.
      weight_decay: at least 0.
      decay: "inner": ``m = b1 m + g / (sqrt(v) + eps) + wd x``, inside the momentum and behind the
        normalisation.
      convention: "reference", or "averaging": what enters the momentum times ``1 - b1``
        (``grad_averaging=True``).
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import novograd
    >>> x = jnp.array([1.0])
    >>> optimizer = novograd(1e-2)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.99
    """
    momentum = heavy_ball(b1) if convention == "reference" else first_moment(b1)
    bracket = adaptive(
        norm_moment(b2, axis_name=axis_name),
        per_weight_rate(eps, eps_root),
        apply_rate(),
        add_weight_decay(weight_decay, mask),
        momentum,
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def lamb(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-6,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    trust_mask: Mask | None = None,
    decay: Literal["inner"] = "inner",
    convention: Literal["reference", "optax", "cybertronai"] = "reference",
    axis_name: AxisName = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW whose step has the length of the tensor: ``x - lr |x| u / |u|``.

    ``u = m / (sqrt(v) + eps) + wd x``. You et al. 2020, arXiv:1904.00962, Algorithm 2; see
    ``trust_ratio``. Equals the authors' TensorFlow code (google-research/albert), ``optax.lamb``
    and ``pytorch_lamb`` (cybertronai/pytorch-lamb).

    Use it at large batches; a tensor of zeros takes Adam's step. Needs the parameters.

    Do without it at usual batches, and compare at large ones: tuned as well, Adam and Nesterov
    momentum do as well there (Nado et al. 2021, arXiv:2102.06356).

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      weight_decay: at least 0.
      trust_mask: which tensors take the length of their step from their own; the others take
        Adam's step. The authors leave out biases and normalisation: ``decay_mask``.
      decay: "inner": part of u, as above.
      convention: "reference": m and v as they are, as in the authors' code. "optax": corrected for
        their start at zero, as in the listing of the paper's later versions. "cybertronai": as they
        are, and no ``|x|`` counts as more than 10.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import lamb
    >>> x = jnp.array([2.0])
    >>> optimizer = lamb(0.25)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    1.5
    """
    corrected = (debias(b1, b2),) if convention == "optax" else ()
    bracket = adaptive(
        first_moment(b1),
        second_moment(b2),
        *corrected,
        per_weight_rate(eps),
        apply_rate(),
        add_weight_decay(weight_decay, mask),
        trust_ratio(
            largest=10.0 if convention == "cybertronai" else None,
            mask=trust_mask,
            axis_name=axis_name,
        ),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def lars(
    learning_rate: Hyperparameter,
    momentum: Hyperparameter = 0.9,
    *,
    trust_coefficient: Hyperparameter = 1e-3,
    eps: Hyperparameter = 0.0,
    nesterov: bool = False,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    trust_mask: Mask | None = None,
    decay: Literal["l2"] = "l2",
    convention: Literal["optax", "mae"] = "optax",
    axis_name: AxisName = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """SGD with momentum whose gradient has a part of the length of the tensor: ``c |x| d / |d|``.

    ``d = g + wd x``. You, Gitman & Ginsburg 2017, arXiv:1708.03888; see ``trust_ratio``. Equals
    ``optax.lars`` and the LARS of facebookresearch/mae, which is that of MoCo v3. The paper divides
    by ``|g| + wd |x|`` and not by ``|d|``, which is not copied.

    Use it at large batches of images, at learning rates of 1 to 10. Needs the parameters.

    Do without it as ``lamb``, for the same reason.

    Args:
      learning_rate, mask, state_dtype: see ``adam``.
      momentum: in [0, 1), or a schedule of it.
      trust_coefficient: c, at least 0, or a schedule.
      eps: added to ``|d|``; at least 0.
      nesterov: look one step ahead.
      weight_decay: at least 0.
      decay: "l2": added to the gradient, and so part of d.
      trust_mask: which tensors are scaled, the others follow d; see ``lamb``.
      convention: "optax", and the paper: the momentum is one of steps, each with the learning rate
        of its time. "mae": the learning rate of now times the momentum.
      axis_name: see ``second_moment``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import lars
    >>> x = jnp.array([2.0])
    >>> optimizer = lars(0.25, trust_coefficient=1.0)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    1.5
    """
    trust = trust_ratio(trust_coefficient, eps, mask=trust_mask, axis_name=axis_name)
    ball = heavy_ball(momentum, nesterov=nesterov)
    if convention == "mae":
        bracket = adaptive(trust, ball, state_dtype=state_dtype)
        return with_decay(decay, weight_decay, mask, bracket, learning_rate)
    steps = uniform_rate(learning_rate), apply_rate()
    bracket = adaptive(trust, *steps, ball, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


@recipe
def adam_atan2(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.99,
    *,
    scale: Hyperparameter = 1.27,
    b: Hyperparameter = 1.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam without eps: ``x - lr scale atan2(m^, b sqrt(v^))``.

    Everett et al. 2024, arXiv:2407.05872; see ``atan2_direction``. The authors published no code.
    Equals ``AdamAtan2`` of lucidrains/adam-atan2-pytorch, whose defaults these are.

    Use it where gradients are smaller than any eps: it is the same in any unit of the loss.

    Do without it where eps is meant to damp the noise of small gradients: there is none.

    Args:
      learning_rate, b1, b2, mask, state_dtype: see ``adam``.
      scale, b: at least 0; see ``atan2_direction``.
      weight_decay: at least 0.
      decay: "decoupled": times the learning rate and its schedule.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adam_atan2
    >>> x = jnp.array([1.0])
    >>> optimizer = adam_atan2(1e-2, scale=1.0)
    >>> updates, state = optimizer.update(jnp.array([3.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 6)
    0.992146
    """
    moments = first_moment(b1), second_moment(b2), debias(b1, b2)
    bracket = adaptive(*moments, atan2_direction(scale, b), state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def adamp(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    delta: Hyperparameter = 0.1,
    wd_ratio: Hyperparameter = 0.1,
    channels: Literal["last", "first"] = "last",
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["inner"] = "inner",
    axis_name: tuple[()] | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW that does not lengthen weights whose length does not matter: ``u - x <x, u> / |x|^2``.

    Where gradient and weights are nearly at right angles, as in front of a normalisation, the part
    of the update along the weights is dropped, see ``radial_projection``. Heo et al. 2021,
    arXiv:2006.08217, Algorithm 2. Equals the authors' package (clovaai/AdamP) at
    ``channels="first"``, PyTorch's; its ``nesterov`` is not copied.

    Use it in networks with normalisation layers. Needs the parameters.

    Do without it where nothing is normalised: the length of the weights matters there, and a
    gradient at right angles to them is chance.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      delta, wd_ratio, channels, axis_name: see ``radial_projection``.
      weight_decay: at least 0.
      decay: "inner": times the learning rate and its schedule, and ``wd_ratio`` where the update
        was projected.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamp
    >>> x = jnp.eye(2)
    >>> optimizer = adamp(1e-2, delta=9.0)
    >>> updates, state = optimizer.update(jnp.ones((2, 2)), optimizer.init(x), x)
    >>> print(optax.apply_updates(x, updates).round(4))
    [[ 1.   -0.01]
     [-0.01  1.  ]]
    """
    projection = radial_projection(delta, wd_ratio, eps, channels=channels, axis_name=axis_name)
    inner = add_weight_decay(weight_decay, mask, times="projected_decay")
    bracket = adaptive(
        first_moment(b1),
        second_moment(b2),
        debias(b1, b2),
        per_weight_rate(eps),
        apply_rate(),
        projection,
        inner,
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)
