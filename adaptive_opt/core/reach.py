"""How far the weights see one another in an update, read off its operations.

``zero1`` gives every device a part of each tensor, ``Packing`` cuts weights into other arrays, and
``single_pass`` repeats what is cheap: all three ask what an update calculates, and not what it is
called. The update is traced on shapes, with no array and no mesh, and followed from equation to
equation. A value is either the same number for all elements, or belongs element by element to one
leaf, or was made by something that looked further. The state is followed until nothing changes.

It is traced twice: as the parameters are, and cut as a wrapper will cut them. Both must calculate
the same, so that what asks for a size or a rank in Python is noticed too. Unknown means no.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer
from jax.extend.core import Literal

from adaptive_opt.core import trees
from adaptive_opt.core.checks import SCOPES, Scope
from adaptive_opt.core.describe import describe
from adaptive_opt.core.trees import Tree, dtype_of

P = ParamSpec("P")
T = TypeVar("T")

OF_SHAPE = frozenset(("broadcast_in_dim", "reshape", "squeeze"))
"""The primitives among them that give the same elements another shape."""

ELEMENTWISE = OF_SHAPE | frozenset(
    """
    abs add add_any and atan2 cbrt ceil clamp complex conj convert_element_type copy copy_p cos
    cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow is_finite le log log1p
    logistic lt max min mul ne neg nextafter not or pow real reduce_precision rem round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh sqrt square sub tan
    tanh xor
    """.split()  # noqa: SIM905 (a list of 60 quoted names is no easier to read)
)
"""The primitives of JAX that work on each element by itself, or move none of them."""

CALLS = frozenset(("jit", "pjit", "closed_call", "core_call"))
"""What runs a program inside, and changes nothing about it."""

CUSTOM = frozenset(("custom_jvp_call", "custom_vjp_call"))
"""The same, with a derivative of its own."""

_REDUCTIONS = {"reduce_sum": "add", "reduce_and": "and", "reduce_or": "or"}
"""Reductions whose results for the parts may be reduced to that of the whole, and by what."""
_NEUTRAL = {"add": 0, "and": 1, "or": 0}

_KEEP_ZERO = frozenset(
    """
    abs add add_any and conj convert_element_type floor imag integer_pow max min neg or real round
    select_n sign sqrt square state sub
    """.split()  # noqa: SIM905
)

_EXCEPTION = "adaptive_opt.counts_as_per_weight"


def counts_as_per_weight(function: Callable[P, T]) -> Callable[P, T]:
    """Declare that what a function does counts as done for each weight by itself, though it is not.

    For what goes by positions or blocks and is meant to: rounding noise, scales of 8-bit codes.
    ``zero1`` then takes it; ``Packing``, where blocks would cross parameters, does not.
    """

    @functools.wraps(function)
    def declared(*args: P.args, **kwargs: P.kwargs) -> T:
        with jax.named_scope(_EXCEPTION):
            return function(*args, **kwargs)

    return declared


class Reach(NamedTuple):
    """How far the weights see one another.

    Attributes:
      scope: "weight", "tensor" or "tree".
      operation: what made it wider than a weight, a primitive of JAX or a phrase.
      place: the stage that did it, or a file and a line; "" if neither is known.
      only_seen: whether only the state sees further, and the updates do not.
      is_cut_freely: whether the numbers are the same however the weights are cut into arrays.
      has_exceptions: whether something counts as per weight because it says so.
    """

    scope: Scope
    operation: str = ""
    place: str = ""
    only_seen: bool = False
    is_cut_freely: bool = True
    has_exceptions: bool = False

    def __str__(self) -> str:
        return self.operation + (f" in {self.place}" if self.place else "")


def reach(
    optimizer: optax.GradientTransformation,
    params: Tree,
    cut: Tree,
    owners: Sequence[Sequence[int]] | None = None,
) -> Reach:
    """How far the weights see one another in an optimizer's update and state.

    Args:
      optimizer: any optax transformation; whatever it is made of.
      params: the parameters, or their shapes.
      cut: the shapes that it will be used on: the same weights in other arrays, padded with zeros.
      owners: for every leaf of ``cut``, which leaves of ``params`` are in it; default: one each.
    """
    owners = owners or [(i,) for i in range(len(jax.tree.leaves(cut)))]
    alone = [(i,) for i in range(len(jax.tree.leaves(params)))]
    keys: dict[Any, int] = {}
    wide = dtype_of(1.0) == np.float64

    def traced() -> list[_Program]:
        with jax.enable_x64(wide):
            whole = _Program(optimizer, _shapes(params), keys, alone)
            return [whole, _Program(optimizer, _shapes(cut), keys, owners, whole)]

    try:
        with ThreadPoolExecutor(1) as elsewhere:  # with no mesh or mapped axis of the caller's
            programs = elsewhere.submit(traced).result()
    except Exception as error:
        what = f"its trace on shapes ends in {type(error).__name__}: {error}"
        return Reach("tree", what.splitlines()[0].rstrip("."), is_cut_freely=False)
    before, now = None, ()
    while before != now:  # with every round, fewer arrays of the states are taken for the same
        before, now = now, [program.step() for program in programs]
        now.append(len({v.key for program in programs for v in program.state}))
    return _judged(optimizer, *programs)


def _shapes(tree: Tree) -> Tree:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), dtype_of(x)), tree)


class _Value(NamedTuple):
    """What is known of an array.

    ``key`` is what is calculated, whatever the shape of the leaf. ``leaf`` is whose elements these
    are; without one all are the same number, unless it is ``uneven``. ``seen`` is the only leaf
    that something was read off. ``cause`` is the equations, outermost first, that widened the scope
    or made it uneven. A ``total`` is a reduction of several parts. ``padding`` is the value, if
    known, where a leaf is padded with zeros.
    """

    key: int
    leaf: int | None = None
    scope: Scope = "weight"
    cause: tuple[Any, ...] = ()
    uneven: bool = False
    total: tuple[str, frozenset[Any]] | None = None
    padding: float | None = None
    seen: int | None = None


class _Program:
    """``init`` and ``update`` of an optimizer for one shape of the parameters."""

    def __init__(
        self,
        optimizer: optax.GradientTransformation,
        params: Tree,
        keys: dict[Any, int],
        owners: Sequence[Sequence[int]],
        uncut: _Program | None = None,
    ) -> None:
        optimizer = optax.with_extra_args_support(optimizer)
        self._keys, self.owners = keys, owners
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        of = uncut.sizes if uncut else sizes
        self.sizes = sizes
        self._is_padded = [
            sum(of[i] for i in own) != n for own, n in zip(owners, sizes, strict=True)
        ]
        self.has_exceptions = False
        self.updates: list[_Value] = []
        self.wider: dict[int, tuple[Any, ...]] = {}

        def update(updates: Tree, state: Any, params: Tree, value: Any) -> Any:
            try:
                return optimizer.update(updates, state, params, value=value)
            except TypeError:
                return optimizer.update(updates, state, params)

        init, state = jax.make_jaxpr(optimizer.init, return_shape=True)(params)
        value = jax.ShapeDtypeStruct((), jnp.float32)
        self._update = jax.make_jaxpr(update)(params, state, params, value)

        def inputs(name: str) -> list[_Value]:
            dtypes = enumerate(map(dtype_of, jax.tree.leaves(params)))
            return [_Value(self._key(name, str(dtype)), i, padding=0) for i, dtype in dtypes]

        self._gradients, self._params = inputs("gradient"), inputs("parameter")
        self._value = _Value(self._key("value"))
        self._initial = self.state = self._closed(init, self._params)

    def step(self) -> Any:
        """Follow one update; returns what is known of the state, to see whether it has settled."""
        self.wider = {}
        given = (*self._gradients, *self.state, *self._params, self._value)
        results = self._closed(self._update, given)
        split = len(results) - len(self.state)
        self.updates = results[:split]
        pairs = zip(self._initial, results[split:], strict=True)
        self.state = [a if a == b else self._joined("state", (a, b), ()) for a, b in pairs]
        constant = [a == b for a, b in zip(self._initial, self.state, strict=True)]
        return constant, [(v.scope, v.cause, v.leaf, v.seen, v.padding) for v in self.state]

    def remembered(self) -> set[Any]:
        """What the state holds: of every leaf of the uncut parameters, and of none."""
        return {
            (value.key, leaf)
            for value in self.state
            for leaf in ((None,) if value.leaf is None else self.owners[value.leaf])
        }

    def _key(self, *parts: Any) -> int:
        return self._keys.setdefault(parts, len(self._keys))

    def _closed(self, program: Any, given: Sequence[_Value], path: tuple = ()) -> list[_Value]:
        consts = [self._constant(const) for const in getattr(program, "consts", ())]
        jaxpr = getattr(program, "jaxpr", program)
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *given), strict=True))

        def read(var: Any) -> _Value:
            return self._constant(var.val) if isinstance(var, Literal) else known[var]

        for equation in jaxpr.eqns:
            results = self._results(equation, [*map(read, equation.invars)], (*path, equation))
            known.update(zip(equation.outvars, results, strict=True))
        return [*map(read, jaxpr.outvars)]

    def _constant(self, x: Any) -> _Value:
        dtype = jnp.result_type(x)
        is_key = jnp.issubdtype(dtype, jax.dtypes.extended)
        if isinstance(x, Tracer) or is_key or not getattr(x, "is_fully_addressable", True):
            return _Value(self._key("array", id(x)), uneven=math.prod(np.shape(x)) > 1)
        array = np.asarray(x)
        key = self._key(str(dtype), array.shape, array.tobytes())
        padding = array.item() if array.size == 1 and np.isrealobj(array) else None
        return _Value(key, uneven=array.size > 1, padding=padding)

    def _results(self, equation: Any, given: list[_Value], path: tuple) -> Sequence[_Value]:
        """What is known of the results of an equation; the last of the path."""
        name, settings = equation.primitive.name, equation.params
        if _EXCEPTION in str(equation.source_info.name_stack):
            self.has_exceptions = True
            joined = self._joined(name, [v._replace(uneven=False) for v in given], path)
            return [joined._replace(uneven=False)] * len(equation.outvars)
        if name in CALLS | CUSTOM:
            return self._closed(settings.get("jaxpr") or settings["call_jaxpr"], given, path)
        if name == "cond":
            which, *operands = given
            ends = [self._closed(branch, operands, path) for branch in settings["branches"]]
            return [
                ways[0] if len({*ways}) == 1 else self._joined(name, (which, *ways), path)
                for ways in zip(*ends, strict=True)
            ]
        if name == "optimization_barrier":
            return given
        results = self._of_primitive(name, equation, given, path)
        for value in results:
            if value.scope != "weight" and not value.total:
                self.wider.setdefault(value.key, value.cause)
        return results

    def _of_primitive(
        self, name: str, equation: Any, given: list[_Value], path: tuple
    ) -> Sequence[_Value]:
        first = given[0] if given else None
        before = [var.aval.shape for var in equation.invars]
        after = [var.aval.shape for var in equation.outvars]
        is_scalar = all(math.prod(shape) == 1 for shape in after)
        if first and name in OF_SHAPE:
            spread = first.leaf is None and not first.uneven
            if spread or _without_ones(before[0]) == _without_ones(after[0]):
                return given[:1]
        elif name in ("copy", "copy_p") or (name == "convert_element_type" and given[0].total):
            return given
        elif is_scalar and (total := self._total(name, given)):
            scope: Scope = "tensor" if len({leaf for _, leaf in total[1]}) == 1 else "tree"
            cause = next((v.cause for v in given if v.scope != "weight"), path)
            seen = min(_leaves(given)) if scope == "tensor" else None
            return [_Value(self._key(*total), None, scope, cause, total=total, seen=seen)]
        elif name in ELEMENTWISE or (is_scalar and all(math.prod(shape) == 1 for shape in before)):
            result = self._joined(name, given, path, _frozen(equation.params))
            return [result._replace(uneven=result.uneven and not is_scalar)] * len(after)
        return self._looking_further(name, equation, given, path)

    def _total(self, name: str, given: list[_Value]) -> tuple[str, frozenset[Any]] | None:
        """The reduction of all that is given, if it is one of whole leaves."""
        if name in _REDUCTIONS:
            (value,), by = given, _REDUCTIONS[name]
            if value.total and value.total[0] == by:
                return value.total
            if value.leaf is None:
                return None
            lost = self._is_padded[value.leaf] and value.padding != _NEUTRAL[by]
            key = self._key("padded", value.key) if lost else value.key
            return by, frozenset((key, leaf) for leaf in self.owners[value.leaf])
        parts = [
            v for v in given if v.total or v.leaf is not None or v.padding != _NEUTRAL.get(name)
        ]
        total = self._stacked(parts)
        return total if total and total[0] == name else None

    def _joined(
        self, name: str, given: Sequence[_Value], path: tuple, settings: Any = ()
    ) -> _Value:
        """Element by element."""
        leaves = {v.leaf for v in given} - {None}
        widest = max(given, key=lambda v: (_WIDTH[v.scope], v.uneven), default=_Value(0))
        scope, cause, keys = widest.scope, widest.cause, [v.key for v in given]
        uneven = any(v.uneven for v in given)
        leaf = leaves.pop() if leaves else None
        if leaves:
            scope, cause = "tree", cause if scope == "tree" else path
            keys, leaf, uneven = [self._named(v) for v in given], None, True
        elif uneven and leaf is not None and scope == "weight":
            scope = "tensor"
        read = _leaves(given)
        if len(read) > 1 and scope != "tree":
            scope, cause = "tree", cause or path
        padding = _at_padding(name, settings, [v.padding for v in given])
        return _Value(
            self._key(name, settings, *keys), leaf, scope, cause, uneven and leaf is None,
            padding=padding, seen=min(read, default=None) if scope == "tensor" else None,
        )  # fmt: skip

    def _looking_further(
        self, name: str, equation: Any, given: list[_Value], path: tuple
    ) -> list[_Value]:
        """Not element by element: of one leaf, of several, or of none, as in a schedule."""
        leaves = _leaves(given)
        widest = max(given, key=lambda v: (_WIDTH[v.scope], v.uneven), default=_Value(0))
        own: Scope = (*SCOPES.values(),)[min(len(leaves), 2)]
        scope = own if _WIDTH[own] > _WIDTH[widest.scope] else widest.scope
        known = scope == widest.scope and (scope != "weight" or widest.uneven)
        cause = widest.cause if known else path
        shapes = tuple(var.aval.shape for var in equation.invars)
        key = (name, _frozen(equation.params), shapes, *map(self._named, given))
        total = self._stacked(given) if name in ("concatenate", "stack") else None
        return [
            _Value(
                self._key(i, *key),
                None,
                scope,
                cause,
                var.aval.size > 1,
                total,
                seen=min(leaves) if scope == "tensor" else None,
            )
            for i, var in enumerate(equation.outvars)
        ]

    def _stacked(self, given: list[_Value]) -> tuple[str, frozenset[Any]] | None:
        """The reduction of all parts, if they are reductions of different leaves by one operation.

        It is that of their stack only once this is reduced too.
        """
        totals = [v.total for v in given if v.total]
        operations = {operation for operation, _ in totals}
        whole = frozenset().union(*(parts for _, parts in totals))
        disjoint = len(whole) == sum(len(parts) for _, parts in totals)
        alike = len(totals) == len(given) and len(operations) == 1 and disjoint
        return (operations.pop(), whole) if alike else None

    def _named(self, value: _Value) -> Any:
        """A key that says of which leaves."""
        return value.key, None if value.leaf is None else tuple(self.owners[value.leaf])


def _leaves(values: Sequence[_Value]) -> set[int]:
    """The leaves that values are of, or that something was read off."""
    return {leaf for v in values for leaf in (v.leaf, v.seen) if leaf is not None}


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [n for n in shape if n != 1]


def _frozen(settings: Mapping[str, Any]) -> Any:
    return tuple((name, str(value)) for name, value in settings.items())


def _at_padding(name: str, settings: Any, given: Sequence[float | None]) -> float | None:
    """The value of an operation where leaves are padded with zeros, if it is known."""
    known = [value for value in given if value is not None]
    if name in ("min", "max") and len(known) == len(given):
        return min(known) if name == "min" else max(known)
    if name == "integer_pow" and int(dict(settings)["y"]) <= 0:
        return None
    if name == "mul" and 0 in given:
        return 0
    if name == "or" and 1 in given:
        return 1
    values = given[1:] if name == "select_n" else given
    if name in _KEEP_ZERO and values and all(value == 0 for value in values):
        return 0
    return 1 if name == "is_finite" and given == [0] else None


# --- what is said about it ------------------------------------------------------------------------

_OF_ARRAYS = "an array that comes from elsewhere"
_OF_SHAPES = "a size, rank or path that Python looked at"
_WIDTH: dict[str, int] = {scope: width for width, scope in enumerate(SCOPES)}


def _judged(optimizer: optax.GradientTransformation, whole: _Program, cut: _Program) -> Reach:
    free = _is_cut_freely(whole, cut)
    exceptions = whole.has_exceptions or cut.has_exceptions
    updates = [_of_own_leaf(v, i) for p in (whole, cut) for i, v in enumerate(p.updates)]
    scope, cause = _widest(updates)
    seen, cause_of_state = _widest([*whole.state, *cut.state])
    only_seen = scope == "weight" != seen
    if only_seen:
        scope, cause = seen, cause_of_state
    if not free and not exceptions:
        differ = (cause for key, cause in whole.wider.items() if key not in cut.wider)
        cause = next(differ, cause)
        scope = "tensor" if scope == "weight" else scope
    if scope == "weight":
        return Reach(scope, has_exceptions=exceptions, is_cut_freely=free)
    operation = cause[-1].primitive.name if cause else _OF_ARRAYS if free else _OF_SHAPES
    return Reach(scope, operation, _place(optimizer, cause), only_seen, free, exceptions)


def _is_cut_freely(whole: _Program, cut: _Program) -> bool:
    """Whether both calculate the same for every weight, and remember the same."""
    if len(whole.updates) != len(whole.owners) or len(cut.updates) != len(cut.owners):
        return False
    same = all(
        (whole.updates[i].key, whole.updates[i].leaf) == (v.key, None if v.leaf is None else i)
        for v, own in zip(cut.updates, cut.owners, strict=True)
        for i in own
    )
    return same and whole.remembered() == cut.remembered()


def _of_own_leaf(value: _Value, leaf: int) -> _Value:
    """An update, which must be of its own leaf, or the same for all weights."""
    if _leaves([value]) - {leaf}:
        return value._replace(scope="tree")
    return value._replace(scope="tensor") if value.uneven and value.scope == "weight" else value


def _widest(values: Sequence[_Value]) -> tuple[Scope, tuple[Any, ...]]:
    widest = max(values, key=lambda v: _WIDTH[v.scope], default=_Value(0))
    return widest.scope, widest.cause


def _place(optimizer: optax.GradientTransformation, cause: tuple[Any, ...]) -> str:
    """The stage whose code an equation comes from, else a file and a line of the user's."""
    frames = [
        frame
        for equation in cause
        for frame in getattr(equation.source_info.traceback, "frames", ())
    ]
    makers = [
        f.function_name.split(".<locals>")[0] for f in frames if "<locals>" in f.function_name
    ]
    description = describe(optimizer)
    stages = {part.name for part in description.stages()}
    wrappers = {part.name for part in description.walk()}
    package = os.path.dirname(str(trees.__file__))
    libraries = (
        os.path.dirname(package),
        *(os.path.dirname(str(m.__file__)) for m in (jax, optax, os)),
    )
    own = (f for f in frames if not f.file_name.startswith(libraries))
    lines = [f"{os.path.basename(f.file_name)}:{f.line_num}" for f in own]
    named = [name for name in makers if name in stages]
    return next(iter([*named, *lines, *(name for name in makers if name in wrappers)]), "")
