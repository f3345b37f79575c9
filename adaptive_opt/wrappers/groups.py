"""Parameter groups: which parameters get which learning rate, decay, or optimizer.

A table of path patterns on top of ``optax.partition``. Paths are the keys to a leaf, joined by
slashes: ``params/Dense_0/kernel`` for linen, ``layers/0/kernel`` for nnx, ``layers/0/weight`` for
equinox.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_constant,
    check_nonnegative,
    check_whole,
    scaled,
)
from adaptive_opt.core.describe import transformation
from adaptive_opt.core.trees import Tree, is_none, map_none, path_of, update_dtypes

NOT_DECAYED = ("bias", "b", "scale", "offset", "gamma", "beta")
"""What biases and the weights of normalisations are called."""


@dataclasses.dataclass(frozen=True)
class Group:
    """One line of the table: the parameters whose path matches, and what is different about them.

    Attributes:
      pattern: a regular expression, searched for anywhere in the path; ``$`` is its end. Note that
        ``layer_1`` is found in ``layer_10`` too: write ``layer_1(/|$)``.
      learning_rate: a multiplier of the learning rate, at least 0.
      weight_decay: in place of the common one.
      freeze: True: no update and no state. A whole number: frozen until that step; the group's own
        count, and with it its schedules and bias corrections, starts then.
      optimizer: an optimizer of its own, in place of everything else.
      may_be_empty: whether it is fine that no parameter belongs to it.
    """

    pattern: str = ""
    learning_rate: float = 1.0
    weight_decay: Hyperparameter | None = None
    freeze: bool | int = False
    optimizer: optax.GradientTransformation | None = None
    may_be_empty: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.freeze, np.bool_):
            object.__setattr__(self, "freeze", bool(self.freeze))
        if not isinstance(self.freeze, (int, np.integer)) or self.freeze < 0:
            raise ValueError(
                f"group {self.pattern!r}: freeze must be True, False, or the step until which, a"
                f" whole number of at least 0, got {self.freeze!r}."
            )
        check_constant(learning_rate=self.learning_rate)
        check_nonnegative(learning_rate=self.learning_rate)
        if self.weight_decay is not None:
            check_nonnegative(weight_decay=self.weight_decay)
        alone = self.optimizer is not None or self.freeze is True
        if alone and (self.learning_rate != 1.0 or self.weight_decay is not None):
            raise ValueError(
                f"group {self.pattern!r}: with optimizer= or freeze=True, learning_rate and"
                " weight_decay mean nothing; leave them out."
            )
        if self.optimizer is not None and self.freeze is True:
            raise ValueError(f"group {self.pattern!r}: give optimizer= or freeze=True, not both.")
        if not isinstance(self.pattern, str):
            raise TypeError(f"a group's pattern must be a string, got {self.pattern!r}.")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(
                f"group {self.pattern!r}: the pattern is not a regular expression: {error}."
            ) from None

    def settings(self) -> str:
        """What is different about the group, in words."""
        if self.freeze is True:
            return "frozen"
        said = []
        if self.optimizer is not None:
            said.append("its own optimizer")
        if self.learning_rate != 1.0:
            said.append(f"learning_rate x {self.learning_rate:.4g}")
        if self.weight_decay is not None:
            said.append(f"weight_decay {self.weight_decay}")
        if self.freeze:
            said.append(f"frozen until step {self.freeze}")
        return ", ".join(said) or "as given"


class ReportLine(NamedTuple):
    """One parameter in the report."""

    path: str
    shape: tuple[int, ...]
    group: str
    settings: str


class Report(tuple[ReportLine, ...]):
    """Every parameter with its group; prints as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "group", "settings")]
        rows += [(r.path, str(r.shape), r.group, r.settings) for r in self]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]])
            for row in rows
        ]
        return "\n".join(lines)


class ParameterGroups:
    """An ordered table of groups; every parameter belongs to the first whose pattern it matches.

    Args:
      groups: the table, most particular first.
      default: what holds for the parameters that match no pattern, ``Group()`` for "as given". If
        it is not declared, such a parameter is an error.

    ValueError at ``init``, ``labels`` and ``report`` for parameters in no group, and for groups
    with no parameter, be it that the pattern matches none or that groups before it have taken all
    it matches.

    >>> import jax.numpy as jnp, optax
    >>> from adaptive_opt import Group, ParameterGroups, adamw
    >>> groups = ParameterGroups(
    ...     [
    ...         Group("embedding", freeze=True),
    ...         Group("bias$", weight_decay=0.0),
    ...         Group("head", learning_rate=10.0),
    ...     ],
    ...     default=Group(),
    ... )
    >>> params = {
    ...     "embedding": jnp.ones((5, 2)),
    ...     "body": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)},
    ...     "head": {"kernel": jnp.ones((2, 1))},
    ... }
    >>> print(groups.report(params))
    parameter    shape   group      settings
    body/bias    (2,)    bias$      weight_decay 0.0
    body/kernel  (2, 2)  default    as given
    embedding    (5, 2)  embedding  frozen
    head/kernel  (2, 1)  head       learning_rate x 10
    >>> optimizer = groups.optimizer(adamw, learning_rate=1e-3, weight_decay=1e-2)
    >>> state = optimizer.init(params)
    """

    def __init__(self, groups: Sequence[Group], default: Group | None = None) -> None:
        self.groups = tuple(groups)
        self.default = default
        for group in self.groups:
            if not isinstance(group, Group):
                raise TypeError(
                    f"the table is made of groups, such as Group('bias$', weight_decay=0.0), got"
                    f" {group!r}."
                )
        if default is not None and default.pattern:
            raise ValueError(
                f"default= holds for whatever no pattern matches, but was given the pattern"
                f" {default.pattern!r}. Put that group into the table, or leave its pattern out."
            )
        if any(not group.pattern for group in self.groups):
            raise ValueError(
                "every group in the table needs a pattern; what holds for all other parameters is"
                " given as default=Group(...)."
            )
        patterns = [group.pattern for group in self.groups]
        twice = {p for p in patterns if patterns.count(p) > 1}
        if twice or "default" in patterns:
            wrong = ", ".join(map(repr, twice)) or "'default'"
            raise ValueError(
                f"every group needs a pattern of its own, other than 'default'; got {wrong} again."
            )

    def labels(self, params: Tree) -> Tree:
        """A tree like the parameters, with the pattern of its group, or "default", at each leaf."""
        self._check(params)
        return jax.tree_util.tree_map_with_path(lambda path, _: self._label(path), params)

    def report(self, params: Tree) -> Report:
        """Every parameter's path, shape, group and settings."""
        self._check(params)
        by_label = {group.pattern: group for group in self.groups} | {"default": self.default}
        lines = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
            label = self._label(path) or "default"
            group = by_label[label] or Group()
            lines.append(ReportLine(path_of(path), tuple(np.shape(leaf)), label, group.settings()))
        return Report(lines)

    def optimizer(
        self,
        recipe: Callable[..., optax.GradientTransformation],
        learning_rate: Hyperparameter,
        **settings: Any,
    ) -> optax.GradientTransformationExtraArgs:
        """``optax.partition`` of the recipe, once for every group with its own settings.

        Args:
          recipe: any function that takes ``learning_rate`` and the settings, and ``weight_decay``
            if a group changes that.
          learning_rate: a number or a schedule, multiplied for each group.
          **settings: whatever else the recipe takes, ``weight_decay`` included.
        """
        takes = inspect.signature(recipe).parameters
        takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in takes.values())
        takes_decay = "weight_decay" in takes or takes_any

        def of(group: Group) -> optax.GradientTransformation:
            if group.freeze is True:
                return optax.set_to_zero()
            made = group.optimizer
            if made is None:
                own = settings
                if group.weight_decay is not None:
                    if not takes_decay:
                        raise ValueError(
                            f"group {group.pattern!r} sets weight_decay, which"
                            f" {getattr(recipe, '__name__', recipe)} does not take."
                        )
                    own = settings | {"weight_decay": group.weight_decay}
                rate = learning_rate
                if group.learning_rate != 1.0:
                    rate = scaled(learning_rate, group.learning_rate)
                made = recipe(learning_rate=rate, **own)
            if group.freeze:
                step = int(group.freeze)
                later = _promoting(optax.conditionally_mask(made, _from(step)))
                made = transformation("frozen_until", {"step": step}, later, parts=(made,))
            return made

        transforms: dict[Any, Any] = {group.pattern: of(group) for group in self.groups}
        if self.default is not None:
            transforms["default"] = of(self.default)
        partition = optax.partition(transforms, self._labels)

        def init(params: Tree) -> Any:
            self._check(params)
            return partition.init(params)

        return transformation(
            "ParameterGroups",
            {"recipe": recipe, "learning_rate": learning_rate, **settings},
            optax.GradientTransformationExtraArgs(init, partition.update),
            parts=transforms.values(),
            labels=self._labels,
            keys=transforms,
        )

    def _labels(self, tree: Tree) -> Tree:
        """The labels of parameters, or of gradients, some of which may be None."""
        return jax.tree_util.tree_map_with_path(
            lambda path, _: self._label(path), tree, is_leaf=is_none
        )

    def _label(self, path: Any) -> str | None:
        name = path_of(path)
        for group in self.groups:
            if re.search(group.pattern, name):
                return group.pattern
        return None if self.default is None else "default"

    def _check(self, params: Tree) -> None:
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
        if not paths:
            return
        names = [path_of(path) for path in paths]
        orphans = [n for n, path in zip(names, paths, strict=True) if self._label(path) is None]
        if orphans:
            raise ValueError(
                f"{len(orphans)} of {len(names)} parameters match no group: {_some(orphans)}. Add a"
                " pattern for them, or declare default=Group()."
            )
        owners = {path_of(path): self._label(path) for path in paths}
        for group in self.groups:
            if group.may_be_empty or group.pattern in owners.values():
                continue
            matched = [name for name in owners if re.search(group.pattern, name)]
            if not matched:
                raise ValueError(
                    f"the pattern {group.pattern!r} matches no parameter. The paths are:"
                    f" {_some(names)}. Correct it, or say may_be_empty=True."
                )
            before = sorted({repr(owners[name]) for name in matched})
            raise ValueError(
                f"the group {group.pattern!r} gets no parameter: all it matches ({_some(matched)})"
                f" belong to {_some(before)}, which stands before it. Put it first, make the other"
                " pattern narrower ('layer_1(/|$)' is not found in layer_10), or say"
                " may_be_empty=True."
            )


def _from(begin: int) -> Any:
    return lambda step, **_: step >= begin


def _promoting(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The same, given gradients in the dtype that the updates will have, frozen or not."""
    inner = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        promoted = map_none(
            lambda u, dtype: jnp.asarray(u, dtype), updates, update_dtypes(updates, params)
        )
        return inner.update(promoted, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _some(names: list[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def decay_mask(params: Tree) -> Tree:
    """True for the parameters that weight decay is meant for: no biases, no normalisations.

    Arrays of rank 2 or more whose name is none of those in ``NOT_DECAYED``. A ``mask=`` for any
    recipe.

    >>> import jax.numpy as jnp
    >>> from adaptive_opt import adamw, decay_mask
    >>> decay_mask({"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)})
    {'bias': False, 'kernel': True}
    >>> optimizer = adamw(1e-3, weight_decay=1e-2, mask=decay_mask)
    """

    def decays(path: Any, leaf: Any) -> Any:
        if leaf is None:
            return None
        return np.ndim(leaf) >= 2 and path_of(path).split("/")[-1] not in NOT_DECAYED

    return jax.tree_util.tree_map_with_path(decays, params, is_leaf=is_none)


def layerwise_learning_rates(
    layers: Sequence[str], decay: float = 0.65, **settings: Any
) -> list[Group]:
    """Groups for the layers of a network, from input to output, with ever larger learning rates.

    The last has the learning rate itself, the one before ``decay`` times it, and so on. ELECTRA and
    BEiT use 0.65 to 0.9 for fine-tuning.

    Args:
      layers: the name of every layer, the input first; or a regular expression for it. It must
        match whole components of the path, one or more: ``layer_1`` is not found in ``layer_10``.
      decay: in (0, 1].
      **settings: of every group, see ``Group``.

    >>> from adaptive_opt import layerwise_learning_rates
    >>> for group in layerwise_learning_rates(["embed", "block_1", "block_10"], 0.5):
    ...     print(group.pattern, group.settings())
    (^|/)(embed)(/|$) learning_rate x 0.25
    (^|/)(block_1)(/|$) learning_rate x 0.5
    (^|/)(block_10)(/|$) as given
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be in (0, 1], got {decay}.")
    last = len(layers) - 1
    return [
        Group(f"(^|/)({layer})(/|$)", learning_rate=decay ** (last - i), **settings)
        for i, layer in enumerate(layers)
    ]


def gradual_unfreezing(
    layers: Sequence[str], steps: int, *, decay: float = 1 / 2.6, **settings: Any
) -> list[Group]:
    """Groups for fine-tuning: the last layer at once, one more every so many steps, ever slower.

    Discriminative rates and gradual unfreezing of ULMFiT (Howard & Ruder 2018, arXiv:1801.06146):
    each layer learns 2.6 times slower than the one above it, and starts ``steps`` steps later.

    Args:
      layers: the name of every layer, the input first, as in ``layerwise_learning_rates``.
      steps: between two unfreezings, at least 1; an epoch in ULMFiT.
      decay: of the learning rate from layer to layer, in (0, 1].
      **settings: of every group, see ``Group``.

    >>> from adaptive_opt import gradual_unfreezing
    >>> for group in gradual_unfreezing(["embed", "body", "head"], steps=100):
    ...     print(group.pattern, group.settings())
    (^|/)(embed)(/|$) learning_rate x 0.1479, frozen until step 200
    (^|/)(body)(/|$) learning_rate x 0.3846, frozen until step 100
    (^|/)(head)(/|$) as given
    """
    check_whole(1, steps=steps)
    last = len(layers) - 1
    return [
        dataclasses.replace(group, freeze=int((last - i) * steps))
        for i, group in enumerate(layerwise_learning_rates(layers, decay, **settings))
    ]
