"""Write a stage of your own in ten lines, and put it into an optimizer.

    python examples/own_stage.py
    python examples/own_stage.py --steps 500

The stage is caution (Liang et al., arXiv:2411.16085): a weight moves only where the direction and
the gradient of the step agree in sign, and those that move take steps that are larger in
proportion. It remembers nothing. The problem is a noisy quadratic, so that the distance to the
minimum is known. Prints the stages, and the median distance over 20 seeds.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from helpers import parsed, parser_of

from adaptive_opt import (
    AdaptiveStep,
    adaptive,
    debias,
    describe,
    first_moment,
    per_weight_rate,
    scale_by_learning_rate,
    second_moment,
    stage,
)


@stage
def cautious():
    def line(step: AdaptiveStep) -> AdaptiveStep:
        same = jnp.real(step.direction * jnp.conj(step.gradient)) > 0
        return step.set(direction=step.direction * same * (same.size / jnp.maximum(same.sum(), 1)))

    return line


def adam(learning_rate: float, *own: optax.GradientTransformationExtraArgs):
    """Adam, with stages of your own between its direction and its rate."""
    return optax.chain(
        adaptive(
            first_moment(0.9),
            second_moment(0.999),
            debias(0.9, 0.999),
            *own,
            per_weight_rate(1e-8),
        ),
        scale_by_learning_rate(learning_rate),
    )


def distance(optimizer: optax.GradientTransformation, steps: int, seed: jax.Array) -> jax.Array:
    """How far from the minimum of a noisy quadratic of condition 1,000 it ends."""
    curvature = jnp.logspace(-3, 0, 50)

    def step(carry, key):
        x, state = carry
        gradient = curvature * x + 0.01 * jax.random.normal(key, x.shape)
        updates, state = optimizer.update(gradient, state, x)
        return (optax.apply_updates(x, updates), state), None

    start, *keys = jax.random.split(jax.random.key(seed), steps + 1)
    x = jax.random.normal(start, curvature.shape)
    (x, _), _ = jax.lax.scan(step, (x, optimizer.init(x)), jnp.stack(keys))
    return jnp.linalg.norm(x)


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=200, help="steps per run (200)")
    options = parsed(parser, arguments)
    optimizers = {"adam": adam(1e-2), "with caution": adam(1e-2, cautious())}
    print(describe(optimizers["with caution"]), "\n")
    medians = {}
    for name, optimizer in optimizers.items():
        run = jax.jit(jax.vmap(lambda seed, o=optimizer: distance(o, options.steps, seed)))
        medians[name] = float(jnp.median(run(jnp.arange(20))))
        print(f"{name:13} {medians[name]:.4f} from the minimum")
    return medians


if __name__ == "__main__":
    main()
