"""A state moves between any two optimizers, in and out of wrappers, and goes on; or is refused."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import ADAMS, EVERY_CONVENTION, assert_bit_equal, one_in
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from moved import LR, after, assert_close, gradients, in_groups, injected, ints, params, run

from adaptive_opt import (
    Group,
    ParameterGroups,
    adabelief,
    adam,
    adamod,
    adaptive,
    amsgrad,
    convert_state,
    diffmod,
    low_memory,
    rmsprop,
    sgd,
    stage,
)
from adaptive_opt.checkpoints.buffers import put_together
from adaptive_opt.checkpoints.found import found_in
from adaptive_opt.checkpoints.rules import OPTAX
from adaptive_opt.core.describe import held_by, made_of
from adaptive_opt.core.stage import STAGES
from adaptive_opt.memory import codecs

# --- every recipe with every other ----------------------------------------------------------------

OF_OPTAX = {
    f"optax.{name}": functools.partial(getattr(optax, name), **more)
    for name, more in [
        ("adam", {}), ("adamw", {}), ("amsgrad", {}), ("nadam", {}), ("nadamw", {}), ("radam", {}),
        ("rmsprop", {}), ("sgd", {}), ("adagrad", {}), ("adamax", {}), ("adadelta", {}),
        ("lion", {}), ("adabelief", {}),
    ]
}  # fmt: skip
WITH_MOMENTUM = {
    "sgd with momentum": functools.partial(sgd, momentum=0.9),
    "sgd with momentum (keras)": functools.partial(sgd, momentum=0.9, convention="keras"),
    "sgd with nesterov (keras)": functools.partial(
        sgd, momentum=0.9, nesterov=True, convention="keras"
    ),
    "rmsprop, plain": functools.partial(rmsprop, convention="optax"),
    "rmsprop, plain (tf1)": functools.partial(rmsprop, convention="tf1"),
    "sgd with dampening": functools.partial(sgd, momentum=0.9, dampening=0.5),
    "optax.sgd with momentum": functools.partial(optax.sgd, momentum=0.9),
    "optax.rmsprop with momentum": functools.partial(optax.rmsprop, momentum=0.9),
    "optax.rmsprop, centered": functools.partial(optax.rmsprop, momentum=0.9, centered=True),
}
ALL = EVERY_CONVENTION | WITH_MOMENTUM | OF_OPTAX
for ranger in [name for name in ALL if name.startswith("ranger")]:
    # Else its gradients are others, and its decays.
    ALL[ranger] = functools.partial(ALL[ranger], centralize=False, b1=0.9)
for name in ALL:
    # One memory for all: an average of another length is no other quantity, but another number.
    own = name.split(" (")[0]
    if own in (*ADAMS, "adam_atan2"):
        ALL[name] = functools.partial(ALL[name], b1=0.9, b2=0.999)
    if own == "adan":  # which looks b2 ahead, or 1 - b2
        ALL[name] = functools.partial(ALL[name], b2=0.5, b3=0.999)
DERIVED = ("nu_max", "rate_ema", "previous_gradient", "slow")


@functools.cache
def five_steps(name):
    """An optimizer, and its state after the same five gradients, at the same parameters."""
    x, many = params(), gradients(5)
    optimizer = ALL[name](LR)
    state = optimizer.init(x)
    for step in range(5):  # not compiled: there are many of them, and each is used once
        gradient = jax.tree.map(lambda g, step=step: g[step], many)
        state = optimizer.update(gradient, state, x)[1]
    return optimizer, state


def values_of(found, name):
    values = [found.buffers.get(name), *found.of_tree.get(name, {}).values()]
    return jax.tree.map(np.asarray, values)


def start(name, buffer):
    """Where a buffer starts: what is left of that is no matter of gradients."""
    x = params()
    optimizer, _ = five_steps(name)
    found = found_in(optimizer, optimizer.init(x), x)
    values = jax.tree.leaves((found.buffers.get(buffer), [*found.of_tree.get(buffer, {}).values()]))
    return float(np.ravel(values[0])[0]) if values else 0.0


def check_pair(source, target):
    """The converted state is that of a run of the target, but for what is derived; or refused."""
    x, (before, state), (after, own) = params(), five_steps(source), five_steps(target)
    try:
        new = convert_state(state, before, after, x, count=5)
    except ValueError as error:
        return str(error)
    actual, expected = found_in(after, new, x), found_in(after, own, x)
    known = found_in(before, state, x).names()
    moved = [n for n in known & expected.names() if start(source, n) != start(target, n)]
    for name in expected.names() - {*moved, "z"}:  # z is a place, led to by other steps
        if moved and name == "velocity":  # of steps that began with another second moment
            continue
        if name in known or name not in DERIVED:
            assert_close(values_of(actual, name), values_of(expected, name))
    return None


OFTEN = [
    ("adam", "amsgrad"), ("amsgrad", "amsgrad (optax)"), ("optax.amsgrad", "amsgrad (optax)"),
    ("adam", "adabelief"), ("optax.adabelief", "adabelief"), ("optax.adabelief", "optax.adam"),
    ("optax.adamax", "adamax"), ("optax.adamax", "adam"), ("adamax", "adamax (keras)"),
    ("nadam", "nadamw"), ("nadam", "nadam (keras)"), ("adamod", "diffmod"),
    ("adamod", "adamod (paper)"), ("adamod", "adamod (robust)"), ("diffmod", "adamod"),
    ("sgd with momentum", "sgd with momentum (keras)"),
    ("sgd with momentum (keras)", "optax.sgd with momentum"),
    ("sgd with momentum", "sgd with dampening"), ("sgd with momentum", "sgdw (paper)"),
    ("rmsprop (optax)", "optax.rmsprop, centered"), ("optax.rmsprop", "rmsprop, plain"),
    ("optax.rmsprop", "rmsprop of the tree"), ("optax.rmsprop with momentum", "rmsprop"),
    ("adadelta", "optax.adadelta"), ("lion", "optax.lion"), ("lars", "lars (mae)"),
    ("lars (mae)", "lars"), ("adam_atan2", "adam"), ("adan", "adan (optax)"),
    ("optax.lion", "adam"), ("radam", "ranger"), ("ranger", "ranger (optax)"),
]  # fmt: skip
REFUSED = {
    ("amsgrad", "amsgrad (optax)"): "'nu_max' means something else",
    ("adam", "adabelief"): "'nu' means something else",
    ("optax.adabelief", "optax.adam"): "'nu' means something else",
    ("optax.adamax", "adam"): "no place for infinity_norm",
    ("adamax", "adamax (keras)"): "'infinity_norm' means something else",
    ("nadam", "nadam (keras)"): "'momentum_product' means something else",
    ("adamod", "adamod (paper)"): "'rate_ema' means something else",
    ("adamod", "adamod (robust)"): "'rate_ema' means something else",
    ("diffmod", "adamod"): "no place for previous_gradient",
    ("sgd with momentum", "sgd with dampening"): "'velocity' means something else",
    ("optax.rmsprop", "rmsprop of the tree"): "one number of the tree",
    ("optax.rmsprop with momentum", "rmsprop"): "'velocity' means something else",
    ("optax.lion", "adam"): "needs nu",
}


@pytest.mark.parametrize(("source", "target"), one_in(3, OFTEN))
def test_a_state_is_as_if_the_target_had_seen_the_gradients(source, target, x64):
    refusal = check_pair(source, target)
    expected = REFUSED.get((source, target))
    assert (refusal is None) == (expected is None), refusal
    assert expected is None or expected in refusal


@pytest.mark.slow
@pytest.mark.parametrize("source", ALL)
def test_from_every_optimizer_to_every_other_so_or_refused(source, x64):
    refusals = {target: check_pair(source, target) for target in ALL}
    assert refusals[source] is None
    reasons = "means something else", "no place for", "needs", "one number of the tree"
    assert all(any(reason in r for reason in reasons)
               for r in refusals.values() if r is not None)  # fmt: skip


@pytest.mark.parametrize("name", OPTAX)
def test_a_transformation_of_optax_keeps_what_its_stages_keep(name, x64):
    """The table by which its buffers get their meaning."""
    transformation = optax.trace(0.5) if name == "trace" else getattr(optax, name)()
    x, many = params(), gradients(3)
    _, state = run(transformation, x, transformation.init(x), many)[0]
    held = {**held_by(transformation.init), **held_by(transformation.update)}
    decays = {"b1": held.get("b1"), "b2": held.get("b2", held.get("decay", held.get("rho")))}
    decays["momentum"] = held.get("decay")
    stages = [with_decays(stage, decays) for stage in OPTAX[name].stages(held)]
    rule = adaptive(*stages)
    _, ours = run(rule, x, rule.init(x), many)[0]
    names = {"count"} & set(state._fields)
    for field in set(state._fields) - names:
        assert_close(getattr(state, field), ours.buffers[OPTAX[name].names.get(field, field)])
    assert len(ours.buffers) == len(set(state._fields) - names)


def with_decays(stage, decays):
    """The stage again, with the decays of the transformation."""
    made = made_of(stage)
    settings = {k: v if v is None or decays.get(k) is None else decays[k]
                for k, v in made.settings.items()}  # fmt: skip
    return STAGES[made.name](**settings)


# --- momentum -------------------------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("there", [True, False], ids=["to keras", "to torch"])
def test_a_velocity_of_gradients_becomes_one_of_steps_and_back(there, nesterov, x64):
    pair = [sgd(LR, 0.9, nesterov, convention=c) for c in ("torch", "keras")]
    source, target = pair if there else pair[::-1]
    x, state = after(source, gradients(7))
    moved = convert_state(state, source, target, x)
    (_, _), expected = run(source, x, state, gradients(20, 1))
    (_, _), actual = run(target, x, moved, gradients(20, 1))
    assert_close(actual, expected)


def test_the_rate_of_the_source_is_what_is_in_its_velocity(x64):
    """Another rate of the target changes what is to come, not what has been."""
    source, target = sgd(0.1, 0.9, convention="keras"), sgd(0.02, 0.9)
    x, state = after(source, gradients(7))
    moved = convert_state(state, source, target, x)
    _, expected = after(sgd(0.1, 0.9), gradients(7))
    assert_close(moved[1].buffers["velocity"], expected[1].buffers["velocity"])
    same = convert_state(state, source, sgd(0.02, 0.9, convention="keras"), x)
    assert_close(same[1].buffers["velocity"], state[1].buffers["velocity"])


def test_a_velocity_that_cannot_be_told_is_refused(x64):
    falling = optax.linear_schedule(LR, 0.0, 100)
    injected = optax.inject_hyperparams(sgd, static_args=("nesterov", "convention"))
    keras = injected(LR, 0.9, convention="keras")
    x, state = after(sgd(falling, 0.9), gradients(3))
    with pytest.raises(ValueError, match="here only, and is a schedule, so that every gradient"):
        convert_state(state, sgd(falling, 0.9), sgd(falling, 0.9, convention="keras"), x)
    x, state = after(keras, gradients(3))
    state.hyperparams["learning_rate"] = jnp.asarray(0.5)
    with pytest.raises(ValueError, match="changed by hand"):
        convert_state(state, keras, sgd(LR, 0.9), x)
    x, state = after(optax.rmsprop(falling, momentum=0.9), gradients(3))
    target = rmsprop(falling, convention="optax", momentum=0.9)  # the sign, whatever the rate
    moved = convert_state(state, optax.rmsprop(falling, momentum=0.9), target, x, count=3)
    assert_close(moved[1].buffers["velocity"], jax.tree.map(jnp.negative, state[2].trace))


# --- wrappers -------------------------------------------------------------------------------------


def multi_steps(make, every):
    return optax.MultiSteps(
        make(LR), every, accumulator_dtype=jnp.float64
    ).gradient_transformation()


def test_an_accumulation_stays_or_is_refused_in_its_middle(x64):
    source = multi_steps(optax.adam, 3)
    x, state = after(source, gradients(8))
    moved = convert_state(state, source, multi_steps(adam, 3), x)
    assert ints(mini=moved.mini_step, steps=moved.gradient_step) == {"mini": 2, "steps": 2}
    assert int(moved.inner_opt_state[0].count) == 2
    assert_bit_equal(moved.acc_grads, state.acc_grads)
    with pytest.raises(ValueError, match=r"added up 2 gradients, .* takes a step after 2"):
        convert_state(state, source, multi_steps(adam, 2), x)
    with pytest.raises(ValueError, match="no place for acc_grads, which would be lost"):
        convert_state(state, source, adam(LR), x)
    x, state = after(source, gradients(9))
    assert int(convert_state(state, source, adam(LR), x)[0].count) == 3
    back = convert_state(convert_state(state, source, adam(LR), x), adam(LR), source, x)
    assert ints(mini=back.mini_step, steps=back.gradient_step) == {"mini": 0, "steps": 3}


def test_hyperparameters_and_what_others_hold_stay_the_targets(x64):
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    source, target = injected(adam, 0.5), injected(optax.adam, 0.125)
    x, state = after(source, gradients(5))
    moved = convert_state(state, source, target, x)
    assert (float(moved.hyperparams["learning_rate"]), int(moved.count)) == (0.125, 5)
    falling = injected(adam, optax.linear_schedule(1.0, 0.0, 10))
    moved = convert_state(state, source, falling, x)
    assert int(moved.hyperparams_states["learning_rate"].count) == 5
    beside = optax.chain(adam(LR), plateau)
    moved = convert_state(state, source, beside, x)
    assert_bit_equal(moved[1], beside.init(x)[1])
    assert int(moved[0][0].count) == 5
    state = beside.init(x)
    for value in (3.0, 3.0, 3.0, 3.0):
        _, state = beside.update(x, state, x, value=value)
    moved = convert_state(state, beside, optax.chain(optax.adam(LR), plateau), x)
    assert float(state[1].scale) == 0.5
    assert_bit_equal(moved[1], state[1])
    with pytest.raises(ValueError, match=r"no place for .*best_value, scale, which would be lost"):
        convert_state(state, beside, adam(LR), x)


def test_parameters_are_frozen_and_thawed(x64):
    half = ParameterGroups([Group("b", freeze=True)], default=Group())
    frozen, whole = half.optimizer(adam, learning_rate=LR), in_groups(optax.adam)
    x, state = after(adam(LR), gradients(5))
    moved = convert_state(state, adam(LR), frozen, x)
    mu = moved.inner_states["default"].inner_state[0].mu
    assert isinstance(mu["b"], optax.MaskedNode)
    assert_bit_equal(mu["w"], state[0].mu["w"])
    thawed = convert_state(moved, frozen, whole, x)
    groups = {name: part.inner_state[0] for name, part in thawed.inner_states.items()}
    assert ints(**{name: part.count for name, part in groups.items()}) == {"b": 0, "default": 5}
    assert not np.any(groups["b"].mu["b"])
    with pytest.raises(ValueError, match=r"needs mu of \['b'\], nu of \['b'\], which cannot"):
        convert_state(moved, frozen, adam(LR), x)
    with pytest.raises(ValueError, match=r"no place for mu of \['b'\], nu of \['b'\]"):
        convert_state(state, adam(LR), optax.masked(adam(LR), {"b": False, "w": True}), x)


@pytest.mark.broad
def test_low_memory_holds_what_it_would_hold():
    """As if the last step had been its own: bit for bit, blocks and noise included."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal(8192), np.float32)
    for storage in ("bfloat16", "8-bit"):
        target = low_memory(adam(LR), storage)
        _, state = jax.jit(adam(LR).update)(x, adam(LR).init(x), x)
        _, expected = jax.jit(target.update)(x, target.init(x), x)
        moved = convert_state(state, adam(LR), target, x)
        assert_bit_equal(moved, expected)
        back = convert_state(moved, target, optax.adam(LR), x)
        assert_bit_equal(back[0].mu, codecs.decoded(expected.inner_state)[0].mu)


def test_what_may_be_lost_is_said(x64):
    x, state = after(adamod(LR), gradients(5))
    with pytest.raises(ValueError, match=r"lost. .* said with drop=\{'rate_ema'\}"):
        convert_state(state, adamod(LR), adam(LR), x)
    moved = convert_state(state, adamod(LR), adam(LR), x, drop={"rate_ema"})
    assert_bit_equal(moved[0].mu, state[0].buffers["mu"])
    anew = convert_state(state, adamod(LR), adamod(LR, convention="paper"), x, drop={"rate_ema"})
    from_adam = convert_state(moved, adam(LR), adamod(LR, convention="paper"), x)
    assert_bit_equal(anew, from_adam)


def test_a_buffer_that_is_misspelt_is_no_buffer():
    state = adamod(LR).init(params())
    with pytest.raises(ValueError, match=r"drop= names 'rate_emma', .* Did you mean 'rate_ema'\?"):
        convert_state(state, adamod(LR), adam(LR), params(), drop={"rate_emma"})
    with pytest.raises(TypeError, match=r"drop takes a set of names: \{'rate_ema'\}"):
        convert_state(state, adamod(LR), adam(LR), params(), drop="rate_ema")


def test_a_state_of_another_optimizer_is_told_by_the_paths_that_differ():
    x = {f"layer {i}": jnp.zeros(2) for i in range(100)}
    with pytest.raises(ValueError, match="the state is not one of the source, adamod") as error:
        convert_state(adam(LR).init(x), adamod(LR), adam(LR), x)
    said = str(error.value)
    assert len(said) < 600
    assert "it has no [0].buffers['mu']['layer 0'], " in said
    assert "and 296 more; it has besides [0].mu['layer 0'], " in said
    assert "PyTreeDef" not in said


def test_everything_that_is_wrong_is_said_once_by_path(x64):
    shapes = {"b": jnp.ones(2), "w": jnp.ones((2, 3))}
    found = {"mu": {"b": jnp.ones(3), "w": jnp.ones(())}, "velocity": shapes}
    with pytest.raises(ValueError, match="adam has no place") as error:
        put_together(adam(LR), shapes, found, 3)
    said = str(error.value)
    for part in (
        "no place for velocity", "adam needs nu, which",
        "'mu' at ['b'] has shape (3,), it should be (2,)",
        "'mu' at ['w'] has shape (), it should be (2, 3)",
    ):  # fmt: skip
        assert said.count(part) == 1


def test_a_derived_buffer_is_not_touched_by_a_clip_beside_it(x64):
    tight = optax.clip_by_global_norm(1e-6)
    x, state = after(adam(LR), gradients(5))
    moved = convert_state(state, adam(LR), optax.chain(tight, amsgrad(LR)), x)
    assert_close(moved[1][0].buffers["nu_max"], state[0].nu)
    belief = adabelief(LR, eps=0.0)
    x, state = after(belief, gradients(5))
    moved = convert_state(state, belief, adabelief(LR, eps=0.0, convention="amsgrad"), x)
    assert_close(moved[0].buffers["nu_max"], state[0].buffers["nu"])


def test_what_is_derived_is_split_as_the_parameters_are():
    mesh = jax.make_mesh((8,), ("data",))
    rows = NamedSharding(mesh, P("data"))
    x = {"w": jax.device_put(jnp.arange(32.0).reshape(16, 2), rows)}
    optimizer, target = adam(LR), diffmod(LR)
    state = jax.jit(optimizer.update)(x, optimizer.init(x), x)[1]
    moved = convert_state(state, optimizer, target, x)
    for name, buffer in moved[0].buffers.items():
        assert buffer["w"].sharding.is_equivalent_to(rows, 2), name
    one = jax.tree.map(np.asarray, (state, x))
    alone = convert_state(jax.tree.map(jnp.asarray, one[0]), optimizer, target, one[1])
    assert_close(moved[0].buffers, alone[0].buffers, 1e-6)


@pytest.mark.broad
def test_an_optimizer_of_nnx_moves():
    def trained(tx, steps, model, state=None):
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
        if state is not None:
            nnx.update(optimizer.opt_state, nnx.state(state))
        for _ in range(steps):
            gradient = nnx.grad(lambda m: ((m(jnp.ones((2, 3))) - 1.0) ** 2).sum())(model)
            optimizer.update(model, gradient)
        return optimizer

    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))
    optimizer = trained(optax.adam(LR), 3, model)
    x = nnx.state(model, nnx.Param)
    moved = convert_state(optimizer, optax.adam(LR), adam(LR), x)
    assert_bit_equal(moved, convert_state(nnx.state(optimizer), optax.adam(LR), adam(LR), x))
    expected, actual = nnx.clone(model), nnx.clone(model)
    trained(optax.adam(LR), 2, expected, nnx.as_pure(optimizer.opt_state))
    trained(adam(LR), 2, actual, moved)
    np.testing.assert_allclose(actual.kernel[...], expected.kernel[...], rtol=1e-6)


def test_buffers_of_lines_that_bear_no_made_up_numbers_are_not_taken_for_one_another():
    """Both keep ``mu``; nobody can tell what it means, so only the same stages go on with it."""

    def kept(name):
        def picky():
            def line(step):
                if step.direction.ndim == 2:
                    raise TypeError("not for matrices")
                return step.set(direction=step.average("mu", step.direction, 0.5))

            return line

        picky.__name__ = name
        return adaptive(stage(picky)())

    try:
        one, same, other = kept("picky"), kept("picky"), kept("fussy")
    finally:
        for name in ("picky", "fussy"):
            STAGES.pop(name)
    x = jnp.ones(3)
    _, state = one.update(x, one.init(x), x)
    assert_bit_equal(convert_state(state, one, same, x), state)
    with pytest.raises(ValueError, match=r"'mu' means something else .* cannot be found out"):
        convert_state(state, one, other, x)
