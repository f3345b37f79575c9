"""AdEMAMix's slow average against AdamW, on a small language model.

    python examples/gallery/slow_average.py

AdEMAMix adds alpha times an average of the gradients over 1/(1 - b3) steps; b3 and alpha grow over
the whole training, as published. Once with the paper's b3, .9999, which remembers more steps than
there are here, and once with .999.
"""

from __future__ import annotations

import numpy as np
from language import SETTINGS, compared, draw_sweep, held_out
from shared import progress, run, subplots

from adaptive_opt import adamw, ademamix

ALPHA = 8.0
RATES = 10 ** np.arange(-2.5, -0.4, 0.5)
LOWER = RATES / 10  # what is added to the update makes it up to 1 + alpha times as long


def measure(seeds: int, steps: int) -> dict:
    def mixed(b3):
        return lambda rate: ademamix(
            rate, 0.9, 0.999, b3=b3, alpha=ALPHA, b3_warmup=steps, alpha_warmup=steps
        )

    methods = {
        "AdamW": lambda rate: adamw(rate, 0.9, 0.999, weight_decay=0.0),
        "AdEMAMix, b3 .999": mixed(0.999),
        "AdEMAMix, b3 .9999": mixed(0.9999),
    }
    losses, rates = {}, {}
    with progress(len(methods), "slow_average") as bar:
        for name, make in methods.items():
            rates[name] = RATES if name == "AdamW" else LOWER
            losses[name] = held_out(make, rates[name], seeds, steps)[..., -1]
            bar.update()
    return {
        "settings": SETTINGS
        | {"schedule": "cosine", "alpha": ALPHA, "rates": "five, half a decade apart"},
        "rows": compared(losses, rates, "AdamW"),
        "rates": rates,
        "losses": losses,
    }


def draw(found: dict):
    figure, ax = subplots(
        "A slow average does not help a training of a thousand steps", figsize=(6.5, 3.4)
    )
    names = list(found["losses"])
    places = dict(zip(names, ((2, -14), (3, 14), (2, -14)), strict=True))
    draw_sweep(ax, found["rates"], found["losses"], places)
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(3, "of weights and batches"), steps=(1000, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
