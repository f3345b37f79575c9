"""How far weights see one another is read off the update, whatever it is called."""

from __future__ import annotations

import math
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import (
    EVERY_CONVENTION,
    PER_TENSOR,
    REPRESENTATIVE,
    broadly,
    gradient_trees,
    normal_tree,
)
from devices import mesh_of, whole

import adaptive_opt
from adaptive_opt import Packing, adam, low_memory, skip_nonfinite, stage, telemetry, zero1
from adaptive_opt.core.reach import counts_as_per_weight, reach
from adaptive_opt.core.stage import STAGES

SHAPES = {"vector": (257,), "matrix": (131, 129), "convolution": (3, 5, 7), "small": (11, 13)}
"""Of distinct sizes and ranks; a matrix is large enough for second moments to be factored."""
PARAMS = {k: jax.ShapeDtypeStruct(shape, jnp.float32) for k, shape in SHAPES.items()}
ROWS = {
    k: jax.ShapeDtypeStruct((*[1] * (p.ndim - 1), math.ceil(p.size / 128) * 128), p.dtype)
    for k, p in PARAMS.items()
}
"""As zero1 has them."""


def found(optimizer):
    return reach(optimizer, PARAMS, ROWS)


# --- stages of one's own --------------------------------------------------------------------------


def of_direction(name, function):
    """A stage of that name that replaces the direction of each leaf by a function of it."""

    def own():
        return lambda step: step.set(direction=function(step.direction))

    own.__name__ = name
    return adaptive_opt.adaptive(adaptive_opt.first_moment(0.9), stage(own)())


def by_norm(d):
    return d / jnp.maximum(1.0, jnp.linalg.norm(d))


def orthogonalized(d):
    if d.ndim != 2:
        return d
    x = d / (jnp.linalg.norm(d) + 1e-7)
    for _ in range(3):
        x = 1.5 * x - 0.5 * (x @ x.T) @ x
    return x


OWN = {
    "its norm": (by_norm, "reduce_sum"),
    "orthogonal": (orthogonalized, "transpose|reduce_sum|dot_general"),
    "its size": (lambda d: d / d.size**0.5, "a size, rank or path"),
    "its size by branch": (lambda d: d if d.size > 200 else 2 * d, "a size, rank or path"),
    "its count": (lambda d: d / jnp.ones_like(d).sum(), "reduce_sum|a size, rank or path"),
    "its place": (lambda d: d * jnp.arange(d.size).reshape(d.shape), "iota"),
    "its neighbour": (lambda d: d + jnp.roll(d, 1), "concatenate|reshape|slice|gather"),
    "its order": (lambda d: jnp.sort(d, axis=None).reshape(d.shape), "sort|reshape"),
    "its running sum": (lambda d: jnp.cumsum(d, axis=-1), "cumsum"),
    "its first": (lambda d: d * d.reshape(-1)[0], "reshape|slice|gather"),
    "its mean in a jit": (jax.jit(lambda d: d - d.mean()), "reduce_sum"),
    "a scan": (
        lambda d: jax.lax.scan(lambda c, x: (c + x, c), 0 * d[0], d)[1],
        "slice|squeeze|scan",
    ),
    "a branch on a sum": (
        lambda d: jax.lax.cond(d.sum() > 0, lambda: d, lambda: 2 * d),
        "reduce_sum",
    ),
}


@pytest.mark.parametrize("name", OWN)
def test_a_stage_called_clip_that_looks_further_is_refused_with_the_operation(name):
    """Only the function of the leaf tells it from optax.clip."""
    function, operation = OWN[name]
    optimizer = of_direction("clip", function)
    params = normal_tree(shapes=SHAPES)
    with pytest.raises(ValueError, match=rf"{operation}.* zero1\(inner, mesh, elementwise=True\)"):
        zero1(optimizer, mesh_of()).init(params)
    assert zero1(optimizer, mesh_of(), elementwise=True).init(params)
    with pytest.raises(ValueError, match=r"not known to treat every weight.*elementwise=True"):
        Packing(params).optimizer(optimizer)


PER_WEIGHT = {
    "clipped": lambda d: jnp.clip(d, -1, 1),
    "jit in jit": jax.jit(lambda d: jax.jit(jnp.copy)(d) + jax.nn.softplus(d)),
    "a derivative of its own": jax.nn.relu,
    "squeezed": lambda d: jnp.tanh(d[..., None])[..., 0:1].reshape(d.shape),
    "remembered branch": lambda d: jax.lax.platform_dependent(d, cpu=jnp.copy, default=jnp.copy),
}


@pytest.mark.parametrize("name", PER_WEIGHT)
def test_a_stage_that_looks_at_one_weight_is_accepted(name):
    optimizer = of_direction("its own", PER_WEIGHT[name])
    assert found(optimizer).scope == "weight"
    params = normal_tree(shapes=SHAPES)
    assert zero1(optimizer, mesh_of()).init(params)
    assert Packing(params).optimizer(optimizer)


def test_caution_which_differed_by_more_than_1_is_refused(example):
    own_stage = example("own_stage")
    optimizer = own_stage.adam(1.0, own_stage.cautious())
    params = normal_tree(shapes={"w": (17, 9)})
    with pytest.raises(ValueError, match=r"but cautious \(reduce_sum\) lets.*a tensor.*in front"):
        zero1(optimizer, mesh_of()).init(params)
    with pytest.raises(ValueError, match=r"cautious is not known.*\(reduce_sum\)"):
        Packing(params | {"b": jnp.ones(3), "c": jnp.ones(4)}).optimizer(optimizer)


def test_leaves_that_mix_are_a_tree():
    def update(updates, state, params=None):
        return jax.tree.map(lambda g: g * updates["scale"], updates), state

    mixed = optax.GradientTransformation(optax.identity().init, update)
    shapes = {
        "w": jax.ShapeDtypeStruct((3, 5), jnp.float32),
        "scale": jax.ShapeDtypeStruct((), "f"),
    }
    result = reach(mixed, shapes, shapes)
    assert (result.scope, result.operation) == ("tree", "mul")
    assert result.place == "test_leaves_that_mix_are_a_tree"  # the function that made it

    def swapped(updates, state, params=None):
        return {"a": updates["b"], "b": updates["a"]}, state

    two = dict.fromkeys("ab", PARAMS["vector"])
    swap = optax.GradientTransformation(optax.identity().init, swapped)
    assert reach(swap, two, two).scope == "tree"


def test_what_is_remembered_of_others_counts():
    """The first update is per weight; the second is not."""

    def update(updates, state, params=None):
        return jax.tree.map(lambda g: g * state, updates), jnp.sum(updates["vector"])

    late = optax.GradientTransformation(lambda _: jnp.ones(()), update)
    result = found(late)
    assert (result.scope, result.operation, result.only_seen) == ("tree", "reduce_sum", False)


# --- what is known --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", broadly(REPRESENTATIVE, EVERY_CONVENTION))
def test_recipes_are_per_weight_but_for_those_that_say_so(name):
    result = found(EVERY_CONVENTION[name](1e-2))
    wider = {
        "rmsprop of the tree": ("tree", "second_moment"),
        "ranger": ("tensor", "centralize"),
        "muon": ("tensor", "orthogonalize"),
        "soap": ("tensor", "eigenbasis"),
        "adamh": ("tensor", "hyperball"),
    }
    own = name.split(" (")[0]
    if own in PER_TENSOR:
        assert result.scope == "tensor"
        assert result.place in STAGES or result.place in adaptive_opt.__all__
        return
    assert (result.scope, result.place) == wider.get(own, ("weight", ""))
    assert result.is_cut_freely == (own not in ("ranger", "muon", "soap", "adamh"))


def by_rank(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def steps_of(optimizer):
    return optax.MultiSteps(optimizer, 4).gradient_transformation()


OF_OPTAX = {
    "weight": {
        "adam": optax.adam(1e-3),
        "adamw with a mask": optax.adamw(1e-3, mask=by_rank),
        "adan": optax.adan(1e-3),
        "adabelief": optax.adabelief(1e-3),
        "adadelta": optax.adadelta(1e-3),
        "adagrad": optax.adagrad(1e-3),
        "adamax": optax.adamax(1e-3),
        "amsgrad": optax.amsgrad(1e-3),
        "lion": optax.lion(1e-3),
        "nadamw": optax.nadamw(1e-3),
        "radam": optax.radam(1e-3),
        "rmsprop": optax.rmsprop(1e-3, centered=True, momentum=0.9),
        "rprop": optax.rprop(1e-3),
        "yogi": optax.yogi(1e-3),
        "sgd with a table": optax.sgd(optax.piecewise_interpolate_schedule("linear", 1, {9: 0.1})),
        "sign_sgd": optax.sign_sgd(1e-3),
        "optimistic": optax.optimistic_gradient_descent(1e-3),
        "clip": optax.clip(1.0),
        "ema": optax.ema(0.9),
        "trace": optax.trace(0.9),
        "add_decayed_weights": optax.add_decayed_weights(0.1),
        "keep_params_nonnegative": optax.keep_params_nonnegative(),
        "set_to_zero": optax.set_to_zero(),
        "inject_hyperparams": optax.inject_hyperparams(optax.adamw)(1e-3),
        "MultiSteps": steps_of(optax.adam(1e-3)),
        "masked": optax.masked(optax.trace(0.9), by_rank),
        "partition": optax.partition({True: optax.adam(1.0), False: optax.sgd(1.0)}, by_rank),
        "conditionally_transform": optax.conditionally_transform(optax.trace(0.9), lambda n: n > 3),
        "ademamix": optax.contrib.ademamix(1e-3),
        "schedule_free": optax.contrib.schedule_free_adamw(1e-3),
        "reduce_on_plateau": optax.chain(optax.adam(1e-3), optax.contrib.reduce_on_plateau()),
    },
    "tensor": {
        "centralize": optax.centralize(),
        "clip_by_block_rms": optax.clip_by_block_rms(1.0),
        "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
        "scale_by_trust_ratio": optax.lamb(1e-3),
        "scale_by_param_block_norm": optax.scale_by_param_block_norm(),
        "scale_by_param_block_rms": optax.scale_by_param_block_rms(),
        "scale_by_factored_rms": optax.adafactor(1e-3),
        "scale_by_novograd": optax.novograd(1e-3),
        "scale_by_sm3": optax.sm3(1e-3),
        "scale_by_muon": optax.contrib.muon(1e-3),
        "add_noise": optax.add_noise(0.1, 0.1, jax.random.key(0)),
        "zero_nans": optax.zero_nans(),
    },
    "tree": {
        "clip_by_global_norm": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3)),
        "normalize_by_update_norm": optax.normalize_by_update_norm(),
        "scale_by_polyak": optax.polyak_sgd(),
        "apply_if_finite": optax.apply_if_finite(optax.sgd(0.1), 3),
        "flatten": optax.flatten(optax.adam(1e-3)),
        "prodigy": optax.contrib.prodigy(),
        "": optax.lbfgs(),
    },
}
CUT_FREELY = {
    "clip_by_global_norm", "normalize_by_update_norm", "scale_by_polyak", "apply_if_finite",
    "scale_by_novograd",  # one number for a tensor, wherever it is cut, as long as it is whole
}  # fmt: skip


@pytest.mark.parametrize(
    ("scope", "name"), [(scope, name) for scope, table in OF_OPTAX.items() for name in table]
)
def test_transformations_of_optax(scope, name):
    result = found(OF_OPTAX[scope][name])
    assert (result.scope, result.place) == (scope, "" if scope == "weight" else name)
    assert result.is_cut_freely == (scope == "weight" or name in CUT_FREELY)


def test_what_cannot_be_traced_is_unknown():
    result = found(optax.lbfgs())
    assert (result.scope, result.is_cut_freely) == ("tree", False)
    assert "its trace on shapes ends in TypeError" in str(result)


def test_observers_are_only_seen_in_the_state():
    result = found(adam(1e-3, observers=telemetry()))
    assert (result.scope, result.place, result.only_seen) == ("tree", "telemetry", True)


def test_an_exception_is_declared_where_it_lives():
    for storage in ("bfloat16", "8-bit"):
        result = found(low_memory(adam(1e-3), storage))
        assert (result.scope, result.has_exceptions) == ("weight", True)
    assert found(low_memory(optax.lamb(1e-3))).place == "scale_by_trust_ratio"
    declared = of_direction("own", counts_as_per_weight(by_norm))
    assert found(declared).scope == "weight"
    assert found(optax.chain(declared, of_direction("own", by_norm))).scope == "tensor"


def test_packing_takes_sums_to_which_padding_adds_nothing():
    params = normal_tree(shapes=SHAPES)
    packing = Packing(params)
    for accepted in (
        optax.clip_by_global_norm(1.0),
        optax.normalize_by_update_norm(),
        adaptive_opt.rmsprop(1e-3, scope="tree"),
        skip_nonfinite(adam(1e-3)),
        optax.apply_if_finite(adam(1e-3), 3),
    ):
        assert packing.optimizer(accepted)

    def shifted(updates, state, params=None):
        total = sum(jnp.sum(g + 1) for g in jax.tree.leaves(updates))
        return jax.tree.map(lambda g: g * total, updates), state

    mean = adaptive_opt.adaptive(
        adaptive_opt.second_moment(0.9, scope="tree", reduce="mean"),
        adaptive_opt.per_weight_rate(1e-8),
    )
    for refused in (
        mean,
        adaptive_opt.rmsprop(1e-3, scope="tensor"),
        optax.GradientTransformation(optax.identity().init, shifted),
    ):
        with pytest.raises(ValueError, match="not known to treat every weight by itself"):
            packing.optimizer(refused)


def test_zero1_with_the_callers_word_is_what_it_was():
    mesh = mesh_of()
    params = whole(normal_tree(shapes={"w": (17, 9)}), mesh)
    optimizer = zero1(optax.chain(adam(0.1), optax.zero_nans()), mesh, elementwise=True)
    state, plain = optimizer.init(params), adam(0.1)
    right = plain.init(params)
    for gradient in gradient_trees(3, shapes={"w": (17, 9)}):
        updates, state = jax.jit(optimizer.update)(gradient, state, params)
        expected, right = plain.update(gradient, right, params)
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-5, atol=1e-7)


def test_a_traced_learning_rate_and_a_mesh_around_change_nothing():
    params = normal_tree(shapes={"w": (17, 9)})
    mesh = mesh_of()

    @jax.jit
    def init(learning_rate):
        return zero1(adam(learning_rate), mesh).init(params)

    with jax.set_mesh(mesh):
        assert init(0.1)[0].mu["w"].shape == (1, 256)
    with pytest.raises(ValueError, match=r"scale_by_trust_ratio \(reduce_sum\)"):
        jax.jit(lambda rate: zero1(optax.lamb(rate), mesh).init(params))(0.1)


def test_a_hundred_leaves_take_seconds_at_most():
    params = {str(i): jax.ShapeDtypeStruct((8, 4), jnp.float32) for i in range(100)}
    start = time.perf_counter()
    assert reach(adaptive_opt.adamod(1e-3), params, params).scope == "weight"
    assert time.perf_counter() - start < 20
