"""A traced update, output by output: what acts on each weight, and what it starts with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, Var, jaxpr_as_fun

from adaptive_opt.core.reach import CALLS, CUSTOM, ELEMENTWISE

Makers = Mapping[Any, tuple[int, Any]]


def inlined(program: ClosedJaxpr) -> ClosedJaxpr:
    """The same program with the equations of every ``jit`` in place of it."""
    constants: dict[Any, Any] = {}
    equations: list[Any] = []

    def renamed(program: ClosedJaxpr, given: Sequence[Any]) -> list[Any]:
        """Appends the equations, whose variables another call may use too; returns the results."""
        jaxpr = program.jaxpr
        held = [Var(var.aval) for var in jaxpr.constvars]
        constants.update(zip(held, program.consts, strict=True))
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*held, *given), strict=True))

        def read(var: Any) -> Any:
            return var if isinstance(var, Literal) else known[var]

        for equation in jaxpr.eqns:
            operands = [*map(read, equation.invars)]
            if _is_plain_call(equation):
                results = renamed(_inside(equation), operands)
            else:
                results = [Var(var.aval) for var in equation.outvars]
                equations.append(equation.replace(invars=operands, outvars=results))
            known.update(zip(equation.outvars, results, strict=True))
        return [*map(read, jaxpr.outvars)]

    inputs = [Var(var.aval) for var in program.jaxpr.invars]
    outputs = renamed(program, inputs)
    jaxpr = program.jaxpr.replace(
        constvars=[*constants], invars=inputs, eqns=equations, outvars=outputs
    )
    return ClosedJaxpr(jaxpr, [*constants.values()])


def _inside(equation: Any) -> Any:
    return equation.params.get("jaxpr") or equation.params.get("call_jaxpr")


def _is_plain_call(equation: Any) -> bool:
    """Whether it is a ``jit`` that asks for nothing but its own equations."""
    settings = equation.params
    names = ("in_shardings", "out_shardings", "in_layouts", "out_layouts")
    placed = (place for name in names for place in settings.get(name) or ())
    return (
        equation.primitive.name in CALLS
        and isinstance(_inside(equation), ClosedJaxpr)
        and all(place is None or type(place).__name__ == "UnspecifiedValue" for place in placed)
        and not settings.get("compiler_options_kvs")
    )


def programs_in(equation: Any) -> list[ClosedJaxpr]:
    """Those that it calls, or that it is a choice of."""
    programs = equation.params.get("branches") or [_inside(equation)]
    return [program for program in programs if isinstance(program, ClosedJaxpr)]


def is_elementwise(equation: Any) -> bool:
    settings = equation.params
    if settings.get("branches_platforms"):  # of which the compiler sees one
        return all(_all_elementwise(branch) for branch in settings["branches"])
    if equation.primitive.name in CUSTOM or _is_plain_call(equation):
        inside = _inside(equation)
        return isinstance(inside, ClosedJaxpr) and _all_elementwise(inside)
    return equation.primitive.name in ELEMENTWISE


def is_copy(equation: Any) -> bool:
    if equation.params.get("branches_platforms"):
        return any(all(map(is_copy, branch.jaxpr.eqns)) for branch in equation.params["branches"])
    return equation.primitive.name in ("copy", "copy_p")


def _all_elementwise(program: ClosedJaxpr) -> bool:
    return all(map(is_elementwise, program.jaxpr.eqns))


def makes_an_array(equation: Any) -> bool:
    """Of more than a scalar, each element by itself."""
    return is_elementwise(equation) and bool(equation.outvars[0].aval.shape)


def makers_in(jaxpr: Jaxpr, belongs: Callable[[Any], bool] = makes_an_array) -> Makers:
    """Of each variable that such an equation makes, where it stands and the equation."""
    return {
        var: (place, equation)
        for place, equation in enumerate(jaxpr.eqns)
        if belongs(equation)
        for var in equation.outvars
    }


def part_of(jaxpr: Jaxpr, outputs: Sequence[Any], makers: Makers) -> Jaxpr:
    """The equations among ``makers`` that make the outputs, from what they start with."""
    needed: dict[int, Any] = {}
    sources: dict[Any, None] = {}
    to_do = [*outputs]
    while to_do:
        var = to_do.pop()
        if isinstance(var, Literal):
            continue
        if var not in makers:
            sources[var] = None
            continue
        place, equation = makers[var]
        if place not in needed:
            needed[place] = equation
            to_do.extend(equation.invars)
    equations = [needed[place] for place in sorted(needed)]
    return jaxpr.replace(constvars=[], invars=list(sources), outvars=[*outputs], eqns=equations)


def values(jaxpr: Jaxpr, arrays: Sequence[Any], consts: Sequence[Any] = ()) -> list[Any]:
    return jaxpr_as_fun(ClosedJaxpr(jaxpr, consts))(*arrays)
