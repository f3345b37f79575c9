"""A table within a page, between two marks."""

from __future__ import annotations

import pathlib


def renew(page: pathlib.Path, begin: str, table: str, end: str) -> None:
    """Put the table in the place of what stands between the marks."""
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no table to renew: it wants a line {begin} and a line {end}.")
    page.write_text(f"{before}{begin}\n{table}\n{end}{after}")
