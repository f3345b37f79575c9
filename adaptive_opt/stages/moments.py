"""Stages on what is remembered of the gradient: its moving averages, and corrections of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from adaptive_opt.core.checks import (
    SCOPES,
    Hyperparameter,
    Scope,
    check_decay,
    check_nonnegative,
    choose,
    given,
    value_at,
)
from adaptive_opt.core.finite import squarable, summable
from adaptive_opt.core.now import Remembering
from adaptive_opt.core.stage import OneArray, WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import axes_of, axes_split


def absolute_square(x: jax.Array) -> jax.Array:
    return x**2 if jnp.isrealobj(x) else (x.conj() * x).real


@stage
def first_moment(
    b1: Hyperparameter,
    *,
    as_in_optax: bool = False,
    name: str = "mu",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The moving average of the direction: ``m_t = b1 m_{t-1} + (1 - b1) d_t``, with ``m_0 = 0``.

    Reads and replaces ``direction``, which is the gradient unless a stage before has changed it.
    Adam's biased first moment estimate (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b1: decay in [0, 1), or a schedule of it.
      as_in_optax: take ``b1`` as the width of the arrays rounds it, as optax does: in float32 the
        average is 1.3e-5 too large for 0.999, where otherwise it is right to rounding.
      name: the name of its buffer ``mu``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment
    >>> rule = adaptive(first_moment(0.5))
    >>> update, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> update.tolist(), state.buffers["mu"].tolist()
    ([1.0], [1.0])
    """
    check_decay(b1=b1)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        m = step.average(name, step.direction, b1, dtype=dtype, as_in_optax=as_in_optax)
        return step.set(direction=m)

    return line


@stage
def second_moment(
    b2: Hyperparameter,
    *,
    scope: Scope = "weight",
    reduce: str = "sum",
    axis_name: str | tuple[str, ...] | None = None,
    initial: float = 0.0,
    as_in_optax: bool = False,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> OneArray | WholeTree:
    """The moving average of the squared gradient: ``v_t = b2 v_{t-1} + (1 - b2) |g_t|^2``.

    Reads ``gradient``, sets ``second_moment``; real for complex gradients. The square of a gradient
    above 1.8e19 is infinite in float32: its weight stands still from then on, as in every public
    code; ``skip_nonfinite`` refuses such a step.
    Adam's biased second raw moment estimate (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    With a wider ``scope`` the square is summed, or averaged, over each tensor or over the whole
    tree, so that all their weights share one rate and the direction is kept: RMSprop as the
    normalised gradient flow that Su Jianlin's ODE view of it describes.

    Args:
      b2: decay in [0, 1), or a schedule of it.
      scope: what has a second moment of its own: every "weight", every "tensor" (a leaf), or the
        "tree". Under ``optax.partition`` the tree is the group, as each group sees only its own.
      reduce: "sum" or "mean" over the tensor or tree; the sum is the squared norm.
      axis_name: for a wider scope under ``shard_map`` or ``pmap``, where each device sees only its
        part: the mesh axes over which parameters are split, ``()`` if every device has the whole
        gradient. Of what is split over some of them only, ``shard_map`` knows it, and every weight
        counts once; under ``check_vma=False`` and ``pmap`` nobody does, and every parameter must be
        split over all of them. Not needed under ``jit``, which sees whole arrays.
      initial: the first value of the average; at least 0. If it is not 0, there is nothing to
        debias.
      as_in_optax: see ``first_moment``.
      name: the name of its buffer ``nu``: real; one array per parameter, one scalar per parameter
        or one scalar, by scope.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters (in
        bfloat16 and with b2 = 0.999 it would stop moving); float16 is refused.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.75), per_weight_rate(eps=0.0))
    >>> update, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> update.tolist(), state.buffers["nu"].tolist()
    ([2.0], [1.0])
    >>> shared = adaptive(second_moment(0.0, scope="tree"), per_weight_rate(eps=0.0))
    >>> print(shared.update(jnp.array([3.0, -3.0, 3.0, 3.0]), shared.init(jnp.zeros(4)))[0])
    [ 0.5 -0.5  0.5  0.5]
    """
    check_decay(b2=b2)
    check_nonnegative(initial=initial)
    choose("scope", scope, SCOPES)
    choose("reduce", reduce, REDUCTIONS)
    how: Any = {"initial": initial, "dtype": dtype, "as_in_optax": as_in_optax}

    def line(step: AdaptiveStep) -> AdaptiveStep:
        squares = absolute_square(step.gradient)
        if scope == "tensor":
            squares = over(step, [squares], reduce, axis_name)
        nu = step.average(name, squares, b2, **how)
        return step.set(second_moment=nu)

    def line_of_the_tree(steps: OpenStep) -> OpenStep:
        squares = steps.leaves(lambda step: absolute_square(step.gradient))
        total = over(steps, squares, reduce, axis_name)
        nu = steps.average(name, total, b2, **how)
        return steps.each(lambda step: step.set(second_moment=nu))

    return WholeTree(line_of_the_tree) if scope == "tree" else line


REDUCTIONS = {
    "sum": lambda total, size: total,
    "mean": lambda total, size: total / float(max(size, 1)),
}


def over(
    step: Remembering,
    leaves: list[jax.Array],
    reduce: str,
    axis_name: str | tuple[str, ...] | None,
) -> jax.Array:
    """The sum or the mean of all numbers in the leaves, on all devices that hold parts of them."""
    return over_all(leaves, reduce, axis_name, looking=step.now.looking)


def over_all(
    leaves: list[jax.Array],
    reduce: str,
    axis_name: str | tuple[str, ...] | None,
    *,
    looking: bool = False,
) -> jax.Array:
    """The same outside of a bracket."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and axis_name is None and not looking:
        raise ValueError(
            f"a scope wider than a weight runs over the axes {', '.join(map(str, manual))} of"
            " shard_map or pmap, where each device sees only its part of the gradient. Give"
            " axis_name= the axes over which the parameters are split, or axis_name=() if every"
            " device has the whole gradient."
        )
    widest = max((x.dtype for x in leaves), key=lambda d: d.itemsize, default=jnp.float32)
    axes = () if looking else axes_of(axis_name)  # which need not exist at init
    alike: dict[tuple[str, ...], list[jax.Array]] = {}
    for x in leaves:
        alike.setdefault(axes_split(x, axes), []).append(x)
    total, size = jnp.zeros((), widest), 0
    for split, parts in alike.items():
        part = sum((jnp.sum(x).astype(widest) for x in parts), jnp.zeros((), widest))
        total = total + (jax.lax.psum(part, split) if split else part)
        size += sum(x.size for x in parts) * jax.lax.psum(1, split)
    return REDUCTIONS[reduce](total, size)


@stage
def sum_of_squares(
    *, initial: float = 0.0, name: str = "sum_of_squares", dtype: DTypeLike | None = None
) -> OneArray:
    """All squared gradients so far, summed: ``v_t = v_{t-1} + |g_t|^2``.

    Reads ``gradient``, sets ``second_moment``. A large gradient lowers the rate of its weight for
    good. AdaGrad (Duchi, Hazan & Singer 2011, JMLR 12).

    Args:
      initial: the first value, in the units of a squared gradient; at least 0.
      name: the name of its buffer: one real array per parameter.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, per_weight_rate, sum_of_squares
    >>> rule = adaptive(sum_of_squares(initial=7.0), per_weight_rate(eps=0.0))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [0.75]
    """
    check_nonnegative(initial=initial)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        squares = absolute_square(step.gradient)
        total = step.remember(name, lambda v, g: g + v, squares, initial=initial, dtype=dtype)
        return step.set(second_moment=total)

    return line


@stage
def infinity_moment(
    b2: Hyperparameter,
    eps: Hyperparameter = 0.0,
    *,
    name: str = "infinity_norm",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """The largest recent gradient: ``u_t = max(b2 u_{t-1}, |g_t| + eps)``, with ``u_0 = 0``.

    Reads ``gradient``, sets ``second_moment`` (to a first power: follow it with ``inverse_rate``).
    Needs no debiasing. Adamax (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 2).

    Args:
      b2: decay in [0, 1), or a schedule of it.
      eps: added to the gradient's size, in its units; at least 0 (PyTorch and optax; Keras adds it
        to the denominator instead).
      name: the name of its buffer: one real array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, infinity_moment, inverse_rate
    >>> rule = adaptive(infinity_moment(0.5), inverse_rate())
    >>> _, state = rule.update(jnp.array([8.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([1.0]), state)[0].round(4))
    [0.25]
    """
    check_decay(b2=b2)
    check_nonnegative(eps=eps)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        b, size = step.decay_at(b2), jnp.abs(step.gradient) + step.at(eps)
        norm = step.remember(name, lambda u, g: jnp.maximum(b * u, g), size, dtype=dtype)
        return step.set(second_moment=norm)

    return line


@stage
def centered_moment(
    b2: Hyperparameter, *, name: str = "mean_gradient", dtype: DTypeLike | None = None
) -> OneArray:
    """The second moment about the mean: ``v_t - |n_t|^2`` with ``n_t = b2 n_{t-1} + (1 - b2) g_t``.

    Reads ``gradient`` and ``second_moment``, replaces ``second_moment``. Where rounding makes the
    difference negative it is 0 (elsewhere that is a NaN). Centered RMSprop (Graves 2013,
    arXiv:1308.0850, equations 38 to 41).

    Args:
      b2: the decay given to ``second_moment``, in [0, 1), or a schedule of it.
      name: the name of its buffer: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, centered_moment, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.5), centered_moment(0.5), per_weight_rate(eps=0.0))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [2.]
    """
    check_decay(b2=b2)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        mean = step.average(name, step.gradient, b2, dtype=dtype)
        v, square = step.second_moment, absolute_square(mean)
        finite = jnp.minimum(square, jnp.finfo(square.dtype).max)  # infinity less itself is NaN
        return step.set(second_moment=jnp.maximum(v - finite, 0))

    return line


@stage
def debias(
    b1: Hyperparameter | None = None,
    b2: Hyperparameter | None = None,
    *,
    as_in_optax: bool = False,
) -> OneArray:
    """Corrects averages for their start at zero: ``m_t / (1 - b1^t)`` and ``v_t / (1 - b2^t)``.

    With ``b1`` reads and replaces ``direction``, with ``b2`` reads and replaces ``second_moment``;
    at least one must be given. Remembers nothing. Where it stands matters: before ``amsgrad_max``
    the maximum is over corrected moments (optax), after it over raw ones (PyTorch).
    Adam's bias-corrected estimates (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b1: the decay given to ``first_moment``, in [0, 1). A schedule is taken at the current step
        (``1 - b1_t^t``, as in PyTorch and optax), not multiplied up over all steps.
      b2: the decay given to ``second_moment``, likewise.
      as_in_optax: calculate ``b^t`` as optax does, from ``b`` rounded to the width of the arrays:
        7e-6 off in float32 for 0.999, where ``-expm1(t log b)`` is right to rounding.

    ValueError if neither is given, or if there is no such average, or it is corrected already.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, debias, first_moment
    >>> rule = adaptive(first_moment(0.5), debias(b1=0.5))
    >>> print(rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [2.]
    """
    if b1 is None and b2 is None:
        raise ValueError("debias needs b1, b2 or both: the decays of the averages it corrects.")
    check_decay(**given(b1=b1, b2=b2))

    def line(step: AdaptiveStep) -> AdaptiveStep:
        if b1 is not None:
            c1 = step.correction("direction", b1, as_in_optax=as_in_optax)
            step = step.set(direction=step.direction / c1)
        if b2 is not None:
            c2 = step.correction("second_moment", b2, as_in_optax=as_in_optax)
            step = step.set(second_moment=step.second_moment / c2)
        return step

    return line


@stage
def nesterov_moment(b1: Hyperparameter, *, as_in_optax: bool = False) -> OneArray:
    """Looks one step ahead: ``b1 m_t / (1 - b1^{t+1}) + (1 - b1) g_t / (1 - b1^t)``.

    Reads ``gradient`` and ``direction`` (m_t), replaces ``direction``; includes the debiasing.
    Remembers nothing. ``optax.adam(nesterov=True)``; after Dozat 2016 (OpenReview
    OM0jvwB8jIp57ZJjtNEZ), without its momentum schedule.

    Args:
      b1: the decay given to ``first_moment``, in [0, 1).
      as_in_optax: see ``debias``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, nesterov_moment
    >>> rule = adaptive(first_moment(0.5), nesterov_moment(0.5))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [4.]
    """
    check_decay(b1=b1)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        m, g, b = step.raw("direction"), squarable(step.gradient), step.at(b1)
        now = step.correction("direction", b1, as_in_optax=as_in_optax)
        ahead = step.correction_ahead(b1, as_in_optax=as_in_optax)
        return step.set(direction=b * (m / ahead) + (1 - b) * (g / now))

    return line


@stage
def nadam_moment(
    b1: Hyperparameter,
    momentum_decay: Hyperparameter = 0.004,
    *,
    name: str = "momentum_product",
    dtype: DTypeLike | None = None,
) -> WholeTree:
    """Nesterov's look ahead with Dozat's warmed momentum.

    ``mu_t = b1 (1 - 0.96^(t d) / 2)``, ``p_t = p_{t-1} mu_t`` with ``p_0 = 1``, and the direction
    is ``mu_{t+1} m_t / (1 - p_t mu_{t+1}) + (1 - mu_t) g_t / (1 - p_t)``.

    Reads ``gradient`` and ``direction`` (m_t, the average with the constant b1), replaces
    ``direction``; includes the debiasing. Dozat 2016, OpenReview OM0jvwB8jIp57ZJjtNEZ; the forms of
    ``torch.optim.NAdam`` and ``keras.optimizers.Nadam``.

    Args:
      b1: the decay given to ``first_moment``, in [0, 1), or a schedule of it.
      momentum_decay: d, at least 0, per step: 0.004 in PyTorch, 1 in Keras.
      name: the name of its buffer ``momentum_product``: a real scalar, 1 at first.
      dtype: the buffer's dtype, float32 at least.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, nadam_moment
    >>> rule = adaptive(first_moment(0.5), nadam_moment(0.5, momentum_decay=0.0))
    >>> print(rule.update(jnp.array([7.5]), rule.init(jnp.zeros(1)))[0].round(4))
    [8.5]
    """
    check_decay(b1=b1)
    check_nonnegative(momentum_decay=momentum_decay)

    def decay_of_momentum(step: Any) -> Any:
        return value_at(momentum_decay, step + 1, "momentum_decay")

    def now(step: Any) -> Any:
        t, d = jnp.asarray(step + 1, float), decay_of_momentum(step)
        return value_at(b1, step + 1, "b1") * (1 - 0.5 * 0.96 ** (t * d))

    def ahead(step: Any) -> Any:
        t, d = jnp.asarray(step + 1, float) + 1, decay_of_momentum(step)
        return value_at(b1, step + 1, "b1") * (1 - 0.5 * 0.96 ** (t * d))

    def line(steps: OpenStep) -> OpenStep:
        product = steps.remember(
            name, lambda p, mu: p * mu, steps.at(now), initial=1.0, dtype=dtype
        )

        def look_ahead(step: AdaptiveStep) -> AdaptiveStep:
            m, g = step.raw("direction"), squarable(step.gradient)
            step.pay("direction", b1)
            mu, mu_next, p = step.at(now), step.at(ahead), step.at(product)
            # Quotients of scalars: XLA may turn a division of arrays into a product, or not.
            return step.set(direction=mu_next / (1 - p * mu_next) * m + (1 - mu) / (1 - p) * g)

        return steps.each(look_ahead)

    return WholeTree(line)


@stage
def heavy_ball(
    momentum: Hyperparameter,
    *,
    dampening: Hyperparameter = 0.0,
    nesterov: bool = False,
    name: str = "velocity",
    dtype: DTypeLike | None = None,
) -> OneArray:
    """Momentum: ``w_t = momentum w_{t-1} + (1 - dampening) d_t``, with ``w_1 = d_1``.

    Reads and replaces ``direction`` by ``w_t``, or with ``nesterov`` by ``d_t + momentum w_t``. It
    is a sum and not an average: at a constant direction it grows to ``1 / (1 - momentum)`` of it.
    The first value is not dampened, as in ``torch.optim.SGD``. Polyak 1964; Sutskever et al. 2013.

    Args:
      momentum: in [0, 1), or a schedule of it.
      dampening: in [0, 1), or a schedule of it.
      nesterov: look one step ahead.
      name: the name of its buffer ``velocity``: one array per parameter, zeros at first.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, heavy_ball
    >>> rule = adaptive(heavy_ball(0.5))
    >>> _, state = rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))
    >>> print(rule.update(jnp.array([2.0]), state)[0].round(4))
    [3.]
    """
    check_decay(momentum=momentum, dampening=dampening)

    def line(step: AdaptiveStep) -> AdaptiveStep:
        d, mu = step.direction, step.decay_at(momentum)
        undamped = step.at(jnp.where(step.count == 1, 1.0, 1 - step.now.at(dampening)))
        velocity = step.remember(
            name, lambda w, d: summable(mu * w + undamped * d, d), d, dtype=dtype
        )
        step = step.set(direction=velocity)
        return step.set(direction=summable(d + mu * velocity, d)) if nesterov else step

    return line


@stage
def amsgrad_max(*, name: str = "nu_max", dtype: DTypeLike | None = None) -> OneArray:
    """The largest second moment so far: ``v^_t = max(v^_{t-1}, v_t)``, with ``v^_0 = 0``.

    Reads and replaces ``second_moment``, whatever form it has where this stands: raw before
    ``debias``, corrected after it or after ``scale_by_adam``. It must come before any stage that
    turns the rate into values. AMSGrad (Reddi, Kale & Kumar 2018, OpenReview ryQu7f-RZ, Algorithm
    2).

    Args:
      name: the name of its buffer ``nu_max``: real, zeros at first, in the shape of the second
        moment.
      dtype: the buffer's dtype; default: the parameter's, float32 for 16-bit parameters.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, amsgrad_max, per_weight_rate, second_moment
    >>> rule = adaptive(second_moment(0.0), amsgrad_max(), per_weight_rate(eps=0.0))
    >>> state = rule.init(jnp.zeros(1))
    >>> _, state = rule.update(jnp.array([4.0]), state)
    >>> print(rule.update(jnp.array([1.0]), state)[0].round(4))
    [0.25]
    """

    def line(step: AdaptiveStep) -> AdaptiveStep:
        largest = step.remember(name, jnp.maximum, step.second_moment, dtype=dtype)
        return step.limit(second_moment=largest)

    return line
