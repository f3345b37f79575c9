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
from record import (
    BOTH,
    HERE,
    LR,
    STEPS,
    WEIGHTS,
    Row,
    commit,
    gradients,
    load,
    schedule,
    torch_options,
)
from record_family import wide

AUTHORS, EVERY = "facebookresearch/schedule_free", 50
THEIRS = {"weight_power": "weight_lr_power", "step_power": "r"}


def losses() -> np.ndarray:
    """Of three orders in units of the gradient: at times Polyak's rate is 0."""
    sizes = 10 ** np.random.default_rng(20260527).uniform(-1.5, 1.5, STEPS)
    return sizes * np.abs(gradients()).sum(axis=1)


def plain(optimizer: Any, t: int) -> None:
    optimizer.step()


def with_loss(optimizer: Any, t: int) -> None:
    optimizer.step_func(losses()[t])


def run(
    make: Callable[[list[Any]], torch.optim.Optimizer], step: Callable[[Any, int], None] = plain
) -> Callable[..., dict[str, np.ndarray]]:
    def path(g: np.ndarray, start: np.ndarray, factor: Callable[[int], float]) -> Any:
        y = torch.nn.Parameter(torch.tensor(start))
        optimizer = make([y])
        (group,) = optimizer.param_groups
        base, trained, averaged = group["lr"], [], []
        optimizer.train()
        for t, gradient in enumerate(g):
            group["lr"] = base * factor(t)
            y.grad = torch.tensor(gradient)
            step(optimizer, t)
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
    yield from plus(folder)


def plus(folder: pathlib.Path) -> Iterator[Row]:
    """With ``polyak_beta=0``: with another the code keeps the corrected norm as the average."""
    file, name = "adamc_schedulefree_plus_paper", "AdamCScheduleFreePlusPaper"
    optimizer = load(folder / f"{file}.py", name)
    defaults = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "inner_momentum": 0.9}
    far = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "inner_momentum": 0.5}
    far |= {"weight_power": 1.0, "step_power": 2.0, "averaging_start": 30}
    theirs = THEIRS | {"b1": "sf_beta1", "averaging_start": "c_warmup"}
    for label, h in {
        "defaults": defaults,
        "far": far,
        # Their learning rate is eps at least; this one's has no such floor.
        "far-decay-schedule": far | {"weight_decay": 20.0, "eps": 1e-8},
    }.items():

        def make(p: list[Any], h: Any = h) -> Any:
            own = {theirs.get(k, k): v for k, v in h.items() if k not in ("b2", "inner_momentum")}
            return optimizer(p, lr=LR, betas=(h["inner_momentum"], h["b2"]), **own)

        yield Row(
            f"schedule-free-plus-{label}",
            f"{AUTHORS} schedulefree/{file}.py {name}",
            "schedule_free_plus",
            {"learning_rate": LR} | h,
            run(make, with_loss),
            label.endswith("schedule"),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    checkouts = parser.parse_args().checkouts
    g = gradients()
    arrays, manifest = {"gradients": g, "losses": losses()}, []
    for row in rows(checkouts):
        # The decay of Schedule-Free+ is too small for such differences until something has moved.
        decays = "weight_decay" in row.arguments and row.recipe != "schedule_free_plus"
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
            | ({"losses": "losses"} if row.recipe == "schedule_free_plus" else {})
        )
    np.savez_compressed(HERE / "schedule_free.npz", **arrays)
    (HERE / "schedule_free.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(manifest)} rows")


if __name__ == "__main__":
    main()
