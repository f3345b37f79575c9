"""Saves a run of every recipe and convention, for the promise that later versions read them.

    PYTHONPATH=tests python tests/references/record_checkpoints.py

To be run once for every STATE_FORMAT: a file that is there is not written again. ``format_1.npz``,
which an earlier version has written, holds for each optimizer what ``to_bytes`` returned after
three steps, and the parameters after three more. With format 2 came other trees and leaves:
``format_2.npz`` holds some of each.
"""

from __future__ import annotations

import sys

import numpy as np
from saved import FORMAT_2, trees_of_format_2

from adaptive_opt import sgd, to_bytes


def main() -> None:
    if FORMAT_2.exists():
        sys.exit(f"{FORMAT_2} is there: what was saved once must be read for ever.")
    saved = {name: to_bytes(sgd(1e-2), tree) for name, tree in trees_of_format_2().items()}
    np.savez_compressed(FORMAT_2, **{n: np.frombuffer(b, np.uint8) for n, b in saved.items()})
    print(f"{FORMAT_2}: {len(saved)} checkpoints, {FORMAT_2.stat().st_size} bytes")


if __name__ == "__main__":
    main()
