"""Buffers that were made elsewhere, put together to a state with which an optimizer goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import optax

from adaptive_opt.checkpoints.counting import Counts
from adaptive_opt.checkpoints.filling import Filling, listed
from adaptive_opt.checkpoints.found import Found, found_in
from adaptive_opt.checkpoints.places import over
from adaptive_opt.core.trees import Tree

__all__ = ["listed", "put_together"]

PerParameter = Mapping[str, int] | Callable[[str], int]
"""A number for every parameter, by its path as ``jax.tree_util.keystr`` writes it."""


def put_together(
    target: optax.GradientTransformation,
    params: Tree,
    found: Mapping[str, Tree] | Found,
    count: int | PerParameter | None = None,
    source: optax.GradientTransformation | None = None,
    *,
    drop: Collection[str] = (),
) -> Any:
    """A state of ``target`` with buffers that were made elsewhere.

    Args:
      target: any nest of wrappers around optimizers.
      params: the parameters at this point.
      found: trees like the parameters by the name of the buffer (``mu``, ``nu``, ``velocity``).
        They may have no array (None, ``optax.MaskedNode``) for some parameters.
      count: how many gradients the buffers have seen; for every parameter another, if it is a
        mapping or a function of paths (those of ``jax.tree_util.keystr``): exact where ``target``
        counts them apart, in groups, and refused elsewhere.
      source: an optimizer of this library whose buffers mean what these do; None: they mean what
        those of ``target`` mean.
      drop: buffers that may be lost.

    Raises:
      ValueError: a buffer has no place, is missing, or means something else; all of it at once.
    """
    if not isinstance(found, Found):
        given = Found()
        if source is not None:
            given.meaning = found_in(source, source.init(params), params).meaning
        given.buffers = {name: over(_without_masks(tree)) for name, tree in found.items()}
        given.counts = Counts()
        found = given
    return Filling(target, params, found, count, drop).state()


def _without_masks(tree: Tree) -> Tree:
    return jax.tree.map(
        lambda x: None if isinstance(x, optax.MaskedNode) else x,
        tree,
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),
    )
