"""Checkpoints that know whose they are.

A state is arrays: nothing in it tells NAdam from Adam, or one convention from another. A header,
plain data for JSON or msgpack, says what optimizer the state belongs to, with the path, shape and
dtype of every array, and is compared before anything is read back.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeGuard

import jax
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.checkpoints.config import config_or_reason
from adaptive_opt.checkpoints.leaves import (
    CheckpointMismatch,
    are_alike,
    entry_of,
    leaves_by_path,
    said,
)
from adaptive_opt.core.checks import check_names
from adaptive_opt.core.describe import Description, describe, shown
from adaptive_opt.core.recipe import RECIPES
from adaptive_opt.core.renamed import in_todays_words
from adaptive_opt.core.trees import Tree

STATE_FORMAT = 2
"""Raised whenever the state of some recipe, or what a header says of leaves, changes its meaning.

1: dtypes as JAX takes them. 2: as they are; Python numbers and functions are called what they are.
"""

READ_FORMATS = (1, 2)

SAMPLED_STEPS = (0, 1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
"""Where a schedule is looked at."""

DEEPEST = 100
"""How many containers a header may have inside one another."""

MOST = 2**64
"""What no whole number in a header reaches: Python does not print those of many digits."""

OBSERVERS = ("telemetry", "observer")
"""What a recipe is given and has among its parts, though no setting says so."""


def checkpoint_header(optimizer: optax.GradientTransformation, tree: Tree) -> dict[str, Any]:
    """What to save beside a state, as plain data: whose it is and what it consists of.

    Args:
      optimizer: any optax optimizer; what ``describe`` shows of it is in the header.
      tree: what is saved: an optimizer state, ``(params, state)``, a ``TrainState``, an
        ``nnx.Optimizer``; any tree of arrays, ``jax.ShapeDtypeStruct``, typed PRNG keys and
        Python's numbers. Functions and strings among the leaves (Equinox) are there by name.

    Returns:
      A dict of dicts, lists, strings and numbers, for ``json`` or Orbax's ``JsonSave``:
      ``state_format``, ``optimizer`` (names, settings, parts) and ``leaves`` (the path of each
      array, its shape and dtype); and ``config``, from which ``make(header)`` builds the optimizer
      again, or None and in ``config_reason`` why it cannot be data.

    Raises:
      TypeError: for a leaf that cannot be saved, by its path.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, checkpoint_header
    >>> header = checkpoint_header(adam(1e-3), adam(1e-3).init(jnp.zeros((2, 3))))
    >>> header["optimizer"]["name"], header["optimizer"]["settings"]["convention"]
    ('adam', 'torch')
    >>> header["leaves"]["[0].mu"]
    [[2, 3], 'float32']
    """
    return wanted_header(optimizer, tree) | config_or_reason(optimizer)


def wanted_header(optimizer: optax.GradientTransformation, tree: Tree) -> dict[str, Any]:
    """What headers are compared by."""
    return {
        "state_format": STATE_FORMAT,
        "optimizer": _as_data(describe(optimizer)),
        "leaves": {path: entry_of(path, leaf) for path, leaf in leaves_by_path(tree)[0].items()},
    }


def check_checkpoint(
    header: Mapping[str, Any],
    optimizer: optax.GradientTransformation,
    tree: Tree,
    *,
    allow: Collection[str] = (),
) -> None:
    """Refuses a checkpoint that was not written by this optimizer for parameters like these.

    Args:
      header: what ``checkpoint_header`` returned when the checkpoint was written.
      optimizer, tree: what it is to be read into.
      allow: names of settings that may differ, for instance ``{"learning_rate"}`` to go on with
        another one. Nothing else is let through. Schedules are compared by their values at a dozen
        steps, masks by name. Static fields of modules of Equinox and nnx are no leaves: they are
        those of ``tree``, and not compared.

    Raises:
      CheckpointMismatch: names every stage, setting, path, shape and dtype that differs.
      ValueError: a name in ``allow`` is no setting.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import CheckpointMismatch, adam, check_checkpoint, checkpoint_header
    >>> from adaptive_opt import nadam
    >>> x = jnp.zeros(3)
    >>> header = checkpoint_header(adam(1e-3), adam(1e-3).init(x))
    >>> try:
    ...     check_checkpoint(header, nadam(1e-3), nadam(1e-3).init(x))
    ... except CheckpointMismatch as error:
    ...     print(error)
    the checkpoint does not fit: the optimizer was adam, is nadam
    >>> check_checkpoint(header, adam(1e-4), adam(1e-4).init(x), allow={"learning_rate"})
    """
    compare(header, wanted_header(optimizer, tree), allow)


def compare(
    header: Mapping[str, Any], wanted: Mapping[str, Any], allow: Collection[str] = ()
) -> None:
    """Raises a CheckpointMismatch where a header is not the one that is wanted."""
    check_form(header)
    saved_by = header["state_format"]
    if saved_by not in READ_FORMATS:
        read = " and ".join(map(str, READ_FORMATS))
        raise CheckpointMismatch(
            f"the checkpoint has state format {saved_by}, this version of adaptive_opt reads"
            f" {read}: read it with the version that wrote it."
        )
    saved, now = _of_groups(header["optimizer"], wanted["optimizer"]), wanted["optimizer"]
    allow = check_names("allow", allow, {*_settings_of(saved), *_settings_of(now)})
    differences = [*_optimizers_differ(saved, now, allow)] or [
        *_leaves_differ(header["leaves"], wanted["leaves"], saved_by)
    ]
    differences = [shortened(difference) for difference in dict.fromkeys(differences)]
    if differences:
        few = differences[:10]
        more = f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointMismatch(f"the checkpoint does not fit: {'; '.join(few)}{more}")


def shortened(text: str, longest: int = 500) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


# --- the form of a header -------------------------------------------------------------------------


def check_form(header: Any) -> None:
    """Raises a CheckpointMismatch for what no ``checkpoint_header`` has returned."""
    if not isinstance(header, Mapping):
        raise _no_header(f"it is a {type(header).__name__} and no dict")
    missing = {"state_format", "optimizer", "leaves"} - set(header)
    if missing:
        raise _no_header(f"it has no {', '.join(sorted(missing))}")
    if type(header["state_format"]) is not int or not _is_data(header["state_format"]):
        raise _no_header("its state_format is no whole number")
    if not _is_data(header["optimizer"]) or not _is_description(header["optimizer"]):
        raise _no_header("its optimizer is no name, settings and parts, of plain data")
    leaves = header["leaves"]
    if not isinstance(leaves, Mapping) or not all(map(_is_entry, leaves, leaves.values())):
        raise _no_header("its leaves are not a shape and a dtype for every path")


def _no_header(why: str) -> CheckpointMismatch:
    return CheckpointMismatch(
        f"this is not a header of a checkpoint: {why}. Save what checkpoint_header returns."
    )


def _is_data(value: Any, depth: int = 0) -> bool:
    """Whether it is what JSON can hold, at most so deep."""
    if depth > DEEPEST:
        return False
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_data(x, depth + 1) for k, x in value.items())
    if isinstance(value, (list, tuple)):
        return all(_is_data(x, depth + 1) for x in value)
    if isinstance(value, float):
        return math.isfinite(value)
    if type(value) is int:
        return abs(value) < MOST
    return value is None or isinstance(value, (bool, str))


def _is_description(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and value.keys() >= {"name", "settings", "parts"}
        and isinstance(value["name"], str)
        and isinstance(value["settings"], Mapping)
        and isinstance(value["parts"], (list, tuple))
        and all(map(_is_description, value["parts"]))
    )


def _is_entry(path: Any, entry: Any) -> bool:
    if not isinstance(path, str) or not isinstance(entry, (list, tuple)) or len(entry) != 2:
        return False
    shape, dtype = entry
    return (
        isinstance(dtype, str)
        and isinstance(shape, (list, tuple))
        and all(type(n) is int and 0 <= n < MOST for n in shape)
    )


# --- as data --------------------------------------------------------------------------------------


def _as_data(description: Description) -> dict[str, Any]:
    settings, parts = description.settings, description.parts
    if description.name == "ParameterGroups":  # its settings are those of its parts
        settings, parts = {}, tuple(sorted(parts, key=lambda part: str(part.key)))
    return {
        "name": description.name,
        "settings": {name: _plain(value, name) for name, value in settings.items()},
        "parts": [_as_data(part) for part in parts],
    }


def _of_groups(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Mapping[str, Any]:
    """The optimizer of a header; ParameterGroups were once a partition in a partition."""
    if now["name"] == "ParameterGroups" and saved["name"] == "partition":
        inner = next((part for part in saved["parts"] if part["name"] == "partition"), saved)
        return {"name": now["name"], "settings": {}, "parts": inner["parts"]}
    return saved


def _plain(value: Any, name: str = "") -> Any:
    """A setting as data; a schedule as its values at a dozen steps."""
    if isinstance(value, (np.generic, np.ndarray, jax.Array)) and not isinstance(value, Tracer):
        value = value.item() if np.ndim(value) == 0 else value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item, str(key)) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if callable(value) and not inspect.isclass(value) and name != "mask":
        values = _sampled(value)
        return shown(value) if values is None else {"schedule": shown(value), "values": values}
    return shown(value)


def _sampled(schedule: Any) -> list[float] | None:
    """The values of a schedule at some steps; None for a function that is no schedule."""
    try:
        values = [np.asarray(schedule(np.int32(step))) for step in SAMPLED_STEPS]
        sampled = [float(value) for value in values]
        return sampled if values[0].dtype != np.bool_ and np.isfinite(sampled).all() else None
    except Exception:  # whatever a function raises that wants something else
        return None


# --- what differs ---------------------------------------------------------------------------------


def _optimizers_differ(
    saved: Mapping[str, Any],
    now: Mapping[str, Any],
    allow: frozenset[str],
    inside: str = "",
    follows: bool = False,
) -> Iterator[str]:
    """What differs, each thing once.

    Where it is a recipe, its parts ``follow`` from its settings, and only their names are compared.
    """
    where = f" in {inside}" if inside else ""
    if saved["name"] != now["name"]:
        yield f"the optimizer{where} was {saved['name']}, is {now['name']}"
        return
    if follows and now["name"] in OBSERVERS:
        yield from _settings_differ(saved, now, allow, where)
    if not follows:
        differences = [*_settings_differ(saved, now, allow, where)]
        yield from differences
        follows = now["name"] in RECIPES
        if differences and follows:
            return
    before, after = ([part["name"] for part in d["parts"]] for d in (saved, now))
    if before != after:
        yield f"{now['name']}{where} was made of {', '.join(before)}, is of {', '.join(after)}"
        return
    for old, new in zip(saved["parts"], now["parts"], strict=True):
        yield from _optimizers_differ(old, new, allow, now["name"], follows)


def _settings_differ(
    saved: Mapping[str, Any], now: Mapping[str, Any], allow: frozenset[str], where: str
) -> Iterator[str]:
    saved = {**saved, "settings": in_todays_words(saved["name"], saved["settings"])}
    for name in sorted({*saved["settings"], *now["settings"]} - allow):
        if name not in saved["settings"] or name not in now["settings"]:
            given = saved["settings"].get(name, now["settings"].get(name))
            if now["name"] not in RECIPES or given == _default(now["name"], name):
                continue  # an argument that one of two versions does not know
        old, new = (d["settings"].get(name) for d in (saved, now))
        if not _are_alike(old, new):
            was, now_is = _told_apart(old, new)
            yield f"{name} of {saved['name']}{where} was {was}, is {now_is}"


def _settings_of(optimizer: Mapping[str, Any]) -> Iterator[str]:
    """The names of all settings."""
    yield from in_todays_words(optimizer["name"], optimizer["settings"])
    for part in optimizer["parts"]:
        yield from _settings_of(part)


def _default(recipe: str, argument: str) -> Any:
    parameter = inspect.signature(RECIPES[recipe]).parameters.get(argument)
    return None if parameter is None else _plain(parameter.default)


def _are_alike(old: Any, new: Any) -> bool:
    if _is_schedule(old) and _is_schedule(new):
        return bool(np.allclose(old["values"], new["values"], rtol=1e-5, atol=0))
    if isinstance(new, Mapping) and "schedule" in new and isinstance(old, str):
        return old == new["schedule"]  # a header that says no more than a name
    return old == new


def _is_schedule(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether it is a name, and a value at each of the sampled steps."""
    if not isinstance(value, Mapping) or value.keys() != {"schedule", "values"}:
        return False
    values = value["values"]
    return (
        isinstance(values, (list, tuple))
        and len(values) == len(SAMPLED_STEPS)
        and all(isinstance(x, float) or (type(x) is int and abs(x) < 2**53) for x in values)
    )


def _told_apart(old: Any, new: Any) -> tuple[str, str]:
    """Two settings as they are printed; of two schedules the first value that differs."""
    is_schedule = [_is_schedule(x) for x in (old, new)]
    if all(is_schedule):
        for step, a, b in zip(SAMPLED_STEPS, old["values"], new["values"], strict=True):
            if not np.isclose(a, b, rtol=1e-5, atol=0):
                return f"{old['schedule']} ({a:.6g} at step {step})", f"{b:.6g} there"
    was, now = (
        repr(x["schedule"] if of else x) for x, of in zip((old, new), is_schedule, strict=True)
    )
    return was, now


def _leaves_differ(
    saved: Mapping[str, Any], now: Mapping[str, Any], saved_by: int
) -> Iterator[str]:
    for path in saved:
        if path not in now:
            yield f"{path} was saved, but has no place"
            continue
        (old, old_dtype), (new, new_dtype) = saved[path], now[path]
        alike = are_alike(old_dtype, new_dtype, as_jax_takes_it=saved_by == 1)
        if list(old) != list(new) or not alike:
            yield f"{path} was {said(saved[path])}, is {said(now[path])}"
    for path in now:
        if path not in saved:
            yield f"{path} was not saved"
