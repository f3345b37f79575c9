"""Derivatives through three updates: finite at exactly zero gradients, right everywhere else."""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import EVERY_CONVENTION, FEWER_CONVENTIONS

import adaptive_opt
from adaptive_opt import (
    adam,
    adaptive,
    clip_update_rms,
    hyperball,
    low_memory,
    orthogonalize,
    skip_nonfinite,
)

TARGET = jnp.array([1.0, -2.0, 0.5, 3.0])
UNUSED = 2
"""The weight whose gradient is exactly 0."""


def loss_after_three_steps(make, learning_rate, params, inputs):
    """Of parameters after three updates, whose gradients are those of a quadratic loss, and more.

    One weight has never a gradient.
    """
    optimizer = make(learning_rate)
    seen = jnp.ones(4).at[UNUSED].set(0)
    state = optimizer.init(params)
    for given in inputs:
        gradient = seen * (0.7 * (params - TARGET) + given)
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jnp.sum(jnp.sin(params))


def points(dtype):
    rng = np.random.default_rng(3)
    params = jnp.asarray(rng.normal(size=4), dtype)
    return jnp.asarray(0.03, dtype), params, jnp.asarray(rng.normal(size=(3, 4)), dtype)


def maker(name):
    takes = inspect.signature(adaptive_opt.RECIPES[name.split()[0]]).parameters
    return functools.partial(EVERY_CONVENTION[name], **({"b2": 0.9} if "b2" in takes else {}))


@pytest.mark.parametrize("name", FEWER_CONVENTIONS)
def test_derivatives_through_three_updates_are_those_of_finite_differences(name, x64):
    """In a random direction of learning rate, parameters and gradients, all at once and each."""
    loss = jax.jit(functools.partial(loss_after_three_steps, maker(name)))
    at = points(np.float64)
    found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*at)
    assert all(np.isfinite(x).all() for x in found)
    rng = np.random.default_rng(0)
    for chosen in ((0,), (1,), (2,), (0, 1, 2)):
        ways = [rng.normal(size=x.shape) * (i in chosen) for i, x in enumerate(at)]
        ways[0] = 0.01 * ways[0]
        expected = difference(loss, at, ways)
        along = sum(np.vdot(x, w) for x, w in zip(found, ways, strict=True))
        assert abs(along - expected) <= 1e-6 * abs(expected) + 1e-9


def difference(f, at, ways, h=2e-4):
    """The central difference of sixth order."""

    def beside(k):
        return float(f(*(x + k * h * way for x, way in zip(at, ways, strict=True))))

    weights = {1: 45 / 60, 2: -9 / 60, 3: 1 / 60}
    return sum(w * (beside(k) - beside(-k)) for k, w in weights.items()) / h


@pytest.mark.parametrize("name", FEWER_CONVENTIONS)
def test_derivatives_are_finite_where_all_gradients_are_zero(name):
    """And the updates are zero."""
    optimizer = maker(name)(0.03, **without_decay(name))

    def moved(given):
        params, state = jnp.ones(3), optimizer.init(jnp.ones(3))
        for gradient in given:
            updates, state = optimizer.update(gradient, state, params)
            params = optax.apply_updates(params, updates)
        return params

    slopes = jax.jit(jax.jacobian(moved))(jnp.zeros((3, 3)))
    assert np.isfinite(slopes).all()
    np.testing.assert_array_equal(jax.jit(moved)(jnp.zeros((3, 3))), jnp.ones(3))


def without_decay(name):
    takes = inspect.signature(adaptive_opt.RECIPES[name.split()[0]]).parameters
    return {"weight_decay": 0.0} if "weight_decay" in takes else {}


LENGTHS = {
    "orthogonalize": orthogonalize(),
    "clip_update_rms": clip_update_rms(1.0),
    "hyperball": hyperball(0.1, scope="matrix"),
}


@pytest.mark.parametrize("name", LENGTHS)
def test_derivatives_are_finite_where_a_whole_matrix_has_no_gradient(name):
    x = jnp.ones((2, 3))
    rule = adaptive(LENGTHS[name])

    def moved(gradient):
        return rule.update(gradient, rule.init(x), x)[0].sum()

    assert np.isfinite(jax.grad(moved)(jnp.zeros((2, 3)))).all()


def test_the_derivative_of_the_root_of_zero_is_zero_and_elsewhere_its_own():
    x = jnp.array([0.0, 0.25, 4.0])
    np.testing.assert_array_equal(
        jax.vmap(jax.grad(adaptive_opt.core.finite.root))(x), [0, 1, 0.25]
    )
    np.testing.assert_array_equal(adaptive_opt.core.finite.root(x), jnp.sqrt(x))
    curved = jax.vmap(jax.grad(jax.grad(adaptive_opt.core.finite.root)))(x)
    np.testing.assert_allclose(curved, [0, -2, -1 / 32], rtol=1e-6)


@pytest.mark.parametrize("storage", ["8-bit", pytest.param("bfloat16", marks=pytest.mark.broad)])
def test_low_memory_refuses_a_derivative_through_what_it_remembers(storage):
    optimizer = low_memory(adam(0.1), storage, min_size=1)

    def loss(params):
        state = optimizer.init(params)
        for _ in range(2):
            updates, state = optimizer.update(params, state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params**2)

    params = jnp.arange(1.0, 4.0)
    for derivative in (jax.grad(loss), jax.jit(jax.grad(loss))):
        with pytest.raises(
            TypeError, match=r"low_memory .* fewer bits, through which no derivative"
        ):
            derivative(params)
    assert np.isfinite(jax.jit(loss)(params))


def test_a_guard_lets_derivatives_through(x64):
    at = points(np.float64)
    plain, guarded = (
        jax.grad(functools.partial(loss_after_three_steps, make), argnums=(0, 1, 2))(*at)
        for make in (adam, lambda lr: skip_nonfinite(adam(lr)))
    )
    for a, b in zip(plain, guarded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)
