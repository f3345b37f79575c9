"""Packed parameters take the same steps, bit for bit, and come out as an ordinary tree."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import PER_TENSOR, RECIPES, assert_bit_equal, gradient_trees, normal_tree, ulps

import adaptive_opt
from adaptive_opt import Group, Packing, ParameterGroups, adamod, adamw, decay_mask, train_step
from benchmarks.stepping import update_and_apply

SHAPES = {
    "layer": [{"kernel": (17, 9), "bias": (9,)}, {"kernel": (9, 5), "bias": (5,)}],
    "scale": (),
    "table": (70, 1000),
}
FIRST = "layer/0/bias"


@pytest.fixture(scope="module")
def params():
    return normal_tree(shapes=SHAPES)


def steps(optimizer, params, gradients):
    params = jax.tree.map(jnp.copy, params)
    state = optimizer.init(params)
    step = update_and_apply(optimizer)
    for gradient in gradients:
        params, state = step(params, state, gradient)
    return params, state


OFTEN = ("adamod", "diffmod", "radam", "nadamw")
WHOLE = "ranger", "rmsprop of the tree", *PER_TENSOR  # which nobody packs
SELDOM = sorted(set(RECIPES) - {*OFTEN, *WHOLE})


@pytest.mark.parametrize(
    "name", [*OFTEN, *(pytest.param(n, marks=pytest.mark.slow) for n in SELDOM)]
)
def test_every_recipe_takes_the_same_steps_bit_for_bit(params, name):
    packing = Packing(params)
    optimizer = RECIPES[name](1e-2)
    gradients = list(gradient_trees(3, shapes=SHAPES))
    expected = steps(optimizer, params, gradients)
    packed = map(packing.pack, gradients)
    result = steps(packing.optimizer(optimizer), packing.pack(params), packed)
    result = packing.unpack(result)
    # A parameter without dimensions is a loop of its own kind, where XLA may contract otherwise.
    alone, theirs = ([x for x in jax.tree.leaves(t) if x.shape == () and x.dtype == np.float32]
                        for t in (result, expected))  # fmt: skip
    assert all(ulps(a, b) <= 2 for a, b in zip(alone, theirs, strict=True))
    for a, b in zip(*map(jax.tree.leaves, (result, expected)), strict=True):
        if a.shape != ():
            assert_bit_equal(a, b)
    assert_bit_equal(packing.unpack(packing.pack(result)), result)


def test_leaves_that_could_all_share_a_buffer_get_two_and_the_same_numbers():
    shapes = {str(i): (5 + i,) for i in range(7)}
    params = normal_tree(shapes=shapes)
    packing = Packing(params)
    assert list(packing.pack(params)) == ["0", "3"]
    gradients = list(gradient_trees(3, shapes=shapes))
    expected = steps(adamw(1e-2), params, gradients)
    result = steps(adamw(1e-2), packing.pack(params), map(packing.pack, gradients))
    assert_bit_equal(packing.unpack(result), expected)


def test_what_shares_a_buffer_is_small_of_one_dtype_and_not_split_over_devices():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = (jax.NamedSharding(mesh, spec) for spec in (jax.P("x"), jax.P(None, None)))
    params = {
        "a": jnp.ones(3),
        "b": jnp.ones((2, 2)),
        "half": jnp.ones(3, jnp.bfloat16),
        "half2": jnp.ones(4, jnp.bfloat16),
        "large": jnp.ones(2000),
        "split": jax.device_put(jnp.ones(8), split),
        "replicated": jax.device_put(jnp.ones((4, 4)), whole),
        "replicated2": jax.device_put(jnp.ones((4, 4)), whole),
    }
    packing = Packing({k: v for k, v in params.items() if "replicated" not in k}, max_size=1999)
    packed = packing.pack({k: v for k, v in params.items() if "replicated" not in k})
    assert {path: x.shape for path, x in packed.items()} == {
        "a": (1024,),
        "half": (1024,),
        "large": (2000,),
        "split": (8,),
    }
    assert packed["half"].dtype == jnp.bfloat16
    assert packed["split"].sharding == split
    replicated = {k: v for k, v in params.items() if "replicated" in k}
    packing = Packing(replicated)
    assert packing.pack(replicated)["replicated"].sharding.is_fully_replicated
    assert_bit_equal(packing.unpack(packing.pack(replicated)), replicated)


@pytest.mark.parametrize("through", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_a_buffer_that_begins_with_a_scalar_keeps_all_weights(through):
    params = {"a": jnp.float32(1.0), "b": 2 * jnp.ones(3), "c": 3.0, "large": jnp.ones(9)}
    packing = Packing(params, max_size=8)
    packed = through(packing.pack)(params)
    assert packed["a"].tolist() == [1, 2, 2, 2, 3] + 1019 * [0]
    assert_bit_equal(through(packing.unpack)(packed), jax.tree.map(jnp.float32, params))
    one_each = dict.fromkeys(params, jnp.int32(7))
    assert through(packing.pack)(one_each)["a"].tolist() == 7
    three = {"a": jnp.ones(2), "b": jnp.ones(3), "large": jnp.ones(9)}
    with pytest.raises(ValueError, match="some are scalars and some are whole"):
        through(Packing(three, max_size=8).pack)(three | {"a": jnp.float32(1.0)})


@pytest.mark.parametrize("through", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_a_buffer_is_of_one_dtype(through):
    params = {"a": jnp.ones(2), "b": jnp.ones(3), "large": jnp.ones(9)}
    packing = Packing(params, max_size=8)
    with pytest.raises(ValueError, match="a and b share a buffer, but are float32 and bfloat16"):
        through(packing.pack)(params | {"b": params["b"].astype(jnp.bfloat16)})


def test_parts_of_a_state_that_are_no_copies_of_the_parameters_are_left_alone():
    params = (jnp.ones(3), jnp.ones(2), jnp.ones(9))
    packing = Packing(params, max_size=8)
    optimizer = optax.chain(optax.chain(optax.clip(1.0), optax.scale(0.5)), adamod(1e-2))
    state, packed = optimizer.init(params), optimizer.init(packing.pack(params))
    assert packing.pack(state)[0] == (optax.EmptyState(), optax.EmptyState())
    assert_bit_equal(packing.pack(packing.unpack(packed)), packed)
    assert packing.pack((None, None, None)) == (None, None, None)
    nodes = 3 * (optax.MaskedNode(),)
    assert packing.pack(nodes) == dict.fromkeys("02", optax.MaskedNode())
    assert packing.unpack(packing.pack(nodes)) == nodes


def test_masks_survive(params):
    packing = Packing(params, split_by=[decay_mask])
    mask = packing.mask(decay_mask)
    kernels = {"layer/0/kernel": True, "table": True}
    assert mask(None) == {FIRST: False, "layer/1/bias": False, **kernels}
    gradients = list(gradient_trees(2, shapes=SHAPES))
    expected = steps(adamw(1e-2, weight_decay=0.5, mask=decay_mask), params, gradients)
    optimizer = packing.optimizer(adamw(1e-2, weight_decay=0.5, mask=mask))
    result = steps(optimizer, packing.pack(params), map(packing.pack, gradients))
    assert_bit_equal(packing.unpack(result), expected)
    plain = steps(adamw(1e-2, weight_decay=0.5), params, gradients)
    assert (plain[0]["layer"][0]["bias"] != expected[0]["layer"][0]["bias"]).all()


def test_masks_and_labels_of_optax_survive_where_the_packing_made_them(params):
    def labels(params):
        return jax.tree.map(lambda decays: "slow" if decays else "fast", decay_mask(params))

    packing = Packing(params, split_by=[labels])
    gradients = list(gradient_trees(2, shapes=SHAPES))

    def optimizer(mask, labels):
        decay = optax.masked(adaptive_opt.decoupled_weight_decay(0.5), mask)
        scales = {"fast": optax.scale(-1.0), "slow": optax.scale(-0.5)}
        return optax.chain(adaptive_opt.scale_by_adam(), decay, optax.partition(scales, labels))

    expected = steps(optimizer(decay_mask, labels), params, gradients)
    made = optimizer(packing.mask(decay_mask), packing.mask(labels))
    result = steps(packing.optimizer(made), packing.pack(params), map(packing.pack, gradients))
    assert_bit_equal(packing.unpack(result), expected)
    assert packing.optimizer(optimizer(True, "slow")).init(packing.pack(params))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.masked(tx, decay_mask),
        lambda tx: optax.masked(tx, {FIRST: False}),
        lambda tx: optax.partition({False: tx, True: tx}, decay_mask),
        lambda tx: optax.chain(adamod(1e-3), optax.masked(optax.clip(1.0), decay_mask)),
        lambda tx: optax.apply_if_finite(optax.masked(tx, decay_mask), 3),
        lambda tx: adaptive_opt.lookahead(optax.masked(tx, decay_mask)),
        lambda tx: optax.inject_hyperparams(adamw, static_args=("mask",))(1e-3, mask=decay_mask),
        lambda tx: optax.masked(tx, Packing({"a": jnp.ones(3)}).mask({"a": True})),
    ],
    ids=["masked", "tree", "partition", "chain", "if finite", "lookahead", "injected", "other"],
)
def test_masks_of_the_ordinary_tree_are_found_wherever_they_are(params, wrap):
    optimizer = wrap(adamod(1e-3))
    with pytest.raises(ValueError, match=r"has a mask for ordinary parameters.*packing\.mask"):
        Packing(params).optimizer(optimizer)
    assert Packing(params).optimizer(optimizer, elementwise=True)


def test_a_condition_may_look_at_the_step_and_not_at_extra_arguments(params):
    def late(step, **_):
        return step >= 2

    for wrap in (optax.conditionally_mask, optax.conditionally_transform):
        assert Packing(params).optimizer(wrap(adamod(1e-3), late))
        with pytest.raises(ValueError, match=r"conditionally_.* looks at extra arguments"):
            Packing(params).optimizer(wrap(adamod(1e-3), late, forward_extra_args=True))


def test_groups_are_refused_where_packing_would_hide_one(params):
    def optimizer(*groups, default=None):
        return ParameterGroups(groups, default).optimizer(adamw, learning_rate=1e-2)

    packing = Packing(params)
    with pytest.raises(ValueError, match=r"layer/0/bias and .* share a buffer, but .*labels says"):
        packing.optimizer(optimizer(Group("bias$", weight_decay=0.0), default=Group()))
    with pytest.raises(ValueError, match="1 of 6 parameters match no group: table"):
        packing.optimizer(optimizer(Group("layer|scale")))
    with pytest.raises(ValueError, match="the pattern 'bais' matches no parameter"):
        packing.optimizer(optimizer(Group("bais"), default=Group()))
    assert packing.optimizer(optimizer(Group("table", freeze=3), default=Group()))


def test_low_memory_is_refused_inside(params):
    packing = Packing(params)
    for storage in ("bfloat16", "8-bit"):
        optimizer = adaptive_opt.low_memory(adamod(1e-3), storage)
        with pytest.raises(
            ValueError, match=r"low_memory goes by the size of arrays.*Packing, not"
        ):
            packing.optimizer(optax.chain(optax.clip(1.0), optimizer))
    assert packing.optimizer(optimizer, elementwise=True) is not None


@pytest.mark.broad
def test_master_weights_go_around_packing(params):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    packing = Packing(params)
    with pytest.raises(ValueError, match=r"put it around, master_weights\(packing\.optimizer"):
        packing.optimizer(adaptive_opt.master_weights(adamod(1e-3)))
    optimizer = adaptive_opt.master_weights(packing.optimizer(adamod(1e-2)), "float32")
    alone = adaptive_opt.master_weights(adamod(1e-2), "float32")
    packed, plain = packing.pack(params), params
    state, own = optimizer.init(packed), alone.init(plain)
    updates, state = optimizer.update(packing.pack(params), state, packed)
    expected, own = alone.update(params, own, plain)
    packed, plain = optax.apply_updates(packed, updates), optax.apply_updates(plain, expected)
    assert_bit_equal(packing.unpack(packed), plain)
    full = adaptive_opt.float32_params(state, packed)
    assert_bit_equal(packing.unpack(full), adaptive_opt.float32_params(own, plain))


def test_groups_survive_in_parameters_and_checkpoints(params):
    groups = ParameterGroups(
        [Group("table", freeze=True), Group("bias$", weight_decay=0.0)], default=Group()
    )
    optimizer = groups.optimizer(adamw, learning_rate=1e-2, weight_decay=0.5)
    packing = Packing(params, split_by=[groups.labels])
    gradients = list(gradient_trees(2, shapes=SHAPES))
    expected = steps(optimizer, params, gradients)
    result = steps(packing.optimizer(optimizer), packing.pack(params), map(packing.pack, gradients))
    assert_bit_equal(packing.unpack(result), expected)
    assert jax.tree.structure(packing.pack(expected)) == jax.tree.structure(result)


@pytest.mark.compiles
def test_a_training_step_sees_the_ordinary_tree_and_works_in_place(params):
    def loss(params, factor):
        return sum(jnp.sum((factor * leaf - 1) ** 2) for leaf in jax.tree.leaves(params))

    optimizer, packing = adamod(1e-2), Packing(params)
    by_hand = jax.grad(loss)(params, 2.0)
    packed = packing.pack(jax.tree.map(jnp.copy, params))
    gradient = jax.jit(jax.grad(lambda p: loss(packing.unpack(p), 2.0)))(packed)
    assert_bit_equal(packing.unpack(gradient), by_hand)
    assert (gradient[FIRST][SIZE_OF_SMALL:] == 0).all()
    step = train_step(
        lambda p, factor: loss(packing.unpack(p), factor), packing.optimizer(optimizer)
    )
    compiled = step.lower(packed, optimizer.init(packed), 2.0).compile()
    arrays = jax.tree.leaves((packed, optimizer.init(packed)))
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in arrays)
    assert "scatter" not in compiled.as_text()


SIZE_OF_SMALL = 17 * 9 + 9 + 9 * 5 + 5 + 1


def test_checkpoints_are_those_of_an_ordinary_run(params):
    optimizer, packing = RECIPES["adam"](1e-2), Packing(params)
    gradients = list(gradient_trees(3, shapes=SHAPES))
    ordinary = steps(optimizer, params, gradients)
    packed = steps(optimizer, packing.pack(params), map(packing.pack, gradients))
    data = adaptive_opt.to_bytes(optimizer, packing.unpack(packed))
    assert data == adaptive_opt.to_bytes(optimizer, ordinary)
    shapes = jax.eval_shape(lambda p: (p, optimizer.init(p)), packing.pack(params))
    restored = adaptive_opt.from_bytes(optimizer, packing.unpack(shapes), data)
    assert_bit_equal(packing.unpack(packing.pack(restored)), ordinary)


def test_what_is_not_known_to_be_elementwise_needs_the_callers_word(params):
    packing = Packing(params)
    for optimizer in (adaptive_opt.ranger(1e-3), optax.lamb(1e-3), optax.lars(1e-3)):
        with pytest.raises(ValueError, match=r"not known to treat every weight.*elementwise=True"):
            packing.optimizer(optimizer)
    gradients = list(gradient_trees(2, shapes=SHAPES))
    flat = optax.flatten(optax.adam(1e-3))  # which concatenates all leaves
    with pytest.raises(ValueError, match="flatten is not known"):
        packing.optimizer(flat)
    trusted = packing.optimizer(flat, elementwise=True)
    new, _ = steps(trusted, packing.pack(params), map(packing.pack, gradients))
    assert_bit_equal(packing.unpack(new), steps(flat, params, gradients)[0])
    packing.optimizer(optax.adam(1e-3))
    tensor = adaptive_opt.rmsprop(1e-3, scope="tensor")
    with pytest.raises(ValueError, match="second_moment is not known"):
        packing.optimizer(tensor)


def test_mistakes_are_named(params):
    packing = Packing(params)
    with pytest.raises(ValueError, match=r"has a mask for ordinary parameters.*packing\.mask"):
        packing.optimizer(adamw(1e-3, mask=decay_mask))
    with pytest.raises(
        ValueError, match=r"share a buffer, but decay_mask says False and True.*split"
    ):
        packing.mask(decay_mask)
    with pytest.raises(ValueError, match="this is not a tree like the parameters"):
        packing.mask({"layer": True})
    with pytest.raises(ValueError, match="a single array needs no packing"):
        Packing(jnp.ones(3))
    with pytest.raises(ValueError, match="some have an array and some have none"):
        packing.pack(params | {"scale": None})
    state = adaptive_opt.low_memory(adamw(1e-3), "8-bit", min_size=1).init(packing.pack(params))
    with pytest.raises(ValueError, match="states in blocks of 8 bits stay packed"):
        packing.unpack(state)


def test_a_tree_with_the_norm_of_all_gradients_clipped_is_close(params):
    packing = Packing(params)
    chain = optax.chain(optax.clip_by_global_norm(1.0), adamod(1e-2))
    gradients = list(gradient_trees(2, shapes=SHAPES))
    result = steps(packing.optimizer(chain), packing.pack(params), map(packing.pack, gradients))
    expected = steps(chain, params, gradients)[0]
    for a, b in zip(
        jax.tree.leaves(packing.unpack(result)[0]), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
