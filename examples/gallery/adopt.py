"""ADOPT on the problem that sends Adam to the worst point, for every b2.

    python examples/gallery/adopt.py

Reddi's online problem as in amsgrad.py: 1010 x at every 101st step and -10 x at all others, for x
from -1 to 1, so that -1 is best; 1.01 million steps in float64.
"""

from __future__ import annotations

import functools

import jax
import numpy as np
from amsgrad import PERIOD, RATES, online
from shared import darker, look, progress, row, run, subplots

from adaptive_opt import adam, adopt, amsgrad

DRAWN = 3e-3
FORGETS = np.array([0.9, 0.5, 0.2, 1e-1, 1e-2, 1e-3, 4e-4, 2e-4, 1e-4, 1e-5])  # 1 - b2
RECIPES = {
    "Adam": adam,
    "AMSGrad": amsgrad,
    "ADOPT": adopt,
    "ADOPT without its clipping": functools.partial(adopt, convention="unclipped"),
}


NAMES = {
    "Adam": (5, (-6, -10), "right"),
    "AMSGrad": (1, (-8, 4), "right"),
    "ADOPT": (3, (-8, -14), "right"),
    "ADOPT without its clipping": (2, (0, -12), "center"),
}
"""Where a name stands: the number of the b2, an offset in points, its side there."""


def measure(seeds: int, periods: int) -> dict:
    del seeds  # there is no chance in it
    rates, forgets = (g.ravel() for g in np.meshgrid(RATES, FORGETS, indexing="ij"))
    rows, ends = [], {}
    with progress(len(RECIPES), "adopt") as bar, jax.enable_x64(True):
        for name, recipe in RECIPES.items():
            x, regret = map(np.asarray, online(recipe, rates, 1 - forgets, periods))
            ends[name] = x.reshape(len(RATES), -1)
            rows.append(row(f"part of the settings that end at x > 0, {name}", (x > 0).mean()))
            rows.append(row(f"largest x at the end, {name}", x.max()))
            rows.append(row(f"largest average regret, {name}", regret.max()))
            bar.update()
    return {
        "settings": {"online": f"{PERIOD * periods} steps, float64, start 0, b1 .9"},
        "rows": rows,
        "rates": RATES,
        "forgets": FORGETS,
        "x": ends,
    }


def draw(found: dict):
    figure, ax = subplots(
        "At small $b_2$ ADOPT goes to the worst point; without its clipping it does not",
        figsize=(6.5, 3.2),
    )
    rates, forgets = np.array(found["rates"]), np.array(found["forgets"])
    chosen = int(np.flatnonzero(rates == DRAWN)[0])
    for number, (name, x) in enumerate(found["x"].items()):
        ends = np.array(x)[chosen]
        ax.plot(forgets, ends, **look(number), marker="o", markersize=3.5)
        at, offset, side = NAMES[name]
        ax.annotate(
            name, (forgets[at], ends[at]), offset, textcoords="offset points",
            color=darker(look(number)["color"]), ha=side, va="center",
        )  # fmt: skip
    ax.set(xscale="log", xlabel=r"$1-b_2$", ylabel="x at the end (best: -1)", ylim=(-1.2, 1.1))
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(1, "there is no chance in it"), periods=(10_000, "of 101 steps"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
