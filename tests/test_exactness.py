"""The recipes equal the public implementations their docstrings name: float64, 1e-12, every step.

The trajectories in tests/references were recorded by tests/references/record.py.
"""

from __future__ import annotations

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_opt

REFERENCES = pathlib.Path(__file__).parent / "references"
ROWS = json.loads((REFERENCES / "core.json").read_text())
TOLERANCE = 1e-12
CONVENTIONS = ("torch", "optax", "keras", "paper")


@pytest.fixture(scope="module")
def recorded():
    with np.load(REFERENCES / "core.npz") as arrays:
        return dict(arrays)


def multiplier(steps: int) -> jax.Array:
    """The schedule of record.py: a warm-up of 40 steps, then a cosine to zero."""
    t = jnp.arange(steps)
    return jnp.minimum(1.0, (t + 1) / 40) * 0.5 * (1 + jnp.cos(jnp.pi * t / steps))


def optimizer_of(row: dict, steps: int) -> optax.GradientTransformationExtraArgs:
    arguments = dict(row["arguments"])
    if row["scheduled"]:
        factors, lr = multiplier(steps), arguments["learning_rate"]
        if arguments.get("convention") == "paper" and row["recipe"] == "adamw":
            arguments["schedule"] = lambda count: factors[count]
        else:
            arguments["learning_rate"] = lambda count: lr * factors[count]
    return getattr(adaptive_opt, row["recipe"])(**arguments)


def trajectory(optimizer, gradients, start):
    """The parameters after every step, and every update."""

    def step(carry, gradient):
        x, state = carry
        update, state = optimizer.update(gradient, state, x)
        x = optax.apply_updates(x, update)
        return (x, state), (x, update)

    start = jnp.asarray(start)
    return jax.lax.scan(step, (start, optimizer.init(start)), jnp.asarray(gradients))[1]


def largest_so_far(values: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(np.abs(values), axis=0)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["name"])
def test_recipe_equals_the_recorded_implementation(row, recorded, x64):
    gradients = recorded["gradients"]
    start, parameters, updates = (
        recorded[f"{row['name']}/{key}"] for key in ("start", "parameters", "updates")
    )
    optimizer = optimizer_of(row, len(gradients))
    x, u = jax.jit(lambda g, s: trajectory(optimizer, g, s))(gradients, start)
    assert x.dtype == u.dtype == np.float64
    scale = largest_so_far(np.concatenate([start[None], parameters]))[1:]
    assert np.all(np.abs(x - parameters) <= TOLERANCE * scale)
    assert np.all(np.abs(u - updates) <= TOLERANCE * largest_so_far(updates))


def test_the_recorded_gradients_are_hard_enough(recorded):
    gradients = recorded["gradients"]
    sizes = np.abs(gradients[gradients != 0])
    assert len(gradients) >= 300
    assert sizes.min() < 1e-6
    assert sizes.max() > 1e3
    assert np.mean(gradients == 0) > 0.1
    assert np.any(np.diff(np.sign(gradients), axis=0) == 2)


@pytest.mark.parametrize("name", [f"amsgrad-{c}-binding" for c in CONVENTIONS])
def test_the_maximum_binds_in_the_recorded_amsgrad(name, recorded, x64):
    adam = adaptive_opt.adam(0.01, b2=0.9)
    _, updates = trajectory(adam, recorded["gradients"], np.zeros(5))
    fading = 4  # the weight whose gradient falls from 1e3 to 1e-6
    last = np.abs(recorded[f"{name}/updates"][-1, fading])
    assert last < 1e-6 * np.abs(updates[-1, fading])
