"""The stages beyond Adam: rectifier, scopes, restarts, one-cycle."""

from __future__ import annotations

import decimal
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, buffers_of, gradient_trees, normal_tree, train
from jax.sharding import PartitionSpec as P

import adaptive_opt
from adaptive_opt import (
    adam,
    adamod_momental_bound,
    adamw,
    adaptive,
    amsgrad_max,
    debias,
    first_moment,
    heavy_ball,
    normalized_weight_decay,
    one_cycle,
    per_weight_rate,
    radam_rectifier,
    rmsprop,
    second_moment,
    sgd,
    uniform_rate,
    warm_restarts,
)

# --- RAdam ---------------------------------------------------------------------------------------


def exact_factor(b2: float, t: int) -> float:
    """RAdam's r_t to 50 digits; 1 below the threshold."""
    with decimal.localcontext(prec=50):
        b = decimal.Decimal(b2)
        limit = 2 / (1 - b) - 1
        rho = limit - 2 * t * b**t / (1 - b**t)
        if rho < 5:
            return 1.0
        factor = (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho)
        return float(factor.sqrt())


def factors_of(update_of, steps):
    rule = update_of
    one = jnp.ones(())

    def step(state, _):
        update, state = rule.update(one, state)
        return state, update

    return jax.jit(lambda s: jax.lax.scan(step, s, None, steps)[1])(rule.init(one))


@pytest.mark.parametrize("b2", [0.9, 0.99, 0.999, 0.9999])
def test_the_rectifier_is_within_1e_6_of_the_exact_rule_in_float32(b2):
    rule = adaptive(uniform_rate(1.0), radam_rectifier(b2))
    actual = factors_of(rule, 2000)
    assert actual.dtype == jnp.float32
    expected = [exact_factor(b2, t) for t in range(1, 2001)]
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_the_rectifier_of_optax_is_half_a_percent_off_at_steps_6_and_7():
    # What the docstring of radam says of it: with the same moments, all of it is in the factor.
    ours, theirs = (
        factors_of(tx, 10) for tx in (adaptive_opt.radam(1.0, convention="optax"), optax.radam(1.0))
    )
    assert np.all(np.abs(theirs[5:7] / ours[5:7] - 1) > 3e-3)
    np.testing.assert_allclose(theirs[:5], ours[:5], rtol=1e-5)


def test_the_rectified_count_saturates_at_one():
    rule = adaptive(uniform_rate(1.0), radam_rectifier(0.999))
    state = rule.init(jnp.ones(()))._replace(count=jnp.int32(2**31 - 1))
    np.testing.assert_allclose(rule.update(jnp.ones(()), state)[0], 1.0, rtol=1e-6)


def test_an_average_too_short_to_rectify_never_is():
    rule = adaptive(uniform_rate(1.0), radam_rectifier(0.5))  # the limit is 3, below the threshold
    np.testing.assert_array_equal(factors_of(rule, 50), 1.0)


def test_below_the_threshold_the_reference_stands_still_and_the_others_do_not():
    x, g = jnp.ones(1), jnp.full(1, 3.0)
    moved = {}
    for convention in ("torch", "optax", "reference"):
        tx = adaptive_opt.radam(0.1, convention=convention, weight_decay=0.5)
        moved[convention] = train(tx, x, [g] * 5)[0] - x
    assert moved["reference"] == 0
    assert moved["torch"] < -1
    assert moved["optax"] < -1
    reference = adaptive_opt.radam(0.1, convention="reference", weight_decay=0.5)
    assert train(reference, x, [g] * 6)[0] < x


def test_the_l2_term_of_the_reference_is_in_the_moments_from_the_first_step():
    # Below the threshold nothing moves, but what the moments see is g + wd x, as it is later.
    x = jnp.full(1, 2.0)
    tx = adaptive_opt.radam(0.1, convention="reference", weight_decay=0.5, decay="l2")
    params, state, _ = train(tx, x, [jnp.full(1, 3.0)] * 5)
    assert params == x
    np.testing.assert_allclose(optax.tree.get(state, "mu"), (1 - 0.9**5) * 4.0, rtol=1e-6)


@pytest.mark.parametrize("threshold", [3.0, math.nan, math.inf])
def test_the_rectifier_is_told_a_threshold_at_which_it_is_defined(threshold):
    with pytest.raises(ValueError, match="threshold must be finite and at least 4, got"):
        adaptive_opt.radam(0.1, threshold=threshold)


# --- Granularity ----------------------------------------------------------------------------------


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def test_with_the_scope_of_the_tree_the_update_is_parallel_to_the_gradient(x64):
    for reduce in ("sum", "mean"):
        tx = rmsprop(0.1, scope="tree", reduce=reduce)
        state = tx.init(normal_tree(dtype=np.float64))
        for gradient in gradient_trees(5, np.float64):
            update, state = tx.update(gradient, state)
            u, g = flat(update), flat(gradient)
            cosine = u @ g / np.linalg.norm(u) / np.linalg.norm(g)
            np.testing.assert_allclose(cosine, -1.0, rtol=1e-14)


def test_with_the_scope_of_a_tensor_each_tensor_keeps_its_direction(x64):
    tx = rmsprop(0.1, scope="tensor")
    state = tx.init(normal_tree(dtype=np.float64))
    for gradient in gradient_trees(5, np.float64):
        update, state = tx.update(gradient, state)
        for u, g in zip(*map(jax.tree.leaves, (update, gradient)), strict=True):
            u, g = np.ravel(u), np.ravel(g)
            product = np.linalg.norm(u) * np.linalg.norm(g)
            np.testing.assert_allclose(u @ g, -product, rtol=1e-14)


def test_without_memory_it_is_sign_descent_normalised_by_tensor_or_tree(x64):
    gradient = normal_tree(dtype=np.float64)
    norm = np.linalg.norm(flat(gradient))
    expected = {
        "weight": jax.tree.map(np.sign, gradient),
        "tensor": jax.tree.map(lambda g: g / np.linalg.norm(np.ravel(g)), gradient),
        "tree": jax.tree.map(lambda g: g / norm, gradient),
    }
    for scope, direction in expected.items():
        tx = rmsprop(1.0, b2=0.0, eps=0.0, scope=scope)
        update, _ = tx.update(gradient, tx.init(gradient))
        np.testing.assert_allclose(flat(update), -flat(direction), rtol=1e-14)


def test_the_mean_is_the_sum_over_the_number_of_weights(x64):
    gradient = normal_tree(dtype=np.float64)
    for scope, n in (("tensor", {"scale": 1}), ("tree", {"scale": 17 * 9 + 9 + 1})):
        nu = {}
        for reduce in ("sum", "mean"):
            rule = adaptive(second_moment(0.0, scope=scope, reduce=reduce), per_weight_rate(1e-8))
            nu[reduce] = rule.update(gradient, rule.init(gradient))[1].buffers["nu"]
        ratio = (
            nu["sum"] / nu["mean"] if scope == "tree" else nu["sum"]["scale"] / nu["mean"]["scale"]
        )
        np.testing.assert_allclose(ratio, n["scale"], rtol=1e-14)


SCOPED = {
    "adam": lambda scope: [first_moment(0.9), second_moment(0.9, scope=scope), debias(0.9, 0.9)],
    "amsgrad": lambda scope: [
        first_moment(0.9),
        second_moment(0.9, scope=scope),
        amsgrad_max(),
        debias(0.9, 0.9),
    ],
    "adamod": lambda scope: [
        first_moment(0.9),
        second_moment(0.9, scope=scope),
        debias(0.9, 0.9),
    ],
}


@pytest.mark.parametrize("name", SCOPED)
@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_a_scope_works_in_adam_amsgrad_and_adamod_with_reduced_buffers(name, scope, x64):
    stages = [*SCOPED[name](scope), per_weight_rate(1e-8)]
    stages += [adamod_momental_bound(0.9)] if name == "adamod" else []
    rule = adaptive(*stages)
    params = normal_tree(dtype=np.float64)
    gradients = list(gradient_trees(10, np.float64))
    _, state, history = train(rule, params, gradients)
    for buffer in ("nu", "nu_max", "rate_ema"):
        if buffer in state.buffers:
            shapes = {np.shape(leaf) for leaf in jax.tree.leaves(state.buffers[buffer])}
            assert shapes == {()}
            count = len(jax.tree.leaves(state.buffers[buffer]))
            assert count == (1 if scope == "tree" and buffer == "nu" else 3)
    # The same with NumPy, one number for each tensor or for all.
    m = jax.tree.map(np.zeros_like, params)
    v, largest, s = (np.zeros(3) for _ in range(3))
    for t, (gradient, (_, update)) in enumerate(zip(gradients, history, strict=True), 1):
        leaves = jax.tree.leaves(gradient)
        squares = np.array([np.sum(np.asarray(g) ** 2) for g in leaves])
        squares = np.full(3, squares.sum()) if scope == "tree" else squares
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * np.asarray(g), m, gradient)
        v = 0.9 * v + (1 - 0.9) * squares
        largest = np.maximum(largest, v)
        used = largest if name == "amsgrad" else v
        rate = 1 / (np.sqrt(used / (1 - 0.9**t)) + 1e-8)
        s = 0.9 * s + (1 - 0.9) * rate
        rate = np.minimum(rate, s) if name == "adamod" else rate
        for i, (a, b) in enumerate(zip(*map(jax.tree.leaves, (update, m)), strict=True)):
            np.testing.assert_allclose(a, b / (1 - 0.9**t) * rate[i], rtol=1e-12)


def test_under_partition_the_tree_is_the_group():
    x = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = rmsprop(1.0, b2=0.0, eps=0.0, scope="tree")
    together, _ = tx.update(x, tx.init(x), x)
    np.testing.assert_allclose(together["a"], -0.6, rtol=1e-6)
    groups = optax.partition({"a": tx, "b": tx}, {"a": "a", "b": "b"})
    apart, _ = groups.update(x, groups.init(x), x)
    np.testing.assert_allclose(apart["a"], -1.0, rtol=1e-6)


@pytest.mark.broad
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_under_shard_map_a_reduced_scope_sums_over_the_axes_it_is_told(reduce):
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    g = jnp.arange(1.0, 9.0)

    def update(axis_name):
        tx = rmsprop(1.0, scope="tree", reduce=reduce, axis_name=axis_name)

        def local(g):
            return tx.update(g, tx.init(g))[0]

        return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("d"), out_specs=P("d")))(g)

    whole = rmsprop(1.0, scope="tree", reduce=reduce)
    expected, _ = whole.update(g, whole.init(g))
    np.testing.assert_allclose(update("d"), expected, rtol=1e-6)
    assert not np.allclose(update(()), expected)  # each device for itself, because it was said so
    with pytest.raises(ValueError, match="runs over the axes d of shard_map"):
        update(None)
    plain = adam(1.0)  # a rate for every weight needs no axis
    jax.shard_map(
        lambda g: plain.update(g, plain.init(g))[0], mesh=mesh, in_specs=P("d"), out_specs=P("d")
    )(g)


@pytest.mark.parametrize("scope", ["tensor", "tree"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_under_shard_map_what_every_device_has_is_counted_once(scope, reduce):
    mesh = jax.make_mesh((2, 2), ("d", "e"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    g = {"kernel": jnp.arange(1.0, 9.0), "bias": jnp.array([10.0]), "wide": jnp.full((2, 4), 2.0)}
    specs = {"kernel": P("d"), "bias": P(), "wide": P("e", "d")}
    whole = rmsprop(1.0, b2=0.0, eps=0.0, scope=scope, reduce=reduce)
    local = rmsprop(1.0, b2=0.0, eps=0.0, scope=scope, reduce=reduce, axis_name=("d", "e"))
    expected, _ = whole.update(g, whole.init(g))

    def update(g):
        return local.update(g, local.init(g))[0]

    mapped = jax.shard_map(update, mesh=mesh, in_specs=(specs,), out_specs=specs)
    actual = jax.jit(mapped)(g)
    np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-6)
    if (scope, reduce) == ("tree", "sum"):
        np.testing.assert_allclose(actual["bias"], -10 / np.sqrt(204 + 100 + 32), rtol=1e-6)


@pytest.mark.broad
def test_where_jax_does_not_track_what_is_split_every_leaf_counts_as_split():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    g = {"a": jnp.arange(1.0, 9.0), "b": jnp.arange(8.0)}
    whole = rmsprop(1.0, scope="tree", reduce="mean")
    local = rmsprop(1.0, scope="tree", reduce="mean", axis_name="d")
    expected, _ = whole.update(g, whole.init(g))

    def update(g):
        return local.update(g, local.init(g))[0]

    untracked = jax.shard_map(
        update, mesh=mesh, in_specs=P("d"), out_specs=P("d"), check_vma=False
    )(g)
    parts = jax.tree.map(lambda x: x.reshape(4, 2), g)
    mapped = jax.vmap(update, axis_name="d")(parts)
    for actual in (untracked, mapped):
        np.testing.assert_allclose(flat(actual), flat(expected), rtol=1e-6)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("scope", ["tensor", "tree"])
def test_more_weights_than_fit_an_int32_have_one_rate_too(scope, reduce):
    tx = rmsprop(0.1, scope=scope, reduce=reduce)
    shape = {"w": jax.ShapeDtypeStruct((2**31,), jnp.float32)}
    updates, _ = jax.eval_shape(tx.update, shape, jax.eval_shape(tx.init, shape))
    assert updates == shape


def test_under_jit_with_a_sharded_gradient_the_tree_is_whole():
    mesh = jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    g = jnp.arange(1.0, 9.0)
    sharded = jax.device_put(g, jax.sharding.NamedSharding(mesh, P("d")))
    tx = rmsprop(1.0, scope="tree")
    expected, _ = tx.update(g, tx.init(g))
    actual, _ = jax.jit(tx.update)(sharded, tx.init(sharded))
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_a_wrong_scope_or_reduction_lists_the_right_ones():
    with pytest.raises(ValueError, match="'weight', 'tensor', 'tree', got 'layer'"):
        second_moment(0.9, scope="layer")
    with pytest.raises(ValueError, match="'sum', 'mean', got 'max'"):
        rmsprop(0.1, reduce="max")
    with pytest.raises(ValueError, match='centered=True is defined for scope="weight"'):
        rmsprop(0.1, centered=True, scope="tree")


def test_a_centered_moment_never_goes_below_zero():
    # The variance of a constant is zero, and rounding makes it negative.
    tx = rmsprop(1e-2, b2=0.5, centered=True)
    _, _, history = train(tx, jnp.zeros(3), [jnp.array([0.1, 1 / 3, 1e4])] * 200)
    assert all(np.isfinite(update).all() for _, update in history)


# --- AdaBound -------------------------------------------------------------------------------------


def test_adabound_tends_to_sgd_with_momentum(x64):
    params = normal_tree(dtype=np.float64)
    late = jnp.int32(10**9)
    tx = adaptive_opt.adabound(1e-3, final_learning_rate=0.1)
    state = tx.init(params)
    state = optax.tree.set(state, count=late)
    for gradient in gradient_trees(5, np.float64):
        update, state = tx.update(gradient, state, params)
    mu = optax.tree.get(state, "mu")
    for u, m in zip(*map(jax.tree.leaves, (update, mu)), strict=True):
        np.testing.assert_allclose(u, -0.1 * m, rtol=1e-5)


def test_a_schedule_scales_the_bounds_and_needs_the_rate_they_are_meant_for():
    x = jnp.ones(2)
    warm_up = optax.linear_schedule(0.0, 1e-3, 10)
    arrays = jnp.float32(1e-3), jnp.zeros(())  # as optax.inject_hyperparams gives them
    for rate in (warm_up, lambda _: jnp.float32(1e-3), *arrays, 0.0):
        for recipe in (adaptive_opt.adabound, adaptive_opt.amsbound):
            with pytest.raises(ValueError, match="base_learning_rate must be given"):
                recipe(rate)
    with pytest.raises(ValueError, match="base_learning_rate must be given"):
        optax.inject_hyperparams(adaptive_opt.adabound)(learning_rate=warm_up).init(x)
    tx = adaptive_opt.adabound(warm_up, base_learning_rate=1e-3)
    updates, _ = tx.update(x, tx.init(x), x)
    assert np.all(updates == 0)  # the first rate of the warm-up, and no division by it
    with pytest.raises(ValueError, match="base_learning_rate must be finite and greater than 0"):
        adaptive_opt.adabound(1e-3, base_learning_rate=0.0)
    still = adaptive_opt.adabound(0.0, base_learning_rate=1e-3)
    assert np.all(still.update(x, still.init(x), x)[0] == 0)


def test_the_bounds_of_adabound_are_positive_numbers_and_no_schedules():
    for name in ("final_learning_rate", "base_learning_rate"):
        with pytest.raises(TypeError, match=f"{name} must be a number and not a schedule"):
            adaptive_opt.adabound(1e-3, **{name: optax.constant_schedule(0.1)})
        for wrong in (0.0, -1.0, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be finite and greater than 0"):
                adaptive_opt.amsbound(1e-3, **{name: wrong})


def test_the_three_decays_of_adabound_differ_as_documented():
    x, zero = jnp.full(1, 2.0), jnp.zeros(1)
    moved = {}
    for decay in ("l2", "decoupled", "constant"):
        tx = adaptive_opt.adabound(0.1, weight_decay=0.5, decay=decay)
        moved[decay] = float(tx.update(zero, tx.init(x), x)[0][0])
    assert moved["constant"] == pytest.approx(-0.5 * 2.0)
    assert moved["decoupled"] == pytest.approx(-0.1 * 0.5 * 2.0)
    assert moved["l2"] not in (0.0, moved["constant"], moved["decoupled"])


# --- Restarts and one cycle -----------------------------------------------------------------------


@pytest.mark.parametrize("growth", [1.0, 2.0, 1.5])
def test_warm_restarts_follow_the_formula_of_the_paper(growth, x64):
    period, low, high = 7, 0.1, 0.9
    eta = warm_restarts(period, growth=growth, minimum=low, maximum=high)
    expected, begin, length = [], 0.0, float(period)
    for t in range(100):
        while t >= begin + length:
            begin, length = begin + length, length * growth
        expected.append(low + (high - low) * 0.5 * (1 + math.cos(math.pi * (t - begin) / length)))
    actual = [eta(t) for t in range(100)]
    np.testing.assert_allclose(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.float64])
def test_every_restart_takes_the_maximum_when_compiled(dtype):
    # One program per period, which is a constant in it: that is what tempts a compiler to divide.
    # 41 and 49 are among the periods where a reciprocal in float32 or float64 falls short.
    with jax.enable_x64(dtype == np.float64):
        for period in (*range(2, 12), 41, 47, 49, 55, 61, 82, 98, 103, 107, 161, 1000):
            steps = jnp.asarray(np.arange(50) * period, dtype)
            eta = jax.jit(jax.vmap(warm_restarts(period)))
            np.testing.assert_array_equal(eta(steps), 1.0, f"period {period}")
            assert np.all(eta(steps + (period - 1)) < 0.6), f"period {period}"


@pytest.mark.parametrize("growth", [2, 3])
@pytest.mark.parametrize("x64", [True, pytest.param(False, marks=pytest.mark.broad)])
def test_every_restart_of_growing_periods_takes_the_maximum_when_compiled(growth, x64):
    with jax.enable_x64(x64):
        for period in (1, 7, 41, 49, 1000):
            begins = period * (growth ** np.arange(1, 9) - 1) // (growth - 1)
            eta = jax.jit(jax.vmap(warm_restarts(period, growth=growth)))
            np.testing.assert_array_equal(eta(jnp.asarray(begins)), 1.0, f"period {period}")
            assert np.all(eta(jnp.asarray(begins[1:] - 1)) < 0.6), f"period {period}"


def test_restarts_are_exact_beyond_what_float32_can_count():
    steps = 41 * jnp.arange(50_000_000, 50_000_004)
    np.testing.assert_array_equal(jax.jit(warm_restarts(41))(steps), 1.0)


@pytest.mark.parametrize("growth", [1.0, 2.0])
def test_restarts_that_start_late_go_on_to_the_last_count_of_32_bits(growth, x64):
    """A sum of that count and the start would be negative: the rate would jump."""
    last, start = 2**31 - 1, 5
    eta = jax.jit(jax.vmap(warm_restarts(1000, growth=growth, start=start)))
    plain = jax.jit(jax.vmap(warm_restarts(1000, growth=growth)))
    counts = jnp.asarray([0, 7, last - 6, last - 1, last], jnp.int32)
    # In float64 no sum of the two wraps.
    expected = plain(jnp.asarray(counts, jnp.float64) + start)
    np.testing.assert_allclose(eta(counts), expected, rtol=1e-12)


def test_warm_restarts_agree_with_those_of_optax_where_both_exist():
    cycles = [
        {"init_value": 0.0, "peak_value": 1.0, "decay_steps": n, "warmup_steps": 0} for n in (8, 16)
    ]
    theirs, ours = optax.sgdr_schedule(cycles), warm_restarts(8, growth=2)
    np.testing.assert_allclose(
        [ours(t) for t in range(24)], [theirs(t) for t in range(24)], atol=1e-6
    )


def test_normalised_decay_grows_weaker_as_periods_grow():
    assert normalized_weight_decay(0.5, 100) == pytest.approx(0.05)
    schedule = normalized_weight_decay(0.5, 100, growth=4)
    np.testing.assert_allclose(
        [schedule(t) for t in (0, 99, 100, 499, 500)], [0.05, 0.05, 0.025, 0.025, 0.0125], rtol=1e-6
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda eta, wd: adamw(1e-2, weight_decay=wd, decay="independent", schedule=eta),
        lambda eta, wd: adaptive_opt.nadamw(
            1e-2, weight_decay=wd, decay="independent", schedule=eta
        ),
        lambda eta, wd: adaptive_opt.sgdw(1e-2, weight_decay=wd, schedule=eta),
    ],
    ids=["adamw", "nadamw", "sgdw"],
)
def test_restarts_scale_decay_and_step_alike(make):
    tx = make(warm_restarts(4), normalized_weight_decay(0.5, 4))
    x, zero = jnp.ones(1), jnp.zeros(1)
    state, decays = tx.init(x), []
    for _ in range(6):
        updates, state = tx.update(zero, state, x)
        decays.append(float(updates[0]))
    expected = -0.25 * np.array([1.0, 0.853553, 0.5, 0.146447, 1.0, 0.853553])
    np.testing.assert_allclose(decays, expected, rtol=1e-5)


@pytest.mark.parametrize("form", ["torch", "fastai1", "fastai2", "plateau"])
def test_one_cycle_rises_and_falls_while_the_momentum_does_the_opposite(form):
    cycle = one_cycle(0.1, 200, form=form)
    lr = np.array([cycle.learning_rate(t) for t in range(210)])
    b1 = np.array([cycle.b1(t) for t in range(210)])
    peak = int(np.argmax(lr))
    assert lr[0] == pytest.approx(0.1 / 25)
    assert lr.max() == pytest.approx(0.1)
    assert np.all(np.diff(lr[: peak + 1]) > 0)
    assert np.all(np.diff(lr[peak:]) <= 0)
    assert lr[199] < 1e-3
    assert np.all(lr[200:] <= lr[199] + 1e-9)
    # b1 is the mirror image, scaled.
    np.testing.assert_allclose(
        b1[: peak + 1], 0.95 - 0.1 * (lr[: peak + 1] - lr[0]) / (0.1 - lr[0]), rtol=1e-5
    )
    if form == "plateau":
        assert np.sum(lr > 0.0999) == pytest.approx(120, abs=2)


def test_one_cycle_drives_the_momentum_of_sgd_and_resumes_where_it_was():
    cycle = one_cycle(0.1, 20)
    for make in (
        lambda: sgd(cycle.learning_rate, momentum=cycle.b1),
        lambda: adamw(cycle.learning_rate, b1=cycle.b1),
    ):
        gradients = list(gradient_trees(20))
        params, state, _ = train(make(), normal_tree(), gradients)
        middle, saved, _ = train(make(), normal_tree(), gradients[:9])
        saved = jax.tree.map(np.asarray, saved)  # as from a checkpoint
        resumed, last, _ = train(make(), middle, gradients[9:], saved)
        assert_bit_equal(resumed, params)
        assert_bit_equal(last, state)


def test_cycles_that_make_no_sense_are_refused():
    for arguments, message in (
        ({"total_steps": 1}, "total_steps must be whole and at least 2, got 1"),
        ({"total_steps": 10.5}, "total_steps must be whole and at least 2, got 10.5"),
        ({"total_steps": 10, "pct_start": 1.5}, "pct_start must be between 0 and 1"),
        ({"total_steps": 10, "form": "fastai"}, "'torch', 'fastai1', 'fastai2', 'plateau'"),
        ({"total_steps": 10, "anneal": "exp"}, "'cos', 'linear', got 'exp'"),
        ({"total_steps": 10, "div_factor": 0.5}, "div_factor must be finite and at least 1"),
        ({"total_steps": 10, "max_momentum": 1.0}, r"max_momentum must be in \[0, 1\)"),
        ({"total_steps": 10, "form": "plateau", "plateau": -0.1}, "plateau must be at least 0"),
        ({"total_steps": 10, "form": "plateau", "plateau": 0.95}, "plateau must be at least 0"),
        (
            {"total_steps": 10, "form": "plateau", "pct_start": 0.1, "plateau": 0.9},
            "leave at least a step for the fall, got 0.9 with",
        ),
        ({"total_steps": 10, "plateau": 7.0}, 'plateau= belongs to form="plateau"'),
    ):
        with pytest.raises(ValueError, match=message):
            one_cycle(0.1, **arguments)
    with pytest.raises(ValueError, match='form="keras-adamw" needs growth=1'):
        warm_restarts(10, growth=2, form="keras-adamw")
    with pytest.raises(ValueError, match=r"minimum must be at most maximum, got 0\.5 and 0\.1"):
        warm_restarts(10, minimum=0.5, maximum=0.1)


# --- Momentum -------------------------------------------------------------------------------------


def test_a_heavy_ball_sums_up_to_one_over_one_minus_momentum(x64):
    rule = adaptive(heavy_ball(0.9))
    _, state, history = train(rule, jnp.zeros(1), [jnp.ones(1)] * 400)
    np.testing.assert_allclose(history[-1][1], 10.0, rtol=1e-12)
    assert set(buffers_of(state)) == {"velocity"}


def test_sgd_without_momentum_keeps_no_buffer():
    assert buffers_of(sgd(0.1).init(jnp.ones(1))) == {}
    with pytest.raises(ValueError, match="nesterov and dampening need a momentum"):
        sgd(0.1, nesterov=True)


def test_nadam_in_the_form_of_optax_has_its_state():
    x = normal_tree()
    ours, theirs = adaptive_opt.nadam(1e-3, convention="optax"), optax.nadam(1e-3)
    assert jax.tree.structure(ours.init(x)) == jax.tree.structure(theirs.init(x))
    with pytest.raises(ValueError, match="has no momentum_decay"):
        adaptive_opt.nadam(1e-3, convention="optax", momentum_decay=0.1)


# --- l1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", ["decoupled", "independent"])
@pytest.mark.parametrize("recipe", [adamw, adaptive_opt.nadamw, adaptive_opt.sgdw])
def test_l1_is_multiplied_by_what_the_weight_decay_is(recipe, decay, x64):
    x, gradient = jnp.array([2.0, -0.5, 0.0]), jnp.array([0.3, -1.0, 2.0])
    lr, eta = 0.1, optax.constant_schedule(0.5)
    course = (
        {"learning_rate": lr} if decay == "decoupled" else {"learning_rate": lr, "schedule": eta}
    )
    times = lr if decay == "decoupled" else 0.5
    moved = {}
    for l1 in (None, 0.25):
        tx = recipe(**course, decay=decay, weight_decay=0.01, l1=l1)
        moved[l1] = tx.update(gradient, tx.init(x), x)[0]
    np.testing.assert_allclose(
        moved[0.25] - moved[None], -times * 0.25 * np.sign(x), rtol=1e-12, atol=1e-15
    )


def test_l1_behind_a_recipe_takes_a_turn_of_the_sign_as_documented(x64):
    lr = optax.linear_schedule(0.1, 0.0, 10)
    gradients = list(gradient_trees(6, np.float64))
    behind = optax.chain(
        adam(lr),
        optax.scale(-1.0),
        adaptive_opt.decoupled_l1_decay(0.3, learning_rate=lr),
        optax.scale(-1.0),
    )
    inside = adamw(lr, weight_decay=0.0, l1=0.3)
    ends = [train(tx, normal_tree(dtype=np.float64), gradients)[0] for tx in (behind, inside)]
    np.testing.assert_allclose(flat(ends[0]), flat(ends[1]), rtol=1e-12)


# --- Formulas of which there is no recording ------------------------------------------------------


MATRICES = {"conv": (4, 3, 2), "dense": (5, 3), "bias": (3,), "scale": ()}


def trajectory(step, gradients):
    """The parameters after each step of ``step(t, x, g, memory) -> x``, leaf by leaf, in NumPy."""
    leaves = [
        np.asarray(x) for x in jax.tree.leaves(normal_tree(dtype=np.float64, shapes=MATRICES))
    ]
    memories = [{} for _ in leaves]
    for t, gradient in enumerate(gradients, 1):
        gs = [np.asarray(g) for g in jax.tree.leaves(gradient)]
        leaves = [step(t, x, g, m) for x, g, m in zip(leaves, gs, memories, strict=True)]
        yield leaves


def assert_follows(optimizer, step, steps=30):
    gradients = list(gradient_trees(steps, np.float64, MATRICES))
    params = normal_tree(dtype=np.float64, shapes=MATRICES)
    _, _, history = train(optimizer, params, gradients)
    for (_, updates), expected in zip(history, trajectory(step, gradients), strict=True):
        params = optax.apply_updates(params, updates)
        for a, b in zip(jax.tree.leaves(params), expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


def averages(memory, g, b1, b2):
    memory["m"] = b1 * memory.get("m", 0.0) + (1 - b1) * g
    memory["v"] = b2 * memory.get("v", 0.0) + (1 - b2) * g * g
    return memory["m"], memory["v"]


@pytest.mark.parametrize("centralize", [True, False])
def test_ranger_on_matrices_follows_its_formulas(centralize, x64):
    # Gradient centralisation (arXiv:2004.01461), RAdam (arXiv:1908.03265) with eps beside the root
    # of the raw moment, Lookahead (arXiv:1907.08610).
    lr, b1, b2, eps, wd, k, alpha = 0.01, 0.9, 0.95, 1e-3, 0.5, 4, 0.3

    def step(t, x, g, memory):
        slow = memory.setdefault("slow", x)
        if centralize and g.ndim > 1:
            g = g - g.mean(axis=tuple(range(1, g.ndim)), keepdims=True)
        m, v = averages(memory, g, b1, b2)
        limit = 2 / (1 - b2) - 1
        rho = limit - 2 * t * b2**t / (1 - b2**t)
        moved = m / (1 - b1**t)
        if rho > 5:
            moved = moved * exact_factor(b2, t) * math.sqrt(1 - b2**t) / (np.sqrt(v) + eps)
        x = x - lr * wd * x - lr * moved
        if t % k == 0:
            x = memory["slow"] = slow + alpha * (x - slow)
        return x

    settings = {"sync_period": k, "slow_step_size": alpha, "weight_decay": wd}
    assert_follows(adaptive_opt.ranger(lr, b1, b2, eps, centralize=centralize, **settings), step)


def test_nadamw_in_the_form_of_keras_adamw_follows_its_formulas(x64):
    # Dozat's NAdam with the momentum schedule of Keras 2, and AdamWR's two decays and restarts.
    lr, b1, b2, eps, l1, l2, period = 0.01, 0.9, 0.95, 1e-3, 0.02, 0.1, 7

    def step(t, x, g, memory):
        m, v = averages(memory, g, b1, b2)
        now, ahead = (b1 * (1 - 0.5 * 0.96 ** (0.004 * n)) for n in (t, t + 1))
        product = memory["product"] = memory.get("product", 1.0) * now
        g_corrected, m_corrected = g / (1 - product), m / (1 - product * ahead)
        moved = (1 - now) * g_corrected + ahead * m_corrected
        eta = 0.5 * (1 + math.cos(math.pi * ((t - 1) % period) / period))
        adam_step = lr * moved / (np.sqrt(v / (1 - b2**t)) + eps)
        return x - eta * (adam_step + l2 * x + l1 * np.sign(x))

    settings = {"weight_decay": l2, "l1": l1, "schedule": warm_restarts(period)}
    assert_follows(adaptive_opt.nadamw(lr, b1, b2, eps, decay="independent", **settings), step)


@pytest.mark.parametrize("momentum", [None, 0.8])
def test_rmsprop_in_the_form_of_tf1_follows_its_formulas(momentum, x64):
    lr, decay, eps = 0.01, 0.9, 1e-3

    def step(t, x, g, memory):
        ms = memory["ms"] = decay * memory.get("ms", 1.0) + (1 - decay) * g * g
        mom = (momentum or 0.0) * memory.get("mom", 0.0) + lr * g / np.sqrt(ms + eps)
        memory["mom"] = mom
        return x - mom

    assert_follows(rmsprop(lr, decay, eps, momentum=momentum, convention="tf1"), step)
