"""A run that is killed while it saves loses nothing that was saved."""

from __future__ import annotations

import random
import subprocess
import sys
import time

import numpy as np
import pytest
from killing import ROOT, finished, killed, start

PROGRAM = ROOT / "tests" / "programs" / "train_and_save.py"
WRITER = ROOT / "tests" / "programs" / "write_files.py"
FILES = ROOT / "adaptive_opt" / "checkpoints" / "files.py"
STEPS = 12  # after the kills


@pytest.mark.broad
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_any_moment_a_run_goes_on_from_its_last_complete_save(kills, tmp_path):
    pick = random.Random(kills)
    saved, moments = 0, []
    for _ in range(kills):
        said = killed(start(PROGRAM, tmp_path, 10**6), pick.uniform(0.0, 0.8))
        assert said[0][0] == "resumed"
        # At least what was reported as saved; at most the one save that was not reported yet.
        assert said[0][1] in (saved, saved + 1)
        saved = max([said[0][1], *(number for _, number in said)])
        moments.append(saved)
    assert saved > 0, moments  # some saves were completed between the kills
    ((word, resumed), *rest) = finished(start(PROGRAM, tmp_path, saved + STEPS))
    assert word == "resumed"
    assert resumed in (saved, saved + 1)
    assert rest[-1] == ("saved", saved + STEPS)

    undisturbed = tmp_path / "undisturbed"
    undisturbed.mkdir()
    assert finished(start(PROGRAM, undisturbed, saved + STEPS))[0] == ("resumed", 0)
    expected = np.load(undisturbed / "final.npy")
    assert np.load(tmp_path / "final.npy").tobytes() == expected.tobytes()


@pytest.mark.parametrize("kills", [12, pytest.param(1000, marks=pytest.mark.slow)])
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
