"""What a step takes up is what XLA says; gradients are used as they come, unless they are held."""

from __future__ import annotations

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from adaptive_opt import adamw, clip_by_previous_norm, memory_plan, skip_spikes, train_step

LAYERS, WIDTH = 24, 192
X = jnp.ones((8, WIDTH))
MOST = 0.15
"""Of the parameters, what temporaries of unrolled layers may take up: some three layers' worth."""


def plain(optimizer):
    params = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS

    def loss(params, x):
        for kernel in params:
            x = jnp.tanh(x @ kernel)
        return jnp.mean(x**2)

    return train_step(loss, optimizer), params, jax.eval_shape(optimizer.init, params), X


class Stack(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        layers = [nnx.Linear(WIDTH, WIDTH, use_bias=False, rngs=rngs) for _ in range(LAYERS)]
        self.layers = nnx.List(layers)

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return jnp.mean(x**2)


def of_nnx(optimizer):
    model = Stack()
    holder = nnx.Optimizer(model, optimizer, wrt=nnx.Param)
    return train_step(lambda model, x: model(x), holder), model, holder, X


class Linen(linen.Module):
    @linen.compact
    def __call__(self, x):
        for _ in range(LAYERS):
            x = jnp.tanh(linen.Dense(WIDTH, use_bias=False)(x))
        return jnp.mean(x**2)


def of_linen(optimizer):
    model = Linen()
    state = TrainState.create(
        apply_fn=model.apply, params=model.init(jax.random.key(0), X)["params"], tx=optimizer
    )
    return train_step(lambda params, x: model.apply({"params": params}, x), optimizer), state, X


@pytest.mark.parametrize("home", [plain, of_nnx, of_linen])
def test_a_step_in_place_uses_every_gradient_as_it_comes(home):
    plan = memory_plan(*home(adamw(1e-3)))
    assert plan.count == LAYERS * WIDTH**2
    assert plan.per_parameter("params") == 4
    assert plan.per_parameter("state") == pytest.approx(8, rel=1e-4)
    assert plan.temporaries <= MOST * plan.params
    assert plan.results <= 1e-3 * plan.params


def test_the_norm_of_the_step_before_holds_no_gradient_back_and_that_of_this_one_holds_all():
    clips = {
        "before": clip_by_previous_norm(1.0),
        "this": optax.clip_by_global_norm(1.0),
    }
    parts = {}
    for name, clip in clips.items():
        plan = memory_plan(*plain(optax.chain(clip, adamw(1e-3))))
        parts[name] = plan.temporaries / plan.params
    assert parts["before"] <= MOST
    assert parts["this"] >= 1.0
    spikes = memory_plan(*plain(skip_spikes(adamw(1e-3))))
    assert spikes.temporaries >= spikes.params  # as its docstring says


def test_the_numbers_are_those_of_the_compiler():
    def step(params, state, x):
        return params + x, state * 2.0, x.sum()

    arguments = jnp.ones(1000), jnp.ones((2, 1000)), jnp.ones(1000)
    for donated in ((), (0, 1)):
        jitted = jax.jit(step, donate_argnums=donated)
        plan, own = memory_plan(jitted, *arguments), jitted.lower(*arguments).compile()
        xla = own.memory_analysis()
        assert (plan.count, plan.params, plan.state, plan.others) == (1000, 4000, 8000, 4000)
        assert plan.params + plan.state + plan.others == xla.argument_size_in_bytes
        assert plan.temporaries == xla.temp_size_in_bytes
        assert plan.results == xla.output_size_in_bytes - xla.alias_size_in_bytes
        assert plan.results < 1000 if donated else plan.results >= 12000
        assert plan.total == 16000 + plan.results + plan.temporaries
    assert not any(x.is_deleted() for x in arguments)  # nothing ran
    rows = {line.split()[0]: line.split()[1:] for line in str(plan).splitlines()[1:]}
    assert rows["state"] == [f"{8000 / 2**20:.3f}", "8.000"]
    assert rows["total"][1] == f"{plan.total / 1000:.3f}"


def test_of_arrays_on_several_devices_it_counts_the_part_of_one():
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    split = NamedSharding(mesh, PartitionSpec("data"))
    x = jax.device_put(jnp.ones((8, 100)), split)
    step = jax.jit(lambda params, state, k: (params + k, state + 1.0), donate_argnums=(0, 1))
    plan = memory_plan(step, x, x + 1.0, 2.0)
    assert (plan.count, plan.params, plan.state) == (800, 400, 400)


def test_other_functions_and_arguments_are_refused():
    with pytest.raises(TypeError, match=r"or a function under jax\.jit, got .*what is donated"):
        memory_plan(lambda params, state: params, jnp.ones(2), jnp.ones(2))
    with pytest.raises(TypeError, match="got 1 arguments after the step"):
        memory_plan(jax.jit(lambda params: params), jnp.ones(2))
    with pytest.raises(TypeError, match="takes the arguments of the step after it"):
        memory_plan(plain(adamw(1e-3))[0])
