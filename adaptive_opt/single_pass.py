"""One pass over memory on the CPU: gradient, parameters and state are read and written once.

An optimizer step is bound by memory traffic. XLA:CPU writes every output array with a loop of its
own, and each reads its inputs again: 40 bytes per float32 parameter for Adam, where 28 would do.
It has a pass that merges loops, but only loops whose outputs do not depend on one another. So here
every output is calculated from a separate copy of the inputs. The copies exist for the compiler
only: they are told apart by ``jax.lax.optimization_barrier``, which is gone when loops are merged,
and the merged loop holds every value once.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from adaptive_opt.describe import described_around
from adaptive_opt.policies import Tree

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
    try:  # a setting that JAX refuses to touch once its backend has started
        jax.config.update("jax_num_cpu_devices", jax.config.jax_num_cpu_devices)
    except RuntimeError:
        raise RuntimeError(_TOO_LATE) from None
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
    device = jax.config.jax_default_device
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
    adam = optax.adam(1e-3)
    with ThreadPoolExecutor(1) as elsewhere:  # with no mesh, device or dtype of the caller's
        plain, merged = elsewhere.map(_bytes_accessed, (adam, _always_single_pass(adam)))
    return plain is not None and merged is not None and merged < plain


def _bytes_accessed(optimizer: optax.GradientTransformation) -> float | None:
    params = jax.ShapeDtypeStruct((4096,), jnp.float32)
    state = jax.eval_shape(optimizer.init, params)

    def step(params: Tree, state: Any, gradients: Tree) -> Any:
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
    cost = compiled.cost_analysis()
    return cost.get("bytes accessed") if isinstance(cost, Mapping) else None


# --- the wrapper ----------------------------------------------------------------------------------


@described_around
def single_pass(
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """The same optimizer, compiled for the CPU to one loop over each parameter and its state.

    Same updates to 1 unit in the last place (the compiler rounds where it likes), same state. What
    the compiled update and ``apply_updates`` move, with parameters and state donated, falls from
    40 to 28 bytes per float32 parameter for Adam, from 64 to 36 for AdaMod. The loss and its
    gradient are not affected. Wrap the whole optimizer, once, at the outside::

        adaptive_opt.enable_single_pass()  # before the first array
        optimizer = adaptive_opt.single_pass(optax.chain(optax.clip_by_global_norm(1.0), adamw(1e-3)))

    It looks at the operations of ``inner.update``, whatever it is made of. Those that act on each
    weight by itself are repeated for every output; all others (norms, means, products of matrices,
    ``cond``) are done once, as before. A buffer that is a plain copy of the gradient is written in
    the same loop.

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
    >>> print(updates.round(4))
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
    inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)

    def update(updates: Tree, state: Any, params: Tree | None = None, **extra: Any) -> Any:
        traced, rest = _arrays_of((updates, state, params, extra))

        def outputs(*leaves: Any) -> Any:
            updates, state, params, extra = rest(leaves)
            return inner.update(updates, state, params, **extra)

        program, shapes = jax.make_jaxpr(outputs, return_shape=True)(*traced)
        inputs = [Value(x) for x in traced]
        made = _run(program, inputs)
        return jax.tree.unflatten(jax.tree.structure(shapes), _from_separate_copies(made, inputs))

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _arrays_of(tree: Any) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    """The arrays in a tree, and a function that puts others in their place."""
    leaves, structure = jax.tree.flatten(tree)
    where = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def with_arrays(arrays: Sequence[Any]) -> Any:
        new = list(leaves)
        for i, array in zip(where, arrays, strict=True):
            new[i] = array
        return jax.tree.unflatten(structure, new)

    return [leaves[i] for i in where], with_arrays


# --- the program as a graph -----------------------------------------------------------------------

_ELEMENTWISE = frozenset(
    "abs add add_any and atan2 broadcast_in_dim cbrt ceil clamp complex conj convert_element_type"
    " copy copy_p cos cosh div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow"
    " is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow real"
    " reduce_precision rem reshape round rsqrt select_n shift_left shift_right_arithmetic"
    " shift_right_logical sign sin sinh sqrt square squeeze sub tan tanh xor".split()
)
"""The primitives of JAX that work on each element by itself: cheaper repeated than stored."""

_COPIES = frozenset(("copy", "copy_p"))


@dataclasses.dataclass(eq=False)
class Value:
    """An array of the program: calculated already, or how to calculate it from others."""

    array: Any = None
    equation: Any = None
    arguments: tuple[Value, ...] = ()

    @property
    def is_given(self) -> bool:
        """Whether it is there already: an input, or made by an operation that is done once."""
        return self.equation is None


def _run(program: ClosedJaxpr, inputs: Iterable[Value]) -> list[Value]:
    """The outputs of a program; elementwise operations on arrays are left for later."""
    return _run_open(program.jaxpr, [Value(c) for c in program.consts], inputs)


def _run_open(program: Jaxpr, consts: Iterable[Value], inputs: Iterable[Value]) -> list[Value]:
    known: dict[Any, Value] = {}
    known.update(zip(program.constvars, consts, strict=True))
    known.update(zip(program.invars, inputs, strict=True))

    def read(atom: Any) -> Value:
        return Value(atom.val) if isinstance(atom, Literal) else known[atom]

    for equation in program.eqns:
        arguments = tuple(read(atom) for atom in equation.invars)
        if _is_plain_jit(equation):
            results = _run(equation.params["jaxpr"], arguments)
        elif _is_elementwise(equation) and equation.outvars[0].aval.shape:
            results = [Value(None, equation, arguments)]
        else:
            arrays = _bind(equation, [_calculated(value, {}) for value in arguments])
            results = [Value(array) for array in arrays]
        known.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in program.outvars]


def _is_plain_jit(equation: Any) -> bool:
    """A jit that says nothing of where its arrays are to be, so that it can be taken apart."""
    if equation.primitive.name not in ("jit", "pjit"):
        return False
    placed = (*equation.params["in_shardings"], *equation.params["out_shardings"])
    return all(type(sharding).__name__ == "UnspecifiedValue" for sharding in placed)


def _is_elementwise(equation: Any) -> bool:
    name = equation.primitive.name
    if name in ("custom_jvp_call", "custom_vjp_call"):  # kept whole, with its derivative
        inside = equation.params.get("call_jaxpr")
        same = {atom.aval.shape for atom in equation.outvars} == {equation.outvars[0].aval.shape}
        return (
            isinstance(inside, ClosedJaxpr)
            and same
            and len(equation.outvars) == 1
            and all(map(_is_elementwise, inside.jaxpr.eqns))
        )
    if name in ("jit", "pjit"):
        return _is_plain_jit(equation) and all(
            map(_is_elementwise, equation.params["jaxpr"].jaxpr.eqns)
        )
    return name in _ELEMENTWISE


def _bind(equation: Any, arguments: Sequence[Any]) -> Sequence[Any]:
    """Apply an operation of a program to other arguments."""
    functions, settings = (), equation.primitive.get_bind_params(equation.params)
    if isinstance(settings, tuple):  # before jax 0.10
        functions, settings = settings
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *arguments, **settings)
    return results if equation.primitive.multiple_results else [results]


def _in_order(value: Value, stop: Mapping[Value, Any]) -> list[Value]:
    """The values that ``value`` is calculated from, and itself, each after its arguments."""
    order: dict[Value, None] = {}
    stack = [(value, False)]
    while stack:
        this, ready = stack.pop()
        if this in order:
            continue
        if ready or this in stop or this.is_given:
            order[this] = None
            continue
        stack.append((this, True))
        stack.extend((argument, False) for argument in this.arguments)
    return list(order)


def _calculated(value: Value, copies: Mapping[Value, Any]) -> Any:
    """The array of a value, where some inputs are replaced by copies."""
    if not copies and value.array is not None:
        return value.array
    arrays = dict(copies)
    for this in _in_order(value, arrays):
        if this in arrays:
            continue
        if this.is_given:
            arrays[this] = this.array
        elif not copies and this.array is not None:
            arrays[this] = this.array
        else:
            arrays[this] = _bind(this.equation, [arrays[a] for a in this.arguments])[0]
        if not copies:
            this.array = arrays[this]
    return arrays[value]


def _from_separate_copies(outputs: Sequence[Value], inputs: Sequence[Value]) -> list[Any]:
    """The arrays of the outputs, each calculated from copies of what it depends on."""
    latest: dict[Value, Any] = {}

    def alone(index: int, output: Value) -> Any:
        origin = _copied(output)
        unchanged = index < len(inputs) and origin is inputs[index]
        made_once = origin.is_given and origin not in given
        if unchanged or made_once or not _has_copies(output):
            return _calculated(output, {})
        sources = [v for v in _in_order(output, {}) if v.is_given and _has_copies(v)]
        copies = {}
        if any(source in latest for source in sources):
            fresh = jax.lax.optimization_barrier([latest.get(v, v.array) for v in sources])
            copies = dict(zip(sources, fresh, strict=True))
        latest.update({v: copies.get(v, v.array) for v in sources})
        array = _calculated(output, copies)
        return _in_the_loop(array) if origin.is_given else array

    given = set(inputs)
    return [alone(index, output) for index, output in enumerate(outputs)]


def _copied(value: Value) -> Value:
    """What a value is a plain copy of, or the value itself."""
    while value.equation is not None and value.equation.primitive.name in _COPIES:
        (value,) = value.arguments
    return value


def _has_copies(value: Value) -> bool:
    """Not of scalars, which cost nothing, nor of random keys."""
    array = value.array if value.is_given else value.equation.outvars[0].aval
    return bool(jnp.shape(array)) and not jnp.issubdtype(array.dtype, jax.dtypes.extended)


def _in_the_loop(x: Any) -> Any:
    """``x``, bit for bit, as something that the compiler has to calculate.

    It writes plain copies apart from the loop that has ``x`` at hand. That a number can be unequal
    to itself, where it is not one, keeps it from seeing a copy.
    """
    return jnp.where(x == x, x, x + x) if jnp.issubdtype(x.dtype, jnp.inexact) else x
