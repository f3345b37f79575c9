"""Records modifiers of an update around the optimizers that their public codes have them in.

    pip install -r tests/references/requirements.txt magma-optimizer
    git clone https://github.com/kyleliang919/C-Optim
    git -C C-Optim checkout ccadd1847bf1f35ccb3ab296d71a117167bc2e99
    python tests/references/record_modifiers.py --checkouts .

Like record.py, into ``modifiers.npz`` and ``modifiers.json``, with the parameters of every fiftieth
step. A row says in ``modifiers`` what goes behind its recipe. Of C-Optim it is the last commit
before the code was written for several tensors at once. Magma is given the coins that ``magma``
tosses, and calculates what is left in float32 in float64.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import torch
from record import BOTH, HERE, LR, STEPS, Row, commit, installed, load, run_torch, save

NAME, EVERY = "modifiers", 50
Modifiers = dict[str, list[Any]]


def cautious(checkouts: pathlib.Path, modifiers: Modifiers) -> Iterator[Row]:
    versions = types.SimpleNamespace(require_version=lambda version: None)
    sys.modules["transformers.utils.versions"] = versions
    adamw = load(checkouts / "C-Optim/c_adamw.py", "AdamW")
    lion = load(checkouts / "C-Optim/c_lion.py", "Lion")
    for label, h in BOTH.items():
        betas = h["b1"], h["b2"]

        def of_adamw(p: Any, h: Any = h, betas: Any = betas) -> torch.optim.Optimizer:
            return adamw(p, LR, betas, h["eps"], no_deprecation_warning=True)

        def of_lion(p: Any, betas: Any = betas) -> torch.optim.Optimizer:
            return lion(p, LR, betas)

        source, name = "kyleliang919/C-Optim c_adamw.py AdamW", f"cautious-adam-{label}"
        ours = {"learning_rate": LR} | h | {"convention": "keras"}
        yield Row(name, source, "adam", ours, run_torch(of_adamw), label == "far")
        modifiers[name] = [["cautious", {}]]

        source, name = "kyleliang919/C-Optim c_lion.py Lion", f"cautious-lion-{label}"
        ours = {"learning_rate": LR, "b1": h["b1"], "b2": h["b2"]}
        yield Row(name, source, "lion", ours, run_torch(of_lion), label == "far")
        modifiers[name] = [["cautious", {"scale": "count"}]]


def magma(checkouts: pathlib.Path, modifiers: Modifiers) -> Iterator[Row]:
    from magma import Magma

    far = {"tau": 0.7, "keep": 0.7, "b1": 0.8, "decay": 0.5, "seed": 3}
    for label, settings in {"defaults": {}, "far": far}.items():
        h = BOTH[label] | ({"weight_decay": 1.0} if label == "far" else {"weight_decay": 0.0})

        def make(p: Any, h: Any = h, given: Any = settings) -> Any:
            adamw = torch.optim.AdamW(
                p, LR, (h["b1"], h["b2"]), h["eps"], h["weight_decay"], foreach=False
            )
            own = {"keep": "mask_prob", "b1": "momentum_beta", "decay": "alignment_ema"}
            theirs = {own.get(key, key): value for key, value in given.items() if key != "seed"}
            tossed = iter(coins(given.get("seed", 0), given.get("keep", 0.5)))
            torch.bernoulli = lambda _: torch.tensor(next(tossed))
            return Magma(adamw, **theirs)

        name = f"magma-adamw-{label}"
        row = Row(
            name,
            "magma-optimizer magma.Magma of torch.optim.AdamW",
            "adamw",
            {"learning_rate": LR} | h,
            in_float64(run_torch(make)),
            label == "far",
        )
        yield row
        modifiers[name] = [["magma", settings]]


def coins(seed: int, keep: float) -> list[float]:
    """Those of the first leaf."""
    key = jax.random.key(seed, impl="threefry2x32")
    keys = [jax.random.fold_in(jax.random.fold_in(key, t), 0) for t in range(1, STEPS + 1)]
    return [float(jax.random.uniform(own, dtype=np.float32) < keep) for own in keys]


def in_float64(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def path(*args: Any, **settings: Any) -> np.ndarray:
        torch.set_default_dtype(torch.float64)
        try:
            return run(*args, **settings)
        finally:
            torch.set_default_dtype(torch.float32)

    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    checkouts = parser.parse_args().checkouts
    modifiers: Modifiers = {}
    rows = [row for record in (cautious, magma) for row in record(checkouts, modifiers)]
    versions = installed("magma-optimizer")
    versions |= {"kyleliang919/C-Optim": commit(checkouts / "C-Optim")}
    save(NAME, iter(rows), versions, EVERY)
    manifest = json.loads((HERE / f"{NAME}.json").read_text())
    manifest = [row | {"modifiers": modifiers[row["name"]]} for row in manifest]
    (HERE / f"{NAME}.json").write_text(json.dumps(manifest, indent=1) + "\n")


if __name__ == "__main__":
    main()
