"""Telemetry for TensorBoard, Weights & Biases and a CSV file, each in ten lines.

    python examples/logging_telemetry.py                       # a CSV file
    python examples/logging_telemetry.py --to tensorboard
    python examples/logging_telemetry.py --to wandb            # pip install wandb

``read_telemetry`` returns a flat dict of floats, which all three take as it is. It is written when
there is something new: the optimizer looks at every tenth step only. Prints where it has written,
and what the last look saw of the loss and the learning rate.
"""

from __future__ import annotations

import contextlib
import csv
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from helpers import parsed, parser_of

from adaptive_opt import adamw, rate_histograms, read_telemetry, skip_nonfinite, telemetry

Log = Callable[[Any], None]
"""Takes the optimizer's state and writes what is in it."""


def step_of(row: Mapping[str, float]) -> int:
    """The step of the last look, 0 before the first. Each parameter group has its own."""
    steps = (value for key, value in row.items() if key.split("/")[-1] == "step")
    return int(max(steps, default=0))


@contextlib.contextmanager
def to_csv(folder: pathlib.Path) -> Iterator[Log]:
    """A row for each number: not all numbers are there at each look."""

    def log(state: Any) -> None:
        row = read_telemetry(state)
        with (folder / "telemetry.csv").open("a", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(("step", "key", "value"))
            writer.writerows((step_of(row), key, value) for key, value in row.items())

    yield log


@contextlib.contextmanager
def to_tensorboard(folder: pathlib.Path) -> Iterator[Log]:
    """Its last events are in the file once the writer is closed, which ``with`` does."""
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def log(state: Any) -> None:
            row = read_telemetry(state)
            for key, value in row.items():
                writer.add_scalar(key, value, step_of(row))

        yield log


@contextlib.contextmanager
def to_wandb(folder: pathlib.Path) -> Iterator[Log]:
    import wandb

    run = wandb.init(project="adaptive_opt", dir=str(folder))

    def log(state: Any) -> None:
        row = read_telemetry(state)
        run.log(row, step=step_of(row))
        histograms = rate_histograms(state)
        run.log({f"rates/{k}": h.tolist() for k, h in histograms.items()}, step=step_of(row))

    yield log


LOGS = {"csv": to_csv, "tensorboard": to_tensorboard, "wandb": to_wandb}


def train(log: Log, steps: int) -> Any:
    """A linear model, whose loss is told to the optimizer as ``value=``."""
    optimizer = skip_nonfinite(adamw(1e-2, observers=telemetry(every=10)))
    x = jax.random.normal(jax.random.key(0), (64, 8))
    y = x @ jnp.arange(8.0)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        loss, gradient = jax.value_and_grad(lambda w: jnp.mean((x @ w["w"] - y) ** 2))(params)
        updates, state = optimizer.update(gradient, state, params, value=loss)
        return optax.apply_updates(params, updates), state

    params = {"w": jnp.zeros(8)}
    state, seen = optimizer.init(params), None
    for _ in range(steps):
        params, state = step(params, state)
        looked = read_telemetry(state)["step"]
        if looked != seen:
            log(state)
        seen = looked
    return state


def main(arguments: list[str] | None = None) -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--to", choices=LOGS, default="csv", help="(csv)")
    parser.add_argument("--steps", type=int, default=100, help="(100)")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("logs"), help="(logs)")
    options = parsed(parser, arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with LOGS[options.to](options.folder) as log:
        seen = read_telemetry(train(log, options.steps))
    print(
        f"Written to {options.folder}; at step {step_of(seen)} the loss was {seen['loss']:.3g}, the"
    )
    print(f"learning rate {seen['learning_rate']:.3g}.")


if __name__ == "__main__":
    main()
