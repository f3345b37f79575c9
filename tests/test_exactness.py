"""The recipes equal the public implementations their docstrings name: float64, 1e-12, every step.

The trajectories in tests/references were recorded by the scripts next to them: record.py (core),
record_family.py (family, one_cycle), record_successors.py (successors), record_schedule_free.py
(schedule_free), record_modifiers.py (modifiers) and record_matrices.py (matrices, with gradients of
their own). Every manifest is read.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import AS_USERS

import adaptive_opt
from adaptive_opt import one_cycle
from benchmarks.conformance.recorded import (
    REFERENCES,
    ROWS,
    arrays_of,
    optimizer_of,
    trajectory,
)

EVERY_ROW = [(name, row) for name, rows in ROWS.items() for row in rows]
TOLERANCE = 1e-12
CONVENTIONS = ("torch", "optax", "keras", "paper")


@pytest.fixture(scope="module")
def recorded():
    return {name: arrays_of(name) for name in ROWS}


def largest_so_far(values: np.ndarray) -> np.ndarray:
    return np.maximum.accumulate(np.abs(values), axis=0)


@pytest.mark.parametrize(("table", "row"), EVERY_ROW, ids=[row["name"] for _, row in EVERY_ROW])
def test_recipe_equals_the_recorded_implementation(table, row, recorded, x64):
    arrays = recorded[table]
    gradients = arrays[row.get("gradients", "gradients")]
    start, parameters, updates = (
        arrays[f"{row['name']}/{key}"] for key in ("start", "parameters", "updates")
    )
    optimizer, shape = optimizer_of(row, len(gradients)), row.get("shape", start.shape)
    steps = gradients.reshape(-1, *shape)
    losses = arrays[row["losses"]] if "losses" in row else None
    run = jax.jit(lambda g, s: trajectory(optimizer, g, s, losses), compiler_options=AS_USERS)
    made = run(steps, start.reshape(shape))
    x, u = (values.reshape(gradients.shape) for values in made)
    assert x.dtype == u.dtype == np.float64
    every = row["parameters_every"]
    scale = largest_so_far(np.concatenate([start[None], x]))[1:]
    assert len(parameters) == len(gradients) // every
    assert np.all(np.abs(x - _at(x, parameters, every)) <= TOLERANCE * scale)
    assert np.all(np.abs(u - updates) <= TOLERANCE * largest_so_far(updates))


def _at(x: jax.Array, parameters: np.ndarray, every: int) -> np.ndarray:
    """The recorded parameters where there are any, elsewhere ours."""
    expected = np.array(x)
    expected[every - 1 :: every] = parameters
    return expected


def test_the_recorded_gradients_are_hard_enough(recorded):
    gradients = recorded["core"]["gradients"]
    for name, others in recorded.items():
        if name != "matrices":
            np.testing.assert_array_equal(gradients, others["gradients"])
    sizes = np.abs(gradients[gradients != 0])
    assert len(gradients) >= 300
    assert sizes.min() < 1e-6
    assert sizes.max() > 1e3
    assert np.mean(gradients == 0) > 0.1
    assert np.any(np.diff(np.sign(gradients), axis=0) == 2)


@pytest.mark.parametrize("name", [f"amsgrad-{c}-binding" for c in CONVENTIONS])
def test_the_maximum_binds_in_the_recorded_amsgrad(name, recorded, x64):
    adam = adaptive_opt.adam(0.01, b2=0.9)
    _, updates = trajectory(adam, recorded["core"]["gradients"], np.zeros(5))
    fading = 4  # the weight whose gradient falls from 1e3 to 1e-6
    last = np.abs(recorded["core"][f"{name}/updates"][-1, fading])
    assert last < 1e-6 * np.abs(updates[-1, fading])


@pytest.mark.parametrize(("form", "tolerance"), [("fastai1", 1e-12), ("fastai2", 1e-6)])
def test_one_cycle_equals_that_of_fastai(form, tolerance, x64):
    values = json.loads((REFERENCES / "one_cycle.json").read_text())[form]
    cycle = one_cycle(0.01, len(values["b1"]), form=form)
    steps = jnp.arange(len(values["b1"]))
    for name in ("learning_rate", "b1"):
        actual = jax.vmap(getattr(cycle, name))(steps)
        largest = max(values[name])
        np.testing.assert_allclose(actual, values[name], rtol=0, atol=tolerance * largest)
