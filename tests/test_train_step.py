"""The step of `train_step` works in place."""

from __future__ import annotations

import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import RECIPES, assert_bit_equal, normal_tree
from traffic import without_the_option

import adaptive_opt
from adaptive_opt import adamod, adamw, train_step


def quadratic(params, target):
    distances = jax.tree.map(lambda p: jnp.sum(jnp.abs(p - target) ** 2), params)
    return sum(jax.tree.leaves(distances))


def aliases(compiled) -> dict[int, int]:
    """Which argument's memory each result is written to."""
    header = compiled.as_text().partition("\n")[0]
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, \w+-alias\)", header)
    return {int(result): int(argument) for result, argument in pairs}


def lowered(step, optimizer, params, *args):
    return step.lower(params, jax.eval_shape(optimizer.init, params), *args).compile()


OFTEN = ("adam", "diffmod", "nadamw", "rmsprop", "ranger")
SELDOM = sorted(set(RECIPES) - set(OFTEN))


@pytest.mark.compiles
@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.slow) for n in SELDOM)]
)
def test_every_array_is_written_where_it_was(name):
    optimizer, params = RECIPES[name](1e-3), normal_tree()
    compiled = lowered(train_step(quadratic, optimizer), optimizer, params, 1.0)
    arrays = jax.tree.leaves((params, jax.eval_shape(optimizer.init, params)))
    assert aliases(compiled) == {i: i for i in range(len(arrays))}
    assert compiled.memory_analysis().alias_size_in_bytes == sum(
        a.size * a.dtype.itemsize for a in arrays
    )


@pytest.mark.compiles
@without_the_option
def test_the_other_order_is_what_it_saves_from():
    optimizer, params = adamw(1e-3), jnp.ones(1 << 14)

    def state_first(params, state, slope):
        loss, gradient = jax.value_and_grad(jnp.vdot)(params, slope)
        updates, state = optimizer.update(gradient, state, params)
        return state, optax.apply_updates(params, updates), loss

    wrong = lowered(jax.jit(state_first, donate_argnums=(0, 1)), optimizer, params, params)
    right = lowered(train_step(jnp.vdot, optimizer), optimizer, params, params)
    moved = [c.cost_analysis()["bytes accessed"] / params.size for c in (right, wrong)]
    assert moved[1] >= moved[0] + 8 * 3


def test_auxiliary_results_random_keys_and_keywords_pass_through():
    def loss(params, seen, key, *, target):
        noise = jax.random.normal(key, params["scale"].shape)
        return quadratic(params, target + noise), seen + 1

    optimizer, params, key = adamod(1e-2), normal_tree(), jax.random.key(1)
    (value, _), gradient = jax.value_and_grad(loss, has_aux=True)(params, 0, key, target=2.0)
    updates, state = optimizer.update(gradient, optimizer.init(params), params)
    expected = optax.apply_updates(params, updates), state, value
    step = train_step(loss, optimizer, has_aux=True)
    *results, seen = step(params, optimizer.init(params), 7, key, target=2.0)
    assert seen == 8
    assert results[2].shape == ()
    chex.assert_trees_all_close(tuple(results), expected, rtol=1e-5)


def test_line_searches_and_plateaus_get_what_they_ask_for():
    for optimizer in (
        optax.chain(adamw(1e-1), optax.contrib.reduce_on_plateau(patience=1)),
        optax.lbfgs(),
    ):
        params = jnp.array([3.0, -2.0])
        step, state = train_step(quadratic, optimizer), optimizer.init(params)
        state = jax.tree.map(jnp.copy, state)  # that of lbfgs holds an array twice
        first = None
        for _ in range(3):
            params, state, loss = step(params, state, 1.0)
            first = loss if first is None else first
        assert loss < first


def test_the_old_parameters_are_gone_and_steps_go_on():
    optimizer, params = adamw(1e-3), normal_tree()
    expected = jax.tree.map(jnp.copy, params)
    step, state = train_step(quadratic, optimizer), optimizer.init(params)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # "Some donated buffers were not usable"
        new, state, _ = step(params, state, 1.0)
        new, state, _ = step(new, state, 1.0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    state = optimizer.init(expected)
    for _ in range(2):
        expected, state, _ = jax.jit(step)(expected, state, 1.0)
    assert_bit_equal(new, expected)


def test_arguments_in_the_wrong_order_are_named():
    with pytest.raises(TypeError, match="takes an optax optimizer after the loss function"):
        adaptive_opt.train_step(quadratic, quadratic)
    with pytest.raises(TypeError, match="takes a loss function"):
        adaptive_opt.train_step(adamw(1e-3), quadratic)


def test_complex_parameters_go_downhill():
    def distance(z):
        return jnp.abs(z - (1 + 2j)) ** 2

    optimizer, z = adaptive_opt.sgd(0.1), jnp.zeros((), complex)
    step, state = train_step(distance, optimizer), optimizer.init(z)
    for _ in range(3):
        z, state, loss = step(z, state)
    np.testing.assert_allclose(z, (1 - 0.8**3) * (1 + 2j), rtol=1e-6)  # 2 lr of the way each
    assert loss == pytest.approx(5 * 0.8**4, rel=1e-5)
