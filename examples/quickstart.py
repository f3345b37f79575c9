"""Train a small CNN on real handwritten digits with five optimizers, and compare them.

    python examples/quickstart.py
    python examples/quickstart.py --optimizers adam adamod --steps 200 --seed 1 --output curves.png

The data are the 1,797 digits that come with scikit-learn; nothing is downloaded. A fifth of them is
held out. Prints a table and saves a picture of the curves.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import time
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tqdm import tqdm

import adaptive_opt

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OPTIMIZERS = {
    "adam": lambda: adaptive_opt.adam(2e-3),
    "adamw": lambda: adaptive_opt.adamw(2e-3, weight_decay=1e-2),
    "amsgrad": lambda: adaptive_opt.amsgrad(2e-3),
    "adamod": lambda: adaptive_opt.adamod(5e-3, b3=0.99),
    "diffmod": lambda: adaptive_opt.diffmod(5e-3, len_memory=100),
}
BATCH, EVALUATE_EVERY = 64, 25


class CNN(nn.Module):
    """Two convolutions, a pooling and two dense layers: 38,282 weights."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


@dataclasses.dataclass
class Result:
    """How one optimizer did."""

    name: str
    losses: np.ndarray
    """The training loss of every step."""
    accuracies: list[tuple[int, float]]
    """The held-out accuracy after so many steps."""
    seconds: float
    state_bytes: int


def load(seed: int) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Images (n, 8, 8, 1) in [0, 1] and labels (n,): those to train on, and those held out."""
    digits = load_digits()
    images = (digits.images / 16.0).astype(np.float32)[..., None]
    split = train_test_split(
        images, digits.target, test_size=0.2, random_state=seed, stratify=digits.target
    )
    return (split[0], split[2]), (split[1], split[3])


def train(name: str, steps: int, seed: int) -> Result:
    """Train with one optimizer, with a progress bar."""
    began = time.perf_counter()
    (images, labels), (test_images, test_labels) = load(seed)
    model = CNN()
    state = TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(seed), images[:1]),
        tx=optax.chain(optax.clip_by_global_norm(1.0), OPTIMIZERS[name]()),
    )

    def loss_of(params, batch_images, batch_labels):
        logits = model.apply(params, batch_images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch_labels).mean()

    @jax.jit
    def step(state, batch):
        loss, gradients = jax.value_and_grad(loss_of)(state.params, images[batch], labels[batch])
        return state.apply_gradients(grads=gradients), loss

    @jax.jit
    def accuracy(params):
        return jnp.mean(jnp.argmax(model.apply(params, test_images), axis=-1) == test_labels)

    images, labels = jnp.asarray(images), jnp.asarray(labels)
    rng = np.random.default_rng(seed)
    losses, accuracies = [], []
    for done in (bar := tqdm(range(1, steps + 1), desc=f"{name:8}", unit="step")):
        state, loss = step(state, rng.integers(len(images), size=BATCH))
        losses.append(float(loss))
        if done % EVALUATE_EVERY == 0 or done == steps:
            accuracies.append((done, float(accuracy(state.params))))
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracies[-1][1]:.3f}")
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state))
    return Result(name, np.asarray(losses), accuracies, time.perf_counter() - began, size)


def smooth(losses: np.ndarray, width: int = 15) -> np.ndarray:
    """The running mean over the last ``width`` steps."""
    sums = np.cumsum(np.concatenate([np.zeros(1), losses]))
    ends = np.arange(1, len(losses) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


def draw(results: Sequence[Result], path: str) -> None:
    """The training loss and the held-out error of every optimizer, on a logarithmic scale."""
    colours = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"]
    dashes = ["-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1))]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for index, result in enumerate(results):
        style = {"color": colours[index % 5], "linestyle": dashes[index % 5], "linewidth": 1.6}
        left.plot(1 + np.arange(len(result.losses)), smooth(result.losses), **style)
        steps, accuracies = zip(*result.accuracies, strict=True)
        right.plot(steps, 100 * (1 - np.array(accuracies)), label=result.name, **style)
    left.set(xlabel="step", ylabel="training loss (nats, mean of 15 steps)", yscale="log")
    right.set(xlabel="step", ylabel="held-out error (%)", yscale="log")
    right.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    right.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
    right.set_yticks([1, 2, 5, 10, 20, 50])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    right.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=600, help="steps per optimizer (600)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"which to train with: {', '.join(names)} (all)",
    )  # fmt: skip
    parser.add_argument("--output", default="quickstart.png", help="the picture (quickstart.png)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and split (0)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    folder = pathlib.Path(options.output).parent
    if not folder.is_dir():
        parser.error(f"--output: there is no folder {folder}")

    results = [train(name, options.steps, options.seed) for name in options.optimizers]
    print(f"\n{'optimizer':10}{'final loss':>12}{'accuracy':>10}{'seconds':>9}{'state bytes':>13}")
    for result in results:
        loss, accuracy = smooth(result.losses)[-1], result.accuracies[-1][1]
        row = f"{result.name:10}{loss:12.4f}{accuracy:10.4f}{result.seconds:9.1f}"
        print(f"{row}{result.state_bytes:13,}")
    draw(results, options.output)
    print(f"\nThe curves are in {options.output}.")
    return results


if __name__ == "__main__":
    main()
