"""From a run of PyTorch to one here: its parameters, and the state of its optimizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.checkpoints.buffers import put_together
from adaptive_opt.checkpoints.computing import Computed, computed_by
from adaptive_opt.checkpoints.counting import number_of_gradients
from adaptive_opt.checkpoints.filling import listed
from adaptive_opt.checkpoints.found import Found, found_in
from adaptive_opt.checkpoints.places import over
from adaptive_opt.checkpoints.torch_counts import OF_THE_TREE, Leaf, counts_of, numbers_of
from adaptive_opt.checkpoints.torch_dict import Key, Saved, as_array, read
from adaptive_opt.checkpoints.torch_layouts import Layout, Place, check_layout, laid_out, places_of
from adaptive_opt.checkpoints.torch_settings import TorchGroup, names_of
from adaptive_opt.core.checks import check_names, some
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
    there, made = places_of(params), []
    check_names("names", names, [place.path for place in there])
    check_layout(layout, there)
    for place, leaf in zip(there, leaves, strict=True):
        name = _name_of(place, names)
        if name not in state_dict:
            raise ValueError(
                f"PyTorch has no parameter {name!r}, which {place.path!r} should be; it has"
                f" {some(sorted(state_dict))}."
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
    that is a schedule here. ``pytorch_optimizer`` keeps ``maximize`` to itself. AdaBound's final
    rate goes with ``lr / initial_lr``, here with ``base_learning_rate``. Groups without settings
    are taken at your word; those of an optimizer that is not known are refused, unless
    ``allow={"optimizer"}``, and then compared in what they say.

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
        themselves. For others: the axes, by path, ``{"conv/w": (2, 3, 1, 0)}``, or ``"conv"`` or
        ``"conv_transpose"``; or a function ``(path, array) -> array`` for all. A kernel of as many
        channels in as out, whose path says too little, has to be told.
      count: how many gradients the run has seen, a whole number; needed where the state dict does
        not say (SGD), or where there was none (0).
      allow: names of settings that may differ, for instance ``{"weight_decay"}``.

    Raises:
      ValueError: parameters without state, or states without parameter; other shapes; names and
        positions that contradict one another; counts that one state cannot hold; settings that
        differ; a buffer without a place; a state dict that no optimizer makes; names, layout and
        allow that name what is not there; complex parameters, except for SGD, as PyTorch treats
        real and imaginary parts as two numbers. The message says which.

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
    if count is not None:
        count = number_of_gradients(count, "count=")
    there = places_of(params)
    check_names("names", names, [place.path for place in there])
    check_layout(layout, there)
    saved = read(state_dict, order)
    groups, does = _groups(saved), computed_by(target, params)
    allow = check_names("allow", allow, names_of(groups, does))
    leaves = _leaves(saved, does, params, names, layout)
    _check_settings(groups, leaves, allow)
    counts = counts_of(groups, leaves, count, allow)
    if not {"lr", "learning_rate"} & allow:
        _check_rates(groups, leaves, max(counts.values(), default=0))
    found = _found(leaves, counts)
    if any(group.kind is None for group in groups):  # so that no settings say what buffers mean
        found = dataclasses.replace(found, meaning=_meanings(found.names(), params))
    by_path = {leaf.key: counts[leaf.computed.group] for leaf in leaves}
    return put_together(target, params, found, by_path if any(counts.values()) else 0)


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
) -> list[Leaf]:
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
            if _torch_name(name, place) in OF_THE_TREE
            else laid_out(name, x, place, layout)
            for name, x in kept.items()
        }
        found.append(Leaf(key, place, does, entry, buffers))
    left = [e for e in saved.entries.values() if e.buffers and e.key not in taken]
    if left:
        raise ValueError(
            f"no parameter here is that of the states {some([*map(str, left)])}, which would be"
            " lost. Name them in names=, or take them out of the state dict."
        )
    return found


def _name_of(place: Place, names: Mapping[str, Any]) -> Any:
    if place.path not in names:
        raise ValueError(
            f"names does not say what {place.path!r} is called; it has {some(sorted(names))}."
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
        f" {some(sorted(known))}. What its optimizer does not have, freeze here."
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
    groups: Sequence[TorchGroup], leaves: Sequence[Leaf], allow: frozenset[str]
) -> None:
    differ: dict[str, list[str]] = {}
    compared = [(leaf, leaf.entry.group) for leaf in leaves if leaf.entry is not None]
    for leaf, group in compared:
        for said in groups[group].differences(leaf.computed, allow):
            differ.setdefault(said, []).append(leaf.place.path)
    if differ:
        each = [
            said if len(paths) == len(compared) else f"{said} (of {some(paths)})"
            for said, paths in differ.items()
        ]
        raise ValueError(
            f"the target computes something else than PyTorch did: {'; '.join(each)}. Correct it,"
            " or let it be with allow={...}."
        )


def _check_rates(groups: Sequence[TorchGroup], leaves: Sequence[Leaf], count: int) -> None:
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


def _found(leaves: Sequence[Leaf], counts: Mapping[tuple[str, ...], int]) -> Found:
    """The buffers by name and path; zeros, as at the start, for what has none and needs none."""
    found = Found("PyTorch")
    names = {name for leaf in leaves for name in leaf.buffers}
    for name in names - {*OF_THE_TREE}:
        found.buffers[name] = {
            leaf.key: leaf.buffers.get(name, np.zeros(leaf.place.shape)) for leaf in leaves
        }
    for name in names & {*OF_THE_TREE}:
        found.of_tree[name] = {}
        for group in counts:
            covered = frozenset(leaf.key for leaf in leaves if leaf.computed.group == group)
            value = numbers_of(leaves, group).get(name, 1.0)  # a product, 1 at the start
            found.of_tree[name][covered] = np.asarray(value)
    return found


def _meanings(buffers: Collection[str], params: Tree) -> Any:
    """What the buffers of PyTorch mean: what those of an optimizer here do."""
    if "velocity" in buffers:
        alike = rmsprop(1.0, momentum=0.9) if "nu" in buffers else sgd(1.0, momentum=0.9)
    else:
        alike = adamod(1.0) if "rate_ema" in buffers else amsgrad(1.0)
    return found_in(alike, alike.init(params), params).meaning
