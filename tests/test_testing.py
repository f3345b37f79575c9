"""``adaptive_opt.testing``: every contract can be broken, known faults are found, recipes keep all.

What every recipe must do in any training loop is asked here, by the contracts; the other files ask
what is this library's own.
"""

from __future__ import annotations

import doctest
import json
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from common import FEWER, RECIPES, broadly, often

import adaptive_opt
from adaptive_opt.testing import CONTRACTS, assert_optimizer, check
from benchmarks import contracts

# --- Every contract can be broken -----------------------------------------------------------------


def spoiled(update, init=lambda params: ()):
    """Gradient descent behind something wrong; by itself it keeps every contract."""

    def factory(learning_rate):
        wrong = optax.GradientTransformation(init, update)
        return optax.chain(wrong, optax.sgd(learning_rate))

    return factory


def each(function):
    """Something wrong that is done to every gradient, and keeps no state."""
    return spoiled(lambda g, s, params=None: (jax.tree.map(function, g), s))


def zeros(params):
    return jax.tree.map(jnp.zeros_like, params)


def is_none(x):
    return x is None


WIDENS = spoiled(lambda g, s, p=None: (g, s.astype(float)), lambda p: jnp.zeros((), jnp.bfloat16))

GROWS = spoiled(lambda g, s, p=None: (g, (jnp.zeros(()),)))


def remembers_outside_of_the_state(learning_rate):
    calls = []

    def update(gradients, state, params=None):
        calls.append(1)
        return jax.tree.map(lambda g: g * len(calls), gradients), state

    return spoiled(update)(learning_rate)


def writes_into_the_state(gradients, state, params=None):
    state["count"] = state["count"] + 1
    return gradients, state


def divides_by_a_frozen_root(gradients, state, params=None):
    nu = jax.tree.map(lambda n, g: (0.999 * n + 0.001 * g * g).astype(n.dtype), state, gradients)
    return jax.tree.map(lambda n, g: g / (jnp.sqrt(n) + 1e-3), nu, gradients), nu


def counts_masked_nodes(gradients, state, params=None):
    n = len(jax.tree.leaves(gradients, is_leaf=lambda x: isinstance(x, optax.MaskedNode)))
    return jax.tree.map(lambda g: g * n, gradients), state


def differs_by_leaf(gradients, state, params=None):
    leaves, structure = jax.tree.flatten(gradients)
    return structure.unflatten(g * (i + 1) for i, g in enumerate(leaves)), state


def keeps_a_local_class(params):
    class Local(NamedTuple):
        count: Any

    return Local(jnp.zeros((), jnp.int32))


@jax.custom_batching.custom_vmap
def mean_of_members(x):
    return x * 1.0


@mean_of_members.def_vmap
def _(size, batched, x):
    return jnp.broadcast_to(x.mean(0, keepdims=True), x.shape), True


def forgets_where_there_is_no_gradient(gradients, state, params=None):
    halved = jax.tree.map(
        lambda g, s: s / 2 if g is None else s + 1, gradients, state, is_leaf=is_none
    )
    return gradients, halved


def largest_first(gradients, state, params=None):
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in jax.tree.leaves(gradients)]))
    return jax.tree.map(lambda g: g / (1 + largest), gradients), state


def late(learning_rate):
    return optax.sgd((lambda t: learning_rate(t + 1)) if callable(learning_rate) else learning_rate)


uphill = each(lambda g: -g)
SABOTEURS = {
    "state_dtypes": [spoiled(lambda g, s, p=None: (g, jax.tree.map(jnp.add, s, g)), zeros)],
    "update_dtypes": [each(lambda g: g.astype(float)), each(lambda g: g.astype(jnp.float16))],
    "no_weak_types": [spoiled(lambda g, s, p=None: (g, s + 0.0), lambda p: 0.0)],
    "complex_parameters": [each(lambda g: jnp.real(g).astype(g.dtype)), each(jnp.real)],
    "zero_gradients": [each(lambda g: g / jnp.abs(g))],
    "tiny_gradients": [each(lambda g: jnp.where(g == 0, 0, g / jnp.sqrt(g * g)))],
    "huge_gradients": [each(lambda g: g * (g * g) / (1 + g * g))],
    "updates_in_16_bits": [each(lambda g: (g + 1) - 1)],
    "memory_in_16_bits": [spoiled(divides_by_a_frozen_root, zeros)],
    "one_compilation": [WIDENS],
    "jit_is_eager": [each(lambda g: g * (1.001 if isinstance(g, jax.core.Tracer) else 1))],
    "scan_is_loop": [WIDENS],
    "vmap_is_loop": [each(mean_of_members)],
    "donation": [
        spoiled(lambda g, s, p=None: (g, s), lambda p: 2 * [zeros(p)]),
        spoiled(lambda g, s, p=None: (g, zeros(s)[0]), lambda p: [jnp.zeros(5), jnp.zeros(4)]),
        spoiled(lambda g, s, p=None: (g, p), lambda p: p),
    ],
    "derivative": [each(jax.lax.stop_gradient)],
    "derivative_at_zero": [each(lambda g: g * jnp.sqrt(jnp.sum(g * g)))],
    "none_parameters": [
        spoiled(lambda g, s, p=None: (jax.tree.map(lambda x: x * 1, g, is_leaf=is_none), s))
    ],
    "none_gradients": [
        spoiled(
            lambda g, s, p=None: (
                jax.tree.map(lambda x: 0.0 if x is None else x, g, is_leaf=is_none),
                s,
            )
        ),
        spoiled(forgets_where_there_is_no_gradient, lambda p: jax.tree.map(jnp.ones_like, p)),
    ],
    "empty_trees": [spoiled(largest_first)],
    "scalar_leaves": [each(lambda g: g / g.shape[0]), each(jnp.atleast_1d)],
    "zero_size_leaves": [
        spoiled(
            lambda g, s, p=None: (g, jax.tree.map(jnp.mean, g)),
            lambda p: jax.tree.map(lambda x: jnp.zeros(()), p),
        )
    ],
    "containers": [spoiled(lambda g, s, p=None: ({k: 2 * x for k, x in g.items()}, s))],
    "abstract_init": [
        spoiled(
            lambda g, s, p=None: (g, s),
            lambda p: [jnp.zeros(3) for x in jax.tree.leaves(p) if float(jnp.sum(x)) > 0],
        )
    ],
    "parameter_order": [spoiled(differs_by_leaf)],
    "tree_map_params": [
        spoiled(lambda g, s, p=None: (g, s), lambda p: [x * 0 for x in jax.tree.leaves(p)])
    ],
    "shardings": [
        spoiled(
            lambda g, s, p=None: (g, s),
            lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), p),
        )
    ],
    "resume_from_bytes": [WIDENS, GROWS],
    "pickled": [spoiled(lambda g, s, p=None: (g, s), keeps_a_local_class)],
    "deterministic": [remembers_outside_of_the_state],
    "inputs_unchanged": [
        spoiled(writes_into_the_state, lambda p: {"count": jnp.zeros((), jnp.int32)})
    ],
    "counts_saturate": [
        spoiled(lambda g, s, p=None: (g, s + 1), lambda p: jnp.zeros((), jnp.int32))
    ],
    "schedule_count": [late, lambda rate: optax.sgd(0.01 if callable(rate) else rate)],
    "gradient_scaling": [optax.sgd],
    "quadratic": [uphill],
    "rosenbrock": [uphill],
    "masked": [spoiled(counts_masked_nodes)],
    "partition": [spoiled(counts_masked_nodes)],
    "inject_hyperparams": [
        lambda learning_rate: optax.sgd(float(learning_rate)),
        lambda learning_rate: optax.sgd(
            learning_rate if isinstance(learning_rate, float) else 0.01
        ),
    ],
    "multi_steps": [GROWS],
}
"""For every contract, optimizers that break it."""


@pytest.mark.parametrize("name", CONTRACTS)
def test_every_contract_has_a_saboteur_that_breaks_it(name):
    for saboteur in SABOTEURS[name]:
        (result,) = check(saboteur, only=[name], gradient_scaling=0)
        assert result.outcome == "broken", result
        assert result.case


def test_gradient_descent_keeps_every_contract_and_each_has_a_reason():
    report = check(optax.sgd, gradient_scaling=1)
    assert [r.outcome for r in report] == ["holds"] * len(CONTRACTS), str(report)
    assert len(CONTRACTS) >= 25
    assert SABOTEURS.keys() == CONTRACTS.keys()
    assert all(r.reason.endswith(".") and r.reason.count(".") < 4 for r in report)


# --- What is known of optax -----------------------------------------------------------------------


KNOWN = pytest.mark.skipif(optax.__version__ != "0.2.8", reason="known of optax 0.2.8")


@KNOWN
def test_the_known_faults_of_optax_are_found():
    def ademamix(rate):
        return optax.contrib.ademamix(rate, mu_dtype=jnp.bfloat16)

    dtypes, scan = check(ademamix, only=["state_dtypes", "scan_is_loop"])
    assert "m1 goes from bfloat16[2] to float32[2]" in dtypes.case
    assert "scan body function carry" in scan.case
    zero, memory, none = check(
        optax.adam, only=["zero_gradients", "memory_in_16_bits", "none_gradients"]
    )
    assert zero.case == "a float16 gradient of 0: the update is not finite in step 1"
    assert memory.case.startswith("bfloat16 gradients of 1, and 1/16 later: 0.0006")
    assert none.outcome == "broken"


# --- The report -----------------------------------------------------------------------------------


def test_a_report_prints_a_table_and_is_data():
    report = check(uphill, only=["quadratic", "schedule_count", "gradient_scaling"])
    lines = str(report).splitlines()
    assert lines[0] == "schedule_count    holds"
    assert lines[1].startswith("gradient_scaling  skipped  no law is declared")
    assert lines[2].startswith("quadratic         broken   after 400 steps the loss is no less")
    assert lines[3] == "1 of 3 hold, 1 are broken"
    assert json.loads(json.dumps(report.as_data()))[2]["outcome"] == "broken"
    assert [r.contract for r in report.broken] == ["quadratic"]


def test_assert_optimizer_names_every_broken_contract_with_case_and_reason():
    with pytest.raises(AssertionError, match=r"breaks\nscalar_leaves: .*\n    A temperature"):
        assert_optimizer(each(lambda g: g / g.shape[0]), only=["scalar_leaves", "empty_trees"])


def test_an_excuse_needs_a_cause():
    only, why = ["scalar_leaves"], {"scalar_leaves": "it has none"}
    (excused,) = assert_optimizer(each(lambda g: g / g.shape[0]), only=only, excused=why)
    assert excused.outcome == "excused"
    assert excused.case.startswith("it has none (one parameter of shape (): raises IndexError")
    with pytest.raises(AssertionError, match="it is excused and holds: take the excuse away"):
        assert_optimizer(optax.sgd, only=only, excused=why)


def test_what_cannot_be_asked_is_skipped_with_the_reason(monkeypatch):
    made = check(optax.sgd(0.1), only=["schedule_count", "inject_hyperparams"])
    assert {r.outcome for r in made} == {"skipped"}
    assert {r.case for r in made} == {
        "give check a function of the learning rate, not a made optimizer"
    }
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    (one,) = check(optax.sgd, only=["shardings"])
    assert one.outcome == "skipped"
    assert one.case.startswith("there is one device")


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"a contract must be one of .*'zero_gradients'.*scalars"):
        check(optax.sgd, only=["scalars"])
    with pytest.raises(TypeError, match="or a function of the learning rate that returns one"):
        check(lambda rate: rate)


# --- Every recipe ---------------------------------------------------------------------------------

ASKED_MORE_STRICTLY = {
    "state_dtypes": "test_contract.py",
    "update_dtypes": "test_contract.py",
    "zero_gradients": "test_contract.py",
    "tiny_gradients": "test_extremes.py",
    "huge_gradients": "test_extremes.py",
    "updates_in_16_bits": "test_contract.py",
    "memory_in_16_bits": "test_contract.py",
    "derivative": "test_derivatives.py",
    "inject_hyperparams": "test_wrappers.py",
}
"""What other files ask of every recipe, and more strictly: here only of a few."""
WHOLE = "it multiplies whole matrices, and says so where one is split"
EXCUSED = {"muon": {"shardings": WHOLE}, "soap": {"shardings": WHOLE}}


OF_LINES = {"no_weak_types", "one_compilation", "scalar_leaves", "zero_size_leaves"}
"""What goes by the lines of a recipe, and not by the kind of its state; asked of all, always."""


@pytest.mark.parametrize("name", broadly(FEWER))
def test_every_recipe_keeps_the_contracts_that_nothing_else_asks(name):
    asked = CONTRACTS.keys() - ASKED_MORE_STRICTLY.keys()
    assert_optimizer(RECIPES[name], only=asked, excused=EXCUSED.get(name))


@pytest.mark.parametrize("name", [name for name in RECIPES if name not in FEWER])
def test_every_recipe_keeps_those_of_its_lines(name):
    assert_optimizer(RECIPES[name], only=OF_LINES)


@pytest.mark.parametrize("name", often(("diffmod",), more=FEWER))
def test_every_recipe_keeps_the_others_too(name):
    assert_optimizer(RECIPES[name], only=ASKED_MORE_STRICTLY)


def test_wrappers_keep_every_contract():
    def stacked(rate):
        inner = adaptive_opt.lookahead(adaptive_opt.adamw(rate), 2)
        return adaptive_opt.skip_nonfinite(adaptive_opt.parameter_ema(inner, 0.9))

    others = CONTRACTS.keys() - ASKED_MORE_STRICTLY.keys()
    goes_on = "a parameter that stands still is averaged: one weight corrects all averages"
    assert_optimizer(stacked, only=others, excused={"none_gradients": goes_on})


@pytest.mark.parametrize("function", [check, assert_optimizer])
def test_the_examples_in_docstrings_run(function):
    (example,) = doctest.DocTestFinder(recurse=False).find(function, globs={})
    assert doctest.DocTestRunner().run(example).attempted > 0
    assert doctest.DocTestRunner().run(example).failed == 0


# --- The page on optax ----------------------------------------------------------------------------


def test_the_page_asks_every_optimizer_of_optax_and_names_every_contract():
    text = contracts.PAGE.read_text()
    assert {f"### {name}" for name in contracts.optimizers()} == {
        line for line in text.splitlines() if line.startswith("### ")
    }
    for name, one in CONTRACTS.items():
        assert f"| `{name}` | {one.reason} |" in text


def test_a_page_is_made_of_reports():
    broken = check(uphill, only=["quadratic"])
    text = contracts.page({"up": broken, "down": check(optax.sgd, only=["quadratic"])})
    assert "| 1: `up` |" in text
    assert "### up\n\n0 hold, 1 are broken.\n\n* `quadratic`: after 400 steps" in text
    assert text.endswith("### down\n\n1 hold, 0 are broken.")
