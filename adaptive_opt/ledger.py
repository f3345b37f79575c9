"""Which orders of stages make sense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from adaptive_opt.policies import Scope, are_different_numbers

Field = Literal["gradient", "direction", "second_moment", "rate"]
FIELDS: tuple[Field, ...] = ("gradient", "direction", "second_moment", "rate")

_WHERE_IT_COMES_FROM = {
    "second_moment": "second_moment(b2) or scale_by_adam(...)",
    "rate": "per_weight_rate(eps) or scale_by_adam(...), and before apply_rate()",
}


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a stage says of itself; see :func:`adaptive_opt.stage`."""

    name: str
    reads: tuple[Field, ...]
    replaces: tuple[Field, ...]
    biases: Mapping[Field, Any]
    debiases: Mapping[Field, Any]
    fixes_rate: bool
    bounds_rate: bool
    raw: tuple[Field, ...]
    consumes: tuple[Field, ...]
    buffer: str | None
    scope: Scope | None
    """What has a number of its own in its buffer; None: whatever has one in the second moment."""
    takes_scope: bool
    limits: Field | None = None


@dataclasses.dataclass(frozen=True)
class Ledger:
    """What has been done to a step so far: enough to refuse a wrong order of stages.

    Nothing in it is an array, so a bracket can walk its stages through a ledger when it is built,
    and a flat chain does the same when it is traced.
    """

    filled: frozenset[str] = frozenset({"gradient", "direction"})
    """The fields that hold something."""
    rate_fixed_by: str | None = None
    """The stage after which the rate is values and no longer follows the second moment."""
    rate_bounded_by: str | None = None
    """The stage that made the rate depend on earlier rates or on limits."""
    decays: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """For each field, the decays of the averages in it that still carry their start at zero."""
    changed: frozenset[str] = frozenset()
    """The fields changed since they became an average."""
    scope: Scope = "weight"
    """What has a second moment, and a rate, of its own."""
    scope_set_by: str | None = None
    """The stage that set the second moment."""
    buffers: frozenset[str] = frozenset()
    """The names of the buffers kept so far."""

    def after(self, stage: Declaration) -> Ledger:
        """The ledger after this stage; an error that says where it belongs, if not here."""
        for field in stage.reads:
            self._require_filled(stage, field)
        for field in stage.replaces:
            if field in self.filled and field not in stage.reads:
                raise ValueError(
                    f"{stage.name} would overwrite the {field} that an earlier stage has set. Keep"
                    " one of the two; a stage that changes a field must come after the one that"
                    " sets it."
                )
        if "second_moment" in stage.replaces and self.rate_fixed_by is not None:
            raise ValueError(
                f"{stage.name} changes the second moment, but the rate no longer follows it: it"
                f" became values in {self.rate_fixed_by}. Put {stage.name} before"
                f" {self.rate_fixed_by}."
            )
        for field, decay in stage.debiases.items():
            self._require_biased(stage, field, decay)
        if stage.debiases and "rate" in stage.replaces and self.rate_bounded_by is not None:
            raise ValueError(
                f"{stage.name} corrects a rate on which {self.rate_bounded_by} has acted already."
                f" Put {stage.name} before {self.rate_bounded_by}."
            )
        for field in stage.raw:
            if field in self.changed:
                raise ValueError(
                    f"{stage.name} needs the {field} as the average it was made; another stage has"
                    f" changed it since. Put {stage.name} right after the stage that averages."
                )
        self._require_same_scope(stage)
        if stage.buffer is not None and stage.buffer in self.buffers:
            raise ValueError(
                f"two stages keep a buffer called {stage.buffer!r}. Give one of them another:"
                f" {stage.name}(..., name={stage.buffer + '_2'!r}); scale_by_adam(...), which has"
                " fixed names, can be replaced by the stages it is made of."
            )
        return self._noting(stage)

    def check_closing(self) -> None:
        """An error if something is missing before the step can be closed."""
        if "second_moment" in self.filled and "rate" not in self.filled:
            raise ValueError(
                "close_step() was given a second moment that no rate uses. Put per_weight_rate(eps)"
                " after the stages that change the second moment, or drop them."
            )

    def _require_filled(self, stage: Declaration, field: str) -> None:
        if field not in self.filled:
            raise ValueError(
                f"{stage.name} reads the {field} of the step, which is not set yet. Put"
                f" {stage.name} after {_WHERE_IT_COMES_FROM[field]}."
            )

    def _require_same_scope(self, stage: Declaration) -> None:
        changed = set(stage.reads) & set(stage.replaces) & {"second_moment", "rate"}
        told_or_finer = stage.takes_scope or stage.scope == "weight"
        if changed and told_or_finer and stage.scope not in (None, self.scope):
            whose = f"second moment, set by {self.scope_set_by}," if self.scope_set_by else "rate"
            raise ValueError(
                f"{stage.name} has the scope {stage.scope!r}, but the {whose} has {self.scope!r}."
                " Put the same scope= into both; a stage that does not take it needs 'weight'."
            )

    def _require_biased(self, stage: Declaration, field: str, decay: Any) -> None:
        pending = list(self.decays.get(field, ()))
        if not pending:
            raise ValueError(
                f"{stage.name} corrects the {field} for its start at zero, but that is no moving"
                " average here, or has been corrected already. Put it once, after"
                " first_moment(b1) and second_moment(b2); scale_by_adam(...) corrects by itself."
            )
        if len(pending) > 1:
            raise ValueError(
                f"{stage.name} corrects one average, but the {field} is an average of averages. Put"
                " one correction right after each of them."
            )
        if are_different_numbers(pending[0], decay):
            raise ValueError(
                f"{stage.name} was given the decay {decay}, but the {field} is an average with the"
                f" decay {pending[0]}. Give both the same."
            )

    def _noting(self, stage: Declaration) -> Ledger:
        decays = {k: v for k, v in self.decays.items() if k not in stage.debiases}
        for field, decay in stage.biases.items():
            decays[field] = (*decays.get(field, ()), decay)
        averaged = set(stage.biases)
        changed = (set(stage.replaces) & set(self.decays)) - averaged - set(stage.debiases)
        used_up = "rate" in stage.consumes
        fixed_by = stage.name if stage.fixes_rate else self.rate_fixed_by
        sets_scope = "second_moment" in stage.replaces and "second_moment" not in stage.reads
        bounded_by = stage.name if stage.bounds_rate else self.rate_bounded_by
        return Ledger(
            filled=(self.filled | set(stage.replaces)) - set(stage.consumes),
            rate_fixed_by=None if used_up else fixed_by,
            rate_bounded_by=None if used_up else bounded_by,
            decays={k: v for k, v in decays.items() if k not in stage.consumes},
            changed=frozenset((self.changed - averaged) | changed),
            scope=(stage.scope or "weight") if sets_scope else self.scope,
            scope_set_by=stage.name if sets_scope else self.scope_set_by,
            buffers=self.buffers | ({stage.buffer} if stage.buffer else set()),
        )
