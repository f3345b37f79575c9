"""diffGrad's friction on the paper's function F1: the picture, and the line the paper did not draw.

    python examples/gallery/friction.py

F1 has its minimum at -.3 and a worse one at .2. Settings of the paper: from -1, learning rate .1,
b1 .95, b2 .999, 300 steps. The third line is plain Adam at half the learning rate.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import label_ends, look, progress, row, run, subplots

from adaptive_opt import adam, diffgrad

RATE, B1 = 0.1, 0.95
LINES = {
    "Adam": lambda rate: adam(rate, B1),
    "diffGrad": lambda rate: diffgrad(rate, B1),
    "Adam, half the learning rate": lambda rate: adam(rate / 2, B1),
}
RATES = np.geomspace(0.01, 1.0, 81)


def f1(x):
    return jnp.where(x <= 0, (x + 0.3) ** 2, (x - 0.2) ** 2 + 0.05)


@functools.partial(jax.jit, static_argnums=(0, 3))
def path(recipe, start, rate, steps):
    """x and the friction, sigmoid|difference of gradients|, at every step."""
    optimizer = recipe(rate)

    def step(carry, _):
        x, state, before = carry
        gradient = jax.grad(f1)(x)
        friction = jax.nn.sigmoid(jnp.abs(before - gradient))
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state, gradient), (x, friction)

    start = jnp.asarray(start)
    carry = (start, optimizer.init(start), jnp.zeros_like(start))
    (x, _, _), (xs, frictions) = jax.lax.scan(step, carry, length=steps)
    return jnp.append(xs, x), frictions


def measure(seeds: int, steps: int) -> dict:
    starts = -1 + np.random.default_rng(0).uniform(-0.1, 0.1, seeds)
    rows, paths, ends = [], {}, {}
    with progress(len(LINES), "friction") as bar, jax.enable_x64(True):
        for name, recipe in LINES.items():
            xs, frictions = path(recipe, -1.0, RATE, steps)
            paths[name] = np.asarray(xs)
            rows.append(row(f"x after {steps} steps from -1, {name}", xs[-1]))
            if name == "diffGrad":
                rows.append(row("mean friction, diffGrad", frictions[1:].mean()))
            many, _ = jax.vmap(lambda s: path(recipe, s, RATE, steps))(jnp.asarray(starts))  # noqa: B023
            rows.append(row(f"x from [-1.1, -.9], {name}", many[:, -1]))
            by_rate, _ = jax.vmap(lambda r: path(recipe, -1.0, r, steps))(jnp.asarray(RATES))  # noqa: B023
            ends[name] = np.asarray(by_rate[:, -1])
            bar.update()
        for name, end in ends.items():
            rows.append(
                row(
                    f"part of the learning rates .01 to 1 that end at x < 0, {name}",
                    np.mean(end < 0),
                )
            )
    return {
        "settings": {"lr": RATE, "b1": B1, "b2": 0.999, "float64": True},
        "rows": rows,
        "paths": paths,
        "rates": RATES,
        "ends": ends,
    }


def draw(found: dict):
    figure, (left, right) = subplots(
        "Half of Adam's learning rate does what diffGrad's friction does",
        1, 2, figsize=(9.4, 3.3), width_ratios=(1, 0.9),
    )  # fmt: skip
    for index, (name, xs) in enumerate(found["paths"].items()):
        label = name.replace(", half the learning rate", ", half the rate")
        left.plot(xs, label=label, **look(index))
    for x, what in ((-0.3, "minimum"), (0.2, "worse one")):
        left.axhline(x, color="0.6", linewidth=0.8, zorder=0)
        left.text(0.6 * len(xs), x + 0.03, what, size=8, va="bottom", ha="left", color="0.3")
    left.set(xlabel="step", ylabel="x", title="F1 from -1, learning rate 0.1")
    label_ends(left)
    lost = np.array(list(found["ends"].values())) > 0
    names = [name.replace(", half the", ",\nhalf the") for name in found["ends"]]
    rates = np.array(found["rates"])
    edges = rates[0] * (rates[1] / rates[0]) ** (np.arange(len(rates) + 1) - 0.5)
    for i, line in enumerate(lost):
        right.axhspan(i - 0.3, i + 0.3, color="0.94", zorder=0)
        for low, high in zip(edges[:-1][line], edges[1:][line], strict=True):
            right.fill_between([low, high], i - 0.3, i + 0.3, color=look(i)["color"], linewidth=0)
    right.axvline(found["settings"]["lr"], color="0.3", linewidth=0.8, linestyle=":")
    right.set(xscale="log", xlabel="learning rate", title="Filled: ends in the worse minimum")
    right.set_yticks(range(len(names)), names)
    right.set_xticks([0.1, 0.2, 0.5, 1.0], ["0.1", "0.2", "0.5", "1"])
    right.set_xticks([], minor=True)
    right.invert_yaxis()
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(50, "starting points"), steps=(300, "of every path"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
