"""keras.optimizers, on JAX."""

from __future__ import annotations

from keras import optimizers

from benchmarks.conformance.libraries import Entry

PACKAGES = ("keras",)
NAMED = {
    "b1": "beta_1",
    "b2": "beta_2",
    "eps": "epsilon",
    "rho": "rho",
    "initial_accumulator_value": "initial_accumulator_value",
    "momentum": "momentum",
    "nesterov": "nesterov",
    "weight_decay": "weight_decay",
}


def named(h, **others):
    names = NAMED | others
    return {names[k]: v for k, v in h.items() if k in names} | {
        "learning_rate": h["learning_rate"]
    }


KERAS = {"convention": "keras"}

TABLE = {
    "adam": Entry(lambda h: optimizers.Adam(**named(h)), "", KERAS),
    "adamw": Entry(
        lambda h: optimizers.AdamW(
            **named(h) | {"weight_decay": h["weight_decay"] / h["learning_rate"]}
        ),
        "",
        KERAS,
    ),
    "amsgrad": Entry(lambda h: optimizers.Adam(**named(h), amsgrad=True), "", KERAS),
    "nadamw": Entry(lambda h: optimizers.Nadam(**named(h)), "", KERAS),
    "nadam": Entry(lambda h: optimizers.Nadam(**named(h)), "", None, ("weight_decay",)),
    "adamax": Entry(lambda h: optimizers.Adamax(**named(h)), "", KERAS | {"decay": "decoupled"}),
    "adagrad": Entry(lambda h: optimizers.Adagrad(**named(h)), "", KERAS | {"decay": "decoupled"}),
    "adadelta": Entry(lambda h: optimizers.Adadelta(**named(h)), "", {"decay": "decoupled"}),
    "rmsprop": Entry(
        lambda h: optimizers.RMSprop(**named(h, b2="rho")), "", KERAS | {"decay": "decoupled"}
    ),
    "sgd": Entry(
        lambda h: optimizers.SGD(**named(h)),
        "",
        KERAS | {"decay": "decoupled"},
        ("dampening",),
    ),
    "sgdw": Entry(lambda h: optimizers.SGD(**named(h))),
    "lion": Entry(lambda h: optimizers.Lion(**named(h))),
    "lamb": Entry(lambda h: optimizers.Lamb(**named(h))),
    "schedule_free_adamw": Entry(
        lambda h: optimizers.ScheduleFreeAdamW(
            **named(h, warmup_steps="warmup_steps") | {"beta_1": h["b1"]}
        ),
        lacks=("weight_power", "step_power", "inner_momentum"),
    ),
    "muon": Entry(
        lambda h: optimizers.Muon(
            h["learning_rate"], momentum=h["b1"], weight_decay=h.get("weight_decay"), rms_rate=None
        )
    ),
    "adafactor": Entry(
        lambda h: optimizers.Adafactor(
            h["learning_rate"], -h.get("decay_rate", 0.8), h.get("eps", 1e-30),
            h.get("eps_scale", 1e-3), h.get("threshold", 1.0), relative_step=False,
        ),
        lacks=("b1",),
    ),
}  # fmt: skip
