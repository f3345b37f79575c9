"""The lines of whatever is made of stages, or of what optax has that computes the same."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptive_opt.checkpoints.places import Place
from adaptive_opt.core.describe import held_by, made_of
from adaptive_opt.core.observe import Watch
from adaptive_opt.core.stage import lines_of
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
