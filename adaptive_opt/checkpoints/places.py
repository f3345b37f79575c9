"""A state beside the transformations that own its parts: what is whose, and under which wrappers.

A state is a nest of tuples: of chains, of wrappers around one inner state, of partitions. Here it
is walked once, for everything that moves states about.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import optax

from adaptive_opt.core.describe import Description, describe, held_by, held_in, made_of
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory import codecs
from adaptive_opt.memory.low_memory import LowMemoryState, encoded_again

_INNER = ("inner_state", "inner_opt_state", "inner_states")
"""What a wrapper calls the state of what it wraps; a partition, those of its groups."""


@dataclasses.dataclass(frozen=True)
class Place:
    """A part of a state that is no nest itself, or a wrapper's own part.

    Attributes:
      key: where it is in the state.
      kind: the type of what stands there.
      state: what stands there; two places are the same whatever it is.
      owner: the transformation whose state it is; None where that is not known.
      within: the wrappers around it, from outside in: the type of a state, or ``("group", label)``
        of a partition.
      inner: of a wrapper, the field in which the inner state is; it is not part of this place.
      sees: the paths of the parameters whose gradients come by; None where nobody knows the mask.
    """

    key: tuple[Any, ...]
    kind: str
    state: Any = dataclasses.field(compare=False)
    owner: optax.GradientTransformation | None
    within: tuple[Any, ...] = ()
    inner: str | None = None
    sees: frozenset[str] | None = dataclasses.field(default=None, compare=False)

    @property
    def name(self) -> str:
        """What the owner is called."""
        return "" if self.owner is None else describe(self.owner).name

    @property
    def has_schedules(self) -> bool:
        """Whether a hyperparameter of the owner goes by its count."""
        parts = () if self.owner is None else describe(self.owner).walk()
        return any(callable(value) for part in parts for value in part.settings.values())

    @property
    def labels(self) -> tuple[Any, ...]:
        return tuple(w for w in self.within if isinstance(w, tuple))

    def fields(self) -> dict[str, Any]:
        """What it holds, by name, without an inner state."""
        if isinstance(self.state, dict):
            return dict(self.state)
        fields = dict(self.state._asdict()) if hasattr(self.state, "_fields") else {}
        return {name: value for name, value in fields.items() if name != self.inner}

    def with_fields(self, **fields: Any) -> Any:
        """Its state with other values in some fields."""
        if isinstance(self.state, dict):
            return {**self.state, **fields}
        return self.state._replace(**fields) if fields else self.state


@dataclasses.dataclass(frozen=True)
class _Way:
    """How a gradient came to a part of a state.

    Attributes:
      within, sees: those of a place.
      described: what masks are looked for in: what is still to come of the present transformation.
      is_of_group: whether the mask of a partition is still to come.
    """

    params: Tree
    described: Description | None
    sees: frozenset[str] | None
    within: tuple[Any, ...] = ()
    is_of_group: bool = False

    def into(self, owner: optax.GradientTransformation | None) -> _Way:
        """Into a part of a chain."""
        return dataclasses.replace(self, described=None if owner is None else describe(owner))

    def into_group(self, owner: Any, label: Any, labels: Any) -> _Way:
        return dataclasses.replace(
            self.into(owner),
            sees=self.those(labels, lambda of: str(of) == str(label)),
            within=(*self.within, ("group", label)),
            is_of_group=True,
        )

    def into_wrapper(self, kind: str) -> _Way:
        into = dataclasses.replace(self, within=(*self.within, kind), is_of_group=False)
        if kind != "MaskedState" or self.is_of_group:
            return into
        mask = self.described
        while mask is not None and (mask.labels is None or mask.parts[0].key is not None):
            mask = mask.parts[0] if len(mask.parts) == 1 else None
        if mask is None:
            return dataclasses.replace(into, described=None, sees=None)
        return dataclasses.replace(
            into, described=mask.parts[0], sees=into.those(mask.labels, bool)
        )

    def those(self, labels: Any, are_here: Callable[[Any], bool]) -> frozenset[str] | None:
        """Of the parameters that are seen those whose label says so."""
        if self.sees is None or labels is None:
            return None
        paths = over(self.params)
        try:
            of = jax.tree.leaves(labels_over(self.params, labels))
        except ValueError:  # labels of another tree: of what another partition leaves over
            return None
        if len(of) != len(paths):
            return None
        return self.sees & {path for path, x in zip(paths, of, strict=True) if are_here(x)}


def labels_over(params: Tree, labels: Any) -> Tree:
    """Labels of parameters, which may be a function of them, or one for a subtree; at each leaf."""
    return jax.tree.broadcast(labels(params) if callable(labels) else labels, params)


def places(tx: optax.GradientTransformation, state: Any, params: Tree) -> list[Place]:
    """All places of a state, in the order in which a step comes by."""
    found: list[Place] = []

    def note(place: Place) -> Any:
        found.append(place)
        return place.state

    replaced(tx, state, params, note, encode=False)
    return found


def replaced(
    tx: optax.GradientTransformation,
    state: Any,
    params: Tree,
    function: Callable[[Place], Any],
    *,
    encode: bool = True,
) -> Any:
    """The state with ``function(place)`` in place of every place's; low memory comes decoded.

    Afterwards it is encoded, as it would be at the count that the wrapper then has.
    """
    way = _Way(params, describe(tx), frozenset(over(params)))
    return _replaced(tx, state, function, (), way, encode)


def _replaced(
    tx: optax.GradientTransformation | None,
    state: Any,
    function: Callable[[Place], Any],
    key: tuple[Any, ...],
    way: _Way,
    encode: bool,
) -> Any:
    def go_on(owner: Any, part: Any, key: Any, way: _Way) -> Any:
        return _replaced(owner, part, function, key, way, encode)

    if isinstance(state, (tuple, list)) and not hasattr(state, "_fields"):
        owners = _parts(tx, range(len(state)))
        return type(state)(
            go_on(owner, part, (*key, i), way.into(owner))
            for i, (owner, part) in enumerate(zip(owners, state, strict=True))
        )
    if isinstance(state, dict):
        owners = _parts(tx, state)
        if owners[:1] != [None]:  # of named_chain
            return {
                name: go_on(owner, part, (*key, name), way.into(owner))
                for owner, (name, part) in zip(owners, state.items(), strict=True)
            }
    kind = type(state).__name__
    inner = next((name for name in _INNER if name in getattr(state, "_fields", ())), None)
    if inner is None:
        return function(Place(key, kind, state, innermost(tx), way.within, None, way.sees))
    wrapper = function(Place(key, kind, state, tx, way.within, inner, way.sees))
    below, key = getattr(state, inner), (*key, inner)
    if inner == "inner_states":
        owners, whole = _parts(tx, below), innermost(tx)
        labels = None if whole is None else describe(whole).labels
        new: Any = type(below)(
            (label, go_on(owner, part, (*key, label), way.into_group(owner, label, labels)))
            for owner, (label, part) in zip(owners, below.items(), strict=True)
        )
    else:
        is_encoded = isinstance(state, LowMemoryState)
        plain = codecs.decoded(below) if is_encoded else below
        new = go_on(tx, plain, key, way.into_wrapper(kind))
        if is_encoded and encode:
            new = encoded_again(wrapper.count, below, new)
    return wrapper._replace(**{inner: new})


def innermost(tx: optax.GradientTransformation | None) -> optax.GradientTransformation | None:
    """What wrappers around one transformation wrap: a chain, a partition, or what has no parts.

    None where a transformation holds several, nobody knows how.
    """
    while tx is not None and not _is_whole(tx):
        own = made_of(tx)
        if own is not None:
            parts = own.parts or ()
            tx = parts[0] if len(parts) == 1 else own.plain
            continue
        held = [part for _, part in held_in(tx)]
        if not held:
            return tx
        tx = held[0] if len(held) == 1 else None
    return tx


def _is_whole(tx: optax.GradientTransformation) -> bool:
    own = made_of(tx)
    if own is not None:
        return own.name == "adaptive" or bool(own.lines) or own.parts == () or bool(own.keys)
    return bool({"update_fns", "transforms"} & {*held_by(inspect.unwrap(tx.update))})


def _parts(tx: Any, labels: Any) -> list[optax.GradientTransformation | None]:
    """The parts of a chain or a partition, one for each label of its state."""
    whole = innermost(tx)
    own = None if whole is None else made_of(whole)
    if own is not None and own.keys:
        by_label = dict(zip(own.keys, own.parts or (), strict=True))
        return [by_label.get(str(label)) for label in labels]
    known = [] if whole is None or made_of(whole) is not None else held_in(whole)
    if len(known) != len(labels):
        return [None] * len(labels)
    if any(key is None for key, _ in known):
        return [part for _, part in known]
    by_label = dict(known)
    return [by_label.get(str(label)) for label in labels]


def over(tree: Any) -> dict[str, Any]:
    """The arrays of a tree by their paths; of masked parameters there are none."""
    return {path_of(p): x for p, x in jax.tree_util.tree_flatten_with_path(tree)[0]}


def path_of(path: Any) -> str:
    """A key path as it is written in Python: ``['dense']['kernel']``."""
    return jax.tree_util.keystr(path)


def lanes(found: list[Place]) -> Iterator[list[Place]]:
    """The ways of a gradient through the places: one for every group, else all in one."""
    groups = list(dict.fromkeys(place.labels for place in found))
    ends = [g for g in groups if not any(h != g and h[: len(g)] == g for h in groups)]
    for end in ends:
        yield [place for place in found if end[: len(place.labels)] == place.labels]
