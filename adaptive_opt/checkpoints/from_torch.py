"""From a run of PyTorch to one here: its parameters, and the state of its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.buffers import put_together
from adaptive_opt.checkpoints.computing import Computed, computed_by
from adaptive_opt.checkpoints.filling import listed
from adaptive_opt.checkpoints.found import Found, found_in
from adaptive_opt.checkpoints.places import over
from adaptive_opt.checkpoints.torch_dict import Entry, Key, Saved, as_array, read
from adaptive_opt.checkpoints.torch_layouts import Layout, Place, laid_out, places_of
from adaptive_opt.checkpoints.torch_settings import TorchGroup
from adaptive_opt.core.trees import Tree, dtype_of
from adaptive_opt.recipes.adam import amsgrad
from adaptive_opt.recipes.bounds import adamod
from adaptive_opt.recipes.classics import rmsprop, sgd

_TORCH_NAMES = {
    "exp_avg": "mu",
    "exp_avg_sq": "nu",
    "max_exp_avg_sq": "nu_max",
    "exp_avg_lr": "rate_ema",
    "previous_grad": "previous_gradient",
    "momentum_buffer": "velocity",
    "square_avg": "nu",
    "grad_avg": "mean_gradient",
    "sum": "sum_of_squares",
    "acc_delta": "step_ema",
    "exp_inf": "infinity_norm",
    "mu_product": "momentum_product",
}
_OF_THE_TREE = ("momentum_product",)
"""Numbers that PyTorch keeps for every parameter, and that are one here."""


def import_torch_params(
    state_dict: Mapping[str, Any],
    params: Tree,
    names: Mapping[str, str],
    *,
    layout: Layout | None = None,
) -> Tree:
    """The parameters of a model of PyTorch, in the tree, the layout and the dtypes of ``params``.

    Args:
      state_dict: ``model.state_dict()``; tensors or arrays. What ``names`` does not name is left.
      params: parameters like those that are wanted, or ``jax.ShapeDtypeStruct`` of them.
      names: for the path of every parameter here ("dense/kernel") its name in PyTorch.
      layout: see ``import_torch_state``.

    Raises:
      ValueError: a parameter that has no name, or is not there, or has another shape.

    >>> import jax.numpy as jnp, numpy as np
    >>> from adaptive_opt import import_torch_params
    >>> like = {"dense": {"kernel": jnp.zeros((1, 2))}}
    >>> model = {"dense.weight": np.array([[1.0], [2.0]])}
    >>> print(import_torch_params(model, like, {"dense/kernel": "dense.weight"})["dense"]["kernel"])
    [[1. 2.]]
    """
    leaves, structure = jax.tree.flatten(params)
    made = []
    for place, leaf in zip(places_of(params), leaves, strict=True):
        name = _name_of(place, names)
        if name not in state_dict:
            raise ValueError(
                f"PyTorch has no parameter {name!r}, which {place.path!r} should be; it has"
                f" {_some(sorted(state_dict))}."
            )
        array = laid_out(name, as_array(state_dict[name], name), place, layout)
        if np.iscomplexobj(array) and not jnp.issubdtype(dtype_of(leaf), np.complexfloating):
            raise ValueError(f"{name} is complex, {place.path!r} is not.")
        made.append(jnp.asarray(array, dtype_of(leaf)))
    return structure.unflatten(made)


def import_torch_state(
    state_dict: Mapping[str, Any],
    target: optax.GradientTransformation,
    params: Tree,
    names: Mapping[str, str | int],
    *,
    order: Sequence[str] | None = None,
    layout: Layout | None = None,
    count: int | None = None,
    allow: Collection[str] = (),
) -> Any:
    """The state with which ``target`` goes on where an optimizer of PyTorch stopped.

    Reads the state of ``torch.optim``'s SGD, Adam, AdamW (``amsgrad`` too), NAdam, RAdam, Adamax,
    Adagrad, Adadelta and RMSprop, of AdaMod, DiffGrad and AdaBound of the packages
    ``torch_optimizer`` and ``pytorch_optimizer``, of ``adamod``, and of Apex's FusedAdam; for the
    recipes that equal them (convention "torch", or "reference"). The next steps are those of
    PyTorch. PyTorch is not needed: tensors may be given as they are, on any device, or as arrays
    (``tensor.detach().cpu().numpy()``; in bfloat16 ``tensor.detach().float().cpu().numpy()``).

    **Settings** in the state dict are compared with those of the target, parameter by parameter:
    betas, eps, weight decay and where it acts, momentum, nesterov, dampening, amsgrad, maximize,
    and so on. Of learning rates, which schedulers change, only the ratios between groups; nothing
    that is a schedule here. ``pytorch_optimizer`` keeps ``maximize`` to itself. A group that says
    too little to tell its optimizer is compared in what it says.

    **Groups** here (``ParameterGroups``, ``optax.partition``) count each for themselves, so that
    parameters that have seen different numbers of gradients need groups of their own, unless
    nothing depends on the number (RMSprop, Adadelta, SGD without dampening). A parameter without
    state, frozen or never used, is one that has seen none. What the target freezes needs none, and
    loses what it has.

    Args:
      state_dict: ``optimizer.state_dict()``, or what ``get_optimizer_state_dict`` and
        ``FSDP.optim_state_dict`` return, whose keys are names; flattened or not.
      target: the optimizer that is to go on.
      params: the parameters at this point.
      names: for the path of every parameter here ("dense/kernel") its name in PyTorch, or its
        position in the optimizer. Tied weights are one parameter there, and here.
      order: the names of the parameters by position, needed if the state dict has neither names for
        keys nor ``param_names``. Positions run through the groups of the optimizer, one after the
        other, which is the order of ``model.parameters()`` only if there is one group:
        ``[names[p] for g in optimizer.param_groups for p in g["params"]]`` with
        ``names = {p: n for n, p in model.named_parameters()}``.
      layout: kernels of Flax and what Equinox lays out otherwise come into their layout by
        themselves. For others: the axes, by path, ``{"conv/w": (2, 3, 1, 0)}``; or a function
        ``(path, array) -> array`` for all.
      count: how many gradients the run has seen; needed where the state dict does not say (SGD).
      allow: names of settings that may differ, for instance ``{"weight_decay"}``.

    Raises:
      ValueError: parameters without state, or states without parameter; other shapes; names and
        positions that contradict one another; counts that one state cannot hold; settings that
        differ; a buffer without a place; complex parameters, except for SGD, as PyTorch treats real
        and imaginary parts as two numbers. The message says which.

    >>> import jax.numpy as jnp, numpy as np
    >>> from adaptive_opt import adam, import_torch_state
    >>> moments = {"step": 7, "exp_avg": np.ones((3, 2)), "exp_avg_sq": np.ones((3, 2))}
    >>> group = {"params": [0], "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    >>> saved = {"state": {0: moments}, "param_groups": [group]}
    >>> params = {"dense": {"kernel": jnp.zeros((2, 3))}}
    >>> state = import_torch_state(saved, adam(1e-3), params, {"dense/kernel": 0})
    >>> int(state[0].count), state[0].mu["dense"]["kernel"].shape
    (7, (2, 3))
    >>> try:
    ...     import_torch_state(saved, adam(1e-3, b2=0.99), params, {"dense/kernel": 0})
    ... except ValueError as error:  # doctest: +ELLIPSIS
    ...     print(error)
    the target computes something else ... betas[1] of PyTorch is 0.999, b2 here 0.99. Correct it...
    """
    saved = read(state_dict, order)
    groups = _groups(saved)
    leaves = _leaves(saved, computed_by(target, params), params, names, layout)
    _check_settings(groups, leaves, frozenset(allow))
    counts = _counts(groups, leaves, count)
    if not {"lr", "learning_rate"} & {*allow}:
        _check_rates(groups, leaves, max(counts.values(), default=0))
    found = _found(leaves, counts)
    if any(group.kind is None for group in groups):  # so that no settings say what buffers mean
        found = dataclasses.replace(found, meaning=_meanings(found.names(), params))
    by_path = {leaf.key: counts[leaf.computed.group] for leaf in leaves}
    return put_together(target, params, found, by_path)


class _Leaf(NamedTuple):
    """A parameter here: its entry in the state dict, and that one's buffers under our names.

    What the target freezes has no entry. ``key`` is the path as states are filled by.
    """

    key: str
    place: Place
    computed: Computed
    entry: Entry | None
    buffers: Mapping[str, np.ndarray]


def _groups(saved: Saved) -> list[TorchGroup]:
    groups, every = [], set().union(*(e.buffers for e in saved.entries.values()))
    for i, settings in enumerate(saved.groups):
        buffers = [e.buffers for e in saved.entries.values() if e.group == i]
        squares = [b["exp_avg_sq"] for b in buffers if "exp_avg_sq" in b]
        seen = [np.min(np.abs(s), where=s != 0, initial=np.inf) for s in squares]
        names = set().union(*buffers) or every
        groups.append(TorchGroup(settings, names, float(min(seen, default=np.inf))))
    return groups


def _leaves(
    saved: Saved,
    computed: Sequence[Computed],
    params: Tree,
    names: Mapping[str, str | int],
    layout: Layout | None,
) -> list[_Leaf]:
    """Every parameter with its entry; none is left over, none is taken twice."""
    found, taken = [], dict[Key, str]()
    for (key, leaf), place, does in zip(
        over(params).items(), places_of(params), computed, strict=True
    ):
        entry = None
        if not does.is_frozen or place.path in names:
            name = _name_of(place, names)
            entry = saved.find(name, place.path)
            if entry is None and not does.is_frozen:
                raise ValueError(_not_there(saved, name, place))
        if entry is not None:
            if entry.key in taken:
                raise ValueError(
                    f"{taken[entry.key]!r} and {place.path!r} are both {entry} of PyTorch. Tied"
                    " weights are one parameter: leave one of them out of params. What PyTorch"
                    " keeps in one array (in_proj_weight) has to be split, with a name for each."
                )
            taken[entry.key] = place.path
        entry = None if does.is_frozen else entry
        kept = {} if entry is None else entry.buffers
        _check_complex(kept, leaf, place)
        buffers = {
            _torch_name(name, place): x
            if _torch_name(name, place) in _OF_THE_TREE
            else laid_out(name, x, place, layout)
            for name, x in kept.items()
        }
        found.append(_Leaf(key, place, does, entry, buffers))
    left = [e for e in saved.entries.values() if e.buffers and e.key not in taken]
    if left:
        raise ValueError(
            f"no parameter here is that of the states {_some([*map(str, left)])}, which would be"
            " lost. Name them in names=, or take them out of the state dict."
        )
    return found


def _name_of(place: Place, names: Mapping[str, Any]) -> Any:
    if place.path not in names:
        raise ValueError(
            f"names does not say what {place.path!r} is called; it has {_some(sorted(names))}."
        )
    return names[place.path]


def _not_there(saved: Saved, name: Any, place: Place) -> str:
    if not isinstance(name, str):
        return f"the state dict has no state of parameter {name} ({place.path!r})."
    known = [entry.name for entry in saved.entries.values() if entry.name is not None]
    if not known:
        return (
            f"{name!r} is not among the names of PyTorch, as the state dict has none. Give them as"
            " order=, or positions."
        )
    return (
        f"{name!r}, which {place.path!r} should be, is not among the names of PyTorch:"
        f" {_some(sorted(known))}. What its optimizer does not have, freeze here."
    )


def _torch_name(key: str, place: Place) -> str:
    if key not in _TORCH_NAMES:
        raise ValueError(
            f"{key!r} is not a buffer that can be moved, which {place.path!r} has: known are"
            f" {listed(_TORCH_NAMES)}."
        )
    return _TORCH_NAMES[key]


def _check_complex(buffers: Mapping[str, np.ndarray], leaf: Any, place: Place) -> None:
    is_complex = jnp.issubdtype(dtype_of(leaf), np.complexfloating)
    apart = sorted(set(buffers) - {"momentum_buffer"})
    if is_complex and apart:
        raise ValueError(
            f"{place.path!r} is complex. PyTorch treats its real and imaginary parts as two numbers"
            f" with an {apart[-1]} each, here they have one: no state here goes on alike. Only SGD"
            " is the same in both."
        )
    wrong = [key for key, x in buffers.items() if np.iscomplexobj(x) and not is_complex]
    if wrong:
        raise ValueError(f"{wrong[0]} of {place.path!r} is complex, the parameter is not.")


def _check_settings(
    groups: Sequence[TorchGroup], leaves: Sequence[_Leaf], allow: frozenset[str]
) -> None:
    differ: dict[str, list[str]] = {}
    compared = [(leaf, leaf.entry.group) for leaf in leaves if leaf.entry is not None]
    for leaf, group in compared:
        for said in groups[group].differences(leaf.computed, allow):
            differ.setdefault(said, []).append(leaf.place.path)
    if differ:
        each = [
            said if len(paths) == len(compared) else f"{said} (of {_some(paths)})"
            for said, paths in differ.items()
        ]
        raise ValueError(
            f"the target computes something else than PyTorch did: {'; '.join(each)}. Correct it,"
            " or let it be with allow={...}."
        )


def _check_rates(groups: Sequence[TorchGroup], leaves: Sequence[_Leaf], count: int) -> None:
    """Learning rates may be others, as schedulers change them, but others by one factor for all."""
    by_factor: dict[str, list[str]] = {}
    for leaf in leaves:
        if leaf.entry is not None:
            there = groups[leaf.entry.group].settings.get("lr")
            here = leaf.computed.rate_at(count)
            if there and here:
                said = f"lr of PyTorch is {float(there):.6g}, here {here:.6g}"
                factor = f"{here / float(there):.5g}"
                by_factor.setdefault(factor, []).append(f"{said} (of {leaf.place.path})")
    if len(by_factor) > 1:
        one_of_each = "; ".join(said[0] for said in by_factor.values())
        raise ValueError(
            f"the groups have other learning rates, compared with one another: {one_of_each}."
            ' Correct it, or let it be with allow={"lr"}.'
        )


def _some(paths: Sequence[str]) -> str:
    return ", ".join(paths[:8]) + (f" and {len(paths) - 8} more" if len(paths) > 8 else "")


def _counts(
    groups: Sequence[TorchGroup], leaves: Sequence[_Leaf], count: int | None
) -> dict[tuple[str, ...], int]:
    """How many gradients each group of the target has seen."""
    trained = [(leaf, leaf.entry) for leaf in leaves if leaf.entry is not None]
    steps = {entry.step for _, entry in trained if entry.step is not None}
    depends = {leaf.computed.group for leaf, entry in trained if groups[entry.group].counts}
    if count is None and not steps:
        raise ValueError(
            "the state dict does not say how many gradients it has seen (SGD counts none): give"
            " count=, the number of optimizer.step() so far."
        )
    if count is not None and steps and depends and count != max(steps):
        raise ValueError(f"count={count}, but the state dict has seen {max(steps)} gradients.")
    total = max(steps) if count is None else int(count)
    counts = dict.fromkeys((leaf.computed.group for leaf in leaves), total)
    for group in depends:
        members = [leaf for leaf, _ in trained if leaf.computed.group == group]
        counts[group] = _one_count(members, total, group)
        late = [leaf.place.path for leaf in members if leaf.computed.is_scheduled]
        if counts[group] != total and late:
            raise ValueError(
                f"{_some(late)} saw {counts[group]} gradients, the run {total}: a schedule here"
                " counts with the group, in PyTorch with the run. Give the group numbers."
            )
    return counts


def _one_count(members: Sequence[_Leaf], total: int, group: tuple[str, ...]) -> int:
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
        said = "; ".join(f"{n}: {_some(paths)}" for n, paths in sorted(by_step.items()))
        raise ValueError(
            f"the parameters have not seen one number of gradients ({said}), but their state here"
            " has one count. Give those of each number a group of their own (ParameterGroups), or"
            " freeze what does not train."
        )
    return next(iter(by_step))


def _check_complete(members: Sequence[_Leaf], kept: Iterable[str]) -> None:
    begun = [leaf for leaf in members if leaf.buffers]
    for name in sorted(kept):
        have = [leaf for leaf in begun if name in leaf.buffers]
        if len(have) < len(begun):
            lacking = [leaf.place.path for leaf in begun if name not in leaf.buffers]
            raise ValueError(
                f"only {len(have)} of {len(begun)} parameters have {name!r}: not {_some(lacking)}."
            )


def _numbers(leaves: Iterable[_Leaf], group: tuple[str, ...]) -> dict[str, float]:
    """The numbers that a group of parameters has once."""
    found: dict[str, float] = {}
    for leaf in leaves:
        if leaf.computed.group == group:
            for name in set(leaf.buffers) & set(_OF_THE_TREE):
                value = float(leaf.buffers[name])
                if found.setdefault(name, value) != value:
                    raise ValueError(
                        f"{name} of {leaf.place.path!r} is {value}, but {found[name]} of parameters"
                        " in the same group here, which has one: give them groups of their own."
                    )
    return found


def _found(leaves: Sequence[_Leaf], counts: Mapping[tuple[str, ...], int]) -> Found:
    """The buffers by name and path; zeros, as at the start, for what has none and needs none."""
    found = Found("PyTorch")
    names = {name for leaf in leaves for name in leaf.buffers}
    for name in names - {*_OF_THE_TREE}:
        found.buffers[name] = {
            leaf.key: leaf.buffers.get(name, np.zeros(leaf.place.shape)) for leaf in leaves
        }
    for name in names & {*_OF_THE_TREE}:
        found.of_tree[name] = []
        for group in counts:
            covered = frozenset(leaf.key for leaf in leaves if leaf.computed.group == group)
            labels = tuple(("group", label) for label in group)
            value = _numbers(leaves, group).get(name, 1.0)  # a product, 1 at the start
            found.of_tree[name].append((covered, labels, np.asarray(value)))
    return found


def _meanings(buffers: Collection[str], params: Tree) -> Any:
    """What the buffers of PyTorch mean: what those of an optimizer here do."""
    if "velocity" in buffers:
        alike = rmsprop(1.0, momentum=0.9) if "nu" in buffers else sgd(1.0, momentum=0.9)
    else:
        alike = adamod(1.0) if "rate_ema" in buffers else amsgrad(1.0)
    return found_in(alike, alike.init(params), params).meaning
