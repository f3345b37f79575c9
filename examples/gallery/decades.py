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
    accuracy,
    cross_entropy,
    darker,
    digits,
    look,
    progress,
    row,
    run,
    subplots,
    train,
)

from adaptive_opt import adam, adamod, sgd

RATES = np.logspace(-5, 1, 13)
OPTIMIZERS = {
    "AdaMod": lambda rate: adamod(rate, b3=0.999),
    "Adam": adam,
    "SGD, momentum .9": lambda rate: sgd(rate, momentum=0.9),
}
LONGER = 10
TOLERANCE = 0.01
END = ("lowest", "highest")


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
    """The errors, and below them the range of rates that are usable."""
    figure, axes = subplots(
        "AdaMod's learning rates are no more forgiving than Adam's: they lie higher",
        2, 2, figsize=(8.8, 4), sharex=True, height_ratios=(1, 0.32),
    )  # fmt: skip
    lengths = [found["settings"]["steps"] * k for k in (1, LONGER)]
    rows = {r["what"]: r["mean"] for r in found["rows"]}
    for (above, below), length in zip(axes.T, lengths, strict=True):
        for index, (name, marker) in enumerate(zip(OPTIMIZERS, "os^", strict=False)):
            errors = 100 * np.array(found["errors"][f"{name}, {length} steps"])
            above.errorbar(
                found["rates"], errors.mean(0), errors.std(0), marker=marker, markersize=3.5,
                elinewidth=0.8, **look(index),
            )  # fmt: skip
            ends = [rows.get(f"{end} usable rate, {name}, {length} steps") for end in END]
            if None not in ends:
                below.plot(ends, [index] * 2, marker=marker, markersize=6, **look(index))
            else:
                below.text(1e-1, index, "none", va="center", ha="right", size=8, color="0.3")
        above.set(xscale="log", yscale="log", title=f"{length:,} steps")
        above.set_yticks([2, 5, 10, 20, 50, 90], [2, 5, 10, 20, 50, 90])
        above.set_yticks([], minor=True)
        above.grid(alpha=0.25)
        below.set_yticks(range(len(OPTIMIZERS)), list(OPTIMIZERS))
        for index, label in enumerate(below.get_yticklabels()):
            label.set_color(darker(look(index)["color"]))
        below.set(xlabel="learning rate", ylim=(len(OPTIMIZERS) - 0.4, -0.6))
        below.set_title("usable: within a point of the best error of all", size=8.5)
    axes[0, 0].set_ylabel("held-out error (%)")
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(5, "of weights and batches"), steps=(300, "of the shorter trainings"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
