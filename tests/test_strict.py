"""JAX's strict settings, all at once: every recipe and wrapper, real and complex."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import EVERY_CONVENTION, FEWER_CONVENTIONS, FEWER_OFTEN, broadly, checking_leaks

from adaptive_opt import (
    adam,
    adamod,
    adamw,
    amsgrad,
    clip_by_previous_norm,
    lookahead,
    low_memory,
    offload,
    one_cycle,
    parameter_ema,
    single_pass,
    skip_nonfinite,
    skip_spikes,
    telemetry,
)
from adaptive_opt.testing.trees import avals, avals_of

CYCLE = one_cycle(1e-2, 10)
WRAPPED = {
    "skip_nonfinite": lambda: skip_nonfinite(adam(1e-2)),
    "skip_spikes": lambda: skip_spikes(adam(1e-2)),
    "clip_by_previous_norm": lambda: optax.chain(clip_by_previous_norm(1.0), adam(1e-2)),
    "offload": lambda: offload(adam(1e-2), min_size=1),
    "lookahead": lambda: lookahead(adam(1e-2), 2, lambda step: 0.5 + 0.0 * jnp.float32(step)),
    "parameter_ema": lambda: parameter_ema(adam(1e-2), lambda step: 0.5 + 0.0 * jnp.float32(step)),
    "bfloat16": lambda: low_memory(adam(1e-2), min_size=1),
    "8-bit": lambda: low_memory(amsgrad(1e-2), "8-bit", min_size=1),
    "single_pass": lambda: single_pass(adamod(1e-2)),
    "telemetry": lambda: adamod(1e-2, observers=(telemetry(every=1),)),
    "scheduled": lambda: adam(CYCLE.learning_rate, b1=CYCLE.b1, b2=lambda t: 0.9 + 0.0 * t),
    "an array": lambda: adamw(jnp.asarray(1e-2)),
    # optax asks for one dtype of all parameters, which strict promotion has for equal ones only.
    "injected": lambda: optax.inject_hyperparams(adam)(learning_rate=1e-2),
}


@contextlib.contextmanager
def strict():
    with (
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
        jax.debug_nans(True),
    ):
        yield


def parameters(*dtypes):
    """In one tree, a matrix and a vector; the zeros are for ``jax_debug_nans``."""
    return {
        f"{shape}{np.dtype(dtype)}": jnp.ones(shape, dtype).at[0].set(0)
        for dtype in dtypes
        for shape in ((2, 3), (3,))
    }


def assert_is_traced(make, params):
    """Promotion, ranks and leaks are seen while tracing."""
    with strict(), checking_leaks():
        optimizer = make()
        state = jax.eval_shape(optimizer.init, params)
        updates, after = jax.eval_shape(optimizer.update, params, state, params)
    assert avals_of(updates) == avals(params)
    assert avals_of(after) == avals_of(state)


def assert_takes_two_steps(make, params):
    """Not where leaks are looked for: there JAX compiles every operation again."""
    with strict():
        optimizer = make()
        state = optimizer.init(params)
        update = jax.jit(optimizer.update)
        for _ in range(2):
            updates, state = update(params, state, params)
        with jax.disable_jit():
            optimizer.update(params, state, params)
    for path, update in updates.items():
        assert update.dtype == params[path].dtype


NARROW = np.float32, np.complex64, jnp.bfloat16
NARROWLY = [name for name in WRAPPED if name != "injected"]


@pytest.mark.parametrize("name", FEWER_CONVENTIONS)
def test_every_recipe_is_traced_strictly(name):
    assert_is_traced(lambda: EVERY_CONVENTION[name](1e-2), parameters(*NARROW))


@pytest.mark.parametrize("name", FEWER_OFTEN)
def test_every_recipe_takes_strict_steps(name):
    assert_takes_two_steps(lambda: EVERY_CONVENTION[name](1e-2), parameters(*NARROW))


@pytest.mark.parametrize(
    "name", broadly(("8-bit", "telemetry", "skip_nonfinite", "lookahead"), NARROWLY)
)
def test_every_wrapper_is_traced_strictly(name):
    assert_is_traced(WRAPPED[name], parameters(*NARROW))


@pytest.mark.parametrize("name", broadly(("skip_nonfinite", "lookahead", "bfloat16"), NARROWLY))
def test_every_wrapper_takes_strict_steps(name):
    assert_takes_two_steps(WRAPPED[name], parameters(*NARROW))


@pytest.mark.parametrize(
    "name", broadly(("8-bit", "injected"), ("scheduled", "8-bit", "an array", "injected"))
)
def test_float64_is_strict(name, x64):
    assert_is_traced(WRAPPED[name], parameters(np.float64))
    assert_takes_two_steps(WRAPPED[name], parameters(np.float64))
