"""The table of who computes what: our column is exact and complete, the page is the data's.

What the others compute, `python -m benchmarks.conformance` measures where they are installed.
"""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from common import RECIPES

from benchmarks.conformance import environment, measure, page, running
from benchmarks.conformance.compare import EXACT, departure
from benchmarks.conformance.libraries import NAMES
from benchmarks.conformance.recorded import ROWS
from benchmarks.conformance.truth import METHODS

FOUND = json.loads(page.DATA.read_text())
RESULTS = FOUND["methods"]
RECORDED = {row["recipe"] for rows in ROWS.values() for row in rows}


def test_every_recipe_with_a_recorded_reference_is_in_the_table_and_exact():
    recipes = {name.split()[0] for name in RECIPES} & RECORDED
    assert len(recipes) >= 40
    assert recipes <= RESULTS.keys() == METHODS.keys()
    for name, method in METHODS.items():
        cases = RESULTS[name][measure.OURS]["cases"]
        assert cases.keys() == method.cases.keys()
        assert all(case["step"] is None and case["by"] <= EXACT for case in cases.values())


@pytest.mark.parametrize(
    ("name", "case"), [("amsgrad", "binding-schedule"), ("diffgrad", "far"), ("muon", "far-wide")]
)
def test_our_column_can_be_measured_again(name, case, x64):
    """And a paper's convention is no library's: the comparison tells them apart."""
    given = METHODS[name].cases[case]
    assert departure(running.ours(given), given.path, given.start).by <= EXACT
    if name == "amsgrad":
        other = departure(running.ours(given, {"convention": "torch"}), given.path, given.start)
        torch = RESULTS[name]["torch.optim"]["cases"][case]
        assert other.step == torch["step"]
        assert other.by == pytest.approx(torch["by"], rel=1e-9)


def test_at_least_twenty_methods_are_compared_with_at_least_three_libraries():
    """Every cell that departs says why, and every convention it claims was within rounding."""
    assert sum(len(cells) > 3 for cells in RESULTS.values()) >= 20
    assert {name for cells in RESULTS.values() for name in cells} == {measure.OURS, *NAMES}
    assert measure.faults(RESULTS) == []
    silent = {"adam": {"optax": {"cases": {"far": {"step": 3, "by": 1e-3}}, "differs": ""}}}
    false = {"adam": {"optax": {"cases": {}, "differs": "", "ours": {}, "from ours by": 1e-9}}}
    assert len(measure.faults(silent)) == len(measure.faults(false)) == 1


def test_the_page_is_what_the_data_says():
    between = page.PAGE.read_text().split(page.BEGIN)[1].split(page.END)[0]
    assert between.strip() == page.page(FOUND)


def test_the_versions_are_those_of_the_environment():
    pins = "".join((environment.HERE / name).read_text() for name in environment.FILES)
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", pins, re.M))
    measured = {n: v.partition("+")[0] for n, v in FOUND["versions"].items()}
    assert pinned.items() - measured.items() == {("numpy", pinned["numpy"])}


def test_a_departure_is_the_first_step_that_is_off_and_the_largest_difference():
    truth = np.array([[1.0, 0.0], [2.0, 0.0], [1.0, 4.0]])
    assert departure(truth, truth, truth[0]).step is None
    made = truth + np.array([[0.0, 0.0], [1e-9, 0.0], [0.0, 1.0]])
    assert departure(made, truth, truth[0]).step == 2
    assert departure(made, truth, truth[0]).by == pytest.approx(1 / 5)
    assert departure(np.full_like(truth, np.nan), truth, truth[0]).by == 2
