"""The arithmetic of a leaf is traced once for each distinct shape, and only while tracing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
import pytest
from common import RECIPES, assert_bit_equal, normal_tree

from adaptive_opt import AdaptiveStep, adaptive, first_moment, stage

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
    # One more is the look for what the leaves have in common.
    assert runs.count(SHAPES[0]) == 2
    assert [runs.count(shape) for shape in SHAPES[1:]] == [1, 1]
    assert len(runs) == 4


def test_init_looks_once_at_each_distinct_shape():
    runs = []
    rule = adaptive(first_moment(0.9), counting(runs))
    runs.clear()
    rule.init(many_leaves(60))
    assert sorted(runs) == sorted(SHAPES)


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

    with jax.log_compiles(False):
        steps()
        programs = []

        def listen(event, *_, **__):
            if "compile" in event:
                programs.append(event)

        jax.monitoring.register_event_duration_secs_listener(listen)
        try:
            steps()
        finally:
            jax.monitoring.clear_event_listeners()
    assert not [event for event in programs if "backend_compile" in event]


def test_a_leaf_traced_alone_and_among_others_has_the_same_bits():
    params = normal_tree()
    optimizer = RECIPES["diffmod"](1e-2)
    update = jax.jit(optimizer.update)
    together, _ = update(params, optimizer.init(params), params)
    twice = {"a": params, "b": params}
    both, _ = update(twice, optimizer.init(twice), twice)
    assert_bit_equal(both["a"], together)
    assert_bit_equal(both["b"], together)
