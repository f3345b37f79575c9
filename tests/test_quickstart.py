"""examples/quickstart.py as a user runs it, with fewer steps and seeds."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest

STEPS, SEEDS = 200, 2


@pytest.fixture(scope="module")
def quickstart(example):
    return example("quickstart")


@pytest.fixture(scope="module")
def run(quickstart, tmp_path_factory):
    picture = tmp_path_factory.mktemp("quickstart") / "curves.png"
    shorter = ["--steps", str(STEPS), "--seeds", str(SEEDS)]
    return quickstart.main([*shorter, "--output", str(picture)]), picture


@pytest.mark.slow
def test_every_optimizer_learns_the_digits_at_a_rate_of_its_own(run, quickstart):
    results, _ = run
    assert [r.name for r in results] == ["adam", "adamw", "amsgrad", "adamod", "diffmod"]
    for result in results:
        assert result.learning_rate in quickstart.RATES[1:]  # of the lowest it learns little yet
        assert result.losses.shape == (SEEDS, STEPS)
        assert result.errors.shape == (SEEDS,)
        assert result.errors.max() <= 0.07
        assert result.losses[:, 0].min() > 2.0
        assert result.losses[:, -20:].mean() < 0.1


@pytest.mark.slow
def test_the_state_has_two_three_or_four_buffers_per_weight(run):
    weights = 64 * 128 + 128 + 128 * 10 + 10
    assert [round(r.state_bytes / 4 / weights) for r in run[0]] == [2, 2, 3, 3, 4]


@pytest.mark.slow
def test_a_picture_is_saved(run):
    image = plt.imread(run[1])
    assert image.shape[0] > 300
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20


def test_the_conclusion_is_that_of_the_numbers(quickstart):
    def of(name, *errors):
        return quickstart.Result(name, 1e-2, np.ones((2, 3)), np.array(errors), 1.0, 8)

    alike = [of("adam", 0.02, 0.03), of("adamod", 0.022, 0.03)]
    assert "differ no more than those of seeds" in quickstart.conclusion(alike)
    apart = [of("adam", 0.02, 0.021), of("adamod", 0.05, 0.051)]
    assert "differ more than those of seeds" in quickstart.conclusion(apart)
    assert quickstart.conclusion(alike[:1]) == "adam: 2.5 % of the test digits wrong"


def test_the_options(quickstart, tmp_path, capsys):
    picture = tmp_path / "one.png"
    arguments = ["--optimizers", "adamod", "--steps", "3", "--seeds", "1", "--seed", "5"]
    results = quickstart.main([*arguments, "--output", str(picture)])
    assert [(r.name, r.losses.shape) for r in results] == [("adamod", (1, 3))]
    assert picture.exists()
    table = capsys.readouterr().out
    assert "state bytes" in table
    assert [line.split()[0] for line in table.splitlines() if line][1] == "adamod"


def test_a_wrong_optimizer_lists_the_right_ones(quickstart, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(["--optimizers", "adagram"])
    message = capsys.readouterr().err
    for name in ("adagram", "adam", "adamw", "amsgrad", "adamod", "diffmod"):
        assert name in message
    for arguments, reason in (
        (["--steps", "0"], "--steps must be at least 1"),
        (["--output", "no/such/folder/curves.png"], "there is no folder no/such/folder"),
    ):
        with pytest.raises(SystemExit):
            quickstart.main(arguments)
        assert reason in capsys.readouterr().err


def test_help_explains_every_option(quickstart, capsys):
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--steps", "--seeds", "--optimizers", "--output", "--seed"):
        assert option in shown
