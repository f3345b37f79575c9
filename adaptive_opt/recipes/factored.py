"""Recipes whose second moment has fewer numbers than weights: Adafactor, Adam-mini.

The arguments are those of ``recipes.adam``, which see.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import Hyperparameter, is_fixed, is_zero
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.recipes.adam import Parts
from adaptive_opt.stages.factored import (
    Blocks,
    FactoredAxes,
    block_moment,
    blocks_by_name,
    factored_moment,
)
from adaptive_opt.stages.matrices import Axes, Layout
from adaptive_opt.stages.modifiers import clip_update_rms
from adaptive_opt.stages.moments import debias, first_moment
from adaptive_opt.stages.rates import apply_rate, per_weight_rate, uniform_rate
from adaptive_opt.stages.tensors import scale_by_parameter
from adaptive_opt.stages.weight_decay import Mask, with_decay
from adaptive_opt.wrappers.schedules import growing_memory


class _Form(NamedTuple):
    """What the forms of Adafactor take where nothing is given."""

    b1: float
    largest_b2: float
    threshold: float
    min_dim_size_to_factor: int
    scale_by_parameter: bool


_FORMS = {
    "reference": _Form(0.0, 1.0, 1.0, 128, True),
    "big_vision": _Form(0.9, 0.999, math.inf, 32, False),
}


@recipe
def adafactor(
    learning_rate: Hyperparameter,
    b1: Hyperparameter | None = None,
    decay_rate: float = 0.8,
    eps: Hyperparameter = 1e-30,
    *,
    largest_b2: float | None = None,
    threshold: Hyperparameter | None = None,
    multiply_by_parameter_scale: bool | None = None,
    eps_scale: Hyperparameter = 1e-3,
    min_dim_size_to_factor: int | None = None,
    axes: FactoredAxes = "longest",
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled", "constant"] = "decoupled",
    convention: Literal["reference", "big_vision"] = "reference",
    axis_name: Axes = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """RMSprop with a second moment of rows and columns: ``x - lr RMS(x) u / max(1, RMS(u))``.

    ``RMS(x)`` counts at least as ``eps_scale``. ``u = g / sqrt(v)``, where v comes from averages
    over rows and columns, see ``factored_moment``, whose memory grows, see ``growing_memory``.
    Shazeer & Stern 2018, arXiv:1804.04235, Algorithms 4 and 5. Equals ``optax.adafactor``, the
    Adafactor of Mesh TensorFlow, which T5 was trained with, and with ``axes="last",
    min_dim_size_to_factor=1`` that of transformers; convention="big_vision" equals
    ``scale_by_adafactor`` of google-research/big_vision. All but transformers calculate the decay
    of v in float32 always. Not copied: ``decay_offset``, and transformers' weight decay times the
    scale of the parameter.

    Use it where memory is short: a matrix of n x m keeps n + m numbers, and no momentum.

    Do without it where AdamW's settings are to be kept: the learning rate is a part of each tensor
    here, and updates are clipped; "big_vision" is the form that takes them.

    Args:
      learning_rate: a part of each tensor's weights, as it is multiplied by their root mean square:
        1e-3 to 1e-2, or the paper's ``relative_step()``. Under "big_vision" as AdamW's.
      b1: the decay of the momentum; at the number 0 there is none. Default: 0; "big_vision" 0.9.
      decay_rate: the exponent of ``growing_memory``.
      eps: see ``factored_moment``.
      largest_b2: see ``growing_memory``. Default: 1; "big_vision" 0.999.
      threshold: no update's root mean square is more, see ``clip_update_rms``; ``math.inf`` clips
        nothing. Default: 1; "big_vision" ``math.inf``.
      multiply_by_parameter_scale: see ``scale_by_parameter``. Default: yes; "big_vision" no.
      eps_scale: the least scale, in the units of a weight.
      min_dim_size_to_factor: see ``factored_moment``. Default: 128, "big_vision" 32.
      axes: see ``factored_moment``.
      weight_decay: at least 0.
      decay: "decoupled": times the learning rate and its schedule, as in transformers without
        ``scale_parameter``; "constant": times neither, as in optax.
      convention: "reference": the momentum is one of steps, each with the learning rate and scale
        of its time. "big_vision" (Zhai et al. 2021, arXiv:2106.04560): of what is multiplied by
        both now.
      axis_name: see ``factored_moment``.
      state_dtype: see ``adam``.

    State: ``nu_rows`` and ``nu_columns`` for what is factored, ``nu`` for the rest, and ``mu``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adafactor
    >>> optimizer, x = adafactor(0.25, min_dim_size_to_factor=2), jnp.full((2, 2), 4.0)
    >>> updates, state = optimizer.update(x, optimizer.init(x), x)
    >>> print(updates)
    [[-1. -1.]
     [-1. -1.]]
    """
    form = _FORMS[convention]
    b1 = form.b1 if b1 is None else b1
    threshold = form.threshold if threshold is None else threshold
    least = form.min_dim_size_to_factor
    if min_dim_size_to_factor is not None:
        least = min_dim_size_to_factor
    scaled = form.scale_by_parameter
    if multiply_by_parameter_scale is not None:
        scaled = multiply_by_parameter_scale
    memory = growing_memory(
        decay_rate, largest=form.largest_b2 if largest_b2 is None else largest_b2
    )
    unlimited = is_fixed(threshold) and threshold == math.inf
    update = (
        factored_moment(memory, eps, min_dim_size_to_factor=least, axes=axes, axis_name=axis_name),
        per_weight_rate(0.0),
        apply_rate(),
        *(() if unlimited else (clip_update_rms(threshold, axis_name=axis_name),)),
    )
    scale = (scale_by_parameter(eps_scale, axis_name=axis_name),) if scaled else ()
    momentum = () if is_zero(b1) else (first_moment(b1),)
    if convention == "big_vision":
        bracket = adaptive(*update, *momentum, *scale, state_dtype=state_dtype)
        return with_decay(decay, weight_decay, mask, bracket, learning_rate)
    steps = *scale, uniform_rate(learning_rate), apply_rate()
    bracket = adaptive(*update, *steps, *momentum, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


@recipe
def adam_mini(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    blocks: Blocks | None = None,
    head_size: int | None = None,
    layout: Layout = "in-out",
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["decoupled"] = "decoupled",
    axis_name: Axes = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """AdamW with one rate for each block of weights: ``x - lr m^ / (sqrt(mean of v^) + eps)``.

    The blocks are those of the Hessian of a Transformer: heads, tokens, neurons, see
    ``block_moment``. Zhang et al. 2024, arXiv:2406.16793, Algorithm 1. Equals the authors'
    ``Adam_mini`` (zyushun/Adam-mini, version 1.1.1) at ``layout="out-in"`` and ``head_size`` of
    ``dim / n_heads``. That decays no biases and normalisations: give ``mask=decay_mask``.

    Use it for AdamW's results in half of its memory, with the learning rates of AdamW.

    Do without it where parameters have names that ``blocks_by_name`` does not know: such a
    parameter has a single rate.

    Args:
      learning_rate, b1, b2, eps, mask, state_dtype: see ``adam``.
      blocks: a word for each parameter, see ``block_moment``; default: ``blocks_by_name``. A
        parameter whose name it does not know has one rate.
      head_size: outputs of an attention head; needed where a parameter goes by heads.
      layout: see ``block_moment``.
      weight_decay: at least 0.
      decay: "decoupled": times the learning rate and its schedule.
      axis_name: see ``block_moment``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam_mini
    >>> optimizer, x = adam_mini(5.0, blocks="row"), jnp.array([[1.0, 7.0], [2.0, 2.0]])
    >>> updates, state = optimizer.update(x, optimizer.init(x), x)
    >>> print(updates.round(4))
    [[-1. -7.]
     [-5. -5.]]
    """
    chosen = functools.partial(blocks_by_name, layout=layout) if blocks is None else blocks
    bracket = adaptive(
        first_moment(b1),
        block_moment(b2, chosen, head_size=head_size, layout=layout, axis_name=axis_name),
        debias(b1, b2),
        per_weight_rate(eps),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)
