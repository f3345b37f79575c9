"""The page of what was measured: docs/conformance.md."""

from __future__ import annotations

import pathlib
from typing import Any

from benchmarks.conformance.compare import EXACT
from benchmarks.conformance.libraries import NAMES
from benchmarks.conformance.measure import OURS
from benchmarks.conformance.truth import METHODS

ROOT = pathlib.Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance.md"
DATA = ROOT / "benchmarks" / "results" / "conformance.json"
BEGIN, END = "<!-- begin: python -m benchmarks.conformance -->", "<!-- end -->"


def page(found: dict[str, Any]) -> str:
    """The table of all, and what each method is compared with."""
    results = found["methods"]
    libraries = [OURS, *NAMES]
    cells = [cell for row in results.values() for cell in row.values()]
    exact = sum(_worst(cell) <= EXACT for cell in cells)
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"{len(results)} methods, {len(cells)} cells, {exact} of them exact. {found['date']};"
        f" {versions}.",
        "",
        f"| method | {' | '.join(libraries)} |",
        f"|---|{'---|' * len(libraries)}",
    ]
    for method, row in results.items():
        link = f"[{method}](#{method})"
        lines.append(f"| {link} | {' | '.join(_short(row.get(name)) for name in libraries)} |")
    for method, row in results.items():
        lines += ["", *_section(method, row)]
    return "\n".join(lines)


def _worst(cell: dict[str, Any]) -> float:
    return max(case["by"] for case in cell["cases"].values())


def _short(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    worst = _worst(cell)
    return ("exact" if worst <= EXACT else f"{worst:.0e}") + "*" * ("lacks" in cell)


def _section(method: str, row: dict[str, Any]) -> list[str]:
    reference = METHODS[method]
    lines = [
        f"## {method}",
        "",
        f"`{reference.source}`: {reference.whose}. {_listed(reference.cases)}.",
        "",
        "| library | by how much | what differs | here |",
        "|---|---|---|---|",
    ]
    for library in [OURS, *NAMES]:
        if library not in row:
            continue
        cell = row[library]
        lines.append(f"| {library} | {_cases(cell)} | {_words(cell)} | {_ours(cell)} |")
    return lines


def _cases(cell: dict[str, Any]) -> str:
    """Exact, or each row that departs with its step and size."""
    alike: dict[str, list[str]] = {}
    for name, case in cell["cases"].items():
        said = f"from step {case['step']}, by {case['by']:.0e}" if case["step"] else "exact"
        alike.setdefault(said, []).append(name)
    if len(alike) == 1:
        return next(iter(alike))
    return "; ".join(f"{_listed(names)}: {said}" for said, names in alike.items())


def _words(cell: dict[str, Any]) -> str:
    said = [cell["differs"]] if cell.get("differs") else []
    said += [cell["note"]] if "note" in cell else []
    said += ["its casts to fewer bits taken out"] if "casts taken out" in cell else []
    said += [f"has no {_listed(cell['lacks'])}: rows left out"] if "lacks" in cell else []
    return "; ".join(said).replace("|", "\\|")


def _ours(cell: dict[str, Any]) -> str:
    if "ours" not in cell:
        return ""
    arguments = ", ".join(f"{name}={_value(value)}" for name, value in cell["ours"].items())
    return f"`{arguments}`"


def _value(value: Any) -> str:
    return "..." if value == "..." else repr(value).replace("'", '"')


def _listed(names: Any) -> str:
    return ", ".join(f"`{name}`" for name in names)
