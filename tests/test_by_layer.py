"""A step by layer holds one layer's gradient, and its parameters are those of the whole step."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal

from adaptive_opt import (
    Layered,
    adamw,
    clip_by_previous_norm,
    lamb,
    low_memory,
    master_weights,
    memory_plan,
    step_by_layer,
    train_step,
)

LAYERS, WIDTH, ROWS = 24, 192, 8


def first(p, x, y):
    return x @ p


def layer(p, x):
    normed = x * jax.lax.rsqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
    return x + jnp.tanh(normed @ p["kernel"] + p["bias"])


def last(p, h, x, y):
    return jnp.mean((h @ p - y) ** 2)


def start(layers, width, dtype=jnp.float32):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape) / width**0.5, dtype)

    within = [
        {"kernel": normal(width, width), "bias": jnp.zeros(width, dtype)} for _ in range(layers)
    ]
    return Layered(normal(4, width), within, normal(width))


def batches(count):
    rng = np.random.default_rng(1)
    return [(jnp.float32(rng.standard_normal((ROWS, 4))), jnp.ones(ROWS)) for _ in range(count)]


def whole(params, x, y):
    h = first(params.first, x, y)
    for p in params.layers:
        h = layer(p, h)
    return last(params.last, h, x, y)


def scanned(params, x, y):
    h, _ = jax.lax.scan(lambda h, p: (layer(p, h), None), first(params.first, x, y), params.layers)
    return last(params.last, h, x, y)


def stacked(params):
    return params._replace(layers=jax.tree.map(lambda *x: jnp.stack(x), *params.layers))


def by_layer(optimizer):
    return step_by_layer(first, layer, last, optimizer)


OPTIMIZERS = {
    "adamw": adamw(1e-2),
    "lamb": lamb(1e-2),
    "adamw, bfloat16": master_weights(adamw(1e-2)),
    "8-bit": low_memory(adamw(1e-2), "8-bit", min_size=1),
}


def gone_ten_steps(step, params, state):
    for batch in batches(10):
        params, state, loss = step(params, state, *batch)
    return params, loss


def test_after_ten_steps_parameters_are_those_of_the_step_of_scanned_layers_bit_for_bit():
    """Where all parameters are in the layers; XLA rounds small leaves beside them otherwise."""
    optimizer = OPTIMIZERS["adamw"]

    def residual(p, h):
        return h + jnp.tanh(h @ p["kernel"] + p["bias"])

    def ordinary(layers, x, y):
        h, _ = jax.lax.scan(lambda h, p: (residual(p, h), None), jnp.tile(x, 16), layers)
        return jnp.mean(h**2)

    step = step_by_layer(
        lambda p, x, y: jnp.tile(x, 16), residual, lambda p, h, x, y: jnp.mean(h**2), optimizer
    )
    layers = start(6, 64).layers
    theirs = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    ours = Layered((), jax.tree.map(jnp.copy, layers), ())
    ours, loss = gone_ten_steps(step, ours, step.init(ours))
    theirs, expected = gone_ten_steps(
        train_step(ordinary, optimizer), theirs, optimizer.init(theirs)
    )
    assert loss == expected
    assert_bit_equal(jax.tree.map(lambda *x: jnp.stack(x), *ours.layers), theirs)
    assert jnp.abs(ours.layers[0]["kernel"] - layers[0]["kernel"]).max() > 0.01


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_after_ten_steps_parameters_are_those_of_the_whole_step_but_for_rounding(name):
    optimizer, params = OPTIMIZERS[name], start(4, 32)
    step, ours = by_layer(optimizer), jax.tree.map(jnp.copy, params)
    ours, loss = gone_ten_steps(step, ours, step.init(ours))
    theirs, expected = gone_ten_steps(train_step(whole, optimizer), params, optimizer.init(params))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), ours, theirs)


@pytest.mark.broad
@pytest.mark.parametrize("name", ["adamw, bfloat16", "8-bit"])
def test_wrappers_go_inside(name):
    params = start(3, 32, jnp.bfloat16 if "bfloat16" in name else jnp.float32)
    step = by_layer(OPTIMIZERS[name])
    state, losses = step.init(params), []
    batch = batches(1)[0]
    for _ in range(20):
        params, state, loss = step(params, state, *batch)
        losses.append(float(loss))
    plain = start(3, 32)
    other, expected = by_layer(OPTIMIZERS["adamw"]), []
    of_plain = other.init(plain)
    for _ in range(20):
        plain, of_plain, loss = other(plain, of_plain, *batch)
        expected.append(float(loss))
    np.testing.assert_allclose(losses, expected, atol=0.03 * expected[0])
    assert expected[-1] < 0.2 * expected[0]


def test_one_program_serves_all_layers_and_its_plan_holds_one_gradient():
    optimizer = OPTIMIZERS["adamw"]
    step = by_layer(optimizer)
    params = jax.eval_shape(lambda: start(LAYERS, WIDTH))
    x, y = jax.eval_shape(lambda: batches(1)[0])
    plan = memory_plan(step, params, jax.eval_shape(step.init, params), x, y)
    assert plan.count == sum(p.size for p in jax.tree.leaves(params))
    assert plan.per_parameter("params") == 4
    assert plan.per_parameter("state") == pytest.approx(8, rel=1e-3)
    # What goes into the layers is counted, and is all there is besides.
    between = (LAYERS + 1) * ROWS * WIDTH * 4
    assert between < plan.temporaries <= 0.3 * plan.params
    under_scan = jax.eval_shape(lambda: stacked(start(LAYERS, WIDTH)))
    ordinary = memory_plan(
        train_step(scanned, optimizer), under_scan, jax.eval_shape(optimizer.init, under_scan), x, y
    )
    assert ordinary.temporaries >= 1.0 * ordinary.params


def test_programs_are_compiled_once_and_buffers_are_donated():
    step, params = by_layer(OPTIMIZERS["adamw"]), start(5, 16)
    state = step.init(params)
    kernels = [p["kernel"] for p in params.layers]
    for batch in batches(3):
        params, state, _ = step(params, state, *batch)
    assert step._layer._cache_size() == step._back._cache_size() == 1
    assert all(x.is_deleted() for x in kernels)


def test_what_needs_all_gradients_is_refused():
    for clip in (optax.clip_by_global_norm(1.0), clip_by_previous_norm(1.0)):
        step = by_layer(optax.chain(clip, adamw(1e-2)))
        with pytest.raises(ValueError, match="before it knows the gradients of those below"):
            step.init(start(2, 8))
    with pytest.raises(TypeError, match="step_by_layer takes an optimizer"):
        by_layer(None)
