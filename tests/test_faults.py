"""A training that is killed, poisoned, moved and damaged ends as one that nothing happens to."""

from __future__ import annotations

import collections
import pathlib
import random
import time

import numpy as np
import pytest
from killing import ROOT, finished, killed, start

PROGRAM = ROOT / "tests" / "programs" / "train_with_faults.py"
MORE = 12
"""Steps after the last fault."""


def checkpoints(directory: pathlib.Path) -> list[int]:
    """The steps of those that Orbax has finished, the last one at the end."""
    folder = directory / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


def damage(directory: pathlib.Path, pick: random.Random) -> tuple[int, int]:
    """Cut, change or take away a file of the last checkpoint; the steps of the last two."""
    *_, before, last = checkpoints(directory)
    files = [p for p in (directory / "checkpoints" / str(last)).rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)  # where the numbers are
    file = pick.choice([largest, largest, pick.choice(files)])
    data, at = file.read_bytes(), pick.randrange(file.stat().st_size)
    what = pick.choice(["cut", "changed", "gone"])
    if what == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:at] + (bytes([data[at] ^ 255]) + data[at + 1 :]) * (what != "cut"))
    return before, last


class Supervised:
    """A run that is started again whenever it was killed; every start is checked."""

    def __init__(self, directory: pathlib.Path, *options: str) -> None:
        self.directory, self.options, self.saved = directory, options, 0
        self.happened: collections.Counter[str] = collections.Counter()

    def start(self, devices: int, steps: int = 10**6):
        return start(PROGRAM, self.directory, steps, devices, *self.options)

    def killed(self, devices: int, seconds: float, **when: object) -> None:
        said = killed(self.start(devices), seconds, **when)
        if not said:
            self.happened["killed before it had resumed"] += 1
            return
        self.resumed(*said[0])
        self.saved = max([self.saved, *(n for word, n in said if word == "saved")])
        where = "while it saved" if said[-1][0] == "saving" else "between saves"
        self.happened[f"killed {where}"] += 1

    def resumed(self, word: str, step: int) -> None:
        """At what was reported as saved, or at the one save that was not reported yet."""
        assert word == "resumed"
        assert step in (self.saved, self.saved + 3), (self.saved, step)
        self.saved = step

    def damaged(self, devices: int, pick: random.Random) -> None:
        """The last checkpoint is damaged, until the run goes on from the one before it.

        Not all damage does harm: Orbax reads past some files, and if the digest is right, every
        number is there.
        """
        while len(checkpoints(self.directory)) < 2:  # damaged ones before it were deleted
            self.killed(devices, 0.0, after="saved", times=2)
        for _ in range(20):
            before, last = damage(self.directory, pick)
            said = killed(self.start(devices), 0.0)
            assert said[0][0] == "resumed"
            assert said[0][1] in (before, last)
            self.saved = max(n for word, n in said if word in ("resumed", "saved"))
            self.happened["killed as soon as it had resumed"] += 1
            if said[0][1] == before:
                self.happened["a damaged last checkpoint"] += 1
                return
        raise AssertionError("no damage was seen")

    def ended(self, devices: int, steps: int) -> dict[str, np.ndarray]:
        self.resumed(*finished(self.start(devices, steps))[0])
        return read(self.directory)


def read(directory: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(directory / "final.npz") as arrays:
        return dict(arrays)


def undisturbed(directory: pathlib.Path, devices: int, steps: int, *options: str):
    """What nothing happens to, and which so has nothing to save."""
    directory.mkdir()
    process = start(PROGRAM, directory, steps, devices, "--no-saves", *options)
    assert finished(process) == [("resumed", 0)]
    return read(directory)


def counts(found: dict[str, np.ndarray]) -> tuple[int, int]:
    """The steps that each of the guards skipped, taken out."""
    return int(found.pop("skipped")), int(found.pop("spikes"))


@pytest.mark.broad
@pytest.mark.parametrize(
    ("instants", "saves", "damages"), [(2, 2, 1), pytest.param(60, 60, 40, marks=pytest.mark.slow)]
)
def test_a_run_ends_bit_equal_whatever_happens_to_it(instants, saves, damages, tmp_path):
    """With the other slow one more than 300 faults, most of them SIGKILL."""
    pick = random.Random(instants)
    run = Supervised(tmp_path)
    for _ in range(2):  # so that there is something to be damaged; and how long does it take?
        began = time.monotonic()
        run.killed(2, 0.01, after="saving", times=4)
        pace = time.monotonic() - began
    faults = ["instant"] * instants + ["save"] * (saves - 2) + ["damage"] * damages
    for fault in pick.sample(faults, len(faults)):
        if fault == "instant":
            run.killed(2, pick.uniform(0.0, 1.3 * pace), after=None)
        elif fault == "save":
            run.killed(2, pick.uniform(0.0, 0.04), after="saving", times=pick.randint(1, 4))
        else:
            run.damaged(2, pick)
    steps = max(run.saved + MORE, 60)  # at least a batch of each poison
    found = run.ended(2, steps)
    expected = undisturbed(tmp_path / "undisturbed", 2, steps)
    clean = undisturbed(tmp_path / "clean", 2, steps, "--left-out")

    nans = sum(step % 20 == 7 for step in range(1, steps + 1))
    spikes = sum(step % 48 == 30 and step % 20 != 7 for step in range(1, steps + 1))
    run.happened |= {"a batch that gives NaN": nans, "a loss a million times as large": spikes}
    print(dict(run.happened), "total", sum(run.happened.values()), "in", steps, "steps")
    assert run.happened["a damaged last checkpoint"] == damages
    assert run.happened["killed while it saved"] > saves / 2
    assert sum(counts(found)) == sum(counts(expected)) == nans + spikes
    assert counts(clean) == (0, 0)
    for name, value in expected.items():
        assert found[name].tobytes() == value.tobytes(), name
        assert clean[name].tobytes() == value.tobytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("moves", [(8, 4, 2), (8, 4, 2) * 12])
def test_a_run_that_is_moved_to_other_devices_ends_where_it_would_have(moves, tmp_path):
    """In float64: devices add up in another order, so the last bits differ, and grow from there."""
    pick = random.Random(len(moves))
    run = Supervised(tmp_path, "--x64")
    for devices in moves:
        run.killed(devices, pick.uniform(0.0, 0.1), after="saved", times=pick.randint(1, 3))
    steps = run.saved + MORE
    found = run.ended(moves[-1], steps)
    expected = undisturbed(tmp_path / "undisturbed", 8, steps, "--x64")
    run.happened["moved to other devices"] = len(moves) - 1
    print(dict(run.happened), "in", steps, "steps")
    assert counts(found) == counts(expected)
    worst = max(np.max(np.abs(found[name] - expected[name])) for name in expected)
    print("largest difference", worst)
    assert worst < 1e-9
