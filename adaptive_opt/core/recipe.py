"""What makes a recipe of a list of parts, and the register of all recipes."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, ParamSpec, get_args, get_origin

import optax

from adaptive_opt.core import checks
from adaptive_opt.core.bracket import adaptive, orders_are_known
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.describe import Optimizer, bound, made_of, transformation
from adaptive_opt.core.observe import product_of, told
from adaptive_opt.core.renamed import hint_of

P = ParamSpec("P")
Part = optax.GradientTransformation

RECIPES: dict[str, Callable[..., Optimizer]] = {}
"""Every recipe by its name, this library's and the user's own; ``recipe`` fills it."""


def recipe(factory: Callable[P, Part | tuple[Part, ...]]) -> Callable[P, Optimizer]:
    """Make a recipe of a function that returns the parts of an optimizer, in their order.

    The parts are what ``optax.chain`` takes, one of them usually ``adaptive(...)``. The decorator
    chains them; the optimizer knows its name and arguments (``describe``), and the name is in
    ``RECIPES``. Arguments that are annotated as a ``Literal`` are checked, and offered:
    ``adamod.choices``. If the function takes ``observers``, it need not do anything with them: they
    are put at the end of the bracket, and told what the update is still multiplied by after it.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, make, recipe, scale_by_learning_rate
    >>> @recipe
    ... def heavy(learning_rate, b1=0.9):
    ...     return adaptive(first_moment(b1)), scale_by_learning_rate(learning_rate)
    >>> optimizer = make("heavy", learning_rate=0.5)
    >>> print(optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(1)))[0].round(3))
    [-0.05]
    """
    signature, name = inspect.signature(factory), factory.__name__
    held = RECIPES.get(name)
    if held is not None and _is_ours(held) and not _is_ours(factory):
        raise ValueError(
            f"there is a recipe called {name!r} in adaptive_opt: call yours by another name, for"
            " checkpoints and make(...) find recipes by name."
        )

    @functools.cache
    def choices() -> dict[str, tuple[Any, ...]]:
        return dict(_choices(factory, signature))

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
        given = bound(signature, name, args, kwargs)
        for argument, allowed in choices().items():
            if given[argument] is not None or None in allowed:
                hint = hint_of(name, argument, given[argument])
                checks.choose(argument, given[argument], dict.fromkeys(allowed), hint)
        with orders_are_known(_is_ours(factory)):
            parts = factory(*args, **kwargs)
        parts = (parts,) if isinstance(parts, optax.GradientTransformation) else tuple(parts)
        if given.get("observers", ()) != ():
            parts = _watched(parts, given)
        if len(parts) == 1:
            return transformation(name, given, parts[0], parts=parts)
        return transformation(name, given, optax.chain(*parts))

    setattr(make, "choices", _Choices(choices))  # noqa: B010 (functions have no such attribute)
    RECIPES[name] = make
    return make


class _Choices(Mapping[str, tuple[Any, ...]]):
    """The values that an argument may take, by its name; read when somebody asks."""

    def __init__(self, read: Callable[[], dict[str, tuple[Any, ...]]]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> tuple[Any, ...]:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(self._read())


def _choices(
    factory: Callable[..., Any], signature: inspect.Signature
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    try:
        hints = typing.get_type_hints(factory)
    except NameError:  # of a recipe in a function, whose names are local
        hints = {name: p.annotation for name, p in signature.parameters.items()}
    for name in signature.parameters:
        options = (hints.get(name), *get_args(hints.get(name)))  # itself, or in a union
        literals = [get_args(option) for option in options if get_origin(option) is Literal]
        if literals:
            yield name, tuple(value for values in literals for value in values)


def _is_ours(factory: Callable[..., Any]) -> bool:
    return str(factory.__module__).split(".")[0] == __name__.split(".")[0]


def _watched(parts: tuple[Part, ...], given: Mapping[str, Any]) -> tuple[Part, ...]:
    """The parts with the observers in their bracket, told what the list says."""
    places = [i for i, part in enumerate(parts) if _is_bracket(part)]
    if not places:
        return parts  # the recipe has handed them on
    place = places[-1]
    remaining = [
        own.settings["learning_rate"]
        for own in map(made_of, parts[place + 1 :])
        if own is not None and own.name == "scale_by_learning_rate"
    ]
    rates = [given[name] for name in ("learning_rate", "schedule") if given.get(name) is not None]
    known: dict[str, Hyperparameter | None] = {
        "learning_rate": product_of(rates),
        "b1": given.get("b1", given.get("momentum")),
        "weight_decay": given.get("weight_decay"),
    }
    bracket: Any = made_of(parts[place])
    stages: Any = bracket.parts if bracket.name == "adaptive" else (parts[place],)
    observers = told(given["observers"], known, tuple(remaining))
    watched = adaptive(*stages, *observers, state_dtype=bracket.settings["state_dtype"])
    return (*parts[:place], watched, *parts[place + 1 :])


def _is_bracket(part: Part) -> bool:
    own = made_of(part)
    return own is not None and (own.name == "adaptive" or bool(own.lines))
