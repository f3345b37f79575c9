"""adam, adamw and scale_by_adam are drop-ins: the numbers of optax, and its state, both ways."""

from __future__ import annotations

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, one_in, train, ulps

import adaptive_opt

DECAY = {"weight_decay": 0.1}
MASK = {"dense": {"kernel": True, "bias": False}, "scale": False}
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 1e-2, 20, 200)

CASES = {
    "adam": ("adam", {}),
    "adam eps_root": ("adam", {"eps_root": 1e-6}),
    "adam nesterov": ("adam", {"nesterov": True}),
    "adam far": ("adam", {"b1": 0.8, "b2": 0.9, "eps": 1e-3}),
    "adam schedule": ("adam", {"learning_rate": SCHEDULE}),
    "adamw": ("adamw", DECAY),
    "adamw masked": ("adamw", DECAY | {"mask": MASK}),
    "adamw nesterov schedule": ("adamw", DECAY | {"nesterov": True, "learning_rate": SCHEDULE}),
    "adamw decay schedule": ("adamw", {"weight_decay": optax.linear_schedule(0.1, 0.0, 100)}),
    "scale_by_adam": ("scale_by_adam", {}),
    "scale_by_adam eps_root": ("scale_by_adam", {"eps_root": 1e-6}),
    "scale_by_adam nesterov": ("scale_by_adam", {"nesterov": True}),
}


def pair(name, arguments):
    rate = {} if name == "scale_by_adam" else {"learning_rate": 1e-2}
    ours = {} if name == "scale_by_adam" else {"convention": "optax"}
    return (
        getattr(adaptive_opt, name)(**rate | arguments | ours),
        getattr(optax, name)(**rate | arguments),
    )


@pytest.mark.parametrize("case", one_in(2, CASES))
def test_float32_moments_are_bit_equal_and_updates_within_two_ulps(case):
    ours, theirs = pair(*CASES[case])
    # The same parameters for both at every step, so that the decay sees the same numbers.
    params = normal_tree()
    update, reference = jax.jit(ours.update), jax.jit(theirs.update)
    state, reference_state = ours.init(params), theirs.init(params)
    for gradient in gradient_trees(200):
        updates, state = update(gradient, state, params)
        expected, reference_state = reference(gradient, reference_state, params)
        assert_bit_equal(state, reference_state)
        assert ulps(updates, expected) <= 2
        params = optax.apply_updates(params, expected)


@pytest.mark.parametrize("dtype", [np.float32, pytest.param(np.float64, marks=pytest.mark.broad)])
@pytest.mark.parametrize("case", one_in(2, CASES))
def test_a_checkpoint_of_one_trains_on_identically_in_the_other(case, dtype):
    with jax.enable_x64(dtype == np.float64):
        ours, theirs = pair(*CASES[case])
        params = normal_tree(dtype=dtype)
        gradients = list(gradient_trees(20, dtype))
        middle, ours_state, _ = train(ours, params, gradients[:10])
        _, theirs_state, _ = train(theirs, params, gradients[:10])
        assert jax.tree.structure(ours_state) == jax.tree.structure(theirs_state)
        end_ours, last_ours, _ = train(ours, middle, gradients[10:], theirs_state)
        end_theirs, last_theirs, _ = train(theirs, middle, gradients[10:], ours_state)
        chex.assert_trees_all_equal_shapes_and_dtypes(last_ours, last_theirs)
        tolerance = 1e-6 if dtype == np.float32 else 1e-14
        for a, b in zip(*map(jax.tree.leaves, (end_ours, end_theirs)), strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
            assert a.dtype == dtype


def test_a_bfloat16_mu_stays_closer_to_the_float32_one_than_that_of_optax():
    # b1 * mu is formed in float32 here, in bfloat16 by optax: the one place where they part.
    ours = adaptive_opt.adam(1e-2, convention="optax")
    exact = train(ours, normal_tree(), gradient_trees(50))[1][0]
    ours, theirs = (
        train(tx, normal_tree(), gradient_trees(50))[1][0]
        for tx in pair("adam", {"mu_dtype": jnp.bfloat16})
    )
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, theirs)
    assert_bit_equal(ours.nu, exact.nu)

    def error(state):
        differences = jax.tree.map(lambda a, b: jnp.mean(jnp.abs(a - b)), state.mu, exact.mu)
        return sum(jax.tree.leaves(differences))

    assert error(ours) < error(theirs)


@pytest.mark.parametrize("name", ["adam", "adamw", "scale_by_adam"])
def test_signatures_and_defaults_are_those_of_optax(name):
    ours, theirs = (
        inspect.signature(getattr(library, name)).parameters for library in (adaptive_opt, optax)
    )
    assert list(ours)[: len(theirs)] == list(theirs)
    for parameter in theirs.values():
        assert ours[parameter.name].default == parameter.default
        assert ours[parameter.name].kind == parameter.kind


def test_flat_amsgrad_is_that_of_optax(x64):
    flat = optax.chain(
        adaptive_opt.open_step(),
        adaptive_opt.scale_by_adam(b2=0.9),
        adaptive_opt.amsgrad_max(),
        adaptive_opt.close_step(),
        optax.scale_by_learning_rate(1e-2),
    )
    params = normal_tree(dtype=np.float64)
    gradients = list(gradient_trees(300, np.float64))
    _, state, history = train(flat, params, gradients)
    _, reference, expected = train(optax.amsgrad(1e-2, b2=0.9), params, gradients)
    for (_, updates), (_, wanted) in zip(history, expected, strict=True):
        for a, b in zip(*map(jax.tree.leaves, (updates, wanted)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-15, atol=0)
    assert_bit_equal(optax.tree.get(state, "nu_max"), optax.tree.get(reference, "nu_max"))
