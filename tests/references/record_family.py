"""Records the rest of the family: AdaBound to SGDW, one-cycle, Lookahead, restarts.

    pip install -r tests/references/requirements.txt
    pip download --no-deps fastai==2.8.12 && unzip fastai-2.8.12-py3-none-any.whl -d fastai2
    git clone https://github.com/lessw2020/Best-Deep-Learning-Optimizers lessw2020
    git clone https://github.com/Luolc/AdaBound
    git clone https://github.com/LiyuanLucasLiu/RAdam
    git clone https://github.com/OverLordGoldDragon/keras-adamw
    git clone https://github.com/fastai/fastai1
    python tests/references/record_family.py --checkouts .

Like record.py, into ``family.npz`` and ``family.json``, with the parameters of every tenth step;
and the values of fastai's one-cycle schedules into ``one_cycle.json``.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import decimal
import functools
import json
import math
import os
import pathlib
import types
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
import keras
import keras_adamw
import numpy as np
import optax
import pytorch_optimizer
import torch
from adabound import AdaBound
from record import (
    BOTH,
    HERE,
    LESSW,
    LR,
    STEPS,
    Row,
    commit,
    installed,
    keras_options,
    load,
    rows_of,
    run_keras,
    run_optax,
    run_torch,
    save,
    torch_options,
)

LUOLC, LIYUAN = "Luolc/AdaBound", "LiyuanLucasLiu/RAdam"
KERAS_ADAMW = "OverLordGoldDragon/keras-adamw"
optim = torch.optim


def without(h: dict[str, float], *names: str) -> dict[str, float]:
    return {name: value for name, value in h.items() if name not in names}


def in_float64(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Run an implementation that casts everything with ``.float()`` without that cast."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> np.ndarray:
        cast, torch.Tensor.float = torch.Tensor.float, lambda self: self
        try:
            return run(*args, **kwargs)
        finally:
            torch.Tensor.float = cast

    return wrapped


class Wide(float):
    """A float that remembers 50 digits until it meets an array.

    RAdam subtracts 1994 from 1999 to get 5, and 1 - b2^t is as small. In float64 the authors' line
    is therefore only good to 1e-11; with such scalars to 1e-15, and the code is the same.
    """

    exact: decimal.Decimal

    def __new__(cls, value: Any) -> Wide:
        self = super().__new__(cls, value)
        self.exact = value if isinstance(value, decimal.Decimal) else decimal.Decimal(float(value))
        return self


def _widely(name: str) -> Callable[..., Any]:
    def operate(self: Wide, other: Any) -> Any:
        if getattr(other, "ndim", 0):
            return NotImplemented
        with decimal.localcontext(prec=50):
            other = other.exact if isinstance(other, Wide) else decimal.Decimal(float(other))
            return Wide(getattr(self.exact, name)(other))

    return operate


for _name in ("add", "sub", "mul", "truediv", "pow"):
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Wide, _form, _widely(_form))


def wide(h: dict[str, float]) -> dict[str, float]:
    return h | {"b2": Wide(h["b2"])}


def single(h: dict[str, float], *names: str) -> dict[str, Any]:
    """torch's options for those algorithms that have no pair of betas."""
    return {"lr": LR, "foreach": False} | {name: h[name] for name in names if name in h}


def bounded(checkouts: pathlib.Path) -> Iterator[Row]:
    sets = {
        "defaults": BOTH["defaults"],
        "far": BOTH["far"] | {"final_learning_rate": 0.5, "gamma": 0.05},
    }

    def options(h: dict[str, float]) -> dict[str, Any]:
        final, gamma = h.get("final_learning_rate", 0.1), h.get("gamma", 1e-3)
        return torch_options(h) | {"final_lr": final, "gamma": gamma}

    for recipe, amsbound in (("adabound", False), ("amsbound", True)):
        yield from rows_of(
            f"{recipe}-package",
            f"adabound.AdaBound(amsbound={amsbound})",
            recipe,
            lambda h, wd, a=amsbound: run_torch(
                lambda p: AdaBound(p, **options(h), **wd, amsbound=a)
            ),
            sets=sets,
            decay=0.1,
            base_learning_rate=LR,
        )
    adaboundw = load(checkouts / "AdaBound/adabound/adabound.py", "AdaBoundW")
    yield from rows_of(
        "adabound-w",
        f"{LUOLC} AdaBoundW",
        "adabound",
        lambda h, wd: run_torch(lambda p: adaboundw(p, **options(h), **wd)),
        sets=sets,
        decay=0.01,
        base_learning_rate=LR,
        decay_form="constant",
    )


def rectified(checkouts: pathlib.Path) -> Iterator[Row]:
    for decoupled in (False, True):
        yield from rows_of(
            f"radam-torch{'-decoupled' * decoupled}",
            f"torch.optim.RAdam(decoupled_weight_decay={decoupled})",
            "radam",
            lambda h, wd, d=decoupled: run_torch(
                lambda p: optim.RAdam(
                    p, **torch_options(wide(h)), **wd, decoupled_weight_decay=d, foreach=False
                )
            ),
            decay=1.0 if decoupled else 0.1,
            decay_form="decoupled" if decoupled else "l2",
        )
    yield from rows_of(
        "radam-optax",
        "optax.radam",
        "radam",
        lambda h, wd: run_optax(lambda lr: optax.radam(lr, **wide(h), eps_root=1e-6)),
        convention="optax",
        eps_root=1e-6,
    )
    authors = load(checkouts / "RAdam/radam/radam.py", "RAdam")
    yield from rows_of(
        "radam-reference",
        f"{LIYUAN} radam/radam.py, without its casts to float32",
        "radam",
        lambda h, wd: in_float64(run_torch(lambda p: authors(p, **torch_options(wide(h)), **wd))),
        decay=1.0,
        convention="reference",
    )
    ranger = load(checkouts / "lessw2020/Ranger/ranger.py", "Ranger")
    sets = {
        "defaults": {"b1": 0.95, "b2": 0.999, "eps": 1e-5},
        "far": BOTH["far"] | {"sync_period": 4, "slow_step_size": 0.8},
    }

    def options(h: dict[str, float]) -> dict[str, Any]:
        k, alpha = h.get("sync_period", 6), h.get("slow_step_size", 0.5)
        return torch_options(wide(h)) | {"k": k, "alpha": alpha}

    # The weights are a vector here, so that its gradient centralisation does nothing. Parameters
    # put back to zero would break Lookahead: with decay, the updates are differences.
    yield from rows_of(
        "ranger-lessw2020",
        f"{LESSW} Ranger/ranger.py, without its casts to float32",
        "ranger",
        lambda h, wd: in_float64(run_torch(lambda p: ranger(p, **options(h), **wd))),
        sets=sets,
        decay=1.0,
        always_decays=True,
    )


def nesterov() -> Iterator[Row]:
    for recipe, decoupled in (("nadam", False), ("nadamw", True)):
        yield from rows_of(
            f"{recipe}-torch",
            f"torch.optim.NAdam(decoupled_weight_decay={decoupled})",
            recipe,
            lambda h, wd, d=decoupled: run_torch(
                lambda p: optim.NAdam(
                    p, **torch_options(h), **wd, decoupled_weight_decay=d, foreach=False
                )
            ),
            decay=1.0 if decoupled else 0.1,
            always_decays=decoupled,
        )
    yield from rows_of(
        "nadamw-keras",
        "keras.optimizers.Nadam",
        "nadamw",
        lambda h, wd: run_keras(lambda: keras.optimizers.Nadam(**keras_options(h), **wd)),
        decay=1.0,
        always_decays=True,
        convention="keras",
    )
    yield from rows_of(
        "nadam-optax",
        "optax.nadam",
        "nadam",
        lambda h, wd: run_optax(lambda lr: optax.nadam(lr, **h)),
        convention="optax",
    )
    yield from rows_of(
        "nadamw-optax",
        "optax.nadamw",
        "nadamw",
        lambda h, wd: run_optax(lambda lr: optax.nadamw(lr, **h, **wd)),
        decay=1.0,
        always_decays=True,
        convention="optax",
    )


def classics() -> Iterator[Row]:
    yield from rows_of(
        "adamax-torch",
        "torch.optim.Adamax",
        "adamax",
        lambda h, wd: run_torch(lambda p: optim.Adamax(p, **torch_options(h), **wd, foreach=False)),
        decay=0.1,
    )
    yield from rows_of(
        "adamax-optax",
        "optax.adamax",
        "adamax",
        lambda h, wd: run_optax(lambda lr: optax.adamax(lr, **h)),
        convention="optax",
    )
    yield from rows_of(
        "adamax-keras",
        "keras.optimizers.Adamax",
        "adamax",
        lambda h, wd: run_keras(lambda: keras.optimizers.Adamax(**keras_options(h))),
        convention="keras",
    )
    sums = {
        "defaults": {"initial_accumulator_value": 0.0, "eps": 1e-10},
        "far": {"initial_accumulator_value": 0.1, "eps": 1e-3},
    }
    yield from rows_of(
        "adagrad-torch",
        "torch.optim.Adagrad",
        "adagrad",
        lambda h, wd: run_torch(
            lambda p: optim.Adagrad(p, **single(h, "eps", "initial_accumulator_value"), **wd)
        ),
        sets=sums,
        decay=0.1,
    )
    yield from rows_of(
        "adagrad-optax",
        "optax.adagrad",
        "adagrad",
        lambda h, wd: run_optax(lambda lr: optax.adagrad(lr, **h)),
        sets=sums,
        convention="optax",
    )
    yield from rows_of(
        "adagrad-keras",
        "keras.optimizers.Adagrad",
        "adagrad",
        lambda h, wd: run_keras(
            lambda: keras.optimizers.Adagrad(
                LR, initial_accumulator_value=h["initial_accumulator_value"], epsilon=h["eps"]
            )
        ),
        sets=sums,
        convention="keras",
    )
    deltas = {"defaults": {"rho": 0.9, "eps": 1e-6}, "far": {"rho": 0.5, "eps": 1e-3}}
    yield from rows_of(
        "adadelta-torch",
        "torch.optim.Adadelta",
        "adadelta",
        lambda h, wd: run_torch(lambda p: optim.Adadelta(p, **single(h, "rho", "eps"), **wd)),
        sets=deltas,
        decay=1.0,
    )
    yield from rows_of(
        "adadelta-optax",
        "optax.adadelta",
        "adadelta",
        lambda h, wd: run_optax(lambda lr: optax.adadelta(lr, **h)),
        sets=deltas,
    )
    yield from rows_of(
        "adadelta-keras",
        "keras.optimizers.Adadelta",
        "adadelta",
        lambda h, wd: run_keras(
            lambda: keras.optimizers.Adadelta(LR, rho=h["rho"], epsilon=h["eps"])
        ),
        sets=deltas,
    )


def rms() -> Iterator[Row]:
    kinds = {
        "": {},
        "-centered": {"centered": True},
        "-momentum": {"momentum": 0.8},
        "-both": {"centered": True, "momentum": 0.8},
    }
    one = {"defaults": {"b2": 0.9, "eps": 1e-8}, "far": {"b2": 0.99, "eps": 1e-3}}
    for suffix, kind in kinds.items():
        sets = one if not kind else {"far": one["far"]}
        yield from rows_of(
            f"rmsprop-torch{suffix}",
            "torch.optim.RMSprop",
            "rmsprop",
            lambda h, wd, k=kind: run_torch(
                lambda p: optim.RMSprop(p, **single(h, "eps"), alpha=h["b2"], **k, **wd)
            ),
            sets=sets,
            decay=0.1,
            **kind,
        )
        yield from rows_of(
            f"rmsprop-keras{suffix}",
            "keras.optimizers.RMSprop",
            "rmsprop",
            lambda h, wd, k=kind: run_keras(
                lambda: keras.optimizers.RMSprop(LR, rho=h["b2"], epsilon=h["eps"], **k)
            ),
            sets=sets,
            convention="keras",
            **kind,
        )
        more = kind | ({"nesterov": True} if "momentum" in kind else {})
        yield from rows_of(
            f"rmsprop-optax{suffix}",
            "optax.rmsprop",
            "rmsprop",
            lambda h, wd, k=more: run_optax(
                lambda lr: optax.rmsprop(lr, decay=h["b2"], eps=h["eps"], **k)
            ),
            sets=sets,
            convention="optax",
            **more,
        )
        yield from rows_of(
            f"rmsprop-tf1{suffix}",
            "optax.rmsprop(initial_scale=1), the formulas of TF1's training/rmsprop.py",
            "rmsprop",
            lambda h, wd, k=kind: run_optax(
                lambda lr: optax.rmsprop(lr, decay=h["b2"], eps=h["eps"], initial_scale=1.0, **k)
            ),
            sets={"far": one["far"]},
            convention="tf1",
            **kind,
        )


def momentum() -> Iterator[Row]:
    sets = {
        "plain": {},
        "heavy": {"momentum": 0.9},
        "far": {"momentum": 0.5, "dampening": 0.3},
    }
    yield from rows_of(
        "sgd-torch",
        "torch.optim.SGD",
        "sgd",
        lambda h, wd: run_torch(lambda p: optim.SGD(p, lr=LR, **h, **wd, foreach=False)),
        sets=sets,
        decay=0.1,
    )
    ahead = {"nesterov": {"momentum": 0.8, "nesterov": True}}
    yield from rows_of(
        "sgd-torch",
        "torch.optim.SGD(nesterov=True)",
        "sgd",
        lambda h, wd: run_torch(lambda p: optim.SGD(p, lr=LR, **h, **wd, foreach=False)),
        sets=ahead,
        decay=0.1,
    )
    yield from rows_of(
        "sgd-keras",
        "keras.optimizers.SGD",
        "sgd",
        lambda h, wd: run_keras(lambda: keras.optimizers.SGD(LR, **h)),
        sets={"heavy": {"momentum": 0.9}} | ahead,
        convention="keras",
    )
    yield from rows_of(
        "sgdw-pytorch_optimizer",
        "pytorch_optimizer.SGDW",
        "sgdw",
        lambda h, wd: run_torch(
            lambda p: pytorch_optimizer.SGDW(p, lr=LR, **h, **wd, foreach=False)
        ),
        sets={"heavy": {"momentum": 0.9}} | ahead,
        decay=1.0,
        always_decays=True,
        convention="torch",
    )


def looking_ahead() -> Iterator[Row]:
    """Lookahead around Adam; from 1e-4, so that the updates are differences of parameters."""
    sets = {
        "defaults": BOTH["defaults"] | {"sync_period": 6, "slow_step_size": 0.5},
        "far": BOTH["far"] | {"sync_period": 5, "slow_step_size": 0.8},
    }

    def torch_lookahead(h: dict[str, float]) -> Callable[..., np.ndarray]:
        return run_torch(
            lambda p: pytorch_optimizer.Lookahead(
                optim.AdamW(p, **torch_options(h), weight_decay=1.0, foreach=False),
                k=h["sync_period"],
                alpha=h["slow_step_size"],
                pullback_momentum="none",
            )
        )

    yield from rows_of(
        "lookahead-pytorch_optimizer",
        "pytorch_optimizer.Lookahead(torch.optim.AdamW)",
        "lookahead(adamw)",
        lambda h, wd: torch_lookahead(h),
        sets=sets,
        decay=1.0,
        always_decays=True,
    )


def restarts(checkouts: pathlib.Path) -> Iterator[Row]:
    """keras-adamw with cosine annealing, restarts, and both l1 and l2 decay."""
    with contextlib.redirect_stdout(None):
        package = keras_adamw.load(checkouts / "keras-adamw")
    period, l1, l2 = 40, 0.3, 0.5
    common = {
        "total_iterations": period,
        "use_cosine_annealing": True,
        "init_verbose": False,
        "zero_penalties": True,
    }
    for name, l1_given, eta in (
        ("l2", 0.0, {}),
        ("l1-l2", l1, {"eta_min": 0.1, "eta_max": 1.5, "t_cur": 7}),
    ):
        shared = common | {"weight_decays": {"w": [l1_given, l2]}} | eta
        ours = {
            "period": period,
            "minimum": eta.get("eta_min", 0.0),
            "maximum": eta.get("eta_max", 1.0),
            "start": eta.get("t_cur", 0),
            "l1": l1_given,
            "l2": l2,
        }
        h = BOTH["far"]
        yield Row(
            f"adamw-keras-adamw-{name}",
            f"{KERAS_ADAMW} AdamW, on NumPy in float64",
            "keras-adamw adamw",
            {"learning_rate": LR, **h, **ours, "weight_decay": l2},
            lambda g, start, factor, reset, s=shared, h=h: keras_adamw.trajectory(
                package.AdamW(**keras_options(h), **s), g, start
            ),
        )
        for nesterov_too in (False, True):
            yield Row(
                f"sgdw-keras-adamw-{name}{'-nesterov' * nesterov_too}",
                f"{KERAS_ADAMW} SGDW, on NumPy in float64",
                "keras-adamw sgdw",
                {
                    "learning_rate": LR,
                    "momentum": 0.8,
                    "nesterov": nesterov_too,
                    **ours,
                    "weight_decay": l2,
                },
                lambda g, start, factor, reset, s=shared, n=nesterov_too: keras_adamw.trajectory(
                    package.SGDW(learning_rate=LR, momentum=0.8, nesterov=n, **s), g, start
                ),
            )


def one_cycle() -> Iterator[Row]:
    """torch's OneCycleLR driving Adam and AdamW."""

    def run_of(make: Callable[[Any], optim.Optimizer]) -> Callable[..., np.ndarray]:
        def run(g, start, factor, reset):
            x = torch.nn.Parameter(torch.tensor(start))
            optimizer = make([x])
            cycle = optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LR, total_steps=STEPS)
            path = []
            for row in g:
                if reset:
                    x.data.zero_()
                x.grad = torch.tensor(row)
                optimizer.step()
                path.append(x.detach().numpy().copy())
                if len(path) < STEPS:
                    cycle.step()
            return np.stack(path)

        return run

    for recipe, make, decay in (
        ("adam", optim.Adam, {}),
        ("adamw", optim.AdamW, {"weight_decay": 1.0}),
    ):
        for label, h in BOTH.items():
            options = torch_options(h) | decay
            yield Row(
                f"one_cycle-{recipe}-{label}",
                f"torch.optim.lr_scheduler.OneCycleLR driving {make.__name__}",
                f"one_cycle {recipe}",
                {"max_learning_rate": LR, "total_steps": STEPS, **without(h, "b1"), **decay},
                run_of(lambda p, m=make, o=options: m(p, **o, foreach=False)),
            )


def fastai_cycles(checkouts: pathlib.Path) -> dict[str, Any]:
    """The learning rates and momenta that fastai v1 and fastai 2 use, step by step."""
    steps = 100
    source = (checkouts / "fastai1/fastai/callback.py").read_text()
    wanted = ("annealing_cos", "Scheduler")
    one = {"np": np, "is_tuple": lambda x: isinstance(x, tuple)}
    names = ("Number", "StartOptEnd", "AnnealFunc", "Optional")
    one |= {name: Any for name in names} | {"Optional": {Any: Any}}
    run_definitions(source, wanted, one)
    source = (checkouts / "fastai1/fastai/callbacks/one_cycle.py").read_text()
    one |= {
        "LearnerCallback": object,
        "Floats": Any,
        "Learner": Any,
        "Any": Any,
        "listify": lambda x, n: list(x),
        "is_listy": lambda x: isinstance(x, (list, tuple)),
        "ifnone": lambda a, b: b if a is None else a,
    }
    run_definitions(source, ("OneCycleScheduler",), one)
    learner = types.SimpleNamespace(
        data=types.SimpleNamespace(train_dl=[None] * steps),
        opt=types.SimpleNamespace(lr=None, mom=None),
    )
    callback = one["OneCycleScheduler"].__new__(one["OneCycleScheduler"])
    callback.learn, callback.lr_max, callback.moms = learner, LR, (0.95, 0.85)
    callback.div_factor, callback.pct_start, callback.final_div = 25.0, 0.3, 25.0 * 1e4
    callback.tot_epochs = callback.start_epoch = None
    callback.on_train_begin(n_epochs=1, epoch=0)
    v1 = {"learning_rate": [], "b1": []}
    for _ in range(steps):
        v1["learning_rate"].append(float(learner.opt.lr))
        v1["b1"].append(float(learner.opt.mom))
        callback.on_batch_end(True)

    source = (checkouts / "fastai2/fastai/callback/schedule.py").read_text()
    two = {"math": math, "torch": torch, "tensor": torch.tensor, "L": list}
    two["_Annealer"] = lambda f, start, end: lambda pos: f(start, end, pos)
    run_definitions(source, ("sched_cos", "SchedCos", "combine_scheds", "combined_cos"), two)
    rate = two["combined_cos"](0.25, LR / 25.0, LR, LR / 1e5)
    mom = two["combined_cos"](0.25, 0.95, 0.85, 0.95)
    v2 = {
        "learning_rate": [rate(k / steps) for k in range(steps)],
        "b1": [mom(k / steps) for k in range(steps)],
    }
    return {
        "fastai1": v1 | {"source": f"fastai/fastai1 {commit(checkouts / 'fastai1')}"},
        "fastai2": v2 | {"source": "fastai 2.8.12"},
    }


def run_definitions(source: str, names: tuple[str, ...], namespace: dict[str, Any]) -> None:
    """Execute the definitions of those names, and nothing else, of a file."""
    for node in ast.parse(source).body:
        if getattr(node, "name", None) in names:
            for part in ast.walk(node):
                for annotated in ("annotation", "returns"):
                    if getattr(part, annotated, None) is not None:
                        setattr(part, annotated, None)
            exec(compile(ast.Module([node], []), "<fastai>", "exec"), namespace)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    checkouts = parser.parse_args().checkouts
    torch.set_default_dtype(torch.float64)  # or NAdam keeps its product of momenta in float32
    versions = installed("torch", "optax", "keras", "adabound", "pytorch_optimizer")
    versions |= {
        LUOLC: commit(checkouts / "AdaBound"),
        LIYUAN: commit(checkouts / "RAdam"),
        LESSW: commit(checkouts / "lessw2020"),
        KERAS_ADAMW: commit(checkouts / "keras-adamw"),
    }

    table = (
        *bounded(checkouts),
        *rectified(checkouts),
        *nesterov(),
        *classics(),
        *rms(),
        *momentum(),
        *looking_ahead(),
        *restarts(checkouts),
        *one_cycle(),
    )
    save("family", iter(table), versions, parameters_every=10)
    cycles = fastai_cycles(checkouts)
    (HERE / "one_cycle.json").write_text(json.dumps(cycles, indent=0) + "\n")


if __name__ == "__main__":
    main()
