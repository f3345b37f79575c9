"""Where an optimizer's state lives: on the devices of the parameters, and split as they are."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from adaptive_opt.core.trees import Tree, axes_of
from adaptive_opt.memory.codecs import BLOCK, Blocks, is_blocks


def state_shardings(
    optimizer: optax.GradientTransformation, params: Tree, shardings: Tree | None = None
) -> Any:
    """The sharding of every leaf of an optimizer's state, from the shardings of the parameters.

    For any optax transformation. A leaf of the state that belongs to a parameter and has its shape
    takes its sharding. Where dimensions are missing or of size 1 (factored second moments) the
    others keep theirs, and further leading dimensions are not split. The scales of ``low_memory``
    are split with the codes where the split goes between blocks. Everything else is replicated:
    counts, numbers for a whole tensor or tree, and shapes that fit a parameter in two ways. The
    state of ``zero1`` is split as ``zero1`` says.

    Args:
      optimizer: any optax transformation.
      params: arrays, or ``jax.ShapeDtypeStruct``; nothing is computed.
      shardings: a tree like the parameters, or one for all: ``NamedSharding``, or
        ``PartitionSpec`` to get the ``in_specs`` and ``out_specs`` of ``shard_map``. Default: the
        shardings that the parameters have.

    Returns a tree like ``optimizer.init(params)`` for ``jit``'s ``in_shardings``,
    ``out_shardings``, ``jax.device_put`` or a checkpoint to be restored. ValueError where a
    parameter has no sharding, or they are on different devices.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import PartitionSpec as P
    >>> from adaptive_opt import adam, state_shardings
    >>> params = {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}
    >>> specs = {"kernel": P("data", None), "bias": P()}
    >>> state = state_shardings(adam(1e-3), params, specs)[0]
    >>> tuple(state.nu["kernel"]), tuple(state.nu["bias"]), tuple(state.count)
    (('data', None), (), ())
    """
    if shardings is None:
        shardings = jax.tree_util.tree_map_with_path(_sharding_of, params)
    else:
        shardings = jax.tree.broadcast(shardings, params, is_leaf=_is_sharding)
    whole = _replicated(shardings)

    def of_parameter(param: Any, sharding: Any, buffers: Any) -> Any:
        def derived(x: Any) -> Any:
            if not isinstance(x, Blocks):
                return _derived(x.shape, param.shape, sharding, whole)
            codes = _derived(x.codes.shape, param.shape, sharding, whole)
            return Blocks(codes, _of_scales(x, codes, whole))

        return jax.tree.map(derived, buffers, is_leaf=is_blocks)

    def of_parameters(state: Any, mark: Any = None) -> Any:
        if isinstance(mark, SplitOverAxis):
            return jax.tree.map(lambda x: mark.sharding(x, like=whole), state)
        try:
            return jax.tree.map(of_parameter, params, shardings, state)
        except ValueError:  # not a tree like the parameters
            return of_others(state)

    def of_others(state: Any, mark: Any = None) -> Any:
        del mark
        return jax.tree.map(lambda _: whole, state)

    return map_copies(optimizer, of_parameters, of_others, params)


def init_sharded(optimizer: optax.GradientTransformation, params: Tree) -> Any:
    """``optimizer.init(params)`` with the state where the parameters are, split as they are.

    ``jax.jit(optimizer.init)(params)`` puts the whole state on one device, for zeros depend on
    nothing. This is the same with the ``out_shardings`` of :func:`state_shardings`: every device
    makes its own part, and no other. For parameters that are arrays with a ``NamedSharding``
    (data, fully sharded or tensor parallel, on meshes with automatic or explicit axes, of one or of
    several processes, inside or outside of ``jax.set_mesh``) or on a single device. The state then
    goes through ``jit`` as it is, and into ``shard_map`` with the specs that ``state_shardings``
    makes of those of the parameters.

    Under ``pmap`` the replicated state has an axis for the devices: ``jax.pmap(optimizer.init)``.

    >>> import jax, jax.numpy as jnp
    >>> from jax.sharding import NamedSharding, PartitionSpec as P
    >>> from adaptive_opt import adam, init_sharded
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> kernel = jax.device_put(jnp.ones((16, 4)), NamedSharding(mesh, P("data", None)))
    >>> state = init_sharded(adam(1e-3), {"kernel": kernel})
    >>> state[0].mu["kernel"].sharding == kernel.sharding
    True
    """
    if not jax.tree.leaves(params):
        return optimizer.init(params)
    return jax.jit(optimizer.init, out_shardings=state_shardings(optimizer, params))(params)


class SplitOverAxis:
    """The mark of a state that ``zero1`` splits; takes the parameters' place in a state."""

    def __init__(self, mesh: Any, axis: str | tuple[str, ...]) -> None:
        self.mesh, self.axis = mesh, axis

    def sharding(self, leaf: Any, like: Any = None) -> Any:
        """The last dimension is split if it can be, scalars are whole; a spec if ``like`` is one.

        Of ``zero1`` every array can be; of ``low_memory`` inside it, not all scales.
        """
        splits = leaf.ndim and leaf.shape[-1] % _parts(self.mesh, self.axis) == 0
        spec = PartitionSpec(*[None] * (leaf.ndim - 1), self.axis) if splits else PartitionSpec()
        return spec if isinstance(like, PartitionSpec) else NamedSharding(self.mesh, spec)


def map_copies(
    optimizer: optax.GradientTransformation,
    of_parameters: Callable[..., Any],
    of_others: Callable[..., Any],
    params: Tree,
) -> Any:
    """The shapes of a state, mapped: its copies of the parameters whole, and its other leaves.

    Both functions are given the part of the state, and the mark that stands in its place.
    """
    shapes = jax.eval_shape(optimizer.init, params)
    try:
        marks = optimizer.init(_placeholder())
    except Exception:
        # An init that looks at its parameters (lbfgs): copies are known by their structure.
        like_params = jax.tree.structure(params)

        def is_copy(x: Any) -> bool:
            return jax.tree.structure(x) == like_params

        return jax.tree.map(
            lambda x: (of_parameters if is_copy(x) else of_others)(x), shapes, is_leaf=is_copy
        )

    def is_mark(x: Any) -> bool:
        return isinstance(x, SplitOverAxis) or is_placeholder(x)

    return jax.tree.map(
        lambda mark, state: (of_parameters if is_mark(mark) else of_others)(state, mark),
        marks,
        shapes,
        is_leaf=is_mark,
    )


def is_placeholder(x: Any) -> bool:
    """Whether it stands for the parameters where ``optax.tree_map_params`` looks for copies."""
    return isinstance(x, type(_placeholder()))


@functools.cache
def _placeholder() -> Any:
    """What optax's wrappers know to pass on; ``optax.tree_map_params`` hands it to any init."""
    seen: list[Any] = []

    def init(params: Any) -> Any:
        seen.append(params)
        return ()

    optax.tree_map_params(init, lambda x: x, ())
    return seen[0]


def _is_sharding(x: Any) -> bool:
    return isinstance(x, (Sharding, PartitionSpec))


def _sharding_of(path: Any, param: Any) -> Any:
    sharding = getattr(param, "sharding", None)
    if isinstance(param, Tracer) or sharding is None:
        raise ValueError(
            f"the parameter {jax.tree_util.keystr(path)} has no sharding"
            f" ({type(param).__name__}): put it on its devices with jax.device_put, or, while"
            " tracing, give state_shardings(optimizer, params, shardings=...) and constrain the"
            " state to it."
        )
    return sharding


def _replicated(shardings: Tree) -> Any:
    """What holds for a leaf that is not split, on the devices of the parameters."""
    leaves = jax.tree_util.tree_flatten_with_path(shardings, is_leaf=_is_sharding)[0]
    if not leaves:
        return PartitionSpec()
    (first_path, first), *rest = leaves
    for path, other in rest:
        as_specs = isinstance(first, PartitionSpec), isinstance(other, PartitionSpec)
        if any(as_specs) and not all(as_specs):
            raise ValueError("shardings must be all NamedSharding or all PartitionSpec.")
        if not any(as_specs) and first.device_set != other.device_set:
            raise ValueError(
                f"the parameters {jax.tree_util.keystr(first_path)} and"
                f" {jax.tree_util.keystr(path)} are on different devices: {first} and {other}. Put"
                " all of them on one mesh with jax.device_put(params, NamedSharding(mesh, ...))."
            )
    named = [x for _, x in leaves if isinstance(x, NamedSharding)]
    if isinstance(first, PartitionSpec):
        return PartitionSpec()
    return NamedSharding(named[0].mesh, PartitionSpec()) if named else first


def _derived(
    shape: tuple[int, ...], of_param: tuple[int, ...], sharding: Any, replicated: Any
) -> Any:
    """The sharding of a leaf of the state that belongs to a parameter."""
    if shape == of_param or not isinstance(sharding, (NamedSharding, PartitionSpec)):
        return sharding
    as_spec = isinstance(sharding, PartitionSpec)
    of_dimension = sharding if as_spec else sharding.spec
    axes = [*of_dimension, *[None] * (len(of_param) - len(of_dimension))]
    extra = len(shape) - len(of_param)
    if extra == 0 and all(n in (1, m) for n, m in zip(shape, of_param, strict=True)):
        kept = {tuple(a if n == m else None for a, n, m in zip(axes, shape, of_param, strict=True))}
    elif extra > 0 and of_param and shape[extra:] == of_param:
        kept = {(*[None] * extra, *axes)}
    else:
        ways = itertools.combinations(range(len(of_param)), len(shape))
        kept = {tuple(axes[i] for i in w) for w in ways if tuple(of_param[i] for i in w) == shape}
    if len(kept) != 1:
        return replicated
    spec = PartitionSpec(*kept.pop())
    return spec if as_spec else NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def _of_scales(blocks: Blocks, of_codes: Any, replicated: Any) -> Any:
    """The sharding of the scales of an array in 8 bits, from that of its codes."""
    if not isinstance(of_codes, (NamedSharding, PartitionSpec)):
        return of_codes
    *_, last = shape = blocks.scales.shape
    if (*shape[:-1], last * BLOCK) != blocks.codes.shape:  # blocks of the flattened array
        return replicated
    if isinstance(of_codes, PartitionSpec):
        return of_codes
    *axes, along_last = [*of_codes.spec, *[None] * (len(shape) - len(of_codes.spec))]
    if last % _parts(of_codes.mesh, along_last) == 0:
        return of_codes
    spec = PartitionSpec(*axes, None)
    return NamedSharding(of_codes.mesh, spec, memory_kind=of_codes.memory_kind)


def _parts(mesh: Any, axis: str | tuple[str, ...] | None) -> int:
    """Into how many parts a dimension is split."""
    return math.prod(mesh.shape[name] for name in axes_of(axis))
