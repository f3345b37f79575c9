"""What a process with XLA's option sees of ``single_pass``, as JSON; its arguments are recipes."""

from __future__ import annotations

import json
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import RECIPES, gradient_trees, normal_tree
from flax.training.train_state import TrainState
from traffic import SIZE, compiled_step, loops, traffic, ulps_at_the_scale_of

import adaptive_opt
from adaptive_opt import single_pass
from adaptive_opt.core.trees import copied


def of_a_large_leaf(plain):
    """Bytes, temporaries and loops of both forms, and the distance of their results."""
    programs = [compiled_step(plain), compiled_step(single_pass(plain))]
    before = jnp.linspace(-1.0, 1.0, SIZE), plain.init(jnp.zeros(SIZE))
    ulps = 0.0
    for gradient in gradient_trees(3, shapes=(SIZE,)):
        copies = jax.tree.map(jnp.copy, (before, before))
        after, merged = (run(*c, gradient) for run, c in zip(programs, copies, strict=True))
        ulps = max(ulps, ulps_at_the_scale_of(before, merged, after))
        before = after
    plain_traffic, merged_traffic = (traffic(program)._asdict() for program in programs)
    return {"plain": plain_traffic, "single pass": merged_traffic, "ulps": ulps}


def of_a_tree(plain):
    """The distance of the results for odd shapes, a None, zeros, and extra arguments."""
    shapes = {"kernel": (17, 9), "bias": (9,), "scale": (), "frozen": None}
    params = normal_tree(shapes=shapes)
    state = plain.init(params)
    merged = jax.jit(single_pass(plain).update)
    ulps = 0.0
    for gradient in gradient_trees(3, shapes=shapes):
        results = jax.jit(plain.update)(gradient, state, params)
        ulps = max(ulps, ulps_at_the_scale_of(results, merged(gradient, state, params), results))
        assert jax.tree.structure(results) == jax.tree.structure(merged(gradient, state, params))
        _, state = results
    return ulps


def of_a_training_step(recipe):
    """Loops over the kernel of a Dense layer in a whole step: its gradient, and the update."""
    model, x = nn.Dense(64), jnp.ones((8, 32))
    answers = {}
    for name, wrap in (("plain", lambda tx: tx), ("single pass", single_pass)):
        params = model.init(jax.random.key(0), x)
        tx = wrap(recipe(1e-3))
        state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)

        def loss(params):
            return jnp.mean((model.apply(params, x) - 1) ** 2)

        def step(state):
            return state.apply_gradients(grads=jax.grad(loss)(state.params))

        compiled = jax.jit(step, donate_argnums=0).lower(state).compile()
        answers[name] = loops(compiled, (32, 64))
    return answers


def of_shards():
    """Whether an update of sharded parameters stays where it is, without communication."""
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.NamedSharding(mesh, jax.P("x"))
    tx = single_pass(adaptive_opt.adamod(1e-3))
    params = jax.device_put(jnp.ones(SIZE), split)
    state = tx.init(params)
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    updates, state = compiled(params, state, params)
    return {
        "communicates": any(w in compiled.as_text() for w in ("all-gather", "all-reduce")),
        "split": all(x.sharding == split for x in jax.tree.leaves((updates, state)) if x.ndim),
    }


def of_nested_jits():
    """Traffic of a rule of one's own, and of the same in a ``jit`` for each leaf, in a ``jit``."""

    def rule(g, mu, nu, previous, count):
        mu, nu = 0.9 * mu + 0.1 * g, 0.99 * nu + 0.01 * jnp.square(g)
        friction = jax.nn.sigmoid(jnp.abs(previous - g))
        rate = 1e-3 / (1 - 0.9**count) / (jnp.sqrt(nu) + 1e-8)
        return -rate * friction * mu, mu, nu, copied(g, previous)

    def init(params):
        return jnp.zeros([]), [jax.tree.map(jnp.zeros_like, params) for _ in range(3)]

    def transformation(rule):
        def update(updates, state, params=None):
            count, buffers = state[0] + 1, state[1]
            update, *buffers = rule(updates, *buffers, count)
            return update, (count, buffers)

        return optax.GradientTransformation(init, update)

    optimizers = map(transformation, (rule, jax.jit(rule), jax.jit(jax.jit(rule))))
    return [traffic(compiled_step(single_pass(tx)))._asdict() for tx in optimizers]


def nan_and_infinity():
    """The previous gradient, bit for bit, of a gradient with everything in it."""
    gradient = np.array([0.0, -0.0, np.nan, np.inf, -np.inf, 1e-45, 3e38, 1.0], np.float32)
    tx = single_pass(adaptive_opt.diffgrad(1e-3))
    _, state = jax.jit(tx.update)(gradient, tx.init(jnp.zeros(8)), jnp.zeros(8))
    kept = np.asarray(optax.tree.get(state, "previous_gradient"))
    return bool(kept.tobytes() == gradient.tobytes())


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 2)
    adaptive_opt.enable_single_pass()
    adaptive_opt.enable_single_pass()  # a second time changes nothing
    large = {name: of_a_large_leaf(RECIPES[name](1e-3)) for name in sys.argv[1:]}
    large["optax.adam"] = of_a_large_leaf(optax.adam(1e-3))
    wrapped = {
        "masked": optax.masked(
            adaptive_opt.adamod(1e-3), lambda params: jax.tree.map(lambda p: p.ndim != 1, params)
        ),
        "injected": optax.inject_hyperparams(adaptive_opt.diffmod)(1e-3),
        "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
        "muon": optax.contrib.muon(1e-3),
        "half": adaptive_opt.adamod(1e-3, state_dtype=jnp.bfloat16),
    }
    print(
        json.dumps(
            {
                "stands aside": adaptive_opt.single_pass_stands_aside(),
                "large": large,
                "trees": {name: of_a_tree(tx) for name, tx in wrapped.items()},
                "training": [of_a_training_step(RECIPES[name]) for name in ("adamw", "diffmod")],
                "shards": of_shards(),
                "nested jits": of_nested_jits(),
                "previous gradient kept": nan_and_infinity(),
            }
        )
    )
