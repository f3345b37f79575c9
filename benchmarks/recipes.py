"""What every recipe keeps for a weight and how long its step takes, beside ``optax.adam``.

    python -m benchmarks.recipes
    python -m benchmarks.recipes --page examples/CHOOSING.md

State: bytes for each float32 parameter of a square matrix, from the shapes of the state. Time: of a
jitted step with everything donated, on one large leaf; the recipes take turns in random order, and
the ratio is the median over the rounds of two times of the same round. Prints a table; ``--page``
renews the one that is in there.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

import adaptive_opt
from benchmarks.pages import renew
from benchmarks.stepping import Run, update_and_apply
from benchmarks.timing import in_turns, ratio, seconds

RECIPES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    name: recipe
    for name, recipe in adaptive_opt.RECIPES.items()
    if str(recipe.__module__).startswith("adaptive_opt.")
}
RECIPES["sgd, momentum"] = functools.partial(adaptive_opt.sgd, momentum=0.9)
BEGIN, END = "<!-- recipes: begin -->", "<!-- recipes: end -->"


def state_bytes(make: Callable[[float], optax.GradientTransformation], side: int = 1024) -> float:
    """Bytes of state for each float32 parameter of a square matrix."""
    weights = jax.ShapeDtypeStruct((side, side), jnp.float32)
    state = jax.tree.leaves(jax.eval_shape(make(1e-3).init, weights))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in state) / weights.size


def measured(elements: int, rounds: int) -> dict[str, list[float]]:
    """The seconds of a step in every round."""
    gradient = jax.random.normal(jax.random.key(0), (elements // 1024, 1024))
    timers = {}
    makers = RECIPES | {"optax.adam": optax.adam}
    for name, make in makers.items():
        optimizer, params = make(1e-3), jnp.ones_like(gradient)
        run = Run(update_and_apply(optimizer), params, optimizer.init(params), gradient)
        timers[name] = functools.partial(seconds, run)
    return in_turns(timers, rounds)


def table(times: dict[str, list[float]]) -> str:
    lines = [
        "| recipe | bytes of state for each float32 parameter | time of a step, `optax.adam` = 1 |",
        "|---|---:|---:|",
    ]
    for name, make in sorted(RECIPES.items(), key=lambda pair: state_bytes(pair[1])):
        middle, low, high = ratio(times[name], times["optax.adam"])
        kept = f"{state_bytes(make):.0f}"
        lines.append(f"| `{name}` | {kept} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--elements", type=int, default=1 << 22, help="of the leaf (4194304)")
    parser.add_argument("--rounds", type=int, default=25, help="of all recipes (25)")
    parser.add_argument("--page", type=pathlib.Path, help="the document to renew the table in")
    options = parser.parse_args(arguments)
    if options.elements < 1024 or options.rounds < 1:
        parser.error("--elements must be at least 1024 and --rounds at least 1")
    made = table(measured(options.elements, options.rounds))
    print(made)
    if options.page:
        renew(options.page, BEGIN, made, END)


if __name__ == "__main__":
    main()
