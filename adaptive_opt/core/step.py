"""The open step of one array: what flows between the stages of an optimizer, and what it knows.

The papers tell one story: average the gradient, average its square, derive from that a learning
rate for every single weight, multiply. They differ in one line each. Here the quantities that the
lines speak of travel together, for one array at a time, and a line reads some of them and sets
others. The step remembers who made a quantity and what has become of it since, and so it refuses
an order of lines that makes no sense.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from adaptive_opt.core import checks, finite, trees
from adaptive_opt.core.checks import Hyperparameter
from adaptive_opt.core.memory import Memory
from adaptive_opt.core.now import Correction, Now, Remembering, WrongOrder

Field = Literal["gradient", "direction", "second_moment", "rate"]

_WHERE_IT_COMES_FROM = {
    "second_moment": "second_moment(b2) or scale_by_adam(...)",
    "rate": "per_weight_rate(eps) or scale_by_adam(...), and before apply_rate()",
}
_DECAY_OF = {"direction": "b1", "second_moment": "b2"}


@dataclasses.dataclass(frozen=True)
class RateRule:
    """The rate of every weight as a rule over the second moment: one over a function of it.

    A rule follows the second moment: a stage that replaces ``v`` later changes the rate too. Where
    the denominator is 0 (a weight without any gradient, and eps = 0), the rate is 0, not infinity.

    Attributes:
      denominator: from the second moment of a leaf to the denominator of its rate.
    """

    denominator: Callable[[jax.Array], jax.Array]


@dataclasses.dataclass
class Known:
    """What is known of a quantity: who made it, and what it still owes."""

    by: str | None = None
    owes: tuple[Hyperparameter, ...] = ()
    """The decays of the averages in it that still carry their start at zero."""
    changed_by: str | None = None
    """Who changed it since it became an average; of a rate: who did more than multiply it."""
    values_since: str | None = None
    """Of a rate: who made values of the rule."""


class AdaptiveStep(Remembering):
    """One step of an adaptive optimizer for one array, on its way through the stages.

    What a line may read is one array, by construction. Everything is in one width, float32 at
    least. The verbs raise an error where a line stands in a place that makes no sense, and name
    that place.

    Attributes:
      gradient: g_t.
      direction: what is followed: g_t, then m_t, its corrected or damped form; shaped like it.
      second_moment: v_t, or what replaced it; real.
      rate: the learning rate of every single weight, as values.
      param: the parameter.
      count: the number of gradients seen, this one included.
    """

    def __init__(self, now: Now, gradient: Any, param: Any, memory: Memory) -> None:
        self.now, self.memory = now, memory
        if param is not None and jnp.shape(param) != jnp.shape(gradient):
            raise ValueError(
                f"gradient and parameter{memory.where()} differ in shape: {jnp.shape(gradient)},"
                f" {jnp.shape(param)}. Give update the parameters that the gradient is of."
            )
        self.update_dtype = trees.update_dtype(gradient, param)
        self.width = trees.real(trees.wide(self.update_dtype))
        gradient = trees.at_width(gradient, self.width)
        self._param, self.shape, self.inputs = param, gradient.shape, (gradient, param)
        self.values: dict[str, Any] = {"gradient": gradient, "direction": gradient}
        self._known = {"gradient": Known(), "direction": Known()}
        self._read: set[str] = set()
        self._rate_values: jax.Array | None = None
        self.notes: dict[str, Any] = {}
        self._noted_from: dict[str, frozenset[str]] = {}
        self.limited: dict[object, tuple[Any, Any]] = {}
        """What was limited, before and after, by turn."""

    def begin(self, memory: Memory | None = None) -> None:
        """Before every line: nothing has been read yet."""
        self.memory = memory or self.memory
        self._read = set()
        self.memory.remembered = False

    def start_from(self, direction: Any) -> None:
        """Another direction than the gradient, which something outside has made."""
        self.values["direction"] = trees.at_width(direction, self.width)

    def copy(self, now: Now) -> AdaptiveStep:
        """The same step for somebody else to change."""
        new = object.__new__(AdaptiveStep)
        vars(new).update(vars(self))
        new.now = now
        new.values, new._known = dict(self.values), dict(self._known)
        new.notes, new.limited = dict(self.notes), dict(self.limited)
        new._noted_from = dict(self._noted_from)
        return new

    # --- reading ------------------------------------------------------------------------------

    @property
    def gradient(self) -> jax.Array:
        return self._get("gradient")

    @property
    def direction(self) -> jax.Array:
        return self._get("direction")

    @property
    def second_moment(self) -> jax.Array:
        return self._get("second_moment")

    @property
    def rate(self) -> jax.Array:
        value = self._get("rate")
        if not isinstance(value, RateRule):
            return value
        if self._rate_values is None:
            self._rate_values = _divide(1.0, value.denominator(self.values["second_moment"]))
        return self._rate_values

    @property
    def update(self) -> jax.Array:
        """The direction times the rate, which is what the step would be, closed here."""
        direction, rate = self.direction, self.values.get("rate")
        self._read.add("rate")
        if isinstance(rate, RateRule):
            return _divide(direction, rate.denominator(self.values["second_moment"]))
        return direction if rate is None else direction * rate

    @property
    def param(self) -> jax.Array:
        if self._param is None:
            raise ValueError(
                f"{self.now.stage} needs the parameters: call update(gradients, state, params)."
            )
        return self._wide_param

    @functools.cached_property
    def _wide_param(self) -> jax.Array:
        return trees.at_width(self._param, self.width)

    def is_param(self, value: Any) -> bool:
        return self._param is not None and value is self._wide_param

    def raw(self, field: Field) -> jax.Array:
        """What no stage has changed: an average as it was made, a rate that was only multiplied."""
        value, known, stage = getattr(self, field), self._known[field], self._called()
        if self.now.lenient:
            return value
        if field == "rate" and known.changed_by is not None:
            raise WrongOrder(
                f"{stage} corrects a rate on which {known.changed_by} has acted already. Put"
                f" {self.now.stage} before {known.changed_by}."
            )
        if field != "rate":
            self._require_average(field, stage)
            if known.changed_by is not None:
                raise WrongOrder(
                    f"{stage} needs the {field} as the average it was made; another stage has"
                    f" changed it since. Put {stage} right after the stage that averages."
                )
        return value

    def correction(
        self,
        field: Literal["direction", "second_moment"],
        decay: Hyperparameter,
        *,
        as_in_optax: bool = False,
        unseen: int = 0,
    ) -> Any:
        """``1 - decay^t``, which the average in this field owes for its start at zero, once.

        Of an average that has not seen the first gradients, as many as are ``unseen``, t counts the
        others.
        """
        self.pay(field, decay)
        return self.at(self.now.correction(decay, Correction(-unseen, as_in_optax)))

    def pay(self, field: Literal["direction", "second_moment"], decay: Hyperparameter) -> None:
        """The average in this field is corrected for its start at zero, in whatever way."""
        self.now.paying = _DECAY_OF[field]
        if not self.now.lenient:
            known, stage = self._known.get(field, Known()), self._called()
            self._require_average(field, stage)
            (own, *others) = known.owes
            if others:
                raise WrongOrder(
                    f"{stage} corrects one average, but the {field} is an average of averages. Put"
                    " one correction right after each of them."
                )
            if checks.are_different_numbers(own, decay):
                raise WrongOrder(
                    f"{stage} was given the decay {decay}, but the {field} is an average with the"
                    f" decay {own}. Give both the same."
                )
            self._known[field] = dataclasses.replace(known, owes=())

    def correction_of(self, decay: Hyperparameter) -> Any:
        """``1 - decay^t``, which an average with this decay owes that is in no field."""
        return self.at(self.now.correction(decay, Correction(0, as_in_optax=False)))

    def correction_ahead(self, decay: Hyperparameter, *, as_in_optax: bool = False) -> Any:
        """``1 - decay^(t+1)``: what the average will owe at the next step."""
        return self.at(self.now.correction(decay, Correction(1, as_in_optax)))

    def noted(self, name: str) -> Any:
        """What an earlier stage has left under this name."""
        if name not in self.notes and not self.now.lenient:
            raise WrongOrder(
                f"{self.now.stage} reads the note {name!r}, which no stage before it has left;"
                f" there are {', '.join(sorted(self.notes)) or 'none'}. Put {self.now.stage} after"
                " the stage that leaves it."
            )
        self._read |= self._noted_from.get(name, set())  # it is made of what was read then
        return self.notes.get(name, self.values["gradient"])

    # --- writing ------------------------------------------------------------------------------

    def set(self, **fields: Any) -> AdaptiveStep:
        """The step with some of its quantities set; what it has already must have been read."""
        for field, value in fields.items():
            self._set(field, value)
        return self

    def limit(self, **fields: Any) -> AdaptiveStep:
        """The same for a stage that changes a quantity only where something is exceeded.

        Telemetry counts where.
        """
        for field, value in fields.items():
            before = getattr(self, field)
            self._set(field, value)
            self.limited[self.now.turn] = before, self.values[field]
            self.now.limits[self.now.turn] = self.now.stage
            if field == "rate":
                self._known[field].changed_by = self.now.stage
        return self

    def without(self, *fields: Field) -> AdaptiveStep:
        """The step after some of its quantities have been used up."""
        if "second_moment" in fields and "rate" not in fields and "rate" in self.values:
            made = self._known["rate"].by
            raise WrongOrder(
                f"{self.now.stage} uses up the second moment, but the rate of {made} is still made"
                f" of it. Keep one of the two, {self.now.stage} or {made}."
            )
        for field in fields:
            if field == "rate" and field in self.values:
                self.note(rate=self.rate)
                self._rate_values = None
            self.values.pop(field, None)
            self._known.pop(field, None)
        return self

    def note(self, **notes: Any) -> AdaptiveStep:
        """Leave something for later stages (``step.noted``) and observers; it changes no update."""
        self.notes |= notes
        self._noted_from |= dict.fromkeys(notes, frozenset(self._read))
        return self

    def close(self) -> jax.Array:
        """The plain update: direction times rate, in the dtype it was promised."""
        direction, rate = self.values["direction"], self.values.get("rate")
        if "second_moment" in self.values and rate is None:
            raise WrongOrder(
                "close_step() was given a second moment that no rate uses. Put per_weight_rate(eps)"
                " after the stages that change the second moment, or drop them."
            )
        # A copy where it is the direction: perhaps the very array that a stage keeps.
        update = jnp.copy(direction) if rate is None else self.update
        dtype = self.update_dtype
        if jnp.iscomplexobj(update):  # real gradients of complex parameters that were not given
            dtype = trees.with_both_parts(dtype)
        return finite.narrowed(update, dtype)

    def peek(self, field: str) -> Any:
        """What a field holds, for an observer; a rate as values."""
        return self.rate if field == "rate" else self.values[field]

    def shown(self) -> Any:
        """All that an observer may look at."""
        rate = self.peek("rate") if "rate" in self.values else None
        return self.values["direction"], rate, self.notes, list(self.limited.values())

    # --- what it knows ------------------------------------------------------------------------

    def kind_of(self, value: Any) -> str | None:
        """The field that holds this very value."""
        if value is self._rate_values:
            return "rate"
        return next((field for field, held in self.values.items() if held is value), None)

    def _get(self, field: str) -> Any:
        self._read.add(field)
        if field in self.values:
            return self.values[field]
        if self.now.lenient:  # a stage of a flat chain, which is initialised by itself
            self._known[field] = Known("an earlier stage")
            self.values[field] = trees.real_part(self.values["gradient"])
            return self.values[field]
        raise WrongOrder(
            f"{self.now.stage} reads the {field} of the step, which is not set yet. Put"
            f" {self.now.stage} after {_WHERE_IT_COMES_FROM[field]}."
        )

    def _set(self, field: str, value: Any) -> None:
        if field not in ("gradient", "direction", "second_moment", "rate"):
            raise TypeError(
                f"{self.now.stage} sets {field!r}: a step has gradient, direction, second_moment"
                " and rate; leave anything else with step.note(...)."
            )
        if isinstance(value, RateRule) and field != "rate":
            raise TypeError(f"{self.now.stage} sets the {field} to a RateRule, which is a rate.")
        stage, known, rate = self.now.stage, self._known.get(field), self.values.get("rate")
        is_read = field in self._read
        if known is not None and known.by is not None and not is_read:
            raise WrongOrder(
                f"{stage} would overwrite the {field} that an earlier stage has set. Keep one of"
                " the two; a stage that changes a field must come after the one that sets it."
            )
        if field == "second_moment" and rate is not None and not isinstance(rate, RateRule):
            values_since = self._known["rate"].values_since
            raise WrongOrder(
                f"{stage} changes the second moment, but the rate no longer follows it: it became"
                f" values in {values_since}. Put {stage} before {values_since}."
            )
        before, known = known or Known(), Known(stage)
        if isinstance(value, RateRule):
            _ = self.second_moment  # there must be one
        else:
            held, kept = self.now.averages.get(id(value)), self.now.kept.get(id(value))
            value = self._checked(field, value)
            inherited = before.owes if is_read else ()
            if held is not None:
                known.owes = (*inherited, held[1])
            elif inherited or is_read:
                known.owes = inherited
                known.changed_by = stage if inherited else before.changed_by
            if field == "rate":
                known.values_since = before.values_since or stage
                more = self.memory.remembered and is_read
                known.changed_by = stage if more else before.changed_by
            if kept is not None and kept[1] is not None:
                kept[1].kind = field
        self.values[field], self._known[field] = value, known
        self._read.add(field)
        if field in ("rate", "second_moment"):
            self._rate_values = None

    def _checked(self, field: str, value: Any) -> jax.Array:
        """A value in the width of the leaf at least, and of the shape that its field has."""
        own = getattr(value, "dtype", self.width)  # wider where a buffer is
        wide = jnp.issubdtype(own, jnp.inexact) and jnp.finfo(own).bits > jnp.finfo(self.width).bits
        value = trees.at_width(value, trees.real(own) if wide else self.width)
        stage, gradient = self.now.stage, self.values["gradient"]
        shape = gradient.shape if field in ("gradient", "direction") else None
        if field in self.values and field not in ("gradient", "direction"):
            held = self.values[field]
            shape = (self.values["second_moment"] if isinstance(held, RateRule) else held).shape
        if shape is not None and value.shape != shape:
            raise WrongOrder(
                f"{stage} makes the {field}{self.memory.where()} an array of shape {value.shape},"
                f" but it has the shape {shape}. Second moment and rate keep the shape in which"
                " they were made (the scope of second_moment), a direction that of the gradient."
                f" Put {stage} where both are alike, or drop it."
            )
        if field in ("second_moment", "rate") and jnp.iscomplexobj(value):
            raise TypeError(f"{stage} makes the {field} complex, which is real: take its absolute.")
        return value

    def _require_average(self, field: str, stage: str) -> None:
        if field in _WHERE_IT_COMES_FROM and field not in self.values:
            self._get(field)
        if not self._known[field].owes:
            raise WrongOrder(
                f"{stage} corrects the {field} for its start at zero, but that is no moving"
                " average here, or has been corrected already. Put it once, after"
                " first_moment(b1) and second_moment(b2); scale_by_adam(...) corrects by itself."
            )

    def _called(self) -> str:
        """The stage that speaks, with the decay it is busy with where it has several."""
        stage, paying = self.now.stage, self.now.paying
        several = {"b1", "b2"} <= set(self.now.settings)
        return f"{stage}({paying})" if several and paying else stage


def _divide(x: Any, y: jax.Array) -> jax.Array:
    """x / y, and 0 where y is 0.

    The quotient comes last: XLA:CPU would store the root as well if its test for 0 were left over.
    An array x is left as it comes, so that ``m / c / y`` is rounded as in optax.
    """
    zero = y == 0
    if isinstance(x, jax.Array):
        return x / jnp.where(zero, jnp.inf, y)
    return jnp.where(zero, 0, x) / jnp.where(zero, 1, y)
