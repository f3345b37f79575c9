"""The state of an optimizer in 16 or 8 bits, whatever the optimizer."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_opt import codecs
from adaptive_opt.codecs import Blocks
from adaptive_opt.describe import described_around
from adaptive_opt.policies import Tree, check_whole

_ENCODERS: dict[str, Callable[..., Any]] = {
    "bfloat16": codecs.to_bfloat16,
    "int8": codecs.to_int8,
    "sqrt8": codecs.to_sqrt8,
}
_WIDE = "wide"

# Slow weights are parameters, and a variance is a small difference of two averages.
_ALWAYS_WIDE: dict[str, str] = dict.fromkeys(("slow", "mean_gradient"), _WIDE)
_SIGNED: tuple[str, ...] = ("mu", "velocity", "trace", "previous_gradient")
_SQUARES: tuple[str, ...] = ("nu", "nu_max", "sum_of_squares")
_SIGNED_IN_8_BITS: dict[str, str] = dict.fromkeys(_SIGNED, "int8")
_SQUARES_IN_8_BITS: dict[str, str] = dict.fromkeys(_SQUARES, "sqrt8")
_DEFAULTS = {
    "bfloat16": _ALWAYS_WIDE,
    "8-bit": _ALWAYS_WIDE | _SIGNED_IN_8_BITS | _SQUARES_IN_8_BITS,
}
"""What is not kept in bfloat16."""

_NEAREST = ("nu_max", "previous_gradient")
"""What is no average is rounded to the nearest: a maximum of random roundings would drift upwards,
and a difference of two gradients grow by the noise."""


class LowMemoryState(NamedTuple):
    """The number of steps, which the rounding noise is made of, and the encoded inner state."""

    count: jax.Array
    inner_state: Any


@described_around
def low_memory(
    inner: optax.GradientTransformation,
    storage: str = "bfloat16",
    *,
    buffers: Mapping[str, str] | None = None,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the float32 arrays of an optimizer's state in fewer bits between steps.

    A step decodes, calls ``inner`` in float32, and encodes with stochastic rounding, so that
    averages whose increments are smaller than a step of the code still move, in the mean rightly.
    It saves memory, and on the CPU costs time. Parameters and gradients are not touched.

    * "bfloat16": 2 bytes a number, 8 bits of precision. 0.5 of the state.
    * "int8": 1 byte and 1/64 for scales: blocks of 256, steps of 1/127 of the largest in the block.
    * "sqrt8": the same for numbers of at least 0, with steps of 1/255 of the largest *root*; what
      is greater than 0 stays so. The blocks are those of Dettmers et al. 2022, arXiv:2110.02861;
      the code is plainer.
    * "wide": as it is.

    Args:
      inner: any optax transformation; extra arguments of ``update`` are passed on to it.
      storage: "bfloat16", for everything but slow weights and centered RMSprop's ``mean_gradient``;
        or "8-bit": "int8" for ``mu``, ``velocity``, ``trace``, ``previous_gradient``, "sqrt8" for
        ``nu``, ``nu_max``, ``sum_of_squares``, the rest as with "bfloat16". AdaMod's ``rate_ema``
        does not bear 8 bits: its mean is dominated by a few first rates.
      buffers: for single buffers another storage, by name: ``{"rate_ema": "wide", "nu": "int8"}``;
        the name is the first one on the path to the array, in the state, that is listed.
      min_size: smaller arrays are kept wide; a whole number of at least 1. A tree with many small
        leaves saves less than the figures above.

    State: ``LowMemoryState(count, inner_state)``, where encoded arrays are bfloat16 of the same
      shape, or ``Blocks(codes, scales)`` with codes of the same shape. Arrays that are not float32
      are left alone. A NaN in a block of 8 bits makes the block NaN: put ``skip_nonfinite`` around.

    ValueError for an unknown storage. Centered RMSprop is a difference of two averages, which the
    rounding of ``nu`` alone can make 0: keep its ``nu`` "wide".

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, low_memory
    >>> x = jnp.ones(10_000)
    >>> for storage in ("bfloat16", "8-bit"):
    ...     state = low_memory(adam(1e-3), storage).init(x)
    ...     print(storage, sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / x.size)
    bfloat16 4.0008
    8-bit 2.0328
    """
    if storage not in _DEFAULTS:
        raise ValueError(
            f"storage must be one of {', '.join(map(repr, _DEFAULTS))}, got {storage!r}."
        )
    named = {**_DEFAULTS[storage], **(buffers or {})}
    for name, asked in named.items():
        if asked not in (*_ENCODERS, _WIDE):
            allowed = ", ".join(map(repr, (*_ENCODERS, _WIDE)))
            raise ValueError(f"the storage of {name!r} must be one of {allowed}, got {asked!r}.")
    check_whole(1, min_size=min_size)
    inner = optax.with_extra_args_support(inner)

    def chosen(path: Any, size: int) -> str:
        if size < min_size:
            return _WIDE
        return next((named[key] for key in _names(path) if key in named), "bfloat16")

    def encoded(state: Any, count: jax.Array | None) -> Any:
        def encode(path: Any, x: Any) -> Any:
            if getattr(x, "dtype", None) != jnp.float32:
                return x
            storage = chosen(path, x.size)
            if storage == _WIDE or isinstance(x, jax.ShapeDtypeStruct):
                return x
            if count is None:  # a constant that XLA sees it calculates itself, slowly
                return _ENCODERS[storage](jax.lax.optimization_barrier(x), None)
            if any(name in _NEAREST for name in _names(path)):
                return _ENCODERS[storage](x, None)
            salt = zlib.crc32(jax.tree_util.keystr(path).encode())
            return _ENCODERS[storage](x, codecs.noise(x.shape, count, salt))

        return jax.tree_util.tree_map_with_path(encode, state)

    def decoded(state: Any) -> Any:
        def decode(path: Any, x: Any) -> Any:
            if isinstance(x, Blocks):
                return codecs.from_blocks(x)
            if getattr(x, "dtype", None) != jnp.bfloat16 or chosen(path, x.size) != "bfloat16":
                return x
            return x.astype(jnp.float32)

        return jax.tree_util.tree_map_with_path(
            decode, state, is_leaf=lambda x: isinstance(x, Blocks)
        )

    def init(params: Tree) -> LowMemoryState:
        return LowMemoryState(jnp.zeros([], jnp.int32), encoded(inner.init(params), None))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if not isinstance(state, LowMemoryState):
            raise ValueError(
                f"low_memory needs a LowMemoryState, but was given {type(state).__name__}. A state"
                " belongs to the optimizer that initialised it."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        updates, new = inner.update(updates, decoded(state.inner_state), params, **extra)
        return updates, LowMemoryState(count, encoded(new, count))

    return optax.GradientTransformationExtraArgs(init, update)


def _names(path: Any) -> list[Any]:
    return [getattr(key, "name", getattr(key, "key", None)) for key in path]
