"""Telemetry is read wherever a state is kept, and logged to where people look."""

from __future__ import annotations

import csv
import importlib.util
import json
import pathlib
import sys
import types

import equinox
import flax.linen
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from common import one_in
from flax import nnx
from flax.training.train_state import TrainState

from adaptive_opt import (
    Group,
    ParameterGroups,
    adamod,
    adamw,
    gradual_unfreezing,
    rate_histograms,
    read_telemetry,
    skip_nonfinite,
    telemetry,
)
from adaptive_opt.watching.plots import Recorder

OPTIMIZER = skip_nonfinite(adamod(1e-2, observers=telemetry(every=2)))


# --- Homes ----------------------------------------------------------------------------------------


def optimizer_of_nnx():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=nnx.Param)
    for _ in range(3):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    return optimizer


def state_of_nnx():
    return nnx.state(optimizer_of_nnx())


def state_inside_nnx():
    return optimizer_of_nnx().opt_state


def pure_dict_of_nnx():
    return nnx.to_pure_dict(state_of_nnx())


def partition_of_equinox():
    model = equinox.nn.Linear(3, 2, key=jax.random.key(0))
    state = OPTIMIZER.init(equinox.filter(model, equinox.is_array))
    for _ in range(3):
        _, state = OPTIMIZER.update(
            jax.tree.map(jnp.ones_like, state.inner_state[0].buffers["mu"]),
            state,
            equinox.filter(model, equinox.is_array),
        )
    return equinox.partition(state, equinox.is_array)[0]


def train_state():
    params = flax.linen.Dense(2).init(jax.random.key(0), jnp.ones((1, 3)))["params"]
    state = TrainState.create(apply_fn=None, params=params, tx=OPTIMIZER)
    for _ in range(3):
        state = state.apply_gradients(grads=jax.tree.map(jnp.ones_like, params))
    return state


def checkpoint():
    return flax.serialization.to_state_dict(train_state())


HOMES = (
    optimizer_of_nnx, state_of_nnx, state_inside_nnx, pure_dict_of_nnx, partition_of_equinox,
    train_state, checkpoint,
)  # fmt: skip


@pytest.mark.parametrize("home", one_in(3, HOMES), ids=lambda home: home.__name__)
def test_telemetry_is_read_where_a_state_is(home):
    held, recorder = home(), Recorder()
    seen = read_telemetry(held)
    assert seen["step"] == 3
    assert seen["learning_rate"] == pytest.approx(1e-2)
    assert seen["gradient_norm/all"] == pytest.approx(8**0.5)  # three by two, and a bias of two
    assert 0 <= seen["limited/adamod_momental_bound/all"] <= 1
    assert (seen["skipped"], seen["skipped_in_a_row"]) == (0, 0)
    assert rate_histograms(held)["all"].sum() == 1
    recorder.record(held)
    assert recorder.steps == [3]
    assert recorder.rows == [seen]


@pytest.mark.broad
def test_a_package_that_nobody_imported_is_not_imported():
    program = (
        "import sys, jax.numpy as jnp\n"
        "from adaptive_opt import adam, read_telemetry, telemetry\n"
        "read_telemetry(adam(1e-2, observers=telemetry()).init(jnp.ones(2)))\n"
        "assert not {'flax', 'equinox'} & {name.split('.')[0] for name in sys.modules}\n"
    )
    import subprocess

    subprocess.run([sys.executable, "-c", program], check=True)


# --- New numbers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [skip_nonfinite, lambda inner: optax.apply_if_finite(inner, 5)])
def test_skipped_steps_are_read(guard):
    optimizer, x = guard(adamw(1e-2, observers=telemetry(every=1))), jnp.ones(2)
    state, update = optimizer.init(x), jax.jit(optimizer.update)
    for gradient in (x, x * jnp.nan, x, x * jnp.inf, x * jnp.inf):
        _, state = update(gradient, state, x)
    seen = read_telemetry(state)
    assert (seen["skipped"], seen["skipped_in_a_row"], seen["step"]) == (3, 2, 2)


def test_the_loss_and_three_norms_are_read():
    groups = {"kernel": "kernel"}
    optimizer = adamw(1e-2, weight_decay=0.1, observers=telemetry(every=1, groups=groups))
    params = {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.array([3.0])}
    gradient = {"kernel": jnp.full((2, 3), -0.5), "bias": jnp.array([0.25])}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    _, state = update(gradient, state, params)
    assert "loss" not in read_telemetry(state)
    for loss in (jnp.float32(-0.75), np.float64(2.5)):
        _, state = update(gradient, state, params, value=loss)
        assert read_telemetry(state)["loss"] == loss
    seen = read_telemetry(state)
    assert seen["gradient_norm/kernel"] == pytest.approx(0.5 * 6**0.5)
    assert seen["gradient_norm/other"] == pytest.approx(0.25)
    assert seen["gradient_norm/all"] == pytest.approx((0.25 * 6 + 0.0625) ** 0.5)
    assert seen["param_norm/kernel"] == pytest.approx(2 * 6**0.5)
    # Of equal gradients every step is the learning rate; decay is not in it.
    assert seen["update_norm/kernel"] == pytest.approx(1e-2 * 6**0.5, rel=1e-4)
    assert seen["update_ratio/other"] == pytest.approx(1e-2 / 3, rel=1e-4)
    _, state = optimizer.update(gradient, state, params, value=jnp.ones(3))  # no scalar
    assert "loss" not in read_telemetry(state)


# --- Recorder -------------------------------------------------------------------------------------


def test_a_recorder_keeps_its_history_when_a_group_is_unfrozen_and_when_a_run_goes_on(tmp_path):
    groups = ParameterGroups(gradual_unfreezing(["body", "head"], steps=5), default=Group())
    optimizer = groups.optimizer(adamw, learning_rate=1e-2, observers=telemetry(every=2))
    params = {"body": jnp.ones(3), "head": jnp.ones(2)}
    state, update, recorder = optimizer.init(params), jax.jit(optimizer.update), Recorder()
    for step in range(1, 13):
        _, state = update(params, state, params)
        recorder.record(state)
        if step == 8:
            recorder.save(tmp_path / "log.json")
            recorder = Recorder.load(tmp_path / "log.json")
    assert recorder.steps == [1, 3, 5, 7, 9, 11]
    first, last = ({k for k in recorder.rows[i] if k.endswith("/step")} for i in (0, -1))
    (body,), (head,) = last - first, [key for key in first if "head" in key]
    assert "body" in body
    assert recorder.curve(head)[1].tolist() == recorder.steps
    recorder.save(tmp_path / "again.json")
    again = Recorder.load(tmp_path / "again.json")
    assert (again.steps, again.rows) == (recorder.steps, recorder.rows)
    group = head.removesuffix("step") + "all"
    np.testing.assert_array_equal(again.spectrogram(group), recorder.spectrogram(group))


# --- Logs -----------------------------------------------------------------------------------------

FILE = pathlib.Path(__file__).parent.parent / "examples" / "logging_telemetry.py"
SPEC = importlib.util.spec_from_file_location("logging_telemetry", FILE)
EXAMPLE = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(EXAMPLE)


def test_a_csv_file_holds_what_was_seen(tmp_path):
    with EXAMPLE.to_csv(tmp_path) as log:
        state = EXAMPLE.train(log, 25)
    with (tmp_path / "telemetry.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = {(int(row["step"]), row["key"]): float(row["value"]) for row in rows}
    assert sorted({step for step, _ in found}) == [1, 11, 21]
    assert {key: x for (step, key), x in found.items() if step == 21} == read_telemetry(state)
    losses = [found[step, "loss"] for step in (1, 11, 21)]
    assert losses == sorted(losses, reverse=True)


def test_tensorboard_reads_what_was_seen(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    with EXAMPLE.to_tensorboard(tmp_path) as log:
        state = EXAMPLE.train(log, 25)
    (file,) = tmp_path.glob("events*")
    data, at, found = file.read_bytes(), 0, {}
    while at < len(data):  # a length of 8 bytes, its checksum of 4, the event, its checksum
        size = int.from_bytes(data[at : at + 8], "little")
        event = Event.FromString(data[at + 12 : at + 12 + size])
        found |= {(event.step, v.tag): v.simple_value for v in event.summary.value}
        at += 16 + size
    assert {step for step, _ in found} == {1, 11, 21}
    for key, value in read_telemetry(state).items():
        assert found[21, key] == pytest.approx(value, rel=1e-6)


def test_wandb_is_given_what_was_seen(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda row, step: logged.append((step, row)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    with EXAMPLE.to_wandb(tmp_path) as log:
        state = EXAMPLE.train(log, 25)
    assert [step for step, _ in logged] == [1, 1, 11, 11, 21, 21]
    assert logged[-2][1] == read_telemetry(state)
    json.dumps(logged)
