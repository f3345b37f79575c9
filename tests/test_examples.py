"""The examples run, and find what they say that they find."""

from __future__ import annotations

import ast
import inspect
import pathlib
import re
import signal

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import pytest
from flax import nnx
from killing import start
from torch_states import BEFORE, SEEN, recorded

from adaptive_opt import describe, make

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = sorted(p for p in (ROOT / "examples").glob("*.py") if p.stem != "helpers")


def test_a_stage_of_ones_own_is_in_the_description_and_changes_the_result(example, capsys):
    module = example("own_stage")
    medians = module.main(["--steps", "20"])
    assert "    cautious\n" in capsys.readouterr().out
    assert medians["adam"] != medians["with caution"]


@pytest.mark.broad
def test_unfreezing_is_compared_with_two_other_ways(example, capsys):
    accuracies = example("gradual_unfreezing").main(["--steps", "3"])
    assert set(accuracies) == {"head alone", "all at one rate", "gradual unfreezing"}
    table = capsys.readouterr().out.splitlines()[-3:]
    for line, (name, accuracy) in zip(table, accuracies.items(), strict=True):
        assert line.split()[-1] == f"{accuracy:.4f}"
        assert line.startswith(name)


@pytest.mark.broad
def test_what_is_frozen_stays(example):
    module = example("gradual_unfreezing")
    data = module.load(0)[1]
    params = module.CNN().init(jax.random.key(0), data[0][:1])["params"]
    makers = module.ways(8)
    for name, still in (
        ("head alone", {"conv1", "conv2", "hidden"}),
        ("gradual unfreezing", {"conv1", "conv2", "hidden"}),  # the next layer after two steps
        ("all at one rate", set()),
    ):
        after = module.train(makers[name](), params, data, 2, 0, name)
        same = {
            layer
            for layer in module.LAYERS
            if np.array_equal(after[layer]["kernel"], params[layer]["kernel"])
        }
        assert same == still


@pytest.mark.slow
def test_a_body_that_is_tuned_too_does_better_than_the_head_alone(example):
    accuracies = example("gradual_unfreezing").main([])
    head = accuracies.pop("head alone")
    assert head > 0.5
    assert min(accuracies.values()) > head + 0.05


# --- a run with everything ------------------------------------------------------------------------

FINETUNE = ROOT / "examples" / "finetune.py"


@pytest.mark.broad
def test_fine_tuning_that_is_killed_goes_on_bit_for_bit(example, tmp_path, capsys):
    whole, killed = (tmp_path / name for name in ("whole", "killed"))
    module = example("finetune")
    accuracy, digest = module.main(["--steps", "60", "--folder", str(whole)])
    said = capsys.readouterr().out
    assert f"{100 * accuracy:.1f} %. Weights: {digest[:16]}" in said
    assert accuracy > 0.5

    options = ["--steps", 60, "--folder", killed]
    process = start(FINETUNE, *options, "--kill-at", 47)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert module.main([*map(str, options)]) == (accuracy, digest)
    assert "Going on after step 40" in capsys.readouterr().out

    rows = module.logged(killed)
    assert rows == module.logged(whole)
    assert sorted(rows) == [1, 6, 11, 16, 21, 26]  # of the optimizer, two batches each
    for step, row in rows.items():
        assert row["head/learning_rate"] == pytest.approx(10 * row["default/learning_rate"])
        assert row["skipped"] == (step > 15)  # the broken batch is the 30th
        assert not any(key.startswith("conv1") for key in row)
    assert rows[6]["default/learning_rate"] > 5 * rows[1]["default/learning_rate"]
    assert rows[6]["default/b1"] < rows[1]["default/b1"]  # the other way
    assert len(list(whole.glob("events*"))) == 1
    assert plt.imread(killed / "finetune.png").std() > 0.05


def test_the_fine_tuning_is_as_short_as_it_says(example):
    module = example("finetune")
    lines = [len(inspect.getsource(f).splitlines()) for f in (module.tuner, module.tune)]
    assert f"``tuner`` and ``tune``,\n{sum(lines)} lines" in module.__doc__
    assert sum(lines) <= 60


@pytest.mark.broad
def test_the_frozen_layer_of_the_fine_tuning_stays_and_matrices_alone_decay(example):
    module = example("finetune")
    model = module.CNN(nnx.Rngs(0))
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    optimizer = module.tuner(20)
    state, params = optimizer.init(ones), ones
    for _ in range(2):  # batches of a step
        updates, state = optimizer.update(jax.tree.map(jnp.zeros_like, ones), state, params)
        params = optax.apply_updates(params, updates)
    for layer, kernel_moves in (
        ("conv1", False),
        ("conv2", True),
        ("hidden", True),
        ("head", True),
    ):
        moved = {name: np.any(p[...] != 1) for name, p in params[layer].items()}
        assert moved == {"kernel": kernel_moves, "bias": False}


# --- moving in, pmap, config ----------------------------------------------------------------------


def test_the_moved_run_is_that_of_pytorch(example, tmp_path, capsys):
    worst = example("from_pytorch").main(["--output", str(tmp_path / "moved.png")])
    assert len(worst) == 6
    assert max(worst) < 1e-12
    assert "learning_rate x 10, weight_decay 0.0" in capsys.readouterr().out
    assert plt.imread(tmp_path / "moved.png").std() > 0.02


def test_the_run_that_is_moved_is_the_one_that_was_recorded(example):
    module = example("from_pytorch")
    with np.load(module.FILE) as file:
        for name, array in file.items():
            kind, _, rest = name.partition("|")
            if kind == "gradients":
                expected = recorded()[f"gradients {rest}"][BEFORE:]
            else:
                expected = recorded()[f"adamw two groups|{name}"]
            np.testing.assert_array_equal(array, expected)
    assert module.COMPARED == SEEN


@pytest.mark.broad
def test_pmap_trains_as_one_device_does(example, tmp_path, capsys):
    several, one = example("pmap").main(["--steps", "12", "--output", str(tmp_path / "pmap.png")])
    assert plt.imread(tmp_path / "pmap.png").std() > 0.02
    np.testing.assert_allclose(several, one, rtol=1e-5)
    assert one[-1] < one[0]
    said = capsys.readouterr().out
    assert "The same bits on all devices: yes." in said
    with pytest.raises(SystemExit):
        example("pmap").main(["--devices", "7"])
    assert "a batch of 64 cannot be split over --devices 7" in capsys.readouterr().err


def test_words_of_other_frameworks_make_the_optimizers_that_they_mean(example, tmp_path, capsys):
    module = example("by_config")
    made = module.main(["--steps", "40", "--output", str(tmp_path / "rates.png")])
    assert plt.imread(tmp_path / "rates.png").std() > 0.02
    assert capsys.readouterr().out.count("makes the same optimizer again") == 2
    schedule = optax.warmup_cosine_decay_schedule(0.0, 3e-5, 4, 40, 3e-6)
    meant = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.95, weight_decay=0.1),  # as MaxText makes it
    )
    x, gradient = jnp.array([1.0, -2.0]), jnp.array([3.0, 0.5])
    states = [o.init(x) for o in (made["MaxText"], meant)]
    for _ in range(3):
        updates, states = zip(
            *(
                o.update(gradient, s, x)
                for o, s in zip((made["MaxText"], meant), states, strict=True)
            ),
            strict=True,
        )
    np.testing.assert_allclose(*updates, rtol=1e-5)
    assert "adamod(" in str(describe(made["Levanter"]))
    with pytest.raises(ValueError, match=r"chain\[1\]: there is no 'adamq'; did you mean"):
        make(module.from_maxtext(module.MAXTEXT | {"opt_type": "adamq"}, 40))
    with pytest.raises(ValueError, match="only 'cosine' is shown here, got 'linear'"):
        module.from_levanter(module.LEVANTER | {"lr_schedule": "linear"}, 40)


# --- a language model -----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_language_model_is_trained_in_three_ways(example, tmp_path, capsys):
    module = example("language_model")
    small = ["--width", "32", "--layers", "4", "--steps", "12"]
    found = module.main([*small, "--output", str(tmp_path / "lm.png")])
    said = capsys.readouterr().out
    assert [result.bytes_per_weight for result in found.values()] == pytest.approx(
        [12, 10, 5.2], abs=0.5
    )
    base, plain, master = (result.losses for result in found.values())
    assert len(base) == 12
    assert base[-1] < base[0] - 0.3
    np.testing.assert_allclose(master, base, atol=0.02)  # the first weights are rounded
    assert np.abs(plain - base)[-3:].mean() > np.abs(master - base)[-3:].mean()
    for line in said.splitlines():  # of all stacked layers, only matrices
        if line.startswith("layers/"):
            assert line.split()[-1] == ("yes" if "/kernel" in line else "no")
    assert plt.imread(tmp_path / "lm.png").std() > 0.02
    with pytest.raises(SystemExit):
        module.main(["--width", "6"])
    assert "--width must be a multiple of 4, got 6" in capsys.readouterr().err


@pytest.mark.slow
def test_bfloat16_parameters_fall_behind_and_with_master_weights_they_do_not(example, tmp_path):
    module = example("language_model")
    found = module.main(["--output", str(tmp_path / "lm.png")])
    base, plain, master = (result.held_out for result in found.values())
    assert plain - base > 0.01
    assert abs(master - base) < 0.005
    assert "fall behind" in module.conclusion(found)


# --- what they share ------------------------------------------------------------------------------


def test_tables_have_words_to_the_left_and_numbers_to_the_right(example):
    rows = [{"name": "adam", "loss": "0.5"}, {"name": "b", "loss": "12.25"}]
    assert example("helpers").table(rows) == "name   loss\nadam    0.5\nb     12.25"


def test_lines_are_named_where_they_end_and_no_names_touch(example, tmp_path):
    helpers = example("helpers")
    with helpers.picture(tmp_path / "lines.png", "A title", figsize=(6, 3)) as axes:
        for index, end in enumerate((1.0, 1.0, 1.01, 9.0)):
            axes.plot([0, 1], [0, end], label=f"line {index}", **helpers.look(index))
        axes.plot([0, 1], [np.nan, np.nan], label="diverged", **helpers.look(4))
        helpers.label_ends(axes)
    assert plt.imread(tmp_path / "lines.png").mean() > 0.8  # on white
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert set(heights) == {"line 0", "line 1", "line 2", "line 3"}
    assert max(heights, key=heights.get) == "line 3"
    letters = 8.5 / 72 / 3  # of the height of the figure
    assert np.diff(sorted(heights.values())).min() > letters


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_says_how_it_is_run_and_what_it_prints_or_draws(path):
    doc = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python examples/{path.name}" in doc
    assert re.search(r"\b(Prints|Draws|draws|Draw)\b", doc)


def test_the_page_of_the_examples_has_them_all():
    page = (ROOT / "docs" / "examples.md").read_text()
    commands = dict(re.findall(r"^\| \[`python (\S+)[^`]*`\]\(\.\./(\S+)\)", page, re.M))
    assert all(shown == linked for shown, linked in commands.items())
    assert sorted(commands) == sorted(f"examples/{path.name}" for path in EXAMPLES)


# --- CIFAR-10 -------------------------------------------------------------------------------------


def write(path, images, labels):
    """A file in the format of the binary version."""
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    np.concatenate([labels[:, None].astype(np.uint8), planes], axis=1).tofile(path)


@pytest.fixture
def cifar(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (9, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(9)
    write(tmp_path / "data_batch_1.bin", images[:4], labels[:4])
    write(tmp_path / "data_batch_2.bin", images[4:6], labels[4:6])
    write(tmp_path / "test_batch.bin", images[6:], labels[6:])
    return tmp_path, images, labels


def test_the_binary_version_of_cifar_10_is_read_as_it_was_written(example, cifar):
    folder, images, labels = cifar
    (train_images, train_labels), (test_images, test_labels) = example("cifar10").load(folder)
    np.testing.assert_array_equal(train_images, images[:6])
    np.testing.assert_array_equal(train_labels, labels[:6])
    np.testing.assert_array_equal(test_images, images[6:])
    np.testing.assert_array_equal(test_labels, labels[6:])
    first = (folder / "data_batch_1.bin").read_bytes()
    assert first[0] == 0
    assert first[1 + 1024] == images[0, 0, 0, 1]  # green follows the 1,024 bytes of red


@pytest.mark.broad
def test_cifar_10_trains_for_a_few_steps_and_draws(example, cifar, capsys):
    folder, *_ = cifar
    picture = folder / "rates.png"
    right = example("cifar10").main(
        ["--data", str(folder), "--steps", "2", "--recipe", "adamod", "--output", str(picture)]
    )
    assert f"adamod: {100 * right:.2f} % of 3 test images" in capsys.readouterr().out
    assert picture.stat().st_size > 1000


def test_other_formats_and_broken_files_are_refused_unread(example, tmp_path, cifar, capsys):
    module, (folder, *_) = example("cifar10"), cifar
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match="no data_batch_"):
        module.load(empty)
    (empty / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")  # a hostile pickle
    with pytest.raises(ValueError, match=r"Python version .* which is pickles"):
        module.load(empty)
    with pytest.raises(SystemExit):
        module.main(["--data", str(empty)])
    assert "Download the binary version" in capsys.readouterr().err
    data = (folder / "test_batch.bin").read_bytes()
    (folder / "test_batch.bin").write_bytes(data[:-1])
    with pytest.raises(ValueError, match="no multiple of 3073"):
        module.load(folder)
    (folder / "test_batch.bin").write_bytes(b"\x0b" + data[1:])
    with pytest.raises(ValueError, match="labels go up to 11"):
        module.load(folder)
