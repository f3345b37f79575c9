"""A table within a page, between two marks."""

from __future__ import annotations

import pathlib


def renew(page: pathlib.Path, begin: str, table: str, end: str) -> None:
    """Put the table in the place of what stands between the marks."""
    before, rest = page.read_text().split(begin)
    page.write_text(f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}")
