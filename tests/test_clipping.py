"""clip_by_previous_norm is its formula, in every dtype, over steps, and on many devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, train
from jax.sharding import Mesh, PartitionSpec

from adaptive_opt import (
    adamw,
    clip_by_previous_norm,
    config,
    convert_state,
    describe,
    from_bytes,
    make,
    skip_nonfinite,
    to_bytes,
)


@pytest.mark.parametrize("initial", [0.0, 7.0])
def test_gradients_are_clipped_by_the_norm_before_theirs(initial, x64):
    clip, before = clip_by_previous_norm(3.0, initial), initial
    gradients = list(gradient_trees(8, np.float64))
    gradients = [jax.tree.map(lambda x, t=t: x * 10.0 ** (-t), g) for t, g in enumerate(gradients)]
    state, update = clip.init(gradients[0]), jax.jit(clip.update)
    factors = []
    for gradient in gradients:
        updates, state = update(gradient, state)
        factors.append(min(1.0, 3.0 / before) if before else 1.0)
        expected = jax.tree.map(lambda g: np.asarray(g) * factors[-1], gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), updates, expected)
        before = np.sqrt(sum(np.sum(np.asarray(g) ** 2) for g in jax.tree.leaves(gradient)))
        np.testing.assert_allclose(state.norm, before, rtol=1e-12)
    assert min(factors) < 0.1
    assert factors[-1] == 1.0
    assert factors[0] == (1.0 if initial == 0 else 3 / 7)


def test_of_a_constant_gradient_it_is_optax_from_the_second_step_on():
    gradient = normal_tree(1)
    theirs, ours = optax.clip_by_global_norm(0.5), clip_by_previous_norm(0.5)
    expected = theirs.update(gradient, theirs.init(gradient))[0]
    *_, history = train(ours, normal_tree(), [gradient] * 3)
    assert_bit_equal(history[0][1], gradient)
    for _, updates in history[1:]:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), updates, expected)


def test_dtypes_none_and_empty_trees_are_kept():
    tree = {"w": jnp.full(4096, 3.0, jnp.bfloat16), "z": jnp.array(3 + 4j), "frozen": None}
    clip = clip_by_previous_norm(1.0)
    state = clip.init(tree)
    assert state.norm.dtype == jnp.float32
    for _ in range(2):
        updates, state = clip.update(tree, state)
    assert jax.tree.map(lambda x: x.dtype, updates) == jax.tree.map(lambda x: x.dtype, tree)
    norm = np.sqrt(9 * 4096 + 25)
    assert state.norm == pytest.approx(norm, rel=1e-6)
    np.testing.assert_allclose(updates["z"], (3 + 4j) / norm, rtol=1e-6)
    assert clip.update({}, clip.init({}))[0] == {}


def test_a_norm_that_is_not_finite_is_not_remembered():
    x, nan = jnp.array([3.0, 4.0]), jnp.array([1.0, np.nan])
    clip = clip_by_previous_norm(1.0)
    _, state = clip.update(x, clip.init(x))
    _, state = clip.update(nan, state)
    np.testing.assert_allclose(clip.update(x, state)[0], x / 5, rtol=1e-6)
    guarded = skip_nonfinite(optax.chain(clip, adamw(1e-2)))
    assert_bit_equal(train(guarded, x, [x, nan, x])[0], train(guarded, x, [x, x])[0])


def test_it_is_saved_made_of_data_and_put_into_a_run():
    optimizer = optax.chain(clip_by_previous_norm(0.5, 2.0), adamw(1e-2))
    assert describe(make(config(optimizer))) == describe(optimizer)
    params, gradients = normal_tree(), list(gradient_trees(4))
    expected, state, _ = train(optimizer, params, gradients)
    there, middle, _ = train(optimizer, params, gradients[:2])
    again = from_bytes(optimizer, optimizer.init(params), to_bytes(optimizer, middle))
    assert_bit_equal(train(optimizer, there, gradients[2:], again)[:2], (expected, state))
    theirs = optax.chain(optax.clip_by_global_norm(0.5), adamw(1e-2))
    _, plain, _ = train(theirs, params, gradients)
    moved = convert_state(plain, theirs, optimizer, params)
    assert moved[0].norm == 2.0
    assert_bit_equal(moved[1], plain[1])


def test_parts_on_devices_have_one_norm():
    mesh, split = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    clip = clip_by_previous_norm(1.0, axis_name="data")
    gradient = jnp.array([3.0, 4.0])

    def local(g):
        _, state = clip.update(g, clip.init(g))
        updates, state = clip.update(g, state)
        return updates, state.norm

    mapped = jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=(split, PartitionSpec()))
    updates, norm = jax.jit(mapped)(gradient)
    np.testing.assert_allclose(updates, gradient / 5, rtol=1e-6)
    assert norm == 5.0


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="max_norm must be finite and greater than 0, got 0"):
        clip_by_previous_norm(0.0)
    with pytest.raises(ValueError, match="initial_norm must be finite and at least 0, got -1"):
        clip_by_previous_norm(1.0, -1.0)
    with pytest.raises(TypeError, match="max_norm must be a number and not a schedule"):
        clip_by_previous_norm(optax.constant_schedule(1.0))
