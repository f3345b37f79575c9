"""Stages: one line of a paper's listing each.

A stage is an ``optax.GradientTransformationExtraArgs`` whose updates are an open step. It reads the
fields it names, replaces the ones it names, and keeps at most one buffer. :func:`stage` makes one
from a function of a few lines; everything a stage must get right besides its formula (dtypes, None,
the buffer's name, its place in the list, its description) is here, in ``ledger`` and in
``policies``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt import policies
from adaptive_opt.describe import describe_as
from adaptive_opt.ledger import FIELDS, Declaration, Field, Ledger
from adaptive_opt.policies import Scope, Tree
from adaptive_opt.step import AdaptiveStep, RateRule

P = ParamSpec("P")
Stage = optax.GradientTransformationExtraArgs

# The attribute of a stage's update function that holds its rules; a tuple subclass with fields of
# its own would not survive being copied or mapped over.
_RULES = "_adaptive_opt_rules"


class Buffer(NamedTuple):
    """What a stage remembers: one array per parameter, or fewer.

    ``like`` says which field it holds: the gradient or direction (the parameter's dtype), the
    second moment (real) or the rate (real, float32 at least whatever was asked for). 16-bit
    parameters get float32 buffers unless ``dtype`` says otherwise. ``scope`` says whether it holds
    a number for every weight, for every tensor, or for the tree; None is the scope of the second
    moment in the same bracket.
    """

    name: str
    like: Field
    dtype: DTypeLike | None = None
    scope: Scope | None = "weight"
    initial: Any = 0.0

    def init(self, params: Tree, state_dtype: DTypeLike | None, scope: Scope) -> Tree:
        asked = self.dtype if self.dtype is not None else state_dtype

        def dtype(of_param: Any) -> Any:
            own = policies.wide(of_param)
            if self.like in ("second_moment", "rate"):
                own = policies.real(own)
            if asked is None:
                return own
            chosen = policies.buffer_dtype(asked, own)
            if self.like == "rate":
                return policies.wide(chosen)
            if self.like == "second_moment" and jnp.finfo(chosen).minexp > -126:
                raise ValueError(
                    f"the buffer {self.name!r} cannot be {chosen}: the squares of small gradients"
                    " would be lost in it. Use bfloat16 or float32."
                )
            return chosen

        return policies.full_like(params, self.initial, dtype, scope)


class Rule(NamedTuple):
    """A stage without its optax clothes."""

    declaration: Declaration
    buffer: Buffer | None
    line: Callable[..., Any]
    """``step -> step``, or with a buffer ``(step, buffer) -> (step, buffer)``."""

    def __call__(
        self, step: AdaptiveStep, buffer: Tree, state_dtype: DTypeLike | None = None
    ) -> tuple[AdaptiveStep, Tree]:
        declared = self.declaration
        if self.buffer is not None and self.buffer.dtype is None and state_dtype is None:
            buffer = policies.widened(buffer, f"the buffer {self.buffer.name!r}")
        ledger = step.ledger.after(declared)
        given = step.replace(rate=step.rate_values()) if "rate" in declared.reads else step
        scalar = self.buffer is not None and is_scalar_of_tree(buffer, step)
        shown = step.map(lambda g: buffer, step.gradient) if scalar else buffer
        arguments = (given,) if self.buffer is None else (given, shown)
        result = self.line(*arguments)
        new, *new_buffers = result if isinstance(result, tuple) else (result,)
        if not isinstance(new, AdaptiveStep) or len(new_buffers) != len(arguments) - 1:
            raise TypeError(
                f"the line of {declared.name} must return"
                f" {'a step' if self.buffer is None else 'a step and its buffer'}."
            )
        self._check_what_was_replaced(given, new)
        if self.buffer is not None:
            what = f"the buffer {self.buffer.name!r}"
            new_buffer = new_buffers[0]
            if scalar:
                new_buffer = next(iter(jax.tree.leaves(new_buffer)), None)
            buffer = policies.keep_dtype(buffer, new_buffer, what)
        if "rate" not in declared.replaces:
            new = new.replace(rate=step.rate)  # a rule again, where only values were read
        if declared.limits is not None:
            pair = (getattr(given, declared.limits), getattr(new, declared.limits))
            limited = new.notes.get("limited", ())
            new = new.noting(limited=(*limited, (declared.name, pair)))
        if "rate" in declared.consumes:
            new = new.noting(rate=given.rate)
        new = new.replace(**dict.fromkeys(declared.consumes))
        return new.replace(ledger=ledger), buffer

    def _check_what_was_replaced(self, given: AdaptiveStep, new: AdaptiveStep) -> None:
        declared = self.declaration
        for field in FIELDS:
            if field not in declared.replaces and getattr(new, field) is not getattr(given, field):
                raise TypeError(
                    f"{declared.name} replaced the {field}, but declares that it replaces only"
                    f" {', '.join(declared.replaces) or 'nothing'}: name the field in"
                    " @stage(replaces=)."
                )
        if "rate" in declared.replaces and declared.fixes_rate == isinstance(new.rate, RateRule):
            raise TypeError(
                f"{declared.name} sets the rate to {'a rule' if declared.fixes_rate else 'values'}:"
                f" say so with @stage(fixes_rate={not declared.fixes_rate})."
            )


def is_scalar_of_tree(buffer: Tree, step: AdaptiveStep) -> bool:
    """Whether a buffer is one scalar for a tree of several leaves; lines see it at every leaf."""
    leaf = jax.tree.structure(0)
    return jax.tree.structure(buffer) == leaf != jax.tree.structure(step.gradient)


def run(
    rules: Iterable[Rule],
    step: AdaptiveStep,
    buffers: Mapping[str, Tree],
    state_dtype: DTypeLike | None = None,
) -> tuple[AdaptiveStep, dict[str, Tree]]:
    """The step after all the rules, and the buffers they keep, each under its name."""
    rules = tuple(rules)
    names = {rule.buffer.name for rule in rules if rule.buffer}
    if names != set(buffers):
        raise ValueError(
            f"{', '.join(rule.declaration.name for rule in rules)}: the state should hold the"
            f" buffers {_listed(names)}, but holds {_listed(buffers)}. A state belongs to the"
            " optimizer that initialised it."
        )
    kept = {}
    for rule in rules:
        name = rule.buffer.name if rule.buffer else None
        step, buffer = rule(step, buffers.get(name) if name else None, state_dtype)
        kept |= {name: buffer} if name else {}
    return step, kept


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def init_buffers(
    rules: Iterable[Rule], params: Tree, state_dtype: DTypeLike | None = None
) -> dict[str, Tree]:
    """The buffers of all the rules before the first step."""
    buffers, scope = {}, "weight"
    for buffer in (rule.buffer for rule in rules if rule.buffer):
        own = buffer.scope or scope
        buffers[buffer.name] = buffer.init(params, state_dtype, own)
        if buffer.like == "second_moment":
            scope = own
    return buffers


def make_stage(
    rules: tuple[Any, ...],
    init: optax.TransformInitFn | None = None,
    update: optax.TransformUpdateExtraArgsFn | None = None,
) -> Stage:
    """An optax transformation from open step to open step, made of one or more rules.

    On its own, in a flat chain, its state is a dict of its buffers by name, or an ``EmptyState``.
    In a bracket, ``adaptive(...)`` keeps the buffers of all the stages side by side.
    """

    def init_alone(params: Tree) -> Any:
        return init_buffers(rules, params) or optax.EmptyState()

    def update_alone(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        if not isinstance(updates, AdaptiveStep):
            raise TypeError(
                f"{rules[0].declaration.name} needs an open step, but was given plain updates"
                f" ({type(updates).__name__}). Put open_step() before it and close_step() after"
                " it, or list it in adaptive(...)."
            )
        step, buffers = run(rules, updates, state if isinstance(state, dict) else {})
        return step, buffers or optax.EmptyState()

    update = update or update_alone
    setattr(update, _RULES, rules)
    return optax.GradientTransformationExtraArgs(init or init_alone, update)


def rules_of(transformation: Any) -> tuple[Any, ...] | None:
    """The rules of a stage, the watch of an observer; None for anything else."""
    return getattr(getattr(transformation, "update", None), _RULES, None)


def stage(
    *,
    reads: tuple[Field, ...] = (),
    replaces: tuple[Field, ...] = (),
    keeps: Field | None = None,
    scope: Scope | None = "weight",
    initial: float = 0.0,
    biases: Mapping[Field, str] | None = None,
    debiases: Mapping[Field, str] | None = None,
    raw: tuple[Field, ...] = (),
    consumes: tuple[Field, ...] = (),
    fixes_rate: bool = True,
    bounds_rate: bool = False,
    limits: Field | None = None,
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
      scope: whether the buffer has the shape of the parameters ("weight"), is a scalar for each
        ("tensor") or one for all ("tree"; the line still sees it at every leaf), or has the shape
        of the second moment (None). If the function takes ``scope``, it decides. A stage that
        changes the second moment or the rate and takes ``scope``, or has "weight", must have that
        of the second moment.
      initial: the first value of the buffer. If the function takes ``initial``, it decides.
      biases: the fields that it turns into averages started at zero, each with the name of the
        argument that is its decay: ``{"direction": "b1"}``.
      debiases: the averages that it corrects for such a start, likewise.
      raw: the averages that no stage may have changed since they were made.
      consumes: the fields that are not set any more after it.
      fixes_rate: whether the rate it sets is values, which no longer follow the second moment
        (True) or a :class:`RateRule` (False).
      bounds_rate: whether it makes the rate depend on earlier rates or on limits; corrections of
        the rate must come before.
      limits: the field that it limits, if that is what it does: it changes the field only where
        something is exceeded, and telemetry counts these weights.
      called: the stage's name; default: the function's.

    TypeError if the declaration does not fit the function, or the line not its declaration.

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
    biases, debiases = biases or {}, debiases or {}

    def decorate(factory: Callable[P, Callable[..., Any]]) -> Callable[P, Stage]:
        signature = inspect.signature(factory)
        name = called or factory.__name__
        needed = {"name", "dtype"} if keeps else set()
        missing = (needed | {*biases.values(), *debiases.values()}) - set(signature.parameters)
        fields = {*reads, *replaces, *raw, *consumes, *biases, *debiases}
        fields |= {keeps or "rate", limits or "rate"}
        unknown = fields - set(FIELDS)
        if missing or unknown:
            raise TypeError(
                f"@stage of {name}: "
                + (f"the function must take {_listed(missing)}" if missing else "")
                + (
                    f"no such field: {_listed(unknown)}; there are {_listed(FIELDS)}"
                    * bool(unknown)
                )
            )

        @functools.wraps(factory)
        def make(*args: P.args, **kwargs: P.kwargs) -> Stage:
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            settings = given.arguments
            of_buffer = {"scope": scope, "initial": initial} | _of_buffer(settings)
            if of_buffer["scope"] is not None:
                policies.choose("scope", of_buffer["scope"], policies.SCOPES)
            buffer = Buffer(like=keeps, **of_buffer) if keeps else None
            line = factory(*args, **kwargs)
            declaration = Declaration(
                name=name,
                reads=reads,
                replaces=replaces,
                biases={field: settings[argument] for field, argument in biases.items()}
                if policies.is_zero(settings.get("initial", 0.0))
                else {},
                debiases={field: settings[argument] for field, argument in debiases.items()},
                fixes_rate=fixes_rate and "rate" in replaces,
                bounds_rate=bounds_rate,
                raw=raw,
                consumes=consumes,
                buffer=buffer.name if buffer else None,
                scope=buffer.scope if buffer else None,
                takes_scope="scope" in settings,
                limits=limits,
            )
            made = make_stage((Rule(declaration, buffer, line),))
            return describe_as(made, name, _without_defaults(settings, signature), parts=())

        return make

    return decorate


def _of_buffer(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: settings[k] for k in ("name", "dtype", "scope", "initial") if k in settings}


def _without_defaults(settings: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """The settings, less what describes the buffer where nobody chose it."""
    about = ("name", "dtype", "scope", "reduce", "axis_name", "initial")
    default = {k: signature.parameters[k].default for k in about if k in settings}
    return {
        k: v
        for k, v in settings.items()
        if k not in default or isinstance(v, jax.Array) or v != default[k]  # it may be traced
    }


def compose(name: str, settings: Mapping[str, Any], *stages: Stage) -> Stage:
    """Several stages as one, under one name."""
    rules = tuple(rule for part in stages for rule in rules_of(part) or ())
    return describe_as(make_stage(rules), name, settings, parts=())


def checked(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules of a whole bracket, once their order is known to make sense."""
    rules = tuple(rules)
    ledger = Ledger()
    for rule in rules:
        ledger = ledger.after(rule.declaration)
    ledger.check_closing()
    return rules
