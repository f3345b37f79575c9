"""Which parameters weight decay is meant for: told by their names, and by the modules around."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from adaptive_opt.core.checks import check_whole
from adaptive_opt.core.containers import is_box, is_function, named_leaves, names_of, trained
from adaptive_opt.core.trees import Tree, is_none

NOT_DECAYED = ("bias", "b", "scale", "offset", "gamma", "beta")
"""What biases and the weights of normalisations are called."""

MATRICES = ("kernel", "embedding", "embeddings")
"""What is no weight of a normalisation, whatever the module around it is called."""

STACKED_AXES = ("layers", "layer", "stack", "stacked", "scan")
"""Names of axes, in the boxes of linen, along which layers are stacked."""

_NORMALISATION = re.compile(r"norm$|^(ln|bn|gn)$|^normali[sz]ation$")
_EMBEDDING = re.compile(r"^embed|embed(ding)?s?$|^w[tp]e$")


def decay_mask(
    params: Tree,
    *,
    stacked: str | Mapping[str, int] = "",
    embeddings: bool = True,
) -> Tree:
    """True for the parameters that weight decay is meant for: no biases, no normalisations.

    A parameter decays if it has two dimensions or more, less those along which layers are stacked,
    unless it is called one of ``NOT_DECAYED``, or the module it is in is a normalisation by its
    name (a word of which ends in "norm", or is "ln" or "bn") or by its type (an Equinox module
    whose type ends in "Norm") and it is called none of ``MATRICES``. The name of an ``equinox.nn``
    module does not count, for its type is known.

    Dimensions along which layers are stacked (``nn.scan``, ``nnx.vmap``, ``eqx.filter_vmap``) are
    known by themselves only where a box of linen (``nn.Partitioned``) names them, by one of
    ``STACKED_AXES``. All others say nothing (an ``nnx.Optimizer`` hides what variables say): a
    vector of your own for each layer, of shape ``(layers, width)``, looks like a matrix. Name it in
    ``stacked``, and look at ``decay_report``.

    A ``mask=`` for any recipe; with other settings, ``functools.partial(decay_mask, ...)``.

    Args:
      params: parameters, or a module, of which the mask is that of its trained parameters.
      stacked: a regular expression, searched for in the path: what it finds has one more dimension
        in front; or several, each with the number of dimensions.
      embeddings: whether tables of embeddings decay: what is called "embedding", "wte", "wpe", or
        is in a module of such a name or in an ``eqx.nn.Embedding``. A kernel is none.

    ValueError for a pattern that finds no parameter.

    >>> import functools
    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adamw, decay_mask
    >>> decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    >>> decay_mask({"blocks": {"gate": jnp.ones((12, 64))}}, stacked="^blocks")
    {'blocks': {'gate': False}}
    >>> optimizer = adamw(1e-3, weight_decay=1e-2, mask=decay_mask)
    >>> mask = functools.partial(decay_mask, stacked="^blocks", embeddings=False)
    >>> optimizer = adamw(1e-3, weight_decay=1e-2, mask=mask)
    """
    params = trained(params)
    numbers = {stacked: 1} if isinstance(stacked, str) else dict(stacked)
    numbers.pop("", None)
    for pattern, number in numbers.items():
        check_whole(0, **{f"stacked[{pattern!r}]": number})
    leaves, structure = jax.tree.flatten(params, is_leaf=is_none)
    names = names_of(params)
    for pattern in numbers:
        if leaves and not any(re.search(pattern, name) for name in names):
            raise ValueError(
                f"stacked={pattern!r} finds no parameter. The paths are: {', '.join(names[:8])}."
            )

    def decays(name: str, leaf: Any, within: tuple[str, str, int]) -> bool | None:
        if leaf is None:
            return None
        module, kind, by_itself = within
        own = name.split("/")[-1]
        said = (number for pattern, number in numbers.items() if re.search(pattern, name))
        if np.ndim(leaf) - max([by_itself, *said]) < 2 or own in NOT_DECAYED:
            return False
        if own in ("embedding", "embeddings"):
            return embeddings
        if own in MATRICES:
            return True
        if _is(_NORMALISATION, module) or _NORMALISATION.search(_words(kind)[-1]):
            return False
        return embeddings or not any(_is(_EMBEDDING, of) for of in (own, module, kind))

    surroundings = [*_surroundings(params)]
    rows = zip(names, leaves, surroundings, strict=True)
    return structure.unflatten(decays(*row) for row in rows)


class DecayLine(NamedTuple):
    """One parameter in the report."""

    path: str
    shape: tuple[int, ...]
    decayed: bool


class DecayReport(tuple[DecayLine, ...]):
    """Every parameter, and whether it is decayed; prints as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "decayed")]
        rows += [(r.path, str(r.shape), "yes" if r.decayed else "no") for r in self]
        return as_table(rows)


def decay_report(params: Tree, mask: Tree | Callable[[Tree], Tree] = decay_mask) -> DecayReport:
    """What a mask decays, to be printed: path, shape and yes or no for every parameter.

    Args:
      params: parameters, or a module.
      mask: what a recipe takes for ``mask=``.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import decay_report
    >>> print(decay_report({"embed": jnp.ones((9, 4)), "ln": {"scale": jnp.ones((6, 4))}}))
    parameter  shape   decayed
    embed      (9, 4)  yes
    ln/scale   (6, 4)  no
    """
    params = trained(params)
    values = mask(params) if is_function(mask) else mask
    said = jax.tree.structure(params).flatten_up_to(jax.tree.broadcast(values, params))
    rows = zip(named_leaves(params), said, strict=True)
    return DecayReport(DecayLine(name, np.shape(x), bool(yes)) for (name, x), yes in rows)


def as_table(rows: list[tuple[str, ...]]) -> str:
    """Rows of text, the first one the heads of the columns, in columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _is(kind: re.Pattern[str], name: str) -> bool:
    """Whether a word of a name is of a kind: ``LayerNorm_0``, ``ln_1``, ``post_attention_norm``."""
    return any(map(kind.search, _words(name)))


def _words(name: str) -> list[str]:
    found = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    return [word.lower() for word in found] or [""]


def _surroundings(tree: Tree) -> Iterator[tuple[str, str, int]]:
    """For every leaf the name of its module, the type of that, and how many axes are stacked."""

    def of(node: Any, name: str, module: str, kind: str) -> Iterator[tuple[str, str, int]]:
        if is_box(node):
            names = getattr(node, "__dict__", {}).get("names", ())  # of linen, not of nnx
            count = sum(axis in STACKED_AXES for axis in names)
            yield from ((module, kind, count) for _ in jax.tree.leaves(node, is_leaf=is_none))
            return
        children = jax.tree_util.tree_flatten_with_path(
            node, is_leaf=lambda x: x is not node or x is None
        )[0]
        if len(children) == 1 and children[0][0] == ():
            yield module, kind, 0
            return
        for path, child in children:
            key = jax.tree_util.keystr(path, simple=True, separator="/")
            kind, knows = type(node).__name__, type(node).__module__.startswith("equinox.nn")
            yield from of(child, key, "" if knows else name, kind)

    return of(tree, "", "", "")
