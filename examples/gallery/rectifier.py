"""RAdam's variance: how much the rate of a weight scatters in the first steps, and rectified.

    python examples/gallery/rectifier.py

The gradients are standard normal numbers, so that all scatter comes from the second moment.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from shared import label_ends, look, progress, row, run, subplots

from adaptive_opt import adaptive, debias, per_weight_rate, radam_rectifier, second_moment

B2 = 0.999
FIRST = 10  # of the rows; from here on the variance is finite and well estimated


@functools.partial(jax.jit, static_argnums=(1, 2))
def variances(key, draws, steps):
    """The variance of the rate over the draws at every step: plain and rectified."""
    plain = adaptive(second_moment(B2), debias(b2=B2), per_weight_rate(0.0))
    rectified = adaptive(
        second_moment(B2), debias(b2=B2), per_weight_rate(0.0), radam_rectifier(B2)
    )
    weights = jnp.zeros(draws)

    def step(states, number):
        gradient = jax.random.normal(jax.random.fold_in(key, number), (draws,))
        both = [
            rule.update(gradient, state)
            for rule, state in zip((plain, rectified), states, strict=True)
        ]
        rates = [update / gradient for update, _ in both]
        return [state for _, state in both], [r.var() for r in rates]

    states = [plain.init(weights), rectified.init(weights)]
    return jax.lax.scan(step, states, jnp.arange(steps))[1]


def measure(seeds: int, steps: int, draws: int) -> dict:
    found = []
    with progress(seeds, "rectifier") as bar:
        for key in jax.random.split(jax.random.key(0), seeds):
            found.append(np.asarray(variances(key, draws, steps), float))
            bar.update()
    plain, rectified = np.moveaxis(np.array(found), 1, 0)[:, :, FIRST - 1 :]  # (seeds, steps)
    rows = [
        row("variance of Adam's rate, step 10", plain[:, 0]),
        row(f"variance of Adam's rate, step {steps}", plain[:, -1]),
        row(f"largest over smallest, Adam, steps 10 to {steps}", plain.max(1) / plain.min(1)),
        row("rectified: smallest variance", rectified.min(1)),
        row("rectified: largest variance", rectified.max(1)),
        row("largest over smallest, rectified", rectified.max(1) / rectified.min(1)),
    ]
    shown = np.unique(np.round(np.geomspace(FIRST, steps, 60))).astype(int)
    return {
        "settings": {"gradients": "standard normal", "b2": B2},
        "rows": rows,
        "shown": shown,
        "plain": plain[:, shown - FIRST],
        "rectified": rectified[:, shown - FIRST],
    }


def draw(found: dict):
    figure, ax = subplots(
        "RAdam's factor makes the rates of weights\nscatter alike at all steps", figsize=(5.6, 3.4)
    )
    for index, (name, label) in enumerate(
        (("rectified", "RAdam: r / sqrt(v)"), ("plain", "Adam: 1 / sqrt(v)"))
    ):
        lines = np.array(found[name])
        ax.plot(found["shown"], lines.mean(0), label=label, **look(index))
        ax.fill_between(
            found["shown"], lines.min(0), lines.max(0), color=look(index)["color"], alpha=0.25
        )
    ax.set(xscale="log", yscale="log", xlabel="step", ylabel="variance of the rate")
    ax.grid(alpha=0.25)
    label_ends(ax)
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(10, "of the gradients"),
        steps=(1000, "to follow"),
        draws=(20_000, "of a weight, for each seed"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
