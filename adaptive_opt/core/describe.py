"""What an optimizer is made of, as data: names and settings, down to the stages.

Every transformation of this library is a :class:`Transformation`, an object that knows its name,
its settings and its parts. The pair of functions that optax wants closes over it, so that it is
found again inside of ``optax.chain`` and whatever else keeps only functions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
import optax
from jax.core import Tracer

from adaptive_opt.core.checks import check_optimizer, nearest

P = ParamSpec("P")
Optimizer = optax.GradientTransformationExtraArgs
Tx = TypeVar("Tx", bound=optax.GradientTransformation)


@jax.tree_util.register_pytree_node_class
class Transformation:
    """A transformation that knows what it is; what ``init`` and ``update`` of it close over.

    A registered pytree with every array in sight: who takes an optimizer's functions apart
    (Equinox's ``closure_to_pytree``) finds the learning rate that is an array.

    Attributes:
      name: of the function that made it.
      settings: the arguments of that function, by name.
      plain: the pair of functions that does the work.
      parts: the transformations it is made of; None: those that ``plain`` holds.
      lines: of a stage.
      labels: the labels of parameters, of a partition; no setting.
      keys: the labels of the parts, of a partition.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any],
        plain: optax.GradientTransformation,
        parts: Iterable[optax.GradientTransformation] | None = None,
        lines: tuple[Any, ...] = (),
        labels: Any = None,
        keys: Iterable[str] | None = None,
    ) -> None:
        self.name, self.settings = name, dict(settings)
        self.plain: Any = plain
        self.parts = None if parts is None else tuple(parts)
        self.lines, self.labels = lines, labels
        self.keys = None if keys is None else tuple(keys)

    def tree_flatten(self) -> Any:
        children = (self.settings, self.plain, self.parts, self.lines, self.labels)
        return children, (self.name, self.keys)

    @classmethod
    def tree_unflatten(cls, known: Any, children: Any) -> Transformation:
        name, keys = known
        settings, plain, parts, lines, labels = children
        return cls(name, settings, plain, parts, lines, labels, keys)

    def init(self, params: Any) -> Any:
        return self.plain.init(params)

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return self.plain.update(updates, state, params, **extra)


def closing_over(self: Any) -> Optimizer:
    """``init`` and ``update`` of an object as functions, which is all that many look into."""

    def init(params: Any) -> Any:
        return self.init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        return self.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def transformation(
    name: str,
    settings: Mapping[str, Any],
    plain: optax.GradientTransformation,
    parts: Iterable[optax.GradientTransformation] | None = None,
    lines: tuple[Any, ...] = (),
    labels: Any = None,
    keys: Iterable[str] | None = None,
) -> Optimizer:
    """``plain`` as a transformation that knows its name, settings and parts."""
    plain = optax.with_extra_args_support(plain)
    return closing_over(Transformation(name, settings, plain, parts, lines, labels, keys))


def made_of(given: Any) -> Transformation | None:
    """What a transformation of this library is made of; None for anything else."""
    update = inspect.unwrap(getattr(given, "update", given))  # of a jit
    own = held_by(update).get("self") if inspect.isfunction(update) else None
    return own if isinstance(own, Transformation) else None


_NOT_SHOWN = ("observers", "mesh")
"""What is a part, or no property of the optimizer but of the machine."""


class Description(NamedTuple):
    """A transformation's name, its settings, and the transformations it is made of.

    ``labels`` is the mask of an ``optax.masked``, or the labels of an ``optax.partition``; it is
    no setting, is not printed, and not in checkpoints. ``key`` is the label under which a part
    stands in ``ParameterGroups``, ``optax.partition`` or ``optax.named_chain``.
    """

    name: str
    settings: Mapping[str, Any]
    parts: tuple[Description, ...] = ()
    labels: Any = None
    key: str | None = None

    def stages(self) -> tuple[Description, ...]:
        """The innermost parts, in the order in which they act."""
        if not self.parts:
            return (self,)
        return tuple(stage for part in self.parts for stage in part.stages())

    def walk(self) -> Iterator[Description]:
        """It and all its parts, those of the parts included."""
        yield self
        for part in self.parts:
            yield from part.walk()

    def __str__(self) -> str:
        settings = [f"{k}={shown(v)}" for k, v in self.settings.items() if v is not None]
        name = self.name if self.key is None else f"{self.key}: {self.name}"
        lines = [f"{name}({', '.join(settings)})" if settings else name]
        for part in self.parts:
            lines += ["  " + line for line in str(part).splitlines()]
        return "\n".join(lines)


def describe(transformation: optax.GradientTransformation) -> Description:
    """The stages of a recipe, a bracket, or a chain that contains them, with their settings.

    What the description holds is data (``name``, ``settings``, ``parts``, and ``stages()`` for the
    flat list); printed, it is an indented list. Transformations of optax appear under the name of
    the function that made them, with those of their numbers that can be seen from outside.

    >>> import optax
    >>> from adaptive_opt import amsgrad, describe
    >>> print(describe(optax.chain(optax.clip_by_global_norm(1.0), amsgrad(1e-3, b2=0.9))))
    chain
      clip_by_global_norm(max_norm=1.0)
      amsgrad(learning_rate=0.001, b1=0.9, b2=0.9, eps=1e-08, decay='l2', convention='torch')
        adaptive
          first_moment(b1=0.9)
          second_moment(b2=0.9)
          amsgrad_max
          debias(b1=0.9, b2=0.9)
          per_weight_rate(eps=1e-08, eps_root=0.0)
        scale_by_learning_rate(learning_rate=0.001, flip_sign=True)
    """
    check_optimizer("describe", transformation)
    own = made_of(transformation)
    if own is not None:
        parts = _inner(own.plain) if own.parts is None else tuple(map(describe, own.parts))
        if own.keys is not None:
            parts = tuple(p._replace(key=k) for k, p in zip(own.keys, parts, strict=True))
        settings = {k: v for k, v in own.settings.items() if k not in _NOT_SHOWN}
        return Description(own.name, settings, parts, own.labels)
    update = inspect.unwrap(transformation.update)
    held = held_by(update)
    name = getattr(update, "__qualname__", type(update).__name__).split(".<locals>")[0]
    if name == "with_extra_args_support":
        return describe(held["tx"])
    numbers = {k: v for k, v in held.items() if isinstance(v, (bool, int, float, str))}
    if name.startswith("MultiSteps"):
        every = held["_every_k_schedule"]
        numbers = {"every_k_schedule": held_by(every).get("every_k_schedule", every)}
        skips = held["_should_skip_update_fn"]
        if not getattr(skips, "__qualname__", "").startswith("MultiSteps.__init__"):  # the default
            numbers["should_skip_update_fn"] = skips
    labels = held.get("mask", held.get("param_labels"))
    return Description(name.removesuffix(".update"), numbers, _inner(transformation), labels)


def described(factory: Callable[P, Tx]) -> Callable[P, Optimizer]:
    """Name what a function returns after the function and the arguments it was given."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
        settings = bound(signature, factory.__name__, args, kwargs)
        return transformation(factory.__name__, settings, factory(*args, **kwargs), parts=())

    return make


def described_around(factory: Callable[P, Tx]) -> Callable[P, Optimizer]:
    """The same for a function that wraps its first argument, which is described as its part."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Optimizer:
        (_, inner), *settings = bound(signature, factory.__name__, args, kwargs).items()
        check_optimizer(factory.__name__, inner)
        check_order(inner)
        wrapper = factory(*args, **kwargs)
        return transformation(factory.__name__, dict(settings), wrapper, parts=(inner,))

    return make


_GUARDS = ("skip_nonfinite", "apply_if_finite", "zero_nans")


def check_order(transformation: optax.GradientTransformation) -> None:
    """No guard against NaN stands inside of an ``optax.MultiSteps``, where it comes too late.

    The mean of the gradients is NaN then, and stays so: ``MultiSteps`` empties it by a product with
    zero. It has its own guard, ``should_skip_update_fn``.
    """
    for part in describe(transformation).walk():
        if part.name != "MultiSteps" or "should_skip_update_fn" in part.settings:
            continue
        inside = [guard.name for guard in part.walk() if guard.name in _GUARDS]
        if inside:
            raise ValueError(
                f"{inside[0]} stands inside of optax.MultiSteps, whose mean of gradients one NaN"
                " spoils for ever: it would never train again. Turn them around,"
                f" {inside[0]}(optax.MultiSteps(...).gradient_transformation()), or say"
                " optax.MultiSteps(..., should_skip_update_fn=optax.skip_not_finite)."
            )


def bound(
    signature: inspect.Signature, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by name, defaults included; an error names what is allowed."""
    takes = signature.parameters
    unknown = [key for key in kwargs if key not in takes]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        near = nearest(unknown[0], takes)
        hint = f" Did you mean {near}?" if near else ""
        raise TypeError(
            f"{name} takes no argument {unknown[0]!r}.{hint} It takes {', '.join(takes)}."
        )
    try:
        given = signature.bind(*args, **kwargs)
    except TypeError as error:
        named = [key for key, p in takes.items() if p.kind is p.KEYWORD_ONLY]
        by_name = f"; by name only {', '.join(named)}" if named else ""
        takes = ", ".join(key for key in takes if key not in named)
        raise TypeError(f"{name}: {error}; it takes {takes}{by_name}.") from None
    given.apply_defaults()
    return given.arguments


def _inner(transformation: optax.GradientTransformation) -> tuple[Description, ...]:
    """What a transformation holds on to that is a transformation itself."""
    return tuple(
        describe(part) if key is None else describe(part)._replace(key=key)
        for key, part in held_in(transformation)
    )


def held_in(
    transformation: optax.GradientTransformation,
) -> list[tuple[str | None, optax.GradientTransformation]]:
    """The transformations that one closes over, in order, with the labels it has for them."""
    update = inspect.unwrap(transformation.update)
    held = {**held_by(transformation.init), **held_by(update)}
    if getattr(update, "__qualname__", "").startswith("with_extra_args_support."):
        return [(None, held["tx"])]  # beside whose init what it holds would be found twice
    if "update_fns" in held:  # optax.chain
        updates = held["update_fns"]  # with an init of its own, if somebody has replaced that
        inits = held.get("init_fns", (None,) * len(updates))
        pairs = zip(inits, updates, strict=True)
        return [(None, optax.GradientTransformation(*pair)) for pair in pairs]
    if "transforms" in held:  # optax.partition, optax.named_chain
        return [(str(key), part) for key, part in dict(held["transforms"]).items()]
    if "inner_factory" in held:  # optax.inject_hyperparams
        schedules = {k: getattr(v, "schedule_fn", v) for k, v in held["sched_hps"].items()}
        arguments = held["other_hps"] | held["numeric_hps"] | schedules
        return [(None, held["inner_factory"](**arguments))]
    leaves = jax.tree.leaves(
        list(held.values()), is_leaf=lambda x: isinstance(x, optax.GradientTransformation)
    )
    return [(None, x) for x in leaves if isinstance(x, optax.GradientTransformation)]


def held_by(function: Callable[..., Any]) -> Mapping[str, Any]:
    """The variables that a function, or the object it is a method of, holds on to."""
    if inspect.ismethod(function):
        return vars(function.__self__)
    return inspect.getclosurevars(function).nonlocals if inspect.isfunction(function) else {}


def shown(value: Any) -> str:
    """A setting as it is printed; a function by the name of what made it."""
    if isinstance(value, Tracer):
        return f"traced {value.dtype}"
    if isinstance(value, (jax.Array, np.ndarray)) and value.ndim:
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return repr(value.item())
    if inspect.isclass(value):
        return value.__name__
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, functools.partial):
        settings = [
            *map(shown, value.args),
            *(f"{k}={shown(v)}" for k, v in value.keywords.items()),
        ]
        return f"{shown(value.func)}({', '.join(settings)})"
    if callable(value):
        value = inspect.unwrap(value)
        return getattr(value, "__qualname__", type(value).__name__).split(".<locals>")[0]
    return repr(value)
