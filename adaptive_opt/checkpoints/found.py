"""What a state holds: its buffers by name and parameter, its counts, and what else there is."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.counting import Counts, count_of
from adaptive_opt.checkpoints.meaning import Meaning, Unknown, meanings, rule_of, unknown_at
from adaptive_opt.checkpoints.places import Place, over, places
from adaptive_opt.core.bracket import AdaptiveState
from adaptive_opt.core.describe import describe
from adaptive_opt.core.observe import Observation
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory.master_weights import with_float32_weights


@dataclasses.dataclass
class Found:
    """What a state holds, wherever it holds it.

    Attributes:
      name: of the optimizer it is from.
      buffers: arrays by the name of the buffer and the path of the parameter.
      of_tree: what is there once for several parameters: their paths, as far as other buffers tell
        them, the labels of their groups, and the value.
      meaning: of a buffer, by its name and the path; of one of several parameters, by "".
      counts: of gradients.
      own: what transformations hold that is no buffer, by the type of the state.
      numbers: the names of those that are no counts, and have moved from where they started; by
        the type of the state.
      freezes: whether there are parameters that get no update, of which nothing is kept.
    """

    name: str = "the source"
    buffers: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    of_tree: dict[str, list[tuple[frozenset[str], Any, Any]]] = dataclasses.field(
        default_factory=dict
    )
    meaning: dict[tuple[str, str], Meaning | Unknown] = dataclasses.field(default_factory=dict)
    counts: Counts = dataclasses.field(default_factory=Counts)
    own: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    numbers: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    freezes: bool = False

    def names(self) -> set[str]:
        return {*self.buffers, *self.of_tree}

    @property
    def is_altered(self) -> bool:
        """Whether somebody has changed an injected hyperparameter."""
        return any("hyperparams" in names for names in self.numbers.values())

    def note(
        self,
        name: str,
        tree: Tree,
        place: Place,
        covered: frozenset[str],
        meaning: Meaning | Unknown,
    ) -> None:
        """A buffer at a place, of the covered parameters."""
        arrays = over(tree)
        if not set(arrays) <= covered:
            self.of_tree.setdefault(name, []).append((covered, place.labels, tree))
            self.meaning[name, ""] = meaning
            return
        for path, x in arrays.items():
            if path in self.buffers.setdefault(name, {}):
                raise ValueError(
                    f"{self.name} has two buffers {name!r} of {path or 'the only parameter'}; which"
                    " of them is which in another optimizer nobody can tell."
                )
            self.buffers[name][path] = x
            self.meaning[name, path] = meaning


def found_in(optimizer: optax.GradientTransformation, state: Any, params: Tree) -> Found:
    """What a state of the optimizer holds."""
    there = places(optimizer, with_float32_weights(state, params))
    paths, known = frozenset(over(params)), meanings(there)
    found = Found(describe(optimizer).name, freezes=freezes(there))
    start: dict[Any, Place] = {}
    for place in there:
        mine = buffers_at(place, paths)
        covered = covered_by(mine, paths)
        for name, tree in mine.items():
            meaning = known.get((place.key, name)) or unknown_at(place)
            found.note(name, tree, place, covered, meaning)
        found.counts.note(place, covered)
        own = own_of(place, mine)
        if own:
            found.own.setdefault(place.kind, []).append(own)
            if any(map(_is_inexact, jax.tree.leaves(own))):
                start = start or {p.key: p for p in places(optimizer, optimizer.init(params))}
                before = start[place.key].fields()
                moved = [name for name in own if _have_moved(own[name], before[name])]
                found.numbers.setdefault(place.kind, []).extend(moved)
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


def freezes(there: Iterable[Place]) -> bool:
    """Whether some parameters get no update, and nothing is kept of them."""
    return any(place.within and place.name == "set_to_zero" for place in there)


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def _have_moved(own: Any, before: Any) -> bool:
    leaves = zip(jax.tree.leaves(own), jax.tree.leaves(before), strict=False)
    return any(_is_inexact(x) and not np.array_equal(x, y) for x, y in leaves)
