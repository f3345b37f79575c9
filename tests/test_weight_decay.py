"""One vocabulary: the same word and the same order of arguments mean the same in every recipe."""

from __future__ import annotations

import inspect
import json
from typing import get_args

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import RECIPES, REGISTERED, one_in
from test_exactness import EVERY_ROW

import adaptive_opt
from adaptive_opt import adam, adamod, adamw, config, describe, make, nadamw
from adaptive_opt.stages.weight_decay import Decay

WORDS = {name: adaptive_opt.RECIPES[name].choices["decay"] for name in REGISTERED}
EVERY_WORD = [(name, word) for name, words in WORDS.items() for word in words]
LR, ETA, WD = 0.25, (1.0, 0.5, 0.125), 0.5
MASK = {"decays": True, "stays": False}
OF_VECTORS = ("adamh",)
"""Whose decay is of the rest: on a sphere nothing decays."""


def parameters(name):
    return inspect.signature(adaptive_opt.RECIPES[name]).parameters


def test_every_recipe_has_a_weight_decay_with_a_mask_and_a_word_for_it():
    for name in REGISTERED:
        assert {"weight_decay", "mask", "decay"} <= {*parameters(name)}, name
        assert set(WORDS[name]) <= set(get_args(Decay))
        default = parameters(name)["decay"].default
        assert default in (None, WORDS[name][0])  # the first is the default; or the convention's


def eta(step):
    return jnp.asarray(ETA)[step]


def gradients_of_run(shape=(3, 1)):
    """They grow, so that StableAdamW slows the tensor down."""
    numbers = np.random.default_rng(4).standard_normal((3, 3, 1))
    return (numbers * np.array([1, 2, 4])[:, None, None]).reshape(3, *shape)


def run(optimizer, gradient_of=lambda x, g: g):
    """The parameters before every step, and the updates; compiled as a whole it takes longer."""
    rng = np.random.default_rng(3)
    shape = (3,) if describe(optimizer).name in OF_VECTORS else (3, 1)  # a matrix, for muon
    x = {name: jnp.asarray(rng.standard_normal(shape)) for name in MASK}
    state, history = optimizer.init(x), []
    for g in gradients_of_run(shape):
        gradient = {name: gradient_of(x[name], g) if MASK[name] else g for name in MASK}
        before = stepping(state)
        updates, state = optimizer.update(gradient, state, x)
        after = stepping(state)
        history.append((x, updates if after is None else optax.tree.sub(after, before)))
        x = optax.apply_updates(x, updates)
    return history


def stepping(state):
    """Schedule-Free's z, which the step and the decay are taken off; elsewhere it is x itself."""
    return optax.tree.get(state, "z")


def optimizer_with(name, word, weight_decay):
    course = {"learning_rate": lambda step: LR * eta(step)}
    if word == "independent":
        course = {"learning_rate": LR, "schedule": eta}
    if "rest_learning_rate" in parameters(name):
        course["rest_learning_rate"] = course["learning_rate"]
    if "multiply_by_parameter_scale" in parameters(name):
        course["multiply_by_parameter_scale"] = False  # or the step depends on the parameters
    return RECIPES[name](**course, decay=word, weight_decay=weight_decay, mask=MASK)


def decayed_update(word, t, x, plain):
    """What the word makes of the update without decay, by the table of the words."""
    if word == "after":
        return (x + plain) * (1 - WD) - x
    if word == "decoupled-after":  # at SOAP's first step nothing moves at all
        return (x + plain) * (1 - (LR * ETA[t] * WD if t else 0)) - x
    if word == "proximal":
        return (x + plain) / (1 + LR * ETA[t] * WD) - x
    factor = {
        "decoupled": LR * ETA[t],
        "independent": ETA[t],
        "constant": 1.0,
        "corrected": (LR * ETA[t]) ** 2,
        "clipped": LR * ETA[t] * clip_of_stableadamw(t),
    }[word]
    return plain - factor * WD * x


def clip_of_stableadamw(t, b2=0.99):
    """By what StableAdamW slows the tensor down, whose gradients are those of ``run``."""
    g = gradients_of_run()[: t + 1]
    weights = b2 ** np.arange(t, -1, -1)
    v = np.tensordot(weights, g**2, 1) / weights.sum()  # the corrected average
    return 1 / max(1, np.sqrt(np.mean(g[t] ** 2 / v)))


@pytest.mark.parametrize(("name", "word"), one_in(2, EVERY_WORD))
def test_a_word_means_the_same_in_every_recipe(name, word, x64):
    """Against the recipe without decay: on g + wd x, or the step that the table makes of it."""
    without = "decoupled" if word == "independent" else word
    history = run(optimizer_with(name, word, WD))
    if word == "l2":
        # Of the trajectory with decay: what the recipe without one makes of the other gradient.
        other = run(optimizer_with(name, without, 0.0), lambda x, g: g + WD * x)
        for (x, updates), (y, expected) in zip(history, other, strict=True):
            for key in MASK:
                np.testing.assert_allclose(x[key], y[key], rtol=1e-12, atol=1e-14)
                np.testing.assert_allclose(updates[key], expected[key], rtol=1e-11, atol=1e-13)
        return
    plain = run(optimizer_with(name, without, 0.0))
    if word == "inner":
        # No factor says it: what comes behind in the bracket acts on it, and differs by recipe. The
        # recorded rows hold its numbers; here, that it decays what the mask says and nothing else.
        assert not np.allclose(history[-1][1]["decays"], plain[-1][1]["decays"])
        for (_, updates), (_, expected) in zip(history, plain, strict=True):
            np.testing.assert_allclose(updates["stays"], expected["stays"], rtol=1e-12, atol=1e-14)
        return
    for t, ((x, updates), (_, expected)) in enumerate(zip(history, plain, strict=True)):
        decayed = decayed_update(word, t, x["decays"], expected["decays"])
        np.testing.assert_allclose(updates["decays"], decayed, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(updates["stays"], expected["stays"], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", REGISTERED)
def test_a_word_that_a_recipe_does_not_have_is_refused_with_those_it_has(name):
    listed = ", ".join(map(repr, WORDS[name]))
    for word in ("adamw", *get_args(Decay)):
        if word not in WORDS[name]:
            with pytest.raises(ValueError, match=f"^decay must be one of {listed}, got '{word}'"):
                RECIPES[name](1e-2, decay=word)


def word_of(row):
    """The form of decay that a recorded row has; None where nothing decays."""
    recipe, arguments = row["recipe"].split(" ")[-1], row["arguments"]
    recipe = recipe.removeprefix("lookahead(").removesuffix(")")
    if not arguments.get("weight_decay"):
        return recipe, None
    if row["recipe"].startswith("keras-adamw"):
        return recipe, "independent"
    if "decay" in arguments or parameters(recipe)["decay"].default is not None:
        return recipe, arguments.get("decay", parameters(recipe)["decay"].default)
    torch = arguments.get("convention", parameters(recipe)["convention"].default) == "torch"
    forms = {"radam": ("l2", "decoupled"), "sgdw": ("decoupled", "independent")}[recipe]
    return recipe, forms[0] if torch else forms[1]


def test_every_form_of_decay_of_every_recipe_is_recorded():
    recorded = {word_of(row) for _, row in EVERY_ROW}
    assert set(EVERY_WORD) <= recorded


@pytest.mark.parametrize("name", ["adam", "amsgrad", "nadam"])
def test_a_decay_that_is_not_asked_for_has_no_place_in_the_state(name):
    x = jnp.ones(3)
    recipe = adaptive_opt.RECIPES[name]
    with_decay = recipe(1e-2, convention="optax", weight_decay=0.1).init(x)
    assert len(recipe(1e-2, convention="optax").init(x)) == 2 == len(with_decay) - 1


def test_the_order_of_arguments_is_one():
    for name in REGISTERED:
        takes = parameters(name)
        by_position = [key for key, p in takes.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        if {"b1", "b2", "eps"} <= {*takes}:
            assert by_position[:4] == ["learning_rate", "b1", "b2", "eps"], name
            theirs = [*inspect.signature(getattr(optax, name, lambda: None)).parameters]
            assert by_position[4:] == theirs[4 : len(by_position)], name
        assert "b3" not in by_position


def test_what_stood_fourth_in_adamod_does_not_pass_for_eps():
    for b3 in (0.9, 0.999, 0.9999):
        with pytest.raises(ValueError, match=r"looks like b3, .* Give b3=0\.9+ by its name"):
            adamod(1e-3, 0.9, 0.999, b3)
    with pytest.raises(TypeError, match=r"too many positional arguments; .* by name only b3, "):
        adamod(1e-3, 0.9, 0.999, 0.999, 1e-8)
    described = describe(adamod(1e-3, 0.9, 0.999, 1e-8)).settings
    assert (described["eps"], described["b3"]) == (1e-8, 0.999)
    adamod(1e-3, eps=1.0)  # as large as TensorFlow's advice for Adam


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"name": "adamw", "convention": "paper"}, adamw(1e-3, decay="independent")),
        (
            {"name": "adamw", "convention": "keras-adamw"},
            adamw(1e-3, convention="keras", decay="independent"),
        ),
        ({"name": "nadamw", "convention": "keras-adamw"}, nadamw(1e-3, decay="independent")),
    ],
    ids=lambda x: x["convention"] if isinstance(x, dict) else "",
)
def test_data_in_the_words_of_an_earlier_version_is_read(old, new):
    again = make(json.loads(json.dumps(old | {"learning_rate": 1e-3})))
    assert config(again) == config(new)
    again = make({"chain": [{"optax": "clip", "max_delta": 1.0}, old | {"learning_rate": 1e-3}]})
    assert str(describe(new)).replace("\n", "\n  ") in str(describe(again))


def test_a_recipe_leaves_the_object_it_is_given_as_it_was():
    inner = adam(1e-3)

    @adaptive_opt.recipe
    def around(learning_rate):
        return inner

    try:
        outer = around(1e-2)
    finally:
        del adaptive_opt.RECIPES["around"]
    assert describe(inner).name == "adam"
    assert describe(outer).name == "around"
    assert describe(outer).parts[0] == describe(inner)


@pytest.mark.parametrize("name", REGISTERED)
def test_a_wrong_keyword_names_the_recipe_and_what_it_takes(name):
    with pytest.raises(TypeError, match=rf"^{name} takes no argument 'weightdecay'\. Did you mean"):
        RECIPES[name](1e-2, weightdecay=0.1)
    listed = ", ".join(parameters(name))
    with pytest.raises(TypeError, match=f"It takes {listed}"):
        RECIPES[name](1e-2, zzz=0.1)
