"""What tracing and lowering an update costs, in CPU seconds, beside ``optax.adam``.

    python -m benchmarks.tracing
    python -m benchmarks.tracing --leaves 148 --rounds 5

Leaves of 12 distinct shapes; the optimizers take turns, and the least of the rounds counts. Also
what making an optimizer costs. Prints a table; ``--page`` renews the one that is in there.
"""

from __future__ import annotations

import argparse
import pathlib
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_opt
from benchmarks.pages import renew

SHAPES = (
    (64,), (128,), (256,), (64, 64), (32, 128), (128, 32), (16, 16), (8, 64), (512,), (1024,),
    (4, 4, 16), (3, 3, 8, 8),
)  # fmt: skip
NAMES = ("adam", "adamw", "amsgrad", "adamod", "diffmod", "radam")
BEGIN, END = "<!-- tracing: begin -->", "<!-- tracing: end -->"
Maker = Callable[[float], optax.GradientTransformation]


def makers() -> dict[str, Maker]:
    return {"optax.adam": optax.adam} | {name: adaptive_opt.RECIPES[name] for name in NAMES}


def seconds(make: Maker, leaves: int) -> tuple[float, float]:
    """Of tracing, and of lowering, one update of so many leaves."""
    params = {
        f"w{i}": jax.ShapeDtypeStruct(SHAPES[i % len(SHAPES)], np.float32) for i in range(leaves)
    }
    optimizer = make(1e-3)
    state = jax.eval_shape(optimizer.init, params)
    update = jax.jit(lambda g, s, p: optimizer.update(g, s, p))
    begin = time.process_time()
    traced = update.trace(params, state, params)
    between = time.process_time()
    traced.lower()
    return between - begin, time.process_time() - between


def milliseconds_to_make(make: Maker, times: int = 30) -> float:
    make(1e-3)
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        make(1e-3)
        taken.append(time.perf_counter() - begin)
    return 1e3 * float(np.median(taken))


def measured(leaves: Sequence[int], rounds: int) -> dict[int, dict[str, tuple[float, float]]]:
    """The cheapest of the rounds, by number of leaves and optimizer."""
    found = {}
    for number in leaves:
        costs: dict[str, list[tuple[float, float]]] = {name: [] for name in makers()}
        for _ in range(rounds):
            for name, make in makers().items():
                costs[name].append(seconds(make, number))
        found[number] = {name: min(taken, key=sum) for name, taken in costs.items()}
    return found


def table(found: dict[int, dict[str, tuple[float, float]]]) -> str:
    heads = [f"{number} leaves: trace + lower, s | of optax.adam" for number in found]
    lines = [f"| optimizer | {' | '.join(heads)} | to make, ms |"]
    lines += ["|---|" + "---:|---:|" * len(found) + "---:|"]
    for name, make in makers().items():
        cells = []
        for costs in found.values():
            trace, lower = costs[name]
            cells += [f"{trace:.2f} + {lower:.2f}"]
            cells += [f"{(trace + lower) / sum(costs['optax.adam']):.2f}"]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {milliseconds_to_make(make):.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, nargs="+", default=[148, 2000], help="(148 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="of all optimizers (3)")
    parser.add_argument("--page", type=pathlib.Path, help="the document to renew the table in")
    options = parser.parse_args(arguments)
    if min(options.leaves) < 1 or options.rounds < 1:
        parser.error("--leaves and --rounds must be at least 1")
    jnp.zeros(1).block_until_ready()  # the backend starts
    made = table(measured(options.leaves, options.rounds))
    print(made)
    if options.page:
        renew(options.page, BEGIN, made, END)


if __name__ == "__main__":
    main()
