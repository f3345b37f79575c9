"""Brackets and flat chains are the same thing, and special cases of the algorithms coincide."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import FEW_OFTEN, RECIPES, assert_bit_equal, gradient_trees, normal_tree, train

from adaptive_opt import (
    adam,
    adamod,
    adamod_momental_bound,
    adamw,
    adaptive,
    amsgrad,
    amsgrad_max,
    close_step,
    debias,
    debias_rate,
    decoupled_weight_decay,
    describe,
    diffgrad,
    diffgrad_friction,
    diffmod,
    first_moment,
    nesterov_moment,
    open_step,
    per_weight_rate,
    scale_by_adam,
    scale_rate,
    second_moment,
)

STEPS = 60


def updates_of(optimizer, dtype=np.float32, gradients=None):
    gradients = list(gradient_trees(STEPS, dtype)) if gradients is None else gradients
    history = train(optimizer, normal_tree(dtype=dtype), gradients)[2]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *(updates for _, updates in history))


def assert_close(actual, expected, tolerance):
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        scale = np.maximum.accumulate(np.abs(b), axis=0)
        assert np.all(np.abs(a - b) <= tolerance * scale)


LISTS = {
    "adam and every refinement": lambda: [
        scale_by_adam(0.9, 0.99, 1e-8),
        amsgrad_max(),
        adamod_momental_bound(0.9),
        diffgrad_friction(),
    ],
    "the parts of Adam": lambda: [
        first_moment(0.9),
        second_moment(0.99),
        debias(0.9, 0.99),
        per_weight_rate(1e-8),
    ],
    "nesterov": lambda: [scale_by_adam(nesterov=True), adamod_momental_bound(0.9)],
    "eps-hat": lambda: [
        first_moment(0.9),
        second_moment(0.99),
        amsgrad_max(),
        per_weight_rate(1e-8),
        debias_rate(0.9, 0.99),
        scale_rate(0.1),
        adamod_momental_bound(len_memory=10, average=True),
        diffgrad_friction("wide"),
    ],
    "momentum only": lambda: [first_moment(0.9), debias(b1=0.9), diffgrad_friction("signed")],
}


@pytest.mark.parametrize("stages", LISTS.values(), ids=LISTS)
def test_flat_chain_and_bracket_give_the_same_bits(stages):
    tail = [decoupled_weight_decay(1e-2), optax.scale_by_learning_rate(1e-2)]
    flat = optax.chain(open_step(), *stages(), close_step(), *tail)
    bracket = optax.chain(adaptive(*stages()), *tail)
    gradients = list(gradient_trees(STEPS))
    params, state, _ = train(flat, normal_tree(), gradients)
    expected, bracket_state, _ = train(bracket, normal_tree(), gradients)
    assert_bit_equal(params, expected)
    for name, buffer in bracket_state[0].buffers.items():
        assert_bit_equal(optax.tree.get(state, name), buffer)


def test_flat_adamod_is_that_of_the_paper(x64):
    flat = optax.chain(
        open_step(),
        scale_by_adam(0.9, 0.99),
        adamod_momental_bound(0.9),
        close_step(),
        optax.scale_by_learning_rate(1e-2),
    )
    paper = adamod(1e-2, b2=0.99, b3=0.9, convention="paper")
    assert_close(updates_of(flat, np.float64), updates_of(paper, np.float64), 1e-14)


def test_scale_by_adam_in_a_bracket_equals_it_plain():
    gradients = list(gradient_trees(STEPS))
    plain = updates_of(scale_by_adam(), gradients=gradients)
    assert_bit_equal(updates_of(adaptive(scale_by_adam()), gradients=gradients), plain)


def test_every_recipe_gives_extra_args_support_and_ignores_what_it_does_not_know():
    for recipe in RECIPES.values():
        optimizer = recipe(1e-3)
        assert isinstance(optimizer, optax.GradientTransformationExtraArgs)
        x = jnp.ones(2)
        optimizer.update(x, optimizer.init(x), x, value=1.0, anything="else")


def test_stages_and_recipes_survive_copying():
    x = jnp.ones(2)
    for made in (scale_by_adam(), first_moment(0.9), adamod(1e-3)):
        copied = copy.deepcopy(made)
        assert jax.tree.structure(copied.init(x)) == jax.tree.structure(made.init(x))
        assert describe(copied) == describe(made)
    adaptive(copy.deepcopy(first_moment(0.9)), first_moment(0.5, name="b")._replace())


def test_buffers_are_found_by_name():
    names = {
        "amsgrad": ("mu", "nu", "nu_max"),
        "adamod": ("mu", "nu", "rate_ema"),
        "diffgrad": ("mu", "nu", "previous_gradient"),
        "diffmod": ("mu", "nu", "rate_ema", "previous_gradient"),
    }
    for recipe, expected in names.items():
        state = RECIPES[recipe](1e-3).init(normal_tree())
        assert set(optax.tree.get(state, "buffers")) == set(expected)
        for name in expected:
            shapes = jax.tree.map(jnp.shape, optax.tree.get(state, name))
            assert shapes == jax.tree.map(jnp.shape, normal_tree())


def test_a_stage_that_remembers_nothing_leaves_no_trace_in_the_state():
    params = normal_tree()
    bare = adaptive(first_moment(0.9), second_moment(0.99), per_weight_rate(1e-8))
    more = adaptive(
        second_moment(0.99), first_moment(0.9), debias(0.9, 0.99), per_weight_rate(1e-8),
        scale_rate(0.5),
    )  # fmt: skip
    assert jax.tree.structure(bare.init(params)) == jax.tree.structure(more.init(params))


@pytest.mark.parametrize("recipe", FEW_OFTEN)
def test_no_two_fields_of_a_state_share_a_buffer(recipe):
    optimizer = RECIPES[recipe](1e-3)
    params = normal_tree()
    gradient = normal_tree(1)
    update = jax.jit(optimizer.update)
    state = optimizer.init(params)
    for after in (
        state,
        update(gradient, state, params)[1],
        optimizer.update(gradient, state, params)[1],  # outside of jit, where nothing is copied
    ):
        leaves = jax.tree.leaves((after, gradient, params))
        pointers = [x.unsafe_buffer_pointer() for x in leaves]
        assert len(set(pointers)) == len(pointers)


# --- Laws: where two algorithms must coincide ---------------------------------------------------


def test_adamod_without_memory_is_adam(x64):
    for convention, other in (("paper", "torch"), ("reference", "keras")):
        bounded = adamod(1e-2, b3=0.0, convention=convention)
        free = adam(1e-2, convention=other)
        assert_close(updates_of(bounded, np.float64), updates_of(free, np.float64), 1e-14)


def test_amsgrad_is_adam_while_the_second_moment_rises(x64):
    rising = [
        jax.tree.map(lambda x, t=t: x * 1.1**t, normal_tree(2, np.float64)) for t in range(40)
    ]
    for convention, other in (("torch", "torch"), ("keras", "keras")):
        expected = updates_of(adam(1e-2, convention=other), np.float64, rising)
        actual = updates_of(amsgrad(1e-2, convention=convention), np.float64, rising)
        assert_close(actual, expected, 1e-14)


def test_adamw_without_decay_is_adam():
    assert_bit_equal(updates_of(adamw(1e-2, weight_decay=0.0)), updates_of(adam(1e-2)))


def test_friction_of_a_constant_gradient_is_one_half_from_the_second_step(x64):
    constant = [normal_tree(3, np.float64)] * 5
    for kind in ("absolute", "signed", "wide"):
        damped = updates_of(diffgrad(1e-2, friction=kind), np.float64, constant)
        free = updates_of(adam(1e-2, convention="keras"), np.float64, constant)
        ratios = jax.tree.map(lambda a, b: a / b, damped, free)
        for ratio in jax.tree.leaves(ratios):
            np.testing.assert_allclose(ratio[1:], 0.5, rtol=1e-14)
            assert np.all(np.abs(ratio[0] - 0.5) > 1e-4)


def test_diffmod_without_memory_is_diffgrad(x64):
    bounded = diffmod(1e-2, len_memory=1)
    assert_close(updates_of(bounded, np.float64), updates_of(diffgrad(1e-2), np.float64), 1e-14)


def test_len_memory_of_n_steps_is_b3_of_one_minus_its_inverse(x64):
    by_length = adaptive(scale_by_adam(), adamod_momental_bound(len_memory=20))
    by_decay = adaptive(scale_by_adam(), adamod_momental_bound(0.95))
    assert_close(updates_of(by_length, np.float64), updates_of(by_decay, np.float64), 1e-14)


def test_adam_without_eps_does_not_see_the_scale_of_the_gradient(x64):
    gradients = list(gradient_trees(STEPS, np.float64))
    scaled = [jax.tree.map(lambda x: 1024.0 * x, g) for g in gradients]
    for optimizer in (
        adam(1e-2, eps=0.0),
        amsgrad(1e-2, eps=0.0),
        adam(1e-2, eps=0.0, nesterov=True),
    ):
        expected = updates_of(optimizer, np.float64, gradients)
        assert_close(updates_of(optimizer, np.float64, scaled), expected, 1e-14)


def test_nesterov_moment_looks_ahead_by_the_current_gradient(x64):
    gradients = [jnp.array([3.0]), jnp.array([-1.0])]
    rule = adaptive(first_moment(0.5), nesterov_moment(0.5))
    state = rule.init(jnp.zeros(1))
    m = 0.0
    for t, g in enumerate(gradients, 1):
        update, state = rule.update(g, state)
        m = 0.5 * m + 0.5 * float(g[0])
        expected = 0.5 * m / (1 - 0.5 ** (t + 1)) + 0.5 * float(g[0]) / (1 - 0.5**t)
        np.testing.assert_allclose(update, [expected], rtol=1e-15)


def test_schedules_are_asked_for_the_step_before():
    asked = []

    def schedule(count):
        asked.append(int(count))
        return 0.5

    rule = adaptive(first_moment(schedule), second_moment(0.9), per_weight_rate(1e-8))
    state = rule.init(jnp.zeros(1))
    for _ in range(3):
        _, state = rule.update(jnp.ones(1), state)
    assert asked == [0, 1, 2]
