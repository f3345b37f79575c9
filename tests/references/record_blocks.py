"""Saves a run with 8-bit blocks, for the promise that later versions read them.

    PYTHONPATH=tests python tests/references/record_blocks.py

Run once, by the version whose codes had no place for what is not finite. ``blocks.npz`` holds what
``to_bytes`` returned after three steps, and what the codes meant.
"""

from __future__ import annotations

import sys

import jax
import numpy as np
from saved import BLOCKS, WITH_BLOCKS, blocks_start

from adaptive_opt import to_bytes
from adaptive_opt.memory import codecs


def main() -> None:
    if BLOCKS.exists():
        sys.exit(f"{BLOCKS} is there: what was saved once must be read for ever.")
    params = blocks_start()
    state = WITH_BLOCKS.init(params)
    for step in range(3):
        gradients = jax.tree.map(lambda x, step=step: x * 10.0**-step, params)
        _, state = WITH_BLOCKS.update(gradients, state, params)
    leaves = jax.tree.leaves(codecs.decoded(state.inner_state))
    data = np.frombuffer(to_bytes(WITH_BLOCKS, state), np.uint8)
    np.savez_compressed(BLOCKS, data=data, **{f"leaf_{i}": x for i, x in enumerate(leaves)})
    print(f"{BLOCKS}: {BLOCKS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
