"""Checkpoints that know whose they are.

A state is arrays: nothing in it tells NAdam from Adam, or one convention from another. A header,
plain data for JSON or msgpack, says what optimizer the state belongs to, with the path, shape and
dtype of every array, and is compared before anything is read back.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.checkpoints.config import config_or_reason
from adaptive_opt.core.checks import needed
from adaptive_opt.core.describe import Description, describe, shown
from adaptive_opt.core.recipe import RECIPES
from adaptive_opt.core.renamed import in_todays_words
from adaptive_opt.core.trees import Tree, dtype_of

STATE_FORMAT = 1
"""Raised whenever the state of some recipe changes its meaning."""

SAMPLED_STEPS = (0, 1, 2, 5, 10, 30, 100, 300, 1000, 3000, 10_000, 100_000)
"""Where a schedule is looked at."""

OBSERVERS = ("telemetry", "observer")
"""What a recipe is given and has among its parts, though no setting says so."""

T = TypeVar("T")


class CheckpointMismatch(ValueError):  # noqa: N818 (says what it is)
    """A checkpoint belongs to another optimizer, model, or version; the message names what differs.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import CheckpointMismatch, adam, from_bytes, to_bytes
    >>> data = to_bytes(adam(1e-3), adam(1e-3).init(jnp.zeros(3)))
    >>> try:
    ...     from_bytes(adam(1e-3, b2=0.99), adam(1e-3).init(jnp.zeros(3)), data)
    ... except CheckpointMismatch as error:
    ...     print(error)
    the checkpoint does not fit: b2 of adam was 0.999, is 0.99
    """


def checkpoint_header(optimizer: optax.GradientTransformation, tree: Tree) -> dict[str, Any]:
    """What to save beside a state, as plain data: whose it is and what it consists of.

    Args:
      optimizer: any optax optimizer; what ``describe`` shows of it is in the header.
      tree: what is saved: an optimizer state, ``(params, state)``, a ``TrainState``; arrays,
        ``jax.ShapeDtypeStruct``, or numbers.

    Returns:
      A dict of dicts, lists, strings and numbers, for ``json`` or Orbax's ``JsonSave``:
      ``state_format``, ``optimizer`` (names, settings, parts) and ``leaves`` (the path of each
      array, its shape and dtype); and ``config``, from which ``make(header)`` builds the optimizer
      again, or None and in ``config_reason`` why it cannot be data.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, checkpoint_header
    >>> header = checkpoint_header(adam(1e-3), adam(1e-3).init(jnp.zeros((2, 3))))
    >>> header["optimizer"]["name"], header["optimizer"]["settings"]["convention"]
    ('adam', 'torch')
    >>> header["leaves"]["[0].mu"]
    [[2, 3], 'float32']
    """
    leaves = {
        jax.tree_util.keystr(path) or ".": [list(np.shape(leaf)), str(dtype_of(leaf))]
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    return {
        "state_format": STATE_FORMAT,
        "optimizer": _as_data(describe(optimizer)),
        "leaves": leaves,
        **config_or_reason(optimizer),
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
        steps, masks by name.

    Raises:
      CheckpointMismatch: names every stage, setting, path, shape and dtype that differs.

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
    wanted = checkpoint_header(optimizer, tree)
    unknown = {"state_format", "optimizer", "leaves"} - set(header)
    if unknown:
        raise CheckpointMismatch(
            f"this is not a header of a checkpoint: it has no {', '.join(sorted(unknown))}. Save"
            " what checkpoint_header returns."
        )
    if header["state_format"] != STATE_FORMAT:
        raise CheckpointMismatch(
            f"the checkpoint has state format {header['state_format']}, this version of"
            f" adaptive_opt reads {STATE_FORMAT}: read it with the version that wrote it."
        )
    differences = [
        *_optimizers_differ(
            _of_groups(header["optimizer"], wanted["optimizer"]),
            wanted["optimizer"],
            frozenset(allow),
        )
    ] or [*_leaves_differ(header["leaves"], wanted["leaves"])]
    differences = list(dict.fromkeys(differences))
    if differences:
        few = differences[:10]
        more = f"; and {len(differences) - 10} more" if len(differences) > 10 else ""
        raise CheckpointMismatch(f"the checkpoint does not fit: {'; '.join(few)}{more}")


def to_bytes(optimizer: optax.GradientTransformation, tree: Tree) -> bytes:
    """``flax.serialization.to_bytes`` with a header, and a checksum of four bytes at the end.

    Args:
      optimizer: the optimizer that the state in ``tree`` belongs to.
      tree: what is saved: an optimizer state, ``(params, state)``, a ``TrainState``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adamod, from_bytes, to_bytes
    >>> optimizer = adamod(1e-3)
    >>> state = optimizer.init(jnp.zeros(3))
    >>> restored = from_bytes(optimizer, state, to_bytes(optimizer, state))
    >>> sorted(restored[0].buffers)
    ['mu', 'nu', 'rate_ema']
    """
    serialization = _flax_serialization()
    content = {
        "header": checkpoint_header(optimizer, tree),
        "tree": serialization.to_state_dict(jax.device_get(tree)),
    }
    data = serialization.msgpack_serialize(content)
    return data + _checksum(data)


def from_bytes(
    optimizer: optax.GradientTransformation,
    target: T,
    data: bytes,
    *,
    allow: Collection[str] = (),
) -> T:
    """What ``to_bytes`` saved, in the structure of ``target``, if it fits.

    Args:
      optimizer: the optimizer that is to go on with the state.
      target: a tree of the same structure, shapes and dtypes: a fresh state, or what
        ``jax.eval_shape`` says of one.
      data: what ``to_bytes`` returned.
      allow: names of settings that may differ; see ``check_checkpoint``.

    Returns:
      ``target`` with the saved arrays, as NumPy arrays.

    Raises:
      CheckpointMismatch: the bytes are cut short, damaged, have no header, or do not fit.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, from_bytes, to_bytes
    >>> optimizer, x = adam(1e-3), jnp.ones(2)
    >>> _, state = optimizer.update(x, optimizer.init(x), x)
    >>> print(from_bytes(optimizer, optimizer.init(x), to_bytes(optimizer, state))[0].mu)
    [0.1 0.1]
    """
    content, checksum = data[:-4], data[-4:]
    if not content or checksum != _checksum(content):
        raise CheckpointMismatch(
            "the bytes are not what to_bytes returned: they are cut short or damaged, or have no"
            " header. Bytes of flax.serialization.to_bytes are read by"
            " flax.serialization.from_bytes, which checks neither the optimizer nor shapes; a"
            " state of optax then comes in through convert_state."
        )
    serialization = _flax_serialization()
    saved: Any = serialization.msgpack_restore(content)
    check_checkpoint(saved["header"], optimizer, target, allow=allow)
    restored: Any = serialization.from_state_dict(target, saved["tree"])
    return restored


def _flax_serialization() -> Any:
    return needed("flax.serialization", "flax", "to_bytes and from_bytes")


def _checksum(data: bytes) -> bytes:
    return zlib.crc32(data).to_bytes(4, "little")


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
        return None if values[0].dtype == np.bool_ else [float(value) for value in values]
    except Exception:  # whatever a function raises that wants something else
        return None


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


def _default(recipe: str, argument: str) -> Any:
    parameter = inspect.signature(RECIPES[recipe]).parameters.get(argument)
    return None if parameter is None else _plain(parameter.default)


def _are_alike(old: Any, new: Any) -> bool:
    if isinstance(old, Mapping) and isinstance(new, Mapping) and "schedule" in old.keys() & new:
        return bool(np.allclose(old["values"], new["values"], rtol=1e-5, atol=0))
    if isinstance(new, Mapping) and "schedule" in new and isinstance(old, str):
        return old == new["schedule"]  # a header that says no more than a name
    return old == new


def _told_apart(old: Any, new: Any) -> tuple[str, str]:
    """Two settings as they are printed; of two schedules the first value that differs."""
    is_schedule = [isinstance(x, Mapping) and "schedule" in x for x in (old, new)]
    if all(is_schedule):
        for step, a, b in zip(SAMPLED_STEPS, old["values"], new["values"], strict=True):
            if not np.isclose(a, b, rtol=1e-5, atol=0):
                return f"{old['schedule']} ({a:.6g} at step {step})", f"{b:.6g} there"
    was, now = (
        repr(x["schedule"] if of else x) for x, of in zip((old, new), is_schedule, strict=True)
    )
    return was, now


def _leaves_differ(saved: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    for path in saved:
        if path not in now:
            yield f"{path} was saved, but has no place"
        elif list(saved[path]) != list(now[path]):
            (old, old_dtype), (new, new_dtype) = saved[path], now[path]
            yield f"{path} was {old_dtype}{list(old)}, is {new_dtype}{list(new)}"
    for path in now:
        if path not in saved:
            yield f"{path} was not saved"
