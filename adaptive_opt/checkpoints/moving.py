"""From the state of one optimizer to that of another."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import jax
import optax

from adaptive_opt.checkpoints.buffers import put_together
from adaptive_opt.checkpoints.found import found_in
from adaptive_opt.core.describe import describe
from adaptive_opt.core.trees import Tree


def convert_state(
    state: Any,
    source: optax.GradientTransformation,
    target: optax.GradientTransformation,
    params: Tree,
    *,
    count: int | None = None,
    drop: Collection[str] = (),
) -> Any:
    """The state with which ``target`` goes on where ``source`` stopped.

    Both are optimizers of this library or of optax; every buffer is found by its name, and every
    count in the new state is the count of the old. Between two optimizers that compute the same the
    next steps are those of an uninterrupted run. Where ``target`` remembers more than ``source``:

    * the maximum of AMSGrad (``nu_max``) starts at the present second moment;
    * the average of rates of AdaMod and DiffMod (``rate_ema``) starts at the present rate of each
      weight, as if it had been that for ever, and at 0 where no gradient has been seen;
    * the gradient before (``previous_gradient``) of diffGrad and DiffMod is the first moment.

    A state of ``low_memory`` is decoded first. ``target`` cannot be one.

    Args:
      state: a state of ``source``.
      source: the optimizer that made it. Of its hyperparameters nothing is taken over.
      target: the optimizer that is to go on.
      params: the parameters at this point.
      count: how many gradients ``state`` has seen; needed only where it does not say (sgd and
        rmsprop of optax).

    Raises:
      ValueError: a buffer has no place in the new state (it would be lost), or cannot be derived,
        or means something else there; the message says which.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adamod, convert_state
    >>> x = jnp.array([1.0, -2.0])
    >>> adam = optax.adam(1e-3)
    >>> _, state = adam.update(x, adam.init(x), x)
    >>> state = convert_state(state, adam, adamod(1e-3), x)
    >>> print(state[0].count, state[0].buffers["rate_ema"])
    1 [0.01  0.005]
    """
    expected = jax.tree.structure(jax.eval_shape(source.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"the state is not one of the source, {describe(source).name}, for these parameters:"
            f" its structure is {jax.tree.structure(state)}, that of the source is {expected}."
        )
    found = found_in(source, state, params)
    return put_together(target, params, found, count, drop=drop)
