"""How many gradients the parts of a state have seen: not all of them have seen the same.

A schedule outside of a guard counts the steps that were skipped; what is inside of ``MultiSteps``
counts sums of gradients; a group that was frozen starts later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from adaptive_opt.checkpoints.places import Place, over
from adaptive_opt.checkpoints.rules import rule_of
from adaptive_opt.core.bracket import AdaptiveState, OpenStepState
from adaptive_opt.core.describe import shown

_HOLD_BACK = ("MultiStepsState", "SkipNonfiniteState", "SkipSpikesState", "ApplyIfFiniteState",
              "ConditionallyMaskState", "ConditionallyTransformState")  # fmt: skip
"""The wrappers that do not hand on every gradient."""


_MOST = 2**31 - 1
"""What optax counts up to."""


@dataclasses.dataclass(frozen=True)
class Count:
    """A count of gradients: whose it is, and of which parameters."""

    whose: str
    behind: tuple[Any, ...]
    labels: tuple[Any, ...]
    covered: frozenset[str]
    value: int


def count_of(place: Place) -> tuple[str, ...]:
    """The fields that count gradients: an observer of something else has numbers of its own."""
    fields = place.fields()
    if isinstance(place.state, dict) or place.kind == "MultiStepsState":
        return ()
    if place.inner is None and whose(place) != "moments":
        others = [leaf for n, x in fields.items() if n != "count" for leaf in over(x).values()]
        if any(jnp.ndim(x) == 0 and jnp.issubdtype(jnp.result_type(x), jnp.inexact)
               for x in others if hasattr(x, "dtype") and _is_plain(x)):  # fmt: skip
            return ()
    names = ("count", "step") if place.inner else ("count",)
    return tuple(n for n in names if n in fields and jnp.ndim(fields[n]) == 0)


def _is_plain(x: Any) -> bool:
    return not str(x.dtype).startswith("key<")


def whose(place: Place) -> str:
    """Of moments, of a schedule (or noise), or of a wrapper."""
    if place.inner is not None:
        return place.kind
    if isinstance(place.state, (AdaptiveState, OpenStepState)) or rule_of(place) is not None:
        return "moments"
    return "others"


def _behind(place: Place) -> tuple[Any, ...]:
    return tuple(w for w in place.within if w in _HOLD_BACK)


def _of(counts: Iterable[Count]) -> frozenset[str]:
    return frozenset(path for count in counts for path in count.covered)


def number_of_gradients(given: Any, what: str) -> int:
    """A number of gradients that somebody says, as an int: of whatever type, but whole."""
    is_whole = jnp.issubdtype(getattr(given, "dtype", np.bool_), jnp.integer)
    is_int = type(given) is int or (is_whole and np.ndim(given) == 0)
    if is_int and 0 <= int(given) <= _MOST:
        return int(given)
    raise ValueError(
        f"{what} should be a number of gradients, a whole number from 0 to {_MOST}; got"
        f" {shown(given)[:100]}."
    )


class Counts:
    """The counts of a state."""

    def __init__(self) -> None:
        self.known: list[Count] = []
        self.given: Any = None  # a number, or one for each path: a mapping, or a function
        self.paths: Collection[str] = ()

    def note(self, place: Place, covered: frozenset[str]) -> None:
        fields = [(whose(place), f) for f in count_of(place)]
        if place.kind == "MultiStepsState":
            fields.append((place.kind, "gradient_step"))
        for owner, field in fields:
            value = int(getattr(place.state, field))
            self.known.append(Count(owner, _behind(place), place.labels, covered, value))

    def at(self, given: Any, paths: Collection[str]) -> Counts:
        """The same, where somebody says how many there were: what the state says too, if it does.

        Where its counts differ, it is one of them.
        """
        new = Counts()
        new.known, new.paths = self.known, paths
        if given is None or callable(given) or isinstance(given, Mapping):
            new.given = given
            return new
        new.given = number_of_gradients(given, "count=")
        of_moments = {c.value for c in self.known if c.whose == "moments"}
        most = max((c.value for c in self.known), default=_MOST)
        if (of_moments and new.given not in of_moments) or new.given > most:
            said = sorted(of_moments or {c.value for c in self.known})
            raise ValueError(
                f"count={new.given}, but the state has seen {' or '.join(map(str, said))}"
                " gradients. Leave count= out; it is for what the state does not say, and for"
                " counts that differ."
            )
        return new

    def are_zero(self, given: Any) -> bool:
        """Whether nothing has been seen yet, so that everything is as at the start."""
        if given is not None:
            return given == 0
        return bool(self.known) and all(count.value == 0 for count in self.known)

    def schedules_apart(self) -> list[int]:
        """The counts, where a schedule's is another than that of the moments beside it."""
        if self.given is not None:
            return []
        for one in self.known:
            for other in self.known:
                beside = one.labels == other.labels and one.value != other.value
                if beside and one.whose == "others" and other.whose == "moments":
                    return sorted({one.value, other.value})
        return []

    def of(self, place: Place, covered: frozenset[str], kept: frozenset[str]) -> int | str:
        """The count of a place of another state that goes on; or why nobody knows it.

        Args:
          place: it.
          covered: the parameters whose gradients come by.
          kept: those of which it has buffers.
        """
        if self.given is not None:
            return self._given(kept)
        owner, behind, labels = whose(place), _behind(place), place.labels

        def is_near(count: Count) -> bool:
            return bool(covered & count.covered) if covered else labels == count.labels

        mine = [c for c in self.known if c.whose == owner]
        moments = [c for c in self.known if c.whose == "moments"]
        for some in (mine, moments, self.known):
            for candidates in (
                [c for c in some if is_near(c) and c.behind == behind and c.labels == labels],
                [c for c in some if is_near(c) and c.behind == behind],
                [c for c in some if is_near(c)],
                [c for c in some if c.behind == behind],
                some,
            ):
                if any(covered & (c.covered - _of(candidates)) for c in some):
                    continue  # they do not speak of all these parameters
                values = sorted({c.value for c in candidates})
                if len(values) == 1:
                    return values[0]
                if values:
                    of = f" of {', '.join(sorted(covered))}" if covered and labels else ""
                    return f"the counts in the state{of} differ: {values}; give count=."
        return "the state of the source does not say how many gradients it has seen: give count=."

    def _given(self, kept: frozenset[str]) -> int | str:
        if isinstance(self.given, int):
            return self.given
        values = {path: self._given_of(path) for path in sorted(kept or self.paths)}
        if not kept:
            return max(values.values(), default=0)
        if len(set(values.values())) > 1:
            said = ", ".join(f"{path}: {n}" for path, n in values.items())
            return (
                f"these parameters have seen different numbers of gradients ({said}), but the"
                " target counts them together: put them in groups of their own."
            )
        return next(iter(values.values()))

    def _given_of(self, path: str) -> int:
        given: Any = self.given
        if isinstance(given, Mapping):
            if path not in given:
                raise ValueError(
                    f"count= does not say how many gradients {path} has seen; it has"
                    f" {', '.join(map(str, given)) or 'nothing'}."
                )
            given = given.__getitem__
        return number_of_gradients(given(path), f"count= of {path}")
