"""Five optimizers on real handwritten digits, each at a learning rate found in the same way.

    python examples/quickstart.py
    python examples/quickstart.py --optimizers adam adamod --steps 200 --seeds 3 --output curves.png

The data are the 1,797 digits that come with scikit-learn; nothing is downloaded. Every optimizer is
given the same learning rates and seeds, all in one program (``adaptive_opt.sweep``), and keeps the
rate with the lowest loss on digits set aside for that. Prints a row for each, with the error on
digits that neither training nor choice has seen, and draws the losses with a band over the seeds.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import digits, label_ends, look, parsed, parser_of, picture, table
from tqdm import tqdm

import adaptive_opt

OPTIMIZERS = {
    "adam": adaptive_opt.adam,
    "adamw": functools.partial(adaptive_opt.adamw, weight_decay=1e-2),
    "amsgrad": adaptive_opt.amsgrad,
    "adamod": functools.partial(adaptive_opt.adamod, b3=0.99),
    "diffmod": functools.partial(adaptive_opt.diffmod, len_memory=100),
}
RATES = np.logspace(-4, -1, 7)
BATCH = 64


class Network(nn.Module):
    """Two dense layers: 9,610 weights."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(128)(images.reshape(len(images), 64))))


def loss_of(params, batch) -> jax.Array:
    images, labels = batch
    logits = Network().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Result(NamedTuple):
    """How one optimizer did at its best learning rate."""

    name: str
    learning_rate: float
    losses: np.ndarray
    """The training loss, (seeds, steps)."""
    errors: np.ndarray
    """The part of the test digits that each seed gets wrong."""
    seconds: float
    state_bytes: int


def train(name: str, steps: int, seeds: int, seed: int) -> Result:
    """Every learning rate and seed at once, with a progress bar."""
    began = time.perf_counter()
    images, labels = digits(seed)
    to_choose, to_test = (images[:300], labels[:300]), (images[300:700], labels[300:700])
    bar = tqdm(total=steps, desc=f"{name:8}", unit="step")
    found = adaptive_opt.sweep(
        lambda learning_rate: optax.chain(
            optax.clip_by_global_norm(1.0), OPTIMIZERS[name](learning_rate)
        ),
        {"learning_rate": RATES},
        loss=loss_of,
        init=lambda key: Network().init(key, images[:1])["params"],
        data=(images[700:], labels[700:]),
        batch_size=BATCH,
        steps=steps,
        seeds=range(seeds),
        evaluate=lambda params: loss_of(params, to_choose),
        progress=lambda done, of: bar.update(done - bar.n),
    )
    bar.close()
    best = found.best()[0]["learning_rate"]
    members = np.flatnonzero([member[0] == best for member in found.members])
    params = jax.tree.map(lambda leaf: leaf[members], found.params)

    def error(params):
        guesses = jnp.argmax(Network().apply({"params": params}, to_test[0]), axis=-1)
        return jnp.mean(guesses != to_test[1])

    one = jax.tree.map(lambda leaf: leaf[0], params)
    state = jax.eval_shape(OPTIMIZERS[name](best).init, one)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    errors = np.asarray(jax.vmap(error)(params))
    seconds = time.perf_counter() - began
    return Result(name, best, found.losses[members], errors, seconds, size)


def smooth(losses: np.ndarray, width: int = 15) -> np.ndarray:
    """The running mean over the last ``width`` steps."""
    sums = np.cumsum(np.pad(losses, ((0, 0), (1, 0))), axis=1)
    ends = np.arange(1, losses.shape[1] + 1)
    starts = np.maximum(0, ends - width)
    return (sums[:, ends] - sums[:, starts]) / (ends - starts)


def conclusion(results: Sequence[Result]) -> str:
    """What the errors allow to say."""
    means = [100 * result.errors.mean() for result in results]
    seeds = 100 * np.mean([result.errors.std() for result in results])
    apart = max(means) - min(means)
    if len(results) == 1:
        return f"{results[0].name}: {means[0]:.1f} % of the test digits wrong"
    said = "no more than" if apart <= 2 * seeds else "more than"
    return f"Each at its own best learning rate, test errors differ {said} those of seeds"


def draw(results: Sequence[Result], path: str) -> None:
    """The training losses with a band over the seeds, and the test errors, a dot for each seed."""
    seeds = len(results[0].errors)
    with picture(path, conclusion(results), 1, 2, figsize=(9, 3.6), width_ratios=(1.5, 1)) as (
        left,
        right,
    ):
        for index, result in enumerate(results):
            losses, steps = smooth(result.losses), 1 + np.arange(result.losses.shape[1])
            label = f"{result.name}, lr {result.learning_rate:.1g}"
            left.plot(steps, np.median(losses, axis=0), label=label, **look(index))
            left.fill_between(
                steps, losses.min(axis=0), losses.max(axis=0), color=look(index)["color"],
                alpha=0.15, linewidth=0,
            )  # fmt: skip
            up = index + np.linspace(-0.15, 0.15, seeds)
            right.plot(100 * result.errors, up, "o", markersize=4, color=look(index)["color"])
            right.plot(100 * result.errors.mean(), index, "|", markersize=20, color="black")
        left.set(xlabel="step", ylabel="training loss (nats, mean of 15 steps)", yscale="log")
        left.set_title(f"median and range of {seeds} seeds")
        label_ends(left)
        most = 108 * max(result.errors.max() for result in results)
        right.set(xlabel="test error (%)", xlim=(0, most), ylim=(len(results) - 0.5, -0.5))
        right.set_title("a dot for each seed, a dash: their mean")
        right.set_yticks(range(len(results)), [result.name for result in results])
        for axes in (left, right):
            axes.grid(alpha=0.25)


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = parser_of(__doc__)
    names = list(OPTIMIZERS)
    parser.add_argument("--steps", type=int, default=500, help="steps of each training (500)")
    parser.add_argument("--seeds", type=int, default=5, help="trainings at each rate (5)")
    parser.add_argument(
        "--optimizers", nargs="+", choices=names, default=names, metavar="NAME",
        help=f"which to train with: {', '.join(names)} (all)",
    )  # fmt: skip
    parser.add_argument("--output", default="quickstart.png", help="the picture (quickstart.png)")
    parser.add_argument("--seed", type=int, default=0, help="of the split of the digits (0)")
    options = parsed(parser, arguments)

    results = [train(n, options.steps, options.seeds, options.seed) for n in options.optimizers]
    rows = [
        {
            "optimizer": result.name,
            "best rate": f"{result.learning_rate:.2g}",
            "training loss": f"{smooth(result.losses)[:, -1].mean():.4f}",
            "test error": f"{100 * result.errors.mean():.2f} %",
            "of seeds": f"{100 * result.errors.std():.2f}",
            "seconds": f"{result.seconds:.1f}",
            "state bytes": f"{result.state_bytes:,}",
        }
        for result in results
    ]
    print(f"\n{table(rows)}")
    print(
        f"\nBest of the learning rates {', '.join(f'{rate:.2g}' for rate in RATES)}, by the loss on"
        f" 300 digits set aside;\nerrors on 400 others, means over {options.seeds} seeds, and"
        f" their standard deviation. {conclusion(results)}."
    )
    draw(results, options.output)
    print(f"The curves are in {options.output}.")
    return results


if __name__ == "__main__":
    main()
