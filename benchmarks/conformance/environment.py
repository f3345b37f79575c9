"""An environment with the versions that are compared, and nothing else."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]


def made(folder: pathlib.Path) -> pathlib.Path:
    """The Python of the environment in a folder, where one is made unless it is complete."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = folder / "complete"
    if not complete.exists():
        venv.create(folder, with_pip=True, clear=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", HERE / "requirements.txt"], check=True)
        subprocess.run([*pip, "--no-deps", "-r", HERE / "requirements_alone.txt"], check=True)
        complete.touch()
    return python


def run_in(folder: pathlib.Path) -> int:
    """This package's command in the environment of a folder, with this checkout."""
    settings = {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [made(folder), "-m", "benchmarks.conformance", "--here"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings).returncode


if __name__ == "__main__":
    print(made(pathlib.Path(sys.argv[1])))
