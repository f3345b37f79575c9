"""The benchmarks run, and report what they measured."""

from __future__ import annotations

import json

import matplotlib.pyplot as plt
import pytest

from benchmarks import cases, step


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("benchmarks")
    sizes = ["--elements", "4096", "--leaves", "3", "--rounds", "2", "--threads", "1"]
    what = ["--cases", "leaf", "small", "--algorithms", "adamod", "--output", str(output)]
    return step.main([*sizes, *what]), output


def test_every_contestant_has_a_time_in_every_round_and_what_it_costs(small_run):
    results, output = small_run
    assert results == json.loads((output / "step.json").read_text())
    assert results["device"]
    assert results["cases"]["small"]["leaves"] == 3
    for found in results["cases"].values():
        contestants = found["algorithms"]["adamod"]
        assert {"ours", "hand-fused", "single_pass(ours)", "floor"} <= set(contestants)
        for facts in contestants.values():
            assert len(facts["seconds"]) == 2
            assert min(facts["seconds"]) > 0
            assert facts["state bytes"] >= 12 * found["elements"]


def test_the_floor_moves_what_the_algorithm_must_move(small_run):
    contestants = small_run[0]["cases"]["leaf"]["algorithms"]["adamod"]
    key = "bytes accessed per parameter"
    assert contestants["floor"][key] == pytest.approx(36, abs=0.1)
    assert contestants["single_pass(ours)"][key] == pytest.approx(36, abs=0.1)
    assert contestants["ours"][key] <= contestants["hand-fused"][key] + 0.1


def test_table_and_chart_show_every_contestant(small_run):
    results, output = small_run
    rows = (output / "step.md").read_text().splitlines()
    assert len(rows) == 2 + sum(len(c["algorithms"]["adamod"]) for c in results["cases"].values())
    assert plt.imread(output / "step.png").std() > 0.05


def test_ratios_are_paired_by_round():
    assert step.ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (2.0, 1.5, 2.5)


def test_the_cases_have_as_many_leaves_as_they_say():
    assert len(cases.transformer(8)) == 148
    shapes = cases.small(2000)
    assert len(shapes) == 2000
    assert all(64 <= n <= 4096 for (n,) in shapes.values())
