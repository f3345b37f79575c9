"""An update in 8 bits and its application in one kernel for each array, on NVIDIA's GPUs.

The largest of a block must be known before its codes can be written, so XLA makes two passes over
gradient and state. A kernel holds a few blocks at a time, and reads and writes everything once.

The kernel is no optimizer's. The update is traced; of every weight, the operations that act on each
element by itself are traced again on a tile of blocks, between decoding and encoding. What remains,
scalars and norms, is calculated before.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Literal

from adaptive_opt.core.apply import AppliesItself
from adaptive_opt.core.containers import is_box
from adaptive_opt.core.describe import made_of
from adaptive_opt.core.reach import OF_SHAPE
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory import codecs
from adaptive_opt.memory.codecs import Blocks
from adaptive_opt.memory.elementwise import (
    inlined,
    makers_in,
    makes_an_array,
    part_of,
    programs_in,
    values,
)
from adaptive_opt.memory.low_memory import PLAIN, LowMemoryState, Noise, encoded_like, noise_of
from adaptive_opt.memory.views import BLOCK, IN_KERNEL

_ROWS, _WARPS = 2, 2
"""The most blocks that a program holds, and how many times 32 threads: 8 numbers in each."""


def one_kernel(optimizer: optax.GradientTransformation, *, interpret: bool = False) -> OneKernel:
    """The same optimizer, a ``low_memory(..., "8-bit")``, with update and apply in one kernel.

    ``train_step`` and ``step_by_layer`` then step with it. By hand it is ``update_and_apply``, to
    be called under ``jax.jit`` with state and parameters donated:
    ``optimizer.update_and_apply(gradients, state, params, **extra) -> (params, state)``. ``update``
    is what it was, for everything else. Compiled for an H100, a step of Adam moves 16.1 bytes a
    parameter in place of 22.3: everything is read and written once.

    There is a kernel (Pallas, Triton) for each array of which a buffer is kept in 8 bits and whose
    size is a multiple of 256, on NVIDIA's GPUs of compute capability 8 and more. What ``inner``
    does to each element by itself becomes part of it, whatever the optimizer; clipping by a norm,
    say, is done before. Elsewhere, for all other arrays, and with variables of nnx, the step is
    ``update`` and ``optax.apply_updates``. Divisions and roots are Triton's, within 2 units in the
    last place; the states are those of ``low_memory``, and may go from one to the other.

    Use it for every state in 8 bits on such a GPU. On an H200 a step takes 0.8 to 0.9 of a float32
    step's time; for AMSGrad, AdaMod, diffGrad and DiffMod that is a fifth of the time without it
    (``benchmarks/README.md``).

    Do without it where parameters are split over devices under ``jit``, for XLA does not split a
    kernel and gathers them (under ``shard_map`` with ``check_vma=False`` each device has its own),
    and where anything has to come between update and parameters: within another transformation it
    is ``low_memory`` alone.

    Args:
      optimizer: what ``low_memory`` returned.
      interpret: calculate as the kernel does, on any platform, slowly: for tests.

    State: that of ``optimizer``. No derivative goes through the kernel: TypeError.

    TypeError for anything but a ``low_memory``.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adamw, low_memory, one_kernel
    >>> optimizer = one_kernel(low_memory(adamw(1e-2), "8-bit"))
    >>> step = jax.jit(optimizer.update_and_apply, donate_argnums=(1, 2))
    >>> params = jnp.ones((32, 256))
    >>> params, state = step(jnp.ones((32, 256)), optimizer.init(params), params)
    >>> round(float(params[0, 0]), 4)
    0.99
    """
    own = made_of(optimizer)
    if own is None or own.name != "low_memory" or own.parts is None:
        raise TypeError(
            "one_kernel takes what low_memory(...) returned, outermost:"
            f" one_kernel(low_memory(inner, '8-bit')), got {type(optimizer).__name__}."
        )
    stepping = OneKernel(*optimizer)
    stepping.inner, stepping.interpret = optax.with_extra_args_support(own.parts[0]), interpret
    return stepping


class OneKernel(AppliesItself):
    """What ``one_kernel`` makes."""

    inner: optax.GradientTransformationExtraArgs
    interpret: bool

    def update_and_apply(
        self, gradients: Tree, state: Any, params: Tree, **extra: Any
    ) -> tuple[Tree, Any]:
        """New parameters and state: those of ``update`` and ``optax.apply_updates``."""
        given = gradients, state, params
        plain = functools.partial(super().update_and_apply, **extra)
        boxes = any(map(is_box, jax.tree.leaves(given, is_leaf=is_box)))
        if boxes or not isinstance(state, LowMemoryState):
            return plain(*given)
        kernels = functools.partial(_in_kernels, self.inner, self.interpret, **extra)
        if self.interpret:
            return kernels(*given)
        return jax.lax.platform_dependent(*given, cuda=kernels, default=plain)


class _Kept(NamedTuple):
    """An output as it is kept: a parameter or an array of the state before, and its noise."""

    stored: Any
    noise: Noise | None = None
    is_state: bool = False

    def encoded(self, x: jax.Array, count: jax.Array) -> Any:
        """A new value, stored like the one before."""
        if not self.is_state:
            return x
        bits = self.noise and self.noise.bits(codecs.noise(x.shape, count, self.noise.salt))
        return encoded_like(bits, self.stored, x, PLAIN)


def _in_kernels(
    inner: optax.GradientTransformationExtraArgs,
    interpret: bool,
    gradients: Tree,
    state: LowMemoryState,
    params: Tree,
    **extra: Any,
) -> tuple[Tree, LowMemoryState]:
    stored = state.inner_state
    with jax.numpy_dtype_promotion("standard"):
        leaves, structure = jax.tree.flatten((params, codecs.decoded(stored), gradients))

    def applied(*leaves: Any) -> Any:
        params, wide, gradients = jax.tree.unflatten(structure, leaves)
        updates, new = inner.update(gradients, wide, params, **extra)
        return optax.apply_updates(params, updates), new

    program = inlined(jax.make_jaxpr(applied)(*leaves))
    noise = noise_of(stored)
    paths, like = jax.tree_util.tree_flatten_with_path(stored, is_leaf=codecs.is_blocks)
    kept = [_Kept(leaf) for leaf in jax.tree.leaves(params)]
    split = len(kept)
    kept += [_Kept(leaf, noise.get(path), is_state=True) for path, leaf in paths]
    count = jnp.asarray(optax.safe_increment(state.count))
    with jax.numpy_dtype_promotion("standard"):
        results = _results(program, leaves, kept, count, interpret)
    params = jax.tree.unflatten(jax.tree.structure(params), results[:split])
    return params, LowMemoryState(count, jax.tree.unflatten(like, results[split:]))


# --- which operations go into which kernel --------------------------------------------------------


def _results(
    program: ClosedJaxpr,
    arrays: Sequence[Any],
    kept: Sequence[_Kept],
    count: jax.Array,
    interpret: bool,
) -> list[Any]:
    """What the program returns, encoded. What is kept are the first of its inputs."""
    jaxpr: Any = program.jaxpr
    makers = makers_in(jaxpr, _goes_in_a_kernel)
    inputs = dict(zip(jaxpr.invars, kept, strict=False))
    kernels = [
        (outputs, part_of(jaxpr, [jaxpr.outvars[k] for k in outputs], makers))
        for outputs in _groups(part_of(jaxpr, [output], makers) for output in jaxpr.outvars)
        if _goes_in_blocks([jaxpr.outvars[k] for k in outputs], [kept[k] for k in outputs])
    ]
    # What kernels start with, and what goes into none, is calculated before.
    inside_kernels = {k for outputs, _ in kernels for k in outputs}
    others = [k for k in range(len(kept)) if k not in inside_kernels]
    sources = [source for _, part in kernels for source in part.invars]
    first = part_of(
        jaxpr, [*(jaxpr.outvars[k] for k in others), *sources], makers_in(jaxpr, lambda _: True)
    )
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*program.consts, *arrays), strict=True))
    made = values(first, [known[source] for source in first.invars])
    results: list[Any] = [None] * len(kept)
    for k, x in zip(others, made, strict=False):
        results[k] = kept[k].encoded(x, count)
    known.update(zip(sources, made[len(others) :], strict=True))
    for outputs, part in kernels:
        given = [_Source(known[source], inputs.get(source)) for source in part.invars]
        new = _kernel(part, given, [kept[k] for k in outputs], count, interpret)
        for k, x in zip(outputs, new, strict=True):
            results[k] = x
    return results


def _groups(parts: Iterable[Any]) -> list[list[int]]:
    """Which outputs are calculated from the same arrays."""
    groups: list[tuple[list[int], set[Any]]] = []
    for k, part in enumerate(parts):
        outputs, sources = [k], {source for source in part.invars if source.aval.size > 1}
        apart = []
        for group in groups:
            if sources.isdisjoint(group[1]):
                apart.append(group)
            else:
                outputs, sources = group[0] + outputs, group[1] | sources
        groups = [*apart, (outputs, sources)]
    return [sorted(outputs) for outputs, _ in groups]


def _goes_in_blocks(outputs: Sequence[Any], kept: Sequence[_Kept]) -> bool:
    size = outputs[0].aval.size
    return (
        any(isinstance(k.stored, Blocks) for k in kept)
        and size % BLOCK == 0
        and size < 2**31  # which a position in a kernel has bits for
        and all(output.aval.size == size for output in outputs)
        and all(jnp.issubdtype(output.aval.dtype, jnp.floating) for output in outputs)
        and all(output.aval.dtype.itemsize <= 4 for output in outputs)
    )


_NOT_IN_KERNELS = frozenset(
    ("complex", "conj", "erf", "erfc", "imag", "real", "reduce_precision", "round")
)
"""Of what works on each element by itself, that which Pallas has no form of on a GPU."""


def _goes_in_a_kernel(equation: Any) -> bool:
    """Whether it makes an array element by element, of arrays of the same size or scalars."""
    if not makes_an_array(equation) or equation.primitive.name in _NOT_IN_KERNELS:
        return False
    sizes = {var.aval.size for var in (*equation.invars, *equation.outvars)} - {1}
    return len(sizes) < 2 and all(
        _goes_in_a_kernel(equation) or equation.outvars[0].aval.size == 1
        for program in programs_in(equation)
        for equation in program.jaxpr.eqns
    )


# --- a kernel -------------------------------------------------------------------------------------


class _Source(NamedTuple):
    """What a kernel starts with: its value, and how it is kept if it is."""

    value: jax.Array
    kept: _Kept | None

    def operands(self, lines: int) -> list[jax.Array]:
        """What of it the kernel reads, in lines of a block."""
        stored = self.stored()
        if isinstance(stored, Blocks):
            return [stored.codes.reshape(lines, BLOCK), stored.scales.reshape(lines)]
        if stored.size > 1:
            return [stored.reshape(lines, BLOCK)]
        return [stored.reshape(()).astype(jnp.int32 if stored.dtype == bool else stored.dtype)]

    def stored(self) -> Any:
        """As it is kept, if the kernel can decode that."""
        stored = self.kept and self.kept.stored
        is_known = isinstance(stored, Blocks) or getattr(stored, "dtype", None) == jnp.bfloat16
        return stored if is_known else self.value

    def read(self, refs: Iterator[Any]) -> jax.Array:
        """Its value, in the kernel."""
        if isinstance(self.stored(), Blocks):
            return codecs.values_in(IN_KERNEL, Blocks(next(refs)[...], next(refs)[...]))
        return next(refs)[...].astype(self.value.dtype)


def _kernel(
    part: Any,
    sources: Sequence[_Source],
    kept: Sequence[_Kept],
    count: jax.Array,
    interpret: bool,
) -> list[Any]:
    """The outputs of a part, encoded as they were kept, in one kernel over lines of a block."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import triton

    lines = part.outvars[0].aval.size // BLOCK
    rows = math.gcd(lines, _ROWS)

    def spec(x: Any) -> Any:
        shape = (rows, BLOCK)[: x.ndim]
        return pl.BlockSpec(shape, lambda i: (i, 0)[: x.ndim])

    def kernel(*refs: Any) -> None:
        given = iter(refs)
        count = next(given)[...]
        results = _on_tile(part, [source.read(given) for source in sources])
        start = pl.program_id(0).astype(jnp.uint32) * np.uint32(rows * BLOCK)
        hashed: dict[int, jax.Array] = {}
        for result, (stored, noise, is_state) in zip(results, kept, strict=True):
            x, bits = jnp.broadcast_to(result, (rows, BLOCK)), None
            if noise:
                if noise.salt not in hashed:
                    hashed[noise.salt] = codecs.noise(x.shape, count, noise.salt, start)
                bits = noise.bits(hashed[noise.salt])
            new = encoded_like(bits, stored, x, _ENCODERS) if is_state else x
            for array in jax.tree.leaves(new):
                next(given)[...] = array

    operands, aliases, results, places = [count], {}, [], {}
    for source in sources:
        if source.kept is not None:
            places[id(source.kept)] = len(operands)
        operands += source.operands(lines)
    for like in kept:
        own = _Source(like.stored, like).operands(lines)
        first = places.get(id(like))
        for k, array in enumerate(own):
            if first is not None and operands[first + k].dtype == array.dtype:
                aliases[first + k] = len(results)
            results.append(jax.ShapeDtypeStruct(array.shape, array.dtype))
    found = iter(
        pl.pallas_call(
            kernel,
            grid=(lines // rows,),
            in_specs=[spec(x) for x in operands],
            out_specs=[spec(x) for x in results],
            out_shape=results,
            input_output_aliases=aliases,
            interpret=interpret,
            compiler_params=triton.CompilerParams(num_warps=_WARPS, num_stages=1),
        )(*map(_without_derivative, operands))
    )
    return [
        jax.tree.map(lambda before: next(found).reshape(before.shape), like.stored) for like in kept
    ]


_ENCODERS = {
    "bfloat16": codecs.to_bfloat16,
    "int8": functools.partial(codecs.int8_in, IN_KERNEL),
    "sqrt8": functools.partial(codecs.sqrt8_in, IN_KERNEL),
}


def _on_tile(jaxpr: Any, given: Sequence[Any]) -> list[Any]:
    """The part, of a tile of the arrays; what is the same for all elements stays a scalar."""
    known = dict(zip(jaxpr.invars, given, strict=True))

    def read(var: Any) -> Any:
        if isinstance(var, Literal):
            aval: Any = var.aval
            return np.asarray(var.val, aval.dtype)
        return known[var]

    for equation in jaxpr.eqns:
        operands = [*map(read, equation.invars)]
        known.update(zip(equation.outvars, _on_tiles(equation, operands), strict=True))
    return [*map(read, jaxpr.outvars)]


def _on_tiles(equation: Any, operands: list[Any]) -> list[Any]:
    if equation.primitive.name in (*OF_SHAPE, "copy", "copy_p"):
        return operands[:1]
    if platforms := equation.params.get("branches_platforms"):
        own = [names is not None and "cuda" in names for names in platforms]
        which = own.index(True) if any(own) else platforms.index(None)
        return _on_tile(programs_in(equation)[which].jaxpr, operands[1:])
    if programs := programs_in(equation):
        return _on_tile(programs[0].jaxpr, operands)
    shape = np.broadcast_shapes(*map(np.shape, operands))
    operands = [jnp.broadcast_to(x, shape) for x in operands]
    result = equation.primitive.bind(*operands, **equation.params)
    if equation.primitive.name in _LOSING_NAN and jnp.issubdtype(result.dtype, jnp.floating):
        for x in operands:
            result = jnp.where(jnp.isnan(x), x, result)
    return [*result] if equation.primitive.multiple_results else [result]


_LOSING_NAN = frozenset(("max", "min", "clamp"))
"""Of which Triton's return the other operand where one is NaN."""


_without_derivative = codecs.without_derivative(
    "one_kernel calculates an update in a kernel, through which no derivative goes: it would come"
    " out wrong in silence. Use the update of the optimizer inside, without low_memory."
)
