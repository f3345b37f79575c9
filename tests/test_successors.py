"""What came after: masks inside a bracket, a trust ratio behind any optimizer, still tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import gradient_trees, normal_tree, train

from adaptive_opt import (
    adaptive,
    add_weight_decay,
    adopt,
    decoupled_weight_decay,
    lamb,
    radial_projection,
    trust_ratio,
)

PARAMS = {"dense": {"kernel": jnp.ones((2, 2)), "none": None}, "scale": [jnp.ones(3)]}
STILL = jax.tree.map(jnp.zeros_like, PARAMS)
MASKS = {
    "a tree": {"dense": {"kernel": True, "none": True}, "scale": [False]},
    "a prefix": {"dense": True, "scale": False},
    "a function": lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_holds_inside_a_bracket_where_it_holds_outside(mask):
    inside, outside = adaptive(add_weight_decay(0.5, mask)), decoupled_weight_decay(0.5, mask)
    frozen = STILL | {"dense": {"kernel": None, "none": None}}
    # optax.masked asks a function about the gradients too, which need not have the shapes.
    for still in (STILL,) if callable(mask) else (STILL, frozen):
        actual, _ = inside.update(still, inside.init(PARAMS), PARAMS)
        expected, _ = outside.update(still, outside.init(PARAMS), PARAMS)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_a_mask_that_fits_no_parameters_is_refused():
    for mask, message in (({"dense": True}, "the mask of trust_ratio must"), (True, "one bool")):
        optimizer = lamb(1e-3, trust_mask=mask)
        with pytest.raises(ValueError, match=message):
            optimizer.update(STILL, optimizer.init(PARAMS), PARAMS)


def test_a_tensor_left_out_of_the_trust_ratio_steps_as_if_there_were_none():
    params, gradients = normal_tree(), list(gradient_trees(3))
    free = lamb(1e-2, trust_mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p))
    _, _, history = train(free, params, gradients)
    without = lamb(1e-2, trust_mask=lambda p: jax.tree.map(lambda x: False, p))
    _, _, expected = train(without, params, gradients)
    for (_, ours), (_, theirs) in zip(history, expected, strict=True):
        np.testing.assert_array_equal(ours["dense"]["bias"], theirs["dense"]["bias"])
        assert not np.allclose(ours["dense"]["kernel"], theirs["dense"]["kernel"])


def test_a_trust_ratio_in_a_bracket_of_its_own_is_that_of_optax():
    params, gradients = normal_tree(), list(gradient_trees(3))
    ours = optax.chain(optax.scale_by_lion(), adaptive(trust_ratio(0.1, 1e-3)), optax.scale(-0.1))
    theirs = optax.scale_by_trust_ratio(trust_coefficient=0.1, eps=1e-3)
    theirs = optax.chain(optax.scale_by_lion(), theirs, optax.scale(-0.1))
    updates = [train(optimizer, params, gradients)[2][-1][1] for optimizer in (ours, theirs)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), *updates)


def test_the_first_gradient_of_adopt_moves_and_decays_nothing():
    optimizer, x = adopt(1e-2, weight_decay=0.5), jnp.ones(3)
    first, state = optimizer.update(jnp.array([1.0, -2.0, 1e6]), optimizer.init(x), x)
    np.testing.assert_array_equal(first, np.zeros(3))
    second, _ = optimizer.update(jnp.zeros(3), state, x)
    np.testing.assert_allclose(second, np.full(3, -1e-2 * 0.5), rtol=1e-6)


def test_parts_of_a_tensor_are_not_projected():
    with pytest.raises(ValueError, match=r"axis_name must be \(\), got \('data',\)"):
        radial_projection(axis_name=("data",))
