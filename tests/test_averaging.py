"""Parameters to evaluate with: the right average, out of any nest of wrappers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, train

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adamw,
    config,
    evaluation_params,
    from_bytes,
    lookahead,
    low_memory,
    make,
    parameter_ema,
    ranger,
    sgd,
    skip_nonfinite,
    to_bytes,
)


def trajectory(params, updates):
    for _, update in updates:
        params = optax.apply_updates(params, update)
        yield params


@pytest.mark.parametrize("decay", [0.9, optax.linear_schedule(0.5, 0.9, 5)], ids=["0.9", "rising"])
def test_the_average_is_that_of_the_parameters_after_each_step(decay, x64):
    params, gradients = normal_tree(dtype=np.float64), list(gradient_trees(7, np.float64))
    last, state, updates = train(parameter_ema(adamw(1e-2), decay), params, gradients)
    plain, _, _ = train(adamw(1e-2), params, gradients)
    assert_bit_equal(last, plain)
    total, weights = jax.tree.map(jnp.zeros_like, params), 0.0
    for t, x in enumerate(trajectory(params, updates)):
        b = decay(t) if callable(decay) else decay
        total = jax.tree.map(lambda e, p, b=b: b * e + (1 - b) * p, total, x)
        weights = b * weights + (1 - b)
    found = evaluation_params(state, last)
    for a, e in zip(*map(jax.tree.leaves, (found, total)), strict=True):
        np.testing.assert_allclose(a, e / weights, rtol=3e-7)  # the weights are float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_after_one_step_it_is_the_parameter_in_its_dtype(dtype):
    params, gradients = normal_tree(dtype=dtype), list(gradient_trees(1, dtype))
    optimizer = parameter_ema(adam(1e-2), 0.999)
    before = evaluation_params(optimizer.init(params), params)
    last, state, _ = train(optimizer, params, gradients)
    assert_bit_equal(before, params)
    for e, found, x in zip(
        *map(jax.tree.leaves, (state.ema, evaluation_params(state, last), last)), strict=True
    ):
        assert e.dtype == jnp.float32
        assert found.dtype == x.dtype
        np.testing.assert_allclose(*(np.asarray(a, np.float64) for a in (found, x)), rtol=4e-3)


def test_a_small_average_in_16_bits_does_not_stand_still():
    """1,000 steps of one 16-bit parameter: the average follows, as its float32 sum says."""
    optimizer = parameter_ema(sgd(1.0), 0.99)
    x = jnp.ones(3, jnp.bfloat16)

    def step(carry, _):
        x, state = carry
        updates, state = optimizer.update(jnp.full_like(x, -0.0078125), state, x)
        return (optax.apply_updates(x, updates), state), x

    (x, state), seen = jax.lax.scan(step, (x, optimizer.init(x)), None, 100)
    weights = 0.99 ** np.arange(99, -1, -1)
    after = np.concatenate([np.asarray(seen, np.float64)[1:], np.asarray(x, np.float64)[None]])
    expected = weights @ after / weights.sum()
    np.testing.assert_allclose(state.ema / state.weight, expected, rtol=1e-5)


NESTS = {
    "chain": lambda inner: optax.chain(optax.clip_by_global_norm(1.0), inner),
    "skip": skip_nonfinite,
    "low_memory": low_memory,
    "multi": lambda inner: optax.MultiSteps(inner, 1).gradient_transformation(),
    "inject": lambda inner: optax.inject_hyperparams(lambda lr: inner)(1.0),
    "named": lambda inner: optax.named_chain(("average", inner)),
}


@pytest.mark.parametrize("nest", NESTS)
def test_it_is_found_in_any_wrapper(nest):
    params, gradients = normal_tree(), list(gradient_trees(3))
    last, state, _ = train(NESTS[nest](lookahead(sgd(1e-2), 2)), params, gradients)
    _, bare, _ = train(lookahead(sgd(1e-2), 2), params, list(gradients))
    found = evaluation_params(state, last)
    if nest in ("chain", "low_memory"):  # clipped; the slow weights are rounded
        pairs = zip(*map(jax.tree.leaves, (found, last)), strict=True)
        assert any(not np.array_equal(a, b) for a, b in pairs)
    else:
        for a, b in zip(*map(jax.tree.leaves, (found, bare.slow)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)


def test_each_group_has_its_own_and_frozen_parameters_stay():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2), "d": jnp.ones(2)}
    optimizer = optax.partition(
        {
            "slow": lookahead(sgd(1.0), 2),
            "average": parameter_ema(sgd(1.0), 0.5),
            "frozen": optax.set_to_zero(),
            "free": optax.contrib.schedule_free_sgd(1.0, b1=0.5),
        },
        {"a": "slow", "b": "average", "c": "frozen", "d": "free"},
    )
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    found = evaluation_params(state, params)
    assert found["a"].tolist() == [0.0, 0.0]  # synchronised after two steps, at 1 - 2 / 2
    assert params["a"].tolist() == [-1.0, -1.0]
    np.testing.assert_allclose(found["b"], (1 * 0 + 2 * -1 + 4 * -2) / 7, rtol=1e-6)
    assert found["c"].tolist() == [1.0, 1.0]
    alone = optax.contrib.schedule_free_sgd(1.0, b1=0.5)
    x, own = jnp.ones(2), alone.init(jnp.ones(2))
    for _ in range(3):
        u, own = alone.update(jnp.ones(2), own, x)
        x = optax.apply_updates(x, u)
    np.testing.assert_allclose(
        found["d"], optax.contrib.schedule_free_eval_params(own, x), rtol=1e-6
    )


def test_for_any_other_optimizer_it_is_the_parameters():
    params = normal_tree() | {"none": None}
    groups = ParameterGroups([Group("bias", freeze=True)], default=Group())
    for optimizer in (adam(1e-3), optax.lion(1e-3), groups.optimizer(adamw, learning_rate=1e-3)):
        assert_bit_equal(evaluation_params(optimizer.init(normal_tree()), params), params)


def test_the_outer_average_counts_and_two_side_by_side_are_refused():
    params, gradients = normal_tree(), list(gradient_trees(2))
    last, state, _ = train(parameter_ema(ranger(1e-2), 0.5), params, gradients)
    found, slow = evaluation_params(state, last), evaluation_params(state.inner_state, last)
    assert not np.array_equal(found["scale"], slow["scale"])
    both = optax.chain(lookahead(sgd(1.0)), parameter_ema(optax.identity()))
    with pytest.raises(ValueError, match=r"two parts of the optimizer average the parameter at"):
        evaluation_params(both.init(params), params)


def test_it_is_saved_described_and_made_again():
    params, gradients = normal_tree(), list(gradient_trees(4))
    optimizer = parameter_ema(adamw(1e-2), 0.9)
    assert config(make(config(optimizer))) == config(optimizer)
    params, state, _ = train(optimizer, params, gradients[:2])
    again = from_bytes(optimizer, optimizer.init(params), to_bytes(optimizer, state))
    one, other = (train(optimizer, params, gradients[2:], s) for s in (state, again))
    assert_bit_equal(one[:2], other[:2])


def test_it_needs_parameters_and_a_decay():
    optimizer = parameter_ema(adam(1e-3))
    with pytest.raises(ValueError, match=r"parameter_ema needs the parameters"):
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))
    with pytest.raises(ValueError, match="decay"):
        parameter_ema(adam(1e-3), 1.0)


def test_a_parameter_without_a_gradient_is_averaged_as_it_is():
    params = {"a": jnp.ones(2), "b": jnp.full(2, 3.0)}
    optimizer = parameter_ema(adam(0.1), 0.5)
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update({"a": jnp.ones(2), "b": None}, state, params)
        params = {"a": params["a"] + updates["a"], "b": params["b"]}
    assert updates["b"] is None
    averages = evaluation_params(state, params)
    np.testing.assert_allclose(averages["b"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(averages["a"], (0.9 + 2 * 0.8) / 3, rtol=1e-5)
