"""The same result over two decades of learning rate? AdaMod, Adam and SGD, low rates included.

    python examples/gallery/decades.py

Digits, thirteen learning rates from 1e-5 to 10; then ten times the steps.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from shared import (
    COLOURS,
    DASHES,
    accuracy,
    cross_entropy,
    digits,
    plt,
    progress,
    row,
    run,
    train,
)  # fmt: skip

from adaptive_opt import adam, adamod, sgd

RATES = np.logspace(-5, 1, 13)
OPTIMIZERS = {
    "AdaMod": lambda rate: adamod(rate, b3=0.999),
    "Adam": adam,
    "SGD, momentum .9": lambda rate: sgd(rate, momentum=0.9),
}
LONGER = 10
TOLERANCE = 0.01


@functools.partial(jax.jit, static_argnums=0)
def trained(name, keys, steps):
    """Held-out error and loss, (seeds, rates)."""
    shown, held_out = digits()

    def one(key, rate):
        params = train(OPTIMIZERS[name](rate), key, shown, steps)
        loss = cross_entropy(params, *held_out)
        error = 1 - accuracy(params, *held_out)
        return jnp.where(jnp.isfinite(loss), error, 0.9), loss

    rates = jnp.asarray(RATES, jnp.float32)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, rates)


def usable(errors, best):
    """Decades of learning rate with an error within the tolerance of the best of all; (seeds,)."""
    return (errors <= best + TOLERANCE).sum(-1) * np.log10(RATES[1] / RATES[0])


def measure(seeds: int, steps: int) -> dict:
    keys = jax.random.split(jax.random.key(0), seeds)
    errors = {}
    with progress(2 * len(OPTIMIZERS), "decades") as bar:
        for length in (steps, LONGER * steps):
            for name in OPTIMIZERS:
                error, _ = trained(name, keys, length)
                errors[f"{name}, {length} steps"] = np.asarray(error, float)
                bar.update()
    rows = []
    for length in (steps, LONGER * steps):
        of_length = {n: errors[f"{n}, {length} steps"] for n in OPTIMIZERS}
        best = min(e.mean(0).min() for e in of_length.values())
        for name, error in of_length.items():
            best_rate = int(error.mean(0).argmin())
            label = f"{name}, {length} steps"
            within = error.mean(0) <= best + TOLERANCE
            rows.append(row(f"best error, {label}", 100 * error[:, best_rate], "%"))
            rows.append(row(f"usable learning rates, {label}", usable(error, best), "decades"))
            if within.any():
                rows.append(row(f"lowest usable rate, {label}", RATES[within][0]))
                rows.append(row(f"highest usable rate, {label}", RATES[within][-1]))
    for name in OPTIMIZERS:
        error = errors[f"{name}, {steps} steps"]
        centre = int(np.argmin(error.mean(0)))
        low = max(0, centre - 2)  # two decades, five rates, around the best
        part = error[:, low : low + 5].mean(0)
        rows.append(
            row(
                f"worst over two decades around the best, {name}, {steps} steps",
                100 * part.max(),
                "%",
            )
        )
    return {
        "settings": {
            "model": "MLP 64-32-10, batch 64",
            "usable": f"error within {100 * TOLERANCE:g} points of the best of all three",
        },
        "rows": rows,
        "rates": RATES,
        "errors": errors,
    }


def draw(found: dict):
    figure, axes = plt.subplots(1, 2, figsize=(8.5, 3), sharey=True)
    lengths = [found["settings"]["steps"] * k for k in (1, LONGER)]
    for ax, length in zip(axes, lengths, strict=True):
        for name, colour, dash, marker in zip(OPTIMIZERS, COLOURS, DASHES, "os^", strict=False):
            errors = 100 * np.array(found["errors"][f"{name}, {length} steps"])
            mean, sd = errors.mean(0), errors.std(0)
            ax.errorbar(
                found["rates"], mean, sd, color=colour, linestyle=dash, label=name,
                marker=marker, markersize=3.5, elinewidth=0.8,
            )  # fmt: skip
        ax.set(xscale="log", yscale="log", xlabel="learning rate", title=f"{length:,} steps")
        ax.set_yticks([2, 5, 10, 20, 50, 90], [2, 5, 10, 20, 50, 90])
        ax.set_yticks([], minor=True)
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("held-out error (%)")
    axes[0].legend(loc="lower left", borderaxespad=0.2)
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(5, "of weights and batches"), steps=(300, "of the shorter trainings"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
