"""Parameters in every container of the ecosystem; states of other trees are refused by path."""

from __future__ import annotations

import collections
import dataclasses
from typing import NamedTuple

import equinox as eqx
import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    FEW_OFTEN,
    FEWER,
    RECIPES,
    assert_bit_equal,
    broadly,
    buffers_of,
    normal_tree,
)
from flax import nnx

from adaptive_opt import adam, adamod, amsgrad


class Named(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Data:
    kernel: jax.Array
    bias: jax.Array


class Struct(flax.struct.PyTreeNode):
    kernel: jax.Array
    bias: jax.Array


class Module(eqx.Module):
    kernel: jax.Array
    bias: jax.Array
    activation: object = eqx.field(static=True, default=jnp.tanh)


CONTAINERS = {
    "list": lambda kernel, bias: [kernel, bias],
    "tuple": lambda kernel, bias: (kernel, (bias,)),
    "named tuple": Named,
    "dataclass": Data,
    "flax.struct": Struct,
    "equinox module": Module,
    "FrozenDict": lambda kernel, bias: flax.core.freeze({"dense": {"k": kernel, "b": bias}}),
    "OrderedDict": lambda kernel, bias: collections.OrderedDict(kernel=kernel, bias=bias),
    "nnx State": lambda kernel, bias: nnx.State({"k": nnx.Param(kernel), "b": nnx.Param(bias)}),
}


@pytest.mark.parametrize("recipe", FEW_OFTEN)
def test_a_container_makes_no_difference(recipe):
    optimizer = RECIPES[recipe](1e-2)
    tree = normal_tree()["dense"]

    def train(wrap):
        params = wrap(tree["kernel"], tree["bias"])
        state = optimizer.init(params)
        updates, after = optimizer.update(params, state, params)
        assert jax.tree.structure(after) == jax.tree.structure(state)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        return sorted(jax.tree.leaves(updates), key=lambda x: x.ndim), after

    expected, _ = train(lambda kernel, bias: {"kernel": kernel, "bias": bias})
    for name, wrap in CONTAINERS.items():
        if recipe == "rmsprop of the tree" and name not in ("dataclass", "equinox module"):
            continue  # the order in which a sum over the tree is taken is the container's
        updates, after = train(wrap)
        assert_bit_equal(updates, expected)
        kinds = {type(buffer) for buffer in buffers_of(after).values()}
        assert type(wrap(tree["kernel"], tree["bias"])) in kinds or "tree" in recipe


def test_containers_that_differ_are_named():
    params = {"w": jnp.ones(2)}
    optimizer = RECIPES["adamw"](1e-2)
    with pytest.raises(ValueError, match=r"the type of a container: .*FrozenDict"):
        optimizer.update(params, optimizer.init(params), flax.core.freeze(params))


OTHERS = {
    "a missing leaf": ({"a": jnp.ones(2)}, r"\['b'\]"),
    "another name": ({"a": jnp.ones(2), "c": jnp.ones(3)}, r"\['b'\]"),
    "a leaf more": ({"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(1)}, r"\['c'\]"),
    "a deeper leaf": ({"a": jnp.ones(2), "b": {"inner": jnp.ones(3)}}, r"\['b'\]"),
    "another shape": ({"a": jnp.ones(2), "b": jnp.ones(4)}, r"\['b'\] differ .* \(4,\)"),
    "a shape that broadcasts": (
        {"a": jnp.ones(2), "b": jnp.ones(1)},
        r"\['b'\] differ .* \(1,\)",
    ),
    "a scalar": ({"a": jnp.ones(2), "b": jnp.ones(())}, r"\['b'\] has shape \(\)"),
}


@pytest.mark.parametrize(
    "recipe", broadly(FEWER, [r for r in RECIPES if r != "rmsprop of the tree"])
)
@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_tree_or_shape_is_refused_with_the_path(recipe, other):
    params = {"a": jnp.ones(2), "b": jnp.ones(3)}
    optimizer = RECIPES[recipe](1e-2)
    if not buffers_of(optimizer.init(params)):
        return
    tree, path = OTHERS[other]
    with pytest.raises(ValueError, match=path):
        jax.eval_shape(optimizer.update, params, optimizer.init(tree), params)


def test_a_state_of_another_recipe_is_refused():
    x = {"a": jnp.ones(2)}
    with pytest.raises(ValueError, match="should hold the buffers mu, nu, rate_ema"):
        adamod(1e-3).update(x, amsgrad(1e-3).init(x)[:1] + adamod(1e-3).init(x)[1:], x)


def test_shapes_alone_give_the_shapes_of_the_state():
    shapes = jax.eval_shape(normal_tree)
    for recipe in RECIPES.values():
        optimizer = recipe(1e-2)
        state = jax.eval_shape(optimizer.init, shapes)
        real = optimizer.init(normal_tree())
        assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == jax.tree.map(
            lambda x: (x.shape, x.dtype), real
        )


def test_one_tree_in_many_places_is_one_leaf_each():
    """The same array twice in the parameters: two weights, two buffers."""
    x = jnp.ones(2)
    params = {"a": x, "b": x}
    state = adam(1e-2).init(params)
    _, state = adam(1e-2).update({"a": x, "b": 2 * x}, state, params)
    assert not np.array_equal(state[0].mu["a"], state[0].mu["b"])
    assert optax.tree.get(state, "nu")["b"][0] == pytest.approx(4e-3)
