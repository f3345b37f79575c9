"""In and out of any nest of wrappers a run goes on as if it had not moved, or is refused."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import broadly
from moved import LR, after, assert_close, gradients, in_groups, injected, run

from adaptive_opt import (
    Group,
    ParameterGroups,
    adabelief,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamod,
    adamw,
    amsgrad,
    convert_state,
    lion,
    lookahead,
    low_memory,
    nadam,
    nadamw,
    radam,
    rmsprop,
    sgd,
    skip_nonfinite,
)
from adaptive_opt.core.checks import scaled

LABELS = {"b": "biases", "w": "weights"}
RULES = {
    "adam": [optax.adam, adam, functools.partial(adam, convention="optax")],
    "adamw": [optax.adamw, adamw],
    "amsgrad": [optax.amsgrad, functools.partial(amsgrad, convention="optax")],
    "nadam": [optax.nadam, functools.partial(nadam, convention="optax")],
    "nadamw": [optax.nadamw, functools.partial(nadamw, convention="optax")],
    "radam": [optax.radam, functools.partial(radam, convention="optax")],
    "rmsprop": [optax.rmsprop, functools.partial(rmsprop, convention="optax")],
    "rmsprop with momentum": [
        functools.partial(optax.rmsprop, momentum=0.9),
        functools.partial(rmsprop, momentum=0.9, convention="optax"),
    ],
    "sgd": [optax.sgd, sgd],
    "sgd with momentum": [
        functools.partial(optax.sgd, momentum=0.9),
        functools.partial(sgd, momentum=0.9),
        functools.partial(sgd, momentum=0.9, convention="keras"),
    ],
    "adagrad": [optax.adagrad, functools.partial(adagrad, eps=1e-7, convention="optax")],
    "adamax": [optax.adamax, adamax],
    "adadelta": [optax.adadelta, adadelta],
    "lion": [functools.partial(optax.lion, weight_decay=0.0), lion],
    "adabelief": [optax.adabelief, adabelief],
    "adamod": [adamod],
}
"""Functions of the learning rate that compute the same; lion and others with optax's defaults."""


FROM_RATE = {
    "plain": lambda make: make(LR),
    "injected": lambda make: injected(make, LR),
    "injected schedule": lambda make: injected(make, optax.constant_schedule(LR)),
    "groups": in_groups,
}
AROUND = {
    "skip_nonfinite": skip_nonfinite,
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 5),
    "MultiSteps": lambda tx: optax.MultiSteps(
        tx, 2, accumulator_dtype=jnp.float64
    ).gradient_transformation(),
    "masked": lambda tx: optax.masked(tx, {"b": True, "w": True}),
    "partition": lambda tx: optax.partition({"weights": tx, "biases": tx}, LABELS),
    "partition, labelled otherwise": lambda tx: optax.partition(
        {"weights": tx, "biases": tx}, {"b": "weights", "w": "biases"}
    ),
    "named_chain": lambda tx: optax.named_chain(("clip", optax.clip(1e3)), ("rest", tx)),
    "clip": lambda tx: optax.chain(optax.clip_by_global_norm(1e3), tx),
    "schedule": lambda tx: optax.chain(tx, optax.scale_by_schedule(optax.constant_schedule(1.0))),
    "low_memory": low_memory,
}
GUARDS = {"skip_nonfinite", "apply_if_finite"}


def slow(tx):
    return lookahead(tx, 4)


def half_of_the_rate(rng, rule, make):
    """Half of a learning rate: in it, or a factor behind it or, of what is linear, in front."""
    half = optax.scale(0.5)
    ways = {
        "in the rate": lambda learning_rate: make(scaled(learning_rate, 0.5)),
        "behind": lambda learning_rate: optax.chain(make(learning_rate), half),
    }
    if rule in ("sgd", "sgd with momentum"):
        ways["in front"] = lambda learning_rate: optax.chain(half, make(learning_rate))
    how = str(rng.choice(sorted(ways)))
    return ways[how], how


def of_what_trains(rng, make, slows):
    """An optimizer that freezes ``b``; slow weights are those of what trains, or of everything."""
    inside = slow if slows and rng.integers(2) else lambda tx: tx
    ways = {
        "partition": lambda: optax.partition(
            {"t": inside(make(LR)), "f": optax.set_to_zero()}, {"b": "f", "w": "t"}
        ),
        "groups": lambda: ParameterGroups([Group("b", freeze=True)], default=Group()).optimizer(
            lambda learning_rate: inside(make(learning_rate)), learning_rate=LR
        ),
    }
    how = str(rng.choice(sorted(ways)))
    return ways[how]() if inside is slow or not slows else slow(ways[how]()), how


def draw(seed):
    rng = np.random.default_rng(seed)
    rule = rng.choice(sorted(RULES))
    halves, slows, freezes = (bool(rng.random() < share) for share in (0.3, 0.3, 0.25))
    nests = []
    for _ in range(2):
        make = RULES[rule][rng.integers(len(RULES[rule]))]
        half = ""
        if halves:
            make, half = half_of_the_rate(rng, rule, make)
        how = rng.choice(sorted(FROM_RATE))
        around = [str(name) for name in rng.choice(sorted(AROUND), rng.integers(4), replace=False)]
        around.sort(key=lambda name: name in GUARDS)  # inside of MultiSteps they are refused
        around.sort(key=lambda name: name == "named_chain")  # others do not bear its OrderedDict
        if freezes:
            around = [name for name in around if not name.startswith("partition")]
            tx, how = of_what_trains(rng, make, slows)
        else:
            tx = FROM_RATE[how](make)
            tx = slow(tx) if slows else tx
        for name in around:
            tx = AROUND[name](tx)
        said = (rule, half, "slow" * slows, "frozen" * freezes, str(how), *around)
        nests.append((tx, 2 if "MultiSteps" in around else 1, said))
    return nests


def check_nests(seed):
    (source, there, _), (target, here, _) = nests = draw(seed)
    said = " -> ".join(str(name) for *_, name in nests)
    x, state = after(source, gradients(5), there)
    try:
        moved = convert_state(state, source, target, x)
    except ValueError as error:
        if "is a schedule" in str(error):  # in Keras's velocity
            return
        if not any(reason in str(error) for reason in ("does not say how many", "give count=")):
            raise
        moved = convert_state(state, source, target, x, count=5)
    _, expected = run(source, x, state, gradients(20, 1), there)
    _, actual = run(target, x, moved, gradients(20, 1), here)
    try:
        assert_close(actual, expected, 1e-11)
    except AssertionError as error:
        raise AssertionError(said) from error


@pytest.mark.parametrize("seed", broadly(range(3), range(24)))
def test_in_and_out_of_any_nest_the_next_20_updates_are_the_same(seed, x64):
    check_nests(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(24, 300))
def test_in_and_out_of_many_nests_the_next_20_updates_are_the_same(seed, x64):
    check_nests(seed)
