"""What many small leaves cost, packed and not: ``python -m benchmarks.packed``.

The same optimizer on the same parameters: optax, this library, and this library with parameters
that live packed. "update" is update and apply for given gradients; "training step" has a loss of
the ordinary tree, half the squared distance of every leaf from 1, and its gradient. Times are
medians of paired ratios of interleaved runs, as in ``benchmarks.step``. The parameters after the
first ten steps are compared with those of this library without packing.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_opt
from adaptive_opt import Packing, train_step
from benchmarks import cases
from benchmarks.stepping import Run, update_and_apply
from benchmarks.timing import in_turns, ratio, seconds

KINDS = ("update", "training step")


def loss(params: Any) -> jax.Array:
    return sum(0.5 * jnp.sum((leaf - 1) ** 2) for leaf in jax.tree.leaves(params))


def contestants(kind: str, algorithm: str, shapes: cases.Shapes) -> dict[str, tuple[Run, Any]]:
    """The runs, and for each how its parameters become an ordinary tree."""
    gradients = jax.device_put(cases.arrays(shapes, 1, 1e-3))

    def fresh() -> Any:
        return jax.device_put(cases.arrays(shapes, 0, 1.0))

    def run(optimizer: Any, params: Any, unpack: Any, gradients: Any) -> Run:
        if kind == "training step":
            step = train_step(lambda p: loss(unpack(p)), optimizer)
            return Run(step, params, optimizer.init(params))
        return Run(update_and_apply(optimizer), params, optimizer.init(params), gradients)

    def same(params: Any) -> Any:
        return params

    found = {}
    ours = getattr(adaptive_opt, algorithm)(1e-3)
    if hasattr(optax, algorithm):
        of_optax = getattr(optax, algorithm)(1e-3)
        found["optax"] = run(of_optax, fresh(), same, gradients), same
    found["ours"] = run(ours, fresh(), same, gradients), same
    packing = Packing(fresh())
    packed = packing.pack(fresh()), packing.unpack, packing.pack(gradients)
    found["ours, packed"] = run(packing.optimizer(ours), *packed), packing.unpack
    return found


def measured(kind: str, algorithm: str, shapes: cases.Shapes, rounds: int) -> dict[str, Any]:
    """What is known of every contestant; their programs are gone when it returns.

    Compiled programs of thousands of leaves take most of the memory maps that Linux allows.
    """
    runs = contestants(kind, algorithm, shapes)
    after = {}
    for name, (run, unpack) in runs.items():
        run(10)
        after[name] = [np.asarray(leaf) for leaf in jax.tree.leaves(unpack(run.params))]
    timers = {name: functools.partial(seconds, run) for name, (run, _) in runs.items()}
    times = in_turns(timers, rounds)
    return {
        name: {
            "seconds": times[name],
            "seconds to compile": sum(run.seconds.values()),
            "largest difference of a parameter after ten steps": max(
                float(np.abs(a - b).max()) for a, b in zip(after[name], after["ours"], strict=True)
            ),
        }
        for name, (run, _) in runs.items()
    }


def row(kind: str, name: str, found: dict[str, Any]) -> str:
    """Of the table, in Markdown."""
    facts, first = found[name], next(iter(found.values()))
    median, low, high = ratio(facts["seconds"], first["seconds"])
    compiling = facts["seconds to compile"]
    apart = facts["largest difference of a parameter after ten steps"]
    return (
        f"| {kind} | {name} | {statistics.median(facts['seconds']) * 1e3:.2f}"
        f" | {median:.3f} ({low:.3f}..{high:.3f}) | {compiling:.1f}"
        f" | {compiling / first['seconds to compile']:.3f} | {apart:.1e} |"
    )


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--leaves", type=int, default=2000)
    parser.add_argument("--algorithm", default="adam", help="the name of a recipe (adam)")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    options = parser.parse_args(arguments)
    shapes = cases.small(options.leaves)
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "cpus": os.cpu_count(),
        "jax": jax.__version__,
        "leaves": options.leaves,
        "algorithm": options.algorithm,
    }
    print(f"device: {results['device']}, {options.leaves} leaves, {options.algorithm}")
    print("| | contestant | ms | of the first | trace and compile s | of the first | from ours |")
    print("|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        results[kind] = measured(kind, options.algorithm, shapes, options.rounds)
        for name in results[kind]:
            print(row(kind, name, results[kind]), flush=True)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    main()
