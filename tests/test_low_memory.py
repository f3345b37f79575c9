"""States in 16 and 8 bits: the codes keep their bounds, and optimizers go on as they did."""

from __future__ import annotations

from typing import NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import RECIPES, assert_bit_equal, broadly

import adaptive_opt
from adaptive_opt import (
    adam,
    adamod,
    adamw,
    convert_state,
    init_sharded,
    low_memory,
    skip_nonfinite,
    state_shardings,
    train_step,
    zero1,
)
from adaptive_opt.core.buffers import buffer
from adaptive_opt.memory import codecs, views
from adaptive_opt.memory.low_memory import buffer_of

BROAD = pytest.mark.broad

STEPS = jnp.arange(200)


def numbers(shape, seed=0):
    """Numbers of sizes from 1e-12 to 1e3, some of them 0."""
    rng = np.random.default_rng(seed)
    size = 10 ** rng.uniform(-12, 3, shape)
    return jnp.asarray(rng.standard_normal(shape) * size * (rng.random(shape) > 0.1), jnp.float32)


@pytest.fixture(scope="module")
def decoded():
    """Each code's answers for the same numbers at 200 steps: last axis in blocks, or not."""

    def answers(x):
        def at(count):
            bits = codecs.noise(x.shape, count, 7)
            return {
                "bfloat16": codecs.to_bfloat16(x, bits).astype(jnp.float32),
                "int8": codecs.from_blocks(codecs.to_int8(x, bits)),
                "sqrt8": codecs.from_blocks(codecs.to_sqrt8(jnp.abs(x), bits)),
            }

        return jax.lax.map(at, STEPS)

    run = jax.jit(answers)
    return {shape: (numbers(shape), run(numbers(shape))) for shape in ((3, 512), (7, 100))}


def largest_in_block(x):
    flat = jnp.abs(x) if x.shape[-1] % codecs.BLOCK == 0 else jnp.abs(x).reshape(-1)
    blocks = jnp.pad(flat.reshape(-1), (0, -flat.size % codecs.BLOCK)).reshape(-1, codecs.BLOCK)
    return jnp.repeat(blocks.max(-1), codecs.BLOCK)[: x.size].reshape(x.shape)


@pytest.mark.parametrize("shape", [(3, 512), (7, 100)])
def test_no_answer_is_further_off_than_one_step_of_the_code(decoded, shape):
    x, found = decoded[shape]
    top = largest_in_block(x)
    rounding = 1 + 1e-5  # of the arithmetic in float32
    assert (jnp.abs(found["bfloat16"] - x) <= jnp.abs(x) * 2.0**-7).all()
    assert (jnp.abs(found["int8"] - x) <= top / 127 * rounding).all()
    roots = jnp.abs(jnp.sqrt(found["sqrt8"]) - jnp.sqrt(jnp.abs(x)))
    assert (roots <= jnp.sqrt(top) / 255 * rounding).all()


@pytest.mark.parametrize("shape", [(3, 512), (7, 100)])
@pytest.mark.parametrize("code", ["bfloat16", "int8", "sqrt8"])
def test_the_mean_over_steps_is_right(decoded, shape, code):
    x, found = decoded[shape]
    exact = jnp.abs(x) if code == "sqrt8" else x
    top = largest_in_block(x)
    lifted = (code == "sqrt8") & (exact < top / 255**2)  # to the smallest code, on purpose
    error = jnp.where(lifted, 0, found[code].mean(0) - exact)
    widest = {
        "bfloat16": jnp.abs(x) * 2.0**-7,
        "int8": top / 127,
        "sqrt8": 2 * jnp.sqrt(exact * top) / 255 + top / 255**2,
    }[code]
    # The mean of 200 answers between two steps of the code: five standard errors.
    assert (jnp.abs(error) <= 5 * widest * 0.5 / len(STEPS) ** 0.5 + 1e-5 * exact).all()
    assert float(jnp.abs(error).max()) > 0


def test_zero_is_exact_and_nothing_positive_becomes_zero(decoded):
    for x, found in decoded.values():
        for values in found.values():
            assert (values[:, x == 0] == 0).all()
        assert (found["sqrt8"][:, x != 0] > 0).all()


def test_bfloat16_keeps_nan_infinity_and_the_largest_finite_number():
    x = jnp.array([jnp.nan, jnp.inf, -jnp.inf, np.finfo(np.float32).max, 1.0, -0.0])
    for count in range(4):
        kept = codecs.to_bfloat16(x, codecs.noise(x.shape, jnp.array(count), 0))
        assert jnp.isnan(kept[0])
        assert (kept[1:3] == x[1:3].astype(jnp.bfloat16)).all()
        assert jnp.isfinite(kept[3:]).all()
        assert (kept[4:] == x[4:].astype(jnp.bfloat16)).all()


def test_the_noise_is_uniform_and_differs_between_places_steps_and_buffers():
    bits = jnp.stack([codecs.noise((64, 64), jnp.array(c), s) for c in (1, 2) for s in (0, 5)])
    flat = np.asarray(bits).reshape(4, -1) / 2.0**32
    assert np.abs(flat.mean(1) - 0.5).max() < 5 / np.sqrt(12 * 4096)
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 5 / np.sqrt(4096)
    assert np.abs(np.corrcoef(flat[0][:-1], flat[0][1:])[0, 1]) < 5 / np.sqrt(4096)


def corr(*rows):
    return np.corrcoef(np.asarray(rows, np.float64).reshape(len(rows), -1))


def test_both_halves_of_the_noise_are_uniform_and_have_nothing_to_do_with_each_other():
    bits = codecs.noise((256, 256), jnp.array(3), 11)
    upper, lower = (np.asarray(b >> 16) / 2.0**16 for b in (bits, bits << 16))
    n = upper.size
    for half in (upper, lower):
        assert abs(half.mean() - 0.5) < 5 / np.sqrt(12 * n)
        counted = np.bincount((half * 64).astype(int).ravel(), minlength=64)
        assert ((counted - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)
    others = [np.roll(lower, shift, axis) for shift in (1, 7) for axis in (0, 1)]
    assert np.abs(corr(upper, lower, *others)[0, 1:]).max() < 5 / np.sqrt(n)
    squares = corr((upper - 0.5) ** 2, (lower - 0.5) ** 2)
    assert abs(squares[0, 1]) < 5 / np.sqrt(n)


def test_codes_take_the_upper_half_of_their_bits_only():
    x, bits = numbers((3, 512)), codecs.noise((3, 512), jnp.array(1), 0)
    for code in (codecs.to_bfloat16, codecs.to_int8, lambda x, b: codecs.to_sqrt8(jnp.abs(x), b)):
        assert_bit_equal(code(x, bits), code(x, bits ^ 0xFFFF))


# --- what is not finite ---------------------------------------------------------------------------


def broken(shape):
    """Numbers with a NaN and infinities among them, one block of nothing else, and blocks of 0."""
    x = np.array(numbers(shape, seed=5))
    flat = x.reshape(-1)
    flat[[3, 300, 301]] = np.nan, np.inf, -np.inf
    flat[512:768] = [np.nan, np.inf] * 128
    flat[1024:1280] = 0
    flat[1025] = np.inf
    return jnp.asarray(x)


@pytest.mark.parametrize("shape", [(7, 300), pytest.param((8, 512), marks=BROAD)])
@pytest.mark.parametrize("bits", [True, False], ids=["stochastic", "nearest"])
def test_what_is_not_finite_stays_in_its_place(shape, bits):
    x, finite = broken(shape), jnp.isfinite(broken(shape))
    noise = codecs.noise(shape, jnp.array(9), 1) if bits else None
    top = largest_in_block(jnp.where(finite, x, 0))
    signed = codecs.to_int8(x, noise)
    values = codecs.from_blocks(signed)
    assert jnp.isnan(values[~finite]).all()
    assert (jnp.abs(values - x)[finite] <= (top / 127 * (1 + 1e-5))[finite]).all()
    roots = codecs.to_sqrt8(jnp.abs(x), noise)
    values = codecs.from_blocks(roots)
    assert jnp.isposinf(values[~finite]).all()
    off = jnp.abs(jnp.sqrt(values) - jnp.sqrt(jnp.abs(x)))
    assert (off[finite] <= (jnp.sqrt(top) / 254 * (1 + 1e-5))[finite]).all()
    assert ((values == 0) == (x == 0)).all()
    for blocks in (signed, roots):
        assert (blocks.are_finite() == finite).all()
        assert jnp.isfinite(blocks.scales).all()


def test_a_block_without_anything_broken_is_coded_as_if_it_stood_alone():
    x = jnp.concatenate([broken((8, 512)), numbers((8, 512))], axis=1)
    for code in (codecs.to_int8, lambda x, b: codecs.to_sqrt8(jnp.abs(x), b)):
        both, alone = code(x, None), code(x[:, 512:], None)
        assert_bit_equal(both.codes[:, 512:], alone.codes)
        assert_bit_equal(both.scales[:, 2:], alone.scales)
        assert not jnp.signbit(alone.scales).any()


@pytest.mark.parametrize("bad", [jnp.nan, 1e30, pytest.param(jnp.inf, marks=BROAD)])
def test_a_broken_gradient_harms_its_own_weight_only(bad):
    """1e30 is finite, its square is not."""
    optimizer, params = low_memory(adam(1e-2), "8-bit"), jnp.zeros(SHAPE)
    good = jnp.asarray(np.random.default_rng(0).standard_normal(SHAPE), jnp.float32)
    update = jax.jit(optimizer.update)
    _, state = update(good, optimizer.init(params), params)
    _, broken = update(good.at[3, 7].set(bad), state, params)
    _, usual = update(good.at[3, 7].set(0.0), state, params)
    updates, _ = update(good, broken, params)
    expected, _ = update(good, usual, params)
    others = jnp.ones(SHAPE, bool).at[3, 7].set(False)
    if bad == 1e30:  # the largest of its block's first moments, as it would be in float32 too
        others = others.at[3].set(False)
        assert updates[3, 7] == 0
    assert jnp.isfinite(updates[others]).all()
    np.testing.assert_allclose(updates[others], expected[others], atol=1e-2 * 0.05)
    guard = skip_nonfinite(optimizer)
    state = guard.init(params)
    refused, after = jax.jit(guard.update)(good.at[3, 7].set(bad), state, params)
    assert int(after.total) == 1
    assert not refused.any()
    assert_bit_equal(after.inner_state, state.inner_state)
    _, after = guard.update(good, guard.init(params)._replace(inner_state=broken), params)
    assert int(after.total) == 0  # what was broken before is not refused for ever


def test_the_largest_floats_have_codes():
    x = jnp.array([3e38, -1.5e38, 0.0, 1e37] * 64)
    values = codecs.from_blocks(codecs.to_int8(x, None))
    np.testing.assert_allclose(values, x, atol=3e38 / 127)
    roots = jnp.sqrt(codecs.from_blocks(codecs.to_sqrt8(jnp.abs(x), None)))
    np.testing.assert_allclose(roots, jnp.sqrt(jnp.abs(x)), atol=3e38**0.5 / 255)


def test_tiny_numbers_have_codes_like_others():
    x = jnp.asarray(np.random.default_rng(0).uniform(1, 1000, (1, 256)), jnp.float32) * 2.0**-100
    for code, scaled in ((codecs.to_int8, x), (codecs.to_sqrt8, jnp.abs(x))):
        for size in (2.0**-20, 1.0, 2.0**100):
            assert_bit_equal(code(scaled * size, None).codes, code(scaled, None).codes)


@pytest.mark.parametrize(
    "shape",
    broadly(((2, 8, 256), (7, 100)), [(16, 512), (2, 8, 256), (3, 512), (7, 100), (600,), ()]),
)
def test_blocks_are_the_same_in_the_view_of_every_platform(shape):
    x = jnp.resize(broken((8, 512)), shape)
    bits = codecs.noise(shape, jnp.array(2), 3)
    seen = []
    for view in views.VIEWS.values():
        signed = codecs._to_int8.__wrapped__(view, x, bits)
        roots = codecs._to_sqrt8.__wrapped__(view, jnp.abs(x), bits)
        values = [codecs._from_blocks.__wrapped__(view, blocks) for blocks in (signed, roots)]
        seen.append((signed, roots, values))
    for other in seen[1:]:
        assert_bit_equal(other, seen[0])


# --- around optimizers ----------------------------------------------------------------------------

SHAPE = (32, 256)
FULL = {"slow", "z", "mean_gradient", "gram_0", "gram_1", "basis_0", "basis_1"}


def arrays_of(state):
    return [x for x in jax.tree.leaves(state) if x.size > 1]


def nbytes(state):
    return sum(x.nbytes for x in arrays_of(state))


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_halves_every_state_but_parameters_variances_and_bases(name):
    optimizer = RECIPES[name](1e-3)
    params = jnp.ones(SHAPE)
    whole, state = optimizer.init(params), low_memory(optimizer, min_size=1).init(params)
    wide = sum(nbytes(optax.tree.get(whole, key, jnp.zeros(()))) for key in FULL)
    assert nbytes(state) - wide == 0.5 * (nbytes(whole) - wide)


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad", "radam", "nadamw"])
def test_8_bits_take_a_quarter_of_the_adam_family(name):
    params = jnp.ones(SHAPE)
    whole = nbytes(RECIPES[name](1e-3).init(params))
    assert nbytes(low_memory(RECIPES[name](1e-3), "8-bit").init(params)) <= 0.26 * whole


def test_small_leaves_and_chosen_buffers_keep_their_width():
    params = {"kernel": jnp.ones(SHAPE), "bias": jnp.ones(256)}
    state = low_memory(adamod(1e-3), "8-bit", buffers={"mu": "wide"}).init(params)
    kept = state.inner_state[0].buffers
    assert all(buffer["bias"].dtype == jnp.float32 for buffer in kept.values())
    assert kept["mu"]["kernel"].dtype == jnp.float32
    assert kept["nu"]["kernel"].codes.dtype == jnp.uint8
    assert kept["rate_ema"]["kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", RECIPES)
def test_the_table_knows_every_buffer_of_the_shape_of_a_weight(name):
    state = jax.eval_shape(RECIPES[name](1e-3).init, jax.ShapeDtypeStruct(SHAPE, jnp.float32))
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if leaf.size > 1:
            assert buffer(buffer_of(path)) is not None, jax.tree_util.keystr(path)


class Others(NamedTuple):
    """A state of somebody else's optimizer."""

    mu: jax.Array
    centres: jax.Array


def test_what_is_not_known_stays_wide_unless_it_is_named():
    inner = optax.GradientTransformation(
        lambda params: Others(jnp.ones_like(params), jnp.ones_like(params)),
        lambda updates, state, params=None: (updates, state),
    )
    params = jnp.ones(SHAPE)
    for storage in ("bfloat16", "8-bit"):
        state = low_memory(inner, storage).init(params).inner_state
        assert state.centres.dtype == jnp.float32
        assert nbytes(state.mu) <= 0.5 * params.nbytes
        state = low_memory(inner, storage, buffers={"centres": "int8"}).init(params).inner_state
        assert state.centres.codes.dtype == jnp.int8


class Three(NamedTuple):
    """Three buffers of the same numbers, so that their roundings can be compared."""

    mu: jax.Array
    velocity: jax.Array
    trace: jax.Array


REMEMBERS = optax.GradientTransformation(
    lambda params: Three(*[params] * 3),
    lambda updates, state, params=None: (updates, Three(*[updates] * 3)),
)


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_the_roundings_of_one_weights_buffers_have_nothing_to_do_with_each_other(storage):
    """Nor those of two weights or two steps."""
    x = jnp.asarray(np.random.default_rng(2).uniform(1, 2, (64, 1024)), jnp.float32)
    params = {"a": x, "b": x}
    optimizer = low_memory(REMEMBERS, storage)
    update, state, errors = jax.jit(optimizer.update), optimizer.init(params), []
    with pytest.raises(AssertionError):  # as numbers that are rounded alike do
        assert_unrelated([np.asarray(x)] * 2)
    for _ in range(2):
        _, state = update(params, state)
        errors += [np.asarray(v - x) for v in jax.tree.leaves(codecs.decoded(state.inner_state))]
    assert len(errors) == 12
    assert_unrelated(errors)


def assert_unrelated(errors):
    n = errors[0].size
    assert np.abs(corr(*errors) - np.eye(len(errors))).max() < 5 / np.sqrt(n)


def products(optimizer):
    """How often a whole array of 32-bit integers is multiplied in a step: a few times a hash."""
    x = jnp.ones(SHAPE)
    jaxpr = str(jax.make_jaxpr(optimizer.update)(x, optimizer.init(x), x))
    return jaxpr.count("u32[32,256] = mul")


def test_one_hash_serves_two_buffers_of_a_weight():
    one = products(low_memory(optax.trace(0.9)))
    assert one >= 3
    for storage in ("bfloat16", "8-bit"):
        assert products(low_memory(adam(1e-3), storage)) == one
        assert products(low_memory(adamod(1e-3), storage)) == 2 * one
        assert products(low_memory(REMEMBERS, storage)) == 2 * one
    # The largest of averages is rounded to nearest.
    assert products(low_memory(RECIPES["amsgrad"](1e-3), "8-bit")) == one


@pytest.mark.broad
@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
@pytest.mark.parametrize("axes", [("data",), (None, "data")])
def test_bits_are_the_same_however_the_arrays_are_split(storage, axes):
    optimizer = low_memory(adam(1e-2), storage)
    params = jnp.asarray(np.random.default_rng(7).standard_normal((16, 2048)), jnp.float32)
    split = jax.device_put(params, jax.NamedSharding(mesh_of(8), jax.P(*axes)))
    update, states = jax.jit(optimizer.update), []
    for x in (params, split):
        state = optimizer.init(x)
        for _ in range(2):
            _, state = update(x, state, x)
        states.append(state)
    assert_bit_equal(*states)


def run(optimizer, steps=60, seed=0):
    """Least squares in 8192 unknowns with noisy gradients; the last parameters and state."""
    target = jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE), jnp.float32)

    def step(carry, key):
        params, state = carry
        gradient = params - target + 0.3 * jax.random.normal(key, SHAPE)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), jnp.mean((params - target) ** 2)

    start = jnp.zeros(SHAPE)
    keys = jax.random.split(jax.random.key(seed), steps)
    go = jax.jit(lambda: jax.lax.scan(step, (start, optimizer.init(start)), keys))
    (params, state), losses = go()
    return params, state, losses


@pytest.mark.parametrize(
    ("name", "storage"),
    [
        ("adamod", "8-bit"),
        ("diffmod", "bfloat16"),
        pytest.param("adam", "bfloat16", marks=BROAD),
        pytest.param("adam", "8-bit", marks=BROAD),
    ],
)
def test_training_goes_where_it_goes_in_float32(name, storage):
    optimizer = RECIPES[name](3e-2)
    _, _, plain = run(optimizer)
    _, _, losses = run(low_memory(optimizer, storage))
    assert plain[0] - plain[-1] > 0.05
    np.testing.assert_allclose(losses[0] - losses[-1], plain[0] - plain[-1], rtol=0.02)


def test_an_average_moves_by_increments_smaller_than_a_step_of_the_code():
    optimizer = low_memory(adam(1e-3, b2=0.999), buffers={"mu": "wide"})
    params = jnp.zeros(SHAPE)
    _, state = optimizer.update(jnp.ones(SHAPE), optimizer.init(params), params)

    def step(state, _):
        return optimizer.update(jnp.ones(SHAPE), state, params)[1], None

    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=999))(state)
    nu = optax.tree.get(state, "nu").astype(jnp.float32)
    np.testing.assert_allclose(nu.mean(), 1 - 0.999**1000, rtol=0.005)


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_no_nan_where_a_second_moment_would_round_to_zero(storage):
    optimizer = low_memory(adam(1e-3, eps=0.0), storage)
    params = jnp.zeros(SHAPE)
    gradient = jnp.where(jnp.arange(256) == 0, 1e3, 1e-9) * jnp.ones(SHAPE)
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(gradient, state, params)
        assert jnp.isfinite(updates).all()
    assert jnp.abs(updates).max() <= 2e-3


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_checkpoints_resume_bit_for_bit(storage):
    optimizer = low_memory(adamod(1e-2), storage)
    params, state, _ = run(optimizer, steps=3)
    fresh = optimizer.init(params)
    by_flax = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    data = adaptive_opt.to_bytes(optimizer, state)
    by_us = adaptive_opt.from_bytes(optimizer, fresh, data)
    for restored in (by_flax, by_us):
        assert_bit_equal(jax.tree.map(jnp.asarray, restored), state)
    with pytest.raises(adaptive_opt.CheckpointMismatch, match="storage"):
        adaptive_opt.from_bytes(
            low_memory(adamod(1e-2), "8-bit", buffers={"mu": "wide"}),
            fresh,
            adaptive_opt.to_bytes(low_memory(adamod(1e-2)), state),
        )


@pytest.mark.broad
@pytest.mark.compiles
@pytest.mark.parametrize("axes", [("x",), (None, "x")])
def test_a_sharded_state_stays_sharded_without_communication(axes):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P(*axes))
    params = jax.device_put(jnp.ones((32, 512)), split)
    optimizer = low_memory(adamod(1e-3), "8-bit")
    state = optimizer.init(params)
    compiled = jax.jit(optimizer.update).lower(params, state, params).compile()
    assert not any(word in compiled.as_text() for word in ("all-gather", "all-reduce", "all-to"))
    for where in (state, compiled(params, state, params)[1]):
        for leaf in arrays_of(where):
            assert leaf.addressable_shards[0].data.size == leaf.size // 2


def test_encoded_zeros_compile_quickly_and_are_zeros():
    state = jax.jit(low_memory(adamod(1e-3), "8-bit").init)(jnp.ones((2048, 2048)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(state))


def test_a_state_of_another_optimizer_and_unknown_storages_are_refused():
    params = jnp.ones(SHAPE)
    with pytest.raises(ValueError, match="needs a LowMemoryState"):
        low_memory(adam(1e-3)).update(params, adam(1e-3).init(params), params)
    with pytest.raises(ValueError, match="storage must be one of 'bfloat16', '8-bit'"):
        low_memory(adam(1e-3), "int4")
    with pytest.raises(ValueError, match="storage of 'mu' must be one of"):
        low_memory(adam(1e-3), buffers={"mu": "8-bit"})
    with pytest.raises(ValueError, match="min_size must be"):
        low_memory(adam(1e-3), min_size=0)
    for buffers in ({"typo": "wide"}, {"kernel": "wide"}):
        with pytest.raises(ValueError, match=r"buffers names '(typo|kernel)', .* count, mu, nu\."):
            low_memory(adam(1e-3), buffers=buffers).init({"kernel": params})
    with pytest.raises(TypeError, match="low_memory takes an optimizer"):
        low_memory(None)
    own = optax.trace(0.9, accumulator_dtype=jnp.uint16)
    with pytest.raises(ValueError, match="has a uint16 array"):
        low_memory(own).init(params)


# --- names, sizes, and dtypes of its own ----------------------------------------------------------


class Named(NamedTuple):
    """Parameters with the names of buffers, as attributes."""

    mu: jax.Array
    slow: jax.Array


@pytest.mark.parametrize("params", [Named(*jnp.ones((2, *SHAPE))), {"mu": jnp.ones(SHAPE)}])
def test_names_of_parameters_are_not_names_of_buffers(params):
    state = low_memory(adamod(1e-3), "8-bit").init(params).inner_state[0].buffers
    assert {x.dtype for x in jax.tree.leaves(state["rate_ema"])} == {jnp.dtype(jnp.bfloat16)}
    trace = low_memory(optax.trace(0.9)).init(params).inner_state.trace
    assert {x.dtype for x in jax.tree.leaves(trace)} == {jnp.dtype(jnp.bfloat16)}
    accumulated = optax.MultiSteps(optax.sgd(1e-3), 2).gradient_transformation()
    sums = low_memory(accumulated, "8-bit").init(params).inner_state.acc_grads
    assert {x.dtype for x in jax.tree.leaves(sums)} == {jnp.dtype(jnp.bfloat16)}


def test_names_are_found_inside_of_wrappers():
    by_group = optax.partition({"a": adamod(1e-3), "b": optax.adam(1e-3)}, {"x": "a", "y": "b"})
    optimizer = low_memory(optax.chain(optax.clip(1.0), by_group), "8-bit", buffers={"nu": "wide"})
    groups = optimizer.init(dict.fromkeys("xy", jnp.ones(SHAPE))).inner_state[1].inner_states
    ours, theirs = (groups[name].inner_state[0] for name in "ab")
    assert ours.buffers["mu"]["x"].codes.dtype == theirs.mu["y"].codes.dtype == jnp.int8
    assert ours.buffers["nu"]["x"].dtype == theirs.nu["y"].dtype == jnp.float32


OWN = jnp.asarray(np.random.default_rng(3).standard_normal(5000), jnp.bfloat16)


@pytest.mark.parametrize(
    "inner",
    [
        optax.sgd(1e-2, momentum=0.9),
        optax.apply_if_finite(optax.sgd(1e-2, momentum=0.9), 2),
    ],
    ids=["sgd", "apply_if_finite"],
)
@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_bfloat16_arrays_of_the_optimizer_inside_are_left_alone(inner, storage):
    optimizer = low_memory(inner, storage)
    ours, plain = optimizer.init(OWN), inner.init(OWN)
    for _ in range(3):
        updates, ours = jax.jit(optimizer.update)(OWN, ours, OWN)
        expected, plain = jax.jit(inner.update)(OWN, plain, OWN)
        assert_bit_equal(updates, expected)
    assert_bit_equal(codecs.decoded(ours.inner_state), plain)


@pytest.mark.compiles
def test_a_state_with_arrays_of_its_own_is_saved_mapped_and_donated(tmp_path):
    optimizer = low_memory(optax.sgd(1e-2, momentum=0.9))
    params = {"half": OWN, "whole": jnp.ones(SHAPE)}
    _, state = optimizer.update(params, optimizer.init(params), params)
    trace = state.inner_state[0].trace
    assert (trace["half"].dtype, trace["whole"].dtype) == (jnp.uint16, jnp.bfloat16)

    fresh = optimizer.init(params)
    by_flax = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    by_us = adaptive_opt.from_bytes(optimizer, fresh, adaptive_opt.to_bytes(optimizer, state))
    with ocp.StandardCheckpointer() as saver:
        saver.save(tmp_path / "state", state)
        saver.wait_until_finished()
        by_orbax = saver.restore(tmp_path / "state", fresh)
    for restored in (by_flax, by_us, by_orbax):
        assert_bit_equal(jax.tree.map(jnp.asarray, restored), state)

    shapes = {"half": "a spec", "whole": "another"}
    mapped = optax.tree_map_params(optimizer, lambda _, spec: spec, state, shapes)
    assert mapped.inner_state[0].trace == shapes
    step = jax.jit(optimizer.update, donate_argnums=1).lower(params, state, params).compile()
    assert step.memory_analysis().alias_size_in_bytes >= nbytes(state)
    step(params, by_orbax, params)


def test_low_memory_around_low_memory_goes_on_as_one():
    params = jnp.ones(SHAPE)
    optimizer = low_memory(low_memory(adam(1e-2), "8-bit"), min_size=1)
    state = optimizer.init(params)
    assert nbytes(state) == nbytes(low_memory(adam(1e-2), "8-bit").init(params))
    structure = jax.tree.structure(state)
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(params, state, params)
    assert jax.tree.structure(state) == structure
    np.testing.assert_allclose(updates, -1e-2, rtol=0.05)


def types_of(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype), state)


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_a_stack_of_states_keeps_its_storage_under_vmap(storage):
    params = jnp.ones((8, 1024))
    optimizer = low_memory(adam(1e-2), storage)
    state = optimizer.init(params)
    axes = jax.tree.map(lambda x: 0 if x.ndim else None, state)
    update = jax.jit(jax.vmap(optimizer.update, in_axes=(0, axes, 0), out_axes=(0, axes)))
    updates, new = update(params, state, params)
    assert types_of(new) == types_of(state)
    np.testing.assert_allclose(updates, -1e-2, rtol=0.02)


# --- over devices ---------------------------------------------------------------------------------

WIDE_SHAPE = (8, 2048)


def mesh_of(n):
    return jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def by_hand(optimizer, mesh, spec):
    """``update`` under shard_map, for gradients and parameters of one spec."""
    specs = state_shardings(optimizer, jnp.ones(WIDE_SHAPE), spec)
    return jax.jit(
        jax.shard_map(
            optimizer.update,
            mesh=mesh,
            in_specs=(spec, specs, spec),
            out_specs=(spec, specs),
            check_vma=False,
        )
    )


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
@pytest.mark.parametrize("spec", [jax.P(None, "data"), pytest.param(jax.P("data"), marks=BROAD)])
def test_the_storage_stays_under_shard_map_where_a_part_is_small(storage, spec):
    params = jnp.linspace(-1.0, 1.0, 8 * 2048).reshape(WIDE_SHAPE)
    optimizer = low_memory(adam(1e-2), storage)
    state = optimizer.init(params)
    update = by_hand(optimizer, mesh_of(8), spec)
    _, new = update(params, state, params)
    assert types_of(new) == types_of(state)
    _, expected = optimizer.update(params, state, params)
    found, expected = (codecs.decoded(x.inner_state)[0] for x in (new, expected))
    # But for the noise, the same scales for the same weights: each at most a step of the code off.
    np.testing.assert_allclose(found.mu, expected.mu, atol=0.1 * 2 / 127)
    roots = jnp.sqrt(found.nu), jnp.sqrt(expected.nu)
    np.testing.assert_allclose(*roots, atol=0.001**0.5 * 2 / 255)
    assert update(params, new, params)[1].count == 2


@pytest.mark.broad
@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_zero1_under_shard_map_keeps_the_storage(storage):
    mesh = mesh_of(8)
    params = jax.device_put(jnp.ones(WIDE_SHAPE), jax.NamedSharding(mesh, jax.P()))
    optimizer = zero1(low_memory(adam(1e-2), storage), mesh)
    state = optimizer.init(params)
    updates, new = by_hand(optimizer, mesh, jax.P())(params, state, params)
    assert types_of(new) == types_of(state)
    assert nbytes(state) <= {"bfloat16": 0.5, "8-bit": 0.26}[storage] * 2 * params.nbytes
    np.testing.assert_allclose(updates, -1e-2, rtol=0.02)


def test_parts_that_are_no_whole_blocks_are_refused_by_name():
    params = jnp.ones((16, 300))
    optimizer = low_memory(adam(1e-2), "8-bit")
    specs = state_shardings(optimizer, params, jax.P("data"))
    update = jax.shard_map(
        optimizer.update,
        mesh=mesh_of(8),
        in_specs=(jax.P("data"), specs, jax.P("data")),
        out_specs=(jax.P("data"), specs),
    )
    with pytest.raises(ValueError, match="last dimension of every part is a multiple of 256"):
        update(params, optimizer.init(params), params)


def test_scales_are_split_with_their_codes_where_blocks_are_whole():
    params = {"aligned": jnp.ones(WIDE_SHAPE), "short": jnp.ones((32, 250)), "flat": jnp.ones(8192)}
    mesh = mesh_of(8)

    def specs(spec, mesh=None):
        at = jax.NamedSharding(mesh, spec) if mesh else spec
        scales = state_shardings(low_memory(adam(1e-3), "8-bit"), params, at)
        scales = scales.inner_state[0].nu
        return {k: tuple(getattr(x.scales, "spec", x.scales)) for k, x in scales.items()}

    rows = {"aligned": ("data",), "short": (), "flat": ("data",)}
    assert specs(jax.P("data")) == specs(jax.P("data"), mesh) == rows
    params = {"aligned": jnp.ones(WIDE_SHAPE), "split": jnp.ones((32, 512))}
    columns = specs(jax.P(None, "data"), mesh)
    assert columns == {"aligned": (None, "data"), "split": (None, None)}


def test_a_fully_sharded_training_step_is_compiled_once():
    split = jax.NamedSharding(mesh_of(8), jax.P("data"))
    params = {"kernel": jnp.ones((16, 1024)), "bias": jnp.ones(16)}
    params = jax.device_put(params, split)
    optimizer = low_memory(adamw(1e-3), "8-bit")
    state = init_sharded(optimizer, params)
    step = train_step(lambda p, x: jnp.sum((p["kernel"] @ x + p["bias"]) ** 2), optimizer)
    for _ in range(3):
        params, state, _ = step(params, state, jnp.ones(1024))
    assert step._cache_size() == 1
    scales = state.inner_state[0].nu["kernel"].scales
    assert scales.addressable_shards[0].data.size == scales.size // 8


# --- moving ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_a_state_is_decoded_to_be_converted(storage):
    params = jnp.ones(SHAPE)
    source = low_memory(adam(1e-3), storage)
    _, state = source.update(params, source.init(params), params)
    moved = convert_state(state, source, adamod(1e-3), params)[0].buffers
    inside = codecs.decoded(state.inner_state)[0]
    assert_bit_equal((moved["mu"], moved["nu"]), (inside.mu, inside.nu))
