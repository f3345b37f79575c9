"""Parameter groups on top of optax.partition, for linen, nnx and equinox."""

from __future__ import annotations

import functools

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import assert_bit_equal, train
from flax import nnx

from adaptive_opt import (
    Group,
    ParameterGroups,
    adam,
    adamw,
    decay_mask,
    decay_report,
    describe,
    gradual_unfreezing,
    layerwise_learning_rates,
    read_telemetry,
    sgd,
    telemetry,
)


class Linen(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x):
        x = flax.linen.LayerNorm(name="norm")(flax.linen.Dense(3, name="body")(x))
        return flax.linen.Dense(1, name="head")(x)


class Nnx(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.LayerNorm(3, rngs=rngs)
        self.head = nnx.Linear(3, 1, rngs=rngs)


class Eqx(eqx.Module):
    body: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear
    activation: object = jnp.tanh

    def __init__(self, key):
        self.body = eqx.nn.Linear(2, 3, key=key)
        self.norm = eqx.nn.LayerNorm(3)
        self.head = eqx.nn.Linear(3, 1, key=key)


TREES = {
    "linen": lambda: Linen().init(jax.random.key(0), jnp.ones((1, 2))),
    "nnx": lambda: nnx.state(Nnx(nnx.Rngs(0)), nnx.Param),
    "equinox": lambda: eqx.filter(Eqx(jax.random.key(0)), eqx.is_array),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_every_kind_of_model_is_grouped_by_path(tree):
    params = tree()
    groups = ParameterGroups(
        [
            Group("body", freeze=True),
            Group("(bias|norm/(scale|weight))$", weight_decay=0.0),
            Group("head", learning_rate=0.1),
        ],
        default=None,
    )
    report = groups.report(params)
    by_path = {line.path.removeprefix("params/"): line.group for line in report}
    assert len(by_path) == 6
    weight = "weight" if "body/weight" in by_path else "kernel"
    assert by_path[f"body/{weight}"] == by_path["body/bias"] == "body"
    assert by_path["norm/bias"] == by_path["head/bias"] == "(bias|norm/(scale|weight))$"
    assert by_path[f"head/{weight}"] == "head"
    optimizer = groups.optimizer(adamw, learning_rate=1e-2, weight_decay=0.1)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = jax.jit(optimizer.update)(ones, optimizer.init(params), params)
    moved = {
        line.path.removeprefix("params/"): u
        for line, u in zip(report, jax.tree.leaves(updates), strict=True)
    }
    assert np.all(moved[f"body/{weight}"] == 0)
    np.testing.assert_allclose(moved["head/bias"], -1e-2, rtol=1e-4)  # no decay, full rate
    assert np.all(np.abs(moved[f"head/{weight}"]) < 2e-3)


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
def test_the_decay_mask_spares_biases_and_normalisations(tree):
    params = tree()
    mask = decay_mask(params)
    assert sum(jax.tree.leaves(mask)) == 2
    optimizer = adamw(1e-2, weight_decay=0.1, mask=decay_mask)
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(ones), ones)
    for decays, update in zip(*map(jax.tree.leaves, (mask, updates)), strict=True):
        assert np.all(update != 0) == decays


def test_a_bias_of_higher_rank_is_still_a_bias():
    params = {"conv": {"weight": jnp.ones((4, 3, 2, 2)), "bias": jnp.ones((4, 1, 1))}}
    assert decay_mask(params) == {"conv": {"weight": True, "bias": False}}


PARAMS = {"a": jnp.ones(2), "b": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
ONES = jax.tree.map(jnp.ones_like, PARAMS)


def test_the_first_matching_pattern_wins():
    groups = ParameterGroups([Group("b/bias"), Group("b")], default=Group())
    assert groups.labels(PARAMS) == {"a": "default", "b": {"kernel": "b", "bias": "b/bias"}}


def test_without_a_declared_default_orphans_are_an_error_that_names_them():
    groups = ParameterGroups([Group("kernel")])
    message = "2 of 3 parameters match no group: a, b/bias. Add a pattern for them, or declare"
    for use in (groups.labels, groups.report, groups.optimizer(adam, 1e-3).init):
        with pytest.raises(ValueError, match=message):
            use(PARAMS)


def test_a_pattern_that_matches_nothing_is_an_error_unless_it_may():
    groups = ParameterGroups([Group("kernal", freeze=True)], default=Group())
    with pytest.raises(
        ValueError, match=r"'kernal' matches no parameter\. The paths are: a, b/bias"
    ):
        groups.report(PARAMS)
    fine = ParameterGroups([Group("kernal", may_be_empty=True)], default=Group())
    fine.optimizer(adam, 1e-3).init(PARAMS)


def test_a_group_whose_parameters_belong_to_others_is_an_error_that_names_them():
    message = (
        r"the group 'b/bias' gets no parameter: all it matches \(b/bias\) belong to 'b', which"
        " stands before it. Put it first"
    )
    groups = ParameterGroups([Group("b"), Group("b/bias", weight_decay=0.0)], default=Group())
    for use in (groups.labels, groups.report, groups.optimizer(adamw, 1e-3).init):
        with pytest.raises(ValueError, match=message):
            use(PARAMS)
    fine = ParameterGroups([Group("b"), Group("b/bias", may_be_empty=True)], default=Group())
    assert fine.labels(PARAMS)["b"]["bias"] == "b"


@pytest.mark.parametrize(
    "of", [layerwise_learning_rates, lambda names, decay: gradual_unfreezing(names, 5, decay=decay)]
)
def test_layers_are_found_by_their_whole_names(of):
    names = [f"layer_{i}" for i in range(12)]
    params = {"params": {name: {"kernel": jnp.ones((2, 2))} for name in names}}
    groups = of(names, 0.5)
    report = ParameterGroups(groups).report(params)
    by_path = {line.path: line.group for line in report}
    assert by_path == {f"params/{n}/kernel": g.pattern for n, g in zip(names, groups, strict=True)}
    nested = {"encoder": {"0": jnp.ones(1)}, "decoder": {"0": jnp.ones(1), "1": jnp.ones(1)}}
    either = ParameterGroups(of(["encoder/0", "decoder/0|decoder/1"], 0.5))
    assert [line.settings for line in either.report(nested)][:2] == ["as given"] * 2


def test_a_group_without_gradients_stands_still():
    groups = ParameterGroups([Group("^a$"), Group("^b", weight_decay=0.1)])
    optimizer = groups.optimizer(adamw, 1e-2, weight_decay=0.0)
    state = optimizer.init(PARAMS)
    gradients = {"a": ONES["a"], "b": {"kernel": None, "bias": None}}
    updates, after = jax.jit(optimizer.update)(gradients, state, PARAMS)
    plain = adamw(1e-2, weight_decay=0.0)
    assert_bit_equal(updates, plain.update(gradients, plain.init(PARAMS), PARAMS)[0])
    before_b, after_b = (optax.tree.get_all_with_path(s, "mu")[1][1] for s in (state, after))
    assert_bit_equal(after_b, before_b)


def test_none_among_the_parameters_is_nobodys():
    params = {"a": jnp.ones(2), "static": None}
    optimizer = ParameterGroups([Group("a")], default=Group()).optimizer(adam, 1e-2)
    plain = adam(1e-2)
    expected = plain.update(params, plain.init(params), params)[0]
    assert_bit_equal(optimizer.update(params, optimizer.init(params), params)[0], expected)


def test_a_group_frozen_until_a_step_takes_gradients_narrower_than_its_parameters():
    for gradient, param in (("bfloat16", "float32"), ("float32", "bfloat16")):
        g, x = {"w": jnp.ones(2, gradient)}, {"w": jnp.ones(2, param)}
        optimizer = ParameterGroups([Group(".", freeze=1)]).optimizer(sgd, 0.5)
        _, _, history = train(optimizer, x, [g] * 2)
        assert [u["w"].dtype for _, u in history] == [jnp.float32] * 2
        assert [float(u["w"][0]) for _, u in history] == [0.0, -0.5]


def test_a_parameter_called_value_keeps_its_name():
    params = {"attention": {"query": jnp.ones(2), "value": jnp.ones(2)}}
    groups = ParameterGroups([Group("attention/value$", freeze=True)], default=Group())
    assert [line.path for line in groups.report(params)] == ["attention/query", "attention/value"]
    assert groups.labels(params)["attention"]["value"] == "attention/value$"


def test_the_boolean_of_numpy_freezes_as_pythons_does():
    assert Group("a", freeze=np.True_).settings() == "frozen"
    assert Group("a", freeze=np.False_).settings() == "as given"
    assert Group("a", freeze=np.int64(3)).settings() == "frozen until step 3"


def test_a_recipe_that_takes_anything_takes_weight_decay():
    def recipe(learning_rate, **settings):
        return adamw(learning_rate, **settings)

    groups = ParameterGroups([Group("b", weight_decay=0.5)], default=Group())
    optimizer, zeros = groups.optimizer(recipe, 0.1), jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = optimizer.update(zeros, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["b"]["bias"], -0.05, rtol=1e-6)


def test_a_multiplier_scales_numbers_and_schedules_and_what_is_given_is_left_alone():
    groups = ParameterGroups([Group("^a$", learning_rate=0.1)], default=Group())
    for rate in (1e-2, optax.constant_schedule(1e-2)):
        optimizer = groups.optimizer(adamw, learning_rate=rate, weight_decay=0.0)
        updates, _ = optimizer.update(ONES, optimizer.init(PARAMS), PARAMS)
        plain = adamw(rate, weight_decay=0.0)
        expected, _ = plain.update(ONES, plain.init(PARAMS), PARAMS)
        assert_bit_equal(updates["b"], expected["b"])
        np.testing.assert_allclose(updates["a"], 0.1 * expected["a"], rtol=1e-6)


def test_a_group_may_have_its_own_optimizer_and_a_frozen_one_has_no_state():
    groups = ParameterGroups(
        [Group("^a$", optimizer=sgd(0.5)), Group("bias", freeze=True)], default=Group()
    )
    optimizer = groups.optimizer(adam, 1e-3)
    state = optimizer.init(PARAMS)
    updates, _ = optimizer.update(ONES, state, PARAMS)
    np.testing.assert_allclose(updates["a"], -0.5)
    assert np.all(updates["b"]["bias"] == 0)
    assert jax.tree.leaves(state.inner_states["bias"]) == []


def test_gradual_unfreezing_starts_each_layer_later_and_slower():
    params = {name: jnp.ones(1) for name in ("embed", "body", "head")}
    groups = ParameterGroups(gradual_unfreezing(["embed", "body", "head"], steps=3, decay=0.5))
    optimizer = groups.optimizer(sgd, learning_rate=1.0)
    ones = jax.tree.map(jnp.ones_like, params)
    _, _, history = train(optimizer, params, [ones] * 8)
    moved = {name: [float(updates[name][0]) for _, updates in history] for name in params}
    assert moved["head"] == [-1.0] * 8
    assert moved["body"] == [0.0] * 3 + [-0.5] * 5
    assert moved["embed"] == [0.0] * 6 + [-0.25] * 2


def test_layerwise_rates_fall_towards_the_input():
    groups = layerwise_learning_rates(["embed", r"layer_0", r"layer_1", "head"], 0.5)
    assert [g.learning_rate for g in groups] == [0.125, 0.25, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"decay must be in \(0, 1\]"):
        layerwise_learning_rates(["a"], 1.5)


def test_groups_work_in_an_nnx_optimizer():
    model = Nnx(nnx.Rngs(0))
    groups = ParameterGroups([Group("body", freeze=True)], default=Group())
    optimizer = nnx.Optimizer(model, groups.optimizer(adamw, 1e-2), wrt=nnx.Param)
    before = jnp.array(model.body.kernel[...]), jnp.array(model.head.kernel[...])
    gradients = nnx.grad(lambda m: jnp.sum(m.head(m.norm(m.body(jnp.ones((1, 2)))))))(model)
    optimizer.update(model, gradients)
    assert_bit_equal(model.body.kernel[...], before[0])
    assert np.any(model.head.kernel[...] != before[1])


def test_groups_with_a_mask_and_telemetry_work_in_an_nnx_optimizer():
    model = Nnx(nnx.Rngs(0))
    nnx.update(model, jax.tree.map(jnp.ones_like, nnx.state(model)))
    groups = ParameterGroups([Group("head", learning_rate=10.0)], default=Group())
    settings = {"weight_decay": 0.5, "mask": decay_mask, "observers": telemetry(every=1)}
    optimizer = nnx.Optimizer(model, groups.optimizer(adamw, 1e-2, **settings), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param)))
    for layer, decayed in ((model.body, 0.995), (model.head, 0.95)):
        np.testing.assert_allclose(layer.kernel[...], decayed, rtol=1e-6)
        np.testing.assert_array_equal(layer.bias[...], 1.0)
    np.testing.assert_array_equal(model.norm.scale[...], 1.0)
    rates = [v for k, v in read_telemetry(optimizer).items() if k.endswith("learning_rate")]
    np.testing.assert_allclose(sorted(rates), [1e-2, 1e-1], rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Group("a", learning_rate=-1.0), "learning_rate must be finite and at least 0"),
        (lambda: Group("a", weight_decay=-1.0), "weight_decay must be finite and at least 0"),
        (lambda: Group("(", freeze=True), "not a regular expression"),
        (lambda: Group("a", freeze=True, learning_rate=0.1), "mean nothing; leave them out"),
        (lambda: Group("a", freeze=True, optimizer=sgd(0.1)), "not both"),
        (lambda: ParameterGroups([Group("a"), Group("a")]), "a pattern of its own"),
        (lambda: ParameterGroups([Group("default")]), "other than 'default'"),
        (
            lambda: ParameterGroups([Group("a", weight_decay=0.1)]).optimizer(optax.adam, 1e-3),
            "sets weight_decay, which adam does not take",
        ),
        (lambda: Group("a", freeze=2.7), "freeze must be True, False, or the step .* got 2.7"),
        (lambda: Group("a", freeze="x"), "freeze must be True, False, or the step .* got 'x'"),
        (lambda: Group("a", freeze=-1), "freeze must be True, False, or the step .* got -1"),
        (
            lambda: ParameterGroups([Group("a")], default=Group("kernel", freeze=True)),
            "no pattern matches, but was given the pattern 'kernel'",
        ),
        (lambda: ParameterGroups([Group("")]), "every group in the table needs a pattern"),
        (lambda: ParameterGroups([Group(freeze=True)]), "needs a pattern; .* default=Group"),
        (lambda: gradual_unfreezing(["a"], 2.5), "steps must be whole and at least 1, got 2.5"),
    ],
)
def test_tables_that_make_no_sense_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ParameterGroups([{"pattern": "x"}]), "the table is made of groups, such as Group"),
        (lambda: Group(3), "a group's pattern must be a string, got 3"),
        (lambda: Group("a", learning_rate=lambda t: 0.1), "must be a number and not a schedule"),
    ],
)
def test_tables_of_something_else_are_refused(make, message):
    with pytest.raises(TypeError, match=message):
        make()


# --- Which group, at what rate, and what clipping sees ------------------------------------------


def test_the_report_says_which_groups_match_in_vain():
    groups = ParameterGroups([Group("b/bias"), Group("b"), Group("kernel$", may_be_empty=True)])
    report = groups.report({"b": PARAMS["b"]})
    assert [(line.path, line.group, line.also) for line in report] == [
        ("b/bias", "b/bias", ("b",)),
        ("b/kernel", "b", ("kernel$",)),
    ]
    assert str(report).splitlines()[1].endswith("as given (not b)")


def test_a_multiplier_may_be_traced_or_injected():
    def make(head):
        groups = ParameterGroups([Group("^a$", learning_rate=head)], default=Group())
        return groups.optimizer(adamw, 1e-2, weight_decay=0.0)

    @jax.jit
    def updates_at(head):
        optimizer = make(head)
        return optimizer.update(ONES, optimizer.init(PARAMS), PARAMS)[0]

    plain = make(1.0).update(ONES, make(1.0).init(PARAMS), PARAMS)[0]
    for head in (0.1, 3.0):
        updates = updates_at(head)
        np.testing.assert_allclose(updates["a"], head * plain["a"], rtol=1e-6)
        np.testing.assert_allclose(updates["b"]["bias"], plain["b"]["bias"], rtol=1e-6)
    injected = optax.inject_hyperparams(make)(head=0.1)
    state = injected.init(PARAMS)
    state.hyperparams["head"] = jnp.float32(3.0)
    updates, _ = jax.jit(injected.update)(ONES, state, PARAMS)
    np.testing.assert_allclose(updates["a"], 3 * plain["a"], rtol=1e-6)
    assert Group("a", learning_rate=jnp.float32(0.5)).settings() == "learning_rate x 0.5"
    assert Group("a", learning_rate=jnp.float32(1.0)).has_rate  # it may be another one later


def test_clipping_sees_the_gradients_that_are_trained():
    groups = ParameterGroups([Group("^a$", freeze=True), Group("bias", freeze=2)], default=Group())
    clip = groups.trained(optax.clip_by_global_norm(1.0))
    gradients = {
        "a": jnp.full(2, np.nan),
        "b": {"kernel": jnp.full((2, 2), 2.0), "bias": jnp.full(2, 3.0)},
    }
    state, update = clip.init(PARAMS), jax.jit(clip.update)
    for norm in (4.0, 4.0, np.sqrt(16 + 18)):  # the bias takes part from the third step on
        seen, state = update(gradients, state, PARAMS)
        np.testing.assert_allclose(seen["b"]["kernel"], 2.0 / norm, rtol=1e-6)
        assert np.isnan(seen["a"]).all()  # left as it was, for nobody
    everything, _ = optax.clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    assert np.isnan(everything["b"]["kernel"]).all()
    optimizer = optax.chain(clip, groups.optimizer(sgd, 1.0))
    assert describe(optimizer).parts[0].name == "ParameterGroups.trained"
    updates, _ = optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["b"]["kernel"], -0.5, rtol=1e-6)
    assert np.all(updates["a"] == 0)


def test_a_group_that_thaws_takes_the_same_steps_compiled_or_not():
    optimizer = ParameterGroups([Group("bias", freeze=2)], default=Group()).optimizer(adam, 0.1)
    state = compiled_state = optimizer.init(PARAMS)
    for _ in range(3):
        updates, state = optimizer.update(ONES, state, PARAMS)
        expected, compiled_state = jax.jit(optimizer.update)(ONES, compiled_state, PARAMS)
        for a, b in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    assert jax.tree.structure(state) == jax.tree.structure(compiled_state)


# --- What decays --------------------------------------------------------------------------------


def stacked_linen():
    """Four blocks in one scan, whose boxes name the axis of the layers."""

    class Block(flax.linen.Module):
        @flax.linen.compact
        def __call__(self, x, _):
            box = flax.linen.with_partitioning
            gate = self.param("gate", box(flax.linen.initializers.ones, (None,)), (3,))
            kernel = self.param("mix", box(flax.linen.initializers.ones, (None, None)), (3, 3))
            return gate * (x @ kernel), None

    scan = flax.linen.scan(
        Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=4,
        metadata_params={flax.linen.PARTITION_NAME: "layers"},
    )  # fmt: skip
    return scan().init(jax.random.key(0), jnp.ones(3), None)["params"]


def test_layers_that_are_stacked_by_linen_are_known_by_their_boxes():
    params = stacked_linen()
    shapes = {line.path: (line.shape, line.decayed) for line in decay_report(params)}
    assert shapes == {"gate": ((4, 3), False), "mix": ((4, 3, 3), True)}
    bare = flax.linen.meta.unbox(params)
    assert decay_mask(bare) == {"gate": True, "mix": True}  # nothing says so any more
    assert decay_mask(bare, stacked=".") == {"gate": False, "mix": True}
    assert decay_mask(bare, stacked={"mix": 2}) == {"gate": True, "mix": False}


def test_layers_that_are_stacked_by_equinox_keep_their_norms_from_decay():
    stack = eqx.filter_vmap(Eqx)(jax.random.split(jax.random.key(0), 4))
    decayed = [line.path for line in decay_report(stack) if line.decayed]
    assert decayed == ["body/weight", "head/weight"]

    class Named(eqx.Module):  # the type counts, the name of a module of equinox.nn does not
        first: eqx.nn.RMSNorm
        norm: eqx.nn.Linear

    def named(key):
        return Named(eqx.nn.RMSNorm(3), eqx.nn.Linear(3, 3, key=key))

    stack = eqx.filter_vmap(named)(jax.random.split(jax.random.key(0), 4))
    assert [line.path for line in decay_report(stack) if line.decayed] == ["norm/weight"]


@pytest.mark.parametrize(
    "name", ["norm", "LayerNorm_0", "ln_1", "bn2", "RMSNorm", "post_attention_layernorm", "ln_f"]
)
def test_normalisations_are_known_by_their_names(name):
    of = decay_mask({name: {"weight": jnp.ones((4, 3)), "kernel": jnp.ones((4, 3))}})
    assert of == {name: {"weight": False, "kernel": True}}


@pytest.mark.parametrize("name", ["linear", "normal", "knormed", "lnx", "normalizing_flow"])
def test_what_is_only_called_alike_decays(name):
    assert decay_mask({name: {"weight": jnp.ones((4, 3))}}) == {name: {"weight": True}}


def test_embeddings_decay_unless_they_are_left_out():
    table = jnp.ones((5, 2))
    params = {
        "wte": {"embedding": table},
        "embed": {"weight": table, "kernel": table},
        "pos_embed": table,
        "embedder_head": {"w": table},
        "head": {"w": table},
    }
    assert all(jax.tree.leaves(decay_mask(params)))
    without = functools.partial(decay_mask, embeddings=False)
    decayed = [line.path for line in decay_report(params, without) if line.decayed]
    assert decayed == ["embed/kernel", "head/w"]
    equinox = [eqx.nn.Embedding(5, 2, key=jax.random.key(0))]
    assert jax.tree.leaves(without(equinox)) == [False]
    shown = str(describe(adamw(1e-3, weight_decay=0.1, mask=without)))
    assert "mask=decay_mask(embeddings=False)" in shown


def test_the_report_is_of_any_mask():
    report = decay_report(PARAMS, {"a": False, "b": True})
    assert str(report).splitlines() == [
        "parameter  shape   decayed",
        "a          (2,)    no",
        "b/bias     (2,)    yes",
        "b/kernel   (2, 2)  yes",
    ]
    assert [line.decayed for line in decay_report(PARAMS, lambda p: True)] == [True] * 3


def test_a_stack_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match=r"stacked='blokcs' finds no parameter\. The paths are: a"):
        decay_mask(PARAMS, stacked="blokcs")
    with pytest.raises(ValueError, match=r"stacked\['a'\] must be whole and at least 0, got -1"):
        decay_mask(PARAMS, stacked={"a": -1})
