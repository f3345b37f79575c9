"""100,000 steps are those of the rule, and so are the steps at the counts where integers give out.

The rules are tests/rules.py, in long double. PyTorch's errors in float32 were recorded by
tests/references/record_long_runs.py.
"""

from __future__ import annotations

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rules import IS_WIDE, RULES, WIDE, adam, error, gradients, path_of, updates_of

import adaptive_opt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_WIDE, reason="long double has no more digits than float64 here"),
]
RECORDED = json.loads((pathlib.Path(__file__).parent / "references" / "long_runs.json").read_text())
STEPS, LAST = RECORDED["steps"], 2**31 - 1
OURS = {
    "adamw": functools.partial(adaptive_opt.adamw, weight_decay=1e-2),
    "lion": lambda lr: adaptive_opt.lion(lr / 10),
}


def recipe(name):
    return OURS.get(name, getattr(adaptive_opt, name))(1e-3)


def run(optimizer, given, start):
    """The parameters and updates of every step; from 0 each step is made from there."""

    @jax.jit
    def scan(given):
        def step(carry, g):
            x, state = carry
            update, state = optimizer.update(g, state, x)
            x = optax.apply_updates(x, update)
            return (x if start else jnp.zeros_like(x), state), (x, update)

        x = jnp.full(given.shape[1], start, given.dtype)
        return jax.lax.scan(step, (x, optimizer.init(x)), given)[1]

    return [np.asarray(path) for path in scan(jnp.asarray(given))]


@pytest.mark.parametrize("name", RULES)
def test_float64_is_the_rule_for_100_000_steps(name, x64):
    given, tenth = gradients(STEPS), STEPS // 10
    x, updates = run(recipe(name), given, 1.0)
    assert x.dtype == updates.dtype == np.float64
    rule = path_of(RULES[name](), given, 1.0)
    steps = np.diff(rule, axis=0, prepend=np.ones((1, 4), WIDE))
    for made, right in ((x, rule), (updates, steps)):
        apart = np.abs(made - right) / np.maximum.accumulate(np.abs(right))
        assert apart.max() <= 1e-12
    # No drift: the last steps are made as well as the first ones were.
    assert apart[-tenth:].max() <= 2 * apart[:tenth].max()


NOISE = 1.1
"""Parameters end where the rounding of their own sums led them, by another way in each program: at
0.67 to 1.03 of PyTorch's error. (Its AdamW, which multiplies them by 1 - 1e-5, rounded, is 170
times as far off.)"""


@pytest.mark.parametrize("name", RULES)
def test_float32_is_as_near_to_the_rule_as_pytorch(name):
    given = gradients(STEPS, RECORDED["weights"]).astype(np.float32)
    theirs, every = RECORDED["errors"][name], RECORDED["every"]
    x, _ = run(recipe(name), given, 1.0)
    assert x.dtype == np.float32
    right = path_of(RULES[name](), given, 1.0, every)
    assert error(x[every - 1 :: every], right) <= NOISE * theirs["parameters"]
    first = given[: RECORDED["first"]]
    _, updates = run(recipe(name), first, 0.0)
    # PyTorch takes b as float32 rounds it, and is 12 to 20 times as far off; Lion has no such sum.
    assert error(updates, updates_of(RULES[name](), first)) <= theirs["updates"]


def counted(state, count):
    """The state with every count put to so many steps."""
    return jax.tree.map(
        lambda x: jnp.full_like(x, count) if x.dtype == jnp.int32 and x.shape == () else x, state
    )


def warm_up(step):
    """Over 2^25 steps. (optax.linear_schedule divides int32 in float32, whatever is enabled.)"""
    return 1e-3 * jnp.minimum(jnp.asarray(step, float) / 2**25, 1.0)


AT_COUNTS = {name: (recipe(name), rule) for name, rule in RULES.items()} | {
    "memory of 10^7": (adaptive_opt.adam(1e-3, b2=1 - 1e-7), lambda: adam(b2=1 - 1e-7)),
    "warm-up of 2^25": (
        adaptive_opt.adam(warm_up),
        lambda: adam(lr=lambda step: WIDE(1e-3) * min(WIDE(step) / 2**25, 1)),
    ),
}


@pytest.mark.parametrize("name", AT_COUNTS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 3e-6)])
def test_steps_at_large_counts_are_those_of_the_rule(name, dtype, tolerance):
    """2^24 is where float32 has no odd numbers any more, 2^31 - 1 where the count stays."""
    optimizer, rule_of = AT_COUNTS[name]
    with jax.enable_x64(dtype == "float64"):
        update = jax.jit(optimizer.update)
        zero = jnp.zeros(4, dtype)
        for begin in (2**24 - 3, LAST - 3):
            state, rule = counted(optimizer.init(zero), begin), rule_of()
            for t, g in enumerate(gradients(6).astype(dtype), begin + 1):
                made, state = update(jnp.asarray(g), state, zero)
                right = rule(np.zeros(4, WIDE), g.astype(WIDE), min(t, LAST))
                assert made.dtype == dtype
                np.testing.assert_allclose(np.asarray(made, WIDE), right, rtol=tolerance, atol=0)
