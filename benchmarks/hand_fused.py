"""Every recipe written by hand as one function of a leaf: what the stages are measured against.

Nothing here is general: defaults only, no masks, no schedules, no other dtypes, and not a single
intermediate more than the formula has. A rule takes the parameter, the gradient, the number of
gradients seen (this one included, as a float) and the buffers, and returns the new parameter and
the new buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

LR = 1e-3
B1, B2, B3, EPS = 0.9, 0.999, 0.999, 1e-8


def _moments(g, m, v, b1=B1):
    return (1 - b1) * g + b1 * m, (1 - B2) * g**2 + B2 * v


def _corrections(t):
    return 1 - B1**t, 1 - B2**t


def _rate(v, t):
    """The rate with both corrections in it, as AdaMod's and diffGrad's codes have it."""
    c1, c2 = _corrections(t)
    return LR * jnp.sqrt(c2) / c1 / (jnp.sqrt(v) + EPS)


def adam(x, g, t, m, v):
    m, v = _moments(g, m, v)
    c1, c2 = _corrections(t)
    return x - LR * (m / c1) / (jnp.sqrt(v / c2) + EPS), m, v


def adamw(x, g, t, m, v):
    m, v = _moments(g, m, v)
    c1, c2 = _corrections(t)
    return x - LR * ((m / c1) / (jnp.sqrt(v / c2) + EPS) + 1e-4 * x), m, v


def amsgrad(x, g, t, m, v, largest):
    m, v = _moments(g, m, v)
    largest = jnp.maximum(largest, v)
    c1, c2 = _corrections(t)
    return x - LR * (m / c1) / (jnp.sqrt(largest / c2) + EPS), m, v, largest


def adamod(x, g, t, m, v, s):
    m, v = _moments(g, m, v)
    rate = _rate(v, t)
    s = B3 * s + (1 - B3) * rate
    return x - jnp.minimum(rate, s) * m, m, v, s


def diffgrad(x, g, t, m, v, before):
    m, v = _moments(g, m, v)
    return x - _rate(v, t) * jax.nn.sigmoid(jnp.abs(before - g)) * m, m, v, jnp.copy(g)


def diffmod(x, g, t, m, v, s, before):
    m, v = _moments(g, m, v)
    rate = _rate(v, t)
    s = B3 * s + (1 - B3) * rate
    friction = jax.nn.sigmoid(jnp.abs(before - g))
    return x - jnp.minimum(rate, s) * friction * m, m, v, s, jnp.copy(g)


def _bound(rate, t, final=0.1 * LR / 1e-2, gamma=1e-3):
    return jnp.clip(rate, final * (1 - 1 / (gamma * t + 1)), final * (1 + 1 / (gamma * t)))


def adabound(x, g, t, m, v):
    m, v = _moments(g, m, v)
    return x - _bound(_rate(v, t), t) * m, m, v


def amsbound(x, g, t, m, v, largest):
    m, v = _moments(g, m, v)
    largest = jnp.maximum(largest, v)
    return x - _bound(_rate(largest, t), t) * m, m, v, largest


def radam(x, g, t, m, v, b1=B1, eps=EPS):
    m, v = _moments(g, m, v, b1)
    c1, c2 = 1 - b1**t, 1 - B2**t
    limit = 2 / (1 - B2) - 1
    rho = limit - 2 * t * B2**t / c2
    r = jnp.sqrt((rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho))
    rate = jnp.where(rho > 5, r * jnp.sqrt(c2) / (jnp.sqrt(v) + eps), 1.0)
    return x - LR * rate * (m / c1), m, v


def _nadam_direction(g, t, m, p):
    now, ahead = (B1 * (1 - 0.5 * 0.96 ** (n * 0.004)) for n in (t, t + 1))
    p = p * now
    return ahead * m / (1 - p * ahead) + (1 - now) * g / (1 - p), p


def nadam(x, g, t, m, v, p):
    m, v = _moments(g, m, v)
    direction, p = _nadam_direction(g, t, m, p)
    return x - LR * direction / (jnp.sqrt(v / (1 - B2**t)) + EPS), m, v, p


def nadamw(x, g, t, m, v, p):
    m, v = _moments(g, m, v)
    direction, p = _nadam_direction(g, t, m, p)
    return x - LR * (direction / (jnp.sqrt(v / (1 - B2**t)) + EPS) + 1e-4 * x), m, v, p


def sgd(x, g, t, w):
    w = 0.9 * w + g
    return x - LR * w, w


def sgdw(x, g, t, w):
    w = 0.9 * w + g
    return x - LR * (w + 1e-4 * x), w


def rmsprop(x, g, t, v, mean, w):
    """Centered and with momentum."""
    v = 0.9 * v + (1 - 0.9) * g**2
    mean = 0.9 * mean + (1 - 0.9) * g
    w = 0.9 * w + g / (jnp.sqrt(jnp.maximum(v - mean**2, 0)) + EPS)
    return x - LR * w, v, mean, w


def rmsprop_of_the_tree(x, g, t, v):
    """Of a tree of one leaf."""
    v = 0.9 * v + (1 - 0.9) * jnp.sum(g**2)
    return x - LR * g / (jnp.sqrt(v) + EPS), v


def adagrad(x, g, t, v):
    v = v + g**2
    return x - LR * g / (jnp.sqrt(v) + 1e-10), v


def adadelta(x, g, t, v, u):
    v = 0.9 * v + (1 - 0.9) * g**2
    step = jnp.sqrt(u + 1e-6) / jnp.sqrt(v + 1e-6) * g
    return x - LR * step, v, 0.9 * u + (1 - 0.9) * step**2


def adamax(x, g, t, m, norm):
    m = (1 - B1) * g + B1 * m
    norm = jnp.maximum(B2 * norm, jnp.abs(g) + EPS)
    return x - LR / (1 - B1**t) * m / norm, m, norm


def ranger(x, g, t, m, v, slow):
    if g.ndim > 1:
        g = g - jnp.mean(g, axis=tuple(range(1, g.ndim)), keepdims=True)
    new, m, v = radam(x, g, t, m, v, b1=0.95, eps=1e-5)
    syncs = t % 6 == 0
    synced = slow + 0.5 * (new - slow)
    return jnp.where(syncs, synced, new), m, v, jnp.where(syncs, synced, slow)


Rule = Callable[..., tuple[jax.Array, ...]]

RULES: dict[str, tuple[Rule, tuple[str, ...]]] = {
    "adam": (adam, ("mu", "nu")),
    "adamw": (adamw, ("mu", "nu")),
    "amsgrad": (amsgrad, ("mu", "nu", "nu_max")),
    "adamod": (adamod, ("mu", "nu", "rate_ema")),
    "diffgrad": (diffgrad, ("mu", "nu", "previous_gradient")),
    "diffmod": (diffmod, ("mu", "nu", "rate_ema", "previous_gradient")),
    "adabound": (adabound, ("mu", "nu")),
    "amsbound": (amsbound, ("mu", "nu", "nu_max")),
    "radam": (radam, ("mu", "nu")),
    "nadam": (nadam, ("mu", "nu", "momentum_product")),
    "nadamw": (nadamw, ("mu", "nu", "momentum_product")),
    "sgd": (sgd, ("velocity",)),
    "sgdw": (sgdw, ("velocity",)),
    "rmsprop": (rmsprop, ("nu", "mean_gradient", "velocity")),
    "rmsprop of the tree": (rmsprop_of_the_tree, ("nu",)),
    "adagrad": (adagrad, ("sum_of_squares",)),
    "adadelta": (adadelta, ("nu", "step_ema")),
    "adamax": (adamax, ("mu", "infinity_norm")),
    "ranger": (ranger, ("mu", "nu", "slow")),
}
"""Each recipe's rule, and the buffers it keeps, in the order of its arguments."""

_INITIAL = {"momentum_product": 1.0}


def init(name: str, params: Any) -> tuple[jax.Array, list[dict[str, jax.Array]]]:
    """The count, and the buffers of every leaf."""
    _, names = RULES[name]

    def first(buffer: str, x: jax.Array) -> jax.Array:
        if buffer == "slow":
            return jnp.array(x, copy=True)
        if buffer == "momentum_product" or (name == "rmsprop of the tree" and buffer == "nu"):
            return jnp.full((), _INITIAL.get(buffer, 0.0), x.dtype)
        return jnp.zeros_like(x)

    buffers = [{b: first(b, x) for b in names} for x in jax.tree.leaves(params)]
    return jnp.zeros((), np.int32), buffers


def step(name: str, params: Any, state: Any, gradients: Any) -> tuple[Any, Any]:
    """Parameters and state after one gradient."""
    rule, names = RULES[name]
    count, buffers = state
    count = count + 1
    leaves, structure = jax.tree.flatten(params)
    new = [
        rule(x, g, count.astype(x.dtype), *(kept[b] for b in names))
        for x, g, kept in zip(leaves, jax.tree.leaves(gradients), buffers, strict=True)
    ]
    kept = [dict(zip(names, arrays, strict=True)) for _, *arrays in new]
    return structure.unflatten([x for x, *_ in new]), (count, kept)
