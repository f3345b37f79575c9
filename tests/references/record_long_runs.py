"""Records how far PyTorch's float32 is from the rules in long double after 100,000 steps.

    pip install -r tests/references/requirements.txt
    python tests/references/record_long_runs.py

Into ``long_runs.json``: for each rule of tests/rules.py the public implementation, its version, and
its error in float32 (the median of 128 weights): of the parameters of every hundredth step, and of
the first 10,000 updates, made from parameters of zero.
"""

from __future__ import annotations

import importlib.metadata
import json
import pathlib
import sys
from typing import Any

import numpy as np
import pytorch_optimizer
import torch
import torch_optimizer

HERE = pathlib.Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from rules import RULES, error, gradients, path_of, updates_of

STEPS, WEIGHTS, EVERY, FIRST = 100_000, 128, 100, 10_000
optim = torch.optim
LOOP: dict[str, Any] = {"foreach": False}
THEIRS = {
    "adam": ("torch.optim.Adam", lambda p: optim.Adam(p, **LOOP)),
    "adamw": ("torch.optim.AdamW", lambda p: optim.AdamW(p, **LOOP)),
    "amsgrad": ("torch.optim.Adam(amsgrad=True)", lambda p: optim.Adam(p, amsgrad=True, **LOOP)),
    "adamod": ("torch_optimizer.AdaMod", torch_optimizer.AdaMod),
    "diffgrad": ("torch_optimizer.DiffGrad", torch_optimizer.DiffGrad),
    "nadam": ("torch.optim.NAdam", lambda p: optim.NAdam(p, lr=1e-3, **LOOP)),
    "radam": ("torch.optim.RAdam", lambda p: optim.RAdam(p, **LOOP)),
    "lion": ("pytorch_optimizer.Lion", lambda p: pytorch_optimizer.Lion(p, **LOOP)),
}


def run(make: Any, given: np.ndarray, start: float, every: int = 1) -> np.ndarray:
    """The parameters after every so many steps; from 0 each step is made from there."""
    x = torch.nn.Parameter(torch.full(given.shape[1:], start))
    optimizer, path = make([x]), []
    for t, g in enumerate(torch.tensor(given), 1):
        if not start:
            x.data.zero_()
        x.grad = g.clone()
        optimizer.step()
        if t % every == 0:
            path.append(x.detach().numpy().copy())
    return np.stack(path)


def main() -> None:
    torch.set_num_threads(1)
    given, errors = gradients(STEPS, WEIGHTS).astype(np.float32), {}
    for name, (source, make) in THEIRS.items():
        path = path_of(RULES[name](), given, 1.0, EVERY)
        updates = updates_of(RULES[name](), given[:FIRST])
        errors[name] = {
            "source": source,
            "version": importlib.metadata.version(source.partition(".")[0]),
            "parameters": error(run(make, given, 1.0, EVERY), path),
            "updates": error(run(make, given[:FIRST], 0.0), updates),
        }
        print(name, errors[name], flush=True)
    sizes = {"steps": STEPS, "weights": WEIGHTS, "every": EVERY, "first": FIRST}
    (HERE / "long_runs.json").write_text(json.dumps(sizes | {"errors": errors}, indent=1) + "\n")


if __name__ == "__main__":
    main()
