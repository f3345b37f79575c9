"""Adam as one stage that is also a drop-in for ``optax.scale_by_adam``."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.look import Lines, init_buffers
from adaptive_opt.core.now import Now
from adaptive_opt.core.stage import Stage, lines_of, stage_of
from adaptive_opt.core.tree import OpenStep, run
from adaptive_opt.core.trees import Tree
from adaptive_opt.core.update import update_leaves
from adaptive_opt.stages.moments import debias, first_moment, nesterov_moment, second_moment
from adaptive_opt.stages.rates import per_weight_rate


def scale_by_adam(
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    eps_root: Hyperparameter = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    as_in_optax: bool = True,
    state_dtype: DTypeLike | None = None,
) -> Stage:
    """Adam's update: ``m^_t / (sqrt(v^_t + eps_root) + eps)``.

    The stages ``first_moment``, ``second_moment``, ``debias`` (or ``nesterov_moment``) and
    ``per_weight_rate`` in one. Given a plain gradient it returns a plain update: the drop-in for
    ``optax.scale_by_adam``, with its signature and its state. Given an open step it returns an open
    step, with ``direction`` (m^), ``second_moment`` (v^) and ``rate`` set, for stages to refine.

    Equals ``optax.scale_by_adam``: in float32 the moments bit for bit and the update within 2 units
    in the last place. Where parameters are 16-bit, optax keeps 16-bit moments; these are float32.
    Adam (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    A complex weight has one second moment, of its absolute value, as in optax; ``torch.optim.Adam``
    takes real and imaginary parts as two weights. After a gradient that is k
    times larger than usual, a weight is slow for ``2 log(k) / (1 - b2)`` steps; after one above
    1.8e19 in float32, whose square is infinite, it stands still, see ``second_moment``.

    Args:
      b1, b2: decays of the two moments, in [0, 1).
      eps: added to the root, in the units of a gradient; at least 0.
      eps_root: added under the root; at least 0.
      mu_dtype: the dtype of ``mu``.
      nesterov: look ahead, see ``nesterov_moment``.
      as_in_optax: averages and bias corrections in optax's arithmetic, which rounds the decays
        first; see ``first_moment`` and ``debias``. The recipes say False, except for their
        convention "optax".
      state_dtype: the dtype of the moments for which nothing else is said; default: the
        parameter's, float32 for 16-bit parameters.

    State: ``optax.ScaleByAdamState(count, mu, nu)``; inside a bracket, the buffers ``mu`` and
      ``nu``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import scale_by_adam
    >>> tx = optax.chain(scale_by_adam(), optax.scale_by_learning_rate(0.5))
    >>> print(tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0].round(4))
    [-0.5]
    """
    settings = dict(
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        as_in_optax=as_in_optax,
        state_dtype=state_dtype,
    )
    how: Any = {"as_in_optax": as_in_optax}
    corrections = (nesterov_moment(b1, **how), debias(b2=b2, **how))
    stages = (
        first_moment(b1, dtype=mu_dtype, **how),
        second_moment(b2, **how),
        *(corrections if nesterov else (debias(b1, b2, **how),)),
        per_weight_rate(eps, eps_root),
    )
    lines = Lines(line for part in stages for line in lines_of(part) or ())

    def init(params: Tree) -> optax.ScaleByAdamState:
        buffers = init_buffers(lines, params, state_dtype)
        return optax.ScaleByAdamState(jnp.zeros([], jnp.int32), **buffers)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        buffers = {"mu": state.mu, "nu": state.nu}
        if isinstance(updates, OpenStep):
            closed, count = updates.copy(), updates.count
            buffers = run(lines, closed, buffers, state_dtype)
        else:
            count = jnp.asarray(optax.safe_increment(state.count))
            now = Now(count, extra)
            closed, buffers = update_leaves(lines, now, updates, buffers, params, state_dtype)
        return closed, optax.ScaleByAdamState(count, **buffers)

    plain = optax.GradientTransformationExtraArgs(init, update)
    return stage_of("scale_by_adam", settings, lines, parts=stages, plain=plain)
