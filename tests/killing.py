"""Programs that are started and killed: what the tests of crashes and faults share."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time

import jax

ROOT = pathlib.Path(__file__).parent.parent


class Program(subprocess.Popen):
    """A process whose warnings go to a file: a full pipe that nobody reads would stop it."""

    def __init__(self, command: list[str], **settings: object) -> None:
        self.written = tempfile.TemporaryFile("w+")  # noqa: SIM115 (read after the end)
        super().__init__(
            command, stdout=subprocess.PIPE, stderr=self.written, text=True, **settings
        )

    def complaint(self) -> str:
        """What it has written there, once it has ended."""
        self.wait(timeout=60)
        self.written.seek(0)
        return self.written.read()


def start(program: pathlib.Path, *arguments: object) -> Program:
    """A program that imports this checkout, on the CPU, with the compiled programs of the suite."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    cache = jax.config.jax_compilation_cache_dir
    settings = {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    if cache:
        settings |= {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
    command = [sys.executable, str(program), *map(str, arguments)]
    return Program(command, env=os.environ | settings)


def read(lines: list[str]) -> list[tuple[str, int]]:
    """``word number`` on each line that was written to its end."""
    words = [line.split() for line in lines if line.endswith("\n")]
    return [(word, int(number)) for word, number in words]


def finished(process: Program) -> list[tuple[str, int]]:
    """What a process that ends by itself said."""
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 0, process.complaint()
    return read(out.splitlines(keepends=True))


def killed(
    process: Program, seconds: float, after: str | None = "resumed", times: int = 1
) -> list[tuple[str, int]]:
    """What a process said until SIGKILL, so long after it had said a word so many times.

    ``after=None``: after its start.
    """
    lines: list[str] = []
    try:
        while after is not None and times:
            lines.append(process.stdout.readline())
            assert lines[-1], process.complaint()
            times -= lines[-1].startswith(after + " ")
        time.sleep(seconds)
    finally:
        process.kill()
    rest, _ = process.communicate(timeout=60)
    return read(lines + rest.splitlines(keepends=True))
