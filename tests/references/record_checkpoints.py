"""Saves a run of every recipe and convention, for the promise that later versions read them.

    PYTHONPATH=tests python tests/references/record_checkpoints.py

To be run once for every STATE_FORMAT: a file that is there is not written again. ``format_1.npz``
holds for each optimizer what ``to_bytes`` returned after three steps, and the parameters after
three more.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from saved import FORMAT_1, SAVED_BY_FORMAT_1, a_few_steps, small_tree

from adaptive_opt import to_bytes


def main() -> None:
    if FORMAT_1.exists():
        sys.exit(f"{FORMAT_1} is there: what was saved once must be read for ever.")
    arrays = {}
    for name, optimizer in SAVED_BY_FORMAT_1.items():
        training = a_few_steps(optimizer, small_tree(), optimizer.init(small_tree()))
        arrays[f"{name}/saved"] = np.frombuffer(to_bytes(optimizer, training), np.uint8)
        params, _ = a_few_steps(optimizer, *training)
        arrays[f"{name}/after"] = np.concatenate([x.ravel() for x in jax.tree.leaves(params)])
    np.savez_compressed(FORMAT_1, **arrays)
    print(f"{FORMAT_1}: {len(SAVED_BY_FORMAT_1)} checkpoints, {FORMAT_1.stat().st_size} bytes")


if __name__ == "__main__":
    main()
