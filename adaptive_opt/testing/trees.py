"""Small trees for the contracts, and how two of them are compared."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.trees import Tree, is_of_keys, path_of
from adaptive_opt.testing.contract import Broken

T = TypeVar("T")
SHAPES = {"b": (3,), "w": (3, 2)}
"""A vector and a matrix: the smallest tree in which tensors differ."""
TOLERANCE = 1e-12
"""In float64, of the largest number of an array: rounding stays below, another formula does not."""


def normal(seed: int, *leading: int, shapes: Any = SHAPES) -> Tree:
    """Standard normal arrays in float64 with the given leading axes."""
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(rng.standard_normal((*leading, *s))) for k, s in shapes.items()}


def avals(tree: Tree) -> list[tuple[str, tuple[int, ...], Any, bool]]:
    """Path, shape, dtype and weak type of every leaf: what decides whether jit compiles anew."""
    return avals_of(jax.eval_shape(lambda: tree))


def avals_of(shapes: Tree) -> list[tuple[str, tuple[int, ...], Any, bool]]:
    """The same of a tree that ``jax.eval_shape`` returned."""
    return [
        (path_of(path), x.shape, x.dtype, x.weak_type)
        for path, x in jax.tree_util.tree_flatten_with_path(shapes)[0]
    ]


def raw(x: Any) -> np.ndarray:
    """The numbers of an array; of random keys, their bits."""
    return np.asarray(jax.random.key_data(x) if is_of_keys(getattr(x, "dtype", None)) else x)


def pairs(actual: Tree, expected: Tree) -> list[tuple[str, Any, Any]]:
    """Path and both leaves of two trees, which must have one structure."""
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        raise Broken(
            f"the tree is {jax.tree.structure(actual)} and not {jax.tree.structure(expected)}"
        )
    leaves = jax.tree_util.tree_flatten_with_path(actual)[0]
    return [
        (path_of(path), a, b)
        for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True)
    ]


def are_close(actual: Tree, expected: Tree) -> bool:
    """Whether :func:`expect_close` is content."""
    try:
        expect_close("", actual, expected)
    except Broken:
        return False
    return True


def expect_close(what: str, actual: Tree, expected: Tree, tolerance: float = TOLERANCE) -> None:
    """Equal numbers to rounding, in units of the largest of an array."""
    for path, a, b in pairs(actual, expected):
        a, b = raw(a), raw(b)
        if a.shape != b.shape:
            raise Broken(f"{what}{at(path)} has the shape {a.shape} and not {b.shape}")
        size = np.max(np.abs(b), initial=0.0, where=np.isfinite(b))
        wrong = ~np.isclose(a, b, rtol=tolerance, atol=tolerance * float(size), equal_nan=True)
        if wrong.any():
            raise Broken(f"{what}{at(path)} is {a[wrong][0]:.9g} and not {b[wrong][0]:.9g}")


def expect_bits(what: str, actual: Tree, expected: Tree) -> None:
    """The same dtypes and bits."""
    for path, a, b in pairs(actual, expected):
        a, b = raw(a), raw(b)
        if (a.shape, a.dtype, a.tobytes()) != (b.shape, b.dtype, b.tobytes()):
            raise Broken(f"{what}{at(path)} is {shown(a)} and not {shown(b)}")


def expect_finite(what: str, tree: Tree) -> None:
    """No NaN and no infinity."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if is_inexact(leaf) and not np.isfinite(leaf).all():
            raise Broken(f"{what}{at(path_of(path))} is {shown(leaf)}")


def at(path: str) -> str:
    """A place in a tree, for a sentence."""
    return f" at {path}" if path else ""


def is_inexact(x: Any) -> bool:
    return bool(jnp.issubdtype(x.dtype, np.inexact))


def shown(x: Any) -> str:
    """An array in a line."""
    return f"{np.asarray(x).dtype} " + " ".join(str(np.asarray(x)).split())


def copies(tree: T) -> T:
    """The same arrays in buffers of their own."""
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
