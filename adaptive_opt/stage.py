"""Stages: one line of a paper's listing each.

A stage is an ``optax.GradientTransformationExtraArgs`` whose updates are an open step. It reads the
fields it names, replaces the ones it names, and keeps at most one buffer. :func:`stage` makes one
from a function of a few lines; everything a stage must get right besides its formula (dtypes, None,
the buffer's name, the order of the list, its description) is here and in ``policies``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, ParamSpec

import numpy as np
import optax
from jax.typing import DTypeLike

from adaptive_opt import policies
from adaptive_opt.describe import describe_as
from adaptive_opt.policies import Tree
from adaptive_opt.step import FIELDS, AdaptiveStep, Ledger

P = ParamSpec("P")
Field = Literal["gradient", "direction", "second_moment", "rate"]

_WHERE_IT_COMES_FROM = {
    "second_moment": "second_moment(b2) or scale_by_adam(...)",
    "rate": "per_weight_rate(eps) or scale_by_adam(...)",
}


class Buffer(NamedTuple):
    """What a stage remembers: zeros at first, one array per parameter.

    ``like`` says which field it holds: the gradient or direction (the parameter's dtype), the
    second moment (real) or the rate (real, float32 at least whatever was asked for). 16-bit
    parameters get float32 buffers unless ``dtype`` says otherwise.
    """

    name: str
    like: Field
    dtype: DTypeLike | None = None

    def init(self, params: Tree, state_dtype: DTypeLike | None) -> Tree:
        asked = self.dtype if self.dtype is not None else state_dtype

        def dtype(of_param: Any) -> Any:
            own = policies.wide(of_param)
            if self.like in ("second_moment", "rate"):
                own = policies.real(own)
            if asked is None:
                return own
            chosen = policies.buffer_dtype(asked, own)
            if self.like == "second_moment" and chosen == np.float16:
                raise ValueError(
                    f"the buffer {self.name!r} cannot be float16: squares of gradients below 2e-4"
                    " would be lost in it. Use bfloat16 or float32."
                )
            return policies.wide(chosen) if self.like == "rate" else chosen

        return policies.zeros_like(params, dtype)


class Rule(NamedTuple):
    """A stage without its optax clothes."""

    name: str
    reads: tuple[Field, ...]
    replaces: tuple[Field, ...]
    biases: Field | None
    debiases: tuple[Field, ...]
    fixes_rate: bool
    buffer: Buffer | None
    apply: Callable[..., Any]
    """``step -> step``, or with a buffer ``(step, buffer) -> (step, buffer)``."""

    def note(self, ledger: Ledger) -> Ledger:
        """The ledger after this rule; an error that says where the stage belongs, if not here."""
        for field in self.reads:
            if field not in ledger.filled:
                raise ValueError(
                    f"{self.name} reads the {field} of the step, which is not set yet. Put"
                    f" {self.name} after {_WHERE_IT_COMES_FROM[field]}."
                )
        for field in self.replaces:
            if field in ledger.filled and field not in self.reads:
                raise ValueError(
                    f"{self.name} would overwrite the {field} that an earlier stage has set. Keep"
                    " one of the two; a stage that changes a field must come after the one that"
                    " sets it."
                )
        if "second_moment" in self.replaces and ledger.rate_fixed_by is not None:
            raise ValueError(
                f"{self.name} changes the second moment, but the rate no longer follows it: it"
                f" became values in {ledger.rate_fixed_by}. Put {self.name} before"
                f" {ledger.rate_fixed_by}."
            )
        for field in self.debiases:
            if field not in ledger.biased:
                raise ValueError(
                    f"{self.name} corrects the {field} for its start at zero, but that is no moving"
                    " average here, or has been corrected already. Put it once, after"
                    " first_moment(b1) and second_moment(b2); scale_by_adam(...) corrects by"
                    " itself."
                )
        if self.buffer is not None and self.buffer.name in ledger.buffers:
            raise ValueError(
                f"two stages keep a buffer called {self.buffer.name!r}. Give one of them another"
                f" name: {self.name}(..., name={self.buffer.name + '_2'!r})."
            )
        biased = ledger.biased | ({self.biases} if self.biases else set())
        return Ledger(
            filled=ledger.filled | set(self.replaces),
            rate_fixed_by=self.name if self.fixes_rate else ledger.rate_fixed_by,
            biased=frozenset(biased - set(self.debiases)),
            buffers=ledger.buffers | ({self.buffer.name} if self.buffer else set()),
        )

    def __call__(self, step: AdaptiveStep, buffer: Tree) -> tuple[AdaptiveStep, Tree]:
        ledger = self.note(step.ledger)
        given = step.replace(rate=step.rate_values()) if "rate" in self.reads else step
        if self.buffer is None:
            new = self.apply(given)
        else:
            new, new_buffer = self.apply(given, buffer)
            buffer = policies.keep_dtype(buffer, new_buffer, f"the buffer {self.buffer.name!r}")
        for field in FIELDS:
            if field not in self.replaces and getattr(new, field) is not getattr(given, field):
                raise TypeError(
                    f"{self.name} replaced the {field}, but declares that it replaces only"
                    f" {', '.join(self.replaces) or 'nothing'}: name the field in"
                    " @stage(replaces=)."
                )
        if "rate" not in self.replaces:
            new = new.replace(rate=step.rate)
        return new.replace(ledger=ledger), buffer


def run(
    rules: Iterable[Rule], step: AdaptiveStep, buffers: Mapping[str, Tree]
) -> tuple[AdaptiveStep, dict[str, Tree]]:
    """The step after all the rules, and the buffers they keep, each under its name."""
    kept = dict(buffers)
    for rule in rules:
        if rule.buffer is None:
            step, _ = rule(step, None)
            continue
        name = rule.buffer.name
        if name not in kept:
            raise ValueError(
                f"{rule.name} finds no buffer {name!r} in this state, which holds"
                f" {', '.join(map(repr, kept)) or 'none'}. A state belongs to the optimizer that"
                " initialised it."
            )
        step, kept[name] = rule(step, kept[name])
    return step, kept


def init_buffers(
    rules: Iterable[Rule], params: Tree, state_dtype: DTypeLike | None = None
) -> dict[str, Tree]:
    """The buffers of all the rules before the first step."""
    return {
        rule.buffer.name: rule.buffer.init(params, state_dtype) for rule in rules if rule.buffer
    }


class Stage(optax.GradientTransformationExtraArgs):
    """An optax transformation from open step to open step, made of one or more rules.

    On its own, in a flat chain, its state is a dict of its buffers by name, or an ``EmptyState``.
    In a bracket, ``adaptive(...)`` keeps the buffers of all the stages side by side.
    """

    rules: tuple[Rule, ...]

    def __new__(
        cls,
        rules: tuple[Rule, ...],
        init: optax.TransformInitFn | None = None,
        update: optax.TransformUpdateExtraArgsFn | None = None,
    ) -> Stage:
        name = " + ".join(rule.name for rule in rules)

        def init_buffers_of(params: Tree) -> Any:
            return init_buffers(rules, params) or optax.EmptyState()

        def update_open(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            del params, extra
            if not isinstance(updates, AdaptiveStep):
                raise TypeError(
                    f"{name} needs an open step, but was given plain updates"
                    f" ({type(updates).__name__}). Put open_step() before it and close_step() after"
                    " it, or list it in adaptive(...)."
                )
            step, buffers = run(rules, updates, state if state else {})
            return step, buffers or optax.EmptyState()

        self = super().__new__(cls, init or init_buffers_of, update or update_open)
        self.rules = rules
        return self


def stage(
    *,
    reads: tuple[Field, ...],
    replaces: tuple[Field, ...] = (),
    keeps: Field | None = None,
    biases: Field | None = None,
    debiases: tuple[Field, ...] = (),
    fixes_rate: bool = True,
    called: str | None = None,
) -> Callable[[Callable[P, Callable[..., Any]]], Callable[P, Stage]]:
    """Make a stage of a function that returns one line of an algorithm.

    The decorated function takes the hyperparameters, checks them, and returns the line itself:
    ``line(step) -> step``, or, with a buffer, ``line(step, buffer) -> (step, buffer)``. The line
    sees the whole trees and maps over them with ``step.map``; ``step.at`` gives the current value
    of a hyperparameter. The function's name and arguments become the stage's description.

    Args:
      reads: the fields of the step that the line reads. One that reads ``"rate"`` is given values.
      replaces: the fields it replaces. A field it replaces without reading must not be set yet.
      keeps: the field its buffer is like, if it keeps one; then the function takes ``name`` and
        ``dtype``, the buffer's name in the state and its dtype.
      biases: the field that it turns into an average started at zero.
      debiases: the averages that it corrects for such a start.
      fixes_rate: whether the rate it sets is values, which no longer follow the second moment
        (True) or a :class:`RateRule` (False).
      called: the stage's name; default: the function's.

    Example, a direction that is clipped to [-limit, limit]:

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, stage
    >>> @stage(reads=("direction",), replaces=("direction",))
    ... def clipped_direction(limit: float):
    ...     def line(step):
    ...         clipped = step.map(lambda d: jnp.clip(d, -limit, limit), step.direction)
    ...         return step.replace(direction=clipped)
    ...     return line
    >>> optimizer = adaptive(clipped_direction(0.5))
    >>> print(optimizer.update(jnp.array([0.25, -3.0]), optimizer.init(jnp.zeros(2)))[0].round(4))
    [ 0.25 -0.5 ]
    """

    def decorate(factory: Callable[P, Callable[..., Any]]) -> Callable[P, Stage]:
        signature = inspect.signature(factory)
        name = called or factory.__name__

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> Stage:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            settings = given.arguments
            buffer = Buffer(settings["name"], keeps, settings["dtype"]) if keeps else None
            line = factory(*args, **kwargs)
            fixed = fixes_rate and "rate" in replaces
            rule = Rule(name, reads, replaces, biases, debiases, fixed, buffer, line)
            return describe_as(Stage((rule,)), name, _without_defaults(settings, signature))

        return make

    return decorate


def _without_defaults(settings: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """The settings, less the buffer's name and dtype where nobody chose them."""
    default = {k: signature.parameters[k].default for k in ("name", "dtype") if k in settings}
    return {k: v for k, v in settings.items() if k not in default or v != default[k]}


def compose(name: str, settings: Mapping[str, Any], *stages: Stage) -> Stage:
    """Several stages as one, under one name."""
    rules = tuple(rule for part in stages for rule in part.rules)
    return describe_as(Stage(rules), name, settings, parts=())


def checked(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a whole bracket, once their order is known to make sense."""
    rules = tuple(rules)
    functools.reduce(lambda ledger, rule: rule.note(ledger), rules, Ledger()).close()
    return rules
