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
from jax.core import Tracer

from adaptive_opt.core.checks import (
    Hyperparameter,
    check_constant,
    check_nonnegative,
    check_optimizer,
    is_fixed,
    is_number,
    scaled,
    some,
)
from adaptive_opt.core.containers import map_named, named_leaves, trained
from adaptive_opt.core.describe import shown, transformation
from adaptive_opt.core.trees import Tree, map_none, update_dtypes
from adaptive_opt.wrappers.decay import as_table


@dataclasses.dataclass(frozen=True)
class Group:
    """One line of the table: the parameters whose path matches, and what is different about them.

    Attributes:
      pattern: a regular expression, searched for anywhere in the path; ``$`` is its end. Note that
        ``layer_1`` is found in ``layer_10`` too: write ``layer_1(/|$)``.
      learning_rate: a multiplier of the learning rate, at least 0; a number or a scalar array,
        traced perhaps.
      weight_decay: in place of the common one.
      freeze: True: no update and no state. A whole number: frozen until that step; the group's own
        count, and with it its schedules and bias corrections, starts then.
      optimizer: an optimizer of its own, in place of everything else.
      may_be_empty: whether it is fine that no parameter belongs to it.
    """

    pattern: str = ""
    learning_rate: float | jax.Array = 1.0
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
        if alone and (self.has_rate or self.weight_decay is not None):
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

    @property
    def has_rate(self) -> bool:
        """Whether the multiplier is not the number 1."""
        return not is_fixed(self.learning_rate) or bool(self.learning_rate != 1.0)

    def settings(self) -> str:
        """What is different about the group, in words."""
        if self.freeze is True:
            return "frozen"
        said = []
        if self.optimizer is not None:
            said.append("its own optimizer")
        if self.has_rate:
            rate = self.learning_rate
            said.append(f"learning_rate x {f'{rate:.4g}' if is_number(rate) else shown(rate)}")
        if self.weight_decay is not None:
            said.append(f"weight_decay {shown(self.weight_decay)}")
        if self.freeze:
            said.append(f"frozen until step {self.freeze}")
        return ", ".join(said) or "as given"


class ReportLine(NamedTuple):
    """One parameter in the report."""

    path: str
    shape: tuple[int, ...]
    group: str
    settings: str
    also: tuple[str, ...] = ()
    """The groups that stand after it, and whose patterns match too: they have no say."""


class Report(tuple[ReportLine, ...]):
    """Every parameter with its group; prints as a table."""

    def __str__(self) -> str:
        rows = [("parameter", "shape", "group", "settings")]
        for r in self:
            also = f" (not {', not '.join(r.also)})" if r.also else ""
            rows.append((r.path, str(r.shape), r.group, r.settings + also))
        return as_table(rows)


class TrainedState(NamedTuple):
    """The number of steps, and the state of what sees the gradients that are trained."""

    count: jax.Array
    inner_state: Any


class ParameterGroups:
    """An ordered table of groups; every parameter belongs to the first whose pattern it matches.

    It has the settings of that one only: groups that stand after it and match too have no say, and
    nothing is put together from two. ``report`` shows for every parameter which those are. For a
    bias of the head that learns ten times as fast *and* does not decay, put a group of both in
    front.

    Clipping in front of the optimizer sees all gradients, those of frozen parameters too, which
    count in a global norm. ``groups.trained(optax.clip_by_global_norm(1.0))`` sees the others only.

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
    ...         Group("head/bias$", learning_rate=10.0, weight_decay=0.0),
    ...         Group("head", learning_rate=10.0),
    ...         Group("bias$", weight_decay=0.0),
    ...     ],
    ...     default=Group(),
    ... )
    >>> params = {
    ...     "embedding": jnp.ones((5, 2)),
    ...     "body": {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)},
    ...     "head": {"kernel": jnp.ones((2, 1)), "bias": jnp.zeros(1)},
    ... }
    >>> print(groups.report(params))
    parameter    shape   group       settings
    body/bias    (2,)    bias$       weight_decay 0.0
    body/kernel  (2, 2)  default     as given
    embedding    (5, 2)  embedding   frozen
    head/bias    (1,)    head/bias$  learning_rate x 10, weight_decay 0.0 (not head, not bias$)
    head/kernel  (2, 1)  head        learning_rate x 10
    >>> optimizer = optax.chain(
    ...     groups.trained(optax.clip_by_global_norm(1.0)),
    ...     groups.optimizer(adamw, learning_rate=1e-3, weight_decay=1e-2),
    ... )
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
        """A tree like the parameters, with the pattern of its group, or "default", at each leaf.

        Of a module, a tree like its trained parameters.
        """
        params = trained(params)
        self._check(params)
        return map_named(lambda name, leaf: None if leaf is None else self._label(name), params)

    def report(self, params: Tree) -> Report:
        """Every parameter's path, shape, group and settings; of a module, of what is trained."""
        params = trained(params)
        self._check(params)
        lines = []
        for name, leaf in named_leaves(params):
            group, *others = self._matching(name) or [self.default or Group()]
            also = tuple(other.pattern for other in others)
            shape, label = tuple(np.shape(leaf)), group.pattern or "default"
            lines.append(ReportLine(name, shape, label, group.settings(), also))
        return Report(lines)

    def trained(self, inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
        """``inner``, for the gradients of parameters that are trained; before the optimizer.

        Gradients of frozen groups do not reach it. Those of a group that is frozen until a step are
        zeros for it until then, which adds nothing to a norm.

        Args:
          inner: usually one that clips.
        """
        check_optimizer("ParameterGroups.trained", inner)
        masked = optax.with_extra_args_support(optax.masked(inner, self._trained))
        starts = {
            group.pattern or "default": int(group.freeze)
            for group in (*self.groups, self.default or Group())
            if group.freeze and group.freeze is not True
        }

        def init(params: Tree) -> TrainedState:
            return TrainedState(jnp.zeros([], jnp.int32), masked.init(params))

        def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            def silenced(name: str, g: Any) -> Any:
                start = starts.get(self._label(name) or "default")
                if g is None or start is None or not hasattr(g, "dtype"):
                    return g
                return jnp.where(state.count < start, jnp.zeros_like(g), g)

            if starts:
                updates = map_named(silenced, updates)
            updates, inner_state = masked.update(updates, state.inner_state, params, **extra)
            count = jnp.asarray(optax.safe_increment(state.count))
            return updates, TrainedState(count, inner_state)

        plain = optax.GradientTransformationExtraArgs(init, update)
        name = "ParameterGroups.trained"
        return transformation(name, {}, plain, parts=(inner,), labels=self._trained)

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
                if group.has_rate:
                    rate = scaled(learning_rate, group.learning_rate)
                made = recipe(learning_rate=rate, **own)
            if group.freeze:
                step = int(group.freeze)
                later = _frozen_until(step, made)
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
        return map_named(lambda name, _: self._label(name), tree)

    def _trained(self, tree: Tree) -> Tree:
        """Whether a parameter, or its gradient, is in a group that is not frozen for ever."""

        def is_trained(name: str, leaf: Any) -> bool | None:
            group = next(iter(self._matching(name)), self.default or Group())
            return None if leaf is None else group.freeze is not True

        return map_named(is_trained, tree)

    def _matching(self, name: str) -> list[Group]:
        return [group for group in self.groups if re.search(group.pattern, name)]

    def _label(self, name: str) -> str | None:
        for group in self._matching(name):
            return group.pattern
        return None if self.default is None else "default"

    def _check(self, params: Tree) -> None:
        names = [name for name, _ in named_leaves(params)]
        if not names:
            return
        owners = {name: self._label(name) for name in names}
        orphans = [name for name in names if owners[name] is None]
        if orphans:
            raise ValueError(
                f"{len(orphans)} of {len(names)} parameters match no group: {some(orphans)}. Add a"
                " pattern for them, or declare default=Group()."
            )
        for group in self.groups:
            if group.may_be_empty or group.pattern in owners.values():
                continue
            matched = [name for name in owners if re.search(group.pattern, name)]
            if not matched:
                raise ValueError(
                    f"the pattern {group.pattern!r} matches no parameter. The paths are:"
                    f" {some(names)}. Correct it, or say may_be_empty=True."
                )
            before = sorted({repr(owners[name]) for name in matched})
            raise ValueError(
                f"the group {group.pattern!r} gets no parameter: all it matches ({some(matched)})"
                f" belong to {some(before)}, which stands before it. Put it first, make the other"
                " pattern narrower ('layer_1(/|$)' is not found in layer_10), or say"
                " may_be_empty=True."
            )


def _frozen_until(begin: int, inner: optax.GradientTransformation) -> Any:
    """``optax.conditionally_mask``, given gradients in the dtype that the updates will have.

    Where the step is known, it is not left to ``lax.cond``, which compiles anew at every step.
    """
    inner = optax.with_extra_args_support(inner)
    masked = optax.conditionally_mask(inner, lambda step, **_: jnp.asarray(step) >= begin)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        updates = map_none(
            lambda u, dtype: jnp.asarray(u, dtype), updates, update_dtypes(updates, params)
        )
        if isinstance(state.step, Tracer):
            return masked.update(updates, state, params, **extra)
        inner_state = state.inner_state
        if state.step < begin:
            updates = jax.tree.map(jnp.zeros_like, updates)
        else:
            updates, inner_state = inner.update(updates, inner_state, params, **extra)
        return updates, type(state)(inner_state=inner_state, step=optax.safe_increment(state.step))

    return optax.GradientTransformationExtraArgs(masked.init, update)
