"""Fixtures and settings shared by the tests."""

from __future__ import annotations

import functools
import gc
import importlib.util
import os
import pathlib
import sys

import jax
import pytest
from common import QUICK
from jax.experimental.compilation_cache import compilation_cache

# Programs that run for a moment are compiled in a third of the time. `XLA_FLAGS= pytest` runs the
# tests on what XLA makes by itself.
os.environ.setdefault("XLA_FLAGS", " ".join(f"--{k}={v}".lower() for k, v in QUICK.items()))

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
sys.path.append(str(EXAMPLES))  # as when one of them is run

jax.config.update("jax_num_cpu_devices", 8)

# JAX makes a context of MLIR for every program, however small: a third of the time of many tests.
# It is no public function of JAX; where there is none, tests only take longer.
lowering = sys.modules.get("jax._src.interpreters.mlir")
if make_ir_context := getattr(lowering, "make_ir_context", None):
    lowering.make_ir_context = functools.cache(make_ir_context)


def pytest_configure(config):
    """Compiled programs stay in pytest's cache folder: for other files, processes and runs."""
    if getattr(config, "cache", None) is not None:
        jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_finish(session):
    """What is there stays, and much of what JAX makes: to look for garbage in it costs a tenth."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 50)


@pytest.fixture(autouse=True)
def compiled_anew(request):
    """A program from the cache folder tells less of itself, and has cost no compilation."""
    if request.node.get_closest_marker("compiles") is None:
        yield
        return
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """The whole suite runs in a few processes, where pytest-xdist is installed; a part in one."""
    whole = config.args == config.getini("testpaths") and not config.option.collectonly
    free = config.pluginmanager.hasplugin("xdist") and not hasattr(config, "workerinput")
    if free and whole and config.option.numprocesses is None and not config.option.usepdb:
        config.option.numprocesses = min(os.cpu_count() or 1, 4)
        config.option.dist = "worksteal"


@pytest.fixture
def x64():
    """float64 for the length of a test; everything else runs as users run it, in float32."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def example():
    """Imports a script of examples/ by name."""

    def load(name: str):
        path = EXAMPLES / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"example_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load
