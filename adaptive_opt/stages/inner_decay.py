"""Weight decay between two stages of a bracket, and masks in there."""

from __future__ import annotations

from typing import Any

import jax

from adaptive_opt.core.checks import Hyperparameter, check_nonnegative, is_zero
from adaptive_opt.core.stage import WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import OpenStep, leaves_of_params
from adaptive_opt.core.trees import Tree, is_none
from adaptive_opt.stages.weight_decay import Mask, refuse_one_bool


@stage
def add_weight_decay(
    weight_decay: Hyperparameter, mask: Mask | None = None, *, times: str | None = None
) -> WholeTree:
    """``decoupled_weight_decay`` for lists that go on: ``d_t rate_t + wd_t x_t``.

    For what comes after it in the bracket: a momentum, a bound, a trust ratio, an average of
    iterates. Reads ``direction``, ``rate`` and ``param``, replaces ``direction``; rate and second
    moment are not set after it. Remembers nothing.

    Args:
      weight_decay: at least 0, or a schedule.
      mask: which parameters decay; see :func:`optax.masked`.
      times: a note of an earlier stage by which the decay is multiplied.

    ValueError if params are not given to ``update``, unless weight_decay is 0.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, add_weight_decay
    >>> rule, x = adaptive(add_weight_decay(0.5)), jnp.array([4.0])
    >>> print(rule.update(jnp.array([1.0]), rule.init(x), x)[0])
    [3.]
    """
    check_nonnegative(weight_decay=weight_decay)

    def line(steps: OpenStep) -> OpenStep:
        def strength(step: AdaptiveStep) -> Any:
            return step.at(weight_decay) * (1.0 if times is None else step.noted(times))

        return decayed(steps, 0.0 if is_zero(weight_decay) else strength, mask)

    return WholeTree(line)


def decayed(steps: OpenStep, strength: Any, mask: Mask | None) -> OpenStep:
    """The update as the direction, plus the parameter times a strength: 0, or a function of the
    step of its array."""
    steps.each(lambda step: step.set(direction=step.update).without("rate", "second_moment"))
    if is_zero(strength):  # needs no parameters
        return steps
    for step, decays in zip(steps.steps, flags(mask, steps), strict=True):
        if step is not None and decays:
            step.set(direction=step.direction + strength(step) * step.param)
    return steps


def flags(mask: Mask | None, steps: OpenStep) -> list[bool]:
    """For every leaf whether a mask holds there; a mask may be a prefix, or a function."""
    if mask is None or steps.now.looking or steps.params is None:
        return [True] * len(steps.steps)
    held = mask(steps.params) if callable(mask) else mask
    refuse_one_bool(held, steps.params)
    return [bool(flag) for flag in for_every_leaf(held, steps, steps.params, "the mask", "bools")]


def for_every_leaf(given: Tree, steps: OpenStep, like: Tree, what: str, kind: str) -> list[Any]:
    """What a tree like the parameters, or a prefix of one, says of every leaf."""
    try:
        whole = jax.tree.broadcast(given, like, is_leaf=is_none)
    except ValueError:
        raise ValueError(
            f"{what} of {steps.now.stage} must be a tree of {kind} like the parameters, a prefix"
            f" of it, or a function that makes one; got {jax.tree.structure(given)} for parameters"
            f" of {jax.tree.structure(like)}."
        ) from None
    return leaves_of_params(whole, steps.structure, steps.steps)
