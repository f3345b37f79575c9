"""One loop over each parameter and its state, where XLA's option is set; else nothing changes."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from common import PER_TENSOR, RECIPES, assert_bit_equal, normal_tree
from traffic import OPTION, compiled_step, traffic, without_the_option

import adaptive_opt
from adaptive_opt import adamod, describe, single_pass, single_pass_stands_aside
from benchmarks import hand_fused
from benchmarks.accelerators import CASES, is_elementwise

pytestmark = pytest.mark.compiles
HERE = pathlib.Path(__file__).parent

# Where the compiled forms differ, XLA divides by a scalar in one and multiplies by its inverse in
# the other, or contracts another sum of products to one rounding.
CONTRACTED = "nadam", "nadamw", "sgdw", "rmsprop", "adabelief", "laprop", "adan", "ranger"
ULPS = dict.fromkeys(RECIPES, 1.0) | dict.fromkeys(CONTRACTED, 4.0) | {"schedule_free_adamw": 5.0}
ULPS["schedule_free_radam"] = 1000.0  # of parameters next to 0, where two terms cancel


def run(program: str, *, flags: str = "") -> str:
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": f"{HERE.parent}:{HERE}"}
    finished = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd=HERE
    )
    assert finished.returncode == 0, finished.stderr[-2000:]
    return finished.stdout


def report_with_the_option(names):
    program = f"import runpy, sys; sys.argv[1:] = {list(names)}"
    program += "; runpy.run_path('single_pass_process.py', run_name='__main__')"
    return json.loads(run(program))


OFTEN = ("adam", "adamw", "amsgrad", "adamod", "diffgrad", "diffmod", "nadam", "ranger")


@pytest.fixture(scope="module")
def with_the_option():
    return report_with_the_option(OFTEN)


def fewest_bytes(name: str) -> float:
    """Parameters and buffers are read and written, the gradient is read."""
    params = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    state = jax.tree.leaves(jax.eval_shape(RECIPES[name](1e-3).init, params))
    looks_first = 4 if name in ("rmsprop of the tree", *PER_TENSOR) else 0  # at all gradients
    return 8 + 4 + looks_first + 8 * sum(buffer.shape == params.shape for buffer in state)


def assert_one_loop(name, found):
    merged = found["single pass"]
    assert merged == {"bytes": fewest_bytes(name), "temporary": 0.0, "loops": 1}
    assert merged["bytes"] <= found["plain"]["bytes"]
    assert found["ulps"] <= ULPS[name]


@pytest.mark.broad
@pytest.mark.parametrize("name", OFTEN)
def test_one_loop_reads_and_writes_everything_once(with_the_option, name):
    assert with_the_option["stands aside"] is None
    assert_one_loop(name, with_the_option["large"][name])


@pytest.mark.slow
def test_every_elementwise_recipe_becomes_one_loop():
    names = [name for name in RECIPES if name in CASES and is_elementwise(name)]
    found = report_with_the_option(names)["large"]
    for name in names:
        assert_one_loop(name, found[name])


@pytest.mark.broad
def test_the_numbers_of_the_documentation(with_the_option):
    found = {name: case["single pass"]["bytes"] for name, case in with_the_option["large"].items()}
    assert found["adam"] == found["adamw"] == found["optax.adam"] == 28
    assert found["amsgrad"] == found["adamod"] == found["diffgrad"] == 36
    assert found["diffmod"] == 44


@pytest.mark.broad
def test_trees_with_masks_none_and_16_bits_come_out_as_without(with_the_option):
    assert len(with_the_option["trees"]) == 5
    assert all(ulps <= 2 for ulps in with_the_option["trees"].values())  # of the update


@pytest.mark.broad
def test_a_training_step_has_one_loop_for_the_gradient_and_one_for_the_rest(with_the_option):
    for loops in with_the_option["training"]:
        assert loops["single pass"] == 2 < loops["plain"]


@pytest.mark.broad
def test_a_jit_inside_changes_nothing(with_the_option):
    assert with_the_option["nested jits"] == 3 * [{"bytes": 36.0, "temporary": 0.0, "loops": 1}]


@pytest.mark.broad
def test_sharded_parameters_stay_where_they_are(with_the_option):
    assert with_the_option["shards"] == {"communicates": False, "split": True}


@pytest.mark.broad
def test_the_copy_of_the_gradient_is_one_bit_for_bit_nan_and_zeros_included(with_the_option):
    assert with_the_option["previous gradient kept"]


@without_the_option
@pytest.mark.parametrize("name", ["adamod", "diffgrad"])
def test_without_the_option_the_program_is_that_of_the_inner_optimizer(name):
    plain = RECIPES[name](1e-3)
    assert "enable_single_pass()" in single_pass_stands_aside()
    assert traffic(compiled_step(single_pass(plain))) == traffic(compiled_step(plain))


@without_the_option
def test_an_option_that_came_after_the_start_of_jax_is_noticed(monkeypatch):
    jnp.zeros(1).block_until_ready()
    with pytest.raises(RuntimeError, match=r"comes too late.*XLA_FLAGS="):
        adaptive_opt.enable_single_pass()
    assert "XLA_FLAGS" not in os.environ or OPTION not in os.environ["XLA_FLAGS"]
    monkeypatch.setenv("XLA_FLAGS", OPTION)
    assert "does not lessen the memory traffic" in single_pass_stands_aside()
    plain = adamod(1e-3)
    assert traffic(compiled_step(single_pass(plain))) == traffic(compiled_step(plain))


def test_on_another_backend_it_stands_aside(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "on gpu XLA merges loops by itself" in single_pass_stands_aside()


@pytest.mark.broad
def test_a_jax_whose_programs_cannot_be_taken_apart_is_left_alone():
    program = """
import adaptive_opt, sys, jax, jax.numpy as jnp
def broken(*_):
    raise AttributeError("gone in this version")
sys.modules["adaptive_opt.memory.elementwise"].jaxpr_as_fun = broken
adaptive_opt.enable_single_pass()
tx = adaptive_opt.single_pass(adaptive_opt.adam(0.1))
print(adaptive_opt.single_pass_stands_aside())
print(jax.jit(tx.update)(jnp.ones(1), tx.init(jnp.ones(1)))[0].round(3))
"""
    reason, update = run(program).splitlines()
    assert "does not lessen" in reason
    assert update == "[-0.1]"


def test_outside_jit_it_is_the_inner_optimizer():
    params = normal_tree()
    plain = adamod(1e-3)
    results = [tx.update(params, plain.init(params), params) for tx in (plain, single_pass(plain))]
    assert_bit_equal(*results)


def test_it_is_described_around_what_it_wraps():
    assert describe(single_pass(optax.sgd(0.1))).name == "single_pass"
    assert describe(single_pass(adamod(1e-3))).parts[0].name == "adamod"


def test_importing_the_package_changes_no_environment():
    program = "import os; a = dict(os.environ); import adaptive_opt; print(a == dict(os.environ))"
    assert run(program) == "True\n"


@without_the_option
@pytest.mark.parametrize("name", hand_fused.RULES)
def test_without_the_option_stages_move_no_more_than_a_hand_fused_version(name):
    params = jax.ShapeDtypeStruct((1 << 14,), jnp.float32)
    state = jax.eval_shape(lambda x: hand_fused.init(name, x), params)
    by_hand = jax.jit(lambda *a: hand_fused.step(name, *a), donate_argnums=(0, 1))
    compiled = by_hand.lower(params, state, params).compile()
    ours = compiled_step(RECIPES[name](1e-3), params.shape)
    assert traffic(ours, params.shape).bytes <= traffic(compiled, params.shape).bytes


@pytest.mark.parametrize("name", hand_fused.RULES)
def test_the_hand_fused_versions_take_the_steps_of_the_recipes(name, x64):
    params = normal_tree(dtype="float64", shapes={"kernel": (5, 3)})
    optimizer = RECIPES[name](1e-3)
    state, by_hand = optimizer.init(params), hand_fused.init(name, params)
    mine = other = params
    for seed in range(8):
        gradient = normal_tree(seed, "float64", {"kernel": (5, 3)})
        updates, state = optimizer.update(gradient, state, mine)
        mine = optax.apply_updates(mine, updates)
        other, by_hand = hand_fused.step(name, other, by_hand, gradient)
    difference = jnp.abs(mine["kernel"] - other["kernel"]).max()
    moved = jnp.abs(mine["kernel"] - params["kernel"]).max()
    assert float(difference) <= 1e-12 * float(moved)
