"""Records optimizers of matrices, over matrices: tall ones, wide ones.

    pip install -r tests/references/requirements.txt
    git clone https://github.com/KellerJordan/Muon
    git clone https://github.com/nikhilvyas/SOAP
    wget https://raw.githubusercontent.com/marin-community/marin/COMMIT/lib/levanter/src/levanter/optim/adamh.py
    pip install transformers
    git clone https://github.com/google-research/big_vision
    git clone https://github.com/zyushun/Adam-mini
    python tests/references/record_matrices.py --checkouts . [muon soap adamh adafactor adam_mini]

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
import transcribed
from optax._src import factorized
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


def run_transcribed(
    make: Callable[[], transcribed.Step], lr: float = LR
) -> Callable[..., np.ndarray]:
    def path(g: np.ndarray, start: np.ndarray, factor: Any, reset: bool) -> Any:
        step, x, rows = make(), start, []
        for t, gradient in enumerate(g):
            x = step(0 * x if reset else x, gradient, lr * factor(t))
            rows.append(x)
        return np.stack(rows)

    return path


def run_optax(make: Callable[[optax.Schedule], Any]) -> Callable[..., np.ndarray]:
    def path(g: np.ndarray, start: np.ndarray, factor: Any, reset: bool) -> Any:
        rates = jnp.asarray([LR * factor(t) for t in range(STEPS)])
        optimizer, x, rows = make(lambda count: rates[count]), jnp.asarray(start), []
        state = optimizer.init(x)
        for gradient in g:
            x = 0 * x if reset else x
            updates, state = optimizer.update(jnp.asarray(gradient), state, x)
            x = x + updates
            rows.append(np.array(x))
        return np.stack(rows)

    return path


WARMUP = {"schedule": "relative_step", "warmup": 1e-6}
JNP_IN_FLOAT64 = types.SimpleNamespace(**{**vars(jnp), "float32": jnp.float64})
"""For a module that calculates a decay in float32, whatever the parameters are."""


def adafactor(checkouts: pathlib.Path) -> Iterator[Row]:
    from transformers.optimization import Adafactor

    sys.modules |= {name: types.ModuleType(name) for name in ("big_vision", "big_vision.utils")}
    factorized.jnp = JNP_IN_FLOAT64
    big_vision = load(checkouts / "big_vision/big_vision/optax.py", "scale_by_adafactor")
    big_vision.__globals__["jnp"] = JNP_IN_FLOAT64
    small, far = {"min_dim_size_to_factor": 1}, {"b1": 0.8, "decay_rate": 0.6, "eps": 1e-3}
    far |= {"threshold": 1.5, "eps_scale": 0.5}

    def row(name: str, source: str, path: Any, h: dict[str, Any]) -> Row:
        lr = {} if "learning_rate" in h else {"learning_rate": LR}
        return Row(f"adafactor-{name}", source, "adafactor", lr | small | h, path, "far" in name)

    def of_optax(lr: Any, h: dict[str, Any], decay: float | None = None) -> Any:
        return optax.adafactor(
            lr, 1, h.get("decay_rate", 0.8), clipping_threshold=h.get("threshold", 1.0),
            momentum=h.get("b1"), dtype_momentum=jnp.float64, weight_decay_rate=decay,
            eps=h.get("eps", 1e-30),
        )  # fmt: skip

    for shape in SHAPES:
        path = run_optax(lambda lr: of_optax(lr, {}))
        yield row(f"optax-defaults-{shape}", "optax.adafactor", path, {})
    far_of_optax = {key: far[key] for key in far if key != "eps_scale"}
    decays = {"weight_decay": 0.01, "decay": "constant"}
    path = run_optax(lambda lr: of_optax(lr, far_of_optax, 0.01))
    yield row("optax-far-wide", "optax.adafactor", path, far_of_optax | decays)

    source = "tensorflow/mesh AdafactorOptimizer, transcribed"
    for shape in ("tall", "vector"):
        path = run_transcribed(lambda: transcribed.adafactor(0.0, 0.8, 1e-30, 1e-3, 1.0))
        yield row(f"mesh-defaults-{shape}", source, path, {})
    path = run_transcribed(lambda: transcribed.adafactor(0.8, 0.6, 1e-3, 0.5, 1.5), 10 * LR)
    yield row("mesh-far-cube", source, path, far | {"learning_rate": 10 * LR})

    source = "transformers.optimization.Adafactor"
    own = run_relative(lambda x: Adafactor([x]))
    warm = run_relative(lambda x: Adafactor([x], warmup_init=True))
    for shape in ("tall", "cube"):
        h = {"learning_rate": {"schedule": "relative_step"}, "axes": "last"}
        yield row(f"transformers-defaults-{shape}", source, own, h)
    h = {"learning_rate": WARMUP, "axes": "last"}
    yield row("transformers-warmup-wide", source, warm, h)
    off = {"relative_step": False, "scale_parameter": False, "weight_decay": 0.1}
    theirs = {"eps": (1e-3, 0.5), "clip_threshold": 1.5, "decay_rate": -0.6, "beta1": 0.8}
    h = far | {"axes": "last", "multiply_by_parameter_scale": False, "weight_decay": 0.1}
    path = run(lambda x: Adafactor([x], lr=LR, **off, **theirs))
    yield row("transformers-far-wide", source, path, h)

    source = "google-research/big_vision scale_by_adafactor"

    def of_big_vision(lr: Any, decay: float = 0.0, **h: Any) -> Any:
        scaled = big_vision(1, dtype_momentum=jnp.float64, **h)
        return optax.chain(
            scaled, optax.add_decayed_weights(decay), optax.scale_by_learning_rate(lr)
        )

    ours = {"convention": "big_vision"}
    for shape in ("tall", "cube"):
        path = run_optax(of_big_vision)
        yield row(f"big_vision-defaults-{shape}", source, path, ours)
    theirs = {"decay_rate": 0.6, "beta2_cap": 0.9, "clipping_threshold": 0.5, "momentum": 0.8}
    h = {"decay_rate": 0.6, "largest_b2": 0.9, "threshold": 0.5, "b1": 0.8, "weight_decay": 0.1}
    path = run_optax(lambda lr: of_big_vision(lr, 0.1, eps=1e-3, **theirs))
    yield row("big_vision-far-wide", source, path, ours | h | {"eps": 1e-3})


def run_relative(make: Callable[[Any], torch.optim.Optimizer]) -> Callable[..., np.ndarray]:
    """run for an optimizer that knows its learning rate itself."""

    def path(g: np.ndarray, start: np.ndarray, factor: Any, reset: bool) -> Any:
        x = torch.nn.Parameter(torch.tensor(start))
        optimizer, rows = make(x), []
        for gradient in g:
            x.grad = torch.tensor(gradient)
            optimizer.step()
            rows.append(x.detach().numpy().copy())
        return np.stack(rows)

    return path


def adam_mini(checkouts: pathlib.Path) -> Iterator[Row]:
    authors = load(checkouts / "Adam-mini/adam_mini/adam_mini.py", "Adam_mini")
    of_heads = {"blocks": "head", "head_size": 2}
    names = {
        "mlp.bias-vector": {"blocks": "weight"},
        "mlp.weight-tall": {"blocks": "row"},
        "wte.weight-wide": {"blocks": "row"},
        "q_proj.weight-square": of_heads,
        "norm.weight-vector": {"blocks": "tensor"},
        "gate-cube": {"blocks": "tensor"},
    }
    far = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "weight_decay": 0.1}
    for label, h in {"defaults": {}, "far": far}.items():
        for name, ours in names.items():
            if label == "far" and ("bias" in name or "norm" in name):  # which never decay
                continue

            def make(x: Any, name: str = name, h: dict[str, float] = h) -> torch.optim.Optimizer:
                theirs = {key: h[key] for key in ("eps", "weight_decay") if key in h}
                betas = h.get("b1", 0.9), h.get("b2", 0.999)
                named = [(name.rsplit("-", 1)[0], x)]
                return authors(named, LR, betas, **theirs, dim=4, n_heads=2, verbose=False)

            ours = {"learning_rate": LR, "layout": "out-in"} | ours | h
            source = "zyushun/Adam-mini Adam_mini"
            yield Row(
                f"adam_mini-{label}-{name}", source, "adam_mini", ours, run(make), label == "far"
            )


METHODS = {
    "muon": muon,
    "soap": soap,
    "adamh": adamh,
    "adafactor": adafactor,
    "adam_mini": adam_mini,
}
CHECKOUTS = {
    JORDAN: "Muon",
    VYAS: "SOAP",
    "google-research/big_vision": "big_vision",
    "zyushun/Adam-mini": "Adam-mini",
}


def size_of_start(row: Row) -> float:
    """0 where an update does not depend on the parameters; small where it is a small difference."""
    given = row.arguments
    if row.recipe == "adafactor" and given.get("convention") != "big_vision":
        if given["learning_rate"] == WARMUP:
            return 1e-9
        if given.get("multiply_by_parameter_scale", True):
            return 1.0  # a step has a part of the length of the weights
    return 1e-4 if "weight_decay" in given or row.recipe == "adamh" else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}")
    given = parser.parse_args()
    checkouts, methods = given.checkouts, given.methods or [*METHODS]
    versions = (
        installed("torch", "optax")
        | transcribed.COMMITS
        | (installed("transformers") if "adafactor" in methods else {})
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
        size = size_of_start(row)
        start = np.linspace(-size, size, g[0].size).reshape(shape)
        moves = size > 0  # depends on where it is
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
