"""What XLA says about a compiled update; also a script, for processes with options of their own.

``python tests/traffic.py NAME...`` prints as JSON, for recipes as they are and as a single pass,
what :func:`traffic` returns, and how far the numbers of the two are apart.
"""

from __future__ import annotations

import json
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

SIZE = 1 << 16


class Traffic(NamedTuple):
    """Of a compiled program, per parameter: bytes moved, bytes of temporaries, and loops."""

    bytes: float
    temporary: float
    loops: int


def traffic(compiled, shape) -> Traffic:
    """How a compiled update of one leaf of this shape moves through memory."""
    size = float(jnp.prod(jnp.array(shape)))
    entry = compiled.as_text().partition("\nENTRY ")[2]
    full = re.escape(f"f32[{','.join(map(str, shape))}]")
    made = rf"= [^=]*{full}[^=]* (?!parameter|tuple|get-tuple-element|bitcast)[\w-]+\("
    loops = [line for line in entry.splitlines() if re.search(made, line)]
    return Traffic(
        compiled.cost_analysis()["bytes accessed"] / size,
        compiled.memory_analysis().temp_size_in_bytes / size,
        len(loops),
    )


def donated_step(optimizer):
    """Update and apply in one program that may reuse parameters and state."""

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def compiled_step(optimizer, shape=(SIZE,)):
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    return donated_step(optimizer).lower(params, state, params).compile()


def report(names):
    from common import RECIPES, gradient_trees, ulps

    from adaptive_opt import single_pass, single_pass_stands_aside

    answers = {"stands aside": single_pass_stands_aside()}
    for name in names:
        plain = RECIPES[name](1e-3)
        merged = single_pass(plain)
        programs = {"plain": compiled_step(plain), "single pass": compiled_step(merged)}
        answers[name] = {k: traffic(p, (SIZE,))._asdict() for k, p in programs.items()}
        runs = {}
        for kind, program in programs.items():
            params = jnp.linspace(-1.0, 1.0, SIZE)
            state = plain.init(params)
            for gradient in gradient_trees(3, shapes=(SIZE,)):
                params, state = program(params, state, gradient)
            runs[kind] = [x for x in jax.tree.leaves((params, state)) if x.dtype == jnp.float32]
        answers[name]["ulps"] = int(ulps(runs["single pass"], runs["plain"]))
    return answers


if __name__ == "__main__":
    print(json.dumps(report(sys.argv[1:])))
