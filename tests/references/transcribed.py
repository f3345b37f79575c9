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
