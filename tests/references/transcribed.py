"""Rules of public code that does not run here, transcribed in NumPy line by line.

Each is a function of the hyperparameters that returns ``step(x, g, lr) -> x``. None of it imports
this library. COMMITS says what was read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Step = Callable[[np.ndarray, np.ndarray, float], np.ndarray]

COMMITS = {
    "google-research/albert": "6ca4dfd0d13495a0a0ed7931f452018e08f93ced",
    "facebookresearch/mae": "6a2ba402291005b003a70e99f7c87d1a2c376b0d",
    "NVIDIA/OpenSeq2Seq": "8681d381ed404fde516e2c1b823de5a213c59aba",
    "tensorflow/mesh": "da907937e68aa421186f1178d71eb5f736fcb069",
    "tensorflow/addons": "23bd494cd4b13adccc0985fce6da65c6542f672e",
}


def yogi(b1: float, b2: float, eps: float, initial: float) -> Step:
    """tensorflow_addons/optimizers/yogi.py, dense, with the sign and without its penalties."""
    m, v, t = 0.0, initial, 0

    def step(x, g, lr):
        nonlocal m, v, t
        t += 1
        lr = lr * np.sqrt(1 - b2**t) / (1 - b1**t)
        m = m * b1 + g * (1 - b1)
        v = v + (1 - b2) * np.sign(g * g - v) * (g * g)
        return x - lr / (np.sqrt(v) + eps) * m

    return step


def novograd(
    b1: float, b2: float, eps_root: float, weight_decay: float = 0.0, averaging: bool = False
) -> Step:
    """open_seq2seq/optimizers/novograd.py, with the momentum of TensorFlow's MomentumOptimizer."""
    ema, accumulated = 0.0, 0.0

    def step(x, g, lr):
        nonlocal ema, accumulated
        g_2 = np.sum(np.square(g))
        ema = g_2 if ema == 0.0 else ema * b2 + g_2 * (1.0 - b2)
        g = g * (1.0 / np.sqrt(ema + eps_root))
        if weight_decay > 0.0:
            g = g + weight_decay * x
        if averaging:
            g = g * (1.0 - b1)
        accumulated = accumulated * b1 + g
        return x - lr * accumulated

    return step


def lamb(b1: float, b2: float, eps: float, weight_decay: float = 0.0) -> Step:
    """lamb_optimizer.py, for a variable that is excluded from nothing."""
    m, v = 0.0, 0.0

    def step(x, g, lr):
        nonlocal m, v
        m = b1 * m + (1.0 - b1) * g
        v = b2 * v + (1.0 - b2) * np.square(g)
        update = m / (np.sqrt(v) + eps)
        update = update + weight_decay * x
        w_norm, g_norm = np.sqrt(np.sum(x * x)), np.sqrt(np.sum(update * update))
        ratio = (w_norm / g_norm if g_norm > 0 else 1.0) if w_norm > 0 else 1.0
        return x - ratio * lr * update

    return step


def lars(momentum: float, trust_coefficient: float, weight_decay: float = 0.0) -> Step:
    """util/lars.py, for a parameter of two or more dimensions."""
    mu = 0.0

    def step(x, g, lr):
        nonlocal mu
        dp = g + weight_decay * x
        param_norm, update_norm = np.sqrt(np.sum(x * x)), np.sqrt(np.sum(dp * dp))
        if param_norm > 0.0 and update_norm > 0:
            dp = dp * (trust_coefficient * param_norm / update_norm)
        mu = mu * momentum + dp
        return x - lr * mu

    return step


def adafactor(
    beta1: float, decay: float, epsilon1: float, epsilon2: float, threshold: float
) -> Step:
    """mesh_tensorflow/optimize.py, with axes of any length factored, none of them stacked."""
    vr, vc, v, m, t = 0.0, 0.0, 0.0, 0.0, 0

    def step(x, g, lr):
        nonlocal vr, vc, v, m, t
        decay_rate = 1.0 - (t + 1.0) ** -decay
        t += 1
        update_scale = max(np.sqrt(np.mean(np.square(x))), epsilon2) * lr
        grad_squared, mixing_rate = np.square(g) + epsilon1, 1.0 - decay_rate
        if g.ndim >= 2:
            d0, d1 = sorted(range(g.ndim), key=lambda d: -g.shape[d])[:2]
            vr = vr * decay_rate + grad_squared.mean(axis=d0, keepdims=True) * mixing_rate
            vc = vc * decay_rate + grad_squared.mean(axis=d1, keepdims=True) * mixing_rate
            long_term_mean = vr.mean(axis=d1, keepdims=True)
            u = g * (1 / np.sqrt(vr / long_term_mean)) * (1 / np.sqrt(vc))
        else:
            v = v * decay_rate + grad_squared * mixing_rate
            u = g * (1 / np.sqrt(v))
        u = u / max(1.0, np.sqrt(np.mean(np.square(u))) / threshold)
        subtrahend = u * update_scale
        if beta1:
            m = m * beta1 + subtrahend * (1.0 - beta1)
            subtrahend = m
        return x - subtrahend

    return step
