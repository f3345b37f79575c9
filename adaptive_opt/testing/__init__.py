"""Anyone's optimizer against what training loops rely on: ``check`` and ``assert_optimizer``."""

# Each of these modules lists its contracts when it is imported.
from adaptive_opt.testing import dtypes, programs, shapes, states, steps, wrapping  # noqa: F401
from adaptive_opt.testing.contract import CONTRACTS, Contract
from adaptive_opt.testing.report import Report, Result, assert_optimizer, check

__all__ = ["CONTRACTS", "Contract", "Report", "Result", "assert_optimizer", "check"]
