"""What multiplies the gradients in a buffer is told apart from what multiplies it afterwards."""

from __future__ import annotations

import functools

import optax
import pytest
from moved import LR, after, assert_close, goes_on, gradients, params

from adaptive_opt import convert_state, sgd

torch = functools.partial(sgd, momentum=0.9)
keras = functools.partial(sgd, momentum=0.9, convention="keras")
half, ones = optax.scale(0.5), optax.scale_by_schedule(optax.constant_schedule(1.0))


def falling(count):
    return 1.0 / (1.0 + count)


SAME = {
    "torch": torch(LR / 2),
    "keras": keras(LR / 2),
    "half in front of torch": optax.chain(half, torch(LR)),
    "half in front of keras": optax.chain(half, keras(LR)),
    "half behind torch": optax.chain(torch(LR), half),
    "half behind keras": optax.chain(keras(LR), half),
}


@functools.cache
def state_of(name):
    return after(SAME[name], gradients(5))[1]


def velocity_of(state):
    return optax.tree.get(state, "velocity")


@pytest.mark.parametrize("source", SAME)
def test_a_velocity_has_the_factors_that_stand_in_front_of_it(source, x64):
    """From each of six optimizers that take the same steps to each other."""
    before = SAME[source]
    x, state = params(), state_of(source)
    for name, target in SAME.items():
        moved = convert_state(state, before, target, x)
        assert_close(velocity_of(moved), velocity_of(state_of(name)), 1e-14)


def test_another_rate_is_told_from_another_factor_or_refused(x64):
    source = torch(0.1)
    x, state = after(source, gradients(5))
    velocity = velocity_of(state)
    for target in (keras(0.02), optax.chain(keras(0.02), ones)):
        moved = velocity_of(convert_state(state, source, target, x))
        assert_close(moved, {name: 0.1 * v for name, v in velocity.items()})
    for target in (
        optax.chain(keras(0.02), half),  # is it from 0.1 to 0.02, or to 0.01?
        optax.chain(half, torch(0.02)),
        optax.chain(half, keras(0.02)),
        optax.chain(keras(0.1), optax.scale_by_schedule(falling)),
    ):
        with pytest.raises(ValueError, match="the learning rate is part of it here only, and "):
            convert_state(state, source, target, x)


def test_an_average_of_gradients_is_no_average_of_updates(x64):
    """What stands in front of a buffer is part of what it means, though nobody knows its lines."""
    smooth, velocity = optax.ema(0.9), torch(LR)
    source = optax.chain(smooth, velocity)
    x, state = after(source, gradients(5))
    with pytest.raises(ValueError, match="'ema' means something else"):
        convert_state(state, source, optax.chain(velocity, smooth), x)
    goes_on(source, optax.chain(smooth, optax.sgd(LR, 0.9)))
