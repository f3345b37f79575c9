"""Optimizers as plain data, there and back; what cannot be data is refused by its place."""

from __future__ import annotations

import inspect
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import REPRESENTATIVE, assert_bit_equal, normal_tree, one_in

from adaptive_opt import (
    RECIPES,
    Group,
    ParameterGroups,
    adabound,
    adam,
    adamod,
    adamw,
    adaptive,
    apply_rate,
    check_checkpoint,
    checkpoint_header,
    close_step,
    config,
    decay_mask,
    decoupled_l1_decay,
    decoupled_weight_decay,
    describe,
    first_moment,
    from_bytes,
    l2_regularization,
    lookahead,
    low_memory,
    make,
    normalized_weight_decay,
    observer,
    one_cycle,
    open_step,
    per_weight_rate,
    recipe,
    scale_by_adam,
    scale_by_learning_rate,
    second_moment,
    sgd,
    single_pass,
    skip_nonfinite,
    stage,
    telemetry,
    to_bytes,
    uniform_rate,
    warm_restarts,
    zero1,
)
from adaptive_opt.core.recipe import _is_ours
from adaptive_opt.wrappers.schedules import SCHEDULES

CYCLE = one_cycle(1e-2, 100)


def there_and_back(optimizer, **handed):
    """The data of an optimizer; made again from it, it has the same description and data."""
    data = config(optimizer, **handed)
    assert json.loads(json.dumps(data, allow_nan=False)) == data
    again = make(json.loads(json.dumps(data)), **handed)
    before, after = (re.sub(r"0x\w+", "", str(describe(o))) for o in (optimizer, again))
    assert before == after
    assert config(again, **handed) == data
    return data, again


def one_update(optimizer):
    params, optimizer = normal_tree(), optax.with_extra_args_support(optimizer)
    state = optimizer.init(params)
    for seed in (1, 2):
        updates, state = optimizer.update(normal_tree(seed), state, params, value=1.0)
    return updates, state


def there_and_back_to_the_bit(optimizer, **handed):
    data, again = there_and_back(optimizer, **handed)
    assert_bit_equal(one_update(again), one_update(optimizer))
    return data


CONVENTIONS = [
    (name, argument, value)
    for name, make_one in RECIPES.items()
    if _is_ours(make_one)
    for argument, values in {"learning_rate": (1e-2,), **make_one.choices}.items()
    for value in values
]


@pytest.mark.parametrize(("name", "argument", "value"), CONVENTIONS)
def test_every_recipe_in_every_choice(name, argument, value):
    settings = {"learning_rate": 1e-2, argument: value}
    data, _ = there_and_back(RECIPES[name](**settings))
    default = inspect.signature(RECIPES[name]).parameters[argument].default
    expected = {"name": name, "learning_rate": 1e-2}
    if value != default:
        expected[argument] = value
    if inspect.signature(RECIPES[name]).parameters["learning_rate"].default == 1e-2:
        del expected["learning_rate"]
    assert data == expected
    assert str(describe(make(name, **settings))) == str(describe(RECIPES[name](**settings)))


@pytest.mark.parametrize(
    "name", [n for n in RECIPES if n in REPRESENTATIVE and _is_ours(RECIPES[n])]
)
def test_every_recipe_gives_the_same_bits(name):
    there_and_back_to_the_bit(RECIPES[name](np.float32(1e-2)))


SCHEDULED = {
    "constant": optax.constant_schedule(1e-2),
    "linear": optax.linear_schedule(0.0, 1e-2, 10, 2),
    "no transition": optax.linear_schedule(1e-2, 0.0, 0),
    "polynomial": optax.polynomial_schedule(1e-2, 0.0, 2, 10),
    "exponential": optax.exponential_decay(1e-2, 10, 0.9),
    "staircase": optax.exponential_decay(1e-2, 10, 0.9, 3, True, 1e-3),
    "cosine": optax.cosine_decay_schedule(1e-2, 100, 0.1),
    "warm-up": optax.warmup_constant_schedule(0.0, 1e-2, 5),
    "warm-up, cosine": optax.warmup_cosine_decay_schedule(0.0, 1e-2, 10, 100, 1e-4),
    "warm-up, exponential": optax.warmup_exponential_decay_schedule(0.0, 1e-2, 5, 10, 0.9),
    "steps": optax.piecewise_constant_schedule(1e-2, {10: 0.1, 20: 0.5}),
    "interpolated": optax.piecewise_interpolate_schedule("linear", 1e-2, {10: 0.5, 20: 0.1}),
    "cosine cycle": optax.cosine_onecycle_schedule(100, 1e-2),
    "linear cycle": optax.linear_onecycle_schedule(100, 1e-2),
    "restarts": optax.sgdr_schedule(
        [{"init_value": 0.0, "peak_value": 1e-2, "warmup_steps": 2, "decay_steps": 10}] * 2
    ),
    "ours": CYCLE.learning_rate,
    "our restarts": warm_restarts(10, growth=2.0),
    "our decay": normalized_weight_decay(0.1, 10, growth=2.0),
}


@pytest.mark.parametrize("name", one_in(4, SCHEDULED))
def test_schedules(name):
    schedule = SCHEDULED[name]
    schedule(3)
    data = there_and_back_to_the_bit(adamw(schedule))
    again = make(data)
    assert config(again) == data


AS_DATA = {
    "linear_schedule": {"init_value": 0.0, "end_value": 0.1, "transition_steps": 5},
    "warmup_cosine_decay_schedule": {
        "init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "decay_steps": 9,
    },
    "piecewise_constant_schedule": {"init_value": 0.1, "boundaries_and_scales": {"3": 0.5}},
    "piecewise_interpolate_schedule": {
        "interpolate_type": "cosine", "init_value": 0.1, "boundaries_and_scales": {"3": 0.5},
    },
    "cosine_onecycle_schedule": {"transition_steps": 10, "peak_value": 0.1},
    "sgdr_schedule": {
        "cosine_kwargs": [
            {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 3, "decay_steps": 9}
        ]
    },
    "join_schedules": {
        "schedules": [
            {"schedule": "constant_schedule", "value": 0.1},
            {"schedule": "warm_restarts", "period": 5},
        ],
        "boundaries": [4],
    },
    "one_cycle.b1": {"max_learning_rate": 0.1, "total_steps": 10},
}  # fmt: skip


@pytest.mark.parametrize("name", AS_DATA)
def test_schedules_that_were_data_stay_what_they_were(name):
    data = {"name": "adam", "learning_rate": {"schedule": name, **AS_DATA[name]}}
    one, other = make(data), make(json.loads(json.dumps(data)))
    assert config(one) == data
    schedule = describe(one).settings["learning_rate"]
    assert schedule == describe(other).settings["learning_rate"]
    assert hash(schedule) == hash(describe(other).settings["learning_rate"])
    assert jax.tree.unflatten(*jax.tree.flatten(schedule)[::-1])(3) == schedule(3)
    if name == "linear_schedule":
        assert schedule(2) == optax.linear_schedule(**AS_DATA[name])(2)
        direct = adam(optax.linear_schedule(**AS_DATA[name]))
        assert_bit_equal(one_update(one), one_update(direct))


def test_every_schedule_is_in_the_register_by_its_own_name():
    for name in ("warm_restarts", "normalized_weight_decay", "one_cycle.b1"):
        assert name in SCHEDULES
    fixed = {"schedule": "normalized_weight_decay", "weight_decay": 0.05, "period": 10_000}
    made = make("adamw", learning_rate=1e-3, weight_decay=fixed)
    assert config(made)["weight_decay"] == 0.0005  # as the function returns it


OPTAX = {
    "clip": optax.clip(1.0),
    "norm": optax.clip_by_global_norm(1.0),
    "block": optax.clip_by_block_rms(1.0),
    "adaptive": optax.adaptive_grad_clip(0.1),
    "centralize": optax.centralize(),
    "nans": optax.zero_nans(),
    "nonnegative": optax.keep_params_nonnegative(),
    "identity": optax.identity(),
    "zero": optax.set_to_zero(),
    "scale": optax.scale(-2.0),
    "schedule": optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 9)),
    "rate": optax.scale_by_learning_rate(0.1),
    "scheduled rate": optax.scale_by_learning_rate(CYCLE.learning_rate, flip_sign=False),
    "decay": optax.add_decayed_weights(0.1),
    "masked decay": optax.add_decayed_weights(0.1, decay_mask),
    "trace": optax.trace(0.9, nesterov=True),
    "ema": optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
    "finite": optax.apply_if_finite(adam(0.1), 3),
    "accumulated": optax.MultiSteps(adam(0.1), 2).gradient_transformation(),
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "masked": optax.masked(adam(0.1), {"dense": {"kernel": True, "bias": False}, "scale": True}),
    "partition": optax.partition(
        {"a": adam(0.1), "b": optax.sgd(0.1)}, {"dense": "a", "scale": "b"}
    ),
    "chain": optax.chain(optax.clip(1.0), optax.chain(adamod(1e-2)), optax.scale(0.5)),
}


@pytest.mark.parametrize("name", OPTAX)
def test_what_is_optax_s(name):
    there_and_back_to_the_bit(OPTAX[name])


DTYPES = {"state_dtype": jnp.bfloat16}
OURS = {
    "lookahead": lookahead(adam(1e-2, b2=0.99), 5, state_dtype=jnp.float32),
    "guard": skip_nonfinite(optax.chain(optax.clip(1.0), adam(1e-2)), ("a", "b")),
    "low memory": low_memory(adam(1e-2), "8-bit", buffers={"nu": "wide"}, min_size=1),
    "single pass": single_pass(adam(1e-2)),
    "wrapped twice": single_pass(lookahead(skip_nonfinite(sgd(1e-2)))),
    "l2": l2_regularization(0.1),
    "decay": decoupled_weight_decay(0.1, decay_mask, learning_rate=CYCLE.learning_rate),
    "l1": decoupled_l1_decay(0.1, {"dense": True, "scale": False}),
    "rate": scale_by_learning_rate(0.1, flip_sign=False),
    "scale_by_adam": scale_by_adam(nesterov=True),
    "bracket": adaptive(
        first_moment(0.8, name="slow"), second_moment(0.99, scope="tensor"), per_weight_rate(1e-8),
        apply_rate(), uniform_rate(0.5), telemetry(every=3, name="mine", groups={"name": "kernel"}),
    ),
    "flat": optax.chain(open_step(), first_moment(0.9), close_step()),
    "dtypes": adamw(1e-2, mu_dtype=jnp.dtype("float16"), **DTYPES),
    "observed": adamod(1e-2, observers=[telemetry(every=2), telemetry(name="b", b1=0.5)]),
    "observed once": adamod(1e-2, observers=telemetry(every=2)),
    "momentum": adamw(CYCLE.learning_rate, b1=CYCLE.b1),
    "mask": adamw(1e-2, mask={"dense": {"kernel": True, "bias": False}, "scale": False}),
    "mask like data": adamw(1e-2, mask={"dict": {"dense": True, "scale": False}}["dict"]),
    "restarts": adamw(
        1e-2, decay="independent", schedule=warm_restarts(10), weight_decay=jnp.float32(0.5)
    ),
}  # fmt: skip


@pytest.mark.broad
@pytest.mark.parametrize("name", [n for n in OURS if n not in ("guard",)])
def test_what_is_ours(name):
    optimizer = OURS[name]
    if name == "observed once":
        assert config(optimizer)["observers"] == {"name": "telemetry", "every": 2}
    there_and_back_to_the_bit(optimizer)


def test_axes_are_a_tuple_again():
    data, again = there_and_back(OURS["guard"])
    assert data["axis_name"] == ["a", "b"]
    assert describe(again).settings["axis_name"] == ("a", "b")


GROUPS = ParameterGroups(
    [
        Group("bias$", weight_decay=0.0, learning_rate=2.0),
        Group("scale", freeze=3),
        Group("never", optimizer=lookahead(sgd(0.1)), may_be_empty=True),
        Group("nothing", freeze=True, may_be_empty=True),
    ],
    default=Group(),
)


def test_groups_are_data_and_printed_once_under_their_names():
    optimizer = GROUPS.optimizer(adamw, optax.linear_schedule(0.1, 0.0, 5), weight_decay=0.1)
    data = there_and_back_to_the_bit(optimizer)
    assert data["recipe"]["weight_decay"] == 0.1
    assert data["groups"][0] == {"pattern": "bias$", "weight_decay": 0.0, "learning_rate": 2.0}
    assert data["default"] == {}
    text = str(describe(optimizer))
    assert text.splitlines()[0].startswith("ParameterGroups(recipe=adamw, learning_rate=poly")
    for key in ("bias$: adamw(", "scale: ", "never: lookahead(", "nothing: set_to_zero"):
        assert text.count(f"  {key}") == 1
    assert [p.key for p in describe(optimizer).parts][-1] == "default"


def test_a_partition_is_printed_under_its_labels():
    text = str(describe(optax.partition({"a": sgd(0.1), "b": adam(0.1)}, "a")))
    assert re.findall(r"\n  (\w: \w+)", text) == ["a: sgd", "b: adam"]


def test_a_recipe_and_a_stage_of_one_s_own():
    @stage
    def halved_for_data(by=2.0, *, betas=(1.0, 2.0)):
        del betas
        return lambda step: step.set(direction=step.direction / by)

    @recipe
    def heavy_for_data(learning_rate, b1=0.9, *more, **settings):
        del settings
        brackets = adaptive(first_moment(b1), halved_for_data(4.0)), *more
        return *brackets, scale_by_learning_rate(learning_rate)

    optimizer = heavy_for_data(0.1, 0.8, optax.clip(1.0), extra=3)
    data = there_and_back_to_the_bit(optimizer)
    assert data == {
        "name": "heavy_for_data", "learning_rate": 0.1, "b1": 0.8,
        "more": [{"optax": "clip", "max_delta": 1.0}], "extra": 3,
    }  # fmt: skip
    there_and_back_to_the_bit(adaptive(halved_for_data(3.0, betas=(0.5, 0.25))))
    del RECIPES["heavy_for_data"]


def test_what_cannot_be_data_is_handed_in():
    def mine(step):
        return 1e-2 / (step + 1)

    def look(step):
        return {"norm": optax.tree.norm(step.gradient)}

    watch = observer(look, {"norm": ()}, name="norm")
    lion = optax.scale_by_lion()
    functions = {"mine": mine, "watch": watch, "lion": lion}
    optimizer = optax.chain(lion, adam(mine, observers=[watch]))
    data = there_and_back_to_the_bit(optimizer, functions=functions)
    handed_in = [{"function": "watch"}]
    assert data["chain"] == [
        {"function": "lion"},
        {"name": "adam", "learning_rate": {"function": "mine"}, "observers": handed_in},
    ]  # fmt: skip
    mesh = jax.make_mesh((1,), ("data",))
    data, _ = there_and_back(zero1(adam(1e-2), mesh), functions={"mesh": mesh})
    assert data["mesh"] == {"function": "mesh"}
    groups = ParameterGroups([], default=Group()).optimizer(optax.adam, 1e-2)
    data = there_and_back_to_the_bit(groups, functions={"adam": optax.adam})
    assert data["recipe"] == {"function": "adam", "learning_rate": 1e-2}
    with pytest.raises(ValueError, match="the function 'mine' is none of decay_mask: hand it in"):
        make({"name": "adam", "learning_rate": {"function": "mine"}})


def namesake():
    @stage
    def first_moment(b1):
        return lambda step: step.set(direction=b1 * step.direction)

    return adaptive(first_moment(0.5))


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: adam(lambda t: 0.1), "^learning_rate is a function, <lambda>, which cannot be"),
        (lambda: optax.chain(optax.clip(1.0), adam(lambda t: 0.1)), r"^chain\[1\]\.learning_rate "),
        (lambda: lookahead(adamw(0.1, mask=lambda p: p)), r"^inner\.mask is a function"),
        (lambda: adamw(0.1, mask=(True, False)), "^mask is of type tuple"),
        (lambda: adamw(0.1, b1=jnp.ones(2)), "b1 must be a scalar"),
        (lambda: optax.clip(float("inf")), "^max_delta is inf, which cannot be data"),
        (lambda: optax.lion(0.1), r"^chain\[0\]: optax's scale_by_lion is none of adaptive_grad"),
        (lambda: optax.inject_hyperparams(adam)(0.1), "optax's inject_hyperparams is none"),
        (lambda: optax.GradientTransformation(lambda p: (), adam(0.1).update), "another's init"),
        (lambda: optax.GradientTransformation(lambda p: (), OPTAX["chain"].update), "init"),
        (lambda: optax.GradientTransformation(lambda p: (), lambda u, s, p=None: u), "not made"),
        (
            lambda: zero1(adam(0.1), jax.make_mesh((1,), ("data",))),
            "^mesh is a function, Mesh",
        ),
        (lambda: GROUPS.optimizer(optax.adamw, 0.1), "^recipe is a function, 'adamw', that is not"),
        (lambda: sgd(0.1, momentum=jnp.zeros(())), "cannot be data: made again"),
        (lambda: adaptive(observer(lambda s: {}, {}, name="x")), r"stages\[0\]: its argument look"),
        (namesake, r"stages\[0\]: first_moment is no recipe of RECIPES or stage"),
    ],
)
def test_what_cannot_be_data_is_refused_with_its_place(made, message):
    with pytest.raises(ValueError, match=message):
        config(made())


def test_a_traced_number_cannot_be_data():
    @jax.jit
    def traced(rate):
        with pytest.raises(ValueError, match="learning_rate is traced"):
            config(adam(rate))
        assert config(adamw(SCHEDULED["cosine"]))["name"] == "adamw"
        return rate

    traced(0.1)


CLIP, ADAM = {"optax": "clip", "max_delta": 1.0}, {"name": "adam", "learning_rate": 0.1}
LINEAR = {"schedule": "linear_schedule", **AS_DATA["linear_schedule"]}


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (
            "adamot",
            ValueError,
            "^there is no 'adamot'; did you mean 'adamod'.* There are .*adabound",
        ),
        (3, TypeError, "^make takes a name or a dict"),
        ({}, TypeError, "^an optimizer is a dict with 'name'"),
        ({"name": 3}, TypeError, "an optimizer is a dict with 'name'"),
        ({"name": "adam"}, TypeError, "adam: missing a required argument: 'learning_rate'"),
        (
            {"name": "adamw", "learning_rate": 0.1, "weightdecay": 0.1},
            TypeError,
            "^adamw takes no argument 'weightdecay'. Did you mean weight_decay",
        ),
        ({"chain": [CLIP, {**ADAM, "b7": 1}]}, TypeError, r"^chain\[1\]: adam takes no argument"),
        ({"chain": [CLIP], "more": 1}, TypeError, "'chain' takes no arguments, got more"),
        ({"chain": [CLIP, {"optax": "clipp"}]}, ValueError, r"^chain\[1\]: .*mean 'clip'"),
        ({"optax": "clip"}, TypeError, "missing a required argument: 'max_delta'"),
        ({"optax": "clip", "max_delta": "NaN"}, TypeError, "max_delta must be a number, got 'NaN'"),
        ({"optax": "clip", "max_delta": True}, TypeError, "max_delta must be a number, got True"),
        ({"optax": "clip", "max_delta": None}, TypeError, "max_delta must be a number, got None"),
        ({"optax": "clip", "max_delta": [1.0]}, TypeError, "max_delta must be a number"),
        ({"optax": "clip", "max_delta": float("nan")}, ValueError, "max_delta must be finite"),
        ({**ADAM, "learning_rate": "0.1"}, TypeError, "learning_rate must be a number"),
        ({**ADAM, "learning_rate": None}, TypeError, "learning_rate must be a number"),
        ({**ADAM, "learning_rate": float("inf")}, ValueError, "learning_rate must be finite"),
        ({**ADAM, "b1": "0.9"}, TypeError, "b1 must be a number, got '0.9'"),
        ({**ADAM, "nesterov": "false"}, TypeError, "nesterov must be true or false, got 'false'"),
        ({**ADAM, "state_dtype": "float33"}, ValueError, "must be the name of a dtype"),
        ({"name": "adamw", "learning_rate": 1, "mask": "x"}, ValueError, "mask must be a tree of"),
        ({**ADAM, "convention": "x"}, ValueError, "convention must be one of 'torch'"),
        ({**ADAM, "learning_rate": {"schedule": "x"}}, ValueError, "^learning_rate: there is no"),
        (
            {**ADAM, "learning_rate": {**LINEAR, "end_value": "0"}},
            TypeError,
            r"^learning_rate\.end_value must be a number, got '0'",
        ),
        (
            {**ADAM, "learning_rate": {**LINEAR, "endvalue": 0}},
            TypeError,
            "^learning_rate: linear_schedule takes no argument 'endvalue'. Did you mean end_value",
        ),
        ({"schedule": "linear_schedule"}, TypeError, "an optimizer is a dict with"),
        ({"name": "lookahead", "inner": {"name": "adamm"}}, ValueError, "^inner: there is no"),
        ({"name": "lookahead", "inner": 3}, TypeError, "lookahead takes an optimizer"),
        ({"name": "ParameterGroups", "recipe": 3}, TypeError, "^recipe is a recipe: a dict"),
        (
            {"name": "ParameterGroups", "recipe": ADAM, "groups": [{"patern": "x"}]},
            TypeError,
            "a group takes no argument 'patern'. Did you mean pattern",
        ),
        ({"name": "adaptive", "stages": [ADAM]}, TypeError, "adaptive.* takes stages"),
    ],
)
def test_bad_data_is_refused_with_its_place(data, error, message):
    with pytest.raises(error, match=message):
        make(data)


def test_settings_take_the_place_of_those_in_the_data():
    slower = make(config(adamw(1e-3, b1=0.8)), learning_rate=1e-4, mask=decay_mask)
    assert config(slower) == {
        "name": "adamw", "learning_rate": 1e-4, "b1": 0.8, "mask": "decay_mask",
    }  # fmt: skip
    assert config(make(adabound.__name__, learning_rate=1e-3)) == config(adabound(1e-3))


def test_a_header_builds_its_optimizer_again():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), adamod(CYCLE.learning_rate))
    params = normal_tree()
    state = optimizer.init(params)
    header = json.loads(json.dumps(checkpoint_header(optimizer, state)))
    for again in (make(header), make(header["config"])):
        assert_bit_equal(one_update(again), one_update(optimizer))
        check_checkpoint(header, again, again.init(params))
        assert_bit_equal(from_bytes(again, state, to_bytes(optimizer, state)), state)
    old = {k: v for k, v in header.items() if not k.startswith("config")}
    check_checkpoint(old, optimizer, state)
    with pytest.raises(ValueError, match="cannot rebuild its optimizer: it was written before"):
        make(old)
    other = adam(lambda step: 0.1)
    header = checkpoint_header(other, other.init(params))
    assert header["config"] is None
    check_checkpoint(header, other, other.init(params))
    with pytest.raises(ValueError, match="rebuild its optimizer: learning_rate is a function"):
        make(header)


@pytest.mark.parametrize(
    ("recipe", "tree"),
    [
        ("adamw", {"mask": [True, False]}),
        ("lamb", {"trust_mask": [True, False]}),
        ("muon", {"matrices": [True, False]}),
        ("adam_mini", {"blocks": ["row", "weight"]}),
    ],
)
def test_a_list_that_is_a_tree_comes_back_as_a_list(recipe, tree):
    params = [jnp.ones((2, 2)), jnp.ones(2)]
    optimizer = make(config(make(recipe, learning_rate=1e-3, **tree)))
    optimizer.update(params, optimizer.init(params), params)
