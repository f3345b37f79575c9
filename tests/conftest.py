"""Fixtures and settings shared by the tests."""

from __future__ import annotations

import importlib.util
import pathlib
import sys

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """float64 for the length of a test; everything else runs as users run it, in float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def example():
    """Imports a script of examples/ by name."""

    def load(name: str):
        path = pathlib.Path(__file__).parent.parent / "examples" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load
