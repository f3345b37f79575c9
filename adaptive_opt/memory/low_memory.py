"""The state of an optimizer in 16 or 8 bits, whatever the optimizer."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.buffers import buffer
from adaptive_opt.core.checks import check_optimizer, check_whole, choose
from adaptive_opt.core.containers import is_box, unboxed
from adaptive_opt.core.describe import described_around
from adaptive_opt.core.reach import counts_as_per_weight
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory import codecs
from adaptive_opt.memory.codecs import Blocks

# The noise goes by positions and the scales by blocks; of a part of an array it does the same.
_decoded = counts_as_per_weight(codecs.decoded)

Encoders = Mapping[str, Callable[..., Any]]
PLAIN: Encoders = {
    "bfloat16": codecs.to_bfloat16,
    "int8": codecs.to_int8,
    "sqrt8": codecs.to_sqrt8,
}
_WIDE = "wide"

_STORAGES = ("bfloat16", "8-bit")


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
    """Keeps the averages in an optimizer's state in fewer bits between steps.

    A step decodes, calls ``inner`` in float32, and encodes with stochastic rounding, so that
    averages whose increments are smaller than a step of the code still move, in the mean rightly.
    The noise is a hash of position and step, of which one serves two buffers of a weight. It saves
    memory; on the CPU it costs time. Compiled for a GPU, a step of Adam moves 20 bytes a parameter
    in bfloat16 and 22 in 8 bits, in place of 28 (``one_kernel``: 16); for a TPU 28 in either, in 8
    bits where the last two dimensions are multiples of 8 and 256. Parameters and gradients are not
    touched.

    * "bfloat16": 2 bytes a number, 8 bits of precision. 0.5 of the state.
    * "int8": 1 byte and 1/64 for scales: blocks of 256, steps of 1/127 of the largest in the block.
    * "sqrt8": the same for numbers of at least 0, with steps of 1/255 of the largest *root*; what
      is greater than 0 stays so. The blocks are those of Dettmers et al. 2022, arXiv:2110.02861;
      the code is plainer.
    * "wide": as it is.

    Only buffers that are known to bear it are encoded (``core/buffers.py`` has the table, by name):

    * averages and sums of gradients and of their squares, ``mu``, ``velocity``, ``trace``, ``nu``,
      ``sum_of_squares``; in bfloat16 also ``mu_slow``, ``change_ema``, ``acc_grads``, ``step_ema``,
      ``infinity_norm`` and AdaMod's ``rate_ema``, whose mean a few first rates dominate;
    * ``nu_max`` and ``previous_gradient``, which are no averages and are rounded to nearest: random
      roundings would make a maximum drift, and a difference of gradients noisy.

    Wide stay slow weights and ``z``, which are parameters (for those ``master_weights`` has codes),
    centered RMSprop's ``mean_gradient``, SOAP's matrices, counters, and whatever
    has another name. ``buffers`` names more.

    Args:
      inner: any optax transformation; extra arguments of ``update`` are passed on to it.
      storage: "bfloat16", for all of the buffers above; or "8-bit": "sqrt8" for ``nu``, ``nu_max``,
        ``sum_of_squares``, "int8" for ``mu``, ``velocity``, ``trace``, and "bfloat16" for the
        others: 8 bits of ``previous_gradient`` do for diffGrad (``buffers={"previous_gradient":
        "int8"}``), but not for Adan, which "8-bit" costs 0.007 nats on one of the tasks of
        ``benchmarks.low_memory``, 0.011 with them, and "bfloat16" nothing.
      buffers: for single buffers another storage, by name: ``{"rate_ema": "wide", "nu": "int8"}``;
        the name is a key of ``AdaptiveState.buffers``, or a field of another state (``mu`` of
        optax's ``ScaleByAdamState``). Names of parameters do not count.
      min_size: smaller arrays are kept wide; a whole number of at least 1. A tree with many small
        leaves saves less than the figures above. It is ``init`` that looks at sizes and names;
        ``update`` stores every array as it finds it, also where it sees a part only (``shard_map``,
        ``vmap``).

    State: ``LowMemoryState(count, inner_state)``, where encoded arrays are bfloat16 of the same
      shape, or ``Blocks(codes, scales)`` with codes of the same shape. bfloat16 arrays of ``inner``
      itself are kept exactly, as their bits (uint16); other arrays that are not float32 are left
      alone. ``codecs.decoded(state.inner_state)`` is the state as ``inner`` knows it.

    What is not finite stays with its weight: bfloat16 keeps it, "int8" gives it back as NaN,
    "sqrt8" as infinity, and the others in the block are encoded as if it were 0. ``skip_nonfinite``
    around sees it in the codes, and refuses the step.

    8 bits under ``shard_map`` or ``vmap``: the last dimension of every part must be a multiple of
    256 (and the state's specs those of ``state_shardings``); else ValueError, or the complaint of
    JAX that the scales cannot be split. "bfloat16" goes anywhere. Under ``jit`` any split does, but
    where it is not between blocks XLA splits the scales as it likes: a second step may be compiled
    again.

    No derivative goes through what is kept in fewer bits: a step of which somebody asks the
    derivative by what it remembers is a TypeError. Differentiate through ``inner`` alone.

    TypeError for an ``inner`` that is no transformation. ValueError for an unknown storage, for a
    name in ``buffers`` that the state does not have (at ``init``), for a uint16 array in it.
    Centered RMSprop is a difference of two averages, which the rounding of ``nu`` alone can make 0:
    keep its ``nu`` "wide".

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, low_memory
    >>> x = jnp.ones(10_000)
    >>> for storage in ("bfloat16", "8-bit"):
    ...     state = low_memory(adam(1e-3), storage).init(x)
    ...     print(storage, sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / x.size)
    bfloat16 4.0008
    8-bit 2.0328
    """
    check_optimizer("low_memory", inner)
    choose("storage", storage, dict.fromkeys(_STORAGES))
    named = dict(buffers or {})
    for name, asked in named.items():
        choose(f"the storage of {name!r}", asked, {**PLAIN, _WIDE: None})
    check_whole(1, min_size=min_size)
    inner = optax.with_extra_args_support(inner)

    @counts_as_per_weight
    def encoded(path: Any, x: Any) -> Any:
        """An array of a new state, by its name and size."""
        dtype = getattr(x, "dtype", None)
        if isinstance(x, (Blocks, jax.ShapeDtypeStruct)):  # of a low_memory inside; of no array
            return x
        if dtype == jnp.uint16:
            raise ValueError(
                f"the state has a uint16 array at {jax.tree_util.keystr(path)}, but uint16 is what"
                " low_memory keeps the bits of bfloat16 arrays in: let the optimizer use another."
            )
        if dtype == jnp.bfloat16:
            return codecs.own_bits(x)
        name = str(buffer_of(path))
        asked = named.get(name, _default(name, storage))
        if dtype != jnp.float32 or x.size < min_size or asked == _WIDE:
            return x
        # A constant that XLA sees it calculates itself, slowly.
        return PLAIN[asked](jax.lax.optimization_barrier(x), None)

    def init(params: Tree) -> LowMemoryState:
        state = inner.init(params)
        check_names(buffers or {}, state, params)
        with jax.numpy_dtype_promotion("standard"):
            kept = jax.tree_util.tree_map_with_path(_in_boxes(encoded), state, is_leaf=_is_one)
        return LowMemoryState(jnp.zeros([], jnp.int32), kept)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if not isinstance(state, LowMemoryState):
            raise ValueError(
                f"low_memory needs a LowMemoryState, but was given {type(state).__name__}. A state"
                " belongs to the optimizer that initialised it."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        stored = state.inner_state
        with jax.numpy_dtype_promotion("standard"):
            wide = _decoded(stored)
        updates, new = inner.update(updates, wide, params, **extra)
        return updates, LowMemoryState(count, encoded_again(count, stored, new))

    return optax.GradientTransformationExtraArgs(init, update)


def _default(name: str, storage: str) -> str:
    """How a buffer is kept of which nothing else was said."""
    known = buffer(name)
    if known is None or not known.bfloat16:
        return _WIDE
    return (storage == "8-bit" and known.in_8_bits) or "bfloat16"


def encoded_again(count: jax.Array, stored: Any, state: Any) -> Any:
    """An inner state after the step ``count``, every array as it is in ``stored``."""
    with jax.numpy_dtype_promotion("standard"):
        bits = _bits(count, stored)

        def encode(path: Any, *leaves: Any) -> Any:
            return _in_boxes(functools.partial(_encoded_again, bits.get(path)))(path, *leaves)

        return jax.tree_util.tree_map_with_path(encode, stored, state, is_leaf=_is_one)


class Noise(NamedTuple):
    """Where the random bits of a buffer come from: the salt of a hash, and which half of it."""

    salt: int
    half: int

    def bits(self, hashed: jax.Array) -> jax.Array:
        """32 of which the upper 16 are random."""
        return hashed << 16 if self.half else hashed


def noise_of(stored: Any) -> dict[Any, Noise]:
    """Of each array that is rounded stochastically, by its path.

    One hash for each weight and step serves two of its buffers. The salt is made of the names of
    all of them.
    """
    of_weight: dict[Any, list[Any]] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(stored, is_leaf=_is_one)[0]:
        name, below = _split(path)
        known = buffer(name)
        if _storage_of(_bare(leaf)) != _WIDE and not (known and known.to_nearest):
            of_weight.setdefault((_shape(leaf), below), []).append(path)
    found: dict[Any, Noise] = {}
    for paths in of_weight.values():
        names = "".join(map(jax.tree_util.keystr, paths))
        for place, path in enumerate(paths):
            salt = zlib.crc32(f"{names}{place - place % 2}".encode())
            found[path] = Noise(salt, place % 2)
    return found


def _shape(stored: Any) -> tuple[int, ...]:
    return jnp.shape(jax.tree.leaves(stored)[0])


@counts_as_per_weight
def _bits(count: jax.Array, stored: Any) -> dict[Any, jax.Array]:
    """The random bits of each array that is rounded stochastically, by its path."""
    shapes = {
        path: _shape(leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(stored, is_leaf=_is_one)[0]
    }
    hashed: dict[Any, jax.Array] = {}
    bits: dict[Any, jax.Array] = {}
    for path, noise in noise_of(stored).items():
        if noise.half == 0:
            hashed = {noise.salt: codecs.noise(shapes[path], count, noise.salt)}
        bits[path] = noise.bits(hashed[noise.salt])
    return bits


@counts_as_per_weight
def _encoded_again(bits: jax.Array | None, path: Any, stored: Any, x: Any) -> Any:
    del path
    return encoded_like(bits, stored, x, PLAIN)


def encoded_like(bits: jax.Array | None, stored: Any, x: Any, encoders: Encoders) -> Any:
    """An array after a step, as it was stored: here it may be a part of what it was."""
    dtype, storage = getattr(x, "dtype", None), _storage_of(stored)
    if dtype == jnp.bfloat16:
        return codecs.own_bits(_without_derivative(x))
    if dtype != jnp.float32 or storage == _WIDE:
        return x
    return encoders[storage](_without_derivative(x), bits)


def _is_one(x: Any) -> bool:
    return codecs.is_blocks(x) or is_box(x)


def _in_boxes(encode: Callable[..., Any]) -> Callable[..., Any]:
    """``encode(path, *stored, x)`` where ``x`` may be in a box, a variable of nnx say."""

    def encode_inside(path: Any, *leaves: Any) -> Any:
        *stored, x = leaves
        if is_box(x) and not jax.tree.leaves(x):  # of a parameter in another group
            return x
        stored = map(unboxed, stored)
        return codecs.in_its_box(functools.partial(encode, path, *stored), x)

    return encode_inside


_without_derivative = codecs.without_derivative(
    "low_memory keeps what an optimizer remembers in fewer bits, through which no derivative"
    " goes: it would come out wrong in silence. Differentiate through the optimizer inside,"
    " without low_memory."
)


def _bare(stored: Any) -> Any:
    """What is stored, without the boxes around it."""
    return Blocks(*map(unboxed, stored)) if codecs.is_blocks(stored) else unboxed(stored)


def _storage_of(stored: Any) -> str:
    if isinstance(stored, Blocks):
        return "int8" if stored.codes.dtype == jnp.int8 else "sqrt8"
    return "bfloat16" if getattr(stored, "dtype", None) == jnp.bfloat16 else _WIDE


def buffer_of(path: Any) -> Any:
    """The buffer that an array is of: the outermost field that holds no state or buffers.

    Keys below it are those of parameters, which may be called anything.
    """
    return _split(path)[0]


def _split(path: Any) -> tuple[Any, Any]:
    """The buffer that an array is of, and the path below it, which is that of a parameter."""
    for index, key in enumerate(path):
        if isinstance(key, jax.tree_util.GetAttrKey) and "state" not in key.name:
            if key.name != "buffers":
                return key.name, path[index + 1 :]
            return getattr((*path, None)[index + 1], "key", None), path[index + 2 :]
    return None, path


def check_names(buffers: Iterable[str], state: Any, params: Tree) -> None:
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=codecs.is_blocks)[0]
    there = {str(buffer_of(path)) for path, _ in leaves}
    unknown = set(buffers) - there
    if unknown and jax.tree.leaves(params):  # a group may be empty
        raise ValueError(
            f"buffers names {', '.join(map(repr, sorted(unknown)))}, but the state has"
            f" {', '.join(sorted(there))}."
        )
