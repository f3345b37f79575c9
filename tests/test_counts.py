"""Counts of gradients: each part of a state goes on with its own, and what is said fits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal
from moved import LR, after, assert_close, gradients, in_groups, ints, params, run

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adamod,
    amsgrad,
    convert_state,
    skip_nonfinite,
)
from adaptive_opt.checkpoints.buffers import put_together


def test_counters_of_wrappers_start_or_stay(x64):
    x = params()
    broken = jax.tree.map(lambda g: g.at[3].set(jnp.nan), gradients(6))
    plain, guarded = adam(LR), skip_nonfinite(adam(LR))
    x, state = after(guarded, broken)
    again = convert_state(state, guarded, skip_nonfinite(optax.adam(LR)), x)
    assert ints(total=again.total, count=again.inner_state[0].count) == {"total": 1, "count": 5}
    other = convert_state(state, guarded, optax.apply_if_finite(adam(LR), 5), x)
    assert ints(total=other.total_notfinite, n=other.inner_state[0].count) == {"total": 0, "n": 5}
    _, state = after(plain, gradients(5))
    new = convert_state(state, plain, guarded, x)
    assert ints(total=new.total, count=new.inner_state[0].count) == {"total": 0, "count": 5}


def test_a_schedule_counts_what_it_has_seen_and_moments_what_they_have(x64):
    """The schedule stands outside of the guard, so that it has seen the step that was skipped."""
    falling = optax.linear_schedule(1.0, 0.0, 50)

    def outside(make):
        return optax.chain(skip_nonfinite(make(LR)), optax.scale_by_schedule(falling))

    broken = jax.tree.map(lambda g: g.at[3].set(jnp.nan), gradients(6))
    x, state = after(outside(adam), broken)
    moved = convert_state(state, outside(adam), outside(optax.adam), x)
    assert ints(moments=moved[0].inner_state[0].count, schedule=moved[1].count) == {
        "moments": 5, "schedule": 6
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"the counts in the state differ: \[5, 6\]; give count="):
        convert_state(state, outside(adam), adamod(falling), x, drop={"rate_ema"})


NO_COUNTS = -3, True, 5.5, 5.0, "5", [5], {"['b']": 5}, 2**40, np.ones(2, int), jnp.float32(5)


@pytest.mark.parametrize("count", NO_COUNTS, ids=map(str, NO_COUNTS))
def test_a_count_is_a_whole_number(count):
    with pytest.raises(ValueError, match="count= should be a number of gradients, a whole number"):
        convert_state(adam(LR).init(params()), adam(LR), amsgrad(LR), params(), count=count)


def test_a_count_does_not_contradict_the_state(x64):
    x, state = after(adam(LR), gradients(5))
    expected = convert_state(state, adam(LR), amsgrad(LR), x)
    for count in (5, np.int64(5), jnp.asarray(5), np.array(5, np.uint8)):
        assert_bit_equal(convert_state(state, adam(LR), amsgrad(LR), x, count=count), expected)
    for count in (0, 4, 999):
        with pytest.raises(ValueError, match=f"count={count}, but the state has seen 5 gradients"):
            convert_state(state, adam(LR), amsgrad(LR), x, count=count)
    late = ParameterGroups([Group("b", freeze=3)], default=Group())
    source = late.optimizer(adam, learning_rate=LR)
    x, state = after(source, gradients(5))
    assert ints(n=convert_state(state, source, adam(LR), x, count=2)[0].count) == {"n": 2}
    with pytest.raises(ValueError, match="count=3, but the state has seen 2 or 5 gradients"):
        convert_state(state, source, adam(LR), x, count=3)
    with pytest.raises(
        ValueError, match=r"count= does not say how many .*\['b'\] has seen; it has"
    ):
        put_together(adam(LR), x, {"mu": x, "nu": x}, {"['w']": 5})


def test_groups_count_apart(x64):
    late = ParameterGroups([Group("b", freeze=3)], default=Group())
    source, target = (late.optimizer(make, learning_rate=LR) for make in (adam, optax.adam))
    x, state = after(source, gradients(5))
    moved = convert_state(state, source, target, x)
    _, expected = run(source, x, state, gradients(20, 1))
    _, actual = run(target, x, moved, gradients(20, 1))
    assert_close(actual, expected)
    with pytest.raises(ValueError, match="differ"):
        convert_state(state, source, adam(LR), x)


def test_buffers_of_parameters_with_other_counts_go_into_groups(x64):
    x, target = params(), in_groups(adam)
    found = {"mu": x, "nu": jax.tree.map(jnp.square, x)}
    state = put_together(target, x, found, {"['b']": 4, "['w']": 9}, amsgrad(LR))
    counts = {n: part.inner_state[0].count for n, part in state.inner_states.items()}
    assert ints(**counts) == {"b": 4, "default": 9}
    with pytest.raises(ValueError, match=r"\['b'\]: 4, \['w'\]: 9\), but the target counts them"):
        put_together(adam(LR), x, found, lambda path: 4 if "b" in path else 9)
    for nothing in (None, optax.MaskedNode()):
        some = {name: {**tree, "b": nothing} for name, tree in found.items()}
        with pytest.raises(ValueError, match=r"adam needs mu of \['b'\], nu of \['b'\], which"):
            put_together(adam(LR), x, some, 9)
