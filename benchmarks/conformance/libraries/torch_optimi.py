"""optimi."""

from __future__ import annotations

import optimi

from benchmarks.conformance.libraries import Entry, decay_of, paper_decay, torch_options

PACKAGES = ("torch-optimi",)
LOOPED = {"foreach": False, "triton": False}

TABLE = {
    "adam": Entry(lambda p, h: optimi.Adam(p, **torch_options(h), **LOOPED)),
    "adamw": Entry(
        lambda p, h: optimi.AdamW(p, **paper_decay(h), **LOOPED),
        differs="where 1 - lr wd is 0, it does not decay",
    ),
    "radam": Entry(
        lambda p, h: optimi.RAdam(p, **torch_options(h), decouple_wd=True, **LOOPED),
        differs=(
            "where rho_t <= 5 it steps by the corrected m, the authors' code not at all; eps "
            "is added to the corrected root"
        ),
        ours={"convention": "optax", "decay": "decoupled"},
    ),
    "sgd": Entry(
        lambda p, h: optimi.SGD(
            p, h["learning_rate"], h.get("momentum", 0.0), decay_of(h), torch_init=True, **LOOPED
        ),
        lacks=("dampening", "nesterov"),
    ),
    "lion": Entry(lambda p, h: optimi.Lion(p, **torch_options(h), **LOOPED)),
    "adan": Entry(lambda p, h: optimi.Adan(p, **torch_options(h, "b1", "b2", "b3"), **LOOPED)),
    "stableadamw": Entry(lambda p, h: optimi.StableAdamW(p, **torch_options(h), **LOOPED)),
    "ranger": Entry(
        lambda p, h: optimi.Ranger(
            p,
            **torch_options(h),
            k=h.get("sync_period", 6),
            alpha=h.get("slow_step_size", 0.5),
            **LOOPED,
        ),
        differs="eps is added to the corrected root",
        ours={"convention": "optax"},
    ),
}
