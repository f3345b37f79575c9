"""What tests/references/record_torch_states.py has recorded of PyTorch, and targets for it."""

from __future__ import annotations

import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adamw,
    import_torch_state,
    l2_regularization,
)

BEFORE, LR = 30, 1e-2
SEEN = (1, 2, 5, 10, 30, 100)
PATHS = {
    "body/kernel": "body.weight",
    "body/bias": "body.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
    "scale": "scale",
}
"""The parameters here, in a tree of Flax, and in PyTorch."""


@functools.cache
def recorded():
    with np.load(pathlib.Path(__file__).parent / "references" / "torch_states.npz") as arrays:
        return dict(arrays)


def state_dict_of(row):
    """The state dict as PyTorch returned it, with arrays for tensors."""

    def restored(x):
        if isinstance(x, dict):
            if "array" in x:
                return recorded()[f"{row}|array|{x['array']}"]
            return {key: restored(value) for key, value in x["dict"]}
        return [restored(item) for item in x] if isinstance(x, list) else x

    return restored(json.loads(str(recorded()[f"{row}|state_dict"])))


def in_a_tree(array_of):
    """A tree of Flax of what ``array_of`` says of each parameter of PyTorch."""
    tree = {"body": {}, "head": {}}
    for path, name in PATHS.items():
        array = jnp.asarray(array_of(name))
        *above, last = path.split("/")
        there = tree[above[0]] if above else tree
        there[last] = jnp.swapaxes(array, -1, -2) if last == "kernel" else array
    return tree


def parameters_of(row):
    return in_a_tree(lambda name: recorded()[f"{row}|before|{name}"])


def imported(row, target, **more):
    order = [str(name) for name in recorded()[f"{row}|order"]]
    return import_torch_state(
        state_dict_of(row), target, parameters_of(row), PATHS, **{"order": order, **more}
    )


def grouped(recipe, *groups, **settings):
    return ParameterGroups(groups, default=Group()).optimizer(recipe, LR, **settings)


def adam_with_l2(learning_rate, weight_decay=0.0):
    return optax.chain(l2_regularization(weight_decay), adam(learning_rate))


def five_groups(recipe, **settings):
    decays = {"head/bias": 0.0, "head/kernel": 0.02, "body/bias": 0.04, "body/kernel": 0.06}
    groups = [Group(path, weight_decay=decay) for path, decay in decays.items()]
    return grouped(recipe, *groups, weight_decay=0.08, **settings)


HEAD = Group("^head", learning_rate=10.0, weight_decay=0.0)
ALONE = Group("body/kernel")
ADAMW_GROUPS = grouped(adamw, HEAD, weight_decay=0.1)
