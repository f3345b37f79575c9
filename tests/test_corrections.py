"""Bias corrections are right to rounding in float32; those of optax only where asked for."""

from __future__ import annotations

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gradient_trees, normal_tree, train

from adaptive_opt import (
    RECIPES,
    adamax,
    adaptive,
    debias,
    first_moment,
    per_weight_rate,
    scale_by_adam,
    second_moment,
    sgd,
)
from adaptive_opt.core.now import Correction, Now

DECAYS = (0.9, 0.99, 0.999, 0.9999, 0.99999, 0.99999999)
STEPS = (1, 2, 10, 100, 1000, 100_000)

# What a decay is where it arrives: a Python number is itself, a traced one the float that it is.
FORMS = {
    "a Python number": lambda b: (b, decimal.Decimal(b)),
    "an array": lambda b: (jnp.float32(b), decimal.Decimal(float(np.float32(b)))),
    "a schedule": lambda b: (
        lambda step: jnp.float32(b) + 0 * step,
        decimal.Decimal(float(np.float32(b))),
    ),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("b", DECAYS)
def test_a_correction_is_right_to_rounding(b, form):
    with decimal.localcontext(prec=60):
        decay, exact = FORMS[form](b)
        if exact == 1:  # 0.99999999 in float32: there is nothing to correct
            return
        found = jax.jit(lambda count: Now(count).correction(decay, Correction()))
        for t in STEPS:
            wanted = 1 - exact**t
            error = abs(decimal.Decimal(float(found(jnp.int32(t)))) / wanted - 1)
            assert error <= decimal.Decimal("2e-7"), (t, float(error))


def test_a_decay_next_to_one_takes_steps_and_makes_no_nan():
    gradients = list(gradient_trees(3))
    _, _, history = train(RECIPES["adam"](1e-2, b2=0.99999999, eps=0.0), normal_tree(), gradients)
    for _, updates in history:
        assert all(np.isfinite(u).all() for u in jax.tree.leaves(updates))
    first = jax.tree.leaves(history[0][1])
    seen = [np.asarray(g) != 0 for g in jax.tree.leaves(gradients[0])]
    for u, s in zip(first, seen, strict=True):
        np.testing.assert_allclose(np.abs(np.asarray(u))[s], 1e-2, rtol=1e-2)


def test_the_optax_form_is_the_one_that_is_off():
    x, gradient = jnp.zeros(()), jnp.ones(())

    def first(rule):
        return float(jax.jit(rule.update)(gradient, rule.init(x), x)[0])

    ours = adaptive(first_moment(0.999), debias(0.999))
    theirs = adaptive(first_moment(0.999), debias(0.999, as_in_optax=True))
    assert abs(first(ours) - 1) < 2e-7
    assert abs(first(theirs) - 1) > 5e-6


def test_an_average_with_a_decay_next_to_one_decays():
    """The decay is 1 in float32; over 2,000 steps the average is that of float64 all the same."""
    rule = adaptive(first_moment(1 - 1e-8))
    gradients = jnp.sin(jnp.arange(2000.0))[:, None] + 0.5

    def last(x):
        state = jax.lax.scan(lambda s, g: (rule.update(g, s)[1], None), rule.init(x[0]), x)[0]
        return state.buffers["mu"]

    found = jax.jit(last)(gradients)
    exact = 1e-8 * np.sum(
        np.asarray(gradients, np.float64) * (1 - 1e-8) ** np.arange(1999, -1, -1)[:, None]
    )
    np.testing.assert_allclose(found, exact, rtol=1e-5)


@pytest.mark.parametrize("b2", DECAYS)
def test_a_weight_whose_square_overflowed_stands_still(b2):
    rule = adaptive(second_moment(b2), per_weight_rate(1e-8))
    update, x = jax.jit(rule.update), jnp.zeros(2)
    _, state = update(jnp.array([1e30, 1.0]), rule.init(x))
    updates, state = update(jnp.ones(2), state)
    assert updates[0] == 0 < updates[1]
    assert state.buffers["nu"][0] == np.inf


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda: scale_by_adam(b2=0.99999999), "b2 of debias"),
        (lambda: adamax(1e-3, b2=0.99999999), "b2 of infinity_moment"),
        (lambda: sgd(1e-3, momentum=0.99999999), "momentum of heavy_ball"),
    ],
)
def test_a_decay_that_is_one_in_float32_is_refused_where_nothing_else_carries_it(make, what):
    def one_step():
        optimizer = make()
        optimizer.update(jnp.ones(2), optimizer.init(jnp.ones(2)), jnp.ones(2))

    with pytest.raises(ValueError, match=f"{what} is 0.99999999, which is 1 in float32"):
        one_step()


SCHEDULES = {
    "learning_rate": lambda wrong: RECIPES["adam"](wrong),
    "b2 of second_moment": lambda wrong: RECIPES["adam"](1e-3, b2=wrong),
    "weight_decay": lambda wrong: RECIPES["adamw"](1e-3, weight_decay=wrong),
    "slow_step_size": lambda wrong: RECIPES["ranger"](1e-3, slow_step_size=wrong),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_what_a_schedule_returns_is_checked_for_width_and_shape(name):
    x = jnp.ones(2)
    for wrong, message in (
        (lambda step: jnp.bfloat16(0.999), f"schedule of {name} returned arrived as bfloat16"),
        (lambda step: jnp.full(2, 0.5), f"schedule of {name} returned must be a scalar"),
        (lambda step: None, f"schedule of {name} must return a number"),
    ):
        optimizer = SCHEDULES[name](wrong)
        with pytest.raises((ValueError, TypeError), match=message):
            jax.eval_shape(optimizer.update, x, optimizer.init(x), x)
