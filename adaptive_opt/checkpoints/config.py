"""Optimizers as plain data: ``make`` builds one from a name or a dict, ``config`` writes it down.

The docstring of ``make`` says what stands in it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.checkpoints.known import (
    BY_STEP,
    NO_NUMBERS,
    OPTAX,
    TREES,
    Functions,
    Optimizer,
    inside,
    is_dtype,
    known_names,
    mark_of,
    parameter_groups,
    said_at,
)
from adaptive_opt.checkpoints.writing import Writer
from adaptive_opt.core.checks import is_number, nearest
from adaptive_opt.core.describe import (
    Description,
    bound,
    describe,
)
from adaptive_opt.core.renamed import in_todays_words
from adaptive_opt.wrappers.decay import decay_mask
from adaptive_opt.wrappers.schedules import SCHEDULES, Scheduled


def make(
    config: str | Mapping[str, Any], /, *, functions: Functions | None = None, **settings: Any
) -> Optimizer:
    """An optimizer from its name, or from data: what ``config`` has written, or JSON by hand.

    What an optimizer is made of stands in a dict, one key of which says what it is:

    * ``{"name": "adamw", "learning_rate": 1e-3}``: a recipe of ``RECIPES``, a stage, or another
      function of this library, with its arguments by their names. What a wrapper wraps is its
      ``inner``, what is in a bracket its ``stages``: ``{"name": "lookahead", "inner": {...}}``.
    * ``{"optax": "clip_by_global_norm", "max_norm": 1.0}``: a function of optax.
    * ``{"chain": [..., ...]}``: ``optax.chain``.
    * ``{"schedule": "cosine_decay_schedule", "init_value": 1e-3, "decay_steps": 100}``: a
      schedule, anywhere a number stands.
    * ``{"function": "mine"}``: anything that cannot be data, from the ``functions=`` that are
      given.

    dtypes are their names, ``mask`` is a tree of bools or "decay_mask", and an argument that is
    called like the key that says what it is has an underscore: ``{"name": "first_moment",
    "name_": "slow"}``. A dict that only looks like one of the above is written
    ``{"dict": {...}}``.

    Args:
      config: the name of a recipe, this library's or your own; or a dict as above; or a
        header of a checkpoint, whose optimizer is built again.
      functions: what cannot be data (a schedule or mask of your own, a mesh, an optimizer that
        somebody else has made), by the names that ``{"function": name}`` calls it by.
      **settings: arguments of what is made, in place of those in ``config``; as data, or as they
        are.

    Raises:
      ValueError: for a name that is not known; it says which are, and the nearest.
      TypeError: for an argument that is unknown, missing, or of the wrong type. Both begin with
        the place in the data, unless it is the top: ``chain[1].learning_rate``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import describe, make
    >>> optimizer = make({
    ...     "chain": [
    ...         {"optax": "clip_by_global_norm", "max_norm": 1.0},
    ...         {"name": "sgd", "learning_rate": {"schedule": "constant_schedule", "value": 0.5}},
    ...     ]
    ... })
    >>> x = jnp.zeros(2)
    >>> print(optimizer.update(jnp.array([0.0, 4.0]), optimizer.init(x), x)[0] + 0.0)
    [ 0.  -0.5]
    >>> make("adamot", learning_rate=1e-3)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: there is no 'adamot'; did you mean 'adamod'? There are ...
    """
    data = {"name": config} if isinstance(config, str) else config
    if not isinstance(data, Mapping):
        raise TypeError(f"make takes a name or a dict, such as config(adam(1e-3)), got {data!r}.")
    if "state_format" in data:
        header, data = data, data.get("config")
        if not isinstance(data, Mapping):
            why = header.get("config_reason") or "it was written before headers held one."
            raise ValueError(f"this header cannot rebuild its optimizer: {why}")
    return Reader(functions or {}).optimizer({**data, **settings}, "")


def config(
    optimizer: optax.GradientTransformation, *, functions: Functions | None = None
) -> dict[str, Any]:
    """An optimizer as dicts, lists, strings, numbers, bools and None, for JSON: see ``make``.

    ``make(config(optimizer))`` does what ``optimizer`` does, bit for bit, and has its
    description. Arguments that have their default are left out. Schedules of this library, and of
    optax where their functions can be looked into, are data; so are the functions of optax that
    change, clip and mask gradients, and chains of them.

    Args:
      optimizer: any optimizer that is made of these.
      functions: what cannot be data, by name; it is written ``{"function": name}``, and
        ``make(..., functions=...)`` puts it back.

    ValueError for anything else; it gives the place and what to do.

    >>> import optax
    >>> from adaptive_opt import adamw, config, decay_mask
    >>> schedule = optax.cosine_decay_schedule(1e-3, 100)
    >>> config(adamw(1e-3, mask=decay_mask))
    {'name': 'adamw', 'learning_rate': 0.001, 'mask': 'decay_mask'}
    >>> config(adamw(schedule))["learning_rate"]
    {'schedule': 'cosine_decay_schedule', 'init_value': 0.001, 'decay_steps': 100}
    >>> config(adamw(lambda step: 1e-3 / (step + 1)))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    ValueError: learning_rate is a function, <lambda>, which cannot be data: hand it in, ...
    """
    functions = functions or {}
    data = Writer(functions).optimizer(optimizer, "")
    try:
        again = Reader(functions).optimizer(data, "")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the optimizer cannot be data: it cannot be made again: {error}"
        ) from None
    difference = next(_differences(describe(optimizer), describe(again)), None)
    if difference is not None:
        raise ValueError(
            f"the optimizer cannot be data: made again from it, {difference}. Give it numbers in"
            " place of arrays, or hand that part in: config(optimizer, functions={'mine': part})."
        )
    return data


def config_or_reason(optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """What a header holds: ``config``, or None and the reason."""
    try:
        return {"config": config(optimizer), "config_reason": None}
    except (TypeError, ValueError) as error:
        return {"config": None, "config_reason": str(error)}


def _differences(one: Description, other: Description) -> Iterator[str]:
    if (one.name, one.key) != (other.name, other.key):
        yield f"{one.name} is {other.name}"
    for name in one.settings:
        a, b = one.settings[name], other.settings.get(name)
        if is_number(a) and is_number(b) and np.ndim(a) == 0 and float(a) != float(b):
            yield f"{name} of {one.name} is {b}, not {a}"
    if len(one.parts) != len(other.parts):
        yield f"{one.name} has {len(other.parts)} parts, not {len(one.parts)}"
    for pair in zip(one.parts, other.parts, strict=False):
        yield from _differences(*pair)


# --- from data ------------------------------------------------------------------------------------


class Reader:
    def __init__(self, functions: Functions) -> None:
        self.functions = functions

    def optimizer(self, data: Any, at: str) -> Any:
        if isinstance(data, optax.GradientTransformation):
            return data
        mark = mark_of({"name": data} if isinstance(data, str) else data)
        if mark is None or mark in ("schedule", "dict"):
            wanted = "'name', 'optax', 'chain' or 'function'"
            raise TypeError(said_at(at, f"an optimizer is a dict with {wanted}, got {data!r}."))
        data = {"name": data} if isinstance(data, str) else data
        if mark == "function":
            return self.handed(data, at)
        if mark == "chain":
            self.only(data, at, "chain")
            listed = enumerate(data["chain"])
            return optax.chain(*(self.optimizer(x, inside(at, f"chain[{i}]")) for i, x in listed))
        function, arguments = self.call(data, mark, at)
        return _called(function, arguments, data[mark], at)

    def call(self, data: Mapping[str, Any], mark: str, at: str) -> Any:
        """The function that a dict names, and the arguments in it."""
        tables = {"name": known_names(), "optax": OPTAX, "schedule": SCHEDULES}
        if mark == "function":
            function = self.handed({"function": data["function"]}, at)
        else:
            function = _looked_up(data[mark], tables[mark], at)
        takes = inspect.signature(function).parameters
        if mark == "name":
            data = in_todays_words(data[mark], data)
        arguments = {}
        for key, value in data.items():
            name = mark if key == mark + "_" else key
            if key == mark:
                continue
            if not isinstance(key, str):
                raise TypeError(said_at(at, f"arguments have names, got {key!r}."))
            where = inside(at, name)
            if function is parameter_groups and name == "recipe":
                kind = mark_of(value)
                if kind not in ("name", "function"):
                    text = f"{where} is a recipe: a dict with 'name' or 'function', got {value!r}."
                    raise TypeError(text)
                arguments[name] = self.call(value, kind, where)
                continue
            arguments[name] = self.value(value, where, name)
            if name in takes:
                _check(takes[name], arguments[name], mark, where)
        return function, arguments

    def value(self, data: Any, at: str, key: str = "", tree: bool = False) -> Any:
        tree = tree or key in TREES
        mark = mark_of(data) if isinstance(data, dict) else None
        if mark == "schedule":
            function, arguments = self.call(data, mark, at)
            made = _called(function, arguments, data["schedule"], at)
            return Scheduled(data["schedule"], arguments) if callable(made) else made
        if mark == "function":
            return self.handed(data, at)
        if mark in ("name", "optax", "chain"):
            return self.optimizer(data, at)
        if isinstance(data, dict):
            items = (data["dict"] if mark == "dict" else data).items()
            made = {k: self.value(v, inside(at, str(k)), "", tree) for k, v in items}
            return {_whole(k, at): v for k, v in made.items()} if key == BY_STEP else made
        if isinstance(data, list):
            items = [self.value(v, f"{at}[{i}]", "", tree) for i, v in enumerate(data)]
            return items if tree else tuple(items)
        if isinstance(data, str) and is_dtype(key):
            try:
                return jnp.dtype(data)
            except TypeError:
                raise ValueError(f"{at} must be the name of a dtype, got {data!r}.") from None
        if isinstance(data, str) and key == "mask":
            if data != "decay_mask":
                raise ValueError(
                    f"{at} must be a tree of true and false, 'decay_mask', or {{'function': name}},"
                    f" got {data!r}."
                )
            return decay_mask
        if isinstance(data, float) and not math.isfinite(data):
            raise ValueError(f"{at} must be finite, got {data}.")
        return data

    def handed(self, data: Mapping[str, Any], at: str) -> Any:
        self.only(data, at, "function")
        name = data["function"]
        there = {"decay_mask": decay_mask, **self.functions}
        if name not in there:
            raise ValueError(
                said_at(
                    at,
                    f"the function {name!r} is none of {', '.join(there)}: hand it in, make(...,",
                )
                + f" functions={{{name!r}: ...}})."
            )
        return there[name]

    def only(self, data: Mapping[str, Any], at: str, mark: str) -> None:
        if more := [key for key in data if key != mark]:
            raise TypeError(said_at(at, f"{mark!r} takes no arguments, got {', '.join(more)}."))


def _called(function: Callable[..., Any], arguments: dict[str, Any], name: str, at: str) -> Any:
    signature, arguments = inspect.signature(function), dict(arguments)
    try:
        positional: list[Any] = []
        for p in signature.parameters.values():
            if p.kind is p.VAR_POSITIONAL:
                several = arguments.pop(p.name, ())
                first = bound(signature, name, (), arguments)
                before = list(signature.parameters)[: list(signature.parameters).index(p.name)]
                positional = [*(first[k] for k in before), *several]
                arguments = {k: v for k, v in arguments.items() if k not in before}
        bound(signature, name, tuple(positional), arguments)
        return function(*positional, **arguments)
    except (TypeError, ValueError) as error:
        if not at:
            raise
        raise type(error)(f"{at}: {error}") from None


def _looked_up(name: str, table: Mapping[str, Any], at: str) -> Callable[..., Any]:
    if name in table:
        return table[name]
    near = nearest(name, table)
    hint = f"; did you mean {near!r}?" if near else "."
    raise ValueError(
        said_at(
            at, f"there is no {name!r}{hint} There are {', '.join(sorted(table, key=str.lower))}."
        )
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names, key=str.lower))


def _check(parameter: inspect.Parameter, value: Any, mark: str, at: str) -> None:
    """What a function would take for something else: a string for true, a bool for a number."""
    default = parameter.default
    if isinstance(default, bool):
        if not isinstance(value, (bool, np.bool_)) and parameter.name != "freeze":
            raise TypeError(f"{at} must be true or false, got {value!r}.")
        return
    numeric = isinstance(default, (int, float))
    if numeric and isinstance(value, (bool, str, dict)):
        raise TypeError(f"{at} must be a number, got {value!r}.")
    other = parameter.name in NO_NUMBERS or is_dtype(parameter.name)
    if mark in ("name", "function") or other or (value is None and default is None):
        return
    scalar = is_number(value) and not isinstance(value, (bool, np.bool_)) and np.ndim(value) == 0
    if not scalar and not isinstance(value, Tracer) and not (mark == "optax" and callable(value)):
        raise TypeError(f"{at} must be a number, got {value!r}.")


def _whole(key: Any, at: str) -> int:
    try:
        return int(key)
    except ValueError:
        raise ValueError(f"the keys of {at} must be numbers of steps, got {key!r}.") from None
