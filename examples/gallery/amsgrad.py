"""AMSGrad against Adam: where Adam goes to the worst point, and what is left of that in practice.

    python examples/gallery/amsgrad.py

Reddi's online problem: the loss is 1010 x at every 101st step and -10 x at all others, for x from
-1 to 1, so that -1 is best. Every learning rate and b2 at once, for 1.01 million steps, in float64.
Besides, a classifier of digits, trained by both from the same weights on the same batches.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from shared import accuracy, cross_entropy, digits, progress, row, run, subplots, train

from adaptive_opt import adam, amsgrad

PERIOD = 101
RATES = np.array([3e-4, 1e-3, 3e-3, 1e-2, 3e-2])
FORGETS = np.array([1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 8e-4, 4e-4, 2e-4, 1e-4, 3e-5])  # 1 - b2
OPTIMIZERS = {"adam": adam, "amsgrad": amsgrad}
ALONE = {"color": "#0072B2", "alpha": 0.7, "markeredgewidth": 0}
NAMED = (3e-3, 1e-2)  # the settings of the table: lr, 1 - b2


@functools.partial(jax.jit, static_argnums=(0, 3))
def online(recipe, rates, decays, periods):
    """For every pair: x on average over the last tenth, and the average regret."""

    def one(rate, b2):
        optimizer = recipe(rate, b2=b2)
        last_tenth = periods - max(1, periods // 10)

        def step(x, state, slope):
            updates, state = optimizer.update(slope, state, x)
            return jnp.clip(x + updates, -1.0, 1.0), state

        def period(carry, number):
            x, state, total, late = carry
            total += 1010.0 * x + 10.0  # the loss at x, less that at -1, over the whole period
            x, state = step(x, state, jnp.asarray(1010.0))

            def quiet(_, inner):
                x, state, total, late = inner
                total -= 10.0 * x
                x, state = step(x, state, jnp.asarray(-10.0))
                return x, state, total, late + jnp.where(number >= last_tenth, x, 0.0)

            carry = jax.lax.fori_loop(0, PERIOD - 1, quiet, (x, state, total, late))
            return carry, None

        x = jnp.zeros(())
        start = (x, optimizer.init(x), jnp.zeros(()), jnp.zeros(()))
        (_, _, total, late), _ = jax.lax.scan(period, start, jnp.arange(periods))
        late /= max(1, periods // 10) * (PERIOD - 1)
        return late, total / (periods * PERIOD)

    return jax.vmap(one)(rates, decays)


@functools.partial(jax.jit, static_argnums=(0, 2))
def classify(recipe, keys, steps):
    """Held-out accuracy and loss of every seed."""
    shown, held_out = digits()

    def one(key):
        params = train(recipe(2e-3), key, shown, steps)
        return accuracy(params, *held_out), cross_entropy(params, *held_out)

    return jax.vmap(one)(keys)


def measure(seeds: int, steps: int, periods: int) -> dict:
    rates, forgets = (g.ravel() for g in np.meshgrid(RATES, FORGETS, indexing="ij"))
    rows, ends, regrets = [], {}, {}
    with progress(4, "amsgrad") as bar:
        named = (rates == NAMED[0]) & (forgets == NAMED[1])
        with jax.enable_x64(True):
            for name, recipe in OPTIMIZERS.items():
                x, regret = map(np.asarray, online(recipe, rates, 1 - forgets, periods))
                ends[name], regrets[name] = x.reshape(len(RATES), -1), float(regret[named][0])
                rows.append(row(f"x at the end, {name}, lr 3e-3, b2 .99", x[named]))
                rows.append(row(f"average regret, {name}", regret[named]))
                bar.update()
        rows.append(row("regret, amsgrad over adam", regrets["amsgrad"] / regrets["adam"]))
        for name in OPTIMIZERS:
            wrong = float((ends[name] > 0).mean())
            rows.append(row(f"part of the settings that end at x > 0, {name}", wrong))
        keys = jax.random.split(jax.random.key(0), seeds)
        scores = {}
        for name, recipe in OPTIMIZERS.items():
            scores[name] = [np.asarray(s, float) for s in classify(recipe, keys, steps)]
            rows.append(row(f"digits, held-out accuracy, {name}", scores[name][0]))
            bar.update()
        for index, (what, unit) in enumerate((("accuracy", ""), ("loss", "nats"))):
            difference = scores["amsgrad"][index] - scores["adam"][index]
            rows.append(row(f"digits, amsgrad minus adam, {what}", difference, unit))
            error = difference.std(ddof=1) / np.sqrt(len(difference)) if seeds > 1 else 0.0
            rows.append(row(f"standard error of that, {what}", error, unit))
    return {
        "settings": {
            "online": f"{PERIOD * periods} steps, float64, start 0, b1 .9, convention torch",
            "digits": "MLP 64-32-10, batch 64, lr 2e-3, b2 .999, same weights and batches in both",
        },
        "rows": rows,
        "rates": RATES,
        "forgets": FORGETS,
        "x": ends,
        "accuracy": {name: scores[name][0] for name in OPTIMIZERS},
    }


def draw(found: dict):
    title = "AMSGrad mends the problem made for it; on digits it changes less than a seed does"
    figure, axes = subplots(title, 1, 3, figsize=(9.8, 3.3), width_ratios=(1, 1, 1))
    forgets, rates = np.array(found["forgets"]), np.array(found["rates"])
    said = (
        ("adam", "Adam: x often ends at the worst point, +1"),
        ("amsgrad", "AMSGrad: x never does"),
    )
    for ax, (name, title) in zip(axes, said, strict=False):
        x = np.array(found["x"][name])
        ax.pcolormesh(
            np.arange(len(forgets)), np.arange(len(rates)), x, cmap="PuOr", vmin=-1, vmax=1,
            edgecolors="white", linewidth=0.5,
        )  # fmt: skip
        for i, j in np.ndindex(x.shape):
            colour = "white" if abs(x[i, j]) > 0.7 else "black"
            ax.text(j, i, f"{x[i, j]:+.1f}", ha="center", va="center", size=6, color=colour)
        ax.set_xticks(np.arange(len(forgets)), [f"{f:g}" for f in forgets], rotation=60, size=7)
        ax.set_yticks(np.arange(len(rates)), [f"{r:g}" for r in rates])
        ax.set(xlabel=r"$1-b_2$", title=title)
        ax.spines[:].set_visible(False)
    axes[0].set_ylabel("learning rate")
    scores = {name: 100 * np.array(of) for name, of in found["accuracy"].items()}
    differences = np.sort(scores["amsgrad"] - scores["adam"])
    spread, right = scores["adam"].std(), axes[2]
    right.axvspan(-spread, spread, color="0.9")
    right.axvline(0, color="0.4", linewidth=0.8)
    right.plot(differences, np.arange(len(differences)), "o", markersize=4, **ALONE)
    right.text(0, len(differences) + 0.5, "what a seed changes", ha="center", size=8, color="0.3")
    right.set(
        xlabel="accuracy, AMSGrad less Adam (points)", ylim=(-1, len(differences) + 2.5),
        xlim=(-1.2, 1.2), yticks=[], title=f"Digits, {len(differences)} seeds, paired",
    )  # fmt: skip
    right.spines["left"].set_visible(False)
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(20, "of the classifier"),
        steps=(600, "of the classifier"),
        periods=(10_000, "of 101 steps of the online problem"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
