"""Many small parameters in a few flat buffers, where they stay between steps.

With thousands of small leaves a step is neither arithmetic nor memory traffic but the starting of
kernels, and compiling takes minutes. The optimizer does not care how weights are cut into arrays if
it treats each by itself. So the parameters themselves live packed; the loss unpacks them, and their
gradients arrive packed. Packing in every step would cost what it saves.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.core.checks import check_whole
from adaptive_opt.core.containers import (
    is_boxed,
    is_function,
    is_nnx_optimizer,
    named_leaves,
    trained,
    unboxed,
)
from adaptive_opt.core.describe import Description, check_order, describe, shown
from adaptive_opt.core.reach import reach
from adaptive_opt.core.trees import Tree, dtype_of, is_of_keys
from adaptive_opt.wrappers.groups import ParameterGroups

PAD = 1024
"""Buffers are a multiple of so many numbers long: an odd length loses vector instructions."""

_MADE_BY = "_adaptive_opt_packing"


class Packing:
    """Which leaves of a tree of parameters share a buffer, and the way there and back.

    Leaves share a buffer if they have the same dtype, at most ``max_size`` elements, and the same
    value in every tree of ``split_by``; larger leaves, those split over devices, PRNG keys, and
    those with no fellow stay as they are. Leaves of the same values in ``split_by`` get two arrays
    at least, so that an update is the same as without packing, bit for bit. A packed tree is a dict
    from paths to arrays; a buffer has the path of its first leaf, so that tables of path patterns
    (``ParameterGroups``) go on working, and is padded with zeros to a multiple of 1024.
    ``low_memory`` has no place in it: its blocks would cross leaves, and which arrays it finds
    small, and how it rounds, would be another.

    Args:
      params: the parameters, arrays, numbers or ``jax.ShapeDtypeStruct``; no single array. A module
        of nnx or Equinox stands for what of it is trained: ``nnx.state(model, nnx.Param)``,
        ``eqx.filter(model, eqx.is_inexact_array)``. Unpacked, they are that, for ``nnx.merge`` or
        ``eqx.combine`` in the loss.
      split_by: masks and labels, as functions of the parameters or trees like them, by which leaves
        must be kept apart: the ``mask=`` of weight decay, ``groups.labels``.
      max_size: of a leaf that is packed, in elements; default 65,536.

    ::

        packing = Packing(params, split_by=[decay_mask])
        optimizer = packing.optimizer(adamw(1e-3, mask=packing.mask(decay_mask)))
        params = packing.pack(params)
        state = optimizer.init(params)
        step = train_step(lambda params, batch: loss(packing.unpack(params), batch), optimizer)
        params, state, value = step(params, state, batch)
        data = to_bytes(optimizer, packing.unpack((params, state)))  # as if never packed

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import Packing
    >>> params = {"a": jnp.ones((2, 3)), "b": jnp.zeros(5), "c": jnp.ones((300, 300))}
    >>> packing = Packing(params)
    >>> {path: x.shape for path, x in packing.pack(params).items()}
    {'a': (1024,), 'c': (300, 300)}
    >>> packing.unpack(packing.pack(params))["b"].shape
    (5,)
    """

    def __init__(
        self,
        params: Tree,
        *,
        split_by: Sequence[Tree | Callable[[Tree], Tree]] = (),
        max_size: int = 1 << 16,
    ) -> None:
        check_whole(1, max_size=max_size)
        params = trained(params)
        given, self._structure = jax.tree.flatten(params)
        if self._structure == jax.tree.structure(0):
            raise ValueError("a single array needs no packing: give a tree of parameters.")
        self._bare = jax.tree.structure(unboxed(params))
        self._paths = [name for name, _ in named_leaves(params)]
        if len(set(self._paths)) < len(self._paths):
            raise ValueError("two parameters have the same path: rename one of them.")
        self._params = jax.tree.map(
            lambda p: jax.ShapeDtypeStruct(np.shape(p), dtype_of(p)), params
        )
        leaves = jax.tree.leaves(self._params)
        self._shapes = [leaf.shape for leaf in leaves]
        kinds = [self._leaves(tree(params) if is_function(tree) else tree) for tree in split_by]
        shared: dict[Any, list[int]] = {}
        for i, (leaf, array) in enumerate(zip(leaves, given, strict=True)):
            packed = leaf.size <= max_size and not _is_split(array) and not is_of_keys(leaf.dtype)
            key = leaf.dtype, tuple(kind[i] for kind in kinds), None if packed else i
            shared.setdefault(key, []).append(i)
        of_kind = collections.Counter(kind for _, kind, _ in shared)
        buffers = []
        for (_, kind, _), members in shared.items():
            # Two, because XLA calculates m / c as m (1 / c) where c divides a single array only.
            cut = len(members) // 2 if of_kind[kind] == 1 else 0
            buffers += [part for part in (members[:cut], members[cut:]) if part]
        self._members = {self._paths[members[0]]: members for members in buffers}

    # --- trees --------------------------------------------------------------------------------

    def pack(self, tree: Tree) -> Tree:
        """The same with every tree like the parameters packed: parameters, gradients, a state.

        A scalar or a placeholder (``None``, ``optax.MaskedNode``) that stands for each leaf of a
        buffer is kept once. Leaves that are not packed are the same arrays: donate one tree or
        the other. What has nothing but ``None`` or ``optax.EmptyState`` is left as it is.

        Modules stand for what of them is trained, an ``nnx.Optimizer`` for its state.

        ValueError for a buffer of which some leaves are there and some are not, or whose leaves
        differ in dtype.
        """
        tree = jax.tree.map(
            lambda x: x.opt_state if is_nnx_optimizer(x) else x, tree, is_leaf=is_nnx_optimizer
        )
        tree = unboxed(trained(tree))

        def pack(leaves: list[Any]) -> dict[str, Any]:
            return {path: self._joined(path, leaves) for path in self._members}

        return _replaced(tree, self._leaves_if_like_params, pack)

    def unpack(self, tree: Tree) -> Tree:
        """The same with every packed tree as the ordinary one; the inverse of ``pack``.

        In the loss: its derivative concatenates, so that gradients arrive packed.
        """

        def unpack(packed: Mapping[str, Any]) -> Tree:
            leaves: list[Any] = [None] * len(self._paths)
            for path, members in self._members.items():
                parts = self._parts(packed[path], members)
                for i, part in zip(members, parts, strict=True):
                    leaves[i] = part
            return jax.tree.unflatten(self._structure, leaves)

        return _replaced(tree, self._if_packed, unpack)

    def mask(self, mask: Tree | Callable[[Tree], Tree]) -> Callable[[Tree], Tree]:
        """A mask, or labels, of the parameters as a function that optimizers of packed trees take.

        ValueError where leaves of one buffer differ: name the mask in ``split_by``.

        Args:
          mask: a function of the parameters (it is given their shapes) or a tree like them.
        """
        values = self._leaves(mask(self._params) if is_function(mask) else mask)
        packed = {}
        for path, members in self._members.items():
            packed[path] = values[members[0]]
            for i in members:
                if values[i] != packed[path]:
                    name = shown(mask) if is_function(mask) else "the mask"
                    raise ValueError(
                        f"{path} and {self._paths[i]} share a buffer, but {name} says"
                        f" {packed[path]!r} and {values[i]!r}: give it in"
                        " Packing(params, split_by=[...])."
                    )

        def of_packed(tree: Tree) -> Tree:
            try:
                self._bare.flatten_up_to(unboxed(tree))
            except (ValueError, TypeError, KeyError):
                return dict(packed)
            structure = self._structure if is_boxed(tree) else self._bare
            return jax.tree.unflatten(structure, values)  # of ordinary parameters

        if is_function(mask):
            of_packed = functools.wraps(mask)(of_packed)
        setattr(of_packed, _MADE_BY, self)
        return of_packed

    def optimizer(
        self, inner: optax.GradientTransformation, *, elementwise: bool = False
    ) -> optax.GradientTransformationExtraArgs:
        """``inner``, if it may be used on packed parameters; unchanged.

        Args:
          inner: an optimizer that treats every weight by itself, or takes sums over all of them
            to which the padding of buffers adds nothing. That is read off its operations: on
            ordinary and on packed parameters they must calculate the same.
          elementwise: your word for it, for all other transformations, and for masks that are right
            for packed trees. Nothing is checked then.

        ValueError for what is not known to be such, for ``low_memory``, for ``master_weights``,
        which goes around, for conditions that look at extra arguments, and for masks and labels (of
        weight decay, ``optax.masked``, ``optax.partition``) that ``mask`` of this packing has not
        made; except those of ``ParameterGroups``, if they are the same for all leaves of a buffer.
        """
        if not elementwise:
            check_order(inner)
            for part in describe(inner).walk():
                self._check_part(part)
            self._check_reach(inner)
        return optax.with_extra_args_support(inner)

    def _check_reach(self, inner: optax.GradientTransformation) -> None:
        packed = self.pack(self._params)
        members = [self._members[path] for path, _ in named_leaves(packed)]
        found = reach(inner, self._params, packed, members)
        if any(part.name == "master_weights" for part in describe(inner).walk()):
            raise ValueError(
                "master_weights rounds by the positions of weights, which in buffers are not those"
                " in the parameters: put it around, master_weights(packing.optimizer(adam(1e-3))),"
                " and give it the packed parameters."
            )
        if found.has_exceptions:
            raise ValueError(
                "low_memory goes by the size of arrays and cuts them into blocks, which in buffers"
                " are not those of the parameters: use it or Packing, not both. If blocks may cross"
                " parameters, and checkpoints differ from those of ordinary runs, say"
                " packing.optimizer(inner, elementwise=True)."
            )
        if not found.is_cut_freely:
            operation = f" ({found.operation})" if found.place else ""
            raise ValueError(
                f"{found.place or found.operation} is not known to treat every weight by"
                f" itself{operation}. If it does, say packing.optimizer(inner, elementwise=True);"
                " if it looks at shapes, norms of single tensors or paths, its parameters cannot"
                " be packed."
            )

    def _check_part(self, part: Description) -> None:
        if part.settings.get("forward_extra_args"):
            raise ValueError(
                f"{part.name} has a condition that looks at extra arguments, which may be packed."
                " If it is right for them, say packing.optimizer(inner, elementwise=True)."
            )
        for labels in (part.settings.get("mask"), part.labels):
            if labels is None or getattr(labels, _MADE_BY, None) is self:
                continue
            if not is_function(labels) and jax.tree.structure(labels) == jax.tree.structure(0):
                continue  # one for all
            groups = getattr(labels, "__self__", None)
            if not isinstance(groups, ParameterGroups):
                raise ValueError(
                    f"{part.name} has a mask for ordinary parameters, or labels: give it"
                    " packing.mask(mask) in place of mask, and Packing(params, split_by=[mask])."
                )
            self.mask(groups.labels)  # an error for parameters of no group, which packing hides

    # --- one tree -----------------------------------------------------------------------------

    def _leaves(self, tree: Tree) -> list[Any]:
        try:
            return self._bare.flatten_up_to(unboxed(tree))
        except ValueError as error:
            raise ValueError(f"this is not a tree like the parameters: {error}") from None

    def _leaves_if_like_params(self, tree: Tree) -> list[Any] | None:
        if isinstance(tree, jax.Array | np.ndarray | jax.ShapeDtypeStruct):
            return None
        try:
            leaves = self._bare.flatten_up_to(tree)
        except (ValueError, TypeError, KeyError):
            return None
        like = zip(leaves, self._shapes, strict=True)
        fits = all(not hasattr(x, "shape") or x.shape in ((), shape) for x, shape in like)
        stand = all(x is None or _is_array(x) or isinstance(x, optax.MaskedNode) for x in leaves)
        return leaves if fits and stand and any(x is not None for x in leaves) else None

    def _if_packed(self, tree: Tree) -> Mapping[str, Any] | None:
        return tree if isinstance(tree, dict) and tree.keys() == self._members.keys() else None

    def _joined(self, path: str, all_leaves: list[Any]) -> Any:
        members = self._members[path]
        leaves = [all_leaves[i] for i in members]
        if len(leaves) == 1:
            return leaves[0]
        if len({_is_array(x) for x in leaves}) > 1:
            raise ValueError(
                f"of the leaves that share a buffer with {path} some have an array and some have"
                " none: keep them apart with Packing(params, split_by=[...])."
            )
        if not _is_array(leaves[0]):
            return leaves[0]
        leaves = [x if hasattr(x, "shape") else jnp.asarray(x) for x in leaves]
        first, shapes = leaves[0], [self._shapes[i] for i in members]
        for i, x in zip(members, leaves, strict=True):
            if dtype_of(x) != dtype_of(first):
                raise ValueError(
                    f"{path} and {self._paths[i]} share a buffer, but are {dtype_of(first)} and"
                    f" {dtype_of(x)} here: give them the same dtype, or keep them apart with"
                    " Packing(params, split_by=[...])."
                )
        if any(x.shape != shape for x, shape in zip(leaves, shapes, strict=True)):
            if any(x.shape for x in leaves):
                raise ValueError(
                    f"of the leaves that share a buffer with {path} some are scalars and some are"
                    " whole: keep them apart with Packing(params, split_by=[...])."
                )
            return first
        if isinstance(first, jax.ShapeDtypeStruct):
            return jax.ShapeDtypeStruct((self._length(path),), first.dtype)
        if any(isinstance(x, Tracer) for x in leaves):
            flat = [x.reshape(-1) for x in leaves]
            size = sum(x.size for x in flat)
            return jnp.concatenate([*flat, jnp.zeros(-size % PAD, first.dtype)])
        whole = np.zeros(self._length(path), first.dtype)
        np.concatenate([np.asarray(x).ravel() for x in leaves], out=whole[: self._total(path)])
        return jax.device_put(whole, _sharding(first))

    def _parts(self, value: Any, members: list[int]) -> Iterable[Any]:
        shape, first = getattr(value, "shape", None), self._paths[members[0]]
        if len(members) == 1 or (_is_leaf(value) and not shape):
            return [value] * len(members)
        if shape != (self._length(first),):
            raise ValueError(
                f"what stands for {first} and others, {type(value).__name__} of shape {shape}, is"
                " not a packed array: states in blocks of 8 bits stay packed."
            )
        shapes = [self._shapes[i] for i in members]
        sizes = [int(np.prod(shape)) for shape in shapes]
        if isinstance(value, jax.ShapeDtypeStruct):
            return [jax.ShapeDtypeStruct(shape, value.dtype) for shape in shapes]
        if isinstance(value, Tracer):
            # Its derivative is one too: the packed gradient is made once, not in every loop.
            value = jax.lax.optimization_barrier(value)
            parts = jax.lax.split(value, (*sizes, value.size - sum(sizes)))
            return [x.reshape(shape) for x, shape in zip(parts, shapes, strict=False)]
        parts = np.split(np.asarray(value), np.cumsum(sizes))
        parts = [x.reshape(shape) for x, shape in zip(parts, shapes, strict=False)]
        return jax.device_put(parts, _sharding(value))

    def _total(self, path: str) -> int:
        return sum(int(np.prod(self._shapes[i])) for i in self._members[path])

    def _length(self, path: str) -> int:
        return self._total(path) + -self._total(path) % PAD


def _replaced(tree: Tree, found: Callable[[Any], Any], new: Callable[[Any], Any]) -> Tree:
    """The tree with every subtree for which ``found`` returns something replaced by ``new`` of it.

    The outermost first; what is no container is left alone.
    """
    return jax.tree.map(
        lambda x: x if (hit := found(x)) is None else new(hit),
        tree,
        is_leaf=lambda x: found(x) is not None,
    )


def _is_leaf(x: Any) -> bool:
    """An array, a scalar, or what stands where there is none."""
    return not jax.tree.leaves(x) or jax.tree.structure(x) == jax.tree.structure(0)


def _is_array(x: Any) -> bool:
    return hasattr(x, "shape") or isinstance(x, int | float | complex)


def _is_split(x: Any) -> bool:
    """Whether devices have different parts of an array."""
    sharding = None if isinstance(x, Tracer) else getattr(x, "sharding", None)
    return sharding is not None and not sharding.is_fully_replicated


def _sharding(x: Any) -> Any:
    """Where a replicated array is, for one of another rank."""
    sharding = getattr(x, "sharding", None)
    if isinstance(sharding, jax.NamedSharding):
        return jax.NamedSharding(sharding.mesh, jax.P())
    return sharding
