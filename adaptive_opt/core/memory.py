"""What the stages remember of one array, and the policies that hold for every buffer.

A buffer has the shape and the dtype of the value it holds. That is found by one abstract look at
the lines; nobody declares it. After that it keeps the dtype it was made with.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from adaptive_opt.core import finite, trees

PARAM = "param"
"""In place of an initial value that is the parameter, which a look has not got."""


@dataclasses.dataclass
class Spec:
    """What a buffer is like: found by a look.

    ``kind`` is the field whose value it holds: a second moment is no float16, a rate at least
    float32, whatever was asked for.
    """

    shape: tuple[int, ...]
    own: np.dtype
    initial: Any
    asked: DTypeLike | None
    is_like_gradient: bool
    kind: str | None = None

    def dtype(self, name: str, state_dtype: DTypeLike | None) -> np.dtype:
        asked = self.asked if self.asked is not None else state_dtype
        if asked is None:
            return self.own
        chosen = trees.buffer_dtype(asked, self.own)
        if self.kind == "second_moment":
            if jnp.finfo(chosen).minexp > -126:
                raise ValueError(
                    f"the buffer {name!r} cannot be {chosen}: the squares of small gradients would"
                    " be lost in it. Use bfloat16 or float32."
                )
            return chosen
        small = self.kind == "rate" or not self.is_like_gradient
        return trees.wide(chosen) if small else chosen


class Memory:
    """The buffers of one array (or of the whole tree): those of the step before, and the new ones.

    Args:
      stored: the buffers by name; None for a look, which notes what there will be.
      state_dtype: what was asked for of all of them.
      where: says at which leaf this is, for messages.
      warned: the buffers of which it was said that they are widened.
    """

    def __init__(
        self,
        stored: Mapping[str, Any] | None,
        state_dtype: DTypeLike | None = None,
        where: Callable[[], str] = lambda: "",
        warned: set[str] | None = None,
        like: tuple[int, ...] | None = None,
    ) -> None:
        self.stored, self.state_dtype, self.where = stored, state_dtype, where
        self.warned = set() if warned is None else warned
        self.like = like
        self.specs: dict[str, Spec] = {}
        self.new: dict[str, Any] = {}
        self.remembered = False
        self._recalled: dict[str, jax.Array] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def recall(
        self, name: str, like: Any, initial: Any, asked: DTypeLike | None, width: np.dtype
    ) -> jax.Array:
        self.remembered = True
        if name in self._recalled:
            return self._recalled[name]
        shape, dtype = jnp.shape(like), trees.dtype_of(like)
        if self.stored is None:
            own = trees.at_width_of(dtype, width)
            self.specs[name] = Spec(shape, own, initial, asked, shape == self.like)
            value = (
                like if isinstance(like, jax.Array) and like.dtype == own else jnp.zeros(shape, own)
            )
        else:
            value = self._checked(name, self.stored.get(name), shape, asked, width)
        self._recalled[name] = value
        return value

    def _checked(
        self, name: str, held: Any, shape: tuple[int, ...], asked: DTypeLike | None, width: Any
    ) -> jax.Array:
        if not trees.is_array(held):
            raise ValueError(
                f"there is a gradient{self.where()}, but the state holds no array {name!r} there."
                " Initialise the optimizer with the parameters it is to update."
            )
        if jnp.shape(held) != shape:
            raise ValueError(
                f"gradient, parameter and state{self.where()} differ in shape: {shape},"
                f" {jnp.shape(held)}; the buffer {name!r}{self.where()} has shape"
                f" {jnp.shape(held)}, but the gradient calls for {shape}. A state belongs to the"
                " parameters it was initialised with; initialise a new one. (In a flat chain"
                " every buffer is shaped like its parameter: a second moment of another scope"
                " belongs into adaptive(...).)"
            )
        dtype = trees.dtype_of(held)
        if asked is None and self.state_dtype is None and dtype.itemsize * 8 < 32:
            if name not in self.warned:
                self.warned.add(name)
                warnings.warn(
                    f"the buffer {name!r} arrives as {dtype}, perhaps from a state that optax made"
                    " for 16-bit parameters, and is kept as float32 from here on. With state_dtype="
                    " it stays as it is.",
                    stacklevel=2,
                )
            dtype = trees.wide(dtype)
        self._dtypes[name] = dtype
        return trees.at_width(held, max(width, trees.real(trees.wide(dtype)), key=_size))

    def keep(self, name: str, value: Any) -> None:
        if name not in self._recalled:
            raise ValueError(f"the buffer {name!r} is kept before it is recalled: recall it first.")
        old = self._recalled[name]
        if jnp.shape(value) != old.shape:
            raise ValueError(
                f"the buffer {name!r}{self.where()} has shape {old.shape}, but the gradient calls"
                f" for {jnp.shape(value)}. A state belongs to the parameters it was initialised"
                " with; initialise a new one."
            )
        if self.stored is None:
            self.specs[name].own = trees.at_width_of(trees.dtype_of(value), trees.real(old.dtype))
        self.new[name] = value

    def note_kind(self, name: str, kind: str | None) -> None:
        if name in self.specs and kind is not None:
            self.specs[name].kind = kind

    def finished(self, *inputs: Any) -> dict[str, Any]:
        """The new buffers in the dtypes of the old, none of them somebody else's array."""
        taken, buffers = list(inputs), {}
        for name, old in self._recalled.items():
            value, dtype = self.new.get(name, old), self._dtypes[name]
            if any(value is other for other in taken):
                value = trees.copied(value, old)
            taken.append(value)
            if jnp.iscomplexobj(value) and not jnp.issubdtype(dtype, np.complexfloating):
                raise TypeError(
                    f"the buffer {name!r}{self.where()} is real, but the gradient makes it"
                    f" {value.dtype}; the gradient of a real parameter is real. Take its real part,"
                    " or initialise with complex parameters."
                )
            buffers[name] = finite.narrowed(value, dtype)
        return buffers


def _size(dtype: np.dtype) -> int:
    return dtype.itemsize
