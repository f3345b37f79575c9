"""Optimizers of matrices: which arrays they take, and what becomes of the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, train

from adaptive_opt import (
    adamh,
    adamw,
    adaptive,
    hidden_matrices,
    muon,
    orthogonalize,
    read_telemetry,
    telemetry,
    zero1,
)


def test_the_rest_is_adamw_and_matrices_are_those_of_two_axes():
    params, gradients = normal_tree(), list(gradient_trees(5))
    given = {"rest_learning_rate": 1e-2, "rest_weight_decay": 0.1, "rest_eps": 1e-8}
    mine, state, _ = train(muon(1e-2, **given), params, gradients)
    others = {"bias": lambda t: t["dense"]["bias"], "scale": lambda t: t["scale"]}
    rest = {name: take(params) for name, take in others.items()}
    theirs, _, _ = train(
        adamw(1e-2, 0.9, 0.95, weight_decay=0.1),
        rest,
        [{name: take(g) for name, take in others.items()} for g in gradients],
    )
    assert_bit_equal({name: take(mine) for name, take in others.items()}, theirs)
    held = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim == 2]
    assert held == [(17, 9)]  # one buffer for the matrix


def test_singular_values_end_near_one_and_a_stack_is_its_matrices():
    rule = adaptive(orthogonalize())
    stack = jax.random.normal(jax.random.key(0), (3, 4, 7))
    together, _ = rule.update(stack, rule.init(stack))
    for matrix, found in zip(stack, together, strict=True):
        alone, _ = rule.update(matrix, rule.init(matrix))
        np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
        values = np.linalg.svd(found, compute_uv=False)
        assert 0.6 < values.min() <= values.max() < 1.25
        turned, _ = rule.update(matrix.T, rule.init(matrix.T))
        np.testing.assert_allclose(turned.T, alone, rtol=1e-4, atol=1e-5)
    nothing, _ = rule.update(stack * 0, rule.init(stack))
    assert not np.any(nothing)


def test_adamh_keeps_every_matrix_on_its_own_sphere_and_leaves_the_rest_to_adamw():
    shapes = {"kernel": (5, 4), "stack": (3, 4, 2), "bias": (4,)}
    params, gradients = normal_tree(shapes=shapes), list(gradient_trees(4, shapes=shapes))
    given = {"b1": 0.8, "b2": 0.9, "eps": 1e-6}
    mine, state, _ = train(adamh(0.3, rest_learning_rate=0.1, **given), params, gradients)
    for name, alone in [("kernel", params["kernel"]), ("stack", params["stack"])]:
        norms, began = (jnp.linalg.norm(x, axis=(-2, -1)) for x in (mine[name], alone))
        np.testing.assert_allclose(norms, began, rtol=1e-6)
        assert jnp.linalg.norm(mine[name] - alone) > 0.3 * jnp.linalg.norm(alone)
    for i in range(3):
        own = train(adamh(0.3, **given), params["stack"][i], [g["stack"][i] for g in gradients])[0]
        np.testing.assert_allclose(mine["stack"][i], own, rtol=1e-5, atol=1e-6)
    rest = adamw(0.1, **given, weight_decay=0.0)
    theirs, _, _ = train(rest, params["bias"], [g["bias"] for g in gradients])
    assert_bit_equal(mine["bias"], theirs)
    radius = state.inner_states["matrices"].inner_state[0].buffers["radius"]
    assert {name: jnp.shape(radius[name]) for name in ("kernel", "stack")} == {
        "kernel": (1, 1),
        "stack": (3, 1, 1),
    }


def test_adamh_leaves_a_matrix_of_zeros_and_what_has_no_gradient():
    x, optimizer = jnp.ones((2, 2)), adamh(0.1)
    for point, gradient in ((0 * x, x), (x, 0 * x)):
        updates, _ = optimizer.update(gradient, optimizer.init(point), point)
        np.testing.assert_allclose(updates, 0 * x, atol=1e-7)


def test_names_tell_the_hidden_matrices():
    names = ("token_embedding", "lm_head", "wte", "output_projection", "mlp")
    params = {name: jnp.ones((2, 2)) for name in names} | {"scale": jnp.ones(2)}
    assert [name for name, is_one in hidden_matrices(params).items() if is_one] == ["mlp"]
    chosen = muon(0.1, matrices={name: name == "wte" for name in params})
    mu = chosen.init(params).inner_states["matrices"].inner_state[0].buffers["mu"]
    assert [name for name, x in mu.items() if not isinstance(x, optax.MaskedNode)] == ["wte"]


def test_what_is_no_whole_matrix_is_refused_by_its_path():
    params = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    rule = adaptive(orthogonalize())
    with pytest.raises(ValueError, match=r"orthogonalize needs matrices.* shape \(2,\)"):
        rule.init(params)
    mesh = jax.make_mesh((2,), ("data",))
    with pytest.raises(ValueError, match="zero1"):
        zero1(muon(0.1), mesh).init(params)
    per_device = jax.shard_map(
        lambda g: muon(0.1).update(g, muon(0.1).init(g), g)[0],
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec(),
        out_specs=jax.sharding.PartitionSpec(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"a device may hold only a part"):
        per_device(jnp.ones((4, 2)))


def test_telemetry_looks_at_the_matrices():
    params, gradients = normal_tree(), list(gradient_trees(2))
    _, state, _ = train(muon(1e-2, observers=telemetry(every=1)), params, gradients)
    seen = read_telemetry(state)
    assert seen["matrices/step"] == 2
    assert seen["matrices/learning_rate"] == pytest.approx(1e-2)


def test_what_is_split_over_explicit_axes_is_refused_by_the_leaf():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    split = jax.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    params = {"w": jax.device_put(jnp.ones((4, 2)), split)}
    optimizer = muon(0.1)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"split over explicit axes .* Auto"):
        jax.jit(optimizer.update)(params, optimizer.init(params), params)
