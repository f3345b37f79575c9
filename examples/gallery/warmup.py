"""A Transformer without a warm-up: AdaMod, and what else does the same.

    python examples/gallery/warmup.py

Four layers, the normalisation after the sum (post-LN), on the source of Python's standard library
as characters. Controls: Adam with a linear warm-up, RAdam, Adam times 1 - b3^t (AdaMod's implicit
warm-up without its bound), and the same model with the normalisation first (pre-LN).
"""

from __future__ import annotations

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from shared import band, label_ends, progress, row, run, subplots

from adaptive_opt import adam, adamod, radam

RATES = (1e-3, 1e-2)
B3, WARMUP = 0.999, 200
WIDTH, HEADS, LAYERS, CONTEXT, BATCH, CHARACTERS = 32, 2, 4, 32, 8, 128
LAST = 50


def text() -> jax.Array:
    sources = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))
    characters = np.frombuffer(b"\n".join(p.read_bytes() for p in sources), np.uint8)
    return jnp.asarray(np.where(characters < CHARACTERS, characters, ord("?")), jnp.int8)


def initial(key):
    def normal(k, *shape, layers=(LAYERS,)):
        return jax.random.normal(jax.random.fold_in(key, k), (*layers, *shape)) / np.sqrt(shape[0])

    block = {
        "qkv": normal(0, WIDTH, 3 * WIDTH),
        "out": normal(1, WIDTH, WIDTH),
        "up": normal(2, WIDTH, 4 * WIDTH),
        "down": normal(3, 4 * WIDTH, WIDTH),
        "scale": jnp.ones((LAYERS, 2, WIDTH)),
        "shift": jnp.zeros((LAYERS, 2, WIDTH)),
    }
    return {
        "block": block,
        "embed": normal(4, CHARACTERS, WIDTH, layers=()) * np.sqrt(CHARACTERS),
        "position": normal(5, CONTEXT, WIDTH, layers=()) * np.sqrt(CONTEXT),
        "head": normal(6, WIDTH, CHARACTERS, layers=()),
    }


def normed(x, scale, shift):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + shift


def attention(x, p):
    q, k, v = jnp.split((x @ p["qkv"]).reshape(BATCH, CONTEXT, HEADS, -1), 3, -1)
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(WIDTH // HEADS)
    seen = jax.nn.softmax(jnp.where(jnp.tri(CONTEXT, dtype=bool), scores, -1e9), -1)
    return jnp.einsum("bhts,bshd->bthd", seen, v).reshape(BATCH, CONTEXT, WIDTH) @ p["out"]


def perceptron(x, p):
    return jax.nn.gelu(x @ p["up"]) @ p["down"]


def loss_of(params, pieces, first):
    """Cross entropy of the next character; the normalisation comes first, or after the sum."""
    x = params["embed"][pieces[:, :-1]] + params["position"]

    def block(x, p):
        for i, part in enumerate((attention, perceptron)):
            norm = functools.partial(normed, scale=p["scale"][i], shift=p["shift"][i])
            x = x + part(norm(x), p) if first else norm(x + part(x, p))
        return x, None

    x, _ = jax.lax.scan(block, x, params["block"])
    x = normed(x, 1.0, 0.0) if first else x
    return optax.softmax_cross_entropy_with_integer_labels(x @ params["head"], pieces[:, 1:]).mean()


@functools.partial(jax.jit, static_argnums=(0, 1, 5))
def trained(recipe, first, keys, factors, source, steps):
    """The loss of every step, (seeds, factors, steps); the learning rate is the factor's."""

    def one(key, table):
        optimizer = recipe(lambda t: table[t])
        of_weights, of_batches = jax.random.split(key)
        params = initial(of_weights)

        def step(carry, number):
            params, state = carry
            draw = jax.random.fold_in(of_batches, number)
            starts = jax.random.randint(draw, (BATCH,), 0, len(source) - CONTEXT - 1)
            pieces = source[starts[:, None] + jnp.arange(CONTEXT + 1)].astype(jnp.int32)
            loss, gradients = jax.value_and_grad(loss_of)(params, pieces, first)
            updates, state = optimizer.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(steps))[1]

    return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, factors)


def adamod_b3(rate):
    return adamod(rate, b3=B3)


def measure(seeds: int, steps: int) -> dict:
    t, low, high = np.arange(steps), *RATES
    flat = np.ones(steps)
    programs = [
        (
            adam, False,
            {
                ("Adam", high): flat,
                ("Adam, linear warm-up", high): np.minimum(1, (t + 1) / WARMUP),
                ("Adam times 1 - b3^t", high): 1 - B3 ** (t + 1),
                ("Adam", low): flat,
            },
        ),
        (adamod_b3, False, {("AdaMod", high): flat, ("AdaMod", low): flat}),
        (radam, False, {("RAdam", high): flat}),
        (adam, True, {("pre-LN, Adam", high): flat}),
        (adamod_b3, True, {("pre-LN, AdaMod", high): flat}),
    ]  # fmt: skip
    keys = jax.random.split(jax.random.key(0), seeds)
    source = text()
    curves = {}
    with progress(len(programs), "warmup") as bar:
        for recipe, first, tables in programs:
            factors = jnp.asarray(
                [rate * table for (_, rate), table in tables.items()], jnp.float32
            )
            losses = np.asarray(trained(recipe, first, keys, factors, source, steps), float)
            curves |= {key: losses[:, i] for i, key in enumerate(tables)}
            bar.update()
    last = max(1, min(LAST, steps // 2))
    final = {key: losses[:, -last:].mean(1) for key, losses in curves.items()}
    rows = [row(f"{name}, lr {rate:g}", value, "nats") for (name, rate), value in final.items()]
    for rate in RATES[::-1]:
        difference = final["Adam", rate] - final["AdaMod", rate]
        rows.append(row(f"Adam minus AdaMod, post-LN, lr {rate:g}", difference, "nats"))
    difference = final["pre-LN, Adam", high] - final["pre-LN, AdaMod", high]
    rows.append(row(f"Adam minus AdaMod, pre-LN, lr {high:g}", difference, "nats"))
    difference = final["Adam times 1 - b3^t", high] - final["AdaMod", high]
    rows.append(row(f"Adam times 1 - b3^t minus AdaMod, post-LN, lr {high:g}", difference, "nats"))
    names = dict.fromkeys(name for name, _ in curves)
    every = max(1, steps // 50)
    smooth = {
        f"{name}, lr {rate:g}": losses[:, : steps // every * every]
        .reshape(seeds, -1, every)
        .mean(2)
        for (name, rate), losses in curves.items()
    }
    return {
        "settings": {
            "model": f"{LAYERS} layers, width {WIDTH}, {HEADS} heads, {CONTEXT} characters",
            "batch": BATCH,
            "b3": B3,
            "warm-up": WARMUP,
            "loss": f"mean of the last {last} steps",
            "every": every,
        },
        "rows": rows,
        "names": list(names),
        "curves": smooth,
    }


def draw(found: dict):
    figure, axes = subplots(
        "With post-LN at a high rate whatever starts slowly trains; with pre-LN Adam needs no help",
        1, 2, figsize=(9.6, 3.6), sharey=True,
    )  # fmt: skip
    every = found["settings"]["every"]
    labels = [name for name in found["names"] if not name.startswith("pre-LN")]
    for name in found["names"]:
        label = name.removeprefix("pre-LN, ")
        ax = axes[int(name.startswith("pre-LN"))]
        curves = np.array(found["curves"][f"{name}, lr {RATES[-1]:g}"], float)
        x = every * (np.arange(curves.shape[1]) + 0.5)
        mean, sd = curves.mean(0), curves.std(0)
        band(ax, x, mean, sd, labels.index(label), label=label)
    axes[0].set(ylabel="loss (nats per character)", title="post-LN, lr 0.01", ylim=(2.2, 4))
    axes[1].set(title="pre-LN, lr 0.01")
    for ax in axes:
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        label_ends(ax)
    return figure


def main(arguments=None) -> dict:
    return run(
        __file__, measure, draw, arguments,
        seeds=(3, "of weights and batches"), steps=(500, "of every training"),
    )  # fmt: skip


if __name__ == "__main__":
    main()
