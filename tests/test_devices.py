"""On 8 devices every recipe trains as on one, and its state is where the parameters are."""

from __future__ import annotations

import functools
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import broadly
from devices import (
    FEW,
    FULLY_SHARDED,
    KINDS,
    LAYOUTS,
    OPTIMIZERS,
    WITH_SUMS,
    batches,
    by_hand,
    init_all,
    loss_of,
    loss_on,
    mesh_of,
    on_every_device,
    parameters,
    put,
    train_all,
    whole,
)
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adamw,
    adaptive,
    diffgrad,
    init_sharded,
    per_weight_rate,
    second_moment,
    state_shardings,
)

BITS = pathlib.Path(__file__).with_name("bits_on_devices.py")


@pytest.fixture(scope="module", params=["few", pytest.param("all", marks=pytest.mark.slow)])
def optimizers(request):
    """How gradients come together is one matter, and what a recipe makes of them another: that is
    compared bit for bit, below."""
    return OPTIMIZERS if request.param == "all" else {name: OPTIMIZERS[name] for name in FEW}


@pytest.fixture(scope="module")
def one_device(optimizers):
    """Parameters and state after training on one device."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, parameters())
        state = init_all(optimizers, lambda o, p: o.init(p), params)
        step = jax.jit(functools.partial(train_all, optimizers))
        return train(step, dict.fromkeys(optimizers, params), state)


def train(step, params, state, put_batch=lambda batch: batch):
    for batch in batches():
        params, state = step(params, state, put_batch(batch))
    return params, state


def check(actual, expected):
    for part, right in zip(actual, expected, strict=True):
        for name in part:
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9),
                part[name],
                right[name],
            )


@pytest.mark.parametrize("kind", KINDS, ids=["automatic", "explicit"])
@pytest.mark.parametrize("layout", broadly([*LAYOUTS][-1:], LAYOUTS))
def test_jit_with_named_shardings_equals_one_device(kind, layout, optimizers, one_device):
    shape, axes, specs = LAYOUTS[layout]
    mesh = mesh_of(shape, axes, kind)
    with jax.enable_x64(True), jax.set_mesh(mesh):
        params = put(parameters(), mesh, specs)
        state = init_all(optimizers, init_sharded, params)
        for buffers in (state["adamw"][0].mu, state["diffmod"][0].buffers["rate_ema"]):
            assert jax.tree.map(lambda x: x.sharding.spec, buffers) == specs
        start = dict.fromkeys(optimizers, params), state
        step = jax.jit(
            functools.partial(train_all, optimizers, loss=loss_on(mesh, layout)),
            out_shardings=jax.tree.map(lambda x: x.sharding, start),
        )
        result = train(step, *start, lambda batch: put(batch, mesh, (P("data"), P("data"))))
    check(result, one_device)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_equals_one_device(check_vma, optimizers, one_device):
    mesh, theirs = mesh_of(), by_hand(optimizers)

    def mean(gradients):
        if check_vma:  # jax.grad of replicated parameters has added them up
            return jax.tree.map(lambda g: g / 8, gradients)
        return jax.lax.pmean(gradients, "data")

    step = jax.shard_map(
        functools.partial(train_all, theirs, reduce=mean),
        mesh=mesh,
        in_specs=(P(), P(), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    with jax.enable_x64(True):
        params = whole(parameters(), mesh)
        state = init_all(theirs, init_sharded, params)
        check(train(jax.jit(step), dict.fromkeys(theirs, params), state), one_device)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_sharded_parameters_equals_one_device(check_vma, optimizers, one_device):
    """Fully sharded by hand: weights are gathered for the loss, gradients come back scattered."""
    mesh = mesh_of()
    elementwise = {name: o for name, o in optimizers.items() if name not in WITH_SUMS}

    def loss(params, batch):
        gathered = {
            k: p if k == "scale" else jax.lax.all_gather(p, "data", tiled=True)
            for k, p in params.items()
        }
        return loss_of(gathered, batch) / 8

    def add_up(gradients):
        if not check_vma:
            for own in gradients.values():
                own["scale"] = jax.lax.psum(own["scale"], "data")
        return gradients

    with jax.enable_x64(True):
        params = put(parameters(), mesh, FULLY_SHARDED)
        state = init_all(elementwise, init_sharded, params)
        specs = (
            dict.fromkeys(elementwise, FULLY_SHARDED),
            init_all(elementwise, lambda o, p: state_shardings(o, p, FULLY_SHARDED), params),
        )
        step = jax.shard_map(
            functools.partial(train_all, elementwise, loss=loss, reduce=add_up),
            mesh=mesh,
            in_specs=(*specs, P("data")),
            out_specs=specs,
            check_vma=check_vma,
        )
        check(train(jax.jit(step), dict.fromkeys(elementwise, params), state), one_device)


def test_pmap_with_replicated_state_equals_one_device(optimizers, one_device):
    theirs = by_hand(optimizers)
    step = jax.pmap(
        functools.partial(train_all, theirs, reduce=lambda g: jax.lax.pmean(g, "data")),
        axis_name="data",
    )
    with jax.enable_x64(True):
        params = on_every_device(parameters())
        state = jax.pmap(lambda p: init_all(theirs, lambda o, p: o.init(p), p))(params)
        result = train(
            step,
            dict.fromkeys(theirs, params),
            state,
            lambda batch: [x.reshape(8, -1, 8) for x in batch],
        )
    result = jax.tree.map(np.asarray, result)
    for leaf in jax.tree.leaves(result):
        assert leaf.shape[0] == 8
        assert (leaf == leaf[:1]).all()
    check(jax.tree.map(lambda x: x[0], result), one_device)


@pytest.mark.broad
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the flag is for x86")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_given_the_same_gradients_elementwise_recipes_are_bit_equal(which):
    """In a process of its own, for code without fused multiply-add: whether ``a * b + c`` is
    rounded once or twice otherwise depends on how XLA cuts an array of this size into loops."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa=AVX"
    if which == "not slow":
        flags += " --xla_backend_optimization_level=0"  # compiles in half the time
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", which, str(BITS)],
        env=os.environ | {"XLA_FLAGS": flags},
        cwd=BITS.parent.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.returncode == 0, found.stdout[-4000:]


PARAMS = {"kernel": (16, 8), "square": (8, 8), "bias": (8,)}
SPECS = {"kernel": P("data", "model"), "square": P("data", None), "bias": P("model")}


def specs_of(optimizer, spec=SPECS):
    params = {k: jnp.zeros(s) for k, s in PARAMS.items()}
    return optimizer.init(params), state_shardings(optimizer, params, spec)


def test_a_leaf_of_the_state_is_split_like_its_parameter_and_the_rest_is_whole():
    _, (adam_specs, _) = specs_of(adam(1e-3))
    assert adam_specs.mu == adam_specs.nu == SPECS
    assert adam_specs.count == P()
    for scope in ("tensor", "tree"):
        rule = adaptive(second_moment(0.9, scope=scope), per_weight_rate(1e-8))
        state, specs = specs_of(rule)
        assert set(jax.tree.leaves(specs)) == {P()}
        assert jax.tree.structure(specs) == jax.tree.structure(state)


def test_missing_dimensions_and_dimensions_of_size_one_leave_the_others_split():
    def init(params):
        return {
            "rows": jax.tree.map(lambda p: p[..., 0], params),
            "first": jax.tree.map(lambda p: p[:1], params),
            "memory": jax.tree.map(lambda p: jnp.zeros((3, *p.shape)), params),
            "none": jax.tree.map(lambda p: jnp.zeros(5), params),
            "several": jax.tree.map(lambda p: [p, jnp.zeros(())], params),
        }

    _, specs = specs_of(optax.GradientTransformation(init, None))
    # Which of the two dimensions of the square one is left cannot be seen.
    assert specs["rows"] == {"kernel": P("data"), "square": P(), "bias": P()}
    assert specs["first"] == {"kernel": P(None, "model"), "square": P(None, None), "bias": P(None)}
    assert specs["memory"]["kernel"] == P(None, "data", "model")
    assert set(specs["none"].values()) == {P()}
    assert specs["several"]["bias"] == [P("model"), P()]


OTHERS = {
    "optax.adafactor": optax.adafactor(1e-3),
    "optax.lbfgs": optax.lbfgs(),
    "optax.sm3": optax.sm3(1e-3),
    "optax.contrib.muon": optax.contrib.muon(1e-3),
    "optax.contrib.schedule_free_adamw": optax.contrib.schedule_free_adamw(1e-3),
    "optax.inject_hyperparams": optax.inject_hyperparams(optax.adam)(1e-3),
    "optax.MultiSteps": optax.MultiSteps(adamw(1e-3), 2),
    "optax.masked": optax.masked(adam(1e-3), {"kernel": True, "square": False, "bias": True}),
    "ParameterGroups": ParameterGroups(
        [Group("bias", weight_decay=0.0), Group("square", freeze=True)], default=Group()
    ).optimizer(adamw, learning_rate=1e-3),
}


@pytest.mark.parametrize("kind", KINDS, ids=["automatic", "explicit"])
def test_init_sharded_is_init_elsewhere_for_any_transformation(kind):
    mesh = mesh_of((4, 2), ("data", "model"), kind)
    params = put({k: jnp.ones(s) for k, s in PARAMS.items()}, mesh, SPECS)
    sharding_of_shape = {(16, 8): SPECS["kernel"], (8, 8): SPECS["square"]}
    for optimizer in OTHERS.values():
        state = init_sharded(optimizer, params)
        plain = optimizer.init(jax.tree.map(np.asarray, params))
        assert jax.tree.structure(state) == jax.tree.structure(plain)
        for leaf, right in zip(jax.tree.leaves(state), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(leaf, right)
            assert len(leaf.addressable_shards) == 8
            if leaf.shape in sharding_of_shape:
                wanted = NamedSharding(mesh, sharding_of_shape[leaf.shape])
                assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)


def test_jit_of_init_is_elsewhere_which_is_why_there_is_init_sharded():
    params = put(parameters(), mesh_of(), FULLY_SHARDED)
    assert len(jax.tree.leaves(jax.jit(adam(1e-3).init)(params))[0].addressable_shards) == 1
    for leaf in jax.tree.leaves(init_sharded(adam(1e-3), params)):
        assert len(leaf.addressable_shards) == 8


def test_parameters_on_a_single_device_get_their_state_there():
    third = jax.devices()[3]
    params = jax.device_put({"w": jnp.ones(3)}, third)
    for leaf in jax.tree.leaves(init_sharded(adam(1e-3), params)):
        assert leaf.sharding == SingleDeviceSharding(third)


def test_a_tree_without_parameters_has_a_state_too():
    assert init_sharded(adam(1e-3), {})[0].mu == {}


def test_parameters_without_a_common_mesh_are_refused():
    one, two = (jax.device_put(jnp.ones(3), d) for d in jax.devices()[:2])
    with pytest.raises(ValueError, match=r"'a'.*'b'.* are on different devices.*on one mesh"):
        init_sharded(adam(1e-3), {"a": one, "b": two})
    with pytest.raises(ValueError, match=r"'w'\] has no sharding \(ndarray\): put it"):
        init_sharded(adam(1e-3), {"w": np.ones(3)})
    with pytest.raises(ValueError, match="while tracing, give"):
        jax.jit(lambda p: init_sharded(adam(1e-3), p))(one)
    with pytest.raises(ValueError, match="all NamedSharding or all PartitionSpec"):
        specs_of(adam(1e-3), SPECS | {"bias": NamedSharding(mesh_of(), P())})


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_gradient_on_every_device_meets_parameters_that_are_split(kind):
    """diffGrad keeps the gradient, which is no more of the kind of its buffer."""
    mesh, optimizer = mesh_of((8,), ("data",), kind), diffgrad(1e-3)
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    with jax.set_mesh(mesh):
        params = jax.device_put(jnp.ones(16), split)
        gradient = jax.device_put(jnp.full(16, 0.5), everywhere)
        updates, state = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    alone, _ = optimizer.update(jnp.full(16, 0.5), optimizer.init(jnp.ones(16)))
    np.testing.assert_allclose(updates, alone, rtol=1e-6)
    assert (np.asarray(optax.tree.get(state, "previous_gradient")) == 0.5).all()


def test_a_mean_over_devices_meets_a_buffer_of_their_own():
    optimizer = diffgrad(1e-3)

    def update(gradient, params):
        gradient = jax.lax.pmean(gradient, "data")
        return optimizer.update(gradient, optimizer.init(params), params)[0]

    by_hand = jax.shard_map(
        update, mesh=mesh_of((8,)), in_specs=(P("data"), P("data")), out_specs=P("data")
    )
    updates = jax.jit(by_hand)(jnp.arange(8.0), jnp.ones(8))
    alone, _ = optimizer.update(jnp.full(8, 3.5), optimizer.init(jnp.ones(8)))
    np.testing.assert_allclose(updates, alone, rtol=1e-6)
