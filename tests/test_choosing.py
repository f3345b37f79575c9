"""examples/CHOOSING.md: what it says of memory, and of the gallery, is so."""

from __future__ import annotations

import inspect
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import adaptive_opt
from benchmarks import recipes

ROOT = pathlib.Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
PAGE = (EXAMPLES / "CHOOSING.md").read_text()


def rows_between(begin: str, end: str) -> list[list[str]]:
    lines = PAGE.split(begin)[1].split(end)[0].strip().splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


COSTS = {row[0].strip("` "): row[1:] for row in rows_between(recipes.BEGIN, recipes.END)}


@pytest.mark.parametrize("name", COSTS)
def test_the_bytes_of_state_are_those_of_real_buffers(name):
    optimizer = recipes.RECIPES[name](1e-3)
    params = {"dense": {"kernel": jnp.zeros((128, 128))}}
    buffers = [x for x in jax.tree.leaves(optimizer.init(params)) if jnp.shape(x) == (128, 128)]
    assert sum(x.nbytes for x in buffers) / 128**2 == float(COSTS[name][0])


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", recipes.RECIPES)
def test_the_temporaries_are_as_many_as_the_page_says(name):
    """By XLA's plan, in sizes of the parameters: a step in place of four matrices."""
    (said,) = re.findall(r"needs temporaries too\.(.*?)With\n", PAGE, re.DOTALL)
    twice, more = (re.findall(r"`(\w+)`", part) for part in said.split(" twice;"))
    twice += ["schedule_free_adamw", "schedule_free_radam", "schedule_free_plus"]
    low, high = (2.1, 8) if name in more else (1.9, 2.1) if name in twice else (0, 1.1)
    params = [jax.ShapeDtypeStruct((512, 512), jnp.float32)] * 4
    optimizer = recipes.RECIPES[name](1e-3)

    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params, value=1.0)
        return optax.apply_updates(params, updates), state

    plan = adaptive_opt.memory_plan(
        jax.jit(step, donate_argnums=(0, 1)),
        params,
        jax.eval_shape(optimizer.init, params),
        params,
    )
    assert low <= plan.temporaries / plan.params <= high


def test_the_table_is_of_recipes_that_the_command_measures():
    assert set(COSTS) == set(recipes.RECIPES)
    for _, ratio in COSTS.values():
        low, middle, high = (float(re.findall(r"[\d.]+", ratio)[i]) for i in (1, 0, 2))
        assert 0 < low <= middle <= high


def test_the_command_renews_the_table_of_a_page(tmp_path, capsys, monkeypatch):
    kept = {name: recipes.RECIPES[name] for name in ("sgd", "adam")}
    monkeypatch.setattr(recipes, "RECIPES", kept)
    page = tmp_path / "page.md"
    page.write_text(f"before\n{recipes.BEGIN}\nold\n{recipes.END}\nafter\n")
    recipes.main(["--matrices=1", "--rounds=2", f"--page={page}"])
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"before\n{recipes.BEGIN}\n{printed}\n{recipes.END}\nafter\n"
    assert re.search(r"\| `adam` \| 8 \| \d+\.\d\d \(", printed)


def test_the_evidence_is_what_the_gallery_measured():
    """Every number with a point in the last column is a mean of the JSON file beside it."""
    lines = [line for line in PAGE.splitlines() if re.search(r"gallery/\w+\.json", line)]
    assert len(lines) >= 8
    for line in lines:
        evidence = line.strip("| ").split(" | ")[-1]
        (name,) = re.findall(r"gallery/(\w+)\.json", evidence)
        found = json.loads((EXAMPLES / "gallery" / f"{name}.json").read_text())["rows"]
        means = [factor * r["mean"] for r in found for factor in (1, 100)]
        claimed = re.findall(r"-?\d+\.\d+", evidence)
        assert claimed
        for number in claimed:
            places = len(number.split(".")[1])
            assert any(f"{mean:.{places}f}" == number for mean in means), (number, name)


@pytest.mark.broad
def test_the_safe_defaults_take_a_step():
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    namespace: dict = {}
    exec(compile(code, "CHOOSING.md", "exec"), namespace)
    optimizer, params = namespace["optimizer"], {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    state = optimizer.init(params)
    for _ in range(2):
        updates, state = optimizer.update(params, state, params)
    seen = adaptive_opt.read_telemetry(state)
    assert {"learning_rate", "update_ratio/all", "rate/all/q50", "rate/all/q99"} <= set(seen)
    assert {"gradient_norm/all", "skipped", "skipped_in_a_row"} <= set(seen)
    assert all(jnp.all(u < 0) for u in jax.tree.leaves(updates))


def test_every_name_and_link_exists():
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert (EXAMPLES / target).exists(), target
    headings = re.findall(r"^## (.*)$", (EXAMPLES / "gallery" / "README.md").read_text(), re.M)
    anchors = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
    for anchor in re.findall(r"gallery/README\.md#([\w-]+)", PAGE):
        assert anchor in anchors
    for name in re.findall(r"`([a-z_]+[a-z0-9_]*)(?:\(|`)", PAGE):
        seen = ("loss", "gradient_norm", "skipped", "skipped_in_a_row")
        of_telemetry = ("learning_rate", "update", "update_ratio", "limited", "q99", *seen)
        assert hasattr(adaptive_opt, name) or name in ("weight_decay", *of_telemetry), name
    assert inspect.signature(adaptive_opt.adamod).parameters["b3"].default == 0.999
