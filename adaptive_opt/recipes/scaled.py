"""Recipes that scale a tensor as a whole: StableAdamW, NovoGrad.

The arguments are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

from typing import Literal

from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.recipes.successors import Parts, decaying
from adaptive_opt.stages.moments import debias, first_moment, heavy_ball, second_moment
from adaptive_opt.stages.rates import apply_rate, per_weight_rate
from adaptive_opt.stages.tensors import AxisName, inner_weight_decay, norm_moment, rms_bound
from adaptive_opt.stages.weight_decay import Mask, scale_by_learning_rate


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
    decay: Literal["clipped", "decoupled", "l2", "constant"] = "clipped",
    axis_name: AxisName = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW that slows a tensor down while its gradients outgrow its second moment.

    The learning rate of a tensor is divided by ``max(1, RMS(g / sqrt(max(v^, eps^2))))``, see
    ``rms_bound``. Wortsman et al. 2023, arXiv:2304.13013, Algorithm 2. Equals the author's
    ``StableAdamWUnfused`` (version 2, as warner-benjamin/optimi keeps it) and
    ``optimi.StableAdamW``. Both put the correction for the start into b1 and b2; so the rate is
    clipped by the corrected second moment.

    Use it where the loss has spikes, in 16 bits above all, in place of clipping gradients.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      threshold: of the root mean square above which a tensor is slowed; greater than 0.
      weight_decay: at least 0; the author's default is 0.2, optimi's 0.01.
      decay: "clipped": times the learning rate, its schedule and the tensor's factor. "decoupled":
        times the learning rate and its schedule. "l2": added to the gradient. "constant": ``- wd
        x``, times neither.
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
    if decay != "clipped":
        bracket = adaptive(*adam, bound, state_dtype=state_dtype)
        return decaying(bracket, learning_rate, weight_decay, mask, decay)
    inner = inner_weight_decay(weight_decay, mask, times="rms_factor")
    bracket = adaptive(*adam, bound, apply_rate(), inner, state_dtype=state_dtype)
    return bracket, scale_by_learning_rate(learning_rate)


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
    decay: Literal["inner", "decoupled", "l2", "constant"] = "inner",
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

    Args:
      learning_rate, b1, b2, eps, eps_root, mask, state_dtype: see ``adam``.
      weight_decay: at least 0.
      decay: "inner": ``m = b1 m + g / (sqrt(v) + eps) + wd x``, inside the momentum and behind the
        normalisation. "decoupled": times the learning rate and its schedule. "l2": added to the
        gradient. "constant": ``- wd x``, times neither.
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
    inner = (inner_weight_decay(weight_decay, mask),) if decay == "inner" else ()
    bracket = adaptive(
        norm_moment(b2, axis_name=axis_name),
        per_weight_rate(eps, eps_root),
        apply_rate(),
        *inner,
        momentum,
        state_dtype=state_dtype,
    )
    if inner:
        return bracket, scale_by_learning_rate(learning_rate)
    return decaying(bracket, learning_rate, weight_decay, mask, decay)
