"""What came before and beside Adam: SGD, RMSprop, AdaGrad, AdaDelta, Adamax.

The conventions are those of ``recipes``, which see: every recipe is an ``optax.chain``,
``learning_rate`` is a number, a traced scalar or a schedule, other numbers may be schedules too,
``observers`` watch, ``state_dtype`` is the dtype of the buffers, and ``convention`` chooses among
public implementations of one name.
"""

from __future__ import annotations

from typing import Literal

import optax
from jax.typing import DTypeLike

from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.checks import (
    Hyperparameter,
    Scope,
    are_different_numbers,
    check_decay,
    is_zero,
)
from adaptive_opt.core.observe import Observers
from adaptive_opt.core.recipe import recipe
from adaptive_opt.stages.moments import (
    centered_moment,
    debias,
    first_moment,
    heavy_ball,
    infinity_moment,
    second_moment,
    sum_of_squares,
)
from adaptive_opt.stages.rates import (
    adadelta_units,
    apply_rate,
    inverse_rate,
    per_weight_rate,
    scale_rate,
    uniform_rate,
)
from adaptive_opt.stages.weight_decay import (
    Mask,
    with_decay,
)

Optimizer = optax.GradientTransformationExtraArgs
Parts = tuple[optax.GradientTransformation, ...]


@recipe
def sgd(
    learning_rate: Hyperparameter,
    momentum: Hyperparameter | None = None,
    nesterov: bool = False,
    *,
    dampening: Hyperparameter = 0.0,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    convention: Literal["torch", "keras"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Gradient descent with momentum: ``w_t = momentum w_{t-1} + g_t``, ``x - lr w_t``.

    Robbins & Monro 1951 (doi:10.1214/aoms/1177729586), with the momentum of Polyak 1964
    (doi:10.1016/0041-5553(64)90137-5).

    Use it for vision models that you have time to tune, and where memory is shortest.

    Do without it for Transformers, where it falls behind Adam (Zhang et al. 2020,
    arXiv:1912.03194), and where steps are few.

    Args:
      learning_rate, weight_decay, mask, state_dtype: see the module.
      momentum: in [0, 1). None, and the number 0, mean none and no buffer.
      nesterov: look one step ahead.
      dampening: of what momentum adds up, except the first gradient; in [0, 1).
      decay: "l2", as in PyTorch, or "decoupled", as in Keras; ``sgdw`` has further forms.
      convention: "torch": ``w_t = momentum w_{t-1} + (1 - dampening) g_t``, ``x - lr w_t``; equals
        ``torch.optim.SGD`` and ``optax.sgd``.
        "keras": the learning rate is inside, ``w_t = momentum w_{t-1} + lr_t g_t``, ``x - w_t``, so
        that a change of it acts with a delay; equals ``keras.optimizers.SGD``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import sgd
    >>> x = jnp.array([1.0])
    >>> optimizer = sgd(0.125, momentum=0.9)
    >>> updates, state = optimizer.update(jnp.array([2.0]), optimizer.init(x), x)
    >>> float(optax.apply_updates(x, updates)[0])
    0.75
    """
    ball, rate = _momentum(momentum, nesterov, dampening), uniform_rate(learning_rate)
    listing = (*ball, rate) if convention == "torch" else (rate, apply_rate(), *ball)
    bracket = adaptive(*listing, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


def _momentum(
    momentum: Hyperparameter | None, nesterov: bool, dampening: Hyperparameter = 0.0
) -> tuple[Optimizer, ...]:
    check_decay(dampening=dampening, **({} if momentum is None else {"momentum": momentum}))
    if momentum is None or is_zero(momentum):
        if nesterov or are_different_numbers(dampening, 0.0):
            raise ValueError("nesterov and dampening need a momentum greater than 0.")
        return ()
    return (heavy_ball(momentum, dampening=dampening, nesterov=nesterov),)


@recipe
def sgdw(
    learning_rate: Hyperparameter,
    momentum: Hyperparameter | None = 0.9,
    nesterov: bool = False,
    weight_decay: Hyperparameter = 1e-4,
    mask: Mask | None = None,
    *,
    l1: Hyperparameter | None = None,
    dampening: Hyperparameter = 0.0,
    decay: Literal["independent", "decoupled"] | None = None,
    convention: Literal["paper", "torch"] = "paper",
    schedule: optax.Schedule | None = None,
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """SGD with momentum and decoupled weight decay: ``x - lr w_t - eta_t wd x``.

    Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 1. torch_optimizer.SGDW subtracts the
    constant ``lr wd`` from every weight, whatever it is; that is not copied.

    Use it as ``sgd``, where the decay is not to pass through the momentum.

    Do without it where there is no momentum: ``sgd`` with L2 is the same rule then.

    Args:
      learning_rate, weight_decay, mask, state_dtype: see the module.
      momentum, nesterov, dampening: see ``sgd``.
      l1: an l1 decay besides, multiplied by whatever ``weight_decay`` is; see
        ``decoupled_l1_decay``.
      decay: "independent", times ``schedule`` but not times the learning rate, which is then a
        number (default under "paper"); or "decoupled", times the learning rate and its schedule
        (default under "torch").
      convention: "paper": ``w_t = momentum w_{t-1} + eta_t lr g_t``, ``x - w_t - eta_t wd x``: the
        learning rate is inside the buffer; equals ``SGDW`` of the package ``keras-adamw``, and
        ``keras.optimizers.SGD`` with its ``weight_decay`` if that is "decoupled".
        "torch": ``x - lr_t (w_t + wd x)`` with the buffer of ``torch.optim.SGD``; equals ``SGDW``
        of the package ``pytorch_optimizer``.
      schedule: the multiplier eta_t of the "independent" decay, for instance ``warm_restarts``;
        default: 1.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import sgdw
    >>> x = jnp.array([1.0])
    >>> optimizer = sgdw(0.125, weight_decay=0.25)
    >>> updates, state = optimizer.update(jnp.array([2.0]), optimizer.init(x), x)
    >>> float(optax.apply_updates(x, updates)[0])
    0.5
    """
    decay = decay or ("independent" if convention == "paper" else "decoupled")
    ball, rate = _momentum(momentum, nesterov, dampening), uniform_rate(learning_rate)
    eta = (scale_rate(1.0 if schedule is None else schedule),) if decay == "independent" else ()
    listing = (rate, *eta, apply_rate(), *ball) if convention == "paper" else (*ball, rate, *eta)
    bracket = adaptive(*listing, state_dtype=state_dtype)
    return with_decay(
        decay, weight_decay, mask, bracket, learning_rate, spent=True, schedule=schedule, l1=l1
    )


@recipe
def rmsprop(
    learning_rate: Hyperparameter,
    b2: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-8,
    *,
    centered: bool = False,
    momentum: Hyperparameter | None = None,
    nesterov: bool = False,
    scope: Scope = "weight",
    reduce: Literal["sum", "mean"] = "sum",
    axis_name: str | tuple[str, ...] | None = None,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    convention: Literal["torch", "optax", "keras", "tf1"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """The gradient over the root of the average of its squares: ``x - lr g / (sqrt(v) + eps)``.

    Tieleman & Hinton 2012 (www.cs.toronto.edu/~tijmen/csc321, lecture 6); centered: Graves 2013,
    arXiv:1308.0850. With the scope "tree" all weights share one rate and the step has the
    gradient's direction: the choice of Su Jianlin's ODE view of RMSprop. With b2 = 0 and eps = 0 it
    is sign descent per weight, normalised gradient descent for the tree. None of the forms corrects
    the bias of v.

    Use it for code that expects it, in reinforcement learning above all; with the scope "tree", as
    normalised gradient descent with memory.

    Do without it where Adam runs, which has a momentum and a correction for the start besides.

    Args:
      learning_rate, weight_decay, mask, state_dtype: see the module.
      b2: decay in [0, 1): 0.99 is PyTorch's default, 0.9 that of the others.
      eps: at least 0; defaults elsewhere: 1e-8 (PyTorch, optax), 1e-7 (Keras), 1e-10 (TF1).
      centered: divide by the standard deviation, see ``centered_moment``.
      momentum: in [0, 1). None, and the number 0, mean none and no buffer.
      nesterov: look one step ahead.
      scope, reduce, axis_name: see ``second_moment``.
      decay: "l2", as in PyTorch, or "decoupled", as in Keras.
      convention: "torch": eps outside the root; the momentum adds up steps without the learning
        rate; equals ``torch.optim.RMSprop``.
        "optax", "keras": eps inside the root; the momentum adds up steps with the learning rate;
        equal ``optax.rmsprop`` and ``keras.optimizers.RMSprop``.
        "tf1": the same with v starting at 1; the formulas of
        ``tf.compat.v1.train.RMSPropOptimizer``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import rmsprop
    >>> x = jnp.array([3.0, -3.0, 3.0, 3.0])
    >>> optimizer = rmsprop(0.5, b2=0.0, eps=0.0, scope="tree")
    >>> print(optimizer.update(x, optimizer.init(x), x)[0])
    [-0.25  0.25 -0.25 -0.25]
    """
    if centered and scope != "weight":
        raise ValueError(f'centered=True is defined for scope="weight", got scope={scope!r}.')
    initial = 1.0 if convention == "tf1" else 0.0
    moments = (
        second_moment(b2, scope=scope, reduce=reduce, axis_name=axis_name, initial=initial),
        *((centered_moment(b2),) if centered else ()),
    )
    ball = _momentum(momentum, nesterov)
    used = (apply_rate(), *ball) if ball else ()
    if convention == "torch":
        bracket = adaptive(*moments, per_weight_rate(eps), *used, state_dtype=state_dtype)
        return with_decay(decay, weight_decay, mask, bracket, learning_rate)
    rate = (per_weight_rate(0.0, eps), scale_rate(learning_rate))
    bracket = adaptive(*moments, *rate, *used, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate, spent=True)


@recipe
def adagrad(
    learning_rate: Hyperparameter,
    initial_accumulator_value: float = 0.0,
    eps: Hyperparameter = 1e-10,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    convention: Literal["torch", "optax", "keras"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """The gradient over the root of all its squares: ``x - lr g / (sqrt(sum g^2) + eps)``.

    Duchi, Hazan & Singer 2011, JMLR 12 (jmlr.org/papers/v12/duchi11a.html).

    Use it for sparse features: rare ones keep a large rate.

    Do without it in long trainings of networks: its rates only fall.

    Args:
      learning_rate: see the module. Where PyTorch has ``lr_decay=d``, give the schedule
        ``lr / (1 + d t)``.
      weight_decay, mask, state_dtype: see the module.
      initial_accumulator_value: where the sum starts, at least 0: 0 in PyTorch, 0.1 in optax and
        Keras.
      eps: at least 0: 1e-10 in PyTorch, 1e-7 in optax and Keras.
      decay: "l2", as in PyTorch, or "decoupled", as in Keras.
      convention: "torch": eps outside the root; equals ``torch.optim.Adagrad``.
        "optax", "keras": eps inside the root; equal ``optax.adagrad`` and
        ``keras.optimizers.Adagrad``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adagrad
    >>> x = jnp.array([1.0])
    >>> optimizer = adagrad(0.25)
    >>> updates, state = optimizer.update(jnp.array([2.0]), optimizer.init(x), x)
    >>> float(optax.apply_updates(x, updates)[0])
    0.75
    """
    rate = per_weight_rate(eps) if convention == "torch" else per_weight_rate(0.0, eps)
    total = sum_of_squares(initial=initial_accumulator_value)
    bracket = adaptive(total, rate, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def adadelta(
    learning_rate: Hyperparameter = 1.0,
    rho: Hyperparameter = 0.9,
    eps: Hyperparameter = 1e-6,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """The gradient in the units of the parameters: ``x - lr sqrt(s + eps) / sqrt(v + eps) g``.

    Zeiler 2012, arXiv:1212.5701, Algorithm 1. Equals ``torch.optim.Adadelta``, ``optax.adadelta``
    and ``keras.optimizers.Adadelta``, given the same numbers (Keras defaults to rho 0.95, eps 1e-7
    and lr 1e-3).

    Use it for old results.

    Do without it for new work: its first steps are as small as eps makes them, and it keeps as much
    as Adam.

    Args:
      learning_rate: see the module; 1 is the paper's.
      weight_decay, mask, state_dtype: see the module.
      rho: decay of both averages, in [0, 1).
      eps: at least 0; the first steps are of size ``lr sqrt(eps)``.
      decay: "l2", as in PyTorch, or "decoupled", as in Keras.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adadelta
    >>> x = jnp.array([1.0])
    >>> optimizer = adadelta(0.5, rho=0.0, eps=1.0)
    >>> print(optimizer.update(jnp.array([1e6]), optimizer.init(x), x)[0].round(4))
    [-0.5]
    """
    bracket = adaptive(
        second_moment(rho),
        per_weight_rate(0.0, eps),
        adadelta_units(rho, eps),
        state_dtype=state_dtype,
    )
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)


@recipe
def adamax(
    learning_rate: Hyperparameter,
    b1: Hyperparameter = 0.9,
    b2: Hyperparameter = 0.999,
    eps: Hyperparameter = 1e-8,
    *,
    weight_decay: Hyperparameter = 0.0,
    mask: Mask | None = None,
    decay: Literal["l2", "decoupled"] = "l2",
    convention: Literal["torch", "optax", "keras"] = "torch",
    observers: Observers = (),
    state_dtype: DTypeLike | None = None,
) -> Parts:
    """Adam with the largest recent gradient in place of the second moment: ``x - lr m^ / u``.

    Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2.

    Use it for old results, and where no weight may move by more than about the learning rate in a
    step (section 7.1 of the paper).

    Do without it where single gradients are far too large: one of them lowers the rate of its
    weight for about ``1 / (1 - b2)`` steps.

    Args:
      learning_rate, weight_decay, mask, state_dtype: see the module.
      b1, b2: decays of the moment and of the largest gradient, in [0, 1).
      eps: at least 0; 1e-7 in Keras.
      decay: "l2", as in PyTorch, or "decoupled", as in ``optax.adamaxw`` and Keras.
      convention: "torch", "optax": ``u = max(b2 u, |g| + eps)``; equal ``torch.optim.Adamax`` and
        ``optax.adamax``.
        "keras": ``u = max(b2 u, |g|)`` and eps in the denominator; equals
        ``keras.optimizers.Adamax``.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamax
    >>> x = jnp.array([1.0])
    >>> optimizer = adamax(0.25)
    >>> updates, state = optimizer.update(jnp.array([2.0]), optimizer.init(x), x)
    >>> round(float(optax.apply_updates(x, updates)[0]), 5)
    0.75
    """
    if convention == "keras":
        largest = infinity_moment(b2), inverse_rate(eps)
    else:
        largest = infinity_moment(b2, eps), inverse_rate()
    bracket = adaptive(first_moment(b1), debias(b1), *largest, state_dtype=state_dtype)
    return with_decay(decay, weight_decay, mask, bracket, learning_rate)
