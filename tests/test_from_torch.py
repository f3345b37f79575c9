"""A run of PyTorch that moves here goes on as if it had not moved."""

from __future__ import annotations

import pathlib
import re
import sys
import types

import jax
import numpy as np
import optax
import pytest
from common import one_in
from torch_states import (
    ADAMW_GROUPS,
    ALONE,
    BEFORE,
    HEAD,
    LR,
    PATHS,
    SEEN,
    adam_with_l2,
    five_groups,
    grouped,
    imported,
    in_a_tree,
    parameters_of,
    recorded,
    state_dict_of,
)

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


@pytest.mark.parametrize("row", one_in(3, ONE_GROUP))
def test_the_next_100_steps_are_those_of_pytorch(row, x64):
    target, more = ONE_GROUP[row]
    assert_goes_on(target, imported(row, target, **more), row)


def slower(t):
    return LR / (1 + 0.05 * t)


GROUPS = {
    "adamw named": (adamw(LR, weight_decay=0.01), {"order": None}),
    "adamw two groups": (ADAMW_GROUPS, {}),
    "adamod two groups": (grouped(adamod, HEAD, b2=0.99, b3=0.9999, weight_decay=0.1), {}),
    "nadam two groups": (grouped(nadam, HEAD, momentum_decay=0.01), {}),
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
    "nadam late": (grouped(nadam, ALONE), {}),
    "rmsprop late": (rmsprop(LR, 0.99), {}),
}


@pytest.mark.parametrize("row", one_in(3, GROUPS))
def test_groups_schedules_and_late_parameters_go_on_too(row, x64):
    target, more = GROUPS[row]
    assert_goes_on(target, imported(row, target, **more), row)


def test_what_was_frozen_until_some_step_goes_on_too(x64):
    target = grouped(adamw, Group("body/kernel", freeze=12), weight_decay=0.1)
    assert_goes_on(target, imported("adamw late", target), "adamw late")


def in_multi_steps(optimizer):
    return optax.MultiSteps(optimizer, 2, accumulator_dtype=np.float64).gradient_transformation()


WRAPPERS = {
    "clip": lambda optimizer: optax.chain(optax.clip_by_global_norm(1e9), optimizer),
    "skip_nonfinite": skip_nonfinite,
    "MultiSteps": in_multi_steps,
    "all": lambda o: skip_nonfinite(in_multi_steps(optax.chain(optax.clip(1e9), o))),
}


@pytest.mark.broad
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


def test_the_page_moves_a_run(monkeypatch):
    """With PyTorch's part recorded; the next steps are compared in float32."""
    row = "adamw two groups"
    saved = {
        "model": {name: recorded()[f"{row}|before|{name}"] for name in PATHS.values()},
        "optimizer": state_dict_of(row),
        "order": [str(name) for name in recorded()[f"{row}|order"]],
    }
    reader = types.ModuleType("torch")
    reader.load = lambda path, map_location: saved
    monkeypatch.setitem(sys.modules, "torch", reader)
    page = pathlib.Path(__file__).parent.parent / "docs" / "move_a_pytorch_run.md"
    (code,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    made = {}
    exec(compile(code, page.name, "exec"), made)
    optimizer, state, params = made["optimizer"], made["state"], made["params"]
    for step in range(5):
        gradients = in_a_tree(lambda n, t=step: recorded()[f"gradients {n}"][BEFORE + t])
        gradients = jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(gradients))
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    expected = in_a_tree(lambda name: recorded()[f"{row}|after|{name}"][SEEN.index(5)])
    for a, e in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-6)
