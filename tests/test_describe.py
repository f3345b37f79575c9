"""describe tells, as data and in print, what an optimizer is made of."""

from __future__ import annotations

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import ADAMS, RECIPES, REPRESENTATIVE

from adaptive_opt import (
    adam,
    adamod,
    adamw,
    adaptive,
    amsgrad,
    amsgrad_max,
    close_step,
    describe,
    first_moment,
    open_step,
    per_weight_rate,
    recipe,
    scale_by_adam,
    second_moment,
)


def names(optimizer):
    return [part.name for part in describe(optimizer).stages()]


def test_the_conventions_of_amsgrad_are_orders_of_stages():
    moments = ["first_moment", "second_moment"]
    lists = {
        "torch": [*moments, "amsgrad_max", "debias", "per_weight_rate"],
        "optax": [*moments, "debias", "amsgrad_max", "per_weight_rate"],
        "keras": [*moments, "amsgrad_max", "per_weight_rate", "debias_rate"],
        "paper": [*moments, "amsgrad_max", "per_weight_rate"],
    }
    for convention, expected in lists.items():
        optimizer = amsgrad(1e-3, convention=convention)
        assert names(optimizer) == [*expected, "scale_by_learning_rate"]


def test_settings_are_data():
    description = describe(adamod(1e-3, b3=0.99, weight_decay=0.1))
    assert description.name == "adamod"
    assert description.settings["b3"] == 0.99
    bracket, decay, sign = description.parts
    assert [part.name for part in (bracket, decay, sign)] == [
        "adaptive",
        "decoupled_weight_decay",
        "scale",
    ]
    assert bracket.parts[-1].settings["b3"] == 0.99
    assert decay.settings == {"weight_decay": 0.1, "mask": None, "learning_rate": 1e-3}


def test_a_buffer_is_named_only_where_it_was_chosen():
    bracket = describe(adaptive(first_moment(0.9), first_moment(0.5, name="slow")))
    assert [dict(part.settings) for part in bracket.parts] == [
        {"b1": 0.9},
        {"b1": 0.5, "name": "slow"},
    ]


def test_every_recipe_prints_its_own_name_and_its_stages():
    for name, make in RECIPES.items():
        text = str(describe(make(1e-3)))
        assert text.startswith(f"{name.split()[0]}(learning_rate=0.001")
        if name in ADAMS and name != "adan":  # whose b2 is of the changes
            b2 = inspect.signature(make).parameters["b2"].default
            assert f"moment(b2={b2}" in text
        assert "object at" not in text
        assert len(describe(make(1e-3)).stages()) >= 3 or name in ("sgd",)


def test_every_kind_of_state_is_represented():
    """By the types of its nodes, and by dtypes and shapes, like the parameters or not."""
    params = {shape: jax.ShapeDtypeStruct(shape, np.float32) for shape in ((3, 2), (5,))}

    def kind(name):
        state = jax.eval_shape(RECIPES[name](1e-2).init, params)
        nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields"))
        leaves = {
            (leaf.shape if leaf.shape == () else leaf.shape in params, leaf.dtype.kind)
            for leaf in jax.tree.leaves(state)
        }
        return frozenset(leaves), frozenset(map(type, nodes))

    assert {kind(name) for name in RECIPES} == {kind(name) for name in REPRESENTATIVE}


def test_schedules_arrays_and_tracers_print_readably():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    assert "learning_rate=polynomial_schedule" in str(describe(adamw(schedule)))
    assert "learning_rate=0.5" in str(describe(adamw(jnp.float32(0.5))))
    seen = []

    @jax.jit
    def trace(lr):
        seen.append(str(describe(adamw(lr))))
        return lr

    trace(1e-3)
    assert "learning_rate=traced float32" in seen[0]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.chain(optax.chain(tx)),
        lambda tx: optax.named_chain(("clip", optax.clip(1.0)), ("opt", tx)),
        lambda tx: optax.masked(tx, True),
        lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, "a"),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.flatten(tx),
        lambda tx: optax.MultiSteps(tx, 4).gradient_transformation(),
        lambda tx: optax.inject_hyperparams(amsgrad)(1e-3),
        lambda tx: optax.GradientTransformation(tx.init, jax.jit(tx.update)),
    ],
)
def test_recipes_are_found_inside_what_wraps_them(wrap):
    assert "amsgrad_max" in names(wrap(amsgrad(1e-3)))


def test_a_flat_chain_is_described_like_a_bracket():
    stages = [second_moment(0.9), amsgrad_max(), per_weight_rate(1e-8)]
    flat = optax.chain(open_step(), *stages, close_step())
    inner = describe(adaptive(*stages)).parts
    assert describe(flat).parts[1:-1] == inner
    assert describe(scale_by_adam()).parts[0].name == "first_moment"


def test_a_recipe_made_of_a_bracket_or_of_a_recipe_keeps_it_as_a_part():
    @recipe
    def bare(b1):
        return adaptive(first_moment(b1))

    @recipe
    def faster(learning_rate):
        return adamw(2 * learning_rate)

    assert str(describe(bare(0.9))) == "bare(b1=0.9)\n  adaptive\n    first_moment(b1=0.9)"
    assert describe(faster(1.0)).parts[0].name == "adamw"


def test_a_description_is_a_copy():
    optimizer = adamw(1e-3)
    describe(optimizer).settings["b1"] = 77
    assert describe(optimizer).settings["b1"] == 0.9


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="describe takes an optimizer"):
        describe(RECIPES["adam"])


def test_a_chain_with_an_init_of_its_own_is_still_described():
    chain = optax.chain(optax.clip(1.0), adam(1e-3))
    changed = optax.GradientTransformationExtraArgs(lambda params: (), chain.update)
    assert [part.name for part in describe(changed).parts] == ["clip", "adam"]
