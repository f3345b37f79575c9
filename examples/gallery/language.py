"""What the scripts about language models share: one small Transformer, and equal tuning for all.

The model of warmup.py with the normalisation first, its layers apart, so that every matrix is one.
Every method is given the same number of learning rates, weights and batches, and nothing else is
tuned; the loss is that of held-out text, at the parameters that the method says to evaluate.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import band, darker, look, row
from warmup import BATCH, CONTEXT, HEADS, LAYERS, WIDTH, loss_of, text
from warmup import initial as stacked

from adaptive_opt import evaluation_params

WARMUP = 0.1  # of the steps
HELD_OUT = 1 / 20  # of the text, at its end
EVALUATED = 64  # batches
MATRICES = ("qkv", "out", "up", "down")
SETTINGS = {
    "model": f"pre-LN, {LAYERS} layers, width {WIDTH}, {HEADS} heads, {CONTEXT} characters",
    "batch": BATCH,
    "warm-up": f"{WARMUP:g} of the steps, linear",
    "loss": f"{EVALUATED * BATCH * CONTEXT} characters of held-out text, nats per character",
}


def initial(key: jax.Array) -> dict[str, Any]:
    """warmup.py's weights with every layer and every normalisation for itself."""
    params = stacked(key)
    block = params.pop("block")
    apart = {name: block[name] for name in MATRICES}
    apart |= {f"{n}_{i}": block[n][:, i] for n in ("scale", "shift") for i in range(2)}
    layers = [jax.tree.map(lambda x, i=i: x[i], apart) for i in range(LAYERS)]
    return params | {"layers": layers}


def loss(params: dict[str, Any], pieces: jax.Array) -> jax.Array:
    apart = jax.tree.map(lambda *xs: jnp.stack(xs), *params["layers"])
    block = {name: apart[name] for name in MATRICES}
    block |= {n: jnp.stack([apart[f"{n}_{i}"] for i in range(2)], 1) for n in ("scale", "shift")}
    return loss_of(params | {"block": block}, pieces, True)


def is_matrix(params: Any) -> Any:
    """The mask of the matrices in the layers, for the methods that treat them alone."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in MATRICES, params)


def batch_of(source: jax.Array, key: jax.Array) -> jax.Array:
    starts = jax.random.randint(key, (BATCH,), 0, len(source) - CONTEXT - 1)
    return source[starts[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)


def shape(kind: str, steps: int) -> jax.Array:
    """A schedule's factor at every step: "cosine" ends at 0, "constant" does not fall."""
    t = np.arange(steps)
    warm = np.minimum(1, (t + 1) / max(1, WARMUP * steps))
    fall = {"constant": np.ones(steps), "cosine": 0.5 + 0.5 * np.cos(np.pi * (t + 1) / steps)}
    return jnp.asarray(warm * fall[kind], jnp.float32)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _held_out(make, keys, rates, table, source, marks):
    border = int(len(source) * (1 - HELD_OUT))
    seen, unseen = source[:border], source[border:]
    evaluated = jax.vmap(functools.partial(batch_of, unseen))(
        jax.random.split(jax.random.key(1), EVALUATED)
    )
    between = len(table) // marks

    def one(key, rate):
        optimizer = make(lambda t: rate * table[jnp.minimum(t, len(table) - 1)])
        of_weights, of_batches = jax.random.split(key)
        params = initial(of_weights)

        def step(number, carry):
            params, state = carry
            pieces = batch_of(seen, jax.random.fold_in(of_batches, number))
            gradients = jax.grad(loss)(params, pieces)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        def stretch(carry, mark):
            carry = jax.lax.fori_loop(mark * between, (mark + 1) * between, step, carry)
            params = evaluation_params(carry[1], carry[0])
            return carry, jax.lax.map(functools.partial(loss, params), evaluated).mean()

        return jax.lax.scan(stretch, (params, optimizer.init(params)), jnp.arange(marks))[1]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, rates)


def held_out(
    make: Callable[[optax.Schedule], optax.GradientTransformation],
    rates: np.ndarray,
    seeds: int,
    steps: int,
    kind: str = "cosine",
    marks: int = 1,
) -> np.ndarray:
    """Loss of held-out text, (seeds, rates, marks): at so many evenly spaced steps."""
    keys = jax.random.split(jax.random.key(0), seeds)
    table = shape(kind, steps)
    losses = _held_out(make, keys, jnp.asarray(rates, jnp.float32), table, text(), marks)
    return np.asarray(losses, float)


def best(losses: np.ndarray) -> int:
    """The rate with the lowest mean over the seeds; one that diverged in any seed is not it."""
    return int(np.argmin(np.where(np.isfinite(losses), losses, np.inf).mean(0)))


def compared(
    losses: dict[str, np.ndarray], rates: dict[str, np.ndarray], baseline: str
) -> list[dict[str, Any]]:
    """Rows: the loss of each at its best rate, and the paired difference from the baseline."""
    at_best = {name: found[:, best(found)] for name, found in losses.items()}
    rows = []
    for name, value in at_best.items():
        rate = rates[name][best(losses[name])]
        rows.append(row(f"{name}, best learning rate", rate))
        rows.append(row(f"{name}, held-out loss", value, "nats"))
        if name != baseline:
            rows.append(row(f"{name} minus {baseline}", value - at_best[baseline], "nats"))
    return rows


def draw_sweep(
    ax: Any, rates: dict[str, Any], losses: dict[str, Any], places: dict[str, tuple[int, int]]
) -> None:
    """Held-out loss over the learning rate, mean and spread; the name stands at a point.

    Args:
      places: of each method, the number of the rate where its name stands, and by how many points
        above (or below) the curve.
    """
    for number, (name, (at, above)) in enumerate(places.items()):
        found = np.array(losses[name], float)
        mean, sd, x = found.mean(0), found.std(0, ddof=min(1, len(found) - 1)), rates[name]
        band(ax, x, mean, sd, number, marker="o", markersize=3.5)
        ax.annotate(
            name, (x[at], mean[at]), (0, above), textcoords="offset points",
            color=darker(look(number)["color"]), ha="center", va="center",
        )  # fmt: skip
    ax.margins(y=0.12)
    ax.set(xscale="log", xlabel="learning rate", ylabel="held-out loss (nats per character)")
