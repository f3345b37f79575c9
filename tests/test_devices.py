"""On 8 devices every recipe does what it does on one."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import RECIPES, assert_bit_equal
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import adaptive_opt
from adaptive_opt import init_sharded, state_shardings

STEPS, BATCH = 4, 16
SHAPES = {"first": (8, 16), "bias": (16,), "second": (16, 8), "scale": ()}
NOT_ELEMENTWISE = ("rmsprop of the tree", "ranger")
"""One rate for the whole tree; gradients less their mean. Sums come in another order on a mesh."""

REPLICATED = dict.fromkeys(SHAPES, P())
FULLY_SHARDED = {"first": P("data"), "bias": P("data"), "second": P("data"), "scale": P()}
TENSOR_PARALLEL = {
    "first": P(None, "model"), "bias": P("model"), "second": P("model", None), "scale": P(),
}  # fmt: skip

OPTIMIZERS = {name: recipe(1e-2) for name, recipe in RECIPES.items()}
WHOLE_TREE = adaptive_opt.rmsprop(1e-2, scope="tree", axis_name=())
BY_HAND = OPTIMIZERS | {"rmsprop of the tree": WHOLE_TREE}
"""For shard_map and pmap, where every device holds the whole tree."""


@pytest.fixture(scope="module")
def problem():
    """Parameters, a batch for every step, and a gradient for every step, in float64."""
    rng = np.random.default_rng(0)

    def draw(size):
        return {k: rng.standard_normal(s) * size(s) for k, s in SHAPES.items()}

    params = draw(lambda shape: 0.4)
    batches = [tuple(rng.standard_normal((2, BATCH, 8))) for _ in range(STEPS)]
    gradients = [draw(lambda shape: 10 ** rng.uniform(-6, 3, shape)) for _ in range(STEPS)]
    return params, batches, gradients


def loss_of(params, batch, dot=jnp.matmul):
    x, y = batch
    hidden = jnp.tanh(jnp.matmul(x, params["first"]) + params["bias"])
    return jnp.mean((dot(hidden, params["second"]) * params["scale"] - y) ** 2)


def gradients_of(all_params, batch, loss=loss_of):
    return {name: jax.grad(loss)(params, batch) for name, params in all_params.items()}


def update_all(optimizers, gradients, state, params):
    """A step of every recipe in one program, for its compilation is what takes the time."""
    pairs = {
        name: optimizer.update(gradients[name], state[name], params[name])
        for name, optimizer in optimizers.items()
    }
    return {n: u for n, (u, _) in pairs.items()}, {n: s for n, (_, s) in pairs.items()}


@jax.jit
def apply(params, updates):
    return jax.tree.map(jnp.add, params, updates)


def run(problem, params, state, gradients_of, update, put_batch, put_gradient):
    """Updates, state and parameters after training, and those after the given gradients."""
    _, batches, given = problem
    results = []
    for end_to_end in (True, False):
        now = params, state
        for batch, gradient in zip(batches, given, strict=True):
            if end_to_end:
                gradients = gradients_of(now[0], put_batch(batch))
            else:
                gradients = dict.fromkeys(params, put_gradient(gradient))
            updates, new_state = update(gradients, now[1], now[0])
            now = apply(now[0], updates), new_state
        results.append((updates, now[1], now[0]))
    return results


def same(x):
    return x


@pytest.fixture(scope="module")
def one_device(problem):
    """On a mesh of one device, of either kind: XLA multiplies scalars first, ``x * a * b`` becomes
    ``x * (a * b)``, but not across the constraints of an explicit mesh."""
    results = {}
    for kind in (AxisType.Auto, AxisType.Explicit):
        mesh = jax.make_mesh((1,), ("data",), axis_types=(kind,), devices=jax.devices()[:1])
        whole = NamedSharding(mesh, P())
        with jax.enable_x64(True):
            params = dict.fromkeys(OPTIMIZERS, jax.device_put(problem[0], whole))
            state = {name: init_sharded(o, params[name]) for name, o in OPTIMIZERS.items()}
            results[kind] = run(
                problem,
                params,
                state,
                jax.jit(gradients_of),
                jax.jit(functools.partial(update_all, OPTIMIZERS)),
                lambda x, whole=whole: jax.device_put(x, whole),
                lambda x, whole=whole: jax.device_put(x, whole),
            )
    return results


def check(actual, expected, inexact=()):
    """1e-9 end to end; bit-equal given the gradients."""
    names = actual[0][0].keys()
    expected = [tuple({n: part[n] for n in names} for part in run) for run in expected]
    actual, expected = jax.tree.map(np.asarray, (actual, expected))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, 1e-9, 1e-9), actual, expected)
    for name in names - set(inexact):
        assert_bit_equal([x[name] for x in actual[1]], [y[name] for y in expected[1]])


LAYOUTS = {
    "data parallel": ((8,), ("data",), REPLICATED, ()),
    "fully sharded": ((8,), ("data",), FULLY_SHARDED, NOT_ELEMENTWISE),
    "tensor parallel": ((2, 4), ("data", "model"), TENSOR_PARALLEL, NOT_ELEMENTWISE),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["automatic", "explicit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_jit_with_named_shardings_equals_one_device(kind, layout, problem, one_device):
    shape, axes, specs, inexact = LAYOUTS[layout]
    mesh = jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes))

    def loss(params, batch):
        if kind == AxisType.Auto:
            return loss_of(params, batch)
        if layout == "fully sharded":
            params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
        return loss_of(
            params, batch, functools.partial(jnp.matmul, out_sharding=P("data", None))
        )

    def put(tree, specs):
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)

    with jax.enable_x64(True), jax.set_mesh(mesh):
        placed = put(problem[0], specs)
        params = dict.fromkeys(OPTIMIZERS, placed)
        state = {name: init_sharded(o, placed) for name, o in OPTIMIZERS.items()}
        for buffers in (state["adam"][0].mu, state["diffmod"][0].buffers["rate_ema"]):
            assert jax.tree.map(lambda x: x.sharding.spec, buffers) == specs
        results = run(
            problem,
            params,
            state,
            jax.jit(functools.partial(gradients_of, loss=loss)),
            jax.jit(
                functools.partial(update_all, OPTIMIZERS),
                out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
            ),
            lambda batch: put(batch, (P("data"), P("data"))),
            lambda gradient: put(gradient, specs),
        )
    check(results, one_device[kind], inexact)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_equals_one_device(check_vma, problem, one_device):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    by_hand = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma, out_specs=P())

    def mean_gradients(params, batch):
        gradients = gradients_of(params, batch)
        if check_vma:  # jax.grad of replicated parameters has added them up
            return jax.tree.map(lambda g: g / 8, gradients)
        return jax.lax.pmean(gradients, "data")

    with jax.enable_x64(True):
        placed = jax.device_put(problem[0], NamedSharding(mesh, P()))
        results = run(
            problem,
            dict.fromkeys(BY_HAND, placed),
            {name: init_sharded(o, placed) for name, o in BY_HAND.items()},
            jax.jit(by_hand(mean_gradients, in_specs=(P(), P("data")))),
            jax.jit(by_hand(functools.partial(update_all, BY_HAND), in_specs=P())),
            same,
            lambda gradient: jax.device_put(gradient, NamedSharding(mesh, P())),
        )
    check(results, one_device[AxisType.Auto])


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_with_sharded_parameters_equals_one_device(check_vma, problem, one_device):
    """Fully sharded by hand: weights are gathered for the loss, gradients come back scattered."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    elementwise = {name: o for name, o in OPTIMIZERS.items() if name not in NOT_ELEMENTWISE}

    def gradients(params, batch):
        def loss(params, batch):
            whole = {
                k: p if k == "scale" else jax.lax.all_gather(p, "data", tiled=True)
                for k, p in params.items()
            }
            return loss_of(whole, batch) / 8

        found = gradients_of(params, batch, loss)
        if not check_vma:
            for own in found.values():
                own["scale"] = jax.lax.psum(own["scale"], "data")
        return found

    def specs_of(make):
        return {name: make(o) for name, o in elementwise.items()}

    with jax.enable_x64(True):
        placed = {k: jax.device_put(v, NamedSharding(mesh, FULLY_SHARDED[k]))
                  for k, v in problem[0].items()}  # fmt: skip
        params = specs_of(lambda _: FULLY_SHARDED)
        state = specs_of(lambda o: state_shardings(o, placed, FULLY_SHARDED))
        by_hand = functools.partial(jax.shard_map, mesh=mesh, check_vma=check_vma)
        update = by_hand(
            functools.partial(update_all, elementwise),
            in_specs=(params, state, params),
            out_specs=(params, state),
        )
        results = run(
            problem,
            dict.fromkeys(elementwise, placed),
            specs_of(lambda o: init_sharded(o, placed)),
            jax.jit(by_hand(gradients, in_specs=(params, P("data")), out_specs=params)),
            jax.jit(update),
            same,
            same,
        )
    check(results, one_device[AxisType.Auto], NOT_ELEMENTWISE)


def test_pmap_with_replicated_state_equals_one_device(problem, one_device):
    def on_all(tree):
        return jax.tree.map(lambda x: np.broadcast_to(x, (8, *np.shape(x))), tree)

    def mean_gradients(params, batch):
        return jax.lax.pmean(gradients_of(params, batch), "data")

    with jax.enable_x64(True):
        params = dict.fromkeys(BY_HAND, on_all(problem[0]))
        init = jax.pmap(lambda params: {n: o.init(params[n]) for n, o in BY_HAND.items()})
        results = run(
            problem,
            params,
            init(params),
            jax.pmap(mean_gradients, axis_name="data"),
            jax.pmap(functools.partial(update_all, BY_HAND), axis_name="data"),
            lambda batch: [x.reshape(8, -1, 8) for x in batch],
            on_all,
        )
    for leaf in jax.tree.leaves(jax.tree.map(np.asarray, results)):
        assert leaf.shape[0] == 8
        assert (leaf == leaf[:1]).all()
    check(jax.tree.map(lambda x: np.asarray(x)[0], results), one_device[AxisType.Auto])
