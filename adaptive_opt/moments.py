"""Stages on what is remembered of the gradient: its moving averages, and corrections of them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.policies import (
    Hyperparameter,
    Scope,
    Tree,
    axes_of,
    axes_split,
    check_decay,
    check_nonnegative,
    choose,
)
from adaptive_opt.stage import Stage, compose, stage
from adaptive_opt.step import AdaptiveStep


def moving_average(new: Any, average: Any, *, decay: Any) -> Any:
    """``(1 - decay) * new + decay * average``, in the order of terms that optax uses."""
    return (1 - decay) * new + decay * average


def absolute_square(x: jax.Array) -> jax.Array:
    return x**2 if jnp.isrealobj(x) else (x.conj() * x).real


@stage(reads=("direction",), replaces=("direction",), keeps="direction", biases={"direction": "b1"})
def first_moment(b1: Hyperparameter, *, name: str = "mu", dtype: DTypeLike | None = None) -> Any:
    """The moving average of the direction: ``m_t = b1 m_{t-1} + (1 - b1) d_t``, with ``m_0 = 0``.

    Reads and replaces ``direction``, which is the gradient unless a stage before has changed it.
    Adam's biased first moment estimate (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b1: decay in [0, 1), or a schedule of it.
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

    def line(step, mu):
        mu = step.map(moving_average, step.direction, mu, decay=step.at(b1))
        return step.replace(direction=mu), mu

    return line


@stage(
    reads=("gradient",),
    replaces=("second_moment",),
    keeps="second_moment",
    biases={"second_moment": "b2"},
)
def second_moment(
    b2: Hyperparameter,
    *,
    scope: Scope = "weight",
    reduce: str = "sum",
    axis_name: str | tuple[str, ...] | None = None,
    initial: float = 0.0,
    name: str = "nu",
    dtype: DTypeLike | None = None,
) -> Any:
    """The moving average of the squared gradient: ``v_t = b2 v_{t-1} + (1 - b2) |g_t|^2``.

    Reads ``gradient``, sets ``second_moment``; real for complex gradients.
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
    total = choose("scope", scope, TOTALS)
    reduction = choose("reduce", reduce, REDUCTIONS)

    def line(step, nu):
        squares = total(step, step.map(absolute_square, step.gradient), reduction, axis_name)
        nu = step.map(moving_average, squares, nu, decay=step.at(b2))
        return step.replace(second_moment=nu), nu

    return line


def _of_every_weight(step: AdaptiveStep, squares: Tree, reduction: Any, axis_name: Any) -> Tree:
    del step, reduction, axis_name
    return squares


def _of_every_tensor(step: AdaptiveStep, squares: Tree, reduction: Any, axis_name: Any) -> Tree:
    return step.map(lambda x: _over([x], reduction, axis_name), squares)


def _of_the_tree(step: AdaptiveStep, squares: Tree, reduction: Any, axis_name: Any) -> Tree:
    total = _over(jax.tree.leaves(squares), reduction, axis_name)
    return step.map(lambda _: total, step.gradient)


TOTALS = {"weight": _of_every_weight, "tensor": _of_every_tensor, "tree": _of_the_tree}
REDUCTIONS = {
    "sum": lambda total, size: total,
    "mean": lambda total, size: total / float(max(size, 1)),
}


def _over(leaves: list[jax.Array], reduction: Any, axis_name: Any) -> jax.Array:
    """The sum or the mean of all numbers in the leaves, on all devices that hold parts of them."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and axis_name is None:
        raise ValueError(
            f"a scope wider than a weight runs over the axes {', '.join(map(str, manual))} of"
            " shard_map or pmap, where each device sees only its part of the gradient. Give"
            " axis_name= the axes over which the parameters are split, or axis_name=() if every"
            " device has the whole gradient."
        )
    widest = max((x.dtype for x in leaves), key=lambda d: d.itemsize, default=jnp.float32)
    axes = axes_of(axis_name)
    alike: dict[tuple[str, ...], list[jax.Array]] = {}
    for x in leaves:
        alike.setdefault(axes_split(x, axes), []).append(x)
    total, size = jnp.zeros((), widest), 0
    for split, parts in alike.items():
        part = sum((jnp.sum(x).astype(widest) for x in parts), jnp.zeros((), widest))
        total = total + (jax.lax.psum(part, split) if split else part)
        size += sum(x.size for x in parts) * jax.lax.psum(1, split)
    return reduction(total, size)


@stage(reads=("gradient",), replaces=("second_moment",), keeps="second_moment")
def sum_of_squares(
    *, initial: float = 0.0, name: str = "sum_of_squares", dtype: DTypeLike | None = None
) -> Any:
    """All squared gradients so far, summed: ``v_t = v_{t-1} + |g_t|^2``.

    Reads ``gradient``, sets ``second_moment``. AdaGrad (Duchi, Hazan & Singer 2011, JMLR 12).

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

    def line(step, total):
        total = step.map(lambda g, v: absolute_square(g) + v, step.gradient, total)
        return step.replace(second_moment=total), total

    return line


@stage(reads=("gradient",), replaces=("second_moment",), keeps="second_moment")
def infinity_moment(
    b2: Hyperparameter,
    eps: Hyperparameter = 0.0,
    *,
    name: str = "infinity_norm",
    dtype: DTypeLike | None = None,
) -> Any:
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

    def line(step, norm):
        norm = step.map(
            lambda g, u, *, b2, eps: jnp.maximum(b2 * u, jnp.abs(g) + eps),
            step.gradient,
            norm,
            b2=step.at(b2),
            eps=step.at(eps),
        )
        return step.replace(second_moment=norm), norm

    return line


@stage(reads=("gradient", "second_moment"), replaces=("second_moment",), keeps="gradient")
def centered_moment(
    b2: Hyperparameter, *, name: str = "mean_gradient", dtype: DTypeLike | None = None
) -> Any:
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

    def line(step, mean):
        mean = step.map(moving_average, step.gradient, mean, decay=step.at(b2))
        centered = step.map(
            lambda v, n: jnp.maximum(v - absolute_square(n), 0), step.second_moment, mean
        )
        return step.replace(second_moment=centered), mean

    return line


def debias(b1: Hyperparameter | None = None, b2: Hyperparameter | None = None) -> Stage:
    """Corrects averages for their start at zero: ``m_t / (1 - b1^t)`` and ``v_t / (1 - b2^t)``.

    With ``b1`` reads and replaces ``direction``, with ``b2`` reads and replaces ``second_moment``;
    at least one must be given. Remembers nothing. Where it stands matters: before ``amsgrad_max``
    the maximum is over corrected moments (optax), after it over raw ones (PyTorch).
    Adam's bias-corrected estimates (Kingma & Ba 2015, arXiv:1412.6980, Algorithm 1).

    Args:
      b1: the decay given to ``first_moment``, in [0, 1). A schedule is taken at the current step
        (``1 - b1_t^t``, as in PyTorch and optax), not multiplied up over all steps.
      b2: the decay given to ``second_moment``, likewise.

    ValueError if neither is given, or if there is no such average, or it is corrected already.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, debias, first_moment
    >>> rule = adaptive(first_moment(0.5), debias(b1=0.5))
    >>> print(rule.update(jnp.array([2.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [2.]
    """
    if b1 is None and b2 is None:
        raise ValueError("debias needs b1, b2 or both: the decays of the averages it corrects.")
    direction = () if b1 is None else (_debias_direction(b1),)
    second = () if b2 is None else (_debias_second_moment(b2),)
    return compose("debias", {"b1": b1, "b2": b2}, *direction, *second)


def bias_correction(decay: Hyperparameter, step: Any, ahead: int = 0) -> Any:
    """``1 - decay^t`` at this step, or ``ahead`` steps later."""
    count = step.count
    for _ in range(ahead):
        count = optax.safe_increment(count)
    return 1 - step.at(decay) ** jnp.asarray(count, float)


@stage(
    reads=("direction",),
    replaces=("direction",),
    debiases={"direction": "b1"},
    called="debias(b1)",
)
def _debias_direction(b1: Hyperparameter) -> Any:
    check_decay(b1=b1)

    def line(step):
        c1 = bias_correction(b1, step)
        return step.replace(direction=step.map(divided, step.direction, by=c1))

    return line


@stage(
    reads=("second_moment",),
    replaces=("second_moment",),
    debiases={"second_moment": "b2"},
    called="debias(b2)",
)
def _debias_second_moment(b2: Hyperparameter) -> Any:
    check_decay(b2=b2)

    def line(step):
        c2 = bias_correction(b2, step)
        return step.replace(second_moment=step.map(divided, step.second_moment, by=c2))

    return line


def divided(x: Any, *, by: Any) -> Any:
    return x / by


@stage(
    reads=("gradient", "direction"),
    replaces=("direction",),
    debiases={"direction": "b1"},
    raw=("direction",),
)
def nesterov_moment(b1: Hyperparameter) -> Any:
    """Looks one step ahead: ``b1 m_t / (1 - b1^{t+1}) + (1 - b1) g_t / (1 - b1^t)``.

    Reads ``gradient`` and ``direction`` (m_t), replaces ``direction``; includes the debiasing.
    Remembers nothing. ``optax.adam(nesterov=True)``; after Dozat 2016 (OpenReview
    OM0jvwB8jIp57ZJjtNEZ), without its momentum schedule.

    Args:
      b1: the decay given to ``first_moment``, in [0, 1).

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, nesterov_moment
    >>> rule = adaptive(first_moment(0.5), nesterov_moment(0.5))
    >>> print(rule.update(jnp.array([3.0]), rule.init(jnp.zeros(1)))[0].round(4))
    [4.]
    """
    check_decay(b1=b1)

    def line(step):
        ahead = step.map(
            lambda m, g, *, b, next, now: b * (m / next) + (1 - b) * (g / now),
            step.direction,
            step.gradient,
            b=step.at(b1),
            next=bias_correction(b1, step, ahead=1),
            now=bias_correction(b1, step),
        )
        return step.replace(direction=ahead)

    return line


@stage(
    reads=("gradient", "direction"),
    replaces=("direction",),
    debiases={"direction": "b1"},
    raw=("direction",),
    keeps="rate",
    scope="tree",
    initial=1.0,
)
def nadam_moment(
    b1: Hyperparameter,
    momentum_decay: Hyperparameter = 0.004,
    *,
    name: str = "momentum_product",
    dtype: DTypeLike | None = None,
) -> Any:
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

    def line(step, product):
        t, b, d = jnp.asarray(step.count, float), step.at(b1), step.at(momentum_decay)
        now, ahead = (b * (1 - 0.5 * 0.96 ** (n * d)) for n in (t, t + 1))
        product = step.map(lambda p, *, now: p * now, product, now=now)
        direction = step.map(
            lambda m, g, p, *, now, ahead: (
                # Quotients of scalars: XLA may turn a division of arrays into a product, or not.
                ahead / (1 - p * ahead) * m + (1 - now) / (1 - p) * g
            ),
            step.direction,
            step.gradient,
            product,
            now=now,
            ahead=ahead,
        )
        return step.replace(direction=direction), product

    return line


@stage(reads=("direction",), replaces=("direction",), keeps="direction")
def heavy_ball(
    momentum: Hyperparameter,
    *,
    dampening: Hyperparameter = 0.0,
    nesterov: bool = False,
    name: str = "velocity",
    dtype: DTypeLike | None = None,
) -> Any:
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

    def line(step, velocity):
        velocity = step.map(
            lambda d, w, *, mu, undamped: mu * w + undamped * d,
            step.direction,
            velocity,
            mu=step.at(momentum),
            undamped=jnp.where(step.count == 1, 1.0, 1 - step.at(dampening)),
        )
        if not nesterov:
            return step.replace(direction=velocity), velocity
        ahead = step.map(
            lambda d, w, *, mu: d + mu * w, step.direction, velocity, mu=step.at(momentum)
        )
        return step.replace(direction=ahead), velocity

    return line


@stage(
    reads=("second_moment",),
    replaces=("second_moment",),
    keeps="second_moment",
    limits="second_moment",
)
def amsgrad_max(
    *, scope: Scope | None = None, name: str = "nu_max", dtype: DTypeLike | None = None
) -> Any:
    """The largest second moment so far: ``v^_t = max(v^_{t-1}, v_t)``, with ``v^_0 = 0``.

    Reads and replaces ``second_moment``, whatever form it has where this stands: raw before
    ``debias``, corrected after it or after ``scale_by_adam``. It must come before any stage that
    turns the rate into values. AMSGrad (Reddi, Kale & Kumar 2018, OpenReview ryQu7f-RZ, Algorithm
    2).

    Args:
      scope: that of ``second_moment``, which a bracket knows; in a flat chain say it again, or the
        buffer has the full shape.
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

    def line(step, nu_max):
        nu_max = step.map(jnp.maximum, nu_max, step.second_moment)
        return step.replace(second_moment=nu_max), nu_max

    return line
