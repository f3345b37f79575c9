"""Parameters to evaluate with: averages of those that were trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.checks import Hyperparameter, check_decay, value_at
from adaptive_opt.core.describe import described_around
from adaptive_opt.core.trees import (
    Tree,
    dtype_of,
    is_array,
    is_none,
    keep_dtype,
    kept_dtype,
    leaves_like,
    map_leaves,
    path_at,
    wide,
)
from adaptive_opt.stages.schedule_free import averaged_params, is_averaged


class ParameterEmaState(NamedTuple):
    """The number of steps, the weights in the average so far, the average, the inner state."""

    count: jax.Array
    weight: jax.Array
    ema: Tree
    inner_state: Any

    def evaluation(self, params: Tree) -> Tree:
        """The average, corrected for its start at zero; None where none is kept."""
        kept = _where(self.ema, params, None)
        return map_leaves(
            lambda p, e, *, w: jnp.where(w > 0, e / jnp.where(w > 0, w, 1), p),
            *(kept, kept, self.ema),
            w=self.weight,
        )


@described_around
def parameter_ema(
    inner: optax.GradientTransformation,
    decay: Hyperparameter = 0.999,
    *,
    state_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains as the inner optimizer does, and keeps a moving average of the parameters.

    ``e_t = b e_{t-1} + (1 - b) x_t``, of the parameters after each step, from ``e_0 = 0``; and
    ``evaluation_params(state, params)`` is ``e_t`` divided by the weights in it so far, so that
    after one step it is the parameter. No update is changed.

    Use it where the last iterate is noisy: evaluation with the average stands in for part of a
    learning rate decay.

    Args:
      inner: any optimizer; it must be the last part of a chain, whose update the parameters get.
      decay: b, in [0, 1), or a schedule of it. The average looks back over about 1 / (1 - b) steps.
      state_dtype: of the average; default: the parameter's, float32 for 16-bit parameters. (At b =
        0.999 a bfloat16 average stands still.)

    State: ``ParameterEmaState(count, weight, ema, inner_state)``; ``ema`` is one array per
      parameter, before the correction. ValueError if ``update`` gets no parameters.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import evaluation_params, parameter_ema, sgd
    >>> optimizer, x = parameter_ema(sgd(1.0), 0.5), jnp.array([0.0])
    >>> state = optimizer.init(x)
    >>> for _ in range(2):
    ...     updates, state = optimizer.update(jnp.array([-3.0]), state, x)
    ...     x = optax.apply_updates(x, updates)
    >>> print(x, evaluation_params(state, x))  # (1 * 3 + 2 * 6) / 3
    [6.] [5.]
    """
    check_decay(decay=decay)
    inner = optax.with_extra_args_support(inner)

    def init(params: Tree) -> ParameterEmaState:
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p, dtype=kept_dtype(p, state_dtype)), params)
        nothing = jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32)
        return ParameterEmaState(*nothing, zeros, inner.init(params))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError(
                "parameter_ema needs the parameters: call update(gradients, state, params)."
            )
        updates, inner_state = inner.update(updates, state.inner_state, params, **extra)
        count = jnp.asarray(optax.safe_increment(state.count))
        b = value_at(decay, count)
        moves = jax.tree.map(_or_nothing, updates, params, is_leaf=is_none)
        landed = jax.tree.map(_rounded, optax.apply_updates(params, moves))
        ema = map_leaves(lambda x, e, *, b: b * e + (1 - b) * x, landed, landed, state.ema, b=b)
        ema = keep_dtype(state.ema, ema, "the average")
        weight = jnp.asarray(b * state.weight + (1 - b), state.weight.dtype)
        return updates, ParameterEmaState(count, weight, ema, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _or_nothing(update: Any, param: Any) -> Any:
    """A parameter without an update stays, and is averaged: all have one weight."""
    return jnp.zeros_like(param) if update is None and param is not None else update


def _rounded(x: jax.Array) -> jax.Array:
    """``x`` in float32 at least, as it is rounded; XLA drops a mere cast to 16 bits and back."""
    kind = jnp.finfo(x.dtype)
    wider = x.astype(wide(x.dtype))
    return (
        wider if wider.dtype == x.dtype else jax.lax.reduce_precision(wider, kind.nexp, kind.nmant)
    )


def evaluation_params(state: Any, params: Tree) -> Tree:
    """The parameters to evaluate, export or predict with, whatever the optimizer.

    The average of ``parameter_ema``, the slow weights of ``lookahead`` and ``ranger``, the averaged
    iterates of ``schedule_free`` and of ``optax.contrib.schedule_free``; the parameters themselves
    for all others. Where one of them is inside another, the outer one counts. In a ``partition`` or
    in ``ParameterGroups`` each group has its own; frozen parameters stay.

    Args:
      state: the optimizer's state, however deep in wrappers and chains.
      params: the parameters that are trained; ``optax.LookaheadParams`` too.

    Returns:
      A tree like ``params``, in its dtypes. Training goes on from ``params``.

    ValueError where two parts of a chain average the same parameter.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adam, evaluation_params, lookahead
    >>> x = jnp.array([1.0, 2.0])
    >>> state = lookahead(adam(1e-3)).init(x)
    >>> print(evaluation_params(state, x + 1))
    [1. 2.]
    >>> print(evaluation_params(adam(1e-3).init(x), x + 1))
    [2. 3.]
    """
    if isinstance(params, optax.LookaheadParams):
        return params.slow
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    chosen: list[Any] = [None] * len(leaves)
    for evaluation in _evaluations(state):
        for index, value in enumerate(leaves_like(structure, evaluation(params))):
            if not is_array(value):
                continue
            if chosen[index] is not None:
                raise ValueError(
                    f"two parts of the optimizer average the parameter at"
                    f" {path_at(params, index)}. Put one around the other, or drop one."
                )
            chosen[index] = jnp.asarray(value, dtype_of(leaves[index]))
    return structure.unflatten(
        p if value is None else value for p, value in zip(leaves, chosen, strict=True)
    )


def _evaluations(state: Any) -> Iterator[Callable[[Tree], Tree]]:
    """What the outermost averages in a state say of parameters; MaskedNode where nothing."""
    for part in jax.tree.leaves(state, is_leaf=_averages):
        if hasattr(part, "evaluation"):
            yield part.evaluation
        elif is_averaged(part):
            yield functools.partial(averaged_params, part)
        elif _averages(part):
            yield lambda params, part=part: optax.contrib.schedule_free_eval_params(
                part, _where(part.z, params, optax.MaskedNode())
            )


def _where(kept: Tree, params: Tree, otherwise: Any) -> Tree:
    """The parameters of which something is kept."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    there = map(is_array, leaves_like(structure, kept))
    return structure.unflatten(
        p if is_kept else otherwise for p, is_kept in zip(leaves, there, strict=True)
    )


def _averages(x: Any) -> bool:
    of_optax = isinstance(x, optax.contrib.ScheduleFreeState)
    return hasattr(x, "evaluation") or of_optax or is_averaged(x)
