"""MARS's correction: how far its average is from the gradient of all data.

    python examples/gallery/mars_variance.py

A classifier of digits, trained by Adam. Along its way, averages of what MARS makes of the gradients
are compared with the gradient of the whole training set at the same weights: with the gradient
before calculated on today's batch (the method), and kept from the batch before (what the authors'
code does unless told otherwise, and what ``mars`` computes).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from shared import cross_entropy, darker, digits, look, mlp, progress, row, run, subplots

from adaptive_opt import adam

B1 = 0.95
GAMMAS = (0.025, 1.0)
BATCH = 64
RATES = (1e-4, 1e-3)
FORMS = {"plain": 0.0} | {
    f"{form}, gamma {gamma:g}": gamma
    for gamma in GAMMAS
    for form in ("today's batch", "the batch before")
}


def flattened(tree):
    return ravel_pytree(tree)[0]


@functools.partial(jax.jit, static_argnums=(2,))
def errors(key, rate, steps):
    """For every form and step, |average - gradient of all|^2 / |gradient of all|^2."""
    (x, y), _ = digits()
    of_weights, of_batches = jax.random.split(key)
    params = mlp(of_weights)
    optimizer = adam(rate)
    gradient = jax.grad(lambda p, i: cross_entropy(p, x[i], y[i]))
    zero = jnp.zeros_like(flattened(params))

    def step(carry, number):
        params, state, before, stale, averages = carry
        chosen = jax.random.randint(jax.random.fold_in(of_batches, number), (BATCH,), 0, len(x))
        tree = gradient(params, chosen)
        g, again = flattened(tree), flattened(gradient(before, chosen))
        stale = jnp.where(number == 0, g, stale)
        of_all = flattened(jax.grad(cross_entropy)(params, x, y))
        new, found = {}, {}
        for form, gamma in FORMS.items():
            old = again if form.startswith("today") else stale
            corrected = g + gamma * B1 / (1 - B1) * (g - old)
            new[form] = jnp.where(
                number == 0, corrected, B1 * averages[form] + (1 - B1) * corrected
            )
            found[form] = jnp.sum((new[form] - of_all) ** 2) / jnp.sum(of_all**2)
        updates, state = optimizer.update(tree, state, params)
        return (optax.apply_updates(params, updates), state, params, g, new), found

    start = (params, optimizer.init(params), params, zero, dict.fromkeys(FORMS, zero))
    return jax.lax.scan(step, start, jnp.arange(steps))[1]


def measure(seeds: int, steps: int) -> dict:
    keys = jax.random.split(jax.random.key(0), seeds)
    first = min(steps // 2, 100)
    rows, averages = [], {}
    with progress(len(RATES), "mars_variance") as bar:
        for rate in RATES:
            found = jax.vmap(lambda key, rate=rate: errors(key, rate, steps))(keys)
            found = {form: np.asarray(each)[:, first:].mean(1) for form, each in found.items()}
            averages[f"{rate:g}"] = found
            for form, each in found.items():
                rows.append(row(f"{form}, lr {rate:g}, squared error", each))
            for form, each in found.items():
                if form != "plain":
                    rows.append(row(f"{form} over plain, lr {rate:g}", each / found["plain"]))
            bar.update()
    return {
        "settings": {
            "model": "MLP 64-32-10 on digits, trained by Adam",
            "batch": BATCH,
            "b1": B1,
            "error": f"|average - gradient of all|^2 / |gradient of all|^2, mean from step {first}",
        },
        "rows": rows,
        "errors": averages,
    }


def draw(found: dict):
    figure, ax = subplots(
        "At its own gamma of 0.025 MARS hardly changes the error;\na gamma of 1 lowers it only"
        " with today's batch",
        figsize=(6.5, 3.0),
    )
    forms = [form for form in FORMS if form != "plain"]
    for number, (rate, errors_of) in enumerate(found["errors"].items()):
        colour = look(number)["color"]
        for place, form in enumerate(forms):
            ratios = np.array(errors_of[form]) / np.array(errors_of["plain"])
            at = place + 0.16 * (2 * number - 1)
            ax.plot(ratios, [at] * len(ratios), "os"[number], color=colour, alpha=0.5,
                    markeredgewidth=0)  # fmt: skip
            if not place:
                ax.annotate(f"lr {rate}", (max(ratios), at), (8, 0), textcoords="offset points",
                            color=darker(colour), va="center")  # fmt: skip
    ax.axvline(1, color="0.5", linewidth=0.8)
    ax.set_yticks(range(len(forms)), forms)
    ax.invert_yaxis()
    ax.set(xscale="log", xlabel="squared error of the average of gradients, without MARS = 1")
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(10, "of weights and batches"), steps=(600, "of the training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
