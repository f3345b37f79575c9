"""What every recipe keeps for a weight and how long its step takes, beside ``optax.adam``.

    python -m benchmarks.recipes
    python -m benchmarks.recipes --page examples/CHOOSING.md

State: bytes for each float32 parameter of a square matrix, from the shapes of the state. Time: of a
jitted step with everything donated, on 16 matrices of 512 by 512; the recipes take turns in random
order, and the ratio is the median over the rounds of two times of the same round. Prints a table;
``--page`` renews the one that is in there, and ``--output`` writes what was measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

import adaptive_opt
from benchmarks.pages import renew
from benchmarks.stepping import Run, update_and_apply, with_loss
from benchmarks.timing import in_turns, ratio, seconds

RECIPES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    name: recipe
    for name, recipe in adaptive_opt.RECIPES.items()
    if str(recipe.__module__).startswith("adaptive_opt.")
}
RECIPES["sgd, momentum"] = functools.partial(adaptive_opt.sgd, momentum=0.9)
WIDTH = 512
TURNS = 10  # steps at least: SOAP renews its bases at every tenth
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"


def matrices(count: int, width: int) -> dict[str, dict[str, jax.Array]]:
    """Parameters with the names that hidden layers have, and normal numbers as gradients."""
    return {
        f"dense_{i}": {"kernel": jax.random.normal(jax.random.key(i), (width, width))}
        for i in range(count)
    }


def state_bytes(make: Callable[[float], optax.GradientTransformation]) -> float:
    """Bytes of state for each float32 parameter of a square matrix.

    What grows more slowly than its parameters, a row and a column, is not counted.
    """

    def size(width: int) -> int:
        shapes = jax.eval_shape(lambda: make(1e-3).init(matrices(1, width)))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    return round(size(1 << 12) / (1 << 24), 2)


def measured(count: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of a step in every round."""
    gradient, timers = matrices(count, WIDTH), {}
    for name, make in (RECIPES | {"optax.adam": optax.adam}).items():
        optimizer, params = make(1e-3), jax.tree.map(jnp.ones_like, gradient)
        run = Run(update_and_apply(with_loss(optimizer)), params, optimizer.init(params), gradient)
        timers[name] = functools.partial(seconds, run)
    return in_turns(timers, rounds, TURNS)


def table(times: dict[str, list[float]]) -> str:
    lines = [
        "| recipe | bytes of state for each float32 parameter | time of a step, `optax.adam` = 1 |",
        "|---|---:|---:|",
    ]
    for name, make in sorted(RECIPES.items(), key=lambda pair: state_bytes(pair[1])):
        middle, low, high = ratio(times[name], times["optax.adam"])
        kept = f"{state_bytes(make):.3g}"
        lines.append(f"| `{name}` | {kept} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--matrices", type=int, default=16, help="of 512 by 512 (16)")
    parser.add_argument("--rounds", type=int, default=9, help="of all recipes (9)")
    parser.add_argument("--page", type=pathlib.Path, help="the document to renew the table in")
    parser.add_argument("--output", type=pathlib.Path, help="the JSON to write")
    options = parser.parse_args(arguments)
    if options.matrices < 1 or options.rounds < 1:
        parser.error("--matrices and --rounds must be at least 1")
    times = measured(options.matrices, options.rounds)
    made = table(times)
    print(made)
    if options.page:
        renew(options.page, BEGIN, made, END)
    if options.output:
        found = {
            "versions": {"jax": jax.__version__, "optax": optax.__version__},
            "matrices": options.matrices,
            "rounds": options.rounds,
            "recipes": {
                name: {
                    "state_bytes": state_bytes(make),
                    "step over optax.adam": ratio(times[name], times["optax.adam"]),
                }
                for name, make in RECIPES.items()
            },
        }
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
