"""What parameters in 16 bits hold, cost and lose: ``python -m benchmarks.master_weights``.

One table, for AdamW. Bytes: of the parameter and the optimizer's state between steps, per weight
of a leaf of a million. Time: of a jitted, donated step on that leaf, median over interleaved
rounds, over that of float32. Error: of the weights after a thousand steps of 1e-5 in one direction,
over the way. Loss: on the two tasks of ``benchmarks.low_memory``, with the float32 weights where
they are kept, less that of float32 parameters for the same seeds, starts (rounded to bfloat16) and
batches, and its standard error; the arithmetic of the networks is in float32.

``--compiled`` asks the compilers for GPUs and TPUs instead, as ``benchmarks.accelerators`` does:
the bytes that a step moves for a weight, with gradients in the dtype of the parameters.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt import adamw, float32_params, low_memory, master_weights, sgd
from benchmarks import accelerators
from benchmarks.low_memory import TASKS, held_out_losses
from benchmarks.pages import renew

BEGIN, END = "<!-- 16-bit parameters -->", "<!-- end of 16-bit parameters -->"
SIZE = 2**20
RATES = {"digits": 1e-3, "text": 1e-3}


class Way(NamedTuple):
    """How parameters and state are kept; ``around(optimizer)`` takes the steps."""

    params: str
    residual: str
    state: str
    around: Callable[[Any], Any]

    @property
    def dtype(self) -> Any:
        return jnp.dtype(self.params)

    def held(self, state: Any, params: Any) -> Any:
        """The weights in float32, where they are kept."""
        return params if self.residual in ("", "plain") else float32_params(state, params)


def _ways() -> list[Way]:
    states = {
        "float32": lambda inner: inner,
        "bfloat16": low_memory,
        "8-bit": lambda inner: low_memory(inner, "8-bit"),
    }
    ways = [Way("float32", "", name, state) for name, state in states.items()]
    ways.append(Way("bfloat16", "plain", "float32", lambda inner: inner))

    def split(residual: str | None, state: str) -> Way:
        def around(inner: Any) -> Any:
            return master_weights(states[state](inner), residual)

        return Way("bfloat16", repr(residual).replace("'", '"'), state, around)

    ways += [split(residual, "float32") for residual in (None, "int8", "bfloat16", "float32")]
    return [*ways, split("int8", "bfloat16"), split("int8", "8-bit")]


def bytes_of(way: Way) -> float:
    """Of parameter and state, for a weight."""
    params = jax.ShapeDtypeStruct((1024, SIZE // 1024), way.dtype)
    state = jax.eval_shape(way.around(adamw(1e-3)).init, params)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((params, state))) / SIZE


def times(ways: Sequence[Way], rounds: int) -> list[float]:
    """Of a step, in seconds: medians over interleaved rounds."""
    runs = []
    for way in ways:
        optimizer = way.around(adamw(1e-3))

        def step(params: Any, state: Any, gradient: Any, optimizer: Any = optimizer) -> Any:
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params = jnp.full((1024, SIZE // 1024), 0.02, way.dtype)
        run = jax.jit(step, donate_argnums=(0, 1))
        gradient = jnp.full_like(params, 0.01)
        runs.append([run, *run(params, optimizer.init(params), gradient), gradient])
    spent: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for own, row in zip(spent, runs, strict=True):
            run, *held, gradient = row
            start = time.perf_counter()
            row[1:3] = jax.block_until_ready(run(*held, gradient))
            own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in spent]


def drift(way: Way, size: float = 1e-5, steps: int = 1000) -> float:
    """The mean error of the weights after steps in one direction, over the way."""
    optimizer = way.around(sgd(1.0))
    start = jnp.linspace(0.015, 0.025, 20_000).astype(jnp.bfloat16).astype(way.dtype)

    def step(carry: Any, _: Any) -> Any:
        params, state = carry
        updates, state = optimizer.update(jnp.full(params.shape, -size), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run(params: Any) -> Any:
        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), None, steps)
        return carry

    params, state = run(start)
    gone = np.asarray(way.held(state, params), np.float64) - np.asarray(start, np.float64)
    return float(np.abs(gone - steps * size).mean() / (steps * size))


def losses(way: Way, task: str, seeds: Sequence[int], steps: int) -> np.ndarray:
    def prepared(params: Any) -> Any:
        return jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(way.dtype), params)

    optimizer = way.around(adamw(RATES[task], weight_decay=0.01))
    return held_out_losses(
        TASKS[task](), optimizer, seeds, steps, prepared=prepared, evaluated=way.held
    )


def compiled() -> list[dict[str, Any]]:
    """The bytes that a step moves for a weight where it is compiled for an accelerator."""
    rows = [dict(zip(Way._fields[:3], way[:3], strict=True)) for way in _ways()]
    heads = list(rows[0])
    for target, device in accelerators.devices(list(accelerators.TARGETS)):
        heads.append(target)
        for row, way in zip(rows, _ways(), strict=True):
            optimizer, leaf = way.around(adamw(1e-3)), accelerators.LEAF
            program = accelerators.compiled_for(device, optimizer, leaf, way.dtype)
            row[target] = f"{accelerators.moved(program, leaf).bytes:.1f}"
    print(f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}", sep="\n")
    for row in rows:
        print(f"| {' | '.join(row.values())} |")
    return rows


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", type=int, default=16, help="how many (16)")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=21, help="of the timing (21)")
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    parser.add_argument("--page", type=pathlib.Path, help="a page whose table to renew")
    parser.add_argument("--compiled", action="store_true", help="bytes moved, nothing else")
    options = parser.parse_args(arguments)
    if options.compiled:
        return compiled()
    ways, seeds = _ways(), range(options.seeds)
    spent = times(ways, options.rounds)
    rows: list[dict[str, Any]] = []
    for way, seconds in zip(ways, spent, strict=True):
        row: dict[str, Any] = dict(zip(("parameters", "residual", "state"), way[:3], strict=True))
        row |= {"bytes": bytes_of(way), "time": seconds / spent[0], "error": drift(way)}
        for task in options.tasks:
            row[task] = losses(way, task, seeds, options.steps).tolist()
        rows.append(row)
        print(row, flush=True)
    found = table(rows, options.tasks)
    print(found)
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1))
    if options.page:
        renew(options.page, BEGIN, found, END)
    return rows


def difference(ours: Sequence[float], plain: Sequence[float]) -> str:
    away = np.array(ours) - np.array(plain)
    return f"{away.mean():+.4f} ± {away.std(ddof=1) / len(away) ** 0.5:.4f}"


def table(rows: Sequence[dict[str, Any]], tasks: Sequence[str]) -> str:
    """Markdown; the first row is what the others are compared with."""
    heads = ["parameters", "residual", "state", "bytes", "time", "error after 1000 steps", *tasks]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [row[name] for name in ("parameters", "residual", "state")]
        cells.append(f"{row['bytes']:.2f}")
        cells += [f"{row['time']:.1f}", f"{row['error']:.4f}"]
        for task in tasks:
            if row is rows[0]:
                cells.append(f"{np.mean(row[task]):.4f}")
            else:
                cells.append(difference(row[task], rows[0][task]) if task in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
