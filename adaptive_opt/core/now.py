"""What all the leaves of a step have in common, and how lines remember.

The count, the values of schedules and the corrections of averages are calculated once a step, here,
and not once a leaf.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from adaptive_opt.core import checks, trees
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.memory import PARAM, Memory


class WrongOrder(ValueError):  # noqa: N818 (says what it is)
    """Stages in an order that makes no sense; the message says where the stage belongs."""


class Correction(NamedTuple):
    """Of how many steps ahead, and whether in optax's arithmetic, which rounds ``b`` first.

    Less than 0 ahead: the average has not seen the first gradients.
    ``1 - b^t`` with ``b`` in float32 is off by 7e-6 at 0.999 and of no use at 0.99999999; as
    ``-expm1(t log b)`` it is right to rounding.
    """

    ahead: int = 0
    as_in_optax: bool = False


class Now:
    """What is the same for all leaves: the count, the extra arguments, the stages so far."""

    def __init__(
        self,
        count: jax.Array,
        extra: Mapping[str, Any] | None = None,
        *,
        looking: bool = False,
        lenient: bool = False,
    ) -> None:
        self.count, self.extra = count, dict(extra or {})
        self.looking, self.lenient = looking, lenient
        self.names: dict[int, str] = {}
        """What messages call a schedule, by identity."""
        self.begin(None, "", {})
        self.keepers: dict[str, object] = {}
        """Whose turn it was when the buffer of a name was first recalled."""
        self.averages: dict[int, tuple[Any, Hyperparameter]] = {}
        """The averages that owe, by identity: the value, its decay."""
        self.kept: dict[int, Any] = {}
        """What was kept, by identity: the value, its spec."""
        self.limits: dict[object, str] = {}
        """The stages that limit something, by their turn."""
        self.scalars: dict[tuple[int, Correction | None], tuple[Hyperparameter, Any]] = {}
        """What was calculated once for all leaves, by whose it is (kept, so that its id stays its
        own): the values of hyperparameters, and the corrections of averages."""

    def begin(self, turn: object, stage: str, settings: Mapping[str, Any]) -> None:
        self.turn, self.stage, self.settings, self.paying = turn, stage, settings, ""
        self.clash: WrongOrder | None = None

    def copy(self) -> Now:
        """The same for somebody else to change."""
        new = Now(self.count, self.extra, looking=self.looking, lenient=self.lenient)
        new.keepers, new.limits = dict(self.keepers), dict(self.limits)
        new.averages = dict(self.averages)
        return new

    @functools.cached_property
    def some_scalar(self) -> jax.Array:
        """What stands for scalars in a look."""
        return jnp.ones((), float)

    def at(self, hyperparameter: Hyperparameter) -> Any:
        """The value of a hyperparameter; a schedule is asked once a step, for ``count - 1``."""
        if not callable(hyperparameter):
            return checks.value_at(hyperparameter, self.count)
        key = id(hyperparameter), None
        if key not in self.scalars:
            # A user's function need not bear a look.
            name = self.names.setdefault(id(hyperparameter), self.name_of(hyperparameter))
            if self.looking:
                value = self.some_scalar
            else:
                value = checks.value_at(hyperparameter, self.count, name)
            self.scalars[key] = hyperparameter, value
        return self.scalars[key][1]

    def name_of(self, hyperparameter: Hyperparameter) -> str:
        """The argument of the stage whose turn it is, for messages."""
        names = (name for name, held in self.settings.items() if held is hyperparameter)
        return f"{next(names, 'an argument')} of {self.stage}"

    def refuse_one(self, decay: Hyperparameter, width: Any, why: str) -> None:
        """An error for a decay that rounding makes 1."""
        if is_one_in(decay, width):
            raise ValueError(
                f"{self.name_of(decay)} is {decay!r}, which is 1 in {np.dtype(width)}: {why}. Take"
                f" at most {1 - float(jnp.finfo(width).epsneg)!r}, or float64."
            )

    def correction(self, decay: Hyperparameter, which: Correction) -> Any:
        """``1 - decay^t``, which an average with this decay owes for its start at zero."""
        if which.as_in_optax:
            self.refuse_one(decay, trees.dtype_of(1.0), "in optax's arithmetic 1 - b^t is 0 then")
        key = id(decay), which
        if key not in self.scalars:
            value = self.some_scalar if self.looking else self._correction(decay, which)
            self.scalars[key] = decay, value
        return self.scalars[key][1]

    def _correction(self, decay: Hyperparameter, which: Correction) -> Any:
        count, b = self.count, self.at(decay)
        for _ in range(which.ahead):
            count = optax.safe_increment(count)
        if which.ahead < 0:
            count = jnp.maximum(count + which.ahead, 1)
        with jax.numpy_dtype_promotion("standard"):
            t = jnp.asarray(count, float)
            return 1 - b**t if which.as_in_optax else one_minus_power(b, t)

    def calculate(
        self, asked: Iterable[tuple[tuple[int, Correction | None], Hyperparameter, str | None]]
    ) -> None:
        """The scalars that somebody else has asked for."""
        for (_, which), hyperparameter, name in asked:
            if name is not None:
                self.names[id(hyperparameter)] = name
            if which is None:
                self.at(hyperparameter)
            else:
                self.correction(hyperparameter, which)


def averaged(b: Any, old: jax.Array, x: Any) -> jax.Array:
    """``b old + (1 - b) x``, of which only ``1 - b`` is rounded.

    0.999 is 1.3e-8 more in float32: an average with it is 1.3e-5 too large.
    """
    held = b if isinstance(b, jax.Array) else complex(np.asarray(b, old.dtype)).real
    if isinstance(b, jax.Array) or abs(b - held) <= 1e-6 * (1 - b):
        return averaged_in_optax(b, old, x)
    # An infinite square stays infinite.
    finite = jnp.minimum(old, jnp.finfo(old.dtype).max) if jnp.isrealobj(old) else old
    return old + (trees.times(x, by=1 - b) - trees.times(finite, by=1 - b))


def averaged_in_optax(b: Any, old: jax.Array, x: Any) -> jax.Array:
    """``b old + (1 - b) x``, both weights as the width of the arrays rounds them."""
    return trees.times(x, by=1 - b) + trees.times(old, by=b)


def one_minus_power(b: Any, t: jax.Array) -> jax.Array:
    """``1 - b^t`` to rounding, for a decay ``b``; the logarithm of a Python number in double."""
    if isinstance(b, jax.Array):
        log = jnp.log1p(b - 1)  # the difference is exact for b of at least 1/2
    elif b <= 0:
        return jnp.ones_like(t)
    else:
        log = math.log(b)
    x = t * log
    if t.dtype == np.float64:
        return -jnp.expm1(x)
    # XLA's expm1 is 3e-7 off in float32. Taylor's series for x > -1, with the last rounding last.
    near, series = jnp.maximum(x, -1.0), 0.0
    for n in range(12, 1, -1):
        series = near * (series + 1 / math.factorial(n))
    return jnp.where(x > -1, -(near + near * series), 1 - jnp.exp(x))


def is_one_in(decay: Any, width: Any) -> bool:
    """Whether a decay, as a Python number less than 1, is 1 in the width of the arrays."""
    decay = decay.item() if isinstance(decay, (np.generic, np.ndarray)) else decay
    return isinstance(decay, float) and np.asarray(decay, width) == 1


class Remembering:
    """The verbs that a step of one array and the step of the whole tree share."""

    now: Now
    memory: Memory
    width: Any

    @property
    def count(self) -> jax.Array:
        """The number of gradients seen, this one included (t = 1, 2, ...); an int32 scalar."""
        return self.now.count

    def at(self, value: Hyperparameter) -> Any:
        """The value of a hyperparameter at this step, or a scalar, in the width of the arrays.

        A Python number stays one, so that ``1 - b`` is rounded once. A schedule sees ``count - 1``,
        as in optax.
        """
        return trees.scalar_at(self.now.at(value), self.width)

    def decay_at(self, decay: Hyperparameter) -> Any:
        """The value of a decay that something is multiplied by as it is; 1 would be no decay."""
        self.now.refuse_one(decay, self.width, "nothing would ever decay")
        return self.at(decay)

    def extra(self, name: str) -> Any:
        """What ``update`` was given under this name (``value=loss``); an error if it was not."""
        if self.now.looking:
            return jnp.zeros((), self.width)
        if name not in self.now.extra:
            raise ValueError(
                f"{self.now.stage} needs {name}: call update(gradients, state, params, {name}=...)."
            )
        return self.now.extra[name]

    def recall(
        self, name: str, like: Any, *, initial: Any = 0.0, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """What was kept under this name at the step before.

        Args:
          name: of the buffer, in the state.
          like: a value of its shape.
          initial: what it holds before the first step: a number, or ``step.param``.
          dtype: the buffer's, for whoever asked for one.
        """
        now = self.now
        if self.memory.stored is not None and name not in self.memory.stored:
            raise ValueError(
                f"{now.stage}: the state should hold the buffers {name}, but holds"
                f" {', '.join(sorted(self.memory.stored)) or 'none'}. A state belongs to the"
                " optimizer that initialised it."
            )
        if now.keepers.setdefault(name, now.turn) is not now.turn:
            now.clash = WrongOrder(
                f"two stages keep a buffer called {name!r}. Give one of them another:"
                f" {now.stage}(..., name={name + '_2'!r}); scale_by_adam(...), which has fixed"
                " names, can be replaced by the stages it is made of."
            )
        start = PARAM if self.is_param(initial) else initial
        return self.memory.recall(name, like, start, dtype, self.width)

    def keep(self, name: str, value: jax.Array) -> jax.Array:
        """Keep a value for the next step under a name that was recalled."""
        self.memory.keep(name, value)
        self.now.kept[id(value)] = value, self.memory.specs.get(name)
        return value

    def remember(
        self,
        name: str,
        function: Callable[[jax.Array, Any], jax.Array],
        value: Any,
        *,
        initial: Any = 0.0,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """``function(what was kept, value)``, which is kept in turn.

        ``initial`` is a number, the parameter, or a function of the first value, whose result
        stands for the first step's.
        """
        start: Any = 0.0 if callable(initial) else initial
        new = function(self.recall(name, value, initial=start, dtype=dtype), value)
        if callable(initial):
            first: Any = initial(value)
            new = jnp.where(self.count == 1, first, new)
        self.memory.note_kind(name, self.kind_of(value))
        return self.keep(name, new)

    def average(
        self,
        name: str,
        value: Any,
        decay: Hyperparameter,
        *,
        initial: Any = 0.0,
        dtype: DTypeLike | None = None,
        as_in_optax: bool = False,
    ) -> jax.Array:
        """The moving average ``decay kept + (1 - decay) value``, which is kept in turn.

        One that starts at zero owes the correction for it, until somebody makes it.
        """
        b, rule = self.at(decay), averaged_in_optax if as_in_optax else averaged
        new = self.remember(name, functools.partial(rule, b), value, initial=initial, dtype=dtype)
        return self.owing(new, decay) if checks.is_zero(initial) else new

    def owing(self, value: jax.Array, decay: Hyperparameter) -> jax.Array:
        """A value that owes, like an average with this decay, the correction for its start."""
        self.now.averages[id(value)] = value, decay
        return value

    def kind_of(self, value: Any) -> str | None:
        return None

    def is_param(self, value: Any) -> bool:
        return False
