"""Adaptive optimizers for JAX and Optax, each a list of stages that reads like its paper.

The recipes (``adam``, ``adamw``, ``amsgrad``, ``adamod``, ``diffgrad``, ``diffmod``) are ordinary
optax optimizers. What they are made of is public too: ``describe`` shows it, ``adaptive`` puts
stages together anew, ``stage`` makes a new one.
"""

from adaptive_opt.adam import scale_by_adam
from adaptive_opt.bracket import AdaptiveState, OpenStepState, adaptive, close_step, open_step
from adaptive_opt.describe import Description, describe
from adaptive_opt.friction import diffgrad_friction
from adaptive_opt.moments import (
    amsgrad_max,
    debias,
    first_moment,
    nesterov_moment,
    second_moment,
)
from adaptive_opt.rates import adamod_momental_bound, debias_rate, per_weight_rate, scale_rate
from adaptive_opt.recipes import adam, adamod, adamw, amsgrad, diffgrad, diffmod
from adaptive_opt.stage import stage
from adaptive_opt.step import AdaptiveStep, RateRule
from adaptive_opt.weight_decay import (
    decoupled_weight_decay,
    l2_regularization,
    scale_by_learning_rate,
)

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in the order in which a reader meets them)
    # Optimizers.
    "adam",
    "adamw",
    "amsgrad",
    "adamod",
    "diffgrad",
    "diffmod",
    # Putting one together.
    "adaptive",
    "open_step",
    "close_step",
    "describe",
    # Stages, in the order in which a listing uses them.
    "scale_by_adam",
    "first_moment",
    "second_moment",
    "debias",
    "nesterov_moment",
    "amsgrad_max",
    "per_weight_rate",
    "scale_rate",
    "debias_rate",
    "adamod_momental_bound",
    "diffgrad_friction",
    # Before and after the stages.
    "l2_regularization",
    "decoupled_weight_decay",
    "scale_by_learning_rate",
    # Writing a new stage, and the types one meets.
    "stage",
    "AdaptiveStep",
    "RateRule",
    "AdaptiveState",
    "OpenStepState",
    "Description",
]
