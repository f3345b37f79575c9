"""Records the Schedule-Free methods of their authors, and the parameters of their evaluation mode.

    pip install -r tests/references/requirements.txt
    git clone https://github.com/facebookresearch/schedule_free
    python tests/references/record_schedule_free.py --checkouts .

Like record.py, into ``schedule_free.npz`` and ``schedule_free.json``, with the parameters of every
fiftieth step, in training (``parameters``, y) and as ``eval()`` makes them (``evaluation``, x).
Every update is a difference of parameters: what is trained is part of the state, and cannot be put
back. (The decay is large enough for the differences to be exact.)
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from record import BOTH, HERE, LR, WEIGHTS, Row, commit, gradients, load, schedule, torch_options
from record_family import wide

AUTHORS, EVERY = "facebookresearch/schedule_free", 50
THEIRS = {"weight_power": "weight_lr_power", "step_power": "r"}


def run(make: Callable[[list[Any]], torch.optim.Optimizer]) -> Callable[..., dict[str, np.ndarray]]:
    def path(g: np.ndarray, start: np.ndarray, factor: Callable[[int], float]) -> Any:
        y = torch.nn.Parameter(torch.tensor(start))
        optimizer = make([y])
        (group,) = optimizer.param_groups
        base, trained, averaged = group["lr"], [], []
        optimizer.train()
        for t, gradient in enumerate(g):
            group["lr"] = base * factor(t)
            y.grad = torch.tensor(gradient)
            optimizer.step()
            trained.append(y.detach().numpy().copy())
            optimizer.eval()
            averaged.append(y.detach().numpy().copy())
            y.data.copy_(torch.tensor(trained[-1]))  # and not train(), which rounds
            group["train_mode"] = True
        return {"parameters": np.stack(trained), "evaluation": np.stack(averaged)}

    return path


def rows(checkouts: pathlib.Path) -> Iterator[Row]:
    folder = checkouts / "schedule_free/schedulefree"
    far = BOTH["far"] | {"weight_power": 1.0, "step_power": 2.0}
    sgd = ({"b1": 0.9}, {k: v for k, v in far.items() if k not in ("b2", "eps")})
    by_method = {
        "sgd": (*sgd, {"warmup_steps": 20}, {"weight_decay": 10.0}),
        "adamw": (
            BOTH["defaults"],
            far,
            {"warmup_steps": 20, "inner_momentum": 0.8},
            {"weight_decay": 1.0},
        ),
        "radam": (BOTH["defaults"], far, {"silent_sgd_phase": False}, {"weight_decay": 1.0}),
    }
    names = {"sgd": "SGD", "adamw": "AdamW", "radam": "RAdam"}
    for method, (defaults, far_set, more, decay) in by_method.items():
        file, name = f"{method}_schedulefree", f"{names[method]}ScheduleFree"
        optimizer = load(folder / f"{file}.py", name)
        for label, h in {
            "defaults": defaults,
            "far": far_set,
            "more": defaults | more,
            "far-decay-schedule": far_set | decay,
        }.items():

            def make(p: list[Any], h: Any = h, optimizer: Any = optimizer) -> Any:
                own = {THEIRS.get(k, k): v for k, v in h.items() if k not in ("b1", "b2", "eps")}
                if "b2" not in h:
                    return optimizer(p, lr=LR, momentum=h["b1"], **own)
                scalars = wide(h) if "RAdam" in optimizer.__name__ else h
                return optimizer(p, **torch_options(scalars), **own)

            yield Row(
                f"schedule-free-{method}-{label}",
                f"{AUTHORS} schedulefree/{file}.py {name}",
                f"schedule_free_{method}",
                {"learning_rate": LR} | h,
                run(make),
                label.endswith("schedule"),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    checkouts = parser.parse_args().checkouts
    g = gradients()
    arrays, manifest = {"gradients": g}, []
    for row in rows(checkouts):
        decays = "weight_decay" in row.arguments
        start = np.linspace(-1e-4, 1e-4, WEIGHTS) if decays else np.zeros(WEIGHTS)
        record = row.run(g, start, schedule if row.scheduled else (lambda t: 1.0))
        updates = np.diff(np.concatenate([start[None], record["parameters"]]), axis=0)
        record = {name: values[EVERY - 1 :: EVERY] for name, values in record.items()}
        record |= {"start": start, "updates": updates}
        assert all(np.isfinite(value).all() for value in record.values()), row.name
        arrays |= {f"{row.name}/{key}": value for key, value in record.items()}
        known = dataclasses.asdict(row)
        manifest.append(
            {name: known[name] for name in ("name", "source", "recipe", "arguments", "scheduled")}
            | {"version": commit(checkouts / "schedule_free"), "parameters_every": EVERY}
        )
    np.savez_compressed(HERE / "schedule_free.npz", **arrays)
    (HERE / "schedule_free.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(manifest)} rows")


if __name__ == "__main__":
    main()
