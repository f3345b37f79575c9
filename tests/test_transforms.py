"""Every recipe under vmap and grad, with injected numbers, and lowered for other platforms.

``test_testing.py`` asks scan, loops, members and donation of every recipe.
"""

from __future__ import annotations

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    EVERY_CONVENTION,
    FEWER_CONVENTIONS,
    FEWER_OFTEN,
    RECIPES,
    assert_bit_equal,
    buffers_of,
    checking_leaks,
    gradient_trees,
    normal_tree,
    train,
)

from adaptive_opt import rmsprop, sgd

EACH = pytest.mark.parametrize("recipe", FEWER_OFTEN)


@EACH
def test_vmap_over_learning_rates_equals_one_at_a_time(recipe):
    rates = jnp.array([1e-3, 1e-2, 1e-1])
    gradients = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradient_trees(10))

    def end_of(lr):
        optimizer = RECIPES[recipe](lr)

        def step(carry, gradient):
            updates, state = optimizer.update(gradient, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        params = normal_tree()
        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[0][0]

    together = jax.jit(jax.vmap(end_of))(rates)
    alone = jax.jit(end_of)
    for i, lr in enumerate(rates):
        for a, b in zip(*map(jax.tree.leaves, (together, alone(lr))), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("recipe", FEWER_CONVENTIONS)
def test_a_jitted_update_with_injected_hyperparameters_equals_the_plain_recipe(recipe, x64):
    # Everything that is a number in the signature is traced there, and an array in the eager init.
    make = EVERY_CONVENTION[recipe]
    params, gradients = normal_tree(dtype=np.float64), list(gradient_trees(8, np.float64))
    expected, plain_state, _ = train(make(1e-2), params, gradients)
    actual, state, _ = train(optax.inject_hyperparams(make)(learning_rate=1e-2), params, gradients)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13)
    assert buffers_of(state).keys() == buffers_of(plain_state).keys()


@pytest.mark.parametrize("recipe", [sgd, rmsprop])
def test_a_momentum_that_may_be_injected_has_a_buffer_and_one_that_is_not_given_has_none(recipe):
    x = jnp.ones(2)
    for momentum, keeps in ((None, False), (0.0, False), (0, False), (jnp.float32(0.0), True)):
        state = recipe(0.1, momentum=momentum).init(x)
        assert ("velocity" in buffers_of(state)) == keeps
    injected = optax.inject_hyperparams(recipe)(learning_rate=0.1, momentum=0.0)
    plain = recipe(0.1)
    without = optax.inject_hyperparams(recipe)(learning_rate=0.1)
    updates, state = jax.jit(without.update)(x, without.init(x), x)
    assert buffers_of(state).keys() == buffers_of(plain.init(x)).keys()
    np.testing.assert_allclose(updates, plain.update(x, plain.init(x), x)[0], rtol=1e-6)
    state = injected.init(x)
    updates, state = jax.jit(injected.update)(x, state, x)
    np.testing.assert_allclose(updates, plain.update(x, plain.init(x), x)[0], rtol=1e-6)
    state.hyperparams["momentum"] = jnp.float32(0.5)  # which is what one injects it for
    again, _ = jax.jit(injected.update)(x, state, x)
    assert np.all(again < updates)


def test_grad_through_a_zero_gradient_needs_only_eps_root(x64):
    def moved(g):
        optimizer = RECIPES["adam"](1.0, eps_root=1e-4)
        return optimizer.update(g, optimizer.init(g))[0]

    np.testing.assert_allclose(jax.grad(moved)(0.0), -1 / (1e-2 + 1e-8), rtol=1e-12)


@EACH
def test_donated_buffers_are_reused(recipe):
    optimizer = RECIPES[recipe](1e-2)

    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = normal_tree()
    state = optimizer.init(params)
    expected = jax.jit(step)(params, state, normal_tree(1))
    donated = jax.jit(step, donate_argnums=(0, 1))(params, state, normal_tree(1))
    assert_bit_equal(donated, expected)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


@pytest.mark.parametrize("recipe", FEWER_OFTEN)
def test_the_step_lowers_for_cpu_cuda_and_tpu(recipe):
    optimizer = RECIPES[recipe](optax.cosine_decay_schedule(1e-2, 100))
    params = {"w": jnp.ones((8, 128), jnp.bfloat16), "b": jnp.ones(128)}
    state = optimizer.init(params)
    exported = jax.export.export(jax.jit(optimizer.update), platforms=("cpu", "cuda", "tpu"))(
        params, state, params
    )
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert_bit_equal(
        exported.call(params, state, params), jax.jit(optimizer.update)(params, state, params)
    )


@pytest.mark.broad
def test_a_leak_would_be_found():
    kept = []
    with pytest.raises(Exception, match="Leaked"), checking_leaks():
        jax.eval_shape(lambda lr: kept.append(lr) or lr, 1e-3)


def test_nothing_leaks_out_of_a_trace():
    x = jnp.ones(2)
    with checking_leaks():
        for recipe in RECIPES.values():
            jax.eval_shape(lambda lr, r=recipe: r(lr).update(x, r(lr).init(x), x), 1e-3)
