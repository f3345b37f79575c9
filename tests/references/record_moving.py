"""Records runs of PyTorch optimizers with their state in the middle, for tests of moving in.

    pip install -r tests/references/requirements.txt
    python tests/references/record_moving.py

Each row is an optimizer that takes 130 steps, in float64, over the same gradients of a Linear layer
(a 4 x 3 weight, a bias). Written is ``moving.npz``: the gradients and, for each row, the weights
and the state dict after step 30, and the weights after each of the 100 steps that follow.
"""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from adamod import AdaMod

BEFORE, AFTER = 30, 100
ROWS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamod": lambda p: AdaMod(p, lr=1e-2, beta3=0.99),
}


def main() -> None:
    rng = np.random.default_rng(8)
    size = 10 ** rng.uniform(-3, 1, (BEFORE + AFTER, 1))
    arrays = {
        "weight gradients": rng.standard_normal((BEFORE + AFTER, 4, 3)) * size[..., None],
        "bias gradients": rng.standard_normal((BEFORE + AFTER, 4)) * size,
    }
    for name, make in ROWS.items():
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 4, dtype=torch.float64)
        optimizer = make(layer.parameters())
        for t in range(BEFORE + AFTER):
            if t == BEFORE:
                for parameter, array in layer.named_parameters():
                    arrays[f"{name} {parameter}"] = array.detach().numpy().copy()
                for position, state in optimizer.state_dict()["state"].items():
                    for key, value in state.items():
                        arrays[f"{name} state {position} {key}"] = value.numpy().copy()
            layer.weight.grad = torch.tensor(arrays["weight gradients"][t])
            layer.bias.grad = torch.tensor(arrays["bias gradients"][t])
            optimizer.step()
            if t >= BEFORE:
                arrays.setdefault(f"{name} weights after", []).append(
                    layer.weight.detach().numpy().copy()
                )
                arrays.setdefault(f"{name} biases after", []).append(
                    layer.bias.detach().numpy().copy()
                )
    arrays["torch"] = np.array(torch.__version__)
    np.savez_compressed(pathlib.Path(__file__).parent / "moving.npz", **arrays)


if __name__ == "__main__":
    main()
