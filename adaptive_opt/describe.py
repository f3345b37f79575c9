"""What an optimizer is made of, as data: names and settings, down to the stages."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import jax
import numpy as np
import optax
from jax.core import Tracer

P = ParamSpec("P")
Tx = TypeVar("Tx", bound=optax.GradientTransformation)

# The attribute of an update function that holds its (name, settings, parts). It is the update
# function that is described because that is all that optax.chain keeps of what it is given.
_ATTRIBUTE = "_adaptive_opt_description"


class Description(NamedTuple):
    """A transformation's name, its settings, and the transformations it is made of.

    ``labels`` is the mask of an ``optax.masked``, or the labels of an ``optax.partition``; it is
    no setting, is not printed, and not in checkpoints.
    """

    name: str
    settings: Mapping[str, Any]
    parts: tuple[Description, ...] = ()
    labels: Any = None

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
        lines = [f"{self.name}({', '.join(settings)})" if settings else self.name]
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
      amsgrad(learning_rate=0.001, b1=0.9, b2=0.9, eps=1e-08, convention='torch')
        adaptive
          first_moment(b1=0.9)
          second_moment(b2=0.9)
          amsgrad_max
          debias(b1=0.9, b2=0.9)
          per_weight_rate(eps=1e-08, eps_root=0.0)
        scale_by_learning_rate(learning_rate=0.001, flip_sign=True)
    """
    if not isinstance(transformation, optax.GradientTransformation):
        if isinstance(transformation, optax.MultiSteps):
            raise TypeError(
                "an optax.MultiSteps is not a transformation itself: give its"
                " .gradient_transformation()."
            )
        raise TypeError(
            "describe takes an optax transformation, for instance adamod(1e-3) or adaptive(...),"
            f" got {type(transformation).__name__}."
        )
    update = inspect.unwrap(transformation.update)  # of a jit
    if hasattr(update, _ATTRIBUTE):
        name, settings, parts = getattr(update, _ATTRIBUTE)
        return Description(name, dict(settings), _inner(transformation) if parts is None else parts)
    held = _held(update)
    name = getattr(update, "__qualname__", type(update).__name__).split(".<locals>")[0]
    if name == "with_extra_args_support":
        return describe(held["tx"])
    numbers = {k: v for k, v in held.items() if isinstance(v, (bool, int, float, str))}
    labels = held.get("mask", held.get("param_labels"))
    return Description(name.removesuffix(".update"), numbers, _inner(transformation), labels)


def describe_as(
    transformation: Tx,
    name: str,
    settings: Mapping[str, Any],
    parts: Iterable[optax.GradientTransformation] | None = None,
) -> Tx:
    """Give a transformation its name and settings.

    Without ``parts`` they are read off the transformation: those of its chain or, if it has a
    description already, what that describes.
    """
    if parts is None and hasattr(transformation.update, _ATTRIBUTE):
        described = (describe(transformation),)
    else:
        described = None if parts is None else tuple(describe(part) for part in parts)
    setattr(transformation.update, _ATTRIBUTE, (name, dict(settings), described))
    return transformation


def described(factory: Callable[P, Tx]) -> Callable[P, Tx]:
    """Name what a function returns after the function and the arguments it was given."""
    return _named_after(factory, parts=())


def recipe(factory: Callable[P, Tx]) -> Callable[P, Tx]:
    """The same for a function that puts an optimizer together: its parts are described too."""
    return _named_after(factory, parts=None)


def described_around(factory: Callable[P, Tx]) -> Callable[P, Tx]:
    """The same for a function that wraps its first argument, which is described as its part."""
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Tx:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        (_, inner), *settings = given.arguments.items()
        wrapper = factory(*args, **kwargs)
        return describe_as(wrapper, factory.__name__, dict(settings), parts=(inner,))

    return make


def _named_after(factory: Callable[P, Tx], parts: tuple[()] | None) -> Callable[P, Tx]:
    signature = inspect.signature(factory)

    @functools.wraps(factory)
    def make(*args: P.args, **kwargs: P.kwargs) -> Tx:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        settings = {k: v for k, v in given.arguments.items() if k != "observers"}  # they are parts
        return describe_as(factory(*args, **kwargs), factory.__name__, settings, parts)

    return make


def _inner(transformation: optax.GradientTransformation) -> tuple[Description, ...]:
    """What a transformation holds on to that is a transformation itself."""
    held = {**_held(transformation.init), **_held(inspect.unwrap(transformation.update))}
    if "update_fns" in held:  # optax.chain
        updates = held["update_fns"]  # with an init of its own, if somebody has replaced that
        inits = held.get("init_fns", (None,) * len(updates))
        pairs = zip(inits, updates, strict=True)
        return tuple(describe(optax.GradientTransformation(*pair)) for pair in pairs)
    if "inner_factory" in held:  # optax.inject_hyperparams
        schedules = {k: getattr(v, "schedule_fn", v) for k, v in held["sched_hps"].items()}
        arguments = held["other_hps"] | held["numeric_hps"] | schedules
        return (describe(held["inner_factory"](**arguments)),)
    leaves = jax.tree.leaves(
        list(held.values()), is_leaf=lambda x: isinstance(x, optax.GradientTransformation)
    )
    return tuple(describe(x) for x in leaves if isinstance(x, optax.GradientTransformation))


def _held(function: Callable[..., Any]) -> Mapping[str, Any]:
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
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__).split(".<locals>")[0]
    return repr(value)
