"""From the state of an optimizer of PyTorch to that of one here."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax

from adaptive_opt.checkpoints.buffers import listed, put_together
from adaptive_opt.core.trees import Tree
from adaptive_opt.recipes.adam import amsgrad
from adaptive_opt.recipes.bounds import adamod
from adaptive_opt.recipes.classics import rmsprop, sgd

_TORCH_NAMES = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "max_exp_avg_sq": "nu_max",
    "exp_avg_lr": "rate_ema",
    "momentum_buffer": "velocity",
    "square_avg": "nu",
}


def _meant(buffers: Collection[str]) -> optax.GradientTransformation:
    """An optimizer here whose buffers mean what those of PyTorch do."""
    if "velocity" in buffers:
        return rmsprop(1.0, momentum=0.9) if "nu" in buffers else sgd(1.0, momentum=0.9)
    return adamod(1.0) if "rate_ema" in buffers else amsgrad(1.0)


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
            raise ValueError(f"names does not say what {name!r} is called; it has {listed(names)}.")
        position = names[name]
        if isinstance(position, str):
            if position not in positions:
                raise ValueError(
                    f"{position!r} is not among the names of PyTorch: {listed(positions)}. Give the"
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
        raise ValueError(f"no parameter here is that of the states {listed(set(states) - used)}.")
    if len(steps) != 1:
        raise ValueError(f"the parameters should have seen one number of gradients, got {steps}.")
    for buffer, column in columns.items():
        if len(column) != len(leaves):
            raise ValueError(f"only {len(column)} of {len(leaves)} parameters have {buffer!r}.")
    found = {buffer: structure.unflatten(column) for buffer, column in columns.items()}
    return put_together(target, params, found, steps.pop(), _meant(found))


def _torch_name(key: str) -> str:
    if key not in _TORCH_NAMES:
        raise ValueError(
            f"{key!r} is not a buffer that can be moved: known are {listed(_TORCH_NAMES)}."
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
