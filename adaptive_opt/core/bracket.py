"""Where a plain gradient becomes an open step, and an open step a plain update."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.core.describe import closing_over, described, transformation
from adaptive_opt.core.look import Lines, init_buffers, init_shapes, look_at_some_leaf
from adaptive_opt.core.now import Now, WrongOrder
from adaptive_opt.core.observe import Watch, check_seen, init_observations, observe
from adaptive_opt.core.stage import Stage, lines_of
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import Tree
from adaptive_opt.core.update import check_names, update_leaves


class OpenStepState(NamedTuple):
    """The number of gradients seen; int32 scalar."""

    count: jax.Array


class AdaptiveState(NamedTuple):
    """The number of gradients seen, and every buffer once, under its own name."""

    count: jax.Array
    buffers: dict[str, Tree]


@described
def open_step() -> optax.GradientTransformationExtraArgs:
    """Open a flat chain: a plain gradient goes in, an open step comes out.

    Counts the gradients (t = 1, 2, ...; saturates at 2^31 - 1), brings them to float32 at least,
    and notes the dtype that the update will have: promote(gradient, parameter), or the gradient's
    if ``params`` is not given. The direction is the gradient until a stage replaces it.

    State: ``OpenStepState(count)``. TypeError if the step is open already.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import amsgrad_max, close_step, open_step, scale_by_adam
    >>> flat = optax.chain(open_step(), scale_by_adam(), amsgrad_max(), close_step())
    >>> print(flat.update(jnp.array([2.0]), flat.init(jnp.zeros(1)))[0].round(4))
    [1.]
    """

    def init(params: Tree) -> OpenStepState:
        del params
        return OpenStepState(count=jnp.zeros([], jnp.int32))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if isinstance(updates, OpenStep):
            raise TypeError(
                "open_step() was given a step that is open already. One open_step() and one"
                " close_step() belong to a chain; adaptive(...) and the recipes bring their own."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        return OpenStep(Now(count, extra), updates, params), OpenStepState(count)

    return optax.GradientTransformationExtraArgs(init, update)


@described
def close_step() -> optax.GradientTransformationExtraArgs:
    """Close a flat chain: the update is ``direction * rate``, or the direction if there is no rate.

    The update points along the gradient; what follows (``optax.scale_by_learning_rate``) turns it
    around. It leaves in the dtype that ``open_step`` noted. A zero direction gives a zero update,
    whatever eps is.

    No state. TypeError for plain updates; ValueError for a second moment that no rate uses.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import close_step, first_moment, open_step
    >>> flat = optax.chain(open_step(), first_moment(0.5), close_step())
    >>> print(flat.update(jnp.array([2.0]), flat.init(jnp.zeros(1)))[0].round(4))
    [1.]
    """

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del params, extra
        if not isinstance(updates, OpenStep):
            raise TypeError(
                "close_step() needs an open step, but was given plain updates"
                f" ({type(updates).__name__}). Put open_step() before it, and every stage between"
                " the two."
            )
        return updates.close(), state

    return optax.GradientTransformationExtraArgs(optax.identity().init, update)


def adaptive(
    *stages: Stage, state_dtype: DTypeLike | None = None
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(open_step(), *stages, close_step())``, with its state by name.

    The same numbers, bit for bit. The state is ``AdaptiveState(count, buffers)`` with every buffer
    once under its own name (``mu``, ``nu``, ``nu_max``, ``rate_ema``, ``previous_gradient``), so
    that adding or moving a stage that remembers nothing breaks no checkpoint. The order of the
    stages is checked here and not first when it is traced.

    Args:
      *stages: the lines of the algorithm, in order, and observers (``telemetry``) among them.
      state_dtype: the dtype of every buffer that is not given its own; default: the parameter's,
        float32 for 16-bit parameters. Averages of rates stay in float32 at least.

    TypeError for anything that is not a stage, ValueError for stages in an impossible order or with
    two buffers of one name.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adaptive, first_moment, per_weight_rate, second_moment
    >>> rule = adaptive(first_moment(0.9), second_moment(0.99), per_weight_rate(1e-8))
    >>> state = rule.init(jnp.zeros(1))
    >>> print(rule.update(jnp.array([2.0]), state)[0].round(4))
    [1.]
    """
    bracket = Bracket(lines_among(stages, "adaptive(...)"), state_dtype)
    if not _orders_are_known.get():
        bracket.check()
    return transformation(
        "adaptive", {"state_dtype": state_dtype}, closing_over(bracket), parts=stages
    )


_orders_are_known = contextvars.ContextVar("_orders_are_known", default=False)


@contextlib.contextmanager
def orders_are_known(known: bool) -> Iterator[None]:
    """Whether lists of stages are right, so that nothing is traced to check them."""
    token = _orders_are_known.set(known)
    try:
        yield
    finally:
        _orders_are_known.reset(token)


def lines_among(stages: Iterable[Any], who: str) -> Lines:
    """The lines of all the stages, in order."""
    listed: list[Any] = []
    for given in stages:
        lines = lines_of(given)
        if lines is None:
            raise TypeError(
                f"{who} takes stages, such as first_moment(b1) or amsgrad_max(), got"
                f" {type(given).__name__}. An optax transformation goes before or after it in"
                " optax.chain(...)."
            )
        listed += lines
    return Lines(listed)


@jax.tree_util.register_pytree_node_class
class Bracket:
    """The lines between an opened and a closed step, with the buffers of all of them by name."""

    def __init__(
        self,
        listed: Lines,
        state_dtype: DTypeLike | None,
        known: tuple[tuple[str, ...], tuple[str, ...]] | None = None,
    ) -> None:
        self.listed, self.state_dtype = listed, state_dtype
        if known is not None:
            self.known = known

    @functools.cached_property
    def known(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The names of the buffers, and of the stages that limit something; of some leaf."""
        look = look_at_some_leaf(self.lines)  # which refuses a wrong order
        return ((), ()) if look is None else (tuple(sorted(look.names())), look.limits)

    def check(self) -> None:
        """An error for an impossible order, and for two buffers of one name."""
        taken = list(self.known[0])
        for watch in self.watches:
            if watch.name in taken:
                raise WrongOrder(
                    f"two stages keep a buffer called {watch.name!r}. Give one of them another:"
                    f" {watch.stage}(..., name={watch.name + '_2'!r})."
                )
            taken.append(watch.name)

    @functools.cached_property
    def lines(self) -> Lines:
        return self.listed.before()

    @property
    def watches(self) -> tuple[Watch, ...]:
        return tuple(line for line in self.listed if isinstance(line, Watch))

    def tree_flatten(self) -> Any:
        return (self.listed, self.state_dtype), self.known

    @classmethod
    def tree_unflatten(cls, known: Any, children: Any) -> Bracket:
        listed, state_dtype = children
        return cls(listed, state_dtype, known)

    def init(self, params: Tree) -> AdaptiveState:
        buffers = init_buffers(self.lines, params, self.state_dtype)
        if self.watches:
            self.check()
            buffers |= init_observations(self.watches, self.known[1])
        return AdaptiveState(jnp.zeros([], jnp.int32), buffers)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if isinstance(updates, OpenStep):
            raise TypeError(
                "adaptive(...) was given an open step, but opens and closes one by itself. List its"
                " stages in this chain, or move it after close_step()."
            )
        if not isinstance(state, AdaptiveState):
            raise ValueError(
                f"this optimizer needs an AdaptiveState, but was given {type(state).__name__}. A"
                " state belongs to the optimizer that initialised it."
            )
        count = jnp.asarray(optax.safe_increment(state.count))
        now, observers = Now(count, extra), {watch.name for watch in self.watches}
        check_seen(self.watches, state.buffers)
        kept = {name: buffer for name, buffer in state.buffers.items() if name not in observers}
        some = next(iter(self.lines.seen.values()), None)
        if set(some.names() if some else self.known[0]) != set(kept):  # other leaves keep others
            known = updates if params is None else params
            check_names(self.lines, init_shapes(self.lines, known), kept)
        seen = {}
        if self.watches:
            step = OpenStep(now, updates, params)
            seen, kept = observe(self.listed, step, kept, state.buffers, self.state_dtype)
        then = Now(count, extra)
        then.scalars = dict(now.scalars)  # what observers have calculated
        closed, buffers = update_leaves(self.lines, then, updates, kept, params, self.state_dtype)
        return closed, AdaptiveState(count, buffers | seen)
