"""The picture of a rule's page: the rates of its weights on one small problem, beside Adam's."""

from __future__ import annotations

import functools
import inspect
import math
import pathlib

import jax
import jax.numpy as jnp
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import optax

import adaptive_opt
from adaptive_opt.watching.plots import Recorder, rate_spectrogram

RATE, STEPS, EVERY, SIDE = 1e-2, 200, 4, 32
CACHE = pathlib.Path(__file__).parents[2] / "build" / "rates"
PROBLEM = (
    f"{SIDE * SIDE} weights of a quadratic with curvatures from 1e-4 to 10, gradients with noise of"
    f" their own size, learning rate {RATE:g}, the other arguments as they come"
)


@functools.cache
def recorded(name: str) -> Recorder:
    """Telemetry of a recipe on the problem; kept in build/ until the package changes."""
    kept = CACHE / f"{name}.json"
    package = pathlib.Path(inspect.getfile(adaptive_opt)).parent
    sources = [*package.rglob("*.py"), pathlib.Path(__file__)]
    if kept.exists() and kept.stat().st_mtime > max(s.stat().st_mtime for s in sources):
        return Recorder.load(kept)
    recorder = _trained(name)
    CACHE.mkdir(parents=True, exist_ok=True)
    recorder.save(kept)
    return recorder


def _trained(name: str) -> Recorder:
    recipe = adaptive_opt.RECIPES[name]
    takes = inspect.signature(recipe).parameters
    given = {"base_learning_rate": RATE} if "base_learning_rate" in takes else {}
    optimizer = recipe(RATE, observers=adaptive_opt.telemetry(every=EVERY), **given)
    size = jnp.logspace(-4, 1, SIDE * SIDE).reshape(SIDE, SIDE)

    def step(carry, key):
        params, state = carry
        away = params["w"] - 1
        noise = jax.random.normal(key, away.shape)
        loss = jnp.mean(size * away**2) / 2
        updates, state = optimizer.update({"w": size * (away + noise)}, state, params, value=loss)
        return (optax.apply_updates(params, updates), state), state

    def run(params):
        keys = jax.random.split(jax.random.key(0), STEPS)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    states = jax.device_get(jax.jit(run)({"w": jnp.zeros((SIDE, SIDE)) + 2}))
    recorder = Recorder()
    for i in range(0, STEPS, EVERY):
        recorder.record(jax.tree.map(lambda x, i=i: x[i], states))
    return recorder


def keys(name: str) -> list[str]:
    """What telemetry has to say of a recipe, by the names in ``read_telemetry``."""
    return list(recorded(name).rows[-1])


def span(name: str) -> str:
    """The rates at the last look: one for all weights, or how wide their span and their median."""
    row = recorded(name).rows[-1]
    low, middle, high = (
        next(value for key, value in row.items() if key.endswith(f"rate/all/{q}"))
        for q in ("q01", "q50", "q99")
    )
    if high < 1.02 * low:
        return f"{name} has one rate for all weights, {middle:.2g}"
    return f"the rates of {name} span {math.log10(high / low):.1f} decades around {middle:.2g}"


def conclusion(*names: str) -> str:
    """The title of the picture: what is to be seen in it at its end."""
    return "At the end " + ",\n".join(map(span, names))


def draw(name: str, path: pathlib.Path) -> None:
    """Draw the picture, unless it is there already."""
    recorder = recorded(name)
    if path.exists() and path.stat().st_mtime > (CACHE / f"{name}.json").stat().st_mtime:
        return
    group = next(iter(recorder.histograms[-1]))  # that of its matrices, where a rule has one
    beside = {"adam": recorded("adam")} if group == "all" else {}
    figure = rate_spectrogram(beside | {name: recorder}, group=group)
    figure.set_figheight(4)  # room for the title
    title = conclusion(*dict.fromkeys((name, *beside)))
    figure.suptitle(title, x=0.01, ha="left", size="medium", weight="bold")
    figure.savefig(path, dpi=110)
    plt.close(figure)
