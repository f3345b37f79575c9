"""What arguments were called by earlier versions: for errors, and to read what those have saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RENAMED: dict[tuple[str, str, Any], dict[str, Any]] = {
    ("adamw", "convention", "paper"): {"convention": "torch", "decay": "independent"},
    ("adamw", "convention", "keras-adamw"): {"convention": "keras", "decay": "independent"},
    ("nadamw", "convention", "keras-adamw"): {"convention": "torch", "decay": "independent"},
}
"""A recipe, an argument and its old value; the arguments that say the same today."""


def in_todays_words(recipe: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a recipe as they are called today."""
    said = dict(settings)
    for (name, argument, old), today in RENAMED.items():
        if name == recipe and said.get(argument) == old:
            said |= today
    return said


def hint_of(recipe: str, argument: str, value: Any) -> str:
    """How to say today what an earlier version called so; empty if none did."""
    today = RENAMED.get((recipe, argument, value)) if isinstance(value, str) else None
    if today is None:
        return ""
    words = ", ".join(f"{name}={said!r}" for name, said in today.items())
    return f" {recipe}({argument}={value!r}) is now {recipe}({words})."
