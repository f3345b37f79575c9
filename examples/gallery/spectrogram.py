"""Rate spectrograms: the learning rate of every weight, while a Transformer trains.

    python examples/gallery/spectrogram.py

The post-LN Transformer of warmup.py at learning rate .01, with Adam, AdaMod and AdaBound.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import progress, row, run
from warmup import BATCH, CONTEXT, initial, loss_of, text

from adaptive_opt import adabound, adam, adamod, telemetry
from adaptive_opt.watching.plots import Recorder, rate_spectrogram
from adaptive_opt.watching.tally import BIN_EDGES

RATE, EVERY = 1e-2, 12
LARGE = 1.0
RECIPES = {
    "Adam": adam,
    "AdaMod": functools.partial(adamod, b3=0.999),
    "AdaBound": functools.partial(adabound, final_learning_rate=0.1, gamma=1e-3),
}


def trained(recipe, seeds, steps, bar):
    """A recorder for every seed."""
    optimizer = recipe(RATE, observers=telemetry(every=EVERY))
    source = text()

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(carry, key, begin):
        def step(i, carry):
            params, state = carry
            draw = jax.random.fold_in(key, begin + i)
            starts = jax.random.randint(draw, (BATCH,), 0, len(source) - CONTEXT - 1)
            pieces = source[starts[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
            updates, state = optimizer.update(
                jax.grad(loss_of)(params, pieces, False), state, params
            )
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, EVERY, step, carry)

    recorders = []
    for seed in range(seeds):
        of_weights, of_batches = jax.random.split(jax.random.key(seed))
        params = initial(of_weights)
        carry, recorder = (params, optimizer.init(params)), Recorder()
        for begin in range(0, steps, EVERY):
            carry = advance(carry, of_batches, begin)
            recorder.record(carry[1])
        recorders.append(recorder)
        bar.update()
    return recorders


def measure(seeds: int, steps: int) -> dict:
    rows, kept = [], {}
    above = np.concatenate([[False], np.log10(LARGE) <= BIN_EDGES])
    with progress(len(RECIPES) * seeds, "spectrogram") as bar:
        for name, recipe in RECIPES.items():
            recorders = trained(recipe, seeds, steps, bar)
            large = np.array([100 * r.spectrogram()[:, above].sum(1) for r in recorders])
            last = recorders[0].steps[-1]
            rows.append(row(f"weights with a rate above 1, step 1, {name}", large[:, 0], "%"))
            rows.append(row(f"weights with a rate above 1, step {last}, {name}", large[:, -1], "%"))
            spread = [
                np.log10(r.rows[-1]["rate/all/q99"] / r.rows[-1]["rate/all/q01"]) for r in recorders
            ]
            rows.append(row(f"rates, 1 % to 99 %, step {last}, {name}", spread, "decades"))
            first = recorders[0]
            for key in first.rows[0]:
                if key.startswith("limited/"):
                    for i, step in ((0, 1), (-1, last)):
                        values = [100 * r.rows[i][key] for r in recorders]
                        rows.append(row(f"weights bounded, step {step}, {name}", values, "%"))
            kept[name] = {
                "steps": first.steps,
                "median": [r["rate/all/q50"] for r in first.rows],
                "histograms": first.spectrogram(),
            }
    return {
        "settings": {"model": "that of warmup.py, post-LN", "lr": RATE, "every": EVERY},
        "rows": rows,
        "seed_0": kept,
    }


def draw(found: dict):
    recorders = {}
    for name, kept in found["seed_0"].items():
        recorder = recorders[name] = Recorder()
        recorder.steps = kept["steps"]
        recorder.rows = [{"rate/all/q50": median} for median in kept["median"]]
        recorder.histograms = [{"all": np.array(h)} for h in kept["histograms"]]
    figure = rate_spectrogram(recorders)
    figure.set_size_inches(figure.get_figwidth(), 3.6)
    title = "AdaMod holds rates down early; later they are spread as widely as Adam's"
    figure.suptitle(title, x=0.01, ha="left", size="large", weight="bold")
    panels = dict(zip(recorders, figure.axes, strict=False))
    where = panels["AdaMod"].transAxes
    panels["AdaMod"].text(
        0.98, 0.94, "weights without gradients, towards lr / eps", transform=where, ha="right",
        size=8, color="#00457a",
    )  # fmt: skip
    steps, medians = (found["seed_0"]["Adam"][name] for name in ("steps", "median"))
    panels["Adam"].text(
        steps[-1], np.log10(medians[-1]) - 0.12, "median", ha="right", va="top", size=8
    )
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(3, "of weights and batches"), steps=(600, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
