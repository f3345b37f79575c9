"""examples/quickstart.py as a user runs it, with the settings it shows."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pytest


@pytest.fixture(scope="module")
def run(example, tmp_path_factory):
    picture = tmp_path_factory.mktemp("quickstart") / "curves.png"
    return example("quickstart").main(["--output", str(picture)]), picture


def test_every_optimizer_learns_the_digits(run):
    results, _ = run
    assert [r.name for r in results] == ["adam", "adamw", "amsgrad", "adamod", "diffmod"]
    for result in results:
        assert result.accuracies[-1][1] >= 0.97
        assert result.losses[0] > 2.0
        assert result.losses[-20:].mean() < 0.05


def test_the_state_has_two_three_or_four_buffers_per_weight(run):
    weights = 38_282
    assert [round(r.state_bytes / 4 / weights) for r in run[0]] == [2, 2, 3, 3, 4]


def test_a_picture_is_saved(run):
    image = plt.imread(run[1])
    assert image.shape[0] > 300
    assert len(np.unique(image.reshape(-1, image.shape[-1]), axis=0)) > 20


def test_the_options(example, tmp_path, capsys):
    picture = tmp_path / "two.png"
    arguments = ["--optimizers", "adamod", "adam", "--steps", "3", "--seed", "5"]
    results = example("quickstart").main([*arguments, "--output", str(picture)])
    assert [(r.name, len(r.losses)) for r in results] == [("adamod", 3), ("adam", 3)]
    assert picture.exists()
    table = capsys.readouterr().out
    assert "state bytes" in table
    assert [line.split()[0] for line in table.splitlines() if line][1:3] == ["adamod", "adam"]


def test_a_wrong_optimizer_lists_the_right_ones(example, capsys):
    with pytest.raises(SystemExit):
        example("quickstart").main(["--optimizers", "adagram"])
    message = capsys.readouterr().err
    for name in ("adagram", "adam", "adamw", "amsgrad", "adamod", "diffmod"):
        assert name in message
    for arguments, reason in (
        (["--steps", "0"], "--steps must be at least 1"),
        (["--output", "no/such/folder/curves.png"], "there is no folder no/such/folder"),
    ):
        with pytest.raises(SystemExit):
            example("quickstart").main(arguments)
        assert reason in capsys.readouterr().err


def test_help_explains_every_option(example, capsys):
    with pytest.raises(SystemExit) as stop:
        example("quickstart").main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--steps", "--optimizers", "--output", "--seed"):
        assert option in shown
