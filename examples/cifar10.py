"""Train a small CNN on CIFAR-10, where you have it, and watch what the optimizer does.

    python examples/cifar10.py --data cifar-10-batches-bin
    python examples/cifar10.py --data cifar-10-batches-bin --recipe adamod --steps 2000

DIR is the folder of "CIFAR-10 binary version (suitable for C programs)" from
https://www.cs.toronto.edu/~kriz/cifar.html, unpacked: data_batch_1.bin to data_batch_5.bin and
test_batch.bin. The Python version is refused: it is pickles, and reading a pickle runs whatever
program is in it. Prints the accuracy on the test images, and draws the rates of the weights.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from helpers import parsed, parser_of
from tqdm import tqdm

import adaptive_opt
from adaptive_opt.watching import plots

matplotlib.use("Agg")

BATCH = 64
RECORD = 1 + 3 * 32 * 32
"""Bytes of an image: its label, then the red, the green and the blue plane, row by row."""


def read(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3), uint8, and labels (n,) of one file of the binary version."""
    data = np.fromfile(path, np.uint8)
    if not len(data) or len(data) % RECORD:
        raise ValueError(
            f"{path} has {len(data)} bytes, which is no multiple of {RECORD}: it is not a file of"
            " CIFAR-10's binary version, or it is incomplete."
        )
    records = data.reshape(-1, RECORD)
    labels = records[:, 0].astype(np.int32)
    if labels.max() > 9:
        raise ValueError(f"{path}: labels go up to {labels.max()}, those of CIFAR-10 to 9.")
    return records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def load(folder: str | pathlib.Path) -> tuple[tuple, tuple]:
    """Images and labels to train on, from however many batches there are, and those to test on."""
    folder = pathlib.Path(folder)
    batches, test = sorted(folder.glob("data_batch_*.bin")), folder / "test_batch.bin"
    if not batches or not test.exists():
        if (folder / "data_batch_1").exists() or (folder / "batches.meta").exists():
            raise ValueError(
                f"{folder} holds the Python version of CIFAR-10, which is pickles; reading those"
                " can run any program. Download the binary version (cifar-10-binary.tar.gz)."
            )
        raise ValueError(
            f"there are no data_batch_*.bin and test_batch.bin in {folder}. Give the unpacked"
            " folder of CIFAR-10's binary version, cifar-10-batches-bin."
        )
    images, labels = zip(*map(read, batches), strict=True)
    return (np.concatenate(images), np.concatenate(labels)), read(test)


class CNN(nn.Module):
    """Three convolutions, each at half the resolution of the one before, and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = (images.astype(jnp.float32) / 255 - 0.5) * 4
        for width in (32, 64, 128):
            x = nn.max_pool(nn.relu(nn.Conv(width, (3, 3))(x)), (2, 2), strides=(2, 2))
        return nn.Dense(10)(x.reshape(len(x), -1))


def main(arguments: Sequence[str] | None = None) -> float:
    parser = parser_of(__doc__)
    parser.add_argument("--data", required=True, metavar="DIR", help="the unpacked binary version")
    parser.add_argument("--recipe", default="adamw", help="a recipe of adaptive_opt (adamw)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="(0.001)")
    parser.add_argument("--steps", type=int, default=1000, help="(1000)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    parser.add_argument("--output", default="cifar10.png", help="the picture (cifar10.png)")
    options = parsed(parser, arguments)
    try:
        (images, labels), (test_images, test_labels) = load(options.data)
    except ValueError as error:
        parser.error(f"--data: {error}")

    recipe = getattr(adaptive_opt, options.recipe)
    optimizer = recipe(options.learning_rate, observers=adaptive_opt.telemetry(every=50))
    model = CNN()
    params = model.init(jax.random.key(options.seed), images[:1])
    state, recorder = optimizer.init(params), plots.Recorder()

    @jax.jit
    def step(params, state, images, labels):
        def loss(params):
            logits = model.apply(params, images)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(options.seed)
    for done in tqdm(range(options.steps), unit="step"):
        batch = rng.integers(len(images), size=BATCH)
        params, state = step(params, state, images[batch], labels[batch])
        if done % 50 == 0:
            recorder.record(state)
    guess = jax.jit(lambda images: jnp.argmax(model.apply(params, images), axis=-1))
    parts = np.array_split(np.arange(len(test_labels)), max(1, len(test_labels) // 1000))
    right = np.concatenate([np.asarray(guess(test_images[p])) == test_labels[p] for p in parts])
    print(f"{options.recipe}: {100 * right.mean():.2f} % of {len(right)} test images")
    plots.rate_spectrogram({options.recipe: recorder}).savefig(options.output)
    return float(right.mean())


if __name__ == "__main__":
    main()
