"""The examples run, and find what they say that they find."""

from __future__ import annotations

import jax
import numpy as np
import pytest


def test_a_stage_of_ones_own_is_in_the_description_and_changes_the_result(example, capsys):
    module = example("own_stage")
    medians = module.main(["--steps", "20"])
    assert "    cautious\n" in capsys.readouterr().out
    assert medians["adam"] != medians["with caution"]


def test_fine_tuning_runs_in_three_ways(example, capsys):
    accuracies = example("finetune").main(["--steps", "3"])
    assert set(accuracies) == {"head alone", "all at one rate", "gradual unfreezing"}
    table = capsys.readouterr().out.splitlines()[-3:]
    for line, (name, accuracy) in zip(table, accuracies.items(), strict=True):
        assert line.split()[-1] == f"{accuracy:.4f}"
        assert line.startswith(name)


def test_what_is_frozen_in_fine_tuning_stays(example):
    module = example("finetune")
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
    accuracies = example("finetune").main([])
    head = accuracies.pop("head alone")
    assert head > 0.5
    assert min(accuracies.values()) > head + 0.05


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
