"""Optimizers as plain data: ``make`` builds one from a name or a dict, ``config`` writes it down.

What an optimizer is made of stands in a dict, one key of which says what it is:

* ``{"name": "adamw", "learning_rate": 1e-3}``: a recipe of ``RECIPES``, a stage of ``STAGES``, or
  another function of this library, with its arguments by their names. What a wrapper wraps is its
  ``inner``, what is in a bracket its ``stages``: ``{"name": "lookahead", "inner": {...}}``.
* ``{"optax": "clip_by_global_norm", "max_norm": 1.0}``: a function of optax.
* ``{"chain": [..., ...]}``: ``optax.chain``.
* ``{"schedule": "cosine_decay_schedule", "init_value": 1e-3, "decay_steps": 100}``: a schedule,
  anywhere a number stands.
* ``{"function": "mine"}``: anything that cannot be data, from the ``functions=`` that are given.

dtypes are their names, ``mask`` is a tree of bools or "decay_mask", and an argument that is called
like the key that says what it is has an underscore: ``{"name": "first_moment", "name_": "slow"}``.
A dict that only looks like one of the above is written ``{"dict": {...}}``.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.adam import scale_by_adam
from adaptive_opt.bracket import adaptive, close_step, open_step
from adaptive_opt.describe import Description, Transformation, bound, describe, held_by, made_of
from adaptive_opt.groups import Group, ParameterGroups, decay_mask
from adaptive_opt.guard import skip_nonfinite
from adaptive_opt.lookahead import lookahead
from adaptive_opt.low_memory import low_memory
from adaptive_opt.observe import observer
from adaptive_opt.policies import is_number
from adaptive_opt.recipe import RECIPES
from adaptive_opt.schedules import SCHEDULES, Scheduled
from adaptive_opt.single_pass import single_pass
from adaptive_opt.stage import STAGES, package_of
from adaptive_opt.telemetry import telemetry
from adaptive_opt.weight_decay import (
    decoupled_l1_decay,
    decoupled_weight_decay,
    l2_regularization,
    scale_by_learning_rate,
)
from adaptive_opt.zero import zero1

Optimizer = optax.GradientTransformationExtraArgs
Functions = Mapping[str, Any]


def _parameter_groups(recipe: Any, groups: Any = (), default: Any = None) -> Optimizer:
    factory, settings = recipe
    made = [bound(_GROUP, "a group", (), group) for group in groups]
    rest = None if default is None else Group(**bound(_GROUP, "a group", (), default))
    return ParameterGroups([Group(**group) for group in made], rest).optimizer(factory, **settings)


def _multi_steps(
    opt: Any, every_k_schedule: Any, use_grad_mean: bool = True, accumulator_dtype: Any = "float32"
) -> Any:
    steps = optax.MultiSteps(
        opt, every_k_schedule, use_grad_mean, accumulator_dtype=accumulator_dtype
    )
    return steps.gradient_transformation()


_GROUP = inspect.signature(Group)
_OURS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        adaptive,
        open_step,
        close_step,
        scale_by_adam,
        telemetry,
        observer,
        lookahead,
        skip_nonfinite,
        low_memory,
        single_pass,
        zero1,
        l2_regularization,
        decoupled_weight_decay,
        decoupled_l1_decay,
        scale_by_learning_rate,
    )
} | {"ParameterGroups": _parameter_groups}
_OPTAX: dict[str, Callable[..., Any]] = {
    name: getattr(optax, name)
    for name in (
        "clip",
        "clip_by_global_norm",
        "clip_by_block_rms",
        "adaptive_grad_clip",
        "centralize",
        "zero_nans",
        "keep_params_nonnegative",
        "identity",
        "set_to_zero",
        "scale",
        "scale_by_schedule",
        "scale_by_learning_rate",
        "scale_by_adam",
        "add_decayed_weights",
        "trace",
        "ema",
        "apply_if_finite",
        "masked",
        "partition",
    )
} | {"MultiSteps": _multi_steps}

_TREES = ("mask", "param_labels")
"""Arguments that are trees like the parameters, in which a list is no tuple."""
_NO_NUMBERS = (*_TREES, "inner", "opt", "transforms", "schedules", "boundaries", "cosine_kwargs",
               "boundaries_and_scales", "interpolate_type", "axis", "form", "anneal")  # fmt: skip
"""Arguments of optax's functions, and of schedules, that are something else than a number."""
_BY_STEP = "boundaries_and_scales"
_MARKS = ("name", "optax", "schedule", "function")


def make(
    config: str | Mapping[str, Any], /, *, functions: Functions | None = None, **settings: Any
) -> Optimizer:
    """An optimizer from its name, or from data: what ``config`` has written, or JSON by hand.

    Args:
      config: the name of a recipe, this library's or your own; or a dict, see the module
        ``adaptive_opt.config``; or a header of a checkpoint, whose optimizer is built again.
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
    ValueError: there is no 'adamot'; did you mean 'adamod'? There are adabound, ...
    """
    data = {"name": config} if isinstance(config, str) else config
    if not isinstance(data, Mapping):
        raise TypeError(f"make takes a name or a dict, such as config(adam(1e-3)), got {data!r}.")
    if "state_format" in data:
        header, data = data, data.get("config")
        if not isinstance(data, Mapping):
            why = header.get("config_reason") or "it was written before headers held one."
            raise ValueError(f"this header cannot rebuild its optimizer: {why}")
    return _Reader(functions or {}).optimizer({**data, **settings}, "")


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
    data = _Writer(functions).optimizer(optimizer, "")
    try:
        again = _Reader(functions).optimizer(data, "")
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


def _known() -> dict[str, Callable[..., Any]]:
    return {**STAGES, **RECIPES, **_OURS}


def _mark(data: Any) -> str | None:
    """The key that says what a dict is."""
    if not isinstance(data, Mapping):
        return None
    for mark in _MARKS:
        if isinstance(data.get(mark), str):
            return mark
    if isinstance(data.get("chain"), (list, tuple)):
        return "chain"
    return "dict" if set(data) == {"dict"} and isinstance(data["dict"], Mapping) else None


def _inside(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def _is_dtype(key: str) -> bool:
    return key == "dtype" or key.endswith("_dtype")


# --- from data ------------------------------------------------------------------------------------


class _Reader:
    def __init__(self, functions: Functions) -> None:
        self.functions = functions

    def optimizer(self, data: Any, at: str) -> Any:
        if isinstance(data, optax.GradientTransformation):
            return data
        mark = _mark({"name": data} if isinstance(data, str) else data)
        if mark is None or mark in ("schedule", "dict"):
            wanted = "'name', 'optax', 'chain' or 'function'"
            raise TypeError(_at(at, f"an optimizer is a dict with {wanted}, got {data!r}."))
        data = {"name": data} if isinstance(data, str) else data
        if mark == "function":
            return self.handed(data, at)
        if mark == "chain":
            self.only(data, at, "chain")
            listed = enumerate(data["chain"])
            return optax.chain(*(self.optimizer(x, _inside(at, f"chain[{i}]")) for i, x in listed))
        function, arguments = self.call(data, mark, at)
        return _called(function, arguments, data[mark], at)

    def call(self, data: Mapping[str, Any], mark: str, at: str) -> Any:
        """The function that a dict names, and the arguments in it."""
        tables = {"name": _known(), "optax": _OPTAX, "schedule": SCHEDULES}
        if mark == "function":
            function = self.handed({"function": data["function"]}, at)
        else:
            function = _looked_up(data[mark], tables[mark], at)
        takes = inspect.signature(function).parameters
        arguments = {}
        for key, value in data.items():
            name = mark if key == mark + "_" else key
            if key == mark:
                continue
            if not isinstance(key, str):
                raise TypeError(_at(at, f"arguments have names, got {key!r}."))
            where = _inside(at, name)
            if function is _parameter_groups and name == "recipe":
                kind = _mark(value)
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
        tree = tree or key in _TREES
        mark = _mark(data) if isinstance(data, dict) else None
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
            made = {k: self.value(v, _inside(at, str(k)), "", tree) for k, v in items}
            return {_whole(k, at): v for k, v in made.items()} if key == _BY_STEP else made
        if isinstance(data, list):
            items = [self.value(v, f"{at}[{i}]", "", tree) for i, v in enumerate(data)]
            return items if tree else tuple(items)
        if isinstance(data, str) and _is_dtype(key):
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
                _at(
                    at,
                    f"the function {name!r} is none of {', '.join(there)}: hand it in, make(...,",
                )
                + f" functions={{{name!r}: ...}})."
            )
        return there[name]

    def only(self, data: Mapping[str, Any], at: str, mark: str) -> None:
        if more := [key for key in data if key != mark]:
            raise TypeError(_at(at, f"{mark!r} takes no arguments, got {', '.join(more)}."))


def _at(at: str, text: str) -> str:
    return f"{at}: {text}" if at else text


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
    near = difflib.get_close_matches(name, table, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    raise ValueError(
        _at(at, f"there is no {name!r}{hint} There are {', '.join(sorted(table, key=str.lower))}.")
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
    other = parameter.name in _NO_NUMBERS or _is_dtype(parameter.name)
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


# --- to data --------------------------------------------------------------------------------------


class _Writer:
    def __init__(self, functions: Functions) -> None:
        self.functions = functions

    def optimizer(self, given: optax.GradientTransformation, at: str) -> dict[str, Any]:
        if (name := self.name_of(given)) is not None:
            return {"function": name}
        own = made_of(given)
        if own is None:
            return self.of_optax(given, at)
        if held_by(inspect.unwrap(given.init)).get("self") is not own:
            raise _refused(at, f"{own.name} has another's init")
        if own.name == "ParameterGroups":
            return self.groups(own, at)
        function = _known().get(own.name)
        if function is None or not _wrote(function, own):
            raise _refused(at, f"{own.name} is no recipe of RECIPES or stage of STAGES")
        arguments = dict(own.settings)
        first = next(iter(inspect.signature(function).parameters.values()), None)
        if first is not None and first.name not in arguments and own.parts:
            several = first.kind is first.VAR_POSITIONAL
            if several or first.name == "inner":
                arguments[first.name] = own.parts if several else own.parts[0]
        return {"name": own.name} | self.arguments(function, arguments, at, "name")

    def groups(self, own: Transformation, at: str) -> dict[str, Any]:
        settings = dict(own.settings)
        recipe, table = settings.pop("recipe"), own.labels.__self__
        where, name = _inside(at, "recipe"), getattr(recipe, "__name__", None)
        handed = self.name_of(recipe)
        if handed is None and (name is None or RECIPES.get(name) is not recipe):
            raise _refused(where, f"a function, {name or recipe!r}, that is not in RECIPES")
        mark = "name" if handed is None else "function"
        data = {"name": own.name, "recipe": {mark: handed or name}}
        data["recipe"] |= self.arguments(recipe, settings, where, mark)

        def written(group: Group, at: str) -> dict[str, Any]:
            return self.arguments(Group, vars(group), at, "")

        listed = enumerate(table.groups)
        data["groups"] = [written(g, _inside(at, f"groups[{i}]")) for i, g in listed]
        if table.default is not None:
            data["default"] = written(table.default, _inside(at, "default"))
        return data

    def of_optax(self, given: optax.GradientTransformation, at: str) -> dict[str, Any]:
        update, init = inspect.unwrap(given.update), inspect.unwrap(given.init)
        name = getattr(update, "__qualname__", type(update).__name__).split(".<locals>")[0]
        name, held = name.removesuffix(".update"), _cells(update)
        if name == "with_extra_args_support" and package_of(update) == "optax":
            return self.optimizer(optax.GradientTransformation(init, held["tx"].update), at)
        if package_of(update) != "optax":
            raise _refused(at, f"{name or 'a transformation'} is not made here or in optax")
        if package_of(init) != "optax":
            raise _refused(at, f"{name} has another's init")
        held = _cells(init) | held
        if name == "chain" and "init_fns" in held:
            pairs = enumerate(zip(held["init_fns"], held["update_fns"], strict=True))
            parts = [
                self.optimizer(optax.GradientTransformation(*pair), _inside(at, f"chain[{i}]"))
                for i, pair in pairs
            ]
            return {"chain": parts}
        if name == "MultiSteps":
            held = {k.removeprefix("_"): v for k, v in held.items()}
            every = held["every_k_schedule"]
            held["every_k_schedule"] = _cells(every).get("every_k_schedule", every)
            if package_of(held["should_skip_update_fn"]) != "optax":
                raise _refused(_inside(at, "should_skip_update_fn"), "a function")
        if name == "scale_by_schedule":
            rate = held["step_size_fn"]
            if getattr(rate, "__qualname__", "").startswith("scale_by_learning_rate.<locals>"):
                cells = _cells(rate)
                name = "scale_by_learning_rate"
                held = cells | {"flip_sign": cells["m"] == -1}
        elif name == "add_decayed_weights":
            held |= {"mask": None}  # one with a mask is an optax.masked
        function = _OPTAX.get(name)
        if function is None:
            raise _refused(
                at, f"optax's {name} is none of {', '.join(sorted(_OPTAX, key=str.lower))}"
            )
        for inner in list(held.values()):
            nested = inspect.isfunction(inner) and package_of(inner) == "optax"
            held = _cells(inner) | held if nested else held
        return {"optax": name} | self.arguments(function, held, at, "optax", complete=True)

    def arguments(
        self,
        function: Callable[..., Any],
        given: Mapping[str, Any],
        at: str,
        mark: str,
        complete: bool = False,
    ) -> dict[str, Any]:
        """Those that differ from their defaults, as data."""
        written, rest = {}, dict(given)
        for p in inspect.signature(function).parameters.values():
            if p.kind is p.VAR_KEYWORD:
                rest |= rest.pop(p.name, {})
                for key, value in rest.items():
                    written[key] = self.value(value, _inside(at, key), key)
                continue
            if p.name not in rest:
                if complete or (p.default is p.empty and p.kind is not p.VAR_POSITIONAL):
                    raise _refused(at, f"its argument {p.name} cannot be seen from outside")
                continue
            value = rest.pop(p.name)
            if p.kind is p.VAR_POSITIONAL and not value:
                continue
            key = p.name + "_" if p.name == mark else p.name
            data = self.value(value, _inside(at, p.name), p.name)
            if p.default is p.empty or not _equal(data, value, p):
                written[key] = data
        return written

    def value(self, value: Any, at: str, key: str = "", tree: bool = False) -> Any:
        tree = tree or key in _TREES
        if (name := self.name_of(value)) is not None:
            return {"function": name}
        if isinstance(value, optax.GradientTransformation):
            return self.optimizer(value, at)
        if value is not None and _is_dtype(key):
            return np.dtype(value).name
        if value is decay_mask:
            return "decay_mask" if key == "mask" else {"function": "decay_mask"}
        if isinstance(value, Scheduled):
            arguments = self.arguments(SCHEDULES[value.name], value.arguments, at, "schedule")
            return {"schedule": value.name} | arguments
        if isinstance(value, Tracer):
            raise ValueError(f"{at} is traced: what is known under jit only cannot be data.")
        if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0:
            value = value.item() if is_number(value) else value
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{at} is {value}, which cannot be data: JSON has no such number.")
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, Mapping) and type(value) is dict:
            if not all(isinstance(k, int if key == _BY_STEP else str) for k in value):
                raise _refused(at, f"a dict with keys that are no strings, {list(value)}")
            data = {str(k): self.value(v, _inside(at, str(k)), "", tree) for k, v in value.items()}
            return {"dict": data} if _mark(data) else data
        if type(value) is list or (type(value) is tuple and not tree):
            return [self.value(v, f"{at}[{i}]", "", tree) for i, v in enumerate(value)]
        if callable(value) and not inspect.isclass(value):
            made = _recognised(value)
            if made is None:
                name = getattr(value, "__qualname__", type(value).__name__).split("<locals>.")[-1]
                raise _refused(at, f"a function, {name}")
            return self.value(made, at)
        raise _refused(at, f"of type {type(value).__name__}")

    def name_of(self, value: Any) -> str | None:
        """The name under which it was handed in."""
        for name, handed in self.functions.items():
            if value is handed or (inspect.ismethod(value) and value == handed):
                return name
            if all(isinstance(x, optax.GradientTransformation) for x in (value, handed)):
                (init, update), (its_init, its_update) = _innermost(value), _innermost(handed)
                if init is its_init and update is its_update:
                    return name
        return None


def _refused(at: str, what: str) -> ValueError:
    is_what = f"{at or 'the optimizer'} is {what}" if what[:2] in ("a ", "of") else _at(at, what)
    return ValueError(
        f"{is_what}, which cannot be data: hand it in, config(optimizer, functions={{'mine': it}}),"
        " and to make(..., functions={'mine': it}) again."
    )


def _innermost(given: Any) -> tuple[Any, Any]:
    update = inspect.unwrap(given.update)
    while getattr(update, "__qualname__", "").startswith("with_extra_args_support."):
        update = inspect.unwrap(_cells(update)["tx"].update)
    return inspect.unwrap(given.init), update


def _wrote(function: Callable[..., Any], own: Transformation) -> bool:
    """Whether the stage is of the function that has its name, not of a namesake."""
    lines = [getattr(line, "function", None) for line in own.lines] if not own.parts else []
    lines = [getattr(line, "line", line) for line in lines if line is not None]
    ours = package_of(RECIPES["adam"])
    return all((package_of(line) == ours) == (package_of(function) == ours) for line in lines)


def _equal(data: Any, value: Any, parameter: inspect.Parameter) -> bool:
    """Whether an argument has its default."""
    default: Any = parameter.default
    if value is default or (isinstance(value, (tuple, list, dict)) and not value and not default):
        return True
    if _is_dtype(parameter.name) and default is not None and value is not None:
        return data == np.dtype(default).name
    plain = isinstance(data, (bool, int, float, str))
    return plain and isinstance(data, bool) == isinstance(default, bool) and data == default


def _cells(function: Any) -> dict[str, Any]:
    """What a function holds on to, or the object it is a method of; of cells, those not empty."""
    if not inspect.isfunction(function):
        return dict(held_by(function))
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held = {}
    for name, cell in cells:
        try:
            held[name] = cell.cell_contents
        except ValueError:  # a variable that was not assigned to
            continue
    return held


def _recognised(schedule: Any) -> Scheduled | None:
    """A schedule of optax by what its function holds on to, if that makes the same values again."""
    if not inspect.isfunction(schedule) or package_of(schedule) != "optax":
        return None
    name, held = schedule.__qualname__.split(".")[0], _cells(schedule)
    if name in ("polynomial_schedule", "exponential_decay") and set(held) == {"init_value"}:
        constant = {"power": 1, "decay_rate": 1.0, "transition_steps": 0, "transition_begin": 0}
        held |= constant | {"end_value": held["init_value"], "staircase": False}
    if name == "piecewise_interpolate_schedule" and {"boundaries", "scales"} <= set(held):
        kind = getattr(held.get("interpolate_fn"), "__name__", "").split("_")[1:2]
        steps = [int(step) for step in held["boundaries"]]
        scales = dict(zip(steps, map(float, held["scales"]), strict=True))
        held |= {"interpolate_type": "".join(kind), _BY_STEP: scales}
    if name == "cosine_decay_schedule" and float(held["decay_steps"]).is_integer():
        held |= {"decay_steps": int(held["decay_steps"])}  # it makes a float of it
    function = SCHEDULES.get(name)
    if function is None:
        return None
    takes = inspect.signature(function).parameters
    made = Scheduled(name, {k: held[k] for k in takes if k in held})
    try:
        counts = [np.int32(t) for t in (0, 1, 2, 3, 5, 10, 30, 99, 100, 1000, 10**4, 10**6)]
        with jax.ensure_compile_time_eval():
            same = all(np.array_equal(schedule(t), made(t)) for t in counts)
    except (TypeError, ValueError, KeyError):
        return None
    return made if same and set(made.arguments) == set(takes) else None
