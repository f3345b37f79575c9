"""Every recipe passes the checks that optax's own tests make of its optimizers.

optax is installed with its tests. They are read from there, the optimizers that they test are
replaced by the recipes, and those that have anything to do with an optimizer are run as they are.
``EXCEPTIONS`` is what does not hold here, with the reason; each of them is seen to fail.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import inspect
import os
import pathlib
import re
import sys
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from common import FEWER, RECIPES

import adaptive_opt

# --- What is put under test -----------------------------------------------------------------------

# Rates at which 10 000 steps solve Rosenbrock's function, which the tests of convergence want; the
# tests of optax have such a list too.
OTHER_RATES = {
    "sgd": 1e-3,
    "sgdw": 1e-3,
    "rmsprop": 5e-3,
    "rmsprop of the tree": 5e-3,
    "adagrad": 1.0,
    "adadelta": 1e-1,
    "adamax": 3e-2,
}
# AdaBound ends as SGD, at a rate that must not be too high for it; AdaMod's bound must not remember
# what Mechanic's first guesses made of the parameters.
BOUNDED = ("adabound", "amsbound")
SETTINGS = {name: {"final_learning_rate": 1e-3} for name in BOUNDED} | {"adamod": {"b3": 0.9}}


def annotated(recipe: Callable[..., Any]) -> Callable[..., Any]:
    """The recipe with the annotation by which optax knows that a rate may be a schedule."""
    signature = inspect.signature(recipe)
    rate, *others = signature.parameters.values()
    rate = rate.replace(annotation=optax.ScalarOrSchedule)

    def factory(*args, **kwargs):
        return recipe(*args, **kwargs)

    factory.__signature__ = signature.replace(parameters=[rate, *others])
    return factory


# The tests skip some of optax's optimizers by name, so that those here need names of their own.
FACTORIES = {f"our {name}": annotated(recipe) for name, recipe in RECIPES.items()}
# Where optax's tests compare with optax.adamw in float32, its arithmetic is the one to compare.
AS_IN_OPTAX = {"adamw": functools.partial(adaptive_opt.adamw, convention="optax")}
ALIAS = types.SimpleNamespace(**vars(adaptive_opt) | FACTORIES | AS_IN_OPTAX)


def case(name: str, rate: float) -> dict[str, Any]:
    base = {"base_learning_rate": rate} if name in BOUNDED else {}
    kwargs = {"learning_rate": rate} | base | SETTINGS.get(name, {})
    return {"opt_name": f"our {name}", "opt_kwargs": kwargs}


CASES = tuple(case(name, OTHER_RATES.get(name, 1e-2)) for name in RECIPES)
PLAIN = tuple(c | {"wrapper_name": None, "wrapper_kwargs": None} for c in CASES)
MECHANIZED = tuple(
    case(name, 1.0) | {"wrapper_name": "mechanize", "wrapper_kwargs": {"weight_decay": 0.0}}
    for name in RECIPES
)
SGD = {
    "_build_sgd": lambda: adaptive_opt.sgd(1.0),
    # A momentum of 0 that has a buffer.
    "_build_stateful_sgd": lambda: adaptive_opt.sgd(1.0, momentum=jnp.zeros(())),
}


@dataclasses.dataclass(frozen=True)
class Source:
    """A module of optax's tests, and what takes the place of its optimizers."""

    path: str
    ours: dict[str, Any]
    stand_ins: dict[str, Any] = dataclasses.field(default_factory=dict)


SOURCES = {
    "alias": Source(
        "_src/alias_test.py",
        {
            "alias": ALIAS,
            "_OPTIMIZERS_UNDER_TEST": CASES,
            "_get_opt": lambda _, name: getattr(ALIAS, name),
        },
    ),
    "contrib": Source(
        "contrib/_common_test.py",
        {
            "_MAIN_OPTIMIZERS_UNDER_TEST": PLAIN,
            "_ALL_OPTIMIZERS_UNDER_TEST": PLAIN + MECHANIZED,
            "_get_opt_factory": FACTORIES.__getitem__,
        },
        {"_BASE_OPTIMIZERS": (), "_OTHER_OPTIMIZERS_UNDER_TEST": ()},
    ),
    "sharding": Source(
        "_src/sharding_test.py",
        {"OPTIMIZERS": {name: factory(1.0) for name, factory in FACTORIES.items()}},
        # It compares versions as strings, in which 0.10 comes before 0.7, and would skip.
        {"jax": types.SimpleNamespace(**vars(jax) | {"__version__": "9"})},
    ),
    "float64": Source(
        "_src/float64_test.py",
        {"ALL_MODULES": [(name, f, {"learning_rate": 0.1}) for name, f in FACTORIES.items()]},
    ),
    "accumulation": Source(
        "transforms/_accumulation_test.py",
        {"alias": ALIAS, "OPTIMIZERS_TO_TEST": [tuple(c.values()) for c in CASES]},
    ),
    "masking": Source("transforms/_masking_test.py", SGD),
    "conditionality": Source("transforms/_conditionality_test.py", SGD | {"alias": ALIAS}),
    "combining": Source("transforms/_combining_test.py", {"alias": ALIAS}),
    "freezing": Source("transforms/_freezing_test.py", {"alias": ALIAS}),
    "layouts": Source("transforms/_layouts_test.py", {"alias": ALIAS}),
    "sam": Source("contrib/_sam_test.py", {"alias": ALIAS}),
    "schedule_free": Source("contrib/_schedule_free_test.py", {"alias": ALIAS}),
    "state_utils": Source("tree_utils/_state_utils_test.py", {"alias": ALIAS}),
    "transform": Source("_src/transform_test.py", {"alias": ALIAS}),
} | {
    # Its list stands inside a decorator, so that the module is read once for every recipe.
    f"complex_valued, {c['opt_name']}": Source(
        "contrib/_complex_valued_test.py",
        {
            "transform": types.SimpleNamespace(
                scale_by_adam=functools.partial(FACTORIES[c["opt_name"]], **c["opt_kwargs"]),
                scale_by_param_block_norm=optax.scale_by_param_block_norm,
            )
        },
    )
    for c in CASES
}

# --- What is different here -----------------------------------------------------------------------

ADAM = r"opt_name='adamw?'"
EXCEPTIONS = [
    (
        r"alias: .*test_explicit_dtype.*sgd_mom",
        TypeError,
        "the argument is state_dtype for every recipe; there is no accumulator_dtype",
    ),
    (
        rf"alias: .*test_explicit_dtype.*params_dtype='bfloat16', state_dtype=None, {ADAM}",
        AssertionError,
        "buffers of 16-bit parameters are float32 unless asked otherwise",
    ),
    (
        rf"alias: .*test_explicit_dtype.*state_dtype='complex64', {ADAM}",
        ValueError,
        "one asks for the real dtype of a buffer; it is complex where the parameter is",
    ),
    (
        r"alias: .*test_explicit_dtype.*params_dtype='complex64', "
        rf"state_dtype='(bfloat16|float32)', {ADAM}",
        AssertionError,
        "a momentum of complex parameters is never cast to a real dtype, which loses a half of it",
    ),
    (
        r"alias: .*test_optimization .*'our adadelta'.*_setup_rosenbrock.*complex64",
        AssertionError,
        "too slow for 10 000 steps; with its own adadelta, optax skips it",
    ),
    (
        r"contrib: .*test_optimizers .*'our adadelta'.*"
        r"(mechanize.*_setup_(parabola|rosenbrock)|None.*_setup_rosenbrock)",
        AssertionError,
        "comes near the minimum and goes on moving there: its steps are as long as those before",
    ),
    (
        r"contrib: .*test_optimizers .*'our ranger'.*_setup_(matrix|mixed)",
        AssertionError,
        "its centralized gradients leave the mean of every row of a matrix where it was",
    ),
    (
        r"combining: .*ExtraArgsTest.test_extra_args$",
        TypeError,
        "its parameters are integers, which no recipe takes",
    ),
    (
        r"masking: .*test_masked_state_structure",
        AttributeError,
        "looks for optax's TraceState; the buffer is called velocity here",
    ),
    (
        r"state_utils: .*test_map_params_to_none",
        AssertionError,
        "looks for the state of optax.adagrad",
    ),
    (
        r"test_optimi\w+ .*'our adamh'.*_setup_(matrix|mixed)",
        AssertionError,
        "a matrix stays on the sphere where it began, and one of zeros at zero",
    ),
    (
        r"test_optimi\w+ .*'our adamh'.*(_parabola, dtype=jax|'mechanize'.*_setup_parabola)",
        AssertionError,
        "vectors have a learning rate of their own, which is too small for so few steps",
    ),
    (
        r"test_optimi\w+ .*'our soap'.*_setup_(parabola|rosenbrock)",
        ValueError,
        "tree.map_params asks one placeholder for the state; of vectors there are fewer buffers",
    ),
    (
        r"sharding: .*test_state_sharding_type_.*our (muon|soap)",
        ValueError,
        "no matrix is multiplied that is split over explicit axes",
    ),
    (
        r"contrib: .*inject_hyperparams \(opt_name='our diffmod', .*wrapper_name=None",
        AssertionError,
        "a number that is injected is the float32 that it is: 1 - 0.999^t is 7e-6 another",
    ),
]
# Those that fail in the same way with the optimizers of optax.
FAIL_ANYWAY = [
    r"freezing: .*test_selective_bad_structure",  # a message of jax's that has changed
]
SKIPPED = [
    # Real states of complex parameters, which schedule_free itself does not support.
    r"schedule_free: .*test_explicit_dtype.*params_dtype='complex64', (?!state_dtype='complex64')",
]
# What remains optax's own.
NOT_OURS = [r"alias: LBFGSTest", r"complex_valued, .*param_block_norm"]
OTHERS = rf"our (?!({'|'.join(FEWER)})\b)\w+"
BROAD = [r"our (rmsprop of the tree|ranger)"]
SLOW = [
    r"alias: .*test_optimization ",
    r"contrib: .*test_optimizers ",
    # The same is asked once more of contrib's, once less strictly of alias'.
    r"contrib: .*test_(state_shape_dtype_shard_stability|preserve_dtype|gradient_accumulation)",
    r"alias: .*test_optimizers_(can_be_wrapped_in_inject_hyperparams|accept_extra_args)",
    r"contrib: .*test_optimizers_accept_extra_args.*wrapper_name=None.*wrap=True",
    r"contrib: .*test_optimizers_accept_extra_args.*'mechanize'.*wrap=False",
    r"contrib: .*test_optimizers_accept_learning_rate_schedule.*'mechanize'",
    r"accumulation: .*test_multi_steps_mixed_precision",
    r"sam: ",
    OTHERS,  # of which `adaptive_opt.testing` asks the same
]

# --- How the tests are read -----------------------------------------------------------------------

ROOT = pathlib.Path(importlib.util.find_spec("optax").origin).parent


class NotInThisOptaxError(Exception):
    """The installed version has no such module, or not what is to be replaced in it."""


def load(name: str, source: Source, replace: bool = True) -> tuple[types.ModuleType, set[str]]:
    """The module with ours in place of its optimizers, and the names of the tests that use them."""
    path = ROOT / source.path
    if not path.exists():
        raise NotInThisOptaxError(f"optax {optax.__version__} has no {source.path}")
    tree = ast.parse(path.read_text())
    missing = source.ours.keys() - {name for node in tree.body for name in defined(node)}
    if missing:
        raise NotInThisOptaxError(f"{source.path} of optax {optax.__version__} has no {missing}")
    tests = using(tree, set(source.ours))
    module = types.ModuleType(f"optax_own_tests.{name}{'' if replace else ' as it is'}")
    vars(module).update(source.stand_ins | (source.ours if replace else {}))
    names = set(source.stand_ins) | (set(source.ours) if replace else set())
    tree.body = [kept for node in tree.body if (kept := without(node, names))]
    sys.modules[module.__name__] = module  # dataclasses look their module up
    environment = dict(os.environ)
    try:
        exec(compile(tree, str(path), "exec"), vars(module))
    except ImportError as error:
        raise NotInThisOptaxError(f"{source.path} cannot be imported: {error}") from error
    finally:
        os.environ.clear()
        os.environ.update(environment)
    return module, tests


def defined(node: ast.stmt) -> list[str]:
    """The names that a statement of a module binds; of a loop, those that it goes over."""
    if isinstance(node, ast.Assign):
        return [t.id for t in node.targets if isinstance(t, ast.Name)]
    if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
        return [node.target.id]
    if isinstance(node, ast.FunctionDef):
        return [node.name]
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [alias.asname or alias.name for alias in node.names]
    if isinstance(node, ast.For):
        return [n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)]
    return []


def without(node: ast.stmt, names: set[str]) -> ast.stmt | None:
    return None if names.intersection(defined(node)) else node


def using(tree: ast.Module, names: set[str]) -> set[str]:
    """The test methods that use any of the names, by themselves or through other functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    found: set[str] = set()
    while True:
        more = {f.name for f in functions if mentioned(f) & (names | found)} - found
        if not more:
            return {name for name in found if name.startswith("test")}
        found |= more


def mentioned(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)} | {
        n.attr
        for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }


def collected() -> Iterator[Any]:
    for name, source in SOURCES.items():
        try:
            module, tests = load(name, source)
        except NotInThisOptaxError as reason:
            yield pytest.param(name, "", "", marks=pytest.mark.skip(reason=str(reason)), id=name)
            continue
        for kind in vars(module).values():
            own = inspect.isclass(kind) and kind.__module__ == module.__name__
            if not own or not issubclass(kind, unittest.TestCase):
                continue
            for method in unittest.TestLoader().getTestCaseNames(kind):
                title = readable(name, kind(method).id())
                theirs = any(re.search(pattern, title) for pattern in NOT_OURS)
                if method.startswith(tuple(tests)) and not theirs:
                    marks = list(marks_of(title))
                    yield pytest.param(name, kind, method, marks=marks, id=title)


def readable(name: str, identifier: str) -> str:
    """The name of a test and what it is given, without a running number and addresses."""
    _, _, rest = identifier.partition(f".{name}.")
    rest = re.sub(r"<(?:function|class) '?([\w.]+)'?(?: at \w+)?>", r"\1", rest)
    return f"{name}: " + re.sub(r"^(\w+\.\w+?)\d* \(", r"\1 (", rest)


def marks_of(title: str) -> Iterator[pytest.MarkDecorator]:
    for pattern, error, reason in EXCEPTIONS:
        if re.search(pattern, title):
            yield pytest.mark.xfail(reason=reason, raises=error, strict=True)
    if any(re.search(pattern, title) for pattern in SLOW):
        yield pytest.mark.slow
    elif any(re.search(pattern, title) for pattern in BROAD):
        yield pytest.mark.broad


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _float32():
    yield
    jax.config.update("jax_enable_x64", False)  # a test of optax that fails leaves it on


COLLECTED = list(collected())


@pytest.mark.parametrize(("name", "kind", "method"), COLLECTED)
def test_of_optax(name, kind, method, request):
    title = request.node.callspec.id
    if any(re.search(pattern, title) for pattern in FAIL_ANYWAY):
        theirs = getattr(load(name, SOURCES[name], replace=False)[0], kind.__name__)
        assert outcome(kind(method)) == outcome(theirs(method))
        return
    try:
        kind(method).debug()
    except unittest.SkipTest as reason:
        if not any(re.search(pattern, title) for pattern in SKIPPED):
            raise AssertionError(f"skipped without anybody having meant it: {reason}") from reason
        pytest.skip(str(reason))


def outcome(test: unittest.TestCase) -> type | None:
    try:
        test.debug()
    except Exception as error:
        return type(error)
    return None


def test_every_recipe_is_in_every_list_and_every_exception_is_met():
    titles = [parameter.id for parameter in COLLECTED]
    if any(parameter.values[1] == "" for parameter in COLLECTED):
        pytest.skip("this version of optax lacks some of the tests")
    for title in (
        "alias: AliasTest.test_optimization",
        "contrib: ContribTest.test_optimizers",
        "sharding: ShardingTest.test_state_sharding_type_init_match_update",
        "float64: Float64Test.test_mixed_dtype_input_outputs",
        "accumulation: AccumulationTest.test_multi_steps_mixed_precision",
        "complex_valued",
    ):
        of_this = [t for t in titles if t.startswith(title)]
        for recipe in RECIPES:
            assert any(re.search(rf"our {recipe}(?! of)\b", t) for t in of_this), (title, recipe)
    for pattern in [p for p, *_ in EXCEPTIONS] + FAIL_ANYWAY + SKIPPED + SLOW:
        assert any(re.search(pattern, title) for title in titles), pattern
