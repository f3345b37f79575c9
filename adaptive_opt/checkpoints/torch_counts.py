"""How many gradients parameters of PyTorch have seen, and what else a group of them has once."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from adaptive_opt.checkpoints.computing import Computed
from adaptive_opt.checkpoints.torch_dict import Entry
from adaptive_opt.checkpoints.torch_layouts import Place
from adaptive_opt.checkpoints.torch_settings import TorchGroup
from adaptive_opt.core.checks import some

OF_THE_TREE = ("momentum_product",)
"""Numbers that PyTorch keeps for every parameter, and that are one here."""


class Leaf(NamedTuple):
    """A parameter here: its entry in the state dict, and that one's buffers under our names.

    What the target freezes has no entry. ``key`` is the path as states are filled by.
    """

    key: str
    place: Place
    computed: Computed
    entry: Entry | None
    buffers: Mapping[str, np.ndarray]


def counts_of(
    groups: Sequence[TorchGroup],
    leaves: Sequence[Leaf],
    count: int | None,
    allow: Collection[str],
) -> dict[tuple[str, ...], int]:
    """How many gradients each group of the target has seen."""
    trained = [(leaf, leaf.entry) for leaf in leaves if leaf.entry is not None]
    steps = {entry.step for _, entry in trained if entry.step is not None}
    depends = {leaf.computed.group for leaf, entry in trained if groups[entry.group].counts}
    if count is None and not steps:
        raise ValueError(
            "the state dict does not say how many gradients it has seen (SGD counts none): give"
            " count=, the number of optimizer.step() so far; 0 if there was none."
        )
    begun = [leaf.place.path for leaf in leaves if leaf.buffers]
    if count == 0 and begun:
        raise ValueError(f"count=0, but there is a state of {some(begun)}.")
    if count is not None and steps and depends and count != max(steps):
        raise ValueError(f"count={count}, but the state dict has seen {max(steps)} gradients.")
    total = max(steps) if count is None else count
    counts = dict.fromkeys((leaf.computed.group for leaf in leaves), total)
    for group in depends:
        members = [leaf for leaf, _ in trained if leaf.computed.group == group]
        counts[group] = _one_count(members, total, group)
        late = [leaf.place.path for leaf in members if leaf.computed.is_scheduled]
        if counts[group] != total and late:
            raise ValueError(
                f"{some(late)} saw {counts[group]} gradients, the run {total}: a schedule here"
                " counts with the group, in PyTorch with the run. Give the group numbers."
            )
        late = [leaf.place.path for leaf, entry in trained if leaf.computed.group == group
                and leaf.computed.is_rate_scheduled
                and groups[entry.group].settings.get("lr_decay")]  # fmt: skip
        if counts[group] != total and late and "lr_decay" not in allow:
            raise ValueError(
                f"{some(late)} saw {counts[group]} gradients, the run {total}: lr_decay of PyTorch"
                " goes by the former, a schedule here by the latter. Give the group a schedule of"
                f" its own, later by {total - counts[group]}, and allow={{'lr_decay'}}."
            )
    return counts


def _one_count(members: Sequence[Leaf], total: int, group: tuple[str, ...]) -> int:
    """The count of parameters that share one."""
    kept = set().union(*(leaf.buffers for leaf in members))
    if not kept and (group or total == 0):
        return 0  # nobody has begun
    _check_complete(members, kept)
    by_step: dict[int, list[str]] = {}
    for leaf in members:
        seen = leaf.entry.step if leaf.entry and leaf.entry.step is not None else total
        by_step.setdefault(seen if leaf.buffers or not kept else 0, []).append(leaf.place.path)
    if len(by_step) > 1:
        said = "; ".join(f"{n}: {some(paths)}" for n, paths in sorted(by_step.items()))
        raise ValueError(
            f"the parameters have not seen one number of gradients ({said}), but their state here"
            " has one count. Give those of each number a group of their own (ParameterGroups), or"
            " freeze what does not train."
        )
    return next(iter(by_step))


def _check_complete(members: Sequence[Leaf], kept: Iterable[str]) -> None:
    begun = [leaf for leaf in members if leaf.buffers]
    for name in sorted(kept):
        have = [leaf for leaf in begun if name in leaf.buffers]
        if len(have) < len(begun):
            lacking = [leaf.place.path for leaf in begun if name not in leaf.buffers]
            raise ValueError(
                f"only {len(have)} of {len(begun)} parameters have {name!r}: not {some(lacking)}."
            )


def numbers_of(leaves: Iterable[Leaf], group: tuple[str, ...]) -> dict[str, float]:
    """The numbers that a group of parameters has once."""
    found: dict[str, float] = {}
    for leaf in leaves:
        if leaf.computed.group == group:
            for name in set(leaf.buffers) & set(OF_THE_TREE):
                value = float(leaf.buffers[name])
                if found.setdefault(name, value) != value:
                    raise ValueError(
                        f"{name} of {leaf.place.path!r} is {value}, but {found[name]} of parameters"
                        " in the same group here, which has one: give them groups of their own."
                    )
    return found
