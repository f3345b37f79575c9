"""ZeRO-1: parameters on every device, optimizer state split among them."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from adaptive_opt.core.checks import choose
from adaptive_opt.core.describe import transformation
from adaptive_opt.core.reach import reach
from adaptive_opt.core.trees import Tree, axes_of, axes_split, dtype_of, map_none
from adaptive_opt.sharding.state import SplitOverAxis, is_placeholder

UNIT = 128
"""Leaves are padded to a multiple of it, whatever the number of devices, if that divides it."""


def zero1(
    inner: optax.GradientTransformation,
    mesh: Mesh,
    axis: str | tuple[str, ...] = "data",
    *,
    gradients: str = "mean",
    elementwise: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Splits the optimizer state over the data-parallel devices; parameters stay replicated.

    ZeRO stage 1 (Rajbhandari et al. 2020, arXiv:1910.02054, P_os) in one line, around any
    elementwise optax transformation: ``optimizer = zero1(adamw(1e-3), mesh)``. Each device keeps
    and updates one n-th of every buffer, and the updates are gathered. The numbers are those of
    ``inner``: the same bits for the same gradients, but for what XLA does by the size of an array
    (on CPUs, whether ``a * b + c`` is rounded once or twice).

    Every leaf is split, whatever its shape: it is flattened, padded with zeros to a multiple of
    128, and of the shape ``(1, ..., 1, padded size)`` with the rank it had, so that masks by path
    and by rank mean the same. Scalars are not split. So the state has the same shapes on 1, 2, 4
    ... 128 devices, and a checkpoint goes from one number to another as it is. On n devices where n
    does not divide 128 the padded size is a multiple of n too; then the last dimension is cut or
    padded with zeros (in Orbax: ``StandardRestore(state, strict=False)``).

    Under ``jit``, gradients and parameters are global arrays; constraints make XLA slice the
    gradient and gather the updates. Under ``shard_map`` (or ``pmap``) over ``axis``, ``update``
    reduces the gradients itself, and there is a reduce-scatter and an all-gather instead of an
    all-reduce: give the gradients of each device's own batch. With ``check_vma=True``, ``jax.grad``
    with respect to replicated parameters all-reduces; take it at
    ``jax.lax.pcast(params, axis, to="varying")``. The state's specs are
    ``state_shardings(optimizer, params, PartitionSpec())``.

    Args:
      inner: elementwise: the update of a weight depends on its own gradients, on its own values and
        on the count only. ``init`` reads that off its operations, whatever it is made of;
        ``low_memory``, whose blocks go by positions, counts as elementwise. What needs a whole
        tensor or tree goes in front, under ``shard_map`` once the gradients are reduced.
      mesh: the mesh of the parameters.
      axis: the axis, or axes, of the mesh among whose devices the state is split.
      gradients: what arrives under ``shard_map``: "mean" or "sum": each device's own gradient, to
        be averaged or added up; "reduced": the same on all. Gradients that ``check_vma=True`` knows
        to be the same on all devices count as reduced.
      elementwise: your word that ``inner`` is, where its operations do not show it. Nothing is
        checked then.

    State: that of ``inner`` with split buffers. ValueError for an axis that the mesh does not have;
    at ``init``, for an ``inner`` that is not known to be elementwise, and for parameters that are
    sharded (their state is sharded as they are, see ``init_sharded``).

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, zero1
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> optimizer, x = zero1(adam(0.5), mesh), jnp.zeros((4, 2))
    >>> state = optimizer.init(x)
    >>> state[0].mu.shape, tuple(state[0].mu.sharding.spec)
    ((1, 128), (None, 'data'))
    >>> update, state = jax.jit(optimizer.update)(jnp.ones((4, 2)), state, x)
    >>> print(update[0].round(4))
    [-0.5 -0.5]
    """
    axes = axes_of(axis)
    missing = [name for name in axes if name not in mesh.axis_names]
    if missing or not axes:
        raise ValueError(
            f"axis must name axes of the mesh, {mesh.axis_names}, got {axis!r}: give the one that"
            " the batch is split over."
        )
    choose("gradients", gradients, {"mean": 0, "sum": 0, "reduced": 0})
    inner = optax.with_extra_args_support(inner)
    n = math.prod(mesh.shape[name] for name in axes)
    unit = math.lcm(n, UNIT)
    mark = SplitOverAxis(mesh, axis)

    def flat(x: Any) -> jax.Array:
        """The whole leaf, padded, in one row; of the rank it had."""
        x = jnp.asarray(x)
        row = jnp.pad(x.reshape(-1), (0, -x.size % unit)) if x.ndim else x
        return row.reshape(*[1] * (x.ndim - 1), *row.shape)

    @functools.cache
    def check(structure: Any, shapes: tuple[jax.ShapeDtypeStruct, ...]) -> None:
        params = jax.tree.unflatten(structure, shapes)
        _check_elementwise(inner, params, jax.eval_shape(lambda p: map_none(flat, p), params))

    def part(x: Any) -> jax.Array:
        """What of a leaf belongs to this device."""
        whole = flat(x)
        if not _is_manual(axes):
            return _constrained(whole, mark.sharding(whole))
        if whole.ndim == 0:
            return whole
        size = whole.shape[-1] // n
        return jax.lax.dynamic_slice_in_dim(whole, jax.lax.axis_index(axis) * size, size, axis=-1)

    def reduced_part(gradient: Any) -> jax.Array:
        """What of the common gradient of all devices belongs to this one."""
        if gradients == "reduced" or not _is_manual(axes) or not axes_split(gradient, axes):
            return part(gradient)
        whole = flat(gradient)
        if whole.ndim == 0:
            total = jax.lax.psum(whole, axis)
        else:
            total = jax.lax.psum_scatter(whole, axis, scatter_dimension=whole.ndim - 1, tiled=True)
        return total / n if gradients == "mean" else total

    def gathered(update: jax.Array, like: Any) -> jax.Array:
        """The whole leaf again, on every device."""
        if not jnp.ndim(like):
            return update
        if _is_manual(axes):
            whole = _all_gather(update, axis)
        else:
            whole = _constrained(update, NamedSharding(mesh, PartitionSpec()))
        return whole.reshape(-1)[: jnp.size(like)].reshape(jnp.shape(like))

    def placed(state: Any) -> Any:
        if _is_manual(axes):
            return state
        whole = NamedSharding(mesh, PartitionSpec())
        return optax.tree_map_params(
            inner,
            lambda buffers: jax.tree.map(lambda x: _constrained(x, mark.sharding(x)), buffers),
            state,
            transform_non_params=lambda x: jax.tree.map(lambda y: _constrained(y, whole), x),
            is_leaf=lambda _: True,
        )

    def init(params: Tree) -> Any:
        if is_placeholder(params):
            state = inner.init(params)
            return jax.tree.map(
                lambda x: mark if is_placeholder(x) else x, state, is_leaf=is_placeholder
            )
        jax.tree_util.tree_map_with_path(_check_replicated, params)
        state = inner.init(map_none(part, params))
        if not elementwise:
            leaves, structure = jax.tree.flatten(params)
            check(structure, tuple(jax.ShapeDtypeStruct(np.shape(x), dtype_of(x)) for x in leaves))
        return placed(state)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        own = map_none(reduced_part, updates)
        at = None if params is None else map_none(part, params)
        new, state = inner.update(own, state, at, **extra)
        return map_none(lambda like, u: gathered(u, like), updates, new), placed(state)

    wrapper = optax.GradientTransformationExtraArgs(init, update)
    return transformation(
        "zero1", {"mesh": mesh, "axis": axis, "gradients": gradients}, wrapper, (inner,)
    )


def _is_manual(axes: tuple[str, ...]) -> bool:
    """Whether this runs once per device, under shard_map or pmap over the axes."""
    try:
        jax.lax.axis_size(axes)
    except NameError:
        return False
    return True


def _all_gather(x: jax.Array, axis: str | tuple[str, ...]) -> jax.Array:
    """That the result is the same on all devices is known to check_vma=True."""
    return jax.lax.all_gather(x, axis, axis=x.ndim - 1, tiled=True, to="invarying")


def _constrained(x: Any, sharding: NamedSharding) -> Any:
    if any(kind == AxisType.Explicit for kind in sharding.mesh.axis_types):
        return jax.sharding.reshard(x, sharding)
    return jax.lax.with_sharding_constraint(x, sharding)


def _check_replicated(path: Any, param: Any) -> None:
    sharding = getattr(jax.typeof(param), "sharding", None)
    if not isinstance(param, Tracer):
        sharding = getattr(param, "sharding", None)
    if sharding is not None and not sharding.is_fully_replicated:
        raise ValueError(
            f"zero1 is for parameters that every device holds whole, but"
            f" {jax.tree_util.keystr(path) or 'the only leaf'} is split: {sharding}. The state of a"
            " sharded parameter is sharded as it is: use the optimizer alone, and"
            " init_sharded(optimizer, params)."
        )


def _check_elementwise(inner: optax.GradientTransformation, params: Tree, parts: Tree) -> None:
    found = reach(inner, params, parts)
    if found.scope == "weight":
        return
    if found.only_seen:
        raise ValueError(
            f"zero1 pads the parameters, and {found.place or found.operation} would count the"
            " padding too: leave observers= out, or put it in front. If that does not matter, say"
            " zero1(inner, mesh, elementwise=True)."
        )
    shown = f"{found.place} ({found.operation})" if found.place else found.operation
    raise ValueError(
        f"zero1 takes elementwise transformations, but {shown} lets the weights of a {found.scope}"
        " see each other, of which a device has a part only. Put it around or in front:"
        " optax.chain(optax.clip_by_global_norm(1.0), zero1(adam(1e-3), mesh)). If it treats every"
        " weight by itself all the same, say zero1(inner, mesh, elementwise=True)."
    )
