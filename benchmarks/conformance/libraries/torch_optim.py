"""torch.optim."""

from __future__ import annotations

from torch import optim

from benchmarks.conformance.libraries import Entry, decay_of, paper_decay, torch_options

PACKAGES = ("torch",)


def single(h, *names):
    """What has no pair of betas."""
    given = {name: h[name] for name in names if name in h}
    return {"lr": h["learning_rate"], "weight_decay": decay_of(h), "foreach": False} | given


def adam(p, h, **more):
    return optim.Adam(p, **torch_options(h), **more, foreach=False)


TABLE = {
    "adam": Entry(adam),
    "adamw": Entry(lambda p, h: optim.AdamW(p, **paper_decay(h), foreach=False)),
    "amsgrad": Entry(
        lambda p, h: adam(p, h, amsgrad=True),
        differs="corrects m and the largest v for their start at zero, the paper nothing",
        ours={"convention": "torch"},
    ),
    "radam": Entry(
        lambda p, h: optim.RAdam(p, **torch_options(h), decoupled_weight_decay=True, foreach=False),
        differs="where rho_t <= 5 it steps by the corrected m, the authors' code not at all",
        ours={"convention": "torch", "decay": "decoupled"},
    ),
    "nadam": Entry(lambda p, h: optim.NAdam(p, **torch_options(h), foreach=False)),
    "nadamw": Entry(
        lambda p, h: optim.NAdam(p, **torch_options(h), decoupled_weight_decay=True, foreach=False)
    ),
    "adamax": Entry(lambda p, h: optim.Adamax(p, **torch_options(h), foreach=False)),
    "adagrad": Entry(
        lambda p, h: optim.Adagrad(p, **single(h, "eps", "initial_accumulator_value"))
    ),
    "adadelta": Entry(lambda p, h: optim.Adadelta(p, **single(h, "rho", "eps"))),
    "rmsprop": Entry(lambda p, h: optim.RMSprop(p, **single(h, "eps"), alpha=h["b2"])),
    "sgd": Entry(lambda p, h: optim.SGD(p, **single(h, "momentum", "dampening", "nesterov"))),
    "muon": Entry(
        lambda p, h: optim.Muon(
            p, lr=h["learning_rate"], momentum=h["b1"], weight_decay=decay_of(h)
        ),
        differs="divides by max(|x|, 1e-7), the author by |x| + 1e-7",
        ours={"convention": "torch"},
        casts_out=True,
    ),
    "adafactor": Entry(
        lambda p, h: optim.Adafactor(
            p,
            lr=h["learning_rate"],
            beta2_decay=-h.get("decay_rate", 0.8),
            eps=(h.get("eps", 1e-30), h.get("eps_scale", 1e-3)),
            d=h.get("threshold", 1.0),
            foreach=False,
        ),
        lacks=("b1",),
    ),
}
