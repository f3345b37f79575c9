"""Any tree as bytes, or as a file, with the header that says whose it is.

Format 2, all numbers with the lowest byte first::

    8 bytes    MAGIC: what it is, and the format
    8 bytes    the length of the header
    ...        the header, as JSON
    ...        the leaves, in the header's order, one after the other, each as its numbers
    32 bytes   SHA-256 of all that is in front of it

No byte says what is to be made of others: how long a leaf is follows from the tree that it is read
into, once the header fits it. Nothing is unpickled, and no function is called by a name in a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax
import optax

from adaptive_opt.checkpoints import format_1
from adaptive_opt.checkpoints.files import replace_file
from adaptive_opt.checkpoints.headers import (
    MOST,
    check_form,
    checkpoint_header,
    compare,
    shortened,
    wanted_header,
)
from adaptive_opt.checkpoints.leaves import (
    CheckpointMismatch,
    WrongBytesError,
    leaves_by_path,
    restored,
    size_of,
    stored,
)
from adaptive_opt.core.trees import Tree

MAGIC = b"\x93adopt\x00\x02"
CHECKSUM = hashlib.sha256
SPARE_VALUES = 2_000
"""So many more values than the wanted one a header may have, at least."""

T = TypeVar("T")


def to_bytes(optimizer: optax.GradientTransformation, tree: Tree) -> bytes:
    """A tree as bytes, with a header that says whose it is, and a checksum.

    Any tree: dicts, lists, tuples, named tuples, dataclasses (registered, of ``chex``, of
    ``flax.struct``), Equinox modules, ``nnx.State``, an ``nnx.Optimizer`` or module as it is. Its
    leaves: arrays of any numbers, typed PRNG keys, Python's numbers. Functions among them are not
    saved, only their names, and strings are compared.

    Args:
      optimizer: the optimizer that the state in ``tree`` belongs to (``optimizer.tx`` of nnx).
      tree: what is saved: an optimizer state, ``(params, state)``, a ``TrainState``. Arrays
        that are split over the devices of this process are gathered.

    Raises:
      TypeError: for a leaf that cannot be saved, by its path; for one that is split over several
        processes: use Orbax then.

    >>> import jax, jax.numpy as jnp
    >>> from adaptive_opt import adamod, from_bytes, to_bytes
    >>> optimizer = adamod(1e-3)
    >>> training = {"step": 3, "key": jax.random.key(0), "state": optimizer.init(jnp.zeros(3))}
    >>> restored = from_bytes(optimizer, training, to_bytes(optimizer, training))
    >>> restored["step"], str(restored["key"].dtype), sorted(restored["state"][0].buffers)
    (3, 'key<fry>', ['mu', 'nu', 'rate_ema'])
    """
    leaves = leaves_by_path(tree)[0]
    header = json.dumps(checkpoint_header(optimizer, tree), allow_nan=False).encode()
    arrays = [stored(path, leaf) for path, leaf in leaves.items()]
    parts = [MAGIC, len(header).to_bytes(8, "little"), header, *(array.data for array in arrays)]
    checksum = CHECKSUM()
    for part in parts:
        checksum.update(part)
    return b"".join([*parts, checksum.digest()])


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
      target: a tree of the same paths, shapes and dtypes: a fresh state, or what
        ``jax.eval_shape`` says of one. It is left as it is.
      data: what ``to_bytes`` returned, in this version or an earlier one.
      allow: names of settings that may differ; see ``check_checkpoint``.

    Returns:
      ``target`` with what was saved: NumPy arrays, PRNG keys, Python numbers where both are; JAX
      arrays in objects of nnx, which are new ones. A Python number goes where the array is that JAX
      makes of it, and the other way round (a counter after ``jit``): it comes back as an array. A
      container of another type with the same paths fits, an ``OrderedDict`` for a dict.

    Raises:
      CheckpointMismatch: the bytes are cut short, changed, have no header, or do not fit.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, from_bytes, to_bytes
    >>> optimizer, x = adam(1e-3), jnp.ones(2)
    >>> _, state = optimizer.update(x, optimizer.init(x), x)
    >>> print(from_bytes(optimizer, optimizer.init(x), to_bytes(optimizer, state))[0].mu)
    [0.1 0.1]
    """
    view = memoryview(data).cast("B")
    is_new = _is_complete(view)
    if not is_new and not format_1.is_complete(view):
        raise CheckpointMismatch(
            "the bytes are not what to_bytes returned: they are cut short or damaged, or have no"
            " header. Bytes of flax.serialization.to_bytes are read by"
            " flax.serialization.from_bytes, which checks neither the optimizer nor shapes; a"
            " state of optax then comes in through convert_state."
        )
    leaves, rebuilt = leaves_by_path(target)
    wanted = wanted_header(optimizer, target)
    try:
        read = _read if is_new else _read_format_1
        return rebuilt(read(optimizer, target, leaves, wanted, view, allow))
    except (WrongBytesError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointMismatch(
            f"the bytes are not what to_bytes returned: {shortened(str(error))}. They were written"
            " by something else."
        ) from None


def write_checkpoint(
    path: str | os.PathLike[str], optimizer: optax.GradientTransformation, tree: Tree
) -> None:
    """Writes what ``to_bytes`` returns into a file, whole or not at all.

    A process that is killed, a full disk or a power cut leave the file that was there before. Use
    Orbax for several processes, for saving beside the training, and to keep the last few.

    Args:
      path: of the file, in a folder that is there.
      optimizer, tree: as in ``to_bytes``.

    >>> import pathlib, tempfile
    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, read_checkpoint, write_checkpoint
    >>> optimizer = adam(1e-3)
    >>> training = {"params": jnp.ones(2), "state": optimizer.init(jnp.ones(2))}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_checkpoint(pathlib.Path(folder) / "run", optimizer, training)
    ...     print(read_checkpoint(pathlib.Path(folder) / "run", optimizer, training)["params"])
    [1. 1.]
    """
    replace_file(path, to_bytes(optimizer, tree))


def read_checkpoint(
    path: str | os.PathLike[str],
    optimizer: optax.GradientTransformation,
    target: T,
    *,
    allow: Collection[str] = (),
) -> T:
    """What ``write_checkpoint`` wrote, if it fits: see ``from_bytes``.

    Raises:
      CheckpointMismatch: as in ``from_bytes``; it names the file.
      FileNotFoundError: there is no such file.

    >>> import pathlib, tempfile
    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adam, nadam, read_checkpoint, write_checkpoint
    >>> x = jnp.ones(2)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_checkpoint(pathlib.Path(folder) / "run", adam(1e-3), adam(1e-3).init(x))
    ...     try:
    ...         read_checkpoint(pathlib.Path(folder) / "run", nadam(1e-3), nadam(1e-3).init(x))
    ...     except ValueError as error:
    ...         print(str(error).rpartition("/")[2])
    run: the checkpoint does not fit: the optimizer was adam, is nadam
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return from_bytes(optimizer, target, data, allow=allow)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(f"{os.fspath(path)}: {error}") from None


# --- format 2 -------------------------------------------------------------------------------------


def _is_complete(data: memoryview) -> bool:
    end = len(data) - CHECKSUM().digest_size
    return (
        end >= len(MAGIC) + 8
        and data[: len(MAGIC)] == MAGIC
        and CHECKSUM(data[:end]).digest() == data[end:]
    )


def _read(
    optimizer: optax.GradientTransformation,
    target: Tree,
    leaves: Mapping[str, Any],
    wanted: Mapping[str, Any],
    data: memoryview,
    allow: Collection[str],
) -> list[Any]:
    """The leaves of ``target``, in its order."""
    content = data[len(MAGIC) : len(data) - CHECKSUM().digest_size]
    length = int.from_bytes(content[:8], "little")
    text, numbers = content[8 : 8 + length], content[8 + length :]
    if len(text) < length:
        raise WrongBytesError("they end inside of the header")
    text = bytes(text)
    cost = _cost(text)
    if cost > max(len(data), _most(wanted)) and cost > _most(checkpoint_header(optimizer, target)):
        raise WrongBytesError(f"their header has {len(text)} bytes, far more than is called for")
    header = _parsed(text)
    compare(header, wanted, allow)

    sizes = {path: size_of(entry, leaves[path]) for path, entry in header["leaves"].items()}
    whole = sum(sizes.values())
    if whole != len(numbers):
        raise WrongBytesError(f"they hold {len(numbers)} bytes of leaves, not {whole}")
    found, at = {}, 0
    for path, size in sizes.items():
        raw = numbers[at : at + size]
        found[path] = restored(path, raw, header["leaves"][path], leaves[path])
        at += size
    return [found[path] for path in leaves]


def _cost(text: bytes) -> int:
    """Bytes that JSON takes at most in Python: a hundred for each value, eight for a character."""
    return 8 * len(text) + 100 * sum(map(text.count, (b",", b"[", b"{", b":")))


def _most(header: Mapping[str, Any]) -> int:
    """What a header may cost, however small the file is, if this one is wanted."""
    return 2 * _cost(json.dumps(header).encode()) + 100 * SPARE_VALUES


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(
            str(text, "utf-8"),
            object_pairs_hook=_without_doubles,
            parse_constant=_no_number,
            parse_int=_whole,
        )
    except RecursionError:
        raise WrongBytesError("their header is nested without end") from None


def _whole(digits: str) -> int:
    """Python takes long for many digits, and refuses more than some."""
    if len(digits) > len(str(MOST)):
        raise WrongBytesError(f"their header has a number of {len(digits)} digits")
    return int(digits)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise WrongBytesError("their header has a name twice")
    return dict(pairs)


def _no_number(name: str) -> Any:
    raise WrongBytesError(f"their header has {name} for a number")


# --- format 1 -------------------------------------------------------------------------------------


def _read_format_1(
    optimizer: optax.GradientTransformation,
    target: Tree,
    leaves: Mapping[str, Any],
    wanted: Mapping[str, Any],
    data: memoryview,
    allow: Collection[str],
) -> list[Any]:
    header, tree = format_1.read(data, 2 * len(json.dumps(wanted)) + SPARE_VALUES)
    check_form(header)
    compare(header, wanted, allow)
    keys = [path for path, _ in jax.tree_util.tree_flatten_with_path(target)[0]]
    if len(keys) != len(leaves):
        raise TypeError("format 1 knows no objects of nnx: read it into their nnx.state.")
    return [
        format_1.leaf_at(tree, path, key, leaf)
        for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    ]
