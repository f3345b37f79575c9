"""What XLA says about a compiled update, and how far two results are apart."""

from __future__ import annotations

import os
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.stepping import update_and_apply

SIZE = 1 << 16
OPTION = "--xla_backend_extra_options=xla_cpu_use_multi_output_fusion"
without_the_option = pytest.mark.skipif(
    OPTION in os.environ.get("XLA_FLAGS", ""), reason="this process has the option"
)


class Traffic(NamedTuple):
    """Of a compiled program, per parameter: bytes moved, bytes of temporaries, and loops."""

    bytes: float
    temporary: float
    loops: int


def traffic(compiled, shape=(SIZE,)) -> Traffic:
    """How a compiled update of one leaf of this shape moves through memory."""
    size = float(np.prod(shape))
    return Traffic(
        round(compiled.cost_analysis()["bytes accessed"] / size, 1),
        round(compiled.memory_analysis().temp_size_in_bytes / size, 1),
        loops(compiled, shape),
    )


def loops(compiled, shape=(SIZE,)) -> int:
    """How many operations of the compiled program make an array of this shape."""
    entry = compiled.as_text().partition("\nENTRY ")[2]
    full = re.escape(f"f32[{','.join(map(str, shape))}]")
    made = rf"= [^=]*{full}[^=]* (?!parameter|tuple|get-tuple-element|bitcast)[\w-]+\("
    return sum(bool(re.search(made, line)) for line in entry.splitlines())


def compiled_step(optimizer, shape=(SIZE,)):
    params = jax.ShapeDtypeStruct(shape, jnp.float32)
    state = jax.eval_shape(optimizer.init, params)
    return update_and_apply(optimizer).lower(params, state, params).compile()


def ulps_at_the_scale_of(old, actual, expected) -> float:
    """The largest difference, in units in the last place of the larger of old and new value."""

    def distance(old, a, b):
        scale = np.maximum(np.abs(old), np.abs(b)).astype(np.float32)
        return np.max(np.abs(a.astype(np.float64) - b) / np.spacing(scale))

    return float(max(map(distance, *map(_float32s, (old, actual, expected)))))


def _float32s(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree) if x.dtype == jnp.float32]
