"""Records optimizers of matrices, over matrices: tall ones, wide ones.

    pip install -r tests/references/requirements.txt
    git clone https://github.com/KellerJordan/Muon
    git clone https://github.com/nikhilvyas/SOAP
    wget https://raw.githubusercontent.com/marin-community/marin/COMMIT/lib/levanter/src/levanter/optim/adamh.py
    python tests/references/record_matrices.py --checkouts . [muon soap adamh]

Like record.py, into ``matrices.npz`` and ``matrices.json``, with gradients of their own for each
shape and the parameters of every fiftieth step. What the codes calculate in bfloat16 or float32 is
calculated in float64 here: the casts are taken out while they run. The rows of methods that are not
named stay as they are.

SOAP's first basis is of one gradient: along an axis with fewer products than its length, the
eigenvectors of 0 are anybody's. So the shapes are such that there are enough, or that axis is off.

Of Levanter's AdamH ``scale_by_adamh`` is run, which needs no more than optax: the file's other
imports are stood in for. COMMIT is below.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import torch
from record import HERE, LR, STEPS, Row, commit, entry_of, installed, load, schedule

MARIN, MARIN_COMMIT = "marin-community/marin", "00843426942b191a6a4ccc10a399cb8aee4249c1"
JORDAN, VYAS, EVERY = "KellerJordan/Muon", "nikhilvyas/SOAP", 50
SHAPES = {"tall": (5, 3), "wide": (3, 5), "square": (4, 4), "cube": (2, 3, 4), "vector": (5,)}


def gradients(shape: tuple[int, ...]) -> np.ndarray:
    """A direction that stays, under noise whose size swells and fades."""
    rng = np.random.default_rng(20241208)
    t = np.arange(STEPS).reshape(-1, *(1 for _ in shape))
    size = 10 ** (-1 + 1.5 * np.sin(2 * np.pi * t / 150))
    return size * (rng.standard_normal(shape) + rng.standard_normal((STEPS, *shape)))


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    casts = {name: getattr(torch.Tensor, name) for name in ("bfloat16", "float")}
    torch.set_default_dtype(torch.float64)
    for name in casts:
        setattr(torch.Tensor, name, torch.Tensor.clone)  # the cast makes a copy
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        for name, cast in casts.items():
            setattr(torch.Tensor, name, cast)


def run(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[..., np.ndarray]:
    def path(g: np.ndarray, start: np.ndarray, factor: Callable[[int], float], reset: bool) -> Any:
        x = torch.nn.Parameter(torch.tensor(start))
        optimizer, rows = make(x), []
        base = optimizer.param_groups[0]["lr"]
        for t, gradient in enumerate(g):
            if reset:
                x.data.zero_()
            optimizer.param_groups[0]["lr"] = base * factor(t)
            x.grad = torch.tensor(gradient)
            with in_float64():
                optimizer.step()
            rows.append(x.detach().numpy().copy())
        return np.stack(rows)

    return path


def muon(checkouts: pathlib.Path) -> Iterator[Row]:
    authors = load(checkouts / "Muon/muon.py", "SingleDeviceMuonWithAuxAdam")
    both = {"defaults": {"momentum": 0.95}, "far": {"momentum": 0.8, "weight_decay": 0.1}}
    for label, h in both.items():
        ours = {"learning_rate": LR, "b1": h["momentum"], "layout": "out-in"}
        ours |= {"weight_decay": h["weight_decay"]} if "weight_decay" in h else {}

        def reference(x: Any, h: Any = h) -> torch.optim.Optimizer:
            return authors([{"params": [x], "lr": LR, "use_muon": True, **h}])

        def of_torch(x: Any, h: Any = h) -> torch.optim.Optimizer:
            given = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"} | h
            return torch.optim.Muon([x], lr=LR, nesterov="weight_decay" not in h, **given)

        for name, source, make, others in (
            ("reference", f"{JORDAN} SingleDeviceMuonWithAuxAdam", reference, {}),
            (
                "torch",
                "torch.optim.Muon",
                of_torch,
                {"convention": "torch", "shape": "rms", "nesterov": "weight_decay" not in h},
            ),
        ):
            for shape in SHAPES if label == "defaults" else ("wide",):
                row = f"muon-{name}-{label}-{shape}"
                yield Row(row, source, "muon", ours | others, run(make), label == "far")


def soap(checkouts: pathlib.Path) -> Iterator[Row]:
    authors = load(checkouts / "SOAP/soap.py", "SOAP")
    far = {"betas": (0.8, 0.9), "eps": 1e-3, "precondition_frequency": 3, "shampoo_beta": 0.7}
    sets = {
        "defaults-square": {},
        "defaults-cube": {},
        "defaults-vector": {},
        "uncorrected-square": {"correct_bias": False},
        "far-square": far,
        "far-cube": far | {"weight_decay": 0.1},
        "far-wide": far | {"max_precond_dim": 3, "weight_decay": 0.1},
        "decoupled-square": {"weight_decay": 0.1},
    }
    for label, h in sets.items():
        b1, b2 = h.get("betas", (0.95, 0.95))
        ours = {"learning_rate": LR} | {key: h[key] for key in h if key != "betas"}
        ours |= {"b1": b1, "b2": b2} if "betas" in h else {}
        if "weight_decay" in h and not label.startswith("decoupled"):
            ours["decay"] = "decoupled-after"

        def make(x: Any, h: Any = h, label: str = label) -> torch.optim.Optimizer:
            optimizer = authors([x], lr=LR, **({"weight_decay": 0.0} | h))
            return DecaysBefore(optimizer) if label.startswith("decoupled") else optimizer

        source = f"{VYAS} SOAP"
        if label.startswith("decoupled"):
            source += ", decayed before the step as by torch.optim.AdamW"
        yield Row(f"soap-{label}", source, "soap", ours, run(make), label.startswith("far"))


class DecaysBefore:
    """An optimizer whose decay is made as in ``torch.optim.AdamW``, and not by itself."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        (self.group,) = self.param_groups
        self.weight_decay, self.group["weight_decay"] = self.group["weight_decay"], 0.0

    def step(self) -> None:
        for x in self.group["params"]:
            x.data.mul_(1 - self.group["lr"] * self.weight_decay)
        self.optimizer.step()


def adamh(checkouts: pathlib.Path) -> Iterator[Row]:
    scale_by_adamh = of_levanter(checkouts / "adamh.py")
    far = {"b1": 0.8, "b2": 0.9, "eps": 1e-3}
    # An update is a small difference of points on the sphere: where a schedule begins, exact to
    # 1e-12 only at a learning rate that is not too small.
    sets = {"defaults": ({"b1": 0.9, "b2": 0.95, "eps": 1e-8}, LR), "far": (far, 10 * LR)}
    for label, (h, lr) in sets.items():

        def path(
            g: np.ndarray, start: np.ndarray, factor: Any, reset: bool, h: Any = h, lr: float = lr
        ) -> Any:
            x, rows, state = jnp.asarray(start), [], scale_by_adamh(**h).init(start)
            for t, gradient in enumerate(g):
                by = scale_by_adamh(learning_rate=lr * factor(t), **h)
                updates, state = by.update(gradient, state, x)
                x = x + updates
                rows.append(np.array(x))
            return np.stack(rows)

        ours = {"learning_rate": lr} | (h if label == "far" else {})
        for shape in ("tall", "square", "cube"):
            source, scheduled = f"{MARIN} scale_by_adamh", label == "far"
            yield Row(f"adamh-{label}-{shape}", source, "adamh", ours, path, scheduled)

    def of_the_rest(g: np.ndarray, start: np.ndarray, factor: Any, reset: bool) -> Any:
        reference, x, rows = optax.adamw(LR, **far, weight_decay=0.1), jnp.asarray(start), []
        state = reference.init(x)
        for gradient in g:
            updates, state = reference.update(gradient, state, x)
            x = x + updates
            rows.append(np.array(x))
        return np.stack(rows)

    ours = {"learning_rate": 1.0, "rest_learning_rate": LR, **far, "weight_decay": 0.1}
    yield Row("adamh-far-vector", "optax.adamw", "adamh", ours, of_the_rest)


def of_levanter(file: pathlib.Path) -> Any:
    """``scale_by_adamh`` of a file whose other imports are stood in for."""
    config = type("OptimizerConfig", (), {"register_subclass": lambda _: lambda made: made})
    for name, values in {
        "chex": {"Array": Any},
        "haliax.nn": {"Linear": None},
        "levanter.optim.config": {"OptimizerConfig": config},
        "levanter.utils.jax_utils": {"leaf_key_paths": None},
    }.items():
        sys.modules[name] = types.SimpleNamespace(**values)
    return load(file, "scale_by_adamh")


METHODS = {"muon": muon, "soap": soap, "adamh": adamh}
CHECKOUTS = {JORDAN: "Muon", VYAS: "SOAP"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}")
    given = parser.parse_args()
    checkouts, methods = given.checkouts, given.methods or [*METHODS]
    versions = (
        installed("torch", "optax")
        | {MARIN: MARIN_COMMIT}
        | {
            name: commit(checkouts / folder)
            for name, folder in CHECKOUTS.items()
            if (checkouts / folder).exists()
        }
    )
    with np.load(HERE / "matrices.npz") as stored:
        arrays = dict(stored)
    manifest = json.loads((HERE / "matrices.json").read_text())
    manifest = [row for row in manifest if row["recipe"] not in methods]
    for row in (row for name in methods for row in METHODS[name](checkouts)):
        kind = row.name.rsplit("-", 1)[1]
        shape = SHAPES[kind]
        g = gradients(shape)
        factor = schedule if row.scheduled else (lambda t: 1.0)
        moves = "weight_decay" in row.arguments or row.recipe == "adamh"  # depends on where it is
        start = np.linspace(-1e-4, 1e-4, g[0].size).reshape(shape) if moves else np.zeros(shape)
        parameters = row.run(g, start, factor, reset=False)
        steps = np.diff(np.concatenate([start[None], parameters]), axis=0)
        record = {
            "start": start,
            "parameters": parameters[EVERY - 1 :: EVERY],
            "updates": steps if moves else row.run(g, start, factor, reset=True),
        }
        arrays |= {f"gradients of {kind}": g}
        arrays |= {f"{row.name}/{key}": value for key, value in record.items()}
        entry = entry_of(row, versions, EVERY)
        manifest.append(entry | {"gradients": f"gradients of {kind}"})
    np.savez_compressed(HERE / "matrices.npz", **arrays)
    (HERE / "matrices.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(manifest)} rows")


if __name__ == "__main__":
    main()
