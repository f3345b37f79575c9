"""What the compilers for GPUs and TPUs make of the recipes; where these compilers are installed."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from adaptive_opt import adam, amsgrad, low_memory
from adaptive_opt.core.trees import calculated, copied
from benchmarks import accelerators

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "accelerators"
ELEMENTWISE = [name for name in accelerators.CASES if accelerators.is_elementwise(name)]
ONE_LOOP = [name for name in ELEMENTWISE if "8-bit" not in name]
KERNELS = tuple(accelerators.IN_ONE_KERNEL)
TWO_ON_TPUS = {
    *("adadelta", "schedule_free_adamw", "schedule_free_radam"),
    *(name for name in ONE_LOOP if "bfloat16" in name),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    output = tmp_path_factory.mktemp("accelerators")
    cases = ("adam", "adamod", "diffmod", "diffmod, bfloat16", "adam, 8-bit", *KERNELS[::4])
    command = [sys.executable, "-m", "benchmarks.accelerators", "--cases", *cases]
    finished = subprocess.run(
        [*command, "--output", str(output)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    installed = "COMPILERS_ARE_INSTALLED" in os.environ
    if "there is no compiler" in finished.stderr and not installed:
        pytest.skip("the compilers for accelerators are not installed")
    assert finished.returncode == 0, finished.stderr[-2000:]
    found = json.loads((output / "accelerators.json").read_text())
    assert not installed or set(found) == set(accelerators.TARGETS)
    return found


def assert_one_loop(found):
    for target, results in found.items():
        for name, facts in results["cases"].items():
            if name not in ONE_LOOP or (target.startswith("TPU") and name in TWO_ON_TPUS):
                continue
            large = [operation for operation, moved in facts["operations"] if moved > 0.5]
            assert large == ["fusion"], (target, name)
            assert facts["bytes"] == pytest.approx(accelerators.least_bytes(name), abs=0.01)
            assert facts["temporary"] < 0.1
        assert set(results["kernels"].values()) == {results["leaves"]}


def test_one_loop_over_every_leaf_on_every_accelerator(found):
    assert_one_loop(found)


MOST_IN_8_BITS = {"NVIDIA H100": 22.5, "TPU v5e": 30.0}
"""Bytes that Adam moves, where 16.1 is the least: the largest of each block must be known first."""


def assert_few_bytes_in_8_bits(found):
    for target, results in found.items():
        facts = results["cases"]["adam, 8-bit"]
        assert 16 < facts["bytes"] <= MOST_IN_8_BITS[target], target
        assert facts["temporary"] < 4  # no array is laid out anew


def test_8_bits_are_read_where_they_lie(found):
    assert_few_bytes_in_8_bits(found)


def assert_one_kernel_for_8_bits(found):
    for name, facts in found.get("NVIDIA H100", {"cases": {}})["cases"].items():
        if name in KERNELS:
            large = [operation for operation, moved in facts["operations"] if moved > 0.05]
            assert large == ["custom-call"], name
            assert facts["bytes"] == pytest.approx(accelerators.least_bytes(name), abs=0.01)
            assert facts["temporary"] < 0.01  # every array takes the place of the one before


def test_one_kernel_reads_and_writes_8_bits_once(found):
    assert_one_kernel_for_8_bits(found)


def test_what_is_kept_says_the_same_of_all_recipes():
    kept = json.loads((RESULTS / "accelerators.json").read_text())
    assert list(kept) == list(accelerators.TARGETS)
    for results in kept.values():
        assert set(ELEMENTWISE) <= set(results["cases"]) <= set(accelerators.CASES)
    assert_one_loop(kept)
    assert_few_bytes_in_8_bits(kept)
    assert_one_kernel_for_8_bits(kept)
    assert kept["NVIDIA H100"]["cases"]["adam, 8-bit, one_kernel"]["bytes"] <= 17
    assert accelerators.table(kept) + "\n" == (RESULTS / "accelerators.md").read_text()


@pytest.mark.parametrize(
    "optimizer", [adam(1e-3), amsgrad(1e-3), low_memory(adam(1e-3))], ids=["adam", "amsgrad", "low"]
)
def test_what_is_counted_is_what_xla_counts(optimizer):
    shapes = {"weight": (512, 256)}
    compiled = accelerators.compiled_for(jax.devices("cpu")[0], optimizer, shapes)
    counted = accelerators.moved(compiled, shapes)
    by_xla = compiled.cost_analysis()["bytes accessed"] / (512 * 256)
    assert counted.bytes == pytest.approx(by_xla, abs=0.02)
    assert len(counted.operations) >= 2  # the CPU has a loop for every output


def test_a_copy_on_an_accelerator_is_one_bit_for_bit():
    """The form that only accelerators compile, as XLA:CPU calculates it."""
    x = jnp.array([0.0, -0.0, jnp.nan, jnp.inf, -jnp.inf, 1e-45, 3e38, 1.0])
    for calculate in (copied, calculated):
        for before in (jnp.zeros(8), jnp.full(8, jnp.nan), jnp.full(8, jnp.inf)):
            assert jax.jit(calculate)(x, before).tobytes() == x.tobytes()
