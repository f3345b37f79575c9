"""Steps of JAX to be timed: update and apply, and what carries its arrays from step to step."""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

import adaptive_opt


def update_and_apply(optimizer: optax.GradientTransformation) -> Any:
    """A jitted step for given gradients that reuses the buffers of parameters and state."""

    def step(params: Any, state: Any, gradients: Any) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))


def in_one_kernel(optimizer: optax.GradientTransformation) -> Any:
    """The same step of a ``low_memory`` by ``one_kernel``, given a loss of 1."""
    both = adaptive_opt.one_kernel(optimizer).update_and_apply

    def step(params: Any, state: Any, gradients: Any) -> Any:
        return both(gradients, state, params, value=jnp.float32(1.0))

    return jax.jit(step, donate_argnums=(0, 1))


def with_loss(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer, given a loss of 1: some recipes want one."""
    update = optax.with_extra_args_support(optimizer).update
    return optax.GradientTransformation(
        optimizer.init, functools.partial(update, value=jnp.float32(1.0))
    )


class Run:
    """A compiled step that goes on from where it stopped; call it with a number of steps.

    Args:
      step: jitted, from parameters, state and the rest to new parameters, new state and more.
    """

    def __init__(self, step: Any, params: Any, state: Any, *rest: Any) -> None:
        self.params, self.state, self.rest = params, state, rest
        began = time.perf_counter()
        traced = step.trace(params, state, *rest)
        at_trace = time.perf_counter()
        lowered = traced.lower()
        at_lower = time.perf_counter()
        self.compiled = lowered.compile()
        self.seconds = {
            "trace s": at_trace - began,
            "lower s": at_lower - at_trace,
            "compile s": time.perf_counter() - at_lower,
        }

    def __call__(self, times: int) -> None:
        for _ in range(times):
            self.params, self.state, *_ = self.compiled(self.params, self.state, *self.rest)
        jax.block_until_ready(self.params)
