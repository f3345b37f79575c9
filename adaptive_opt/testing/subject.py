"""The optimizer under test, and the few compiled programs that the contracts share."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from adaptive_opt.core.trees import Tree
from adaptive_opt.testing.contract import DoesNotApply
from adaptive_opt.testing.losses import LOSSES
from adaptive_opt.testing.trees import copies, normal

T = TypeVar("T")
STEPS = 4
"""How many steps are compared; buffers that are empty at first are all in use then."""
LONG = 400
"""The steps of the scan, in which descents have to come down."""


class Taken(NamedTuple):
    """What a step left behind."""

    updates: Tree
    state: Any
    params: Tree


class Subject:
    """An optimizer under test.

    Args:
      optimizer: a transformation, or a function of the learning rate that makes one.
      learning_rate: what that function is given.
      extra: what ``update`` is given by name beside ``value``.
      gradient_scaling: the power p in ``update(c g) = c^p update(g)``, if the caller declares one.
    """

    def __init__(
        self,
        optimizer: Any,
        learning_rate: float,
        extra: Mapping[str, Any],
        gradient_scaling: float | None,
    ) -> None:
        self.factory: Callable[..., Any] | None = None if is_made(optimizer) else optimizer
        self.learning_rate = learning_rate
        self.extra = {"value": 1.0} | dict(extra)
        self.gradient_scaling = gradient_scaling
        self.optimizer = optimizer if self.factory is None else self.factory(learning_rate)
        if not is_made(self.optimizer):
            raise TypeError(
                "check takes an optax optimizer, or a function of the learning rate that returns"
                f" one; got {optimizer!r}, which returned {type(self.optimizer).__name__}."
            )
        self.traces = 0
        self._made: dict[Callable[[Subject], Any], Any] = {}

    def once(self, make: Callable[[Subject], T]) -> T:
        """What a function makes of this subject, made at the first call and shared from then on."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]

    def made_with(self, learning_rate: Any) -> Any:
        """The optimizer at another learning rate."""
        return self.needed_factory()(learning_rate)

    def needed_factory(self) -> Callable[..., Any]:
        if self.factory is None:
            raise DoesNotApply("give check a function of the learning rate, not a made optimizer")
        return self.factory

    def update(
        self, gradients: Tree, state: Any, params: Tree, optimizer: Any = None, **more: Any
    ) -> tuple[Tree, Any]:
        optimizer = optax.with_extra_args_support(optimizer or self.optimizer)
        return optimizer.update(gradients, state, params, **self.extra | more)

    def moved(
        self, gradients: Tree, state: Any, params: Tree, optimizer: Any = None, **more: Any
    ) -> Taken:
        """A whole step, parameters included."""
        updates, state = self.update(gradients, state, params, optimizer, **more)
        return Taken(updates, state, optax.apply_updates(params, updates))

    def run(
        self, params: Tree, gradients: Sequence[Tree], optimizer: Any = None, jit: bool = False
    ) -> list[Taken]:
        """Steps from a new state on.

        Compiled if asked, or where the optimizer has loops: those are compiled anew at every call
        that is not, while all else is done sooner than compiled.
        """
        step = self.stepper(optimizer, jit or self.has_loops)
        state = (optimizer or self.optimizer).init(params)
        taken = []
        for gradient in gradients:
            taken.append(step(gradient, state, params))
            _, state, params = taken[-1]
        return taken

    def stepper(self, optimizer: Any = None, jit: bool | None = None) -> Callable[..., Taken]:
        """A whole step as a function; compiled as in :meth:`run`."""
        step = functools.partial(self.moved, optimizer=optimizer)
        return jax.jit(step) if (self.has_loops if jit is None else jit) else step

    @functools.cached_property
    def has_loops(self) -> bool:
        state = self.optimizer.init(self.params)
        try:
            return has_loops(jax.make_jaxpr(self.update)(self.params, state, self.params).jaxpr)
        except Exception:
            return False  # what it raises is for the contracts to say

    # --- The usual run, in float64 ----------------------------------------------------------------

    @functools.cached_property
    def params(self) -> Tree:
        return normal(0)

    @functools.cached_property
    def gradients(self) -> list[Tree]:
        return [normal(1 + t) for t in range(STEPS)]

    @functools.cached_property
    def usual(self) -> list[Taken]:
        """The usual run."""
        return self.run(self.params, self.gradients)

    @functools.cached_property
    def step(self) -> Callable[[Tree, Any, Tree], tuple[Tree, Any]]:
        """A compiled step that donates the parameters and the state."""

        def step(params: Tree, state: Any, gradients: Tree) -> tuple[Tree, Any]:
            self.traces += 1
            _, state, params = self.moved(gradients, state, params)
            return params, state

        return jax.jit(step, donate_argnums=(0, 1))

    def start(self) -> tuple[Tree, Any]:
        """Parameters and a new state, in buffers that may be donated."""
        return copies((self.params, self.optimizer.init(self.params)))

    @functools.cached_property
    def compiled(self) -> list[tuple[Tree, Any]]:
        """Parameters and state before the usual run, and after each of its compiled steps."""
        history = [self.start()]
        for gradient in self.gradients:
            history.append(self.step(*copies(history[-1]), gradient))
        return history

    @functools.cached_property
    def scan(self) -> Callable[..., tuple[Tree, jax.Array]]:
        """One compiled program for the given gradients, and for the losses that must come down."""
        return self.scan_with(self.optimizer)

    def scan_with(self, optimizer: Any) -> Callable[..., tuple[Tree, jax.Array]]:
        def step(which: Any, carry: Any, gradients: Tree) -> Any:
            params, state = carry
            losses = [jax.value_and_grad(loss)(params) for loss in LOSSES.values()]
            value, slope = jax.tree.map(
                lambda *x: jax.lax.select_n(which, *x), (jnp.ones(()), gradients), *losses
            )
            _, state, params = self.moved(slope, state, params, optimizer, value=value)
            return (params, state), (params, value)

        def run(which: Any, params: Tree, state: Any, gradients: Tree) -> Any:
            return jax.lax.scan(functools.partial(step, which), (params, state), gradients)[1]

        return jax.jit(run)


def is_made(optimizer: Any) -> bool:
    """Whether it is an optimizer, and not a function that makes one."""
    return hasattr(optimizer, "init") and hasattr(optimizer, "update")


def has_loops(jaxpr: Any) -> bool:
    """Whether a program has a loop or a branch anywhere."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("while", "scan", "cond"):
            return True
        inner = (getattr(x, "jaxpr", x) for x in equation.params.values())
        if any(has_loops(x) for x in inner if hasattr(x, "eqns")):
            return True
    return False
