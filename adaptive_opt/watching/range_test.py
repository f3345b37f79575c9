"""The range test: which learning rates are worth a training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.checks import check_decay, check_positive, check_whole
from adaptive_opt.core.containers import Parts, is_train_state, taken_apart, unboxed
from adaptive_opt.core.describe import check_order
from adaptive_opt.core.trees import Tree
from adaptive_opt.watching import plots
from adaptive_opt.wrappers.train_step import stepped


@dataclasses.dataclass(frozen=True)
class RangeTest:
    """What a range test found; made by :func:`lr_find`. Printed, it is its conclusion.

    Attributes:
      rates: the learning rate of every step taken.
      losses: the loss before each of these steps.
      smoothed: the average of the losses, corrected for its start.
      diverged: whether the test ended because the loss diverged, and not at the highest rate.
      minimum_over_ten: a tenth of the rate at which the smoothed loss is lowest.
      steepest: the rate below that of the minimum at which the smoothed loss falls fastest, over
        the logarithm of the rate.

    The last two leave the first tenth of the steps out, and are NaN if the loss does not fall.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    diverged: bool
    steepest: float
    minimum_over_ten: float

    def draw(self, label: str = "training loss") -> Any:
        """The picture, a figure of matplotlib: see ``plots.range_test``."""
        return plots.range_test(self, label=label)

    def __str__(self) -> str:
        last = f"at {self.rates[-1]:.2g}, step {len(self.rates)}"
        if math.isnan(self.steepest):
            end = "diverged" if self.diverged else "ended"
            return f"the loss did not fall before it {end} {last}: begin lower, or take more steps"
        end = f"diverges {last}" if self.diverged else f"did not diverge up to {self.rates[-1]:.2g}"
        tenth = f"minimum / 10: {self.minimum_over_ten:.2g}"
        return f"steepest: {self.steepest:.2g}, {tenth}; the loss {end}"


def lr_find(
    loss: Callable[..., jax.Array],
    params: Tree,
    batches: Iterable[Any],
    recipe: Callable[[Any], optax.GradientTransformation],
    *,
    low: float = 1e-7,
    high: float = 10.0,
    steps: int = 100,
    smoothing: float = 0.98,
    divergence: float = 4.0,
) -> RangeTest:
    """Train while the learning rate grows, and see at which rates the loss falls and diverges.

    Step t of T has the rate ``low (high / low)^(t / (T - 1))``, t from 0. The losses are averaged
    with the decay ``smoothing``; the test ends when the average is ``divergence`` times its lowest
    value, or the loss is not finite. Use it to choose the rates of a ``sweep``, or when there is
    time for no sweep: it sees a hundred steps, and neither decay nor warm-up nor generalization.

    Nothing of yours is changed: the test trains a copy, with a state of its own. Batches that an
    iterator has handed out are gone. Every step runs the same compiled program.

    Args:
      loss: ``loss(params, batch)``, a scalar; it is given what was given for ``params``, and of a
        ``TrainState`` its ``params``.
      params: a tree of parameters, a module of nnx or Equinox, or linen's ``TrainState``.
      batches: at least ``steps`` of them, of one shape; what can be begun again, such as a list or
        a data loader, is.
      recipe: from a learning rate to an optimizer: ``adamw``, ``lambda lr:
        optax.chain(optax.clip_by_global_norm(1.0), adamw(lr, weight_decay=0.1))``. The rate arrives
        as a traced scalar.
      low: the first learning rate, greater than 0.
      high: the last one, greater than ``low``.
      steps: how many, at least 10.
      smoothing: in [0, 1).
      divergence: greater than 1; how far the average may rise above its lowest value, in units of
        that.

    Returns a :class:`RangeTest`: rates, losses, two suggestions, ``draw()``.

    ValueError for a range that is none, for too few batches, and for an optimizer that does not
    look at its learning rate. The test is that of Smith (2015, arXiv:1506.01186); growth,
    smoothing, end, and both suggestions are those of fastai (``minimum`` and ``steep``). But fastai
    looks for the steepest rate beyond the minimum too, and leaves out the last five steps.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import lr_find, sgd
    >>> found = lr_find(
    ...     lambda w, x: (x - w) ** 2, jnp.array(0.0), [4.0, 6.0], sgd, low=1e-3, smoothing=0.5)
    >>> print(found)
    steepest: 0.0028, minimum / 10: 0.013; the loss diverges at 0.67, step 71
    """
    check_positive(low=low, high=high)
    check_whole(10, steps=steps)
    check_decay(smoothing=smoothing)
    if not low < high:
        raise ValueError(f"high must be greater than low, got low={low:g} and high={high:g}.")
    if not 1 < divergence < math.inf:
        raise ValueError(f"divergence must be finite and greater than 1, got {divergence:g}.")
    if not callable(recipe):
        raise TypeError(
            "recipe must be a function from a learning rate to an optimizer, such as adamw or"
            f" lambda lr: adamw(lr, weight_decay=0.1), got {recipe!r}."
        )
    steps = int(steps)
    run, carry = _training(loss, params, recipe, low)
    rates = low * (high / low) ** (np.arange(steps) / (steps - 1))
    losses, smoothed, average, lowest, diverged = [], [], 0.0, math.inf, False
    for t, (rate, batch) in enumerate(zip(rates, _batches(batches, steps), strict=True), start=1):
        carry, value = run(jnp.asarray(rate, jnp.result_type(float)), carry, batch)
        losses.append(float(value))
        average = smoothing * average + (1 - smoothing) * losses[-1]
        smoothed.append(average / (1 - smoothing**t))
        lowest = min(lowest, smoothed[-1])
        # Written so that it holds for negative losses, and so that NaN diverges.
        if not smoothed[-1] - lowest <= (divergence - 1) * abs(lowest):
            diverged = True
            break
    seen = rates[: len(losses)]
    suggested = _suggestions(seen, np.array(smoothed), steps // 10)
    return RangeTest(seen, np.array(losses), np.array(smoothed), diverged, *suggested)


def _training(
    loss: Callable[..., Any], params: Tree, recipe: Callable[..., Any], low: float
) -> Any:
    """A compiled step from a rate, what it carries, and a batch; and what it carries first."""
    parts = taken_apart(params.params if is_train_state(params) else params)
    if parts.is_nnx:
        parts = Parts(unboxed(parts.trained), unboxed(parts.carried), parts.known)

    optimizer = recipe(jnp.asarray(low))
    if not isinstance(optimizer, optax.GradientTransformation):
        raise TypeError(f"recipe must return an optimizer, got {optimizer!r}.")
    check_order(optimizer)
    # Copies, for they are donated; of a state that begins as the parameters, one more.
    carry = jax.tree.map(jnp.copy, (parts.trained, optimizer.init(parts.trained), parts.carried))

    def step(rate: jax.Array, carry: Any, batch: Any) -> Any:
        trained, state, carried = carry
        own = Parts(trained, carried, parts.known)
        trained, new, carried, value = stepped(loss, recipe(rate), own, state, (batch,), {})
        return (trained, new, unboxed(carried) if parts.is_nnx else carried), value

    run, is_checked = jax.jit(step, donate_argnums=1), False

    def checked(rate: jax.Array, carry: Any, batch: Any) -> Any:
        nonlocal is_checked
        if not is_checked:
            program = run.trace(rate, carry, batch).jaxpr.jaxpr
            used = {id(x) for equation in program.eqns for x in equation.invars}
            if id(program.invars[0]) not in used:
                raise ValueError(
                    "recipe does not use the learning rate that it is given: it must be a function"
                    " such as lambda lr: adamw(lr, weight_decay=0.1)."
                )
            is_checked = True
        return run(rate, carry, batch)

    return checked, carry


def _batches(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """So many batches; from the beginning again where that is possible."""
    seen = 0
    while seen < steps:
        before = seen
        for batch in batches:
            yield batch
            seen += 1
            if seen == steps:
                return
        if seen == before:
            raise ValueError(
                f"there were {seen} batches, and the test takes {steps}: give it more, a list that"
                " can be begun again, or steps=."
            )


def _suggestions(rates: np.ndarray, smoothed: np.ndarray, first: int) -> tuple[float, float]:
    """The steepest rate, and a tenth of that of the minimum."""
    finite = np.isfinite(smoothed)
    rates, smoothed = rates[finite][first:], smoothed[finite][first:]
    if len(rates) < 2 or smoothed.argmin() == 0:
        return math.nan, math.nan
    rates, smoothed = rates[: smoothed.argmin() + 1], smoothed[: smoothed.argmin() + 1]
    slopes = np.diff(smoothed) / np.diff(np.log(rates))
    return float(rates[slopes.argmin()]), float(rates[-1] / 10)
