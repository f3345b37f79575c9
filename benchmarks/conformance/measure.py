"""Measures every method of every library: departures from the reference and from ours."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import io
import platform
import warnings
from typing import Any

import numpy as np

import adaptive_opt
from benchmarks.conformance import running
from benchmarks.conformance.compare import ROUNDING, departure
from benchmarks.conformance.libraries import NAMES, Entry, module_of
from benchmarks.conformance.truth import METHODS, Case, Method

RUNNERS = {"jax": running.of_optax, "torch": running.of_torch, "keras": running.of_keras}
OURS = "adaptive_opt"


def of_ours(method: Method) -> dict[str, Any]:
    """The recipe against the reference."""
    made = {name: running.ours(case) for name, case in method.cases.items()}
    return {"cases": {name: _apart(made[name], case) for name, case in method.cases.items()}}


def of_library(library: str, method: Method, entry: Entry) -> dict[str, Any]:
    """What the library makes against the reference, and against ours in the convention named."""
    run = RUNNERS[NAMES[library].partition("_")[0]]
    casts = running.torch_without_casts if entry.casts_out else contextlib.nullcontext
    cases = {n: c for n, c in method.cases.items() if not {*entry.lacks} & {*c.arguments}}
    found: dict[str, Any] = {"cases": {}, "differs": entry.differs}
    found |= {"note": entry.note} if entry.note else {}
    found |= {"casts taken out": True} if entry.casts_out else {}
    nearest = []
    for name, case in cases.items():
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), casts():
            warnings.simplefilter("ignore")
            made = run(entry.make, case)
        found["cases"][name] = _apart(made, case)
        if entry.ours is not None:
            ours = entry.ours(case.arguments) if callable(entry.ours) else entry.ours
            nearest.append(departure(made, running.ours(case, ours), case.start).by)
            # What is calculated from h is another number in every row.
            same = found.setdefault("ours", ours)
            found["ours"] = {k: v if v == same[k] else "..." for k, v in ours.items()}
    if len(cases) < len(method.cases):
        found["lacks"] = [*entry.lacks]
    if nearest:
        found["from ours by"] = max(nearest)
    return found


def _apart(made: np.ndarray, case: Case) -> dict[str, Any]:
    return dataclasses.asdict(departure(made, case.path, case.start))


def faults(results: dict[str, Any]) -> list[str]:
    """Departures without words, words without a departure, and conventions that are not it."""
    found = []
    for method, libraries in results.items():
        for library, cell in libraries.items():
            departs = any(c["step"] for c in cell["cases"].values())
            if library == OURS and departs:
                found.append(f"{library} {method}: departs from its reference")
            elif library != OURS and departs != bool(cell["differs"]):
                found.append(f"{library} {method}: {'no words' if departs else 'nothing differs'}")
            if cell.get("from ours by", 0.0) > ROUNDING:
                found.append(f"{library} {method}: not {cell['ours']}, {cell['from ours by']:.1e}")
    return found


def versions() -> dict[str, str]:
    packages = [package for library in NAMES for package in module_of(library).PACKAGES]
    found = {name: importlib.metadata.version(name) for name in ("jax", *packages)}
    return {OURS: adaptive_opt.__version__, "Python": platform.python_version()} | found


def everything() -> dict[str, Any]:
    """By method and library."""
    results: dict[str, Any] = {}
    for name in METHODS:
        results[name] = {OURS: of_ours(METHODS[name])}
        for library in NAMES:
            entry = module_of(library).TABLE.get(name)
            if entry is not None:
                results[name][library] = of_library(library, METHODS[name], entry)
                print(f"{name}: {library}", flush=True)
    return results
