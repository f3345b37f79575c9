"""What can be data: the functions of this library and of optax, by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

from adaptive_opt.core.bracket import adaptive, close_step, open_step
from adaptive_opt.core.describe import (
    bound,
    held_by,
)
from adaptive_opt.core.observe import observer
from adaptive_opt.core.recipe import RECIPES
from adaptive_opt.core.stage import STAGES
from adaptive_opt.memory.low_memory import low_memory
from adaptive_opt.memory.master_weights import master_weights
from adaptive_opt.memory.offload import offload
from adaptive_opt.memory.single_pass import single_pass
from adaptive_opt.sharding.zero import zero1
from adaptive_opt.stages.adam import scale_by_adam
from adaptive_opt.stages.weight_decay import (
    cautious_weight_decay,
    decay_after_step,
    decoupled_l1_decay,
    decoupled_weight_decay,
    l2_regularization,
    scale_by_learning_rate,
)
from adaptive_opt.watching.telemetry import telemetry
from adaptive_opt.wrappers.averaging import parameter_ema
from adaptive_opt.wrappers.behind import behind
from adaptive_opt.wrappers.clipping import clip_by_previous_norm
from adaptive_opt.wrappers.groups import Group, ParameterGroups
from adaptive_opt.wrappers.guard import skip_nonfinite
from adaptive_opt.wrappers.lookahead import lookahead
from adaptive_opt.wrappers.spikes import skip_spikes

Optimizer = optax.GradientTransformationExtraArgs
Functions = Mapping[str, Any]


def parameter_groups(recipe: Any, groups: Any = (), default: Any = None) -> Optimizer:
    factory, settings = recipe
    made = [bound(GROUP, "a group", (), group) for group in groups]
    rest = None if default is None else Group(**bound(GROUP, "a group", (), default))
    return ParameterGroups([Group(**group) for group in made], rest).optimizer(factory, **settings)


def multi_steps(
    opt: Any, every_k_schedule: Any, use_grad_mean: bool = True, accumulator_dtype: Any = "float32"
) -> Any:
    steps = optax.MultiSteps(
        opt, every_k_schedule, use_grad_mean, accumulator_dtype=accumulator_dtype
    )
    return steps.gradient_transformation()


GROUP = inspect.signature(Group)
OURS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        adaptive,
        open_step,
        close_step,
        scale_by_adam,
        telemetry,
        observer,
        lookahead,
        parameter_ema,
        behind,
        skip_nonfinite,
        skip_spikes,
        clip_by_previous_norm,
        low_memory,
        offload,
        master_weights,
        single_pass,
        zero1,
        l2_regularization,
        decoupled_weight_decay,
        decoupled_l1_decay,
        decay_after_step,
        cautious_weight_decay,
        scale_by_learning_rate,
    )
} | {"ParameterGroups": parameter_groups}
OPTAX: dict[str, Callable[..., Any]] = {
    name: getattr(optax, name)
    for name in (
        "clip",
        "clip_by_global_norm",
        "clip_by_block_rms",
        "adaptive_grad_clip",
        "centralize",
        "zero_nans",
        "keep_params_nonnegative",
        "identity",
        "set_to_zero",
        "scale",
        "scale_by_schedule",
        "scale_by_learning_rate",
        "scale_by_adam",
        "add_decayed_weights",
        "trace",
        "ema",
        "apply_if_finite",
        "masked",
        "partition",
    )
} | {"MultiSteps": multi_steps}

TREES = ("mask", "trust_mask", "matrices", "blocks", "param_labels")
"""Arguments that are trees like the parameters, in which a list is no tuple."""
NO_NUMBERS = (*TREES, "inner", "opt", "transforms", "schedule", "schedules", "boundaries", "axis",
              "cosine_kwargs", "boundaries_and_scales", "interpolate_type", "form",
              "anneal")  # fmt: skip
"""Arguments of optax's functions, and of schedules, that are something else than a number."""
BY_STEP = "boundaries_and_scales"
MARKS = ("name", "optax", "schedule", "function")


def known_names() -> dict[str, Callable[..., Any]]:
    return {**STAGES, **RECIPES, **OURS}


def mark_of(data: Any) -> str | None:
    """The key that says what a dict is."""
    if not isinstance(data, Mapping):
        return None
    for mark in MARKS:
        if isinstance(data.get(mark), str):
            return mark
    if isinstance(data.get("chain"), (list, tuple)):
        return "chain"
    return "dict" if set(data) == {"dict"} and isinstance(data["dict"], Mapping) else None


def inside(at: str, key: str) -> str:
    return f"{at}.{key}" if at else key


def is_dtype(key: str) -> bool:
    return key == "dtype" or key.endswith("_dtype")


def said_at(at: str, text: str) -> str:
    return f"{at}: {text}" if at else text


def cells_of(function: Any) -> dict[str, Any]:
    """What a function holds on to, or the object it is a method of; of cells, those not empty."""
    if not inspect.isfunction(function):
        return dict(held_by(function))
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    held = {}
    for name, cell in cells:
        try:
            held[name] = cell.cell_contents
        except ValueError:  # a variable that was not assigned to
            continue
    return held
