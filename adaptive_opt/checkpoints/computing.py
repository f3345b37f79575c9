"""What an optimizer computes for each parameter: the stages that see it, and what they decay."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import optax
from jax.core import Tracer

from adaptive_opt.checkpoints.headers import OBSERVERS
from adaptive_opt.checkpoints.places import labels_over
from adaptive_opt.core.describe import Description, describe
from adaptive_opt.core.stage import STAGES
from adaptive_opt.core.trees import Tree
from adaptive_opt.stages.adam import scale_by_adam

RATE = "learning rate"
"""What every stage is called that multiplies by it."""

RATES = ("uniform_rate", "scale_rate", "scale_by_learning_rate")


class Computed(NamedTuple):
    """What a target computes for one parameter.

    Attributes:
      group: the labels of the groups it is in, which count each for themselves.
      stages: the stages that make a step of a gradient, learning rates as "learning rate".
      decays: the weight decays and their forms: "l2", "decoupled" or "constant".
      is_negated: whether the gradient is, before all stages.
      is_frozen: whether there is no step.
      is_scheduled: whether something changes by the count of the moments. A learning rate behind
        them, and weight decay, count for themselves.
    """

    group: tuple[str, ...]
    stages: tuple[Description, ...]
    decays: tuple[tuple[Any, str], ...]
    is_negated: bool
    is_frozen: bool
    is_scheduled: bool

    @property
    def is_rate_scheduled(self) -> bool:
        rates = [stage.settings for stage in self.stages if stage.name == RATE]
        return any(callable(value) for rate in rates for value in rate.values())

    def rate_at(self, count: int) -> float | None:
        """The learning rate at a count; None where no number is to be seen."""
        rates = [
            s.settings.get("learning_rate", s.settings.get("factor"))
            for s in self.stages
            if s.name == RATE
        ]
        if not rates or any(isinstance(rate, Tracer) or rate is None for rate in rates):
            return None
        values: list[Any] = [rate(count) if callable(rate) else rate for rate in rates]
        return math.prod(map(float, values))


def computed_by(target: optax.GradientTransformation, params: Tree) -> list[Computed]:
    """What the target computes, for every leaf of the parameters."""
    leaves = _by_leaf(describe(target), params)
    return [computed(group, stages) for group, stages in leaves]


def _by_leaf(
    described: Description, params: Tree
) -> list[tuple[tuple[str, ...], tuple[Description, ...]]]:
    """For every leaf the groups it is in and the stages that see it."""
    parts = [_by_leaf(part, params) for part in described.parts]
    if described.labels is not None and described.parts:
        labels = jax.tree.leaves(labels_over(params, described.labels))
        if described.parts[0].key is None:  # a mask
            return [
                row if masked else ((), ()) for masked, row in zip(labels, parts[0], strict=True)
            ]
        row_of = {part.key: rows for part, rows in zip(described.parts, parts, strict=True)}
        chosen = [(str(label), row_of[str(label)][i]) for i, label in enumerate(labels)]
        return [((label, *group), stages) for label, (group, stages) in chosen]
    if parts:
        return [
            (sum((g for g, _ in rows), ()), sum((s for _, s in rows), ()))
            for rows in zip(*parts, strict=True)
        ]
    stages = (described,)
    if described.name == "scale_by_adam":  # optax's, which equals ours
        stages = describe(scale_by_adam(**described.settings)).stages()
    mask = described.settings.get("mask")
    if mask is not None:  # of a weight decay
        return [
            ((), stages if masked else ()) for masked in jax.tree.leaves(labels_over(params, mask))
        ]
    return [((), stages)] * len(jax.tree.leaves(params))


def computed(group: tuple[str, ...], listed: tuple[Description, ...]) -> Computed:
    stages: list[Description] = []
    decays, negated = [], False
    for stage in listed:
        settings = stage.settings
        if stage.name in ("l2_regularization", "add_decayed_weights") and not stages:
            decays.append((settings.get("weight_decay"), "l2"))
        elif stage.name in ("decoupled_weight_decay", "l2_regularization", "add_decayed_weights"):
            scaled = settings.get("learning_rate") is not None
            scaled = scaled or not any(s.name == RATE for s in stages)
            decays.append((settings.get("weight_decay"), "decoupled" if scaled else "constant"))
        elif stage.name in RATES:
            stages.append(stage._replace(name=RATE))
        elif stage.name in (*STAGES, "decoupled_l1_decay") and stage.name not in OBSERVERS:
            stages.append(stage)
        elif stage.name == "scale" and settings.get("step_size") == -1 and not stages:
            negated = not negated
    inside = [s for s in listed if s.name in STAGES and s.name != "scale_by_learning_rate"]
    return Computed(
        group,
        tuple(stages),
        tuple((value, form) for value, form in decays if callable(value) or value != 0),
        negated,
        any(stage.name == "set_to_zero" for stage in listed),
        any(callable(value) for stage in inside for value in stage.settings.values()),
    )
