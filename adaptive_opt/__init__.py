"""Adaptive optimizers for JAX and Optax, each a list of stages that reads like its paper.

The recipes (``adam`` to ``sgdw``) are ordinary optax optimizers. What they are made of is public
too: ``describe`` shows it, ``adaptive`` puts stages together anew, ``stage`` makes a new one.
"""

from adaptive_opt.checkpoints.config import config, make
from adaptive_opt.checkpoints.from_torch import import_torch_params, import_torch_state
from adaptive_opt.checkpoints.headers import (
    CheckpointMismatch,
    check_checkpoint,
    checkpoint_header,
)
from adaptive_opt.checkpoints.moving import convert_state
from adaptive_opt.checkpoints.saving import from_bytes, read_checkpoint, to_bytes, write_checkpoint
from adaptive_opt.core.bracket import AdaptiveState, OpenStepState, adaptive, close_step, open_step
from adaptive_opt.core.describe import Description, describe
from adaptive_opt.core.observe import Observation, observer
from adaptive_opt.core.recipe import RECIPES, recipe
from adaptive_opt.core.stage import WholeTree, stage
from adaptive_opt.core.step import AdaptiveStep, RateRule
from adaptive_opt.core.tree import OpenStep
from adaptive_opt.memory.by_layer import Layered, step_by_layer
from adaptive_opt.memory.low_memory import LowMemoryState, low_memory
from adaptive_opt.memory.master_weights import (
    MasterWeightsState,
    float32_params,
    master_weights,
)
from adaptive_opt.memory.offload import offload, offload_stands_aside
from adaptive_opt.memory.one_kernel import one_kernel
from adaptive_opt.memory.packing import Packing
from adaptive_opt.memory.plan import MemoryPlan, memory_plan
from adaptive_opt.memory.single_pass import (
    enable_single_pass,
    single_pass,
    single_pass_stands_aside,
)
from adaptive_opt.recipes.adam import adam, adamw, amsgrad, nadam, nadamw, radam
from adaptive_opt.recipes.bounds import adabound, adamod, amsbound, diffgrad, diffmod
from adaptive_opt.recipes.classics import adadelta, adagrad, adamax, rmsprop, sgd, sgdw
from adaptive_opt.recipes.differences import adan, mars
from adaptive_opt.recipes.factored import adafactor, adam_mini
from adaptive_opt.recipes.matrices import adamh, hidden_matrices, muon
from adaptive_opt.recipes.ranger import ranger
from adaptive_opt.recipes.scaled import adam_atan2, adamp, lamb, lars, novograd, stableadamw
from adaptive_opt.recipes.schedule_free import (
    schedule_free_adamw,
    schedule_free_plus,
    schedule_free_radam,
    schedule_free_sgd,
)
from adaptive_opt.recipes.soap import soap
from adaptive_opt.recipes.successors import (
    adabelief,
    ademamix,
    adopt,
    laprop,
    lion,
    yogi,
)
from adaptive_opt.sharding.state import init_sharded, state_shardings
from adaptive_opt.sharding.zero import zero1
from adaptive_opt.stages.adam import scale_by_adam
from adaptive_opt.stages.averages import (
    belief_moment,
    previous_second_moment,
    slow_average,
    weighted_moment,
    yogi_moment,
)
from adaptive_opt.stages.differences import (
    change_average,
    nesterov_gradient,
    variance_reduced_gradient,
)
from adaptive_opt.stages.directions import (
    atan2_direction,
    clip_direction,
    diffgrad_friction,
    lion_direction,
    sign_direction,
)
from adaptive_opt.stages.eigenbasis import eigenbasis, into_eigenbasis, out_of_eigenbasis
from adaptive_opt.stages.factored import block_moment, blocks_by_name, factored_moment
from adaptive_opt.stages.inner_decay import add_weight_decay
from adaptive_opt.stages.matrices import ahead_of, orthogonalize, scale_by_shape
from adaptive_opt.stages.modifiers import cautious, clip_update_rms, hyperball, magma
from adaptive_opt.stages.moments import (
    amsgrad_max,
    centered_moment,
    debias,
    first_moment,
    heavy_ball,
    infinity_moment,
    nadam_moment,
    nesterov_moment,
    second_moment,
    sum_of_squares,
)
from adaptive_opt.stages.projections import radial_projection
from adaptive_opt.stages.rates import (
    adabound_dynamic_bound,
    adadelta_units,
    adamod_momental_bound,
    apply_rate,
    debias_rate,
    floored_rate,
    inverse_rate,
    mute_unseen,
    per_weight_rate,
    radam_rectifier,
    scale_rate,
    uniform_rate,
)
from adaptive_opt.stages.schedule_free import schedule_free
from adaptive_opt.stages.tensors import (
    clip_gradient_norm,
    norm_moment,
    rms_bound,
    scale_by_parameter,
    trust_ratio,
)
from adaptive_opt.stages.weight_decay import (
    cautious_weight_decay,
    decay_after_step,
    decoupled_l1_decay,
    decoupled_weight_decay,
    l2_regularization,
    scale_by_learning_rate,
)
from adaptive_opt.watching.range_test import RangeTest, lr_find
from adaptive_opt.watching.reading import rate_histograms, read_telemetry
from adaptive_opt.watching.sweep import Sweep, sweep
from adaptive_opt.watching.telemetry import telemetry
from adaptive_opt.wrappers.averaging import ParameterEmaState, evaluation_params, parameter_ema
from adaptive_opt.wrappers.behind import BehindState, behind
from adaptive_opt.wrappers.clipping import ClipByPreviousNormState, clip_by_previous_norm
from adaptive_opt.wrappers.decay import decay_mask, decay_report
from adaptive_opt.wrappers.groups import Group, ParameterGroups
from adaptive_opt.wrappers.guard import SkipNonfiniteState, skip_nonfinite
from adaptive_opt.wrappers.layers import gradual_unfreezing, layerwise_learning_rates
from adaptive_opt.wrappers.lookahead import LookaheadState, lookahead
from adaptive_opt.wrappers.schedules import (
    OneCycle,
    corrected_weight_decay,
    growing_memory,
    normalized_weight_decay,
    one_cycle,
    relative_step,
    warm_restarts,
)
from adaptive_opt.wrappers.spikes import SkipSpikesState, skip_spikes
from adaptive_opt.wrappers.train_step import train_step

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (in the order in which a reader meets them)
    # Optimizers: Adam and its kin.
    "adam",
    "adamw",
    "amsgrad",
    "adamod",
    "diffgrad",
    "diffmod",
    "adabound",
    "amsbound",
    "radam",
    "nadam",
    "nadamw",
    # Optimizers: what came after.
    "adabelief",
    "lion",
    "yogi",
    "laprop",
    "adopt",
    "ademamix",
    "mars",
    "adan",
    "stableadamw",
    "novograd",
    "lamb",
    "lars",
    "adam_atan2",
    "adamp",
    "adafactor",
    "adam_mini",
    "muon",
    "adamh",
    "soap",
    "hidden_matrices",
    "schedule_free_sgd",
    "schedule_free_adamw",
    "schedule_free_radam",
    "schedule_free_plus",
    # Optimizers: what came before and beside.
    "sgd",
    "sgdw",
    "rmsprop",
    "adagrad",
    "adadelta",
    "adamax",
    # Around an optimizer.
    "lookahead",
    "ranger",
    "parameter_ema",
    "evaluation_params",
    "skip_nonfinite",
    "skip_spikes",
    "clip_by_previous_norm",
    "ParameterGroups",
    "Group",
    "decay_mask",
    "decay_report",
    "layerwise_learning_rates",
    "gradual_unfreezing",
    # On many devices.
    "init_sharded",
    "state_shardings",
    "zero1",
    # Speed and memory.
    "train_step",
    "step_by_layer",
    "Layered",
    "memory_plan",
    "single_pass",
    "enable_single_pass",
    "single_pass_stands_aside",
    "low_memory",
    "one_kernel",
    "offload",
    "offload_stands_aside",
    "master_weights",
    "float32_params",
    "Packing",
    # Schedules that optax does not have.
    "one_cycle",
    "warm_restarts",
    "normalized_weight_decay",
    "corrected_weight_decay",
    "growing_memory",
    "relative_step",
    # Putting one together.
    "adaptive",
    "open_step",
    "close_step",
    "describe",
    "make",
    "config",
    # Stages, in the order in which a listing uses them.
    "scale_by_adam",
    "first_moment",
    "heavy_ball",
    "second_moment",
    "sum_of_squares",
    "infinity_moment",
    "centered_moment",
    "belief_moment",
    "yogi_moment",
    "weighted_moment",
    "previous_second_moment",
    "slow_average",
    "amsgrad_max",
    "debias",
    "nesterov_moment",
    "nadam_moment",
    "per_weight_rate",
    "inverse_rate",
    "floored_rate",
    "uniform_rate",
    "debias_rate",
    "scale_rate",
    "mute_unseen",
    "adadelta_units",
    "radam_rectifier",
    "adamod_momental_bound",
    "adabound_dynamic_bound",
    "apply_rate",
    "diffgrad_friction",
    "lion_direction",
    "clip_direction",
    "sign_direction",
    "atan2_direction",
    "variance_reduced_gradient",
    "nesterov_gradient",
    "change_average",
    "clip_gradient_norm",
    "norm_moment",
    "factored_moment",
    "block_moment",
    "blocks_by_name",
    "rms_bound",
    "scale_by_parameter",
    "radial_projection",
    "add_weight_decay",
    "ahead_of",
    "orthogonalize",
    "scale_by_shape",
    "schedule_free",
    "eigenbasis",
    "into_eigenbasis",
    "out_of_eigenbasis",
    # Stages that change a finished update, in a bracket or behind any optimizer.
    "behind",
    "cautious",
    "trust_ratio",
    "clip_update_rms",
    "hyperball",
    "magma",
    # Before and after the stages.
    "l2_regularization",
    "decoupled_weight_decay",
    "decoupled_l1_decay",
    "decay_after_step",
    "cautious_weight_decay",
    "scale_by_learning_rate",
    # Seeing what it does.
    "telemetry",
    "read_telemetry",
    "rate_histograms",
    "observer",
    "lr_find",
    "sweep",
    # Saving, and moving in and out.
    "checkpoint_header",
    "check_checkpoint",
    "CheckpointMismatch",
    "to_bytes",
    "from_bytes",
    "write_checkpoint",
    "read_checkpoint",
    "convert_state",
    "import_torch_params",
    "import_torch_state",
    # Writing a new stage, and the types one meets.
    "stage",
    "recipe",
    "RECIPES",
    "AdaptiveStep",
    "OpenStep",
    "WholeTree",
    "RateRule",
    "AdaptiveState",
    "OpenStepState",
    "LookaheadState",
    "ParameterEmaState",
    "BehindState",
    "SkipNonfiniteState",
    "SkipSpikesState",
    "ClipByPreviousNormState",
    "LowMemoryState",
    "MasterWeightsState",
    "OneCycle",
    "Observation",
    "Sweep",
    "RangeTest",
    "MemoryPlan",
    "Description",
]
