"""Lookahead is a drop-in: plain parameters in and out, inside anything."""

from __future__ import annotations

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, train

from adaptive_opt import adam, adamw, describe, lookahead, ranger, sgd


def test_it_equals_the_lookahead_of_optax(x64):
    params = normal_tree(dtype=np.float64)
    gradients = list(gradient_trees(23, np.float64))
    for k, a in ((1, 0.5), (5, 0.8), (6, 1.0)):
        actual, state, _ = train(lookahead(adam(1e-2), k, a), params, gradients)
        pair = optax.LookaheadParams.init_synced(params)
        theirs = optax.lookahead(optax.adam(1e-2), k, a)
        pair_state = theirs.init(pair)
        for gradient in gradients:
            updates, pair_state = theirs.update(gradient, pair_state, pair)
            pair = optax.apply_updates(pair, updates)
        for x, y in zip(
            *map(jax.tree.leaves, ((actual, state.slow), (pair.fast, pair.slow))), strict=True
        ):
            np.testing.assert_allclose(x, y, rtol=1e-12)


def test_between_synchronisations_the_inner_update_passes_unchanged():
    params, gradients = normal_tree(), list(gradient_trees(7))
    _, _, ours = train(lookahead(sgd(1e-2), 4), params, gradients[:3])
    _, _, inner = train(sgd(1e-2), params, gradients[:3])
    for (_, a), (_, b) in zip(ours, inner, strict=True):
        assert_bit_equal(a, b)


def test_a_slow_step_of_one_is_the_inner_optimizer():
    params, gradients = normal_tree(), list(gradient_trees(13))
    actual, _, _ = train(lookahead(adam(1e-2), 3, 1.0), params, gradients)
    expected, _, _ = train(adam(1e-2), params, gradients)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


WRAPPED = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), lookahead(adam(1e-2), 3)),
    "partition": lambda: optax.partition(
        {"kernel": lookahead(adamw(1e-2), 3), "rest": sgd(1e-2)},
        {"dense": {"kernel": "kernel", "bias": "rest"}, "scale": "rest"},
    ),
    "inject": lambda: optax.inject_hyperparams(
        lambda learning_rate, slow_step_size: lookahead(adam(learning_rate), 3, slow_step_size)
    )(optax.linear_schedule(1e-2, 1e-3, 10), 0.5),
    "apply_if_finite": lambda: optax.apply_if_finite(lookahead(adam(1e-2), 3), 5),
    "multi_steps": lambda: optax.MultiSteps(lookahead(adam(1e-2), 3), 2).gradient_transformation(),
    "ranger": lambda: ranger(1e-2, sync_period=3),
}


@pytest.mark.parametrize("make", WRAPPED.values(), ids=WRAPPED)
def test_it_resumes_from_a_checkpoint_in_the_middle_of_a_period(make):
    params, gradients = normal_tree(), list(gradient_trees(10))
    end, state, _ = train(make(), params, gradients)
    middle, saved, _ = train(make(), params, gradients[:4])
    blob = flax.serialization.to_bytes(saved)
    restored = flax.serialization.from_bytes(make().init(params), blob)
    resumed, last, _ = train(make(), middle, gradients[4:], restored)
    assert_bit_equal(resumed, end)
    assert_bit_equal(last, state)
    assert "slow" in str(jax.tree_util.tree_structure(state)) or optax.tree.get_all_with_path(
        state, "slow"
    )


def test_extra_arguments_reach_the_inner_optimizer():
    seen = {}

    def update(updates, state, params=None, **extra):
        seen.update(extra)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(optax.identity().init, update)
    x = jnp.ones(1)
    tx = optax.chain(lookahead(inner))
    tx.update(x, tx.init(x), x, value=3.0)
    assert seen == {"value": 3.0}


def test_the_slow_weights_are_a_copy_in_float32_at_least():
    x = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2)}
    tx = lookahead(sgd(0.1))
    state = tx.init(x)
    assert [leaf.dtype for leaf in jax.tree.leaves(state.slow)] == [jnp.float32, jnp.float32]
    assert state.slow["single"].unsafe_buffer_pointer() != x["single"].unsafe_buffer_pointer()
    updates, _ = tx.update(x, state, x)
    assert updates["half"].dtype == jnp.bfloat16
    narrow = lookahead(sgd(0.1), state_dtype=jnp.bfloat16).init(x)
    assert [leaf.dtype for leaf in jax.tree.leaves(narrow.slow)] == [jnp.bfloat16] * 2


def test_a_nan_does_not_stay_longer_than_in_the_inner_optimizer():
    x = jnp.zeros(1)
    tx = optax.apply_if_finite(lookahead(sgd(0.1), 2), 10)
    params, state, _ = train(tx, x, [jnp.ones(1), jnp.full(1, jnp.nan), jnp.ones(1), jnp.ones(1)])
    assert np.isfinite(params).all()
    assert int(state.total_notfinite) == 1


def test_misuse_is_named():
    x = jnp.ones(1)
    for wrong in (0, 2.5, np.inf):
        with pytest.raises(
            ValueError, match=f"sync_period must be whole and at least 1, got {wrong}"
        ):
            lookahead(sgd(0.1), wrong)
    for wrong in (1.5, -0.1):
        with pytest.raises(ValueError, match=rf"slow_step_size must be in \[0, 1\], got {wrong}"):
            lookahead(sgd(0.1), 5, wrong)
    with pytest.raises(TypeError, match="sync_period must be a number and not a schedule"):
        lookahead(sgd(0.1), optax.constant_schedule(5))
    with pytest.raises(TypeError, match=r"lookahead takes an optimizer, such as lookahead\(adam"):
        lookahead(sgd)
    with pytest.raises(ValueError, match="lookahead needs the parameters"):
        lookahead(sgd(0.1)).update(x, lookahead(sgd(0.1)).init(x))
    assert [part.name for part in describe(lookahead(sgd(0.1), 5)).parts] == ["sgd"]
    assert describe(lookahead(sgd(0.1), 5)).settings["sync_period"] == 5
