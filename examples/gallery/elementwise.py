"""RMSprop with a rate for every weight against one rate for all, on a quadratic, and turned.

    python examples/gallery/elementwise.py

Half the sum of h_i x_i^2 with h from 1 to 1e-5; then the same in a coordinate system turned at
random. Each optimizer at the constant learning rate that is best for it over all starts.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import label_ends, look, progress, row, run, subplots

from adaptive_opt import rmsprop

SIZE, CONDITION, B2 = 20, 1e5, 0.99
CURVATURES = np.logspace(0, -np.log10(CONDITION), SIZE)
RATES = np.logspace(-4, 0.5, 28)
SCOPES = {"weight": "a rate for every weight", "tree": "one rate for all"}
WAYS = ("axis-aligned", "turned")
SLOW, FAR = 2e-3, 5000
TARGET = 1e-3


def loss_of(x, turn):
    return 0.5 * jnp.sum(CURVATURES * (turn @ x) ** 2)


@functools.partial(jax.jit, static_argnums=(0, 4))
def descend(scope, start, turn, rates, steps):
    """The loss over that at the start, and the length of the path, (rates, steps)."""

    def one(rate):
        optimizer = rmsprop(rate, B2, scope=scope)

        def step(carry, _):
            x, state, length = carry
            loss, gradient = jax.value_and_grad(loss_of)(x, turn)
            updates, state = optimizer.update(gradient, state, x)
            after = (optax.apply_updates(x, updates), state, length + jnp.linalg.norm(updates))
            return after, (loss, length)

        carry = (start, optimizer.init(start), jnp.zeros(()))
        losses, lengths = jax.lax.scan(step, carry, length=steps)[1]
        return losses / losses[0], lengths

    return jax.vmap(one)(rates)


def flow(start, times):
    """Gradient flow, x' = -gradient, in closed form: the loss and the length of the path."""
    x = start * np.exp(-CURVATURES * times[:, None])
    losses = 0.5 * (CURVATURES * x**2).sum(1)
    lengths = np.concatenate([[0], np.linalg.norm(np.diff(x, axis=0), axis=1).cumsum()])
    return losses / losses[0], lengths


def measure(seeds: int, steps: int) -> dict:
    rng = np.random.default_rng(0)
    starts = rng.standard_normal((seeds, SIZE))
    turns = np.array([np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0] for _ in starts])
    rows, curves, final = [], {}, {}
    shown = np.unique(np.round(np.geomspace(1, steps, 60))).astype(int) - 1
    with progress(2 * len(WAYS) + 1, "elementwise") as bar, jax.enable_x64(True):
        for way in WAYS:
            for scope, label in SCOPES.items():
                turn = turns if way == "turned" else np.broadcast_to(np.eye(SIZE), turns.shape)
                begin = np.einsum("sij,si->sj", turn, starts)  # the same loss, turned or not
                losses, _ = jax.vmap(descend, (None, 0, 0, None, None))(
                    scope, begin, turn, RATES, steps
                )
                losses = np.log10(np.maximum(np.asarray(losses), 1e-30))  # (starts, rates, steps)
                end = losses[:, :, -max(1, steps // 20) :].mean(2)  # it oscillates
                best = int(np.nanargmin(end.mean(0)))
                reached = losses[:, best] <= np.log10(TARGET)
                when = np.where(reached.any(1), reached.argmax(1), steps)
                name = f"{way}, {label}"
                final[way, scope] = end[:, best]
                rows.append(row(f"best learning rate, {name}", RATES[best]))
                rows.append(row(f"log10 of the loss left, {name}", end[:, best]))
                rows.append(row(f"steps to a loss of {TARGET:g} (at most {steps}), {name}", when))
                curves[name] = 10 ** losses[:, best][:, shown].mean(0)
                bar.update()
            gain = final[way, "tree"] - final[way, "weight"]
            rows.append(row(f"log10 of the gain in loss, {way}", gain))
            rows.append(row(f"gain in loss, geometric mean, {way}", 10 ** gain.mean(), "times"))
        paths = {}
        for scope, label in SCOPES.items():
            losses, lengths = descend(scope, starts[0], np.eye(SIZE), np.array([SLOW]), FAR)
            take = np.unique(np.round(np.geomspace(1, FAR, 80))).astype(int) - 1
            paths[label] = [np.asarray(lengths)[0, take], np.asarray(losses)[0, take]]
        bar.update()
    with_time = np.array([flow(start, 2.0 * shown)[0] for start in starts])
    curves["gradient flow, 2/h per step"] = 10 ** np.log10(with_time).mean(0)
    losses, lengths = flow(starts[0], np.concatenate([[0], np.geomspace(1e-3, 1e6, 2000)]))
    paths["gradient flow"] = [lengths[::25], losses[::25]]
    return {
        "settings": {
            "quadratic": f"{SIZE} weights, condition {CONDITION:g}, standard normal starts",
            "rmsprop": f"b2 {B2}, no momentum, no debiasing, constant lr, float64",
            "path": f"lr {SLOW:g}, {FAR} steps, axis-aligned, the first start",
        },
        "rows": rows,
        "shown": shown,
        "curves": curves,
        "paths": paths,
    }


def draw(found: dict):
    figure, axes = subplots(
        "A rate for every weight helps where curvatures lie along the axes, and only there",
        1, 3, figsize=(11, 3.4),
    )  # fmt: skip
    labels = (*SCOPES.values(), "gradient flow")
    styles = {label: look(index) for index, label in enumerate(labels)}
    styles["gradient flow"] = {"color": "0.35", "linestyle": ":"}
    for ax, way in zip(axes, WAYS, strict=False):
        for name, curve in found["curves"].items():
            label = next(label for label in labels if label in name)
            if way in name or label == "gradient flow":
                x = np.array(found["shown"]) + 1
                ax.plot(x, curve, label=label, **styles[label])
        ax.set(xscale="log", yscale="log", xlabel="step")
    for label, (lengths, losses) in found["paths"].items():
        axes[2].plot(lengths, losses, label=label, **styles[label])
    axes[0].set(ylabel="loss (1 at the start)", title="Along the axes, best learning rate")
    axes[1].set(title="Turned at random, best learning rate", ylim=axes[0].get_ylim())
    axes[2].set(
        yscale="log", xlabel="length of the path", xlim=(0, 9), ylim=(1e-7, 2),
        title="Small steps: one rate follows the flow",
    )  # fmt: skip
    label_ends(axes[0])
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(20, "starts and turns"), steps=(1000, "of every descent"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
