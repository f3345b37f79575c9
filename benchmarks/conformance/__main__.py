"""Who computes what: optimizers of many libraries against their authors' code.

python -m benchmarks.conformance               # in an environment of its own, made for it; renews
                                               # docs/conformance.md and results/conformance.json
python -m benchmarks.conformance --environment DIR   # in that one, made where it is not complete
python -m benchmarks.conformance --here        # in this one, which has the libraries
python -m benchmarks.conformance --page        # renews the page from the results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from benchmarks.conformance import environment
from benchmarks.conformance.page import BEGIN, DATA, END, PAGE, page
from benchmarks.pages import renew


def measured() -> dict[str, Any]:
    """Everything, in this process."""
    os.environ["KERAS_BACKEND"] = "jax"
    import jax
    import torch

    jax.config.update("jax_enable_x64", True)
    torch.set_default_dtype(torch.float64)  # or NAdam keeps its product of momenta in float32
    from benchmarks.conformance import measure

    results = measure.everything()
    if found := measure.faults(results):
        raise SystemExit("what the tables of the libraries say is not so:\n" + "\n".join(found))
    today = datetime.datetime.now(tz=datetime.UTC).date()
    return {"date": str(today), "versions": measure.versions(), "methods": results}


def main() -> None:
    assert __doc__
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true")
    where.add_argument("--page", action="store_true")
    where.add_argument("--environment", type=pathlib.Path)
    given = parser.parse_args()
    if given.here:
        DATA.write_text(json.dumps(measured(), indent=1) + "\n")
    elif not given.page:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(environment.run_in(given.environment or pathlib.Path(folder)))
    renew(PAGE, BEGIN, page(json.loads(DATA.read_text())), END)


if __name__ == "__main__":
    main()
