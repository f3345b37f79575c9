"""Every recipe inside every wrapper of optax takes the steps that it takes outside.

All in float64. What is under a wrapper is compared with the recipe alone on the same gradients, and
a wrapper that skips gradients gets others in between, which must leave no trace.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    ADAMS,
    CONVENTIONS,
    FEWER,
    FEWER_OFTEN,
    PER_TENSOR,
    RECIPES,
    REPRESENTATIVE,
    assert_bit_equal,
)

from adaptive_opt import adam, adamw, decay_mask, lookahead, ranger, rmsprop

EACH = pytest.mark.parametrize("recipe", FEWER_OFTEN)


def few(recipe, *values, broadly=()):
    marks = pytest.mark.broad if recipe in broadly else pytest.mark.slow
    return pytest.param(*values, recipe, marks=() if recipe in FEWER else marks)


RATE, STEPS = 1e-2, 6
SHAPES = {"w": (3, 2), "b": (3,)}
pytestmark = pytest.mark.usefixtures("x64")


def trees(seed, *leading):
    """Standard normal arrays, of the shape of the parameters after the leading axes."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal(leading + s)) for k, s in SHAPES.items()}


@functools.partial(jax.jit, static_argnums=0)
def run(optimizer, params, state, gradients):
    """The parameters after every step, and the last state."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    (_, state), history = jax.lax.scan(step, (params, state), gradients)
    return history, state


def start(optimizer, gradients, seed=0):
    params = trees(seed)
    return run(optimizer, params, optimizer.init(params), gradients)


@functools.cache
def alone(recipe):
    """What the recipe does by itself: after every step, and its last state."""
    return start(RECIPES[recipe](RATE), trees(1, STEPS))


def assert_close(actual, expected, rtol=1e-12):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-14)


def between(gradients, *others):
    """The gradients with other ones before each of them."""
    return jax.tree.map(
        lambda g, *o: jnp.stack([*o, g], 1).reshape(-1, *g.shape[1:]), gradients, *others
    )


def every(n, history):
    return jax.tree.map(lambda x: x[n - 1 :: n], history)


# --- Wrappers that leave the recipe alone ---------------------------------------------------------


# The mean of optax's MultiSteps is in float32 unless it is told otherwise.
IN_FLOAT64 = {
    name: jnp.float64
    for name in inspect.signature(optax.MultiSteps).parameters
    if name == "accumulator_dtype"
}


def multi_steps(recipe, gradients):
    noise = trees(2, STEPS)
    plus, minus = (jax.tree.map(lambda g, n, s=s: g + s * n, gradients, noise) for s in (1, -1))
    tx = optax.MultiSteps(RECIPES[recipe](RATE), 3, **IN_FLOAT64).gradient_transformation()
    return tx, between(gradients, plus, minus), 3


def apply_if_finite(recipe, gradients):
    nan = jax.tree.map(lambda g: g.at[..., 0].set(jnp.nan), gradients)
    return optax.apply_if_finite(RECIPES[recipe](RATE), 5), between(gradients, nan), 2


def conditionally_mask(recipe, gradients):
    tx = optax.conditionally_mask(RECIPES[recipe](RATE), lambda step: step % 2 == 1)
    return tx, between(gradients, trees(3, STEPS)), 2


def conditionally_transform(recipe, gradients):
    tx = optax.conditionally_transform(RECIPES[recipe](RATE), lambda step: step % 2 == 1)
    zeros = jax.tree.map(jnp.zeros_like, gradients)  # they pass as they are
    return tx, between(gradients, zeros), 2


def named_chain(recipe, gradients):
    tx = optax.named_chain(("half", optax.scale(0.5)), ("optimizer", RECIPES[recipe](RATE)))
    return tx, jax.tree.map(lambda g: 2 * g, gradients), 1


def flatten(recipe, gradients):
    return optax.flatten(RECIPES[recipe](RATE)), gradients, 1


WRAPPERS = {
    f.__name__: f
    for f in (
        multi_steps,
        apply_if_finite,
        conditionally_mask,
        conditionally_transform,
        named_chain,
        flatten,
    )
}
# Flat parameters are one vector, which is no matrix, and has no rows with a mean of their own.
DIFFERENT = {("flatten", name) for name in ("ranger", *PER_TENSOR)}


# Those that all the others are like.
FIRST = ("conditionally_mask", "flatten")


@pytest.mark.parametrize(
    ("wrapper", "recipe"),
    [
        few(recipe, wrapper, broadly=REPRESENTATIVE if wrapper in FIRST else ())
        for wrapper in WRAPPERS
        for recipe in RECIPES
        if wrapper != "flatten" or recipe in REPRESENTATIVE or recipe not in PER_TENSOR
    ],
)
def test_inside_a_wrapper_a_recipe_takes_the_steps_it_takes_alone(wrapper, recipe):
    tx, gradients, n = WRAPPERS[wrapper](recipe, trees(1, STEPS))
    history, state = start(tx, gradients)
    expected, inner = alone(recipe)
    if (wrapper, recipe) in DIFFERENT:
        assert np.all(np.abs(history["w"] - expected["w"])[-1] > 1e-4)
        return
    assert_close(every(n, history), expected)
    if wrapper == "apply_if_finite":
        assert int(state.total_notfinite) == STEPS
        assert_close(state.inner_state, inner)
    elif wrapper.startswith("conditionally"):
        assert_close(state.inner_state, inner)
    elif wrapper == "multi_steps":
        assert int(state.gradient_step) == STEPS
        assert_close(state.inner_opt_state, inner)
    elif wrapper == "named_chain":
        assert_close(state["optimizer"], inner)


def test_between_its_steps_a_conditional_recipe_passes_the_gradient_or_nothing():
    gradients = trees(1, 3)
    for wrap, factor in ((optax.conditionally_transform, 1.0), (optax.conditionally_mask, 0.0)):
        tx = wrap(adam(RATE), lambda step: step > 10)
        history, state = start(tx, gradients)
        moved = jax.tree.map(lambda x, g, f=factor: x + f * g.sum(0), trees(0), gradients)
        assert_close(jax.tree.map(lambda x: x[-1], history), moved)
        assert_bit_equal(state.inner_state, adam(RATE).init(trees(0)))


def test_what_flatten_changes_is_what_a_tensor_is():
    gradients = trees(1, STEPS)
    same = ranger(RATE, centralize=False)
    assert_close(start(optax.flatten(same), gradients)[0], start(same, gradients)[0])
    whole, one = rmsprop(RATE, scope="tree"), rmsprop(RATE, scope="tensor")
    assert_close(start(optax.flatten(one), gradients)[0], start(whole, gradients)[0])
    assert np.all(start(one, gradients)[0]["b"] != start(whole, gradients)[0]["b"])


# --- inject_hyperparams ---------------------------------------------------------------------------


def halves(tree):
    return [jax.tree.map(lambda x, s=s: x[s], tree) for s in (slice(3), slice(3, 6))]


@functools.cache
def injected(recipe):
    return optax.inject_hyperparams(RECIPES[recipe])(RATE)


@EACH
def test_injected_numbers_are_the_recipes_and_can_be_changed(recipe):
    first, second = halves(trees(1, STEPS))
    history, state = start(injected(recipe), first)
    expected, _ = alone(recipe)
    assert_close(history, halves(expected)[0])
    params = jax.tree.map(lambda x: x[-1], history)
    unchanged, _ = run(injected(recipe), params, state, second)
    assert_close(unchanged, halves(expected)[1])
    state.hyperparams["learning_rate"] = jnp.asarray(RATE / 4)
    changed, _ = run(injected(recipe), params, state, second)
    falling = RECIPES[recipe](lambda t: jnp.where(t < 3, RATE, RATE / 4))
    assert_close(changed, halves(start(falling, trees(1, STEPS))[0])[1])


@EACH
def test_injected_schedules_are_those_of_the_recipe(recipe):
    ends = {"learning_rate": (RATE, RATE / 4)}
    ends |= {"b1": (0.9, 0.8), "b2": (0.9, 0.99)} if recipe in ADAMS else {}
    values = {name: jnp.linspace(*end, STEPS) for name, end in ends.items()}
    schedules = {name: functools.partial(jnp.take, value) for name, value in values.items()}
    tx = optax.inject_hyperparams(RECIPES[recipe])(**schedules)
    history, state = start(tx, trees(1, STEPS))
    assert_close(history, start(RECIPES[recipe](**schedules), trees(1, STEPS))[0])
    for name, value in values.items():
        assert state.hyperparams[name] == value[-1]


@EACH
def test_an_injected_state_has_one_structure_whether_made_or_stepped_inside_jit_or_not(recipe):
    function = RECIPES[recipe]
    if recipe in ("sgd", "rmsprop"):  # a momentum of 0 by default
        function = function.func
    params = trees(0)
    conventions = CONVENTIONS | {"ranger": CONVENTIONS["radam"]}
    for convention in conventions.get(recipe, (None,)):
        settings = {} if convention is None else {"convention": convention}
        tx = optax.inject_hyperparams(function)(RATE, **settings)
        state = tx.init(params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        inside = jax.eval_shape(tx.init, params)
        assert jax.tree.structure(after) == jax.tree.structure(state), convention
        assert jax.tree.structure(inside) == jax.tree.structure(state), convention
        shapes = [(x.shape, x.dtype) for x in jax.tree.leaves(after)]
        assert shapes == [(x.shape, x.dtype) for x in jax.tree.leaves(state)], convention


def test_an_injected_momentum_of_zero_is_no_momentum():
    plain = RECIPES["sgd"].func
    tx = optax.inject_hyperparams(plain)(RATE, momentum=0.0)
    history, state = start(tx, trees(1, STEPS))
    assert_close(history, start(plain(RATE), trees(1, STEPS))[0])
    assert optax.tree.get(state.inner_state, "velocity") is not None
    for without in (
        optax.inject_hyperparams(plain)(RATE),
        optax.inject_hyperparams(plain, static_args=("momentum",))(RATE, momentum=0.0),
    ):
        assert_bit_equal(without.init(trees(0)).inner_state, plain(RATE).init(trees(0)))


def test_the_schedule_of_the_papers_adamw_can_be_injected():
    settings = {"schedule": optax.cosine_decay_schedule(1.0, STEPS), "weight_decay": 0.1}
    make = functools.partial(adamw, decay="independent")
    history, _ = start(optax.inject_hyperparams(make)(RATE, **settings), trees(1, STEPS))
    assert_close(history, start(make(RATE, **settings), trees(1, STEPS))[0])


MASKED = [r for r, f in RECIPES.items() if "mask" in inspect.signature(f).parameters]


@pytest.mark.parametrize("recipe", [few(recipe) for recipe in MASKED])
def test_a_callable_mask_is_a_static_argument_of_inject_hyperparams(recipe):
    function, settings = RECIPES[recipe], {"weight_decay": 0.1, "mask": decay_mask}
    tx = optax.inject_hyperparams(function, static_args=("mask",))(RATE, **settings)
    history, _ = start(tx, trees(1, STEPS))
    expected, _ = start(function(RATE, **settings), trees(1, STEPS))
    assert_close(history, expected)
    assert np.all(expected["w"][-1] != alone(recipe)[0]["w"][-1])
    taken_for_a_schedule = optax.inject_hyperparams(function)(RATE, **settings)
    with pytest.raises(ValueError, match=r'one bool for a tree .* static_args=\("mask",\)'):
        taken_for_a_schedule.init(trees(0))


def test_a_dtype_is_a_static_argument_of_inject_hyperparams_or_a_dtype_object():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees(0))
    make = functools.partial(optax.inject_hyperparams, adam, hyperparam_dtype=jnp.float32)
    for name in ("mu_dtype", "state_dtype"):
        expected = adam(RATE, **{name: jnp.bfloat16}).init(params)
        for tx in (
            make(static_args=(name,))(RATE, **{name: jnp.bfloat16}),
            make()(RATE, **{name: jnp.dtype(jnp.bfloat16)}),
        ):
            assert_bit_equal(tx.init(params).inner_state, expected)
        with pytest.raises(
            TypeError, match=r"takes jnp\.bfloat16 for a schedule\. Name the argument"
        ):
            make()(RATE, **{name: jnp.bfloat16}).init(params)
    with pytest.raises(TypeError, match=r"takes jnp\.bfloat16 for a schedule"):
        optax.inject_hyperparams(
            lambda learning_rate, dtype: lookahead(adam(learning_rate), state_dtype=dtype)
        )(RATE, jnp.bfloat16).init(trees(0))


@EACH
def test_16_bit_parameters_want_hyperparameters_in_32_bits(recipe):
    params, gradient = (
        jax.tree.map(lambda x: x.astype(jnp.bfloat16), trees(seed)) for seed in (0, 1)
    )
    with pytest.raises(ValueError, match=r"give hyperparam_dtype=jnp\.float32"):
        optax.inject_hyperparams(RECIPES[recipe])(RATE).init(params)
    tx = optax.inject_hyperparams(RECIPES[recipe], hyperparam_dtype=jnp.float32)(RATE)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    plain = RECIPES[recipe](RATE)
    expected, _ = plain.update(gradient, plain.init(params), params)
    for a, b in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        assert a.dtype == b.dtype == jnp.bfloat16
        wide = [np.asarray(x, np.float32) for x in (a, b)]
        np.testing.assert_allclose(*wide, rtol=2**-7)  # neighbours in bfloat16


@EACH
def test_a_population_of_members_and_learning_rates_equals_single_runs(recipe):
    rates, gradients = jnp.array([RATE, 3 * RATE, RATE / 10]), trees(1, 3)

    def member(params, rate):
        state = injected(recipe).init(params)
        state.hyperparams["learning_rate"] = rate
        return params, state

    params = trees(4, 3)
    together = jax.vmap(member)(params, rates)
    history, _ = jax.vmap(functools.partial(run, injected(recipe)), in_axes=(0, 0, None))(
        *together, gradients
    )
    for i, rate in enumerate(rates):
        single, _ = run(
            injected(recipe), *member(jax.tree.map(lambda x, i=i: x[i], params), rate), gradients
        )
        assert_close(jax.tree.map(lambda x, i=i: x[i], history), single)


# --- Wrappers that take part in the step ----------------------------------------------------------


@EACH
def test_our_lookahead_of_every_recipe_is_that_of_optax(recipe):
    gradients, params = trees(1, STEPS), trees(0)
    history, state = start(lookahead(RECIPES[recipe](RATE), 2, 0.8), gradients)
    theirs = optax.lookahead(RECIPES[recipe](RATE), 2, 0.8)
    pair = optax.LookaheadParams.init_synced(params)
    expected, _ = run(theirs, pair, theirs.init(pair), gradients)
    assert_close(history, expected.fast)
    assert_close(state.slow, jax.tree.map(lambda x: x[-1], expected.slow))


@EACH
def test_schedule_free_of_every_recipe_is_its_definition(recipe):
    gradients, beta = trees(1, STEPS), 0.9
    optimizer = RECIPES[recipe](RATE)
    tx = optax.contrib.schedule_free(optimizer, RATE, b1=beta)
    history, state = start(tx, gradients)

    @jax.jit
    def define(params):
        def step(carry, now):
            x, y, z, inner = carry
            t, gradient = now
            updates, inner = optimizer.update(gradient, inner, y)
            z = optax.apply_updates(z, updates)
            x = jax.tree.map(lambda x, z: x + (z - x) / t, x, z)
            y = jax.tree.map(lambda x, z: beta * x + (1 - beta) * z, x, z)
            return (x, y, z, inner), y

        carry = (params, params, params, optimizer.init(params))
        return jax.lax.scan(step, carry, (jnp.arange(1.0, STEPS + 1), gradients))

    (x, _, _, inner), expected = define(trees(0))
    assert_close(history, expected)
    assert_close(state.base_optimizer_state, inner)
    last = jax.tree.map(lambda y: y[-1], history)
    assert_close(optax.contrib.schedule_free_eval_params(state, last), x, rtol=1e-11)


# --- Transformations of functions, and copies of states ------------------------------------------


@EACH
def test_checkpointed_steps_have_the_same_gradient(recipe):
    gradients = trees(1, 3)

    def end(rate, remat):
        optimizer = RECIPES[recipe](rate)

        def step(carry, gradient):
            params, state = carry
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = (trees(0), optimizer.init(trees(0)))
        step = jax.checkpoint(step) if remat else step
        (params, _), _ = jax.lax.scan(step, carry, gradients)
        return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(params))

    slope = jax.jit(jax.value_and_grad(end), static_argnums=1)
    expected, actual = slope(RATE, False), slope(RATE, True)
    assert "remat" in str(jax.make_jaxpr(end, static_argnums=1)(RATE, True))
    assert_close(actual, expected)
    assert expected[1] != 0


@EACH
def test_a_state_goes_on_the_same_after_pickle_and_after_deepcopy(recipe):
    first, second = halves(trees(1, STEPS))
    history, state = start(injected(recipe), first)
    params = jax.tree.map(lambda x: x[-1], history)
    expected = run(injected(recipe), params, state, second)
    saved = pickle.dumps(state)
    copied = copy.deepcopy(state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    for kept in (pickle.loads(saved), copied):
        assert jax.tree.structure(kept) == jax.tree.structure(state)
        assert_bit_equal(run(injected(recipe), params, kept, second), expected)


@EACH
def test_no_buffer_is_donated_twice_and_none_of_the_callers_is_kept(recipe):
    params, gradient = trees(0), trees(1)
    for tx in (lookahead(RECIPES[recipe](RATE)), injected(recipe)):
        state = tx.init(params)
        assert_all_distinct(params, gradient, state)
        updates, after = tx.update(gradient, state, params)
        assert_all_distinct(params, gradient, updates, after)
    step = jax.jit(injected(recipe).update, donate_argnums=(0, 1))
    state = injected(recipe).init(params)
    expected = jax.jit(injected(recipe).update)(gradient, state, params)
    assert_bit_equal(step(gradient, state, params), expected)
    assert all(x.is_deleted() for x in jax.tree.leaves(state) if x.dtype == jnp.float64)


def assert_all_distinct(*given):
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(given)]
    assert len(set(buffers)) == len(buffers)
