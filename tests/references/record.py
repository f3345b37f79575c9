"""Records what public implementations compute, in float64, for the tests to compare with.

    pip install -r tests/references/requirements.txt
    git clone https://github.com/lessw2020/Best-Deep-Learning-Optimizers lessw2020
    git clone https://github.com/shivram1987/diffGrad shivram1987
    python tests/references/record.py --lessw2020 lessw2020 --shivram1987 shivram1987

Every row is one public implementation with one set of hyperparameters, run over the same gradients.
Written are ``core.npz`` (the gradients and, for each row, the parameters after each step and each
single update) and ``core.json`` (for each row: the implementation, its version or commit, and the
recipe and arguments of this library that must reproduce it).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import pathlib
import subprocess
import warnings
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
import jax

jax.config.update("jax_enable_x64", True)
import jax.numpy as jnp
import keras
import numpy as np
import optax
import torch
import torch_optimizer
from adamod import AdaMod

STEPS, WEIGHTS = 300, 5
HERE = pathlib.Path(__file__).parent
LR = 0.01
BOTH = {
    "defaults": {"b1": 0.9, "b2": 0.999, "eps": 1e-8},
    "far": {"b1": 0.8, "b2": 0.9, "eps": 1e-3},
}
LESSW, SHIVRAM = "lessw2020/Best-Deep-Learning-Optimizers", "shivram1987/diffGrad"


def gradients() -> np.ndarray:
    """Five weights with five kinds of gradients; magnitudes from 1e-6 to 1e3."""
    rng = np.random.default_rng(20191028)
    t = np.arange(STEPS)
    swell = rng.standard_normal(STEPS) * 10 ** (-1.5 + 4.5 * np.sin(2 * np.pi * t / 150))
    flips = (-1.0) ** t * 10 ** rng.uniform(-6, 3, STEPS)
    sparse = np.where(rng.random(STEPS) < 0.3, rng.standard_normal(STEPS), 0.0)
    late = np.where(t < 40, 0.0, 1e-6 * rng.standard_normal(STEPS))
    late[250:260] = 1e3 * rng.standard_normal(10)
    fading = 10 ** (3 - 9 * t / (STEPS - 1)) * np.where(t // 60 % 2, -1.0, 1.0)
    return np.stack([swell, flips, sparse, late, fading], axis=1)


def schedule(t: int) -> float:
    """A warm-up of 40 steps, then a cosine to zero; a multiplier."""
    return min(1.0, (t + 1) / 40) * 0.5 * (1 + math.cos(math.pi * t / STEPS))


@dataclasses.dataclass
class Row:
    """One implementation with one set of hyperparameters, and the recipe that must equal it."""

    name: str
    source: str
    recipe: str
    arguments: dict[str, Any]
    run: Callable[[np.ndarray, np.ndarray, Callable[[int], float]], np.ndarray]
    """``(gradients, start, multiplier of the learning rate) -> parameters after every step``."""
    scheduled: bool = False
    size: float = 1e-4
    """Of the weights at the start, where something decays."""
    shape: tuple[int, ...] | None = None
    """Of the weights, for what treats matrices otherwise; default: a vector."""

    def record(self, g: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters from zero where nothing decays, and each update from where it was made.

        With decay the update is a difference of parameters; a small start keeps that exact enough.
        """
        decays = bool(self.arguments.get("weight_decay"))
        start = np.linspace(-self.size, self.size, WEIGHTS) if decays else np.zeros(WEIGHTS)
        factor = schedule if self.scheduled else (lambda t: 1.0)
        parameters = self.run(g, start, factor, reset=False)
        if isinstance(parameters, tuple):  # it says its updates apart
            parameters, updates = parameters
        elif decays:
            updates = np.diff(np.concatenate([start[None], parameters]), axis=0)
        else:  # put back to zero before every step, the parameters are the updates, unrounded
            updates = self.run(g, start, factor, reset=True)
        double = {"parameters": parameters, "updates": updates}  # perhaps made in more
        return {"start": start} | {key: x.astype(np.float64) for key, x in double.items()}


def run_torch(make: Callable[[list[Any]], torch.optim.Optimizer]) -> Callable[..., np.ndarray]:
    def run(g, start, factor, reset):
        x = torch.nn.Parameter(torch.tensor(start))
        optimizer = make([x])
        base = optimizer.param_groups[0]["lr"]
        path = []
        for t, row in enumerate(g):
            if reset:
                x.data.zero_()
            optimizer.param_groups[0]["lr"] = base * factor(t)
            x.grad = torch.tensor(row)  # a new tensor, as after zero_grad(set_to_none=True)
            optimizer.step()
            path.append(x.detach().numpy().copy())
        return np.stack(path)

    return run


def run_keras(make: Callable[[], keras.optimizers.Optimizer]) -> Callable[..., np.ndarray]:
    def run(g, start, factor, reset):
        keras.config.set_floatx("float64")
        x = keras.Variable(start, dtype="float64")
        optimizer = make()
        base = float(optimizer.learning_rate.numpy())
        optimizer.build([x])
        path = []
        for t, row in enumerate(g):
            if reset:
                x.assign(np.zeros(WEIGHTS))
            optimizer.learning_rate = base * factor(t)
            optimizer.apply([torch.tensor(row)])
            path.append(keras.ops.convert_to_numpy(x).copy())
        return np.stack(path)

    return run


def run_optax(make: Callable[[optax.Schedule], Any]) -> Callable[..., np.ndarray]:
    def run(g, start, factor, reset):
        rates = jnp.asarray([LR * factor(t) for t in range(STEPS)])
        optimizer = make(lambda count: rates[count])
        x = jnp.asarray(start)
        state = optimizer.init(x)
        path = []
        for row in g:
            x = jnp.zeros(WEIGHTS) if reset else x
            updates, state = optimizer.update(jnp.asarray(row), state, x)
            x = optax.apply_updates(x, updates)
            path.append(np.asarray(x))
        return np.stack(path)

    return run


def adamod_paper(lr: optax.Schedule, b1: float, b2: float, b3: float, eps: float) -> Any:
    """AdaMod's update, before its sign, as its paper lists it: put together from optax's parts."""

    def init(params):
        zeros = jnp.zeros_like(params)
        return {"t": 0, "m": zeros, "v": zeros, "s": zeros}

    def update(g, state, params=None):
        t = state["t"] + 1
        m = optax.tree.update_moment(g, state["m"], b1, 1)
        v = optax.tree.update_moment(g, state["v"], b2, 2)
        m_hat = optax.tree.bias_correction(m, b1, jnp.asarray(t))
        v_hat = optax.tree.bias_correction(v, b2, jnp.asarray(t))
        rate = lr(state["t"]) / (jnp.sqrt(v_hat) + eps)
        s = optax.tree.update_moment(rate, state["s"], b3, 1)
        return jnp.minimum(rate, s) * m_hat, {"t": t, "m": m, "v": v, "s": s}

    return optax.GradientTransformation(init, update)


def torch_options(h: dict[str, float]) -> dict[str, Any]:
    return {"lr": LR, "betas": (h["b1"], h["b2"]), "eps": h["eps"]}


def keras_options(h: dict[str, float]) -> dict[str, Any]:
    return {"learning_rate": LR, "beta_1": h["b1"], "beta_2": h["b2"], "epsilon": h["eps"]}


def rows_of(
    name: str,
    source: str,
    recipe: str,
    run_of: Callable[[dict[str, float], dict[str, float]], Callable[..., np.ndarray]],
    *,
    sets: dict[str, dict[str, float]] = BOTH,
    decay: float = 0.0,
    always_decays: bool = False,
    **ours: Any,
) -> Iterator[Row]:
    """A row for each set of hyperparameters, and one with a schedule and, if there is one, decay.

    ``run_of(hyperparameters, {"weight_decay": ...} or {})`` runs the public implementation;
    ``ours`` are further arguments of the recipe, its ``decay`` as ``decay_form``.
    """
    ours = {"decay" if name == "decay_form" else name: value for name, value in ours.items()}
    given = {"weight_decay": decay} if decay else {}
    always = given if always_decays else {}
    for label, h in sets.items():
        arguments = {"learning_rate": LR} | h | always | ours
        yield Row(f"{name}-{label}", source, recipe, arguments, run_of(h, always))
    arguments = {"learning_rate": LR} | h | given | ours
    suffix = "-decay-schedule" if given and not always_decays else "-schedule"
    yield Row(f"{name}-{label}{suffix}", source, recipe, arguments, run_of(h, given), True)


def rows(lessw2020: pathlib.Path, shivram1987: pathlib.Path) -> Iterator[Row]:
    adam = torch.optim.Adam
    yield from rows_of(
        "adam-torch",
        "torch.optim.Adam",
        "adam",
        lambda h, wd: run_torch(lambda p: adam(p, **torch_options(h), foreach=False)),
    )
    for option in ({"eps_root": 1e-4}, {"nesterov": True}):
        yield from rows_of(
            f"adam-optax-{next(iter(option))}",
            "optax.adam",
            "adam",
            lambda h, wd, o=option: run_optax(lambda lr: optax.adam(lr, **h, **o)),
            **option,
        )
    yield from rows_of(
        "adam-keras",
        "keras.optimizers.Adam",
        "adam",
        lambda h, wd: run_keras(lambda: keras.optimizers.Adam(**keras_options(h))),
        convention="keras",
    )
    adamw = torch.optim.AdamW
    yield from rows_of(
        "adamw-torch",
        "torch.optim.AdamW",
        "adamw",
        lambda h, wd: run_torch(lambda p: adamw(p, **torch_options(h), **wd, foreach=False)),
        decay=1.0,
        always_decays=True,
    )
    yield from rows_of(
        "adamw-optax-nesterov",
        "optax.adamw",
        "adamw",
        lambda h, wd: run_optax(lambda lr: optax.adamw(lr, **h, **wd, nesterov=True)),
        decay=1.0,
        always_decays=True,
        nesterov=True,
    )
    yield from rows_of(
        "adamw-keras",
        "keras.optimizers.AdamW",
        "adamw",
        lambda h, wd: run_keras(lambda: keras.optimizers.AdamW(**keras_options(h), **wd)),
        decay=1.0,
        always_decays=True,
        convention="keras",
    )
    yield from rows_of(
        "adamw-paper",
        "optax.chain of the paper's Algorithm 2",
        "adamw",
        lambda h, wd: run_optax(
            lambda lr: optax.chain(
                optax.scale_by_adam(**h),
                optax.scale(LR),
                optax.add_decayed_weights(wd["weight_decay"]),
                optax.scale_by_schedule(lambda t: -lr(t) / LR),
            )
        ),
        decay=1.0,
        always_decays=True,
        decay_form="independent",
    )
    # At b2 = .999 the maximum never binds in so few steps.
    three = BOTH | {"binding": {"b1": 0.9, "b2": 0.9, "eps": 1e-8}}
    yield from rows_of(
        "amsgrad-torch",
        "torch.optim.Adam(amsgrad=True)",
        "amsgrad",
        lambda h, wd: run_torch(lambda p: adam(p, **torch_options(h), amsgrad=True, foreach=False)),
        sets=three,
        convention="torch",
    )
    yield from rows_of(
        "amsgrad-optax",
        "optax.amsgrad",
        "amsgrad",
        lambda h, wd: run_optax(lambda lr: optax.amsgrad(lr, **h)),
        sets=three,
        convention="optax",
    )
    yield from rows_of(
        "amsgrad-keras",
        "keras.optimizers.Adam(amsgrad=True)",
        "amsgrad",
        lambda h, wd: run_keras(lambda: keras.optimizers.Adam(**keras_options(h), amsgrad=True)),
        sets=three,
        convention="keras",
    )
    raw = {"bias_correction_mu": False, "bias_correction_nu": False}
    yield from rows_of(
        "amsgrad-paper",
        "optax.amsgrad(bias_correction_mu=False, bias_correction_nu=False)",
        "amsgrad",
        lambda h, wd: run_optax(lambda lr: optax.amsgrad(lr, **h, **raw)),
        sets=three,
        convention="paper",
    )
    with_b3 = {
        label: h | {"b3": b3} for (label, h), b3 in zip(BOTH.items(), (0.999, 0.95), strict=True)
    }
    for name, source, optimizer in (
        ("adamod-package", "adamod.AdaMod", AdaMod),
        ("adamod-torch_optimizer", "torch_optimizer.AdaMod", torch_optimizer.AdaMod),
    ):
        yield from rows_of(
            name,
            source,
            "adamod",
            lambda h, wd, o=optimizer: run_torch(
                lambda p: o(p, **torch_options(h), beta3=h["b3"], **wd)
            ),
            sets=with_b3,
            decay=1.0,
        )
    yield from rows_of(
        "adamod-paper",
        "optax.tree functions in the order of the paper",
        "adamod",
        lambda h, wd: run_optax(
            lambda lr: optax.chain(
                adamod_paper(lr, **h),
                optax.add_decayed_weights(lambda t: wd.get("weight_decay", 0.0) * lr(t)),
                optax.scale(-1.0),
            )
        ),
        sets=with_b3,
        decay=1.0,
        convention="paper",
    )
    diffgrad = load(shivram1987 / "diffGrad_v2.py", "diffgrad")
    for name, source, optimizer in (
        ("diffgrad-v2", f"{SHIVRAM} diffGrad_v2.py", diffgrad),
        ("diffgrad-torch_optimizer", "torch_optimizer.DiffGrad", torch_optimizer.DiffGrad),
    ):
        yield from rows_of(
            name,
            source,
            "diffgrad",
            lambda h, wd, o=optimizer: run_torch(lambda p: o(p, **torch_options(h), **wd)),
            decay=0.1,
        )
    versions = load(lessw2020 / "diffgrad/diffgrad.py", "DiffGrad")
    for version, friction in ((1, "signed"), (2, "wide")):
        yield from rows_of(
            f"diffgrad-{friction}",
            f"{LESSW} diffgrad/diffgrad.py version={version}",
            "diffgrad",
            lambda h, wd, v=version: run_torch(
                lambda p: versions(p, **torch_options(h), **wd, version=v)
            ),
            decay=0.1,
            friction=friction,
        )
    with_memory = {
        label: h | {"len_memory": n} for (label, h), n in zip(BOTH.items(), (1000, 20), strict=True)
    }
    diffmod = load(lessw2020 / "diffmod/diffmod.py", "DiffMod")
    for name, theirs, ours in (
        ("absolute", {"version": 0}, {"friction": "absolute"}),
        ("signed", {"version": 1}, {"friction": "signed"}),
        ("wide", {"version": 2}, {"friction": "wide"}),
        ("average", {"average_step": True}, {"average": True}),
    ):
        yield from rows_of(
            f"diffmod-{name}",
            f"{LESSW} diffmod/diffmod.py {theirs}",
            "diffmod",
            lambda h, wd, o=theirs: run_torch(
                lambda p: diffmod(p, **torch_options(h), len_memory=h["len_memory"], **wd, **o)
            ),
            sets=with_memory,
            decay=1.0,
            **ours,
        )


def load(path: pathlib.Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def commit(checkout: pathlib.Path) -> str:
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def save(
    name: str, table: Iterator[Row], versions: dict[str, str], parameters_every: int = 1
) -> None:
    """Run every row and write ``name.npz`` and ``name.json``."""
    warnings.filterwarnings("ignore", message="This overload of")  # old torch signatures
    g = gradients()
    arrays, manifest = {"gradients": g}, []
    for row in table:
        with contextlib.redirect_stdout(None):  # some of the classes print when constructed
            record = row.record(g)
        record["parameters"] = record["parameters"][parameters_every - 1 :: parameters_every]
        assert all(np.isfinite(value).all() for value in record.values()), row.name
        arrays |= {f"{row.name}/{key}": value for key, value in record.items()}
        manifest.append(entry_of(row, versions, parameters_every))
    np.savez_compressed(HERE / f"{name}.npz", **arrays)
    (HERE / f"{name}.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(manifest)} rows, {(HERE / f'{name}.npz').stat().st_size / 1e6:.2f} MB")


def entry_of(row: Row, versions: dict[str, str], parameters_every: int) -> dict[str, Any]:
    """What the manifest says of a row."""
    package = max((name for name in versions if row.source.startswith(name)), key=len)
    return {
        "name": row.name,
        "source": row.source,
        "version": versions[package],
        "recipe": row.recipe,
        "arguments": row.arguments,
        "scheduled": row.scheduled,
        "parameters_every": parameters_every,
    }


def installed(*packages: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in packages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lessw2020", type=pathlib.Path, required=True)
    parser.add_argument("--shivram1987", type=pathlib.Path, required=True)
    paths = parser.parse_args()
    versions = installed("torch", "optax", "keras", "adamod", "torch_optimizer")
    versions |= {LESSW: commit(paths.lessw2020), SHIVRAM: commit(paths.shivram1987)}
    save("core", rows(paths.lessw2020, paths.shivram1987), versions)


if __name__ == "__main__":
    main()
