"""The buffers of a state, by name and parameter: taken out of one state and put into another.

What optimizers of one kind remember is the same everywhere, under other names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.counting import Counts, count_of
from adaptive_opt.checkpoints.meaning import Meaning, alike, meanings, rule_of
from adaptive_opt.checkpoints.places import Place, over, places, replaced
from adaptive_opt.core.bracket import AdaptiveState
from adaptive_opt.core.describe import describe, held_by
from adaptive_opt.core.observe import Observation
from adaptive_opt.core.trees import Tree

_DERIVED = ("nu_max", "rate_ema", "previous_gradient")
"""Buffers that can be started from the moments."""

PerParameter = Mapping[str, int] | Callable[[str], int]
"""A number for every parameter, by its path as ``jax.tree_util.keystr`` writes it."""


@dataclasses.dataclass
class Found:
    """What a state holds, wherever it holds it.

    Attributes:
      name: of the optimizer it is from.
      buffers: arrays by the name of the buffer and the path of the parameter.
      of_tree: what is there once for several parameters: their paths, and the value.
      meaning: of a buffer, by its name and the path; of one of several parameters, by "".
      counts: of gradients.
      own: what transformations hold that is no buffer, by the type of the state.
      skips_some: whether it freezes parameters, of which it then holds nothing.
    """

    name: str
    buffers: dict[str, dict[str, Any]]
    of_tree: dict[str, list[tuple[frozenset[str], Any]]]
    meaning: dict[tuple[str, str], Meaning | None]
    counts: Counts
    own: dict[str, list[dict[str, Any]]]
    skips_some: bool = False

    def names(self) -> set[str]:
        return {*self.buffers, *self.of_tree}


def found_in(optimizer: optax.GradientTransformation, state: Any, params: Tree) -> Found:
    """What a state of the optimizer holds."""
    there = places(optimizer, state)
    paths, known = set(over(params)), meanings(there)
    found = Found(describe(optimizer).name, {}, {}, {}, Counts(), {}, freezes(there))
    for place in there:
        mine = buffers_at(place, paths)
        covered = covered_by(mine.values(), paths)
        for name, tree in mine.items():
            meaning = known.get((place.key, name))
            arrays = over(tree)
            if set(arrays) <= paths:
                for path, x in arrays.items():
                    if path in found.buffers.setdefault(name, {}):
                        raise ValueError(
                            f"{found.name} has two buffers {name!r} of"
                            f" {path or 'the only parameter'}; which of them is which in another"
                            " optimizer nobody can tell."
                        )
                    found.buffers[name][path] = x
                    found.meaning[name, path] = meaning
            else:
                found.of_tree.setdefault(name, []).append((covered, tree))
                found.meaning[name, ""] = meaning
        found.counts.note(place, covered)
        own = own_of(place, mine)
        if own:
            found.own.setdefault(place.kind, []).append(own)
    return found


def put_together(
    target: optax.GradientTransformation,
    params: Tree,
    found: Mapping[str, Tree] | Found,
    count: int | PerParameter | None = None,
    source: optax.GradientTransformation | None = None,
    *,
    drop: Collection[str] = (),
) -> Any:
    """A state of ``target`` with buffers that were made elsewhere.

    Args:
      target: any nest of wrappers around optimizers.
      params: the parameters at this point.
      found: trees like the parameters by the name of the buffer (``mu``, ``nu``, ``velocity``).
        They may have no array (None, ``optax.MaskedNode``) for some parameters.
      count: how many gradients the buffers have seen; for every parameter another, if it is a
        mapping or a function of paths (those of ``jax.tree_util.keystr``): exact where ``target``
        counts them apart, in groups, and refused elsewhere.
      source: an optimizer of this library whose buffers mean what these do; None: they mean what
        those of ``target`` mean.
      drop: buffers that may be lost.

    Raises:
      ValueError: a buffer has no place, is missing, or means something else; all of it at once.
    """
    fresh = target.init(params)
    if not isinstance(found, Found):
        found = _given(found, source, params)
    return _Filling(target, fresh, params, found, count, set(drop)).state()


def _given(
    buffers: Mapping[str, Tree], source: optax.GradientTransformation | None, params: Tree
) -> Found:
    found = Found("the source", {}, {}, {}, Counts(), {})
    if source is not None:
        found = found_in(source, source.init(params), params)
        found = dataclasses.replace(found, buffers={}, of_tree={}, counts=Counts(), own={})
    is_masked = {"is_leaf": lambda x: isinstance(x, optax.MaskedNode)}
    for name, tree in buffers.items():
        tree = jax.tree.map(lambda x: None if isinstance(x, optax.MaskedNode) else x, tree,
                            **is_masked)  # fmt: skip
        found.buffers[name] = over(tree)
    return found


class _Filling:
    """A fresh state on its way to be one that goes on."""

    def __init__(
        self,
        target: optax.GradientTransformation,
        fresh: Any,
        params: Tree,
        found: Found,
        count: int | PerParameter | None,
        drop: set[str],
    ) -> None:
        self.target, self.fresh, self.found, self.drop = target, fresh, found, drop
        self.paths = list(over(params))
        self.name = describe(target).name
        self.places = places(target, fresh)
        self.meanings = meanings(self.places)
        self.counts = found.counts.at(count, self.paths)
        self.used: set[tuple[str, str]] = set()
        self.missing: dict[str, list[str]] = {}
        self.wrong: dict[str, None] = {}
        self.taken_over: dict[str, int] = {}

    def state(self) -> Any:
        with_place = {name for place in self.places for name in self.buffers_at(place)}
        lost = self.lost(with_place)
        if lost:
            raise ValueError(
                f"{self.name} has no place for {listed(lost)}, which would be lost. It keeps"
                f" {listed(with_place) or 'nothing'}. If it may be lost, say drop={set(lost)}."
            )
        new = replaced(self.target, self.fresh, self.filled)
        if self.missing:
            raise ValueError(self.says_missing())
        if self.wrong:
            raise ValueError(" ".join(self.wrong))
        return new

    def buffers_at(self, place: Place) -> dict[str, Tree]:
        return buffers_at(place, set(self.paths))

    # --- what has no place --------------------------------------------------------------------

    def lost(self, with_place: set[str]) -> list[str]:
        lost = [*sorted(self.found.names() - with_place - self.drop)]
        covered: dict[str, set[str]] = {}
        for place in self.places:
            for name, tree in self.buffers_at(place).items():
                covered.setdefault(name, set()).update(over(tree))
        kept = set().union(*covered.values()) if covered else set()
        frozen = set(self.paths) - kept if freezes(self.places) else set()
        for name, arrays in self.found.buffers.items():
            if name in covered and name not in self.drop and name not in lost:
                without = sorted(set(arrays) & set(self.paths) - covered[name] - frozen)
                if without and not set(over(self.of_tree(name))) - set(self.paths):
                    lost.append(f"{name} of {listed(without)}")
        kinds = [place.kind for place in self.places]
        for kind, states in self.found.own.items():
            if kinds.count(kind) != len(states):
                lost += [n for n in _numbers_in(states) if n not in self.drop]
        return lost

    def of_tree(self, name: str) -> Tree:
        return next(b[name] for b in map(self.buffers_at, self.places) if name in b)

    def says_missing(self) -> str:
        parts = []
        for name, paths in self.missing.items():
            all_of_them = not self.found.buffers.get(name)
            parts.append(name if all_of_them else f"{name} of {listed(paths)}")
        return (
            f"{self.name} needs {listed(parts)}, which cannot be derived from"
            f" {listed(self.found.names() - self.drop) or 'nothing'}."
        )

    # --- one place ----------------------------------------------------------------------------

    def filled(self, place: Place) -> Any:
        mine = self.buffers_at(place)
        covered = covered_by(mine.values(), set(self.paths))
        if place.kind.startswith("Inject"):
            return self.injected(place)
        if self.starts_anew(covered, mine):
            return place.state
        count = self.counts.of(place, covered) if count_of(place) else 0
        if isinstance(count, str):
            self.wrong[count] = None
            return place.state
        buffers, missing = {}, []
        for name, tree in mine.items():
            if name == "slow" and name not in self.found.names():
                continue  # they start at the parameters
            taken = self.taken(place, name, tree, covered)
            if taken is None:
                missing.append(name)
            else:
                buffers[name] = taken
        new = place
        if missing and count != 0:
            derived = self.derived(place, missing, buffers, count)
            for name in missing:
                if name not in derived:
                    self.missing.setdefault(name, []).extend(sorted(covered))
            buffers |= derived
        state = with_buffers(new, buffers)
        fields = self.own(place) if self.is_own(place) else {}
        for field in count_of(place):
            fields[field] = jnp.asarray(count, getattr(place.state, field).dtype)
        if place.kind == "MultiStepsState" and "mini_step" not in fields:
            steps = self.counts.of(place, covered)
            if isinstance(steps, str):
                self.wrong[steps] = None
            else:
                fields["gradient_step"] = jnp.asarray(steps, place.state.gradient_step.dtype)
        return state._replace(**fields) if fields else state

    def starts_anew(self, covered: frozenset[str], mine: Mapping[str, Tree]) -> bool:
        """Parameters that were frozen until now, in a group of their own."""
        if not mine or not self.found.skips_some or "slow" in mine:
            return False
        known = {path for arrays in self.found.buffers.values() for path in arrays}
        return bool(known) and bool(covered) and not covered & known

    def taken(self, place: Place, name: str, tree: Tree, covered: frozenset[str]) -> Tree | None:
        """A buffer of the source in the place of ``tree``; None where it is not there."""
        if name in self.drop:
            return None
        wanted = self.meanings.get((place.key, name))
        arrays = over(tree)
        if set(arrays) <= set(self.paths):
            there = self.found.buffers.get(name, {})
            without = [path for path in arrays if path not in there]
            if len(without) == len(arrays):
                return None if arrays else tree
            if without:
                self.missing.setdefault(name, []).extend(without)
                return tree
            new = {}
            for path, old in arrays.items():
                new[path] = self.converted(name, path, there[path], wanted)
            at = lambda p, old: _cast(name, p, old, new[jax.tree_util.keystr(p)])
            return jax.tree_util.tree_map_with_path(at, tree)
        whole = [value for paths, value in self.found.of_tree.get(name, ()) if paths == covered]
        if not whole:
            return None
        value = self.converted(name, "", whole[0], wanted)
        return jax.tree_util.tree_map_with_path(lambda p, old, x: _cast(name, p, old, x), tree,
                                                value)  # fmt: skip

    def converted(self, name: str, path: str, value: Any, wanted: Meaning | None) -> Any:
        """The value in the meaning that the target gives it."""
        if (name, path) not in self.found.meaning:
            return value
        held = self.found.meaning[name, path]
        factor = ratio(held, wanted)
        if isinstance(factor, str):
            here, there = (m.made_by if m else ("nobody knows",) for m in (wanted, held))
            self.wrong[
                f"{name!r} means something else in {self.name} than in {self.found.name}:"
                f" {factor}. Here it is made by {', '.join(here)}; there by {', '.join(there)}."
                ' Choose the convention that the source follows: "optax" for states of optax,'
                f' "torch" for those of PyTorch; or drop={{{name!r}}}, if it can be derived or'
                " lost."
            ] = None
            return value
        return value if factor == 1 else jax.tree.map(lambda x: factor * x, value)

    def derived(
        self, place: Place, missing: list[str], buffers: Mapping[str, Tree], count: int
    ) -> dict[str, Tree]:
        derived = {}
        if "previous_gradient" in missing and "mu" in buffers:
            derived["previous_gradient"] = jax.tree.map(jnp.copy, buffers["mu"])
        others = set(missing) & {"nu_max", "rate_ema"}
        if others and "nu" in buffers and place.owner is not None:
            made = _derived(place.owner, buffers["nu"], count)
            like = self.buffers_at(place)
            derived |= {
                name: jax.tree.map(lambda old, x: jnp.array(x, old.dtype), like[name], made[name])
                for name in others
            }
        return derived

    # --- what is no buffer --------------------------------------------------------------------

    def is_own(self, place: Place) -> bool:
        """Whether the source has as many such states, so that this one is known."""
        same = [p for p in self.places if p.kind == place.kind]
        return len(self.found.own.get(place.kind, ())) == len(same)

    def own(self, place: Place) -> dict[str, Any]:
        index = self.taken_over.get(place.kind, 0)
        self.taken_over[place.kind] = index + 1
        held = self.found.own[place.kind][index]
        mine = own_of(place, self.buffers_at(place))
        if jax.tree.structure(held) != jax.tree.structure(mine):
            return {}
        if place.kind == "MultiStepsState" and held["mini_step"] and place.owner is not None:
            self.check_accumulation(place, held)
        return jax.tree.map(lambda old, x: _like(old, x), mine, held)

    def check_accumulation(self, place: Place, held: Mapping[str, Any]) -> None:
        every = held_by(place.owner.update).get("_every_k_schedule")  # pyright: ignore
        if every is None:
            every = held_by(place.owner.init).get("_every_k_schedule")  # pyright: ignore
        k = None if every is None else int(every(held["gradient_step"]))
        if k is not None and k <= int(held["mini_step"]):
            self.wrong[
                f"the source has added up {int(held['mini_step'])} gradients, and {self.name} takes"
                f" a step after {k}: convert after a step, when mini_step is 0."
            ] = None

    def injected(self, place: Place) -> Any:
        """Hyperparameters are the target's; schedules go on where they were."""
        count = self.counts.of(place, frozenset())
        if isinstance(count, str):
            self.wrong[count] = None
            return place.state
        fields = {"count": jnp.asarray(count, place.state.count.dtype)}
        if hasattr(place.state, "hyperparams_states"):
            theirs = [o.get("hyperparams_states", {}) for o in self.found.own.get(place.kind, ())]
            of_source = theirs[0] if len(theirs) == 1 else {}
            fields["hyperparams_states"] = {
                name: self.of_schedule(state, of_source.get(name), count)
                for name, state in place.state.hyperparams_states.items()
            }
        return place.state._replace(**fields)

    @staticmethod
    def of_schedule(fresh: Any, held: Any, count: int) -> Any:
        if getattr(fresh, "_fields", ()) == ("count",):
            return fresh._replace(count=jnp.asarray(count, fresh.count.dtype))
        same = type(fresh) is type(held) and jax.tree.structure(fresh) == jax.tree.structure(held)
        return held if same else fresh


def _numbers_in(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """The fields that hold numbers which are neither counts nor 0: something would be lost."""
    names: dict[str, None] = {}
    for state in states:
        for name, value in state.items():
            if name in ("hyperparams", "hyperparams_states", "last_finite"):
                continue
            for leaf in jax.tree.leaves(value):
                dtype = getattr(leaf, "dtype", None)
                is_number = dtype is not None and jnp.issubdtype(dtype, jnp.inexact)
                if is_number and bool(np.any(np.asarray(leaf) != 0)):
                    names[name] = None
    return list(names)


def ratio(held: Meaning | None, wanted: Meaning | None) -> float | str:
    """By what a buffer is to be multiplied to mean what is wanted; or why that cannot be."""
    if held is None or wanted is None:
        return 1.0 if held is wanted else "what it is made of is not known of both"
    if alike(held.value, wanted.value):
        sign = 1.0
    elif alike(held.value, wanted.mirrored):
        sign = -1.0
    else:
        return "it is made of something else, or in another order"
    if bool(held.factors) == bool(wanted.factors):
        return sign
    inside = held if held.factors else wanted
    where = "there" if held.factors else "here"
    if not inside.is_linear:
        return f"the learning rate is part of it {where} only"
    rate = held.factors if held.factors else held.of_update
    if any(callable(x) or not isinstance(x, (int, float, np.number)) for x in rate):
        return (
            f"the learning rate is part of it {where} only, and follows a schedule, so that every"
            " gradient in it has another"
        )
    product = abs(math.prod(float(x) for x in rate))
    if product == 0:
        return f"the learning rate is part of it {where} only, and is 0"
    return sign / product if held.factors else sign * product


def buffers_at(place: Place, paths: Collection[str]) -> dict[str, Tree]:
    """The buffers at a place, by their names in this library."""
    if place.kind == "MultiStepsState":
        return {}
    rule = rule_of(place)
    names = rule[1] if rule else {}
    state = place.state
    held = state.buffers if isinstance(state, AdaptiveState) else place.fields()
    found = {}
    for name, value in held.items():
        if isinstance(value, Observation) or (name == "count" and not isinstance(state, dict)):
            continue  # what was seen of one optimizer says nothing of another
        arrays = over(value)
        is_over = set(arrays) <= set(paths) and all(map(_is_inexact, arrays.values()))
        if rule is not None or (arrays and is_over) or (name == "slow"):
            found[names.get(name, name)] = value
    return found


def with_buffers(place: Place, buffers: Mapping[str, Tree]) -> Any:
    """The state at a place with other buffers."""
    rule = rule_of(place)
    old = {new: name for name, new in (rule[1] if rule else {}).items()}
    fields = {old.get(name, name): value for name, value in buffers.items()}
    if isinstance(place.state, AdaptiveState):
        return place.state._replace(buffers=place.state.buffers | fields)
    return place.with_fields(**fields)


def own_of(place: Place, buffers: Mapping[str, Tree]) -> dict[str, Any]:
    """What a transformation holds beside buffers and counts of gradients."""
    if rule_of(place) is not None or isinstance(place.state, (AdaptiveState, dict)):
        return {}
    fields = place.fields().items()
    return {n: v for n, v in fields if n not in buffers and n not in count_of(place)}


def covered_by(trees: Iterable[Tree], paths: Collection[str]) -> frozenset[str]:
    """The parameters of which there are buffers."""
    return frozenset(path for tree in trees for path in over(tree) if path in paths)


def freezes(there: Iterable[Place]) -> bool:
    """Whether some parameters get no update, and nothing is kept of them."""
    return any(place.within and place.name == "set_to_zero" for place in there)


def _derived(owner: optax.GradientTransformation, nu: Tree, count: int) -> dict[str, Tree]:
    """The maximum and the rate of a step that leaves the second moment as it is.

    The gradient sqrt(v) does: b2 v + (1 - b2) v = v. The average of rates is linear in what it was,
    so that two steps, from 0 and from 1, tell the rate; in float64, because b3 is close to 1. All
    of it is calculated where the second moment is, split as it is.
    """
    with jax.enable_x64(True):
        nu = jax.tree.map(lambda v: jnp.asarray(v).astype(np.float64), nu)
        nowhere = jax.tree.map(jnp.zeros_like, nu)  # where nothing decays
        fresh = Place((), owner.init(nowhere), owner)
        paths, gradient = over(nu), jax.tree.map(jnp.sqrt, nu)

        def after(start: float) -> dict[str, Tree]:
            started = {
                name: jax.tree.map(lambda x: jnp.full_like(x, start), buffer)
                for name, buffer in buffers_at(fresh, paths).items()
                if name in ("nu_max", "rate_ema")
            }
            state = with_buffers(fresh, {"nu": nu, **started})
            state = state._replace(count=jnp.asarray(count - 1, state.count.dtype))
            new = Place((), owner.update(gradient, state, nowhere)[1], owner)
            return buffers_at(new, paths)

        zero, one = after(0.0), after(1.0)
        made = {"nu_max": zero["nu_max"]} if "nu_max" in zero else {}
        if "rate_ema" in zero:
            made["rate_ema"] = jax.tree.map(
                lambda s0, s1, v: jnp.where(v == 0, 0.0, s0 / (1 - (s1 - s0))),
                *(zero["rate_ema"], one["rate_ema"], nu),
            )
        return made


def _cast(name: str, path: Any, old: Any, new: Any) -> Any:
    where = jax.tree_util.keystr(path) or "the only leaf"
    if np.shape(old) != np.shape(new):
        raise ValueError(
            f"the buffer {name!r} at {where} has shape {np.shape(new)}, it should be"
            f" {np.shape(old)}."
        )
    if jnp.iscomplexobj(new) and not jnp.iscomplexobj(old):
        raise ValueError(f"the buffer {name!r} at {where} is complex, it should be real.")
    return _like(old, new)


def _like(old: Any, new: Any) -> Any:
    """A copy in the dtype of ``old`` and, unless it is split over devices already, where that is."""
    if not hasattr(old, "dtype") or jnp.issubdtype(old.dtype, jax.dtypes.prng_key):
        return new
    made = jnp.array(new, old.dtype)
    if isinstance(old, jax.Array) and not isinstance(new, jax.Array):
        return jax.device_put(made, old.sharding)
    return made


def _is_inexact(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact)


def listed(names: Any) -> str:
    return ", ".join(sorted(map(str, names)))
