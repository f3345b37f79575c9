"""Every direction with every second moment, rate and modifier: refused with a reason, or sound.

Nobody lists the combinations. What a stage is for is found by trying it, so that a new stage is
combined with all the others. A few random ones of those that make sense is run by default, all of
them by ``pytest -m slow``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import random
import re

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from common import QUICK, normal_tree, often
from devices import mesh_of

from adaptive_opt import (
    adaptive,
    first_moment,
    low_memory,
    open_step,
    second_moment,
    skip_nonfinite,
    telemetry,
    zero1,
)
from adaptive_opt.core.now import WrongOrder
from adaptive_opt.core.stage import STAGES

OURS = {
    name: make for name, make in STAGES.items() if str(make.__module__).startswith("adaptive_opt.")
}
"""The stages of this library; tests may register others."""

GIVEN = {"b1": 0.9, "b2": 0.99, "b3": 0.9, "shampoo_beta": 0.9, "momentum": 0.9, "ahead": 0.9}
GIVEN |= {"eps": 1e-3, "learning_rate": 0.1, "factor": 0.5, "limit": 1.0, "weight_decay": 0.1}
GIVEN |= {"gamma": 0.1, "alpha": 2.0, "weight": 0.5}
"""What the arguments are given that have no default, or None, by their names."""

PARAMS, GRADIENT = (normal_tree(seed, shapes={"kernel": (4, 3)}) for seed in (0, 1))


def made(stage: str, **others):
    parameters = inspect.signature(OURS[stage]).parameters
    lacking = [k for k, p in parameters.items() if p.default is p.empty or p.default is None]
    return OURS[stage](**{k: GIVEN[k] for k in lacking if k in GIVEN} | others)


# --- What a stage is for --------------------------------------------------------------------------


def makes(*stages) -> set[str] | None:
    """What is set behind the stages; None if they are refused."""
    found: set[str] = set()

    def step(x):
        flat = optax.chain(open_step(), *stages)
        opened, _ = flat.update(x, flat.init(x), x)
        kinds = ("second_moment", "rate")
        found.update(kind for kind in kinds if getattr(opened, kind) is not None)

    try:
        jax.eval_shape(step, PARAMS)
    except ValueError:
        return None
    return found


@functools.cache
def roles() -> dict[str, list[str | None]]:
    """The stages by what they are for, and None for leaving it out.

    A direction remembers gradients, and asks for no parameters; a modifier is what is left.
    """
    found = {"direction": [None], "second": [None], "rate": [None], "modifier": [None]}
    average, moment = first_moment(0.9, name="average"), second_moment(0.99, name="moment")
    for name in OURS:
        alone, role = makes(made(name)), "modifier"
        if "second_moment" in (alone or makes(average, made(name)) or ()):
            role = "second"
        elif "rate" in (alone or makes(moment, made(name)) or ()):
            role = "rate"
        elif alone is not None and remembers_gradients(made(name)):
            role = "direction"
        found[role].append(name)
    return found


def remembers_gradients(stage) -> bool:
    rule = adaptive(stage)
    needs_more = refusal(lambda: jax.eval_shape(rule.update, PARAMS, rule.init(PARAMS)))
    return needs_more is None and bool(rule.init(PARAMS).buffers)


def listed(direction, second, rate, modifier):
    """The stages in the last order that is accepted, or the reason why none is."""
    stages = [made(name) for name in (direction, second, rate) if name is not None]
    if modifier is None:
        orders = [stages]
    else:
        takes = inspect.signature(OURS[modifier]).parameters
        last = made(modifier, **({"name": "modifiers_own"} if "name" in takes else {}))
        places = range(len(stages), -1, -1)
        orders = [[*stages[:place], last, *stages[place:]] for place in places]
    reason = None
    for order in orders:
        try:
            adaptive(*order)
        except WrongOrder as error:
            reason = reason or error
        else:
            return order
    return reason


def everything():
    return itertools.product(*roles().values())


def refusal(function) -> str | None:
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


# --- What must hold of one that is accepted -------------------------------------------------------


def assert_stable(optimizer):
    """The state keeps its structure, shapes and dtypes: nothing is compiled twice."""
    before = jax.eval_shape(optimizer.init, PARAMS)
    updates, after = jax.eval_shape(optimizer.update, PARAMS, before, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_trees_all_equal_structs(after, before)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, before)


def assert_goes_into_wrappers(order):
    assert_stable(low_memory(skip_nonfinite(adaptive(*order, telemetry(every=1))), min_size=1))
    split = zero1(adaptive(*order), mesh_of((2,)))
    reason = refusal(lambda: jax.eval_shape(split.init, PARAMS))
    if reason is None:
        assert_stable(split)
    else:
        assert re.search(r"zero1.* elementwise=True", reason)


def is_finite(*trees):
    leaves = (x for x in jax.tree.leaves(trees) if jnp.issubdtype(x.dtype, jnp.inexact))
    return jnp.stack([jnp.isfinite(x).all() for x in leaves]).all()


def guarded(order):
    """Three steps, one of them without a gradient, and a broken one in between.

    The last state, and whether updates and state were finite all the time.
    """
    rule = skip_nonfinite(adaptive(*order))
    sizes = jnp.array([1.0, 0.0, jnp.nan, -3.0])

    def step(state, size):
        updates, state = rule.update(optax.tree.scale(size, GRADIENT), state, PARAMS)
        return state, is_finite(updates, state)

    state, finite = jax.lax.scan(step, rule.init(PARAMS), sizes)
    return state, finite.all()


def assert_refused_with_a_reason(reason, names):
    text = str(reason)
    assert any(name in text for name in ("close_step", *filter(None, names))), text
    assert any(word in text for word in ("Put ", "Keep ", "Give ", "drop ")), text


# --- The tests ------------------------------------------------------------------------------------


def test_every_stage_has_one_role_and_there_are_thousands_of_combinations():
    found = roles()
    named = [name for names in found.values() for name in names if name is not None]
    assert sorted(named) == sorted(OURS)
    some = {"direction": {"first_moment", "heavy_ball", "lion_direction", "diffgrad_friction"}}
    some |= {"second": {"second_moment", "belief_moment", "factored_moment", "block_moment"}}
    some |= {"rate": {"per_weight_rate", "inverse_rate", "floored_rate", "uniform_rate"}}
    some |= {"modifier": {"cautious", "trust_ratio", "amsgrad_max", "debias", "hyperball"}}
    for role, names in some.items():
        assert names <= set(found[role]), role
    assert len(list(everything())) > 5000


@pytest.mark.parametrize("number", often([5], [5, 20, 200], more=[20]))
def test_random_ones_are_sound_and_what_is_refused_is_so_with_a_reason(number):
    combinations, chosen, refused = list(everything()), {}, 0
    random.Random(20160512).shuffle(combinations)
    while len(chosen) < number:
        names = combinations.pop()
        order = listed(*names)
        if isinstance(order, list):
            chosen[names] = order
        else:
            assert_refused_with_a_reason(order, names)
            refused += 1
    assert refused > 0.3 * number
    for start in range(0, number, 25):
        names, orders = zip(*list(chosen.items())[start : start + 25], strict=True)
        program = jax.jit(lambda orders=orders: list(map(guarded, orders)), compiler_options=QUICK)
        for name, (state, finite) in zip(names, program(), strict=True):
            assert finite, name
            assert state.total == 1, name  # the broken one was refused, and no other
    for order in chosen.values():
        assert_goes_into_wrappers(order)


@pytest.mark.slow
@pytest.mark.parametrize("place", range(20))
def test_every_combination_is_sound_or_refused_with_a_reason(place):
    """Of one direction after the other. What is not compiled does the same, and takes minutes."""
    if place >= len(roles()["direction"]):
        pytest.skip("there are fewer directions")
    others = [roles()[role] for role in ("second", "rate", "modifier")]
    for names in itertools.product([roles()["direction"][place]], *others):
        order = listed(*names)
        if not isinstance(order, list):
            assert_refused_with_a_reason(order, names)
            continue
        assert_goes_into_wrappers(order)
        rule = adaptive(*order)
        state = rule.init(PARAMS)
        for size in (1.0, 0.0, -3.0):
            updates, state = rule.update(optax.tree.scale(size, GRADIENT), state, PARAMS)
            assert is_finite(updates, state), names
