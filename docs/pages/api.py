"""A page for every public name, in the sections and the order of ``adaptive_opt.__all__``."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re
import sys
from collections.abc import Iterator
from typing import Any

import adaptive_opt
from adaptive_opt import RECIPES
from docs.pages.docstrings import SEE, in_full

SUBMODULES = ("testing", "watching.plots")
"""Public modules beside the package itself."""


def sections() -> dict[str, list[str]]:
    """The names of ``__all__`` under the comments that stand between them."""
    source = inspect.getsource(adaptive_opt)
    listed = source[source.index("__all__ = [") :]
    found: dict[str, list[str]] = {}
    for comment, name in re.findall(r'^    (?:# (.+)\.|"(\w+)",)$', listed, re.MULTILINE):
        if comment:
            found[comment] = []
        else:
            found[list(found)[-1]].append(name)
    return found


def public(module: Any) -> list[str]:
    """What a module offers: its ``__all__``, or else the documented names that it defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and getattr(value, "__module__", None) == module.__name__
        and inspect.getdoc(value)
    ]


def text_of(module: str, name: str) -> tuple[str, str]:
    """The docstring of a name, and the module in which it stands."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value) or inspect.isroutine(value):
        return inspect.getdoc(value) or "", module
    for defining, loaded in sorted(sys.modules.items()):  # data has a docstring where it is made
        if defining.startswith("adaptive_opt.") and getattr(loaded, name, None) is value:
            below = re.search(rf'^{name}\b.* = .*\n"""(.+?)"""', inspect.getsource(loaded), re.M)
            if below:
                return below[1], defining
    raise ValueError(f"{module}.{name} has no docstring.")


def described(module: str, name: str) -> str:
    """The autodoc directive for a name."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isclass(value):
        return f".. autoclass:: {module}.{name}\n   :members:\n"
    if inspect.isroutine(value):
        return f".. autofunction:: {module}.{name}\n"
    return f".. autodata:: {text_of(module, name)[1]}.{name}\n   :no-value:\n"


def page(module: str, name: str) -> str:
    rule = f"\n:doc:`The rule, line by line <../rules/{name}>`.\n" * (name in RECIPES)
    title = f"{name} (API)"  # in a list of what a search found, the page of the rule is ``name``
    return f"{title}\n{'=' * len(title)}\n{rule}\n{described(module, name)}"


def summary(text: str) -> str:
    """The first paragraph of a docstring, in a line."""
    return " ".join(text.partition("\n\n")[0].split())


def listed(module: str, names: list[str]) -> Iterator[str]:
    """A table of names with what each is, and the place of their pages in the contents."""
    prefix = module.removeprefix("adaptive_opt").removeprefix(".")
    pages = {name: f"{prefix}.{name}".removeprefix(".") for name in names}
    yield ".. list-table::\n   :widths: 30 70\n"
    for name, file in pages.items():
        what = summary(text_of(module, name)[0])
        yield f"   * - :doc:`{name} <{file}>`\n     - {linked_text(what)}"
    yield "\n.. toctree::\n   :hidden:\n"
    yield from (f"   {name} <{file}>" for name, file in pages.items())
    yield ""


def index() -> str:
    lines = ["API reference", "=============", "", "Every public name, from its docstring.", ""]
    for title, names in sections().items():
        lines += [title, "-" * len(title), "", *listed("adaptive_opt", names)]
    for submodule in SUBMODULES:
        module = f"adaptive_opt.{submodule}"
        value = importlib.import_module(module)
        what = linked_text(summary(inspect.getdoc(value) or ""))
        lines += [module, "-" * len(module), "", what, "", *listed(module, public(value))]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """Every page by the name of its file, without an ending."""
    found = {name: page("adaptive_opt", name) for name in adaptive_opt.__all__}
    for submodule in SUBMODULES:
        module = f"adaptive_opt.{submodule}"
        for name in public(importlib.import_module(module)):
            found[f"{submodule}.{name}"] = page(module, name)
    return found | {"index": index()}


def write(folder: pathlib.Path) -> None:
    write_all(folder, {f"{name}.rst": text for name, text in pages().items()})


def write_all(folder: pathlib.Path, files: dict[str, str]) -> None:
    """The files, and no other texts in the folder; what has not changed is left as it is."""
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        if old.suffix in (".rst", ".md") and old.name not in files:
            old.unlink()
    for name, text in files.items():
        path = folder / name
        if not path.exists() or path.read_text() != text:
            path.write_text(text)


def linked_text(text: str) -> str:
    """Names in double backticks as links, where they are public; the rest stays code."""
    return re.sub(
        r"(?<!`)``(\w+)``(?!`)",
        lambda m: f":obj:`~adaptive_opt.{m[1]}`" if m[1] in adaptive_opt.__all__ else m[0],
        text,
    )


def spelled_out(text: str) -> str:
    """Every argument of which it says only where to look in a line of its own, in full."""

    def each(entry: re.Match[str]) -> str:
        return "\n".join(f"  {name}: {in_full(name, entry[2])}" for name in entry[1].split(", "))

    return re.sub(rf"^  ([\w, ]+): ({SEE}.*)", each, text, flags=re.MULTILINE)


def linked(app, what, name, value, options, lines: list[str]) -> None:
    """Before napoleon reads a docstring: names become links, and ``State:`` a plain paragraph."""
    text = linked_text(spelled_out("\n".join(lines)))
    text = re.sub(
        r"^State: .*(?:\n  .*)*", lambda m: re.sub(r"\n +", "\n", m[0]), text, flags=re.MULTILINE
    )
    lines[:] = text.split("\n")
