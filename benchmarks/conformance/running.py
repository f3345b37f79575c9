"""Runs an optimizer of JAX, PyTorch or Keras over the gradients of a case, in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.conformance.recorded import optimizer_of, trajectory
from benchmarks.conformance.truth import Case

Make = Callable[..., Any]


def ours(case: Case, changes: dict[str, Any] | None = None) -> np.ndarray:
    """This library's recipe with the arguments of the row, or with other ones, or modifiers."""
    changes = dict(changes or {})
    row = case.row | {key: changes.pop(key) for key in ("modifiers",) if key in changes}
    row |= {"arguments": case.arguments | changes}
    made = optimizer_of(row, len(case.gradients))
    return _scan(made, case)


def of_optax(make: Make, case: Case) -> np.ndarray:
    """``make(schedule of the learning rate, hyperparameters)`` is a transformation of optax."""
    rates = case.arguments["learning_rate"] * jnp.asarray(case.factors)
    return _scan(make(lambda count: rates[count], case.arguments), case)


def _scan(optimizer: Any, case: Case) -> np.ndarray:
    optimizer = optax.with_extra_args_support(optimizer)
    run = jax.jit(lambda g, x: trajectory(optimizer, g, x, case.losses)[0])
    return np.array(run(case.gradients, case.start))


def of_torch(make: Make, case: Case) -> np.ndarray:
    """``make([parameter], hyperparameters)`` is an optimizer of PyTorch."""
    import torch

    x = torch.nn.Parameter(torch.tensor(case.start))
    optimizer, path = make([x], case.arguments), []
    if hasattr(optimizer, "train"):
        optimizer.train()
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for gradient, factor in zip(case.gradients, case.factors, strict=True):
        for group, rate in zip(groups, rates, strict=True):
            if rate is not None:
                group["lr"] = rate * float(factor)
        x.grad = torch.tensor(gradient)
        optimizer.step()
        path.append(x.detach().numpy().copy())
    return np.stack(path)


@contextlib.contextmanager
def torch_without_casts() -> Iterator[None]:
    """PyTorch whose casts to float32 and bfloat16 leave a tensor the dtype that it has."""
    import torch

    fewer = (torch.float32, torch.bfloat16)
    casts = {name: getattr(torch.Tensor, name) for name in ("float", "bfloat16", "to")}

    def to(x: Any, *given: Any, **named: Any) -> Any:
        given = tuple(x.dtype if value in fewer else value for value in given)
        named = {key: x.dtype if value in fewer else value for key, value in named.items()}
        return casts["to"](x, *given, **named)

    for name in ("float", "bfloat16"):
        setattr(torch.Tensor, name, torch.Tensor.clone)
    torch.Tensor.to = to
    try:
        yield
    finally:
        for name, cast in casts.items():
            setattr(torch.Tensor, name, cast)


def of_keras(make: Make, case: Case) -> np.ndarray:
    """``make(hyperparameters)`` is an optimizer of Keras."""
    import keras

    keras.config.set_floatx("float64")
    x = keras.Variable(case.start, dtype="float64")
    optimizer, path = make(case.arguments), []
    rate = float(optimizer.learning_rate)
    optimizer.build([x])
    for gradient, factor in zip(case.gradients, case.factors, strict=True):
        optimizer.learning_rate = rate * float(factor)
        optimizer.apply([jnp.asarray(gradient)])
        path.append(np.array(x))
    return np.stack(path)
