"""Weight decay and the learning rate: plain updates in, plain updates out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.checks import Hyperparameter, check_nonnegative, is_number, value_at
from adaptive_opt.core.describe import described
from adaptive_opt.core.trees import Tree, map_leaves, map_none, update_dtypes

Mask = Tree | Callable[[Tree], Tree]
"""A pytree of bools like the parameters (or a prefix of them), or a function that makes one."""


@described
def decoupled_weight_decay(
    weight_decay: Hyperparameter,
    mask: Mask | None = None,
    *,
    learning_rate: Hyperparameter | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the decay to the update, after and apart from the gradient: ``u_t + wd_t x_t``.

    Followed by the learning rate this is ``-lr (u + wd x)``, the decay of AdamW in PyTorch, optax
    and Keras, all of which take it off the old x. A recipe that has spent the learning rate already
    says ``learning_rate=``, and the decay is ``u_t + lr_t wd_t x_t``.

    Three conventions go by the name of AdamW's decay: times the learning rate and its schedule
    (this, in its ordinary place), times the schedule only (the paper: the base rate before, the
    schedule after; ``adamw(convention="paper")``), and neither (``x - lr u - wd x``: after
    ``scale_by_learning_rate(lr, flip_sign=False)``, and ``optax.scale(-1.0)`` last). Decoupled
    weight decay (Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2).

    Args:
      weight_decay: at least 0, per step and unit of learning rate; a number or a schedule.
      mask: which parameters decay; see :func:`optax.masked`.
      learning_rate: a number or a schedule, where no later stage multiplies by it.

    State: that of ``optax.add_decayed_weights``: empty, or a count if something is a schedule.
    ValueError if params are not given to ``update``, unless weight_decay is 0.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import decoupled_weight_decay
    >>> decay, x = decoupled_weight_decay(0.5), jnp.array([4.0])
    >>> print(decay.update(jnp.array([1.0]), decay.init(x), x)[0].round(4))
    [3.]
    """
    check_nonnegative(weight_decay=weight_decay)
    return _decay(lambda u, x, *, s: u + s * x, weight_decay, mask, learning_rate)


@described
def decoupled_l1_decay(
    l1: Hyperparameter,
    mask: Mask | None = None,
    *,
    learning_rate: Hyperparameter | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adds the decay of an l1 penalty, apart from the gradient: ``u_t + l1_t sign(x_t)``.

    Like ``decoupled_weight_decay``, next to which it can stand, but every weight moves towards zero
    by the same amount, and those that are there stay. As in the package ``keras-adamw``.

    It belongs, like every decay, before the sign is turned around: ``adamw``, ``nadamw`` and
    ``sgdw`` take ``l1=``. Behind a whole recipe, ``optax.chain(adam(lr), decoupled_l1_decay(l1))``,
    it would drive the weights away from zero, and no transformation can tell; there turn the sign
    back and forth: ``optax.chain(adam(lr), optax.scale(-1.0), decoupled_l1_decay(l1,
    learning_rate=lr), optax.scale(-1.0))``.

    Args:
      l1: at least 0, in units of the parameters per step and unit of learning rate; a number or a
        schedule.
      mask: which parameters decay; see :func:`optax.masked`.
      learning_rate: a number or a schedule, where no later stage multiplies by it.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import decoupled_l1_decay
    >>> decay, x = decoupled_l1_decay(0.5), jnp.array([4.0, -1.0, 0.0])
    >>> decay.update(jnp.array([1.0, 1.0, 1.0]), decay.init(x), x)[0].tolist()
    [1.5, 0.5, 1.0]
    """
    check_nonnegative(l1=l1)
    return _decay(lambda u, x, *, s: u + s * jnp.sign(x), l1, mask, learning_rate)


@described
def decay_after_step(
    weight_decay: Hyperparameter,
    mask: Mask | None = None,
    *,
    learning_rate: Hyperparameter | None = None,
    proximal: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Decays the value that the step leads to: ``(x_t + u_t) (1 - wd_t)``, or by ``/ (1 + wd_t)``.

    Comes last, behind the learning rate and its sign, and returns the update that leads there.
    Every other decay here is taken off the old x. With ``learning_rate`` the strength is ``lr_t
    wd_t``.

    Args:
      weight_decay: at least 0, per step (and, with learning_rate, per unit of it); a number or a
        schedule.
      mask: which parameters decay; see :func:`optax.masked`.
      learning_rate: a number or a schedule.
      proximal: divide by ``1 + wd``, the proximal step of the penalty ``wd/2 |x|^2``, which cannot
        overshoot (Adan). Otherwise multiply by ``1 - wd`` (LaProp).

    State: as that of ``decoupled_weight_decay``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import decay_after_step
    >>> decay, x = decay_after_step(0.5), jnp.array([4.0])
    >>> print(decay.update(jnp.array([-1.0]), decay.init(x), x)[0].round(4))
    [-2.5]
    """
    check_nonnegative(weight_decay=weight_decay)

    def combine(u: jax.Array, x: jax.Array, *, s: Any) -> jax.Array:
        return (u - s * x) / (1 + s) if proximal else u - s * (x + u)

    return _decay(combine, weight_decay, mask, learning_rate)


def decays(
    weight_decay: Hyperparameter,
    l1: Hyperparameter | None,
    mask: Mask | None,
    *,
    learning_rate: Hyperparameter | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """The decoupled decays of a recipe, side by side."""
    l2 = decoupled_weight_decay(weight_decay, mask, learning_rate=learning_rate)
    return (l2,) if l1 is None else (l2, decoupled_l1_decay(l1, mask, learning_rate=learning_rate))


def _decay(
    combine_leaves: Callable[..., Any],
    strength: Hyperparameter,
    mask: Mask | None,
    learning_rate: Hyperparameter | None,
) -> optax.GradientTransformationExtraArgs:
    """``combine_leaves(update, parameter, s=...)`` with the strength, perhaps times the rate."""
    if learning_rate is not None:
        check_nonnegative(learning_rate=learning_rate)

    def combine(updates: Tree, params: Tree, count: Any) -> Tree:
        if is_number(strength) and float(strength) == 0:  # an array of inject_hyperparams, too
            return updates
        if params is None:
            raise ValueError(
                "weight decay needs the parameters: call update(gradients, state, params)."
            )
        lr = 1.0 if learning_rate is None else value_at(learning_rate, count)
        return map_leaves(
            lambda u, x, *, s, lr: combine_leaves(u, x, s=lr * s),  # multiplied in the leaf's width
            updates,
            updates,
            params,
            s=value_at(strength, count),
            lr=lr,
        )

    scheduled = callable(strength) or callable(learning_rate)
    decayed = _plain(optax.add_decayed_weights((lambda _: 0.0) if scheduled else 0.0), combine)
    return decayed if mask is None else _masked(decayed, mask)


def refuse_one_bool(mask: Any, params: Tree) -> None:
    if isinstance(mask, (bool, np.bool_, jax.Array)) and not jax.tree_util.all_leaves([params]):
        raise ValueError(
            "mask arrived as one bool for a tree of parameters. optax.inject_hyperparams takes a"
            ' callable mask for a schedule: give static_args=("mask",). For no decay at all leave'
            " weight_decay at 0."
        )


def _masked(
    decayed: optax.GradientTransformationExtraArgs, mask: Mask
) -> optax.GradientTransformationExtraArgs:
    """``optax.masked``, except that one bool for a whole tree is refused."""
    masked = optax.masked(decayed, mask)
    if not isinstance(mask, (bool, np.bool_, jax.Array)):
        return masked

    def init(params: Tree) -> Any:
        refuse_one_bool(mask, params)
        return masked.init(params)

    return optax.GradientTransformationExtraArgs(init, masked.update)


@described
def l2_regularization(
    weight_decay: Hyperparameter, mask: Mask | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adds the gradient of ``wd / 2 |x|^2`` to the gradient, before anything else: ``g_t + wd_t
    x_t``.

    The same line as :func:`decoupled_weight_decay`, but put first in the chain, so that the moments
    see it. In adaptive methods it decays weights with large gradients less than others; it is what
    ``weight_decay`` means in ``torch.optim.Adam`` and in diffGrad's and AdaBound's code.

    Args:
      weight_decay: at least 0; a number or a schedule.
      mask: which parameters decay; see :func:`optax.masked`.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import l2_regularization
    >>> l2, x = l2_regularization(0.5), jnp.array([4.0])
    >>> print(l2.update(jnp.array([1.0]), l2.init(x), x)[0].round(4))
    [3.]
    """
    return decoupled_weight_decay(weight_decay, mask)


@described
def scale_by_learning_rate(
    learning_rate: Hyperparameter, *, flip_sign: bool = True
) -> optax.GradientTransformationExtraArgs:
    """Turns a direction into a step downhill: ``-lr_t u_t``.

    ``optax.scale_by_learning_rate`` with its state, except that the update keeps its dtype when the
    learning rate is a traced array, and that the product is formed in float32 for 16-bit updates.

    Args:
      learning_rate: at least 0, in units of the parameters per unit of update; a number, a traced
        array or a schedule.
      flip_sign: whether the product is negated.

    State: empty, or ``optax.ScaleByScheduleState(count)`` for a schedule.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import scale_by_learning_rate
    >>> downhill = scale_by_learning_rate(0.5)
    >>> print(downhill.update(jnp.array([4.0]), downhill.init(jnp.zeros(1)))[0].round(4))
    [-2.]
    """
    check_nonnegative(learning_rate=learning_rate)

    def combine(updates: Tree, params: Tree, count: Any) -> Tree:
        del params
        lr = value_at(learning_rate, count)
        return map_leaves(lambda u, *, lr: sign * lr * u, updates, updates, lr=lr)

    sign = -1 if flip_sign else 1
    return _plain(optax.scale_by_learning_rate(learning_rate), combine)


def _plain(
    template: optax.GradientTransformation, combine: Callable[[Tree, Tree, Any], Tree]
) -> optax.GradientTransformationExtraArgs:
    """A transformation of plain updates, with the state of ``template`` (empty, or a count).

    The updates leave as promote(update, parameter).
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        dtypes = update_dtypes(updates, params)
        count = None
        if not isinstance(state, optax.EmptyState):
            count = optax.safe_increment(state.count)
            state = state._replace(count=count)
        new = combine(updates, params, count)
        return map_none(lambda u, dtype: jnp.asarray(u, dtype), new, dtypes), state

    return optax.GradientTransformationExtraArgs(template.init, update)
