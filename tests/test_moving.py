"""A run that moves to another optimizer or library goes on as if it had not moved."""

from __future__ import annotations

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, one_in, train

from adaptive_opt import (
    adam,
    adamod,
    adamw,
    amsgrad,
    convert_state,
    diffmod,
    import_torch_state,
    lookahead,
    nadam,
    radam,
    rmsprop,
    sgd,
)

LR = 1e-2
SAME = {
    "adam": (optax.adam(LR), adam(LR)),
    "adamw": (optax.adamw(LR, weight_decay=0.1), adamw(LR, weight_decay=0.1)),
    "amsgrad": (optax.amsgrad(LR), amsgrad(LR, convention="optax")),
    "nadam": (optax.nadam(LR), nadam(LR, convention="optax")),
    "radam": (optax.radam(LR), radam(LR, convention="optax")),
    "rmsprop": (optax.rmsprop(LR), rmsprop(LR, convention="optax")),
    "rmsprop, centered, with momentum": (
        optax.rmsprop(LR, centered=True, momentum=0.9),
        rmsprop(LR, convention="optax", centered=True, momentum=0.9),
    ),
    "sgd with momentum": (optax.sgd(LR, momentum=0.9), sgd(LR, momentum=0.9)),
    "a schedule": (
        optax.adam(optax.linear_schedule(2.0**-7, 0.0, 128)),  # whose numbers are floats
        adam(optax.linear_schedule(2.0**-7, 0.0, 128)),
    ),
    "a chain": (
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(LR)),
        optax.chain(optax.clip_by_global_norm(1.0), adam(LR)),
    ),
    "injected": (
        optax.inject_hyperparams(optax.adam)(LR),
        optax.inject_hyperparams(adam)(LR),
    ),
}


def run(optimizer, params, state, gradients):
    """The parameters after every gradient, in one compiled scan."""

    def step(carry, gradient):
        params, state = carry
        updates, state = optimizer.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda: jax.lax.scan(step, (params, state), gradients))()


@functools.cache
def some_gradients():
    steps = [
        jax.tree.map(lambda g: jnp.clip(g, -10, 10), g) for g in gradient_trees(130, "float64")
    ]
    return jax.tree.map(lambda *g: jnp.stack(g), *steps)


@pytest.mark.parametrize("there", [True, False], ids=["from optax", "to optax"])
@pytest.mark.parametrize("name", one_in(3, SAME))
def test_the_next_100_steps_are_those_of_the_source(name, there, x64):
    source, target = SAME[name] if there else SAME[name][::-1]
    gradients = some_gradients()
    first, rest = (
        jax.tree.map(lambda g, s=s: g[s], gradients) for s in (slice(30), slice(30, 130))
    )
    params = normal_tree(dtype=np.float64)
    (params, state), _ = run(source, params, source.init(params), first)
    _, expected = run(source, params, state, rest)
    count = 30 if "count" not in str(jax.tree_util.tree_flatten_with_path(state)[0]) else None
    moved = convert_state(state, source, target, params, count=count)
    _, actual = run(target, params, moved, rest)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["adam", "adamw", "amsgrad", "adamod"])
def test_the_next_100_steps_are_those_of_pytorch(name, x64):
    path = pathlib.Path(__file__).parent / "references" / "moving.npz"
    with np.load(path) as arrays:
        saved = {"state": {0: {}, 1: {}}, "param_groups": [{"params": [0, 1]}]}
        for key in arrays:
            if key.startswith(f"{name} state"):
                *_, position, buffer = key.split(" ")
                saved["state"][int(position)][buffer] = arrays[key]
        params = {"kernel": arrays[f"{name} weight"].T, "bias": arrays[f"{name} bias"]}
        gradients = {
            "kernel": arrays["weight gradients"][30:].transpose(0, 2, 1),
            "bias": arrays["bias gradients"][30:],
        }
        weights, biases = arrays[f"{name} weights after"], arrays[f"{name} biases after"]
    params = jax.tree.map(jnp.asarray, params)
    target = {
        "adam": adam(LR),
        "adamw": adamw(LR, weight_decay=0.1),
        "amsgrad": amsgrad(LR),
        "adamod": adamod(LR, b3=0.99),
    }[name]
    state = import_torch_state(
        saved,
        target,
        params,
        {"kernel": "weight", "bias": "bias"},
        order=["weight", "bias"],
        layout=lambda path, x: x.T,
    )
    _, actual = run(target, params, state, jax.tree.map(jnp.asarray, gradients))
    np.testing.assert_allclose(actual["kernel"], weights.transpose(0, 2, 1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(actual["bias"], biases, rtol=0, atol=1e-10)


def test_missing_buffers_are_started_by_the_documented_rule(x64):
    """Recomputed here from the formulas of the listings, at the 20th step."""
    source, params = optax.adam(LR, b1=0.8, b2=0.99), normal_tree(dtype=np.float64)
    params["scale"] = jnp.zeros(2)
    gradients = [g | {"scale": jnp.array([0.0, 1.0])} for g in gradient_trees(20, np.float64)]
    params, state, _ = train(source, params, gradients)
    mu, nu = jax.tree.leaves(state[0].mu), jax.tree.leaves(state[0].nu)

    def moved(target, name):
        new = convert_state(state, source, target, params)
        assert int(optax.tree.get(new, "count")) == 20
        return jax.tree.leaves(optax.tree.get(new, name))

    correction = np.sqrt(1 - 0.99**20) / (1 - 0.8**20)
    released = adamod(LR, b1=0.8, b2=0.99, b3=0.9999)
    for rate, v in zip(moved(released, "rate_ema"), nu, strict=True):
        expected = np.where(v == 0, 0.0, LR * correction / (np.sqrt(v) + 1e-8))
        np.testing.assert_allclose(rate, expected, rtol=1e-10)
    paper = adamod(LR, b1=0.8, b2=0.99, convention="paper")
    for rate, v in zip(moved(paper, "rate_ema"), nu, strict=True):
        expected = np.where(v == 0, 0.0, LR / (np.sqrt(v / (1 - 0.99**20)) + 1e-8))
        np.testing.assert_allclose(rate, expected, rtol=1e-10)
    for maximum, v in zip(moved(amsgrad(LR, b1=0.8, b2=0.99), "nu_max"), nu, strict=True):
        np.testing.assert_allclose(maximum, v, rtol=1e-13)
    debiased = amsgrad(LR, b1=0.8, b2=0.99, convention="optax")
    for maximum, v in zip(moved(debiased, "nu_max"), nu, strict=True):
        np.testing.assert_allclose(maximum, v / (1 - 0.99**20), rtol=1e-13)
    both = diffmod(LR, b1=0.8, b2=0.99)
    assert_bit_equal(moved(both, "previous_gradient"), mu)
    assert np.all(np.asarray(moved(both, "rate_ema")[-1])[1:] > 0)


def test_a_warm_adamod_bounds_nothing_at_first_and_something_later():
    """Its average starts at the present rate, so that the update is Adam's until rates rise."""
    gradients = [jax.tree.map(lambda g: jnp.clip(g, -1, 1) + 0.1, g) for g in gradient_trees(20)]
    source, target, params = adam(LR, convention="keras"), adamod(LR), normal_tree()
    params, state, _ = train(source, params, gradients)
    warm = convert_state(state, source, target, params)
    large = jax.tree.map(lambda x: 10 * jnp.ones_like(x), params)  # so that the rates fall
    small = jax.tree.map(lambda x: 1e-3 * x, large)
    (_, adams), (_, bounded) = (
        train(o, params, [large, *[small] * 200], state=s)[2][-1]
        for o, s in ((source, state), (target, warm))
    )
    first = [
        train(o, params, [large], state=s)[2][0][1] for o, s in ((source, state), (target, warm))
    ]
    for a, e in zip(*map(jax.tree.leaves, first), strict=True):
        np.testing.assert_allclose(a, e, rtol=1e-4)
    ratio = np.concatenate(
        [np.ravel(b / a) for a, b in zip(*map(jax.tree.leaves, (adams, bounded)), strict=True)]
    )
    assert np.all(ratio <= 1 + 1e-5)


def test_a_new_lookahead_starts_at_its_beginning():
    params = normal_tree()
    source, target = adam(LR), lookahead(adam(LR))
    _, state, _ = train(source, params, [normal_tree(1)])
    moved = convert_state(state, source, target, params)
    assert_bit_equal(moved.slow, params)
    assert int(moved.count) == 0  # so that its first pull is a whole period away
    assert int(moved.inner_state[0].count) == 1


def test_what_would_be_lost_or_guessed_is_refused():
    x = {"w": jnp.ones(3)}
    rms, torchs = optax.rmsprop(LR), rmsprop(LR, momentum=0.9)
    optaxs = optax.rmsprop(LR, momentum=0.9)
    for message, source, target, count in [
        ("no place for rate_ema, which would be lost", adamod(LR), adam(LR), None),
        ("has no place for mu", optax.adam(LR), rmsprop(LR), None),
        ("needs mu, which cannot be derived from nu", rms, adam(LR), 1),
        ("momentum_product, which cannot be", optax.nadam(LR), nadam(LR), None),
        ("does not say how many gradients it has seen: give count=", rms, rmsprop(LR), None),
        ("'nu_max' means something else .* there by .* debias, ams", optax.amsgrad(LR), amsgrad(LR),
         None),
        ("'velocity' means something else in rmsprop than in chain", optaxs, torchs, 1),
    ]:  # fmt: skip
        state = source.update(x, source.init(x), x)[1]
        with pytest.raises(ValueError, match=message):
            convert_state(state, source, target, x, count=count)
    with pytest.raises(ValueError, match="the state is not one of the source, chain"):
        convert_state(adam(LR).init(x), optax.amsgrad(LR), adam(LR), x)
    with pytest.raises(ValueError, match=r"\['w'\] has shape \(4,\), it should be \(3,\)"):
        convert_state(adam(LR).init({"w": jnp.ones(4)}), adam(LR), adam(LR), x)


def test_a_torch_state_that_does_not_fit_is_refused():
    params = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(3)}

    def entry(shape, step=1, **more):
        return {"step": step, "exp_avg": np.ones(shape), "exp_avg_sq": np.ones(shape), **more}

    def saved(a=None, b=None):
        state = {0: entry((2, 3)) if a is None else a, 1: entry(3) if b is None else b}
        return {"state": state, "param_groups": [{"params": [0, 1]}]}

    names = {"a": 0, "b": 1}
    good = import_torch_state(saved(), adam(LR), params, names)
    assert int(good[0].count) == 1
    for message, args, kwargs in [
        ("names does not say what 'b' is called", (saved(), adam(LR), params, {"a": 0}), {}),
        ("no state of parameter 7", (saved(), adam(LR), params, {"a": 0, "b": 7}), {}),
        ("'bias' is not among the names", (saved(), adam(LR), params, {"a": 0, "b": "bias"}), {}),
        (r"exp_avg of 'a' has shape \(3, 2\)", (saved(entry((3, 2))), adam(LR), params, names), {}),
        ("one number of gradients", (saved(b=entry(3, step=2)), adam(LR), params, names), {}),
        ("that of the states 1", (saved(), adam(LR), {"a": params["a"]}, {"a": 0}), {}),
        ("'ema' is not a buffer", (saved(b=entry(3, ema=np.ones(3))), adam(LR), params, names), {}),
        ("only 1 of 2 parameters have 'nu_max'",
         (saved(b=entry(3, max_exp_avg_sq=np.ones(3))), amsgrad(LR), params, names), {}),
        ("no place for mu", (saved(), rmsprop(LR), params, names), {}),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            import_torch_state(*args, **kwargs)
