"""Draw recipes as lists of their stages, as `describe` gives them, and renew the tables of recipes.

python examples/draw_stages.py --output examples/images/stages.png
python examples/draw_stages.py --pages
"""

from __future__ import annotations

import argparse
import inspect
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import matplotlib
import numpy as np
import optax

import adaptive_opt
from adaptive_opt import describe

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyBboxPatch

DRAWN = {
    "adam": adaptive_opt.adam(1e-3),
    "adamw": adaptive_opt.adamw(1e-3),
    "amsgrad, as in PyTorch": adaptive_opt.amsgrad(1e-3),
    "amsgrad, as in optax": adaptive_opt.amsgrad(1e-3, convention="optax"),
    "adamod, as in the paper": adaptive_opt.adamod(1e-3, convention="paper", weight_decay=1e-2),
    "adamod, as released": adaptive_opt.adamod(1e-3, weight_decay=1e-2),
    "diffgrad": adaptive_opt.diffgrad(1e-3, weight_decay=1e-2),
    "diffmod": adaptive_opt.diffmod(1e-3, weight_decay=1e-2),
}

ROOT = pathlib.Path(__file__).parent.parent
GROUPS = {  # from pale to dark, so that print in grey tells them apart
    "moments": ("#D9EAF7", ("first_moment", "second_moment", "debias", "amsgrad_max")),
    "rate of each weight": (
        "#F0B95A",
        ("per_weight_rate", "scale_rate", "debias_rate", "adamod_momental_bound"),
    ),
    "friction": ("#4FAE8B", ("diffgrad_friction",)),
    "plain updates": ("#FFFFFF", ()),
}


def colour_of(stage: str) -> str:
    return next((colour for colour, names in GROUPS.values() if stage in names), "#FFFFFF")


def stages_of(recipe: optax.GradientTransformation) -> list[str]:
    """The names of its stages; the sign at the end of a chain is none."""
    return [part.name for part in describe(recipe).stages() if part.name != "scale"]


def broken(name: str, width: int = 13) -> str:
    """A long name over several lines, broken after underscores."""
    lines = [""]
    for word in name.replace("_", "_ ").split():
        if len(lines[-1] + word) > width:
            lines.append("")
        lines[-1] += word
    return "\n".join(lines)


def listing(recipe: optax.GradientTransformation) -> str:
    """The stages of a recipe on one line, decays and signs left out where they do nothing."""
    names = []
    for part in describe(recipe).stages():
        idle = part.settings.get("weight_decay", 1) == 0
        if part.name != "scale" and not idle:
            names.append(f"`{part.name}`")
    return " → ".join(names)


def ours() -> dict[str, Any]:
    """The recipes of the library, without somebody's own."""
    recipes = adaptive_opt.RECIPES.items()
    return {n: made for n, made in recipes if str(made.__module__).startswith("adaptive_opt.")}


def stages_table() -> str:
    """Every recipe in every convention as a list of stages."""
    lines = ["| recipe | stages |", "|---|---|"]
    for name, recipe in ours().items():
        conventions = recipe.choices.get("convention", ())
        momentum = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
        lists: dict[str, list[str]] = {}
        for convention in conventions or (None,):
            given = momentum | ({"convention": convention} if convention else {})
            lists.setdefault(listing(recipe(1e-3, **given)), []).append(convention)
        for stages, which in lists.items():
            said = f" ({', '.join(which)})" if which != [None] else ""
            lines.append(f"| `{name}`{said} | {stages} |")
    return "\n".join(lines)


def buffers_of(recipe: Callable[..., optax.GradientTransformation]) -> int:
    """How many numbers it keeps for a weight of a square matrix, as it comes."""
    weights = jax.ShapeDtypeStruct((128, 128), np.float32)
    state = jax.eval_shape(recipe(1e-3).init, weights)
    return sum(leaf.size for leaf in jax.tree.leaves(state)) // weights.size


def paragraph(recipe: Any, begin: str = "") -> str:
    """The first paragraph of its docstring that begins so, on one line of Markdown."""
    paragraphs = (inspect.getdoc(recipe) or "").split("\n\n")
    found = next((each for each in paragraphs if each.startswith(begin)), "")
    return " ".join(found.split()).replace("``", "`").replace("|", "\\|")


def recipes_table() -> str:
    """A line for every recipe, from its docstring and its signature."""
    lines = ["| recipe | what it does | conventions | buffers |", "|---|---|---|---:|"]
    for name, recipe in ours().items():
        what = paragraph(recipe).removesuffix(".")
        conventions = ", ".join(recipe.choices.get("convention", ()))
        lines.append(f"| `{name}` | {what} | {conventions} | {buffers_of(recipe)} |")
    return "\n".join(lines)


def advice_table() -> str:
    """When to use each recipe and when not, from its docstring."""
    lines = ["| recipe | when | when not |", "|---|---|---|"]
    for name, recipe in ours().items():
        lines.append(
            f"| `{name}` | {paragraph(recipe, 'Use it')} | {paragraph(recipe, 'Do without it')} |"
        )
    return "\n".join(lines)


def recorded(name: str) -> dict[tuple[str, str, str], int]:
    """The public code it is tested against: how many runs of a convention, source and version."""
    default = inspect.signature(ours()[name]).parameters.get("convention")
    runs: dict[tuple[str, str, str], int] = {}
    for manifest in sorted((ROOT / "tests" / "references").glob("*.json")):
        rows = json.loads(manifest.read_text())
        for row in rows if isinstance(rows, list) else ():
            if row["recipe"].split()[-1] == name and "modifiers" not in row:
                convention = row["arguments"].get("convention", default.default if default else "")
                key = (convention, row["source"], row.get("version", "")[:12])
                runs[key] = runs.get(key, 0) + 1
    return runs


def equals_table() -> str:
    """What each recipe equals, by convention, from the data that the tests compare it with."""
    lines = ["| recipe | convention | equals (float64, 1e-12) |", "|---|---|---|"]
    for name in ours():
        sources: dict[str, list[str]] = {}
        for convention, source, _ in sorted(recorded(name)):
            sources.setdefault(convention, []).append(f"`{source}`")
        lines += [f"| `{name}` | {c} | {', '.join(found)} |" for c, found in sources.items()]
    return "\n".join(lines)


def chapters_table() -> str:
    """The recipes by the file they are in, whose first line says what they have in common."""
    chapters: dict[str, list[str]] = {}
    for name, recipe in ours().items():
        chapters.setdefault(recipe.__module__, []).append(f"`{name}`")
    lines = ["| kind | recipes |", "|---|---|"]
    for module, names in chapters.items():
        (what, *_) = (inspect.getdoc(sys.modules[module]) or "").split(".\n")[0].split(":")
        lines.append(f"| {what.removesuffix('.')} | {', '.join(names)} |")
    return "\n".join(lines)


def decay_table() -> str:
    """What ``decay`` may be in every recipe, the default first."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, recipe in ours().items():
        takes = inspect.signature(recipe).parameters
        if "decay" not in takes:
            continue
        words = ", ".join(f'"{word}"' for word in recipe.choices["decay"])
        if takes["decay"].default is None:
            words += " (the default is the convention's)"
        strength = takes["weight_decay"].default or 0
        alike.setdefault((words, f"{strength:g}"), []).append(f"`{name}`")
    lines = ["| recipes | `decay=`, the default first | `weight_decay` |", "|---|---|---|"]
    lines += [f"| {', '.join(names)} | {' | '.join(said)} |" for said, names in alike.items()]
    return "\n".join(lines)


def renew_pages(root: pathlib.Path = ROOT) -> None:
    """Put the tables where they belong, each between its marks."""
    for page, name, table in (
        ("README.md", "recipes", chapters_table()),
        ("docs/recipes.md", "advice", advice_table()),
        ("docs/recipes.md", "equals", equals_table()),
        ("docs/recipes.md", "recipes", recipes_table()),
        ("docs/recipes.md", "stages", stages_table()),
        ("docs/weight_decay.md", "decay", decay_table()),
    ):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        (before, rest) = (root / page).read_text().split(begin)
        (root / page).write_text(f"{before}{begin}{table}\n{end}{rest.split(end)[1]}")


def draw(path: str) -> None:
    """One row a recipe, one box a stage, the colour says what the stage is about."""
    lists = {name: stages_of(recipe) for name, recipe in DRAWN.items()}
    longest = max(map(len, lists.values()))
    figure, axes = plt.subplots(figsize=(12.5, 5.8), layout="constrained")
    axes.set(xlim=(-1.95, longest), ylim=(len(lists), -0.75))
    axes.axis("off")
    for row, (name, stages) in enumerate(lists.items()):
        axes.text(-0.08, row + 0.4, name, ha="right", va="center", fontsize=11, weight="bold")
        for column, stage in enumerate(stages):
            box = FancyBboxPatch(
                (column + 0.04, row - 0.02),
                width=0.92,
                height=0.84,
                boxstyle="round,pad=0,rounding_size=0.1",
                facecolor=colour_of(stage),
                edgecolor="#666666",
                linewidth=0.8,
            )
            axes.add_patch(box)
            axes.text(
                column + 0.5,
                row + 0.4,
                broken(stage),
                ha="center",
                va="center",
                fontsize=8.2,
                linespacing=1.0,
            )
    for index, (label, (colour, _)) in enumerate(GROUPS.items()):
        axes.scatter(1.6 * index + 0.15, -0.42, s=90, marker="s", color=colour, edgecolor="#666666")
        axes.text(1.6 * index + 0.3, -0.42, label, va="center", fontsize=10)
    axes.set_title(
        "An optimizer is a list of stages; what is new in one is a few boxes, or their order",
        loc="left", size=14, weight="bold",
    )  # fmt: skip
    figure.savefig(path, dpi=90, pil_kwargs={"optimize": True})
    plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="stages.png", help="the picture (stages.png)")
    parser.add_argument("--pages", action="store_true", help="renew the tables instead")
    options = parser.parse_args(arguments)
    if options.pages:
        renew_pages()
    else:
        draw(options.output)


if __name__ == "__main__":
    main()
