"""Wrong orders, wrong places and wrong values fail at once, and say what to do."""

from __future__ import annotations

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import ADAMS, RECIPES, normal_tree, often

import adaptive_opt
from adaptive_opt import (
    OpenStep,
    WholeTree,
    adadelta_units,
    adam,
    adamod,
    adamod_momental_bound,
    adamw,
    adaptive,
    amsgrad,
    amsgrad_max,
    centered_moment,
    close_step,
    debias,
    debias_rate,
    decoupled_weight_decay,
    diffgrad,
    diffgrad_friction,
    diffmod,
    first_moment,
    nesterov_moment,
    open_step,
    per_weight_rate,
    scale_by_adam,
    scale_rate,
    second_moment,
    stage,
)


@stage
def belief(b2):
    """AdaBelief's line, as a user would write it."""

    def line(step):
        surprise = (step.gradient - step.raw("direction")) ** 2
        return step.set(second_moment=step.average("nu", surprise, b2))

    return line


@stage
def smoothed_rate(b3):
    """An average of the rate, as a user would write it."""

    def line(step):
        return step.set(rate=step.average("rate_ema", step.rate, b3))

    return line


def test_a_rate_that_remembers_is_corrected_before():
    first = first_moment(0.9), second_moment(0.999), per_weight_rate(1e-8)
    adaptive(*first, debias_rate(0.9, 0.999), smoothed_rate(0.9))
    acted = "corrects a rate on which smoothed_rate has acted already. Put debias_rate before"
    with pytest.raises(ValueError, match=acted):
        adaptive(*first, smoothed_rate(0.9), debias_rate(0.9, 0.999))


# Each stage, and the stages that have to stand before it. Written from the papers' listings and not
# from the implementation.
MOMENTS = ("first_moment", "second_moment")
PRECEDENCE = {
    "first_moment": (lambda: first_moment(0.9), ()),
    "second_moment": (lambda: second_moment(0.9), ()),
    "debias": (lambda: debias(0.9, 0.9), MOMENTS),
    "debias_b2": (lambda: debias(b2=0.9), ("second_moment",)),
    "nesterov_moment": (lambda: nesterov_moment(0.9), ("first_moment",)),
    "scale_by_adam": (lambda: scale_by_adam(), ()),
    "amsgrad_max": (lambda: amsgrad_max(), ("second_moment", "scale_by_adam")),
    "per_weight_rate": (lambda: per_weight_rate(1e-8), ("second_moment",)),
    "debias_rate": (
        lambda: debias_rate(0.9, 0.9),
        (*MOMENTS, "per_weight_rate", "amsgrad_max"),
    ),
    "scale_rate": (
        lambda: scale_rate(0.1),
        ("per_weight_rate", "amsgrad_max", "debias", "debias_b2", "scale_by_adam"),
    ),
    "adamod_momental_bound": (
        lambda: adamod_momental_bound(),
        ("per_weight_rate", "amsgrad_max", "debias", "debias_b2", "debias_rate", "scale_by_adam"),
    ),
    "diffgrad_friction": (lambda: diffgrad_friction(), ()),
}
# Lists of stages that make an algorithm, each to be tried in every order.
ALGORITHMS = {
    "debias": (
        "first_moment", "second_moment", "debias", "amsgrad_max", "per_weight_rate", "scale_rate",
        "adamod_momental_bound",
    ),
    "debias_rate": (
        "first_moment", "second_moment", "amsgrad_max", "per_weight_rate", "debias_rate",
        "scale_rate", "adamod_momental_bound",
    ),
    "nesterov": (
        "first_moment", "second_moment", "nesterov_moment", "debias_b2", "per_weight_rate",
        "diffgrad_friction",
    ),
    "adam": ("scale_by_adam", "amsgrad_max", "adamod_momental_bound", "scale_rate"),
}  # fmt: skip


def is_right(order) -> bool:
    if {"nesterov_moment", "diffgrad_friction"} <= {*order}:
        # Nesterov mixes the average with the gradient: friction in between would damp only one.
        between = [name for name in order if name not in ("second_moment", "debias_b2")]
        first, friction, nesterov = map(
            between.index, ("first_moment", "diffgrad_friction", "nesterov_moment")
        )
        if first < friction < nesterov:
            return False
    return all(
        order.index(before) < order.index(name)
        for name in order
        for before in PRECEDENCE[name][1]
        if before in order
    )


SHORTER = {  # all orders of seven stages are 5,040
    name: tuple(part for part in algorithm if part != "scale_rate")
    if len(algorithm) == 7
    else algorithm
    for name, algorithm in ALGORITHMS.items()
}


@pytest.mark.parametrize(
    "algorithm",
    often(
        [SHORTER["adam"]],
        dict.fromkeys((*SHORTER.values(), *ALGORITHMS.values())),
        more=SHORTER.values(),
    ),
    ids="-".join,
)
def test_exactly_the_right_orders_of_the_stages_are_accepted(algorithm):
    stages = {name: PRECEDENCE[name][0]() for name in algorithm}
    right = 0
    for order in itertools.permutations(algorithm):
        if is_right(order):
            adaptive(*(stages[name] for name in order))
            right += 1
        else:
            with pytest.raises(ValueError, match=r"Put|Keep one"):
                adaptive(*(stages[name] for name in order))
    assert right > 1


def test_a_flat_chain_refuses_what_a_bracket_refuses():
    x = {"w": jnp.ones(3)}
    for left, right in itertools.permutations(PRECEDENCE, 2):
        stages = [PRECEDENCE[left][0](), PRECEDENCE[right][0]()]
        flat = optax.chain(open_step(), *stages, close_step())
        outcomes = []
        for build in (lambda: adaptive(*stages), lambda: flat.update(x, flat.init(x), x)):  # noqa: B023
            try:
                build()
                outcomes.append(None)
            except ValueError as error:
                outcomes.append(str(error))
        assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([amsgrad_max()], "amsgrad_max reads the second_moment .* Put amsgrad_max after"),
        ([adamod_momental_bound()], "adamod_momental_bound reads the rate .* not set yet"),
        ([scale_rate(0.1)], "scale_rate reads the rate .* per_weight_rate"),
        ([second_moment(0.9)], "second moment that no rate uses. Put per_weight_rate"),
        (
            [scale_by_adam(), adamod_momental_bound(), amsgrad_max()],
            "the rate no longer follows it.* Put amsgrad_max before adamod_momental_bound",
        ),
        (
            [scale_by_adam(), scale_rate(0.1), amsgrad_max()],
            "Put amsgrad_max before scale_rate",
        ),
        ([scale_by_adam(), debias(b1=0.9)], r"debias\(b1\) corrects .* corrected already"),
        ([scale_by_adam(), debias(b2=0.9)], r"debias\(b2\) corrects .* corrected already"),
        (
            [scale_by_adam(), debias_rate(0.9, 0.9)],
            r"debias_rate\(b1\) corrects .* corrected already",
        ),
        ([debias(b1=0.9), first_moment(0.9)], "no moving average here"),
        ([nesterov_moment(0.9)], "no moving average here"),
        ([scale_by_adam(), per_weight_rate(1e-8)], "would overwrite the rate"),
        ([second_moment(0.9), scale_by_adam()], "would overwrite the second_moment"),
        (
            [
                second_moment(0.9),
                first_moment(0.9),
                per_weight_rate(0.1),
                adamod_momental_bound(),
                debias_rate(0.9, 0.9),
            ],
            r"debias_rate\(b1\) corrects a rate on which adamod_momental_bound has acted",
        ),
        ([first_moment(0.9), debias(b1=0.5)], r"decay 0.5, but .* an average with the decay 0.9"),
        (
            [first_moment(0.9), first_moment(0.5, name="b"), debias(b1=0.5)],
            "the direction is an average of averages",
        ),
        (
            [first_moment(0.9), diffgrad_friction(), nesterov_moment(0.9)],
            "Put nesterov_moment right after the stage that averages",
        ),
        ([first_moment(0.9), first_moment(0.9)], "two stages keep a buffer called 'mu'"),
        ([scale_by_adam(), amsgrad_max(name="nu")], "two stages keep a buffer called 'nu'"),
        (
            [second_moment(0.9, scope="tree"), centered_moment(0.9), per_weight_rate(0.0)],
            r"centered_moment makes the second_moment .*\(3, 2\), but it has the shape \(\)\."
            r".*\(the scope of second_moment\)",
        ),
        (
            [second_moment(0.9, scope="tree"), per_weight_rate(0.0), adadelta_units(0.9, 0.1)],
            r"adadelta_units makes the rate .* \(3, 2\), but it has the shape \(\)",
        ),
        (
            [first_moment(0.9), debias(b1=0.9), belief(0.9)],
            "belief corrects the direction .* has been corrected already",
        ),
        ([belief(0.9)], "belief corrects the direction .* is no moving average here"),
        (
            [first_moment(0.9), diffgrad_friction(), belief(0.9), per_weight_rate(0.0)],
            "belief needs the direction as the average it was made.* Put belief right after",
        ),
    ],
)
def test_the_error_of_a_wrong_list_names_the_stage_and_its_place(stages, message):
    with pytest.raises(ValueError, match=message):
        adaptive(*stages)


def test_stages_that_follow_have_the_scope_of_the_second_moment():
    x = {"w": jnp.ones((3, 2))}
    for scope, shape in (("weight", (3, 2)), ("tensor", ()), ("tree", ())):
        rule = adaptive(
            first_moment(0.9),
            second_moment(0.9, scope=scope),
            amsgrad_max(),
            per_weight_rate(1e-8),
            adamod_momental_bound(),
        )
        buffers = rule.update(x, rule.init(x))[1].buffers
        assert {buffers[name]["w"].shape for name in ("nu_max", "rate_ema")} == {shape}


def test_a_flat_chain_refuses_a_follower_of_another_scope_when_it_is_traced():
    stages = second_moment(0.9, scope="tensor"), amsgrad_max(), per_weight_rate(0.0)
    flat, x = optax.chain(open_step(), *stages, close_step()), {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"'nu_max' at \['w'\] has shape \(3,\).*adaptive\(...\)"):
        flat.update(x, flat.init(x), x)


def test_a_stage_may_keep_one_number_for_rates_of_every_weight():
    @stage
    def halving(*, name="halvings"):
        def line(steps: OpenStep) -> OpenStep:
            n = steps.remember(name, lambda n, one: n + one, 1.0)
            return steps.each(lambda step: step.set(rate=step.rate / 2**n))

        return WholeTree(line)

    rule, x = (
        adaptive(scale_by_adam(0.5, 0.5, 0.0), halving()),
        {"a": jnp.ones(2), "b": jnp.ones(())},
    )
    updates, state = rule.update(x, rule.init(x))
    np.testing.assert_allclose(updates["a"], 0.5, rtol=1e-6)
    assert state.buffers["halvings"] == 1


def test_a_second_buffer_of_a_kind_is_welcome_under_another_name():
    twice = adaptive(first_moment(0.9), first_moment(0.5, name="mu_slow"))
    assert set(twice.init(jnp.zeros(1)).buffers) == {"mu", "mu_slow"}


def test_stages_refuse_plain_updates():
    x = jnp.ones(2)
    for name, (make, _) in PRECEDENCE.items():
        if name == "scale_by_adam":  # the drop-in
            continue
        made = make()
        with pytest.raises(TypeError, match=r"needs an open step.*Put open_step\(\) before"):
            made.update(x, made.init(x), x)
    with pytest.raises(TypeError, match=r"close_step\(\) needs an open step"):
        close_step().update(x, close_step().init(x), x)


def test_a_step_is_opened_once():
    x = jnp.ones(2)
    twice = optax.chain(open_step(), open_step(), close_step())
    with pytest.raises(TypeError, match="open already"):
        twice.update(x, twice.init(x))
    nested = optax.chain(open_step(), adaptive(first_moment(0.9)), close_step())
    with pytest.raises(TypeError, match="opens and closes one by itself"):
        nested.update(x, nested.init(x))


def test_a_bracket_takes_nothing_but_stages():
    for foreign in (optax.clip(1.0), adaptive(first_moment(0.9)), optax.scale_by_adam(), 3.0):
        with pytest.raises(TypeError, match="takes stages"):
            adaptive(foreign)


FOREIGN = {
    "add_decayed_weights": optax.add_decayed_weights(0.1),
    "add_noise": optax.add_noise(1.0, 0.5, 0),
    "apply_every": optax.apply_every(2),
    "apply_if_finite": optax.apply_if_finite(optax.scale(0.5), 3),
    "centralize": optax.centralize(),
    "clip": optax.clip(1.0),
    "clip_by_block_rms": optax.clip_by_block_rms(1.0),
    "clip_by_global_norm": optax.clip_by_global_norm(1.0),
    "adaptive_grad_clip": optax.adaptive_grad_clip(0.1),
    "ema": optax.ema(0.9),
    "freeze": optax.freeze({"w": True}),
    "masked": optax.masked(optax.scale(0.5), {"w": True}),
    "normalize_by_update_norm": optax.normalize_by_update_norm(),
    "partition": optax.partition({"a": optax.scale(0.5)}, {"w": "a"}),
    "scale": optax.scale(0.5),
    "scale_by_adam": optax.scale_by_adam(),
    "scale_by_learning_rate": optax.scale_by_learning_rate(0.5),
    "scale_by_rms": optax.scale_by_rms(),
    "scale_by_schedule": optax.scale_by_schedule(lambda _: 0.5),
    "scale_by_trust_ratio": optax.scale_by_trust_ratio(),
    "set_to_zero": optax.set_to_zero(),
    "sgd": optax.sgd(0.1, momentum=0.9),
    "trace": optax.trace(0.9),
    "zero_nans": optax.zero_nans(),
    "decoupled_weight_decay": decoupled_weight_decay(0.1),
    "scale_by_learning_rate (ours)": adaptive_opt.scale_by_learning_rate(0.1),
    "adam": adam(1e-3),
    "amsgrad": amsgrad(1e-3),
}


BETWEEN = [(name, {"w": jnp.ones(3)}) for name in FOREIGN]
BETWEEN += [(name, jnp.ones(3)) for name in FOREIGN.keys() - {"freeze", "masked", "partition"}]


@pytest.mark.parametrize(("name", "x"), sorted(BETWEEN, key=lambda pair: pair[0]))
def test_a_transformation_between_open_and_close_fails_with_our_message(name, x):
    foreign = FOREIGN[name]
    chain = optax.chain(open_step(), diffgrad_friction(), foreign, close_step())
    with pytest.raises(TypeError, match=r"AdaptiveStep reached something|opens and closes one"):
        chain.update(x, chain.init(x), x)


def test_a_transformation_that_maps_over_the_parameters_first_fails_with_our_words_too():
    chain = optax.chain(open_step(), optax.keep_params_nonnegative(), close_step())
    x = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"only stages .* read it.* close_step\(\)"):
        chain.update(x, chain.init(x), x)


def test_a_missing_close_fails_where_the_step_arrives():
    x = {"w": jnp.ones(3)}
    chain = optax.chain(open_step(), scale_by_adam())
    with pytest.raises(TypeError, match=r"if there is no close_step\(\) yet, add it"):
        jax.jit(chain.update)(x, chain.init(x), x)
    step, _ = chain.update(x, chain.init(x), x)
    assert isinstance(step, OpenStep)
    assert "close_step() turns it into updates" in repr(step)
    with pytest.raises(ValueError, match=r"only stages .* read it.* close_step\(\)"):
        optax.apply_updates(x, step)


def of_line(line):
    """A stage of this line."""

    @stage
    def user():
        return line

    return user()


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (lambda step: None, TypeError, "the line of user must return a step, got None"),
        (lambda step: (step, 1), TypeError, "must return a step"),
        (lambda step: step.set(momentum=1), TypeError, "sets 'momentum': a step has gradient,"),
        (
            lambda step: step.set(direction=adaptive_opt.RateRule(jnp.sqrt)),
            TypeError,
            "user sets the direction to a RateRule, which is a rate",
        ),
        (lambda step: step.set(rate=1.0), ValueError, "user would overwrite the rate"),
        (lambda step: step.set(second_moment=1.0), ValueError, "overwrite the second_moment"),
        (
            lambda step: step.set(direction=step.direction[0]),
            ValueError,
            r"user makes the direction an array of shape \(2,\), but it has the shape \(3, 2\)",
        ),
        (lambda step: step.note(x=step.noted("friction")), ValueError, "reads the note 'friction'"),
        (
            lambda step: step.set(rate=1j * step.rate),
            TypeError,
            "user makes the rate complex, which is real",
        ),
        (lambda step: step.limit(lr=1.0), AttributeError, "lr"),
    ],
)
def test_a_line_that_makes_no_sense_is_refused(line, error, message):
    with pytest.raises(error, match=message):
        adaptive(scale_by_adam(), of_line(line)).init(jnp.ones((3, 2)))


def test_a_stage_takes_no_keywords():
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'reads'"):
        stage(reads=("rate",))
    with pytest.raises(
        TypeError, match=r"first_moment takes no argument 'dtpye'\. Did you mean dt"
    ):
        first_moment(0.9, dtpye=jnp.bfloat16)


def test_what_update_was_not_given_is_named():
    rule, x = adaptive(of_line(lambda step: step.set(rate=step.extra("value")))), jnp.ones(2)
    with pytest.raises(ValueError, match=r"user needs value: call update\(.*, value=\.\.\.\)"):
        rule.update(x, rule.init(x), x)
    np.testing.assert_allclose(rule.update(x, rule.init(x), x, value=3.0)[0], 3.0)
    rule = adaptive(of_line(lambda step: step.set(direction=step.param)))
    with pytest.raises(ValueError, match="user needs the parameters: call update"):
        rule.update(x, rule.init(x))


def test_a_stage_that_only_reads_the_rate_leaves_it_a_rule():
    seen = []

    @stage
    def observer():
        def line(step):
            seen.append(step.rate)
            return step

        return line

    rule = adaptive(scale_by_adam(), observer(), amsgrad_max())
    rule.update(jnp.ones(2), rule.init(jnp.ones(2)))
    np.testing.assert_allclose(seen[-1], 1.0, rtol=1e-5)


# --- Values --------------------------------------------------------------------------------------

WRONG_VALUES = [
    (
        lambda: second_moment(0.9, scope="layer"),
        "scope must be one of 'weight', 'tensor', 'tree', got",
    ),
    (lambda: adam(1e-3, b1=1.0), r"b1 must be in \[0, 1\), got 1\."),
    (lambda: adam(1e-3, b2=-0.1), r"b2 must be in \[0, 1\), got -0.1\."),
    (lambda: adam(1e-3, eps=-1e-8), "eps must be finite and at least 0, got -1e-08"),
    (lambda: adam(1e-3, eps_root=-1.0), "eps_root must be finite and at least 0, got -1"),
    (lambda: adam(-1e-3), "learning_rate must be finite and at least 0, got -0.001"),
    (lambda: adam(-1e-3), r"To go uphill, put optax\.scale\(-1\.0\) in front of the optimizer"),
    (lambda: adam(float("nan")), "learning_rate must be finite and at least 0, got nan.$"),
    (lambda: adam(np.inf), "learning_rate must be finite and at least 0, got inf"),
    (lambda: adam(jnp.float32(-1)), "learning_rate must be finite and at least 0, got -1"),
    (lambda: adam(jnp.ones(2)), r"learning_rate must be a scalar, got an array of shape \(2,\)"),
    (lambda: adamw(1e-3, weight_decay=-0.1), "weight_decay must be finite and at least 0"),
    (lambda: adamod(1e-3, b3=1.0), r"b3 must be in \[0, 1\), got 1\."),
    (lambda: adamod(1e-3, weight_decay=-1.0), "weight_decay must be finite"),
    (lambda: adamod(-1e-3), "learning_rate must be finite and at least 0, got -0.001"),
    (lambda: diffmod(-1e-3), "learning_rate must be finite and at least 0, got -0.001"),
    (lambda: adamod(jnp.bfloat16(1e-3)), "learning_rate arrived as bfloat16"),
    (lambda: scale_rate(-1.0), "factor must be finite and at least 0, got -1"),
    (
        lambda: decoupled_weight_decay(0.1, learning_rate=-1.0),
        "learning_rate must be finite and at least 0, got -1",
    ),
    (lambda: diffgrad(1e-3, weight_decay=-1.0), "weight_decay must be finite"),
    (lambda: diffmod(1e-3, len_memory=0.5), "len_memory must be finite and at least 1, got 0.5"),
    (lambda: adamod_momental_bound(0.9, len_memory=10), "give b3 or len_memory, not both"),
    (lambda: debias(), "debias needs b1, b2 or both"),
    (lambda: amsgrad(1e-3, convention="tf"), "'torch', 'optax', 'keras', 'paper', got 'tf'"),
    (
        lambda: adam(1e-3, convention="tf1"),
        "'torch', 'paper', 'keras', 'optax', got 'tf1'",
    ),
    (lambda: adamod(1e-3, convention="torch"), "'reference', 'paper', 'robust', got 'torch'"),
    (lambda: diffgrad(1e-3, friction="abs"), "'absolute', 'signed', 'wide', got 'abs'"),
    (lambda: adam(1e-3, nesterov=True, convention="keras"), "nesterov=True is not defined"),
    (
        lambda: adamw(1e-3, schedule=lambda t: 1.0),
        'schedule= belongs to decay="independent"; under decay="decoupled" give',
    ),
    (
        lambda: adamw(lambda t: 1.0, decay="independent"),
        "give learning_rate as a number, and its course as schedule=",
    ),
    (
        lambda: adaptive_opt.nadamw(1e-3, schedule=lambda t: 1.0),
        'schedule= belongs to decay="independent"; under decay="decoupled" give',
    ),
    (
        lambda: adaptive_opt.sgdw(lambda t: 1.0),
        "give learning_rate as a number, and its course as schedule=",
    ),
    (
        lambda: adaptive_opt.sgd(0.1, decay="independent"),
        "^decay must be one of 'l2', 'decoupled', got 'independent'",
    ),
    (lambda: diffmod(1e-3, decay="l2"), "^decay must be one of 'decoupled', got 'l2'"),
    (
        lambda: adamw(1e-3, convention="paper"),
        r"is now adamw\(convention='torch', decay='independent'\)",
    ),
    (
        lambda: adaptive_opt.nadamw(1e-3, convention="keras-adamw"),
        r"is now nadamw\(convention='torch', decay='independent'\)",
    ),
    (lambda: adamod(1e-3, 0.9, 0.999, 0.999), "eps=0.999 looks like b3, .* Give b3=0.999 by its"),
    (lambda: adam(jnp.bfloat16(1e-3)), "learning_rate arrived as bfloat16.*hyperparam_dtype"),
    (lambda: adam(1e-3, b2=jnp.float16(0.999)), "b2 arrived as float16.*hyperparam_dtype"),
]


@pytest.mark.parametrize(("make", "message"), WRONG_VALUES, ids=[m for _, m in WRONG_VALUES])
def test_a_wrong_value_is_named_with_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("wrong", ["0.9", None, True, [0.9], np.True_])
def test_a_hyperparameter_of_a_wrong_type_is_named(wrong):
    with pytest.raises(TypeError, match=r"b1 must be a number in \[0, 1\)"):
        adam(1e-3, b1=wrong)


def test_every_error_is_one_line():
    for make, _ in WRONG_VALUES:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            make()


def test_traced_values_pass():
    x = jnp.ones(3)

    @jax.jit
    def first_update(h):
        outputs = []
        for name, recipe in RECIPES.items():
            optimizers = [recipe(h["lr"])]
            if name in ADAMS:
                optimizers += [recipe(h["lr"], b1=h["b1"], b2=h["b2"], eps=h["eps"])]
            optimizers += [recipe(h["lr"], weight_decay=h["wd"])]
            outputs += [tx.update(x, tx.init(x), x)[0] for tx in optimizers]
        bound = adaptive(scale_by_adam(), adamod_momental_bound(len_memory=h["n"]))
        return [*outputs, bound.update(x, bound.init(x))[0]]

    h = {"lr": 1e-3, "b1": 0.9, "b2": 0.99, "eps": 1e-8, "wd": 0.1, "n": 10}
    assert all(np.isfinite(out).all() for out in first_update(h))


def test_decay_without_parameters_says_what_to_call():
    x = jnp.ones(1)
    optimizer = adamw(1e-3)
    with pytest.raises(ValueError, match=re.escape("call update(gradients, state, params)")):
        optimizer.update(x, optimizer.init(x))
    for recipe in ("adam", "amsgrad", "adamod", "diffgrad", "diffmod"):  # no decay by default
        optimizer = RECIPES[recipe](1e-3)
        optimizer.update(x, optimizer.init(x))


def test_a_state_of_other_parameters_is_refused():
    optimizer = adamod(1e-3)
    x = normal_tree()
    other = x | {"dense": {"kernel": jnp.ones((17, 1)), "bias": jnp.ones(9)}}
    with pytest.raises(ValueError, match=r"\['dense'\]\['kernel'\] differ .* \(17, 1\)"):
        optimizer.update(x, optimizer.init(other), x)
    with pytest.raises(ValueError, match="trees of one structure"):
        optimizer.update(x, optimizer.init({"w": jnp.ones(3)}), x)
    for wrong in (amsgrad(1e-3), diffmod(1e-3)):
        state = (*wrong.init(x), optax.EmptyState())[:3]
        with pytest.raises(ValueError, match="should hold the buffers mu, nu, rate_ema, but holds"):
            optimizer.update(x, state, x)
    with pytest.raises(ValueError, match="needs an AdaptiveState, but was given ScaleByAdamState"):
        optimizer.update(x, (*adam(1e-3).init(x), optax.EmptyState()), x)
    flat = optax.chain(open_step(), amsgrad_max(), close_step())
    step, _ = open_step().update(x, open_step().init(x))
    step, _ = scale_by_adam().update(step, scale_by_adam().init(x))
    with pytest.raises(ValueError, match="should hold the buffers nu_max, but holds none"):
        amsgrad_max().update(step, optax.EmptyState())
    assert set(flat.init(x)[1]) == {"nu_max"}
    with pytest.raises(ValueError, match=r"differ in shape: \(1,\), \(3,\)"):
        optimizer.update(jnp.ones(1), optimizer.init(jnp.ones(3)))


def test_integer_leaves_are_refused_by_name_of_the_dtype():
    with pytest.raises(
        TypeError, match=r"at \['steps'\]: a leaf of dtype int32 cannot be optimized"
    ):
        adam(1e-3).init({"w": jnp.ones(2), "steps": jnp.zeros((), jnp.int32)})
