"""A page for every recipe in the register, from what the project knows of it anyway.

The docstring says what it is, when to use it and what it equals; ``describe`` lists its stages, and
their docstrings their lines; tests/references says which public code was recorded; the tables of
CHOOSING and the gallery say what was found; docs/references.bib has the papers.
"""

from __future__ import annotations

import functools
import inspect
import json
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from difflib import SequenceMatcher
from typing import Any, NamedTuple

import adaptive_opt
from adaptive_opt import Description, describe
from adaptive_opt.core.describe import shown
from benchmarks.recipes import state_bytes
from docs.pages import docstrings, rates
from docs.pages.api import write_all
from examples.draw_stages import ours, recorded

ROOT = pathlib.Path(__file__).parents[2]
ADVICE = (docstrings.WHEN, docstrings.WHEN_NOT)
FRAME = ("adaptive", "chain", "partition", "scale_by_adam")
"""What holds stages and is none."""


def link(name: str) -> str | None:
    """Where a public name has its page, seen from the page of a rule."""
    if name == "stages.weight_decay":
        return "../weight_decay.md"
    if name in ours():
        return f"{name}.md"
    return f"../api/{name}.rst" if name in adaptive_opt.__all__ else None


markdown = functools.partial(docstrings.markdown, link=link)


# --- The listing ----------------------------------------------------------------------------------


class Line(NamedTuple):
    """A stage of a listing, or the head of a part of it."""

    name: str
    call: str
    is_head: bool = False


def lines_of(part: Description) -> Iterator[Line]:
    """The stages of a description, without those that do nothing."""
    settings = ", ".join(f"{k}={shown(v)}" for k, v in part.settings.items() if v is not None)
    call = f"{part.name}({settings})"
    if part.key is not None:
        yield Line(part.name, f"for {part.key}", True)
    if not part.parts:
        if part.name != "scale" and part.settings.get("weight_decay", 1) != 0:
            yield Line(part.name, call)
    elif part.name not in FRAME and part.name not in ours():
        yield Line(part.name, f"inside of {call}", True)
    for inner in part.parts:
        yield from lines_of(inner)


def listings(name: str) -> dict[tuple[str, ...], list[Line]]:
    """The listings of a recipe that differ, by the conventions that have them."""
    recipe: Any = ours()[name]
    shows = {"momentum": 0.9} if name in ("sgd", "rmsprop") else {}
    found: dict[tuple[Line, ...], list[str]] = {}
    for convention in recipe.choices.get("convention", (None,)):
        chosen = {} if convention is None else {"convention": convention}
        lines = tuple(lines_of(describe(recipe(1e-3, **shows, **chosen))))
        found.setdefault(lines, []).append(convention)
    return {tuple(filter(None, which)): list(lines) for lines, which in found.items()}


def compared(lines: list[Line], others: list[list[Line]]) -> list[tuple[str, Line]]:
    """The lines beside the nearest other listing: ``+`` where that has none, ``-`` for its own."""
    own = [line.name for line in lines]

    def matched(other: list[Line]) -> SequenceMatcher[str]:
        return SequenceMatcher(None, [line.name for line in other], own, autojunk=False)

    nearest = max(others, key=lambda other: matched(other).ratio())
    marked = []
    for what, i, j, k, m in matched(nearest).get_opcodes():
        if what != "equal":
            marked += [("-", line) for line in nearest[i:j]]
        marked += [("" if what == "equal" or x.is_head else "+", x) for x in lines[k:m]]
    return marked


def listing(lines: list[Line], others: list[list[Line]]) -> str:
    rows = []
    for mark, line in compared(lines, others):
        if line.is_head:
            rows.append(["", f"*{line.call}*", ""])
            continue
        public = getattr(adaptive_opt, line.name, None)
        what = docstrings.formulas_of(inspect.getdoc(public) or "") if public else "optax's"
        there = link(line.name)
        call = f"`{line.call}`" if there is None else f"[`{line.call}`]({there})"
        sign = {"+": "[+]{.new}", "-": "[&minus;]{.gone}", "": ""}[mark]
        rows.append([sign, call, markdown(what)])
    return docstrings.table(["", "stage", "line"], rows)


# --- What was recorded, measured and found --------------------------------------------------------


def public_code(name: str) -> list[list[str]]:
    """The implementations whose numbers it is tested against, by convention, and how many runs."""
    found = recorded(name).items()
    return [[c, f"`{source}`", version, str(n)] for (c, source, version), n in sorted(found)]


def text_of(page: str) -> str:
    """A document, its links as seen from a rule's page."""
    folder = pathlib.PurePosixPath(page).parent
    anchors = re.sub(r"\]\(#", f"](../../{page}#", (ROOT / page).read_text())
    return re.sub(r"\]\((?!https:|\.\./\.\./)", f"](../../{folder}/", anchors)


def rows_of(page: str) -> Iterator[list[str]]:
    """The cells of every row of the tables of a document."""
    for line in text_of(page).splitlines():
        if line.startswith("| "):
            yield [each.strip() for each in re.split(r"(?<!\\)\|", line)[1:-1]]


def evidence(name: str) -> list[str]:
    """A list: CHOOSING and the gallery in the rows that name it."""
    found = []
    for case, take, *why in rows_of("examples/CHOOSING.md"):
        if f"`{name}`" in take and len(why) < 3:
            because = ". ".join(each.rstrip(".") for each in why if each)
            found.append(f"* {case}: *{take.rstrip('.')}*. {because}.")
    named = re.compile(rf"\b{name.replace('_', ' ?')}\b", re.IGNORECASE)
    for claim, verdict in (r for r in rows_of("examples/gallery/README.md") if len(r) == 2):
        if named.search(claim):
            found.append(f"* {claim}: {verdict}.")
    errors = text_of("examples/CHOOSING.md").partition("## What articles get wrong")[2]
    for error in re.split(r"\n(?=\* )", errors)[1:]:
        if named.search(error.split("*")[2]):
            found.append(f"* Articles get wrong: {docstrings.one_line(error.strip()[2:])}")
    return found


def costs(name: str) -> list[str]:
    """Bytes and time of a float32 weight."""
    kept = round(state_bytes(ours()[name]), 3)
    text = [f"State: {kept:g} bytes for each float32 weight of a square matrix."]
    for what, *cells in rows_of("examples/CHOOSING.md"):
        if what == f"`{name}`" and len(cells) == 2:
            text.append(f"A step takes {cells[1]} times that of `optax.adam` on a CPU, in brackets")
            text.append("the quartiles; see [what each costs](../../examples/CHOOSING.md).")
    results = ROOT / "benchmarks" / "results" / "accelerators" / "accelerators.json"
    for device, found in json.loads(results.read_text()).items():
        if case := found["cases"].get(name):
            kernels = len(case["operations"])
            text.append(f"Compiled for {device}: {case['bytes']:.0f} bytes of traffic for each")
            text.append(f"weight in {kernels} {'kernel' if kernels == 1 else 'kernels'}.")
    return text


def bibliography() -> dict[str, str]:
    """The entries of references.bib, by what a docstring cites: a number or an address."""
    found = {}
    for entry in re.split(r"\n(?=@)", (ROOT / "docs" / "references.bib").read_text()):
        for field in re.findall(r"^  (?:eprint|doi|url) += \{(.+?)\},$", entry, re.MULTILINE):
            found[re.sub(r"^https://(github\.com/)?", "", field)] = entry.strip()
    return found


def cited(name: str) -> list[str]:
    """The entries of the papers that the rule is from, in the order of its docstring."""
    said = (inspect.getdoc(ours()[name]) or "").split("\n\n")
    text = " ".join(part for part in said if not part.startswith(ADVICE))
    places = {key: text.find(key) for key in bibliography()}
    keys = sorted((key for key, at in places.items() if at >= 0), key=places.__getitem__)
    return list(dict.fromkeys(bibliography()[key] for key in keys))


# --- The pages ------------------------------------------------------------------------------------

LEGEND = "[+]{.new} is not in Adam, [&minus;]{.gone} is in Adam and not here; see [adam](adam.md)."
EQUAL = """Public code that was recorded in float64. The rule equals it to 1e-12, step by step
(`tests/test_exactness.py`). A run is one setting of the arguments."""
CURVES = ("loss", "gradient_norm/all", "update_ratio/all", "rate/all/q50", "rate/all/q99")
ABOVE = """Nothing is measured for it here. The sources of the advice are named above."""
NOTHING = """Nothing is measured for it here, and no comparison at equal tuning is cited: what is
said of it is its authors' claim."""


def defaults(name: str) -> str:
    recipe: Any = ours()[name]
    said = docstrings.arguments(inspect.getdoc(recipe) or "")
    rows = []
    for argument, p in inspect.signature(recipe).parameters.items():
        default = "" if p.default is p.empty else f"`{shown(p.default)}`"
        choices = ", ".join(f"`{shown(c)}`" for c in recipe.choices.get(argument, ()))
        meaning = docstrings.in_full(argument, said.get(argument, "see the module."))
        rows.append([f"`{argument}`", default, choices, markdown(meaning)])
    return docstrings.table(["argument", "default", "one of", "meaning"], rows)


def logging(name: str, keys: Sequence[str]) -> str:
    curves = [k for k in keys if k.endswith(CURVES)]
    acts = [k for k in keys if re.search(r"\b(limited|friction)/", k)]
    own = f"; {', '.join(f'`{k}`' for k in acts)}: how far its own line acts" if acts else ""
    return f"""```python
import jax.numpy as jnp
from adaptive_opt import {name}, read_telemetry, telemetry

optimizer = {name}(1e-3, observers=telemetry(every=50))
state = optimizer.init({{"w": jnp.ones((4, 4))}})
print(read_telemetry(state))  # after each step: a flat dict, empty until the first look
```

Worth a curve: {", ".join(f"`{k}`" for k in curves)}{own}.
See [what to log](../../examples/CHOOSING.md#what-to-log) and [watching](../watching.md)."""


def page(name: str, keys: Sequence[str] = CURVES, picture: bool = False) -> str:
    recipe: Any = ours()[name]
    text = inspect.getdoc(recipe) or ""
    first, *rest = docstrings.paragraphs(text)
    prose = [part for part in rest if not part.startswith(ADVICE)]
    what = re.sub(r": ``[^`]+``(, ``[^`]+``)*\.$", ":", first)
    parts = [f"# {name}", markdown(what), f"```text\n{docstrings.formula(text)}\n```"]
    parts += [markdown(docstrings.paragraph(text, begin)) for begin in ADVICE]
    parts += ["## Where it comes from", *map(markdown, prose)]

    parts += ["## Line by line"]
    parts += [LEGEND]
    adams = list(listings("adam").values())
    for which, lines in listings(name).items():
        words = " or ".join(f'`convention="{word}"`' for word in which)
        parts += [f"### With {words}"] if which else []
        parts += [listing(lines, adams[:1] if name == "adam" else adams)]

    parts += ["## What it equals", EQUAL]
    parts += [docstrings.table(["convention", "public code", "version", "runs"], public_code(name))]
    parts += ["## Arguments", defaults(name)]
    if "convention" in recipe.choices:
        parts += ["A default of `None` may be the convention's: the lines above have its value."]
    parts += ["## Memory and time", " ".join(costs(name))]
    if picture:
        parts += ["## Its rates", f"![The rates of the weights]({name}.png)", f"{rates.PROBLEM}."]
    advice = "".join(docstrings.paragraph(text, begin) for begin in ADVICE)
    nothing = ABOVE if "arXiv:" in advice else NOTHING
    parts += ["## Evidence", "\n".join(evidence(name)) or nothing]
    parts += ["## How to log it", logging(name, keys)]
    parts += ["## Cite", *(f"```bibtex\n{entry}\n```" for entry in cited(name))]
    return "\n\n".join(filter(None, parts)) + "\n"


def index() -> str:
    """The recipes by the file they are in, whose first line says what they have in common."""
    chapters: dict[str, list[str]] = {}
    for name, recipe in ours().items():
        chapters.setdefault(recipe.__module__, []).append(name)
    parts = ["# The rules", "A page for every recipe, made from its docstring and its stages."]
    for module, names in chapters.items():
        title = (inspect.getdoc(sys.modules[module]) or "").split(".\n")[0].split(":")[0]
        firsts = (docstrings.paragraphs(inspect.getdoc(ours()[n]) or "")[0] for n in names)
        rows = [[f"[{n}]({n}.md)", markdown(f)] for n, f in zip(names, firsts, strict=True)]
        parts += [f"## {title.removesuffix('.')}", docstrings.table(["rule", "what it does"], rows)]
        parts += ["\n".join(["```{toctree}", ":hidden:", "", *names, "```"])]
    parts += [
        "## What the arguments mean",
        *map(markdown, docstrings.paragraphs(docstrings.MODULE)[1:]),
    ]
    rows = [
        [f"`{name}`", markdown(said)]
        for name, said in docstrings.arguments(docstrings.MODULE).items()
    ]
    parts += [docstrings.table(["argument", "meaning"], rows)]
    return "\n\n".join(parts) + "\n"


def write(folder: pathlib.Path) -> None:
    """All pages, and the pictures that are older than what they show."""
    pages = {"index.md": index()}
    for name in ours():
        pages[f"{name}.md"] = page(name, rates.keys(name), picture=True)
    write_all(folder, pages)
    for name in ours():
        rates.draw(name, folder / f"{name}.png")
