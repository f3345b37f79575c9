"""The recipes equal the public implementations their docstrings name: float64, 1e-12, every step.

The trajectories in tests/references were recorded by the scripts next to them: record.py (core),
record_family.py (family, one_cycle), record_successors.py (successors), record_schedule_free.py
(schedule_free), record_modifiers.py (modifiers) and record_matrices.py (matrices, with gradients of
their own). Every manifest is read.
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
from adaptive_opt import (
    behind,
    lookahead,
    normalized_weight_decay,
    one_cycle,
    warm_restarts,
)

REFERENCES = pathlib.Path(__file__).parent / "references"
ROWS = {
    path.stem: json.loads(path.read_text())
    for path in sorted(REFERENCES.glob("*.json"))
    if path.with_suffix(".npz").exists()
}
EVERY_ROW = [(name, row) for name, rows in ROWS.items() for row in rows]
TOLERANCE = 1e-12
CONVENTIONS = ("torch", "optax", "keras", "paper")


@pytest.fixture(scope="module")
def recorded():
    arrays = {}
    for name in ROWS:
        with np.load(REFERENCES / f"{name}.npz") as stored:
            arrays[name] = dict(stored)
    return arrays


def multiplier(steps: int) -> jax.Array:
    """The schedule of record.py: a warm-up of 40 steps, then a cosine to zero."""
    t = jnp.arange(steps)
    return jnp.minimum(1.0, (t + 1) / 40) * 0.5 * (1 + jnp.cos(jnp.pi * t / steps))


def optimizer_of(row: dict, steps: int) -> optax.GradientTransformationExtraArgs:
    arguments, recipe = dict(row["arguments"]), row["recipe"]
    if recipe.startswith("one_cycle"):
        total = arguments.pop("total_steps")
        cycle = one_cycle(arguments.pop("max_learning_rate"), total)
        recipe = recipe.removeprefix("one_cycle ")
        arguments |= {"learning_rate": cycle.learning_rate, "b1": cycle.b1}
    if recipe.startswith("keras-adamw"):
        return keras_adamw(recipe.removeprefix("keras-adamw "), arguments)
    if isinstance(arguments.get("learning_rate"), dict):
        schedule = dict(arguments["learning_rate"])
        arguments["learning_rate"] = getattr(adaptive_opt, schedule.pop("schedule"))(**schedule)
    around = {}
    if recipe.startswith("lookahead"):
        around = {name: arguments.pop(name) for name in ("sync_period", "slow_step_size")}
        recipe = recipe.removeprefix("lookahead(").removesuffix(")")
    if row["scheduled"]:
        factors, lr = multiplier(steps), arguments["learning_rate"]
        if arguments.get("decay") == "independent":
            arguments["schedule"] = lambda count: factors[count]
        else:
            arguments["learning_rate"] = lambda count: lr * factors[count]
    optimizer = getattr(adaptive_opt, recipe)(**arguments)
    if "modifiers" in row:
        stages = [getattr(adaptive_opt, name)(**given) for name, given in row["modifiers"]]
        optimizer = behind(optimizer, *stages)
    return lookahead(optimizer, **around) if around else optimizer


def keras_adamw(recipe: str, arguments: dict) -> optax.GradientTransformationExtraArgs:
    """keras-adamw with restarts and both decays."""
    restarts = {name: arguments.pop(name) for name in ("period", "minimum", "maximum", "start")}
    l1, l2 = (
        normalized_weight_decay(arguments.pop(name), restarts["period"]) for name in ("l1", "l2")
    )
    arguments |= {"weight_decay": l2, "l1": l1 or None}
    form = {"convention": "keras"} if recipe == "adamw" else {}
    eta = warm_restarts(**restarts, form="keras-adamw")
    return getattr(adaptive_opt, recipe)(**arguments, **form, decay="independent", schedule=eta)


def trajectory(optimizer, gradients, start, losses=None):
    """The parameters after every step, and every update."""

    def step(carry, given):
        (x, state), (gradient, loss) = carry, given
        update, state = optimizer.update(gradient, state, x, value=loss)
        x = optax.apply_updates(x, update)
        return (x, state), (x, update)

    start = jnp.asarray(start)
    given = jnp.asarray(gradients), None if losses is None else jnp.asarray(losses)
    return jax.lax.scan(step, (start, optimizer.init(start)), given)[1]


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
    made = jax.jit(lambda g, s: trajectory(optimizer, g, s, losses))(steps, start.reshape(shape))
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
