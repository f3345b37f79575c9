"""What an optimizer of PyTorch computes, and whether an optimizer here computes the same.

A state dict does not say which optimizer wrote it; the names of its settings and of its buffers do.
For each that is known stands the recipe that equals it. Its stages, made with the settings of the
state dict, are compared with the stages of the target, parameter by parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import optax
from jax.core import Tracer

from adaptive_opt.checkpoints.computing import RATE, Computed, computed
from adaptive_opt.core.bracket import adaptive
from adaptive_opt.core.describe import Description, describe
from adaptive_opt.recipes.adam import adam, amsgrad, nadam, radam
from adaptive_opt.recipes.bounds import adamod
from adaptive_opt.recipes.classics import adadelta, adagrad, adamax, rmsprop, sgd
from adaptive_opt.stages.directions import diffgrad_friction
from adaptive_opt.stages.moments import amsgrad_max, first_moment, second_moment
from adaptive_opt.stages.rates import (
    adabound_dynamic_bound,
    debias_rate,
    per_weight_rate,
    scale_rate,
)

Settings = Mapping[str, Any]
WITHOUT_MEANING = (
    *("lr", "initial_lr", "params", "param_names", "step", "name", "weight_decay", "maximize"),
    *("foreach", "fused", "capturable", "differentiable"),
    *("max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr", "lr_scale"),
)
"""What any group may hold: how a step is calculated, what schedulers leave; or compared apart."""

SAYS_NOTHING = ("params", "param_names", "step", "name")
"""What a group may hold that says of no optimizer that it wrote it."""

OF_PYTORCH_OPTIMIZER = ("weight_decouple", "fixed_decay", "adam_debias", "adanorm", "eps_root")


class Kind(NamedTuple):
    """An optimizer of PyTorch.

    Attributes:
      name: what it is called.
      marks: the settings by which it is known.
      equal: the optimizer here that equals it, made of its settings.
      buffer: a buffer by which it is known where the settings are those of others too.
      others: settings that it may have besides.
      names: what it calls settings here.
      decay: where its weight decay acts, if no setting says so.
      counts: whether its steps depend on how many there were.
      by_rate: settings that are multiplied by the learning rate over the one at the start.
    """

    name: str
    marks: tuple[str, ...]
    equal: Callable[[Settings], optax.GradientTransformation]
    buffer: str | None = None
    others: tuple[str, ...] = ()
    names: Mapping[str, str] = {}
    decay: tuple[str, ...] = ("l2",)
    counts: Callable[[Settings], bool] = lambda s: True
    by_rate: tuple[str, ...] = ()

    def fits(self, settings: Settings, buffers: Collection[str]) -> bool:
        return set(self.marks) <= set(settings) and self.buffer in (None, *buffers)

    def knows(self, settings: Settings) -> bool:
        """Whether the settings may be its own, where there are no buffers yet to tell by."""
        known = {*WITHOUT_MEANING, *self.marks, *self.others}
        return set(self.marks) <= set(settings) <= known


def _with_betas(recipe: Callable[..., Any], s: Settings, **more: Any) -> Any:
    b1, b2 = s["betas"][:2]
    return recipe(1.0, b1=b1, b2=b2, eps=s["eps"], **more)


def _fused_adam(s: Settings) -> Any:
    if s["bias_correction"]:
        return _with_betas(adam, s)
    return adaptive(*_eps_hat(s, None))


def _sgd(s: Settings) -> Any:
    if not s["momentum"]:
        return sgd(1.0)
    return sgd(1.0, s["momentum"], bool(s.get("nesterov")), dampening=s["dampening"])


def _rmsprop(s: Settings) -> Any:
    centered, momentum = bool(s.get("centered")), s.get("momentum")
    return rmsprop(1.0, s["alpha"], s["eps"], centered=centered, momentum=momentum)


def _adamod(s: Settings) -> Any:
    _refuse(s, "adam_debias")
    b3 = s["beta3"] if "beta3" in s else s["betas"][2]
    return _with_betas(adamod, s, b3=b3)


def _diffgrad(s: Settings) -> Any:
    _refuse(s, "rectify", "adam_debias", "adanorm")
    b1, b2 = s["betas"]
    return adaptive(*_eps_hat(s, s.get("ams_bound")), debias_rate(b1, b2), diffgrad_friction())


def _adabound(s: Settings) -> Any:
    _refuse(s, "adam_debias")
    b1, b2 = s["betas"]
    return adaptive(
        *_eps_hat(s, s.get("amsbound") or s.get("ams_bound")),
        debias_rate(b1, b2),
        scale_rate(1.0),
        adabound_dynamic_bound(s["final_lr"], s["gamma"]),
    )


def _eps_hat(s: Settings, largest: Any) -> tuple[Any, ...]:
    b1, b2 = s["betas"]
    maximum = (amsgrad_max(),) if largest else ()
    rate = per_weight_rate(s["eps"], s.get("eps_root", 0.0))
    return first_moment(b1), second_moment(b2), *maximum, rate


def _refuse(s: Settings, *names: str) -> None:
    for name in names:
        if s.get(name):
            raise ValueError(f"{name}={s[name]!r} in PyTorch is what no recipe here computes.")


BETAS = ("betas", "eps")
EITHER = ("l2", "decoupled")
KINDS = (
    Kind(
        "NAdam",
        (*BETAS, "momentum_decay"),
        lambda s: _with_betas(nadam, s, momentum_decay=s["momentum_decay"]),
        others=("decoupled_weight_decay",),
    ),
    Kind(
        "AdaBound",
        (*BETAS, "final_lr", "gamma"),
        _adabound,
        others=("amsbound", "ams_bound", *OF_PYTORCH_OPTIMIZER),
        names={"final_learning_rate": "final_lr"},
        by_rate=("final_lr",),
    ),
    Kind("AdaMod", (*BETAS, "beta3"), _adamod, "exp_avg_lr", (), {"b3": "beta3"}, ("decoupled",)),
    Kind(
        "AdaMod",
        (*BETAS, "weight_decouple"),
        _adamod,
        buffer="exp_avg_lr",
        others=OF_PYTORCH_OPTIMIZER,
        names={"b3": "betas[2]"},
    ),
    Kind(
        "DiffGrad",
        BETAS,
        _diffgrad,
        buffer="previous_grad",
        others=("rectify", "ams_bound", *OF_PYTORCH_OPTIMIZER),
    ),
    Kind(
        "Adam or AdamW",
        (*BETAS, "amsgrad"),
        lambda s: _with_betas(amsgrad if s["amsgrad"] else adam, s),
        buffer="exp_avg_sq",
        others=("decoupled_weight_decay",),
        decay=EITHER,  # before PyTorch 2.7
    ),
    Kind("FusedAdam", (*BETAS, "bias_correction"), _fused_adam, "exp_avg_sq", decay=EITHER),
    Kind(
        "RAdam",
        (*BETAS, "decoupled_weight_decay"),
        lambda s: _with_betas(radam, s),
        buffer="exp_avg_sq",
    ),
    Kind("Adamax", BETAS, lambda s: _with_betas(adamax, s), buffer="exp_inf"),
    Kind(
        "SGD",
        ("momentum", "dampening"),
        _sgd,
        others=("nesterov",),
        counts=lambda s: bool(s["momentum"] and s["dampening"]),
    ),
    Kind(
        "RMSprop",
        ("alpha", "eps"),
        _rmsprop,
        others=("centered", "momentum"),
        names={"b2": "alpha"},
        counts=lambda s: False,
    ),
    Kind(
        "Adagrad",
        ("lr_decay", "eps"),
        lambda s: adagrad(1.0, eps=s["eps"]),
        others=("initial_accumulator_value",),
        counts=lambda s: bool(s["lr_decay"]),
    ),
    Kind(
        "Adadelta",
        ("rho", "eps"),
        lambda s: adadelta(1.0, s["rho"], s["eps"]),
        names={"b2": "rho"},
        counts=lambda s: False,
    ),
)
TORCH_NAMES = {"b1": "betas[0]", "b2": "betas[1]"}
NO_SETTINGS = ("name", "dtype", "mask", "as_in_optax", "initial", "learning_rate", "factor")
"""Settings of stages that change no step from here on, or are compared apart."""


class TorchGroup:
    """A group of a state dict: its settings, which optimizer it is of, and what that computes.

    ``kind`` is None where the settings are those of several optimizers, or of one that is not
    known, or say nothing.
    ``pytorch_optimizer`` adds 1e-15 under a root, which may be missing here where the ``smallest``
    second moment is so large that it is lost beside it.
    """

    def __init__(self, settings: Settings, buffers: Collection[str], smallest: float) -> None:
        fit = [kind for kind in KINDS if kind.fits(settings, buffers)]
        if not buffers and not fit:
            fit = [kind for kind in KINDS if kind.knows(settings)]
            self.kind = fit[0] if len(fit) == 1 else None
        else:
            self.kind = fit[0] if fit else None
        self.says = "" if fit else ", ".join(sorted({*settings} - {*SAYS_NOTHING}))
        adds = self.kind is not None and self.kind.name in ("DiffGrad", "AdaBound")
        if adds and "weight_decouple" in settings:
            settings = {**settings, "eps_root": 1e-15}
        self.root_is_lost = 1e-12 * smallest >= 1e-15
        self.settings = settings
        self.expected_at(None)  # what no recipe computes is refused here

    def expected_at(self, rate: float | None) -> Computed | None:
        """What it computes at a learning rate; of what goes by the rate there is one."""
        if self.kind is None:
            return None
        settings = {**self.settings}
        for name in self.kind.by_rate:
            now = settings["lr"] if rate is None else rate
            settings[name] *= now / (settings.get("initial_lr") or settings["lr"])
        return computed((), describe(self.kind.equal(settings)).stages())

    @property
    def counts(self) -> bool:
        """Whether the steps depend on how many there were."""
        return self.kind is None or self.kind.counts(self.settings)

    def differences(self, target: Computed, allow: Collection[str]) -> Iterator[str]:
        """What a target computes otherwise, each thing once."""
        settings, kind = self.settings, self.kind
        known = {*WITHOUT_MEANING, *(BETAS if kind is None else (*kind.marks, *kind.others))}
        for name in sorted({*settings} - known - {*allow}):
            yield f"{name}={settings[name]!r} of PyTorch is not known here; does it change steps?"
        if self.says and "optimizer" not in allow:
            yield (
                f"the optimizer is none of those that are known here; its groups say {self.says}"
                ' (allow "optimizer" if it computes what the target does)'
            )
        before, after = _in_order(self.expected_at(target.rate_at(0))), _in_order(target)
        if kind is None:
            compared = _by_name(settings, target)
        elif [s.name for s in before] == [s.name for s in after]:
            compared = _by_stage(before, after)
        else:
            compared = ()
            if "stages" not in allow:
                yield (
                    f"{kind.name} of PyTorch is {_listing(before)}, the target is {_listing(after)}"
                    ' (allow "stages" if they compute the same, or start with the recipe that'
                    " equals it, and go on with convert_state)"
                )
        names = {**TORCH_NAMES, **(kind.names if kind else {})}
        for here, (old, new) in dict(compared).items():
            there = names.get(here, here)
            if here == "eps_root" and new == 0 and self.root_is_lost:
                continue
            if not {here, there, there.split("[")[0]} & {*allow}:
                if kind and there in kind.by_rate and old != settings[there]:
                    there += " * lr / initial_lr"
                again = "" if there == here else f"{here} "
                yield f"{there} of PyTorch is {old!r}, {again}here {new!r}"
        if "weight_decay" in settings and "weight_decay" not in allow:
            yield from _of_decay(settings, kind, target)
            if kind is not None and kind.name == "SGD" and _may_be_sgdw(settings):
                yield (
                    "weight_decay of PyTorch may be that of torch_optimizer's SGDW, which no recipe"
                    " computes, or of an SGD before PyTorch 1.11: there is no maximize by which the"
                    ' two are told apart (if it is SGD, allow "weight_decay")'
                )
        if bool(settings.get("maximize")) != target.is_negated and "maximize" not in allow:
            yield (
                "maximize=True of PyTorch is optax.scale(-1.0) in front of everything here"
                if settings.get("maximize")
                else "the target negates gradients, PyTorch did not (maximize)"
            )
        fixed = not target.is_rate_scheduled
        if settings.get("lr_decay") and fixed and "lr_decay" not in allow:
            yield (
                f"lr_decay={settings['lr_decay']!r} of PyTorch is a schedule here:"
                " learning_rate=lambda t: lr / (1 + lr_decay * t)"
            )


def names_of(groups: Collection[TorchGroup], targets: Collection[Computed]) -> set[str]:
    """All that can be let through."""
    known = {"stages", "optimizer", "learning_rate", *WITHOUT_MEANING, *TORCH_NAMES}
    for kind in KINDS:
        known |= {*kind.marks, *kind.others, *kind.names}
    for group in groups:
        known |= {*group.settings}
    for target in targets:
        known |= {name for stage in target.stages for name in stage.settings}
    return known


def _by_name(settings: Settings, target: Computed) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The settings of an optimizer that is not known, wherever they are here."""
    said = dict(zip(("b1", "b2", "b3"), settings.get("betas", ()), strict=False))
    said |= {name: settings[name] for name in ("eps",) if name in settings}
    for stage in target.stages:
        for name in sorted(said.keys() & stage.settings):
            if not _alike(said[name], stage.settings[name]):
                yield name, (said[name], stage.settings[name])


def _by_stage(
    before: tuple[Description, ...], after: tuple[Description, ...]
) -> Iterator[tuple[str, tuple[Any, Any]]]:
    for old, new in zip(before, after, strict=True):
        for name in sorted({*old.settings, *new.settings} - {*NO_SETTINGS}):
            was, now = old.settings.get(name), new.settings.get(name)
            if not _alike(was, now):
                yield name, (was, now)


def _in_order(computed: Computed | None) -> tuple[Description, ...]:
    """The stages without the learning rate at the end, where everything has it."""
    stages = () if computed is None else computed.stages
    while stages and stages[-1].name == RATE:
        stages = stages[:-1]
    return stages


def _listing(stages: tuple[Description, ...]) -> str:
    return " → ".join(stage.name for stage in stages) or "none of the stages"


def _alike(old: Any, new: Any) -> bool:
    """Equal, numbers up to the rounding of float32; a schedule here is as scheduled there."""
    if callable(new) or old is new or isinstance(new, Tracer):
        return True
    if isinstance(old, (bool, str)) or old is None or new is None:
        return old == new
    return math.isclose(float(old), float(new), rel_tol=1e-7)


def _of_decay(settings: Settings, kind: Kind | None, target: Computed) -> Iterator[str]:
    """What differs in weight decay: its value, or where it acts."""
    value, forms = settings["weight_decay"], _forms(settings, kind)
    expected = [] if value == 0 else [(value, form) for form in forms]
    here = " and ".join(f"{v!r} ({form})" for v, form in target.decays) or "0"
    if not expected and target.decays:
        yield f"weight_decay of PyTorch is 0, here {here}"
    elif expected and not (
        len(target.decays) == 1
        and target.decays[0][1] in forms
        and _alike(value, target.decays[0][0])
    ):
        yield f"weight_decay of PyTorch is {value!r} ({' or '.join(forms)}), here {here}"


def _may_be_sgdw(settings: Settings) -> bool:
    return bool(settings["weight_decay"]) and "maximize" not in settings


def _forms(settings: Settings, kind: Kind | None) -> tuple[str, ...]:
    """Where weight decay acts in PyTorch; more than one where the state dict does not say."""
    if "weight_decouple" in settings:  # of pytorch_optimizer
        decoupled = "constant" if settings.get("fixed_decay") else "decoupled"
        return (decoupled,) if settings["weight_decouple"] else ("l2",)
    if "decoupled_weight_decay" in settings:
        return ("decoupled",) if settings["decoupled_weight_decay"] else ("l2",)
    return EITHER if kind is None else kind.decay
