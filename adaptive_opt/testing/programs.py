"""Contracts about jit, scan, vmap, derivatives and donation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.trees import Tree, path_of
from adaptive_opt.testing.contract import Broken, case, contract
from adaptive_opt.testing.subject import LONG, STEPS, Subject
from adaptive_opt.testing.trees import expect_close, expect_finite, normal

MANY = 30
"""The steps in which a loop is compared with a scan."""


@contract
def one_compilation(subject: Subject) -> None:
    """A step that is compiled again when it is fed its own results costs more than it trains."""
    before = subject.traces
    state = subject.start()
    for gradient in subject.gradients:
        state = subject.step(*state, gradient)
    if subject.traces - before > 1:
        raise Broken(f"{STEPS} steps are traced {subject.traces - before} times")


@contract
def jit_is_eager(subject: Subject) -> None:
    """A compiled step rounds otherwise and does nothing else."""
    eager = subject.stepper(jit=False)
    state, params = subject.optimizer.init(subject.params), subject.params
    for t in range(2):
        with case(f"step {t + 1}"):
            _, state, params = eager(subject.gradients[t], state, params)
            expect_close("the parameter", subject.compiled[t + 1][0], params)
            expect_close("the state", subject.compiled[t + 1][1], state)


@contract
def scan_is_loop(subject: Subject) -> None:
    """Whole trainings are scanned; the steps are those of a loop."""
    stacked = jax.tree.map(lambda *x: jnp.stack([*x] * (LONG // STEPS)), *subject.gradients)
    state = subject.optimizer.init(subject.params)
    history, _ = subject.scan(jnp.int32(0), subject.params, state, stacked)
    looped = subject.start()
    for t in range(MANY):
        looped = subject.step(*looped, subject.gradients[t % STEPS])
        with case(f"step {t + 1}"):
            expect_close("the parameter", jax.tree.map(lambda x, t=t: x[t], history), looped[0])


@contract
def vmap_is_loop(subject: Subject) -> None:
    """Ensembles and sweeps train many members at once; each does what it does alone."""
    members = 2
    params, gradients = normal(20, members), [normal(21 + t, members) for t in range(2)]

    def two_steps(params: Tree, first: Tree, second: Tree) -> Tree:
        return subject.run(params, [first, second])[-1].params

    together = jax.jit(jax.vmap(two_steps))(params, *gradients)
    for i in range(members):
        own, first, second = (
            jax.tree.map(lambda x, i=i: x[i], tree) for tree in (params, *gradients)
        )
        with case(f"member {i + 1} of {members}"):
            expected = two_steps(own, first, second)
            expect_close("the parameter", jax.tree.map(lambda x, i=i: x[i], together), expected)


@contract
def donation(subject: Subject) -> None:
    """Steps donate the old state to the new one. Two fields in one buffer cannot be donated, and
    a buffer that is not used again is memory."""
    params = jax.tree.map(jnp.array, subject.params)
    state = subject.optimizer.init(params)
    with case("the first state"):
        _expect_distinct((params, state))
    taken = subject.moved(subject.gradients[0], state, params)
    with case("after a step that is not compiled"):
        _expect_distinct((taken.params, taken.state))
    with case("a compiled step that donates"):
        after = subject.step(params, state, subject.gradients[0])
        expect_close("the parameter", after[0], taken.params)
        for path, leaf in jax.tree_util.tree_flatten_with_path((params, state))[0]:
            if isinstance(leaf, jax.Array) and leaf.size > 1 and not leaf.is_deleted():
                raise Broken(f"{path_of(path)} of (parameters, state) is not used again")


def _expect_distinct(tree: Any) -> None:
    seen: dict[int, str] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if not isinstance(leaf, jax.Array) or not leaf.size:
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        name = path_of(path)
        first = seen.setdefault(leaf.unsafe_buffer_pointer(), name)
        if first != name:
            raise Broken(f"{first} and {name} of (parameters, state) are one buffer")


def slope(subject: Subject) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Value and derivative of a function of an update, along a direction of the gradient."""

    def value(along: jax.Array, gradient: Tree, way: Tree, state: Any) -> jax.Array:
        moved = jax.tree.map(lambda g, w: g + along * w, gradient, way)
        _, _, after = subject.moved(moved, state, subject.params)
        return sum((jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(after)), jnp.zeros(()))

    return jax.jit(jax.value_and_grad(value))


@contract
def derivative(subject: Subject) -> None:
    """Learning to learn, and tuning by gradients, differentiate through updates; the derivative is
    that of finite differences."""
    state, way, h = subject.usual[1].state, normal(40), 1e-5
    gradient = subject.gradients[2]
    found = float(subject.once(slope)(jnp.zeros(()), gradient, way, state)[1])
    high, low = (
        float(subject.once(slope)(jnp.full((), x), gradient, way, state)[0]) for x in (h, -h)
    )
    expected = (high - low) / (2 * h)
    if not abs(found - expected) <= 1e-5 * abs(expected) + 1e-8:
        raise Broken(f"it is {found:.6g}, by finite differences {expected:.6g}")


@contract
def derivative_at_zero(subject: Subject) -> None:
    """The slope of a root is infinite at zero: weights without a gradient make a NaN of the
    derivative of all."""
    nothing = jax.tree.map(jnp.zeros_like, subject.params)
    state = subject.optimizer.init(subject.params)
    with case("a gradient of zeros in the first step"):
        found = subject.once(slope)(jnp.zeros(()), nothing, normal(40), state)[1]
        expect_finite("the derivative", np.asarray(found))
