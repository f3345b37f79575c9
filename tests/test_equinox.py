"""Equinox takes an optimizer's functions apart: the arrays are in sight, the rest is hashable.

Optimistix' ``OptaxMinimiser`` does so, and then compiles once for all learning rates.
"""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from common import RECIPES, assert_bit_equal, often
from equinox.internal import closure_to_pytree

from adaptive_opt import (
    adam,
    lookahead,
    low_memory,
    single_pass,
    skip_nonfinite,
    skip_spikes,
    telemetry,
)

WRAPPED = {
    "clipped": lambda lr: optax.chain(optax.clip(1.0), adam(lr)),
    "observed": lambda lr: adam(lr, observers=telemetry()),
    "lookahead": lambda lr: lookahead(RECIPES["sgd"](lr)),
    "guarded": lambda lr: skip_nonfinite(RECIPES["adamod"](lr)),
    "without spikes": lambda lr: skip_spikes(RECIPES["adam"](lr)),
    "in 16 bits": lambda lr: low_memory(RECIPES["diffmod"](lr)),
    "in a single pass": lambda lr: single_pass(RECIPES["amsgrad"](lr)),
}
MAKERS = RECIPES | WRAPPED


@pytest.mark.broad
@pytest.mark.parametrize("name", often(("adamw", "soap", *WRAPPED), MAKERS))
def test_another_learning_rate_compiles_nothing_anew(name):
    x, traces = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, []

    @eqx.filter_jit
    def two_steps(optimizer, x):
        traces.append(name)
        state = optimizer.init(x)
        for _ in range(2):
            updates, state = optimizer.update(x, state, x)
            x = optax.apply_updates(x, updates)
        return x

    found = []
    for rate in (0.1, 0.2):
        optimizer = MAKERS[name](jnp.asarray(rate))
        found.append(two_steps(closure_to_pytree(optimizer), x))

    def plain(x, rate):
        optimizer = MAKERS[name](rate)
        state = optimizer.init(x)
        for _ in range(2):
            updates, state = optimizer.update(x, state, x)
            x = optax.apply_updates(x, updates)
        return x

    assert traces == [name]
    assert_bit_equal(found[1], jax.jit(plain)(x, jnp.asarray(0.2)))
