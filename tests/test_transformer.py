"""examples/transformer.py: the same losses in every layout, and after a resume elsewhere."""

from __future__ import annotations

import re

import matplotlib.pyplot as plt
import numpy as np
import pytest

SMALL = [
    "--width=16", "--layers=1", "--context=16", "--batch=8", "--save-every=3", "--steps",
]  # fmt: skip
MIDDLE, STEPS = 5, 10


@pytest.fixture(scope="module")
def main(example):
    return example("transformer").main


@pytest.fixture(scope="module")
def uninterrupted(main, tmp_path_factory):
    picture = tmp_path_factory.mktemp("transformer") / "loss.png"
    losses = main([*SMALL, str(STEPS), "--sharding", "zero1", "--output", str(picture)])
    assert plt.imread(picture).std() > 0.05
    return losses


@pytest.mark.broad
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp", "data"),
        pytest.param("data", "fsdp", marks=pytest.mark.slow),
        pytest.param("fsdp", "fsdp", marks=pytest.mark.slow),
        pytest.param("zero1", "zero1", marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_with_fewer_devices(before, after, main, uninterrupted, tmp_path, capsys):
    """In float32: devices add up in another order, so losses differ in the last bits, by less than
    a thousandth of what a single step changes."""
    one_step = np.abs(np.diff(uninterrupted)).min()
    assert one_step > 1e-3
    saved = ["--checkpoint", str(tmp_path / "runs"), "--output", str(tmp_path / "loss.png")]
    losses = main([*SMALL, str(MIDDLE), *saved, "--sharding", before])
    said = capsys.readouterr().out
    assert "Going on" not in said
    heads, row = (re.split("  +", line) for line in said.splitlines() if "  " in line)
    table = dict(zip(heads, row, strict=True))
    assert [table[key] for key in ("layout", "devices", "steps", "training loss")] == [
        *(before, "8", str(MIDDLE), f"{losses[-1]:.4f}")
    ]
    losses += main([*SMALL, str(STEPS), *saved, "--sharding", after, "--devices", "4"])
    assert f"Going on after step {MIDDLE}" in capsys.readouterr().out
    np.testing.assert_allclose(losses, uninterrupted, rtol=0, atol=1e-3 * one_step)


def test_help_explains_every_option(main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--sharding", "--devices", "--steps", "--checkpoint", "--output", "--seed"):
        assert option in shown


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ("--steps 0", "--steps must be at least 1, got 0"),
        ("--width 6", "--width must be a multiple of 4, got 6"),
        ("--batch 9", "--batch 9 cannot be split over --devices 8"),
        ("--output no/such/folder/loss.png", "there is no folder no/such/folder"),
        ("--sharding zero3", "invalid choice: 'zero3'"),
    ],
)
def test_wrong_options_say_what_is_wrong(main, arguments, reason, capsys):
    with pytest.raises(SystemExit):
        main(arguments.split())
    assert reason in capsys.readouterr().err
