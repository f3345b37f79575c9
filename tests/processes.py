"""A training run that is the same in one process and in several.

``test_processes.py`` calls it, and runs it: ``processes.py PORT ID PROCESSES DIRECTORY``.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
from devices import (
    FULLY_SHARDED,
    LAYOUTS,
    OPTIMIZERS,
    batches,
    mesh_of,
    parameters,
    train_all,
)
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive_opt import check_checkpoint, checkpoint_header, init_sharded, to_bytes, zero1

SAVED, STEPS = 2, 4
SHARDED = ("adamw", "amsgrad", "adamod", "diffmod", "rmsprop of the tree")
"""Trained with sharded parameters; "zero1" with parameters that every device has."""


class Run:
    """Some recipes on so many devices, of however many processes, in one program."""

    def __init__(self, devices: int) -> None:
        self.mesh = mesh_of((devices,))
        self.optimizers = {name: OPTIMIZERS[name] for name in SHARDED}
        self.optimizers["zero1"] = zero1(OPTIMIZERS["adamw"], self.mesh)
        specs = dict.fromkeys(SHARDED, FULLY_SHARDED) | {"zero1": LAYOUTS["data parallel"][2]}
        params = {name: self.put(parameters(), spec) for name, spec in specs.items()}
        state = {name: init_sharded(o, params[name]) for name, o in self.optimizers.items()}
        self.first = params, state
        self.step = jax.jit(
            functools.partial(train_all, self.optimizers),
            out_shardings=jax.tree.map(lambda x: x.sharding, self.first),
        )

    def put(self, tree, specs):
        """Every process puts its part of what all of them have."""

        def place(x, spec):
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(np.shape(x), sharding, lambda i: np.asarray(x)[i])

        return jax.tree.map(place, tree, specs)

    def train(self, training, steps):
        for batch in batches()[steps]:
            training = self.step(*training, self.put(batch, (P("data"), P("data"))))
        return training

    def fetch(self, training):
        """Whole arrays, by path, in every process."""
        gather = jax.jit(lambda x: x, out_shardings=NamedSharding(self.mesh, P()))
        leaves = jax.tree_util.tree_flatten_with_path(gather(training))[0]
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}

    def header(self):
        params, state = self.first
        return {n: checkpoint_header(o, (params[n], state[n])) for n, o in self.optimizers.items()}

    def save(self, directory, training):
        with ocp.CheckpointManager(directory) as manager:
            args = ocp.args.Composite(
                training=ocp.args.StandardSave(training), header=ocp.args.JsonSave(self.header())
            )
            manager.save(SAVED, args=args)
            manager.wait_until_finished()

    def restore(self, directory):
        """What was saved, on the devices and in the layout of this run."""
        with ocp.CheckpointManager(directory) as manager:
            args = ocp.args.Composite(
                training=ocp.args.StandardRestore(self.first), header=ocp.args.JsonRestore()
            )
            saved = manager.restore(SAVED, args=args)
        params, state = self.first
        for name, optimizer in self.optimizers.items():
            check_checkpoint(saved["header"][name], optimizer, (params[name], state[name]))
        return saved["training"]


def main(port: int, process: int, processes: int, directory: pathlib.Path) -> None:
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8 // processes)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    address = f"127.0.0.1:{port}"
    jax.distributed.initialize(
        address, processes, process, coordinator_bind_address=address, initialization_timeout=120
    )
    run = Run(8)
    middle = run.train(run.first, slice(SAVED))
    run.save(directory / "several", middle)
    found = {
        "uninterrupted": run.fetch(run.train(middle, slice(SAVED, STEPS))),
        "resumed": run.fetch(run.train(run.restore(directory / "several"), slice(SAVED, STEPS))),
        "moved in": run.fetch(run.train(run.restore(directory / "one"), slice(SAVED, STEPS))),
    }
    try:
        to_bytes(run.optimizers["adamw"], run.first[0]["adamw"])
        said = "nothing"
    except TypeError as error:
        said = str(error)
    of_state = jax.tree.leaves(run.first[1])
    facts = {
        "processes": jax.process_count(),
        "devices": jax.device_count(),
        "own devices": jax.local_device_count(),
        "state bytes": sum(leaf.nbytes for leaf in of_state),
        "to_bytes": said,
        "own state bytes": sum(s.data.nbytes for leaf in of_state for s in leaf.addressable_shards),
    }
    np.savez(
        directory / f"process{process}.npz",
        facts=json.dumps(facts),
        **{f"{name}/{path}": leaf for name, tree in found.items() for path, leaf in tree.items()},
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]), pathlib.Path(sys.argv[4]))
