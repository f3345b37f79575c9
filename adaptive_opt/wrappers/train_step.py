"""A training step whose buffers XLA can reuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from adaptive_opt.core.trees import downhill


def train_step(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    *,
    has_aux: bool = False,
) -> Any:
    """Loss, gradient, update and new parameters in one program that works in place.

    ``step(params, state, *args) -> (params, state, loss)``, jitted, with parameters and state
    donated: XLA writes the new ones where the old ones were. It pairs donated buffers with results
    of the same shape *by order*, so a step that returns ``(state, params)`` writes every array
    somewhere else first: nearly twice the memory traffic, several times the time. Here the order is
    right. The old ``params`` and ``state`` must not be used again; keep a copy
    (``jax.tree.map(jnp.copy, params)``) of what you want to keep. An array that is there twice
    (parameters that are tied, a state that starts as the parameters, as that of ``optax.lbfgs``)
    cannot be donated, and JAX says so: copy the state once in the same way. Gradients of complex
    parameters are conjugated, for ``jax.grad`` gives the conjugate of the direction uphill.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a scalar; with ``has_aux`` a pair of a scalar and
        anything. Batches, random keys and other state go into ``args``; what is static, into the
        function.
      optimizer: any optax optimizer. Those that ask for it get ``value``, ``grad`` and ``value_fn``
        (``optax.contrib.reduce_on_plateau``, line searches).
      has_aux: whether the loss returns something besides; the step then returns ``(params, state,
        loss, aux)``.

    Returns:
      A jitted function, with ``.lower(...)`` to look at the program.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, train_step
    >>> optimizer = adam(0.1)
    >>> step = train_step(lambda params, x: jnp.sum((params - x) ** 2), optimizer)
    >>> params = jnp.zeros(2)
    >>> params, state, loss = step(params, optimizer.init(params), jnp.array([1.0, -1.0]))
    >>> print(params.round(3), loss)
    [ 0.1 -0.1] 2.0
    """
    if not callable(loss_fn):
        raise TypeError(
            f"train_step takes a loss function, loss_fn(params, *args), got {loss_fn!r}."
        )
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(
            "train_step takes an optax optimizer after the loss function, for instance"
            f" train_step(loss_fn, adamw(1e-3)), got {optimizer!r}."
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def step(params: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
        def value_fn(params: Any) -> Any:
            value = loss_fn(params, *args, **kwargs)
            return value[0] if has_aux else value

        differentiated = jax.value_and_grad(loss_fn, has_aux=has_aux)
        value, gradients = differentiated(params, *args, **kwargs)
        gradients = downhill(gradients)
        loss, *aux = value if has_aux else (value,)
        updates, state = optimizer.update(
            gradients, state, params, value=loss, grad=gradients, value_fn=value_fn
        )
        return optax.apply_updates(params, updates), state, loss, *aux

    return jax.jit(step, donate_argnums=(0, 1))
