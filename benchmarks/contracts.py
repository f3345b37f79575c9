"""What ``adaptive_opt.testing`` finds in every optimizer of optax: docs/optax_contracts.md.

python -m benchmarks.contracts                     # all of them, and renews the page
python -m benchmarks.contracts --only adam lion    # prints the reports of some
"""

from __future__ import annotations

import argparse
import datetime
import functools
import inspect
import multiprocessing
import pathlib
import platform
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.testing import CONTRACTS, Report, check
from benchmarks.pages import renew

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "optax_contracts.md"
BEGIN, END = "<!-- begin: python -m benchmarks.contracts -->", "<!-- end -->"
OTHERS = {"dpsgd": "takes the gradients of single examples"}
"""Optimizers that no training step can be given, with the reason."""
SETTINGS: dict[str, dict[str, Any]] = {
    "noisy_sgd": {"key": 0},
    "lbfgs": {"linesearch": None},
    "galore": {"rank": 2},
}
"""What they need, or without which they are something else."""
EXTRA: dict[str, dict[str, Any]] = {
    "sophia": {"obj_fn": lambda params: sum(jnp.sum(x**2) for x in jax.tree.leaves(params))}
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd, momentum": ("sgd", {"momentum": 0.9}),
    "rmsprop, centered, momentum": ("rmsprop", {"centered": True, "momentum": 0.9}),
    "ademamix, mu_dtype=bfloat16": ("ademamix", {"mu_dtype": jnp.bfloat16}),
}
LAWS = {"adam": 0.0, "amsgrad": 0.0, "lion": 0.0, "sign_sgd": 0.0, "signum": 0.0}
LAWS |= {"adabelief": 0.0, "adamax": 0.0, "lamb": 0.0, "sgd": 1.0, "sgd, momentum": 1.0}
"""The laws of scale that their papers state."""


def optimizers() -> dict[str, tuple[Callable[..., Any], float]]:
    """Every optimizer of optax as a function of a learning rate, and the rate it is asked at.

    An optimizer is what optax exports with a learning rate as its first argument.
    """
    found = {}
    for name, function in [*vars(optax).items(), *vars(optax.contrib).items()]:
        if inspect.isfunction(function) and not name.startswith(("_", "scale_by")):
            first = next(iter(inspect.signature(function).parameters.values()), None)
            rates = ("learning_rate", "max_learning_rate")
            is_alias = function.__module__.rpartition(".")[2] == "alias" or "contrib" in (
                function.__module__
            )
            if first and first.name in rates and is_alias and name not in OTHERS:
                found[name] = _made(function, first, SETTINGS.get(name, {}))
    for variant, (name, settings) in VARIANTS.items():
        function = getattr(optax, name, None) or getattr(optax.contrib, name)
        first = next(iter(inspect.signature(function).parameters.values()))
        found[variant] = _made(function, first, settings)
    return dict(sorted(found.items()))


def _made(
    function: Callable[..., Any], first: inspect.Parameter, settings: dict[str, Any]
) -> tuple[Callable[..., Any], float]:
    rate = first.default if isinstance(first.default, float) else 1e-2
    if first.name != "learning_rate":
        return lambda learning_rate: function(**{first.name: learning_rate}, **settings), rate
    return functools.partial(function, **settings), rate


def report_of(name: str) -> Report:
    if jax.device_count() < 8:
        raise RuntimeError("the contract of shardings wants eight devices.")
    factory, rate = optimizers()[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return check(
            factory, learning_rate=rate, extra=EXTRA.get(name), gradient_scaling=LAWS.get(name)
        )


def eight_devices() -> None:
    jax.config.update("jax_num_cpu_devices", 8)


def page(reports: dict[str, Report]) -> str:
    """Both tables: by contract, and by optimizer."""
    versions = f"optax {optax.__version__}, jax {jax.__version__}, Python"
    today = datetime.datetime.now(tz=datetime.UTC).date()
    lines = [
        f"{len(reports)} optimizers, {len(CONTRACTS)} contracts; {versions}"
        f" {platform.python_version()}, {jax.default_backend()}; {today}.",
        "",
        "## By contract",
        "",
        "| contract | why | broken by |",
        "|---|---|---|",
    ]
    for one in CONTRACTS.values():
        breaks = [n for n, r in reports.items() if one.name in [x.contract for x in r.broken]]
        who = ", ".join(f"`{n}`" for n in breaks)
        count = {0: "none", len(reports): f"all {len(reports)}"}.get(len(breaks))
        lines.append(f"| `{one.name}` | {one.reason} | {count or f'{len(breaks)}: {who}'} |")
    lines += ["", "## By optimizer", ""]
    for name, report in reports.items():
        held = sum(r.outcome == "holds" for r in report)
        lines += [f"### {name}", "", f"{held} hold, {len(report.broken)} are broken.", ""]
        lines += [f"* `{r.contract}`: {_plain(r.case)}" for r in report.broken]
        lines += [""] * bool(report.broken)
    return "\n".join(lines).rstrip()


def _plain(text: str) -> str:
    """Text without what Markdown or a page of one line cannot hold."""
    return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")


def reports_of(names: Iterable[str], processes: int | None) -> dict[str, Report]:
    names = list(names)
    context, found = multiprocessing.get_context("spawn"), {}
    with context.Pool(processes, initializer=eight_devices, maxtasksperchild=8) as pool:
        for name, report in zip(names, pool.imap(report_of, names), strict=True):
            print(f"{name}: {len(report.broken)} are broken", flush=True)
            found[name] = report
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", help="print the reports of these")
    parser.add_argument("--processes", type=int)
    given = parser.parse_args()
    if given.only:
        for name, report in reports_of(given.only, given.processes).items():
            print(f"\n{name}\n{report}")
    else:
        renew(PAGE, BEGIN, page(reports_of(optimizers(), given.processes)), END)


if __name__ == "__main__":
    main()
