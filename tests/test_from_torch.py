"""A run of PyTorch that moves here goes on as if it had not moved."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torch_states import recorded, state_dict_of

from adaptive_opt import (
    Group,
    ParameterGroups,
    adabound,
    adabound_dynamic_bound,
    adadelta,
    adagrad,
    adam,
    adamax,
    adamod,
    adamw,
    adaptive,
    amsbound,
    amsgrad,
    amsgrad_max,
    debias,
    debias_rate,
    decoupled_weight_decay,
    diffgrad,
    diffgrad_friction,
    first_moment,
    import_torch_state,
    l2_regularization,
    nadam,
    nadamw,
    per_weight_rate,
    radam,
    rmsprop,
    scale_by_learning_rate,
    scale_rate,
    second_moment,
    sgd,
    skip_nonfinite,
)

BEFORE, LR = 30, 1e-2
SEEN = (1, 2, 5, 10, 30, 100)
PATHS = {
    "body/kernel": "body.weight",
    "body/bias": "body.bias",
    "head/kernel": "head.weight",
    "head/bias": "head.bias",
    "scale": "scale",
}
"""The parameters here, in a tree of Flax, and in PyTorch."""


def in_a_tree(array_of):
    """A tree of Flax of what ``array_of`` says of each parameter of PyTorch."""
    tree = {"body": {}, "head": {}}
    for path, name in PATHS.items():
        array = jnp.asarray(array_of(name))
        *above, last = path.split("/")
        there = tree[above[0]] if above else tree
        there[last] = jnp.swapaxes(array, -1, -2) if last == "kernel" else array
    return tree


def parameters_of(row):
    return in_a_tree(lambda name: recorded()[f"{row}|before|{name}"])


def steps_after(optimizer, state, row, times=1):
    """The parameters after some of the next 100 steps; every gradient so many times."""
    rest = in_a_tree(lambda name: np.repeat(recorded()[f"gradients {name}"][BEFORE:], times, 0))

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    run = jax.jit(lambda params, state: jax.lax.scan(step, (params, state), rest)[1])
    return jax.tree.map(lambda x: x[np.array(SEEN) * times - 1], run(parameters_of(row), state))


def assert_goes_on(optimizer, state, row, **how):
    expected = in_a_tree(lambda name: recorded()[f"{row}|after|{name}"])
    actual = steps_after(optimizer, state, row, **how)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-12)


def imported(row, target, **more):
    order = [str(name) for name in recorded()[f"{row}|order"]]
    return import_torch_state(
        state_dict_of(row), target, parameters_of(row), PATHS, **{"order": order, **more}
    )


MOMENTS = first_moment(0.9), second_moment(0.999)
EPS_HAT = *MOMENTS, per_weight_rate(1e-8, 1e-15), debias_rate(0.9, 0.999)
"""With what pytorch_optimizer adds under the root."""
ONE_GROUP = {
    "sgd": (sgd(LR), {"count": BEFORE}),
    "sgd momentum": (sgd(LR, 0.9, weight_decay=0.1), {"count": BEFORE}),
    "sgd nesterov": (sgd(LR, 0.9, nesterov=True), {"count": BEFORE}),
    "sgd dampening": (sgd(LR, 0.9, dampening=0.5), {"count": BEFORE}),
    "adam": (optax.chain(l2_regularization(0.1), adam(LR, b1=0.8, b2=0.99)), {}),
    "adam maximize": (optax.chain(optax.scale(-1.0), adam(LR)), {}),
    "adamw": (adamw(LR, weight_decay=0.1), {}),
    "amsgrad": (amsgrad(LR), {}),
    "adamw amsgrad": (
        optax.chain(
            adaptive(*MOMENTS, amsgrad_max(), debias(0.9, 0.999), per_weight_rate(1e-8)),
            decoupled_weight_decay(0.1),
            scale_by_learning_rate(LR),
        ),
        {},
    ),
    "nadam": (nadam(LR, momentum_decay=0.01), {}),
    "nadamw": (nadamw(LR, weight_decay=0.1), {}),
    "radam": (radam(LR, weight_decay=0.1), {}),
    "radam decoupled": (radam(LR, weight_decay=0.1, decay="decoupled"), {}),
    "adamax": (adamax(LR), {}),
    "adagrad": (adagrad(LR, 0.1), {}),
    "adagrad decay": (adagrad(lambda t: LR / (1 + 0.05 * t)), {}),
    "adadelta": (adadelta(0.5), {}),
    "rmsprop": (rmsprop(LR, 0.99), {}),
    "rmsprop centered": (rmsprop(LR, 0.99, centered=True), {}),
    "rmsprop momentum": (rmsprop(LR, 0.99, centered=True, momentum=0.9), {}),
    "adamod.AdaMod": (adamod(LR, b3=0.99, weight_decay=0.1), {}),
    "torch_optimizer.AdaMod": (adamod(LR, b3=0.9), {}),
    "torch_optimizer.DiffGrad": (diffgrad(LR), {}),
    "torch_optimizer.AdaBound": (adabound(LR, weight_decay=0.1), {}),
    "torch_optimizer.AdaBound amsbound": (amsbound(LR), {}),
    "pytorch_optimizer.AdaMod": (adamod(LR, b1=0.9, b2=0.99, b3=0.95, weight_decay=0.1), {}),
    "pytorch_optimizer.DiffGrad": (
        optax.chain(
            adaptive(*EPS_HAT, diffgrad_friction()),
            decoupled_weight_decay(0.1),
            scale_by_learning_rate(LR),
        ),
        {},
    ),
    "pytorch_optimizer.AdaBound": (
        optax.chain(
            adaptive(*EPS_HAT, scale_rate(LR), adabound_dynamic_bound(0.1, 1e-3)),
            decoupled_weight_decay(0.01),
            optax.scale(-1.0),
        ),
        {},
    ),
}


@pytest.mark.parametrize("row", ONE_GROUP)
def test_the_next_100_steps_are_those_of_pytorch(row, x64):
    target, more = ONE_GROUP[row]
    assert_goes_on(target, imported(row, target, **more), row)


def grouped(recipe, *groups, **settings):
    return ParameterGroups(groups, default=Group()).optimizer(recipe, LR, **settings)


def adam_with_l2(learning_rate, weight_decay=0.0):
    return optax.chain(l2_regularization(weight_decay), adam(learning_rate))


def five_groups(recipe, **settings):
    decays = {"head/bias": 0.0, "head/kernel": 0.02, "body/bias": 0.04, "body/kernel": 0.06}
    groups = [Group(path, weight_decay=decay) for path, decay in decays.items()]
    return grouped(recipe, *groups, weight_decay=0.08, **settings)


def slower(t):
    return LR / (1 + 0.05 * t)


HEAD = Group("^head", learning_rate=10.0, weight_decay=0.0)
ALONE = Group("body/kernel")
ADAMW_GROUPS = grouped(adamw, HEAD, weight_decay=0.1)
GROUPS = {
    "adamw named": (adamw(LR, weight_decay=0.01), {"order": None}),
    "adamw two groups": (ADAMW_GROUPS, {}),
    "adamod two groups": (grouped(adamod, HEAD, b2=0.99, b3=0.9999, weight_decay=0.1), {}),
    "sgd five groups": (five_groups(sgd, momentum=0.9), {"count": BEFORE}),
    "adam five groups named": (five_groups(adam_with_l2), {"order": None}),
    "adamw sharded": (ADAMW_GROUPS, {"order": None}),
    "adamw sharded flat": (ADAMW_GROUPS, {"order": None}),
    "adamw frozen": (grouped(adamw, Group("body/kernel", freeze=True), weight_decay=0.1), {}),
    "adamw late": (grouped(adamw, ALONE, weight_decay=0.1), {}),
    "adamw scheduled": (adamw(slower, weight_decay=0.1), {}),
    "adamw scheduled late": (
        ParameterGroups([ALONE], Group()).optimizer(adamw, slower, weight_decay=0.1),
        {},
    ),
    "rmsprop late": (rmsprop(LR, 0.99), {}),
}


@pytest.mark.parametrize("row", GROUPS)
def test_groups_schedules_and_late_parameters_go_on_too(row, x64):
    target, more = GROUPS[row]
    assert_goes_on(target, imported(row, target, **more), row)


def in_multi_steps(optimizer):
    return optax.MultiSteps(optimizer, 2, accumulator_dtype=np.float64).gradient_transformation()


WRAPPERS = {
    "clip": lambda optimizer: optax.chain(optax.clip_by_global_norm(1e9), optimizer),
    "skip_nonfinite": skip_nonfinite,
    "MultiSteps": in_multi_steps,
    "all": lambda o: skip_nonfinite(in_multi_steps(optax.chain(optax.clip(1e9), o))),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_groups_and_recipes_go_on_inside_wrappers(wrapper, x64):
    times = 2 if wrapper in ("MultiSteps", "all") else 1
    for row, optimizer in (
        ("adamw two groups", ADAMW_GROUPS),
        ("adamw scheduled", adamw(slower, weight_decay=0.1)),
    ):
        target = WRAPPERS[wrapper](optimizer)
        assert_goes_on(target, imported(row, target), row, times=times)


def test_injected_hyperparameters_are_those_of_the_target(x64):
    row, make = "adamw", optax.inject_hyperparams(adamw)
    target = make(LR, weight_decay=0.1)
    assert_goes_on(target, imported(row, target), row)
    row, target = "adamw scheduled", make(slower, weight_decay=0.1)
    assert_goes_on(target, imported(row, target), row)
    with pytest.raises(ValueError, match=r"weight_decay of PyTorch is 0.1 .*, here 0.2"):
        imported("adamw", make(LR, weight_decay=0.2))
