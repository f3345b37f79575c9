"""An optimizer's state in the host's memory between steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.checks import check_whole
from adaptive_opt.core.describe import described_around
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory.low_memory import buffer_of, check_names

KIND = "pinned_host"
"""What JAX calls the memory of the host that a device can reach by itself."""


def offload_stands_aside() -> str | None:
    """Why ``offload`` leaves optimizers as they are in this process; None where it acts.

    >>> from adaptive_opt import offload_stands_aside
    >>> reason = offload_stands_aside()
    >>> reason is None or "offload needs" in reason
    True
    """
    device = getattr(jax.config, "jax_default_device") or jax.devices()[0]  # noqa: B009
    device = jax.devices(device)[0] if isinstance(device, str) else device
    kinds = [memory.kind for memory in device.addressable_memories()]
    if KIND in kinds and device.default_memory().kind != KIND:
        return None
    return (
        f"offload needs a memory of the kind {KIND!r} beside the device's own; {device} has"
        f" {', '.join(kinds)}. The state stays on the device."
    )


@described_around
def offload(
    inner: optax.GradientTransformation,
    buffers: Sequence[str] | None = None,
    *,
    min_size: int = 4096,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the state in pinned memory of the host between steps, and so off the device.

    A step fetches it, calls ``inner``, and brings it back: Adam's 8 bytes per parameter make room
    for activations, and travel twice in every step. When XLA fetches them is its own decision: as
    early as there is room. Use it where activations are what does not fit; see ``memory_plan`` on
    the device itself. ``low_memory`` makes the state smaller, and goes inside:
    ``offload(low_memory(adamw(1e-3), "8-bit"))``. Put ``offload`` outermost, for what is around it
    calculates with its state.

    Where the device has no such memory nothing changes, and ``offload_stands_aside()`` says why. A
    CPU has the kind, but it is the same memory: it is good for tests, and saves nothing.

    Args:
      inner: any optax transformation; extra arguments of ``update`` are passed on to it.
      buffers: which buffers, by name: ``("mu", "nu")``; see ``low_memory``. Default: all.
      min_size: smaller arrays stay on the device; a whole number of at least 1. An array that is on
        the host stays there, also where a step sees a part of it (``shard_map``).

    State: that of ``inner``, so that checkpoints and ``convert_state`` do not see the difference.
    Make it with ``optimizer.init(params)``; one that was made elsewhere (``init_sharded``, a
    checkpoint) moves to the host in its first step. What is on the host is committed to it, so that
    the second step may be compiled once more. Donate it, as ``train_step`` does: the new state is
    written where the old one was.

    ValueError for a name in ``buffers`` that the state does not have (at ``init``).

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, offload, offload_stands_aside
    >>> x = jnp.ones(10_000)
    >>> state = offload(adam(1e-3), ("nu",)).init(x)
    >>> mu, nu = state[0].mu.sharding.memory_kind, state[0].nu.sharding.memory_kind
    >>> (mu != "pinned_host" and nu == "pinned_host") or offload_stands_aside() is not None
    True
    """
    check_whole(1, min_size=min_size)
    if isinstance(buffers, str):
        raise TypeError(f"buffers is a sequence of names, such as ({buffers!r},), got {buffers!r}.")
    inner = optax.with_extra_args_support(inner)

    def is_for_host(path: Any, x: Any) -> bool:
        named = buffers is None or str(buffer_of(path)) in buffers
        return _is_on_host(x) or (named and jnp.size(x) >= min_size)

    def init(params: Tree) -> Any:
        state = inner.init(params)
        check_names(buffers or (), state, params)
        if offload_stands_aside() is not None:
            return state
        return _moved(state, jax.tree_util.tree_map_with_path(is_for_host, state))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if offload_stands_aside() is not None:
            return inner.update(updates, state, params, **extra)
        where = jax.tree_util.tree_map_with_path(is_for_host, state)
        here = _moved(state, jax.tree.map(lambda _: False, where))
        updates, after = inner.update(updates, here, params, **extra)
        return updates, _moved(after, where)

    return optax.GradientTransformationExtraArgs(init, update)


def _moved(state: Any, to_host: Any) -> Any:
    """Every array in the memory of the host or of the device; untouched if it is there."""
    space = jax.memory.Space

    def move(x: Any, is_for_host: bool) -> Any:
        if is_for_host == _is_on_host(x):
            return x
        return jax.device_put(x, space.Host if is_for_host else space.Device)

    return jax.tree.map(move, state, to_host)


def _is_on_host(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.typeof(x).memory_space == jax.memory.Space.Host
