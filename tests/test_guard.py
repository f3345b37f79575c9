"""Gradients that are not finite, and AdaMod's zero gradients: what the cures do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    FEW_OFTEN,
    FEWER_OFTEN,
    RECIPES,
    assert_bit_equal,
    gradient_trees,
    normal_tree,
    train,
)
from jax.sharding import Mesh, PartitionSpec

from adaptive_opt import (
    Packing,
    adam,
    adamod,
    amsgrad,
    describe,
    diffmod,
    lookahead,
    low_memory,
    skip_nonfinite,
    sweep,
    train_step,
)


def spoiled(tree, value):
    """The tree with one number in its last leaf that is not finite."""
    leaves, structure = jax.tree.flatten(tree)
    leaves[-1] = leaves[-1].ravel().at[-1].set(value).reshape(leaves[-1].shape)
    return structure.unflatten(leaves)


@pytest.mark.parametrize("name", FEWER_OFTEN)
def test_bad_batches_are_as_if_they_had_not_been(name):
    guarded = skip_nonfinite(RECIPES[name](1e-2))
    first, second, third = gradient_trees(3)
    bad = [spoiled(second, value) for value in (np.nan, np.inf, -np.inf)]
    params, state, history = train(guarded, normal_tree(), [bad[0], first, *bad, second, third])
    expected, plain, _ = train(guarded, normal_tree(), [first, second, third])
    assert_bit_equal((params, state.inner_state), (expected, plain.inner_state))
    assert [int(s.consecutive) for s, _ in history] == [1, 0, 1, 2, 3, 0, 0]
    assert (int(state.total), int(plain.total)) == (4, 0)
    for place in (0, 2, 3, 4):
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(history[place][1]))


@pytest.mark.parametrize("name", FEW_OFTEN)
def test_without_a_guard_a_nan_stays_in_its_weight(name):
    """The documented behaviour; scopes wider than a weight carry it further."""
    first, second, third = gradient_trees(3)
    params, _, _ = train(
        RECIPES[name](1e-2), normal_tree(), [first, spoiled(second, np.nan), third]
    )
    spoilt = np.isnan(params["scale"])
    untouched = np.isfinite(params["dense"]["kernel"]).all()
    assert spoilt
    assert untouched == (name != "rmsprop of the tree")


def test_the_guard_never_gives_up_where_optax_does():
    x, nan = jnp.ones(2), jnp.array([1.0, np.nan])
    theirs = optax.apply_if_finite(adam(1e-2), max_consecutive_errors=3)
    assert np.isnan(train(theirs, x, [nan] * 5)[0]).any()
    params, state, _ = train(skip_nonfinite(adam(1e-2)), x, [nan] * 5)
    assert_bit_equal(params, x)
    assert int(state.consecutive) == 5


def test_the_guard_takes_gradients_of_another_dtype_than_the_parameters():
    x, good, nan = jnp.ones(2, jnp.bfloat16), jnp.ones(2), jnp.array([1.0, np.nan])
    for inner in (amsgrad(1e-2), optax.adam(1e-2), optax.chain(optax.clip(1.0), diffmod(1e-2))):
        optimizer = skip_nonfinite(inner)
        params, state, history = train(optimizer, x, [nan, good, nan])
        plain = jax.jit(inner.update)(good, inner.init(x), x)[0]
        assert_bit_equal(history[1][1], plain)
        assert params.dtype == jnp.bfloat16
        assert int(state.total) == 2


def test_a_step_that_would_spoil_the_state_is_skipped_and_counted():
    """The square of a finite gradient overflows in optax's buffer; where it was finite before."""
    ordinary, large = jnp.ones(2), jnp.array([1.0, 1e30])
    params, state, history = train(
        skip_nonfinite(optax.adam(1e-2)), jnp.ones(2), [ordinary, large, ordinary]
    )
    expected, plain, _ = train(optax.adam(1e-2), jnp.ones(2), [ordinary, ordinary])
    assert_bit_equal((params, state.inner_state), (expected, plain))
    assert [int(s.total) for s, _ in history] == [0, 1, 1]
    best = optax.chain(adam(1e-2), optax.contrib.reduce_on_plateau())  # whose best loss is infinite
    optimizer = skip_nonfinite(best)
    _, state = optimizer.update(ordinary, optimizer.init(ordinary), ordinary, value=1.0)
    assert int(state.total) == 0


def test_clipping_inside_the_guard_is_guarded_too():
    params = normal_tree()
    good = next(gradient_trees(1))
    optimizer = skip_nonfinite(optax.chain(optax.clip_by_global_norm(1.0), adam(1e-2)))
    after, _, _ = train(optimizer, params, [spoiled(good, np.nan), good])
    expected, _, _ = train(optimizer, params, [good])
    assert_bit_equal(after, expected)


def test_the_guard_wraps_any_tree_and_any_transformation():
    tree = {"w": jnp.ones(2), "frozen": None, "empty": {}}
    for inner in (adam(1e-2), optax.lion(1e-2), optax.MultiSteps(adam(1e-2), 2)):
        if isinstance(inner, optax.MultiSteps):
            with pytest.raises(TypeError, match=r"give its \.gradient_transformation\(\)"):
                skip_nonfinite(inner)
            inner = inner.gradient_transformation()
        optimizer = skip_nonfinite(inner)
        state = optimizer.init(tree)
        updates, after = optimizer.update(tree, state, tree)
        assert jax.tree.structure(updates) == jax.tree.structure(tree)
        assert jax.tree.structure(after) == jax.tree.structure(state)
    empty = skip_nonfinite(adam(1e-2))
    assert int(empty.update({}, empty.init({}), {})[1].total) == 0
    assert "skip_nonfinite" in str(describe(empty))
    assert "adam(" in str(describe(empty))


def test_devices_agree_to_skip():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    optimizer = skip_nonfinite(adam(1e-2), axis_name="data")
    alone = skip_nonfinite(adam(1e-2))
    gradients = jnp.array([[1.0], [np.nan]])  # each device has one
    spec = PartitionSpec("data")

    def step(optimizer):
        def local(g):
            return optimizer.update(g, optimizer.init(g), g)[0]

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))(gradients)

    np.testing.assert_array_equal(step(optimizer), [[0.0], [0.0]])
    np.testing.assert_allclose(step(alone), [[-0.01], [0.0]], rtol=1e-5)


# --- A zero gradient at the start ---------------------------------------------------------------


@pytest.mark.parametrize("recipe", [adamod, diffmod])
def test_one_zero_gradient_disables_the_bound_in_the_reference_and_not_in_the_cure(recipe, x64):
    """The rate of a weight, in units of its own without the zero, 100 steps after it."""
    gradients = jax.random.normal(jax.random.key(0), (400, 8), jnp.float64)
    gradients *= jnp.where(jnp.arange(400) % 50 == 0, 10.0, 1.0).reshape(-1, 1)

    def averages(convention, gradients):
        optimizer = recipe(1e-3, convention=convention)
        state = train(optimizer, jnp.zeros(8), gradients)[1]
        return np.asarray(optax.tree.get(state, "rate_ema"))

    zero = jnp.zeros_like(gradients[:1])
    undisturbed = averages("reference", gradients)
    spoilt = averages("reference", jnp.concatenate([zero, gradients]))
    assert np.all(spoilt > 100 * undisturbed)  # lr / eps is in the average, and fades by 1 - b3
    cured = averages("robust", jnp.concatenate([zero, gradients]))
    assert np.all(np.abs(cured / undisturbed - 1) < 0.2)
    assert_bit_equal(averages("robust", gradients), undisturbed)


def test_the_cure_is_per_weight():
    """A weight that never sees a gradient has an average of 0, its neighbour that of AdaMod."""
    gradients = [jnp.array([0.0, 1.0]), jnp.array([0.0, -2.0]), jnp.array([0.0, 0.5])]
    cured = train(adamod(1e-3, convention="robust"), jnp.zeros(2), gradients)[1]
    reference = train(adamod(1e-3), jnp.zeros(2), gradients)[1]
    ema, expected = (optax.tree.get(s, "rate_ema") for s in (cured, reference))
    assert ema[0] == 0
    assert ema[1] == expected[1]
    corrected = [np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * 1e-3 / 1e-8 for t in (1, 2, 3)]
    np.testing.assert_allclose(expected[0], 1e-3 * sum(corrected), rtol=2e-3)


# --- The order of guards and accumulation --------------------------------------------------------


def accumulated(inner, **settings):
    return optax.MultiSteps(inner, 2, **settings).gradient_transformation()


NEVER_AGAIN = {
    "skip_nonfinite": skip_nonfinite(adam(1e-2)),
    "apply_if_finite": optax.apply_if_finite(adam(1e-2), 3),
    "zero_nans": optax.chain(optax.zero_nans(), adam(1e-2)),
}


@pytest.mark.parametrize("name", NEVER_AGAIN)
def test_a_guard_inside_of_accumulation_would_end_the_training_and_is_refused(name):
    wrong = accumulated(NEVER_AGAIN[name])
    good, nan = jnp.ones(2), jnp.array([1.0, np.nan])
    params, _, _ = train(wrong, jnp.zeros(2), [nan, *[good] * 5])
    assert params[1] == 0 or np.isnan(params[1])  # which is why
    message = f"{name} stands inside of optax.MultiSteps.*would never train again. Turn them around"
    for use in (
        lambda: train_step(lambda x: x.sum(), wrong),
        lambda: lookahead(wrong),
        lambda: low_memory(optax.chain(optax.clip(1.0), wrong)),
        lambda: Packing({"a": good, "b": good}).optimizer(wrong),
        lambda: sweep(
            lambda learning_rate: wrong, {"learning_rate": [1.0]}, loss=lambda x, y: x.sum(),
            init=lambda key: good, data=good, steps=1,
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            use()


def test_a_guard_around_accumulation_trains_on_as_does_its_own():
    good, nan = jnp.ones(2), jnp.array([1.0, np.nan])
    around = skip_nonfinite(accumulated(adam(1e-2)))
    own = accumulated(adam(1e-2), should_skip_update_fn=optax.skip_not_finite)
    for optimizer in (around, own):
        params, _, _ = train(optimizer, jnp.zeros(2), [nan, good, good])
        np.testing.assert_allclose(params, -0.01, rtol=1e-5)
        train_step(lambda x: x.sum(), optimizer)
    guarded_inside = accumulated(
        NEVER_AGAIN["zero_nans"], should_skip_update_fn=optax.skip_not_finite
    )
    train_step(lambda x: x.sum(), guarded_inside)
    assert "should_skip_update_fn=skip_not_finite" in str(describe(own))
    assert "should_skip" not in str(describe(around))
