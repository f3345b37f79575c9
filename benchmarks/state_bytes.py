"""What the state of an optimizer takes on each of 1, 2, 4 and 8 devices.

    python -m benchmarks.state_bytes
    python -m benchmarks.state_bytes --page docs/devices.md

For a Transformer of the size of GPT-2 small. Nothing is allocated: shapes and shardings say it all.
Prints a table; with ``--page`` renews the one that is in there.
"""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from adaptive_opt import adamod, adamw, diffmod, sgd, state_shardings, zero1
from benchmarks.pages import renew

DEVICES = (1, 2, 4, 8)
RECIPES = {
    "sgd": lambda: sgd(1e-2, momentum=0.9),
    "adamw": lambda: adamw(1e-3),
    "adamod": lambda: adamod(1e-3),
    "diffmod": lambda: diffmod(1e-3),
}
LAYOUTS = ("replicated", "zero1", "fsdp")
BEGIN, END = "<!-- state bytes: begin -->", "<!-- state bytes: end -->"


def parameters(vocabulary=50_257, width=768, layers=12, context=1024) -> dict:
    """The shapes of a decoder's parameters."""

    def of(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def dense(n: int, m: int) -> dict:
        return {"kernel": of(n, m), "bias": of(m)}

    def norm() -> dict:
        return {"scale": of(width), "bias": of(width)}

    block = {
        "attention": {"qkv": dense(width, 3 * width), "out": dense(width, width)},
        "mlp": {"up": dense(width, 4 * width), "down": dense(4 * width, width)},
        "norm1": norm(),
        "norm2": norm(),
    }
    return {
        "embedding": of(vocabulary, width),
        "position": of(context, width),
        **{f"block{i}": block for i in range(layers)},
        "norm": norm(),
    }


def fully_sharded(params: dict, mesh: Mesh) -> dict:
    """Every parameter split along its first dimension that can be."""
    n = mesh.devices.size

    def split(p: jax.ShapeDtypeStruct) -> NamedSharding:
        whole = [i for i, size in enumerate(p.shape) if size % n == 0]
        return NamedSharding(mesh, P(*[None] * whole[0], "data") if whole else P())

    return jax.tree.map(split, params)


def bytes_per_device(
    optimizer: optax.GradientTransformation, params: dict, shardings: dict | NamedSharding
) -> int:
    """The bytes of its state that one device holds."""
    state = jax.eval_shape(optimizer.init, params)
    where = state_shardings(optimizer, params, shardings)
    sizes = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        state,
        where,
    )
    return sum(jax.tree.leaves(sizes))


def measure(recipe: str, layout: str, devices: int) -> int:
    params = parameters()
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    optimizer = RECIPES[recipe]()
    if layout == "fsdp":
        return bytes_per_device(optimizer, params, fully_sharded(params, mesh))
    if layout == "zero1":
        optimizer = zero1(optimizer, mesh)
    return bytes_per_device(optimizer, params, NamedSharding(mesh, P()))


def table() -> str:
    """Markdown, in MiB."""
    count = sum(math.prod(p.shape) for p in jax.tree.leaves(parameters()))
    heads = [f"{n} device{'s' if n > 1 else ''}" for n in DEVICES]
    lines = [
        f"| MiB of state, {count / 1e6:.1f}M weights | layout | {' | '.join(heads)} |",
        f"|---|---|{'---:|' * len(DEVICES)}",
    ]
    for recipe in RECIPES:
        for layout in LAYOUTS:
            cells = [f"{measure(recipe, layout, n) / 2**20:.1f}" for n in DEVICES]
            lines.append(f"| `{recipe}` | {layout} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", type=pathlib.Path, help="a page whose table to renew")
    options = parser.parse_args(arguments)
    jax.config.update("jax_num_cpu_devices", max(DEVICES))
    found = table()
    print(found)
    if options.page:
        renew(options.page, BEGIN, found, END)


if __name__ == "__main__":
    main()
