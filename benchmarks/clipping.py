"""What clipping costs in memory, and does to the loss: ``python -m benchmarks.clipping``.

The small Transformer of ``examples/transformer.py`` on the same text, by AdamW without clipping and
with three: by the norm of all gradients, which holds all of them until it is known; by the norm of
the step before; and of each tensor's update by its root mean square. Loss: held out, after training
from the same starts on the same batches, less that of the norm of all gradients, in nats per
character, with its standard error over the seeds. Plan: temporaries of a step over the size of the
parameters, as XLA for this machine plans them, for 12 layers and so few characters that gradients
are what takes up space; nothing of that runs.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adaptive_opt
from benchmarks.pages import renew

BEGIN, END = "<!-- clipping -->", "<!-- end of clipping -->"
ALL_GRADIENTS = "clip_by_global_norm(1.0)"


def _adamw(rate: Any, *before: Any, inside: Sequence[Any] = ()) -> optax.GradientTransformation:
    return optax.chain(
        *before,
        adaptive_opt.open_step(),
        adaptive_opt.scale_by_adam(0.9, 0.999, 1e-8),
        *inside,
        adaptive_opt.close_step(),
        adaptive_opt.decoupled_weight_decay(0.1, adaptive_opt.decay_mask),
        optax.scale_by_learning_rate(rate),
    )


CLIPPINGS: dict[str, Callable[[Any], optax.GradientTransformation]] = {
    ALL_GRADIENTS: lambda rate: _adamw(rate, optax.clip_by_global_norm(1.0)),
    "clip_by_previous_norm(1.0)": lambda rate: _adamw(
        rate, adaptive_opt.clip_by_previous_norm(1.0)
    ),
    "clip_update_rms(0.25)": lambda rate: _adamw(rate, inside=[adaptive_opt.clip_update_rms(0.25)]),
    "none": lambda rate: _adamw(rate),
}


def loss_of(model: Any) -> Callable[..., jax.Array]:
    def loss(params: Any, pieces: jax.Array) -> jax.Array:
        logits = model.apply(params, pieces[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, pieces[:, 1:]).mean()

    return loss


def losses(name: str, rate: float, options: argparse.Namespace) -> list[float]:
    """Held out, for every seed."""
    from examples.transformer import Transformer, draw, load

    text, held_out = load()
    model = Transformer(options.width, options.layers, options.context)
    optimizer = CLIPPINGS[name](optax.linear_schedule(0.0, rate, 50))
    loss = loss_of(model)

    def pieces(of: Any, *seed: int) -> np.ndarray:
        return draw(of, seed, options.batch, options.context)

    @jax.jit
    def run(key: jax.Array, batches: jax.Array, tests: jax.Array) -> jax.Array:
        params = model.init(key, jnp.zeros((1, 1), int))

        def step(carry: Any, batch: jax.Array) -> Any:
            params, state = carry
            updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), batches)
        return jax.lax.map(lambda test: loss(params, test), tests).mean()

    found = []
    for seed in range(options.seeds):
        batches = np.stack([pieces(text, seed, t) for t in range(options.steps)])
        tests = np.stack([pieces(held_out, seed, t) for t in range(20)])
        found.append(float(run(jax.random.key(seed), batches, tests)))
    return found


def temporaries(name: str) -> float:
    """Of a step in place, over the parameters."""
    from examples.transformer import Transformer

    model, optimizer = Transformer(256, 12, 8), CLIPPINGS[name](1e-3)
    pieces = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), int))
    step = adaptive_opt.train_step(loss_of(model), optimizer)
    state = jax.eval_shape(optimizer.init, params)
    plan = adaptive_opt.memory_plan(step, params, state, pieces)
    return plan.temporaries / plan.params


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; the first row is what the others are compared with."""
    rates = list(rows[0]["losses"])
    heads = ["clipping", "temporaries", *(f"loss, rate {rate}" for rate in rates)]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for row in rows:
        cells = [f"`{row['clipping']}`", f"{row['temporaries']:.2f}"]
        for rate in rates:
            own = np.array(row["losses"][rate])
            away = own - np.array(rows[0]["losses"][rate])
            error = away.std(ddof=1) / len(away) ** 0.5
            compared = f"{away.mean():+.4f} ± {error:.4f}"
            cells.append(f"{own.mean():.4f}" if row is rows[0] else compared)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, default=4, help="how many, at least 2 (4)")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--output", type=pathlib.Path, help="a JSON file")
    parser.add_argument("--page", type=pathlib.Path, help="a page whose table to renew")
    options = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name in CLIPPINGS:
        row: dict[str, Any] = {"clipping": name, "temporaries": temporaries(name)}
        row["losses"] = {str(rate): losses(name, rate, options) for rate in options.rates}
        rows.append(row)
        print(row, flush=True)
    print(table(rows))
    if options.output:
        options.output.write_text(json.dumps(rows, indent=1) + "\n")
    if options.page:
        renew(options.page, BEGIN, table(rows), END)
    return rows


if __name__ == "__main__":
    main()
