"""What lines calculate of a leaf, as programs that can be compared.

Whether lines are one program for leaves of any shape is read off their operations, traced at the
shape of each. Where this library has written the lines, a look tells it, which ``init`` has taken
already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import Literal
from jax.typing import DTypeLike

from adaptive_opt.core import trees
from adaptive_opt.core.look import Lines, look
from adaptive_opt.core.memory import Memory
from adaptive_opt.core.now import Now
from adaptive_opt.core.reach import CALLS, CUSTOM, ELEMENTWISE
from adaptive_opt.core.stage import package_of
from adaptive_opt.core.step import AdaptiveStep
from adaptive_opt.core.tree import run_on_one


class Inputs(NamedTuple):
    """What the lines are given of a leaf."""

    gradient: Any
    param: Any
    stored: dict[str, Any]


def are_ours(lines: Lines) -> bool:
    """Whether this library has written all lines: they choose no number and no buffer by a shape.

    A look cannot tell numbers or buffers apart, but ``init`` has taken it already.
    """
    return all(package_of(line.function) == "adaptive_opt" for line in lines)


def stepped(
    lines: Sequence[Any], now: Now, leaf: Inputs, state_dtype: DTypeLike | None
) -> AdaptiveStep:
    """The step of one array after the lines."""
    own = now.copy()
    own.scalars = dict(now.scalars)  # what a loop calculates stays in it
    warned = set(leaf.stored)  # the update says it
    memory = Memory(leaf.stored, state_dtype, warned=warned, like=jnp.shape(leaf.gradient))
    step = AdaptiveStep(own, leaf.gradient, leaf.param, memory)
    run_on_one(lines, step)
    return step


def program_of(
    lines: Lines, now: Now, state_dtype: Any, leaf: Inputs, shape: tuple[int, ...]
) -> Any:
    """What the lines do to such a leaf, were it of this shape; None if not to each weight."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(shape, trees.dtype_of(x)), leaf)
    try:
        traced = jax.make_jaxpr(lambda leaf: stepped(lines, now, leaf, state_dtype).shown())(like)
    except Exception:  # a line that does not bear an array of this shape, of matrices say
        return None
    return _operations(traced, shape)


def program_of_look(lines: Lines, leaf: Inputs, shape: tuple[int, ...]) -> Any:
    """The same in a look."""
    dtype = trees.wide(trees.update_dtype(leaf.gradient, leaf.param))
    key = shape, dtype, jnp.result_type(float)
    if key not in lines.operations:
        try:
            program = look(lines, jax.ShapeDtypeStruct(shape, dtype)).program
        except Exception:
            lines.operations[key] = None
        else:
            lines.operations[key] = program and _operations(program, shape)
    return lines.operations[key]


def _operations(program: Any, shape: tuple[int, ...]) -> Any:
    """The operations, with all that is said of them but shapes; None if one is not elementwise."""
    done: list[Any] = []

    def closed(program: Any, given: Sequence[Any]) -> list[Any] | None:
        jaxpr, consts = getattr(program, "jaxpr", program), getattr(program, "consts", ())
        if any(jnp.shape(const) for const in consts):
            return None
        named = [id(c) if isinstance(c, Tracer) else str(c) for c in consts]
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*named, *given), strict=True))

        def read(var: Any) -> Any:
            if isinstance(var, Literal):
                return str(var.val), cast(Any, var.aval).dtype
            return known[var]

        for equation in jaxpr.eqns:
            results = of(equation, [*map(read, equation.invars)])
            if results is None:
                return None
            known.update(zip(equation.outvars, results, strict=True))
        return [*map(read, jaxpr.outvars)]

    def of(equation: Any, given: list[Any]) -> list[Any] | None:
        name, settings = equation.primitive.name, equation.params
        if name in CALLS | CUSTOM:
            return closed(settings.get("jaxpr") or settings["call_jaxpr"], given)
        shapes = {var.aval.shape for var in (*equation.invars, *equation.outvars)}
        if not shapes <= {(), shape}:
            return None
        if name in ("broadcast_in_dim", "reshape", "pvary", "pcast", "copy", "copy_p"):
            return given[:1]
        if name not in ELEMENTWISE:
            return None
        about = [(k, str(v)) for k, v in settings.items() if k not in ("shape", "sharding")]
        done.append((name, about, given, equation.outvars[0].aval.dtype))
        return [len(done)]

    inputs = [f"input {i}" for i in range(len(program.jaxpr.invars))]
    results = closed(program, inputs)
    return None if results is None else (done, results)
