"""transformers, which keeps one optimizer."""

from __future__ import annotations

from transformers.optimization import Adafactor

from benchmarks.conformance.libraries import Entry

PACKAGES = ("transformers",)

TABLE = {
    "adafactor": Entry(
        lambda p, h: Adafactor(
            p, h["learning_rate"], (h.get("eps", 1e-30), h.get("eps_scale", 1e-3)),
            h.get("threshold", 1.0), -h.get("decay_rate", 0.8), h.get("b1"), relative_step=False,
        ),
        differs="",
        ours={"axes": "last"},
    ),
}  # fmt: skip
