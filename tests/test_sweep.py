"""A sweep is its members: each is what it would be alone, and one that diverges harms no other."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptive_opt import adamod, adamw, sgd, sweep, telemetry

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 5))
DATA = {"x": X, "y": X @ RNG.normal(size=5) + 0.1 * RNG.normal(size=64)}
GRID = {"learning_rate": [1e-3, 1e-2, 1e-1], "weight_decay": [0.0, 1e-1]}
SEEDS = (0, 7)


def init(key):
    return {"w": jax.random.normal(key, (5,)), "b": jnp.zeros(())}


def loss(params, batch):
    return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2)


def alone(recipe, values, seed, steps, batch_size):
    """The same training, written down as anyone would."""
    optimizer, key = recipe(**values), jax.random.key(seed)
    params = init(key)
    state, losses = optimizer.init(params), []

    @jax.jit
    def step(params, state, batch):
        value, gradient = jax.value_and_grad(loss)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    for t in range(1, steps + 1):
        chosen = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, 64)
        batch = {name: jnp.asarray(array)[chosen] for name, array in DATA.items()}
        params, state, value = step(params, state, batch)
        losses.append(float(value))
    return params, losses


def test_every_member_equals_a_run_on_its_own(x64):
    steps = []
    found = sweep(
        adamw, GRID, loss=loss, init=init, data=DATA, steps=25, batch_size=16, seeds=SEEDS,
        progress=lambda done, of: steps.append((done, of)), chunks=4,
    )  # fmt: skip
    assert steps == [(7, 25), (14, 25), (21, 25), (25, 25)]
    assert found.names == ("learning_rate", "weight_decay", "seed")
    assert len(found.members) == 12
    for index, (lr, decay, seed) in enumerate(found.members):
        values = {"learning_rate": lr, "weight_decay": decay}
        params, losses = alone(adamw, values, seed, 25, 16)
        np.testing.assert_allclose(found.losses[index], losses, rtol=1e-12)
        np.testing.assert_allclose(found.params["w"][index], params["w"], rtol=1e-11)
        np.testing.assert_allclose(found.results[index], np.mean(losses[-2:]), rtol=1e-12)
    assert not found.diverged_at.any()
    rates, results = found.sensitivity(weight_decay=1e-1)
    np.testing.assert_array_equal(rates, GRID["learning_rate"])
    assert results.shape == (3, 2)
    of_one = [row["result"] for row in found.table() if row["weight_decay"] == 1e-1]
    np.testing.assert_array_equal(results.ravel(), of_one)
    assert found.sensitivity("seed")[1].shape == (2, 6)


def test_a_member_that_diverges_is_marked_and_the_others_go_on():
    found = sweep(
        sgd, {"learning_rate": [1e-2, 1e3]}, loss=loss, init=init, data=DATA, steps=60,
        evaluate=lambda params: loss(params, DATA),
    )  # fmt: skip
    calm, wild = found.table()
    assert not calm["diverged"]
    assert calm["result"] < found.losses[0, 0]
    assert wild["diverged"]
    assert np.isnan(wild["result"])
    at = wild["diverged_at"]
    assert 1 < at < 60
    assert np.isfinite(found.losses[1, : at - 1]).all()
    assert not np.isfinite(found.losses[1, at])
    assert f"diverged at step {at}" in str(found)
    rates, results = found.sensitivity()
    assert np.isnan(results[list(rates).index(1e3)]).all()
    expected = loss(jax.tree.map(lambda x: x[0], found.params), DATA)
    np.testing.assert_allclose(calm["result"], expected, rtol=1e-6)


def test_the_steps_are_one_program():
    traced = []

    def counted(params, batch):
        traced.append(1)
        return loss(params, batch)

    sweep(
        functools.partial(adamod, observers=telemetry(every=5)), {"learning_rate": [1e-3, 1e-2]},
        loss=counted, init=init, data=DATA, steps=8, progress=lambda *_: None, chunks=2,
    )  # fmt: skip
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": {}}, "the grid must have a hyperparameter"),
        ({"grid": {"learning_rate": []}}, "a value or more"),
        ({"seeds": ()}, "one seed or more"),
        ({"steps": 0}, "steps must be whole and at least 1, got 0"),
        ({"data": {"x": X, "y": X[:3]}}, r"lengths \[\(3,\), \(64,\)\]"),
    ],
)
def test_mistakes_are_named(change, message):
    given = {"grid": {"learning_rate": [1e-3]}, "steps": 1, "data": DATA} | change
    with pytest.raises(ValueError, match=message):
        sweep(adamw, given.pop("grid"), loss=loss, init=init, **given)


def test_a_name_that_was_not_varied_is_refused():
    found = sweep(sgd, {"learning_rate": [0.1]}, loss=loss, init=init, data=DATA, steps=1)
    with pytest.raises(ValueError, match="'b1' was not varied; there is learning_rate, seed"):
        found.sensitivity("b1")
    with pytest.raises(ValueError, match="no member of the grid has"):
        found.sensitivity(seed=3)


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be whole and at least 1, got 0"),
        ({"seeds": 3}, TypeError, "seeds must be a sequence of whole numbers"),
        ({"seeds": [0.5]}, TypeError, "seeds must be a sequence of whole numbers"),
        ({"grid": {"convention": ["torch"]}}, TypeError, "the values of the grid must be numbers"),
        ({"grid": {"nesterov": [True]}}, TypeError, "the values of the grid must be numbers"),
        ({"evaluate": lambda p: p["w"]}, ValueError, r"must return a scalar, got shape \(5,\)"),
    ],
)
def test_arguments_of_other_kinds_are_refused(wrong, error, message):
    settings = {"grid": {"learning_rate": [0.1]}, "steps": 1} | wrong
    with pytest.raises(error, match=message):
        sweep(adamw, settings.pop("grid"), loss=loss, init=init, data=DATA, **settings)
