"""What a line can do: any buffers, first values, notes, what update was given."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from adaptive_opt import (
    AdaptiveStep,
    OpenStep,
    WholeTree,
    adaptive,
    atan2_direction,
    close_step,
    first_moment,
    open_step,
    per_weight_rate,
    second_moment,
    stage,
)

X = {"matrix": jnp.arange(6.0).reshape(3, 2) + 1, "vector": jnp.array([1.0, -2.0])}


@stage
def factored_moment(b2, *, rows="rows", columns="columns", dtype=None):
    """Adafactor's second moment: two buffers that are smaller than the parameter."""

    def line(step: AdaptiveStep) -> AdaptiveStep:
        squares = step.gradient**2
        if squares.ndim < 2:
            return step.set(second_moment=step.average("whole", squares, b2, dtype=dtype))
        r = step.average(rows, squares.mean(-1), b2, dtype=dtype)
        c = step.average(columns, squares.mean(-2), b2, dtype=dtype)
        return step.set(second_moment=r[:, None] * c[None, :] / r.mean())

    return line


@pytest.mark.parametrize("state_dtype", [None, jnp.bfloat16])
def test_a_stage_keeps_several_buffers_of_other_shapes(state_dtype):
    rule = adaptive(factored_moment(0.5), per_weight_rate(0.0), state_dtype=state_dtype)
    state = rule.init(X)
    shapes = jax.tree.map(lambda x: x.shape, state.buffers)
    assert shapes == {
        "rows": {"matrix": (3,), "vector": None},
        "columns": {"matrix": (2,), "vector": None},
        "whole": {"matrix": None, "vector": (2,)},
    }
    assert state.buffers["rows"]["matrix"].dtype == jnp.float32  # small, whatever was asked for
    assert state.buffers["whole"]["vector"].dtype == (state_dtype or jnp.float32)
    updates, after = jax.jit(rule.update)(X, state, X)
    squares = np.asarray(X["matrix"]) ** 2 / 2
    r, c = squares.mean(-1), squares.mean(-2)
    expected = np.asarray(X["matrix"]) / np.sqrt(r[:, None] * c / r.mean())
    np.testing.assert_allclose(updates["matrix"], expected, rtol=1e-6)
    eager, _ = rule.update(X, state, X)
    np.testing.assert_allclose(eager["matrix"], updates["matrix"], rtol=1e-6)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, state)


def test_a_buffer_starts_at_the_parameter_or_with_its_first_value():
    @stage
    def pulled(rate):
        def line(step: AdaptiveStep) -> AdaptiveStep:
            slow = step.recall("slow", step.param, initial=step.param)
            step.keep("slow", slow + rate * (step.param - slow))
            return step.set(direction=step.direction + slow)

        return line

    @stage
    def norm_moment(b2):
        def line(step: AdaptiveStep) -> AdaptiveStep:
            total = jnp.sum(step.gradient**2)
            v = step.remember("v", lambda v, x: b2 * v + (1 - b2) * x, total, initial=lambda x: x)
            return step.set(second_moment=v)

        return line

    rule = adaptive(pulled(0.5), norm_moment(0.9), per_weight_rate(0.0))
    state = rule.init(X)
    np.testing.assert_array_equal(state.buffers["slow"]["vector"], X["vector"])
    assert state.buffers["slow"]["vector"] is not X["vector"]
    moved = jax.tree.map(lambda x: x + 2, X)
    updates, state = jax.jit(rule.update)(X, state, moved)
    np.testing.assert_allclose(state.buffers["slow"]["vector"], X["vector"] + 1)
    np.testing.assert_allclose(state.buffers["v"]["vector"], 5.0)  # not a tenth of it
    np.testing.assert_allclose(updates["vector"], 2 * X["vector"] / np.sqrt(5), rtol=1e-6)
    _, state = rule.update(jax.tree.map(jnp.zeros_like, X), state, X)
    np.testing.assert_allclose(state.buffers["v"]["vector"], 4.5)


def test_a_line_leaves_a_quantity_for_a_later_one_and_reads_count_and_value():
    @stage
    def noting():
        return lambda step: step.note(change=step.gradient - step.direction + step.count)

    @stage
    def reading():
        return lambda step: step.set(direction=step.noted("change") * step.extra("value"))

    rule = adaptive(first_moment(0.75), noting(), reading())
    flat = optax.chain(open_step(), first_moment(0.75), noting(), reading(), close_step())
    for optimizer in (rule, flat):
        updates, _ = jax.jit(optimizer.update)(X, optimizer.init(X), X, value=jnp.float32(2.0))
        np.testing.assert_allclose(updates["vector"], 2 * (0.75 * X["vector"] + 1))
    with pytest.raises(ValueError, match="reading reads the note 'change', which no stage before"):
        adaptive(reading())


def test_a_line_of_the_tree_sees_all_leaves_and_keeps_one_number():
    @stage
    def normalised(b):
        def line(steps: OpenStep) -> OpenStep:
            squares = sum(steps.leaves(lambda step: jnp.sum(step.gradient**2)))
            norm = steps.average("norm", jnp.sqrt(squares), b)
            return steps.each(lambda step: step.set(direction=step.direction / norm))

        return WholeTree(line)

    rule = adaptive(normalised(0.0))
    state = rule.init(X)
    assert state.buffers["norm"].shape == ()
    for update in (rule.update, jax.jit(rule.update)):
        updates, after = update(X, state, X)
        np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)
        np.testing.assert_allclose(after.buffers["norm"], optax.tree.norm(X), rtol=1e-6)


def test_a_direction_that_is_averaged_after_the_rate_is_laprop():
    """Another order of the same lines is another algorithm, and makes sense."""
    from adaptive_opt import apply_rate, debias

    rule = adaptive(
        second_moment(0.9), debias(b2=0.9), per_weight_rate(1e-8), apply_rate(),
        first_moment(0.5), debias(b1=0.5),
    )  # fmt: skip
    updates, _ = rule.update(X, rule.init(X), X)
    np.testing.assert_allclose(updates["vector"], np.sign(X["vector"]), rtol=1e-5)


def test_the_same_array_kept_twice_is_two_buffers():
    @stage
    def twice():
        def line(step: AdaptiveStep) -> AdaptiveStep:
            for name in ("a", "b"):
                step.recall(name, step.gradient)
                step.keep(name, step.gradient)
            return step

        return line

    rule = adaptive(twice())
    for update in (rule.update, jax.jit(rule.update)):
        _, state = update(X, rule.init(X), X)
        arrays = [state.buffers["a"]["vector"], state.buffers["b"]["vector"], X["vector"]]
        assert len({x.unsafe_buffer_pointer() for x in arrays}) == 3


def test_the_second_moment_of_which_a_rate_is_made_cannot_be_used_up():
    used_up = second_moment(0.9), per_weight_rate(1e-8), atan2_direction()
    message = r"atan2_direction uses up the second moment, but the rate of per_weight_rate .* Keep"
    with pytest.raises(ValueError, match=message):
        adaptive(*used_up)
