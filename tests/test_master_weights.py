"""16-bit parameters trained as float32: where they land, what it costs, and what goes around."""

from __future__ import annotations

import functools

import equinox as eqx
import flax.core
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AS_USERS, assert_bit_equal, broadly, one_in
from flax import nnx

import adaptive_opt
from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adamw,
    convert_state,
    evaluation_params,
    float32_params,
    init_sharded,
    lookahead,
    low_memory,
    master_weights,
    parameter_ema,
    read_telemetry,
    sgd,
    single_pass,
    skip_nonfinite,
    state_shardings,
    telemetry,
    zero1,
)

RESIDUALS = ["int8", "bfloat16", "float32", None]
KEPT = RESIDUALS[:3]
EACH = pytest.mark.parametrize("dtype", [jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)], ids=str)
MILLION = 10**6

# --- where parameters land ------------------------------------------------------------------------


def weights(n=MILLION, dtype=jnp.bfloat16, seed=0, size=0.02):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(n) * size, dtype)


def stepping(optimizer, **settings):
    @functools.partial(jax.jit, **settings)
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return step


def unit(x, dtype=jnp.bfloat16):
    """1/127 of half a unit in the last place."""
    size = np.maximum(np.abs(np.asarray(x, np.float64)), float(jnp.finfo(dtype).tiny))
    return size * float(jnp.finfo(dtype).eps) / 254


@EACH
@pytest.mark.parametrize("residual", broadly(["int8", "float32"], KEPT))
def test_a_million_weights_land_on_the_rounding_of_the_new_weight(dtype, residual):
    """Under jit, steps of up to 1e-3; what is then held is the new weight, as near as it can be."""
    optimizer = master_weights(sgd(1.0), residual)
    step, params = stepping(optimizer), weights(dtype=dtype)
    state = optimizer.init(params)
    near = {"int8": 1.02, "bfloat16": 2.0**-7 * 254, "float32": 0.0}[residual]
    for seed in range(1, 4):
        gradient = jnp.clip(weights(dtype=jnp.float32, seed=seed, size=4e-4), -1e-3, 1e-3)
        new = np.asarray(float32_params(state, params) - gradient)
        params, state = step(params, state, gradient)
        assert_bit_equal(np.abs(np.asarray(params)), np.abs(new.astype(dtype)))
        held = np.asarray(float32_params(state, params))
        assert_bit_equal(np.abs(held.astype(dtype)), np.abs(np.asarray(params)))
        error = np.abs(held - new)
        assert (error <= near * unit(new, dtype)).all()
        assert residual == "float32" or error.max() > 0


@EACH
def test_without_a_residual_they_land_on_a_neighbour_and_are_right_in_the_mean(dtype):
    optimizer = master_weights(sgd(1.0), None)
    params = jnp.full(MILLION, 0.02, dtype)
    state = optimizer.init(params)
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [()] * len(jax.tree.leaves(state))
    new, state = stepping(optimizer)(params, state, jnp.full(MILLION, 1e-6, jnp.float32))
    neighbours = np.unique(np.asarray(new, np.float64))
    here, gap = float(params[0]), float(jnp.finfo(dtype).eps) / 64
    np.testing.assert_allclose(neighbours, [here - gap, here], rtol=1e-9)
    chance = 1e-6 / gap
    error = np.asarray(new, np.float64).mean() - (here - 1e-6)
    assert abs(error) <= 5 * gap * (chance * (1 - chance) / MILLION) ** 0.5
    assert state.count == 1


def test_a_step_across_zero_lands_where_a_float32_update_can_take_it():
    """1 less nearly 1: the sum has no bits below 2^-24, and the residual says so."""
    x = jnp.full(4096, 1.0, jnp.bfloat16)
    for residual in KEPT:
        optimizer = master_weights(sgd(1.0), residual)
        gradient = 1 - weights(4096, jnp.float32, size=1e-7)
        new, state = stepping(optimizer)(x, optimizer.init(x), gradient)
        np.testing.assert_allclose(np.asarray(new, "f"), 1 - np.asarray(gradient), atol=2.0**-24)
        held = float32_params(state, new)
        np.testing.assert_allclose(held, 1 - np.asarray(gradient), atol=2.0**-24)
        assert_bit_equal(held.astype(jnp.bfloat16), new)


@pytest.mark.parametrize("residual", broadly(["float32"], KEPT))
def test_adamw_goes_as_it_goes_in_float32(residual):
    """A master copy is the float32 run, bit for bit; the others are a few units off."""
    inner = adamw(1e-3, weight_decay=0.1)
    optimizer = master_weights(inner, residual)
    params = weights()
    wide, state = params.astype(jnp.float32), optimizer.init(params)
    plain = inner.init(wide)
    one, two = (stepping(o, compiler_options=AS_USERS) for o in (optimizer, inner))
    way = np.zeros(MILLION)
    for seed in range(1, 11):
        gradient = weights(dtype=jnp.float32, seed=seed)
        params, state = one(params, state, gradient)
        wide, plain = two(wide, plain, gradient)
        way = np.maximum(way, np.abs(wide))
    held = float32_params(state, params)
    assert_bit_equal(optax.tree.get(state, "nu"), optax.tree.get(plain, "nu"))
    if residual == "float32":
        differ = held != wide  # where a step led nearly to 0, see the next test
        assert differ.sum() <= 10
        assert np.abs(held - wide).max() <= 2.0**-24 * way.max()
        assert_bit_equal(params[~differ], wide.astype(jnp.bfloat16)[~differ])
    assert (np.abs(held - wide) <= 12 * unit(way)).all()  # 10 roundings: sqrt(10)/2, 5 sigma, and 4


LIMITS = {1e-4: 0.0003, 1e-5: 0.0013, 1e-6: 0.013}


@pytest.mark.parametrize("size", broadly([], LIMITS))
def test_a_thousand_steps_in_one_direction_arrive(size):
    """The error over the way; what FlashOptim's 8 bits, rounded to nearest, leave is tenfold."""

    def error(optimizer, params):
        def step(carry, _):
            params, state = carry
            updates, state = optimizer.update(jnp.full(params.shape, -size), state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        params, state = jax.jit(lambda c: jax.lax.scan(step, c, None, 1000)[0])(carry)
        is_plain = not isinstance(state, adaptive_opt.MasterWeightsState)
        held = params if is_plain else float32_params(state, params)
        gone = np.asarray(held, np.float64) - np.asarray(carry[0], np.float64)
        return np.abs(gone - 1000 * size).mean() / (1000 * size)

    start = jnp.linspace(0.015, 0.025, 20_000).astype(jnp.bfloat16)
    assert error(master_weights(sgd(1.0)), start) <= LIMITS[size]
    assert error(master_weights(sgd(1.0), "bfloat16"), start) <= LIMITS[size]
    assert error(master_weights(sgd(1.0), "float32"), start) <= 3e-4
    assert error(sgd(1.0), start) > 0.5


@EACH
def test_a_weight_without_a_gradient_keeps_every_bit(dtype):
    for residual in KEPT:
        optimizer = master_weights(sgd(1.0), residual)
        params, step = weights(dtype=dtype, n=100_000), stepping(optimizer)
        before = step(params, optimizer.init(params), weights(100_000, jnp.float32, 1, 1e-4))
        after = step(*before, jnp.zeros(100_000))
        assert_bit_equal(after[0], before[0])
        assert_bit_equal(after[1].residual, before[1].residual)
    always = step(params, optimizer.init(params), jnp.zeros(100_000))[0]
    assert_bit_equal(always, params)


def test_weight_decay_acts_on_the_float32_weight():
    """Each is a hundredth of what a bfloat16 parameter would notice."""
    inner = optax.chain(optax.add_decayed_weights(1.0), optax.scale(-(2.0**-16)))
    params = weights(10_000)
    plain = params
    for residual in KEPT:
        optimizer = master_weights(inner, residual)
        held, state, step = params, optimizer.init(params), stepping(optimizer)
        for _ in range(256):
            held, state = step(held, state, jnp.zeros(10_000))
        expected = np.asarray(params, np.float64) * (1 - 2.0**-16) ** 256
        error = float32_params(state, held) - expected
        assert np.abs(error).mean() <= 8 * unit(expected).mean()
        assert np.abs(error.mean()) <= unit(expected).mean()
    updates, _ = inner.update(jnp.zeros_like(plain), inner.init(plain), plain)
    assert_bit_equal(optax.apply_updates(plain, updates), plain)


@EACH
def test_infinities_and_nan_arrive_and_the_largest_stays_finite(dtype):
    largest = float(jnp.finfo(dtype).max)
    x = jnp.array([1.0, 1.0, 1.0, largest, -largest, 0.0, -0.0], dtype)
    gradient = jnp.array([jnp.nan, jnp.inf, -jnp.inf, -largest / 400, largest / 400, 0.0, 0.0])
    for residual in RESIDUALS:
        optimizer = master_weights(sgd(1.0), residual)
        step = stepping(optimizer)
        new, state = step(x, optimizer.init(x), gradient)
        for _ in range(2):
            held = float32_params(state, new)
            for found in (new, held):
                found = np.asarray(found, "f")
                assert np.isnan(found[0])
                assert found[1:3].tolist() == [-np.inf, np.inf]
            assert_bit_equal(new[3:], x[3:])
            assert_bit_equal(np.signbit(held[3:]), np.signbit(x[3:]))
            assert jnp.isfinite(held[3:]).all()
            new, state = step(new, state, jnp.zeros(7))


# --- what it costs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("residual", "storage", "most"),
    [("int8", "8-bit", 5.1), ("bfloat16", "8-bit", 6.1), (None, "bfloat16", 6.1),
     ("int8", "bfloat16", 7.1), ("float32", "8-bit", 8.1)],
)  # fmt: skip
def test_bytes_held_for_a_weight(residual, storage, most):
    optimizer = master_weights(low_memory(adamw(1e-3), storage), residual)
    params = {"a": jnp.ones((512, 1024), jnp.bfloat16), "b": jnp.ones((3, 8192), jnp.bfloat16)}
    state = jax.eval_shape(optimizer.init, params)
    updates, after = jax.eval_shape(optimizer.update, params, state, params)
    bytes_of = [sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(s)) for s in (state, after)]
    assert bytes_of[0] == bytes_of[1]
    weighed = 2 + bytes_of[0] / sum(x.size for x in params.values())
    assert most - 0.2 < weighed <= most
    assert {u.dtype for u in updates.values()} == {jnp.dtype(jnp.float32)}


# --- around and inside of others ------------------------------------------------------------------

INNER = functools.partial(adamw, 1e-2, weight_decay=0.1)
NESTS = {
    "alone": lambda: master_weights(INNER()),
    "low_memory inside": lambda: master_weights(low_memory(INNER(), "8-bit", min_size=1)),
    "low_memory around": lambda: low_memory(master_weights(INNER(), "float32"), min_size=1),
    "skip_nonfinite": lambda: skip_nonfinite(master_weights(INNER(), "bfloat16")),
    "clipped": lambda: optax.chain(optax.clip_by_global_norm(1.0), master_weights(INNER())),
    "accumulated": lambda: optax.MultiSteps(
        master_weights(INNER()), 2
    ).gradient_transformation(),
    "injected": lambda: master_weights(optax.inject_hyperparams(adam)(learning_rate=1e-2)),
    "partition": lambda: optax.partition(
        {"a": master_weights(INNER()), "b": master_weights(sgd(1e-2), None)},
        {"kernel": "a", "bias": "b", "norm": "a", "frozen": "b"},
    ),
    "groups": lambda: master_weights(
        ParameterGroups([Group("bias", weight_decay=0.0)], Group()).optimizer(
            adamw, learning_rate=1e-2, weight_decay=0.1
        )
    ),
    "masked": lambda: optax.masked(
        master_weights(INNER()), {"kernel": True, "bias": False, "norm": True, "frozen": True}
    ),
    "lookahead inside": lambda: master_weights(lookahead(INNER(), 2)),
    "average around": lambda: parameter_ema(master_weights(INNER())),
    "single_pass": lambda: single_pass(master_weights(INNER())),
    "telemetry": lambda: master_weights(adamw(1e-2, observers=telemetry(every=1))),
    "nothing kept": lambda: master_weights(INNER(), None),
}  # fmt: skip
TREE = {
    "kernel": weights((16, 256), size=0.1),
    "bias": weights(256, jnp.float16, 1, 0.1),
    "norm": weights(256, jnp.float32, 2, 0.1),
    "frozen": None,
}


def gradients(steps, tree=TREE):
    for seed in range(steps):
        yield jax.tree.map(lambda p, s=seed: weights(p.shape, p.dtype, s + 10, 1.0), tree)


@pytest.mark.parametrize("nest", one_in(4, NESTS))
def test_in_any_nest_it_resumes_bit_for_bit_and_gives_its_float32_weights(nest):
    optimizer = NESTS[nest]()
    step, params = stepping(optimizer), dict(TREE)
    state = optimizer.init(params)
    structure, dtypes = jax.tree.structure(state), [x.dtype for x in jax.tree.leaves(state)]
    held = []
    for count, gradient in enumerate(gradients(4)):
        params, state = step(params, state, gradient)
        assert [x.dtype for x in jax.tree.leaves(params)] == [
            x.dtype for x in jax.tree.leaves(TREE)
        ]
        full = float32_params(state, params)
        assert {x.dtype for x in jax.tree.leaves(full)} == {jnp.dtype(jnp.float32)}
        for name in ("kernel", "bias", "norm"):
            assert_bit_equal(full[name].astype(params[name].dtype), params[name])
        held.append(full)
        if count == 1:
            fresh = optimizer.init(TREE)
            by_us = adaptive_opt.from_bytes(
                optimizer, fresh, adaptive_opt.to_bytes(optimizer, state)
            )
            by_flax = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
            assert_bit_equal(jax.tree.map(jnp.asarray, by_flax), by_us)
            after_two = params, by_us
    assert jax.tree.structure(state) == structure
    assert [x.dtype for x in jax.tree.leaves(state)] == dtypes
    for count, gradient in enumerate(gradients(4)):
        if count > 1:
            after_two = step(*after_two, gradient)
    assert_bit_equal(after_two, (params, state))
    if nest == "low_memory around":
        assert state.inner_state.residual["kernel"].dtype == jnp.float32
    if nest == "telemetry":
        seen = read_telemetry(state)
        assert seen["param_norm/all"] == pytest.approx(float(optax.tree.norm(held[-2])), rel=1e-5)


def test_every_device_count_makes_the_same_bits():
    """Split parameters, ZeRO-1, or one device: the noise goes by positions."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, jax.P(*axes)) for axes in (("data",), ()))
    inner, params = low_memory(sgd(1e-2, 0.9), min_size=1), weights((16, 256), size=0.1)
    plain = master_weights(inner)
    expected = params, plain.init(params)
    sharded = jax.device_put(params, split)
    fsdp = sharded, init_sharded(plain, sharded)
    assert fsdp[1].residual.sharding == split
    assert state_shardings(plain, params, split).residual == split
    around = zero1(plain, mesh)
    zero = (copy := jax.device_put(params, whole)), around.init(copy)
    assert zero[1].residual.addressable_shards[0].data.size == params.size // 8
    steps = [stepping(tx) for tx in (plain, plain, around)]
    for gradient in gradients(3, params):
        expected, fsdp, zero = (
            s(*c, gradient) for s, c in zip(steps, (expected, fsdp, zero), strict=True)
        )
    for found in (fsdp, zero):
        assert_bit_equal(jax.device_get(found[0]), jax.device_get(expected[0]))
        residual = found[1].residual.reshape(params.shape)
        assert_bit_equal(jax.device_get(residual), jax.device_get(expected[1].residual))
    assert fsdp[1].residual.sharding == split
    assert np.any(expected[1].residual)


def test_a_seed_and_a_step_make_the_same_bits_and_leaves_have_noise_of_their_own():
    params = {"a": weights(4096), "b": weights(4096)}
    optimizer = master_weights(sgd(1.0))
    step, gradient = stepping(optimizer), {"a": weights(4096, seed=1), "b": weights(4096, seed=1)}
    one, two = (step(params, optimizer.init(params), gradient) for _ in range(2))
    assert_bit_equal(one, two)
    a, b = one[1].residual["a"], one[1].residual["b"]
    assert_bit_equal(one[0]["a"], one[0]["b"])
    assert 0.1 < np.mean(np.asarray(a) != np.asarray(b)) < 0.9


def test_what_is_not_of_16_bits_passes_through():
    inner, params = adamw(1e-2), {"w": jnp.ones(3), "none": None, "x": weights(8)}
    _, frozen = master_weights(inner).update(
        {"w": jnp.ones(3), "none": None, "x": None}, master_weights(inner).init(params), params
    )
    assert frozen.residual["w"] is None
    assert_bit_equal(frozen.residual["x"], jnp.zeros(8, jnp.int8))
    ours, plain = master_weights(inner).init(params), inner.init(params)
    wide = dict.fromkeys(("w", "x"), jnp.ones(3)) | {"none": None}
    found, _ = jax.jit(master_weights(inner).update)(wide, master_weights(inner).init(wide), wide)
    expected, _ = jax.jit(inner.update)(wide, inner.init(wide), wide)
    assert_bit_equal(found, expected)
    assert_bit_equal(ours.inner_state[0].mu["w"], plain[0].mu["w"])


def test_a_skipped_step_changes_nothing():
    optimizer = skip_nonfinite(master_weights(INNER()))
    params, step = weights(512), stepping(optimizer)
    before = step(params, optimizer.init(params), weights(512, seed=1))
    after = step(*before, jnp.full(512, jnp.nan, jnp.bfloat16))
    assert_bit_equal(after[0], before[0])
    assert_bit_equal(after[1].inner_state, before[1].inner_state)
    assert int(after[1].total) == 1


def test_averages_inside_are_found_in_float32():
    optimizer, params = master_weights(parameter_ema(sgd(1.0), 0.5)), weights(256)
    carry, step, seen = (params, optimizer.init(params)), stepping(optimizer), []
    for seed in (1, 2):
        carry = step(*carry, weights(256, jnp.float32, seed, 1e-4))
        seen.append(np.asarray(float32_params(carry[1], carry[0])))
    average = evaluation_params(carry[1], float32_params(carry[1], carry[0]))
    np.testing.assert_allclose(average, (seen[0] + 2 * seen[1]) / 3, atol=2e-6)
    assert evaluation_params(carry[1], carry[0]).dtype == jnp.bfloat16


def test_a_parameter_that_somebody_changes_counts():
    for residual in KEPT:
        optimizer, params = master_weights(sgd(1.0), residual), weights(256, size=1.0)
        step = stepping(optimizer)
        params, state = step(params, optimizer.init(params), weights(256, jnp.float32, 1, 1e-4))
        other = 2 * params + 1
        held = np.asarray(float32_params(state, other))
        np.testing.assert_array_equal(held.astype(jnp.bfloat16), np.asarray(other))
        new, _ = step(other, state, jnp.full(256, 0.25))
        np.testing.assert_array_equal(np.asarray(new), (held - 0.25).astype(jnp.bfloat16))


@pytest.mark.broad
@pytest.mark.parametrize("source", KEPT)
@pytest.mark.parametrize("target", RESIDUALS)
def test_residuals_are_converted(source, target):
    params = {"w": weights(512), "n": jnp.ones(4)}
    old, new = (master_weights(low_memory(INNER(), min_size=1), r) for r in (source, target))
    step = stepping(old)
    params, state = step(params, old.init(params), next(gradients(1, params)))
    if target is None:
        with pytest.raises(ValueError, match=r"no place for residual.*drop=\{'residual'\}"):
            convert_state(state, old, new, params)
        moved = convert_state(state, old, new, params, drop={"residual"})
        assert moved.residual is None
    else:
        moved = convert_state(state, old, new, params)
        full, found = (float32_params(s, params)["w"] for s in (state, moved))
        near = {"int8": 0.52, "bfloat16": 0.52, "float32": 0.0}[target] * (source != target)
        assert (np.abs(full - found) <= near * unit(full)).all()
        assert jax.tree.structure(moved) == jax.tree.structure(new.init(params))
    assert [x.dtype for x in jax.tree.leaves(moved)] == [
        x.dtype for x in jax.tree.leaves(new.init(params))
    ]
    assert (int(moved.count), int(moved.inner_state.count)) == (1, 1)
    assert_bit_equal(optax.tree.get(moved, "nu"), optax.tree.get(state, "nu"))


def test_master_weights_are_put_around_a_run_that_goes_on_and_taken_off():
    params, inner = weights(512), INNER()
    plain = stepping(inner)(params, inner.init(params), weights(512, seed=1))
    for residual in KEPT:
        optimizer = master_weights(INNER(), residual)
        state = convert_state(plain[1], inner, optimizer, plain[0])
        assert_bit_equal(float32_params(state, plain[0]), plain[0].astype(jnp.float32))
        after = stepping(optimizer)(plain[0], state, weights(512, seed=2))
        with pytest.raises(ValueError, match="no place for residual"):
            convert_state(after[1], optimizer, inner, after[0])
        back = convert_state(after[1], optimizer, inner, after[0], drop={"residual"})
        assert_bit_equal(back, after[1].inner_state)


# --- homes ----------------------------------------------------------------------------------------


def test_a_module_of_nnx_is_trained_in_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = nnx.Linear(8, 8, rngs=rngs, param_dtype=jnp.bfloat16)
            self.b = nnx.Linear(8, 1, rngs=rngs)

    model = Model()
    optimizer = nnx.Optimizer(model, master_weights(low_memory(INNER(), min_size=1)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        x = jnp.ones((4, 8))
        gradient = nnx.grad(lambda m: jnp.mean((m.b(m.a(x).astype(jnp.float32)) - 1) ** 2))(model)
        optimizer.update(model, gradient)

    start = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    for _ in range(3):
        step(model, optimizer)
    params = nnx.state(model, nnx.Param)
    full = float32_params(optimizer.opt_state, params)
    assert {x.dtype for x in jax.tree.leaves(full)} == {jnp.dtype(jnp.float32)}
    rounded_again = jax.tree.map(lambda w, p: w.astype(p.dtype), full, params)
    assert_bit_equal(nnx.as_pure(rounded_again), nnx.as_pure(params))
    moved = jax.tree.map(lambda a, b: np.any(np.asarray(a) != np.asarray(b)), params, start)
    assert all(jax.tree.leaves(nnx.as_pure(moved)))


def test_a_module_of_equinox_and_a_frozen_dict_are_trained():
    model = eqx.nn.Linear(4, 3, key=jax.random.key(0), dtype=jnp.bfloat16)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    del static
    for tree in (params, flax.core.freeze({"a": {"b": weights(64)}})):
        optimizer = master_weights(INNER())
        new, state = stepping(optimizer)(tree, optimizer.init(tree), next(gradients(1, tree)))
        full = float32_params(state, new)
        assert jax.tree.structure(full) == jax.tree.structure(tree)
        assert_bit_equal(jax.tree.map(lambda w, p: w.astype(p.dtype), full, new), new)
        assert any(np.any(x) for x in jax.tree.leaves(state.residual))
    optimizer = master_weights(adam(1e-2))
    as_dict = {"a": {"b": weights(64, seed=1)}}  # another container than the parameters'
    updates, _ = optimizer.update(as_dict, optimizer.init(as_dict), new)
    assert jax.tree.structure(updates) == jax.tree.structure(as_dict)


# --- misuse ---------------------------------------------------------------------------------------


def test_misuse_is_named():
    x = {"w": weights(8)}
    with pytest.raises(
        ValueError, match="residual must be one of 'int8', 'bfloat16', 'float32', N"
    ):
        master_weights(sgd(0.1), "int4")
    with pytest.raises(TypeError, match=r"master_weights takes an optimizer, such as"):
        master_weights(sgd)
    optimizer = master_weights(sgd(0.1))
    state = optimizer.init(x)
    with pytest.raises(ValueError, match="master_weights needs the parameters"):
        optimizer.update(x, state)
    with pytest.raises(ValueError, match="needs a MasterWeightsState, but was given tuple"):
        optimizer.update(x, (), x)
    wide, short = {"w": jnp.ones(8)}, {"w": weights(7)}
    fits = r"the parameter at \['w'\] is {}, and the state has {} for it"
    for params, has in ((wide, r"float32\[8\]"), (short, r"bfloat16\[7\]")):
        with pytest.raises(ValueError, match=fits.format(has, r"a residual of int8\[8\]")):
            optimizer.update(params, state, params)
    with pytest.raises(ValueError, match=fits.format(r"bfloat16\[8\]", "no residual")):
        optimizer.update(x, optimizer.init(wide), x)
    with pytest.raises(ValueError, match=r"a residual of int8.*residual='float32'"):
        master_weights(sgd(0.1), "float32").update(x, state, x)
    with pytest.raises(ValueError, match=r"master_weights.* in it, got tuple"):
        float32_params((), x)
    with pytest.raises(ValueError, match=fits.format(r"float32\[8\]", r"a residual of int8\[8\]")):
        float32_params(state, wide)
    other, target = adaptive_opt.to_bytes(optimizer, state), master_weights(sgd(0.1), "float32")
    with pytest.raises(adaptive_opt.CheckpointMismatch, match="residual"):
        adaptive_opt.from_bytes(target, target.init(x), other)


def test_a_derivative_through_a_rounding_is_refused():
    optimizer, x = master_weights(sgd(0.1)), weights(8)
    state = optimizer.init(x)
    with pytest.raises(TypeError, match="derivative of a rounding is zero"):
        jax.grad(lambda g: optimizer.update(g, state, x)[0].sum())(jnp.ones(8))
    wide = jnp.ones(8)
    slope = jax.grad(lambda g: optimizer.update(g, optimizer.init(wide), wide)[0].sum())(wide)
    np.testing.assert_allclose(slope, -0.1)


@pytest.mark.parametrize("residual", RESIDUALS)
def test_strict_settings_and_float64_hold(residual, x64):
    optimizer = master_weights(adam(1e-2), residual)
    params = {"a": weights((2, 3)), "b": weights(3, jnp.float16), "c": weights(3, jnp.float64)}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        state = jax.eval_shape(optimizer.init, params)
        updates, state = jax.eval_shape(optimizer.update, params, state, params)
    assert [u.dtype for u in updates.values()] == [jnp.float32, jnp.float32, jnp.float64]
    kinds = {x.dtype for x in jax.tree.leaves(state.residual)}
    assert kinds == ({jnp.dtype(residual)} if residual else set())


def test_weights_that_see_one_another_are_found_inside():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    with pytest.raises(ValueError, match="scale_by_trust_ratio"):
        zero1(master_weights(optax.lamb(1e-3)), mesh).init(weights((16, 16)))


def test_it_is_described_and_made_again():
    optimizer = master_weights(low_memory(adam(1e-2), "8-bit"), "bfloat16")
    assert "residual='bfloat16'" in str(adaptive_opt.describe(optimizer))
    again = adaptive_opt.make(adaptive_opt.config(optimizer))
    assert str(adaptive_opt.describe(again)) == str(adaptive_opt.describe(optimizer))
