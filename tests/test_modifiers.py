"""Modifiers do in a bracket what they do behind any optimizer, and what their sources say."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, train

from adaptive_opt import (
    adam,
    adamw,
    adaptive,
    behind,
    cautious,
    cautious_weight_decay,
    clip_update_rms,
    config,
    corrected_weight_decay,
    debias,
    describe,
    first_moment,
    from_bytes,
    hyperball,
    magma,
    make,
    per_weight_rate,
    scale_by_adam,
    scale_by_learning_rate,
    second_moment,
    sgd,
    to_bytes,
    trust_ratio,
)

ADAM = (first_moment(0.9), second_moment(0.99), debias(0.9, 0.99), per_weight_rate(1e-8))
MODIFIERS = {
    "cautious": cautious(),
    "cautious, count": cautious("count"),
    "trust_ratio": trust_ratio(0.5, 1e-6),
    "clip_update_rms": clip_update_rms(0.5),
    "hyperball": hyperball(0.1),
    "magma": magma(keep=0.7, seed=3),
}


def close(actual, expected, rtol):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * 1e-3)


@pytest.mark.parametrize("name", MODIFIERS)
def test_in_a_bracket_and_behind_an_optimizer_the_numbers_are_the_same(name, x64):
    params, gradients = normal_tree(dtype=np.float64), list(gradient_trees(12, np.float64))
    lr = optax.linear_schedule(2.0**-3, 2.0**-5, 16)  # whose numbers are floats
    inside = optax.chain(adaptive(*ADAM, MODIFIERS[name]), scale_by_learning_rate(lr))
    part = behind(optax.scale_by_adam(0.9, 0.99, 1e-8), MODIFIERS[name], downhill=False)
    outside = optax.chain(part, optax.scale_by_learning_rate(lr))
    (one, _, _), (other, _, _) = (train(o, params, gradients) for o in (inside, outside))
    close(one, other, 1e-12)


def test_behind_a_whole_optimizer_the_sign_is_turned_and_turned_back():
    params, gradients = normal_tree(), list(gradient_trees(5))
    for modifier in (cautious(), clip_update_rms(1e-3)):
        inside = optax.chain(
            behind(sgd(1e-2, momentum=0.9), modifier),
        )
        flipped = optax.chain(sgd(1e-2, momentum=0.9), optax.scale(-1.0))
        outside = optax.chain(behind(flipped, modifier, downhill=False), optax.scale(-1.0))
        (one, _, _), (other, _, _) = (train(o, params, gradients) for o in (inside, outside))
        assert_bit_equal(one, other)


def test_of_long_weights_trust_ratio_sees_what_counts_at_most(x64):
    """pytorch_lamb clamps the norm of a weight to 10; of shorter ones nothing changes."""
    update = jnp.array([3.0, 4.0])
    for scale, counted in ((0.5, 2.5), (2.0, 10.0), (9.0, 10.0)):
        modifier, x = behind(optax.identity(), trust_ratio(largest=10.0)), scale * update
        moved, _ = modifier.update(update, modifier.init(x), x)
        np.testing.assert_allclose(moved, update * counted / 5, rtol=1e-12)


def test_trust_ratio_and_clipping_are_those_of_optax(x64):
    params, gradients = normal_tree(dtype=np.float64), list(gradient_trees(3, np.float64))
    params["zero"] = jnp.zeros(3, np.float64)
    gradients = [g | {"zero": jnp.ones(3, np.float64)} for g in gradients]
    pairs = (
        (trust_ratio(0.5, 1e-3), optax.scale_by_trust_ratio(0.0, 0.5, 1e-3)),
        (clip_update_rms(0.5), optax.clip_by_block_rms(0.5)),
    )
    for ours, theirs in pairs:
        one, _, _ = train(adaptive(ours), params, gradients)
        other, _, _ = train(theirs, params, gradients)
        close(one, other, 1e-12)


@pytest.mark.parametrize("scale", ["mean", "count", "none"])
def test_caution_lets_those_move_that_agree(scale):
    g = np.array([1.0, -2.0, 3.0, 0.0, 1e-30], np.float32)
    m = np.array([2.0, 1.0, 0.5, 1.0, 1e-30], np.float32)
    agree = np.array([1, 0, 1, 0, 1])  # the product of the last two is 0 in float32
    factor = {"mean": 5 / 3, "count": 5 / 4, "none": 1.0}[scale]
    fixed = optax.stateless(lambda updates, params: jnp.asarray(-m))
    optimizer = behind(fixed, cautious(scale))
    update, _ = optimizer.update(jnp.asarray(g), optimizer.init(jnp.asarray(g)), jnp.asarray(g))
    np.testing.assert_allclose(update, -m * agree * factor, rtol=1e-6)
    none, _ = optimizer.update(jnp.asarray(-m), optimizer.init(jnp.asarray(g)), jnp.asarray(g))
    assert not np.any(none)  # nobody agrees; nothing is divided by 0


def test_the_hyperball_keeps_the_norm_and_turns_by_the_rate(x64):
    params, gradients = normal_tree(dtype=np.float64), list(gradient_trees(8, np.float64))
    optimizer = optax.chain(adaptive(*ADAM, hyperball(0.05)), optax.scale(-1.0))
    x, state, _ = train(optimizer, params, gradients)
    directions = adaptive(*ADAM)
    inner, y = directions.init(params), jax.tree.map(np.asarray, params)
    for gradient in gradients:
        u, inner = directions.update(gradient, inner, params)
        for key in ("scale",):
            radius = np.linalg.norm(params[key])
            moved = y[key] - 0.05 * radius * np.asarray(u[key]) / np.linalg.norm(u[key])
            y[key] = radius * moved / np.linalg.norm(moved)
    np.testing.assert_allclose(x["scale"], y["scale"], rtol=1e-12)
    for before, after in zip(*map(jax.tree.leaves, (params, x)), strict=True):
        np.testing.assert_allclose(np.linalg.norm(after), np.linalg.norm(before), rtol=1e-12)
    radii = state[0].buffers["radius"]
    assert jax.tree.map(jnp.shape, radii) == jax.tree.map(lambda _: (), params)
    still, _, _ = train(optimizer, params, [jax.tree.map(jnp.zeros_like, params)])
    close(still, params, 1e-15)


def test_cautious_decay_pulls_only_where_the_update_goes_to_zero_too():
    x = jnp.array([4.0, -4.0, 4.0, 0.0, 1e-30])
    u = jnp.array([1.0, 1.0, 0.0, 1.0, -1e-30])
    decay = cautious_weight_decay(0.5)
    found, _ = decay.update(u, decay.init(x), x)
    assert found.tolist() == (u + jnp.array([2.0, 0.0, 2.0, 0.0, 0.0])).tolist()
    masked = cautious_weight_decay(0.5, mask={"a": True, "b": False})
    both = {"a": x, "b": x}
    found, _ = masked.update({"a": u, "b": u}, masked.init(both), both)
    assert found["b"].tolist() == u.tolist()
    assert found["a"].tolist() == (u + jnp.array([2.0, 0.0, 2.0, 0.0, 0.0])).tolist()


def test_the_corrected_decay_goes_with_the_square_of_the_rate():
    rate = optax.linear_schedule(1e-2, 0.0, 10)
    decayed = adamw(rate, weight_decay=corrected_weight_decay(0.1, rate, peak=1e-2))
    plain = adam(rate)
    params = jnp.array([2.0, -1.0])
    _, s1 = decayed.update(params, decayed.init(params), params)
    _, s2 = plain.update(params, plain.init(params), params)
    for t in range(1, 5):
        one, s1 = decayed.update(params, s1, params)
        other, s2 = plain.update(params, s2, params)
        expected = -(float(rate(t)) ** 2) * 0.1 / 1e-2 * params
        np.testing.assert_allclose(one - other, expected, rtol=1e-4, atol=1e-9)
    assert config(make(config(decayed))) == config(decayed)


OTHERS = {
    "optax.contrib.muon": lambda: optax.contrib.muon(1e-2),
    "optax.lion": lambda: optax.lion(1e-3),
    "ours": lambda: adamw(1e-2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_optimizer_takes_them_compiles_once_and_is_saved(name):
    params, gradients = normal_tree(), list(gradient_trees(3))
    optimizer = behind(OTHERS[name](), cautious(), hyperball(0.1))
    traces = []

    @jax.jit
    def step(params, state, gradient):
        traces.append(1)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    x, state = params, optimizer.init(params)
    for gradient in gradients:
        x, state = step(x, state, gradient)
    assert len(traces) == 1
    assert all(map(np.all, map(np.isfinite, jax.tree.leaves(x))))
    assert_bit_equal(from_bytes(optimizer, state, to_bytes(optimizer, state)), state)


def test_the_nest_is_described_and_can_be_data():
    optimizer = behind(adamw(1e-2), cautious("count"), clip_update_rms(0.5))
    assert [part.name for part in describe(optimizer).parts] == [
        *("adamw", "cautious", "clip_update_rms")
    ]
    again = make(config(optimizer))
    assert config(again) == config(optimizer)
    params, gradients = normal_tree(), list(gradient_trees(2))
    one, other = (train(o, params, gradients)[0] for o in (optimizer, again))
    assert_bit_equal(one, other)


def test_leaves_without_a_gradient_and_16_bits():
    params = {"a": jnp.ones((2, 2), jnp.bfloat16), "b": None}
    optimizer = behind(scale_by_adam(), cautious(), downhill=False)
    update, state = optimizer.update(params, optimizer.init(params), params)
    assert update["b"] is None
    assert update["a"].dtype == jnp.bfloat16
    assert jax.tree.leaves(state.inner_state.mu)[0].dtype == jnp.float32


def test_misuse_is_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"behind\(optimizer, ...\) takes stages"):
        behind(adam(1e-3), optax.clip(1.0))
    with pytest.raises(ValueError, match=r"reads the second_moment of the step, which is not set"):
        behind(adam(1e-3), per_weight_rate(1e-8))
    with pytest.raises(ValueError, match=r"debias corrects the direction|debias.* no moving"):
        behind(adam(1e-3), debias(0.9))
    with pytest.raises(ValueError, match="scale must be one of 'mean', 'count', 'none'"):
        cautious("median")
    with pytest.raises(ValueError, match="threshold"):
        clip_update_rms(0.0)
    x = jnp.ones(2)
    ball = behind(adam(1e-3), hyperball(0.1))
    with pytest.raises(ValueError, match="hyperball needs the parameters"):
        ball.update(x, ball.init(x))
