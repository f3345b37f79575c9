"""Contracts about the steps themselves: schedules, laws of scale, and descent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.testing.contract import Broken, DoesNotApply, case, contract
from adaptive_opt.testing.losses import AT_ROSENBROCKS_START, LOSSES, START
from adaptive_opt.testing.subject import LONG, Subject
from adaptive_opt.testing.trees import expect_close, pairs


@contract
def schedule_count(subject: Subject) -> None:
    """Step t reads a schedule at t - 1: a warm-up that begins one step late is another run."""
    rate = subject.learning_rate
    scheduled = subject.made_with(lambda count: jnp.where(count < 2, rate, rate / 4))
    taken = subject.run(subject.params, subject.gradients[:3], scheduled)
    for t, what in enumerate(("0", "1")):
        with case(f"a schedule that falls to a quarter at count 2, at count {what}"):
            expect_close("the update", taken[t].updates, subject.usual[t].updates)
    with case("a schedule that falls to a quarter at count 2, at count 2"):
        both = pairs(taken[2].updates, subject.usual[2].updates)
        if all(np.allclose(a, b, rtol=1e-3, atol=0) for _, a, b in both):
            raise Broken("the update is that of the old rate")


@contract
def gradient_scaling(subject: Subject) -> None:
    """The law that the caller declares: with gradients c times as large, updates are c^p times as
    large. With p = 0 the scale of the loss does not matter."""
    power = subject.gradient_scaling
    if power is None:
        raise DoesNotApply("no law is declared; give gradient_scaling=0 for invariance, 1 for SGD")
    for factor in (2.0**10, 2.0**-4):
        scaled = [jax.tree.map(lambda g, c=factor: c * g, tree) for tree in subject.gradients]
        taken = subject.run(subject.params, scaled)
        with case(f"gradients times {factor:g}"):
            for one, other in zip(taken, subject.usual, strict=True):
                expected = jax.tree.map(lambda u, c=factor: c**power * u, other.updates)
                expect_close("the update", one.updates, expected, tolerance=1e-4)


def expect_descent(subject: Subject, loss: str, start: Mapping[str, Any], enough: float) -> None:
    """The loss falls below a part of what it was, at one of a few learning rates."""
    params = jax.tree.map(jnp.asarray, dict(start))
    which = jnp.int32(1 + list(LOSSES).index(loss))
    nothing = jax.tree.map(lambda x: jnp.zeros((LONG, *x.shape), x.dtype), params)
    reached = {}
    for factor in (1, 10, 0.1, 0.01, 100) if subject.factory else (1,):
        rate = factor * subject.learning_rate
        optimizer = subject.optimizer if factor == 1 else subject.made_with(rate)
        scan = subject.scan if factor == 1 else subject.scan_with(optimizer)
        losses = np.asarray(scan(which, params, optimizer.init(params), nothing)[1])
        if losses[-1] <= enough * losses[0]:
            return
        reached[rate] = losses[-1] / losses[0]
    of_each = ", ".join(f"{value:.3g} at {rate:g}" for rate, value in reached.items())
    raise Broken(f"after {LONG} steps the loss is no less than {enough} of the first: {of_each}")


@contract
def quadratic(subject: Subject) -> None:
    """A sum of squares is the least that an optimizer has to bring down, to half."""
    expect_descent(subject, "quadratic", START, 0.5)


@contract
def rosenbrock(subject: Subject) -> None:
    """A curved valley: the directions of the gradients change, and the loss comes down to half."""
    expect_descent(subject, "rosenbrock", AT_ROSENBROCKS_START, 0.5)
