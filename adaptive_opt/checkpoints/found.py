"""What a state holds: its buffers by name and parameter, its counts, and what else there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.counting import Counts, count_of
from adaptive_opt.checkpoints.meaning import Meaning, Unknown, meaning_at, meanings
from adaptive_opt.checkpoints.places import Place, over, places
from adaptive_opt.checkpoints.rules import rule_of
from adaptive_opt.core.bracket import AdaptiveState
from adaptive_opt.core.describe import describe
from adaptive_opt.core.observe import Observation
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory.master_weights import with_float32_weights


@dataclasses.dataclass(frozen=True)
class Own:
    """What a transformation holds that is no buffer and no count of gradients.

    Attributes:
      place: where.
      covered: the parameters whose gradients come by there.
      held: it, by name.
      moved: the names of those that are no counts, and are not as at the start.
    """

    place: Place
    covered: frozenset[str]
    held: dict[str, Any]
    moved: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return self.place.kind


@dataclasses.dataclass
class Found:
    """What a state holds, wherever it holds it.

    Attributes:
      name: of the optimizer it is from.
      buffers: arrays by the name of the buffer and the path of the parameter.
      of_tree: what is there once for several parameters: their paths, and the value.
      meaning: of a buffer, by its name and the path; of one of several parameters, the paths.
      counts: of gradients.
      own: what transformations hold that is no buffer, in the order of a step.
      frozen: the parameters that get no update, of which nothing is kept.
    """

    name: str = "the source"
    buffers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    of_tree: dict[str, dict[frozenset[str], Any]] = dataclasses.field(default_factory=dict)
    meaning: dict[tuple[str, str | frozenset[str]], Meaning | Unknown] = dataclasses.field(
        default_factory=dict
    )
    counts: Counts = dataclasses.field(default_factory=Counts)
    own: list[Own] = dataclasses.field(default_factory=list)
    frozen: frozenset[str] = frozenset()

    def names(self) -> set[str]:
        return {*self.buffers, *self.of_tree}

    @property
    def is_altered(self) -> bool:
        """Whether somebody has changed an injected hyperparameter."""
        return any("hyperparams" in own.moved for own in self.own)

    def note(
        self,
        name: str,
        tree: Tree,
        covered: frozenset[str],
        paths: Collection[str],
        meaning: Meaning | Unknown,
    ) -> None:
        """A buffer at a place, of the covered parameters."""
        arrays = over(tree)
        of_each = set(arrays) <= set(paths)
        into: dict[Any, Any] = (self.buffers if of_each else self.of_tree).setdefault(name, {})
        for key, x in arrays.items() if of_each else [(covered, tree)]:
            if key in into:
                whose = (key or "the only parameter") if of_each else ", ".join(sorted(covered))
                raise ValueError(
                    f"{self.name} has two buffers {name!r} of {whose}; which of them is which in"
                    " another optimizer nobody can tell."
                )
            into[key] = x
            self.meaning[name, key] = meaning


def found_in(optimizer: optax.GradientTransformation, state: Any, params: Tree) -> Found:
    """What a state of the optimizer holds."""
    there = places(optimizer, with_float32_weights(state, params), params)
    paths = frozenset(over(params))
    buffers = {place.key: buffers_at(place, paths) for place in there}
    known = meanings(there, buffers)
    found = Found(describe(optimizer).name, frozen=frozen_in(there, buffers, paths))
    start: dict[Any, Place] = {}
    for place in there:
        mine = buffers[place.key]
        covered = seen_at(place, mine, paths)
        for name, tree in mine.items():
            found.note(name, tree, covered, paths, meaning_at(place, name, known))
        found.counts.note(place, covered)
        own, moved = own_of(place, mine), ()
        if any(map(_is_inexact, jax.tree.leaves(own))):
            start = start or {p.key: p for p in places(optimizer, optimizer.init(params), params)}
            before = start[place.key].fields()
            moved = tuple(name for name in own if _have_moved(own[name], before[name]))
        if place.kind == "MultiStepsState" and int(own["mini_step"]):
            moved = ("acc_grads",)
        if own:
            found.own.append(Own(place, covered, own, moved))
    return found


_BY_THE_LOSS = ("ReduceLROnPlateauState",)


def pairs(theirs: Collection[Own], here: Collection[Own]) -> dict[Any, Own]:
    """For places of another state, by their keys, what the same transformation held here.

    It is the same if it is of the same type and sees the same parameters, in the same order if
    there are several. If there is one of a type, some may be others where that changes nothing: if
    it has not moved, or goes by the loss.
    """
    found: dict[Any, Own] = {}
    for kind in {own.kind for own in here}:
        those, these = ([x for x in some if x.kind == kind] for some in (theirs, here))
        for covered in {own.covered for own in these}:
            old, new = ([x for x in some if x.covered == covered] for some in (those, these))
            if len(old) == len(new):
                found |= {y.place.key: x for x, y in zip(old, new, strict=True)}
        is_one = len(those) == len(these) == 1 and those[0].covered & these[0].covered
        if is_one and (not those[0].moved or kind in _BY_THE_LOSS):
            found[these[0].place.key] = those[0]
    return found


def buffers_at(place: Place, paths: Collection[str]) -> dict[str, Tree]:
    """The buffers at a place, by their names in this library; ``paths`` are those of parameters."""
    if place.kind == "MultiStepsState":
        return {}
    state, rule = place.state, rule_of(place)
    held = state.buffers if isinstance(state, AdaptiveState) else place.fields()
    found = {}
    for name, value in held.items():
        if isinstance(value, Observation) or (name == "count" and not isinstance(state, dict)):
            continue  # what was seen of one optimizer says nothing of another
        arrays = over(value)
        is_over = set(arrays) <= set(paths) and all(map(_is_inexact, arrays.values()))
        if rule is not None or (arrays and is_over):
            found[name if rule is None else rule[1].get(name, name)] = value
    return found


def with_buffers(place: Place, buffers: Mapping[str, Tree]) -> Any:
    """The state at a place with other buffers."""
    rule = rule_of(place)
    own_names = {ours: name for name, ours in (rule[1] if rule else {}).items()}
    fields = {own_names.get(name, name): value for name, value in buffers.items()}
    if isinstance(place.state, AdaptiveState):
        return place.state._replace(buffers=place.state.buffers | fields)
    return place.with_fields(**fields)


def own_of(place: Place, buffers: Collection[str]) -> dict[str, Any]:
    """What a transformation holds beside buffers and counts of gradients."""
    if rule_of(place) is not None or isinstance(place.state, (AdaptiveState, dict)):
        return {}
    fields = place.fields().items()
    return {n: v for n, v in fields if n not in buffers and n not in count_of(place)}


def covered_by(buffers: Mapping[str, Tree], paths: Collection[str]) -> frozenset[str]:
    """The parameters of which there are buffers."""
    return frozenset(path for tree in buffers.values() for path in over(tree) if path in paths)


def seen_at(place: Place, buffers: Mapping[str, Tree], paths: Collection[str]) -> frozenset[str]:
    """The parameters whose gradients come by a place."""
    return covered_by(buffers, paths) if place.sees is None else place.sees


def frozen_in(
    there: Sequence[Place], buffers: Mapping[Any, Mapping[str, Tree]], paths: Collection[str]
) -> frozenset[str]:
    """The parameters that get no update, of which nothing is kept but by wrappers."""
    zeros = [p.sees or frozenset() for p in there if p.within and p.name == "set_to_zero"]
    kept = [covered_by(buffers[p.key], paths) for p in there if p.inner is None]
    return frozenset().union(*zeros).difference(*kept)


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _have_moved(own: Any, before: Any) -> bool:
    leaves = zip(jax.tree.leaves(own), jax.tree.leaves(before), strict=False)
    return any(_is_inexact(x) and not np.array_equal(x, y) for x, y in leaves)
