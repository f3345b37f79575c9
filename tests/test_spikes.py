"""skip_spikes skips what OLMo's trainer skips, and leaves everything else as it was."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, normal_tree, train
from jax.sharding import Mesh, PartitionSpec

from adaptive_opt import (
    adam,
    adamw,
    config,
    convert_state,
    describe,
    from_bytes,
    low_memory,
    make,
    read_telemetry,
    sgd,
    skip_nonfinite,
    skip_spikes,
    telemetry,
    to_bytes,
    train_step,
)


class Olmo:
    """The rule of OLMo-core's SkipStepOptimizer (optim/skip_step_optimizer.py), in NumPy.

    Lists of the latest values, the current one among them, of one more than the interval; no step
    is judged before there are max(20, interval // 2); ``torch.std_mean`` is that of a sample.
    """

    def __init__(self, interval, sigma):
        self.interval, self.sigma, self.kept = interval, sigma, ([], [])

    def takes(self, *latest):
        for values, one in zip(self.kept, latest, strict=False):
            values.append(one)
            del values[: -(self.interval + 1)]
        used = [values for values in self.kept if values]
        self.thresholds = np.zeros(len(used))
        if len(used[0]) < max(20, self.interval // 2):
            return True
        mean = np.array([np.mean(values[:-1]) for values in used])
        std = np.array([np.std(values[:-1], ddof=1) for values in used])
        self.thresholds = mean + self.sigma * std
        return bool(np.all(np.array([values[-1] for values in used]) - mean <= self.sigma * std))


def spiky(steps, seed=0):
    """Gradients, and losses, some of which are far from the others; and a new level at the end."""
    rng = np.random.default_rng(seed)
    gradients = rng.normal(size=(steps, 3))
    losses = rng.normal(size=steps) + 5.0
    for each in (gradients, losses):
        each[rng.random(steps) < 0.08] *= rng.uniform(2, 100)
        each[2 * steps // 3 :] *= 4.0
    return gradients, losses


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize(("window", "sigma"), [(128, 6.0), (30, 2.5)])
def test_it_skips_what_olmo_skips_against_the_same_thresholds(window, sigma, loss, x64):
    gradients, losses = spiky(400)
    optimizer, rule = skip_spikes(sgd(0.1), window, sigma, loss=loss), Olmo(window, sigma)
    x, taken = jnp.zeros(3), []
    expected, state = np.zeros(3), optimizer.init(x)

    @jax.jit
    def step(x, state, gradient, value):
        updates, state = optimizer.update(gradient, state, x, value=value)
        return optax.apply_updates(x, updates), state

    for gradient, value in zip(gradients, losses, strict=True):
        x, state = step(x, state, gradient, value)
        latest = (np.linalg.norm(gradient), value)
        taken.append(rule.takes(*latest[: 2 if loss else 1]))
        expected = expected - 0.1 * gradient * taken[-1]
        np.testing.assert_allclose(state.threshold, rule.thresholds, rtol=1e-12)
        np.testing.assert_allclose(x, expected, rtol=1e-12, atol=1e-14)
        assert int(state.total) == taken.count(False)
        assert int(state.consecutive) == taken[::-1].index(True)
    assert 3 < taken.count(False) < 150


CALM, SPIKE = normal_tree(1), jax.tree.map(lambda x: 1e3 * x, normal_tree(2))
TOGETHER = [*[CALM] * 5, SPIKE, CALM, SPIKE, CALM]
SETTINGS = {"window": 8, "sigma_factor": 2.0, "warmup": 5}


def varied(gradients):
    return [
        jax.tree.map(lambda x, t=t: x * (1 + 0.1 * (t % 3)), g) for t, g in enumerate(gradients)
    ]


def test_skipped_steps_are_as_if_they_had_not_been():
    guarded = skip_spikes(adamw(1e-2), **SETTINGS)
    gradients = varied(TOGETHER)
    params, state, history = train(guarded, normal_tree(), gradients)
    kept = [g for t, g in enumerate(gradients) if t not in (5, 7)]
    assert [int(s.total) for s, _ in history] == [0, 0, 0, 0, 0, 1, 1, 2, 2]
    assert [int(s.consecutive) for s, _ in history] == [0, 0, 0, 0, 0, 1, 0, 1, 0]
    expected, plain, _ = train(adamw(1e-2), normal_tree(), kept)
    assert_bit_equal((params, state.inner_state), (expected, plain))
    assert not any(np.any(u) for u in jax.tree.leaves(history[5][1]))


def test_what_is_not_finite_is_skipped_and_forgotten():
    nan, huge = (jax.tree.map(lambda x, v=v: x * v, CALM) for v in (np.nan, 1e30))
    guarded = skip_spikes(adam(1e-2), **SETTINGS)
    calm = varied([CALM] * 8)
    params, state, _ = train(guarded, normal_tree(), [nan, *calm[:4], huge, nan, *calm[4:]])
    expected, plain, _ = train(guarded, normal_tree(), calm)
    assert_bit_equal((params, state.inner_state), (expected, plain.inner_state))
    assert_bit_equal(state.history, plain.history)
    assert (int(state.total), int(state.seen)) == (3, 8)


def test_equal_norms_are_no_spikes_and_a_new_level_is_learnt():
    guarded, x = skip_spikes(sgd(1.0), 4, 6.0, warmup=4), jnp.zeros(2)
    gradients = [jnp.full(2, 0.1)] * 9 + [jnp.full(2, 7.0)] * 4
    *_, history = train(guarded, x, gradients)
    assert [int(s.total) for s, _ in history] == [0] * 9 + [1] * 4


def test_the_history_goes_round_where_the_count_ends():
    guarded, x = skip_spikes(sgd(1.0), 5, warmup=3), jnp.ones(1)
    _, state, _ = train(guarded, x, [x * t for t in range(1, 6)])
    late = state._replace(seen=jnp.asarray(2**31 - 1, jnp.int32))
    place = (2**31 - 1) % 5
    for t in range(3):
        _, late = guarded.update(x * (100 + t) / 100, late, x)
        assert late.history[(place + t) % 5, 0] == pytest.approx((100 + t) / 100)
    assert int(late.seen) > 2**31 - 10


def test_telemetry_reads_both_guards():
    inner = adam(1e-2, observers=telemetry(every=1))
    guarded = skip_nonfinite(skip_spikes(inner, **SETTINGS))
    nan = jax.tree.map(lambda x: x * np.nan, CALM)
    *_, state, _ = train(guarded, normal_tree(), [*varied([CALM] * 5), nan, SPIKE])
    seen = read_telemetry(state)
    assert (seen["skipped"], seen["skipped_in_a_row"]) == (1, 0)
    assert (seen["spikes"], seen["spikes_in_a_row"]) == (1, 1)


@pytest.mark.parametrize("loss", [False, True])
def test_a_run_that_is_resumed_goes_on_bit_for_bit(loss):
    optimizer = skip_spikes(adamw(1e-2), **SETTINGS, loss=loss)
    gradients = varied(TOGETHER)

    def step(params, state, gradient):
        value = optax.tree.norm(gradient)
        updates, state = optimizer.update(gradient, state, params, value=value)
        return optax.apply_updates(params, updates), state

    step, params = jax.jit(step), normal_tree()
    state = fresh = optimizer.init(params)
    for t, gradient in enumerate(gradients):
        if t == 6:
            saved, there = to_bytes(optimizer, state), params
        params, state = step(params, state, gradient)
    again = from_bytes(optimizer, fresh, saved)
    for gradient in gradients[6:]:
        there, again = step(there, again, gradient)
    assert_bit_equal((there, again), (params, state))
    assert int(state.total) > 0


def test_it_is_described_made_of_data_and_put_around_a_run():
    optimizer = skip_spikes(adamw(1e-2), 16, loss=True)
    data = config(optimizer)
    assert data["name"] == "skip_spikes"
    assert describe(make(data)) == describe(optimizer)
    params = normal_tree()
    _, state, _ = train(adamw(1e-2), params, [CALM] * 3)
    moved = convert_state(state, adamw(1e-2), skip_spikes(optax.adamw(1e-2)), params)
    assert (int(moved.seen), int(moved.inner_state[0].count)) == (0, 3)
    back = convert_state(moved, skip_spikes(optax.adamw(1e-2)), adamw(1e-2), params)
    assert_bit_equal(back, state)


def test_devices_with_parts_of_the_gradient_agree():
    mesh, split = Mesh(np.array(jax.devices()[:2]), ("data",)), PartitionSpec("data")
    optimizer = skip_spikes(sgd(1.0), 4, 2.0, warmup=4, loss=True, axis_name="data")
    gradients = jnp.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [1.0, 1.0], [1.0, 50.0], [1.0, 1.0]])

    def local(gradients):
        def step(state, g):
            updates, state = optimizer.update(g, state, g, value=g.sum())
            return state, (updates, state.total)

        return jax.lax.scan(step, optimizer.init(gradients[0]), gradients)[1]

    specs = PartitionSpec(None, "data")
    mapped = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=(specs, PartitionSpec()))
    updates, totals = jax.jit(mapped)(gradients)
    assert totals.tolist() == [0, 0, 0, 0, 1, 1]
    np.testing.assert_array_equal(updates[4], [0.0, 0.0])
    np.testing.assert_array_equal(updates[:4], -gradients[:4])
    alone = skip_spikes(sgd(1.0), 4)

    def forgotten(g):
        return alone.update(g, alone.init(g), g)[0]

    with pytest.raises(ValueError, match="Give axis_name= the axes"):
        jax.shard_map(forgotten, mesh=mesh, in_specs=split, out_specs=split)(jnp.ones(2))


def test_narrow_gradients_empty_trees_and_other_wrappers():
    x, plain = {"w": jnp.ones(3000, jnp.bfloat16), "frozen": None}, skip_spikes(adam(1e-2))
    _, state = plain.update(x, plain.init(x), x)
    assert state.history.dtype == jnp.float32
    assert state.history[0, 0] == pytest.approx(3000**0.5, rel=1e-6)  # in bfloat16: 54.75
    stored = low_memory(plain)
    _, state = stored.update(x, stored.init(x), x)
    assert state.inner_state.history[0, 0] == pytest.approx(3000**0.5, rel=1e-6)
    assert int(plain.update({}, plain.init({}), {})[1].total) == 0


def test_train_step_gives_the_loss():
    optimizer = skip_spikes(sgd(0.1), loss=True)
    step, x = train_step(lambda w, t: jnp.sum((w - t) ** 2), optimizer), jnp.zeros(2)
    _, state, value = step(x, optimizer.init(x), 3.0)
    assert state.history[0, 1] == value == 18.0


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"window": 1}, ValueError, "window must be whole and at least 2, got 1"),
        ({"sigma_factor": 0.0}, ValueError, "sigma_factor must be finite and greater than 0"),
        ({"warmup": 2}, ValueError, "warmup must be whole and at least 3, got 2"),
        ({"loss": 2.0}, TypeError, "loss must be true or false, got 2.0"),
        ({"sigma_factor": lambda t: 6.0}, TypeError, "sigma_factor must be a number"),
        ({"inner": adam}, TypeError, "skip_spikes takes an optimizer"),
    ],
)
def test_mistakes_are_named(wrong, error, message):
    with pytest.raises(error, match=message):
        skip_spikes(**{"inner": adam(1e-2), **wrong})


def test_a_loss_that_is_missing_or_no_scalar_is_named():
    optimizer, x = skip_spikes(adam(1e-2), loss=True), jnp.ones(2)
    with pytest.raises(ValueError, match=r"judges the loss: give it to update, update\(gradient"):
        optimizer.update(x, optimizer.init(x), x)
    with pytest.raises(ValueError, match=r"the loss, must be a scalar, got shape \(2,\)"):
        optimizer.update(x, optimizer.init(x), x, value=x)
