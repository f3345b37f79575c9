"""pytorch_optimizer, without what it takes from torch.optim (Adam, NAdam, RMSprop, SGD, ...)."""

from __future__ import annotations

import pytorch_optimizer as po
import torch

from benchmarks.conformance.libraries import Entry, decay_of, torch_options

PACKAGES = ("pytorch_optimizer",)


def only(h, **names):
    """lr, decay and what is named: theirs=ours."""
    given = {theirs: h[ours] for theirs, ours in names.items() if ours in h}
    return {"lr": h["learning_rate"], "weight_decay": decay_of(h)} | given


def options(h, *betas):
    return torch_options(h, *betas) | {"foreach": False}


TABLE = {
    "radam": Entry(
        lambda p, h: po.RAdam(p, **options(h)),
        differs="rounding only: rho_t loses digits in float64",
    ),
    "adamax": Entry(lambda p, h: po.AdaMax(p, **options(h))),
    "adadelta": Entry(lambda p, h: po.AdaDelta(p, **only(h, rho="rho", eps="eps"), foreach=False)),
    "sgdw": Entry(
        lambda p, h: po.SGDW(p, **only(h, momentum="momentum", nesterov="nesterov"), foreach=False),
        differs="the momentum is one of gradients, not of steps",
        ours={"convention": "torch"},
    ),
    "adamod": Entry(lambda p, h: po.AdaMod(p, **options(h, "b1", "b2", "b3"))),
    "diffgrad": Entry(
        lambda p, h: po.DiffGrad(p, **options(h), weight_decouple=False),
        differs="adds 1e-15 to v inside the root",
    ),
    "adabound": Entry(
        lambda p, h: po.AdaBound(
            p,
            **options(h),
            final_lr=h.get("final_learning_rate", 0.1),
            gamma=h.get("gamma", 1e-3),
            weight_decouple=False,
        ),
        differs="adds 1e-15 to v inside the root",
    ),
    "amsbound": Entry(
        lambda p, h: po.AdaBound(
            p,
            **options(h),
            final_lr=h.get("final_learning_rate", 0.1),
            gamma=h.get("gamma", 1e-3),
            weight_decouple=False,
            ams_bound=True,
        ),
        differs="adds 1e-15 to v inside the root",
    ),
    "adabelief": Entry(lambda p, h: po.AdaBelief(p, **options(h))),
    "lion": Entry(lambda p, h: po.Lion(p, **options(h))),
    "yogi": Entry(
        lambda p, h: po.Yogi(p, **options(h), initial_accumulator=h["initial"]),
        differs="m begins at `initial` too; eps is added to the corrected root",
    ),
    "laprop": Entry(
        lambda p, h: po.LaProp(p, **options(h), fixed_decay=True),
        differs="adds 1e-15 to v inside the root, and eps before v is corrected",
    ),
    "adopt": Entry(
        lambda p, h: po.ADOPT(
            p, **options(h), weight_decouple=True, clip_lambda=lambda step: (step - 1) ** 0.25
        ),
        differs="decays in its first step too",
    ),
    "ademamix": Entry(
        lambda p, h: po.AdEMAMix(
            p, **options(h, "b1", "b2", "b3"), alpha=h["alpha"], weight_decouple=True
        )
    ),
    "mars": Entry(
        lambda p, h: po.MARS(
            p, **options(h), gamma=h["gamma"], mars_type="adamw", optimize_1d=True
        ),
        differs="adds 1e-15 to v inside the root, and eps before v is corrected",
    ),
    "adan": Entry(lambda p, h: po.Adan(p, **options(h, "b1", "b2", "b3"))),
    "stableadamw": Entry(lambda p, h: po.StableAdamW(p, **options(h), kahan_sum=False)),
    "novograd": Entry(
        lambda p, h: po.NovoGrad(p, **options(h) | {"eps": h["eps_root"] ** 0.5}),
        differs="eps, here the root of eps_root, is added outside the root",
        ours=lambda h: {"eps": h["eps_root"] ** 0.5, "eps_root": 0.0},
    ),
    "lamb": Entry(
        lambda p, h: po.Lamb(
            p, **options(h), weight_decouple=False, adam_debias=True, max_grad_norm=0.0
        ),
        differs="adds eps to the norm that the trust ratio divides by",
    ),
    "lars": Entry(
        lambda p, h: po.LARS(
            p, **only(h, momentum="momentum", trust_coefficient="trust_coefficient"), foreach=False
        ),
        differs="neither scales nor decays a vector; the learning rate multiplies the momentum",
        ours={"convention": "mae", "trust_mask": False, "mask": False},
    ),
    "adamp": Entry(
        lambda p, h: po.AdamP(p, **options(h), delta=h["delta"], wd_ratio=h["wd_ratio"]),
        differs="eps is added to the root before v is corrected",
    ),
    "ranger": Entry(
        lambda p, h: po.Ranger(
            p,
            **options(h),
            k=h.get("sync_period", 6),
            alpha=h.get("slow_step_size", 0.5),
            use_gc=False,
            degenerated_to_sgd=True,
        ),
        differs="rounding only: rho_t loses digits in float64",
        note="by its default, degenerated_to_sgd=False, its first steps add m, uphill",
    ),
    "lookahead": Entry(
        lambda p, h: po.Lookahead(
            torch.optim.AdamW(p, **options(h)), k=h["sync_period"], alpha=h["slow_step_size"]
        )
    ),
    "cautious_lion": Entry(lambda p, h: po.Lion(p, **options(h), cautious=True)),
    "schedule_free_sgd": Entry(
        lambda p, h: po.ScheduleFreeSGD(
            p,
            **only(
                h,
                momentum="b1",
                r="step_power",
                weight_lr_power="weight_power",
                warmup_steps="warmup_steps",
            ),
            foreach=False,
        )
    ),
    "schedule_free_adamw": Entry(
        lambda p, h: po.ScheduleFreeAdamW(
            p,
            **options(h)
            | only(h, r="step_power", weight_lr_power="weight_power", warmup_steps="warmup_steps"),
        ),
        differs="adds 1e-15 to the corrected v inside the root",
        lacks=("inner_momentum",),
    ),
    "schedule_free_radam": Entry(
        lambda p, h: po.ScheduleFreeRAdam(
            p,
            **options(h)
            | only(
                h,
                r="step_power",
                weight_lr_power="weight_power",
                silent_sgd_phase="silent_sgd_phase",
            ),
        ),
        differs=(
            "rounding; but with silent_sgd_phase=False its learning rate is 1 before the "
            "rectification"
        ),
    ),
    "muon": Entry(
        lambda p, h: po.Muon(
            [{"params": p, "use_muon": True}],
            **only(h, momentum="b1"),
        ),
        differs="divides by max(|x|, 1e-7), the author by |x| + 1e-7",
        ours={"convention": "torch"},
        casts_out=True,
    ),
    "soap": Entry(
        lambda p, h: po.SOAP(
            p,
            betas=(h.get("b1", 0.95), h.get("b2", 0.95)),
            **only(
                h,
                eps="eps",
                shampoo_beta="shampoo_beta",
                max_precondition_dim="max_precond_dim",
                precondition_frequency="precondition_frequency",
            ),
            foreach=False,
        ),
        casts_out=True,
    ),
    "adafactor": Entry(
        lambda p, h: po.AdaFactor(
            p,
            lr=h["learning_rate"],
            betas=(h.get("b1"), 0.999),
            decay_rate=-h.get("decay_rate", 0.8),
            clip_threshold=h.get("threshold", 1.0),
            relative_step=False,
            eps1=h.get("eps", 1e-30),
            eps2=h.get("eps_scale", 1e-3),
            momentum_dtype=torch.float64,
        )
    ),
}
