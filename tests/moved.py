"""Runs that move from one optimizer to another, shared by tests."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt import Group, ParameterGroups, convert_state

LR = 1e-2
PARAMS = {"b": np.array([0.5, -1.0]), "w": np.array([[0.2, -0.3, 0.7], [1.0, 0.1, -2.0]])}


def params():
    return jax.tree.map(jnp.asarray, PARAMS)


def gradients(steps, seed=0):
    rng = np.random.default_rng(seed)
    draw = [jax.tree.map(lambda x: rng.standard_normal(x.shape), PARAMS) for _ in range(steps)]
    return jax.tree.map(lambda *g: jnp.stack(g), *draw)


def run(optimizer, x, state, many, repeats=1):
    """Parameters and state after all gradients, each given several times, and the parameters
    after each."""

    def step(carry, gradient):
        x, state = carry
        for _ in range(repeats):
            updates, state = optimizer.update(gradient, state, x)
            x = optax.apply_updates(x, updates)
        return (x, state), x

    one = jax.tree.map(lambda g: g[0], many)
    _, new = jax.eval_shape(optimizer.update, one, state, x)
    state = jax.tree.unflatten(jax.tree.structure(new), jax.tree.leaves(state))  # of named_chain
    return jax.jit(lambda *start: jax.lax.scan(step, start, many))(x, state)


def after(optimizer, many, repeats=1):
    x = params()
    return run(optimizer, x, optimizer.init(x), many, repeats)[0]


def assert_close(actual, expected, tolerance=1e-12):
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=tolerance, atol=tolerance)


def goes_on(source, target, steps=5, times=(1, 1), exact=1e-12, **how):
    """Asserts that the target goes on where the source stopped."""
    x, state = after(source, gradients(steps), times[0])
    moved = convert_state(state, source, target, x, **how)
    _, expected = run(source, x, state, gradients(20, 1), times[0])
    _, actual = run(target, x, moved, gradients(20, 1), times[1])
    assert_close(actual, expected, exact)


def in_groups(make):
    return ParameterGroups([Group("b", may_be_empty=True)], default=Group()).optimizer(
        make, learning_rate=LR
    )


def injected(make, learning_rate):
    return optax.inject_hyperparams(lambda learning_rate: make(learning_rate))(learning_rate)


def ints(**counts):
    return {name: int(value) for name, value in counts.items()}
