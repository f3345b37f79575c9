"""Telemetry: what the optimizer does to its weights, as numbers in its state."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from adaptive_opt.core.checks import Hyperparameter, given
from adaptive_opt.core.observe import HYPERPARAMETERS, watching
from adaptive_opt.core.stage import Stage
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import axes_of, axes_split, branch, is_none, path_of, varying_like
from adaptive_opt.core.waves import SEGMENT, Wave, Waves, all_varying_like, one_by_one, type_of
from adaptive_opt.watching.tally import UNKNOWN, Tally, Weights


def telemetry(
    *,
    every: int = 50,
    groups: Mapping[str, str] | None = None,
    learning_rate: Hyperparameter | None = None,
    b1: Hyperparameter | None = None,
    weight_decay: Hyperparameter | None = None,
    axis_name: str | tuple[str, ...] = (),
    name: str = "telemetry",
) -> Stage:
    """An observer of the rate of every weight, of bounds, friction and the size of the steps.

    Give it to a recipe, ``adamod(1e-3, observers=telemetry(every=50))``, and read it with
    ``read_telemetry(state)``. At steps 1, 1 + every, ... it keeps:

    * the learning rate, b1 (or the momentum) and the weight decay of the step;
    * the loss, if ``update`` was given it as ``value=``;
    * for every group of parameters the quantiles and the histogram of the *per-weight rate*: what
      multiplies the direction of a weight in all, the learning rate included, wherever the recipe
      multiplies by it, so that recipes compare (Schedule-Free does so inside a line: its are 1);
    * the number of weights on which a bound (AdaMod, AdaBound), a maximum (AMSGrad) or a rectifier
      (RAdam) acts: where it changed the value it was given;
    * the mean friction of diffGrad;
    * three norms: of the gradient as the recipe is given it (what clips before it in a chain has
      clipped), of the parameters, and of the update, the learning rate included and decoupled
      decay left out. The update-to-weight ratio is that of the last two; both need ``params`` in
      ``update``.

    It changes no update: not by a bit where the update is compiled by itself; compiled together
    with a model, XLA may round either program differently in the last place. Only counts and sums
    leave a group, so parameters may be sharded in any way. (``zero1`` and ``Packing``, which pad
    the parameters, refuse it.)

    Rates are counted in bins that are 2^-7 of the rate wide, exactly, up to 2^63 weights. A
    quantile is the smallest rate that at least that part of the weights does not exceed, to 2^-8
    of itself, and exactly where all rates of a group are equal; the edges of the histogram are
    rounded down to those of bins. Norms are right to float32's rounding at any size of gradients.

    A look goes through all weights in waves: temporaries are less than a byte for each weight,
    besides a megabyte, and one program serves all leaves. Where a line of the optimizer sees more
    than one weight, and on a mesh of several devices under ``jit``, a wave is a leaf: one program
    serves all leaves of a shape (on automatic axes, one leaf), and temporaries are up to 36 bytes
    for each weight of the largest leaf, and on meshes a few copies of the counts. Where a line is
    of the whole tree (a masked decay inside of the rule, a norm of all leaves), the directions and
    the rates of all leaves are there at once: up to 16 bytes for each weight more. Only counts are
    made on the device; quantiles and histograms are read off them by ``read_telemetry``.

    Args:
      every: how many steps from one look to the next; at least 1.
      groups: regular expressions by name, searched in the path of each parameter
        (``{"head": "head", "kernels": "kernel$"}``); the first that matches counts, the rest is
        "other". Default: one group, "all".
      learning_rate, b1, weight_decay: for a bracket of your own. The learning rate is then taken as
        a factor that the update meets after it. Recipes know theirs.
      axis_name: under ``shard_map`` or ``pmap``, the mesh axes over which the parameters are split,
        as for ``second_moment``; default: every device has them all. Not needed under ``jit``.
      name: of what it keeps.

    State: an ``Observation(step, values)`` in the buffers of the bracket: 2^16 counts of 32 bits
    for every group (256 KiB), two more for each stage that limits something, and some numbers.

    ValueError for a group called "other", "all" or with a slash, or a bad pattern.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adam, read_telemetry, telemetry
    >>> optimizer, x = adam(1e-2, observers=telemetry(every=10)), jnp.ones(2)
    >>> _, state = jax.jit(optimizer.update)(jnp.array([0.5, 2.0]), optimizer.init(x), x)
    >>> seen = read_telemetry(state)
    >>> round(seen["rate/all/q50"], 4), round(seen["rate/all/q99"], 4)
    (0.005, 0.02)
    >>> round(seen["learning_rate"], 4), round(seen["update_ratio/all"], 4)
    (0.01, 0.01)
    """
    patterns = _checked_groups(groups)

    def shapes(limits: tuple[str, ...]) -> Any:
        def number(*shape: int, dtype: Any = np.float32) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, dtype)

        labels = sorted(_by_group(patterns, ()))
        row = number(dtype=np.int32)
        counted = jax.eval_shape(lambda: Tally.nothing(len(labels), len(limits)))
        return {
            "hyperparameters": number(len(HYPERPARAMETERS)),
            "loss": number(2),
            "groups": dict.fromkeys(labels, row),
            "limits": dict.fromkeys(_numbered(limits), row),
            **counted._asdict(),
        }

    def look(step: OpenStep, last: Any, waves: Sequence[Waves] | None, when: Any) -> Any:
        if missing := {"groups", "limits", *Tally._fields} - last.keys():
            raise ValueError(
                f"what telemetry saw last is of another version: it has no {min(missing)}."
                " convert_state(state, optimizer, optimizer, params) begins it anew."
            )
        known = step.notes["hyperparameters"]
        values = [known.get(name, UNKNOWN) for name in HYPERPARAMETERS]
        places = _by_group(patterns, step.gradient)
        looked = _Look(step, places, len(last["limits"]), axes_of(axis_name), when)

        def anew(old: Any) -> Any:
            new = {
                "hyperparameters": jnp.stack([jnp.asarray(v, jnp.float32) for v in values]),
                "loss": _loss(step.now.extra.get("value")),
                **looked.nothing()._asdict(),
            }
            return jax.tree.map(lambda x, like: varying_like(x, [like]), new, old)

        old = {key: value for key, value in last.items() if key not in ("groups", "limits")}
        begun = branch(when, anew, lambda old: old, jax.lax.stop_gradient(old))
        looked.tally = Tally(**{field: begun[field] for field in Tally._fields})
        tally = looked.leaf_by_leaf() if waves is None else looked.in_waves(waves)
        named = {
            "groups": {label: np.int32(row) for row, label in enumerate(looked.labels)},
            "limits": {
                name: np.int32(i if i < looked.reached else -1)
                for i, name in enumerate(last["limits"])
            },
        }
        return begun | tally._asdict() | named, tally.highest >= UNKNOWN  # always; see observe

    own = {"learning_rate": learning_rate, "b1": b1, "weight_decay": weight_decay}
    remaining = () if learning_rate is None else (learning_rate,)
    chosen = {"name": name} if name != "telemetry" else {}
    chosen |= {"axis_name": axis_name} if axis_name else {}
    settings = {"every": every, "groups": groups, **given(**own), **chosen}
    return watching(look, shapes, every, name, "telemetry", settings, own, remaining, waves=True)


class _Look:
    """Telemetry's look at a step, wave by wave or leaf by leaf, where it is time."""

    tally: Tally

    def __init__(
        self,
        step: OpenStep,
        places: Mapping[str, list[int]],
        limits: int,
        axes: tuple[str, ...],
        when: Any,
    ) -> None:
        self.step, self.limits, self.axes, self.when = step, limits, axes, when
        self.labels = tuple(sorted(places))
        self.group_of = {p: row for row, k in enumerate(self.labels) for p in places[k]}
        self.remaining = jax.lax.stop_gradient(jnp.asarray(step.notes["remaining"], jnp.float32))
        self.reached = 0  # of the limits, by the stages before this observer
        total = sum(each.gradient.size for each in step.steps if each is not None)
        self.carries = total * jax.lax.psum(1, axes) >= SEGMENT

    def in_waves(self, waves: Sequence[Waves]) -> Tally:
        def add(tally: Tally, wave: Wave) -> Tally:
            weights = self._weights(wave.step)
            if wave.is_weight is None:
                return self._with_leaf(tally, weights, wave.number)
            return tally.adding(weights, wave.number, wave.is_weight, self.carries)

        for kind in waves:
            groups = [self.group_of[place] for place in kind.places]
            self._count(functools.partial(kind.fold, groups, add), kind.leaves)
        return self.tally

    def leaf_by_leaf(self) -> Tally:
        """The same where all directions are there already."""
        alike: dict[Any, list[tuple[Weights, int]]] = {}
        for place, each in enumerate(self.step.steps):
            if each is None or not each.gradient.size:
                continue
            weights, group = self._weights(each), self.group_of[place]
            for cut in _countable(weights):
                alike.setdefault(type_of(cut), []).append((cut, group))
        for own in alike.values():
            cuts, groups = zip(*own, strict=True)
            self._count(functools.partial(one_by_one, cuts, groups, self._with_leaf), cuts)
        return self.tally

    def _count(self, fold: Callable[..., Tally], leaves: Any) -> None:
        """What a fold adds, on all the devices over which the leaves are split."""
        arrays = jax.tree.leaves(leaves)
        split = tuple(a for a in self.axes if any(a in axes_split(x, (a,)) for x in arrays))

        def with_all(tally: Tally) -> Tally:
            return tally.merged(fold(self.nothing(), self.when).everywhere(split))

        if split:
            self.tally = branch(self.when, with_all, lambda tally: tally, self.tally)
        else:
            self.tally = fold(self.tally, self.when)

    def _weights(self, step: Any) -> Weights:
        weights = jax.lax.stop_gradient(Weights.of(step, self.remaining, self.limits))
        self.reached = max(self.reached, len(weights.limited))
        return weights

    def nothing(self) -> Tally:
        return Tally.nothing(len(self.labels), self.limits)

    def _with_leaf(self, tally: Tally, weights: Weights, group: jax.Array) -> Tally:
        """With the weights of an array; on a mesh with explicit axes, by its parts."""
        sharding = jax.typeof(weights.rate).sharding
        split = [name for axis in sharding.spec for name in axes_of(axis)]
        split = tuple(n for n in split if n not in sharding.mesh.manual_axes)
        if not split:
            return tally.adding(weights, group, carries=self.carries)

        def of_part(weights: Weights, group: jax.Array) -> Tally:
            start = all_varying_like(self.nothing(), weights)
            return start.adding(weights, group).everywhere(split)

        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, weights)
        alone = PartitionSpec()
        part = jax.shard_map(of_part, in_specs=(specs, alone), out_specs=alone)
        return tally.merged(part(weights, group))


def _countable(weights: Weights) -> list[Weights]:
    """The weights of a leaf, in parts of less than 2^31 where its first axis can be cut so."""
    parts = -(-weights.rate.size // (SEGMENT - 1))
    if parts == 1:
        return [weights]
    rows = -(-weights.rate.shape[0] // parts)
    cuts = (slice(part * rows, (part + 1) * rows) for part in range(parts))
    made = [jax.tree.map(lambda x, own=own: x[own], weights) for own in cuts]
    return [cut for cut in made if cut.rate.size]


def _loss(value: Any) -> jax.Array:
    """Whether there is one, and the loss."""
    if value is None or jnp.size(value) != 1 or jnp.iscomplexobj(value):
        return jnp.zeros(2, jnp.float32)
    value = jax.lax.stop_gradient(jnp.asarray(value, jnp.float32).reshape(()))
    return jnp.stack([jnp.ones((), jnp.float32), value])


# --- names ----------------------------------------------------------------------------------------


def _checked_groups(groups: Mapping[str, str] | None) -> dict[str, re.Pattern[str]]:
    compiled = {}
    for label, pattern in (groups or {}).items():
        if label in ("all", "other") or "/" in label:
            raise ValueError(
                f"a group of telemetry cannot be called {label!r}: 'all' and 'other' are taken, and"
                " a slash separates the parts of a key. Choose another name."
            )
        try:
            compiled[label] = re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"group {label!r}: the pattern {pattern!r} is not a regular expression: {error}."
            ) from None
    return compiled


def _by_group(patterns: Mapping[str, re.Pattern[str]], tree: Any) -> dict[str, list[int]]:
    """For every group, the places of its leaves in the tree.

    Also for groups without any: the state must not depend on the parameters, in whose place
    ``optax.tree_map_params`` puts something else.
    """
    rest = "other" if patterns else "all"
    places: dict[str, list[int]] = {label: [] for label in (*patterns, rest)}
    for place, (path, _) in enumerate(
        jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)[0]
    ):
        name = path_of(path)
        label = next((k for k, p in patterns.items() if p.search(name)), rest)
        places[label].append(place)
    return places


def _numbered(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names, told apart where there are two of one."""
    counts = [names[: i + 1].count(name) for i, name in enumerate(names)]
    return tuple(n if c == 1 else f"{n}_{c}" for n, c in zip(names, counts, strict=True))
