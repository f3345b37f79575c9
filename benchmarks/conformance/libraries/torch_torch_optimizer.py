"""torch_optimizer."""

from __future__ import annotations

import torch
import torch_optimizer as to

from benchmarks.conformance.libraries import Entry, decay_of, torch_options

PACKAGES = ("torch_optimizer",)


def bounds(h):
    return {"final_lr": h.get("final_learning_rate", 0.1), "gamma": h.get("gamma", 1e-3)}


TABLE = {
    "radam": Entry(
        lambda p, h: to.RAdam(p, **torch_options(h)),
        differs=(
            "where rho_t < 5 it steps by the corrected m, the authors' code (by default) not at all"
        ),
        ours={"convention": "torch", "decay": "decoupled"},
        casts_out=True,
    ),
    "sgdw": Entry(
        lambda p, h: to.SGDW(p, h["learning_rate"], h["momentum"], 0.0, decay_of(h), h["nesterov"]),
        differs=(
            "its decay subtracts lr wd from every weight, whatever the weight is; the "
            "momentum is one of gradients"
        ),
    ),
    "adamod": Entry(lambda p, h: to.AdaMod(p, **torch_options(h), beta3=h["b3"])),
    "diffgrad": Entry(lambda p, h: to.DiffGrad(p, **torch_options(h))),
    "adabound": Entry(lambda p, h: to.AdaBound(p, **torch_options(h), **bounds(h))),
    "amsbound": Entry(lambda p, h: to.AdaBound(p, **torch_options(h), **bounds(h), amsbound=True)),
    "adabelief": Entry(lambda p, h: to.AdaBelief(p, **torch_options(h), weight_decouple=True)),
    "yogi": Entry(
        lambda p, h: to.Yogi(p, **torch_options(h), initial_accumulator=h["initial"]),
        differs="m begins at `initial` too; eps is added to the corrected root",
    ),
    "novograd": Entry(
        lambda p, h: to.NovoGrad(p, **torch_options(h) | {"eps": h["eps_root"] ** 0.5}),
        differs="eps, here the root of eps_root, is added outside the root",
        ours=lambda h: {"eps": h["eps_root"] ** 0.5, "eps_root": 0.0},
    ),
    "lamb": Entry(lambda p, h: to.Lamb(p, **torch_options(h), clamp_value=1e30, debias=False)),
    "lars": Entry(
        lambda p, h: to.LARS(
            p,
            h["learning_rate"],
            h["momentum"],
            0.0,
            decay_of(h),
            trust_coefficient=h["trust_coefficient"],
            eps=0.0,
        ),
        differs=(
            "divides by |g| + wd |x|, as the paper does, not by |g + wd x|; the learning rate"
            " multiplies the momentum"
        ),
    ),
    "adamp": Entry(
        lambda p, h: to.AdamP(p, **torch_options(h), delta=h["delta"], wd_ratio=h["wd_ratio"]),
        differs="adds eps to the norms in its cosine, the authors bound them by it",
    ),
    "ranger": Entry(
        lambda p, h: to.Ranger(
            p, **torch_options(h), k=h.get("sync_period", 6), alpha=h.get("slow_step_size", 0.5)
        ),
        differs="rounding only: rho_t loses digits in float64",
        casts_out=True,
    ),
    "lookahead": Entry(
        lambda p, h: to.Lookahead(
            torch.optim.AdamW(p, **torch_options(h), foreach=False),
            h["sync_period"],
            h["slow_step_size"],
        ),
        differs=(
            "its slow weights begin after the first step, and it averages after steps 1, k + "
            "1, 2k + 1, ..."
        ),
    ),
    "adafactor": Entry(
        lambda p, h: to.Adafactor(
            p,
            h["learning_rate"],
            (h.get("eps", 1e-30), h.get("eps_scale", 1e-3)),
            h.get("threshold", 1.0),
            -h.get("decay_rate", 0.8),
            h.get("b1"),
            relative_step=False,
        ),
        lacks=("b1",),
        casts_out=True,
        note="fails on a tensor of three axes",
    ),
}
