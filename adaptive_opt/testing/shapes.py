"""Contracts about trees: what they may be made of, and leaves of unusual shapes."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.trees import Tree, path_of
from adaptive_opt.testing.contract import Broken, case, contract
from adaptive_opt.testing.subject import Subject
from adaptive_opt.testing.trees import (
    are_close,
    avals,
    avals_of,
    expect_bits,
    expect_close,
    expect_finite,
    normal,
)


def step_of(subject: Subject, params: Tree, gradients: Tree) -> tuple[Any, Tree, Any]:
    """A state, and the updates and the state after a step whose structures are the same."""
    state = subject.optimizer.init(params)
    updates, after, _ = subject.stepper()(gradients, state, params)
    if jax.tree.structure(updates) != jax.tree.structure(gradients):
        raise Broken("the updates have another structure than the gradients")
    if jax.tree.structure(after) != jax.tree.structure(state):
        raise Broken("the state has another structure after a step")
    return state, updates, after


@contract
def none_parameters(subject: Subject) -> None:
    """Modules have None where a layer has no bias, in parameters and gradients alike."""
    with case("{'w': an array, 'b': None}"):
        _, updates, _ = step_of(subject, *({"w": normal(i)["w"], "b": None} for i in (0, 1)))
        alone = step_of(subject, *({"w": normal(i)["w"]} for i in (0, 1)))[1]
        expect_close("the update", updates["w"], alone["w"])


@contract
def none_gradients(subject: Subject) -> None:
    """A parameter without a gradient (None) is left alone, and so is what is kept for it; the
    others make the step that they make anyway."""
    params, gradients = subject.params, subject.gradients[1]
    with case("a gradient for 'w', None for 'b'"):
        state = subject.usual[0].state
        updates, after = subject.update(gradients | {"b": None}, state, params)
        if updates["b"] is not None:
            raise Broken(f"the update of 'b' is a {type(updates['b']).__name__} and not None")
        if jax.tree.structure(after) != jax.tree.structure(state):
            raise Broken("the state has another structure after the step")
        expect_bits("what is kept for 'b'", kept_for("b", after), kept_for("b", state))
        expect_finite("the update", updates)
        all_of_it, after_all = subject.update(gradients, state, params)
        if _does_not_see_b(subject):
            expect_close("the update of 'w'", updates["w"], all_of_it["w"])
            expect_close("what is kept for 'w'", kept_for("w", after), kept_for("w", after_all))


def kept_for(name: str, state: Any) -> list[Any]:
    """What a state has under a key."""
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    return [x for path, x in leaves if name in path_of(path).split("/")]


def _does_not_see_b(subject: Subject) -> bool:
    """Whether 'w' makes the steps that it makes alone; a norm of all gradients is seen by all."""
    alone = subject.run({"w": subject.params["w"]}, [{"w": g["w"]} for g in subject.gradients[:2]])
    return are_close(alone[-1].updates["w"], subject.usual[1].updates["w"])


@contract
def empty_trees(subject: Subject) -> None:
    """A model of which everything is frozen, or a layer without weights, is an empty tree."""
    for what, tree in (("{}", {}), ("()", ())):
        with case(f"the parameters {what}"):
            step_of(subject, tree, tree)


@contract
def scalar_leaves(subject: Subject) -> None:
    """A temperature or a scale is a parameter without axes."""
    with case("one parameter of shape ()"):
        _, updates, _ = step_of(subject, jnp.ones(()), jnp.full((), 0.5))
        expect_finite("the update", updates)
        if updates.shape != ():
            raise Broken(f"the update has the shape {updates.shape}")


@contract
def zero_size_leaves(subject: Subject) -> None:
    """A layer of width zero has weights without elements; means over them are 0/0."""
    params, gradients = ({"b": normal(i)["b"], "none": jnp.zeros((0, 3))} for i in (0, 1))
    with case("a parameter of shape (0, 3) beside a vector"):
        _, updates, after = step_of(subject, params, gradients)
        expect_finite("the update", updates)
        expect_finite("the state", after)
        alone = step_of(subject, {"b": params["b"]}, {"b": gradients["b"]})[1]
        expect_close("the update", updates["b"], alone["b"])


class Pair(NamedTuple):
    b: Any
    w: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    b: Any
    w: Any


@contract
def containers(subject: Subject) -> None:
    """Parameters come in dicts, tuples, named tuples, dataclasses and nests of them, as arrays of
    jax and of numpy; the numbers do not depend on it."""
    both = [subject.params, subject.gradients[0]]
    for what, build in {
        "a list": lambda b, w: [b, w],
        "a tuple with an empty one": lambda b, w: (b, (), w),
        "a named tuple": Pair,
        "a registered dataclass": Registered,
        "a dict with a MaskedNode": lambda b, w: {"a": b, "m": optax.MaskedNode(), "w": w},
    }.items():
        with case(what):
            jax.eval_shape(functools.partial(step_of, subject), *(build(**x) for x in both))
    expected = [subject.usual[0].updates[name] for name in ("b", "w")]
    for what, build in {
        "a nest of all of them": lambda b, w: [
            Pair(Registered(b, None), (optax.MaskedNode(), {"w": w}))
        ],
        "arrays of numpy": lambda b, w: [np.asarray(b), np.asarray(w)],
    }.items():
        with case(what):
            updates = step_of(subject, *(build(**x) for x in both))[1]
            expect_close("the update", jax.tree.leaves(updates), expected)


@contract
def abstract_init(subject: Subject) -> None:
    """The shapes of a state are known without computing it; checkpoints and shardings are prepared
    from them."""
    with case("jax.eval_shape(optimizer.init, params)"):
        shapes = jax.eval_shape(subject.optimizer.init, subject.params)
        state = subject.optimizer.init(subject.params)
        if jax.tree.structure(shapes) != jax.tree.structure(state):
            raise Broken("the state has another structure than when it is computed")
        for (path, *one, _), (_, *other, _) in zip(avals(state), avals_of(shapes), strict=True):
            if one != other:
                raise Broken(f"at {path} it is {one}, abstractly {other}")


@contract
def parameter_order(subject: Subject) -> None:
    """The name of a parameter says nothing about its step: trees are sorted by names."""
    with case("the matrix before the vector"):
        swapped = [
            {"a": tree["w"], "b": tree["b"]} for tree in (subject.params, *subject.gradients)
        ]
        updates = subject.run(swapped[0], swapped[1:])[-1].updates
        expected = subject.usual[-1].updates
        expect_close("the update", updates, {"a": expected["w"], "b": expected["b"]})
