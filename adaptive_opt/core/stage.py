"""Stages: one line of a paper's listing each.

A stage is an ``optax.GradientTransformationExtraArgs`` whose updates are an open step.
:func:`stage` makes one from a function of a few lines. Everything a stage must get right besides
its formula is elsewhere, once: what the step knows, in ``step``; buffers, in ``memory``; trees,
dtypes and None, in ``tree`` and ``trees``.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ParamSpec

import jax
import optax

from adaptive_opt.core.describe import bound, made_of, transformation
from adaptive_opt.core.look import init_buffers
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep, run

P = ParamSpec("P")
Stage = optax.GradientTransformationExtraArgs

STAGES: dict[str, Callable[..., Stage]] = {}
"""Every stage by its name, filled by :func:`stage`: this library's, and the user's own."""

OneArray = Callable[[AdaptiveStep], AdaptiveStep]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeTree:
    """A line that needs the whole tree: it is given the steps of all leaves at once.

    For a norm over all parameters, or a number that the tree has once. See ``OpenStep``.
    """

    line: Callable[[OpenStep], OpenStep]

    def __call__(self, steps: OpenStep) -> OpenStep:
        return self.line(steps)


@jax.tree_util.register_pytree_node_class
class Line:
    """A line with the name and the settings of its stage."""

    def __init__(self, stage: str, settings: Mapping[str, Any], function: Any) -> None:
        self.stage, self.settings, self.function = stage, dict(settings), function

    @property
    def is_of_the_tree(self) -> bool:
        return isinstance(self.function, WholeTree)

    def tree_flatten(self) -> Any:
        return (self.settings, self.function), self.stage

    @classmethod
    def tree_unflatten(cls, stage: str, children: Any) -> Line:
        return cls(stage, *children)


def stage(factory: Callable[P, OneArray | WholeTree]) -> Callable[P, Stage]:
    """Make a stage of a function that returns one line of an algorithm.

    The function takes the hyperparameters, checks them, and returns the line: ``line(step) ->
    step``, written for one array. Its name and arguments become the stage's description. What a
    line can do is what an :class:`AdaptiveStep` can:

    * read ``step.gradient``, ``direction``, ``second_moment``, ``rate``, ``param``, ``count``, and
      ``step.extra(name)``, what ``update`` was given besides;
    * set them: ``step.set(direction=...)``, or ``step.limit(rate=...)`` for a bound. What is set
      already must have been read: a line that overwrites what another has made is refused;
    * ``step.at(b1)``: the value of a hyperparameter, a number or a schedule;
    * ``step.average(name, value, decay)``, ``step.remember(name, function, value)``,
      ``step.recall`` and ``step.keep``: buffers, each of the shape and the dtype of what it holds;
    * ``step.raw("direction")``, an average as it was made; ``step.correction("direction", b1)``,
      what it owes for its start at zero;
    * ``step.note(...)`` and ``step.noted(...)``: something for a later stage.

    A line that needs all leaves at once is returned as ``WholeTree(line)``, see ``OpenStep``.

    Example, a direction that is clipped to [-limit, limit]:

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import AdaptiveStep, adaptive, stage
    >>> @stage
    ... def clipped_direction(limit: float):
    ...     def line(step: AdaptiveStep) -> AdaptiveStep:
    ...         return step.set(direction=jnp.clip(step.direction, -limit, limit))
    ...     return line
    >>> optimizer = adaptive(clipped_direction(0.5))
    >>> print(optimizer.update(jnp.array([0.25, -3.0]), optimizer.init(jnp.zeros(2)))[0].round(4))
    [ 0.25 -0.5 ]
    """
    if not callable(factory):
        raise TypeError(
            "@stage takes no arguments: what a stage reads, sets and keeps follows from its line."
            " Write @stage above a function of the hyperparameters that returns line(step)."
        )
    signature = inspect.signature(factory)
    name = factory.__name__

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Stage:
        settings = bound(signature, name, args, kwargs)
        line = factory(*args, **kwargs)
        shown = _without_defaults(settings, signature)
        return stage_of(name, shown, (Line(name, settings, line),))

    held = STAGES.get(name)
    ours = package_of(stage)
    if held is None or package_of(held) != ours or package_of(factory) == ours:
        STAGES[name] = make  # but this library's keep their names
    return make


def package_of(function: Any) -> str:
    """The package in which a function was written."""
    return (getattr(function, "__module__", None) or "").split(".")[0]


def stage_of(
    name: str,
    settings: Mapping[str, Any],
    lines: tuple[Any, ...],
    parts: Iterable[Stage] = (),
    plain: optax.GradientTransformation | None = None,
) -> Stage:
    """An optax transformation from open step to open step, made of one or more lines.

    On its own, in a flat chain, its state is a dict of its buffers by name, or an ``EmptyState``.
    In a bracket, ``adaptive(...)`` keeps the buffers of all the stages side by side.
    """

    def init_alone(params: Any) -> Any:
        return init_buffers(lines, params, lenient=True) or optax.EmptyState()

    def update_alone(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        if not isinstance(updates, OpenStep):
            raise TypeError(
                f"{name} needs an open step, but was given plain updates"
                f" ({type(updates).__name__}). Put open_step() before it and close_step() after"
                " it, or list it in adaptive(...)."
            )
        step = updates.copy()
        buffers = run(lines, step, state if isinstance(state, dict) else {})
        return step, buffers or optax.EmptyState()

    plain = plain or optax.GradientTransformationExtraArgs(init_alone, update_alone)
    return transformation(name, settings, plain, parts=parts, lines=lines)


def lines_of(given: Any) -> tuple[Any, ...] | None:
    """The lines of a stage, the watch of an observer; None for anything else."""
    made = made_of(given)
    return made.lines if made is not None and made.lines else None


_SHOWN_WHERE_CHOSEN = (
    *("name", "dtype", "scope", "reduce", "axis_name", "initial", "as_in_optax", "unseen"),
)


def _without_defaults(settings: Mapping[str, Any], signature: inspect.Signature) -> dict[str, Any]:
    """The settings, less what describes the buffer where nobody chose it."""
    default = {k: signature.parameters[k].default for k in _SHOWN_WHERE_CHOSEN if k in settings}
    return {
        k: v
        for k, v in settings.items()
        if k not in default or isinstance(v, jax.Array) or v != default[k]  # it may be traced
    }
