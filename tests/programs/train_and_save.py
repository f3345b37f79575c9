"""Trains, saves after every step, and goes on where it stopped: train_and_save.py DIR STEPS.

Prints ``resumed N`` and, each time a save is complete, ``saved N``; then writes ``final.npy``.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from adaptive_opt import adamod, check_checkpoint, checkpoint_header

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), adamod(1e-2))


@jax.jit
def step(params, state, t):
    gradient = jnp.sin(3 * params + t)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


def start():
    params = jnp.linspace(-1.0, 1.0, 2**20)
    return params, OPTIMIZER.init(params)


def main(directory: pathlib.Path, steps: int) -> None:
    training = start()
    header = checkpoint_header(OPTIMIZER, training)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(directory / "checkpoints", options=options) as manager:
        done = manager.latest_step()
        if done is not None:
            args = ocp.args.Composite(
                header=ocp.args.JsonRestore(), training=ocp.args.StandardRestore(training)
            )
            restored = manager.restore(done, args=args)
            check_checkpoint(restored["header"], OPTIMIZER, training)
            training = restored["training"]
        print("resumed", done or 0, flush=True)
        for t in range(done or 0, steps):
            training = step(*training, t)
            args = ocp.args.Composite(
                header=ocp.args.JsonSave(header), training=ocp.args.StandardSave(training)
            )
            manager.save(t + 1, args=args)
            manager.wait_until_finished()
            print("saved", t + 1, flush=True)
    np.save(directory / "final.npy", training[0])


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
