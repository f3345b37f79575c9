"""A small Transformer of examples/transformer.py that trains for ever, and some batches of which
are poisoned: train_with_faults.py DIR STEPS DEVICES [--x64] [--no-saves] [--left-out].

Prints ``resumed N``, ``saving N`` before a save and ``saved N`` when it is complete; then writes
``final.npz``. Every 20th batch gives a NaN, every 48th a loss a million times as large. With
``--left-out`` there are no such batches.
"""

import argparse
import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent.parent / "examples"))
from helpers import pieces
from transformer import Transformer, fully_sharded, mesh_of, restore, save

from adaptive_opt import (
    adamw,
    checkpoint_header,
    init_sharded,
    skip_nonfinite,
    skip_spikes,
)

SAVE_EVERY, CONTEXT, BATCH = 3, 16, 8
MODEL = Transformer(width=16, layers=1, context=CONTEXT)
TEXT = np.frombuffer(pathlib.Path(optax.__file__).read_bytes(), np.uint8) % 128
RULE = optax.chain(optax.clip_by_global_norm(1.0), adamw(3e-3, weight_decay=0.1))
# A window that has forgotten a spike when the next one comes, and a threshold that no good batch
# is over: the run without poison must skip nothing.
OPTIMIZER = skip_nonfinite(skip_spikes(RULE, window=32, sigma_factor=30.0, warmup=20, loss=True))


def poison(step: int) -> float:
    """What the loss of a step is multiplied by."""
    if step % 20 == 7:
        return float("nan")
    return 1e6 if step % 48 == 30 else 1.0


def loss_of(params, text, factor):
    logits = MODEL.apply(params, text[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:])
    return losses.mean() * factor


def start(mesh):
    """Parameters and state, split over the devices, and a step on them."""
    # Random numbers are drawn in float32, so that all devices and widths begin alike.
    init = functools.partial(MODEL.init, jax.random.key(0), jnp.zeros((1, 1), int))
    params = jax.jit(init, out_shardings=fully_sharded(jax.eval_shape(init), mesh))()
    if jax.config.jax_enable_x64:
        params = jax.tree.map(lambda x: jax.device_put(x.astype(float), x.sharding), params)
    training = params, init_sharded(OPTIMIZER, params)

    @functools.partial(jax.jit, out_shardings=jax.tree.map(lambda x: x.sharding, training))
    def step(training, text, factor):
        params, state = training
        loss, gradients = jax.value_and_grad(loss_of)(params, text, factor)
        updates, state = OPTIMIZER.update(gradients, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    return training, step


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=pathlib.Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("devices", type=int)
    parser.add_argument("--x64", action="store_true")
    parser.add_argument("--no-saves", action="store_true")
    parser.add_argument("--left-out", action="store_true")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", options.x64)
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = mesh_of(options.devices)
    training, step = start(mesh)
    header, done = checkpoint_header(OPTIMIZER, training), 0
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    settings = ocp.CheckpointManagerOptions(max_to_keep=3)
    with ocp.CheckpointManager(options.directory / "checkpoints", options=settings) as manager:
        if manager.latest_step() is not None:
            done, training = restore(manager, OPTIMIZER, training)
        print("resumed", done, flush=True)
        for number in range(done + 1, options.steps + 1):
            if options.left_out and poison(number) != 1:
                continue
            batch = jax.device_put(pieces(TEXT, (0, number), BATCH, CONTEXT), split)
            # Not many steps at once: on few processors their collectives wait for one another.
            training = jax.block_until_ready(step(training, batch, poison(number)))
            if number % SAVE_EVERY == 0 and not options.no_saves:
                print("saving", number, flush=True)
                save(manager, number, training, header)
                manager.wait_until_finished()
                print("saved", number, flush=True)
    params, state = training
    trained = {"params": params, "state": state.inner_state.inner_state}  # behind both guards
    leaves = jax.tree_util.tree_leaves_with_path(trained)
    np.savez(
        options.directory / "final.npz",
        skipped=state.total,
        spikes=state.inner_state.total,
        **{jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves},
    )


if __name__ == "__main__":
    main()
