"""Folders are floors: none imports from a higher one, and no public name hides a module."""

from __future__ import annotations

import ast
import importlib
import pathlib
import pkgutil
import subprocess
import sys

import pytest

import adaptive_opt

PACKAGE = pathlib.Path(adaptive_opt.__file__).parent
FLOORS = (
    "core", "testing", "stages", "wrappers", "recipes", "memory", "sharding", "watching",
    "checkpoints",
)  # fmt: skip
EXTRAS = ("flax", "orbax", "matplotlib", "sklearn", "tqdm", "chex", "equinox", "torch")


def imported(source: str, *, at_the_top: bool = False) -> set[str]:
    nodes = ast.parse(source).body if at_the_top else ast.walk(ast.parse(source))
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_every_folder_is_a_floor():
    assert {p.name for p in PACKAGE.iterdir() if (p / "__init__.py").exists()} == set(FLOORS)


@pytest.mark.parametrize("floor", FLOORS)
def test_a_floor_imports_nothing_from_above(floor):
    above = FLOORS[FLOORS.index(floor) + 1 :]
    for file in (PACKAGE / floor).glob("*.py"):
        for name in imported(file.read_text()):
            parts = name.split(".")
            assert not (parts[0] == "adaptive_opt" and parts[1:] == []), (file, name)
            assert not (parts[0] == "adaptive_opt" and parts[1] in above), (file, name)


def test_no_file_imports_an_extra_at_the_top():
    for file in PACKAGE.rglob("*.py"):
        names = {name.split(".")[0] for name in imported(file.read_text(), at_the_top=True)}
        assert not names & set(EXTRAS), file


def test_no_public_name_hides_a_module():
    modules = {name for _, name, _ in pkgutil.walk_packages([str(PACKAGE)], "adaptive_opt.")}
    for module in modules:
        assert importlib.import_module(module).__name__ == module
        parent, _, name = module.rpartition(".")
        assert getattr(importlib.import_module(parent), name) is sys.modules[module], module
    assert not {m.rpartition(".")[2] for m in modules if m.count(".") == 1} & {
        *adaptive_opt.__all__
    }


def test_it_imports_without_any_extra_and_names_the_one_it_misses():
    program = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None
import adaptive_opt, jax.numpy as jnp
x = jnp.ones(3)
optimizer = adaptive_opt.adamw(1e-3)
state = optimizer.init(x)
print(adaptive_opt.from_bytes(optimizer, state, adaptive_opt.to_bytes(optimizer, state))[0].count)
from adaptive_opt.watching import plots
try:
    plots.loss_curves({{}})
except ImportError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert said[0] == "0"
    assert said[-1] == (
        "the pictures need matplotlib, which is not installed: pip install 'adaptive_opt[plots]'."
    )


def test_no_file_is_long():
    for file in PACKAGE.rglob("*.py"):
        assert len(file.read_text().splitlines()) <= 500, file
