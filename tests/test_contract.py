"""The promise about dtypes: what leaves, what is kept, and that nothing turns NaN."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    EACH_OFTEN_ONCE,
    EVERY_CONVENTION,
    FEWER_CONVENTIONS,
    NEED_PARAMS,
    RECIPES,
    assert_bit_equal,
    broadly,
    buffers_of,
    gradient_trees,
    normal_tree,
    train,
)

from adaptive_opt import adam

DTYPES = ("float16", "bfloat16", "float32", "float64", "complex64", "complex128")
PAIRS = [
    (param, gradient)
    for param in DTYPES
    for gradient in DTYPES
    if param.startswith("complex") or not gradient.startswith("complex")
]
"""Every dtype of a parameter with every dtype that its gradient can have."""


def kept_in(param):
    """The dtype of a buffer that holds numbers like the parameter."""
    return jnp.promote_types(param, jnp.float32)


def avals(tree):
    """What decides whether a compiled function is called again or compiled again."""
    return [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(jax.eval_shape(lambda: tree))]


def needs_params(name):
    return name.split(" (")[0] in NEED_PARAMS


@pytest.mark.parametrize("name", broadly(RECIPES, EVERY_CONVENTION))
def test_updates_are_promoted_and_the_state_is_a_fixed_point(name, x64):
    """28 pairs of dtypes, each a leaf of one tree. A fixed point means a single compilation."""
    optimizer = EVERY_CONVENTION[name](1e-2)
    params = [jnp.ones(2, dtype) for dtype, _ in PAIRS]
    gradients = [jnp.ones(2, dtype) for _, dtype in PAIRS]
    state = optimizer.init(params)
    updates, after = jax.eval_shape(optimizer.update, gradients, state, params)
    assert [u.dtype for u in updates] == [jnp.promote_types(*pair) for pair in PAIRS]
    assert not any(u.weak_type for u in updates)
    assert [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(after)] == avals(state)
    for buffer in buffers_of(state).values():
        if isinstance(buffer, list):
            for leaf, (param, _) in zip(buffer, PAIRS, strict=True):
                assert leaf.dtype in (kept_in(param), jnp.finfo(kept_in(param)).dtype)
    if not needs_params(name):
        updates, _ = jax.eval_shape(optimizer.update, gradients, state)
        for update, (param, gradient) in zip(updates, PAIRS, strict=True):
            if jnp.iscomplexobj(update) == gradient.startswith("complex"):
                assert update.dtype == gradient
            else:  # a buffer made for complex parameters is complex whatever arrives
                assert param.startswith("complex")
                assert update.dtype == jnp.promote_types(gradient, "complex64")


HARD_PAIRS = [
    *((dtype, dtype) for dtype in ("float16", "bfloat16", "float32", "complex64")),
    *((dtype, dtype) for dtype in ("float64", "complex128")),
    *(("bfloat16", "float32"), ("float32", "bfloat16"), ("float16", "float32")),
]


def hard_gradients(param, gradient):
    """Zero, denormal, huge and mixed gradients, each after each of the others and at the start."""
    huge = 6e4 if "float16" in (param, gradient) else 1e18
    tiny = float(jnp.finfo(gradient).smallest_subnormal)
    kinds = np.array([[0.0] * 6, [tiny] * 6, [huge] * 6, [0, tiny, huge, -huge, 1, -1]])
    order = [0, 1, 2, 3, 0, 2, 1, 3, 1, 0, 3, 2, 0, 0, 1, 1, 2, 2, 3, 3]
    starts = [order[i:] + order[:i] for i in (0, 2, 3, 6)]
    return jnp.stack([jnp.asarray(kinds[start], gradient) for start in starts])


@pytest.mark.parametrize(
    "pairs", [HARD_PAIRS[:4], pytest.param(HARD_PAIRS[4:], marks=pytest.mark.broad)], ids=len
)
@pytest.mark.parametrize("name", EACH_OFTEN_ONCE)
def test_nothing_becomes_nan_or_infinite_in_any_dtype(name, pairs, x64):
    optimizer = EVERY_CONVENTION[name](1e-3)
    gradients = [hard_gradients(*pair) for pair in pairs]

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        finite = jax.tree.map(lambda x: jnp.isfinite(x).all(), (params, state, updates))
        return (params, state), finite

    @jax.jit
    @jax.vmap
    def run(gradients):
        params = [jnp.ones(6, param) for param, _ in pairs]
        return jax.lax.scan(step, (params, optimizer.init(params)), gradients)[1]

    wrong = [
        jax.tree_util.keystr(path)
        for path, finite in jax.tree_util.tree_flatten_with_path(run(gradients))[0]
        if not finite.all()
    ]
    assert not wrong


def test_a_complex_gradient_of_a_real_parameter_is_refused():
    x = {"w": jnp.ones(2)}
    optimizer = adam(1e-3)
    with pytest.raises(TypeError, match=r"'mu' at \['w'\] is real, but .* complex64"):
        optimizer.update({"w": jnp.ones(2) * 1j}, optimizer.init(x), x)


# --- 16 bits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.broad)])
@pytest.mark.parametrize("name", RECIPES)
def test_the_state_of_16_bit_parameters_is_that_of_float32_parameters(name, dtype):
    """Bit for bit, given the same gradients; the update is the float32 one, rounded at most twice.

    Not compiled: a compiler may fuse a product and a sum in one of the two programs only.
    """
    if name == "ranger":  # optax.centralize takes its means in the dtype of the gradient
        optimizer = RECIPES[name](1e-2, centralize=False)
    elif name in NEED_PARAMS:  # decay looks at the parameters, whose dtypes differ
        optimizer = RECIPES[name](1e-2, weight_decay=0.0)
    else:
        optimizer = RECIPES[name](1e-2)
    gradients = [
        jax.tree.map(lambda g: jnp.clip(g, -1e3, 1e3).astype(dtype), g) for g in gradient_trees(4)
    ]
    still = jax.tree.map(jnp.ones_like, gradients[0])
    as_single = jax.tree.map(lambda x: x.astype(jnp.float32), still)
    half, single = optimizer.init(still), optimizer.init(as_single)
    for gradient in gradients:
        updates, half = optimizer.update(gradient, half, still)
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), gradient)
        expected, single = optimizer.update(wide, single, as_single)
        assert_bit_equal(half, single)
        for u, e in zip(jax.tree.leaves(updates), jax.tree.leaves(expected), strict=True):
            normal = np.abs(e) > float(jnp.finfo(dtype).smallest_normal) * 4
            error = np.abs(np.asarray(u, np.float32) / np.where(normal, e, 1) - 1)
            assert np.max(error, initial=0, where=normal) <= float(jnp.finfo(dtype).eps)


def noisy_quadratic(dtype, optimizer, steps=3000):
    """The parameters and the second moment after training; the noise falls to a tenth halfway."""
    curvature = jnp.logspace(-1, 1, 32)
    noise = jax.random.normal(jax.random.key(0), (steps, 32)) * jnp.where(
        jnp.arange(steps) < steps // 2, 1.0, 0.1
    ).reshape(-1, 1)

    def step(carry, noise):
        x, state = carry
        gradient = (curvature * x.astype(jnp.float32) + noise).astype(dtype)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), None

    x = jnp.full(32, 2.0, dtype)
    (x, state), _ = jax.lax.scan(step, (x, optimizer.init(x)), noise)
    return np.asarray(x, np.float64), np.asarray(optax.tree.get(state, "nu"), np.float64)


def test_bfloat16_training_tracks_float32_where_optax_freezes():
    """The second moment must forget the noise of the first half; in bfloat16, 0.999 v is v."""
    _, expected = noisy_quadratic(jnp.float32, adam(1e-2))
    _, ours = noisy_quadratic(jnp.bfloat16, adam(1e-2))
    _, theirs = noisy_quadratic(jnp.bfloat16, optax.adam(1e-2))
    assert np.all(np.abs(ours / expected - 1) < 0.15)
    assert np.all(np.abs(theirs / expected - 1) > 0.5)


def test_injected_hyperparameters_of_16_bit_parameters_are_right_or_refused():
    params = jnp.ones(3, jnp.bfloat16)
    for recipe in RECIPES.values():
        narrow = optax.inject_hyperparams(recipe)(1e-3)
        with pytest.raises(ValueError, match=r"hyperparam_dtype=jnp\.float32"):
            narrow.update(params, narrow.init(params), params)
        make = optax.inject_hyperparams(recipe, hyperparam_dtype=jnp.float32)
        optimizer, plain = make(1e-3), recipe(1e-3)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        assert_bit_equal(updates, plain.update(params, plain.init(params), params)[0])


def test_a_16_bit_state_of_optax_is_widened_and_says_so():
    params = jnp.full(4, 0.5, jnp.bfloat16)
    gradients = [jnp.asarray(g, jnp.bfloat16) for g in np.random.default_rng(0).normal(size=(3, 4))]
    theirs = train(optax.adam(1e-3), params, gradients[:2])[1]
    assert theirs[0].nu.dtype == jnp.bfloat16
    optimizer = adam(1e-3)
    with pytest.warns(UserWarning, match="'nu' arrives as bfloat16.* kept as float32"):
        updates, state = optimizer.update(gradients[2], theirs, params)
    assert state[0].mu.dtype == state[0].nu.dtype == jnp.float32
    wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.ndim else x, theirs)
    assert_bit_equal((updates, state), optimizer.update(gradients[2], wide, params))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.update(gradients[2], state, params)  # said once
        asked = adam(1e-3, state_dtype=jnp.bfloat16)
        _, state = asked.update(gradients[2], theirs, params)
    assert state[0].nu.dtype == jnp.bfloat16


# --- One strict context for everything -----------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", broadly(RECIPES, EVERY_CONVENTION))
def test_nothing_is_promoted_broadcast_or_warned_about_behind_our_back(name):
    params = normal_tree() | {"half": jnp.ones(3, jnp.bfloat16)}
    gradients = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        optimizer = EVERY_CONVENTION[name](1e-2)
        state = optimizer.init(params)
        for _ in range(2):
            _, state = jax.eval_shape(optimizer.update, gradients, state, params)


@pytest.mark.parametrize("name", ["adamw", "adamod", "diffmod", "radam", "amsbound", "adagrad"])
def test_debug_nans_finds_nothing(name):
    with jax.debug_nans(True), jax.debug_infs(True):
        train(RECIPES[name](1e-2), normal_tree(), gradient_trees(3))
    with jax.debug_nans(True):
        zeros = jax.tree.map(jnp.zeros_like, normal_tree())
        train(RECIPES[name](1e-2), normal_tree(), [zeros, zeros])


# --- Long runs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FEWER_CONVENTIONS)
def test_a_count_near_its_end_saturates_and_nothing_else_happens(name):
    """As optax.safe_increment does; b2^t underflows to 0 and the corrections are 1."""
    optimizer = EVERY_CONVENTION[name](1e-2)
    params = normal_tree()
    last = np.iinfo(np.int32).max

    def at(count, tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: jnp.int32(count) if "count" in str(path[-1]) else x, tree
        )

    _, state, _ = train(optimizer, params, gradient_trees(3))
    gradients = list(gradient_trees(3))
    _, after, history = train(optimizer, params, gradients, state=at(last - 1, state))
    counts = optax.tree.get_all_with_path(after, "count")
    assert all(count == last for _, count in counts)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((after, history)))
    if name.startswith("adam ") or name == "adam":
        _, _, hundred_million = train(optimizer, params, gradients, state=at(10**8, state))
        assert_bit_equal(history[-1][1], hundred_million[-1][1])


@pytest.mark.broad
@pytest.mark.parametrize("steps", [10**5, pytest.param(10**6, marks=pytest.mark.slow)])
def test_many_steps_drift_no_further_from_float64_than_optax_does(steps, x64):
    """How far the updates in float32 are from those in float64."""

    def distances(optimizer):
        def step(states, t):
            key = jax.random.fold_in(jax.random.key(0), t)
            gradient = jax.random.normal(key, (16,), jnp.float32)
            pairs = [
                optimizer.update(gradient.astype(d), s)
                for d, s in zip(DTYPES[2:4], states, strict=True)
            ]
            (narrow, _), (wide, _) = pairs
            return [s for _, s in pairs], jnp.max(jnp.abs(narrow / wide - 1))

        states = [optimizer.init(jnp.zeros(16, d)) for d in DTYPES[2:4]]
        return jax.jit(lambda: jax.lax.scan(step, states, jnp.arange(steps))[1])()

    ours, theirs = np.asarray(distances(adam(1e-3))), np.asarray(distances(optax.adam(1e-3)))
    assert ours.max() <= theirs.max() * 1.01  # where an average passes 0
    assert np.median(ours) <= np.median(theirs) / 3  # which takes b2 as float32 rounds it
