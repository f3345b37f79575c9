"""examples/gallery: its numbers are those of its JSON files, its scripts run, its claims hold."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import re
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from common import often

ROOT = pathlib.Path(__file__).parent.parent
GALLERY = ROOT / "examples" / "gallery"
README = (GALLERY / "README.md").read_text()
SCRIPTS = sorted(
    p.stem for p in GALLERY.glob("*.py") if p.stem not in ("shared", "tables", "language")
)  # fmt: skip

TINY = {
    "amsgrad": ["--seeds=2", "--steps=2", "--periods=2"],
    "decay": ["--seeds=1", "--steps=2"],
    "rectifier": ["--seeds=2", "--steps=12", "--draws=10"],
    "friction": ["--seeds=2", "--steps=3"],
    "elementwise": ["--seeds=2", "--steps=5"],
    "one_cycle": ["--seeds=2", "--steps=50"],
    "decades": ["--seeds=2", "--steps=1"],
    "warmup": ["--seeds=1", "--steps=2"],
    "spectrogram": ["--seeds=1", "--steps=12"],
    "adopt": ["--seeds=1", "--periods=2"],
    "cautious": ["--seeds=1", "--steps=3"],
    "slow_average": ["--seeds=1", "--steps=3"],
    "schedule_free": ["--seeds=1", "--steps=8"],
    "hyperball": ["--seeds=1", "--steps=2"],
    "matrices": ["--seeds=1", "--steps=3"],
    "mars_variance": ["--seeds=1", "--steps=8"],
}
QUICK = {"rectifier", "friction", "elementwise"}  # the others with -m slow


@pytest.fixture
def gallery(monkeypatch):
    """Imports a script of the gallery as it runs: with its own folder in the path."""
    monkeypatch.syspath_prepend(GALLERY)

    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"gallery_{name}", GALLERY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("shared", "warmup", "amsgrad", "language"):
        sys.modules.pop(name, None)


def section(name: str) -> str:
    return re.search(rf"<!-- {name}: begin -->(.*?)<!-- {name}: end -->", README, re.DOTALL)[1]


def test_every_claim_leads_to_its_section():
    headings = re.findall(r"^## (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    linked = set(re.findall(r"\]\(#([\w-]+)\)", README))
    assert linked <= anchors
    assert anchors - linked == {"not-reproduced"}


def test_every_script_has_a_picture_numbers_and_a_section():
    assert set(TINY) == set(SCRIPTS)
    for name in SCRIPTS:
        assert f"]({name}.py)" in README
        assert f"]({name}.png)" in README
        assert f"]({name}.json)" in README
        assert 2_000 < (GALLERY / f"{name}.png").stat().st_size <= 150 * 1024
        assert plt.imread(GALLERY / f"{name}.png")[..., :3].mean() > 0.6  # a light background


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_number_in_a_table_is_in_the_json(name):
    """Read with nothing of the script that writes the tables."""
    rows = {r["what"]: r for r in json.loads((GALLERY / f"{name}.json").read_text())["rows"]}
    lines = section(name).strip().splitlines()[2:]
    assert len(lines) == len(rows)
    for line in lines:
        what, mean, spread, count = (cell.strip() for cell in line.strip("|").split(" | "))
        r = rows[what.strip()]
        assert float(mean.split()[0]) == float(f"{r['mean']:.4g}")
        assert (spread == "") == (r["spread"] is None)
        assert spread == "" or float(spread) == float(f"{r['spread']:.3g}")
        assert int(count) == r["n"]


@pytest.mark.broad
@pytest.mark.parametrize("name", often(QUICK, SCRIPTS))
def test_a_script_measures_and_draws(name, gallery, tmp_path):
    found = gallery(name).main([*TINY[name], "--output", str(tmp_path)])
    shown = json.loads((GALLERY / f"{name}.json").read_text())
    assert set(found) == set(shown)
    assert plt.imread(tmp_path / f"{name}.png").std() > 0.02
    kept = json.loads((tmp_path / f"{name}.json").read_text())
    assert kept["settings"]["seeds"] == int(TINY[name][0].split("=")[1])
    assert all(r["mean"] is not None for r in kept["rows"])


def test_wrong_options_say_what_is_wrong(gallery, capsys):
    main = gallery("friction").main
    for arguments, reason in (
        (["--seeds=0"], "--seeds must be at least 1, got 0"),
        (["--output=no/such/folder"], "there is no folder no/such/folder"),
    ):
        with pytest.raises(SystemExit):
            main(arguments)
        assert reason in capsys.readouterr().err


# --- the claims, measured again -------------------------------------------------------------------


@pytest.fixture
def measured(gallery, tmp_path):
    """The mean in each row of a script, run with its own settings."""

    def run(name: str) -> dict[str, float]:
        found = gallery(name).main(["--output", str(tmp_path)])
        return {r["what"]: r["mean"] for r in found["rows"]}

    return run


@pytest.mark.slow
def test_adam_goes_to_the_worst_point_of_the_online_problem_and_amsgrad_to_the_best(measured):
    found = measured("amsgrad")
    assert found["x at the end, adam, lr 3e-3, b2 .99"] > 0.9
    assert found["x at the end, amsgrad, lr 3e-3, b2 .99"] < -0.9
    assert found["regret, amsgrad over adam"] < 0.6


@pytest.mark.slow
def test_decoupled_decay_is_the_closed_form_at_every_gradient_and_l2_is_not(measured, tmp_path):
    found = measured("decay")
    left = json.loads((tmp_path / "decay.json").read_text())["left"]["decoupled, times lr"]
    by_size = np.mean(left, axis=0)
    assert by_size.shape == (9,)
    assert np.all((by_size >= 0.045) & (by_size <= 0.055))
    assert found["left, L2 in the gradient: largest minus smallest"] > 0.9
    assert found["tilt of the best decay, decoupled, not times lr"] > 0.7
    assert abs(found["tilt of the best decay, decoupled, times lr"]) < 0.3


@pytest.mark.slow
def test_the_rectified_rate_has_one_variance_and_the_plain_one_has_not(measured):
    found = measured("rectifier")
    assert found["rectified: smallest variance"] >= 1.5e-4
    assert found["rectified: largest variance"] <= 2.8e-4
    assert found["largest over smallest, Adam, steps 10 to 1000"] > 100


@pytest.mark.slow
def test_adamod_trains_the_post_ln_transformer_that_adam_does_not(measured):
    found = measured("warmup")
    assert found["Adam minus AdaMod, post-LN, lr 0.01"] > 0.4


@pytest.mark.slow
def test_half_the_learning_rate_does_on_f1_what_diffgrad_does(measured):
    found = measured("friction")
    assert found["x after 300 steps from -1, Adam"] > 0.1
    for name in ("diffGrad", "Adam, half the learning rate"):
        assert abs(found[f"x after 300 steps from -1, {name}"] + 0.3) < 0.05


@pytest.mark.slow
def test_a_rate_for_every_weight_is_better_on_the_axis_aligned_quadratic(measured):
    assert measured("elementwise")["gain in loss, geometric mean, axis-aligned"] > 4


@pytest.mark.slow
def test_adopt_reaches_the_best_point_at_every_b2_without_its_clipping_only(measured):
    found = measured("adopt")
    wrong = "part of the settings that end at x > 0, {}".format
    assert found[wrong("ADOPT without its clipping")] == 0
    assert found[wrong("ADOPT")] > 0.2


@pytest.mark.slow
def test_what_mars_keeps_of_the_batch_before_reduces_no_variance(measured):
    found = measured("mars_variance")
    assert found["today's batch, gamma 1 over plain, lr 0.001"] < 0.6
    assert found["the batch before, gamma 1 over plain, lr 0.001"] > 5
    for form in ("today's batch", "the batch before"):
        for rate in ("0.0001", "0.001"):
            assert 0.9 < found[f"{form}, gamma 0.025 over plain, lr {rate}"] < 1.1


@pytest.mark.slow
def test_a_schedule_free_run_is_ahead_of_tuned_cosines_of_all_lengths(measured):
    found = measured("schedule_free")
    ahead = [mean for what, mean in found.items() if what.startswith("Schedule-Free AdamW after")]
    assert len(ahead) == 4
    assert max(ahead) < -0.03
