"""What the scripts of the gallery share: options, numbers with their spread, digits.

Their pictures are in the style of ``examples/helpers.py``.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits
from tqdm import tqdm

HERE = pathlib.Path(__file__).parent
sys.path.append(str(HERE.parent))
from helpers import STYLE, band, darker, label_ends, look, plt  # noqa: E402

__all__ = ["band", "darker", "label_ends", "look", "plt"]


def subplots(title: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """A figure whose title says what is to be seen, and its axes."""
    figure, axes = plt.subplots(*args, **kwargs)
    figure.suptitle(title, x=0.01, ha="left")
    return figure, axes


# --- numbers --------------------------------------------------------------------------------------


def rounded(value: Any) -> Any:
    """Numbers to five digits; None for one that is not finite, which JSON has no word for."""
    if isinstance(value, dict):
        return {str(key): rounded(v) for key, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray, jax.Array)):
        return [rounded(v) for v in np.asarray(value).tolist()] if len(value) else []
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def row(what: str, values: Any, unit: str = "") -> dict[str, Any]:
    """A row of a table: mean and standard deviation over the seeds."""
    values = np.atleast_1d(np.asarray(values, float))
    spread = float(values.std(ddof=1)) if values.size > 1 else None
    return rounded(
        {
            "what": what,
            "mean": float(values.mean()),
            "spread": spread,
            "n": values.size,
            "unit": unit,
        }
    )


def table(found: dict[str, Any]) -> str:
    """The rows of a JSON file as a table in Markdown."""
    lines = ["| measured | mean | standard deviation | of |", "|---|---:|---:|---:|"]
    for r in found["rows"]:
        spread = "" if r["spread"] is None else f"{r['spread']:.3g}"
        unit = f" {r['unit']}" if r["unit"] else ""
        lines.append(f"| {r['what']} | {r['mean']:.4g}{unit} | {spread} | {r['n']} |")
    return "\n".join(lines)


def value(found: dict[str, Any], what: str) -> float:
    """The mean in the row of that name."""
    (mean,) = (r["mean"] for r in found["rows"] if r["what"] == what)
    return mean


# --- scripts --------------------------------------------------------------------------------------


def run(
    script: str,
    measure: Callable[..., dict[str, Any]],
    draw: Callable[[dict[str, Any]], Any],
    arguments: Sequence[str] | None,
    **options: tuple[int, str],
) -> dict[str, Any]:
    """Measure, write the JSON, draw from what it says, write the picture.

    ``options``: the number that each has by default, and what it is.
    """
    name = pathlib.Path(script).stem
    parser = argparse.ArgumentParser(description=f"Makes {name}.json and {name}.png.")
    for option, (default, meaning) in options.items():
        parser.add_argument(f"--{option}", type=int, default=default, help=f"{meaning} ({default})")
    parser.add_argument(
        "--output", default=str(HERE), help="the folder to write to (that of the script)"
    )
    parser.add_argument("--redraw", action="store_true", help="only draw what was measured before")
    chosen = parser.parse_args(arguments)
    settings = {option: getattr(chosen, option) for option in options}
    for option, number in settings.items():
        if number < 1:
            parser.error(f"--{option} must be at least 1, got {number}")
    folder = pathlib.Path(chosen.output)
    if not folder.is_dir():
        parser.error(f"--output: there is no folder {folder}")
    path = folder / f"{name}.json"
    if not chosen.redraw:
        found = rounded(measure(**settings))
        found = {"settings": settings | found.pop("settings", {}), **found}
        path.write_text(pretty(found) + "\n")
    found = json.loads(path.read_text())
    with plt.style.context(["default", STYLE | {"savefig.dpi": 100}]):
        figure = draw(found)
        figure.savefig(folder / f"{name}.png", pil_kwargs={"optimize": True})
        plt.close(figure)
    print(table(found))
    return found


def pretty(found: dict[str, Any]) -> str:
    """JSON with a line for every entry and every row."""
    lines = []
    for key, entry in found.items():
        if key == "rows":
            rows = ",\n  ".join(json.dumps(r) for r in entry)
            lines.append(f' "rows": [\n  {rows}\n ]')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(entry)}")
    return "{\n" + ",\n".join(lines) + "\n}"


def progress(total: int, what: str) -> tqdm:
    return tqdm(total=total, desc=what, unit="run")


# --- digits ---------------------------------------------------------------------------------------


def digits(held_out: int = 600) -> tuple[tuple[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """scikit-learn's 1,797 handwritten digits, (n, 64) in [0, 1] and labels; 600 held out."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x = jnp.asarray(data.data[order] / 16.0, jnp.float32)
    y = jnp.asarray(data.target[order])
    return (x[held_out:], y[held_out:]), (x[:held_out], y[:held_out])


def mlp(key: jax.Array, widths: Sequence[int] = (64, 32, 10)) -> list[dict[str, jax.Array]]:
    """Weights of a multilayer perceptron, He's initialisation."""
    keys = jax.random.split(key, len(widths) - 1)
    pairs = zip(keys, widths[:-1], widths[1:], strict=True)
    return [
        {"w": jax.random.normal(k, (n, m)) * math.sqrt(2 / n), "b": jnp.zeros(m)}
        for k, n, m in pairs
    ]


def logits(params: list[dict[str, jax.Array]], x: jax.Array) -> jax.Array:
    for layer in params[:-1]:
        x = jax.nn.relu(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def cross_entropy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


def accuracy(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits(params, x), -1) == y)


def train(
    optimizer: optax.GradientTransformation,
    key: jax.Array,
    data: tuple[jax.Array, jax.Array],
    steps: int | jax.Array,
    *,
    batch: int = 64,
    init: Callable[[jax.Array], Any] = mlp,
    loss: Callable[..., jax.Array] = cross_entropy,
    prepare: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Any:
    """The parameters after so many steps; the key draws all there is to draw.

    ``prepare(key, x)`` augments a batch.
    """
    x, y = data
    of_weights, of_batches = jax.random.split(key)
    params = init(of_weights)

    def step(number: jax.Array, carry: Any) -> Any:
        params, state = carry
        of_batch, of_noise = jax.random.split(jax.random.fold_in(of_batches, number))
        chosen = jax.random.randint(of_batch, (batch,), 0, len(x))
        images = x[chosen] if prepare is None else prepare(of_noise, x[chosen])
        gradients = jax.grad(loss)(params, images, y[chosen])
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.lax.fori_loop(0, steps, step, (params, optimizer.init(params)))[0]
