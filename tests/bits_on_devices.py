"""Bit for bit the same on 8 devices as on one, given the same gradients.

``test_devices.py`` runs this in a process of its own, with ``--xla_cpu_max_isa=AVX``, where there
is no fused multiply-add: a few recipes; all of them, in more settings, in a slow test of that.
"""

from __future__ import annotations

import functools
import math

import jax
import numpy as np
import optax
import pytest
from common import EVERY_CONVENTION, assert_bit_equal
from devices import (
    ELEMENTWISE,
    FEW,
    FULLY_SHARDED,
    LAYOUTS,
    WITH_SUMS,
    gradients,
    init_all,
    mesh_of,
    on_every_device,
    parameters,
    put,
    update_all,
    whole,
)
from devices import draw as draw_tree
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import adaptive_opt
from adaptive_opt import adam, adamw, decay_mask, init_sharded, state_shardings, zero1
from adaptive_opt.sharding.zero import UNIT

WRAPPED = ELEMENTWISE | {
    "ranger": adaptive_opt.ranger(1e-2, centralize=False),
    # XLA multiplies its scale and the learning rate first on one device, and not within zero1.
    "adam_atan2": adaptive_opt.adam_atan2(1e-2, scale=1.0),
    "masked decay": adamw(1e-2, weight_decay=0.1, mask=decay_mask),
    "optax.lion": optax.lion(1e-2),
    "optax.inject_hyperparams": optax.inject_hyperparams(adam)(1e-2),
    "optax.MultiSteps": optax.MultiSteps(adam(1e-2), 2).gradient_transformation(),
}
CONVENTIONS = {
    n: make(1e-2) for n, make in EVERY_CONVENTION.items() if n.split(" (")[0] not in WITH_SUMS
}

OF = {
    "all": ELEMENTWISE,
    "wrapped": WRAPPED,
    "conventions": CONVENTIONS,
    "few": {name: o for name, o in ELEMENTWISE.items() if name in FEW},
    "few wrapped": {n: o for n, o in WRAPPED.items() if n in FEW or n not in ELEMENTWISE},
}
"""What is compared, by name; the few of them in the tests that are not slow."""
ODD = {"kernel": (17, 9), "bias": (9,), "convolution": (3, 3, 1, 5), "scale": ()}
"""No size is a multiple of 8."""

jax.config.update("jax_enable_x64", True)


def run(update, state, params, put_gradient, shapes=None):
    """The updates of every step and the last state."""
    history = []
    for gradient in gradients(shapes) if shapes else gradients():
        updates, state = update(put_gradient(gradient), state, params)
        history.append(jax.tree.map(np.asarray, updates))
    return history, state


@functools.cache
def on_one(kind, which):
    """XLA multiplies scalars first, ``x * a * b`` becomes ``x * (a * b)``, but not across the
    constraints of an explicit mesh: there is a reference for either kind."""
    mesh = mesh_of((1,), kind=kind)
    optimizers, odd = OF[which], which.endswith("wrapped")
    params = whole(draw_tree(0, shapes=ODD) if odd else parameters(), mesh)
    state = init_all(optimizers, init_sharded, params)
    update = jax.jit(functools.partial(update_all, optimizers))
    history, state = run(update, state, params, lambda g: whole(g, mesh), ODD if odd else None)
    return history, jax.tree.map(np.asarray, state)


def check(actual, which, kind=AxisType.Auto):
    assert_bit_equal(jax.tree.map(np.asarray, actual), on_one(kind, which))


def under_jit(layout, kind, which):
    optimizers = OF[which]
    shape, axes, specs = LAYOUTS[layout]
    mesh = mesh_of(shape, axes, kind)
    params = put(parameters(), mesh, specs)
    state = init_all(optimizers, init_sharded, params)
    update = jax.jit(functools.partial(update_all, optimizers))
    return run(update, state, params, lambda g: put(g, mesh, specs))


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("layout", "which"),
    [
        ("tensor parallel", "few"),
        slow("tensor parallel", "all"),
        slow("fully sharded", "all"),
        slow("fully sharded", "conventions"),
    ],
)
def test_jit_with_named_shardings(layout, which):
    check(under_jit(layout, AxisType.Auto, which), which)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_explicit_axes(layout):
    check(under_jit(layout, AxisType.Explicit, "all"), "all", AxisType.Explicit)


WHOLE = LAYOUTS["data parallel"][2]


@pytest.mark.parametrize(
    ("specs", "check_vma", "which"),
    [
        (FULLY_SHARDED, True, "few"),
        slow(FULLY_SHARDED, True, "all"),
        slow(WHOLE, True, "all"),
        slow(WHOLE, False, "all"),
        slow(FULLY_SHARDED, False, "all"),
    ],
)
def test_shard_map(specs, check_vma, which):
    mesh, optimizers = mesh_of(), OF[which]
    params = put(parameters(), mesh, specs)
    state = init_all(optimizers, init_sharded, params)
    of_state = init_all(optimizers, lambda o, p: state_shardings(o, p, specs), params)
    update = jax.shard_map(
        functools.partial(update_all, optimizers),
        mesh=mesh,
        in_specs=(specs, of_state, specs),
        out_specs=(dict.fromkeys(optimizers, specs), of_state),
        check_vma=check_vma,
    )
    check(run(jax.jit(update), state, params, lambda g: put(g, mesh, specs)), which)


@pytest.mark.parametrize("which", ["few", slow("all")])
def test_pmap(which):
    params, optimizers = on_every_device(parameters()), OF[which]
    state = jax.pmap(lambda p: init_all(optimizers, lambda o, p: o.init(p), p))(params)
    update = jax.pmap(functools.partial(update_all, optimizers))
    result = run(update, state, params, on_every_device)
    check(jax.tree.map(lambda x: np.asarray(x)[5], result), which)


@pytest.mark.parametrize(
    ("setting", "which"),
    [
        ("jit", "few wrapped"),
        ("shard_map", "few wrapped"),
        *(slow(s, "wrapped") for s in ("jit", "shard_map", "explicit", "shard_map unchecked")),
    ],
)
def test_zero1_changes_no_number_and_splits_every_leaf(setting, which):
    kind = AxisType.Explicit if setting == "explicit" else AxisType.Auto
    mesh = mesh_of(kind=kind)
    by_hand = setting.startswith("shard_map")
    optimizers = {
        name: zero1(o, mesh, gradients="reduced" if by_hand else "mean")
        for name, o in OF[which].items()
    }
    params = whole(draw_tree(0, shapes=ODD), mesh)
    state = init_all(optimizers, lambda o, p: o.init(p), params)
    update = functools.partial(update_all, optimizers)
    if by_hand:
        specs = init_all(optimizers, lambda o, p: state_shardings(o, p, P()), params)
        update = jax.shard_map(
            update,
            mesh=mesh,
            in_specs=(P(), specs, P()),
            out_specs=(P(), specs),
            check_vma=setting == "shard_map",
        )
    history, state = run(jax.jit(update), state, params, lambda g: whole(g, mesh), ODD)
    right_history, right_state = on_one(kind, which)
    # Between its steps MultiSteps gives 0 times something: -0.0 or 0.0, as XLA multiplies.
    for updates in (*history, *right_history):
        updates["optax.MultiSteps"] = jax.tree.map(lambda u: u + 0.0, updates["optax.MultiSteps"])
    assert_bit_equal(history, right_history)

    def joined(part, right):
        return np.asarray(part).reshape(-1)[: right.size].reshape(right.shape)

    assert_bit_equal(jax.tree.map(joined, state, right_state), right_state)
    shards = {math.ceil(math.prod(shape) / UNIT) * UNIT // 8 for shape in ODD.values()}
    for leaf in jax.tree.leaves(state):
        parts = {shard.data.size for shard in leaf.addressable_shards}
        assert parts <= ({1} if leaf.ndim == 0 else shards)
        assert len(leaf.addressable_shards) == 8
