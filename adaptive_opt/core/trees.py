"""What holds for the leaves of every tree, written once.

* Width: arithmetic is done in float32 at least; float64 and complex stay what they are.
* Buffers keep the dtype they were created with; an update leaves in the dtype it was promised.
* None: a leaf without a gradient (None) is left alone, and so are its buffers.
* Errors name the leaf by its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.typing import DTypeLike

from adaptive_opt.core import finite

Tree: TypeAlias = Any
"""A pytree like the parameters."""


def is_none(x: Any) -> bool:
    return x is None


def axes_of(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes as a tuple, however they were given."""
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name or ())


def axes_split(x: Any, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the mesh axes over which ``x`` is split, so that each device has a part of it.

    Inside ``shard_map`` the type of an array says so. Where JAX does not keep track of it
    (``check_vma=False``, ``pmap``, ``vmap``), even the index along an axis has a type that does not
    vary over it; there everything counts as split.
    """
    tracked = (axis for axis in axes if axis in varying(jax.lax.axis_index(axis)))
    same_everywhere = set(tracked) - varying(x)
    return tuple(axis for axis in axes if axis not in same_everywhere)


def branch(condition: Any, then: Callable[..., Any], other: Callable[..., Any], *args: Any) -> Any:
    """``lax.cond``; Python's ``if`` where the condition is known, outside of ``jit``.

    There ``lax.cond`` would be compiled anew at every step, for its branches are new functions.
    """
    if isinstance(condition, Tracer):
        return jax.lax.cond(condition, then, other, *args)
    return then(*args) if condition else other(*args)


def varying(x: Any) -> frozenset[str]:
    """The manual mesh axes over which an array varies, where JAX keeps track of it."""
    manual = getattr(jax.typeof(x), "manual_axis_type", None)
    return frozenset() if manual is None else frozenset(manual.varying)


def varying_like(x: jax.Array, others: Iterable[Any]) -> jax.Array:
    """``x`` with the type of what varies over the manual axes over which any of the others does."""
    axes = frozenset().union(*map(varying, others)) - varying(x)
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def downhill(gradients: Tree) -> Tree:
    """What ``jax.grad`` returned as optimizers take it: conjugated where it is complex.

    The derivative by a complex parameter is the conjugate of the direction of steepest ascent.
    """
    return map_none(lambda g: g.conj() if jnp.iscomplexobj(g) else g, gradients)


def dtype_of(x: Any) -> np.dtype:
    """The dtype of an array, a ShapeDtypeStruct or a Python scalar.

    That of typed PRNG keys is JAX's own, ``key<fry>``, of which NumPy knows nothing.
    """
    dtype: Any = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if is_of_keys(dtype):
        return dtype
    return np.dtype(jax.dtypes.canonicalize_dtype(dtype))  # float32 for a float64 NumPy array


def is_of_keys(dtype: Any) -> bool:
    """Whether a dtype is that of typed PRNG keys."""
    return not isinstance(dtype, np.dtype) and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def wide(dtype: DTypeLike) -> np.dtype:
    """The dtype in which we calculate with ``dtype``: itself, but float32 for anything narrower."""
    if is_of_keys(dtype) or not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"a leaf of dtype {dtype} cannot be optimized: gradients and parameters must be"
            " floating point or complex. Freeze it (None, optax.masked or optax.partition) or cast"
            " it."
        )
    dtype = np.dtype(dtype)
    return np.dtype(np.float32) if jnp.finfo(dtype).bits < 32 else dtype


def real(dtype: DTypeLike) -> np.dtype:
    """The dtype of the absolute value of a ``dtype``."""
    return np.dtype(jnp.finfo(dtype).dtype)


def widest(tree: Tree) -> np.dtype:
    """The real dtype in which a number about all leaves is calculated: float32 at least."""
    widths = (real(wide(dtype_of(x))) for x in jax.tree.leaves(tree))
    return max(widths, key=lambda d: d.itemsize, default=np.dtype(np.float32))


def real_part(x: jax.Array) -> jax.Array:
    return x.real if jnp.iscomplexobj(x) else x


def with_both_parts(dtype: DTypeLike) -> np.dtype:
    """The complex dtype that holds real and imaginary parts of a real ``dtype``."""
    return np.dtype(np.complex128 if real(dtype) == np.float64 else np.complex64)


def buffer_dtype(asked: DTypeLike, own: np.dtype) -> np.dtype:
    """The asked-for dtype of a buffer; complex where the buffer itself (``own``) is complex."""
    if isinstance(asked, (jax.Array, np.ndarray)):
        raise TypeError(
            f"a buffer's dtype arrived as an array of {asked.dtype}: optax.inject_hyperparams takes"
            " jnp.bfloat16 for a schedule. Name the argument in its static_args, or give"
            " jnp.dtype(...)."
        )
    asked = np.dtype(asked)
    if not jnp.issubdtype(asked, jnp.floating):
        raise ValueError(f"a buffer's dtype must be floating point, got {asked}.")
    if jnp.issubdtype(own, jnp.complexfloating):
        return with_both_parts(asked)
    return asked


def kept_dtype(x: Any, asked: DTypeLike | None) -> np.dtype:
    """The dtype in which a wrapper keeps what is like ``x``: as asked for, else its own, wide."""
    own = wide(dtype_of(x))
    return own if asked is None else buffer_dtype(asked, own)


def copied(x: jax.Array, before: jax.Array) -> jax.Array:
    """``x``, bit for bit (but for the bits of a NaN), for a buffer that had ``before`` in it.

    A plain copy on the CPU, where every output has a loop of its own. On accelerators one loop
    writes all outputs, but XLA would leave a plain copy apart, and read ``x`` once more; that
    ``before`` takes part shows it that the new value may take the old one's place.
    """
    if jax.typeof(x) != jax.typeof(before):  # it could not: another dtype, or split otherwise
        return jnp.copy(x)
    return jax.lax.platform_dependent(x, before, cpu=_copy, default=calculated)


def _copy(x: jax.Array, before: jax.Array) -> jax.Array:
    del before
    return jnp.copy(x)


def calculated(x: jax.Array, other: jax.Array) -> jax.Array:
    """``x`` in a form that XLA does not take for a copy, because it may not be a number."""
    return jnp.where(x == x, x, x + other)


def map_leaves(function: Callable[..., Any], where: Tree, *trees: Tree, **scalars: Any) -> Tree:
    """``function(*leaves, **scalars)`` for every leaf of ``where`` that is not None.

    Positional arguments are trees like ``where``; keyword arguments are scalars, the same for every
    leaf. All are brought to one width, float32 at least, before ``function`` sees them. Python
    numbers stay Python numbers, so that ``1 - b`` is rounded once.
    """
    present, structure = jax.tree.flatten(where, is_leaf=is_none)
    columns = [leaves_like(structure, tree) for tree in trees]

    def of_leaf(index: int, arrays: Any) -> Any:
        if not all(map(is_array, arrays)):
            raise ValueError(
                f"there is a gradient at {path_at(where, index)}, but the state or the parameters"
                " hold no array there. Initialise the optimizer with the parameters it is to"
                " update."
            )
        if len({jnp.shape(a) for a in arrays} - {()}) > 1:
            raise ValueError(
                f"gradient, parameter and state at {path_at(where, index)} differ in shape:"
                f" {', '.join(str(jnp.shape(a)) for a in arrays)}. A state belongs to the"
                " parameters it was initialised with; initialise a new one."
            )
        width = max((real(wide(dtype_of(a))) for a in arrays), key=lambda d: d.itemsize)
        cast = {name: scalar_at(value, width) for name, value in scalars.items()}
        return function(*(at_width(a, width) for a in arrays), **cast)

    rows = enumerate(zip(present, *columns, strict=True))
    with jax.numpy_dtype_promotion("standard"):  # widths are our matter
        results = [None if leaf is None else of_leaf(i, arrays) for i, (leaf, *arrays) in rows]
    return structure.unflatten(results)


def keep_dtype(old: Tree, new: Tree, what: str) -> Tree:
    """``new`` in the dtypes of ``old``; where ``new`` is None, ``old`` stays."""

    def keep(path: Any, new_leaf: Any, old_leaf: Any) -> Any:
        if new_leaf is None:
            return old_leaf
        if jnp.shape(new_leaf) != jnp.shape(old_leaf):
            raise ValueError(
                f"{what} at {jax.tree_util.keystr(path) or 'the only leaf'} has shape"
                f" {jnp.shape(old_leaf)}, but the gradient calls for {jnp.shape(new_leaf)}. A state"
                " belongs to the parameters it was initialised with; initialise a new one."
            )
        if jnp.iscomplexobj(new_leaf) and not jnp.issubdtype(
            dtype_of(old_leaf), np.complexfloating
        ):
            raise TypeError(
                f"{what} at {jax.tree_util.keystr(path) or 'the only leaf'} is real, but the"
                f" gradient makes it {dtype_of(new_leaf)}; the gradient of a real parameter"
                " is real. Take its real part, or initialise with complex parameters."
            )
        return finite.narrowed(new_leaf, dtype_of(old_leaf))

    return jax.tree_util.tree_map_with_path(keep, new, old, is_leaf=is_none)


def update_dtype(update: Any, param: Any) -> np.dtype:
    """The dtype in which the update of one leaf leaves."""
    own = dtype_of(update)
    if param is None or own == (other := dtype_of(param)):
        return own
    for dtype in filter(is_of_keys, (own, other)):
        wide(dtype)  # says why not
    with jax.numpy_dtype_promotion("standard"):
        return np.dtype(jnp.promote_types(own, other))


def update_dtypes(updates: Tree, params: Tree | None) -> Tree:
    """The dtype each update leaves in: promote(gradient, parameter), or the gradient's."""
    if params is None:
        return jax.tree.map(dtype_of, updates)
    leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
    same = jax.tree.leaves(params, is_leaf=is_none)
    if jax.tree.structure(params, is_leaf=is_none) != structure and len(same) == len(leaves):
        params = structure.unflatten(same)  # another container, a FrozenDict for a dict, say
    return map_none(update_dtype, updates, params)


def map_none(function: Callable[..., Any], tree: Tree, *rest: Tree) -> Tree:
    """``jax.tree.map`` that leaves None alone, whatever stands at its place in ``rest``."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    columns = [leaves_like(structure, other) for other in rest]
    pairs = zip(leaves, *columns, strict=True)
    return structure.unflatten([None if row[0] is None else function(*row) for row in pairs])


def leaves_like(structure: Any, tree: Tree) -> list[Any]:
    try:
        return structure.flatten_up_to(tree)
    except ValueError:
        raise ValueError(
            "gradients, parameters and state must be trees of one structure, but differ at"
            f" {_first_difference(structure, tree)}. A state belongs to the parameters it was"
            " initialised with."
        ) from None


def _first_difference(structure: Any, tree: Tree) -> str:
    """The first path that is in one tree and not in the other."""

    def paths(tree: Tree) -> set[str]:
        with_paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_stands_for_a_leaf)[0]
        return {jax.tree_util.keystr(path) for path, _ in with_paths}

    mine, other = paths(structure.unflatten([0] * structure.num_leaves)), paths(tree)
    only = sorted(mine - other) or sorted(other - mine)
    if not only:
        return f"the type of a container: {structure} and {jax.tree.structure(tree)}"
    where = "the gradients" if mine - other else "the other"
    return f"{only[0] or 'the root'}, which only {where} has"


def _stands_for_a_leaf(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def path_at(tree: Tree, index: int) -> str:
    """Where a leaf is, by its number; None counts as one."""
    paths = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    return jax.tree_util.keystr(paths[index][0]) or "the only leaf"


def is_array(x: Any) -> bool:
    return hasattr(x, "dtype") or isinstance(x, (int, float, complex))


def at_width_of(dtype: np.dtype, width: np.dtype) -> np.dtype:
    """The dtype ``width``, or its complex counterpart where ``dtype`` is complex."""
    return with_both_parts(width) if jnp.issubdtype(dtype, jnp.complexfloating) else width


def at_width(x: Any, width: np.dtype) -> jax.Array:
    """``x`` in the dtype ``width``, or in its complex counterpart."""
    dtype = at_width_of(dtype_of(x), width)
    return x if hasattr(x, "dtype") and x.dtype == dtype else jnp.asarray(x, dtype=dtype)


def scalar_at(value: Any, width: np.dtype) -> Any:
    """A scalar in a width; a Python number stays one, so that ``1 - b`` is rounded once."""
    return value if type(value) in (int, float) else jnp.asarray(value).astype(width)


def times(x: Any, *, by: Any) -> jax.Array:
    """``by * x``, of a scalar; in a trace, where it is a number, without what jnp has to ask."""
    plain = type(by) is float and isinstance(x, Tracer) and jnp.issubdtype(x.dtype, jnp.inexact)
    return jax.lax.mul(x, x.dtype.type(by)) if plain else by * x


def path_of(path: Any) -> str:
    """A key path as in the patterns: keys joined by slashes.

    Without the last ``value``, if that is the attribute in which nnx keeps a variable's array.
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value") and len(path) > 1:
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")
