"""Schedule-Free: what is trained, what is evaluated, and what the averages survive."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AS_USERS, assert_bit_equal, gradient_trees, normal_tree, train
from test_exactness import REFERENCES, ROWS, optimizer_of

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adaptive,
    behind,
    close_step,
    evaluation_params,
    from_bytes,
    open_step,
    schedule_free,
    schedule_free_adamw,
    schedule_free_plus,
    schedule_free_radam,
    schedule_free_sgd,
    sgd,
    skip_nonfinite,
    to_bytes,
)

RECORDED = ROWS["schedule_free"]
TOLERANCE = 1e-12


@pytest.mark.parametrize("row", RECORDED, ids=[row["name"] for row in RECORDED])
def test_evaluation_params_are_those_of_the_authors_eval_mode(row, x64):
    with np.load(REFERENCES / "schedule_free.npz") as stored:
        g, start = stored["gradients"], stored[f"{row['name']}/start"]
        expected, losses = stored[f"{row['name']}/evaluation"], stored["losses"]
    optimizer = optimizer_of(row, len(g))

    def step(carry, given):
        (x, state), (gradient, loss) = carry, given
        updates, state = optimizer.update(gradient, state, x, value=loss)
        x = optax.apply_updates(x, updates)
        return (x, state), (x, evaluation_params(state, x))

    @jax.jit
    def run(start, *given):
        return jax.lax.scan(step, (start, optimizer.init(start)), given)[1]

    trained, averaged = run(*map(jnp.asarray, (start, g, losses)))
    every = row["parameters_every"]
    scale = np.maximum.accumulate(np.abs(trained), axis=0)[every - 1 :: every]
    assert np.all(np.abs(averaged[every - 1 :: every] - expected) <= TOLERANCE * scale)
    assert np.any(np.abs(averaged - trained) > 1e-3 * np.abs(trained))  # two different things


def test_the_three_sequences_are_those_of_the_paper(x64):
    """By its listing, with x, y and z side by side, and b1 and the learning rate of each step."""
    rng = np.random.default_rng(0)
    gradients, start = rng.standard_normal((8, 3)), rng.standard_normal(3)
    rates, b1s = rng.uniform(0.1, 1, 8), rng.uniform(0.5, 0.99, 8)
    optimizer = schedule_free_sgd(
        lambda t: jnp.asarray(rates)[t], lambda t: jnp.asarray(b1s)[t], step_power=1.5
    )
    x = y = z = start
    mine, state, total, largest = jnp.asarray(start), optimizer.init(jnp.asarray(start)), 0.0, 0.0
    for t, g in enumerate(gradients):
        z = z - rates[t] * g
        largest = max(largest, rates[t])
        weight = (t + 1) ** 1.5 * largest**2
        total += weight
        x = (1 - weight / total) * x + weight / total * z
        y = b1s[t] * x + (1 - b1s[t]) * z
        updates, state = optimizer.update(jnp.asarray(g), state, mine)
        mine = optax.apply_updates(mine, updates)
        np.testing.assert_allclose(mine, y, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(evaluation_params(state, mine), x, rtol=1e-12, atol=1e-14)


def test_a_learning_rate_of_zero_at_first_weighs_nothing_and_breaks_nothing():
    x, g = jnp.array([1.0, -2.0]), jnp.array([1.0, 3.0])
    rising = optax.linear_schedule(0.0, 0.5, 4)
    late = schedule_free_sgd(rising)
    state = late.init(x)
    updates, state = late.update(g, state, x)
    assert not np.any(updates)
    np.testing.assert_array_equal(evaluation_params(state, x), x)
    updates, state = late.update(g, state, x)
    prompt = schedule_free_sgd(lambda t: rising(t + 1))
    expected, _ = prompt.update(g, prompt.init(x), x)
    np.testing.assert_array_equal(updates, expected)


@pytest.mark.parametrize("recipe", [schedule_free_sgd, schedule_free_adamw, schedule_free_radam])
def test_zero_gradients_move_nothing(recipe):
    params = normal_tree()
    zeros = [jax.tree.map(jnp.zeros_like, params)] * 6
    trained, state, _ = train(recipe(0.1), params, zeros)
    assert_bit_equal(trained, params)
    assert_bit_equal(evaluation_params(state, trained), params)


def test_warm_up_is_the_same_as_a_number_of_steps_and_as_a_schedule():
    params, gradients = normal_tree(), list(gradient_trees(5))
    steps = schedule_free_adamw(0.1, warmup_steps=4)
    schedule = schedule_free_adamw(lambda t: 0.1 * jnp.minimum(1.0, (t + 1) / 4))
    one, _, _ = train(steps, params, gradients)
    other, _, _ = train(schedule, params, gradients)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), one, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_of_16_bit_parameters_z_is_float32_and_the_average_comes_in_their_dtype(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), normal_tree())
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    gradients = [jax.tree.map(lambda x: x.astype(dtype), normal_tree(seed)) for seed in (1, 2, 3)]
    optimizer = schedule_free_sgd(0.1)
    trained, state, _ = train(optimizer, params, gradients)
    expected, wide_state, _ = train(optimizer, wide, gradients)
    assert_bit_equal(optax.tree.get(state, "z"), optax.tree.get(wide_state, "z"))
    found = evaluation_params(state, trained)
    rounding = 3 * 4 * float(jnp.finfo(dtype).eps)  # of three steps at parameters below 4
    average = evaluation_params(wide_state, expected)
    for x, y in zip(*map(jax.tree.leaves, (found, average)), strict=True):
        assert x.dtype == dtype
        np.testing.assert_allclose(x.astype(jnp.float32), y, rtol=0, atol=rounding)


def test_weights_stay_exact_over_more_steps_than_a_sum_of_them_in_float32():
    optimizer = adaptive(schedule_free(1e-3))
    x = jnp.ones(1)
    state = optimizer.init(x)
    million = state._replace(
        count=jnp.int32(10_000_000),
        buffers=state.buffers
        | {"averaged_steps": jnp.float32(1e7), "largest_rate": jnp.float32(1e-3)},
    )
    _, after = optimizer.update(x, million, x)
    assert after.buffers["averaged_steps"] == 10_000_001


def test_training_goes_on_from_bytes_bit_for_bit():
    params, gradients = normal_tree(), list(gradient_trees(6))
    optimizer = schedule_free_adamw(0.1, weight_decay=0.1, inner_momentum=0.5)
    whole, at_end, _ = train(optimizer, params, gradients)
    half, state, _ = train(optimizer, params, gradients[:3])
    read = from_bytes(optimizer, optimizer.init(params), to_bytes(optimizer, state))
    again, state, _ = train(optimizer, half, gradients[3:], read)
    assert_bit_equal(again, whole)
    assert_bit_equal(state, at_end)
    assert_bit_equal(evaluation_params(state, again), evaluation_params(at_end, whole))


@pytest.mark.parametrize(
    "grouped",
    [
        lambda free: optax.partition(
            {"free": free, "other": adam(0.1)},
            {"dense": {"kernel": "free", "bias": "other"}, "scale": "other"},
        ),
        lambda free: ParameterGroups(
            [Group("bias|scale", optimizer=adam(0.1))], default=Group()
        ).optimizer(schedule_free_adamw, learning_rate=0.1),
    ],
    ids=["partition", "ParameterGroups"],
)
def test_a_group_evaluates_with_its_average_and_the_others_as_they_are(grouped):
    params, gradients = normal_tree(), list(gradient_trees(4))
    alone = schedule_free_adamw(0.1)
    trained, state, _ = train(grouped(alone), params, gradients)
    kernel, own, _ = train(
        alone, params["dense"]["kernel"], [g["dense"]["kernel"] for g in gradients]
    )
    found = evaluation_params(state, trained)
    assert_bit_equal(trained["dense"]["kernel"], kernel)
    np.testing.assert_array_equal(found["dense"]["kernel"], evaluation_params(own, kernel))
    assert_bit_equal(found["dense"]["bias"], trained["dense"]["bias"])
    assert np.any(found["dense"]["kernel"] != kernel)


def test_a_parameter_without_a_gradient_stays_in_training_and_evaluation():
    params, gradients = normal_tree(), list(gradient_trees(3))
    optimizer = schedule_free_sgd(0.1)
    without = [g | {"scale": None} for g in gradients]
    state, x = optimizer.init(params), params
    for g in without:
        updates, state = optimizer.update(g, state, x)
        x = optax.apply_updates(x, updates | {"scale": jnp.zeros(())})
    assert x["scale"] == params["scale"] == evaluation_params(state, x)["scale"]
    assert np.any(evaluation_params(state, x)["dense"]["bias"] != x["dense"]["bias"])


def test_in_a_flat_chain_and_behind_an_optimizer_of_optax_it_is_the_same():
    params, gradients = normal_tree(), list(gradient_trees(4))
    flat = optax.chain(open_step(), schedule_free(0.1), close_step(), optax.scale(-1.0))
    around = optax.chain(
        behind(optax.identity(), schedule_free(0.1), downhill=False), optax.scale(-1.0)
    )
    alone = schedule_free_sgd(0.1)
    expected, state, _ = train(alone, params, gradients, compiler_options=AS_USERS)
    for optimizer in (flat, around, skip_nonfinite(around)):
        trained, own, _ = train(optimizer, params, gradients, compiler_options=AS_USERS)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), trained, expected)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5),
            evaluation_params(own, trained),
            evaluation_params(state, expected),
        )


def test_parameters_called_like_its_buffers_are_no_average():
    names = ("z", "b1", "averaged_steps")
    params = {name: jnp.ones(2) for name in names}
    state = sgd(0.1, momentum=0.9).init(params)
    assert_bit_equal(evaluation_params(state, params), params)
    free = schedule_free_adamw(0.1)
    trained, state, _ = train(free, params, [params, params])
    found = evaluation_params(state, trained)
    assert all(np.any(found[name] != trained[name]) for name in names)


def test_bad_settings_and_missing_parameters_are_refused():
    for b1 in (0.0, 1.0):
        with pytest.raises(ValueError, match="b1 must be"):
            schedule_free_sgd(0.1, b1)
    with pytest.raises(ValueError, match="warmup_steps must be whole and at least 0"):
        schedule_free_adamw(0.1, warmup_steps=-1)
    with pytest.raises(TypeError, match="warmup_steps must be a number and not a schedule"):
        schedule_free_adamw(0.1, warmup_steps=lambda t: 1)
    x = jnp.ones(2)
    free = adaptive(schedule_free(0.1))
    with pytest.raises(ValueError, match="schedule_free needs the parameters"):
        free.update(x, free.init(x))


def test_polyaks_rate_is_the_way_to_a_loss_of_zero_over_the_whole_tree(x64):
    """By the authors' formula, with the sequences side by side; no step where the loss is below."""
    rng = np.random.default_rng(7)
    shapes = {"a": 3, "b": 2}
    start = {name: rng.standard_normal(n) for name, n in shapes.items()}
    optimizer = adaptive(schedule_free(0.5, 0.8, polyak=True))
    y, state = dict(start), optimizer.init({k: jnp.asarray(v) for k, v in start.items()})
    rates, largest = [], 0.0
    x, z = dict(start), dict(start)
    averaged = 0.0
    for loss in (2.0, 0.5, -5.0, 1.0):
        g = {name: rng.standard_normal(n) for name, n in shapes.items()}
        ahead = sum(0.8 * np.sum(g[k] * (z[k] - x[k])) for k in shapes)
        length = np.sqrt(np.pi / 2) * sum(np.abs(g[k]).sum() for k in shapes)
        rates.append(0.5 * max(0, loss + ahead) / length)
        largest = max(largest, rates[-1])
        averaged += largest**2
        z = {k: z[k] - rates[-1] * g[k] for k in shapes}
        x = {k: x[k] + largest**2 / averaged * (z[k] - x[k]) for k in shapes}
        uphill, state = optimizer.update(g, state, y, value=loss)
        y = {k: y[k] - uphill[k] for k in shapes}
        for k in shapes:
            np.testing.assert_allclose(y[k], 0.8 * x[k] + 0.2 * z[k], rtol=1e-12, atol=1e-14)
    assert rates[2] == 0 < min(rates[0], rates[1], rates[3])


def test_polyaks_rate_needs_one_loss_and_no_gradient_no_rate():
    x = jnp.ones(2)
    free = schedule_free_plus(1.0)
    with pytest.raises(ValueError, match=r"schedule_free needs value: .* value=\.\.\."):
        free.update(x, free.init(x), x)
    with pytest.raises(
        ValueError, match=r"value= to be one number, .* shape \(2,\)\. Give its mean"
    ):
        free.update(x, free.init(x), x, value=x)
    updates, _ = free.update(jnp.zeros(2), free.init(x), x, value=1.0)
    assert not np.any(updates)


def test_before_the_average_starts_it_is_the_newest_iterate():
    params, gradients = normal_tree(), list(gradient_trees(3))
    trained, state, _ = train(
        schedule_free_plus(0.1, polyak=False, averaging_start=3), params, gradients
    )
    found, z = evaluation_params(state, trained), optax.tree.get(state, "z")
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), found, z)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), trained, z)


def test_the_decay_stage_minds_its_mask_and_no_other_parameters():
    params = {"decays": jnp.ones(2), "stays": jnp.ones(2)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    mask = {"decays": True, "stays": False}
    for given in (mask, lambda tree: {name: name == "decays" for name in tree}):
        for free in (
            schedule_free_adamw(0.5, weight_decay=0.1, mask=given),
            schedule_free_plus(0.5, weight_decay=0.1, mask=given, polyak=False),
        ):
            updates, _ = free.update(zeros, free.init(params), params)
            assert np.all(updates["decays"] < 0)
            assert not np.any(updates["stays"])
