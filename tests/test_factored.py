"""Second moments of rows, columns and blocks: which they are, and what they keep."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, gradient_trees, normal_tree, train

from adaptive_opt import (
    adafactor,
    adam_mini,
    adamw,
    adaptive,
    block_moment,
    blocks_by_name,
    factored_moment,
    per_weight_rate,
    scale_by_parameter,
    second_moment,
)


def kept(optimizer, params):
    """The shapes of all arrays of more than no axes."""
    state = jax.eval_shape(optimizer.init, params)
    return sorted(x.shape for x in jax.tree.leaves(state) if x.ndim)


def of_shape(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def test_a_matrix_keeps_a_row_and_a_column_and_what_is_short_keeps_all():
    assert kept(adafactor(1e-2), of_shape(300, 200)) == [(1, 200), (300, 1)]
    assert kept(adafactor(1e-2), of_shape(300, 127)) == [(300, 127)]
    assert kept(adafactor(1e-2), of_shape(300)) == [(300,)]
    stack, longest = of_shape(140, 3, 150), {"min_dim_size_to_factor": 2}
    assert kept(adafactor(1e-2, **longest), stack) == [(1, 3, 150), (140, 3, 1)]
    assert kept(adafactor(1e-2, axes="last", **longest), stack) == [(140, 1, 150), (140, 3, 1)]
    big_vision = adafactor(1e-2, convention="big_vision")
    assert kept(big_vision, of_shape(32, 40)) == [(1, 40), (32, 1), (32, 40)]
    assert kept(adafactor(1e-2, **longest), of_shape(3, 0)) == [(3, 0)]


def test_rows_and_columns_say_all_of_squares_of_rank_one(x64):
    rows, columns = jnp.array([1e-5, 1.0, 1e3]), jnp.array([1.0, 2e-4, 3.0, 1e2])
    gradients = [s * jnp.outer(rows, columns) for s in (1.0, -3.0, 0.5)]
    for b2 in (0.5, 0.99):
        whole = adaptive(second_moment(b2), per_weight_rate(0.0))
        short = adaptive(factored_moment(b2, min_dim_size_to_factor=3), per_weight_rate(0.0))
        one, other = (train(o, gradients[0], gradients)[0] for o in (whole, short))
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_silence_makes_no_nan_and_sums_of_squares_do_not_overflow():
    moments = factored_moment(0.5, min_dim_size_to_factor=2), block_moment(0.5, "row")
    for moment in moments:
        rule = adaptive(moment, per_weight_rate(0.0))
        state = rule.init(jnp.ones((2, 300)))
        for gradient in (0.0, 1.0, 1e19, 0.0):  # 1e19 squared, 300 times, is infinite in float32
            updates, state = rule.update(jnp.full((2, 300), gradient), state)
            assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((updates, state)))


def test_where_a_square_overflows_the_block_stands_still():
    gradient = jnp.ones((2, 3)).at[0, 0].set(1e30)
    moments = {
        factored_moment(0.5, min_dim_size_to_factor=2): [0, 0],
        block_moment(0.5, "row"): [0, 1],
    }
    for moment, expected in moments.items():
        rule = adaptive(moment, per_weight_rate(0.0))
        updates, _ = rule.update(gradient, rule.init(gradient))
        assert (updates[:, 1] != 0).astype(int).tolist() == expected


def test_a_step_of_adafactor_is_a_part_of_the_weights():
    x = normal_tree(shapes={"kernel": (8, 4)})
    gradients = list(gradient_trees(1, shapes={"kernel": (8, 4)}))
    lr, ten = adafactor(1e-2), jax.tree.map(lambda x: 10 * x, x)
    (_, _, [(_, one)]), (_, _, [(_, other)]) = (train(lr, y, gradients) for y in (x, ten))
    np.testing.assert_allclose(10 * one["kernel"], other["kernel"], rtol=1e-5)
    rms = jnp.sqrt(jnp.mean(one["kernel"] ** 2))
    assert rms <= 1.001e-2 * jnp.sqrt(jnp.mean(x["kernel"] ** 2))
    with pytest.raises(ValueError, match="scale_by_parameter needs the parameters"):
        lr.update(gradients[0], lr.init(x))
    rule = adaptive(scale_by_parameter(0.5))
    assert rule.update(jnp.ones(2), rule.init(jnp.zeros(2)), jnp.zeros(2))[0].tolist() == [0.5, 0.5]


TRANSFORMER = {
    "tok_embeddings.weight": ((10, 4), "row"),
    "layers.0.attention.wq.weight": ((4, 4), "head"),
    "layers.0.attention.wk.bias": ((4,), "weight"),
    "layers.0.attention.wv.weight": ((4, 4), "row"),
    "layers.0.attention.wo.weight": ((4, 4), "row"),
    "layers.0.feed_forward.w1.weight": ((8, 4), "row"),
    "layers.0.attention_norm.weight": ((4,), "tensor"),
    "transformer.h.0.attn.proj.weight": ((4, 4), "row"),
    "transformer.h.0.gate": ((4, 4), "tensor"),
    "output.weight": ((10, 4), "row"),
}
"""What the authors' code does with a parameter of that name, in the order of its branches."""


def test_names_tell_the_blocks_of_the_authors_and_each_is_as_if_alone():
    params = {name: jnp.ones(shape) for name, (shape, _) in TRANSFORMER.items()}
    words = blocks_by_name(params, layout="out-in")
    assert words == {name: word for name, (_, word) in TRANSFORMER.items()}
    own = {"head_size": 2, "layout": "out-in"}
    shapes = {name: shape for name, (shape, _) in TRANSFORMER.items()}
    gradients = list(gradient_trees(3, shapes=shapes))
    together, _, _ = train(adam_mini(1e-2, **own), params, gradients)
    for name in ("layers.0.attention.wq.weight", "layers.0.feed_forward.w1.weight"):
        single = adam_mini(1e-2, **own, blocks=TRANSFORMER[name][1])
        alone, _, _ = train(single, params[name], [g[name] for g in gradients])
        np.testing.assert_allclose(together[name], alone, rtol=1e-6)
    in_out = blocks_by_name(params)
    assert in_out["tok_embeddings.weight"] == "row"
    assert in_out["output.weight"] == in_out["layers.0.attention.wv.weight"] == "column"


def test_a_head_is_the_same_in_every_layout(x64):
    flat = normal_tree(dtype=np.float64, shapes={"q": (5, 6)})["q"]
    layouts = {
        "out-in": (flat.T, lambda u: u.T),
        "in-out": (flat, lambda u: u),
        "of flax": (flat.reshape(5, 3, 2), lambda u: u.reshape(5, 6)),
    }
    found = []
    for layout, (x, back) in layouts.items():
        layout = "in-out" if layout == "of flax" else layout
        moment = block_moment(0.9, "head", head_size=2, layout=layout)
        rule = adaptive(moment, per_weight_rate(0.0))
        update, state = rule.update(x, rule.init(x))
        assert state.buffers["nu"].shape == (3,)
        found.append(back(update))
    for other in found[1:]:
        np.testing.assert_allclose(found[0], other, rtol=1e-12)


def test_blocks_of_one_weight_are_adamw():
    params, gradients = normal_tree(), list(gradient_trees(3))
    mini = adam_mini(1e-2, blocks="weight", weight_decay=0.1)
    one, other = (train(o, params, gradients)[0] for o in (mini, adamw(1e-2, weight_decay=0.1)))
    assert_bit_equal(one, other)


def test_misuse_is_refused_with_what_to_do():
    params = {"attn": {"query": jnp.ones((4, 6)), "out": jnp.ones(3)}}
    for head_size in (None, 4):
        message = rf"block_moment: the array.*query.* 6 outputs .*head_size={head_size} must divide"
        with pytest.raises(ValueError, match=message):
            adam_mini(1e-3, head_size=head_size).init(params)
    with pytest.raises(ValueError, match=r"blocks must be one of 'weight', 'row', .* got 'rows'"):
        block_moment(0.9, "rows")
    wrong = adam_mini(1e-3, blocks={"attn": {"query": "rows", "out": "tensor"}})
    with pytest.raises(ValueError, match=r"the block at .*query.* must be one of .* got 'rows'"):
        wrong.init(params)
    with pytest.raises(ValueError, match="the blocks of block_moment must be a tree of words"):
        adam_mini(1e-3, blocks={"other": "row"}).init(params)
    injected = optax.inject_hyperparams(adafactor)
    with pytest.raises(TypeError, match=r"min_dim_size_to_factor .* static_args"):
        injected(1e-2, min_dim_size_to_factor=2).init(params)
    with pytest.raises(ValueError, match="min_dim_size_to_factor"):
        factored_moment(0.9, min_dim_size_to_factor=0)
