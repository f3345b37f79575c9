"""The leaves of any tree: by path, as a header says them, as bytes, and back from bytes.

A path is what ``jax.tree_util.keystr`` makes of it. Bytes are those of the numbers in C order, the
lowest first. Nothing in here goes by what a file says of itself: how many bytes a leaf has, and
what they are, follows from the leaf that they are to replace.
"""

from __future__ import annotations

import functools
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adaptive_opt.core.describe import shown
from adaptive_opt.core.trees import Tree, dtype_of, is_of_keys

Entry: TypeAlias = list[Any]
"""The shape of a leaf and its dtype by name, as in ``header["leaves"]``."""

NUMBERS = {
    "Python bool": (bool, np.dtype(np.bool_)),
    "Python int": (int, np.dtype(np.int64)),
    "Python float": (float, np.dtype(np.float64)),
    "Python complex": (complex, np.dtype(np.complex128)),
}
"""What Python numbers are called in a header, and what they are stored as."""

FUNCTION, STRING = BY_NAME = ("function ", "string ")
"""Before the name of a function that is a leaf, or a string: of an Equinox module. No bytes."""

ARRAYS = (np.ndarray, np.generic, jax.Array, jax.ShapeDtypeStruct)


class CheckpointMismatch(ValueError):  # noqa: N818 (says what it is)
    """A checkpoint belongs to another optimizer, model, or version; the message names what differs.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import CheckpointMismatch, adam, from_bytes, to_bytes
    >>> data = to_bytes(adam(1e-3), adam(1e-3).init(jnp.zeros(3)))
    >>> try:
    ...     from_bytes(adam(1e-3, b2=0.99), adam(1e-3).init(jnp.zeros(3)), data)
    ... except CheckpointMismatch as error:
    ...     print(error)
    the checkpoint does not fit: b2 of adam was 0.999, is 0.99
    """


class WrongBytesError(ValueError):
    """Bytes that no ``to_bytes`` has returned."""


def leaves_by_path(tree: Tree) -> tuple[dict[str, Any], Callable[[Sequence[Any]], Tree]]:
    """The leaves under their paths, and the way back: a function of new leaves in that order.

    Objects of Flax's nnx are taken apart as nnx does it, so that a variable in two places is one
    leaf; the paths are those of ``nnx.state(object)``. They come back as new objects.
    """
    nnx = sys.modules.get("flax.nnx")  # who has an object of it has imported it

    def is_object(x: Any) -> bool:
        return nnx is not None and isinstance(x, nnx.Pytree)

    outer, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_object)
    objects = [(path, x) for path, x in outer if is_object(x)]
    others = [(path, x) for path, x in outer if not is_object(x)]
    graph, variables = nnx.split([x for _, x in objects]) if nnx and objects else (None, {})
    inner, inner_structure = jax.tree_util.tree_flatten_with_path(variables)
    inside = [(objects[first.key][0] + tuple(rest), x) for (first, *rest), x in inner]

    leaves: dict[str, Any] = {}
    for path, leaf in inside + others:
        where = jax.tree_util.keystr(path) or "."
        if where in leaves:
            raise ValueError(f"two leaves have the path {where}: rename one of them.")
        leaves[where] = leaf

    def rebuilt(new: Sequence[Any]) -> Tree:
        if nnx is None or not objects:
            return structure.unflatten(new)
        arrays = [_for_jax(x) for x in new[: len(inside)]]
        merged = iter(nnx.merge(graph, inner_structure.unflatten(arrays)))
        rest = iter(new[len(inside) :])
        return structure.unflatten([next(merged if is_object(x) else rest) for _, x in outer])

    return leaves, rebuilt


def _for_jax(x: Any) -> Any:
    """An array in a variable of nnx, which users index and set as JAX's."""
    return jnp.asarray(x) if isinstance(x, np.ndarray) and dtype_of(x) == x.dtype else x


def entry_of(path: str, leaf: Any) -> Entry:
    """What a header says of a leaf."""
    for name, (kind, _) in NUMBERS.items():
        if type(leaf) is kind:
            return [[], name]
    if isinstance(leaf, ARRAYS) and not isinstance(leaf, np.ma.MaskedArray):
        if is_of_keys(leaf.dtype):
            return [list(leaf.shape), str(leaf.dtype)]  # key<fry>: with their implementation
        if _is_numeric(leaf.dtype):
            return [list(np.shape(leaf)), leaf.dtype.name]
    elif type(leaf) is str:
        return [[], STRING + repr(leaf)]
    elif (name := _name_of_function(leaf)) is not None:
        return [[], FUNCTION + name]
    kind = type(leaf).__name__ + (f" of {leaf.dtype}" if isinstance(leaf, ARRAYS) else "")
    raise TypeError(
        f"the leaf at {path} is {kind}: only arrays of numbers, PRNG keys, Python's numbers,"
        " strings and functions can be saved. Take it out of the tree (eqx.partition), or make it a"
        " static field of its container."
    )


def _name_of_function(leaf: Any) -> str | None:
    """None for what is no function; an object that can be called has perhaps arrays in it."""
    if isinstance(leaf, functools.partial):
        given = [*leaf.args, *leaf.keywords.values()]
        name = None if any(hasattr(x, "shape") for x in given) else _name_of_function(leaf.func)
        return name and f"{name} with {', '.join(map(shown, given))}"
    return shown(leaf) if callable(leaf) and inspect.isroutine(inspect.unwrap(leaf)) else None


def said(entry: Entry) -> str:
    """An entry as it is printed."""
    shape, name = entry
    return name if name in NUMBERS or name.startswith(BY_NAME) else f"{name}{list(shape)}"


def _is_numeric(dtype: np.dtype) -> bool:
    return dtype == np.bool_ or bool(jnp.issubdtype(dtype, jnp.number))


def are_alike(saved: str, now: str, *, as_jax_takes_it: bool = False) -> bool:
    """Whether a leaf that was one dtype may take the place of one that is another.

    A Python number and the array that JAX makes of one may; else only equals. Headers of format 1
    say all dtypes as JAX takes them (float32 for a float64 of NumPy, unless 64 bits are enabled).
    """
    if as_jax_takes_it and not now.startswith((*BY_NAME, "key<")) and now not in NUMBERS:
        now = dtype_of(np.empty((), now)).name
    return saved == now or _as_array(saved) == _as_array(now)


def _as_array(name: str) -> str:
    return dtype_of(NUMBERS[name][0]()).name if name in NUMBERS else name


# --- as bytes -------------------------------------------------------------------------------------


def stored(path: str, leaf: Any) -> np.ndarray:
    """The bytes of the numbers of a leaf, as they are written."""
    name = entry_of(path, leaf)[1]
    if name.startswith(BY_NAME):
        return np.empty(0, np.uint8)
    if isinstance(leaf, (Tracer, jax.ShapeDtypeStruct)):
        raise TypeError(
            f"the leaf at {path} has a shape and no numbers ({type(leaf).__name__}): save outside"
            " of jit, and what has been calculated."
        )
    if isinstance(leaf, jax.Array):
        if not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            raise TypeError(
                f"the leaf at {path} is split over devices of other processes, of which this one"
                " sees a part: save with Orbax, and checkpoint_header beside (docs/saving.md shows"
                " how)."
            )
        leaf = jax.random.key_data(leaf) if is_of_keys(leaf.dtype) else leaf
    if name in NUMBERS:
        try:
            leaf = np.asarray(leaf, NUMBERS[name][1])
        except OverflowError:
            raise TypeError(f"the Python int at {path} has more than 64 bits.") from None
    array = np.asarray(leaf)
    return np.ascontiguousarray(array, _in_file(array.dtype)).reshape(-1).view(np.uint8)


def _in_file(dtype: np.dtype) -> np.dtype:
    return dtype.newbyteorder("<") if dtype.kind in "iufc" else dtype


def form_of(saved: Entry, target: Any) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the numbers of a leaf that fits in the place of ``target``."""
    name = saved[1]
    if name.startswith(BY_NAME):
        return (0,), np.dtype(np.uint8)
    if name in NUMBERS:
        return (), NUMBERS[name][1]
    if not isinstance(target, ARRAYS):
        return (), dtype_of(target)
    if is_of_keys(target.dtype):
        data = _of_keys(target.dtype)[1]
        return (*target.shape, *data.shape), data.dtype
    return np.shape(target), np.dtype(target.dtype)


def size_of(saved: Entry, target: Any) -> int:
    """The number of bytes of such a leaf."""
    shape, dtype = form_of(saved, target)
    return math.prod(shape) * dtype.itemsize


def restored(path: str, raw: memoryview, saved: Entry, target: Any) -> Any:
    """The leaf of so many bytes: a NumPy array, a Python number, or PRNG keys."""
    if saved[1].startswith(BY_NAME):
        return target
    shape, dtype = form_of(saved, target)
    array = np.empty(shape, _in_file(dtype))
    as_bytes = array.reshape(-1).view(np.uint8)
    as_bytes[:] = raw
    if dtype == np.bool_ and (as_bytes > 1).any():
        raise WrongBytesError(f"the bytes of {path} are no bools")
    array = array.astype(dtype, copy=False)
    return fitted(path, array.item() if saved[1] in NUMBERS else array, target)


def fitted(path: str, value: Any, target: Any) -> Any:
    """A number or an array of a fitting dtype, in the form in which ``target`` has it."""
    if isinstance(target, ARRAYS):
        if is_of_keys(target.dtype):
            return jax.random.wrap_key_data(jnp.asarray(value), impl=_of_keys(target.dtype)[0])
        dtype = np.dtype(target.dtype)
        if type(value) is int and not np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            raise CheckpointMismatch(
                f"the checkpoint does not fit: {path} was {value}, which is no {dtype.name}"
            )
        value = np.asarray(value).astype(dtype, copy=False)
    return value[()] if isinstance(target, np.generic) else value


@functools.lru_cache
def _of_keys(dtype: Any) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The implementation of PRNG keys, and what one is as numbers."""
    found = []

    def look(key: jax.Array) -> jax.Array:
        found.append(jax.random.key_impl(key))
        return jax.random.key_data(key)

    data = jax.eval_shape(look, jax.ShapeDtypeStruct((), dtype))
    return found[0], data
