"""Records what came after the family, and adds to what is recorded without rewriting it.

    pip install -r tests/references/requirements.txt
    git clone https://github.com/google/automl
    python tests/references/record_successors.py --checkouts . [METHOD ...] [--again ROW ...]

Like record_family.py, into ``successors.npz`` and ``successors.json``, with the parameters of every
fiftieth step. A method is one function that yields its rows, named in METHODS; it imports what it
runs itself, so that one method can be recorded where what another needs no longer installs. Rows
that are recorded stay as they are, to the bit; ``--again`` renews the one it names.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import optax
from record import (
    BOTH,
    HERE,
    LR,
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


METHODS = {method.__name__: method for method in (adabelief, lion, forms_of_decay)}


def version(source: str, checkouts: pathlib.Path) -> dict[str, str]:
    """The version of a source's package, or the commit of its ``owner/repository``."""
    first = source.split()[0]
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
