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
from collections.abc import Callable
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
SHARED = {"eps": 1e-8, "b1": 0.9, "b2": 0.999}
FAR = {"eps": 1e-3, "b1": 0.8, "b2": 0.9}
BINDING = {"eps": 1e-8, "b1": 0.9, "b2": 0.9}  # for AMSGrad: at b2 = .999 the maximum never binds


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

    def record(self, g: np.ndarray) -> dict[str, np.ndarray]:
        """Parameters from zero where nothing decays, and each update from where it was made.

        With decay the update is a difference of parameters; a small start keeps that exact enough.
        """
        decays = bool(self.arguments.get("weight_decay"))
        start = np.linspace(-1e-4, 1e-4, WEIGHTS) if decays else np.zeros(WEIGHTS)
        factor = schedule if self.scheduled else (lambda t: 1.0)
        parameters = self.run(g, start, factor, reset=False)
        if decays:
            updates = np.diff(np.concatenate([start[None], parameters]), axis=0)
        else:  # put back to zero before every step, the parameters are the updates, unrounded
            updates = self.run(g, start, factor, reset=True)
        return {"start": start, "parameters": parameters, "updates": updates}


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
        factors = jnp.asarray([factor(t) for t in range(STEPS)])
        optimizer = make(lambda count: factors[count])
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


def adamod_paper(lr: float, b1: float, b2: float, b3: float, eps: float) -> Any:
    """AdaMod as its paper lists it, put together from optax's parts."""

    def make(factor):
        def init(params):
            zeros = jnp.zeros_like(params)
            return {"t": 0, "m": zeros, "v": zeros, "s": zeros}

        def update(g, state, params):
            t = state["t"] + 1
            m = optax.tree.update_moment(g, state["m"], b1, 1)
            v = optax.tree.update_moment(g, state["v"], b2, 2)
            m_hat = optax.tree.bias_correction(m, b1, jnp.asarray(t))
            v_hat = optax.tree.bias_correction(v, b2, jnp.asarray(t))
            rate = lr * factor(state["t"]) / (jnp.sqrt(v_hat) + eps)
            s = optax.tree.update_moment(rate, state["s"], b3, 1)
            return -jnp.minimum(rate, s) * m_hat, {"t": t, "m": m, "v": v, "s": s}

        return optax.GradientTransformation(init, update)

    return run_optax(make)


def betas(h: dict[str, float]) -> dict[str, Any]:
    return {"betas": (h["b1"], h["b2"]), "eps": h["eps"]}


def rows(lessw: Any, diffgrad_v2: Any, diffmod: Any, diffgrad_versions: Any) -> list[Row]:
    both = {"defaults": SHARED, "far": FAR}
    three = both | {"binding": BINDING}
    lr = 0.01
    found: list[Row] = []

    def add(name, source, recipe, arguments, run, scheduled=False):
        arguments = {"learning_rate": lr, **arguments}
        found.append(Row(name, source, recipe, arguments, run, scheduled))

    for label, h in both.items():
        pair = {"b1": h["b1"], "b2": h["b2"], "eps": h["eps"]}
        kpair = {"beta_1": h["b1"], "beta_2": h["b2"], "epsilon": h["eps"]}
        torch_adam = run_torch(lambda p, h=h: torch.optim.Adam(p, lr=lr, **betas(h), foreach=False))
        add(f"adam-torch-{label}", "torch.optim.Adam", "adam", pair, torch_adam)
        add(f"adam-torch-schedule-{label}", "torch.optim.Adam", "adam", pair, torch_adam, True)
        for extra in ({"eps_root": 1e-4}, {"nesterov": True}):
            add(
                f"adam-optax-{next(iter(extra))}-{label}",
                "optax.adam",
                "adam",
                pair | extra,
                run_optax(lambda f, a=pair | extra: optax.adam(lambda t: lr * f(t), **a)),
            )
        add(
            f"adam-keras-{label}",
            "keras.optimizers.Adam",
            "adam",
            pair | {"convention": "keras"},
            run_keras(lambda k=kpair: keras.optimizers.Adam(lr, **k)),
        )
        wd = 1.0
        decayed = pair | {"weight_decay": wd}
        torch_adamw = run_torch(
            lambda p, h=h, wd=wd: torch.optim.AdamW(
                p, lr=lr, weight_decay=wd, **betas(h), foreach=False
            )
        )
        add(f"adamw-torch-{label}", "torch.optim.AdamW", "adamw", decayed, torch_adamw)
        add(
            f"adamw-torch-schedule-{label}",
            "torch.optim.AdamW",
            "adamw",
            decayed,
            torch_adamw,
            True,
        )
        add(
            f"adamw-optax-nesterov-{label}",
            "optax.adamw",
            "adamw",
            decayed | {"nesterov": True},
            run_optax(
                lambda f, a=decayed | {"nesterov": True}: optax.adamw(lambda t: lr * f(t), **a)
            ),
        )
        add(
            f"adamw-keras-schedule-{label}",
            "keras.optimizers.AdamW",
            "adamw",
            decayed | {"convention": "keras"},
            run_keras(lambda k=kpair, wd=wd: keras.optimizers.AdamW(lr, weight_decay=wd, **k)),
            True,
        )
        add(
            f"adamw-paper-schedule-{label}",
            "optax.chain of the paper's Algorithm 2",
            "adamw",
            decayed | {"convention": "paper"},
            run_optax(
                lambda f, a=pair, wd=wd: optax.chain(
                    optax.scale_by_adam(**a),
                    optax.scale(lr),
                    optax.add_decayed_weights(wd),
                    optax.scale_by_schedule(lambda t: -f(t)),
                )
            ),
            True,
        )

    for label, h in three.items():
        pair = {"b1": h["b1"], "b2": h["b2"], "eps": h["eps"]}
        kpair = {"beta_1": h["b1"], "beta_2": h["b2"], "epsilon": h["eps"]}
        raw = {"bias_correction_mu": False, "bias_correction_nu": False}
        add(
            f"amsgrad-torch-{label}",
            "torch.optim.Adam(amsgrad=True)",
            "amsgrad",
            pair | {"convention": "torch"},
            run_torch(
                lambda p, h=h: torch.optim.Adam(p, lr=lr, amsgrad=True, **betas(h), foreach=False)
            ),
        )
        add(
            f"amsgrad-optax-{label}",
            "optax.amsgrad",
            "amsgrad",
            pair | {"convention": "optax"},
            run_optax(lambda f, a=pair: optax.amsgrad(lambda t: lr * f(t), **a)),
        )
        add(
            f"amsgrad-keras-{label}",
            "keras.optimizers.Adam(amsgrad=True)",
            "amsgrad",
            pair | {"convention": "keras"},
            run_keras(lambda k=kpair: keras.optimizers.Adam(lr, amsgrad=True, **k)),
        )
        add(
            f"amsgrad-paper-{label}",
            "optax.amsgrad(bias_correction_mu=False, bias_correction_nu=False)",
            "amsgrad",
            pair | {"convention": "paper"},
            run_optax(lambda f, a=pair | raw: optax.amsgrad(lambda t: lr * f(t), **a)),
        )

    for label, h, b3 in (("defaults", SHARED, 0.999), ("far", FAR, 0.95)):
        pair = {"b1": h["b1"], "b2": h["b2"], "b3": b3, "eps": h["eps"]}
        package = run_torch(lambda p, h=h, b3=b3: AdaMod(p, lr=lr, beta3=b3, **betas(h)))
        decayed = run_torch(
            lambda p, h=h, b3=b3: AdaMod(p, lr=lr, beta3=b3, weight_decay=1.0, **betas(h))
        )
        add(f"adamod-package-{label}", "adamod.AdaMod", "adamod", pair, package)
        add(f"adamod-package-schedule-{label}", "adamod.AdaMod", "adamod", pair, package, True)
        add(
            f"adamod-package-decay-schedule-{label}",
            "adamod.AdaMod",
            "adamod",
            pair | {"weight_decay": 1.0},
            decayed,
            True,
        )
        add(
            f"adamod-torch_optimizer-{label}",
            "torch_optimizer.AdaMod",
            "adamod",
            pair,
            run_torch(lambda p, h=h, b3=b3: torch_optimizer.AdaMod(p, lr=lr, beta3=b3, **betas(h))),
        )
        add(
            f"adamod-paper-schedule-{label}",
            "optax.tree functions in the order of the paper",
            "adamod",
            pair | {"convention": "paper"},
            adamod_paper(lr, **pair),
            True,
        )

    for label, h in both.items():
        pair = {"b1": h["b1"], "b2": h["b2"], "eps": h["eps"]}
        add(
            f"diffgrad-v2-{label}",
            "shivram1987/diffGrad diffGrad_v2.py",
            "diffgrad",
            pair,
            run_torch(lambda p, h=h: diffgrad_v2(p, lr=lr, **betas(h))),
        )
        add(
            f"diffgrad-v2-decay-schedule-{label}",
            "shivram1987/diffGrad diffGrad_v2.py",
            "diffgrad",
            pair | {"weight_decay": 0.1},
            run_torch(lambda p, h=h: diffgrad_v2(p, lr=lr, weight_decay=0.1, **betas(h))),
            True,
        )
        add(
            f"diffgrad-torch_optimizer-{label}",
            "torch_optimizer.DiffGrad",
            "diffgrad",
            pair,
            run_torch(lambda p, h=h: torch_optimizer.DiffGrad(p, lr=lr, **betas(h))),
        )
        for version, friction in ((1, "signed"), (2, "wide")):
            add(
                f"diffgrad-{friction}-{label}",
                f"{lessw} diffgrad/diffgrad.py version={version}",
                "diffgrad",
                pair | {"friction": friction},
                run_torch(
                    lambda p, h=h, v=version: diffgrad_versions(p, lr=lr, version=v, **betas(h))
                ),
            )
        memory = 1000 if label == "defaults" else 20
        for version, friction in enumerate(("absolute", "signed", "wide")):
            add(
                f"diffmod-{friction}-{label}",
                f"{lessw} diffmod/diffmod.py version={version}",
                "diffmod",
                pair | {"friction": friction, "len_memory": memory},
                run_torch(
                    lambda p, h=h, v=version, n=memory: diffmod(
                        p, lr=lr, version=v, len_memory=n, **betas(h)
                    )
                ),
            )
        add(
            f"diffmod-average-decay-schedule-{label}",
            f"{lessw} diffmod/diffmod.py average_step=True",
            "diffmod",
            pair | {"len_memory": memory, "average": True, "weight_decay": 1.0},
            run_torch(
                lambda p, h=h, n=memory: diffmod(
                    p, lr=lr, len_memory=n, average_step=True, weight_decay=1.0, **betas(h)
                )
            ),
            True,
        )
    return found


def load(path: pathlib.Path, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def commit(checkout: pathlib.Path) -> str:
    head = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(head, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lessw2020", type=pathlib.Path, required=True)
    parser.add_argument("--shivram1987", type=pathlib.Path, required=True)
    paths = parser.parse_args()
    warnings.filterwarnings("ignore", message="This overload of")  # old torch signatures
    lessw = "lessw2020/Best-Deep-Learning-Optimizers"
    versions = {
        name: importlib.metadata.version(name.partition(".")[0])
        for name in ("torch", "optax", "keras", "adamod", "torch_optimizer")
    }
    versions[lessw] = commit(paths.lessw2020)
    versions["shivram1987/diffGrad"] = commit(paths.shivram1987)
    g = gradients()
    table = rows(
        lessw,
        load(paths.shivram1987 / "diffGrad_v2.py", "diffgrad"),
        load(paths.lessw2020 / "diffmod/diffmod.py", "DiffMod"),
        load(paths.lessw2020 / "diffgrad/diffgrad.py", "DiffGrad"),
    )
    arrays, manifest = {"gradients": g}, []
    for row in table:
        with contextlib.redirect_stdout(None):  # some of the classes print when constructed
            record = row.record(g)
        arrays |= {f"{row.name}/{key}": value for key, value in record.items()}
        package = next(name for name in versions if row.source.startswith(name))
        manifest.append(
            {
                "name": row.name,
                "source": row.source,
                "version": versions[package],
                "recipe": row.recipe,
                "arguments": row.arguments,
                "scheduled": row.scheduled,
            }
        )
    np.savez_compressed(HERE / "core.npz", **arrays)
    (HERE / "core.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(table)} rows, {(HERE / 'core.npz').stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
