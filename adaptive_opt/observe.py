"""Observers: stages that read the open step, change nothing, and keep what they saw.

An observer looks at every N-th step only. The bracket then goes through its stages once more,
inside a branch of ``lax.cond``: what the observer needs (the rates as values, the moments before a
maximum) is made for it there, and a step that nobody looks at pays for a comparison.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adaptive_opt.describe import describe, describe_as
from adaptive_opt.ledger import Declaration
from adaptive_opt.policies import Hyperparameter, Tree, check_whole, value_at
from adaptive_opt.stage import Rule, Stage, make_stage, rules_of
from adaptive_opt.step import AdaptiveStep

Shapes: TypeAlias = Any
"""A tree of ``jax.ShapeDtypeStruct``: what an observer keeps."""

HYPERPARAMETERS = ("learning_rate", "b1", "weight_decay")


class Observation(NamedTuple):
    """The last step at which an observer looked (1, 2, ...; 0: not yet), and what it saw."""

    step: jax.Array
    values: Tree


class Named(NamedTuple):
    """A buffer that is not made of the parameters."""

    name: str


class Watch(NamedTuple):
    """An observer without its optax clothes."""

    declaration: Declaration
    buffer: Named
    look: Callable[[AdaptiveStep], Tree]
    shapes: Callable[[tuple[str, ...]], Shapes]
    """What it keeps, given the names of the stages that limit something."""
    every: int
    hyperparameters: Mapping[str, Hyperparameter | None]
    """What the recipe says of itself; see ``watched``."""
    remaining: tuple[Hyperparameter, ...]
    """The factors that the update meets after the bracket."""

    def values(self, step: AdaptiveStep, like: Tree) -> Observation:
        """What is seen at this step, in the structure and the dtypes of ``like``."""
        known = {
            name: value_at(value, step.count)
            for name, value in self.hyperparameters.items()
            if value is not None
        }
        remaining = 1.0
        for factor in self.remaining:
            remaining = remaining * value_at(factor, step.count)
        seen = self.look(step.noting(hyperparameters=known, remaining=remaining))
        if jax.tree.structure(seen) != jax.tree.structure(like):
            raise ValueError(
                f"{self.declaration.name} returned {jax.tree.structure(seen)}, but said it keeps"
                f" {jax.tree.structure(like)}."
            )
        kept = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), seen, like)
        for new, old in zip(jax.tree.leaves(kept), jax.tree.leaves(like), strict=True):
            if new.shape != old.shape:
                raise ValueError(
                    f"{self.declaration.name} returned an array of shape {new.shape}, but said it"
                    f" keeps one of shape {old.shape}."
                )
        return Observation(step.count, kept)


def observer(
    look: Callable[[AdaptiveStep], Mapping[str, Any]],
    shapes: Mapping[str, tuple[int, ...]],
    *,
    every: int = 50,
    name: str,
) -> Stage:
    """A stage that looks at the step and changes nothing.

    For a recipe's ``observers=``, or anywhere in the list of ``adaptive(...)``: it sees the step
    where it stands. It looks at steps 1, 1 + every, 1 + 2 every, ...; what it saw last is part of
    the optimizer's state, so that it goes through ``jit``, ``scan``, ``pmap`` and checkpoints, and
    ``read_telemetry`` finds it.

    Args:
      look: from the open step to a dict of arrays. Besides its fields a step has ``params``, and in
        ``notes`` what the stages left there: "remaining", what the update is still multiplied by
        after the bracket; "hyperparameters"; "limited", for every stage that limits something its
        name and a pair of what it limits, before and after; "friction"; "rate", where a stage has
        used the rate up.
      shapes: what is in that dict: the shape of every array, by name. They are kept as float32.
      every: how many steps from one look to the next; at least 1.
      name: of what it keeps, in the state and in what ``read_telemetry`` returns.

    Errors: outside of a bracket it cannot be used (ValueError at ``init``). Where the number of the
    step is batched (``vmap`` over states), XLA looks at every step and keeps every N-th.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamw, observer, read_telemetry
    >>> def look(step):
    ...     return {"gradient_norm": optax.tree.norm(step.gradient)}
    >>> norm = observer(look, {"gradient_norm": ()}, every=10, name="mine")
    >>> optimizer, x = adamw(1e-3, observers=norm), jnp.zeros(2)
    >>> _, state = optimizer.update(jnp.array([3.0, 4.0]), optimizer.init(x), x)
    >>> read_telemetry(state)
    {'mine/step': 1.0, 'mine/gradient_norm': 5.0}
    """
    kept = {k: jax.ShapeDtypeStruct(shape, np.float32) for k, shape in shapes.items()}
    return watching(look, lambda limits: kept, every, name, "observer", {"every": every})


def watching(
    look: Callable[[AdaptiveStep], Tree],
    shapes: Callable[[tuple[str, ...]], Shapes],
    every: int,
    name: str,
    called: str,
    settings: Mapping[str, Any],
    hyperparameters: Mapping[str, Hyperparameter | None] | None = None,
    remaining: tuple[Hyperparameter, ...] = (),
) -> Stage:
    """The stage of a :class:`Watch`."""
    check_whole(1, every=every)
    declaration = Declaration(
        name=called, reads=(), replaces=(), biases={}, debiases={}, fixes_rate=False,
        bounds_rate=False, raw=(), consumes=(), buffer=name, scope=None, takes_scope=False,
    )  # fmt: skip
    watch = Watch(
        declaration, Named(name), look, shapes, int(every), hyperparameters or {}, remaining
    )
    return _stage_of(watch, settings)


def _stage_of(watch: Watch, settings: Mapping[str, Any]) -> Stage:
    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{watch.declaration.name} observes the stages of a bracket: list it in adaptive(...),"
            " or give it to a recipe as observers=."
        )

    return describe_as(
        make_stage((watch,), refuse, refuse), watch.declaration.name, settings, parts=()
    )


Observers: TypeAlias = Stage | Sequence[Stage]
"""An observer or several."""


def watched(
    observers: Observers,
    learning_rate: Hyperparameter,
    *,
    b1: Hyperparameter | None = None,
    weight_decay: Hyperparameter | None = None,
    inside: bool = False,
    schedule: Hyperparameter | None = None,
) -> tuple[Stage, ...]:
    """The observers of a recipe, told what it does outside of its bracket.

    Args:
      observers: what the recipe was given.
      learning_rate, b1, weight_decay: the recipe's.
      inside: whether the rates in the bracket include the learning rate. If not, the update meets
        it afterwards.
      schedule: a multiplier of the learning rate, which is inside where that is.
    """
    given = (observers,) if rules_of(observers) is not None else tuple(observers)
    factors = (learning_rate,) if schedule is None else (learning_rate, schedule)

    def rate(step: Any) -> Any:
        return _product(factors, step + 1)

    told = []
    for each in cast(tuple[Stage, ...], given):
        rules = rules_of(each)
        if rules is None or not all(isinstance(rule, Watch) for rule in rules):
            raise TypeError(
                "observers= takes telemetry(...), observer(...) or a list of them, got"
                f" {type(each).__name__}. A stage that changes the step goes into adaptive(...)."
            )
        (watch,) = rules
        own = {"learning_rate": rate, "b1": b1, "weight_decay": weight_decay}
        told.append(
            _stage_of(
                watch._replace(
                    hyperparameters=own | _given(watch.hyperparameters),
                    remaining=() if inside else factors,
                ),
                describe(each).settings,
            )
        )
    return tuple(told)


def _product(factors: Iterable[Hyperparameter], count: Any) -> Any:
    product: Any = 1.0
    for factor in factors:
        product = product * value_at(factor, count)
    return product


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def init_observations(rules: Iterable[Rule | Watch]) -> dict[str, Observation]:
    """What the observers keep before the first step."""
    rules = tuple(rules)
    limits = tuple(r.declaration.name for r in rules if r.declaration.limits is not None)
    return {
        watch.buffer.name: Observation(
            jnp.zeros([], jnp.int32),
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), watch.shapes(limits)),
        )
        for watch in rules
        if isinstance(watch, Watch)
    }


def observe(
    rules: Sequence[Rule | Watch],
    step: AdaptiveStep,
    buffers: dict[str, Tree],
    state: Mapping[str, Any],
    state_dtype: DTypeLike | None,
) -> tuple[dict[str, Observation], dict[str, Tree]]:
    """The observations after this step, which is given as it was opened, and the same buffers.

    ``buffers`` are those of the stages, ``state`` holds the last observations. The buffers go
    through the branches and the step must go on with what comes out: otherwise XLA may look after
    it has taken the step, and keeps a copy of every buffer until then.
    """
    watches = [rule for rule in rules if isinstance(rule, Watch)]
    names = [watch.buffer.name for watch in watches]
    if missing := [name for name in names if name not in state]:
        raise ValueError(
            f"the state should hold what {', '.join(missing)} saw. A state belongs to the optimizer"
            " that initialised it, observers included; convert_state(...) moves one to another."
        )
    seen = {name: state[name] for name in names}

    def look(every: int, seen: dict[str, Observation], buffers: dict[str, Tree]) -> Any:
        at, new = step, dict(seen)
        for rule in rules:
            name = rule.buffer.name if rule.buffer else None
            if isinstance(rule, Rule):
                at, _ = rule(at, buffers.get(name) if name else None, state_dtype)
            elif rule.every == every:
                new[rule.buffer.name] = rule.values(at, seen[rule.buffer.name].values)
        return new, jax.tree.map(jax.lax.optimization_barrier, buffers)

    def pass_by(seen: dict[str, Observation], buffers: dict[str, Tree]) -> Any:
        return seen, jax.tree.map(jax.lax.optimization_barrier, buffers)

    for every in sorted({watch.every for watch in watches}):
        now = (step.count - 1) % every == 0
        seen, buffers = jax.lax.cond(now, functools.partial(look, every), pass_by, seen, buffers)
    return seen, buffers
