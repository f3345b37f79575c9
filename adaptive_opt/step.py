"""The open step: what flows between the stages of an optimizer.

The papers tell one story: average the gradient, average its square, derive from that a learning
rate for every single weight, multiply. They differ in one line each. Here the quantities that the
lines speak of travel together as an :class:`AdaptiveStep`, and every line is a stage that reads
some of them and replaces one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from adaptive_opt import policies
from adaptive_opt.ledger import Ledger
from adaptive_opt.policies import Hyperparameter, Tree


@dataclasses.dataclass(frozen=True)
class RateRule:
    """The per-weight rate as a rule over the second moment: one over a function of it.

    A rule follows the second moment: whoever replaces ``v`` afterwards changes the rate too. Where
    the denominator is 0 (a weight without any gradient, and eps = 0), the rate is 0, not infinity.

    Attributes:
      function: ``function(v, **settings)``, the denominator of a leaf.
      settings: hyperparameters by name.
    """

    function: Callable[..., jax.Array]
    settings: Mapping[str, Hyperparameter]

    def denominator(self, step: AdaptiveStep) -> Tree:
        settings = {name: step.at(value) for name, value in self.settings.items()}
        return step.map(self.function, step.second_moment, **settings)


class _SaysWhatToDo(type):
    """JAX names the types where two trees differ; this one says in its name what is missing."""

    def __repr__(cls) -> str:
        return "an open AdaptiveStep: only stages can read it, put close_step() before"


@dataclasses.dataclass(frozen=True, repr=False)
class AdaptiveStep(metaclass=_SaysWhatToDo):
    """One step of an adaptive optimizer, opened up, on its way through the stages.

    Deliberately no container that JAX or optax can look into: a foreign transformation between
    ``open_step()`` and ``close_step()`` would clip the count or scale the learning rate twice, and
    nobody would know. It fails at once instead.

    Attributes:
      count: the number of gradients seen, this one included (t = 1, 2, ...); int32 scalar.
      gradient: g_t, a pytree like the parameters, in float32 at least.
      direction: what is followed: g_t, then m_t, its debiased or damped form; likewise.
      second_moment: v_t, or what replaced it; real; None until a stage sets it.
      rate: the learning rate of every single weight; None, then a :class:`RateRule` over the second
        moment, then, once a stage has replaced it, values like the second moment.
      update_dtype: the dtype each leaf of the closed step will have.
      ledger: what has been done so far, for the error messages.
      params: the parameters, if ``update`` was given them.
      notes: what stages leave for observers to read, by name.
    """

    count: jax.Array
    gradient: Tree
    direction: Tree
    second_moment: Tree | None = None
    rate: RateRule | Tree | None = None
    update_dtype: Tree = None
    ledger: Ledger = dataclasses.field(default_factory=Ledger)
    params: Tree | None = None
    notes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def replace(self, **fields: Any) -> AdaptiveStep:
        """The same step with some fields replaced."""
        return dataclasses.replace(self, **fields)

    def noting(self, **notes: Any) -> AdaptiveStep:
        """The same step with something more for observers to read; it changes no update."""
        return self.replace(notes={**self.notes, **notes})

    def at(self, hyperparameter: Hyperparameter) -> Any:
        """The value of a hyperparameter at this step; schedules see ``count - 1``, as in optax."""
        return policies.value_at(hyperparameter, self.count)

    def map(self, function: Any, *trees: Tree, **scalars: Any) -> Tree:
        """``function(*leaves, **scalars)`` for every leaf that has a gradient.

        Positional arguments are trees like the parameters, keyword arguments scalars. Everything
        arrives in one width, float32 at least; leaves without a gradient stay None.
        """
        return policies.map_leaves(function, self.gradient, *trees, **scalars)

    def rate_values(self) -> Tree:
        """The rate of every weight as arrays, whether it is still a rule or values already."""
        if isinstance(self.rate, RateRule):
            return self.map(lambda d: _divide(1.0, d), self.rate.denominator(self))
        return self.rate

    def __repr__(self) -> str:
        return (
            "AdaptiveStep(an open step, of which only stages know how to read it;"
            f" close_step() turns it into updates; filled: {', '.join(sorted(self.ledger.filled))})"
        )


def _refuse(_: AdaptiveStep) -> Any:
    raise TypeError(
        "an open AdaptiveStep reached something that is not a stage of adaptive_opt: an optax"
        " transformation between open_step() and close_step(), apply_updates, or the border of a"
        " jit. Move the transformation before open_step() or after close_step(); if there is no"
        " close_step() yet, add it."
    )


# Not a container: registered only so that every tree function refuses it, with the reason. (What
# JAX does not know it takes for a leaf, and `decay * {"w": ...}` would then raise an error of
# Python's.)
jax.tree_util.register_pytree_node(AdaptiveStep, _refuse, lambda *_: _refuse(*_))


def opened(gradient: Tree, count: jax.Array, params: Tree | None) -> AdaptiveStep:
    """A plain gradient as a step; ``count`` includes it."""
    if isinstance(gradient, AdaptiveStep):
        raise TypeError(
            "open_step() was given a step that is open already. One open_step() and one"
            " close_step() belong to a chain; adaptive(...) and the recipes bring their own."
        )
    update_dtype = policies.update_dtypes(gradient, params)
    gradient = policies.map_none(
        lambda g, dtype: policies.at_width(g, policies.real(policies.wide(dtype))),
        gradient,
        update_dtype,
    )
    return AdaptiveStep(
        count, gradient, direction=gradient, update_dtype=update_dtype, params=params
    )


def closed(step: AdaptiveStep) -> Tree:
    """The plain update: direction times rate, in the dtype it was promised."""
    if not isinstance(step, AdaptiveStep):
        raise TypeError(
            f"close_step() needs an open step, but was given plain updates ({type(step).__name__})."
            " Put open_step() before it, and every stage between the two."
        )
    step.ledger.check_closing()
    if isinstance(step.rate, RateRule):
        update = step.map(_divide, step.direction, step.rate.denominator(step))
    elif step.rate is not None:
        update = step.map(jnp.multiply, step.direction, step.rate)
    else:  # perhaps the very array that a stage keeps
        update = step.map(jnp.copy, step.direction)
    return policies.map_none(_leave, update, step.gradient, step.update_dtype)


def _leave(update: jax.Array, gradient: jax.Array, dtype: Any) -> jax.Array:
    if update.shape != gradient.shape:
        raise ValueError(
            f"a gradient of shape {gradient.shape} met a state of shape {update.shape}. A state"
            " belongs to the parameters it was initialised with; initialise a new one."
        )
    if jnp.iscomplexobj(update):  # real gradients of complex parameters that were not given
        dtype = policies.with_both_parts(dtype)
    return update.astype(dtype)


def _divide(x: Any, y: jax.Array) -> jax.Array:
    """x / y, and 0 where y is 0.

    The quotient comes last: XLA:CPU stores quotients and roots that are used twice, and would store
    the root as well if its test for 0 were left over.
    """
    zero = y == 0
    return jnp.where(zero, 0, x) / jnp.where(zero, 1, y)
