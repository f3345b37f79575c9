"""What is known of buffers by their names: what they hold, and in how few bits they may be kept.

The names are those of the stages here and of optax's states. A buffer that is not in the table is
not known to bear fewer bits, and keeps its width.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_AXIS = re.compile(r"_\d+$")
"""The number of the axis in a name: ``basis_0``."""


class Buffer(NamedTuple):
    """What a buffer holds.

    Attributes:
      holds: in words.
      bfloat16: whether it bears 16 bits.
      in_8_bits: the code in which it bears 8, if there is one.
      to_nearest: whether it is no average. Stochastic rounding would make a maximum drift upwards,
        and a difference of two gradients noisy.
    """

    holds: str
    bfloat16: bool = True
    in_8_bits: str | None = None
    to_nearest: bool = False


def _wide(holds: str) -> Buffer:
    return Buffer(holds, bfloat16=False)


BUFFERS: dict[str, Buffer] = {
    "mu": Buffer("an average of gradients", in_8_bits="int8"),
    "velocity": Buffer("a decaying sum of gradients", in_8_bits="int8"),
    "trace": Buffer("a decaying sum of gradients", in_8_bits="int8"),
    "mu_slow": Buffer("a slow average of gradients"),
    "acc_grads": Buffer("the mean of a few gradients"),
    "change_ema": Buffer("an average of changes of the gradient"),
    "nu": Buffer("an average of squares", in_8_bits="sqrt8"),
    "sum_of_squares": Buffer("a sum of squares", in_8_bits="sqrt8"),
    "infinity_norm": Buffer("a maximum that decays"),
    "step_ema": Buffer("an average of squared steps"),
    "nu_max": Buffer("a maximum of averages of squares", in_8_bits="sqrt8", to_nearest=True),
    # 8 bits do for a friction (diffGrad), not where the change itself is followed (Adan).
    "previous_gradient": Buffer("a gradient", to_nearest=True),
    # A mean that a few first rates dominate: its increments are lost in 8 bits.
    "rate_ema": Buffer("an average of rates"),
    "mean_gradient": _wide("an average whose square is taken from another: a small difference"),
    "gram": _wide("a matrix whose small eigenvalues are lost first"),
    "basis": _wide("an orthogonal matrix"),
    "slow": _wide("parameters, of which roundings lose small steps"),
    "z": _wide("parameters, of which roundings lose small steps"),
    "residual": _wide("what 16-bit parameters leave out"),
    "radius": _wide("the length of a tensor at the start, which is kept"),
}


def buffer(name: object) -> Buffer | None:
    """What is known of a buffer; None: nothing."""
    name = str(name)
    return BUFFERS.get(name, BUFFERS.get(_AXIS.sub("", name)))
