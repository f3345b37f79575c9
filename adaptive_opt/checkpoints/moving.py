"""Moving a run in and out: states of other optimizers and of other libraries.

What optimizers of one kind remember is the same everywhere, under other names. A state is taken
apart into its buffers, by name, and put together again for another optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.describe import describe
from adaptive_opt.core.observe import Observation
from adaptive_opt.core.trees import Tree, dtype_of
from adaptive_opt.memory import codecs
from adaptive_opt.memory.low_memory import LowMemoryState

_OWN_NAMES = {
    ("TraceState", "trace"): "velocity",
    ("ScaleByRStdDevState", "mu"): "mean_gradient",
}
"""What optax calls differently."""

_TORCH_NAMES = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "max_exp_avg_sq": "nu_max",
    "exp_avg_lr": "rate_ema",
    "momentum_buffer": "velocity",
    "square_avg": "nu",
}

_OF_TORCH = {"nu_max": "raw", "velocity": "directions"}

_DERIVED = ("nu_max", "rate_ema", "previous_gradient")
"""Buffers that can be started from the moments."""


def convert_state(
    state: Any,
    source: optax.GradientTransformation,
    target: optax.GradientTransformation,
    params: Tree,
    *,
    count: int | None = None,
) -> Any:
    """The state with which ``target`` goes on where ``source`` stopped.

    Both are optimizers of this library or of optax; every buffer is found by its name, and every
    count in the new state is the count of the old. Between two optimizers that compute the same the
    next steps are those of an uninterrupted run. Where ``target`` remembers more than ``source``:

    * the maximum of AMSGrad (``nu_max``) starts at the present second moment;
    * the average of rates of AdaMod and DiffMod (``rate_ema``) starts at the present rate of each
      weight, as if it had been that for ever, and at 0 where no gradient has been seen;
    * the gradient before (``previous_gradient``) of diffGrad and DiffMod is the first moment.

    A state of ``low_memory`` is decoded first. ``target`` cannot be one.

    Args:
      state: a state of ``source``.
      source: the optimizer that made it. Of its hyperparameters nothing is taken over.
      target: the optimizer that is to go on.
      params: the parameters at this point.
      count: how many gradients ``state`` has seen; needed only where it does not say (sgd and
        rmsprop of optax).

    Raises:
      ValueError: a buffer has no place in the new state (it would be lost), or cannot be derived,
        or means something else there; the message says which.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamod, convert_state
    >>> x = jnp.array([1.0, -2.0])
    >>> adam = optax.adam(1e-3)
    >>> _, state = adam.update(x, adam.init(x), x)
    >>> state = convert_state(state, adam, adamod(1e-3), x)
    >>> print(state[0].count, state[0].buffers["rate_ema"])
    1 [0.01  0.005]
    """
    expected = jax.tree.structure(jax.eval_shape(source.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"the state is not one of the source, {describe(source).name}, for these parameters:"
            f" its structure is {jax.tree.structure(state)}, that of the source is {expected}."
        )
    found, counts = _take_apart(codecs.decoded(state))
    if count is None:
        if not counts:
            raise ValueError(
                f"the state of {describe(source).name} does not say how many gradients it has"
                " seen: give count=."
            )
        numbers = {int(c) for c in counts}
        if len(numbers) > 1:
            raise ValueError(f"the counts in the state differ: {sorted(numbers)}; give count=.")
        count = numbers.pop()
    return _put_together(target, params, found, count, _meanings(source))


def import_torch_state(
    state_dict: Mapping[str, Any],
    target: optax.GradientTransformation,
    params: Tree,
    names: Mapping[str, str | int],
    *,
    order: Sequence[str] | None = None,
    layout: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Any:
    """The state with which ``target`` goes on where an optimizer of PyTorch stopped.

    Reads ``step``, ``exp_avg``, ``exp_avg_sq``, ``max_exp_avg_sq`` (``torch.optim.Adam`` and
    ``AdamW``, ``amsgrad=True``; for the convention "torch"), ``exp_avg_lr`` (package ``adamod``),
    ``momentum_buffer`` and ``square_avg``. PyTorch is not needed here: turn tensors into arrays
    where it is, with ``tensor.numpy()``.

    Args:
      state_dict: ``optimizer.state_dict()``, its tensors as NumPy arrays.
      target: the optimizer that is to go on.
      params: the parameters at this point.
      names: for the path of every parameter here ("dense/kernel") its name in PyTorch, or its
        position in ``model.parameters()``.
      order: the names in the order of ``model.parameters()``; needed for names if the state dict
        has no ``param_names``.
      layout: ``(path, array) -> array`` in the layout of the parameter here. A Linear layer of
        PyTorch keeps the transpose of a Dense kernel of Flax: ``lambda path, x: x.T``.

    Raises:
      ValueError: a parameter without state, a state without parameter, another shape, counts that
        differ, or a buffer without a place; the message says which.

    >>> import jax.numpy as jnp, numpy as np
    >>> from adaptive_opt import adam, import_torch_state
    >>> moments = {"step": 7, "exp_avg": np.ones((3, 2)), "exp_avg_sq": np.ones((3, 2))}
    >>> saved = {"state": {0: moments}, "param_groups": [{"params": [0]}]}
    >>> params = {"dense": {"kernel": jnp.zeros((2, 3))}}
    >>> state = import_torch_state(
    ...     saved, adam(1e-3), params, {"dense/kernel": 0}, layout=lambda path, x: x.T
    ... )
    >>> int(state[0].count), state[0].mu["dense"]["kernel"].shape
    (7, (2, 3))
    """
    states = state_dict["state"]
    positions = _positions(state_dict, order)
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    columns: dict[str, list[Any]] = {}
    steps, used = set(), set()
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in names:
            raise ValueError(f"names does not say what {name!r} is called; it has {_list(names)}.")
        position = names[name]
        if isinstance(position, str):
            if position not in positions:
                raise ValueError(
                    f"{position!r} is not among the names of PyTorch: {_list(positions)}. Give the"
                    " names of model.named_parameters() as order=, or positions."
                )
            position = positions[position]
        if position not in states:
            raise ValueError(f"the state dict has no state of parameter {position} ({name!r}).")
        used.add(position)
        for key, value in states[position].items():
            if key == "step":
                steps.add(int(np.asarray(value)))
            elif value is not None:
                array = np.asarray(value)
                array = layout(name, array) if layout else array
                if array.shape != np.shape(leaf):
                    raise ValueError(
                        f"{key} of {name!r} has shape {array.shape}, the parameter"
                        f" {np.shape(leaf)}. If the layouts differ, give layout=, for instance"
                        " lambda path, x: x.T."
                    )
                columns.setdefault(_torch_name(key), []).append(array)
    if used != set(states):
        raise ValueError(f"no parameter here is that of the states {_list(set(states) - used)}.")
    if len(steps) != 1:
        raise ValueError(f"the parameters should have seen one number of gradients, got {steps}.")
    for buffer, column in columns.items():
        if len(column) != len(leaves):
            raise ValueError(f"only {len(column)} of {len(leaves)} parameters have {buffer!r}.")
    found = {buffer: structure.unflatten(column) for buffer, column in columns.items()}
    return _put_together(target, params, found, steps.pop(), _OF_TORCH)


def _torch_name(key: str) -> str:
    if key not in _TORCH_NAMES:
        raise ValueError(
            f"{key!r} is not a buffer that can be moved: known are {_list(_TORCH_NAMES)}."
        )
    return _TORCH_NAMES[key]


def _positions(state_dict: Mapping[str, Any], order: Sequence[str] | None) -> dict[str, int]:
    if order is not None:
        return {name: position for position, name in enumerate(order)}
    return {
        name: position
        for group in state_dict.get("param_groups", ())
        for name, position in zip(group.get("param_names", ()), group["params"], strict=False)
    }


def _put_together(
    target: optax.GradientTransformation,
    params: Tree,
    found: Mapping[str, Tree],
    count: int,
    meanings: Mapping[str, str],
) -> Any:
    fresh = target.init(params)
    wanted, _ = _take_apart(fresh)
    name = describe(target).name
    if any(map(_is_encoded, jax.tree.leaves(fresh, is_leaf=_is_encoded))):
        raise ValueError(
            f"no state can be put into {name}: that of low_memory is encoded. Take the optimizer"
            " inside of it as the target."
        )
    lost, missing = set(found) - set(wanted), set(wanted) - set(found) - {"slow"}
    if lost:
        raise ValueError(
            f"{name} has no place for {_list(lost)}, which would be lost. It keeps"
            f" {_list(wanted) or 'nothing'}."
        )
    if missing - set(_DERIVED):
        raise ValueError(
            f"{name} needs {_list(missing - set(_DERIVED))}, which cannot be derived from"
            f" {_list(found)}."
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
                for name, buffer in _take_apart(fresh)[0].items()
                if name in ("nu_max", "rate_ema")
            }
            state = _replaced(fresh, {**found, **started}, count - 1)
            return _take_apart(target.update(gradient, state, nowhere)[1])[0]

        zero, one = after(0.0), after(1.0)
        made = {"nu_max": zero["nu_max"]} if "nu_max" in zero else {}
        if "rate_ema" in zero:
            made["rate_ema"] = jax.tree.map(
                lambda s0, s1, v: jnp.where(v == 0, 0.0, s0 / (1 - (s1 - s0))),
                *(zero["rate_ema"], one["rate_ema"], found["nu"]),
            )
        return jax.device_get(made)


def _meanings(optimizer: optax.GradientTransformation) -> dict[str, str]:
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
    wanted = _meanings(target)
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


def _take_apart(state: Any) -> tuple[dict[str, Tree], list[Any]]:
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


def _list(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
