"""16-bit parameters that are trained as float32 ones are."""

from __future__ import annotations

import functools
import zlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.checks import check_optimizer, choose
from adaptive_opt.core.describe import described_around
from adaptive_opt.core.reach import counts_as_per_weight
from adaptive_opt.core.tree import leaves_of_params
from adaptive_opt.core.trees import Tree, dtype_of, is_array, is_none, leaves_like, path_at
from adaptive_opt.memory import codecs
from adaptive_opt.memory.residuals import (
    from_codes,
    is_narrow,
    nearest_that_rounds_to,
    rest_of,
    rounded,
    to_codes,
    widened,
)

_DTYPES: dict[str | None, Any] = {
    "int8": jnp.dtype(jnp.int8),
    "bfloat16": jnp.dtype(jnp.bfloat16),
    "float32": jnp.dtype(jnp.float32),
    None: None,
}
"""In what a residual is kept, by its name."""


class MasterWeightsState(NamedTuple):
    """The number of steps, what the parameters leave out, and the inner state.

    ``residual`` is a tree like the parameters, with None for those that are not of 16 bits; None
    altogether where nothing is kept.
    """

    count: jax.Array
    residual: Tree
    inner_state: Any


@described_around
def master_weights(
    inner: optax.GradientTransformation, residual: str | None = "int8"
) -> optax.GradientTransformationExtraArgs:
    """Trains bfloat16 and float16 parameters as if they were float32.

    A 16-bit parameter loses every update smaller than half a unit in its last place: bfloat16 at
    0.02 those below 6e-5. Here ``inner`` sees float32 parameters and gradients. The update that
    leaves is the difference, in float32, between the new value rounded to 16 bits and the
    parameter, so that ``optax.apply_updates`` lands on the rounding. What the parameter leaves out,
    the *residual*, is kept from step to step, taken from where it really lands:

    * "int8": in units of 1/127 of half a unit in the last place, rounded stochastically by a hash
      of position and step. 3 bytes a weight with its parameter. The split is FlashOptim's (Ortiz et
      al. 2026, arXiv:2602.23349), which rounds to nearest, and loses updates below half of that.
    * "bfloat16": as a number, rounded stochastically; Kahan's compensation. 4 bytes.
    * "float32": the float32 weight itself, a master copy. 6 bytes.
    * None: nothing. The parameter itself is rounded stochastically, right in the mean only; 2
      bytes.

    Put it around the whole optimizer, ``low_memory`` too; only what must see the update that the
    parameters get, ``skip_nonfinite`` say, goes around it. With AdamW, "int8" and
    ``low_memory(..., "8-bit")`` parameter and state are 5 bytes a weight, where float32 takes 12.
    ``float32_params(state, params)`` are the float32 weights, to evaluate and to export.

    The parameter counts: where somebody else has changed it, training goes on from there, with
    what the residual says below its last place. Parameters of other dtypes pass through unchanged.
    A weight that lands closer to zero than 2^-16 of where it was may miss the rounding by 2^-24 of
    that.

    Args:
      inner: any optax transformation; extra arguments of ``update`` are passed on to it.
      residual: "int8", "bfloat16", "float32" or None.

    State: ``MasterWeightsState(count, residual, inner_state)``; ``residual`` has the shapes and
      places of the parameters, and starts at zero ("float32": at the parameter).

    TypeError for an ``inner`` that is no transformation, and for a derivative through an update of
    16 bits, which would be zero. ValueError for an unknown residual, for an ``update`` without
    parameters, and for parameters whose dtype or shape is not that of ``init``: apply the updates
    with ``optax.apply_updates``, which keeps the dtype (Equinox's ``apply_updates`` does not).

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import float32_params, master_weights, sgd
    >>> x = jnp.ones(1, jnp.bfloat16)
    >>> for optimizer in (sgd(1e-3), master_weights(sgd(1e-3))):
    ...     y, state = x, optimizer.init(x)
    ...     for _ in range(100):
    ...         updates, state = optimizer.update(jnp.ones_like(y), state, y)
    ...         y = optax.apply_updates(y, updates)
    ...     print(y)
    [1]
    [0.898438]
    >>> print(f"{float32_params(state, y)[0]:.4f}")
    0.9000
    """
    check_optimizer("master_weights", inner)
    kept = choose("residual", residual, _DTYPES)
    inner = optax.with_extra_args_support(inner)

    def start(p: Any) -> Any:
        if not is_narrow(p):
            return None
        return _wide(p) if kept == jnp.float32 else jnp.zeros_like(p, dtype=kept)

    def init(params: Tree) -> MasterWeightsState:
        residual = None if kept is None else jax.tree.map(start, params)
        wide = jax.tree.map(_wide, params)
        return MasterWeightsState(jnp.zeros([], jnp.int32), residual, inner.init(wide))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError(
                "master_weights needs the parameters: call update(gradients, state, params)."
            )
        if not isinstance(state, MasterWeightsState):
            raise ValueError(
                f"master_weights needs a MasterWeightsState, but was given {type(state).__name__}."
                " A state belongs to the optimizer that initialised it."
            )
        leaves, structure = jax.tree.flatten(updates, is_leaf=is_none)
        residuals = _residuals(state.residual, params, kept)
        full = _full(params, residuals)
        made, inner_state = inner.update(
            jax.tree.map(_wide, updates), state.inner_state, full, **extra
        )
        count = jnp.asarray(optax.safe_increment(state.count))
        steps = leaves_like(structure, made)
        columns = (leaves_of_params(tree, structure, leaves) for tree in (params, full))
        for index, (p, w) in enumerate(zip(*columns, strict=True)):
            if is_narrow(p) and is_array(steps[index]):
                salt = zlib.crc32(f"residual{path_at(params, index)}".encode())
                steps[index], residuals[index] = _landing(
                    p, w, steps[index], count, jnp.uint32(salt), kept=kept
                )
        residual = None
        if kept is not None:
            residual = jax.tree.structure(state.residual, is_leaf=is_none).unflatten(residuals)
        return structure.unflatten(steps), MasterWeightsState(count, residual, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def float32_params(state: Any, params: Tree) -> Tree:
    """The parameters that ``master_weights`` trains, in float32, to evaluate, export or go on with.

    Rounded to the dtype of the parameters they are the parameters, but for what rounds to an
    infinity. Where the optimizer keeps an average too, ``evaluation_params(state, float32_params(
    state, params))`` is that, in float32.

    Args:
      state: the optimizer's state, however deep in wrappers, chains, groups.
      params: the parameters that are trained.

    Returns:
      A tree like ``params``; those that are not of 16 bits as they are.

    ValueError where no ``master_weights`` is in the state, or the parameters are not those of it.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import adam, float32_params, master_weights
    >>> optimizer, x = master_weights(adam(1e-4)), jnp.ones(2, jnp.bfloat16)
    >>> updates, state = optimizer.update(x, optimizer.init(x), x)
    >>> x = optax.apply_updates(x, updates)
    >>> print(x, float32_params(state, x).round(4))
    [1 1] [0.9999 0.9999]
    """
    if not any(map(_is_own, jax.tree.leaves(state, is_leaf=_is_own))):
        raise ValueError(
            "float32_params needs the state of an optimizer with master_weights(...) in it, got"
            f" {type(state).__name__}."
        )
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    for part in jax.tree.leaves(state, is_leaf=_is_own):
        if _is_own(part) and part.residual is not None:
            for index, r in enumerate(leaves_of_params(part.residual, structure, leaves)):
                if is_array(r):
                    _check(params, index, leaves[index], r, dtype_of(r))
                    leaves[index] = _decoded(leaves[index], r)
    return structure.unflatten([_wide(p) for p in leaves])


def with_float32_weights(state: Any, params: Tree) -> Any:
    """The state with the float32 weights in place of every residual: what all kinds of it mean."""

    def full(index: int, p: Any, r: Any) -> Any:
        if not is_array(r):
            return r
        _check(params, index, p, r, dtype_of(r))
        return _decoded(p, r)

    return _with_residuals(state, params, full)


def with_residuals_like(example: Any, state: Any, params: Tree) -> Any:
    """The way back: residuals of the kinds that ``example`` has, rounded to nearest."""
    kinds = (part for part in jax.tree.leaves(example, is_leaf=_is_own) if _is_own(part))

    def left(_: int, p: Any, w: Any) -> Any:
        return _left(w, p, jnp.uint32(1 << 31), kept=kept) if is_array(w) else w

    def of_part(part: Any) -> Any:
        if not _is_own(part):
            return part
        nonlocal kept
        dtypes = {x.dtype for x in jax.tree.leaves(next(kinds).residual)}
        kept = dtypes.pop() if dtypes else None
        return _with_residuals(part, params, left)

    kept: Any = None
    return jax.tree.map(of_part, state, is_leaf=_is_own)


def _is_own(x: Any) -> bool:
    return isinstance(x, MasterWeightsState)


def _with_residuals(state: Any, params: Tree, function: Any) -> Any:
    """The state with ``function(index, parameter, residual)`` in place of every residual."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)

    def of_part(part: Any) -> Any:
        if not _is_own(part) or part.residual is None:
            return part
        there = leaves_of_params(part.residual, structure, leaves)
        new = map(function, range(len(leaves)), leaves, there)
        own = jax.tree.structure(part.residual, is_leaf=is_none)
        return part._replace(residual=own.unflatten(new))

    return jax.tree.map(of_part, state, is_leaf=_is_own)


def _residuals(residual: Tree, params: Tree, kept: Any) -> list[Any]:
    """What is kept of every parameter; an error where it does not fit the parameter."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    if kept is None:
        return [None] * len(leaves)
    found = leaves_of_params(residual, structure, leaves)
    for index, (p, r) in enumerate(zip(leaves, found, strict=True)):
        if p is not None:
            _check(params, index, p, r, kept)
    return found


def _check(params: Tree, index: int, p: Any, r: Any, kept: Any) -> None:
    """That a residual is as it must be for its parameter."""
    asked = kept if is_narrow(p) else None
    there = dtype_of(r) if is_array(r) else None
    if asked == there and (there is None or jnp.shape(r) == jnp.shape(p)):
        return
    has = "no residual" if there is None else f"a residual of {there}{list(jnp.shape(r))}"
    raise ValueError(
        f"the parameter at {path_at(params, index)} is {dtype_of(p)}{list(jnp.shape(p))}, and the"
        f" state has {has} for it, where master_weights(residual={kept.name!r}) keeps"
        f" {'none' if asked is None else 'one of its shape'}. Initialise the state with these"
        " parameters, or apply the updates with optax.apply_updates, which keeps the dtype of the"
        " parameters."
    )


def _full(params: Tree, residuals: list[Any]) -> Tree:
    """The float32 weights."""
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    pairs = zip(leaves, residuals, strict=True)
    return structure.unflatten([_decoded(p, r) if is_narrow(p) else p for p, r in pairs])


def _wide(x: Any) -> Any:
    """16 bits as float32, shapes too; anything else as it is."""
    if not is_narrow(x):
        return x
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.update(dtype=jnp.float32)
    return x.astype(jnp.float32)


@counts_as_per_weight
@jax.jit
def _decoded(p: jax.Array, r: jax.Array | None) -> jax.Array:
    """A float32 weight, of its parameter and residual."""
    with jax.numpy_dtype_promotion("standard"):
        p = _without_derivative(p)
        if r is None:
            return widened(p)
        if r.dtype == jnp.int8:
            return from_codes(r, p)
        return nearest_that_rounds_to(p, r if r.dtype == jnp.float32 else widened(p) + widened(r))


@counts_as_per_weight
@functools.partial(jax.jit, static_argnames="kept")
def _landing(
    p: jax.Array, w: jax.Array, u: jax.Array, count: jax.Array, salt: jax.Array, *, kept: Any
) -> tuple[jax.Array, jax.Array | None]:
    """The update that takes a parameter to the rounding of ``w + u``, and what is left of it."""
    with jax.numpy_dtype_promotion("standard"):
        x = _without_derivative((w + u).astype(jnp.float32))
        bits = codecs.noise(x.shape, count, salt)
        here = widened(p)
        goal = widened(rounded(x, p.dtype, bits if kept is None else None))
        step = jnp.where(goal == here, -0.0, goal - here)  # so that -0 stays, too
        landed = (here + step).astype(p.dtype)
        return step, _left(x, landed, bits, kept=kept)


@functools.partial(jax.jit, static_argnames="kept")
def _left(x: jax.Array, landed: jax.Array, bits: jax.Array, *, kept: Any) -> jax.Array | None:
    """What a parameter leaves of a float32 weight; half of all bits set is to the nearest."""
    with jax.numpy_dtype_promotion("standard"):
        if kept is None:
            return None
        if kept == jnp.int8:
            return to_codes(x, landed, bits)
        if kept == jnp.float32:
            return x
        return codecs.to_bfloat16(rest_of(x, landed), bits)


_without_derivative = codecs.without_derivative(
    "master_weights rounds the parameters to 16 bits, and the derivative of a rounding is zero:"
    " it would come out wrong in silence. Differentiate through the optimizer inside, on"
    " float32 parameters."
)
