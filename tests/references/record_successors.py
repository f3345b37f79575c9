"""Records what came after the family, and adds to what is recorded without rewriting it.

    pip install -r tests/references/requirements.txt
    git clone https://github.com/google/automl
    git clone https://github.com/Z-T-WANG/LaProp-Optimizer
    git clone https://github.com/iShohei220/adopt
    git clone https://github.com/apple/ml-ademamix
    git clone https://github.com/AGI-Arena/MARS
    git clone https://github.com/sail-sg/Adan
    git clone https://github.com/warner-benjamin/optimi
    git clone https://github.com/cybertronai/pytorch-lamb
    git clone https://github.com/lucidrains/adam-atan2-pytorch
    git clone https://github.com/clovaai/AdamP
    python tests/references/record_successors.py --checkouts . [METHOD ...] [--again ROW ...]

Like record_family.py, into ``successors.npz`` and ``successors.json``, with the parameters of every
fiftieth step. A method is one function that yields its rows, named in METHODS; it imports what it
runs itself, so that one method can be recorded where what another needs no longer installs. Rows
that are recorded stay as they are, to the bit; ``--again`` renews the one it names.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import sys
import tempfile
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import transcribed
from record import (
    BOTH,
    HERE,
    LR,
    WEIGHTS,
    Row,
    commit,
    installed,
    load,
    rows_of,
    run_keras,
    run_optax,
    run_torch,
    save,
    torch_options,
)
from record_family import wide

NAME, PARAMETERS_EVERY = "successors", 50
WHAT_IT_IS = ("source", "recipe", "arguments", "scheduled")


def run_transcribed(make: Callable[[], transcribed.Step]) -> Callable[..., np.ndarray]:
    def run(g, start, factor, reset):
        step, x, path = make(), start.astype(np.longdouble), []
        for t, row in enumerate(g):
            x = step(np.zeros(WEIGHTS) if reset else x, row, LR * factor(t))
            path.append(x)
        return np.stack(path)

    return run


def adabelief(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' package in each of its forms, and optax's, which has a second eps."""
    from adabelief_pytorch import AdaBelief

    sets = {"defaults": BOTH["defaults"] | {"eps": 1e-16}, "far": BOTH["far"]}
    # At b2 = .999 the maximum changes the updates by less than a hundredth in so few steps.
    binding = {"binding": {"b1": 0.9, "b2": 0.9, "eps": 1e-16}, "far": BOTH["far"]}
    plain = {"rectify": False}
    l2, constant = plain | {"weight_decouple": False}, plain | {"fixed_decay": True}

    def package(name: str, theirs: dict[str, bool], decay: float, **others: Any) -> list[Row]:
        scalars = wide if theirs["rectify"] else dict
        rows = rows_of(
            f"adabelief-package{name}",
            f"adabelief_pytorch.AdaBelief({', '.join(f'{k}={v}' for k, v in theirs.items())})",
            "adabelief",
            lambda h, wd: run_torch(
                lambda p: AdaBelief(
                    p, **torch_options(scalars(h)), **wd, **theirs, print_change_log=False
                )
            ),
            decay=decay,
            **({"sets": sets} | others),
        )
        return list(rows)

    # Every second of the three rows is the first and the last, which has all there is.
    yield from package("", plain, 1.0)
    yield from package("-l2", l2, 0.1, always_decays=True, decay_form="l2")[::2]
    yield package("-constant", constant, 0.01, always_decays=True, decay_form="constant")[-1]
    yield from package("-rectified", {"rectify": True}, 1.0, convention="rectified")
    amsgrad = plain | {"amsgrad": True}
    yield from package("-amsgrad", amsgrad, 1.0, sets=binding, convention="amsgrad")[::2]
    roots = {"defaults": {"eps_root": 1e-16}, "far": {"eps_root": 1e-6}}
    with_roots = rows_of(
        "adabelief-optax",
        "optax.adabelief",
        "adabelief",
        lambda h, wd: run_optax(lambda lr: optax.adabelief(lr, **h)),
        sets={label: h | roots[label] for label, h in sets.items()},
    )
    yield from list(with_roots)[::2]


def lion(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code and optax's."""
    sets = {"defaults": {"b1": 0.9, "b2": 0.99}, "far": {"b1": 0.8, "b2": 0.9}}
    authors = load(checkouts / "automl/lion/lion_pytorch.py", "Lion")
    yield from rows_of(
        "lion-reference",
        "google/automl lion/lion_pytorch.py",
        "lion",
        lambda h, wd: run_torch(lambda p: authors(p, lr=LR, betas=(h["b1"], h["b2"]), **wd)),
        sets=sets,
        decay=1.0,
    )
    yield from rows_of(
        "lion-optax",
        "optax.lion",
        "lion",
        lambda h, wd: run_optax(lambda lr: optax.lion(lr, **h, **({"weight_decay": 0.0} | wd))),
        sets=sets,
        decay=1.0,
    )


def yogi(checkouts: pathlib.Path) -> Iterator[Row]:
    """optax's and torch_optimizer's, whose first moment is put to zero first; and TensorFlow's."""
    import torch
    from torch_optimizer import Yogi

    def of_optax(lr: optax.Schedule, **h: float) -> optax.GradientTransformation:
        theirs = optax.yogi(lr, **h)

        def init(params: Any) -> Any:
            state = theirs.init(params)
            return optax.tree.set(state, mu=jnp.zeros_like(params))

        return optax.GradientTransformation(init, theirs.update)

    def of_torch(params: list[Any], **options: Any) -> torch.optim.Optimizer:
        theirs = Yogi(params, **options)
        m, v = torch.zeros_like(params[0]), torch.full_like(params[0], 1e-6)
        theirs.state[params[0]] = {"step": 0, "exp_avg": m, "exp_avg_sq": v}
        return theirs

    sets = {"defaults": BOTH["defaults"] | {"eps": 1e-3}, "far": BOTH["far"] | {"eps": 1e-6}}
    yield from rows_of(
        "yogi-optax",
        "optax.yogi, from a first moment of zero",
        "yogi",
        lambda h, wd: run_optax(lambda lr: of_optax(lr, **h)),
        sets=sets,
    )
    rows = rows_of(
        "yogi-torch-l2",
        "torch_optimizer.Yogi, from a first moment of zero",
        "yogi",
        lambda h, wd: run_torch(lambda p: of_torch(p, **torch_options(h), **wd)),
        sets=sets,
        decay=0.1,
        always_decays=True,
        decay_form="l2",
    )
    yield from list(rows)[::2]
    yield from rows_of(
        "yogi-tensorflow",
        "tensorflow/addons tensorflow_addons/optimizers/yogi.py, transcribed",
        "yogi",
        lambda h, wd: run_transcribed(lambda: transcribed.yogi(**h)),
        sets={label: h | {"initial": 1e-6 if label == "defaults" else 1e-2}
              for label, h in sets.items()},
        convention="tensorflow",
    )  # fmt: skip


def laprop(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code."""
    authors = load(checkouts / "LaProp-Optimizer/laprop.py", "LaProp")
    sets = {"defaults": BOTH["defaults"] | {"eps": 1e-15}, "far": BOTH["far"]}
    binding = {"binding": {"b1": 0.9, "b2": 0.9, "eps": 1e-15}, "far": BOTH["far"]}
    for name, amsgrad in (("reference", False), ("amsgrad", True)):
        yield from rows_of(
            f"laprop-{name}",
            "Z-T-WANG/LaProp-Optimizer laprop.py" + ", amsgrad=True" * amsgrad,
            "laprop",
            lambda h, wd, a=amsgrad: run_torch(
                lambda p: authors(p, **torch_options(h), **wd, amsgrad=a)
            ),
            sets=binding if amsgrad else sets,
            decay=0.01,
            decay_form="after",
            convention=name,
        )


def adopt(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code with and without its clipping, with both decays; and optax's."""
    authors = load(checkouts / "adopt/src/adopt/adopt.py", "ADOPT")
    sets = {"defaults": {"b1": 0.9, "b2": 0.9999, "eps": 1e-6}, "far": BOTH["far"]}

    def package(name: str, decay: float, theirs: dict[str, Any], **ours: Any) -> list[Row]:
        rows = rows_of(
            f"adopt-reference{name}",
            "iShohei220/adopt src/adopt/adopt.py"
            + "".join(f", {k}={v}" for k, v in theirs.items()),
            "adopt",
            lambda h, wd: run_torch(
                lambda p: authors(p, **torch_options(h), **wd, **theirs, foreach=False)
            ),
            sets=sets,
            decay=decay,
            **ours,
        )
        return list(rows)

    yield from package("", 1.0, {"decouple": True})
    # Not at the defaults: where only the penalty has a gradient, ADOPT divides it by the first one
    # it saw, so that a weight of 5e-5 oscillates and multiplies a rounding by 1e10.
    yield from package("-l2", 0.1, {"decouple": False}, always_decays=True, decay_form="l2")[1:]
    unclipped = {"decouple": True, "clip_lambda": None}
    yield from package("-unclipped", 1.0, unclipped, convention="unclipped")[1:]
    rows = rows_of(
        "adopt-optax",
        "optax.contrib.adopt",
        "adopt",
        lambda h, wd: run_optax(lambda lr: optax.contrib.adopt(lr, **h)),
        sets=sets,
    )
    yield from list(rows)[::2]


def ademamix(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code with and without its warm-ups, and optax's."""
    authors = load(checkouts / "ml-ademamix/pytorch/ademamix.py", "AdEMAMix")
    sets = {
        "defaults": BOTH["defaults"] | {"b3": 0.9999, "alpha": 2.0},
        "far": BOTH["far"] | {"b3": 0.99, "alpha": 8.0},
    }

    def options(h: dict[str, float]) -> dict[str, Any]:
        more = {key: h[key] for key in ("alpha", "b3_warmup", "alpha_warmup") if key in h}
        more |= {"beta3_warmup": more.pop("b3_warmup")} if "b3_warmup" in more else {}
        return {"lr": LR, "betas": (h["b1"], h["b2"], h["b3"]), "eps": h["eps"]} | more

    warm = {"b3_warmup": 200, "alpha_warmup": 100}
    for name, chosen in (
        ("", sets),
        ("-warmups", {label: h | warm for label, h in sets.items()}),
    ):
        rows = rows_of(
            f"ademamix-reference{name}",
            "apple/ml-ademamix pytorch/ademamix.py",
            "ademamix",
            lambda h, wd: run_torch(lambda p: authors(p, **options(h), **wd)),
            sets=chosen,
            decay=1.0,
        )
        yield from list(rows)
    rows = rows_of(
        "ademamix-optax",
        "optax.contrib.ademamix",
        "ademamix",
        lambda h, wd: run_optax(lambda lr: optax.contrib.ademamix(lr, **h, **wd)),
        sets=sets,
        decay=1.0,
    )
    yield from list(rows)[::2]


def mars(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code, on vectors as on matrices, in two of its three forms."""
    authors = load(checkouts / "MARS/MARS/optimizers/mars.py", "MARS")
    sets = {
        "defaults": {"b1": 0.95, "b2": 0.99, "eps": 1e-8, "gamma": 0.025},
        "far": BOTH["far"] | {"gamma": 0.5},
    }
    for form in ("adamw", "lion"):
        yield from rows_of(
            f"mars-{form}",
            f"AGI-Arena/MARS MARS/optimizers/mars.py, mars_type=mars-{form}, optimize_1d=True",
            "mars",
            lambda h, wd, f=form: run_torch(
                lambda p: authors(
                    p, **torch_options(h), **wd, gamma=h["gamma"], mars_type=f"mars-{f}",
                    optimize_1d=True,
                )
            ),
            sets=sets,
            decay=1.0,
            convention=form,
        )  # fmt: skip


def adan(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code with both of its decays, and optax's."""
    authors = load(checkouts / "Adan/adan.py", "Adan")
    sets = {
        "defaults": {"b1": 0.98, "b2": 0.92, "b3": 0.99, "eps": 1e-8},
        "far": {"b1": 0.8, "b2": 0.5, "b3": 0.9, "eps": 1e-3},
    }

    def package(no_prox: bool, **ours: Any) -> Iterator[Row]:
        return rows_of(
            f"adan-reference{'-no-prox' * no_prox}",
            "sail-sg/Adan adan.py" + ", no_prox=True" * no_prox,
            "adan",
            lambda h, wd: run_torch(
                lambda p: authors(
                    p, lr=LR, betas=(h["b1"], h["b2"], h["b3"]), eps=h["eps"], **wd,
                    no_prox=no_prox, foreach=False,
                )
            ),
            sets=sets,
            decay=1.0,
            **ours,
        )  # fmt: skip

    yield from package(False)
    yield from list(package(True, decay_form="decoupled"))[2:]
    rows = rows_of(
        "adan-optax",
        "optax.adan(eps_root=0)",
        "adan",
        lambda h, wd: run_optax(lambda lr: optax.adan(lr, **h, **wd, eps_root=0.0)),
        sets=sets,
        decay=1.0,
        decay_form="decoupled",
        convention="optax",
    )
    yield from list(rows)[::2]


def stableadamw(checkouts: pathlib.Path) -> Iterator[Row]:
    """The author's code, which optimi keeps for its tests, and optimi's."""
    kept = "optimi/tests/reference/stableadamwunfused.py"
    author = load(checkouts / kept, "StableAdamWUnfused")
    sys.path.insert(0, str(checkouts / "optimi"))
    from optimi import StableAdamW

    sets = {"defaults": {"b1": 0.9, "b2": 0.99, "eps": 1e-6}, "far": BOTH["far"]}
    nothing = {"weight_decay": 0.0}  # which they have by default
    yield from rows_of(
        "stableadamw-author",
        f"warner-benjamin/optimi {kept.removeprefix('optimi/')}",
        "stableadamw",
        lambda h, wd: run_torch(lambda p: author(p, **torch_options(h), **(nothing | wd))),
        sets=sets,
        decay=1.0,
    )
    rows = rows_of(
        "stableadamw-optimi",
        "warner-benjamin/optimi optimi/stableadamw.py",
        "stableadamw",
        lambda h, wd: run_torch(
            lambda p: StableAdamW(p, **torch_options(h), **(nothing | wd), foreach=False)
        ),
        sets=sets,
        decay=1.0,
    )
    yield from list(rows)[::2]


def novograd(checkouts: pathlib.Path) -> Iterator[Row]:
    """NVIDIA's code, transcribed, torch_optimizer's and optax's."""
    import torch
    from torch_optimizer import NovoGrad

    def of_torch(params: list[Any], **options: Any) -> torch.optim.Optimizer:
        theirs = NovoGrad(params, **options)
        m, v = torch.zeros_like(params[0]), torch.zeros((), dtype=torch.float64)
        theirs.state[params[0]] = {"step": 0, "exp_avg": m, "exp_avg_sq": v}
        return theirs

    sets = {"defaults": {"b1": 0.95, "b2": 0.98, "eps": 1e-8}, "far": BOTH["far"]}
    roots = {
        "defaults": {"b1": 0.95, "b2": 0.98, "eps_root": 1e-8},
        "far": {"b1": 0.8, "b2": 0.9, "eps_root": 1e-3},
    }

    def nvidia(convention: str, decay: float, **ours: Any) -> list[Row]:
        averaging = convention == "averaging"
        rows = rows_of(
            f"novograd-{convention}",
            "NVIDIA/OpenSeq2Seq open_seq2seq/optimizers/novograd.py, transcribed"
            + ", grad_averaging=True" * averaging,
            "novograd",
            lambda h, wd: run_transcribed(
                lambda: transcribed.novograd(
                    h["b1"], h["b2"], h["eps_root"], **wd, averaging=averaging
                )
            ),
            sets={label: h | {"eps": 0.0} for label, h in roots.items()},
            decay=decay,
            convention=convention,
            **ours,
        )
        return list(rows)

    yield from nvidia("reference", 1.0)
    # Decay and schedule apart: with both, the first step is lost in the rounding of the weights.
    yield from nvidia("averaging", 1.0, always_decays=True)[:2]
    yield nvidia("averaging", 0.0)[-1]
    rows = rows_of(
        "novograd-torch",
        "torch_optimizer.NovoGrad, from a second moment in float64",
        "novograd",
        lambda h, wd: run_torch(lambda p: of_torch(p, **torch_options(h), **wd)),
        sets=sets,
        decay=1.0,
    )
    yield from list(rows)[::2]
    rows = rows_of(
        "novograd-optax",
        "optax.novograd",
        "novograd",
        lambda h, wd: run_optax(lambda lr: optax.novograd(lr, **h, **wd)),
        sets={label: h | {"b2": 0.25} for label, h in sets.items()},
        decay=1.0,
    )
    yield from list(rows)[::2]


def run_optax_apart(make: Callable[[optax.Schedule], Any]) -> Callable[..., Any]:
    """The parameters and the updates as optax returns them, before they are added up."""

    def run(g, start, factor, reset):
        rates = jnp.asarray([LR * factor(t) for t in range(len(g))])
        optimizer, x, made = make(lambda count: rates[count]), jnp.asarray(start), []
        state = optimizer.init(x)
        for row in g:
            update, state = optimizer.update(jnp.asarray(row), state, x)
            x = optax.apply_updates(x, update)
            made.append((x, update))
        return tuple(np.stack(list(each)) for each in zip(*made, strict=True))

    return run


def of_size_one(rows: Iterable[Row]) -> list[Row]:
    """With weights in whose units a step can be seen: it has their length. All of them decay."""
    return [dataclasses.replace(row, size=1.0) for row in rows]


def lamb(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code, transcribed; optax's and cybertronai's."""
    sys.modules.setdefault("tensorboardX", types.SimpleNamespace(SummaryWriter=None))  # for a log
    theirs = load(checkouts / "pytorch-lamb/pytorch_lamb/lamb.py", "Lamb")
    sets = {"defaults": BOTH["defaults"] | {"eps": 1e-6}, "far": BOTH["far"]}

    def rows(name: str, source: str, run_of: Callable[..., Any]) -> list[Row]:
        made = rows_of(
            f"lamb-{name}", source, "lamb", run_of,
            sets=sets, decay=1.0, always_decays=True, convention=name,
        )  # fmt: skip
        return of_size_one(made)

    albert = "google-research/albert lamb_optimizer.py, transcribed, in long double"
    yield from rows(
        "reference", albert, lambda h, wd: run_transcribed(lambda: transcribed.lamb(**h, **wd))
    )
    yield from rows(
        "optax", "optax.lamb", lambda h, wd: run_optax_apart(lambda lr: optax.lamb(lr, **h, **wd))
    )
    yield from rows(
        "cybertronai",
        "cybertronai/pytorch-lamb pytorch_lamb/lamb.py",
        lambda h, wd: run_torch(lambda p: theirs(p, **torch_options(h), **wd)),
    )[:2]


def lars(checkouts: pathlib.Path) -> Iterator[Row]:
    """optax's, and that of facebookresearch/mae, transcribed: it does not scale vectors."""
    sets = {
        "defaults": {"learning_rate": 10.0, "momentum": 0.9, "trust_coefficient": 1e-3},
        "far": {"learning_rate": 1.0, "momentum": 0.5, "trust_coefficient": 0.01},
    }

    def of_optax(lr: optax.Schedule, learning_rate: float, **h: float) -> Any:
        return optax.lars(lambda count: learning_rate / LR * lr(count), **h)

    def of_mae(h: dict[str, float], wd: dict[str, float]) -> Any:
        own = {key: value for key, value in h.items() if key != "learning_rate"}
        step = transcribed.lars(**own, **wd)
        return lambda x, g, lr: step(x, g, h["learning_rate"] / LR * lr)

    rows = rows_of(
        "lars-optax",
        "optax.lars",
        "lars",
        lambda h, wd: run_optax_apart(lambda lr: of_optax(lr, **h, **wd)),
        sets=sets,
        decay=1.0,
        always_decays=True,
    )
    yield from of_size_one(rows)
    mae = rows_of(
        "lars-mae",
        "facebookresearch/mae util/lars.py, transcribed, in long double",
        "lars",
        lambda h, wd: run_transcribed(lambda: of_mae(h, wd)),
        sets=sets,
        decay=1.0,
        always_decays=True,
        convention="mae",
    )
    yield from of_size_one(mae)


def adam_atan2(checkouts: pathlib.Path) -> Iterator[Row]:
    """lucidrains' code: the authors published none."""
    theirs = load(checkouts / "adam-atan2-pytorch/adam_atan2_pytorch/adam_atan2.py", "AdamAtan2")
    sets = {
        "defaults": {"b1": 0.9, "b2": 0.99, "scale": 1.27, "b": 1.0},
        "far": {"b1": 0.8, "b2": 0.9, "scale": 0.5, "b": 0.1},
    }
    yield from rows_of(
        "adam_atan2-lucidrains",
        "lucidrains/adam-atan2-pytorch adam_atan2_pytorch/adam_atan2.py",
        "adam_atan2",
        lambda h, wd: run_torch(
            lambda p: theirs(p, lr=LR, betas=(h["b1"], h["b2"]), a=h["scale"], b=h["b"], **wd)
        ),
        sets=sets,
        decay=1.0,
    )


def run_torch_shaped(make: Callable[..., Any], shape: tuple[int, ...]) -> Callable[..., Any]:
    """run_torch for weights in another shape."""
    import torch

    def run(g, start, factor, reset):
        assert not reset
        x = torch.nn.Parameter(torch.tensor(start.reshape(shape)))
        optimizer, path = make([x]), []
        for t, row in enumerate(g):
            optimizer.param_groups[0]["lr"] = LR * factor(t)
            x.grad = torch.tensor(row.reshape(shape))
            optimizer.step()
            path.append(x.detach().numpy().reshape(-1).copy())
        return np.stack(path)

    return run


def adamp(checkouts: pathlib.Path) -> Iterator[Row]:
    """The authors' code, for one channel of five weights, and for five of one."""
    authors = load(checkouts / "AdamP/adamp/adamp.py", "AdamP")
    sets = {
        "defaults": BOTH["defaults"] | {"delta": 0.1, "wd_ratio": 0.1},
        "far": BOTH["far"] | {"delta": 1.5, "wd_ratio": 0.5},
    }
    for name, shape in (("", (1, 5)), ("-channels", (5, 1))):
        rows = rows_of(
            f"adamp-reference{name}",
            "clovaai/AdamP adamp/adamp.py",
            "adamp",
            lambda h, wd, s=shape: run_torch_shaped(
                lambda p: authors(
                    p, **torch_options(h), **wd, delta=h["delta"], wd_ratio=h["wd_ratio"]
                ),
                s,
            ),
            sets=sets,
            decay=1.0,
            always_decays=True,
            channels="first",
        )
        yield from [dataclasses.replace(row, shape=shape) for row in rows]


def forms_of_decay(checkouts: pathlib.Path) -> Iterator[Row]:
    """Every recipe in every form of weight decay that no other row has."""
    import keras
    import pytorch_optimizer
    import torch

    torch.set_default_dtype(torch.float64)  # or NAdam keeps its product of momenta in float32
    optim, far = torch.optim, BOTH["far"]

    def row(
        name: str,
        source: str,
        recipe: str,
        run_of: Callable[..., Any],
        decay: float,
        form: str,
        h: dict[str, float] = far,
        **ours: Any,
    ) -> Row:
        """The one with the decay and a schedule."""
        *_, last = rows_of(
            f"{recipe}-{name}-{form}",
            source,
            recipe,
            run_of,
            sets={"far": h},
            decay=decay,
            decay_form=form,
            **ours,
        )
        return last

    def of_torch(
        name: str, recipe: str, source: str, decay: float, form: str, **theirs: Any
    ) -> Row:
        options = {"foreach": False} | theirs
        made = getattr(optim, source)
        return row(
            name,
            f"torch.optim.{source}({', '.join(f'{k}={v}' for k, v in theirs.items())})",
            recipe,
            lambda h, wd: run_torch(lambda p: made(p, **torch_options(h), **wd, **options)),
            decay,
            form,
        )

    yield of_torch("torch", "adam", "Adam", 0.1, "l2")
    yield of_torch("torch", "adam", "Adam", 1.0, "decoupled", decoupled_weight_decay=True)
    yield of_torch("torch", "amsgrad", "Adam", 0.1, "l2", amsgrad=True)
    yield of_torch("torch", "amsgrad", "AdamW", 1.0, "decoupled", amsgrad=True)
    yield of_torch("torch", "nadam", "NAdam", 1.0, "decoupled", decoupled_weight_decay=True)
    yield row(
        "optax",
        "optax.chain of scale_by_adam, the learning rate and add_decayed_weights",
        "adamw",
        lambda h, wd: run_optax(
            lambda lr: optax.chain(
                optax.scale_by_adam(**h),
                optax.scale_by_schedule(lr),
                optax.add_decayed_weights(**wd),
                optax.scale(-1.0),
            )
        ),
        0.01,
        "constant",
    )
    yield row(
        "optax",
        "optax.chain of Algorithm 2 of AdamW's paper, with Nesterov momentum",
        "nadamw",
        lambda h, wd: run_optax(
            lambda lr: optax.chain(
                optax.scale_by_adam(**h, nesterov=True),
                optax.scale(LR),
                optax.add_decayed_weights(**wd),
                optax.scale_by_schedule(lambda t: -lr(t) / LR),
            )
        ),
        1.0,
        "independent",
        convention="optax",
    )
    yield row(
        "optax",
        "optax.adamaxw",
        "adamax",
        lambda h, wd: run_optax(lambda lr: optax.adamaxw(lr, **h, **({"weight_decay": 0.0} | wd))),
        1.0,
        "decoupled",
    )

    def of_keras(source: str, recipe: str, h: dict[str, float], names: dict[str, str], **ours: Any):
        made = getattr(keras.optimizers, source)
        return row(
            "keras",
            f"keras.optimizers.{source}",
            recipe,
            lambda h, wd: run_keras(
                lambda: made(LR, **{names.get(k, k): v for k, v in h.items()}, **wd)
            ),
            1.0,
            "decoupled",
            h,
            **ours,
        )

    yield of_keras("SGD", "sgd", {"momentum": 0.8}, {}, convention="keras")
    yield of_keras("SGD", "sgdw", {"momentum": 0.8, "nesterov": True}, {}, convention="paper")
    rms = {"b2": 0.99, "eps": 1e-3, "momentum": 0.8}
    yield of_keras("RMSprop", "rmsprop", rms, {"b2": "rho", "eps": "epsilon"}, convention="keras")
    total = {"initial_accumulator_value": 0.1, "eps": 1e-3}
    yield of_keras("Adagrad", "adagrad", total, {"eps": "epsilon"}, convention="keras")
    yield of_keras("Adadelta", "adadelta", {"rho": 0.5, "eps": 1e-3}, {"eps": "epsilon"})

    def of_package(
        source: str, recipe: str, form: str, h: dict[str, float], rooted: bool = False, **ours: Any
    ) -> Row:
        """pytorch_optimizer, where it adds 1e-15 under the root without that."""
        made = getattr(pytorch_optimizer, source)
        theirs = {"weight_decouple": form != "l2", "fixed_decay": form == "constant"}
        theirs |= {"ams_bound": True} if recipe == "amsbound" else {}
        shown = ", ".join(f"{k}={v}" for k, v in theirs.items())
        run = without_roots if rooted else lambda run: run
        names = {"final_learning_rate": "final_lr"}

        def options(h: dict[str, float]) -> dict[str, Any]:
            betas = tuple(h[b] for b in ("b1", "b2", "b3") if b in h)
            numbers = {names.get(k, k): v for k, v in h.items() if k not in ("b1", "b2", "b3")}
            return {"lr": LR, "betas": betas, "foreach": False} | numbers

        return row(
            "pytorch_optimizer",
            f"pytorch_optimizer.{source}({shown}){', without 1e-15 in its root' * rooted}",
            recipe,
            lambda h, wd: run(
                run_torch(lambda p: made(p, **options(h), **({"weight_decay": 0.0} | wd), **theirs))
            ),
            {"l2": 0.1, "decoupled": 1.0, "constant": 0.01}[form],
            form,
            h,
            **ours,
        )

    for form in ("l2", "constant"):
        yield of_package("AdaMod", "adamod", form, far | {"b3": 0.95})
        yield of_package("Lion", "lion", form, {"b1": 0.8, "b2": 0.9})
    for form in ("decoupled", "constant"):
        yield of_package("DiffGrad", "diffgrad", form, far, rooted=True)
    bounds = far | {"final_learning_rate": 0.5, "gamma": 0.05}
    for recipe, form in (
        ("adabound", "decoupled"),
        ("amsbound", "decoupled"),
        ("amsbound", "constant"),
    ):
        yield of_package("AdaBound", recipe, form, bounds, rooted=True, base_learning_rate=LR)


def without_roots(run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    """Run an implementation of pytorch_optimizer without the 1e-15 that it adds to v."""
    from pytorch_optimizer.base.optimizer import BaseOptimizer

    rooted = BaseOptimizer.apply_ams_bound

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> np.ndarray:
        added, rooted.__defaults__ = rooted.__defaults__, (0.0,)
        try:
            return run(*args, **kwargs)
        finally:
            rooted.__defaults__ = added

    return wrapped


METHODS = {
    method.__name__: method
    for method in (
        adabelief,
        lion,
        yogi,
        laprop,
        adopt,
        ademamix,
        mars,
        adan,
        stableadamw,
        novograd,
        lamb,
        lars,
        adam_atan2,
        adamp,
        forms_of_decay,
    )
}


def version(source: str, checkouts: pathlib.Path) -> dict[str, str]:
    """The version of a source's package, or the commit of its ``owner/repository``."""
    first = source.split()[0].rstrip(",")
    if first in transcribed.COMMITS:
        return {first: transcribed.COMMITS[first]}
    if "/" in first:
        return {first: commit(checkouts / first.split("/")[1])}
    return installed(first.split(".")[0])


def stored(folder: pathlib.Path) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """The rows of the manifest by name, and the arrays; empty where nothing is recorded."""
    manifest = folder / f"{NAME}.json"
    if not manifest.exists():
        return {}, {}
    with np.load(folder / f"{NAME}.npz") as arrays:
        return {row["name"]: row for row in json.loads(manifest.read_text())}, dict(arrays)


def add(rows: Iterable[Row], checkouts: pathlib.Path, again: set[str]) -> None:
    """Record the rows that are not recorded yet, or named in ``again``, beside the others."""
    recorded, arrays = stored(HERE)
    table = {row.name: row for row in rows}
    if again - table.keys():
        raise SystemExit(f"no such rows: {', '.join(sorted(again - table.keys()))}")
    for name in (recorded.keys() & table.keys()) - again:
        if any(recorded[name][key] != getattr(table[name], key) for key in WHAT_IT_IS):
            raise SystemExit(f"{name} is recorded, and is another there: --again {name} renews it")
    wanted = [row for name, row in table.items() if name in again or name not in recorded]
    versions = {}
    for row in wanted:
        versions |= version(row.source, checkouts)
    with tempfile.TemporaryDirectory() as folder:
        save(f"{folder}/{NAME}", iter(wanted), versions, PARAMETERS_EVERY)
        new_rows, new_arrays = stored(pathlib.Path(folder))
    gradients = new_arrays["gradients"]
    np.testing.assert_array_equal(arrays.get("gradients", gradients), gradients)
    np.savez_compressed(HERE / f"{NAME}.npz", **(arrays | new_arrays))
    manifest = json.dumps(list((recorded | new_rows).values()), indent=1)
    (HERE / f"{NAME}.json").write_text(manifest + "\n")
    print(f"now {len(recorded | new_rows)} in {NAME}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="*", metavar="METHOD", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--checkouts", type=pathlib.Path, required=True)
    parser.add_argument("--again", action="append", default=[], metavar="ROW")
    given = parser.parse_args()
    rows = [row for name in given.methods or METHODS for row in METHODS[name](given.checkouts)]
    add(rows, given.checkouts, set(given.again))


if __name__ == "__main__":
    main()
