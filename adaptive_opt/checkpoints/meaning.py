"""What a buffer means: found by asking the lines that make it.

A name says little: ``velocity`` is a sum of gradients, or of steps; the maximum in ``nu_max`` is
over raw or over corrected moments. So the lines of an optimizer are run once, on numbers made up
for the purpose, the same for every optimizer: the gradients, what was remembered, and the values
of all hyperparameters, for a buffer means the same with another decay. Two buffers mean the same if
the same comes out.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import zlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptive_opt.checkpoints.places import Place, lanes
from adaptive_opt.checkpoints.rules import rule_of
from adaptive_opt.core import checks
from adaptive_opt.core.describe import describe, held_by, made_of
from adaptive_opt.core.look import init_buffers
from adaptive_opt.core.now import Correction, Now
from adaptive_opt.core.tree import OpenStep, run


class Factor(NamedTuple):
    """A hyperparameter that multiplies.

    Attributes:
      kind: what it is: the learning rate, perhaps.
      by: the stage, and what that calls it.
      value: a number, or a schedule.
    """

    kind: str
    by: tuple[str, str]
    value: Any


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What became of made-up numbers.

    Attributes:
      value: what the buffer holds after the made-up step, where every factor of it is 1.
      mirrored: minus that, from minus the buffer.
      factors: the hyperparameters that multiply whatever comes in.
      of_update: those that multiply the update.
      is_linear: whether twice the factors make twice the buffer.
      is_of_gradients: whether other gradients make another buffer.
      initial: what it is before the first step.
      is_corrected: whether the update is another at a later step: for its start, it may be.
      made_by: the stages up to the one that keeps it.
    """

    value: np.ndarray
    mirrored: np.ndarray
    factors: tuple[Factor, ...]
    of_update: tuple[Factor, ...]
    is_linear: bool
    is_of_gradients: bool
    initial: np.ndarray
    is_corrected: bool
    made_by: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Unknown:
    """A buffer whose lines do not bear made-up numbers, or that has none.

    Attributes:
      made_by: the names of its place.
      incoming: what of made-up numbers comes there, if that is known.
    """

    made_by: tuple[str, ...]
    incoming: np.ndarray | None = None

    def is_alike(self, other: Meaning | Unknown) -> bool:
        if not isinstance(other, Unknown) or self.made_by != other.made_by:
            return False
        if self.incoming is None or other.incoming is None:
            return self.incoming is other.incoming
        return alike(self.incoming, other.incoming)


Known = Mapping[tuple[Any, str | None], Meaning | Unknown]


def meanings(found: Sequence[Place], buffers: Mapping[Any, Collection[str]]) -> Known:
    """The meaning of every buffer of the places, by the key of the place and the buffer's name.

    Where nobody knows what is done to a gradient, but something is remembered: under None.
    """
    remembering = frozenset(p.key for p in found if p.inner is None and buffers.get(p.key))
    return _meanings(tuple(dataclasses.replace(p, state=None) for p in found), remembering)


def meaning_at(place: Place, name: str, known: Known) -> Meaning | Unknown:
    """The meaning of a buffer at one of the places of ``known``."""
    for key in ((place.key, name), (place.key, None)):
        if key in known:
            return known[key]
    return Unknown(_names_at(place))


def _names_at(place: Place) -> tuple[str, ...]:
    if place.owner is None or place.inner is not None:
        return (place.kind,)
    return tuple(stage.name for stage in describe(place.owner).stages())


@functools.lru_cache(maxsize=256)
def _meanings(found: tuple[Place, ...], remembering: frozenset[Any]) -> Known:
    known: dict[tuple[Any, str | None], Meaning | Unknown] = {}
    with jax.enable_x64(True):
        for places in lanes(list(found)):
            lane = _Lane(places, remembering)
            try:
                of_lane = lane.meanings()
            except Exception:  # a user's line need not bear numbers that are made up
                continue
            for key, meaning in of_lane.items():
                known.setdefault(key, meaning)
    return known


_UPDATE = (None, "update")
_SHAPES = {"a": (5,), "b": (2, 3)}
_ANY = 0.37


class _Lane:
    """The places on the way of one gradient, and what they make of made-up numbers."""

    def __init__(self, lane: Sequence[Place], remembering: Collection[Any]) -> None:
        self.lane, self.remembering = lane, remembering
        self.asked: dict[Any, Any] = {}
        """Hyperparameters by where they are asked for, filled by a run."""
        self.by: dict[Any, str] = {}
        """Whose they are."""
        self.remembered: dict[Any, dict[str, Any]] = {}
        self.initial: dict[Any, np.ndarray] = {}

    def meanings(self) -> dict[tuple[Any, str | None], Meaning | Unknown]:
        first = self.run({})
        found: dict[tuple[Any, str | None], Meaning | Unknown] = {
            (place.key, None): Unknown(_names_at(place), self.incoming[place.key])
            for place in self.lane
            if place.key in self.incoming
        }
        empty, other = self.run({}, scale=0.0), self.run({}, gradient="another gradient")
        later, as_given = self.run({}, count=4), self.run({}, as_given=True)
        of_whom: dict[Any, list[Any]] = {key: [] for key in first}
        for asked in list(self.asked):
            doubled = self.run({asked: 2 * self.value(asked)}, scale=0.0)
            for key, before in empty.items():
                if np.any(before) and alike(doubled[key], 2 * before):
                    of_whom[key].append(asked)
        for key in first:
            if key == _UPDATE:
                continue
            ones = {asked: math.copysign(1.0, self.value(asked)) for asked in of_whom[key]}
            twice = {asked: 2 * value for asked, value in list(ones.items())[:1]}
            value, minus = self.run(ones)[key], self.run(ones, scale=-1.0, of=key)[key]
            is_of_gradients = not alike(first[key], other[key])
            if not is_of_gradients:  # it goes by the hyperparameters alone, so they matter
                value = as_given[key]
            more = self.run({**ones, **twice}, scale=2.0, of=key)[key]
            found[key] = Meaning(
                value,
                -minus,
                tuple(map(self.factor, of_whom[key])),
                tuple(map(self.factor, of_whom[_UPDATE])),
                bool(twice) and alike(more, 2 * value),
                is_of_gradients,
                self.initial[key],
                not alike(first[_UPDATE], later[_UPDATE]),
                self.made_by[key],
            )
        return found

    def factor(self, asked: Any) -> Factor:
        named = isinstance(asked, _Asked) and asked.name not in ("rate", "learning_rate", "factor")
        name = asked.name if isinstance(asked, _Asked) else ""
        return Factor(asked.name if named else RATE, (self.by[asked], name), self.asked[asked])

    def value(self, asked: Any) -> float:
        """What is made up for a hyperparameter."""
        return _ANY if isinstance(asked, _Asked) else _value(self.asked[asked])

    def run(
        self,
        values: Mapping[Any, float],
        scale: float = 1.0,
        of: Any = None,
        gradient: str = "gradient",
        count: int = 3,
        as_given: bool = False,
    ) -> dict[Any, np.ndarray]:
        """The buffers after a step with these values; what was remembered scaled, all or one."""
        made: dict[Any, np.ndarray] = {}
        self.made_by: dict[Any, tuple[str, ...]] = {}
        self.incoming: dict[Any, np.ndarray] = {}
        stages: list[str] = []
        flow, opened = _made_up(gradient, _SHAPES), None
        for place in self.lane:
            if place.kind == "OpenStepState":
                opened = OpenStep(
                    _Asking(count, place, self.asked, None if as_given else values),
                    flow,
                    self.params,
                )
            elif opened is not None and place.name == "close_step":
                flow, opened = opened.close(), None
            elif (rule := rule_of(place)) is not None:
                lines, _ = rule
                now = _Asking(count, place, self.asked, None if as_given else values)
                step: Any = opened or OpenStep(now, flow, self.params)
                step.now.turns.clear()
                step.now.all_settings.clear()
                kept = self.made_up_buffers(place, lines, flat=opened is not None)
                for name in kept:
                    f = scale if of is None or of == (place.key, name) else 1.0
                    kept[name] = jax.tree.map(lambda x, f=f: f * x, kept[name])
                first = len(stages)
                stages += [line.stage for line in lines]
                after = run(lines, step, kept)
                for asked in self.asked:
                    if isinstance(asked, _Asked) and asked.place == place.key:
                        turn = min(asked.turn, len(step.now.turns) - 1)
                        self.by[asked] = stages[first + max(turn, 0)]
                for name, buffer in after.items():
                    turn = step.now.turns.index(step.now.keepers[name]) + 1
                    made[place.key, name] = _flat(buffer)
                    self.made_by[place.key, name] = tuple(stages[: first + turn])
                flow = flow if opened is not None else step.close()
            elif (factor := _scale_of(place)) is not None:
                value = _value(factor)
                if abs(value) != 1:
                    self.asked[place.key], self.by[place.key] = factor, place.name
                    value = values.get(place.key, value)
                flow = jax.tree.map(lambda x, f=value: f * x, flow)
            elif place.key in self.remembering:  # what it makes of a gradient, nobody knows
                self.incoming[place.key] = _flat(flow)
                made_of_it = _made_up(f"made by {'/'.join(_names_at(place))}", _SHAPES)
                flow = jax.tree.map(lambda x, f: f * x, flow, made_of_it)
        return made | {_UPDATE: _flat(flow)}

    @functools.cached_property
    def params(self) -> Any:
        return _made_up("param", _SHAPES)

    def made_up_buffers(self, place: Place, lines: Any, *, flat: bool) -> dict[str, Any]:
        if place.key not in self.remembered:
            start = init_buffers(lines, self.params, lenient=flat)
            self.initial |= {(place.key, name): _flat(start[name]) for name in start}
            self.remembered[place.key] = {
                name: _made_up(name, jax.tree.map(jnp.shape, buffer))
                for name, buffer in start.items()
            }
        return dict(self.remembered[place.key])


class _Asked(NamedTuple):
    """Where a line asks for a hyperparameter."""

    place: Any
    turn: int
    name: str


RATE = "the learning rate"


class _Asking(Now):
    """A step at which every hyperparameter has a made-up value, and notes who is asked for.

    Without values, hyperparameters have those that they were given.
    """

    def __init__(
        self, count: int, place: Place, asked: dict[Any, Any], values: Mapping[Any, float] | None
    ) -> None:
        self.place, self.asked, self.given = place.key, asked, values
        self.turns: list[object] = []
        self.all_settings: list[Mapping[str, Any]] = []
        super().__init__(jnp.asarray(count, np.int32), looking=True)

    def begin(self, turn: object, stage: str, settings: Mapping[str, Any]) -> None:
        if turn not in (None, *self.turns[-1:]):
            self.turns.append(turn)
            self.all_settings.append(settings)
        super().begin(turn, stage, settings)

    def at(self, hyperparameter: Any) -> Any:
        turn, name = self.whose(hyperparameter)
        if not name and isinstance(hyperparameter, jax.Array):
            return hyperparameter  # a value, and no hyperparameter
        if self.given is None or name == "dampening":  # which says how much is in the sum
            return checks.value_at(hyperparameter, self.count)
        if name.startswith("eps") and checks.is_zero(hyperparameter):
            return 0.0  # there is none
        asked = _Asked(self.place, turn, name)
        self.asked[asked] = hyperparameter
        return self.given.get(asked, _ANY)

    def whose(self, hyperparameter: Any) -> tuple[int, str]:
        """The line that was given it, and as what; a rule asks when another line's turn is."""
        for turn in reversed(range(len(self.all_settings))):
            for name, value in self.all_settings[turn].items():
                if value is hyperparameter:
                    return turn, name
        return len(self.turns), ""

    def correction(self, decay: Any, which: Correction) -> Any:
        return 1 - self.at(decay) ** (int(self.count) + which.ahead)


def _scale_of(place: Place) -> Any:
    """The factor of a transformation that does nothing but multiply; of a schedule its function."""
    if place.owner is None:
        return None
    own = made_of(place.owner)
    if own is not None and own.name == "scale_by_learning_rate":
        rate = own.settings["learning_rate"]
        return checks.scaled(rate, -1.0) if own.settings["flip_sign"] else rate
    held = held_by(inspect.unwrap(place.owner.update))
    if place.name == "scale":
        return held["step_size"]
    return held["step_size_fn"] if place.name == "scale_by_schedule" else None


def _value(factor: Any) -> float:
    """A made-up value of the same sign; 1 and -1 stay, for they are no learning rate."""
    if callable(factor):
        schedule: Any = factor
        samples = (float(schedule(jnp.asarray(count))) for count in (0, 1, 10, 100, 1000))
        return math.copysign(_ANY, next((x for x in samples if x), 1.0))
    return float(factor) if abs(float(factor)) == 1 else math.copysign(_ANY, float(factor))


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def _made_up(name: str, shapes: Any) -> Any:
    """Numbers that go by a name, from 0.01 to 2: some outweigh a gradient, and some do not.

    The first is 0: a weight that has seen no gradient.
    """

    def draw(shape: tuple[int, ...]) -> jax.Array:
        rng = np.random.default_rng([zlib.crc32(name.encode()), math.prod(shape)])
        numbers = 10 ** rng.uniform(-2, 0.3, shape)
        if shape:
            numbers.flat[0] = 0.0
        return jnp.asarray(numbers, np.float64)

    return jax.tree.map(draw, shapes, is_leaf=lambda x: isinstance(x, tuple))


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=0)
