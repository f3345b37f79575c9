"""Schedules that belong together: rate and momentum of one cycle, restarts and their weight decay.

Ordinary schedules (warm-up, cosine, linear, piecewise) are optax's; any of them goes wherever a
recipe takes a number. These are the ones it does not have. Every schedule is a function of the
0-based step number, which comes from the count in the optimizer's state, so that a restored state
goes on where it was.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.core.checks import (
    check_at_least_one,
    check_fraction,
    check_nonnegative,
    check_positive,
    check_whole,
    choose,
)
from adaptive_opt.core.describe import bound

P = ParamSpec("P")
T = TypeVar("T")
Anneal = Callable[[Any, Any, Any], Any]

SCHEDULES: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        optax.constant_schedule,
        optax.linear_schedule,
        optax.polynomial_schedule,
        optax.exponential_decay,
        optax.cosine_decay_schedule,
        optax.warmup_constant_schedule,
        optax.warmup_cosine_decay_schedule,
        optax.warmup_exponential_decay_schedule,
        optax.piecewise_constant_schedule,
        optax.piecewise_interpolate_schedule,
        optax.linear_onecycle_schedule,
        optax.cosine_onecycle_schedule,
        optax.sgdr_schedule,
        optax.join_schedules,
    )
}
"""The functions that make a schedule, by name: optax's, and those of this module."""


@jax.tree_util.register_pytree_node_class
class Scheduled:
    """A schedule that knows the function of ``SCHEDULES`` that made it, and of which arguments.

    Two are equal if these are. A registered pytree with every argument that is an array in sight.
    """

    def __init__(self, name: str, arguments: Mapping[str, Any]) -> None:
        self.name, self.arguments = name, dict(arguments)

    @functools.cached_property
    def __wrapped__(self) -> Any:
        return SCHEDULES[self.name](**self.arguments)

    def __call__(self, step: Any) -> Any:
        return self.__wrapped__(step)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scheduled) or self.name != other.name:
            return False
        mine, others = self.arguments, other.arguments
        return set(mine) == set(others) and all(_same(mine[k], others[k]) for k in mine)

    def __hash__(self) -> int:
        return hash((self.name, frozenset(self.arguments)))

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{k}={v!r}' for k, v in self.arguments.items())})"

    def tree_flatten(self) -> Any:
        plain = {k: v for k, v in self.arguments.items() if _is_plain(v)}
        others = {k: v for k, v in self.arguments.items() if k not in plain}
        return (others,), (self.name, tuple(plain.items()))

    @classmethod
    def tree_unflatten(cls, known: Any, children: Any) -> Scheduled:
        name, plain = known
        return cls(name, dict(plain) | children[0])


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _same(a: Any, b: Any) -> bool:
    if a is b or isinstance(a, Tracer) or isinstance(b, Tracer):
        return a is b
    return bool(np.all(a == b))


def _remembered(factory: Callable[P, T]) -> Callable[P, T]:
    """What the function returns knows its arguments: a schedule, or each of a tuple of several."""
    signature, name = inspect.signature(factory), factory.__name__

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Any:
        arguments = bound(signature, name, args, kwargs)
        made = factory(*args, **kwargs)
        if isinstance(made, OneCycle):
            return OneCycle(*(Scheduled(f"{name}.{field}", arguments) for field in made._fields))
        return Scheduled(name, arguments) if callable(made) else made

    return make


def _registered(name: str, field: str | None = None) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Enter a function, or one field of what it returns, into the register."""

    def enter(factory: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> Any:
            made = factory(*args, **kwargs)
            return made if field is None else getattr(made, field)

        SCHEDULES[name] = make
        return factory

    return enter


def _cosine(start: Any, end: Any, fraction: Any) -> Any:
    return end + (start - end) / 2 * (jnp.cos(jnp.pi * fraction) + 1)


def _linear(start: Any, end: Any, fraction: Any) -> Any:
    return start + (end - start) * fraction


ANNEALS: dict[str, Anneal] = {"cos": _cosine, "linear": _linear}


class Phase(NamedTuple):
    """From one value to another, ending at a step that need not be whole."""

    end_step: float
    start: float
    end: float
    anneal: Anneal


def _in_phases(phases: tuple[Phase, ...]) -> optax.Schedule:
    """One phase after the other; the last value for ever after."""

    def schedule(step: Any) -> Any:
        t = jnp.asarray(step, float)
        value = jnp.asarray(phases[-1].end, float)
        begins = [0.0, *(phase.end_step for phase in phases[:-1])]
        for begin, phase in reversed(list(zip(begins, phases, strict=True))):
            length = max(phase.end_step - begin, 1e-9)  # of a phase without any step
            during = phase.anneal(phase.start, phase.end, (t - begin) / length)
            value = jnp.where(t <= phase.end_step, during, value)
        return value

    return schedule


class OneCycle(NamedTuple):
    """The two schedules of one cycle, to be given to an optimizer together."""

    learning_rate: optax.Schedule
    b1: optax.Schedule
    """For b1 of Adam and its kin, or the momentum of SGD."""


@_remembered
@_registered("one_cycle.b1", "b1")
@_registered("one_cycle.learning_rate", "learning_rate")
def one_cycle(
    max_learning_rate: float,
    total_steps: int,
    *,
    form: str = "torch",
    pct_start: float | None = None,
    div_factor: float = 25.0,
    final_div_factor: float | None = None,
    max_momentum: float = 0.95,
    base_momentum: float = 0.85,
    anneal: str | None = None,
    plateau: float | None = None,
) -> OneCycle:
    """The learning rate up and down again while the momentum goes down and up.

    From ``max_learning_rate / div_factor`` to ``max_learning_rate`` and then to nearly nothing;
    ``max_momentum`` to ``base_momentum`` and back. Smith & Topin 2018, arXiv:1708.07120, in the
    forms of those who made it popular. ``adamw(cycle.learning_rate, b1=cycle.b1)`` with the "torch"
    form equals ``torch.optim.lr_scheduler.OneCycleLR`` driving ``torch.optim.AdamW`` (or ``Adam``):
    the bias correction uses the current b1, as there.

    Args:
      max_learning_rate: at the peak; greater than 0.
      total_steps: of the whole cycle, at least 2; after it both stay where they end.
      form: "torch": the rise ends at step ``pct_start total_steps - 1`` (fractional), pct_start
        0.3; the end, ``max / div_factor / final_div_factor`` with final_div_factor 1e4, is reached.
        "fastai1": the rise ends at ``int(pct_start total_steps)``, pct_start 0.3; the same end is
        not quite reached (fastai v1's OneCycleScheduler).
        "fastai2": position ``step / total_steps``, pct_start 0.25, the end is
        ``max / final_div_factor`` with 1e5 (fastai 2's fit_one_cycle, which does it in float32).
        "plateau": a fast linear rise, a long plateau and a fall, the cycle modified for language
        models; pct_start 0.1.
      pct_start: the fraction of the steps in which the rate rises, in (0, 1).
      div_factor: how much lower the rate starts, at least 1.
      final_div_factor: how much lower it ends, at least 1; relative to the start in the "torch",
        "fastai1" and "plateau" forms, to the maximum in "fastai2".
      max_momentum, base_momentum: in [0, 1).
      anneal: "cos" or "linear"; default: "cos", and "linear" for the plateau's two slopes.
      plateau: the fraction of the steps spent at the maximum, in the "plateau" form only; at least
        0, default 0.6. With ``pct_start`` it must leave at least a step for the fall.

    torch's ``three_phase=True``, in which the rate first falls back to its start and then on, is
    not offered.

    >>> from adaptive_opt import adamw, one_cycle
    >>> cycle = one_cycle(1e-2, total_steps=100)
    >>> [round(float(cycle.learning_rate(t)), 6) for t in (0, 29, 99)]
    [0.0004, 0.01, 0.0]
    >>> [round(float(cycle.b1(t)), 6) for t in (0, 29, 99)]
    [0.95, 0.85, 0.95]
    >>> optimizer = adamw(cycle.learning_rate, b1=cycle.b1)
    """
    check_positive(max_learning_rate=max_learning_rate)
    check_at_least_one(div_factor=div_factor)
    check_whole(2, total_steps=total_steps)
    usual = {"torch": 0.3, "fastai1": 0.3, "fastai2": 0.25, "plateau": 0.1}
    rise = choose("form", form, usual) if pct_start is None else pct_start
    if not 0 < rise < 1:
        raise ValueError(f"pct_start must be between 0 and 1, got {rise}.")
    if plateau is not None and form != "plateau":
        raise ValueError(f'plateau= belongs to form="plateau", got form={form!r}.')
    flat = 0.6 if plateau is None else plateau
    if form == "plateau" and not 0 <= flat <= 1 - rise - 2 / total_steps:
        raise ValueError(
            "plateau must be at least 0 and leave at least a step for the fall, got"
            f" {flat:g} with pct_start={rise:g} and total_steps={total_steps}."
        )
    for name, value in (("max_momentum", max_momentum), ("base_momentum", base_momentum)):
        if not 0 <= value < 1:
            raise ValueError(f"{name} must be in [0, 1), got {value}.")
    curve = choose("anneal", anneal or ("linear" if form == "plateau" else "cos"), ANNEALS)
    if final_div_factor is None:
        final_div_factor = 1e5 if form == "fastai2" else 1e4
    check_at_least_one(final_div_factor=final_div_factor)
    low = max_learning_rate / div_factor
    last = max_learning_rate if form == "fastai2" else low
    last /= final_div_factor
    n = total_steps
    ends = {
        "torch": (rise * n - 1, n - 1),
        "fastai1": (max(1, int(n * rise)), n),
        "fastai2": (rise * n, n),
        "plateau": (rise * n, (rise + flat) * n, n - 1),
    }[form]

    def through(outside: float, inside: float, end: float) -> optax.Schedule:
        up, down = Phase(ends[0], outside, inside, curve), Phase(ends[-1], inside, end, curve)
        stay = [Phase(middle, inside, inside, curve) for middle in ends[1:-1]]
        return _in_phases((up, *stay, down))

    return OneCycle(
        learning_rate=through(low, max_learning_rate, last),
        b1=through(max_momentum, base_momentum, max_momentum),
    )


@_remembered
@_registered("warm_restarts")
def warm_restarts(
    period: int,
    *,
    growth: float = 1.0,
    minimum: float = 0.0,
    maximum: float = 1.0,
    form: str = "paper",
    start: int = 0,
) -> optax.Schedule:
    """A multiplier that falls along a cosine and jumps back up, again and again.

    ``minimum + (maximum - minimum) (1 + cos(pi t / T)) / 2`` with t counted from the last restart.
    SGDR (Loshchilov & Hutter 2017, arXiv:1608.03983). As ``schedule=`` of ``adamw``, ``nadamw`` and
    ``sgdw``, with ``normalized_weight_decay``, it makes AdamWR and SGDWR.

    Args:
      period: steps to the first restart, at least 1 ("keras-adamw": at least 2).
      growth: every period is so many times longer than the one before; at least 1.
      minimum, maximum: of the multiplier; at least 0, the minimum at most the maximum.
      form: "paper": ``T = period``, so that the minimum is approached and not reached.
        "keras-adamw": ``T = period - 1``: every period's last step takes the minimum (with 0, a
        lost step), and the very first step takes 1 whatever the maximum, as in that package.
      start: the position in the period at the first step (``t_cur`` in that package).

    >>> from adaptive_opt import warm_restarts
    >>> eta = warm_restarts(4)
    >>> [round(float(eta(t)), 4) for t in range(6)]
    [1.0, 0.8536, 0.5, 0.1464, 1.0, 0.8536]
    """
    check_nonnegative(minimum=minimum, maximum=maximum, start=start)
    if minimum > maximum:
        raise ValueError(f"minimum must be at most maximum, got {minimum:g} and {maximum:g}.")
    check_at_least_one(period=period, growth=growth)
    choose("form", form, {"paper": None, "keras-adamw": None})
    if form == "keras-adamw" and (growth != 1 or period < 2):
        raise ValueError('form="keras-adamw" needs growth=1 and a period of at least 2.')
    locate = _locator(period, growth, start)

    def schedule(step: Any) -> Any:
        position, length = locate(jnp.asarray(step))
        if form == "keras-adamw":
            eta = _cosine(maximum, minimum, position / (period - 1))
            return jnp.where(jnp.asarray(step) == 0, 1.0, eta)
        return _cosine(maximum, minimum, position / length)

    return schedule


@_remembered
@_registered("normalized_weight_decay")
def normalized_weight_decay(
    weight_decay: float, period: int, *, growth: float = 1.0
) -> float | optax.Schedule:
    """A weight decay that does not depend on how long training takes: ``wd sqrt(1 / period)``.

    Loshchilov & Hutter 2019, arXiv:1711.05101, appendix B.1: ``wd sqrt(b / (B T))`` for batches of
    b out of B samples in T epochs, where ``B T / b`` is the number of steps; the package
    ``keras-adamw`` does the same with its ``total_iterations``.

    Args:
      weight_decay: the normalised one, at least 0; the paper finds 0.025 to 0.05 good for AdamW.
      period: the number of steps, or of those to the first restart.
      growth: as in ``warm_restarts``: with growing periods it is a schedule.

    >>> from adaptive_opt import normalized_weight_decay
    >>> normalized_weight_decay(0.05, 10_000)
    0.0005
    """
    check_nonnegative(weight_decay=weight_decay)
    check_at_least_one(period=period, growth=growth)
    if growth == 1:
        return weight_decay * math.sqrt(1 / period)
    locate = _locator(period, growth)
    return lambda step: weight_decay * jnp.sqrt(1 / locate(jnp.asarray(step))[1])


def _locator(
    period: float, growth: float, start: int = 0
) -> Callable[[jax.Array], tuple[Any, Any]]:
    """A function of the step: how many steps ago its period began, and how long it is.

    At step 0 ``start`` steps of the first period have passed; a sum of the two whole numbers would
    wrap at the last steps there are. Nor is there a division, which a compiler turns into a product
    with a rounded reciprocal: the step of a restart would now and then count as the one before it.
    """
    if growth == 1:
        begun = start % period
        return lambda t: (
            jnp.asarray(jnp.remainder(jnp.remainder(t, period) + begun, period), float),
            period,
        )
    begins, lengths = [0.0], [float(period)]
    while begins[-1] < 2**31:  # the largest count there is
        begins.append(begins[-1] + lengths[-1])
        lengths.append(period * growth ** len(lengths))

    def locate(t: jax.Array) -> tuple[jax.Array, jax.Array]:
        t = jnp.asarray(t, float) + start
        index = jnp.searchsorted(jnp.asarray(begins, float), t, side="right") - 1
        return t - jnp.asarray(begins, float)[index], jnp.asarray(lengths, float)[index]

    return locate


@_remembered
@_registered("corrected_weight_decay")
def corrected_weight_decay(
    weight_decay: float, schedule: optax.Schedule, *, peak: float
) -> optax.Schedule:
    """A weight decay that falls with the learning rate: ``wd lr_t / peak``.

    In its ordinary place the decay is times the learning rate once more, ``lr_t^2 wd / peak`` in
    all. AdamC (Defazio 2025, arXiv:2506.02285): the norm of the weights in front of a normalisation
    settles where ``lr_t wd`` balances the growth by the steps, which goes with ``lr_t^2``; with an
    ordinary decay the gradient grows as the learning rate falls. The paper corrects normalised
    layers only; give the others (embeddings, the head) the plain number, in a group of their own.

    Args:
      weight_decay: that at the peak, at least 0.
      schedule: the learning rate that the optimizer has.
      peak: its largest value; positive.

    >>> import optax
    >>> from adaptive_opt import adamw, corrected_weight_decay
    >>> rate = optax.linear_schedule(1e-2, 0.0, 100)
    >>> optimizer = adamw(rate, weight_decay=corrected_weight_decay(0.1, rate, peak=1e-2))
    >>> round(float(corrected_weight_decay(0.1, rate, peak=1e-2)(50)), 6)
    0.05
    """
    check_nonnegative(weight_decay=weight_decay)
    check_positive(peak=peak)
    return lambda step: weight_decay * (schedule(step) / peak)


@_remembered
@_registered("growing_memory")
def growing_memory(exponent: float = 0.8, *, largest: float = 1.0) -> optax.Schedule:
    """A decay of averages whose memory grows with the steps: ``min(1 - t^-exponent, largest)``.

    t is 1 at the first step, whose decay is 0: such an average needs no correction for its start at
    zero. Adafactor's second moment (Shazeer & Stern 2018, arXiv:1804.04235, section 7.2).

    Args:
      exponent: greater than 0; at 1 all gradients count the same.
      largest: at most 1; below 1 the memory ends at about ``1 / (1 - largest)`` steps (Zhai et al.
        2021, arXiv:2106.04560, section 3.4: 0.999).

    >>> from adaptive_opt import growing_memory
    >>> [round(float(growing_memory(0.5, largest=0.8)(step)), 4) for step in (0, 3, 99)]
    [0.0, 0.5, 0.8]
    """
    check_positive(exponent=exponent)
    check_fraction(largest=largest)

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, float) + 1
        return jnp.minimum(1 - t**-exponent, largest)

    return schedule


@_remembered
@_registered("relative_step")
def relative_step(largest: float = 1e-2, *, warmup: float | None = None) -> optax.Schedule:
    """Adafactor's learning rate, in units of the parameters' size: ``min(largest, 1 / sqrt(t))``.

    t is 1 at the first step. For ``adafactor``. Shazeer & Stern 2018, arXiv:1804.04235, section 9;
    the default of Tensor2Tensor, Mesh TensorFlow and transformers (``relative_step=True``).

    Args:
      largest: positive.
      warmup: how much the learning rate rises in a step, positive: ``min(warmup t, 1 / sqrt(t))``,
        in place of ``largest``; 1e-6 in the paper, and in transformers (``warmup_init=True``).

    >>> from adaptive_opt import relative_step
    >>> [round(float(relative_step()(step)), 4) for step in (0, 39_999)]
    [0.01, 0.005]
    """
    check_positive(largest=largest, **({} if warmup is None else {"warmup": warmup}))

    def schedule(step: Any) -> jax.Array:
        t = jnp.asarray(step, float) + 1
        return jnp.minimum(largest if warmup is None else warmup * t, t**-0.5)

    return schedule
