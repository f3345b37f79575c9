"""A whole grid of trainings as one program."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.checks import check_whole
from adaptive_opt.core.containers import Parts, put_together, taken_apart, unboxed
from adaptive_opt.core.describe import check_order
from adaptive_opt.core.trees import Tree
from adaptive_opt.wrappers.train_step import stepped


class Rows(list[dict[str, float]]):
    """Rows of a table: a list of dicts with the same keys, printed in columns."""

    def __str__(self) -> str:
        names = list(self[0]) if self else []
        rows = [[f"{row[name]:.6g}" for name in names] for row in self]
        return "\n".join("".join(f"{cell:>16}" for cell in cells) for cells in [names, *rows])


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What a sweep found; made by :func:`sweep`.

    Attributes:
      names: the hyperparameters that were varied, then "seed".
      members: for every member of the grid the values of these, in the order of the grid (the last
        name varies fastest).
      losses: the loss of every member at every step, (members, steps), before the step.
      diverged_at: for every member the first step (1, 2, ...) at which its loss or its parameters
        were not finite, or 0 if there is none.
      params: the parameters at the end, with an axis for the members in front; of a module, the
        module with such arrays.
      results: what ``evaluate`` said of them, or the mean loss of the last tenth of the steps; NaN
        for members that diverged.
    """

    names: tuple[str, ...]
    members: tuple[tuple[float, ...], ...]
    losses: np.ndarray
    diverged_at: np.ndarray
    params: Tree
    results: np.ndarray

    def table(self) -> list[dict[str, float | bool]]:
        """A row for every member: the values, ``result``, ``diverged`` and ``diverged_at``."""
        return [
            dict(zip(self.names, member, strict=True))
            | {"result": float(result), "diverged": bool(step), "diverged_at": int(step)}
            for member, result, step in zip(
                self.members, self.results, self.diverged_at, strict=True
            )
        ]

    def best(self) -> Rows:
        """A row for every point of the grid, over its seeds, the best first.

        ``result`` is the mean over the seeds that did not diverge, ``spread`` their standard
        deviation (NaN of fewer than two), ``seeds`` how many there were, ``diverged`` how many of
        them did. Points of which fewer seeds diverged come first, then those of a lower result.
        Printed, it is a table; ``found.best()[0]["learning_rate"]`` is the best rate.
        """
        points: dict[tuple[float, ...], list[float]] = {}
        for member, result in zip(self.members, self.results, strict=True):
            points.setdefault(member[:-1], []).append(float(result))
        rows = []
        for point, results in points.items():
            alive = [x for x in results if np.isfinite(x)]
            rows.append(
                dict(zip(self.names, point, strict=False))
                | {
                    "result": float(np.mean(alive)) if alive else math.nan,
                    "spread": float(np.std(alive, ddof=1)) if len(alive) > 1 else math.nan,
                    "seeds": len(results),
                    "diverged": len(results) - len(alive),
                }
            )
        return Rows(sorted(rows, key=lambda row: (row["diverged"], row["result"])))

    def sensitivity(
        self, name: str = "learning_rate", **fixed: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """The values of one hyperparameter, and the results with it, (values, everything else).

        Args:
          name: of the hyperparameter.
          **fixed: only members with these values of others.

        For ``plots.sensitivity_curve``. ValueError for names and values that are not in the grid.
        """
        for key in (name, *fixed):
            if key not in self.names:
                raise ValueError(f"{key!r} was not varied; there is {', '.join(self.names)}.")
        chosen = [
            (member[self.names.index(name)], result)
            for member, result in zip(self.members, self.results, strict=True)
            if all(member[self.names.index(k)] == v for k, v in fixed.items())
        ]
        if not chosen:
            raise ValueError(f"no member of the grid has {fixed}.")
        values = list(dict.fromkeys(value for value, _ in chosen))
        results = [[r for value, r in chosen if value == one] for one in values]
        return np.asarray(values), np.asarray(results)

    def __str__(self) -> str:
        lines = ["".join(f"{name:>16}" for name in (*self.names, "result"))]
        for row in self.table():
            cells = "".join(f"{row[name]:>16g}" for name in self.names)
            bad = f"  diverged at step {row['diverged_at']}"
            lines.append(cells + (bad if row["diverged"] else f"{row['result']:>16.6g}"))
        return "\n".join(lines)


def sweep(
    recipe: Callable[..., optax.GradientTransformation],
    grid: Mapping[str, Sequence[float]],
    *,
    loss: Callable[..., jax.Array],
    init: Callable[[jax.Array], Tree],
    data: Tree,
    steps: int,
    batch_size: int | None = None,
    seeds: Sequence[int] = (0,),
    evaluate: Callable[[Tree], jax.Array] | None = None,
    progress: Callable[[int, int], Any] | None = None,
    chunks: int = 20,
) -> Sweep:
    """Train every member of a grid at once: one jitted program, ``vmap`` over the members.

    A grid of two learning rates and two weight decays with three seeds trains twelve. Each takes
    the steps that it would take alone (equal to rounding). One that diverges is marked, and the
    others go on.

    Args:
      recipe: from hyperparameters, by name, to an optimizer; they arrive as traced scalars. Fix
        others with ``functools.partial``; a schedule is made of them in a function of your own:
        ``lambda learning_rate: adam(optax.cosine_decay_schedule(learning_rate, 1000))``.
      grid: the values of each hyperparameter; the members are their product with the seeds.
      loss: ``loss(params, batch)``, a scalar; it is given what ``init`` returns.
      init: from a ``jax.random.key(seed)`` to parameters: a tree, a module of nnx or Equinox. What
        else a module of nnx holds goes along, batch statistics and the counts of random keys.
      data: arrays with the examples along their first axis; every member holds the same.
      steps: how many, at least 1.
      batch_size: how many examples a step sees, drawn anew at each step (with replacement) with the
        seed's key; None: all of them.
      seeds: of parameters and batches, whole numbers.
      evaluate: from the parameters at the end to a scalar, for ``results``.
      progress: called with the steps done and ``steps``, about ``chunks`` times, between runs of
        the compiled program: ``progress=lambda done, of: print(f"{done}/{of}")``.
      chunks: into how many runs the steps are divided if there is ``progress``; if they do not
        divide evenly, the shorter last one is compiled too.

    Returns a :class:`Sweep`: a table, losses, final parameters, the learning-rate sensitivity.

    ValueError for an empty grid, no seeds, data of different lengths, or steps below 1.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, sweep
    >>> found = sweep(
    ...     adam, {"learning_rate": [0.01, 0.1]},
    ...     loss=lambda w, x: jnp.mean((x - w) ** 2), init=lambda key: jnp.zeros(()),
    ...     data=jnp.ones(8), steps=100)
    >>> [(row["learning_rate"], round(row["result"], 2)) for row in found.table()]
    [(0.01, 0.06), (0.1, 0.0)]
    """
    check_whole(1, steps=steps, chunks=chunks)
    if batch_size is not None:
        check_whole(1, batch_size=batch_size)
    grid = {name: tuple(values) for name, values in grid.items()}
    tried = [value for values in grid.values() for value in values]
    if not all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in tried):
        raise TypeError(
            f"the values of the grid must be numbers, got {grid}: fix settings of other kinds with"
            " functools.partial(recipe, ...)."
        )
    if isinstance(seeds, int) or not all(isinstance(s, numbers.Integral) for s in seeds):
        raise TypeError(f"seeds must be a sequence of whole numbers, such as (0, 1), got {seeds}.")
    if not grid or not all(len(values) for values in grid.values()) or not len(seeds):
        raise ValueError(
            f"the grid must have a hyperparameter, and a value or more for each, and one seed or"
            f" more, got {dict(grid)} and seeds={list(seeds)}."
        )
    lengths = {np.shape(x)[:1] for x in jax.tree.leaves(data)}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(
            f"data must be arrays with the examples along their first axis, as many in each, got"
            f" lengths {sorted(lengths)}."
        )
    ((size,),) = lengths
    names = tuple(grid)
    members = tuple(itertools.product(*grid.values(), seeds))
    values = {name: jnp.asarray([float(m[i]) for m in members]) for i, name in enumerate(names)}
    keys = jax.vmap(jax.random.key)(jnp.asarray([m[-1] for m in members]))
    data = jax.tree.map(jnp.asarray, data)

    known: list[Any] = []  # of the model, that is no array: the same for every member

    def start(values: dict[str, jax.Array], key: jax.Array) -> Any:
        optimizer = recipe(**values)
        check_order(optimizer)
        parts = taken_apart(init(key))
        if parts.is_nnx:
            parts = Parts(unboxed(parts.trained), unboxed(parts.carried), parts.known)
        known[:] = [parts.known]
        state = optimizer.init(parts.trained)
        return parts.trained, parts.carried, state, jnp.zeros([], jnp.int32)

    def step(values: dict[str, jax.Array], key: jax.Array, data: Tree, carry: Any, t: Any) -> Any:
        params, carried, state, diverged_at = carry
        batch = data
        if batch_size is not None:
            chosen = jax.random.randint(jax.random.fold_in(key, t), (batch_size,), 0, size)
            batch = jax.tree.map(lambda x: x[chosen], data)
        parts = Parts(params, carried, *known)
        params, state, carried, value = stepped(loss, recipe(**values), parts, state, (batch,), {})
        finite = jnp.isfinite(value)
        for leaf in jax.tree.leaves(params):
            finite &= jnp.isfinite(leaf).all()
        diverged_at = jnp.where((diverged_at == 0) & ~finite, t, diverged_at)
        return (params, unboxed(carried), state, diverged_at), value

    @functools.partial(jax.jit, donate_argnums=0)
    def run(carry: Any, data: Tree, ts: jax.Array) -> Any:
        def member(values: dict[str, jax.Array], key: jax.Array, carry: Any) -> Any:
            return jax.lax.scan(functools.partial(step, values, key, data), carry, ts)

        return jax.vmap(member)(values, keys, carry)

    carry, losses, done = jax.jit(jax.vmap(start))(values, keys), [], 0
    length = -(-steps // chunks) if progress is not None else steps
    while done < steps:
        ts = jnp.arange(done + 1, min(done + length, steps) + 1, dtype=jnp.int32)
        carry, some = run(carry, data, ts)
        losses.append(np.asarray(some))
        done += len(ts)
        if progress is not None:
            progress(done, steps)
    params, carried, _, diverged_at = carry
    losses = np.concatenate(losses, axis=1)
    if evaluate is None:
        results = losses[:, -max(1, steps // 10) :].mean(axis=1)
    else:

        def of_member(params: Tree, carried: Tree) -> jax.Array:
            return evaluate(put_together(Parts(params, carried, *known)))

        results = np.asarray(jax.jit(jax.vmap(of_member))(params, carried), losses.dtype)
        if results.shape != (len(members),):
            raise ValueError(f"evaluate must return a scalar, got shape {results.shape[1:]}.")
    diverged_at = np.asarray(diverged_at)
    results = np.where((diverged_at > 0) | ~np.isfinite(results), np.nan, results)
    params = put_together(Parts(params, carried, *known))
    return Sweep((*names, "seed"), members, losses, diverged_at, params, results)
