"""Telemetry: its numbers are right, nothing changes because of it, it goes where states go."""

from __future__ import annotations

import functools
import warnings

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    AS_USERS,
    EVERY_CONVENTION,
    assert_bit_equal,
    buffers_of,
    gradient_trees,
    normal_tree,
    often,
    one_in,
    train,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import adaptive_opt
from adaptive_opt import (
    Group,
    ParameterGroups,
    adabound,
    adam,
    adamod,
    adamw,
    adaptive,
    amsgrad,
    convert_state,
    describe,
    diffgrad,
    first_moment,
    from_bytes,
    observer,
    one_cycle,
    radam,
    rate_histograms,
    read_telemetry,
    sgd,
    skip_nonfinite,
    telemetry,
    to_bytes,
)
from adaptive_opt.core import waves
from adaptive_opt.watching.tally import BIN_EDGES, QUANTILES

GRADIENTS = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradient_trees(8))
"""Eight steps of them, stacked; 163 weights."""


def scan(optimizer, params, gradients=GRADIENTS):
    """The parameters and the state at the end, and the parameters before every step."""

    def step(carry, gradient):
        updates, state = optimizer.update(gradient, carry[1], carry[0])
        return (optax.apply_updates(carry[0], updates), state), carry[0]

    carry = (params, optimizer.init(params))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, gradients))(carry)


def at(index, tree):
    return jax.tree.map(lambda x: x[index], tree)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


# --- The numbers, against NumPy -------------------------------------------------------------------

LR = optax.linear_schedule(1e-2, 1e-3, 10)
B1, B2, EPS = 0.9, 0.9, 1e-8


def moments(gradients):
    """The learning rate, Adam's moments and its corrections at every step, as columns and rows."""
    m, v = [np.zeros(gradients.shape[1])], [np.zeros(gradients.shape[1])]
    for g in gradients:
        m.append(B1 * m[-1] + (1 - B1) * g)
        v.append(B2 * v[-1] + (1 - B2) * g**2)
    t = np.arange(1, len(gradients) + 1)[:, None]
    return 1e-2 - 9e-4 * (t - 1), np.stack(m[1:]), np.stack(v[1:]), 1 - B1**t, 1 - B2**t


def eps_hat(gradients):
    """The rate with both corrections at every step, and the direction without."""
    lr, m, v, c1, c2 = moments(gradients)
    return lr * np.sqrt(c2) / c1 / (np.sqrt(v) + EPS), m[-1]


def expected_adam(gradients):
    lr, m, v, c1, c2 = (x[-1] for x in moments(gradients))
    rate = lr / (np.sqrt(v / c2) + EPS)
    return {"rate": rate, "step": rate * m / c1}


def expected_adamod(gradients):
    rates, m = eps_hat(gradients)
    s = sum(0.1 * 0.9**k * rate for k, rate in enumerate(rates[::-1]))
    rate = np.minimum(rates[-1], s)
    limited = np.mean(rates[-1] > s)
    return {"rate": rate, "step": rate * m, "limited/adamod_momental_bound": limited}


def expected_amsgrad(gradients):
    largest = moments(gradients)[2].max(axis=0)
    lr, m, v, c1, c2 = (x[-1] for x in moments(gradients))
    rate = lr / (np.sqrt(largest / c2) + EPS)
    return {"rate": rate, "step": rate * m / c1, "limited/amsgrad_max": np.mean(v < largest)}


def expected_adabound(gradients):
    rates, m = eps_hat(gradients)
    t, final = len(rates), 0.1 * (1e-2 - 9e-4 * 7) / 1e-2
    rate = np.clip(rates[-1], final * (1 - 1 / (0.1 * t + 1)), final * (1 + 1 / (0.1 * t)))
    limited = np.mean(rate != rates[-1])
    return {"rate": rate, "step": rate * m, "limited/adabound_dynamic_bound": limited}


def expected_radam(gradients):
    lr, m, v, c1, c2 = (x[-1] for x in moments(gradients))
    longest, t = 2 / (1 - B2) - 1, len(gradients)
    rho = longest - 2 * t * B2**t / (1 - B2**t)
    over = (rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho)
    rate = lr * np.sqrt(c2) / (np.sqrt(v) + EPS) * np.sqrt(over)
    assert rho > 5
    return {"rate": rate, "step": rate * m / c1, "limited/radam_rectifier": 1.0}


def expected_diffgrad(gradients):
    rates, m = eps_hat(gradients)
    friction = 1 / (1 + np.exp(-np.abs(gradients[-2] - gradients[-1])))
    return {"rate": rates[-1], "step": rates[-1] * friction * m, "friction": np.mean(friction)}


def expected_sgd(gradients):
    velocity = 0
    for g in gradients:
        velocity = B1 * velocity + g
    lr = 1e-2 - 9e-4 * (len(gradients) - 1)
    return {"rate": np.full_like(g, lr), "step": lr * velocity}


CASES = {
    "adam": (adam(LR, B1, B2, EPS, observers=telemetry(every=7)), expected_adam),
    "adamod": (adamod(LR, B1, B2, EPS, b3=0.9, observers=telemetry(every=7)), expected_adamod),
    "amsgrad": (amsgrad(LR, B1, B2, EPS, observers=telemetry(every=7)), expected_amsgrad),
    "adabound": (
        adabound(LR, B1, B2, EPS, gamma=0.1, base_learning_rate=1e-2, observers=telemetry(every=7)),
        expected_adabound,
    ),
    "radam": (radam(LR, B1, B2, EPS, observers=telemetry(every=7)), expected_radam),
    "diffgrad": (diffgrad(LR, B1, B2, EPS, observers=telemetry(every=7)), expected_diffgrad),
    "sgd": (sgd(LR, momentum=B1, observers=telemetry(every=7)), expected_sgd),
}


@pytest.mark.parametrize("case", one_in(2, CASES))
def test_the_numbers_are_those_of_a_direct_computation(case, x64):
    """Eight gradients, of which telemetry looks at the first and the last."""
    optimizer, expected = CASES[case]
    params = normal_tree(dtype=np.float64)
    gradients = jax.tree.map(lambda g: g.astype(jnp.float64), GRADIENTS)
    (_, state), history = scan(optimizer, params, gradients)
    seen, histogram = read_telemetry(state), rate_histograms(state)["all"]
    wanted = expected(np.stack([flat(at(t, gradients)) for t in range(8)]))

    rate = wanted["rate"]
    for q in QUANTILES:
        exact = np.quantile(rate.astype(np.float32), q, method="inverted_cdf")
        np.testing.assert_allclose(seen[f"rate/all/q{round(100 * q):02d}"], exact, rtol=2.0**-8)
    first = (10.0**BIN_EDGES).astype(np.float32).view(np.uint32) >> 16 << 16
    edges = np.concatenate([[-np.inf], first.view(np.float32), [np.inf]])
    counts, _ = np.histogram(rate.astype(np.float32), edges)
    np.testing.assert_allclose(histogram, counts / rate.size, atol=1e-7)
    ratio = np.linalg.norm(wanted["step"]) / np.linalg.norm(flat(at(7, history)))
    np.testing.assert_allclose(seen["update_ratio/all"], ratio, rtol=1e-6)
    extra = {k: v for k, v in wanted.items() if k not in ("rate", "step")}
    for key, value in extra.items():
        assert seen[f"{key}/all"] == pytest.approx(value, rel=1e-6)
    others = {k.removesuffix("/all") for k in seen if k.startswith(("limited", "friction"))}
    assert others == set(extra)

    assert seen["step"] == 8
    assert seen["learning_rate"] == pytest.approx(1e-2 - 9e-4 * 7)
    assert seen["b1"] == pytest.approx(B1)


def test_groups_are_counted_apart_and_together_make_the_whole():
    params, gradient = normal_tree(), at(0, GRADIENTS)
    groups = {"kernels": "kernel$", "never": "nothing", "scale": "scale|kernel"}
    optimizer = adam(1e-2, observers=telemetry(groups=groups))
    updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    seen, histograms = read_telemetry(state), rate_histograms(state)
    parts = {"kernels": "kernel", "other": "bias", "scale": "scale"}
    assert set(histograms) == set(parts)
    for group, leaf in parts.items():
        u, x = (tree["dense"].get(leaf, tree["scale"]) for tree in (updates, params))
        ratio = np.linalg.norm(flat(u)) / np.linalg.norm(flat(x))
        np.testing.assert_allclose(seen[f"update_ratio/{group}"], ratio, rtol=1e-5)
    optimizer = adam(1e-2, observers=telemetry())
    _, whole = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    together = (153 * histograms["kernels"] + 9 * histograms["other"] + histograms["scale"]) / 163
    np.testing.assert_allclose(together, rate_histograms(whole)["all"], atol=1e-7)


def test_rates_outside_of_the_bins_and_rates_that_are_no_numbers_are_in_the_outermost():
    lr = jnp.array([0.0, 1e-13, 1e7, jnp.nan])

    @adaptive_opt.stage
    def given_rate():
        return lambda step: step.set(rate=lr)

    bracket = adaptive(given_rate(), telemetry())
    _, state = bracket.update(jnp.ones(4), bracket.init(jnp.ones(4)), jnp.ones(4))
    histogram = rate_histograms(state)["all"]
    assert histogram[0] == histogram[-1] == 0.5
    seen = read_telemetry(state)
    assert seen["rate/all/q01"] == 0
    assert seen["rate/all/q50"] == pytest.approx(1e-13, rel=2.0**-8)
    assert np.isnan(seen["rate/all/q99"])
    assert "learning_rate" not in seen


def test_the_keys_of_histograms_are_the_lower_edges():
    optimizer = sgd(2e-3, observers=telemetry())
    _, state = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
    filled = {k: v for k, v in read_telemetry(state, histograms=True).items() if "histogram" in k}
    assert len(filled) == len(BIN_EDGES) + 1
    assert {k for k, v in filled.items() if v} == {"histogram/all/-2.75"}  # log10(.002) = -2.699


def test_learning_rate_b1_and_weight_decay_follow_their_schedules():
    cycle = one_cycle(1e-2, total_steps=20)
    decay = optax.linear_schedule(1e-2, 0.0, 8)
    optimizer = adamw(
        cycle.learning_rate, cycle.b1, weight_decay=decay, observers=telemetry(every=1)
    )
    state, params = optimizer.init(jnp.ones(2)), jnp.ones(2)
    update = jax.jit(optimizer.update)
    for k in range(5):
        _, state = update(jnp.ones(2), state, params)
        seen = read_telemetry(state)
        assert seen["step"] == k + 1
        np.testing.assert_allclose(
            [seen["learning_rate"], seen["b1"], seen["weight_decay"]],
            [cycle.learning_rate(k), cycle.b1(k), decay(k)],
            rtol=1e-6,
        )


def test_a_restart_multiplier_is_part_of_the_learning_rate():
    optimizer = adamw(
        1e-2, decay="independent", schedule=lambda k: 0.5, weight_decay=0.0, observers=telemetry()
    )
    _, state = optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))
    seen = read_telemetry(state)
    assert seen["learning_rate"] == pytest.approx(0.005)
    assert seen["rate/all/q50"] == pytest.approx(0.005, rel=1e-5)  # over a root of 1


# --- Nothing changes ------------------------------------------------------------------------------


def without_decay(recipe, lr, **observers):
    decays = recipe.split(" (")[0] in ("adamw", "nadamw", "sgdw", "ranger")
    return EVERY_CONVENTION[recipe](lr, **({"weight_decay": 0.0} if decays else {}), **observers)


TYPICAL = ("adamod", "amsgrad", "adabound", "radam", "ranger")


@pytest.mark.parametrize(
    "recipe", often(TYPICAL, EVERY_CONVENTION, more=("adam", "diffgrad", "sgd"))
)
def test_an_observed_recipe_takes_the_same_steps_and_its_rates_include_the_learning_rate(recipe):
    """Four steps, of which it looks at the first and the last.

    Twice the learning rate is twice the rates, and what the state says of the last step is what
    left the optimizer.
    """
    shapes = {"kernel": (5, 3), "bias": (3,)}
    gradients = list(gradient_trees(4, shapes=shapes))

    def steps_with(observers):
        @functools.partial(jax.jit, compiler_options=AS_USERS)
        def step(lr, params, state, gradient):
            optimizer = without_decay(recipe, lr, observers=observers)
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state, updates

        def run(lr):
            params = normal_tree(shapes=shapes)
            state = without_decay(recipe, lr, observers=observers).init(params)
            for gradient in gradients:
                before = params
                params, state, updates = step(lr, params, state, gradient)
                yield before, state, updates

        return run

    plain, observed, seen = steps_with(()), steps_with(telemetry(every=3)), []
    for lr in (jnp.float32(1e-3), jnp.float32(2e-3)):
        for (x, state, updates), (y, watched, same) in zip(plain(lr), observed(lr), strict=True):
            assert_bit_equal((same, y), (updates, x))
            assert_bit_equal(buffers_of(watched), buffers_of(state))
        seen.append(read_telemetry(watched))
        if recipe.startswith(("muon", "adamh")):  # matrices have a bracket of their own
            assert seen[-1]["matrices/step"] == 4
            continue
        ratio = np.linalg.norm(flat(updates)) / np.linalg.norm(flat(x))
        np.testing.assert_allclose(seen[-1]["update_ratio/all"], ratio, rtol=1e-5)
        assert seen[-1]["step"] == 4
    if recipe.startswith(("muon", "adamh", "schedule_free")):  # the last multiplies inside a line
        return
    once, twice = seen
    assert twice["learning_rate"] == 2 * once["learning_rate"]
    for q in QUANTILES:
        key = f"rate/all/q{round(100 * q):02d}"
        np.testing.assert_allclose(twice[key], 2 * once[key], rtol=2.0**-7)


def test_under_scan_with_the_gradients_computed_in_the_loop_it_is_equal_to_rounding(x64):
    """XLA fuses the gradient with the update, and not always alike."""
    targets = jax.random.normal(jax.random.key(0), (50, 40))

    @functools.partial(jax.jit, static_argnums=0)
    def run(observed):
        optimizer = adamod(1e-2, observers=telemetry(every=7) if observed else ())

        def step(carry, target):
            x, state = carry
            gradient = jax.grad(lambda x: jnp.sum(jnp.cosh(x - target)))(x)
            updates, state = optimizer.update(gradient, state, x)
            return (optax.apply_updates(x, updates), state), updates

        x = jnp.zeros(40)
        return jax.lax.scan(step, (x, optimizer.init(x)), targets)

    (x, _), updates = run(False)
    (y, watched), same = run(True)
    np.testing.assert_allclose(y, x, rtol=1e-12)
    np.testing.assert_allclose(same, updates, rtol=1e-12)
    assert read_telemetry(watched)["step"] == 50


@pytest.mark.compiles
def test_it_looks_at_every_nth_step_and_otherwise_takes_a_branch_that_does_nothing():
    optimizer = adamod(1e-3, observers=telemetry(every=3))
    params = normal_tree()
    state = optimizer.init(params)
    assert read_telemetry(state) == {}
    compiled = jax.jit(optimizer.update).lower(params, state, params).compile()
    assert " conditional(" in compiled.as_text()
    steps = []
    for t in range(7):
        _, state = compiled(at(t, GRADIENTS), state, params)
        steps.append(read_telemetry(state)["step"])
    assert steps == [1, 1, 1, 4, 4, 4, 7]


@pytest.mark.broad
@pytest.mark.parametrize("how", ["jit(grad)", "grad(jit)", "grad", "grad(scan)"])
def test_an_update_with_observers_can_be_differentiated(how):
    """By gradients and learning rate, of two steps of two waves, of which it looks at the first."""
    shapes = {"a": (2, 3000), "b": (5000,)}
    first, second = gradient_trees(2, shapes=shapes)

    def moved(lr, scale, observers):
        optimizer = adamod(lr, observers=observers)

        def step(state, gradient):
            gradient = jax.tree.map(lambda g: scale * g, gradient)
            updates, state = optimizer.update(gradient, state, gradient)
            return state, sum(jnp.sum(jnp.sin(1e3 * u)) for u in jax.tree.leaves(updates))

        state = optimizer.init(first)
        if how == "grad(scan)":
            both = jax.tree.map(lambda *leaves: jnp.stack(leaves), first, second)
            return jnp.sum(jax.lax.scan(step, state, both)[1])
        state, one = step(state, first)
        return one + step(state, second)[1]

    def derivatives(observers):
        function = functools.partial(moved, observers=observers)
        if how == "grad(jit)":
            return jax.grad(jax.jit(function), (0, 1))(1e-2, 1.0)
        made = jax.grad(function, (0, 1))
        return (jax.jit(made) if how == "jit(grad)" else made)(1e-2, 1.0)

    watched, plain = derivatives(telemetry(every=2)), derivatives(())
    assert all(x != 0 for x in plain)
    np.testing.assert_allclose(watched, plain, rtol=1e-5)


# --- It goes wherever states go -------------------------------------------------------------------


def sharded_state(mesh, spec, gradients, params, optimizer):
    """The state after two steps, under jit with parameters and gradients split over the mesh."""
    placed = jax.device_put((params, gradients), NamedSharding(mesh, spec))
    state = optimizer.init(placed[0])
    step = jax.jit(optimizer.update)
    for gradient in placed[1]:
        _, state = step(gradient, state, placed[0])
    return state


@pytest.mark.broad
def test_sharded_parameters_give_the_numbers_of_whole_ones():
    """Eight devices, under jit, and under shard_map with biases that every device has."""
    rng = np.random.default_rng(0)

    def draw():
        return {"w": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32), "b": jnp.ones(8)}

    params, gradients = draw(), [draw(), draw()]
    optimizer = adamod(1e-2, b2=0.9, b3=0.9, observers=telemetry(every=1, axis_name="d"))
    alone = adamod(1e-2, b2=0.9, b3=0.9, observers=telemetry(every=1))
    mesh = Mesh(np.array(jax.devices()), "d")
    whole = sharded_state(Mesh(np.array(jax.devices()[:1]), "d"), P(), gradients, params, alone)
    under_jit = sharded_state(mesh, P("d"), gradients, params, alone)

    specs = {"w": P("d"), "b": P()}
    state = optimizer.init(params)
    names = jax.tree.map(lambda _: P(), state)
    for buffer in ("mu", "nu", "rate_ema"):
        names[0].buffers[buffer] = specs
    update = jax.jit(
        jax.shard_map(
            optimizer.update, mesh=mesh, in_specs=(specs, names, specs), out_specs=(specs, names)
        )
    )
    for gradient in gradients:
        _, state = update(gradient, state, params)
    expected, histogram = read_telemetry(whole), rate_histograms(whole)["all"]
    assert 0 < expected["limited/adamod_momental_bound/all"] < 1
    for other in (under_jit, state):
        np.testing.assert_array_equal(rate_histograms(other)["all"], histogram)
        seen = read_telemetry(other)
        assert seen.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_allclose(seen[key], value, rtol=1e-6, err_msg=key)


def test_the_state_can_be_told_apart_from_parameters_and_sharded():
    params = jax.device_put(
        {"w": jnp.ones((16, 4)), "b": jnp.ones(8)},
        NamedSharding(Mesh(np.array(jax.devices()), "d"), P()),
    )
    optimizer = adamod(1e-2, observers=telemetry(every=1, groups={"w": "w"}))
    marked = optax.tree_map_params(
        optimizer, lambda _: "like", optimizer.init(params), transform_non_params=lambda _: "other"
    )
    assert set(jax.tree.leaves(marked[0].buffers["telemetry"])) == {"other"}
    assert marked[0].buffers["mu"] == {"w": "like", "b": "like"}
    state = adaptive_opt.init_sharded(optimizer, params)
    _, state = jax.jit(optimizer.update)(params, state, params)
    _, alone = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    assert read_telemetry(state) == pytest.approx(read_telemetry(alone), rel=1e-6)


def test_under_pmap_every_device_keeps_the_same_numbers():
    optimizer = adam(1e-2, observers=telemetry(every=1))
    params, gradient = jnp.array([1.0, 2.0]), jnp.array([0.5, -3.0])

    def step(state, gradient):
        return optimizer.update(jax.lax.pmean(gradient, "d"), state, params)[1]

    state = jax.tree.map(lambda x: jnp.stack([x] * 8), optimizer.init(params))
    gradients = gradient * jnp.linspace(0.5, 1.5, 8)[:, None]
    after = jax.pmap(step, axis_name="d")(state, gradients)
    _, expected = optimizer.update(gradient, optimizer.init(params), params)
    for device in (0, 7):
        seen = read_telemetry(at(device, after))
        assert seen == pytest.approx(read_telemetry(expected), rel=1e-6)
    with pytest.raises(ValueError, match=r"one of 8 optimizers: choose one with"):
        read_telemetry(after)


def test_saved_and_restored_it_goes_on_bit_for_bit():
    optimizer = skip_nonfinite(diffgrad(1e-2, observers=telemetry(every=2)))
    params = normal_tree()
    step = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for t in range(3):
        _, state = step(at(t, GRADIENTS), state, params)
    fresh = optimizer.init(params)
    by_flax = flax.serialization.from_bytes(fresh, flax.serialization.to_bytes(state))
    by_header = from_bytes(optimizer, fresh, to_bytes(optimizer, state))
    for restored in (by_flax, by_header):
        assert read_telemetry(restored) == read_telemetry(state)
        assert_bit_equal(
            step(at(3, GRADIENTS), restored, params), step(at(3, GRADIENTS), state, params)
        )
    with pytest.raises(adaptive_opt.CheckpointMismatch, match=r"every of telemetry .*was 2, is 5"):
        from_bytes(
            skip_nonfinite(diffgrad(1e-2, observers=telemetry(every=5))),
            fresh,
            to_bytes(optimizer, state),
        )


def test_observers_can_be_added_to_a_run_and_taken_away():
    params = normal_tree()
    theirs, plain = optax.adam(1e-2), adam(1e-2)
    watched = adam(1e-2, observers=telemetry(every=1))
    _, state, _ = train(theirs, params, [at(0, GRADIENTS)])
    moved = convert_state(state, theirs, watched, params)
    assert read_telemetry(moved) == {}
    _, after = jax.jit(watched.update)(at(1, GRADIENTS), moved, params)
    assert read_telemetry(after)["step"] == 2
    back = convert_state(after, watched, plain, params)
    assert jax.tree.structure(back) == jax.tree.structure(plain.init(params))
    assert_bit_equal(buffers_of(back), buffers_of(after))


def test_what_telemetry_of_another_version_saw_is_said_and_begun_anew():
    params, gradient = normal_tree(), at(0, GRADIENTS)
    optimizer = adam(1e-2, observers=telemetry(every=1))
    _, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    seen = state[0].buffers["telemetry"]
    before = {"hyperparameters": jnp.ones(3), "groups": {"all": {"quantiles": jnp.ones(5)}}}
    buffers = state[0].buffers | {"telemetry": seen._replace(values=before)}
    old = (state[0]._replace(buffers=buffers), *state[1:])
    with pytest.raises(ValueError, match=r"is of another version: .*convert_state\("):
        optimizer.update(gradient, old, params)
    moved = convert_state(old, optimizer, optimizer, params)
    assert read_telemetry(moved) == {}
    go_on = jax.jit(optimizer.update)
    updates, after = go_on(gradient, moved, params)
    assert read_telemetry(after)["step"] == 2
    assert_bit_equal(updates, go_on(gradient, state, params)[0])


def test_groups_with_brackets_of_their_own_are_told_apart():
    params = {"head": jnp.ones(2), "body": jnp.ones(3), "frozen": jnp.ones(1)}
    groups = ParameterGroups(
        [Group("head", learning_rate=10.0), Group("frozen", freeze=True)], default=Group()
    )
    optimizer = groups.optimizer(adamw, learning_rate=1e-3, observers=telemetry(every=1))
    _, state = optimizer.update(params, optimizer.init(params), params)
    seen = read_telemetry(state)
    rates = {k: v for k, v in seen.items() if k.endswith("learning_rate")}
    assert rates == pytest.approx({"head/learning_rate": 1e-2, "default/learning_rate": 1e-3})


def test_an_injected_learning_rate_is_the_one_that_is_seen():
    injected = optax.inject_hyperparams(adam)(1e-3, observers=telemetry(every=1))
    state = injected.init(jnp.ones(2))
    state.hyperparams["learning_rate"] = jnp.float32(0.25)
    _, state = jax.jit(injected.update)(jnp.ones(2), state, jnp.ones(2))
    assert read_telemetry(state)["learning_rate"] == 0.25


def test_frozen_and_missing_leaves_are_not_counted():
    params = {"a": jnp.ones(4), "b": jnp.ones(4)}
    optimizer = sgd(1e-2, observers=telemetry(every=1))
    _, state = optimizer.update({"a": jnp.ones(4), "b": None}, optimizer.init(params), params)
    assert rate_histograms(state)["all"].sum() == 1
    assert read_telemetry(state)["update_ratio/all"] == pytest.approx(1e-2)
    alone = optax.masked(adam(1e-2, observers=telemetry(every=1)), {"a": True, "b": False})
    _, state = alone.update(params, alone.init(params), params)
    assert read_telemetry(state)["rate/all/q50"] == pytest.approx(1e-2, rel=1e-4)
    none = adam(1e-2, observers=telemetry(every=1))
    _, state = none.update({}, none.init({}), {})
    assert read_telemetry(state)["learning_rate"] == pytest.approx(1e-2)


# --- Described, and refused -----------------------------------------------------------------------


def test_describe_shows_observers_at_their_place():
    described = describe(adamod(1e-3, observers=[telemetry(every=10), telemetry(name="second")]))
    names = [stage.name for stage in described.stages()]
    bound = names.index("adamod_momental_bound")
    assert names[bound + 1 : bound + 3] == ["telemetry", "telemetry"]
    assert described.stages()[bound + 1].settings["every"] == 10
    assert "observers" not in described.settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: adam(1e-3, observers=adam(1e-3)), "observers= takes telemetry"),
        (lambda: adam(1e-3, observers=[first_moment(0.9)]), "goes into adaptive"),
        (lambda: adam(1e-3, observers=[telemetry(), telemetry()]), "buffer called 'telemetry'"),
        (lambda: telemetry(every=0), "every must be .*at least 1, got 0"),
        (lambda: telemetry(every=2.5), "every must be whole"),
        (lambda: telemetry(groups={"all": "x"}), "cannot be called 'all'"),
        (lambda: telemetry(groups={"a/b": "x"}), "cannot be called 'a/b'"),
        (lambda: telemetry(groups={"a": "("}), r"pattern '\(' is not a regular expression"),
        (lambda: optax.chain(telemetry()).init(jnp.ones(2)), "list it in adaptive"),
        (lambda: read_telemetry(adam(1e-3).init(jnp.ones(2))), "there is no observer"),
        (
            lambda: adam(1e-3, observers=telemetry()).update(
                jnp.ones(2), (adaptive(first_moment(0.9)).init(jnp.ones(2)), optax.EmptyState())
            ),
            "should hold what telemetry saw",
        ),
        (lambda: looked(lambda step: {"x": jnp.ones(2)}), r"shape \(2,\), but said"),
        (lambda: looked(lambda step: {"y": 1.0}), "but said it keeps"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()


def looked(look):
    optimizer = adam(1e-3, observers=observer(look, {"x": ()}, name="mine"))
    return optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)))


@pytest.mark.broad
def test_an_update_that_is_not_compiled_says_so_once():
    waves._say_that_it_is_compiled.cache_clear()
    optimizer, x = adam(1e-3, observers=telemetry()), jnp.ones(3)
    state = optimizer.init(x)
    with pytest.warns(UserWarning, match=r"Put the training step under jax\.jit") as said:
        _ = [optimizer.update(x, state, x) for _ in range(2)]
    assert len(said) == 1
    waves._say_that_it_is_compiled.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(optimizer.update)(x, state, x)
        with jax.disable_jit():
            optimizer.update(x, state, x)
