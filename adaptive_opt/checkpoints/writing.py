"""From an optimizer to data."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.checkpoints.known import (
    BY_STEP,
    OPTAX,
    TREES,
    Functions,
    cells_of,
    inside,
    is_dtype,
    known_names,
    mark_of,
    said_at,
)
from adaptive_opt.core.checks import is_number
from adaptive_opt.core.describe import (
    Transformation,
    held_by,
    made_of,
)
from adaptive_opt.core.recipe import RECIPES
from adaptive_opt.core.stage import package_of
from adaptive_opt.wrappers.decay import decay_mask
from adaptive_opt.wrappers.groups import Group
from adaptive_opt.wrappers.schedules import SCHEDULES, Scheduled


class Writer:
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
        function = known_names().get(own.name)
        if function is None or not _wrote(function, own):
            raise _refused(at, f"{own.name} is no recipe of RECIPES or stage of STAGES")
        arguments = dict(own.settings)
        parts = list(own.parts or ())
        for p in inspect.signature(function).parameters.values():  # which have parts, in order
            if p.name == "inner" and p.name not in arguments and parts:
                arguments[p.name] = parts.pop(0)
            elif p.kind is p.VAR_POSITIONAL and p.name not in arguments:
                arguments[p.name] = tuple(parts)
        return {"name": own.name} | self.arguments(function, arguments, at, "name")

    def groups(self, own: Transformation, at: str) -> dict[str, Any]:
        settings = dict(own.settings)
        recipe, table = settings.pop("recipe"), own.labels.__self__
        where, name = inside(at, "recipe"), getattr(recipe, "__name__", None)
        handed = self.name_of(recipe)
        if handed is None and (name is None or RECIPES.get(name) is not recipe):
            raise _refused(where, f"a function, {name or recipe!r}, that is not in RECIPES")
        mark = "name" if handed is None else "function"
        data = {"name": own.name, "recipe": {mark: handed or name}}
        data["recipe"] |= self.arguments(recipe, settings, where, mark)

        def written(group: Group, at: str) -> dict[str, Any]:
            return self.arguments(Group, vars(group), at, "")

        listed = enumerate(table.groups)
        data["groups"] = [written(g, inside(at, f"groups[{i}]")) for i, g in listed]
        if table.default is not None:
            data["default"] = written(table.default, inside(at, "default"))
        return data

    def of_optax(self, given: optax.GradientTransformation, at: str) -> dict[str, Any]:
        update, init = inspect.unwrap(given.update), inspect.unwrap(given.init)
        name = getattr(update, "__qualname__", type(update).__name__).split(".<locals>")[0]
        name, held = name.removesuffix(".update"), cells_of(update)
        if name == "with_extra_args_support" and package_of(update) == "optax":
            return self.optimizer(optax.GradientTransformation(init, held["tx"].update), at)
        if package_of(update) != "optax":
            raise _refused(at, f"{name or 'a transformation'} is not made here or in optax")
        if package_of(init) != "optax":
            raise _refused(at, f"{name} has another's init")
        held = cells_of(init) | held
        if name == "chain" and "init_fns" in held:
            pairs = enumerate(zip(held["init_fns"], held["update_fns"], strict=True))
            parts = [
                self.optimizer(optax.GradientTransformation(*pair), inside(at, f"chain[{i}]"))
                for i, pair in pairs
            ]
            return {"chain": parts}
        if name == "MultiSteps":
            held = {k.removeprefix("_"): v for k, v in held.items()}
            every = held["every_k_schedule"]
            held["every_k_schedule"] = cells_of(every).get("every_k_schedule", every)
            if package_of(held["should_skip_update_fn"]) != "optax":
                raise _refused(inside(at, "should_skip_update_fn"), "a function")
        if name == "scale_by_schedule":
            rate = held["step_size_fn"]
            if getattr(rate, "__qualname__", "").startswith("scale_by_learning_rate.<locals>"):
                cells = cells_of(rate)
                name = "scale_by_learning_rate"
                held = cells | {"flip_sign": cells["m"] == -1}
        elif name == "add_decayed_weights":
            held |= {"mask": None}  # one with a mask is an optax.masked
        function = OPTAX.get(name)
        if function is None:
            raise _refused(
                at, f"optax's {name} is none of {', '.join(sorted(OPTAX, key=str.lower))}"
            )
        for inner in list(held.values()):
            nested = inspect.isfunction(inner) and package_of(inner) == "optax"
            held = cells_of(inner) | held if nested else held
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
                    written[key] = self.value(value, inside(at, key), key)
                continue
            if p.name not in rest:
                if complete or (p.default is p.empty and p.kind is not p.VAR_POSITIONAL):
                    raise _refused(at, f"its argument {p.name} cannot be seen from outside")
                continue
            value = rest.pop(p.name)
            if p.kind is p.VAR_POSITIONAL and not value:
                continue
            key = p.name + "_" if p.name == mark else p.name
            data = self.value(value, inside(at, p.name), p.name)
            if p.default is p.empty or not _equal(data, value, p):
                written[key] = data
        return written

    def value(self, value: Any, at: str, key: str = "", tree: bool = False) -> Any:
        tree = tree or key in TREES
        if (name := self.name_of(value)) is not None:
            return {"function": name}
        if isinstance(value, optax.GradientTransformation):
            return self.optimizer(value, at)
        if value is not None and is_dtype(key):
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
            if not all(isinstance(k, int if key == BY_STEP else str) for k in value):
                raise _refused(at, f"a dict with keys that are no strings, {list(value)}")
            data = {str(k): self.value(v, inside(at, str(k)), "", tree) for k, v in value.items()}
            return {"dict": data} if mark_of(data) else data
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
    is_what = (
        f"{at or 'the optimizer'} is {what}" if what[:2] in ("a ", "of") else said_at(at, what)
    )
    return ValueError(
        f"{is_what}, which cannot be data: hand it in, config(optimizer, functions={{'mine': it}}),"
        " and to make(..., functions={'mine': it}) again."
    )


def _innermost(given: Any) -> tuple[Any, Any]:
    update = inspect.unwrap(given.update)
    while getattr(update, "__qualname__", "").startswith("with_extra_args_support."):
        update = inspect.unwrap(cells_of(update)["tx"].update)
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
    if is_dtype(parameter.name) and default is not None and value is not None:
        return data == np.dtype(default).name
    plain = isinstance(data, (bool, int, float, str))
    return plain and isinstance(data, bool) == isinstance(default, bool) and data == default


def _recognised(schedule: Any) -> Scheduled | None:
    """A schedule of optax by what its function holds on to, if that makes the same values again."""
    if not inspect.isfunction(schedule) or package_of(schedule) != "optax":
        return None
    name, held = schedule.__qualname__.split(".")[0], cells_of(schedule)
    if name in ("polynomial_schedule", "exponential_decay") and set(held) == {"init_value"}:
        constant = {"power": 1, "decay_rate": 1.0, "transition_steps": 0, "transition_begin": 0}
        held |= constant | {"end_value": held["init_value"], "staircase": False}
    if name == "piecewise_interpolate_schedule" and {"boundaries", "scales"} <= set(held):
        kind = getattr(held.get("interpolate_fn"), "__name__", "").split("_")[1:2]
        steps = [int(step) for step in held["boundaries"]]
        scales = dict(zip(steps, map(float, held["scales"]), strict=True))
        held |= {"interpolate_type": "".join(kind), BY_STEP: scales}
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
