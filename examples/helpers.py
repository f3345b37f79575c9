"""What several examples share: checked options, digits, text, tables, pictures.

Nothing in here knows of optimizers. The pictures are in colours that colour-blind people tell
apart, with line styles for print in grey, on a white background, which stays on a dark page.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import to_rgb
from sklearn.datasets import load_digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from adaptive_opt.watching.plots import COLOURS, DASHES

CHARACTERS = 128  # ASCII
STYLE = {
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "figure.titlesize": "large",
    "figure.titleweight": "bold",
    "font.size": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "savefig.dpi": 110,
}


# --- options --------------------------------------------------------------------------------------


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A parser whose --help begins with the docstring of the example."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options: whole numbers but ``--seed`` at least 1, ``--output`` in a folder that is."""
    options = parser.parse_args(arguments)
    for name, value in vars(options).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, int) and not isinstance(value, bool) and name != "seed" and value < 1:
            parser.error(f"{flag} must be at least 1, got {value}")
        if name == "output" and value and not pathlib.Path(value).parent.is_dir():
            parser.error(f"{flag}: there is no folder {pathlib.Path(value).parent}")
    return options


# --- data -----------------------------------------------------------------------------------------


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1,797 handwritten digits in a random order: (n, 8, 8, 1) in [0, 1], labels."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    return (data.images[order] / 16.0).astype(np.float32)[..., None], data.target[order]


def library_text() -> tuple[np.ndarray, np.ndarray]:
    """The source of Python's standard library in one row of characters, and its last twentieth."""
    library = pathlib.Path(os.__file__).parent
    sources = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    text = np.frombuffer(b"\n".join(sources), np.uint8)
    text = np.where(text < CHARACTERS, text, ord("?"))
    end = len(text) * 19 // 20
    return text[:end], text[end:]


def pieces(text: np.ndarray, seed: Sequence[int], batch: int, context: int) -> np.ndarray:
    """Random pieces of one character more than the context, the same for the same seed."""
    starts = np.random.default_rng(seed).integers(len(text) - context, size=batch)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)


# --- tables and pictures --------------------------------------------------------------------------


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys, in columns: words to the left, numbers to the right."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    words = [not any(c.isdigit() for c in cell[:3]) for cell in cells[1]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if word else cell.rjust(width)
            for cell, width, word in zip(row, widths, words, strict=True)
        ).rstrip()
        for row in cells
    )


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of a line, by its number."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index % len(DASHES)]}


def darker(colour: Any) -> tuple[float, ...]:
    """For words: a colour that makes a good line makes pale letters."""
    return tuple(0.7 * part for part in to_rgb(colour))


def band(axes: Any, x: Any, mean: Any, spread: Any, index: int, **plot: Any) -> None:
    """The line of a mean, by its number, and the spread around it."""
    axes.plot(x, mean, **look(index), **plot)
    colour = look(index)["color"]
    axes.fill_between(x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0)


def label_ends(axes: Any, *, size: float = 8.5) -> None:
    """Names the lines where they end, in place of a legend; names that would touch move apart."""
    named = [line for line in axes.lines if not line.get_label().startswith("_")]
    axes.get_xlim(), axes.get_ylim()  # which are brought up to date by this
    height = axes.get_window_extent().height * 72 / axes.figure.dpi
    gap, ends = 1.3 * size / height, []
    for line in named:
        x, y = (np.asarray(a, float) for a in line.get_data())
        finite = np.flatnonzero(np.isfinite(x) & np.isfinite(y))
        if len(finite):
            end = axes.transData.transform((x[finite[-1]], y[finite[-1]]))
            at = axes.transAxes.inverted().transform(end)[1]
            ends.append((float(np.clip(at, 0, 1)), line))
    ends.sort(key=lambda end: end[0])
    heights = np.array([y for y, _ in ends])
    for _ in range(50):  # push neighbours apart until none touch
        for i in range(len(heights) - 1):
            short = gap - (heights[i + 1] - heights[i])
            if short > 1e-6:
                heights[i : i + 2] += -short / 2, short / 2
    for y, (_, line) in zip(heights, ends, strict=True):
        axes.text(
            1.01, y, line.get_label(), transform=axes.transAxes, va="center", size=size,
            color=darker(line.get_color()),
        )  # fmt: skip


@contextlib.contextmanager
def picture(path: str | os.PathLike[str], title: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
    """``plt.subplots`` in our style; the title says what is to be seen; saved at the end."""
    with plt.style.context(["default", STYLE]):
        figure, axes = plt.subplots(*args, **kwargs)
        figure.suptitle(title, x=0.01, ha="left")
        yield axes
        figure.savefig(path, pil_kwargs={"optimize": True})
        plt.close(figure)
