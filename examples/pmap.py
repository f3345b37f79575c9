"""Train with jax.pmap: every device its part of the batch, all of them the same weights.

    python examples/pmap.py
    python examples/pmap.py --devices 4 --steps 100

An older way than sharded arrays (examples/transformer.py), still in many programs. A small network
learns scikit-learn's digits on 8 devices; where there are not so many, the CPU is taken for 8.
Gradients are averaged over the devices, and every device updates all weights by itself, with a
state of its own. Prints the losses beside those of one device that has the whole batch, how far the
weights are from each other (rounding), and whether all devices hold the same bits. Draws the
losses.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import digits, label_ends, look, parsed, parser_of, picture, table

from adaptive_opt import lamb, skip_spikes

BATCH = 64
# Both look at whole tensors: the trust ratio of LAMB, the norm of the gradient. Every device has
# them whole, so that there are no axes over which to add: axis_name=().
OPTIMIZER = skip_spikes(lamb(1e-2, axis_name=()), axis_name=())


class Network(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        return nn.Dense(10)(nn.relu(nn.Dense(64)(images.reshape(len(images), 64))))


def loss_of(params, images, labels) -> jax.Array:
    logits = Network().apply({"params": params}, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def step(axis, params, state, images, labels):
    """A step on one device; of several, the gradients are averaged first."""
    loss, gradients = jax.value_and_grad(loss_of)(params, images, labels)
    if axis is not None:
        loss, gradients = jax.lax.pmean((loss, gradients), axis)
    updates, state = OPTIMIZER.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def train(devices: Sequence[jax.Device] | None, steps: int, seed: int):
    """The weights, of pmap with an axis for the devices in front, and the loss of every step."""
    images, labels = digits(seed)
    params = Network().init(jax.random.key(seed), images[:1])["params"]
    training = params, OPTIMIZER.init(params)
    if devices is None:
        take = jax.jit(functools.partial(step, None))
    else:
        take = jax.pmap(functools.partial(step, "batch"), axis_name="batch", devices=devices)
        training = jax.tree.map(lambda x: jnp.stack([x] * len(devices)), training)
    rng, losses = np.random.default_rng(seed), []
    for _ in range(steps):
        chosen = rng.integers(len(images), size=BATCH)
        batch = images[chosen], labels[chosen]
        if devices is not None:
            batch = [x.reshape(len(devices), -1, *x.shape[1:]) for x in batch]
        *training, loss = take(*training, *batch)
        losses.append(float(np.ravel(loss)[0]))
    return training[0], losses


def draw(losses: Sequence[float], of_one: Sequence[float], devices: int, path: str) -> None:
    """The losses of several devices, as dots on the line of one."""
    apart, steps = np.abs(np.subtract(losses, of_one)).max(), 1 + np.arange(len(losses))
    title = f"{devices} devices train as one does:\nlosses differ by {apart:.0e} at most"
    with picture(path, title, figsize=(6, 3.4)) as axes:
        axes.plot(steps, of_one, label="one device", **look(0))
        dots = {"marker": "o", "markersize": 3, "linestyle": "", "color": look(1)["color"]}
        axes.plot(steps, losses, label=f"{devices} devices", **dots)
        axes.set(xlabel="step", ylabel="training loss (nats)")
        axes.grid(alpha=0.25)
        label_ends(axes)


def main(arguments: Sequence[str] | None = None) -> tuple[list[float], list[float]]:
    parser = parser_of(__doc__)
    parser.add_argument("--devices", type=int, default=8, help="how many (8)")
    parser.add_argument("--steps", type=int, default=50, help="(50)")
    parser.add_argument("--output", default="pmap.png", help="the picture (pmap.png)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (0)")
    options = parsed(parser, arguments)
    if BATCH % options.devices:
        parser.error(f"a batch of {BATCH} cannot be split over --devices {options.devices}")
    if jax.default_backend() == "cpu" and len(jax.devices()) < options.devices:
        parser.error(f"--devices {options.devices}: there are only {len(jax.devices())}")

    several, losses = train(jax.devices()[: options.devices], options.steps, options.seed)
    one, losses_of_one = train(None, options.steps, options.seed)
    shown = sorted({1, 10, options.steps // 2, options.steps} & {*range(1, options.steps + 1)})
    print(
        table(
            [
                {
                    "step": str(n),
                    f"loss on {options.devices}": f"{losses[n - 1]:.6f}",
                    "loss on one": f"{losses_of_one[n - 1]:.6f}",
                }
                for n in shown
            ]
        )
    )
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(several)]
    alike = all((leaf == leaf[:1]).all() for leaf in leaves)
    pairs = zip(leaves, jax.tree.leaves(one), strict=True)
    worst = max(float(np.abs(a[0] - b).max()) for a, b in pairs)
    print(f"The same bits on all devices: {'yes' if alike else 'no'}.")
    print(f"Largest difference of a weight from one device: {worst:.1e}.")
    draw(losses, losses_of_one, options.devices, options.output)
    print(f"The picture is in {options.output}.")
    return losses, losses_of_one


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    main()
