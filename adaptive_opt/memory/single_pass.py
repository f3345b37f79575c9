"""One pass over memory on the CPU: gradient, parameters and state are read and written once.

An optimizer step is bound by memory traffic. XLA:CPU writes every output array with a loop of its
own, and each reads its inputs again: 40 bytes per float32 parameter for Adam, where 28 would do.
It has a pass that merges loops, but only loops whose outputs do not depend on one another. So here
every output is calculated from a separate copy of the inputs. The copies exist for the compiler
only: they are told apart by ``jax.lax.optimization_barrier``, which is gone when loops are merged,
and the merged loop holds every value once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr

from adaptive_opt.core.describe import described_around
from adaptive_opt.core.trees import Tree, calculated
from adaptive_opt.memory.elementwise import inlined, is_copy, makers_in, part_of, values

OPTION = "xla_cpu_use_multi_output_fusion"
_FLAG = "--xla_backend_extra_options="
_TOO_LATE = (
    "enable_single_pass() comes too late: JAX has started its backend, which reads its options"
    " once. Call it before the first array is made, right after the imports, or start Python with"
    f' XLA_FLAGS="{_FLAG}{OPTION}".'
)


# --- the option of XLA ----------------------------------------------------------------------------


def enable_single_pass() -> None:
    """Ask XLA for the option that ``single_pass`` needs; before JAX makes its first array.

    Appends ``--xla_backend_extra_options=xla_cpu_use_multi_output_fusion`` to the environment
    variable ``XLA_FLAGS``, which may as well be set before Python starts. It holds for every
    program that this process compiles for the CPU, and for its child processes. Nothing happens if
    it is there already.

    RuntimeError if JAX has started its backend: XLA reads its options once.

    >>> import os, subprocess, sys
    >>> program = "from adaptive_opt import enable_single_pass; enable_single_pass();"
    >>> program += "import os; print(os.environ['XLA_FLAGS'])"
    >>> environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    >>> subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True).stdout
    b'--xla_backend_extra_options=xla_cpu_use_multi_output_fusion\\n'
    """
    if _asked_for():
        return
    setting = "jax_num_cpu_devices"  # which JAX refuses to change once its backend has started
    value = getattr(jax.config, setting)
    try:
        jax.config.update(setting, value + 2)
    except RuntimeError:
        raise RuntimeError(_TOO_LATE) from None
    jax.config.update(setting, value)
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}{OPTION}".strip()


def single_pass_stands_aside() -> str | None:
    """Why ``single_pass`` leaves optimizers as they are in this process; None where it acts.

    Starts JAX's backend and, where the option is set, compiles a small program twice to see whether
    it helps.

    >>> from adaptive_opt import single_pass_stands_aside
    >>> reason = single_pass_stands_aside()
    >>> reason is None or "single_pass" in reason
    True
    """
    device = getattr(jax.config, "jax_default_device")  # noqa: B009 (unknown to type checkers)
    platform = getattr(device, "platform", device) or jax.default_backend()
    if platform != "cpu":
        return f"single_pass is for the CPU; on {platform} XLA merges loops by itself."
    if not _asked_for():
        return (
            "single_pass needs an option of XLA: call adaptive_opt.enable_single_pass() before the"
            f' first array is made, or start Python with XLA_FLAGS="{_FLAG}{OPTION}".'
        )
    if not _helps():
        return (
            f"single_pass does not lessen the memory traffic of Adam here (jax {jax.__version__}):"
            f" XLA_FLAGS was changed after JAX had started, or this XLA knows no {OPTION}."
        )
    return None


def _asked_for() -> bool:
    options = [
        option.split("=")[0]
        for flag in os.environ.get("XLA_FLAGS", "").split()
        if flag.startswith(_FLAG)
        for option in flag.removeprefix(_FLAG).split(",")
    ]
    return OPTION in options


@functools.cache
def _helps() -> bool:
    """Whether a compiled Adam moves fewer bytes as a single pass, by XLA's own count."""
    adam = optax.with_extra_args_support(optax.adam(1e-3))
    with ThreadPoolExecutor(1) as elsewhere:  # with no mesh, device or dtype of the caller's
        try:
            plain, merged = elsewhere.map(_bytes_accessed, (adam, _always_single_pass(adam)))
        except Exception:  # a jax whose programs are another kind of object
            return False
    return merged < plain


def _bytes_accessed(optimizer: optax.GradientTransformation) -> float:
    params = jax.ShapeDtypeStruct((4096,), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)

    def step(params: Tree, state: Any, gradients: Tree) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    cost: Any = compiled.cost_analysis()
    return cost["bytes accessed"]


# --- the wrapper ----------------------------------------------------------------------------------


@described_around
def single_pass(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, compiled for the CPU to one loop over each parameter and its state.

    Same parameters and state up to rounding: bit for bit for Adam and its near kin, within 1 unit
    in the last place for AdaMod and DiffMod, 5 where XLA contracts another sum of products (NAdam,
    centered RMSprop, AdaBelief, Ranger and others). What the compiled update and ``apply_updates``
    move, with parameters and state donated, falls from 40 to 28 bytes per float32 parameter for
    Adam, from 64 to 36 for AdaMod. Wrap the whole optimizer, once, at the outside::

        adaptive_opt.enable_single_pass()  # before the first array
        optimizer = adaptive_opt.single_pass(adaptive_opt.adamod(1e-3))

    It looks at the operations of ``inner.update``, whatever it is made of. Those that act on each
    weight by itself are repeated for every output, those inside a ``jit`` too; all others (norms,
    products of matrices, ``cond``, ``scan``) are done once, as before. A buffer
    that is a plain copy of the gradient is written in the same loop.

    It stands aside, and the program is that of ``inner``: without the option of XLA that
    ``enable_single_pass`` sets, on an accelerator, where XLA's own count says that it does not
    help, and outside ``jit``. ``single_pass_stands_aside`` says why.

    Args:
      inner: any optax transformation; extra arguments of ``update`` are passed on to it.

    State: that of ``inner``; checkpoints may go from one to the other.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, single_pass
    >>> optimizer = single_pass(adam(0.1))
    >>> x = jnp.zeros(2)
    >>> updates, state = optimizer.update(jnp.array([1.0, -2.0]), optimizer.init(x), x)
    >>> print(updates.round(3))
    [-0.1  0.1]
    """
    inner = optax.with_extra_args_support(inner)
    merged = _always_single_pass(inner)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
        traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((updates, state, params)))
        act = traced and single_pass_stands_aside() is None
        return (merged if act else inner).update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _always_single_pass(
    inner: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
        leaves, structure = jax.tree.flatten((state, updates, params, extra))
        where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

        def outputs(*arrays: Any) -> Any:
            given = list(leaves)
            for i, array in zip(where, arrays, strict=True):
                given[i] = array
            state, updates, params, extra = jax.tree.unflatten(structure, given)
            return inner.update(updates, state, params, **extra)

        arrays = [leaves[i] for i in where]
        program, shapes = jax.make_jaxpr(outputs, return_shape=True)(*arrays)
        of_state = sum(i < len(jax.tree.leaves(state)) for i in where)
        results = _from_separate_copies(inlined(program), arrays, of_state)
        return jax.tree.unflatten(jax.tree.structure(shapes), results)

    return optax.GradientTransformationExtraArgs(inner.init, update)


# --- the program, output by output ----------------------------------------------------------------


def _from_separate_copies(
    program: ClosedJaxpr, arrays: Sequence[jax.Array], of_state: int
) -> list[jax.Array]:
    """The outputs of a program, each calculated from copies of the arrays it depends on.

    The first ``of_state`` arrays are the state, whose buffers may be handed on as they are.
    """
    jaxpr = program.jaxpr
    makers = makers_in(jaxpr)
    parts = [part_of(jaxpr, [output], makers) for output in jaxpr.outvars]
    sources = list(dict.fromkeys(source for part in parts for source in part.invars))
    made_once = values(jaxpr.replace(outvars=sources), arrays, program.consts)
    latest = dict(zip(sources, made_once, strict=True))
    used: set[Any] = set()
    fresh = set(jaxpr.invars[of_state:])

    def alone(part: Jaxpr) -> jax.Array:
        copies = all(map(is_copy, part.eqns))
        is_fresh = bool(fresh.intersection(part.invars))
        if is_fresh or not copies:
            again = [source for source in part.invars if source in used]
            others = jax.lax.optimization_barrier([latest[source] for source in again])
            latest.update(zip(again, others, strict=True))
            used.update(source for source in part.invars if _can_be_copied(source.aval))
        (result,) = values(part, [latest[source] for source in part.invars])
        if copies and is_fresh and jnp.issubdtype(result.dtype, jnp.inexact):
            return calculated(result, result)  # a plain copy would be written apart
        return result

    return [alone(part) for part in parts]


def _can_be_copied(aval: Any) -> bool:
    """Not scalars, which cost nothing, nor random keys."""
    return bool(aval.shape) and not jnp.issubdtype(aval.dtype, jax.dtypes.extended)
