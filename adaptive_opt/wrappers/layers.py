"""Tables of groups for the layers of a network: slower, or later, towards the input."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from adaptive_opt.core.checks import check_whole
from adaptive_opt.wrappers.groups import Group


def layerwise_learning_rates(
    layers: Sequence[str], decay: float = 0.65, **settings: Any
) -> list[Group]:
    """Groups for the layers of a network, from input to output, with ever larger learning rates.

    The last has the learning rate itself, the one before ``decay`` times it, and so on. ELECTRA and
    BEiT use 0.65 to 0.9 for fine-tuning.

    Args:
      layers: the name of every layer, the input first; or a regular expression for it. It must
        match whole components of the path, one or more: ``layer_1`` is not found in ``layer_10``.
      decay: in (0, 1].
      **settings: of every group, see ``Group``.

    >>> from adaptive_opt import layerwise_learning_rates
    >>> for group in layerwise_learning_rates(["embed", "block_1", "block_10"], 0.5):
    ...     print(group.pattern, group.settings())
    (^|/)(embed)(/|$) learning_rate x 0.25
    (^|/)(block_1)(/|$) learning_rate x 0.5
    (^|/)(block_10)(/|$) as given
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")
    last = len(layers) - 1
    return [
        Group(f"(^|/)({layer})(/|$)", learning_rate=decay ** (last - i), **settings)
        for i, layer in enumerate(layers)
    ]


def gradual_unfreezing(
    layers: Sequence[str], steps: int, *, decay: float = 1 / 2.6, **settings: Any
) -> list[Group]:
    """Groups for fine-tuning: the last layer at once, one more every so many steps, ever slower.

    Discriminative rates and gradual unfreezing of ULMFiT (Howard & Ruder 2018, arXiv:1801.06146):
    each layer learns 2.6 times slower than the one above it, and starts ``steps`` steps later.

    Args:
      layers: the name of every layer, the input first, as in ``layerwise_learning_rates``.
      steps: between two unfreezings, at least 1; an epoch in ULMFiT.
      decay: of the learning rate from layer to layer, in (0, 1].
      **settings: of every group, see ``Group``.

    >>> from adaptive_opt import gradual_unfreezing
    >>> for group in gradual_unfreezing(["embed", "body", "head"], steps=100):
    ...     print(group.pattern, group.settings())
    (^|/)(embed)(/|$) learning_rate x 0.1479, frozen until step 200
    (^|/)(body)(/|$) learning_rate x 0.3846, frozen until step 100
    (^|/)(head)(/|$) as given
    """
    check_whole(1, steps=steps)
    last = len(layers) - 1
    return [
        dataclasses.replace(group, freeze=int((last - i) * steps))
        for i, group in enumerate(layerwise_learning_rates(layers, decay, **settings))
    ]
