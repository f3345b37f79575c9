"""Dtypes, None, structure, count: what holds for every recipe."""

from __future__ import annotations

import dataclasses
import inspect

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    ADAMS,
    FEW_OFTEN,
    FEWER_OFTEN,
    LOOK_AT_PARAMS,
    RECIPES,
    START_AT_PARAMS,
    assert_bit_equal,
    broadly,
    buffers_of,
    gradient_trees,
    normal_tree,
    train,
)

import adaptive_opt
from adaptive_opt import (
    adam,
    adamod,
    adaptive,
    close_step,
    open_step,
    per_weight_rate,
    scale_by_adam,
    second_moment,
)


def dtypes(tree):
    return [leaf.dtype for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("recipe", RECIPES)
def test_state_dtype_is_the_dtype_of_every_moment_and_rates_stay_wide(recipe):
    state = RECIPES[recipe](1e-3, state_dtype=jnp.bfloat16).init(jnp.ones(2))
    assert buffers_of(state)
    for name, buffer in buffers_of(state).items():
        wide = name in (
            *("rate_ema", "momentum_product", "mu_weight", "averaged_steps", "largest_rate", "b1"),
        )
        assert buffer.dtype == (jnp.float32 if wide else jnp.bfloat16)
    if recipe in ("adam", "adamw"):
        both = RECIPES[recipe](1e-3, mu_dtype=jnp.float16, state_dtype=jnp.bfloat16)
        assert dtypes(both.init(jnp.ones(2))[0]) == [jnp.int32, jnp.float16, jnp.bfloat16]


def test_a_second_moment_of_little_range_is_refused():
    for narrow in (jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2):
        with pytest.raises(ValueError, match=f"'nu' cannot be {np.dtype(narrow)}"):
            adam(1e-3, state_dtype=narrow).init(jnp.ones(2))
    with pytest.raises(ValueError, match="a buffer's dtype must be floating point, got int8"):
        adam(1e-3, mu_dtype=jnp.int8).init(jnp.ones(2))


@pytest.mark.parametrize("eps", broadly((0.0,), (0.0, 1e-300, 1e-8, 1.0)))
def test_a_zero_gradient_gives_a_zero_update_whatever_eps(eps, x64):
    x = jnp.zeros(2)
    for recipe in ADAMS.values():
        optimizer = recipe(1e-3, eps=eps)
        _, _, history = train(optimizer, x, [x, x, jnp.array([0.0, 1.0]), x])
        assert all(updates[0] == 0 for _, updates in history)
        assert all(np.isfinite(updates).all() for _, updates in history)


OF_GRADIENTS = [
    "mu",
    "mu_slow",
    "velocity",
    "previous_gradient",
    "mean_gradient",
    "change_ema",
    "slow",
    "z",
]


COMPLEX = jnp.dtype(jnp.complex64), jnp.dtype(jnp.complex128)


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
@pytest.mark.parametrize("name", FEWER_OFTEN)
def test_complex_gradients_have_real_second_moments(name, dtype, x64):
    """As of every recipe `adaptive_opt.testing` asks that it takes them."""
    gradients = [jnp.asarray([1 + 2j, -3j, 0], dtype) * (t + 1) for t in range(20)]
    params, state, history = train(RECIPES[name](1e-2), jnp.ones(3, dtype), gradients)
    assert params.dtype == history[0][1].dtype == dtype
    for field, buffer in buffers_of(state).items():
        if field not in OF_GRADIENTS:
            assert buffer.dtype == jnp.finfo(dtype).dtype


@pytest.mark.parametrize("dtype", COMPLEX, ids=str)
def test_complex_gradients_are_those_of_optax(dtype, x64):
    gradients = [jnp.asarray([1 + 2j, -3j, 0], dtype) * (t + 1) for t in range(20)]
    history, expected = (
        train(optimizer, jnp.ones(3, dtype), gradients)[2]
        for optimizer in (RECIPES["adam"](1e-2), optax.adam(1e-2))
    )
    for (_, a), (_, b) in zip(history, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    signed = adaptive_opt.diffgrad(1e-2, friction="signed")
    with pytest.raises(TypeError, match="no meaning for complex"):
        signed.update(gradients[0], signed.init(gradients[0]))


@pytest.mark.parametrize("recipe", FEW_OFTEN)
def test_mixed_trees_keep_each_leaf_its_dtype(recipe, x64):
    params = {
        "half": jnp.ones(2, jnp.bfloat16),
        "single": jnp.ones(2, jnp.float32),
        "double": jnp.ones(2, jnp.float64),
    }
    optimizer = RECIPES[recipe](optax.constant_schedule(1e-2))
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert dtypes(updates) == dtypes(params)
    for name, buffer in buffers_of(state).items():
        if isinstance(buffer, dict):
            assert dtypes(buffer) == [jnp.float64, jnp.float32, jnp.float32], name


def test_a_traced_learning_rate_does_not_widen_the_update():
    x = jnp.ones(2, jnp.bfloat16)

    @jax.jit
    def update(lr):
        return [r(lr).update(x, r(lr).init(x), x)[0] for r in RECIPES.values()]  # traced anew

    assert dtypes(update(jnp.float32(1e-3))) == [jnp.bfloat16] * len(RECIPES)


# --- None and structure ------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [r for r in RECIPES if r != "ranger"])
def test_a_python_number_is_a_parameter(recipe):
    """But of ranger: optax.centralize wants arrays."""
    optimizer = RECIPES[recipe](1e-2)
    state = optimizer.init(1.0)
    updates, after = optimizer.update(1.0, state, 1.0)
    assert updates.shape == ()
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_a_gradient_without_parameter_is_refused_by_path():
    optimizer = adam(1e-3)
    state = optimizer.init({"a": jnp.ones(1), "b": None})
    both = {"a": jnp.ones(1), "b": jnp.ones(1)}
    with pytest.raises(ValueError, match=r"gradient at \['b'\], but the state"):
        optimizer.update(both, state, both)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Model:
    kernel: jax.Array
    bias: jax.Array | None


@pytest.mark.parametrize("recipe", FEW_OFTEN)
def test_dataclasses_are_parameters_too(recipe):
    model = Model(kernel=jnp.ones((2, 2)), bias=None)
    params, state, _ = train(RECIPES[recipe](1e-2), model, [model])
    assert isinstance(params, Model)
    kinds = {type(buffer) for buffer in buffers_of(state).values()}
    assert Model in kinds or kinds == {type(jnp.ones(()))}


@pytest.mark.parametrize("recipe", FEW_OFTEN)
def test_shapes_are_enough_to_initialise(recipe):
    optimizer = RECIPES[recipe](1e-3)
    params = normal_tree()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    if recipe in START_AT_PARAMS:  # what it keeps is what it is given
        assert buffers_of(optimizer.init(shapes))[START_AT_PARAMS[recipe]] == shapes
    else:
        assert_bit_equal(optimizer.init(shapes), optimizer.init(params))
    assert_bit_equal(jax.jit(optimizer.init)(params), optimizer.init(params))


def test_optax_tree_functions_find_the_parameters_in_the_state():
    for recipe in RECIPES.values():
        optimizer = recipe(1e-3)
        state = optimizer.init(normal_tree())
        marked = optax.tree.map_params(optimizer, lambda x: x + 1, state)
        before = buffers_of(state)
        for name, buffer in buffers_of(marked).items():
            expected = 1 if isinstance(buffer, dict) else 0  # a scalar is not like the parameters
            for new, old in zip(*map(jax.tree.leaves, (buffer, before[name])), strict=True):
                np.testing.assert_allclose(new - old, expected, rtol=1e-6)


# --- Hyperparameters ---------------------------------------------------------------------------

USUAL = {"learning_rate": 1e-2, "b1": 0.8, "b2": 0.99, "eps": 1e-3, "weight_decay": 0.1}
USUAL |= {"eps_root": 1e-4, "b3": 0.9, "len_memory": 10, "momentum_decay": 0.1, "gamma": 0.1}
USUAL |= {"momentum": 0.8, "dampening": 0.1, "rho": 0.8, "slow_step_size": 0.3}
NOT_HERE = {"rmsprop of the tree": ("momentum",)}


def hyperparameters_of(name):
    takes = inspect.signature(RECIPES[name]).parameters
    return {k: v for k, v in USUAL.items() if k in takes and k not in NOT_HERE.get(name, ())}


HYPERPARAMETERS = {name: hyperparameters_of(name) for name in RECIPES}


@pytest.mark.parametrize("recipe", FEWER_OFTEN)
def test_numpy_numbers_are_numbers(recipe):
    h = dict(HYPERPARAMETERS[recipe])
    h |= {"b2": 0.99999} if "b2" in h else {}
    gradients = list(gradient_trees(2))
    expected = train(RECIPES[recipe](**h), normal_tree(), gradients)
    for kind in (np.float64, np.array):
        optimizer = RECIPES[recipe](**{name: kind(value) for name, value in h.items()})
        actual = train(optimizer, normal_tree(), gradients)
        assert_bit_equal(actual[0], expected[0])
        assert_bit_equal(actual[1], expected[1])
    if "weight_decay" in h and recipe not in LOOK_AT_PARAMS:
        still = RECIPES[recipe](1e-3, weight_decay=np.float64(0))
        still.update(jnp.ones(1), still.init(jnp.ones(1)))  # needs no parameters


@pytest.mark.parametrize("recipe", FEWER_OFTEN)
def test_a_schedule_of_any_hyperparameter_gives_its_value_at_each_step(recipe, x64):
    h = HYPERPARAMETERS[recipe]
    params = normal_tree(dtype=np.float64)
    gradients = list(gradient_trees(2, np.float64))
    for name, value in h.items():
        factors = jnp.array([1.0, 0.95])
        scheduled = RECIPES[recipe](**h | {name: lambda t, v=value: v * factors[t]})  # noqa: B023
        state = scheduled.init(params)
        for t, gradient in enumerate(gradients):
            constant = RECIPES[recipe](**h | {name: value * float(factors[t])})
            plain = with_leaves_of(constant.init(params), state)
            expected, _ = constant.update(gradient, plain, params)
            updates, state = scheduled.update(gradient, state, params)
            for a, b in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=0, err_msg=name)


def with_leaves_of(state, scheduled):
    """A state with the numbers of one that also has the counts of a schedule."""
    found = dict(_paths(scheduled))
    return jax.tree_util.tree_map_with_path(lambda path, _: found[_key(path)], state)


def _paths(state):
    return [(_key(path), leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]]


def _key(path):
    return jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda mask: RECIPES["adamw"](1e-2, weight_decay=0.1, mask=mask),
        lambda mask: RECIPES["adamw"](1e-2, weight_decay=0.1, mask=mask, decay="independent"),
        lambda mask: RECIPES["adamw"](1e-2, weight_decay=0.1, mask=mask, convention="keras"),
        lambda mask: RECIPES["adamod"](1e-2, weight_decay=0.1, mask=mask),
        lambda mask: RECIPES["diffmod"](1e-2, weight_decay=0.1, mask=mask),
        lambda mask: adaptive_opt.l2_regularization(0.1, mask),
    ],
)
def test_only_masked_in_weights_decay(make):
    params = normal_tree()
    zeros = jax.tree.map(jnp.zeros_like, params)
    kernels = {"dense": {"kernel": True, "bias": False}, "scale": False}
    for mask in (kernels, lambda tree: jax.tree.map(lambda x: x.ndim > 1, tree)):
        optimizer = make(mask)
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        assert np.all(updates["dense"]["kernel"] != 0)
        assert np.all(updates["dense"]["bias"] == 0)
        assert updates["scale"] == 0


def test_the_keras_form_takes_eps_root_and_mu_dtype(x64):
    x = jnp.array([0.3])
    optimizer = adam(1.0, eps=0.0, eps_root=0.16, mu_dtype=jnp.bfloat16, convention="keras")
    updates, state = optimizer.update(x, optimizer.init(x), x)
    expected = -0.1 * 0.3 / np.sqrt(0.001 * 0.09 + 0.16) * np.sqrt(0.001) / 0.1
    np.testing.assert_allclose(updates, [expected], rtol=1e-12)
    assert optax.tree.get(state, "mu").dtype == jnp.bfloat16


def test_complex_weights_decay_towards_zero_in_both_parts():
    x = jnp.array([1 + 2j], jnp.complex64)
    decay = adaptive_opt.decoupled_weight_decay(0.5)
    updates, _ = decay.update(jnp.zeros_like(x), decay.init(x), x)
    np.testing.assert_allclose(updates, 0.5 * x)


def test_complex_buffers_keep_both_parts_whatever_the_state_dtype():
    x = jnp.array([1 + 2j], jnp.complex64)
    state = adam(1e-3, state_dtype=jnp.bfloat16).init(x)
    assert state[0].mu.dtype == jnp.complex64
    assert state[0].nu.dtype == jnp.bfloat16


def test_float64_parameters_are_stepped_in_float64_whatever_the_gradient(x64):
    x, g = jnp.ones(1, jnp.float64), jnp.ones(1, jnp.float32) / 3
    optimizer = RECIPES["adamod"](1e-2)
    updates, _ = optimizer.update(g, optimizer.init(x), x)
    exact, _ = optimizer.update(g.astype(jnp.float64), optimizer.init(x), x)
    assert updates.dtype == jnp.float64
    assert_bit_equal(updates, exact)


def test_parameters_in_another_container_give_their_dtypes():
    x = {"w": jnp.ones(2), "b": jnp.ones(1, jnp.bfloat16)}
    optimizer = adam(1e-3)
    updates, _ = optimizer.update(x, optimizer.init(x), flax.core.freeze(x))
    assert dtypes(updates) == dtypes(x)


# --- Count -------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", FEW_OFTEN)
def test_every_count_in_a_state_is_the_same_number(recipe):
    optimizer = RECIPES[recipe](optax.constant_schedule(1e-3))
    _, state, _ = train(optimizer, normal_tree(), [normal_tree(1)] * 3)
    counts = [int(x) for x in jax.tree.leaves(state) if x.dtype == jnp.int32]
    assert counts
    assert set(counts) == {3}


def test_counts_in_a_flat_chain_agree():
    flat = optax.chain(open_step(), scale_by_adam(), close_step())
    state = flat.init(jnp.ones(1))
    ahead = (state[0]._replace(count=jnp.int32(7)), *state[1:])
    _, after = flat.update(jnp.ones(1), ahead)
    assert int(after[0].count) == int(after[1].count) == 8


def test_nesterov_looks_ahead_of_a_saturated_count_too():
    last = jnp.asarray(np.iinfo(np.int32).max)
    optimizer = adam(1e-3, nesterov=True)
    state = optimizer.init(jnp.ones(1))
    state = (state[0]._replace(count=last), *state[1:])
    updates, _ = optimizer.update(jnp.ones(1), state)
    expected = -1e-3 * (0.9 * 0.1 + 0.1) / (np.sqrt(0.001) + 1e-8)
    np.testing.assert_allclose(updates, [expected], rtol=1e-5)


def test_rates_of_16_bit_parameters_do_not_overflow():
    # 1/eps is 1e8, float16 ends at 65504.
    x = jnp.zeros(1, jnp.float16)
    _, state, _ = train(adamod(1e-3), x, [x])
    np.testing.assert_allclose(
        optax.tree.get(state, "rate_ema"), 1e-3 * 1e-3 * 0.316 * 1e8, rtol=1e-2
    )


def test_a_bfloat16_weight_keeps_a_second_moment_that_moves():
    x = jnp.ones(1, jnp.bfloat16)
    rule = adaptive(second_moment(0.999), per_weight_rate(1e-8))
    _, state, _ = train(rule, x, [x] * 1000)
    np.testing.assert_allclose(state.buffers["nu"], 1 - 0.999**1000, rtol=1e-3)
    frozen = train(optax.scale_by_adam(), x, [x] * 1000)[1].nu
    assert frozen == 0.5  # that of optax is bfloat16 and stops at a half
