"""Laws of the algorithms, on gradients that hypothesis chooses; one compiled program for each.

A draw is a seed; the seed gives a batch of runs with gradients of wild and tame sizes, and vmap
takes them all at once.
"""

from __future__ import annotations

import functools
import inspect

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    EACH_OFTEN_ONCE,
    EVERY_CONVENTION,
    PER_TENSOR,
    RECIPES,
    START_AT_PARAMS,
    assert_bit_equal,
    gradient_trees,
    normal_tree,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import adaptive_opt as ao

RUNS, STEPS, WEIGHTS = 24, 12, 16
seeds = st.integers(0, 2**32 - 1)
law = settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

ELEMENTWISE = {
    name: recipe
    for name, recipe in EVERY_CONVENTION.items()
    if name.split(" (")[0] not in ("rmsprop of the tree", *PER_TENSOR)
}


def gradients_of(seed):
    """RUNS runs of STEPS gradients: sizes from 1e-12 to 1e6, zeros, and sudden changes."""
    rng = np.random.default_rng(seed)
    shape = (RUNS, STEPS, WEIGHTS)
    spread = rng.choice([0.0, 1.0, 6.0], (RUNS, 1, 1))
    sizes = 10 ** (rng.uniform(-6, 0, (RUNS, 1, WEIGHTS)) + spread * rng.uniform(-1, 1, shape))
    zero = rng.random(shape) < rng.choice([0.0, 0.3], (RUNS, 1, 1))
    return jnp.asarray(rng.standard_normal(shape) * sizes * ~zero, jnp.float64)


def runner(make, *buffers, params=0.5):
    """A compiled function from the gradients of all runs to their updates, and named buffers."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    def run(gradients, factor):
        optimizer = make(factor)

        def step(state, gradient):
            updates, state = optimizer.update(gradient, state, weights)
            return state, (updates, *(optax.tree.get(state, name) for name in buffers))

        weights = jax.tree.map(lambda g: jnp.full_like(g[0], params), gradients)
        return jax.lax.scan(step, optimizer.init(weights), gradients)[1]

    return lambda gradients, factor=1.0: jax.device_get(run(gradients, factor))


def smallest_normal(x):
    return np.abs(x) > 1e-290


@pytest.mark.parametrize("convention", ["reference", "paper", "robust"])
def test_the_rate_of_adamod_never_exceeds_that_of_adam(convention, x64):
    """Same moments, same direction: an update that is never larger, and sometimes smaller."""
    eps_like = {"paper": "torch"}.get(convention, "keras")
    adamod = runner(lambda lr: ao.adamod(lr * 1e-2, b3=0.9, convention=convention))
    adam = runner(lambda lr: ao.adam(lr * 1e-2, convention=eps_like))
    smaller = []

    @law
    @given(seeds)
    def check(seed):
        gradients = gradients_of(seed)
        (bounded,), (free,) = adamod(gradients), adam(gradients)
        assert np.all(np.abs(bounded) <= np.abs(free) * (1 + 1e-13))
        smaller.append(np.mean(np.abs(bounded) < np.abs(free) * 0.9))

    check()
    assert max(smaller) > 0.1  # the bound was at work


def test_the_rate_of_amsgrad_never_rises_in_the_form_of_the_paper(x64):
    run = runner(lambda lr: ao.amsgrad(lr * 1e-2, convention="paper"), "mu", "nu_max")
    rises = runner(lambda lr: ao.adam(lr * 1e-2, b2=0.5), "nu")

    @law
    @given(seeds)
    def check(seed):
        gradients = gradients_of(seed)
        updates, mu, nu_max = run(gradients)
        assert np.all(np.diff(nu_max, axis=1) >= 0)
        moved = smallest_normal(mu) & (nu_max > 0)
        rate = np.where(moved, np.abs(updates) / np.where(moved, np.abs(mu), 1), np.nan)
        later, earlier = rate[:, 1:], rate[:, :-1]
        assert not np.any(later > earlier * (1 + 1e-13))  # false where either is not known
        assert np.any(np.diff(rises(gradients)[1], axis=1) < 0)  # Adam's rate does rise

    check()


FRICTIONS = {"absolute": (0.5, 1.0), "signed": (0.0, 1.0), "wide": (0.5, 5.0)}


@pytest.mark.parametrize("kind", FRICTIONS)
def test_friction_stays_in_its_range(kind, x64):
    low, high = FRICTIONS[kind]
    damped = runner(lambda lr: ao.diffgrad(lr * 1e-2, friction=kind))
    free = runner(lambda lr: ao.adam(lr * 1e-2, convention="keras"))
    seen = []

    @law
    @given(seeds)
    def check(seed):
        gradients = gradients_of(seed)
        (with_friction,), (without,) = damped(gradients), free(gradients)
        # A moment that nearly cancels is rounded in units of what it was before.
        unit = 1e-12 * np.maximum.accumulate(np.abs(without), axis=1)
        along = with_friction * np.sign(without)
        assert np.all(along >= low * np.abs(without) - high * unit)
        assert np.all(along <= high * np.abs(without) + high * unit)
        moved = np.abs(without) > 1e9 * unit
        friction = along[moved] / np.abs(without)[moved]
        seen.append((friction.min(), friction.max()))

    check()
    width = high - low
    assert min(s[0] for s in seen) < low + 0.02 * width  # the range is used to its ends
    assert max(s[1] for s in seen) > high - 0.02 * width


def test_elementwise_recipes_commute_with_permutation_concatenation_and_splitting(x64):
    """All recipes in one program: whole, permuted, and cut into leaves of other shapes."""

    def cut(x):
        return {"matrix": x[..., :12].reshape(*x.shape[:-1], 3, 4), "rest": [x[..., 12:]]}

    def join(tree):
        matrix, rest = tree["matrix"], tree["rest"][0]
        return np.concatenate([matrix.reshape(*rest.shape[:-1], 12), rest], axis=-1)

    def every(gradients):
        def one(name):
            recipe = ELEMENTWISE[name]
            # Decay and lookahead see the parameters; centralize is not elementwise.
            extra = {"centralize": False} if name == "ranger" else {}
            optimizer = recipe(1e-2, **extra)
            weights = jax.tree.map(lambda g: jnp.full_like(g[0], 0.5), gradients)

            def step(state, gradient):
                updates, state = optimizer.update(gradient, state, weights)
                return state, updates

            return jax.lax.scan(step, optimizer.init(weights), gradients)[1]

        return {name: one(name) for name in RECIPES if name in ELEMENTWISE}

    run = jax.jit(jax.vmap(every))

    @settings(law, max_examples=5)
    @given(seeds)
    def check(seed):
        gradients = gradients_of(seed)
        order = np.random.default_rng(seed).permutation(WEIGHTS)
        whole, permuted = run(gradients), run(gradients[..., order])
        parts = run(cut(gradients))
        for name, updates in whole.items():
            # In units of the largest update so far, and of parameters that come from slow weights.
            unit = 1e-13 * np.maximum.accumulate(np.abs(updates), axis=1)
            unit = unit + (1e-15 if name in START_AT_PARAMS else 0)
            assert np.all(np.abs(join(parts[name]) - updates) <= unit), name
            assert np.all(np.abs(permuted[name] - updates[..., order]) <= unit[..., order]), name

    check()


def test_updates_are_odd_in_the_gradient_and_linear_in_the_learning_rate(x64):
    """Exactly: a sign and a power of two round nothing. Without decay and bounds on the rate."""
    # Bounds do not depend on the gradient; what is no matrix may have a rate of its own.
    own = {"final_learning_rate", "rest_learning_rate"}
    names = [n for n in RECIPES if not own & {*inspect.signature(RECIPES[n]).parameters}]

    def every(gradients, factor):
        def one(name):
            plain = {"weight_decay": 0.0} if name in ("adamw", "nadamw", "sgdw") else {}
            optimizer = RECIPES[name](factor * 1e-2, **plain)
            weights = jnp.zeros_like(gradients[0])

            def step(state, gradient):
                updates, state = optimizer.update(gradient, state, weights)
                return state, updates

            return jax.lax.scan(step, optimizer.init(weights), gradients)[1]

        return {name: one(name) for name in names}

    run = jax.jit(jax.vmap(every, in_axes=(0, None)))

    @settings(law, max_examples=5)
    @given(seeds)
    def check(seed):
        gradients = gradients_of(seed)
        updates = run(gradients, 1.0)
        opposite, faster = run(-gradients, 1.0), run(gradients, 4.0)
        for name in names:
            np.testing.assert_array_equal(opposite[name], -updates[name], err_msg=name)
            np.testing.assert_array_equal(faster[name], 4 * updates[name], err_msg=name)

    check()


@pytest.mark.parametrize("name", EACH_OFTEN_ONCE)
def test_a_run_continued_from_saved_bytes_at_any_step_is_bit_equal(name):
    fall = optax.linear_schedule(1.0, 0.0, 5)
    if name == "sgdw (paper)":  # whose decay is "independent"
        optimizer = EVERY_CONVENTION[name](1e-2, schedule=fall)
    else:
        optimizer = EVERY_CONVENTION[name](lambda t: 1e-2 * fall(t))
    gradients = list(gradient_trees(5))

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = normal_tree()
    history = [(params, optimizer.init(params))]
    for gradient in gradients:
        history.append(step(*history[-1], gradient))
    for saved_at in range(5):
        fresh = (normal_tree(7), optimizer.init(normal_tree(7)))
        saved = flax.serialization.to_bytes(history[saved_at])
        restored = flax.serialization.from_bytes(fresh, saved)
        for gradient in gradients[saved_at:]:
            restored = step(*restored, gradient)
        assert_bit_equal(restored, history[-1])
    assert step._cache_size() <= 2  # arrays of jax, and of numpy as flax restores them
