"""What a contract is, where all of them are listed, and how one says that it is broken."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Broken(AssertionError):  # noqa: N818 (says what it is)
    """An optimizer breaks a contract; the text is the smallest case in which it does."""


class DoesNotApply(Exception):  # noqa: N818
    """A contract cannot be asked of this optimizer, or not here; the text is the reason."""


class Contract(NamedTuple):
    """What an optimizer promises.

    Attributes:
      name: as ``check`` takes it in ``only=`` and ``excused=``.
      reason: why it is asked, in a sentence.
      hold: a function of the optimizer under test; raises :class:`Broken`.
    """

    name: str
    reason: str
    hold: Callable[[Any], None]


CONTRACTS: dict[str, Contract] = {}
"""Every contract by its name, in the order in which they are checked."""


def contract(hold: Callable[[Any], None]) -> Callable[[Any], None]:
    """Lists a function as a contract. Its docstring is the reason."""
    reason = " ".join((inspect.getdoc(hold) or "").split())
    CONTRACTS[hold.__name__] = Contract(hold.__name__, reason, hold)
    return hold


@contextlib.contextmanager
def case(what: str) -> Iterator[None]:
    """Names the case that breaks a contract, or in which the optimizer raises an error."""
    try:
        yield
    except DoesNotApply:
        raise
    except Broken as broken:
        raise Broken(f"{what}: {broken}") from broken
    except Exception as error:
        raise Broken(f"{what}: {said(error)}") from error


def said(error: Exception) -> str:
    """An error in one line."""
    lines = str(error).strip().splitlines() or [""]
    short = lines[0] if len(lines[0]) <= 160 else lines[0][:157] + "..."
    return f"raises {type(error).__name__}: {short}"
