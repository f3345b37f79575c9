"""What several tests need: a small tree of parameters, gradients for it, and a loop over them."""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adaptive_opt

ADAMS = {
    name: getattr(adaptive_opt, name)
    for name in (
        "adam", "adamw", "amsgrad", "adamod", "diffgrad", "diffmod", "radam", "nadam", "nadamw",
    )
} | {
    # With a schedule or a traced rate these want to know what rate the bounds are meant for.
    name: functools.partial(getattr(adaptive_opt, name), base_learning_rate=1e-2)
    for name in ("adabound", "amsbound")
}  # fmt: skip
"""The recipes with b1, b2 and eps."""

RECIPES = ADAMS | {
    "sgd": functools.partial(adaptive_opt.sgd, momentum=0.9),
    "sgdw": functools.partial(adaptive_opt.sgdw, convention="torch"),
    "rmsprop": functools.partial(adaptive_opt.rmsprop, centered=True, momentum=0.9),
    "rmsprop of the tree": functools.partial(adaptive_opt.rmsprop, scope="tree"),
    "adagrad": adaptive_opt.adagrad,
    "adadelta": adaptive_opt.adadelta,
    "adamax": adaptive_opt.adamax,
    "ranger": adaptive_opt.ranger,
}
"""Every recipe, as a function of the learning rate."""

CONVENTIONS = {
    "adam": ("torch", "keras"),
    "adamw": ("torch", "keras", "paper", "keras-adamw"),
    "amsgrad": ("torch", "optax", "keras", "paper"),
    "adamod": ("reference", "paper", "robust"),
    "diffmod": ("reference", "robust"),
    "radam": ("torch", "optax", "reference"),
    "nadam": ("torch", "keras", "optax"),
    "nadamw": ("torch", "keras", "optax", "keras-adamw"),
    "sgd": ("torch", "keras"),
    "sgdw": ("torch", "paper"),
    "rmsprop": ("torch", "optax", "keras", "tf1"),
    "adagrad": ("torch", "optax", "keras"),
    "adamax": ("torch", "optax", "keras"),
}
"""The conventions of the recipes that have several; the first is the one in `RECIPES`."""

EVERY_CONVENTION = RECIPES | {
    f"{name} ({convention})": functools.partial(RECIPES[name], convention=convention)
    for name, conventions in CONVENTIONS.items()
    for convention in conventions[1:]
}
"""Every recipe in every convention, as a function of the learning rate."""

EACH_OFTEN_ONCE = [
    name if name in RECIPES else pytest.param(name, marks=pytest.mark.slow)
    for name in EVERY_CONVENTION
]
"""Every recipe often, its further conventions among the slow tests; for ``parametrize``."""

NEED_PARAMS = ("adamw", "nadamw", "sgdw", "ranger")

BUFFERS = (
    "mu", "nu", "nu_max", "rate_ema", "previous_gradient", "velocity", "sum_of_squares",
    "infinity_norm", "mean_gradient", "step_ema", "momentum_product", "slow",
)  # fmt: skip


def buffers_of(state):
    """Every named buffer in a state, by name."""
    found = {name: optax.tree.get_all_with_path(state, name) for name in BUFFERS}
    return {name: hits[0][1] for name, hits in found.items() if hits}


SHAPES = {"dense": {"kernel": (17, 9), "bias": (9,)}, "scale": ()}


def normal_tree(seed: int = 0, dtype=np.float32, shapes=SHAPES):
    """Standard normal arrays of the given shapes."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def gradient_trees(steps: int, dtype=np.float32, shapes=SHAPES):
    """Gradients of sizes from 1e-6 to 1e3, some of them exactly zero."""
    rng = np.random.default_rng(1)

    def draw(shape):
        size = 10 ** rng.uniform(-6, 3, shape)
        return jnp.asarray(rng.standard_normal(shape) * size * (rng.random(shape) > 0.1), dtype)

    for _ in range(steps):
        yield jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def train(optimizer, params, gradients, state=None):
    """The parameters, the state and the updates after a jitted step for every gradient."""

    @jax.jit
    def step(params, state, gradient):
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, updates

    state = optimizer.init(params) if state is None else state
    history = []
    for gradient in gradients:
        params, state, updates = step(params, state, gradient)
        history.append((state, updates))
    return params, state, history


def assert_bit_equal(actual, expected):
    """The same tree structure, dtypes and bits."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def ulps(actual, expected) -> int:
    """The largest distance in units in the last place, over two trees of float32 arrays."""

    def ordered(x):
        bits = np.asarray(x, np.float32).view(np.int32).astype(np.int64)
        return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)

    distances = jax.tree.map(lambda a, b: np.abs(ordered(a) - ordered(b)).max(), actual, expected)
    return max(jax.tree.leaves(distances))
