"""Weight decay: what Adam makes of L2, and what "decoupled" does and does not decouple.

    python examples/gallery/decay.py

Left: weights of 1 whose gradients are pure noise, of nine sizes; what is left of them after 3,000
steps. Right: digits with noisy labels; the best decay at every learning rate, in the three forms.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import (
    cross_entropy,
    darker,
    digits,
    label_ends,
    look,
    progress,
    row,
    run,
    subplots,
    train,
)

from adaptive_opt import adam, adamw

RATE, DECAY, FAN_STEPS, COPIES = 1e-3, 1.0, 3000, 256
SCALES = np.logspace(-2, 2, 9)

RATES = np.logspace(-2.75, -1.25, 6)
SHOWN = 500
DECAYS = {  # each form at decays that take about as much of a weight
    "L2 in the gradient": np.logspace(-5, -1, 9),
    "decoupled, times lr": np.logspace(-2, 2, 9),
    "decoupled, not times lr": np.logspace(-4.5, -0.5, 9),
}
NOISE = 0.4


def with_l2(learning_rate, weight_decay):
    return adam(learning_rate, weight_decay=weight_decay)


def times_rate(learning_rate, weight_decay):
    return adamw(learning_rate, weight_decay=weight_decay)


def not_times_rate(learning_rate, weight_decay):
    return adamw(learning_rate, weight_decay=weight_decay, decay="independent")


FORMS = dict(zip(DECAYS, (with_l2, times_rate, not_times_rate), strict=True))


@functools.partial(jax.jit, static_argnums=0)
def fan(form, keys):
    """What is left, (seeds, scales), on average over the copies."""
    optimizer = form(RATE, DECAY)

    def one(key):
        weights = jnp.ones((len(SCALES), COPIES))

        def step(carry, number):
            weights, state = carry
            noise = jax.random.normal(jax.random.fold_in(key, number), weights.shape)
            gradient = noise * jnp.asarray(SCALES, jnp.float32)[:, None]
            updates, state = optimizer.update(gradient, state, weights)
            return (optax.apply_updates(weights, updates), state), weights.mean(1)

        carry, path = jax.lax.scan(step, (weights, optimizer.init(weights)), jnp.arange(FAN_STEPS))
        return carry[0].mean(1), path[:: FAN_STEPS // 60]

    return jax.vmap(one)(keys)


@functools.partial(jax.jit, static_argnums=(0, 4))
def trained(form, rates, decays, key, steps):
    """The held-out loss, (rates, decays), of training on labels 40 % of which are random."""
    (x, y), held_out = digits()
    x, y = x[:SHOWN], y[:SHOWN]  # few enough to learn the wrong labels by heart
    of_labels, of_rest = jax.random.split(key)
    wrong = jax.random.bernoulli(of_labels, NOISE, y.shape)
    y = jnp.where(wrong, jax.random.randint(of_labels, y.shape, 0, 10), y)

    def one(rate, decay):
        params = train(form(rate, decay), of_rest, (x, y), steps)
        return cross_entropy(params, *held_out)

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(rates, decays)


def best_decay(losses, decays):
    """At every rate the log10 of the best decay, by a parabola through it and its neighbours."""
    x, found = np.log10(decays), []
    for line in np.where(np.isfinite(losses), losses, np.nanmax(losses)):
        i = int(np.clip(np.argmin(line), 1, len(line) - 2))
        below, at, above = line[i - 1 : i + 2]
        curvature = below - 2 * at + above
        shift = 0.5 * (below - above) / curvature if curvature > 0 else 0.0
        found.append(x[i] + np.clip(shift, -1, 1) * (x[1] - x[0]))
    return np.array(found)


def measure(seeds: int, steps: int) -> dict:
    keys = jax.random.split(jax.random.key(0), seeds)
    closed_form = (1 - RATE * DECAY) ** FAN_STEPS
    rows = [row("left of a weight, closed form (1 - lr wd)^t", closed_form)]
    left, maps = {}, {}
    with progress(2 + len(FORMS) * seeds, "decay") as bar:
        for name in ("L2 in the gradient", "decoupled, times lr"):
            left[name] = fan(FORMS[name], keys)
            end = np.asarray(left[name][0])
            for which, i in (("smallest", 0), ("middle", 4), ("largest", 8)):
                rows.append(row(f"left, {name}: {which} gradients", end[:, i]))
            rows.append(row(f"left, {name}: largest minus smallest", np.ptp(end, axis=1)))
            bar.update()
        for name, form in FORMS.items():
            losses = []
            for key in keys:
                losses.append(
                    np.asarray(trained(form, RATES, DECAYS[name], key, steps), np.float64)
                )
                bar.update()
            best = np.array([best_decay(of_seed, DECAYS[name]) for of_seed in losses])
            tilt = [np.polyfit(np.log10(RATES), line, 1)[0] for line in best]
            maps[name] = {
                "rates": RATES,
                "decays": DECAYS[name],
                "loss": np.mean(losses, 0),
                "best_decay": 10 ** best.mean(0),
            }
            rows.append(row(f"tilt of the best decay, {name}", tilt, "decades per decade"))
            rows.append(row(f"best held-out loss, {name}", [np.nanmin(m) for m in losses], "nats"))
    return {
        "settings": {
            "fan": f"lr {RATE:g}, wd {DECAY:g}, {FAN_STEPS} steps, {COPIES} weights of each size",
            "map": f"{SHOWN} digits, {NOISE:.0%} of the labels random, MLP 64-32-10, batch 64",
        },
        "rows": rows,
        "scales": SCALES,
        "left": {name: np.asarray(end) for name, (end, _) in left.items()},
        "paths": {name: np.asarray(path).mean(0).T for name, (_, path) in left.items()},
        "maps": maps,
    }


def draw(found: dict):
    figure, (left, right) = subplots(
        "AdamW decays all weights alike, L2 does not;\n"
        "the best decay moves with the learning rate only where it is not times it",
        1, 2, figsize=(9.4, 3.7),
    )  # fmt: skip
    scales = np.array(found["scales"])
    closed_form = found["rows"][0]["mean"]
    left.axhline(closed_form, color="0.4", linewidth=1)
    left.text(
        scales[0], closed_form + 0.03, r"$(1-\mathrm{lr}\,\mathrm{wd})^t$", size=8, color="0.3"
    )
    for index, (name, of) in enumerate(found["left"].items()):
        of, marker = np.array(of), "so"[index]
        label = "Adam with L2" if name.startswith("L2") else "AdamW"
        left.errorbar(scales, of.mean(0), of.std(0), marker=marker, markersize=4, **look(index))
        at = (scales[6], of.mean(0)[6])
        below = {"xytext": (8, -12)} if index == 0 else {"xytext": (0, 10)}
        left.annotate(
            label, at, textcoords="offset points", color=darker(look(index)["color"]), **below
        )
    left.set(
        xscale="log", xlabel="size of the gradients, which are noise",
        ylabel="fraction of the weight left", title="What is left of a weight after 3,000 steps",
        ylim=(-0.03, 1.03),
    )  # fmt: skip
    for index, (name, m) in enumerate(found["maps"].items()):
        best = np.array(m["best_decay"])
        tilt = next(r["mean"] for r in found["rows"] if r["what"].endswith(f"best decay, {name}"))
        right.plot(
            m["rates"], best / best[0], marker="so^"[index], markersize=4,
            label=f"{name}: slope {tilt:.2f}", **look(index),
        )  # fmt: skip
    right.set(
        xscale="log", yscale="log", xlabel="learning rate",
        ylabel="best weight decay, over that at the left",
        title="Digits, 40 % of the labels wrong",
    )  # fmt: skip
    right.set_xticks([0.002, 0.005, 0.01, 0.02, 0.05], [0.002, 0.005, 0.01, 0.02, 0.05])
    right.set_xticks([], minor=True)
    right.grid(alpha=0.25)
    label_ends(right)
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(5, "of weights, labels and batches"), steps=(2000, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
