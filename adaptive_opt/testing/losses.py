"""The losses that every optimizer has to bring down."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.trees import Tree

# Every way to the target has mean zero along rows and columns and keeps the length of the matrix:
# optimizers that centralize gradients, or stay on a sphere, can reach it.
START = {"b": np.array([1.0, 0.0, 0.0]), "w": np.array([[1.0, 0.0], [0.0, 1.0], [0.5, -0.5]])}
TARGET = {"b": np.array([0.0, 1.0, 0.0]), "w": np.array([[0.0, 1.0], [1.0, 0.0], [0.5, -0.5]])}


def quadratic(params: Tree) -> jax.Array:
    """1 at START, in every direction that matters; 0 at TARGET."""
    return (
        jnp.sum((params["b"] - TARGET["b"]) ** 2) + jnp.sum((params["w"] - TARGET["w"]) ** 2)
    ) / 6


AT_ROSENBROCKS_START = {"b": np.array([-1.2, 1.0, 0.0]), "w": np.ones((3, 2))}


def rosenbrock(params: Tree) -> jax.Array:
    """Rosenbrock's function of two weights of the vector, over its value at the usual start."""
    x, y, _ = params["b"]
    return ((1 - x) ** 2 + 100 * (y - x**2) ** 2) / 24.2


LOSSES = {"quadratic": quadratic, "rosenbrock": rosenbrock}
"""The losses that the scan knows, by the numbers 1 and 2; 0 are the given gradients."""
