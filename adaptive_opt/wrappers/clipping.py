"""Clipping that does not wait for all gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.checks import (
    check_constant,
    check_nonnegative,
    check_positive,
)
from adaptive_opt.core.describe import described
from adaptive_opt.core.trees import Tree, at_width, dtype_of, map_none, real, wide, widest
from adaptive_opt.stages.tensors import AxisName, global_norm


class ClipByPreviousNormState(NamedTuple):
    """The norm of the gradients of the step before."""

    norm: jax.Array


@described
def clip_by_previous_norm(
    max_norm: float | jax.Array, initial_norm: float = 0.0, *, axis_name: AxisName = None
) -> optax.GradientTransformationExtraArgs:
    """Clips by the norm of the step before: ``g_t min(1, max_norm / |g_{t-1}|)``.

    ``optax.clip_by_global_norm`` must know all gradients before it can change the first, so that
    all of them are there at once: 8 bytes per parameter of temporaries, in a step that uses each
    one as it comes otherwise (``memory_plan`` shows it). The norm of the step before is known. Use
    it where gradients are long for many steps, such as in the first ones, or at a large learning
    rate. It does not stop a single long gradient, which passes whole, and after which the next step
    is short: for that ``clip_update_rms`` in the optimizer bounds each tensor's update by itself,
    without waiting too.

    The norm is that of the gradients as they come, all together, not clipped. One that is not
    finite is not remembered.

    Args:
      max_norm: greater than 0, in the units of a gradient.
      initial_norm: by which the first step is clipped, which has none before it, at least 0; the
        default, 0, lets it pass whole.
      axis_name: under ``shard_map`` or ``pmap``, the axes over which gradients are split, () if
        every device has them whole.

    State: ``ClipByPreviousNormState(norm)``, a scalar in float32 at least.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import clip_by_previous_norm
    >>> clip, x = clip_by_previous_norm(1.0), jnp.zeros(2)
    >>> state = clip.init(x)
    >>> for gradient in ([3.0, 4.0], [0.5, 0.0], [0.0, 2.0]):
    ...     update, state = clip.update(jnp.array(gradient), state)
    ...     print(update, state.norm)
    [3. 4.] 5.0
    [0.1 0. ] 0.5
    [0. 2.] 2.0
    """
    check_constant(max_norm=max_norm, initial_norm=initial_norm)
    check_positive(max_norm=max_norm)
    check_nonnegative(initial_norm=initial_norm)

    def init(params: Tree) -> ClipByPreviousNormState:
        return ClipByPreviousNormState(jnp.array(initial_norm, widest(params)))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        most = jnp.asarray(max_norm, state.norm.dtype)
        factor = most / jnp.maximum(state.norm, most)

        def clipped(g: Any) -> jax.Array:
            width = wide(dtype_of(g))
            return (at_width(g, real(width)) * factor.astype(width)).astype(dtype_of(g))

        norm = global_norm(updates, axis_name).astype(state.norm.dtype)
        norm = jnp.where(jnp.isfinite(norm), norm, state.norm)
        return map_none(clipped, updates), ClipByPreviousNormState(norm)

    return optax.GradientTransformationExtraArgs(init, update)
