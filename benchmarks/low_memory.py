"""What states in fewer bits cost in loss: ``python -m benchmarks.low_memory``.

Two tasks on real data: handwritten digits (scikit-learn's 1,797, a two-layer network) and the next
character of the text in LICENSE (a network over the last 16). Every optimizer is run with float32
states and with fewer bits, for the same seeds: same start, same batches. What is reported is the
mean over the seeds of the difference in test loss, in nats, and its standard error.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_opt

USUAL = {"adam": 1e-3, "amsgrad": 1e-3, "adamod": 3e-3, "diffgrad": 2e-3, "diffmod": 3e-3}
OTHERS = {
    "adamax": 2e-3,
    "ademamix": 1e-3,
    "adan": 2e-3,
    "adagrad": 1e-2,
    "adadelta": 1.0,
    "sgdw": 5e-2,
}
"""Whose buffers the usual ones do not have."""
RATES = USUAL | OTHERS
ROOT = pathlib.Path(__file__).parent.parent


class Task(NamedTuple):
    """Inputs and labels to train on and to test on, and the sizes of the layers."""

    train: tuple[Any, Any]
    test: tuple[Any, Any]
    layers: tuple[int, ...]
    embedding: int = 0


def digits() -> Task:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = np.float32(images[order] / 16), np.int32(labels[order])
    parts = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])
    return Task(*parts, layers=(64, 256, 128, 10))


def text(context: int = 16) -> Task:
    written = (ROOT / "LICENSE").read_text()
    alphabet = sorted(set(written))
    codes = np.array([alphabet.index(c) for c in written], np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(codes, context + 1)
    inputs, labels = windows[:, :-1], windows[:, -1]
    cut = int(0.8 * len(labels))
    parts = (inputs[:cut], labels[:cut]), (inputs[cut:], labels[cut:])
    return Task(*parts, layers=(context * 32, 256, len(alphabet)), embedding=32)


TASKS: dict[str, Callable[[], Task]] = {"digits": digits, "text": text}


def start(task: Task, key: jax.Array) -> Any:
    keys = jax.random.split(key, len(task.layers))
    layers = [
        {"kernel": jax.random.normal(k, (m, n)) * (2 / m) ** 0.5, "bias": jnp.zeros(n)}
        for k, m, n in zip(keys, task.layers[:-1], task.layers[1:], strict=False)
    ]
    if not task.embedding:
        return layers
    table = 0.5 * jax.random.normal(keys[-1], (task.layers[-1], task.embedding))
    return [{"table": table}, *layers]


def loss(task: Task, params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    x = inputs
    if task.embedding:
        x = params[0]["table"][inputs].reshape(len(inputs), -1)
        params = params[1:]
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    logits = x @ params[-1]["kernel"] + params[-1]["bias"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def held_out_losses(
    task: Task,
    optimizer: optax.GradientTransformation,
    seeds: Sequence[int],
    steps: int,
    batch: int = 64,
    prepared: Callable[[Any], Any] = lambda params: params,
    evaluated: Callable[[Any, Any], Any] = lambda state, params: params,
) -> np.ndarray:
    """The test loss after training, for every seed.

    The parameters start as ``prepared(params)``, and are tested as ``evaluated(state, params)``.
    """
    inputs, labels = map(jnp.asarray, task.train)
    tests = tuple(map(jnp.asarray, task.test))

    def run(seed: jax.Array) -> jax.Array:
        first, second = jax.random.split(jax.random.key(seed))
        params = prepared(start(task, first))

        def step(carry: Any, key: jax.Array) -> Any:
            params, state = carry
            rows = jax.random.randint(key, (batch,), 0, len(labels))
            gradient = jax.grad(functools.partial(loss, task))(params, inputs[rows], labels[rows])
            updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        carry = params, optimizer.init(params)
        (params, state), _ = jax.lax.scan(step, carry, jax.random.split(second, steps))
        return loss(task, evaluated(state, params), *tests)

    return np.asarray(jax.jit(jax.vmap(run))(jnp.asarray(seeds)))


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=list(USUAL), choices=RATES)
    parser.add_argument("--storages", nargs="+", default=["bfloat16", "8-bit"])
    parser.add_argument("--seeds", type=int, default=16, help="how many (16)")
    parser.add_argument("--first-seed", type=int, default=0, help="0")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args(arguments)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    rows = []
    print("| task | optimizer | storage | test loss, float32 | difference | standard errors |")
    print("|---|---|---|---|---|---|")
    for name in options.tasks:
        task = TASKS[name]()
        for chosen in options.optimizers:
            optimizer = getattr(adaptive_opt, chosen)(RATES[chosen])
            plain = held_out_losses(task, optimizer, seeds, options.steps)
            for storage in options.storages:
                low = adaptive_opt.low_memory(optimizer, storage)
                losses = held_out_losses(task, low, seeds, options.steps)
                error = (losses - plain).std(ddof=1) / len(seeds) ** 0.5
                row = {
                    "task": name,
                    "optimizer": chosen,
                    "storage": storage,
                    "float32": float(plain.mean()),
                    "difference": float((losses - plain).mean()),
                    "standard error": float(error),
                }
                rows.append(row | {"losses": losses.tolist(), "losses float32": plain.tolist()})
                difference = f"{row['difference']:+.4f} ± {error:.4f}"
                errors = f"{row['difference'] / error:+.1f}"
                cells = (name, chosen, storage, f"{row['float32']:.4f}", difference, errors)
                print(f"| {' | '.join(cells)} |", flush=True)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
    return rows


if __name__ == "__main__":
    main()
