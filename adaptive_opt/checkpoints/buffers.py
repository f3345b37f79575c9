"""The buffers of a state, by name: taken out of one state and put into another.

What optimizers of one kind remember is the same everywhere, under other names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.describe import describe
from adaptive_opt.core.observe import Observation
from adaptive_opt.core.trees import Tree, dtype_of
from adaptive_opt.memory.low_memory import LowMemoryState

_OWN_NAMES = {
    ("TraceState", "trace"): "velocity",
    ("ScaleByRStdDevState", "mu"): "mean_gradient",
}
"""What optax calls differently."""

_DERIVED = ("nu_max", "rate_ema", "previous_gradient")
"""Buffers that can be started from the moments."""


def put_together(
    target: optax.GradientTransformation,
    params: Tree,
    found: Mapping[str, Tree],
    count: int,
    meanings: Mapping[str, str],
) -> Any:
    fresh = target.init(params)
    wanted, _ = take_apart(fresh)
    name = describe(target).name
    if any(map(_is_encoded, jax.tree.leaves(fresh, is_leaf=_is_encoded))):
        raise ValueError(
            f"no state can be put into {name}: that of low_memory is encoded. Take the optimizer"
            " inside of it as the target."
        )
    lost, missing = set(found) - set(wanted), set(wanted) - set(found) - {"slow"}
    if lost:
        raise ValueError(
            f"{name} has no place for {listed(lost)}, which would be lost. It keeps"
            f" {listed(wanted) or 'nothing'}."
        )
    if missing - set(_DERIVED):
        raise ValueError(
            f"{name} needs {listed(missing - set(_DERIVED))}, which cannot be derived from"
            f" {listed(found)}."
        )
    found = _in_the_meaning_of(target, found, meanings)
    state = _replaced(fresh, found, count)
    if not missing or count == 0:
        return state
    derived = {"previous_gradient": found["mu"]} if "previous_gradient" in missing else {}
    if missing - set(derived):
        derived |= _derived(target, params, found, count)
    return _replaced(state, {name: derived[name] for name in missing}, count)


def _derived(
    target: optax.GradientTransformation,
    params: Tree,
    found: Mapping[str, Tree],
    count: int,
) -> dict[str, Tree]:
    """The maximum and the rate of a step that leaves the second moment as it is.

    The gradient sqrt(v) does: b2 v + (1 - b2) v = v. The average of rates is linear in what it was,
    so that two steps, from 0 and from 1, tell the rate; in float64, because b3 is close to 1.
    """
    with jax.enable_x64(True):
        nowhere = jax.tree.map(  # where nothing decays
            lambda p: jnp.zeros(jnp.shape(p), jnp.promote_types(dtype_of(p), np.float64)), params
        )
        fresh = target.init(nowhere)
        gradient = jax.tree.map(lambda v: jnp.sqrt(jnp.asarray(v, np.float64)), found["nu"])

        def after(start: float) -> dict[str, Tree]:
            started = {
                name: jax.tree.map(lambda x: jnp.full_like(x, start), buffer)
                for name, buffer in take_apart(fresh)[0].items()
                if name in ("nu_max", "rate_ema")
            }
            state = _replaced(fresh, {**found, **started}, count - 1)
            return take_apart(target.update(gradient, state, nowhere)[1])[0]

        zero, one = after(0.0), after(1.0)
        made = {"nu_max": zero["nu_max"]} if "nu_max" in zero else {}
        if "rate_ema" in zero:
            made["rate_ema"] = jax.tree.map(
                lambda s0, s1, v: jnp.where(v == 0, 0.0, s0 / (1 - (s1 - s0))),
                *(zero["rate_ema"], one["rate_ema"], found["nu"]),
            )
        return jax.device_get(made)


def meanings_of(optimizer: optax.GradientTransformation) -> dict[str, str]:
    """What two buffers hold that are not the same everywhere; it depends on what comes before.

    ``nu_max``: the maximum of the "raw" or the "debiased" second moment. ``velocity``: an average
    of "directions", of "steps" (times the learning rate), or of "negative steps".
    """
    names = [stage.name for stage in describe(optimizer).stages()]
    meanings = {}
    if "amsgrad_max" in names:
        before = set(names[: names.index("amsgrad_max")])
        meanings["nu_max"] = "debiased" if before & {"debias", "scale_by_adam"} else "raw"
    if "scale_by_amsgrad" in names:
        meanings["nu_max"] = "debiased"
    if "heavy_ball" in names:
        scaled = "scale_rate" in names[: names.index("heavy_ball")]
        meanings["velocity"] = "steps" if scaled else "directions"
    if "trace" in names:
        before = set(names[: names.index("trace")])
        scaled = before & {"scale", "scale_by_learning_rate", "scale_by_schedule"}
        meanings["velocity"] = "negative steps" if scaled else "directions"
    return meanings


def _in_the_meaning_of(
    target: optax.GradientTransformation, found: Mapping[str, Tree], meanings: Mapping[str, str]
) -> dict[str, Tree]:
    wanted = meanings_of(target)
    found = dict(found)
    if "velocity" in found and {meanings["velocity"], wanted["velocity"]} == {
        "steps",
        "negative steps",
    }:
        found["velocity"] = jax.tree.map(jnp.negative, found["velocity"])
        meanings = {**meanings, "velocity": wanted["velocity"]}
    for buffer in set(found) & set(wanted):
        if meanings[buffer] != wanted[buffer]:
            raise ValueError(
                f"{buffer!r} is made of {meanings[buffer]} values in the source, but of"
                f" {wanted[buffer]} ones in {describe(target).name}. Choose the convention that the"
                ' source follows: "optax" for states of optax, "torch" for those of PyTorch.'
            )
    return found


def take_apart(state: Any) -> tuple[dict[str, Tree], list[Any]]:
    """The buffers in a state, by name, and its counts."""
    found: dict[str, Tree] = {}
    counts: list[Any] = []

    def take(name: str, value: Any) -> Any:
        if name == "count":
            counts.append(value)
        elif isinstance(value, Observation):
            pass  # what was seen of one optimizer says nothing of another
        elif name in found:
            raise ValueError(
                f"the state has several buffers {name!r}. Move the optimizers of parameter groups"
                " one by one."
            )
        else:
            found[name] = value
        return value

    _visit(state, take)
    return found, counts


def _replaced(state: Any, buffers: Mapping[str, Tree], count: Any) -> Any:
    def put(name: str, old: Any) -> Any:
        if name == "count":
            return jnp.asarray(count, old.dtype)
        if name not in buffers:
            return old
        if jax.tree.structure(old) != jax.tree.structure(buffers[name]):
            raise ValueError(
                f"the buffer {name!r} is one of other parameters: its structure is"
                f" {jax.tree.structure(buffers[name])}, it should be {jax.tree.structure(old)}."
            )
        return jax.tree_util.tree_map_with_path(cast, old, buffers[name])

    def cast(path: Any, old: Any, new: Any) -> jax.Array:
        if np.shape(old) != np.shape(new):
            raise ValueError(
                f"the buffer at {jax.tree_util.keystr(path) or 'the only leaf'} has shape"
                f" {np.shape(new)}, it should be {np.shape(old)}."
            )
        return jnp.array(new, old.dtype)

    return _visit(state, put)


def _visit(state: Any, function: Callable[[str, Any], Any]) -> Any:
    """The state with ``function(name, value)`` in place of every buffer and count."""
    if isinstance(state, tuple) and hasattr(state, "_fields"):
        kind = type(state).__name__
        values: dict[str, Any] = {}
        for field, value in state._asdict().items():  # pyright: ignore[reportAttributeAccessIssue]
            if field == "inner_states":  # of partition, by group
                values[field] = {name: _visit(part, function) for name, part in value.items()}
            elif "state" in field or field == "buffers":
                values[field] = _visit(value, function)
            else:
                values[field] = function(str(_OWN_NAMES.get((kind, field), field)), value)
        return type(state)(**values)
    if isinstance(state, (tuple, list)):
        return type(state)(_visit(part, function) for part in state)
    if isinstance(state, dict):
        return {name: function(name, value) for name, value in state.items()}
    return state


def _is_encoded(x: Any) -> bool:
    return isinstance(x, LowMemoryState)


def listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
