"""optax and optax.contrib."""

from __future__ import annotations

import jax.numpy as jnp
import optax
from optax import contrib

from benchmarks.conformance.libraries import Entry

PACKAGES = ("optax",)
NO_DECAY = ("weight_decay",)


def only(h, *names):
    return {name: h[name] for name in names if name in h}


def adam(h):
    return only(h, "b1", "b2", "eps")


def l2(h, after):
    """L2 in front of an optimizer that has no decay."""
    return optax.chain(optax.add_decayed_weights(h.get("weight_decay", 0.0)), after)


TABLE = {
    "adam": Entry(lambda lr, h: optax.adam(lr, **adam(h))),
    "adamw": Entry(
        lambda lr, h: optax.adamw(
            lr, **adam(h), weight_decay=h["weight_decay"] / h["learning_rate"]
        )
    ),
    "amsgrad": Entry(
        lambda lr, h: optax.amsgrad(
            lr, **adam(h), bias_correction_mu=False, bias_correction_nu=False
        )
    ),
    "radam": Entry(
        lambda lr, h: optax.radam(lr, **adam(h)),
        differs=(
            "where rho_t < 5 it steps by the corrected m, the authors' code not at all; eps "
            "is added to the corrected root"
        ),
        ours={"convention": "optax"},
        lacks=NO_DECAY,
    ),
    "nadam": Entry(
        lambda lr, h: l2(h, optax.nadam(lr, **adam(h))),
        differs="b1 is constant, the reference warms it up",
        ours={"convention": "optax"},
    ),
    "nadamw": Entry(
        lambda lr, h: optax.nadamw(lr, **adam(h), weight_decay=h["weight_decay"]),
        differs="b1 is constant, the reference warms it up",
        ours={"convention": "optax"},
    ),
    "adamax": Entry(lambda lr, h: l2(h, optax.adamax(lr, **adam(h)))),
    "adagrad": Entry(
        lambda lr, h: l2(h, optax.adagrad(lr, **only(h, "initial_accumulator_value", "eps"))),
        differs="eps is added inside the root",
        ours={"convention": "optax"},
    ),
    "adadelta": Entry(lambda lr, h: l2(h, optax.adadelta(lr, **only(h, "rho", "eps")))),
    "rmsprop": Entry(
        lambda lr, h: l2(h, optax.rmsprop(lr, decay=h["b2"], eps=h["eps"], eps_in_sqrt=False))
    ),
    "sgd": Entry(
        lambda lr, h: l2(h, optax.sgd(lr, **only(h, "momentum", "nesterov"))), lacks=("dampening",)
    ),
    "adabelief": Entry(
        lambda lr, h: optax.adabelief(lr, **adam(h), eps_root=h["eps"]), lacks=NO_DECAY
    ),
    "lion": Entry(lambda lr, h: optax.lion(lr, **adam(h), weight_decay=h.get("weight_decay", 0.0))),
    "yogi": Entry(
        lambda lr, h: optax.yogi(lr, **adam(h)),
        differs="m and v begin at 1e-6, whatever `initial`; eps is added to the corrected root",
    ),
    "adopt": Entry(lambda lr, h: contrib.adopt(lr, **adam(h)), lacks=NO_DECAY),
    "ademamix": Entry(
        lambda lr, h: contrib.ademamix(
            lr, **only(h, "b1", "b2", "b3", "alpha", "eps", "weight_decay")
        )
    ),
    "adan": Entry(
        lambda lr, h: optax.adan(
            lr, **only(h, "b1", "b2", "b3", "eps", "weight_decay"), eps_root=0.0
        ),
        differs=(
            "has 1 - b2 in the place of b2 where it looks ahead; its decay is decoupled, not "
            "proximal"
        ),
        ours={"convention": "optax", "decay": "decoupled"},
    ),
    "novograd": Entry(
        lambda lr, h: optax.novograd(
            lr, h["b1"], h["b2"], h["eps"], h["eps_root"], h.get("weight_decay", 0.0)
        )
    ),
    "lamb": Entry(
        lambda lr, h: optax.lamb(lr, **adam(h), weight_decay=h["weight_decay"]),
        differs="corrects m and v for their start at zero",
        ours={"convention": "optax"},
    ),
    "lars": Entry(
        lambda lr, h: optax.lars(lr, **only(h, "weight_decay", "trust_coefficient", "momentum"))
    ),
    "schedule_free_sgd": Entry(
        lambda lr, h: contrib.schedule_free(
            l2(h, optax.sgd(lr)), lr, h["b1"], h.get("weight_power", 2.0)
        ),
        lacks=("step_power", "warmup_steps"),
    ),
    "schedule_free_adamw": Entry(
        lambda lr, h: contrib.schedule_free(
            optax.adamw(lr, 0.0, h["b2"], h["eps"], weight_decay=h.get("weight_decay", 0.0)),
            lr,
            h["b1"],
            h.get("weight_power", 2.0),
        ),
        lacks=("step_power", "warmup_steps"),
    ),
    "muon": Entry(
        lambda lr, h: contrib.muon(
            lr,
            beta=h["b1"],
            weight_decay=h.get("weight_decay", 0.0),
            eps=1e-7,
            muon_weight_dimension_numbers=contrib.MuonDimensionNumbers(1, 0),
        ),
        differs=(
            "corrects the average and the gradient in it for their start at zero, which "
            "changes their shares"
        ),
    ),
    "adafactor": Entry(
        lambda lr, h: optax.adafactor(
            lr,
            1,
            h.get("decay_rate", 0.8),
            clipping_threshold=h.get("threshold", 1.0),
            momentum=h.get("b1"),
            dtype_momentum=jnp.float64,
            eps=h.get("eps", 1e-30),
        ),
        differs="1 - t^-0.8 is in float32",
        lacks=("eps_scale",),
    ),
}
