"""A fresh state, filled place by place with what was found in another."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.counting import count_of, whose
from adaptive_opt.checkpoints.deriving import DERIVED, derived
from adaptive_opt.checkpoints.factors import ratio
from adaptive_opt.checkpoints.found import (
    Found,
    Own,
    buffers_at,
    covered_by,
    frozen_in,
    own_of,
    pairs,
    seen_at,
    with_buffers,
)
from adaptive_opt.checkpoints.meaning import Meaning, Unknown, meaning_at, meanings
from adaptive_opt.checkpoints.places import Place, over, path_of, places, replaced
from adaptive_opt.core.checks import check_names
from adaptive_opt.core.describe import describe, held_by, held_in, made_of
from adaptive_opt.core.trees import Tree
from adaptive_opt.memory.master_weights import with_float32_weights, with_residuals_like

_STARTS = ("slow", "residual")
"""The buffers that start where the parameters are, if there are none."""


class Filling:
    """A fresh state on its way to be one that goes on.

    What is wrong is gathered, and said at once.
    """

    def __init__(
        self,
        target: optax.GradientTransformation,
        params: Tree,
        found: Found,
        count: Any,
        drop: Collection[str],
    ) -> None:
        self.target, self.found = target, found
        self.params, self.kinds = params, target.init(params)
        self.fresh = with_float32_weights(self.kinds, params)
        self.paths = frozenset(over(params))
        self.name = describe(target).name
        self.places = places(target, self.fresh, params)
        self.buffers = {place.key: buffers_at(place, self.paths) for place in self.places}
        self.covered = {
            place.key: seen_at(place, self.buffers[place.key], self.paths) for place in self.places
        }
        self.own = {
            place.key: Own(place, self.covered[place.key], own)
            for place in self.places
            if (own := own_of(place, self.buffers[place.key]))
        }
        self.pairs = pairs(found.own, self.own.values())
        self.held = {
            key: own
            for key, own in self.pairs.items()
            if jax.tree.structure(own.held) == jax.tree.structure(self.own[key].held)
        }
        self.meanings = meanings(self.places, self.buffers)
        self.counts = found.counts.at(count, self.paths)
        here = {name for mine in self.buffers.values() for name in mine}
        theirs = {name for own in found.own for name in own.held}
        self.drop = check_names("drop", drop, found.names() | here | theirs)
        self.missing: dict[str, list[str]] = {}
        self.wrong: dict[str, None] = {}

    def state(self) -> Any:
        """The state, or an error that says all that is wrong."""
        self.check_losses()
        self.check_schedules()
        new = replaced(self.target, self.fresh, self.params, self.filled)
        if self.missing:
            self.wrong[
                f"{self.name} needs {listed(self.of_whom(self.missing))}, which cannot be derived"
                f" from {listed(self.found.names() - self.drop) or 'nothing'}."
            ] = None
        if self.wrong:
            raise ValueError(" ".join(self.wrong))
        return with_residuals_like(self.kinds, new, self.params)

    def of_whom(self, paths: Mapping[str, Collection[str]]) -> list[str]:
        """Buffers, and of which parameters unless it is all."""
        return [
            name if set(self.paths) <= set(some) or not some else f"{name} of {listed(some)}"
            for name, some in paths.items()
        ]

    # --- what has no place --------------------------------------------------------------------

    def check_losses(self) -> None:
        places_for: dict[str, set[str]] = {}
        for place in self.places:
            for name, tree in self.buffers[place.key].items():
                arrays = set(over(tree))
                here = arrays if arrays <= self.paths else self.covered[place.key] or self.paths
                places_for.setdefault(name, set()).update(here)
        frozen = frozen_in(self.places, self.buffers, self.paths)
        lost: dict[str, set[str]] = {}
        theirs = [(name, set(arrays)) for name, arrays in self.found.buffers.items()]
        theirs += [(name, set(of)) for name, values in self.found.of_tree.items() for of in values]
        for name, paths in theirs:
            without = paths - places_for.get(name, set()) - frozen
            if without:
                lost.setdefault(name, set()).update(without)
        held = [id(own) for own in self.held.values()]
        for own in self.found.own:
            if id(own) not in held and not own.kind.startswith("Inject"):
                for name in own.moved:
                    lost.setdefault(name, set()).update(own.covered)
        lost = {name: paths for name, paths in lost.items() if name not in self.drop}
        if lost:
            self.wrong[
                f"{self.name} has no place for {listed(self.of_whom(lost))}, which would be lost."
                f" It keeps {listed(places_for) or 'nothing'}. What may be lost is said with"
                f" drop={{{', '.join(map(repr, sorted(lost)))}}}."
            ] = None

    # --- counts -------------------------------------------------------------------------------

    def check_schedules(self) -> None:
        """A schedule that has a count to itself cannot move in with moments that have another."""
        apart = self.counts.schedules_apart()
        if apart and any(
            whose(place) == "moments" and place.has_schedules for place in self.places
        ):
            self.wrong[
                f"the counts in the state differ: {apart}; give count=. That of the schedule is"
                f" another than that of the moments, and {self.name} has one for both."
            ] = None

    def count(self, place: Place) -> int | None:
        """The count at a place that goes on; None, and it is wrong, where nobody knows it."""
        kept = covered_by(self.buffers[place.key], self.paths)
        count = self.counts.of(place, self.covered[place.key], kept)
        if isinstance(count, str):
            self.wrong[count] = None
            return None
        return count

    def starts_anew(self, place: Place) -> bool:
        """Whether it sees only parameters that were frozen until now."""
        covered = self.covered[place.key]
        return bool(covered) and covered <= self.found.frozen

    # --- one place ----------------------------------------------------------------------------

    def filled(self, place: Place) -> Any:
        if self.starts_anew(place):
            return place.state
        if place.kind.startswith("Inject"):
            return self.injected(place)
        fields = self.own_of(place)
        counting, buffers = count_of(place), self.buffers_of(place)
        if place.kind == "MultiStepsState" and not fields:
            counting = ("gradient_step",)
        if set(self.buffers[place.key]) & set(_STARTS) - set(buffers):
            counting = ()  # a wrapper that begins
        for field in counting:
            if (count := self.count(place)) is not None:
                fields[field] = jnp.asarray(count, getattr(place.state, field).dtype)
        state = with_buffers(place, buffers)
        return state._replace(**fields) if fields else state

    def buffers_of(self, place: Place) -> dict[str, Tree]:
        mine, new, missing = self.buffers[place.key], {}, []
        for name, tree in mine.items():
            taken = None if name in self.drop else self.taken(place, name, tree)
            if taken is not None:
                new[name] = taken
            elif name not in _STARTS:
                missing.append(name)
        if not missing or self.found.counts.are_zero(self.counts.given):
            return new
        if set(missing) & set(DERIVED) and (count := self.count(place)) is not None:
            made = derived(place, missing, new, count)
            new |= {name: self.cast_all(name, mine[name], tree) for name, tree in made.items()}
        for name in missing:
            if name in new or name in self.missing:
                continue
            if name in self.found.names() - self.drop and self.is_of_tree(place, name):
                where = self.name if name in self.found.buffers else self.found.name
                self.wrong[
                    f"{name!r} is one number of the tree, or of a group, in {where}, and elsewhere"
                    " in the other."
                ] = None
            else:
                self.missing.setdefault(name, []).extend(self.covered[place.key])
        return new

    def is_of_tree(self, place: Place, name: str) -> bool:
        """Whether a buffer is one number of several parameters, here or there."""
        here = not set(over(self.buffers[place.key][name])) <= self.paths
        return here or name in self.found.of_tree

    def taken(self, place: Place, name: str, tree: Tree) -> Tree | None:
        """A buffer of the source in the place of ``tree``; None where it is not there."""
        wanted = meaning_at(place, name, self.meanings)
        covered = self.covered[place.key]
        arrays = over(tree)
        if set(arrays) <= self.paths:
            there = self.found.buffers.get(name, {})
            without = [path for path in arrays if path not in there]
            if len(without) == len(arrays) > 0:
                return None
            if without and name not in _STARTS:
                self.missing.setdefault(name, []).extend(without)
                return tree

            def move(path: Any, old: Any) -> Any:
                key = path_of(path)
                if key in without:
                    return old
                return self.cast(name, path, old, self.converted(name, key, there[key], wanted))

            return jax.tree_util.tree_map_with_path(move, tree)
        there = self.found.of_tree.get(name, {})
        of = [paths for paths in there if paths == covered]
        if not of and isinstance(wanted, Meaning) and not wanted.is_of_gradients:
            of = self.those_of(name, covered)
        if not of:
            return None
        return self.cast_all(name, tree, self.converted(name, of[0], there[of[0]], wanted))

    def those_of(self, name: str, covered: frozenset[str]) -> list[frozenset[str]]:
        """Of whom there is a number that goes by the count alone, among some parameters."""
        there = self.found.of_tree.get(name, {})
        of = [paths for paths in there if paths & covered] if covered else list(there)
        values = [np.asarray(there[paths]) for paths in of]
        if any(not np.array_equal(value, values[0]) for value in values):
            self.wrong[
                f"{name!r} is {' and '.join(map(str, values))} for different groups of"
                f" {self.found.name}, and {self.name} has one for {listed(covered)}: give them"
                " groups of their own."
            ] = None
        return of

    def converted(
        self, name: str, path: str | frozenset[str], value: Any, wanted: Meaning | Unknown
    ) -> Any:
        """The value in the meaning that the target gives it."""
        if (name, path) not in self.found.meaning:
            return value
        held = self.found.meaning[name, path]
        factor = ratio(held, wanted)
        if self.found.is_altered and factor not in (1, -1):
            factor = "the learning rate is part of one of them only, and was changed by hand"
        if not isinstance(factor, str):
            return value if factor == 1 else jax.tree.map(lambda x: factor * x, value)
        here, there = wanted.made_by, held.made_by
        self.wrong[
            f"{name!r} means something else in {self.name} than in {self.found.name}: {factor}."
            f" Here it is made by {', '.join(here)}; there by {', '.join(there)}. Choose the"
            ' convention that the source follows: "optax" for states of optax, "torch" for those of'
            f" PyTorch; or let it be lost, drop={{{name!r}}}."
        ] = None
        return value

    def cast_all(self, name: str, old: Tree, new: Tree) -> Tree:
        return jax.tree_util.tree_map_with_path(functools.partial(self.cast, name), old, new)

    def cast(self, name: str, path: Any, old: Any, new: Any) -> Any:
        wrong = ""
        if np.shape(old) != np.shape(new):
            wrong = f"has shape {np.shape(new)}, it should be {np.shape(old)}."
        elif jnp.iscomplexobj(new) and not jnp.iscomplexobj(old):
            wrong = "is complex, it should be real."
        if not wrong:
            return _like(old, new)
        self.wrong[f"the buffer {name!r} at {path_of(path) or 'the only leaf'} {wrong}"] = None
        return old

    # --- what is no buffer --------------------------------------------------------------------

    def own_of(self, place: Place) -> dict[str, Any]:
        """What the transformation holds besides, if it is the same in the source."""
        if place.key not in self.held:
            return {}
        held = self.held[place.key]
        if place.kind == "MultiStepsState":
            self.check_accumulation(place, held)
        return jax.tree.map(_like, self.own[place.key].held, held.held)

    def check_accumulation(self, place: Place, theirs: Own) -> None:
        here, there = _multi_steps(place.owner), _multi_steps(theirs.place.owner)
        done, steps = int(theirs.held["mini_step"]), theirs.held["gradient_step"]
        every = here.get("_every_k_schedule")
        if done and every is not None and done >= int(every(steps)):
            self.wrong[
                f"the source has added up {done} gradients, and {self.name} takes a step after"
                f" {int(every(steps))}: convert after a step, when mini_step is 0."
            ] = None
        if done and here.get("_use_grad_mean") != there.get("_use_grad_mean"):
            self.wrong[
                "acc_grads is the mean of the gradients in one of the two, and their sum in the"
                " other (use_grad_mean of optax.MultiSteps): convert after a step, when mini_step"
                " is 0."
            ] = None

    def injected(self, place: Place) -> Any:
        """Hyperparameters are the target's; schedules go on where they were."""
        count = self.count(place)
        if count is None:
            return place.state
        fields: dict[str, Any] = {"count": jnp.asarray(count, place.state.count.dtype)}
        if hasattr(place.state, "hyperparams_states"):
            own = self.pairs.get(place.key)
            held = {} if own is None else own.held.get("hyperparams_states", {})
            fields["hyperparams_states"] = {
                name: _of_schedule(state, held.get(name), count)
                for name, state in place.state.hyperparams_states.items()
            }
        return place.state._replace(**fields)


def _of_schedule(fresh: Any, held: Any, count: int) -> Any:
    """The state of a schedule: optax's is a count, another's is its own matter."""
    if getattr(fresh, "_fields", ()) == ("count",):
        return fresh._replace(count=jnp.asarray(count, jnp.result_type(fresh.count)))
    same = type(fresh) is type(held) and jax.tree.structure(fresh) == jax.tree.structure(held)
    return held if same else fresh


def _multi_steps(owner: optax.GradientTransformation | None) -> Mapping[str, Any]:
    """The settings of a ``MultiSteps``."""
    while owner is not None:
        own = made_of(owner)
        if own is not None:
            owner = own.plain
            continue
        held = held_by(inspect.unwrap(owner.update))
        if "_every_k_schedule" in held:
            return held
        parts = held_in(owner)
        owner = parts[0][1] if len(parts) == 1 else None
    return {}


def _like(old: Any, new: Any) -> Any:
    """A copy in the dtype of ``old``, and where that is if ``new`` is on no device yet."""
    if not hasattr(old, "dtype") or jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return new
    made = jnp.array(new, old.dtype)
    if isinstance(old, jax.Array) and not isinstance(new, jax.Array):
        return jax.device_put(made, old.sharding)
    return made


def listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
