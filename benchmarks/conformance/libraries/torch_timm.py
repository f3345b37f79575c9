"""timm.optim, without what it takes from torch.optim.

Its optimizers need nothing of its models, whose package wants a torchvision of the same build:
the modules around them are stood in for.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types

import torch

from benchmarks.conformance.libraries import Entry, decay_of, paper_decay, torch_options

PACKAGES = ("timm",)
if "timm" not in sys.modules:
    package, models = types.ModuleType("timm"), types.ModuleType("timm.models")
    package.__path__ = [str(importlib.metadata.distribution("timm").locate_file("timm"))]
    models.group_parameters = None
    sys.modules |= {"timm": package, "timm.models": models}

from timm import optim  # noqa: E402


def options(h, *betas):
    return torch_options(h, *betas) | {"foreach": False}


TABLE = {
    "adamw": Entry(lambda p, h: optim.AdamWLegacy(p, **paper_decay(h), foreach=False)),
    "nadam": Entry(lambda p, h: optim.NAdamLegacy(p, **torch_options(h))),
    "nadamw": Entry(
        lambda p, h: optim.NAdamW(p, **options(h)),
        differs=(
            "b1 m + (1 - b1) g is corrected as a whole, and b1 is constant; the reference "
            "warms it up"
        ),
    ),
    "radam": Entry(
        lambda p, h: optim.RAdamLegacy(p, **torch_options(h)),
        differs="where rho_t < 5 it steps by the corrected m, the authors' code not at all",
        ours={"convention": "torch", "decay": "decoupled"},
        casts_out=True,
    ),
    "rmsprop": Entry(
        lambda p, h: optim.RMSpropTF(
            p, h["learning_rate"], h["b2"], h["eps"], decay_of(h), foreach=False
        ),
        differs="v begins at 1, and eps is added inside the root",
        ours={"convention": "tf1"},
    ),
    "sgdw": Entry(
        lambda p, h: optim.SGDW(
            p, h["learning_rate"], h["momentum"], 0.0, decay_of(h), h["nesterov"], foreach=False
        ),
        differs="the momentum is one of gradients, not of steps",
        ours={"convention": "torch"},
    ),
    "adabelief": Entry(lambda p, h: optim.AdaBelief(p, **torch_options(h), rectify=False)),
    "lion": Entry(lambda p, h: optim.Lion(p, **options(h))),
    "laprop": Entry(
        lambda p, h: optim.LaProp(p, **paper_decay(h), foreach=False),
        differs="multiplies the decay by the learning rate of the time",
    ),
    "adopt": Entry(lambda p, h: optim.Adopt(p, **options(h), clip_exp=0.25, decoupled=True)),
    "mars": Entry(
        lambda p, h: optim.Mars(p, **torch_options(h), gamma=h["gamma"], optimize_1d=True)
    ),
    "adan": Entry(lambda p, h: optim.Adan(p, **options(h, "b1", "b2", "b3"))),
    "novograd": Entry(
        lambda p, h: optim.NvNovoGrad(p, **torch_options(h) | {"eps": h["eps_root"] ** 0.5}),
        differs="eps, here the root of eps_root, is added outside the root",
        ours=lambda h: {"eps": h["eps_root"] ** 0.5, "eps_root": 0.0},
    ),
    "lamb": Entry(
        lambda p, h: optim.Lamb(p, **options(h), bias_correction=False, max_grad_norm=None)
    ),
    "lars": Entry(
        lambda p, h: optim.Lars(
            p,
            h["learning_rate"],
            h["momentum"],
            0.0,
            decay_of(h),
            trust_coeff=h["trust_coefficient"],
            eps=0.0,
            foreach=False,
        ),
        differs=(
            "divides by |g| + wd |x|, as the paper does, not by |g + wd x|; the learning rate"
            " multiplies the momentum"
        ),
    ),
    "adamp": Entry(
        lambda p, h: optim.AdamP(p, **torch_options(h), delta=h["delta"], wd_ratio=h["wd_ratio"])
    ),
    "lookahead": Entry(
        lambda p, h: optim.Lookahead(
            torch.optim.AdamW(p, **torch_options(h), foreach=False),
            h["slow_step_size"],
            h["sync_period"],
        ),
        differs="its slow weights begin at the first average, which so moves nothing",
    ),
    "cautious_adamw": Entry(
        lambda p, h: optim.AdamWLegacy(p, **options(h), caution=True),
        differs="eps is added to the corrected root, in the authors' code before v is corrected",
        ours={"convention": "torch"},
    ),
    "cautious_lion": Entry(
        lambda p, h: optim.Lion(p, **options(h), caution=True),
        differs="divides the mask by its mean k/n, the authors by (k + 1)/n",
        ours={"modifiers": [["cautious", {}]]},
    ),
    "muon": Entry(
        lambda p, h: optim.Muon(
            p,
            lr=h["learning_rate"],
            weight_decay=decay_of(h),
            momentum=h["b1"],
            nesterov=True,
            adjust_lr_fn="original",
            ns_coefficients="original",
        ),
        differs=(
            "sends matrices with a side under 4 to NAdamW; divides by max(|x|, 1e-7), the "
            "author by |x| + 1e-7"
        ),
        casts_out=True,
    ),
    "adafactor": Entry(
        lambda p, h: optim.Adafactor(
            p,
            h["learning_rate"],
            h.get("eps", 1e-30),
            h.get("eps_scale", 1e-3),
            h.get("threshold", 1.0),
            -h.get("decay_rate", 0.8),
            betas=(h["b1"], 0.999) if "b1" in h else None,
            min_dim_size_to_factor=1,
        ),
        differs="a learning rate that is given is not multiplied by the RMS of the parameters",
    ),
}
