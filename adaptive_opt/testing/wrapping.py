"""Contracts about optax's wrappers: inside of them an optimizer does what it does alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.trees import Tree
from adaptive_opt.testing.contract import Broken, case, contract
from adaptive_opt.testing.subject import Subject, Taken
from adaptive_opt.testing.trees import TOLERANCE, expect_close, normal


def on(name: str, subject: Subject, optimizer: Any = None) -> list[Taken]:
    """The usual run of one parameter alone."""
    gradients = [{name: g[name]} for g in subject.gradients]
    return subject.run({name: subject.params[name]}, gradients, optimizer)


INJECTED = 1e-6
"""A number that is injected may be a float32."""


def expect_same(taken: list[Taken], expected: list[Tree], tolerance: float = TOLERANCE) -> None:
    for t, (one, other) in enumerate(zip(taken, expected, strict=True)):
        expect_close(f"the update in step {t + 1}", one.updates, other, tolerance)


@contract
def masked(subject: Subject) -> None:
    """optax.masked gives an optimizer a part of the tree, and passes the rest."""
    wrapped = optax.masked(subject.optimizer, {"w": True, "b": False})
    taken = subject.run(subject.params, subject.gradients, wrapped)
    alone = [t.updates for t in on("w", subject)]
    expected = [a | {"b": g["b"]} for a, g in zip(alone, subject.gradients, strict=True)]
    expect_same(taken, expected)


@contract
def partition(subject: Subject) -> None:
    """optax.partition gives each group an optimizer of its own, as if it were alone."""
    rate = subject.learning_rate
    slow = subject.made_with(rate / 2) if subject.factory else subject.optimizer
    wrapped = optax.partition({"fast": subject.optimizer, "slow": slow}, {"w": "fast", "b": "slow"})
    taken = subject.run(subject.params, subject.gradients, wrapped)
    alone = zip(on("w", subject), on("b", subject, slow), strict=True)
    expect_same(taken, [w.updates | b.updates for w, b in alone])


@contract
def inject_hyperparams(subject: Subject) -> None:
    """optax.inject_hyperparams keeps numbers in the state: the updates are the same, and a number
    that is changed there counts."""
    factory, keywords = _injectable(subject)
    rate = subject.learning_rate
    wrapped = optax.inject_hyperparams(factory, **keywords)(learning_rate=rate)
    step = subject.stepper(wrapped, jit=True)
    start: Any = wrapped.init(subject.params)
    state, params, taken = start, subject.params, []
    for gradient in subject.gradients:
        taken.append(step(gradient, state, params))
        _, state, params = taken[-1]
    expect_same(taken, [t.updates for t in subject.usual], INJECTED)
    with case("another learning rate, put into the first state"):
        start.hyperparams["learning_rate"] = jnp.asarray(rate / 4)
        updates, after, _ = step(subject.gradients[0], start, subject.params)
        if jax.tree.structure(after) != jax.tree.structure(start):
            raise Broken("the state has another structure after a step")
        other = subject.made_with(rate / 4)
        expected = subject.run(subject.params, subject.gradients[:1], other)[0].updates
        expect_close("the update", updates, expected, INJECTED)


def _injectable(subject: Subject) -> tuple[Callable[..., Any], dict[str, Any]]:
    """A function of a ``learning_rate``, and its arguments that are no fractional numbers."""
    factory = subject.needed_factory()
    parameters = inspect.signature(factory).parameters
    if "learning_rate" not in parameters:
        return lambda learning_rate: factory(learning_rate), {}
    static = [
        name
        for name, p in parameters.items()
        if name != "learning_rate" and not isinstance(p.default, float)
    ]
    return factory, {"static_args": static}


@contract
def multi_steps(subject: Subject) -> None:
    """optax.MultiSteps adds gradients up: two halves of a batch make the step of the whole."""
    wide = {
        name: jnp.float64
        for name in inspect.signature(optax.MultiSteps).parameters
        if name == "accumulator_dtype"
    }
    both: Any = optax.MultiSteps(subject.optimizer, 2, **wide)
    # Not both.gradient_transformation(), which passes no value on.
    wrapped = optax.GradientTransformationExtraArgs(both.init, both.update)
    halves = []
    for t, whole in enumerate(subject.gradients[:2]):
        noise = normal(50 + t)
        halves += [jax.tree.map(lambda g, n, s=s: g + s * n, whole, noise) for s in (1, -1)]
    taken = subject.run(subject.params, halves, wrapped, jit=True)
    with case("the first half of a batch"):
        if any(np.any(x) for x in jax.tree.leaves(taken[0].updates)):
            raise Broken("there is an update before the whole batch is there")
    expect_same(taken[1::2], [t.updates for t in subject.usual[:2]])
