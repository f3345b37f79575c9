"""``python -m adaptive_opt``: the recipes, what one of them is made of, and a check of it."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from adaptive_opt import RECIPES, describe, make
from adaptive_opt.core.checks import nearest
from adaptive_opt.core.describe import shown
from adaptive_opt.testing import Report, check

EPILOG = """examples:
  python -m adaptive_opt
  python -m adaptive_opt adamod --convention paper
  python -m adaptive_opt adamw weight_decay=0.1 decay=independent
  python -m adaptive_opt --check adamw weight_decay=0.1
"""


def listed() -> str:
    """Every recipe in a line: its name, what it is, its conventions."""
    width = max(map(len, RECIPES)) + 2
    lines = []
    for name, recipe in RECIPES.items():
        lines.append(f"{name:<{width}}{_title(recipe)}")
        if conventions := _choices(recipe).get("convention"):
            lines.append(f"{'':<{width}}  convention: {', '.join(conventions)}")
    return "\n".join(lines)


def described(name: str, settings: dict[str, Any]) -> str:
    """A recipe's arguments, what they may be, and its stages with these settings.

    Arguments without a default, the learning rate, are 0.001. ValueError for a name that is none,
    and what the recipe raises for its settings.
    """
    check_name(name)
    recipe = RECIPES[name]
    parameters = inspect.signature(recipe).parameters.values()
    given = {p.name: 1e-3 for p in parameters if p.default is p.empty} | settings
    optimizer = made(name, given)
    lines = [f"{name}: {_title(recipe)}", "", "arguments:"]
    width = max(len(p.name) for p in parameters) + 2
    for p in parameters:
        default = "" if p.default is p.empty else f"= {shown(p.default)}"
        choices = _choices(recipe).get(p.name)
        of = f"  (one of {', '.join(map(str, choices))})" if choices else ""
        lines.append(f"  {p.name:<{width}}{default}{of}".rstrip())
    lines += ["", f"stages with {', '.join(f'{k}={v}' for k, v in given.items())}:"]
    lines += ["  " + line for line in str(describe(optimizer)).splitlines()]
    return "\n".join(lines)


def checked(name: str, settings: dict[str, Any]) -> Report:
    """The contracts of ``adaptive_opt.testing``, of a recipe with these settings."""
    check_name(name)
    rate = settings.get("learning_rate", 1e-2)
    made(name, settings | {"learning_rate": rate})  # or an error of its own
    return check(lambda lr: made(name, settings | {"learning_rate": lr}), learning_rate=rate)


def made(name: str, settings: dict[str, Any]) -> Any:
    return make({"name_" if k == "name" else k: v for k, v in settings.items()} | {"name": name})


def check_name(name: str) -> None:
    if name not in RECIPES:
        near = nearest(name, RECIPES)
        hint = f"did you mean {near}? " if near else ""
        raise ValueError(
            f"there is no recipe {name!r}; {hint}python -m adaptive_opt lists all of them."
        )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m adaptive_opt", description="Lists the recipes, describes or checks one.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("recipe", nargs="?", help="the name of a recipe; without one, all of them")
    parser.add_argument("settings", nargs="*", metavar="name=value", help="arguments of the recipe")
    parser.add_argument("--convention", help="whose version of the recipe")
    parser.add_argument("--check", action="store_true", help="ask it what training loops rely on")
    given = parser.parse_intermixed_args(arguments)
    if given.recipe is None:
        if given.convention is not None or given.check:
            option = "--check" if given.check else "--convention paper"
            parser.error(f"{option.split()[0]} is of a recipe: say adamod {option}")
        print(listed())
        return 0
    settings: dict[str, Any] = {}
    for text in given.settings:
        name, equals, value = text.partition("=")
        if not equals or not name:
            parser.error(f"settings are name=value, such as weight_decay=0.1, got {text!r}")
        if name in settings or (name == "convention" and given.convention is not None):
            parser.error(f"{name} was given twice")
        settings[name] = _parsed(value)
    if given.convention is not None:
        settings["convention"] = given.convention
    try:
        if given.check:
            report = checked(given.recipe, settings)
            print(report)
            return int(bool(report.broken))
        print(described(given.recipe, settings))
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    return 0


def _title(recipe: Any) -> str:
    """The first paragraph of its docstring, in a line, without the marks of code."""
    return " ".join((inspect.getdoc(recipe) or "").partition("\n\n")[0].split()).replace("``", "")


def _choices(recipe: Any) -> Mapping[str, tuple[Any, ...]]:
    return recipe.choices


def _parsed(value: str) -> Any:
    """JSON where it is, and a string where it is not: 0.1, true, null, paper."""
    try:
        return json.loads(value)
    except ValueError:
        return {"None": None, "True": True, "False": False}.get(value, value)


if __name__ == "__main__":
    sys.exit(main())
