"""Telemetry: what the optimizer does to its weights, as numbers in its state."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.core.checks import Hyperparameter, given
from adaptive_opt.core.observe import HYPERPARAMETERS, Observation, watching
from adaptive_opt.core.stage import Stage
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.core.trees import axes_of, axes_split, is_none, path_of

QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
LOW, HIGH, PER_DECADE = -12, 6, 8
"""The bins of the histogram: from 10^-12 to 10^6, eight to a decade, and one more at each end."""

BIN_EDGES = np.linspace(LOW, HIGH, (HIGH - LOW) * PER_DECADE + 1)
"""Their edges, as log10 of a rate. What lies below the first or above the last has a bin too."""

UNKNOWN = -1.0
"""In the state, in place of a number there is none for; all numbers are at least 0."""


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
    * for every group of parameters the quantiles and the histogram of the *per-weight rate*: what
      multiplies the direction of a weight in all, the learning rate included, wherever the recipe
      multiplies by it, so that recipes compare;
    * the fraction of weights on which a bound (AdaMod, AdaBound), a maximum (AMSGrad) or a
      rectifier (RAdam) acts: where it changed the value it was given;
    * the mean friction of diffGrad;
    * the update-to-weight ratio: the norm of the step, without decoupled decay, over that of the
      parameters; needs ``params`` in ``update``.

    It changes no update: not by a bit where the update is compiled by itself; compiled together
    with a model, XLA may round either program differently in the last place. Only counts and sums
    leave a group, so parameters may be sharded in any way. (``zero1`` and ``Packing``, which pad
    the parameters, refuse it.) A quantile is the smallest rate that at least that part of the
    weights does not exceed, to the last bit of a float32. Weights that share
    a rate count one by one.

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

    State: an ``Observation(step, values)``, float32, in the buffers of the bracket: 151 numbers for
    every group.

    ValueError for a group called "other", "all" or with a slash, or a bad pattern.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, read_telemetry, telemetry
    >>> optimizer, x = adam(1e-2, observers=telemetry(every=10)), jnp.ones(2)
    >>> _, state = optimizer.update(jnp.array([0.5, 2.0]), optimizer.init(x), x)
    >>> seen = read_telemetry(state)
    >>> round(seen["rate/all/q50"], 4), round(seen["rate/all/q99"], 4)
    (0.005, 0.02)
    >>> round(seen["learning_rate"], 4), round(seen["update_ratio/all"], 4)
    (0.01, 0.01)
    """
    patterns = _checked_groups(groups)

    def shapes(limits: tuple[str, ...]) -> Any:
        scalar = jax.ShapeDtypeStruct((), np.float32)
        bins = jax.ShapeDtypeStruct((len(BIN_EDGES) + 1,), np.float32)
        quantiles = jax.ShapeDtypeStruct((len(QUANTILES),), np.float32)
        one = {
            "histogram": bins,
            "quantiles": quantiles,
            "limited": dict.fromkeys(_numbered(limits), scalar),
            "friction": scalar,
            "update_ratio": scalar,
        }
        hyperparameters = jax.ShapeDtypeStruct((len(HYPERPARAMETERS),), np.float32)
        return {
            "hyperparameters": hyperparameters,
            "groups": {label: one for label in _by_group(patterns, ())},
        }

    def look(step: OpenStep) -> Any:
        known = step.notes["hyperparameters"]
        values = [known.get(name, UNKNOWN) for name in HYPERPARAMETERS]
        return {
            "hyperparameters": jnp.stack([jnp.asarray(v, jnp.float32) for v in values]),
            "groups": _groups_at(step, patterns, axis_name),
        }

    own = {"learning_rate": learning_rate, "b1": b1, "weight_decay": weight_decay}
    remaining = () if learning_rate is None else (learning_rate,)
    chosen = {"name": name} if name != "telemetry" else {}
    chosen |= {"axis_name": axis_name} if axis_name else {}
    settings = {"every": every, "groups": groups, **given(**own), **chosen}
    return watching(look, shapes, every, name, "telemetry", settings, own, remaining)


def read_telemetry(state: Any, *, histograms: bool = False) -> dict[str, float]:
    """What the observers in a state saw last, as a flat dict of floats.

    TensorBoard, wandb and a CSV file take it as it is. The keys are ``step``, ``learning_rate``,
    ``b1``, ``weight_decay``, and for every group ``rate/<group>/q01`` to ``q99``,
    ``limited/<stage>/<group>``, ``friction/<group>``, ``update_ratio/<group>``. What a recipe does
    not have is not there. An observer that was given a name puts it in front; so does a group of
    ``optax.partition`` (``ParameterGroups``) that has a bracket of its own.

    Args:
      state: the state of an optimizer, or anything that has one inside (a ``TrainState``).
      histograms: also ``histogram/<group>/<log10 of the bin's lower edge>``, as fractions of the
        weights; ``rate_histograms`` returns them as arrays.

    ValueError if there is no observer in the state, or if the state is one of several optimizers
    (``vmap``). Empty before the first step.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import read_telemetry, sgd, telemetry
    >>> optimizer, x = sgd(0.5, observers=telemetry()), jnp.ones(2)
    >>> _, state = optimizer.update(jnp.array([0.5, 2.0]), optimizer.init(x), x)
    >>> sorted(read_telemetry(state))[:3]
    ['learning_rate', 'rate/all/q01', 'rate/all/q10']
    >>> read_telemetry(state, histograms=True)["histogram/all/-0.375"]
    1.0
    """
    flat: dict[str, float] = {}
    for prefix, seen in _observations(state):
        if not seen.step:
            continue
        flat[f"{prefix}step"] = float(seen.step)
        entries = _entries(seen.values, histograms) if _is_telemetry(seen) else _flat(seen.values)
        flat |= {f"{prefix}{key}": value for key, value in entries.items()}
    return flat


def rate_histograms(state: Any) -> dict[str, np.ndarray]:
    """The histogram of the per-weight rate of every group, by the group's name.

    Each is an array of fractions of the weights, which add up to 1: in the bin below the first of
    ``BIN_EDGES`` (rates of 0 among them), in those between them, and above the last.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import rate_histograms, sgd, telemetry
    >>> optimizer, x = sgd(0.5, observers=telemetry()), jnp.ones(2)
    >>> _, state = optimizer.update(jnp.array([0.5, 2.0]), optimizer.init(x), x)
    >>> histogram = rate_histograms(state)["all"]
    >>> len(histogram), float(histogram.sum())
    (146, 1.0)
    """
    return {
        f"{prefix}{group}": np.asarray(values["histogram"])
        for prefix, seen in _observations(state)
        if _is_telemetry(seen) and seen.step
        for group, values in seen.values["groups"].items()
        if values["histogram"].any()
    }


def seen_at(state: Any) -> int | None:
    """The last step at which telemetry looked, or, without it, another observer; None before."""
    seen = [seen for _, seen in _observations(state) if seen.step]
    return next((int(x.step) for x in sorted(seen, key=lambda x: not _is_telemetry(x))), None)


# --- what is seen ---------------------------------------------------------------------------------


def _groups_at(step: OpenStep, patterns: Mapping[str, Any], axis_name: Any) -> Any:
    """The numbers of every group at this step."""
    rate = step.rate if step.rate is not None else step.notes.get("rate")
    if rate is None:  # no second moment and no rate: the direction itself is followed
        rate = step.map(lambda g: jnp.ones((), g.real.dtype), step.gradient)
    applied = step.direction
    if step.rate is not None:
        applied = step.map(jnp.multiply, step.direction, rate)
    remaining = jnp.asarray(step.notes["remaining"], jnp.float32)
    limited = step.notes.get("limited", ())
    names = _numbered(tuple(name for name, _ in limited))
    changed = {
        name: step.map(lambda g, a, b: _filled(a != b, g), step.gradient, before, after)
        for name, (_, (before, after)) in zip(names, limited, strict=True)
    }
    trees = {
        "rate": step.map(lambda g, r: _filled(r, g) * remaining, step.gradient, rate),
        "friction": step.notes.get("friction"),
        "squares": step.map(lambda u: _square(u) * remaining**2, applied),
        "weights": None if step.params is None else step.map(_square, step.params),
        **{f"limited/{name}": tree for name, tree in changed.items()},
    }
    columns = {key: _leaves(tree) for key, tree in trees.items() if tree is not None}
    return {
        label: _numbers({k: [c[i] for i in places] for k, c in columns.items()}, names, axis_name)
        for label, places in _by_group(patterns, step.gradient).items()
    }


def _numbers(leaves: Mapping[str, list[Any]], limits: tuple[str, ...], axis_name: Any) -> Any:
    """The numbers of one group, of the leaves of several trees."""
    axes = axes_of(axis_name)

    def everywhere(part: Any, leaf: jax.Array) -> Any:
        """The sum over the devices among which the leaf is split."""
        split = axes_split(leaf, axes)
        return jax.lax.psum(part, split) if split else part

    def total(key: str) -> jax.Array:
        given = [x for x in leaves[key] if x is not None]
        parts = [everywhere(jnp.sum(x).astype(jnp.float32), x) for x in given]
        return sum(parts, jnp.zeros((), jnp.float32))

    def counts(bins: list[jax.Array], number: int) -> jax.Array:
        """How many weights are in each of so many bins, given the bin of every weight."""
        zeros = jnp.zeros(number, jnp.int32)
        parts = [everywhere(zeros.at[b].add(1).astype(jnp.float32), b) for b in bins]
        return sum(parts, jnp.zeros(number, jnp.float32))

    rates = [r.astype(jnp.float32) for r in leaves["rate"] if r is not None]
    size = sum(everywhere(r.size, r) for r in rates)

    def mean(key: str) -> jax.Array:
        return total(key) / max(size, 1)

    weight = total("weights") if "weights" in leaves else jnp.zeros(())
    ratio = jnp.sqrt(total("squares")) / jnp.sqrt(jnp.where(weight > 0, weight, 1))
    return {
        "histogram": counts([_bin_of(r) for r in rates], len(BIN_EDGES) + 1) / max(size, 1),
        "quantiles": _quantiles(rates, size, counts),
        "limited": {name: mean(f"limited/{name}") for name in limits},
        "friction": mean("friction") if "friction" in leaves else jnp.asarray(UNKNOWN),
        "update_ratio": jnp.where(weight > 0, ratio, UNKNOWN),
    }


def _bin_of(rate: jax.Array) -> jax.Array:
    """The bin of the histogram; that of a rate that is not a number is the last."""
    last = len(BIN_EDGES)
    exponent = jnp.log10(jnp.where(rate > 0, rate, 1.0))
    inside = jnp.clip(jnp.floor((exponent - LOW) * PER_DECADE) + 1, 0, last)
    return jnp.where(jnp.isnan(rate), last, jnp.where(rate > 0, inside, 0)).astype(jnp.int32)


def _quantiles(rates: list[jax.Array], size: int, counts: Any) -> jax.Array:
    """The smallest rates that at least these parts of the weights do not exceed.

    The bits of a float that is not negative, read as an integer, are in the order of the floats.
    They are found eleven at a time: of the weights that share the bits found so far with a
    quantile, those with each of the next eleven are counted.
    """
    if not size:
        return jnp.zeros(len(QUANTILES), jnp.float32)
    bits = [jax.lax.bitcast_convert_type(jnp.abs(r), jnp.int32) for r in rates]
    ranks = np.maximum(np.ceil(np.asarray(QUANTILES) * size), 1).astype(np.float32)
    digits, rows = 2**11, len(QUANTILES) + 1

    def next_digit(level: Any, found: Any) -> Any:
        prefix, rank = found
        shift = 11 * (2 - level)

        def row(of: jax.Array) -> jax.Array:
            """The first quantile with these bits; one row is for the weights that share none."""
            first = jnp.full_like(of, rows - 1)
            for q in reversed(range(rows - 1)):
                first = jnp.where(of == prefix[q], q, first)
            return first

        places = [row(b >> shift >> 11) * digits + (b >> shift) % digits for b in bits]
        table = counts(places, rows * digits).reshape(rows, digits)
        upto = jnp.cumsum(table[row(prefix)], axis=1)
        less = upto < rank[:, None]
        digit = jnp.sum(less, axis=1, dtype=jnp.int32)
        return prefix << 11 | digit, rank - jnp.max(jnp.where(less, upto, 0), axis=1)

    start = (jnp.zeros(rows - 1, jnp.int32), jnp.asarray(ranks))
    found, _ = jax.lax.fori_loop(0, 3, next_digit, start)
    return jax.lax.bitcast_convert_type(found, jnp.float32)


def _filled(x: jax.Array, like: jax.Array) -> jax.Array:
    """What a tensor or the tree shares, for every weight of it, split as that is."""
    return jnp.where(jnp.isnan(like), x, x)


def _square(x: jax.Array) -> jax.Array:
    return jnp.abs(x) ** 2


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=is_none)


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


# --- reading --------------------------------------------------------------------------------------


def _observations(state: Any) -> list[tuple[str, Observation]]:
    """Every observation in a state, with what its keys begin with."""

    def is_one(x: Any) -> bool:
        return isinstance(x, Observation)

    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(state, is_leaf=is_one)[0]:
        if not is_one(leaf):
            continue
        if np.ndim(leaf.step):
            raise ValueError(
                f"the state is one of {np.shape(leaf.step)[0]} optimizers: choose one with"
                " jax.tree.map(lambda x: x[i], state)."
            )
        keys = [jax.tree_util.keystr((key,), simple=True) for key in path]
        groups = [b for a, b in itertools.pairwise(keys) if a == "inner_states"]
        own = [] if _is_telemetry(leaf) and keys[-1] == "telemetry" else [keys[-1]]
        found.append(("".join(f"{part}/" for part in (*groups, *own)), leaf))
    if not found:
        raise ValueError(
            "there is no observer in this state: give the recipe observers=telemetry(every=50)."
        )
    prefixes = [prefix for prefix, _ in found]
    if len(set(prefixes)) < len(prefixes):
        found = [(f"{i}/{prefix}", seen) for i, (prefix, seen) in enumerate(found)]
    return found


def _is_telemetry(seen: Observation) -> bool:
    return isinstance(seen.values, Mapping) and {"hyperparameters", "groups"} == set(seen.values)


def _entries(values: Mapping[str, Any], histograms: bool) -> dict[str, float]:
    hyperparameters = zip(HYPERPARAMETERS, map(float, values["hyperparameters"]), strict=True)
    entries = {name: value for name, value in hyperparameters if value != UNKNOWN}
    for group, seen in values["groups"].items():
        if not seen["histogram"].any():  # no weights
            continue
        for q, value in zip(QUANTILES, seen["quantiles"], strict=True):
            entries[f"rate/{group}/q{round(100 * q):02d}"] = float(value)
        for name, value in seen["limited"].items():
            entries[f"limited/{name}/{group}"] = float(value)
        for name in ("friction", "update_ratio"):
            if seen[name] != UNKNOWN:
                entries[f"{name}/{group}"] = float(seen[name])
        if histograms:
            lower = ("-inf", *(f"{edge:g}" for edge in BIN_EDGES))
            bins = zip(lower, map(float, seen["histogram"]), strict=True)
            entries |= {f"histogram/{group}/{edge}": value for edge, value in bins}
    return entries


def _flat(values: Any) -> dict[str, float]:
    """Whatever an observer keeps, by path; arrays by index."""
    entries = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(values)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for index, value in np.ndenumerate(np.asarray(leaf)):
            entries["/".join((name, *map(str, index)))] = float(value)
    return entries
