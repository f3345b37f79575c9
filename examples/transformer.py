"""Train a small Transformer on the source of Python's standard library, on many devices.

    python examples/transformer.py --sharding fsdp --checkpoint runs/fsdp
    python examples/transformer.py --sharding fsdp --checkpoint runs/fsdp --devices 4 --steps 600

Character by character, on 8 devices; where there are not so many, the CPU is taken for 8. The
second command goes on where the first one stopped, on 4 devices. Layouts: "data" has parameters and
optimizer state on every device, "zero1" splits the state among them, "fsdp" both. The losses are
the same in all, and checkpoints of "data" and "fsdp" fit each other; a damaged one is passed over
for the one before it. Prints a row with the last loss, that on text held out, and the bytes of
optimizer state on each device; draws the loss.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import math
import os
import pathlib
import sys
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from helpers import CHARACTERS, library_text, look, parsed, parser_of, picture, pieces, table
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from adaptive_opt import (
    CheckpointMismatch,
    adamw,
    check_checkpoint,
    checkpoint_header,
    decay_mask,
    init_sharded,
    zero1,
)


class Block(nn.Module):
    """Attention to what came before, then two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(normed, mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x))))


class Transformer(nn.Module):
    """The logits of the next character, at every position."""

    width: int
    layers: int
    context: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        x = nn.Embed(CHARACTERS, self.width)(text)
        x = x + nn.Embed(self.context, self.width)(jnp.arange(text.shape[-1]))
        for _ in range(self.layers):
            x = Block()(x)
        return nn.Dense(CHARACTERS)(nn.LayerNorm()(x))


def mesh_of(count: int) -> Mesh:
    """The first so many devices, of the CPU if there are too few others."""
    devices = jax.devices() if len(jax.devices()) >= count else jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(f"--devices {count}: there are only {len(devices)}.")
    return jax.make_mesh((count,), ("data",), (AxisType.Auto,), devices=devices[:count])


def fully_sharded(params: dict, mesh: Mesh) -> dict:
    """Every parameter split along its first dimension that can be."""

    def split(p: jax.Array) -> NamedSharding:
        fits = [i for i, size in enumerate(p.shape) if size % mesh.size == 0]
        return NamedSharding(mesh, P(*[None] * fits[0], "data") if fits else P())

    return jax.tree.map(split, params)


def digest(training: tuple) -> str:
    """Of every number, however it is laid out: a damaged file may still be read as numbers."""
    sums = hashlib.blake2b()
    for leaf in jax.tree.leaves(training):
        sums.update(np.asarray(leaf).tobytes())
    return sums.hexdigest()


def save(manager: ocp.CheckpointManager, step: int, training: tuple, header: dict) -> None:
    """In the background; whose it is, and the digest of what it holds, stand beside it."""
    header = header | {"digest": digest(training)}
    args = ocp.args.Composite(
        training=ocp.args.StandardSave(training), header=ocp.args.JsonSave(header)
    )
    manager.save(step, args=args)


def restore(manager: ocp.CheckpointManager, optimizer, training: tuple) -> tuple[int, tuple]:
    """The last whole checkpoint of this optimizer and model and its step, laid out like
    ``training``. Later ones, which are damaged, are deleted: they will be written again."""
    damaged = {}
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            args = ocp.args.Composite(header=ocp.args.JsonRestore())
            header = manager.restore(step, args=args)["header"]
            check_checkpoint(header, optimizer, training)
            args = ocp.args.Composite(training=ocp.args.StandardRestore(training))
            restored = manager.restore(step, args=args)["training"]
            if digest(restored) != header["digest"]:
                raise ValueError("other numbers than were saved.")
        except CheckpointMismatch:
            raise
        except Exception as error:  # Orbax and what is below it raise no kind of their own
            damaged[step] = str(error).partition("\n")[0]
            continue
        for broken, reason in damaged.items():
            print(f"The checkpoint of step {broken} is damaged: {reason}", file=sys.stderr)
            manager.delete(broken)
        return step, restored
    raise ValueError(f"no checkpoint in {manager.directory} can be read: {damaged}")


def train(options: argparse.Namespace, mesh: Mesh) -> tuple[list[float], float, int]:
    """The loss of every step, the held-out loss, and the bytes of state on one device."""
    whole, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
    text, held_out = library_text()
    model = Transformer(options.width, options.layers, options.context)

    rule = adamw(
        optax.linear_schedule(0.0, options.learning_rate, 50), weight_decay=0.1, mask=decay_mask
    )
    if options.sharding == "zero1":
        rule = zero1(rule, mesh)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), rule)

    init = functools.partial(model.init, jax.random.key(options.seed), jnp.zeros((1, 1), int))
    of_params = fully_sharded(jax.eval_shape(init), mesh) if options.sharding == "fsdp" else whole
    params = jax.jit(init, out_shardings=of_params)()
    training = params, init_sharded(optimizer, params)

    def loss_of(params, text):
        logits = model.apply(params, text[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, text[:, 1:]).mean()

    layout = jax.tree.map(lambda x: x.sharding, training)

    @functools.partial(jax.jit, donate_argnums=0, out_shardings=(layout, whole))
    def step(training, text):
        params, state = training
        loss, gradients = jax.value_and_grad(loss_of)(params, text)
        updates, state = optimizer.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), loss

    def batch(of, *seed):
        drawn = pieces(of, (options.seed, *seed), options.batch, options.context)
        return jax.device_put(drawn, split)

    manager = None
    done, losses = 0, []
    if options.checkpoint:
        folder = pathlib.Path(options.checkpoint).absolute()
        manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=3))
        if manager.latest_step() is not None:
            done, training = restore(manager, optimizer, training)
            print(f"Going on after step {done} of {folder}.")
    header = checkpoint_header(optimizer, training)
    steps = tqdm(
        range(done + 1, options.steps + 1),
        desc=f"{options.sharding} on {mesh.size}",
        initial=min(done, options.steps),
        total=options.steps,
        unit="step",
    )
    for number in steps:
        training, loss = step(training, batch(text, number))
        losses.append(float(loss))
        steps.set_postfix(loss=f"{losses[-1]:.3f}")
        if manager and (number % options.save_every == 0 or number == options.steps):
            save(manager, number, training, header)
    if manager:
        manager.close()  # once what is being saved is
    params, state = training
    evaluate = jax.jit(loss_of)
    held_out_loss = np.mean([float(evaluate(params, batch(held_out, 0, i))) for i in range(8)])
    first = mesh.devices.flat[0]
    shards = [s for leaf in jax.tree.leaves(state) for s in leaf.addressable_shards]
    on_first = sum(s.data.nbytes for s in shards if s.device == first)
    return losses, float(held_out_loss), on_first


def draw(losses: Sequence[float], first: int, path: str) -> None:
    """The training loss; of a run that went on, its last part."""
    title = f"The loss goes from {losses[0]:.2f} to {losses[-1]:.2f} nats per character"
    with picture(path, title, figsize=(6, 3.4)) as axes:
        axes.plot(first + np.arange(len(losses)), losses, linewidth=1.2, **look(0))
        axes.set(xlabel="step", ylabel="training loss (nats per character)")
        axes.grid(alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--sharding", choices=["data", "fsdp", "zero1"], default="data", help="layout (data)")
    add("--devices", type=int, default=8, help="how many (8)")
    add("--steps", type=int, default=300, help="in all, those before a resume included (300)")
    add("--checkpoint", metavar="DIR", help="where to save, and to go on if there is something")
    add("--save-every", type=int, default=50, metavar="N", help="steps between saves (50)")
    add("--output", default="transformer.png", help="the picture (transformer.png)")
    add("--learning-rate", type=float, default=3e-3, help="after 50 steps of warm-up (3e-3)")
    add("--width", type=int, default=128, help="of the model, a multiple of 4 (128)")
    add("--layers", type=int, default=2, help="of the model (2)")
    add("--context", type=int, default=64, help="characters that it sees (64)")
    add("--batch", type=int, default=32, help="pieces of text a step, over all devices (32)")
    add("--seed", type=int, default=0, help="of weights and batches (0)")
    options = parsed(parser, arguments)
    if options.width % 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}")
    if options.batch % options.devices:
        parser.error(
            f"--batch {options.batch} cannot be split over --devices {options.devices}: give a"
            " multiple of it"
        )
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", max(8, options.devices))

    try:
        mesh = mesh_of(options.devices)
    except ValueError as error:
        parser.error(str(error))
    try:
        losses, held_out, size = train(options, mesh)
    except CheckpointMismatch as error:
        parser.error(f"--checkpoint {options.checkpoint}: {error}")
    row = {
        "layout": options.sharding,
        "devices": mesh.size,
        "steps": options.steps,
        "training loss": f"{losses[-1]:.4f}" if losses else "none",
        "held-out loss": f"{held_out:.4f}",
        "bits a character": f"{held_out / math.log(2):.2f}",
        "bytes of state a device": f"{size:,}",
    }
    print(f"\n{table([row])}\n\nLosses are in nats per character.")
    if losses:
        draw(losses, options.steps - len(losses) + 1, options.output)
        print(f"The picture is in {options.output}.")
    return losses


if __name__ == "__main__":
    main()
