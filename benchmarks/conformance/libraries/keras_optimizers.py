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
    return {names[k]: v for k, v in h.items() if k in names} | {"learning_rate": h["learning_rate"]}


KERAS = {"convention": "keras"}

TABLE = {
    "adam": Entry(
        lambda h: optimizers.Adam(**named(h)),
        differs="eps is added to the root before v is corrected: the eps-hat form",
        ours=KERAS,
    ),
    "adamw": Entry(
        lambda h: optimizers.AdamW(
            **named(h) | {"weight_decay": h["weight_decay"] / h["learning_rate"]}
        ),
        differs="eps is added to the root before v is corrected: the eps-hat form",
        ours=KERAS,
    ),
    "amsgrad": Entry(
        lambda h: optimizers.Adam(**named(h), amsgrad=True),
        differs=(
            "corrects m and the largest v for their start at zero, the paper nothing; the "
            "eps-hat form"
        ),
        ours=KERAS,
    ),
    "nadamw": Entry(
        lambda h: optimizers.Nadam(**named(h)),
        differs="b1 warms up by 0.96^t, 250 times as fast",
        ours=KERAS,
    ),
    "nadam": Entry(
        lambda h: optimizers.Nadam(**named(h)),
        differs="b1 warms up by 0.96^t, 250 times as fast; its decay is decoupled",
        ours=KERAS | {"decay": "decoupled"},
    ),
    "adamax": Entry(
        lambda h: optimizers.Adamax(**named(h)),
        differs="u = max(b2 u, abs(g)), and eps is added to u; its decay is decoupled",
        ours=KERAS | {"decay": "decoupled"},
    ),
    "adagrad": Entry(
        lambda h: optimizers.Adagrad(**named(h)),
        differs="eps is added inside the root; its decay is decoupled",
        ours=KERAS | {"decay": "decoupled"},
    ),
    "adadelta": Entry(
        lambda h: optimizers.Adadelta(**named(h)),
        differs="its decay is decoupled, not L2",
        ours={"decay": "decoupled"},
    ),
    "rmsprop": Entry(
        lambda h: optimizers.RMSprop(**named(h, b2="rho")),
        differs="eps is added inside the root; its decay is decoupled",
        ours=KERAS | {"decay": "decoupled"},
    ),
    "sgd": Entry(
        lambda h: optimizers.SGD(**named(h)),
        differs=(
            "its decay is decoupled, not L2; the momentum is one of steps, each with the "
            "learning rate of its time"
        ),
        ours=KERAS | {"decay": "decoupled"},
        lacks=("dampening",),
    ),
    "sgdw": Entry(lambda h: optimizers.SGD(**named(h))),
    "lion": Entry(lambda h: optimizers.Lion(**named(h))),
    "lamb": Entry(
        lambda h: optimizers.Lamb(**named(h)),
        differs="corrects m and v for their start at zero; the decay is outside of the trust ratio",
    ),
    "schedule_free_adamw": Entry(
        lambda h: optimizers.ScheduleFreeAdamW(
            **named(h, warmup_steps="warmup_steps") | {"beta_1": h["b1"]}
        ),
        lacks=("weight_power", "step_power", "inner_momentum"),
    ),
    "muon": Entry(
        lambda h: optimizers.Muon(
            h["learning_rate"], momentum=h["b1"], weight_decay=h.get("weight_decay"), rms_rate=None
        ),
        differs="the momentum is a sum, so that eps weighs less; no factor for tall matrices",
    ),
    "adafactor": Entry(
        lambda h: optimizers.Adafactor(
            h["learning_rate"],
            -h.get("decay_rate", 0.8),
            h.get("eps", 1e-30),
            h.get("eps_scale", 1e-3),
            h.get("threshold", 1.0),
            relative_step=False,
        ),
        differs="its means are in float32",
        lacks=("b1",),
    ),
}
