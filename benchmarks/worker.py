"""A process that holds contestants and runs them when told to: JSON lines in, JSON lines out."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import warnings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("jax", "jax-option", "torch"))
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # nothing else gets between the answers
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))[: options.threads]
        os.sched_setaffinity(0, allowed)  # XLA makes as many threads as it may use
    if options.kind == "torch":
        import torch

        torch.set_num_threads(options.threads)
        cuda = torch.cuda.is_available()
        device = torch.cuda.get_device_name() if cuda else "cpu"
        peers = ("torch", "pytorch_optimizer", "torch_optimizer")
        installed = [peer for peer in peers if importlib.util.find_spec(peer)]
        about = {peer: importlib.metadata.version(peer) for peer in installed} | {"device": device}
    else:
        import jax
        import optax

        import adaptive_opt

        if options.kind == "jax-option":
            adaptive_opt.enable_single_pass()
            adaptive_opt.single_pass_stands_aside()  # it compiles twice before it answers, once
        about = {
            "jax": jax.__version__,
            "optax": optax.__version__,
            "device": jax.devices()[0].device_kind,
            "platform": jax.default_backend(),
        }
    from benchmarks.contestants import prepare
    from benchmarks.timing import seconds

    print(json.dumps(about), file=answers, flush=True)
    ready = {}
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "prepare":
            ready[order["name"]] = prepare(order["name"], order["algorithm"], order["shapes"])
            answer = ready[order["name"]].facts
        elif order["do"] == "run":
            answer = seconds(ready[order["name"]].run, order["times"])
        else:
            ready.clear()
            answer = None
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
