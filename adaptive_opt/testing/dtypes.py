"""Contracts about dtypes, and about gradients of every size in every dtype."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adaptive_opt.core.trees import Tree
from adaptive_opt.testing.contract import Broken, case, contract
from adaptive_opt.testing.subject import Subject
from adaptive_opt.testing.trees import avals, is_inexact

REAL = ("float32", "bfloat16", "float16", "float64")
PAIRS = sorted(
    itertools.product(REAL, REAL), key=lambda pair: (pair[0] != pair[1], "float64" in pair)
)
"""Every dtype of a parameter with every dtype of its gradient; the usual ones first."""


def pair_after_a_step(subject: Subject, param: str, gradient: str) -> tuple[Any, Any, Any]:
    """The state before a step, the updates and the state after it, without numbers."""
    params, gradients = jnp.ones(2, param), jnp.ones(2, gradient)
    state = subject.optimizer.init(params)
    return state, *jax.eval_shape(subject.update, gradients, state, params)


@contract
def state_dtypes(subject: Subject) -> None:
    """A state whose dtypes change in a step cannot be scanned over, is compiled twice, and does
    not fit the checkpoint of a state that has not changed."""
    for param, gradient in PAIRS:
        with case(f"a {param} parameter with a {gradient} gradient"):
            before, _, after = pair_after_a_step(subject, param, gradient)
            if jax.tree.structure(before) != jax.tree.structure(after):
                raise Broken("the state has another structure after a step")
            for (path, *old, _), (_, *new, _) in zip(avals(before), avals(after), strict=True):
                if old != new:
                    raise Broken(f"the state at {path} goes from {_of(old)} to {_of(new)}")


def _of(shape_and_dtype: list[Any]) -> str:
    shape, dtype = shape_and_dtype
    return f"{dtype}{list(shape)}"


@contract
def update_dtypes(subject: Subject) -> None:
    """An update that is wider than parameter and gradient costs memory, and one that is narrower
    than both loses digits."""
    for param, gradient in PAIRS:
        with case(f"a {param} parameter with a {gradient} gradient"):
            _, update, _ = pair_after_a_step(subject, param, gradient)
            allowed = {np.dtype(param), np.dtype(gradient), jnp.promote_types(param, gradient)}
            if update.dtype not in allowed:
                raise Broken(f"the update is {update.dtype}")


@contract
def no_weak_types(subject: Subject) -> None:
    """A weakly typed state is compiled for twice, and takes the dtype of whatever it meets."""
    with jax.enable_x64(False):
        for dtype in ("float32", "bfloat16"):
            with case(f"{dtype} parameters"):
                state, update, after = pair_after_a_step(subject, dtype, dtype)
                given = ("the first state", state), ("the update", update), ("the state", after)
                for what, tree in given:
                    for path, *_, weak in avals_of_shapes(tree):
                        if weak:
                            raise Broken(f"{what} is weakly typed at {path or 'its only leaf'}")


def avals_of_shapes(tree: Tree) -> list[Any]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [(jax.tree_util.keystr(p), getattr(x, "weak_type", _is_python(x))) for p, x in leaves]


def _is_python(x: Any) -> bool:
    return isinstance(x, (bool, int, float, complex))


@contract
def complex_parameters(subject: Subject) -> None:
    """What takes complex parameters must look at both parts of the gradient; an error is an
    answer, half of a gradient is none."""
    params, given = jnp.ones(2, jnp.complex64), np.array([[1 + 2j, 3 - 1j], [2 - 1j, 1 + 1j]])
    try:
        whole, half = (
            subject.run(params, [*jnp.asarray(g, jnp.complex64)])[-1].updates
            for g in (given, given.conj())
        )
    except (TypeError, ValueError, NotImplementedError):
        return
    with case("a complex64 parameter"):
        if not jnp.iscomplexobj(whole):
            raise Broken(f"the update is {whole.dtype}")
        if np.array_equal(whole, half):
            raise Broken("the update does not depend on the imaginary part of the gradient")


# --- Gradients of every size ----------------------------------------------------------------------

TIME = 3000
"""Steps enough for a second moment to forget: 0.999^1500 is 0.2."""
LARGE = {"float16": 6e4, "bfloat16": 1e18, "float32": 1e18, "float64": 1e150}
"""Of these the square is finite in the dtype that the arithmetic of 16 bits should be in."""


def courses(dtype: str) -> dict[str, np.ndarray]:
    """Courses of gradients in one dtype: a number for every step."""
    info, t = jnp.finfo(dtype), np.arange(TIME)
    large = LARGE[dtype]
    return {
        "0": 0.0 * t,
        "the smallest subnormal": float(info.smallest_subnormal) + 0 * t,
        "the smallest normal": float(info.tiny) + 0 * t,
        f"{large:g}": large + 0 * t,
        f"{large:g} and {-large:g} in turn": large * (-1.0) ** t,
        f"0, then {large:g}": np.where(t == 0, 0.0, large),
        "1": 1.0 + 0 * t,
        "2^-7": 2.0**-7 + 0 * t,
        "2^-13": 2.0**-13 + 0 * t,
        "1, and 1/16 later": np.where(t < TIME // 2, 1, 1 / 16) * (1 + 0.5 * np.sin(t)),
    }


ZERO, TINY, HUGE = (0,), (1, 2), (3, 4, 5)
ORDINARY, LATER = (6, 7, 8), 9


def names(dtype: str) -> list[str]:
    return list(courses(dtype))


@functools.cache
def extreme_gradients() -> dict[str, jax.Array]:
    """For every dtype, courses by steps by two weights that are alike."""
    return {
        dtype: jnp.repeat(jnp.asarray(np.stack([*courses(dtype).values()]), dtype)[..., None], 2, 2)
        for dtype in REAL
    }


def extremes(subject: Subject) -> dict[str, Any]:
    """For every dtype and course: the first updates, the last ones, and whether all was finite.

    One program. The parameters stay where they are, so that every course lasts as long as asked.
    """
    each = {dtype: jax.vmap(_extreme(subject, dtype)) for dtype in REAL}
    run = jax.jit(lambda given: {dtype: each[dtype](g) for dtype, g in given.items()})
    return jax.device_get(run(extreme_gradients()))


def _extreme(subject: Subject, dtype: DTypeLike) -> Any:
    params = jnp.full(2, 0.5, dtype)

    def run(gradients: jax.Array) -> dict[str, jax.Array]:
        start = subject.optimizer.init(params)
        finite_at_first = [jnp.isfinite(x) for x in jax.tree.leaves(start) if is_inexact(x)]

        def step(state: Any, gradient: jax.Array) -> Any:
            update, after = subject.update(gradient, state, params)
            state = jax.tree.map(_as_before, after, state)
            whole = jnp.bool_(True)
            kept = (x for x in jax.tree.leaves(state) if is_inexact(x))
            for x, before in zip(kept, finite_at_first, strict=True):
                whole &= jnp.all(jnp.isfinite(x) | ~before)
            return state, (update, jnp.all(jnp.isfinite(update)), whole)

        _, (updates, finite, whole) = jax.lax.scan(step, start, gradients)
        late = jnp.mean(jnp.abs(updates[-50:].astype(jnp.float64)))
        first = updates[:STEPS_COMPARED].astype(jnp.float64)
        return {"first": first, "late": late, "finite": finite, "whole": whole}

    return run


def _as_before(new: Any, old: Any) -> Any:
    """In the dtype that it had: dtypes that change are another contract's matter."""
    return new if new.dtype == old.dtype else new.astype(old.dtype)


STEPS_COMPARED = 3


def expect_no_nan(subject: Subject, which: tuple[int, ...]) -> None:
    found = subject.once(extremes)
    for course, (what, key) in itertools.product(which, (("update", "finite"), ("state", "whole"))):
        bad = {d: int(np.argmin(found[d][key][course])) for d in REAL}
        bad = {d: t for d, t in bad.items() if not found[d][key][course].all()}
        if bad:
            dtype, step = min(bad.items(), key=lambda item: item[1])
            also = ", ".join(d for d in bad if d != dtype)
            raise Broken(
                f"a {dtype} gradient of {names(dtype)[course]}: the {what} is not finite in step"
                f" {step + 1}{f' (also in {also})' if also else ''}"
            )


@contract
def zero_gradients(subject: Subject) -> None:
    """Weights that nothing uses have gradients of exactly zero, and a NaN in one of them is a NaN
    in the loss."""
    expect_no_nan(subject, ZERO)


@contract
def tiny_gradients(subject: Subject) -> None:
    """Squares of small gradients are zero in few bits, and what divides by them is infinite."""
    expect_no_nan(subject, TINY)


@contract
def huge_gradients(subject: Subject) -> None:
    """A gradient whose square fits float32 is finite, and must leave the update and the state
    finite: an infinite second moment stops its weight for ever."""
    expect_no_nan(subject, HUGE)


def expect_as_in_float32(subject: Subject, course: int, key: str, when: str) -> None:
    found = subject.once(extremes)
    expected = np.asarray(found["float32"][key][course])
    if not np.isfinite(expected).all():
        raise Broken(f"float32 gradients of {names('float32')[course]}: {expected} for {when}")
    for dtype in ("bfloat16", "float16"):
        actual = np.asarray(found[dtype][key][course])
        wrong = ~(np.abs(actual - expected) <= 0.1 * np.abs(expected))
        if wrong.any():
            raise Broken(
                f"{dtype} gradients of {names(dtype)[course]}: {actual[wrong][0]:.4g} for {when},"
                f" with float32 {expected[wrong][0]:.4g}"
            )


@contract
def updates_in_16_bits(subject: Subject) -> None:
    """The update of a 16-bit parameter is that of a float32 one to a tenth: it is neither lost nor
    multiplied where squares and sums need more bits."""
    for course in ORDINARY:
        expect_as_in_float32(subject, course, "first", f"one of the first {STEPS_COMPARED} updates")


@contract
def memory_in_16_bits(subject: Subject) -> None:
    """Moments in 16 bits stop moving when what is added is less than half a last digit; then the
    rate never follows the gradients again."""
    expect_as_in_float32(subject, LATER, "late", f"the mean update after {TIME} steps")
