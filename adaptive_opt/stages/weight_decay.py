"""Weight decay and the learning rate: plain updates in, plain updates out.

What ``decay=`` means, the same in every recipe. ``u`` is what the bracket makes of the gradient,
``lr_t`` the learning rate with its schedule, ``eta_t`` the multiplier ``schedule=`` without it:

=============  =========================  =======================================================
"l2"           ``x - lr_t u(g + wd x)``   part of the gradient, and of its moments; in
                                          ``torch.optim.Adam``
"decoupled"    ``x - lr_t (u + wd x)``    times the learning rate and its schedule; AdamW in
                                          PyTorch, optax and Keras
"independent"  ``x - eta_t (lr u + wd     times the schedule, not the base rate; AdamW in its paper
               x)``                       (Loshchilov & Hutter 2019, arXiv:1711.05101), and in the
                                          package keras-adamw
"constant"     ``x - lr_t u - wd x``      times neither; AdaBoundW of AdaBound's authors,
                                          ``fixed_decay=True`` in adabelief-pytorch and
                                          pytorch_optimizer
"after"        ``(x - lr_t u) (1 - wd)``  off the new x, times neither; LaProp's authors
"decoupled-    ``(x - lr_t u) (1 - lr_t   "decoupled", off the new x; SOAP's authors
after"         wd)``
"proximal"     ``(x - lr_t u) / (1 +      the proximal step of ``wd/2 |x|^2``: never overshoots;
               lr_t wd)``                 Adan
"clipped"      ``x - f_t lr_t (u + wd     "decoupled", with a learning rate that the recipe has
               x)``                       lowered for the tensor by the factor f; StableAdamW
"inner"        ``x - lr_t u(g, wd x)``    part of the direction where the recipe's listing says so:
                                          what comes behind, a momentum, a trust ratio, a projection
                                          or a first step that does not move, acts on it too;
                                          NovoGrad, LAMB, AdamP, ADOPT
"corrected"    ``x - lr_t (u + lr_t wd    times the learning rate twice; AdamC (arXiv:2506.02285)
               x)``                       in Schedule-Free+, see ``corrected_weight_decay``
=============  =========================  =======================================================

"l2" is part of the gradient; "after", "decoupled-after" and "proximal" take the decay off the new
x, the others off the old one. In Schedule-Free, x is the parameter y, and the step and the decay
are those of its z. ``recipe.choices["decay"]`` says which forms a recipe has; every form that it
has is recorded from public code, or, where no package has it, from parts of optax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.checks import Hyperparameter, check_nonnegative, is_number, value_at
from adaptive_opt.core.describe import described
from adaptive_opt.core.finite import narrowed
from adaptive_opt.core.trees import Tree, map_leaves, map_none, times, update_dtypes

Mask = Tree | Callable[[Tree], Tree]
"""A pytree of bools like the parameters (or a prefix of them), or a function that makes one."""

Decay: TypeAlias = Literal[
    "l2",
    "decoupled",
    "independent",
    "constant",
    "corrected",
    "after",
    "decoupled-after",
    "proximal",
    "clipped",
    "inner",
]
"""Where weight decay enters, and what it is multiplied by: see the module."""


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

    Where it stands among the factors of the update decides what it is multiplied by: the recipes'
    ``decay="decoupled"``, ``"independent"`` and ``"constant"``. Decoupled weight decay (Loshchilov
    & Hutter 2019, arXiv:1711.05101, Algorithm 2).

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
    return _decay(
        lambda u, x, *, s: u + times(x, by=s), "weight_decay", weight_decay, mask, learning_rate
    )


@described
def cautious_weight_decay(
    weight_decay: Hyperparameter,
    mask: Mask | None = None,
    *,
    learning_rate: Hyperparameter | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Decays a weight only where the update moves it towards zero too: ``u_t + wd_t [u_t x_t >= 0]
    x_t``.

    In the place and with the arguments of ``decoupled_weight_decay``: before the sign is turned
    around. It adds no second aim to the loss, so that at a minimum nothing pulls. Cautious weight
    decay (Chen et al. 2025, arXiv:2510.12402). Of complex numbers the real part of ``u conj(x)``
    counts.

    Behind a whole optimizer turn the sign back and forth, as for ``decoupled_l1_decay``.

    Args:
      weight_decay, mask, learning_rate: see ``decoupled_weight_decay``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import cautious_weight_decay
    >>> decay, x = cautious_weight_decay(0.5), jnp.array([4.0, -4.0])
    >>> print(decay.update(jnp.array([1.0, 1.0]), decay.init(x), x)[0])
    [3. 1.]
    """
    check_nonnegative(weight_decay=weight_decay)

    def combine(u: jax.Array, x: jax.Array, *, s: Any) -> jax.Array:
        return u + s * jnp.where(agreement(u, x) >= 0, x, 0)

    return _decay(combine, "weight_decay", weight_decay, mask, learning_rate)


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
    return _decay(lambda u, x, *, s: u + s * jnp.sign(x), "l1", l1, mask, learning_rate)


def agreement(a: jax.Array, b: jax.Array) -> jax.Array:
    """Greater than 0 where two arrays have one sign, less where they have two; real."""
    if jnp.iscomplexobj(a) or jnp.iscomplexobj(b):
        return jnp.real(a * jnp.conj(b))
    return jnp.sign(a) * jnp.sign(b)  # a product of tiny numbers would be 0


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

    return _decay(combine, "weight_decay", weight_decay, mask, learning_rate)


def with_decay(
    decay: Decay,
    weight_decay: Hyperparameter | None,
    mask: Mask | None,
    bracket: optax.GradientTransformation,
    learning_rate: Hyperparameter,
    *,
    spent: bool = False,
    schedule: optax.Schedule | None = None,
    l1: Hyperparameter | None = None,
) -> tuple[optax.GradientTransformation, ...]:
    """The parts of a recipe: its bracket, the learning rate, and the decay where its word puts it.

    ``spent`` says that the bracket has multiplied by the learning rate, and the schedule, already.
    What is "clipped" or "inner" is in the bracket.
    A weight decay of None has no part, and so no place in the state.
    """
    if decay != "independent" and schedule is not None:
        raise ValueError(
            f'schedule= belongs to decay="independent"; under decay="{decay}" give the schedule as'
            " learning_rate."
        )
    if decay == "independent" and callable(learning_rate):
        raise ValueError(
            'decay="independent" is multiplied by the schedule, but not by the base learning rate:'
            " give learning_rate as a number, and its course as schedule=."
        )
    eta = 1.0 if schedule is None else schedule
    last = optax.scale(-1.0) if spent else scale_by_learning_rate(learning_rate)
    if decay == "l2":
        l2 = () if weight_decay is None else (l2_regularization(weight_decay, mask),)
        return *l2, bracket, last
    if decay in ("clipped", "inner"):
        return bracket, last
    if decay in ("after", "decoupled-after", "proximal"):
        if weight_decay is None:
            return bracket, last
        times, proximal = None if decay == "after" else learning_rate, decay == "proximal"
        after = decay_after_step(weight_decay, mask, learning_rate=times, proximal=proximal)
        return bracket, last, after
    if spent:
        times = {"decoupled": learning_rate, "independent": eta, "constant": None}[decay]
        return bracket, *_decays(weight_decay, l1, mask, times), last
    decays = _decays(weight_decay, l1, mask)
    if decay == "decoupled":
        return bracket, *decays, last
    uphill = scale_by_learning_rate(learning_rate, flip_sign=False)
    if decay == "independent":
        return bracket, uphill, *decays, scale_by_learning_rate(eta)
    return bracket, uphill, *decays, optax.scale(-1.0)


def _decays(
    weight_decay: Hyperparameter | None,
    l1: Hyperparameter | None,
    mask: Mask | None,
    learning_rate: Hyperparameter | None = None,
) -> tuple[optax.GradientTransformationExtraArgs, ...]:
    """Those that are given, side by side."""
    kinds = (decoupled_weight_decay, weight_decay), (decoupled_l1_decay, l1)
    return tuple(
        kind(strength, mask, learning_rate=learning_rate)
        for kind, strength in kinds
        if strength is not None
    )


def _decay(
    combine_leaves: Callable[..., Any],
    name: str,
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
        lr = 1.0 if learning_rate is None else value_at(learning_rate, count, "learning_rate")
        return map_leaves(
            lambda u, x, *, s, lr: combine_leaves(u, x, s=lr * s),  # multiplied in the leaf's width
            updates,
            updates,
            params,
            s=value_at(strength, count, name),
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
        lr = value_at(learning_rate, count, "learning_rate")
        return map_leaves(times, updates, updates, by=-lr if flip_sign else lr)

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
        return map_none(narrowed, combine(updates, params, count), dtypes), state

    return optax.GradientTransformationExtraArgs(template.init, update)
