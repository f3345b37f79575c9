"""What the compilers for GPUs and TPUs make of a step: ``python -m benchmarks.accelerators``.

No device is needed, only its compiler: ``pip install "jax[tpu]"`` for TPUs, and for NVIDIA's GPUs
``pip install jax-cuda12-plugin nvidia-cuda-nvcc-cu12``, the plugin in jax's own version. Update and
apply, with parameters and state donated, are compiled for one large matrix, and the compiled
program is read: which operations touch whole arrays, and how many bytes they read and write for
each float32 parameter. The least there is: parameter and state read and written once, the gradient
read once. Nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental import topologies

import adaptive_opt
from adaptive_opt.core.reach import reach
from benchmarks import cases
from benchmarks.recipes import RECIPES
from benchmarks.stepping import in_one_kernel, update_and_apply, with_loss

LEAF = {"weight": (1 << 16, 1 << 10)}
"""So large that no array fits into a cache, or into the memory on a TPU's chip."""

TREE = cases.transformer(384)

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_block_limit: 65536 registers_per_core_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 l2_cache_size: 52428800
  device_memory_size: 84942979072 memory_bandwidth: 3352320000000
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
"""The limits of the GPU that is compiled for, as XLA wants them."""

TARGETS: dict[str, Callable[[], Any]] = {
    "NVIDIA H100": functools.partial(
        topologies.get_topology_desc, "", "cuda", target_config=H100, topology="1x1x1"
    ),
    "TPU v5e": functools.partial(topologies.get_topology_desc, "v5e:2x2", "tpu"),
}
LOW_MEMORY = ("adam", "amsgrad", "adamod", "diffgrad", "diffmod")
CASES: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "optax.adam": optax.adam,
    **RECIPES,
    **{
        f"{name}, {storage}": lambda rate, name=name, storage=storage: adaptive_opt.low_memory(
            RECIPES[name](rate), storage
        )
        for name in LOW_MEMORY
        for storage in ("bfloat16", "8-bit")
    },
}
IN_ONE_KERNEL = {f"{name}, 8-bit, one_kernel": f"{name}, 8-bit" for name in LOW_MEMORY}
"""By name, the cases whose step is that of ``one_kernel`` in place of update and apply."""
CASES |= {name: CASES[case] for name, case in IN_ONE_KERNEL.items()}
IN_TREE = ("adam", "diffmod")
"""The cases that are compiled for the Transformer too."""


class Moved(NamedTuple):
    """By a compiled program, per parameter: bytes, by each operation, and of temporaries."""

    operations: tuple[tuple[str, float], ...]
    temporary: float

    @property
    def bytes(self) -> float:
        return sum(n for _, n in self.operations)


def compiled_for(
    device: Any,
    optimizer: optax.GradientTransformation,
    shapes: cases.Shapes,
    dtype: Any = jnp.float32,
    step: Any = None,
) -> Any:
    """Update and apply, or a step, of arrays of one dtype, compiled for a device."""
    sharding = jax.sharding.SingleDeviceSharding(device)

    def placed(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
        )

    params = placed({k: jax.ShapeDtypeStruct(s, dtype) for k, s in shapes.items()})
    state = placed(jax.eval_shape(optimizer.init, params))
    step = step or update_and_apply(with_loss(optimizer))
    return step.lower(params, state, params).compile()


def case_for(device: Any, name: str, shapes: cases.Shapes) -> Any:
    """A case, compiled for a device."""
    optimizer = CASES[name](1e-3)
    step = in_one_kernel(optimizer) if name in IN_ONE_KERNEL else None
    return compiled_for(device, optimizer, shapes, step=step)


_OPERATION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([\w-]+)\((.*?)\)(?:,|$)")
_ARRAY = re.compile(r"\b(pred|[a-z]+(\d+))\[([\d,]*)\]")
_NO_TRAFFIC = {"parameter", "tuple", "get-tuple-element", "bitcast", "constant"}


def moved(compiled: Any, shapes: cases.Shapes) -> Moved:
    """What the operations of a compiled program read and write: their operands and results.

    An asynchronous copy reads and writes what its end returns. What is not of the size of the
    parameters, down to a thousandth, is left out.
    """
    elements = cases.elements(shapes)
    sizes: dict[str, float] = {}
    operations = []
    for name, result, operation, operands in _operations(compiled):
        sizes[name] = _bytes(result) / elements
        if operation in _NO_TRAFFIC or operation.endswith("-start"):
            continue
        read = sum(sizes.get(operand, 0.0) for operand in re.findall(r"%([\w.-]+)", operands))
        if operation.endswith("-done"):
            read = sizes[name]
        if read + sizes[name] > 1e-3:
            operations.append((operation, round(read + sizes[name], 3)))
    return Moved(
        tuple(operations), round(compiled.memory_analysis().temp_size_in_bytes / elements, 3)
    )


def kernels(compiled: Any) -> int:
    """How many operations make arrays; those that fetch or send them meanwhile are not counted."""
    return sum(
        not (operation in _NO_TRAFFIC or operation.endswith(("-start", "-done", "custom-call")))
        and _bytes(result) > 64
        for _, result, operation, _ in _operations(compiled)
    )


def _operations(compiled: Any) -> Iterator[tuple[str, str, str, str]]:
    """Name, type of the result, kind and operands of each in the main program."""
    for line in compiled.as_text().partition("\nENTRY ")[2].splitlines():
        found = _OPERATION.match(line)
        if found:
            yield found.groups()


def _bytes(result: str) -> float:
    """Of all arrays in the type of a result."""
    return sum(
        math.prod(map(int, filter(None, shape.split(",")))) * int(bits or 8) / 8
        for _, bits, shape in _ARRAY.findall(result)
    )


@functools.cache
def is_elementwise(name: str) -> bool:
    """Whether no weight sees another in a case."""
    weights = {"weight": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    return reach(with_loss(CASES[name](1e-3)), weights, weights).scope == "weight"


def least_bytes(name: str) -> float:
    """Parameters and state are read and written, the gradient is read."""
    (shape,) = LEAF.values()
    state = jax.eval_shape(CASES[name](1e-3).init, jax.ShapeDtypeStruct(shape, jnp.float32))
    kept = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return 8 + 4 + 2 * kept / math.prod(shape)


def table(results: dict[str, Any]) -> str:
    """Markdown: for every case and target what is moved, by which operations."""
    heads = ["", "least", *results]
    lines = [f"| {' | '.join(heads)} |", f"|---|---:|{'---|' * len(results)}"]
    for name in next(iter(results.values()))["cases"]:
        cells = [f"`{name}`", f"{least_bytes(name):.1f}"]
        for found in results.values():
            facts = found["cases"][name]
            large = [f"{operation} {n:.1f}" for operation, n in facts["operations"] if n > 0.5]
            shown = " + ".join(large)
            if len(large) > 4:
                shown = f"{len(large)} operations"
            temporary = (
                f", temporaries {facts['temporary']:.1f}" if facts["temporary"] > 0.5 else ""
            )
            cells.append(f"**{facts['bytes']:.1f}**: {shown}{temporary}")
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for target, found in results.items():
        counted = ", ".join(f"{name} {n}" for name, n in found["kernels"].items())
        lines.append(f"Kernels, {found['leaves']} leaves of a Transformer, {target}: {counted}.")
    return "\n".join(lines)


def devices(targets: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """The targets whose compiler is there, each with a device to compile for."""
    jax.config.update("jax_platforms", "cpu")  # no compiler shall look for its device
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # nor ask the network which TPU this is
    for target in targets:
        try:
            yield target, TARGETS[target]().devices[0]
        except (RuntimeError, NotImplementedError) as reason:
            print(f"no compiler for {target}: {str(reason).splitlines()[0]}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=CASES)
    parser.add_argument("--output", type=pathlib.Path, help="where JSON and table are saved")
    options = parser.parse_args(arguments)
    results: dict[str, Any] = {}
    for target, device in devices(options.targets):
        of_leaf = {}
        for name in options.cases:
            found = moved(case_for(device, name, LEAF), LEAF)
            of_leaf[name] = found._asdict() | {"bytes": found.bytes}
            print(f"{target}, {name}: {found.bytes:.1f} bytes", file=sys.stderr)
        of_tree = {name: kernels(case_for(device, name, TREE)) for name in IN_TREE}
        results[target] = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "cases": of_leaf,
            "leaves": len(TREE),
            "kernels": of_tree,
        }
    if not results:
        sys.exit("there is no compiler for any of them; --help says which packages have one")
    print(table(results))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "accelerators.json").write_text(json.dumps(results, indent=1) + "\n")
        (options.output / "accelerators.md").write_text(table(results) + "\n")
    return results


if __name__ == "__main__":
    main()
