"""A run that is killed while it saves loses nothing that was saved."""

from __future__ import annotations

import os
import pathlib
import random
import subprocess
import sys
import time

import numpy as np
import pytest

PROGRAM = pathlib.Path(__file__).parent / "programs" / "train_and_save.py"
WRITER = PROGRAM.parent / "write_files.py"
FILES = PROGRAM.parent.parent.parent / "adaptive_opt" / "checkpoints" / "files.py"
STEPS = 12  # after the kills


def start(directory: pathlib.Path, steps: int) -> subprocess.Popen:
    paths = [str(PROGRAM.parent.parent.parent), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, str(PROGRAM), str(directory), str(steps)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"},
    )


def finished(process: subprocess.Popen) -> list[tuple[str, int]]:
    """What a process that ends by itself said."""
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [(word, int(number)) for word, number in (line.split() for line in out.splitlines())]


def killed(process: subprocess.Popen, seconds: float) -> list[tuple[str, int]]:
    """What a process said until it was killed, so many seconds after it had resumed."""
    try:
        first = process.stdout.readline()
        assert first, process.stderr.read()
        time.sleep(seconds)
    finally:
        process.kill()
    rest, _ = process.communicate(timeout=60)
    lines = [line for line in (first + rest).splitlines(keepends=True) if line.endswith("\n")]
    return [(word, int(number)) for word, number in map(str.split, lines)]


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_goes_on_from_its_last_complete_save(kills, tmp_path):
    pick = random.Random(kills)
    saved, moments = 0, []
    for _ in range(kills):
        said = killed(start(tmp_path, 10**6), pick.uniform(0.0, 0.8))
        assert said[0][0] == "resumed"
        # At least what was reported as saved; at most the one save that was not reported yet.
        assert said[0][1] in (saved, saved + 1)
        saved = max([said[0][1], *(number for _, number in said)])
        moments.append(saved)
    assert saved > 0, moments  # some saves were completed between the kills
    ((word, resumed), *rest) = finished(start(tmp_path, saved + STEPS))
    assert word == "resumed"
    assert resumed in (saved, saved + 1)
    assert rest[-1] == ("saved", saved + STEPS)

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert finished(start(undisturbed, saved + STEPS))[0] == ("resumed", 0)
    expected = np.load(undisturbed / "final.npy")
    assert np.load(tmp_path / "final.npy").tobytes() == expected.tobytes()


@pytest.mark.parametrize("kills", [40, pytest.param(1000, marks=pytest.mark.slow)])
def test_killed_while_it_writes_a_file_the_old_or_the_new_one_is_there(kills, tmp_path):
    pick = random.Random(kills)
    path, last, cut_short = tmp_path / "checkpoint", 0, 0
    for _ in range(kills):
        command = [sys.executable, "-S", str(WRITER), str(FILES), str(path)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        began = process.stdout.readline()
        time.sleep(pick.uniform(0.0, 0.06))
        process.kill()
        rest, _ = process.communicate(timeout=60)
        assert began == f"{last}\n"
        said = [int(line) for line in rest.splitlines(keepends=True) if line.endswith("\n")]
        reported = max([last, *said])
        if reported or path.exists():
            numbers = np.fromfile(path, "<u4")
            assert numbers.size == 2**20
            assert (numbers == numbers[0]).all()
            # What was reported is there; at most one more, that was not reported yet.
            last = int(numbers[0])
            assert last in (reported, reported + 1)
        beside = [file for file in tmp_path.iterdir() if file != path]
        assert all(file.name.startswith(".checkpoint.") for file in beside)
        cut_short += len(beside)
        for file in beside:
            file.unlink()
    assert last > 0
    assert cut_short > 0  # some were killed in the middle
