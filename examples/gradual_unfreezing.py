"""Fine-tune in stages: freeze, train the head, unfreeze with smaller rates below.

    python examples/gradual_unfreezing.py
    python examples/gradual_unfreezing.py --steps 100 --seed 1

A small CNN learns to tell the digits 0 to 4 of scikit-learn apart (real images, no download), and
is then given 5 to 9, of which it sees only 20 each: a new head on a trained body. Three ways of
going on are compared on the digits that were held out: the head alone; all layers at one rate; and
gradual unfreezing, in which the layers below learn later and at smaller rates (Howard & Ruder,
arXiv:1801.06146). Each of them is one table of parameter groups. Prints the accuracy of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import digits, parsed, parser_of, table
from tqdm import tqdm

from adaptive_opt import Group, ParameterGroups, adamw, decay_mask, gradual_unfreezing

BATCH, EXAMPLES_EACH = 32, 20
LAYERS = ("conv1", "conv2", "hidden", "head")
"""From the input to the output."""


class CNN(nn.Module):
    """Two convolutions and two dense layers, with names for the groups."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3), name="conv1")(images))
        x = nn.relu(nn.Conv(32, (3, 3), name="conv2")(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        return nn.Dense(5, name="head")(nn.relu(nn.Dense(64, name="hidden")(x)))


Digits = tuple[np.ndarray, np.ndarray]


def load(seed: int) -> tuple[Digits, Digits, Digits]:
    """Images and labels 0 to 4: to train on first; then of the other digits: few, and held out."""
    images, labels = digits(seed)
    few = np.concatenate([np.flatnonzero(labels == d)[:EXAMPLES_EACH] for d in range(5, 10)])
    held_out = np.setdiff1d(np.flatnonzero(labels >= 5), few)
    known = labels < 5
    first = images[known], labels[known]
    return first, (images[few], labels[few] - 5), (images[held_out], labels[held_out] - 5)


def train(
    optimizer: optax.GradientTransformation, params: Any, data: Digits, steps: int, seed: int,
    title: str,
) -> Any:  # fmt: skip
    """The parameters after so many steps."""
    images, labels = map(jnp.asarray, data)

    @jax.jit
    def step(params, state, batch):
        def loss(params):
            logits = CNN().apply({"params": params}, images[batch])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels[batch]).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state, rng = optimizer.init(params), np.random.default_rng(seed)
    for _ in tqdm(range(steps), desc=f"{title:22}", unit="step"):
        params, state = step(params, state, rng.integers(len(images), size=BATCH))
    return params


def ways(steps: int) -> Mapping[str, Callable[[], optax.GradientTransformation]]:
    """The optimizers that are compared, each made of a table of parameter groups."""
    settings = {"learning_rate": 2e-3, "weight_decay": 1e-2, "mask": decay_mask}

    def of(groups: Sequence[Group], default: Group | None = None):
        return lambda: ParameterGroups(groups, default=default).optimizer(adamw, **settings)

    # The head from the start, one more layer after each quarter of the steps, each at a third of
    # the rate of the one above.
    unfreezing = gradual_unfreezing(list(LAYERS), steps=max(1, steps // 4), decay=1 / 3)
    return {
        "head alone": of([Group("^head")], default=Group(freeze=True)),
        "all at one rate": of([], default=Group()),
        "gradual unfreezing": of(unfreezing),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps of each training (200)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and split (0)")
    options = parsed(parser, arguments)
    steps, seed = options.steps, options.seed

    first, few, (images, labels) = load(seed)
    fresh = CNN().init(jax.random.key(seed), first[0][:1])["params"]
    body = train(adamw(2e-3), fresh, first, steps, seed, "digits 0 to 4")
    new_head = CNN().init(jax.random.key(seed + 1), first[0][:1])["params"]["head"]
    params = dict(body) | {"head": new_head}
    accuracies = {}
    for name, optimizer in ways(steps).items():
        tuned = train(optimizer(), params, few, steps, seed, name)
        guesses = jnp.argmax(CNN().apply({"params": tuned}, images), axis=-1)
        accuracies[name] = float(np.mean(np.asarray(guesses) == labels))
    print(f"\nAccuracy on {len(labels)} held-out digits 5 to 9:\n")
    print(table([{"way": n, "accuracy": f"{value:.4f}"} for n, value in accuracies.items()]))
    return accuracies


if __name__ == "__main__":
    main()
