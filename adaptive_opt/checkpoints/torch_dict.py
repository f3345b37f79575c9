"""What is in the state dict of an optimizer of PyTorch, parameter by parameter."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adaptive_opt.checkpoints.counting import number_of_gradients
from adaptive_opt.checkpoints.filling import listed

Key = int | str


class Entry(NamedTuple):
    """A parameter of the optimizer.

    Attributes:
      key: what it goes by in the state dict: its position in the groups, or its name.
      name: its name, if there is one.
      group: the number of its group.
      buffers: what the optimizer remembers of it, as arrays.
      step: how many gradients it has seen, if the state dict says so.
    """

    key: Key
    name: str | None
    group: int
    buffers: Mapping[str, np.ndarray]
    step: int | None

    def __str__(self) -> str:
        return str(self.key) if self.name in (None, self.key) else f"{self.key} ({self.name})"


class Saved(NamedTuple):
    """All parameters of the optimizer, and the settings of its groups."""

    entries: dict[Key, Entry]
    groups: Sequence[Mapping[str, Any]]

    def find(self, name: str | int, path: str) -> Entry | None:
        """The parameter of this name or position; None if the optimizer does not have it."""
        if isinstance(name, numbers.Integral) and not isinstance(name, bool):
            return self.entries.get(int(name))
        if not isinstance(name, str):
            raise ValueError(
                f"names should give the name or the position of {path!r} in PyTorch, not {name!r}."
            )
        if name in self.entries:
            return self.entries[name]
        return next((e for e in self.entries.values() if e.name == name), None)

    @property
    def has_names(self) -> bool:
        return any(entry.name is not None for entry in self.entries.values())


def read(state_dict: Mapping[str, Any], order: Sequence[str] | None) -> Saved:
    """The parameters in a state dict, with their names from ``param_names``, keys, or ``order``."""
    if not isinstance(state_dict, Mapping) or not ({"state", "param_groups"} & {*state_dict}):
        state_dict = _unflattened(state_dict)
    states, groups = _checked(state_dict.get("state", {}), state_dict.get("param_groups", ()))
    keys = [(key, i) for i, group in enumerate(groups) for key in group.get("params", ())]
    without = set(states) - {key for key, _ in keys}
    if without or len({key for key, _ in keys}) != len(keys):
        what = f"states {listed(without)} are in" if without else "some parameter is twice in"
        raise ValueError(f"the state dict contradicts itself: {what} {'no' if without else 'the'}"
                         " group of param_groups.")  # fmt: skip
    names = _names(groups, keys, order)
    entries = {}
    for key, i in keys:
        buffers = {k: v for k, v in states.get(key, {}).items() if v is not None}
        said = {_step(s["step"], key) for s in (buffers, groups[i]) if s.get("step") is not None}
        if len(said) > 1:
            raise ValueError(
                f"the parameter {key} has seen {sorted(said)} gradients: its state says one number,"
                " its group another."
            )
        step = said.pop() if said and (buffers or "step" not in groups[i]) else None
        arrays = {k: as_array(v, f"{k} of {key}") for k, v in buffers.items() if k != "step"}
        entries[key] = Entry(key, names.get(key), i, arrays, step)
    settings = [{k: v if k in _LISTS else _plain(v) for k, v in g.items()} for g in groups]
    return Saved(entries, settings)


def _checked(states: Any, groups: Any) -> tuple[Mapping[Any, Any], list[Mapping[str, Any]]]:
    """The states and the groups, if they are what PyTorch makes."""
    if not isinstance(states, Mapping):
        raise ValueError(_no_dict("its 'state'", "a dict of the states by parameter", states))
    for key, state in states.items():
        if not isinstance(state, Mapping):
            raise ValueError(_no_dict(f"the state of {key}", "a dict of tensors by name", state))
    groups = list(groups) or [{"params": list(states)}]
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), (list, tuple)):
            raise ValueError(_no_dict(f"group {i}", "a dict of settings, with 'params'", group))
        named = group.get("param_names")
        if named and len(named) != len(group["params"]):
            raise ValueError(
                f"group {i} of the state dict has {len(group['params'])} params and"
                f" {len(named)} param_names: take it as optimizer.state_dict() makes it."
            )
        for name, value in group.items():
            wrong = _wrong_number(name, _plain(value))
            if wrong:
                raise ValueError(
                    f"{name} in group {i} of the state dict should be {wrong}, got {value!r}."
                )
    return states, groups


def _no_dict(what: str, should: str, got: Any) -> str:
    return f"{what} in the state dict should be {should}, got {_short(got)}."


def _wrong_number(name: str, value: Any) -> str:
    """What a setting should be, if it is that of all optimizers that have it; and is not."""
    is_number = isinstance(value, numbers.Real)
    if name == "betas":
        is_right = isinstance(value, tuple) and len(value) > 1
        is_right = is_right and all(isinstance(b, numbers.Real) for b in value)
        return "" if is_right else "two or three numbers"
    return "a number" if name in _NUMBERS and not is_number else ""


_NUMBERS = ("lr", "eps", "weight_decay", "momentum", "dampening", "alpha", "rho", "lr_decay",
            "momentum_decay", "final_lr", "gamma", "beta3")  # fmt: skip
_LISTS = ("params", "param_names")


def _plain(value: Any) -> Any:
    """A setting as a number, if it is a tensor of one."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_plain, value))
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _names(
    groups: Sequence[Mapping[str, Any]], keys: Sequence[tuple[Key, int]], order: Any
) -> dict[Key, str]:
    names: dict[Key, str] = {key: key for key, _ in keys if isinstance(key, str)}
    for group in groups:
        if group.get("param_names"):
            names |= zip(group["params"], group["param_names"], strict=True)
    if order is not None:
        order = list(order)
        if len(order) != len(keys):
            raise ValueError(
                f"order= has {len(order)} names, the optimizer {len(keys)} parameters. It is"
                ' [names[p] for g in optimizer.param_groups for p in g["params"]] with names ='
                " {p: n for n, p in model.named_parameters()}."
            )
        given = {key: name for (key, _), name in zip(keys, order, strict=True)}
        wrong = [f"{k} is {names[k]!r}, not {given[k]!r}" for k in names if names[k] != given[k]]
        if wrong:
            few = "; ".join(wrong[:5])
            raise ValueError(
                f"order= contradicts the names in the state dict: {few}. Leave order= out."
            )
        names |= given
    twice = {name for name, times in Counter(names.values()).items() if times > 1}
    if twice:
        raise ValueError(f"several parameters of PyTorch have the name {listed(twice)}.")
    return names


def _step(value: Any, key: Key) -> int:
    array = as_array(value, f"step of {key}")
    number = float(array.reshape(())) if array.size == 1 and array.dtype.kind in "biuf" else np.nan
    if not number.is_integer():
        raise ValueError(f"step of {key} should be a number of gradients, got {array}.")
    return number_of_gradients(int(number), f"step of {key}")


def as_array(value: Any, what: str) -> np.ndarray:
    """A tensor, on whatever device and in bfloat16 too, or an array, as an array."""
    if hasattr(value, "full_tensor"):
        raise ValueError(
            f"{what} is a part of a tensor that is split over devices (DTensor). Save the state"
            " dict with get_optimizer_state_dict(model, optimizer,"
            " options=StateDictOptions(full_state_dict=True))."
        )
    if hasattr(value, "detach"):  # a tensor
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        value = value.numpy()
    array = np.asarray(value)
    if array.dtype.kind in "OSU":
        raise ValueError(
            f"{what} is no array but {type(value).__name__}. Of a tensor,"
            " tensor.detach().cpu().numpy() makes one; in bfloat16,"
            " tensor.detach().float().cpu().numpy()."
        )
    return array


def _unflattened(flat: Any) -> dict[str, Any]:
    """The state dict of get_optimizer_state_dict(flatten_optimizer_state_dict=True), as usual."""
    states: dict[str, dict[str, Any]] = {}
    groups: dict[str, dict[str, Any]] = {}
    for key in flat if isinstance(flat, Mapping) else ():
        part, _, rest = str(key).partition(".")
        name, _, entry = rest.rpartition(".")
        if part not in ("state", "param_groups") or not name:
            states = {}
            break
        (states if part == "state" else groups).setdefault(name, {})[entry] = flat[key]
    if not states:
        raise ValueError(
            "this is not the state dict of an optimizer of PyTorch, which has 'state' and"
            f" 'param_groups': it is {_short(flat)}. Give what optimizer.state_dict() returns; in a"
            " checkpoint it is often under 'optimizer' or 'optimizer_state_dict', in Lightning's"
            " under 'optimizer_states'."
        )
    for name in states:
        groups.setdefault(name, {})
    return {
        "state": states,
        "param_groups": [{**group, "params": [name]} for name, group in groups.items()],
    }


def _short(given: Any) -> str:
    if not isinstance(given, Mapping):
        return f"a {type(given).__name__}"
    return f"a dict of {listed(list(given)[:8]) or 'nothing'}"
