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
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from adaptive_opt.checkpoints.places import Place, lanes
from adaptive_opt.core import checks
from adaptive_opt.core.describe import describe, held_by, made_of
from adaptive_opt.core.look import init_buffers
from adaptive_opt.core.now import Correction, Now
from adaptive_opt.core.observe import Watch
from adaptive_opt.core.stage import lines_of
from adaptive_opt.core.tree import OpenStep, run
from adaptive_opt.stages.averages import belief_moment
from adaptive_opt.stages.directions import lion_direction
from adaptive_opt.stages.moments import (
    amsgrad_max,
    centered_moment,
    debias,
    first_moment,
    heavy_ball,
    infinity_moment,
    second_moment,
    sum_of_squares,
)
from adaptive_opt.stages.rates import adadelta_units, inverse_rate, per_weight_rate

_B = 0.5  # whatever it is, it is not asked for


@dataclasses.dataclass(frozen=True)
class AsStages:
    """A transformation of optax as the stages that compute the same, and what it calls buffers."""

    stages: Callable[[Mapping[str, Any]], Sequence[Any]]
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)


def _rms(held: Mapping[str, Any], *more: Any) -> tuple[Any, ...]:
    correction = (debias(b2=_B),) if held.get("bias_correction") else ()
    eps = (0.0, held["eps"]) if held.get("eps_in_sqrt", True) else (held["eps"], 0.0)
    return (
        second_moment(_B, initial=held["initial_scale"]),
        *more,
        *correction,
        per_weight_rate(*eps),
    )


_ADAM = first_moment(_B), second_moment(_B), debias(_B, _B), per_weight_rate(_B)
OPTAX = {
    "scale_by_adam": AsStages(lambda _: _ADAM),
    "scale_by_radam": AsStages(lambda _: _ADAM),
    "scale_by_amsgrad": AsStages(lambda _: (*_ADAM[:3], amsgrad_max(), _ADAM[3])),
    "scale_by_belief": AsStages(
        lambda held: (_ADAM[0], belief_moment(_B, held["eps_root"]), *_ADAM[2:])
    ),
    "scale_by_adamax": AsStages(
        lambda held: (_ADAM[0], debias(_B), infinity_moment(_B, held["eps"]), inverse_rate()),
        {"nu": "infinity_norm"},
    ),
    "scale_by_lion": AsStages(lambda _: (lion_direction(_B, _B),)),
    "scale_by_rms": AsStages(_rms),
    "scale_by_stddev": AsStages(
        lambda held: _rms(held, centered_moment(_B)), {"mu": "mean_gradient"}
    ),
    "scale_by_rss": AsStages(
        lambda held: (
            sum_of_squares(initial=held["initial_accumulator_value"]),
            per_weight_rate(0.0, _B),
        )
    ),
    "scale_by_adadelta": AsStages(
        lambda held: (
            second_moment(_B),
            per_weight_rate(0.0, held["eps"]),
            adadelta_units(_B, held["eps"]),
        ),
        {"e_g": "nu", "e_x": "step_ema"},
    ),
    "trace": AsStages(
        lambda held: (heavy_ball(_B, nesterov=held["nesterov"]),), {"trace": "velocity"}
    ),
}
"""Tests compare the states of both, buffer by buffer."""


def rule_of(place: Place) -> tuple[tuple[Any, ...], Mapping[str, str]] | None:
    """The lines of the stages at a place, and other names of buffers; None: nobody knows them."""
    if place.owner is None:
        return None
    own = made_of(place.owner)
    if own is not None:
        parts = own.parts if own.name == "adaptive" else (place.owner,)
        lines = [line for part in parts or () for line in lines_of(part) or ()]
        return (tuple(x for x in lines if not isinstance(x, Watch)), {}) if lines else None
    known = OPTAX.get(place.name)
    if known is None:
        return None
    held = {**held_by(place.owner.init), **held_by(inspect.unwrap(place.owner.update))}
    stages = known.stages(held)
    return tuple(line for stage in stages for line in lines_of(stage) or ()), known.names


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What became of made-up numbers.

    Attributes:
      value: what the buffer holds after the made-up step, where every factor of it is 1.
      mirrored: minus that, from minus the buffer.
      factors: the hyperparameters that multiply whatever comes in, each with its kind: a learning
        rate, perhaps.
      of_update: those that multiply the update.
      is_linear: whether twice the factors make twice the buffer.
      is_of_gradients: whether other gradients make another buffer.
      initial: what it is before the first step.
      is_corrected: whether the update is another at a later step: for its start, it may be.
      made_by: the stages up to the one that keeps it.
    """

    value: np.ndarray
    mirrored: np.ndarray
    factors: tuple[tuple[str, Any], ...]
    of_update: tuple[tuple[str, Any], ...]
    is_linear: bool
    is_of_gradients: bool
    initial: np.ndarray
    is_corrected: bool
    made_by: tuple[str, ...]


class Unknown(NamedTuple):
    """A buffer whose lines do not bear made-up numbers, or has none: the names of its place."""

    made_by: tuple[str, ...]


def unknown_at(place: Place) -> Unknown:
    if place.owner is None or place.inner is not None:
        return Unknown((place.kind,))
    return Unknown(tuple(stage.name for stage in describe(place.owner).stages()))


def meanings(found: Sequence[Place]) -> Mapping[tuple[Any, str], Meaning]:
    """The meaning of every buffer of the places, by the key of the place and the buffer's name."""
    return _meanings(tuple(dataclasses.replace(place, state=None) for place in found))


@functools.lru_cache(maxsize=256)
def _meanings(found: tuple[Place, ...]) -> Mapping[tuple[Any, str], Meaning]:
    known: dict[tuple[Any, str], Meaning] = {}
    with jax.enable_x64(True):
        for lane in lanes(list(found)):
            try:
                of_lane = _Lane(lane).meanings()
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

    def __init__(self, lane: Sequence[Place]) -> None:
        self.lane = lane
        self.asked: dict[Any, Any] = {}
        """Hyperparameters by where they are asked for, filled by a run."""
        self.remembered: dict[Any, dict[str, Any]] = {}
        self.initial: dict[Any, np.ndarray] = {}

    def meanings(self) -> dict[tuple[Any, str], Meaning]:
        first = self.run({})
        empty, other = self.run({}, scale=0.0), self.run({}, gradient="another gradient")
        later, as_given = self.run({}, count=4), self.run({}, as_given=True)
        of_whom: dict[Any, list[Any]] = {key: [] for key in first}
        for asked in list(self.asked):
            doubled = self.run({asked: 2 * self.value(asked)}, scale=0.0)
            for key, before in empty.items():
                if np.any(before) and _alike(doubled[key], 2 * before):
                    of_whom[key].append(asked)
        found = {}
        for key in first:
            if key == _UPDATE:
                continue
            ones = {asked: math.copysign(1.0, self.value(asked)) for asked in of_whom[key]}
            twice = {asked: 2 * value for asked, value in list(ones.items())[:1]}
            value, minus = self.run(ones)[key], self.run(ones, scale=-1.0, of=key)[key]
            is_of_gradients = not _alike(first[key], other[key])
            if not is_of_gradients:  # it goes by the hyperparameters alone, so they matter
                value = as_given[key]
            more = self.run({**ones, **twice}, scale=2.0, of=key)[key]
            found[key] = Meaning(
                value,
                -minus,
                tuple((_kind(asked), self.asked[asked]) for asked in of_whom[key]),
                tuple((_kind(asked), self.asked[asked]) for asked in of_whom[_UPDATE]),
                bool(twice) and _alike(more, 2 * value),
                is_of_gradients,
                self.initial[key],
                not _alike(first[_UPDATE], later[_UPDATE]),
                self.made_by[key],
            )
        return found

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
                for name, buffer in run(lines, step, kept).items():
                    turn = step.now.turns.index(step.now.keepers[name]) + 1
                    made[place.key, name] = _flat(buffer)
                    self.made_by[place.key, name] = tuple(stages[: first + turn])
                flow = flow if opened is not None else step.close()
            elif (factor := _scale_of(place)) is not None:
                value = _value(factor)
                if abs(value) != 1:
                    self.asked[place.key] = factor
                    value = values.get(place.key, value)
                flow = jax.tree.map(lambda x, f=value: f * x, flow)
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


_LEARNING_RATE = "the learning rate"


def _kind(asked: Any) -> str:
    """What a factor is, by the name that its line has for it."""
    named = isinstance(asked, _Asked) and asked.name not in ("rate", "learning_rate", "factor")
    return asked.name if named else _LEARNING_RATE


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


def _alike(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-9, atol=0)


def ratio(held: Meaning | Unknown, wanted: Meaning | Unknown) -> float | str:
    """By what a buffer is to be multiplied to mean what is wanted; or why that cannot be."""
    if isinstance(held, Unknown) or isinstance(wanted, Unknown):
        return 1.0 if held == wanted else "what it is made of cannot be found out"
    if _alike(held.value, wanted.value):
        sign = 1.0
    elif _alike(held.value, wanted.mirrored):
        sign = -1.0
    else:
        return "it is made of something else, or in another order"
    if wanted.is_corrected and not _alike(held.initial, wanted.initial):
        return "it starts elsewhere, and is corrected here for its start"
    there, here = ({kind for kind, _ in each.factors} for each in (held, wanted))
    if there == here:
        return sign
    if there - here and here - there:
        return "it is multiplied by something else"
    inside, where = (held, "there") if there - here else (wanted, "here")
    what = f"{' and '.join(sorted(there ^ here))} is part of it {where} only"
    if not inside.is_linear:
        return what
    of_them = held.factors if inside is held else held.of_update
    rates = [rate for kind, rate in of_them if kind in there ^ here]
    if any(callable(rate) or isinstance(rate, Tracer) for rate in rates):
        return f"{what}, and is a schedule, so that every gradient in it has its own"
    rate = abs(math.prod(float(rate) for rate in rates))
    if rate == 0:
        return f"{what}, and is 0"
    return sign / rate if inside is held else sign * rate
