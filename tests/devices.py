"""What the tests on many devices share: a problem, layouts, all recipes in one program."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import FEWER, PER_TENSOR, RECIPES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

STEPS, BATCH = 4, 16
SHAPES = {"first": (8, 16), "bias": (16,), "second": (16, 8), "scale": ()}
FULLY_SHARDED = {"first": P("data"), "bias": P("data"), "second": P("data"), "scale": P()}
TENSOR_PARALLEL = {
    "first": P(None, "model"), "bias": P("model"), "second": P("model", None), "scale": P(),
}  # fmt: skip
LAYOUTS = {
    "data parallel": ((8,), ("data",), dict.fromkeys(SHAPES, P())),
    "fully sharded": ((8,), ("data",), FULLY_SHARDED),
    "tensor parallel": ((2, 4), ("data", "model"), TENSOR_PARALLEL),
}
KINDS = (AxisType.Auto, AxisType.Explicit)

OPTIMIZERS = {name: recipe(1e-2) for name, recipe in RECIPES.items()}
WITH_SUMS = ("rmsprop of the tree", "ranger", *PER_TENSOR)
"""Not elementwise: one rate for the tree; gradients less their mean; norms of tensors; matrices."""
ELEMENTWISE = {name: o for name, o in OPTIMIZERS.items() if name not in WITH_SUMS}
FEW = *FEWER, "lamb"


def by_hand(optimizers):
    """Those for shard_map and pmap, where every device has the whole tree."""
    told = {name: {"axis_name": ()} for name in ("rmsprop of the tree", *PER_TENSOR)}
    return {name: RECIPES[name](1e-2, **told.get(name, {})) for name in optimizers}


def draw(seed, size=lambda shape: 1.0, shapes=SHAPES):
    """Arrays in float64."""
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal(s) * size(s) for k, s in shapes.items()}


def parameters():
    return draw(0, lambda shape: 0.4)


def batches():
    return [tuple(np.random.default_rng(i).standard_normal((2, BATCH, 8))) for i in range(STEPS)]


def gradients(shapes=SHAPES):
    """Of sizes from 1e-6 to 1e3."""
    sizes = np.random.default_rng(1)
    return [draw(i, lambda shape: 10 ** sizes.uniform(-6, 3, shape), shapes) for i in range(STEPS)]


def mesh_of(shape=(8,), axes=("data",), kind=AxisType.Auto):
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, axes, axis_types=(kind,) * len(axes), devices=devices)


def put(tree, mesh, specs):
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, specs)


def whole(tree, mesh):
    return jax.device_put(tree, NamedSharding(mesh, P()))


def on_every_device(tree):
    """The same for each of 8 devices, as pmap takes it."""
    stacked = jax.tree.map(lambda x: np.broadcast_to(x, (8, *np.shape(x))), tree)
    return jax.pmap(lambda x: x)(stacked)


def init_all(optimizers, init, params):
    return {name: init(optimizer, params) for name, optimizer in optimizers.items()}


def update_all(optimizers, gradients, state, params):
    """A step of every optimizer in one program, for compilation is what takes the time.

    Gradients and parameters are those of all, or each its own.
    """

    def own(tree, name):
        return tree.get(name, tree)

    pairs = {
        name: optimizer.update(own(gradients, name), state[name], own(params, name))
        for name, optimizer in optimizers.items()
    }
    return {n: u for n, (u, _) in pairs.items()}, {n: s for n, (_, s) in pairs.items()}


def loss_of(params, batch, dot=jnp.matmul):
    x, y = batch
    hidden = jnp.tanh(jnp.matmul(x, params["first"]) + params["bias"])
    return jnp.mean((dot(hidden, params["second"]) * params["scale"] - y) ** 2)


def train_all(optimizers, params, state, batch, loss=loss_of, reduce=lambda gradients: gradients):
    """A training step of every optimizer, each with parameters of its own."""
    found = reduce({name: jax.grad(loss)(params[name], batch) for name in optimizers})
    updates, state = update_all(optimizers, found, state, params)
    return optax.apply_updates(params, updates), state


def loss_on(mesh, layout):
    """The loss as it must be written for a mesh: one with explicit axes asks where sums go."""
    if AxisType.Auto in mesh.axis_types:
        return loss_of

    def loss(params, batch):
        if layout == "fully sharded":
            params = jax.tree.map(lambda p: jax.sharding.reshard(p, P()), params)
        return loss_of(params, batch, functools.partial(jnp.matmul, out_sharding=P("data", None)))

    return loss
