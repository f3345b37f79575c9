"""Programs that are started and killed: what the tests of crashes and faults share."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import time

import jax

ROOT = pathlib.Path(__file__).parent.parent


def start(program: pathlib.Path, *arguments: object) -> subprocess.Popen:
    """A program that imports this checkout, on the CPU, with the compiled programs of the suite."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    cache = jax.config.jax_compilation_cache_dir
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    if cache:
        settings |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    return subprocess.Popen(
        [sys.executable, str(program), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | settings,
    )


def read(lines: list[str]) -> list[tuple[str, int]]:
    """``word number`` on each line that was written to its end."""
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(word, int(number)) for word, number in words]


def finished(process: subprocess.Popen) -> list[tuple[str, int]]:
    """What a process that ends by itself said."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return read(out.splitlines(keepends=True))


def killed(
    process: subprocess.Popen, seconds: float, after: str | None = "resumed", times: int = 1
) -> list[tuple[str, int]]:
    """What a process said until SIGKILL, so long after it had said a word so many times.

    ``after=None``: after its start.
    """
    lines: list[str] = []
    try:
        while after is not None and times:
            lines.append(process.stdout.readline())
            assert lines[-1], process.stderr.read()
            times -= lines[-1].startswith(after + " ")
        time.sleep(seconds)
    finally:
        process.kill()
    rest, _ = process.communicate(timeout=60)
    return read(lines + rest.splitlines(keepends=True))
