"""The range test finds what it says, on a copy, in one program; a sweep's best stands first."""

from __future__ import annotations

import dataclasses
import types

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from common import assert_bit_equal
from flax import nnx

from adaptive_opt import adamw, lr_find, schedule_free_sgd, sgd, skip_nonfinite, sweep

RNG = np.random.default_rng(0)
CURVATURE = np.array([4.0, 1.0, 0.25])
BATCHES = [jnp.asarray(x) for x in RNG.normal(size=(40, 3))]
SETTINGS = {"low": 1e-4, "high": 10.0, "steps": 40}


def quadratic(w, x):
    return 0.5 * jnp.sum(CURVATURE * (w - 3.0 - 0.1 * x) ** 2)


def by_hand(smoothing, divergence):
    """The same with SGD in NumPy: rates, losses, their averages."""
    w, average, rows = np.zeros(3), 0.0, []
    for t in range(40):
        rate = 1e-4 * 1e5 ** (t / 39)
        distance = w - 3.0 - 0.1 * np.asarray(BATCHES[t])
        loss = 0.5 * np.sum(CURVATURE * distance**2)
        average = smoothing * average + (1 - smoothing) * loss
        rows.append((rate, loss, average / (1 - smoothing ** (t + 1))))
        if rows[-1][2] > divergence * min(row[2] for row in rows):
            break
        w = w - rate * CURVATURE * distance
    return np.array(rows).T


@pytest.mark.parametrize(("smoothing", "divergence"), [(0.5, 4.0), (0.0, 2.0)])
def test_rates_losses_and_suggestions_are_those_of_a_loop_by_hand(smoothing, divergence, x64):
    found = lr_find(
        quadratic, jnp.zeros(3), iter(BATCHES), sgd,
        smoothing=smoothing, divergence=divergence, **SETTINGS,
    )  # fmt: skip
    rates, losses, smoothed = by_hand(smoothing, divergence)
    np.testing.assert_allclose(found.rates, rates, rtol=1e-12)
    np.testing.assert_allclose(found.losses, losses, rtol=1e-12)
    np.testing.assert_allclose(found.smoothed, smoothed, rtol=1e-12)
    assert found.diverged
    assert len(rates) < 40
    kept = slice(4, smoothed.argmin() + 1)  # without the first tenth of the steps
    slopes = np.diff(smoothed[kept]) / np.diff(np.log(rates[kept]))
    assert found.steepest == pytest.approx(rates[kept][slopes.argmin()], rel=1e-12)
    assert found.minimum_over_ten == pytest.approx(rates[smoothed.argmin()] / 10, rel=1e-12)
    assert found.steepest < 2 / CURVATURE.max() < found.rates[-1]  # where SGD becomes unstable
    assert "diverges at" in str(found)


class Module(nnx.Module):
    def __init__(self):
        self.w = nnx.Param(jnp.zeros(3))
        self.seen = nnx.BatchStat(jnp.zeros(()))

    def loss(self, x):
        self.seen[...] += 1
        return quadratic(self.w[...], x)


class Tree(eqx.Module):
    w: jax.Array
    name: str = "static"


HOMES = {
    "nnx": (Module, lambda m, x: m.loss(x)),
    "equinox": (lambda: Tree(jnp.zeros(3)), lambda m, x: quadratic(m.w, x)),
    "linen": (
        lambda: types.SimpleNamespace(params={"w": jnp.zeros(3)}, opt_state=0, tx=0, replace=0),
        lambda p, x: quadratic(p["w"], x),
    ),
}


def arrays(model):
    tree = nnx.state(model) if isinstance(model, nnx.Module) else vars(model)
    return [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype")]


@pytest.mark.parametrize("home", HOMES)
def test_every_container_is_tested_and_left_as_it_was(home):
    make, loss = HOMES[home]
    model = make()
    found = lr_find(loss, model, BATCHES, adamw, smoothing=0.5, **SETTINGS)
    plain = lr_find(quadratic, jnp.zeros(3), BATCHES, adamw, smoothing=0.5, **SETTINGS)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-6)
    assert_bit_equal(arrays(model), arrays(make()))


def test_all_steps_are_one_program_whatever_is_around_the_optimizer():
    traced = []

    def counted(w, x):
        traced.append(1)
        return quadratic(w, x)

    def accumulated(rate):
        return skip_nonfinite(
            optax.MultiSteps(schedule_free_sgd(rate), 2).gradient_transformation()
        )

    found = lr_find(counted, jnp.zeros(3), BATCHES[:3], accumulated, smoothing=0.5, **SETTINGS)
    assert len(traced) == 1
    assert found.diverged
    assert found.rates[-1] > 2 / CURVATURE.max()  # the rate is that of the step, not of its count


def test_losses_below_zero_do_not_diverge_by_their_sign():
    found = lr_find(lambda w, x: jnp.sum((w - x) ** 2) - 9.0, jnp.zeros(3), BATCHES[:1], sgd,
                    low=1e-4, high=0.1, steps=20, smoothing=0.0)  # fmt: skip
    assert not found.diverged
    assert len(found.rates) == 20
    assert found.minimum_over_ten == pytest.approx(0.01)
    assert "did not diverge up to 0.1" in str(found)


def test_the_steepest_rate_is_not_looked_for_where_the_loss_has_begun_to_diverge():
    losses = iter([5.0, 5.0, 5.0, 4.0, 3.0, 9.0, 2.9, 8.0, 8.0, 8.0])

    def told(w, x):
        return x + 0.0 * w.sum()

    found = lr_find(told, jnp.zeros(3), map(jnp.asarray, losses), sgd, smoothing=0.0, steps=10)
    assert found.minimum_over_ten == pytest.approx(found.rates[6] / 10)
    assert found.steepest == found.rates[5]
    early = lr_find(told, jnp.zeros(3), map(jnp.asarray, [5.0, 5.0, 4.5, 2.0, *[3.0, 7.0] * 3]),
                    sgd, smoothing=0.0, steps=10)  # fmt: skip
    assert early.steepest == early.rates[2]


def test_a_loss_that_is_no_number_ends_the_test():
    def broken(w, x):
        return jnp.where(w.sum() > 1.0, jnp.nan, quadratic(w, x))

    found = lr_find(broken, jnp.zeros(3), BATCHES, sgd, smoothing=0.5, **SETTINGS)
    assert found.diverged
    assert np.isnan(found.losses[-1])
    assert np.isfinite(found.losses[:-1]).all()
    rising = lr_find(lambda w, x: -quadratic(w, x) * 0 + jnp.sum(w * 0), jnp.zeros(3), BATCHES,
                     sgd, **SETTINGS)  # fmt: skip
    assert np.isnan([rising.steepest, rising.minimum_over_ten]).all()
    assert "did not fall" in str(rising)


def test_the_picture_shows_losses_and_suggestions():
    found = lr_find(quadratic, jnp.zeros(3), BATCHES, sgd, smoothing=0.5, **SETTINGS)
    axes = found.draw("loss (nats)").axes[0]
    raw, mean, *marks = axes.lines
    np.testing.assert_array_equal(raw.get_xydata(), np.stack([found.rates, found.losses], 1))
    np.testing.assert_array_equal(mean.get_xydata(), np.stack([found.rates, found.smoothed], 1))
    assert [m.get_xdata()[0] for m in marks] == [found.steepest, found.minimum_over_ten]
    assert (axes.get_xscale(), axes.get_ylabel()) == ("log", "loss (nats)")
    assert axes.get_title().startswith("the loss diverges at")
    plt.close("all")


def test_the_height_of_the_picture_is_that_of_the_way_down():
    found = lr_find(quadratic, jnp.zeros(3), BATCHES, sgd, smoothing=0.5, **SETTINGS)
    lowest = np.nanargmin(found.smoothed)
    assert lowest < len(found.smoothed) - 1
    exploded = np.where(np.arange(len(found.smoothed)) > lowest, 1e9, found.smoothed)
    low, high = dataclasses.replace(found, smoothed=exploded).draw("loss").axes[0].get_ylim()
    least, most = found.smoothed[lowest], found.smoothed[:lowest].max()
    assert low < least < most < high
    assert most - least > (high - low) / 2
    plt.close("all")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"low": 0.0}, ValueError, "low must be finite and greater than 0, got 0"),
        ({"low": 1.0, "high": 1.0}, ValueError, "high must be greater than low, got low=1"),
        ({"steps": 3}, ValueError, "steps must be whole and at least 10, got 3"),
        ({"divergence": 1.0}, ValueError, "divergence must be finite and greater than 1, got 1"),
        ({"smoothing": 1.0}, ValueError, r"smoothing must be in \[0, 1\), got 1"),
        ({"batches": iter(BATCHES[:7])}, ValueError, "there were 7 batches, and the test takes 40"),
        ({"batches": []}, ValueError, "there were 0 batches"),
        ({"recipe": sgd(1e-3)}, TypeError, "recipe must be a function from a learning rate"),
        ({"recipe": lambda lr: lr}, TypeError, "recipe must return an optimizer"),
        ({"recipe": lambda lr: sgd(1e-3)}, ValueError, "does not use the learning rate"),
    ],
)
def test_mistakes_are_named(wrong, error, message):
    settings = {"batches": BATCHES, "recipe": sgd, **SETTINGS} | wrong
    with pytest.raises(error, match=message):
        lr_find(quadratic, jnp.zeros(3), **settings)


def test_the_best_of_a_sweep_stand_first_over_their_seeds():
    data = jnp.asarray(RNG.normal(size=(64, 3)))
    found = sweep(
        sgd, {"learning_rate": [1e3, 1e-3, 0.3]}, loss=lambda w, x: quadratic(w, x) / 8,
        init=lambda key: jax.random.normal(key, (3,)), data=data, steps=60, batch_size=8,
        seeds=(0, 1, 2),
    )  # fmt: skip
    rows = found.best()
    assert [row["learning_rate"] for row in rows] == [0.3, 1e-3, 1e3]
    for row in rows[:2]:
        own = [r["result"] for r in found.table() if r["learning_rate"] == row["learning_rate"]]
        assert row["result"] == pytest.approx(np.mean(own))
        assert row["spread"] == pytest.approx(np.std(own, ddof=1))
        assert (row["seeds"], row["diverged"]) == (3, 0)
    assert rows[2]["diverged"] == 3
    assert np.isnan([rows[2]["result"], rows[2]["spread"]]).all()
    header, first, *_ = str(rows).splitlines()
    assert header.split() == ["learning_rate", "result", "spread", "seeds", "diverged"]
    assert first.split()[0] == "0.3"
