"""1cycle against cosine and a constant rate: how many steps to a given error.

    python examples/gallery/one_cycle.py

Digits, moved by up to a pixel and dimmed at random. Every schedule is given budgets of steps, and
at each budget the learning rate that is best for it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.ticker import NullLocator
from shared import (
    accuracy,
    cross_entropy,
    digits,
    label_ends,
    look,
    mlp,
    progress,
    row,
    run,
    subplots,
    train,
)

from adaptive_opt import adamw, one_cycle

RATES = np.geomspace(2e-3, 1e-1, 6)
BUDGETS = (50, 100, 200, 400, 800)
SCHEDULES = ("1cycle", "cosine", "1cycle, b1 constant", "constant")


def move(key, x):
    """Each image moved by up to a pixel each way, and dimmed by up to a half."""
    shift, dim = jax.random.split(key)
    images = jnp.pad(x.reshape(-1, 8, 8), ((0, 0), (1, 1), (1, 1)))
    corners = jax.random.randint(shift, (len(x), 2), 0, 3)
    cut = jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, at, (8, 8)))(images, corners)
    return cut.reshape(len(x), 64) * jax.random.uniform(dim, (len(x), 1), minval=0.5)


def tables(name, steps, length):
    """The learning rate, as a part of the largest, and b1 at every step, filled up to a length."""
    t = jnp.arange(steps)
    cycle = one_cycle(1.0, steps)
    rate = {
        "1cycle": cycle.learning_rate,
        "cosine": optax.cosine_decay_schedule(1.0, steps),
        "1cycle, b1 constant": cycle.learning_rate,
        "constant": jnp.ones_like,
    }[name](t)
    b1 = jax.vmap(cycle.b1)(t) if name == "1cycle" else jnp.full(steps, 0.9)
    return [jnp.pad(x.astype(jnp.float32), (0, length - steps)) for x in (rate, b1)]


@jax.jit
def trained(keys, rate_table, b1_table, steps):
    """Held-out loss and error, (seeds, rates); one program for all schedules and budgets."""
    shown, held_out = digits()

    def one(key, rate):
        optimizer = adamw(lambda t: rate * rate_table[t], b1=lambda t: b1_table[t])
        params = train(
            optimizer, key, shown, steps, prepare=move, init=lambda k: mlp(k, (64, 64, 10))
        )
        return cross_entropy(params, *held_out), 1 - accuracy(params, *held_out)

    rates = jnp.asarray(RATES, jnp.float32)
    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, rates)


def steps_to(target, budgets, errors):
    """Where the error crosses the target, between budgets on logarithmic scales; NaN if nowhere."""
    x, y = np.log(budgets), np.log(errors)
    for i in range(len(x) - 1):
        if y[i] > np.log(target) >= y[i + 1]:
            return float(np.exp(np.interp(-np.log(target), -y[i : i + 2], x[i : i + 2])))
    return float("nan")


def measure(seeds: int, steps: int) -> dict:
    budgets = [b for b in BUDGETS if b <= steps] or [steps]
    keys = jax.random.split(jax.random.key(0), seeds)
    losses, rates, rows = {}, {}, []
    with progress(len(SCHEDULES) * len(budgets), "one_cycle") as bar:
        for name in SCHEDULES:
            best, at = [], []
            for budget in budgets:
                found = trained(keys, *tables(name, budget, budgets[-1]), budget)
                loss, error = (np.asarray(x, float) for x in found)
                i = int(np.nanargmin(loss.mean(0)))
                best.append(loss[:, i])
                at.append(RATES[i])
                bar.update()
            losses[name], rates[name] = np.array(best).T, at  # (seeds, budgets)
            rows.append(row(f"held-out loss after {budgets[-1]} steps, {name}", best[-1], "nats"))
            rows.append(
                row(f"held-out error after {budgets[-1]} steps, {name}", 100 * error[:, i], "%")
            )
    if len(budgets) > 1:
        target = losses["constant"][:, -1].mean()
        rows.append(row("target: the loss of constant at its largest budget", target, "nats"))
        for name in SCHEDULES[:3]:
            needed = steps_to(target, budgets, losses[name].mean(0))
            rows.append(row(f"steps to the target, {name}", needed))
            rows.append(row(f"fewer steps than constant, {name}", budgets[-1] / needed, "times"))
        for name in ("cosine", "1cycle, b1 constant"):
            difference = (losses["1cycle"] - losses[name])[:, -1]
            rows.append(
                row(f"1cycle minus {name}, {budgets[-1]} steps, paired", difference, "nats")
            )
    return {
        "settings": {
            "model": "MLP 64-64-10, batch 64, AdamW with its defaults",
            "data": "digits moved by up to a pixel and dimmed by up to a half",
            "rates": RATES,
        },
        "rows": rows,
        "budgets": budgets,
        "losses": losses,
        "best_rates": rates,
    }


def draw(found: dict):
    figure, (left, right) = subplots(
        "The schedule saves steps, 1cycle most; its cycle of the momentum adds nothing",
        1, 2, figsize=(9.4, 3.5), width_ratios=(1.25, 1),
    )  # fmt: skip
    x = np.array(found["budgets"])
    for index, (name, losses) in enumerate(found["losses"].items()):
        losses = np.array(losses)
        mean, sd = losses.mean(0), losses.std(0)
        left.plot(x, mean, marker="o", markersize=3, label=name, **look(index))
        left.fill_between(
            x, mean - sd, mean + sd, color=look(index)["color"], alpha=0.15, linewidth=0
        )
    left.set(
        xscale="log", yscale="log", xlabel="steps in all", ylabel="held-out loss (nats)",
        title="Each at its best learning rate",
    )  # fmt: skip
    left.set_xticks(x, x)
    left.set_yticks([0.1, 0.2, 0.5, 1.0], [0.1, 0.2, 0.5, 1.0])
    for axis in (left.xaxis, left.yaxis):
        axis.set_minor_locator(NullLocator())
    label_ends(left)
    rows = {r["what"]: r["mean"] for r in found["rows"]}
    for index, name in enumerate(SCHEDULES):
        steps = x[-1] if name == "constant" else rows.get(f"steps to the target, {name}")
        if steps is not None:  # it was reached
            right.barh(name, steps, color=look(index)["color"], height=0.6)
            right.text(steps + 0.015 * x[-1], name, f"{steps:.0f}", va="center")
    right.invert_yaxis()
    loss = np.mean(found["losses"]["constant"], axis=0)[-1]
    right.set(xlabel="steps in all", title=f"Steps to a loss of {loss:.2f}", xlim=(0, 1.15 * x[-1]))
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(8, "of weights and batches"), steps=(BUDGETS[-1], "the largest budget"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
