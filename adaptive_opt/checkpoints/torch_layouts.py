"""From the layout of a parameter in PyTorch to that of the same parameter here.

What has the shape of a parameter there has, laid out anew, its shape here: the parameter itself,
its gradient, and every buffer of an optimizer. The table:

======================================  =====================  ===============================
here                                    in PyTorch             from there
======================================  =====================  ===============================
Flax Dense ``kernel``                   (out, in)              transposed
Flax DenseGeneral ``kernel``            (out, in)              transposed, then split in heads
Flax Conv ``kernel``, and that of       (out, in, *space)      (*space, in, out)
ConvTranspose(transpose_kernel=True)
Flax ConvTranspose ``kernel``           (in, out, *space)      (*space, in, out), space flipped
Equinox ConvTranspose ``weight``        (in, out, *space)      (out, in, *space), space flipped
Equinox Conv ``bias``                   (out,)                 (out, 1, 1)
everything else                         as here                as it is
======================================  =====================  ===============================

A convolution in PyTorch that is transposed runs over its kernel backwards; Flax and Equinox do not.
Where shapes leave several of these open: a matrix named ``kernel`` is transposed. A convolution of
as many channels in as out is plain if its path says "conv". If its path or class says "transpose"
or "deconv", or nothing of a convolution, ``layout=`` has to say what it is: ``"conv"`` for the
third row and ``"conv_transpose"`` for the fourth. One case cannot be seen: a square kernel of a
layer that is no torch.nn.Linear (Conv1D of the package transformers is (in, out) already).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from adaptive_opt.core.checks import check_names
from adaptive_opt.core.trees import Tree, path_of

Layout = Callable[[str, np.ndarray], np.ndarray] | Mapping[str, Sequence[int] | str]
CONV, TRANSPOSED = "conv", "conv_transpose"


class Place:
    """Where a parameter stands: its path, its shape, and the class that holds it."""

    def __init__(self, path: Any, shape: tuple[int, ...], owner: Any) -> None:
        self.path, self.shape, self.kind = path_of(path), shape, type(owner).__name__
        *above, self.name = self.path.split("/")
        said = "/".join([*above, self.kind]).lower()
        self.is_transposed = "transpose" in said or "deconv" in said
        self.is_plain = "conv" in said and not self.is_transposed


def places_of(params: Tree) -> list[Place]:
    """The places of all parameters, in the order of the leaves."""
    return [
        Place(path, tuple(np.shape(leaf)), _owner(params, path))
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]
    ]


def laid_out(what: str, x: np.ndarray, place: Place, layout: Layout | None) -> np.ndarray:
    """``x``, which is ``what`` of a parameter in PyTorch, as it lies here."""
    if callable(layout):
        made = np.asarray(layout(place.path, x))
        if x.ndim > 3 and made.shape == x.shape[::-1] and _reverses(layout, place.path, x):
            raise ValueError(
                f"layout= swaps height and width of {place.path!r}: x.T turns all axes around. Give"
                f" x.transpose{_inwards(x.ndim)}, or leave layout= out: kernels are laid out by"
                " themselves."
            )
    elif layout is not None and place.path in layout:
        given = layout[place.path]
        if isinstance(given, str):
            return _told(given, what, x, place)
        axes = tuple(given)
        if sorted(axes) != list(range(x.ndim)):
            raise ValueError(
                f"layout= gives the axes {axes} for {place.path!r}, whose {what} has shape"
                f" {x.shape}: give every axis once."
            )
        made = x.transpose(axes)
    else:
        if _is_open(x, place):
            raise ValueError(
                f"{what} of {place.path!r} has as many channels in as out, so that nothing says"
                f" which layer it is of. Say layout={{{place.path!r}: {TRANSPOSED!r}}} for a"
                f" ConvTranspose as it is by default, {CONV!r} for a Conv, and for a"
                " ConvTranspose(transpose_kernel=True)."
            )
        fitting = (made for made in _ways(x, place) if made.shape == place.shape)
        made = next(fitting, x)
    if made.shape != place.shape:
        raise ValueError(_does_not_fit(what, x, made, place))
    return made


def check_layout(layout: Layout | None, places: Sequence[Place]) -> None:
    if isinstance(layout, Mapping):
        check_names("layout", [*layout], [place.path for place in places])


def _told(given: str, what: str, x: np.ndarray, place: Place) -> np.ndarray:
    """``x`` as a kernel of Flax of the layer that ``layout=`` names."""
    if given not in (CONV, TRANSPOSED):
        raise ValueError(
            f"layout= says {given!r} for {place.path!r}: it is {CONV!r}, {TRANSPOSED!r}, or axes."
        )
    if x.ndim < 3:
        return x  # a bias, or a number of each channel
    plain, backwards = _kernels(x)
    made = plain if given == CONV else backwards
    if made.shape != place.shape:
        raise ValueError(_does_not_fit(what, x, made, place))
    return made


def _kernels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As a kernel of a Conv of Flax, and of a ConvTranspose."""
    space = tuple(range(2, x.ndim))
    backwards = np.flip(x.transpose(*space, 0, 1), tuple(range(len(space))))
    return x.transpose(*space, 1, 0), backwards


def _is_open(x: np.ndarray, place: Place) -> bool:
    """Whether it may be the kernel of two layers."""
    if place.name != "kernel" or x.ndim < 3 or place.is_plain:
        return False
    return all(made.shape == place.shape for made in _kernels(x))


def _ways(x: np.ndarray, place: Place) -> Iterator[np.ndarray]:
    """The layouts that ``x`` may have here, the likeliest first."""
    first = x
    if place.name == "kernel" and x.ndim > 1:
        plain, backwards = _kernels(x)
        first = plain
        yield plain
        if x.ndim > 2:
            yield backwards
        if x.ndim == 2 and _splits(plain.shape, place.shape):
            yield plain.reshape(place.shape)
    elif place.kind.startswith("ConvTranspose") and x.ndim > 2:  # of Equinox
        yield np.flip(x.swapaxes(0, 1), tuple(range(2, x.ndim)))
        return
    else:
        yield x
    is_split_bias = place.name == "bias" and x.ndim == 1 and x.size == math.prod(place.shape)
    if is_split_bias or _without_ones(first.shape) == _without_ones(place.shape):
        yield first.reshape(place.shape)
    yield x


def _splits(shape: tuple[int, ...], into: tuple[int, ...]) -> bool:
    """Whether (in, out) can be read as the axes in, or out, split into several (heads)."""
    return any(shape == (math.prod(into[:i]), math.prod(into[i:])) for i in range(1, len(into)))


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def _reverses(layout: Callable[..., Any], path: str, x: np.ndarray) -> bool:
    probe = np.arange(x.size).reshape(x.shape)
    return bool(np.array_equal(layout(path, probe), probe.T))


def _inwards(rank: int) -> tuple[int, ...]:
    """The axes that turn (out, in, *space) into (*space, in, out)."""
    return (*range(2, rank), 1, 0)


def _does_not_fit(what: str, x: np.ndarray, made: np.ndarray, place: Place) -> str:
    """The message for a shape that fits in no way, with the axes where others would do."""
    became = "" if made.shape == x.shape else f", by layout= {made.shape}"
    said = f"{what} of {place.path!r} has shape {x.shape}{became}, the parameter {place.shape}."
    if x.ndim == len(place.shape):
        orders = [_inwards(x.ndim)] if x.ndim > 1 else []
        orders += itertools.permutations(range(x.ndim)) if x.ndim < 7 else []
        for axes in orders:
            if tuple(x.shape[a] for a in axes) == place.shape:
                return f"{said} Give the axes: layout={{{place.path!r}: {axes}}}."
    elif x.size == math.prod(place.shape):
        return (
            f"{said} It has as many numbers, with other axes (heads that are split, or one array"
            " for what is several there): give layout=, a function (path, array) -> array that"
            " reshapes it."
        )
    return (
        f"{said} It is another parameter (see names=), or one that PyTorch keeps together with"
        " others (in_proj_weight of attention, weight_ih of a cell): split it into one entry for"
        " each parameter here."
    )


def _owner(tree: Any, path: Any) -> Any:
    """What the last key of a path is a key of."""
    for key in path[:-1]:
        if isinstance(key, jax.tree_util.GetAttrKey):
            tree = getattr(tree, key.name, None)
        else:
            index = getattr(key, "key", getattr(key, "idx", None))
            try:
                tree = tree[index]
            except (KeyError, IndexError, TypeError):
                return None
    return tree
