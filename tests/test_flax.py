"""In Flax training code: linen's TrainState, nnx.Optimizer, serialization."""

from __future__ import annotations

import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import FEWER_OFTEN, RECIPES, assert_bit_equal
from flax import nnx
from flax.training.train_state import TrainState

EACH = pytest.mark.parametrize("recipe", FEWER_OFTEN)
X = np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)
Y = np.sin(X).sum(axis=1, keepdims=True)


def linen_state(recipe):
    model = flax.linen.Dense(1)
    return TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(0), X),
        tx=optax.chain(optax.clip_by_global_norm(1.0), RECIPES[recipe](1e-2)),
    )


@jax.jit
def linen_step(state):
    def loss(params):
        return jnp.mean((state.apply_fn(params, X) - Y) ** 2)

    value, gradients = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=gradients), value


@EACH
def test_a_linen_train_state_and_an_nnx_optimizer_take_the_same_steps(recipe):
    state = linen_state(recipe)
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    model.kernel[...] = state.params["params"]["kernel"]
    tx = optax.chain(optax.clip_by_global_norm(1.0), RECIPES[recipe](1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def nnx_step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - Y) ** 2)

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    for _ in range(10):
        state, expected = linen_step(state)
        value = nnx_step(model, optimizer)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
    kernel = state.params["params"]["kernel"]
    np.testing.assert_allclose(model.kernel[...], kernel, rtol=1e-4, atol=1e-6)


@EACH
def test_a_train_state_survives_flax_serialization(recipe):
    state = linen_state(recipe)
    for _ in range(3):
        state, _ = linen_step(state)
    blob = flax.serialization.to_bytes(state)
    restored = flax.serialization.from_bytes(linen_state(recipe), blob)
    assert_bit_equal(restored.opt_state, jax.tree.map(np.asarray, state.opt_state))
    uninterrupted, _ = linen_step(state)
    resumed, _ = linen_step(restored)
    assert_bit_equal(resumed.params, uninterrupted.params)
    assert_bit_equal(resumed.opt_state, uninterrupted.opt_state)


def test_checkpoint_paths_read():
    state = flax.serialization.to_state_dict(linen_state("adamod").opt_state)
    assert set(state["1"]["0"]["buffers"]) == {"mu", "nu", "rate_ema"}
