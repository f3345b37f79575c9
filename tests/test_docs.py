"""What the documents show works: code blocks, docstring examples, links, pictures, names."""

from __future__ import annotations

import codeop
import doctest
import inspect
import pathlib
import re

import matplotlib.pyplot as plt
import pytest
from common import RECIPES, REGISTERED, one_in
from mutate import MUTANTS

import adaptive_opt

ROOT = pathlib.Path(__file__).parent.parent
PAGES = sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))
TYPES = (
    "RECIPES",
    "AdaptiveStep",
    "OpenStep",
    "WholeTree",
    "RateRule",
    "AdaptiveState",
    "OpenStepState",
    "LookaheadState",
    "ParameterEmaState",
    "BehindState",
    "SkipNonfiniteState",
    "SkipSpikesState",
    "ClipByPreviousNormState",
    "LowMemoryState",
    "MasterWeightsState",
    "OneCycle",
    "Observation",
    "Sweep",
    "RangeTest",
    "MemoryPlan",
    "Description",
    "Group",
)
FUNCTIONS = [name for name in adaptive_opt.__all__ if name not in TYPES]


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)


def test_the_readme_is_short_and_shows_code():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    for page in ("README.md", "CONTRIBUTING.md"):
        assert len(blocks(page, "python")) >= 2


WITH_TORCH = "docs/move_a_pytorch_run.md"  # which tests/test_from_torch.py runs, without PyTorch


@pytest.mark.broad
@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", *sorted({*PAGES} - {WITH_TORCH})]
)
def test_python_blocks_run_in_order(document):
    code = blocks(document, "python")
    namespace: dict = {}
    for block in code:
        exec(compile(block, document, "exec"), namespace)
    for said in re.findall(r"print\(value\)  # 1.0 at first, (\S+) now", "".join(code)):
        assert float(f"{namespace['value']:.0e}") == float(said)


@pytest.mark.parametrize("document", ["README.md", *sorted({*PAGES} - {WITH_TORCH})])
def test_blocks_can_be_pasted_into_a_session(document):
    """Python's own ends a function or a loop at an empty line, and goes on only after one."""
    for block in blocks(document, "python"):
        given: list[str] = []
        for line in [*block.splitlines(), ""]:
            given.append(line)
            if codeop.compile_command("\n".join(given)) is not None:
                given = []
        assert not given


def test_the_listings_in_contributing_are_those_of_the_package():
    stage, recipe = blocks("CONTRIBUTING.md", "python")
    for shown, real in ((stage, adaptive_opt.belief_moment), (recipe, adaptive_opt.adabelief)):
        source = inspect.getsource(inspect.unwrap(real))
        body = source[source.rindex('"""') + 3 :]
        assert "".join(body.split()) in "".join(shown.split())


def test_the_commands_of_the_readme_name_what_exists():
    first, second, third = (block.strip() for block in blocks("README.md", "sh"))
    assert first == "pip install -e '.[examples]' && python examples/quickstart.py"
    assert second.startswith("pip install -e '.[examples]' && python examples/transformer.py --")
    assert third == "pip install -e '.[test]' && pytest"
    for name in ("quickstart", "transformer"):
        assert (ROOT / "examples" / f"{name}.py").exists()


@pytest.mark.parametrize("name", one_in(3, FUNCTIONS))
def test_docstring_examples_run_and_every_public_function_has_one(name):
    function = inspect.unwrap(getattr(adaptive_opt, name))
    tests = doctest.DocTestFinder(recurse=False).find(function, name, globs={})
    assert any(test.examples for test in tests)
    runner = doctest.DocTestRunner()
    for test in tests:
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0


def test_every_public_name_is_documented():
    for name in adaptive_opt.__all__:
        assert inspect.getdoc(getattr(adaptive_opt, name))
    assert len(set(adaptive_opt.__all__)) == len(adaptive_opt.__all__)


def test_recipes_that_equal_something_public_name_it():
    for name in RECIPES:
        text = inspect.getdoc(getattr(adaptive_opt, name.split()[0]))
        assert "equal" in text.lower()


@pytest.mark.parametrize(
    "document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", *PAGES]
)
def test_links_and_pictures_exist(document):
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / document).read_text()):
        assert target.startswith("https://") or ((ROOT / document).parent / target).exists()


@pytest.mark.parametrize(
    "document", ["README.md", "examples/CHOOSING.md", "benchmarks/README.md", *PAGES]
)
def test_every_row_of_a_table_stands_in_a_table(document):
    """A row after an empty line is text, in which the bars show."""
    blocks = re.split(r"\n(?!\|)", (ROOT / document).read_text())
    for head, *rows in (block.split("\n|") for block in blocks if "\n|" in block):
        below = "".join(rows[1:2])
        assert re.fullmatch(r"[ |:-]+", below), f"{head}: {rows[0]}"


def test_the_tables_of_recipes_are_what_the_registry_and_describe_say(example, tmp_path):
    pages = ("README.md", "docs/recipes.md", "docs/weight_decay.md")
    (tmp_path / "docs").mkdir()
    for page in pages:
        (tmp_path / page).write_text((ROOT / page).read_text())
    example("draw_stages").renew_pages(tmp_path)
    for page in pages:
        assert (tmp_path / page).read_text() == (ROOT / page).read_text()


def test_the_table_has_every_recipe_in_every_convention(example):
    rows = re.findall(
        r"^\| `(\w+)`(?: \(([\w, -]+)\))?", example("draw_stages").stages_table(), re.M
    )
    listed = {(name, c) for name, which in rows for c in (which or "").split(", ")}
    assert {name for name, _ in listed} == set(REGISTERED)
    for name in REGISTERED:
        for convention in adaptive_opt.RECIPES[name].choices.get("convention", ()):
            assert (name, convention) in listed
            with pytest.raises(ValueError, match=f"convention must be one of .*{convention}"):
                adaptive_opt.RECIPES[name](1e-3, convention="?")


def test_the_stages_picture_can_be_drawn_again(tmp_path, example):
    example("draw_stages").main(["--output", str(tmp_path / "stages.png")])
    assert plt.imread(tmp_path / "stages.png").std() > 0.05


def test_every_mutant_of_the_mutation_check_can_be_made():
    for file, old, new, what in MUTANTS:
        assert (ROOT / "adaptive_opt" / f"{file}.py").read_text().count(old) == 1, what
        assert new != old
    assert f"in {len(MUTANTS)} ways" in (ROOT / "CONTRIBUTING.md").read_text()
