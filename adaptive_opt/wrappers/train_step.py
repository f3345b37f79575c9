"""A training step whose buffers XLA can reuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import optax

from adaptive_opt.core.apply import update_and_apply
from adaptive_opt.core.containers import (
    Parts,
    is_boxed,
    is_nnx_optimizer,
    is_train_state,
    nnx,
    put_together,
    taken_apart,
    unboxed,
)
from adaptive_opt.core.describe import check_order
from adaptive_opt.core.trees import downhill


def train_step(
    loss_fn: Callable[..., Any],
    optimizer: Any,
    *,
    has_aux: bool = False,
) -> TrainStep:
    """Loss, gradient, update and new parameters in one program that works in place.

    ``step(params, state, *args) -> (params, state, loss)``, jitted, with parameters and state
    donated: XLA writes the new ones where the old ones were. It pairs donated buffers with results
    of the same shape *by order*, so a step that returns ``(state, params)`` writes every array
    somewhere else first: nearly twice the memory traffic, several times the time. Here the order is
    right. The old ``params`` and ``state`` must not be used again; keep a copy
    (``jax.tree.map(jnp.copy, params)``) of what you want to keep. An array that is there twice
    (parameters that are tied, a state that starts as the parameters, as that of ``optax.lbfgs``)
    cannot be donated, and JAX says so: copy the state once in the same way. Gradients of complex
    parameters are conjugated, for ``jax.grad`` gives the conjugate of the direction uphill.

    What stands for ``params`` and ``state``:

    * Flax nnx: ``step(model, optimizer, *args)`` with an ``nnx.Optimizer``, or a state of
      ``nnx.state(model, nnx.Param)``. Both are updated in place and returned. What the loss changes
      in the model is kept: batch statistics, the counts of dropout's random keys.
    * Equinox: a module, and a state of ``eqx.filter(model, eqx.is_inexact_array)``. Its arrays of
      floating point are trained; what is no array is static.
    * linen: ``step(train_state, *args) -> (train_state, loss)``; the loss is given its ``params``.
    * any other tree of parameters, and its state.

    Args:
      loss_fn: ``loss_fn(params, *args)``, a scalar; with ``has_aux`` a pair of a scalar and
        anything. It is given what was given for ``params``, a model too. Batches, random keys and
        other state go into ``args``; what is static, into the function.
      optimizer: any optax optimizer, or an ``nnx.Optimizer``. Those that ask for it get ``value``,
        ``grad`` and ``value_fn`` (``optax.contrib.reduce_on_plateau``, line searches).
      has_aux: whether the loss returns something besides; the step then returns ``(params, state,
        loss, aux)``.

    Returns:
      A function as above, with ``.lower(...)`` to look at the program.

    TypeError for other arguments; ValueError for an ``nnx.Optimizer`` or a ``TrainState`` of
    another transformation, and for guards inside of ``optax.MultiSteps``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, train_step
    >>> optimizer = adam(0.1)
    >>> step = train_step(lambda params, x: jnp.sum((params - x) ** 2), optimizer)
    >>> params = jnp.zeros(2)
    >>> params, state, loss = step(params, optimizer.init(params), jnp.array([1.0, -1.0]))
    >>> print(params.round(3), loss)
    [ 0.1 -0.1] 2.0
    """
    if not callable(loss_fn):
        raise TypeError(
            f"train_step takes a loss function, loss_fn(params, *args), got {loss_fn!r}."
        )
    wrt = optimizer.wrt if is_nnx_optimizer(optimizer) else None
    tx = optimizer.tx if is_nnx_optimizer(optimizer) else optimizer
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "train_step takes an optax optimizer after the loss function, for instance"
            f" train_step(loss_fn, adamw(1e-3)), got {optimizer!r}."
        )
    check_order(tx)
    return TrainStep(loss_fn, tx, wrt, has_aux)


class _Given(NamedTuple):
    """The arguments of one call, and what the results go back to."""

    parts: Parts
    state: Any
    args: Sequence[Any]
    model: Any
    wrt: Any
    holder: Any
    """The ``nnx.Optimizer`` or ``TrainState`` that holds the state; None: it was given itself."""

    def arguments(self) -> tuple[Any, ...]:
        """Of the compiled function."""
        trained, carried, known = self.parts
        return (known, self.wrt), trained, self.state, carried, *self.args


class TrainStep:
    """What ``train_step`` makes: called with parameters, a state and what the loss takes."""

    def __init__(
        self, loss_fn: Callable[..., Any], tx: optax.GradientTransformation, wrt: Any, has_aux: bool
    ) -> None:
        self._tx, self._wrt = tx, wrt
        run = _program(loss_fn, tx, has_aux)
        self._run: Any = jax.jit(run, static_argnums=0, donate_argnums=(1, 2, 3))

    def __call__(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        given = self.taken(params, args, kwargs)
        trained, state, carried, *results = self._run(*given.arguments(), **kwargs)
        if given.parts.is_nnx:
            nnx().update(given.model, trained, carried)
            model = given.model
        else:
            model = put_together(Parts(trained, carried, given.parts.known))
        if given.holder is None:
            return model, state, *results
        if is_train_state(given.holder):
            step = given.holder.step + 1
            return given.holder.replace(params=model, opt_state=state, step=step), *results
        nnx().update(given.holder.opt_state, nnx().state(state))
        given.holder.step[...] += 1
        return model, given.holder, *results

    def lower(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The program of a call with arguments like these, as ``jax.jit`` lowers it."""
        return self._run.lower(*self.taken(params, args, kwargs).arguments(), **kwargs)

    def trace(self, params: Any, *args: Any, **kwargs: Any) -> Any:
        """The same before it is lowered."""
        return self._run.trace(*self.taken(params, args, kwargs).arguments(), **kwargs)

    def _cache_size(self) -> int:
        """How many programs there are, as functions of ``jax.jit`` say it."""
        return self._run._cache_size()

    def taken(self, params: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> _Given:
        """What of the arguments of a call is trained, the state, and what goes to the loss."""
        if is_train_state(params):
            self._check_same(params)
            inner = params.params
            return _Given(taken_apart(inner), params.opt_state, args, inner, None, params)
        if args:
            state, *args = args
        elif "state" in kwargs:
            state = kwargs.pop("state")
        else:
            raise TypeError("the step takes parameters and a state: step(params, state, *args).")
        if is_nnx_optimizer(state):
            self._check_same(state)
            parts, held = taken_apart(params, state.wrt), unboxed(state.opt_state)
            parts = parts._replace(trained=unboxed(parts.trained))
            return _Given(parts, held, args, params, state.wrt, state)
        parts = taken_apart(params, self._wrt)
        if parts.is_nnx and not is_boxed(state):
            parts = parts._replace(trained=unboxed(parts.trained))
        return _Given(parts, state, args, params, self._wrt, None)

    def _check_same(self, holder: Any) -> None:
        if holder.tx is not self._tx:
            raise ValueError(
                f"this {type(holder).__name__} was made with another transformation than the step:"
                " give train_step its .tx."
            )


def loss_of_parts(
    loss_fn: Callable[..., Any], parts: Parts, wrt: Any = None, has_aux: bool = False
) -> Callable[..., Any]:
    """A loss of a model as a loss of what of it is trained.

    Besides the loss it returns what is carried on, for the loss may change a module of nnx, and
    what the loss returns besides.
    """

    def loss_of(trained: Any, *args: Any, **kwargs: Any) -> Any:
        model = put_together(parts._replace(trained=trained))
        value = loss_fn(model, *args, **kwargs)
        loss, *aux = value if has_aux else (value,)
        carried = taken_apart(model, wrt).carried if parts.is_nnx else parts.carried
        return loss, (carried, *aux)

    return loss_of


def stepped(
    loss_fn: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    parts: Parts,
    state: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    wrt: Any = None,
    has_aux: bool = False,
) -> tuple[Any, ...]:
    """One step: what is trained, the state and what is carried, all new; the loss, and more."""
    loss_of = loss_of_parts(loss_fn, parts, wrt, has_aux)
    differentiated = jax.value_and_grad(loss_of, has_aux=True)
    (loss, (carried, *aux)), gradients = differentiated(parts.trained, *args, **kwargs)
    gradients = downhill(gradients)
    trained, state = update_and_apply(
        optimizer, gradients, state, parts.trained, value=loss, grad=gradients,
        value_fn=lambda trained: loss_of(trained, *args, **kwargs)[0],
    )  # fmt: skip
    return trained, state, carried, loss, *aux


def _program(loss_fn: Callable[..., Any], optimizer: Any, has_aux: bool) -> Callable[..., Any]:
    def step(static: Any, trained: Any, state: Any, carried: Any, *args: Any, **kwargs: Any) -> Any:
        known, wrt = static
        parts = Parts(trained, carried, known)
        return stepped(loss_fn, optimizer, parts, state, args, kwargs, wrt, has_aux)

    return step
