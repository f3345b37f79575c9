"""Muon and SOAP against AdamW: by step, and by second.

    python examples/gallery/matrices.py

A small language model (language.py). Muon treats the matrices of the layers and leaves the rest to
AdamW at the same learning rate; SOAP renews its bases every ten steps. The time of a step is that
of the whole training step of one model, the methods in turn on the same machine; in that time AdamW
takes more steps, and is trained anew with a cosine of that length.
"""

from __future__ import annotations

import statistics
import time

import jax
import numpy as np
import optax
from language import SETTINGS, batch_of, best, compared, held_out, initial, is_matrix, loss
from shared import look, progress, row, run, subplots
from warmup import text

from adaptive_opt import adamw, muon, soap, train_step

ROUNDS, TIMED = 7, 50
RATES = 10 ** np.arange(-2.5, -0.4, 0.5)
METHODS = {
    "AdamW": lambda rate: adamw(rate, 0.9, 0.95, weight_decay=0.0),
    "Muon": lambda rate: muon(
        rate, matrices=is_matrix, shape="rms", rest_learning_rate=rate, rest_eps=1e-8
    ),
    "SOAP": lambda rate: soap(rate),
}


def times_of_a_step() -> dict[str, float]:
    """The median over rounds of the mean of some steps, in seconds; the methods take turns."""
    pieces = batch_of(text(), jax.random.key(0))
    running = {}
    for name, make in METHODS.items():
        optimizer = make(optax.constant_schedule(1e-3))
        step = train_step(loss, optimizer)
        params = initial(jax.random.key(0))
        running[name] = step, (params, optimizer.init(params))
    taken = {name: [] for name in METHODS}
    for number in range(ROUNDS + 1):  # the first compiles
        for name, (step, (params, state)) in running.items():
            start = time.perf_counter()
            for _ in range(TIMED):
                params, state, value = step(params, state, pieces)
            jax.block_until_ready((params, value))
            running[name] = step, (params, state)
            if number:
                taken[name].append((time.perf_counter() - start) / TIMED)
    return {name: statistics.median(each) for name, each in taken.items()}


def measure(seeds: int, steps: int) -> dict:
    seconds = times_of_a_step()
    losses, chosen = {}, {}
    with progress(2 * len(METHODS) - 1, "matrices") as bar:
        for name, make in METHODS.items():
            losses[name] = held_out(make, RATES, seeds, steps)[..., -1]
            chosen[name] = best(losses[name])
            bar.update()
        rows = compared(losses, dict.fromkeys(METHODS, RATES), "AdamW")
        near = RATES[max(0, chosen["AdamW"] - 1) : chosen["AdamW"] + 2]
        at_best = {name: found[:, chosen[name]] for name, found in losses.items()}
        in_time = {}
        for name in METHODS:
            ratio = seconds[name] / seconds["AdamW"]
            rows.append(row(f"{name}, time of a step, AdamW = 1", ratio))
            if name != "AdamW":
                found = held_out(METHODS["AdamW"], near, seeds, round(steps * ratio))[..., -1]
                in_time[name] = found[:, best(found)]
                rows.append(row(f"AdamW for as long as {name}, loss", in_time[name], "nats"))
                difference = at_best[name] - in_time[name]
                rows.append(row(f"{name} minus AdamW for as long", difference, "nats"))
                bar.update()
    return {
        "settings": SETTINGS | {"schedule": "cosine", "rates": "the same five for each"},
        "rows": rows,
        "rates": RATES,
        "losses": losses,
        "at_best": at_best,
        "in_time": in_time,
        "seconds": seconds,
    }


def draw(found: dict):
    figure, ax = subplots(
        "Step for step Muon and SOAP are ahead; second for second SOAP is not", figsize=(6.5, 2.6)
    )
    steps = found["settings"]["steps"]
    lines = {f"{name}, {steps} steps": each for name, each in found["at_best"].items()}
    for name, each in found["in_time"].items():
        ratio = found["seconds"][name] / found["seconds"]["AdamW"]
        lines[f"AdamW, as long as {name}: {round(steps * ratio)} steps"] = each
    for place, (name, each) in enumerate(lines.items()):
        colour = look(list(METHODS).index(name.split(",")[0]))["color"]
        ax.plot(each, [place] * len(each), "o", color=colour, alpha=0.5, markeredgewidth=0)
        ax.plot([np.mean(each)], [place], "|", color=colour, markersize=16, markeredgewidth=2)
    ax.set_yticks(range(len(lines)), list(lines))
    ax.set_ylim(len(lines) - 0.5, -0.5)
    ax.set(xlabel="held-out loss (nats per character), every seed and the mean")
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(3, "of weights and batches"), steps=(600, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
