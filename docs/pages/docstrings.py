"""Takes the docstrings of recipes and stages apart, and says their parts in Markdown."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable

import adaptive_opt

MODULE = inspect.getdoc(sys.modules[adaptive_opt.adam.__module__]) or ""
"""Which says what the arguments of all rules mean, where a docstring says only where to look."""
SEE = "[Ss]ee (?:the module|``adam``)"

WHEN, WHEN_NOT = "Use it", "Do without it"
"""How the paragraphs of a recipe's docstring begin that say when to use it, and when not."""


def paragraphs(text: str) -> list[str]:
    """Those before the arguments and the doctest."""
    head = re.split(r"\n(?:Args|State|Attributes):|\n>>> ", text)[0]
    return [part.strip("\n") for part in head.split("\n\n") if part.strip()]


def paragraph(text: str, begin: str) -> str:
    """The paragraph that begins with these words, or none."""
    return next((part for part in paragraphs(text) if part.startswith(begin)), "")


def arguments(text: str) -> dict[str, str]:
    """What the section ``Args:`` says of each argument; one line may be about several."""
    section = re.search(r"^Args:\n((?:  .*\n?|\n(?=  ))*)", text, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=  \S)", section[1].strip("\n") if section else ""):
        names, colon, meaning = entry.strip().partition(":")
        if colon:
            found |= dict.fromkeys(names.split(", "), one_line(meaning))
    return found


def in_full(name: str, meaning: str) -> str:
    """What an argument means, with what the module says of it."""
    common = arguments(MODULE).get(name)
    return re.sub(SEE, common.removesuffix("."), meaning) if common else meaning


def formula(text: str) -> str:
    """The rule: what stands in double backticks in the first paragraph and is more than a name."""
    spans = map(one_line, re.findall(r"``([^`]+)``", paragraphs(text)[0]))
    return ",  ".join(span for span in spans if " " in span)


def formulas_of(text: str) -> str:
    """The first paragraph, and the formulas of the next if it has none itself."""
    first, *rest = paragraphs(text)
    if "``" in first or not rest:
        return one_line(first)
    before = rest[0].partition("Reads ")[0].partition("Sets ")[0]
    spans = [f"``{one_line(s)}``" for s in re.findall(r"``([^`]+)``", before) if " " in s]
    return " ".join([one_line(first), *([", ".join(spans)] if spans else [])])


def one_line(text: str) -> str:
    return " ".join(text.split())


def markdown(text: str, link: Callable[[str], str | None]) -> str:
    """Docstring prose: lists keep their lines, names that ``link`` knows become links."""

    def code(match: re.Match[str]) -> str:
        inside = one_line(match[1])
        there = link(inside)
        return f"[`{inside}`]({there})" if there else f"`{inside}`"

    text = re.sub(r"``([^`]+)``", code, re.sub(r":func:`(\w+)`", r"``\1``", text))
    return text if text.lstrip().startswith("* ") else one_line(text)


def cell(text: str) -> str:
    """For a table, in which a bar would end the cell."""
    return text.replace("|", "\\|")


def table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell(c) for c in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
