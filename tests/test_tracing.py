"""The arithmetic of a leaf is traced once for each distinct shape, and only while tracing."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from common import EVERY_CONVENTION, FEWER_OFTEN, RECIPES, assert_bit_equal, broadly, normal_tree

from adaptive_opt import (
    AdaptiveStep,
    Group,
    ParameterGroups,
    adaptive,
    decay_mask,
    first_moment,
    lookahead,
    low_memory,
    single_pass,
    skip_nonfinite,
    stage,
    telemetry,
    zero1,
)

SHAPES = ((3, 2), (5,), (2, 2, 2))


def counting(runs):
    """A stage that notes the shape it runs on."""

    @stage
    def counted():
        def line(step: AdaptiveStep) -> AdaptiveStep:
            runs.append(step.gradient.shape)
            return step.set(direction=2 * step.direction)

        return line

    return counted()


def many_leaves(number):
    return {f"w{i}": jnp.ones(SHAPES[i % len(SHAPES)]) for i in range(number)}


@pytest.mark.parametrize("number", [3, 60])
def test_a_line_is_traced_once_for_each_distinct_shape(number):
    runs, x = [], many_leaves(number)
    rule = adaptive(first_moment(0.9), counting(runs))
    state = rule.init(x)
    runs.clear()
    jax.jit(rule.update).trace(x, state, x)
    assert sorted(runs) == sorted(SHAPES)  # what they have in common ``init`` has seen


def test_init_looks_once_at_each_distinct_shape():
    runs = []
    rule = adaptive(first_moment(0.9), counting(runs))
    runs.clear()
    for _ in range(2):
        rule.init(many_leaves(60))
    assert sorted(runs) == sorted(SHAPES)
    with jax.enable_x64(True):  # under which lines may keep other dtypes
        rule.init(many_leaves(60))
    assert sorted(runs) == sorted(2 * SHAPES)


def test_an_update_without_an_init_before_it_looks_at_one_leaf_more():
    runs, x = [], many_leaves(3)
    rule = adaptive(first_moment(0.9), counting(runs))
    state = adaptive(first_moment(0.9), counting([])).init(x)
    runs.clear()
    jax.jit(rule.update).trace(x, state, x)
    assert sorted(runs) == sorted((SHAPES[0], *SHAPES))


def test_the_program_of_many_leaves_has_a_function_for_each_shape():
    def functions(number):
        x = many_leaves(number)
        optimizer = RECIPES["adamod"](1e-3)
        text = jax.jit(optimizer.update).lower(x, optimizer.init(x), x).as_text()
        return text.count("func.func private @one_leaf"), len(text) / number

    few, _ = functions(3)
    many, size = functions(60)
    assert few == many == len(SHAPES)
    x = many_leaves(60)
    adam = optax.adam(1e-3)
    of_optax = len(jax.jit(adam.update).lower(x, adam.init(x), x).as_text()) / 60
    assert size < of_optax


def compiled_in(steps):
    """How many programs are compiled while ``steps()`` runs."""
    programs = []

    def listen(event, *_, **__):
        if "backend_compile" in event:
            programs.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        steps()
    finally:
        jax.monitoring.clear_event_listeners()
    return len(programs)


@pytest.mark.broad
@pytest.mark.compiles
def test_outside_of_a_trace_no_leaf_is_compiled_by_itself():
    optimizer, x = RECIPES["adamod"](1e-3), normal_tree()
    state = optimizer.init(x)
    stacked = jax.tree.map(lambda a: jnp.stack([a, a]), x)

    def steps():
        optimizer.update(x, state, x)
        jax.vmap(lambda g: optimizer.update(g, state, x)[0])(stacked)
        jax.grad(lambda g: optimizer.update({"w": g}, optimizer.init({"w": g}))[0]["w"].sum())(
            jnp.ones(3)
        )

    steps()
    assert compiled_in(steps) == 0


def thawing(freeze):
    groups = ParameterGroups([Group("kernel", freeze=freeze)], default=Group())
    clip = groups.trained(optax.clip_by_global_norm(1.0))
    return optax.chain(clip, groups.optimizer(RECIPES["adamw"], 1e-3))


WRAPPED = {
    "a schedule": lambda: RECIPES["adam"](optax.cosine_decay_schedule(1e-3, 100)),
    "injected": lambda: optax.inject_hyperparams(RECIPES["adamod"])(learning_rate=1e-3),
    "guarded": lambda: skip_nonfinite(RECIPES["adam"](1e-3)),
    "lookahead": lambda: lookahead(RECIPES["adam"](1e-3), 2),
    "observed": lambda: RECIPES["adam"](1e-3, observers=telemetry(every=100)),
    "in 16 bits": lambda: low_memory(RECIPES["adam"](1e-3), min_size=1),
    "in 8 bits": lambda: low_memory(RECIPES["adam"](1e-3), "8-bit", min_size=1),
    "in a single pass": lambda: single_pass(RECIPES["adam"](1e-3)),
    "groups": lambda: thawing(True),
    "groups that thaw": lambda: thawing(2),
    "a mask": lambda: RECIPES["adamw"](1e-3, mask=decay_mask),
    "split by zero1": lambda: zero1(RECIPES["adam"](1e-3), jax.make_mesh((1,), ("data",)), "data"),
}


@pytest.mark.compiles
@pytest.mark.parametrize("name", [*FEWER_OFTEN, *broadly([], WRAPPED)])
def test_a_loop_that_is_not_compiled_compiles_nothing_from_the_fourth_step_on(name):
    make = WRAPPED.get(name) or functools.partial(EVERY_CONVENTION[name], 1e-3)
    optimizer, gradients = make(), normal_tree(1)
    params = normal_tree()
    state = optimizer.init(params)

    def steps(number):
        nonlocal params, state
        for _ in range(number):
            updates, state = optimizer.update(gradients, state, params)
            params = optax.apply_updates(params, updates)

    steps(3)  # a group thaws at the third
    assert compiled_in(lambda: steps(2)) == 0


@pytest.mark.compiles
def test_where_optax_leaves_a_condition_to_xla_it_compiles_at_every_step():
    """What the wrappers here do not."""
    optimizer, x = optax.apply_if_finite(optax.sgd(1e-3), 3), jnp.ones(2)
    state = optimizer.init(x)
    optimizer.update(x, state, x)
    assert compiled_in(lambda: optimizer.update(x, state, x)) == 1


def test_a_leaf_traced_alone_and_among_others_has_the_same_bits():
    params = normal_tree()
    optimizer = RECIPES["diffmod"](1e-2)
    update = jax.jit(optimizer.update)
    together, _ = update(params, optimizer.init(params), params)
    twice = {"a": params, "b": params}
    both, _ = update(twice, optimizer.init(twice), twice)
    assert_bit_equal(both["a"], together)
    assert_bit_equal(both["b"], together)
