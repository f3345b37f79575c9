"""Two processes with four devices each train, save and restore as one process with eight."""

from __future__ import annotations

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from processes import SAVED, STEPS, Run

PROGRAM = pathlib.Path(__file__).with_name("processes.py")
PROCESSES, SECONDS = 2, 300
pytestmark = pytest.mark.broad
PORT_IN_USE = ("Failed to start RPC server", "Failed to add port")  # the second, then a crash


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(directory, ports, seconds=SECONDS):
    """Runs the processes to their end; another port is taken if the first one is in use."""
    paths = [str(PROGRAM.parent.parent), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "JAX_PLATFORMS": "cpu"}
    for port in ports:
        logs = [directory / f"process{i}.log" for i in range(PROCESSES)]
        started = []
        try:
            for i, log in enumerate(logs):
                command = [sys.executable, PROGRAM, port, i, PROCESSES, directory]
                with log.open("w") as out:
                    started.append(
                        subprocess.Popen(
                            list(map(str, command)), stdout=out, stderr=out, env=environment
                        )
                    )
            codes = wait(started, seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
        if codes == [0] * PROCESSES:
            return
        said = "\n".join(log.read_text()[-3000:] for log in logs)
        if not any(failure in said for failure in PORT_IN_USE):
            break
    raise AssertionError(f"exit codes {codes} (None: not within {seconds} s)\n{said}")


def wait(processes, seconds):
    """The exit codes once all have ended, or one has failed, or the time is over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        codes = [process.poll() for process in processes]
        if None not in codes or any(codes):
            break
        time.sleep(0.1)
    return [process.poll() for process in processes]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """Eight devices of this process; what it saved is in the folder "one"."""
    directory = tmp_path_factory.mktemp("processes")
    with jax.enable_x64(True):
        run = Run(8)
        run.save(directory / "one", run.train(run.first, slice(SAVED)))
    return directory, run


@pytest.fixture(scope="module")
def two_processes(one_process):
    """What each process found, once all has been run; the first port is taken already."""
    directory, _ = one_process
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        launch(directory, [other.getsockname()[1], free_port(), free_port()])
    return [dict(np.load(directory / f"process{i}.npz")) for i in range(PROCESSES)]


@pytest.fixture(scope="module")
def one_device():
    with jax.enable_x64(True):
        run = Run(1)
        return run.fetch(run.train(run.first, slice(STEPS)))


def of(name, found):
    start = f"{name}/"
    return {path.removeprefix(start): x for path, x in found.items() if path.startswith(start)}


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for path, x in actual.items():
        np.testing.assert_allclose(x, expected[path], rtol=1e-9, atol=1e-9, err_msg=path)


def test_two_processes_train_as_one_device(two_processes, one_device):
    for found in two_processes:
        assert_close(of("uninterrupted", found), one_device)


def test_every_process_holds_its_part_of_the_state(two_processes):
    facts = [json.loads(str(found["facts"])) for found in two_processes]
    for fact in facts:
        assert (fact["processes"], fact["devices"], fact["own devices"]) == (2, 8, 4)
        # Half, and four copies of the few numbers that are whole on every device.
        half = fact["state bytes"] / 2
        assert half <= fact["own state bytes"] < 1.05 * half


def test_to_bytes_sends_arrays_of_several_processes_to_orbax(two_processes):
    for found in two_processes:
        said = json.loads(str(found["facts"]))["to_bytes"]
        assert "is split over devices of other processes" in said
        assert "save with Orbax" in said


def test_two_processes_resume_bit_for_bit_what_they_saved(two_processes):
    for found in two_processes:
        whole, resumed = of("uninterrupted", found), of("resumed", found)
        assert len(whole) == len(resumed) > 50
        for path, x in whole.items():
            assert x.tobytes() == resumed[path].tobytes()


def test_two_processes_go_on_with_what_one_process_saved(two_processes, one_device):
    for found in two_processes:
        assert_close(of("moved in", found), one_device)


@pytest.mark.parametrize("devices", [8, 4])
def test_one_process_goes_on_with_what_two_processes_saved(
    devices, two_processes, one_process, one_device
):
    directory, run = one_process
    with jax.enable_x64(True):
        run = run if devices == 8 else Run(devices)
        restored = run.restore(directory / "several")
        for x, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(run.first), strict=True):
            assert x.sharding == wanted.sharding
        assert_close(run.fetch(run.train(restored, slice(SAVED, STEPS))), one_device)


def test_processes_that_take_too_long_are_ended(tmp_path):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"exit codes \[None, None\] \(None: not within 0.5 s"):
        launch(tmp_path, [free_port()], seconds=0.5)
    assert time.monotonic() - began < 30
