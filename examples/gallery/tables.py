"""Writes what the scripts measured into the tables of README.md.

python examples/gallery/tables.py
"""

from __future__ import annotations

import json
import re

from shared import HERE, table


def filled(text: str) -> str:
    """The text with every table as its JSON file has it."""

    def renewed(match: re.Match[str]) -> str:
        name = match[1]
        found = json.loads((HERE / f"{name}.json").read_text())
        return f"<!-- {name}: begin -->\n{table(found)}\n<!-- {name}: end -->"

    return re.sub(r"<!-- (\w+): begin -->.*?<!-- \1: end -->", renewed, text, flags=re.DOTALL)


if __name__ == "__main__":
    page = HERE / "README.md"
    page.write_text(filled(page.read_text()))
