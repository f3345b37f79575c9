"""SOAP: what the eigenbases do, and which arrays have one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import train

from adaptive_opt import (
    adaptive,
    behind,
    cautious,
    debias_rate,
    eigenbasis,
    first_moment,
    into_eigenbasis,
    low_memory,
    out_of_eigenbasis,
    per_weight_rate,
    second_moment,
    soap,
    zero1,
)


def normal(*shape, dtype=np.float64):
    rng = np.random.default_rng(5)
    x = rng.standard_normal(shape)
    return x + 1j * rng.standard_normal(shape) if dtype == np.complex128 else x


def in_basis(*behind_it):
    """Adam in the basis, less its corrections, with a learning rate of 1."""
    bracket = adaptive(
        *(eigenbasis(0.9, 2), first_moment(0.8), into_eigenbasis(), second_moment(0.9)),
        *(per_weight_rate(1e-3), out_of_eigenbasis(), *behind_it),
    )
    return optax.chain(bracket, optax.scale(-1.0))


@pytest.mark.parametrize(
    "dtype", [np.complex128, pytest.param(np.float64, marks=pytest.mark.broad)]
)
def test_a_rotation_of_the_parameters_rotates_the_trajectory(dtype, x64):
    left, right = (np.linalg.qr(normal(n, n, dtype=dtype))[0] for n in (4, 3))
    gradients = normal(6, 4, 3, dtype=dtype)
    start = jnp.zeros((4, 3), dtype)
    optimizer = soap(0.1, 0.8, 0.9, precondition_frequency=2)
    x, _, _ = train(optimizer, start, gradients)
    y, _, _ = train(optimizer, start, left @ gradients @ right)
    np.testing.assert_allclose(y, left @ x @ right, rtol=0, atol=1e-10)
    assert jnp.abs(x).min() > 1e-3


def test_vectors_are_left_to_adam_which_has_not_seen_the_first_gradient(x64):
    gradients, start = normal(5, 7), jnp.zeros(7)
    mine, state, _ = train(soap(0.1, eps=1e-3), start, gradients)
    moments = first_moment(0.95), second_moment(0.95), per_weight_rate(1e-3)
    adam = optax.chain(adaptive(*moments, debias_rate(0.95, 0.95)), optax.scale(-0.1))
    theirs, _, _ = train(adam, start, gradients[1:])
    np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    assert set(state[0].buffers) == {"mu", "nu"}


def test_a_basis_is_orthogonal_and_stays_until_it_is_renewed():
    gradients = normal(9, 3, 2).astype(np.float32)
    optimizer = soap(0.1, precondition_frequency=3, max_precond_dim=2)
    _, state, history = train(optimizer, jnp.zeros((3, 2)), gradients)
    assert set(state[0].buffers) == {"mu", "nu", "gram_1", "basis_1"}
    bases = [each[0].buffers["basis_1"] for each, _ in history]
    changed = [step for step in range(1, 9) if np.any(bases[step] != bases[step - 1])]
    assert changed == [1, 4, 7]
    for basis in bases[1:]:
        np.testing.assert_allclose(basis.T @ basis, np.eye(2), atol=1e-6)


def test_what_stands_behind_it_sees_the_gradient_of_the_parameters(x64):
    gradients, start = normal(4, 3, 3), jnp.zeros((3, 3))
    _, _, inside = train(in_basis(cautious()), start, gradients)
    _, _, outside = train(behind(in_basis(), cautious()), start, gradients)
    for (_, mine), (_, theirs) in zip(inside, outside, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-12)
    assert any(np.any(update == 0) for _, update in inside[1:])


def test_bases_stay_wide_whatever_the_rest_is_kept_in():
    x = jnp.zeros((64, 64))
    stored = low_memory(soap(0.1)).init(x).inner_state[0].buffers
    asked = soap(0.1, state_dtype=jnp.bfloat16).init(x)[0].buffers
    for buffers in (stored, asked):
        narrow = {name for name, buffer in buffers.items() if buffer.dtype == jnp.bfloat16}
        assert narrow == {"mu", "nu"}
        assert set(buffers) - narrow == {"gram_0", "gram_1", "basis_0", "basis_1"}


@pytest.mark.broad
def test_parts_of_arrays_and_an_unknown_limit_are_refused():
    mesh, x = jax.make_mesh((2,), ("data",)), jnp.ones((4, 4))
    with pytest.raises(ValueError, match="zero1"):
        zero1(soap(0.1), mesh).init(x)
    replicated = jax.sharding.PartitionSpec()
    per_device = jax.shard_map(
        lambda g: soap(0.1).update(g, soap(0.1).init(g))[0],
        mesh=mesh,
        in_specs=replicated,
        out_specs=replicated,
        check_vma=False,
    )
    with pytest.raises(ValueError, match=r"eigenbasis takes whole matrices"):
        per_device(x)
    injected = optax.inject_hyperparams(soap)(0.1, max_precond_dim=8)
    with pytest.raises(TypeError, match=r"max_precond_dim .* static_args"):
        injected.init(x)
