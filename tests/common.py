"""What several tests need: a small tree of parameters, gradients for it, and a loop over them."""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect

import chex
import jax
import jax.numpy as jnp
import jaxlib.version
import numpy as np
import optax
import pytest

import adaptive_opt

QUICK = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
"""What XLA is told before it starts, and in a ``jit`` of a test's own."""
AS_USERS = {"xla_backend_optimization_level": 3, "xla_cpu_parallel_codegen_split_count": 32}
"""The ``compiler_options`` of a ``jit`` where it counts which products and sums XLA joins."""
if jaxlib.version.__version_info__ < (0, 11):
    QUICK["xla_cpu_use_fusion_emitters"], AS_USERS["xla_cpu_use_fusion_emitters"] = False, True

SHOWING = {
    "sgd": {"momentum": 0.9},
    "sgdw": {"convention": "torch"},  # whose learning rate may be a schedule
    "rmsprop": {"centered": True, "momentum": 0.9},
    "adam_mini": {"blocks": "row"},  # whatever the names
    "schedule_free_radam": {"silent_sgd_phase": False},  # which moves from the first step on
    "schedule_free_plus": {"polyak": False},  # which needs no loss
}
"""Settings with which a recipe shows all it has, where the defaults do not."""


def _arguments(name):
    return inspect.signature(adaptive_opt.RECIPES[name]).parameters


def _as_tested(name):
    settings = dict(SHOWING.get(name, {}))
    if "base_learning_rate" in _arguments(name):
        # With a schedule or a traced rate they want to know what rate the bounds are meant for.
        settings["base_learning_rate"] = 1e-2
    return functools.partial(adaptive_opt.RECIPES[name], **settings)


REGISTERED = tuple(
    name
    for name, recipe in adaptive_opt.RECIPES.items()
    if str(recipe.__module__).startswith("adaptive_opt.")
)
"""The recipes of this library; tests may register others."""

RECIPES = {name: _as_tested(name) for name in REGISTERED} | {
    "rmsprop of the tree": functools.partial(adaptive_opt.rmsprop, scope="tree")
}
"""Every recipe, as a function of the learning rate."""

ADAMS = {name: RECIPES[name] for name in REGISTERED if {"b1", "b2", "eps"} <= {*_arguments(name)}}
"""The recipes with b1, b2 and eps."""

CONVENTIONS = {
    name: tuple(
        sorted(
            choices["convention"],
            key=lambda c, n=name: c != SHOWING.get(n, {}).get("convention", c),
        )
    )
    for name in REGISTERED
    if "convention" in (choices := adaptive_opt.RECIPES[name].choices)
}
"""The conventions of the recipes that have several; the first is the one in `RECIPES`."""

EVERY_CONVENTION = RECIPES | {
    f"{name} ({convention})": functools.partial(RECIPES[name], convention=convention)
    for name, conventions in CONVENTIONS.items()
    for convention in conventions[1:]
}
"""Every recipe in every convention, as a function of the learning rate."""


def often(few, names=RECIPES, *, more=()):
    """A few of the names by default, some more among the broad tests, and all others among the slow
    ones; for ``parametrize``."""
    marks = {name: "slow" for name in names} | {n: "broad" for n in more} | {n: "" for n in few}
    return [
        pytest.param(name, marks=getattr(pytest.mark, marks[name])) if marks[name] else name
        for name in names
    ]


def broadly(few, names=RECIPES):
    """A few of the names by default, and all others among the broad tests."""
    return often(few, names, more=names)


def one_in(n, rows):
    """Every n-th by default, and all others among the broad tests; tuples are several arguments."""
    rows = [row if isinstance(row, tuple) else (row,) for row in rows]
    marks = [pytest.mark.broad if i % n else () for i in range(len(rows))]
    return [pytest.param(*row, marks=mark) for row, mark in zip(rows, marks, strict=True)]


EACH_OFTEN_ONCE = often(RECIPES, EVERY_CONVENTION)
"""Every recipe often, its further conventions among the slow tests; for ``parametrize``."""

REPRESENTATIVE = (
    *("adamw", "diffmod", "nadam", "rmsprop of the tree", "novograd", "schedule_free_adamw"),
    *("muon", "adamh", "soap", "ranger"),
)
"""A recipe of every kind of state, which is what wrappers, containers and transforms see of one."""

FEW_OFTEN = often(REPRESENTATIVE)
"""Those often, every other recipe among the slow tests; for ``parametrize``."""

FEW_CONVENTIONS = often(REPRESENTATIVE, EVERY_CONVENTION)
"""The same, every other convention among the slow tests too; for ``parametrize``."""

FEWER = ("adamw", "diffmod", "rmsprop of the tree", "ranger")
"""One with decay, one with four buffers, one with a scalar for a tree, one with slow weights."""

FEWER_OFTEN = often(FEWER, more=REPRESENTATIVE)
"""Those often, the representative ones among the broad tests, every other among the slow ones."""

FEWER_CONVENTIONS = often(FEWER, EVERY_CONVENTION, more=REPRESENTATIVE)
"""The same, every other convention among the slow tests too; for ``parametrize``."""

PER_TENSOR = tuple(
    name
    for name in REGISTERED
    if "axis_name" in _arguments(name) and "polyak" not in _arguments(name) and name != "rmsprop"
)
"""The recipes that look at each tensor as a whole; where devices have parts of it, by axis_name."""

START_AT_PARAMS = {"ranger": "slow"} | {
    name: "z" for name in REGISTERED if name.startswith("schedule_free")
}
"""The recipes that keep where they started, under what name; their update needs the parameters."""

LOOK_AT_PARAMS = (
    *START_AT_PARAMS,
    *(n for n in REGISTERED if {"trust_mask", "wd_ratio", "eps_scale"} & {*_arguments(n)}),
)
"""The recipes that look at the length of parameters, or keep them."""

NEED_PARAMS = (
    *LOOK_AT_PARAMS,
    *(
        n
        for n in REGISTERED
        if "weight_decay" in _arguments(n) and _arguments(n)["weight_decay"].default
    ),
)
"""The recipes whose update needs the parameters: they decay by default, or look at their length."""


@contextlib.contextmanager
def checking_leaks():
    """JAX looks for leaks among all objects there are: only those made from here on, please."""
    gc.freeze()
    with jax.checking_leaks():
        yield


def buffers_of(state):
    """Every named buffer in a state, by name."""
    found = {}
    for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]:
        names = [getattr(key, "name", getattr(key, "key", None)) for key in path]
        if "buffers" in names:
            name = names[names.index("buffers") + 1]
        else:
            name = next((n for n in names if n in ("mu", "nu", "slow")), None)
        if name is not None and name not in found:
            all_of_it = [value for _, value in optax.tree.get_all_with_path(state, name)]
            found[name] = next(filter(jax.tree.leaves, all_of_it))  # not a MaskedNode
            if isinstance(found[name], adaptive_opt.Observation):
                del found[name]
    return found


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


def train(optimizer, params, gradients, state=None, **settings):
    """The parameters, the state and the updates after a step for every gradient, jitted so."""

    @functools.partial(jax.jit, **settings)
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
