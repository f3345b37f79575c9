"""Fine-tune a Flax nnx model with all that such a run has, kill it, and go on bit for bit.

    python examples/finetune.py
    python examples/finetune.py --folder runs/killed --kill-at 90  # dies there
    python examples/finetune.py --folder runs/killed  # goes on after step 80

A small CNN has learned scikit-learn's digits 0 to 4 and is given 5 to 9: its first layer stays
frozen, a new head learns at ten times the rate of the rest. One cycle of learning rate and
momentum, decay of matrices only, clipping, two batches to a step, a broken batch that is skipped,
telemetry for TensorBoard and as CSV, checkpoints with Orbax: all that is in ``tuner`` and ``tune``,
55 lines. Prints a row for every 40 batches, the accuracy on digits held out, and a digest of all
weights: the same after a kill. Draws what the telemetry saw.
"""

from __future__ import annotations

import csv
import hashlib
import os
import pathlib
import signal
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from helpers import digits, label_ends, look, parsed, parser_of, picture, table
from logging_telemetry import step_of, to_csv, to_tensorboard

from adaptive_opt import (
    Group,
    ParameterGroups,
    adamw,
    check_checkpoint,
    checkpoint_header,
    decay_mask,
    one_cycle,
    read_telemetry,
    skip_nonfinite,
    telemetry,
    train_step,
)

BATCH, BROKEN, SAVE_EVERY, SHOW_EVERY = 32, 30, 20, 20


class CNN(nnx.Module):
    """Two convolutions and two dense layers."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv1 = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(8, 16, (3, 3), rngs=rngs)
        self.hidden = nnx.Linear(256, 32, rngs=rngs)
        self.head = nnx.Linear(32, 5, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(images))))
        x = nnx.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        return self.head(nnx.relu(self.hidden(x)))


def loss_of(model: CNN, images: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


def tuner(steps: int) -> optax.GradientTransformationExtraArgs:
    """The optimizer of the fine-tuning, from the inside out."""
    cycle = one_cycle(2e-3, max(2, steps // 2))  # it counts steps taken, of two batches each
    groups = ParameterGroups(
        [Group("conv1", freeze=True), Group("head", learning_rate=10.0)], default=Group()
    )
    rule = groups.optimizer(
        adamw,
        learning_rate=cycle.learning_rate,
        b1=cycle.b1,
        weight_decay=0.05,
        mask=decay_mask,
        observers=telemetry(every=5),
    )
    clipped = optax.chain(groups.trained(optax.clip_by_global_norm(1.0)), rule)
    return skip_nonfinite(optax.MultiSteps(clipped, 2).gradient_transformation())


def batch_of(data: Sequence[np.ndarray], number: int) -> list[np.ndarray]:
    """The batch of a step, the same whenever it is asked for; one of them is broken."""
    images, labels = (x[np.random.default_rng(number).integers(len(x), size=BATCH)] for x in data)
    return [images * (np.nan if number == BROKEN else 1), labels]


def pretrained(data: Sequence[np.ndarray], steps: int) -> CNN:
    """A CNN that knows the digits 0 to 4, with a new head."""
    model = CNN(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, adamw(3e-3), wrt=nnx.Param)
    step = train_step(loss_of, optimizer)
    for number in range(steps):
        if number != BROKEN:
            model, optimizer, _ = step(model, optimizer, *batch_of(data, number))
    model.head = CNN(nnx.Rngs(1)).head
    return model


def tune(model: CNN, data: Sequence[np.ndarray], options: Any) -> nnx.Optimizer:
    """Go on after the last checkpoint, save every 20 steps, log what the optimizer sees."""
    folder = options.folder.absolute()
    optimizer = nnx.Optimizer(model, tuner(options.steps), wrt=nnx.Param)
    step, whole = train_step(loss_of, optimizer), {"model": model, "optimizer": optimizer}
    header, done, seen = checkpoint_header(optimizer.tx, nnx.state(whole)), 0, 0
    with (
        to_csv(folder) as to_file,
        to_tensorboard(folder) as to_board,
        ocp.CheckpointManager(folder / "checkpoints") as manager,
    ):
        if (last := manager.latest_step()) is not None:
            saved = manager.restore(
                last,
                args=ocp.args.Composite(
                    training=ocp.args.StandardRestore(nnx.state(whole)),
                    header=ocp.args.JsonRestore(),
                ),
            )
            check_checkpoint(saved["header"], optimizer.tx, nnx.state(whole))
            nnx.update(whole, saved["training"])
            done = last
            print(f"Going on after step {done} of {folder}.")
        for number in range(done + 1, options.steps + 1):
            model, optimizer, _ = step(model, optimizer, *batch_of(data, number))
            if (looked := step_of(read_telemetry(optimizer))) != seen:
                seen = looked
                to_file(optimizer)
                to_board(optimizer)
            if number % SAVE_EVERY == 0:
                args = ocp.args.Composite(
                    training=ocp.args.StandardSave(nnx.state(whole)),
                    header=ocp.args.JsonSave(header),
                )
                manager.save(number, args=args)
            if number == options.kill_at:
                manager.wait_until_finished()
                os.kill(os.getpid(), signal.SIGKILL)
    return optimizer


def logged(folder: pathlib.Path) -> dict[int, dict[str, float]]:
    """What stands in the CSV file, by the step; what was seen again after a kill is the same."""
    rows: dict[int, dict[str, float]] = {}
    with (folder / "telemetry.csv").open() as file:
        for row in csv.DictReader(file):
            rows.setdefault(int(row["step"]), {})[row["key"]] = float(row["value"])
    return rows


SHOWN = {
    "rate of the head": "head/learning_rate",
    "rate of the body": "default/learning_rate",
    "b1": "default/b1",
    "gradient of the body": "default/gradient_norm/all",
    "skipped": "skipped",
}


def draw(rows: dict[int, dict[str, float]], path: pathlib.Path) -> None:
    """The learning rates of the groups, and b1 below them."""
    title = "The head learns at ten times the rate of the body;\nb1 is low while rates are high"
    with picture(path, title, 2, 1, figsize=(6.5, 4.2), sharex=True) as (above, below):
        for index, name in enumerate(("rate of the head", "rate of the body", "b1")):
            axes = below if name == "b1" else above
            values = [row[SHOWN[name]] for row in rows.values()]
            axes.plot(list(rows), values, label=name, **look(index))
        above.set(ylabel="learning rate", yscale="log")
        below.set(ylabel="b1", xlabel="step of the optimizer, two batches each")
        for axes in (above, below):
            label_ends(axes)
            axes.grid(alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> tuple[float, str]:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="batches (200)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("runs/finetune"))
    parser.add_argument("--kill-at", type=int, help="the batch after which it kills itself")
    options = parsed(parser, arguments)
    options.folder.mkdir(parents=True, exist_ok=True)

    images, labels = digits(0)
    few = np.concatenate([np.flatnonzero(labels == digit)[:20] for digit in range(5, 10)])
    held_out = np.setdiff1d(np.flatnonzero(labels >= 5), few)
    model = pretrained((images[labels < 5], labels[labels < 5]), 200)
    optimizer = tune(model, (images[few], labels[few] - 5), options)

    rows = logged(options.folder)
    shown = [
        {"step": str(step)} | {name: f"{row.get(key, 0):.4g}" for name, key in SHOWN.items()}
        for step, row in rows.items()
        if step % SHOW_EVERY == 1
    ]
    print(table(shown))
    guesses = jnp.argmax(model(images[held_out]), axis=-1)
    accuracy = float(np.mean(np.asarray(guesses) == labels[held_out] - 5))
    leaves = jax.tree.leaves(nnx.state((model, optimizer)))
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in leaves)).hexdigest()
    print(
        f"Right of {len(held_out)} digits held out: {100 * accuracy:.1f} %. Weights: {digest[:16]}"
    )
    draw(rows, options.folder / "finetune.png")
    return accuracy, digest


if __name__ == "__main__":
    main()
