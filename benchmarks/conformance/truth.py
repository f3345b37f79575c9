"""Whose code a method is compared with, and what that code computes.

A method is a recipe here, and has the rows of tests/references whose names begin as ``rows`` says.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from benchmarks.conformance.recorded import ROWS, arrays_of, multiplier

WORDS = {
    *["defaults", "far", "schedule", "decay", "binding", "plain", "heavy", "nesterov", "more"],
    *["tall", "wide", "square", "cube", "vector"],
    *["mlp.bias", "mlp.weight", "wte.weight", "q_proj.weight", "norm.weight", "gate"],
}
"""What a row may have behind its name without being another algorithm."""
AUTHORS = "the authors' code"
PAPER = "the paper's listing, as this computes it"
USUAL = "no code of the authors is recorded, and papers leave choices: this is the yardstick"


@dataclasses.dataclass(frozen=True)
class Case:
    """One recorded row: hyperparameters, gradients, and the parameters after every step."""

    name: str
    row: dict[str, Any]
    table: str

    @property
    def arguments(self) -> dict[str, Any]:
        return self.row["arguments"]

    @functools.cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.row.get("shape", self._array("start").shape))

    @functools.cached_property
    def gradients(self) -> np.ndarray:
        gradients = arrays_of(self.table)[self.row.get("gradients", "gradients")]
        return gradients.reshape(-1, *self.shape)

    @functools.cached_property
    def losses(self) -> np.ndarray | None:
        return arrays_of(self.table)[self.row["losses"]] if "losses" in self.row else None

    @functools.cached_property
    def start(self) -> np.ndarray:
        return self._array("start").reshape(self.shape)

    @functools.cached_property
    def factors(self) -> np.ndarray:
        """Of the learning rate, at every step."""
        steps = len(self.gradients)
        return np.asarray(multiplier(steps)) if self.row["scheduled"] else np.ones(steps)

    @functools.cached_property
    def path(self) -> np.ndarray:
        """The parameters after every step: the recorded updates, added up.

        Of the parameters themselves some rows have every fiftieth; those are what this has there.
        """
        path = self.start + np.cumsum(self._array("updates").reshape(self.gradients.shape), axis=0)
        every = self.row["parameters_every"]
        kept = self._array("parameters").reshape(-1, *self.shape)
        size = np.abs(path).max(axis=0)
        assert np.all(np.abs(path[every - 1 :: every] - kept) <= 1e-12 * size), self.row["name"]
        return path

    def _array(self, name: str) -> np.ndarray:
        return arrays_of(self.table)[f"{self.row['name']}/{name}"]


@dataclasses.dataclass(frozen=True)
class Method:
    """A method, the rows of its reference, and whose those are."""

    name: str
    rows: str
    whose: str = AUTHORS

    @functools.cached_property
    def cases(self) -> dict[str, Case]:
        found = {}
        for table, rows in ROWS.items():
            for row in rows:
                name, prefix = row["name"], f"{self.rows}-"
                case = name.removeprefix(prefix)
                if name.startswith(prefix) and WORDS.issuperset(case.split("-")):
                    found[case] = Case(case, row, table)
        return found

    @property
    def source(self) -> str:
        row = next(iter(self.cases.values())).row
        return f"{row['source']} {row['version'][:12]}"


METHODS = {
    method.name: method
    for method in (
        Method("adam", "adam-torch", PAPER),
        Method("adamw", "adamw-paper", PAPER),
        Method("amsgrad", "amsgrad-paper", PAPER),
        Method("radam", "radam-reference"),
        Method("nadam", "nadam-torch", PAPER),
        Method("nadamw", "nadamw-torch", USUAL),
        Method("adamax", "adamax-torch", USUAL),
        Method("adagrad", "adagrad-torch", PAPER),
        Method("adadelta", "adadelta-torch", PAPER),
        Method("rmsprop", "rmsprop-torch", USUAL),
        Method("sgd", "sgd-torch", USUAL),
        Method("sgdw", "sgdw-keras-decoupled", USUAL),
        Method("adamod", "adamod-package"),
        Method("diffgrad", "diffgrad-v2"),
        Method("diffmod", "diffmod-absolute"),
        Method("adabound", "adabound-package"),
        Method("amsbound", "amsbound-package"),
        Method("adabelief", "adabelief-package"),
        Method("lion", "lion-reference"),
        Method("yogi", "yogi-tensorflow", USUAL),
        Method("laprop", "laprop-reference"),
        Method("adopt", "adopt-reference"),
        Method("ademamix", "ademamix-reference"),
        Method("mars", "mars-adamw"),
        Method("adan", "adan-reference"),
        Method("stableadamw", "stableadamw-author"),
        Method("novograd", "novograd-reference"),
        Method("lamb", "lamb-reference"),
        Method("lars", "lars-optax", USUAL),
        Method("adam_atan2", "adam_atan2-lucidrains", USUAL),
        Method("adamp", "adamp-reference"),
        Method("ranger", "ranger-lessw2020"),
        Method("lookahead", "lookahead-pytorch_optimizer", USUAL),
        Method("cautious_adamw", "cautious-adam"),
        Method("cautious_lion", "cautious-lion"),
        Method("schedule_free_sgd", "schedule-free-sgd"),
        Method("schedule_free_adamw", "schedule-free-adamw"),
        Method("schedule_free_radam", "schedule-free-radam"),
        Method("schedule_free_plus", "schedule-free-plus"),
        Method("muon", "muon-reference"),
        Method("soap", "soap"),
        Method("adafactor", "adafactor-mesh"),
        Method("adam_mini", "adam_mini"),
        Method("adamh", "adamh"),
    )
}
