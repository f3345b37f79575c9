"""A step in 8 bits as one kernel: the same bits as update and apply, calculated as a GPU would."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import AS_USERS, RECIPES, assert_bit_equal, broadly
from jax.extend.core import Var

from adaptive_opt import (
    adam,
    adamw,
    describe,
    low_memory,
    one_kernel,
    skip_nonfinite,
    state_shardings,
    train_step,
)
from adaptive_opt.memory.elementwise import inlined
from adaptive_opt.memory.one_kernel import _on_tile

ON_GPU = jax.default_backend() == "gpu"
SHAPES = {"aligned": (16, 512), "across rows": (64, 60), "odd": (3, 256), "no blocks": (300,)}
KERNELS = 3


def normal(shape, rng, dtype=jnp.float32):
    sizes = 10 ** rng.uniform(-6, 3, shape)
    return jnp.asarray(rng.standard_normal(shape) * sizes * (rng.random(shape) > 0.1), dtype)


def tree(seed, dtypes=()):
    rng = np.random.default_rng(seed)
    return {k: normal(s, rng, dict(dtypes).get(k, jnp.float32)) for k, s in SHAPES.items()}


def kernels_in(step, *args):
    return str(jax.make_jaxpr(step)(*args)).count("pallas_call[")


def one_nan(x):
    """The bits of a NaN say nothing."""
    return jnp.where(jnp.isnan(x), jnp.nan, x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def broken(gradients):
    """With a NaN, infinities and a number whose square is one."""
    few = jnp.array([jnp.nan, jnp.inf, -jnp.inf, 1e30])
    return gradients | {"aligned": gradients["aligned"].at[2, 5:9].set(few)}


def assert_same_bits(optimizer, params, kernels=KERNELS, steps=3, ulps_of_an_update=0):
    """Of three steps; gradients have a NaN and infinities in the second.

    XLA:CPU may join products and sums in one of the two programs otherwise than in the other: then
    the parameters are so many units in the last place of an update of 0.01 off, and of their own.
    """
    if ON_GPU:
        pytest.skip("an interpreted kernel is compiled like the rest there; see below")
    interpreted = one_kernel(optimizer, interpret=True).update_and_apply
    as_users = functools.partial(jax.jit, compiler_options=AS_USERS)
    by_kernels, by_hand = map(as_users, (interpreted, one_kernel(optimizer).update_and_apply))
    found = expected = params, optimizer.init(params)
    assert kernels_in(interpreted, params, found[1], params) == kernels
    for step in range(steps):
        gradients = broken(tree(2)) if step == 1 else tree(step + 1)
        found = by_kernels(gradients, found[1], found[0], value=jnp.float32(1.0))
        expected = by_hand(gradients, expected[1], expected[0], value=jnp.float32(1.0))
        ours, theirs = (jax.tree.map(one_nan, results) for results in (found, expected))
        assert_bit_equal(ours[1], theirs[1])
        if not ulps_of_an_update:
            assert_bit_equal(ours[0], theirs[0])
        for a, b in zip(*map(jax.tree.leaves, (ours[0], theirs[0])), strict=True):
            near = {
                "rtol": ulps_of_an_update * 2.0**-23,
                "atol": ulps_of_an_update * 0.01 * 2.0**-23,
            }
            np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), **near)
    assert not jnp.isfinite(found[0]["aligned"][2, 5])
    return found


@pytest.mark.parametrize("name", broadly(["adamod"], ["adam", "amsgrad", "adamod", "diffmod"]))
def test_the_step_is_update_and_apply_bit_for_bit(name):
    params, _ = assert_same_bits(low_memory(RECIPES[name](1e-2), "8-bit", min_size=1), tree(0))
    others = jnp.ones((16, 512), bool).at[2, 5:9].set(False)
    assert jnp.isfinite(params["aligned"][others]).all()


def test_update_and_apply_without_a_kernel_are_those_of_optax():
    optimizer, params = low_memory(adam(1e-2), "8-bit"), tree(0)
    state = optimizer.init(params)

    @jax.jit
    def by_hand(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    assert_bit_equal(
        jax.jit(one_kernel(optimizer).update_and_apply)(tree(1), state, params),
        by_hand(tree(1), state, params),
    )


GROUPS = {name: "adam" if name == "aligned" else "sgd" for name in SHAPES}


@pytest.mark.broad
@pytest.mark.parametrize(
    ("inner", "kernels", "ulps"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), adamw(optax.linear_schedule(0, 1, 9))), 3, 0),
        (optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), 3, 0),
        (optax.partition({"adam": adam(1e-2), "sgd": optax.sgd(1e-2)}, GROUPS), 1, 4),
    ],
    ids=["a norm and a schedule", "hyperparameters as arrays", "groups"],
)
def test_what_crosses_weights_is_done_before(inner, kernels, ulps):
    optimizer = low_memory(inner, "8-bit", min_size=1)
    assert_same_bits(optimizer, tree(0), kernels, ulps_of_an_update=ulps)


def test_16_bit_parameters_and_wide_buffers():
    optimizer = low_memory(adamw(1e-2), "8-bit", buffers={"nu": "wide"}, min_size=1)
    assert_same_bits(optimizer, tree(0, {"aligned": jnp.bfloat16}))


def test_nothing_is_a_kernel_where_nothing_is_in_8_bits():
    optimizer = low_memory(adam(1e-2), "bfloat16", min_size=1)
    assert_same_bits(optimizer, tree(0), kernels=0)


@pytest.mark.broad
def test_outside_jit_and_around_a_guard():
    params = jnp.ones((16, 256))
    optimizer = low_memory(skip_nonfinite(adam(1e-2)), "8-bit")
    bad = jnp.ones_like(params).at[0, 0].set(jnp.nan)
    for step in (one_kernel(optimizer), one_kernel(optimizer, interpret=True)):
        state = step.init(params)
        moved, state = step.update_and_apply(jnp.ones_like(params), state, params)
        np.testing.assert_allclose(moved, 0.99, rtol=1e-5)
        refused, state = step.update_and_apply(bad, state, moved)
        assert_bit_equal(refused, moved)
        assert int(optax.tree.get(state, "total")) == 1


def test_under_shard_map_each_device_has_its_own_kernel():
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    optimizer, split = low_memory(adam(1e-2), "8-bit"), jax.P("data")
    params = normal((16, 512), np.random.default_rng(4))
    state, specs = optimizer.init(params), state_shardings(optimizer, params, split)

    def stepped(optimizer):
        take = jax.shard_map(
            optimizer.update_and_apply,
            mesh=mesh,
            in_specs=(split, specs, split),
            out_specs=(split, specs),
            check_vma=False,
        )
        return kernels_in(take, params, state, params), jax.jit(take)(params, state, params)

    (kernels, ours), (_, theirs) = (
        stepped(one_kernel(optimizer, interpret=i)) for i in (True, False)
    )
    assert kernels == 1
    assert_bit_equal(ours[1], theirs[1])
    np.testing.assert_allclose(ours[0], theirs[0], rtol=2.0**-21, atol=0.01 * 2.0**-21)


def test_train_step_takes_the_kernel_and_others_the_update():
    params, optimizer = jnp.ones((16, 256)), low_memory(adam(1e-2), "8-bit")
    target = normal((16, 256), np.random.default_rng(3))

    def stepped(optimizer):
        step = train_step(lambda x, y: jnp.sum((x - y) ** 2), optimizer)
        state, x = optimizer.init(params), jnp.copy(params)
        kernels = str(step.trace(x, state, target).jaxpr).count("pallas_call[")
        return kernels, step(x, state, target)

    by_kernel, plain = (stepped(o) for o in (one_kernel(optimizer, interpret=True), optimizer))
    assert (by_kernel[0], plain[0]) == (1, 0)
    assert_bit_equal(by_kernel[1], plain[1])
    inside = optax.chain(one_kernel(optimizer, interpret=True), optax.identity())
    assert stepped(inside)[0] == 0
    assert describe(one_kernel(optimizer)) == describe(optimizer)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(TypeError, match=r"one_kernel takes what low_memory\(...\) returned"):
        one_kernel(adam(1e-2))
    with pytest.raises(TypeError, match="one_kernel takes"):
        one_kernel(optax.chain(low_memory(adam(1e-2))))
    optimizer, params = low_memory(adam(1e-2), "8-bit"), jnp.ones((16, 256))
    step = one_kernel(optimizer, interpret=True).update_and_apply
    with pytest.raises(ValueError, match="needs a LowMemoryState"):
        step(params, adam(1e-2).init(params), params)
    state = optimizer.init(params)
    with pytest.raises(TypeError, match="through which no derivative goes"):
        jax.grad(lambda g: step(g, state, params)[0].sum())(params)


def losing_nan(jaxpr, *given):
    """The results, with a largest and a smallest as Triton has them: of a NaN and 1 it is 1."""
    known = dict(zip(jaxpr.invars, given, strict=True))

    def read(var):
        return known[var] if isinstance(var, Var) else var.val

    calculate = {"max": jnp.fmax, "min": jnp.fmin}
    calculate["clamp"] = lambda least, x, most: jnp.fmin(jnp.fmax(least, x), most)
    for equation in jaxpr.eqns:
        operands, name = [*map(read, equation.invars)], equation.primitive.name
        if name in ("jit", "pjit"):
            found = losing_nan(equation.params["jaxpr"].jaxpr, *operands)
        elif name in calculate:
            found = [calculate[name](*operands)]
        else:
            found = equation.primitive.bind(*operands, **equation.params)
            found = found if equation.primitive.multiple_results else [found]
        known.update(zip(equation.outvars, found, strict=True))
    return [*map(read, jaxpr.outvars)]


def test_a_nan_stays_where_the_largest_and_the_smallest_lose_it():
    x = jnp.array([jnp.nan, -3.0, 0.5, 3.0, jnp.inf])

    def rule(x):
        return jnp.clip(x, -1, 1), jax.lax.clamp(-1.0, x, 1.0), jnp.maximum(2 * x, x)

    expected = rule(x)
    program = inlined(jax.make_jaxpr(rule)(x)).jaxpr
    kernel = jax.make_jaxpr(lambda x: _on_tile(program, [x]))(x).jaxpr
    for ours, theirs in zip(losing_nan(kernel, x), expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not jnp.isnan(losing_nan(program, x)[0][0])


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU to run a kernel")
@pytest.mark.parametrize(
    "name", ["adam", "amsgrad", "adamod", "diffgrad", "diffmod", "lion", "adopt"]
)
def test_on_a_gpu_it_is_the_step_within_triton_s_division(name):
    optimizer = low_memory(RECIPES[name](1e-2), "8-bit", min_size=1)
    assert_near_the_step(optimizer, one_kernel(optimizer))


def assert_near_the_step(optimizer, kernel):
    """Three steps, each from the same state; a scale may be off by its last place, a code by 1."""

    @jax.jit
    def by_hand(gradients, state, params):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    by_kernel = jax.jit(kernel.update_and_apply)
    params, state = tree(0), optimizer.init(tree(0))
    for gradients in (tree(1), broken(tree(2)), tree(3)):
        found = by_kernel(gradients, state, params)
        before, (params, state) = params, by_hand(gradients, state, params)
        for old, a, b in zip(*map(jax.tree.leaves, (before, found[0], params)), strict=True):
            np.testing.assert_array_equal(jnp.isfinite(a), jnp.isfinite(b))
            size = jnp.maximum(jnp.abs(b), jnp.abs(b - old))
            off = jnp.abs(a - b) / jnp.maximum(size, 2.0**-100) * 2.0**23
            assert jnp.nanmax(jnp.where(jnp.isfinite(b), off, 0.0)) <= 4.0
        leaves = [jax.tree.leaves(tree) for tree in (found[1], state)]
        differing = sum(
            int(jnp.sum((a != b) & ~(jnp.isnan(a) & jnp.isnan(b))))
            for a, b in zip(*leaves, strict=True)
        )
        assert differing <= 1e-4 * sum(leaf.size for leaf in leaves[1])


@pytest.mark.broad
def test_what_is_asked_on_a_gpu_holds_for_the_interpreted_kernel():
    optimizer = low_memory(adam(1e-2), "8-bit", min_size=1)
    assert_near_the_step(optimizer, one_kernel(optimizer, interpret=True))
