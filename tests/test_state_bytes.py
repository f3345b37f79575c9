"""benchmarks/state_bytes.py, and the table of its in docs/devices.md."""

from __future__ import annotations

import pathlib

import jax
import jax.numpy as jnp
import pytest
from devices import mesh_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive_opt import adamod, init_sharded, zero1
from benchmarks import state_bytes

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_command_prints(tmp_path, capsys):
    text = (ROOT / "docs" / "devices.md").read_text()
    copy = tmp_path / "devices.md"
    copy.write_text(text)
    state_bytes.main(["--page", str(copy)])
    assert capsys.readouterr().out.strip() in text
    assert copy.read_text() == text


@pytest.mark.parametrize("layout", ["replicated", "zero1", "fsdp"])
def test_the_bytes_are_those_of_real_arrays(layout):
    mesh = mesh_of((4,))
    shapes = state_bytes.parameters(vocabulary=30, width=16, layers=1, context=8)
    where = NamedSharding(mesh, P())
    optimizer = adamod(1e-3)
    if layout == "fsdp":
        where = state_bytes.fully_sharded(shapes, mesh)
    if layout == "zero1":
        optimizer = zero1(optimizer, mesh)
    params = jax.device_put(jax.tree.map(lambda p: jnp.ones(p.shape), shapes), where)
    last = mesh.devices.flat[-1]
    held = sum(
        shard.data.nbytes
        for leaf in jax.tree.leaves(init_sharded(optimizer, params))
        for shard in leaf.addressable_shards
        if shard.device == last
    )
    assert state_bytes.bytes_per_device(optimizer, shapes, where) == held
