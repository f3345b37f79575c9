"""What the checkpoints in references/format_1.npz, format_2.npz and blocks.npz belong to."""

from __future__ import annotations

import collections
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import EVERY_CONVENTION

from adaptive_opt import Group, ParameterGroups, adamod, adamw, low_memory, nadamw, skip_nonfinite

FORMAT_1 = pathlib.Path(__file__).parent / "references" / "format_1.npz"
FORMAT_2 = FORMAT_1.with_name("format_2.npz")
BLOCKS = FORMAT_1.with_name("blocks.npz")

GROUPS = ParameterGroups([Group("bias", weight_decay=0.0)], default=Group())
WRAPPED = {
    "skip_nonfinite": skip_nonfinite(adamw(1e-2)),
    "groups": GROUPS.optimizer(adamod, learning_rate=1e-2, weight_decay=0.1),
    "clipped and accumulated": optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.MultiSteps(adamod(1e-2), 2).gradient_transformation(),
    ),
    "low_memory": low_memory(adamod(1e-2), min_size=1),
}
RENAMED = {
    "adamw (paper)": adamw(1e-2, decay="independent"),
    "adamw (keras-adamw)": adamw(1e-2, decay="independent", convention="keras"),
    "nadamw (keras-adamw)": nadamw(1e-2, decay="independent"),
}
"""What was a convention when the checkpoints were written."""
MADE = {name: recipe(1e-2) for name, recipe in EVERY_CONVENTION.items()} | RENAMED | WRAPPED
"""What could be saved; of recipes that came later there is no checkpoint of format 1."""

with np.load(FORMAT_1) as _recorded:
    SAVED_BY_FORMAT_1 = {
        name: MADE[name] for name in dict.fromkeys(key.split("/")[0] for key in _recorded)
    }


def trees_of_format_2():
    """What is in format_2.npz: of each kind of leaf and container one; saved with sgd(1e-2)."""
    few = np.arange(4)
    return {
        "containers": {
            "list": [few.astype(np.float32), (few.astype(np.int16), ())],
            "ordered": collections.OrderedDict(z=few > 1, a=few.reshape(2, 2)),
            "pair": optax.EmaState(np.int32(3), {1: few.astype(np.float64), 10: np.zeros((0, 2))}),
        },
        "numbers": {"int": -5, "bool": True, "float": 0.1, "complex": 1 - 2j},
        "keys": [jax.random.key(1), jax.random.split(jax.random.key(2, impl="rbg"), 2)],
        "narrow": {
            name: few.astype(name)
            for name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int4", "uint8")
        },
        "a function": {"activation": jax.nn.relu, "weights": few.astype(np.complex64)},
    }


WITH_BLOCKS = low_memory(adamod(1e-2), "8-bit", min_size=1)


def blocks_start():
    """Parameters whose states have blocks along the last axis, and in the flattened array."""
    rng = np.random.default_rng(0)
    shapes = {"along": (4, 512), "flat": (7, 50)}
    return {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}


def small_tree():
    return {
        "kernel": jnp.array([[0.5, -1.0], [2.0, 0.25], [-0.125, 1.5]], jnp.float32),
        "bias": jnp.array([1.0, -0.5], jnp.float32),
    }


def a_few_steps(optimizer, params, state):
    """Three steps down the sum of x^4, each on a gradient that depends on the parameters."""
    for _ in range(3):
        gradient = jax.tree.map(lambda x: jnp.asarray(x) ** 3, params)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params, state
