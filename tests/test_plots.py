"""The pictures show the data that they were given: what is checked is what was drawn."""

from __future__ import annotations

import doctest
import sys

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex

from adaptive_opt import observer, read_telemetry, telemetry
from adaptive_opt.recipes.adam import adam, amsgrad
from adaptive_opt.watching import plots
from adaptive_opt.watching.plots import (
    Recorder,
    limited_fractions,
    loss_curves,
    rate_spectrogram,
    schedules,
    sensitivity_curve,
)
from adaptive_opt.watching.tally import BIN_EDGES


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def recorded(optimizer, steps=5):
    recorder, x = Recorder(), jnp.array([1.0, 2.0, 3.0])
    state, update = optimizer.init(x), jax.jit(optimizer.update)
    for t in range(steps):
        _, state = update(x * jnp.array([1.0, 3.0, 0.1]) ** t, state, x)
        recorder.record(state)
    return recorder, state


@pytest.fixture(scope="module")
def two():
    watch = telemetry(every=2)
    return {
        "Adam": recorded(adam(1e-2, observers=watch))[0],
        "AMSGrad": recorded(amsgrad(1e-1, b2=0.5, observers=watch))[0],
    }


def test_a_recorder_keeps_every_look_once():
    recorder, state = recorded(adam(1e-2, observers=telemetry(every=2)))
    assert recorder.steps == [1, 3, 5]
    recorder.record(state)
    assert recorder.steps == [1, 3, 5]
    assert recorder.rows[-1] == read_telemetry(state)
    steps, values = recorder.curve("rate/all/q50")
    np.testing.assert_array_equal(steps, [1, 3, 5])
    assert values[-1] == read_telemetry(state)["rate/all/q50"]
    with pytest.raises(ValueError, match=r"'q50' was not recorded; there is b1, .*rate/all/q50"):
        recorder.curve("q50")
    with pytest.raises(ValueError, match="nothing has been recorded"):
        Recorder().curve("b1")


def test_the_spectrogram_draws_the_histograms_on_one_scale(two):
    figure = rate_spectrogram(two)
    panels = figure.axes[:2]
    assert [axes.get_title() for axes in panels] == ["Adam", "AMSGrad"]
    assert panels[0].get_ylim() == panels[1].get_ylim()
    assert panels[0].get_ylabel() == "learning rate times rate of a weight (log10)"
    meshes = [next(c for c in axes.collections if isinstance(c, QuadMesh)) for axes in panels]
    assert meshes[0].norm.vmin == meshes[1].norm.vmin
    assert meshes[0].norm.vmax == meshes[1].norm.vmax == 100
    for mesh, axes, recorder in zip(meshes, panels, two.values(), strict=True):
        drawn = np.ma.filled(mesh.get_array(), 0).reshape(len(BIN_EDGES) - 1, 3)
        np.testing.assert_allclose(drawn, 100 * recorder.spectrogram()[:, 1:-1].T, rtol=1e-6)
        edges = mesh.get_coordinates()
        np.testing.assert_allclose(edges[0, :, 0], [0, 2, 4, 6])  # around the steps 1, 3, 5
        np.testing.assert_allclose(edges[:, 0, 1], BIN_EDGES)
        median = recorder.curve("rate/all/q50")[1]
        np.testing.assert_allclose(axes.lines[0].get_ydata(), np.log10(median))
        low, high = axes.get_ylim()
        filled = BIN_EDGES[:-1][drawn.any(axis=1)]
        assert low < filled.min()
        assert high > filled.max()
    assert figure.axes[2].get_ylabel() == "weights per bin (%)"


def test_the_fraction_of_limited_weights_is_drawn_in_percent(two):
    axes = limited_fractions(two).axes[0]
    (line,) = axes.lines  # Adam has no bound
    assert line.get_label() == "AMSGrad"
    expected = 100 * two["AMSGrad"].curve("limited/amsgrad_max/all")[1]
    np.testing.assert_allclose(line.get_ydata(), expected)
    assert len(set(expected)) > 1
    assert limited_fractions(two, log=True).axes[0].get_xscale() == "log"
    with pytest.raises(ValueError, match="no bound, maximum or rectifier"):
        limited_fractions({"Adam": two["Adam"]})


def test_schedules_have_a_panel_for_each_and_a_colour_for_each_name(two):
    rates = {name: recorder.curve("learning_rate") for name, recorder in two.items()}
    figure = schedules({"learning rate": rates, "b1": {"AMSGrad": two["AMSGrad"].curve("b1")}})
    upper, lower = figure.axes
    assert (upper.get_ylabel(), lower.get_ylabel()) == ("learning rate", "b1")
    assert lower.get_xlabel() == "step"
    for line, (steps, values) in zip(upper.lines, rates.values(), strict=True):
        np.testing.assert_array_equal(line.get_xydata(), np.stack([steps, values], axis=1))
    assert upper.lines[1].get_color() == lower.lines[0].get_color() != upper.lines[0].get_color()


def test_losses_are_drawn_as_the_median_and_the_range_of_the_seeds():
    runs = np.array([[4.0, 2.0, 1.0], [5.0, 3.0, 2.0], [9.0, np.inf, np.nan]])
    axes = loss_curves({"Adam": runs, "gone": np.full((2, 3), np.nan)}).axes[0]
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[1, 5], [2, 2.5], [3, 1.5]])
    assert axes.lines[0].get_label() == "Adam (1 of 3 diverged)"
    assert axes.lines[1].get_label() == "gone (2 of 2 diverged)"
    corners = {tuple(xy) for xy in axes.collections[0].get_paths()[0].vertices}
    assert {(1, 4), (1, 9), (2, 2), (2, 3), (3, 1), (3, 2)} == corners
    assert axes.get_yscale() == "log"
    given = loss_curves({"a": runs[0]}, steps=[10, 20, 30], log=False).axes[0]
    np.testing.assert_array_equal(given.lines[0].get_xdata(), [10, 20, 30])


def test_the_sensitivity_curve_marks_rates_at_which_seeds_diverged():
    results = np.array([[2.0, 4.0], [1.0, 1.0], [3.0, np.nan], [np.nan, np.nan]])
    axes = sensitivity_curve({"Adam": ([1e-3, 1e-2, 1e-1, 1], results)}, label="loss").axes[0]
    curve, crosses = axes.lines
    np.testing.assert_allclose(curve.get_xydata(), [[1e-3, 3], [1e-2, 1], [1e-1, 3]])
    np.testing.assert_allclose(crosses.get_xdata(), [1e-1, 1])
    assert axes.get_xscale() == "log"


def test_ticks_are_plain_numbers_where_an_axis_has_few_decades():
    results = np.array([[6.0], [1.2], [1.5]])
    figure = sensitivity_curve({"Adam": ([1e-3, 3e-3, 1e-2], results)}, label="loss")
    figure.canvas.draw()
    for axis, expected in ((figure.axes[0].xaxis, ["0.001", "0.002", "0.005", "0.01"]),
                           (figure.axes[0].yaxis, ["2", "5"])):  # fmt: skip
        low, high = axis.get_view_interval()
        ticks = [t for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
        assert [tick.label1.get_text() for tick in ticks] == expected
        assert not any(tick.label1.get_text() for tick in axis.get_minor_ticks())


def test_pictures_are_light_and_leave_the_settings_of_the_user_alone(two):
    with plt.style.context("dark_background"):
        before = dict(plt.rcParams)
        figure = rate_spectrogram(two)
        assert dict(plt.rcParams) == before
    assert to_hex(figure.get_facecolor()) == to_hex(figure.axes[0].get_facecolor()) == "#ffffff"


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'adaptive_opt\[plots\]'"):
        loss_curves({"a": [1.0]})


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(plots)
    assert result.attempted > 20
    assert result.failed == 0


def test_a_recorder_takes_the_steps_of_telemetry_and_starts_again_with_the_run():
    norm = observer(lambda s: {"n": optax.tree.norm(s.gradient)}, {"n": ()}, every=1, name="mine")
    optimizer = adam(lambda t: 1e-2 * (t + 1), observers=[norm, telemetry(every=4)])
    update, x, recorder = jax.jit(optimizer.update), jnp.ones(2), Recorder()
    for _ in range(2):
        state = optimizer.init(x)
        for _ in range(6):
            _, state = update(x, state, x)
            recorder.record(state)
        assert recorder.steps == [1, 5]
        np.testing.assert_allclose(recorder.curve("learning_rate")[1], [0.01, 0.05], rtol=1e-6)


def test_a_number_that_is_not_always_there_is_nan_where_it_is_not():
    optimizer, x, recorder = adam(1e-2, observers=telemetry(every=1)), jnp.zeros(2), Recorder()
    state, update = optimizer.init(x), jax.jit(optimizer.update)
    for params in (x, x + 1):  # of zeros there is no ratio
        _, state = update(jnp.ones(2), state, params)
        recorder.record(state)
    first, second = recorder.curve("update_ratio/all")[1]
    assert np.isnan(first)
    assert second == pytest.approx(0.01, rel=1e-3)
