"""Checkpoints: bit-equal resumption in both formats, and refusal of what does not fit."""

from __future__ import annotations

import json

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from common import (
    CONVENTIONS,
    EVERY_CONVENTION,
    RECIPES,
    REPRESENTATIVE,
    assert_bit_equal,
    normal_tree,
)
from flax.training.train_state import TrainState
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from saved import (
    BLOCKS,
    FORMAT_1,
    SAVED_BY_FORMAT_1,
    WITH_BLOCKS,
    a_few_steps,
    blocks_start,
    small_tree,
)

from adaptive_opt import (
    CheckpointMismatch,
    Group,
    ParameterGroups,
    adam,
    adamod,
    adamw,
    amsgrad,
    check_checkpoint,
    checkpoint_header,
    diffmod,
    from_bytes,
    lookahead,
    nadam,
    one_cycle,
    sgd,
    skip_nonfinite,
    telemetry,
    to_bytes,
)
from adaptive_opt.checkpoints.headers import STATE_FORMAT
from adaptive_opt.memory import codecs

CYCLE = one_cycle(0.1, 10)
IN_THE_MIDDLE = {
    "of a warm-up": adamod(optax.linear_schedule(0.0, 1e-2, 10)),
    "of a one-cycle": adam(CYCLE.learning_rate, b1=CYCLE.b1),
    "of a Lookahead period": lookahead(diffmod(1e-2), sync_period=4),
    "of gradient accumulation": optax.MultiSteps(amsgrad(1e-2), 4).gradient_transformation(),
    "of skipped steps": skip_nonfinite(adamw(1e-2)),
    "of injected schedules": optax.inject_hyperparams(adam)(optax.linear_schedule(1e-2, 0.0, 10)),
}
STEPS, SAVED = 9, 6  # within every period of 4, not at its end


def history_of(optimizer):
    """Parameters and state after every step, and the step itself."""

    @jax.jit
    def step(params, state, t):
        gradient = jax.tree.map(lambda x: jnp.sin(x * 3 + t), params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    params = normal_tree()
    history = [(params, optimizer.init(params))]
    for t in range(STEPS):
        history.append(step(*history[-1], t))
    return step, history


@pytest.fixture(scope="module", params=IN_THE_MIDDLE)
def interrupted(request):
    optimizer = IN_THE_MIDDLE[request.param]
    return optimizer, *history_of(optimizer)


def go_on(step, restored):
    for t in range(SAVED, STEPS):
        restored = step(*restored, t)
    return restored


def test_bytes_resume_bit_equal_in_the_middle(interrupted):
    optimizer, step, history = interrupted
    data = to_bytes(optimizer, history[SAVED])
    restored = from_bytes(optimizer, history[0], data)
    assert_bit_equal(restored, history[SAVED])
    assert_bit_equal(go_on(step, restored), history[STEPS])
    shapes = jax.eval_shape(lambda: history[0])
    assert_bit_equal(from_bytes(optimizer, shapes, data), history[SAVED])


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_orbax_resumes_bit_equal_in_the_middle(interrupted, asynchronous, tmp_path):
    optimizer, step, history = interrupted
    saved = history[SAVED]
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=asynchronous)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        manager.save(
            SAVED,
            args=ocp.args.Composite(
                training=ocp.args.StandardSave(saved),
                header=ocp.args.JsonSave(checkpoint_header(optimizer, saved)),
            ),
        )
        manager.wait_until_finished()
    with ocp.CheckpointManager(tmp_path) as manager:
        header = manager.restore(SAVED, args=ocp.args.Composite(header=ocp.args.JsonRestore()))
        check_checkpoint(header["header"], optimizer, history[0])
        template = jax.eval_shape(lambda: history[0])
        training = ocp.args.StandardRestore(template)
        restored = manager.restore(SAVED, args=ocp.args.Composite(training=training))["training"]
    assert_bit_equal(restored, saved)
    assert_bit_equal(go_on(step, restored), history[STEPS])


@pytest.mark.broad
def test_orbax_restores_every_kind_of_state_onto_other_devices(tmp_path):
    """Saved split over 4 devices, read back split over 8, and on one."""
    params = {"kernel": jnp.arange(32.0).reshape(16, 2) / 32, "bias": jnp.ones(8)}

    def placed(tree, devices):
        mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))

        def place(x):
            spec = PartitionSpec("data") if x.ndim and x.shape[0] % devices == 0 else ()
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(place, tree)

    states = {}
    for name in REPRESENTATIVE:
        optimizer = RECIPES[name](1e-2)
        states[name] = optimizer.update(params, optimizer.init(params), params)[1]
    states = jax.device_put(states, placed(states, 4))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "states", states)
        checkpointer.wait_until_finished()
        for devices in (8, 1):
            shardings = placed(states, devices)
            template = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), states, shardings
            )
            restored = checkpointer.restore(tmp_path / "states", template)
            assert_bit_equal(restored, states)
            where = jax.tree.map(lambda x: x.sharding, restored)
            assert jax.tree.all(jax.tree.map(lambda a, b: a == b, where, shardings))


def test_a_train_state_is_saved_whole():
    def create(seed):
        return TrainState.create(apply_fn=None, params=normal_tree(seed), tx=adamod(1e-2))

    state = create(0).apply_gradients(grads=normal_tree(1))
    restored = from_bytes(state.tx, create(3), to_bytes(state.tx, state))
    assert_bit_equal((restored.params, restored.opt_state), (state.params, state.opt_state))
    assert restored.step == 1


# --- What does not fit --------------------------------------------------------------------------


def refused(message, saved, now, params=None, allow=()):
    x = {"w": jnp.ones(3), "b": jnp.ones(())}
    params = x if params is None else params
    with pytest.raises(CheckpointMismatch, match=message):
        from_bytes(now, now.init(params), to_bytes(saved, saved.init(x)), allow=allow)
    header = json.loads(json.dumps(checkpoint_header(saved, saved.init(x))))
    with pytest.raises(CheckpointMismatch, match=message):
        check_checkpoint(header, now, now.init(params), allow=allow)


@pytest.mark.parametrize("next_ones", [2, pytest.param(100, marks=pytest.mark.broad)])
def test_no_two_conventions_read_each_others_checkpoints(next_ones):
    """Names differ, or the setting does; conventions of one recipe, and with the next recipes."""
    x = jnp.ones(3)
    made = {name: recipe(1e-2) for name, recipe in EVERY_CONVENTION.items()}
    states = {name: optimizer.init(x) for name, optimizer in made.items()}
    headers = {name: checkpoint_header(o, states[name]) for name, o in made.items()}
    assert len(made) == len(RECIPES) + sum(len(c) - 1 for c in CONVENTIONS.values())
    for place, (saved, header) in enumerate(headers.items()):
        after = [*made, *made][place + 1 : place + 1 + next_ones]
        own = [name for name in made if name.split(" (")[0] == saved.split(" (")[0]]
        for now in {*own, *after}:
            optimizer = made[now]
            if now == saved:
                check_checkpoint(json.loads(json.dumps(header)), optimizer, states[now])
            else:
                with pytest.raises(CheckpointMismatch):
                    check_checkpoint(header, optimizer, states[now])


def test_the_error_names_what_differs():
    refused("the optimizer was adam, is nadam$", adam(1e-3), nadam(1e-3))
    refused(
        "convention of amsgrad was 'torch', is 'keras'",
        *(amsgrad(1e-3, convention=c) for c in ("torch", "keras")),
    )
    refused("b2 of adam was 0.999, is 0.99", adam(1e-3), adam(1e-3, b2=0.99))
    refused("learning_rate of adam was 0.001, is 'polynomial_schedule'",
            adam(1e-3), adam(optax.linear_schedule(1e-3, 0.0, 10)))  # fmt: skip
    refused("weight_decay of adamw was 0.0001, is 0.1", adamw(1e-3), adamw(1e-3, weight_decay=0.1))
    refused("sync_period of lookahead was 6, is 5", lookahead(sgd(0.1)), lookahead(sgd(0.1), 5))
    refused("momentum of sgd in lookahead was",
            lookahead(sgd(0.1, momentum=0.9)), lookahead(sgd(0.1, momentum=0.8)))  # fmt: skip
    clipped = optax.chain(optax.clip(1.0), adam(1e-3))
    refused("the optimizer was adam, is chain", adam(1e-3), clipped)
    watched = (adam(1e-3, observers=telemetry(every=n)) for n in (10, 20))
    refused("every of telemetry in adaptive was 10, is 20", *watched)
    refused("chain was made of clip, adam, is of adam, clip",
            clipped, optax.chain(adam(1e-3), optax.clip(1.0)))  # fmt: skip
    refused(
        "max_norm.* of clip_by_global_norm in chain was 1.0, is 2.0",
        *(optax.chain(optax.clip_by_global_norm(n), adam(1e-3)) for n in (1.0, 2.0)),
    )
    wider = {"w": jnp.ones(5), "b": jnp.ones(())}
    refused(r"\.mu\['w'\] was float32\[3\], is float32\[5\]", adam(1e-3), adam(1e-3), wider)
    half = {"w": jnp.ones(3), "b": jnp.ones((), jnp.float16)}
    refused(r"state_dtype of adam was None, is 'bfloat16'",
            adam(1e-3), adam(1e-3, state_dtype=jnp.bfloat16), half)  # fmt: skip
    more = {"w": jnp.ones(3), "b": jnp.ones(()), "c": jnp.ones(1)}
    refused(r"mu\['c'\] was not saved", adam(1e-3), adam(1e-3), more)
    refused(r"mu\['b'\] was saved, but has no place", adam(1e-3), adam(1e-3), {"w": jnp.ones(3)})


def test_a_setting_may_change_if_it_is_named():
    x = {"w": jnp.ones(3), "b": jnp.ones(())}
    data = to_bytes(adamw(1e-3), adamw(1e-3).init(x))
    slower = adamw(1e-4)
    assert_bit_equal(
        from_bytes(slower, slower.init(x), data, allow={"learning_rate"}), slower.init(x)
    )
    both = adamw(1e-4, b2=0.9)
    refused("b2 of adamw was 0.999, is 0.9", adamw(1e-3), both, allow={"learning_rate"})
    twice = adamw(1e-4, b2=0.9, weight_decay=0.5)
    allowed = {"learning_rate"}
    refused("b2 of adamw was 0.999, is 0.9; weight_decay of adamw was 0.0001, is 0.5$",
            adamw(1e-3), twice, allow=allowed)  # fmt: skip
    inside = lookahead(adam(1e-3)), lookahead(adam(1e-3, b2=0.9), 5)
    refused("fit: b2 of adam in lookahead was 0.999, is 0.9$", *inside, allow={"sync_period"})
    refused("momentum of sgd was 0.9, is 0.1; nesterov of sgd was True, is False$",
            *(sgd(r, m, n) for r, m, n in ((1.0, 0.9, True), (0.1, 0.1, False))),
            allow=allowed)  # fmt: skip
    # What the optimizer is made of must still be the same.
    refused("convention", diffmod(1e-3), diffmod(1e-3, convention="robust"), allow={"len_memory"})


def test_schedules_and_the_numbers_of_wrappers_are_compared_by_value():
    cycle, other = one_cycle(0.1, 10), one_cycle(0.2, 10)
    refused(r"learning_rate of adam was .* \(0\.004 at step 0\), is 0\.008 there",
            adam(cycle.learning_rate), adam(other.learning_rate))  # fmt: skip
    longer = one_cycle(0.1, 20).learning_rate
    refused("learning_rate of adam .* at step 1", adam(cycle.learning_rate), adam(longer))
    warm = [optax.linear_schedule(0.0, 1e-2, n) for n in (10, 100)]
    refused("learning_rate of adamw", *(adamw(schedule) for schedule in warm))
    accumulated = (optax.MultiSteps(adam(1e-3), k).gradient_transformation() for k in (4, 8))
    refused("every_k_schedule of MultiSteps was 4, is 8", *accumulated)
    tables = [
        ParameterGroups([Group("b$", freeze=frozen, learning_rate=times)], default=Group())
        for frozen, times in ((5, 1.0), (6, 1.0), (5, 2.0))
    ]
    first, frozen, faster = (table.optimizer(adamw, learning_rate=1e-3) for table in tables)
    refused("fit: step of frozen_until in ParameterGroups was 5, is 6$", first, frozen)
    refused("fit: learning_rate of adamw in frozen_until was 0.001, is 0.002$", first, faster)
    x = {"w": jnp.ones(3), "b": jnp.ones(())}
    again = adam(one_cycle(0.1, 10).learning_rate)
    from_bytes(again, again.init(x), to_bytes(again, again.init(x)))


def test_an_argument_that_one_version_of_optax_does_not_know_is_no_difference():
    x = jnp.ones(3)
    lion = optax.lion(1e-3)
    header = json.loads(json.dumps(checkpoint_header(lion, lion.init(x))))
    header["optimizer"]["parts"][0]["settings"].pop("b1")
    check_checkpoint(header, lion, lion.init(x))


def test_a_header_that_says_no_more_than_the_name_of_a_schedule_is_read():
    x, optimizer = jnp.ones(3), adam(optax.linear_schedule(0.0, 1e-2, 10))
    header = json.loads(json.dumps(checkpoint_header(optimizer, optimizer.init(x))))
    header["optimizer"]["settings"]["learning_rate"] = "polynomial_schedule"
    check_checkpoint(header, optimizer, optimizer.init(x))


def test_another_format_no_header_and_a_damaged_file_are_refused():
    x = jnp.ones(3)
    optimizer = adam(1e-3)
    state = optimizer.init(x)
    data = to_bytes(optimizer, state)
    damaged = [data[:length] for length in (0, 1, 4, len(data) // 2, len(data) - 1)]
    for place in range(0, len(data), 7):  # a bit in the name, in a number, in the checksum
        damaged.append(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
    for other in (flax.serialization.to_bytes(state), *damaged):
        with pytest.raises(CheckpointMismatch, match="cut short or damaged, or have no header"):
            from_bytes(optimizer, state, other)
    later = checkpoint_header(optimizer, state) | {"state_format": STATE_FORMAT + 1}
    with pytest.raises(CheckpointMismatch, match=r"has state format 3, .* reads 1 and 2"):
        check_checkpoint(later, optimizer, state)
    with pytest.raises(CheckpointMismatch, match="it has no leaves, optimizer, state_format"):
        check_checkpoint({}, optimizer, state)


@pytest.mark.parametrize("name", SAVED_BY_FORMAT_1)
def test_a_checkpoint_of_format_1_is_read_and_goes_on_as_it_did(name):
    """These files stay. If this fails, a state or a description has changed, and saved runs can no
    longer be read: read both, or raise STATE_FORMAT and convert."""
    optimizer = SAVED_BY_FORMAT_1[name]
    with np.load(FORMAT_1) as recorded:
        saved, after = recorded[f"{name}/saved"].tobytes(), recorded[f"{name}/after"]
    target = jax.eval_shape(lambda: (small_tree(), optimizer.init(small_tree())))
    params, state = from_bytes(optimizer, target, saved)
    params, _ = a_few_steps(optimizer, params, state)
    found = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    # The bias corrections of that version were 7e-6 off the rule: so much of three steps of 1e-2.
    off = 7.5e-6
    if name == "low_memory":  # whose noise is another since: moments are a step of bfloat16 apart
        off += 2.0**-7
    np.testing.assert_allclose(found, after, rtol=1e-6, atol=3 * 1e-2 * off)


@pytest.mark.broad
def test_8_bit_blocks_of_the_version_before_are_read_and_mean_what_they_meant():
    """This file stays, too."""
    state = WITH_BLOCKS.init(blocks_start())
    with np.load(BLOCKS) as recorded:
        read = from_bytes(WITH_BLOCKS, state, recorded["data"].tobytes())
        leaves = jax.tree.leaves(codecs.decoded(read.inner_state))
        expected = [recorded[f"leaf_{i}"] for i in range(len(leaves))]
        assert len(recorded.files) == len(leaves) + 1
    # Decoded in one program, or line by line: a unit in the last place in two factors, squared.
    for x, y in zip(leaves, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=5e-7, atol=0)
    assert any(np.abs(x).max() > 0.1 for x in expected)
    updates, new = WITH_BLOCKS.update(blocks_start(), read, blocks_start())
    assert jax.tree.structure(new) == jax.tree.structure(read)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))


def test_there_are_checkpoints_of_format_1_of_49_optimizers():
    assert len(SAVED_BY_FORMAT_1) == 49


def test_a_header_of_format_1_fits_what_jax_takes_for_its_dtypes():
    """Orbax keeps headers apart; those said float32 of a Python number, and of NumPy's float64."""
    optimizer = sgd(1e-2)
    tree = {"a": np.zeros(3), "step": 3, "b": jnp.zeros((), jnp.bfloat16)}
    header = checkpoint_header(optimizer, tree)
    assert header["leaves"]["['step']"] == [[], "Python int"]
    old = {"['a']": [[3], "float32"], "['step']": [[], "int32"], "['b']": [[], "bfloat16"]}
    check_checkpoint(header | {"leaves": old, "state_format": 1}, optimizer, tree)
    with pytest.raises(CheckpointMismatch, match=r"\['a'\] was float32\[3\], is float64\[3\]$"):
        check_checkpoint(header | {"leaves": old}, optimizer, tree)
    with pytest.raises(CheckpointMismatch, match=r"\['step'\] was int32\[\], is float32\[\]$"):
        check_checkpoint(
            header | {"leaves": old, "state_format": 1}, optimizer, tree | {"step": jnp.float32(3)}
        )


def test_what_is_no_header_is_refused():
    optimizer, x = sgd(1e-2), jnp.ones(3)
    header = checkpoint_header(optimizer, x)
    changed = [
        {"state_format": True}, {"state_format": "2"}, {"optimizer": 3}, {"leaves": {".": [[], 3]}},
        {"leaves": {".": [[-3], "float32"]}}, {"leaves": [["."]]}, {"optimizer": {"name": "sgd"}},
        {"optimizer": header["optimizer"] | {"settings": {"b1": float("nan")}}},
        {"optimizer": header["optimizer"] | {"parts": [None]}},
    ]  # fmt: skip
    for wrong in (None, 3, [], "text", {"state_format": 2}, *(header | new for new in changed)):
        with pytest.raises(CheckpointMismatch, match=r"this is not a header of a checkpoint: it"):
            check_checkpoint(wrong, optimizer, x)


def test_names_that_are_allowed_are_a_set():
    optimizer, x = sgd(1e-2), jnp.ones(3)
    with pytest.raises(TypeError, match=r"allow takes a set of names: \{'learning_rate'\}"):
        check_checkpoint(checkpoint_header(optimizer, x), optimizer, x, allow="learning_rate")
    with pytest.raises(
        ValueError, match=r"'learning_rat', .* Did you mean 'learning_rate'\? There"
    ):
        check_checkpoint(checkpoint_header(optimizer, x), optimizer, x, allow={"learning_rat"})


@pytest.mark.parametrize("where", ["state_format", "leaves", "optimizer"])
def test_numbers_that_python_does_not_print_are_in_no_header(where):
    optimizer, x = sgd(1e-2), jnp.ones(3)
    header = checkpoint_header(optimizer, x)
    huge = {
        "state_format": 10**5000,
        "leaves": {".": [[10**5000], "float32"]},
        "optimizer": header["optimizer"] | {"settings": {"learning_rate": 10**5000}},
    }
    with pytest.raises(CheckpointMismatch, match="this is not a header of a checkpoint: its"):
        check_checkpoint(header | {where: huge[where]}, optimizer, x)
