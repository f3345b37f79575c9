"""What ``to_bytes`` returned in format 1: the msgpack of Flax, and a checksum of four bytes.

It is read for ever, so by our own code: without Flax, and in memory that the length of the bytes
bounds. (A general reader makes lists of eight bytes out of each byte.)
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import Any

import jax
import numpy as np

from adaptive_opt.checkpoints.leaves import WrongBytesError, are_alike, fitted
from adaptive_opt.core.trees import dtype_of, is_of_keys

DEEPEST = 100
"""How many containers may be inside one another."""

# Of the first byte of each kind of value. https://github.com/msgpack/msgpack/blob/master/spec.md
CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}
NUMBERS = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
           0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}  # fmt: skip
LENGTHS = {0xC4: ">B", 0xC5: ">H", 0xC6: ">I", 0xC7: ">B", 0xC8: ">H", 0xC9: ">I",
           0xD9: ">B", 0xDA: ">H", 0xDB: ">I", 0xDC: ">H", 0xDD: ">I", 0xDE: ">H",
           0xDF: ">I"}  # fmt: skip
BYTES, EXTENSIONS, STRINGS = {0xC4, 0xC5, 0xC6}, {0xC7, 0xC8, 0xC9}, {0xD9, 0xDA, 0xDB}
LISTS = {0xDC, 0xDD}
EXTENSIONS_OF = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}

CHUNKED = "__msgpack_chunked_array__"
"""In the dict that stands for an array of more than 2^30 bytes."""


def is_complete(data: memoryview) -> bool:
    """Whether the checksum at the end is that of what is in front of it."""
    return len(data) > 4 and zlib.crc32(data[:-4]).to_bytes(4, "little") == data[-4:]


def read(data: memoryview, most_values: int) -> tuple[Any, Any]:
    """The header, and the tree as dicts of NumPy arrays that look into ``data``."""
    content = _Reader(data[:-4], most_values).everything()
    if not isinstance(content, dict) or content.keys() != {"header", "tree"}:
        raise WrongBytesError("they hold no header and tree")
    return content["header"], content["tree"]


def leaf_at(tree: Any, path: str, keys: tuple[Any, ...], target: Any) -> Any:
    """The leaf of a tree of Flax's that belongs where ``target`` is."""
    value = _found(tree, path, keys)
    if type(value) not in (np.ndarray, bool, int, float, complex):
        raise WrongBytesError(f"they hold no number for {path}")
    wanted = getattr(target, "dtype", None) or dtype_of(target)
    fits = not is_of_keys(wanted) and are_alike(
        dtype_of(value).name, np.dtype(wanted).name, as_jax_takes_it=True
    )
    if np.shape(value) != np.shape(target) or not fits:
        raise WrongBytesError(
            f"{path} is {dtype_of(value)}{list(np.shape(value))} in the bytes, not as their header"
            " says"
        )
    return fitted(path, value, target)


def _found(tree: Any, path: str, keys: tuple[Any, ...]) -> Any:
    for key in keys:
        name = str(next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)))
        if not isinstance(tree, dict) or name not in tree:
            raise WrongBytesError(f"they hold nothing for {path}")
        tree = tree[name]
    if isinstance(tree, dict) and CHUNKED in tree:
        return _joined(tree)
    return tree.copy() if isinstance(tree, np.ndarray) else tree


def _joined(tree: dict[str, Any]) -> np.ndarray:
    def in_order(part: Any) -> list[Any]:
        if not isinstance(part, dict) or not all(str(i) in part for i in range(len(part))):
            raise WrongBytesError("an array in parts misses some")
        return [part[str(i)] for i in range(len(part))]

    shape, parts = in_order(tree.get("shape")), in_order(tree.get("chunks"))
    arrays = [part for part in parts if isinstance(part, np.ndarray) and part.ndim == 1]
    if not arrays or len(arrays) < len(parts) or len({part.dtype for part in arrays}) > 1:
        raise WrongBytesError("an array in parts has parts that are none")
    whole = np.concatenate(arrays)
    return whole.reshape(_shape(shape, whole.size))


def _shape(shape: Any, size: int) -> tuple[int, ...]:
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise WrongBytesError("an array has no shape")
    if math.prod(shape) != size:
        raise WrongBytesError("an array has more or fewer numbers than its shape")
    return tuple(shape)


class _Reader:
    def __init__(self, data: memoryview, most_values: int) -> None:
        self.data, self.at, self.left = data, 0, most_values

    def everything(self, depth: int = 0) -> Any:
        value = self.value(depth)
        if self.at != len(self.data):
            raise WrongBytesError("something follows their end")
        return value

    def take(self, length: int) -> memoryview:
        if length > len(self.data) - self.at:
            raise WrongBytesError("they end too early")
        self.at += length
        return self.data[self.at - length : self.at]

    def number(self, form: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def value(self, depth: int) -> Any:
        self.left -= 1
        if self.left < 0 or depth > DEEPEST:
            raise WrongBytesError("they hold far more than this optimizer has")
        first = self.take(1)[0]
        if first <= 0x7F or first >= 0xE0:  # a small number
            return first if first <= 0x7F else first - 256
        if first in CONSTANTS:
            return CONSTANTS[first]
        if first in NUMBERS:
            return self.number(NUMBERS[first])
        if first <= 0x8F:
            return self.mapping(first & 15, depth)
        if first <= 0x9F:
            return self.listing(first & 15, depth)
        if first <= 0xBF:
            return self.string(first & 31)
        if first in EXTENSIONS_OF:
            return self.extension(EXTENSIONS_OF[first], depth)
        if first not in LENGTHS:
            raise WrongBytesError("they hold a byte that means nothing")
        length = self.number(LENGTHS[first])
        if first in BYTES:
            return self.take(length)
        if first in EXTENSIONS:
            return self.extension(length, depth)
        if first in STRINGS:
            return self.string(length)
        return self.listing(length, depth) if first in LISTS else self.mapping(length, depth)

    def string(self, length: int) -> str:
        return str(self.take(length), "utf-8")

    def listing(self, length: int, depth: int) -> list[Any]:
        return [self.value(depth + 1) for _ in range(length)]

    def mapping(self, length: int, depth: int) -> dict[str, Any]:
        found = {}
        for _ in range(length):
            key = self.value(depth + 1)
            if not isinstance(key, str) or key in found:
                raise WrongBytesError("they hold a key that is no string, or one twice")
            found[key] = self.value(depth + 1)
        return found

    def extension(self, length: int, depth: int) -> Any:
        code, data = self.number(">b"), self.take(length)
        content = _Reader(data, min(self.left, 64)).everything(depth + 1)
        if code == 2 and isinstance(content, list) and [type(x) for x in content] == [float] * 2:
            return complex(*content)
        if code not in (1, 3) or not isinstance(content, list) or len(content) != 3:
            raise WrongBytesError("they hold something that is no array")
        return _array(*content)


def _array(shape: Any, name: Any, data: Any) -> np.ndarray:
    if not isinstance(name, str) or not isinstance(data, memoryview):
        raise WrongBytesError("they hold something that is no array")
    try:
        dtype = jax.numpy.dtype(name)
    except TypeError:
        raise WrongBytesError("they hold an array of no dtype") from None
    if not (dtype == np.bool_ or jax.numpy.issubdtype(dtype, np.number)):
        raise WrongBytesError("they hold an array that is not of numbers")
    if len(data) % dtype.itemsize:
        raise WrongBytesError("they hold part of a number")
    shape = _shape(shape, len(data) // dtype.itemsize)
    return np.frombuffer(data, dtype).reshape(shape) if data else np.empty(shape, dtype)
