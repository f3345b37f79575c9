"""Observers: stages that read the open step, change nothing, and keep what they saw.

An observer looks at every N-th step only. The bracket then goes through its stages once more: what
the observer needs (the rates as values, the moments before a maximum) is made for it there, in
waves or inside a branch of ``lax.cond``. A step that nobody looks at pays for comparisons, and for
the schedules that an observer is told of where XLA does not share them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter, check_whole, value_at
from adaptive_opt.core.describe import describe
from adaptive_opt.core.look import Lines
from adaptive_opt.core.stage import Stage, lines_of, stage_of
from adaptive_opt.core.tree import OpenStep, run
from adaptive_opt.core.trees import Tree, branch, varying
from adaptive_opt.core.waves import Waves, waves_of

Shapes: TypeAlias = Any
"""A tree of ``jax.ShapeDtypeStruct``: what an observer keeps."""

HYPERPARAMETERS = ("learning_rate", "b1", "weight_decay")


class Observation(NamedTuple):
    """The last step at which an observer looked (1, 2, ...; 0: not yet), and what it saw."""

    step: jax.Array
    values: Tree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watch:
    """An observer without its optax clothes."""

    stage: str = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})
    """Of what it keeps, in the state."""
    every: int = dataclasses.field(metadata={"static": True})
    look: Callable[..., Tree]
    """Of the step; where ``waves``, see there."""
    shapes: Callable[[tuple[str, ...]], Shapes]
    """What it keeps, given the names of the stages that limit something."""
    hyperparameters: Mapping[str, Hyperparameter | None]
    """What the recipe says of itself, see ``told``."""
    remaining: tuple[Hyperparameter, ...]
    """The factors that the update meets after the bracket."""
    waves: bool = dataclasses.field(default=False, metadata={"static": True})
    """Whether ``look`` goes through the weights in waves where it can: it is then given the step as
    it was opened, what it saw last, the waves (or None, and the step where the observer stands) and
    whether it is time, and returns what it has seen by now, and a truth that it knows only then."""
    is_of_the_tree: ClassVar[bool] = False

    def values(
        self,
        step: OpenStep,
        last: Observation,
        waves: Sequence[Waves] | None = None,
        when: Any = True,
    ) -> tuple[Observation, Any]:
        """What has been seen after this step, in the structure and the dtypes of the last look."""
        known = {
            name: value_at(value, step.count)
            for name, value in self.hyperparameters.items()
            if value is not None
        }
        remaining = _product(self.remaining, step.count)
        step, like = step.noting(hyperparameters=known, remaining=remaining), last.values
        truth = when
        with jax.numpy_dtype_promotion("standard"):
            if self.waves:
                seen, truth = self.look(step, like, waves, when)
            else:
                seen = self.look(step)
        if jax.tree.structure(seen) != jax.tree.structure(like):
            raise ValueError(
                f"{self.stage} returned {jax.tree.structure(seen)}, but said it keeps"
                f" {jax.tree.structure(like)}."
            )
        kept = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), seen, like)
        for new, old in zip(jax.tree.leaves(kept), jax.tree.leaves(like), strict=True):
            if new.shape != old.shape:
                raise ValueError(
                    f"{self.stage} returned an array of shape {new.shape}, but said it"
                    f" keeps one of shape {old.shape}."
                )
        return Observation(jnp.where(when, step.count, last.step), kept), truth


def observer(
    look: Callable[[OpenStep], Mapping[str, Any]],
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
      look: from the open step, whose fields are trees here, to a dict of arrays. Besides them it
        has ``params``, and in ``notes`` what the stages left there: "remaining", what the update is
        still multiplied by after the bracket; "hyperparameters"; "limited", for every stage that
        limits something its name and a pair of what it limits, before and after; "friction";
        "rate", where a stage has used the rate up.
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
    look: Callable[..., Tree],
    shapes: Callable[[tuple[str, ...]], Shapes],
    every: int,
    name: str,
    called: str,
    settings: Mapping[str, Any],
    hyperparameters: Mapping[str, Hyperparameter | None] | None = None,
    remaining: tuple[Hyperparameter, ...] = (),
    waves: bool = False,
) -> Stage:
    """The stage of a :class:`Watch`."""
    check_whole(1, every=every)
    watch = Watch(called, name, int(every), look, shapes, hyperparameters or {}, remaining, waves)
    return stage_of(called, settings, (watch,))


Observers: TypeAlias = Stage | Sequence[Stage]
"""An observer or several."""


def told(
    observers: Observers,
    hyperparameters: Mapping[str, Hyperparameter | None],
    remaining: tuple[Hyperparameter, ...],
) -> tuple[Stage, ...]:
    """The observers of a recipe, told what it does outside of its bracket.

    Args:
      observers: what the recipe was given.
      hyperparameters: the learning rate, b1 and weight decay of the recipe.
      remaining: the factors that the update meets after the bracket.
    """
    given = (observers,) if lines_of(observers) is not None else tuple(observers)
    made = []
    for each in cast(tuple[Stage, ...], given):
        watches = lines_of(each)
        if watches is None or not all(isinstance(watch, Watch) for watch in watches):
            raise TypeError(
                "observers= takes telemetry(...), observer(...) or a list of them, got"
                f" {type(each).__name__}. A stage that changes the step goes into adaptive(...)."
            )
        (watch,) = watches
        own = {k: v for k, v in watch.hyperparameters.items() if v is not None}
        watch = dataclasses.replace(
            watch, hyperparameters={**hyperparameters, **own}, remaining=remaining
        )
        made.append(stage_of(watch.stage, describe(each).settings, (watch,)))
    return tuple(made)


def product_of(factors: Sequence[Hyperparameter]) -> Hyperparameter:
    """The product of some hyperparameters, as a schedule."""
    return lambda step: _product(factors, step + 1)


def _product(factors: Sequence[Hyperparameter], count: Any) -> Any:
    product: Any = 1.0
    for factor in factors:
        product = product * value_at(factor, count)
    return product


def init_observations(watches: Sequence[Watch], limits: tuple[str, ...]) -> dict[str, Observation]:
    """What the observers keep before the first step."""
    return {
        watch.name: Observation(
            jnp.zeros([], jnp.int32),
            jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), watch.shapes(limits)),
        )
        for watch in watches
    }


def check_seen(watches: Sequence[Watch], state: Mapping[str, Any]) -> None:
    """Whether a state holds what all the observers saw."""
    if missing := [watch.name for watch in watches if watch.name not in state]:
        raise ValueError(
            f"the state should hold what {', '.join(missing)} saw. A state belongs to the optimizer"
            " that initialised it, observers included; convert_state(...) moves one to another."
        )


def observe(
    lines: Lines,
    step: OpenStep,
    buffers: dict[str, Tree],
    state: Mapping[str, Any],
    state_dtype: DTypeLike | None,
) -> tuple[dict[str, Observation], dict[str, Tree]]:
    """The observations after this step, which is given as it was opened, and the same buffers.

    ``buffers`` are those of the stages, ``state`` holds the last observations. The step must go on
    with the buffers that come out: otherwise XLA may look after it has taken the step, and keeps a
    copy of every buffer until then.
    """
    watches = [line for line in lines if isinstance(line, Watch)]
    seen, truths = {watch.name: state[watch.name] for watch in watches}, []
    for every in sorted({watch.every for watch in watches}):
        when, shown = (step.count - 1) % every == 0, set()
        if not isinstance(when, Tracer) and not when:
            continue
        for place, watch in enumerate(lines):
            if isinstance(watch, Watch) and watch.every == every:
                waves = None
                if watch.waves:
                    waves = waves_of(lines.before(place), step, buffers, state_dtype)
                if waves is None:
                    shown.add(watch.name)
                    continue
                last = seen[watch.name]
                seen[watch.name], truth = watch.values(step, last, waves, when)
                truths.append(truth)
        if shown:
            look = functools.partial(_look_at_all, lines, step, buffers, state_dtype, when)
            new = branch(when, look, lambda last: last, {name: seen[name] for name in shown})
            seen |= new
            truths += [each.step >= 0 for each in new.values()]
    truth = functools.reduce(jnp.logical_and, truths, np.True_)
    return seen, branch(truth, lambda buffers: buffers, _held, buffers)


def _held(buffers: Tree) -> Tree:
    """The same behind one barrier, or one for each set of mesh axes over which arrays are split."""
    leaves, structure = jax.tree.flatten(buffers)
    places: dict[Any, list[int]] = {}
    for place, x in enumerate(leaves):
        places.setdefault(varying(x), []).append(place)
    for own in places.values():
        behind = jax.lax.optimization_barrier([leaves[place] for place in own])
        for place, x in zip(own, behind, strict=True):
            leaves[place] = x
    return structure.unflatten(leaves)


def _look_at_all(
    lines: Lines,
    step: OpenStep,
    buffers: dict[str, Tree],
    state_dtype: DTypeLike | None,
    when: Any,
    last: dict[str, Observation],
) -> dict[str, Observation]:
    """What these observers see where they stand, of all leaves."""
    new = dict(last)

    def show(watch: Watch, at: OpenStep) -> None:
        if watch.name in last:
            new[watch.name], _ = watch.values(at, last[watch.name], None, when)

    run(lines, step.copy(), buffers, state_dtype, show)
    return new
