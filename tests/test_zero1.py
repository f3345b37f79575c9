"""ZeRO-1: the same numbers with the state split over the devices."""

from __future__ import annotations

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import RECIPES, normal_tree
from devices import mesh_of, whole
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive_opt import (
    adam,
    adamw,
    init_sharded,
    skip_nonfinite,
    state_shardings,
    telemetry,
    zero1,
)
from adaptive_opt.sharding.zero import UNIT

ODD = {"dense": {"kernel": (17, 9), "bias": (9,)}, "convolution": (3, 3, 1, 5), "scale": ()}
"""No size is a multiple of 8."""


def bytes_on_each(state):
    """How many bytes of a state each device holds."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes
    return {device: size for device, size in sizes.items() if size}


def varying(params):
    """So that jax.grad under check_vma=True does not add up over the devices."""
    return jax.lax.pcast(params, "data", to="varying")


@pytest.mark.compiles
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("gradients", ["mean", "sum"])
def test_shard_map_reduces_and_scatters_the_gradients(check_vma, gradients):
    """One reduce-scatter and one all-gather for a leaf, and no all-reduce of a whole one."""
    mesh = mesh_of()
    plain, optimizer = adam(0.1), zero1(adam(0.1), mesh, gradients=gradients)
    params = whole({"w": jnp.linspace(-1.0, 1.0, 17 * 9).reshape(17, 9)}, mesh)
    batch = jnp.asarray(np.random.default_rng(0).standard_normal((16, 17)), jnp.float32)

    def loss(params, batch):
        return jnp.mean((batch @ params["w"]) ** 2)

    def step(params, state, batch):
        own = varying(params) if check_vma else params
        updates, state = optimizer.update(jax.grad(loss)(own, batch), state, params)
        return optax.apply_updates(params, updates), state

    specs = state_shardings(optimizer, params, P())
    step = jax.shard_map(
        step,
        mesh=mesh,
        in_specs=(P(), specs, P("data")),
        out_specs=(P(), specs),
        check_vma=check_vma,
    )
    compiled = jax.jit(step).lower(params, optimizer.init(params), batch).compile()
    collectives = re.findall(r" = (\S+) (all-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text())
    assert sorted(name for _, name in collectives) == ["all-gather", "reduce-scatter"]

    new, state = compiled(
        params, optimizer.init(params), jax.device_put(batch, NamedSharding(mesh, P("data")))
    )
    gradient = jax.grad(loss)(params, batch)
    if gradients == "sum":
        gradient = jax.tree.map(lambda g: 8 * g, gradient)
    updates, right = plain.update(gradient, plain.init(params), params)
    np.testing.assert_allclose(new["w"], params["w"] + updates["w"], rtol=1e-5)
    mu = np.asarray(state[0].mu["w"]).reshape(-1)[: 17 * 9].reshape(17, 9)
    np.testing.assert_allclose(mu, right[0].mu["w"], rtol=1e-4, atol=1e-7)


def test_gradients_known_to_agree_are_not_reduced_again():
    """With check_vma=True, jax.grad of replicated parameters is the sum over the devices."""
    mesh = mesh_of()
    optimizer = zero1(optax.trace(0.9), mesh, gradients="sum")
    params = whole(jnp.ones(9), mesh)

    def gradient(params, x):
        return jax.grad(lambda p: jnp.sum(p) * jnp.sum(x))(params)

    def step(params, state, x):
        return optimizer.update(gradient(params, x), state, params)[0]

    specs = state_shardings(optimizer, params, P())
    step = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), specs, P("data")), out_specs=P()))
    np.testing.assert_array_equal(
        step(params, optimizer.init(params), jnp.ones(8)), np.full(9, 8.0)
    )


def test_pmap_gives_every_device_its_part():
    mesh = mesh_of()
    plain, optimizer = adam(0.1), zero1(adam(0.1), mesh)
    x = jnp.linspace(-1.0, 1.0, 17 * 9).reshape(17, 9)
    params = jnp.stack([x] * 8)
    own = jnp.asarray(np.random.default_rng(0).standard_normal(params.shape), jnp.float32)
    state = jax.pmap(optimizer.init, axis_name="data")(params)
    assert state[0].mu.shape == (8, 1, 256 // 8)
    updates, _ = jax.pmap(optimizer.update, axis_name="data")(own, state, params)
    right, _ = plain.update(own.mean(axis=0), plain.init(x), x)
    np.testing.assert_allclose(updates, np.stack([right] * 8), rtol=1e-5)


@pytest.mark.compiles
def test_under_jit_updates_are_gathered_and_the_state_never_is():
    """XLA:CPU does not turn all-reduce and slice into a reduce-scatter, as other backends do."""
    mesh = mesh_of()
    optimizer = zero1(adam(0.1), mesh)
    params = whole({"w": jnp.ones((64, 32))}, mesh)
    batch = jax.device_put(jnp.ones((16, 64)), NamedSharding(mesh, P("data")))

    def step(params, state, batch):
        gradient = jax.grad(lambda p: jnp.mean((batch @ p["w"]) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    text = jax.jit(step).lower(params, optimizer.init(params), batch).compile().as_text()
    gathers = re.findall(r"= (\S+?)\{\S* all-gather(?:-start)?\(", text)
    assert len(gathers) == 1
    reductions = re.findall(r" (all-reduce|reduce-scatter)(?:-start)?\(", text)
    assert reductions == ["all-reduce"]
    (entry,) = re.findall(r"^ENTRY .*?\((.*?)\) -> ", text, re.MULTILINE)
    assert sorted(re.findall(r"f32\[[\d,]*\]", entry)) == [
        "f32[1,256]", "f32[1,256]", "f32[2,64]", "f32[64,32]",
    ]  # fmt: skip


def test_the_bytes_per_device_fall_with_the_number_of_devices():
    params = normal_tree(shapes={"kernel": (64, 50), "bias": (50,), "scale": ()})
    plain = sum(leaf.nbytes for leaf in jax.tree.leaves(adam(1e-3).init(params)))
    for devices in range(1, 9):
        mesh = mesh_of((devices,))
        optimizer = zero1(adam(1e-3), mesh)
        found = bytes_on_each(init_sharded(optimizer, whole(params, mesh)))
        unit = math.lcm(devices, UNIT)
        padded = sum(math.ceil(size / unit) * unit for size in (64 * 50, 50))
        assert len(found) == devices
        assert set(found.values()) == {4 * (2 * (padded // devices + 1) + 1)}
        assert padded // devices <= (64 * 50 + 50) / devices + 2 * UNIT
        if devices >= 2:
            assert max(found.values()) < plain


def test_the_state_has_the_same_shapes_on_any_power_of_two_of_devices():
    params = normal_tree(shapes=ODD)

    def shapes(devices):
        return jax.eval_shape(zero1(adam(1e-3), mesh_of((devices,))).init, params)

    assert shapes(1) == shapes(2) == shapes(4) == shapes(8) != shapes(3)
    assert shapes(8)[0].mu["dense"]["kernel"].shape == (1, 256)


@pytest.mark.parametrize("init", ["eager", "jit", "init_sharded", "in a chain"])
def test_every_way_to_init_puts_the_state_in_its_place(init):
    mesh = mesh_of()
    params = whole(normal_tree(shapes=ODD), mesh)
    optimizer = zero1(adamw(1e-3), mesh)
    if init == "in a chain":
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optimizer)
    make = {
        "eager": optimizer.init,
        "jit": jax.jit(optimizer.init),
    }.get(init, functools.partial(init_sharded, optimizer))
    state = make(params)
    wanted = jax.tree.leaves(state_shardings(optimizer, params))
    for leaf, sharding in zip(jax.tree.leaves(state), wanted, strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
        assert leaf.sharding.is_fully_replicated == (leaf.ndim == 0)


def test_orbax_takes_a_state_to_a_number_of_devices_that_does_not_divide_128(tmp_path):
    """The padded size is another one; what is cut off or filled in is zeros."""
    tree = normal_tree(shapes={"kernel": (17, 9)})

    def run_on(devices):
        mesh = mesh_of((devices,))
        optimizer = zero1(adam(0.1), mesh)
        params = whole(tree, mesh)
        return jax.jit(optimizer.update), params, init_sharded(optimizer, params)

    update, params, state = run_on(8)
    _, state = update(params, state, params)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        right, _ = update(params, state, params)
        update, params, other = run_on(3)
        restored = manager.restore(1, args=ocp.args.StandardRestore(other, strict=False))
    assert restored[0].mu["kernel"].shape == (1, 384) != state[0].mu["kernel"].shape
    np.testing.assert_allclose(
        update(params, restored, params)[0]["kernel"], right["kernel"], rtol=1e-6
    )


def test_two_axes_of_a_mesh_can_share_the_state():
    mesh = jax.make_mesh((2, 2, 2), ("pod", "data", "model"), axis_types=(AxisType.Auto,) * 3)
    params = whole(jnp.ones(9), mesh)
    optimizer = zero1(adam(0.5), mesh, ("pod", "data"))
    state = optimizer.init(params)
    assert state[0].mu.addressable_shards[0].data.shape == (UNIT // 4,)
    specs = state_shardings(optimizer, params, P())
    update = jax.shard_map(
        optimizer.update, mesh=mesh, in_specs=(P(), specs, P()), out_specs=(P(), specs)
    )
    update, state = jax.jit(update)(jnp.ones(9), state, params)
    np.testing.assert_allclose(update, np.full(9, -0.5), rtol=1e-5)


def test_leaves_without_gradient_stay_as_they_are():
    mesh = mesh_of()
    params = {"a": jnp.ones((3, 3)), "b": jnp.ones(5)}
    optimizer = zero1(adam(0.5), mesh)
    before = optimizer.init(params)
    updates, state = jax.jit(optimizer.update)({"a": jnp.ones((3, 3)), "b": None}, before, params)
    assert updates["b"] is None
    np.testing.assert_array_equal(state[0].nu["b"], before[0].nu["b"])
    assert state[0].nu["b"].sharding.spec == P("data")


LARGE = {"kernel": jnp.ones((130, 140))}
"""Large enough that second moments are factored."""

REFUSED = {
    "centralize": optax.centralize(),
    "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), adam(1e-3)),
    "second_moment": RECIPES["rmsprop of the tree"](1e-3),
    "skip_nonfinite": skip_nonfinite(adam(1e-3)),
    "scale_by_trust_ratio": optax.lamb(1e-3),
    "scale_by_factored_rms": optax.adafactor(1e-3),
    "apply_if_finite": optax.apply_if_finite(adam(1e-3), 3),
    "scale_by_novograd": optax.novograd(1e-3),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_elementwise_is_refused(name):
    with pytest.raises(ValueError, match=rf"elementwise transformations, but {name}.* in front"):
        zero1(REFUSED[name], mesh_of()).init(LARGE)


def test_observers_are_refused_for_they_would_count_the_padding():
    watched = optax.chain(optax.clip(1.0), adam(1e-3, observers=telemetry()))
    with pytest.raises(ValueError, match="telemetry would count the padding too: leave observers="):
        zero1(watched, mesh_of()).init(LARGE)


def test_wrong_arguments_are_refused():
    mesh = mesh_of()
    with pytest.raises(ValueError, match=r"axis must name axes of the mesh, .*'data'.*'batch'"):
        zero1(adam(1e-3), mesh, "batch")
    with pytest.raises(ValueError, match="gradients must be one of"):
        zero1(adam(1e-3), mesh, gradients="max")
    sharded = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("data")))
    with pytest.raises(ValueError, match=r"\['w'\] is split.*init_sharded"):
        zero1(adam(1e-3), mesh).init({"w": sharded})
