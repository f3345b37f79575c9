"""Caution behind AdamW and Lion, every form tuned for itself.

    python examples/gallery/cautious.py

A small language model (language.py): AdamW and Lion as they are, and with the cautious mask of
C-Optim, which lets a weight move only where the update agrees with the gradient.
"""

from __future__ import annotations

import numpy as np
from language import SETTINGS, compared, draw_sweep, held_out
from shared import progress, run, subplots

from adaptive_opt import adamw, behind, cautious, lion

RATES = {"AdamW": 10 ** np.arange(-2.5, -0.4, 0.5), "Lion": 10 ** np.arange(-3.5, -1.4, 0.5)}
PLAIN = {
    "AdamW": lambda rate: adamw(rate, 0.9, 0.95, weight_decay=0.0),
    "Lion": lambda rate: lion(rate, 0.9, 0.99),
}


def with_caution(make):
    return lambda rate: behind(make(rate), cautious())


METHODS = PLAIN | {f"cautious {name}": with_caution(make) for name, make in PLAIN.items()}


def measure(seeds: int, steps: int) -> dict:
    losses, rates = {}, {}
    with progress(len(METHODS), "cautious") as bar:
        for name, make in METHODS.items():
            rates[name] = RATES[name.removeprefix("cautious ")]
            losses[name] = held_out(make, rates[name], seeds, steps)[..., -1]
            bar.update()
    rows = []
    for plain in PLAIN:
        pair = {name: losses[name] for name in (plain, f"cautious {plain}")}
        rows += compared(pair, rates, plain)
    return {
        "settings": SETTINGS | {"schedule": "cosine", "rates": "five, half a decade apart"},
        "rows": rows,
        "rates": rates,
        "losses": losses,
    }


def draw(found: dict):
    figure, axes = subplots(
        "Caution helps Lion at every rate, AdamW only below its best", 1, 2, figsize=(8.5, 3.2)
    )
    for ax, plain in zip(axes, PLAIN, strict=True):
        places = {plain: (1, 14), f"cautious {plain}": (1, -16)}
        draw_sweep(ax, found["rates"], found["losses"], places)
    axes[1].set_ylabel("")
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(4, "of weights and batches"), steps=(600, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
