"""What tests/references/record_torch_states.py has recorded of PyTorch."""

from __future__ import annotations

import functools
import json
import pathlib

import numpy as np


@functools.cache
def recorded():
    with np.load(pathlib.Path(__file__).parent / "references" / "torch_states.npz") as arrays:
        return dict(arrays)


def state_dict_of(row):
    """The state dict as PyTorch returned it, with arrays for tensors."""

    def restored(x):
        if isinstance(x, dict):
            if "array" in x:
                return recorded()[f"{row}|array|{x['array']}"]
            return {key: restored(value) for key, value in x["dict"]}
        return [restored(item) for item in x] if isinstance(x, list) else x

    return restored(json.loads(str(recorded()[f"{row}|state_dict"])))
