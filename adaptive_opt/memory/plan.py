"""What a compiled step takes up on a device, as XLA has planned it."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import numpy as np

from adaptive_opt.core.trees import Tree, dtype_of
from adaptive_opt.memory.by_layer import StepByLayer
from adaptive_opt.wrappers.train_step import TrainStep


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Bytes for each device while a step runs; made by :func:`memory_plan`.

    Printed, it is a table in MiB and in bytes per parameter.

    Attributes:
      count: the number of parameters, of all devices together.
      params: the parameters.
      state: the optimizer's state.
      others: the other arguments: batches, random keys, batch statistics.
      results: new arrays that are not written where an argument was: the loss, of a donated step.
      temporaries: everything between: gradients, activations, what the update calculates.
      host: what of all this is in the host's memory, as ``offload`` puts it there; on the CPU,
        where that is the same memory, 0.
    """

    count: int
    params: int
    state: int
    others: int
    results: int
    temporaries: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it that is on the device."""
        everything = self.params + self.state + self.others + self.results + self.temporaries
        return everything - self.host

    def per_parameter(self, name: str) -> float:
        """One of the attributes, or ``total``, in bytes per parameter."""
        return getattr(self, name) / max(self.count, 1)

    def __str__(self) -> str:
        names = ["params", "state", "others", "results", "temporaries"]
        names += ["host", "total"] if self.host else ["total"]
        lines = [f"{'':<14}{'MiB':>12}{'bytes per parameter':>22}"]
        lines += [
            f"{name:<14}{getattr(self, name) / 2**20:>12.3f}{self.per_parameter(name):>22.3f}"
            for name in names
        ]
        return "\n".join(lines)


def memory_plan(step: Any, *args: Any, **kwargs: Any) -> MemoryPlan:
    """What a step takes up on a device, from XLA's own plan of the compiled program.

    Nothing runs. The step is compiled for the arguments, or their shapes; it is compiled again when
    it is called, unless JAX's persistent cache is on. Use it to see whether a change of model,
    optimizer or batch fits, and what it costs: ``optax.clip_by_global_norm`` holds all gradients
    until their norm is known (8 bytes per parameter and more), where a step in place uses each one
    as it comes.

    Gradients and activations are not told apart: XLA lays all temporaries into one heap, in which
    they take one another's place.

    Args:
      step: what ``train_step`` or ``step_by_layer`` returns, or a function under ``jax.jit`` that
        takes parameters and state first.
      *args: of the step, arrays or ``jax.ShapeDtypeStruct``.
      **kwargs: the same.

    Returns a :class:`MemoryPlan`, data with a printed form. Of arrays that are split among devices
    it counts the part on one.

    TypeError for a function that is not jitted, or without parameters and a state;
    NotImplementedError where the backend does not say.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adamw, memory_plan, train_step
    >>> optimizer, w = adamw(1e-3), jax.ShapeDtypeStruct((1000, 100), jnp.float32)
    >>> step = train_step(lambda w, x: jnp.mean((x @ w) ** 2), optimizer)
    >>> x = jax.ShapeDtypeStruct((10, 1000), jnp.float32)
    >>> plan = memory_plan(step, w, jax.eval_shape(optimizer.init, w), x)
    >>> print(plan.per_parameter("params"), round(plan.per_parameter("state"), 3), plan.others)
    4.0 8.0 40000
    """
    if isinstance(step, StepByLayer):
        return _plan_by_layer(step, *args)
    if isinstance(step, TrainStep):
        given = step.taken(args[0], args[1:], dict(kwargs)) if args else None
        if given is None:
            raise TypeError("memory_plan takes the arguments of the step after it.")
        params, state = given.parts.trained, given.state
        others = given.parts.carried, given.args, kwargs
    elif not hasattr(step, "lower"):
        raise TypeError(
            "memory_plan takes what train_step returns, or a function under jax.jit, got"
            f" {step!r}: what is donated is part of the plan."
        )
    elif len(args) < 2:
        raise TypeError(
            "memory_plan takes the parameters, the state and whatever else the step takes:"
            f" memory_plan(step, params, state, batch), got {len(args)} arguments after the step."
        )
    else:
        params, state, *others = (*args, kwargs)
    planned = step.lower(*args, **kwargs).compile().memory_analysis()
    if planned is None:
        raise NotImplementedError(f"the backend {jax.default_backend()} tells no memory plan.")
    return MemoryPlan(
        count=sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params)),
        params=_bytes(params),
        state=_bytes(state),
        others=_bytes(others),
        results=_both(planned, "output") - _both(planned, "alias"),
        temporaries=_both(planned, "temp"),
        host=sum(
            sign * getattr(planned, f"host_{name}_size_in_bytes", 0)
            for name, sign in (("argument", 1), ("output", 1), ("alias", -1), ("temp", 1))
        ),
    )


def _plan_by_layer(step: StepByLayer, params: Any, state: Any, *args: Any) -> MemoryPlan:
    """Temporaries are those of the largest program, and all that goes between the layers."""
    planned = [
        program.compile().memory_analysis() for program in step.lowered(params, state, *args)
    ]
    new = [_both(p, "output") - _both(p, "alias") + _both(p, "temp") for p in planned]
    return MemoryPlan(
        count=sum(math.prod(np.shape(x)) for x in jax.tree.leaves(params)),
        params=_bytes(params),
        state=_bytes(state),
        others=_bytes(args),
        results=0,
        temporaries=max(new) + (len(params.layers) + 1) * _bytes(step.between(params, *args)),
    )


def _both(planned: Any, name: str) -> int:
    """On the device and on the host."""
    field = f"{name}_size_in_bytes"
    return getattr(planned, field) + getattr(planned, f"host_{field}", 0)


def _bytes(tree: Tree) -> int:
    """Of the arrays in a tree, or of the part of them that one device has."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = np.shape(x) if sharding is None else sharding.shard_shape(np.shape(x))
        total += math.prod(shape) * dtype_of(x).itemsize
    return total
