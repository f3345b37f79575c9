"""Bias corrections are right to rounding in float32; those of optax only where asked for."""

from __future__ import annotations

import decimal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import gradient_trees, normal_tree, train

from adaptive_opt import RECIPES, adaptive, debias, first_moment
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
