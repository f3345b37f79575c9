"""In a framework by config: one dict in its own words becomes an optimizer of this library.

    python examples/by_config.py
    python examples/by_config.py --steps 1000

A trainer that is driven by files needs one function: from its config to the plain data that
``adaptive_opt.make`` takes. Here are two such functions, for the words of MaxText's base.yml and of
Levanter's ``optimizer:`` section; the optimizer's name may be that of any recipe, and what else a
recipe takes stands under ``optimizer_settings``. Prints what is made of each, the learning rates at
some steps, and that a checkpoint's header makes the same optimizer again; draws the rates. A word
that is wrong is an error that names its place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from helpers import label_ends, look, parsed, parser_of, picture, table

from adaptive_opt import checkpoint_header, config, describe, make, read_telemetry, telemetry

MAXTEXT = {  # the words of MaxText's configs/base.yml, its defaults
    "opt_type": "adamw",
    "learning_rate": 3e-5,
    "warmup_steps_fraction": 0.1,
    "cosine_learning_rate_final_fraction": 0.1,  # "learning_rate_final_fraction" in newer ones
    "adam_b1": 0.9,
    "adam_b2": 0.95,
    "adam_eps": 1e-8,
    "adam_eps_root": 0.0,
    "adam_weight_decay": 0.1,
    "gradient_clipping_threshold": 1.0,
}
LEVANTER = {  # the words of Levanter's OptimizerConfig
    "type": "adamod",
    "learning_rate": 6e-4,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "max_grad_norm": 1.0,
    "warmup": 0.01,
    "min_lr_ratio": 0.1,
    "lr_schedule": "cosine",
    "optimizer_settings": {"b3": 0.999, "mask": "decay_mask"},
}


def warmup_cosine(peak: float, steps: int, warmup: float, last: float) -> dict[str, Any]:
    """The schedule of both: up along a line, down along a cosine to a part of the peak."""
    return {
        "schedule": "warmup_cosine_decay_schedule",
        "init_value": 0.0,
        "peak_value": peak,
        "warmup_steps": int(warmup * steps),
        "decay_steps": steps,
        "end_value": last * peak,
    }


def clipped(most: float | None, rule: Mapping[str, Any]) -> dict[str, Any]:
    """With clipping by the norm of all gradients in front, if there is to be any."""
    clip = [{"optax": "clip_by_global_norm", "max_norm": most}] if most else []
    return {"chain": [*clip, dict(rule)]}


def from_maxtext(words: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Data for ``make`` in place of MaxText's ``get_optimizer``."""
    rule = {
        "name": words["opt_type"],
        "learning_rate": warmup_cosine(
            words["learning_rate"],
            steps,
            words["warmup_steps_fraction"],
            words["cosine_learning_rate_final_fraction"],
        ),
        "b1": words["adam_b1"],
        "b2": words["adam_b2"],
        "eps": words["adam_eps"],
        "eps_root": words["adam_eps_root"],
        "weight_decay": words["adam_weight_decay"],
    } | words.get("optimizer_settings", {})
    return clipped(words["gradient_clipping_threshold"], rule)


def from_levanter(words: Mapping[str, Any], steps: int) -> dict[str, Any]:
    """Data for ``make`` in place of Levanter's ``OptimizerConfig.build``."""
    if words["lr_schedule"] != "cosine":
        raise ValueError(f"lr_schedule: only 'cosine' is shown here, got {words['lr_schedule']!r}.")
    rule = {
        "name": words["type"],
        "learning_rate": warmup_cosine(
            words["learning_rate"], steps, words["warmup"], words["min_lr_ratio"]
        ),
        "b1": words["beta1"],
        "b2": words["beta2"],
        "eps": words["epsilon"],
        "weight_decay": words["weight_decay"],
    } | words.get("optimizer_settings", {})
    return clipped(words["max_grad_norm"], rule)


CONFIGS = {"MaxText": (MAXTEXT, from_maxtext), "Levanter": (LEVANTER, from_levanter)}


def rates(data: Mapping[str, Any], steps: int) -> list[float]:
    """The learning rate of the optimizer itself at every step, as its telemetry tells it."""
    *clip, rule = data["chain"]
    watched = make({"chain": [*clip, rule | {"observers": telemetry(every=1)}]})
    x = {"kernel": jnp.ones((2, 2))}
    state, update = watched.init(x), jax.jit(watched.update)
    found = []
    for _ in range(steps):
        _, state = update(x, state, x)
        found.append(read_telemetry(state)["learning_rate"])
    return found


def draw(found: Mapping[str, Sequence[float]], path: str) -> None:
    """The rates of each framework, over their peak."""
    title = "Each dict has the schedule of its framework:\nup along a line, down along a cosine"
    with picture(path, title, figsize=(6.5, 3.4)) as axes:
        for index, (framework, values) in enumerate(found.items()):
            label = f"{framework}, peak {max(values):.1e}"
            axes.plot(np.arange(1, len(values) + 1), np.divide(values, max(values)), label=label,
                      **look(index))  # fmt: skip
        axes.set(xlabel="step", ylabel="learning rate over its peak")
        label_ends(axes)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=100, help="of the whole training (100)")
    parser.add_argument("--output", default="by_config.png", help="the picture (by_config.png)")
    options = parsed(parser, arguments)
    params, made, found, rows = {"kernel": jnp.ones((2, 2))}, {}, {}, []
    shown = sorted({1, 1 + options.steps // 10, 1 + options.steps // 2, options.steps})
    for framework, (words, read) in CONFIGS.items():
        data = read(words, options.steps)
        optimizer = made[framework] = make(data)
        print(f"{framework}: {json.dumps(words)}\n\n{describe(optimizer)}\n")
        header = json.loads(json.dumps(checkpoint_header(optimizer, optimizer.init(params))))
        again = "the same" if config(make(header)) == config(optimizer) else "another"
        print(f"The header of a checkpoint makes {again} optimizer again.\n")
        of_steps = found[framework] = rates(data, options.steps)
        at_some = {f"step {n}": f"{of_steps[n - 1]:.2e}" for n in shown}
        rows.append({"learning rate": framework} | at_some)
    print(table(rows))
    draw(found, options.output)
    print(f"The picture is in {options.output}.")
    return made


if __name__ == "__main__":
    main()
