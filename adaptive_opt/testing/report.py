"""The check of an optimizer, and its report."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import jax

from adaptive_opt.core.checks import choose
from adaptive_opt.testing.contract import CONTRACTS, Broken, Contract, DoesNotApply, said
from adaptive_opt.testing.subject import Subject


class Result(NamedTuple):
    """What one contract said.

    Attributes:
      contract: its name.
      outcome: "holds", "broken", "excused" (broken, and the caller says why), or "skipped".
      reason: why the contract is there.
      case: the smallest case that breaks it, or why it was skipped or excused.
      seconds: what it took.
    """

    contract: str
    outcome: str
    reason: str
    case: str
    seconds: float


class Report(tuple[Result, ...]):
    """The results of a check, in the order of the contracts; prints as a table."""

    @property
    def broken(self) -> tuple[Result, ...]:
        """Those that are broken, without those that are excused."""
        return tuple(r for r in self if r.outcome == "broken")

    def as_data(self) -> list[dict[str, Any]]:
        """A dict for every contract, for JSON."""
        return [result._asdict() for result in self]

    def __str__(self) -> str:
        width = max((len(r.contract) for r in self), default=0)
        lines = [f"{r.contract:<{width}}  {r.outcome:<7}  {r.case}".rstrip() for r in self]
        held = sum(r.outcome == "holds" for r in self)
        total = f"{held} of {len(self)} hold, {len(self.broken)} are broken"
        return "\n".join([*lines, total])


def check(
    optimizer: Any,
    *,
    learning_rate: float = 1e-2,
    extra: Mapping[str, Any] | None = None,
    gradient_scaling: float | None = None,
    only: Collection[str] | None = None,
    excused: Mapping[str, str] | None = None,
) -> Report:
    """Any optax optimizer against the contracts that a training loop relies on.

    For an optimizer of anyone's; it need know nothing of this package. Use it when writing one, and
    before trusting one with a long run: it takes under a minute. ``CONTRACTS`` lists what is
    asked, each with its reason. Programs are small, shared between the contracts, and in float64
    unless the dtype is the matter.

    Args:
      optimizer: a function of the learning rate that makes an optimizer (``optax.adam``), or an
        optimizer; without the function, what needs other rates or schedules is skipped.
      learning_rate: at which it goes down; others are tried before "it does not descend" is said.
      extra: what its ``update`` wants by name; ``value`` is always given.
      gradient_scaling: the law that you declare: p in ``update(c g) = c^p update(g)``, 0 for Adam
        without decay, 1 for SGD.
      only: names of contracts to ask; default: all.
      excused: names of contracts that may be broken, each with your reason. One that holds is
        reported as broken, so that no excuse outlives its cause.

    The contract of shardings needs two devices or more; without a machine that has them,
    ``jax.config.update("jax_num_cpu_devices", 8)`` before anything is computed.

    Returns a :class:`Report`. ValueError for a contract that does not exist; TypeError where
    ``optimizer`` makes no optimizer.

    >>> import optax
    >>> from adaptive_opt.testing import check
    >>> report = check(optax.sgd(0.1), only=["none_parameters", "schedule_count"])
    >>> print(report)
    none_parameters  holds
    schedule_count   skipped  give check a function of the learning rate, not a made optimizer
    1 of 2 hold, 0 are broken
    """
    excused = dict(excused or {})
    for name in (*(only or ()), *excused):
        choose("a contract", name, CONTRACTS)
    chosen = [c for c in CONTRACTS.values() if only is None or c.name in only]
    with jax.enable_x64(True):
        subject = Subject(optimizer, learning_rate, extra or {}, gradient_scaling)
        return Report(_result(one, subject, excused.get(one.name)) for one in chosen)


def assert_optimizer(optimizer: Any, **settings: Any) -> Report:
    """:func:`check` for a test: AssertionError where a contract is broken, with every case.

    Args:
      optimizer: as of :func:`check`.
      **settings: as of :func:`check`.

    Returns the report.

    >>> import optax
    >>> from adaptive_opt.testing import assert_optimizer
    >>> report = assert_optimizer(optax.sgd, only=["scalar_leaves", "empty_trees"])
    >>> [result.outcome for result in report]
    ['holds', 'holds']
    """
    report = check(optimizer, **settings)
    if report.broken:
        lines = (f"{r.contract}: {r.case}\n    {r.reason}" for r in report.broken)
        raise AssertionError("\n".join(["the optimizer breaks", *lines]))
    return report


def _result(one: Contract, subject: Subject, excuse: str | None) -> Result:
    began = time.perf_counter()
    try:
        one.hold(subject)
        outcome, why = "holds", ""
    except DoesNotApply as reason:
        outcome, why = "skipped", str(reason)
    except Broken as smallest:
        outcome, why = "broken", str(smallest)
    except Exception as error:
        outcome, why = "broken", said(error)
    if excuse is not None and outcome == "broken":
        outcome, why = "excused", f"{excuse} ({why})"
    elif excuse is not None and outcome == "holds":
        outcome, why = "broken", f"it is excused and holds: take the excuse away ({excuse})"
    return Result(one.name, outcome, one.reason, why, time.perf_counter() - began)
