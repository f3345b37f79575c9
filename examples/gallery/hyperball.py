"""One learning rate for several widths: AdamH's hyperball against AdamW.

    python examples/gallery/hyperball.py

A multilayer perceptron with three hidden layers on digits, of width 64 to 1024. The rate of the
matrices is swept; biases and the last layer are trained by Adam at one fixed rate in both.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import cross_entropy, digits, mlp, plt, progress, row, run, subplots, train

from adaptive_opt import adam, adamh, adamw

WIDTHS = (64, 128, 256, 512, 1024)
RATES = 10 ** np.arange(-4.0, 0.1, 0.5)
REST = 1e-3
DECAY = 0.1


def is_hidden(params):
    """The kernels of all layers but the last."""
    last = len(params) - 1
    return [{"w": i < last, "b": False} for i in range(len(params))]


def labels(params):
    return jax.tree.map(lambda hidden: "matrices" if hidden else "rest", is_hidden(params))


METHODS = {
    "AdamW": lambda rate: optax.partition(
        {"matrices": adamw(rate, 0.9, 0.95, weight_decay=DECAY), "rest": adam(REST, 0.9, 0.95)},
        labels,
    ),
    "AdamH": lambda rate: adamh(rate, 0.9, 0.95, matrices=is_hidden, rest_learning_rate=REST),
}


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def found_of(make, keys, rates, width, steps):
    """Held-out loss, (seeds, rates)."""
    shown, held_out = digits()

    def one(key, rate):
        init = functools.partial(mlp, widths=(64, width, width, width, 10))
        optimizer = make(lambda t: rate * (1 - t / steps))
        params = train(optimizer, key, shown, steps, init=init)
        return cross_entropy(params, *held_out)

    return jax.lax.map(lambda key: jax.lax.map(functools.partial(one, key), rates), keys)


def measure(seeds: int, steps: int) -> dict:
    keys = jax.random.split(jax.random.key(0), seeds)
    rates = jnp.asarray(RATES, jnp.float32)
    losses = {name: [] for name in METHODS}
    with progress(len(METHODS) * len(WIDTHS), "hyperball") as bar:
        for width in WIDTHS:
            for name, make in METHODS.items():
                found = np.asarray(found_of(make, keys, rates, width, steps), float)
                losses[name].append(np.where(np.isfinite(found), found, np.inf))
                bar.update()
    rows = []
    for name, of_widths in losses.items():
        bests = np.array([RATES[found.argmin(1)] for found in of_widths])  # (widths, seeds)
        for width, found, at in zip(WIDTHS, of_widths, bests, strict=True):
            rows.append(row(f"{name}, width {width}, best learning rate, log10", np.log10(at)))
            rows.append(row(f"{name}, width {width}, held-out loss there", found.min(1), "nats"))
        slope = np.polyfit(np.log10(WIDTHS), np.log10(bests), 1)[0]
        rows.append(row(f"{name}, decades of best rate for a decade of width", slope))
        moved = [found[:, of_widths[0].mean(0).argmin()].mean() for found in of_widths]
        what = f"{name}, width {WIDTHS[-1]} at the best rate of width {WIDTHS[0]}, held-out loss"
        rows.append(row(what, moved[-1], "nats"))
    return {
        "settings": {
            "model": "MLP 64-w-w-w-10, batch 64, rate falling linearly to 0",
            "rest": f"Adam, lr {REST:g}",
            "weight decay": f"AdamW {DECAY:g}; AdamH none",
        },
        "rows": rows,
        "widths": WIDTHS,
        "rates": RATES,
        "losses": losses,
    }


def draw(found: dict):
    figure, axes = subplots(
        "Wider networks want lower rates, with AdamH nearly as with AdamW",
        1, 2, figsize=(8, 3.1), sharey=True,
    )  # fmt: skip
    widths, rates = found["widths"], np.array(found["rates"])
    shades = plt.get_cmap("viridis")(np.linspace(0.75, 0.0, len(widths)))
    for ax, (name, losses) in zip(axes, found["losses"].items(), strict=True):
        for width, shade, each in zip(widths, shades, losses, strict=True):
            mean = np.array(each, float).mean(0)
            ax.plot(rates, mean, color=shade)
            lowest = np.nanargmin(mean)
            ax.plot(rates[lowest], mean[lowest], "o", color=shade, markersize=5)
            ax.annotate(
                f"width {width}" if width == widths[0] else str(width), (rates[0], mean[0]),
                (-4, 0), textcoords="offset points", color=shade, va="center", ha="right",
            )  # fmt: skip
        ax.set(
            xscale="log",
            yscale="log",
            xlim=(1e-5, None),
            xlabel="learning rate of the matrices",
            title=name,
        )
    axes[0].set_ylabel("held-out loss (nats); dots: lowest")
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(3, "of weights and batches"), steps=(100, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
