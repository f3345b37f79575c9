"""A language model as large ones are trained: scanned layers, 16-bit parameters, an 8-bit state.

    python examples/language_model.py
    python examples/language_model.py --layers 8 --steps 1000 --output difference.png

Character by character on the source of Python's standard library. The layers are one: their weights
have an axis for the layers in front (``nn.scan``, ``nn.remat``), which the mask for weight decay
has to know. The same batches train float32 parameters, bfloat16 ones as they are, and bfloat16 ones
with ``master_weights`` around a state in 8 bits. Prints the bytes of parameters and state for a
weight and the held-out losses; draws how far the losses are from those of float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from helpers import (
    CHARACTERS,
    label_ends,
    library_text,
    look,
    parsed,
    parser_of,
    picture,
    pieces,
    table,
)
from tqdm import tqdm

from adaptive_opt import (
    adamw,
    decay_mask,
    decay_report,
    float32_params,
    low_memory,
    master_weights,
    train_step,
)

CONTEXT, BATCH = 32, 16
MASK = functools.partial(decay_mask, stacked="^layers")


class Layer(nn.Module):
    """Attention to what came before, then two dense layers; as ``nn.scan`` calls it."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        width, mask = x.shape[-1], nn.make_causal_mask(x[..., 0])
        normed = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(normed, mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))), None


class LanguageModel(nn.Module):
    """The logits of the next character, at every position."""

    width: int
    layers: int

    @nn.compact
    def __call__(self, text: jax.Array) -> jax.Array:
        x = nn.Embed(CHARACTERS, self.width)(text)
        x = x + nn.Embed(CONTEXT, self.width)(jnp.arange(text.shape[-1]))
        stack = nn.scan(
            nn.remat(Layer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        x, _ = stack(name="layers")(x, None)
        return nn.Dense(CHARACTERS)(nn.LayerNorm()(x))


def rule(learning_rate: float, steps: int) -> optax.GradientTransformationExtraArgs:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, warmup_steps=max(1, steps // 10), decay_steps=max(2, steps)
    )
    return adamw(schedule, b2=0.99, weight_decay=0.1, mask=MASK)


class Way(NamedTuple):
    """A dtype of the parameters, and what goes around the rule."""

    dtype: Any
    wrap: Callable[[optax.GradientTransformation], optax.GradientTransformation]


def small(inner):
    """5 bytes for a weight and its state."""
    return master_weights(low_memory(inner, "8-bit"))


WAYS = {
    "float32": Way(jnp.float32, lambda inner: inner),
    "bfloat16 as it is": Way(jnp.bfloat16, lambda inner: inner),
    "bfloat16, master weights": Way(jnp.bfloat16, small),
}


class Result(NamedTuple):
    losses: np.ndarray
    held_out: float
    bytes_per_weight: float


def train(name: str, options, fresh, text: tuple[np.ndarray, np.ndarray]) -> Result:
    """One of the ways, from the same weights on the same batches."""
    model = LanguageModel(options.width, options.layers)

    def loss_of(params, batch):
        params = jax.tree.map(lambda p: p.astype(jnp.float32), params)  # only storage is narrow
        logits = model.apply({"params": params}, batch[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    dtype, wrap = WAYS[name]
    params = jax.tree.map(lambda p: jnp.array(p, dtype), fresh)  # a step takes its own away
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), wrap(rule(options.learning_rate, options.steps))
    )
    state, step, losses = optimizer.init(params), train_step(loss_of, optimizer), []
    for number in tqdm(range(options.steps), desc=f"{name:24}", unit="step"):
        batch = pieces(text[0], (options.seed, number), BATCH, CONTEXT)
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves((params, state)))
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    if wrap is small:
        params = float32_params(state, params)  # to evaluate and to export
    evaluate = jax.jit(loss_of)
    batches = [pieces(text[1], (options.seed, 0, i), 4 * BATCH, CONTEXT) for i in range(8)]
    held_out = float(np.mean([float(evaluate(params, batch)) for batch in batches]))
    return Result(np.array(losses), held_out, kept / weights)


def conclusion(found: Mapping[str, Result]) -> str:
    """What the held-out losses say."""
    base, plain, master = (found[name].held_out for name in WAYS)
    if plain - base > 3 * abs(master - base):
        return "bfloat16 parameters fall behind float32 ones;\nwith master weights they do not"
    return "After so few steps all three are alike"


def draw(found: Mapping[str, Result], path: str) -> None:
    """Each loss less that of float32 on the same batch, averaged over a tenth of the steps."""
    base = found["float32"].losses
    window = max(1, len(base) // 10)
    with picture(path, conclusion(found), figsize=(7, 3.4)) as axes:
        axes.axhline(0, color="0.4", linewidth=0.8)
        for index, name in enumerate(WAYS):
            if name != "float32":
                apart = np.convolve(
                    found[name].losses - base, np.ones(window) / window, mode="valid"
                )
                axes.plot(window + np.arange(len(apart)), apart, label=name, **look(index))
        axes.set(xlabel="step", ylabel="training loss less that of float32 (nats)")
        axes.grid(alpha=0.25)
        label_ends(axes)


def main(arguments: Sequence[str] | None = None) -> dict[str, Result]:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=300, help="of each way (300)")
    add("--width", type=int, default=64, help="of the model, a multiple of 4 (64)")
    add("--layers", type=int, default=4, help="of the model (4)")
    add("--learning-rate", type=float, default=3e-3, help="at the peak (3e-3)")
    add("--output", default="language_model.png", help="the picture (language_model.png)")
    add("--seed", type=int, default=0, help="of weights and batches (0)")
    options = parsed(parser, arguments)
    if options.width % 4:
        parser.error(f"--width must be a multiple of 4, got {options.width}")

    text = library_text()
    model = LanguageModel(options.width, options.layers)
    fresh = model.init(jax.random.key(options.seed), jnp.zeros((1, CONTEXT), int))["params"]
    print(decay_report(fresh, MASK), "\n")
    found = {name: train(name, options, fresh, text) for name in WAYS}
    rows = [
        {
            "parameters": name,
            "bytes a weight": f"{result.bytes_per_weight:.2f}",
            "held-out loss": f"{result.held_out:.4f}",
            "less float32": f"{result.held_out - found['float32'].held_out:+.4f}",
        }
        for name, result in found.items()
    ]
    print(f"\n{table(rows)}")
    draw(found, options.output)
    print(f"The picture is in {options.output}.")
    return found


if __name__ == "__main__":
    main()
