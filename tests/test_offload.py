"""The state is on the host between steps, and the steps are the same."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import optax
import pytest
from common import assert_bit_equal, ulps
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from adaptive_opt import (
    adamw,
    config,
    describe,
    from_bytes,
    low_memory,
    make,
    offload,
    offload_stands_aside,
    to_bytes,
    train_step,
)
from adaptive_opt.memory import offload as module

ON_A_CPU_ALIKE = jax.default_backend() == "cpu" and jaxlib.version.__version_info__ < (0, 10, 2)
pytestmark = [
    pytest.mark.skipif(
        offload_stands_aside() is not None, reason="this JAX knows no pinned memory of the host"
    ),
    pytest.mark.skipif(
        ON_A_CPU_ALIKE, reason="on a CPU, programs of this XLA leave everything where it is"
    ),
]
DEVICE = jax.devices()[0].default_memory().kind
"""What the device's own memory is called."""
SHAPE = (64, 128)
PARAMS = {
    "kernel": np.linspace(-1, 1, 64 * 128, dtype=np.float32).reshape(SHAPE),
    "bias": np.ones(3),
}


def fresh():
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), PARAMS)


def loss(params, x):
    return jnp.sum((params["kernel"] - x) ** 2) + jnp.sum(params["bias"] ** 2)


def kinds(tree):
    return jax.tree.map(lambda x: x.sharding.memory_kind, tree)


@pytest.mark.parametrize("wrap", [lambda tx: tx, low_memory])
def test_between_steps_large_arrays_are_on_the_host_and_steps_are_the_same(wrap):
    inner = wrap(adamw(1e-2))
    ends = []
    for optimizer in (inner, offload(inner)):
        step, params = train_step(loss, optimizer), fresh()
        state = optimizer.init(params)
        for t in range(4):
            old = state
            params, state, _ = step(params, state, 0.1 * t)
            if optimizer is not inner:
                assert all(x.is_deleted() for x in jax.tree.leaves(old))
                sizes = jax.tree.map(lambda x: x.size, state)
                where = jax.tree.map(lambda n: "pinned_host" if n >= 4096 else DEVICE, sizes)
                assert kinds(state) == where
        ends.append((params, jax.tree.map(np.asarray, state)))
    assert jax.tree.structure(ends[0]) == jax.tree.structure(ends[1])
    assert ulps(ends[0][0], ends[1][0]) <= 1  # another program, fused otherwise


def test_the_donated_state_is_written_where_it_was():
    optimizer, params = offload(adamw(1e-2)), fresh()
    step, state = train_step(loss, optimizer), optimizer.init(fresh())
    planned = step.lower(params, state, 1.0).compile().memory_analysis()
    held = sum(x.nbytes for x in jax.tree.leaves((params, state)))
    assert planned.alias_size_in_bytes + planned.host_alias_size_in_bytes == held


def test_only_the_named_buffers_go():
    state = offload(adamw(1e-2), ["nu"], min_size=1).init(fresh())
    assert set(jax.tree.leaves(kinds(state[0].mu))) == {DEVICE}
    assert set(jax.tree.leaves(kinds(state[0].nu))) == {"pinned_host"}
    with pytest.raises(ValueError, match=r"buffers names 'nv', but the state has .*mu, nu"):
        offload(adamw(1e-2), ["nv"]).init(fresh())
    with pytest.raises(TypeError, match=r"sequence of names, such as \('nu',\), got 'nu'"):
        offload(adamw(1e-2), "nu")
    with pytest.raises(ValueError, match="min_size must be whole and at least 1, got 0"):
        offload(adamw(1e-2), min_size=0)


def test_a_state_that_was_read_moves_to_the_host_and_goes_on_bit_for_bit():
    optimizer, params = offload(adamw(1e-2)), fresh()
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    _, state = update(params, state, params)
    again = from_bytes(optimizer, adamw(1e-2).init(params), to_bytes(optimizer, state))
    again = jax.tree.map(jnp.asarray, again)
    assert set(jax.tree.leaves(kinds(again))) == {DEVICE}
    expected, after = update(params, state, params), update(params, again, params)
    assert kinds(after[1]) == kinds(expected[1])
    assert "pinned_host" in jax.tree.leaves(kinds(after[1]))
    assert_bit_equal(after, expected)
    data = config(optimizer)
    assert describe(make(data)) == describe(optimizer)


def test_it_goes_through_scan_and_outside_of_jit():
    optimizer, params = offload(adamw(1e-2)), fresh()

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(params, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, optimizer.init(params)
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3))(carry)
    for _ in range(3):
        carry, _ = step(carry, None)
    assert kinds(scanned[1]) == kinds(carry[1])
    assert scanned[1][0].mu["kernel"].sharding.memory_kind == "pinned_host"
    for a, b in zip(*map(jax.tree.leaves, (scanned, carry)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8)  # parameters of size 1 near 0


@pytest.mark.parametrize("axes", [AxisType.Auto, AxisType.Explicit])
def test_split_state_stays_split_on_the_host(axes):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axes,))
    split = NamedSharding(mesh, PartitionSpec("data", None))
    params = jax.device_put(jnp.asarray(PARAMS["kernel"]), split)
    optimizer = offload(adamw(1e-2))
    step = train_step(lambda w, x: jnp.sum((w - x) ** 2), optimizer)
    state = optimizer.init(params)
    for _ in range(2):
        params, state, _ = step(params, state, 1.0)
        assert state[0].mu.sharding.is_equivalent_to(split.with_memory_kind("pinned_host"), 2)
        assert state[0].mu.sharding.memory_kind == "pinned_host"
    assert state[0].mu.addressable_shards[0].data.shape == (8, 128)


def test_where_there_is_no_such_memory_it_says_so_and_steps_aside(monkeypatch):
    monkeypatch.setattr(module, "KIND", "memory_of_another_device")
    reason = offload_stands_aside()
    assert "needs a memory of the kind 'memory_of_another_device'" in reason
    assert f" has {DEVICE}" in reason
    assert reason.endswith("The state stays on the device.")
    optimizer, params = offload(adamw(1e-2)), fresh()
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert set(jax.tree.leaves(kinds(state))) == {DEVICE}
    assert_bit_equal((updates, state), adamw(1e-2).update(params, adamw(1e-2).init(params), params))
