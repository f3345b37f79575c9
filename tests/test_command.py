"""``python -m adaptive_opt`` says what the registry, the signatures and ``describe`` say."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
from common import REGISTERED

import adaptive_opt
from adaptive_opt import describe, testing
from adaptive_opt.__main__ import main


def said(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_it_lists_every_recipe_with_its_conventions(capsys):
    lines = said(capsys).splitlines()
    for name in REGISTERED:
        (at,) = (i for i, line in enumerate(lines) if line.split()[0] == name)
        conventions = adaptive_opt.RECIPES[name].choices.get("convention")
        if conventions:
            assert lines[at + 1].split("convention: ")[1] == ", ".join(conventions)


@pytest.mark.parametrize("name", REGISTERED)
def test_every_recipe_is_described_with_its_arguments_and_stages(name, capsys):
    text = said(capsys, name, "learning_rate=0.001")
    stages = str(describe(adaptive_opt.RECIPES[name](1e-3))).splitlines()
    assert text.splitlines()[-len(stages) :] == ["  " + line for line in stages]
    for argument, choices in adaptive_opt.RECIPES[name].choices.items():
        (line,) = (x for x in text.splitlines() if x.split()[:1] == [argument])
        assert f"(one of {', '.join(map(str, choices))})" in line


def test_settings_are_those_that_are_asked_for(capsys):
    text = said(capsys, "adamod", "--convention", "paper", "b3=0.5", "weight_decay=0.1")
    optimizer = adaptive_opt.adamod(1e-3, b3=0.5, weight_decay=0.1, convention="paper")
    assert "\n".join("  " + x for x in str(describe(optimizer)).splitlines()) in text
    assert "nesterov=True" in said(capsys, "adamw", "nesterov=true", "mask=null")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["adamot"], "there is no recipe 'adamot'; did you mean adamod?"),
        (["hidden_matrices"], "there is no recipe 'hidden_matrices'"),
        (["adamod", "--convention", "optax"], "convention must be one of 'reference', 'paper'"),
        (["adamw", "wd=1"], "adamw takes no argument 'wd'"),
        (["adamw", "name=adam"], "adamw takes no argument 'name'"),
        (["adamw", "functions=1"], "adamw takes no argument 'functions'"),
        (["adamw", "b1=2"], r"b1 must be in [0, 1), got 2"),
        (["adamw", "b1"], "settings are name=value, such as weight_decay=0.1, got 'b1'"),
        (["adamw", "b1=0.5", "b1=0.6"], "b1 was given twice"),
        (["adam", "convention=keras", "--convention=torch"], "convention was given twice"),
        (["--convention", "paper"], "--convention is of a recipe"),
        (["--check"], "--check is of a recipe: say adamod --check"),
        (["--check", "adamw", "b1=2"], r"b1 must be in [0, 1), got 2"),
    ],
)
def test_mistakes_are_named_and_the_command_fails(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_a_recipe_is_checked_and_the_command_fails_where_a_contract_is_broken(capsys, monkeypatch):
    few = functools.partial(testing.check, only=["quadratic", "pickled"])
    monkeypatch.setattr(adaptive_opt.__main__, "check", few)
    assert said(capsys, "--check", "sgd", "momentum=0.5").endswith("2 of 2 hold, 0 are broken\n")
    assert main(["--check", "sgd", "learning_rate=1e9"]) == 1
    assert "1 of 2 hold, 1 are broken" in capsys.readouterr().out


def test_the_package_is_the_command():
    command = [sys.executable, "-m", "adaptive_opt", "sgd", "momentum=0.5"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "heavy_ball(momentum=0.5" in done.stdout
