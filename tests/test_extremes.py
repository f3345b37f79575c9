"""Gradients whose squares are finite make no NaN and no infinity, and no weight stands still.

One program per recipe: leaves of every dtype side by side, each with a weight for every course that
gradients may take, and one that has only ever seen ordinary ones to compare with.
"""

from __future__ import annotations

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import (
    EVERY_CONVENTION,
    FEW_CONVENTIONS,
    FEW_OFTEN,
    FEWER_CONVENTIONS,
    NEED_PARAMS,
    RECIPES,
    assert_bit_equal,
    broadly,
    buffers_of,
)

import adaptive_opt
from adaptive_opt import adam, low_memory, sgd, skip_nonfinite
from adaptive_opt.core.finite import squarable
from adaptive_opt.memory import codecs
from adaptive_opt.stages.moments import absolute_square

DTYPES = {
    "bfloat16": jnp.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
    "complex64": np.complex64,
}
EXTREME, ALL, LATE = 24, 2600, slice(-12, None)
"""The steps with extreme gradients, all steps, and those at which they are forgotten."""

# From the square of the largest float64 to ordinary numbers in 2,600 steps.
SHORT = {"b1": 0.5, "b2": 0.7, "rho": 0.7, "b3": 0.5, "len_memory": 2, "momentum": 0.5}
SHORT |= {"sync_period": 2, "rest_b1": 0.5, "rest_b2": 0.7, "decay_rate": 0.1}
NEVER_FORGET = ("sum_of_squares", "nu_max", "z")
"""Buffers that only grow: one extreme gradient lowers the rate of its weight for good. And a place,
to which one step far away leads, while the parameters stay where they are in this test."""
FALLS_BY_SUMS = ("yogi",)
"""Recipes whose second moment falls by the squares that come, each lost in the rounding of it."""


def courses(dtype, steps, rng):
    """The gradients of a real dtype: a name for each weight, an array of steps by weights."""
    info, time = jnp.finfo(dtype), np.arange(steps)
    wide = jnp.finfo(jnp.promote_types(dtype, np.float32))
    largest = min(
        float(info.max), float(wide.max) ** 0.5 / 32
    )  # so that sums of squares are finite
    ordinary = 1 + 0.5 * np.sin(np.arange(ALL))
    exponents = rng.uniform(np.log2(float(info.tiny)), np.log2(largest), (3, steps))
    sizes = {
        "zeros": 0.0 * time,
        "the smallest": float(info.smallest_subnormal) + 0 * time,
        "the smallest normal": float(info.tiny) + 0 * time,
        "the root of the smallest": np.sqrt(float(info.tiny)) + 0 * time,
        "the largest": largest + 0 * time,
        "minus the largest": -largest + 0 * time,
        "alternating": largest * (-1.0) ** time,
        "the largest once": np.where(time == 0, largest, ordinary[:steps]),
        "the largest at last": np.where(time == steps - 1, largest, ordinary[:steps]),
        "the root of the largest": np.sqrt(largest) + 0 * time,
        "half of the largest": largest / 2 + 0 * time,
        "every size": 2.0 ** exponents[0],
        "every size and sign": 2.0 ** exponents[1] * rng.choice([-1, 1], steps),
        "every size, and zeros": 2.0 ** exponents[2] * rng.integers(0, 2, steps),
        "ordinary": ordinary[:steps],
    }
    return list(sizes), np.stack([*sizes.values()], axis=1), ordinary


def gradients(names, steps=ALL):
    rng, found = np.random.default_rng(0), {}
    for name in names:
        dtype = DTYPES[name]
        part = jnp.finfo(dtype).dtype
        weights, early, ordinary = courses(part, EXTREME, rng)
        late = np.broadcast_to(ordinary[EXTREME:steps, None], (steps - EXTREME, len(weights)))
        both = np.concatenate([early, late])
        both[: -steps // 5, weights.index("zeros")] = 0
        both = np.asarray(both).astype(part)
        if dtype == np.complex64:  # a large and an ordinary part, two large ones, ...
            both = both + 1j * np.roll(both, 1, axis=1)
            both[:, -2:] = (1 + 1j) * np.asarray(ordinary[:steps, None])
        found[name] = both.astype(dtype)
    return weights, found


def make(name):
    """A recipe with short memories, and without decay."""
    takes = inspect.signature(adaptive_opt.RECIPES[name.split()[0]]).parameters
    settings = {k: v for k, v in SHORT.items() if k in takes}
    if name.split()[0] in NEED_PARAMS:
        settings["weight_decay"] = 0.0
    return EVERY_CONVENTION[name](1e-3, **settings)


def is_finite(*trees):
    inexact = (x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, np.inexact))
    return jnp.stack([jnp.isfinite(x).all() for x in inexact]).all()


def run(optimizer, gradients):
    """The last state, all updates, and whether everything was finite all the time."""
    params = jax.tree.map(lambda g: jnp.full(g.shape[1:], 0.5, g.dtype), gradients)

    def step(state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return state, (updates, is_finite(state, updates))

    scan = jax.jit(functools.partial(jax.lax.scan, step))
    state, (updates, finite) = jax.device_get(scan(optimizer.init(params), gradients))
    return state, updates, bool(finite.all())


def assert_forgotten(weights, updates):
    """In the end every weight moves as the one does that has seen nothing else."""
    for dtype, u in updates.items():
        late = np.abs(u[LATE].astype(np.complex128)).mean(axis=(0, *range(2, u.ndim)))
        ratio = late / late[weights.index("ordinary")]
        slow = {w: float(r) for w, r in zip(weights, ratio, strict=True) if not 0.1 < r < 10}
        assert not slow, dtype


@pytest.mark.parametrize("name", FEWER_CONVENTIONS)
def test_extreme_gradients_make_nothing_infinite_and_are_forgotten(name, x64):
    weights, given = gradients(("float16", "float32", "float64", "complex64"))
    state, updates, finite = run(make(name), given)
    assert finite
    never = set(buffers_of(state)) & set(NEVER_FORGET) or name.split()[0] in FALLS_BY_SUMS
    if not never:
        assert_forgotten(weights, updates)


@pytest.mark.parametrize("name", FEW_OFTEN)
def test_extreme_gradients_make_nothing_infinite_where_nothing_is_compiled(name):
    _, given = gradients(("bfloat16", "float32"), EXTREME)
    params = jax.tree.map(lambda g: jnp.full(g.shape[1:], 0.5, g.dtype), given)
    optimizer = make(name)
    state = optimizer.init(params)
    for t in (0, 1, EXTREME - 1):
        gradient = jax.tree.map(lambda g, t=t: jnp.asarray(g[t]), given)
        updates, state = optimizer.update(gradient, state, params)
        assert is_finite(updates, state), t


@pytest.mark.parametrize("name", FEW_CONVENTIONS)
def test_where_squares_overflow_nothing_is_a_nan_and_the_guard_leaves_all_as_it_was(name):
    x, gradient = jnp.full(3, 0.5), jnp.array([1e30, -3e38, 1.0])
    plain, guarded = make(name), skip_nonfinite(make(name))
    update, state = jax.jit(plain.update)(gradient, plain.init(x), x)
    assert not any(np.isnan(leaf).any() for leaf in jax.tree.leaves((update, state)))
    step, before = jax.jit(guarded.update), guarded.init(x)
    update, after = step(gradient, before, x)
    assert int(after.total) == (not is_finite(state, plain.update(gradient, plain.init(x), x)[0]))
    if after.total:
        assert_bit_equal(after.inner_state, before.inner_state)
        assert not np.any(update)
    update, after = step(jnp.ones(3), after, x)
    assert is_finite(update, after)


@pytest.mark.parametrize("dtype", [np.float32, np.complex64])
def test_the_square_of_what_is_squarable_is_finite(dtype):
    largest = jnp.finfo(dtype).max
    x = jnp.asarray([largest, -largest, 1.0]).astype(dtype)
    x = x * (1 + 1j) if jnp.iscomplexobj(x) else x
    square = absolute_square(squarable(x))
    assert jnp.isfinite(square).all()
    assert square[0] > float(largest) / 3
    assert squarable(x)[2] == x[2]


def test_what_is_too_large_for_fewer_bits_becomes_their_largest_number():
    """An update in the parameter's dtype, and a buffer in the state's; infinity stays infinity."""
    x = jnp.ones(3, jnp.float16)
    update, _ = sgd(1e6).update(jnp.array([1.0, -1.0, jnp.inf], jnp.float16), sgd(1e6).init(x), x)
    assert list(update) == [-65504, 65504, -np.inf]
    largest = float(jnp.finfo(jnp.float32).max)
    optimizer = adam(1e-3, b1=0.0, state_dtype=jnp.bfloat16)
    x = jnp.ones(2)
    _, state = optimizer.update(jnp.array([largest, -jnp.inf]), optimizer.init(x), x)
    assert list(buffers_of(state)["mu"]) == [jnp.finfo(jnp.bfloat16).max, -np.inf]


def test_after_10000_zero_gradients_every_recipe_moves():
    """All in one program. Nothing moves before."""
    zeros, params = 10_000, jnp.full(3, 0.5)
    optimizers = {name: make(name) for name in RECIPES}
    given = jnp.concatenate([jnp.zeros((zeros, 3)), jnp.ones((100, 3))])

    def step(states, gradient):
        moved = {n: tx.update(gradient, states[n], params) for n, tx in optimizers.items()}
        return {n: s for n, (_, s) in moved.items()}, {n: u for n, (u, _) in moved.items()}

    states = {name: tx.init(params) for name, tx in optimizers.items()}
    states, updates = jax.jit(functools.partial(jax.lax.scan, step))(states, given)
    assert is_finite(states, updates)
    for name, u in updates.items():
        assert not np.any(u[:zeros]), name
        assert np.all(np.abs(u[-1]) > 1e-6), name


ROWS = 256  # of equal weights: one block of 8 bits each


@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
@pytest.mark.parametrize(
    "name",
    broadly(("diffmod",), ("adam", "amsgrad", "adagrad", "diffmod", "adamax", "sgd")),
)
def test_extreme_gradients_are_encoded_without_an_infinity(name, storage):
    weights, given = gradients(("float32",), 400)
    given = jax.tree.map(lambda g: np.repeat(g[:, :, None], ROWS, axis=2), given)
    state, updates, finite = run(low_memory(make(name), storage, min_size=1), given)
    assert finite
    assert is_finite(codecs.decoded(state.inner_state))
    if name not in ("amsgrad", "adagrad"):
        assert_forgotten(weights, updates)
