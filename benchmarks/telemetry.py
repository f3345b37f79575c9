"""What telemetry costs: a training step of a small CNN with it and without, in turns.

    python benchmarks/telemetry.py
    python benchmarks/telemetry.py --every 10 --recipe adamod --rounds 40 --pixels 8

A CNN of two convolutions and two dense layers, on batches of 64 images of 32 x 32 pixels in three
colours. A round takes N steps without telemetry and N with it, in either order, so that both see
the same machine; each round gives one ratio. Prints their median, and the quartiles, of the time
on the clock and of the processors' time, which other programs on the machine disturb less.

    python benchmarks/telemetry.py --leaves 25 200 3000 --rounds 3

What it costs to make the program of an update of so many leaves, of twelve shapes: the processors'
time of tracing and of compiling, in turns with the recipe alone, and the bytes of temporaries.
"""

from __future__ import annotations

import argparse
import gc
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_opt
from adaptive_opt import telemetry


class CNN(nn.Module):
    """Two convolutions, a pooling and two dense layers."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), strides=(2, 2)).reshape(len(x), -1)
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


def training(model, optimizer, images, labels):
    """A donated training step, and the state that it starts from."""

    def loss_of(params):
        logits = model.apply(params, images)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(state, params):
        updates, state = optimizer.update(jax.grad(loss_of)(params), state, params)
        return state, optax.apply_updates(params, updates)

    params = model.init(jax.random.key(0), images[:1])
    return jax.jit(step, donate_argnums=(0, 1)), (optimizer.init(params), params)


SHAPES = (
    (64,), (128,), (256,), (64, 64), (32, 128), (128, 32), (16, 16), (8, 64), (512,), (1024,),
    (4, 4, 16), (3, 3, 8, 8),
)  # fmt: skip


def made(optimizer, leaves, wider):
    """The seconds of tracing and of compiling an update, and its bytes of temporaries a weight."""
    shapes = [(*s[:-1], s[-1] * wider) for s in (SHAPES[i % len(SHAPES)] for i in range(leaves))]
    params = {f"w{i}": jax.ShapeDtypeStruct(shape, np.float32) for i, shape in enumerate(shapes)}
    state = jax.eval_shape(optimizer.init, params)
    gc.collect()  # what others have left
    began = time.process_time()
    traced = jax.jit(lambda g, s, p: optimizer.update(g, s, p)).trace(params, state, params)
    between, lowered = time.process_time(), traced.lower()
    begin = time.process_time()
    compiled = lowered.compile()
    size = sum(x.size for x in params.values())
    temporaries = compiled.memory_analysis().temp_size_in_bytes / size
    return between - began, time.process_time() - begin, temporaries, size


def programs(recipe, leaves, rounds, wider=10) -> None:
    for number in leaves:
        costs = []
        for round_ in range(rounds + 1):
            for which in (0, 1) if round_ % 2 else (1, 0):
                optimizer = recipe(1e-3, observers=telemetry() if which else ())
                costs.append((which, made(optimizer, number, wider)))
        alone, seen = (np.array([c for w, c in costs[2:] if w == which]) for which in (0, 1))
        trace, compiling = np.median(seen[:, :2] / alone[:, :2], axis=0)
        more = seen[0, 2] - alone[0, 2]
        print(
            f"{number} leaves, {int(alone[0, 3])} weights: trace x{trace:.2f} of"
            f" {np.median(alone[:, 0]):.2f} s, compile x{compiling:.2f} of"
            f" {np.median(alone[:, 1]):.2f} s, {more:.2f} bytes of temporaries a weight more"
        )


def main(arguments=None) -> dict[str, float]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="adamw", help="adamw")
    parser.add_argument("--every", type=int, default=50, help="N (50)")
    parser.add_argument("--rounds", type=int, default=10, help="of N steps each (10)")
    parser.add_argument("--pixels", type=int, default=32, help="width of an image (32)")
    parser.add_argument("--leaves", type=int, nargs="+", help="measure programs of so many")
    options = parser.parse_args(arguments)

    recipe = getattr(adaptive_opt, options.recipe)
    if options.leaves:
        programs(recipe, options.leaves, options.rounds)
        return {}
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, options.pixels, options.pixels, 3)).astype(np.float32)
    labels = jnp.asarray(rng.integers(10, size=64))
    model = CNN()
    runs = [
        training(model, recipe(1e-3, observers=observers), images, labels)
        for observers in ((), telemetry(every=options.every))
    ]
    steps, carries = zip(*runs, strict=True)
    carries = list(carries)
    clocks = {"wall-clock": time.perf_counter, "processor": time.process_time}
    seconds = {clock: np.zeros((options.rounds + 1, 2)) for clock in clocks}
    for round_ in range(options.rounds + 1):
        for which in (0, 1) if round_ % 2 else (1, 0):
            began = {clock: now() for clock, now in clocks.items()}
            for _ in range(options.every):
                carries[which] = steps[which](*carries[which])
            jax.block_until_ready(carries[which])
            for clock, now in clocks.items():
                seconds[clock][round_, which] = now() - began[clock]
    medians = {}
    print(f"{options.recipe}, every {options.every} steps, {options.rounds} rounds")
    for clock, taken in seconds.items():
        taken = taken[1:]  # the first compiles
        low, medians[clock], high = np.quantile(taken[:, 1] / taken[:, 0], [0.25, 0.5, 0.75])
        without = 1e3 * np.median(taken[:, 0]) / options.every
        print(
            f"{clock} time: {without:.2f} ms a step without telemetry, with it"
            f" {medians[clock]:.3f} of that (quartiles {low:.3f} to {high:.3f})"
        )
    return medians


if __name__ == "__main__":
    main()
