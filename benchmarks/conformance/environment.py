"""An environment with the versions that are compared, and nothing else."""

from __future__ import annotations

import os
import pathlib
import subprocess
import venv

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
FILES = ("requirements.txt", "requirements_alone.txt")


def made(folder: pathlib.Path) -> pathlib.Path:
    """The Python of the environment in a folder, where the versions are installed once."""
    folder = folder.resolve()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted, complete = "".join((HERE / name).read_text() for name in FILES), folder / "complete"
    if not complete.exists() or complete.read_text() != wanted:
        if folder.exists() and [*folder.iterdir()] and not (folder / "pyvenv.cfg").exists():
            raise SystemExit(f"{folder} is no environment, and not empty: name another folder.")
        venv.create(folder, with_pip=True)
        pip = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "-r", HERE / FILES[0]], check=True)
        subprocess.run([*pip, "--no-deps", "-r", HERE / FILES[1]], check=True)
        complete.write_text(wanted)
    return python


def run_in(folder: pathlib.Path) -> int:
    """This package's command in the environment of a folder, with this checkout."""
    settings = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [made(folder), "-m", "benchmarks.conformance", "--here"]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings).returncode
