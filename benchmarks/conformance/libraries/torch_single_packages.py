"""Packages that have one method, or one family: the authors' own, or somebody's."""

from __future__ import annotations

import schedulefree
from adabelief_pytorch import AdaBelief
from adabound import AdaBound
from adam_atan2_pytorch import AdamAtan2
from adamod import AdaMod
from adamp import AdamP
from adan_pytorch import Adan
from lion_pytorch import Lion

from benchmarks.conformance.libraries import Entry, decay_of, torch_options

PACKAGES = (
    "adabelief-pytorch",
    "adabound",
    "adam-atan2-pytorch",
    "adamod",
    "adamp",
    "adan-pytorch",
    "lion-pytorch",
    "schedulefree",
)


def bounds(h):
    return {"final_lr": h.get("final_learning_rate", 0.1), "gamma": h.get("gamma", 1e-3)}


def free(h):
    names = {"r": "step_power", "weight_lr_power": "weight_power", "warmup_steps": "warmup_steps"}
    names |= {"silent_sgd_phase": "silent_sgd_phase"}
    return {theirs: h[ours] for theirs, ours in names.items() if ours in h} | {"foreach": False}


TABLE = {
    "adamod": Entry(lambda p, h: AdaMod(p, **torch_options(h), beta3=h["b3"])),
    "adabound": Entry(lambda p, h: AdaBound(p, **torch_options(h), **bounds(h))),
    "amsbound": Entry(lambda p, h: AdaBound(p, **torch_options(h), **bounds(h), amsbound=True)),
    "adabelief": Entry(
        lambda p, h: AdaBelief(p, **torch_options(h), rectify=False, print_change_log=False)
    ),
    "lion": Entry(lambda p, h: Lion(p, **torch_options(h))),
    "adan": Entry(
        lambda p, h: Adan(
            p,
            h["learning_rate"],
            tuple(1 - h[b] for b in ("b1", "b2", "b3")),
            h["eps"],
            decay_of(h),
        ),
        differs="its first step only remembers the gradient, but counts in the corrections",
    ),
    "adam_atan2": Entry(lambda p, h: AdamAtan2(p, **torch_options(h), a=h["scale"], b=h["b"])),
    "adamp": Entry(
        lambda p, h: AdamP(p, **torch_options(h), delta=h["delta"], wd_ratio=h["wd_ratio"])
    ),
    "schedule_free_sgd": Entry(
        lambda p, h: schedulefree.SGDScheduleFree(
            p, h["learning_rate"], h["b1"], decay_of(h), **free(h)
        )
    ),
    "schedule_free_adamw": Entry(
        lambda p, h: schedulefree.AdamWScheduleFree(p, **torch_options(h), **free(h)),
        lacks=("inner_momentum",),
    ),
    "schedule_free_radam": Entry(
        lambda p, h: schedulefree.RAdamScheduleFree(p, **torch_options(h), **free(h)),
        differs="rounding only: rho_t loses digits in float64",
    ),
}
