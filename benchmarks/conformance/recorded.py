"""The trajectories recorded in tests/references, and the optimizer of this library of each row.

tests/references/record.py and its siblings say how they were made. A row of a manifest names a
public implementation, a recipe and its arguments; its arrays are the gradients, the start, each
update, and the parameters after every so many steps.
"""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_opt
from adaptive_opt import (
    behind,
    lookahead,
    normalized_weight_decay,
    one_cycle,
    warm_restarts,
)

REFERENCES = pathlib.Path(__file__).parents[2] / "tests" / "references"
ROWS = {
    path.stem: json.loads(path.read_text())
    for path in sorted(REFERENCES.glob("*.json"))
    if path.with_suffix(".npz").exists()
}


@functools.cache
def arrays_of(table: str) -> dict[str, np.ndarray]:
    with np.load(REFERENCES / f"{table}.npz") as stored:
        return dict(stored)


def multiplier(steps: int) -> jax.Array:
    """The schedule of record.py: a warm-up of 40 steps, then a cosine to zero."""
    t = jnp.arange(steps)
    return jnp.minimum(1.0, (t + 1) / 40) * 0.5 * (1 + jnp.cos(jnp.pi * t / steps))


def optimizer_of(row: dict[str, Any], steps: int) -> optax.GradientTransformationExtraArgs:
    """The recipe of a row with its arguments, its schedule and what is around it."""
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


def keras_adamw(recipe: str, arguments: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
    """keras-adamw with restarts and both decays."""
    restarts = {name: arguments.pop(name) for name in ("period", "minimum", "maximum", "start")}
    l1, l2 = (
        normalized_weight_decay(arguments.pop(name), restarts["period"]) for name in ("l1", "l2")
    )
    arguments |= {"weight_decay": l2, "l1": l1 or None}
    form = {"convention": "keras"} if recipe == "adamw" else {}
    eta = warm_restarts(**restarts, form="keras-adamw")
    return getattr(adaptive_opt, recipe)(**arguments, **form, decay="independent", schedule=eta)


def trajectory(
    optimizer: optax.GradientTransformationExtraArgs,
    gradients: np.ndarray,
    start: np.ndarray,
    losses: np.ndarray | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The parameters after every step, and every update."""

    def step(carry, given):
        (x, state), (gradient, loss) = carry, given
        update, state = optimizer.update(gradient, state, x, value=loss)
        x = optax.apply_updates(x, update)
        return (x, state), (x, update)

    start = jnp.asarray(start)
    given = jnp.asarray(gradients), None if losses is None else jnp.asarray(losses)
    return jax.lax.scan(step, (start, optimizer.init(start)), given)[1]
