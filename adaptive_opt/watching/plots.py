"""Pictures of what an optimizer does, of what ``read_telemetry`` and ``rate_histograms`` return.

They need matplotlib (``pip install 'adaptive_opt[plots]'``), which is imported when something is
drawn. Every function draws on a light background in colours that colour-blind people and black and
white printers tell apart, gives every axis its unit, and returns the figure; save it with
``figure.savefig("rates.png")``.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from adaptive_opt.core.checks import needed
from adaptive_opt.watching.reading import Reading
from adaptive_opt.watching.tally import BIN_EDGES

if TYPE_CHECKING:
    from adaptive_opt.watching.range_test import RangeTest

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LEAST_PERCENT = 0.01
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (3, 3)), "-")

Curve = tuple[Sequence[float], Sequence[float]]
"""Steps, and a number for each."""


class Recorder:
    """Collects telemetry while training, for the pictures below.

    Call ``record(state)`` as often as you like: what has been seen already is not recorded again.
    It takes what ``read_telemetry`` takes. ``save(path)`` writes all of it to a JSON file, next to
    the checkpoint say; a run that is started again goes on with ``Recorder.load(path)``.

    Attributes:
      steps: the steps at which telemetry looked.
      rows: for each of them, the dict of ``read_telemetry``.
      histograms: for each of them, the dict of ``rate_histograms``.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, telemetry
    >>> from adaptive_opt.watching.plots import Recorder
    >>> optimizer, x, recorder = adam(1e-2, observers=telemetry(every=2)), jnp.ones(2), Recorder()
    >>> state, update = optimizer.init(x), jax.jit(optimizer.update)
    >>> for _ in range(4):
    ...     _, state = update(x, state, x)
    ...     recorder.record(state)
    >>> recorder.steps, recorder.curve("learning_rate")[1].round(3).tolist()
    ([1, 3], [0.01, 0.01])
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.rows: list[dict[str, float]] = []
        self.histograms: list[dict[str, np.ndarray]] = []

    def record(self, state: Any) -> None:
        """Keep what the telemetry in a state saw last, if that is new.

        Steps are those of the bracket that has taken most: a group that is unfrozen later starts
        its own count, and what was recorded before stays.

        Where a run goes on from an earlier step, or another one starts, what came later is
        forgotten.
        """
        read = Reading.of(state)
        step = read.step
        while step is not None and self.steps and self.steps[-1] > step:
            for kept in (self.steps, self.rows, self.histograms):
                kept.pop()
        if step is not None and step not in self.steps[-1:]:
            self.steps.append(step)
            self.rows.append(read.numbers())
            self.histograms.append(read.histograms())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what was recorded to a JSON file; one that is there is replaced as a whole."""
        histograms = [{k: h.tolist() for k, h in kept.items()} for kept in self.histograms]
        kept = {"steps": self.steps, "rows": self.rows, "histograms": histograms}
        new = pathlib.Path(f"{os.fspath(path)}.new")
        new.write_text(json.dumps(kept))
        new.replace(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recorder:
        """A recorder with what ``save`` wrote."""
        kept, recorder = json.loads(pathlib.Path(path).read_text()), cls()
        recorder.steps, recorder.rows = kept["steps"], kept["rows"]
        recorder.histograms = [
            {k: np.array(h) for k, h in each.items()} for each in kept["histograms"]
        ]
        return recorder

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps, and the number with this key at each of them; NaN where there was none."""
        self._check(key, self.rows)
        return np.asarray(self.steps), np.asarray([row.get(key, np.nan) for row in self.rows])

    def spectrogram(self, group: str = "all") -> np.ndarray:
        """A row for each recorded step, a column for each bin of the histogram."""
        self._check(group, self.histograms)
        return np.stack([histogram[group] for histogram in self.histograms])

    def _check(self, key: str, kept: Sequence[Mapping[str, Any]]) -> None:
        if not kept:
            raise ValueError("nothing has been recorded yet: call record(state) while training.")
        keys = {name for row in kept for name in row}
        if key not in keys:
            raise ValueError(f"{key!r} was not recorded; there is {', '.join(sorted(keys))}.")


def rate_spectrogram(recorders: Mapping[str, Recorder], *, group: str = "all") -> Any:
    """The histogram of the per-weight rate against the step, side by side on one scale.

    The darker a cell, the more weights have a rate in that bin at that step, on a logarithmic scale
    (white: none; .01 % and less look alike); the line is the median. All panels share the axes and
    the colours, so that optimizers compare. Rates outside of the bins (10^-12 to 10^6, and 0) are
    not drawn, but ``read_telemetry`` counts them.

    Args:
      recorders: by the title of their panel.
      group: of the parameters.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, telemetry
    >>> from adaptive_opt.watching.plots import Recorder, rate_spectrogram
    >>> optimizer, x, recorder = adam(1e-2, observers=telemetry()), jnp.ones(2), Recorder()
    >>> _, state = jax.jit(optimizer.update)(x, optimizer.init(x), x)
    >>> recorder.record(state)
    >>> figure = rate_spectrogram({"Adam": recorder})
    >>> figure.axes[0].get_title()
    'Adam'
    """
    percents = {name: 100 * r.spectrogram(group)[:, 1:-1] for name, r in recorders.items()}
    filled = np.flatnonzero(sum(p.sum(axis=0) for p in percents.values()))
    low, high = (filled[0], filled[-1] + 1) if len(filled) else (0, len(BIN_EDGES) - 1)
    with _style() as plt:
        colors = needed("matplotlib.colors", "plots", "the pictures")

        figure, panels = plt.subplots(
            1, len(recorders), figsize=(1.2 + 2.9 * len(recorders), 3.2), sharey=True,
            squeeze=False, layout="constrained",
        )  # fmt: skip
        panels, mesh = panels[0], None
        for axes, (name, recorder) in zip(panels, recorders.items(), strict=True):
            steps = np.asarray(recorder.steps, float)
            mesh = axes.pcolormesh(
                _edges(steps), BIN_EDGES, np.ma.masked_equal(percents[name].T, 0),
                cmap="Blues", rasterized=True,
                norm=colors.LogNorm(LEAST_PERCENT, 100, clip=True),
            )  # fmt: skip
            median = recorder.curve(_key("rate", group, "q50"))[1]
            axes.plot(steps, np.log10(np.where(median > 0, median, np.nan)), color=COLOURS[1])
            axes.set(
                title=name, xlabel="step", ylim=(BIN_EDGES[low] - 0.25, BIN_EDGES[high] + 0.25)
            )
        panels[0].set_ylabel("learning rate times rate of a weight (log10)")
        panels[0].yaxis.get_major_locator().set_params(integer=True)
        bar = figure.colorbar(mesh, ax=panels, pad=0.01)
        bar.set_label("weights per bin (%)")
        bar.ax.yaxis.set_major_formatter("{x:g}")
        bar.outline.set_visible(False)
        return figure


def limited_fractions(
    recorders: Mapping[str, Recorder], *, group: str = "all", log: bool = False
) -> Any:
    """The percentage of weights on which bounds, maxima and rectifiers act, against the step.

    Args:
      recorders: by name; those without such a stage are left out.
      group: of the parameters.
      log: whether the steps are on a logarithmic axis, for what happens early.

    ValueError if no recorder has one.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import amsgrad, telemetry
    >>> from adaptive_opt.watching.plots import Recorder, limited_fractions
    >>> optimizer, x, recorder = amsgrad(1e-2, observers=telemetry()), jnp.ones(2), Recorder()
    >>> _, state = jax.jit(optimizer.update)(x, optimizer.init(x), x)
    >>> recorder.record(state)
    >>> limited_fractions({"AMSGrad": recorder}).axes[0].get_ylabel()
    'weights acted on (%)'
    """
    curves = {}
    for name, recorder in recorders.items():
        keys = [
            k
            for k in dict.fromkeys(k for row in recorder.rows for k in row)
            if "limited" in k.split("/") and k.endswith(f"/{group}")
        ]
        for key in keys:
            label = name if len(keys) == 1 else f"{name}: {key.split('/')[-2]}"
            steps, values = recorder.curve(key)
            curves[label] = (steps, 100 * values)
    if not curves:
        raise ValueError("no bound, maximum or rectifier was recorded in this group.")
    figure = _lines([("weights acted on (%)", curves)], log)
    figure.axes[0].set_ylim(-3, 103)
    return figure


def schedules(curves: Mapping[str, Mapping[str, Curve]]) -> Any:
    """Learning rate, b1 and whatever else is given against the step, one panel above the other.

    Args:
      curves: for every panel its label, and in it by name the steps and the values; for instance
        ``{"learning rate": {"one cycle": recorder.curve("learning_rate")}, "b1": {...}}``.

    >>> from adaptive_opt.watching.plots import schedules
    >>> figure = schedules({"learning rate": {"constant": ([0, 9], [0.1, 0.1])}})
    >>> figure.axes[0].get_xlabel(), figure.axes[0].get_ylabel()
    ('step', 'learning rate')
    """
    return _lines(list(curves.items()))


def loss_curves(
    losses: Mapping[str, Any], *, steps: Sequence[float] | None = None, log: bool = True,
    label: str = "training loss (nats)",
) -> Any:  # fmt: skip
    """The median loss over seeds, and a band from the lowest to the highest, against the step.

    Args:
      losses: by name, an array (seeds, steps), or (steps,) for a single run. Members that diverged
        (not finite at some step) end there; a legend entry says how many did.
      steps: the steps of the columns; default 1, 2, ...
      log: whether the loss is on a logarithmic axis.
      label: of the loss, with its unit.

    >>> import numpy as np
    >>> from adaptive_opt.watching.plots import loss_curves
    >>> figure = loss_curves({"Adam": np.array([[2.0, 1.0], [3.0, 2.0]])})
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [2.5, 1.5]
    """
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
        for index, (name, values) in enumerate(losses.items()):
            runs = np.atleast_2d(np.asarray(values, float))
            runs = np.where(np.isfinite(runs), runs, np.nan)
            alive = np.isfinite(runs).any(axis=0)  # at least one seed goes on
            x = np.arange(1, runs.shape[1] + 1) if steps is None else np.asarray(steps)
            diverged = int(np.isnan(runs).any(axis=1).sum())
            named = f"{name} ({diverged} of {len(runs)} diverged)" if diverged else name
            style = {"color": COLOURS[index % len(COLOURS)]}
            runs, x = runs[:, alive], x[alive]
            if len(runs) > 1:
                axes.fill_between(
                    x, np.nanmin(runs, axis=0), np.nanmax(runs, axis=0), alpha=0.2, linewidth=0,
                    **style,
                )  # fmt: skip
            dashes = DASHES[index % len(DASHES)]
            axes.plot(x, np.nanmedian(runs, axis=0), linestyle=dashes, label=named, **style)
        axes.set(xlabel="step", ylabel=label, yscale="log" if log else "linear")
        _plain_ticks(axes.yaxis)
        axes.legend(frameon=False)
        return figure


def sensitivity_curve(curves: Mapping[str, tuple[Any, Any]], *, label: str) -> Any:
    """The result against the learning rate, with a band over seeds: the basin, and its edges.

    Args:
      curves: by name, the learning rates and an array (learning rates, seeds) of results, as
        ``Sweep.sensitivity`` returns them. Diverged members are NaN; a rate at which any diverged
        is marked with a cross at the upper edge.
      label: of the result, with its unit.

    >>> import numpy as np
    >>> from adaptive_opt.watching.plots import sensitivity_curve
    >>> results = np.array([[2.0, 4.0], [1.0, 1.0], [1.0, np.nan]])
    >>> figure = sensitivity_curve({"Adam": ([1e-3, 1e-2, 1e-1], results)}, label="loss (nats)")
    >>> figure.axes[0].lines[0].get_ydata().tolist()
    [3.0, 1.0, 1.0]
    """
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
        for index, (name, (rates, results)) in enumerate(curves.items()):
            rates, results = np.asarray(rates), np.asarray(results, float)
            style = {"color": COLOURS[index % len(COLOURS)]}
            alive = np.isfinite(results).any(axis=1)
            x, kept = rates[alive], results[alive]
            if results.shape[1] > 1 and len(x):
                axes.fill_between(
                    x, np.nanmin(kept, axis=1), np.nanmax(kept, axis=1), alpha=0.2, linewidth=0,
                    **style,
                )  # fmt: skip
            dashes = DASHES[index % len(DASHES)]
            axes.plot(
                x, np.nanmedian(kept, axis=1), marker="os^Dv<>"[index % 7], linestyle=dashes,
                label=name, **style,
            )  # fmt: skip
            lost = rates[~np.isfinite(results).all(axis=1)]
            heights = np.full(len(lost), 1.0 - 0.03 * index)
            transform = axes.get_xaxis_transform()  # rates across, height as a part of the axes
            axes.plot(lost, heights, "x", transform=transform, clip_on=False, **style)
        axes.set(xlabel="learning rate", ylabel=label, xscale="log", yscale="log")
        _plain_ticks(axes.xaxis, axes.yaxis)
        crossed = any(not np.isfinite(results).all() for _, results in curves.values())
        title = "x: some seeds diverged" if crossed else None
        axes.legend(frameon=False, title=title, title_fontsize="small")
        return figure


def range_test(found: RangeTest, *, label: str = "training loss") -> Any:
    """The loss against the growing learning rate, with what the range test suggests.

    The thin line is the loss, the thick one its average. The height is that of the way down to its
    lowest point; where the loss diverges, the lines leave the picture.

    Args:
      found: what ``lr_find`` returned.
      label: of the loss, with its unit.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import lr_find, sgd
    >>> from adaptive_opt.watching.plots import range_test
    >>> found = lr_find(lambda w, x: (w - x) ** 2, jnp.zeros(()), [1.0], sgd, steps=10)
    >>> range_test(found).axes[0].get_xscale()
    'log'
    """
    marks = [("steepest", found.steepest), ("minimum / 10", found.minimum_over_ten)]
    marks = [(name, rate) for name, rate in marks if np.isfinite(rate)]
    with _style() as plt:
        figure, axes = plt.subplots(figsize=(5.2, 3.2), layout="constrained")
        axes.plot(found.rates, found.losses, color=COLOURS[0], linewidth=0.6, alpha=0.6)
        axes.plot(found.rates, found.smoothed, color=COLOURS[0], linewidth=2.2)
        for index, (name, rate) in enumerate(marks):
            colour = COLOURS[index + 1]
            axes.axvline(rate, color=colour, linestyle=DASHES[index + 1], linewidth=1.0)
            left = rate == min(other for _, other in marks)  # the names stand outside of both
            axes.annotate(
                f"{name}: {rate:.2g}", (rate, 0.02 + 0.08 * index), color=colour,
                ha="right" if left else "left", xycoords=("data", "axes fraction"),
                xytext=(-4 if left else 4, 0), textcoords="offset points",
            )  # fmt: skip
        shown = found.smoothed[np.isfinite(found.smoothed)]
        down = shown[: 1 + np.argmin(shown)] if len(shown) else shown
        if len(down) and (fall := np.ptp(down)) > 0:
            axes.set_ylim(down.min() - 0.3 * fall, down.max() + 0.3 * fall)
        end = "diverges" if found.diverged else "does not diverge"
        axes.set(xscale="log", xlabel="learning rate", ylabel=label)
        axes.set_title(
            f"the loss {end} {'at' if found.diverged else 'up to'} {found.rates[-1]:.2g}"
        )
        return figure


@contextlib.contextmanager
def _style() -> Iterator[Any]:
    """pyplot with our settings for the length of a drawing; those of the user stay."""
    plt = needed("matplotlib.pyplot", "plots", "the pictures")
    settings = {
        "figure.facecolor": "white",
        "axes.facecolor": "white",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": "medium",
        "axes.grid": False,
        "lines.linewidth": 1.6,
        "savefig.dpi": 150,
        "font.size": 9.0,
    }
    with plt.style.context(["default", settings]):
        yield plt


def _plain_ticks(*axes: Any) -> None:
    """On a logarithmic axis of few decades ticks are 1, 2, 5, where matplotlib has 2 x 10^0."""
    ticker = needed("matplotlib.ticker", "plots", "the pictures")
    for axis in axes:
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high < 30 * low:
            axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(ticker.NullFormatter())


def _lines(panels: Sequence[tuple[str, Mapping[str, Curve]]], log: bool = False) -> Any:
    """Panels of lines, one above the other, over one axis of steps."""
    with _style() as plt:
        figure, rows = plt.subplots(
            len(panels), 1, figsize=(5.2, 0.8 + 2.2 * len(panels)), sharex=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        names = list(dict.fromkeys(name for _, curves in panels for name in curves))
        for axes, (label, curves) in zip(rows[:, 0], panels, strict=True):
            for name, (steps, values) in curves.items():
                index = names.index(name)  # one name, one colour, in every panel
                axes.plot(
                    np.asarray(steps), np.asarray(values), label=name,
                    color=COLOURS[index % len(COLOURS)], linestyle=DASHES[index % len(DASHES)],
                )  # fmt: skip
            axes.set_ylabel(label)
            if len(curves) > 1:
                axes.legend(frameon=False)
        rows[-1, 0].set_xlabel("step")
        if log:
            rows[-1, 0].set_xscale("log")
        return figure


def _edges(steps: np.ndarray) -> np.ndarray:
    """The edges of cells around the steps."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    middles = (steps[1:] + steps[:-1]) / 2
    return np.concatenate(
        [[1.5 * steps[0] - 0.5 * steps[1]], middles, [2 * steps[-1] - middles[-1]]]
    )


def _key(kind: str, group: str, last: str) -> str:
    """A key of ``read_telemetry``; the group may come with the prefix of its bracket."""
    *prefix, name = group.split("/")
    return "/".join((*prefix, kind, name, last))
