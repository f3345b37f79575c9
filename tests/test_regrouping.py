"""What is there once for several parameters is found by the parameters, whatever groups are called.

Labels of groups, masks and the order of a partition say nothing: only who is in a group does.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import optax
import pytest
from common import one_in
from moved import LR, after, assert_close, goes_on, gradients, params

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    convert_state,
    lookahead,
    nadam,
    rmsprop,
)

ONE_TWO, TWO_ONE = {"b": "one", "w": "two"}, {"b": "two", "w": "one"}
ONLY_B, ONLY_W = {"b": True, "w": False}, {"b": False, "w": True}
FROZEN = {"b": "frozen", "w": "trained"}
of_the_tree = functools.partial(rmsprop, scope="tree")


def parted(make, labels):
    return optax.partition({label: make(LR) for label in ("one", "two")}, labels)


def accumulated(learning_rate, mean=True):
    steps = optax.MultiSteps(adam(learning_rate), 3, mean, accumulator_dtype=jnp.float64)
    return steps.gradient_transformation()


def with_frozen_b(tx):
    return optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, FROZEN)


@pytest.mark.parametrize(
    ("make", "steps"), one_in(3, [(nadam, 5), (of_the_tree, 5), (accumulated, 8)])
)
def test_labels_that_are_swapped_swap_no_states(make, steps, x64):
    goes_on(parted(make, ONE_TWO), parted(make, TWO_ONE), steps)


def test_a_number_of_a_group_is_that_of_its_parameters(x64):
    """Two products of NAdam: ``b`` was frozen for three steps."""
    late = ParameterGroups([Group("b", freeze=3)], default=Group())
    renamed = ParameterGroups([Group("w"), Group("^b")])
    source, target = (groups.optimizer(nadam, learning_rate=LR) for groups in (late, renamed))
    goes_on(source, target)
    x, state = after(source, gradients(5))
    with pytest.raises(ValueError, match=r"'momentum_product' is .* for different groups"):
        convert_state(state, source, nadam(LR), x, count=5)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (optax.masked(of_the_tree(LR), ONLY_B), optax.masked(of_the_tree(LR), ONLY_W)),
        (of_the_tree(LR), optax.masked(of_the_tree(LR), ONLY_W)),
        (optax.masked(of_the_tree(LR), ONLY_W), of_the_tree(LR)),
        (of_the_tree(LR), parted(of_the_tree, ONE_TWO)),
    ],
    ids=["of others", "of some", "of more", "of each"],
)
def test_one_number_of_other_parameters_is_refused(source, target, x64):
    x, state = after(source, gradients(5))
    with pytest.raises(ValueError, match="'nu' is one number of the tree"):
        convert_state(state, source, target, x)


def test_what_a_plateau_has_seen_stays_with_its_group(x64):
    def plateaus(labels, factors):
        return optax.partition(
            {
                label: optax.chain(adam(LR), optax.contrib.reduce_on_plateau(factor, patience=2))
                for label, factor in factors.items()
            },
            labels,
        )

    source = plateaus(ONE_TWO, {"one": 0.5, "two": 0.1})
    target = plateaus(TWO_ONE, {"one": 0.1, "two": 0.5})
    x = params()
    state = source.init(x)
    for _ in range(6):
        _, state = source.update(x, state, x, value=3.0)
    moved = convert_state(state, source, target, x)
    scales = [float(moved.inner_states[of].inner_state[1].scale) for of in ("one", "two")]
    assert scales == pytest.approx([0.01, 0.25])
    whole = optax.chain(adam(LR), optax.contrib.reduce_on_plateau(0.5, patience=2))
    with pytest.raises(ValueError, match="no place for best_value, scale, which would be lost"):
        convert_state(state, source, whole, x)
    state = whole.init(x)
    for _ in range(6):
        _, state = whole.update(x, state, x, value=3.0)
    moved = convert_state(state, whole, with_frozen_b(whole), x)
    assert float(moved.inner_states["trained"].inner_state[1].scale) == 0.25


def test_an_accumulation_in_its_middle_goes_to_the_same_parameters_and_means_the_same(x64):
    source = parted(accumulated, ONE_TWO)
    x, state = after(source, gradients(8))
    with pytest.raises(ValueError, match=r"no place for acc_grads, which would be lost"):
        convert_state(state, source, accumulated(LR), x)
    source = accumulated(LR)
    x, state = after(source, gradients(8))
    with pytest.raises(ValueError, match="mean of the gradients in one of the two, and their sum"):
        convert_state(state, source, accumulated(LR, mean=False), x)
    _, state = after(source, {name: 0 * g for name, g in gradients(8).items()})
    with pytest.raises(ValueError, match="no place for acc_grads"):
        convert_state(state, source, adam(LR), x)


def test_slow_weights_move_in_and_out_of_groups_with_frozen_parameters(x64):
    """Those of a frozen parameter are where it is."""
    inside, outside = with_frozen_b(lookahead(adam(LR), 4)), lookahead(with_frozen_b(adam(LR)), 4)
    goes_on(inside, outside)
    goes_on(outside, inside)
    x, state = after(outside, gradients(5))
    thawed = lookahead(optax.partition({"trained": adam(LR), "frozen": adam(LR)}, FROZEN), 4)
    moved = convert_state(state, outside, thawed, x)
    groups = {name: part.inner_state[0] for name, part in moved.inner_state.inner_states.items()}
    assert {name: int(part.count) for name, part in groups.items()} == {"trained": 5, "frozen": 0}
    assert_close(moved.slow, state.slow)


def test_what_is_remembered_of_parameters_whose_updates_are_zero_is_kept(x64):
    """They are frozen, and their moments go on."""
    still = optax.masked(optax.chain(adam(LR), optax.set_to_zero()), {"b": True, "w": True})
    x, state = after(still, gradients(5))
    moved = convert_state(state, still, adam(LR), x)
    assert int(moved[0].count) == 5
    assert_close(moved[0].mu, state.inner_state[0][0].mu)
