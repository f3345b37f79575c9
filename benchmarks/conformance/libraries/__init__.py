"""The libraries: of each, every method it has as one call, at its most equal.

A module here is one library, its ``TABLE`` has a line for each method: how to make the optimizer
from the hyperparameters of a row, in which convention of ours it is what it is, and what differs
from the reference in words. Versions are in ``requirements.txt``.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

NAMES = {
    "optax": "jax_optax",
    "torch.optim": "torch_optim",
    "Keras": "keras_optimizers",
    "pytorch_optimizer": "torch_pytorch_optimizer",
    "torch_optimizer": "torch_torch_optimizer",
    "timm": "torch_timm",
    "optimi": "torch_optimi",
    "transformers": "torch_transformers",
    "packages of one method": "torch_single_packages",
}
"""Of the columns: the module with the table, whose first word is what it runs on."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One method of one library."""

    make: Callable[..., Any]
    """PyTorch: ``([parameter], h)``; optax: ``(schedule, h)``; Keras: ``(h)``."""
    differs: str = ""
    """From the reference, in words."""
    ours: dict[str, Any] | Callable[..., dict[str, Any]] | None = None
    """The arguments, perhaps of h, with which the recipe here is what the library has; checked."""
    lacks: tuple[str, ...] = ()
    """Hyperparameters that it does not have: rows with them are left out."""
    note: str = ""
    """What is no departure."""
    casts_out: bool = False
    """Whether it runs without its casts to float32 and bfloat16."""


def module_of(library: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{NAMES[library]}")


def decay_of(h: dict[str, Any]) -> float:
    return h.get("weight_decay", 0.0)


def torch_options(h: dict[str, Any], *betas: str, decay_by: float = 1.0) -> dict[str, Any]:
    """Learning rate, betas (b1 and b2), eps and decay as every optimizer of PyTorch names them."""
    named = {"lr": h["learning_rate"], "betas": tuple(h[b] for b in betas or ("b1", "b2"))}
    named |= {"eps": h["eps"]} if "eps" in h else {}
    return named | {"weight_decay": decay_by * decay_of(h)}


def paper_decay(h: dict[str, Any]) -> dict[str, Any]:
    """For codes that multiply the decay by the learning rate, which AdamW's paper does not."""
    return torch_options(h, decay_by=1 / h["learning_rate"])
