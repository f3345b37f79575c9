"""Reading what observers saw out of whatever holds an optimizer's state.

A state may come as optax made it, in a Flax nnx optimizer or its state, as a part that Equinox has
split off, in a ``TrainState``, or as the plain dicts of a checkpoint. All of them are trees, in
which the names on the way to an array are the same.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from adaptive_opt.core.containers import unboxed
from adaptive_opt.core.observe import HYPERPARAMETERS
from adaptive_opt.watching.tally import BIN_EDGES, NORMS, QUANTILES, UNKNOWN, Counted, Tally

_SKIPPED = {
    ("consecutive", "total", "inner_state"): ("skipped", "total", "consecutive"),
    ("consecutive", "total", "seen", "history", "threshold", "inner_state"): (
        "spikes",
        "total",
        "consecutive",
    ),
    ("notfinite_count", "last_finite", "total_notfinite", "inner_state"): (
        "skipped",
        "total_notfinite",
        "notfinite_count",
    ),
}
"""The names in the state of ``skip_nonfinite``, ``skip_spikes`` and ``optax.apply_if_finite``: all
of them; the key, and the names of the steps that were skipped, in all and in a row."""


def read_telemetry(state: Any, *, histograms: bool = False) -> dict[str, float]:
    """What the observers in a state saw last, as a flat dict of floats.

    TensorBoard, wandb and a CSV file take it as it is (``examples/logging_telemetry.py``). The keys
    are ``step``, ``learning_rate``, ``b1``, ``weight_decay``, ``loss`` if ``update`` was given
    ``value=``, and for every group ``rate/<group>/q01`` to ``q99``, ``limited/<stage>/<group>``,
    ``friction/<group>``, ``gradient_norm/<group>``, ``param_norm/<group>``,
    ``update_norm/<group>``, ``update_ratio/<group>``; the norms also of ``all`` groups together. If
    a ``skip_nonfinite`` or an ``optax.apply_if_finite`` is in the state, ``skipped`` and
    ``skipped_in_a_row`` are its counts now, and not those at the last look; so are ``spikes`` and
    ``spikes_in_a_row`` of a ``skip_spikes``. What a recipe does not have is not there. An observer
    that was given a name puts it in front; so does a group of
    ``optax.partition`` (``ParameterGroups``) that has a bracket of its own.

    Args:
      state: the state of an optimizer, or anything that has one inside: a linen ``TrainState``, an
        ``nnx.Optimizer`` or ``nnx.state(...)`` of one, what ``equinox.partition`` or
        ``equinox.filter`` leaves of a state. It is fetched from the device at once.
      histograms: also ``histogram/<group>/<log10 of the bin's lower edge>``, as fractions of the
        weights; ``rate_histograms`` returns them as arrays.

    ValueError if there is no observer in the state, or if the state is one of several optimizers
    (``vmap``). Without a look so far, only the counts of skipped steps.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import read_telemetry, sgd, telemetry
    >>> optimizer, x = sgd(0.5, observers=telemetry()), jnp.ones(2)
    >>> _, state = jax.jit(optimizer.update)(jnp.array([0.5, 2.0]), optimizer.init(x), x)
    >>> sorted(read_telemetry(state))[:3]
    ['gradient_norm/all', 'learning_rate', 'param_norm/all']
    >>> read_telemetry(state, histograms=True)["histogram/all/-0.375"]
    1.0
    """
    return Reading.of(state).numbers(histograms)


def rate_histograms(state: Any) -> dict[str, np.ndarray]:
    """The histogram of the per-weight rate of every group, by the group's name.

    Each is an array of fractions of the weights, which add up to 1: in the bin below the first of
    ``BIN_EDGES`` (rates of 0 among them), in those between them, and above the last. The edges are
    rounded down to one of 2^7 steps from a power of two to the next.

    Args:
      state: as for ``read_telemetry``.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import rate_histograms, sgd, telemetry
    >>> optimizer, x = sgd(0.5, observers=telemetry()), jnp.ones(2)
    >>> _, state = jax.jit(optimizer.update)(jnp.array([0.5, 2.0]), optimizer.init(x), x)
    >>> histogram = rate_histograms(state)["all"]
    >>> len(histogram), float(histogram.sum())
    (146, 1.0)
    """
    return Reading.of(state).histograms()


OF_TELEMETRY = {"hyperparameters", "loss", "groups", "limits", *Tally._fields}


class Seen(NamedTuple):
    """What an observer saw last, on the host, and what its keys begin with."""

    prefix: str
    step: int
    values: Mapping[str, Any]

    @property
    def is_of_telemetry(self) -> bool:
        return {*self.values, "limits"} == OF_TELEMETRY  # of which there may be none

    @property
    def counted(self) -> dict[str, Counted]:
        """What telemetry counted of every group that has weights, by its name."""
        tally = Tally(**{field: self.values[field] for field in Tally._fields})
        rows = {label: Counted.of(tally, int(row)) for label, row in self.values["groups"].items()}
        return {label: counted for label, counted in rows.items() if counted.size}


class Reading(NamedTuple):
    """All that there is to read in a state."""

    seen: list[Seen]
    skipped: dict[str, float]

    @classmethod
    def of(cls, state: Any) -> Reading:
        tree = _names(state)
        found, skips = [], []
        for path, node in _nodes(tree, ()):
            if _is_observation(path, node):
                found.append((path, node))
            skips += [
                (_groups(path) + key, [node[k] for k in keys])
                for of, (key, *keys) in _SKIPPED.items()
                if set(node) == set(of)
            ]
        if not found:
            raise ValueError(
                "there is no observer in this state: give the recipe observers=telemetry(every=50)."
            )
        for _, node in found:
            if np.ndim(node["step"]):
                raise ValueError(
                    f"the state is one of {np.shape(node['step'])[0]} optimizers: choose one with"
                    " jax.tree.map(lambda x: x[i], state)."
                )
        nodes, counts = jax.device_get(([node for _, node in found], [c for _, c in skips]))
        seen = [
            Seen(_prefix(path, node), int(node["step"]), node["values"])
            for (path, _), node in zip(found, nodes, strict=True)
        ]
        if len({each.prefix for each in seen}) < len(seen):
            seen = [each._replace(prefix=f"{i}/{each.prefix}") for i, each in enumerate(seen)]
        skipped = {}
        for (key, _), (total, in_a_row) in zip(skips, counts, strict=True):
            skipped[key] = float(total)
            skipped[f"{key}_in_a_row"] = float(in_a_row)
        return cls([each for each in seen if each.step], skipped)

    @property
    def step(self) -> int | None:
        """The last step at which telemetry looked, or, without it, another observer.

        Of several brackets, that of the one that has taken most steps: a group that is unfrozen
        later counts its own.
        """
        ours = [each.step for each in self.seen if each.is_of_telemetry]
        return max(ours or [each.step for each in self.seen], default=None)

    def numbers(self, histograms: bool = False) -> dict[str, float]:
        flat: dict[str, float] = {}
        for each in self.seen:
            flat[f"{each.prefix}step"] = float(each.step)
            ours = each.is_of_telemetry
            entries = _entries(each, histograms) if ours else _flat(each.values)
            flat |= {f"{each.prefix}{key}": value for key, value in entries.items()}
        return flat | self.skipped

    def histograms(self) -> dict[str, np.ndarray]:
        return {
            f"{each.prefix}{group}": counted.histogram / counted.size
            for each in self.seen
            if each.is_of_telemetry
            for group, counted in each.counted.items()
        }


# --- finding --------------------------------------------------------------------------------------


def _names(state: Any) -> dict[str, Any]:
    """A state as dicts of dicts, by the names on the way to each array."""
    nnx = sys.modules.get("flax.nnx")
    if nnx is not None and isinstance(state, nnx.Module | nnx.Optimizer):
        state = nnx.state(state)
    root: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(unboxed(state))[0]:
        *way, last = [jax.tree_util.keystr((key,), simple=True) for key in path] or [""]
        node = root
        for name in way:
            node = node.setdefault(name, {})
        node[last] = leaf
    return root


def _nodes(node: Any, path: tuple[str, ...]) -> Any:
    if isinstance(node, dict):
        yield path, node
        for name, child in node.items():
            yield from _nodes(child, (*path, name))


def _is_observation(path: tuple[str, ...], node: dict[str, Any]) -> bool:
    """Whether this is an ``Observation``, whatever has become of its type."""
    return path[-2:-1] == ("buffers",) and set(node) == {"step", "values"}


def _groups(path: tuple[str, ...]) -> str:
    """The labels of the partitions on the way."""
    return "".join(f"{b}/" for a, b in itertools.pairwise(path) if a == "inner_states")


def _prefix(path: tuple[str, ...], node: Mapping[str, Any]) -> str:
    is_plain = path[-1] == "telemetry" and Seen("", 0, node["values"]).is_of_telemetry
    return _groups(path) + ("" if is_plain else f"{path[-1]}/")


# --- flattening -----------------------------------------------------------------------------------


def _entries(seen: Seen, histograms: bool) -> dict[str, float]:
    values, groups = seen.values, seen.counted
    hyperparameters = zip(HYPERPARAMETERS, map(float, values["hyperparameters"]), strict=True)
    entries = {name: value for name, value in hyperparameters if value != UNKNOWN}
    is_known, loss = map(float, values["loss"])
    entries |= {"loss": loss} if is_known else {}
    for group, counted in groups.items():
        for q, value in zip(QUANTILES, counted.quantiles, strict=True):
            entries[f"rate/{group}/q{round(100 * q):02d}"] = float(value)
        for name, place in values.get("limits", {}).items():
            if place >= 0:
                entries[f"limited/{name}/{group}"] = counted.limited[int(place)] / counted.size
        if counted.friction != UNKNOWN:
            entries[f"friction/{group}"] = counted.friction
        entries |= _norms(group, counted.norms)
        if histograms:
            lower = ("-inf", *(f"{edge:g}" for edge in BIN_EDGES))
            bins = zip(lower, counted.histogram / counted.size, strict=True)
            entries |= {f"histogram/{group}/{edge}": float(value) for edge, value in bins}
    if groups and "all" not in groups:
        together = {
            name: math.hypot(*of) if min(of) != UNKNOWN else UNKNOWN
            for name in NORMS
            for of in [[counted.norms[name] for counted in groups.values()]]
        }
        entries |= _norms("all", together)
    return entries


def _norms(group: str, norms: Mapping[str, float]) -> dict[str, float]:
    entries = {f"{k}_norm/{group}": x for k, x in norms.items() if x != UNKNOWN}
    if norms["param"] > 0:
        entries[f"update_ratio/{group}"] = norms["update"] / norms["param"]
    return entries


def _flat(values: Any) -> dict[str, float]:
    """Whatever an observer keeps, by path; arrays by index."""
    entries = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(values)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for index, value in np.ndenumerate(np.asarray(leaf)):
            entries["/".join((name, *map(str, index)))] = float(value)
    return entries
