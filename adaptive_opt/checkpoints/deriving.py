"""Buffers that the source has not got, started from its moments."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.found import buffers_at, with_buffers
from adaptive_opt.checkpoints.places import Place, over
from adaptive_opt.core.trees import Tree

DERIVED = ("nu_max", "rate_ema", "previous_gradient")
"""What can be started from the moments."""


def derived(
    place: Place, missing: Collection[str], buffers: Mapping[str, Tree], count: int
) -> dict[str, Tree]:
    """The missing buffers at a place, from those that are there; less than all, if need be."""
    made: dict[str, Tree] = {}
    if "previous_gradient" in missing and "mu" in buffers:
        made["previous_gradient"] = buffers["mu"]
    if {"nu_max", "rate_ema"} & set(missing) and "nu" in buffers and place.owner is not None:
        made |= _of_a_still_step(place.owner, buffers["nu"], count)
    return {name: made[name] for name in missing if name in made}


def _alone(owner: optax.GradientTransformation, state: Any) -> Place:
    return Place((), type(state).__name__, state, owner)


def _of_a_still_step(owner: optax.GradientTransformation, nu: Tree, count: int) -> dict[str, Tree]:
    """The maximum and the rate of a step that leaves the second moment as it is.

    The gradient sqrt(v) does: b2 v + (1 - b2) v = v; AdaBelief's surprise is a part of it. The
    average of rates is linear in what it was,
    so that two steps, from 0 and from 1, tell the rate; in float64, because b3 is close to 1. All
    of it is calculated where the second moment is, split as it is.
    """
    with jax.enable_x64(True):
        nu = jax.tree.map(lambda v: jnp.asarray(v).astype(np.float64), nu)
        nowhere = jax.tree.map(jnp.zeros_like, nu)  # where nothing decays
        fresh = _alone(owner, owner.init(nowhere))
        paths, root = over(nu), jax.tree.map(jnp.sqrt, nu)

        def after(gradient: Tree, start: float) -> dict[str, Tree]:
            started = {
                name: jax.tree.map(lambda x: jnp.full_like(x, start), buffer)
                for name, buffer in buffers_at(fresh, paths).items()
                if name in ("nu_max", "rate_ema")
            }
            state = with_buffers(fresh, {"nu": nu, **started})
            state = state._replace(count=jnp.asarray(count - 1, state.count.dtype))
            new = _alone(owner, owner.update(gradient, state, nowhere)[1])
            return buffers_at(new, paths)

        def still(v: jax.Array, without: jax.Array, more: jax.Array) -> jax.Array:
            square = v * jnp.where(v == 0, 0.0, (v - without) / (more - without))
            return jnp.sqrt(jnp.maximum(square, 0.0))

        gradient = jax.tree.map(still, nu, after(nowhere, 0.0)["nu"], after(root, 0.0)["nu"])
        zero, one = after(gradient, 0.0), after(gradient, 1.0)
        made = {"nu_max": zero["nu_max"]} if "nu_max" in zero else {}
        if "rate_ema" in zero:
            made["rate_ema"] = jax.tree.map(
                lambda s0, s1, v: jnp.where(v == 0, 0.0, s0 / (1 - (s1 - s0))),
                *(zero["rate_ema"], one["rate_ema"], nu),
            )
        return made
