"""Where a plain gradient becomes an open step, and an open step a plain update."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from adaptive_opt.describe import describe_as, described
from adaptive_opt.observe import init_observations, observe
from adaptive_opt.policies import Tree
from adaptive_opt.stage import Rule, Stage, checked, init_buffers, rules_of, run
from adaptive_opt.step import AdaptiveStep, closed, opened


class OpenStepState(NamedTuple):
    """The number of gradients seen; int32 scalar."""

    count: jax.Array


class AdaptiveState(NamedTuple):
    """The number of gradients seen, and every buffer once, under its own name."""

    count: jax.Array
    buffers: dict[str, Tree]


@described
def open_step() -> optax.GradientTransformationExtraArgs:
    """Open a flat chain: a plain gradient goes in, an :class:`AdaptiveStep` comes out.

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
        del extra
        count = jnp.asarray(optax.safe_increment(state.count))
        return opened(updates, count, params), OpenStepState(count)

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
        return closed(updates), state

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
    for given in stages:
        if rules_of(given) is None:
            raise TypeError(
                "adaptive(...) takes stages, such as first_moment(b1) or amsgrad_max(), got"
                f" {type(given).__name__}. An optax transformation goes before or after it in"
                " optax.chain(...)."
            )
    listed = checked(rule for given in stages for rule in rules_of(given) or ())
    rules = tuple(rule for rule in listed if isinstance(rule, Rule))
    observers = {rule.buffer.name for rule in listed if not isinstance(rule, Rule)}

    def init(params: Tree) -> AdaptiveState:
        count = jnp.zeros([], jnp.int32)
        buffers = init_buffers(rules, params, state_dtype)
        return AdaptiveState(count, buffers | init_observations(listed))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        del extra
        if isinstance(updates, AdaptiveStep):
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
        step = opened(updates, count, params)
        kept = {name: buffer for name, buffer in state.buffers.items() if name not in observers}
        seen, kept = observe(listed, step, kept, state.buffers, state_dtype)
        step, buffers = run(rules, step, kept, state_dtype)
        return closed(step), AdaptiveState(count, buffers | seen)

    settings = {"state_dtype": state_dtype}
    bracket = optax.GradientTransformationExtraArgs(init, update)
    return describe_as(bracket, "adaptive", settings, parts=stages)
