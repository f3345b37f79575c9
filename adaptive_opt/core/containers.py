"""Where parameters live: modules of Flax nnx and Equinox, boxes around arrays, plain trees.

Nothing is imported for it. Who has a module of nnx has imported flax, and is found by that.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adaptive_opt.core.trees import Tree, is_none


class Parts(NamedTuple):
    """A model taken apart; ``put_together`` is the way back.

    Attributes:
      trained: what is differentiated and updated, a tree. Of an nnx module its ``nnx.Param``; of
        an Equinox module its arrays of floating point, None elsewhere; any other tree whole.
      carried: the arrays beside: batch statistics, counts, random keys; None of a plain tree.
      known: how the two belong together, with all that is no array. It is hashable.
    """

    trained: Tree
    carried: Tree
    known: Any

    @property
    def is_nnx(self) -> bool:
        """Whether it is a module whose arrays a call may change."""
        return self.known is not None and not isinstance(self.known, _Known)


def nnx() -> Any:
    """The module ``flax.nnx``, if somebody has imported it."""
    return sys.modules.get("flax.nnx")


def is_nnx_optimizer(x: Any) -> bool:
    return nnx() is not None and isinstance(x, nnx().Optimizer)


def is_function(x: Any) -> bool:
    """Whether ``x`` is called for a tree, and is no tree itself: a module can be called too."""
    return callable(x) and not isinstance(x, _module_types())


def is_train_state(x: Any) -> bool:
    """Whether ``x`` is a ``TrainState`` of linen, or made like one."""
    return all(hasattr(x, name) for name in ("params", "opt_state", "tx", "replace"))


def taken_apart(model: Tree, wrt: Any = None) -> Parts:
    """What of a model is trained, what is carried along, and how they belong together.

    Args:
      model: a module of nnx or Equinox, a tree with such modules in it, or a tree of parameters.
      wrt: of an nnx module, which variables are trained; default ``nnx.Param``.
    """
    types, modules = _module_types(), []

    def is_module(x: Any) -> bool:
        found = isinstance(x, types)
        if found:
            modules.append(x)
        return found

    if types:
        jax.tree.leaves(model, is_leaf=is_module)
    if not modules:
        return Parts(model, None, None)
    if nnx() is not None and isinstance(modules[0], nnx().Module):
        known, trained, carried = nnx().split(model, wrt or nnx().Param, ...)
        return Parts(trained, carried, known)
    leaves, structure = jax.tree.flatten(model)
    kinds = [_kind(leaf) for leaf in leaves]

    def those(kind: str) -> list[Any]:
        return [leaf if own == kind else None for leaf, own in zip(leaves, kinds, strict=True)]

    known = _Known(structure, tuple(those("other")))
    return Parts(structure.unflatten(those("trained")), those("carried"), known)


def put_together(parts: Parts) -> Tree:
    """The model again, with other arrays perhaps."""
    trained, carried, known = parts
    if known is None:
        return trained
    if parts.is_nnx:
        return nnx().merge(known, unboxed(trained), unboxed(carried))  # variables of this trace
    leaves = known.structure.flatten_up_to(trained)
    columns = zip(leaves, carried, known.other, strict=True)
    return known.structure.unflatten(
        next((x for x in row if x is not None), None) for row in columns
    )


def trained(tree: Tree) -> Tree:
    """The tree with what of it is trained in place of every module; any other tree itself."""
    types = _module_types()

    def is_module(x: Any) -> bool:
        return isinstance(x, types)

    return jax.tree.map(
        lambda x: taken_apart(x).trained if is_module(x) else x, tree, is_leaf=is_module
    )


def is_box(x: Any) -> bool:
    """Whether ``x`` is a variable of nnx, or a box of linen with the names of an array's axes."""
    meta = sys.modules.get("flax.core.meta")
    return (nnx() is not None and isinstance(x, nnx().Variable)) or (
        meta is not None and isinstance(x, meta.AxisMetadata)
    )


def is_boxed(tree: Tree) -> bool:
    """Whether there is a box anywhere in the tree."""
    return any(map(is_box, jax.tree.leaves(tree, is_leaf=is_box)))


def unboxed(tree: Tree) -> Tree:
    """The tree with the arrays in place of the boxes around them."""
    return jax.tree.map(lambda x: _inside(x) if is_box(x) else x, tree, is_leaf=is_box)


def names_of(tree: Tree) -> list[str]:
    """The path of every leaf, None included, its keys joined by slashes; a box is no key."""
    paths = jax.tree_util.tree_flatten_with_path(unboxed(tree), is_leaf=is_none)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Every leaf that is not None, after its name as in ``names_of``."""
    leaves = jax.tree.leaves(tree, is_leaf=is_none)
    return [(n, x) for n, x in zip(names_of(tree), leaves, strict=True) if x is not None]


def map_named(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """``function(name, leaf)`` for every leaf, None included, with its name as in ``names_of``."""
    leaves, structure = jax.tree.flatten(tree, is_leaf=is_none)
    return structure.unflatten(map(function, names_of(tree), leaves))


class _Known(NamedTuple):
    """Of an Equinox module: its structure, and the leaves that are no arrays."""

    structure: Any
    other: tuple[Any, ...]


def _kind(leaf: Any) -> str:
    if not hasattr(leaf, "dtype"):
        return "other"
    return "trained" if jnp.issubdtype(leaf.dtype, jnp.inexact) else "carried"


def _inside(box: Any) -> Any:
    (child,) = jax.tree.leaves(box, is_leaf=lambda x: x is not box)
    return child


def _module_types() -> tuple[type, ...]:
    homes = (nnx(), sys.modules.get("equinox"))
    return tuple(home.Module for home in homes if home is not None)
