"""Schedule-Free AdamW, trained once, against cosines that know when they end.

    python examples/gallery/schedule_free.py

A small language model (language.py). AdamW with a cosine is trained anew for every length, and
tuned for each; Schedule-Free AdamW, and AdamW at a constant rate, once for the longest, at the rate
that is best there, and looked at on their way.
"""

from __future__ import annotations

import numpy as np
from language import SETTINGS, best, held_out
from shared import band, darker, look, progress, row, run, subplots

from adaptive_opt import adamw, schedule_free_adamw

MARKS = 8
LENGTHS = (1, 2, 4, 8)  # eighths of the longest
RATES = 10 ** np.arange(-2.5, -0.4, 0.5)


def adam(rate):
    return adamw(rate, 0.9, 0.95, weight_decay=0.0)


def free(rate):
    return schedule_free_adamw(rate, 0.9, 0.95)


def measure(seeds: int, steps: int) -> dict:
    steps -= steps % MARKS
    lengths = [steps * part // MARKS for part in LENGTHS]
    once = {"Schedule-Free AdamW": free, "AdamW, constant": adam}
    rows, curves, losses = [], {}, {}
    with progress(len(lengths) + len(once), "schedule_free") as bar:
        cosine = []
        for length in lengths:
            found = held_out(adam, RATES, seeds, length)[..., -1]
            cosine.append(found[:, best(found)])
            losses[f"AdamW, cosine of {length} steps"] = found
            bar.update()
        for name, make in once.items():
            found = held_out(make, RATES, seeds, steps, "constant", MARKS)
            losses[name] = found[..., -1]
            chosen = best(found[..., -1])
            curves[name] = found[:, chosen]
            rows.append(row(f"{name}, best learning rate", RATES[chosen]))
            bar.update()
    for part, length, loss in zip(LENGTHS, lengths, cosine, strict=True):
        rows.append(row(f"AdamW, cosine of {length} steps, held-out loss", loss, "nats"))
        for name, curve in curves.items():
            at = curve[:, part - 1]
            rows.append(row(f"{name} after {length} steps minus that cosine", at - loss, "nats"))
    return {
        "settings": SETTINGS | {"rates": "five, half a decade apart, for every length"},
        "rows": rows,
        "rates": RATES,
        "lengths": lengths,
        "cosine": cosine,
        "curves": curves,
        "losses": losses,
    }


def draw(found: dict):
    figure, ax = subplots(
        "Schedule-Free, trained once, is ahead of cosines tuned for their length",
        figsize=(6.5, 3.4),
    )
    lengths = np.array(found["lengths"])
    every = lengths[-1] // MARKS
    for number, (name, curves) in enumerate(found["curves"].items()):
        curves = np.array(curves, float)
        x, mean, sd = every * np.arange(1, MARKS + 1), curves.mean(0), curves.std(0)
        band(ax, x, mean, sd, number)
        ax.annotate(
            name, (x[4], mean[4]), (20, 16) if number else (-20, -16), textcoords="offset points",
            color=darker(look(number)["color"]), ha="center", va="center",
        )  # fmt: skip
    cosine = np.array(found["cosine"], float)
    ax.errorbar(
        lengths, cosine.mean(1), cosine.std(1), color="black", marker="s", linestyle="none",
        markersize=4, capsize=2,
    )  # fmt: skip
    ax.annotate(
        "cosines, each trained\nand tuned for its length", (lengths[1], cosine[1].mean()),
        (8, 8), textcoords="offset points",
    )  # fmt: skip
    ax.set(xlabel="steps", ylabel="held-out loss (nats per character)")
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(3, "of weights and batches"), steps=(800, "of the longest training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
